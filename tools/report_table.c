/* Which columns a table has, and where each gets its value. A column is one entry. */
#include "report_inside.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "err.h"

#define PATH_PART_MAX 64

/* ---- access ---- */

const json *report_at(const json *from, const char *path)
{
        while (from && *path) {
                char part[PATH_PART_MAX];
                size_t len = strcspn(path, ".");

                BUG_ON(len >= sizeof(part));
                memcpy(part, path, len);
                part[len] = '\0';
                from = json_get(from, part);
                path += path[len] ? len + 1 : len;
        }
        return json_is_null(from) ? NULL : from;
}

static const json *value_of(const struct report_row *row, const char *path)
{
        return path[0] == '/' ? report_at(row->doc, path + 1) : report_at(row->row, path);
}

static const char *named(const json *doc, const char *role)
{
        return json_str(json_get(json_get(doc, "experiment"), role), NULL);
}

static bool is_local(const struct report_row *row)
{
        return strcmp(json_str(json_get(row->row, "transport"), ""), "local") == 0;
}

static void set_number(struct report_cell *out, const json *v, double scale)
{
        if (!json_is_num(v))
                return;
        out->missing = false;
        out->value = json_num(v, 0) * (scale == 0 ? 1 : scale);
}

static void set_text(struct report_cell *out, const char *text)
{
        out->missing = !text;
        out->text = text;
}

static void set_interval(struct report_cell *out, const json *interval, double scale)
{
        const json *lo = json_get(interval, "lo"), *hi = json_get(interval, "hi");

        out->interval = json_is_num(lo) && json_is_num(hi);
        out->lo = json_num(lo, 0) * scale;
        out->hi = json_num(hi, 0) * scale;
}

/* ---- getters ---- */

static void get_number(const struct report_row *row, const struct report_column *column, struct report_cell *out)
{
        set_number(out, value_of(row, column->path), column->scale);
}

static void get_text(const struct report_row *row, const struct report_column *column, struct report_cell *out)
{
        set_text(out, json_str(value_of(row, column->path), NULL));
}

static void get_flag(const struct report_row *row, const struct report_column *column, struct report_cell *out)
{
        const json *v = value_of(row, column->path);

        set_text(out, json_is_bool(v) ? json_bool(v, false) ? "yes" : "no" : NULL);
}

static void get_count(const struct report_row *row, const struct report_column *column, struct report_cell *out)
{
        const json *v = value_of(row, column->path);

        /* Of a row that did not run there is nothing to count. */
        out->missing = !json_is_array(v) || json_count(json_get(row->row, "runs")) == 0;
        out->value = (double)json_count(v);
}

static void get_estimate(const struct report_row *row, const struct report_column *column, struct report_cell *out)
{
        const json *v = value_of(row, column->path);

        set_number(out, json_get(v, "value"), 1);
        set_interval(out, json_get(v, "ci95"), 1);
}

/* The latency's median, in µs, also of rows that no native row stands beside. */
static void get_latency_us(const struct report_row *row, const struct report_column *column, struct report_cell *out)
{
        const json *v = report_at(row->row, "aggregates.latency_ms");

        get_estimate(row, column, out);
        if (!out->missing)
                return;
        set_number(out, json_get(v, "median"), 1000);
        set_interval(out, json_get(v, "ci95"), 1000);
}

/* "gpt2_micro@before 20251122T120009Z": several results of one workload are told apart. */
void report_workload(const json *doc, bool ambiguous, char out[REPORT_TEXT_MAX])
{
        const char *name = json_str(report_at(doc, "workload.workload"), "?");
        const char *at = json_str(json_get(doc, "generated_at"), "?");
        size_t len = 0;

        snprintf(out, REPORT_TEXT_MAX, "%.64s", name);
        if (!ambiguous)
                return;
        snprintf(out, REPORT_TEXT_MAX, "%.64s@%.64s ", name, json_str(report_at(doc, "experiment.tag"), "?"));
        len = strlen(out);
        /* The time as in the file's name. */
        for (size_t i = 0; at[i] && i < 32; i++)
                if (at[i] != '-' && at[i] != ':')
                        out[len++] = at[i];
        out[len] = '\0';
}

static void get_workload(const struct report_row *row, const struct report_column *column, struct report_cell *out)
{
        const char *name = json_str(report_at(row->doc, "workload.workload"), NULL);

        report_workload(row->doc, row->ambiguous, out->own);
        set_text(out, name ? out->own : NULL);
}

static void get_source(const struct report_row *row, const struct report_column *column, struct report_cell *out)
{
        set_text(out, row->source->name);
}

static void get_hash(const struct report_row *row, const struct report_column *column, struct report_cell *out)
{
        if (!row->source->hashed)
                return;
        digest_hex(row->source->raw, out->own);
        set_text(out, out->own);
}

