/* perf: what was measured, as a table for people and as JSON for programs (SPEC: djinnbench.perf/1). */
#include <math.h>
#include <string.h>

#include "clock.h"
#include "manifest.h"
#include "perf_inside.h"
#include "stats.h"

#define FEW_SAMPLES   20
#define UNSTEADY_PART 0.25

struct quantile {
        const char *key, *head;
        double p;
};

static const struct quantile quantiles[] = {
    {"p50", "p50", 50}, {"p90", "p90", 90}, {"p99", "p99", 99}, {"p999", "p99.9", 99.9}, {"p9999", "p99.99", 99.99},
};

static double us(double ns)
{
        return ns / 1e3;
}

static double row_rate(const struct perf_row *row)
{
        return row->total_ns ? (double)row->iterations * 1e9 / (double)row->total_ns : NAN;
}

static double row_gbytes(const struct perf_row *row)
{
        return row->total_ns ? (double)row->bytes / (double)row->total_ns : NAN;
}

static const char *row_name(const struct perf_row *row)
{
        return row->raw ? "raw" : perf_op_names[row->op];
}

/* ---- warnings ---- */

typedef void (*warn_fn)(void *to, const char *text);

static bool unsteady(const struct perf_row *row)
{
        double lo = row->replicate[0], hi = lo;

        for (size_t i = 1; i < row->replicates; i++) {
                lo = fmin(lo, row->replicate[i]);
                hi = fmax(hi, row->replicate[i]);
        }
        return row->replicates > 1 && hi - lo > UNSTEADY_PART * lo;
}

static void warnings(const struct perf_result *r, const struct perf_row *row, warn_fn warn, void *to)
{
        if (r->o->one_core)
                warn(to, "both ends share one core: the figures are those of the scheduler, not of the transport");
        if (row->test == PERF_LAT && row->hist.n < FEW_SAMPLES)
                warn(to, "too few samples for a median");
        if (unsteady(row))
                warn(to, "the repeats differ by more than 25 %: something else is running on this host");
        if (r->o->verify && !row->raw)
                warn(to, "filling and checking the data is part of the time");
        if (row->op == PERF_READ && row->test == PERF_LAT)
                warn(to, "a read is timed whole, not halved");
        if (r->attr.emulated)
                warn(to, "the device is emulated: this is not what hardware would do");
}

/* ---- table ---- */

static void print_size(uint64_t size)
{
        static const char *const unit[] = {"", "K", "M", "G"};
        unsigned u = 0;
        char text[32];

        while (u < 3 && size >= 1024 && size % 1024 == 0) {
                size /= 1024;
                u++;
        }
        snprintf(text, sizeof(text), "%llu%s", (unsigned long long)size, unit[u]);
        printf("%8s", text);
}

static void print_us(double ns)
{
        if (isnan(ns))
                printf(" %9s", "-");
        else
                printf(" %9.*f", ns < 1e5 ? 2 : ns < 1e6 ? 1 : 0, us(ns));
}

void perf_print_head(const struct perf_result *r)
{
        const struct perf_opts *o = r->o;

        printf("%s over %s to %s, memory: %s", perf_test_names[o->test], r->transport, r->peer, r->path);
        if (o->cpu_driver >= 0)
                printf(", cores %d and %d", o->cpu_driver, o->cpu_peer);
        if (o->test == PERF_LAT) {
                printf("\nhalf round trip, us\n%8s %-9s %9s %9s", "size", "op", "samples", "min");
                for (size_t i = 0; i < ARRAY_LEN(quantiles) - 1; i++)
                        printf(" %9s", quantiles[i].head);
                printf(" %9s\n", "max");
        } else {
                printf("; confirmed by the receiver\n%8s %-9s %6s %9s %9s %9s %12s %9s\n", "size", "op", "depth",
                       "transfers", "GB/s", "Gbit/s", "messages/s", "spread %");
        }
        fflush(stdout);
}

static void print_lat(const struct perf_row *row)
{
        const struct hist *h = &row->hist;

        printf(" %-9s %9llu", row_name(row), (unsigned long long)h->n);
        print_us(h->n ? (double)h->min : NAN);
        for (size_t i = 0; i < ARRAY_LEN(quantiles) - 1; i++)
                print_us(hist_percentile(h, quantiles[i].p));
        print_us(h->n ? (double)h->max : NAN);
}

