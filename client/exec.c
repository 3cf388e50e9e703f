/*
 * Walking a plan. What a request costs here at least, for a plan of one call over shared memory: five clock readings,
 * one copy of the frame into the ring (the transfer itself), one copy of the answer out of it, and the check of the
 * answer's header. No allocation, no lock, no system call.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "err.h"
#include "exec.h"

/* ---- filling a call ---- */

static void gather_ids(const struct exec *x, const struct exec_data *d, const struct plan_input *in, int32_t *out)
{
        bool own = x->p->sw.call == SW_STEP; /* a stepping client appends to its own copy of the history */
        const int32_t *from = own ? x->ids : d->history;
        uint32_t cap = own ? x->ids_cap : d->history_cap, batch = x->p->g->h->batch;

        for (uint32_t b = 0; b < batch; b++)
                memcpy(out + (size_t)b * in->count, from + (size_t)b * cap + in->from, in->count * sizeof *out);
        if (__builtin_expect(injury.trim_input, 0) && in->count > 1)
                memmove(out, out + in->count / 2, (in->count - in->count / 2) * sizeof *out);
}

/* Where an input's bytes are; ids are gathered into `gather`. */
static const void *source_of(const struct exec *x, const struct exec_data *d, const struct plan_call *c,
                             const struct plan_input *in)
{
        switch ((enum plan_source)in->source) {
        case SRC_IDS:
                gather_ids(x, d, in, x->gather);
                return x->gather;
        case SRC_CURSOR:
                return c->cursor;
        case SRC_FORCED:
                return d->forced;
        case SRC_STATE:
                return x->region + in->region_off;
        case SRC_INPUT:
                return d->input;
        }
        return NULL;
}

static void fill_inline(struct exec *x, const struct exec_data *d, size_t i)
{
        const struct plan_call *c = &x->p->calls[i];

        for (unsigned k = 0; k < c->run.ninputs; k++) {
                const struct plan_input *in = &c->inputs[k];

                if (in->wire.flags != INPUT_INLINE)
                        continue;
                if (in->source == SRC_IDS)
                        gather_ids(x, d, in, (int32_t *)(x->inlines[i] + in->wire.offset));
                else
                        memcpy(x->inlines[i] + in->wire.offset, source_of(x, d, c, in), in->wire.len);
        }
}

static int write_inputs(struct exec *x, const struct exec_data *d, const struct plan_call *c)
{
        int rc = 0;

        for (unsigned k = 0; k < c->run.ninputs && rc == 0; k++) {
                const struct plan_input *in = &c->inputs[k];

                if (in->wire.flags == INPUT_WRITTEN)
                        rc = remote_write(x->r, source_of(x, d, c, in), in->wire.len, x->m->tensors[in->wire.tensor],
                                          in->wire.tensor_off);
        }
        return rc;
}

/* Encodes the call; the body goes into the frame, or is written to staging. */
static int build_serialized(struct exec *x, const struct exec_data *d, size_t i, struct exec_sample *s)
{
        const struct plan_call *c = &x->p->calls[i];
        struct run_view v = {.run = &c->run, .ranges = c->ranges, .feedback = c->feedback, .outputs = c->outputs};
        struct msg_call *call = (struct msg_call *)x->frames[i];
        int rc;

        for (unsigned k = 0; k < c->run.ninputs; k++) {
                const struct run_input *w = &c->inputs[k].wire;

                x->blobs[k] = (struct serial_blob){.tensor = w->tensor,
                                                   .tensor_off = w->tensor_off,
                                                   .len = w->len,
                                                   .data = source_of(x, d, c, &c->inputs[k])};
                s->bytes_copied += w->len;
        }
        x->body.len = 0;
        rc = serial_pack_call(&x->body, &v, x->p->g, x->blobs, c->run.ninputs);
        if (rc < 0)
                return rc;
        if (x->body.len != c->body_bytes)
                return err_set(-EPROTO, "a call was encoded into %zu bytes where the plan said %zu", x->body.len,
                               c->body_bytes);
        call->body_len = x->body.len;
        if (!c->via_staging) {
                memcpy(call + 1, x->body.data, x->body.len);
                s->bytes_copied += c->up.payload_bytes; /* out of the encoder, into the message */
        }
        return 0;
}

static int post_payload_injury(struct exec *x)
{
        return remote_write(x->r, x->extra, injury.payload_bytes, x->r->shadow, 0);
}

