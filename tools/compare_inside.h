/*
 * The parts of djinnbench compare. Two documents of one kind (djinnbench.perf/1 or djinnbench.result/1) are read as rows
 * with a key each; rows of one key are compared by the metrics that have a gate. Documents are untrusted: what is
 * printed of them has gone through compare_clean.
 */
#ifndef DJINN_COMPARE_INSIDE_H
#define DJINN_COMPARE_INSIDE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "json.h"
#include "stats.h"

#define COMPARE_KEY_MAX  320 /* more than every field of a key at its longest */
#define COMPARE_TEXT_MAX 160
#define COMPARE_ROWS_MAX 4096

/* ---- compare_read.c ---- */

enum compare_kind { COMPARE_PERF, COMPARE_SWEEP };

struct compare_row {
        const json *at;
        char key[COMPARE_KEY_MAX];      /* "shm lat send 64 B depth 1": equal for rows that measure the same */
        char invalid[COMPARE_TEXT_MAX]; /* why its figures must not be used; "": they may */
        bool raw;                       /* the bare medium: shown, never judged */
        bool skipped;                   /* a sweep's row without figures, and the reason is in `invalid` */
        const char *weak;               /* FEW or UNSTEADY: judged inconclusive at best; else NULL */
};

struct compare_doc {
        json *root;
        const char *path; /* the caller's */
        enum compare_kind kind;
        struct compare_row *rows;          /* in the file's order, no two of one key */
        const struct compare_row **sorted; /* the same, by key */
        size_t count;
};

struct compare_metric {
        const char *name, *also; /* as in --metric; a second spelling, or NULL */
        const char *unit, *what;
        bool higher_better;
        const char *test; /* gated without --metric in rows of this perf test ("sweep": of a sweep), or NULL */
        double preset_percent;
        /* Where the figure is: per repeat in replicates[], and of the row as a whole. Two spellings each. */
        const char *replicate[2], *group[2], *field;
};

extern const struct compare_metric compare_metrics[]; /* ends with name NULL */
/* NULL where documents of that kind have no such metric. */
const struct compare_metric *compare_metric_find(const char *name, enum compare_kind kind);

/* One figure of one row. */
struct compare_series {
        double *v;        /* per repeat (perf) or per run (sweep), in order of time; NULL where n is 0 */
        uint32_t *launch; /* which launch each belongs to */
        size_t n;
        double
            value; /* median of v, or what the row says where there are no repeats; NaN: the row has no such figure */
};

/* Reads and checks a file: 0, or -errno with a sentence. compare_doc_free in either case. */
int compare_doc_load(const char *path, struct compare_doc *out);
/* The same of a parsed document, which *out owns from then on. */
int compare_doc_take(json *root, const char *path, struct compare_doc *out);
void compare_doc_free(struct compare_doc *doc);
const struct compare_row *compare_doc_find(const struct compare_doc *doc, const char *key);
/* 0, or -EINVAL with a sentence where the row holds what is no figure. compare_series_free in either case. */
int compare_series_of(const struct compare_doc *doc, const struct compare_row *row, const struct compare_metric *metric,
                      struct compare_series *out);
void compare_series_free(struct compare_series *s);
/* "manifest.cpu.model": NULL where it leads nowhere; a JSON null where the file says so. */
const json *compare_at(const json *from, const char *dotted);
/* Printable ASCII only, cut to the room: terminals, tables and XML get nothing of a file that could be a command. */
void compare_clean(const char *text, char *out, size_t size);

/* ---- compare_judge.c ---- */

enum compare_verdict { COMPARE_PASS, COMPARE_REGRESSION, COMPARE_INCONCLUSIVE, COMPARE_INFO };

extern const char *const compare_verdict_names[];

struct compare_gate {
        const struct compare_metric *metric;
        double percent; /* how much worse is still good */
};

/* What an interval is made of: nothing; the extremes of a few repeats; each side's bootstrap. */
enum compare_how { COMPARE_NONE, COMPARE_RANGE, COMPARE_BOOTSTRAP };

extern const char *const compare_how_names[];

struct compare_line {
        const struct compare_row *a, *b;
        const struct compare_metric *metric;
        double a_value, b_value, ratio; /* B/A */
        size_t a_n, b_n;
        struct interval ci; /* of the ratio */
        enum compare_how how;
        bool within_launch; /* fewer than 5 launches: says nothing of what a restart changes */
        double gate_percent;
        enum compare_verdict verdict;
        char reason[COMPARE_TEXT_MAX]; /* of an inconclusive verdict; else "" */
};

struct compare_difference {
        char what[COMPARE_KEY_MAX + 64], a[COMPARE_TEXT_MAX], b[COMPARE_TEXT_MAX];
};

struct compare_result {
        const struct compare_doc *a, *b;
        bool allow_different;
        size_t matched; /* valid rows that both have */
        struct compare_line *lines;
        size_t n_lines, room_lines;
        struct compare_difference *differences; /* host, device, build, config; and rows of one file only */
        size_t n_differences, room_differences;
        struct compare_difference *invalid; /* what = key; a, b = the reasons */
        size_t n_invalid, room_invalid;
};

enum compare_status {
        COMPARE_STATUS_PASS = 0,
        COMPARE_STATUS_REGRESSION = 1,
        COMPARE_STATUS_INCONCLUSIVE = 4,
        COMPARE_STATUS_NOT_COMPARABLE = 5
};

/* gates: those asked for, or NULL for the preset ones. 0, or -errno with a sentence (-EINVAL: a file that is wrong, or a
 * metric that no row has). compare_result_free in either case; *out refers to both documents. */
int compare_judge(const struct compare_doc *a, const struct compare_doc *b, const struct compare_gate *gates,
                  size_t n_gates, bool allow_different, struct compare_result *out);
void compare_result_free(struct compare_result *r);
enum compare_status compare_status_of(const struct compare_result *r);

/* ---- compare_print.c ---- */

void compare_markdown(FILE *out, const struct compare_result *r);
void compare_json(FILE *out, const struct compare_result *r);
void compare_junit(FILE *out, const struct compare_result *r);

#endif
