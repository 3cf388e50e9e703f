#include "ring.h"

#include <pthread.h>
#include <sched.h>

#include "unit.h"

static void fills_and_empties(void **state)
{
        uint32_t slots[8], v;
        struct ring r;

        ring_init(&r, slots, 8, sizeof(slots[0]));
        for (uint32_t lap = 0; lap < 5; lap++) {
                assert_false(ring_pop(&r, &v));
                for (uint32_t i = 0; i < 8; i++) {
                        v = lap * 8 + i;
                        assert_true(ring_push(&r, &v));
                }
                assert_false(ring_push(&r, &v)); /* all of the capacity is usable, and no more */
                assert_int_equal(ring_count(&r), 8);
                for (uint32_t i = 0; i < 8; i++) {
                        assert_true(ring_pop(&r, &v));
                        assert_int_equal(v, lap * 8 + i);
                }
        }
        assert_int_equal(ring_count(&r), 0);
}

static void claimed_is_not_seen_before_it_is_published(void **state)
{
        uint64_t slots[2];
        struct ring r;

        ring_init(&r, slots, 2, sizeof(slots[0]));
        uint64_t *slot = ring_claim(&r);

        assert_non_null(slot);
        assert_null(ring_front(&r));
        *slot = 7;
        ring_publish(&r);
        const uint64_t *front = ring_front(&r);

        assert_non_null(front);
        assert_int_equal(*front, 7);
        assert_ptr_equal(ring_front(&r), front); /* until released */
        ring_release(&r);
        assert_null(ring_front(&r));
}

static void pointers(void **state)
{
        void *slots[4];
        struct ring r;
        int x, y;

        ring_init(&r, slots, 4, sizeof(void *));
        assert_null(ring_pop_ptr(&r));
        assert_true(ring_push_ptr(&r, &x));
        assert_true(ring_push_ptr(&r, &y));
        assert_ptr_equal(ring_pop_ptr(&r), &x);
        assert_ptr_equal(ring_pop_ptr(&r), &y);
        assert_null(ring_pop_ptr(&r));
}

static void sides_do_not_share_a_cache_line(void **state)
{
        assert_int_equal(offsetof(struct ring, tail) % CACHE_LINE, 0);
        assert_int_equal(offsetof(struct ring, head) % CACHE_LINE, 0);
        assert_true(offsetof(struct ring, head) - offsetof(struct ring, tail) >= CACHE_LINE);
        assert_true(offsetof(struct ring, tail) >= CACHE_LINE);
}

#define ITEMS 1000000u

struct item {
        uint64_t value, check;
};

static void *produce(void *arg)
{
        struct ring *r = arg;

        for (uint64_t i = 0; i < ITEMS;) {
                struct item item = {i, ~i};

                if (ring_push(r, &item))
                        i++;
                else
                        sched_yield();
        }
        return NULL;
}

static void two_threads_lose_and_tear_nothing(void **state)
{
        static struct item slots[256];
        static struct ring r;
        pthread_t t;
        uint64_t wrong = 0;

        ring_init(&r, slots, 256, sizeof(slots[0]));
        assert_int_equal(pthread_create(&t, NULL, produce, &r), 0);
        for (uint64_t i = 0; i < ITEMS;) {
                struct item item;

                if (!ring_pop(&r, &item)) {
                        sched_yield();
                        continue;
                }
                wrong += item.value != i || item.check != ~i;
                i++;
        }
        pthread_join(t, NULL);
        assert_int_equal(wrong, 0);
        assert_int_equal(ring_count(&r), 0);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(fills_and_empties),
            cmocka_unit_test(claimed_is_not_seen_before_it_is_published),
            cmocka_unit_test(pointers),
            cmocka_unit_test(sides_do_not_share_a_cache_line),
            cmocka_unit_test(two_threads_lose_and_tear_nothing),
        };

        return cmocka_run_group_tests_name("ring", tests, NULL, NULL);
}
