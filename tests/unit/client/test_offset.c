/* The server's clock from exchanges, on a clock made by hand that is off and drifts, and what becomes of a row's samples. */
#include <math.h>

#include "client_fixture.h"

#include "offset.h"
#include "prng.h"
#include "rows.h"

#define BASE_NS 5000000000ull
#define SPAN_NS 60000000000ull /* between two measurements: a minute */

/* The server's clock at a time of ours: some seconds ahead, and faster by so many ppm. */
struct clock {
        int64_t ahead_ns, ppm;
};

static uint64_t shown(const struct clock *c, uint64_t at)
{
        int64_t drift = (int64_t)(at - BASE_NS) / 1000000 * c->ppm;

        return at + (uint64_t)(c->ahead_ns + drift);
}

static int64_t truth(const struct clock *c, uint64_t at)
{
        return (int64_t)(shown(c, at) - at);
}

/* Exchanges whose ways take as long as they like: each at least 2 µs, mostly more, each way by itself. */
static struct offset measured(const struct clock *c, struct prng *rng, uint64_t at, int exchanges)
{
        struct offset best = OFFSET_UNKNOWN;

        for (int i = 0; i < exchanges; i++) {
                uint64_t sent = at, there, back;

                there = sent + 2000 + prng_u64(rng) % 30000;
                back = there + 700;
                at = back + 2000 + prng_u64(rng) % 30000;
                offset_see(&best, sent, shown(c, there), shown(c, back), at);
        }
        return best;
}

static void the_fastest_exchange_is_kept(void **state)
{
        struct offset o = OFFSET_UNKNOWN;

        offset_see(&o, 1000, 51500, 51700, 2200); /* 1200 there and back, 200 of it held */
        assert_int_equal(o.error_ns, 500);
        assert_int_equal(o.at_ns, 1600);
        assert_int_equal(o.ns, 50000);
        offset_see(&o, 3000, 53000, 53000, 6000);
        assert_int_equal(o.error_ns, 500);
        offset_see(&o, 7000, 57050, 57050, 7100);
        assert_int_equal(o.error_ns, 50);
        assert_int_equal(o.ns, 50000);
}

/* A server that says it held the request longer than we waited: no round trip at all, not one that wraps around. */
static void held_longer_than_waited(void **state)
{
        struct offset o = OFFSET_UNKNOWN;

        offset_see(&o, 1000, 5000, 9000, 2000);
        assert_int_equal(o.error_ns, 0);
}

static void the_truth_is_within_the_bound(void **state)
{
        static const struct clock clocks[] = {
            {0, 0}, {-4000000000, 0}, {7000000000, 50}, {7000000000, -300}, {-9, 2000}};
        struct prng rng;

        prng_seed(&rng, 3);
        for (size_t k = 0; k < ARRAY_LEN(clocks); k++)
                for (int round = 0; round < 200; round++) {
                        const struct clock *c = &clocks[k];
                        struct offset a = measured(c, &rng, BASE_NS, 8);
                        struct offset b = measured(c, &rng, BASE_NS + SPAN_NS, 8);
                        int64_t worst = (int64_t)(a.error_ns > b.error_ns ? a.error_ns : b.error_ns);

                        assert_true(offset_bound(&a, &b) >= (uint64_t)worst);
                        for (int i = 0; i <= 10; i++) {
                                uint64_t at = a.at_ns + (b.at_ns - a.at_ns) / 10 * (uint64_t)i;
                                int64_t off = llabs(offset_between(&a, &b, at) - truth(c, at));

                                assert_true(off <= worst + 2000); /* the clock made by hand goes in steps of ppm ns */
                        }
                }
}

/* A clock that is set right at once, somewhere between the measurements, is still within the bound. */
static void a_jump_is_within_the_bound(void **state)
{
        struct offset a = {1000, 100, 20}, b = {2000, 5100, 30};

        for (uint64_t at = 1000; at <= 2000; at += 50) {
                int64_t line = offset_between(&a, &b, at);

                assert_true(llabs(line - (100 - 20)) <= (int64_t)offset_bound(&a, &b));
                assert_true(llabs(line - (5100 + 30)) <= (int64_t)offset_bound(&a, &b));
        }
}

