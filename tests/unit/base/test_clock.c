#include "clock.h"

#include "unit.h"

static void never_goes_back(void **state)
{
        uint64_t last = clock_ns();

        for (int i = 0; i < 100000; i++) {
                uint64_t now = clock_ns();

                assert_true(now >= last);
                last = now;
        }
}

static void spins_at_least_as_long(void **state)
{
        uint64_t start = clock_ns();

        clock_spin_until(start + 300 * NS_PER_US);
        assert_true(clock_ns() - start >= 300 * NS_PER_US);
        clock_spin_until(start); /* the past: returns at once */
}

/* Both clocks are read at both ends of an interval; whatever else ran meanwhile lies between the outer readings. */
static void stamps_agree_with_the_clock(void **state)
{
        uint64_t t0, t1, s0, s1, t2, t3, ns;

        clock_stamp_init();
        assert_true(clock_stamp_scale > 0);
        t0 = clock_ns();
        s0 = clock_stamp();
        t1 = clock_ns();
        clock_spin_until(t1 + 20 * NS_PER_MS);
        t2 = clock_ns();
        s1 = clock_stamp();
        t3 = clock_ns();
        ns = clock_stamp_ns(s0, s1);
        assert_true((double)ns > 0.999 * (double)(t2 - t1) && (double)ns < 1.001 * (double)(t3 - t0));
        assert_int_equal(clock_stamp_ns(s1, s0), 0);
}

static void measures_itself(void **state)
{
        double cost = 0, step = 0;

        clock_measure(&cost, &step);
        assert_true(cost > 0.5 && cost < 100000);
        assert_true(step >= 1 && step < 1e7);
}

static void spinning_costs_cpu(void **state)
{
        uint64_t cpu = clock_cpu_ns();

        while (clock_cpu_ns() - cpu < 2 * NS_PER_MS)
                clock_spin_until(clock_ns() + NS_PER_MS);
        assert_true(clock_cpu_ns() >= cpu + 2 * NS_PER_MS);
}

static void wall_clock_forms(void **state)
{
        char iso[24], compact[24];

        clock_iso8601(iso);
        clock_compact(compact);
        assert_int_equal(strlen(iso), 20);
        assert_int_equal(strlen(compact), 16);
        assert_true(iso[4] == '-' && iso[10] == 'T' && iso[19] == 'Z');
        assert_true(compact[8] == 'T' && compact[15] == 'Z');
        assert_memory_equal(iso, compact, 4);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(never_goes_back),
            cmocka_unit_test(spins_at_least_as_long),
            cmocka_unit_test(stamps_agree_with_the_clock),
            cmocka_unit_test(measures_itself),
            cmocka_unit_test(spinning_costs_cpu),
            cmocka_unit_test(wall_clock_forms),
        };

        return cmocka_run_group_tests_name("clock", tests, NULL, NULL);
}
