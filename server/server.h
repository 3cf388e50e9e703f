/*
 * The server: one process, one device, one engine; one poll loop over all listeners. Generic: it runs graphs for
 * whoever holds the key, and has never heard of a model or of a baseline.
 */
#ifndef DJINN_SERVER_H
#define DJINN_SERVER_H

#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "keys.h"

struct server_opts {
        const char *const *urls; /* listeners */
        size_t nurls;
        const char *device; /* "cpu" */
        int threads;        /* of the engine; 0: device's default */
        const char *const *model_roots;
        size_t nmodel_roots;
        struct auth_key key;         /* present: every client must prove it */
        bool insecure;               /* off loopback without a key, if the client agrees */
        bool once;                   /* end when the first client has gone */
        const char *ready_file;      /* written (atomically, one URL per line) when all listeners are up; may be NULL */
        int ready_fd;                /* the same lines are written here, then it is closed; -1 none */
        volatile sig_atomic_t *stop; /* set by a signal handler, or atomically by another thread: end cleanly */
        int cpu;                     /* pin the poll loop here; -1: not */
        uint64_t memory_bytes;       /* limit per session; 0: a quarter of the host's memory */
        uint64_t
            memory_total_bytes;  /* of all sessions together; 0: half of the host's memory, or one session's limit */
        uint32_t sessions_max;   /* 0: 1100 */
        double flop_per_request; /* limit, because no operation is interrupted; 0: 1e14 */
        uint64_t spin_ns;        /* polling goes on for so long after the last activity, before sleeping; 0: 5 ms */
};

/* Serves until stopped. 0, or -errno with a sentence (nothing could be listened on, no device). */
int server_run(const struct server_opts *opts);

#endif
