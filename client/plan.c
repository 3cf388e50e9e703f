/*
 * From switches to calls. Each switch is decided in one place:
 *   call      causal_calls(): one call for the request, or one per step;
 *   state     feed_of(): which positions a call feeds; add_state_*(): what travels;
 *   outputs   add_outputs(): which tensor comes back;
 *   plan_cache, buffers   flags of the RUN; CALL instead of RUN.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "err.h"
#include "plan.h"

#define INLINE_SMALL 2048u /* an input up to here goes inside the RUN; above, it is written one-sided */
#define REGION_ALIGN 4096u

struct making {
        struct plan *p;
        const struct graph *g;
        const struct switches *sw;
        const struct plan_limits *limits;
        uint32_t batch, vocab;
};

static unsigned role(const struct making *m, enum graph_role r)
{
        return m->g->h->role[r];
}

static bool has_role(const struct making *m, enum graph_role r)
{
        return role(m, r) != GRAPH_NONE;
}

static uint32_t run_flags(const struct switches *sw)
{
        return (sw->plan_cache ? RUN_PLAN_CACHE : 0) | (sw->state == SW_STATE_RECOMPUTE ? 0 : RUN_KEEP_STATE) |
               (sw->buffers == SW_IN_PROCESS ? RUN_LOCAL : 0) | RUN_PROFILE;
}

/* A state is told by its shape [batch, context, width]: in a blind graph nothing else says so, which is all that a
 * client which ships opaque buffers back and forth has to know. */
static bool is_state(const struct graph *g, uint32_t t)
{
        const struct graph_tensor *x = &g->tensors[t];
        bool may = x->residency == (g->h->blind ? RES_INPUT : RES_STATE);

        return may && x->ndim == 3 && g->h->context_max && x->dims[1] == (int64_t)g->h->context_max;
}

static unsigned count_states(const struct graph *g)
{
        unsigned n = 0;

        for (uint32_t t = 0; t < g->h->ntensors; t++)
                n += is_state(g, t);
        return n;
}

static struct plan_call *add_call(struct making *m, unsigned max_inputs, unsigned max_outputs)
{
        struct plan *p = m->p;
        struct plan_call *calls = realloc(p->calls, (p->ncalls + 1) * sizeof *calls), *c;

        if (!calls)
                return NULL;
        p->calls = calls;
        c = &calls[p->ncalls];
        memset(c, 0, sizeof *c);
        c->inputs = calloc(max_inputs ? max_inputs : 1, sizeof *c->inputs);
        c->outputs = calloc(max_outputs ? max_outputs : 1, sizeof *c->outputs);
        if (!c->inputs || !c->outputs) {
                free(c->inputs);
                free(c->outputs);
                return NULL;
        }
        p->ncalls++;
        c->run.h.flags = run_flags(m->sw);
        c->run.run_class = RUN_NORMAL;
        return c;
}

static struct plan_input *add_input(struct plan_call *c, unsigned tensor, enum plan_source source, uint64_t tensor_off,
                                    uint64_t len)
{
        struct plan_input *in = &c->inputs[c->run.ninputs++];

        in->source = (uint8_t)source;
        in->wire = (struct run_input){.tensor = tensor, .tensor_off = tensor_off, .len = len};
        return in;
}

static struct run_output *add_output(struct plan_call *c, unsigned tensor, uint64_t tensor_off, uint64_t len,
                                     uint64_t region_off)
{
        struct run_output *out = &c->outputs[c->run.noutputs++];

        *out = (struct run_output){.tensor = tensor, .tensor_off = tensor_off, .len = len, .region_off = region_off};
        return out;
}

static void add_range(const struct making *m, struct plan_call *c, enum graph_segment_kind from,
                      enum graph_segment_kind to, uint32_t rows, uint32_t repeat, bool feedback)
{
        const struct graph_segment *a = graph_segment(m->g, from), *b = graph_segment(m->g, to);

        c->ranges[c->run.nranges++] = (struct run_range){.first = a->first,
                                                         .count = b->first + b->count - a->first,
                                                         .rows = rows,
                                                         .repeat = repeat,
                                                         .feedback = feedback};
}

