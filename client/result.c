/* The result document (results/djinnbench.result.schema.json). What was not measured is null, never 0. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "clock.h"
#include "manifest.h"
#include "rows.h"

#define MB        1048576.0
#define RESAMPLES 2000
#define SEED_SALT 0x5eedu /* resampling must not repeat the order's random numbers */

static double ms(double ns)
{
        return ns / 1e6;
}

static json *hex_digest(struct digest d)
{
        char text[33];

        digest_hex(d, text);
        return json_of_str(text);
}

/* ---- statistics ---- */

static json *interval(struct interval ci)
{
        json *o;

        if (!ci.known)
                return json_of_null();
        o = json_object();
        json_set_num(o, "lo", ci.lo);
        json_set_num(o, "hi", ci.hi);
        return o;
}

static json *labelled(struct interval ci, double scale, bool within_launch)
{
        json *o;

        if (!ci.known)
                return json_of_null();
        o = json_object();
        json_set_num(o, "lo", ci.lo * scale);
        json_set_num(o, "hi", ci.hi * scale);
        json_set_str(o, "label", within_launch ? "within launch" : NULL);
        return o;
}

/* ns to µs, with the sentence for an interval around 0. */
static json *estimate_us(const struct estimate *e, bool difference)
{
        struct interval ci = {e->ci95.known, e->ci95.lo / 1e3, e->ci95.hi / 1e3};
        char text[96];
        json *o;

        if (isnan(e->value))
                return json_of_null();
        o = json_object();
        json_set_num(o, "value", e->value / 1e3);
        json_set(o, "ci95", interval(ci));
        json_set_bool(o, "within_launch", e->within_launch);
        if (difference && ci.known && ci.lo <= 0 && ci.hi >= 0) {
                snprintf(text, sizeof text, "not distinguishable from 0, at most %.1f \302\265s", fmax(ci.hi, 0));
                json_set_str(o, "statement", text);
        } else {
                json_set_null(o, "statement");
        }
        return o;
}

static json *aggregate(const double *v, size_t n)
{
        struct summary s = stats_summary(v, n);
        json *o = json_object();

        json_set_num(o, "mean", s.mean);
        json_set_num(o, "median", s.median);
        json_set_num(o, "p95", s.p95);
        json_set_num(o, "min", s.min);
        json_set_num(o, "max", s.max);
        json_set_num(o, "sd", s.sd);
        json_set_int(o, "n", (int64_t)s.n);
        json_set_num(o, "p90", s.p90);
        json_set_num(o, "p95_bounded", s.p95_bounded);
        json_set_num(o, "p99", s.p99);
        json_set(o, "ci95", interval(s.ci95));
        return o;
}

/* ---- one request: one table for runs[] and aggregates{} ---- */

struct context { /* what a field may need beside the sample */
        const struct measured *me;
        const struct row *r;
        double units, in_mb, out_mb;
};

static bool native_lacks(enum leaf l)
{
        return l <= LEAF_SERVER_PLAN || l == LEAF_NETWORK_S2C || l == LEAF_CLIENT_DESERIALIZE || l == LEAF_CLIENT_STEP;
}

static double leaf_value(const struct context *c, const struct sample *s, int l)
{
        if (row_is_external(c->r) || (row_is_native(c->r) && native_lacks((enum leaf)l)))
                return NAN;
        return ms((double)s->s.leaf_ns[l]);
}

static double f_latency(const struct context *c, const struct sample *s)
{
        (void)c;
        return ms((double)s->s.latency_ns);
}

static double f_throughput(const struct context *c, const struct sample *s)
{
        return c->units / ((double)s->s.latency_ns / 1e9);
}

static double f_input(const struct context *c, const struct sample *s)
{
        return row_is_remote(c->r) ? (double)c->r->plans[s->turn].up.payload_bytes / MB : c->in_mb;
}

static double f_output(const struct context *c, const struct sample *s)
{
        return row_is_remote(c->r) ? (double)c->r->plans[s->turn].down.payload_bytes / MB : c->out_mb;
}

static double f_total(const struct context *c, const struct sample *s)
{
        return f_input(c, s) + f_output(c, s);
}

static double f_units(const struct context *c, const struct sample *s)
{
        (void)s;
        return c->units;
}

static double f_residual(const struct context *c, const struct sample *s)
{
        return row_is_external(c->r) ? NAN : ms((double)s->s.residual_ns);
}

static double f_server_residual(const struct context *c, const struct sample *s)
{
        return row_is_remote(c->r) ? ms((double)s->s.server_residual_ns) : NAN;
}

static double f_duration(const struct context *c, const struct sample *s)
{
        return row_is_external(c->r) ? NAN : ms((double)s->s.server_duration_ns);
}

static double f_executor(const struct context *c, const struct sample *s)
{
        return row_is_external(c->r) ? NAN : ms((double)s->s.executor_ns);
}

static double f_cleanup(const struct context *c, const struct sample *s)
{
        return row_is_remote(c->r) ? ms((double)s->s.cleanup_ns) : NAN;
}

static double f_first_token(const struct context *c, const struct sample *s)
{
        (void)c;
        return s->s.first_token_ns ? ms((double)s->s.first_token_ns) : NAN;
}