/* "tcp/host", "rdma/dmabuf (emulated)": an emulated device never stands unmarked beside hardware. */
static void get_medium(const struct report_row *row, const struct report_column *column, struct report_cell *out)
{
        const char *path = json_str(json_get(row->row, "path"), NULL);

        snprintf(out->own, sizeof(out->own), "%.32s%s%.32s%s", json_str(json_get(row->row, "transport"), "?"),
                 path ? "/" : "", path ? path : "",
                 json_bool(json_get(row->row, "emulated"), false) ? " (emulated)" : "");
        set_text(out, out->own);
}

/* A row is called zero-copy only where neither this program nor anything below it copied. */
static void get_zero_copy(const struct report_row *row, const struct report_column *column, struct report_cell *out)
{
        static const char *const paths[] = {"wire.up.copies_bytes", "wire.down.copies_bytes", "wire.driver_copies"};
        bool unknown = false, copied = false;

        for (size_t i = 0; i < ARRAY_LEN(paths); i++) {
                const json *v = report_at(row->row, paths[i]);

                unknown |= !v;
                copied |= json_num(v, 0) != 0;
        }
        if (!is_local(row))
                set_text(out, copied ? "no" : unknown ? NULL : "yes");
}

static void get_bit_equal(const struct report_row *row, const struct report_column *column, struct report_cell *out)
{
        size_t len = 0;

        for (const json *e = json_first(value_of(row, column->path)); e; e = json_next(e)) {
                int n = snprintf(out->own + len, sizeof(out->own) - len, "%s%.64s", len ? " " : "", json_str(e, ""));

                if (n < 0 || (size_t)n >= sizeof(out->own) - len)
                        break;
                len += (size_t)n;
        }
        set_text(out, len ? out->own : NULL);
}

/* The names are below the table. */
static void get_bit_equal_count(const struct report_row *row, const struct report_column *column,
                                struct report_cell *out)
{
        const json *names = value_of(row, column->path);

        out->missing = !json_is_array(names);
        out->value = (double)json_count(names);
}

/* ---- quantities named after a baseline: their keys depend on the document ---- */

static const json *derived(const struct report_row *row, const char *prefix, const char *role)
{
        const char *name = named(row->doc, role);
        char key[2 * PATH_PART_MAX];

        if (!name)
                return NULL;
        snprintf(key, sizeof(key), "%s%.64s", prefix, name);
        return json_get(json_get(row->row, "derived"), key);
}

static const char *role_of(const char *key)
{
        return strstr(key, "_vs_reference") ? "reference_baseline" : "blind_baseline";
}

/* The key is "<quantity>_vs_reference" or "_vs_blind" here, and "<quantity>_vs_<name>" in the documents. */
static void get_versus(const struct report_row *row, const struct report_column *column, struct report_cell *out)
{
        char prefix[PATH_PART_MAX];
        const char *vs = strstr(column->key, "_vs_");

        snprintf(prefix, sizeof(prefix), "%.*s", (int)(vs - column->key) + 4, column->key);
        set_number(out, derived(row, prefix, role_of(column->key)), 1);
}

/* As in the documents, where all of them agree on the name; the experiment's tools look for such keys. */
static void title_versus(const struct report_view *view, const struct report_column *column, bool csv, char *out,
                         size_t size)
{
        const char *role = role_of(column->key), *name = view->nsources ? named(view->sources[0].doc, role) : NULL;
        const char *vs = strstr(column->key, "_vs_");

        for (size_t i = 1; name && i < view->nsources; i++) {
                const char *other = named(view->sources[i].doc, role);

                if (!other || strcmp(other, name) != 0)
                        name = NULL;
        }
        if (csv && name)
                snprintf(out, size, "%.*s%.64s", (int)(vs - column->key) + 4, column->key, name);
        else if (name)
                snprintf(out, size, "%s%.64s", column->header, name);
        else if (csv)
                snprintf(out, size, "%s", column->key);
        else
                snprintf(out, size, "%s%s", column->header, vs + 4);
}

/* Means, as the experiment's. */
static void get_delta_native_ms(const struct report_row *row, const struct report_column *column,
                                struct report_cell *out)
{
        const json *mine = report_at(row->row, "aggregates.latency_ms.mean");
        const json *native = report_at(row->native, "aggregates.latency_ms.mean");

        out->missing = !json_is_num(mine) || !json_is_num(native);
        out->value = json_num(mine, 0) - json_num(native, 0);
}

/* A share of what was measured to be the most: more says that the most was measured badly, not by how much. */
static void share_text(double share, int decimals, char *out, size_t size)
{
        char number[64];

        report_number(number, sizeof(number), share * 100, decimals);
        snprintf(out, size, "%s %%", share > 1 ? "> 100" : number);
}

/* "+0.2 % (native at 41 %)": a slow native flatters every percentage, so its share of the roofline stands beside. It is
 * Δ over native of the decomposition, so that it says what Δ says. */
