/*
 * The loops of the cpu device that are not matrix products: one row of fp32 at a time. cpu_kernels.c is compiled once
 * per instruction set; the device takes the best table that this processor runs. Private to gpu/.
 *
 * Rows may be of any length and alignment. `out` may be one of the inputs where marked in-place; it never overlaps
 * otherwise. The order of summation is fixed, so that equal inputs give equal bits.
 */
#ifndef DJINN_GPU_CPU_KERNELS_H
#define DJINN_GPU_CPU_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define NARROW_K_MAX 4 /* products with so short a sum cost less than the call of a library */

struct cpu_kernels {
        const char *isa;
        void (*f32_of_f16)(float *out, const uint16_t *in, size_t n);
        void (*f32_of_bf16)(float *out, const uint16_t *in, size_t n);
        void (*f16_of_f32)(uint16_t *out, const float *in, size_t n);
        void (*bf16_of_f32)(uint16_t *out, const float *in, size_t n);
        /* act(x + bias) + residual; bias and residual may be NULL. In-place. */
        void (*finish)(float *out, const float *x, const float *bias, const float *residual, size_t n, int act);
        /* beta may be NULL. In-place. */
        void (*layernorm)(float *out, const float *x, const float *gamma, const float *beta, size_t n, float eps);
        void (*softmax)(float *x, size_t n);
        /* Index of the largest, as OP_ARGMAX. */
        size_t (*argmax)(const float *x, size_t n);
        /* out[p] = scale * (q . k[p]), rows of k `stride` elements apart. */
        void (*scores)(float *out, const float *q, const float *k, size_t stride, size_t n, size_t dim, float scale);
        /* out = sum over p of weight[p] * v[p]. */
        void (*mix)(float *out, const float *weight, const float *v, size_t stride, size_t n, size_t dim);
        /* out[i] = x . w[i], K <= NARROW_K_MAX. */
        void (*narrow)(float *out, const float *x, const float *w, size_t n, size_t k);
        /* No infinity and no NaN. */
        bool (*finite)(const float *x, size_t n);
        /* Reads everything once; for measuring. */
        float (*sum)(const float *x, size_t n);
};

extern const struct cpu_kernels cpu_kernels_generic;
#if defined(__x86_64__)
extern const struct cpu_kernels cpu_kernels_avx2;
extern const struct cpu_kernels cpu_kernels_avx512;
#endif

#endif
