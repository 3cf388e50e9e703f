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
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
