/*
 * The transport contract. A backend is one file with one `struct tp_ops` and one entry in registry.c.
 *
 * Objects
 *   context   one per polling thread; owns endpoints and listeners; nothing in it is locked: all calls on a context and
 *             what belongs to it come from one thread.
 *   endpoint  one connection: ordered messages both ways, one-sided access to memory that the peer gave keys for.
 *             It is also the protection domain: memory is allocated or registered for one endpoint and its keys work
 *             only there.
 *   memory    tp_mem: allocated by the medium (tp_alloc, best) or foreign memory registered by passport (tp_reg).
 *
 * Returns: 0 or a count, or -errno. -EAGAIN: nothing was posted, poll and try again: the only ordinary failure.
 * Every other failure sets err_text() with peer and phase.
 *
 * Posts (tp_send, tp_write, tp_write_imm, tp_read) return
 *   TP_COMPLETE (1)  done already: the buffer is the caller's again and no event comes;
 *   TP_POSTED   (0)  the buffer is the transport's until exactly one TP_EV_DONE with this cookie (status 0 or -errno);
 *   -EAGAIN          nothing happened;
 *   -EMSGSIZE, -ERANGE, -EACCES, -ESTALE, -ENOTCONN, ...   nothing happened, and will not.
 *
 * Order: posts on one endpoint take effect at the peer in the order in which they were posted: a message (or the event
 * of a write_imm) sent after a write is delivered only when the written bytes are visible to the peer's host. A read
 * observes writes posted before it. TP_MORE says that another post on this endpoint follows at once, so the
 * backend may hold this one back to send both in one go (one system call, one doorbell); the next post without it,
 * or the next tp_poll, lets go.
 *
 * Completion of a write means that the source buffer is free again, not that the peer saw it. A write or read that the
 * peer refuses (unknown or expired key, out of bounds) never changes its memory; it ends, where it is not refused at
 * the post, in an error completion or in TP_EV_DOWN with -EACCES, -ESTALE or -ERANGE.
 *
 * Received messages are loans: (data, len) in the transport's own buffer, readable until tp_release(ep, loan). Loans
 * may be released late and in any order; holding many makes the sender see -EAGAIN. A peer that shares memory with us
 * can change a loan's bytes while we look: copy, then validate, then use.
 *
 * Death: when the peer dies, closes, or breaks the protocol, each outstanding post completes with an error, then exactly
 * one TP_EV_DOWN {status, err_text()} comes; later posts fail with -ENOTCONN. Messages that arrived before
 * are delivered first. The endpoint stays until tp_ep_close.
 */
#ifndef DJINN_TRANSPORT_H
#define DJINN_TRANSPORT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "check.h"
#include "mem_region.h"

#define TP_POSTED        0
#define TP_COMPLETE      1
#define TP_MORE          1u    /* flag of a post */
#define TP_MSG_MAX_LEAST 4096u /* every backend takes messages of at least this many bytes */
#define TP_URL_MAX       256

struct tp_ops;

struct tp_counters { /* monotonic, written by the owning thread only */
        uint64_t msgs_tx, msgs_rx;
        uint64_t msg_bytes_tx, msg_bytes_rx; /* as given to tp_send and as delivered */
        uint64_t bulk_bytes_tx;              /* written to the peer by us */
        uint64_t bulk_bytes_rx;              /* read from the peer by us, plus written to us where the medium tells */
        uint64_t bulk_ops;                   /* writes and reads posted by us */
        uint64_t header_bytes_tx, header_bytes_rx; /* this backend's own framing; 0 where there is none */
        uint64_t bytes_copied;                     /* by this program, beyond the transfer that the medium is */
        uint64_t eagain, retries, naps;            /* posts refused; retransmissions; times that waiting slept */
};

struct tp_ctx {
        const struct tp_ops *ops;
        uint64_t spin_ns; /* set by tp_open for tp_wait */
};

struct tp_listener {
        const struct tp_ops *ops;
        struct tp_ctx *ctx;
        char url[TP_URL_MAX]; /* as one may connect to it: a port of 0 has become the real one */
};

struct tp_ep {
        const struct tp_ops *ops;
        struct tp_ctx *ctx;
        void *user; /* the caller's; the transport never looks */
        struct tp_counters n;
        char peer[TP_URL_MAX]; /* for messages: "tcp://127.0.0.1:5556" */
};