/* Inputs up to INLINE_SMALL go inside the message as long as it has room; what is larger is written before it. */
static int place_inputs(const struct making *m, struct plan_call *c)
{
        size_t arrays = msg_run_bytes(c->run.nranges, c->run.nfeedback, c->run.ninputs, c->run.noutputs, 0);
        size_t room = m->limits->msg_max - arrays;
        uint64_t used = 0;

        if (arrays > m->limits->msg_max)
                return err_set(-EMSGSIZE,
                               "graph %s: a call of %u inputs and %u outputs is %zu bytes, more than a message of "
                               "%zu",
                               m->g->h->name, c->run.ninputs, c->run.noutputs, arrays, m->limits->msg_max);
        if (room > m->limits->inline_bytes)
                room = m->limits->inline_bytes;
        for (unsigned i = 0; i < c->run.ninputs; i++) {
                struct run_input *w = &c->inputs[i].wire;

                if (w->len <= INLINE_SMALL && used + w->len <= room) {
                        w->flags = INPUT_INLINE;
                        w->offset = used;
                        used = ALIGN_UP(used + w->len, 8);
                } else {
                        w->flags = INPUT_WRITTEN;
                }
        }
        c->run.inline_len = (uint32_t)used;
        return 0;
}

/* ---- bytes that will cross ---- */

static uint64_t iterations(const struct plan_call *c)
{
        uint64_t n = 0;

        for (unsigned i = 0; i < c->run.nranges; i++)
                n += c->ranges[i].repeat;
        return n;
}

static void predict_registered(struct plan_call *c)
{
        c->frame_bytes =
            msg_run_bytes(c->run.nranges, c->run.nfeedback, c->run.ninputs, c->run.noutputs, c->run.inline_len);
        c->reply_bytes = sizeof(struct msg_done);
        for (unsigned i = 0; i < c->run.ninputs; i++) {
                c->up.payload_bytes += c->inputs[i].wire.len;
                if (c->inputs[i].wire.flags != INPUT_WRITTEN)
                        continue;
                c->up.bulk_ops++;
                c->up.bulk_bytes += c->inputs[i].wire.len;
        }
        for (unsigned i = 0; i < c->run.noutputs; i++) {
                uint64_t n = c->outputs[i].flags & OUTPUT_EACH ? iterations(c) : 1;

                c->down.bulk_ops += n;
                c->down.bulk_bytes += n * c->outputs[i].len;
                c->down.payload_bytes += n * c->outputs[i].len;
        }
        c->up.messages = c->down.messages = 1;
        c->up.msg_bytes = c->frame_bytes;
        c->down.msg_bytes = c->reply_bytes;
}

/* The serialized forms are sized by packing zeros: the encoding's lengths do not depend on the tensors' values. */
static int predict_serialized(const struct making *m, struct plan_call *c)
{
        unsigned nin = c->run.ninputs;
        uint64_t nout = 0;
        struct serial_blob *blobs;
        struct run_view v = {.run = &c->run, .ranges = c->ranges, .feedback = c->feedback, .outputs = c->outputs};
        int rc;

        for (unsigned i = 0; i < c->run.noutputs; i++)
                nout += c->outputs[i].flags & OUTPUT_EACH ? iterations(c) : 1;
        blobs = calloc(nin + nout, sizeof *blobs);
        if (!blobs)
                return err_set(-ENOMEM, "out of memory for a plan");
        for (unsigned i = 0; i < nin; i++) {
                const struct run_input *w = &c->inputs[i].wire;

                blobs[i] = (struct serial_blob){.tensor = w->tensor, .tensor_off = w->tensor_off, .len = w->len};
                c->up.payload_bytes += w->len;
        }
        rc = serial_call_bytes(&v, m->g, blobs, nin, &c->body_bytes);
        for (uint64_t i = 0, o = 0; i < c->run.noutputs; i++)
                for (uint64_t k = c->outputs[i].flags & OUTPUT_EACH ? iterations(c) : 1; k; k--, o++) {
                        blobs[o] = (struct serial_blob){.tensor = c->outputs[i].tensor,
                                                        .tensor_off = c->outputs[i].tensor_off,
                                                        .len = c->outputs[i].len};
                        c->down.payload_bytes += c->outputs[i].len;
                }
        if (rc == 0)
                rc = serial_result_bytes(m->g, blobs, (unsigned)nout, &c->result_body_bytes);
        free(blobs);
        if (rc < 0)
                return rc;
        c->via_staging = sizeof(struct msg_call) + c->body_bytes > m->limits->msg_max;
        c->via_region = sizeof(struct msg_result) + c->result_body_bytes > m->limits->msg_max;
        c->frame_bytes = sizeof(struct msg_call) + (c->via_staging ? 0 : c->body_bytes);
        c->reply_bytes = sizeof(struct msg_result) + (c->via_region ? 0 : c->result_body_bytes);
        c->up.bulk_ops = c->via_staging;
        c->up.bulk_bytes = c->via_staging ? c->body_bytes : 0;
        c->down.bulk_ops = c->via_region;
        c->down.bulk_bytes = c->via_region ? c->result_body_bytes : 0;
        c->up.messages = c->down.messages = 1;
        c->up.msg_bytes = c->frame_bytes;
        c->down.msg_bytes = c->reply_bytes;
        if (c->via_staging && c->body_bytes > m->p->staging_bytes)
                m->p->staging_bytes = c->body_bytes;
        if (c->via_region && m->p->region_bytes < c->result_body_bytes)
                m->p->region_bytes = c->result_body_bytes;
        return 0;
}

