/* compare: two kinds of documents read as rows with keys, and the figures in a row. Everything in them is checked here. */
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "compare_inside.h"
#include "err.h"

#define FILE_MAX_BYTES ((size_t)512 << 20)
#define SAMPLES_MAX    ((size_t)1 << 16) /* of one figure: a bootstrap takes thousands of times as long */

const struct compare_metric compare_metrics[] = {
    {.name = "p50",
     .also = "latency",
     .unit = "us",
     .what = "median latency",
     .test = "lat",
     .preset_percent = 5,
     .replicate = {"half_rtt_p50_us", "rtt_p50_us"},
     .group = {"half_rtt_us", "rtt_us"},
     .field = "p50"},
    {.name = "p90",
     .unit = "us",
     .what = "90th percentile of latency",
     .replicate = {"half_rtt_p90_us", "rtt_p90_us"},
     .group = {"half_rtt_us", "rtt_us"},
     .field = "p90"},
    {.name = "p99",
     .unit = "us",
     .what = "99th percentile of latency",
     .replicate = {"half_rtt_p99_us", "rtt_p99_us"},
     .group = {"half_rtt_us", "rtt_us"},
     .field = "p99"},
    {.name = "p999",
     .unit = "us",
     .what = "99.9th percentile of latency",
     .replicate = {"half_rtt_p999_us", "rtt_p999_us"},
     .group = {"half_rtt_us", "rtt_us"},
     .field = "p999"},
    {.name = "p9999",
     .unit = "us",
     .what = "99.99th percentile of latency",
     .replicate = {"half_rtt_p9999_us", "rtt_p9999_us"},
     .group = {"half_rtt_us", "rtt_us"},
     .field = "p9999"},
    {.name = "gbytes_s",
     .also = "bandwidth",
     .unit = "GB/s",
     .what = "bandwidth",
     .higher_better = true,
     .test = "bw",
     .preset_percent = 5,
     .replicate = {"gbytes_s"},
     .field = "gbytes_s"},
    {.name = "messages_s",
     .also = "rate",
     .unit = "messages/s",
     .what = "message rate",
     .higher_better = true,
     .test = "rate",
     .preset_percent = 5,
     .replicate = {"messages_s"},
     .field = "messages_s"},
    {.name = "latency_ms", /* of a sweep: its samples are in runs[] */
     .also = "latency",
     .unit = "ms",
     .what = "median latency of a request",
     .test = "sweep",
     .preset_percent = 5},
    {0},
};

static bool is_sweep_metric(const struct compare_metric *m)
{
        return !m->field;
}

const struct compare_metric *compare_metric_find(const char *name, enum compare_kind kind)
{
        for (const struct compare_metric *m = compare_metrics; m->name; m++) {
                if ((kind == COMPARE_SWEEP) != is_sweep_metric(m))
                        continue;
                if (strcmp(m->name, name) == 0 || (m->also && strcmp(m->also, name) == 0))
                        return m;
        }
        return NULL;
}

const json *compare_at(const json *from, const char *dotted)
{
        char name[64];

        while (from && *dotted) {
                size_t n = strcspn(dotted, ".");

                BUG_ON(n >= sizeof(name));
                memcpy(name, dotted, n);
                name[n] = '\0';
                from = json_is_object(from) ? json_get(from, name) : NULL;
                dotted += n + (dotted[n] == '.');
        }
        return from;
}

void compare_clean(const char *text, char *out, size_t size)
{
        size_t n = 0;

        for (; *text && n + 1 < size; text++)
                out[n++] = (char)(*text >= ' ' && *text <= '~' ? *text : '?');
        out[n] = '\0';
}

/* ---- keys ---- */

struct key_field {
        const char *name, *before, *after;
        double usual; /* a number that needs no mention; NaN: always mentioned */
        bool required;
};

