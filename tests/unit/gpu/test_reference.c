/* The reference against numbers worked out by hand, none of them by code of this program. */
#include "unit.h"

#include <limits.h>
#include <math.h>
#include <string.h>

#include "device.h"
#include "err.h"

static struct device *device;

static int open_reference(void **state)
{
        return dev_open("reference", 1, &device);
}

static int close_reference(void **state)
{
        dev_close(device);
        return 0;
}

static void run(const struct op_inst *inst)
{
        struct dev_plan *p;
        struct dev_event ev = {0};

        if (dev_plan_make(device, inst, 1, &p) < 0)
                fail_msg("%s", err_text());
        assert_int_equal(dev_run(p, &ev), 0);
        assert_int_equal(dev_test(device, &ev), 1);
        dev_plan_free(p);
}

static void near(const float *got, const float *want, size_t n)
{
        for (size_t i = 0; i < n; i++)
                if (isnan(want[i]) != isnan(got[i]) || fabsf(got[i] - want[i]) > 2e-6f)
                        fail_msg("element %zu is %.9g, expected %.9g", i, (double)got[i], (double)want[i]);
}
#define NEAR(got, ...)                                              \
        do {                                                        \
                static const float want_[] = __VA_ARGS__;           \
                near(got, want_, sizeof(want_) / sizeof(want_[0])); \
        } while (0)

static void embed_adds_positions(void **state)
{
        float table[] = {1, 2, 3, 4, 5, 6}, positions[] = {10, 20, 30, 40, 50, 60}, out[8];
        int32_t ids[] = {2, 0, 3, 1}, cursor[] = {1, 0};
        struct op_inst i = {OP_EMBED,
                            {.batch = 2},
                            {MATRIX(out, DT_F32, 4, 2), VECTOR(ids, DT_I32, 4), MATRIX(table, DT_F32, 3, 2),
                             MATRIX(positions, DT_F32, 3, 2), VECTOR(cursor, DT_I32, 2)}};

        run(&i);
        /* Two sequences of two rows at positions 1, 2; id 3 is unknown. */
        NEAR(out, {35, 46, 51, 62, NAN, NAN, 53, 64});
        cursor[0] = 2;
        run(&i);
        NEAR(out, {55, 66, NAN, NAN, NAN, NAN, NAN, NAN});
        cursor[0] = -9;
        run(&i);
        NEAR(out, {15, 26, 31, 42, NAN, NAN, 33, 44});
}

static void layernorm_of_a_row(void **state)
{
        /* Mean 2.5, variance 1.25; eps makes it 4: divided by 2. */
        float x[] = {1, 2, 3, 4}, gamma[] = {1, 2, 3, 4}, beta[] = {0, 0, 10, -1}, out[4];
        struct op_inst i = {
            OP_LAYERNORM,
            {.eps = 2.75f},
            {MATRIX(out, DT_F32, 1, 4), MATRIX(x, DT_F32, 1, 4), VECTOR(gamma, DT_F32, 4), VECTOR(beta, DT_F32, 4)}};

        run(&i);
        NEAR(out, {-0.75f, -0.5f, 10.75f, 2});
        i.arg[3].data = NULL;
        run(&i);
        NEAR(out, {-0.75f, -0.5f, 0.75f, 3});
}

static void linear_is_x_times_w_transposed(void **state)
{
        float x[] = {1, 2, 3, -1, 0, 1}, w[] = {1, 0, 0, 1, 1, 1}, bias[] = {0.5f, -10}, res[] = {100, 200, 300, 400};
        float out[4];
        struct op_inst i = {
            OP_LINEAR, {0}, {MATRIX(out, DT_F32, 2, 2), MATRIX(x, DT_F32, 2, 3), MATRIX(w, DT_F32, 2, 3)}};

        run(&i);
        NEAR(out, {1, 6, -1, 0});
        i.arg[3] = VECTOR(bias, DT_F32, 2);
        run(&i);
        NEAR(out, {1.5f, -4, -0.5f, -10});
        /* The activation comes before the residual. */
        i.attr.act = ACT_RELU;
        i.arg[4] = MATRIX(res, DT_F32, 2, 2);
        run(&i);
        NEAR(out, {101.5f, 200, 300, 400});
}

