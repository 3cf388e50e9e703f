/*
 * Inside of report: rows, columns and notes, which every output format walks in the same way. A table is an array of
 * columns; a format is one file with one function. Nothing here escapes: that is each format's duty, and every text of
 * a cell, a title or a note may come from a hostile file.
 */
#ifndef DJINN_TOOLS_REPORT_INSIDE_H
#define DJINN_TOOLS_REPORT_INSIDE_H

#include "report.h"

#define REPORT_SCHEMA    "djinnbench.result/1"
#define REPORT_TEXT_MAX  512 /* bytes of a text that is put together here; longer ones are cut */
#define REPORT_SHOWN_MAX 40  /* characters of a text in a cell; the notes and the other formats have the rest */

struct report_row {
        const struct report_source *source;
        const json *doc, *row;
        const json *native; /* the reference's row in the same document, or NULL */
        bool ambiguous;     /* another document of this report has the same workload */
};

enum report_kind { REPORT_TEXT, REPORT_NUMBER, REPORT_ESTIMATE };

/* A value that was not measured is missing, which is not 0 and is never printed as such. */
struct report_cell {
        bool missing;
        double value;
        bool interval; /* lo and hi are known */
        double lo, hi;
        const char *text; /* points into the document or at own */
        char own[REPORT_TEXT_MAX];
};

enum { REPORT_IN_TEXT = 1, REPORT_IN_CSV = 2, REPORT_IN_ALL = 3 };

struct report_view;

struct report_column {
        const char *key;       /* heading for programs, units last */
        const char *header;    /* heading for people */
        const char *unit;      /* after it, in brackets; NULL: none */
        enum report_kind kind; /* texts stand left, numbers right; an estimate takes three fields in CSV */
        unsigned where;
        int decimals;    /* for people; negative: as many as it takes, at most that many significant ones */
        size_t shown;    /* for people at most so many characters of a text; 0: REPORT_SHOWN_MAX */
        bool value_only; /* for people an estimate without its interval, which CSV has */
        bool about_zero; /* for people an interval that contains 0 says so */
        void (*get)(const struct report_row *row, const struct report_column *column, struct report_cell *out);
        const char *path; /* for get: "wire.up.payload_bytes" from the row, "/manifest.host" from the document */
        double scale;     /* for get: the value is multiplied by it; 0: 1 */
        /* Where the heading depends on the rows: replaces header (csv false) or key (csv true). NULL: it does not. */
        void (*title)(const struct report_view *view, const struct report_column *column, bool csv, char *out,
                      size_t size);
};

struct report_view {
        enum report_table table;
        const struct report_column *columns;
        size_t ncolumns;
        const struct report_source *sources;
        size_t nsources;
        struct report_row *rows;
        size_t nrows;
};

/* ---- report_table.c ---- */
int report_view_make(const struct report_source *sources, size_t n, enum report_table table, struct report_view *out);
void report_view_free(struct report_view *view);
/* Columns that a person (or a program: csv) sees; the heading without its unit. */
void report_title(const struct report_view *view, const struct report_column *column, bool csv, char *out, size_t size);
/* Value at a dotted path; absent or null anywhere on it: NULL. */
const json *report_at(const json *from, const char *path);
/* The workload's name; with tag and time where another document of this report has the same. */
void report_workload(const json *doc, bool ambiguous, char out[REPORT_TEXT_MAX]);
/* "–" for a missing number; without exponents below 1e15. */
void report_number(char *out, size_t size, double value, int decimals);
/* Microseconds with that many decimals, below 10 with at least three significant digits (down to 0.001). */
void report_us(char *out, size_t size, double value, int decimals);
/* The cell as people read it, not escaped: "3.1 [2.8, 3.4]". */
void report_cell_text(const struct report_column *column, const struct report_cell *cell, char *out, size_t size);

/* ---- report_notes.c: what stands under a table: reasons, warnings, noise floor, commit and hashes ---- */
typedef void report_put(void *ctx, const char *line);
void report_notes(const struct report_view *view, report_put *put, void *ctx);

/* ---- one file per format ---- */
int report_markdown(FILE *out, const struct report_view *view);
int report_csv(FILE *out, const struct report_view *view);
int report_json(FILE *out, const struct report_view *view);

#endif
