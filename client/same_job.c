/* The reference, and comparisons with it. */
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "device.h"
#include "err.h"
#include "same_job.h"

#define REFERENCE_FLOP_MAX 4e9 /* beyond, plain C would take longer than the sweep: the cpu device serves instead */

/* ---- shapes of a conversation ---- */

uint32_t workload_turns(const struct workload *w)
{
        return w->driver == DRIVE_CAUSAL ? (uint32_t)w->spec.turns : 1;
}

static uint32_t history_at(const struct workload *w, uint32_t turn)
{
        return (uint32_t)(w->spec.prompt_length + turn * (w->spec.new_tokens + w->spec.turn_tokens));
}

struct plan_shape workload_shape(const struct workload *w, uint32_t turn, bool state_stays, bool check)
{
        struct plan_shape s = {.check = check};

        if (w->driver != DRIVE_CAUSAL)
                return s;
        s.history = history_at(w, turn);
        s.new_tokens = (uint32_t)w->spec.new_tokens;
        if (turn && state_stays) /* the last token that was chosen has not been fed yet */
                s.cached = history_at(w, turn - 1) + (s.new_tokens ? s.new_tokens - 1 : 0);
        return s;
}

int conversation_new(const struct workload *w, struct conversation *c)
{
        *c = (struct conversation){.batch = w->graph.h->batch};
        if (w->driver == DRIVE_CAUSAL) {
                c->cap = history_at(w, workload_turns(w) - 1) + (uint32_t)w->spec.new_tokens;
                c->ids = calloc((size_t)c->batch * c->cap, sizeof *c->ids);
        } else {
                c->input_len = graph_tensor_bytes(&w->graph, w->graph.h->role[ROLE_INPUT], w->graph.h->rows_max, NULL);
                c->input = malloc(c->input_len + 1);
        }
        return c->ids || c->input ? 0 : err_set(-ENOMEM, "out of memory for inputs");
}

void conversation_free(struct conversation *c)
{
        free(c->ids);
        free(c->input);
        *c = (struct conversation){0};
}

int conversation_start(struct conversation *c, const struct workload *w, uint64_t seed, uint32_t block)
{
        uint32_t n = (uint32_t)w->spec.prompt_length;
        int32_t *flat;
        int rc;

        if (w->driver != DRIVE_CAUSAL) {
                workload_input(w, seed, block, c->input, c->input_len);
                return 0;
        }
        flat = calloc((size_t)c->batch * n, sizeof *flat);
        if (!flat)
                return err_set(-ENOMEM, "out of memory for a prompt");
        rc = workload_prompt(w, seed, block, flat, n);
        for (uint32_t b = 0; b < c->batch && rc == 0; b++)
                memcpy(c->ids + (size_t)b * c->cap, flat + (size_t)b * n, n * sizeof *flat);
        free(flat);
        return rc;
}

void conversation_turn(struct conversation *c, const struct workload *w, uint64_t seed, uint32_t block, uint32_t turn,
                       const int32_t *tokens)
{
        uint32_t at = history_at(w, turn - 1), steps = (uint32_t)w->spec.new_tokens;

        for (uint32_t b = 0; b < c->batch; b++) {
                int32_t *row = c->ids + (size_t)b * c->cap;

                for (uint32_t i = 0; i < steps; i++)
                        row[at + i] = tokens[(size_t)i * c->batch + b];
                workload_turn_ids(w, seed, block, turn, row + at + steps, (size_t)w->spec.turn_tokens);
        }
}

/* ---- the reference ---- */

struct walker { /* a model on a device of this process, walked step by step */
        const struct workload *w;
        struct local_model *model;
        uint32_t batch, vocab;
        int32_t *feed;
};

static int32_t argmax(const float *v, uint32_t n)
{
        uint32_t best = 0;

        for (uint32_t i = 1; i < n; i++)
                if (v[i] > v[best] || isnan(v[best]))
                        best = i;
        return (int32_t)best;
}

