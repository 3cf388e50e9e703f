/* What holds for every device that shares the host's memory: opening, memory, plans that are refused, timing. */
#include "unit.h"

#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <sched.h>
#include <string.h>

#include "clock.h"
#include "device.h"
#include "err.h"

static const char *name_under_test;
static struct device *device;

static int open_device(void **state)
{
        return dev_open(name_under_test, 1, &device);
}

static int close_device(void **state)
{
        dev_close(device);
        return 0;
}

static void names(void **state)
{
        static const char *const unknown[] = {"", "gpu", "cpux", "cpu:", "cpu:x", "cpu:-1", "cpu:1x", "cuda:99999"};
        struct device *d;

        for (size_t i = 0; i < sizeof(unknown) / sizeof(unknown[0]); i++) {
                assert_int_equal(dev_open(unknown[i], 1, &d), -ENOENT);
                assert_non_null(strstr(err_text(), unknown[i]));
        }
        assert_int_equal(dev_open("cuda", 1, &d), -ENODEV);
        assert_non_null(strstr(err_text(), "no CUDA device"));
        assert_int_equal(dev_open("cuda:1", 1, &d), -ENODEV);
        assert_int_equal(dev_open("cpu:1", 1, &d), -ENODEV);
        assert_int_equal(dev_open("reference:1", 1, &d), -ENODEV);
        assert_int_equal(dev_open("cpu", -1, &d), -EINVAL);
        assert_int_equal(dev_open("cpu", 100000, &d), -EINVAL);
        for (const struct dev_kind *k = dev_kinds; k->name; k++) {
                assert_non_null(k->what);
                assert_true((k->ops != NULL) == (k->reason == NULL));
                assert_true(k->ops || dev_unavailable(k));
        }
}

static void properties(void **state)
{
        struct dev_props p;

        device->ops->query(device, &p);
        assert_true(strncmp(p.name, name_under_test, strlen(name_under_test)) == 0);
        assert_non_null(strchr(p.name, ')'));
        assert_int_equal(p.threads, 1);
        assert_true(p.memory_bytes > 0);
        assert_true(p.host_memory);
        assert_true(p.read_bytes_per_s == 0);
        assert_int_equal(device->ops->measure(device), 0);
        device->ops->query(device, &p);
        if (strcmp(name_under_test, "cpu") == 0) {
                assert_true(p.read_bytes_per_s > 1e8 && p.read_bytes_per_s < 1e13);
                assert_true(p.flop_per_s[DT_F32] > 1e8 && p.flop_per_s[DT_F32] < 1e14);
                assert_true(p.library[0]);
        }
}

static void memory(void **state)
{
        struct mem_region m;
        char text[16] = "fifteen letters", back[16];

        assert_int_equal(device->ops->alloc(device, 0, &m), -EINVAL);
        assert_int_equal(device->ops->alloc(device, SIZE_MAX, &m), -EINVAL);
        assert_int_equal(device->ops->alloc(device, SIZE_MAX / 4, &m), -ENOMEM);
        assert_int_equal(device->ops->alloc(device, 5000001, &m), 0);
        assert_int_equal((uintptr_t)m.addr % 64, 0);
        assert_int_equal(m.len, 5000001);
        assert_int_equal(m.kind, MEM_HOST);
        assert_int_equal(m.device, -1);
        assert_int_equal(m.fd, -1);
        assert_non_null(m.ops);
        for (size_t i = 0; i < m.len; i += 4999)
                assert_int_equal(((char *)m.addr)[i], 0);
        char *last = (char *)m.addr + m.len - sizeof(text);

        assert_int_equal(device->ops->put(device, last, text, sizeof(text)), 0);
        assert_int_equal(device->ops->copy(device, last - 8, last, sizeof(text)), 0);
        assert_int_equal(device->ops->get(device, back, last - 8, sizeof(text)), 0);
        assert_int_equal(device->ops->sync(device), 0);
        assert_memory_equal(back, text, sizeof(text));
        assert_int_equal(device->ops->host_register(device, back, sizeof(back)), 0);
        assert_int_equal(device->ops->flush(device, &m), 0);
        assert_int_equal(device->ops->export(device, &m), -ENOTSUP);
        device->ops->free(device, &m);
        assert_null(m.addr);
        device->ops->free(device, &m);
}

