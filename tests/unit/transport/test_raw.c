/* raw: every medium that can be measured here does exchanges and streams of all sizes; orders that do not fit, media
 * that there are not, and a dead or silent other end are errors and no hang. */
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

#include "check.h"
#include "clock.h"
#include "err.h"
#include "raw.h"

#define MAX_BYTES (1u << 20)
#define DEPTH     16u

static const char *const schemes[] = {"shm", "tcp", "rdma"};
static uint8_t src[MAX_BYTES], dst[MAX_BYTES];
static struct hist times;

static struct raw_pair *pair_of(const char *scheme, size_t max_bytes, unsigned depth)
{
        struct raw_opts o = {.url = scheme, .max_bytes = max_bytes, .depth = depth, .cpu_peer = -1};
        struct raw_pair *p;

        if (raw_unavailable(scheme))
                return NULL;
        assert_int_equal(raw_open(&o, &p), 0);
        return p;
}

static struct raw_pair *pair(const char *scheme, size_t max_bytes)
{
        return pair_of(scheme, max_bytes, DEPTH);
}

static struct raw_order exchange(size_t up, size_t down, uint64_t n)
{
        return (struct raw_order){.shape = RAW_EXCHANGE, .up = up, .down = down, .n = n};
}

static struct raw_order stream(size_t up, uint64_t n, unsigned depth)
{
        return (struct raw_order){.shape = RAW_STREAM, .up = up, .n = n, .depth = depth};
}

static int run(struct raw_pair *p, struct raw_order o, void *to)
{
        uint64_t ns = 0;
        int rc = raw_run(p, &o, src, to, NULL, &ns);

        assert_true(rc < 0 || o.n == 0 || ns > 0);
        return rc;
}

static void exchanges_of_all_sizes(void **state)
{
        static const size_t sizes[] = {0, 1, 7, 56, 57, 64, 300, 4096, 65536, MAX_BYTES};

        memset(src, 0xff, sizeof(src));
        for (size_t s = 0; s < ARRAY_LEN(schemes); s++) {
                struct raw_pair *p = pair(schemes[s], MAX_BYTES);

                if (!p)
                        continue;
                for (size_t up = 0; up < ARRAY_LEN(sizes); up++) {
                        for (size_t down = 0; down < ARRAY_LEN(sizes); down++) {
                                memset(dst, 0xee, sizeof(dst));
                                assert_int_equal(run(p, exchange(sizes[up], sizes[down], 3), dst), 0);
                                for (size_t i = 0; i < sizes[down]; i += 61) /* the other end sends zeros */
                                        assert_int_equal(dst[i], 0);
                                if (sizes[down] < MAX_BYTES)
                                        assert_int_equal(dst[sizes[down]], 0xee);
                                assert_int_equal(run(p, exchange(sizes[up], sizes[down], 2), NULL), 0);
                        }
                }
                raw_close(p);
        }
}

/* An end that is set up for one message in flight and little more than it: nothing may lie over anything else. */
static void exchanges_in_little_room(void **state)
{
        static const size_t rooms[] = {24, 25, 56, 64, 200, 256, 257, 300, 400, 600},
                            sizes[] = {0, 8, 24, 25, 56, 57, 64, 120, 121, 128, 200, 250, 256, 257};

        memset(src, 0xff, sizeof(src));
        for (size_t s = 0; s < ARRAY_LEN(schemes); s++) {
                for (size_t r = 0; r < ARRAY_LEN(rooms); r++) {
                        struct raw_pair *p = pair_of(schemes[s], rooms[r], 1);

                        for (size_t i = 0; p && i < ARRAY_LEN(sizes) && sizes[i] <= rooms[r]; i++) {
                                memset(dst, 0xee, sizes[i]);
                                assert_int_equal(run(p, exchange(sizes[i], sizes[i], 100), dst), 0);
                                for (size_t at = 0; at < sizes[i]; at++) /* the other end sends zeros */
                                        assert_int_equal(dst[at], 0);
                        }
                        if (p)
                                raw_close(p);
                }
        }
}

