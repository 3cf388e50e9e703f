#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <string.h>

#include "err.h"
#include "transport.h"

/* A table without a NULL slot is what lets callers do without tests. sever is the last member. */
static void check_ops(const struct tp_ops *ops)
{
        const void *const *slot = (const void *const *)ops;

        for (size_t i = 0; i < sizeof(*ops) / sizeof(*slot); i++)
                if (!slot[i])
                        fail_msg("%s: slot %zu of its table is NULL", ops->name, i);
}

static void test_table(void **state)
{
        static const char *const wanted[] = {"shm", "tcp", "loop", "null", "fault", "rdma", "dpdk"};
        unsigned found = 0;

        for (const struct tp_backend *b = tp_backends; b->scheme; b++) {
                assert_true(b->what && b->what[0]);
                for (size_t i = 0; i < ARRAY_LEN(wanted); i++)
                        found += !strcmp(wanted[i], b->scheme);
                if (b->ops) {
                        assert_null(b->reason);
                        assert_string_equal(b->ops->name, b->scheme);
                        check_ops(b->ops);
                } else {
                        assert_true(b->reason && b->reason[0]);
                        assert_string_equal(tp_unavailable(b), b->reason);
                }
        }
        assert_int_equal(found, ARRAY_LEN(wanted));
}

static void refused(const char *what, int rc)
{
        struct tp_ctx *ctx = NULL;

        err_clear();
        assert_int_equal(tp_open(what, NULL, &ctx), rc);
        assert_null(ctx);
        assert_true(err_text()[0] != '\0');
}

static void test_open_refused(void **state)
{
        refused("rdma", -ENOTSUP);
        refused("rdma://h:1", -ENOTSUP);
        refused("dpdk", -ENOTSUP);
        refused("carrier-pigeon://x", -EINVAL);
        refused("pigeon://x", -ENOENT);
        refused("fault", -EINVAL);
        refused("fault+pigeon://x", -ENOENT);
        refused("fault+fault+loop://x", -EINVAL);
        refused("fault+loop://x?eagain=100", -EINVAL);
        refused("fault+loop://x?cut_after=-1", -EINVAL);
        refused("fault+loop://x?delay_us=1ms", -EINVAL);
        refused("", -EINVAL);
}

static void opened(const char *what, const char *name)
{
        struct tp_ctx *ctx;

        assert_int_equal(tp_open(what, NULL, &ctx), 0);
        assert_string_equal(ctx->ops->name, name);
        assert_true(ctx->spin_ns > 0);
        tp_close(ctx);
}

static void test_open(void **state)
{
        const struct tp_open_opts sleepy = {.sleepy = true}, long_spin = {.spin_ns = 12345};
        struct tp_ctx *ctx;

        opened("loop", "loop");
        opened("loop://x", "loop");
        opened("shm", "shm");
        opened("tcp", "tcp");
        opened("localhost:1", "tcp");
        opened("fault+loop", "fault");
        opened("fault+tcp://h:1?eagain=3", "fault");
        assert_int_equal(tp_open("loop", &sleepy, &ctx), 0);
        assert_int_equal(ctx->spin_ns, 0);
        tp_close(ctx);
        assert_int_equal(tp_open("loop", &long_spin, &ctx), 0);
        assert_int_equal(ctx->spin_ns, 12345);
        tp_close(ctx);
}

static void test_wrong_context(void **state)
{
        struct tp_listener *l;
        struct tp_ctx *ctx;
        struct tp_ep *ep;

        assert_int_equal(tp_open("loop", NULL, &ctx), 0);
        assert_int_equal(tp_listen(ctx, "shm://x", &l), -EINVAL);
        assert_int_equal(tp_connect(ctx, "tcp://localhost:1", 0, &ep), -EINVAL);
        assert_true(err_text()[0] != '\0');
        tp_close(ctx);
}

/* The reference with both ends in one context: one thread suffices. */
static void test_loop_one_context(void **state)
{
        struct tp_ep *a, *b;
        struct tp_listener *l;
        struct tp_event ev;
        struct tp_ctx *ctx;

        assert_int_equal(tp_open("loop", NULL, &ctx), 0);
        assert_int_equal(tp_listen(ctx, "loop://one", &l), 0);
        assert_int_equal(tp_connect(ctx, "loop://one", 0, &a), 0);
        assert_int_equal(tp_accept(l, &b), 0);
        assert_int_equal(tp_accept(l, &b), -EAGAIN);
        assert_int_equal(tp_send(a, "hi", 2, 0, 1), TP_COMPLETE);
        assert_int_equal(tp_poll(ctx, &ev, 1), 1);
        assert_ptr_equal(ev.ep, b);
        assert_memory_equal(ev.data, "hi", 2);
        tp_release(b, ev.cookie);
        tp_close(ctx);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(test_table),         cmocka_unit_test(test_open_refused),     cmocka_unit_test(test_open),
            cmocka_unit_test(test_wrong_context), cmocka_unit_test(test_loop_one_context),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
