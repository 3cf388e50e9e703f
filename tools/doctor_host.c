/* doctor: the host and its memory. */
#include <ctype.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "clock.h"
#include "doctor_inside.h"

#define CORES_WANT    3   /* one for each polling end, one for the engine */
#define CLOCK_COST_NS 200 /* more than this a reading, and the breakdown of a step shows it */
#define CPU           "/sys/devices/system/cpu"
#define IPC_LOCK      14 /* the capability's number */

void doctor_probe_kernel(struct doctor *d)
{
        char release[DOC_TEXT], version[DOC_TEXT];

        if (!doctor_look(d, release, "/proc/sys/kernel/osrelease")) {
                doctor_find(d, DOC_UNKNOWN, "kernel", "/proc does not show its release");
                return;
        }
        doctor_look(d, version, "/proc/sys/kernel/version");
        if (doctor_kernel_at_least(d, 5, 12)) {
                doctor_find(d, DOC_OK, "kernel", "Linux %s", release);
        } else {
                doctor_find(d, DOC_LIMITED, "kernel", "Linux %s", release);
                doctor_why(d, "RDMA to GPU memory by dma-buf needs 5.12 or newer");
                doctor_mend(d, BY_ADMIN, "boot a kernel of 5.12 or newer");
        }
        json_set_str(doctor_facts(d), "release", release);
        json_set_str(doctor_facts(d), "version", version);
}

/* Results of a virtual machine never stand unmarked beside those of hardware. */
void doctor_probe_machine(struct doctor *d)
{
        char flags[DOC_TEXT], vendor[DOC_TEXT], product[DOC_TEXT];
        char *cpuinfo = doctor_text(d, "/proc/cpuinfo");
        const char *line = cpuinfo ? strstr(cpuinfo, "\nflags") : NULL;
        const char *found = line ? strstr(line, " hypervisor") : NULL;
        bool virtual_machine = found && found < line + 1 + strcspn(line + 1, "\n");

        doctor_look(d, vendor, "/sys/class/dmi/id/sys_vendor");
        doctor_look(d, product, "/sys/class/dmi/id/product_name");
        snprintf(flags, sizeof(flags), "%.100s%s%.100s", vendor, *vendor && *product ? " " : "", product);
        if (virtual_machine) {
                doctor_find(d, DOC_LIMITED, "machine", "virtual%s%s", *flags ? ": " : "", flags);
                doctor_why(d, "its host takes time away unseen; compare times only with those of the same machine");
        } else if (!cpuinfo) {
                doctor_find(d, DOC_UNKNOWN, "machine", "/proc/cpuinfo is not to be seen");
        } else {
                doctor_find(d, DOC_OK, "machine", "%s", *flags ? flags : "no hypervisor shows");
        }
        json_set_bool(doctor_facts(d), "virtual", virtual_machine);
        free(cpuinfo);
}

void doctor_probe_cores(struct doctor *d)
{
        char allowed[DOC_TEXT], online[DOC_TEXT], *status = doctor_text(d, "/proc/self/status");
        long ours, all;

        doctor_line(status, "Cpus_allowed_list", allowed);
        doctor_look(d, online, CPU "/online");
        free(status);
        ours = doctor_list_count(allowed);
        all = doctor_list_count(online);
        if (ours == 0) {
                doctor_find(d, DOC_UNKNOWN, "cores", "/proc/self/status does not show them");
                return;
        }
        all = all < ours ? ours : all;
        doctor_find(d, ours >= CORES_WANT ? DOC_OK : DOC_LIMITED, "cores", "%ld of %ld are ours (%s)", ours, all,
                    allowed);
        json_set_int(doctor_facts(d), "allowed", ours);
        json_set_int(doctor_facts(d), "online", all);
        if (ours >= CORES_WANT)
                return;
        doctor_why(d, "%d keep both polling ends and the engine apart", CORES_WANT);
        if (ours < all)
                doctor_mend(d, BY_YOU, "taskset -c %s djinnbench ... (or srun --cpus-per-task=%d)", online, CORES_WANT);
        else
                doctor_mend(d, BY_OWNER, "a host or a machine size with more cores");
}

/* The cores' worth of time that cpu.max of one control group gives; 0: no limit. */
static double quota_of(const struct doctor *d, const char *group)
{
        char text[DOC_TEXT];
        double quota, period;

        if (!doctor_look(d, text, "/sys/fs/cgroup%s/cpu.max", group) || sscanf(text, "%lf %lf", &quota, &period) != 2 ||
            !(period > 0) || !(quota > 0))
                return 0;
        return quota / period;
}

/* Polling burns a whole core: under a quota it is stopped at moments that no measurement can explain. The limit may be
 * set on any group above ours. */
