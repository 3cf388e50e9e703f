/*
 * Going on with an interrupted sweep: the blocks that its file holds become this one's first blocks. The file is
 * untrusted: what does not fit this sweep is refused, what does is copied field by field.
 */
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "err.h"
#include "injure.h"
#include "manifest.h"
#include "rows.h"

#define SECONDS_MAX 1e9 /* longer than anything that was ever measured; in ns it fits 64 bits */

static int refuse(const struct measured *me, const char *what)
{
        return err_set(-EINVAL, "%s: cannot go on with it: %s", me->opts->resume, what);
}

static int refuse_field(const struct measured *me, const char *field)
{
        return err_set(-EINVAL, "%s: cannot go on with it: %s is another", me->opts->resume, field);
}

static int refuse_row(const struct measured *me, const struct row *r, const char *why)
{
        return err_set(-EINVAL, "%s: cannot go on with it: %s over %s: %s", me->opts->resume, r->name, r->transport,
                       why);
}

static bool same_text(const json *v, const char *own)
{
        return own ? !strcmp(json_str(v, ""), own) : json_is_null(v);
}

static bool same_num(const json *v, double own)
{
        return json_is_num(v) && json_num(v, NAN) == own;
}

/* ---- the sweep's questions ---- */

static int same_host(const struct measured *me, const json *manifest)
{
        static const char *const keys[] = {"host", "boot_id"};
        json *own = manifest_host();
        int rc = 0;

        for (size_t i = 0; i < ARRAY_LEN(keys) && rc == 0; i++) {
                char field[32];

                snprintf(field, sizeof field, "manifest.%s", keys[i]);
                if (!same_text(json_get(manifest, keys[i]), json_str(json_get(own, keys[i]), NULL)))
                        rc = refuse_field(me, field);
        }
        json_free(own);
        return rc;
}

static int same_sweep(const struct measured *me, const json *doc)
{
        const struct experiment *e = me->opts->exp;
        const json *x = json_get(doc, "experiment"), *manifest = json_get(doc, "manifest");
        const json *server = json_get(manifest, "server");
        const char *injured = injury.active ? getenv("DJINN_INJURE") : NULL;

        if (!same_text(json_get(doc, "schema"), "djinnbench.result/1"))
                return refuse(me, "it is not a djinnbench.result/1 document");
        if (!same_num(json_get(x, "seed"), (double)e->seed))
                return refuse_field(me, "experiment.seed");
        if (!same_num(json_get(x, "requests_per_block"), (double)e->requests_per_block))
                return refuse_field(me, "experiment.requests_per_block");
        if (!same_text(json_get(x, "dtype"), op_dtype_names[e->dtype]))
                return refuse_field(me, "experiment.dtype");
        if (!same_text(json_get(server, "device"), me->server_info.device))
                return refuse_field(me, "manifest.server.device");
        if (!same_text(json_get(server, "commit"), me->server_info.commit))
                return refuse_field(me, "manifest.server.commit");
        if (!same_text(json_get(manifest, "injury"), injured))
                return refuse_field(me, "manifest.injury");
        return same_host(me, manifest);
}

/* ---- a row's questions: the name of the field whose value is another; NULL: it is the same question ---- */

#define FIELD_MAX 128

static const char *spec_differs(const struct measured *me, const json *spec, char *field)
{
        const struct conf_node *params = me->spec->params;
        size_t n = 1;

        if (!same_text(json_get(spec, "implementation"), me->spec->implementation))
                return "metadata.spec.implementation";
        for (const struct conf_node *p = params ? params->first : NULL; p; p = p->next) {
                if (p->kind != CONF_SCALAR)
                        continue;
                n++;
                if (same_text(json_get(spec, p->key), p->text))
                        continue;
                snprintf(field, FIELD_MAX, "metadata.spec.%.100s", p->key);
                return field;
        }
        return json_count(spec) == n ? NULL : "metadata.spec";
}

static const char *switches_differ(const struct switches *sw, const json *requested)
{
        if (!same_text(json_get(requested, "weights"), sw_weights_names[sw->weights]))
                return "switches.requested.weights";
        if (!same_text(json_get(requested, "call"), sw_call_names[sw->call]))
                return "switches.requested.call";
        if (!same_text(json_get(requested, "state"), sw_state_names[sw->state]))
                return "switches.requested.state";
        if (!same_text(json_get(requested, "outputs"), sw_outputs_names[sw->outputs]))
                return "switches.requested.outputs";
        if (!same_text(json_get(requested, "plan_cache"), sw->plan_cache ? "on" : "off"))
                return "switches.requested.plan_cache";
        if (!same_text(json_get(requested, "buffers"), sw_buffers_names[sw->buffers]))
                return "switches.requested.buffers";
        return NULL;
}

