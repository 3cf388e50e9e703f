/* Asks who listens at the other end of a URL, without starting a measurement there. */
#ifndef DJINN_TOOLS_PERF_PROBE_H
#define DJINN_TOOLS_PERF_PROBE_H

#include <stdbool.h>
#include <stdint.h>

#include "keys.h"
#include "transport.h"

struct perf_peer_info {
        char version[32], commit[48]; /* of the other end's build */
        uint32_t ctl_version;         /* of perf's control messages there */
        bool needs_key;               /* the other end was started with a key */
        bool key_agrees;              /* both hold the same one: mutual proof */
        bool busy;                    /* it serves another driver just now */
        struct tp_attr attr;          /* of the connection */
};

/*
 * 0: a perf listens there, and info is filled in, also when the keys differ or it is busy. -EPROTO: something else
 * answers, or a perf of another version; -ETIMEDOUT, -ECONNREFUSED, ...: nobody does; with a sentence. ctx is the
 * caller's. The listener's --once is not used up.
 */
int perf_probe(struct tp_ctx *ctx, const char *url, const struct auth_key *key, uint64_t deadline_ns,
               struct perf_peer_info *info);

#endif
