/* perf: what was measured, as a table for people. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "check.h"
#include "clock.h"
#include "perf_inside.h"
#include "stats.h"

const struct perf_quantile perf_quantiles[PERF_QUANTILES] = {
    {"p50", "p50", 50}, {"p90", "p90", 90}, {"p99", "p99", 99}, {"p999", "p99.9", 99.9}, {"p9999", "p99.99", 99.99}};

double perf_part(const struct perf_opts *o, enum perf_op op)
{
        return op == PERF_READ || o->rate > 0 ? 1 : 0.5;
}

double perf_row_rate(const struct perf_row *row)
{
        return row->sum.total_ns ? (double)row->sum.iterations * 1e9 / (double)row->sum.total_ns : NAN;
}

double perf_row_gbytes(const struct perf_row *row)
{
        return row->sum.total_ns ? (double)row->sum.bytes / (double)row->sum.total_ns : NAN;
}

/* ---- the head ---- */

static void print_cores(const struct perf_info *info)
{
        json *peer = json_parse(info->peer_text, strlen(info->peer_text), "manifest of the other end");
        const json *list = json_get(peer, "cores");

        if (info->n_cores)
                printf("; cores");
        for (int i = 0; i < info->n_cores; i++)
                printf("%s%d", i ? "," : " ", info->cores[i]);
        if (json_count(list))
                printf("; peer's cores");
        for (const json *v = json_first(list); v; v = json_next(v))
                printf("%s%.0f", v == json_first(list) ? " " : ",", json_num(v, -1));
        json_free(peer);
}

/* With --forever the lines before the last one are seconds. */
static const char *first_head(const struct perf_opts *o)
{
        return o->forever ? "time/size" : "size";
}

static void print_latency_head(const struct perf_opts *o, enum perf_op op)
{
        const char *what = o->rate > 0       ? "round trip from the intended start, us"
                           : op == PERF_READ ? "round trip, us"
                                             : "half round trip, us";

        printf("%s\n%9s %-9s %9s %9s", what, first_head(o), "op", "samples", "min");
        for (int i = 0; i < PERF_QUANTILES; i++)
                printf(" %9s", perf_quantiles[i].head);
        printf(" %9s\n", "max");
}

void perf_print_head(const struct perf_opts *o, const struct perf_info *info, enum perf_op op)
{
        printf("%s over %s to %s\nmemory: %s", perf_test_names[o->test], info->transport, info->peer, info->path);
        print_cores(info);
        if (info->attr.device[0] || info->attr.netdev[0])
                printf("; device %s%s%s", info->attr.device, info->attr.device[0] && info->attr.netdev[0] ? " " : "",
                       info->attr.netdev);
        if (info->attr.emulated)
                printf("; EMULATED");
        if (o->connections > 1 || o->threads > 1)
                printf("; %lld connections, %lld threads", (long long)o->connections, (long long)o->threads);
        printf("\n");
        if (o->rate > 0)
                printf("open loop: %g per second, %s arrivals\n", o->rate, perf_arrival_names[o->arrivals]);
        if (o->test == PERF_LAT) {
                print_latency_head(o, op);
        } else {
                printf("confirmed by the receiver%s\n", o->bidirectional ? "; both directions together" : "");
                printf("%9s %-9s %6s %9s %9s %9s %12s %9s %10s\n", first_head(o), "op", "depth", "transfers", "GB/s",
                       "Gbit/s", "messages/s", "spread %", "footprint");
        }
        fflush(stdout);
}

/* ---- rows ---- */

static const char *bytes_text(uint64_t bytes, char *buf, size_t len)
{
        static const char *const unit[] = {"", "K", "M", "G"};
        unsigned u = 0;

        while (u < 3 && bytes >= 1024 && bytes % 1024 == 0) {
                bytes /= 1024;
                u++;
        }
        snprintf(buf, len, "%llu%s", (unsigned long long)bytes, unit[u]);
        return buf;
}

static void print_us(double ns)
{
        if (isnan(ns))
                printf(" %9s", "-");
        else
                printf(" %9.*f", ns < 1e5 ? 3 : ns < 1e6 ? 1 : 0, ns / 1e3);
}

