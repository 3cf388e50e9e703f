/*
 * tcp: what a message costs in system calls, and what a bulk transfer costs in copies. The calls of the transport are
 * counted by wrapping them at link time.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "clock.h"
#include "transport.h"

#define WAIT_NS (10 * NS_PER_S)
#define ROUNDS  1000

static struct {
        unsigned sent, sent_whole, received, epoll; /* sent_whole: as one piece */
        bool refuse_send;                           /* as a full socket does */
        size_t send_most;                           /* bytes of one piece that the kernel takes; 0: all */
} calls;

ssize_t __real_send(int fd, const void *buf, size_t len, int flags);
ssize_t __real_sendmsg(int fd, const struct msghdr *m, int flags);
ssize_t __real_recv(int fd, void *buf, size_t len, int flags);
ssize_t __real_readv(int fd, const struct iovec *iov, int n);
int __real_epoll_wait(int fd, struct epoll_event *ev, int max, int timeout);
ssize_t __wrap_send(int fd, const void *buf, size_t len, int flags);
ssize_t __wrap_sendmsg(int fd, const struct msghdr *m, int flags);
ssize_t __wrap_recv(int fd, void *buf, size_t len, int flags);
ssize_t __wrap_readv(int fd, const struct iovec *iov, int n);
int __wrap_epoll_wait(int fd, struct epoll_event *ev, int max, int timeout);

ssize_t __wrap_send(int fd, const void *buf, size_t len, int flags)
{
        if (calls.refuse_send) {
                errno = EAGAIN;
                return -1;
        }
        calls.sent++;
        calls.sent_whole++;
        len = calls.send_most && len > calls.send_most ? calls.send_most : len;
        return __real_send(fd, buf, len, flags);
}

ssize_t __wrap_sendmsg(int fd, const struct msghdr *m, int flags)
{
        calls.sent++;
        return __real_sendmsg(fd, m, flags);
}

ssize_t __wrap_recv(int fd, void *buf, size_t len, int flags)
{
        ssize_t n = __real_recv(fd, buf, len, flags);

        calls.received += n > 0;
        return n;
}

ssize_t __wrap_readv(int fd, const struct iovec *iov, int n)
{
        ssize_t got = __real_readv(fd, iov, n);

        calls.received += got > 0;
        return got;
}

int __wrap_epoll_wait(int fd, struct epoll_event *ev, int max, int timeout)
{
        calls.epoll++;
        return __real_epoll_wait(fd, ev, max, timeout);
}

static struct tp_ctx *ctx;
static struct tp_ep *client, *server;

static int set_up(void **state)
{
        struct tp_listener *l;
        struct tp_event ev;

        assert_int_equal(tp_open("tcp", NULL, &ctx), 0);
        assert_int_equal(tp_listen(ctx, "tcp://localhost:0", &l), 0);
        assert_int_equal(tp_connect(ctx, l->url, clock_ns() + WAIT_NS, &client), 0);
        while (tp_accept(l, &server) < 0)
                assert_int_equal(tp_poll(ctx, &ev, 1), 0);
        tp_listener_close(l);
        return 0;
}

static int tear_down(void **state)
{
        tp_close(ctx);
        return 0;
}

static struct tp_event next(void)
{
        uint64_t until = clock_ns() + WAIT_NS;
        struct tp_event ev;

        while (tp_poll(ctx, &ev, 1) == 0)
                assert_true(clock_ns() < until);
        return ev;
}

static void pass(struct tp_ep *from, struct tp_ep *to, size_t len)
{
        static const char buf[4096];
        struct tp_event ev;

        assert_int_equal(tp_send(from, buf, len, 0, 1), TP_COMPLETE);
        ev = next();
        assert_int_equal(ev.kind, TP_EV_MSG);
        assert_ptr_equal(ev.ep, to);
        assert_int_equal(ev.len, len);
        assert_int_equal((uintptr_t)ev.data % 8, 0);
        tp_release(to, ev.cookie);
}

