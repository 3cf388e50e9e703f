/*
 * shm, hot path: no allocation, no lock, no log, no system call. See shm_data.h for the layout.
 *
 * Order. A direct write is a memcpy into the peer's mapping that is finished when the post returns, and a message is
 * published afterwards by a store with release order, so whoever sees the message sees the bytes. An operation on memory
 * that only its owner can reach (tp_reg) travels as pieces in the same ring, and nothing else is posted on the endpoint
 * until the owner has answered.
 */
#include "shm_data.h"

#include <errno.h>

#include "clock.h"
#include "err.h"

#define LIKELY(x)   __builtin_expect(!!(x), 1)
#define UNLIKELY(x) __builtin_expect(!!(x), 0)
#define COLD        __attribute__((cold, noinline))

#define POLLS_PER_TICK 256u
#define PIECE          SHM_MSG_MAX

static COLD void publish_fenced(void)
{
        _Atomic uint32_t word = 0;

        atomic_fetch_add(&word, 1); /* a locked instruction is a full barrier, also where fences are not instrumented */
}

/* The store of `seq` makes the slot the receiver's. What stands between it and the load of `armed` is the compiler's
 * barrier only: the sleeper's membarrier is the processor's. */
static inline void publish(struct shm_ep *e, struct shm_slot *slot)
{
        e->tx_bytes_end[e->tx_next % SHM_SLOTS] = e->bytes_next;
        e->tx_next++;
        slot->acked = (uint16_t)e->rx_head;
        atomic_store_explicit(&slot->seq, (uint32_t)e->tx_next, memory_order_release);
        if (UNLIKELY(e->fenced))
                publish_fenced();
        __asm__ volatile("" ::: "memory");
        if (UNLIKELY(atomic_load_explicit(&e->peer->armed, memory_order_relaxed) != 0))
                shm_wake(e);
}

/* With nothing on its way the byte area starts over: a few lines used again and again stay in the caches of both
 * sides. While anything is held it does not, for then only what lies before the oldest would be left to use. */
static inline void advance_head(struct shm_ep *e, uint64_t head)
{
        e->tx_head = head;
        if (head == e->tx_next)
                e->bytes_head = e->bytes_next = 0;
        else
                e->bytes_head = e->tx_bytes_end[(head - 1) % SHM_SLOTS];
}

/* Learns from the peer's head what has come free. False: the head is a lie. */
static bool reclaim(struct shm_ep *e)
{
        uint64_t head = atomic_load_explicit(&e->peer->head, memory_order_acquire);

        if (UNLIKELY(head - e->tx_head > e->tx_next - e->tx_head)) {
                shm_kill(e, -EPROTO, "the peer says that it released more messages than were sent");
                return false;
        }
        if (head != e->tx_head)
                advance_head(e, head);
        return true;
}

/* Bytes of the area that a message of len takes: whole lines, and never a multiple of 4096, because loads that follow
 * stores at the same place of another page are taken for the same address by the processor and wait. */
static inline uint32_t span_of(size_t len)
{
        uint32_t span = (uint32_t)ALIGN_UP(len, (size_t)CACHE_LINE);

        return span % 4096 ? span : span + CACHE_LINE;
}

/* Where a span would lie, as a running total: at the end of the area it starts over at the beginning. */
static inline uint64_t span_start(const struct shm_ep *e, uint32_t span)
{
        uint32_t at = (uint32_t)(e->bytes_next % SHM_BYTES);

        return at + span <= SHM_BYTES ? e->bytes_next : e->bytes_next + (SHM_BYTES - at);
}

static inline bool has_room(const struct shm_ep *e, uint32_t span)
{
        return e->tx_next - e->tx_head < SHM_SLOTS &&
               (span == 0 || span_start(e, span) + span - e->bytes_head <= SHM_BYTES);
}

