/* inet: what is printed of an address can be connected to, and what goes wrong is said. */
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
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
#include "tcp_socket.h"

#define WAIT_NS (10 * NS_PER_S)

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
        assert_int_equal(inet_resolve("tcp://[fe80::1%no-such-if]:1", &u, false, &ai), -EHOSTUNREACH);
        assert_non_null(strstr(err_text(), "this host has no interface 'no-such-if'"));
}

static bool has_v6(void)
{
        struct tp_url u = url_of("tcp://[::1]:0");
        int fd = inet_listen("tcp://[::1]:0", &u, 1, inet_tune);

        if (fd >= 0)
                close(fd);
        return fd >= 0;
}

static int option(int fd, int level, int name)
{
        int value = -1;
        socklen_t n = sizeof(value);

        assert_int_equal(getsockopt(fd, level, name, &value, &n), 0);
        return value;
}

/* Closed on exec, never blocking, without delay, and watched over. */
static void check_socket(int fd)
{
        assert_true(fcntl(fd, F_GETFD) & FD_CLOEXEC);
        assert_true(fcntl(fd, F_GETFL) & O_NONBLOCK);
        assert_true(option(fd, IPPROTO_TCP, TCP_NODELAY) > 0);
        assert_true(option(fd, SOL_SOCKET, SO_KEEPALIVE) > 0);
}

