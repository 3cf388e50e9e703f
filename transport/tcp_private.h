/* What tcp.c (set-up) and tcp_data.c (hot path) share. Nobody else includes it. */
#ifndef DJINN_TRANSPORT_TCP_PRIVATE_H
#define DJINN_TRANSPORT_TCP_PRIVATE_H

#include <sys/uio.h>

#include "softrma.h"
#include "transport.h"

#define TCP_MSG_MAX    65536u       /* longest message that we take */
#define TCP_CHUNK      (256u << 10) /* receive buffer; messages are loans that point into it */
#define TCP_CHUNKS     32u          /* per endpoint; memory is touched only as far as it is used */
#define TCP_TX_DEPTH   256u         /* posts of the user that can be outstanding */
#define TCP_READS      64u          /* reads that can be outstanding, ours and the peer's */
#define TCP_TX_RING    512u         /* the two together, requests and responses, with room to spare */
#define TCP_LEAN_BYTES 512u         /* read-ahead while bulk frames are coming: see rx_fill */
#define TCP_LEAN_FROM  4096u        /* bulk frames from this size on switch to it ... */
#define TCP_LEAN_SPAN  16u          /* ... for so many frames */
#define TCP_SMALL      1024u        /* payloads up to this are copied behind their header: see post_small */
#define TCP_NO_CHUNK   UINT32_MAX
#define TCP_TOUCH      16384u /* of the pool, touched when the endpoint is made */

extern const struct tp_ops tp_tcp_ops;

/* Whom an epoll entry is for: the first member of each of those. */
enum tcp_tag { TCP_TAG_EP, TCP_TAG_LISTENER, TCP_TAG_HALF, TCP_TAG_TIMER };

struct tcp_mem {
        struct tp_mem base;
        struct tcp_mem *prev, *next; /* of the endpoint */
        bool owned;                  /* from tp_alloc: to be unmapped */
};

struct tcp_rmem {
        struct tp_rmem base;
        struct tcp_rmem *prev, *next;
        struct softrma_key key;
};

struct tcp_tx_item {
        const uint8_t *src;
        uint64_t len, sent; /* sent counts pad, header and payload */
        uint64_t cookie;
        const void *mem;       /* what src lies in, where the owner may take it away (read responses) */
        int status;            /* of a user's post, when not 0 */
        uint8_t head_len, pad; /* pad: zeros in front, owed by the item before; known once attempted */
        bool user;             /* ends in TP_EV_DONE */
        bool cancelled;
        uint8_t head[SOFTRMA_ALIGN + SOFTRMA_HEAD_MAX]; /* zeros, then the header */
};

/* Posts that the kernel has not taken yet, and those taken of which the user has not been told. All four run upwards
 * without wrapping: told <= done <= tried <= tail. */
struct tcp_tx {
        struct tcp_tx_item *item;
        uint32_t told, done, tried, tail;
        uint32_t users;   /* user's posts between told and tail */
        uint32_t replies; /* answers to the peer's reads between done and tail */
        unsigned pad_owed;
        bool full; /* the kernel took no more; tried again at the next poll */
        int dead;  /* -errno once sending has failed */
};

/* LEFT: given up and told; its answer is still to come and will be thrown away. */
enum tcp_read_state { TCP_READ_WAITS, TCP_READ_CANCELLED, TCP_READ_LEFT };

struct tcp_read {
        enum tcp_read_state state;
        uint8_t *dst;
        uint64_t len, cookie;
        const struct tp_mem *mem;
};

/* Reads are answered in the order in which they were asked. */
struct tcp_reads {
        uint32_t head, tail;
        uint32_t untold; /* cancelled ones of which the user has not been told */
        struct tcp_read slot[TCP_READS];
};

struct tcp_chunk {
        uint8_t *data;
        uint32_t refs, next_free;
};

enum tcp_rx_state { TCP_RX_HEAD, TCP_RX_BULK, TCP_RX_DISCARD };

struct tcp_rx {
        uint32_t cur, free;
        size_t pos, end; /* not yet parsed, in the current chunk */
        size_t want;     /* bytes from pos that the next step of parsing needs */
        unsigned skip;   /* padding in front of the next header */
        unsigned lean;
        enum tcp_rx_state state;
        bool stalled; /* nothing is read: every chunk is on loan, or answers are stuck */
        bool eof;
        int error;                  /* with eof: what the kernel said, 0 for an orderly end */
        struct softrma_frame frame; /* of the bulk that is arriving */
        uint64_t left;
        struct tcp_chunk chunk[TCP_CHUNKS];
};