static void a_message_is_one_call_each_way(void **state)
{
        static const size_t sizes[] = {0, 1, 64, 300, 1024, 1025, 4096};

        uint64_t copied = 0;

        for (size_t s = 0; s < ARRAY_LEN(sizes); s++) {
                memset(&calls, 0, sizeof(calls));
                for (int i = 0; i < ROUNDS; i++) {
                        pass(client, server, sizes[s]);
                        pass(server, client, sizes[s]);
                }
                assert_int_equal(calls.sent, 2 * ROUNDS);
                assert_int_equal(calls.sent_whole, sizes[s] <= 1024 ? 2 * ROUNDS : 0);
                assert_int_equal(calls.received, 2 * ROUNDS);
                assert_int_equal(calls.epoll, 0);
                copied += sizes[s] <= 1024 ? 2 * ROUNDS * sizes[s] : 0;
                assert_int_equal(client->n.bytes_copied + server->n.bytes_copied, copied);
        }
}

/* Descriptors in the context's epoll set, as the kernel lists them. */
static unsigned in_epoll_set(void)
{
        char path[64], line[256];
        unsigned n = 0;
        FILE *f;

        snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", tp_fd(ctx));
        f = fopen(path, "r");
        assert_non_null(f);
        while (fgets(line, sizeof(line), f))
                n += !strncmp(line, "tfd:", 4);
        fclose(f);
        return n;
}

/* An epoll set makes each arrival dearer. Who polls for long is not in it; who is about to sleep is. */
static void who_only_polls_is_in_no_epoll_set(void **state)
{
        unsigned rests, both = in_epoll_set();
        struct tp_event ev;

        if (both == 0)
                skip(); /* this kernel does not tell */
        for (int i = 0; i < ROUNDS; i++)
                assert_int_equal(tp_poll(ctx, &ev, 1), 0);
        rests = in_epoll_set();
        assert_int_equal(rests + 2, both);
        pass(client, server, 64);
        assert_int_equal(in_epoll_set(), rests);
        assert_int_equal(tp_arm(ctx), 0);
        assert_int_equal(in_epoll_set(), both);
        tp_disarm(ctx);
        pass(client, server, 64);
}

static void go_apart(void)
{
        struct tp_event ev;

        for (int i = 0; i < ROUNDS; i++)
                assert_int_equal(tp_poll(ctx, &ev, 1), 0);
}

/* Who is in no epoll set still takes new connections, and then all are polled as they should be. */
static void a_newcomer_brings_them_back(void **state)
{
        uint64_t until = clock_ns() + WAIT_NS;
        unsigned before = in_epoll_set();
        struct tp_listener *l;
        struct tp_ep *client2, *server2;
        struct tp_event ev;

        if (before == 0)
                skip(); /* this kernel does not tell */
        assert_int_equal(tp_listen(ctx, "tcp://localhost:0", &l), 0);
        go_apart();
        assert_int_equal(in_epoll_set(), before - 2 + 1);
        assert_int_equal(tp_connect(ctx, l->url, clock_ns() + WAIT_NS, &client2), 0);
        while (tp_accept(l, &server2) < 0) {
                assert_int_equal(tp_poll(ctx, &ev, 1), 0);
                assert_true(clock_ns() < until);
        }
        assert_int_equal(in_epoll_set(), before + 1 + 2);
        for (int i = 0; i < 3; i++) {
                pass(client, server, 64);
                pass(server2, client2, 64);
                pass(server, client, 4096);
                pass(client2, server2, 4096);
        }
        tp_ep_close(client2);
        do {
                ev = next();
        } while (ev.kind != TP_EV_DOWN);
        assert_ptr_equal(ev.ep, server2);
        tp_ep_close(server2);
        tp_listener_close(l);
        go_apart();
        assert_int_equal(in_epoll_set(), before - 2);
        pass(client, server, 64);
}

/* ---- two contexts, as two processes have them ---- */

struct connector {
        pthread_t thread;
        struct tp_ctx *ctx;
        const char *url;
        struct tp_ep *ep;
        int rc;
};

static void *connect_there(void *arg)
{
        struct connector *c = arg;

        c->rc = tp_connect(c->ctx, c->url, clock_ns() + WAIT_NS, &c->ep);
        return NULL;
}

/* From a context of its own to l, which only polls. */
static struct tp_ep *meet(struct connector *c, struct tp_listener *l, struct tp_ep **out)
{
        uint64_t until = clock_ns() + WAIT_NS;
        struct tp_event ev;

        *c = (struct connector){.url = l->url};
        *out = NULL;
        assert_int_equal(tp_open("tcp", NULL, &c->ctx), 0);
        assert_int_equal(pthread_create(&c->thread, NULL, connect_there, c), 0);
        while (tp_accept(l, out) < 0 && clock_ns() < until)
                tp_poll(l->ctx, &ev, 1);
        pthread_join(c->thread, NULL);
        assert_int_equal(c->rc, 0);
        assert_non_null(*out);
        return c->ep;
}

