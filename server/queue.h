/*
 * Which request is next: four classes, strict, first in first out inside a class; and ageing, so that a lower class is
 * late but never starved: for every QUEUE_AGE_NS that a request has waited it counts as one class higher. Intrusive, no
 * allocation. Pure: the time comes in as an argument.
 */
#ifndef DJINN_SERVER_QUEUE_H
#define DJINN_SERVER_QUEUE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define QUEUE_CLASSES 4u
#define QUEUE_AGE_NS  100000000ull

struct queue_item {
        struct queue_item *next;
        uint32_t run_class; /* higher goes first */
        uint64_t arrival_ns;
};

struct queue {
        struct queue_item *first[QUEUE_CLASSES], *last[QUEUE_CLASSES];
        uint32_t count;
};

/* item->arrival_ns is set; run_class below QUEUE_CLASSES. One that was taken and could not go on gets its old place. */
void queue_put(struct queue *q, struct queue_item *item, uint32_t run_class);
/* The next one for which ready() holds, taken out; NULL: none. An item that is not ready does not hold up those behind
 * it. */
struct queue_item *queue_take(struct queue *q, uint64_t now_ns, bool (*ready)(const struct queue_item *));
/* false: it was not in there. */
bool queue_remove(struct queue *q, const struct queue_item *item);
/* Takes out every item that pick(item, arg) says, and hands it to drop(item, arg). */
void queue_purge(struct queue *q, bool (*pick)(const struct queue_item *, void *arg),
                 void (*drop)(struct queue_item *, void *arg), void *arg);
/* Calls see(item, arg) for each, until it returns true: that item, or NULL. */
struct queue_item *queue_find(const struct queue *q, bool (*see)(const struct queue_item *, void *arg), void *arg);

#endif
