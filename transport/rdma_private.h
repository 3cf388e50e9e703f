/* What rdma.c (set-up), rdma_device.c (devices and addresses), rdma_cm.c (connection by the kernel's manager) and
 * rdma_data.c (hot path) share. Nobody else includes it. */
#ifndef DJINN_TRANSPORT_RDMA_PRIVATE_H
#define DJINN_TRANSPORT_RDMA_PRIVATE_H

#include <infiniband/verbs.h>

#include "bootstrap.h"
#include "rdma_reg.h"
#include "transport.h"

/* What an endpoint holds in pinned memory: window + 5 receive buffers and the ring of copies; with 4 KiB messages 788 KiB
 * for the first RDMA_WIDE_EPS endpoints of a context and 180 KiB for each after them. */
#define RDMA_MSG_MAX       4096u      /* longest message, unless ?msg= says otherwise */
#define RDMA_MSG_LIMIT     (1u << 20) /* what ?msg= may say, and what a peer may claim */
#define RDMA_WINDOW_WIDE   128u       /* receive buffers for the peer's messages, unless ?window= says otherwise: */
#define RDMA_WINDOW_NARROW 32u        /* ... for the first so many endpoints of a context, and for those after them */
#define RDMA_WIDE_EPS      16u
#define RDMA_WINDOW_MIN    16u
#define RDMA_WINDOW_LIMIT  1024u
#define RDMA_QPS_MAX       16u
#define RDMA_SQ_WIDE       256u /* work requests that can be outstanding on one queue pair */
#define RDMA_SQ_NARROW     64u
#define RDMA_SQ_RESERVE    4u   /* of those, kept for credits and markers */
#define RDMA_INLINE_ASKED  220u /* a message or write up to here travels in the work request where the device can */
#define RDMA_OPS           64u  /* bulk posts that are spread over several queue pairs */
#define RDMA_STRIPE_LEAST  (128u << 10)
#define RDMA_CHUNK_MAX     (1u << 30) /* one work request; the device's max_msg_sz may be less */
#define RDMA_EXPORTS_MAX   65536u     /* live keys of one endpoint */
#define RDMA_CQS_MAX       256u
#define RDMA_POLL_BATCH    16u
#define RDMA_COPIES        4u           /* copies out of device memory that are under way at a time ... */
#define RDMA_STAGE_PIECE   (256u << 10) /* ... of so many bytes */
#define RDMA_DRAIN_NS      300000000ull /* how long a dying endpoint waits for its flushed work requests */

extern const struct tp_ops tp_rdma_ops;

/* Whom an epoll entry is for: the first member of each of those. */
enum rdma_tag { RDMA_TAG_EP, RDMA_TAG_LISTENER, RDMA_TAG_CHANNEL, RDMA_TAG_ASYNC, RDMA_TAG_CM };

/* ---- wire ---- */

/* Immediate data of a SEND: what it is, and receive buffers that the sender gives back to us. So a message needs no
 * header, and credits need no message of their own while both sides talk. */
enum rdma_kind {
        RDMA_MSG = 1,
        RDMA_CREDIT, /* no payload: credits alone */
        RDMA_IMM,    /* struct rdma_notice: the end of a write_imm that took more than one work request */
        RDMA_BYE,    /* no payload: an orderly end, where no bootstrap socket can say it */
        /* struct rdma_stage_msg, for memory that is staged at the receiver's side (rdma_stage.c): */
        RDMA_PLACE,   /* a write lies in the host buffer: copy it to where it belongs */
        RDMA_REFRESH, /* copy what a read wants into the host buffer */
        RDMA_FRESH    /* done: read */
};

#define RDMA_IMM_OF(kind, credits) (((uint32_t)(kind) << 16) | (credits))

struct rdma_notice { /* little endian */
        uint64_t len;
        uint32_t imm, zero;
};

struct rdma_stage_msg {     /* little endian */
        uint64_t addr, len; /* as the work request calls the bytes */
        uint32_t rkey, imm;
        uint32_t event;  /* PLACE: 1, when imm is to be delivered */
        uint32_t serial; /* of a REFRESH, and of the FRESH that answers it */
};

/* ---- addresses ---- */

enum rdma_link { RDMA_LINK_IB = 1, RDMA_LINK_ROCE_V1, RDMA_LINK_ROCE_V2, RDMA_LINK_IWARP };

