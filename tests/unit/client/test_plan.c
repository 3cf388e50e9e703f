/*
 * What a plan says will cross is what the baselines' definitions (SPEC 4) say must cross: the sums here are made from the
 * switches' meaning, without looking at the plan's calls. And what a plan says of its frames is what packing makes.
 */
#include "client_fixture.h"

#include "baseline.h"
#include "plan.h"

static const struct plan_limits usual = {.msg_max = 65536, .inline_bytes = 16384};

struct made { /* a plan and the graphs under it */
        struct graph rich, blind;
        struct plan p;
};

static void make(struct made *m, const struct graph *g, const char *baseline, enum workload_driver driver,
                 const struct plan_shape *shape, const struct plan_limits *limits)
{
        const struct baseline_def *def = baseline_find(baseline);

        must(graph_clone(g, &m->rich));
        m->blind = blind_of(g);
        must(plan_make(def->sw.blind ? &m->blind : &m->rich, driver, &def->sw, shape, limits, &m->p));
}

static void unmake(struct made *m)
{
        plan_free(&m->p);
        graph_free(&m->rich);
        graph_free(&m->blind);
}

/* ---- payload and round trips by formula ---- */

struct request {
        uint64_t width, layers, vocab;
        uint64_t batch, history, cached, new_tokens;
        uint64_t elem; /* bytes of a state's element */
};

struct wire {
        uint64_t trips, up, down;
        double tokens;
};

#define CURSOR 8u

static struct wire of_request(const struct request *q, bool recompute)
{
        uint64_t feed = q->history - (recompute ? 0 : q->cached), steps = q->new_tokens ? q->new_tokens : 1;

        return (struct wire){.trips = 1,
                             .up = feed * q->batch * 4 + CURSOR,
                             .down = q->new_tokens ? q->new_tokens * q->batch * 4 : q->batch * q->vocab * 4,
                             .tokens = (double)(q->batch * (feed + steps - 1))};
}

enum carried { KEPT, CARRIED, FORGOTTEN };

static struct wire of_steps(const struct request *q, enum carried state, bool all)
{
        uint64_t steps = q->new_tokens ? q->new_tokens : 1;
        uint64_t position = 2 * q->layers * q->batch * q->width * q->elem; /* keys and values of one */
        struct wire w = {.trips = steps};

        for (uint64_t t = 0; t < steps; t++) {
                uint64_t known = q->history + t, past = t ? known - 1 : q->cached, rows;

                if (state == FORGOTTEN)
                        past = 0;
                rows = known - past;
                w.up += rows * q->batch * 4 + CURSOR + (state == CARRIED ? past * position : 0);
                w.down += (all ? rows : 1) * q->batch * q->vocab * 4 + (state == CARRIED ? known * position : 0);
                w.tokens += (double)(rows * q->batch);
        }
        return w;
}

static struct wire by_formula(const char *baseline, const struct request *q)
{
        if (!strcmp(baseline, "pytorch_rpc"))
                return of_request(q, true);
        if (!strcmp(baseline, "blind_opaque"))
                return of_steps(q, KEPT, false);
        if (!strcmp(baseline, "semantic_blind"))
                return of_steps(q, FORGOTTEN, true);
        if (!strcmp(baseline, "blind_roundtrip"))
                return of_steps(q, CARRIED, true);
        return of_request(q, false);
}

static const char *const six[] = {"native_pytorch", "full_djinn",     "pytorch_rpc",
                                  "blind_opaque",   "semantic_blind", "blind_roundtrip"};

static void assert_wire(const char *baseline, const struct request *q, const struct plan *p)
{
        struct wire w = by_formula(baseline, q);

        if (p->round_trips != w.trips || p->up.payload_bytes != w.up || p->down.payload_bytes != w.down ||
            p->tokens != w.tokens)
                fail_msg("%s, batch %d, history %d, cached %d, new %d: %d trips, up %lld, down %lld, %.0f positions; "
                         "expected %d, %lld, %lld, %.0f",
                         baseline, (int)q->batch, (int)q->history, (int)q->cached, (int)q->new_tokens,
                         (int)p->round_trips, (long long)p->up.payload_bytes, (long long)p->down.payload_bytes,
                         p->tokens, (int)w.trips, (long long)w.up, (long long)w.down, w.tokens);
        assert_int_equal(p->up.messages, w.trips);
        assert_int_equal(p->down.messages, w.trips);
        assert_int_equal(p->ncalls, w.trips);
}

