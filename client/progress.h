/* What is being done, for the person who waits: one line on a terminal, a line per step elsewhere. Never while timing. */
#ifndef DJINN_CLIENT_PROGRESS_H
#define DJINN_CLIENT_PROGRESS_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

struct progress {
        FILE *to;  /* NULL: silent */
        bool line; /* a terminal */
        uint64_t start_ns, shown_ns;
        size_t done, total; /* steps */
};

void progress_start(struct progress *p, size_t total);
/* A phase without a count: "bert_latency_bound: check pass". */
void progress_say(struct progress *p, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* One of total done; shown at most ten times a second, with the time left. */
void progress_step(struct progress *p, const char *what);
void progress_end(struct progress *p);

#endif
