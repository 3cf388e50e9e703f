/* From samples to what a row says: per-block values, differences, breakdown, verdict. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "rows.h"

#define RESAMPLES               2000
#define BLOCKS_LEAST            6
#define RESIDUAL_SHARE          0.02
#define RESIDUAL_NS             5000.0 /* per round trip */
#define RESIDUAL_SHARE_EMULATED 0.10
#define RESIDUAL_NS_EMULATED    50000.0

const char *const verdict_names[] = {"VALID", "INVALID", "UNSTEADY", "FEW", "SKIPPED"};

/* ---- per block ---- */

static double sample_value(const struct sample *s, enum quantity q)
{
        switch (q) {
        case Q_EXECUTION:
                return (double)s->s.leaf_ns[LEAF_SERVER_EXECUTION];
        case Q_C2S_S2C:
                return (double)(s->s.leaf_ns[LEAF_NETWORK_C2S] + s->s.leaf_ns[LEAF_NETWORK_S2C]);
        default:
                return (double)s->s.latency_ns;
        }
}

/* Values of one block and turn; returns how many. Samples of a block lie together, in order of time. */
static size_t collect(const struct row *r, enum quantity q, uint32_t block, uint32_t turn, double *out)
{
        size_t n = 0;

        if (q == Q_NETWORK) {
                for (size_t i = 0; i < r->nnets; i++)
                        if (r->nets[i].block == block && r->nets[i].turn == turn)
                                out[n++] = (double)r->nets[i].ns;
                return n;
        }
        for (size_t i = 0; i < r->nsamples; i++)
                if (r->samples[i].block == block && r->samples[i].turn == turn)
                        out[n++] = sample_value(&r->samples[i], q);
        return n;
}

void row_block_values(const struct measured *me, const struct row *r, enum quantity q, double *out)
{
        size_t room = r->nsamples > r->nnets ? r->nsamples : r->nnets;
        double *v = malloc((room + 1) * sizeof *v);

        for (uint32_t b = 0; b < me->blocks; b++) {
                double sum = 0;

                for (uint32_t t = 0; t < me->turns; t++) {
                        size_t n = v ? collect(r, q, b, t, v) : 0;

                        sum += n ? stats_median(v, n) : NAN;
                }
                out[b] = sum / me->turns;
        }
        free(v);
}

/* Rows of different devices, thread counts or weights enter no common metric, nor does one that did another job. */
static bool comparable(const struct row *a, const struct row *b)
{
        if (!a->nsamples || !b->nsamples || !a->r || !b->r || a->verdict == VERDICT_INVALID ||
            b->verdict == VERDICT_INVALID)
                return false;
        return a->r->server.threads == b->r->server.threads && !strcmp(a->r->server.device, b->r->server.device) &&
               !memcmp(a->m->info.weights_digest, b->m->info.weights_digest, sizeof a->m->info.weights_digest);
}

const struct row *measured_native(const struct measured *me, const struct row *r)
{
        const char *ref = me->opts->exp->reference_baseline;

        for (size_t i = 0; i < me->nrows; i++)
                if (row_is_native(&me->rows[i]) && !strcmp(me->rows[i].name, ref) && comparable(&me->rows[i], r))
                        return &me->rows[i];
        return NULL;
}

const struct row *measured_find(const struct measured *me, const struct row *r, const char *baseline)
{
        for (size_t i = 0; i < me->nrows; i++)
                if (!strcmp(me->rows[i].name, baseline) && !strcmp(me->rows[i].transport, r->transport) &&
                    comparable(&me->rows[i], r))
                        return &me->rows[i];
        return NULL;
}

size_t rows_paired(const struct measured *me, const struct row *a, const struct row *b, enum quantity q, double *va,
                   double *vb, uint32_t *launch)
{
        size_t n = 0;

        row_block_values(me, a, q, va);
        row_block_values(me, b, q, vb);
        for (uint32_t k = 0; k < me->blocks; k++) {
                if (isnan(va[k]) || isnan(vb[k]))
                        continue;
                va[n] = va[k], vb[n] = vb[k], launch[n] = me->launch[k];
                n++;
        }
        return n;
}