/* The next free slot, or NULL: full. */
static inline struct shm_slot *next_slot(struct shm_ep *e, uint32_t span)
{
        if (UNLIKELY(!has_room(e, span))) {
                if (!reclaim(e) || !has_room(e, span)) {
                        e->starved = true;
                        e->base.n.eagain++;
                        return NULL;
                }
        }
        return &e->tx_slots[e->tx_next % SHM_SLOTS];
}

/* The second line first: the receiver spins on the first one, and would take it from us between two stores. */
static inline void put_inline(struct shm_slot *slot, const void *buf, size_t len)
{
        const size_t first = CACHE_LINE - offsetof(struct shm_slot, data);

        if (len > first) {
                memcpy(slot->data + first, (const char *)buf + first, len - first);
                len = first;
        }
        __asm__ volatile("" ::: "memory");
        if (len > 0)
                memcpy(slot->data, buf, len);
}

static inline void put_bytes(struct shm_ep *e, struct shm_slot *slot, const void *buf, size_t len, uint32_t span)
{
        uint64_t start = span_start(e, span);

        slot->where = (uint32_t)(start % SHM_BYTES);
        memcpy(e->tx_bytes + slot->where, buf, len);
        e->bytes_next = start + span;
}

/* Why nothing can be posted now: an operation that the owner must carry out is on its way, or the end has come. */
static COLD int blocked(struct shm_ep *e)
{
        if (e->slow & (SHM_SLOW_DEAD | SHM_SLOW_KILLED))
                return err_set(-ENOTCONN, "%s: the connection is down", e->base.peer);
        if (e->op.active) {
                e->base.n.eagain++;
                return -EAGAIN;
        }
        return 0;
}

static COLD int too_long(const struct shm_ep *e, size_t len)
{
        return err_set(-EMSGSIZE, "%s: message of %zu bytes, at most %u", e->base.peer, len, SHM_MSG_MAX);
}

int shm_send(struct tp_ep *ep, const void *buf, size_t len, unsigned flags, uint64_t cookie)
{
        struct shm_ep *e = shm_ep_of(ep);
        uint32_t span = len <= SHM_INLINE ? 0 : span_of(len);
        struct shm_slot *slot;
        int rc;

        if (UNLIKELY(len > SHM_MSG_MAX))
                return too_long(e, len);
        if (UNLIKELY(e->slow) && (rc = blocked(e)) < 0)
                return rc;
        slot = next_slot(e, span);
        if (UNLIKELY(!slot))
                return -EAGAIN;
        if (span == 0) {
                put_inline(slot, buf, len);
                slot->kind = SHM_MSG_INLINE;
        } else {
                put_bytes(e, slot, buf, len, span);
                slot->kind = SHM_MSG_BYTES;
        }
        slot->len = (uint32_t)len;
        publish(e, slot);
        ep->n.msgs_tx++;
        ep->n.msg_bytes_tx += len;
        ep->n.header_bytes_tx += offsetof(struct shm_slot, data);
        return TP_COMPLETE;
}

/* ---- receiving ---- */

/* Loans come back in any order; the sender is told of the longest run from the oldest on. */
static inline void give_back(struct shm_ep *e, uint64_t index)
{
        e->held[index % SHM_SLOTS] = false;
        while (e->rx_head < e->rx_next && !e->held[e->rx_head % SHM_SLOTS])
                e->rx_head++;
        atomic_store_explicit(&e->me->head, e->rx_head, memory_order_release);
        if (UNLIKELY(e->fenced))
                publish_fenced();
        __asm__ volatile("" ::: "memory");
        if (UNLIKELY(atomic_load_explicit(&e->peer->armed, memory_order_relaxed) == SHM_ARMED_SPACE))
                shm_wake(e);
}

void shm_release(struct tp_ep *ep, uint64_t loan)
{
        struct shm_ep *e = shm_ep_of(ep);

        BUG_ON(loan >= e->rx_next || loan < e->rx_head || !e->held[loan % SHM_SLOTS]);
        give_back(e, loan);
}

