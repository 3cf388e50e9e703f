/*
 * doctor: what this host can do, why the rest is off, what would mend it, and who may. Each probe looks at one thing and
 * adds its findings; none of them changes anything, needs a privilege, or fails: what cannot be seen is a finding too.
 */
#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <sched.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "check.h"
#include "err.h"
#include "files.h"
#include "json.h"
#include "manifest.h"
#include "tools.h"
#include "transport.h"

#define TEXT_MAX   256
#define SYS_MAX    65536
#define CORES_WANT 3 /* one for each polling end, one for the engine */

enum verdict { FINE, LIMITED, OFF, UNSEEN };

static const char *const verdict_names[] = {[FINE] = "ok", [LIMITED] = "limited", [OFF] = "off", [UNSEEN] = "unknown"};

#define YOU      "you"
#define ADMIN    "an administrator"
#define RELEASES "a later version"

struct doctor_opts {
        bool json;
        const char *root; /* tests put a tree of their own in the place of / */
};

struct doctor {
        const char *root;
        json *findings;
};

/* ---- findings and looking ---- */

static void add(struct doctor *d, const char *what, enum verdict verdict, const char *mend, const char *who,
                const char *fmt, ...) __attribute__((format(printf, 6, 7)));

/* mend and who are NULL where there is nothing to mend. */
static void add(struct doctor *d, const char *what, enum verdict verdict, const char *mend, const char *who,
                const char *fmt, ...)
{
        char state[2 * TEXT_MAX];
        json *f = json_object();
        va_list args;

        va_start(args, fmt);
        vsnprintf(state, sizeof(state), fmt, args);
        va_end(args);
        json_set_str(f, "finding", what);
        json_set_str(f, "verdict", verdict_names[verdict]);
        json_set_str(f, "state", state);
        json_set_str(f, "mend", mend);
        json_set_str(f, "who", who);
        json_push(d->findings, f);
}