struct rdma_gid {
        union ibv_gid gid;
        int index; /* -1: none (InfiniBand by LID) */
        enum rdma_link link;
        char netdev[32];
        char text[64]; /* "GID 1 10.0.0.1 (RoCE v2)" */
};

struct rdma_port {
        struct ibv_context *verbs;
        struct ibv_device_attr dev;
        struct ibv_port_attr port;
        uint8_t number;
        char name[64]; /* "mlx5_0/1" */
        bool emulated;
        int driver_copies, numa;
        double link_bits_per_s;
};

struct rdma_url { /* parameters of a URL */
        char dev[40];
        int gid, qps, mtu, tc, sl, window, msg, timeout;
        bool cm;
};

/* ---- memory ---- */

/* Flags in the low bits of a key's epoch. */
#define RDMA_KEY_STAGED    1u /* the bytes land in host memory that stands for the device's */
#define RDMA_KEY_FLAG_BITS 8

struct rdma_export {
        struct mem_region region; /* of the bytes that the key opens */
        struct rdma_reg reg;      /* all zero: opens no byte */
        struct rdma_export *next;
};

struct rdma_mem {
        struct tp_mem base;
        struct rdma_mem *prev, *next;
        struct rdma_reg reg;
        bool owned, host;
        struct rdma_export *exports;
};

struct rdma_rmem {
        struct tp_rmem base;
        struct rdma_rmem *prev, *next;
        uint64_t addr;
        uint32_t rkey;
        bool staged;
};

/* ---- sending ---- */

enum rdma_rec_kind {
        RDMA_REC_NONE,  /* nobody waits for it */
        RDMA_REC_USER,  /* ends in TP_EV_DONE */
        RDMA_REC_CHUNK, /* one of several of ops[op] */
};

struct rdma_rec { /* what is known of a posted work request until it is done */
        uint64_t cookie;
        const char *what;
        uint8_t *dst, *bounce; /* a read's: copy len bytes when it is done */
        uint32_t len, ring_end;
        int status;
        uint16_t op;
        uint8_t kind;
        bool ring, read;
        bool plain; /* counted in the endpoint's `plain` */
        bool put;   /* a read into staged memory: `bounce` is its rdma_mem, `dst` where it lands in the host buffer */
};

/* A send queue. Counters run upwards: told <= acked <= head <= told + depth. A completion for one work request says
 * that all before it are done, so most ask for none. */
struct rdma_sq {
        struct ibv_qp *qp;
        struct ibv_qp_ex *ex; /* NULL: the provider has no ibv_wr_*; ibv_post_send */
        struct rdma_rec *rec; /* [depth] */
        uint32_t depth, told, acked, head;
        uint32_t quiet;  /* posted since the last that asked for a completion */
        uint32_t failed; /* with `broken`: the first that failed */
        uint32_t open;   /* work requests held back in the provider (TP_MORE) */
        bool broken;
        bool uncovered; /* somebody waits for one of the quiet ones */
        uint8_t index;
        uint32_t qpn;
};

/* A bulk post in several pieces: the one that is being cut up, or one of those spread over several queue pairs. */
struct rdma_op {
        bool used, posted;
        bool silent; /* the notice that follows is what ends the post */
        uint64_t cookie, raddr, len;
        uint32_t rkey, left; /* pieces that are not done */
        int status;
};

enum rdma_bulk { RDMA_BULK_WRITE, RDMA_BULK_WRITE_IMM, RDMA_BULK_READ };

struct rdma_cur { /* the post that did not fit at once; while there is one, others are refused with -EAGAIN */
        bool active, begun, cancelled, more;
        bool bounce;  /* through the ring of copies */
        bool inlined; /* in the work request */
        bool wanted;  /* the caller waits for TP_EV_DONE */
        bool notice;  /* a message of its own carries the immediate data */
        enum rdma_bulk kind;
        uint8_t *at;
        uint64_t left, len, piece, raddr, cookie;
        uint32_t lkey, rkey, imm;
        int op; /* -1: not spread */
        /* memory that is staged (rdma_stage.c) */
        const struct rdma_mem *mem; /* ours, or NULL */
        bool place;                 /* the peer's: the end of a write is told by PLACE, a read begins with REFRESH */
        enum rdma_refresh { RDMA_REFRESH_NONE, RDMA_REFRESH_DUE, RDMA_REFRESH_ASKED } refresh;
        uint64_t asked, copied; /* bytes, from the first on, whose copy out of device memory has begun, is done */
};