static void print_lat(const struct hist *h, double part)
{
        printf(" %9llu", (unsigned long long)h->n);
        print_us(h->n ? (double)h->min * part : NAN);
        for (int i = 0; i < PERF_QUANTILES; i++)
                print_us(hist_percentile(h, perf_quantiles[i].p) * part);
        print_us(h->n ? (double)h->max * part : NAN);
}

static void print_bw(const struct perf_row *row, const struct perf_opts *o)
{
        struct summary s = stats_summary(row->replicate, row->replicates);
        uint64_t bytes = perf_stride(row->size->hi) * row->slots * (uint64_t)o->connections;
        char text[32];

        printf(" %6u %9llu %9.3f %9.2f %12.0f", row->window, (unsigned long long)row->sum.iterations,
               perf_row_gbytes(row), perf_row_gbytes(row) * 8, perf_row_rate(row));
        if (row->replicates > 1)
                printf(" %9.1f", 100 * (s.max - s.min) / s.median);
        else
                printf(" %9s", "-");
        printf(" %10s", bytes_text(bytes, text, sizeof(text)));
}

static void print_extra(const struct perf_result *r, const struct perf_row *row)
{
        const struct perf_one_way *w = &row->one_way;

        if (r->o->rate > 0 && !row->raw) {
                printf("%9s %-9s", "", "not corr.");
                print_lat(&row->sum.uncorrected, 1);
                printf("\n");
        }
        if (w->known) {
                printf("%9s %-9s %9llu", "", "one way", (unsigned long long)w->n);
                print_us(w->min_ns);
                print_us(w->p50_ns);
                if (w->same_clock)
                        printf("   both ends read one clock\n");
                else
                        printf("   clock error at most %.3f us\n", w->error_ns / 1e3);
        }
}

void perf_print_row(const struct perf_result *r, const struct perf_row *row)
{
        const struct perf_measure *m = &row->sum;

        printf("%9s %-9s", row->size->text, row->raw ? "raw" : perf_op_names[row->op]);
        if (row->test == PERF_LAT)
                print_lat(&m->hist, perf_part(r->o, row->op));
        else
                print_bw(row, r->o);
        printf("\n");
        if (r->o->verify && !row->raw) {
                uint64_t all = m->bytes * (row->test == PERF_LAT && row->op != PERF_READ ? 2 : 1);

                printf("%9s %-9s %llu %s, %.4g %% of the bytes checked\n", "", "verified", (unsigned long long)m->wrong,
                       m->wrong ? "WRONG" : "wrong", all ? 100.0 * (double)m->checked / (double)all : 0);
        }
        print_extra(r, row);
        fflush(stdout);
}

void perf_print_second(const struct perf_opts *o, const struct perf_case *k, uint64_t second,
                       const struct perf_measure *m)
{
        struct perf_row row = {.sum.iterations = m->iterations, .sum.bytes = m->bytes, .sum.total_ns = m->total_ns};

        printf("%8llus %-9s", (unsigned long long)second, perf_op_names[k->op]);
        if (o->test == PERF_LAT)
                print_lat(&m->hist, perf_part(o, k->op));
        else
                printf(" %6u %9llu %9.3f %9.2f %12.0f", k->window, (unsigned long long)m->iterations,
                       perf_row_gbytes(&row), perf_row_gbytes(&row) * 8, perf_row_rate(&row));
        printf("\n");
        fflush(stdout);
}

/* ---- the end ---- */

/* What the transport costs beyond the medium: the row behind each is the same size by raw means. */
static void print_ratios(const struct perf_result *r)
{
        for (size_t i = 0; i + 1 < r->n_rows; i++) {
                const struct perf_row *a = r->rows[i], *b = r->rows[i + 1];
                struct perf_versus v;

                if (a->raw || !b->raw || a->size != b->size || !perf_versus(r->o, a, b, &v))
                        continue;
                printf("%9s %s / raw: %.3f", a->size->text, r->info.transport, v.ratio.value);
                if (v.ratio.ci95.known)
                        printf(" [%.3f, %.3f]", v.ratio.ci95.lo, v.ratio.ci95.hi);
                printf(" (%s); %s - raw: %.1f ns", a->test == PERF_LAT ? "of the medians" : "of the rates",
                       r->info.transport, v.diff_ns.value);
                if (v.diff_ns.ci95.known)
                        printf(" [%.1f, %.1f]", v.diff_ns.ci95.lo, v.diff_ns.ci95.hi);
                printf("%s\n", a->test == PERF_LAT ? "" : " per message");
        }
}