struct tp_mem { /* memory of ours that the endpoint can use */
        struct tp_ep *ep;
        struct mem_region region;
        const char *path; /* "host", "copy", "dmabuf", ... (SPEC 8) */
        char why[160];    /* why each better path was refused; "" when path is the best */
};

struct tp_rmem { /* memory of the peer's, imported from a key */
        struct tp_ep *ep;
        uint64_t len;
};

/* What crosses the wire to let the peer in: opaque to everybody but the backend; fixed size; little endian inside. */
#define TP_KEY_BYTES 64
struct tp_key {
        uint8_t bytes[TP_KEY_BYTES];
};

enum tp_event_kind { TP_EV_MSG, TP_EV_IMM, TP_EV_DONE, TP_EV_DOWN };

struct tp_event {
        enum tp_event_kind kind;
        int status; /* DONE, DOWN: 0 or -errno */
        struct tp_ep *ep;
        const void *data; /* MSG: the loan */
        size_t len;       /* MSG, IMM: bytes */
        uint64_t cookie;  /* DONE: the post's; MSG: the loan to release */
        uint32_t imm;     /* IMM */
};

struct tp_attr {
        const char *name;  /* "shm" */
        size_t msg_max;    /* bytes in one message */
        size_t rdma_max;   /* bytes in one bulk post that go as one; larger ones are chunked inside */
        bool one_sided;    /* bulk needs no help of the peer's processor */
        bool emulated;     /* virtual device: rows are labelled */
        int driver_copies; /* copies below this program, both sides together; -1 unknown */
        double expected_latency_ns, expected_bytes_per_s; /* rough, for plans before anything was measured */
        uint32_t tx_depth;                                /* posts that can be outstanding */
        /* The device below, where the medium has one and it can be told; else "", -1 and 0. */
        char device[64];        /* verbs: "mlx5_0/1" (device/port) */
        char netdev[32];        /* kernel's name of the network interface: "eth0" */
        int numa;               /* node that the device hangs on */
        double link_bits_per_s; /* one direction */
        uint32_t mtu;           /* bytes of payload in one packet of the path */
        char detail[160];       /* for reports: "RC, 1 QP, GID 1 10.0.0.1 (RoCE v2), inline 220, ibv_wr" */
};

/* How device memory is to be registered. A path that was forced is used or the registration fails, with the reason. */
enum tp_gpu_path {
        TP_GPU_AUTO, /* the best that works: dmabuf, peermem, staged */
        TP_GPU_DMABUF,
        TP_GPU_PEERMEM,
        TP_GPU_STAGED,
        TP_GPU_PATHS
};

extern const char *const tp_gpu_path_names[]; /* "auto", "force:dmabuf", ...; NULL-terminated, as the enum */

struct tp_open_opts {
        bool sleepy;      /* tp_wait may sleep at once instead of polling first */
        uint64_t spin_ns; /* how long tp_wait polls before it sleeps; 0: the default, 200 µs */
        enum tp_gpu_path gpu_path;
};

/* ---- set-up: may block until the deadline, allocate, log ---- */

/* url_or_scheme: "shm", "tcp://...", "fault+tcp://..."; unknown or unavailable: -ENOENT / -ENOTSUP with the reason. */
int tp_open(const char *url_or_scheme, const struct tp_open_opts *opts, struct tp_ctx **out);
/* Closes what is still open in it. */
void tp_close(struct tp_ctx *ctx);

int tp_listen(struct tp_ctx *ctx, const char *url, struct tp_listener **out);
void tp_listener_close(struct tp_listener *l);
/* Never blocks: 0 and an endpoint that is ready for messages, or -EAGAIN. Half-made connections live inside the backend
 * with a deadline and a bound on their number. Progress is made by tp_poll. */
int tp_accept(struct tp_listener *l, struct tp_ep **out);
/* Blocks until connected, refused (-ECONNREFUSED: nothing listens), or deadline_ns (clock_ns()) (-ETIMEDOUT). */
int tp_connect(struct tp_ctx *ctx, const char *url, uint64_t deadline_ns, struct tp_ep **out);
/* Graceful where it can be: what was posted and completed is delivered. Frees endpoint, its memory, keys and loans; no
 * event of it comes afterwards. */
