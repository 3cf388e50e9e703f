#include "stats.h"

#include "clock.h"
#include "prng.h"
#include "unit.h"

/* Standard normal by Box and Muller. */
static double normal(struct prng *p)
{
        double u = 1 - prng_unit(p), v = prng_unit(p);

        return sqrt(-2 * log(u)) * cos(2 * M_PI * v);
}

static void hand_computed(void **state)
{
        static const double v[] = {4, 1, 3, 2, 10};
        struct summary s = stats_summary(v, 5);

        assert_int_equal(s.n, 5);
        assert_close(s.mean, 4, 1e-15);
        assert_close(s.median, 3, 0);
        assert_close(s.sd, sqrt(12.5), 1e-15); /* (0 + 9 + 1 + 4 + 36) / 4 */
        assert_close(s.min, 1, 0);
        assert_close(s.max, 10, 0);
        assert_close(s.p95, 8.8, 1e-12); /* rank 3.8: 4 + 0.8 * 6 */
        assert_false(s.ci95.known);
        assert_true(isnan(s.ci95.lo) && isnan(s.ci95.hi));
        assert_true(isnan(s.p90) && isnan(s.p95_bounded) && isnan(s.p99));
        assert_close(stats_percentile(v, 5, 25), 2, 0);
        assert_close(stats_percentile(v, 5, 0), 1, 0);
        assert_close(stats_percentile(v, 5, 100), 10, 0);
        assert_close(stats_median(v, 4), 2.5, 0);
        assert_close(v[0], 4, 0); /* the input keeps its order */
}

static void nothing_gives_nothing(void **state)
{
        static const double with_nan[] = {2, NAN, 3, NAN, 1};
        double one = 7;
        struct summary s = stats_summary(NULL, 0);

        assert_true(s.n == 0 && isnan(s.mean) && isnan(s.median) && isnan(s.min) && isnan(s.p95) && !s.ci95.known);
        assert_true(isnan(stats_median(NULL, 0)) && isnan(stats_mean(NULL, 0)));
        s = stats_summary(&one, 1);
        assert_true(s.median == 7 && s.p95 == 7 && s.min == 7 && isnan(s.sd));
        assert_close(stats_summary(with_nan, 5).min, 1, 0); /* what is no number sorts last */
        assert_close(stats_median(with_nan, 5), 3, 0);
        assert_false(stats_diff(&one, &one, NULL, 0, 2000, 1).ci95.known);
}

/* Table of exact intervals: n and the rank of the lower end, as in Hahn and Meeker; the upper end is its mirror. */
static void median_interval_is_exact(void **state)
{
        static const struct {
                size_t n, k;
        } table[] = {{6, 1},  {7, 1},  {8, 1},  {9, 2},   {10, 2},  {12, 3},  {15, 4},
                     {17, 5}, {20, 6}, {25, 8}, {30, 10}, {50, 18}, {100, 40}};
        double v[100];

        for (size_t t = 0; t < sizeof(table) / sizeof(table[0]); t++) {
                size_t n = table[t].n;

                for (size_t i = 0; i < n; i++)
                        v[i] = (double)((i * 37) % n + 1); /* a permutation: 37 divides no n */
                struct interval ci = stats_median_ci95(v, n);

                assert_true(ci.known);
                assert_close(ci.lo, (double)table[t].k, 0);
                assert_close(ci.hi, (double)(n + 1 - table[t].k), 0);
        }
        assert_false(stats_median_ci95(v, 5).known);
}

static void median_interval_of_many_is_near_the_normal_one(void **state)
{
        enum { N = 200001 };
        double *v = malloc(N * sizeof(*v));

        for (size_t i = 0; i < N; i++)
                v[i] = (double)i;
        struct interval ci = stats_median_ci95(v, N);

        assert_close(ci.lo, N / 2 - 1.96 * sqrt(N) / 2, 2);
        assert_close(ci.hi, N / 2 + 1.96 * sqrt(N) / 2, 2);
        free(v);
}