/* The owner's answer to the peer's operation. */
static void reply(struct shm_ep *e, uint64_t tag, int64_t status)
{
        atomic_store_explicit(&e->me->reply_status, status, memory_order_relaxed);
        atomic_store_explicit(&e->me->reply_tag, tag, memory_order_release);
        if (UNLIKELY(e->fenced))
                publish_fenced();
        __asm__ volatile("" ::: "memory");
        if (atomic_load_explicit(&e->peer->armed, memory_order_relaxed) != 0)
                shm_wake(e);
}

/* The region that a copied operation names, or why not; h is our own copy of its header. */
static int find_region(struct shm_ep *e, const struct shm_copy *h, size_t len, const struct mem_region **out)
{
        const struct shm_mem *m = h->region < SHM_REGIONS ? e->mine[h->region] : NULL;

        if (!m || e->mine_epoch[h->region] != h->epoch)
                return -ESTALE;
        if (!m->exported)
                return -EACCES;
        if (h->off < m->open_off || !tpi_inside(h->off, len, m->open_end))
                return -ERANGE;
        *out = &m->base.region;
        return 0;
}

/* A piece of a write to memory of ours; 1 when it ended with an immediate that is to be told. */
static int take_copy_write(struct shm_ep *e, const struct shm_copy *h, const void *bytes, size_t len,
                           struct tp_event *ev)
{
        const struct mem_region *r;
        int rc;

        if (h->tag != e->got_tag) {
                e->got_tag = h->tag;
                e->got_bytes = 0;
                e->got_status = 0;
        }
        rc = e->got_status < 0 ? (int)e->got_status : find_region(e, h, len, &r);
        if (rc == 0)
                rc = tpi_region_put(r, h->off, bytes, len);
        if (rc == 0) {
                e->got_bytes += len;
                e->base.n.bulk_bytes_rx += len;
                e->base.n.bytes_copied += len;
        }
        e->got_status = rc;
        if (!(h->flags & SHM_COPY_LAST))
                return 0;
        reply(e, h->tag, rc);
        if (rc < 0 || !(h->flags & SHM_COPY_IMM))
                return 0;
        *ev = (struct tp_event){.kind = TP_EV_IMM, .ep = &e->base, .len = e->got_bytes, .imm = h->imm};
        return 1;
}

static void take_copy_read(struct shm_ep *e, const struct shm_copy *h, size_t len)
{
        const struct mem_region *r;
        int rc = len <= SHM_BOUNCE ? find_region(e, h, len, &r) : -ERANGE;

        if (rc == 0)
                rc = tpi_region_get(r, h->off, e->seg->bounce[e->side], len);
        reply(e, h->tag, rc);
}

/* One slot that is neither a message nor an immediate: 1 with an event, 0 without. Everything in it was copied first. */
static COLD int take_rare(struct shm_ep *e, const struct shm_slot *slot, uint32_t kind, uint32_t len, uint32_t where,
                          struct tp_event *ev)
{
        uint64_t index = e->rx_next++;
        struct shm_copy h;
        int n = 0;

        memcpy(&h, slot->data, sizeof(h));
        if (kind == SHM_COPY_READ) {
                take_copy_read(e, &h, len);
        } else if (kind == SHM_COPY_WRITE && len <= SHM_MSG_MAX && tpi_inside(where, len, SHM_BYTES)) {
                n = take_copy_write(e, &h, e->rx_bytes + where, len, ev);
        } else {
                shm_kill(e, -EPROTO, "message of kind %u, length %u, offset %u in the shared segment", kind, len,
                         where);
                return 0;
        }
        give_back(e, index);
        return n;
}

/* What the peer says in passing about our messages; only a hint, so one that cannot be true is ignored. */
static inline void take_acked(struct shm_ep *e, uint16_t acked)
{
        uint16_t n = (uint16_t)(acked - (uint16_t)e->tx_head);

        if (n != 0 && n <= e->tx_next - e->tx_head)
                advance_head(e, e->tx_head + n);
}

