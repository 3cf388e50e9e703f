/*
 * Injury: how the instrument is tested (SPEC 5, last paragraph). DJINN_INJURE, read once at start-up by both ends,
 * is a comma-separated list of
 *   delay:<leaf>=<us>      a spin of that many µs inside that leaf, in every request (leaf as in SPEC 5, without _ms)
 *   payload=<bytes>        so many extra bytes written by the client with every request
 *   drop_state             the server clears state tensors before every call and between its iterations
 *   server_clock=<ppm>     the stamps that the server sends are those of a clock that has run so much faster since boot
 *   trim_input             the client sends only the second half of the input ids of a prompt
 * Every row measured with it says so and publishes as INVALID unless the tests ask otherwise (DJINN_INJURE_KEEP=1).
 * Cost when unused: one predictable branch on a bool.
 */
#ifndef DJINN_BASE_INJURE_H
#define DJINN_BASE_INJURE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum leaf {
        LEAF_CLIENT_SERIALIZE,
        LEAF_NETWORK_C2S,
        LEAF_SERVER_QUEUE,
        LEAF_SERVER_PLAN,
        LEAF_SERVER_PLACEMENT,
        LEAF_SERVER_LAUNCH,
        LEAF_SERVER_EXECUTION,
        LEAF_SERVER_SKELETONIZATION,
        LEAF_NETWORK_S2C,
        LEAF_CLIENT_DESERIALIZE,
        LEAF_CLIENT_STEP,
        LEAF_COUNT
};

/* JSON key of a leaf: "client_serialize_ms", "client_network_c2s_ms", "server_queue_latency_ms", ... */
extern const char *const leaf_keys[LEAF_COUNT];

struct injury {
        bool active;
        bool drop_state, trim_input;
        uint64_t delay_ns[LEAF_COUNT];
        uint64_t payload_bytes;
        uint64_t server_clock_ppm;
};

extern struct injury injury;

/* Parses DJINN_INJURE; -EINVAL with a sentence on nonsense. */
int injure_init(void);
void injure_spin(uint64_t ns);

static inline void injure(enum leaf leaf)
{
        if (__builtin_expect(injury.active, 0) && injury.delay_ns[leaf])
                injure_spin(injury.delay_ns[leaf]);
}

/* A time of ours as the injured server's clock shows it. */
uint64_t injure_clock(uint64_t ns);

#endif
