/*
 * The shared segment of one connection, and an endpoint's private state. shm.c sets up, shm_data.c is the hot path.
 *
 * Both processes map the segment where they like: it holds offsets and indices, never pointers. Whatever lies in it may
 * have been written by a peer that lies: an index or length is loaded once, into a private copy, and checked before use;
 * one that makes no sense ends this endpoint and nothing else.
 *
 * Messages. Each direction is a ring of slots of two cache lines. A slot's `seq` says whose turn it is: the sender
 * stores index + 1 there last, with release order, and the receiver looks at the seq of the next slot and at nothing
 * else, so that a small message costs the transfer of its own lines and no more. Up to SHM_INLINE bytes travel in the
 * slot, longer messages in a byte area beside it. The receiver tells how far it has released by `head`, in a line that
 * the sender reads only when it believes the ring to be full, and in passing in the messages that it sends itself.
 *
 * Sleeping. A side that goes to sleep stores `armed`, makes every running processor of the two processes pass a memory
 * barrier (membarrier(2)), and looks again. The other side, after publishing, only loads `armed`: the sleeper pays for
 * the fence, the sender has none. Where membarrier is not to be had both fence. The wake-up is a record on the
 * connection's socket: an eventfd, whose file flags and counter both processes share, would let a hostile peer block us
 * in write(2) or eat our wake-ups; a send with MSG_DONTWAIT cannot be blocked by anybody.
 */
#ifndef DJINN_TRANSPORT_SHM_DATA_H
#define DJINN_TRANSPORT_SHM_DATA_H

#include <stdatomic.h>

#include "inside.h"

#define SHM_MAGIC       0x3130686d736a64ull /* "djsmh01" */
#define SHM_VERSION     1u
#define SHM_KEY_MAGIC   0x6d68736b6579ull
#define SHM_SLOTS       128u
#define SHM_INLINE      112u
#define SHM_MSG_MAX     65536u
#define SHM_BYTES       (1u << 20)   /* byte area of one direction */
#define SHM_BOUNCE      (1u << 18)   /* what one answer to a copied read can hold */
#define SHM_REGIONS     256u         /* regions of one side at a time */
#define SHM_PENDING_FDS 64u          /* descriptors handed to us that nobody has imported yet */
#define SHM_IMPORT_MAX  (1ull << 36) /* bytes of the peer's memory that one connection maps */
#define SHM_LINES       128 /* adjacent lines are fetched in pairs: what differs in owner stays that far apart */

enum shm_kind { SHM_MSG_INLINE = 1, SHM_MSG_BYTES, SHM_IMM, SHM_COPY_WRITE, SHM_COPY_READ };

struct shm_slot {
        _Atomic uint32_t seq; /* index of the message + 1 */
        uint16_t kind;
        uint16_t acked; /* low bits of the sender's own `head`: spares the other side the look at that line */
        uint32_t len;   /* bytes of the message, or of this piece */
        uint32_t where; /* offset in the byte area; SHM_IMM: the immediate, and its length is in data */
        unsigned char data[SHM_INLINE];
};

/* In `data` of SHM_COPY_WRITE and SHM_COPY_READ: bytes for or from memory that only its owner can reach. */
struct shm_copy {
        uint64_t tag;   /* of the whole operation; the answer carries it */
        uint64_t epoch; /* of the region */
        uint64_t off;   /* in the region, of this piece */
        uint32_t region;
        uint32_t flags; /* SHM_COPY_LAST, SHM_COPY_IMM */
        uint32_t imm;
        uint32_t zero;
};
#define SHM_COPY_LAST 1u
#define SHM_COPY_IMM  2u

#define SHM_ARMED       1u
#define SHM_ARMED_SPACE 2u /* also wake when slots come free */

/* Written by one side and read by the other (`armed` is taken down by whoever wakes). */
struct shm_side {
        _Alignas(SHM_LINES) _Atomic uint32_t armed;
        _Alignas(SHM_LINES) _Atomic uint64_t head; /* of the peer's messages, how many were released in order */
        _Alignas(SHM_LINES) _Atomic uint64_t reply_tag;
        _Atomic int64_t reply_status;
        _Alignas(SHM_LINES) _Atomic uint64_t epoch[SHM_REGIONS]; /* odd: alive */
};

