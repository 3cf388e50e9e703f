/*
 * Measuring. For each workload:
 *   set-up      connections (once a sweep), models, plans, buffers, the reference, wire floor
 *   check pass  every row, untimed, along the reference's tokens
 *   warm-up     every row until steady
 *   blocks      rows and calibrations in random order, each row first once untimed for its digest
 */
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "check.h"
#include "err.h"
#include "files.h"
#include "log.h"
#include "prng.h"
#include "progress.h"
#include "rows.h"
#include "sweep.h"

#define WARM_WINDOW      5u /* requests in one window; slow ones make do with fewer */
#define WARM_WINDOW_SLOW 2u
#define SLOW_NS          (50 * NS_PER_MS)
#define WARM_REL         0.10
#define WARM_MAX         200u
#define WARM_MAX_NS      (10 * NS_PER_S)
#define WARM_BLOCK       0xfffffff0u /* inputs of the warm-up are none of a block's */
#define PROFILE_READINGS 6           /* with RUN_PROFILE: four in the server, two in the client; the rest stays */
#define SAVE_EVERY_NS    (30 * NS_PER_S)
#define NET_LEAST        3 /* calibrations per block and turn, where they are quick */

struct link { /* one connection and what is loaded over it */
        struct remote r;
        bool open;
        uint64_t connect_ns;
        char why[256];                 /* why it is not */
        struct remote_model models[2]; /* annotated, blind */
        bool loaded[2];
};

struct session {
        const struct sweep_opts *opts;
        struct model_roots *roots;
        struct link links[EXP_TRANSPORTS_MAX];
        struct progress progress;
        struct sweep_outcome *out;
        json *resume; /* document to go on from; NULL none */
};

struct job { /* one workload being measured */
        struct session *s;
        struct measured me;
        struct workload w;
        struct graph blind;
        struct reference ref;
        struct conversation conv;
        struct digest *digests; /* per turn, of the untimed pass that is going on */
        struct prng rng;
        bool built, has_blind, has_ref;
        bool refused;      /* --resume does not fit */
        char path[1024];   /* of the result */
        uint64_t saved_ns; /* when it was last written */
};

static bool stopped(const struct session *s)
{
        return s->opts->stop && *s->opts->stop;
}

/* A row that cannot go on: its reason is the sentence of the error. */
static void spoil(struct row *r, const char *phase)
{
        if (r->verdict == VERDICT_SKIPPED)
                return;
        r->verdict = VERDICT_INVALID;
        snprintf(r->reason, sizeof r->reason, "%s: %s", phase, err_text());
}

static bool usable(const struct row *r)
{
        if (row_is_external(r))
                return r->verdict == VERDICT_VALID && external_alive(r->external);
        return r->verdict == VERDICT_VALID && r->execs && !r->r->dead;
}

/* ---- rows ---- */

static void add_row(struct job *j, const struct exp_baseline *b, const char *transport, size_t link, int twin_of)
{
        struct row *r = &j->me.rows[j->me.nrows];

        *r = (struct row){
            .b = b, .transport = transport, .link = link, .twin_of = twin_of, .steady = true, .wire_floor_ns = NAN};
        snprintf(r->name, sizeof r->name, "%s%s", b->name, twin_of >= 0 ? "#2" : "");
        if (b->skip) {
                r->verdict = VERDICT_SKIPPED;
                snprintf(r->reason, sizeof r->reason, "%s", b->skip);
        } else if (row_is_external(r) && !j->s->opts->allow_external) {
                r->verdict = VERDICT_SKIPPED;
                snprintf(r->reason, sizeof r->reason, "it would start %.200s; allow that with --allow-external",
                         b->command[0]);
        }
        j->me.nrows++;
}

/* A local row once; a remote one per transport; in a self-test each a second time. */
static int make_rows(struct job *j)
{
        const struct experiment *e = j->s->opts->exp;
        int twins = j->s->opts->self_test ? 2 : 1;

        j->me.rows = calloc(e->nbaselines * e->ntransports * 2 + 1, sizeof *j->me.rows);
        if (!j->me.rows)
                return err_set(-ENOMEM, "out of memory for rows");
        for (size_t i = 0; i < e->nbaselines; i++) {
                const struct exp_baseline *b = &e->baselines[i];
                bool local = !b->def || b->def->external || b->sw.buffers == SW_IN_PROCESS;

                if (!exp_wanted(b->name, j->s->opts->baselines, j->s->opts->nbaselines))
                        continue;
                for (size_t t = 0; t < (local ? 1 : e->ntransports); t++)
                        for (int twin = 0; twin < twins; twin++)
                                add_row(j, b, local ? "local" : e->transports[t], t, twin ? (int)j->me.nrows - 1 : -1);
        }
        return 0;
}

static void skip_all(struct job *j, enum verdict verdict, const char *reason)
{
        for (size_t i = 0; i < j->me.nrows; i++) {
                if (j->me.rows[i].verdict == VERDICT_SKIPPED)
                        continue;
                j->me.rows[i].verdict = verdict;
                snprintf(j->me.rows[i].reason, sizeof j->me.rows[i].reason, "%s", reason);
        }
}

