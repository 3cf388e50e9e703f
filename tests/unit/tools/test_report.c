/* report: hostile documents, numbers, escaping, titles. The tables of a good document are compared with golden files
 * by tests/e2e/test_report.py. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "err.h"
#include "report_inside.h"

#define ROWS_KEPT 2 /* of the example's: native and one beside it */

static json *example;

/* A copy of v in which the *left-th value is replaced; rows beyond ROWS_KEPT and raw samples are dropped. */
static json *mutated(const json *v, const char *key, const json *instead, size_t *left)
{
        size_t index = 0;
        bool rows = key && strcmp(key, "results") == 0;

        if ((*left)-- == 0)
                return json_copy(instead);
        if (!json_is_object(v) && !json_is_array(v))
                return json_copy(v);
        json *copy = json_is_object(v) ? json_object() : json_array();

        if (key && (strcmp(key, "runs") == 0 || strcmp(key, "blocks") == 0) && json_is_array(v))
                return copy;
        for (const json *e = json_first(v); e && !(rows && index == ROWS_KEPT); e = json_next(e), index++) {
                json *child = mutated(e, json_key(e), instead, left);

                if (json_is_object(v))
                        json_set(copy, json_key(e), child);
                else
                        json_push(copy, child);
        }
        return copy;
}

static json *whole(void)
{
        json *null = json_of_null();
        size_t never = SIZE_MAX;
        json *copy = mutated(example, NULL, null, &never);

        json_free(null);
        return copy;
}

/* Not inlined: gcc 12 at -O3 would take what open_memstream stores for a pointer to the local variable. */
static __attribute__((noinline)) char *printed(const json *doc, enum report_table table, enum report_format format)
{
        char *text = NULL;
        size_t len = 0;
        FILE *out = open_memstream(&text, &len);

        assert_non_null(out);
        assert_int_equal(report_print(out, &doc, 1, table, format), 0);
        fclose(out);
        return text;
}

/* Fields of the CSV line at s; the end of the line goes to *next. */
static size_t csv_fields(const char *s, const char **next)
{
        size_t n = 1;
        bool quoted = false;

        for (; *s && (quoted || *s != '\n'); s++) {
                if (*s == '"')
                        quoted = !quoted;
                n += *s == ',' && !quoted;
        }
        assert_false(quoted);
        *next = *s ? s + 1 : s;
        return n;
}

static void assert_rectangular_csv(const char *text)
{
        size_t columns = csv_fields(text, &text);

        while (*text)
                assert_int_equal(csv_fields(text, &text), columns);
}

/* Bars of a Markdown line that are not escaped. */
static size_t bars(const char *s, const char **next)
{
        size_t n = 0;

        for (; *s && *s != '\n'; s++) {
                assert_true((unsigned char)*s >= 0x20);
                if (*s == '\\' && s[1])
                        s++;
                else
                        n += *s == '|';
        }
        *next = *s ? s + 1 : s;
        return n;
}

static void assert_rectangular_markdown(const char *text)
{
        size_t columns = 0;

        while (*text) {
                bool in_table = *text == '|';
                size_t n = bars(text, &text);

                if (in_table && columns)
                        assert_int_equal(n, columns);
                columns = in_table ? n : 0;
        }
}

static void print_all(const json *doc)
{
        static const enum report_table tables[] = {REPORT_TABLE_1, REPORT_TABLE_SAMPLE, REPORT_TABLE_FULL};

        for (size_t t = 0; t < ARRAY_LEN(tables); t++) {
                char *csv = printed(doc, tables[t], REPORT_CSV), *md = printed(doc, tables[t], REPORT_MARKDOWN);

                assert_rectangular_csv(csv);
                assert_rectangular_markdown(md);
                assert_null(strstr(csv, ",="));
                assert_null(strstr(csv, ",@"));
                free(csv);
                free(md);
        }
}

/* Every value of the document in turn is replaced by each of these: the document is refused with a sentence, or it is
 * printed as a table of one shape. */
