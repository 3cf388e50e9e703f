#include "digest.h"

#include <stdio.h>

#include <xxhash.h>

static struct digest from_xxh(XXH128_hash_t h)
{
        return (struct digest){.lo = h.low64, .hi = h.high64};
}

struct digest digest_of(const void *data, size_t len)
{
        return from_xxh(XXH3_128bits(data, len));
}

/* High word first, as xxhsum prints it. */
void digest_hex(struct digest d, char out[33])
{
        snprintf(out, 33, "%016llx%016llx", (unsigned long long)d.hi, (unsigned long long)d.lo);
}

/* The stream is libxxhash's own state under our name: it asks for an alignment that malloc does not promise. */
struct digest_stream *digest_begin(void)
{
        XXH3_state_t *state = XXH3_createState();

        if (state && XXH3_128bits_reset(state) != XXH_OK) {
                XXH3_freeState(state);
                return NULL;
        }
        return (struct digest_stream *)state;
}

void digest_add(struct digest_stream *s, const void *data, size_t len)
{
        if (len)
                XXH3_128bits_update((XXH3_state_t *)s, data, len);
}

struct digest digest_end(struct digest_stream *s)
{
        struct digest d = from_xxh(XXH3_128bits_digest((XXH3_state_t *)s));

        XXH3_freeState((XXH3_state_t *)s);
        return d;
}