static struct request request_of(const struct gpt2_shape *s, uint32_t batch, const struct plan_shape *shape,
                                 size_t elem)
{
        return (struct request){.width = (uint64_t)s->width,
                                .layers = (uint64_t)s->layers,
                                .vocab = (uint64_t)s->vocab,
                                .batch = batch,
                                .history = shape->history,
                                .cached = shape->cached,
                                .new_tokens = shape->new_tokens,
                                .elem = elem};
}

static void bytes_of_every_shape(const struct gpt2_shape *model, enum op_dtype dtype)
{
        static const struct plan_shape shapes[] = {
            {.history = 64, .new_tokens = 32},
            {.history = 64, .new_tokens = 1},
            {.history = 64, .new_tokens = 0},
            {.history = 1, .new_tokens = 4},
            {.history = 80, .cached = 71, .new_tokens = 8},
            {.history = 33, .cached = 32, .new_tokens = 1},
            {.history = 33, .cached = 32, .new_tokens = 0},
        };

        for (uint32_t batch = 1; batch <= 2; batch++) {
                struct graph g = gpt2_graph(model, batch, 100, dtype);

                for (size_t b = 0; b < ARRAY_LEN(six); b++)
                        for (size_t i = 0; i < ARRAY_LEN(shapes); i++) {
                                struct request q = request_of(model, batch, &shapes[i], op_dtype_bytes(dtype));
                                struct made m;

                                make(&m, &g, six[b], DRIVE_CAUSAL, &shapes[i], &usual);
                                assert_wire(six[b], &q, &m.p);
                                unmake(&m);
                        }
                graph_free(&g);
        }
}

static void tiny_gpt2_bytes(void **state)
{
        bytes_of_every_shape(&tiny_gpt2, DT_F32);
}

static void gpt2_micro_bytes(void **state)
{
        bytes_of_every_shape(&gpt2_micro, DT_F32);
        bytes_of_every_shape(&gpt2_micro, DT_F16);
}

/* The experiment's task, in figures that anybody can check with a pencil. */
static void the_task_of_the_sample_table(void **state)
{
        static const struct {
                const char *baseline;
                struct wire w;
        } want[] = {
            {"full_djinn", {1, 64 * 4 + 8, 32 * 4, 95}},
            {"pytorch_rpc", {1, 264, 128, 95}},
            {"blind_opaque", {32, 264 + 31 * 12, 32ull * 50257 * 4, 95}},
            {"semantic_blind", {32, 10432, 511415232, 2544}},
        };
        struct graph g = gpt2_graph(&tiny_gpt2, 1, 96, DT_F32);

        for (size_t i = 0; i < ARRAY_LEN(want); i++) {
                const struct plan_shape s = {.history = 64, .new_tokens = 32};
                struct made m;

                make(&m, &g, want[i].baseline, DRIVE_CAUSAL, &s, &usual);
                assert_int_equal(m.p.round_trips, want[i].w.trips);
                assert_int_equal(m.p.up.payload_bytes, want[i].w.up);
                assert_int_equal(m.p.down.payload_bytes, want[i].w.down);
                assert_true(m.p.tokens == want[i].w.tokens);
                unmake(&m);
        }
        graph_free(&g);
}

/* ---- work ---- */

static void head_is_counted_as_often_as_it_runs(void **state)
{
        const struct plan_shape s = {.history = 10, .new_tokens = 4};
        struct graph g = gpt2_graph(&gpt2_micro, 2, 16, DT_F32);
        const double row = 2.0 * 64 * 512;

        for (size_t b = 0; b < ARRAY_LEN(six); b++) {
                bool all = baseline_find(six[b])->sw.outputs == SW_ALL;
                bool carried = !strcmp(six[b], "blind_roundtrip");
                double rows = !all ? 4 * 2 : carried ? 2 * (10 + 3) : 2 * (10 + 11 + 12 + 13);
                struct made m;

                make(&m, &g, six[b], DRIVE_CAUSAL, &s, &usual);
                assert_close(m.p.work.head_flop, rows * row, 0);
                assert_close(m.p.work.head_weight_bytes, 4.0 * 64 * 512 * 4, 0);
                assert_true(m.p.work.flop > m.p.work.head_flop);
                unmake(&m);
        }
        graph_free(&g);
}

