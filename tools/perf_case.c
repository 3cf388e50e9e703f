/* perf: a case, as the driver orders it and as the peer serves it. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "err.h"
#include "perf_inside.h"

enum { CASE_VERIFY = 1u << 8, CASE_BIDIR = 1u << 9, CASE_OPEN = 1u << 10 };

/* ---- the driver ---- */

void perf_case_encode(const struct perf_case *k, struct perf_ctl *m)
{
        memset(m, 0, sizeof(*m));
        m->kind = PERF_CASE;
        m->f[PF_TEST] = k->test;
        m->f[PF_OP] = k->op;
        m->f[PF_SIZE_LO] = k->lo;
        m->f[PF_SIZE_HI] = k->hi;
        m->f[PF_OCTAVES] = k->octaves;
        m->f[PF_N] = k->n;
        m->f[PF_WINDOW] = k->window;
        m->f[PF_SLOTS] = k->slots;
        m->f[PF_SEED] = k->seed;
        m->f[PF_SHAPE] =
            k->shape | (k->verify ? CASE_VERIFY : 0u) | (k->bidir ? CASE_BIDIR : 0u) | (k->open ? CASE_OPEN : 0u);
}

static uint64_t case_bytes(const struct perf_session *s, const struct perf_case *k)
{
        uint64_t bytes = 0;

        if (!k->octaves)
                return k->n * s->n_conns * k->lo;
        for (unsigned c = 0; c < s->n_conns; c++)
                for (uint64_t i = 0; i < k->n; i++)
                        bytes += perf_size_at(k, c, i);
        return bytes;
}

/* What the threads of this end saw. */
static void add_workers(const struct perf_session *s, struct perf_measure *m)
{
        uint64_t begin = UINT64_MAX, end = 0, local = 0;

        for (unsigned i = 0; i < s->n_workers; i++) {
                const struct perf_worker *w = &s->workers[i];

                begin = w->begin_ns < begin ? w->begin_ns : begin;
                end = w->end_ns > end ? w->end_ns : end;
                m->wrong += w->wrong;
                m->checked += w->checked;
                m->cpu_local_ns += w->cpu_ns;
                m->copied += w->copied;
                hist_merge(&m->hist, &w->hist);
                if (s->c.open)
                        hist_merge(&m->uncorrected, &w->uncorrected);
                for (unsigned j = 0; j < w->n_conns; j++)
                        local = w->conns[j]->local_ns > local ? w->conns[j]->local_ns : local;
        }
        m->total_ns += end - begin;
        m->local_ns += local > begin ? local - begin : 0;
}

static void add_case(const struct perf_session *s, struct perf_measure *m, const struct perf_ctl *done)
{
        const struct perf_case *k = &s->c;
        uint64_t ways = k->bidir ? 2 : 1;

        add_workers(s, m);
        m->iterations += ways * k->n * s->n_conns;
        m->bytes += ways * case_bytes(s, k);
        m->wrong += done->f[PF_WRONG];
        m->checked += done->f[PF_CHECKED];
        m->cpu_peer_ns += done->f[PF_CPU_NS];
        m->copied += done->f[PF_COPIED];
}

/* An exchange that was broken off has measured what it has measured. */
static void add_broken(const struct perf_session *s, struct perf_measure *m)
{
        for (unsigned i = 0; i < s->n_workers && s->c.shape == PERF_EXCHANGE; i++) {
                const struct perf_worker *w = &s->workers[i];

                hist_merge(&m->hist, &w->hist);
                if (s->c.open)
                        hist_merge(&m->uncorrected, &w->uncorrected);
                m->iterations += w->hist.n;
                m->bytes += w->hist.n * s->c.lo;
                m->wrong += w->wrong;
                m->checked += w->checked;
                m->cpu_local_ns += w->cpu_ns;
        }
}

int perf_case_drive(struct perf_session *s, const struct perf_case *k, struct perf_measure *m)
{
        struct perf_conn *c = &s->conns[0];
        struct perf_ctl *msg = malloc(sizeof(*msg));
        int rc;

        if (!msg)
                return err_set(-ENOMEM, "no memory for control messages");
        s->c = *k;
        s->phase = "starting a case";
        perf_case_encode(k, msg);
        rc = perf_tell(c, msg);
        rc = rc ? rc : perf_hear(c, PERF_READY, msg);
        s->phase = "measuring";
        if (!rc) {
                rc = perf_parallel(s, perf_flow);
                if (rc == -EINTR && m)
                        add_broken(s, m);
        }
        s->phase = rc ? s->phase : "ending a case";
        rc = rc ? rc : perf_hear(c, PERF_DONE, msg);
        if (!rc && k->op != PERF_READ && msg->f[PF_SEEN] != k->n * s->n_conns)
                rc = err_set(-EPROTO, "the peer saw %llu of %llu transfers", (unsigned long long)msg->f[PF_SEEN],
                             (unsigned long long)k->n * s->n_conns);
        if (!rc && m)
                add_case(s, m, msg);
        free(msg);
        return rc;
}

/* ---- the peer ---- */

