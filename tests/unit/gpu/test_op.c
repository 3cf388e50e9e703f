#include "unit.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "err.h"

static void f16_known_values(void **state)
{
        assert_true(op_f16_to_f32(0x3c00) == 1.0f);
        assert_true(op_f16_to_f32(0xc000) == -2.0f);
        assert_true(op_f16_to_f32(0x7bff) == 65504.0f);
        assert_true(op_f16_to_f32(0x0001) == 0x1p-24f);
        assert_true(op_f16_to_f32(0x0400) == 0x1p-14f);
        assert_true(isinf(op_f16_to_f32(0xfc00)) && op_f16_to_f32(0xfc00) < 0);
        assert_true(isnan(op_f16_to_f32(0x7e01)));
        assert_int_equal(op_f32_to_f16(65519.0f), 0x7bff);
        assert_int_equal(op_f32_to_f16(65520.0f), 0x7c00);
        assert_int_equal(op_f32_to_f16(-1e30f), 0xfc00);
        assert_int_equal(op_f32_to_f16(0x1p-25f), 0x0000);   /* tie to even: zero */
        assert_int_equal(op_f32_to_f16(0x1.8p-24f), 0x0002); /* tie to even: up */
        assert_int_equal(op_f32_to_f16(-0.0f), 0x8000);
        assert_int_equal(op_f32_to_f16(1.0f + 0x1p-11f), 0x3c00);
        assert_int_equal(op_f32_to_f16(1.0f + 0x3p-11f), 0x3c02);
        assert_true(op_f32_to_f16(NAN) > 0x7c00);
}

static void f16_round_trip_of_every_pattern(void **state)
{
        for (unsigned h = 0; h < 0x10000; h++) {
                float f = op_f16_to_f32((uint16_t)h);

                if (isnan(f))
                        assert_true((op_f32_to_f16(f) & 0x7fff) > 0x7c00);
                else
                        assert_int_equal(op_f32_to_f16(f), h);
        }
}

/* Between neighbours a and b: below the middle gives a, above gives b, the middle gives the even one. */
static void halves_round_to_nearest_even(void **state)
{
        for (unsigned h = 0; h < 0x7bff; h++) {
                float a = op_f16_to_f32((uint16_t)h), b = op_f16_to_f32((uint16_t)(h + 1)), mid = (a + b) / 2;

                assert_int_equal(op_f32_to_f16(nextafterf(mid, 0)), h);
                assert_int_equal(op_f32_to_f16(nextafterf(mid, INFINITY)), h + 1);
                assert_int_equal(op_f32_to_f16(mid), h % 2 ? h + 1 : h);
        }
        for (unsigned h = 0; h < 0x7f7f; h++) {
                float a = op_bf16_to_f32((uint16_t)h), b = op_bf16_to_f32((uint16_t)(h + 1)), mid = a + (b - a) / 2;

                assert_int_equal(op_f32_to_bf16(nextafterf(mid, 0)), h);
                assert_int_equal(op_f32_to_bf16(nextafterf(mid, INFINITY)), h + 1);
                assert_int_equal(op_f32_to_bf16(mid), h % 2 ? h + 1 : h);
        }
}

static void bf16_round_trip_of_every_pattern(void **state)
{
        for (unsigned h = 0; h < 0x10000; h++) {
                float f = op_bf16_to_f32((uint16_t)h);

                if (isnan(f))
                        assert_true((op_f32_to_bf16(f) & 0x7fff) > 0x7f80);
                else
                        assert_int_equal(op_f32_to_bf16(f), h);
        }
        assert_true(op_bf16_to_f32(0x3f80) == 1.0f);
        assert_int_equal(op_f32_to_bf16(3.4e38f), 0x7f80);
        uint32_t low_nan = 0x7f800001;
        float nan_of_low_bits;

        memcpy(&nan_of_low_bits, &low_nan, sizeof(nan_of_low_bits));
        assert_true((op_f32_to_bf16(nan_of_low_bits) & 0x7fff) > 0x7f80);
}

static void dtype_names(void **state)
{
        for (int t = 0; t < DT_COUNT; t++)
                assert_int_equal(op_dtype_parse(op_dtype_names[t]), t);
        assert_int_equal(op_dtype_parse("fp16"), DT_F16);
        assert_int_equal(op_dtype_parse("BF16"), DT_BF16);
        assert_int_equal(op_dtype_parse("f32"), DT_F32);
        assert_int_equal(op_dtype_parse("float64"), -1);
        assert_int_equal(op_dtype_parse(NULL), -1);
        assert_int_equal(op_dtype_bytes(DT_F32), 4);
        assert_int_equal(op_dtype_bytes(DT_BF16), 2);
        assert_int_equal(op_dtype_bytes(DT_U8), 1);
}