void tp_ep_close(struct tp_ep *ep);
void tp_attr(const struct tp_ep *ep, struct tp_attr *out);

/* Memory that the medium likes best, zeroed, page-aligned. Freed by tp_free or with the endpoint. */
int tp_alloc(struct tp_ep *ep, size_t len, struct tp_mem **out);
/* Foreign memory by passport. The medium that cannot map it works by copy and says so in path and why. */
int tp_reg(struct tp_ep *ep, const struct mem_region *region, struct tp_mem **out);
void tp_free(struct tp_mem *mem); /* ends alloc or reg; every key of it dies now */
/* A key for [off, off+len) of mem; each call makes a new key. */
int tp_export_key(struct tp_mem *mem, size_t off, size_t len, struct tp_key *out);
/* deadline: some media wait for a descriptor that travels beside the key. -EACCES: not a key of this peer's. */
int tp_import_key(struct tp_ep *ep, const struct tp_key *key, uint64_t deadline_ns, struct tp_rmem **out);
void tp_rmem_free(struct tp_rmem *rmem);

/* ---- hot path ---- */

struct tp_ops {
        const char *name;
        /* NULL: usable here; else the reason why not (static text). */
        const char *(*unavailable)(void);

        int (*open)(const char *url, const struct tp_open_opts *opts, struct tp_ctx **out);
        void (*close)(struct tp_ctx *ctx);
        int (*listen)(struct tp_ctx *ctx, const char *url, struct tp_listener **out);
        void (*listener_close)(struct tp_listener *l);
        int (*accept)(struct tp_listener *l, struct tp_ep **out);
        int (*connect)(struct tp_ctx *ctx, const char *url, uint64_t deadline_ns, struct tp_ep **out);
        void (*ep_close)(struct tp_ep *ep);
        void (*attr)(const struct tp_ep *ep, struct tp_attr *out);
        int (*alloc)(struct tp_ep *ep, size_t len, struct tp_mem **out);
        int (*reg)(struct tp_ep *ep, const struct mem_region *region, struct tp_mem **out);
        void (*free)(struct tp_mem *mem);
        int (*export_key)(struct tp_mem *mem, size_t off, size_t len, struct tp_key *out);
        int (*import_key)(struct tp_ep *ep, const struct tp_key *key, uint64_t deadline_ns, struct tp_rmem **out);
        void (*rmem_free)(struct tp_rmem *rmem);

        int (*poll)(struct tp_ctx *ctx, struct tp_event *ev, int max);
        int (*fd)(struct tp_ctx *ctx);
        int (*arm)(struct tp_ctx *ctx);
        void (*disarm)(struct tp_ctx *ctx);
        int (*send)(struct tp_ep *ep, const void *buf, size_t len, unsigned flags, uint64_t cookie);
        void (*release)(struct tp_ep *ep, uint64_t loan);
        int (*write)(struct tp_ep *ep, struct tp_mem *mem, const void *src, size_t len, struct tp_rmem *rmem,
                     uint64_t roff, unsigned flags, uint64_t cookie);
        int (*write_imm)(struct tp_ep *ep, struct tp_mem *mem, const void *src, size_t len, struct tp_rmem *rmem,
                         uint64_t roff, uint32_t imm, unsigned flags, uint64_t cookie);
        int (*read)(struct tp_ep *ep, struct tp_mem *mem, void *dst, size_t len, struct tp_rmem *rmem, uint64_t roff,
                    unsigned flags, uint64_t cookie);
        int (*cancel)(struct tp_ep *ep, uint64_t cookie);

        /* For fault.c only: the connection breaks now as if a cable were cut. Both ends find out by themselves: posts
         * that are outstanding end in errors, then TP_EV_DOWN. The endpoint and its memory stay until ep_close. */
        void (*sever)(struct tp_ep *ep);
};

/* Makes progress on everything in the context and returns up to max events (0: nothing happened). Never blocks.
 * Lets go of what TP_MORE held back. */
static inline int tp_poll(struct tp_ctx *ctx, struct tp_event *ev, int max)
{
        return ctx->ops->poll(ctx, ev, max);
}