static void linear_of_halves(void **state)
{
        uint16_t x[] = {0x3c00, 0x4000}, w[] = {0x3800, 0x3400}, out[1]; /* 1, 2; 0.5, 0.25 */
        float wide[1];
        struct op_inst i = {
            OP_LINEAR, {0}, {MATRIX(out, DT_F16, 1, 1), MATRIX(x, DT_F16, 1, 2), MATRIX(w, DT_F16, 1, 2)}};

        run(&i);
        assert_int_equal(out[0], 0x3c00);
        i.arg[0] = MATRIX(wide, DT_F32, 1, 1);
        run(&i);
        NEAR(wide, {1});
        /* bf16: 0x3f80 is 1, 0x4040 is 3. */
        uint16_t a[] = {0x3f80, 0x4040}, b[] = {0x4040, 0x3f80};

        i = (struct op_inst){
            OP_LINEAR, {0}, {MATRIX(out, DT_BF16, 1, 1), MATRIX(a, DT_BF16, 1, 2), MATRIX(b, DT_BF16, 1, 2)}};
        run(&i);
        assert_int_equal(out[0], 0x40c0); /* 6 */
}

static void activations(void **state)
{
        float x[] = {-2, -1, 0, 1, 2, NAN}, out[6];
        struct op_inst i = {OP_ACT, {0}, {VECTOR(out, DT_F32, 6), VECTOR(x, DT_F32, 6)}};

        run(&i);
        NEAR(out, {-2, -1, 0, 1, 2, NAN});
        i.attr.act = ACT_RELU;
        run(&i);
        NEAR(out, {0, 0, 0, 1, 2, NAN});
        i.attr.act = ACT_GELU_TANH;
        run(&i);
        NEAR(out, {-0.0454023f, -0.1588080f, 0, 0.8411920f, 1.9545977f, NAN});
        i.attr.act = ACT_GELU_ERF;
        run(&i);
        NEAR(out, {-0.0455003f, -0.1586553f, 0, 0.8413447f, 1.9544997f, NAN});
        i.attr.act = ACT_SILU;
        run(&i);
        NEAR(out, {-0.2384058f, -0.2689414f, 0, 0.7310586f, 1.7615942f, NAN});
}

static void add_and_copy(void **state)
{
        float a[] = {1, 2, 3}, b[] = {10, 20, 30}, out[3];
        struct op_inst i = {OP_ADD, {0}, {VECTOR(out, DT_F32, 3), VECTOR(a, DT_F32, 3), VECTOR(b, DT_F32, 3)}};

        run(&i);
        NEAR(out, {11, 22, 33});
        i = (struct op_inst){OP_COPY, {0}, {VECTOR(out, DT_F32, 3), VECTOR(b, DT_U8, 12)}};
        run(&i);
        assert_memory_equal(out, b, sizeof(b));
}

static void kv_append_stores_what_fits(void **state)
{
        /* One query head, one kv head, width 1: a row is q, k, v. Capacity 3, two sequences of two rows. */
        float qkv[] = {0, 1, 2, 0, 3, 4, 0, 5, 6, 0, 7, 8}, k[6] = {0}, v[6] = {0};
        int32_t cursor[] = {1, 0};
        struct op_inst i = {
            OP_KV_APPEND,
            {.batch = 2, .heads = 1, .kv_heads = 1, .head_dim = 1},
            {CUBE(k, DT_F32, 2, 3, 1), CUBE(v, DT_F32, 2, 3, 1), MATRIX(qkv, DT_F32, 4, 3), VECTOR(cursor, DT_I32, 2)}};

        run(&i);
        NEAR(k, {0, 1, 3, 0, 5, 7});
        NEAR(v, {0, 2, 4, 0, 6, 8});
        cursor[0] = 2;
        run(&i);
        NEAR(k, {0, 1, 1, 0, 5, 5});
        cursor[0] = INT_MAX;
        run(&i);
        NEAR(k, {0, 1, 1, 0, 5, 5});
        cursor[0] = INT_MIN;
        run(&i);
        NEAR(k, {1, 3, 1, 5, 7, 5});
}

static void attention_weighs_by_softmax(void **state)
{
        /* q k = ln 3 against 0 gives weights 3/4 and 1/4. */
        float ln3 = logf(3), qkv[] = {1, ln3, 8, 1, 0, 4}, out[2];
        struct op_inst i = {OP_ATTENTION,
                            {.batch = 1, .heads = 1, .kv_heads = 1, .head_dim = 1, .scale = 1},
                            {MATRIX(out, DT_F32, 2, 1), MATRIX(qkv, DT_F32, 2, 3)}};

        run(&i);
        NEAR(out, {7, 7});
        i.attr.causal = 1;
        run(&i);
        NEAR(out, {8, 7});
        /* Scale 2: 9/10 and 1/10. */
        i.attr.scale = 2;
        i.attr.causal = 0;
        run(&i);
        NEAR(out, {7.6f, 7.6f});
}

