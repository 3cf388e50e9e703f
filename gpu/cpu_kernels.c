#include "cpu_kernels.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "op.h"

/* KERNELS is the name of the table, given by the build together with the instruction set; so is ISA. */
#ifndef KERNELS
#define KERNELS cpu_kernels_generic
#define ISA     "generic"
#endif

/* 16 lanes whatever the instruction set: the compiler splits them, and every sum has the same order everywhere. */
#define LANES 16
typedef float vec __attribute__((vector_size(64)));
typedef int32_t ivec __attribute__((vector_size(64)));
typedef uint32_t uvec __attribute__((vector_size(64)));

#define INLINE static inline __attribute__((always_inline))

INLINE vec load(const float *p)
{
        vec v;

        memcpy(&v, p, sizeof(v));
        return v;
}

INLINE void store(float *p, vec v)
{
        memcpy(p, &v, sizeof(v));
}

INLINE vec splat(float f)
{
        return (vec){f, f, f, f, f, f, f, f, f, f, f, f, f, f, f, f};
}

/* n < LANES elements, the other lanes hold `rest`. */
INLINE vec load_part(const float *p, size_t n, float rest)
{
        vec v = splat(rest);

        for (size_t i = 0; i < n; i++)
                v[i] = p[i];
        return v;
}

INLINE void store_part(float *p, vec v, size_t n)
{
        for (size_t i = 0; i < n; i++)
                p[i] = v[i];
}

INLINE vec choose(ivec where, vec yes, vec no)
{
        return (vec)((where & (ivec)yes) | (~where & (ivec)no));
}

INLINE float add_lanes(vec v)
{
        float a[LANES];

        store(a, v);
        for (int half = LANES / 2; half; half /= 2)
                for (int i = 0; i < half; i++)
                        a[i] += a[i + half];
        return a[0];
}

/*
 * e^x, relative error below 2e-7: x = n ln 2 + r with |r| <= ln 2 / 2, Taylor to the seventh power. Adding 1.5 * 2^23
 * rounds to an integer and leaves it in the low bits. Below -87 the result is 0 (it would be subnormal, and arithmetic
 * with subnormals is slow); above 88 it stays at e^88. NaN stays NaN.
 */
INLINE vec exp_vec(vec x)
{
        const vec magic = splat(12582912.0f);
        ivec low = x < splat(-87.0f);

        x = choose(x > splat(88.0f), splat(88.0f), choose(low, splat(-87.0f), x));
        vec t = x * splat(1.44269504f) + magic;
        vec n = t - magic;
        vec r = x - n * splat(0.693145752f); /* ln 2 in two parts, the first exact in few bits */

        r = r - n * splat(1.42860677e-6f);
        vec p = splat(1.0f / 5040);

        p = p * r + splat(1.0f / 720);
        p = p * r + splat(1.0f / 120);
        p = p * r + splat(1.0f / 24);
        p = p * r + splat(1.0f / 6);
        p = p * r + splat(0.5f);
        p = p * r + splat(1.0f);
        p = p * r + splat(1.0f);
        uvec power = ((uvec)t << 23) + 0x3f800000u;

        return choose(low, splat(0.0f), p * (vec)power);
}

/*
 * erfc(z) for z >= 0: e^(-z^2) t P(u) with t = 1 / (1 + z/2); P interpolates at Chebyshev's nodes for z <= 9.4, where
 * e^(-z^2) has long vanished; relative error of P 4e-8.
 */
INLINE vec erfc_vec(vec z)
{
        static const float c[] = {-4.83621236e-05f, -1.80997844e-06f, 0.000549451961f,
                                  -0.000551246701f, -0.00592580064f,  0.00552460812f,
                                  0.100072992f,     0.324915913f,     0.575457218f};

        z = choose(z > splat(9.4f), splat(9.4f), z);
        vec t = splat(1.0f) / (splat(1.0f) + z * splat(0.5f));
        vec u = t * splat(2.42553191f) - splat(1.42553191f);
        vec p = splat(7.0317805e-06f);

        for (size_t i = 0; i < sizeof(c) / sizeof(c[0]); i++)
                p = p * u + splat(c[i]);
        return exp_vec(-z * z) * t * p;
}