static inline void lend(struct shm_ep *e, const unsigned char *data, uint32_t len, struct tp_event *ev)
{
        e->held[e->rx_next % SHM_SLOTS] = true;
        *ev = (struct tp_event){.kind = TP_EV_MSG, .ep = &e->base, .data = data, .len = len, .cookie = e->rx_next};
        e->rx_next++;
        e->base.n.msgs_rx++;
        e->base.n.msg_bytes_rx += len;
        e->base.n.header_bytes_rx += offsetof(struct shm_slot, data);
}

static inline void take_imm(struct shm_ep *e, const struct shm_slot *slot, uint32_t imm, struct tp_event *ev)
{
        uint64_t len;

        memcpy(&len, slot->data, sizeof(len));
        *ev = (struct tp_event){.kind = TP_EV_IMM, .ep = &e->base, .len = len, .imm = imm};
        e->base.n.header_bytes_rx += offsetof(struct shm_slot, data);
        e->rx_next++;
        give_back(e, e->rx_next - 1);
}

/* One slot that the peer has published. */
static inline int take(struct shm_ep *e, struct shm_slot *slot, struct tp_event *ev)
{
        uint32_t kind = *(volatile uint16_t *)&slot->kind;
        uint32_t len = *(volatile uint32_t *)&slot->len;
        uint32_t where = *(volatile uint32_t *)&slot->where;

        if (UNLIKELY(e->rx_next - e->rx_head >= SHM_SLOTS)) {
                shm_kill(e, -EPROTO, "a message was put over one that is not released yet");
                return 0;
        }
        take_acked(e, *(volatile uint16_t *)&slot->acked);
        if (LIKELY(kind == SHM_MSG_INLINE && len <= SHM_INLINE)) {
                lend(e, slot->data, len, ev);
                return 1;
        }
        if (kind == SHM_MSG_BYTES && len <= SHM_MSG_MAX && tpi_inside(where, len, SHM_BYTES)) {
                lend(e, e->rx_bytes + where, len, ev);
                return 1;
        }
        if (kind == SHM_IMM) {
                take_imm(e, slot, where, ev);
                return 1;
        }
        return take_rare(e, slot, kind, len, where, ev);
}

static inline bool slot_is_ours(struct shm_ep *e, struct shm_slot **slot)
{
        *slot = &e->rx_slots[e->rx_next % SHM_SLOTS];
        return atomic_load_explicit(&(*slot)->seq, memory_order_acquire) == (uint32_t)(e->rx_next + 1);
}

/* At most one ring's worth per call, so that no peer can keep us here. */
static inline int poll_ring(struct shm_ep *e, struct tp_event *ev, int max)
{
        struct shm_slot *slot;
        int n = 0;

        for (unsigned i = 0; i < SHM_SLOTS && n < max && slot_is_ours(e, &slot); i++) {
                n += take(e, slot, &ev[n]);
                if (UNLIKELY(e->slow & SHM_SLOW_KILLED))
                        break;
        }
        return n;
}

/* ---- operations on memory that only its owner can reach ---- */

static bool post_piece(struct shm_ep *e, uint32_t kind, const void *bytes, size_t len, uint32_t flags)
{
        const struct shm_op *op = &e->op;
        struct shm_copy h = {.tag = op->tag,
                             .epoch = op->rmem->epoch,
                             .off = op->rmem->off + op->roff + op->done,
                             .region = op->rmem->region,
                             .flags = flags,
                             .imm = op->imm};
        uint32_t span = bytes && len > 0 ? span_of(len) : 0;
        struct shm_slot *slot = next_slot(e, span);

        if (!slot)
                return false;
        if (span > 0)
                put_bytes(e, slot, bytes, len, span);
        else
                slot->where = 0;
        memcpy(slot->data, &h, sizeof(h));
        slot->kind = (uint16_t)kind;
        slot->len = (uint32_t)len;
        publish(e, slot);
        e->base.n.header_bytes_tx += offsetof(struct shm_slot, data) + sizeof(h);
        return true;
}