static void any_value_may_be_anything(void **state)
{
        static const char *const hostile[] = {"null",
                                              "1e300",
                                              "-1e300",
                                              "true",
                                              "{}",
                                              "[]",
                                              "[1,\"x\",null]",
                                              "\"=cmd|' /C calc'!A0\"",
                                              "\"a|b\\nc\\u001b[31m`<b>\\\\ ](x)\"",
                                              "{\"lo\":\"x\",\"hi\":[]}",
                                              "{\"value\":{},\"ci95\":3}"};
        size_t refused = 0, accepted = 0;

        for (size_t h = 0; h < ARRAY_LEN(hostile); h++) {
                json *instead = json_parse(hostile[h], strlen(hostile[h]), "hostile");

                assert_non_null(instead);
                for (size_t i = 0;; i++) {
                        size_t left = i;
                        json *doc = mutated(example, NULL, instead, &left);
                        bool done = left < SIZE_MAX / 2; /* it wraps at the value replaced */

                        err_clear();
                        if (done) {
                                json_free(doc);
                                break;
                        }
                        if (report_check(doc, "x.json") < 0) {
                                assert_memory_equal(err_text(), "x.json: ", 8);
                                assert_null(strchr(err_text(), '\033'));
                                refused++;
                        } else {
                                /* Tables of every 11th: enough of each kind, and still seconds with a sanitizer. */
                                if (i % 11 == h)
                                        print_all(doc);
                                accepted++;
                        }
                        json_free(doc);
                }
                json_free(instead);
        }
        assert_true(refused > 1000);
        assert_true(accepted > 1000);
}

struct refusal {
        const char *text, *sentence;
};

static void refusals_name_the_field(void **state)
{
        static const struct refusal cases[] = {
            {"[]", "x: document: expected an object, found an array"},
            {"{}", "x: schema: expected a string, found nothing"},
            {"{\"schema\":\"djinnbench.perf/1\"}",
             "x: schema: expected \"djinnbench.result/1\", found \"djinnbench.perf/1\""},
            {"{\"schema\":\"\\u001b[2J\"}", "x: schema: expected \"djinnbench.result/1\", found \"?[2J\""},
            {"{\"schema\":\"djinnbench.result/1\",\"experiment\":{},\"manifest\":{},\"workload\":{\"workload\":\"w\","
             "\"results\":[7]}}",
             "x: workload.results[0]: expected an object, found a number"},
            {"{\"schema\":\"djinnbench.result/1\",\"experiment\":{\"runs\":\"8\"}}",
             "x: experiment.runs: expected a number, found a string"},
        };

        for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
                json *doc = json_parse(cases[i].text, strlen(cases[i].text), "case");

                assert_non_null(doc);
                assert_int_equal(report_check(doc, "x"), -EINVAL);
                assert_string_equal(err_text(), cases[i].sentence);
                json_free(doc);
        }
        assert_int_equal(report_check(NULL, "x"), -EINVAL);
}

static void an_unknown_verdict_is_refused(void **state)
{
        char *text = NULL;
        json *doc = whole();

        assert_int_equal(report_check(doc, NULL), 0);
        text = json_text(doc, false);
        json_free(doc);
        char *at = strstr(text, "\"VALID\"");

        assert_non_null(at);
        at[1] = 'R';
        doc = json_parse(text, strlen(text), "x");
        assert_int_equal(report_check(doc, "x"), -EINVAL);
        assert_non_null(strstr(err_text(), "results[0].validity.verdict: expected VALID, INVALID"));
        json_free(doc);
        free(text);
}

static void numbers(void **state)
{
        static const struct {
                double v;
                int decimals;
                const char *text;
        } cases[] = {
            {0, 1, "0.0"},        {-3.14159, 2, "-3.14"}, {-0.001, 1, "0.0"}, {1e300, 1, "1e+300"},
            {-1e15, 0, "-1e+15"}, {65536, -12, "65536"},  {0.5, -6, "0.5"},   {5210112, -12, "5210112"},
            {NAN, 1, "–"},        {INFINITY, -3, "–"},
        };
        char text[64];

        for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
                report_number(text, sizeof(text), cases[i].v, cases[i].decimals);
                assert_string_equal(text, cases[i].text);
        }
}

