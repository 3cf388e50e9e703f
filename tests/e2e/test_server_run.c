/* What a client gets for its requests, over every transport: RUN and CALL in all their forms, and calibration. */
#include "server_client.h"

#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "clock.h"
#include "device.h"
#include "digest.h"
#include "err.h"
#include "injure.h"
#include "json.h"
#include "workload.h"

static struct test_server *server;
static const char *scheme; /* of this round */

static int set_up(void **state)
{
        scheme = *state;
        server = ts_start(NULL);
        return 0;
}

static int tear_down(void **state)
{
        return ts_stop(server);
}

static const char *url(void)
{
        return ts_url(server, scheme);
}

/* ---- echo ---- */

static void echo_inline(void **state)
{
        struct client c;
        struct graph g;
        struct msg_loaded m;
        struct msg_done done;
        struct cl_run r = {.run.h.flags = RUN_PLAN_CACHE | RUN_PROFILE | RUN_DIGEST};
        uint8_t data[64];

        graph_echo(&g, sizeof(data));
        cl_open(&c, url());
        assert_string_not_equal(c.server.device, "");
        assert_int_equal(cl_load(&c, &g, MSG_WEIGHTS_NONE, 0, NULL, &m), 0);
        assert_int_equal(m.weights_bytes, 0);
        assert_int_equal(m.io_bytes, 128);
        cl_region(&c, 4096);
        run_range(&r, 0, 1, 1, 1, 0);
        run_inline(&r, 0, data, sizeof(data));
        run_output(&r, 1, 0, sizeof(data), 100, 0);
        r.run.model = m.model;
        for (unsigned k = 0; k < 3; k++) {
                struct digest want;

                memset(r.bytes, 0x30 + (int)k, sizeof(data));
                assert_int_equal(cl_run(&c, &r, &done), 0);
                assert_memory_equal(c.bytes + 100, r.bytes, sizeof(data));
                want = digest_of(r.bytes, sizeof(data));
                assert_int_equal(done.digest[0], want.lo);
                assert_int_equal(done.digest[1], want.hi);
                assert_int_equal(done.plan_hits, k > 0);
                assert_int_equal(done.plan_misses, k == 0);
                assert_int_equal(!!(done.h.flags & DONE_PLAN_HIT), k > 0);
                assert_int_equal(done.h.flags & 0xff, r.run.h.flags);
                assert_int_equal(done.bytes_copied, sizeof(data));
                assert_int_equal(done.ops, 1);
                assert_int_equal(done.iterations, 1);
                assert_true(done.stamps.received_ns <= done.stamps.taken_ns);
                assert_true(done.stamps.taken_ns <= done.stamps.planned_ns);
                assert_true(done.stamps.planned_ns <= done.stamps.placed_ns);
                assert_true(done.stamps.placed_ns + done.stamps.exec_ns <= done.stamps.executed_ns);
                assert_true(done.stamps.executed_ns <= done.stamps.offered_ns);
        }
        r.run.h.flags = 0; /* no cache, no stamps */
        assert_int_equal(cl_run(&c, &r, &done), 0);
        assert_int_equal(done.plan_misses, 1);
        assert_int_equal(done.stamps.received_ns, 0);
        assert_int_equal(done.digest[0], 0);
        cl_close(&c);
        graph_free(&g);
}

static void echo_written(void **state)
{
        const size_t len = 1 << 20;
        uint8_t *data = malloc(len);
        struct client c;
        struct graph g;
        struct msg_loaded m;
        struct msg_done done;
        struct tp_rmem *input;
        struct cl_run r = {.run.h.flags = RUN_PLAN_CACHE};

        assert_non_null(data);
        graph_echo(&g, len);
        cl_open(&c, url());
        assert_int_equal(cl_load(&c, &g, MSG_WEIGHTS_NONE, 0, NULL, &m), 0);
        cl_region(&c, len);
        assert_int_equal(cl_ask(&c, KEYS_ASK_TENSOR, m.model, 0, 0, &input), 0);
        assert_int_equal(input->len, len);
        assert_int_equal(cl_ask(&c, KEYS_ASK_TENSOR, m.model, 1, 0, &input), -EACCES); /* an output */
        r.run.model = m.model;
        run_range(&r, 0, 1, 1, 1, 0);
        run_written(&r, 0, len);
        run_output(&r, 1, 0, len, 0, 0);
        for (int k = 0; k < 3; k++) {
                for (size_t i = 0; i < len; i++)
                        data[i] = (uint8_t)(i * 7 + i / 257 + (size_t)k);
                cl_write(&c, data, len, input, 0);
                assert_int_equal(cl_run(&c, &r, &done), 0);
                assert_memory_equal(c.bytes, data, len);
                assert_int_equal(done.bytes_copied, 0);
        }
        cl_close(&c);
        graph_free(&g);
        free(data);
}