static void get_overhead(const struct report_row *row, const struct report_column *column, struct report_cell *out)
{
        const json *delta = report_at(row->row, "decomposition.delta_us");
        const json *lo = report_at(delta, "ci95.lo"), *hi = report_at(delta, "ci95.hi");
        const json *share = report_at(row->native, "roofline.share");
        double native = json_num(report_at(row->row, "decomposition.native_us.value"), NAN);
        double pct = json_num(json_get(delta, "value"), NAN) / native * 100;
        char number[64], at[80] = "an unknown share";

        if (!isfinite(pct) || native <= 0 || row->row == row->native)
                return;
        report_number(number, sizeof(number), pct, 1);
        if (json_is_num(share))
                share_text(json_num(share, 0), 0, at, sizeof(at));
        if (json_is_num(lo) && json_is_num(hi) && json_num(lo, 0) <= 0 && json_num(hi, 0) >= 0)
                snprintf(out->own, sizeof(out->own), "n.d. (native at %s)", at);
        else
                snprintf(out->own, sizeof(out->own), "%s%s %% (native at %s)", pct >= 0 ? "+" : "", number, at);
        set_text(out, out->own);
}

static void get_native_share(const struct report_row *row, const struct report_column *column, struct report_cell *out)
{
        /* Beside a percentage; of a row that did not run there is none. */
        if (json_count(json_get(row->row, "aggregates")))
                set_number(out, report_at(row->native, "roofline.share"), 1);
}

static void get_native_share_text(const struct report_row *row, const struct report_column *column,
                                  struct report_cell *out)
{
        struct report_cell share = {.missing = true};

        get_native_share(row, column, &share);
        if (share.missing)
                return;
        share_text(share.value, 1, out->own, sizeof(out->own));
        set_text(out, out->own);
}

static void get_roofline(const struct report_row *row, const struct report_column *column, struct report_cell *out)
{
        const json *share = report_at(row->row, "roofline.share");
        char text[80];

        if (!json_is_num(share))
                return;
        share_text(json_num(share, 0), 1, text, sizeof(text));
        snprintf(out->own, sizeof(out->own), "%s %.16s", text, json_str(report_at(row->row, "roofline.bound"), ""));
        set_text(out, out->own);
}

/* ---- headings that depend on the rows ---- */

/* On shm and loop nothing is a network. */
static void title_network(const struct report_view *view, const struct report_column *column, bool csv, char *out,
                          size_t size)
{
        bool network = false, memory = false;

        for (size_t i = 0; i < view->nrows; i++) {
                const char *t = json_str(json_get(view->rows[i].row, "transport"), "");
                bool inside = strcmp(t, "shm") == 0 || strcmp(t, "loop") == 0 || strcmp(t, "null") == 0;

                memory |= inside;
                network |= !inside && !is_local(&view->rows[i]);
        }
        snprintf(out, size, "%s",
                 csv                 ? column->key
                 : network && memory ? "Network/transport"
                 : memory            ? "Transport"
                                     : "Network");
}

/* "Throughput (tok/s)" of the experiment; other units by their names. */
static void title_throughput(const struct report_view *view, const struct report_column *column, bool csv, char *out,
                             size_t size)
{
        const char *unit = NULL;

        for (size_t i = 0; i < view->nrows && !csv; i++) {
                const char *u = json_str(report_at(view->rows[i].row, "metadata.unit_name"), NULL);

                if (u && unit && strcmp(u, unit) != 0) {
                        unit = "units";
                        break;
                }
                unit = u ? u : unit;
        }
        if (csv)
                snprintf(out, size, "%s", column->key);
        else
                snprintf(out, size, "Throughput, median (%.32s/s)",
                         !unit                         ? "units"
                         : strcmp(unit, "tokens") == 0 ? "tok"
                                                       : unit);
}

/* ---- the experiment's sample table ---- */

static void get_sample_name(const struct report_row *row, const struct report_column *column, struct report_cell *out)
{
        const char *name = json_str(json_get(row->row, "baseline"), "?");

        set_text(out, name);
        if (is_local(row))
                return;
        snprintf(out->own, sizeof(out->own), "%.64s (%.16s)", name, json_str(json_get(row->row, "transport"), "?"));
        out->text = out->own;
}

static void get_status(const struct report_row *row, const struct report_column *column, struct report_cell *out)
{
        static const struct {
                const char *role, *word;
        } roles[] = {{"reference_baseline", "reference"}, {"blind_baseline", "blind"}, {"target_baseline", "target"}};
        const char *name = json_str(json_get(row->row, "baseline"), ""), *word = NULL;
        const char *verdict = json_str(report_at(row->row, "validity.verdict"), "?");

        for (size_t i = 0; i < ARRAY_LEN(roles) && !word; i++) {
                const char *holder = named(row->doc, roles[i].role);

                word = holder && strcmp(holder, name) == 0 ? roles[i].word : NULL;
        }
        snprintf(out->own, sizeof(out->own), "%s%s%s%s", verdict, word ? " (" : "", word ? word : "", word ? ")" : "");
        set_text(out, out->own);
}

/* ---- the tables ---- */

#define IN_CSV  .where = REPORT_IN_CSV
#define IN_TEXT .where = REPORT_IN_TEXT
#define IN_ALL  .where = REPORT_IN_ALL

