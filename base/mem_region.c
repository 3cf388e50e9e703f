#include "mem_region.h"

#include <errno.h>
#include <stdbool.h>
#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

static bool inside(const struct mem_region *r, size_t off, size_t len)
{
        return off <= r->len && len <= r->len - off;
}

static int host_put(const struct mem_region *r, size_t off, const void *src, size_t len, uint64_t *ticket)
{
        if (!inside(r, off, len))
                return -ERANGE;
        if (len)
                memcpy((char *)r->addr + off, src, len);
        *ticket = 0;
        return 0;
}

static int host_get(const struct mem_region *r, size_t off, void *dst, size_t len, uint64_t *ticket)
{
        if (!inside(r, off, len))
                return -ERANGE;
        if (len)
                memcpy(dst, (const char *)r->addr + off, len);
        *ticket = 0;
        return 0;
}

/* Host copies are done when put and get return. */
static int host_test(const struct mem_region *r, uint64_t ticket)
{
        return 1;
}

static int host_flush(const struct mem_region *r)
{
        atomic_thread_fence(memory_order_acquire);
        return 0;
}

static int host_register(const struct mem_region *r, void *host, size_t len)
{
        return 0;
}

static void host_unregister(const struct mem_region *r, void *host, size_t len)
{
}

/* Network devices reach host memory without it. */
static int host_export_dmabuf(const struct mem_region *r, enum mem_mapping how, int *fd, uint64_t *fd_offset)
{
        return -ENOTSUP;
}

static int host_check(const struct mem_region *r, size_t off, size_t len, uint64_t seed)
{
        uint64_t w;

        if (!inside(r, off, len))
                return -ERANGE;
        for (size_t i = 0; i < len / sizeof(w); i++) {
                memcpy(&w, (const char *)r->addr + off + i * sizeof(w), sizeof(w));
                if (w != mem_probe_word(seed, i))
                        return 0;
        }
        return 1;
}

const struct mem_ops mem_host_ops = {
    .put_async = host_put,
    .get_async = host_get,
    .test = host_test,
    .flush = host_flush,
    .host_register = host_register,
    .host_unregister = host_unregister,
    .export_dmabuf = host_export_dmabuf,
    .check = host_check,
};

struct mem_region mem_host_region(void *addr, size_t len)
{
        return (struct mem_region){
            .addr = addr,
            .len = len,
            .kind = MEM_HOST,
            .device = -1,
            .page = (size_t)sysconf(_SC_PAGESIZE),
            .numa = -1,
            .fd = -1,
            .ops = &mem_host_ops,
        };
}
