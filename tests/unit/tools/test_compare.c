/* compare's parts: keys, figures, what makes two runs incomparable, the verdict on each side of a gate, escaping. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "check.h"
#include "compare_inside.h"
#include "err.h"

#define HEAD                                                                                                \
        "{\"schema\":\"djinnbench.perf/1\",\"manifest\":{\"host\":\"h\",\"build\":{\"type\":\"release\"}}," \
        "\"interrupted\":false,\"results\":["
#define LAT "{\"transport\":\"shm\",\"test\":\"lat\",\"op\":\"send\",\"size\":64,\"depth\":1,\"path\":\"host\","
#define BW  "{\"transport\":\"tcp\",\"test\":\"bw\",\"op\":\"write\",\"size\":1048576,\"depth\":16,"

static struct compare_doc take(const char *text)
{
        struct compare_doc doc;
        json *root = json_parse(text, strlen(text), "test");

        assert_non_null(root);
        if (compare_doc_take(root, "test", &doc) < 0)
                fail_msg("%s", err_text());
        return doc;
}

static void refused(const char *text, const char *word)
{
        struct compare_doc doc;
        json *root = json_parse(text, strlen(text), "test");

        assert_non_null(root);
        assert_true(compare_doc_take(root, "test", &doc) < 0);
        if (!strstr(err_text(), word))
                fail_msg("'%s' does not say '%s'", err_text(), word);
        compare_doc_free(&doc);
}

/* A latency document of one row with these repeats. */
static struct compare_doc latency(const double *v, size_t n)
{
        char text[4096];
        int len = snprintf(text, sizeof(text), HEAD LAT "\"replicates\":[");

        for (size_t i = 0; i < n; i++)
                len += snprintf(text + len, sizeof(text) - (size_t)len, "%s{\"half_rtt_p50_us\":%.9g}", i ? "," : "",
                                v[i]);
        snprintf(text + len, sizeof(text) - (size_t)len, "],\"half_rtt_us\":{\"p50\":1,\"p99\":3}}]}");
        return take(text);
}

static void keys_name_what_is_measured(void **state)
{
        struct compare_doc doc =
            take(HEAD LAT "\"connections\":1,\"bidirectional\":false}," LAT
                          "\"connections\":4,\"threads\":2,\"bidirectional\":true}," LAT "\"raw\":true}," LAT
                          "\"size_mixed\":true,\"size_spec\":\"1..64K:log\",\"offered_s\":1000}]}");

        (void)state;
        assert_string_equal(doc.rows[0].key, "shm lat send 64 B depth 1");
        assert_string_equal(doc.rows[1].key, "shm lat send 64 B depth 1 4 connections 2 threads bidirectional");
        assert_string_equal(doc.rows[2].key, "shm lat send 64 B depth 1 raw");
        assert_string_equal(doc.rows[3].key, "shm lat send 1..64K:log depth 1 offered 1000/s");
        for (size_t i = 0; i < doc.count; i++)
                assert_ptr_equal(compare_doc_find(&doc, doc.rows[i].key), &doc.rows[i]);
        assert_null(compare_doc_find(&doc, "shm"));
        compare_doc_free(&doc);
}

static void documents_are_checked(void **state)
{
        (void)state;
        refused("[]", "schema");
        refused("{\"schema\":\"djinnbench.perf/2\",\"results\":[]}", "schema");
        refused(HEAD "]}", "1 to");
        refused("{\"schema\":\"djinnbench.perf/1\",\"results\":{}}", "list");
        refused(HEAD "3]}", "no object");
        refused(HEAD "{}]}", "transport");
        refused(HEAD "{\"transport\":[],\"test\":\"lat\"}]}", "transport");
        refused(HEAD "{\"transport\":\"shm\",\"test\":\"lat\",\"op\":\"send\",\"size\":null}]}", "size");
        refused(HEAD LAT "\"x\":1}," LAT "\"x\":2}]}", "two rows");
        refused(
            "{\"schema\":\"djinnbench.result/1\",\"workload\":{\"workload\":\"w\",\"results\":[{\"baseline\":\"b\"}]}}",
            "verdict");
        refused("{\"schema\":\"djinnbench.result/1\",\"workload\":{\"workload\":\"w\",\"results\":[{\"baseline\":\"b\","
                "\"transport\":\"t\",\"validity\":{\"verdict\":\"FINE\"}}]}}",
                "verdict");
}