static void median_interval_covers(void **state)
{
        static const size_t sizes[] = {6, 9, 20, 51};
        struct prng p;
        double v[64];

        prng_seed(&p, 11);
        for (size_t s = 0; s < 4; s++) {
                enum { ROUNDS = 4000 };
                int held = 0;

                for (int r = 0; r < ROUNDS; r++) {
                        for (size_t i = 0; i < sizes[s]; i++)
                                v[i] = -log(1 - prng_unit(&p)); /* skewed, as latencies are */
                        struct interval ci = stats_median_ci95(v, sizes[s]);

                        held += ci.lo <= M_LN2 && M_LN2 <= ci.hi;
                }
                assert_true(held >= 0.94 * ROUNDS && held <= 0.99 * ROUNDS);
        }
}

static void percentiles_wait_for_enough_samples(void **state)
{
        double v[700];

        for (size_t i = 0; i < 700; i++)
                v[i] = (double)i;
        assert_true(isnan(stats_summary(v, 63).p90) && !isnan(stats_summary(v, 64).p90));
        assert_true(isnan(stats_summary(v, 129).p95_bounded) && !isnan(stats_summary(v, 130).p95_bounded));
        assert_true(isnan(stats_summary(v, 661).p99) && !isnan(stats_summary(v, 662).p99));
        assert_close(stats_summary(v, 130).p95_bounded, 128, 0); /* the second largest, from just here on */
}

static void percentiles_are_ordered(void **state)
{
        struct prng p;
        double v[800];

        prng_seed(&p, 5);
        for (size_t n = 1; n <= 800; n += 13) {
                for (size_t i = 0; i < n; i++)
                        v[i] = exp(normal(&p));
                struct summary s = stats_summary(v, n);

                assert_true(s.min <= s.median && s.median <= s.p95 && s.p95 <= s.max);
                assert_true(isnan(s.p90) || (s.median <= s.p90 && s.p90 <= s.p95));
                assert_true(isnan(s.p99) || (s.p95 <= s.p99 && s.p99 <= s.max));
                assert_true(isnan(s.p95_bounded) || (s.p95 <= s.p95_bounded && s.p95_bounded <= s.max));
                assert_true(!s.ci95.known || (s.ci95.lo <= s.median && s.median <= s.ci95.hi));
        }
}

static void p95_bound_holds_in_99_of_100(void **state)
{
        enum { ROUNDS = 3000 };
        static const size_t sizes[] = {130, 300};
        struct prng p;
        double v[300];

        prng_seed(&p, 21);
        for (size_t s = 0; s < 2; s++) {
                int held = 0;

                for (int r = 0; r < ROUNDS; r++) {
                        for (size_t i = 0; i < sizes[s]; i++)
                                v[i] = prng_unit(&p);
                        held += stats_summary(v, sizes[s]).p95_bounded >= 0.95;
                }
                assert_true(held >= 0.984 * ROUNDS);
                assert_true(held < ROUNDS); /* and it is not simply the maximum of everything */
        }
}

static void autocorrelation(void **state)
{
        static const double up_down[] = {1, -1, 1, -1, 1, -1}, drift[] = {1, 2, 3, 4, 5}, flat[] = {2, 2, 2};

        assert_close(stats_autocorr1(up_down, 6), -5.0 / 6, 1e-12);
        assert_close(stats_autocorr1(drift, 5), 0.4, 1e-12);
        assert_true(isnan(stats_autocorr1(flat, 3)) && isnan(stats_autocorr1(drift, 2)));
}

static void steady(void **state)
{
        double v[30];

        for (size_t i = 0; i < 30; i++)
                v[i] = i < 10 ? 100 - 9 * (double)i : 10 + 0.01 * (double)(i % 3);
        assert_false(stats_steady(v, 15, 5, 0.05));
        assert_true(stats_steady(v, 30, 5, 0.05));
        assert_false(stats_steady(v, 14, 5, 10));
        assert_false(stats_steady(v, 30, 0, 1));
        assert_false(stats_steady(v, 30, SIZE_MAX / 2, 1));
}

static void outliers_are_flagged(void **state)
{
        double v[] = {10, 11, 12, 13, 14, 15, 16, 100, -50};
        bool flags[9];

        assert_int_equal(stats_outliers(v, 9, flags), 2);
        for (size_t i = 0; i < 9; i++)
                assert_int_equal(flags[i], i >= 7);
        assert_int_equal(stats_outliers(v, 0, flags), 0);
}

