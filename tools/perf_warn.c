/* perf: why a figure should not be believed. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "check.h"
#include "clock.h"
#include "manifest.h"
#include "perf_inside.h"
#include "stats.h"

#define FEW_SAMPLES   20
#define UNSTEADY_PART 0.25
#define RATE_MISSED   0.95

/* An end's manifest is read once; warnings are asked for row by row. */
struct hosts {
        json *here, *peer;
        bool one_core;
};

static const struct hosts *hosts_of(const struct perf_result *r)
{
        static struct hosts h;

        if (h.here)
                return &h;
        h.here = manifest_host();
        h.peer = json_parse(r->info.peer_text, strlen(r->info.peer_text), "manifest of the other end");
        return &h;
}

static bool same_host(const struct hosts *h)
{
        return !strcmp(json_str(json_get(h->here, "boot_id"), "-"), json_str(json_get(h->peer, "boot_id"), ""));
}

/* More threads that poll than cores for them. */
static bool crowded(const struct perf_result *r, const struct hosts *h)
{
        const json *theirs = json_get(h->peer, "cores");
        cpu_set_t used;
        int wanted = r->info.n_cores + (int)(same_host(h) ? json_count(theirs) : 0);

        if (!r->info.n_cores)
                return same_host(h) && CPU_COUNT(perf_allowed()) < 2 * r->o->threads;
        CPU_ZERO(&used);
        for (int i = 0; i < r->info.n_cores; i++)
                CPU_SET((unsigned)r->info.cores[i], &used);
        for (const json *v = same_host(h) ? json_first(theirs) : NULL; v; v = json_next(v))
                if (json_num(v, -1) >= 0 && json_num(v, -1) < CPU_SETSIZE)
                        CPU_SET((unsigned)json_num(v, 0), &used);
        return CPU_COUNT(&used) < wanted;
}

static void warn_governor(const json *host, const char *end, perf_warn_fn warn, void *to)
{
        const char *governor = json_str(json_get(json_get(host, "cpu"), "governor"), NULL);
        char text[160];

        if (!governor || !strcmp(governor, "performance"))
                return;
        snprintf(text, sizeof(text), "the frequency governor of %s is %.40s, not performance", end, governor);
        perf_printable(text); /* it may be the other end's word */
        warn(to, text);
}

static void warn_hosts(const struct perf_result *r, perf_warn_fn warn, void *to)
{
        const struct hosts *h = hosts_of(r);
        const char *a = json_str(json_get(json_get(h->here, "build"), "commit"), ""),
                   *b = json_str(json_get(json_get(h->peer, "build"), "commit"), "");

        if (crowded(r, h))
                warn(to, r->o->threads == 1
                             ? "both ends share one core: the figures are those of the scheduler, not of "
                               "the transport"
                             : "there are fewer cores than threads that poll: the figures are those of "
                               "the scheduler, not of the transport");
        warn_governor(h->here, "this host", warn, to);
        if (h->peer && !same_host(h))
                warn_governor(h->peer, "the other host", warn, to);
        if (h->peer && strcmp(a, b))
                warn(to, "the two ends are builds of different commits");
}

static void warn_replicates(const struct perf_row *row, perf_warn_fn warn, void *to)
{
        bool lat = row->test == PERF_LAT;
        double lo = row->replicate[0], hi = lo, rest;

        for (size_t i = 1; i < row->replicates; i++) {
                lo = fmin(lo, row->replicate[i]);
                hi = fmax(hi, row->replicate[i]);
        }
        if (row->replicates < 2)
                return;
        rest = stats_median(row->replicate + 1, row->replicates - 1);
        if (lat ? row->replicate[0] > (1 + UNSTEADY_PART) * rest : row->replicate[0] * (1 + UNSTEADY_PART) < rest)
                warn(to, "the first repeat was slow: caches, frequency or pages were not warm; repeat more, or warm up "
                         "longer");
        if (hi - lo > UNSTEADY_PART * lo)
                warn(to, "the repeats differ by more than 25 %: something else is running on this host");
}

static void warn_samples(const struct perf_row *row, perf_warn_fn warn, void *to)
{
        const struct hist *h = &row->sum.hist;
        char text[160];

        if (row->test != PERF_LAT)
                return;
        if (h->n < FEW_SAMPLES) {
                warn(to, "too few samples for a median");
                return;
        }
        for (int i = 1; i < PERF_QUANTILES; i++)
                if (isnan(hist_percentile(h, perf_quantiles[i].p))) {
                        snprintf(text, sizeof(text), "too few samples for %s and above", perf_quantiles[i].head);
                        warn(to, text);
                        return;
                }
}

static void warn_rates(const struct perf_result *r, const struct perf_row *row, perf_warn_fn warn, void *to)
{
        double link = r->info.attr.link_bits_per_s;

        if (row->test != PERF_LAT && link > 0 && perf_row_gbytes(row) * 8e9 > link * (r->o->bidirectional ? 2 : 1))
                warn(to, "the rate is above the link's: what was measured did not go over the link");
        if (r->o->rate > 0 && !row->raw && row->sum.total_ns && perf_row_rate(row) < RATE_MISSED * r->o->rate)
                warn(to, "the rate that was asked for was not reached: answers came more slowly than requests were "
                         "due");
}

void perf_warnings(const struct perf_result *r, const struct perf_row *row, perf_warn_fn warn, void *to)
{
        warn_hosts(r, warn, to);
        warn_samples(row, warn, to);
        warn_replicates(row, warn, to);
        warn_rates(r, row, warn, to);
        if (r->o->verify && !row->raw)
                warn(to, "filling and checking the data is part of the time");
        if (r->info.attr.emulated)
                warn(to, "the device is emulated: this is not what hardware would do");
}
