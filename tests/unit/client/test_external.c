/* The messages of an external baseline: what we say, what we take for an answer, and what makes it no answer. */
#include "client_fixture.h"

#include <sys/wait.h>

#include "clock.h"
#include "external.h"

#define ANSWERS_MAX 6
#define HELLO       "{\"type\":\"hello\",\"name\":\"fake\",\"version\":\"1.2\"}"
#define READY       "{\"type\":\"ready\",\"device\":\"abacus\",\"threads\":3}"
#define RESULT      "{\"type\":\"result\",\"tokens\":[[5],[6]],\"latency_ms\":0.000001}"
#define BIG                                                                                                       \
        "name: w\nimplementation: hf_causal_lm\nparams: {model_id: gpt2-micro, prompt_length: 4, new_tokens: 2, " \
        "prompt_text: Hello}\n"
#define ECHO "name: e\nimplementation: echo\nparams: {payload_bytes: 4}\n"

/* A program that notes each question and gives the next of the answers it was started with. */
static const char script[] =
    "for a; do IFS= read -r l || exit; printf '%s\\n' \"$l\" >> \"$0\"; printf '%s\\n' \"$a\"; done; "
    "IFS= read -r l && printf '%s\\n' \"$l\" >> \"$0\"";

struct scene {
        struct workload w;
        struct model_roots *roots;
        struct conf_doc *doc;
        struct conversation conv;
        struct external *x;
        const char *argv[4 + ANSWERS_MAX + 1];
        char log[32];
};

static void set_scene(struct scene *s, const char *workload)
{
        const char *const roots[] = {FIXTURES};
        struct workload_opts opts = {.dtype = DT_F32, .seed = 1};
        struct workload_spec spec;

        *s = (struct scene){.log = "/tmp/external-XXXXXX"};
        must(conf_parse(workload, strlen(workload), "test", &s->doc));
        must(workload_parse(conf_root(s->doc), &spec));
        must(model_roots_open(roots, 1, &s->roots));
        opts.roots = s->roots;
        must(workload_build(&spec, &opts, &s->w));
        must(conversation_new(&s->w, &s->conv));
        must(conversation_start(&s->conv, &s->w, 1, 0));
        write_temp(s->log, "");
}

static void clear_scene(struct scene *s)
{
        external_close(s->x);
        conversation_free(&s->conv);
        workload_free(&s->w);
        model_roots_close(s->roots);
        conf_free(s->doc);
        unlink(s->log);
        assert_int_equal(waitpid(-1, NULL, WNOHANG), -1);
}

/* Answers to hello and prepare, then up to four more. */
static int open_with(struct scene *s, const char *const answers[ANSWERS_MAX])
{
        struct external_opts o = {.child = {.name = "ext", .argv = s->argv}, .run_ns = 60 * NS_PER_S};

        s->argv[0] = "sh", s->argv[1] = "-c", s->argv[2] = script, s->argv[3] = s->log;
        for (int i = 0; i < ANSWERS_MAX; i++)
                s->argv[4 + i] = answers[i];
        return external_open(&o, &s->w, 42, &s->x);
}

static struct exec_data data_of(const struct scene *s, const int32_t *forced)
{
        return (struct exec_data){
            .history = s->conv.ids, .history_cap = s->conv.cap, .input = s->conv.input, .forced = forced};
}

static int run(struct scene *s, uint64_t *latency_ns)
{
        struct exec_data d = data_of(s, NULL);

        return external_run(s->x, 0, 7, &d, latency_ns);
}

/* The n-th question that the program has noted; free it. */
static json *question(const struct scene *s, int n)
{
        static char line[1 << 16];
        FILE *f = fopen(s->log, "r");

        assert_non_null(f);
        for (int i = 0; i <= n; i++)
                assert_non_null(fgets(line, sizeof(line), f));
        fclose(f);
        return json_parse(line, strlen(line), "question");
}

