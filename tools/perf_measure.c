/*
 * perf: one launch of the driver. Warms up, measures in segments, has the bare medium measured by the same processes,
 * and asks for what else belongs to the row.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "err.h"
#include "perf_inside.h"

#define WARM_SHARE  10 /* warm-up takes that part of the time of a repeat */
#define SEGMENT_NS  (500 * NS_PER_MS)
#define FIRST_N     8u            /* messages of the first segment, when nothing is known yet */
#define FIRST_BYTES (16ull << 20) /* as many as that, where a number of them was asked for */

enum perf_op perf_op_for(const struct perf_opts *o, const struct tp_attr *attr, const struct perf_size *size)
{
        if (o->op != PERF_AUTO)
                return (enum perf_op)o->op;
        return size->hi <= attr->msg_max ? PERF_SEND : PERF_WRITE;
}

typedef int (*case_fn)(struct perf_session *, const struct perf_case *, struct perf_measure *);

struct span { /* a measurement of so many messages, or of so much time, in segments */
        case_fn run;
        struct perf_case k;
        double per_s;   /* messages of one connection per second, as seen so far; 0: not known */
        uint64_t n, ns; /* on each connection; 0: not limited so */
        bool lines;     /* a line per second */
};

static void reset(struct perf_measure *m)
{
        memset(m, 0, sizeof(*m));
        hist_reset(&m->hist);
        hist_reset(&m->uncorrected);
}

static uint64_t within(double n, uint64_t most)
{
        return n < 1 ? 1 : n > (double)most ? most : (uint64_t)n;
}

static uint64_t segment_n(const struct perf_session *s, const struct span *p, uint64_t done, double took_ns)
{
        double most = (double)(s->stall_ns / 4 < SEGMENT_NS ? s->stall_ns / 4 : SEGMENT_NS), left;
        uint64_t first = FIRST_BYTES / (p->k.hi ? p->k.hi : 1);

        if (p->k.open && !p->lines) /* the clock of an open loop does not stop */
                return p->n ? p->n : within(p->per_s * (double)p->ns / 1e9, PERF_N_MAX);
        if (p->per_s == 0 && p->n) {
                first = first < FIRST_N ? FIRST_N : first > 10000 ? 10000 : first;
                return p->n - done < first ? p->n - done : first;
        }
        if (p->per_s == 0)
                return FIRST_N;
        if (p->n) {
                uint64_t n = within(p->per_s * most / 1e9, PERF_N_MAX);

                return p->n - done < n + n / 4 ? p->n - done : n;
        }
        left = p->ns ? (double)p->ns - took_ns : most;
        return within(p->per_s * (left < most * 1.25 ? left : most) / 1e9, PERF_N_MAX);
}

static bool span_over(const struct span *p, uint64_t done, double took_ns)
{
        if (p->n)
                return done >= p->n;
        return p->ns && took_ns >= 0.95 * (double)p->ns;
}

static void add_measure(struct perf_measure *into, const struct perf_measure *from)
{
        into->iterations += from->iterations;
        into->bytes += from->bytes;
        into->total_ns += from->total_ns;
        into->local_ns += from->local_ns;
        into->wrong += from->wrong;
        into->checked += from->checked;
        into->cpu_local_ns += from->cpu_local_ns;
        into->cpu_peer_ns += from->cpu_peer_ns;
        into->copied += from->copied;
        hist_merge(&into->hist, &from->hist);
        hist_merge(&into->uncorrected, &from->uncorrected);
}

/* The lines of --forever: what came since the last one. */
static void show_second(struct perf_session *s, const struct span *p, struct perf_measure *since, uint64_t *line,
                        const struct perf_measure *segment)
{
        add_measure(since, segment);
        if (since->total_ns < NS_PER_S * 9 / 10)
                return;
        perf_print_second(s->o, &p->k, ++*line, since);
        reset(since);
}

static int span_run(struct perf_session *s, struct span *p, struct perf_measure *total)
{
        static struct perf_measure one, since; /* too large for a stack */
        uint64_t done = 0, lines = 0;
        double took = 0;
        int rc = 0;

        reset(&since);
        while (!rc && !span_over(p, done, took)) {
                p->k.n = segment_n(s, p, done, took);
                p->k.resumes = p->k.open && done > 0;
                p->k.seed = prng_at(clock_ns(), done, p->k.seed);
                reset(&one);
                if (perf_stopped)
                        rc = err_set(-EINTR, "ended by a signal");
                rc = rc ? rc : p->run(s, &p->k, &one);
                add_measure(total, &one);
                done += p->k.n;
                took += (double)one.total_ns;
                if (!rc && one.total_ns)
                        p->per_s = p->k.open ? 1e9 / p->k.gap_ns : (double)p->k.n * 1e9 / (double)one.total_ns;
                if (!rc && p->lines)
                        show_second(s, p, &since, &lines, &one);
        }
        return rc;
}

/* Warms up, finding out how fast it goes; then measures. */
static int measure(struct perf_session *s, const struct perf_case *k, case_fn run, struct perf_measure *out)
{
        static struct perf_measure scrap;
        const struct perf_opts *o = s->o;
        struct span warm = {.run = run, .k = *k, .per_s = k->open ? 1e9 / k->gap_ns : 0}, real = {.run = run, .k = *k};
        int rc = 0;

        warm.n = o->warmup > 0 ? ((uint64_t)o->warmup + s->n_conns - 1) / s->n_conns : 0;
        warm.ns = o->duration_ns / WARM_SHARE;
        reset(&scrap);
        reset(out);
        if (o->warmup > 0 || (o->warmup < 0 && !o->iters))
                rc = span_run(s, &warm, &scrap);
        real.per_s = warm.per_s;
        real.lines = o->forever && run == perf_case_drive;
        real.n = ((uint64_t)o->iters + s->n_conns - 1) / s->n_conns;
        real.ns = o->forever ? 0 : o->duration_ns;
        return rc ? rc : span_run(s, &real, out);
}

