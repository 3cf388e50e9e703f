/* perf: the exchange (perf_flow.h), in a closed and in an open loop. */
#include "perf_flow.h"

#include <math.h>

#include "prng.h"

/* What a time is measured with: a closed loop has one stamp for the end of a round and the start of the next; what is
 * compared with intended times, or with another host's clock, is read from the clock. */
static inline uint64_t time_of(const struct perf_case *k)
{
        return unlikely(k->open || k->shape == PERF_STAMPS) ? clock_ns() : clock_stamp();
}

/* The driver's next request, or the peer's next answer. */
static int exchange_post(struct perf_conn *c, const struct perf_case *k)
{
        int rc;

        if (unlikely(k->shape == PERF_STAMPS)) {
                uint64_t now = c->w->s->driver ? c->t0 : clock_ns();

                memcpy(c->tx, &now, sizeof(now));
        }
        rc = put(c, k, 0);
        if (unlikely(rc == 0)) {
                c->w->stuck = 1;
                c->may_send = true;
        }
        return rc < 0 ? rc : 0;
}

static void exchange_look(struct perf_conn *c, const struct perf_case *k)
{
        if (c->finished || c->outstanding || c->sent < k->n || c->confirmed < k->n)
                return;
        c->finished = true;
        c->w->unfinished--;
}

/* Closed loop: an answer came at `now`. The next request goes first; what is to be noted of this one can wait. */
static int answered(struct perf_conn *c, const struct perf_case *k, uint64_t now)
{
        uint64_t took = k->shape == PERF_STAMPS ? 0 : clock_stamp_ns(c->t0, now);
        int rc = 0;

        c->confirmed++;
        if (unlikely(c->sent == k->n || c->outstanding || k->verify || k->op == PERF_READ || k->shape == PERF_STAMPS)) {
                c->may_send = true; /* its slot is not free yet, or needs work that is not part of the time */
                touch(c);
        } else {
                c->t0 = now;
                rc = exchange_post(c, k);
        }
        hist_add(&c->w->hist, took);
        return rc;
}

/* Open loop: request number seq was answered. */
static void answered_late(struct perf_conn *c, const struct perf_case *k, uint64_t seq, uint64_t now)
{
        uint64_t i = seq % k->window;

        hist_add(&c->w->hist, now - c->intended[i]);
        hist_add(&c->w->uncorrected, now - c->actual[i]);
        c->confirmed++;
        touch(c);
}

static void stamp(struct perf_conn *c, const void *data, uint64_t now)
{
        struct perf_stamps *s = &c->w->s->stamps;
        uint64_t i = c->received - 1;

        s->sent[i] = c->t0;
        memcpy(&s->there[i], data, sizeof(uint64_t));
        s->back[i] = now;
}

static int exchange_data(struct perf_conn *c, const struct perf_case *k, const struct tp_event *ev,
                         const struct perf_note *n)
{
        const void *data;
        uint64_t now;
        int rc = take_data(c, k, ev, n, &data);

        if (unlikely(rc))
                return rc;
        if (k->op == PERF_SEND)
                look(k, ev, data);
        now = c->w->s->driver ? time_of(k) : 0;
        if (!c->w->s->driver) {
                c->confirmed++;
                if (unlikely(k->verify || c->outstanding || c->sent + 1 != c->received)) {
                        c->may_send = true;
                        touch(c);
                } else {
                        rc = exchange_post(c, k);
                        if (unlikely(c->received == k->n))
                                touch(c);
                }
        } else if (k->open) {
                answered_late(c, k, c->received - 1, now);
        } else {
                if (unlikely(k->shape == PERF_STAMPS))
                        stamp(c, data, now);
                rc = answered(c, k, now);
        }
        if (unlikely(k->verify))
                check_last(c, k, data);
        return rc;
}

static int exchange_done(struct perf_conn *c, const struct perf_case *k, const struct tp_event *ev)
{
        int rc = perf_take(c->w, ev);
        uint64_t now;

        touch(c);
        if (rc || k->op != PERF_READ || ev->cookie >= c->sent)
                return rc;
        now = time_of(k);
        if (k->verify)
                check_read(c, k, ev->cookie);
        if (!k->open)
                return answered(c, k, now);
        answered_late(c, k, ev->cookie, now);
        return 0;
}

/* The peer of reads does nothing but be there, until it is told that they are over. */
static int reads_over(struct perf_conn *c)
{
        c->w->unfinished -= !c->finished;
        c->finished = true;
        return 0;
}

static int exchange_event(struct perf_worker *w, const struct perf_case *k, const struct tp_event *ev)
{
        struct perf_conn *c = ev->ep->user;
        struct perf_note n;
        int rc;

        if (ev->kind == TP_EV_DONE && c)
                return exchange_done(c, k, ev);
        if (unlikely(ev->kind == TP_EV_DOWN || ev->kind == TP_EV_DONE || !c))
                return perf_take(w, ev);
        if (likely(is_data(c, k, ev)))
                rc = exchange_data(c, k, ev, NULL);
        else if (ev->kind == TP_EV_MSG && announced(k) && is_note(ev, &n) && n.kind == NOTE_ARRIVED)
                rc = exchange_data(c, k, ev, &n);
        else if (!w->s->driver && k->op == PERF_READ && ev->kind == TP_EV_MSG && is_note(ev, &n) && n.kind == NOTE_END)
                rc = reads_over(c);
        else
                return keep(w, ev);
        if (likely(ev->kind == TP_EV_MSG))
                tp_release(ev->ep, ev->cookie);
        return rc;
}