static void assert_text(const json *o, const char *key, const char *want)
{
        assert_string_equal(json_str(json_get(o, key), "(none)"), want);
}

static void what_it_is_told(void **state)
{
        struct scene s;
        json *q;

        set_scene(&s, BIG);
        must(open_with(&s, (const char *[ANSWERS_MAX]){HELLO, READY, RESULT}));
        must(run(&s, &(uint64_t){0}));
        external_close(s.x);
        s.x = NULL;
        q = question(&s, 0);
        assert_text(q, "type", "hello");
        assert_text(q, "protocol", "djinnbench.external/1");
        json_free(q);
        q = question(&s, 1);
        assert_text(q, "type", "prepare");
        assert_text(q, "workload", "w");
        assert_text(q, "implementation", "hf_causal_lm");
        assert_text(q, "dtype", "float32");
        assert_text(q, "weights", "checkpoint");
        assert_text(q, "model_path", s.w.model_path);
        assert_true(json_num(json_get(q, "seed"), 0) == 42);
        assert_text(json_get(q, "params"), "prompt_text", "Hello");
        assert_true(json_num(json_get(json_get(q, "params"), "new_tokens"), 0) == 2);
        assert_true(json_num(json_get(json_get(q, "params"), "batch_size"), 0) == 1); /* a default */
        json_free(q);
        q = question(&s, 2);
        assert_text(q, "type", "run");
        assert_true(json_num(json_get(q, "block"), 0) == 7);
        assert_true(json_num(json_get(q, "new_tokens"), 0) == 2);
        assert_int_equal(json_count(json_get(q, "input_ids")), 1);
        assert_int_equal(json_count(json_first(json_get(q, "input_ids"))), 4);
        assert_true(json_num(json_first(json_first(json_get(q, "input_ids"))), -1) == s.conv.ids[0]);
        json_free(q);
        q = question(&s, 3);
        assert_text(q, "type", "bye");
        json_free(q);
        clear_scene(&s);
}

static void what_it_says_of_itself(void **state)
{
        const struct external_info *info;
        struct scene s;

        set_scene(&s, BIG);
        must(open_with(&s, (const char *[ANSWERS_MAX]){"{\"type\":\"hello\",\"name\":\"a\\u001b[1m\\nb\"}", READY}));
        info = external_info(s.x);
        assert_string_equal(info->name, "a [1m b");
        assert_string_equal(info->version, "");
        assert_string_equal(info->device, "abacus");
        assert_int_equal(info->threads, 3);
        assert_true(external_alive(s.x));
        clear_scene(&s);
}

static void a_result_is_taken(void **state)
{
        struct scene s;
        uint64_t ns = 0;
        size_t len;
        const int32_t *tokens;

        set_scene(&s, BIG);
        must(open_with(&s, (const char *[ANSWERS_MAX]){HELLO, READY, RESULT}));
        must(run(&s, &ns));
        tokens = external_result(s.x, &len);
        assert_int_equal(len, 8);
        assert_int_equal(tokens[0], 5);
        assert_int_equal(tokens[1], 6);
        assert_int_equal(ns, 1);
        clear_scene(&s);
}

