/*
 * The memory passport: how memory crosses the folders. gpu/ fills one in, transport/ registers it, neither includes
 * the other. `ops` is how a transport stages or imports memory that it cannot reach by itself.
 */
#ifndef DJINN_BASE_MEM_REGION_H
#define DJINN_BASE_MEM_REGION_H

#include <stddef.h>
#include <stdint.h>

enum mem_kind { MEM_HOST, MEM_DEVICE };

/* How other devices are to reach exported device memory. PCIe is for coherent platforms, where what the driver offers
 * by default is of no use to the network device. */
enum mem_mapping { MEM_MAP_DEFAULT, MEM_MAP_PCIE };

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
        void (*host_unregister)(const struct mem_region *r, void *host, size_t len);
        /* A dmabuf descriptor of the pages that hold the region, whole host pages and no more; *fd becomes the caller's
         * to close; the region starts at *fd_offset in it, which has the same place within a page as r->addr.
         * -ENOTSUP: this memory cannot be exported so. */
        int (*export_dmabuf)(const struct mem_region *r, enum mem_mapping how, int *fd, uint64_t *fd_offset);
        /* Does the device itself read mem_probe_word(seed, 0), (seed, 1), ... at off? 1: yes, 0: no, -ENOTSUP: it
         * cannot say, -errno. off and len are multiples of 8. Waits for the answer. */
        int (*check)(const struct mem_region *r, size_t off, size_t len, uint64_t seed);
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

/* What a probe writes: no two words alike, so that bytes that went astray show. */
static inline uint64_t mem_probe_word(uint64_t seed, uint64_t i)
{
        return (seed + i + 1) * 0x9e3779b97f4a7c15ull;
}

/* Reads something of each cache line: what a program that makes use of a message does at least. */
static inline void mem_look(const void *p, size_t len)
{
        const volatile unsigned char *at = p;

        for (size_t i = 0; i < len; i += 64)
                (void)at[i];
        if (len)
                (void)at[len - 1];
}

/* Passport for ordinary host memory. */
struct mem_region mem_host_region(void *addr, size_t len);

#endif