/* ---- endpoint ---- */

/* HALF: the peer has not said READY. FALLING: the queue pairs are being emptied, the user told of what was
 * outstanding. DOWN: the user knows. */
enum rdma_ep_state { RDMA_EP_HALF, RDMA_EP_LIVE, RDMA_EP_FALLING, RDMA_EP_DOWN };

struct rdma_ep {
        enum rdma_tag tag; /* first */
        enum rdma_ep_state state;
        struct rdma_sq *sq; /* [n_qps]; messages travel on the first */
        unsigned n_qps;
        /* receiving */
        uint32_t owed;      /* receive buffers posted again that the peer has not been told of */
        uint32_t owed_tell; /* from so many on it is told without being asked */
        uint32_t chain_n, chain_most;
        uint32_t chain_unpaid;                        /* of chain_n: used by messages that took no credit */
        struct ibv_recv_wr *chain_first, *chain_last; /* given back, not posted yet */
        struct ibv_recv_wr *rx_wr;                    /* [rx_depth] */
        struct ibv_sge *rx_sge;
        uint8_t *rx; /* rx_depth * rx_slot bytes */
        uint32_t rx_depth, rx_slot, window;
        uint64_t rx_seen; /* receive buffers that the peer has used */
        /* sending */
        uint32_t credits;     /* receive buffers of the peer's that we may use */
        uint32_t peer_window; /* ... at most */
        uint32_t inline_max;
        uint64_t tx_used; /* receive buffers of the peer's that we have used */
        uint8_t *ring;    /* copies of messages, and of bulk that lies in no registered memory */
        uint32_t ring_size, ring_head, ring_tail, ring_quiet;
        uint32_t reads;  /* outstanding: what follows waits for them (fence) */
        uint32_t plain;  /* bulk outstanding on the first queue pair; counted with several only */
        uint32_t spread; /* ops in use */
        bool spread_reads;
        unsigned next_sq;
        struct rdma_cur cur;
        struct rdma_op *ops; /* [RDMA_OPS], with several queue pairs */
        uint64_t chunk_max;
        size_t peer_msg_max;
        uint32_t tx_lkey, rx_lkey;
        /* staged memory */
        struct rdma_copy {
                const struct rdma_mem *mem;
                uint64_t ticket;
                uint32_t len;
        } copies[RDMA_COPIES]; /* out of device memory, under way, in order */
        unsigned n_copies;
        uint32_t refresh_serial, fresh_serial; /* of our latest REFRESH; of the peer's that is to be answered */
        bool fresh_due;
        /* attention */
        bool in_todo, in_held, credit_due;
        struct rdma_ep *next_todo, *next_held;
        struct ibv_wc *early; /* what came before the endpoint was accepted */
        uint32_t n_early, early_at;
        /* ends */
        int status;
        bool bye;
        uint64_t bye_count, fall_deadline_ns, fall_empties;
        char why[320];
        /* identity */
        uint32_t slot, generation;
        int fd;                             /* bootstrap socket, -1 with rdma_cm */
        struct rdma_cm_id *cm;              /* by the kernel's connection manager */
        bool cm_connected, cm_bye, cm_gone; /* cm_bye: the peer said so; cm_gone: it hung up */
        struct rdma_listener *half_of;      /* cm: waits for the connector's last word */
        struct boot_reader in;
        struct ibv_pd *pd;
        struct rdma_reg_dev reg_local, reg_remote; /* for work requests of ours, and of the peer's */
        struct rdma_reg_port reg_port;
        struct ibv_mr *pool_mr;
        uint8_t *pool; /* rx and ring in one mapping */
        size_t pool_bytes;
        struct rdma_cq *cq;
        uint32_t cqes;
        struct rdma_gid gid;
        enum ibv_mtu mtu;
        uint64_t session; /* what we said in our greeting; its low bits are our first packet number */
        uint64_t secret;  /* of both sides, seals keys */
        unsigned side;
        uint32_t n_exports;
        uint64_t serial;
        struct rdma_mem *mems;
        struct rdma_rmem *rmems;
        struct rdma_ep *prev, *next; /* of the context */
        struct rdma_ep *next_ready;
        struct tp_ep base;
};

