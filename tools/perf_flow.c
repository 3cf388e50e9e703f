/* perf: one case on one thread: what is made ready for it, and what is to be said of it. */
#include "perf_flow.h"

#include <time.h>

uint64_t perf_thread_cpu_ns(void)
{
        struct timespec ts;

        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ts);
        return (uint64_t)ts.tv_sec * NS_PER_S + (uint64_t)ts.tv_nsec;
}

static uint64_t copied(const struct perf_worker *w)
{
        uint64_t n = 0;

        for (unsigned i = 0; i < w->n_conns; i++)
                n += w->conns[i]->ep->n.bytes_copied;
        return n;
}

static void begin_conn(struct perf_conn *c, const struct perf_case *k)
{
        c->sent = c->confirmed = c->received = c->told = c->filled = c->tx_at = c->local_ns = 0;
        c->note_due = c->end_due = c->end_seen = c->confirm_due = c->may_send = c->finished = c->touched = false;
        if (!k->resumes) {
                c->due_ns = 0;
                prng_seed(&c->arrivals, k->seed + c->index);
        }
        if (k->op == PERF_READ && k->verify) /* what the other end will read */
                for (unsigned i = 0; i < k->slots; i++)
                        perf_fill(c->rx + i * k->stride, k->hi,
                                  perf_stream(k, c->index, c->w->s->driver, i * k->stride));
}

static void begin(struct perf_worker *w, const struct perf_case *k)
{
        for (unsigned i = 0; i < w->n_conns; i++)
                begin_conn(w->conns[i], k);
        if (k->octaves)
                perf_slot_order(k, w->order);
        w->unfinished = w->n_conns;
        w->n_touched = w->stuck = 0;
        w->seen = w->wrong = w->checked = 0;
        w->idle = 0;
        w->receives = k->op != PERF_READ && (!w->s->driver || k->bidir || k->shape != PERF_STREAM);
        if (w->s->driver) {
                hist_reset(&w->hist);
                hist_reset(&w->uncorrected);
        }
}

void perf_flow_ready(struct perf_worker *w)
{
        begin(w, &w->s->c);
}

int perf_flow(struct perf_worker *w)
{
        const struct perf_case *k = &w->s->c;
        uint64_t cpu, bytes = copied(w);
        int rc = 0;

        if (w->s->driver)
                begin(w, k);
        cpu = perf_thread_cpu_ns();
        w->begin_ns = clock_ns();
        w->base_ns = k->resumes ? w->base_ns : w->begin_ns;
        rc = k->shape == PERF_STREAM ? perf_flow_stream(w, k) : perf_flow_exchange(w, k);
        w->end_ns = clock_ns();
        w->cpu_ns = perf_thread_cpu_ns() - cpu;
        w->copied = copied(w) - bytes;
        return rc;
}