#define TEXT(k, h, w, p)                                                                  \
        {                                                                                 \
                .key = k, .header = h, .kind = REPORT_TEXT, w, .get = get_text, .path = p \
        }
#define FLAG(k, h, w, p)                                                                  \
        {                                                                                 \
                .key = k, .header = h, .kind = REPORT_TEXT, w, .get = get_flag, .path = p \
        }
#define MADE(k, h, w, getter)                                                \
        {                                                                    \
                .key = k, .header = h, .kind = REPORT_TEXT, w, .get = getter \
        }
#define NUM(k, h, u, d, w, p)                                                                                 \
        {                                                                                                     \
                .key = k, .header = h, .unit = u, .kind = REPORT_NUMBER, w, .decimals = d, .get = get_number, \
                .path = p                                                                                     \
        }
#define EST(k, h, d, p, ...)                                                                         \
        {                                                                                            \
                .key = k, .header = h, .unit = "µs", .kind = REPORT_ESTIMATE, IN_ALL, .decimals = d, \
                .get = get_estimate, .path = p, __VA_ARGS__                                          \
        }

/* Not cut: its end is the time that tells runs apart. */
#define WORKLOAD                                                                                                \
        {                                                                                                       \
                .key = "workload", .header = "Workload", .kind = REPORT_TEXT, IN_ALL, .shown = REPORT_TEXT_MAX, \
                .get = get_workload                                                                             \
        }
#define LATENCY_US                                                                                       \
        {                                                                                                \
                .key = "latency_us", .header = "Latency", .unit = "µs", .kind = REPORT_ESTIMATE, IN_ALL, \
                .decimals = 1, .get = get_latency_us, .path = "decomposition.latency_us"                 \
        }
#define PROVENANCE                                                  \
        TEXT("commit", "Commit", IN_CSV, "/manifest.build.commit"), \
            MADE("source_file", "Raw file", IN_CSV, get_source), MADE("source_xxh3_128", "XXH3-128", IN_CSV, get_hash)

static const struct report_column table_1[] = {
    WORKLOAD,
    TEXT("baseline", "Baseline", IN_ALL, "baseline"),
    MADE(NULL, "Transport/path", IN_TEXT, get_medium),
    TEXT("transport", "Transport", IN_CSV, "transport"),
    TEXT("path", "Path", IN_CSV, "path"),
    FLAG("emulated", "Emulated", IN_CSV, "emulated"),
    LATENCY_US,
    EST("delta_us", "Δ", 1, "decomposition.delta_us", .about_zero = true),
    EST("wire_floor_us", "Wire floor", 1, "decomposition.wire_floor_us", .value_only = true),
    EST("network_us", "Network", 1, "decomposition.network_us", .value_only = true, .title = title_network),
    EST("extra_execution_us", "Extra execution", 1, "decomposition.extra_execution_us", .value_only = true),
    EST("framework_overhead_us", "Framework", 1, "decomposition.framework_overhead_us", .about_zero = true),
    NUM("bytes_up", "Bytes up", NULL, -12, IN_ALL, "wire.up.payload_bytes"),
    NUM("bytes_down", "Bytes down", NULL, -12, IN_ALL, "wire.down.payload_bytes"),
    NUM("round_trips", "Round trips", NULL, -6, IN_ALL, "wire.round_trips"),
    MADE(NULL, "Overhead", IN_TEXT, get_overhead),
    {.key = "latency_overhead_pct_vs_reference",
     .header = "Overhead % vs ",
     .kind = REPORT_NUMBER,
     IN_CSV,
     .get = get_versus,
     .title = title_versus},
    {.key = "native_roofline_share",
     .header = "Native's roofline",
     .kind = REPORT_NUMBER,
     IN_CSV,
     .get = get_native_share},
    MADE(NULL, "Roofline", IN_TEXT, get_roofline),
    NUM("roofline_share", "Roofline", NULL, 3, IN_CSV, "roofline.share"),
    TEXT("roofline_bound", "Bound", IN_CSV, "roofline.bound"),
    TEXT("verdict", "Verdict", IN_ALL, "validity.verdict"),
    TEXT("reason", "Reason", IN_CSV, "validity.reason"),
    NUM("launches", "Launches", NULL, 0, IN_CSV, "/manifest.launches"),
    PROVENANCE,
};