static void beginnings_that_fail(void **state)
{
        static const struct {
                const char *hello, *ready;
                int rc;
                const char *words;
        } cases[] = {
            {"{\"type\":\"error\",\"text\":\"no torch\"}", NULL, -ENOTSUP, "ext says: no torch"},
            {HELLO, "{\"type\":\"error\",\"text\":\"no synthetic\\n weights\"}", -ENOTSUP,
             "ext says: no synthetic  weights"},
            {HELLO, "{\"type\":\"error\"}", -ENOTSUP, "no reason given"},
            {"{\"type\":\"ready\"}", NULL, -EPROTO, "type ready, expected hello"},
            {"{}", NULL, -EPROTO, "type none, expected hello"},
            {"{\"type\":\"hello\"}", NULL, -EPROTO, "\"name\""},
            {"{\"type\":\"hello\",\"name\":5}", NULL, -EPROTO, "\"name\""},
            {"{\"type\":\"hello\",\"name\":\"a\",\"version\":5}", NULL, -EPROTO, "\"version\""},
            {HELLO, "{\"type\":\"ready\",\"threads\":1}", -EPROTO, "\"device\""},
            {HELLO, "{\"type\":\"ready\",\"device\":\"a\"}", -EPROTO, "\"threads\""},
            {HELLO, "{\"type\":\"ready\",\"device\":\"a\",\"threads\":0}", -EPROTO, "\"threads\""},
            {HELLO, "{\"type\":\"ready\",\"device\":\"a\",\"threads\":1.5}", -EPROTO, "\"threads\""},
            {HELLO, "ready", -EPROTO, "one JSON object"},
            {NULL, NULL, -EPIPE, "ended"},
        };

        for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
                struct scene s;
                int rc;

                set_scene(&s, BIG);
                rc = open_with(&s, (const char *[ANSWERS_MAX]){cases[i].hello, cases[i].ready});
                if (rc != cases[i].rc)
                        fail_msg("case %zu: %d: %s", i, rc, err_text());
                assert_sentence(cases[i].words);
                assert_null(s.x);
                clear_scene(&s);
        }
}

#define R(rest) "{\"type\":\"result\"," rest "}"
#define L       ",\"latency_ms\":0.000001"
static void results_that_are_none(void **state)
{
        static const struct {
                const char *workload, *result, *words;
        } cases[] = {
            {BIG, "{\"type\":\"check\"}", "type check, expected result"},
            {BIG, "{\"type\":\"error\",\"text\":\"out of memory\"}", "ext says: out of memory"},
            {BIG, R("\"latency_ms\":1"), "\"tokens\": expected a list of 2"},
            {BIG, R("\"tokens\":[[5]]" L), "expected a list of 2 where a list of 1 came"},
            {BIG, R("\"tokens\":[[5],[6],[7]]" L), "where a list of 3 came"},
            {BIG, R("\"tokens\":[[5,6],[7,8]]" L), "expected a list of 1 where a list of 2 came"},
            {BIG, R("\"tokens\":[5,6]" L), "where a value of 0 came"},
            {BIG, R("\"tokens\":[[5],[[6]]]" L), "element 1 is not an integer"},
            {BIG, R("\"tokens\":[[5],[512]]" L), "element 1 is not an integer within its range"},
            {BIG, R("\"tokens\":[[-1],[5]]" L), "element 0 is not an integer within its range"},
            {BIG, R("\"tokens\":[[5],[6.5]]" L), "element 1 is not an integer"},
            {BIG, R("\"tokens\":[[5],[1e300]]" L), "element 1 is not an integer"},
            {BIG, R("\"tokens\":[[5],[\"6\"]]" L), "element 1 is not an integer"},
            {BIG, R("\"tokens\":[[5],[6]]"), "\"latency_ms\", a number above 0"},
            {BIG, R("\"tokens\":[[5],[6]],\"latency_ms\":0"), "above 0"},
            {BIG, R("\"tokens\":[[5],[6]],\"latency_ms\":-1"), "above 0"},
            {BIG, R("\"tokens\":[[5],[6]],\"latency_ms\":\"1\""), "above 0"},
            {BIG, R("\"tokens\":[[5],[6]],\"latency_ms\":3600000"), "took 3.6e+06 ms, but its answer was here after"},
            {ECHO, R("\"tokens\":[[5],[6]]" L), "\"output\": expected a list of 4"},
            {ECHO, R("\"output\":[1,2,3,256]" L), "element 3 is not an integer within its range"},
            {ECHO, R("\"output\":[1,2,3,null]" L), "element 3 is not an integer within its range"},
        };

        for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
                struct scene s;
                uint64_t ns;
                int rc;

                set_scene(&s, cases[i].workload);
                must(open_with(&s, (const char *[ANSWERS_MAX]){HELLO, READY, cases[i].result, RESULT}));
                rc = run(&s, &ns);
                if (rc != -EPROTO)
                        fail_msg("case %zu: %d: %s", i, rc, err_text());
                assert_sentence(cases[i].words);
                assert_false(external_alive(s.x));
                assert_int_equal(run(&s, &ns), -EPIPE);
                clear_scene(&s);
        }
}