/* REFUSING: a REFUSED frame waits for its turn to be sent. FALLING: the user is being told of everything outstanding.
 * DOWN: the user knows. */
enum tcp_ep_state { TCP_EP_LIVE, TCP_EP_REFUSING, TCP_EP_FALLING, TCP_EP_DOWN };

struct tcp_ep {
        enum tcp_tag tag; /* first */
        int fd;
        enum tcp_ep_state state;
        int status;        /* why it went down */
        bool more;         /* parsing stopped for want of room for events */
        bool drain;        /* what still comes is thrown away, lest a reset overtakes our refusal */
        bool busy;         /* in the context's list of endpoints to look at without being woken */
        uint32_t interest; /* as epoll knows it */
        size_t peer_msg_max;
        struct tcp_tx tx; /* this and the beginnings of the next two are what every poll looks at */
        struct tcp_rx rx;
        struct tcp_reads reads;
        struct softrma_table keys;
        uint64_t session, peer_session;
        struct tcp_mem *mems;
        struct tcp_rmem *rmems;
        struct tcp_ep *prev, *next; /* of the context */
        struct tcp_ep *next_ready;  /* of the listener, until accepted */
        struct tcp_ep *next_busy;
        uint8_t *pool;
        char why[256];
        struct tp_ep base;
        _Alignas(CACHE_LINE) uint8_t small[SOFTRMA_ALIGN + SOFTRMA_HEAD_MAX + TCP_SMALL]; /* zeros, header, payload */
};

struct tcp_ctx {
        struct tp_ctx base;
        int epfd, timerfd;
        enum tcp_tag timer_tag;
        bool armed;
        unsigned n_eps, n_half;
        unsigned tick;
        unsigned directly; /* polls by recv since the last time that epoll was needed */
        bool apart;        /* no endpoint is in the epoll set: see go_apart */
        bool first_second;
        struct tcp_ep *eps;
        struct tcp_ep *busy, **busy_end;
        struct tcp_listener *listeners;
};

static inline struct tcp_ep *tcp_ep_of(struct tp_ep *ep)
{
        return container_of(ep, struct tcp_ep, base);
}

static inline struct tcp_ctx *tcp_ctx_of(struct tp_ctx *ctx)
{
        return container_of(ctx, struct tcp_ctx, base);
}

/* tcp.c: */
/* Something happened at a listener, a half-made connection or the timer. Cold. */
void tcp_setup_progress(struct tcp_ctx *c, enum tcp_tag *who);
/* Tells epoll what we wait for, when it has changed; 0 takes the descriptor out. 0; -errno when it cannot be told. */
int tcp_interest(struct tcp_ep *ep, uint32_t events);

/* tcp_data.c: */
int tcp_poll(struct tp_ctx *ctx, struct tp_event *ev, int max);
int tcp_fd(struct tp_ctx *ctx);
int tcp_arm(struct tp_ctx *ctx);
void tcp_disarm(struct tp_ctx *ctx);
int tcp_send(struct tp_ep *ep, const void *buf, size_t len, unsigned flags, uint64_t cookie);
void tcp_release(struct tp_ep *ep, uint64_t loan);
int tcp_write(struct tp_ep *ep, struct tp_mem *mem, const void *src, size_t len, struct tp_rmem *rmem, uint64_t roff,
              unsigned flags, uint64_t cookie);
int tcp_write_imm(struct tp_ep *ep, struct tp_mem *mem, const void *src, size_t len, struct tp_rmem *rmem,
                  uint64_t roff, uint32_t imm, unsigned flags, uint64_t cookie);
int tcp_read(struct tp_ep *ep, struct tp_mem *mem, void *dst, size_t len, struct tp_rmem *rmem, uint64_t roff,
             unsigned flags, uint64_t cookie);
int tcp_cancel(struct tp_ep *ep, uint64_t cookie);
/* Endpoints that left the epoll set are in it again: 0; -errno when one is not, and they all are polled as before. */
int tcp_together(struct tcp_ctx *c);
/* Offers what is queued to the kernel. */
void tcp_flush(struct tcp_ep *ep);
/* Memory goes away: nothing may read from it or write to it any more. */
void tcp_forget_mem(struct tcp_ep *ep, const struct tp_mem *mem);

#endif
