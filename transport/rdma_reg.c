/*
 * Registration by passport. The ways are tried best first; each one that is refused leaves a brief reason (for the row
 * of a result) and a full one (for the error, should no way be left).
 *
 * Who owns a descriptor: one that the passport brings stays its owner's and is used as it is, because a registration
 * holds a reference of its own; one that was exported for us is closed as soon as the registration was tried, whatever
 * came of it.
 */
#include "rdma_reg.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>

#include "check.h"
#include "err.h"
#include "inside.h"
#include "log.h"

#define PROBE_BYTES 4096u /* at each end of the region */

struct refusal {
        char brief[68]; /* two of them fit tp_mem.why */
        char full[300];
};

/* ---- what an errno means, and what would mend it ---- */

enum step { STEP_HOST, STEP_CAPABILITY, STEP_EXPORT, STEP_DMABUF, STEP_PEERMEM, STEP_PROBE, STEP_BOUNCE, STEPS };

struct hint {
        unsigned steps; /* 1 << enum step */
        int code;
        const char *brief, *full;
};

#define AT(step) (1u << (step))
#define AT_ALL   (AT(STEPS) - 1)

static const char no_dmabuf[] = "kernel, driver or rdma-core lacks dmabuf";
static const char no_dmabuf_full[] = "the kernel, the device's driver or rdma-core takes no dmabuf registrations; "
                                     "needed are Linux 5.12, rdma-core 34 and "
                                     "a driver that has them (mlx5 has, Soft-RoCE has not)";

/* The first that fits counts. */
static const struct hint hints[] = {
    {AT(STEP_CAPABILITY) | AT(STEP_DMABUF), EOPNOTSUPP, no_dmabuf, no_dmabuf_full},
    {AT(STEP_CAPABILITY) | AT(STEP_DMABUF), EPROTONOSUPPORT, no_dmabuf, no_dmabuf_full},
    {AT(STEP_CAPABILITY) | AT(STEP_DMABUF), ENOSYS, no_dmabuf, no_dmabuf_full},
    {AT(STEP_EXPORT), EOPNOTSUPP, "the memory's owner cannot export it",
     "the memory's owner exports no dmabuf; for CUDA needed are CUDA 11.7 and the open kernel modules from 515 on"},
    {AT(STEP_EXPORT), EINVAL, "the owner refuses the range",
     "the memory's owner refuses the range: not aligned, not one allocation, or a driver that is too old"},
    {AT(STEP_DMABUF), EBADF, "the descriptor is no dmabuf", "the passport's descriptor is not a dmabuf"},
    {AT(STEP_DMABUF), EINVAL, "range, offset or device unfit",
     "the range crosses segments of device memory, address and offset differ within their page, or the network device "
     "cannot reach this device's memory (an IOMMU or a PCIe switch between them)"},
    {AT(STEP_DMABUF), ENOMEM, "no room: BAR1, memlock or mappings",
     "no room for the mapping: the device's BAR1 window is full or small, `ulimit -l` is, or the network device's "
     "translation tables are"},
    {AT(STEP_PEERMEM), EFAULT, "no module took the device address",
     "a module is loaded but took no charge of this device address: nvidia-peermem was built for another ib_core or "
     "the "
     "memory is not its kind; reinstall it with the driver, or use dmabuf"},
    {AT(STEP_PEERMEM), EINVAL, "the device has no peer memory",
     "the network device cannot reach peer memory, or the address is managed memory"},
    {AT(STEP_HOST), EFAULT, "not this process's memory",
     "part of the range is not mapped in this process, or is mapped from a file that cannot be pinned"},
    {AT(STEP_HOST) | AT(STEP_BOUNCE) | AT(STEP_PEERMEM), ENOMEM, "memlock or the device's limit",
     "memory could not be pinned: the limit of locked memory (`ulimit -l`, memlock in /etc/security/limits.conf) or "
     "the network device's limit is too low"},
    {AT(STEP_HOST) | AT(STEP_BOUNCE), EINVAL, "length or access refused",
     "the network device refuses this length or this kind of access"},
    {AT(STEP_PROBE), EIO, "the device did not see a probe write",
     "the registration succeeded but what the network device wrote did not reach the memory"},
    {AT_ALL, EPERM, "no permission", "this user may not: look at /dev/infiniband and the container's devices"},
    {AT_ALL, EACCES, "no permission", "this user may not: look at /dev/infiniband and the container's devices"},
    {AT_ALL, ENODEV, "the device has gone", "the network device has gone or was reset"},
    {AT_ALL, E2BIG, "longer than the device registers", "the region is longer than the network device registers"},
};