static void print_bw(const struct perf_row *row)
{
        struct summary s = stats_summary(row->replicate, row->replicates);

        printf(" %-9s %6u %9llu %9.3f %9.2f %12.0f %9.1f", row_name(row), row->window,
               (unsigned long long)row->iterations, row_gbytes(row), row_gbytes(row) * 8, row_rate(row),
               100 * (s.max - s.min) / s.median);
}

void perf_print_row(const struct perf_result *r, const struct perf_row *row)
{
        print_size(row->size);
        if (row->test == PERF_LAT)
                print_lat(row);
        else
                print_bw(row);
        if (row->wrong)
                printf("  %llu WRONG", (unsigned long long)row->wrong);
        printf("\n");
        fflush(stdout);
}

static double row_middle(const struct perf_row *row)
{
        return row->test == PERF_LAT ? hist_percentile(&row->hist, 50) : row_rate(row);
}

/* What the transport costs beyond the medium: the row behind each is the same size by raw means. */
static void print_ratios(const struct perf_result *r)
{
        for (size_t i = 0; i + 1 < r->n_rows; i++) {
                const struct perf_row *a = r->rows[i], *b = r->rows[i + 1];

                if (a->raw || !b->raw || a->size != b->size)
                        continue;
                print_size(a->size);
                printf(" %s / raw: %.3f (%s)\n", r->transport, row_middle(a) / row_middle(b),
                       a->test == PERF_LAT ? "of the medians" : "of the rates");
        }
}

struct seen {
        const char *text[16];
        size_t n;
};

static void warn_once(void *to, const char *text)
{
        struct seen *s = to;

        for (size_t i = 0; i < s->n; i++)
                if (s->text[i] == text)
                        return;
        if (s->n < ARRAY_LEN(s->text))
                s->text[s->n++] = text;
        fprintf(stderr, "djinnbench perf: warning: %s\n", text);
}

void perf_print_end(const struct perf_result *r)
{
        struct seen seen = {.n = 0};

        print_ratios(r);
        fflush(stdout);
        for (size_t i = 0; i < r->n_rows; i++)
                warnings(r, r->rows[i], warn_once, &seen);
}

/* ---- JSON ---- */

static json *histogram_json(const struct hist *h)
{
        json *list = json_array();

        for (unsigned i = 0; i < HIST_BUCKETS; i++) {
                uint64_t low = i;
                json *pair;

                if (!h->bucket[i])
                        continue;
                if (i >= HIST_SUB)
                        low = (uint64_t)(HIST_SUB + i % HIST_SUB) << (i / HIST_SUB - 1);
                pair = json_array();
                json_push(pair, json_of_int((int64_t)low));
                json_push(pair, json_of_int((int64_t)h->bucket[i]));
                json_push(list, pair);
        }
        return list;
}

static json *interval_json(struct interval ci, double scale)
{
        json *list;

        if (!ci.known)
                return json_of_null();
        list = json_array();
        json_push(list, json_of_num(ci.lo * scale));
        json_push(list, json_of_num(ci.hi * scale));
        return list;
}

static json *latency_json(const struct perf_row *row)
{
        const struct hist *h = &row->hist;
        json *j;

        if (row->test != PERF_LAT)
                return json_of_null();
        j = json_object();
        json_set_num(j, "min", h->n ? us((double)h->min) : NAN);
        for (size_t i = 0; i < ARRAY_LEN(quantiles); i++)
                json_set_num(j, quantiles[i].key, us(hist_percentile(h, quantiles[i].p)));
        json_set_num(j, "max", h->n ? us((double)h->max) : NAN);
        json_set_int(j, "n", (int64_t)h->n);
        json_set(j, "ci95", interval_json(stats_median_ci95(row->replicate, row->replicates), 1e-3));
        return j;
}

static json *replicates_json(const struct perf_row *row)
{
        const char *key = row->test == PERF_LAT ? "half_rtt_p50_us" : "messages_s";
        json *list = json_array();

        for (size_t i = 0; i < row->replicates; i++) {
                json *one = json_object();

                json_set_num(one, key, row->test == PERF_LAT ? us(row->replicate[i]) : row->replicate[i]);
                if (row->test != PERF_LAT)
                        json_set_num(one, "gbytes_s", row->replicate[i] * (double)row->size / 1e9);
                json_push(list, one);
        }
        return list;
}

