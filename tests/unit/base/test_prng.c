#include "prng.h"

#include "unit.h"

/* Published outputs of xoshiro256** whose state is splitmix64's of seed 0. */
static void known_stream(void **state)
{
        static const uint64_t want[] = {11091344671253066420ull, 13793997310169335082ull, 1900383378846508768ull,
                                        7684712102626143532ull, 13521403990117723737ull};
        struct prng p;

        prng_seed(&p, 0);
        assert_true(p.s[0] == 0xe220a8397b1dcdafull);
        for (size_t i = 0; i < 5; i++)
                assert_true(prng_u64(&p) == want[i]);
}

/* Frozen: synthetic weights of every published result depend on them. */
static void known_counter_values(void **state)
{
        assert_true(prng_at(0, 0, 0) == 0x8bf7c2f1cf204af1ull);
        assert_true(prng_at(1, 2, 3) == 0x417c1c8a38c40492ull);
        assert_true(prng_at_f32(1, 2, 3) == -4096996.0f / 8388608.0f);
}

static void below_is_uniform(void **state)
{
        enum { CELLS = 7, DRAWS = 70000 };
        struct prng p;
        double count[CELLS] = {0}, chi2 = 0;

        prng_seed(&p, 42);
        for (int i = 0; i < DRAWS; i++)
                count[prng_below(&p, CELLS)]++;
        for (int i = 0; i < CELLS; i++)
                chi2 += (count[i] - 10000) * (count[i] - 10000) / 10000;
        assert_true(chi2 < 22.5); /* 0.1 % point for 6 degrees of freedom */
        for (int i = 0; i < 100; i++)
                assert_int_equal(prng_below(&p, 1), 0);
}

/* A plain modulo would hit the lower third of 3 * 2^62 outputs twice as often, a plain multiplication every third. */
static void below_has_no_modulo_bias(void **state)
{
        const uint64_t n = 3ull << 62;
        struct prng p;
        int low = 0, third = 0;

        prng_seed(&p, 1);
        for (int i = 0; i < 30000; i++) {
                uint64_t v = prng_below(&p, n);

                low += v < n / 3;
                third += v % 3 == 0;
        }
        assert_true(low > 9600 && low < 10400);
        assert_true(third > 9600 && third < 10400);
}

static void unit_interval(void **state)
{
        struct prng p;
        double sum = 0, squares = 0;

        prng_seed(&p, 7);
        for (int i = 0; i < 100000; i++) {
                double u = prng_unit(&p);

                assert_true(u >= 0 && u < 1);
                sum += u;
                squares += u * u;
        }
        assert_close(sum / 100000, 0.5, 0.005);
        assert_close(squares / 100000, 1.0 / 3, 0.005);
}

static void counter_is_uniform(void **state)
{
        double sum = 0, squares = 0;

        for (uint64_t i = 0; i < 100000; i++) {
                float f = prng_at_f32(5, 1, i);

                assert_true(f >= -1 && f < 1);
                sum += (double)f;
                squares += (double)f * (double)f;
        }
        assert_close(sum / 100000, 0, 0.01);
        assert_close(squares / 100000, 1.0 / 3, 0.005);
}

static void shuffle_permutes_evenly(void **state)
{
        uint32_t v[5];
        int first[5] = {0};
        struct prng p;

        prng_seed(&p, 3);
        for (int round = 0; round < 10000; round++) {
                unsigned seen = 0;

                for (uint32_t i = 0; i < 5; i++)
                        v[i] = i;
                prng_shuffle(&p, v, 5);
                for (int i = 0; i < 5; i++)
                        seen |= 1u << v[i];
                assert_int_equal(seen, 31);
                first[v[0]]++;
        }
        for (int i = 0; i < 5; i++)
                assert_true(first[i] > 1800 && first[i] < 2200);
        prng_shuffle(&p, v, 0);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(known_stream),
            cmocka_unit_test(known_counter_values),
            cmocka_unit_test(below_is_uniform),
            cmocka_unit_test(below_has_no_modulo_bias),
            cmocka_unit_test(unit_interval),
            cmocka_unit_test(counter_is_uniform),
            cmocka_unit_test(shuffle_permutes_evenly),
        };

        return cmocka_run_group_tests_name("prng", tests, NULL, NULL);
}