/* Feeds [from, from+count) of ids and gives the logits of the last position. */
static int walk(struct walker *k, const struct conversation *c, uint32_t from, uint32_t count, uint32_t position,
                float *logits)
{
        int32_t cursor[2] = {(int32_t)position, 0};
        const struct local_io in[] = {{ROLE_IDS, k->feed, (size_t)count * k->batch * 4}, {ROLE_CURSOR, cursor, 8}};
        const struct local_io out[] = {{ROLE_LAST, logits, (size_t)k->batch * k->vocab * 4}};

        for (uint32_t b = 0; b < k->batch; b++)
                memcpy(k->feed + (size_t)b * count, c->ids + (size_t)b * c->cap + from, count * sizeof *k->feed);
        return local_run(k->model, 1u << SEG_BODY | 1u << SEG_LAST, count, in, 2, out, 1);
}

/* One turn: all steps, greedy. forget: every step runs as if nothing had come before it. */
static int walk_turn(struct walker *k, struct conversation *c, const struct plan_shape *s, float *logits,
                     int32_t *tokens, bool forget)
{
        uint32_t steps = s->new_tokens ? s->new_tokens : 1;
        int rc = walk(k, c, s->cached, s->history - s->cached, s->cached, logits);

        for (uint32_t i = 0; rc == 0; i++) {
                uint32_t at = s->history + i;

                for (uint32_t b = 0; b < k->batch; b++)
                        tokens[(size_t)i * k->batch + b] = argmax(logits + (size_t)b * k->vocab, k->vocab);
                if (i + 1 == steps)
                        break;
                for (uint32_t b = 0; b < k->batch; b++)
                        c->ids[(size_t)b * c->cap + at] = tokens[(size_t)i * k->batch + b];
                logits += (size_t)k->batch * k->vocab;
                rc = walk(k, c, at, 1, forget ? 0 : at, logits);
        }
        return rc;
}

/* Does one altered id, or a forgotten history, change the tokens of the first turn? */
static int probe_sensitivity(struct walker *k, struct reference *ref, uint64_t seed)
{
        struct plan_shape s = workload_shape(k->w, 0, true, false);
        size_t per_step = (size_t)k->batch * k->vocab, ntokens = (size_t)ref->steps * ref->batch;
        float *logits = malloc(ref->steps * per_step * sizeof *logits);
        int32_t *tokens = malloc(ntokens * sizeof *tokens);
        struct conversation c;
        int rc = conversation_new(k->w, &c);

        if (rc == 0 && (!logits || !tokens))
                rc = err_set(-ENOMEM, "out of memory for the reference");
        for (int forget = 0; forget < 2 && rc == 0; forget++) {
                rc = conversation_start(&c, k->w, seed, 0);
                if (rc == 0 && !forget)
                        c.ids[0] = (c.ids[0] + 1) % (int32_t)k->vocab;
                if (rc == 0)
                        rc = walk_turn(k, &c, &s, logits, tokens, forget);
                if (rc < 0)
                        break;
                bool same = s.new_tokens ? !memcmp(tokens, ref->tokens, ntokens * sizeof *tokens)
                                         : !memcmp(logits, ref->logits, per_step * sizeof *logits);
                *(forget ? &ref->state_sensitive : &ref->token_sensitive) = !same;
        }
        if (ref->steps == 1)
                ref->state_sensitive = true; /* no state outlives a step */
        conversation_free(&c);
        free(logits);
        free(tokens);
        return rc;
}

static int reference_causal(struct walker *k, struct reference *ref, uint64_t seed)
{
        size_t per_turn = (size_t)ref->steps * ref->batch;
        struct conversation c;
        int rc;

        ref->tokens = calloc(ref->turns * per_turn, sizeof *ref->tokens);
        ref->logits = calloc(ref->turns * per_turn * ref->vocab, sizeof *ref->logits);
        rc = ref->tokens && ref->logits ? conversation_new(k->w, &c)
                                        : err_set(-ENOMEM, "out of memory for the reference");
        if (rc < 0)
                return rc;
        k->feed = calloc((size_t)c.batch * c.cap, sizeof *k->feed);
        rc = k->feed ? conversation_start(&c, k->w, seed, 0) : err_set(-ENOMEM, "out of memory for the reference");
        for (uint32_t t = 0; t < ref->turns && rc == 0; t++) {
                struct plan_shape s = workload_shape(k->w, t, true, false);

                if (t)
                        conversation_turn(&c, k->w, seed, 0, t, ref->tokens + (t - 1) * per_turn);
                rc = walk_turn(k, &c, &s, ref->logits + t * per_turn * ref->vocab, ref->tokens + t * per_turn, false);
        }
        for (size_t i = 0; rc == 0 && i < ref->turns * per_turn * ref->vocab; i++)
                if (!isfinite(ref->logits[i]))
                        rc = err_set(-ERANGE, "the reference itself gives a value that is not a number");
        conversation_free(&c);
        if (rc == 0)
                rc = probe_sensitivity(k, ref, seed);
        return rc;
}

