#include <errno.h>
#include <pthread.h>

#include "unit.h"

static void set_then_trail(void **state)
{
        assert_int_equal(err_set(-EINVAL, "%s: broken", "a.yaml"), -EINVAL);
        assert_int_equal(err_trail(-EIO, "while reading %d", 7), -EIO);
        assert_string_equal(err_text(), "a.yaml: broken; while reading 7");
        assert_string_equal(err_str(-EIO), "a.yaml: broken; while reading 7");
}

static void the_old_sentence_may_be_an_argument(void **state)
{
        err_set(-EINVAL, "cause");
        err_set(-EINVAL, "outer: %s", err_text());
        assert_string_equal(err_text(), "outer: cause");
        err_trail(-EINVAL, "[%s]", err_text());
        assert_string_equal(err_text(), "outer: cause; [outer: cause]");
}

static void without_a_sentence(void **state)
{
        err_clear();
        assert_string_equal(err_text(), "");
        assert_string_equal(err_str(-ENOENT), strerror(ENOENT));
        err_trail(-ENOENT, "where");
        assert_string_equal(err_text(), "where");
}

static void long_sentences_are_cut_not_overrun(void **state)
{
        char text[3 * ERR_TEXT_MAX];

        memset(text, 'x', sizeof(text) - 1);
        text[sizeof(text) - 1] = '\0';
        err_set(-EINVAL, "%s", text);
        assert_int_equal(strlen(err_text()), ERR_TEXT_MAX - 1);
        err_trail(-EINVAL, "no room");
        assert_int_equal(strlen(err_text()), ERR_TEXT_MAX - 1);
        err_set(-EINVAL, "short");
        err_trail(-EINVAL, "%s", text);
        assert_string_equal(err_text(), "short");
}

static void *other_thread(void *arg)
{
        bool empty = err_text()[0] == '\0';

        err_set(-EINVAL, "theirs");
        return empty ? arg : NULL;
}

static void threads_have_their_own(void **state)
{
        pthread_t t;
        void *result;

        err_set(-EINVAL, "mine");
        assert_int_equal(pthread_create(&t, NULL, other_thread, &result), 0);
        pthread_join(t, &result);
        assert_non_null(result);
        assert_string_equal(err_text(), "mine");
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(set_then_trail),         cmocka_unit_test(the_old_sentence_may_be_an_argument),
            cmocka_unit_test(without_a_sentence),     cmocka_unit_test(long_sentences_are_cut_not_overrun),
            cmocka_unit_test(threads_have_their_own),
        };

        return cmocka_run_group_tests_name("err", tests, NULL, NULL);
}
