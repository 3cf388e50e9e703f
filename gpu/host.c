#include "host.h"

#include <errno.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"
#include "err.h"

#define HUGE_PAGE_BYTES (2u << 20)

static size_t mapped_bytes(size_t len)
{
        size_t page = (size_t)sysconf(_SC_PAGESIZE);

        return ALIGN_UP(len, page);
}

int host_alloc(struct device *d, size_t len, struct mem_region *out)
{
        if (len == 0 || len > SIZE_MAX / 2)
                return err_set(-EINVAL, "device memory of %zu bytes was asked for", len);
        void *p = mmap(NULL, mapped_bytes(len), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

        if (p == MAP_FAILED)
                return err_set(-ENOMEM, "no memory for %zu bytes of device memory", len);
        /* Weights are read end to end in every step: large pages spare most TLB misses, where the host has them. */
        if (len >= HUGE_PAGE_BYTES)
                madvise(p, mapped_bytes(len), MADV_HUGEPAGE);
        memset(p, 0, len);
        *out = mem_host_region(p, len);
        out->numa = host_numa();
        out->owner = d;
        return 0;
}

void host_free(struct device *d, struct mem_region *region)
{
        if (region->addr)
                munmap(region->addr, mapped_bytes(region->len));
        *region = (struct mem_region){.fd = -1, .device = -1, .numa = -1, .ops = &mem_host_ops};
}

int host_put(struct device *d, void *dst, const void *host, size_t len)
{
        if (len)
                memcpy(dst, host, len);
        return 0;
}

int host_get(struct device *d, void *host, const void *src, size_t len)
{
        if (len)
                memcpy(host, src, len);
        return 0;
}

int host_copy(struct device *d, void *dst, const void *src, size_t len)
{
        if (len)
                memmove(dst, src, len);
        return 0;
}

int host_register(struct device *d, void *host, size_t len)
{
        return 0;
}

int host_export(struct device *d, struct mem_region *region)
{
        return err_set(-ENOTSUP, "%s: private host memory has no handle to export; register its address instead",
                       d->ops->name);
}

int host_flush(struct device *d, const struct mem_region *region)
{
        atomic_thread_fence(memory_order_acquire);
        return 0;
}

const char *host_supports(const struct device *d, const struct op_inst *inst)
{
        return op_check(inst) == 0 ? NULL : err_text();
}

/* dev_run returned when the work was done. */
int host_test(struct device *d, struct dev_event *ev)
{
        return 1;
}

int host_sync(struct device *d)
{
        return 0;
}

/* May this input be the very same bytes as the output? Only where element i depends on element i alone, or a row on
 * its own row after it was read whole. */
static bool in_place_ok(enum op_code code, int input)
{
        return code == OP_COPY || code == OP_ACT || code == OP_ADD || (code == OP_LAYERNORM && input == 1) ||
               (code == OP_LINEAR && input == 4);
}

static bool overlap(const struct op_arg *a, const struct op_arg *b)
{
        uintptr_t x = (uintptr_t)a->data, y = (uintptr_t)b->data;

        return x < y + op_arg_bytes(b) && y < x + op_arg_bytes(a);
}

static int check_overlap(const struct op_inst *inst, int out)
{
        const struct op_info *info = &op_infos[inst->code];
        const struct op_arg *a = inst->arg;

        for (int i = 0; i < info->nargs; i++) {
                if (i == out || !a[i].data || !overlap(&a[out], &a[i]))
                        continue;
                if (a[i].data == a[out].data && op_arg_bytes(&a[i]) == op_arg_bytes(&a[out]) &&
                    in_place_ok(inst->code, i))
                        continue;
                return err_set(-EINVAL, "%s: operand '%s' shares bytes with operand '%s'", info->name,
                               info->arg_names[out], info->arg_names[i]);
        }
        return 0;
}

static int check_one(const struct op_inst *inst)
{
        int rc = op_check(inst);

        for (int i = 0; rc == 0 && i < op_infos[inst->code].nargs; i++) {
                const struct op_arg *a = &inst->arg[i];

                if (!a->data)
                        continue;
                if ((uintptr_t)a->data % op_dtype_bytes(a->dtype))
                        return err_set(-EINVAL, "%s: operand '%s' is not aligned to its dtype",
                                       op_infos[inst->code].name, op_infos[inst->code].arg_names[i]);
                if (op_infos[inst->code].role[i] & OP_OUT)
                        rc = check_overlap(inst, i);
        }
        return rc;
}

int host_check(const struct op_inst *insts, size_t n)
{
        if (n == 0)
                return err_set(-EINVAL, "a plan needs at least one instruction");
        for (size_t i = 0; i < n; i++) {
                int rc = check_one(&insts[i]);

                if (rc < 0)
                        return err_trail(rc, "instruction %zu of %zu", i, n);
        }
        return 0;
}

void host_cpu_name(char *buf, size_t len)
{
        char line[256];
        FILE *f = fopen("/proc/cpuinfo", "re");

        snprintf(buf, len, "unknown processor");
        while (f && fgets(line, sizeof(line), f)) {
                char *colon = strchr(line, ':');

                if (strncmp(line, "model name", strlen("model name")) != 0 || !colon)
                        continue;
                line[strcspn(line, "\n")] = '\0';
                snprintf(buf, len, "%s", colon + 1 + strspn(colon + 1, " \t"));
                break;
        }
        if (f)
                fclose(f);
}

int host_numa(void)
{
        unsigned cpu, node;

        return getcpu(&cpu, &node) == 0 ? (int)node : -1;
}

size_t host_memory_bytes(void)
{
        long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);

        return pages > 0 && page > 0 ? (size_t)pages * (size_t)page : 0;
}
