#include <errno.h>

#include "wl_fixture.h"

#include "tokenizer.h"

#ifndef FIXTURES
#error "FIXTURES names tests/fixtures"
#endif

static int open_text(const char *text, struct tokenizer **t)
{
        char dir[64];

        tmp_dir(dir);
        put_text_file(dir, "tokenizer.json", text);
        int fd = open_dir(dir), rc;

        err_clear();
        rc = tokenizer_open(fd, "tokenizer.json", t);
        close(fd);
        tmp_gone(dir);
        return rc;
}

static void expect_ids(const struct tokenizer *t, const char *text, size_t len, const int32_t *want, size_t n)
{
        int32_t *ids;
        size_t have;

        must(tokenizer_encode(t, text, len, &ids, &have));
        if (have != n)
                fail_msg("\"%s\": %zu ids, expected %zu", text, have, n);
        if (n)
                assert_memory_equal(ids, want, n * sizeof(*ids));
        free(ids);
}

static struct tokenizer *micro(void)
{
        struct tokenizer *t;
        int fd = open_dir(FIXTURES "/gpt2-micro");

        must(tokenizer_open(fd, "tokenizer.json", &t));
        close(fd);
        return t;
}

static void reproduces_the_reference(void **state)
{
        struct tokenizer *t = micro();
        json *ref = json_load(FIXTURES "/gpt2-micro/tokenizer_reference.json", 1 << 20);
        size_t cases = 0;

        assert_non_null(ref);
        for (const json *c = json_first(ref); c; c = json_next(c), cases++) {
                const char *text = json_str(json_get(c, "text"), NULL);
                int32_t want[64];
                size_t n = 0;

                for (const json *v = json_first(json_get(c, "ids")); v; v = json_next(v))
                        want[n++] = (int32_t)json_num(v, -1);
                expect_ids(t, text, strlen(text), want, n);
        }
        assert_true(cases >= 7);
        assert_int_equal(tokenizer_vocab(t), 440);
        json_free(ref);
        tokenizer_close(t);
        tokenizer_close(NULL);
}

static void added_tokens_are_cut_out_first(void **state)
{
        struct tokenizer *t = micro();
        /* "hello" is 259 76 76 79 in the reference. */
        const int32_t want[] = {0, 259, 76, 76, 79, 0, 0};
        const char text[] = "<|endoftext|>hello<|endoftext|><|endoftext|>";

        expect_ids(t, text, strlen(text), want, 7);
        tokenizer_close(t);
}

/* a, b, c, space; "ab" before "bc" before "abc". */
#define VOCAB                                                                                     \
        "{\"a\":0,\"b\":1,\"c\":2,\"\xc4\xa0\":3,\"ab\":4,\"bc\":5,\"abc\":6,\"aa\":7,\"\xc4\xa0" \
        "a\":8}"
#define BYTES               "\"pre_tokenizer\":{\"type\":\"ByteLevel\",\"add_prefix_space\":false}"
#define SMALL(merges, more) "{" BYTES ",\"model\":{\"type\":\"BPE\",\"vocab\":" VOCAB ",\"merges\":" merges more "}}"

static void merges_go_by_rank_then_from_the_left(void **state)
{
        struct tokenizer *t;

        must(open_text(SMALL("[\"b c\",\"a b\",\"a a\",\"a bc\"]", ""), &t));
        expect_ids(t, "abc", 3, (const int32_t[]){6}, 1);
        expect_ids(t, "aaa", 3, (const int32_t[]){7, 0}, 2);
        expect_ids(t, "aaaa", 4, (const int32_t[]){7, 7}, 2);
        expect_ids(t, "aabc", 4, (const int32_t[]){7, 5}, 2);
        /* Bytes without an entry are dropped, as there is no unknown token. */
        expect_ids(t, "axb", 3, (const int32_t[]){4}, 1);
        tokenizer_close(t);
        must(open_text(SMALL("[[\"a\",\"b\"],[\"b\",\"c\"],[\"ab\",\"c\"]]", ""), &t));
        expect_ids(t, "abcbc", 5, (const int32_t[]){6, 5}, 2);
        tokenizer_close(t);
}