/* People see medians, of which a busy moment makes less; programs have the experiment's means too. */
static const struct report_column table_sample[] = {
    TEXT("workload", "Workload", IN_CSV, "/workload.workload"),
    MADE(NULL, "Baseline", IN_TEXT, get_sample_name),
    TEXT("baseline", "Baseline", IN_CSV, "baseline"),
    TEXT("transport", "Transport", IN_CSV, "transport"),
    NUM("latency_median_ms", "Latency, median", "ms", 3, IN_ALL, "aggregates.latency_ms.median"),
    NUM("latency_mean_ms", "Latency, mean", "ms", 3, IN_CSV, "aggregates.latency_ms.mean"),
    {.key = "throughput_median_units_s",
     .header = "Throughput, median",
     .kind = REPORT_NUMBER,
     IN_ALL,
     .decimals = 2,
     .get = get_number,
     .path = "aggregates.throughput_units_per_s.median",
     .title = title_throughput},
    NUM("throughput_mean_units_s", "Throughput, mean", "units/s", 2, IN_CSV, "aggregates.throughput_units_per_s.mean"),
    NUM("data_median_mb", "Data, median", "MB", -5, IN_ALL, "aggregates.total_data_mb.median"),
    NUM("data_mean_mb", "Data, mean", "MB", -5, IN_CSV, "aggregates.total_data_mb.mean"),
    MADE(NULL, "Status", IN_TEXT, get_status),
    TEXT("verdict", "Verdict", IN_CSV, "validity.verdict"),
    TEXT("reason", "Reason", IN_CSV, "validity.reason"),
    PROVENANCE,
};

#define MEAN(leaf, words)      NUM(leaf "_mean_ms", words " (mean)", "ms", 4, IN_ALL, "aggregates." leaf "_ms.mean")
#define BREAKDOWN(leaf, words) NUM("breakdown_" leaf "_ms", words, "ms", 6, IN_ALL, "breakdown." leaf "_ms")
#define VERSUS(k, h)                                                                                     \
        {                                                                                                \
                .key = k, .header = h, .kind = REPORT_NUMBER, IN_ALL, .decimals = -5, .get = get_versus, \
                .title = title_versus                                                                    \
        }
#define DERIVED(k, h) NUM(k, h, NULL, -5, IN_ALL, "derived." k)
#define WAY(way, words)                                                                                    \
        NUM(way "_payload_bytes", words " payload", "bytes", -12, IN_ALL, "wire." way ".payload_bytes"),   \
            NUM(way "_predicted_payload_bytes", words " payload as planned", "bytes", -12, IN_ALL,         \
                "wire.predicted." way ".payload_bytes"),                                                   \
            NUM(way "_header_bytes", words " headers", "bytes", -12, IN_ALL, "wire." way ".header_bytes"), \
            NUM(way "_messages", words " messages", NULL, -6, IN_ALL, "wire." way ".messages"),            \
            NUM(way "_copies_bytes", words " copied", "bytes", -12, IN_ALL, "wire." way ".copies_bytes"),  \
            NUM(way "_retransmitted_bytes", words " retransmitted", "bytes", -12, IN_ALL,                  \
                "wire." way ".retransmitted_bytes")
#define SWITCH(k) TEXT("switch_" k, "Switch " k, IN_ALL, "switches.applied." k)