static void figures_are_checked(void **state)
{
        static const char *const bad[] = {"-1", "0", "\"1\"", "[]", "true"};

        (void)state;
        for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
                char text[512];
                struct compare_series s;

                snprintf(text, sizeof(text), HEAD LAT "\"replicates\":[{\"half_rtt_p50_us\":%s}]}]}", bad[i]);
                struct compare_doc doc = take(text);

                assert_true(compare_series_of(&doc, doc.rows, compare_metric_find("p50", COMPARE_PERF), &s) < 0);
                compare_series_free(&s);
                compare_doc_free(&doc);
        }
        struct compare_doc doc = take(HEAD LAT "\"replicates\":[7]}]}");
        struct compare_series s;

        assert_true(compare_series_of(&doc, doc.rows, compare_metric_find("p50", COMPARE_PERF), &s) < 0);
        compare_series_free(&s);
        compare_doc_free(&doc);
}

/* A repeat without the figure spoils them all, and the row's own figure stands without an interval. */
static void a_missing_repeat_leaves_no_interval(void **state)
{
        struct compare_doc doc = take(HEAD LAT "\"half_rtt_us\":{\"p50\":2},\"replicates\":[{\"half_rtt_p50_us\":1},"
                                               "{\"half_rtt_p50_us\":null},{\"half_rtt_p50_us\":1}]}]}");
        struct compare_series s;

        (void)state;
        assert_int_equal(compare_series_of(&doc, doc.rows, compare_metric_find("latency", COMPARE_PERF), &s), 0);
        assert_int_equal(s.n, 0);
        assert_true(s.value == 2);
        compare_series_free(&s);
        compare_doc_free(&doc);
}

static struct compare_line judged(const double *a, const double *b, size_t n, enum compare_status want)
{
        struct compare_doc da = latency(a, n), db = latency(b, n);
        struct compare_result r;

        assert_int_equal(compare_judge(&da, &db, NULL, 0, false, &r), 0);
        assert_int_equal(r.n_lines, 1);
        struct compare_line line = r.lines[0];

        assert_int_equal(compare_status_of(&r), want);
        compare_result_free(&r);
        compare_doc_free(&da);
        compare_doc_free(&db);
        return line;
}

static const double base_us[] = {1.00, 1.01, 0.99, 1.00, 1.005, 0.995, 1.00, 1.002};

static void scaled(double *out, double by)
{
        for (size_t i = 0; i < ARRAY_LEN(base_us); i++)
                out[i] = base_us[i] * by;
}

static void verdicts_follow_the_interval(void **state)
{
        double b[ARRAY_LEN(base_us)];

        (void)state;
        scaled(b, 1.02);
        struct compare_line line = judged(base_us, b, 8, COMPARE_STATUS_PASS);

        assert_int_equal(line.how, COMPARE_BOOTSTRAP);
        assert_false(line.within_launch);
        assert_true(line.ci.lo < 1.02 && 1.02 < line.ci.hi && line.ci.hi < 1.05);
        scaled(b, 0.5);
        judged(base_us, b, 8, COMPARE_STATUS_PASS);
        scaled(b, 1.10);
        judged(base_us, b, 8, COMPARE_STATUS_REGRESSION);
        scaled(b, 1.05);
        line = judged(base_us, b, 8, COMPARE_STATUS_INCONCLUSIVE);
        assert_non_null(strstr(line.reason, "gate"));
}