static double f_per_token(const struct context *c, const struct sample *s)
{
        int64_t n = c->me->spec->new_tokens;

        return s->s.first_token_ns && n > 1 ? ms((double)(s->s.latency_ns - s->s.first_token_ns)) / (double)(n - 1)
                                            : NAN;
}

static double f_network(const struct context *c, const struct sample *s)
{
        double v[256];
        size_t n = 0;

        for (size_t i = 0; i < c->r->nnets && n < ARRAY_LEN(v); i++)
                if (c->r->nets[i].block == s->block && c->r->nets[i].turn == s->turn)
                        v[n++] = (double)c->r->nets[i].ns;
        return n ? ms(stats_median(v, n)) : NAN;
}

static double f_floor(const struct context *c, const struct sample *s)
{
        (void)s;
        return ms(c->r->wire_floor_ns);
}

struct field {
        const char *key;
        double (*get)(const struct context *c, const struct sample *s);
        bool in_run, in_aggregate;
};

static const struct field fields[] = {
    {"latency_ms", f_latency, true, true},
    {"input_mb", f_input, true, false},
    {"output_mb", f_output, true, false},
    {"total_data_mb", f_total, true, true},
    {"units_processed", f_units, true, false},
    {"throughput_units_per_s", f_throughput, true, true},
    {"residual_ms", f_residual, true, true},
    {"server_residual_ms", f_server_residual, true, true},
    {"server_duration_ms", f_duration, true, true},
    {"server_executor_time_ms", f_executor, true, true},
    {"server_cleanup_ms", f_cleanup, true, true},
    {"time_to_first_token_ms", f_first_token, true, true},
    {"time_per_output_token_ms", f_per_token, true, true},
    {"network_ms", f_network, true, false}, /* of its block; the aggregate is over the calibrations themselves */
    {"wire_floor_ms", f_floor, true, false},
};

static struct context context_of(const struct measured *me, const struct row *r)
{
        struct context c = {.me = me, .r = r, .units = workload_units(me->spec)};
        struct plan_bytes up, down;
        uint64_t trips;

        row_predicted(me, r, &up, &down, &trips);
        if (row_is_remote(r)) {
                c.in_mb = (double)up.payload_bytes / me->turns / MB;
                c.out_mb = (double)down.payload_bytes / me->turns / MB;
        }
        if (row_is_external(r))
                c.in_mb = c.out_mb = NAN; /* lines of text, which are outside its latency */
        return c;
}

static json *one_run(const struct context *c, size_t i)
{
        const struct sample *s = &c->r->samples[i];
        json *o = json_object();

        json_set_int(o, "run_id", (int64_t)i);
        json_set_int(o, "block", s->block);
        json_set_int(o, "launch", s->launch);
        json_set(o, "turn", c->me->turns > 1 ? json_of_int(s->turn) : json_of_null());
        for (size_t f = 0; f < ARRAY_LEN(fields); f++)
                if (fields[f].in_run)
                        json_set_num(o, fields[f].key, fields[f].get(c, s));
        for (int l = 0; l < LEAF_COUNT; l++)
                json_set_num(o, leaf_keys[l], leaf_value(c, s, l));
        json_set_null(o, "overlap_ms");
        json_set_bool(o, "digest_ok", s->digest_ok);
        return o;
}

static json *all_runs(const struct context *c)
{
        json *a = json_array();

        for (size_t i = 0; i < c->r->nsamples; i++)
                json_push(a, one_run(c, i));
        return a;
}

static void set_aggregate(json *o, const char *key, const double *v, size_t n)
{
        for (size_t i = 0; i < n; i++)
                if (isnan(v[i]))
                        return;
        if (n)
                json_set(o, key, aggregate(v, n));
}

static void set_networks(json *o, const struct row *r)
{
        double *v = malloc((r->nnets + 1) * sizeof *v);

        for (size_t i = 0; v && i < r->nnets; i++)
                v[i] = ms((double)r->nets[i].ns);
        if (v)
                set_aggregate(o, "network_ms", v, r->nnets);
        free(v);
}

static json *all_aggregates(const struct context *c)
{
        double *v = malloc((c->r->nsamples + 1) * sizeof *v);
        json *o = json_object();

        for (size_t f = 0; v && f < ARRAY_LEN(fields); f++) {
                if (!fields[f].in_aggregate)
                        continue;
                for (size_t i = 0; i < c->r->nsamples; i++)
                        v[i] = fields[f].get(c, &c->r->samples[i]);
                set_aggregate(o, fields[f].key, v, c->r->nsamples);
        }
        set_networks(o, c->r);
        for (int l = 0; v && l < LEAF_COUNT; l++) {
                for (size_t i = 0; i < c->r->nsamples; i++)
                        v[i] = leaf_value(c, &c->r->samples[i], l);
                set_aggregate(o, leaf_keys[l], v, c->r->nsamples);
        }
        free(v);
        return o;
}

/* ---- the row's other objects ---- */