static const char *const doing[STEPS] = {
    [STEP_HOST] = "ibv_reg_mr",          [STEP_CAPABILITY] = "dmabuf capability", [STEP_EXPORT] = "export as dmabuf",
    [STEP_DMABUF] = "ibv_reg_dmabuf_mr", [STEP_PEERMEM] = "ibv_reg_mr",           [STEP_PROBE] = "probe write",
    [STEP_BOUNCE] = "host buffer",
};

static const struct hint *find_hint(enum step step, int code)
{
        for (size_t i = 0; i < ARRAY_LEN(hints); i++)
                if (hints[i].steps & AT(step) && hints[i].code == code)
                        return &hints[i];
        return NULL;
}

/* The limit belongs into the sentence: which of the limits it was cannot be told from ENOMEM. */
static void add_memlock(char *text, size_t room)
{
        struct rlimit l;
        size_t used = strlen(text);

        if (getrlimit(RLIMIT_MEMLOCK, &l) < 0)
                return;
        if (l.rlim_cur == RLIM_INFINITY)
                snprintf(text + used, room - used, "; memlock is unlimited here");
        else
                snprintf(text + used, room - used, "; memlock is %" PRIu64 " KiB here", (uint64_t)l.rlim_cur / 1024);
}

/* Returns rc. */
static int refuse(struct refusal *no, enum step step, int rc)
{
        const struct hint *h = find_hint(step, -rc);
        const char *name = strerrorname_np(-rc);

        name = name ? name : "unknown error";
        if (!h) {
                snprintf(no->brief, sizeof(no->brief), "%s: %s", doing[step], name);
                snprintf(no->full, sizeof(no->full), "%s: %s (%s)", doing[step], name, strerrordesc_np(-rc));
                return rc;
        }
        snprintf(no->brief, sizeof(no->brief), "%s: %s", name, h->brief);
        snprintf(no->full, sizeof(no->full), "%s: %s: %s", doing[step], name, h->full);
        if (rc == -ENOMEM)
                add_memlock(no->full, sizeof(no->full));
        return rc;
}

/* ---- the probe: a registration proves nothing about reach ---- */

static int probe_span(struct rdma_reg *reg, size_t off, size_t len, uint64_t seed)
{
        const struct mem_region *r = reg->region;
        uint8_t saved[PROBE_BYTES];
        int rc = tpi_region_get(r, off, saved, len), put;

        if (rc < 0)
                return rc;
        rc = reg->dev->p->probe_write(reg->dev, &reg->mr, reg->iova + off, len, seed);
        if (rc == 0)
                rc = r->ops->flush(r);
        if (rc == 0)
                rc = r->ops->check(r, off, len, seed);
        rc = rc == 0 ? -EIO : rc;
        put = tpi_region_put(r, off, saved, len);
        return rc < 0 ? rc : put;
}

/* 0: seen by the device, or there is nobody who could tell. */
static int verify(struct rdma_reg *reg, struct refusal *no)
{
        const struct mem_region *r = reg->region;
        size_t n = (r->len < PROBE_BYTES ? r->len : PROBE_BYTES) & ~(size_t)7, end = (r->len - n) & ~(size_t)7;
        uint64_t seed = tpi_random();
        int rc;

        if (n == 0 || r->ops->check(r, 0, n, seed) == -ENOTSUP)
                return 0;
        rc = probe_span(reg, 0, n, seed);
        if (rc == -ENOTSUP)
                return 0;
        if (rc == 0 && end)
                rc = probe_span(reg, end, n, seed + n);
        if (rc < 0)
                return refuse(no, STEP_PROBE, rc);
        reg->verified = true;
        return 0;
}

/* ---- the ways; each returns 0 with reg complete, or -errno with reg as it was and the refusal filled in ---- */

static int end_mr(struct rdma_reg *reg)
{
        int rc = reg->mr.handle ? reg->dev->p->dereg(reg->dev, &reg->mr) : 0;

        reg->mr = (struct rdma_mr){0};
        return rc;
}

static int trust(struct rdma_reg *reg, const char *path, struct refusal *no)
{
        int rc;

        reg->iova = (uintptr_t)reg->region->addr;
        reg->path = path;
        rc = verify(reg, no);
        if (rc < 0) {
                end_mr(reg);
                reg->path = NULL;
        }
        return rc;
}