struct shm_segment {
        uint64_t magic;
        _Alignas(SHM_LINES) struct shm_side side[2];        /* [0] connected, [1] accepted */
        _Alignas(4096) struct shm_slot slots[2][SHM_SLOTS]; /* [side that sends] */
        _Alignas(4096) unsigned char bytes[2][SHM_BYTES];
        _Alignas(4096) unsigned char bounce[2][SHM_BOUNCE]; /* [side that answers] */
};

_Static_assert(sizeof(struct shm_slot) == 2 * CACHE_LINE, "a slot is two lines");
_Static_assert(offsetof(struct shm_slot, data) == 16, "the header leaves 48 bytes of the first line");
_Static_assert(sizeof(struct shm_copy) <= SHM_INLINE, "a copy header fits a slot");
_Static_assert(sizeof(struct shm_side) == 3 * SHM_LINES + 8 * SHM_REGIONS, "no owner shares a pair of lines");
_Static_assert(offsetof(struct shm_segment, slots) % 4096 == 0, "slots are page-aligned");
_Static_assert((SHM_SLOTS & (SHM_SLOTS - 1)) == 0 && (SHM_BYTES & (SHM_BYTES - 1)) == 0, "masks");
_Static_assert(SHM_MSG_MAX * 4 <= SHM_BYTES, "several long messages can travel at once");
_Static_assert(sizeof(_Atomic uint64_t) == 8 && sizeof(_Atomic uint32_t) == 4, "atomics are plain words");
_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2 && ATOMIC_INT_LOCK_FREE == 2, "atomics work between processes");

enum shm_ctl_type { SHM_CTL_HELLO = 1, SHM_CTL_WELCOME, SHM_CTL_MEM, SHM_CTL_FREE, SHM_CTL_WAKE };

/* What travels over the socket: one record, at most one descriptor. */
struct shm_ctl {
        uint64_t magic;
        uint32_t version, type;
        uint32_t flags;  /* HELLO, WELCOME: SHM_CTL_MEMBARRIER */
        uint32_t region; /* MEM, FREE */
        uint64_t epoch;  /* MEM, FREE */
        uint64_t len;    /* MEM: bytes of the region; HELLO, WELCOME: of the segment */
        uint64_t secret; /* WELCOME: for keys */
};
#define SHM_CTL_MEMBARRIER 1u

_Static_assert(sizeof(struct shm_ctl) == 48, "both ends agree on the control record");

/* ---- private ---- */

enum shm_watch_kind { SHM_WATCH_LISTENER, SHM_WATCH_HALF, SHM_WATCH_EP };

struct shm_watch { /* what an epoll event belongs to */
        enum shm_watch_kind kind;
        int fd;
};

struct shm_mem {
        struct tp_mem base;
        uint32_t region;
        uint64_t epoch;
        int fd;        /* memfd; -1: foreign memory */
        size_t mapped; /* bytes */
        bool handed_over;
        bool exported; /* a key was made; what keys opened lies in [open_off, open_end) */
        uint64_t open_off, open_end;
};

/* A region of the peer's as it was handed over. The table of the endpoint holds one reference until the region is freed
 * or its place is taken by another, each import one more. */
struct shm_theirs {
        unsigned refs;
        int fd; /* until it is mapped, then -1 */
        uint64_t epoch;
        uint64_t len;
        unsigned char *map;
};

struct shm_rmem {
        struct tp_rmem base;
        uint64_t epoch;
        uint32_t region;
        unsigned char *addr; /* where the key's window starts here; NULL: the owner must move the bytes */
        uint64_t off;        /* of the window in the region */
        struct shm_theirs *theirs;
        struct shm_rmem *next;
};

/* The one operation on foreign memory that may be on its way. Posts after it wait (-EAGAIN): that is how order holds. */
struct shm_op {
        bool active, waiting, finished;
        bool is_read, has_imm;
        int status;
        uint32_t imm;
        struct shm_rmem *rmem;
        unsigned char *local;
        uint64_t roff;
        size_t len, done, piece;
        uint64_t tag, cookie;
};

