#include "device.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "devices.h"
#include "err.h"

const struct dev_kind dev_kinds[] = {
    {.name = "cpu", .ops = &dev_cpu_ops, .what = "this host's processor, through a maths library"},
    {.name = "reference", .ops = &dev_reference_ops, .what = "plain C that defines every op; slow, one thread"},
    {.name = "cuda", .reason = "not part of this build: this version has no CUDA device", .what = "NVIDIA GPU"},
    {0},
};

/* Threads of the engine: one core is left to the end that polls. */
static int default_threads(void)
{
        cpu_set_t set;
        long cores = sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : sysconf(_SC_NPROCESSORS_ONLN);

        return cores > 2 ? (int)cores - 1 : 1;
}

static const struct dev_kind *kind_find(const char *name, size_t len)
{
        for (const struct dev_kind *k = dev_kinds; k->name; k++)
                if (strlen(k->name) == len && strncmp(k->name, name, len) == 0)
                        return k;
        return NULL;
}

const char *dev_unavailable(const struct dev_kind *k)
{
        return k->ops ? k->ops->unavailable() : k->reason;
}

/* ":<ordinal>" or nothing; -1 for anything else. */
static int parse_ordinal(const char *rest)
{
        if (*rest == '\0')
                return 0;
        if (rest[0] != ':' || rest[1] < '0' || rest[1] > '9' || strlen(rest) > 4)
                return -1;
        char *end;
        long v = strtol(rest + 1, &end, 10);

        return *end ? -1 : (int)v;
}

int dev_open(const char *name, int threads, struct device **out)
{
        size_t len = strcspn(name, ":");
        const struct dev_kind *k = kind_find(name, len);
        int ordinal = parse_ordinal(name + len);

        if (!k || ordinal < 0)
                return err_set(-ENOENT, "unknown device '%s': expected cpu, reference, cuda or cuda:<number>", name);
        const char *why = dev_unavailable(k);

        if (why)
                return err_set(-ENODEV, "device '%s': %s", name, why);
        if (threads < 0 || threads > DEV_THREADS_MAX)
                return err_set(-EINVAL, "device '%s': threads is %d, expected 0 (all but one core) to %d", name,
                               threads, DEV_THREADS_MAX);
        struct dev_opts opts = {.ordinal = ordinal, .threads = threads ? threads : default_threads()};

        return k->ops->open(&opts, out);
}
