/*
 * perf, inside: perf.c (options, plan, both ends), perf_link.c (the connection and what is agreed on it), perf_run.c
 * (the tests, a pair of functions each), perf_print.c (tables and JSON).
 *
 * The driver measures and decides; the peer does what it is told, case by case, and answers with what it saw.
 */
#ifndef DJINN_TOOLS_PERF_INSIDE_H
#define DJINN_TOOLS_PERF_INSIDE_H

#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "hist.h"
#include "json.h"
#include "keys.h"
#include "transport.h"

#define PERF_SIZES_MAX   64
#define PERF_REPEATS_MAX 1000
#define PERF_DEPTH_MAX   4096
#define PERF_REGION_MAX  ((uint64_t)1 << 30)
#define PERF_SLOTS_BYTES ((uint64_t)4 << 20) /* a window of transfers is spread over so much memory at most */
#define PERF_STALL_NS    (10 * NS_PER_S)     /* nothing moves for so long: the run has failed */

enum perf_test { PERF_LAT, PERF_BW, PERF_RATE, PERF_TESTS };
enum perf_op { PERF_AUTO, PERF_SEND, PERF_WRITE, PERF_WRITE_IMM, PERF_READ, PERF_OPS };

extern const char *const perf_test_names[]; /* NULL-terminated, as the enums */
extern const char *const perf_op_names[];

/* ---- what the ends tell one another: fixed size, little endian ---- */

enum perf_ctl_kind {
        PERF_HELLO = 1,
        PERF_WELCOME,
        PERF_AUTH,
        PERF_AUTHED,
        PERF_CASE,
        PERF_READY,
        PERF_DONE,
        PERF_BYE,
        PERF_REFUSED
};

enum perf_field {
        /* the configuration, on which both must agree */
        PF_TEST,
        PF_OP,
        PF_SIZES,
        PF_DEPTH,
        PF_DURATION,
        PF_ITERS,
        PF_REPEATS,
        PF_VERIFY,
        PF_CONFIG,             /* number of those before */
        PF_REGION = PF_CONFIG, /* bytes that each end opens to the other */
        /* one case */
        PF_SIZE,
        PF_N,
        PF_WINDOW,
        PF_SLOTS,
        PF_SEED,
        /* what the peer saw */
        PF_SEEN,
        PF_WRONG,
        PF_CPU_NS,
        PF_COPIED,
        PF_COUNT
};

struct perf_ctl {
        enum perf_ctl_kind kind;
        uint64_t f[PF_COUNT];
        uint8_t nonce[NONCE_BYTES], proof[PROOF_BYTES];
        struct tp_key key;
        char text[160];
};

/* ---- options ---- */

struct perf_opts {
        int op;
        int64_t depth, iters, repeats, warmup, wait_s;
        uint64_t duration_ns;
        const char *transport, *sizes_text, *cpus, *json, *listen, *connect, *key_file;
        bool raw, verify, once, insecure;
        /* worked out from those and from the words in front of them */
        int test;
        uint64_t sizes[PERF_SIZES_MAX];
        size_t n_sizes;
        int cpu_driver, cpu_peer; /* -1: not pinned */
        bool one_core;
        struct auth_key key;
        uint64_t config[PF_CONFIG];
        uint32_t config_given; /* bit i: field i was on the command line */
};

/* Set by SIGINT and SIGTERM: whatever waits or measures, at either end, comes back with -EINTR. */
extern volatile sig_atomic_t perf_stopped;

/* ---- perf_link.c ---- */

struct perf_link {
        struct tp_ctx *ctx;
        struct tp_ep *ep;
        struct tp_attr attr;
        struct tp_mem *tx_mem, *rx_mem;
        struct tp_rmem *remote;
        uint8_t *tx, *rx;
        uint64_t region;
        unsigned outstanding; /* posts without their completion */
        int failed;           /* -errno once the connection is of no use; the sentence is in why */
        char why[256];
        struct tp_event *queue; /* messages that came while something else was waited for */
        unsigned queue_at, queue_n;
        unsigned idle; /* polls in a row that brought nothing */
        uint64_t idle_since;
        const char *phase; /* for the sentence when nothing comes */
        uint64_t cookie;
};

