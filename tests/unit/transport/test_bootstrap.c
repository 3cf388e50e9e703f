/* The bootstrap and the URLs of rdma, which need no device: who may come in, what strangers can do, what is refused. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "bootstrap.h"
#include "clock.h"
#include "err.h"
#include "rdma_private.h"

#define PROTO BOOT_PROTOCOL('t', 'e', 's', 't')

struct server {
        struct boot_listener *l;
        unsigned hellos, readies, drops;
        int refuse; /* -errno */
        char url[TP_URL_MAX];
        int fd;
};

static int on_hello(void *arg, int fd, const struct boot_frame *f, void *answer, size_t *len, void **made)
{
        struct server *s = arg;

        s->hellos++;
        if (s->refuse)
                return err_set(s->refuse, "the house\x1b is full");
        memcpy(answer, f->payload, f->len);
        *len = f->len;
        *made = s;
        return 0;
}

static void on_ready(void *arg, int fd, void *made)
{
        struct server *s = arg;

        s->readies++;
        s->fd = fd;
}

static void on_drop(void *arg, void *made)
{
        ((struct server *)arg)->drops++;
}

static void progress(void *arg)
{
        boot_listener_progress(((struct server *)arg)->l, true);
}

static void server_start(struct server *s)
{
        struct boot_serve serve = {PROTO, "rdma", on_hello, on_ready, on_drop, s};
        struct tp_url u;

        memset(s, 0, sizeof(*s));
        s->fd = -1;
        assert_int_equal(tp_url_parse("rdma://127.0.0.1:0", &u), 0);
        assert_int_equal(boot_listen("rdma://127.0.0.1:0", &u, &serve, &s->l), 0);
        boot_listener_url(s->l, s->url);
}

static struct inet_idle idle_of(struct server *s)
{
        return (struct inet_idle){boot_listener_fd(s->l), progress, s};
}

static int dial(struct server *s)
{
        struct inet_idle idle = idle_of(s);
        struct tp_url u;
        int fd;

        assert_int_equal(tp_url_parse(s->url, &u), 0);
        fd = inet_connect(s->url, &u, inet_tune, clock_ns() + NS_PER_S, &idle);
        assert_true(fd >= 0);
        return fd;
}

static void until(struct server *s, const unsigned *counter, unsigned n)
{
        uint64_t deadline = clock_ns() + 5 * NS_PER_S;

        while (*counter < n && clock_ns() < deadline)
                progress(s);
        assert_int_equal(*counter, n);
}

/* The server closed its end: a read says so. */
static void until_closed(struct server *s, int fd)
{
        uint64_t deadline = clock_ns() + 5 * NS_PER_S;
        uint8_t buf[600];
        ssize_t n;

        do {
                progress(s);
                n = recv(fd, buf, sizeof(buf), MSG_DONTWAIT);
        } while ((n > 0 || (n < 0 && errno == EAGAIN)) && clock_ns() < deadline);
        assert_true(n == 0 || (n < 0 && errno == ECONNRESET));
        close(fd);
}

static void test_exchange(void **state)
{
        struct server s;
        struct boot_frame f;
        struct inet_idle idle;
        struct boot_reader r = {0};
        int fd;

        server_start(&s);
        idle = idle_of(&s);
        fd = dial(&s);
        assert_int_equal(boot_exchange(fd, s.url, PROTO, "hello", 5, clock_ns() + NS_PER_S, &idle, &f), 0);
        assert_int_equal(f.len, 5);
        assert_memory_equal(f.payload, "hello", 5);
        assert_int_equal(s.readies, 0);
        assert_int_equal(boot_send(fd, PROTO, BOOT_READY, 0, 0, NULL, 0), 0);
        assert_int_equal(boot_send(fd, PROTO, BOOT_BYE, 0, 77, NULL, 0), 0); /* right behind: not swallowed */
        until(&s, &s.readies, 1);
        while (boot_receive(s.fd, PROTO, &r, "peer", &f) == 0)
                ;
        assert_int_equal(f.kind, BOOT_BYE);
        assert_int_equal(f.count, 77);
        close(fd);
        assert_int_equal(boot_receive(s.fd, PROTO, &r, "peer", &f), -EPIPE);
        close(s.fd);
        boot_listener_close(s.l);
        assert_int_equal(s.drops, 0);
}