static int reference_forward(struct walker *k, struct reference *ref, uint64_t seed)
{
        const struct graph *g = &k->w->graph;
        unsigned out_t = g->h->role[ROLE_OUTPUT];
        size_t bytes = graph_tensor_bytes(g, out_t, g->h->rows_max, NULL);
        struct conversation c;
        int rc = conversation_new(k->w, &c);

        ref->output_bytes = malloc(bytes + 1);
        ref->output_len = bytes;
        if (rc == 0)
                rc = ref->output_bytes ? conversation_start(&c, k->w, seed, 0) : err_set(-ENOMEM, "out of memory");
        if (rc == 0)
                rc = local_run(k->model, 1u << SEG_BODY, g->h->rows_max,
                               &(struct local_io){ROLE_INPUT, c.input, c.input_len}, 1,
                               &(struct local_io){ROLE_OUTPUT, ref->output_bytes, bytes}, 1);
        conversation_free(&c);
        ref->token_sensitive = ref->state_sensitive = true;
        return rc;
}

/* FLOP of the whole conversation, to choose who computes the reference. */
static double flop_of(const struct workload *w)
{
        struct graph_cost cost = {0};
        const struct graph *g = &w->graph;
        uint32_t rows = w->driver == DRIVE_CAUSAL ? history_at(w, workload_turns(w) - 1) : g->h->rows_max;

        if (graph_cost(g, rows, 0, graph_segment(g, SEG_BODY)->count, 0, &cost) < 0)
                return INFINITY;
        return cost.flop + 3.0 * (double)(w->spec.new_tokens * w->spec.turns) * 2.0 * cost.weight_bytes / 4;
}

int reference_make(const struct workload *w, const struct weights_source *src, uint64_t seed, struct reference *out)
{
        struct walker k = {.w = w, .batch = w->graph.h->batch, .vocab = w->graph.h->vocab};
        struct device *dev = NULL;
        int rc;

        *out = (struct reference){.turns = workload_turns(w), .batch = k.batch, .vocab = k.vocab};
        out->steps = w->spec.new_tokens > 0 ? (uint32_t)w->spec.new_tokens : 1;
        out->device = flop_of(w) <= REFERENCE_FLOP_MAX ? "reference" : "cpu";
        rc = dev_open(out->device, 1, &dev);
        if (rc == 0)
                rc = local_open(&w->graph, src, dev, &k.model);
        if (rc == 0)
                rc = w->driver == DRIVE_CAUSAL ? reference_causal(&k, out, seed) : reference_forward(&k, out, seed);
        if (rc == 0)
                out->weights = local_weights_digest(k.model);
        free(k.feed);
        if (k.model)
                local_close(k.model);
        if (dev)
                dev_close(dev);
        if (rc < 0) {
                reference_free(out);
                return err_trail(rc, "while computing the reference of %s", w->spec.name);
        }
        return 0;
}

void reference_free(struct reference *ref)
{
        free(ref->tokens);
        free(ref->logits);
        free(ref->output_bytes);
        *ref = (struct reference){0};
}

/* ---- comparing ---- */

double check_tolerance(enum op_dtype dtype)
{
        return dtype == DT_F32 ? 1e-4 : dtype == DT_F16 ? 2e-2 : 1e-1;
}

/* Squares of difference and reference to a relative error; a NaN or an infinity on either side is no agreement. */
static double error_of(double num, double den)
{
        if (!isfinite(num) || !isfinite(den))
                return INFINITY;
        return den > 0 ? sqrt(num / den) : num > 0 ? INFINITY : 0;
}

