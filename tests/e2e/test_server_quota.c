/* Keys are counted while they live: a session may have many over its time, not too many at once. */
#include <errno.h>

#include "server_client.h"

#include "check.h"
#include "workload.h"

#define MANY 20000 /* more than a session may have at once */

static struct msg_loaded load(struct client *c, struct graph *g)
{
        struct msg_loaded m;

        assert_int_equal(echo_build(64, g), 0);
        assert_int_equal(cl_load(c, g, MSG_WEIGHTS_NONE, 1, NULL, &m), 0);
        return m;
}

static int ask(struct client *c, enum msg_keys_kind kind, uint32_t model, uint64_t len)
{
        struct msg_keys k = {.kind = kind, .model = model, .len = len};

        return cl_try(c, &k, sizeof(k), MSG_KEYS, MSG_KEYS);
}

/* How many keys are given before one is refused. */
static int fill(struct client *c, uint32_t model)
{
        int n = 0, rc = 0;

        while (n < MANY && (rc = ask(c, KEYS_ASK_TENSOR, model, 0)) == 0)
                n++;
        assert_int_equal(rc, -EDQUOT);
        return n;
}

static void dropped_models_take_their_keys_along(void **state)
{
        struct test_server *s = ts_start(NULL);
        struct msg_model_ref drop = {.what = 1};
        struct msg_loaded m;
        struct client c;
        struct graph g;
        int n;

        cl_open(&c, ts_url(s, "loop"));
        m = load(&c, &g);
        n = fill(&c, m.model);
        assert_int_equal(ask(&c, KEYS_ASK_STAGING, 0, 4096), -EDQUOT);
        drop.model = m.model;
        assert_int_equal(cl_try(&c, &drop, sizeof(drop), MSG_DROP, MSG_DROP), 0);
        graph_free(&g);
        assert_int_equal(ask(&c, KEYS_ASK_STAGING, 0, 4096), 0);
        m = load(&c, &g);
        assert_int_equal(fill(&c, m.model), n - 1); /* one is staging's */
        graph_free(&g);
        cl_close(&c);
        assert_int_equal(ts_stop(s), 0);
}

static void replaced_buffers_take_their_keys_along(void **state)
{
        struct test_server *s = ts_start(NULL);
        struct client c;
        int rc = 0;

        cl_open(&c, ts_url(s, "loop"));
        for (int i = 1; i <= MANY && rc == 0; i++)
                rc = ask(&c, KEYS_ASK_SHADOW, 0, 64u * (uint64_t)(1 + i % 2 + i / 64 * 64));
        assert_int_equal(rc, 0);
        cl_close(&c);
        assert_int_equal(ts_stop(s), 0);
}

int main(void)
{
        static const struct CMUnitTest tests[] = {
            cmocka_unit_test(dropped_models_take_their_keys_along),
            cmocka_unit_test(replaced_buffers_take_their_keys_along),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