/* ---- set-up of one row ---- */

static int load_model(struct job *j, struct link *l, bool blind)
{
        const struct graph *g = blind ? &j->blind : &j->w.graph;
        enum msg_weights from = !j->w.has_weights                    ? MSG_WEIGHTS_NONE
                                : j->w.weights == WEIGHTS_CHECKPOINT ? MSG_WEIGHTS_CHECKPOINT
                                                                     : MSG_WEIGHTS_SEED;
        struct digest d;
        int rc;

        if (!l->loaded[blind]) {
                rc = remote_load(&l->r, g, from, j->w.spec.model_id, j->s->opts->exp->seed, &l->models[blind]);
                if (rc < 0)
                        return rc;
                l->loaded[blind] = true;
        }
        d = (struct digest){l->models[blind].info.weights_digest[0], l->models[blind].info.weights_digest[1]};
        if (j->w.has_weights && j->has_ref && !digest_equal(d, j->ref.weights))
                return err_set(-EINVAL, "the server's weights differ from this client's checkpoint of %s",
                               j->w.spec.model_id ? j->w.spec.model_id : j->w.spec.name);
        return 0;
}

static bool state_stays(const struct switches *sw)
{
        return sw->state != SW_STATE_RECOMPUTE;
}

static int make_plans(struct job *j, struct row *r, const struct plan_limits *limits)
{
        int rc = 0;

        r->g = r->b->sw.blind ? &j->blind : &j->w.graph;
        r->plans = calloc(j->me.turns, sizeof *r->plans);
        if (!r->plans)
                return err_set(-ENOMEM, "out of memory for plans");
        for (uint32_t t = 0; t < j->me.turns && rc == 0; t++) {
                struct plan_shape s = workload_shape(&j->w, t, state_stays(&r->b->sw), false);

                rc = plan_make(r->g, j->w.driver, &r->b->sw, &s, limits, &r->plans[t]);
        }
        return rc;
}

/* One program for this row and workload. What it cannot do is no fault of the row. */
static int set_up_external(struct job *j, struct row *r)
{
        const struct sweep_opts *o = j->s->opts;
        struct external_opts eo = {.child = {.name = r->name, .argv = r->b->command, .cpus = o->cpus, .stop = o->stop},
                                   .run_ns = o->timeout_ns};
        uint64_t start = clock_ns();
        int rc;

        r->digests = calloc((size_t)o->exp->runs + 1, sizeof *r->digests);
        if (!r->digests)
                return err_set(-ENOMEM, "out of memory for a row");
        rc = external_open(&eo, &j->w, o->exp->seed, &r->external);
        if (rc == -ENOTSUP) {
                r->verdict = VERDICT_SKIPPED;
                snprintf(r->reason, sizeof r->reason, "%s", err_text());
        }
        r->setup_ns = clock_ns() - start;
        return rc;
}

static int set_up_row(struct job *j, struct row *r)
{
        struct link *l = &j->s->links[r->link];
        struct plan_limits limits = {.msg_max = l->r.attr.msg_max, .inline_bytes = l->r.server.limits.inline_bytes};
        uint64_t start;
        int rc;

        if (row_is_external(r))
                return set_up_external(j, r);
        if (!l->open)
                return err_set(-ENOTCONN, "%s", l->why);
        r->r = &l->r;
        rc = load_model(j, l, r->b->sw.blind);
        if (rc < 0)
                return rc;
        r->m = &l->models[r->b->sw.blind];
        start = clock_ns();
        rc = make_plans(j, r, &limits);
        if (rc < 0)
                return rc;
        r->digests = calloc((size_t)j->s->opts->exp->runs + 1, sizeof *r->digests);
        r->execs = calloc(j->me.turns, sizeof *r->execs);
        if (!r->digests || !r->execs)
                return err_set(-ENOMEM, "out of memory for a row");
        for (uint32_t t = 0; t < j->me.turns && rc == 0; t++)
                rc = exec_prepare(&r->execs[t], r->r, r->m, &r->plans[t]);
        /* Connection and model may have served an earlier row already; each row would have needed them. */
        r->setup_ns = l->connect_ns + r->m->load_ns + clock_ns() - start;
        return rc;
}

/* ---- one conversation over one row ---- */

typedef int turn_fn(struct job *j, struct row *r, uint32_t turn, const struct exec_sample *s, void *arg);

static const void *result_of(const struct row *r, const struct exec *x, size_t *len)
{
        return row_is_external(r) ? external_result(r->external, len) : exec_result(x, len);
}

/* One turn, by whoever does this row's work. */
static int request(struct row *r, struct exec *x, uint32_t block, uint32_t turn, const struct exec_data *d,
                   struct exec_sample *s)
{
        if (!row_is_external(r))
                return exec_run(x, d, s);
        *s = (struct exec_sample){0};
        if (d->forced)
                return external_check(r->external, turn, d);
        return external_run(r->external, turn, block, d, &s->latency_ns);
}