static void test_refused(void **state)
{
        struct server s;
        struct boot_frame f;
        struct inet_idle idle;
        int fd;

        server_start(&s);
        s.refuse = -EADDRNOTAVAIL;
        idle = idle_of(&s);
        fd = dial(&s);
        assert_int_equal(boot_exchange(fd, s.url, PROTO, "x", 1, clock_ns() + NS_PER_S, &idle, &f), -EADDRNOTAVAIL);
        assert_non_null(strstr(err_text(), "the house? is full")); /* and no control character */
        close(fd);
        s.refuse = 0;
        fd = dial(&s);
        assert_int_equal(boot_exchange(fd, s.url, PROTO + 1, "x", 1, clock_ns() + NS_PER_S, &idle, &f), -EPROTO);
        assert_non_null(strstr(err_text(), "another transport"));
        close(fd);
        boot_listener_close(s.l);
}

static void test_strangers(void **state)
{
        static const char *const said[] = {"GET / HTTP/1.1\r\n\r\n", "djinnBTX", "\0\0\0\0\0\0\0\0\0", "d"};
        struct server s;
        struct boot_frame f;
        struct inet_idle idle;
        uint8_t head[BOOT_HEAD_BYTES] = "djinnBTS";
        int fd, silent[100];

        server_start(&s);
        idle = idle_of(&s);
        for (unsigned i = 0; i < 3; i++) {
                fd = dial(&s);
                assert_true(send(fd, said[i], 9, MSG_NOSIGNAL) == 9);
                until_closed(&s, fd);
        }
        head[8] = 1; /* version 1, HELLO, our protocol, and more payload than any frame has */
        head[10] = BOOT_HELLO;
        memcpy(head + 12, "test", 4);
        memset(head + 16, 0xff, 4);
        fd = dial(&s);
        assert_true(send(fd, head, sizeof(head), MSG_NOSIGNAL) == sizeof(head));
        until_closed(&s, fd);
        fd = dial(&s); /* READY before HELLO */
        assert_int_equal(boot_send(fd, PROTO, BOOT_READY, 0, 0, NULL, 0), 0);
        until_closed(&s, fd);
        for (unsigned i = 0; i < 100; i++) /* more than there is room for; the oldest make room */
                silent[i] = dial(&s);
        fd = dial(&s);
        assert_int_equal(boot_exchange(fd, s.url, PROTO, "y", 1, clock_ns() + 2 * NS_PER_S, &idle, &f), 0);
        close(fd); /* answered, never ready */
        until(&s, &s.drops, 1);
        for (unsigned i = 0; i < 100; i++)
                close(silent[i]);
        assert_int_equal(s.hellos, 1);
        assert_int_equal(s.readies, 0);
        boot_listener_close(s.l);
}

/* No descriptor for whoever comes: the listener does not wake its user for that, and takes him later. */
static void test_no_descriptors(void **state)
{
        struct server s;
        struct pollfd p = {.events = POLLIN};
        struct rlimit r;
        unsigned polls = 0;
        int fd, lowest;

        server_start(&s);
        p.fd = boot_listener_fd(s.l);
        fd = dial(&s);
        lowest = dup(fd);
        close(lowest);
        assert_int_equal(getrlimit(RLIMIT_NOFILE, &r), 0);
        assert_int_equal(setrlimit(RLIMIT_NOFILE, &(struct rlimit){(rlim_t)lowest, r.rlim_max}), 0);
        assert_int_equal(poll(&p, 1, 1000), 1);
        do /* a listener that spins is never quiet */
                progress(&s);
        while (poll(&p, 1, 0) != 0 && ++polls < 1000);
        assert_true(polls < 1000);
        assert_int_equal(poll(&p, 1, 1000), 1); /* it looks again by itself */
        assert_int_equal(setrlimit(RLIMIT_NOFILE, &r), 0);
        assert_int_equal(boot_send(fd, PROTO, BOOT_HELLO, 0, 0, "z", 1), 0);
        until(&s, &s.hellos, 1);
        close(fd);
        boot_listener_close(s.l);
}