/* The first line of a small file, path being made of fmt; false when it cannot be read. */
static bool look(const struct doctor *d, char out[TEXT_MAX], const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

static bool look(const struct doctor *d, char out[TEXT_MAX], const char *fmt, ...)
{
        char path[PATH_MAX], *text;
        int used = snprintf(path, sizeof(path), "%s", d->root);
        size_t len;
        va_list args;

        va_start(args, fmt);
        vsnprintf(path + used, sizeof(path) - (size_t)used, fmt, args);
        va_end(args);
        out[0] = '\0';
        if (file_read(path, SYS_MAX, &text, &len) < 0) {
                err_clear();
                return false;
        }
        snprintf(out, TEXT_MAX, "%.*s", (int)strcspn(text, "\n"), text);
        free(text);
        return true;
}

static int visible(const struct dirent *e)
{
        return e->d_name[0] != '.';
}

/* The names in a folder, sorted; 0 when there is no such folder. names_free() them. */
static int names_in(const struct doctor *d, const char *folder, struct dirent ***names)
{
        char path[PATH_MAX];

        snprintf(path, sizeof(path), "%s%s", d->root, folder);
        int n = scandir(path, names, visible, alphasort);

        if (n < 0)
                *names = NULL;
        return n < 0 ? 0 : n;
}

static void names_free(struct dirent **names, int n)
{
        for (int i = 0; i < n; i++)
                free(names[i]);
        free(names);
}

static int count_in(const struct doctor *d, const char *folder)
{
        struct dirent **names;
        int n = names_in(d, folder, &names);

        names_free(names, n);
        return n;
}

static bool there(const struct doctor *d, const char *path)
{
        char full[PATH_MAX];

        snprintf(full, sizeof(full), "%s%s", d->root, path);
        return access(full, F_OK) == 0;
}

/* ---- host ---- */

static void probe_kernel(struct doctor *d)
{
        struct utsname u;

        if (uname(&u) == 0)
                add(d, "kernel", FINE, NULL, NULL, "%s %s, %s", u.sysname, u.release, u.machine);
}

static void probe_cores(struct doctor *d)
{
        long online = sysconf(_SC_NPROCESSORS_ONLN);
        cpu_set_t set;
        long ours = sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : online;

        if (ours >= CORES_WANT)
                add(d, "cores", FINE, NULL, NULL, "%ld of %ld cores are ours", ours, online);
        else if (ours < online)
                add(d, "cores", LIMITED, "start with more cores (taskset, srun --cpus-per-task)", YOU,
                    "%ld of %ld cores are ours; %d keep both polling ends and the engine apart", ours, online,
                    CORES_WANT);
        else
                add(d, "cores", LIMITED, "a host with more cores", ADMIN,
                    "%ld cores; %d keep both polling ends and the engine apart", ours, CORES_WANT);
}

/* Polling burns a whole core: under a quota it is stopped at moments that no measurement can explain. */
static void probe_quota(struct doctor *d)
{
        char text[TEXT_MAX];
        double quota, period;

        if (!look(d, text, "/sys/fs/cgroup/cpu.max") || sscanf(text, "%lf %lf", &quota, &period) != 2 || period <= 0)
                add(d, "cpu quota", FINE, NULL, NULL, "none seen");
        else
                add(d, "cpu quota", LIMITED, "cpu.max of this container or job set to max", ADMIN,
                    "%.1f cores' worth of time; polling will be throttled", quota / period);
}

static void probe_governor(struct doctor *d)
{
        char text[TEXT_MAX];

        if (!look(d, text, "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"))
                add(d, "governor", UNSEEN, NULL, NULL, "the kernel does not show one, as in most virtual machines");
        else if (strcmp(text, "performance") == 0)
                add(d, "governor", FINE, NULL, NULL, "performance");
        else
                add(d, "governor", LIMITED, "cpupower frequency-set -g performance", ADMIN,
                    "%s: clocks follow the load, and so do latencies", text);
}

static void probe_clock(struct doctor *d)
{
        char text[TEXT_MAX];
        json *host = manifest_host();
        double cost = json_num(json_get(json_get(host, "clock"), "cost_ns"), 0);

        json_free(host);
        if (!look(d, text, "/sys/devices/system/clocksource/clocksource0/current_clocksource"))
                snprintf(text, sizeof(text), "source not shown");
        if (cost <= 200)
                add(d, "clock", FINE, NULL, NULL, "%s, %.0f ns a reading", text, cost);
        else
                add(d, "clock", LIMITED, "clocksource=tsc on the kernel's command line, where the processor allows it",
                    ADMIN, "%s, %.0f ns a reading: seen in every breakdown", text, cost);
}

static void probe_numa(struct doctor *d)
{
        char text[TEXT_MAX];

        if (!look(d, text, "/sys/devices/system/node/online"))
                add(d, "numa", UNSEEN, NULL, NULL, "the kernel does not show nodes");
        else if (strcmp(text, "0") == 0)
                add(d, "numa", FINE, NULL, NULL, "one node");
        else
                add(d, "numa", LIMITED, "choose the cores: --cpus, near the device that is measured", YOU,
                    "nodes %s: memory of another node is slower", text);
}

/* ---- memory ---- */

static const char *megabytes(rlim_t bytes, char *buf, size_t room)
{
        if (bytes == RLIM_INFINITY)
                snprintf(buf, room, "unlimited");
        else
                snprintf(buf, room, "%.1f MiB", (double)bytes / (1 << 20));
        return buf;
}

/* CAP_IPC_LOCK (bit 14) lifts the limit; root inside a container may lack it. */
static bool may_lock_anything(void)
{
        const unsigned long long ipc_lock = 1ull << 14;
        unsigned long long caps = 0;
        char line[TEXT_MAX];
        FILE *f = fopen("/proc/self/status", "re");

        while (f && fgets(line, sizeof(line), f))
                if (sscanf(line, "CapEff: %llx", &caps) == 1)
                        break;
        if (f)
                fclose(f);
        return caps & ipc_lock;
}

static void probe_memlock(struct doctor *d)
{
        char soft[32], hard[32];
        struct rlimit r;

        if (getrlimit(RLIMIT_MEMLOCK, &r) < 0)
                return;
        megabytes(r.rlim_cur, soft, sizeof(soft));
        megabytes(r.rlim_max, hard, sizeof(hard));
        if (r.rlim_cur == RLIM_INFINITY)
                add(d, "memlock", FINE, NULL, NULL, "unlimited");
        else if (may_lock_anything())
                add(d, "memlock", FINE, NULL, NULL, "%s, which does not bind a process with CAP_IPC_LOCK", soft);
        else if (r.rlim_max == RLIM_INFINITY)
                add(d, "memlock", LIMITED, "ulimit -l unlimited", YOU, "%s; the hard limit is %s", soft, hard);
        else
                add(d, "memlock", LIMITED, "memlock unlimited in /etc/security/limits.conf, or LimitMEMLOCK=infinity",
                    ADMIN, "%s, hard limit %s: memory for RDMA has to be locked", soft, hard);
}

static void probe_huge_pages(struct doctor *d)
{
        struct dirent **sizes;
        int n = names_in(d, "/sys/kernel/mm/hugepages", &sizes), found = 0;
        char all[TEXT_MAX], unused[TEXT_MAX];

        for (int i = 0; i < n; i++) {
                const char *size = sizes[i]->d_name;

                if (!look(d, all, "/sys/kernel/mm/hugepages/%s/nr_hugepages", size) || atol(all) == 0)
                        continue;
                look(d, unused, "/sys/kernel/mm/hugepages/%s/free_hugepages", size);
                add(d, "huge pages", FINE, NULL, NULL, "%s of %s pages of %s are free", unused, all,
                    strchr(size, '-') ? strchr(size, '-') + 1 : size);
                found++;
        }
        names_free(sizes, n);
        if (n == 0)
                add(d, "huge pages", UNSEEN, NULL, NULL, "the kernel does not show them");
        else if (found == 0)
                add(d, "huge pages", OFF, "sysctl vm.nr_hugepages=512", ADMIN, "none are reserved; DPDK needs them");
}

/* The shm transport meets at sockets in this folder; its segments are anonymous and need none. */
static void probe_shm_folder(struct doctor *d)
{
        const char *folder = getenv("XDG_RUNTIME_DIR");

        if (!folder || folder[0] != '/' || access(folder, W_OK | X_OK) != 0)
                folder = "/tmp";
        if (access(folder, W_OK | X_OK) == 0)
                add(d, "shm folder", FINE, NULL, NULL, "%s is writable", folder);
        else
                add(d, "shm folder", OFF, "XDG_RUNTIME_DIR set to a folder of yours", YOU, "%s: %s", folder,
                    strerror(errno));
}

/* ---- devices ---- */

static int gids_of(const struct doctor *d, const char *dev, int port)
{
        char folder[PATH_MAX], gid[TEXT_MAX];
        struct dirent **names;
        int count = 0;

        snprintf(folder, sizeof(folder), "/sys/class/infiniband/%s/ports/%d/gids", dev, port);
        int n = names_in(d, folder, &names);

        for (int i = 0; i < n; i++)
                if (look(d, gid, "%s/%s", folder, names[i]->d_name) && strspn(gid, "0:") != strlen(gid))
                        count++;
        names_free(names, n);
        return count;
}

static void rdma_port(struct doctor *d, const char *dev, int port)
{
        char state[TEXT_MAX], rate[TEXT_MAX], layer[TEXT_MAX];
        int gids = gids_of(d, dev, port);

        look(d, state, "/sys/class/infiniband/%s/ports/%d/state", dev, port);
        look(d, rate, "/sys/class/infiniband/%s/ports/%d/rate", dev, port);
        look(d, layer, "/sys/class/infiniband/%s/ports/%d/link_layer", dev, port);
        if (strstr(state, "ACTIVE"))
                add(d, "rdma device", FINE, NULL, NULL, "%s port %d: active, %s, %s, %d GIDs", dev, port, layer, rate,
                    gids);
        else
                add(d, "rdma device", OFF, "the link: cable, switch port, subnet manager", ADMIN, "%s port %d: %s, %s",
                    dev, port, *state ? state : "state not shown", layer);
}

static void probe_rdma(struct doctor *d)
{
        struct dirent **devs;
        char folder[PATH_MAX];
        int n = names_in(d, "/sys/class/infiniband", &devs);

        for (int i = 0; i < n; i++) {
                struct dirent **ports;

                snprintf(folder, sizeof(folder), "/sys/class/infiniband/%s/ports", devs[i]->d_name);
                int nports = names_in(d, folder, &ports);

                for (int p = 0; p < nports; p++)
                        rdma_port(d, devs[i]->d_name, atoi(ports[p]->d_name));
                names_free(ports, nports);
        }
        names_free(devs, n);
        if (n == 0)
                add(d, "rdma device", OFF, "an RDMA card and its driver", ADMIN, "none");
        else if (!there(d, "/dev/infiniband"))
                add(d, "rdma device", OFF, "the module ib_uverbs, or /dev/infiniband passed into the container", ADMIN,
                    "devices exist, but /dev/infiniband does not");
}

/* Cards on the bus of one vendor and class, whether or not a driver has them. */
static int pci_count(const struct doctor *d, const char *vendor, const char *class)
{
        struct dirent **slots;
        char text[TEXT_MAX];
        int n = names_in(d, "/sys/bus/pci/devices", &slots), count = 0;

        for (int i = 0; i < n; i++)
                if (look(d, text, "/sys/bus/pci/devices/%s/vendor", slots[i]->d_name) && strcmp(text, vendor) == 0 &&
                    look(d, text, "/sys/bus/pci/devices/%s/class", slots[i]->d_name) &&
                    strncmp(text, class, strlen(class)) == 0)
                        count++;
        names_free(slots, n);
        return count;
}

static void gpu_model(const struct doctor *d, const char *slot, char out[TEXT_MAX])
{
        if (look(d, out, "/proc/driver/nvidia/gpus/%s/information", slot) && strchr(out, ':')) {
                const char *model = strchr(out, ':') + 1;

                model += strspn(model, " \t");
                memmove(out, model, strlen(model) + 1);
        } else {
                snprintf(out, TEXT_MAX, "model not shown");
        }
}

static void probe_gpu(struct doctor *d)
{
        struct dirent **slots;
        char text[TEXT_MAX];
        int n = names_in(d, "/proc/driver/nvidia/gpus", &slots);
        int cards = pci_count(d, "0x10de", "0x03");

        for (int i = 0; i < n; i++) {
                gpu_model(d, slots[i]->d_name, text);
                add(d, "gpu", FINE, NULL, NULL, "%s at %s; this version does not use it yet", text, slots[i]->d_name);
        }
        names_free(slots, n);
        if (n == 0 && cards > 0)
                add(d, "gpu", OFF, "NVIDIA's driver", ADMIN, "%d on the bus, but no driver has it", cards);
        else if (n == 0)
                add(d, "gpu", OFF, "an NVIDIA GPU and its driver; the CPU runs the same sweep", ADMIN, "none");
        if (n > 0 && !there(d, "/dev/nvidiactl"))
                add(d, "gpu", OFF, "the GPU's device files passed into the container or job", ADMIN,
                    "the driver is there, but /dev/nvidiactl is not");
}

static void probe_gpudirect(struct doctor *d)
{
        bool card = count_in(d, "/sys/class/infiniband") > 0, gpu = count_in(d, "/proc/driver/nvidia/gpus") > 0;

        if (!card || !gpu)
                add(d, "gpudirect", OFF, NULL, NULL, "needs an RDMA device and a GPU; %s",
                    card  ? "the GPU is missing"
                    : gpu ? "the RDMA device is missing"
                          : "both are missing");
        else if (there(d, "/sys/module/nvidia_peermem"))
                add(d, "gpudirect", FINE, NULL, NULL, "nvidia_peermem is loaded");
        else
                add(d, "gpudirect", LIMITED, "modprobe nvidia-peermem, where dma-buf does not serve", ADMIN,
                    "nvidia_peermem is not loaded");
}

static void probe_dpdk(struct doctor *d)
{
        struct dirent **slots;
        int n = names_in(d, "/sys/bus/pci/drivers/vfio-pci", &slots), ports = 0;

        for (int i = 0; i < n; i++)
                if (strchr(slots[i]->d_name, ':')) {
                        add(d, "dpdk port", FINE, NULL, NULL, "%s is bound to vfio-pci", slots[i]->d_name);
                        ports++;
                }
        names_free(slots, n);
        if (ports == 0)
                add(d, "dpdk port", OFF, "dpdk-devbind.py --bind=vfio-pci SLOT, of a card that the host can spare",
                    ADMIN, "no network card is bound to vfio-pci");
}

static void probe_iommu(struct doctor *d)
{
        int groups = count_in(d, "/sys/kernel/iommu_groups");

        if (groups > 0)
                add(d, "iommu", FINE, NULL, NULL, "on, %d groups", groups);
        else
                add(d, "iommu", OFF, "intel_iommu=on or amd_iommu=on on the kernel's command line, and in the firmware",
                    ADMIN, "off or not visible; vfio-pci needs it");
}

static void probe_transports(struct doctor *d)
{
        for (const struct tp_backend *b = tp_backends; b->scheme; b++) {
                const char *reason = tp_unavailable(b);
                char what[32];

                snprintf(what, sizeof(what), "transport %s", b->scheme);
                if (!reason)
                        add(d, what, FINE, NULL, NULL, "%s", b->what);
                else if (b->ops)
                        add(d, what, OFF, NULL, NULL, "%s", reason);
                else
                        add(d, what, OFF, "nothing on this host", RELEASES, "%s", reason);
        }
}

static void (*const probes[])(struct doctor *d) = {
    probe_kernel, probe_cores,     probe_quota,      probe_governor,   probe_clock,
    probe_numa,   probe_memlock,   probe_huge_pages, probe_shm_folder, probe_rdma,
    probe_gpu,    probe_gpudirect, probe_dpdk,       probe_iommu,      probe_transports,
};

/* ---- printing ---- */

static void print_table(const json *findings)
{
        printf("%-16s %-8s %s\n", "finding", "verdict", "state; what would mend it, and who may");
        for (const json *f = json_first(findings); f; f = json_next(f)) {
                const char *mend = json_str(json_get(f, "mend"), NULL);

                printf("%-16s %-8s %s\n", json_str(json_get(f, "finding"), ""), json_str(json_get(f, "verdict"), ""),
                       json_str(json_get(f, "state"), ""));
                if (mend)
                        printf("%-16s %-8s -> %s (%s)\n", "", "", mend, json_str(json_get(f, "who"), ""));
        }
}

static void print_json(struct doctor *d)
{
        json *all = json_object();
        char *text;

        json_set_str(all, "schema", "djinnbench.doctor/1");
        json_set(all, "host", manifest_host());
        json_set(all, "findings", d->findings);
        text = json_text(all, true);
        puts(text);
        free(text);
        json_free(all);
}

static const struct opt doctor_options[] = {
    {"json", .type = OPT_FLAG, .offset = offsetof(struct doctor_opts, json),
     .help = "print one JSON object: schema, host, findings[] of {finding, verdict, state, mend, who}"},
    {"root", .metavar = "DIR", .type = OPT_STR, .offset = offsetof(struct doctor_opts, root)},
};

const struct opts_spec doctor_spec = {
    .name = "djinnbench doctor",
    .usage = "[--json]",
    .about = "Says what this host can do, why the rest is off, what would mend it, and whether you can or an "
             "administrator must. It looks and changes nothing. What is off is no error: the exit status is 0.",
    .table = doctor_options,
    .count = ARRAY_LEN(doctor_options),
};

int doctor_main(int argc, char **argv)
{
        struct doctor_opts o = {.root = ""};
        struct opts_parsed parsed;
        int status = command_parse(&doctor_spec, argc, argv, &o, &parsed);

        opts_free(&doctor_spec, &o, &parsed);
        if (status != COMMAND_GO_ON)
                return status;
        struct doctor d = {.root = o.root, .findings = json_array()};

        for (size_t i = 0; i < ARRAY_LEN(probes); i++)
                probes[i](&d);
        if (o.json) {
                print_json(&d);
                return EXIT_DONE;
        }
        print_table(d.findings);
        json_free(d.findings);
        return EXIT_DONE;
}