/* execs: per turn; not looked at where the row is external. */
static int converse(struct job *j, struct row *r, struct exec *execs, uint32_t block, const int32_t *forced,
                    turn_fn *fn, void *arg)
{
        uint64_t seed = j->s->opts->exp->seed;
        size_t per_turn = (size_t)j->ref.steps * j->ref.batch, len;
        int rc = conversation_start(&j->conv, &j->w, seed, block);

        for (uint32_t t = 0; t < j->me.turns && rc == 0; t++) {
                struct exec_data d = {.history = j->conv.ids,
                                      .history_cap = j->conv.cap,
                                      .input = j->conv.input,
                                      .forced = forced ? forced + t * per_turn : NULL};
                struct exec *x = execs ? &execs[t] : NULL;
                struct exec_sample s;

                rc = request(r, x, block, t, &d, &s);
                if (rc == 0 && !r->cold_start_ns)
                        r->cold_start_ns = s.latency_ns; /* the first request after set-up: the check pass's */
                if (rc == 0)
                        rc = fn(j, r, t, &s, arg);
                if (rc == 0 && t + 1 < j->me.turns)
                        conversation_turn(&j->conv, &j->w, seed, block, t + 1,
                                          forced ? forced + t * per_turn : result_of(r, x, &len));
        }
        return rc;
}

/* ---- check pass ---- */

static int check_turn(struct job *j, struct row *r, uint32_t turn, const struct exec_sample *s, void *arg)
{
        struct exec *x = (struct exec *)arg + turn;
        const float *logits = x->last_logits;
        size_t len;
        const void *result = exec_result(x, &len);

        (void)s;
        if (j->w.driver != DRIVE_CAUSAL) {
                check_output(&j->ref, &j->w, result, len, check_tolerance(j->w.dtype), &r->check);
                return 0;
        }
        if (x->p->sw.call == SW_REQUEST)
                logits = (const float *)((x->p->sw.buffers == SW_SERIALIZED ? x->result : x->region) + x->p->check_off);
        check_logits(&j->ref, turn, logits, check_tolerance(j->w.dtype), &r->check);
        return 0;
}

static int judge_turn(struct job *j, struct row *r, uint32_t turn, const struct exec_sample *s, void *arg)
{
        (void)s, (void)arg;
        external_judge(r->external, &j->ref, turn, &r->check);
        return 0;
}

/* A program may check what it does not run: block 0, whose conversation is the reference's, is run as well. Feed-forward
 * models have nothing to be forced along; for them `forced` only says that this is the check. */
static int check_external(struct job *j, struct row *r)
{
        static const int32_t nothing;
        int rc = converse(j, r, NULL, 0, j->ref.tokens ? j->ref.tokens : &nothing, judge_turn, NULL);

        if (rc == 0)
                rc = converse(j, r, NULL, 0, NULL, judge_turn, NULL);
        r->check.digest_sensitive = j->ref.token_sensitive && j->ref.state_sensitive;
        return rc;
}

/* The plans that will be timed, left to choose for themselves: what the application gets must be the reference's too. */
static int own_turn(struct job *j, struct row *r, uint32_t turn, const struct exec_sample *s, void *arg)
{
        size_t len;
        const void *result = exec_result(&r->execs[turn], &len);

        (void)s, (void)arg;
        if (j->w.driver != DRIVE_CAUSAL)
                check_output(&j->ref, &j->w, result, len, check_tolerance(j->w.dtype), &r->check);
        else if (j->w.spec.new_tokens)
                check_tokens(&j->ref, turn, result, &r->check);
        else
                check_logits(&j->ref, turn, result, check_tolerance(j->w.dtype), &r->check);
        return 0;
}

static int check_planned(struct job *j, struct row *r)
{
        const struct link *l = &j->s->links[r->link];
        struct plan_limits limits = {.msg_max = l->r.attr.msg_max, .inline_bytes = l->r.server.limits.inline_bytes};
        struct plan *plans = calloc(j->me.turns, sizeof *plans);
        struct exec *execs = calloc(j->me.turns, sizeof *execs);
        size_t logits = (size_t)j->ref.steps * j->ref.batch * j->ref.vocab;
        int rc = plans && execs ? 0 : err_set(-ENOMEM, "out of memory for the check pass");

        for (uint32_t t = 0; t < j->me.turns && rc == 0; t++) {
                struct plan_shape s = workload_shape(&j->w, t, state_stays(&r->b->sw), true);

                rc = plan_make(r->g, j->w.driver, &r->b->sw, &s, &limits, &plans[t]);
                if (rc == 0)
                        rc = exec_prepare(&execs[t], r->r, r->m, &plans[t]);
                if (rc == 0 && j->w.driver == DRIVE_CAUSAL && r->b->sw.call == SW_STEP) {
                        execs[t].last_logits = malloc(logits * sizeof(float));
                        rc = execs[t].last_logits ? 0 : err_set(-ENOMEM, "out of memory for the check pass");
                }
        }
        if (rc == 0)
                rc = converse(j, r, execs, 0, j->ref.tokens, check_turn, execs);
        if (rc == 0)
                rc = converse(j, r, r->execs, 0, NULL, own_turn, NULL);
        for (uint32_t t = 0; t < j->me.turns && plans && execs; t++) {
                free(execs[t].last_logits);
                execs[t].last_logits = NULL;
                exec_free(&execs[t]);
                plan_free(&plans[t]);
        }
        free(plans);
        free(execs);
        r->check.digest_sensitive = j->ref.token_sensitive && j->ref.state_sensitive;
        return rc;
}

