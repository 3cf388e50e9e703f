#include "prng.h"

#include "check.h"

__extension__ typedef unsigned __int128 u128;

static uint64_t splitmix64(uint64_t *state)
{
        uint64_t z = *state += 0x9e3779b97f4a7c15ull;

        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
        return z ^ (z >> 31);
}

/* Through splitmix64, because xoshiro must not start from an all-zero or low-entropy state. */
void prng_seed(struct prng *p, uint64_t seed)
{
        for (int i = 0; i < 4; i++)
                p->s[i] = splitmix64(&seed);
}

static uint64_t rotl(uint64_t x, int k)
{
        return (x << k) | (x >> (64 - k));
}

uint64_t prng_u64(struct prng *p)
{
        uint64_t *s = p->s;
        uint64_t result = rotl(s[1] * 5, 7) * 9;
        uint64_t t = s[1] << 17;

        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = rotl(s[3], 45);
        return result;
}

/* Multiply-and-reject: the high word is uniform once the 2^64 mod n lowest products of each are thrown away. */
uint64_t prng_below(struct prng *p, uint64_t n)
{
        BUG_ON(n == 0);
        u128 m = (u128)prng_u64(p) * n;

        if ((uint64_t)m < n) {
                uint64_t reject = -n % n;

                while ((uint64_t)m < reject)
                        m = (u128)prng_u64(p) * n;
        }
        return (uint64_t)(m >> 64);
}

double prng_unit(struct prng *p)
{
        return (double)(prng_u64(p) >> 11) * 0x1p-53;
}

void prng_shuffle(struct prng *p, uint32_t *v, size_t n)
{
        for (size_t i = n; i > 1; i--) {
                size_t j = (size_t)prng_below(p, i);
                uint32_t t = v[i - 1];

                v[i - 1] = v[j];
                v[j] = t;
        }
}