static const struct key_field perf_key[] = {
    {"transport", "", "", NAN, true},
    {"test", "", "", NAN, true},
    {"op", "", "", NAN, true},
    {"size", "", " B", NAN, true},
    {"depth", "depth ", "", NAN, false},
    {"connections", "", " connections", 1, false},
    {"threads", "", " threads", 1, false},
    {"bidirectional", "bidirectional ", "", 0, false},
    {"mem", "memory ", "", NAN, false},
    {"offered_s", "offered ", "/s", NAN, false},
};

static const struct key_field sweep_key[] = {
    {"baseline", "", "", NAN, true},
    {"transport", "", "", NAN, true},
};

/* A scalar as text: false where it is null, or a container, or a number that is none. */
static bool scalar_text(const json *v, char *out, size_t size)
{
        if (json_is_str(v)) {
                compare_clean(json_str(v, ""), out, size);
                return out[0] != '\0';
        }
        if (json_is_bool(v)) {
                snprintf(out, size, "%d", json_bool(v, false));
                return true;
        }
        if (!json_is_num(v) || !isfinite(json_num(v, NAN)))
                return false;
        snprintf(out, size, "%.15g", json_num(v, 0));
        return true;
}

/* Adds to the key what the row says of one field: 0, or -EINVAL where it must say something. */
static int key_add(const json *row, const struct key_field *f, char *key, const char *path)
{
        const json *v = json_get(row, f->name);
        const char *after = f->after;
        char text[64];

        /* Drawn sizes have no single number: the row's own words for them. */
        if (strcmp(f->name, "size") == 0 && json_bool(json_get(row, "size_mixed"), false)) {
                v = json_get(row, "size_spec");
                after = "";
        }
        if (json_is_null(v) && !f->required)
                return 0;
        if (!scalar_text(v, text, sizeof(text)))
                return err_set(-EINVAL, "%s: a row's '%s' is missing or no word, number or truth value", path, f->name);
        if (!json_is_str(v) && (double)json_bool(v, false) + json_num(v, 0) == f->usual)
                return 0;
        size_t len = strlen(key);

        if (json_is_bool(v))
                text[0] = '\0';
        snprintf(key + len, COMPARE_KEY_MAX - len, "%s%s%s%s", len ? " " : "", f->before, text, after);
        return 0;
}

static int key_make(const json *row, const struct key_field *fields, size_t n, char *key, const char *path)
{
        for (size_t i = 0; i < n; i++) {
                int rc = key_add(row, &fields[i], key, path);

                if (rc < 0)
                        return rc;
        }
        size_t len = strlen(key);

        while (len && key[len - 1] == ' ')
                key[--len] = '\0';
        return 0;
}

/* ---- rows ---- */

static int perf_row(const struct compare_doc *doc, struct compare_row *row)
{
        double wrong = json_num(json_get(row->at, "wrong"), 0);
        int rc = key_make(row->at, perf_key, ARRAY_LEN(perf_key), row->key, doc->path);

        row->raw = json_bool(json_get(row->at, "raw"), false);
        if (row->raw && rc == 0) {
                size_t len = strlen(row->key);

                snprintf(row->key + len, sizeof(row->key) - len, " raw");
        }
        if (!(wrong == 0))
                snprintf(row->invalid, sizeof(row->invalid), "%g words of its data were wrong", wrong);
        return rc;
}

static int sweep_row(const struct compare_doc *doc, struct compare_row *row)
{
        const char *verdict = json_str(compare_at(row->at, "validity.verdict"), NULL);
        const char *reason = json_str(compare_at(row->at, "validity.reason"), "no reason is given");
        char clean[COMPARE_TEXT_MAX - 32];
        const char *workload = json_str(compare_at(doc->root, "workload.workload"), NULL);

        if (!verdict || !workload)
                return err_set(-EINVAL, "%s: a result needs 'workload.workload', and each row 'validity.verdict'",
                               doc->path);
        compare_clean(workload, row->key, 80);
        compare_clean(reason, clean, sizeof(clean));
        if (strcmp(verdict, "FEW") == 0)
                row->weak = "FEW";
        else if (strcmp(verdict, "UNSTEADY") == 0)
                row->weak = "UNSTEADY";
        row->skipped = strcmp(verdict, "SKIPPED") == 0;
        if (strcmp(verdict, "INVALID") == 0 || row->skipped)
                snprintf(row->invalid, sizeof(row->invalid), "%s: %s", verdict, clean);
        else if (!row->weak && strcmp(verdict, "VALID") != 0)
                return err_set(-EINVAL, "%s: a row's verdict is none that this program knows", doc->path);
        return key_make(row->at, sweep_key, ARRAY_LEN(sweep_key), row->key, doc->path);
}