static const struct report_column table_full[] = {
    /* The experiment's columns under its names. */
    WORKLOAD,
    TEXT("category", "Category", IN_ALL, "/workload.category"),
    TEXT("baseline", "Baseline", IN_ALL, "baseline"),
    TEXT("transport", "Transport", IN_ALL, "transport"),
    TEXT("verdict", "Verdict", IN_ALL, "validity.verdict"),
    TEXT("reason", "Reason", IN_ALL, "validity.reason"),
    NUM("latency_mean_ms", "Latency (mean)", "ms", 4, IN_ALL, "aggregates.latency_ms.mean"),
    NUM("latency_p95_ms", "Latency (p95)", "ms", 4, IN_ALL, "aggregates.latency_ms.p95"),
    {.key = "latency_delta_vs_native_ms",
     .header = "Latency less native's (means)",
     .unit = "ms",
     .kind = REPORT_NUMBER,
     IN_ALL,
     .decimals = 4,
     .get = get_delta_native_ms},
    NUM("data_mean_mb", "Data (mean)", "MB", -6, IN_ALL, "aggregates.total_data_mb.mean"),
    NUM("throughput_mean_units_s", "Throughput (mean)", "units/s", 2, IN_ALL, "aggregates.throughput_units_per_s.mean"),
    VERSUS("latency_overhead_pct_vs_reference", "Overhead of medians, %, vs "),
    VERSUS("speedup_vs_blind", "Speed-up vs "),
    VERSUS("data_savings_pct_vs_blind", "Data savings, %, vs "),
    DERIVED("semantic_efficiency_ratio", "Semantic efficiency ratio"),
    MEAN("client_serialize", "Client serialize"),
    MEAN("client_deserialize", "Client deserialize"),
    MEAN("client_network_c2s", "Network client to server"),
    MEAN("client_network_s2c", "Network server to client"),
    MEAN("server_duration", "Server duration"),
    MEAN("server_executor_time", "Server executor time"),
    MEAN("server_queue_latency", "Server queue"),
    MEAN("server_plan", "Server plan"),
    MEAN("server_placement", "Server placement"),
    MEAN("server_execution", "Server execution"),
    MEAN("server_skeletonization", "Server skeletonization"),
    MEAN("server_cleanup", "Server cleanup"),
    /* Where it ran. */
    TEXT("runner_type", "Runner type", IN_ALL, "runner_type"),
    TEXT("path", "Path", IN_ALL, "path"),
    FLAG("emulated", "Emulated", IN_ALL, "emulated"),
    MADE("zero_copy", "Zero-copy", IN_ALL, get_zero_copy),
    TEXT("device", "Device", IN_ALL, "work.device"),
    NUM("threads", "Threads", NULL, -6, IN_ALL, "work.threads"),
    TEXT("dtype", "Dtype", IN_ALL, "metadata.dtype"),
    TEXT("weights", "Weights", IN_ALL, "weights"),
    {.key = "model_hash",
     .header = "Model",
     .kind = REPORT_TEXT,
     IN_ALL,
     .shown = 12,
     .get = get_text,
     .path = "model_hash"},
    SWITCH("weights"),
    SWITCH("call"),
    SWITCH("state"),
    SWITCH("outputs"),
    SWITCH("plan_cache"),
    SWITCH("buffers"),
    /* Latency and what it is made of. */
    NUM("latency_n", "Requests", NULL, -8, IN_ALL, "aggregates.latency_ms.n"),
    NUM("launches", "Launches", NULL, -8, IN_ALL, "/manifest.launches"),
    NUM("latency_median_ms", "Latency (median)", "ms", 4, IN_ALL, "aggregates.latency_ms.median"),
    NUM("latency_min_ms", "Latency (min)", "ms", 4, IN_ALL, "aggregates.latency_ms.min"),
    NUM("latency_max_ms", "Latency (max)", "ms", 4, IN_ALL, "aggregates.latency_ms.max"),
    NUM("latency_sd_ms", "Latency (sd)", "ms", 4, IN_ALL, "aggregates.latency_ms.sd"),
    NUM("latency_p90_ms", "Latency (p90)", "ms", 4, IN_ALL, "aggregates.latency_ms.p90"),
    NUM("latency_p95_bounded_ms", "Latency (p95, bounded)", "ms", 4, IN_ALL, "aggregates.latency_ms.p95_bounded"),
    NUM("latency_p99_ms", "Latency (p99)", "ms", 4, IN_ALL, "aggregates.latency_ms.p99"),
    NUM("time_to_first_token_ms", "Time to first token (median)", "ms", 4, IN_ALL,
        "aggregates.time_to_first_token_ms.median"),
    NUM("time_per_output_token_ms", "Time per output token (median)", "ms", 4, IN_ALL,
        "aggregates.time_per_output_token_ms.median"),
    LATENCY_US,
    EST("native_us", "Native", 1, "decomposition.native_us"),
    EST("delta_us", "Δ", 1, "decomposition.delta_us", .about_zero = true),
    EST("network_us", "Network", 1, "decomposition.network_us", .title = title_network),
    EST("extra_execution_us", "Extra execution", 1, "decomposition.extra_execution_us", .about_zero = true),
    EST("framework_overhead_us", "Framework", 1, "decomposition.framework_overhead_us", .about_zero = true),
    EST("wire_floor_us", "Wire floor", 1, "decomposition.wire_floor_us"),
    EST("network_difference_us", "c2s + s2c less network", 1, "decomposition.network_difference_us",
        .about_zero = true),
    /* Means over the interquartile set: these add up to breakdown_latency_ms, but for the overlap. */
    BREAKDOWN("client_serialize", "Leaf: client serialize"),
    BREAKDOWN("client_network_c2s", "Leaf: network client to server"),
    BREAKDOWN("server_queue_latency", "Leaf: server queue"),
    BREAKDOWN("server_plan", "Leaf: server plan"),
    BREAKDOWN("server_placement", "Leaf: server placement"),
    BREAKDOWN("server_launch", "Leaf: server launch"),
    BREAKDOWN("server_execution", "Leaf: server execution"),
    BREAKDOWN("server_skeletonization", "Leaf: server skeletonization"),
    BREAKDOWN("client_network_s2c", "Leaf: network server to client"),
    BREAKDOWN("client_deserialize", "Leaf: client deserialize"),
    BREAKDOWN("client_step", "Leaf: client step"),
    BREAKDOWN("residual", "Residual"),
    BREAKDOWN("server_residual", "Server residual"),
    BREAKDOWN("latency", "Sum: latency"),
    BREAKDOWN("overlap", "Overlap (not summed)"),
    NUM("residual_median_ms", "Residual (median)", "ms", 6, IN_ALL, "residual.median_ms"),
    NUM("server_residual_median_ms", "Server residual (median)", "ms", 6, IN_ALL, "residual.server_median_ms"),
    NUM("residual_limit_ms", "Residual's limit", "ms", 6, IN_ALL, "residual.limit_ms"),
    NUM("residual_share_over", "Share of requests above it", NULL, 3, IN_ALL, "residual.share_over"),
    /* The wire, per request. */
    WAY("up", "Up"),
    WAY("down", "Down"),
    NUM("round_trips", "Round trips", NULL, -6, IN_ALL, "wire.round_trips"),
    NUM("predicted_round_trips", "Round trips as planned", NULL, -6, IN_ALL, "wire.predicted.round_trips"),
    NUM("driver_copies", "Copies below, a side", NULL, -6, IN_ALL, "wire.driver_copies"),
    /* The work, per request. */
    NUM("tokens", "Tokens", NULL, -12, IN_ALL, "work.tokens"),
    NUM("flop", "FLOP", NULL, -15, IN_ALL, "work.flop"),
    NUM("flop_head", "FLOP in the head", NULL, -15, IN_ALL, "work.flop_head"),
    NUM("weight_bytes", "Weights read", "bytes", -15, IN_ALL, "work.weight_bytes"),
    NUM("weight_bytes_head", "Weights read in the head", "bytes", -15, IN_ALL, "work.weight_bytes_head"),
    NUM("ops", "Operations", NULL, -12, IN_ALL, "work.ops"),
    TEXT("roofline_bound", "Roofline bound", IN_ALL, "roofline.bound"),
    NUM("roofline_share", "Roofline share", NULL, 3, IN_CSV, "roofline.share"),
    MADE(NULL, "Roofline share", IN_TEXT, get_roofline),
    {.key = "native_roofline_share",
     .header = "Native's roofline share",
     .kind = REPORT_NUMBER,
     IN_CSV,
     .decimals = 3,
     .get = get_native_share},
    MADE(NULL, "Native's roofline share", IN_TEXT, get_native_share_text),
    NUM("bytes_per_s", "Weights read a second", "bytes/s", -4, IN_ALL, "roofline.bytes_per_s"),
    NUM("flop_per_s", "FLOP/s", NULL, -4, IN_ALL, "roofline.flop_per_s"),
    /* What semantics save. */
    DERIVED("speedup_vs_blind_opaque", "Speed-up vs blind_opaque"),
    DERIVED("bytes_saved_per_added_us", "Bytes saved per added µs"),
    VERSUS("latency_delta_ms_vs_blind", "Latency saved, ms, vs "),
    VERSUS("client_serialize_delta_ms_vs_blind", "Client serialize saved, ms, vs "),
    VERSUS("client_deserialize_delta_ms_vs_blind", "Client deserialize saved, ms, vs "),
    VERSUS("server_execution_delta_ms_vs_blind", "Server execution saved, ms, vs "),
    VERSUS("server_duration_delta_ms_vs_blind", "Server duration saved, ms, vs "),
    /* Whether it was the same job. */
    TEXT("check_reference", "Checked against", IN_ALL, "check.reference"),
    NUM("check_max_rel_l2", "Largest relative L2 error", NULL, -3, IN_ALL, "check.max_rel_l2"),
    NUM("check_tolerance", "Tolerance", NULL, -3, IN_ALL, "check.tolerance"),
    FLAG("check_argmax_equal", "Argmax equal", IN_ALL, "check.argmax_equal"),
    FLAG("check_digest_sensitive", "Digest sensitive", IN_ALL, "check.digest_sensitive"),
    NUM("check_near_tie_position", "First near-tie", NULL, -8, IN_ALL, "check.near_tie_position"),
    {.key = "check_bit_equal_to",
     .header = "Bit-equal to",
     .kind = REPORT_TEXT,
     IN_CSV,
     .get = get_bit_equal,
     .path = "check.bit_equal_to"},
    {.header = "Bit-equal to",
     .unit = "rows",
     .kind = REPORT_NUMBER,
     IN_TEXT,
     .decimals = 0,
     .get = get_bit_equal_count,
     .path = "check.bit_equal_to"},
    {.key = "digest", .header = "Digest", .kind = REPORT_TEXT, IN_ALL, .shown = 12, .get = get_text, .path = "digest"},
    /* The rest. */
    NUM("setup_ms", "Set-up", "ms", 3, IN_ALL, "setup_ms"),
    NUM("cold_start_ms", "Cold start", "ms", 3, IN_ALL, "cold_start_ms"),
    NUM("client_cpu_s", "Client CPU", "s", 4, IN_ALL, "cpu_s.client"),
    NUM("server_cpu_s", "Server CPU", "s", 4, IN_ALL, "cpu_s.server"),
    NUM("client_rss_bytes", "Client RSS", "bytes", -15, IN_ALL, "memory.client_rss_bytes"),
    NUM("server_rss_bytes", "Server RSS", "bytes", -15, IN_ALL, "memory.server_rss_bytes"),
    NUM("warmup_requests", "Warm-up", "requests", -8, IN_ALL, "warmup.requests"),
    FLAG("warmup_steady", "Steady", IN_ALL, "warmup.steady"),
    {.key = "outliers",
     .header = "Outliers",
     .kind = REPORT_NUMBER,
     IN_ALL,
     .decimals = 0,
     .get = get_count,
     .path = "outliers"},
    NUM("autocorrelation_lag1", "Autocorrelation (lag 1)", NULL, 3, IN_ALL, "autocorrelation_lag1"),
    NUM("profile_cost_us", "Profile's cost", "µs", 2, IN_ALL, "/manifest.profile_cost_us"),
    PROVENANCE,
};