/*
 * Sleeping. tp_fd: a descriptor (epoll) that becomes readable when something happens while the context is armed; it may
 * be put into the caller's own poll set beside other contexts. tp_arm: asks peers to wake us; 0, or
 * -EAGAIN: something is there already, poll instead. tp_disarm ends it (also implied by the next tp_poll that
 * returns events). While not armed nobody makes system calls for our sake.
 */
static inline int tp_fd(struct tp_ctx *ctx)
{
        return ctx->ops->fd(ctx);
}

static inline int tp_arm(struct tp_ctx *ctx)
{
        return ctx->ops->arm(ctx);
}

static inline void tp_disarm(struct tp_ctx *ctx)
{
        ctx->ops->disarm(ctx);
}

/* Polls for events until some came (count), or deadline_ns passed (0). Spins for opts.spin_ns first, then sleeps. */
int tp_wait(struct tp_ctx *ctx, struct tp_event *ev, int max, uint64_t deadline_ns);

/* len 0 to attr.msg_max; buf needs no registration. */
static inline int tp_send(struct tp_ep *ep, const void *buf, size_t len, unsigned flags, uint64_t cookie)
{
        return ep->ops->send(ep, buf, len, flags, cookie);
}

static inline void tp_release(struct tp_ep *ep, uint64_t loan)
{
        ep->ops->release(ep, loan);
}

/*
 * One-sided. [src, src+len) lies inside mem. A NULL mem stands for ordinary host memory: loop, shm and tcp read it where
 * it is; a medium that reaches registered memory only (rdma) copies through a registered buffer of its own and counts
 * the bytes. A read into a NULL mem likewise. [roff, roff+len) lies inside rmem, else -ERANGE.
 */
static inline int tp_write(struct tp_ep *ep, struct tp_mem *mem, const void *src, size_t len, struct tp_rmem *rmem,
                           uint64_t roff, unsigned flags, uint64_t cookie)
{
        return ep->ops->write(ep, mem, src, len, rmem, roff, flags, cookie);
}

/* As tp_write, and the peer gets TP_EV_IMM {imm, len} when the bytes are visible there. */
static inline int tp_write_imm(struct tp_ep *ep, struct tp_mem *mem, const void *src, size_t len, struct tp_rmem *rmem,
                               uint64_t roff, uint32_t imm, unsigned flags, uint64_t cookie)
{
        return ep->ops->write_imm(ep, mem, src, len, rmem, roff, imm, flags, cookie);
}

static inline int tp_read(struct tp_ep *ep, struct tp_mem *mem, void *dst, size_t len, struct tp_rmem *rmem,
                          uint64_t roff, unsigned flags, uint64_t cookie)
{
        return ep->ops->read(ep, mem, dst, len, rmem, roff, flags, cookie);
}

/* Gives up a posted operation: its TP_EV_DONE comes with -ECANCELED, or, if it was too late, with its result. */
static inline int tp_cancel(struct tp_ep *ep, uint64_t cookie)
{
        return ep->ops->cancel(ep, cookie);
}

/* ---- registry ---- */

struct tp_backend {
        const char *scheme;
        const struct tp_ops *ops; /* NULL: not built */
        const char *reason;       /* why not built, with what would mend it; NULL when built */
        const char *what;         /* one line for `list` */
};

extern const struct tp_backend tp_backends[]; /* ends with scheme NULL; best first where none is named */
/* NULL: usable; else the reason. */
const char *tp_unavailable(const struct tp_backend *b);

/* ---- URLs ---- */

struct tp_url {
        char scheme[16];
        char host[128]; /* or the name of shm:// and loop:// */
        char port[8];   /* "" when absent */
        char query[96]; /* "a=1&b=2" */
        bool loopback;  /* the peer can only be on this host (shm, loop, 127/8, ::1, localhost) */
        bool any;       /* "*", 0.0.0.0, [::]: to listen on, every address of this host of a family */
};

/* A bare host:port means tcp. [v6]:port. -EINVAL with a sentence. */
int tp_url_parse(const char *text, struct tp_url *out);
/* Value of ?key= into buf; false when absent. */
bool tp_url_param(const struct tp_url *u, const char *key, char *buf, size_t len);

#endif
