/*
 * What backends share and nobody else sees: keys that show tampering, the reach into registered memory, and bounds.
 */
#ifndef DJINN_TRANSPORT_INSIDE_H
#define DJINN_TRANSPORT_INSIDE_H

#include <errno.h>
#include <string.h>

#include "prng.h"
#include "transport.h"

/*
 * The inside of a tp_key: seven little-endian words and a seal over them under the connection's secret. The seal finds
 * keys that were damaged, invented, or made for another connection; the right of access itself is what the backend
 * checks (a descriptor that was handed over, a table of regions), because a peer that knows the secret can seal
 * anything.
 */
struct tpi_key {
        uint64_t magic;    /* the backend's */
        uint64_t side;     /* 0 connector, 1 acceptor: whose memory it is */
        uint64_t slot;     /* index in that side's table of regions */
        uint64_t epoch;    /* the slot's life; another one is another region */
        uint64_t off, len; /* the part of the region that the key opens, bytes */
        uint64_t serial;   /* makes each key differ */
};

void tpi_key_seal(struct tp_key *out, const struct tpi_key *k, uint64_t secret);
/* 0 or -EACCES (with a sentence): the seal, the magic or the side is wrong. */
int tpi_key_open(const struct tp_key *key, uint64_t secret, uint64_t magic, uint64_t side, struct tpi_key *out);

/* A number that nobody can guess, for secrets and serials; set-up only. */
uint64_t tpi_random(void);

/* [off, off+len) lies inside [0, size). */
static inline bool tpi_inside(uint64_t off, uint64_t len, uint64_t size)
{
        return off <= size && len <= size - off;
}

/* Same for a pointer into a registered region; a NULL mem allows everything. */
static inline bool tpi_in_mem(const struct tp_mem *mem, const void *p, size_t len)
{
        return !mem || tpi_inside((uint64_t)((uintptr_t)p - (uintptr_t)mem->region.addr), len, mem->region.len);
}

/* Copy host bytes into or out of a registered region of any kind; waits for a device's copy. 0 or -errno. */
int tpi_region_put(const struct mem_region *r, size_t off, const void *src, size_t len);
int tpi_region_get(const struct mem_region *r, size_t off, void *dst, size_t len);

/* Parses url and insists on this scheme ("tcp", also as "fault+tcp" never: fault.c strips itself). */
int tpi_url_expect(const char *url, const char *scheme, struct tp_url *out);

/* Lists by prev and next, the head at the front. */
#define LIST_ADD(head, x)                   \
        do {                                \
                (x)->prev = NULL;           \
                (x)->next = (head);         \
                if (head)                   \
                        (head)->prev = (x); \
                (head) = (x);               \
        } while (0)

#define LIST_DEL(head, x)                            \
        do {                                         \
                if ((x)->prev)                       \
                        (x)->prev->next = (x)->next; \
                else                                 \
                        (head) = (x)->next;          \
                if ((x)->next)                       \
                        (x)->next->prev = (x)->prev; \
        } while (0)

#endif