/* ---- op_check: one good instruction per op, and ways to spoil it ---- */

static const char mem[64] __attribute__((aligned(64)));

static struct op_inst good(enum op_code code)
{
        struct op_inst i = {.code = code, .attr = {.batch = 2, .eps = 1e-5f, .scale = 1}};
        struct op_attr heads = {.batch = 2, .heads = 4, .kv_heads = 2, .head_dim = 8, .scale = 0.5f};
        const struct op_inst all[OP_COUNT] = {
            [OP_COPY] = {.arg = {VECTOR(mem, DT_U8, 8), VECTOR(mem, DT_I32, 2)}},
            [OP_EMBED] = {.arg = {MATRIX(mem, DT_F16, 6, 8), VECTOR(mem, DT_I32, 6), MATRIX(mem, DT_F16, 100, 8),
                                  MATRIX(mem, DT_F16, 32, 8), VECTOR(mem, DT_I32, 2)}},
            [OP_LAYERNORM] = {.arg = {MATRIX(mem, DT_F32, 6, 8), MATRIX(mem, DT_F32, 6, 8), VECTOR(mem, DT_F32, 8),
                                      VECTOR(mem, DT_F32, 8)}},
            [OP_LINEAR] = {.arg = {MATRIX(mem, DT_F32, 6, 5), MATRIX(mem, DT_BF16, 6, 8), MATRIX(mem, DT_BF16, 5, 8),
                                   VECTOR(mem, DT_BF16, 5), MATRIX(mem, DT_BF16, 6, 5)}},
            [OP_ACT] = {.arg = {CUBE(mem, DT_F32, 2, 3, 4), CUBE(mem, DT_F32, 2, 3, 4)}},
            [OP_ADD] = {.arg = {VECTOR(mem, DT_F32, 7), VECTOR(mem, DT_F32, 7), VECTOR(mem, DT_F32, 7)}},
            [OP_KV_APPEND] = {.arg = {CUBE(mem, DT_F32, 2, 10, 16), CUBE(mem, DT_F32, 2, 10, 16),
                                      MATRIX(mem, DT_F32, 6, 64), VECTOR(mem, DT_I32, 2)}},
            [OP_ATTENTION] = {.arg = {MATRIX(mem, DT_F32, 6, 32), MATRIX(mem, DT_F32, 6, 64),
                                      CUBE(mem, DT_F32, 2, 10, 16), CUBE(mem, DT_F32, 2, 10, 16),
                                      VECTOR(mem, DT_I32, 2)}},
            [OP_LAST_ROW] = {.arg = {MATRIX(mem, DT_F32, 2, 8), MATRIX(mem, DT_F32, 6, 8)}},
            [OP_ARGMAX] = {.arg = {VECTOR(mem, DT_I32, 3), MATRIX(mem, DT_F32, 3, 100)}},
            [OP_EMIT] = {.arg = {MATRIX(mem, DT_I32, 9, 3), VECTOR(mem, DT_I32, 2), VECTOR(mem, DT_I32, 3)}},
        };

        if (code == OP_KV_APPEND || code == OP_ATTENTION)
                i.attr = heads;
        memcpy(i.arg, all[code].arg, sizeof(i.arg));
        return i;
}

static void refused(const struct op_inst *i, const char *named)
{
        err_clear();
        assert_int_equal(op_check(i), -EINVAL);
        assert_non_null(strstr(err_text(), named));
        if ((unsigned)i->code < OP_COUNT)
                assert_non_null(strstr(err_text(), op_infos[i->code].name));
}

static void check_accepts_each_op(void **state)
{
        for (int code = 0; code < OP_COUNT; code++) {
                struct op_inst i = good((enum op_code)code);

                assert_int_equal(op_check(&i), 0);
                for (int a = 0; a < op_infos[code].nargs; a++)
                        if (code != OP_ATTENTION && op_infos[code].role[a] & OP_OPTIONAL && a != 4)
                                i.arg[a].data = NULL;
                assert_int_equal(op_check(&i), 0);
        }
}

