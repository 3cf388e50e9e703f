#include "hist.h"

#include <math.h>
#include <string.h>

void hist_reset(struct hist *h)
{
        memset(h, 0, sizeof(*h));
        h->min = UINT64_MAX;
}

void hist_merge(struct hist *into, const struct hist *from)
{
        for (unsigned i = 0; i < HIST_BUCKETS; i++)
                into->bucket[i] += from->bucket[i];
        into->n += from->n;
        into->sum += from->sum;
        if (from->min < into->min)
                into->min = from->min;
        if (from->max > into->max)
                into->max = from->max;
}

/* Middle of the values that fall into bucket i: the inverse of hist_index. */
static double midpoint(unsigned i)
{
        if (i < HIST_SUB)
                return i;
        unsigned shift = i / HIST_SUB - 1;
        double width = ldexp(1, (int)shift);

        return (i % HIST_SUB + HIST_SUB) * width + (width - 1) / 2;
}

static double clamp(double v, double lo, double hi)
{
        return v < lo ? lo : v > hi ? hi : v;
}

double hist_percentile(const struct hist *h, double p)
{
        /* Ten samples beyond the percentile; the slack absorbs that 99.9 is not a binary fraction. */
        bool enough = (double)h->n * (100 - p) >= 1000 - 1e-6;

        if (h->n == 0 || p < 0 || p > 100)
                return NAN;
        if (p == 0 || p == 100)
                return (double)(p == 0 ? h->min : h->max);
        if (!enough)
                return NAN;
        double want = p / 100 * (double)h->n;
        uint64_t rank = (uint64_t)ceil(want * (1 - 1e-12)), seen = 0;

        for (unsigned i = 0; i < HIST_BUCKETS; i++) {
                seen += h->bucket[i];
                if (seen && seen >= rank)
                        return clamp(midpoint(i), (double)h->min, (double)h->max);
        }
        return (double)h->max;
}

double hist_mean(const struct hist *h)
{
        return h->n ? h->sum / (double)h->n : NAN;
}