/* From the first byte offered to the frame given away. */
static int post(struct exec *x, const struct exec_data *d, size_t i, uint64_t id)
{
        const struct plan_call *c = &x->p->calls[i];
        bool serialized = x->p->sw.buffers == SW_SERIALIZED;
        int rc = 0;

        ((struct msg_header *)x->frames[i])->request_id = id;
        if (__builtin_expect(injury.payload_bytes != 0, 0) && i == 0)
                rc = post_payload_injury(x);
        if (rc == 0 && serialized && c->via_staging)
                rc = remote_write(x->r, x->body.data, x->body.len, x->r->staging, 0);
        if (rc == 0 && !serialized)
                rc = write_inputs(x, d, c);
        return rc < 0 ? rc : remote_send(x->r, x->frames[i], c->frame_bytes);
}

/* ---- taking an answer ---- */

static int take_serialized(struct exec *x, const struct plan_call *c, struct exec_sample *s)
{
        const struct msg_result *res = (const void *)x->r->inbox;
        unsigned n = 0;
        const void *body = res + 1;
        int rc;

        if (res->in_region)
                body = x->region;
        if (res->body_len != c->result_body_bytes)
                return err_set(-EPROTO, "a result of %llu bytes where the plan said %zu",
                               (unsigned long long)res->body_len, c->result_body_bytes);
        for (unsigned k = 0; k < c->run.noutputs; k++)
                n += c->outputs[k].flags & OUTPUT_EACH ? res->done.iterations : 1;
        if (n > x->nblobs)
                return err_set(-EPROTO, "a result of %u outputs where the plan said at most %u", n, x->nblobs);
        rc = serial_unpack_result(body, res->body_len, x->answers, n);
        if (rc < 0)
                return rc;
        for (unsigned k = 0, o = 0; k < c->run.noutputs; k++)
                for (unsigned each = 0; each < (c->outputs[k].flags & OUTPUT_EACH ? res->done.iterations : 1);
                     each++, o++) {
                        if (x->answers[o].len != c->outputs[k].len)
                                return err_set(-EPROTO, "output %u of a result has the wrong length", k);
                        memcpy(x->result + c->outputs[k].region_off + (size_t)each * c->outputs[k].step,
                               x->answers[o].data, x->answers[o].len);
                        s->bytes_copied += x->answers[o].len;
                }
        return 0;
}

/* Index of the largest, the lowest on ties; NaN is never larger. Blocks of lanes that the compiler keeps in registers; only
 * a block that holds a new maximum is searched, which after the first few is rare. */
#define ARGMAX_BLOCK 256u

static int32_t argmax(const float *v, uint32_t n)
{
        float best = -__builtin_inff();
        uint32_t at = 0, i = 0;

        for (; i + ARGMAX_BLOCK <= n; i += ARGMAX_BLOCK) {
                float lane[16], top;

                for (int l = 0; l < 16; l++)
                        lane[l] = -__builtin_inff();
                for (uint32_t k = i; k < i + ARGMAX_BLOCK; k += 16)
                        for (uint32_t l = 0; l < 16; l++)
                                lane[l] = v[k + l] > lane[l] ? v[k + l] : lane[l];
                top = lane[0];
                for (int l = 1; l < 16; l++)
                        top = lane[l] > top ? lane[l] : top;
                if (!(top > best))
                        continue;
                best = top;
                for (at = i; v[at] != best; at++)
                        ;
        }
        for (; i < n; i++)
                if (v[i] > best) {
                        best = v[i];
                        at = i;
                }
        return (int32_t)at;
}

/* The client's own step of the generation: choose (or take what is forced), remember, append to the history. */
static void step(struct exec *x, const struct exec_data *d, size_t i)
{
        const struct plan *p = x->p;
        const struct plan_call *c = &p->calls[i];
        const uint8_t *base = p->sw.buffers == SW_SERIALIZED ? x->result : x->region;
        uint32_t batch = p->g->h->batch;

        for (uint32_t b = 0; b < batch; b++) {
                const float *logits = (const float *)(base + c->logits_off + b * c->logits_stride);
                int32_t token;

                if (c->after == AFTER_CHOOSE)
                        token = argmax(logits, p->g->h->vocab);
                else
                        token = ((const int32_t *)(base + p->result_off))[i * batch + b];
                if (x->last_logits)
                        memcpy(x->last_logits + (i * batch + b) * p->g->h->vocab, logits, p->g->h->vocab * 4ul);
                x->tokens[i * batch + b] = token;
                if (p->shape.history + i < x->ids_cap)
                        x->ids[(size_t)b * x->ids_cap + p->shape.history + i] =
                            d->forced ? d->forced[i * batch + b] : token;
        }
}