/* Every operand in turn: missing, wrong number of dimensions, a dimension off by one, zero, huge, a foreign dtype. */
static void check_refuses_spoiled_operands(void **state)
{
        for (int code = 0; code < OP_COUNT; code++) {
                const struct op_info *info = &op_infos[code];

                for (int a = 0; a < info->nargs; a++) {
                        struct op_inst i = good((enum op_code)code);
                        struct op_arg kept = i.arg[a];

                        if (!(info->role[a] & OP_OPTIONAL)) {
                                i.arg[a].data = NULL;
                                refused(&i, info->arg_names[a]);
                        }
                        i.arg[a] = kept;
                        i.arg[a].ndim = 0;
                        refused(&i, info->arg_names[a]);
                        i.arg[a].ndim = 5;
                        refused(&i, info->arg_names[a]);
                        for (int d = 0; d < kept.ndim; d++) {
                                i.arg[a] = kept;
                                i.arg[a].dims[d] = 0;
                                refused(&i, info->arg_names[a]);
                                i.arg[a].dims[d] = -1;
                                refused(&i, info->arg_names[a]);
                                i.arg[a].dims[d] = INT64_MAX;
                                refused(&i, info->arg_names[a]);
                        }
                        i.arg[a] = kept;
                        i.arg[a].dtype = (enum op_dtype)99;
                        refused(&i, info->arg_names[a]);
                        if (code != OP_COPY) {
                                i.arg[a].dtype = DT_U8;
                                refused(&i, "");
                                i.arg[a].dtype = kept.dtype == DT_I32 ? DT_F32 : DT_I32;
                                refused(&i, "");
                        }
                }
        }
}

static void check_refuses_shapes_that_disagree(void **state)
{
        static const struct {
                enum op_code code;
                int arg, dim;
                int64_t value;
                const char *named;
        } cases[] = {
            {OP_COPY, 0, 0, 9, "out"},
            {OP_EMBED, 1, 0, 5, "ids"},
            {OP_EMBED, 2, 1, 9, "table"},
            {OP_EMBED, 3, 1, 9, "positions"},
            {OP_EMBED, 4, 0, 3, "cursor"},
            {OP_LAYERNORM, 1, 0, 7, "x"},
            {OP_LAYERNORM, 2, 0, 9, "gamma"},
            {OP_LAYERNORM, 3, 0, 7, "beta"},
            {OP_LINEAR, 1, 1, 9, "w"},
            {OP_LINEAR, 2, 0, 6, "w"},
            {OP_LINEAR, 3, 0, 6, "bias"},
            {OP_LINEAR, 4, 0, 5, "residual"},
            {OP_ACT, 1, 2, 5, "x"},
            {OP_ADD, 2, 0, 8, "b"},
            {OP_KV_APPEND, 0, 0, 3, "kcache"},
            {OP_KV_APPEND, 1, 1, 11, "vcache"},
            {OP_KV_APPEND, 2, 1, 63, "qkv"},
            {OP_ATTENTION, 0, 1, 33, "out"},
            {OP_ATTENTION, 2, 2, 17, "kcache"},
            {OP_ATTENTION, 3, 1, 9, "vcache"},
            {OP_LAST_ROW, 0, 0, 3, "out"},
            {OP_LAST_ROW, 1, 1, 9, "x"},
            {OP_ARGMAX, 1, 0, 2, "logits"},
            {OP_EMIT, 0, 1, 4, "token"},
            {OP_EMIT, 1, 0, 3, "cursor"},
            {OP_LAST_ROW, 1, 0, 7, "batch"},
        };

        for (size_t c = 0; c < sizeof(cases) / sizeof(cases[0]); c++) {
                struct op_inst i = good(cases[c].code);

                i.arg[cases[c].arg].dims[cases[c].dim] = cases[c].value;
                refused(&i, cases[c].named);
        }
}

static void check_refuses_attributes(void **state)
{
        struct op_inst i = good(OP_ATTENTION);

        i.attr.heads = 0;
        refused(&i, "heads");
        i = good(OP_ATTENTION);
        i.attr.kv_heads = 3;
        refused(&i, "multiple");
        i = good(OP_ATTENTION);
        i.attr.head_dim = INT32_MAX;
        refused(&i, "head_dim");
        i = good(OP_ATTENTION);
        i.attr.scale = NAN;
        refused(&i, "scale");
        i = good(OP_ATTENTION);
        i.arg[3].data = NULL;
        refused(&i, "together");
        i = good(OP_ATTENTION);
        i.arg[4].data = NULL;
        refused(&i, "together");
        i = good(OP_LAYERNORM);
        i.attr.eps = -1;
        refused(&i, "eps");
        i = good(OP_LINEAR);
        i.attr.act = ACT_COUNT;
        refused(&i, "activation");
        i = good(OP_EMBED);
        i.attr.batch = 0;
        refused(&i, "batch");
        i = good(OP_EMBED);
        i.attr.batch = 4;
        refused(&i, "batch");
        i = good(OP_EMBED);
        i.arg[4].data = NULL;
        refused(&i, "cursor");
        i = good(OP_EMIT);
        i.attr.rows = -1;
        refused(&i, "rows");
        i = good(OP_COPY);
        i.arg[2] = i.arg[1];
        refused(&i, "operands");
        i = good(OP_LINEAR);
        i.arg[1].dtype = DT_F16;
        refused(&i, "dtype");
        i = good(OP_LINEAR);
        i.arg[0].dtype = DT_F16;
        refused(&i, "out");
        i.code = OP_COUNT;
        refused(&i, "unknown");
}

