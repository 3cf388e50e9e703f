#include "json.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>

#include "prng.h"
#include "unit.h"

static json *parse(const char *text)
{
        return json_parse(text, strlen(text), "doc.json");
}

static void reads(void **state)
{
        json *v = parse("{\"a\": 1.5, \"b\": [1, 2, 3], \"c\": null, \"d\": true, \"e\": \"caf\\u00e9 \\\"x\\\"\"}");
        const json *b = json_get(v, "b");
        double sum = 0;

        assert_non_null(v);
        assert_true(json_num(json_get(v, "a"), -1) == 1.5);
        assert_int_equal(json_count(b), 3);
        assert_true(json_is_array(b) && !json_is_object(b) && json_is_object(v));
        for (const json *e = json_first(b); e; e = json_next(e))
                sum += json_num(e, NAN);
        assert_true(sum == 6);
        assert_true(json_is_null(json_get(v, "c")));
        assert_true(json_bool(json_get(v, "d"), false));
        assert_string_equal(json_str(json_get(v, "e"), ""), "caf\xc3\xa9 \"x\"");
        assert_string_equal(json_key(json_first(v)), "a");
        assert_int_equal(json_count(v), 5);
        json_free(v);
}

static void absent_is_answered(void **state)
{
        assert_null(json_get(NULL, "a"));
        assert_null(json_first(NULL));
        assert_null(json_next(NULL));
        assert_null(json_key(NULL));
        assert_true(json_is_null(NULL));
        assert_false(json_is_num(NULL) || json_is_str(NULL) || json_is_bool(NULL));
        assert_true(json_num(NULL, 7) == 7);
        assert_string_equal(json_str(NULL, "x"), "x");
        assert_true(json_bool(NULL, true));
        assert_int_equal(json_count(NULL), 0);
        json_free(NULL);
}

static void keys_are_told_apart_by_case(void **state)
{
        json *v = parse("{\"Key\": 1, \"key\": 2}");

        assert_true(json_num(json_get(v, "key"), 0) == 2);
        json_free(v);
}

static void integers_are_checked(void **state)
{
        json *v =
            parse("{\"n\": 5, \"f\": 5.5, \"s\": \"5\", \"z\": null, \"big\": 1e300, \"exact\": 9007199254740992}");
        int64_t out = -1;

        assert_int_equal(json_int(v, "n", 0, 10, &out), 0);
        assert_int_equal(out, 5);
        assert_int_equal(json_int(v, "n", 0, 4, &out), -EINVAL);
        assert_sentence("\"n\": expected an integer from 0 to 4");
        assert_int_equal(json_int(v, "f", 0, 10, &out), -EINVAL);
        assert_int_equal(json_int(v, "s", 0, 10, &out), -EINVAL);
        assert_int_equal(json_int(v, "big", 0, INT64_MAX, &out), -EINVAL);
        assert_int_equal(json_int(v, "z", 0, 10, &out), -ENOENT);
        assert_int_equal(json_int(v, "absent", 0, 10, &out), -ENOENT);
        assert_int_equal(json_int(v, "exact", 0, INT64_MAX, &out), 0);
        assert_true(out == 1ll << 53);
        json_free(v);
}

static void hostile_input_is_refused(void **state)
{
        static const struct {
                const char *text, *why;
        } bad[] = {
            {"", "offset 0"},
            {"{", "not JSON"},
            {"{\"a\":1,}", "offset 7"},
            {"[1 2]", "offset 3"},
            {"nul", "not JSON"},
            {"[1] x", "offset 4: something follows"},
            {"{\"a\":1}{\"a\":1}", "offset 7: something follows"},
            {"\"abc", "not JSON"},
            {"\"a\\", "not JSON"},
            {"\"\\ud800\"", "not JSON"},
            {"\"\\x\"", "not JSON"},
            {"[\"a\\u0000b\"]", "offset 3: \\u0000"},
            {"[\"\xff\"]", "offset 2: not UTF-8"},
            {"[\"\xc0\x80\"]", "not UTF-8"},         /* overlong */
            {"[\"\xed\xa0\x80\"]", "not UTF-8"},     /* surrogate */
            {"[\"\xf4\x90\x80\x80\"]", "not UTF-8"}, /* above U+10FFFF */
            {"[\"\xe2\x82\"]", "not UTF-8"},         /* cut short */
            {"[\"a\nb\"]", "control character"},
            {"[1e999]", "too large"},
            {"{\"k\":1,\"j\":2,\"k\":3}", "\"k\" stands twice"},
            {"[{\"a\":{\"k\":1,\"k\":1}}]", "\"k\" stands twice"},
            {"[0x10]", "not JSON"},
            {"[NaN]", "not JSON"},
            {"[-]", "not JSON"},
        };

        for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
                err_clear();
                if (parse(bad[i].text))
                        fail_msg("accepted: %s", bad[i].text);
                assert_sentence("doc.json");
                assert_sentence(bad[i].why);
        }
        assert_null(json_parse("[1]\0", 4, "doc.json"));
        assert_sentence("offset 3: a NUL byte");
}

