/* raw: what arrives is what was sent, for both media, and a dead child is an error and not a hang. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include "err.h"
#include "raw.h"

#define MAX_BYTES (1u << 20)

static const char *const schemes[] = {"shm", "tcp"};
static uint8_t src[MAX_BYTES], dst[MAX_BYTES];

static void exchanges_of_all_sizes(void **state)
{
        static const size_t sizes[] = {0, 1, 7, 64, 300, 4096, 65536, MAX_BYTES};

        for (int s = 0; s < 2; s++) {
                struct raw_pair *p;

                assert_int_equal(raw_open(schemes[s], MAX_BYTES, -1, &p), 0);
                for (int up = 0; up < 8; up++) {
                        for (int down = 0; down < 8; down++) {
                                memset(dst, 0xee, sizeof(dst));
                                assert_true(raw_exchange(p, src, sizes[up], dst, sizes[down]) > 0);
                                for (size_t i = 0; i < sizes[down]; i += 61) /* the child sends zeros */
                                        assert_int_equal(dst[i], 0);
                                assert_true(raw_exchange(p, src, sizes[up], NULL, sizes[down]) > 0);
                        }
                }
                raw_close(p);
        }
}

static void streams_of_all_depths(void **state)
{
        static const unsigned depths[] = {1, 2, 3, 16, 1000};

        for (int s = 0; s < 2; s++) {
                struct raw_pair *p;

                assert_int_equal(raw_open(schemes[s], MAX_BYTES, -1, &p), 0);
                for (int d = 0; d < 5; d++) {
                        assert_true(raw_stream(p, src, 64, 501, depths[d]) > 0);
                        assert_true(raw_stream(p, src, MAX_BYTES, 7, depths[d]) > 0);
                        assert_true(raw_stream(p, src, 0, 3, depths[d]) > 0);
                        assert_true(raw_exchange(p, src, 64, dst, 64) > 0);
                }
                raw_close(p);
        }
}

static void unknown_media_are_refused(void **state)
{
        struct raw_pair *p;

        assert_int_equal(raw_open("loop", 64, -1, &p), -ENOTSUP);
        assert_true(err_text()[0] != '\0');
}

/* The only child of this process is the raw one. */
static pid_t only_child(void)
{
        char path[64], text[64] = "";
        FILE *f;

        snprintf(path, sizeof(path), "/proc/self/task/%d/children", (int)getpid());
        f = fopen(path, "r");
        if (!f)
                return -1;
        if (!fgets(text, sizeof(text), f))
                text[0] = '\0';
        fclose(f);
        return text[0] ? (pid_t)atoi(text) : -1;
}

static void a_dead_child_is_an_error(void **state)
{
        for (int s = 0; s < 2; s++) {
                struct raw_pair *p;
                pid_t child;

                assert_int_equal(raw_open(schemes[s], 64, -1, &p), 0);
                assert_true(raw_exchange(p, src, 64, dst, 64) > 0);
                child = only_child();
                if (child > 0) {
                        kill(child, SIGKILL);
                        while (raw_exchange(p, src, 64, dst, 64) > 0)
                                ;
                        assert_true(raw_exchange(p, src, 64, dst, 64) < 0);
                        assert_true(raw_stream(p, src, 64, 10, 2) < 0);
                }
                raw_close(p);
                if (child < 0)
                        skip(); /* a kernel without /proc/.../children */
        }
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(exchanges_of_all_sizes),
            cmocka_unit_test(streams_of_all_depths),
            cmocka_unit_test(unknown_media_are_refused),
            cmocka_unit_test(a_dead_child_is_an_error),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
