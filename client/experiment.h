/* A sweep's configuration (SPEC 2), checked: what is to be measured, in the words of Experiment 5.1. */
#ifndef DJINN_CLIENT_EXPERIMENT_H
#define DJINN_CLIENT_EXPERIMENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "baseline.h"
#include "conf.h"
#include "workload.h"

#define EXP_TRANSPORTS_MAX 8
#define EXP_BASELINES_MAX  64
#define EXP_WORKLOADS_MAX  64
#define EXP_COMMAND_MAX    32 /* words */

struct exp_baseline {
        const char *name, *type, *notes;
        const struct conf_node *node;   /* for echoing the experiment's other keys */
        const struct baseline_def *def; /* NULL: skipped */
        const char *skip;               /* why */
        struct switches sw;             /* the preset, with `semantics` laid over it */
        bool semantic_aware;
        const char *command[EXP_COMMAND_MAX + 1]; /* type external: argv, ends with NULL */
};

struct experiment {
        struct conf_doc *doc; /* owns all strings */
        const char *config_path;
        const char *device, *tag, *result_dir, *server_address;
        enum op_dtype dtype;
        int64_t runs; /* blocks */
        int64_t warmup_runs, requests_per_block, threads;
        uint64_t seed;
        const char *reference_baseline, *blind_baseline, *target_baseline;
        const char *transports[EXP_TRANSPORTS_MAX];
        size_t ntransports;
        struct exp_baseline baselines[EXP_BASELINES_MAX];
        size_t nbaselines;
        struct workload_spec workloads[EXP_WORKLOADS_MAX];
        size_t nworkloads;
};

/* 0, or -EINVAL / -errno with "file:line:col: ..."; nothing has been touched then. */
int experiment_load(const char *path, struct experiment *out);
void experiment_free(struct experiment *e);

/* Is name among the n of `only`? With n 0 everything is wanted. */
bool exp_wanted(const char *name, const char *const *only, size_t n);

/* Legality of a set of switches: 0 or -EINVAL with a sentence. */
int switches_check(const struct switches *sw);

#endif