static void cells(void **state)
{
        const struct report_column about_zero = {.kind = REPORT_ESTIMATE, .decimals = 1, .about_zero = true};
        const struct report_column plain = {.kind = REPORT_ESTIMATE, .decimals = 1};
        const struct report_column value_only = {.kind = REPORT_ESTIMATE, .decimals = 1, .value_only = true};
        const struct {
                const struct report_column *column;
                struct report_cell cell;
                const char *text;
        } cases[] = {
            {&plain, {.missing = true}, "–"},
            {&plain, {.value = -2}, "-2.00"},
            {&plain, {.value = 0.15}, "0.150"},
            {&plain, {.value = 0}, "0.0"},
            {&plain, {.value = 12.345}, "12.3"},
            {&plain, {.value = 9.999}, "10.0"},
            {&plain, {.value = -2, .interval = true, .lo = -3, .hi = 1}, "-2.00 [-3.00, 1.00]"},
            {&about_zero, {.value = -2, .interval = true, .lo = -3, .hi = 1}, "-2.00 [-3.00, 1.00] n.d. ≤ 1.00"},
            {&about_zero, {.value = 2, .interval = true, .lo = 0.5, .hi = 3}, "2.00 [0.500, 3.00]"},
            {&about_zero, {.value = -2, .interval = true, .lo = -3, .hi = -1}, "-2.00 [-3.00, -1.00]"},
            {&value_only, {.value = 2, .interval = true, .lo = 1, .hi = 3}, "2.00"},
        };
        char text[REPORT_TEXT_MAX];

        for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
                report_cell_text(cases[i].column, &cases[i].cell, text, sizeof(text));
                assert_string_equal(text, cases[i].text);
        }
}

/* A document of one row that did not run, named so that it would be a formula, a table's border and a link. */
static const char hostile_names[] =
    "{\"schema\":\"djinnbench.result/1\",\"experiment\":{},\"manifest\":{\"build\":{\"commit\":\"@SUM(A1)\"}},"
    "\"workload\":{\"workload\":\"=cmd|' /C calc'!A0\",\"results\":[{\"baseline\":\"a|b\\nc,\\\"d\\\" [x](y)\","
    "\"runner_type\":\"-1+2\",\"transport\":\"<i>\",\"runs\":[],\"aggregates\":{},\"metadata\":{},\"derived\":{},"
    "\"validity\":{\"verdict\":\"SKIPPED\",\"reason\":\"\\u001b]0;title\\u0007 \\u202e\"}}]}}";

static void texts_are_escaped(void **state)
{
        json *doc = json_parse(hostile_names, sizeof(hostile_names) - 1, "x");

        assert_non_null(doc);
        char *csv = printed(doc, REPORT_TABLE_1, REPORT_CSV), *md = printed(doc, REPORT_TABLE_1, REPORT_MARKDOWN);
        const char *row = strchr(csv, '\n') + 1;

        static const char expected[] = "\"'=cmd|' /C calc'!A0\",\"a|b c,\"\"d\"\" [x](y)\",<i>,,,,";

        assert_memory_equal(row, expected, sizeof(expected) - 1);
        assert_non_null(strstr(csv, ",\"'@SUM(A1)\","));
        assert_non_null(strstr(md, "| =cmd\\|' /C calc'!A0 |"));
        assert_non_null(strstr(md, "| a\\|b c,\"d\" [x] (y) |"));
        assert_non_null(strstr(md, "| \\<i\\> "));
        assert_null(strchr(md, '\033'));
        assert_null(strchr(csv, '\033'));
        assert_null(strstr(md, "\xe2\x80\xae"));
        print_all(doc);
        free(csv);
        free(md);
        json_free(doc);
}

