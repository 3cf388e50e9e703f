/*
 * null: every post is complete at once and goes nowhere; nothing ever arrives. What remains when a measurement runs over
 * it is the cost of the harness. Connecting always succeeds, accepting never does. Memory can be allocated, and any key
 * opens a window of the length that it states, in which writes vanish and reads leave the target as it is.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"
#include "err.h"
#include "inside.h"

#define NULL_KEY_MAGIC 0x6c6c756e6b6579ull
#define NULL_MSG_MAX   65536u

extern const struct tp_ops tp_null_ops;

/* Everything allocated hangs in a list of its owner, so that closing the owner frees it. */
struct null_mem {
        struct tp_mem base;
        size_t mapped; /* bytes of our own mapping, 0 for foreign memory */
        struct null_mem *next;
};

struct null_rmem {
        struct tp_rmem base;
        struct null_rmem *next;
};

struct null_ep {
        struct tp_ep base;
        struct null_mem *mems;
        struct null_rmem *rmems;
        struct null_ep *next;
};

struct null_listener {
        struct tp_listener base;
        struct null_listener *next;
};

struct null_ctx {
        struct tp_ctx base;
        int efd;
        struct null_ep *eps;
        struct null_listener *listeners;
};

static const char *null_unavailable(void)
{
        return NULL;
}

static int null_open(const char *url, const struct tp_open_opts *opts, struct tp_ctx **out)
{
        struct null_ctx *c = calloc(1, sizeof(*c));

        if (!c)
                return err_set(-ENOMEM, "null: no memory for a context");
        c->efd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        if (c->efd < 0) {
                free(c);
                return err_set(-errno, "null: no descriptor: %s", strerror(errno));
        }
        c->base.ops = &tp_null_ops;
        *out = &c->base;
        return 0;
}

static int null_listen(struct tp_ctx *ctx, const char *url, struct tp_listener **out)
{
        struct null_ctx *c = container_of(ctx, struct null_ctx, base);
        struct null_listener *l;
        struct tp_url u;
        int rc = tpi_url_expect(url, "null", &u);

        if (rc < 0)
                return rc;
        l = calloc(1, sizeof(*l));
        if (!l)
                return err_set(-ENOMEM, "%s: no memory for a listener", url);
        l->base.ops = &tp_null_ops;
        l->base.ctx = ctx;
        strncpy(l->base.url, url, sizeof(l->base.url) - 1);
        l->next = c->listeners;
        c->listeners = l;
        *out = &l->base;
        return 0;
}

static void null_listener_close(struct tp_listener *tl)
{
        struct null_listener *l = container_of(tl, struct null_listener, base), **p;

        for (p = &container_of(tl->ctx, struct null_ctx, base)->listeners; *p != l; p = &(*p)->next)
                ;
        *p = l->next;
        free(l);
}

static int null_accept(struct tp_listener *l, struct tp_ep **out)
{
        return -EAGAIN;
}

static int null_connect(struct tp_ctx *ctx, const char *url, uint64_t deadline_ns, struct tp_ep **out)
{
        struct null_ctx *c = container_of(ctx, struct null_ctx, base);
        struct null_ep *e;
        struct tp_url u;
        int rc = tpi_url_expect(url, "null", &u);

        if (rc < 0)
                return rc;
        e = calloc(1, sizeof(*e));
        if (!e)
                return err_set(-ENOMEM, "%s: no memory for an endpoint", url);
        e->base.ops = &tp_null_ops;
        e->base.ctx = ctx;
        strncpy(e->base.peer, url, sizeof(e->base.peer) - 1);
        e->next = c->eps;
        c->eps = e;
        *out = &e->base;
        return 0;
}

static void null_free(struct tp_mem *mem)
{
        struct null_mem *m = container_of(mem, struct null_mem, base), **p;

        for (p = &container_of(mem->ep, struct null_ep, base)->mems; *p != m; p = &(*p)->next)
                ;
        *p = m->next;
        if (m->mapped)
                munmap(mem->region.addr, m->mapped);
        free(m);
}

