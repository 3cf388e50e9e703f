/*
 * perf: the loops that are measured, and what they share: all of it inline, because it is measured. One case on one
 * thread, whatever the number of its connections.
 *
 *   exchange  one transfer there, one back. A write is announced by a message in the same go (that is how writes are
 *             used); a read is one operation, whole. Closed loop: the next one goes out when the last one came back, and
 *             the clock is read once for both. Open loop: requests go out at their intended times as far as the depth
 *             lets them, and are measured from those times.
 *   stream    transfers in a window; the clock stops when the receiver has confirmed the last one. Messages, and writes
 *             that are looked at one by one, are confirmed every half window; other writes and reads are held to the
 *             window by their completions and confirmed once, by a message that cannot overtake them.
 *
 * What the ends tell one another on the way are notes, messages of a length and with a first word that no data has.
 */
#ifndef DJINN_TOOLS_PERF_FLOW_H
#define DJINN_TOOLS_PERF_FLOW_H

#include <errno.h>
#include <string.h>

#include "check.h"
#include "clock.h"
#include "err.h"
#include "perf_inside.h"

#define BATCH      64 /* events taken in one go */
#define NOTE_MAGIC 0x45544f4e46524550ull

#define likely(x)   __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

enum note_kind { NOTE_CONFIRM = 1, NOTE_ARRIVED, NOTE_END, NOTE_START };

/* ---- posting ---- */

static inline uint64_t slot_at(const struct perf_worker *w, const struct perf_case *k, uint64_t seq)
{
        uint64_t slot = seq % k->slots;

        return (k->octaves ? w->order[slot] : slot) * k->stride;
}

/* What became of a post: 1 it is done or on its way, 0 try again, -errno. */
static inline int posted(struct perf_conn *c, int rc)
{
        if (rc == TP_POSTED)
                c->outstanding++;
        return rc >= 0 ? 1 : rc == -EAGAIN ? 0 : rc;
}

static inline int post_note(struct perf_conn *c, enum note_kind kind, uint64_t value, unsigned flags)
{
        struct perf_note *n = &c->notes[c->note_at % c->w->s->notes_n];
        int rc;

        if (unlikely(c->outstanding + 1 >= c->w->s->notes_n))
                return 0;
        *n = (struct perf_note){NOTE_MAGIC, kind, value, 0};
        rc = posted(c, tp_send(c->ep, n, sizeof(*n), flags, PERF_NO_COOKIE));
        c->note_at += rc > 0;
        return rc;
}

/* A write that the other end has to be told of. */
static inline bool announced(const struct perf_case *k)
{
        return k->op == PERF_WRITE && (k->shape != PERF_STREAM || k->verify);
}

static inline int put_write(struct perf_conn *c, const struct perf_case *k, uint64_t at, uint64_t size, unsigned flags)
{
        bool tell = announced(k);
        int rc;

        if (!c->note_due) {
                rc = posted(
                    c, tp_write(c->ep, c->tx_mem, c->tx + at, size, c->remote, at, tell ? TP_MORE : flags, c->sent));
                if (rc <= 0 || !tell)
                        return rc;
                c->note_due = true;
        }
        rc = post_note(c, NOTE_ARRIVED, c->sent, flags);
        c->note_due = rc == 0;
        return rc;
}

/* What was read: the slot says what it must be. */
static inline void check_read(struct perf_conn *c, const struct perf_case *k, uint64_t seq)
{
        uint64_t at = slot_at(c->w, k, seq), size = perf_size_at(k, c->index, seq);

        c->w->checked += size;
        c->w->wrong += !perf_holds(c->tx + at, size, perf_stream(k, c->index, !c->w->s->driver, at));
}

static inline int put_read(struct perf_conn *c, const struct perf_case *k, uint64_t at, uint64_t size, unsigned flags)
{
        int rc;

        if (k->verify && size) /* what was there before must not pass for what is to come */
                memset(c->tx + at, (int)c->sent, size);
        rc = tp_read(c->ep, c->tx_mem, c->tx + at, size, c->remote, at, flags, c->sent);
        if (rc == TP_COMPLETE && k->verify)
                check_read(c, k, c->sent);
        return posted(c, rc);
}

static inline void fill_next(struct perf_conn *c, const struct perf_case *k)
{
        perf_fill(c->tx + slot_at(c->w, k, c->sent), perf_size_at(k, c->index, c->sent),
                  perf_stream(k, c->index, c->w->s->driver, c->sent));
        c->filled = c->sent + 1;
}