/* Closed loop: requests for which something had to happen first, outside of their time. */
static int request(struct perf_conn *c, const struct perf_case *k)
{
        int rc = 0;

        for (int i = 0; i < BATCH && !rc && c->may_send && !c->outstanding && c->sent < k->n; i++) {
                uint64_t sent = c->sent;

                c->may_send = false;
                if (k->verify && k->op != PERF_READ && c->filled == c->sent)
                        fill_next(c, k);
                c->t0 = time_of(k);
                rc = exchange_post(c, k);
                if (!rc && k->op == PERF_READ && c->sent > sent && !c->outstanding) { /* complete at once: no event */
                        hist_add(&c->w->hist, clock_stamp_ns(c->t0, time_of(k)));
                        c->confirmed++;
                        c->may_send = true;
                        c->w->stuck = 1;
                }
        }
        return rc;
}

static int exchange_push(struct perf_conn *c, const struct perf_case *k)
{
        int rc = 0;

        if (c->w->s->driver && !k->open)
                rc = request(c, k);
        while (!c->w->s->driver && !rc && c->sent < c->received && (!c->outstanding || k->slots > 1)) {
                uint64_t sent = c->sent;

                rc = exchange_post(c, k);
                if (c->sent == sent)
                        break;
        }
        exchange_look(c, k);
        return rc;
}

static int exchange_turn(struct perf_worker *w, const struct perf_case *k)
{
        struct tp_event ev[BATCH];
        int n = poll_batch(w, ev), rc = 0;

        if (n < 0)
                return n;
        for (int i = 0; i < n && !rc; i++)
                rc = exchange_event(w, k, &ev[i]);
        if (likely(!w->n_touched && !w->stuck))
                return rc;
        touch_stuck(w);
        for (unsigned i = 0; i < w->n_touched && !rc; i++) {
                w->touch[i]->touched = false;
                rc = exchange_push(w->touch[i], k);
        }
        w->n_touched = 0;
        return rc;
}

/* ---- open loop ---- */

static void next_arrival(struct perf_conn *c, const struct perf_case *k)
{
        c->due_ns += k->arrivals == PERF_CONSTANT ? k->gap_ns : -log(1 - prng_unit(&c->arrivals)) * k->gap_ns;
}

/* What is due goes out, as far as the depth lets it; what has to wait is charged for that. */
static int send_due(struct perf_conn *c, const struct perf_case *k, uint64_t now)
{
        while (c->sent < k->n && c->sent - c->confirmed < k->window && c->w->base_ns + (uint64_t)c->due_ns <= now) {
                uint64_t seq = c->sent, at = seq % k->window;
                int rc;

                c->intended[at] = c->w->base_ns + (uint64_t)c->due_ns;
                c->actual[at] = now;
                rc = put(c, k, 0);
                if (rc <= 0)
                        return rc;
                next_arrival(c, k);
                if (k->op == PERF_READ && !c->outstanding)
                        answered_late(c, k, seq, clock_ns());
        }
        return 0;
}

static int send_all_due(struct perf_worker *w, const struct perf_case *k)
{
        uint64_t now = clock_ns();
        bool busy = false;
        int rc = 0;

        for (unsigned i = 0; i < w->n_conns && !rc; i++) {
                rc = send_due(w->conns[i], k, now);
                busy |= w->conns[i]->sent > w->conns[i]->confirmed || w->conns[i]->outstanding;
        }
        if (!busy)
                w->idle = 0; /* nothing is on its way, so nothing needs to come */
        return rc;
}

static int tell_over(struct perf_worker *w, const struct perf_case *k)
{
        for (unsigned i = 0; i < w->n_conns; i++) {
                int rc, turn = 0;

                while ((rc = post_note(w->conns[i], NOTE_END, k->n, 0)) == 0 && turn == 0)
                        turn = exchange_turn(w, k);
                if (rc < 0 || turn < 0)
                        return rc < 0 ? rc : turn;
        }
        return 0;
}

int perf_flow_exchange(struct perf_worker *w, const struct perf_case *k)
{
        bool open = w->s->driver && k->open;
        int rc = 0;

        if (w->s->driver)
                arm(w);
        while (w->unfinished && !rc) {
                rc = open ? send_all_due(w, k) : 0;
                rc = rc ? rc : exchange_turn(w, k);
                if (unlikely(perf_stopped) && !rc)
                        rc = err_set(-EINTR, "%s: ended by a signal", w->s->phase);
        }
        return rc || !w->s->driver || k->op != PERF_READ ? rc : tell_over(w, k);
}