/* ---- op_cost ---- */

static void cost_of_linear(void **state)
{
        struct op_inst i = good(OP_LINEAR);
        struct op_cost c = op_cost(&i, 0);

        /* 6 x 8 times 8 x 5, bias, residual; bf16 operands, fp32 output. */
        assert_true(c.flop == 6 * 5 * (2 * 8 + 2));
        assert_true(c.bytes == 4 * 30 + 2 * (48 + 40 + 5 + 30));
        assert_true(c.weight_bytes == 2 * (40 + 5));
}

static void cost_of_attention(void **state)
{
        struct op_inst i = good(OP_ATTENTION);
        /* 2 sequences of 3 rows after 5 positions: they see 6, 7 and 8. 4 heads of 8; 5 more per score. */
        struct op_cost c = op_cost(&i, 5);

        assert_true(c.flop == 2 * 4 * (6 + 7 + 8) * (4 * 8 + 5));
        assert_true(c.bytes == 4 * (6 * 32 + 6 * 32 + 2 * 8 * 16 * 2) + 8);
        assert_true(op_cost(&i, 100).flop == 2 * 4 * 30 * (4 * 8 + 5));
        i.arg[2].data = i.arg[3].data = i.arg[4].data = NULL;
        assert_true(op_cost(&i, 0).flop == 2 * 4 * 9 * (4 * 8 + 5));
        i.attr.causal = 1;
        assert_true(op_cost(&i, 0).flop == 2 * 4 * (1 + 2 + 3) * (4 * 8 + 5));
        assert_true(op_cost(&i, 0).bytes == 4 * (6 * 32 + 6 * 64));
}

static void cost_of_the_others(void **state)
{
        struct op_inst i = good(OP_COPY);

        assert_true(op_cost(&i, 0).bytes == 16 && op_cost(&i, 0).flop == 0);
        i = good(OP_EMBED);
        /* 6 rows of 8 in fp16 read and written, ids, 3 rows of positions, the cursor. */
        assert_true(op_cost(&i, 0).bytes == 2 * 96 + 24 + 48 + 8);
        assert_true(op_cost(&i, 0).weight_bytes == 96 + 48);
        i = good(OP_KV_APPEND);
        /* 3 rows of k and v for 2 sequences, read and written; 1 row where only one fits; none past the end. */
        assert_true(op_cost(&i, 0).bytes == 2 * 2 * 2 * 3 * 16 * 4 + 8);
        assert_true(op_cost(&i, 9).bytes == 2 * 2 * 2 * 1 * 16 * 4 + 8);
        assert_true(op_cost(&i, 50).bytes == 8);
        i = good(OP_ARGMAX);
        assert_true(op_cost(&i, 0).bytes == 3 * 100 * 4 + 12);
        i = good(OP_LAYERNORM);
        assert_true(op_cost(&i, 0).weight_bytes == 64 && op_cost(&i, 0).flop == 8 * 48);
        i = good(OP_LAST_ROW);
        assert_true(op_cost(&i, 0).bytes == 2 * 2 * 8 * 4);
        i = good(OP_ADD);
        assert_true(op_cost(&i, 0).flop == 7 && op_cost(&i, 0).bytes == 84);
        i = good(OP_EMIT);
        assert_true(op_cost(&i, 0).bytes == 2 * 12 + 2 * 8);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(f16_known_values),
            cmocka_unit_test(f16_round_trip_of_every_pattern),
            cmocka_unit_test(halves_round_to_nearest_even),
            cmocka_unit_test(bf16_round_trip_of_every_pattern),
            cmocka_unit_test(dtype_names),
            cmocka_unit_test(check_accepts_each_op),
            cmocka_unit_test(check_refuses_spoiled_operands),
            cmocka_unit_test(check_refuses_shapes_that_disagree),
            cmocka_unit_test(check_refuses_attributes),
            cmocka_unit_test(cost_of_linear),
            cmocka_unit_test(cost_of_attention),
            cmocka_unit_test(cost_of_the_others),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
