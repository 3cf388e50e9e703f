#include <errno.h>

#include "wl_fixture.h"

#include "weights.h"

/* "w" F32 [4,3] counts 0..11; "v" F32 [4] 100..103; "big" F16 [2] with an infinity; "nan" F32 [1]; "m" I64. */
#define HEADER                                                                \
        "{\"w\":{\"dtype\":\"F32\",\"shape\":[4,3],\"data_offsets\":[0,48]}," \
        "\"p.v\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[48,64]}," \
        "\"big\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[64,72]}," \
        "\"nan\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[72,80]}," \
        "\"p.m\":{\"dtype\":\"I64\",\"shape\":[1],\"data_offsets\":[80,88]}}"

static struct checkpoint *checkpoint(void)
{
        float data[22];
        char dir[64];
        struct checkpoint *c;

        for (int i = 0; i < 12; i++)
                data[i] = (float)i;
        for (int i = 0; i < 4; i++)
                data[12 + i] = (float)(100 + i);
        data[16] = 1;
        data[17] = 65520;
        data[18] = 0;
        data[19] = NAN;
        data[20] = data[21] = 0;
        tmp_dir(dir);
        put_safetensors(dir, "model.safetensors", HEADER, 0, data, sizeof(data));
        int fd = open_dir(dir);

        must(checkpoint_open(fd, "model", &c));
        close(fd);
        tmp_gone(dir);
        return c;
}

/* One weight with these dimensions made of these pieces (ends with source ""). */
static int make(enum op_dtype dtype, int ndim, const int64_t *dims, const struct graph_recipe *pieces, bool synthetic,
                uint64_t seed, void *out)
{
        struct graph_builder *b = gb_new("g", 1, 1, 0, DT_F32);
        struct checkpoint *c = checkpoint();
        const struct weights_source src = {
            .kind = synthetic ? WEIGHTS_SYNTHETIC : WEIGHTS_CHECKPOINT, .checkpoint = c, .seed = seed};
        int64_t one[] = {1};
        unsigned w = gb_tensor(b, "the.weight", dtype, RES_WEIGHT, ndim, dims);
        unsigned in = gb_tensor(b, "in", DT_U8, RES_INPUT, 1, one), y = gb_tensor(b, "out", DT_U8, RES_OUTPUT, 1, one);
        struct graph g;

        gb_prefix(b, "p.");
        for (; pieces->source[0]; pieces++)
                gb_recipe(b, w, pieces);
        gb_segment(b, SEG_BODY, PHASE_FORWARD);
        gb_node(b, OP_COPY, NULL, 2, (unsigned[]){y, in});
        must(gb_finish(b, &g));
        err_clear();
        int rc = weights_make(&g, w, &src, out);

        graph_free(&g);
        checkpoint_close(c);
        return rc;
}

#define PIECES(...) ((const struct graph_recipe[]){__VA_ARGS__, {.source = ""}})
#define DIMS(...)   ((const int64_t[]){__VA_ARGS__})

static void expect(const float *have, const float *want, size_t n)
{
        for (size_t i = 0; i < n; i++)
                assert_close(have[i], want[i], 0);
}

static void copies_slices_and_transposes(void **state)
{
        float v[12];

        must(make(DT_F32, 2, DIMS(4, 3), PIECES({.source = "w"}), false, 0, v));
        expect(v, (const float[]){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}, 12);
        must(make(DT_F32, 2, DIMS(2, 3), PIECES({.source = "w", .slice_start = 1, .slice_len = 2}), false, 0, v));
        expect(v, (const float[]){3, 4, 5, 6, 7, 8}, 6);
        must(make(DT_F32, 2, DIMS(3, 4), PIECES({.source = "w", .transpose = 1}), false, 0, v));
        expect(v, (const float[]){0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11}, 12);
        must(make(DT_F32, 2, DIMS(2, 4), PIECES({.source = "w", .transpose = 1, .slice_start = 1}), false, 0, v));
        expect(v, (const float[]){1, 4, 7, 10, 2, 5, 8, 11}, 8);
        /* Tried again with the prefix. */
        must(make(DT_F32, 1, DIMS(4), PIECES({.source = "v"}), false, 0, v));
        expect(v, (const float[]){100, 101, 102, 103}, 4);
}