static void add_stamps(struct exec_sample *s, const struct run_stamps *t, uint64_t offered_by_us, uint64_t arrived,
                       int64_t offset)
{
        int64_t up = (int64_t)t->received_ns - offset - (int64_t)offered_by_us;
        int64_t down = (int64_t)arrived - ((int64_t)t->offered_ns - offset);
        int64_t *l = s->leaf_ns;

        l[LEAF_NETWORK_C2S] += up;
        l[LEAF_SERVER_QUEUE] += (int64_t)(t->taken_ns - t->received_ns);
        l[LEAF_SERVER_PLAN] += (int64_t)(t->planned_ns - t->taken_ns);
        l[LEAF_SERVER_PLACEMENT] += (int64_t)(t->placed_ns - t->planned_ns);
        l[LEAF_SERVER_EXECUTION] += (int64_t)t->exec_ns;
        l[LEAF_SERVER_LAUNCH] += (int64_t)(t->executed_ns - t->placed_ns) - (int64_t)t->exec_ns;
        l[LEAF_SERVER_SKELETONIZATION] += (int64_t)(t->offered_ns - t->executed_ns);
        l[LEAF_NETWORK_S2C] += down;
        s->least_up_ns = up < s->least_up_ns ? up : s->least_up_ns;
        s->least_down_ns = down < s->least_down_ns ? down : s->least_down_ns;
        s->server_duration_ns += t->offered_ns - t->received_ns;
        s->executor_ns += t->offered_ns - t->planned_ns;
        s->cleanup_ns += t->cleanup_ns;
}

/* The leaves are differences of one chain of stamps and so add up by construction; what can be wrong is the chain. Its links
 * between the two clocks are judged when the offset is known (exec_settle). */
static bool in_order(const struct run_stamps *t)
{
        return t->received_ns <= t->taken_ns && t->taken_ns <= t->planned_ns && t->planned_ns <= t->placed_ns &&
               t->placed_ns <= t->executed_ns && t->executed_ns <= t->offered_ns &&
               t->exec_ns <= t->executed_ns - t->placed_ns;
}

void exec_settle(struct exec_sample *s, int64_t shift_ns, uint64_t error_ns)
{
        int64_t sum = shift_ns * (int64_t)s->calls, slack = -(int64_t)error_ns;

        s->leaf_ns[LEAF_NETWORK_C2S] -= sum;
        s->leaf_ns[LEAF_NETWORK_S2C] += sum;
        s->disordered |= s->least_up_ns - shift_ns < slack || s->least_down_ns + shift_ns < slack;
}

static void add_done(struct exec_sample *s, const struct msg_done *done)
{
        s->bytes_copied += done->bytes_copied;
        s->plan_hits += done->plan_hits;
        s->plan_misses += done->plan_misses;
        s->ops += done->ops;
        s->applied = done->h.flags;
}

/* One call; *t is the end of the one before it and becomes the end of this one. */
static int one_call(struct exec *x, const struct exec_data *d, size_t i, struct exec_sample *s, uint64_t *t)
{
        const struct plan *p = x->p;
        bool serialized = p->sw.buffers == SW_SERIALIZED;
        const struct msg_done *done = (const void *)x->r->inbox;
        uint64_t id = x->r->next_id++, offered, arrived = 0, taken;
        int rc = 0;

        if (serialized)
                rc = build_serialized(x, d, i, s);
        else
                fill_inline(x, d, i);
        if (i == 0)
                injure(LEAF_CLIENT_SERIALIZE);
        offered = clock_ns();
        s->leaf_ns[LEAF_CLIENT_SERIALIZE] += (int64_t)(offered - *t);
        if (i == 0)
                injure(LEAF_NETWORK_C2S);
        if (rc == 0)
                rc = post(x, d, i, id);
        if (rc == 0)
                rc = remote_answer(x->r, serialized ? MSG_RESULT : MSG_DONE, id, &arrived);
        if (rc < 0)
                return rc;
        add_stamps(s, &done->stamps, offered, arrived, x->r->offset_ns);
        s->disordered |= !in_order(&done->stamps);
        x->hold_ns[i] = done->stamps.offered_ns - done->stamps.received_ns;
        add_done(s, done);
        if (i == 0)
                injure(LEAF_CLIENT_DESERIALIZE);
        if (serialized)
                rc = take_serialized(x, &p->calls[i], s);
        taken = clock_ns();
        s->leaf_ns[LEAF_CLIENT_DESERIALIZE] += (int64_t)(taken - arrived);
        *t = taken;
        if (p->sw.call != SW_STEP || p->driver != DRIVE_CAUSAL || rc < 0)
                return rc;
        if (i == 0)
                injure(LEAF_CLIENT_STEP);
        step(x, d, i);
        *t = clock_ns();
        s->leaf_ns[LEAF_CLIENT_STEP] += (int64_t)(*t - taken);
        return 0;
}

