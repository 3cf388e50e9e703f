/*
 * tcp against strangers: what is not a greeting is dropped, what greets and then lies loses its connection, and in
 * either case an honest peer beside it is served.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>
#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "clock.h"
#include "err.h"
#include "prng.h"
#include "softrma.h"
#include "transport.h"

#define WAIT_NS (10 * NS_PER_S)

static struct tp_ctx *ctx;
static struct tp_listener *listener;

static int set_up(void **state)
{
        assert_int_equal(tp_open("tcp", NULL, &ctx), 0);
        assert_int_equal(tp_listen(ctx, "tcp://127.0.0.1:0", &listener), 0);
        return 0;
}

static int tear_down(void **state)
{
        tp_close(ctx);
        return 0;
}

/* ---- a stranger with a plain socket ---- */

static int stranger(void)
{
        struct sockaddr_in in = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
        int fd = socket(AF_INET, SOCK_STREAM, 0);
        struct tp_url u;

        assert_int_equal(tp_url_parse(listener->url, &u), 0);
        in.sin_port = htons((uint16_t)atoi(u.port));
        assert_true(fd >= 0);
        assert_int_equal(connect(fd, (struct sockaddr *)&in, sizeof(in)), 0);
        return fd;
}

static void say(int fd, const void *bytes, size_t n)
{
        assert_int_equal(send(fd, bytes, n, MSG_NOSIGNAL), n);
}

static struct tp_event poll_event(void)
{
        struct tp_event ev = {0};

        assert_int_equal(tp_wait(ctx, &ev, 1, clock_ns() + WAIT_NS), 1);
        return ev;
}

static bool closed_now(int fd)
{
        char c;
        ssize_t n = recv(fd, &c, 1, MSG_DONTWAIT);

        return n == 0 || (n < 0 && errno == ECONNRESET);
}

/* Polls until the stranger's connection is closed by the other side. */
static void expect_closed(int fd, uint64_t within_ns)
{
        uint64_t until = clock_ns() + within_ns;
        struct tp_event ev;

        while (!closed_now(fd)) {
                assert_int_equal(tp_poll(ctx, &ev, 1), 0);
                assert_true(clock_ns() < until);
        }
        close(fd);
}

static struct tp_ep *accept_one(void)
{
        uint64_t until = clock_ns() + WAIT_NS;
        struct tp_ep *ep;
        struct tp_event ev;
        int rc;

        while ((rc = tp_accept(listener, &ep)) == -EAGAIN) {
                assert_true(clock_ns() < until);
                assert_int_equal(tp_poll(ctx, &ev, 1), 0);
        }
        assert_int_equal(rc, 0);
        return ep;
}

struct hello {
        char magic[8];
        uint16_t version;
        uint8_t role, zero;
        uint32_t msg_max;
        uint64_t session, reserved;
};

static struct hello hello(void)
{
        return (struct hello){.magic = "djinnTCP",
                              .version = htole16(1),
                              .role = 1,
                              .msg_max = htole32(65536),
                              .session = htole64(0x1234)};
}

/* A stranger who knows how to greet: *ep is the server's end. */
static int greeted(struct tp_ep **ep)
{
        struct hello h = hello(), answer;
        int fd = stranger();

        say(fd, &h, sizeof(h));
        *ep = accept_one();
        assert_int_equal(recv(fd, &answer, sizeof(answer), MSG_WAITALL), sizeof(answer));
        assert_memory_equal(answer.magic, "djinnTCP", 8);
        assert_int_equal(answer.role, 2);
        return fd;
}

static struct tp_event expect_down(struct tp_ep *ep, int status)
{
        struct tp_event ev = poll_event();

        assert_int_equal(ev.kind, TP_EV_DOWN);
        assert_ptr_equal(ev.ep, ep);
        assert_int_equal(ev.status, status);
        assert_true(err_text()[0] != '\0');
        return ev;
}