static void test_other_protocols_do_not_move_the_cursor(void **state)
{
        struct boot_frame f = {.kind = BOOT_ANSWER};
        struct boot_reader in = {0};
        int sv[2];

        assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, sv), 0);
        assert_int_equal(boot_send(sv[0], BOOT_PROTOCOL(27, '[', '2', 'J'), BOOT_ANSWER, 0, 0, NULL, 0), 0);
        assert_int_equal(boot_receive(sv[1], PROTO, &in, "peer", &f), -EPROTO);
        assert_non_null(strstr(err_text(), "(?[2J)"));
        close(sv[0]);
        close(sv[1]);
}

static void test_nobody(void **state)
{
        struct server s;
        struct tp_url u;

        server_start(&s);
        boot_listener_close(s.l);
        assert_int_equal(tp_url_parse(s.url, &u), 0);
        assert_int_equal(inet_connect(s.url, &u, inet_tune, clock_ns() + NS_PER_S, NULL), -ECONNREFUSED);
        assert_non_null(strstr(err_text(), "nothing listens"));
}

static int read_url(const char *url, struct rdma_url *out)
{
        struct tp_url u;

        assert_int_equal(tp_url_parse(url, &u), 0);
        rdma_url_default(out);
        err_clear();
        return rdma_url_read(url, &u, out);
}

static void test_urls(void **state)
{
        static const char *const bad[] = {"qps=0",   "qps=17", "qps=x",     "qps=",   "qps",  "gid=-1",      "mtu=1000",
                                          "tc=256",  "sl=16",  "foo=1",     "dev=",   "cm=2", "cm=1&qps=2",  "window=8",
                                          "msg=100", "gid=1x", "timeout=7", "gidd=1", "=1",   "window=99999"};
        struct rdma_url r;
        char url[TP_URL_MAX];

        assert_int_equal(read_url("rdma://h:1", &r), 0);
        assert_int_equal(r.gid, -1);
        assert_int_equal(r.qps, 1);
        assert_int_equal(read_url("rdma://h:1?dev=mlx5_0/2&gid=3&qps=4&mtu=2048&tc=106&window=64&msg=65536", &r), 0);
        assert_string_equal(r.dev, "mlx5_0/2");
        assert_int_equal(r.gid, 3);
        assert_int_equal(r.qps, 4);
        assert_int_equal(r.mtu, 2048);
        assert_int_equal(r.tc, 106);
        assert_int_equal(r.window, 64);
        assert_int_equal(r.msg, 65536);
        for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
                snprintf(url, sizeof(url), "rdma://h:1?%s", bad[i]);
                if (read_url(url, &r) != -EINVAL || !err_text()[0])
                        fail_msg("%s was taken", url);
        }
        assert_int_equal(read_url("rdma://h:1?colour=red", &r), -EINVAL);
        assert_non_null(strstr(err_text(), "colour"));
        assert_non_null(strstr(err_text(), "qps=1..16"));
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(test_exchange),
            cmocka_unit_test(test_refused),
            cmocka_unit_test(test_strangers),
            cmocka_unit_test(test_nobody),
            cmocka_unit_test(test_urls),
            cmocka_unit_test(test_no_descriptors),
            cmocka_unit_test(test_other_protocols_do_not_move_the_cursor),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