static json *breakdown(const struct measured *me, const struct row *r)
{
        struct breakdown b;
        json *o;

        if (!r->nsamples || row_is_external(r))
                return json_of_null();
        row_breakdown(me, r, &b);
        o = json_object();
        for (int l = 0; l < LEAF_COUNT; l++)
                json_set_num(o, leaf_keys[l], row_is_native(r) && native_lacks((enum leaf)l) ? NAN : ms(b.leaf[l]));
        json_set_num(o, "residual_ms", ms(b.residual));
        json_set_num(o, "server_residual_ms", row_is_native(r) ? NAN : ms(b.server_residual));
        json_set_null(o, "overlap_ms");
        json_set_num(o, "latency_ms", ms(b.latency));
        json_set_num(o, "server_executor_time_ms", ms(b.executor));
        json_set_num(o, "server_duration_ms", ms(b.duration));
        json_set_num(o, "server_cleanup_ms", row_is_native(r) ? NAN : ms(b.cleanup));
        json_set_num(o, "time_to_first_token_ms", b.first_token > 0 ? ms(b.first_token) : NAN);
        return o;
}

static json *decomposition(const struct decomposition *d)
{
        json *o = json_object();

        json_set(o, "latency_us", estimate_us(&d->latency, false));
        json_set(o, "native_us", estimate_us(&d->native, false));
        json_set(o, "delta_us", estimate_us(&d->delta, true));
        json_set(o, "network_us", estimate_us(&d->network, false));
        json_set(o, "extra_execution_us", estimate_us(&d->extra_execution, true));
        json_set(o, "framework_overhead_us", estimate_us(&d->framework, true));
        json_set(o, "wire_floor_us", estimate_us(&d->wire_floor, false));
        json_set(o, "network_difference_us", estimate_us(&d->network_difference, true));
        return o;
}

static json *direction(double payload, double header, double messages, double copied, double retransmitted)
{
        json *o = json_object();

        json_set_num(o, "payload_bytes", payload);
        json_set_num(o, "header_bytes", header);
        json_set_num(o, "messages", messages);
        json_set_num(o, "copies_bytes", copied);
        json_set_num(o, "retransmitted_bytes", retransmitted);
        return o;
}

static json *predicted_direction(const struct plan_bytes *b, double turns)
{
        json *o = json_object();

        json_set_num(o, "payload_bytes", (double)b->payload_bytes / turns);
        json_set_num(o, "messages", (double)b->messages / turns);
        json_set_num(o, "header_bytes", (double)(b->msg_bytes + b->bulk_bytes - b->payload_bytes) / turns);
        return o;
}

/* Per request. What is not payload is header: frames, their arrays, encodings, and the transport's own framing. */
static json *wire(const struct measured *me, const struct row *r)
{
        const struct wire_count *w = &r->wire;
        struct plan_bytes up, down, none = {0};
        uint64_t trips;
        double n = (double)r->nsamples, turns = me->turns, copied = 0;
        double counted = n - (double)r->resumed_samples; /* requests of this launch: what is known of the framing */
        bool native = row_is_native(r);
        json *o, *p;

        if (!r->nsamples || row_is_external(r))
                return json_of_null();
        row_predicted(me, r, &up, &down, &trips);
        if (native)
                up = down = none, trips = 0;
        for (size_t i = r->resumed_samples; i < r->nsamples; i++)
                copied += native ? 0 : (double)r->samples[i].s.bytes_copied;
        o = json_object();
        json_set(o, "up",
                 native ? direction(0, 0, 0, 0, 0)
                        : direction((double)up.payload_bytes / turns,
                                    (double)(w->up_msg_bytes + w->up_bulk_bytes) / n +
                                        (double)w->up_header_bytes / counted - (double)up.payload_bytes / turns,
                                    (double)w->up_messages / n, copied / counted + (double)w->client_copied / counted,
                                    NAN));
        json_set(o, "down",
                 native ? direction(0, 0, 0, 0, 0)
                        : direction((double)down.payload_bytes / turns,
                                    (double)(w->down_msg_bytes + w->down_bulk_bytes) / n +
                                        (double)w->down_header_bytes / counted - (double)down.payload_bytes / turns,
                                    (double)w->down_messages / n, (double)w->server_copied / counted, NAN));
        json_set_num(o, "round_trips", native ? 0 : (double)w->up_messages / n);
        p = json_object();
        json_set(p, "up", predicted_direction(&up, turns));
        json_set(p, "down", predicted_direction(&down, turns));
        json_set_num(p, "round_trips", (double)trips / turns);
        json_set(o, "predicted", p);
        json_set(o, "driver_copies",
                 native                         ? json_of_int(0)
                 : r->r->attr.driver_copies < 0 ? json_of_null()
                                                : json_of_int(r->r->attr.driver_copies));
        return o;
}

/* Of an external program only what it says is known. */
static json *external_work(const struct measured *me, const struct row *r)
{
        static const char *const unknown[] = {"flop", "flop_head", "weight_bytes", "weight_bytes_head", "ops"};
        const struct external_info *info = external_info(r->external);
        json *o = json_object();

        json_set_int(o, "requests", (int64_t)r->nsamples);
        json_set_num(o, "tokens", me->w->driver == DRIVE_CAUSAL ? (double)me->spec->new_tokens * me->ref->batch : NAN);
        for (size_t i = 0; i < ARRAY_LEN(unknown); i++)
                json_set_null(o, unknown[i]);
        json_set_int(o, "threads", info->threads);
        json_set_str(o, "device", info->device);
        return o;
}

