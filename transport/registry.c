/*
 * The table of backends, and the set-up half of the contract, which only finds the table entry and steps aside. This is
 * the only file that knows what was built.
 */
#include <errno.h>
#include <string.h>

#include "clock.h"
#include "err.h"
#include "raw_inside.h"
#include "transport.h"

#define SPIN_DEFAULT_NS (200 * NS_PER_US)

extern const struct tp_ops tp_loop_ops, tp_null_ops, tp_fault_ops, tp_shm_ops, tp_tcp_ops, tp_rdma_ops;

#ifdef HAVE_SHM
#define SHM_OPS &tp_shm_ops, NULL
#else
#define SHM_OPS NULL, "not part of this build: needs Linux with memfd_create and UNIX sockets"
#endif
#ifdef HAVE_TCP
#define TCP_OPS &tp_tcp_ops, NULL
#else
#define TCP_OPS NULL, "not part of this build: needs Linux sockets with epoll"
#endif
#ifdef HAVE_RDMA
#define RDMA_OPS &tp_rdma_ops, NULL
#else
#define RDMA_OPS NULL, "not part of this build: needs libibverbs and librdmacm (Debian: libibverbs-dev librdmacm-dev)"
#endif
#ifdef HAVE_FAULT
#define FAULT_OPS &tp_fault_ops, NULL
#else
#define FAULT_OPS NULL, "not part of this build: it is for tests only"
#endif

const struct tp_backend tp_backends[] = {
    {"shm", SHM_OPS, "shared memory between processes of one host: shm://name"},
    {"rdma", RDMA_OPS, "RDMA verbs (reliable connection): rdma://host:port"},
    {"dpdk", NULL, "not part of this build: this version has no DPDK transport yet",
     "poll-mode network driver: dpdk://ip:udp-port"},
    {"tcp", TCP_OPS, "kernel sockets: tcp://host:port"},
    {"loop", &tp_loop_ops, NULL, "inside one process, the reference for the others: loop://name"},
    {"null", &tp_null_ops, NULL, "accepts everything and delivers nothing, for the cost of the harness: null://"},
    {"fault", FAULT_OPS, "breaks another transport on purpose, for tests: fault+tcp://host:port?cut_after=N"},
    {NULL, NULL, NULL, NULL},
};

const struct raw_medium *const raw_media[] = {
    &raw_shm_medium,
    &raw_tcp_medium,
#ifdef HAVE_RDMA
    &raw_verbs_medium,
#endif
    NULL,
};

const char *const tp_gpu_path_names[] = {"auto", "force:dmabuf", "force:peermem", "force:staged", NULL};

const char *tp_unavailable(const struct tp_backend *b)
{
        if (!b->ops)
                return b->reason;
        return b->ops->unavailable();
}

static const struct tp_backend *find_backend(const char *scheme)
{
        if (!strncmp(scheme, "fault+", 6))
                scheme = "fault";
        for (const struct tp_backend *b = tp_backends; b->scheme; b++)
                if (!strcmp(b->scheme, scheme))
                        return b;
        return NULL;
}

/* A text without "://" is a scheme if a backend has that name, else a bare host:port. */
static int backend_of(const char *text, const struct tp_backend **out)
{
        struct tp_url u;
        int rc;

        *out = strstr(text, "://") ? NULL : find_backend(text);
        if (*out)
                return 0;
        rc = tp_url_parse(text, &u);
        if (rc < 0)
                return rc;
        *out = find_backend(u.scheme);
        if (!*out)
                return err_set(-ENOENT, "%s: no transport is called '%s'; `list` shows those there are", text,
                               u.scheme);
        return 0;
}

int tp_open(const char *url_or_scheme, const struct tp_open_opts *opts, struct tp_ctx **out)
{
        static const struct tp_open_opts none;
        const struct tp_backend *b;
        const char *reason;
        int rc = backend_of(url_or_scheme, &b);

        if (rc < 0)
                return rc;
        reason = tp_unavailable(b);
        if (reason)
                return err_set(-ENOTSUP, "%s: transport %s: %s", url_or_scheme, b->scheme, reason);
        opts = opts ? opts : &none;
        rc = b->ops->open(url_or_scheme, opts, out);
        if (rc < 0)
                return rc;
        (*out)->spin_ns = opts->sleepy ? 0 : opts->spin_ns ? opts->spin_ns : SPIN_DEFAULT_NS;
        return 0;
}

void tp_close(struct tp_ctx *ctx)
{
        ctx->ops->close(ctx);
}

int tp_listen(struct tp_ctx *ctx, const char *url, struct tp_listener **out)
{
        return ctx->ops->listen(ctx, url, out);
}

void tp_listener_close(struct tp_listener *l)
{
        l->ops->listener_close(l);
}

int tp_accept(struct tp_listener *l, struct tp_ep **out)
{
        return l->ops->accept(l, out);
}

int tp_connect(struct tp_ctx *ctx, const char *url, uint64_t deadline_ns, struct tp_ep **out)
{
        return ctx->ops->connect(ctx, url, deadline_ns, out);
}

void tp_ep_close(struct tp_ep *ep)
{
        ep->ops->ep_close(ep);
}

void tp_attr(const struct tp_ep *ep, struct tp_attr *out)
{
        ep->ops->attr(ep, out);
}

int tp_alloc(struct tp_ep *ep, size_t len, struct tp_mem **out)
{
        return ep->ops->alloc(ep, len, out);
}

int tp_reg(struct tp_ep *ep, const struct mem_region *region, struct tp_mem **out)
{
        return ep->ops->reg(ep, region, out);
}

void tp_free(struct tp_mem *mem)
{
        mem->ep->ops->free(mem);
}

int tp_export_key(struct tp_mem *mem, size_t off, size_t len, struct tp_key *out)
{
        return mem->ep->ops->export_key(mem, off, len, out);
}

int tp_import_key(struct tp_ep *ep, const struct tp_key *key, uint64_t deadline_ns, struct tp_rmem **out)
{
        return ep->ops->import_key(ep, key, deadline_ns, out);
}

void tp_rmem_free(struct tp_rmem *rmem)
{
        rmem->ep->ops->rmem_free(rmem);
}
