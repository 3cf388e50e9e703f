/* perf: the stream (perf_flow.h). */
#include "perf_flow.h"

#define BURST      32u              /* rate: messages in one go at most */
#define NAP_NS     (20 * NS_PER_MS) /* between two looks for a signal or a deadline */
#define IDLE_SLEPT 1025u            /* polls that perf_idle_look takes for a long time */

static int stream_post(struct perf_conn *c, const struct perf_case *k)
{
        uint64_t busy = by_completion(k) ? c->outstanding : c->sent - c->confirmed;
        uint64_t room = busy < k->window ? k->window - busy : 0, left = k->n - c->sent;
        bool more = k->test == PERF_RATE;

        room = room < left ? room : left;
        for (uint64_t i = 0; i < room; i++) {
                int rc = put(c, k, more && i + 1 < room && (i + 1) % BURST ? TP_MORE : 0);

                if (rc <= 0)
                        return rc;
        }
        if (by_completion(k) && c->sent < k->n && c->outstanding < k->window)
                c->w->stuck = 1; /* complete at once: nothing will come to go on with */
        return 1;
}

static void stream_look(struct perf_conn *c, const struct perf_case *k, bool sends, bool receives)
{
        if (sends && c->sent == k->n && !c->outstanding && !c->local_ns)
                c->local_ns = clock_ns();
        if (c->finished || c->outstanding || (sends && c->confirmed < k->n) || (receives && c->told < k->n))
                return;
        c->finished = true;
        c->w->unfinished--;
}

static int stream_push(struct perf_conn *c, const struct perf_case *k, bool sends, bool receives)
{
        int rc = 1;

        if (c->confirm_due && (rc = post_note(c, NOTE_CONFIRM, c->received, 0)) > 0) {
                c->confirm_due = false;
                c->told = c->received;
        }
        if (rc > 0 && sends && c->may_send)
                rc = stream_post(c, k);
        if (rc > 0 && c->sent == k->n && c->end_due && (k->op != PERF_READ || !c->outstanding)) {
                rc = post_note(c, NOTE_END, k->n, 0);
                c->end_due = rc == 0;
        }
        if (rc == 0)
                c->w->stuck = 1;
        stream_look(c, k, sends, receives);
        return rc < 0 ? rc : 0;
}

static int stream_note(struct perf_conn *c, const struct perf_case *k, const struct tp_event *ev,
                       const struct perf_note *n)
{
        switch (n->kind) {
        case NOTE_CONFIRM:
                if (n->value > c->sent || n->value < c->confirmed)
                        return unexpected(c->w, ev);
                c->confirmed = n->value;
                return 0;
        case NOTE_END:
                if (n->value != k->n || c->end_seen || !by_completion(k))
                        return unexpected(c->w, ev);
                c->end_seen = c->confirm_due = true;
                c->received = n->value;
                c->w->seen += n->value;
                return 0;
        case NOTE_START:
                return 0;
        default:
                return unexpected(c->w, ev);
        }
}

static int stream_data(struct perf_conn *c, const struct perf_case *k, const struct tp_event *ev,
                       const struct perf_note *n)
{
        uint64_t step = k->window > 1 ? k->window / 2 : 1;
        const void *data;
        int rc = take_data(c, k, ev, n, &data);

        if (rc)
                return rc;
        if (unlikely(k->verify))
                check_last(c, k, data);
        else if (k->op == PERF_SEND)
                look(k, ev, data);
        if (c->received - c->told >= step || c->received == k->n) {
                c->confirm_due = true;
                touch(c);
        }
        return 0;
}

static int stream_done(struct perf_conn *c, const struct perf_case *k, const struct tp_event *ev)
{
        int rc = perf_take(c->w, ev);

        touch(c);
        if (!rc && k->op == PERF_READ && k->verify && ev->cookie < c->sent)
                check_read(c, k, ev->cookie);
        return rc;
}

static int stream_event(struct perf_worker *w, const struct perf_case *k, const struct tp_event *ev)
{
        struct perf_conn *c = ev->ep->user;
        struct perf_note n;
        int rc;

        if (ev->kind == TP_EV_DONE && c)
                return stream_done(c, k, ev);
        if (unlikely(ev->kind == TP_EV_DOWN || ev->kind == TP_EV_DONE || !c))
                return perf_take(w, ev);
        if (ev->kind == TP_EV_MSG && is_note(ev, &n)) {
                touch(c);
                rc = n.kind == NOTE_ARRIVED && announced(k) ? stream_data(c, k, ev, &n) : stream_note(c, k, ev, &n);
        } else if (is_data(c, k, ev)) {
                rc = stream_data(c, k, ev, NULL);
        } else {
                return keep(w, ev);
        }
        if (ev->kind == TP_EV_MSG)
                tp_release(ev->ep, ev->cookie);
        return rc;
}

/* One-sided transfers need nobody at this end. Whoever only waits for the last word leaves the processor to those who
 * have work: an emulated device's, among others. */
static int wait_batch(struct perf_worker *w, struct tp_event *ev)
{
        int n = tp_wait(w->ctx, ev, BATCH, clock_ns() + NAP_NS);

        if (n > 0)
                w->idle = 0;
        if (n != 0)
                return n;
        if (w->idle < IDLE_SLEPT) {
                w->idle = IDLE_SLEPT;
                w->idle_since = clock_ns();
        }
        return perf_idle_look(w);
}

static int stream_turn(struct perf_worker *w, const struct perf_case *k, bool sends, bool receives)
{
        struct tp_event ev[BATCH];
        int n = !sends && by_completion(k) && w->s->attr.one_sided ? wait_batch(w, ev) : poll_batch(w, ev), rc = 0;

        if (n < 0)
                return n;
        if (n && sends && !w->conns[0]->may_send)
                arm(w);
        for (int i = 0; i < n && !rc; i++)
                rc = stream_event(w, k, &ev[i]);
        touch_stuck(w);
        for (unsigned i = 0; i < w->n_touched && !rc; i++) {
                w->touch[i]->touched = false;
                rc = stream_push(w->touch[i], k, sends, receives);
        }
        w->n_touched = 0;
        return rc;
}

int perf_flow_stream(struct perf_worker *w, const struct perf_case *k)
{
        bool sends = w->s->driver || k->bidir, receives = !w->s->driver || k->bidir;
        int rc = 0;

        for (unsigned i = 0; i < w->n_conns; i++)
                w->conns[i]->end_due = sends && by_completion(k);
        while (w->s->driver && k->bidir && (rc = post_note(w->conns[0], NOTE_START, 0, 0)) == 0)
                if ((rc = stream_turn(w, k, false, receives)) < 0)
                        return rc;
        if (w->s->driver)
                arm(w);
        rc = rc < 0 ? rc : 0;
        while (w->unfinished && !rc) {
                rc = stream_turn(w, k, sends, receives);
                if (unlikely(perf_stopped) && !rc)
                        rc = err_set(-EINTR, "%s: ended by a signal", w->s->phase);
        }
        return rc;
}