/* Instructions that the server ran, per request: of the last conversation, for all are alike. */
static double mean_ops(const struct measured *me, const struct row *r)
{
        double sum = 0;

        if (r->nsamples < me->turns || r->nsamples == r->resumed_samples)
                return NAN;
        for (size_t i = r->nsamples - me->turns; i < r->nsamples; i++)
                sum += r->samples[i].s.ops;
        return sum / me->turns;
}

static json *work(const struct measured *me, const struct row *r)
{
        double tokens, turns = me->turns;
        struct graph_cost c = row_work(me, r, &tokens);
        json *o;

        if (r->external && me->ref)
                return external_work(me, r);
        if (!r->plans)
                return json_of_null();
        o = json_object();
        json_set_int(o, "requests", (int64_t)r->nsamples);
        json_set_num(o, "tokens", me->w->driver == DRIVE_CAUSAL ? tokens / turns : NAN);
        json_set_num(o, "flop", c.flop / turns);
        json_set_num(o, "flop_head", c.head_flop / turns);
        json_set_num(o, "weight_bytes", c.weight_bytes / turns);
        json_set_num(o, "weight_bytes_head", c.head_weight_bytes / turns);
        json_set_num(o, "ops", mean_ops(me, r));
        json_set(o, "threads", r->r ? json_of_int(r->r->server.threads) : json_of_null());
        json_set_str(o, "device", r->r ? r->r->server.device : NULL);
        return o;
}

/* The ceilings that bind this row: arithmetic, and the rate of wherever its weights and states live. */
static json *roofline(const struct measured *me, const struct row *r)
{
        const struct msg_auth_reply *s = r->r ? &r->r->server : NULL;
        double tokens, turns = me->turns, exec, mem, comp, rate, *v;
        struct graph_cost c = row_work(me, r, &tokens);
        bool cached;
        json *o;

        if (!r->nsamples || row_is_external(r) || !me->have_server)
                return json_of_null();
        if (!(s->read_bytes_per_s > 0) || !(s->flop_per_s > 0))
                return json_of_null();
        v = malloc(r->nsamples * sizeof *v);
        if (!v)
                return json_of_null();
        for (size_t i = 0; i < r->nsamples; i++)
                v[i] = (double)r->samples[i].s.leaf_ns[LEAF_SERVER_EXECUTION] / 1e9;
        exec = stats_median(v, r->nsamples);
        free(v);
        cached = r->m->info.weights_bytes + r->m->info.state_bytes <= s->cache_bytes;
        rate = cached && s->cache_bytes_per_s > 0 ? s->cache_bytes_per_s : s->read_bytes_per_s;
        mem = c.bytes / turns / rate;
        comp = c.flop / turns / s->flop_per_s;
        o = json_object();
        json_set_str(o, "bound", mem < comp ? "compute" : cached ? "cache" : "memory");
        json_set_num(o, "share", exec > 0 ? fmax(mem, comp) / exec : NAN);
        json_set_num(o, "bytes_per_s", exec > 0 ? c.bytes / turns / exec : NAN);
        json_set_num(o, "flop_per_s", exec > 0 ? c.flop / turns / exec : NAN);
        return o;
}

static json *bit_equal(const struct measured *me, const struct row *r)
{
        json *a = json_array();

        for (size_t i = 0; i < me->nrows && r->nsamples && me->blocks; i++) {
                const struct row *x = &me->rows[i];
                char name[128];
                bool same = x != r && x->nsamples;

                for (uint32_t b = me->resumed; same && b < me->blocks; b++)
                        same = digest_equal(x->digests[b], r->digests[b]);
                if (!same)
                        continue;
                snprintf(name, sizeof name, "%s/%s", x->name, x->transport);
                json_push(a, json_of_str(name));
        }
        return a;
}

static json *check(const struct measured *me, const struct row *r)
{
        json *o;

        if (!r->check.done)
                return json_of_null();
        o = json_object();
        json_set_str(o, "reference", me->ref ? me->ref->device : NULL);
        json_set_num(o, "max_rel_l2", r->check.max_rel_l2);
        json_set_num(o, "tolerance", r->check.tolerance);
        json_set_bool(o, "argmax_equal", r->check.argmax_equal);
        json_set_bool(o, "digest_sensitive", r->check.digest_sensitive);
        json_set(o, "near_tie_position", r->check.near_tie >= 0 ? json_of_int(r->check.near_tie) : json_of_null());
        json_set(o, "bit_equal_to", bit_equal(me, r));
        return o;
}

static json *switch_values(const struct switches *sw)
{
        json *o = json_object();

        json_set_str(o, "weights", sw_weights_names[sw->weights]);
        json_set_str(o, "call", sw_call_names[sw->call]);
        json_set_str(o, "state", sw_state_names[sw->state]);
        json_set_str(o, "outputs", sw_outputs_names[sw->outputs]);
        json_set_str(o, "plan_cache", sw->plan_cache ? "on" : "off");
        json_set_str(o, "buffers", sw_buffers_names[sw->buffers]);
        return o;
}

