/* inet: what is printed of an address can be connected to, and what goes wrong is said. */
#include <errno.h>
#include <poll.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "clock.h"
#include "err.h"
#include "inet.h"

static struct tp_url url_of(const char *text)
{
        struct tp_url u;

        assert_int_equal(tp_url_parse(text, &u), 0);
        return u;
}

static void prints_what_it_resolves(void **state)
{
        static const char *const texts[] = {"tcp://127.0.0.1:80", "tcp://[::1]:65535", "tcp://[fe80::1%lo]:1"};

        for (size_t i = 0; i < ARRAY_LEN(texts); i++) {
                struct tp_url u = url_of(texts[i]);
                struct addrinfo *ai;
                char out[TP_URL_MAX];

                assert_int_equal(inet_resolve(texts[i], &u, false, &ai), 0);
                inet_url(ai->ai_addr, "tcp", out);
                assert_string_equal(out, texts[i]);
                freeaddrinfo(ai);
        }
}

/* The name with empty labels is one that no server has to be asked for. */
static void says_what_it_cannot_resolve(void **state)
{
        struct tp_url u = url_of("tcp://127.0.0.1");
        struct addrinfo *ai;

        assert_int_equal(inet_resolve("tcp://127.0.0.1", &u, true, &ai), -EINVAL);
        assert_non_null(strstr(err_text(), "tcp://127.0.0.1: no port, expected tcp://host:port (port 0"));
        u = url_of("tcp://no..such..name:1");
        assert_true(inet_resolve("tcp://no..such..name:1", &u, false, &ai) < 0);
        assert_non_null(strstr(err_text(), "cannot resolve 'no..such..name'"));
        u = url_of("tcp://[fe80::1%no-such-if]:1");
        assert_true(inet_resolve("tcp://[fe80::1%no-such-if]:1", &u, false, &ai) < 0);
}

/* A listener on every address says one that it can be reached at, on this host. */
static void listeners_are_reached(void **state)
{
        static const char *const texts[] = {"tcp://127.0.0.1:0", "tcp://*:0", "tcp://0.0.0.0:0", "tcp://[::]:0"};

        for (size_t i = 0; i < ARRAY_LEN(texts); i++) {
                struct tp_url u = url_of(texts[i]), there;
                char at[TP_URL_MAX], peer[TP_URL_MAX];
                int l = inet_listen(texts[i], &u, 4, inet_tune), fd;

                if (l == -EAFNOSUPPORT || l == -EADDRNOTAVAIL)
                        continue; /* a host without IPv6 */
                assert_true(l >= 0);
                inet_listener_url(l, "tcp", at);
                there = url_of(at);
                assert_true(there.loopback);
                fd = inet_connect(at, &there, inet_tune, clock_ns() + NS_PER_S, NULL);
                assert_true(fd >= 0);
                inet_peer_url(fd, "tcp", peer);
                assert_string_equal(peer, at);
                close(fd);
                close(l);
                assert_int_equal(inet_connect(at, &there, inet_tune, clock_ns() + NS_PER_S, NULL), -ECONNREFUSED);
                assert_non_null(strstr(err_text(), "nothing listens there"));
        }
}

struct pipe_end {
        int in, out, calls;
};

static void read_one(void *arg)
{
        struct pipe_end *p = arg;
        char c;

        assert_int_equal(read(p->in, &c, 1), 1);
        p->calls++;
}

static void waiting_gets_others_on(void **state)
{
        uint64_t began = clock_ns();
        int other[2], pipes[2];
        struct pipe_end p;
        struct inet_idle idle;

        assert_int_equal(pipe(other), 0);
        assert_int_equal(pipe(pipes), 0);
        p = (struct pipe_end){.in = pipes[0], .out = pipes[1]};
        idle = (struct inet_idle){.fd = p.in, .progress = read_one, .arg = &p};
        assert_int_equal(write(p.out, "ab", 2), 2);
        assert_int_equal(inet_wait(other[0], POLLIN, began + 30 * NS_PER_MS, &idle), -ETIMEDOUT);
        assert_true(clock_ns() - began >= 30 * NS_PER_MS);
        assert_int_equal(p.calls, 2);
        assert_int_equal(write(other[1], "c", 1), 1);
        assert_int_equal(inet_wait(other[0], POLLIN, clock_ns() + NS_PER_S, &idle), 0);
        for (int i = 0; i < 2; i++) {
                close(other[i]);
                close(pipes[i]);
        }
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(prints_what_it_resolves),
            cmocka_unit_test(says_what_it_cannot_resolve),
            cmocka_unit_test(listeners_are_reached),
            cmocka_unit_test(waiting_gets_others_on),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