static void push_write(struct shm_ep *e)
{
        struct shm_op *op = &e->op;

        while (!op->waiting) {
                size_t len = op->len - op->done < PIECE ? op->len - op->done : PIECE;
                bool last = op->done + len == op->len;
                uint32_t flags = (last ? SHM_COPY_LAST : 0) | (op->has_imm ? SHM_COPY_IMM : 0);

                if (!post_piece(e, SHM_COPY_WRITE, op->local + op->done, len, flags))
                        return;
                op->done += len;
                op->waiting = last;
        }
}

static void push_read(struct shm_ep *e)
{
        struct shm_op *op = &e->op;

        if (op->waiting)
                return;
        op->piece = op->len - op->done < SHM_BOUNCE ? op->len - op->done : SHM_BOUNCE;
        op->tag = ++e->next_tag; /* each piece is answered by itself */
        op->waiting = post_piece(e, SHM_COPY_READ, NULL, op->piece, 0);
}

static void finish(struct shm_op *op, int status)
{
        op->finished = true;
        op->status = status;
}

/* The status is the peer's word: anything but an errno becomes -EPROTO. */
static void take_reply(struct shm_ep *e)
{
        struct shm_op *op = &e->op;
        int64_t status;

        if (!op->waiting || atomic_load_explicit(&e->peer->reply_tag, memory_order_acquire) != op->tag)
                return;
        status = atomic_load_explicit(&e->peer->reply_status, memory_order_relaxed);
        op->waiting = false;
        if (status != 0) {
                finish(op, status < 0 && status > -4096 ? (int)status : -EPROTO);
                return;
        }
        if (op->is_read) {
                memcpy(op->local + op->done, e->seg->bounce[!e->side], op->piece);
                op->done += op->piece;
                e->base.n.bytes_copied += op->piece;
                e->base.n.bulk_bytes_rx += op->piece;
        }
        if (op->done == op->len)
                finish(op, 0);
}

static void advance_op(struct shm_ep *e)
{
        take_reply(e);
        if (e->op.finished)
                return;
        if (e->op.is_read)
                push_read(e);
        else
                push_write(e);
}

static void end_op(struct shm_ep *e, struct tp_event *ev)
{
        *ev = (struct tp_event){.kind = TP_EV_DONE, .ep = &e->base, .status = e->op.status, .cookie = e->op.cookie};
        e->op.active = false;
        e->slow &= ~SHM_SLOW_OP;
}

static COLD int start_op(struct shm_ep *e, struct shm_op op)
{
        op.active = true;
        op.tag = ++e->next_tag;
        e->op = op;
        e->slow |= SHM_SLOW_OP;
        e->base.n.bulk_ops++;
        if (!op.is_read)
                e->base.n.bulk_bytes_tx += op.len;
        advance_op(e);
        return TP_POSTED;
}

static int down(struct shm_ep *e, struct tp_event *ev)
{
        int status = e->slow & SHM_SLOW_KILLED ? e->kill_status : -ECONNRESET;

        e->slow |= SHM_SLOW_DEAD;
        *ev = (struct tp_event){.kind = TP_EV_DOWN, .ep = &e->base, .status = status};
        err_set(status, "%s: %s", e->base.peer,
                e->slow & SHM_SLOW_KILLED ? e->why : "the peer closed the connection or died");
        return 1;
}

/* The end: what is outstanding fails first. */
static int poll_end(struct shm_ep *e, struct tp_event *ev, int max)
{
        int n = 0;

        if (max > 0 && e->op.active) {
                if (!e->op.finished)
                        finish(&e->op, -ECONNRESET);
                end_op(e, &ev[n++]);
        }
        return n < max ? n + down(e, &ev[n]) : n;
}