/* As the server said in its last answer that it had done, where it can say. */
static json *switches(const struct row *r)
{
        struct switches applied = r->b->sw;
        json *o;

        if (!r->nsamples || row_is_external(r))
                return json_of_null();
        uint32_t f = r->samples[r->nsamples - 1].s.applied;

        applied.plan_cache = f & RUN_PLAN_CACHE;
        applied.buffers = f & RUN_LOCAL ? SW_IN_PROCESS : f & DONE_SERIALIZED ? SW_SERIALIZED : SW_REGISTERED;
        if (!(f & RUN_KEEP_STATE))
                applied.state = SW_STATE_RECOMPUTE;
        else if (applied.state == SW_STATE_RECOMPUTE)
                applied.state = SW_STATE_RESIDENT;
        o = json_object();
        json_set(o, "requested", switch_values(&r->b->sw));
        json_set(o, "applied", switch_values(&applied));
        return o;
}

/* ---- derived ---- */

/* Of two rows' blocks, paired. */
static struct estimate compare(const struct measured *me, const struct row *r, const struct row *to,
                               struct estimate (*how)(const double *, const double *, const uint32_t *, size_t,
                                                      uint32_t, uint64_t))
{
        struct estimate e = {.value = NAN, .ci95 = {.known = false, .lo = NAN, .hi = NAN}};
        double *a = calloc(me->blocks + 1, sizeof *a), *b = calloc(me->blocks + 1, sizeof *b);
        uint32_t *launch = calloc(me->blocks + 1, sizeof *launch);
        size_t n = a && b && launch ? rows_paired(me, r, to, Q_LATENCY, a, b, launch) : 0;

        if (n)
                e = how(a, b, launch, n, RESAMPLES, me->opts->exp->seed ^ SEED_SALT);
        free(a);
        free(b);
        free(launch);
        return e;
}

/* Ratio of the medians of two rows' blocks, with its interval. */
static struct estimate ratio_of(const struct measured *me, const struct row *r, const struct row *to)
{
        return compare(me, r, to, stats_ratio);
}

static double mean_latency(const struct row *r)
{
        double sum = 0;

        for (size_t i = 0; i < r->nsamples; i++)
                sum += (double)r->samples[i].s.latency_ns;
        return ms(sum / (double)r->nsamples);
}

static double mean_leaf(const struct row *r, enum leaf l)
{
        double sum = 0;

        for (size_t i = 0; i < r->nsamples; i++)
                sum += (double)r->samples[i].s.leaf_ns[l];
        return ms(sum / (double)r->nsamples);
}

static void set_vs(json *o, const char *what, const char *baseline, double value)
{
        char key[160];

        snprintf(key, sizeof key, "%s_vs_%s", what, baseline);
        json_set_num(o, key, value);
}

/* Efficiency: saved data over added latency. Only where the latency really is added: its interval excludes 0. */
static void set_efficiency(json *o, const struct context *c, const struct context *blind, const struct decomposition *d)
{
        double saved = blind ? (blind->in_mb + blind->out_mb) - (c->in_mb + c->out_mb) : NAN;
        bool added = d->delta.ci95.known && (d->delta.ci95.lo > 0 || d->delta.ci95.hi < 0) && d->native.value > 0;
        double total = blind ? blind->in_mb + blind->out_mb : NAN;

        json_set_num(o, "semantic_efficiency_ratio",
                     added && total > 0 ? 100 * saved / total / (100 * d->delta.value / d->native.value) : NAN);
        json_set_num(o, "bytes_saved_per_added_us",
                     added && d->delta.value > 0 ? saved * MB / (d->delta.value / 1e3) : NAN);
}

static json *derived(const struct context *c, const struct decomposition *d)
{
        const struct experiment *e = c->me->opts->exp;
        const struct row *r = c->r, *native = measured_native(c->me, c->r), *blind, *opaque;
        struct context bc;
        json *o = json_object();

        if (!r->nsamples || r->verdict == VERDICT_INVALID || row_is_external(r))
                return o;
        blind = measured_find(c->me, r, e->blind_baseline);
        opaque = measured_find(c->me, r, "blind_opaque");
        if (native && native != r)
                set_vs(o, "latency_overhead_pct", e->reference_baseline, 100 * (ratio_of(c->me, r, native).value - 1));
        if (blind && blind != r) {
                bc = context_of(c->me, blind);
                double saved = bc.in_mb + bc.out_mb - c->in_mb - c->out_mb;

                set_vs(o, "speedup", e->blind_baseline, ratio_of(c->me, blind, r).value);
                set_vs(o, "data_savings_pct", e->blind_baseline,
                       bc.in_mb + bc.out_mb > 0 ? 100 * saved / (bc.in_mb + bc.out_mb) : NAN);
                set_vs(o, "latency_delta_ms", e->blind_baseline, mean_latency(blind) - mean_latency(r));
                set_vs(o, "client_deserialize_delta_ms", e->blind_baseline,
                       mean_leaf(blind, LEAF_CLIENT_DESERIALIZE) - mean_leaf(r, LEAF_CLIENT_DESERIALIZE));
                set_vs(o, "client_serialize_delta_ms", e->blind_baseline,
                       mean_leaf(blind, LEAF_CLIENT_SERIALIZE) - mean_leaf(r, LEAF_CLIENT_SERIALIZE));
                set_vs(o, "server_execution_delta_ms", e->blind_baseline,
                       mean_leaf(blind, LEAF_SERVER_EXECUTION) - mean_leaf(r, LEAF_SERVER_EXECUTION));
        }
        if (opaque && opaque != r && (!blind || strcmp(e->blind_baseline, "blind_opaque")))
                set_vs(o, "speedup", "blind_opaque", ratio_of(c->me, opaque, r).value);
        set_efficiency(o, c, blind && blind != r ? &bc : NULL, d);
        return o;
}