INLINE vec gelu_erf(vec x)
{
        vec size = choose(x < splat(0.0f), -x, x);
        /* Far out erfc is 0: the factor must not be infinite. */
        vec factor = choose(size > splat(30.0f), splat(0.0f), x * splat(0.5f));
        vec tail = factor * erfc_vec(size * splat(0.707106781f));

        return choose(x > splat(0.0f), x - tail, tail);
}

/* 0.5 x (1 + tanh(u)) = x / (1 + e^(-2u)). */
INLINE vec gelu_tanh(vec x)
{
        vec u = (x + splat(0.044715f) * x * x * x) * splat(-2 * 0.797884561f);

        return x / (splat(1.0f) + exp_vec(u));
}

INLINE vec act_vec(vec x, int act)
{
        switch (act) {
        case ACT_RELU:
                return choose(x < splat(0.0f), splat(0.0f), x);
        case ACT_GELU_TANH:
                return gelu_tanh(x);
        case ACT_GELU_ERF:
                return gelu_erf(x);
        case ACT_SILU:
                return x / (splat(1.0f) + exp_vec(-x));
        default:
                return x;
        }
}

/* Inlined with a constant act: one loop per activation. */
INLINE void finish_as(float *out, const float *x, const float *bias, const float *residual, size_t n, int act)
{
        size_t i = 0;

        for (; i + LANES <= n; i += LANES) {
                vec v = load(x + i);

                if (bias)
                        v += load(bias + i);
                v = act_vec(v, act);
                if (residual)
                        v += load(residual + i);
                store(out + i, v);
        }
        if (i < n) {
                vec v = load_part(x + i, n - i, 0);

                if (bias)
                        v += load_part(bias + i, n - i, 0);
                v = act_vec(v, act);
                if (residual)
                        v += load_part(residual + i, n - i, 0);
                store_part(out + i, v, n - i);
        }
}

static void finish(float *out, const float *x, const float *bias, const float *residual, size_t n, int act)
{
        switch (act) {
        case ACT_RELU:
                finish_as(out, x, bias, residual, n, ACT_RELU);
                break;
        case ACT_GELU_TANH:
                finish_as(out, x, bias, residual, n, ACT_GELU_TANH);
                break;
        case ACT_GELU_ERF:
                finish_as(out, x, bias, residual, n, ACT_GELU_ERF);
                break;
        case ACT_SILU:
                finish_as(out, x, bias, residual, n, ACT_SILU);
                break;
        default:
                finish_as(out, x, bias, residual, n, ACT_NONE);
        }
}

INLINE float f32_bits(uint32_t u)
{
        float f;

        memcpy(&f, &u, sizeof(f));
        return f;
}

INLINE uint32_t bits_f32(float f)
{
        uint32_t u;

        memcpy(&u, &f, sizeof(u));
        return u;
}

/* The conversions are those of op.c without branches, so that the compiler makes vectors of them. */
static void f32_of_f16(float *restrict out, const uint16_t *restrict in, size_t n)
{
        for (size_t i = 0; i < n; i++) {
                uint32_t mag = (in[i] & 0x7fffu) << 13, sign = (in[i] & 0x8000u) << 16;
                /* Moves the exponent from bias 15 to bias 127, subnormals too. */
                uint32_t moved = bits_f32(f32_bits(mag) * 0x1p112f);

                out[i] = f32_bits(sign | (mag >= 0x0f800000u ? mag | 0x7f800000u : moved));
        }
}

static void f32_of_bf16(float *restrict out, const uint16_t *restrict in, size_t n)
{
        for (size_t i = 0; i < n; i++)
                out[i] = f32_bits((uint32_t)in[i] << 16);
}