/* Nothing was measured: no cell may hold a number. */
static void missing_is_never_zero(void **state)
{
        json *doc = json_parse(hostile_names, sizeof(hostile_names) - 1, "x");
        char *csv = printed(doc, REPORT_TABLE_FULL, REPORT_CSV);
        const char *row = strchr(csv, '\n') + 1;

        assert_null(strstr(row, ",0"));
        assert_null(strstr(row, ",-"));
        free(csv);
        csv = printed(doc, REPORT_TABLE_1, REPORT_MARKDOWN);
        assert_non_null(strstr(csv, "| SKIPPED |"));
        assert_null(strstr(csv, "| 0"));
        free(csv);
        json_free(doc);
}

static void a_breakdown_that_does_not_add_up_is_told(void **state)
{
        json *doc = whole();
        char *text = json_text(doc, false), *md = printed(doc, REPORT_TABLE_1, REPORT_MARKDOWN);
        char *at = strstr(strstr(text, "\"breakdown\""), "\"server_execution_ms\":");

        assert_null(strstr(md, "add up to "));
        free(md);
        json_free(doc);
        at[strlen("\"server_execution_ms\":")] = '9';
        doc = json_parse(text, strlen(text), "x");
        md = printed(doc, REPORT_TABLE_1, REPORT_MARKDOWN);
        assert_non_null(strstr(md, "native_pytorch local: the leaves and residuals add up to 9."));
        free(md);
        free(text);
        json_free(doc);
}

static void nothing_to_print_is_a_table_too(void **state)
{
        char *text = NULL;
        size_t len = 0;
        FILE *out = open_memstream(&text, &len);

        assert_int_equal(report_print(out, NULL, 0, REPORT_TABLE_1, REPORT_CSV), 0);
        assert_int_equal(report_print(out, NULL, 0, REPORT_TABLE_FULL, REPORT_MARKDOWN), 0);
        fclose(out);
        assert_memory_equal(text, "workload,baseline,", 18);
        free(text);
}

static void a_full_disk_is_an_error(void **state)
{
        FILE *full = fopen("/dev/full", "w");
        const json *doc = example;

        if (!full)
                skip();
        assert_int_equal(report_print(full, &doc, 1, REPORT_TABLE_1, REPORT_MARKDOWN), -ENOSPC);
        assert_non_null(strstr(err_text(), "cannot write"));
        fclose(full);
}

static void a_file_is_hashed(void **state)
{
        struct report_source source;
        char hex[33];

        assert_int_equal(report_load(EXAMPLE_PATH, &source), 0);
        assert_true(source.hashed);
        assert_string_equal(source.name, EXAMPLE_PATH);
        char *md = NULL;
        size_t len = 0;
        FILE *out = open_memstream(&md, &len);

        assert_int_equal(report_write(out, &source, 1, REPORT_TABLE_1, REPORT_MARKDOWN), 0);
        fclose(out);
        digest_hex(source.raw, hex);
        assert_non_null(strstr(md, hex));
        free(md);
        report_free(&source);
        report_free(&source);
        assert_true(report_load("/nonexistent/x.json", &source) < 0);
        assert_non_null(strstr(err_text(), "/nonexistent/x.json"));
}

static int load_example(void **state)
{
        example = json_load(EXAMPLE_PATH, 64 << 20);
        return example ? 0 : -1;
}

static int free_example(void **state)
{
        json_free(example);
        return 0;
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(any_value_may_be_anything),
            cmocka_unit_test(refusals_name_the_field),
            cmocka_unit_test(an_unknown_verdict_is_refused),
            cmocka_unit_test(numbers),
            cmocka_unit_test(cells),
            cmocka_unit_test(texts_are_escaped),
            cmocka_unit_test(missing_is_never_zero),
            cmocka_unit_test(a_breakdown_that_does_not_add_up_is_told),
            cmocka_unit_test(nothing_to_print_is_a_table_too),
            cmocka_unit_test(a_full_disk_is_an_error),
            cmocka_unit_test(a_file_is_hashed),
        };

        return cmocka_run_group_tests(tests, load_example, free_example);
}
