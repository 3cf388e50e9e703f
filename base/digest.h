/* XXH3-128 through libxxhash, of bytes in canonical order. */
#ifndef DJINN_BASE_DIGEST_H
#define DJINN_BASE_DIGEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct digest {
        uint64_t lo, hi;
};

struct digest digest_of(const void *data, size_t len);

static inline bool digest_equal(struct digest a, struct digest b)
{
        return a.lo == b.lo && a.hi == b.hi;
}

/* 32 hexadecimal digits and a NUL. */
void digest_hex(struct digest d, char out[33]);

/* Incremental form. */
struct digest_stream;
struct digest_stream *digest_begin(void); /* NULL: no memory */
void digest_add(struct digest_stream *s, const void *data, size_t len);
struct digest digest_end(struct digest_stream *s); /* frees s */

#endif