/* The next message of this connection: 1, 0 when there is no room, -errno. */
static inline int put(struct perf_conn *c, const struct perf_case *k, unsigned flags)
{
        uint64_t at = c->tx_at, size = k->lo;
        int rc;

        if (unlikely(k->octaves)) {
                at = slot_at(c->w, k, c->sent);
                size = perf_size_at(k, c->index, c->sent);
        }
        if (unlikely(k->verify) && c->filled == c->sent && k->op != PERF_READ)
                fill_next(c, k);
        if (likely(k->op == PERF_SEND))
                rc = posted(c, tp_send(c->ep, c->tx + at, size, flags, c->sent));
        else if (k->op == PERF_WRITE)
                rc = put_write(c, k, at, size, flags);
        else if (k->op == PERF_WRITE_IMM)
                rc = posted(c, tp_write_imm(c->ep, c->tx_mem, c->tx + at, size, c->remote, at, (uint32_t)c->sent, flags,
                                            c->sent));
        else
                rc = put_read(c, k, at, size, flags);
        if (likely(rc > 0)) {
                c->sent++;
                c->tx_at += k->stride;
                if (c->tx_at == k->stride * k->slots)
                        c->tx_at = 0;
        }
        return rc;
}

/* ---- arriving ---- */

static inline int unexpected(const struct perf_worker *w, const struct tp_event *ev)
{
        return err_set(-EPROTO, "%s: %s of %zu bytes from %s, which is not what was agreed", w->s->phase,
                       ev->kind == TP_EV_IMM ? "an immediate" : "a message", ev->len, ev->ep->peer);
}

static inline bool is_note(const struct tp_event *ev, struct perf_note *n)
{
        if (ev->len != sizeof(*n))
                return false;
        memcpy(n, ev->data, sizeof(*n));
        return n->magic == NOTE_MAGIC;
}

static inline void check(struct perf_conn *c, const struct perf_case *k, const void *data, uint64_t size, uint64_t seq)
{
        c->w->checked += size;
        c->w->wrong += !perf_holds(data, size, perf_stream(k, c->index, !c->w->s->driver, seq));
}

/* Data of the other end, whichever way: where it lies, and whether it is what was to come. */
static inline int take_data(struct perf_conn *c, const struct perf_case *k, const struct tp_event *ev,
                            const struct perf_note *n, const void **data)
{
        uint64_t seq = c->received, size = unlikely(k->octaves) ? perf_size_at(k, c->index, seq) : k->lo;
        bool right;

        if (likely(k->op == PERF_SEND)) {
                *data = ev->data;
                right = ev->len == size;
        } else {
                *data = c->rx + slot_at(c->w, k, seq);
                right = k->op == PERF_WRITE ? n && n->value == seq : ev->len == size && ev->imm == (uint32_t)seq;
        }
        if (unlikely(!right || seq >= k->n))
                return unexpected(c->w, ev);
        c->received++;
        c->w->seen++;
        return 0;
}

/* A message is there when it has been read. Its length was agreed on and take_data has compared it: to read by the length
 * that came along, so that no read can begin before that, costs 64 B over shm a tenth of their time, and raw does not. */
static inline void look(const struct perf_case *k, const struct tp_event *ev, const void *data)
{
        mem_look(data, unlikely(k->octaves) ? ev->len : k->lo);
}

static inline void check_last(struct perf_conn *c, const struct perf_case *k, const void *data)
{
        uint64_t seq = c->received - 1;

        check(c, k, data, k->octaves ? perf_size_at(k, c->index, seq) : k->lo, seq);
}

static inline bool is_data(const struct perf_conn *c, const struct perf_case *k, const struct tp_event *ev)
{
        if (ev->kind == TP_EV_IMM)
                return k->op == PERF_WRITE_IMM;
        return k->op == PERF_SEND && c->w->receives && c->received < k->n;
}

/* What no case is about: a control message that comes early is kept for whoever waits for it next. */
static inline int keep(struct perf_worker *w, const struct tp_event *ev)
{
        if (ev->kind != TP_EV_MSG || w->queue_n == PERF_QUEUE)
                return unexpected(w, ev);
        w->queue[w->queue_n++] = *ev;
        return 0;
}

static inline void touch(struct perf_conn *c)
{
        if (!c->touched) {
                c->touched = true;
                c->w->touch[c->w->n_touched++] = c;
        }
}

/* Whatever could not be posted is tried again. */
static inline void touch_stuck(struct perf_worker *w)
{
        if (likely(!w->stuck))
                return;
        w->stuck = 0;
        for (unsigned i = 0; i < w->n_conns; i++)
                touch(w->conns[i]);
}

static inline int poll_batch(struct perf_worker *w, struct tp_event *ev)
{
        int n = tp_poll(w->ctx, ev, BATCH);

        if (likely(n > 0)) {
                w->idle = 0;
                return n;
        }
        return n < 0 ? n : perf_idle(w);
}

/* The peer of a case in both directions begins when the driver did: before that, nobody here would take it. */
static inline void arm(struct perf_worker *w)
{
        for (unsigned i = 0; i < w->n_conns; i++) {
                w->conns[i]->may_send = true;
                touch(w->conns[i]);
        }
}

/* ---- the loops ---- */

/* Held to the window by completions; confirmed once. */
static inline bool by_completion(const struct perf_case *k)
{
        return k->op == PERF_READ || (k->op == PERF_WRITE && !k->verify);
}

int perf_flow_stream(struct perf_worker *w, const struct perf_case *k);
int perf_flow_exchange(struct perf_worker *w, const struct perf_case *k);

#endif