static void few_repeats_give_a_range_or_nothing(void **state)
{
        double b[ARRAY_LEN(base_us)];

        (void)state;
        scaled(b, 1.10);
        struct compare_line line = judged(base_us, b, 3, COMPARE_STATUS_REGRESSION);

        assert_int_equal(line.how, COMPARE_RANGE);
        assert_float_equal(line.ci.lo, 0.99 * 1.10 / 1.01, 1e-9);
        assert_float_equal(line.ci.hi, 1.01 * 1.10 / 0.99, 1e-9);
        line = judged(base_us, b, 2, COMPARE_STATUS_INCONCLUSIVE);
        assert_int_equal(line.how, COMPARE_NONE);
        assert_non_null(strstr(line.reason, "repeats"));
}

static enum compare_status status_of(const char *a, const char *b, const struct compare_gate *gate, bool allow)
{
        struct compare_doc da = take(a), db = take(b);
        struct compare_result r;

        if (compare_judge(&da, &db, gate, gate ? 1 : 0, allow, &r) < 0)
                fail_msg("%s", err_text());
        enum compare_status status = compare_status_of(&r);

        compare_result_free(&r);
        compare_doc_free(&da);
        compare_doc_free(&db);
        return status;
}

#define RATES(v)                                                                                               \
        "\"replicates\":[{\"gbytes_s\":" v "},{\"gbytes_s\":" v "},{\"gbytes_s\":" v "},{\"gbytes_s\":" v "}," \
        "{\"gbytes_s\":" v "},{\"gbytes_s\":" v "}]}"

static void more_bandwidth_is_better(void **state)
{
        (void)state;
        assert_int_equal(status_of(HEAD BW RATES("5") "]}", HEAD BW RATES("10") "]}", NULL, false),
                         COMPARE_STATUS_PASS);
        assert_int_equal(status_of(HEAD BW RATES("10") "]}", HEAD BW RATES("9") "]}", NULL, false),
                         COMPARE_STATUS_REGRESSION);
        assert_int_equal(status_of(HEAD BW RATES("10") "]}", HEAD BW RATES("9") "]}",
                                   &(struct compare_gate){compare_metric_find("bandwidth", COMPARE_PERF), 10}, false),
                         COMPARE_STATUS_PASS);
}

static void what_differs_is_not_compared(void **state)
{
        static const char here[] = HEAD BW RATES("5") "]}";
        static const char *const other[] = {
            "{\"schema\":\"djinnbench.perf/1\",\"manifest\":{\"host\":\"i\"},\"results\":[" BW RATES("5") "]}",
            "{\"schema\":\"djinnbench.perf/1\",\"manifest\":{\"build\":{\"type\":\"debug\"}},\"results\":[" BW RATES(
                "5") "]}",
            "{\"schema\":\"djinnbench.perf/1\",\"interrupted\":true,\"results\":[" BW RATES("5") "]}",
            HEAD BW RATES("5") "," LAT "\"replicates\":[]}]}",
        };

        (void)state;
        for (size_t i = 0; i < ARRAY_LEN(other); i++) {
                assert_int_equal(status_of(here, other[i], NULL, false), COMPARE_STATUS_NOT_COMPARABLE);
                assert_int_equal(status_of(other[i], here, NULL, false), COMPARE_STATUS_NOT_COMPARABLE);
                assert_int_equal(status_of(here, other[i], NULL, true), COMPARE_STATUS_PASS);
        }
        /* Nothing in common, or nothing valid: no option makes a comparison of that. */
        assert_int_equal(status_of(here, HEAD LAT "\"replicates\":[]}]}", NULL, true), COMPARE_STATUS_NOT_COMPARABLE);
        assert_int_equal(status_of(here, HEAD BW "\"wrong\":3," RATES("5") "]}", NULL, true),
                         COMPARE_STATUS_NOT_COMPARABLE);
}