static int check_case(const struct perf_session *s, const struct perf_case *k)
{
        uint64_t need;

        if (k->test >= PERF_TESTS || k->op == PERF_AUTO || k->op >= PERF_OPS || k->shape > PERF_STAMPS ||
            k->window == 0 || k->window > PERF_DEPTH_MAX || k->slots == 0 || k->slots > PERF_DEPTH_MAX || k->n == 0 ||
            k->n > PERF_N_MAX || k->lo > k->hi || k->hi > PERF_REGION_MAX || (k->octaves && k->lo == 0) ||
            k->octaves > (31ull << 32) || (k->shape == PERF_STAMPS && k->lo < sizeof(uint64_t)))
                return err_set(-EPROTO, "%s asks for a case that is out of bounds", s->peer);
        need = perf_stride(k->hi) * k->slots;
        if (need > s->tx_bytes || need > s->rx_bytes)
                return err_set(-EPROTO, "%s asks for a case that is larger than the memory that was agreed on",
                               s->peer);
        return 0;
}

int perf_case_decode(const struct perf_session *s, const struct perf_ctl *m, struct perf_case *k)
{
        *k = (struct perf_case){.test = (enum perf_test)m->f[PF_TEST],
                                .op = (enum perf_op)m->f[PF_OP],
                                .shape = (enum perf_shape)(m->f[PF_SHAPE] & 0xff),
                                .lo = m->f[PF_SIZE_LO],
                                .hi = m->f[PF_SIZE_HI],
                                .octaves = m->f[PF_OCTAVES],
                                .n = m->f[PF_N],
                                .window = (unsigned)m->f[PF_WINDOW],
                                .slots = (unsigned)m->f[PF_SLOTS],
                                .seed = m->f[PF_SEED],
                                .verify = m->f[PF_SHAPE] & CASE_VERIFY,
                                .bidir = m->f[PF_SHAPE] & CASE_BIDIR,
                                .open = m->f[PF_SHAPE] & CASE_OPEN};
        k->stride = perf_stride(k->hi <= PERF_REGION_MAX ? k->hi : 0);
        return check_case(s, k);
}

static int ready_task(struct perf_worker *w)
{
        perf_flow_ready(w);
        return 0;
}

static int serve_case(struct perf_session *s, struct perf_ctl *m)
{
        int rc = perf_case_decode(s, m, &s->c);

        rc = rc ? rc : perf_parallel(s, ready_task);
        if (rc)
                return rc;
        memset(m, 0, sizeof(*m));
        m->kind = PERF_READY;
        s->phase = "serving a case";
        rc = perf_tell_now(&s->conns[0], m);
        rc = rc ? rc : perf_parallel(s, perf_flow);
        if (rc)
                return rc;
        m->kind = PERF_DONE;
        for (unsigned i = 0; i < s->n_workers; i++) {
                const struct perf_worker *w = &s->workers[i];

                m->f[PF_SEEN] += w->seen;
                m->f[PF_WRONG] += w->wrong;
                m->f[PF_CHECKED] += w->checked;
                m->f[PF_CPU_NS] += w->cpu_ns;
                m->f[PF_COPIED] += w->copied;
        }
        return perf_tell(&s->conns[0], m);
}

static int serve_clock(struct perf_session *s, struct perf_ctl *m)
{
        memset(m, 0, sizeof(*m));
        m->kind = PERF_CLOCK;
        m->f[PF_NOW] = clock_ns();
        return perf_tell(&s->conns[0], m);
}

static int serve_count(struct perf_session *s, struct perf_ctl *m)
{
        json *j = perf_counted(s);
        char *text = j ? json_text(j, false) : NULL;
        int rc = perf_tell_text(&s->conns[0], text && strlen(text) < PERF_TEXT_MAX ? text : "");

        (void)m;
        free(text);
        json_free(j);
        return rc;
}

static const struct {
        enum perf_ctl_kind kind;
        int (*serve)(struct perf_session *, struct perf_ctl *);
} services[] = {{PERF_CASE, serve_case},
                {PERF_CLOCK, serve_clock},
                {PERF_RAW_OFFER, perf_raw_answer},
                {PERF_RAW_ORDER, perf_raw_serve},
                {PERF_COUNT, serve_count}};

int perf_serve_cases(struct perf_session *s)
{
        struct perf_ctl *m = malloc(sizeof(*m));
        int rc = m ? 0 : err_set(-ENOMEM, "no memory for control messages");

        s->counters = perf_counters(&s->attr);
        while (!rc) {
                size_t i = 0;

                s->phase = "waiting for the next case";
                rc = perf_hear_any(&s->conns[0], m);
                if (rc || m->kind == PERF_BYE)
                        break;
                while (i < sizeof(services) / sizeof(services[0]) && services[i].kind != m->kind)
                        i++;
                rc = i < sizeof(services) / sizeof(services[0])
                         ? services[i].serve(s, m)
                         : err_set(-EPROTO, "%s: control message %d from %s", s->phase, (int)m->kind, s->peer);
        }
        free(m);
        return rc;
}
