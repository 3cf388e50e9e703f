/* A thousand sessions at a time on one server, each with a model, a region and runs of its own, over each transport. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "server_client.h"

#include "check.h"

#define SESSIONS 1000u
#define ROUNDS   3u
#define LEN      64u
#define FDS      (5 * SESSIONS) /* both ends are this process: 2 sockets, and 2 descriptors of each client's context */

static size_t resident(void)
{
        FILE *f = fopen("/proc/self/statm", "r");
        unsigned long pages = 0;

        assert_non_null(f);
        assert_int_equal(fscanf(f, "%*u %lu", &pages), 1);
        fclose(f);
        return pages * 4096;
}

static void open_session(struct client *c, struct cl_run *r, const char *url)
{
        struct msg_loaded m;
        struct graph g;

        graph_echo(&g, LEN);
        cl_open(c, url);
        assert_int_equal(cl_load(c, &g, MSG_WEIGHTS_NONE, 0, NULL, &m), 0);
        graph_free(&g);
        cl_region(c, 4096);
        memset(r, 0, sizeof(*r));
        r->run.h.flags = RUN_PLAN_CACHE;
        r->run.model = m.model;
}

/* Every session has its own bytes come back, whoever else asked meanwhile. */
static void run_all(struct client *clients, struct cl_run *runs, unsigned round)
{
        static uint8_t data[LEN];
        static uint64_t ids[SESSIONS];

        for (unsigned i = 0; i < SESSIONS; i++) {
                struct cl_run *r = &runs[i];
                uint32_t model = r->run.model, flags = r->run.h.flags;

                memset(r, 0, sizeof(*r));
                r->run.model = model;
                r->run.h.flags = flags;
                memset(data, (int)(i * 7 + round), LEN);
                memcpy(data, &i, sizeof(i));
                run_range(r, 0, 1, 1, 1, 0);
                run_inline(r, 0, data, LEN);
                run_output(r, 1, 0, LEN, 0, 0);
                ids[i] = cl_run_send(&clients[i], r);
        }
        for (unsigned i = 0; i < SESSIONS; i++) {
                assert_int_equal(cl_answer(&clients[i], MSG_DONE, ids[i]), 0);
                assert_memory_equal(clients[i].bytes, runs[i].bytes, LEN);
        }
}

static void a_thousand_sessions(void **state)
{
        const char *scheme = *state;
        struct test_server *s = ts_start(NULL);
        struct client *clients = calloc(SESSIONS, sizeof(*clients));
        struct cl_run *runs = calloc(SESSIONS, sizeof(*runs));
        size_t before;

        assert_non_null(clients);
        assert_non_null(runs);
        before = resident();
        for (unsigned i = 0; i < SESSIONS; i++)
                open_session(&clients[i], &runs[i], ts_url(s, scheme));
        for (unsigned round = 0; round < ROUNDS; round++)
                run_all(clients, runs, round);
        print_message("%s: %.0f KiB for each session, both ends together\n", scheme,
                      (double)(resident() - before) / 1024 / SESSIONS);
        for (unsigned i = 0; i < SESSIONS; i++)
                cl_close(&clients[i]);
        free(clients);
        free(runs);
        assert_int_equal(ts_stop(s), 0);
}

int main(void)
{
        struct CMUnitTest tests[] = {
            cmocka_unit_test_prestate(a_thousand_sessions, "tcp"),
            cmocka_unit_test_prestate(a_thousand_sessions, "shm"),
            cmocka_unit_test_prestate(a_thousand_sessions, "loop"),
        };
        struct rlimit l;

        tests[0].name = "a thousand sessions over tcp";
        tests[1].name = "a thousand sessions over shm";
        tests[2].name = "a thousand sessions over loop";
        if (getrlimit(RLIMIT_NOFILE, &l) < 0)
                return 1;
        l.rlim_cur = l.rlim_max;
        if (setrlimit(RLIMIT_NOFILE, &l) < 0 || l.rlim_cur < FDS) {
                fprintf(stderr, "skipped: %u open files are needed, the limit is %llu (ulimit -Hn)\n", FDS,
                        (unsigned long long)l.rlim_cur);
                return 77;
        }
        return cmocka_run_group_tests(tests, NULL, NULL);
}
