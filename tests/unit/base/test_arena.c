#include "arena.h"

#include "unit.h"

static void fixed_gives_what_it_has_and_no_more(void **state)
{
        _Alignas(64) char buf[256];
        struct arena a;

        arena_init_fixed(&a, buf, sizeof(buf));
        char *p = arena_alloc(&a, 1, 1);
        char *q = arena_alloc(&a, 8, 64);

        assert_ptr_equal(p, buf);
        assert_ptr_equal(q, buf + 64);
        assert_null(arena_alloc(&a, 256, 1));
        assert_null(arena_alloc(&a, 180, 16));               /* fits, but not behind the gap that the alignment makes */
        assert_ptr_equal(arena_alloc(&a, 184, 1), buf + 72); /* a refusal takes nothing */
        assert_null(arena_alloc(&a, 1, 1));
        assert_non_null(arena_alloc(&a, 0, 1));
        arena_reset(&a);
        assert_ptr_equal(arena_alloc(&a, 256, 1), buf);
        arena_free(&a);
}

static void sizes_are_checked(void **state)
{
        struct arena a;

        arena_init(&a, 4096, 0);
        assert_null(arena_array(&a, SIZE_MAX / 2, 3));
        assert_null(arena_alloc(&a, SIZE_MAX, 1));
        assert_null(arena_alloc(&a, SIZE_MAX - 64, 64));
        assert_null(arena_strndup(&a, "x", SIZE_MAX));
        assert_int_equal(a.held_bytes, 0);
        arena_free(&a);
}

static void grows_within_its_limit(void **state)
{
        struct arena a;
        char *p[100];

        arena_init(&a, 1024, 16 * 1024);
        for (int i = 0; i < 100; i++) {
                p[i] = arena_alloc(&a, 100, 32);
                assert_non_null(p[i]);
                assert_int_equal((uintptr_t)p[i] % 32, 0);
                memset(p[i], i, 100);
        }
        for (int i = 0; i < 100; i++)
                assert_int_equal(p[i][99], i);
        assert_null(arena_alloc(&a, 16 * 1024, 1));
        arena_reset(&a);
        assert_int_equal(a.held_bytes, 1024);
        assert_non_null(arena_alloc(&a, 8000, 4096)); /* larger than a chunk: one of its own */
        arena_free(&a);
        assert_int_equal(a.held_bytes, 0);
        assert_non_null(arena_alloc(&a, 10, 1)); /* usable again */
        arena_free(&a);
}

static void arrays_are_cleared_and_texts_end(void **state)
{
        struct arena a;
        char buf[512];

        memset(buf, 0xff, sizeof(buf));
        arena_init_fixed(&a, buf, sizeof(buf));
        const unsigned char *v = arena_array(&a, 10, 10);

        for (int i = 0; i < 100; i++)
                assert_int_equal(v[i], 0);
        assert_string_equal(arena_strndup(&a, "hello world", 5), "hello");
        assert_string_equal(arena_strdup(&a, ""), "");
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(fixed_gives_what_it_has_and_no_more),
            cmocka_unit_test(sizes_are_checked),
            cmocka_unit_test(grows_within_its_limit),
            cmocka_unit_test(arrays_are_cleared_and_texts_end),
        };

        return cmocka_run_group_tests_name("arena", tests, NULL, NULL);
}
