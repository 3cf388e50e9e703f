/*
 * Ring of fixed-size elements between one producer thread and one consumer thread. Lock-free, wait-free, no system
 * calls. Indices only grow; each side keeps a private copy of the other's index and reads the shared one only when the
 * copy says full or empty, so that in the steady state the cache line of an index moves once per batch, not once per
 * element.
 *
 * For threads of one process that trust one another. Memory shared with a peer that may lie needs its indices checked
 * on every read, which this does not do.
 */
#ifndef DJINN_BASE_RING_H
#define DJINN_BASE_RING_H

#include <stdalign.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "check.h"

struct ring {
        /* Written once, by ring_init. */
        alignas(CACHE_LINE) unsigned char *slots;
        size_t mask, elem_bytes;
        /* Written by the producer only. */
        alignas(CACHE_LINE) _Atomic uint64_t tail;
        uint64_t head_seen;
        /* Written by the consumer only. */
        alignas(CACHE_LINE) _Atomic uint64_t head;
        uint64_t tail_seen;
};

/* Over capacity*elem_bytes bytes at slots, owned by the caller; capacity is a power of two, all of it is usable.
 * Before either thread starts. */
static inline void ring_init(struct ring *r, void *slots, size_t capacity, size_t elem_bytes)
{
        BUG_ON(capacity == 0 || (capacity & (capacity - 1)) || elem_bytes == 0);
        r->slots = (unsigned char *)slots;
        r->mask = capacity - 1;
        r->elem_bytes = elem_bytes;
        atomic_init(&r->tail, 0);
        atomic_init(&r->head, 0);
        r->head_seen = 0;
        r->tail_seen = 0;
}

/* Producer: the slot to fill next, or NULL when full. Filling it is private until ring_publish. */
static inline void *ring_claim(struct ring *r)
{
        uint64_t tail = atomic_load_explicit(&r->tail, memory_order_relaxed);

        if (tail - r->head_seen > r->mask) {
                /* Acquire: the consumer's reads of the slot happen before we overwrite it. */
                r->head_seen = atomic_load_explicit(&r->head, memory_order_acquire);
                if (tail - r->head_seen > r->mask)
                        return NULL;
        }
        return r->slots + (tail & r->mask) * r->elem_bytes;
}

static inline void ring_publish(struct ring *r)
{
        uint64_t tail = atomic_load_explicit(&r->tail, memory_order_relaxed);

        /* Release: the element is complete before the consumer sees it. */
        atomic_store_explicit(&r->tail, tail + 1, memory_order_release);
}

/* Consumer: the oldest element, or NULL when empty. It stays the consumer's until ring_release. */
static inline void *ring_front(struct ring *r)
{
        uint64_t head = atomic_load_explicit(&r->head, memory_order_relaxed);

        if (head == r->tail_seen) {
                r->tail_seen = atomic_load_explicit(&r->tail, memory_order_acquire);
                if (head == r->tail_seen)
                        return NULL;
        }
        return r->slots + (head & r->mask) * r->elem_bytes;
}

static inline void ring_release(struct ring *r)
{
        uint64_t head = atomic_load_explicit(&r->head, memory_order_relaxed);

        atomic_store_explicit(&r->head, head + 1, memory_order_release);
}

/* Copies elem_bytes bytes in or out; false when full or empty. */
static inline bool ring_push(struct ring *r, const void *elem)
{
        void *slot = ring_claim(r);

        if (!slot)
                return false;
        memcpy(slot, elem, r->elem_bytes);
        ring_publish(r);
        return true;
}

static inline bool ring_pop(struct ring *r, void *elem)
{
        const void *slot = ring_front(r);

        if (!slot)
                return false;
        memcpy(elem, slot, r->elem_bytes);
        ring_release(r);
        return true;
}

/* A ring of pointers: ring_init(r, slots, capacity, sizeof(void *)). NULL when empty, so NULL cannot be pushed. */
static inline bool ring_push_ptr(struct ring *r, void *p)
{
        BUG_ON(!p);
        void **slot = (void **)ring_claim(r);

        if (!slot)
                return false;
        *slot = p;
        ring_publish(r);
        return true;
}

static inline void *ring_pop_ptr(struct ring *r)
{
        void **slot = (void **)ring_front(r);
        void *p = NULL;

        if (slot) {
                p = *slot;
                ring_release(r);
        }
        return p;
}

/* How many elements are in it: exact for either thread as a bound (the producer sees at least so few free slots, the
 * consumer at least so many elements as are there), approximate for anybody else. */
static inline size_t ring_count(const struct ring *r)
{
        uint64_t head = atomic_load_explicit(&r->head, memory_order_acquire);
        uint64_t tail = atomic_load_explicit(&r->tail, memory_order_acquire);

        return (size_t)(tail - head);
}

#endif
