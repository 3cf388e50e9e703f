/*
 * One connection to a server: one function per message of the protocol. Set-up calls block until a deadline; the hot
 * path (remote_run and what it is made of) neither allocates nor makes a system call of its own.
 */
#ifndef DJINN_CLIENT_REMOTE_H
#define DJINN_CLIENT_REMOTE_H

#include <signal.h>
#include <stdbool.h>

#include "clock.h"
#include "digest.h"
#include "keys.h"
#include "offset.h"
#include "plan.h"
#include "protocol.h"
#include "transport.h"

struct remote_opts {
        struct auth_key key;
        bool insecure;
        uint64_t timeout_ns; /* of each set-up message, and silence limit of a request */
};

struct remote {
        struct tp_ctx *ctx;
        struct tp_ep *ep;
        struct tp_attr attr;
        struct remote_opts opts;
        char url[TP_URL_MAX];
        struct msg_auth_reply server; /* what it said of itself */
        bool same_kernel;             /* both sides say so */
        bool same_clock;              /* and nothing speaks against it: the server's stamps need no correction */
        int64_t offset_ns;            /* server clock - client clock, as last measured */
        uint64_t clock_error_ns;      /* bound, then */
        uint64_t clock_best_ns;       /* the least that it ever was */
        uint64_t next_id;
        uint64_t load_since;                   /* id of the first part of the LOAD that is going on; 0: none is */
        struct tp_mem *region, *shadow_region; /* our regions 0 and 1 */
        struct tp_rmem *staging, *shadow;      /* the server's */
        uint64_t region_len, shadow_region_len, staging_len, shadow_len;
        const volatile sig_atomic_t *stop; /* a user's interrupt ends waits; may be NULL */
        uint8_t *frame;                    /* attr.msg_max bytes for building requests */
        uint8_t *inbox;                    /* attr.msg_max bytes: the answer being looked at */
        size_t inbox_len;
        int dead; /* -errno once the connection is down */
        char why[256];
};

/* A model loaded for this connection. */
struct remote_model {
        uint32_t id;
        struct msg_loaded info;
        struct tp_rmem **tensors; /* per tensor of the graph: key to it, NULL until asked for */
        uint32_t ntensors;
        uint64_t load_ns; /* seen from here */
};

/* Connects, agrees on the version, proves the key both ways, samples the clock. */
int remote_open(const char *url, const struct remote_opts *opts, struct remote *r);
void remote_close(struct remote *r);

int remote_load(struct remote *r, const struct graph *g, enum msg_weights weights, const char *model_id, uint64_t seed,
                struct remote_model *out);
int remote_unload(struct remote *r, struct remote_model *m);
int remote_ask_tensor(struct remote *r, struct remote_model *m, uint32_t tensor);
/* Regions of ours (given once, only ever grown before measuring) and buffers of the server's, at least so long. Where
 * growing fails, what there was stays as it is; where it cannot, the connection is given up (dead). */
int remote_region(struct remote *r, uint64_t len);
int remote_shadow(struct remote *r, uint64_t up_len, uint64_t down_len);
int remote_staging(struct remote *r, uint64_t len);
int remote_stats(struct remote *r, struct msg_stats *out);
int remote_drop_state(struct remote *r, const struct remote_model *m);
/* Measures the offset by a few exchanges and sets offset_ns and clock_error_ns; *now is the same. Clocks that are one: zeros,
 * and nothing is sent. */
int remote_clock(struct remote *r, struct offset *now);

/* ---- hot path ---- */

/* Posts with -EAGAIN handled by polling; 0 when the buffer is free again or will be before the answer is. */
int remote_write(struct remote *r, const void *src, size_t len, struct tp_rmem *to, uint64_t off);
int remote_send(struct remote *r, const void *frame, size_t len);
/* Waits for the answer with this request id into r->inbox (a private copy); its opcode must be `opcode`. *arrived_ns is
 * when the transport handed it over. An ERROR answer gives its code and text. Deadline: opts.timeout_ns of silence. */
int remote_answer(struct remote *r, enum msg_opcode opcode, uint64_t request_id, uint64_t *arrived_ns);

#endif
