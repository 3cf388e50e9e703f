/*
 * A plan: the flat list of calls that a baseline's switches make of a graph and a request. Made before anything runs,
 * touches no network; it says exactly which bytes will cross, and the transport's counters must agree.
 */
#ifndef DJINN_CLIENT_PLAN_H
#define DJINN_CLIENT_PLAN_H

#include <stdio.h>

#include "baseline.h"
#include "protocol.h"
#include "workload.h"

struct plan_limits {         /* of the connection */
        size_t msg_max;      /* bytes in one message */
        size_t inline_bytes; /* inputs in one RUN */
};

struct plan_shape {       /* one request */
        uint32_t history; /* ids per sequence known to the application, the new ones included (causal) */
        uint32_t cached;  /* of them, positions whose state the server still has */
        uint32_t new_tokens;
        bool check; /* the check pass: feed given tokens, return the last logits of every step */
};

enum plan_source { SRC_IDS, SRC_CURSOR, SRC_FORCED, SRC_STATE, SRC_INPUT };

struct plan_input {
        struct run_input wire;
        uint8_t source;      /* enum plan_source */
        uint32_t from;       /* SRC_IDS: first position of the history */
        uint32_t count;      /* SRC_IDS: positions */
        uint64_t region_off; /* SRC_STATE: where the client keeps it in its region */
};

/* What the client does when the call is done. */
enum plan_after { AFTER_NOTHING, AFTER_CHOOSE };

struct plan_bytes {
        uint64_t messages, msg_bytes;  /* messages, and bytes in them */
        uint64_t bulk_ops, bulk_bytes; /* one-sided writes */
        uint64_t payload_bytes;        /* of all these bytes, tensors */
};

struct plan_call {
        struct msg_run run; /* counts and flags set */
        struct run_range ranges[3];
        struct run_feedback feedback[1];
        struct plan_input *inputs;
        struct run_output *outputs;
        int32_t cursor[2];                    /* value of SRC_CURSOR */
        uint8_t after;                        /* enum plan_after */
        bool via_staging, via_region;         /* serialized bodies that do not fit a message */
        size_t body_bytes, result_body_bytes; /* serialized */
        size_t frame_bytes, reply_bytes;      /* of the request's and the answer's message */
        uint64_t logits_off;                  /* region offset of the last logits of the (first) sequence */
        uint64_t logits_stride;               /* between sequences of a batch, bytes */
        struct plan_bytes up, down;
};

struct plan {
        const struct graph *g; /* blinded or not, as the baseline is given it */
        enum workload_driver driver;
        struct switches sw;
        struct plan_shape shape;
        struct plan_call *calls;
        size_t ncalls;
        /* The client's region: result first, then states that travel, then logits. */
        uint64_t region_bytes, state_off;
        uint64_t result_off, result_bytes; /* where the request's result lies when it is done (registered) */
        bool result_is_tokens;
        uint64_t check_off;         /* check: the last logits of all steps, one after the other */
        uint64_t staging_bytes;     /* largest body or PUT */
        struct plan_bytes up, down; /* sums */
        uint64_t round_trips;
        struct graph_cost work; /* sum over the calls */
        double tokens;          /* positions run through the body, all calls */
};

/* In the plans of one graph and one number of new tokens the result and the states lie at the same places of the region.
 * 0, or -errno with a sentence. */
int plan_make(const struct graph *g, enum workload_driver driver, const struct switches *sw,
              const struct plan_shape *shape, const struct plan_limits *limits, struct plan *out);
void plan_free(struct plan *p);

void plan_bytes_add(struct plan_bytes *sum, const struct plan_bytes *x);

/* Text for `djinnbench plan`. */
void plan_print(FILE *to, const struct plan *p);

#endif
