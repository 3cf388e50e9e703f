/* The table of plans against a plain list, over many random keys: found exactly when kept, oldest thrown out first. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include <cmocka.h>

#include "inside.h"
#include "prng.h"

static void keep(struct srv_plans *p, uint32_t first, uint32_t count, uint32_t rows, bool fuse)
{
        struct srv_plan *plan = calloc(1, sizeof(*plan));

        assert_non_null(plan);
        plan->first = first;
        plan->count = count;
        plan->rows = rows;
        plan->fuse = fuse;
        srv_plans_keep(p, plan);
        assert_true(plan->kept);
}

static void exact_key(void **state)
{
        struct srv_plans p = {0};

        assert_int_equal(srv_plans_init(&p), 0);
        assert_null(srv_plans_find(&p, 1, 2, 3, true));
        keep(&p, 1, 2, 3, true);
        assert_non_null(srv_plans_find(&p, 1, 2, 3, true));
        assert_null(srv_plans_find(&p, 0, 2, 3, true));
        assert_null(srv_plans_find(&p, 1, 3, 3, true));
        assert_null(srv_plans_find(&p, 1, 2, 4, true));
        assert_null(srv_plans_find(&p, 1, 2, 3, false));
        srv_plans_flush(&p);
        assert_int_equal(p.count, 0);
        assert_null(srv_plans_find(&p, 1, 2, 3, true));
        srv_plans_free(&p);
}

static void many(void **state)
{
        enum { KEYS = 6000 };
        static uint64_t used[KEYS]; /* time of last use; 0: never there */
        struct srv_plans p = {0};
        uint64_t now = 0, hits = 0;
        struct prng r;

        prng_seed(&r, 5);
        assert_int_equal(srv_plans_init(&p), 0);
        for (unsigned i = 0; i < 20000; i++) {
                uint32_t k = (uint32_t)prng_below(&r, KEYS);
                uint64_t newer = 0;
                bool there = srv_plans_find(&p, k % 7, k / 7, k % 13, k & 1) != NULL;

                for (unsigned o = 0; used[k] && o < KEYS; o++)
                        newer += used[o] > used[k];
                /* Among the half table of those that were used last, or not there at all. */
                assert_int_equal(there, used[k] && newer < SRV_PLAN_SLOTS / 2);
                if (!there)
                        keep(&p, k % 7, k / 7, k % 13, k & 1);
                hits += there;
                used[k] = ++now;
                assert_true(p.count <= SRV_PLAN_SLOTS / 2);
        }
        assert_int_equal(p.count, SRV_PLAN_SLOTS / 2);
        assert_true(hits > 1000);
        srv_plans_free(&p);
}

int main(void)
{
        const struct CMUnitTest tests[] = {cmocka_unit_test(exact_key), cmocka_unit_test(many)};

        return cmocka_run_group_tests(tests, NULL, NULL);
}
