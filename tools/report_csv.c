/* RFC 4180 but for the line ends, which are those of Unix. An estimate takes three fields: KEY, KEY_lo, KEY_hi. Numbers
 * have as many digits as reading back the same double needs; what is missing is empty. */
#include "report_inside.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* A spreadsheet takes a text that begins with one of these for a formula, which could be any command. */
static bool looks_like_formula(const char *s)
{
        s += strspn(s, " ");
        return *s && strchr("=+-@\t\r\n", *s);
}

static void put_text(FILE *out, const char *s)
{
        bool guard = looks_like_formula(s), quote = guard || strpbrk(s, "\",;\r\n\t '");

        fputs(guard ? "\"'" : quote ? "\"" : "", out);
        for (; *s; s++) {
                if (*s == '"')
                        fputs("\"\"", out);
                else
                        fputc((unsigned char)*s < 0x20 || *s == 0x7f ? ' ' : *s, out);
        }
        if (quote)
                fputc('"', out);
}

static void put_number(FILE *out, double v)
{
        char text[40];

        if (!isfinite(v))
                return;
        for (int digits = 15; digits <= 17; digits++) {
                snprintf(text, sizeof(text), "%.*g", digits, v);
                if (strtod(text, NULL) == v)
                        break;
        }
        fputs(text, out);
}

static void put_cell(FILE *out, const struct report_column *column, const struct report_cell *cell)
{
        if (!cell->missing && column->kind == REPORT_TEXT)
                put_text(out, cell->text);
        else if (!cell->missing)
                put_number(out, cell->value);
        if (column->kind != REPORT_ESTIMATE)
                return;
        fputc(',', out);
        if (!cell->missing && cell->interval)
                put_number(out, cell->lo);
        fputc(',', out);
        if (!cell->missing && cell->interval)
                put_number(out, cell->hi);
}

static void put_title(FILE *out, const char *title, const char *suffix)
{
        char key[REPORT_TEXT_MAX];

        snprintf(key, sizeof(key), "%.400s%s", title, suffix);
        put_text(out, key);
}

static void put_head(FILE *out, const struct report_view *view)
{
        const char *comma = "";

        for (size_t c = 0; c < view->ncolumns; c++) {
                const struct report_column *column = &view->columns[c];
                char title[REPORT_TEXT_MAX];

                if (!(column->where & REPORT_IN_CSV))
                        continue;
                report_title(view, column, true, title, sizeof(title));
                fputs(comma, out);
                put_title(out, title, "");
                if (column->kind == REPORT_ESTIMATE) {
                        fputc(',', out);
                        put_title(out, title, "_lo");
                        fputc(',', out);
                        put_title(out, title, "_hi");
                }
                comma = ",";
        }
        fputc('\n', out);
}

int report_csv(FILE *out, const struct report_view *view)
{
        put_head(out, view);
        for (size_t r = 0; r < view->nrows; r++) {
                const char *comma = "";

                for (size_t c = 0; c < view->ncolumns; c++) {
                        const struct report_column *column = &view->columns[c];
                        struct report_cell cell = {.missing = true};

                        if (!(column->where & REPORT_IN_CSV))
                                continue;
                        fputs(comma, out);
                        column->get(&view->rows[r], column, &cell);
                        put_cell(out, column, &cell);
                        comma = ",";
                }
                fputc('\n', out);
        }
        return 0;
}