/* Resident state of a conversation is saved execution: turn 1 feeds what is new, a recomputation all. */
static void state_saves_work(void **state)
{
        const struct plan_shape later = {.history = 88, .cached = 71, .new_tokens = 8},
                                whole = {.history = 88, .new_tokens = 8};
        struct graph g = gpt2_graph(&gpt2_micro, 1, 100, DT_F32);
        struct made resident, rpc;

        make(&resident, &g, "full_djinn", DRIVE_CAUSAL, &later, &usual);
        make(&rpc, &g, "pytorch_rpc", DRIVE_CAUSAL, &whole, &usual);
        assert_true(resident.p.tokens == 17 + 7);
        assert_true(rpc.p.tokens == 88 + 7);
        assert_true(resident.p.work.flop < rpc.p.work.flop / 2);
        assert_int_equal(resident.p.up.payload_bytes, 17 * 4 + 8);
        assert_int_equal(rpc.p.up.payload_bytes, 88 * 4 + 8);
        unmake(&resident);
        unmake(&rpc);
        graph_free(&g);
}

/* ---- the check pass ---- */

static void check_adds_what_is_forced_and_seen(void **state)
{
        const struct plan_shape plain = {.history = 20, .new_tokens = 5},
                                check = {.history = 20, .new_tokens = 5, .check = true};
        struct graph g = gpt2_graph(&gpt2_micro, 2, 32, DT_F32);

        for (size_t b = 0; b < ARRAY_LEN(six); b++) {
                bool request = baseline_find(six[b])->sw.call == SW_REQUEST;
                struct made a, c;

                make(&a, &g, six[b], DRIVE_CAUSAL, &plain, &usual);
                make(&c, &g, six[b], DRIVE_CAUSAL, &check, &usual);
                assert_int_equal(c.p.up.payload_bytes - a.p.up.payload_bytes, request ? 5 * 2 * 4 : 0);
                assert_int_equal(c.p.down.payload_bytes - a.p.down.payload_bytes, request ? 5 * 2 * 512 * 4 : 0);
                assert_int_equal(c.p.round_trips, a.p.round_trips);
                unmake(&a);
                unmake(&c);
        }
        graph_free(&g);
}

/* ---- region ---- */

static void outputs_lie_inside_the_region_and_apart(const struct plan *p)
{
        if (p->sw.buffers == SW_SERIALIZED)
                return;
        for (size_t i = 0; i < p->ncalls; i++) {
                const struct plan_call *c = &p->calls[i];

                for (unsigned a = 0; a < c->run.noutputs; a++) {
                        const struct run_output *x = &c->outputs[a];
                        uint64_t n = 0;

                        for (unsigned r = 0; r < c->run.nranges; r++)
                                n += c->ranges[r].repeat;
                        n = x->flags & OUTPUT_EACH ? n : 1;
                        assert_true(x->region_off + (n - 1) * x->step + x->len <= p->region_bytes);
                        for (unsigned b = 0; b < a; b++) {
                                const struct run_output *y = &c->outputs[b];

                                assert_true(y->region_off + y->len <= x->region_off ||
                                            x->region_off + x->len <= y->region_off);
                        }
                }
        }
}

static void region_has_room(void **state)
{
        static const struct plan_shape shapes[] = {{.history = 20, .new_tokens = 5},
                                                   {.history = 20, .new_tokens = 0},
                                                   {.history = 20, .new_tokens = 5, .check = true},
                                                   {.history = 20, .cached = 12, .new_tokens = 5}};
        struct graph g = gpt2_graph(&gpt2_micro, 2, 32, DT_F32);

        for (size_t b = 0; b < ARRAY_LEN(six); b++)
                for (size_t i = 0; i < ARRAY_LEN(shapes); i++) {
                        struct made m;

                        make(&m, &g, six[b], DRIVE_CAUSAL, &shapes[i], &usual);
                        outputs_lie_inside_the_region_and_apart(&m.p);
                        unmake(&m);
                }
        graph_free(&g);
}

