/*
 * Which library for LINEAR: time of y[R,N] = x[R,K] w[N,K]^T in fp32 on one thread by oneDNN, by OpenBLAS (where it is
 * installed) and, for very short sums, by the plain loop. Shapes: decode steps of small and ordinary models, encoder
 * batches, prefill. Prints the fastest of many runs in microseconds. Not a test: it is run by hand.
 */
#include <dnnl.h>
#include <stdio.h>
#include <stdlib.h>

#if HAVE_OPENBLAS
#include <cblas.h>
#endif

#include "check.h"
#include "clock.h"
#include "cpu_kernels.h"
#include "prng.h"

#define BUDGET_NS (150 * NS_PER_MS)

void omp_set_num_threads(int n); /* of oneDNN's OpenMP runtime */

struct shape {
        int rows, k, n;
        const float *x, *w;
        float *y;
};

static void by_onednn(const struct shape *s)
{
        dnnl_sgemm('N', 'T', s->rows, s->n, s->k, 1.0f, s->x, s->k, s->w, s->k, 0.0f, s->y, s->n);
}

#if HAVE_OPENBLAS
static void by_openblas(const struct shape *s)
{
        if (s->rows == 1)
                cblas_sgemv(CblasRowMajor, CblasNoTrans, s->n, s->k, 1, s->w, s->k, s->x, 1, 0, s->y, 1);
        else
                cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, s->rows, s->n, s->k, 1, s->x, s->k, s->w, s->k, 0,
                            s->y, s->n);
}
#endif

static void by_loop(const struct shape *s)
{
        for (int r = 0; r < s->rows; r++)
                cpu_kernels_generic.narrow(s->y + (size_t)r * (size_t)s->n, s->x + r * s->k, s->w, (size_t)s->n,
                                           (size_t)s->k);
}

#if defined(__x86_64__)
static void by_avx512(const struct shape *s)
{
        for (int r = 0; r < s->rows; r++)
                cpu_kernels_avx512.narrow(s->y + (size_t)r * (size_t)s->n, s->x + r * s->k, s->w, (size_t)s->n,
                                          (size_t)s->k);
}
#endif

/* Microseconds of one call: the fastest of many batches, each long enough for the clock. */
static double best_us(void (*run)(const struct shape *), const struct shape *s)
{
        double flop = 2.0 * s->rows * s->k * s->n, best = 1e18;
        int batch = 1 + (int)(1e6 / flop);
        uint64_t end = clock_ns() + BUDGET_NS;

        run(s);
        while (clock_ns() < end) {
                uint64_t start = clock_ns();

                for (int i = 0; i < batch; i++)
                        run(s);
                double us = (double)(clock_ns() - start) / 1e3 / batch;

                best = us < best ? us : best;
        }
        return best;
}

static float *filled(size_t n)
{
        float *p = aligned_alloc(4096, ALIGN_UP(n * sizeof(float), (size_t)4096));

        BUG_ON(!p);
        for (size_t i = 0; i < n; i++)
                p[i] = prng_at_f32(1, 2, i);
        return p;
}

static void row(const struct shape *s, const char *name, double us)
{
        double flop = 2.0 * s->rows * s->k * s->n;
        double bytes = 4.0 * ((double)s->n * s->k + (double)s->rows * s->k + (double)s->rows * s->n);

        printf("%5d %6d %6d  %-9s %10.2f %8.1f %8.1f\n", s->rows, s->k, s->n, name, us, flop / us / 1e3,
               bytes / us / 1e3);
}

static void measure(struct shape s)
{
        float *x = filled((size_t)s.rows * (size_t)s.k), *w = filled((size_t)s.n * (size_t)s.k);

        s.x = x;
        s.w = w;
        s.y = filled((size_t)s.rows * (size_t)s.n);
        row(&s, "oneDNN", best_us(by_onednn, &s));
#if HAVE_OPENBLAS
        row(&s, "OpenBLAS", best_us(by_openblas, &s));
#endif
        if (s.k <= NARROW_K_MAX)
                row(&s, "loop", best_us(by_loop, &s));
#if defined(__x86_64__)
        if (s.k <= NARROW_K_MAX && __builtin_cpu_supports("avx512vl"))
                row(&s, "avx512", best_us(by_avx512, &s));
#endif
        free(x);
        free(w);
        free(s.y);
}

int main(void)
{
        static const struct shape shapes[] = {
            {.rows = 1, .k = 64, .n = 192},     {.rows = 1, .k = 64, .n = 64},      {.rows = 1, .k = 64, .n = 256},
            {.rows = 1, .k = 256, .n = 64},     {.rows = 1, .k = 64, .n = 512},     {.rows = 1, .k = 2, .n = 50257},
            {.rows = 1, .k = 768, .n = 2304},   {.rows = 1, .k = 768, .n = 3072},   {.rows = 1, .k = 3072, .n = 768},
            {.rows = 1, .k = 768, .n = 50257},  {.rows = 2, .k = 768, .n = 50257},  {.rows = 16, .k = 64, .n = 192},
            {.rows = 64, .k = 64, .n = 192},    {.rows = 64, .k = 256, .n = 64},    {.rows = 64, .k = 2, .n = 50257},
            {.rows = 64, .k = 768, .n = 768},   {.rows = 64, .k = 768, .n = 2304},  {.rows = 64, .k = 768, .n = 3072},
            {.rows = 128, .k = 768, .n = 768},  {.rows = 128, .k = 768, .n = 2304}, {.rows = 128, .k = 768, .n = 3072},
            {.rows = 128, .k = 3072, .n = 768},
        };

        omp_set_num_threads(1);
#if HAVE_OPENBLAS
        openblas_set_num_threads(1);
        printf("OpenBLAS: %s\n", openblas_get_config());
#endif
        printf("    R      K      N  by                us  GFLOP/s     GB/s\n");
        for (size_t i = 0; i < ARRAY_LEN(shapes); i++)
                measure(shapes[i]);
        return 0;
}