/* A stepping client keeps its history where it can append to it: the application's own list of ids. */
static void start_history(struct exec *x, const struct exec_data *d)
{
        const struct plan *p = x->p;

        if (p->sw.call != SW_STEP || p->driver != DRIVE_CAUSAL)
                return;
        for (uint32_t b = 0; b < p->g->h->batch; b++)
                memcpy(x->ids + (size_t)b * x->ids_cap, d->history + (size_t)b * d->history_cap,
                       p->shape.history * sizeof *x->ids);
}

static void finish(struct exec *x)
{
        const struct plan *p = x->p;

        if (p->sw.call == SW_STEP && p->result_is_tokens)
                x->result_at = (const uint8_t *)x->tokens;
        else if (p->sw.buffers == SW_SERIALIZED)
                x->result_at = x->result + p->result_off;
        else
                x->result_at = x->region + p->result_off;
}

/* In the server's process: the timing is the server's, from host buffer to host buffer. */
static void local_times(struct exec_sample *s, const struct run_stamps *t)
{
        int64_t sum = 0;

        memset(s->leaf_ns, 0, sizeof s->leaf_ns);
        s->latency_ns = t->local_ns;
        s->leaf_ns[LEAF_SERVER_PLACEMENT] = (int64_t)(t->placed_ns - t->planned_ns);
        s->leaf_ns[LEAF_SERVER_EXECUTION] = (int64_t)t->exec_ns;
        s->leaf_ns[LEAF_SERVER_LAUNCH] = (int64_t)(t->executed_ns - t->placed_ns) - (int64_t)t->exec_ns;
        s->leaf_ns[LEAF_SERVER_SKELETONIZATION] = (int64_t)t->local_ns - (int64_t)(t->executed_ns - t->planned_ns);
        for (int l = 0; l < LEAF_COUNT; l++)
                sum += s->leaf_ns[l];
        s->residual_ns = (int64_t)s->latency_ns - sum;
        s->server_duration_ns = s->executor_ns = t->local_ns;
        s->first_token_ns = 0;
}

int exec_run(struct exec *x, const struct exec_data *d, struct exec_sample *s)
{
        const struct plan *p = x->p;
        uint64_t start, t;
        int64_t sum = 0;

        *s = (struct exec_sample){.calls = (uint32_t)p->ncalls, .least_up_ns = INT64_MAX, .least_down_ns = INT64_MAX};
        x->region = x->r->region->region.addr;
        start = t = clock_ns();
        start_history(x, d);
        for (size_t i = 0; i < p->ncalls; i++) {
                int rc = one_call(x, d, i, s, &t);

                if (rc < 0)
                        return rc;
                if (i == 0 && p->driver == DRIVE_CAUSAL && (p->ncalls > 1 || p->shape.new_tokens == 1))
                        s->first_token_ns = t - start; /* where all tokens come at once, none is seen alone */
        }
        finish(x);
        s->start_ns = start;
        s->latency_ns = t - start;
        if (p->sw.buffers == SW_IN_PROCESS) {
                local_times(s, &((const struct msg_done *)(const void *)x->r->inbox)->stamps);
                return 0;
        }
        for (int l = 0; l < LEAF_COUNT; l++)
                sum += s->leaf_ns[l];
        s->residual_ns = (int64_t)s->latency_ns - sum;
        for (int l = LEAF_SERVER_QUEUE; l <= LEAF_SERVER_SKELETONIZATION; l++)
                s->server_residual_ns -= s->leaf_ns[l];
        s->server_residual_ns += (int64_t)s->server_duration_ns;
        return 0;
}

const void *exec_result(const struct exec *x, size_t *len)
{
        *len = x->p->result_bytes;
        return x->result_at;
}

struct digest exec_digest(const struct exec *x)
{
        return digest_of(x->result_at, x->p->result_bytes);
}

/* ---- calibration ---- */