static void set_interval(json *o, const char *what, const char *baseline, const struct estimate *e, double scale,
                         double less)
{
        struct interval ci = {e->ci95.known, scale * (e->ci95.lo - less), scale * (e->ci95.hi - less)};
        char key[160];

        snprintf(key, sizeof key, "%s_vs_%s", what, baseline);
        json_set(o, key, labelled(ci, 1, e->within_launch));
}

static json *intervals(const struct context *c, const struct decomposition *d)
{
        const struct experiment *e = c->me->opts->exp;
        const struct row *r = c->r, *native = measured_native(c->me, c->r);
        const char *blinds[] = {e->blind_baseline, "blind_opaque"};
        json *o = json_object();

        json_set(o, "latency_ms", labelled(d->latency.ci95, 1e-6, d->latency.within_launch));
        if (row_is_external(r))
                return o;
        if (native && native != r) {
                struct estimate ratio = ratio_of(c->me, r, native);

                set_interval(o, "latency_overhead_pct", e->reference_baseline, &ratio, 100, 1);
        }
        for (size_t i = 0; i < ARRAY_LEN(blinds); i++) {
                const struct row *blind = measured_find(c->me, r, blinds[i]);

                if (blind && blind != r) {
                        struct estimate ratio = ratio_of(c->me, blind, r);

                        set_interval(o, "speedup", blinds[i], &ratio, 1, 0);
                }
        }
        return o;
}

/* ---- a row ---- */

static void set_external(json *o, const struct row *r)
{
        json *command = json_array();

        for (const char *const *word = r->b->command; *word; word++)
                json_push(command, json_of_str(*word));
        json_set(o, "command", command);
        json_set_str(o, "external_name", r->external ? external_info(r->external)->name : NULL);
        json_set_str(o, "external_version", r->external ? external_info(r->external)->version : NULL);
}

static json *metadata(const struct context *c)
{
        const struct row *r = c->r;
        json *o = json_object(), *spec = json_object();
        const struct conf_node *params = c->me->spec->params;

        json_set_str(o, "unit_name", c->me->spec->unit_name);
        json_set_str(o, "device", c->me->opts->exp->device);
        json_set_str(o, "dtype", op_dtype_names[c->me->opts->exp->dtype]);
        json_set_str(spec, "implementation", c->me->spec->implementation);
        for (const struct conf_node *p = params ? params->first : NULL; p; p = p->next)
                if (p->kind == CONF_SCALAR)
                        json_set_str(spec, p->key, p->text);
        json_set(o, "spec", spec);
        json_set_str(o, "baseline", r->name);
        json_set_str(o, "runner_type", r->b->type);
        json_set_bool(o, "semantic_aware", r->b->semantic_aware);
        if (r->b->notes)
                json_set_str(o, "notes", r->b->notes);
        for (const struct conf_node *p = r->b->node ? r->b->node->first : NULL; p; p = p->next)
                if (p->kind == CONF_SCALAR && !json_get(o, p->key) && strcmp(p->key, "name") &&
                    strcmp(p->key, "type") && strcmp(p->key, "api_key"))
                        json_set_str(o, p->key, p->text);
        if (row_is_external(r))
                set_external(o, r);
        return o;
}

static json *outliers(const struct row *r)
{
        double *v = malloc((r->nsamples + 1) * sizeof *v);
        bool *flags = calloc(r->nsamples + 1, sizeof *flags);
        json *a = json_array();

        for (size_t i = 0; v && i < r->nsamples; i++)
                v[i] = (double)r->samples[i].s.latency_ns;
        if (v && flags && r->nsamples)
                stats_outliers(v, r->nsamples, flags);
        for (size_t i = 0; flags && i < r->nsamples; i++)
                if (flags[i])
                        json_push(a, json_of_int((int64_t)i));
        free(v);
        free(flags);
        return a;
}

static double autocorrelation(const struct measured *me, const struct row *r)
{
        double *v = calloc(me->blocks + 1, sizeof *v), a;
        size_t n = 0;

        if (!v)
                return NAN;
        row_block_values(me, r, Q_LATENCY, v);
        for (uint32_t b = 0; b < me->blocks; b++)
                if (!isnan(v[b]))
                        v[n++] = v[b];
        a = stats_autocorr1(v, n);
        free(v);
        return a;
}

/* Self-test: the twin against the row it repeats. */
static json *aa(const struct measured *me, const struct row *r)
{
        const struct row *twin = r->twin_of >= 0 ? &me->rows[r->twin_of] : NULL;
        struct estimate diff, ratio;
        json *o, *q;

        if (!twin || !r->nsamples || !twin->nsamples || !me->blocks)
                return json_of_null();
        diff = compare(me, r, twin, stats_diff);
        ratio = compare(me, r, twin, stats_ratio);
        o = json_object();
        json_set(o, "delta_us", estimate_us(&diff, true));
        q = json_object();
        json_set_num(q, "value", ratio.value);
        json_set(q, "ci95", interval(ratio.ci95));
        json_set_bool(q, "within_launch", ratio.within_launch);
        json_set(o, "ratio", q);
        return o;
}