static void joins_pieces(void **state)
{
        float v[24];

        must(make(DT_F32, 2, DIMS(3, 3),
                  PIECES({.source = "w", .slice_start = 3, .slice_len = 1}, {.source = "w", .slice_len = 2}), false, 0,
                  v));
        expect(v, (const float[]){9, 10, 11, 0, 1, 2, 3, 4, 5}, 9);
        must(make(DT_F32, 2, DIMS(4, 6), PIECES({.source = "w", .axis = 1}, {.source = "w", .axis = 1}), false, 0, v));
        expect(v, (const float[]){0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8, 6, 7, 8, 9, 10, 11, 9, 10, 11}, 24);
        must(make(DT_F32, 1, DIMS(6), PIECES({.source = "v"}, {.source = "v", .slice_start = 2}), false, 0, v));
        expect(v, (const float[]){100, 101, 102, 103, 102, 103}, 6);
}

static void casts(void **state)
{
        uint16_t h[12];

        must(make(DT_F16, 2, DIMS(3, 4), PIECES({.source = "w", .transpose = 1}), false, 0, h));
        assert_close(op_f16_to_f32(h[1]), 3, 0);
        must(make(DT_BF16, 1, DIMS(4), PIECES({.source = "v"}), false, 0, h));
        assert_close(op_bf16_to_f32(h[1]), 101, 0);
}

static void what_does_not_fit_is_refused_by_name(void **state)
{
        float v[64];
        const struct {
                enum op_dtype dtype;
                int ndim;
                int64_t dims[2];
                struct graph_recipe pieces[3];
                const char *sentence;
        } bad[] = {
            {DT_F32, 2, {4, 3}, {{.source = "none"}}, "is not in the checkpoint"},
            {DT_F32, 1, {1, 0}, {{.source = "m"}}, "I64"},
            {DT_F32, 2, {3, 4}, {{.source = "w"}}, "[4,3]"},
            {DT_F32, 2, {5, 3}, {{.source = "w"}}, "do not fill"},
            {DT_F32, 2, {3, 3}, {{.source = "w"}}, "does not fit"},
            {DT_F32, 1, {12, 0}, {{.source = "w"}}, "shape"},
            {DT_F32, 2, {4, 3}, {{.source = "w", .transpose = 1}}, "transposed"},
            {DT_F32, 1, {4, 0}, {{.source = "v", .transpose = 1}}, "transposed"},
            {DT_F32, 2, {2, 3}, {{.source = "w", .slice_start = 3, .slice_len = 2}}, "shape"},
            {DT_F32, 2, {2, 3}, {{.source = "w", .slice_start = UINT32_MAX, .slice_len = UINT32_MAX}}, "shape"},
            {DT_F32, 2, {4, 3}, {{.source = "w", .slice_start = 4}}, "does not fit"},
            {DT_F32, 2, {4, 5}, {{.source = "w", .axis = 1}, {.source = "w", .axis = 1}}, "leave free"},
            {DT_F32, 2, {5, 6}, {{.source = "w", .axis = 1}, {.source = "w", .axis = 1}}, "the rows"},
            {DT_F32, 2, {4, 6}, {{.source = "w", .axis = 1}, {.source = "w"}}, "another axis"},
            {DT_F32, 1, {2, 0}, {{.source = "nan"}}, "not finite"},
            {DT_F16, 1, {2, 0}, {{.source = "big"}}, "float16 cannot hold"},
            {DT_I32, 1, {4, 0}, {{.source = "v"}}, "neither float32"},
        };

        for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
                if (make(bad[i].dtype, bad[i].ndim, bad[i].dims, bad[i].pieces, false, 0, v) != -EINVAL)
                        fail_msg("case %zu was accepted", i);
                assert_sentence(bad[i].sentence);
                assert_sentence("the.weight");
        }
        must(make(DT_F32, 1, DIMS(2), PIECES({.source = "big"}), false, 0, v));
}