static void settings_of_the_pre_tokenizer_count(void **state)
{
        struct tokenizer *t;

        must(open_text("{\"pre_tokenizer\":{\"type\":\"ByteLevel\"},\"model\":{\"vocab\":" VOCAB
                       ",\"merges\":[\"\xc4\xa0 a\"]}}",
                       &t));
        expect_ids(t, "a a", 3, (const int32_t[]){8, 8}, 2);
        expect_ids(t, " a", 2, (const int32_t[]){8}, 1);
        tokenizer_close(t);
        /* Without the pattern the text is one word: merges cross spaces only where they say so, which is the same here,
         * but letters and digits are not cut apart. */
        must(open_text("{\"pre_tokenizer\":{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"use_regex\":false},"
                       "\"model\":{\"vocab\":{\"a\":0,\"1\":1,\"a1\":2},\"merges\":[\"a 1\"]}}",
                       &t));
        expect_ids(t, "a1", 2, (const int32_t[]){2}, 1);
        tokenizer_close(t);
        must(open_text("{\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"ByteLevel\","
                       "\"add_prefix_space\":false}]},"
                       "\"model\":{\"vocab\":{\"a\":0,\"1\":1,\"a1\":2},\"merges\":[\"a 1\"]}}",
                       &t));
        expect_ids(t, "a1", 2, (const int32_t[]){0, 1}, 2);
        tokenizer_close(t);
        must(open_text(SMALL("[]", ",\"ignore_merges\":true"), &t));
        expect_ids(t, "abc", 3, (const int32_t[]){6}, 1);
        expect_ids(t, "abca", 4, (const int32_t[]){0, 1, 2, 0}, 4);
        tokenizer_close(t);
}

static void other_kinds_are_refused_by_name(void **state)
{
        static const char *const bad[][2] = {
            {"{\"pre_tokenizer\":{\"type\":\"Metaspace\"},\"model\":{}}", "Metaspace"},
            {"{\"pre_tokenizer\":null,\"model\":{}}", "none"},
            {"{" BYTES ",\"model\":{\"type\":\"Unigram\"}}", "Unigram"},
            {"{" BYTES ",\"normalizer\":{\"type\":\"NFC\"},\"model\":{}}", "NFC"},
            {"{" BYTES ",\"model\":{\"type\":\"BPE\",\"byte_fallback\":true}}", "byte_fallback"},
            {"{" BYTES ",\"model\":{\"type\":\"BPE\",\"end_of_word_suffix\":\"</w>\"}}", "end_of_word_suffix"},
            {"{" BYTES ",\"model\":{\"type\":\"BPE\",\"dropout\":0.1}}", "dropout"},
        };
        struct tokenizer *t;

        for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
                assert_int_equal(open_text(bad[i][0], &t), -ENOTSUP);
                assert_null(t);
                assert_sentence(bad[i][1]);
        }
        int fd = open_dir(FIXTURES "/llama-micro");

        assert_int_equal(tokenizer_open(fd, "tokenizer.json", &t), -ENOTSUP);
        close(fd);
        fd = open_dir(FIXTURES "/tiny-gpt2");
        assert_int_equal(tokenizer_open(fd, "tokenizer.json", &t), -ENOENT);
        close(fd);
}

