#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <string.h>

#include "err.h"
#include "transport.h"

static void good(const char *text, const char *scheme, const char *host, const char *port, const char *query,
                 bool loopback)
{
        struct tp_url u;

        assert_int_equal(tp_url_parse(text, &u), 0);
        assert_string_equal(u.scheme, scheme);
        assert_string_equal(u.host, host);
        assert_string_equal(u.port, port);
        assert_string_equal(u.query, query);
        assert_int_equal(u.loopback, loopback);
}

static void test_good(void **state)
{
        good("tcp://10.0.0.1:5556", "tcp", "10.0.0.1", "5556", "", false);
        good("localhost:5556", "tcp", "localhost", "5556", "", true);
        good("node-7:1", "tcp", "node-7", "1", "", false);
        good("tcp://127.0.0.1:0", "tcp", "127.0.0.1", "0", "", true);
        good("tcp://127.1.2.3:65535/", "tcp", "127.1.2.3", "65535", "", true);
        good("tcp://127.example.org:1", "tcp", "127.example.org", "1", "", false);
        good("tcp://[::1]:80", "tcp", "::1", "80", "", true);
        good("[::ffff:127.0.0.1]:80", "tcp", "::ffff:127.0.0.1", "80", "", true);
        good("tcp://[2001:db8::1]", "tcp", "2001:db8::1", "", "", false);
        good("tcp://[febf::1%fifteen-letters]:80", "tcp", "febf::1%fifteen-letters", "80", "", false);
        good("tcp://[fe80::1%eth0]:80", "tcp", "fe80::1%eth0", "80", "", false);
        good("shm://a.b-c_1", "shm", "a.b-c_1", "", "", true);
        good("loop://", "loop", "", "", "", true);
        good("rdma://h:1?dev=mlx5_0&gid=3", "rdma", "h", "1", "dev=mlx5_0&gid=3", false);
        good("fault+shm://x?eagain=20", "fault+shm", "x", "", "eagain=20", true);
        good("fault+tcp://h:1", "fault+tcp", "h", "1", "", false);
}

static void test_any(void **state)
{
        static const struct {
                const char *url;
                bool any;
        } cases[] = {
            {"tcp://*:1", true},          {"tcp://0.0.0.0:1", true}, {"tcp://[::]:1", true},
            {"rdma://[0::0]:1", true},    {"tcp://[::1]:1", false},  {"tcp://0.0.0.1:1", false},
            {"tcp://localhost:1", false}, {"shm://x", false},
        };

        for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
                struct tp_url u;

                assert_int_equal(tp_url_parse(cases[i].url, &u), 0);
                assert_int_equal(u.any, cases[i].any);
        }
}

static void bad(const char *text)
{
        struct tp_url u;

        err_clear();
        assert_int_equal(tp_url_parse(text, &u), -EINVAL);
        assert_true(err_text()[0] != '\0');
}

static void test_bad(void **state)
{
        static const char *const texts[] = {
            "",
            "://x",
            "TCP://h:1",
            "tcp://",
            "tcp://:1",
            "tcp://h:",
            "tcp://h:1x",
            "tcp://h:65536",
            "tcp://h:-1",
            "tcp://h:123456789",
            "tcp://[::1:80",
            "tcp://[zz]:1",
            "tcp://[fe80::1%]:1",
            "tcp://[fe80::1]:1",
            "tcp://[fe80::1%sixteen-letters.]:1",
            "tcp://[fec0::1%eth0]:1",
            "tcp://[::1%lo]:1",
            "tcp://[%lo]:1",
            "tcp://::1:80",
            "tcp://[::1]80",
            "tcp://a/b:1",
            "tcp://h :1",
            "h\x01:1",
            "averylongschemename://h:1",
        };
        char huge[TP_URL_MAX + 8];

        for (size_t i = 0; i < ARRAY_LEN(texts); i++)
                bad(texts[i]);
        memset(huge, 'h', sizeof(huge));
        huge[sizeof(huge) - 1] = '\0';
        bad(huge);
        huge[200] = '\0'; /* fits a URL but no host */
        bad(huge);
}

static void test_param(void **state)
{
        struct tp_url u;
        char v[8];

        assert_int_equal(tp_url_parse("shm://x?a=1&flag&bb=22&empty=", &u), 0);
        assert_true(tp_url_param(&u, "a", v, sizeof(v)));
        assert_string_equal(v, "1");
        assert_true(tp_url_param(&u, "bb", v, sizeof(v)));
        assert_string_equal(v, "22");
        assert_true(tp_url_param(&u, "flag", v, sizeof(v)));
        assert_string_equal(v, "");
        assert_true(tp_url_param(&u, "empty", v, sizeof(v)));
        assert_string_equal(v, "");
        assert_false(tp_url_param(&u, "b", v, sizeof(v)));
        assert_false(tp_url_param(&u, "fla", v, sizeof(v)));
        assert_false(tp_url_param(&u, "bb", v, 2)); /* does not fit */
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(test_good),
            cmocka_unit_test(test_any),
            cmocka_unit_test(test_bad),
            cmocka_unit_test(test_param),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