/* Polls once: completions are counted, messages queued. Number of events, or -errno with a sentence. */
int perf_poll(struct perf_link *l);
/* The next message or immediate; its loan is the caller's to release (perf_release). -errno with a sentence. */
int perf_next(struct perf_link *l, struct tp_event *ev);
/* Likewise if one is there already: 1, 0, -errno. */
int perf_try(struct perf_link *l, struct tp_event *ev);
void perf_release(struct perf_link *l, const struct tp_event *ev);
/* Waits until at most so many posts are outstanding. */
int perf_drain(struct perf_link *l, unsigned most);
/* Posts, polling as long as the transport is full. */
int perf_send(struct perf_link *l, const void *buf, size_t len, unsigned flags);
int perf_write(struct perf_link *l, const void *src, size_t len, uint64_t roff, unsigned flags);
int perf_write_imm(struct perf_link *l, const void *src, size_t len, uint64_t roff, uint32_t imm);
int perf_read(struct perf_link *l, void *dst, size_t len, uint64_t roff);

int perf_tell(struct perf_link *l, const struct perf_ctl *c);
/* Waits for a control message of this kind. A refusal by the peer is -EPERM with the peer's sentence. patient: sleeps,
 * without a deadline. */
int perf_hear(struct perf_link *l, enum perf_ctl_kind kind, bool patient, struct perf_ctl *c);

int perf_connect(struct perf_link *l, const struct perf_opts *o, const char *url);
/* Takes one driver and agrees with it. -EPERM: it was refused. */
int perf_accept(struct perf_link *l, const struct perf_opts *o, struct tp_listener *tl);
/* Ends the connection and frees what it had; the context stays. */
void perf_unlink(struct perf_link *l);

/* ---- perf_run.c ---- */

struct perf_row {
        enum perf_test test;
        enum perf_op op;
        bool raw;
        uint64_t size, iterations, wrong, bytes_copied;
        uint64_t bytes, total_ns; /* bw, rate: of all repeats */
        uint64_t cpu_local_ns, cpu_peer_ns;
        struct hist hist;                   /* lat: half round trips, ns */
        double replicate[PERF_REPEATS_MAX]; /* lat: median in ns; bw, rate: messages per second */
        size_t replicates;
        unsigned slots, window;
};

/* One repeat of one row, over the link. */
int perf_run_case(struct perf_link *l, const struct perf_opts *o, struct perf_row *row, uint64_t seed);
struct raw_pair;
/* Likewise, the medium itself; src: at least row->size bytes. */
int perf_run_raw(struct raw_pair *raw, const struct perf_opts *o, const uint8_t *src, struct perf_row *row);
/* Bytes of memory that each end opens to the other for these options. */
uint64_t perf_region_bytes(const struct perf_opts *o);
/* What an operation left open means for messages of this size. */
enum perf_op perf_op_for(const struct perf_opts *o, const struct tp_attr *attr, uint64_t size);
/* The peer: serves cases until the driver says goodbye (0) or is lost (-errno). */
int perf_serve_cases(struct perf_link *l);

/* ---- perf_print.c ---- */

struct perf_result {
        const struct perf_opts *o;
        struct tp_attr attr;
        const char *transport, *path;
        char peer[TP_URL_MAX];
        struct perf_row **rows;
        size_t n_rows;
};

/* Table on stdout, warnings on stderr. */
void perf_print_head(const struct perf_result *r);
void perf_print_row(const struct perf_result *r, const struct perf_row *row);
void perf_print_end(const struct perf_result *r);
json *perf_json(const struct perf_result *r);

#endif
