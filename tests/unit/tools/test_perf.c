/* perf: the words, the sizes, and what a control message of another version is answered. */
#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "clock.h"
#include "err.h"
#include "opts.h"
#include "perf_inside.h"
#include "perf_probe.h"

volatile sig_atomic_t perf_stopped;     /* perf_launch.c's */
const struct opts_spec perf_spec = {0}; /* perf.c's */

static const struct perf_case fixed = {.op = PERF_SEND, .lo = 64, .hi = 64, .stride = 64, .slots = 4, .seed = 7};

static void test_every_byte_counts(void **state)
{
        static const uint64_t sizes[] = {1, 7, 8, 9, 31, 32, 33, 64, 1000, 4099};
        uint8_t buf[4100];

        (void)state;
        for (size_t s = 0; s < sizeof(sizes) / sizeof(sizes[0]); s++) {
                perf_fill(buf, sizes[s], 42);
                assert_true(perf_holds(buf, sizes[s], 42));
                for (uint64_t i = 0; i < sizes[s]; i++) {
                        buf[i] ^= 0x10;
                        assert_false(perf_holds(buf, sizes[s], 42));
                        buf[i] ^= 0x10;
                }
        }
}

static void test_words_know_their_place(void **state)
{
        uint64_t a[16], b[16];

        (void)state;
        perf_fill(a, sizeof(a), perf_stream(&fixed, 0, true, 5));
        memcpy(b, a, sizeof(a)); /* two words that changed places */
        b[3] = a[9];
        b[9] = a[3];
        assert_false(perf_holds(b, sizeof(b), perf_stream(&fixed, 0, true, 5)));
        memmove(b, a + 1, sizeof(a) - 8); /* shifted by one */
        assert_false(perf_holds(b, sizeof(b) - 8, perf_stream(&fixed, 0, true, 5)));
        assert_false(perf_holds(a, sizeof(a), perf_stream(&fixed, 0, true, 6)));  /* the next message */
        assert_false(perf_holds(a, sizeof(a), perf_stream(&fixed, 1, true, 5)));  /* another connection */
        assert_false(perf_holds(a, sizeof(a), perf_stream(&fixed, 0, false, 5))); /* the other direction */
}

/* Each octave holds as many as every other, and every size is one that was asked for. */
static void test_mixed_sizes_are_log_uniform(void **state)
{
        struct perf_size size = {.lo = 1, .hi = 65536, .mixed = true};
        struct perf_case k = {.lo = 1, .hi = 65536, .seed = 3};
        unsigned octave[17] = {0};
        const unsigned n = 160000;

        (void)state;
        k.octaves = perf_octaves(&size);
        for (unsigned i = 0; i < n; i++) {
                uint64_t v = perf_size_at(&k, 0, i);

                assert_in_range(v, 1, 65536);
                octave[63 - __builtin_clzll(v)]++;
        }
        for (unsigned i = 0; i < 16; i++)
                assert_in_range(octave[i], n / 16 * 95 / 100, n / 16 * 105 / 100);
        assert_int_equal(perf_size_at(&k, 0, 77), perf_size_at(&k, 0, 77));
        assert_int_not_equal(perf_stream(&k, 0, true, 1), perf_stream(&k, 0, true, 2));
}

static void test_slots_in_random_order_are_all_used(void **state)
{
        struct perf_case k = {.slots = 100, .seed = 9};
        uint16_t order[100];
        bool used[100] = {false};
        unsigned in_place = 0;

        (void)state;
        perf_slot_order(&k, order);
        for (unsigned i = 0; i < 100; i++) {
                assert_in_range(order[i], 0, 99);
                assert_false(used[order[i]]);
                used[order[i]] = true;
                in_place += order[i] == i;
        }
        assert_in_range(in_place, 0, 10);
}

static void test_counters_that_moved(void **state)
{
        const char *a = "{\"x\":5,\"y\":7}", *b = "{\"x\":5,\"y\":9,\"z\":1}";
        json *before = json_parse(a, strlen(a), "a"), *after = json_parse(b, strlen(b), "b"),
             *d = perf_counters_delta(before, after);

        (void)state;
        assert_int_equal(json_count(d), 2);
        assert_true(json_num(json_get(d, "y"), 0) == 2 && json_num(json_get(d, "z"), 0) == 1);
        json_free(before);
        json_free(after);
        json_free(d);
        assert_null(perf_counters_delta(NULL, NULL));
}

/* ---- two ends ---- */

struct end {
        struct perf_opts o;
        struct tp_ctx *ctx;
        struct tp_listener *tl;
        int rc;
        char why[512];
};

