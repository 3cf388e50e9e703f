/*
 * A program of the user's that answers one line of JSON with one line of JSON, on its standard input and output; its
 * standard error is ours. It runs in a process group of its own, so that Ctrl-C is for us to pass on. When it errs, and
 * when it is ended, it is killed with all that it started in its group; when this process dies, it alone.
 */
#ifndef DJINN_CLIENT_CHILD_H
#define DJINN_CLIENT_CHILD_H

#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "json.h"

#define CHILD_LINE_MAX ((size_t)256 << 20) /* bytes of an answer */

struct child_opts {                        /* all of it must outlive the child */
        const char *name;                  /* in error sentences */
        const char *const *argv;           /* ends with NULL; looked up in PATH, no shell between */
        const cpu_set_t *cpus;             /* where it may run; NULL: where this thread may */
        const volatile sig_atomic_t *stop; /* set: every wait ends with -EINTR; may be NULL */
        size_t line_max;                   /* 0: CHILD_LINE_MAX */
};

struct child;

/* 0, or -errno with a sentence (-ENOENT: there is no such program). From then on SIGPIPE is ignored in this process. */
int child_start(const struct child_opts *opts, struct child **out);

/*
 * One line each way; the caller frees *answer, which is an object. *wall_ns (may be NULL): from before the first byte
 * of the question was offered until the last of the answer was here. -errno with a sentence: -ETIMEDOUT, -EINTR, -EPIPE
 * (it ended; the sentence says how), -EPROTO (no JSON object, or something nobody asked for), -EFBIG (line too long),
 * -ENOMEM. After any of them the child has been killed and reaped.
 */
int child_ask(struct child *c, const json *question, uint64_t timeout_ns, json **answer, uint64_t *wall_ns);

/* A line that has no answer; errors as of child_ask. */
int child_tell(struct child *c, const json *message, uint64_t timeout_ns);

/* Kills and reaps what is not dead yet; child_ask refuses from then on. */
void child_kill(struct child *c);
bool child_dead(const struct child *c);

/* Closes its standard input, waits this long for it to end by itself, kills it otherwise; frees. NULL is allowed. */
void child_end(struct child *c, uint64_t patience_ns);

#endif