/* One length for each write of the answer; what a frame has no room for (thousands of steps) is added to the last. */
static uint32_t pattern_lengths(const struct exec *x, const struct plan_call *c, uint32_t *lens, size_t room)
{
        uint32_t n = 0, iterations = 0;

        if (x->p->sw.buffers == SW_SERIALIZED) {
                lens[0] = (uint32_t)c->result_body_bytes;
                return c->via_region;
        }
        for (unsigned r = 0; r < c->run.nranges; r++)
                iterations += c->ranges[r].repeat;
        for (unsigned k = 0; k < c->run.noutputs; k++)
                for (uint32_t each = c->outputs[k].flags & OUTPUT_EACH ? iterations : 1; each; each--) {
                        if (n < room)
                                lens[n++] = (uint32_t)c->outputs[k].len;
                        else
                                lens[n - 1] += (uint32_t)c->outputs[k].len;
                }
        return n;
}

static size_t pattern_frame(struct exec *x, const struct plan_call *c, uint64_t hold, uint64_t id)
{
        struct msg_pattern *m = (void *)x->r->frame;
        uint32_t *lens = (uint32_t *)(m + 1);
        uint32_t n = pattern_lengths(x, c, lens, (x->r->attr.msg_max - sizeof *m) / sizeof *lens);
        size_t len = c->frame_bytes;

        if (len < sizeof *m + n * sizeof *lens)
                len = sizeof *m + n * sizeof *lens;
        msg_header_init(&m->h, MSG_PATTERN, len, 0, id);
        m->hold_ns = hold;
        m->reply_len = (uint32_t)c->reply_bytes;
        m->region = 1;
        m->nwrites = n;
        m->reserved = 0;
        return len;
}

static int pattern_writes(struct exec *x, const struct plan_call *c)
{
        uint64_t off = 0;
        int rc = 0;

        if (x->p->sw.buffers == SW_SERIALIZED)
                return c->via_staging ? remote_write(x->r, x->extra, c->body_bytes, x->r->shadow, 0) : 0;
        for (unsigned k = 0; k < c->run.ninputs && rc == 0; k++) {
                const struct run_input *w = &c->inputs[k].wire;

                if (w->flags != INPUT_WRITTEN)
                        continue;
                rc = remote_write(x->r, x->extra + off, w->len, x->r->shadow, off);
                off += w->len;
        }
        return rc;
}

/* What arrived is looked at, a word per line, outside the timing: the application would have read it too, and on a medium
 * that is memory the next write costs what it costs because of that. */
static void look_at(const uint8_t *at, uint64_t len)
{
        for (uint64_t i = 0; i < len; i += CACHE_LINE)
                (void)*(const volatile uint8_t *)(at + i);
}

int exec_calibrate(struct exec *x, uint64_t *network_ns)
{
        *network_ns = 0;
        for (size_t i = 0; i < x->p->ncalls; i++) {
                const struct plan_call *c = &x->p->calls[i];
                const struct msg_pattern_reply *a = (const void *)x->r->inbox;
                uint64_t id = x->r->next_id++, start, arrived = 0;
                size_t len = pattern_frame(x, c, x->hold_ns[i], id);
                int rc;

                start = clock_ns();
                rc = pattern_writes(x, c);
                if (rc == 0)
                        rc = remote_send(x->r, x->r->frame, len);
                if (rc == 0)
                        rc = remote_answer(x->r, MSG_PATTERN, id, &arrived);
                if (rc < 0)
                        return err_trail(rc, "while calibrating the network");
                *network_ns += arrived - start - (a->offered_ns - a->received_ns);
                look_at(x->r->shadow_region->region.addr, c->down.bulk_bytes);
        }
        return 0;
}

/* ---- set-up ---- */

static int prepare_frame(struct exec *x, size_t i)
{
        const struct plan_call *c = &x->p->calls[i];
        bool serialized = x->p->sw.buffers == SW_SERIALIZED;
        struct run_input *inputs = calloc(c->run.ninputs ? c->run.ninputs : 1, sizeof *inputs);
        struct msg_run run = c->run;

        x->frames[i] = aligned_alloc(CACHE_LINE, ALIGN_UP(c->frame_bytes + CACHE_LINE, CACHE_LINE));
        if (!inputs || !x->frames[i]) {
                free(inputs);
                return err_set(-ENOMEM, "out of memory for a request's frames");
        }
        memset(x->frames[i], 0, c->frame_bytes);
        run.model = x->m->id;
        if (serialized) {
                struct msg_call *call = (struct msg_call *)x->frames[i];

                msg_header_init(&call->h, MSG_CALL, c->frame_bytes, run.h.flags, 0);
                call->in_staging = c->via_staging;
                call->region = 0;
                call->region_len = c->via_region ? c->result_body_bytes : 0;
        } else {
                for (unsigned k = 0; k < run.ninputs; k++)
                        inputs[k] = c->inputs[k].wire;
                msg_header_init(&run.h, MSG_RUN, c->frame_bytes, run.h.flags, 0);
                msg_run_pack(x->frames[i], &run, c->ranges, c->feedback, inputs, c->outputs, NULL);
                x->inlines[i] = x->frames[i] + c->frame_bytes - run.inline_len;
        }
        free(inputs);
        return 0;
}