/* An honest peer is greeted and served. */
static void expect_service(void)
{
        struct tp_ep *client, *server;
        struct tp_event ev;

        assert_int_equal(tp_connect(ctx, listener->url, clock_ns() + WAIT_NS, &client), 0);
        server = accept_one();
        assert_true(tp_send(client, "hello", 5, 0, 1) >= 0);
        ev = poll_event();
        assert_int_equal(ev.kind, TP_EV_MSG);
        assert_ptr_equal(ev.ep, server);
        assert_int_equal(ev.len, 5);
        assert_memory_equal(ev.data, "hello", 5);
        tp_release(server, ev.cookie);
        tp_ep_close(client);
        expect_down(server, -ECONNRESET);
        tp_ep_close(server);
}

/* ---- before the greeting ---- */

static void random_bytes_are_refused(void **state)
{
        struct prng p;

        prng_seed(&p, 1);
        for (int round = 0; round < 32; round++) {
                uint8_t noise[200];
                int fd = stranger();

                for (size_t i = 0; i < sizeof(noise); i++)
                        noise[i] = (uint8_t)prng_u64(&p);
                say(fd, noise, 1 + prng_below(&p, sizeof(noise) - 1));
                expect_closed(fd, WAIT_NS);
        }
        expect_service();
}

static void http_is_refused_at_the_first_byte(void **state)
{
        int fd = stranger();

        say(fd, "G", 1);
        expect_closed(fd, WAIT_NS);
        expect_service();
}

static void a_wrong_version_is_answered_and_refused(void **state)
{
        struct hello h = hello(), answer;
        int fd = stranger();
        struct tp_event ev;
        uint64_t until = clock_ns() + WAIT_NS;

        h.version = htole16(77);
        say(fd, &h, sizeof(h));
        while (recv(fd, &answer, sizeof(answer), MSG_PEEK | MSG_DONTWAIT) != (ssize_t)sizeof(answer)) {
                assert_true(clock_ns() < until);
                assert_int_equal(tp_poll(ctx, &ev, 1), 0);
        }
        assert_int_equal(recv(fd, &answer, sizeof(answer), 0), sizeof(answer));
        assert_int_equal(le16toh(answer.version), 1);
        expect_closed(fd, WAIT_NS);
}

static void nonsense_in_a_greeting_is_refused(void **state)
{
        struct hello bad[5];

        for (size_t i = 0; i < ARRAY_LEN(bad); i++)
                bad[i] = hello();
        bad[0].role = 2; /* two acceptors */
        bad[1].msg_max = htole32(16);
        bad[2].msg_max = UINT32_MAX;
        bad[3].reserved = 1;
        bad[4].zero = 1;
        for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
                struct tp_event ev;
                struct tp_ep *ep;
                int fd = stranger();
                char answer[sizeof(struct hello)];

                say(fd, &bad[i], sizeof(bad[i]));
                while (recv(fd, answer, sizeof(answer), MSG_DONTWAIT) < 0)
                        assert_int_equal(tp_poll(ctx, &ev, 1), 0);
                expect_closed(fd, WAIT_NS);
                assert_int_equal(tp_accept(listener, &ep), -EAGAIN);
        }
        expect_service();
}

/* Those who connect and say nothing can neither keep others out nor stay for ever. */
static void the_silent_are_bounded(void **state)
{
        enum { CROWD = 100 };
        struct hello h = hello();
        uint64_t start = clock_ns();
        struct tp_event ev;
        int fd[CROWD];

        for (int i = 0; i < CROWD; i++) {
                fd[i] = stranger();
                say(fd[i], &h, (size_t)i % sizeof(h)); /* never all of it */
                assert_int_equal(tp_poll(ctx, &ev, 1), 0);
        }
        expect_service();
        assert_true(clock_ns() - start < 4 * NS_PER_S);
        for (int i = 0; i < CROWD; i++)
                expect_closed(fd[i], 8 * NS_PER_S);
        assert_true(clock_ns() - start < 8 * NS_PER_S);
}