static void differences_are_paired(void **state)
{
        double a[60], b[60];
        struct prng p;

        prng_seed(&p, 4);
        for (size_t i = 0; i < 60; i++) {
                b[i] = 100 + 50 * normal(&p); /* what the blocks share cancels */
                a[i] = b[i] + 3 + 0.1 * normal(&p);
        }
        struct estimate e = stats_diff(a, b, NULL, 60, 2000, 1);

        assert_close(e.value, 3, 0.1);
        assert_true(e.ci95.known && e.ci95.lo > 2.9 && e.ci95.hi < 3.1);
        assert_true(e.ci95.lo <= e.value && e.value <= e.ci95.hi);
        assert_true(e.within_launch);
        struct estimate again = stats_diff(a, b, NULL, 60, 2000, 1);

        assert_memory_equal(&e.ci95.lo, &again.ci95.lo, sizeof(double));
        int differ = 0;

        for (uint64_t seed = 2; seed < 12; seed++)
                differ += stats_diff(a, b, NULL, 60, 2000, seed).ci95.lo != e.ci95.lo;
        assert_true(differ > 0);
        assert_false(stats_diff(a, b, NULL, 5, 2000, 1).ci95.known);
        assert_true(stats_diff(a, b, NULL, 6, 2000, 1).ci95.known);
}

static void ratio_is_of_medians(void **state)
{
        static const double a[] = {2, 4, 6, 8, 10, 12, 14}, b[] = {1, 2, 3, 4, 5, 6, 7}, zero[7] = {0};
        struct estimate e = stats_ratio(a, b, NULL, 7, 2000, 3);

        assert_close(e.value, 2, 0);
        assert_close(e.ci95.lo, 2, 0); /* the same indices are drawn of both */
        assert_close(e.ci95.hi, 2, 0);
        assert_false(stats_ratio(a, zero, NULL, 7, 2000, 3).ci95.known);
        assert_close(stats_boot_median(a, NULL, 7, 2000, 3).value, 8, 0);
}

/* Five launches with levels of their own: an interval that saw only the variation within would be far too narrow. */
static void launches_widen_the_interval(void **state)
{
        enum { LAUNCHES = 8, EACH = 25, N = LAUNCHES * EACH };
        double v[N];
        uint32_t launch[N];
        struct prng p;

        prng_seed(&p, 8);
        for (uint32_t i = 0; i < N; i++) {
                launch[i] = i / EACH;
                v[i] = 100 + 5 * (launch[i] * 3 % LAUNCHES) + normal(&p);
        }
        struct estimate one = stats_boot_median(v, NULL, N, 2000, 1), many = stats_boot_median(v, launch, N, 2000, 1);

        assert_true(one.within_launch && !many.within_launch);
        assert_true(many.ci95.hi - many.ci95.lo > 5);
        struct estimate few = stats_boot_median(v, launch, 4 * EACH, 2000, 1);

        assert_true(few.within_launch);
}

/* A launch of one block, launches of different lengths. */
static void uneven_launches(void **state)
{
        static const uint32_t launch[] = {0, 1, 1, 2, 2, 2, 2, 2, 7, 7, 9, 9, 9, 9};
        double v[14];

        for (size_t i = 0; i < 14; i++)
                v[i] = (double)i;
        struct estimate e = stats_boot_median(v, launch, 14, 2000, 1);

        assert_false(e.within_launch);
        assert_true(e.ci95.known && e.ci95.lo >= 0 && e.ci95.hi <= 13 && e.ci95.lo < e.ci95.hi);
}

