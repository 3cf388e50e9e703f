#include "digest.h"

#include "unit.h"

static void known_vectors(void **state)
{
        char hex[33];

        digest_hex(digest_of(NULL, 0), hex);
        assert_string_equal(hex, "99aa06d3014798d86001c324468d497f");
        digest_hex(digest_of("abc", 3), hex);
        assert_string_equal(hex, "06b05ab6733a618578af5f94892f3950");
}

static void stream_equals_whole(void **state)
{
        unsigned char data[5000];

        for (size_t i = 0; i < sizeof(data); i++)
                data[i] = (unsigned char)(i * 37 + (i >> 8));
        struct digest whole = digest_of(data, sizeof(data));
        struct digest_stream *s = digest_begin();

        assert_non_null(s);
        for (size_t at = 0, step = 1; at < sizeof(data); at += step, step = step * 3 % 601) {
                if (step > sizeof(data) - at)
                        step = sizeof(data) - at;
                digest_add(s, data + at, step);
                digest_add(s, NULL, 0);
        }
        struct digest d = digest_end(s);

        assert_true(digest_equal(d, whole));
}

static void one_bit_changes_it(void **state)
{
        float a[] = {0.0f, 1.0f}, b[] = {-0.0f, 1.0f};

        assert_false(digest_equal(digest_of(a, sizeof(a)), digest_of(b, sizeof(b))));
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(known_vectors),
            cmocka_unit_test(stream_equals_whole),
            cmocka_unit_test(one_bit_changes_it),
        };

        return cmocka_run_group_tests_name("digest", tests, NULL, NULL);
}
