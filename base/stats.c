#include "stats.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "prng.h"

#define TAIL_95       0.025 /* each side of a 95 % interval */
#define BOUND_CONF    0.99
#define MIN_CI        6
#define MIN_P90       64
#define MIN_P95_BOUND 130
#define MIN_P99       662
#define MIN_LAUNCHES  5
#define MIN_RESAMPLES 2000

static const struct interval unknown = {.known = false, .lo = NAN, .hi = NAN};

/* NaN sorts last, so that the order is total whatever comes in. */
static int by_value(const void *pa, const void *pb)
{
        double a = *(const double *)pa, b = *(const double *)pb;

        if (isnan(a) || isnan(b))
                return isnan(a) - isnan(b);
        return (a > b) - (a < b);
}

/* A sorted copy, free() it; NULL for n == 0 or without memory, which the callers answer with "unknown". */
static double *sorted_copy(const double *v, size_t n)
{
        double *s = n ? calloc(n, sizeof(*s)) : NULL;

        if (!s)
                return NULL;
        memcpy(s, v, n * sizeof(*s));
        qsort(s, n, sizeof(*s), by_value);
        return s;
}

/* ---- of sorted samples ---- */

static double median_sorted(const double *s, size_t n)
{
        return n % 2 ? s[n / 2] : s[n / 2 - 1] + (s[n / 2] - s[n / 2 - 1]) / 2;
}

static double percentile_sorted(const double *s, size_t n, double p)
{
        double rank = (double)(n - 1) * p / 100;
        size_t below = (size_t)rank;

        /* On a sample exactly: what lies beyond must not matter, not even when it is infinite. */
        if (rank == (double)below || below + 1 >= n)
                return s[below];
        return s[below] + (s[below + 1] - s[below]) * (rank - (double)below);
}

/*
 * The smallest k with P(X <= k) >= want for X ~ Binomial(n, p), exact up to rounding. The sum begins ten standard
 * deviations below the mean: what lies further down is below 1e-20 and would underflow term by term.
 */
static size_t binomial_quantile(size_t n, double p, double want)
{
        double dn = (double)n, from = floor(dn * p - 10 * sqrt(dn * p * (1 - p)) - 1);
        size_t k = from > 0 ? (size_t)from : 0;
        int sign;
        double dk = (double)k;
        double term = exp(lgamma_r(dn + 1, &sign) - lgamma_r(dk + 1, &sign) - lgamma_r(dn - dk + 1, &sign) +
                          dk * log(p) + (dn - dk) * log1p(-p));
        double sum = term;

        while (sum < want && k < n) {
                term *= (double)(n - k) / (double)(k + 1) * p / (1 - p);
                sum += term;
                k++;
        }
        return k;
}

/* The median lies between the k-th smallest and the k-th largest unless fewer than k samples fall on one side of it:
 * the largest k for which each side has at most 2.5 %. */
static struct interval median_ci_sorted(const double *s, size_t n)
{
        if (n < MIN_CI)
                return unknown;
        size_t k = binomial_quantile(n, 0.5, nextafter(TAIL_95, 1));

        return (struct interval){.known = true, .lo = s[k - 1], .hi = s[n - k]};
}

/* The smallest order statistic that lies at or above the 95th percentile with 99 % confidence: at most k samples are
 * below the percentile with that probability, so the next one is above it. */
static double p95_bound_sorted(const double *s, size_t n)
{
        if (n < MIN_P95_BOUND)
                return NAN;
        size_t k = binomial_quantile(n, 0.95, BOUND_CONF);

        return k < n ? s[k] : NAN;
}

/* ---- simple aggregates ---- */

double stats_mean(const double *v, size_t n)
{
        double sum = 0;

        for (size_t i = 0; i < n; i++)
                sum += v[i];
        return n ? sum / (double)n : NAN;
}

static double deviation(const double *v, size_t n, double mean)
{
        double sum = 0;

        for (size_t i = 0; i < n; i++)
                sum += (v[i] - mean) * (v[i] - mean);
        return n > 1 ? sqrt(sum / (double)(n - 1)) : NAN;
}

struct summary stats_summary(const double *v, size_t n)
{
        struct summary r = {.n = n,
                            .mean = NAN,
                            .median = NAN,
                            .sd = NAN,
                            .min = NAN,
                            .max = NAN,
                            .p95 = NAN,
                            .p90 = NAN,
                            .p95_bounded = NAN,
                            .p99 = NAN,
                            .ci95 = unknown};
        double *s = sorted_copy(v, n);

        if (!s)
                return r;
        r.mean = stats_mean(s, n);
        r.sd = deviation(s, n, r.mean);
        r.median = median_sorted(s, n);
        r.min = s[0];
        r.max = s[n - 1];
        r.p95 = percentile_sorted(s, n, 95);
        if (n >= MIN_P90)
                r.p90 = percentile_sorted(s, n, 90);
        r.p95_bounded = p95_bound_sorted(s, n);
        if (n >= MIN_P99)
                r.p99 = percentile_sorted(s, n, 99);
        r.ci95 = median_ci_sorted(s, n);
        free(s);
        return r;
}