static void a_check_is_forced(void **state)
{
        static const int32_t forced[] = {11, 12};
        struct exec_data d;
        struct scene s;
        json *q, *f;

        set_scene(&s, BIG);
        must(open_with(&s,
                       (const char *[ANSWERS_MAX]){HELLO, READY, "{\"type\":\"check\",\"logits\":[[[1,2]],[[3,4]]]}"}));
        d = data_of(&s, forced);
        assert_int_equal(external_check(s.x, 0, &d), -EPROTO);
        assert_sentence("\"logits\": expected a list of 512 where a list of 2 came");
        q = question(&s, 2);
        assert_text(q, "type", "check");
        f = (json *)json_get(q, "forced");
        assert_int_equal(json_count(f), 2);
        assert_true(json_num(json_first(json_first(f)), 0) == 11);
        assert_true(json_num(json_first(json_next(json_first(f))), 0) == 12);
        json_free(q);
        clear_scene(&s);
}

static void output_is_compared(void **state)
{
        struct scene s;
        struct exec_data d;
        uint8_t want[] = {1, 2, 3, 250};
        struct reference ref = {.turns = 1, .steps = 1, .batch = 1, .output_len = 4, .output_bytes = want};
        struct check_result c = {0};

        set_scene(&s, ECHO);
        must(open_with(
            &s, (const char *[ANSWERS_MAX]){HELLO, READY, "{\"type\":\"check\",\"output\":[1,2,3,250]}",
                                            "{\"type\":\"result\",\"output\":[1,2,3,251],\"latency_ms\":1e-6}"}));
        d = data_of(&s, NULL);
        must(external_check(s.x, 0, &d));
        external_judge(s.x, &ref, 0, &c);
        assert_true(c.done && c.passed);
        must(run(&s, &(uint64_t){0}));
        external_judge(s.x, &ref, 0, &c);
        assert_false(c.passed);
        clear_scene(&s);
}

/* The second token differs: a mistake, unless the reference itself could have chosen otherwise there or before. */
static void tokens_are_compared(void **state)
{
        static const struct {
                int32_t first, second;
                int64_t near_tie;
                bool passes;
        } cases[] = {{5, 6, -1, true}, {5, 7, -1, false}, {4, 6, 1, false}, {5, 7, 1, true}, {4, 7, 0, true}};
        struct scene s;

        set_scene(&s, BIG);
        must(open_with(&s, (const char *[ANSWERS_MAX]){HELLO, READY, RESULT}));
        must(run(&s, &(uint64_t){0}));
        for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
                int32_t want[] = {cases[i].first, cases[i].second};
                struct reference ref = {.turns = 1, .steps = 2, .batch = 1, .vocab = 512, .tokens = want};
                struct check_result c = {.done = true, .passed = true, .near_tie = cases[i].near_tie};

                external_judge(s.x, &ref, 0, &c);
                if (c.passed != cases[i].passes)
                        fail_msg("case %zu", i);
                assert_true(c.passed || strstr(c.why, "its run chose token"));
        }
        clear_scene(&s);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(what_it_is_told),       cmocka_unit_test(what_it_says_of_itself),
            cmocka_unit_test(a_result_is_taken),     cmocka_unit_test(beginnings_that_fail),
            cmocka_unit_test(results_that_are_none), cmocka_unit_test(a_check_is_forced),
            cmocka_unit_test(output_is_compared),    cmocka_unit_test(tokens_are_compared),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
