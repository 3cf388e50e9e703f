/*
 * Random numbers. Two kinds: a sequential stream (xoshiro256**, seeded through splitmix64) for orders, resampling and
 * arrivals; and a counter-based function of (seed, stream, index) whose value does not depend on who computes it or in
 * which order, for synthetic weights and data patterns (the same on every device).
 */
#ifndef DJINN_BASE_PRNG_H
#define DJINN_BASE_PRNG_H

#include <stddef.h>
#include <stdint.h>

struct prng {
        uint64_t s[4];
};

void prng_seed(struct prng *p, uint64_t seed);
uint64_t prng_u64(struct prng *p);
/* Uniform in [0, n), without modulo bias; n > 0. */
uint64_t prng_below(struct prng *p, uint64_t n);
/* Uniform in [0, 1). */
double prng_unit(struct prng *p);
/* Fisher-Yates over n indices. */
void prng_shuffle(struct prng *p, uint32_t *v, size_t n);

/* Counter-based: a 64-bit mix of the three; stateless. */
static inline uint64_t prng_at(uint64_t seed, uint64_t stream, uint64_t index)
{
        uint64_t z = seed + 0x9e3779b97f4a7c15ull * (index + 1) + 0xd1b54a32d192ed03ull * (stream + 1);

        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
        z ^= z >> 31;
        z = (z ^ (z >> 33)) * 0xff51afd7ed558ccdull;
        return z ^ (z >> 29);
}

/* Uniform in [-1, 1) with 24 bits, exactly representable in float. */
static inline float prng_at_f32(uint64_t seed, uint64_t stream, uint64_t index)
{
        return (float)(int32_t)((prng_at(seed, stream, index) >> 40) - (1u << 23)) * (1.0f / (1u << 23));
}

#endif