static void null_rmem_free(struct tp_rmem *rmem)
{
        struct null_rmem *rm = container_of(rmem, struct null_rmem, base), **p;

        for (p = &container_of(rmem->ep, struct null_ep, base)->rmems; *p != rm; p = &(*p)->next)
                ;
        *p = rm->next;
        free(rm);
}

static void null_ep_close(struct tp_ep *ep)
{
        struct null_ep *e = container_of(ep, struct null_ep, base), **p;

        while (e->mems)
                null_free(&e->mems->base);
        while (e->rmems)
                null_rmem_free(&e->rmems->base);
        for (p = &container_of(ep->ctx, struct null_ctx, base)->eps; *p != e; p = &(*p)->next)
                ;
        *p = e->next;
        free(e);
}

static void null_close(struct tp_ctx *ctx)
{
        struct null_ctx *c = container_of(ctx, struct null_ctx, base);

        while (c->eps)
                null_ep_close(&c->eps->base);
        while (c->listeners)
                null_listener_close(&c->listeners->base);
        close(c->efd);
        free(c);
}

static void null_attr(const struct tp_ep *ep, struct tp_attr *out)
{
        *out = (struct tp_attr){.name = "null",
                                .msg_max = NULL_MSG_MAX,
                                .rdma_max = SIZE_MAX,
                                .one_sided = true,
                                .expected_latency_ns = 1,
                                .expected_bytes_per_s = 1e15,
                                .tx_depth = UINT32_MAX};
}

static int add_mem(struct tp_ep *ep, const struct mem_region *region, size_t mapped, struct tp_mem **out)
{
        struct null_ep *e = container_of(ep, struct null_ep, base);
        struct null_mem *m = calloc(1, sizeof(*m));

        if (!m)
                return err_set(-ENOMEM, "%s: no memory to register memory", ep->peer);
        m->base.ep = ep;
        m->base.region = *region;
        m->base.path = "host";
        m->mapped = mapped;
        m->next = e->mems;
        e->mems = m;
        *out = &m->base;
        return 0;
}

static int null_alloc(struct tp_ep *ep, size_t len, struct tp_mem **out)
{
        size_t page = (size_t)sysconf(_SC_PAGESIZE), bytes;
        struct mem_region r;
        void *addr;
        int rc;

        if (!size_add(len ? len : 1, page - 1, &bytes))
                return err_set(-ENOMEM, "%s: alloc of %zu bytes is too large", ep->peer, len);
        bytes &= ~(page - 1);
        addr = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (addr == MAP_FAILED)
                return err_set(-ENOMEM, "%s: alloc of %zu bytes: %s", ep->peer, len, strerror(errno));
        r = (struct mem_region){.addr = addr,
                                .len = len,
                                .kind = MEM_HOST,
                                .device = -1,
                                .page = page,
                                .numa = -1,
                                .fd = -1,
                                .ops = &mem_host_ops};
        rc = add_mem(ep, &r, bytes, out);
        if (rc < 0)
                munmap(addr, bytes);
        return rc;
}

static int null_reg(struct tp_ep *ep, const struct mem_region *region, struct tp_mem **out)
{
        return add_mem(ep, region, 0, out);
}

static int null_export_key(struct tp_mem *mem, size_t off, size_t len, struct tp_key *out)
{
        struct tpi_key k = {.magic = NULL_KEY_MAGIC, .off = off, .len = len, .serial = tpi_random()};

        if (!tpi_inside(off, len, mem->region.len))
                return err_set(-ERANGE, "%s: key for [%zu, +%zu) of memory of %zu bytes", mem->ep->peer, off, len,
                               mem->region.len);
        tpi_key_seal(out, &k, NULL_KEY_MAGIC);
        return 0;
}

static int null_import_key(struct tp_ep *ep, const struct tp_key *key, uint64_t deadline_ns, struct tp_rmem **out)
{
        struct null_ep *e = container_of(ep, struct null_ep, base);
        struct null_rmem *rm;
        struct tpi_key k;
        int rc = tpi_key_open(key, NULL_KEY_MAGIC, NULL_KEY_MAGIC, 0, &k);

        if (rc < 0)
                return rc;
        rm = calloc(1, sizeof(*rm));
        if (!rm)
                return err_set(-ENOMEM, "%s: no memory to import a key", ep->peer);
        rm->base.ep = ep;
        rm->base.len = k.len;
        rm->next = e->rmems;
        e->rmems = rm;
        *out = &rm->base;
        return 0;
}