/* ---- a launch, the driver ---- */

static int plan_case(const struct perf_session *s, const struct perf_launch *l, struct perf_case *k)
{
        const struct perf_opts *o = s->o;
        bool lat = o->test == PERF_LAT, looked_at;

        *k = (struct perf_case){.test = (enum perf_test)o->test,
                                .op = perf_op_for(o, &s->attr, l->size),
                                .shape = lat ? PERF_EXCHANGE : PERF_STREAM,
                                .lo = l->size->lo,
                                .hi = l->size->hi,
                                .octaves = perf_octaves(l->size),
                                .stride = perf_stride(l->size->hi),
                                .slots = perf_slots(o, l->size->hi),
                                .window = lat && o->rate == 0 ? 1 : (unsigned)o->depth,
                                .verify = o->verify,
                                .bidir = o->bidirectional,
                                .open = o->rate > 0,
                                .gap_ns = o->rate > 0 ? 1e9 * (double)o->connections / o->rate : 0,
                                .arrivals = o->arrivals,
                                .seed = 1};
        looked_at = k->verify || k->octaves;
        if (looked_at && k->window > k->slots)
                k->window = k->slots; /* what is in a slot must stay there until it was looked at */
        if (k->op == PERF_SEND && k->hi > s->attr.msg_max)
                return err_set(-EINVAL, "--op send: a message over %s has at most %zu bytes, not %llu", s->attr.name,
                               s->attr.msg_max, (unsigned long long)k->hi);
        return 0;
}

static void fill_info(const struct perf_session *s, const struct perf_case *k, struct perf_info *i)
{
        i->attr = s->attr;
        i->attr.name = NULL; /* of another process, where this is read */
        snprintf(i->transport, sizeof(i->transport), "%s", s->attr.name);
        snprintf(i->path, sizeof(i->path), "%s", s->path);
        snprintf(i->peer, sizeof(i->peer), "%s", s->peer);
        snprintf(i->peer_text, sizeof(i->peer_text), "%s", s->peer_text);
        memcpy(i->cores, s->cores, sizeof(i->cores));
        i->n_cores = s->n_cores;
        i->slots = k->slots;
        i->window = k->window;
        i->op = k->op;
        i->region_bytes = (s->tx_bytes + s->rx_bytes) * s->n_conns;
}

static int one_way(struct perf_session *s, const struct perf_case *k, struct perf_launch *l)
{
        struct perf_case few = *k;

        if (k->test != PERF_LAT || k->open || k->octaves || k->op == PERF_READ || k->lo < sizeof(uint64_t))
                return 0;
        few.n = l->ours.iterations / 20 < 20 ? 20 : l->ours.iterations / 20;
        few.n = few.n < PERF_STAMPS_MAX ? few.n : PERF_STAMPS_MAX;
        few.seed++;
        s->phase = "measuring one way";
        return perf_one_way(s, &few, &l->one_way);
}

static void put_text(char *out, const json *j)
{
        char *text = j ? json_text(j, false) : NULL;

        out[0] = '\0';
        if (text && strlen(text) < PERF_TEXT_MAX)
                strcpy(out, text);
        free(text);
}

json *perf_counted(const struct perf_session *s)
{
        json *now = perf_counters(&s->attr), *delta = perf_counters_delta(s->counters, now);

        json_free(now);
        return delta;
}

static int account(struct perf_session *s, struct perf_launch *l)
{
        struct perf_conn *c = &s->conns[0];
        struct perf_ctl *m = calloc(1, sizeof(*m));
        json *here = perf_counted(s);
        char *text = NULL;
        int rc = m ? 0 : err_set(-ENOMEM, "no memory for control messages");

        put_text(l->counters_local, here);
        json_free(here);
        s->phase = "ending the measurement";
        if (m) {
                m->kind = PERF_COUNT;
                rc = perf_tell(c, m);
        }
        rc = rc ? rc : perf_hear_text(c, &text);
        if (!rc)
                snprintf(l->counters_peer, sizeof(l->counters_peer), "%s", text);
        if (!rc) {
                memset(m, 0, sizeof(*m));
                m->kind = PERF_BYE;
                rc = perf_tell(c, m);
        }
        free(text);
        free(m);
        return rc;
}

int perf_launch_run(struct perf_session *s, struct perf_launch *l)
{
        const struct perf_opts *o = s->o;
        struct perf_case k;
        int rc = plan_case(s, l, &k);

        if (rc < 0)
                return rc;
        s->counters = perf_counters(&s->attr);
        fill_info(s, &k, &l->info);
        l->agreed = true;
        if (l->first)
                perf_print_head(o, &l->info, k.op);
        rc = measure(s, &k, perf_case_drive, &l->ours);
        if (!rc && o->raw) {
                rc = perf_raw_begin(s, &k);
                rc = rc ? rc : measure(s, &k, perf_raw_case, &l->raw);
        }
        rc = rc ? rc : one_way(s, &k, l);
        return rc ? rc : account(s, l);
}
