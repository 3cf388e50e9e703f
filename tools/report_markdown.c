/* GitHub's Markdown, padded so that the columns stand under one another on a terminal too. The full table has more
 * columns than a line can hold: there each quantity is a line and each row of the results a column. */
#include "report_inside.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "err.h"

#define ESCAPED_MAX (2 * REPORT_TEXT_MAX)

/* A table of texts, lines by columns, escaped already. */
struct grid {
        char **text;
        bool *right; /* per column */
        size_t lines, columns;
};

/* ---- escaping ---- */

/* Bytes of the UTF-8 character at s; 0 when it is none, as where a text was cut in the middle of one. */
static size_t utf8_len(const char *s)
{
        unsigned char c = (unsigned char)s[0];
        size_t len = c < 0x80                ? 1
                     : c >= 0xc2 && c < 0xe0 ? 2
                     : c >= 0xe0 && c < 0xf0 ? 3
                     : c >= 0xf0 && c < 0xf5 ? 4
                                             : 0;

        for (size_t i = 1; i < len; i++)
                if (((unsigned char)s[i] & 0xc0) != 0x80)
                        return 0;
        return len;
}

/* Control characters (those of C1 too), which move a terminal's cursor, and the marks that turn the direction of text
 * and so could hide what a line says. */
static bool is_control(const char *s, size_t len)
{
        unsigned char c = (unsigned char)s[0], d = len > 1 ? (unsigned char)s[1] : 0,
                      e = len > 2 ? (unsigned char)s[2] : 0;

        if (len == 1)
                return c < 0x20 || c == 0x7f;
        if (len == 2)
                return c == 0xc2 && d < 0xa0;
        return c == 0xe2 && ((d == 0x80 && (e == 0xa8 || e == 0xa9 || (e >= 0xaa && e <= 0xae))) ||
                             (d == 0x81 && e >= 0xa6 && e <= 0xa9));
}

/* Our own intervals "[lo, hi]" are no links, because nothing that could make them one follows: brackets stay, and what
 * would follow, a parenthesis or colon right behind one, is parted from it. */
static void escape(const char *s, size_t shown, char *out, size_t size)
{
        size_t at = 0;
        char before = ' ';

        for (size_t n = 0, len; *s && at + 8 < size; s += len, n++) {
                len = utf8_len(s);
                if (n == shown) {
                        memcpy(out + at, "…", strlen("…"));
                        at += strlen("…");
                        break;
                }
                if (before == ']' && (*s == '(' || *s == '[' || *s == ':'))
                        out[at++] = ' ';
                if (len == 0 || is_control(s, len)) {
                        out[at++] = len ? ' ' : '?';
                        len = len ? len : 1;
                        before = ' ';
                        continue;
                }
                if (len == 1 && strchr("\\`*<>|~#", *s))
                        out[at++] = '\\';
                memcpy(out + at, s, len);
                at += len;
                before = *s;
        }
        out[at] = '\0';
}

/* ---- the grid ---- */

static size_t shown_width(const char *s)
{
        size_t n = 0;

        for (; *s; s++)
                n += ((unsigned char)*s & 0xc0) != 0x80;
        return n;
}

static char **cell_at(const struct grid *g, size_t line, size_t column)
{
        return &g->text[line * g->columns + column];
}

static int grid_make(struct grid *g, size_t lines, size_t columns)
{
        *g = (struct grid){.lines = lines, .columns = columns};
        g->text = calloc(lines * columns, sizeof(*g->text));
        g->right = calloc(columns, sizeof(*g->right));
        return g->text && g->right ? 0 : err_set(-ENOMEM, "report: no memory for a table of %zu rows", lines);
}

static void grid_free(struct grid *g)
{
        for (size_t i = 0; g->text && i < g->lines * g->columns; i++)
                free(g->text[i]);
        free(g->text);
        free(g->right);
}

static int grid_set(struct grid *g, size_t line, size_t column, const char *text, size_t shown)
{
        char escaped[ESCAPED_MAX];

        escape(text, shown, escaped, sizeof(escaped));
        char *copy = strdup(escaped);

        *cell_at(g, line, column) = copy;
        return copy ? 0 : err_set(-ENOMEM, "report: no memory for a table's text");
}

static size_t column_width(const struct grid *g, size_t column)
{
        size_t widest = 3; /* of "---" */

        for (size_t line = 0; line < g->lines; line++) {
                size_t w = shown_width(*cell_at(g, line, column));

                widest = w > widest ? w : widest;
        }
        return widest;
}

