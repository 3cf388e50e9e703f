/* Walks a plan over a connection and times its leaves. Prepared once; a request then allocates nothing. */
#ifndef DJINN_CLIENT_EXEC_H
#define DJINN_CLIENT_EXEC_H

#include "digest.h"
#include "injure.h"
#include "plan.h"
#include "remote.h"

struct exec_data {              /* what the application has in its memory */
        const int32_t *history; /* [batch][history_cap]: shape.history ids per sequence */
        uint32_t history_cap;
        const int32_t *forced; /* check pass: [steps][batch] */
        const void *input;     /* feed-forward */
};

struct exec_sample {
        uint64_t latency_ns;
        int64_t leaf_ns[LEAF_COUNT]; /* sums over the calls */
        int64_t residual_ns, server_residual_ns;
        uint64_t server_duration_ns, executor_ns, cleanup_ns;
        uint64_t first_token_ns; /* start to the first token in our hands; 0 where not seen */
        uint64_t bytes_copied;   /* by client and server for this request, transports apart */
        uint32_t plan_hits, plan_misses, ops;
        uint32_t applied; /* RUN_* and DONE_* of the last answer */
        bool disordered;  /* stamps run backwards, or device time exceeds the wall's around it */
        uint64_t start_ns;
        uint32_t calls;
        int64_t least_up_ns, least_down_ns; /* of the calls' c2s and s2c, by the offset of that time */
};

struct exec {
        struct remote *r;
        struct remote_model *m;
        const struct plan *p;
        uint8_t **frames;  /* per call: the request's frame, inline bytes to be filled */
        uint8_t **inlines; /* per call: where its inline bytes start */
        uint64_t *hold_ns; /* per call: how long the server took the last time */
        int32_t *ids;      /* [batch][ids_cap] working history of a stepping client */
        uint32_t ids_cap;
        int32_t *tokens; /* chosen by a stepping client: [steps][batch] */
        int32_t *gather; /* ids of one call, sequence after sequence */
        uint8_t *result; /* copied-out result (serialized) */
        uint8_t *region; /* our region 0 */
        struct serial_buf body;
        struct serial_blob *blobs;
        struct serial_blob *answers; /* outputs of one serialized answer */
        unsigned nblobs;
        uint8_t *extra; /* source of the injury's payload, and of calibration writes */
        size_t extra_len;
        const uint8_t *result_at; /* of the last request */
        float *last_logits;       /* check: [steps][batch][V], filled when not NULL */
};

/* Keys for every tensor that is written one-sided, region and staging sizes, frames. */
int exec_prepare(struct exec *x, struct remote *r, struct remote_model *m, const struct plan *p);
void exec_free(struct exec *x);

/* One request. 0, or -errno with a sentence; then *s is not to be used. */
int exec_run(struct exec *x, const struct exec_data *d, struct exec_sample *s);
/* Once the offset of the server's clock during the request is known better: by how much it was further on than assumed, and
 * the bound. Moves time between c2s and s2c, and judges whether they can have been. */
void exec_settle(struct exec_sample *s, int64_t shift_ns, uint64_t error_ns);
/* The result of the last exec_run: tokens, logits or output; valid until the next. */
const void *exec_result(const struct exec *x, size_t *len);
struct digest exec_digest(const struct exec *x);

/* The same messages by the transport alone (SPEC 5, network calibration): ns without the server's waits. */
int exec_calibrate(struct exec *x, uint64_t *network_ns);

#endif