static const char *wire_differs(const struct measured *me, const struct row *r, const json *predicted)
{
        const json *jup = json_get(predicted, "up"), *jdown = json_get(predicted, "down");
        struct plan_bytes up, down;
        uint64_t trips;
        double turns = me->turns;

        row_predicted(me, r, &up, &down, &trips);
        if (row_is_native(r))
                up = down = (struct plan_bytes){0}, trips = 0;
        if (!same_num(json_get(jup, "payload_bytes"), (double)up.payload_bytes / turns))
                return "wire.predicted.up.payload_bytes";
        if (!same_num(json_get(jup, "messages"), (double)up.messages / turns))
                return "wire.predicted.up.messages";
        if (!same_num(json_get(jdown, "payload_bytes"), (double)down.payload_bytes / turns))
                return "wire.predicted.down.payload_bytes";
        if (!same_num(json_get(jdown, "messages"), (double)down.messages / turns))
                return "wire.predicted.down.messages";
        return same_num(json_get(predicted, "round_trips"), (double)trips / turns) ? NULL
                                                                                   : "wire.predicted.round_trips";
}

static const char *work_differs(const json *work, int64_t threads, const char *device)
{
        if (!same_num(json_get(work, "threads"), (double)threads))
                return "work.threads";
        return same_text(json_get(work, "device"), device) ? NULL : "work.device";
}

/* Of a program that does the work in its own way: which program, and what it says of itself. */
static const char *program_differs(const struct row *r, const json *x)
{
        const struct external_info *info = external_info(r->external);
        const json *metadata = json_get(x, "metadata"), *word = json_first(json_get(metadata, "command"));
        const char *const *own = r->b->command;

        while (*own && same_text(word, *own))
                own++, word = json_next(word);
        if (*own || word)
                return "metadata.command";
        if (!same_text(json_get(metadata, "external_name"), info->name))
                return "metadata.external_name";
        if (!same_text(json_get(metadata, "external_version"), info->version))
                return "metadata.external_version";
        return work_differs(json_get(x, "work"), info->threads, info->device);
}

static const char *plan_differs(const struct measured *me, const struct row *r, const json *x)
{
        const char *field = switches_differ(&r->b->sw, json_get(json_get(x, "switches"), "requested"));
        char hash[33];

        if (field)
                return field;
        digest_hex((struct digest){r->m->info.weights_digest[0], r->m->info.weights_digest[1]}, hash);
        if (!same_text(json_get(x, "model_hash"), hash))
                return "model_hash";
        field = wire_differs(me, r, json_get(json_get(x, "wire"), "predicted"));
        return field ? field : work_differs(json_get(x, "work"), r->r->server.threads, r->r->server.device);
}

static int same_row(const struct measured *me, const struct row *r, const json *x)
{
        char buf[FIELD_MAX], why[FIELD_MAX + 16];
        const char *field = spec_differs(me, json_get(json_get(x, "metadata"), "spec"), buf);

        if (!field)
                field = row_is_external(r) ? program_differs(r, x) : plan_differs(me, r, x);
        if (!field)
                return 0;
        snprintf(why, sizeof why, "%s is another", field);
        return refuse_row(me, r, why);
}

/* ---- what was measured ---- */

static const json *row_in(const json *doc, const struct row *r)
{
        for (const json *x = json_first(json_get(json_get(doc, "workload"), "results")); x; x = json_next(x))
                if (same_text(json_get(x, "baseline"), r->name) && same_text(json_get(x, "transport"), r->transport))
                        return x;
        return NULL;
}

/* Nanoseconds of a field in milliseconds; 0 where there is none, as in a row that lacks this part. */
static int64_t ns_of(const json *run, const char *key)
{
        double v = json_num(json_get(run, key), 0);

        return isfinite(v) && fabs(v) < SECONDS_MAX * 1e3 ? (int64_t)llround(v * 1e6) : 0;
}

static uint64_t duration_of(const json *run, const char *key)
{
        int64_t v = ns_of(run, key);

        return v > 0 ? (uint64_t)v : 0;
}

