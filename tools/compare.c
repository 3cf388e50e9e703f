/* djinnbench compare: two runs of perf or sweep side by side, with a gate on each figure, for people and for a CI. */
#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "compare_inside.h"
#include "conf.h"
#include "err.h"
#include "tools.h"

#define GATES_MAX   16
#define PERCENT_MAX 1000.0

struct compare_options {
        struct opt_list metrics;
        int format;
        bool allow_different;
};

static const char *const format_names[] = {"markdown", "json", "junit", NULL};
static void (*const formats[])(FILE *, const struct compare_result *) = {compare_markdown, compare_json, compare_junit};

static const struct opt table[] = {
    {.name = "metric",
     .metavar = "NAME:PERCENT",
     .type = OPT_LIST,
     .offset = offsetof(struct compare_options, metrics),
     .help =
         "gates instead of the preset ones (p50:5 of lat, gbytes_s:5 of bw, messages_s:5 of rate, latency_ms:5 of a "
         "sweep): how much worse B may be; also p90 to p9999"},
    {.name = "format",
     .type = OPT_CHOICE,
     .offset = offsetof(struct compare_options, format),
     .choices = format_names,
     .preset = "markdown",
     .help = "of the comparison, on standard output"},
    {.name = "allow-different",
     .type = OPT_FLAG,
     .offset = offsetof(struct compare_options, allow_different),
     .help =
         "compare also what differs in host, device, build or configuration, and the rows that both have; never what "
         "is invalid"},
};

const struct opts_spec compare_spec = {
    .name = "djinnbench compare",
    .usage = "A B [--metric NAME:PERCENT...] [options]",
    .about =
        "Compares two files of perf --json, or of one workload of a sweep, row by row: B against A. A row passes "
        "where the whole 95 % interval of B/A is on the good side of the gate, and is a regression where the whole "
        "interval is on the bad side. The interval comes from the repeats of both runs: perf --repeats 6 or more "
        "(3 to 5 give the range of their extremes). What differs between two runs of one program an hour apart is in "
        "no interval: take both in turn on a quiet machine. The commit may differ.\n\n"
        "Exit status: 0 pass, 1 regression, 2 wrong use, 4 inconclusive, 5 not comparable.",
    .table = table,
    .count = ARRAY_LEN(table),
    .args_min = 2,
    .args_max = 2,
    .args_what = "two result files, A and B",
};

const struct exit_text compare_exits[] = {
    {COMPARE_STATUS_PASS, "every row passes its gate"},
    {COMPARE_STATUS_REGRESSION, "a row is worse than its gate allows"},
    {EXIT_USAGE, "wrong use: an option, or a file that is none of perf's or sweep's"},
    {EXIT_ENVIRONMENT, "the comparison could not be written"},
    {COMPARE_STATUS_INCONCLUSIVE, "nothing is worse for certain, but the interval of a row holds its gate"},
    {COMPARE_STATUS_NOT_COMPARABLE, "a row is invalid, or host, device, build or configuration differ"},
    {0, NULL},
};

static int unknown_metric(const char *name, enum compare_kind kind)
{
        const char *names[GATES_MAX], *nearest;
        size_t n = 0;

        for (const struct compare_metric *m = compare_metrics; m->name && n + 1 < ARRAY_LEN(names); m++)
                if (compare_metric_find(m->name, kind))
                        names[n++] = m->name;
        names[n] = NULL;
        nearest = conf_nearest(name, names);
        return err_set(-EINVAL, "--metric %.40s: %s has no such figure; %s%s", name,
                       kind == COMPARE_PERF ? "a perf result" : "a sweep's result",
                       nearest ? "did you mean " : "it has ", nearest ? nearest : names[0]);
}

/* NAME:PERCENT, with or without a percent sign. */
static int gate_parse(const char *text, enum compare_kind kind, struct compare_gate *out)
{
        size_t n = strcspn(text, ":");
        char name[64], *end;

        if (text[n] != ':' || n == 0 || n >= sizeof(name))
                return err_set(-EINVAL, "--metric %.60s: expected NAME:PERCENT, as p99:10", text);
        memcpy(name, text, n);
        name[n] = '\0';
        out->percent = strtod(text + n + 1, &end);
        if (end == text + n + 1 || (*end && strcmp(end, "%") != 0) ||
            !(out->percent >= 0 && out->percent <= PERCENT_MAX))
                return err_set(-EINVAL, "--metric %.60s: the percentage must be a number from 0 to %g", text,
                               PERCENT_MAX);
        out->metric = compare_metric_find(name, kind);
        return out->metric ? 0 : unknown_metric(name, kind);
}

static int gates_parse(const struct opt_list *list, enum compare_kind kind, struct compare_gate *gates)
{
        if (list->count > GATES_MAX)
                return err_set(-EINVAL, "--metric: at most %d", GATES_MAX);
        for (size_t i = 0; i < list->count; i++) {
                int rc = gate_parse(list->at[i], kind, &gates[i]);

                if (rc < 0)
                        return rc;
                for (size_t j = 0; j < i; j++)
                        if (gates[j].metric == gates[i].metric)
                                return err_set(-EINVAL, "--metric %.60s: named twice", list->at[i]);
        }
        return 0;
}

static int run(const struct compare_options *o, const struct compare_doc *a, const struct compare_doc *b)
{
        struct compare_gate gates[GATES_MAX];
        struct compare_result result = {0};
        int rc = gates_parse(&o->metrics, a->kind, gates);

        if (rc == 0)
                rc =
                    compare_judge(a, b, o->metrics.count ? gates : NULL, o->metrics.count, o->allow_different, &result);
        int status = rc < 0 ? command_fail(&compare_spec, rc, EXIT_USAGE) : (int)compare_status_of(&result);

        if (rc == 0)
                formats[o->format](stdout, &result);
        if (rc == 0 && (fflush(stdout) != 0 || ferror(stdout)))
                status = command_fail(&compare_spec, err_set(-EIO, "cannot write the comparison: %s", strerror(errno)),
                                      EXIT_ENVIRONMENT);
        compare_result_free(&result);
        return status;
}

int compare_main(int argc, char **argv)
{
        struct compare_options o = {0};
        struct opts_parsed parsed;
        struct compare_doc a = {0}, b = {0};
        int status = command_parse(&compare_spec, argc, argv, &o, &parsed);

        if (status == COMMAND_GO_ON) {
                int rc = compare_doc_load(parsed.args[0], &a);

                if (rc == 0)
                        rc = compare_doc_load(parsed.args[1], &b);
                status = rc < 0 ? command_fail(&compare_spec, rc, EXIT_USAGE) : run(&o, &a, &b);
        }
        compare_doc_free(&a);
        compare_doc_free(&b);
        opts_free(&compare_spec, &o, &parsed);
        return status;
}