double stats_median(const double *v, size_t n)
{
        return stats_percentile(v, n, 50);
}

double stats_percentile(const double *v, size_t n, double p)
{
        double *s = sorted_copy(v, n);
        double r = s ? percentile_sorted(s, n, p) : NAN;

        free(s);
        return r;
}

struct interval stats_median_ci95(const double *v, size_t n)
{
        double *s = sorted_copy(v, n);
        struct interval r = s ? median_ci_sorted(s, n) : unknown;

        free(s);
        return r;
}

double stats_autocorr1(const double *v, size_t n)
{
        double mean = stats_mean(v, n), products = 0, squares = 0;

        for (size_t i = 0; i < n; i++) {
                squares += (v[i] - mean) * (v[i] - mean);
                if (i > 0)
                        products += (v[i] - mean) * (v[i - 1] - mean);
        }
        return n >= 3 && squares > 0 ? products / squares : NAN;
}

bool stats_steady(const double *v, size_t n, size_t window, double rel)
{
        if (window == 0 || n / 3 < window)
                return false;
        double lo = INFINITY, hi = -INFINITY;

        for (size_t i = 1; i <= 3; i++) {
                double m = stats_median(v + n - i * window, window);

                lo = fmin(lo, m);
                hi = fmax(hi, m);
        }
        return hi - lo <= rel * fabs(lo);
}

size_t stats_outliers(const double *v, size_t n, bool *flags)
{
        double q1 = stats_percentile(v, n, 25), q3 = stats_percentile(v, n, 75), reach = 1.5 * (q3 - q1);
        size_t count = 0;

        for (size_t i = 0; i < n; i++) {
                flags[i] = v[i] < q1 - reach || v[i] > q3 + reach;
                count += flags[i];
        }
        return count;
}

/* ---- bootstrap ----
 * Medians of resamples are found by counting, not by sorting: each sample's rank is computed once, a resample counts
 * how often each rank was drawn, and the median is where the running count passes the middle.
 */

struct series {
        double *sorted;
        uint32_t *rank;  /* rank[i]: place of sample i in sorted */
        uint32_t *drawn; /* by rank, in this resample */
};

struct boot {
        size_t n;
        struct series s[2]; /* s[1] only for ratios */
        unsigned nseries;
        size_t *start; /* first block of each launch; start[launches] == n */
        size_t launches;
};

static void series_free(struct series *s)
{
        free(s->sorted);
        free(s->rank);
        free(s->drawn);
}

struct placed {
        double v;
        uint32_t at;
};

static int by_placed_value(const void *a, const void *b)
{
        return by_value(&((const struct placed *)a)->v, &((const struct placed *)b)->v);
}

static bool series_init(struct series *s, const double *v, size_t n)
{
        struct placed *p = calloc(n, sizeof(*p));

        s->sorted = calloc(n, sizeof(*s->sorted));
        s->rank = calloc(n, sizeof(*s->rank));
        s->drawn = calloc(n, sizeof(*s->drawn));
        bool ok = p && s->sorted && s->rank && s->drawn;

        for (size_t i = 0; ok && i < n; i++)
                p[i] = (struct placed){v[i], (uint32_t)i};
        if (ok)
                qsort(p, n, sizeof(*p), by_placed_value);
        for (size_t i = 0; ok && i < n; i++) {
                s->sorted[i] = p[i].v;
                s->rank[p[i].at] = (uint32_t)i;
        }
        free(p);
        return ok;
}

/* The value that has `before` drawn values in front of it. */
static double drawn_at(const struct series *s, size_t before)
{
        size_t i = 0, seen = s->drawn[0];

        while (seen <= before)
                seen += s->drawn[++i];
        return s->sorted[i];
}

static double drawn_median(const struct series *s, size_t total)
{
        double hi = drawn_at(s, total / 2);
        double lo = total % 2 ? hi : drawn_at(s, total / 2 - 1);

        return lo + (hi - lo) / 2;
}

static double statistic(const struct boot *b, size_t total)
{
        double m = drawn_median(&b->s[0], total);

        return b->nseries == 1 ? m : m / drawn_median(&b->s[1], total);
}

static void draw(struct boot *b, size_t block)
{
        for (unsigned k = 0; k < b->nseries; k++)
                b->s[k].drawn[b->s[k].rank[block]]++;
}

static size_t run_length(size_t blocks)
{
        return (size_t)lround(cbrt((double)blocks));
}

/* As many blocks as the launch has, in runs of len^(1/3) consecutive ones. Runs wrap round at the end, or the first and
 * last blocks would be drawn less often than the others. */
static size_t draw_launch(struct boot *b, size_t launch, struct prng *p)
{
        size_t first = b->start[launch], len = b->start[launch + 1] - first;
        size_t run = run_length(len), at = 0;

        for (size_t i = 0; i < len; i++) {
                if (i % run == 0)
                        at = (size_t)prng_below(p, len);
                draw(b, first + at);
                at = at + 1 < len ? at + 1 : 0;
        }
        return len;
}