/* As the server had answered. */
static uint32_t applied_flags(const json *applied)
{
        const json *state = json_get(applied, "state"), *buffers = json_get(applied, "buffers");
        uint32_t f = same_text(json_get(applied, "plan_cache"), "on") ? RUN_PLAN_CACHE : 0;

        if (json_is_str(state) && !same_text(state, sw_state_names[SW_STATE_RECOMPUTE]))
                f |= RUN_KEEP_STATE;
        if (same_text(buffers, sw_buffers_names[SW_IN_PROCESS]))
                f |= RUN_LOCAL;
        return same_text(buffers, sw_buffers_names[SW_SERIALIZED]) ? f | DONE_SERIALIZED : f;
}

/* Runs stand in the order of their blocks and turns, as they were measured. false: this one does not. */
static bool take_run(const struct measured *me, const json *run, size_t i, struct sample *s)
{
        size_t per_block = (size_t)me->opts->exp->requests_per_block * me->turns;
        int64_t block, launch, turn = 0;

        *s = (struct sample){.block = (uint32_t)(i / per_block), .turn = (uint32_t)(i % me->turns)};
        if (json_int(run, "block", s->block, s->block, &block) < 0 || json_int(run, "launch", 0, s->block, &launch) < 0)
                return false;
        if (!json_is_null(json_get(run, "turn")) && json_int(run, "turn", 0, me->turns - 1, &turn) < 0)
                return false;
        if (turn != s->turn)
                return false;
        s->launch = (uint32_t)launch;
        s->digest_ok = json_bool(json_get(run, "digest_ok"), false);
        s->s.latency_ns = duration_of(run, "latency_ms");
        for (int l = 0; l < LEAF_COUNT; l++)
                s->s.leaf_ns[l] = ns_of(run, leaf_keys[l]);
        s->s.residual_ns = ns_of(run, "residual_ms");
        s->s.server_residual_ns = ns_of(run, "server_residual_ms");
        s->s.server_duration_ns = duration_of(run, "server_duration_ms");
        s->s.executor_ns = duration_of(run, "server_executor_time_ms");
        s->s.cleanup_ns = duration_of(run, "server_cleanup_ms");
        s->s.first_token_ns = duration_of(run, "time_to_first_token_ms");
        return s->s.latency_ns > 0;
}

/* One launch measured a whole block, and launches follow one another. first: nothing is known of this block yet. */
static bool take_launch(struct measured *me, const struct sample *s, bool first)
{
        if (!first)
                return me->launch[s->block] == s->launch;
        me->launch[s->block] = s->launch;
        return s->block == 0 ? s->launch == 0 : s->launch >= me->launch[s->block - 1];
}

/* Its counters were held against the plan when the file was written; only rows that passed are gone on with. */
static void add_planned_wire(const struct measured *me, struct row *r)
{
        struct plan_bytes up, down;
        uint64_t trips, n = r->nsamples / me->turns;

        if (!row_is_remote(r))
                return;
        row_predicted(me, r, &up, &down, &trips);
        r->wire.up_messages += n * up.messages;
        r->wire.up_msg_bytes += n * up.msg_bytes;
        r->wire.up_bulk_bytes += n * up.bulk_bytes;
        r->wire.down_messages += n * down.messages;
        r->wire.down_msg_bytes += n * down.msg_bytes;
        r->wire.down_bulk_bytes += n * down.bulk_bytes;
}

/* As far as the file tells, which older ones do not. */
static struct row_clock clock_of(const json *clock)
{
        const int64_t max = 1ll << 60;
        int64_t last, moved, error;

        if (json_int(clock, "offset_ns", -max, max, &last) < 0 || json_int(clock, "moved_ns", -max, max, &moved) < 0 ||
            json_int(clock, "error_bound_ns", 0, max, &error) < 0)
                return (struct row_clock){0};
        return (struct row_clock){
            .first_ns = last - moved, .last_ns = last, .error_ns = (uint64_t)error, .known = true};
}