static json *cpu_json(const struct perf_row *row)
{
        double gb = (double)row->bytes * (row->test == PERF_LAT && row->op != PERF_READ ? 2 : 1) / 1e9;
        json *j = json_object();

        json_set_num(j, "local", gb > 0 && !row->raw ? (double)row->cpu_local_ns / 1e9 / gb : NAN);
        json_set_num(j, "peer", gb > 0 && !row->raw ? (double)row->cpu_peer_ns / 1e9 / gb : NAN);
        return j;
}

static void warn_push(void *to, const char *text)
{
        json_push(to, json_of_str(text));
}

static json *row_json(const struct perf_result *r, const struct perf_row *row)
{
        bool lat = row->test == PERF_LAT;
        json *j = json_object(), *list = json_array();

        json_set_str(j, "transport", r->transport);
        json_set_str(j, "path", row->raw ? "raw" : r->path);
        json_set_bool(j, "raw", row->raw);
        json_set_bool(j, "emulated", r->attr.emulated);
        json_set_str(j, "op", perf_op_names[row->op]);
        json_set_str(j, "test", perf_test_names[row->test]);
        json_set_int(j, "size", (int64_t)row->size);
        json_set_int(j, "depth", row->window);
        json_set_int(j, "connections", 1);
        json_set_int(j, "iterations", (int64_t)row->iterations);
        json_set(j, "half_rtt_us", latency_json(row));
        json_set_num(j, "gbytes_s", lat ? NAN : row_gbytes(row));
        json_set_num(j, "gbits_s", lat ? NAN : row_gbytes(row) * 8);
        json_set_num(j, "messages_s", lat ? NAN : row_rate(row));
        json_set_null(j, "link_gbits_s");
        if (r->o->verify && !row->raw)
                json_set_int(j, "wrong", (int64_t)row->wrong);
        else
                json_set_null(j, "wrong");
        json_set_int(j, "bytes_copied", (int64_t)row->bytes_copied);
        json_set(j, "cpu_s_per_gb", cpu_json(row));
        json_set(j, "replicates", replicates_json(row));
        json_set(j, "histogram", lat ? histogram_json(&row->hist) : json_of_null());
        warnings(r, row, warn_push, list);
        json_set(j, "warnings", list);
        return j;
}

static json *config_json(const struct perf_result *r)
{
        const struct perf_opts *o = r->o;
        json *j = json_object(), *sizes = json_array(), *cores = json_array();

        json_set_str(j, "test", perf_test_names[o->test]);
        json_set_str(j, "op", perf_op_names[o->op]);
        for (size_t i = 0; i < o->n_sizes; i++)
                json_push(sizes, json_of_int((int64_t)o->sizes[i]));
        json_set(j, "sizes", sizes);
        json_set_int(j, "depth", o->depth);
        json_set_num(j, "duration_s", (double)o->duration_ns / 1e9);
        json_set_int(j, "iters", o->iters);
        json_set_int(j, "repeats", o->repeats);
        json_set_bool(j, "verify", o->verify);
        json_set_str(j, "peer", r->peer);
        json_set_int(j, "driver_copies", r->attr.driver_copies);
        json_push(cores, o->cpu_driver < 0 ? json_of_null() : json_of_int(o->cpu_driver));
        json_push(cores, o->cpu_peer < 0 ? json_of_null() : json_of_int(o->cpu_peer));
        json_set(j, "cores", cores);
        return j;
}

json *perf_json(const struct perf_result *r)
{
        json *root = json_object(), *manifest = manifest_host(), *results = json_array();

        json_set_str(root, "schema", "djinnbench.perf/1");
        json_set(manifest, "perf", config_json(r));
        json_set(root, "manifest", manifest);
        for (size_t i = 0; i < r->n_rows; i++)
                json_push(results, row_json(r, r->rows[i]));
        json_set(root, "results", results);
        json_set_bool(root, "interrupted", perf_stopped); /* fewer repeats, or fewer rows, than the options say */
        return root;
}