static void a_greeting_may_come_in_pieces(void **state)
{
        struct hello h = hello();
        int fd = stranger();
        struct tp_event ev;
        struct tp_ep *ep;

        for (size_t i = 0; i < sizeof(h); i++) {
                say(fd, (char *)&h + i, 1);
                assert_int_equal(tp_poll(ctx, &ev, 1), 0);
        }
        ep = accept_one();
        close(fd);
        expect_down(ep, -ECONNRESET);
        tp_ep_close(ep);
}

/* Nothing to accept with: the context does not wake its user for that, and takes whoever waits later. */
static void no_descriptors_are_no_reason_to_spin(void **state)
{
        struct pollfd p = {.fd = tp_fd(ctx), .events = POLLIN};
        struct hello h = hello();
        struct tp_event ev;
        struct rlimit r;
        int fd = stranger(), lowest = dup(fd);
        unsigned polls = 0;

        close(lowest);
        assert_int_equal(getrlimit(RLIMIT_NOFILE, &r), 0);
        assert_int_equal(setrlimit(RLIMIT_NOFILE, &(struct rlimit){(rlim_t)lowest, r.rlim_max}), 0);
        assert_int_equal(poll(&p, 1, 1000), 1);
        do /* a look at the sockets is not part of each poll; a listener that spins is never quiet */
                assert_int_equal(tp_poll(ctx, &ev, 1), 0);
        while (poll(&p, 1, 0) != 0 && ++polls < 100000);
        assert_true(polls < 100000);
        assert_int_equal(poll(&p, 1, 1000), 1); /* it looks again by itself */
        assert_int_equal(setrlimit(RLIMIT_NOFILE, &r), 0);
        say(fd, &h, sizeof(h));
        tp_ep_close(accept_one());
        close(fd);
        expect_service();
}

static void what_does_not_greet_back_is_no_server(void **state)
{
        struct sockaddr_in in = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
        int fd = socket(AF_INET, SOCK_STREAM, 0);
        socklen_t len = sizeof(in);
        struct tp_ep *ep;
        char url[64];

        assert_int_equal(bind(fd, (struct sockaddr *)&in, sizeof(in)), 0);
        getsockname(fd, (struct sockaddr *)&in, &len);
        snprintf(url, sizeof(url), "tcp://127.0.0.1:%u", ntohs(in.sin_port));
        assert_int_equal(tp_connect(ctx, url, clock_ns() + WAIT_NS, &ep), -ECONNREFUSED);
        assert_non_null(strstr(err_text(), "nothing listens"));
        assert_int_equal(listen(fd, 1), 0); /* connects, and then says nothing */
        assert_int_equal(tp_connect(ctx, url, clock_ns() + 100 * NS_PER_MS, &ep), -ETIMEDOUT);
        assert_non_null(strstr(err_text(), "greeting"));
        close(fd);
}

/* ---- after the greeting ---- */

static size_t frame(const struct softrma_frame *f, uint8_t *out)
{
        return softrma_pack(f, out);
}

static void lying_frames_end_their_connection_only(void **state)
{
        static const struct softrma_frame lies[] = {
            {.kind = SOFTRMA_MSG, .len = 65537},        {.kind = SOFTRMA_MSG, .len = UINT64_MAX},
            {.kind = SOFTRMA_WRITE, .len = UINT64_MAX}, {.kind = SOFTRMA_READ_RESP, .len = 100},
            {.kind = SOFTRMA_READ_NACK, .len = EACCES}, {.kind = SOFTRMA_READ_NACK, .len = 9999},
        };

        for (size_t i = 0; i < ARRAY_LEN(lies); i++) {
                uint8_t wire[SOFTRMA_HEAD_MAX];
                struct tp_ep *ep;
                int fd = greeted(&ep);

                say(fd, wire, frame(&lies[i], wire));
                expect_down(ep, -EPROTO);
                assert_int_equal(tp_send(ep, "x", 1, 0, 0), -ENOTCONN);
                expect_closed(fd, WAIT_NS);
                tp_ep_close(ep);
        }
        expect_service();
}

