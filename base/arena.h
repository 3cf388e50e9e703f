/*
 * Bump arena: many small allocations that die together. Either over a buffer of the caller's (fixed: it never calls
 * malloc, so it may be used on a hot path after set-up) or over chunks that it allocates up to a limit.
 * One thread at a time. Requests that do not fit return NULL and change nothing.
 */
#ifndef DJINN_BASE_ARENA_H
#define DJINN_BASE_ARENA_H

#include <stddef.h>

struct arena_chunk;

struct arena {
        char *at, *end;             /* free bytes of the current chunk */
        struct arena_chunk *chunks; /* newest first; NULL when fixed */
        char *fixed;                /* start of the caller's buffer; NULL when growing */
        size_t chunk_bytes;         /* size of an ordinary chunk */
        size_t limit_bytes;         /* sum over chunks, 0: no limit */
        size_t held_bytes;          /* sum over chunks */
};

/* Over buf, which the caller owns and must outlive the arena. */
void arena_init_fixed(struct arena *a, void *buf, size_t len);
/* Grows by chunks of chunk_bytes (a larger request gets a chunk of its own), in all at most limit_bytes (0: no limit).
 * Allocates nothing yet. */
void arena_init(struct arena *a, size_t chunk_bytes, size_t limit_bytes);

/* bytes at a multiple of align (a power of two), not cleared; NULL when it does not fit. 0 bytes give a valid pointer
 * that must not be read. */
void *arena_alloc(struct arena *a, size_t bytes, size_t align);
/* n elements of size bytes, aligned for any type, cleared. NULL on overflow of n*size too. */
void *arena_array(struct arena *a, size_t n, size_t size);
/* A copy of len bytes of s with a NUL behind. */
char *arena_strndup(struct arena *a, const char *s, size_t len);
char *arena_strdup(struct arena *a, const char *s);

#define arena_new(a, type) ((type *)arena_array((a), 1, sizeof(type)))

/* Everything allocated so far dies; a growing arena keeps its oldest chunk. */
void arena_reset(struct arena *a);
/* Gives all chunks back; the arena may be used again. A fixed arena is emptied, its buffer stays the caller's. */
void arena_free(struct arena *a);

#endif