static void streams_of_all_depths(void **state)
{
        static const unsigned depths[] = {1, 2, 3, DEPTH};

        for (size_t s = 0; s < ARRAY_LEN(schemes); s++) {
                struct raw_pair *p = pair(schemes[s], MAX_BYTES);

                if (!p)
                        continue;
                for (size_t d = 0; d < ARRAY_LEN(depths); d++) {
                        assert_int_equal(run(p, stream(64, 501, depths[d]), NULL), 0);
                        assert_int_equal(run(p, stream(MAX_BYTES, 7, depths[d]), NULL), 0);
                        assert_int_equal(run(p, stream(0, 3, depths[d]), NULL), 0);
                        assert_int_equal(run(p, stream(64, 1, depths[d]), NULL), 0);
                        assert_int_equal(run(p, exchange(64, 64, 1), dst), 0);
                }
                raw_close(p);
        }
}

static void each_exchange_has_its_time(void **state)
{
        for (size_t s = 0; s < ARRAY_LEN(schemes); s++) {
                struct raw_pair *p = pair(schemes[s], 64);
                struct raw_order o = exchange(64, 8, 1000);
                uint64_t ns;

                if (!p)
                        continue;
                hist_reset(&times);
                assert_int_equal(raw_run(p, &o, src, NULL, &times, &ns), 0);
                assert_int_equal(times.n, 1000);
                assert_true(times.sum <= (double)ns && times.min > 0);
                raw_close(p);
        }
}

static void orders_that_do_not_fit_are_refused(void **state)
{
        for (size_t s = 0; s < ARRAY_LEN(schemes); s++) {
                struct raw_pair *p = pair(schemes[s], 64);

                if (!p)
                        continue;
                assert_int_equal(run(p, exchange(65, 1, 1), NULL), -EINVAL);
                assert_int_equal(run(p, exchange(1, 65, 1), NULL), -EINVAL);
                assert_int_equal(run(p, stream(1, 1, 0), NULL), -EINVAL);
                assert_int_equal(run(p, stream(1, 1, DEPTH + 1), NULL), -EINVAL);
                assert_int_equal(run(p, stream(64, 100, DEPTH), NULL), 0);
                raw_close(p);
        }
}

