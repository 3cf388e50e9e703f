/*
 * Statistics of the report. Every function sorts a copy: order of the input never matters unless said. Without memory
 * for the copy the answer is "unknown" (NaN).
 * Sources: order-statistic interval: Hahn & Meeker, and Le Boudec 2010; sample floors: MLPerf LoadGen early stopping
 * (c = 0.99, d = 0: p90 64, p95 130, p99 662).
 */
#ifndef DJINN_BASE_STATS_H
#define DJINN_BASE_STATS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct interval {
        bool known; /* false: too few samples; lo and hi are NaN */
        double lo, hi;
};

struct summary {
        size_t n;
        double mean, median, sd, min, max;
        double p95;           /* linear interpolation, descriptive */
        double p90;           /* NaN below 64 samples */
        double p95_bounded;   /* NaN below 130 samples: upper bound by early stopping */
        double p99;           /* NaN below 662 samples */
        struct interval ci95; /* of the median, exact from order statistics; known from n >= 6 */
};

struct summary stats_summary(const double *v, size_t n);
double stats_median(const double *v, size_t n);
double stats_mean(const double *v, size_t n);
/* Linear interpolation at rank (n-1)*p/100; NaN for n == 0. */
double stats_percentile(const double *v, size_t n, double p);
/* Exact 95 % interval of the median from order statistics (binomial); known from n >= 6. */
struct interval stats_median_ci95(const double *v, size_t n);
/* Lag-1 autocorrelation of v in its own order; NaN below 3 samples or without variance. */
double stats_autocorr1(const double *v, size_t n);

/*
 * Bootstrap over launches and, within a launch, moving runs (blocks of consecutive blocks, length n^(1/3)), percentile
 * method with the percentiles expanded for few launches or runs (Hesterberg 2015), seeded; at least 2000 resamples are
 * made. With fewer than 5 launches each launch is kept and only runs within it are drawn. launch[i] is the launch that
 * block i belongs to, in order of time; NULL: one.
 * diff: median over blocks of a[i]-b[i].   ratio: median(a)/median(b), both resampled with the same indices.
 */
struct estimate {
        double value;
        struct interval ci95; /* known from 6 blocks */
        bool within_launch;   /* fewer than 5 launches: label the interval so */
};

struct estimate stats_diff(const double *a, const double *b, const uint32_t *launch, size_t n, uint32_t resamples,
                           uint64_t seed);
struct estimate stats_ratio(const double *a, const double *b, const uint32_t *launch, size_t n, uint32_t resamples,
                            uint64_t seed);
/* Median of v with the bootstrap interval (for per-block quantities that are already differences). */
struct estimate stats_boot_median(const double *v, const uint32_t *launch, size_t n, uint32_t resamples, uint64_t seed);

/* Warm-up is over when the medians of the last three windows of `window` samples lie within rel of one another. */
bool stats_steady(const double *v, size_t n, size_t window, double rel);

/* Indices (0/1 flags) of the samples outside Tukey's fences (1.5 IQR); returns how many. Flagged, never dropped. */
size_t stats_outliers(const double *v, size_t n, bool *flags);

#endif
