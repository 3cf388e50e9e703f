#include "arena.h"

#include <stdalign.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"

struct arena_chunk {
        struct arena_chunk *older;
        size_t len; /* of data */
        alignas(max_align_t) char data[];
};

void arena_init_fixed(struct arena *a, void *buf, size_t len)
{
        *a = (struct arena){.fixed = buf, .at = buf, .end = (char *)buf + len};
}

void arena_init(struct arena *a, size_t chunk_bytes, size_t limit_bytes)
{
        BUG_ON(chunk_bytes == 0);
        *a = (struct arena){.chunk_bytes = chunk_bytes, .limit_bytes = limit_bytes};
}

static void *take(struct arena *a, size_t bytes, size_t align)
{
        if (!a->at)
                return NULL;
        size_t pad = (size_t)(-(uintptr_t)a->at & (align - 1));
        size_t left = (size_t)(a->end - a->at);

        if (pad > left || bytes > left - pad)
                return NULL;
        char *p = a->at + pad;

        a->at = p + bytes;
        return p;
}

static void enter(struct arena *a, struct arena_chunk *c)
{
        a->at = c ? c->data : NULL;
        a->end = c ? c->data + c->len : NULL;
}

/* A chunk in which bytes fit at any alignment up to align. */
static bool grow(struct arena *a, size_t bytes, size_t align)
{
        size_t len, whole, held;

        if (a->fixed || a->chunk_bytes == 0 || !size_add(bytes, align, &len))
                return false;
        if (len < a->chunk_bytes)
                len = a->chunk_bytes;
        if (!size_add(len, sizeof(struct arena_chunk), &whole) || !size_add(a->held_bytes, len, &held))
                return false;
        if (a->limit_bytes && held > a->limit_bytes)
                return false;
        struct arena_chunk *c = malloc(whole);

        if (!c)
                return false;
        c->older = a->chunks;
        c->len = len;
        a->chunks = c;
        a->held_bytes = held;
        enter(a, c);
        return true;
}

void *arena_alloc(struct arena *a, size_t bytes, size_t align)
{
        BUG_ON(align == 0 || (align & (align - 1)));
        void *p = take(a, bytes, align);

        if (!p && grow(a, bytes, align))
                p = take(a, bytes, align);
        return p;
}

void *arena_array(struct arena *a, size_t n, size_t size)
{
        size_t bytes;

        if (!size_mul(n, size, &bytes))
                return NULL;
        void *p = arena_alloc(a, bytes, alignof(max_align_t));

        if (p)
                memset(p, 0, bytes);
        return p;
}

char *arena_strndup(struct arena *a, const char *s, size_t len)
{
        size_t bytes;
        char *p = size_add(len, 1, &bytes) ? arena_alloc(a, bytes, 1) : NULL;

        if (p) {
                memcpy(p, s, len);
                p[len] = '\0';
        }
        return p;
}

char *arena_strdup(struct arena *a, const char *s)
{
        return arena_strndup(a, s, strlen(s));
}

/* Frees newest first, down to `keep`. */
static void drop_chunks(struct arena *a, const struct arena_chunk *keep)
{
        while (a->chunks != keep) {
                struct arena_chunk *c = a->chunks;

                a->chunks = c->older;
                a->held_bytes -= c->len;
                free(c);
        }
}

void arena_reset(struct arena *a)
{
        struct arena_chunk *oldest = a->chunks;

        if (a->fixed) {
                a->at = a->fixed;
                return;
        }
        while (oldest && oldest->older)
                oldest = oldest->older;
        drop_chunks(a, oldest);
        enter(a, a->chunks);
}

void arena_free(struct arena *a)
{
        if (a->fixed) {
                a->at = a->fixed;
                return;
        }
        drop_chunks(a, NULL);
        enter(a, NULL);
}