static void outside_the_nearer_counts(void **state)
{
        struct offset a = {1000, 100, 20}, b = {2000, 300, 30};

        assert_int_equal(offset_between(&a, &b, 0), 100);
        assert_int_equal(offset_between(&a, &b, 1500), 200);
        assert_int_equal(offset_between(&a, &b, 9000), 300);
        assert_int_equal(offset_between(&a, &a, 1500), 100);
}

/* ---- a row's samples ---- */

#define UP_NS   3000
#define DOWN_NS 4000
#define CALLS   3

/* As the hot path leaves it: CALLS calls, stamps corrected by the offset from before the row. */
static struct sample taken(const struct clock *c, uint64_t at, const struct offset *before)
{
        int64_t wrong = truth(c, at) - before->ns;
        struct sample s = {.s = {.start_ns = at - 50000,
                                 .latency_ns = 100000,
                                 .calls = CALLS,
                                 .least_up_ns = UP_NS + wrong,
                                 .least_down_ns = DOWN_NS - wrong}};

        s.s.leaf_ns[LEAF_NETWORK_C2S] = CALLS * (UP_NS + wrong);
        s.s.leaf_ns[LEAF_NETWORK_S2C] = CALLS * (DOWN_NS - wrong);
        return s;
}

static void samples_follow_a_drifting_clock(void **state)
{
        enum { N = 20 };
        const struct clock c = {3000000000, 100}; /* 6 ms in the minute */
        struct offset a = {BASE_NS, truth(&c, BASE_NS), 2000};
        struct offset b = {BASE_NS + SPAN_NS, truth(&c, BASE_NS + SPAN_NS), 2500};
        struct sample v[N];
        struct row r = {.name = "r"};

        for (uint64_t i = 0; i < N; i++)
                v[i] = taken(&c, BASE_NS + SPAN_NS / N * i + 1000000, &a);
        assert_true(v[N - 1].s.leaf_ns[LEAF_NETWORK_S2C] < -CALLS * 5000000);
        row_settle_clock(&r, v, N, &a, &b);
        for (int i = 0; i < N; i++) {
                assert_true(llabs(v[i].s.leaf_ns[LEAF_NETWORK_C2S] - CALLS * UP_NS) <= 3 * CALLS);
                assert_int_equal(v[i].s.leaf_ns[LEAF_NETWORK_C2S] + v[i].s.leaf_ns[LEAF_NETWORK_S2C],
                                 CALLS * (UP_NS + DOWN_NS));
                assert_false(v[i].s.disordered);
        }
        assert_true(r.clock.known);
        assert_int_equal(r.clock.first_ns, 3000000000);
        assert_int_equal(r.clock.last_ns, 3006000000);
        assert_int_equal(r.clock.error_ns, 2500 + 6000000);
}

static void the_worst_block_is_kept(void **state)
{
        const struct offset v[] = {{1, 10, 5}, {2, 11, 5}, {3, 12, 5}, {4, 12, 900}, {5, 13, 4}, {6, 14, 4}};
        struct row r = {.name = "r"};

        for (int i = 0; i < 6; i += 2)
                row_settle_clock(&r, NULL, 0, &v[i], &v[i + 1]);
        assert_int_equal(r.clock.error_ns, 900);
        assert_int_equal(r.clock.first_ns, 10);
        assert_int_equal(r.clock.last_ns, 14);
}

/* What no offset within the bound explains: a message that arrives before it was sent. */
static void what_cannot_be_is_disorder(void **state)
{
        struct exec_sample s = {.calls = 1, .least_up_ns = -100, .least_down_ns = 8000};

        exec_settle(&s, 0, 100);
        assert_false(s.disordered);
        exec_settle(&s, 0, 99);
        assert_true(s.disordered);
        s.disordered = false;
        exec_settle(&s, -100, 0);
        assert_false(s.disordered);
        exec_settle(&s, -8101, 100);
        assert_true(s.disordered);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(the_fastest_exchange_is_kept),  cmocka_unit_test(held_longer_than_waited),
            cmocka_unit_test(the_truth_is_within_the_bound), cmocka_unit_test(a_jump_is_within_the_bound),
            cmocka_unit_test(outside_the_nearer_counts),     cmocka_unit_test(samples_follow_a_drifting_clock),
            cmocka_unit_test(the_worst_block_is_kept),       cmocka_unit_test(what_cannot_be_is_disorder),
        };

        return cmocka_run_group_tests_name("offset", tests, NULL, NULL);
}