static void attention_groups_share_a_head(void **state)
{
        /* 4 query heads, 2 kv heads, one row: each head gives its group's v. */
        float qkv[] = {1, 2, 3, 4, 5, 6, 70, 80}, out[4];
        struct op_inst i = {OP_ATTENTION,
                            {.batch = 1, .heads = 4, .kv_heads = 2, .head_dim = 1, .scale = 1},
                            {MATRIX(out, DT_F32, 1, 4), MATRIX(qkv, DT_F32, 1, 8)}};

        run(&i);
        NEAR(out, {70, 70, 80, 80});
}

static void attention_reads_the_cache(void **state)
{
        /* All scores 0: the mean of the visible values. Two sequences, capacity 4, one row at position 1. */
        float qkv[] = {0, 9, 9, 0, 9, 9}, k[8] = {0}, v[] = {2, 4, 100, 100, 10, 30, 100, 100}, out[2];
        int32_t cursor[] = {1, 0};
        struct op_inst i = {OP_ATTENTION,
                            {.batch = 2, .heads = 1, .kv_heads = 1, .head_dim = 1, .scale = 1},
                            {MATRIX(out, DT_F32, 2, 1), MATRIX(qkv, DT_F32, 2, 3), CUBE(k, DT_F32, 2, 4, 1),
                             CUBE(v, DT_F32, 2, 4, 1), VECTOR(cursor, DT_I32, 2)}};

        run(&i);
        NEAR(out, {3, 20});
        cursor[0] = 0;
        run(&i);
        NEAR(out, {2, 10});
        cursor[0] = 77; /* beyond the end: everything there is */
        run(&i);
        NEAR(out, {51.5f, 60});
}

static void last_row_of_each_sequence(void **state)
{
        float x[] = {1, 2, 3, 4, 5, 6, 7, 8}, out[4];
        struct op_inst i = {OP_LAST_ROW, {.batch = 2}, {MATRIX(out, DT_F32, 2, 2), MATRIX(x, DT_F32, 4, 2)}};

        run(&i);
        NEAR(out, {3, 4, 7, 8});
}

static void argmax_ties_and_nan(void **state)
{
        float x[] = {1, 3, 3, NAN, 5, 7, NAN, NAN, NAN, NAN, -INFINITY, -INFINITY};
        int32_t token[4];
        struct op_inst i = {OP_ARGMAX, {0}, {VECTOR(token, DT_I32, 4), MATRIX(x, DT_F32, 4, 3)}};

        run(&i);
        assert_int_equal(token[0], 1);
        assert_int_equal(token[1], 2);
        assert_int_equal(token[2], 0);
        assert_int_equal(token[3], 1);
}

static void emit_steps_the_cursor(void **state)
{
        int32_t tokens[6] = {0}, cursor[] = {10, 1}, token[] = {7, 8};
        struct op_inst i = {
            OP_EMIT, {.rows = 5}, {MATRIX(tokens, DT_I32, 3, 2), VECTOR(cursor, DT_I32, 2), VECTOR(token, DT_I32, 2)}};
        static const int32_t want[] = {0, 0, 7, 8, 7, 8};

        run(&i);
        run(&i);
        run(&i); /* the third has no place left */
        assert_memory_equal(tokens, want, sizeof(want));
        assert_int_equal(cursor[0], 25);
        assert_int_equal(cursor[1], 4);
        cursor[0] = INT_MAX - 1;
        cursor[1] = -4;
        run(&i);
        assert_int_equal(cursor[0], INT_MAX);
        assert_int_equal(cursor[1], -3);
        assert_memory_equal(tokens, want, sizeof(want));
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(embed_adds_positions),
            cmocka_unit_test(layernorm_of_a_row),
            cmocka_unit_test(linear_is_x_times_w_transposed),
            cmocka_unit_test(linear_of_halves),
            cmocka_unit_test(activations),
            cmocka_unit_test(add_and_copy),
            cmocka_unit_test(kv_append_stores_what_fits),
            cmocka_unit_test(attention_weighs_by_softmax),
            cmocka_unit_test(attention_groups_share_a_head),
            cmocka_unit_test(attention_reads_the_cache),
            cmocka_unit_test(last_row_of_each_sequence),
            cmocka_unit_test(argmax_ties_and_nan),
            cmocka_unit_test(emit_steps_the_cursor),
        };

        return cmocka_run_group_tests(tests, open_reference, close_reference);
}
