/*
 * The memory passport: how memory crosses the folders. gpu/ fills one in, transport/ registers it, neither includes
 * the other. `ops` is how a transport stages or imports memory that it cannot reach by itself.
 */
#ifndef DJINN_BASE_MEM_REGION_H
#define DJINN_BASE_MEM_REGION_H

#include <stddef.h>
#include <stdint.h>

enum mem_kind { MEM_HOST, MEM_DEVICE };

struct mem_region;

/* No slot is NULL: host memory uses mem_host_ops (base/mem_region.c). */
struct mem_ops {
        /* Copy len bytes into / out of the region at off from / to host memory. Returns 0 when queued, -errno. */
        int (*put_async)(const struct mem_region *r, size_t off, const void *src, size_t len, uint64_t *ticket);
        int (*get_async)(const struct mem_region *r, size_t off, void *dst, size_t len, uint64_t *ticket);
        /* 1: the copy with this ticket is done, 0: not yet, -errno: it failed. */
        int (*test)(const struct mem_region *r, uint64_t ticket);
        /* Make bytes that a peer wrote into the region visible to the device. 0 or -errno. */
        int (*flush)(const struct mem_region *r);
        /* Let the device reach host memory of a transport's bounce buffer fast (pinning). 0 or -errno. */
        int (*host_register)(const struct mem_region *r, void *host, size_t len);
};

struct mem_region {
        void *addr; /* address in the owner's address space (device address for MEM_DEVICE) */
        size_t len; /* bytes */
        enum mem_kind kind;
        int device;         /* ordinal, -1 for host */
        size_t page;        /* page size in bytes that backs it */
        int numa;           /* NUMA node, -1 unknown */
        int fd;             /* memfd or dmabuf that holds it, -1 none; owned by whoever filled the passport */
        uint64_t fd_offset; /* where in fd the region starts */
        unsigned char ipc_handle[64];
        const struct mem_ops *ops;
        void *owner; /* for ops */
};

extern const struct mem_ops mem_host_ops;

/* Passport for ordinary host memory. */
struct mem_region mem_host_region(void *addr, size_t len);

#endif
