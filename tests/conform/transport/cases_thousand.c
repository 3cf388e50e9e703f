/* A thousand endpoints of one context at a time, as a server has them: each brings and takes verified messages. */
#include <sys/resource.h>
#include <unistd.h>

#include "conform.h"

#define THOUSAND 1000u
#define ROUNDS   3u
#define LEN_MAX  2048u
#define FDS      (2 * THOUSAND) /* shm and tcp need one for each endpoint, and some for connections in the making */

static size_t length_of(unsigned i, unsigned round)
{
        return 8 + (size_t)(i * 131 + round * 977) % (LEN_MAX - 8);
}

static void raise_fd_limit(void)
{
        struct rlimit l;

        CHECK(getrlimit(RLIMIT_NOFILE, &l) == 0);
        l.rlim_cur = l.rlim_max;
        CHECK(setrlimit(RLIMIT_NOFILE, &l) == 0);
        if (l.rlim_cur < FDS) {
                fprintf(stderr, "skipped: %u open files are needed, the limit is %llu (ulimit -Hn)\n", FDS,
                        (unsigned long long)l.rlim_cur);
                _exit(EXIT_SKIP);
        }
}

/* Resident bytes of this process, shared memory among them. Both ends of loop are one process. */
static size_t resident(void)
{
        FILE *f = fopen("/proc/self/statm", "r");
        unsigned long pages = 0;

        CHECK(f && fscanf(f, "%*u %lu", &pages) == 1);
        fclose(f);
        return pages * 4096;
}

static void say_memory(const struct side *s, size_t before, int fds_before)
{
        printf("%s, side %c: %.1f KiB and %.1f descriptors for each of %u endpoints\n", s->backend->name,
               s->is_a ? 'a' : 'b', (double)(resident() - before) / 1024 / THOUSAND,
               (double)(count_fds() - fds_before) / THOUSAND, THOUSAND);
}

static void post_round(struct side *s, struct tp_ep **eps, unsigned round)
{
        static unsigned char buf[THOUSAND][LEN_MAX];

        for (unsigned i = 0; i < THOUSAND; i++) {
                size_t len = length_of(i, round);
                uint64_t id = i;

                memcpy(buf[i], &id, 8);
                pattern_fill(buf[i] + 8, len - 8, i * ROUNDS + round);
                do_send(s, eps[i], buf[i], len, 0);
        }
        settle(s);
}

static void thousand_a(struct side *s)
{
        struct tp_ep **eps = calloc(THOUSAND, sizeof(struct tp_ep *));
        size_t before;
        int fds;

        CHECK(eps);
        raise_fd_limit();
        side_open(s);
        before = resident();
        fds = count_fds();
        side_learn_url(s);
        for (unsigned i = 0; i < THOUSAND; i++)
                side_connect(s, &eps[i]);
        for (unsigned round = 0; round < ROUNDS; round++) {
                post_round(s, eps, round);
                for (unsigned n = 0; n < THOUSAND; n++) {
                        struct tp_event ev;
                        uint64_t id;

                        next_msg(s, &ev);
                        memcpy(&id, ev.data, 8);
                        CHECK(id < THOUSAND && eps[id] == ev.ep);
                        CHECK_EQ(ev.len, length_of((unsigned)id, round));
                        CHECK(pattern_ok((const char *)ev.data + 8, ev.len - 8, id * ROUNDS + round));
                        release(s, &ev);
                }
        }
        say_memory(s, before, fds);
        barrier(s);
        free(eps);
}

static void thousand_b(struct side *s)
{
        unsigned char buf[LEN_MAX];
        size_t before;
        int fds;

        raise_fd_limit();
        side_open(s);
        before = resident();
        fds = count_fds();
        side_listen(s);
        for (unsigned i = 0; i < THOUSAND; i++)
                side_accept(s, &s->ep);
        for (unsigned n = 0; n < ROUNDS * THOUSAND; n++) {
                struct tp_event ev;

                next_msg(s, &ev);
                CHECK(ev.len <= LEN_MAX);
                memcpy(buf, ev.data, ev.len);
                release(s, &ev);
                do_send(s, ev.ep, buf, ev.len, 0);
                settle(s);
        }
        say_memory(s, before, fds);
        barrier(s);
}

const struct tcase thousand_cases[] = {
    {"thousand_endpoints", thousand_a, thousand_b, BARE | NOT_FAULT},
    {NULL, NULL, NULL, 0},
};