static void messages_before_a_death_are_delivered(void **state)
{
        struct softrma_frame f = {.kind = SOFTRMA_MSG, .len = 8};
        uint8_t wire[2 * (SOFTRMA_HEAD_MAX + 8)];
        struct tp_event ev;
        struct tp_ep *ep;
        int fd = greeted(&ep);
        size_t n = frame(&f, wire);

        memcpy(wire + n, "12345678", 8);
        say(fd, wire, n + 8);
        say(fd, wire, n + 3); /* and dies in the middle of the second */
        close(fd);
        ev = poll_event();
        assert_int_equal(ev.kind, TP_EV_MSG);
        assert_memory_equal(ev.data, "12345678", 8);
        expect_down(ep, -ECONNRESET);
        assert_non_null(strstr(err_text(), "middle of a frame"));
        tp_ep_close(ep);
}

struct attack {
        const char *what;
        int status;
        int id, epoch;       /* added to the key's */
        uint64_t nonce, off; /* likewise */
        uint64_t len;
};

static const struct attack attacks[] = {
    {"unknown slot", -EACCES, .id = 1, .len = 16},
    {"guessed nonce", -EACCES, .nonce = 1, .len = 16},
    {"key of the future", -EACCES, .epoch = 1, .len = 16},
    {"beyond the end", -ERANGE, .off = 4096 - 8, .len = 16},
    {"far beyond the end", -ERANGE, .off = (uint64_t)-16, .len = 16},
    {"too long", -ERANGE, .len = 4097},
    {"absurdly long", -ERANGE, .len = (uint64_t)1 << 39},
};

static struct softrma_frame attack_frame(const struct attack *a, const struct tp_key *key, enum softrma_kind kind)
{
        uint32_t id, epoch;
        uint64_t nonce;

        memcpy(&id, key->bytes + 4, 4);
        memcpy(&epoch, key->bytes + 8, 4);
        memcpy(&nonce, key->bytes + 16, 8);
        return (struct softrma_frame){.kind = kind,
                                      .len = a->len,
                                      .key_id = le32toh(id) + (uint32_t)a->id,
                                      .key_epoch = le32toh(epoch) + (uint32_t)a->epoch,
                                      .key_nonce = le64toh(nonce) + a->nonce,
                                      .off = a->off};
}

static void expect_answer(int fd, enum softrma_kind kind, int status)
{
        struct softrma_frame f;
        uint8_t wire[SOFTRMA_HEAD_MIN];

        assert_int_equal(recv(fd, wire, sizeof(wire), MSG_WAITALL), sizeof(wire));
        assert_int_equal(softrma_unpack(wire, sizeof(wire), 65536, &f), sizeof(wire));
        assert_int_equal(f.kind, kind);
        assert_int_equal(f.len, -status);
}

static bool all_zero(const struct tp_mem *mem)
{
        const uint8_t *p = mem->region.addr;

        for (size_t i = 0; i < mem->region.len; i++)
                if (p[i])
                        return false;
        return true;
}

static void refused_writes_change_nothing(void **state)
{
        for (size_t i = 0; i < ARRAY_LEN(attacks); i++) {
                uint8_t wire[SOFTRMA_HEAD_MAX + 64];
                struct softrma_frame f;
                struct tp_mem *mem, *guard;
                struct tp_key key;
                struct tp_ep *ep;
                int fd = greeted(&ep);

                assert_int_equal(tp_alloc(ep, 4096, &mem), 0);
                assert_int_equal(tp_alloc(ep, 4096, &guard), 0);
                assert_int_equal(tp_export_key(mem, 0, 4096, &key), 0);
                f = attack_frame(&attacks[i], &key, i % 2 ? SOFTRMA_WRITE : SOFTRMA_WRITE_IMM);
                memset(wire, 0xee, sizeof(wire));
                frame(&f, wire);
                say(fd, wire, sizeof(wire));
                expect_down(ep, attacks[i].status);
                assert_true(all_zero(mem) && all_zero(guard));
                expect_answer(fd, SOFTRMA_REFUSED, attacks[i].status);
                close(fd);
                tp_ep_close(ep);
        }
        expect_service();
}