static void pad(FILE *out, size_t n, char c)
{
        while (n--)
                fputc(c, out);
}

static void put_line(FILE *out, const struct grid *g, size_t line, const size_t *width)
{
        for (size_t c = 0; c < g->columns; c++) {
                const char *text = *cell_at(g, line, c);
                size_t space = width[c] - shown_width(text);

                fputs("| ", out);
                pad(out, g->right[c] ? space : 0, ' ');
                fputs(text, out);
                pad(out, g->right[c] ? 0 : space, ' ');
                fputc(' ', out);
        }
        fputs("|\n", out);
}

static int put_grid(FILE *out, const struct grid *g)
{
        size_t *width = calloc(g->columns, sizeof(*width));

        if (!width)
                return err_set(-ENOMEM, "report: no memory for a table's widths");
        for (size_t c = 0; c < g->columns; c++)
                width[c] = column_width(g, c);
        put_line(out, g, 0, width);
        for (size_t c = 0; c < g->columns; c++) {
                fputs("| ", out);
                pad(out, width[c] - 1, '-');
                fputs(g->right[c] ? ": " : "- ", out);
        }
        fputs("|\n", out);
        for (size_t line = 1; line < g->lines; line++)
                put_line(out, g, line, width);
        free(width);
        return 0;
}

/* ---- tables ---- */

static bool has_value(const struct report_view *view, const struct report_column *column)
{
        for (size_t r = 0; r < view->nrows; r++) {
                struct report_cell cell = {.missing = true};

                column->get(&view->rows[r], column, &cell);
                if (!cell.missing)
                        return true;
        }
        return false;
}

/* Of the full table a line that no row has a value for says nothing; the columns of the others always stand. */
static bool is_shown(const struct report_view *view, const struct report_column *column, bool turned)
{
        return (column->where & REPORT_IN_TEXT) && (!turned || has_value(view, column));
}

static size_t shown_columns(const struct report_view *view, bool turned)
{
        size_t n = 0;

        for (size_t c = 0; c < view->ncolumns; c++)
                n += is_shown(view, &view->columns[c], turned);
        return n;
}

static int set_cell(struct grid *g, size_t line, size_t at, const struct report_row *row,
                    const struct report_column *column)
{
        struct report_cell cell = {.missing = true};
        size_t shown = column->kind != REPORT_TEXT ? REPORT_TEXT_MAX : column->shown ? column->shown : REPORT_SHOWN_MAX;
        char text[REPORT_TEXT_MAX];

        column->get(row, column, &cell);
        report_cell_text(column, &cell, text, sizeof(text));
        return grid_set(g, line, at, text, shown);
}

/* turned: quantities are lines and rows are columns. */
static int fill(struct grid *g, const struct report_view *view, bool turned)
{
        int rc = 0;

        for (size_t c = 0, at = 0; c < view->ncolumns && rc == 0; c++) {
                const struct report_column *column = &view->columns[c];
                char title[REPORT_TEXT_MAX];

                if (!is_shown(view, column, turned))
                        continue;
                report_title(view, column, false, title, sizeof(title));
                rc = grid_set(g, turned ? at : 0, turned ? 0 : at, title, REPORT_TEXT_MAX);
                if (!turned)
                        g->right[at] = column->kind != REPORT_TEXT;
                for (size_t r = 0; r < view->nrows && rc == 0; r++)
                        rc = set_cell(g, turned ? at : r + 1, turned ? r + 1 : at, &view->rows[r], column);
                at++;
        }
        for (size_t c = 1; turned && c < g->columns; c++)
                g->right[c] = true;
        return rc;
}

static int put_table(FILE *out, const struct report_view *view, bool turned)
{
        size_t quantities = shown_columns(view, turned);
        struct grid g;

        if (quantities == 0)
                return 0;
        int rc = turned ? grid_make(&g, quantities, view->nrows + 1) : grid_make(&g, view->nrows + 1, quantities);

        if (rc == 0)
                rc = fill(&g, view, turned);
        if (rc == 0)
                rc = put_grid(out, &g);
        grid_free(&g);
        return rc;
}

static void put_escaped(FILE *out, const char *before, const char *text)
{
        char escaped[2 * ESCAPED_MAX];

        escape(text, ESCAPED_MAX, escaped, sizeof(escaped));
        fprintf(out, "%s%s\n", before, escaped);
}