/* ---- gpt2 ---- */

struct tiny {
        struct client c;
        struct graph g;
        struct msg_loaded m;
        unsigned ids, cursor, tokens, token, last, all;
        uint32_t body, decode, vocab; /* nodes of body; of body, last, choose */
};

static void tiny_open(struct tiny *t, bool blind)
{
        const struct graph_segment *choose;

        graph_tiny(&t->g, 32);
        t->ids = t->g.h->role[ROLE_IDS];
        t->cursor = t->g.h->role[ROLE_CURSOR];
        t->tokens = t->g.h->role[ROLE_TOKENS];
        t->token = t->g.h->role[ROLE_TOKEN];
        t->last = t->g.h->role[ROLE_LAST];
        t->all = t->g.h->role[ROLE_ALL];
        t->vocab = t->g.h->vocab;
        t->body = graph_segment(&t->g, SEG_BODY)->count;
        choose = graph_segment(&t->g, SEG_CHOOSE);
        t->decode = choose->first + choose->count;
        if (blind)
                graph_blind(&t->g);
        cl_open(&t->c, url());
        assert_int_equal(cl_load(&t->c, &t->g, MSG_WEIGHTS_SEED, 7, NULL, &t->m), 0);
        assert_true(t->m.weights_bytes > 0);
        assert_int_equal(t->m.state_bytes > 0, !blind); /* what is a state is hidden in a blind graph */
        cl_region(&t->c, 65536);
}

static void tiny_close(struct tiny *t)
{
        cl_close(&t->c);
        graph_free(&t->g);
}

static const int32_t prompt[8] = {3, 14, 15, 9, 26, 5, 35, 8};

/* Prefill of n prompt ids, then steps more tokens by feedback, as one RUN. */
static struct cl_run generation(const struct tiny *t, unsigned n, uint32_t steps, uint32_t flags)
{
        struct cl_run r = {.run = {.h.flags = flags, .model = t->m.model, .nfeedback = 1},
                           .feedback = {{.src = t->token, .dst = t->ids, .len = 4}}};

        run_range(&r, 0, t->decode, n, 1, 0);
        if (steps > 0)
                run_range(&r, 0, t->decode, 1, steps, 1);
        run_inline(&r, t->ids, prompt, 4 * n);
        run_inline(&r, t->cursor, (int32_t[2]){0, 0}, 8);
        run_output(&r, t->tokens, 0, 4 * (steps + 1), 0, 0);
        return r;
}

/* What this graph gives on this device without any server. */
static void expected_tokens(unsigned n, unsigned count, int32_t *out)
{
        const struct weights_source src = {.kind = WEIGHTS_SYNTHETIC, .seed = 7};
        const unsigned decode = 1u << SEG_BODY | 1u << SEG_LAST | 1u << SEG_CHOOSE;
        struct local_model *m;
        struct device *d;
        struct graph g;
        int32_t ids[8], cursor[2] = {0, 0};

        graph_tiny(&g, 32);
        assert_int_equal(dev_open("reference", 1, &d), 0);
        assert_int_equal(local_open(&g, &src, d, &m), 0);
        memcpy(ids, prompt, sizeof(ids));
        for (unsigned k = 0; k < count; k++) {
                const struct local_io in[] = {{ROLE_IDS, ids, k == 0 ? 4 * n : 4}, {ROLE_CURSOR, cursor, 8}};
                const struct local_io o[] = {{ROLE_TOKEN, &out[k], 4}};

                assert_int_equal(local_run(m, decode, k == 0 ? n : 1, in, 2, o, 1), 0);
                cursor[0] += k == 0 ? (int32_t)n : 1;
                cursor[1]++;
                ids[0] = out[k];
        }
        local_close(m);
        dev_close(d);
        graph_free(&g);
}