/* Latencies as they are shown; rates, and for the difference the time per message. */
bool perf_versus(const struct perf_opts *o, const struct perf_row *a, const struct perf_row *b, struct perf_versus *out)
{
        static double ours[PERF_REPEATS_MAX], raw[PERF_REPEATS_MAX], ours_ns[PERF_REPEATS_MAX],
            raw_ns[PERF_REPEATS_MAX];
        static uint32_t launch[PERF_REPEATS_MAX];
        size_t n = a->replicates < b->replicates ? a->replicates : b->replicates;
        double part = perf_part(o, a->op);

        for (size_t i = 0; i < n; i++) {
                bool lat = a->test == PERF_LAT;

                launch[i] = (uint32_t)i;
                ours[i] = a->replicate[i];
                raw[i] = b->replicate[i];
                ours_ns[i] = lat ? ours[i] * part : 1e9 / ours[i];
                raw_ns[i] = lat ? raw[i] * part : 1e9 / raw[i];
        }
        if (!n)
                return false;
        out->ratio = stats_ratio(ours, raw, launch, n, 2000, 1);
        out->diff_ns = stats_diff(ours_ns, raw_ns, launch, n, 2000, 1);
        return true;
}

/* The same reason is often given for several rows: it is printed once, with their names unless it is all of them. */
struct reasons {
        struct {
                char text[160], rows[160];
                size_t n, cut; /* rows; those of them that found no room in `rows` */
        } of[32];
        size_t n;
        const struct perf_row *row; /* the one that is asked for its reasons now */
};

static void keep_reason(void *to, const char *text)
{
        struct reasons *s = to;
        size_t i = 0, len;

        while (i < s->n && strcmp(s->of[i].text, text) != 0)
                i++;
        if (i == ARRAY_LEN(s->of))
                return;
        if (i == s->n)
                snprintf(s->of[s->n++].text, sizeof(s->of[0].text), "%s", text);
        len = strlen(s->of[i].rows);
        if (snprintf(s->of[i].rows + len, sizeof(s->of[0].rows) - len, "%s%s %s", s->of[i].n++ ? ", " : "",
                     s->row->size->text,
                     s->row->raw ? "raw" : perf_op_names[s->row->op]) >= (int)(sizeof(s->of[0].rows) - len)) {
                s->of[i].rows[len] = '\0';
                s->of[i].cut++;
        }
}

static void print_reasons(const struct perf_result *r)
{
        struct reasons s = {0};

        for (size_t i = 0; i < r->n_rows; i++) {
                s.row = r->rows[i];
                perf_warnings(r, s.row, keep_reason, &s);
        }
        for (size_t i = 0; i < s.n; i++) {
                fprintf(stderr, "djinnbench perf: warning: ");
                if (s.of[i].n < r->n_rows) {
                        fprintf(stderr, "%s", s.of[i].rows);
                        if (s.of[i].cut)
                                fprintf(stderr, " and %zu more", s.of[i].cut);
                        fprintf(stderr, ": ");
                }
                fprintf(stderr, "%s\n", s.of[i].text);
        }
}

static void print_binary(uint64_t bytes)
{
        static const char *const unit[] = {"bytes", "KiB", "MiB", "GiB"};
        double value = (double)bytes;
        unsigned u = 0;

        while (u < 3 && value >= 1024) {
                value /= 1024;
                u++;
        }
        printf("%.4g %s", value, unit[u]);
}

/* Each row opens its own. */
static void print_memory(const struct perf_result *r)
{
        uint64_t least = UINT64_MAX, most = 0;

        for (size_t i = 0; i < r->n_rows; i++) {
                uint64_t bytes = r->rows[i]->region_bytes;

                least = bytes < least ? bytes : least;
                most = bytes > most ? bytes : most;
        }
        printf("memory of each end: ");
        print_binary(least);
        if (most > least) {
                printf(" to ");
                print_binary(most);
                printf(", by size");
        }
        printf("\n");
}

void perf_print_end(const struct perf_result *r)
{
        print_ratios(r);
        if (r->n_rows)
                print_memory(r);
        if (r->o->test == PERF_LAT && r->n_rows)
                printf("percentiles from a log-linear histogram, relative error at most %.2g %%\n",
                       100 * HIST_REL_ERROR);
        fflush(stdout);
        print_reasons(r);
}