static void *serve(void *arg)
{
        struct end *e = arg;
        struct perf_session s;

        e->rc = perf_session_init(&s, &e->o, false);
        s.url = "tcp://127.0.0.1:0";
        e->rc = perf_agree_serve(&s, e->ctx, e->tl);
        if (e->rc == 0)
                e->rc = perf_serve_cases(&s);
        snprintf(e->why, sizeof(e->why), "%s", err_text());
        perf_session_free(&s);
        return NULL;
}

static void listen_here(struct end *e)
{
        e->o.stall_ns = NS_PER_S;
        e->o.listen = "tcp://127.0.0.1:0";
        assert_int_equal(tp_open("tcp", NULL, &e->ctx), 0);
        assert_int_equal(tp_listen(e->ctx, "tcp://127.0.0.1:0", &e->tl), 0);
}

/* What the next version's HELLO looks like to this one: the same head, another number, and who knows what behind it. */
static void test_another_version_is_told(void **state)
{
        static struct {
                uint64_t magic;
                uint32_t version, kind;
                char why[160];
                uint8_t rest[999];
        } hello = {0x4652455044ull, 77, PERF_HELLO, "", {0}};
        static struct end e;
        struct tp_event ev;
        struct tp_ctx *ctx;
        struct tp_ep *ep;
        pthread_t t;
        uint64_t began;
        int n = 0;

        (void)state;
        listen_here(&e);
        pthread_create(&t, NULL, serve, &e);
        assert_int_equal(tp_open("tcp", NULL, &ctx), 0);
        began = clock_ns();
        assert_int_equal(tp_connect(ctx, e.tl->url, began + NS_PER_S, &ep), 0);
        assert_true(tp_send(ep, &hello, offsetof(__typeof__(hello), rest) + 900, 0, 0) >= 0);
        while (n == 0 || ev.kind != TP_EV_MSG) {
                n = tp_wait(ctx, &ev, 1, began + NS_PER_S);
                assert_true(n > 0);
        }
        assert_true(ev.len >= 176);
        assert_int_equal(((const uint32_t *)ev.data)[3], PERF_REFUSED);
        assert_non_null(strstr((const char *)ev.data + 16, "another version of djinnbench perf"));
        assert_true(clock_ns() - began < NS_PER_S);
        tp_release(ep, ev.cookie);
        pthread_join(t, NULL);
        assert_int_equal(e.rc, -EPROTO);
        assert_non_null(strstr(e.why, "refused tcp://"));
        tp_close(ctx);
        tp_close(e.ctx);
}

static void test_a_question_is_answered(void **state)
{
        for (int same = 0; same < 3; same++) { /* another key, the same, none */
                static struct end e;
                struct perf_peer_info info;
                struct auth_key key = {.present = same < 2};
                struct tp_ctx *ctx;
                pthread_t t;

                (void)state;
                memset(&e, 0, sizeof(e));
                listen_here(&e);
                key_random(&e.o.key);
                if (same == 1)
                        key = e.o.key;
                pthread_create(&t, NULL, serve, &e);
                assert_int_equal(tp_open("tcp", NULL, &ctx), 0);
                assert_int_equal(perf_probe(ctx, e.tl->url, &key, clock_ns() + NS_PER_S, &info), 0);
                assert_true(info.needs_key);
                assert_int_equal(info.key_agrees, same == 1);
                assert_true(info.version[0] && info.commit[0]);
                pthread_join(t, NULL);
                assert_int_equal(e.rc, -EALREADY);
                tp_close(ctx);
                tp_close(e.ctx);
        }
}

/* ---- drivers that lie ---- */

struct liar {
        struct end e; /* the end that it is to hurt */
        pthread_t t;
        struct perf_opts o;
        struct perf_session s; /* its own; the connections are made by hand */
        struct perf_ctl m;
};

static struct perf_conn *liar_connect(struct liar *l, unsigned i)
{
        struct perf_conn *c = &l->s.conns[i];

        c->w = &l->s.workers[0];
        c->index = i;
        l->s.n_conns = i + 1;
        assert_int_equal(tp_connect(c->w->ctx, l->e.tl->url, clock_ns() + NS_PER_S, &c->ep), 0);
        c->ep->user = c;
        return c;
}

static void liar_start(struct liar *l, uint64_t conns, uint64_t bytes)
{
        memset(l, 0, sizeof(*l));
        listen_here(&l->e);
        pthread_create(&l->t, NULL, serve, &l->e);
        l->o.stall_ns = NS_PER_S;
        assert_int_equal(perf_session_init(&l->s, &l->o, true), 0);
        l->s.url = l->e.tl->url;
        l->s.tx_bytes = l->s.rx_bytes = bytes;
        assert_int_equal(perf_worker_open(&l->s.workers[0], l->e.tl->url), 0);
        l->m.kind = PERF_HELLO;
        l->m.f[PF_CONNECTIONS] = conns;
        l->m.f[PF_THREADS] = 1;
        l->m.f[PF_DEPTH] = 16;
        l->m.f[PF_TX_BYTES] = l->m.f[PF_RX_BYTES] = bytes;
        l->m.f[PF_STALL] = NS_PER_S;
        liar_connect(l, 0);
}