static void generate(void **state)
{
        struct tiny t;
        struct msg_done done;
        struct cl_run r;
        int32_t want[12];

        expected_tokens(8, 12, want);
        tiny_open(&t, false);
        for (int blind = 0; blind < 2; blind++) {
                r = generation(&t, 8, 11, RUN_PLAN_CACHE | RUN_KEEP_STATE | RUN_PROFILE);
                assert_int_equal(cl_run(&t.c, &r, &done), 0);
                assert_memory_equal(t.c.bytes, want, sizeof(want));
                assert_int_equal(done.iterations, 12);
                assert_int_equal(done.plan_misses, 2);
                assert_true(done.stamps.exec_ns > 0);
                assert_int_equal(cl_run(&t.c, &r, &done), 0);
                assert_int_equal(done.plan_hits, 2);
                assert_memory_equal(t.c.bytes, want, sizeof(want));
                tiny_close(&t);
                if (!blind)
                        tiny_open(&t, true);
        }
}

/* Step by step with resident state, and by recomputing the history: the same tokens; the state is really there. */
static void step_and_recompute(void **state)
{
        int32_t want[6], history[16], token;
        struct msg_done done;
        struct tiny t;

        expected_tokens(8, 6, want);
        tiny_open(&t, true);
        memcpy(history, prompt, sizeof(prompt));
        for (unsigned k = 0; k < 6; k++) {
                struct cl_run r = {.run = {.h.flags = RUN_PLAN_CACHE | RUN_KEEP_STATE, .model = t.m.model}};

                run_range(&r, 0, t.decode, k == 0 ? 8 : 1, 1, 0);
                run_inline(&r, t.ids, k == 0 ? history : history + 7 + k, k == 0 ? 32 : 4);
                run_inline(&r, t.cursor, (int32_t[2]){k == 0 ? 0 : (int32_t)(7 + k), (int32_t)k}, 8);
                run_output(&r, t.token, 0, 4, 0, 0);
                assert_int_equal(cl_run(&t.c, &r, &done), 0);
                memcpy(&token, t.c.bytes, 4);
                assert_int_equal(token, want[k]);
                history[8 + k] = token;
        }
        for (unsigned k = 0; k < 6; k++) {
                struct cl_run r = {.run = {.model = t.m.model}};

                run_range(&r, 0, t.decode, 8 + k, 1, 0);
                run_inline(&r, t.ids, history, 4 * (8 + k));
                run_inline(&r, t.cursor, (int32_t[2]){0, (int32_t)k}, 8);
                run_output(&r, t.token, 0, 4, 0, 0);
                assert_int_equal(cl_run(&t.c, &r, &done), 0);
                memcpy(&token, t.c.bytes, 4);
                assert_int_equal(token, want[k]);
                assert_int_equal(done.plan_misses, 1);
        }
        tiny_close(&t);
}

/* The last logits of every step, and in the same run something that is wanted once. */
static void each_iteration(void **state)
{
        struct tiny t;
        struct msg_done done;
        struct cl_run r;
        int32_t want[5];

        expected_tokens(8, 5, want);
        tiny_open(&t, false);
        r = generation(&t, 8, 4, RUN_PLAN_CACHE);
        run_output(&r, t.last, OUTPUT_EACH, 4 * t.vocab, 1000, 4 * t.vocab);
        run_output(&r, t.token, OUTPUT_EACH, 4, 30000, 8);
        assert_int_equal(cl_run(&t.c, &r, &done), 0);
        for (unsigned k = 0; k < 5; k++) {
                const float *logits = (const float *)(t.c.bytes + 1000 + k * 4 * t.vocab);
                unsigned best = 0;

                for (unsigned i = 1; i < t.vocab; i++)
                        best = logits[i] > logits[best] ? i : best;
                assert_int_equal(best, want[k]);
                assert_memory_equal(t.c.bytes + 30000 + 8 * k, &want[k], 4);
        }
        assert_memory_equal(t.c.bytes, want, sizeof(want));
        tiny_close(&t);
}

static void in_process(void **state)
{
        struct tiny t;
        struct msg_done done;
        struct cl_run r;
        int32_t want[5];
        uint64_t remote_digest[2];

        expected_tokens(8, 5, want);
        tiny_open(&t, false);
        r = generation(&t, 8, 4, RUN_PLAN_CACHE | RUN_PROFILE | RUN_DIGEST);
        run_output(&r, t.token, OUTPUT_EACH, 4, 30000, 4);
        assert_int_equal(cl_run(&t.c, &r, &done), 0);
        memcpy(remote_digest, done.digest, sizeof(remote_digest));
        assert_int_equal(done.stamps.local_ns, 0);
        memset(t.c.bytes, 0, 65536);
        r.run.h.flags |= RUN_LOCAL;
        for (int k = 0; k < 2; k++) {
                assert_int_equal(cl_run(&t.c, &r, &done), 0);
                assert_memory_equal(t.c.bytes, want, sizeof(want));
                assert_memory_equal(t.c.bytes + 30000, want, sizeof(want));
                assert_true(done.stamps.local_ns >= done.stamps.exec_ns);
                assert_true(done.stamps.local_ns >= done.stamps.executed_ns - done.stamps.planned_ns);
                assert_true(done.stamps.local_ns <= done.stamps.offered_ns - done.stamps.taken_ns);
                assert_memory_equal(done.digest, remote_digest, sizeof(remote_digest));
        }
        tiny_close(&t);
}