static int finish_call(struct making *m, struct plan_call *c)
{
        int rc;

        if (m->sw->buffers == SW_SERIALIZED)
                return predict_serialized(m, c);
        rc = place_inputs(m, c);
        if (rc == 0)
                predict_registered(c);
        return rc;
}

void plan_bytes_add(struct plan_bytes *sum, const struct plan_bytes *x)
{
        sum->messages += x->messages;
        sum->msg_bytes += x->msg_bytes;
        sum->bulk_ops += x->bulk_ops;
        sum->bulk_bytes += x->bulk_bytes;
        sum->payload_bytes += x->payload_bytes;
}

static int sum_up(struct making *m)
{
        struct plan *p = m->p;

        for (size_t i = 0; i < p->ncalls; i++) {
                const struct plan_call *c = &p->calls[i];
                int64_t past = c->cursor[0];

                plan_bytes_add(&p->up, &c->up);
                plan_bytes_add(&p->down, &c->down);
                for (unsigned r = 0; r < c->run.nranges; r++) {
                        const struct run_range *g = &c->ranges[r];

                        for (uint32_t k = 0; k < g->repeat; k++) {
                                struct graph_cost cost = {0};
                                int rc = graph_cost(m->g, g->rows, g->first, g->count, past, &cost);

                                if (rc < 0)
                                        return rc;
                                p->work.flop += cost.flop;
                                p->work.bytes += cost.bytes;
                                p->work.weight_bytes += cost.weight_bytes;
                                p->work.head_flop += cost.head_flop;
                                p->work.head_weight_bytes += cost.head_weight_bytes;
                                p->work.ops += cost.ops;
                                if (graph_segment(m->g, SEG_BODY)->first == g->first) {
                                        p->tokens += (double)g->rows * m->batch;
                                        past += g->rows;
                                }
                        }
                }
        }
        p->round_trips = p->ncalls;
        return 0;
}

/* ---- causal language models ---- */

/* Caches of the client's region, in tensor order, at fixed places for the longest history. */
static uint64_t state_place(const struct making *m, uint32_t tensor)
{
        uint64_t off = m->p->state_off;

        for (uint32_t t = 0; t < tensor; t++)
                if (is_state(m->g, t))
                        off += graph_tensor_bytes(m->g, t, 1, NULL);
        return off;
}

static void add_state(struct making *m, struct plan_call *c, uint32_t from, uint32_t count, bool up)
{
        for (uint32_t t = 0; t < m->g->h->ntensors; t++) {
                const struct graph_tensor *x = &m->g->tensors[t];
                uint64_t row, off, len;

                if (!is_state(m->g, t) || !count)
                        continue;
                row = (uint64_t)x->dims[2] * op_dtype_bytes(x->dtype);
                len = count * row;
                for (uint32_t b = 0; b < m->batch; b++) {
                        off = ((uint64_t)b * (uint64_t)x->dims[1] + from) * row;
                        if (up)
                                add_input(c, t, SRC_STATE, off, len)->region_off = state_place(m, t) + off;
                        else
                                add_output(c, t, off, len, state_place(m, t) + off);
                }
        }
}

