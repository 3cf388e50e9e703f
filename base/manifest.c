#include "manifest.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "build_commit.h"
#include "build_info.h"
#include "check.h"
#include "clock.h"
#include "err.h"
#include "files.h"

#define SYS_MAX_BYTES (1u << 20)
#define BOOT_ID_PATH  "/proc/sys/kernel/random/boot_id"
#define CPU_PATH      "/sys/devices/system/cpu/"
#define NODE_PATH     "/sys/devices/system/node/"
#define CLOCK_PATH    "/sys/devices/system/clocksource/clocksource0/current_clocksource"

const char *manifest_version(void)
{
        return BUILD_VERSION;
}

const char *manifest_commit(void)
{
        return BUILD_COMMIT;
}

/* The file without its last newline, free() it; NULL when it cannot be read, which is no error of anybody's here. */
static char *read_text(const char *path)
{
        char *text = NULL;
        size_t len = 0;

        if (file_read(path, SYS_MAX_BYTES, &text, &len) < 0) {
                err_clear();
                return NULL;
        }
        if (len && text[len - 1] == '\n')
                text[len - 1] = '\0';
        return text;
}

static void set_file(json *object, const char *key, const char *path)
{
        char *text = read_text(path);

        json_set_str(object, key, text);
        free(text);
}

/* The 32 hexadecimal digits of a UUID as two words; zeros when it is anything else. */
void manifest_boot_id(uint64_t out[2])
{
        char *text = read_text(BOOT_ID_PATH);
        int digits = 0;

        out[0] = out[1] = 0;
        for (const char *p = text; p && *p; p++) {
                char digit[2] = {*p, '\0'};

                if (!isxdigit((unsigned char)*p))
                        continue;
                if (digits < 32)
                        out[digits / 16] = out[digits / 16] << 4 | strtoul(digit, NULL, 16);
                digits++;
        }
        if (digits != 32)
                out[0] = out[1] = 0;
        free(text);
}

/* "model name" on x86; arm has only numbers, of which implementer and part name the core. */
static void set_model(json *cpu)
{
        char *text = read_text("/proc/cpuinfo");
        char *at = text ? strstr(text, "model name") : NULL;
        char *colon = at ? strchr(at, ':') : NULL;

        if (colon) {
                char *line = colon + 1 + strspn(colon + 1, " \t");

                line[strcspn(line, "\n")] = '\0';
                json_set_str(cpu, "model", line);
        } else {
                json_set_null(cpu, "model");
        }
        free(text);
}

/* How many numbers a list such as "0-3,8" names; 0 when it is none. */
static int64_t list_count(const char *list)
{
        int64_t count = 0;

        while (list && isdigit((unsigned char)*list)) {
                char *end;
                long first = strtol(list, &end, 10), last = first;

                if (*end == '-')
                        last = strtol(end + 1, &end, 10);
                count += last - first + 1;
                list = *end == ',' ? end + 1 : end;
        }
        return count;
}

static json *cpu_json(void)
{
        json *cpu = json_object();
        char *smt = read_text(CPU_PATH "smt/active"), *nodes = read_text(NODE_PATH "online");

        set_model(cpu);
        json_set_int(cpu, "cores_online", sysconf(_SC_NPROCESSORS_ONLN));
        set_file(cpu, "governor", CPU_PATH "cpu0/cpufreq/scaling_governor");
        json_set(cpu, "smt", smt ? json_of_bool(smt[0] == '1') : json_of_null());
        json_set(cpu, "numa_nodes", list_count(nodes) ? json_of_int(list_count(nodes)) : json_of_null());
        free(smt);
        free(nodes);
        return cpu;
}

static json *clock_json(void)
{
        json *clock = json_object();
        double cost_ns, resolution_ns;

        clock_measure(&cost_ns, &resolution_ns);
        json_set_num(clock, "cost_ns", cost_ns);
        json_set_num(clock, "resolution_ns", resolution_ns);
        set_file(clock, "source", CLOCK_PATH);
        return clock;
}

static json *build_json(void)
{
        json *build = json_object();

        json_set_str(build, "version", BUILD_VERSION);
        json_set_str(build, "commit", BUILD_COMMIT);
        json_set_str(build, "compiler", BUILD_COMPILER);
        json_set_str(build, "options", BUILD_OPTIONS);
        json_set_str(build, "type", BUILD_TYPE);
        return build;
}

static void set_kernel(json *m)
{
        struct utsname u;
        char text[sizeof(u.sysname) + sizeof(u.release) + sizeof(u.machine) + 3];

        if (uname(&u) < 0) {
                json_set_null(m, "host");
                json_set_null(m, "kernel");
                return;
        }
        snprintf(text, sizeof(text), "%s %s %s", u.sysname, u.release, u.machine);
        json_set_str(m, "host", u.nodename);
        json_set_str(m, "kernel", text);
}

json *manifest_host(void)
{
        json *m = json_object();
        char when[24];

        set_kernel(m);
        set_file(m, "boot_id", BOOT_ID_PATH);
        json_set(m, "cpu", cpu_json());
        json_set_num(m, "memory_bytes", (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE));
        json_set(m, "clock", clock_json());
        json_set(m, "build", build_json());
        clock_iso8601(when);
        json_set_str(m, "when", when);
        return m;
}