/* Where the client looks for the last logits of each sequence: the last of the rows that came back for it. */
static void last_logits_are_of_the_last_position(void **state)
{
        const struct plan_shape s = {.history = 20, .new_tokens = 3};
        struct graph g = gpt2_graph(&gpt2_micro, 2, 32, DT_F32);
        const uint64_t row = 512 * 4;

        for (size_t b = 0; b < ARRAY_LEN(six); b++) {
                struct made m;

                make(&m, &g, six[b], DRIVE_CAUSAL, &s, &usual);
                for (size_t i = 0; i < m.p.ncalls && m.p.sw.call == SW_STEP; i++) {
                        const struct plan_call *c = &m.p.calls[i];
                        const struct run_output *o = &c->outputs[0];
                        uint64_t rows = o->len / row / 2;

                        assert_int_equal(c->logits_off, o->region_off + (rows - 1) * row);
                        assert_int_equal(c->logits_off + c->logits_stride, o->region_off + o->len - row);
                        assert_int_equal(c->after, AFTER_CHOOSE);
                }
                unmake(&m);
        }
        graph_free(&g);
}

/* A state that the client carries must be where the next turn's plan, and the next step's, take it from. */
static void carried_state_stays_where_it_is(void **state)
{
        const struct plan_shape turns[] = {{.history = 10, .new_tokens = 3},
                                           {.history = 17, .cached = 12, .new_tokens = 3},
                                           {.history = 24, .cached = 19, .new_tokens = 3}};
        struct graph g = gpt2_graph(&gpt2_micro, 2, 32, DT_F32);
        struct made m[ARRAY_LEN(turns)];

        for (size_t t = 0; t < ARRAY_LEN(turns); t++) {
                make(&m[t], &g, "blind_roundtrip", DRIVE_CAUSAL, &turns[t], &usual);
                assert_int_equal(m[t].p.state_off, m[0].p.state_off);
        }
        for (size_t t = 0; t < ARRAY_LEN(turns); t++)
                for (size_t i = 0; i < m[t].p.ncalls; i++) {
                        const struct plan_call *c = &m[t].p.calls[i];

                        for (unsigned k = 0; k < c->run.ninputs; k++) {
                                const struct plan_input *in = &c->inputs[k];
                                bool found = false;

                                if (in->source != SRC_STATE)
                                        continue;
                                for (unsigned o = 0; o < c->run.noutputs; o++)
                                        found = found || (c->outputs[o].tensor == in->wire.tensor &&
                                                          c->outputs[o].tensor_off == in->wire.tensor_off &&
                                                          c->outputs[o].region_off == in->region_off);
                                assert_true(found);
                        }
                }
        for (size_t t = 0; t < ARRAY_LEN(turns); t++)
                unmake(&m[t]);
        graph_free(&g);
}

/* ---- frames ---- */

static uint64_t times(const struct plan_call *c, const struct run_output *o)
{
        uint64_t n = 0;

        for (unsigned r = 0; r < c->run.nranges; r++)
                n += c->ranges[r].repeat;
        return o->flags & OUTPUT_EACH ? n : 1;
}

/* `g`: what the server checks against, where states are known to be states. */
static void pack_run(const struct plan *p, const struct graph *g, const struct plan_call *c,
                     const struct plan_limits *limits)
{
        struct run_input *inputs = calloc(c->run.ninputs + 1, sizeof *inputs);
        uint8_t *frame = calloc(1, c->frame_bytes + 64), *bytes = calloc(1, c->run.inline_len + 1u);
        const uint64_t region_len = p->region_bytes;
        struct msg_run run = c->run;
        struct run_view v;
        uint64_t written = 0, in = 0;
        uint16_t at;

        for (unsigned k = 0; k < run.ninputs; k++) {
                inputs[k] = c->inputs[k].wire;
                in += inputs[k].len;
                written += inputs[k].flags == INPUT_WRITTEN ? inputs[k].len : 0;
        }
        msg_header_init(&run.h, MSG_RUN, c->frame_bytes, run.h.flags, 1);
        assert_int_equal(msg_run_pack(frame, &run, c->ranges, c->feedback, inputs, c->outputs, bytes), c->frame_bytes);
        assert_true(c->frame_bytes <= limits->msg_max);
        assert_true(run.inline_len <= limits->inline_bytes);
        must(msg_check(frame, c->frame_bytes));
        must(msg_run_view(frame, c->frame_bytes, &v));
        must(msg_run_check(&v, g, &region_len, 1, 0, &at));
        assert_int_equal(c->up.msg_bytes, c->frame_bytes);
        assert_int_equal(c->up.bulk_bytes, written);
        assert_int_equal(c->up.payload_bytes, in);
        assert_int_equal(c->down.msg_bytes, sizeof(struct msg_done));
        assert_int_equal(c->down.bulk_bytes, c->down.payload_bytes);
        free(inputs);
        free(frame);
        free(bytes);
}