struct rdma_listener {
        enum rdma_tag tag;          /* first */
        struct boot_listener *boot; /* NULL with rdma_cm */
        struct rdma_cm_id *cm;
        struct rdma_url url;
        unsigned n_ready, n_half;
        struct rdma_ep *ready, **ready_end;
        struct rdma_listener *prev, *next;
        struct tp_listener base;
};

/* One completion queue per context; another one only where the device cannot make one that is large enough. */
struct rdma_cq {
        struct ibv_cq *cq;
        uint32_t promised;
};

struct rdma_ctx {
        struct tp_ctx base;
        struct rdma_port port;
        struct rdma_url url;
        enum tp_gpu_path gpu_path;
        int epfd;
        enum rdma_tag channel_tag, async_tag, cm_tag;
        struct ibv_comp_channel *channel;
        struct rdma_cq *cq; /* [n_cq] */
        unsigned n_cq;
        /* completions taken from the queue and not looked at */
        struct ibv_wc *wc;
        uint32_t wc_at, wc_n, wc_cap;
        uint64_t empties; /* times that the queues were seen empty */
        uint32_t tick;
        bool armed;
        struct rdma_ep *todo, **todo_end;
        struct rdma_ep *held;
        struct rdma_ep **slots; /* by number; NULL: free */
        uint32_t n_slots, generation;
        unsigned n_eps;
        struct rdma_ep *eps;
        struct rdma_listener *listeners;
        struct rdma_cm *cm;
};

static inline struct rdma_ep *rdma_ep_of(struct tp_ep *ep)
{
        return container_of(ep, struct rdma_ep, base);
}

static inline struct rdma_ctx *rdma_ctx_of(struct tp_ctx *ctx)
{
        return container_of(ctx, struct rdma_ctx, base);
}

/*
 * wr_id: 12 bits of the endpoint's life, 20 its number, 1 whether it is a receive, 4 the queue pair, 27 which work
 * request. Completions of an endpoint that has gone are told by the life.
 */
#define RDMA_ID_RECV     (1ull << 31)
#define RDMA_ID_SEQ_MASK ((1u << 27) - 1)
#define RDMA_ID_NONE     UINT64_MAX
#define RDMA_SLOTS_MAX   ((1u << 20) - 1)

static inline uint64_t rdma_id(const struct rdma_ep *ep)
{
        return (uint64_t)(ep->generation & 0xfff) << 52 | (uint64_t)ep->slot << 32;
}

static inline struct rdma_ep *rdma_id_ep(const struct rdma_ctx *c, uint64_t id)
{
        uint32_t slot = (uint32_t)(id >> 32) & 0xfffff;
        struct rdma_ep *ep = slot < c->n_slots ? c->slots[slot] : NULL;

        return ep && (ep->generation & 0xfff) == id >> 52 ? ep : NULL;
}

/* ---- rdma_device.c ---- */
const char *rdma_unavailable(void);
void rdma_url_default(struct rdma_url *out);
/* Reads and checks the parameters; those that are absent stay as they are in out. */
int rdma_url_read(const char *url, const struct tp_url *u, struct rdma_url *out);
/* Opens the device that the URL names, else the one that leads to its host, else the first with an active port. */
int rdma_port_open(const char *url, const struct tp_url *u, const struct rdma_url *par, struct rdma_port *out);
/* Our address for a connection whose bootstrap uses fd (its local address). want: what the peer has, or NULL. */
int rdma_gid_choose(const struct rdma_port *p, int wanted_index, int fd, const struct rdma_gid *want, const char *peer,
                    struct rdma_gid *out);
unsigned rdma_mtu_bytes(enum ibv_mtu mtu);
enum ibv_mtu rdma_mtu_of(int bytes);
bool rdma_gid_is_v4(const union ibv_gid *gid);

/* ---- rdma.c ---- */
/* Something happened at a descriptor of the context. Cold. */
void rdma_control(struct rdma_ctx *c);
/* The half of a connection that needs no peer (side: 0 connector, 1 acceptor), with a sentence on failure; its end; and
 * its way to tp_accept. */
int rdma_ep_make(struct rdma_ctx *c, unsigned side, unsigned n_qps, const struct rdma_url *par, const char *peer,
                 struct rdma_ep **out);
void rdma_ep_free(struct rdma_ep *ep);
void rdma_listener_ready(struct rdma_listener *l, struct rdma_ep *ep);