static int null_poll(struct tp_ctx *ctx, struct tp_event *ev, int max)
{
        return 0;
}

static int null_fd(struct tp_ctx *ctx)
{
        return container_of(ctx, struct null_ctx, base)->efd;
}

static int null_arm(struct tp_ctx *ctx)
{
        return 0;
}

static void null_disarm(struct tp_ctx *ctx)
{
}

static int null_send(struct tp_ep *ep, const void *buf, size_t len, unsigned flags, uint64_t cookie)
{
        if (len > NULL_MSG_MAX)
                return err_set(-EMSGSIZE, "%s: message of %zu bytes, at most %u", ep->peer, len, NULL_MSG_MAX);
        ep->n.msgs_tx++;
        ep->n.msg_bytes_tx += len;
        return TP_COMPLETE;
}

static void null_release(struct tp_ep *ep, uint64_t loan)
{
        BUG_ON(true); /* nothing was ever lent */
}

static int bulk_check(const struct tp_ep *ep, const struct tp_mem *mem, const void *p, size_t len,
                      const struct tp_rmem *rmem, uint64_t roff)
{
        if (tpi_inside(roff, len, rmem->len) && tpi_in_mem(mem, p, len))
                return TP_COMPLETE;
        return err_set(-ERANGE, "%s: bulk of %zu bytes at %llu does not fit the key's %llu bytes", ep->peer, len,
                       (unsigned long long)roff, (unsigned long long)rmem->len);
}

static int null_write(struct tp_ep *ep, struct tp_mem *mem, const void *src, size_t len, struct tp_rmem *rmem,
                      uint64_t roff, unsigned flags, uint64_t cookie)
{
        int rc = bulk_check(ep, mem, src, len, rmem, roff);

        if (rc < 0)
                return rc;
        ep->n.bulk_ops++;
        ep->n.bulk_bytes_tx += len;
        return rc;
}

static int null_write_imm(struct tp_ep *ep, struct tp_mem *mem, const void *src, size_t len, struct tp_rmem *rmem,
                          uint64_t roff, uint32_t imm, unsigned flags, uint64_t cookie)
{
        return null_write(ep, mem, src, len, rmem, roff, flags, cookie);
}

static int null_read(struct tp_ep *ep, struct tp_mem *mem, void *dst, size_t len, struct tp_rmem *rmem, uint64_t roff,
                     unsigned flags, uint64_t cookie)
{
        int rc = bulk_check(ep, mem, dst, len, rmem, roff);

        if (rc < 0)
                return rc;
        ep->n.bulk_ops++;
        ep->n.bulk_bytes_rx += len;
        return rc;
}

static int null_cancel(struct tp_ep *ep, uint64_t cookie)
{
        return err_set(-ENOENT, "%s: no such operation is outstanding", ep->peer);
}

/* There is no connection that could break. */
static void null_sever(struct tp_ep *ep)
{
}

const struct tp_ops tp_null_ops = {
    .name = "null",
    .unavailable = null_unavailable,
    .open = null_open,
    .close = null_close,
    .listen = null_listen,
    .listener_close = null_listener_close,
    .accept = null_accept,
    .connect = null_connect,
    .ep_close = null_ep_close,
    .attr = null_attr,
    .alloc = null_alloc,
    .reg = null_reg,
    .free = null_free,
    .export_key = null_export_key,
    .import_key = null_import_key,
    .rmem_free = null_rmem_free,
    .poll = null_poll,
    .fd = null_fd,
    .arm = null_arm,
    .disarm = null_disarm,
    .send = null_send,
    .release = null_release,
    .write = null_write,
    .write_imm = null_write_imm,
    .read = null_read,
    .cancel = null_cancel,
    .sever = null_sever,
};