static int prepare_keys(struct exec *x)
{
        int rc = 0;

        if (x->p->sw.buffers == SW_SERIALIZED)
                return x->p->staging_bytes ? remote_staging(x->r, x->p->staging_bytes) : 0;
        for (size_t i = 0; i < x->p->ncalls; i++)
                for (unsigned k = 0; k < x->p->calls[i].run.ninputs && rc == 0; k++)
                        if (x->p->calls[i].inputs[k].wire.flags == INPUT_WRITTEN)
                                rc = remote_ask_tensor(x->r, x->m, x->p->calls[i].inputs[k].wire.tensor);
        return rc;
}

static int prepare_memory(struct exec *x)
{
        const struct plan *p = x->p;
        uint32_t batch = p->g->h->batch, steps = p->shape.new_tokens ? p->shape.new_tokens : 1;
        unsigned nblobs = 1;
        uint64_t up = injury.payload_bytes, down_max = 0;

        x->ids_cap = p->shape.history + steps;
        for (size_t i = 0; i < p->ncalls; i++) {
                const struct plan_call *c = &p->calls[i];
                unsigned n = c->run.ninputs + c->run.noutputs * (steps + 1);

                nblobs = n > nblobs ? n : nblobs;
                up = c->up.bulk_bytes > up ? c->up.bulk_bytes : up;
                down_max = c->down.bulk_bytes > down_max ? c->down.bulk_bytes : down_max;
        }
        x->nblobs = nblobs;
        x->extra_len = up ? up : 1;
        x->frames = calloc(p->ncalls, sizeof *x->frames);
        x->inlines = calloc(p->ncalls, sizeof *x->inlines);
        x->hold_ns = calloc(p->ncalls, sizeof *x->hold_ns);
        x->ids = calloc((size_t)batch * x->ids_cap, sizeof *x->ids);
        x->gather = calloc((size_t)batch * x->ids_cap, sizeof *x->gather);
        x->tokens = calloc((size_t)batch * steps, sizeof *x->tokens);
        x->blobs = calloc(nblobs, sizeof *x->blobs);
        x->answers = calloc(nblobs, sizeof *x->answers);
        x->extra = calloc(1, x->extra_len);
        if (p->sw.buffers == SW_SERIALIZED)
                x->result = calloc(1, p->region_bytes + 1);
        if (!x->frames || !x->inlines || !x->hold_ns || !x->ids || !x->gather || !x->tokens || !x->blobs ||
            !x->answers || !x->extra || (p->sw.buffers == SW_SERIALIZED && !x->result))
                return err_set(-ENOMEM, "out of memory for a request");
        memset(x->extra, 0x5a, x->extra_len); /* pages of its own: untouched ones would all be the one page of zeros */
        return remote_shadow(x->r, up, down_max);
}

int exec_prepare(struct exec *x, struct remote *r, struct remote_model *m, const struct plan *p)
{
        int rc;

        *x = (struct exec){.r = r, .m = m, .p = p};
        rc = prepare_memory(x);
        if (rc == 0)
                rc = prepare_keys(x);
        if (rc == 0)
                rc = remote_region(r, p->region_bytes);
        for (size_t i = 0; i < p->ncalls && rc == 0; i++)
                rc = prepare_frame(x, i);
        if (rc < 0) {
                exec_free(x);
                return rc;
        }
        return 0;
}

void exec_free(struct exec *x)
{
        for (size_t i = 0; x->frames && x->p && i < x->p->ncalls; i++)
                free(x->frames[i]);
        free(x->frames);
        free(x->inlines);
        free(x->hold_ns);
        free(x->ids);
        free(x->gather);
        free(x->tokens);
        free(x->result);
        free(x->blobs);
        free(x->answers);
        free(x->extra);
        serial_free(&x->body);
        *x = (struct exec){0};
}
