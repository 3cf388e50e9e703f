/* Every table of loops that this processor can run against plain C in double; conformance only sees the best one. */
#include "unit.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cpu_kernels.h"
#include "op.h"
#include "prng.h"

static const struct cpu_kernels *k;

#define N_MAX 100
#define FILL(x)                                                    \
        for (size_t i_ = 0; i_ < sizeof(x) / sizeof((x)[0]); i_++) \
        (x)[i_] = prng_at_f32(3, __LINE__, i_)

static void conversions_equal_those_of_op(void **state)
{
        static uint16_t half[0x10000], back[0x10000];
        static float wide[0x10000];
        static const float edges[] = {65504.0f,   65519.99f, 65520.0f, 0x1p-14f,     0x1.ff8p-15f, 0x1p-24f, 0x1p-25f,
                                      0x1.8p-25f, FLT_MAX,   FLT_MIN,  FLT_TRUE_MIN, 0.0f,         INFINITY, NAN};

        for (unsigned h = 0; h < 0x10000; h++)
                half[h] = (uint16_t)h;
        k->f32_of_f16(wide, half, 0x10000);
        for (unsigned h = 0; h < 0x10000; h++) {
                float want = op_f16_to_f32(half[h]);

                assert_memory_equal(&wide[h], &want, sizeof(want));
        }
        k->f32_of_bf16(wide, half, 0x10000);
        for (unsigned h = 0; h < 0x10000; h++) {
                float want = op_bf16_to_f32(half[h]);

                assert_memory_equal(&wide[h], &want, sizeof(want));
        }
        for (unsigned i = 0; i < 0x10000; i++) {
                uint32_t bits = (uint32_t)prng_at(1, 1, i);

                memcpy(&wide[i], &bits, sizeof(bits));
                if (i < 2 * sizeof(edges) / sizeof(edges[0]))
                        wide[i] = i % 2 ? -edges[i / 2] : edges[i / 2];
        }
        k->f16_of_f32(back, wide, 0x10000);
        for (unsigned i = 0; i < 0x10000; i++)
                assert_int_equal(back[i], op_f32_to_f16(wide[i]));
        k->bf16_of_f32(back, wide, 0x10000);
        for (unsigned i = 0; i < 0x10000; i++)
                assert_int_equal(back[i], op_f32_to_bf16(wide[i]));
}

/* silu(x) / x = 1 / (1 + e^-x) shows the exponential alone where e^-x is large. */
static void exponential_is_accurate(void **state)
{
        double worst = 0;

        for (float x = 20; x < 86; x += 0.0137f) {
                float in = -x, out;

                k->finish(&out, &in, NULL, NULL, 1, ACT_SILU);
                double got = (double)in / (double)out - 1, want = exp((double)x);

                worst = fmax(worst, fabs(got / want - 1));
        }
        assert_true(worst < 4e-7); /* the exponential's 2e-7 and the roundings of sum and division */
}

static double act(int kind, double x)
{
        const double pi = 3.14159265358979323846;

        switch (kind) {
        case ACT_RELU:
                return x < 0 ? 0 : x;
        case ACT_GELU_TANH:
                return 0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x * x * x)));
        case ACT_GELU_ERF:
                return 0.5 * x * erfc(-x / sqrt(2));
        case ACT_SILU:
                return x / (1 + exp(-x));
        default:
                return x;
        }
}

static void activations_of_a_dense_grid(void **state)
{
        static float x[20001], y[20001];

        for (int kind = 0; kind < ACT_COUNT; kind++) {
                for (int i = 0; i < 20001; i++)
                        x[i] = (float)(i - 10000) / 500;
                k->finish(y, x, NULL, NULL, 20001, kind);
                for (int i = 0; i < 20001; i++) {
                        double want = act(kind, (double)x[i]);

                        /* Relative for what matters, and an absolute floor in the far tail. */
                        assert_true(fabs((double)y[i] - want) <= 1.5e-6 * fabs(want) + 1e-9);
                }
        }
}

static void finish_of_every_length(void **state)
{
        float x[N_MAX], bias[N_MAX], residual[N_MAX], out[N_MAX + 1];

        FILL(x);
        FILL(bias);
        FILL(residual);
        for (size_t n = 0; n <= N_MAX; n++) {
                out[n] = 77;
                k->finish(out, x, bias, residual, n, ACT_RELU);
                for (size_t i = 0; i < n; i++)
                        assert_true(out[i] == fmaxf(x[i] + bias[i], 0) + residual[i]);
                assert_true(out[n] == 77);
        }
}

static void softmax_and_layernorm_of_every_length(void **state)
{
        float x[N_MAX], gamma[N_MAX], beta[N_MAX], out[N_MAX + 1];

        FILL(x);
        FILL(gamma);
        FILL(beta);
        for (size_t n = 1; n <= N_MAX; n++) {
                double sum = 0, mean = 0, var = 0;

                memcpy(out, x, sizeof(x));
                out[n] = 77;
                k->softmax(out, n);
                for (size_t i = 0; i < n; i++) {
                        sum += exp((double)x[i]);
                        mean += (double)x[i] / (double)n;
                }
                for (size_t i = 0; i < n; i++) {
                        assert_true(fabs((double)out[i] * sum / exp((double)x[i]) - 1) < 1e-6);
                        var += ((double)x[i] - mean) * ((double)x[i] - mean) / (double)n;
                }
                k->layernorm(out, x, gamma, beta, n, 0.01f);
                for (size_t i = 0; i < n; i++) {
                        double want = ((double)x[i] - mean) / sqrt(var + 0.01) * (double)gamma[i] + (double)beta[i];

                        assert_true(fabs((double)out[i] - want) < 2e-6);
                }
                assert_true(out[n] == 77);
        }
}