static void deep_nesting_is_refused(void **state)
{
        enum { DEPTH = 200000 };
        char *text = malloc(DEPTH + 1);

        memset(text, '[', DEPTH);
        text[DEPTH] = '\0';
        assert_null(parse(text));
        assert_sentence("nested too deeply");
        for (int i = 0; i < DEPTH; i++)
                memcpy(text + i, i % 5 ? "[" : "{", 1);
        assert_null(parse(text));
        free(text);
}

/* Every prefix and every one-byte change of a document either parses or is refused with a sentence. */
static void broken_documents_harm_nobody(void **state)
{
        static const char good[] = "{\"a\":[1,-2.5e3,\"\\u20ac\\n\",{\"b\":null}],\"c\":true,\"d\":\"\xe2\x82\xac\"}";
        char text[sizeof(good)];
        size_t accepted = 0;

        for (size_t len = 0; len < sizeof(good); len++)
                json_free(json_parse(good, len, "prefix"));
        for (size_t at = 0; at + 1 < sizeof(good); at++) {
                for (int c = 0; c < 256; c++) {
                        memcpy(text, good, sizeof(good));
                        text[at] = (char)c;
                        json *v = json_parse(text, sizeof(good) - 1, "changed");

                        accepted += v != NULL;
                        if (v) {
                                free(json_text(v, false));
                                json_free(v);
                        }
                }
        }
        assert_true(accepted > sizeof(good));
}

static void same_double(double d)
{
        json *v = json_of_num(d);
        char *text = json_text(v, false);
        json *again = parse(text);

        assert_non_null(again);
        double back = json_num(again, NAN);

        if (memcmp(&back, &d, sizeof(d)) != 0)
                fail_msg("%.17g became %s", d, text);
        free(text);
        json_free(v);
        json_free(again);
}

static void numbers_read_back_the_same(void **state)
{
        static const double hard[] = {0.1,
                                      1.0 / 3,
                                      5e-324,
                                      1.7976931348623157e308,
                                      2.2250738585072014e-308,
                                      1e22,
                                      1e23,
                                      0.30000000000000004,
                                      123456789012345680,
                                      9007199254740994.0,
                                      -0.0,
                                      1e15,
                                      1e16};
        struct prng p;

        for (size_t i = 0; i < sizeof(hard) / sizeof(hard[0]); i++)
                same_double(hard[i]);
        prng_seed(&p, 9);
        for (int i = 0; i < 20000; i++) {
                uint64_t bits = prng_u64(&p);
                double d;

                memcpy(&d, &bits, sizeof(d));
                if (isfinite(d))
                        same_double(d);
        }
}

static void numbers_are_short(void **state)
{
        static const struct {
                double v;
                const char *text;
        } cases[] = {{0.1, "0.1"},    {5, "5"},
                     {-3, "-3"},      {0.30000000000000004, "0.30000000000000004"},
                     {1e-7, "1e-07"}, {9007199254740992.0, "9007199254740992"},
                     {NAN, "null"},   {INFINITY, "null"},
                     {2.5, "2.5"}};

        for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
                json *v = json_of_num(cases[i].v);
                char *text = json_text(v, false);

                assert_string_equal(text, cases[i].text);
                free(text);
                json_free(v);
        }
}