static void refused_reads_are_answered_and_leak_nothing(void **state)
{
        struct tp_mem *mem;
        struct tp_event ev;
        struct tp_key key;
        struct tp_ep *ep;
        int fd = greeted(&ep);

        assert_int_equal(tp_alloc(ep, 4096, &mem), 0);
        assert_int_equal(tp_export_key(mem, 0, 4096, &key), 0);
        for (size_t i = 0; i < ARRAY_LEN(attacks); i++) {
                struct softrma_frame f = attack_frame(&attacks[i], &key, SOFTRMA_READ_REQ);
                uint8_t wire[SOFTRMA_HEAD_MAX];
                struct pollfd p = {.fd = fd, .events = POLLIN};

                say(fd, wire, frame(&f, wire));
                while (poll(&p, 1, 0) == 0)
                        assert_int_equal(tp_poll(ctx, &ev, 1), 0);
                expect_answer(fd, SOFTRMA_READ_NACK, attacks[i].status);
        }
        close(fd);
        expect_down(ep, -ECONNRESET);
        tp_ep_close(ep);
}

/* A peer that asks for reads and never takes the answers stalls itself, and nobody else; what is kept for it is
 * bounded. */
static void a_flood_of_reads_is_bounded(void **state)
{
        struct attack whole = {.len = 1 << 20};
        struct softrma_frame f;
        struct tp_mem *mem;
        struct tp_event ev;
        struct tp_key key;
        struct tp_ep *ep;
        int fd = greeted(&ep), sent = 0;

        assert_int_equal(tp_alloc(ep, 1 << 20, &mem), 0);
        assert_int_equal(tp_export_key(mem, 0, 1 << 20, &key), 0);
        f = attack_frame(&whole, &key, SOFTRMA_READ_REQ);
        for (; sent < 20000; sent++) {
                uint8_t wire[SOFTRMA_HEAD_MAX];

                if (send(fd, wire, frame(&f, wire), MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
                        break;
                assert_int_equal(tp_poll(ctx, &ev, 1), 0);
        }
        expect_service();
        close(fd);
        expect_down(ep, -ECONNRESET);
        tp_ep_close(ep);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test_setup_teardown(random_bytes_are_refused, set_up, tear_down),
            cmocka_unit_test_setup_teardown(http_is_refused_at_the_first_byte, set_up, tear_down),
            cmocka_unit_test_setup_teardown(a_wrong_version_is_answered_and_refused, set_up, tear_down),
            cmocka_unit_test_setup_teardown(nonsense_in_a_greeting_is_refused, set_up, tear_down),
            cmocka_unit_test_setup_teardown(the_silent_are_bounded, set_up, tear_down),
            cmocka_unit_test_setup_teardown(a_greeting_may_come_in_pieces, set_up, tear_down),
            cmocka_unit_test_setup_teardown(no_descriptors_are_no_reason_to_spin, set_up, tear_down),
            cmocka_unit_test_setup_teardown(what_does_not_greet_back_is_no_server, set_up, tear_down),
            cmocka_unit_test_setup_teardown(lying_frames_end_their_connection_only, set_up, tear_down),
            cmocka_unit_test_setup_teardown(messages_before_a_death_are_delivered, set_up, tear_down),
            cmocka_unit_test_setup_teardown(refused_writes_change_nothing, set_up, tear_down),
            cmocka_unit_test_setup_teardown(refused_reads_are_answered_and_leak_nothing, set_up, tear_down),
            cmocka_unit_test_setup_teardown(a_flood_of_reads_is_bounded, set_up, tear_down),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