static void unknown_media_are_refused(void **state)
{
        struct raw_opts o = {.url = "loop", .max_bytes = 64, .cpu_peer = -1};
        struct raw_pair *p;

        assert_non_null(raw_unavailable("loop"));
        assert_non_null(raw_unavailable("sh"));
        assert_null(raw_unavailable("shm"));
        assert_null(raw_unavailable("shm://name"));
        assert_int_equal(raw_open(&o, &p), -ENOTSUP);
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

/* Killed while it sleeps, and killed while it serves, by an alarm. */
static pid_t victim;

static void kill_victim(int sig)
{
        kill(victim, SIGKILL);
}

static void a_dead_child_is_an_error(void **state)
{
        for (size_t s = 0; s < ARRAY_LEN(schemes); s++) {
                for (int serving = 0; serving < 2; serving++) {
                        struct raw_pair *p = pair(schemes[s], 64);

                        if (!p)
                                continue;
                        victim = only_child();
                        if (victim < 0) {
                                raw_close(p);
                                skip(); /* a kernel without /proc/.../children */
                        }
                        assert_int_equal(run(p, exchange(64, 64, 1), dst), 0);
                        signal(SIGALRM, kill_victim);
                        if (serving)
                                ualarm(50000, 0);
                        else
                                kill(victim, SIGKILL);
                        assert_int_equal(run(p, exchange(64, 64, UINT64_MAX), dst), -ECONNRESET);
                        assert_true(run(p, stream(64, 10, 2), NULL) < 0);
                        raw_close(p);
                }
        }
}

static void stop_victim(int sig)
{
        kill(victim, SIGSTOP);
}

static void a_silent_child_is_an_error(void **state)
{
        for (size_t s = 0; s < ARRAY_LEN(schemes); s++) {
                struct raw_opts o = {
                    .url = schemes[s], .max_bytes = 64, .depth = 1, .cpu_peer = -1, .stall_ns = 200 * NS_PER_MS};
                uint64_t t0 = clock_ns();
                struct raw_pair *p;

                if (raw_unavailable(schemes[s]))
                        continue;
                assert_int_equal(raw_open(&o, &p), 0);
                victim = only_child();
                signal(SIGALRM, stop_victim);
                ualarm(50000, 0);
                assert_int_equal(run(p, exchange(64, 64, UINT64_MAX), dst), -ETIMEDOUT);
                assert_true(clock_ns() - t0 < 5 * NS_PER_S);
                raw_close(p);
        }
}

/* Two ends that are no pair: what the offer needs is in the blob alone. */
static void ends_meet_by_their_blobs(void **state)
{
        for (size_t s = 0; s < ARRAY_LEN(schemes); s++) {
                struct raw_opts o = {.url = schemes[s], .max_bytes = 4096, .depth = DEPTH, .cpu_peer = -1};
                struct raw_order order = exchange(4096, 64, 100);
                struct raw_blob offer, answer = {0};
                int status, there[2], back[2];
                struct raw_end *e;
                uint64_t ns;
                pid_t child;

                if (raw_unavailable(schemes[s]))
                        continue;
                assert_int_equal(pipe(there) | pipe(back), 0);
                child = fork();
                if (child == 0) {
                        int ok = read(there[0], &offer, sizeof(offer)) == sizeof(offer) &&
                                 raw_answer(&o, &offer, &answer, &e) == 0 &&
                                 write(back[1], &answer, sizeof(answer)) == sizeof(answer) && raw_serve(e, &order) == 0;

                        _exit(!ok);
                }
                assert_int_equal(raw_offer(&o, &offer, &e), 0);
                assert_int_equal(write(there[1], &offer, sizeof(offer)), sizeof(offer));
                assert_int_equal(read(back[0], &answer, sizeof(answer)), sizeof(answer));
                assert_int_equal(raw_settle(e, &answer), 0);
                assert_int_equal(raw_drive(e, &order, src, dst, NULL, &ns), 0);
                assert_int_equal(waitpid(child, &status, 0), child);
                assert_int_equal(status, 0);
                raw_free(e);
                for (int i = 0; i < 2; i++) {
                        close(there[i]);
                        close(back[i]);
                }
        }
}

static void a_blob_of_nobody_is_refused(void **state)
{
        struct raw_opts o = {.url = "shm", .max_bytes = 64, .depth = 1, .cpu_peer = -1}, other = o;
        struct raw_blob offer, answer, bad;
        struct raw_end *e, *f;

        assert_int_equal(raw_offer(&o, &offer, &e), 0);
        bad = offer;
        bad.bytes[0] ^= 1; /* the number that names the memory */
        assert_int_equal(raw_answer(&o, &bad, &answer, &f), -EPROTO);
        other.depth = 7;
        assert_int_equal(raw_answer(&other, &offer, &answer, &f), -EPROTO);
        memset(&bad, 0x7f, sizeof(bad));
        assert_true(raw_answer(&o, &bad, &answer, &f) < 0);
        raw_free(e);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(exchanges_of_all_sizes),
            cmocka_unit_test(exchanges_in_little_room),
            cmocka_unit_test(streams_of_all_depths),
            cmocka_unit_test(each_exchange_has_its_time),
            cmocka_unit_test(orders_that_do_not_fit_are_refused),
            cmocka_unit_test(unknown_media_are_refused),
            cmocka_unit_test(a_dead_child_is_an_error),
            cmocka_unit_test(a_silent_child_is_an_error),
            cmocka_unit_test(ends_meet_by_their_blobs),
            cmocka_unit_test(a_blob_of_nobody_is_refused),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