/* What is not in a field of its own. */
static json *warnings(const struct row *r)
{
        const struct external_info *x = r->external && r->nsamples ? external_info(r->external) : NULL;
        json *a = json_array();
        char text[400];

        if (x) {
                snprintf(text, sizeof text,
                         "%s%s%s, an external program on %s with %lld thread%s, times itself; nothing "
                         "is derived from it",
                         x->name, *x->version ? " " : "", x->version, x->device, (long long)x->threads,
                         x->threads == 1 ? "" : "s");
                json_push(a, json_of_str(text));
        }
        if (injury.active)
                json_push(a, json_of_str("injured on purpose"));
        return a;
}

static json *residual(const struct measured *me, const struct row *r)
{
        struct residual x;
        json *o;

        if (!r->nsamples || !row_is_remote(r))
                return json_of_null();
        x = row_residual(me, r);
        o = json_object();
        json_set_num(o, "median_ms", ms(x.client));
        json_set_num(o, "server_median_ms", ms(x.server));
        json_set_num(o, "limit_ms", ms(x.limit));
        json_set_num(o, "share_over", fmin(x.share_over, 1));
        return o;
}

static json *row_clock(const struct row *r)
{
        json *o;

        if (!r->clock.known || !r->nsamples)
                return json_of_null();
        o = json_object();
        json_set_int(o, "offset_ns", r->clock.last_ns);
        json_set_int(o, "moved_ns", r->clock.last_ns - r->clock.first_ns);
        json_set_int(o, "error_bound_ns", (int64_t)r->clock.error_ns);
        return o;
}

static void set_pair(json *o, const char *key, const char *ka, double a, const char *kb, double b)
{
        json *p = json_object();

        json_set_num(p, ka, a);
        json_set_num(p, kb, b);
        json_set(o, key, p);
}

static void set_identity(json *o, const struct measured *me, const struct row *r)
{
        bool ran = r->nsamples && r->m;

        json_set(o, "digest",
                 r->nsamples && r->digests && me->blocks > me->resumed ? hex_digest(r->digests[me->resumed])
                                                                       : json_of_null());
        json_set_str(o, "weights",
                     !me->w                                 ? NULL
                     : !me->w->has_weights                  ? "none"
                     : me->w->weights == WEIGHTS_CHECKPOINT ? "checkpoint"
                                                            : "synthetic");
        json_set(o, "model_hash",
                 ran ? hex_digest((struct digest){r->m->info.weights_digest[0], r->m->info.weights_digest[1]})
                     : json_of_null());
        json_set(o, "switches", switches(r));
}

static void set_effort(json *o, const struct row *r)
{
        if (!r->nsamples) {
                static const char *const nulls[] = {"setup_ms", "cold_start_ms", "cpu_s", "memory", "warmup"};

                for (size_t i = 0; i < ARRAY_LEN(nulls); i++)
                        json_set_null(o, nulls[i]);
                return;
        }
        json_set_num(o, "setup_ms", ms((double)r->setup_ns));
        json_set_num(o, "cold_start_ms", ms((double)r->cold_start_ns));
        set_pair(o, "cpu_s", "client", (double)r->client_cpu_ns / 1e9, "server",
                 row_is_external(r) ? NAN : (double)r->server_cpu_ns / 1e9);
        set_pair(o, "memory", "client_rss_bytes", (double)r->client_rss_bytes, "server_rss_bytes",
                 row_is_external(r) ? NAN : (double)r->server_rss_bytes);
        json *w = json_object();

        json_set_int(w, "requests", (int64_t)r->warm_requests);
        json_set_bool(w, "steady", r->steady);
        json_set(o, "warmup", w);
}

static json *one_row(const struct measured *me, const struct row *r)
{
        struct context c = context_of(me, r);
        struct decomposition d;
        json *o = json_object(), *v = json_object();

        row_decompose(me, r, &d);
        json_set_str(o, "baseline", r->name);
        json_set_str(o, "runner_type", r->b->type);
        json_set_str(o, "transport", r->transport);
        json_set_str(o, "path", r->nsamples && row_is_remote(r) && r->r->region ? r->r->region->path : NULL);
        json_set_bool(o, "emulated", r->r && row_is_remote(r) && r->r->attr.emulated);
        json_set(o, "runs", all_runs(&c));
        json_set(o, "aggregates", all_aggregates(&c));
        json_set(o, "metadata", metadata(&c));
        json_set(o, "derived", derived(&c, &d));
        json_set(o, "ci", r->nsamples ? intervals(&c, &d) : json_object());
        json_set(o, "work", work(me, r));
        json_set(o, "wire", wire(me, r));
        json_set(o, "breakdown", breakdown(me, r));
        json_set(o, "decomposition", r->nsamples && r->verdict != VERDICT_INVALID ? decomposition(&d) : json_of_null());
        json_set_str(o, "wire_floor_reason", r->nsamples ? r->no_wire_floor : NULL);
        json_set(o, "clock", row_clock(r));
        json_set(o, "residual", residual(me, r));
        json_set(o, "roofline", roofline(me, r));
        json_set(o, "check", check(me, r));
        set_identity(o, me, r);
        set_effort(o, r);
        json_set(o, "outliers", outliers(r));
        json_set_num(o, "autocorrelation_lag1", r->nsamples ? autocorrelation(me, r) : NAN);
        json_set(o, "aa", aa(me, r));
        json_set(o, "warnings", warnings(r));
        json_set_str(v, "verdict", verdict_names[r->verdict]);
        json_set_str(v, "reason", *r->reason ? r->reason : NULL);
        json_set(o, "validity", v);
        return o;
}

