#include "injure.h"

#include <errno.h>

#include "clock.h"
#include "unit.h"

static int init_with(const char *text)
{
        memset(&injury, 0, sizeof(injury));
        if (text)
                setenv("DJINN_INJURE", text, 1);
        else
                unsetenv("DJINN_INJURE");
        return injure_init();
}

static void unset_or_empty_is_healthy(void **state)
{
        assert_int_equal(init_with(NULL), 0);
        assert_false(injury.active);
        assert_int_equal(init_with(""), 0);
        assert_false(injury.active);
}

static void all_kinds(void **state)
{
        assert_int_equal(init_with("delay:server_execution=200,payload=10485760,drop_state,trim_input,"
                                   "delay:client_network_c2s=7"),
                         0);
        assert_true(injury.active && injury.drop_state && injury.trim_input);
        assert_int_equal(injury.delay_ns[LEAF_SERVER_EXECUTION], 200000);
        assert_int_equal(injury.delay_ns[LEAF_NETWORK_C2S], 7000);
        assert_int_equal(injury.delay_ns[LEAF_SERVER_PLAN], 0);
        assert_int_equal(injury.payload_bytes, 10485760);
}

static void the_clock_of_the_server_runs_fast(void **state)
{
        assert_int_equal(init_with("server_clock=250"), 0);
        assert_int_equal(injury.server_clock_ppm, 250);
        assert_int_equal(injure_clock(0), 0);
        assert_int_equal(injure_clock(4000000), 4001000);
        assert_int_equal(injure_clock(8000), 8002);
        assert_int_equal(injure_clock(1ull << 60), (1ull << 60) + (1ull << 60) / 4000);
        for (uint64_t t = 999000; t < 1001000; t++)
                assert_true(injure_clock(t) < injure_clock(t + 1));
        assert_int_equal(init_with("drop_state"), 0);
        assert_int_equal(injure_clock(12345678), 12345678);
}

static void every_leaf_has_a_key(void **state)
{
        char text[128];

        for (int i = 0; i < LEAF_COUNT; i++) {
                size_t len = strlen(leaf_keys[i]);

                assert_string_equal(leaf_keys[i] + len - 3, "_ms");
                snprintf(text, sizeof(text), "delay:%.*s=1", (int)len - 3, leaf_keys[i]);
                assert_int_equal(init_with(text), 0);
                assert_int_equal(injury.delay_ns[i], 1000);
        }
}

static void nonsense_is_refused(void **state)
{
        static const char *const bad[] = {
            "delay:server_exec=200",
            "delay:server_execution",
            "delay:server_execution=",
            "delay:server_execution=-5",
            "delay:=5",
            "delay:server_execution=5us",
            "payload=0",
            "server_clock=0",
            "server_clock=-3",
            "server_clock=10001",
            "payload=99999999999999999999",
            "drop",
            "drop_state,",
            ",drop_state",
            "payload= 5",
            "delay:server_execution_ms=5",
            "0123456789012345678901234567890123456789012345678901234567890123456789",
        };

        for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
                assert_int_equal(init_with(bad[i]), -EINVAL);
                assert_sentence("DJINN_INJURE");
                assert_false(injury.active);
        }
}

static void the_delay_is_felt_in_its_leaf_only(void **state)
{
        assert_int_equal(init_with("delay:server_plan=300"), 0);
        uint64_t start = clock_ns();

        injure(LEAF_SERVER_PLAN);
        assert_true(clock_ns() - start >= 300000);
        uint64_t least = UINT64_MAX;

        for (int i = 0; i < 50; i++) {
                start = clock_ns();
                injure(LEAF_SERVER_QUEUE);
                uint64_t took = clock_ns() - start;

                least = took < least ? took : least;
        }
        assert_true(least < 100000);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(unset_or_empty_is_healthy),
            cmocka_unit_test(all_kinds),
            cmocka_unit_test(the_clock_of_the_server_runs_fast),
            cmocka_unit_test(every_leaf_has_a_key),
            cmocka_unit_test(nonsense_is_refused),
            cmocka_unit_test(the_delay_is_felt_in_its_leaf_only),
        };

        return cmocka_run_group_tests_name("injure", tests, NULL, NULL);
}