/* ---- CALL ---- */

struct call_reply {
        struct msg_result head;
        const uint8_t *body;
};

static int call(struct client *c, const struct cl_run *r, const struct graph *g, struct tp_rmem *staging,
                struct call_reply *out)
{
        struct serial_blob blobs[8];
        struct run_view v = {&r->run, r->ranges, r->feedback, r->inputs, r->outputs, NULL};
        struct serial_buf b = {0};
        struct msg_call *m = (struct msg_call *)c->frame;
        int rc;

        for (unsigned i = 0; i < r->run.ninputs; i++)
                blobs[i] = (struct serial_blob){r->inputs[i].tensor, r->inputs[i].tensor_off,
                                                r->bytes + r->inputs[i].offset, r->inputs[i].len};
        assert_int_equal(serial_pack_call(&b, &v, g, blobs, r->run.ninputs), 0);
        *m = (struct msg_call){.body_len = b.len, .in_staging = staging != NULL, .region = 0, .region_len = 65536};
        if (staging)
                cl_write(c, b.data, b.len, staging, 0);
        else
                memcpy(m + 1, b.data, b.len);
        rc = cl_try(c, m, sizeof(*m) + (staging ? 0 : b.len), MSG_CALL, MSG_RESULT);
        serial_free(&b);
        if (rc < 0)
                return rc;
        memcpy(&out->head, c->inbox, sizeof(out->head));
        out->body = out->head.in_region ? c->bytes : c->inbox + sizeof(out->head);
        return 0;
}

static void calls(void **state)
{
        struct tiny t;
        struct call_reply reply;
        struct serial_blob got[6];
        struct cl_run r;
        int32_t want[5];

        expected_tokens(8, 5, want);
        tiny_open(&t, false);
        assert_int_equal(cl_ask(&t.c, KEYS_ASK_STAGING, 0, 0, 100000, &t.c.staging), 0);
        r = generation(&t, 8, 4, RUN_PROFILE);
        run_output(&r, t.token, OUTPUT_EACH, 4, 0, 4);
        for (int staged = 0; staged < 2; staged++) {
                assert_int_equal(call(&t.c, &r, &t.g, staged ? t.c.staging : NULL, &reply), 0);
                assert_int_equal(reply.head.in_region, 0);
                assert_true(reply.head.done.h.flags & DONE_SERIALIZED);
                assert_int_equal(reply.head.done.iterations, 5);
                assert_true(reply.head.done.bytes_copied >= 32 + 8 + 20 + 20);
                assert_true(reply.head.done.stamps.offered_ns >= reply.head.done.stamps.executed_ns);
                assert_int_equal(serial_unpack_result(reply.body, reply.head.body_len, got, 6), 0);
                assert_int_equal(got[0].len, sizeof(want));
                assert_memory_equal(got[0].data, want, sizeof(want));
                for (unsigned k = 0; k < 5; k++)
                        assert_memory_equal(got[1 + k].data, &want[k], 4);
        }
        tiny_close(&t);
}

/* A result that fits no message goes into the region, or nowhere. */
static void large_call(void **state)
{
        const size_t len = 300000;
        struct client c;
        struct graph g;
        struct msg_loaded m;
        struct call_reply reply;
        struct serial_blob got;
        struct cl_run r = {0};
        struct msg_call *frame;

        graph_echo(&g, len);
        cl_open(&c, url());
        assert_int_equal(cl_load(&c, &g, MSG_WEIGHTS_NONE, 0, NULL, &m), 0);
        run_range(&r, 0, 1, 1, 1, 0);
        run_inline(&r, 0, "abcdefgh", 8);
        run_output(&r, 1, 0, len, 0, 0);
        r.run.model = m.model;
        assert_int_equal(call(&c, &r, &g, NULL, &reply), -EINVAL);
        assert_non_null(strstr(c.text, "was not given"));
        cl_region(&c, 400000);
        assert_int_equal(call(&c, &r, &g, NULL, &reply), -ENOSPC); /* call() says that the region has 65536 */
        frame = (struct msg_call *)c.frame;
        frame->region_len = 400000;
        assert_int_equal(cl_try(&c, frame, frame->h.length, MSG_CALL, MSG_RESULT), 0);
        memcpy(&reply.head, c.inbox, sizeof(reply.head));
        assert_int_equal(reply.head.in_region, 1);
        assert_int_equal(serial_unpack_result(c.bytes, reply.head.body_len, &got, 1), 0);
        assert_int_equal(got.len, len);
        assert_memory_equal(got.data, "abcdefgh", 8);
        cl_close(&c);
        graph_free(&g);
}