static void argmax_of_every_place(void **state)
{
        float x[N_MAX];

        for (size_t n = 1; n <= N_MAX; n++) {
                for (size_t at = 0; at < n; at++) {
                        for (size_t i = 0; i < n; i++)
                                x[i] = i % 7 ? -(float)i : NAN;
                        x[at] = 5;
                        assert_int_equal(k->argmax(x, n), at);
                        x[n - 1] = 5;
                        x[n / 2] = n / 2 >= at ? 5 : x[n / 2];
                        assert_int_equal(k->argmax(x, n), at);
                        x[n - 1 - (n - 1 - at) / 2] = INFINITY;
                        assert_int_equal(k->argmax(x, n), n - 1 - (n - 1 - at) / 2);
                }
                for (size_t i = 0; i < n; i++)
                        x[i] = i + 1 < n ? NAN : -INFINITY;
                assert_int_equal(k->argmax(x, n), n - 1);
                x[n - 1] = NAN;
                assert_int_equal(k->argmax(x, n), 0);
        }
}

static void scores_and_mix_of_every_width(void **state)
{
        enum { POSITIONS = 5, STRIDE = N_MAX + 3 };
        static float rows[POSITIONS * STRIDE], q[N_MAX], out[N_MAX + 1], weight[POSITIONS];

        FILL(rows);
        FILL(q);
        FILL(weight);
        for (size_t dim = 1; dim <= N_MAX; dim++) {
                for (size_t n = 1; n <= POSITIONS; n++) {
                        out[n] = 77;
                        k->scores(out, q, rows, STRIDE, n, dim, 0.5f);
                        assert_true(out[n] == 77);
                        for (size_t p = 0; p < n; p++) {
                                double want = 0;

                                for (size_t i = 0; i < dim; i++)
                                        want += 0.5 * (double)q[i] * (double)rows[p * STRIDE + i];
                                assert_true(fabs((double)out[p] - want) < 2e-6);
                        }
                        out[dim] = 77;
                        k->mix(out, weight, rows, STRIDE, n, dim);
                        assert_true(out[dim] == 77);
                        for (size_t i = 0; i < dim; i++) {
                                double want = 0;

                                for (size_t p = 0; p < n; p++)
                                        want += (double)weight[p] * (double)rows[p * STRIDE + i];
                                assert_true(fabs((double)out[i] - want) < 1e-6);
                        }
                }
        }
}

static void short_sums(void **state)
{
        float w[N_MAX * NARROW_K_MAX], x[NARROW_K_MAX], out[N_MAX + 1];

        FILL(w);
        FILL(x);
        for (size_t dim = 1; dim <= NARROW_K_MAX; dim++) {
                for (size_t n = 1; n <= N_MAX; n++) {
                        out[n] = 77;
                        k->narrow(out, x, w, n, dim);
                        assert_true(out[n] == 77);
                        for (size_t i = 0; i < n; i++) {
                                double want = 0;

                                for (size_t j = 0; j < dim; j++)
                                        want += (double)x[j] * (double)w[i * dim + j];
                                assert_true(fabs((double)out[i] - want) < 5e-7);
                        }
                }
        }
}

static void finite_and_sum(void **state)
{
        float x[N_MAX];

        FILL(x);
        for (size_t n = 1; n <= N_MAX; n++) {
                double want = 0;

                for (size_t i = 0; i < n; i++)
                        want += (double)x[i];
                assert_true(fabs((double)k->sum(x, n) - want) < 1e-5);
                assert_true(k->finite(x, n));
                float kept = x[n - 1];

                x[n - 1] = n % 2 ? NAN : -INFINITY;
                assert_false(k->finite(x, n));
                x[n - 1] = kept;
        }
}

static int choose_table(const char *isa)
{
        k = NULL;
        if (strcmp(isa, "generic") == 0)
                k = &cpu_kernels_generic;
#if defined(__x86_64__)
        __builtin_cpu_init();
        if (strcmp(isa, "avx2") == 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
                k = &cpu_kernels_avx2;
        if (strcmp(isa, "avx512") == 0 && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq"))
                k = &cpu_kernels_avx512;
#endif
        return k != NULL;
}

int main(int argc, char **argv)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(conversions_equal_those_of_op),
            cmocka_unit_test(exponential_is_accurate),
            cmocka_unit_test(activations_of_a_dense_grid),
            cmocka_unit_test(finish_of_every_length),
            cmocka_unit_test(softmax_and_layernorm_of_every_length),
            cmocka_unit_test(argmax_of_every_place),
            cmocka_unit_test(scores_and_mix_of_every_width),
            cmocka_unit_test(short_sums),
            cmocka_unit_test(finite_and_sum),
        };

        if (argc < 2 || !choose_table(argv[1])) {
                printf("skipped: this processor does not run %s\n", argc < 2 ? "(none named)" : argv[1]);
                return 77;
        }
        return cmocka_run_group_tests(tests, NULL, NULL);
}