static const struct {
        const struct report_column *columns;
        size_t count;
} tables[] = {
    [REPORT_TABLE_1] = {table_1, ARRAY_LEN(table_1)},
    [REPORT_TABLE_SAMPLE] = {table_sample, ARRAY_LEN(table_sample)},
    [REPORT_TABLE_FULL] = {table_full, ARRAY_LEN(table_full)},
};

/* ---- rows ---- */

/* The reference's row: a local one, if there are several. */
static const json *find_native(const json *doc)
{
        const char *name = named(doc, "reference_baseline");
        const json *found = NULL;

        for (const json *r = json_first(report_at(doc, "workload.results")); r && name; r = json_next(r)) {
                if (strcmp(json_str(json_get(r, "baseline"), ""), name) != 0)
                        continue;
                if (strcmp(json_str(json_get(r, "transport"), ""), "local") == 0)
                        return r;
                found = found ? found : r;
        }
        return found;
}

static bool same_workload(const json *a, const json *b)
{
        return strcmp(json_str(report_at(a, "workload.workload"), ""),
                      json_str(report_at(b, "workload.workload"), "")) == 0;
}

static void add_rows(struct report_view *view, const struct report_source *source)
{
        const json *native = find_native(source->doc);
        bool ambiguous = false;

        for (size_t i = 0; i < view->nsources; i++)
                ambiguous |= &view->sources[i] != source && same_workload(view->sources[i].doc, source->doc);
        for (const json *r = json_first(report_at(source->doc, "workload.results")); r; r = json_next(r))
                view->rows[view->nrows++] = (struct report_row){
                    .source = source, .doc = source->doc, .row = r, .native = native, .ambiguous = ambiguous};
}

