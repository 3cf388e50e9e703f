/* What stands under a table: how to read it, what it found, when not to believe it, and what it was made from. */
#include "report_inside.h"

#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>

#include "check.h"

#define LAUNCHES_MIN        5 /* with fewer an interval knows nothing of how launches differ */
#define AUTOCORRELATION_MAX 0.3
#define INTERVAL_RATIO_MAX  3
#define SUM_TOLERANCE       1e-6

struct sink {
        report_put *put;
        void *ctx;
};

static void say(const struct sink *to, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

static void say(const struct sink *to, const char *fmt, ...)
{
        char line[2 * REPORT_TEXT_MAX];
        va_list ap;

        va_start(ap, fmt);
        vsnprintf(line, sizeof(line), fmt, ap);
        va_end(ap);
        to->put(to->ctx, line);
}

static const char *text_at(const json *from, const char *path, const char *otherwise)
{
        return json_str(report_at(from, path), otherwise);
}

static const char *workload_of(const struct report_view *view, const struct report_source *source,
                               char out[REPORT_TEXT_MAX])
{
        size_t i = 0;

        while (i < view->nrows && view->rows[i].source != source)
                i++;
        report_workload(source->doc, i < view->nrows && view->rows[i].ambiguous, out);
        return out;
}

/* "gpt2_micro full_djinn tcp" */
static const char *label(const struct report_row *row, char out[REPORT_TEXT_MAX])
{
        char name[REPORT_TEXT_MAX];

        report_workload(row->doc, row->ambiguous, name);
        snprintf(out, REPORT_TEXT_MAX, "%.160s %.64s %.16s", name, text_at(row->row, "baseline", "?"),
                 text_at(row->row, "transport", "?"));
        return out;
}

static bool verdict_is(const struct report_row *row, const char *verdict)
{
        return strcmp(text_at(row->row, "validity.verdict", ""), verdict) == 0;
}

/* ---- how to read it ---- */

static void legend(const struct sink *to, const struct report_view *view)
{
        if (view->table == REPORT_TABLE_SAMPLE) {
                say(to,
                    "Latency, throughput and data are medians; intervals are in --table 1, the experiment's means in "
                    "--format csv. Data is payload in both directions, in MB of 2^20 bytes.");
                return;
        }
        say(to, "Δ = latency - native = network (transport on shm and loop) + extra execution + framework, block by "
                "block; the columns are medians over blocks, so they add up only nearly. Native runs in the server.");
        say(to, "[lo, hi] is a 95 %% interval. n.d. ≤ X: not distinguishable from 0, at most X.");
        if (view->table == REPORT_TABLE_1)
                say(to, "Bytes are payload per request. Overhead is Δ over native; beside it stands the share of its "
                        "roofline that native reaches, because a slow native flatters every ratio.");
        else
                say(to, "Leaves are means over the interquartile set of requests; with both residuals they add up to "
                        "the sum. MB are 2^20 bytes. Lines that no row has a value for are left out; --format csv has "
                        "all.");
}

static void launches(const struct sink *to, const struct report_view *view)
{
        bool few = false, closed = false;

        for (size_t i = 0; i < view->nsources; i++) {
                const json *manifest = json_get(view->sources[i].doc, "manifest");

                few |= json_num(json_get(manifest, "launches"), LAUNCHES_MIN) < LAUNCHES_MIN;
                closed |= strcmp(text_at(manifest, "arrivals", ""), "closed") == 0;
        }
        if (few)
                say(to, "Intervals are within launch: they say nothing of how one start of the programs differs from "
                        "the next.");
        if (closed)
                say(to, "Closed loop: the next request waits for the last, so latency is service time.");
}

/* ---- what it found ---- */

static bool is_named(const struct report_row *row, const char *role)
{
        return strcmp(text_at(row->row, "baseline", ""), text_at(json_get(row->doc, "experiment"), role, "")) == 0;
}

/* "; 1.16 [1.09, 1.52] (shm), 1.32 (tcp) times as fast as blind_opaque", of all the target's rows. */
static void speedup(const struct report_view *view, const struct report_source *source, const char *over,
                    char out[REPORT_TEXT_MAX])
{
        size_t len = strlen(out), before = len;
        char key[96];

        snprintf(key, sizeof(key), "speedup_vs_%.64s", over);
        for (size_t i = 0; i < view->nrows && len < REPORT_TEXT_MAX / 2; i++) {
                const struct report_row *row = &view->rows[i];
                const json *v = report_at(json_get(row->row, "derived"), key);
                const json *lo = json_get(json_get(json_get(row->row, "ci"), key), "lo");
                const json *hi = json_get(json_get(json_get(row->row, "ci"), key), "hi");
                char range[64] = "";

                if (row->source != source || !is_named(row, "target_baseline") || !verdict_is(row, "VALID") ||
                    !json_is_num(v) || strcmp(over, text_at(row->row, "baseline", "")) == 0)
                        continue;
                if (json_is_num(lo) && json_is_num(hi))
                        snprintf(range, sizeof(range), " [%.3g, %.3g]", json_num(lo, 0), json_num(hi, 0));
                len += (size_t)snprintf(out + len, REPORT_TEXT_MAX - len, "%s%.3g%s (%.16s)",
                                        len > before ? ", "
                                        : before     ? "; "
                                                     : "",
                                        json_num(v, 0), range, text_at(row->row, "transport", "?"));
        }
        if (len > before)
                snprintf(out + len, REPORT_TEXT_MAX - len, " times as fast as %.64s", over);
}

/* Over blind_opaque first: the strongest execution that knows nothing of the model. */
static void headline(const struct sink *to, const struct report_view *view, const struct report_source *source)
{
        const char *blind = text_at(source->doc, "experiment.blind_baseline", "");
        char text[REPORT_TEXT_MAX] = "", name[REPORT_TEXT_MAX];

        speedup(view, source, "blind_opaque", text);
        if (strcmp(blind, "blind_opaque") != 0 && blind[0])
                speedup(view, source, blind, text);
        if (text[0])
                say(to, "%s: %.64s is %s.", workload_of(view, source, name),
                    text_at(source->doc, "experiment.target_baseline", "?"), text);
}

static void noise_floor(const struct sink *to, const struct report_row *row)
{
        static const struct report_column us = {.kind = REPORT_ESTIMATE, .decimals = 1, .about_zero = true};
        const json *delta = report_at(row->row, "aa.delta_us"), *ci = json_get(delta, "ci95");
        char name[REPORT_TEXT_MAX], text[REPORT_TEXT_MAX];
        struct report_cell cell = {.value = json_num(json_get(delta, "value"), 0),
                                   .interval = json_is_num(json_get(ci, "lo")) && json_is_num(json_get(ci, "hi")),
                                   .lo = json_num(json_get(ci, "lo"), 0),
                                   .hi = json_num(json_get(ci, "hi"), 0)};

        if (!json_is_num(json_get(delta, "value")))
                return;
        report_cell_text(&us, &cell, text, sizeof(text));
        say(to, "Noise floor (A/A) of %s: %s µs.", label(row, name), text);
}

/* ---- when not to believe it ---- */

/* What may be doubted of a row: the kind of doubt, under which rows are grouped, or NULL; *why is what it means. The
 * nth of several of a row. */
typedef const char *doubt_of(const struct report_row *row, size_t nth, const char **why);

static const char *doubt_verdict(const struct report_row *row, size_t nth, const char **why)
{
        *why = text_at(row->row, "validity.reason", "no reason given");
        return nth || verdict_is(row, "VALID") ? NULL : text_at(row->row, "validity.verdict", "?");
}

static const char *doubt_wide(const struct report_row *row, size_t nth, const char **why)
{
        const json *ci = report_at(row->row, "decomposition.latency_us.ci95");

        ci = ci ? ci : report_at(row->row, "aggregates.latency_ms.ci95");
        double lo = json_num(json_get(ci, "lo"), NAN), hi = json_num(json_get(ci, "hi"), NAN);

        *why = "the host was busy; repeat";
        return nth == 0 && hi > INTERVAL_RATIO_MAX * lo ? "latency's interval wider than x3" : NULL;
}

static const char *doubt_correlated(const struct report_row *row, size_t nth, const char **why)
{
        *why = "successive blocks resemble one another (lag 1 above 0.3); intervals may be too narrow";
        return nth == 0 && json_num(json_get(row->row, "autocorrelation_lag1"), 0) > AUTOCORRELATION_MAX
                   ? "correlated blocks"
                   : NULL;
}

static const char *doubt_synthetic(const struct report_row *row, size_t nth, const char **why)
{
        *why = "generated weights: the model was not found, or is one without a checkpoint";
        return nth == 0 && strcmp(text_at(row->row, "weights", ""), "synthetic") == 0 ? "weights: synthetic" : NULL;
}

static const char *doubt_insensitive(const struct report_row *row, size_t nth, const char **why)
{
        *why = "this model's result does not show a changed prompt or lost state";
        return nth == 0 && !json_bool(report_at(row->row, "check.digest_sensitive"), true) ? "digest_sensitive: false"
                                                                                           : NULL;
}

static const char *doubt_warning(const struct report_row *row, size_t nth, const char **why)
{
        const json *w = json_first(json_get(row->row, "warnings"));

        while (w && nth--)
                w = json_next(w);
        *why = json_str(w, "");
        return w ? "warning" : NULL;
}

/* No doubt, but grouped like one: in a cell of the full table it would be cut. */
static const char *fact_device(const struct report_row *row, size_t nth, const char **why)
{
        *why = text_at(row->row, "work.device", NULL);
        return nth == 0 && *why ? "device" : NULL;
}

static bool says(const struct report_row *row, doubt_of *doubt, const char *kind, const char *why, size_t before)
{
        const char *k, *w;

        for (size_t nth = 0; nth < before && (k = doubt(row, nth, &w)); nth++)
                if (strcmp(k, kind) == 0 && strcmp(w, why) == 0)
                        return true;
        return false;
}

/* "full_djinn shm, pytorch_rpc tcp" of the rows from first to end (excluded) that the doubt is about; or "all rows". */
static void rows_that_say(const struct report_row *first, const struct report_row *end, doubt_of *doubt,
                          const char *kind, const char *why, char out[REPORT_TEXT_MAX])
{
        size_t len = 0, said = 0, ran = 0, left = 0;

        for (const struct report_row *r = first; r < end; r++) {
                bool skipped = verdict_is(r, "SKIPPED");

                ran += !skipped;
                if (!says(r, doubt, kind, why, SIZE_MAX))
                        continue;
                said += !skipped;
                if (len > REPORT_TEXT_MAX - 128) {
                        left++;
                        continue;
                }
                len += (size_t)snprintf(out + len, REPORT_TEXT_MAX - len, "%s%.64s %.16s", len ? ", " : "",
                                        text_at(r->row, "baseline", "?"), text_at(r->row, "transport", "?"));
        }
        if (said > 1 && said == ran)
                snprintf(out, REPORT_TEXT_MAX, "all rows");
        else if (left)
                snprintf(out + len, REPORT_TEXT_MAX - len, " and %zu more", left);
}

/* One line per kind and workload. */
static void grouped(const struct sink *to, const struct report_row *first, const struct report_row *end,
                    doubt_of *doubt)
{
        char rows[REPORT_TEXT_MAX], name[REPORT_TEXT_MAX];
        const char *kind, *why;

        for (const struct report_row *row = first; row < end; row++) {
                for (size_t nth = 0; (kind = doubt(row, nth, &why)); nth++) {
                        const struct report_row *r = first;

                        while (r < row && !says(r, doubt, kind, why, SIZE_MAX))
                                r++;
                        if (r < row || says(row, doubt, kind, why, nth))
                                continue;
                        rows_that_say(first, end, doubt, kind, why, rows);
                        report_workload(row->doc, row->ambiguous, name);
                        say(to, "%s: %.160s (%s): %.256s", kind, name, rows, why);
                }
        }
}

static void doubts(const struct sink *to, const struct report_view *view)
{
        static doubt_of *const all[] = {doubt_verdict,     doubt_wide,    doubt_correlated, doubt_synthetic,
                                        doubt_insensitive, doubt_warning, fact_device};
        const size_t count = ARRAY_LEN(all) - (view->table != REPORT_TABLE_FULL);
        const struct report_row *const end = view->rows + view->nrows;

        for (size_t d = 0; d < count; d++) {
                for (const struct report_row *row = view->rows, *next; row < end; row = next) {
                        for (next = row; next < end && next->source == row->source;)
                                next++;
                        grouped(to, row, next, all[d]);
                }
        }
}

static void ceiling(const struct sink *to, const struct report_view *view)
{
        size_t i = 0;

        while (i < view->nrows && !(json_num(report_at(view->rows[i].row, "roofline.share"), 0) > 1))
                i++;
        if (i < view->nrows && view->table != REPORT_TABLE_SAMPLE)
                say(to, "A share of the roofline above 100 %%: the ceiling was measured while the host was busy.");
}

/* "full_djinn/shm", as check.bit_equal_to names rows. */
static bool is_among(const struct report_row *row, const json *names)
{
        char name[96];

        snprintf(name, sizeof(name), "%.64s/%.16s", text_at(row->row, "baseline", "?"),
                 text_at(row->row, "transport", "?"));
        for (const json *e = json_first(names); e; e = json_next(e))
                if (strcmp(json_str(e, ""), name) == 0)
                        return true;
        return false;
}

/* Rows whose results are the same bytes: of the full table, where a cell has only their number. The first speaks. */
static void bit_equal(const struct sink *to, const struct report_view *view)
{
        for (size_t i = 0; i < view->nrows && view->table == REPORT_TABLE_FULL; i++) {
                const struct report_row *row = &view->rows[i];
                const json *names = report_at(row->row, "check.bit_equal_to");
                char text[REPORT_TEXT_MAX] = "", name[REPORT_TEXT_MAX];
                bool told = false;
                size_t len = 0;

                for (size_t k = 0; k < i && !told; k++)
                        told = view->rows[k].source == row->source && is_among(&view->rows[k], names);
                for (const json *e = json_first(names); e && len < sizeof(text) - 96; e = json_next(e))
                        len += (size_t)snprintf(text + len, sizeof(text) - len, ", %.80s", json_str(e, "?"));
                report_workload(row->doc, row->ambiguous, name);
                if (len && !told)
                        say(to, "Bit-equal results: %.160s: %.64s/%.16s%s", name, text_at(row->row, "baseline", "?"),
                            text_at(row->row, "transport", "?"), text);
        }
}

/* What the ways up and down are worth where client and server read two clocks. */
static void two_clocks(const struct sink *to, const struct report_view *view, const struct report_source *source)
{
        double worst = 0;
        char name[REPORT_TEXT_MAX];

        for (size_t i = 0; i < view->nrows && view->table == REPORT_TABLE_FULL; i++)
                if (view->rows[i].source == source)
                        worst = fmax(worst, json_num(report_at(view->rows[i].row, "clock.error_bound_ns"), 0));
        if (worst > 0)
                say(to,
                    "%s: client and server read two clocks: the network's way up and way down are each known to "
                    "%.3g µs per round trip, their sum is not touched by it.",
                    workload_of(view, source, name), worst / 1e3);
}

/* Every breakdown that is printed must add up, wherever it comes from. */
static void sum(const struct sink *to, const struct report_row *row)
{
        static const char *const apart[] = {"latency_ms",
                                            "overlap_ms",
                                            "server_executor_time_ms",
                                            "server_duration_ms",
                                            "server_cleanup_ms",
                                            "time_to_first_token_ms",
                                            "time_per_output_token_ms"};
        const json *breakdown = json_get(row->row, "breakdown");
        double latency = json_num(json_get(breakdown, "latency_ms"), NAN), total = 0;
        char name[REPORT_TEXT_MAX];

        for (const json *m = json_first(breakdown); m; m = json_next(m)) {
                size_t i = 0;

                while (i < ARRAY_LEN(apart) && strcmp(apart[i], json_key(m)) != 0)
                        i++;
                total += i == ARRAY_LEN(apart) ? json_num(m, 0) : 0;
        }
        if (fabs(total - latency) > SUM_TOLERANCE * fabs(latency))
                say(to, "%s: the leaves and residuals add up to %.6g ms and not to the latency, %.6g ms.",
                    label(row, name), total, latency);
}

static void bytes(const struct sink *to, const struct report_row *row)
{
        static const struct {
                const char *measured, *predicted, *what;
        } pairs[] = {
            {"wire.up.payload_bytes", "wire.predicted.up.payload_bytes", "bytes up"},
            {"wire.down.payload_bytes", "wire.predicted.down.payload_bytes", "bytes down"},
            {"wire.round_trips", "wire.predicted.round_trips", "round trips"},
        };
        char name[REPORT_TEXT_MAX];

        for (size_t i = 0; i < ARRAY_LEN(pairs); i++) {
                const json *a = report_at(row->row, pairs[i].measured), *b = report_at(row->row, pairs[i].predicted);

                if (json_is_num(a) && json_is_num(b) && json_num(a, 0) != json_num(b, 0))
                        say(to, "%s: %s: the plan said %.15g, the transport counted %.15g.", label(row, name),
                            pairs[i].what, json_num(b, 0), json_num(a, 0));
        }
}

static void document_doubts(const struct sink *to, const struct report_view *view, const struct report_source *source)
{
        const json *doc = source->doc;
        char name[REPORT_TEXT_MAX];

        const char *injury = text_at(doc, "manifest.injury", NULL);

        if (injury)
                say(to, "%s: INJURED ON PURPOSE: %.200s. These are no measurements of djinnbench.",
                    workload_of(view, source, name), injury);
        if (!json_bool(report_at(doc, "manifest.complete"), true))
                say(to, "%s: the sweep was interrupted; these are the blocks that were finished.",
                    workload_of(view, source, name));
}

/* ---- what it was made from ---- */

static void origin(const struct sink *to, const struct report_view *view, const struct report_source *source)
{
        char name[REPORT_TEXT_MAX];
        const json *m = json_get(source->doc, "manifest");
        char hash[33] = "";

        if (source->hashed)
                digest_hex(source->raw, hash);
        say(to, "%s: commit %.64s, host %.64s, %.96s, tag %.64s, %.40s%s%.400s%s%s", workload_of(view, source, name),
            text_at(m, "build.commit", "unknown"), text_at(m, "host", "unknown"),
            text_at(m, "cpu.model", "CPU unknown"), text_at(source->doc, "experiment.tag", "none"),
            text_at(source->doc, "generated_at", "undated"), source->name ? "; raw file " : "",
            source->name ? source->name : "", source->hashed ? " XXH3-128 " : "", hash);
}

void report_notes(const struct report_view *view, report_put *put, void *ctx)
{
        static void (*const of_row[])(const struct sink *to, const struct report_row *row) = {noise_floor, sum, bytes};
        const struct sink to = {put, ctx};

        legend(&to, view);
        launches(&to, view);
        for (size_t i = 0; i < view->nsources; i++)
                document_doubts(&to, view, &view->sources[i]);
        for (size_t i = 0; i < view->nsources; i++)
                headline(&to, view, &view->sources[i]);
        for (size_t f = 0; f < ARRAY_LEN(of_row); f++)
                for (size_t i = 0; i < view->nrows; i++)
                        of_row[f](&to, &view->rows[i]);
        doubts(&to, view);
        ceiling(&to, view);
        bit_equal(&to, view);
        for (size_t i = 0; i < view->nsources; i++)
                two_clocks(&to, view, &view->sources[i]);
        for (size_t i = 0; i < view->nsources; i++)
                origin(&to, view, &view->sources[i]);
}