/* Bits of shm_ep.slow: something but the ring wants attention. */
#define SHM_SLOW_OP     1u
#define SHM_SLOW_HUP    2u /* the socket is gone: what is in the ring is all there will be */
#define SHM_SLOW_KILLED 4u /* the peer broke the rules: nothing more is read */
#define SHM_SLOW_DEAD   8u /* TP_EV_DOWN was given */

struct shm_ep {
        struct tp_ep base;

        /* hot */
        struct shm_slot *tx_slots, *rx_slots;
        struct shm_side *me, *peer;
        uint64_t rx_next, rx_head;
        uint64_t tx_next, tx_head; /* tx_head: as last seen */
        unsigned slow;
        bool fenced;                     /* no membarrier: every publisher fences */
        bool starved;                    /* the last post met a full ring */
        uint64_t bytes_next, bytes_head; /* of the byte area, as running totals */
        unsigned char *tx_bytes, *rx_bytes;
        uint64_t tx_bytes_end[SHM_SLOTS]; /* where the byte area ended after each slot */
        bool held[SHM_SLOTS];

        /* cold */
        struct shm_op op;
        uint64_t next_tag;
        uint64_t got_tag, got_bytes; /* the peer's copied write that is arriving */
        int64_t got_status;
        struct shm_segment *seg;
        unsigned side;
        struct shm_watch watch;
        uint64_t secret;
        uint64_t life_mark, tick_mark; /* what the peer had done at the last look; what both had at the last tick */
        int kill_status;
        char why[160];
        struct shm_mem *mine[SHM_REGIONS];
        uint64_t mine_epoch[SHM_REGIONS]; /* where the peer cannot write; odd while a region lives */
        struct shm_theirs *theirs[SHM_REGIONS];
        unsigned pending_fds;
        uint64_t imported_bytes;
        struct shm_rmem *rmems;
        struct shm_ep *next_ready;
};

struct shm_listener;

struct shm_ctx {
        struct tp_ctx base;
        struct shm_ep **eps;
        unsigned n_eps, cap_eps, first;
        unsigned polls;
        bool attention; /* look at the sockets at the next poll */
        bool armed;
        uint64_t attended_ns,
            event_ns; /* when the sockets were last looked at; when something last happened, roughly */
        int epfd;
        bool membarrier;
        struct shm_listener *listeners;
};

static inline struct shm_ep *shm_ep_of(const struct tp_ep *ep)
{
        return container_of(ep, struct shm_ep, base);
}

static inline struct shm_ctx *shm_ctx_of(const struct tp_ctx *ctx)
{
        return container_of(ctx, struct shm_ctx, base);
}

/* shm.c, for the hot path's rare moments */
void shm_attend(struct shm_ctx *c); /* looks at every socket that has something to say */
void shm_tick(struct shm_ctx *c);   /* decides whether it is time to */
void shm_wake(struct shm_ep *e);
void shm_disarm(struct tp_ctx *ctx);
void shm_kill(struct shm_ep *e, int status, const char *fmt, ...) __attribute__((format(printf, 3, 4), cold));

/* shm_data.c */
int shm_poll(struct tp_ctx *ctx, struct tp_event *ev, int max);
int shm_send(struct tp_ep *ep, const void *buf, size_t len, unsigned flags, uint64_t cookie);
void shm_release(struct tp_ep *ep, uint64_t loan);
int shm_write(struct tp_ep *ep, struct tp_mem *mem, const void *src, size_t len, struct tp_rmem *rmem, uint64_t roff,
              unsigned flags, uint64_t cookie);
int shm_write_imm(struct tp_ep *ep, struct tp_mem *mem, const void *src, size_t len, struct tp_rmem *rmem,
                  uint64_t roff, uint32_t imm, unsigned flags, uint64_t cookie);
int shm_read(struct tp_ep *ep, struct tp_mem *mem, void *dst, size_t len, struct tp_rmem *rmem, uint64_t roff,
             unsigned flags, uint64_t cookie);
int shm_cancel(struct tp_ep *ep, uint64_t cookie);
bool shm_ep_has_news(struct shm_ep *e); /* for arm: is there a reason not to sleep */

#endif