static void a_metric_that_no_row_has_is_an_error(void **state)
{
        struct compare_doc a = take(HEAD BW RATES("5") "]}");
        struct compare_gate gate = {compare_metric_find("p99", COMPARE_PERF), 5};
        struct compare_result r;

        (void)state;
        assert_true(compare_judge(&a, &a, &gate, 1, false, &r) < 0);
        assert_non_null(strstr(err_text(), "p99"));
        compare_result_free(&r);
        compare_doc_free(&a);
}

static void raw_rows_are_shown_and_not_judged(void **state)
{
        struct compare_doc a = take(HEAD BW RATES("5") "," BW "\"raw\":true," RATES("5") "]}");
        struct compare_doc b = take(HEAD BW RATES("5") "," BW "\"raw\":true," RATES("1") "]}");
        struct compare_result r;

        (void)state;
        assert_int_equal(compare_judge(&a, &b, NULL, 0, false, &r), 0);
        assert_int_equal(r.n_lines, 2);
        assert_int_equal(r.lines[1].verdict, COMPARE_INFO);
        assert_int_equal(compare_status_of(&r), COMPARE_STATUS_PASS);
        compare_result_free(&r);
        compare_doc_free(&a);
        compare_doc_free(&b);
}

static char *printed(void (*print)(FILE *, const struct compare_result *), const struct compare_result *r)
{
        char *text = NULL;
        size_t len;
        FILE *to = open_memstream(&text, &len);

        assert_non_null(to);
        print(to, r);
        fclose(to);
        return text;
}

/* A file cannot put markup, commands for a terminal, or elements of XML into what is printed of it. */
static void what_files_say_is_escaped(void **state)
{
        struct compare_doc a =
            take("{\"schema\":\"djinnbench.perf/1\",\"manifest\":{\"host\":\"<b>|`x`\\u001b[2J\\\"&\"},\"results\":["
                 "{\"transport\":\"a|b<c>&\\n\",\"test\":\"bw\",\"op\":\"'\\\"\",\"size\":1," RATES("5") "]}");
        struct compare_doc b =
            take("{\"schema\":\"djinnbench.perf/1\",\"manifest\":{\"host\":\"\xc3\xa9\"},\"results\":["
                 "{\"transport\":\"a|b<c>&\\n\",\"test\":\"bw\",\"op\":\"'\\\"\",\"size\":1," RATES("5") "]}");
        struct compare_result r;

        (void)state;
        assert_int_equal(compare_judge(&a, &b, NULL, 0, false, &r), 0);
        char *md = printed(compare_markdown, &r), *xml = printed(compare_junit, &r), *j = printed(compare_json, &r);

        assert_null(strstr(md, "\x1b"));
        assert_null(strstr(md, "a|b"));
        assert_non_null(strstr(md, "a\\|b\\<c\\>\\&?"));
        assert_null(strstr(xml, "a|b<c>"));
        assert_non_null(strstr(xml, "a|b&lt;c&gt;&amp;? bw &apos;&quot;"));
        assert_null(strstr(xml, "\x1b"));
        json *root = json_parse(j, strlen(j), "json");

        assert_non_null(root);
        json_free(root);
        free(md);
        free(xml);
        free(j);
        compare_result_free(&r);
        compare_doc_free(&a);
        compare_doc_free(&b);
}

int main(void)
{
        static const struct CMUnitTest tests[] = {
            cmocka_unit_test(keys_name_what_is_measured),
            cmocka_unit_test(documents_are_checked),
            cmocka_unit_test(figures_are_checked),
            cmocka_unit_test(a_missing_repeat_leaves_no_interval),
            cmocka_unit_test(verdicts_follow_the_interval),
            cmocka_unit_test(few_repeats_give_a_range_or_nothing),
            cmocka_unit_test(more_bandwidth_is_better),
            cmocka_unit_test(what_differs_is_not_compared),
            cmocka_unit_test(a_metric_that_no_row_has_is_an_error),
            cmocka_unit_test(raw_rows_are_shown_and_not_judged),
            cmocka_unit_test(what_files_say_is_escaped),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
