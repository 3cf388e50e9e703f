/*
 * The medium itself: the same message pattern by the fewest instructions that the medium allows, between the same number
 * of processes, with the same slots and depth. What a transport costs beyond this is its own doing. Used by `perf --raw`
 * and for the column wire_floor_ms.
 *   shm: one writer and one reader per direction over bare cache lines of a shared mapping;
 *   tcp: bare non-blocking sockets, TCP_NODELAY, large buffers, one send(2) and as many recv(2) as it takes;
 *   rdma: one bare reliable queue pair, its work requests made beforehand, one completion queue.
 *
 * A measurement has two ends. They agree on what comes next (struct raw_order) by means of their own, never on the wire
 * that is measured, so that what travels is exactly the payload; then one drives and the other serves.
 *
 *      one end                                 the other
 *      raw_offer -> offer        ---------->   raw_answer -> answer
 *      raw_settle(answer)        <----------
 *      raw_serve(order)                        raw_drive(order)        in any order; each waits for the other
 *
 * raw_open does all that with a child process of its own. Errors: -errno with a sentence; -ECONNRESET when the other end
 * died, -ETIMEDOUT when nothing moved for stall_ns.
 */
#ifndef DJINN_TRANSPORT_RAW_H
#define DJINN_TRANSPORT_RAW_H

#include <stddef.h>
#include <stdint.h>

#include "hist.h"

enum raw_kind {
        RAW_SEND,  /* messages (rdma: SEND into posted receives; elsewhere the same as RAW_WRITE) */
        RAW_WRITE, /* rdma: WRITE, seen by polling the last byte (exchange) or by one SEND at the end (stream) */
        RAW_READ   /* rdma only: the driver reads; the other end does nothing */
};

enum raw_shape {
        RAW_EXCHANGE, /* up bytes there, then down bytes back, n times, one after the other */
        RAW_STREAM    /* n messages of up bytes, at most depth unconfirmed; the end is the other end's confirmation */
};

struct raw_opts {
        const char *url; /* a scheme ("shm", "tcp", "rdma") or a URL whose address and parameters count */
        enum raw_kind kind;
        size_t max_bytes;  /* the largest message either way */
        unsigned depth;    /* the most messages of a stream in flight, each in a slot of its own */
        int cpu_peer;      /* raw_open: core to pin the child to, -1 none */
        uint64_t stall_ns; /* how long nothing may move; 0: 10 s */
};

struct raw_order {
        enum raw_shape shape;
        size_t up, down;
        uint64_t n;
        unsigned depth;
        /* A stream walks through so many slots of memory at both ends; 0: depth. Where a slot is its own flag (shm) no more
         * messages than slots are in flight. */
        unsigned slots;
        size_t src_stride; /* bytes from one slot of src to the next; 0: the same bytes again and again */
};

#define RAW_BLOB_BYTES 160
struct raw_blob { /* opaque; little endian inside */
        uint8_t bytes[RAW_BLOB_BYTES];
};

struct raw_end;

/* NULL: can be measured here; else the reason why not. */
const char *raw_unavailable(const char *url);

int raw_offer(const struct raw_opts *o, struct raw_blob *offer, struct raw_end **out);
int raw_answer(const struct raw_opts *o, const struct raw_blob *offer, struct raw_blob *answer, struct raw_end **out);
int raw_settle(struct raw_end *e, const struct raw_blob *answer);
/* The end that serves. Returns when the order is done. */
int raw_serve(struct raw_end *e, const struct raw_order *order);
/* The end that drives. src: at least up bytes, and of a stream as many slots as the order says. dst: where what comes back ends up, NULL: it stays
 * where it arrives. round_trips (may be NULL): gets each exchange's time, or each read's; total_ns: the whole. */
int raw_drive(struct raw_end *e, const struct raw_order *order, const void *src, void *dst, struct hist *round_trips,
              uint64_t *total_ns);
void raw_free(struct raw_end *e);

/* Both ends: this process drives, a child serves. */
struct raw_pair;
int raw_open(const struct raw_opts *o, struct raw_pair **out);
int raw_run(struct raw_pair *p, const struct raw_order *order, const void *src, void *dst, struct hist *round_trips,
            uint64_t *total_ns);
void raw_close(struct raw_pair *p);

#endif
