/*
 * The sweep: blocks of every baseline over every transport in random order, calibrations among them, each row proven to
 * do the same job. Needs servers that already listen; starts none.
 */
#ifndef DJINN_CLIENT_SWEEP_H
#define DJINN_CLIENT_SWEEP_H

#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>

#include "experiment.h"
#include "json.h"
#include "keys.h"

struct sweep_opts {
        const struct experiment *exp;
        const char *urls[EXP_TRANSPORTS_MAX]; /* of the server, one per exp->transports */
        struct auth_key key;
        bool insecure, require_weights, self_test, external_server;
        bool allow_external;   /* the config may start programs */
        const cpu_set_t *cpus; /* where those may run; NULL: where we may */
        const char *const *model_roots;
        size_t nmodel_roots;
        const char *const *workloads, *const *baselines; /* only these; n 0: all */
        size_t nworkloads, nbaselines;
        const char *output_dir;
        const char *resume; /* result file to go on from; NULL none */
        const volatile sig_atomic_t *stop;
        uint64_t timeout_ns;
        int cpu_peer;       /* core of the embedded server, for the wire floor's other end; -1 */
        FILE *progress;     /* NULL: none */
        bool progress_line; /* a terminal: one line that is rewritten */
        int argc;
        char **argv;
        /* Called after each workload with its document and the path it was written to. */
        void (*finished)(void *arg, const json *doc, const char *path);
        void *arg;
};

struct sweep_outcome {
        unsigned valid, invalid, skipped; /* rows; invalid: everything that is neither VALID nor SKIPPED */
        bool interrupted;
};

/* 0: ran (look at the outcome); -errno with a sentence when nothing could run (-ECONNREFUSED, -EACCES, ...). */
int sweep_run(const struct sweep_opts *opts, struct sweep_outcome *out);

/* --check: what would run, with predicted bytes, round trips and duration, on stdout; runs nothing. */
int sweep_check(const struct sweep_opts *opts, FILE *to);
/* `plan`: one workload, one baseline. */
int sweep_plan(const struct sweep_opts *opts, const char *workload, const char *baseline, FILE *to);

#endif