static int by_key(const void *a, const void *b)
{
        const struct compare_row *const *x = a, *const *y = b;

        return strcmp((*x)->key, (*y)->key);
}

static int read_rows(struct compare_doc *doc, const json *list)
{
        size_t n = json_count(list), i = 0;

        if (!json_is_array(list) || n == 0 || n > COMPARE_ROWS_MAX)
                return err_set(-EINVAL, "%s: 'results' must be a list of 1 to %d rows", doc->path, COMPARE_ROWS_MAX);
        doc->rows = calloc(n, sizeof(*doc->rows));
        doc->sorted = calloc(n, sizeof(*doc->sorted));
        if (!doc->rows || !doc->sorted)
                return err_set(-ENOMEM, "%s: no memory for %zu rows", doc->path, n);
        for (const json *at = json_first(list); at; at = json_next(at), i++) {
                doc->rows[i].at = at;
                doc->sorted[i] = &doc->rows[i];
                if (!json_is_object(at))
                        return err_set(-EINVAL, "%s: a row is no object", doc->path);
                int rc = doc->kind == COMPARE_PERF ? perf_row(doc, &doc->rows[i]) : sweep_row(doc, &doc->rows[i]);

                if (rc < 0)
                        return rc;
        }
        doc->count = n;
        qsort(doc->sorted, n, sizeof(*doc->sorted), by_key);
        for (i = 1; i < n; i++)
                if (strcmp(doc->sorted[i - 1]->key, doc->sorted[i]->key) == 0)
                        return err_set(-EINVAL, "%s: two rows measure the same: %s", doc->path, doc->sorted[i]->key);
        return 0;
}

int compare_doc_take(json *root, const char *path, struct compare_doc *out)
{
        const char *schema = json_is_object(root) ? json_str(json_get(root, "schema"), "") : "";

        *out = (struct compare_doc){.root = root, .path = path};
        if (strcmp(schema, "djinnbench.perf/1") == 0) {
                out->kind = COMPARE_PERF;
                return read_rows(out, json_get(root, "results"));
        }
        if (strcmp(schema, "djinnbench.result/1") == 0) {
                out->kind = COMPARE_SWEEP;
                return read_rows(out, compare_at(root, "workload.results"));
        }
        return err_set(
            -EINVAL,
            "%s: its 'schema' is neither djinnbench.perf/1 nor djinnbench.result/1: expected what perf --json "
            "or sweep wrote",
            path);
}

int compare_doc_load(const char *path, struct compare_doc *out)
{
        *out = (struct compare_doc){.path = path};
        json *root = json_load(path, FILE_MAX_BYTES);

        return root ? compare_doc_take(root, path, out) : -EINVAL;
}

void compare_doc_free(struct compare_doc *doc)
{
        free(doc->rows);
        free(doc->sorted);
        json_free(doc->root);
        *doc = (struct compare_doc){0};
}

const struct compare_row *compare_doc_find(const struct compare_doc *doc, const char *key)
{
        size_t lo = 0, hi = doc->count;

        while (lo < hi) {
                size_t mid = lo + (hi - lo) / 2;
                int order = strcmp(key, doc->sorted[mid]->key);

                if (order == 0)
                        return doc->sorted[mid];
                if (order < 0)
                        hi = mid;
                else
                        lo = mid + 1;
        }
        return NULL;
}