static void liar_agree(struct liar *l)
{
        struct perf_conn *c = &l->s.conns[0];
        char *text[2];

        assert_int_equal(perf_tell(c, &l->m), 0);
        assert_int_equal(perf_hear(c, PERF_WELCOME, &l->m), 0);
        memset(&l->m, 0, sizeof(l->m));
        l->m.kind = PERF_AUTH;
        assert_int_equal(perf_tell(c, &l->m), 0);
        assert_int_equal(perf_hear(c, PERF_AUTHED, &l->m), 0);
        l->s.token[0] = l->m.f[PF_TOKEN_0];
        l->s.token[1] = l->m.f[PF_TOKEN_1];
        assert_int_equal(perf_tell_text(c, "[{}]"), 0);
        assert_int_equal(perf_hear_text(c, &text[0]), 0);
        assert_int_equal(perf_hear_text(c, &text[1]), 0);
        free(text[0]);
        free(text[1]);
}

static void liar_asks(struct liar *l, struct perf_conn *c, uint64_t index, uint64_t token)
{
        struct tp_mem *mem;

        memset(&l->m, 0, sizeof(l->m));
        assert_int_equal(tp_alloc(c->ep, l->s.rx_bytes, &mem), 0);
        assert_int_equal(tp_export_key(mem, 0, l->s.rx_bytes, &l->m.key), 0);
        l->m.kind = PERF_ATTACH;
        l->m.f[PF_TOKEN_0] = token;
        l->m.f[PF_TOKEN_1] = l->s.token[1];
        l->m.f[PF_INDEX] = index;
        assert_int_equal(perf_tell(c, &l->m), 0);
}

static void liar_attach(struct liar *l, struct perf_conn *c)
{
        liar_asks(l, c, c->index, l->s.token[0]);
        assert_int_equal(perf_hear(c, PERF_ATTACHED, &l->m), 0);
}

/* How it ended for the other end. */
static int liar_end(struct liar *l)
{
        perf_session_free(&l->s);
        pthread_join(l->t, NULL);
        tp_close(l->e.ctx);
        return l->e.rc;
}

static void test_a_connection_is_attached_once(void **state)
{
        static struct liar l;
        struct perf_conn *c;

        (void)state;
        liar_start(&l, 4, 4096);
        liar_agree(&l);
        liar_attach(&l, &l.s.conns[0]);
        liar_attach(&l, liar_connect(&l, 1));
        c = liar_connect(&l, 2); /* somebody who guesses the token ends nothing but his own connection */
        liar_asks(&l, c, 2, l.s.token[0] + 1);
        assert_int_equal(perf_hear(c, PERF_ATTACHED, &l.m), -EPERM);
        assert_non_null(strstr(err_text(), PERF_BUSY));
        tp_ep_close(c->ep);
        liar_attach(&l, liar_connect(&l, 2));
        liar_asks(&l, &l.s.conns[1], 3, l.s.token[0]); /* one that has its place */
        pthread_join(l.t, NULL);
        assert_int_equal(l.e.rc, -EPROTO);
        assert_non_null(strstr(l.e.why, "a connection that was not agreed on"));
        perf_session_free(&l.s);
        tp_close(l.e.ctx);
}

/* Who has not shown a key gets neither the time nor the memory that he names. */
static void test_a_stranger_cannot_name_the_deadline(void **state)
{
        static struct liar l;
        uint64_t began = clock_ns();

        (void)state;
        liar_start(&l, 4096, 4096);
        l.m.f[PF_DEPTH] = PERF_DEPTH_MAX;
        l.m.f[PF_STALL] = 86400 * NS_PER_S;
        assert_int_equal(perf_tell(&l.s.conns[0], &l.m), 0);
        assert_int_equal(perf_hear(&l.s.conns[0], PERF_WELCOME, &l.m), 0);
        pthread_join(l.t, NULL);
        assert_int_equal(l.e.rc, -ETIMEDOUT);
        assert_true(clock_ns() - began < 10 * NS_PER_S);
        perf_session_free(&l.s);
        tp_close(l.e.ctx);
}