static void plan_refused(const struct op_inst *inst, size_t n, const char *named)
{
        struct dev_plan *p;

        err_clear();
        assert_int_equal(dev_plan_make(device, inst, n, &p), -EINVAL);
        assert_non_null(strstr(err_text(), named));
}

static void plans_that_are_refused(void **state)
{
        float m[64] = {0};
        struct op_inst two[] = {
            {OP_ADD, {0}, {VECTOR(m, DT_F32, 8), VECTOR(m + 8, DT_F32, 8), VECTOR(m + 16, DT_F32, 8)}},
            {OP_ADD, {0}, {VECTOR(m, DT_F32, 8), VECTOR(m + 4, DT_F32, 8), VECTOR(m + 16, DT_F32, 8)}},
        };
        struct op_inst linear = {
            OP_LINEAR, {0}, {MATRIX(m, DT_F32, 2, 2), MATRIX(m, DT_F32, 2, 2), MATRIX(m + 8, DT_F32, 2, 2)}};

        plan_refused(two, 0, "at least one");
        plan_refused(two, 2, "instruction 1 of 2");
        assert_non_null(strstr(err_text(), "shares bytes"));
        two[1] = two[0];
        two[1].arg[1].data = (char *)m + 33;
        plan_refused(two, 2, "aligned");
        two[1].arg[1].ndim = 0;
        plan_refused(two, 2, "dimensions");
        plan_refused(&linear, 1, "shares bytes"); /* a product cannot be made in place */
        assert_null(device->ops->supports(device, &two[0]));
        assert_non_null(device->ops->supports(device, &two[1]));
}

/* Results flow from instruction to instruction, and a plan may run again on what is then in memory. */
static void plan_of_several_instructions(void **state)
{
        float x[] = {1, 2}, w[] = {1, 1, 1, -1}, y[2], z[2];
        struct op_inst insts[] = {
            {OP_LINEAR, {0}, {MATRIX(y, DT_F32, 1, 2), MATRIX(x, DT_F32, 1, 2), MATRIX(w, DT_F32, 2, 2)}},
            {OP_ACT, {.act = ACT_RELU}, {VECTOR(y, DT_F32, 2), VECTOR(y, DT_F32, 2)}},
            {OP_ADD, {0}, {VECTOR(z, DT_F32, 2), VECTOR(y, DT_F32, 2), VECTOR(x, DT_F32, 2)}},
            {OP_COPY, {0}, {VECTOR(x, DT_F32, 2), VECTOR(z, DT_F32, 2)}},
        };
        struct dev_event ev = {0};
        struct dev_plan *p;

        assert_int_equal(dev_plan_make(device, insts, 4, &p), 0);
        memset(insts, 0, sizeof(insts)); /* the plan has its own copy */
        assert_int_equal(dev_run(p, &ev), 0);
        assert_true(x[0] == 4 && x[1] == 2);
        assert_int_equal(dev_run(p, &ev), 0);
        assert_int_equal(dev_test(device, &ev), 1);
        assert_true(x[0] == 10 && x[1] == 4);
        dev_plan_free(p);
        dev_plan_free(NULL);
}