/* ---- the rest ---- */

static void patterns(void **state)
{
        struct client c;
        struct {
                struct msg_pattern m;
                uint32_t lengths[3];
                uint8_t more[100];
        } p = {.m = {.hold_ns = 3 * NS_PER_MS, .reply_len = 777, .nwrites = 3}, .lengths = {100, 0, 5000}};
        const struct msg_pattern_reply *a;
        uint8_t *data = malloc(8192);
        struct msg_pattern_reply got;

        assert_non_null(data);
        cl_open(&c, url());
        cl_region(&c, 8192);
        assert_int_equal(cl_try(&c, &p, sizeof(p), MSG_PATTERN, MSG_PATTERN), -EINVAL);
        assert_non_null(strstr(c.text, "shadow"));
        assert_int_equal(cl_ask(&c, KEYS_ASK_SHADOW, 0, 0, 8192, &c.shadow), 0);
        for (unsigned i = 0; i < 8192; i++)
                data[i] = (uint8_t)(i ^ i >> 5);
        cl_write(&c, data, 8192, c.shadow, 0);
        assert_int_equal(cl_try(&c, &p, sizeof(p), MSG_PATTERN, MSG_PATTERN), 0);
        a = (const struct msg_pattern_reply *)c.inbox;
        got = *a;
        assert_int_equal(c.inbox_len, 777);
        assert_true(got.offered_ns - got.received_ns >= 3 * NS_PER_MS);
        assert_memory_equal(c.bytes, data, 5100);
        assert_int_equal(c.bytes[5100], 0);
        p.lengths[1] = 8192;
        assert_int_equal(cl_try(&c, &p, sizeof(p), MSG_PATTERN, MSG_PATTERN), -EINVAL);
        cl_close(&c);
        free(data);
}

static void small_talk(void **state)
{
        struct client c;
        struct msg_time t = {.client_ns = 4711};
        struct msg_stats s;
        struct {
                struct msg_header h;
                char text[11];
        } e = {.text = "0123456789"};
        struct msg_header beat;

        cl_open(&c, url());
        cl_send(&c, &beat, sizeof(beat), MSG_HEARTBEAT, 0);
        assert_int_equal(cl_try(&c, &t, sizeof(t), MSG_TIME, MSG_TIME), 0);
        memcpy(&t, c.inbox, sizeof(t));
        assert_int_equal(t.client_ns, 4711);
        assert_true(t.received_ns <= t.offered_ns && t.offered_ns <= clock_ns());
        assert_int_equal(cl_try(&c, &e, sizeof(e), MSG_ECHO, MSG_ECHO), 0);
        assert_int_equal(c.inbox_len, sizeof(e));
        assert_string_equal((char *)c.inbox + sizeof(e.h), "0123456789");
        memset(&s, 0, sizeof(s));
        assert_int_equal(cl_try(&c, &s, sizeof(s), MSG_STATS, MSG_STATS), 0);
        memcpy(&s, c.inbox, sizeof(s));
        assert_int_equal(s.msgs_rx, 6); /* HELLO, AUTH, HEARTBEAT, TIME, ECHO, STATS */
        assert_int_equal(s.msgs_tx, 5); /* HELLO, AUTH, CREDIT, TIME, ECHO */
        assert_true(s.cpu_ns > 0 && s.rss_bytes > 0);
        cl_close(&c);
}