static int check_row(struct job *j, struct row *r)
{
        return row_is_external(r) ? check_external(j, r) : check_planned(j, r);
}

/* ---- warm-up ---- */

static int warm_turn(struct job *j, struct row *r, uint32_t turn, const struct exec_sample *s, void *arg)
{
        double *sum = arg;

        (void)j, (void)r, (void)turn;
        *sum += (double)s->latency_ns;
        return 0;
}

/* How far apart medians of windows may lie: 10 %, or what the samples' own scatter (the interquartile range of the last
 * three windows) makes of them on a host that others use too. A trend is larger than either. */
static double steady_rel(const double *v, uint32_t n, uint32_t window)
{
        uint32_t last = 3 * window < n ? 3 * window : n;
        double iqr = stats_percentile(v + n - last, last, 75) - stats_percentile(v + n - last, last, 25);
        double own = iqr / stats_median(v + n - last, last);

        return own > WARM_REL ? own : WARM_REL;
}

static int warm_row(struct job *j, struct row *r)
{
        const struct experiment *e = j->s->opts->exp;
        uint64_t deadline = clock_ns() + WARM_MAX_NS;
        double v[WARM_MAX];
        uint32_t n = 0;
        int rc = 0;

        r->steady = false;
        while (rc == 0 && n < WARM_MAX && !stopped(j->s)) {
                uint32_t window;
                double sum = 0;

                rc = converse(j, r, r->execs, WARM_BLOCK, NULL, warm_turn, &sum);
                v[n++] = sum;
                window = sum > (double)SLOW_NS ? WARM_WINDOW_SLOW : WARM_WINDOW;
                r->steady = stats_steady(v, n, window, steady_rel(v, n, window));
                if (n >= e->warmup_runs && (r->steady || clock_ns() > deadline))
                        break;
        }
        r->warm_requests = (uint64_t)n * j->me.turns;
        return rc;
}

/* ---- blocks ---- */

struct block_run {
        uint32_t block;
        bool timed;
        struct digest *per_turn; /* of the untimed pass */
};

static int sample_turn(struct job *j, struct row *r, uint32_t turn, const struct exec_sample *s, void *arg)
{
        const struct block_run *br = arg;
        size_t len;
        const void *result = result_of(r, r->execs ? &r->execs[turn] : NULL, &len);
        struct digest d = digest_of(result, len);
        struct sample *grown;

        if (!br->timed) {
                br->per_turn[turn] = d;
                return 0;
        }
        if (r->nsamples == r->cap) {
                r->cap = r->cap ? r->cap * 2 : 256;
                grown = realloc(r->samples, r->cap * sizeof *grown);
                if (!grown)
                        return err_set(-ENOMEM, "out of memory for samples");
                r->samples = grown;
        }
        r->samples[r->nsamples++] = (struct sample){.block = br->block,
                                                    .launch = j->me.launch[br->block],
                                                    .turn = turn,
                                                    .s = *s,
                                                    .digest_ok = digest_equal(d, br->per_turn[turn])};
        r->digest_errors += !digest_equal(d, br->per_turn[turn]);
        return 0;
}

static uint64_t rss_bytes(void)
{
        struct rusage ru;

        return getrusage(RUSAGE_SELF, &ru) == 0 ? (uint64_t)ru.ru_maxrss * 1024 : 0;
}

static void count_wire(struct wire_count *w, const struct tp_counters *a, const struct tp_counters *b,
                       const struct msg_stats *sa, const struct msg_stats *sb)
{
        w->up_messages += b->msgs_tx - a->msgs_tx;
        w->up_msg_bytes += b->msg_bytes_tx - a->msg_bytes_tx;
        w->up_bulk_bytes += b->bulk_bytes_tx - a->bulk_bytes_tx;
        w->up_header_bytes += b->header_bytes_tx - a->header_bytes_tx;
        w->down_messages += b->msgs_rx - a->msgs_rx;
        w->down_msg_bytes += b->msg_bytes_rx - a->msg_bytes_rx;
        w->down_header_bytes += b->header_bytes_rx - a->header_bytes_rx;
        w->client_copied += b->bytes_copied - a->bytes_copied;
        w->down_bulk_bytes += sb->bulk_bytes_tx - sa->bulk_bytes_tx; /* the writer counts: the target may not know */
        w->server_copied += sb->bytes_copied - sa->bytes_copied;
}

static int timed_requests(struct job *j, struct row *r, struct block_run *br)
{
        uint64_t cpu = clock_cpu_ns();
        int rc = 0;

        br->timed = true;
        for (int64_t k = 0; k < j->s->opts->exp->requests_per_block && rc == 0; k++)
                rc = converse(j, r, r->execs, br->block, NULL, sample_turn, br);
        r->client_cpu_ns += clock_cpu_ns() - cpu;
        r->client_rss_bytes = rss_bytes();
        return rc;
}

