/* compare: the comparison as a table, as JSON (djinnbench.compare/1) and as JUnit's XML for a CI's test report. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "compare_inside.h"

#define WARNINGS_SHOWN 20

static const char *status_name(enum compare_status s)
{
        switch (s) {
        case COMPARE_STATUS_PASS:
                return "pass";
        case COMPARE_STATUS_REGRESSION:
                return "regression";
        case COMPARE_STATUS_INCONCLUSIVE:
                return "inconclusive";
        case COMPARE_STATUS_NOT_COMPARABLE:
                break;
        }
        return "not comparable";
}

static const char *clean_str(const json *v, char *out, size_t size)
{
        compare_clean(json_str(v, "unknown"), out, size);
        return out;
}

/* ---- what is the same in two of the formats ---- */

static void describe(const struct compare_line *l, char *out, size_t size)
{
        int n = snprintf(out, size, "%s %.5g -> %.5g %s, ratio %.4f", l->metric->what, l->a_value, l->b_value,
                         l->metric->unit, l->ratio);

        if (l->ci.known && n > 0 && (size_t)n < size)
                n += snprintf(out + n, size - (size_t)n, " [%.4f, %.4f]", l->ci.lo, l->ci.hi);
        if (n > 0 && (size_t)n < size)
                n += snprintf(out + n, size - (size_t)n, ", gate %s%g %%", l->metric->higher_better ? "-" : "+",
                              l->gate_percent);
        if (l->reason[0] && n > 0 && (size_t)n < size)
                snprintf(out + n, size - (size_t)n, ": %s", l->reason);
}

/* ---- markdown ---- */

/* What could be markup in a cell stands behind a backslash. */
static void put_md(FILE *out, const char *text)
{
        for (; *text; text++) {
                if (strchr("\\|`*<>[]&", *text))
                        fputc('\\', out);
                fputc(*text, out);
        }
}

static void md_file(FILE *out, const char *name, const struct compare_doc *d)
{
        char path[256], host[64], commit[13], when[64];

        compare_clean(d->path, path, sizeof(path));
        fprintf(out, "%s: ", name);
        put_md(out, path);
        fprintf(out, " (commit ");
        put_md(out, clean_str(compare_at(d->root, "manifest.build.commit"), commit, sizeof(commit)));
        fprintf(out, ", host ");
        put_md(out, clean_str(compare_at(d->root, "manifest.host"), host, sizeof(host)));
        fprintf(out, ", ");
        put_md(out, clean_str(compare_at(d->root, "manifest.when"), when, sizeof(when)));
        fprintf(out, ")  \n");
}

static void md_line(FILE *out, const struct compare_line *l)
{
        fprintf(out, "| ");
        put_md(out, l->a->key);
        fprintf(out, " | ");
        put_md(out, l->metric->name);
        fprintf(out, ", %s | %.5g | %.5g | %.4f", l->metric->unit, l->a_value, l->b_value, l->ratio);
        if (l->ci.known)
                fprintf(out, " [%.4f, %.4f]%s", l->ci.lo, l->ci.hi, l->how == COMPARE_RANGE ? " range" : "");
        if (l->verdict == COMPARE_INFO)
                fprintf(out, " | none |");
        else
                fprintf(out, " | %s%g %% |", l->metric->higher_better ? "-" : "+", l->gate_percent);
        fprintf(out, " %s%s", compare_verdict_names[l->verdict], l->reason[0] ? ": " : "");
        put_md(out, l->reason);
        fprintf(out, " |\n");
}

static void md_differences(FILE *out, const char *title, const struct compare_difference *d, size_t n)
{
        if (!n)
                return;
        fprintf(out, "\n%s\n\n| what | A | B |\n|---|---|---|\n", title);
        for (size_t i = 0; i < n; i++) {
                fprintf(out, "| ");
                put_md(out, d[i].what);
                fprintf(out, " | ");
                put_md(out, d[i].a);
                fprintf(out, " | ");
                put_md(out, d[i].b);
                fprintf(out, " |\n");
        }
}

