/*
 * External baselines: a row whose work another program does (docs/external.md). It is told what to prepare, is checked
 * along the reference's tokens like every other row, and times its requests itself, from host buffer to host buffer.
 */
#ifndef DJINN_CLIENT_EXTERNAL_H
#define DJINN_CLIENT_EXTERNAL_H

#include "child.h"
#include "exec.h"
#include "same_job.h"
#include "workload.h"

#define EXTERNAL_PROTOCOL "djinnbench.external/1"

struct external_opts {
        struct child_opts child;
        uint64_t run_ns;     /* longest wait for hello and run */
        uint64_t prepare_ns; /* for prepare and check; 0: ten minutes */
};

struct external_info { /* as it said of itself, made printable */
        char name[64], version[64], device[128];
        int64_t threads;
};

struct external;

/*
 * Starts the program, greets it and lets it prepare this workload, which must outlive it. 0; -ENOTSUP: it answered that
 * it cannot, err_text() is its reason; any other -errno with a sentence: it did not start, or it broke the protocol.
 */
int external_open(const struct external_opts *opts, const struct workload *w, uint64_t seed, struct external **out);
/* Says bye, then ends it. NULL is allowed. */
void external_close(struct external *x);
const struct external_info *external_info(const struct external *x);
bool external_alive(const struct external *x);

/* One turn along d->forced: the logits of every step come back (feed-forward: the output). 0, or -errno with a
 * sentence; then the program has been killed. */
int external_check(struct external *x, uint32_t turn, const struct exec_data *d);
/* One request. *latency_ns is what the program says; it is above 0 and at most the time that the answer took. */
int external_run(struct external *x, uint32_t turn, uint32_t block, const struct exec_data *d, uint64_t *latency_ns);

/* Of the last external_run: tokens [steps][batch], logits [batch][vocab] where there are no new tokens, or the output;
 * valid until the next request. */
const void *external_result(const struct external *x, size_t *len);

/* Holds the last answer against the reference. After external_run that is of use in block 0 only, whose conversation is
 * the reference's: its tokens must be the same up to the first near-tie that the check pass has found. */
void external_judge(const struct external *x, const struct reference *ref, uint32_t turn, struct check_result *c);

#endif