static COLD int poll_slow(struct shm_ep *e, struct tp_event *ev, int max)
{
        unsigned hup = e->slow & SHM_SLOW_HUP; /* before the ring: what was sent before the end is still delivered */
        int n = 0;

        if (e->slow & SHM_SLOW_DEAD)
                return 0;
        if (!(e->slow & SHM_SLOW_KILLED))
                n = poll_ring(e, ev, max);
        if (e->op.active && !(e->slow & SHM_SLOW_KILLED))
                advance_op(e);
        if (e->op.active && e->op.finished && n < max)
                end_op(e, &ev[n++]);
        if ((e->slow & SHM_SLOW_KILLED) || (hup && n == 0))
                n += poll_end(e, ev + n, max - n);
        return n;
}

/* Of the slot that is waited for: its two lines then come from the other processor at the same time and not one after the
 * other, which is up to a fifth of a small message's time. For one endpoint only: of many it would empty the cache. */
static inline void fetch_second_line(const struct shm_ep *e)
{
        __builtin_prefetch((const char *)&e->rx_slots[e->rx_next % SHM_SLOTS] + CACHE_LINE);
}

int shm_poll(struct tp_ctx *ctx, struct tp_event *ev, int max)
{
        struct shm_ctx *c = shm_ctx_of(ctx);
        unsigned n_eps = c->n_eps, at = c->first;
        int n = 0;

        if (UNLIKELY(++c->polls % POLLS_PER_TICK == 0 || c->attention))
                shm_tick(c);
        for (unsigned i = 0; i < n_eps && n < max; i++) {
                struct shm_ep *e;

                at = at < n_eps ? at : 0;
                e = c->eps[at++];
                n += LIKELY(e->slow == 0) ? poll_ring(e, ev + n, max - n) : poll_slow(e, ev + n, max - n);
        }
        c->first = at; /* nobody is always last when max is small */
        if (n > 0) {
                if (UNLIKELY(c->armed))
                        shm_disarm(ctx);
        } else if (n_eps == 1) {
                fetch_second_line(c->eps[0]);
                cpu_relax(); /* fewer looks at the slot leave its line to the side that wants to fill it */
        }
        return n;
}

bool shm_ep_has_news(struct shm_ep *e)
{
        struct shm_slot *slot;

        if (e->slow & SHM_SLOW_DEAD)
                return false;
        if (slot_is_ours(e, &slot) || (e->slow & (SHM_SLOW_HUP | SHM_SLOW_KILLED)))
                return true;
        if (e->op.active &&
            (e->op.finished ||
             (e->op.waiting && atomic_load_explicit(&e->peer->reply_tag, memory_order_acquire) == e->op.tag)))
                return true;
        if (!e->starved || atomic_load_explicit(&e->peer->head, memory_order_acquire) == e->tx_head)
                return false;
        e->starved = false; /* told once: whoever still wants to post will be refused again, or not */
        return true;
}

/* ---- one-sided ---- */

static COLD int refuse_range(const struct shm_ep *e, size_t len, uint64_t roff, const struct tp_rmem *rmem)
{
        return err_set(-ERANGE, "%s: bulk of %zu bytes at %llu does not fit the key's %llu bytes, or its own memory",
                       e->base.peer, len, (unsigned long long)roff, (unsigned long long)rmem->len);
}

static COLD int refuse_stale(const struct shm_ep *e)
{
        return err_set(-ESTALE, "%s: the peer has freed the memory of this key", e->base.peer);
}

/* 0, or why not. The peer's epoch word ends a key the moment the owner frees; memory that is written in spite of that,
 * because the two crossed, belongs to nobody any more: regions are never used twice. */
static inline int bulk_check(struct shm_ep *e, const struct tp_mem *mem, const void *p, size_t len,
                             const struct shm_rmem *rm, uint64_t roff)
{
        int rc;

        if (UNLIKELY(!tpi_inside(roff, len, rm->base.len) || !tpi_in_mem(mem, p, len)))
                return refuse_range(e, len, roff, &rm->base);
        if (UNLIKELY(e->slow) && (rc = blocked(e)) < 0)
                return rc;
        if (UNLIKELY(atomic_load_explicit(&e->peer->epoch[rm->region], memory_order_relaxed) != rm->epoch))
                return refuse_stale(e);
        return 0;
}