static int register_fd(struct rdma_reg *reg, int fd, uint64_t offset, struct refusal *no)
{
        const struct rdma_reg_provider *p = reg->dev->p;
        const struct mem_region *r = reg->region;
        uint64_t addr = (uintptr_t)r->addr, in_page = p->page(reg->dev) - 1;
        int rc;

        if ((addr ^ offset) & in_page || offset > UINT64_MAX - r->len) {
                snprintf(no->brief, sizeof(no->brief), "offset %#" PRIx64 " does not fit the address", offset);
                snprintf(no->full, sizeof(no->full),
                         "the region is at %#" PRIx64 " but at offset %#" PRIx64
                         " of its descriptor: both must have the same place within a page of %" PRIu64 " bytes",
                         addr, offset, in_page + 1);
                return -EINVAL;
        }
        rc = p->reg_dmabuf(reg->dev, offset, r->len, addr, fd, &reg->mr);
        return rc < 0 ? refuse(no, STEP_DMABUF, rc) : 0;
}

static int export_and_register(struct rdma_reg *reg, enum mem_mapping how, struct refusal *no)
{
        static const char *const paths[] = {[MEM_MAP_DEFAULT] = "dmabuf", [MEM_MAP_PCIE] = "dmabuf+pcie"};
        const struct mem_region *r = reg->region;
        uint64_t offset = 0;
        int fd = -1, rc = r->ops->export_dmabuf(r, how, &fd, &offset);

        if (rc < 0)
                return refuse(no, STEP_EXPORT, rc);
        rc = register_fd(reg, fd, offset, no);
        reg->dev->p->close_fd(reg->dev, fd);
        return rc < 0 ? rc : trust(reg, paths[how], no);
}

static int try_dmabuf(struct rdma_reg *reg, struct refusal *no)
{
        struct rdma_reg_dev *dev = reg->dev;
        const struct mem_region *r = reg->region;
        struct refusal second;
        int rc;

        if (dev->dmabuf_state == 0) {
                rc = dev->p->probe_dmabuf(dev);
                dev->dmabuf_state = rc < 0 ? rc : 1;
        }
        if (dev->dmabuf_state < 0)
                return refuse(no, STEP_CAPABILITY, dev->dmabuf_state);
        if (r->fd >= 0) {
                rc = register_fd(reg, r->fd, r->fd_offset, no);
                return rc < 0 ? rc : trust(reg, "dmabuf", no);
        }
        rc = export_and_register(reg, MEM_MAP_DEFAULT, no);
        /* The other mapping helps where the memory could be exported but not be reached; the first refusal is the one
         * to tell. */
        if (rc < 0 && rc != -ENOTSUP && export_and_register(reg, MEM_MAP_PCIE, &second) == 0)
                return 0;
        return rc;
}

static int try_peermem(struct rdma_reg *reg, struct refusal *no)
{
        struct rdma_reg_dev *dev = reg->dev;
        const char *module = dev->p->peermem(dev);
        int rc;

        if (!module) {
                snprintf(no->brief, sizeof(no->brief), "no nvidia-peermem module is loaded");
                snprintf(no->full, sizeof(no->full),
                         "no peer-memory module is loaded (looked for nvidia_peermem, nv_peer_mem and "
                         "memory_peers/nv_mem under /sys); an administrator can `modprobe nvidia-peermem`");
                return -ENODEV;
        }
        rc = dev->p->reg_mr(dev, reg->region->addr, reg->region->len, &reg->mr);
        if (rc < 0)
                return refuse(no, STEP_PEERMEM, rc);
        return trust(reg, "peermem", no);
}

static void add(char *text, size_t room, const char *name, const char *reason)
{
        size_t used = strlen(text);

        snprintf(text + used, room - used, "%s%s: %s", used ? "; " : "", name, reason);
}

static void free_bounce(struct rdma_reg *reg)
{
        const struct mem_region *r = reg->region;

        if (reg->pinned)
                r->ops->host_unregister(r, reg->bounce, reg->len);
        if (reg->bounce)
                reg->dev->p->bounce_free(reg->dev, reg->bounce, reg->len);
        reg->bounce = NULL;
        reg->pinned = false;
}