static void pack_call(const struct plan *p, const struct graph *g, const struct plan_call *c,
                      const struct plan_limits *limits)
{
        struct run_view v = {.run = &c->run, .ranges = c->ranges, .feedback = c->feedback, .outputs = c->outputs};
        struct serial_blob *blobs = calloc(c->run.ninputs + 64u, sizeof *blobs);
        struct serial_buf body = {0};
        uint8_t *data = malloc(1 << 20);
        unsigned n = 0;

        memset(data, 0xa5, 1 << 20);
        for (unsigned k = 0; k < c->run.ninputs; k++)
                blobs[k] = (struct serial_blob){c->inputs[k].wire.tensor, c->inputs[k].wire.tensor_off, data,
                                                c->inputs[k].wire.len};
        must(serial_pack_call(&body, &v, g, blobs, c->run.ninputs));
        assert_int_equal(body.len, c->body_bytes);
        assert_int_equal(c->via_staging, sizeof(struct msg_call) + body.len > limits->msg_max);
        assert_int_equal(c->up.msg_bytes + c->up.bulk_bytes, sizeof(struct msg_call) + body.len);
        body.len = 0;
        for (unsigned k = 0; k < c->run.noutputs; k++)
                for (uint64_t i = times(c, &c->outputs[k]); i; i--)
                        blobs[n++] = (struct serial_blob){c->outputs[k].tensor, c->outputs[k].tensor_off, data,
                                                          c->outputs[k].len};
        must(serial_pack_result(&body, g, blobs, n));
        assert_int_equal(body.len, c->result_body_bytes);
        assert_int_equal(c->via_region, sizeof(struct msg_result) + body.len > limits->msg_max);
        assert_int_equal(c->down.msg_bytes + c->down.bulk_bytes, sizeof(struct msg_result) + body.len);
        assert_true(c->frame_bytes <= limits->msg_max && c->reply_bytes <= limits->msg_max);
        assert_true(!c->via_region || p->region_bytes >= c->result_body_bytes);
        assert_true(!c->via_staging || p->staging_bytes >= c->body_bytes);
        serial_free(&body);
        free(blobs);
        free(data);
}

static void frames_are_what_packing_makes(void **state)
{
        static const struct plan_limits limits[] = {{65536, 16384}, {65536, 1024}, {4096, 4096}, {8192, 0}};
        static const struct plan_shape shapes[] = {{.history = 60, .new_tokens = 6},
                                                   {.history = 60, .new_tokens = 0},
                                                   {.history = 60, .new_tokens = 6, .check = true},
                                                   {.history = 60, .cached = 50, .new_tokens = 1}};
        struct graph g = gpt2_graph(&gpt2_micro, 2, 70, DT_F32);

        for (size_t b = 0; b < ARRAY_LEN(six); b++)
                for (size_t i = 0; i < ARRAY_LEN(shapes); i++)
                        for (size_t l = 0; l < ARRAY_LEN(limits); l++) {
                                struct made m;

                                make(&m, &g, six[b], DRIVE_CAUSAL, &shapes[i], &limits[l]);
                                for (size_t c = 0; c < m.p.ncalls; c++)
                                        (m.p.sw.buffers == SW_SERIALIZED ? pack_call : pack_run)(
                                            &m.p, &g, &m.p.calls[c], &limits[l]);
                                unmake(&m);
                        }
        graph_free(&g);
}

/* ---- feed-forward ---- */

