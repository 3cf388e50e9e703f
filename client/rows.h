/* What a sweep knows of one row, shared by its measuring (sweep.c), its arithmetic and its JSON (result.c). */
#ifndef DJINN_CLIENT_ROWS_H
#define DJINN_CLIENT_ROWS_H

#include "exec.h"
#include "external.h"
#include "same_job.h"
#include "stats.h"
#include "sweep.h"

enum verdict { VERDICT_VALID, VERDICT_INVALID, VERDICT_UNSTEADY, VERDICT_FEW, VERDICT_SKIPPED };
extern const char *const verdict_names[];

struct sample {
        uint32_t block, launch, turn;
        bool digest_ok;
        struct exec_sample s;
};

struct net_sample {
        uint32_t block, turn;
        uint64_t ns;
};

struct wire_count { /* sums over the timed requests of a row, both directions */
        uint64_t up_messages, up_msg_bytes, up_bulk_bytes, up_header_bytes;
        uint64_t down_messages, down_msg_bytes, down_bulk_bytes, down_header_bytes;
        uint64_t client_copied, server_copied;
};

struct row_clock {                 /* of the server's against ours, over the blocks; zeros where they are one */
        int64_t first_ns, last_ns; /* offset */
        uint64_t error_ns;         /* the worst bound */
        bool known;
};

struct row_mark { /* what a block that breaks must not have added to */
        struct wire_count wire;
        uint64_t client_cpu_ns, server_cpu_ns;
        size_t digest_errors;
        struct row_clock clock;
};

struct row {
        const struct exp_baseline *b;
        char name[80];         /* the baseline's; in a self-test a twin has "#2" behind it */
        const char *transport; /* "local" for the native row */
        size_t link;           /* index of the connection */
        int twin_of;           /* self-test: the row that this one repeats; -1 */
        struct remote *r;
        const struct graph *g;
        struct remote_model *m;
        struct plan *plans; /* per turn */
        struct exec *execs;
        struct external *external; /* instead of the four above */
        double wire_floor_ns;      /* NaN: not measured */
        const char *no_wire_floor; /* why not; NULL: it was, or there is no wire */

        struct sample *samples;
        size_t nsamples, cap;
        struct net_sample *nets;
        size_t nnets, nets_cap;
        struct digest *digests; /* per block: of all turns' results of the untimed pass */
        struct wire_count wire;
        size_t resumed_samples; /* of samples: from an earlier launch, whose framing was not kept */
        uint64_t client_cpu_ns, server_cpu_ns, client_rss_bytes, server_rss_bytes;
        uint64_t setup_ns, cold_start_ns, warm_requests;
        bool steady;
        struct check_result check;
        size_t digest_errors;
        struct row_clock clock;
        struct row_mark mark; /* as it was when the block began */
        enum verdict verdict;
        char reason[320];
};

struct measured { /* a workload's whole measurement */
        const struct sweep_opts *opts;
        const struct workload *w; /* NULL: all rows are skipped */
        const struct workload_spec *spec;
        const struct reference *ref;
        struct row *rows;
        size_t nrows;
        uint32_t turns;
        uint32_t blocks;  /* finished */
        uint32_t resumed; /* of them, taken from an earlier launch's file */
        uint32_t *launch; /* per block: which start of both ends measured it, from 0 */
        int32_t **order;  /* per block: row index, or -1 - index for a calibration, in order of time */
        size_t *order_len;
        struct msg_auth_reply server_info;
        bool have_server, complete;
        int64_t clock_offset_ns; /* when the connection was made */
        uint64_t clock_error_ns;
        double profile_cost_us; /* the clock readings of one call that only the leaves need */
};

static inline bool row_is_native(const struct row *r)
{
        return r->b->def && r->b->sw.buffers == SW_IN_PROCESS;
}

static inline bool row_is_external(const struct row *r)
{
        return r->b->def && r->b->def->external;
}

/* Its requests cross a wire of ours. */
static inline bool row_is_remote(const struct row *r)
{
        return !row_is_native(r) && !row_is_external(r);
}

/* ---- arithmetic (summary.c) ---- */

enum quantity { Q_LATENCY, Q_EXECUTION, Q_NETWORK, Q_C2S_S2C };

/* Per finished block: the mean over turns of the median over the block's requests, in ns. NaN where the block has none. */
void row_block_values(const struct measured *me, const struct row *r, enum quantity q, double *out);

struct decomposition {
        struct estimate latency, native, delta, network, extra_execution, framework, wire_floor, network_difference;
        bool comparable; /* a native row is there */
};
void row_decompose(const struct measured *me, const struct row *r, struct decomposition *out);
/* Means over the interquartile set of the row's requests by latency, ns: leaves[], residual, server_residual, latency. */
struct breakdown {
        double leaf[LEAF_COUNT], residual, server_residual, latency, duration, executor, cleanup, first_token;
        size_t n;
};
void row_breakdown(const struct measured *me, const struct row *r, struct breakdown *out);
/* Values of two rows in the blocks that both have, and those blocks' launches; returns how many. Room for me->blocks. */
size_t rows_paired(const struct measured *me, const struct row *a, const struct row *b, enum quantity q, double *va,
                   double *vb, uint32_t *launch);
struct residual { /* medians over the requests, and the limit that makes a row INVALID; ns */
        double client, server, limit, share_over;
};
struct residual row_residual(const struct measured *me, const struct row *r);
/* The reference row that r may be held against: not INVALID, same device, threads and weights; NULL: none. */
const struct row *measured_native(const struct measured *me, const struct row *r);
/* Likewise the row of this baseline over r's transport. External rows enter no derived metric. */
const struct row *measured_find(const struct measured *me, const struct row *r, const char *baseline);
/* Sum over the turns of the plans' work, per conversation. */
struct graph_cost row_work(const struct measured *me, const struct row *r, double *tokens);
void row_predicted(const struct measured *me, const struct row *r, struct plan_bytes *up, struct plan_bytes *down,
                   uint64_t *round_trips);
/* Sets verdict and reason from all that was measured, unless something went wrong before. */
void row_judge(const struct measured *me, struct row *r);

/* ---- going on (resume.c) ---- */

/* Takes the finished blocks of an earlier document of the same sweep into the rows: samples, calibrations, orders. Rows are
 * set up. 0, or -EINVAL with a sentence where the document is of another sweep. */
int resume_take(struct measured *me, const json *doc);

/* The offset was measured before and after these samples, which were taken with the first: corrects them, and keeps the worst
 * bound (summary.c). */
void row_settle_clock(struct row *r, struct sample *samples, size_t n, const struct offset *before,
                      const struct offset *after);

/* ---- wire_floor.c ---- */

/* Sets wire_floor_ns of the rows over this transport. */
void wire_floors(struct measured *me, const char *transport);

/* ---- JSON (result.c) ---- */
json *result_document(const struct measured *me);

#endif