/* ---- figures ---- */

/* A latency or a rate: NaN where it is absent. */
static int figure(const json *v, const struct compare_doc *doc, const struct compare_row *row, double *out)
{
        *out = NAN;
        if (json_is_null(v))
                return 0;
        *out = json_num(v, NAN);
        if (isfinite(*out) && *out > 0)
                return 0;
        return err_set(-EINVAL, "%s: %s: expected a positive number among its figures", doc->path, row->key);
}

/* The figure of one repeat or run; *launch is its own number for perf, which restarts both ends. */
static int sample(const struct compare_doc *doc, const struct compare_row *row, const struct compare_metric *m,
                  const json *at, size_t index, double *v, uint32_t *launch)
{
        int64_t number = 0;

        if (!json_is_object(at))
                return err_set(-EINVAL, "%s: %s: one of its repeats is no object", doc->path, row->key);
        if (doc->kind == COMPARE_SWEEP) {
                if (json_int(at, "launch", 0, UINT32_MAX, &number) == -EINVAL)
                        return err_trail(-EINVAL, "in %s: %s", doc->path, row->key);
                *launch = (uint32_t)number;
                return figure(json_get(at, m->name), doc, row, v);
        }
        const json *f = json_get(at, m->replicate[0]);

        *launch = (uint32_t)index;
        return figure(json_is_null(f) && m->replicate[1] ? json_get(at, m->replicate[1]) : f, doc, row, v);
}

static int samples(const struct compare_doc *doc, const struct compare_row *row, const struct compare_metric *m,
                   const json *list, struct compare_series *s)
{
        size_t n = json_count(list), i = 0, found = 0;

        if (n > SAMPLES_MAX)
                return err_set(-EINVAL, "%s: %s: more than %zu repeats", doc->path, row->key, SAMPLES_MAX);
        s->v = calloc(n ? n : 1, sizeof(*s->v));
        s->launch = calloc(n ? n : 1, sizeof(*s->launch));
        if (!s->v || !s->launch)
                return err_set(-ENOMEM, "%s: no memory for %zu figures", doc->path, n);
        for (const json *at = json_first(list); at; at = json_next(at), i++) {
                int rc = sample(doc, row, m, at, i, &s->v[i], &s->launch[i]);

                if (rc < 0)
                        return rc;
                found += isnan(s->v[i]) ? 0 : 1;
        }
        /* Some with and some without the figure: what is missing could be what was bad, so none is used. */
        s->n = found == n ? n : 0;
        return 0;
}

static const json *whole_figure(const json *row, const struct compare_metric *m)
{
        if (!m->field)
                return NULL;
        if (!m->group[0])
                return json_get(row, m->field);
        for (size_t i = 0; i < ARRAY_LEN(m->group); i++)
                if (json_is_object(json_get(row, m->group[i])))
                        return json_get(json_get(row, m->group[i]), m->field);
        return NULL;
}

int compare_series_of(const struct compare_doc *doc, const struct compare_row *row, const struct compare_metric *metric,
                      struct compare_series *out)
{
        bool sweep = doc->kind == COMPARE_SWEEP;
        const json *list = json_get(row->at, sweep ? "runs" : "replicates");

        *out = (struct compare_series){.value = NAN};
        if (sweep != is_sweep_metric(metric) || row->skipped)
                return 0;
        if (!json_is_null(list) && !json_is_array(list))
                return err_set(-EINVAL, "%s: %s: its repeats are no list", doc->path, row->key);
        int rc = samples(doc, row, metric, list, out);

        if (rc == 0 && out->n)
                out->value = stats_median(out->v, out->n);
        else if (rc == 0)
                rc = figure(whole_figure(row->at, metric), doc, row, &out->value);
        return rc;
}

void compare_series_free(struct compare_series *s)
{
        free(s->v);
        free(s->launch);
        *s = (struct compare_series){.value = NAN};
}