static void put_and_get(void **state)
{
        struct client c;
        struct graph g;
        struct msg_loaded m;
        struct msg_put p = {0};
        struct msg_model_ref ref = {0};
        unsigned weight = GRAPH_NONE, cache = GRAPH_NONE;

        graph_tiny(&g, 8);
        for (unsigned t = 0; t < g.h->ntensors; t++) {
                if (g.tensors[t].residency == RES_WEIGHT)
                        weight = t;
                if (g.tensors[t].residency == RES_STATE)
                        cache = t;
        }
        cl_open(&c, url());
        assert_int_equal(cl_load(&c, &g, MSG_WEIGHTS_PUT, 0, NULL, &m), 0);
        cl_region(&c, 4096);
        p = (struct msg_put){.model = m.model, .tensor = weight, .len = 16};
        assert_int_equal(cl_try(&c, &p, sizeof(p), MSG_PUT, MSG_PUT), -EINVAL); /* nothing is in staging */
        assert_int_equal(cl_ask(&c, KEYS_ASK_STAGING, 0, 0, 4096, &c.staging), 0);
        assert_int_equal(cl_try(&c, &p, sizeof(p), MSG_PUT, MSG_PUT), 0);
        p.offset = 1ull << 60;
        assert_int_equal(cl_try(&c, &p, sizeof(p), MSG_PUT, MSG_PUT), -EINVAL);
        p = (struct msg_put){.model = m.model, .tensor = weight, .len = 16};
        assert_int_equal(cl_try(&c, &p, sizeof(p), MSG_GET, MSG_GET), -EACCES); /* weights never go out */
        p.tensor = cache;
        c.bytes[0] = c.bytes[15] = 0xff;
        assert_int_equal(cl_try(&c, &p, sizeof(p), MSG_GET, MSG_GET), 0);
        assert_int_equal(c.bytes[0] | c.bytes[15], 0);
        p.region_off = 4090;
        assert_int_equal(cl_try(&c, &p, sizeof(p), MSG_GET, MSG_GET), -EINVAL);
        ref = (struct msg_model_ref){.model = m.model, .what = 0};
        assert_int_equal(cl_try(&c, &ref, sizeof(ref), MSG_KEEP, MSG_KEEP), 0);
        assert_int_equal(cl_try(&c, &ref, sizeof(ref), MSG_DROP, MSG_DROP), 0);
        ref.what = 1;
        assert_int_equal(cl_try(&c, &ref, sizeof(ref), MSG_DROP, MSG_DROP), 0);
        assert_int_equal(cl_try(&c, &ref, sizeof(ref), MSG_DROP, MSG_DROP), -ENOENT);
        cl_close(&c);
        graph_free(&g);
}

/* Another connection of the session uses its models and its own regions. */
static void join(void **state)
{
        struct client a, b;
        struct graph g;
        struct msg_loaded m;
        struct msg_done done;
        struct msg_join j;
        struct tp_rmem *input;
        struct cl_run r = {0};

        graph_echo(&g, 32);
        cl_open(&a, url());
        assert_int_equal(cl_load(&a, &g, MSG_WEIGHTS_NONE, 0, NULL, &m), 0);
        cl_connect(&b, url());
        assert_int_equal(cl_hello(&b, NULL, 0), 0);
        j = (struct msg_join){.session_id = a.server.session_id,
                              .join_secret = {a.server.join_secret[0], a.server.join_secret[1] ^ 1}};
        assert_int_equal(cl_try(&b, &j, sizeof(j), MSG_JOIN, MSG_JOIN), -EACCES);
        cl_vanish(&b);
        cl_connect(&b, url());
        assert_int_equal(cl_hello(&b, NULL, 0), 0);
        j.join_secret[1] ^= 1;
        assert_int_equal(cl_try(&b, &j, sizeof(j), MSG_JOIN, MSG_JOIN), 0);
        cl_region(&b, 64);
        assert_int_equal(cl_ask(&b, KEYS_ASK_TENSOR, m.model, 0, 0, &input), 0);
        cl_write(&b, "through the other connection   ", 32, input, 0);
        run_range(&r, 0, 1, 1, 1, 0);
        run_written(&r, 0, 32);
        run_output(&r, 1, 0, 32, 0, 0);
        r.run.model = m.model;
        assert_int_equal(cl_run(&b, &r, &done), 0);
        assert_string_equal((char *)b.bytes, "through the other connection   ");
        cl_close(&b);
        run_written(&r, 0, 0);
        r.run.noutputs = 0;
        assert_int_equal(cl_run(&a, &r, &done), 0); /* the first goes on without it */
        cl_close(&a);
        graph_free(&g);
}