static void forward_is_one_call(const struct graph *g, uint64_t in, uint64_t out)
{
        const struct plan_shape none = {0};

        for (size_t b = 0; b < ARRAY_LEN(six); b++) {
                struct made m;
                const struct plan_call *c;

                make(&m, g, six[b], DRIVE_FORWARD, &none, &usual);
                c = &m.p.calls[0];
                assert_int_equal(m.p.round_trips, 1);
                assert_int_equal(m.p.up.payload_bytes, in);
                assert_int_equal(m.p.down.payload_bytes, out);
                assert_int_equal(m.p.result_bytes, out);
                if (m.p.sw.buffers == SW_SERIALIZED) {
                        pack_call(&m.p, g, c, &usual);
                } else {
                        pack_run(&m.p, g, c, &usual);
                        assert_int_equal(c->up.bulk_bytes, in > 2048 ? in : 0);
                        assert_int_equal(c->down.bulk_bytes, out);
                }
                unmake(&m);
        }
}

static void echo_at_its_sizes(void **state)
{
        static const uint64_t sizes[] = {1, 64, 2048, 2049, 65536, 1 << 20};

        for (size_t i = 0; i < ARRAY_LEN(sizes); i++) {
                struct graph g;

                must(echo_build(sizes[i], &g));
                if (sizes[i] < 1 << 20) /* pack_call has a buffer of that size */
                        forward_is_one_call(&g, sizes[i], sizes[i]);
                graph_free(&g);
        }
}

static void encoder_both_ways(void **state)
{
        const struct encoder_shape shape = {
            .batch = 2, .rows = 16, .hidden = 48, .heads = 4, .layers = 3, .ff = 96, .eps = 1e-5, .act = ACT_RELU};
        struct graph g;

        must(encoder_build(&shape, DT_F32, &g));
        forward_is_one_call(&g, 2 * 16 * 48 * 4, 2 * 16 * 48 * 4);
        graph_free(&g);
        must(encoder_build(&shape, DT_BF16, &g));
        forward_is_one_call(&g, 2 * 16 * 48 * 2, 2 * 16 * 48 * 2);
        graph_free(&g);
}

/* ---- flags ---- */

static void flags_say_what_the_switches_say(void **state)
{
        const struct plan_shape s = {.history = 8, .new_tokens = 2};
        static const struct {
                const char *baseline;
                uint32_t flags;
        } want[] = {
            {"native_pytorch", RUN_PLAN_CACHE | RUN_KEEP_STATE | RUN_LOCAL | RUN_PROFILE},
            {"full_djinn", RUN_PLAN_CACHE | RUN_KEEP_STATE | RUN_PROFILE},
            {"pytorch_rpc", RUN_PROFILE},
            {"blind_opaque", RUN_PLAN_CACHE | RUN_KEEP_STATE | RUN_PROFILE},
            {"semantic_blind", RUN_PROFILE},
        };
        struct graph g = gpt2_graph(&gpt2_micro, 1, 16, DT_F32);

        for (size_t i = 0; i < ARRAY_LEN(want); i++) {
                struct made m;

                make(&m, &g, want[i].baseline, DRIVE_CAUSAL, &s, &usual);
                for (size_t c = 0; c < m.p.ncalls; c++)
                        assert_int_equal(m.p.calls[c].run.h.flags, want[i].flags);
                assert_int_equal(m.p.g->h->blind, baseline_find(want[i].baseline)->sw.blind);
                unmake(&m);
        }
        graph_free(&g);
}

/* ---- what cannot be planned ---- */

static void refuse(const struct graph *g, enum workload_driver driver, const struct plan_shape *s,
                   const struct plan_limits *limits, const char *baseline, const char *word)
{
        struct plan p;
        int rc = plan_make(g, driver, &baseline_find(baseline)->sw, s, limits, &p);

        if (rc >= 0 || !strstr(err_text(), word))
                fail_msg("%d \"%s\", expected \"%s\"", rc, err_text(), word);
        assert_null(p.calls);
        err_clear();
}

static void what_cannot_be_planned(void **state)
{
        struct graph g = gpt2_graph(&gpt2_micro, 1, 64, DT_F32), echo, blind = blind_of(&g);
        const struct plan_limits narrow = {.msg_max = 256, .inline_bytes = 256};

        must(echo_build(64, &echo));
        refuse(&g, DRIVE_CAUSAL, &(struct plan_shape){.history = 60, .new_tokens = 6}, &usual, "full_djinn",
               "context of 64");
        refuse(&g, DRIVE_CAUSAL, &(struct plan_shape){.history = 5, .cached = 5, .new_tokens = 1}, &usual, "full_djinn",
               "at least one new id");
        refuse(&echo, DRIVE_CAUSAL, &(struct plan_shape){.history = 5, .new_tokens = 1}, &usual, "full_djinn",
               "tensors of a language model");
        refuse(&g, DRIVE_FORWARD, &(struct plan_shape){0}, &usual, "full_djinn", "lacks an input or an output");
        refuse(&blind, DRIVE_CAUSAL, &(struct plan_shape){.history = 50, .new_tokens = 2}, &narrow, "blind_roundtrip",
               "message");
        graph_free(&g);
        graph_free(&blind);
        graph_free(&echo);
}