/* A buffer that the device cannot pin works, at the speed of pageable copies. */
static int try_staged(struct rdma_reg *reg, struct refusal *no)
{
        struct rdma_reg_dev *dev = reg->dev;
        const struct mem_region *r = reg->region;
        int rc;

        reg->bounce = dev->p->bounce_alloc(dev, r->len);
        if (!reg->bounce)
                return refuse(no, STEP_BOUNCE, -ENOMEM);
        rc = r->ops->host_register(r, reg->bounce, r->len);
        reg->pinned = rc == 0;
        rc = dev->p->reg_mr(dev, reg->bounce, r->len, &reg->mr);
        if (rc < 0) {
                free_bounce(reg);
                return refuse(no, STEP_BOUNCE, rc);
        }
        reg->iova = (uintptr_t)reg->bounce;
        reg->path = "staged";
        if (!reg->pinned)
                add(reg->why, sizeof(reg->why), "staged", "not pinned, slow copies");
        return 0;
}

/* ---- device memory: one way after the other ---- */

static const struct way {
        const char *name;
        enum tp_gpu_path force;
        int (*try)(struct rdma_reg *reg, struct refusal *no);
} ways[] = {
    {"dmabuf", TP_GPU_DMABUF, try_dmabuf},
    {"peermem", TP_GPU_PEERMEM, try_peermem},
    {"staged", TP_GPU_STAGED, try_staged},
};

static int open_device(struct rdma_reg *reg)
{
        const struct rdma_reg_dev *dev = reg->dev;
        char full[ERR_TEXT_MAX] = "";
        struct refusal no;
        int rc = -ENOTSUP;

        for (size_t i = 0; i < ARRAY_LEN(ways); i++) {
                const struct way *w = &ways[i];

                if (dev->force != TP_GPU_AUTO && dev->force != w->force) {
                        if (w->force < dev->force)
                                add(reg->why, sizeof(reg->why), w->name, "not tried, another path is forced");
                        continue;
                }
                rc = w->try(reg, &no);
                if (rc == 0)
                        return 0;
                add(reg->why, sizeof(reg->why), w->name, no.brief);
                add(full, sizeof(full), w->name, no.full);
        }
        if (dev->force != TP_GPU_AUTO)
                return err_set(rc, "%s: --gpu-path %s: %zu bytes of memory of device %d cannot be registered so: %s",
                               dev->name, tp_gpu_path_names[dev->force], reg->len, reg->region->device, full);
        return err_set(rc, "%s: %zu bytes of memory of device %d cannot be registered in any way: %s", dev->name,
                       reg->len, reg->region->device, full);
}

static int open_host(struct rdma_reg *reg)
{
        struct refusal no;
        int rc = reg->dev->p->reg_mr(reg->dev, reg->region->addr, reg->len, &reg->mr);

        if (rc < 0) {
                refuse(&no, STEP_HOST, rc);
                return err_set(rc, "%s: %zu bytes of host memory at %p cannot be registered: %s", reg->dev->name,
                               reg->len, reg->region->addr, no.full);
        }
        reg->iova = (uintptr_t)reg->region->addr;
        reg->path = "host";
        return 0;
}

int rdma_reg_open(struct rdma_reg_dev *dev, const struct mem_region *region, struct rdma_reg *out)
{
        int rc;

        BUG_ON(dev->force >= TP_GPU_PATHS);
        *out = (struct rdma_reg){0};
        if (region->len == 0 || (uintptr_t)region->addr > UINTPTR_MAX - region->len)
                return err_set(-EINVAL, "%s: a region of %zu bytes at %p cannot be registered", dev->name, region->len,
                               region->addr);
        /* Some drivers cut a longer one short in silence, and the peer's access fails much later. */
        if (dev->max_mr_bytes && region->len > dev->max_mr_bytes)
                return err_set(-E2BIG,
                               "%s: %zu bytes cannot be registered: the device takes at most %" PRIu64 " in one region",
                               dev->name, region->len, dev->max_mr_bytes);
        *out = (struct rdma_reg){.dev = dev, .region = region, .len = region->len};
        rc = region->kind == MEM_HOST ? open_host(out) : open_device(out);
        if (rc < 0)
                *out = (struct rdma_reg){0};
        return rc;
}

void rdma_reg_close(struct rdma_reg *reg)
{
        int rc = reg->dev ? end_mr(reg) : 0;

        if (rc < 0)
                /* The device may still write there: the host memory behind it must not become anybody else's. */
                log_warn("%s: a registration of %zu bytes cannot be ended: %s; its memory stays taken", reg->dev->name,
                         reg->len, strerror(-rc));
        else if (reg->dev)
                free_bounce(reg);
        *reg = (struct rdma_reg){0};
}