int shm_write(struct tp_ep *ep, struct tp_mem *mem, const void *src, size_t len, struct tp_rmem *rmem, uint64_t roff,
              unsigned flags, uint64_t cookie)
{
        struct shm_rmem *rm = container_of(rmem, struct shm_rmem, base);
        struct shm_ep *e = shm_ep_of(ep);
        int rc = bulk_check(e, mem, src, len, rm, roff);

        if (UNLIKELY(rc < 0))
                return rc;
        if (UNLIKELY(!rm->addr))
                return start_op(e, (struct shm_op){.rmem = rm,
                                                   .local = (unsigned char *)(uintptr_t)src,
                                                   .roff = roff,
                                                   .len = len,
                                                   .cookie = cookie});
        if (len > 0)
                memcpy(rm->addr + roff, src, len);
        ep->n.bulk_ops++;
        ep->n.bulk_bytes_tx += len;
        return TP_COMPLETE;
}

int shm_write_imm(struct tp_ep *ep, struct tp_mem *mem, const void *src, size_t len, struct tp_rmem *rmem,
                  uint64_t roff, uint32_t imm, unsigned flags, uint64_t cookie)
{
        struct shm_rmem *rm = container_of(rmem, struct shm_rmem, base);
        struct shm_ep *e = shm_ep_of(ep);
        struct shm_slot *slot;
        uint64_t told = len;
        int rc = bulk_check(e, mem, src, len, rm, roff);

        if (UNLIKELY(rc < 0))
                return rc;
        if (UNLIKELY(!rm->addr))
                return start_op(e, (struct shm_op){.rmem = rm,
                                                   .local = (unsigned char *)(uintptr_t)src,
                                                   .roff = roff,
                                                   .len = len,
                                                   .has_imm = true,
                                                   .imm = imm,
                                                   .cookie = cookie});
        slot = next_slot(e, 0);
        if (UNLIKELY(!slot))
                return -EAGAIN;
        if (len > 0)
                memcpy(rm->addr + roff, src, len);
        memcpy(slot->data, &told, sizeof(told));
        slot->kind = SHM_IMM;
        slot->len = 0;
        slot->where = imm;
        publish(e, slot);
        ep->n.bulk_ops++;
        ep->n.bulk_bytes_tx += len;
        ep->n.header_bytes_tx += offsetof(struct shm_slot, data);
        return TP_COMPLETE;
}

int shm_read(struct tp_ep *ep, struct tp_mem *mem, void *dst, size_t len, struct tp_rmem *rmem, uint64_t roff,
             unsigned flags, uint64_t cookie)
{
        struct shm_rmem *rm = container_of(rmem, struct shm_rmem, base);
        struct shm_ep *e = shm_ep_of(ep);
        int rc = bulk_check(e, mem, dst, len, rm, roff);

        if (UNLIKELY(rc < 0))
                return rc;
        if (UNLIKELY(!rm->addr))
                return start_op(
                    e, (struct shm_op){
                           .is_read = true, .rmem = rm, .local = dst, .roff = roff, .len = len, .cookie = cookie});
        if (len > 0)
                memcpy(dst, rm->addr + roff, len);
        ep->n.bulk_ops++;
        ep->n.bulk_bytes_rx += len;
        return TP_COMPLETE;
}

/* What the owner already has of a write stays written; an answer that still comes carries an old tag and is ignored. */
int shm_cancel(struct tp_ep *ep, uint64_t cookie)
{
        struct shm_ep *e = shm_ep_of(ep);

        if (!e->op.active || e->op.cookie != cookie)
                return err_set(-ENOENT, "%s: no such operation is outstanding", ep->peer);
        if (!e->op.finished)
                finish(&e->op, -ECANCELED);
        return 0;
}