/* ---- the decomposition ---- */

enum { COL_LATENCY, COL_NATIVE, COL_NETWORK, COL_EXEC, COL_NATIVE_EXEC, COL_WIRE, COLS };

/* Keeps the blocks in which every column is known; returns how many. */
static size_t keep_whole(double *col[COLS], uint32_t *launch, size_t n, unsigned needed)
{
        size_t k = 0;

        for (size_t b = 0; b < n; b++) {
                bool whole = true;

                for (int c = 0; c < COLS; c++)
                        whole = whole && (!(needed >> c & 1) || !isnan(col[c][b]));
                if (!whole)
                        continue;
                for (int c = 0; c < COLS; c++)
                        col[c][k] = col[c][b];
                launch[k++] = launch[b];
        }
        return k;
}

static void estimate_all(const struct measured *me, double *col[COLS], const uint32_t *launch, size_t n, bool native,
                         struct decomposition *out)
{
        uint64_t seed = me->opts->exp->seed ^ 0x5eed;
        double *fw = malloc((n + 1) * sizeof *fw);

        if (!fw)
                return;
        out->latency = stats_boot_median(col[COL_LATENCY], launch, n, RESAMPLES, seed);
        out->network = stats_boot_median(col[COL_NETWORK], launch, n, RESAMPLES, seed);
        out->network_difference = stats_diff(col[COL_WIRE], col[COL_NETWORK], launch, n, RESAMPLES, seed);
        if (native) {
                for (size_t b = 0; b < n; b++)
                        fw[b] = (col[COL_LATENCY][b] - col[COL_NATIVE][b]) - col[COL_NETWORK][b] -
                                (col[COL_EXEC][b] - col[COL_NATIVE_EXEC][b]);
                out->native = stats_boot_median(col[COL_NATIVE], launch, n, RESAMPLES, seed);
                out->delta = stats_diff(col[COL_LATENCY], col[COL_NATIVE], launch, n, RESAMPLES, seed);
                out->extra_execution = stats_diff(col[COL_EXEC], col[COL_NATIVE_EXEC], launch, n, RESAMPLES, seed);
                out->framework = stats_boot_median(fw, launch, n, RESAMPLES, seed);
        }
        free(fw);
}

void row_decompose(const struct measured *me, const struct row *r, struct decomposition *out)
{
        const struct row *native = measured_native(me, r);
        double *col[COLS];
        uint32_t *launch = calloc(me->blocks + 1, sizeof *launch);
        struct estimate none = {.value = NAN, .ci95 = {.known = false, .lo = NAN, .hi = NAN}};
        unsigned needed = 1u << COL_LATENCY;
        size_t n = me->blocks;
        bool room = launch;

        *out = (struct decomposition){none, none, none, none, none, none, none, none, false};
        for (int c = 0; c < COLS; c++) {
                col[c] = calloc(n + 1, sizeof(double));
                room = room && col[c];
        }
        if (room && n) {
                memcpy(launch, me->launch, n * sizeof *launch);
                row_block_values(me, r, Q_LATENCY, col[COL_LATENCY]);
                row_block_values(me, r, Q_NETWORK, col[COL_NETWORK]);
                row_block_values(me, r, Q_EXECUTION, col[COL_EXEC]);
                row_block_values(me, r, Q_C2S_S2C, col[COL_WIRE]);
                if (native && !row_is_external(r)) {
                        row_block_values(me, native, Q_LATENCY, col[COL_NATIVE]);
                        row_block_values(me, native, Q_EXECUTION, col[COL_NATIVE_EXEC]);
                        needed |= 1u << COL_NATIVE;
                }
                if (row_is_remote(r))
                        needed |= 1u << COL_NETWORK;
                n = keep_whole(col, launch, n, needed);
                if (!row_is_remote(r))
                        out->latency = stats_boot_median(col[COL_LATENCY], launch, n, RESAMPLES, me->opts->exp->seed);
                else
                        estimate_all(me, col, launch, n, native != NULL, out);
                out->comparable = native && row_is_remote(r);
        }
        if (!isnan(r->wire_floor_ns))
                out->wire_floor.value = r->wire_floor_ns;
        for (int c = 0; c < COLS; c++)
                free(col[c]);
        free(launch);
}