static void broken_files_are_refused(void **state)
{
        static const char *const bad[][2] = {
            {"{", "tokenizer.json"},
            {"{" BYTES "}", "model"},
            {"{" BYTES ",\"model\":{\"vocab\":[],\"merges\":[]}}", "vocab"},
            {"{" BYTES ",\"model\":{\"vocab\":{},\"merges\":[]}}", "vocab"},
            {"{" BYTES ",\"model\":{\"vocab\":{\"a\":-1},\"merges\":[]}}", "\"a\""},
            {"{" BYTES ",\"model\":{\"vocab\":{\"a\":0.5},\"merges\":[]}}", "\"a\""},
            {"{" BYTES ",\"model\":{\"vocab\":{\"a\":4294967296},\"merges\":[]}}", "\"a\""},
            {"{" BYTES ",\"model\":{\"vocab\":{\"a\":\"0\"},\"merges\":[]}}", "\"a\""},
            {SMALL("[\"a\"]", ""), "merge 0"},
            {SMALL("[\"a b c\"]", ""), "merge 0"},
            {SMALL("[[\"a\"]]", ""), "merge 0"},
            {SMALL("[[\"a\",7]]", ""), "merge 0"},
            {SMALL("[7]", ""), "merge 0"},
            {SMALL("[\"a b\",\"c c\"]", ""), "merge 1"},
            {SMALL("{}", ""), "merges"},
            {"{" BYTES ",\"model\":{\"vocab\":" VOCAB ",\"merges\":[]},\"added_tokens\":[{}]}", "added token"},
            {"{" BYTES ",\"model\":{\"vocab\":" VOCAB ",\"merges\":[]},\"added_tokens\":7}", "added_tokens"},
        };
        struct tokenizer *t;

        for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
                if (open_text(bad[i][0], &t) != -EINVAL)
                        fail_msg("%s was accepted", bad[i][0]);
                assert_sentence(bad[i][1]);
        }
}

static void text_is_checked(void **state)
{
        struct tokenizer *t = micro();
        int32_t *ids;
        size_t n;

        assert_int_equal(tokenizer_encode(t, "a\xff", 2, &ids, &n), -EINVAL);
        assert_sentence("UTF-8");
        assert_null(ids);
        must(tokenizer_encode(t, "a\0b", 3, &ids, &n));
        assert_true(n >= 3);
        free(ids);
        tokenizer_close(t);
}

/* A word of a million letters must not take a million squared steps. */
static void long_words_are_no_trap(void **state)
{
        struct tokenizer *t = micro();
        const size_t len = 1000000;
        char *text = malloc(len);
        int32_t *ids;
        size_t n;

        for (size_t i = 0; i < len; i++)
                text[i] = (char)('a' + i * 7 % 26);
        must(tokenizer_encode(t, text, len, &ids, &n));
        assert_true(n > len / 8 && n <= len);
        free(ids);
        memset(text, ' ', len);
        must(tokenizer_encode(t, text, len, &ids, &n));
        free(ids);
        free(text);
        tokenizer_close(t);
}

static void random_damage_never_crashes(void **state)
{
        static const char good[] = SMALL("[\"b c\",[\"a\",\"b\"],\"a a\",\"a bc\"]", ",\"ignore_merges\":true");
        char dir[64];
        unsigned char b[sizeof(good)];
        struct prng p;
        size_t accepted = 0;

        tmp_dir(dir);
        prng_seed(&p, 3);
        for (int round = 0; round < 4000; round++) {
                struct tokenizer *t;
                int32_t *ids;
                size_t n;

                memcpy(b, good, sizeof(good));
                put_file(dir, "tokenizer.json", b, mutate(&p, b, sizeof(good) - 1));
                int fd = open_dir(dir);

                if (tokenizer_open(fd, "tokenizer.json", &t) == 0) {
                        accepted++;
                        if (tokenizer_encode(t, "abc aabbcc cab", 14, &ids, &n) == 0)
                                free(ids);
                        tokenizer_close(t);
                }
                close(fd);
        }
        assert_true(accepted > 100);
        tmp_gone(dir);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(reproduces_the_reference),
            cmocka_unit_test(added_tokens_are_cut_out_first),
            cmocka_unit_test(merges_go_by_rank_then_from_the_left),
            cmocka_unit_test(settings_of_the_pre_tokenizer_count),
            cmocka_unit_test(other_kinds_are_refused_by_name),
            cmocka_unit_test(broken_files_are_refused),
            cmocka_unit_test(text_is_checked),
            cmocka_unit_test(long_words_are_no_trap),
            cmocka_unit_test(random_damage_never_crashes),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