/* All that is counted lies between the two looks at the counters; what asks for the time, outside. */
static int counted_requests(struct job *j, struct row *r, struct block_run *br)
{
        struct msg_stats before, after;
        struct tp_counters n, end;
        int rc = remote_stats(r->r, &before);

        n = r->r->ep->n;
        if (rc == 0)
                rc = timed_requests(j, r, br);
        end = r->r->ep->n;
        if (rc == 0)
                rc = remote_stats(r->r, &after);
        if (rc < 0)
                return rc;
        count_wire(&r->wire, &n, &end, &before, &after);
        r->server_cpu_ns += after.cpu_ns - before.cpu_ns;
        r->server_rss_bytes = after.rss_bytes;
        return 0;
}

static int measure_row(struct job *j, struct row *r, uint32_t block)
{
        struct block_run br = {.block = block, .per_turn = j->digests};
        struct offset before, after;
        size_t first = r->nsamples;
        int rc = converse(j, r, r->execs, block, NULL, sample_turn, &br);

        if (rc < 0)
                return rc;
        r->digests[block] = digest_of(j->digests, j->me.turns * sizeof *j->digests);
        if (row_is_external(r))
                return timed_requests(j, r, &br);
        if (row_is_native(r))
                return counted_requests(j, r, &br);
        rc = remote_clock(r->r, &before);
        if (rc == 0)
                rc = counted_requests(j, r, &br);
        if (rc == 0)
                rc = remote_clock(r->r, &after);
        if (rc == 0)
                row_settle_clock(r, r->samples + first, r->nsamples - first, &before, &after);
        return rc;
}

static int calibrate_row(struct job *j, struct row *r, uint32_t block)
{
        int64_t n = j->s->opts->exp->requests_per_block;
        uint64_t held = 0;

        for (size_t i = 0; i < r->plans[0].ncalls; i++)
                held += r->execs[0].hold_ns[i];
        if (n < NET_LEAST && held < SLOW_NS) /* one more costs as much waiting as a request */
                n = NET_LEAST;
        for (int64_t k = 0; k < n; k++)
                for (uint32_t t = 0; t < j->me.turns; t++) {
                        uint64_t ns;
                        int rc = exec_calibrate(&r->execs[t], &ns);

                        if (rc < 0)
                                return rc;
                        if (r->nnets == r->nets_cap) {
                                struct net_sample *grown;

                                r->nets_cap = r->nets_cap ? r->nets_cap * 2 : 256;
                                grown = realloc(r->nets, r->nets_cap * sizeof *grown);
                                if (!grown)
                                        return err_set(-ENOMEM, "out of memory for samples");
                                r->nets = grown;
                        }
                        r->nets[r->nnets++] = (struct net_sample){.block = block, .turn = t, .ns = ns};
                }
        return 0;
}

/* The block's order: every row, and every remote row's calibration, shuffled. Kept for the result. */
static size_t draw_order(struct job *j, uint32_t block)
{
        uint32_t v[2 * EXP_BASELINES_MAX * EXP_TRANSPORTS_MAX * 2];
        size_t n = 0, rows = j->me.nrows;

        for (size_t i = 0; i < rows; i++) {
                if (!usable(&j->me.rows[i]))
                        continue;
                v[n++] = (uint32_t)i;
                if (row_is_remote(&j->me.rows[i]))
                        v[n++] = (uint32_t)(rows + i);
        }
        prng_shuffle(&j->rng, v, n);
        for (size_t i = 0; i < n; i++)
                j->me.order[block][i] = v[i] < rows ? (int32_t)v[i] : -1 - (int32_t)(v[i] - rows);
        j->me.order_len[block] = n;
        return n;
}

static void mark_block(struct row *r)
{
        r->mark = (struct row_mark){.wire = r->wire,
                                    .client_cpu_ns = r->client_cpu_ns,
                                    .server_cpu_ns = r->server_cpu_ns,
                                    .digest_errors = r->digest_errors,
                                    .clock = r->clock};
}

/* What a row had of the block that broke goes, counters too: only finished blocks count. */
static void drop_block(struct row *r, uint32_t block)
{
        while (r->nsamples && r->samples[r->nsamples - 1].block == block)
                r->nsamples--;
        while (r->nnets && r->nets[r->nnets - 1].block == block)
                r->nnets--;
        r->wire = r->mark.wire;
        r->client_cpu_ns = r->mark.client_cpu_ns, r->server_cpu_ns = r->mark.server_cpu_ns;
        r->digest_errors = r->mark.digest_errors;
        r->clock = r->mark.clock;
}