/* What the config asked for: "prompt_length=32, new_tokens=16, batch_size=1". */
static void put_work(FILE *out, const json *spec)
{
        static const char *const elsewhere[] = {"implementation", "model_id",  "prompt_text",
                                                "prompt_file",    "unit_name", "generation"};
        char line[REPORT_TEXT_MAX] = "one request";
        size_t len = 0;

        for (const json *p = json_first(spec); p && len < sizeof(line); p = json_next(p)) {
                char number[32];
                size_t i = 0;

                while (i < ARRAY_LEN(elsewhere) && strcmp(elsewhere[i], json_key(p)) != 0)
                        i++;
                if (i < ARRAY_LEN(elsewhere) || (!json_is_num(p) && !json_str(p, NULL)))
                        continue;
                snprintf(number, sizeof(number), "%.15g", json_num(p, 0));
                len += (size_t)snprintf(line + len, sizeof(line) - len, "%s%.64s=%.64s", len ? ", " : "", json_key(p),
                                        json_is_num(p) ? number : json_str(p, ""));
        }
        put_escaped(out, "**Task**: ", line);
}

/* "8", "4 to 8", or "no", of the rows that have the value. */
static void put_range(const struct report_view *view, const char *path, char *out, size_t size)
{
        double lo = INFINITY, hi = -INFINITY;

        for (size_t r = 0; r < view->nrows; r++) {
                const json *v = report_at(view->rows[r].row, path);

                if (!json_is_num(v))
                        continue;
                lo = fmin(lo, json_num(v, 0));
                hi = fmax(hi, json_num(v, 0));
        }
        if (lo > hi)
                snprintf(out, size, "no");
        else if (lo < hi)
                snprintf(out, size, "%.15g to %.15g", lo, hi);
        else
                snprintf(out, size, "%.15g", lo);
}

/* What the file holds, which an interruption or --runs makes another number than the config's. */
static void put_runs(FILE *out, const struct report_view *view)
{
        const json *doc = view->sources[0].doc;
        char requests[64], warmup[64], line[REPORT_TEXT_MAX];

        put_range(view, "aggregates.latency_ms.n", requests, sizeof(requests));
        put_range(view, "warmup.requests", warmup, sizeof(warmup));
        snprintf(line, sizeof(line), "%zu blocks; %s requests and %s before them as warm-up per row, on %.32s in %.32s",
                 json_count(report_at(doc, "manifest.blocks")), requests, warmup,
                 json_str(report_at(doc, "experiment.device"), "?"), json_str(report_at(doc, "experiment.dtype"), "?"));
        put_escaped(out, "**Runs**: ", line);
}

/* The lines above the experiment's sample table. */
static void put_task(FILE *out, const struct report_view *view, bool ambiguous)
{
        const json *doc = view->sources[0].doc, *spec = NULL;
        char name[REPORT_TEXT_MAX];

        for (size_t r = 0; r < view->nrows && json_count(spec) == 0; r++)
                spec = report_at(view->rows[r].row, "metadata.spec");
        report_workload(doc, ambiguous, name);
        put_escaped(out, "### ", name);
        fputc('\n', out);
        put_escaped(out, "**Model**: ", json_str(json_get(spec, "model_id"), "none"));
        put_work(out, spec);
        put_runs(out, view);
        fputc('\n', out);
}

static bool is_ambiguous(const struct report_view *view, const struct report_source *source)
{
        for (size_t r = 0; r < view->nrows; r++)
                if (view->rows[r].source == source)
                        return view->rows[r].ambiguous;
        return false;
}

/* A table of its own per result. */
static int put_apart(FILE *out, const struct report_view *view)
{
        int rc = 0;

        for (size_t i = 0; i < view->nsources && rc == 0; i++) {
                bool ambiguous = is_ambiguous(view, &view->sources[i]);
                struct report_view one;

                rc = report_view_make(&view->sources[i], 1, view->table, &one);
                for (size_t r = 0; rc == 0 && r < one.nrows; r++)
                        one.rows[r].ambiguous = ambiguous;
                if (rc == 0 && view->table == REPORT_TABLE_SAMPLE)
                        put_task(out, &one, ambiguous);
                if (rc == 0)
                        rc = put_table(out, &one, view->table == REPORT_TABLE_FULL);
                fputc('\n', out);
                report_view_free(&one);
        }
        return rc;
}

static void put_note(void *ctx, const char *line)
{
        put_escaped(ctx, "- ", line);
}

int report_markdown(FILE *out, const struct report_view *view)
{
        int rc = view->table == REPORT_TABLE_1 ? put_table(out, view, false) : put_apart(out, view);

        if (rc < 0)
                return rc;
        if (view->table == REPORT_TABLE_1)
                fputc('\n', out);
        report_notes(view, put_note, out);
        return 0;
}
