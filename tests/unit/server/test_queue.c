/* Order of requests: class, arrival, age; items that are not ready hold nobody up. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "queue.h"

static struct queue_item items[16];
static bool blocked[16];

static bool ready(const struct queue_item *item)
{
        return !blocked[item - items];
}

static int fresh(void **state)
{
        memset(items, 0, sizeof(items));
        memset(blocked, 0, sizeof(blocked));
        return 0;
}

static void put(struct queue *q, unsigned i, uint32_t run_class, uint64_t arrival_ns)
{
        items[i].arrival_ns = arrival_ns;
        queue_put(q, &items[i], run_class);
}

static int take(struct queue *q, uint64_t now_ns)
{
        struct queue_item *item = queue_take(q, now_ns, ready);

        return item ? (int)(item - items) : -1;
}

static void classes_are_strict(void **state)
{
        struct queue q = {0};

        put(&q, 0, 0, 1);
        put(&q, 1, 1, 2);
        put(&q, 2, 3, 3);
        put(&q, 3, 1, 4);
        put(&q, 4, 2, 5);
        assert_int_equal(take(&q, 10), 2);
        assert_int_equal(take(&q, 10), 4);
        assert_int_equal(take(&q, 10), 1);
        assert_int_equal(take(&q, 10), 3);
        assert_int_equal(take(&q, 10), 0);
        assert_int_equal(take(&q, 10), -1);
        assert_int_equal(q.count, 0);
}

/* A background request is overtaken for three ages at most by a stream of real-time ones. */
static void age_counts(void **state)
{
        struct queue q = {0};

        put(&q, 0, 0, 0);
        put(&q, 1, 3, 3 * QUEUE_AGE_NS - 1);
        assert_int_equal(take(&q, 3 * QUEUE_AGE_NS - 1), 1);
        put(&q, 1, 3, 3 * QUEUE_AGE_NS);
        assert_int_equal(take(&q, 3 * QUEUE_AGE_NS), 0); /* equal rank: who came first */
        assert_int_equal(take(&q, 3 * QUEUE_AGE_NS), 1);
        /* A clock that was read before the arrival makes nobody old. */
        put(&q, 2, 0, 500 * QUEUE_AGE_NS);
        put(&q, 3, 1, 500 * QUEUE_AGE_NS);
        assert_int_equal(take(&q, 0), 3);
}

/* Taken and put back: its place is the old one. */
static void put_back(void **state)
{
        struct queue q = {0};

        for (unsigned i = 0; i < 3; i++)
                put(&q, i, 1, 1 + i);
        assert_int_equal(take(&q, 10), 0);
        put(&q, 0, 1, 1);
        assert_int_equal(take(&q, 10), 0);
        assert_int_equal(take(&q, 10), 1);
        put(&q, 0, 1, 1);
        put(&q, 3, 1, 4);
        put(&q, 1, 1, 2);
        for (int i = 0; i < 4; i++)
                assert_int_equal(take(&q, 10), i);
        assert_int_equal(q.count, 0);
}

static void not_ready(void **state)
{
        struct queue q = {0};

        put(&q, 0, 1, 1);
        put(&q, 1, 1, 2);
        put(&q, 2, 1, 3);
        put(&q, 3, 0, 0);
        blocked[0] = blocked[2] = true;
        assert_int_equal(take(&q, 9), 1);
        assert_int_equal(take(&q, 9), 3);
        assert_int_equal(take(&q, 9), -1);
        put(&q, 4, 1, 4); /* the tail is still right */
        blocked[2] = false;
        assert_int_equal(take(&q, 9), 2);
        assert_int_equal(take(&q, 9), 4);
        blocked[0] = false;
        assert_int_equal(take(&q, 9), 0);
        assert_int_equal(q.count, 0);
}

static bool even(const struct queue_item *item, void *arg)
{
        return (item - items) % 2 == 0;
}

static void count(struct queue_item *item, void *arg)
{
        ++*(unsigned *)arg;
}

static void removal(void **state)
{
        struct queue q = {0};
        unsigned dropped = 0;

        for (unsigned i = 0; i < 8; i++)
                put(&q, i, i % 4 == 3 ? 3 : 1, i);
        assert_ptr_equal(queue_find(&q, even, NULL), &items[0]);
        assert_true(queue_remove(&q, &items[0]));
        assert_false(queue_remove(&q, &items[0]));
        assert_true(queue_remove(&q, &items[6])); /* the last of its class */
        assert_int_equal(q.count, 6);
        queue_purge(&q, even, count, &dropped);
        assert_int_equal(dropped, 2);
        put(&q, 8, 1, 8);
        assert_int_equal(take(&q, 9), 3);
        assert_int_equal(take(&q, 9), 7);
        assert_int_equal(take(&q, 9), 1);
        assert_int_equal(take(&q, 9), 5);
        assert_int_equal(take(&q, 9), 8);
        assert_null(queue_find(&q, even, NULL));
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test_setup(classes_are_strict, fresh),
            cmocka_unit_test_setup(age_counts, fresh),
            cmocka_unit_test_setup(put_back, fresh),
            cmocka_unit_test_setup(not_ready, fresh),
            cmocka_unit_test_setup(removal, fresh),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