static void run_block(struct job *j, uint32_t block)
{
        size_t n = draw_order(j, block);

        for (size_t i = 0; i < j->me.nrows; i++)
                mark_block(&j->me.rows[i]);
        for (size_t k = 0; k < n && !stopped(j->s); k++) {
                int32_t o = j->me.order[block][k];
                struct row *r = &j->me.rows[o < 0 ? -1 - o : o];

                if (!usable(r))
                        continue;
                if ((o < 0 ? calibrate_row(j, r, block) : measure_row(j, r, block)) < 0 && !stopped(j->s)) {
                        spoil(r, o < 0 ? "calibration" : "request");
                        drop_block(r, block);
                }
                progress_step(&j->s->progress, j->w.spec.name);
        }
}

static bool any_usable(const struct job *j)
{
        for (size_t i = 0; i < j->me.nrows; i++)
                if (usable(&j->me.rows[i]))
                        return true;
        return false;
}

/* A dead connection spoils every row over it, also those that were not running. */
static void spoil_dead(struct job *j)
{
        for (size_t i = 0; i < j->me.nrows; i++) {
                struct row *r = &j->me.rows[i];

                if (r->verdict != VERDICT_VALID || !r->r || !r->r->dead)
                        continue;
                r->verdict = VERDICT_INVALID;
                snprintf(r->reason, sizeof r->reason, "the server is gone: %s", r->r->why);
        }
}

/* ---- the file ---- */

static int open_result(struct job *j)
{
        const struct sweep_opts *o = j->s->opts;
        char stamp[24];
        int rc;

        clock_compact(stamp);
        snprintf(j->path, sizeof j->path, "%s/%s", o->output_dir, j->me.spec->name);
        rc = file_mkdirs(j->path);
        if (rc == 0 && access(j->path, W_OK) < 0)
                rc = err_set(-errno, "%s: results cannot be written there", j->path);
        snprintf(j->path, sizeof j->path, "%s/%s/%s_%s.json", o->output_dir, j->me.spec->name, o->exp->tag, stamp);
        return rc;
}

/* What is measured so far, judged on a copy: a sweep that is killed leaves its finished blocks for --resume. */
static void save_so_far(struct job *j)
{
        struct measured copy = j->me;
        uint64_t now = clock_ns();
        json *doc;

        if (now - j->saved_ns < SAVE_EVERY_NS || !j->me.blocks)
                return;
        copy.rows = malloc(j->me.nrows * sizeof *copy.rows);
        if (!copy.rows)
                return;
        memcpy(copy.rows, j->me.rows, j->me.nrows * sizeof *copy.rows);
        for (size_t i = 0; i < copy.nrows; i++)
                row_judge(&copy, &copy.rows[i]);
        doc = result_document(&copy);
        if (json_save(doc, j->path) < 0)
                log_warn("%s", err_text());
        json_free(doc);
        free(copy.rows);
        j->saved_ns = clock_ns();
}

/* ---- all blocks ---- */

/* Blocks that an earlier launch has finished, if this workload is the one to go on with. */
static int take_up(struct job *j)
{
        const json *doc = j->s->resume;
        uint32_t launch;
        int rc;

        if (!doc || strcmp(json_str(json_get(json_get(doc, "workload"), "workload"), ""), j->me.spec->name))
                return 0;
        rc = resume_take(&j->me, doc);
        j->refused = rc < 0;
        if (rc < 0)
                return rc;
        launch = j->me.resumed ? j->me.launch[j->me.resumed - 1] + 1 : 0;
        for (uint32_t b = j->me.resumed; b < (uint32_t)j->s->opts->exp->runs; b++)
                j->me.launch[b] = launch;
        prng_seed(&j->rng, j->s->opts->exp->seed + launch);
        return 0;
}

static int run_blocks(struct job *j)
{
        uint32_t runs = (uint32_t)j->s->opts->exp->runs;
        int rc;

        j->me.order = calloc(runs, sizeof *j->me.order);
        j->me.order_len = calloc(runs, sizeof *j->me.order_len);
        j->me.launch = calloc(runs, sizeof *j->me.launch);
        if (!j->me.order || !j->me.order_len || !j->me.launch)
                return err_set(-ENOMEM, "out of memory for blocks");
        rc = take_up(j);
        if (rc < 0)
                return rc;
        for (uint32_t b = j->me.blocks; b < runs; b++) {
                j->me.order[b] = calloc(2 * j->me.nrows + 1, sizeof **j->me.order);
                if (!j->me.order[b])
                        return err_set(-ENOMEM, "out of memory for blocks");
        }
        progress_say(&j->s->progress, "%s: measuring %u blocks", j->w.spec.name, runs - j->me.blocks);
        j->saved_ns = clock_ns();
        progress_start(&j->s->progress, (size_t)(runs - j->me.blocks) * j->me.nrows * 2);
        for (uint32_t b = j->me.blocks; b < runs && any_usable(j); b++) {
                run_block(j, b);
                if (stopped(j->s) || !any_usable(j)) {
                        for (size_t i = 0; i < j->me.nrows; i++)
                                drop_block(&j->me.rows[i], b);
                        break;
                }
                j->me.blocks = b + 1;
                if (b + 1 < runs)
                        save_so_far(j);
        }
        spoil_dead(j);
        j->me.complete = j->me.blocks == runs;
        return 0;
}

/* ---- a workload ---- */