/* ---- text ---- */

/* DJINN_GOLDEN_WRITE=1 writes the files anew, for a change that is meant. */
static void golden(const char *name, const struct plan *p)
{
        char file[512], *text = NULL, *want;
        size_t len = 0, want_len;
        FILE *to = open_memstream(&text, &len), *f;

        assert_non_null(to);
        plan_print(to, p);
        fclose(to);
        snprintf(file, sizeof(file), "%s/plan_%s.txt", GOLDEN, name);
        f = fopen(file, getenv("DJINN_GOLDEN_WRITE") ? "w+" : "r");
        if (!f)
                fail_msg("cannot open %s", file);
        if (getenv("DJINN_GOLDEN_WRITE")) {
                fwrite(text, 1, len, f);
                rewind(f);
        }
        want = calloc(1, 65536);
        want_len = fread(want, 1, 65535, f);
        fclose(f);
        if (want_len != len || memcmp(want, text, len))
                fail_msg("%s:\n%s\nis now:\n%s", file, want, text);
        free(want);
        free(text);
}

static void text_is_as_kept(void **state)
{
        const struct plan_shape s = {.history = 64, .new_tokens = 16}, few = {.history = 12, .new_tokens = 3},
                                later = {.history = 22, .cached = 14, .new_tokens = 3}, none = {0};
        struct graph tiny = gpt2_graph(&tiny_gpt2, 1, 80, DT_F32), micro = gpt2_graph(&gpt2_micro, 1, 32, DT_F32), echo;
        const struct {
                const char *file;
                const struct graph *g;
                const char *baseline;
                const struct plan_shape *s;
        } texts[] = {
            {"tiny_gpt2_full_djinn", &tiny, "full_djinn", &s},
            {"tiny_gpt2_native_pytorch", &tiny, "native_pytorch", &s},
            {"gpt2_micro_semantic_blind", &micro, "semantic_blind", &few},
            {"gpt2_micro_blind_opaque", &micro, "blind_opaque", &few},
            {"gpt2_micro_blind_roundtrip", &micro, "blind_roundtrip", &few},
            {"gpt2_micro_pytorch_rpc", &micro, "pytorch_rpc", &few},
            {"gpt2_micro_full_djinn_turn", &micro, "full_djinn", &later},
            {"echo_64KiB_full_djinn", &echo, "full_djinn", &none},
        };

        must(echo_build(65536, &echo));
        for (size_t i = 0; i < ARRAY_LEN(texts); i++) {
                struct made m;

                make(&m, texts[i].g, texts[i].baseline, texts[i].g == &echo ? DRIVE_FORWARD : DRIVE_CAUSAL, texts[i].s,
                     &usual);
                golden(texts[i].file, &m.p);
                unmake(&m);
        }
        graph_free(&tiny);
        graph_free(&micro);
        graph_free(&echo);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(tiny_gpt2_bytes),
            cmocka_unit_test(gpt2_micro_bytes),
            cmocka_unit_test(the_task_of_the_sample_table),
            cmocka_unit_test(head_is_counted_as_often_as_it_runs),
            cmocka_unit_test(state_saves_work),
            cmocka_unit_test(check_adds_what_is_forced_and_seen),
            cmocka_unit_test(region_has_room),
            cmocka_unit_test(last_logits_are_of_the_last_position),
            cmocka_unit_test(carried_state_stays_where_it_is),
            cmocka_unit_test(frames_are_what_packing_makes),
            cmocka_unit_test(echo_at_its_sizes),
            cmocka_unit_test(encoder_both_ways),
            cmocka_unit_test(flags_say_what_the_switches_say),
            cmocka_unit_test(what_cannot_be_planned),
            cmocka_unit_test(text_is_as_kept),
        };

        return cmocka_run_group_tests_name("plan", tests, NULL, NULL);
}