/* Warnings that the runs gave about themselves; each sentence once. */
static void md_warnings(FILE *out, const char *name, const struct compare_doc *d)
{
        char seen[WARNINGS_SHOWN][COMPARE_TEXT_MAX];
        size_t n = 0;

        for (size_t i = 0; i < d->count; i++) {
                for (const json *w = json_first(json_get(d->rows[i].at, "warnings")); w; w = json_next(w)) {
                        char text[COMPARE_TEXT_MAX];
                        size_t k = 0;

                        clean_str(w, text, sizeof(text));
                        while (k < n && strcmp(seen[k], text) != 0)
                                k++;
                        if (k < n || n == WARNINGS_SHOWN)
                                continue;
                        memcpy(seen[n++], text, sizeof(text));
                        fprintf(out, "%s%s: warning: ", n == 1 ? "\n" : "", name);
                        put_md(out, text);
                        fprintf(out, "  \n");
                }
        }
}

void compare_markdown(FILE *out, const struct compare_result *r)
{
        bool range = false, within = false;

        md_file(out, "A", r->a);
        md_file(out, "B", r->b);
        if (r->n_lines)
                fprintf(out,
                        "\n| row | metric | A | B | B/A [95 %%] | gate | verdict |\n|---|---|---|---|---|---|---|\n");
        for (size_t i = 0; i < r->n_lines; i++) {
                md_line(out, &r->lines[i]);
                range |= r->lines[i].how == COMPARE_RANGE;
                within |= r->lines[i].how == COMPARE_BOOTSTRAP && r->lines[i].within_launch;
        }
        if (range)
                fprintf(out, "\nrange: fewer than 6 repeats; the limits are those of the extremes.  \n");
        if (within)
                fprintf(out, "\nFewer than 5 launches: the intervals are within launch.  \n");
        md_differences(out, "Not valid:", r->invalid, r->n_invalid);
        md_differences(out, r->allow_different ? "Different, and allowed to be:" : "Different:", r->differences,
                       r->n_differences);
        md_warnings(out, "A", r->a);
        md_warnings(out, "B", r->b);
        fprintf(out, "\n**%s**\n", status_name(compare_status_of(r)));
}

/* ---- JSON ---- */

static json *file_json(const struct compare_doc *d)
{
        json *j = json_object();
        char text[256];

        compare_clean(d->path, text, sizeof(text));
        json_set_str(j, "path", text);
        json_set_str(j, "schema", d->kind == COMPARE_PERF ? "djinnbench.perf/1" : "djinnbench.result/1");
        json_set_str(j, "host", clean_str(compare_at(d->root, "manifest.host"), text, sizeof(text)));
        json_set_str(j, "commit", clean_str(compare_at(d->root, "manifest.build.commit"), text, sizeof(text)));
        json_set_str(j, "when", clean_str(compare_at(d->root, "manifest.when"), text, sizeof(text)));
        return j;
}

static json *side_json(double value, size_t n)
{
        json *j = json_object();

        json_set_num(j, "median", value);
        json_set_int(j, "n", (int64_t)n);
        return j;
}

static json *line_json(const struct compare_line *l)
{
        json *j = json_object(), *ci = NULL;

        json_set_str(j, "row", l->a->key);
        json_set_str(j, "metric", l->metric->name);
        json_set_str(j, "unit", l->metric->unit);
        json_set_str(j, "better", l->metric->higher_better ? "higher" : "lower");
        json_set(j, "a", side_json(l->a_value, l->a_n));
        json_set(j, "b", side_json(l->b_value, l->b_n));
        json_set_num(j, "ratio", l->ratio);
        if (l->ci.known) {
                ci = json_array();
                json_push(ci, json_of_num(l->ci.lo));
                json_push(ci, json_of_num(l->ci.hi));
        }
        json_set(j, "ci95", ci ? ci : json_of_null());
        json_set_str(j, "interval", compare_how_names[l->how]);
        json_set_bool(j, "within_launch", l->within_launch);
        json_set_num(j, "gate_percent", l->verdict == COMPARE_INFO ? NAN : l->gate_percent);
        json_set_str(j, "verdict", compare_verdict_names[l->verdict]);
        json_set_str(j, "reason", l->reason[0] ? l->reason : NULL);
        return j;
}

static json *differences_json(const struct compare_difference *d, size_t n)
{
        json *list = json_array();

        for (size_t i = 0; i < n; i++) {
                json *j = json_object();

                json_set_str(j, "what", d[i].what);
                json_set_str(j, "a", d[i].a);
                json_set_str(j, "b", d[i].b);
                json_push(list, j);
        }
        return list;
}