static int build(struct job *j, const struct workload_spec *spec)
{
        const struct sweep_opts *o = j->s->opts;
        struct workload_opts wo = {
            .roots = j->s->roots, .dtype = o->exp->dtype, .require_weights = o->require_weights, .seed = o->exp->seed};
        int rc = workload_build(spec, &wo, &j->w);

        if (rc < 0)
                return rc;
        j->built = true;
        j->me.w = &j->w;
        j->me.turns = workload_turns(&j->w);
        rc = graph_clone(&j->w.graph, &j->blind);
        if (rc < 0)
                return rc;
        j->has_blind = true;
        graph_blind(&j->blind);
        return 0;
}

static int make_reference(struct job *j)
{
        struct weights_source src = {.kind = j->w.weights, .seed = j->s->opts->exp->seed};
        int fd = -1, rc = 0;

        if (j->w.has_weights && j->w.weights == WEIGHTS_CHECKPOINT) {
                fd = model_find(j->s->roots, j->w.spec.model_id, NULL, 0);
                rc = fd < 0 ? fd : checkpoint_open(fd, j->w.spec.model_id, &src.checkpoint);
        }
        if (rc == 0)
                rc = reference_make(&j->w, &src, j->s->opts->exp->seed, &j->ref);
        j->has_ref = rc == 0;
        if (src.checkpoint)
                checkpoint_close(src.checkpoint);
        if (fd >= 0)
                close(fd);
        return rc;
}

static void each_row(struct job *j, const char *phase, int (*fn)(struct job *, struct row *), bool needs_exec)
{
        progress_say(&j->s->progress, "%s: %s", j->w.spec.name, phase);
        for (size_t i = 0; i < j->me.nrows && !stopped(j->s); i++) {
                struct row *r = &j->me.rows[i];

                if (r->verdict != VERDICT_VALID || (needs_exec && !usable(r)))
                        continue;
                if (j->s->progress.line)
                        progress_say(&j->s->progress, "%s: %s %s over %s", j->w.spec.name, phase, r->name,
                                     r->transport);
                if (fn(j, r) < 0)
                        spoil(r, phase);
        }
}

static void describe_server(struct job *j)
{
        for (size_t t = 0; t < EXP_TRANSPORTS_MAX && !j->me.have_server; t++) {
                const struct link *l = &j->s->links[t];

                if (!l->open)
                        continue;
                j->me.have_server = true;
                j->me.server_info = l->r.server;
                j->me.clock_offset_ns = l->r.offset_ns;
                j->me.clock_error_ns = l->r.clock_error_ns;
        }
}

static void all_wire_floors(struct job *j)
{
        bool here = !j->s->opts->external_server;

        for (size_t t = 0; t < j->s->opts->exp->ntransports && here; t++)
                wire_floors(&j->me, j->s->opts->exp->transports[t]);
        for (size_t i = 0; i < j->me.nrows; i++) {
                struct row *r = &j->me.rows[i];

                if (row_is_remote(r) && isnan(r->wire_floor_ns))
                        r->no_wire_floor = here ? "the medium's plain means could not be had here"
                                                : "measured only where this sweep starts the server";
        }
}

static int measure(struct job *j)
{
        int rc;

        progress_say(&j->s->progress, "%s: computing the reference", j->w.spec.name);
        describe_server(j);
        rc = make_reference(j);
        if (rc == 0)
                rc = conversation_new(&j->w, &j->conv);
        j->digests = calloc(j->me.turns, sizeof *j->digests);
        if (rc == 0 && !j->digests)
                rc = err_set(-ENOMEM, "out of memory for digests");
        if (rc < 0)
                return rc;
        each_row(j, "set-up", set_up_row, false);
        each_row(j, "check pass", check_row, true);
        all_wire_floors(j);
        each_row(j, "warm-up", warm_row, true);
        return stopped(j->s) ? err_set(-EINTR, "interrupted before the first block") : run_blocks(j);
}

static void free_job(struct job *j)
{
        for (size_t i = 0; i < j->me.nrows; i++) {
                struct row *r = &j->me.rows[i];

                for (uint32_t t = 0; t < j->me.turns; t++) {
                        if (r->execs)
                                exec_free(&r->execs[t]);
                        if (r->plans)
                                plan_free(&r->plans[t]);
                }
                external_close(r->external);
                free(r->execs);
                free(r->plans);
                free(r->samples);
                free(r->nets);
                free(r->digests);
        }
        for (uint32_t b = 0; j->me.order && b < (uint32_t)j->s->opts->exp->runs; b++)
                free(j->me.order[b]);
        free(j->me.order);
        free(j->me.order_len);
        free(j->me.launch);
        free(j->me.rows);
        for (size_t t = 0; t < EXP_TRANSPORTS_MAX; t++)
                for (int blind = 0; blind < 2; blind++) {
                        struct link *l = &j->s->links[t];

                        if (l->loaded[blind])
                                (void)remote_unload(&l->r, &l->models[blind]);
                        l->loaded[blind] = false;
                }
        conversation_free(&j->conv);
        free(j->digests);
        if (j->has_ref)
                reference_free(&j->ref);
        if (j->has_blind)
                graph_free(&j->blind);
        if (j->built)
                workload_free(&j->w);
}

