/* compare: are the two runs comparable, and how do the rows that both have differ? */
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "compare_inside.h"
#include "err.h"

#define RANGE_MIN 3    /* repeats of each file from which their extremes say something */
#define RESAMPLES 4000 /* of each file's bootstrap */

const char *const compare_verdict_names[] = {"pass", "regression", "inconclusive", "info"};
const char *const compare_how_names[] = {"none", "range", "bootstrap"};

/* ---- comparable? ---- */

/* Grows a list by one zeroed element; NULL without memory. */
static void *list_add(void **list, size_t *n, size_t *room, size_t size)
{
        if (*n == *room) {
                size_t more = *room ? 2 * *room : 32;
                void *grown = reallocarray(*list, more, size);

                if (!grown)
                        return NULL;
                *list = grown;
                *room = more;
        }
        void *new = (char *)*list + (*n)++ *size;

        memset(new, 0, size);
        return new;
}

static int no_memory(void)
{
        return err_set(-ENOMEM, "compare: no memory for the comparison");
}

static int differ(struct compare_result *r, const char *before, const char *what, const char *a, const char *b)
{
        struct compare_difference *d =
            list_add((void **)&r->differences, &r->n_differences, &r->room_differences, sizeof(*d));

        if (!d)
                return no_memory();
        snprintf(d->what, sizeof(d->what), "%s%s%s", before, before[0] ? ": " : "", what);
        compare_clean(a, d->a, sizeof(d->a));
        compare_clean(b, d->b, sizeof(d->b));
        return 0;
}

/* What must be the same. A field that one of the files does not have at all is an older program's silence, not a
 * difference; a null is a statement. */
static int same_field(struct compare_result *r, const char *before, const json *a, const json *b, const char *what)
{
        const json *va = compare_at(a, what), *vb = compare_at(b, what);
        int rc = 0;

        if (!va || !vb)
                return 0;
        char *ta = json_text(va, false), *tb = json_text(vb, false);

        if (!ta || !tb)
                rc = no_memory();
        else if (strcmp(ta, tb) != 0)
                rc = differ(r, before, what, ta, tb);
        free(ta);
        free(tb);
        return rc;
}

/* The commit may differ: that is what is compared. */
static const char *const perf_same[] = {"interrupted",
                                        "manifest.host",
                                        "manifest.kernel",
                                        "manifest.cpu",
                                        "manifest.cores",
                                        "manifest.numa",
                                        "manifest.build.compiler",
                                        "manifest.build.options",
                                        "manifest.build.type",
                                        "manifest.peer.host",
                                        "manifest.peer.kernel",
                                        "manifest.peer.cpu",
                                        "manifest.peer.cores",
                                        "manifest.peer.build.compiler",
                                        "manifest.peer.build.options",
                                        "manifest.peer.build.type",
                                        "manifest.perf.test",
                                        "manifest.perf.op",
                                        "manifest.perf.sizes",
                                        "manifest.perf.depth",
                                        "manifest.perf.connections",
                                        "manifest.perf.threads",
                                        "manifest.perf.bidirectional",
                                        "manifest.perf.duration_s",
                                        "manifest.perf.iters",
                                        "manifest.perf.warmup",
                                        "manifest.perf.verify",
                                        "manifest.perf.mem",
                                        "manifest.perf.gpu_path",
                                        "manifest.perf.rate",
                                        "manifest.perf.arrivals",
                                        "manifest.perf.stall_s",
                                        "manifest.perf.cores",
                                        "manifest.perf.transport",
                                        "manifest.perf.device",
                                        "manifest.perf.netdev",
                                        "manifest.perf.mtu",
                                        "manifest.perf.link_gbits_s",
                                        "manifest.perf.driver_copies",
                                        NULL};
static const char *const perf_row_same[] = {"path", "emulated", "slots", "footprint_bytes", NULL};

static const char *const sweep_same[] = {"manifest.complete",
                                         "manifest.host",
                                         "manifest.kernel",
                                         "manifest.cpu",
                                         "manifest.gpu",
                                         "manifest.nic",
                                         "manifest.build.compiler",
                                         "manifest.build.options",
                                         "manifest.build.type",
                                         "manifest.server.host",
                                         "manifest.server.device",
                                         "manifest.server.threads",
                                         "manifest.server.build.compiler",
                                         "manifest.server.build.options",
                                         "manifest.server.build.type",
                                         "manifest.arrivals",
                                         "manifest.profile",
                                         "manifest.injury",
                                         "experiment.device",
                                         "experiment.dtype",
                                         "experiment.requests_per_block",
                                         NULL};
static const char *const sweep_row_same[] = {
    "path",           "emulated",         "runner_type", "metadata.spec", "metadata.device",
    "metadata.dtype", "switches.applied", "weights",     "model_hash",    "work.threads",
    "work.tokens",    "work.flop",        NULL};

static int same_fields(struct compare_result *r, const char *before, const json *a, const json *b,
                       const char *const *names)
{
        int rc = 0;

        for (; *names && rc == 0; names++)
                rc = same_field(r, before, a, b, *names);
        return rc;
}