static void test_the_bare_medium_is_bounded(void **state)
{
        struct perf_case k = {.test = PERF_BW,
                              .op = PERF_SEND,
                              .shape = PERF_STREAM,
                              .lo = 1ull << 29,
                              .hi = 1ull << 29,
                              .n = 1,
                              .window = PERF_DEPTH_MAX,
                              .slots = 1};
        static struct liar l;

        (void)state;
        liar_start(&l, 1, 1ull << 29);
        liar_agree(&l);
        liar_attach(&l, &l.s.conns[0]);
        assert_int_equal(perf_hear(&l.s.conns[0], PERF_TOGETHER, &l.m), 0);
        perf_case_encode(&k, &l.m);
        l.m.kind = PERF_RAW_OFFER;
        assert_int_equal(perf_tell(&l.s.conns[0], &l.m), 0);
        assert_int_equal(perf_hear(&l.s.conns[0], PERF_RAW_OFFER, &l.m), -EPERM);
        assert_non_null(strstr(err_text(), "more memory is asked for"));
        assert_int_equal(liar_end(&l), -EINVAL);
}

/* Fields of cases, orders and greetings at random, most of them at the edge of something. */
static uint64_t edge(uint64_t i, uint64_t n)
{
        static const uint64_t edges[] = {0,          1,          2,          63,         64,
                                         255,        4095,       4096,       4097,       1u << 30,
                                         UINT32_MAX, 1ull << 32, 1ull << 62, 1ull << 63, UINT64_MAX};
        uint64_t r = prng_at(9, i, n);

        return r % 4 == 0 ? r : edges[(r >> 8) % (sizeof(edges) / sizeof(edges[0]))] + (r >> 20) % 3 - 1;
}

static void test_drivers_that_lie(void **state)
{
        static const enum perf_ctl_kind kinds[] = {PERF_CASE,  PERF_RAW_ORDER, PERF_RAW_OFFER, PERF_TEXT,
                                                   PERF_CLOCK, PERF_COUNT,     PERF_ATTACH,    99};
        static struct liar l;

        (void)state;
        for (uint64_t i = 0; i < 120; i++) {
                struct perf_conn *c = &l.s.conns[0];

                liar_start(&l, 1, 65536);
                c = &l.s.conns[0];
                if (i % 4 == 0) { /* from the first word on */
                        for (uint64_t f = 0; f < PF_COUNT; f++)
                                if (prng_at(10, i, f) % 3 == 0)
                                        l.m.f[f] = edge(i, f);
                        perf_tell(c, &l.m);
                        perf_hear_any(c, &l.m);
                } else {
                        liar_agree(&l);
                        liar_attach(&l, c);
                        assert_int_equal(perf_hear(c, PERF_TOGETHER, &l.m), 0);
                        perf_case_encode(&(struct perf_case){.op = PERF_SEND,
                                                             .lo = 64,
                                                             .hi = 64,
                                                             .n = 5,
                                                             .window = 4,
                                                             .slots = 4,
                                                             .shape = (enum perf_shape)(i % 3)},
                                         &l.m);
                        l.m.kind = kinds[prng_at(12, i, 0) % (sizeof(kinds) / sizeof(kinds[0]))];
                        for (uint64_t f = PF_SIZE_LO; f < PF_COUNT; f++)
                                if (prng_at(11, i, f) % 4 == 0)
                                        l.m.f[f] = edge(i, f);
                        l.m.f[PF_OP] = prng_at(13, i, 0) % 6;
                        perf_tell(c, &l.m);
                        if (i % 2)
                                for (unsigned n = 0; n < 8; n++) /* data that belongs to nothing */
                                        tp_send(c->ep, &l.m, 32 + n % 3 * 32, 0, PERF_NO_COOKIE);
                }
                liar_end(&l);
        }
}

static void test_refusals_do_not_move_the_cursor(void **state)
{
        static struct {
                uint64_t magic;
                uint32_t version, kind;
                char why[160];
        } m = {0x4652455044ull, 77, PERF_REFUSED, "\033[2J\007busy"};
        static struct perf_ctl out;
        struct perf_session s = {.phase = "x"};
        struct perf_worker w = {.s = &s};

        (void)state;
        memset(m.why + 8, 'a', sizeof(m.why) - 8); /* and no end to it */
        assert_int_equal(perf_ctl_parse(&w, "tcp://x", &m, sizeof(m), &out), -EPERM);
        assert_non_null(strstr(err_text(), "?[2J?"));
        assert_null(strchr(err_text(), '\033'));
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(test_every_byte_counts),
            cmocka_unit_test(test_words_know_their_place),
            cmocka_unit_test(test_mixed_sizes_are_log_uniform),
            cmocka_unit_test(test_slots_in_random_order_are_all_used),
            cmocka_unit_test(test_counters_that_moved),
            cmocka_unit_test(test_another_version_is_told),
            cmocka_unit_test(test_a_question_is_answered),
            cmocka_unit_test(test_a_connection_is_attached_once),
            cmocka_unit_test(test_a_stranger_cannot_name_the_deadline),
            cmocka_unit_test(test_the_bare_medium_is_bounded),
            cmocka_unit_test(test_drivers_that_lie),
            cmocka_unit_test(test_refusals_do_not_move_the_cursor),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