static void count_verdicts(struct job *j)
{
        struct sweep_outcome *out = j->s->out;

        for (size_t i = 0; i < j->me.nrows; i++) {
                row_judge(&j->me, &j->me.rows[i]);
                out->valid += j->me.rows[i].verdict == VERDICT_VALID;
                out->skipped += j->me.rows[i].verdict == VERDICT_SKIPPED;
                out->invalid += j->me.rows[i].verdict != VERDICT_VALID && j->me.rows[i].verdict != VERDICT_SKIPPED;
        }
}

static int write_result(struct job *j)
{
        const struct sweep_opts *o = j->s->opts;
        json *doc = result_document(&j->me);
        int rc = json_save(doc, j->path);

        progress_end(&j->s->progress);
        if (rc == 0 && o->finished)
                o->finished(o->arg, doc, j->path);
        json_free(doc);
        return rc;
}

static int run_workload(struct session *s, const struct workload_spec *spec)
{
        struct job j = {.s = s, .me = {.opts = s->opts, .spec = spec, .ref = NULL, .turns = 1}};
        double cost_ns, resolution_ns;
        int rc = make_rows(&j);

        if (rc < 0)
                return rc;
        prng_seed(&j.rng, s->opts->exp->seed);
        clock_measure(&cost_ns, &resolution_ns);
        j.me.profile_cost_us = PROFILE_READINGS * cost_ns / 1e3;
        rc = open_result(&j);
        if (rc < 0) {
                free_job(&j);
                return rc;
        }
        rc = spec->kind && spec->kind->reason ? err_set(-ENOTSUP, "%s", spec->kind->reason) : build(&j, spec);
        if (rc == 0)
                rc = measure(&j);
        if (rc < 0 &&
            j.refused) { /* the file to go on with is of another sweep: nothing is measured, nothing written */
                free_job(&j);
                return rc;
        }
        if (rc < 0)
                skip_all(&j, rc == -ENOTSUP ? VERDICT_SKIPPED : VERDICT_INVALID, err_text());
        if (j.has_ref)
                j.me.ref = &j.ref;
        if (!j.me.have_server)
                describe_server(&j);
        count_verdicts(&j);
        rc = write_result(&j);
        free_job(&j);
        return rc;
}

/* ---- the sweep ---- */

static int connect_all(struct session *s)
{
        struct remote_opts ro = {.key = s->opts->key, .insecure = s->opts->insecure, .timeout_ns = s->opts->timeout_ns};
        int rc = 0;

        for (size_t t = 0; t < s->opts->exp->ntransports; t++) {
                struct link *l = &s->links[t];
                uint64_t start = clock_ns();

                progress_say(&s->progress, "connecting to %s", s->opts->urls[t]);
                rc = remote_open(s->opts->urls[t], &ro, &l->r);
                if (rc < 0)
                        return rc; /* a transport that was named is used or the run fails */
                l->connect_ns = clock_ns() - start;
                l->r.stop = s->opts->stop;
                l->open = true;
        }
        return 0;
}

#define RESULT_BYTES_MAX (1u << 30)

/* With --resume the workloads before the file's are done already. */
static int open_resume(struct session *s, size_t *first)
{
        const struct experiment *e = s->opts->exp;
        const char *name;

        *first = 0;
        if (!s->opts->resume)
                return 0;
        s->resume = json_load(s->opts->resume, RESULT_BYTES_MAX);
        if (!s->resume)
                return -EINVAL;
        name = json_str(json_get(json_get(s->resume, "workload"), "workload"), "");
        while (*first < e->nworkloads && strcmp(e->workloads[*first].name, name))
                ++*first;
        if (*first == e->nworkloads)
                return err_set(-EINVAL, "%s: its workload \"%s\" is not in %s", s->opts->resume, name, e->config_path);
        return 0;
}

int sweep_run(const struct sweep_opts *opts, struct sweep_outcome *out)
{
        struct session s = {.opts = opts, .out = out, .progress = {.to = opts->progress, .line = opts->progress_line}};
        size_t first;
        int rc;

        *out = (struct sweep_outcome){0};
        rc = open_resume(&s, &first);
        if (rc == 0)
                rc = model_roots_open(opts->model_roots, opts->nmodel_roots, &s.roots);
        if (rc == 0)
                rc = connect_all(&s);
        for (size_t i = first; i < opts->exp->nworkloads && rc == 0 && !stopped(&s); i++)
                if (exp_wanted(opts->exp->workloads[i].name, opts->workloads, opts->nworkloads))
                        rc = run_workload(&s, &opts->exp->workloads[i]);
        progress_end(&s.progress);
        out->interrupted = stopped(&s);
        for (size_t t = 0; t < EXP_TRANSPORTS_MAX; t++)
                if (s.links[t].open)
                        remote_close(&s.links[t].r);
        if (s.roots)
                model_roots_close(s.roots);
        json_free(s.resume);
        return rc;
}