void doctor_probe_quota(struct doctor *d)
{
        char group[DOC_TEXT], *text = doctor_text(d, "/proc/self/cgroup");
        double least = 0;
        bool seen;

        if (!doctor_line(text, "0::", group) || group[0] != '/')
                group[0] = '\0';
        free(text);
        for (;;) {
                double q = quota_of(d, strcmp(group, "/") ? group : "");
                char *slash = strrchr(group, '/');

                least = q > 0 && (least == 0 || q < least) ? q : least;
                if (!slash)
                        break;
                *slash = '\0';
        }
        if (least == 0) { /* version 1 of control groups */
                long long us = doctor_number(d, -1, "/sys/fs/cgroup/cpu/cpu.cfs_quota_us");
                long long period = doctor_number(d, 100000, "/sys/fs/cgroup/cpu/cpu.cfs_period_us");

                least = us > 0 && period > 0 ? (double)us / (double)period : 0;
        }
        seen = doctor_there(d, "/sys/fs/cgroup/cgroup.controllers") || doctor_there(d, "/sys/fs/cgroup/cpu");
        if (least == 0) {
                doctor_find(d, DOC_OK, "cpu quota", seen ? "none" : "none seen");
                return;
        }
        doctor_find(d, DOC_LIMITED, "cpu quota", "%.1f cores' worth of time", least);
        doctor_why(d, "whoever polls will be stopped when it is used up");
        doctor_mend(d, BY_OWNER, "run the container or job without a limit of CPU time (cpu.max set to max)");
        json_set_num(doctor_facts(d), "cores", least);
}

void doctor_probe_governor(struct doctor *d)
{
        struct doctor_names cpus = doctor_list(d, CPU);
        char text[DOC_TEXT], other[DOC_TEXT] = "";
        int seen = 0, slow = 0;

        for (int i = 0; i < cpus.n; i++) {
                const char *name = cpus.at[i]->d_name;

                if (strncmp(name, "cpu", 3) || !isdigit((unsigned char)name[3]) ||
                    !doctor_look(d, text, CPU "/%s/cpufreq/scaling_governor", name))
                        continue;
                seen++;
                if (strcmp(text, "performance") == 0)
                        continue;
                slow++;
                snprintf(other, sizeof(other), "%s", text);
        }
        doctor_list_free(&cpus);
        if (seen == 0) {
                doctor_find(d, DOC_UNKNOWN, "governor", "the kernel shows none, as in most virtual machines");
                return;
        }
        doctor_find(d, slow ? DOC_LIMITED : DOC_OK, "governor", "%s on %d of %d cores", slow ? other : "performance",
                    slow ? slow : seen, seen);
        json_set_str(doctor_facts(d), "governor", slow ? other : "performance");
        if (slow) {
                doctor_why(d, "clocks follow the load, and so do latencies");
                doctor_mend(d, BY_ADMIN, "cpupower frequency-set -g performance");
        }
}

void doctor_probe_clock(struct doctor *d)
{
        char text[DOC_TEXT];
        double cost_ns, step_ns;

        clock_measure(&cost_ns, &step_ns);
        if (!doctor_look(d, text, "/sys/devices/system/clocksource/clocksource0/current_clocksource"))
                snprintf(text, sizeof(text), "source not shown");
        doctor_find(d, cost_ns <= CLOCK_COST_NS ? DOC_OK : DOC_LIMITED, "clock", "%s, %.0f ns a reading", text,
                    cost_ns);
        json_set_str(doctor_facts(d), "source", text);
        json_set_num(doctor_facts(d), "cost_ns", cost_ns);
        if (cost_ns <= CLOCK_COST_NS)
                return;
        doctor_why(d, "every part of a breakdown holds a reading or two");
        doctor_look(d, text, "/sys/devices/system/clocksource/clocksource0/available_clocksource");
        if (strstr(text, "tsc"))
                doctor_mend(d, BY_ADMIN, "echo tsc > /sys/devices/system/clocksource/clocksource0/current_clocksource");
        else
                doctor_mend(d, BY_OWNER, "a processor, or a virtual machine, whose tsc the kernel trusts");
}

void doctor_probe_numa(struct doctor *d)
{
        char text[DOC_TEXT];
        long nodes;

        doctor_look(d, text, "/sys/devices/system/node/online");
        nodes = doctor_list_count(text);
        if (nodes == 0) {
                doctor_find(d, DOC_UNKNOWN, "numa", "the kernel does not show nodes");
                return;
        }
        doctor_find(d, nodes == 1 ? DOC_OK : DOC_LIMITED, "numa", nodes == 1 ? "one node" : "%ld nodes (%s)", nodes,
                    text);
        json_set_int(doctor_facts(d), "nodes", nodes);
        if (nodes == 1)
                return;
        doctor_why(d, "memory and devices of another node are slower");
        doctor_mend(d, BY_YOU,
                    "choose cores of the device's node: --cpus (see /sys/devices/system/node/node0/cpulist)");
}

/* ---- memory ---- */

