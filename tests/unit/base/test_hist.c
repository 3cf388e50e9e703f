#include "hist.h"

#include "prng.h"
#include "unit.h"

static struct hist h;

/* A single value is reported clamped to itself, so the midpoint shows only between a smaller and a larger one. */
static void check_error(uint64_t v)
{
        hist_reset(&h);
        hist_add(&h, 0);
        hist_add(&h, UINT64_MAX);
        for (int i = 0; i < 20; i++)
                hist_add(&h, v);
        double got = hist_percentile(&h, 50);

        if (fabs(got - (double)v) > HIST_REL_ERROR * (double)v * (1 + 1e-12))
                fail_msg("%llu was reported as %.17g", (unsigned long long)v, got);
}

static void relative_error_is_bounded(void **state)
{
        struct prng p;

        for (unsigned bit = 0; bit < 64; bit++)
                for (int d = -1; d <= 1; d++)
                        check_error((1ull << bit) + (uint64_t)d);
        check_error(UINT64_MAX);
        prng_seed(&p, 1);
        for (int i = 0; i < 300; i++)
                check_error(prng_u64(&p) >> prng_below(&p, 64));
}

static void small_values_are_exact(void **state)
{
        for (uint64_t v = 1; v < HIST_SUB; v++) {
                hist_reset(&h);
                hist_add(&h, 0);
                hist_add(&h, 1000);
                for (int i = 0; i < 20; i++)
                        hist_add(&h, v);
                assert_true(hist_percentile(&h, 50) == (double)v);
        }
}

static void buckets_are_in_order_and_fit(void **state)
{
        unsigned last = 0;

        for (unsigned bit = 0; bit < 64; bit++) {
                for (uint64_t k = 0; k < 256; k++) {
                        uint64_t v = (1ull << bit) + (bit > 8 ? k << (bit - 8) : k % (1ull << bit));
                        unsigned i = hist_index(v);

                        assert_true(i < HIST_BUCKETS);
                        if (k == 0)
                                assert_true(bit == 0 || i > last);
                        if (i > last)
                                last = i;
                }
        }
        assert_int_equal(hist_index(UINT64_MAX), HIST_BUCKETS - 1);
        assert_int_equal(hist_index(0), 0);
}

static void percentiles_follow_the_sorted_samples(void **state)
{
        hist_reset(&h);
        for (uint64_t v = 1; v <= 10000; v++)
                hist_add(&h, v);
        assert_close(hist_percentile(&h, 50), 5000, 5000 * HIST_REL_ERROR);
        assert_close(hist_percentile(&h, 99), 9900, 9900 * HIST_REL_ERROR);
        assert_close(hist_percentile(&h, 99.9), 9990, 9990 * HIST_REL_ERROR);
        assert_true(hist_percentile(&h, 0) == 1 && hist_percentile(&h, 100) == 10000);
        assert_close(hist_mean(&h), 5000.5, 1e-9);
}

static void too_few_samples_give_no_percentile(void **state)
{
        hist_reset(&h);
        assert_true(isnan(hist_percentile(&h, 0)) && isnan(hist_mean(&h)));
        for (int i = 0; i < 19; i++)
                hist_add(&h, 5);
        assert_true(isnan(hist_percentile(&h, 50)));
        hist_add(&h, 5);
        assert_true(hist_percentile(&h, 50) == 5);
        assert_true(isnan(hist_percentile(&h, 90)));
        for (int i = 20; i < 99999; i++)
                hist_add(&h, 5);
        assert_true(hist_percentile(&h, 99.9) == 5);
        assert_true(isnan(hist_percentile(&h, 99.99)));
        hist_add(&h, 5);
        assert_true(hist_percentile(&h, 99.99) == 5);
        assert_true(isnan(hist_percentile(&h, 100.5)) && isnan(hist_percentile(&h, -1)));
}

static void merging_is_adding(void **state)
{
        static struct hist a, b;

        hist_reset(&h);
        hist_reset(&a);
        hist_reset(&b);
        for (uint64_t v = 0; v < 5000; v++) {
                hist_add(&h, v * v);
                hist_add(v % 3 ? &a : &b, v * v);
        }
        hist_merge(&a, &b);
        assert_memory_equal(&a, &h, sizeof(h));
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(relative_error_is_bounded),
            cmocka_unit_test(small_values_are_exact),
            cmocka_unit_test(buckets_are_in_order_and_fit),
            cmocka_unit_test(percentiles_follow_the_sorted_samples),
            cmocka_unit_test(too_few_samples_give_no_percentile),
            cmocka_unit_test(merging_is_adding),
        };

        return cmocka_run_group_tests_name("hist", tests, NULL, NULL);
}