/* ---- the breakdown ---- */

static int by_latency(const void *a, const void *b)
{
        uint64_t x = (*(const struct sample *const *)a)->s.latency_ns,
                 y = (*(const struct sample *const *)b)->s.latency_ns;

        return x < y ? -1 : x > y;
}

/* Adds the means of one turn's interquartile set. Turns are populations of their own: their latencies differ by design. */
static void add_turn(const struct row *r, uint32_t turn, const struct sample **v, struct breakdown *out)
{
        size_t n = 0, from, to;
        double k;

        for (size_t i = 0; i < r->nsamples; i++)
                if (r->samples[i].turn == turn)
                        v[n++] = &r->samples[i];
        qsort(v, n, sizeof *v, by_latency);
        from = n / 4, to = n - from;
        k = to > from ? 1.0 / (double)(to - from) : 0;
        for (size_t i = from; i < to; i++) {
                const struct exec_sample *s = &v[i]->s;

                for (int l = 0; l < LEAF_COUNT; l++)
                        out->leaf[l] += k * (double)s->leaf_ns[l];
                out->residual += k * (double)s->residual_ns;
                out->server_residual += k * (double)s->server_residual_ns;
                out->latency += k * (double)s->latency_ns;
                out->duration += k * (double)s->server_duration_ns;
                out->executor += k * (double)s->executor_ns;
                out->cleanup += k * (double)s->cleanup_ns;
                out->first_token += k * (double)s->first_token_ns;
                out->n++;
        }
}

void row_breakdown(const struct measured *me, const struct row *r, struct breakdown *out)
{
        const struct sample **v = malloc((r->nsamples + 1) * sizeof *v);

        *out = (struct breakdown){0};
        for (uint32_t t = 0; v && t < me->turns; t++)
                add_turn(r, t, v, out);
        for (double *d = &out->leaf[0]; d <= &out->first_token; d++)
                *d /= me->turns;
        free(v);
}

/* ---- work and wire, per conversation ---- */

struct graph_cost row_work(const struct measured *me, const struct row *r, double *tokens)
{
        struct graph_cost sum = {0};

        *tokens = 0;
        for (uint32_t t = 0; t < me->turns && r->plans; t++) {
                const struct graph_cost *c = &r->plans[t].work;

                sum.flop += c->flop;
                sum.bytes += c->bytes;
                sum.weight_bytes += c->weight_bytes;
                sum.head_flop += c->head_flop;
                sum.head_weight_bytes += c->head_weight_bytes;
                sum.ops += c->ops;
                *tokens += r->plans[t].tokens;
        }
        return sum;
}

void row_predicted(const struct measured *me, const struct row *r, struct plan_bytes *up, struct plan_bytes *down,
                   uint64_t *round_trips)
{
        *up = *down = (struct plan_bytes){0};
        *round_trips = 0;
        for (uint32_t t = 0; t < me->turns && r->plans; t++) {
                plan_bytes_add(up, &r->plans[t].up);
                plan_bytes_add(down, &r->plans[t].down);
                *round_trips += r->plans[t].round_trips;
        }
}

/* ---- two clocks ---- */

void row_settle_clock(struct row *r, struct sample *samples, size_t n, const struct offset *before,
                      const struct offset *after)
{
        uint64_t bound = offset_bound(before, after);

        for (size_t i = 0; i < n; i++) {
                struct exec_sample *s = &samples[i].s;

                exec_settle(s, offset_between(before, after, s->start_ns + s->latency_ns / 2) - before->ns, bound);
        }
        if (!r->clock.known)
                r->clock.first_ns = before->ns;
        r->clock.known = true;
        r->clock.last_ns = after->ns;
        r->clock.error_ns = bound > r->clock.error_ns ? bound : r->clock.error_ns;
}

/* ---- the verdict ---- */

