/* raw over tcp: which addresses the ends meet at, and that a stranger is not taken for the other end. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>
#include <errno.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdbool.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include "err.h"
#include "raw.h"

#define BLOB_PORT  18 /* where the port stands in an offer, little endian */
#define BLOB_SCOPE 20 /* and the number of the interface */

static bool has_v6(void)
{
        struct sockaddr_in6 in6 = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT};
        int fd = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0), rc;

        rc = fd < 0 ? -1 : bind(fd, (struct sockaddr *)&in6, sizeof(in6));
        if (fd >= 0)
                close(fd);
        return rc == 0;
}

static void ends_meet_at_the_url(void **state)
{
        static const char *const urls[] = {"tcp", "tcp://127.0.0.1:5", "tcp://localhost", "tcp://*:0", "tcp://[::1]:5"};
        static const char src[64];
        char dst[64];

        for (int u = 0; u < (has_v6() ? 5 : 4); u++) {
                struct raw_order order = {.shape = RAW_EXCHANGE, .up = 64, .down = 64, .n = 10};
                struct raw_opts o = {.url = urls[u], .max_bytes = 64, .depth = 1, .cpu_peer = -1};
                struct raw_pair *p;
                uint64_t ns;

                memset(dst, 7, sizeof(dst));
                assert_int_equal(raw_open(&o, &p), 0);
                assert_int_equal(raw_run(p, &order, src, dst, NULL, &ns), 0);
                assert_memory_equal(dst, src, 64);
                raw_close(p);
        }
}

static void a_host_that_cannot_be_found_is_named(void **state)
{
        struct raw_opts o = {.url = "tcp://no-such-host.invalid:5", .max_bytes = 64, .depth = 1, .cpu_peer = -1};
        struct raw_blob offer;
        struct raw_end *e;

        assert_true(raw_offer(&o, &offer, &e) < 0);
        assert_non_null(strstr(err_text(), "no-such-host.invalid"));
}

static int stranger(const struct raw_blob *offer)
{
        struct sockaddr_in in = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
        const struct timeval patience = {.tv_sec = 3};
        int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
        in.sin_port = htons((uint16_t)(offer->bytes[BLOB_PORT] | offer->bytes[BLOB_PORT + 1] << 8));
        assert_int_equal(connect(fd, (struct sockaddr *)&in, sizeof(in)), 0);
        assert_int_equal(send(fd, "let me i", 8, MSG_NOSIGNAL), 8);
        return fd;
}

static void a_stranger_is_thrown_out(void **state)
{
        struct raw_opts o = {.url = "tcp", .max_bytes = 64, .depth = 1, .cpu_peer = -1};
        struct raw_blob offer, answer;
        struct raw_end *a, *b;
        ssize_t n;
        char byte;
        int fd;

        assert_int_equal(raw_offer(&o, &offer, &a), 0);
        fd = stranger(&offer);
        assert_int_equal(raw_answer(&o, &offer, &answer, &b), 0);
        assert_int_equal(raw_settle(a, &answer), 0);
        n = recv(fd, &byte, 1, 0);
        assert_true(n == 0 || (n < 0 && errno == ECONNRESET)); /* closed, while the other one is served */
        close(fd);
        raw_free(a);
        raw_free(b);
}

static void nobody_comes(void **state)
{
        struct raw_opts o = {.url = "tcp", .max_bytes = 64, .depth = 1, .cpu_peer = -1, .stall_ns = 100000000};
        struct raw_blob offer, answer;
        struct raw_end *a;

        assert_int_equal(raw_offer(&o, &offer, &a), 0);
        memset(&answer, 0, sizeof(answer));
        memcpy(answer.bytes, offer.bytes + 24, 8); /* the secret, but no connection behind it */
        assert_int_equal(raw_settle(a, &answer), -ETIMEDOUT);
        raw_free(a);
}

/* The number that an interface has at the other end is not the one that it has here. */
static void the_interface_is_that_of_our_url(void **state)
{
        char host[NI_MAXHOST], url[NI_MAXHOST + 16] = "";
        struct raw_opts o = {.url = url, .max_bytes = 64, .depth = 1, .cpu_peer = -1};
        struct raw_blob offer, answer;
        struct raw_end *a, *b;
        struct ifaddrs *all;

        assert_int_equal(getifaddrs(&all), 0);
        for (const struct ifaddrs *i = all; i && !url[0]; i = i->ifa_next) {
                const struct sockaddr_in6 *in6 = (const void *)i->ifa_addr;

                if (in6 && in6->sin6_family == AF_INET6 && IN6_IS_ADDR_LINKLOCAL(&in6->sin6_addr) &&
                    (i->ifa_flags & IFF_RUNNING) &&
                    getnameinfo(i->ifa_addr, sizeof(*in6), host, sizeof(host), NULL, 0, NI_NUMERICHOST) == 0)
                        snprintf(url, sizeof(url), "tcp://[%s]", host);
        }
        freeifaddrs(all);
        if (!url[0])
                skip(); /* no interface of this host has such an address */
        assert_int_equal(raw_offer(&o, &offer, &a), 0);
        memset(offer.bytes + BLOB_SCOPE, 0x7e, 4);
        assert_int_equal(raw_answer(&o, &offer, &answer, &b), 0);
        assert_int_equal(raw_settle(a, &answer), 0);
        raw_free(a);
        raw_free(b);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(ends_meet_at_the_url),
            cmocka_unit_test(a_host_that_cannot_be_found_is_named),
            cmocka_unit_test(a_stranger_is_thrown_out),
            cmocka_unit_test(nobody_comes),
            cmocka_unit_test(the_interface_is_that_of_our_url),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