/* ---- rdma_cm.c ---- */
int rdma_cm_listen(struct rdma_ctx *c, const char *url, const struct tp_url *u, struct rdma_listener *l);
void rdma_cm_listener_free(struct rdma_listener *l);
void rdma_cm_drop_halves(struct rdma_ctx *c, struct rdma_listener *l);
int rdma_cm_connect(struct rdma_ctx *c, const char *url, const struct tp_url *u, const struct rdma_url *par,
                    uint64_t deadline_ns, const struct inet_idle *idle, struct rdma_ep **out);
void rdma_cm_progress(struct rdma_ctx *c);
/* The endpoint is live; if the peer has gone meanwhile, that is taken up now. */
void rdma_cm_joined(struct rdma_ep *ep);
/* Tells the peer that the connection is over. */
void rdma_cm_hang_up(struct rdma_ep *ep);
void rdma_cm_free(struct rdma_ep *ep);
void rdma_cm_close(struct rdma_ctx *c);

/* ---- rdma_data.c ---- */
int rdma_poll(struct tp_ctx *ctx, struct tp_event *ev, int max);
int rdma_fd(struct tp_ctx *ctx);
int rdma_arm(struct tp_ctx *ctx);
void rdma_disarm(struct tp_ctx *ctx);
int rdma_send(struct tp_ep *ep, const void *buf, size_t len, unsigned flags, uint64_t cookie);
void rdma_release(struct tp_ep *ep, uint64_t loan);
int rdma_write(struct tp_ep *ep, struct tp_mem *mem, const void *src, size_t len, struct tp_rmem *rmem, uint64_t roff,
               unsigned flags, uint64_t cookie);
int rdma_write_imm(struct tp_ep *ep, struct tp_mem *mem, const void *src, size_t len, struct tp_rmem *rmem,
                   uint64_t roff, uint32_t imm, unsigned flags, uint64_t cookie);
int rdma_read(struct tp_ep *ep, struct tp_mem *mem, void *dst, size_t len, struct tp_rmem *rmem, uint64_t roff,
              unsigned flags, uint64_t cookie);
int rdma_cancel(struct tp_ep *ep, uint64_t cookie);
/* Puts the endpoint among those that the next poll looks after. */
void rdma_todo(struct rdma_ep *ep);
/* Posts all receive buffers; -errno, no sentence. */
int rdma_receive_all(struct rdma_ep *ep);
/* The connection is over: status and the sentence for the user. Only the first call counts. */
void rdma_fail(struct rdma_ep *ep, int status, const char *fmt, ...) __attribute__((format(printf, 3, 4), cold));
/* Waits until all that was posted is acknowledged, the peer is gone, or the deadline. */
void rdma_drain(struct rdma_ep *ep, uint64_t deadline_ns);
/* The last message. */
void rdma_say_bye(struct rdma_ep *ep);
/* The endpoint is about to be freed: nothing of the context points to it any more. */
void rdma_forget(struct rdma_ep *ep);
const char *rdma_wc_hint(enum ibv_wc_status status);
/* Posts a message of our own, behind everything posted before; rec says who waits. False: no room now. The caller
 * accounts for the credit. */
bool rdma_post_control(struct rdma_ep *ep, enum rdma_kind kind, const void *payload, uint32_t len, struct rdma_rec rec,
                       bool more);

/* ---- rdma_stage.c ---- */
/* May the next piece of the endpoint's current post go to the device? Makes progress with what it waits for. */
bool rdma_stage_ready(struct rdma_ep *ep);
/* The notice that ends a write into memory staged at the peer's side. */
bool rdma_stage_place(struct rdma_ep *ep, struct rdma_rec rec);
/* A PLACE, REFRESH or FRESH came: the number of events. */
int rdma_stage_arrived(struct rdma_ep *ep, enum rdma_kind kind, const void *payload, struct tp_event *ev);
/* A read into staged memory is done; fails the endpoint where the copy does. */
void rdma_stage_landed(struct rdma_ep *ep, const struct rdma_rec *r);
/* Answers a REFRESH as soon as there is room. */
void rdma_stage_answer(struct rdma_ep *ep);
/* No copy may be under way when the buffer goes. */
void rdma_stage_forget(struct rdma_ep *ep, const struct rdma_mem *m);

#endif