static double rel_l2(const float *got, const float *want, size_t n)
{
        double num = 0, den = 0;

        for (size_t i = 0; i < n; i++) {
                double d = (double)got[i] - want[i];

                num += d * d;
                den += (double)want[i] * want[i];
        }
        return error_of(num, den);
}

static void note(struct check_result *c, double err, double tolerance, const char *what, size_t at)
{
        if (!c->done)
                *c = (struct check_result){
                    .done = true, .passed = true, .argmax_equal = true, .near_tie = -1, .tolerance = tolerance};
        if (!(err <= c->max_rel_l2))
                c->max_rel_l2 = err;
        if (err <= tolerance || !c->passed)
                return;
        c->passed = false;
        snprintf(c->why, sizeof c->why, "%s %zu differs from the reference: relative L2 error %.3g above %.3g", what,
                 at, err, tolerance);
}

/* Second largest value, and where the largest is. */
static void top_two(const float *v, uint32_t n, int32_t *first, double *margin)
{
        float second = -INFINITY;

        *first = argmax(v, n);
        for (uint32_t i = 0; i < n; i++)
                if (v[i] > second && (int32_t)i != *first)
                        second = v[i];
        *margin = n > 1 ? (double)v[*first] - second : INFINITY;
}

void check_logits(const struct reference *ref, uint32_t turn, const float *logits, double tolerance,
                  struct check_result *c)
{
        size_t rows = (size_t)ref->steps * ref->batch;
        const float *want = ref->logits + turn * rows * ref->vocab;

        for (size_t r = 0; r < rows; r++, want += ref->vocab, logits += ref->vocab) {
                int32_t best;
                double margin, scale = 0;

                note(c, rel_l2(logits, want, ref->vocab), tolerance, "logits of step", r);
                top_two(want, ref->vocab, &best, &margin);
                for (uint32_t i = 0; i < ref->vocab; i++)
                        scale = fmax(scale, fabs((double)want[i]));
                if (margin <= 4 * tolerance * scale) {
                        if (c->near_tie < 0)
                                c->near_tie = (int64_t)(turn * rows + r);
                        continue;
                }
                if (argmax(logits, ref->vocab) == best)
                        continue;
                c->argmax_equal = false;
                if (c->passed)
                        snprintf(c->why, sizeof c->why, "step %zu chooses another token than the reference", r);
                c->passed = false;
        }
}

void check_tokens(const struct reference *ref, uint32_t turn, const int32_t *tokens, struct check_result *c)
{
        size_t n = (size_t)ref->steps * ref->batch, first = turn * n;
        const int32_t *want = ref->tokens + first;

        for (size_t i = 0; i < n && c->passed; i++) {
                if (c->near_tie >= 0 && first + i >= (size_t)c->near_tie)
                        return;
                if (tokens[i] == want[i])
                        continue;
                c->passed = c->argmax_equal = false;
                snprintf(
                    c->why, sizeof c->why,
                    "its run chose token %d at step %zu of turn %u where the reference, and its own check, choose %d",
                    tokens[i], i / ref->batch, turn, want[i]);
        }
}

static float element(const void *v, enum op_dtype t, size_t i)
{
        switch (t) {
        case DT_F16:
                return op_f16_to_f32(((const uint16_t *)v)[i]);
        case DT_BF16:
                return op_bf16_to_f32(((const uint16_t *)v)[i]);
        default:
                return ((const float *)v)[i];
        }
}

void check_output(const struct reference *ref, const struct workload *w, const void *output, size_t len,
                  double tolerance, struct check_result *c)
{
        enum op_dtype t = w->graph.tensors[w->graph.h->role[ROLE_OUTPUT]].dtype;
        double num = 0, den = 0;
        size_t n = ref->output_len / op_dtype_bytes(t);

        if (len != ref->output_len || t == DT_U8 || t == DT_I32) {
                note(c, len == ref->output_len && !memcmp(output, ref->output_bytes, len) ? 0 : INFINITY, 0, "output",
                     0);
                return;
        }
        for (size_t i = 0; i < n; i++) {
                double want = element(ref->output_bytes, t, i), d = element(output, t, i) - want;

                num += d * d;
                den += want * want;
        }
        note(c, error_of(num, den), tolerance, "output", 0);
}
