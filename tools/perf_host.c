/* perf: what an end is: its cores, the node of its device, its counters, its manifest. */
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "err.h"
#include "files.h"
#include "manifest.h"
#include "perf_inside.h"

#define SYS_TEXT_MAX (1u << 16)

static char *sys_text(const char *path)
{
        char *text = NULL;
        size_t len = 0;

        if (file_read(path, SYS_TEXT_MAX, &text, &len) < 0) {
                err_clear();
                return NULL;
        }
        return text;
}

/* ---- cores ---- */

const cpu_set_t *perf_allowed(void)
{
        static cpu_set_t allowed;
        static bool known;

        if (!known && sched_getaffinity(0, sizeof(allowed), &allowed) < 0)
                CPU_ZERO(&allowed);
        known = true;
        return &allowed;
}

/* "0-3,8,10-11" of sysfs. */
static void parse_list(const char *text, cpu_set_t *set)
{
        long first, last;
        int used;

        CPU_ZERO(set);
        while (text && sscanf(text, "%ld%n", &first, &used) == 1) {
                last = first;
                text += used;
                if (*text == '-' && sscanf(text + 1, "%ld%n", &last, &used) == 1)
                        text += 1 + used;
                for (long i = first; i >= 0 && i <= last && i < CPU_SETSIZE; i++)
                        CPU_SET((unsigned)i, set);
                if (*text == ',')
                        text++;
        }
}

static void set_of(const char *fmt, int n, cpu_set_t *set)
{
        char path[128], *text;

        snprintf(path, sizeof(path), fmt, n);
        text = sys_text(path);
        parse_list(text, set);
        free(text);
}

/* Not the first of the hardware threads that share a core. */
static bool is_sibling(int cpu)
{
        cpu_set_t set;

        set_of("/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu, &set);
        for (int i = 0; i < cpu; i++)
                if (CPU_ISSET((unsigned)i, &set))
                        return true;
        return false;
}

/* Those on the device's node, or all; a whole core before a second thread of one; the highest first, because systems
 * keep their own work on the lowest. */
static int candidates(int numa, int *list, int most)
{
        cpu_set_t use = *perf_allowed(), node;
        int n = 0;

        if (numa >= 0) {
                set_of("/sys/devices/system/node/node%d/cpulist", numa, &node);
                CPU_AND(&node, &node, &use);
                if (CPU_COUNT(&node) >= 1)
                        use = node;
        }
        for (int siblings = 0; siblings < 2; siblings++)
                for (int i = CPU_SETSIZE - 1; i >= 0 && n < most; i--)
                        if (CPU_ISSET((unsigned)i, &use) && is_sibling(i) == siblings)
                                list[n++] = i;
        return n;
}

/* One end takes the first ones and the other end the next, so that two ends on one host never meet. */
int perf_cores(const struct perf_opts *o, bool driver, int numa, unsigned n, int *cores)
{
        int list[PERF_CORES_MAX], count, first = 0;
        bool here = !o->listen && !o->connect;

        if (o->n_cores) {
                count = here ? o->n_cores / 2 : o->n_cores;
                memcpy(list, o->cores + (here && !driver ? count : 0), (size_t)count * sizeof(int));
        } else {
                count = candidates(numa, list, PERF_CORES_MAX);
                if (count < 2)
                        return 0;
                if ((unsigned)count < 2 * n) {
                        first = driver ? count / 2 : 0;
                        count = driver ? count - count / 2 : count / 2;
                } else {
                        first = driver ? (int)n : 0;
                        count = (int)n;
                }
        }
        for (unsigned i = 0; i < n; i++)
                cores[i] = list[first + (int)i % count];
        return (int)n;
}

void perf_pin(int core)
{
        cpu_set_t set;

        if (core < 0)
                return;
        CPU_ZERO(&set);
        CPU_SET((unsigned)core, &set);
        pthread_setaffinity_np(pthread_self(), sizeof(set), &set);
}

/* ---- counters ---- */

/* Every file of a folder that holds a number; sysfs has hardly more than fifty. */
static void read_folder(json *into, const char *folder, const char *prefix)
{
        DIR *d = opendir(folder);
        struct dirent *e;

        while (d && (e = readdir(d))) {
                char path[512], name[128], *text;
                unsigned long long v;

                if (e->d_name[0] == '.' || !strcmp(e->d_name, "lifespan"))
                        continue;
                snprintf(path, sizeof(path), "%s/%.200s", folder, e->d_name);
                text = sys_text(path);
                snprintf(name, sizeof(name), "%s%.100s", prefix, e->d_name);
                if (text && sscanf(text, "%llu", &v) == 1)
                        json_set_num(into, name, (double)v);
                free(text);
        }
        if (d)
                closedir(d);
}

json *perf_counters(const struct tp_attr *attr)
{
        const char *slash = strchr(attr->device, '/');
        json *j = json_object();
        char path[256];

        if (slash) {
                int len = (int)(slash - attr->device);

                snprintf(path, sizeof(path), "/sys/class/infiniband/%.*s/ports/%s/counters", len, attr->device,
                         slash + 1);
                read_folder(j, path, "ib.");
                snprintf(path, sizeof(path), "/sys/class/infiniband/%.*s/ports/%s/hw_counters", len, attr->device,
                         slash + 1);
                read_folder(j, path, "ib.");
        }
        if (attr->netdev[0]) {
                snprintf(path, sizeof(path), "/sys/class/net/%.31s/statistics", attr->netdev);
                read_folder(j, path, "net.");
        }
        if (json_count(j))
                return j;
        json_free(j);
        return NULL;
}

json *perf_counters_delta(const json *before, const json *after)
{
        json *j = after ? json_object() : NULL;

        for (const json *v = json_first(after); v; v = json_next(v)) {
                double moved = json_num(v, 0) - json_num(json_get(before, json_key(v)), 0);

                if (moved != 0)
                        json_set_num(j, json_key(v), moved);
        }
        return j;
}

/* ---- manifest ---- */

json *perf_host(const struct perf_session *s)
{
        json *j = manifest_host(), *cores = json_array();

        for (int i = 0; i < s->n_cores; i++)
                json_push(cores, json_of_int(s->cores[i]));
        json_set(j, "cores", cores);
        if (s->attr.numa >= 0 && s->attr.device[0])
                json_set_int(j, "numa", s->attr.numa);
        else
                json_set_null(j, "numa");
        return j;
}