int report_view_make(const struct report_source *sources, size_t n, enum report_table table, struct report_view *out)
{
        size_t rows = 0;

        for (size_t i = 0; i < n; i++)
                rows += json_count(report_at(sources[i].doc, "workload.results"));
        *out = (struct report_view){.table = table,
                                    .columns = tables[table].columns,
                                    .ncolumns = tables[table].count,
                                    .sources = sources,
                                    .nsources = n};
        out->rows = calloc(rows ? rows : 1, sizeof(*out->rows));
        if (!out->rows)
                return err_set(-ENOMEM, "report: no memory for %zu rows", rows);
        for (size_t i = 0; i < n; i++)
                add_rows(out, &sources[i]);
        return 0;
}

void report_view_free(struct report_view *view)
{
        free(view->rows);
        view->rows = NULL;
}

/* ---- text ---- */

void report_title(const struct report_view *view, const struct report_column *column, bool csv, char *out, size_t size)
{
        if (column->title)
                column->title(view, column, csv, out, size);
        else
                snprintf(out, size, "%s", csv ? column->key : column->header);
        size_t len = strlen(out);

        if (!csv && column->unit)
                snprintf(out + len, size - len, " (%s)", column->unit);
}

/* "-0.0" would claim a sign that its digits do not show. */
static void drop_sign_of_zero(char *s)
{
        if (s[0] == '-' && !s[1 + strspn(s + 1, "0.")])
                memmove(s, s + 1, strlen(s));
}

void report_number(char *out, size_t size, double value, int decimals)
{
        if (!isfinite(value))
                snprintf(out, size, "–");
        else if (decimals <= -9 && value != nearbyint(value) && fabs(value) >= 10) /* a mean of counts */
                snprintf(out, size, "%.1f", value);
        else if (decimals < 0)
                snprintf(out, size, "%.*g", -decimals, value);
        else if (fabs(value) >= 1e15)
                snprintf(out, size, "%.4g", value);
        else
                snprintf(out, size, "%.*f", decimals, value);
        drop_sign_of_zero(out);
}

void report_us(char *out, size_t size, double value, int decimals)
{
        double v = fabs(value);
        int digits = v > 0 && v < 0.9995 ? 3 : v > 0 && v < 9.995 ? 2 : decimals;

        report_number(out, size, value, digits > decimals ? digits : decimals);
}

static void estimate_text(const struct report_column *column, const struct report_cell *cell, char *out, size_t size)
{
        char value[64], lo[64], hi[64];

        report_us(value, sizeof(value), cell->value, column->decimals);
        report_us(lo, sizeof(lo), cell->lo, column->decimals);
        report_us(hi, sizeof(hi), cell->hi, column->decimals);
        if (!cell->interval || column->value_only)
                snprintf(out, size, "%s", value);
        else if (column->about_zero && cell->lo <= 0 && cell->hi >= 0)
                snprintf(out, size, "%s [%s, %s] n.d. ≤ %s", value, lo, hi, hi);
        else
                snprintf(out, size, "%s [%s, %s]", value, lo, hi);
}

void report_cell_text(const struct report_column *column, const struct report_cell *cell, char *out, size_t size)
{
        if (cell->missing)
                snprintf(out, size, "–");
        else if (column->kind == REPORT_TEXT)
                snprintf(out, size, "%s", cell->text);
        else if (column->kind == REPORT_NUMBER)
                report_number(out, size, cell->value, column->decimals);
        else
                estimate_text(column, cell, out, size);
}