static void execution_time_is_measured(void **state)
{
        static float x[1 << 20], y[1 << 20];
        struct op_inst i = {OP_COPY, {0}, {VECTOR(y, DT_F32, 1 << 20), VECTOR(x, DT_F32, 1 << 20)}};
        struct dev_event ev = {0};
        struct dev_plan *p;
        uint64_t start;

        assert_int_equal(dev_plan_make(device, &i, 1, &p), 0);
        start = clock_ns();
        assert_int_equal(dev_run(p, &ev), 0);
        assert_int_equal(dev_test(device, &ev), 1);
        uint64_t wall_ns = clock_ns() - start;

        /* 4 MiB cannot be copied in less than 5 us by any core, and device time is part of the wall's. */
        assert_true(ev.exec_ns >= 5 * NS_PER_US && ev.exec_ns <= wall_ns);
        dev_plan_free(p);
}

/* The accuracy that the check pass of a sweep relies on. */
static void product_of_one_row_is_accurate(void **state)
{
        enum { K = 3000, N = 7 };
        static float x[K], w[N * K], y[N];
        struct op_inst i = {
            OP_LINEAR, {0}, {MATRIX(y, DT_F32, 1, N), MATRIX(x, DT_F32, 1, K), MATRIX(w, DT_F32, N, K)}};
        struct dev_event ev = {0};
        struct dev_plan *p;

        /* 1/(k+1) and 1 - (k % 5) / 8 in float: the sums are worked out in double, and far from cancelling. */
        for (int k = 0; k < K; k++)
                x[k] = 1.0f / (float)(k + 1);
        for (int k = 0; k < N * K; k++)
                w[k] = 1.0f - (float)(k % 5) / 8;
        assert_int_equal(dev_plan_make(device, &i, 1, &p), 0);
        assert_int_equal(dev_run(p, &ev), 0);
        dev_plan_free(p);
        for (int n = 0; n < N; n++) {
                double want = 0;

                for (int k = 0; k < K; k++)
                        want += (double)x[k] * (double)w[n * K + k];
                assert_true(fabs((double)y[n] - want) <= 1e-6 * want);
        }
}

static int threads_of_this_process(void)
{
        DIR *dir = opendir("/proc/self/task");
        int n = 0;

        assert_non_null(dir);
        while (readdir(dir))
                n++;
        closedir(dir);
        return n - 2; /* . and .. */
}

/* A product large enough to be spread, on a device with so many threads; how many threads the process has then. */
static int threads_after_product(struct device *d)
{
        enum { N = 256 };
        static float x[N * N], w[N * N], y[N * N];
        struct op_inst i = {
            OP_LINEAR, {0}, {MATRIX(y, DT_F32, N, N), MATRIX(x, DT_F32, N, N), MATRIX(w, DT_F32, N, N)}};
        struct dev_event ev = {0};
        struct dev_plan *p;

        assert_int_equal(dev_plan_make(d, &i, 1, &p), 0);
        assert_int_equal(dev_run(p, &ev), 0);
        dev_plan_free(p);
        return threads_of_this_process();
}

static void thread_count_is_exact(void **state)
{
        struct device *d;
        int before = threads_of_this_process();

        assert_int_equal(threads_after_product(device), before);
        if (strcmp(name_under_test, "cpu") != 0)
                return;
        assert_int_equal(dev_open("cpu", 3, &d), 0);
        /* Opening another device does not change this one. */
        assert_int_equal(threads_after_product(device), before);
        assert_int_equal(threads_after_product(d), before + 2);
        dev_close(d);
        /* A thread that has ended may be listed a moment longer. */
        for (int i = 0; i < 1000 && threads_of_this_process() != before; i++)
                sched_yield();
        assert_int_equal(threads_of_this_process(), before);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(names),
    cmocka_unit_test(properties),
    cmocka_unit_test(memory),
    cmocka_unit_test(plans_that_are_refused),
    cmocka_unit_test(plan_of_several_instructions),
    cmocka_unit_test(execution_time_is_measured),
    cmocka_unit_test(product_of_one_row_is_accurate),
    cmocka_unit_test(thread_count_is_exact),
};

int main(int argc, char **argv)
{
        name_under_test = argc > 1 ? argv[1] : "cpu";
        return cmocka_run_group_tests(tests, open_device, close_device);
}