/* first: of the rows that are taken. */
static int take_row(struct measured *me, struct row *r, const json *x, uint32_t blocks, bool first)
{
        const json *runs = json_get(x, "runs");
        size_t per_block = (size_t)me->opts->exp->requests_per_block * me->turns, n = json_count(runs), i = 0;
        uint32_t applied = applied_flags(json_get(json_get(x, "switches"), "applied"));
        struct net_sample *net;

        if (!json_is_array(runs) || n % blocks || n / blocks != per_block)
                return refuse_row(me, r, "the number of its runs is not that of its blocks");
        r->samples = calloc(n, sizeof *r->samples);
        r->nets = net = calloc(n, sizeof *r->nets);
        if (!r->samples || !r->nets)
                return err_set(-ENOMEM, "out of memory for samples");
        r->cap = r->nets_cap = n;
        for (const json *run = json_first(runs); run; run = json_next(run), i++) {
                struct sample *s = &r->samples[i];
                uint64_t ns = duration_of(run, "network_ms");

                if (!take_run(me, run, i, s) || !take_launch(me, s, first && i % per_block == 0))
                        return refuse_row(me, r, "a run of it does not fit");
                s->s.applied = applied;
                r->digest_errors += !s->digest_ok;
                if (ns && row_is_remote(r))
                        *net++ = (struct net_sample){.block = s->block, .turn = s->turn, .ns = ns};
        }
        r->nsamples = r->resumed_samples = n;
        r->nnets = (size_t)(net - r->nets);
        r->clock = clock_of(json_get(x, "clock"));
        add_planned_wire(me, r);
        return 0;
}

/* Row index, or -1 - index for a calibration; INT32_MIN: neither. */
static int32_t order_entry(const struct measured *me, const json *k)
{
        bool calibrate = json_is_object(k);
        double i = json_num(calibrate ? json_get(k, "calibrate") : k, -1);

        if (!(i >= 0) || i >= (double)me->nrows || i != floor(i))
                return INT32_MIN;
        return calibrate ? -1 - (int32_t)i : (int32_t)i;
}

static int take_order(struct measured *me, const json *block, uint32_t b)
{
        size_t n = json_count(block), i = 0;
        int32_t *v;

        if (!json_is_array(block) || n > 2 * me->nrows)
                return refuse(me, "the order of a block is not one of rows and their calibrations");
        me->order[b] = v = calloc(n + 1, sizeof *v);
        if (!v)
                return err_set(-ENOMEM, "out of memory for blocks");
        for (const json *k = json_first(block); k; k = json_next(k)) {
                v[i] = order_entry(me, k);
                if (v[i++] == INT32_MIN)
                        return refuse(me, "the order of its blocks names a row that this sweep does not have");
        }
        me->order_len[b] = n;
        return 0;
}

/* Nothing of a file that is refused stays in the rows. */
static void drop_all(struct measured *me)
{
        for (size_t i = 0; i < me->nrows; i++) {
                struct row *r = &me->rows[i];

                free(r->samples);
                free(r->nets);
                r->samples = NULL, r->nets = NULL;
                r->cap = r->nets_cap = r->nsamples = r->resumed_samples = r->nnets = r->digest_errors = 0;
                r->wire = (struct wire_count){0};
                r->clock = (struct row_clock){0};
        }
}

/* It was set up: there is something that the file's row can be held against, and that will go on. */
static bool goes_on(const struct row *r)
{
        return r->verdict == VERDICT_VALID &&
               (row_is_external(r) ? r->external != NULL : r->execs && r->plans && r->m && r->r);
}

static int take_rows(struct measured *me, const json *doc, uint32_t blocks)
{
        bool first = true;
        int rc = 0;

        for (size_t i = 0; i < me->nrows && rc == 0; i++) {
                struct row *r = &me->rows[i];
                const json *x = row_in(doc, r);
                const json *verdict = json_get(json_get(x, "validity"), "verdict");

                if (!goes_on(r))
                        continue;
                if (!x)
                        return refuse_row(me, r, "it lacks this row");
                if (!json_is_str(verdict) || same_text(verdict, "INVALID") || same_text(verdict, "SKIPPED"))
                        return refuse_row(me, r, "that row is not valid");
                rc = same_row(me, r, x);
                if (rc == 0)
                        rc = take_row(me, r, x, blocks, first);
                first = false;
        }
        return rc;
}

int resume_take(struct measured *me, const json *doc)
{
        const json *blocks = json_get(json_get(doc, "manifest"), "blocks");
        size_t n = json_is_array(blocks) ? json_count(blocks) : 0;
        uint32_t b = 0;
        int rc = same_sweep(me, doc);

        if (rc == 0 && n == 0)
                rc = refuse(me, "it has no finished block (manifest.blocks)");
        if (rc == 0 && (int64_t)n > me->opts->exp->runs)
                rc = refuse(me, "it has more blocks (manifest.blocks) than this sweep asks for");
        if (rc == 0)
                rc = take_rows(me, doc, (uint32_t)n);
        for (const json *k = json_first(blocks); k && rc == 0; k = json_next(k))
                rc = take_order(me, k, b++);
        if (rc < 0)
                drop_all(me);
        else
                me->blocks = me->resumed = (uint32_t)n;
        return rc;
}