/* The same thing against itself: the interval must contain "no difference" nearly always. */
static void a_a_contains_one(void **state)
{
        enum { ROUNDS = 300 };
        static const size_t sizes[] = {6, 10, 20, 50, 100};
        struct prng p;
        double a[100], b[100], d[100];

        prng_seed(&p, 77);
        for (size_t s = 0; s < sizeof(sizes) / sizeof(sizes[0]); s++) {
                int ratio = 0, diff = 0;

                for (int r = 0; r < ROUNDS; r++) {
                        for (size_t i = 0; i < sizes[s]; i++) {
                                a[i] = 100 * exp(0.05 * normal(&p));
                                b[i] = 100 * exp(0.05 * normal(&p));
                                d[i] = a[i] - b[i];
                        }
                        struct interval q = stats_ratio(a, b, NULL, sizes[s], 2000, (uint64_t)r).ci95;
                        struct interval e = stats_boot_median(d, NULL, sizes[s], 2000, (uint64_t)r).ci95;

                        ratio += q.lo <= 1 && 1 <= q.hi;
                        diff += e.lo <= 0 && 0 <= e.hi;
                }
                print_message("A/A of %zu blocks: ratio %.3f, difference %.3f\n", sizes[s], (double)ratio / ROUNDS,
                              (double)diff / ROUNDS);
                /* Of six blocks even their whole range would cover only 97 %. */
                double floor = sizes[s] < 10 ? 0.84 : 0.90;

                assert_true(ratio >= floor * ROUNDS && diff >= floor * ROUNDS);
                assert_true(diff < ROUNDS);
        }
}

/* Five launches, each with a level of its own: what the launches have in common is to be found, not what these have. */
static void launch_interval_covers(void **state)
{
        enum { ROUNDS = 300, N = 50 };
        uint32_t launch[N];
        struct prng p;
        double v[N];
        int held = 0;

        prng_seed(&p, 31);
        for (int r = 0; r < ROUNDS; r++) {
                double level = 0;

                for (uint32_t i = 0; i < N; i++) {
                        launch[i] = i / 10;
                        level = i % 10 ? level : 5 * normal(&p);
                        v[i] = level + normal(&p);
                }
                struct interval ci = stats_boot_median(v, launch, N, 2000, (uint64_t)r).ci95;

                held += ci.lo <= 0 && 0 <= ci.hi;
        }
        print_message("five launches: %.3f\n", (double)held / ROUNDS);
        assert_true(held >= 0.85 * ROUNDS);
}

/* 2000 blocks and 2000 resamples are what a long sweep asks for, once per cell of its table. The limit has room for
 * sanitizers and a busy machine; the time itself is printed. */
static void is_fast_enough(void **state)
{
        enum { N = 2000 };
        static double a[N], b[N];
        struct prng p;

        prng_seed(&p, 1);
        for (size_t i = 0; i < N; i++) {
                a[i] = normal(&p);
                b[i] = normal(&p) + 10;
        }
        uint64_t start = clock_cpu_ns();

        stats_diff(a, b, NULL, N, 2000, 1);
        uint64_t diff_ns = clock_cpu_ns() - start;

        start = clock_cpu_ns();
        stats_ratio(a, b, NULL, N, 2000, 1);
        uint64_t ratio_ns = clock_cpu_ns() - start;

        print_message("diff %.1f ms, ratio %.1f ms\n", (double)diff_ns / 1e6, (double)ratio_ns / 1e6);
        assert_true(diff_ns < 500 * NS_PER_MS && ratio_ns < 800 * NS_PER_MS);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(hand_computed),
            cmocka_unit_test(nothing_gives_nothing),
            cmocka_unit_test(median_interval_is_exact),
            cmocka_unit_test(median_interval_of_many_is_near_the_normal_one),
            cmocka_unit_test(median_interval_covers),
            cmocka_unit_test(percentiles_wait_for_enough_samples),
            cmocka_unit_test(percentiles_are_ordered),
            cmocka_unit_test(p95_bound_holds_in_99_of_100),
            cmocka_unit_test(autocorrelation),
            cmocka_unit_test(steady),
            cmocka_unit_test(outliers_are_flagged),
            cmocka_unit_test(differences_are_paired),
            cmocka_unit_test(ratio_is_of_medians),
            cmocka_unit_test(launches_widen_the_interval),
            cmocka_unit_test(uneven_launches),
            cmocka_unit_test(a_a_contains_one),
            cmocka_unit_test(launch_interval_covers),
            cmocka_unit_test(is_fast_enough),
        };

        return cmocka_run_group_tests_name("stats", tests, NULL, NULL);
}