/* A listener is heard by who polls a connection and no epoll set. */
static void a_listener_is_heard_apart(void **state)
{
        struct connector c[2];
        struct tp_listener *l;
        struct tp_ctx *here;
        struct tp_event ev;
        struct tp_ep *ep;

        assert_int_equal(tp_open("tcp", NULL, &here), 0);
        assert_int_equal(tp_listen(here, "tcp://localhost:0", &l), 0);
        meet(&c[0], l, &ep);
        for (int i = 0; i < ROUNDS; i++)
                assert_int_equal(tp_poll(here, &ev, 1), 0);
        meet(&c[1], l, &ep);
        for (int i = 0; i < 2; i++)
                tp_close(c[i].ctx);
        tp_close(here);
}

static bool awake_within(struct tp_ctx *c, uint64_t ns)
{
        return poll(&(struct pollfd){.fd = tp_fd(c), .events = POLLIN}, 1, (int)(ns / NS_PER_MS)) == 1;
}

/* What the kernel had no room for is sent on by a sleeper, when it has; what it took is seen by the one that reads. */
static void a_full_socket_wakes_its_sleeper(void **state)
{
        enum { LEN = 64 << 20 }; /* more than the kernel holds */
        struct tp_ep *from, *to;
        struct tp_mem *mem;
        struct tp_listener *l;
        struct connector c;
        struct tp_ctx *here;
        struct tp_rmem *r;
        struct tp_key key;
        struct tp_event ev;
        uint64_t until = clock_ns() + 3 * WAIT_NS;
        void *src = calloc(1, LEN);

        assert_non_null(src);
        assert_int_equal(tp_open("tcp", NULL, &here), 0);
        assert_int_equal(tp_listen(here, "tcp://localhost:0", &l), 0);
        from = meet(&c, l, &to);
        assert_int_equal(tp_alloc(to, LEN, &mem), 0);
        assert_int_equal(tp_export_key(mem, 0, LEN, &key), 0);
        assert_int_equal(tp_import_key(from, &key, clock_ns() + WAIT_NS, &r), 0);
        for (int i = 0; i < ROUNDS; i++)
                assert_int_equal(tp_poll(c.ctx, &ev, 1), 0);
        assert_int_equal(tp_write(from, NULL, src, LEN, r, 0, 0, 1), TP_POSTED);
        for (;;) {
                int told;

                while ((told = tp_poll(c.ctx, &ev, 1)) == 0 && tp_arm(c.ctx) < 0)
                        assert_true(clock_ns() < until);
                if (told)
                        break;
                for (int i = 0; i < ROUNDS; i++) /* more than the socket holds at once */
                        assert_int_equal(tp_poll(here, &ev, 1), 0);
                assert_true(awake_within(c.ctx, WAIT_NS));
                tp_disarm(c.ctx);
        }
        assert_int_equal(ev.kind, TP_EV_DONE);
        assert_int_equal(ev.status, 0);
        tp_close(c.ctx);
        tp_close(here);
        free(src);
}

/* The end of a connection is heard also by who was in no epoll set. */
static void the_end_is_heard_apart(void **state)
{
        struct tp_event ev;

        go_apart();
        tp_ep_close(client);
        ev = next();
        assert_int_equal(ev.kind, TP_EV_DOWN);
        assert_ptr_equal(ev.ep, server);
        go_apart();
        assert_int_equal(tp_poll(ctx, &ev, 1), 0);
}

/* A short message of which the kernel takes nothing, or only the beginning, arrives as it was all the same. */
static void what_the_kernel_refuses_is_queued(void **state)
{
        char buf[700];

        for (size_t most = 0; most < 740; most++) {
                struct tp_event ev;
                int rc;

                memset(buf, (int)most, sizeof(buf));
                memset(&calls, 0, sizeof(calls));
                calls.refuse_send = most == 0;
                calls.send_most = most;
                rc = tp_send(client, buf, sizeof(buf) - most % 8, 0, most);
                assert_in_range(rc, TP_POSTED, TP_COMPLETE);
                for (bool done = rc == TP_COMPLETE, message = false; !done || !message;) {
                        ev = next();
                        if (ev.kind == TP_EV_DONE) {
                                assert_int_equal(ev.cookie, most);
                                assert_int_equal(ev.status, 0);
                                done = true;
                                continue;
                        }
                        assert_int_equal(ev.kind, TP_EV_MSG);
                        assert_int_equal(ev.len, sizeof(buf) - most % 8);
                        assert_int_equal((uintptr_t)ev.data % 8, 0);
                        assert_memory_equal(ev.data, buf, ev.len);
                        tp_release(server, ev.cookie);
                        message = true;
                }
                memset(&calls, 0, sizeof(calls));
                pass(client, server, 64);
        }
}