/* Rows that only one file has: a configuration that differs, or a run that lost some. */
static int unmatched(struct compare_result *r, const struct compare_doc *in, const struct compare_doc *other, bool in_a)
{
        int rc = 0;

        for (size_t i = 0; i < in->count && rc == 0; i++)
                if (!compare_doc_find(other, in->rows[i].key))
                        rc = differ(r, "", in->rows[i].key, in_a ? "there" : "missing", in_a ? "missing" : "there");
        return rc;
}

/* A row that was not measured in either run, for a reason, is no loss. */
static int invalid_rows(struct compare_result *r, const struct compare_row *a, const struct compare_row *b)
{
        if ((!a->invalid[0] && !b->invalid[0]) || (a->skipped && b->skipped))
                return 0;
        struct compare_difference *d = list_add((void **)&r->invalid, &r->n_invalid, &r->room_invalid, sizeof(*d));

        if (!d)
                return no_memory();
        snprintf(d->what, sizeof(d->what), "%s", a->key);
        snprintf(d->a, sizeof(d->a), "%s", a->invalid[0] ? a->invalid : "valid");
        snprintf(d->b, sizeof(d->b), "%s", b->invalid[0] ? b->invalid : "valid");
        return 0;
}

/* ---- intervals ---- */

static void extremes(const struct compare_series *s, double *lo, double *hi)
{
        *lo = INFINITY;
        *hi = -INFINITY;
        for (size_t i = 0; i < s->n; i++) {
                *lo = fmin(*lo, s->v[i]);
                *hi = fmax(*hi, s->v[i]);
        }
}

/*
 * The two runs share no rounds, so their samples cannot be drawn in pairs: each median has its own bootstrap interval, and
 * the interval of the ratio follows from the distances of the limits in the logarithm (method of variance estimates
 * recovery: Zou and Donner 2008).
 */
static struct interval recovered(double a, struct interval ca, double b, struct interval cb)
{
        double down = hypot(log(b / cb.lo), log(ca.hi / a)), up = hypot(log(cb.hi / b), log(a / ca.lo));

        return (struct interval){.known = true, .lo = b / a * exp(-down), .hi = b / a * exp(up)};
}

static void ratio_interval(const struct compare_series *a, const struct compare_series *b, struct compare_line *line)
{
        struct estimate ea = stats_boot_median(a->v, a->launch, a->n, RESAMPLES, 1);
        struct estimate eb = stats_boot_median(b->v, b->launch, b->n, RESAMPLES, 2);
        double a_lo, a_hi, b_lo, b_hi;

        if (ea.ci95.known && eb.ci95.known) {
                line->ci = recovered(ea.value, ea.ci95, eb.value, eb.ci95);
                line->how = COMPARE_BOOTSTRAP;
                line->within_launch = ea.within_launch || eb.within_launch;
        } else if (a->n >= RANGE_MIN && b->n >= RANGE_MIN) {
                extremes(a, &a_lo, &a_hi);
                extremes(b, &b_lo, &b_hi);
                line->ci = (struct interval){.known = true, .lo = b_lo / a_hi, .hi = b_hi / a_lo};
                line->how = COMPARE_RANGE;
        } else {
                line->ci = (struct interval){.known = false, .lo = NAN, .hi = NAN};
                line->how = COMPARE_NONE;
        }
}

/* ---- verdicts ---- */

static void inconclusive(struct compare_line *line, const char *why)
{
        line->verdict = COMPARE_INCONCLUSIVE;
        snprintf(line->reason, sizeof(line->reason), "%s", why);
}

/* Good or bad only where the whole interval is on one side of the gate. */
static void decide(struct compare_line *line)
{
        bool higher = line->metric->higher_better;
        double gate = higher ? 1 - line->gate_percent / 100 : 1 + line->gate_percent / 100;
        double best = higher ? line->ci.hi : line->ci.lo, worst = higher ? line->ci.lo : line->ci.hi;

        if (line->a->raw) {
                line->verdict = COMPARE_INFO;
        } else if (!line->ci.known) {
                char why[COMPARE_TEXT_MAX];

                snprintf(why, sizeof(why), "%zu and %zu repeats give no interval: %d are needed, 6 are good", line->a_n,
                         line->b_n, RANGE_MIN);
                inconclusive(line, why);
        } else if (line->a->weak || line->b->weak) {
                inconclusive(line, line->a->weak ? line->a->weak : line->b->weak);
        } else if (higher ? worst >= gate : worst <= gate) {
                line->verdict = COMPARE_PASS;
        } else if (higher ? best < gate : best > gate) {
                line->verdict = COMPARE_REGRESSION;
        } else {
                inconclusive(line, "the gate lies within the interval: more repeats, or a quieter machine");
        }
}