/* More than one chunk, both ways of copying. */
static void large_tensors_come_in_chunks(void **state)
{
        const size_t rows = 700, cols = 300, n = rows * cols;
        float *data = malloc(n * 4), *v = malloc(n * 4);
        char dir[64], header[128];
        struct checkpoint *c;

        for (size_t i = 0; i < n; i++)
                data[i] = (float)i;
        snprintf(header, sizeof(header), "{\"w\":{\"dtype\":\"F32\",\"shape\":[%zu,%zu],\"data_offsets\":[0,%zu]}}",
                 rows, cols, n * 4);
        tmp_dir(dir);
        put_safetensors(dir, "model.safetensors", header, 0, data, n * 4);
        int fd = open_dir(dir);

        must(checkpoint_open(fd, "model", &c));
        close(fd);
        for (int transpose = 0; transpose < 2; transpose++) {
                struct graph_builder *b = gb_new("g", 1, 1, 0, DT_F32);
                const struct graph_recipe r = {.source = "w", .transpose = (uint8_t)transpose};
                const struct weights_source src = {.kind = WEIGHTS_CHECKPOINT, .checkpoint = c};
                const int64_t dims[] = {(int64_t)(transpose ? cols : rows), (int64_t)(transpose ? rows : cols)};
                unsigned w = gb_tensor(b, "w", DT_F32, RES_WEIGHT, 2, dims);
                unsigned y = gb_tensor(b, "y", DT_F32, RES_OUTPUT, 2, dims);
                struct graph g;

                gb_recipe(b, w, &r);
                gb_segment(b, SEG_BODY, PHASE_FORWARD);
                gb_node(b, OP_COPY, NULL, 2, (unsigned[]){y, w});
                must(gb_finish(b, &g));
                must(weights_make(&g, w, &src, v));
                for (size_t i = 0; i < n; i++)
                        assert_true(v[i] == (transpose ? data[i % rows * cols + i / rows] : data[i]));
                graph_free(&g);
        }
        checkpoint_close(c);
        tmp_gone(dir);
        free(data);
        free(v);
}

static void synthetic_values_depend_on_seed_name_and_index(void **state)
{
        static float a[20000], b[20000];
        const struct graph_recipe r = {.source = "x", .synth = SYNTH_NORMAL, .synth_scale = 0.5f, .synth_bias = 2};
        double sum = 0, sum2 = 0, largest = 0;

        must(make(DT_F32, 2, DIMS(200, 100), PIECES(r), true, 9, a));
        must(make(DT_F32, 2, DIMS(200, 100), PIECES(r), true, 9, b));
        assert_memory_equal(a, b, sizeof(a));
        for (int i = 0; i < 20000; i++) {
                double z = ((double)a[i] - 2) / 0.5;

                sum += z;
                sum2 += z * z;
                largest = fabs(z) > largest ? fabs(z) : largest;
        }
        assert_close(sum / 20000, 0, 0.03);
        assert_close(sum2 / 20000, 1, 0.05);
        assert_true(largest > 2.5 && largest < 4);
        /* A slice holds the values of the whole. */
        must(make(DT_F32, 2, DIMS(3, 100),
                  PIECES({.source = "x", .synth_scale = 0.5f, .synth_bias = 2, .slice_start = 7, .slice_len = 3}), true,
                  9, b));
        assert_memory_equal(a + 700, b, 300 * sizeof(float));
        must(make(DT_F32, 2, DIMS(200, 100), PIECES(r), true, 10, b));
        assert_memory_not_equal(a, b, sizeof(a));
        struct graph_recipe other = r;

        strcpy(other.source, "y");
        must(make(DT_F32, 2, DIMS(200, 100), PIECES(other), true, 9, b));
        assert_memory_not_equal(a, b, sizeof(a));
        /* The same on every machine: these bits are part of what a published result means. */
        assert_close(a[0], 0x1.ad324cp+0, 0);
        assert_close(a[12345], 0x1.447cbp+1, 0);
        must(make(DT_F32, 1, DIMS(2), PIECES({.source = "o", .synth = SYNTH_ONE, .synth_scale = 9}), true, 9, b));
        expect(b, (const float[]){1, 1}, 2);
        must(make(DT_F32, 1, DIMS(2), PIECES({.source = "o", .synth = SYNTH_ZERO, .synth_bias = 9}), true, 9, b));
        expect(b, (const float[]){0, 0}, 2);
        assert_int_equal(make(DT_F32, 2, DIMS(4, 3), PIECES({.source = "a"}, {.source = "b"}), true, 9, b), -EINVAL);
        assert_sentence("needs a length");
        must(make(DT_F32, 2, DIMS(4, 3), PIECES({.source = "a", .slice_len = 2}, {.source = "b", .slice_len = 2}), true,
                  9, b));
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(copies_slices_and_transposes),
            cmocka_unit_test(joins_pieces),
            cmocka_unit_test(casts),
            cmocka_unit_test(what_does_not_fit_is_refused_by_name),
            cmocka_unit_test(large_tensors_come_in_chunks),
            cmocka_unit_test(synthetic_values_depend_on_seed_name_and_index),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