void compare_json(FILE *out, const struct compare_result *r)
{
        json *j = json_object(), *lines = json_array();
        enum compare_status status = compare_status_of(r);

        json_set_str(j, "schema", "djinnbench.compare/1");
        json_set_str(j, "verdict", status_name(status));
        json_set_int(j, "status", status);
        json_set(j, "a", file_json(r->a));
        json_set(j, "b", file_json(r->b));
        json_set_bool(j, "allow_different", r->allow_different);
        for (size_t i = 0; i < r->n_lines; i++)
                json_push(lines, line_json(&r->lines[i]));
        json_set(j, "rows", lines);
        json_set(j, "invalid", differences_json(r->invalid, r->n_invalid));
        json_set(j, "different", differences_json(r->differences, r->n_differences));
        char *text = json_text(j, true);

        fprintf(out, "%s\n", text ? text : "");
        free(text);
        json_free(j);
}

/* ---- JUnit ---- */

/* The text is printable ASCII already (compare_clean), so five characters are all that XML wants escaped. */
static void put_xml(FILE *out, const char *text)
{
        static const char special[] = "&<>\"'";
        static const char *const entity[] = {"&amp;", "&lt;", "&gt;", "&quot;", "&apos;"};

        for (; *text; text++) {
                const char *at = strchr(special, *text);

                if (at)
                        fputs(entity[at - special], out);
                else
                        fputc(*text, out);
        }
}

static void junit_case(FILE *out, const char *class, const char *name, const char *kind, const char *message)
{
        fprintf(out, "    <testcase classname=\"djinnbench.compare.%s\" name=\"", class);
        put_xml(out, name);
        if (!kind) {
                fprintf(out, "\"><system-out>");
                put_xml(out, message);
                fprintf(out, "</system-out></testcase>\n");
                return;
        }
        fprintf(out, "\"><%s message=\"", kind);
        put_xml(out, message);
        fprintf(out, "\"/></testcase>\n");
}

static void junit_line(FILE *out, const struct compare_line *l)
{
        /* An unclear comparison is an error, not a failure: nothing was found to be worse. */
        static const char *const kind[] = {NULL, "failure", "error", NULL};
        char name[COMPARE_KEY_MAX + 32], text[512];

        snprintf(name, sizeof(name), "%s %s", l->a->key, l->metric->name);
        describe(l, text, sizeof(text));
        junit_case(out, compare_verdict_names[l->verdict], name, kind[l->verdict], text);
}

static void junit_different(FILE *out, const char *class, const struct compare_difference *d, size_t n, bool allowed)
{
        char text[2 * COMPARE_TEXT_MAX + 32];

        for (size_t i = 0; i < n; i++) {
                snprintf(text, sizeof(text), "A: %s; B: %s", d[i].a, d[i].b);
                junit_case(out, class, d[i].what, allowed ? NULL : "error", text);
        }
}

void compare_junit(FILE *out, const struct compare_result *r)
{
        size_t failures = 0, errors = r->n_invalid + (r->allow_different ? 0 : r->n_differences);
        size_t tests = r->n_lines + r->n_invalid + r->n_differences + 1;
        enum compare_status status = compare_status_of(r);
        bool comparable = status != COMPARE_STATUS_NOT_COMPARABLE;

        for (size_t i = 0; i < r->n_lines; i++) {
                failures += r->lines[i].verdict == COMPARE_REGRESSION;
                errors += r->lines[i].verdict == COMPARE_INCONCLUSIVE;
        }
        fprintf(out,
                "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuites>\n  <testsuite name=\"djinnbench compare\" "
                "tests=\"%zu\" failures=\"%zu\" errors=\"%zu\">\n",
                tests, failures, errors + !comparable);
        junit_case(out, "comparable", "the two runs can be compared", comparable ? NULL : "error", status_name(status));
        junit_different(out, "invalid", r->invalid, r->n_invalid, false);
        junit_different(out, "different", r->differences, r->n_differences, r->allow_different);
        for (size_t i = 0; i < r->n_lines; i++)
                junit_line(out, &r->lines[i]);
        fprintf(out, "  </testsuite>\n</testsuites>\n");
}