static void add_ids(struct making *m, struct plan_call *c, uint32_t from, uint32_t count)
{
        struct plan_input *in = add_input(c, role(m, ROLE_IDS), SRC_IDS, 0, (uint64_t)count * m->batch * 4);

        in->from = from;
        in->count = count;
        add_input(c, role(m, ROLE_CURSOR), SRC_CURSOR, 0, 8);
}

static uint64_t logits_bytes(const struct making *m)
{
        return (uint64_t)m->batch * m->vocab * 4;
}

/* The whole request as one call. */
static int causal_request(struct making *m)
{
        const struct plan_shape *s = &m->p->shape;
        uint32_t past = m->sw->state == SW_STATE_RECOMPUTE ? 0 : s->cached, feed = s->history - past;
        uint32_t steps = s->new_tokens ? s->new_tokens : 1;
        enum graph_segment_kind last = s->new_tokens ? SEG_CHOOSE : SEG_LAST;
        struct plan_call *c = add_call(m, 3, 2);

        if (!c)
                return err_set(-ENOMEM, "out of memory for a plan");
        c->cursor[0] = (int32_t)past;
        add_ids(m, c, past, feed);
        add_range(m, c, SEG_BODY, last, feed, 1, false);
        if (steps > 1) {
                c->run.nfeedback = 1;
                c->feedback[0] = (struct run_feedback){
                    .src = role(m, ROLE_TOKEN), .dst = role(m, ROLE_IDS), .len = (uint64_t)m->batch * 4};
                add_range(m, c, SEG_BODY, SEG_CHOOSE, 1, steps - 1, true);
        }
        if (s->check && steps > 1) {
                add_input(c, role(m, ROLE_FORCED), SRC_FORCED, 0, (uint64_t)steps * m->batch * 4);
                c->feedback[0].src = role(m, ROLE_FORCED);
                c->feedback[0].src_step = m->batch * 4;
        }
        if (s->check || m->sw->outputs == SW_LAST || !s->new_tokens) {
                struct run_output *o = add_output(c, role(m, ROLE_LAST), 0, logits_bytes(m), m->p->check_off);

                if (steps > 1) {
                        o->flags = OUTPUT_EACH;
                        o->step = (uint32_t)logits_bytes(m);
                }
        }
        if (s->new_tokens)
                add_output(c, role(m, ROLE_TOKENS), 0, (uint64_t)s->new_tokens * m->batch * 4, m->p->result_off);
        return finish_call(m, c);
}

static void step_outputs(struct making *m, struct plan_call *c, uint32_t rows)
{
        uint64_t row = (uint64_t)m->vocab * 4;

        c->logits_stride = row;
        if (m->sw->outputs == SW_ALL) {
                add_range(m, c, SEG_BODY, SEG_BODY, rows, 1, false);
                add_range(m, c, SEG_ALL, SEG_ALL, rows, 1, false);
                add_output(c, role(m, ROLE_ALL), 0, logits_bytes(m) * rows, m->p->check_off);
                c->logits_off = m->p->check_off + (rows - 1) * row;
                c->logits_stride = row * rows;
                return;
        }
        add_range(m, c, SEG_BODY, m->sw->outputs == SW_TOKEN && m->p->shape.new_tokens ? SEG_CHOOSE : SEG_LAST, rows, 1,
                  false);
        if (m->sw->outputs == SW_TOKEN && m->p->shape.new_tokens)
                add_output(c, role(m, ROLE_TOKEN), 0, m->batch * 4,
                           m->p->result_off + (m->p->ncalls - 1) * m->batch * 4);
        if (m->sw->outputs == SW_LAST || m->p->shape.check || !m->p->shape.new_tokens)
                add_output(c, role(m, ROLE_LAST), 0, logits_bytes(m), m->p->check_off);
        c->logits_off = m->p->check_off;
}