static int compare_rows(struct compare_result *r, const struct compare_row *a, const struct compare_row *b,
                        const struct compare_gate *gate, bool *had)
{
        struct compare_series sa, sb = {.value = NAN};
        int rc = compare_series_of(r->a, a, gate->metric, &sa);

        if (rc == 0)
                rc = compare_series_of(r->b, b, gate->metric, &sb);
        if (rc == 0 && isnan(sa.value) != isnan(sb.value))
                rc = differ(r, a->key, gate->metric->name, isnan(sa.value) ? "missing" : "there",
                            isnan(sb.value) ? "missing" : "there");
        if (rc == 0 && !isnan(sa.value) && !isnan(sb.value)) {
                struct compare_line *line = list_add((void **)&r->lines, &r->n_lines, &r->room_lines, sizeof(*line));

                if (line) {
                        *line = (struct compare_line){.a = a,
                                                      .b = b,
                                                      .metric = gate->metric,
                                                      .a_value = sa.value,
                                                      .b_value = sb.value,
                                                      .ratio = sb.value / sa.value,
                                                      .a_n = sa.n,
                                                      .b_n = sb.n,
                                                      .gate_percent = gate->percent};
                        ratio_interval(&sa, &sb, line);
                        decide(line);
                        *had = true;
                } else {
                        rc = no_memory();
                }
        }
        compare_series_free(&sa);
        compare_series_free(&sb);
        return rc;
}

/* Which figure of a row has a gate when nobody asks for one: that which the row's test is about. */
static bool is_preset(const struct compare_metric *m, const struct compare_doc *doc, const struct compare_row *row)
{
        const char *test = doc->kind == COMPARE_SWEEP ? "sweep" : json_str(json_get(row->at, "test"), "");

        return m->test && strcmp(m->test, test) == 0;
}

static int preset_lines(struct compare_result *r, const struct compare_row *a, const struct compare_row *b)
{
        int rc = 0;
        bool had = false;

        for (const struct compare_metric *m = compare_metrics; m->name && rc == 0; m++)
                if (is_preset(m, r->a, a))
                        rc = compare_rows(r, a, b, &(struct compare_gate){m, m->preset_percent}, &had);
        if (rc == 0 && !had)
                rc = differ(r, a->key, "figures", "missing", "missing");
        return rc;
}

/* ---- the whole ---- */

static int matched(struct compare_result *r, const struct compare_gate *gates, size_t n_gates, bool *had)
{
        const char *const *names = r->a->kind == COMPARE_PERF ? perf_row_same : sweep_row_same;
        int rc = 0;

        for (size_t i = 0; i < r->a->count && rc == 0; i++) {
                const struct compare_row *a = &r->a->rows[i], *b = compare_doc_find(r->b, a->key);

                if (!b)
                        continue;
                rc = invalid_rows(r, a, b);
                if (rc < 0 || a->invalid[0] || b->invalid[0])
                        continue;
                r->matched++;
                rc = same_fields(r, a->key, a->at, b->at, names);
                if (rc == 0 && !gates)
                        rc = preset_lines(r, a, b);
                for (size_t g = 0; gates && g < n_gates && rc == 0; g++)
                        rc = compare_rows(r, a, b, &gates[g], &had[g]);
        }
        return rc;
}

int compare_judge(const struct compare_doc *a, const struct compare_doc *b, const struct compare_gate *gates,
                  size_t n_gates, bool allow_different, struct compare_result *out)
{
        bool had[16] = {false};

        *out = (struct compare_result){.a = a, .b = b, .allow_different = allow_different};
        if (n_gates > ARRAY_LEN(had))
                return err_set(-EINVAL, "compare: at most %zu metrics", ARRAY_LEN(had));
        if (a->kind != b->kind)
                return differ(out, "", "schema", json_str(json_get(a->root, "schema"), ""),
                              json_str(json_get(b->root, "schema"), ""));
        int rc = same_fields(out, "", a->root, b->root, a->kind == COMPARE_PERF ? perf_same : sweep_same);

        if (rc == 0)
                rc = unmatched(out, a, b, true);
        if (rc == 0)
                rc = unmatched(out, b, a, false);
        if (rc == 0)
                rc = matched(out, gates, n_gates, had);
        for (size_t g = 0; g < n_gates && rc == 0 && out->matched; g++)
                if (!had[g])
                        rc = err_set(-EINVAL, "compare: no row of both files has '%s'", gates[g].metric->name);
        return rc;
}

void compare_result_free(struct compare_result *r)
{
        free(r->lines);
        free(r->differences);
        free(r->invalid);
        *r = (struct compare_result){0};
}

enum compare_status compare_status_of(const struct compare_result *r)
{
        bool regression = false, unclear = false, judged = false;

        for (size_t i = 0; i < r->n_lines; i++) {
                regression |= r->lines[i].verdict == COMPARE_REGRESSION;
                unclear |= r->lines[i].verdict == COMPARE_INCONCLUSIVE;
                judged |= r->lines[i].verdict != COMPARE_INFO;
        }
        if (r->n_invalid || !judged || (r->n_differences && !r->allow_different))
                return COMPARE_STATUS_NOT_COMPARABLE;
        if (regression)
                return COMPARE_STATUS_REGRESSION;
        return unclear ? COMPARE_STATUS_INCONCLUSIVE : COMPARE_STATUS_PASS;
}