static void say_limit(char buf[32], const char *text)
{
        if (isdigit((unsigned char)*text))
                doctor_size(buf, strtoull(text, NULL, 10));
        else
                snprintf(buf, 32, "%.31s", *text ? text : "not shown");
}

void doctor_probe_memlock(struct doctor *d)
{
        char line[DOC_TEXT], caps[DOC_TEXT], soft[64] = "", hard[64] = "", soft_text[32], hard_text[32];
        char *limits = doctor_text(d, "/proc/self/limits"), *status = doctor_text(d, "/proc/self/status");
        bool endless;

        doctor_line(limits, "Max locked memory", line);
        doctor_line(status, "CapEff", caps);
        free(limits);
        free(status);
        if (sscanf(line, "%63s %63s", soft, hard) != 2) {
                doctor_find(d, DOC_UNKNOWN, "memlock", "/proc/self/limits does not show it");
                return;
        }
        say_limit(soft_text, soft);
        say_limit(hard_text, hard);
        endless = strcmp(soft, "unlimited") == 0;
        if (endless) {
                doctor_find(d, DOC_OK, "memlock", "unlimited");
        } else if (strtoull(caps, NULL, 16) >> IPC_LOCK & 1) {
                doctor_find(d, DOC_OK, "memlock", "%s, which does not bind a process with CAP_IPC_LOCK", soft_text);
        } else {
                doctor_find(d, DOC_LIMITED, "memlock", "%s; hard limit %s", soft_text, hard_text);
                doctor_why(d, "memory for RDMA has to be locked: registrations beyond it fail (ENOMEM)");
                if (strcmp(hard, "unlimited") == 0)
                        doctor_mend(d, BY_YOU, "ulimit -l unlimited");
                else
                        doctor_mend(d, BY_ADMIN,
                                    "echo '* - memlock unlimited' > /etc/security/limits.d/90-rdma.conf, then log in "
                                    "again; of a service: LimitMEMLOCK=infinity; of a container: --ulimit memlock=-1");
        }
        json_set(doctor_facts(d), "soft_bytes",
                 endless ? json_of_null() : json_of_num((double)strtoull(soft, NULL, 10)));
}

void doctor_probe_huge_pages(struct doctor *d)
{
        struct doctor_names sizes = doctor_list(d, "/sys/kernel/mm/hugepages");
        char *mounts = doctor_text(d, "/proc/mounts");
        int found = 0;

        for (int i = 0; i < sizes.n; i++) {
                const char *size = sizes.at[i]->d_name, *dash = strchr(size, '-');
                long long all = doctor_number(d, 0, "/sys/kernel/mm/hugepages/%s/nr_hugepages", size);
                long long unused = doctor_number(d, 0, "/sys/kernel/mm/hugepages/%s/free_hugepages", size);

                if (all <= 0)
                        continue;
                found++;
                doctor_find(d, unused > 0 ? DOC_OK : DOC_LIMITED, "huge pages", "%lld of %lld pages of %s are free",
                            unused, all, dash ? dash + 1 : size);
                if (unused > 0)
                        continue;
                doctor_why(d, "others hold them all");
                doctor_mend(d, BY_ADMIN, "sysctl vm.nr_hugepages=%lld", all + 512);
        }
        if (sizes.n == 0) {
                doctor_find(d, DOC_UNKNOWN, "huge pages", "the kernel does not show them");
        } else if (found == 0) {
                doctor_find(d, DOC_OFF, "huge pages", "none are reserved");
                doctor_why(d, "DPDK keeps its packets in them; nothing else here needs them");
                doctor_mend(d, BY_ADMIN, "sysctl vm.nr_hugepages=512");
        } else if (mounts && !strstr(mounts, " hugetlbfs ")) {
                doctor_find(d, DOC_LIMITED, "huge pages", "no hugetlbfs is mounted");
                doctor_why(d, "DPDK opens its pages there");
                doctor_mend(d, BY_ADMIN, "mkdir -p /dev/hugepages && mount -t hugetlbfs none /dev/hugepages");
        }
        free(mounts);
        doctor_list_free(&sizes);
}

/* The shm transport meets at sockets in this folder; its segments are anonymous and need none. */
void doctor_probe_shm(struct doctor *d)
{
        const char *folder = getenv("XDG_RUNTIME_DIR");

        if (!folder || folder[0] != '/' || access(folder, W_OK | X_OK) != 0)
                folder = "/tmp";
        if (access(folder, W_OK | X_OK) == 0) {
                doctor_find(d, DOC_OK, "shm folder", "%s is writable", folder);
        } else {
                doctor_find(d, DOC_OFF, "shm folder", "%s: %s", folder, strerror(errno));
                doctor_mend(d, BY_YOU, "mkdir -m 700 -p \"$HOME/run\" && export XDG_RUNTIME_DIR=\"$HOME/run\"");
        }
}