/* Step `i` of the generation as a call of its own. */
static int causal_step(struct making *m, uint32_t i)
{
        const struct plan_shape *s = &m->p->shape;
        unsigned states = count_states(m->g) * m->batch;
        uint32_t known = s->history + i;           /* ids the client knows when it makes this call */
        uint32_t past = i ? known - 1 : s->cached; /* of them, what the state covers */
        struct plan_call *c = add_call(m, 2 + states, 2 + states);
        if (!c)
                return err_set(-ENOMEM, "out of memory for a plan");
        if (m->sw->state == SW_STATE_RECOMPUTE)
                past = 0;
        c->cursor[0] = (int32_t)past;
        add_ids(m, c, past, known - past);
        if (m->sw->state == SW_STATE_ROUNDTRIP)
                add_state(m, c, 0, past, true);
        step_outputs(m, c, known - past);
        if (m->sw->state == SW_STATE_ROUNDTRIP)
                add_state(m, c, 0, known, false);
        if (m->sw->state == SW_STATE_DELTA)
                add_state(m, c, past, known - past, false);
        c->after = m->sw->outputs == SW_TOKEN || !s->new_tokens ? AFTER_NOTHING : AFTER_CHOOSE;
        return finish_call(m, c);
}

static int causal_check(const struct making *m)
{
        const struct plan_shape *s = &m->p->shape;
        uint64_t longest = (uint64_t)s->history + (s->new_tokens ? s->new_tokens - 1 : 0);

        if (!has_role(m, ROLE_IDS) || !has_role(m, ROLE_CURSOR) || !has_role(m, ROLE_LAST) || !has_role(m, ROLE_TOKENS))
                return err_set(-EINVAL, "graph %s: lacks the tensors of a language model", m->g->h->name);
        if (s->history <= s->cached)
                return err_set(-EINVAL, "a request needs at least one new id");
        if (longest > m->g->h->context_max)
                return err_set(-EINVAL, "graph %s: %llu positions do not fit its context of %u", m->g->h->name,
                               (unsigned long long)longest, m->g->h->context_max);
        return 0;
}

/* Region: tokens | states | logits (all steps in a check, all positions of the longest call, ...). Where tokens and states
 * lie does not depend on the history, so that the plans of a conversation's turns agree on it. */
static void causal_layout(struct making *m)
{
        struct plan *p = m->p;
        uint32_t steps = p->shape.new_tokens ? p->shape.new_tokens : 1;
        uint64_t logits = logits_bytes(m), states_end;

        p->result_off = 0;
        p->result_is_tokens = p->shape.new_tokens > 0;
        if (m->sw->call == SW_REQUEST)
                logits *= steps;
        else if (m->sw->outputs == SW_ALL)
                logits *= (uint64_t)p->shape.history + steps;
        p->state_off = states_end = ALIGN_UP((uint64_t)steps * m->batch * 4, REGION_ALIGN);
        if (m->sw->state == SW_STATE_ROUNDTRIP || m->sw->state == SW_STATE_DELTA)
                states_end = ALIGN_UP(state_place(m, m->g->h->ntensors), REGION_ALIGN);
        p->check_off = states_end;
        p->region_bytes = p->check_off + ALIGN_UP(logits, REGION_ALIGN);
        if (!p->result_is_tokens) {
                p->result_off = p->check_off;
                p->result_bytes = logits_bytes(m);
        } else {
                p->result_bytes = (uint64_t)steps * m->batch * 4;
        }
}

static int causal_calls(struct making *m)
{
        uint32_t steps = m->p->shape.new_tokens ? m->p->shape.new_tokens : 1;
        int rc = causal_check(m);

        if (rc < 0)
                return rc;
        causal_layout(m);
        if (m->sw->call == SW_REQUEST)
                return causal_request(m);
        for (uint32_t i = 0; i < steps && rc == 0; i++)
                rc = causal_step(m, i);
        if (rc == 0 && !m->p->result_is_tokens)
                m->p->result_off = m->p->calls[0].logits_off;
        return rc;
}

/* ---- feed-forward models: one call, whatever the switches ---- */