static bool wire_agrees(const struct measured *me, struct row *r)
{
        struct plan_bytes up, down;
        uint64_t trips, n = r->nsamples / me->turns;
        const struct wire_count *w = &r->wire;
        uint64_t extra = injury.payload_bytes * n * me->turns;

        row_predicted(me, r, &up, &down, &trips);
        if (w->up_messages == up.messages * n && w->up_msg_bytes == up.msg_bytes * n &&
            w->up_bulk_bytes == up.bulk_bytes * n + extra && w->down_messages == down.messages * n &&
            w->down_msg_bytes == down.msg_bytes * n && w->down_bulk_bytes == down.bulk_bytes * n)
                return true;
        snprintf(
            r->reason, sizeof r->reason,
            "the transport's counters differ from the plan: up %llu messages, %llu B in them, %llu B written (planned "
            "%llu, %llu, %llu); down %llu, %llu, %llu (planned %llu, %llu, %llu)",
            (unsigned long long)w->up_messages, (unsigned long long)w->up_msg_bytes,
            (unsigned long long)w->up_bulk_bytes, (unsigned long long)(up.messages * n),
            (unsigned long long)(up.msg_bytes * n), (unsigned long long)(up.bulk_bytes * n),
            (unsigned long long)w->down_messages, (unsigned long long)w->down_msg_bytes,
            (unsigned long long)w->down_bulk_bytes, (unsigned long long)(down.messages * n),
            (unsigned long long)(down.msg_bytes * n), (unsigned long long)(down.bulk_bytes * n));
        return false;
}

static double median_abs(const struct row *r, size_t offset, double *v)
{
        for (size_t i = 0; i < r->nsamples; i++)
                v[i] = fabs((double)*(const int64_t *)((const char *)&r->samples[i].s + offset));
        return stats_median(v, r->nsamples);
}

struct residual row_residual(const struct measured *me, const struct row *r)
{
        bool emulated = r->r && r->r->attr.emulated;
        double *v = malloc((r->nsamples + 1) * sizeof *v);
        struct residual x = {0};
        struct plan_bytes up, down;
        uint64_t trips;
        struct breakdown bd;

        if (!v || !r->nsamples) {
                free(v);
                return x;
        }
        row_predicted(me, r, &up, &down, &trips);
        row_breakdown(me, r, &bd);
        x.limit = fmax((emulated ? RESIDUAL_SHARE_EMULATED : RESIDUAL_SHARE) * bd.latency,
                       (emulated ? RESIDUAL_NS_EMULATED : RESIDUAL_NS) * (double)trips / me->turns);
        x.server = median_abs(r, offsetof(struct exec_sample, server_residual_ns), v);
        x.client = median_abs(r, offsetof(struct exec_sample, residual_ns), v);
        for (size_t i = 0; i < r->nsamples; i++)
                x.share_over += (v[i] > x.limit) / (double)r->nsamples;
        free(v);
        return x;
}

static bool leaves_add_up(const struct measured *me, struct row *r)
{
        struct residual x = row_residual(me, r);
        size_t disordered = 0;

        for (size_t i = 0; i < r->nsamples; i++)
                disordered += r->samples[i].s.disordered;
        if (disordered > r->nsamples / 100) {
                snprintf(r->reason, sizeof r->reason,
                         "the stamps of %zu of %zu requests are out of order: clock or server lie", disordered,
                         r->nsamples);
                return false;
        }
        if (x.client <= x.limit && x.server <= x.limit)
                return true;
        snprintf(r->reason, sizeof r->reason,
                 "the leaves do not add up: residual %.1f us, server residual %.1f us, above %.1f us", x.client / 1e3,
                 x.server / 1e3, x.limit / 1e3);
        return false;
}

static bool same_calls(const struct plan *a, const struct plan *b)
{
        if (a->ncalls != b->ncalls)
                return false;
        for (size_t i = 0; i < a->ncalls; i++) {
                const struct plan_call *x = &a->calls[i], *y = &b->calls[i];

                if (x->run.nranges != y->run.nranges ||
                    memcmp(x->ranges, y->ranges, x->run.nranges * sizeof x->ranges[0]) ||
                    memcmp(x->cursor, y->cursor, sizeof x->cursor))
                        return false;
        }
        return true;
}