/*
 * A bootstrap of few independent pieces is too narrow, for a resample varies around the sample as if that were the
 * whole population: with m pieces its variance is (m-1)/m of what it should be, and normal quantiles stand where Student's
 * should. Moving the two percentiles outward by both factors mends that (Hesterberg 2015, "expanded percentile
 * interval"). Returns the share to cut off at each side.
 */
static double expanded_tail(size_t pieces)
{
        const double z = 1.959963984540054, z2 = z * z, df = pieces > 1 ? (double)pieces - 1 : 1;
        /* Cornish and Fisher's expansion of Student's quantile, good to 1 % from 3 degrees of freedom on. */
        double t = z * (1 + (z2 + 1) / (4 * df) + (5 * z2 * z2 + 16 * z2 + 3) / (96 * df * df) +
                        (3 * z2 * z2 * z2 + 19 * z2 * z2 + 17 * z2 - 15) / (384 * df * df * df));

        return erfc(t * sqrt((df + 1) / df) / M_SQRT2) / 2;
}

/* How many pieces a resample draws independently: launches, or runs where launches are kept. */
static size_t count_pieces(const struct boot *b)
{
        size_t runs = 0;

        for (size_t i = 0; i < b->launches; i++) {
                size_t len = b->start[i + 1] - b->start[i];

                runs += len / run_length(len);
        }
        return b->launches < MIN_LAUNCHES ? runs : b->launches;
}

/* Launches are drawn with replacement only where there are enough of them to stand for the variation between launches;
 * else each is kept and the interval speaks of the variation within. */
static double resample(struct boot *b, struct prng *p)
{
        size_t total = 0;

        for (unsigned k = 0; k < b->nseries; k++)
                memset(b->s[k].drawn, 0, b->n * sizeof(*b->s[k].drawn));
        for (size_t i = 0; i < b->launches; i++)
                total += draw_launch(b, b->launches < MIN_LAUNCHES ? i : (size_t)prng_below(p, b->launches), p);
        return statistic(b, total);
}

static bool find_launches(struct boot *b, const uint32_t *launch)
{
        b->start = calloc(b->n + 1, sizeof(*b->start));
        if (!b->start)
                return false;
        for (size_t i = 1; launch && i < b->n; i++)
                if (launch[i] != launch[i - 1])
                        b->start[++b->launches] = i;
        b->start[++b->launches] = b->n;
        return true;
}

static struct interval bootstrap(struct boot *b, uint32_t resamples, uint64_t seed)
{
        struct interval ci = unknown;
        struct prng p;
        double *v = calloc(resamples, sizeof(*v)), tail = expanded_tail(count_pieces(b));

        if (!v)
                return ci;
        prng_seed(&p, seed);
        bool finite = true;

        for (uint32_t i = 0; i < resamples; i++) {
                v[i] = resample(b, &p);
                finite = finite && isfinite(v[i]);
        }
        qsort(v, resamples, sizeof(*v), by_value);
        if (finite)
                ci = (struct interval){.known = true,
                                       .lo = percentile_sorted(v, resamples, 100 * tail),
                                       .hi = percentile_sorted(v, resamples, 100 * (1 - tail))};
        free(v);
        return ci;
}

/* Of one series the median, of two the ratio of medians. */
static struct estimate estimate(const double *v0, const double *v1, const uint32_t *launch, size_t n,
                                uint32_t resamples, uint64_t seed)
{
        struct estimate e = {.value = stats_median(v0, n), .ci95 = unknown, .within_launch = true};
        struct boot b = {.n = n, .nseries = v1 ? 2 : 1};

        if (v1)
                e.value /= stats_median(v1, n);
        if (n == 0 || n > UINT32_MAX)
                return e;
        bool ok = find_launches(&b, launch) && series_init(&b.s[0], v0, n) && (!v1 || series_init(&b.s[1], v1, n));

        if (ok && n >= MIN_CI)
                e.ci95 = bootstrap(&b, resamples < MIN_RESAMPLES ? MIN_RESAMPLES : resamples, seed);
        e.within_launch = b.launches < MIN_LAUNCHES;
        free(b.start);
        series_free(&b.s[0]);
        series_free(&b.s[1]);
        return e;
}

struct estimate stats_boot_median(const double *v, const uint32_t *launch, size_t n, uint32_t resamples, uint64_t seed)
{
        return estimate(v, NULL, launch, n, resamples, seed);
}

struct estimate stats_diff(const double *a, const double *b, const uint32_t *launch, size_t n, uint32_t resamples,
                           uint64_t seed)
{
        struct estimate e = {.value = NAN, .ci95 = unknown, .within_launch = true};
        double *d = calloc(n + 1, sizeof(*d));

        if (!d)
                return e;
        for (size_t i = 0; i < n; i++)
                d[i] = a[i] - b[i];
        e = estimate(d, NULL, launch, n, resamples, seed);
        free(d);
        return e;
}

struct estimate stats_ratio(const double *a, const double *b, const uint32_t *launch, size_t n, uint32_t resamples,
                            uint64_t seed)
{
        return estimate(a, b, launch, n, resamples, seed);
}