static void builds_and_prints(void **state)
{
        json *o = json_object(), *a = json_array();

        json_push(a, json_of_int(1));
        json_push(a, json_of_null());
        json_push(a, json_of_num(2.5));
        json_set(o, "list", a);
        json_set_str(o, "text", "a\"b\\c\n\x01\x7f");
        json_set_bool(o, "yes", true);
        json_set_int(o, "n", -7);
        json_set_int(o, "n", 8); /* replaces */
        json_set_str(o, "none", NULL);
        json_set_null(o, "null");
        json_set(o, "empty", json_object());
        char *text = json_text(o, false);

        assert_string_equal(text,
                            "{\"list\":[1,null,2.5],\"text\":\"a\\\"b\\\\c\\n\\u0001\\u007f\",\"yes\":true,\"n\":8,"
                            "\"none\":null,\"null\":null,\"empty\":{}}");
        free(text);
        json *copy = json_copy(o);

        json_free(o);
        text = json_text(copy, true);
        assert_non_null(strstr(text, "{\n  \"list\": [1, null, 2.5],\n  \"text\""));
        assert_int_equal(text[strlen(text) - 1], '\n');
        json *again = parse(text);

        assert_non_null(again);
        assert_string_equal(json_str(json_get(again, "text"), ""), "a\"b\\c\n\x01\x7f");
        free(text);
        json_free(copy);
        json_free(again);
}

static void broken_utf8_is_replaced(void **state)
{
        static const struct {
                const char *in, *out;
        } cases[] = {{"ok \xe2\x82\xac", "ok \xe2\x82\xac"},
                     {"a\xff"
                      "b",
                      "a\xef\xbf\xbd"
                      "b"},
                     {"\xe2\x82", "\xef\xbf\xbd\xef\xbf\xbd"},
                     {"\xed\xa0\x80", "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"},
                     {"", ""}};

        for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
                json *v = json_of_str(cases[i].in);
                char *text = json_text(v, false);
                json *again = parse(text);

                assert_string_equal(json_str(v, ""), cases[i].out);
                assert_string_equal(json_str(again, "?"), cases[i].out);
                free(text);
                json_free(v);
                json_free(again);
        }
}

static void saves_at_once_or_not_at_all(void **state)
{
        char dir[] = "/tmp/test-json-XXXXXX", path[64], command[64];
        struct stat st;
        json *v = json_object();

        assert_non_null(mkdtemp(dir));
        snprintf(path, sizeof(path), "%s/r.json", dir);
        json_set_int(v, "n", 1);
        umask(022);
        assert_int_equal(json_save(v, path), 0);
        json_set_int(v, "n", 2);
        assert_int_equal(json_save(v, path), 0); /* over an old one */
        assert_int_equal(stat(path, &st), 0);
        assert_int_equal(st.st_mode & 0777, 0644);
        json *again = json_load(path, 1 << 20);

        assert_true(json_num(json_get(again, "n"), 0) == 2);
        json_free(again);
        assert_null(json_load(path, 3));
        assert_sentence("r.json: larger than");
        /* A name that cannot be replaced: nothing is left beside it. */
        snprintf(path, sizeof(path), "%s/sub", dir);
        mkdir(path, 0700);
        assert_true(json_save(v, path) < 0);
        assert_sentence("/sub: cannot write");
        snprintf(command, sizeof(command), "test $(ls %s | wc -l) = 2", dir);
        assert_int_equal(system(command), 0);
        snprintf(path, sizeof(path), "%s/none/r.json", dir);
        assert_int_equal(json_save(v, path), -ENOENT);
        json_free(v);
        snprintf(command, sizeof(command), "rm -rf %s", dir);
        assert_int_equal(system(command), 0);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(reads),
            cmocka_unit_test(absent_is_answered),
            cmocka_unit_test(keys_are_told_apart_by_case),
            cmocka_unit_test(integers_are_checked),
            cmocka_unit_test(hostile_input_is_refused),
            cmocka_unit_test(deep_nesting_is_refused),
            cmocka_unit_test(broken_documents_harm_nobody),
            cmocka_unit_test(numbers_read_back_the_same),
            cmocka_unit_test(numbers_are_short),
            cmocka_unit_test(builds_and_prints),
            cmocka_unit_test(broken_utf8_is_replaced),
            cmocka_unit_test(saves_at_once_or_not_at_all),
        };

        return cmocka_run_group_tests_name("json", tests, NULL, NULL);
}