static int forward_calls(struct making *m)
{
        struct plan *p = m->p;
        uint32_t rows = m->g->h->rows_max;
        unsigned in = role(m, ROLE_INPUT), out = role(m, ROLE_OUTPUT);
        struct plan_call *c;

        if (in == GRAPH_NONE || out == GRAPH_NONE)
                return err_set(-EINVAL, "graph %s: lacks an input or an output", m->g->h->name);
        p->result_bytes = graph_tensor_bytes(m->g, out, rows, NULL);
        p->state_off = p->region_bytes = ALIGN_UP(p->result_bytes, REGION_ALIGN);
        c = add_call(m, 1, 1);
        if (!c)
                return err_set(-ENOMEM, "out of memory for a plan");
        add_input(c, in, SRC_INPUT, 0, graph_tensor_bytes(m->g, in, rows, NULL));
        add_range(m, c, SEG_BODY, SEG_BODY, rows, 1, false);
        add_output(c, out, 0, p->result_bytes, 0);
        return finish_call(m, c);
}

int plan_make(const struct graph *g, enum workload_driver driver, const struct switches *sw,
              const struct plan_shape *shape, const struct plan_limits *limits, struct plan *out)
{
        struct making m = {.p = out, .g = g, .sw = sw, .limits = limits, .batch = g->h->batch, .vocab = g->h->vocab};
        int rc;

        *out = (struct plan){.g = g, .driver = driver, .sw = *sw, .shape = *shape};
        if (!graph_segment(g, SEG_BODY))
                return err_set(-EINVAL, "graph %s: has no body", g->h->name);
        rc = driver == DRIVE_CAUSAL ? causal_calls(&m) : forward_calls(&m);
        if (rc == 0)
                rc = sum_up(&m);
        if (rc < 0)
                plan_free(out);
        return rc;
}

void plan_free(struct plan *p)
{
        for (size_t i = 0; i < p->ncalls; i++) {
                free(p->calls[i].inputs);
                free(p->calls[i].outputs);
        }
        free(p->calls);
        p->calls = NULL;
        p->ncalls = 0;
}

static void print_call(FILE *to, const struct plan *p, size_t i)
{
        const struct plan_call *c = &p->calls[i];

        fprintf(to, "%5zu  %-4s", i + 1, p->sw.buffers == SW_SERIALIZED ? "CALL" : "RUN");
        for (unsigned r = 0; r < c->run.nranges; r++)
                fprintf(to, "  nodes %u-%u rows %u x%u", c->ranges[r].first,
                        c->ranges[r].first + c->ranges[r].count - 1, c->ranges[r].rows, c->ranges[r].repeat);
        fprintf(
            to, "  from position %d  up %llu B (message %zu, written %llu)  down %llu B (message %zu, written %llu)\n",
            c->cursor[0], (unsigned long long)c->up.payload_bytes, c->frame_bytes, (unsigned long long)c->up.bulk_bytes,
            (unsigned long long)c->down.payload_bytes, c->reply_bytes, (unsigned long long)c->down.bulk_bytes);
}

void plan_print(FILE *to, const struct plan *p)
{
        fprintf(to, "switches: weights %s, call %s, state %s, outputs %s, plan_cache %s, buffers %s%s\n",
                sw_weights_names[p->sw.weights], sw_call_names[p->sw.call], sw_state_names[p->sw.state],
                sw_outputs_names[p->sw.outputs], p->sw.plan_cache ? "on" : "off", sw_buffers_names[p->sw.buffers],
                p->sw.blind ? ", blind graph" : "");
        for (size_t i = 0; i < p->ncalls; i++)
                print_call(to, p, i);
        if (p->sw.buffers == SW_IN_PROCESS) {
                fprintf(to, "runs in the server's process: no round trip and no byte is part of its latency\n");
        } else {
                fprintf(to, "round trips: %llu\n", (unsigned long long)p->round_trips);
                fprintf(to, "payload bytes: up %llu, down %llu\n", (unsigned long long)p->up.payload_bytes,
                        (unsigned long long)p->down.payload_bytes);
                fprintf(to,
                        "bytes on the transport: up %llu in messages + %llu written, down %llu in messages + %llu "
                        "written\n",
                        (unsigned long long)p->up.msg_bytes, (unsigned long long)p->up.bulk_bytes,
                        (unsigned long long)p->down.msg_bytes, (unsigned long long)p->down.bulk_bytes);
        }
        fprintf(
            to, "work: %.0f positions, %.4g FLOP (output head %.4g), %.4g weight bytes (output head %.4g), %u ops\n",
            p->tokens, p->work.flop, p->work.head_flop, p->work.weight_bytes, p->work.head_weight_bytes, p->work.ops);
}
