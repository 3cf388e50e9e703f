/*
 * Registration by passport: how memory of any kind becomes reachable for a verbs device.
 *
 *   host memory      ibv_reg_mr; path "host".
 *   device memory    the first of these that works, unless one is forced:
 *     dmabuf         the device's capability is probed, the region exported (or its own descriptor taken) and registered
 *                    by ibv_reg_dmabuf_mr; path "dmabuf", or "dmabuf+pcie" where only the PCIe mapping worked;
 *     peermem        plain ibv_reg_mr of the device address, where a peer-memory module is loaded; path "peermem";
 *     staged         a host buffer as long as the region stands for it: whoever posts copies; path "staged".
 * Why each better path was refused ends up in `why`. A path that is forced is used, or the registration fails.
 *
 * A registration that succeeded may still not reach the memory. Where the passport's owner can check bytes with the
 * device itself (mem_ops.check) and the provider can write through the network device (probe_write), a few bytes at both
 * ends of the region are written and checked before the path is trusted, and put back afterwards.
 *
 * Nothing here knows libibverbs: that is behind struct rdma_reg_provider, whose real one is rdma_reg_verbs.c; tests
 * bring a scripted one. All of it is set-up: it may block and allocate.
 */
#ifndef DJINN_TRANSPORT_RDMA_REG_H
#define DJINN_TRANSPORT_RDMA_REG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "mem_region.h"
#include "transport.h"

struct ibv_pd;
struct rdma_reg_provider;

struct rdma_mr { /* what the device knows about a range */
        void *handle;
        uint32_t lkey, rkey;
};

/* What one endpoint registers with. The caller fills it before the first registration and keeps it until the last one
 * has ended; one thread. */
struct rdma_reg_dev {
        const struct rdma_reg_provider *p;
        struct ibv_pd *pd;
        char name[64]; /* for messages: "mlx5_0/1" */
        enum tp_gpu_path force;
        int access;            /* IBV_ACCESS_*, for host, staged and device memory */
        uint64_t max_mr_bytes; /* ibv_device_attr.max_mr_size; 0: not known */
        void *user;            /* the provider's: for probe_write of the real one struct rdma_reg_port, or NULL */
        int dmabuf_state;      /* 0 until probed, then 1 or -errno */
};

struct rdma_reg {
        struct rdma_reg_dev *dev;
        struct rdma_mr mr;
        const char *path; /* as in tp_mem.path; static text */
        char why[160];    /* as in tp_mem.why */
        uint64_t iova;    /* what work requests of either side call the region's first byte */
        void *bounce;     /* staged: the host memory that stands for the region, byte for byte; else NULL */
        size_t len;       /* bytes of the region, and of bounce */
        bool pinned;      /* staged: the device reaches bounce fast */
        bool verified;    /* the device itself saw what the probe wrote */
        const struct mem_region *region;
};

/* region must stay where it is until rdma_reg_close (it is tp_mem.region). 0, or -errno with a sentence that names
 * device, path and what would mend it. */
int rdma_reg_open(struct rdma_reg_dev *dev, const struct mem_region *region, struct rdma_reg *out);
/* The keys die first, then the memory behind a staged region goes. A reg that is all zero is nothing. */
void rdma_reg_close(struct rdma_reg *reg);

/* ---- the seam ---- */

/* Each returns 0 or -errno, without a sentence. */
struct rdma_reg_provider {
        int (*reg_mr)(struct rdma_reg_dev *d, void *addr, size_t len, struct rdma_mr *out);
        /* The region's bytes are [offset, offset+len) of fd; iova is what they are called. Takes no ownership of fd. */
        int (*reg_dmabuf)(struct rdma_reg_dev *d, uint64_t offset, size_t len, uint64_t iova, int fd,
                          struct rdma_mr *out);
        int (*dereg)(struct rdma_reg_dev *d, struct rdma_mr *mr);
        /* 0: kernel, driver and library take dmabuf registrations. */
        int (*probe_dmabuf)(struct rdma_reg_dev *d);
        /* The loaded module that lets ibv_reg_mr take device addresses, or NULL. */
        const char *(*peermem)(struct rdma_reg_dev *d);
        void (*close_fd)(struct rdma_reg_dev *d, int fd);
        /* Zeroed, page-aligned, never shared with a child process. NULL: no memory. */
        void *(*bounce_alloc)(struct rdma_reg_dev *d, size_t len);
        void (*bounce_free)(struct rdma_reg_dev *d, void *bounce, size_t len);
        /* Write mem_probe_word(seed, 0..) over the len bytes at iova of mr through the network device, and wait until
         * they must be there. -ENOTSUP: not possible here. */
        int (*probe_write)(struct rdma_reg_dev *d, const struct rdma_mr *mr, uint64_t iova, size_t len, uint64_t seed);
        size_t (*page)(struct rdma_reg_dev *d); /* bytes; a power of two */
};

/* The real provider (rdma_reg_verbs.c; only in builds with libibverbs). */
extern const struct rdma_reg_provider rdma_reg_verbs;

/* What the real provider's probe_write needs to connect a queue pair with itself. */
struct rdma_reg_port {
        uint8_t port;
        int gid_index;        /* -1: an InfiniBand port without GRH */
        uint64_t deadline_ns; /* how long one probe may take; 0: 1 s */
};

#endif