/* ---- the file ---- */

static json *experiment_object(const struct measured *me)
{
        const struct experiment *e = me->opts->exp;
        json *o = json_object(), *t = json_array();

        json_set_str(o, "device", e->device);
        json_set_str(o, "dtype", op_dtype_names[e->dtype]);
        json_set_int(o, "runs", e->runs);
        json_set_int(o, "warmup_runs", e->warmup_runs);
        json_set_str(o, "tag", e->tag);
        json_set_str(o, "result_dir", me->opts->output_dir);
        json_set_str(o, "djinn_server_address", e->server_address);
        json_set_str(o, "reference_baseline", e->reference_baseline);
        json_set_str(o, "blind_baseline", e->blind_baseline);
        json_set_str(o, "target_baseline", e->target_baseline);
        for (size_t i = 0; i < e->ntransports; i++)
                json_push(t, json_of_str(e->transports[i]));
        json_set(o, "transports", t);
        json_set_int(o, "seed", (int64_t)e->seed);
        json_set_int(o, "requests_per_block", e->requests_per_block);
        return o;
}

static json *block_orders(const struct measured *me)
{
        json *all = json_array();

        for (uint32_t b = 0; b < me->blocks; b++) {
                json *one = json_array();

                for (size_t k = 0; k < me->order_len[b]; k++) {
                        int32_t i = me->order[b][k];

                        if (i >= 0) {
                                json_push(one, json_of_int(i));
                        } else {
                                json *c = json_object();

                                json_set_int(c, "calibrate", -1 - i);
                                json_push(one, c);
                        }
                }
                json_push(all, one);
        }
        return all;
}

static void set_server(json *m, const struct measured *me)
{
        const struct msg_auth_reply *s = &me->server_info;
        json *o, *c;

        if (!me->have_server) {
                json_set_null(m, "server");
                return;
        }
        o = json_object();
        json_set_str(o, "device", s->device);
        json_set_str(o, "library", s->library);
        json_set_int(o, "threads", s->threads);
        json_set_str(o, "commit", s->commit);
        json_set_int(o, "pid", s->pid);
        json_set(m, "server", o);
        c = json_object();
        json_set_str(c, "device", s->device);
        json_set_num(c, "bytes_per_s", s->read_bytes_per_s > 0 ? s->read_bytes_per_s : NAN);
        json_set_num(c, "flop_per_s", s->flop_per_s > 0 ? s->flop_per_s : NAN);
        json_set_num(c, "cache_bytes_per_s", s->cache_bytes_per_s > 0 ? s->cache_bytes_per_s : NAN);
        json_set_num(c, "cache_bytes", s->cache_bytes ? (double)s->cache_bytes : NAN);
        json_set(m, "ceilings", c);
}

static json *manifest(const struct measured *me)
{
        json *m = manifest_host(), *argv = json_array(), *clock = json_object();
        const json *old = json_get(m, "clock");

        json_set_num(clock, "cost_ns", json_num(json_get(old, "cost_ns"), NAN));
        json_set_num(clock, "resolution_ns", json_num(json_get(old, "resolution_ns"), NAN));
        json_set_str(clock, "source", json_str(json_get(old, "source"), NULL));
        json_set_int(clock, "offset_ns", me->clock_offset_ns);
        json_set_int(clock, "error_bound_ns", (int64_t)me->clock_error_ns);
        json_set(m, "clock", clock);
        json_set_null(m, "gpu");
        json_set_null(m, "nic");
        set_server(m, me);
        json_set_int(m, "seed", (int64_t)me->opts->exp->seed);
        json_set(m, "blocks", block_orders(me));
        json_set_int(m, "launches", me->blocks ? me->launch[me->blocks - 1] + 1 : 1);
        json_set_str(m, "arrivals", "closed");
        json_set_str(m, "profile", "on");
        json_set_num(m, "profile_cost_us", me->profile_cost_us);
        json_set_str(m, "injury", injury.active ? getenv("DJINN_INJURE") : NULL);
        for (int i = 0; i < me->opts->argc; i++)
                json_push(argv, json_of_str(me->opts->argv[i]));
        json_set(m, "argv", argv);
        json_set_bool(m, "complete", me->complete);
        return m;
}

json *result_document(const struct measured *me)
{
        json *doc = json_object(), *w = json_object(), *rows = json_array();
        char now[24];

        clock_iso8601(now);
        json_set_str(doc, "schema", "djinnbench.result/1");
        json_set_str(doc, "config", me->opts->exp->config_path);
        json_set_str(doc, "generated_at", now);
        json_set(doc, "experiment", experiment_object(me));
        json_set(doc, "manifest", manifest(me));
        json_set_str(w, "workload", me->spec->name);
        json_set_str(w, "category", me->spec->category);
        json_set_str(w, "timestamp", now);
        for (size_t i = 0; i < me->nrows; i++)
                json_push(rows, one_row(me, &me->rows[i]));
        json_set(w, "results", rows);
        json_set(doc, "workload", w);
        return doc;
}
