/*
 * Log-linear histogram of ns: exact below 2^7, then 128 sub-buckets per power of two: a recorded value is
 * reported with a relative error of at most 1/256 (bucket midpoint) = 0.4 %. Fixed size, no allocation when recording.
 */
#ifndef DJINN_BASE_HIST_H
#define DJINN_BASE_HIST_H

#include <stdbool.h>
#include <stdint.h>

#define HIST_SUB_BITS  7
#define HIST_SUB       (1u << HIST_SUB_BITS)
#define HIST_BUCKETS   (HIST_SUB * (64 - HIST_SUB_BITS + 1))
#define HIST_REL_ERROR (1.0 / (2 * HIST_SUB))

struct hist {
        uint64_t n, min, max;
        double sum;
        uint64_t bucket[HIST_BUCKETS];
};

void hist_reset(struct hist *h);

static inline unsigned hist_index(uint64_t v)
{
        if (v < HIST_SUB)
                return (unsigned)v;
        unsigned shift = 63u - (unsigned)__builtin_clzll(v) - HIST_SUB_BITS;

        return (shift + 1) * HIST_SUB + (unsigned)((v >> shift) - HIST_SUB);
}

static inline void hist_add(struct hist *h, uint64_t v)
{
        h->bucket[hist_index(v)]++;
        h->n++;
        h->sum += (double)v;
        if (v < h->min)
                h->min = v;
        if (v > h->max)
                h->max = v;
}

void hist_merge(struct hist *into, const struct hist *from);
/* Value at percentile p (0..100), bucket midpoint clamped to [min, max]; NaN when fewer than need = 10/(1-p/100)
 * samples (so p50 needs 20, p99.99 needs 100000), except p = 0 and p = 100 which are exact. */
double hist_percentile(const struct hist *h, double p);
double hist_mean(const struct hist *h);

#endif