/* What a listener was given, those have that it accepts: nobody sets it again. */
static void accepted_sockets_inherit(void **state)
{
        static const struct {
                int level, name;
        } options[] = {{IPPROTO_TCP, TCP_NODELAY},   {SOL_SOCKET, SO_KEEPALIVE}, {IPPROTO_TCP, TCP_KEEPIDLE},
                       {IPPROTO_TCP, TCP_KEEPINTVL}, {IPPROTO_TCP, TCP_KEEPCNT}, {SOL_SOCKET, SO_SNDBUF},
                       {SOL_SOCKET, SO_RCVBUF}};
        struct tp_url u = url_of("tcp://127.0.0.1:0");
        int l = inet_listen("tcp://127.0.0.1:0", &u, 4, tcp_socket_tune), fd, took;
        const int small = 1 << 17;
        char at[TP_URL_MAX];

        assert_true(l >= 0);
        /* Fixed sizes, also where the host does not allow those that tcp_socket_tune would like. */
        assert_int_equal(setsockopt(l, SOL_SOCKET, SO_SNDBUF, &small, sizeof(small)), 0);
        assert_int_equal(setsockopt(l, SOL_SOCKET, SO_RCVBUF, &small, sizeof(small)), 0);
        inet_listener_url(l, "tcp", at);
        u = url_of(at);
        fd = inet_connect(at, &u, tcp_socket_tune, clock_ns() + WAIT_NS, NULL);
        assert_true(fd >= 0);
        assert_int_equal(inet_wait(l, POLLIN, clock_ns() + WAIT_NS, NULL), 0);
        took = accept4(l, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        assert_true(took >= 0);
        check_socket(took);
        for (size_t i = 0; i < ARRAY_LEN(options); i++)
                assert_int_equal(option(took, options[i].level, options[i].name),
                                 option(l, options[i].level, options[i].name));
        close(took);
        close(fd);
        close(l);
}

static int next_fd(void)
{
        int fd = dup(STDERR_FILENO);

        close(fd);
        return fd;
}

/* A listener on every address says one that it can be reached at, on this host. Nothing is left open. */
static void listeners_are_reached(void **state)
{
        static const char *const texts[] = {"tcp://127.0.0.1:0", "tcp://0.0.0.0:0", "tcp://*:0", "tcp://[::]:0"};
        int before = next_fd();

        for (int i = 0; i < (has_v6() ? 4 : 2); i++) {
                struct tp_url u = url_of(texts[i]), there;
                char at[TP_URL_MAX], peer[TP_URL_MAX];
                int l = inet_listen(texts[i], &u, 4, inet_tune), fd;

                assert_true(l >= 0);
                check_socket(l);
                inet_listener_url(l, "tcp", at);
                there = url_of(at);
                assert_true(there.loopback);
                fd = inet_connect(at, &there, inet_tune, clock_ns() + WAIT_NS, NULL);
                assert_true(fd >= 0);
                check_socket(fd);
                inet_peer_url(fd, "tcp", peer);
                assert_string_equal(peer, at);
                assert_true(inet_listen(at, &there, 4, inet_tune) == -EADDRINUSE);
                close(fd);
                close(l);
                assert_int_equal(inet_connect(at, &there, inet_tune, clock_ns() + WAIT_NS, NULL), -ECONNREFUSED);
                assert_non_null(strstr(err_text(), "nothing listens there"));
        }
        assert_int_equal(next_fd(), before);
}

static bool resolves_to(const struct tp_url *u, int family)
{
        struct addrinfo *ai;
        bool found = false;

        assert_int_equal(inet_resolve(u->host, u, false, &ai), 0);
        for (const struct addrinfo *a = ai; a; a = a->ai_next)
                found = found || a->ai_family == family;
        freeaddrinfo(ai);
        return found;
}

/* localhost may be two addresses; who listens at one of them is found. */
static void all_addresses_of_a_name_are_tried(void **state)
{
        static const char *const texts[] = {"tcp://127.0.0.1:0", "tcp://[::1]:0"};

        for (int i = 0; i < (has_v6() ? 2 : 1); i++) {
                struct tp_url u = url_of(texts[i]), named = url_of("tcp://localhost");
                int l = inet_listen(texts[i], &u, 4, inet_tune), fd;
                char at[TP_URL_MAX];

                assert_true(l >= 0);
                inet_listener_url(l, "tcp", at);
                u = url_of(at);
                strcpy(named.port, u.port);
                if (resolves_to(&named, i ? AF_INET6 : AF_INET)) {
                        fd = inet_connect("tcp://localhost", &named, inet_tune, clock_ns() + WAIT_NS, NULL);
                        assert_true(fd >= 0);
                        close(fd);
                }
                close(l);
        }
}

struct pipe_end {
        int in, wakes, calls;
};

/* What the context has to do meanwhile; the second time it is what the waiter waits for. */
static void read_one(void *arg)
{
        struct pipe_end *p = arg;
        char c;

        assert_int_equal(read(p->in, &c, 1), 1);
        if (++p->calls == 2)
                assert_int_equal(write(p->wakes, "c", 1), 1);
}

static void waiting_gets_others_on(void **state)
{
        int awaited[2], other[2];
        struct inet_idle idle;
        struct pipe_end p;
        uint64_t began;

        assert_int_equal(pipe(awaited), 0);
        assert_int_equal(pipe(other), 0);
        p = (struct pipe_end){.in = other[0], .wakes = awaited[1]};
        idle = (struct inet_idle){.fd = p.in, .progress = read_one, .arg = &p};
        assert_int_equal(write(other[1], "ab", 2), 2);
        assert_int_equal(inet_wait(awaited[0], POLLIN, clock_ns() + WAIT_NS, &idle), 0);
        assert_int_equal(p.calls, 2);
        began = clock_ns();
        assert_int_equal(inet_wait(other[0], POLLIN, began + 30 * NS_PER_MS, NULL), -ETIMEDOUT);
        assert_true(clock_ns() - began >= 30 * NS_PER_MS);
        for (int i = 0; i < 2; i++) {
                close(awaited[i]);
                close(other[i]);
        }
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(prints_what_it_resolves),           cmocka_unit_test(says_what_it_cannot_resolve),
            cmocka_unit_test(accepted_sockets_inherit),          cmocka_unit_test(listeners_are_reached),
            cmocka_unit_test(all_addresses_of_a_name_are_tried), cmocka_unit_test(waiting_gets_others_on),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
