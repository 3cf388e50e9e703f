/*
 * Asserts. BUG_ON is always compiled in and is for states that only a mistake in this program can reach; input from
 * outside (files, peers, shared memory) is validated and refused, never asserted on.
 */
#ifndef DJINN_BASE_CHECK_H
#define DJINN_BASE_CHECK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

_Noreturn void bug_at(const char *file, int line, const char *what) __attribute__((cold));

#define BUG_ON(cond)                                       \
        do {                                               \
                if (__builtin_expect(!!(cond), 0))         \
                        bug_at(__FILE__, __LINE__, #cond); \
        } while (0)

#define ARRAY_LEN(a)                  (sizeof(a) / sizeof((a)[0]))
#define ALIGN_UP(x, a)                (((x) + ((a)-1)) & ~((__typeof__(x))(a)-1))
#define CACHE_LINE                    64
#define container_of(p, type, member) ((type *)((char *)(p)-offsetof(type, member)))

/* a*b and a+b for sizes that come from outside: false when the result does not fit. */
static inline bool size_mul(size_t a, size_t b, size_t *out)
{
        return !__builtin_mul_overflow(a, b, out);
}

static inline bool size_add(size_t a, size_t b, size_t *out)
{
        return !__builtin_add_overflow(a, b, out);
}

#endif