/* The same nodes over the same rows on the same engine: the same kernels in the same order. */
static bool same_work(const struct measured *me, const struct row *a, const struct row *b)
{
        if (!a->plans || !b->plans || !comparable(a, b))
                return false;
        for (uint32_t t = 0; t < me->turns; t++)
                if (!same_calls(&a->plans[t], &b->plans[t]))
                        return false;
        return true;
}

/* Which must give the same bits, whatever carries them. */
static bool bits_agree(const struct measured *me, struct row *r)
{
        static const struct digest none;

        for (const struct row *x = me->rows; x < r; x++) {
                if (!same_work(me, x, r))
                        continue;
                for (uint32_t b = me->resumed; b < me->blocks; b++) {
                        if (digest_equal(x->digests[b], none) || digest_equal(r->digests[b], none) ||
                            digest_equal(x->digests[b], r->digests[b]))
                                continue;
                        snprintf(
                            r->reason, sizeof r->reason,
                            "the result of block %u differs from that of %s over %s, though plan, device and threads "
                            "are the same",
                            b, x->name, x->transport);
                        return false;
                }
        }
        return true;
}

/* What the server says that it did is what it was asked to do. */
static bool switches_applied(struct row *r)
{
        const struct switches *sw = &r->b->sw;
        uint32_t want = (sw->plan_cache ? RUN_PLAN_CACHE : 0) | (sw->state == SW_STATE_RECOMPUTE ? 0 : RUN_KEEP_STATE) |
                        (sw->buffers == SW_IN_PROCESS ? RUN_LOCAL : 0) |
                        (sw->buffers == SW_SERIALIZED ? DONE_SERIALIZED : 0);
        uint32_t mask = RUN_PLAN_CACHE | RUN_KEEP_STATE | RUN_LOCAL | DONE_SERIALIZED;

        for (size_t i = r->resumed_samples; i < r->nsamples; i++)
                if ((r->samples[i].s.applied & mask) != want) {
                        snprintf(r->reason, sizeof r->reason,
                                 "the server applied other switches (0x%x) than it was asked to (0x%x)",
                                 r->samples[i].s.applied & mask, want);
                        return false;
                }
        return true;
}

static bool judge_invalid(const struct measured *me, struct row *r)
{
        if (!r->check.done || !r->check.passed) {
                snprintf(r->reason, sizeof r->reason, "not the same job: %s",
                         r->check.done ? r->check.why : "the check pass did not run");
                return true;
        }
        if (r->digest_errors) {
                snprintf(r->reason, sizeof r->reason, "%zu of %zu timed results differ from the untimed one",
                         r->digest_errors, r->nsamples);
                return true;
        }
        if (injury.active && !getenv("DJINN_INJURE_KEEP")) {
                snprintf(r->reason, sizeof r->reason, "injured on purpose (DJINN_INJURE)");
                return true;
        }
        if (row_is_external(r)) /* no plan, no leaves, kernels of its own */
                return false;
        return (!row_is_native(r) && !wire_agrees(me, r)) || !switches_applied(r) || !leaves_add_up(me, r) ||
               !bits_agree(me, r);
}

void row_judge(const struct measured *me, struct row *r)
{
        if (r->verdict == VERDICT_SKIPPED || r->verdict == VERDICT_INVALID)
                return;
        if (judge_invalid(me, r)) {
                r->verdict = VERDICT_INVALID;
        } else if (!r->steady) {
                r->verdict = VERDICT_UNSTEADY;
                snprintf(r->reason, sizeof r->reason, "not steady after %llu warm-up requests",
                         (unsigned long long)r->warm_requests);
        } else if (me->blocks < BLOCKS_LEAST) {
                r->verdict = VERDICT_FEW;
                snprintf(r->reason, sizeof r->reason, "%u blocks; an interval needs %d", me->blocks, BLOCKS_LEAST);
        }
}