/* Many at once: each is answered once, and in order. */
static void pipelined(void **state)
{
        struct client c;
        struct graph g;
        struct msg_loaded m;
        struct cl_run r = {.run.h.flags = RUN_PLAN_CACHE};
        static uint8_t frames[8][512]; /* the transport's until the answers are there */
        uint64_t first = 0;

        graph_echo(&g, 8);
        cl_open(&c, url());
        assert_int_equal(cl_load(&c, &g, MSG_WEIGHTS_NONE, 0, NULL, &m), 0);
        cl_region(&c, 4096);
        run_range(&r, 0, 1, 1, 1, 0);
        run_inline(&r, 0, "12345678", 8);
        run_output(&r, 1, 0, 8, 0, 0);
        r.run.model = m.model;
        for (unsigned k = 0; k < 8; k++) {
                size_t len;
                int rc;

                r.outputs[0].region_off = 8 * k;
                r.bytes[0] = (uint8_t)('a' + k);
                len = msg_run_pack(frames[k], &r.run, r.ranges, r.feedback, r.inputs, r.outputs, r.bytes);
                msg_header_init((struct msg_header *)frames[k], MSG_RUN, len, RUN_PLAN_CACHE, c.next_id);
                first = first ? first : c.next_id;
                c.next_id++;
                while ((rc = tp_send(c.ep, frames[k], len, 0, 0)) == -EAGAIN)
                        sched_yield(); /* until the server has taken one */
                assert_return_code(rc, -rc);
        }
        for (unsigned k = 0; k < 8; k++) {
                assert_int_equal(cl_answer(&c, MSG_DONE, first + k), 0);
                assert_int_equal(c.bytes[8 * k], 'a' + k);
        }
        cl_close(&c);
        graph_free(&g);
}

/* ---- weights ---- */

/* One set of weights for every model that asks for the same, blind or not; another seed is another set. */
static void shared_weights(void **state)
{
        struct tiny a, b;
        struct msg_loaded other, put;

        tiny_open(&a, false);
        tiny_open(&b, true);
        assert_memory_equal(a.m.weights_digest, b.m.weights_digest, 16);
        assert_memory_not_equal(a.m.graph_digest, b.m.graph_digest, 16);
        assert_int_equal(cl_load(&a.c, &a.g, MSG_WEIGHTS_SEED, 8, NULL, &other), 0);
        assert_memory_not_equal(a.m.weights_digest, other.weights_digest, 16);
        assert_int_not_equal(a.m.model, other.model);
        tiny_close(&a); /* the other goes on with them */
        assert_int_equal(cl_load(&b.c, &b.g, MSG_WEIGHTS_SEED, 7, NULL, &other), 0);
        assert_memory_equal(b.m.weights_digest, other.weights_digest, 16);
        assert_int_equal(cl_load(&b.c, &b.g, MSG_WEIGHTS_PUT, 0, NULL, &put), 0);
        assert_int_equal(cl_load(&b.c, &b.g, MSG_WEIGHTS_NONE, 0, NULL, &put), -EINVAL);
        tiny_close(&b);
}

static void checkpoint(void **state)
{
        static const char *const roots[] = {FIXTURES};
        const struct server_opts o = {
            .device = "reference", .cpu = -1, .model_roots = roots, .nmodel_roots = ARRAY_LEN(roots)};
        struct test_server *s = ts_start(&o);
        json *config = json_load(FIXTURES "/gpt2-micro/config.json", 1 << 20);
        struct msg_loaded m, again;
        struct client c;
        struct graph g;

        assert_non_null(config);
        assert_int_equal(gpt2_build(config, 1, 8, 16, DT_F32, &g), 0);
        cl_open(&c, ts_url(s, scheme));
        assert_int_equal(cl_load(&c, &g, MSG_WEIGHTS_CHECKPOINT, 0, "gpt2-micro", &m), 0);
        assert_true(m.weights_bytes > 0 && m.load_ns > 0);
        assert_int_equal(cl_load(&c, &g, MSG_WEIGHTS_CHECKPOINT, 0, "gpt2-micro", &again), 0);
        assert_memory_equal(m.weights_digest, again.weights_digest, 16);
        assert_true(again.load_ns < m.load_ns);
        assert_true(cl_load(&c, &g, MSG_WEIGHTS_CHECKPOINT, 0, "encoder-micro", &again) < 0); /* another architecture */
        assert_int_equal(c.phase, PH_LOAD);
        assert_int_equal(c.error_flags, 0);
        cl_close(&c);
        graph_free(&g);
        json_free(config);
        assert_int_equal(ts_stop(s), 0);
}

/* ---- the instrument ---- */

enum { LEAVES = 6 };

static void leaves_of(const struct msg_done *done, uint64_t out[LEAVES])
{
        const struct run_stamps *t = &done->stamps;

        out[0] = t->taken_ns - t->received_ns;
        out[1] = t->planned_ns - t->taken_ns;
        out[2] = t->placed_ns - t->planned_ns;
        out[3] = t->executed_ns - t->placed_ns - t->exec_ns;
        out[4] = t->exec_ns;
        out[5] = t->offered_ns - t->executed_ns;
}