static void f16_of_f32(uint16_t *restrict out, const float *restrict in, size_t n)
{
        for (size_t i = 0; i < n; i++) {
                uint32_t u = bits_f32(in[i]), mag = u & 0x7fffffffu;
                uint32_t small = bits_f32(f32_bits(mag) + 0.5f) - 0x3f000000u;
                uint32_t normal = ((mag + 0xfffu + (mag >> 13 & 1u)) >> 13) - (112u << 10);
                uint32_t nan = 0x7e00u | (mag >> 13 & 0x3ffu);
                uint32_t h = mag < 0x38800000u ? small : normal;

                h = mag >= 0x477ff000u ? 0x7c00u : h;
                h = mag > 0x7f800000u ? nan : h;
                out[i] = (uint16_t)(u >> 16 & 0x8000u) | (uint16_t)h;
        }
}

static void bf16_of_f32(uint16_t *restrict out, const float *restrict in, size_t n)
{
        for (size_t i = 0; i < n; i++) {
                uint32_t u = bits_f32(in[i]);
                uint32_t rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16, nan = u >> 16 | 0x40u;

                out[i] = (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
        }
}

static float sum(const float *x, size_t n)
{
        vec s0 = splat(0), s1 = s0, s2 = s0, s3 = s0;
        size_t i = 0;

        for (; i + 4 * LANES <= n; i += 4 * LANES) {
                s0 += load(x + i);
                s1 += load(x + i + LANES);
                s2 += load(x + i + 2 * LANES);
                s3 += load(x + i + 3 * LANES);
        }
        for (; i < n; i++)
                s0[0] += x[i];
        return add_lanes((s0 + s1) + (s2 + s3));
}

/* Sum of (x - mean)^2. */
INLINE float sum_squares(const float *x, size_t n, float mean)
{
        vec s = splat(0);
        float rest = 0;
        size_t i = 0;

        for (; i + LANES <= n; i += LANES) {
                vec d = load(x + i) - splat(mean);

                s += d * d;
        }
        for (; i < n; i++)
                rest += (x[i] - mean) * (x[i] - mean);
        return (n >= LANES ? add_lanes(s) : 0) + rest;
}

static void layernorm(float *out, const float *x, const float *gamma, const float *beta, size_t n, float eps)
{
        float mean = sum(x, n) / (float)n;
        float scale = 1.0f / sqrtf(sum_squares(x, n, mean) / (float)n + eps);
        size_t i = 0;

        for (; i + LANES <= n; i += LANES) {
                vec v = (load(x + i) - splat(mean)) * splat(scale) * load(gamma + i);

                store(out + i, beta ? v + load(beta + i) : v);
        }
        for (; i < n; i++)
                out[i] = (x[i] - mean) * scale * gamma[i] + (beta ? beta[i] : 0);
}

INLINE vec max_vec(vec a, vec b)
{
        return choose(b > a, b, a);
}

/* NaN is passed over: it makes the sum NaN anyway. */
INLINE float largest(const float *x, size_t n)
{
        vec m = splat(-INFINITY);
        float a[LANES], max = -INFINITY;
        size_t i = 0;

        for (; i + LANES <= n; i += LANES)
                m = max_vec(m, load(x + i));
        m = max_vec(m, load_part(x + i, n - i, -INFINITY));
        store(a, m);
        for (int l = 0; l < LANES; l++)
                max = a[l] > max ? a[l] : max;
        return max;
}

static void softmax(float *x, size_t n)
{
        vec max = splat(largest(x, n)), total = splat(0);
        size_t i = 0;

        for (; i + LANES <= n; i += LANES) {
                vec e = exp_vec(load(x + i) - max);

                total += e;
                store(x + i, e);
        }
        if (i < n) {
                vec e = exp_vec(load_part(x + i, n - i, -INFINITY) - max);

                /* Lanes beyond the row: -inf - max is NaN when max is infinite, so they are not added up blindly. */
                for (size_t l = 0; l < n - i; l++)
                        total[l] += e[l];
                store_part(x + i, e, n - i);
        }
        float scale = 1.0f / add_lanes(total);

        for (i = 0; i + LANES <= n; i += LANES)
                store(x + i, load(x + i) * splat(scale));
        for (; i < n; i++)
                x[i] *= scale;
}

/* The first element that is not NaN where nothing is above -inf; 0 when there is none. */
static size_t first_number(const float *x, size_t n)
{
        for (size_t i = 0; i < n; i++)
                if (!isnan(x[i]))
                        return i;
        return 0;
}

static size_t argmax(const float *x, size_t n)
{
        vec m = splat(-INFINITY);
        ivec at = {0}, here = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        float best = -INFINITY;
        size_t i = 0, where = 0;

        /* Each lane keeps its first maximum; the lowest index wins among lanes and the tail comes last. */
        for (; i + LANES <= n; i += LANES, here += LANES) {
                vec v = load(x + i);
                ivec more = v > m;

                m = choose(more, v, m);
                at = (more & here) | (~more & at);
        }
        for (int l = 0; l < LANES; l++) {
                if (m[l] > best || (m[l] == best && best > -INFINITY && (size_t)at[l] < where)) {
                        best = m[l];
                        where = (size_t)at[l];
                }
        }
        for (; i < n; i++) {
                if (x[i] > best) {
                        best = x[i];
                        where = i;
                }
        }
        return best > -INFINITY ? where : first_number(x, n);
}

INLINE float dot(const float *a, const float *b, size_t n)
{
        float rest = 0;
        size_t i = 0;

        if (n >= LANES) {
                vec s = splat(0);

                for (; i + LANES <= n; i += LANES)
                        s += load(a + i) * load(b + i);
                rest = add_lanes(s);
        }
        for (; i < n; i++)
                rest += a[i] * b[i];
        return rest;
}

static void scores(float *out, const float *q, const float *k, size_t stride, size_t n, size_t dim, float scale)
{
        for (size_t p = 0; p < n; p++)
                out[p] = dot(q, k + p * stride, dim) * scale;
}

static void mix(float *out, const float *weight, const float *v, size_t stride, size_t n, size_t dim)
{
        size_t i = 0;

        for (; i + LANES <= dim; i += LANES) {
                vec even = splat(0), odd = splat(0);
                size_t p = 0;

                /* Two sums, for one would wait for itself at every step. */
                for (; p + 2 <= n; p += 2) {
                        even += splat(weight[p]) * load(v + p * stride + i);
                        odd += splat(weight[p + 1]) * load(v + (p + 1) * stride + i);
                }
                if (p < n)
                        even += splat(weight[p]) * load(v + p * stride + i);
                store(out + i, even + odd);
        }
        for (; i < dim; i++) {
                float s = 0;

                for (size_t p = 0; p < n; p++)
                        s += weight[p] * v[p * stride + i];
                out[i] = s;
        }
}

INLINE void narrow_as(float *restrict out, const float *x, const float *restrict w, size_t n, size_t k)
{
        float first[NARROW_K_MAX];

        memcpy(first, x, k * sizeof(first[0]));
        for (size_t i = 0; i < n; i++) {
                float s = first[0] * w[i * k];

                for (size_t j = 1; j < k; j++)
                        s += first[j] * w[i * k + j];
                out[i] = s;
        }
}

static void narrow(float *out, const float *x, const float *w, size_t n, size_t k)
{
        switch (k) {
        case 1:
                narrow_as(out, x, w, n, 1);
                break;
        case 2:
                narrow_as(out, x, w, n, 2);
                break;
        case 3:
                narrow_as(out, x, w, n, 3);
                break;
        default:
                narrow_as(out, x, w, n, 4);
        }
}

static bool all_finite(const float *x, size_t n)
{
        uint32_t odd = 0;

        for (size_t i = 0; i < n; i++)
                odd |= (bits_f32(x[i]) & 0x7f800000u) == 0x7f800000u;
        return odd == 0;
}

const struct cpu_kernels KERNELS = {
    .isa = ISA,
    .f32_of_f16 = f32_of_f16,
    .f32_of_bf16 = f32_of_bf16,
    .f16_of_f32 = f16_of_f32,
    .bf16_of_f32 = bf16_of_f32,
    .finish = finish,
    .layernorm = layernorm,
    .softmax = softmax,
    .argmax = argmax,
    .scores = scores,
    .mix = mix,
    .narrow = narrow,
    .finite = all_finite,
    .sum = sum,
};