static struct tp_rmem *open_to_client(size_t len, struct tp_mem **mem)
{
        struct tp_rmem *r;
        struct tp_key key;

        assert_int_equal(tp_alloc(server, len, mem), 0);
        assert_int_equal(tp_export_key(*mem, 0, len, &key), 0);
        assert_int_equal(tp_import_key(client, &key, clock_ns() + WAIT_NS, &r), 0);
        return r;
}

static void a_write_and_its_message_are_one_call(void **state)
{
        static uint8_t src[16384];
        struct tp_mem *mem;
        struct tp_rmem *r = open_to_client(sizeof(src), &mem);
        bool message = false;
        struct tp_event ev;

        memset(src, 7, sizeof(src));
        memset(&calls, 0, sizeof(calls));
        assert_int_equal(tp_write(client, NULL, src, sizeof(src), r, 0, TP_MORE, 1), TP_POSTED);
        assert_int_equal(calls.sent, 0);
        assert_int_equal(tp_send(client, "done", 4, 0, 2), TP_COMPLETE);
        assert_int_equal(calls.sent, 1);
        for (int i = 0; i < 2; i++) {
                ev = next();
                if (ev.kind == TP_EV_DONE) {
                        assert_int_equal(ev.cookie, 1);
                        continue;
                }
                assert_int_equal(ev.kind, TP_EV_MSG);
                assert_memory_equal(ev.data, "done", 4);
                assert_memory_equal(mem->region.addr, src, sizeof(src));
                message = true;
                tp_release(server, ev.cookie);
        }
        assert_true(message);
}

/* Of a large write only what came along with its header may be copied, and that is little. */
static void bulk_goes_straight_to_its_target(void **state)
{
        enum { LEN = 4 << 20, TIMES = 8 };
        static uint8_t src[LEN];
        struct tp_mem *mem;
        struct tp_rmem *r = open_to_client(LEN, &mem);
        uint64_t copied = 0;

        for (int i = 0; i < TIMES; i++) {
                bool posted, message = false;

                memset(src, i + 1, sizeof(src));
                posted = tp_write(client, NULL, src, LEN, r, 0, 0, 1) == TP_POSTED;
                while (tp_send(client, "done", 4, 0, 2) < 0)
                        ;
                while (posted || !message) {
                        struct tp_event ev = next();

                        if (ev.kind == TP_EV_DONE) {
                                posted = posted && ev.cookie != 1;
                                continue;
                        }
                        message = true;
                        tp_release(server, ev.cookie);
                }
                assert_memory_equal(mem->region.addr, src, LEN);
                if (i == 0)
                        copied = server->n.bytes_copied; /* the first one was not expected */
        }
        assert_true(copied <= 256 << 10);
        assert_true(server->n.bytes_copied - copied <= (TIMES - 1) * 1024);
        assert_true(client->n.bytes_copied <= TIMES * 4); /* the messages */
        assert_int_equal(server->n.bulk_bytes_rx, (uint64_t)TIMES * LEN);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test_setup_teardown(a_message_is_one_call_each_way, set_up, tear_down),
            cmocka_unit_test_setup_teardown(who_only_polls_is_in_no_epoll_set, set_up, tear_down),
            cmocka_unit_test_setup_teardown(a_newcomer_brings_them_back, set_up, tear_down),
            cmocka_unit_test(a_listener_is_heard_apart),
            cmocka_unit_test(a_full_socket_wakes_its_sleeper),
            cmocka_unit_test_setup_teardown(the_end_is_heard_apart, set_up, tear_down),
            cmocka_unit_test_setup_teardown(what_the_kernel_refuses_is_queued, set_up, tear_down),
            cmocka_unit_test_setup_teardown(a_write_and_its_message_are_one_call, set_up, tear_down),
            cmocka_unit_test_setup_teardown(bulk_goes_straight_to_its_target, set_up, tear_down),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