/* A delay in one leaf is seen there and nowhere else: the least of some runs, the machine has other things to do. */
static void injuries(void **state)
{
        static const enum leaf where[LEAVES] = {LEAF_SERVER_QUEUE,  LEAF_SERVER_PLAN,      LEAF_SERVER_PLACEMENT,
                                                LEAF_SERVER_LAUNCH, LEAF_SERVER_EXECUTION, LEAF_SERVER_SKELETONIZATION};
        const uint64_t delay = 200 * NS_PER_US;

        for (unsigned hurt = 0; hurt < LEAVES; hurt++) {
                struct cl_run r = {.run.h.flags = RUN_PLAN_CACHE | RUN_PROFILE};
                uint64_t least[LEAVES], leaf[LEAVES];
                struct test_server *s;
                struct msg_loaded m;
                struct msg_done done;
                struct client c;
                struct graph g;

                injury = (struct injury){.active = true};
                injury.delay_ns[where[hurt]] = delay;
                s = ts_start(NULL);
                graph_echo(&g, 64);
                cl_open(&c, ts_url(s, scheme));
                assert_int_equal(cl_load(&c, &g, MSG_WEIGHTS_NONE, 0, NULL, &m), 0);
                r.run.model = m.model;
                run_range(&r, 0, 1, 1, 1, 0);
                run_inline(&r, 0, r.bytes, 64);
                memset(least, 0xff, sizeof(least));
                for (unsigned k = 0; k < 40; k++) {
                        assert_int_equal(cl_run(&c, &r, &done), 0);
                        leaves_of(&done, leaf);
                        for (unsigned l = 0; l < LEAVES; l++)
                                least[l] = leaf[l] < least[l] ? leaf[l] : least[l];
                }
                for (unsigned l = 0; l < LEAVES; l++) {
                        if (l == hurt)
                                assert_in_range(least[l], delay, delay + 20 * NS_PER_US);
                        else
                                assert_in_range(least[l], 0, 20 * NS_PER_US);
                }
                cl_close(&c);
                graph_free(&g);
                assert_int_equal(ts_stop(s), 0);
                injury = (struct injury){0};
        }
}

/* Lost states change what comes after; a request that brings its whole history does not care. */
static void dropped_state(void **state)
{
        struct msg_done done;
        struct tiny t;
        int32_t want[2], got;

        expected_tokens(8, 2, want);
        for (int blind = 0; blind < 2; blind++) {
                struct cl_run r, step = {0};
                float last[2][61];

                tiny_open(&t, blind);
                r = generation(&t, 8, 0, RUN_KEEP_STATE);
                step.run.model = t.m.model;
                run_range(&step, 0, t.decode, 1, 1, 0);
                run_inline(&step, t.ids, &want[0], 4);
                run_inline(&step, t.cursor, (int32_t[2]){8, 1}, 8);
                run_output(&step, t.last, 0, sizeof(last[0]), 0, 0);
                run_output(&step, t.token, 0, 4, 1000, 0);
                for (int dropped = 0; dropped < 2; dropped++) {
                        assert_int_equal(cl_run(&t.c, &r, &done), 0);
                        injury = (struct injury){.active = dropped, .drop_state = dropped};
                        assert_int_equal(cl_run(&t.c, &step, &done), 0);
                        injury = (struct injury){0};
                        memcpy(last[dropped], t.c.bytes, sizeof(last[0]));
                        memcpy(&got, t.c.bytes + 1000, 4);
                        assert_true(dropped || got == want[1]);
                }
                assert_memory_not_equal(last[0], last[1], sizeof(last[0]));
                tiny_close(&t);
        }
}

#define OVER(t, s)                                             \
        {                                                      \
#t " over " s, t, set_up, tear_down, (void *)s \
        }
#define OVER_ALL(t) OVER(t, "loop"), OVER(t, "shm"), OVER(t, "tcp")

int main(void)
{
        const struct CMUnitTest tests[] = {
            OVER_ALL(echo_inline),    OVER_ALL(echo_written), OVER_ALL(generate),    OVER_ALL(step_and_recompute),
            OVER_ALL(each_iteration), OVER_ALL(in_process),   OVER_ALL(calls),       OVER_ALL(large_call),
            OVER_ALL(shared_weights), OVER_ALL(checkpoint),   OVER(injuries, "shm"), OVER(dropped_state, "loop"),
            OVER_ALL(patterns),       OVER_ALL(small_talk),   OVER_ALL(put_and_get), OVER_ALL(join),
            OVER_ALL(pipelined),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
