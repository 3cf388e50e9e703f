/*
 * perf, inside.
 *
 *   perf.c         the command: its options, and what becomes of them
 *   perf_opts.c    options worked out and checked
 *   perf_launch.c  processes: both ends here, one end that listens, the end that drives
 *   perf_agree.c   what two ends settle before they measure: configuration, key, connections, memory
 *   perf_conns.c   the threads of an end, its connections and their memory
 *   perf_link.c    polling, posting and control messages of one thread
 *   perf_measure.c a launch of the driver: warm-up, segments, what else belongs to a row
 *   perf_case.c    a case, as the driver orders it and as the peer serves it
 *   perf_raw.c     the bare medium beside it
 *   perf_flow.c    the loops that are measured: perf_stream.c, perf_exchange.c
 *   perf_data.c    sizes, slots and words that say where they belong
 *   perf_clock.c   one-way latency and the two clocks
 *   perf_host.c    cores, NUMA, counters, the manifest of an end
 *   perf_print.c, perf_json.c, perf_warn.c   what came of it
 *
 * A launch measures one row once: both ends are started for it, agree, warm up, measure, and end. The driver measures
 * and decides; the peer does what it is told, case by case, and answers with what it saw. A case is a fixed number of
 * messages on each connection; a long measurement is many cases (segments), so that it can be stopped and reported.
 */
#ifndef DJINN_TOOLS_PERF_INSIDE_H
#define DJINN_TOOLS_PERF_INSIDE_H

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "hist.h"
#include "json.h"
#include "keys.h"
#include "prng.h"
#include "raw.h"
#include "stats.h"
#include "transport.h"

#define PERF_SIZES_MAX   64
#define PERF_REPEATS_MAX 1000
#define PERF_DEPTH_MAX   4096
#define PERF_CONNS_MAX   4096
#define PERF_THREADS_MAX 64
#define PERF_CORES_MAX   (2 * PERF_THREADS_MAX)
#define PERF_REGION_MAX  ((uint64_t)1 << 30) /* of all connections of one end, each direction */
#define PERF_SLOTS_BYTES ((uint64_t)4 << 20) /* a window of transfers is spread over so much memory at most */
#define PERF_TEXT_MAX    16384u              /* a manifest, a set of counters */

enum perf_test { PERF_LAT, PERF_BW, PERF_RATE, PERF_TESTS };
enum perf_op { PERF_AUTO, PERF_SEND, PERF_WRITE, PERF_WRITE_IMM, PERF_READ, PERF_OPS };
enum perf_arrivals { PERF_POISSON, PERF_CONSTANT };

extern const char *const perf_test_names[]; /* NULL-terminated, as the enums */
extern const char *const perf_op_names[];
extern const char *const perf_arrival_names[];

/* ---- what the ends tell one another: fixed size, little endian ---- */

enum perf_ctl_kind {
        PERF_HELLO = 1,
        PERF_WELCOME,
        PERF_AUTH,
        PERF_AUTHED,
        PERF_TEXT,     /* a piece of a text: manifest, addresses, counters */
        PERF_ATTACH,   /* the first message of every further connection */
        PERF_ATTACHED, /* the answer to it */
        PERF_TOGETHER, /* all connections are there */
        PERF_CASE,
        PERF_READY,
        PERF_DONE,
        PERF_RAW_OFFER,
        PERF_RAW_ANSWER,
        PERF_RAW_ORDER,
        PERF_RAW_DONE,
        PERF_RAW_END,
        PERF_CLOCK,
        PERF_COUNT, /* the driver asks what the peer's counters say */
        PERF_BYE,
        PERF_REFUSED,
        PERF_PROBE /* instead of HELLO: who is there? */
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
        PF_CONNECTIONS,
        PF_THREADS,
        PF_BIDIR,
        PF_RATE,
        PF_ARRIVALS,
        PF_RAW,
        PF_CONFIG, /* number of those before */
        /* what a launch needs; per connection */
        PF_TX_BYTES = PF_CONFIG, /* of the driver; the peer's where both send */
        PF_RX_BYTES,             /* that each end opens to the other */
        PF_KEYED,
        PF_STALL,
        PF_LAST, /* no launch of this driver comes after this one */
        PF_TOKEN_0,
        PF_TOKEN_1,
        PF_INDEX,
        PF_TOTAL,
        /* one case */
        PF_SIZE_LO,
        PF_SIZE_HI,
        PF_OCTAVES,
        PF_N,
        PF_WINDOW,
        PF_SLOTS,
        PF_SEED,
        PF_SHAPE,
        /* what the peer saw */
        PF_SEEN,
        PF_WRONG,
        PF_CHECKED,
        PF_CPU_NS,
        PF_COPIED,
        PF_NOW,
        PF_COUNT
};

#define PERF_BODY 2048u

struct perf_ctl {
        enum perf_ctl_kind kind;
        char why[160];
        uint64_t f[PF_COUNT];
        uint8_t nonce[NONCE_BYTES], proof[PROOF_BYTES];
        struct tp_key key;
        uint8_t body[PERF_BODY];
};

/* ---- options ---- */

struct perf_size { /* one row */
        uint64_t lo, hi;
        bool mixed; /* each message draws its own between lo and hi, log-uniformly */
        char text[40];
};

struct perf_opts {
        int op, arrivals, gpu_path;
        int64_t depth, iters, repeats, warmup, wait_s, connections, threads;
        double rate; /* arrivals per second of all connections; 0: closed loop */
        uint64_t duration_ns, stall_ns;
        const char *transport, *sizes_text, *mem, *cpus, *json, *listen, *connect, *key_file;
        bool raw, verify, once, insecure, bidirectional, forever;
        /* worked out from those and from the words in front of them */
        int test;
        struct perf_size sizes[PERF_SIZES_MAX];
        size_t n_sizes;
        int cores[PERF_CORES_MAX]; /* of --cpus; those of the other end follow where both are here */
        int n_cores;
        bool wait_given;
        struct auth_key key;
        uint64_t config[PF_CONFIG];
        uint32_t config_given; /* bit i: field i was on the command line */
};

/* Set by SIGINT and SIGTERM: whatever waits or measures, at either end, comes back with -EINTR. */
extern volatile sig_atomic_t perf_stopped;

/* ---- perf_opts.c ---- */

struct opts_parsed;
extern const struct opts_spec perf_spec;
/* -EINVAL wrong use, -ENOTSUP not here; with a sentence. */
int perf_opts_refine(struct perf_opts *o, const struct opts_parsed *p);
/* A value of the configuration in the words of the command line; it may come from the other end and be anything. */
const char *perf_config_text(int field, uint64_t value, char *buf, size_t len);
extern const char *const perf_config_names[PF_CONFIG];

/* ---- a launch ---- */

enum perf_shape { PERF_EXCHANGE, PERF_STREAM, PERF_STAMPS };

struct perf_case {
        enum perf_test test;
        enum perf_op op;
        enum perf_shape shape;
        uint64_t lo, hi;    /* bytes of a message */
        uint64_t octaves;   /* mixed sizes: log2(hi/lo) * 2^32; 0: all are lo */
        uint64_t stride, n; /* bytes from slot to slot; messages on each connection, one direction */
        uint64_t seed;
        unsigned window, slots;
        bool verify, bidir, open;
        double gap_ns; /* open loop, the driver: mean distance of arrivals on one connection */
        int arrivals;
        bool resumes; /* open loop, the driver: the times of arrival go on where the last segment's ended */
};

struct perf_worker;

struct perf_note { /* what the ends say to one another while they measure */
        uint64_t magic, kind, value, unused;
};

struct perf_conn {
        struct tp_ep *ep;
        struct perf_worker *w;
        unsigned index;
        struct tp_mem *tx_mem, *rx_mem;
        struct tp_rmem *remote;
        uint8_t *tx, *rx;
        unsigned outstanding; /* posts without their completion */
        /* of a case */
        uint64_t sent, confirmed, received, told, filled, tx_at, t0;
        bool note_due, end_due, end_seen, confirm_due, may_send, finished, touched;
        uint64_t local_ns; /* when the last of our posts was complete */
        struct perf_note *notes;
        uint64_t note_at;
        uint64_t *intended, *actual; /* open loop: of the requests in flight */
        double due_ns;
        struct prng arrivals;
};

#define PERF_NO_COOKIE UINT64_MAX /* of posts that are no data */

#define PERF_QUEUE 64u

struct perf_worker { /* one thread */
        struct perf_session *s;
        unsigned index, n_conns;
        struct tp_ctx *ctx;
        struct tp_listener *tl;
        struct perf_conn **conns;
        char url[TP_URL_MAX]; /* where the peer's thread of this index listens */
        pthread_t thread;
        bool started;
        /* waiting */
        uint64_t idle, idle_since;
        struct tp_event queue[PERF_QUEUE];
        unsigned queue_n;
        struct wire_ctl *out;
        uint64_t out_at;
        /* of a case */
        bool receives; /* data of the other end */
        unsigned unfinished, n_touched, stuck;
        struct perf_conn **touch;
        uint16_t *order;  /* slots in random order, where sizes are mixed */
        uint64_t base_ns; /* open loop: arrivals count from here */
        uint64_t begin_ns, end_ns, cpu_ns, seen, wrong, checked, copied;
        struct hist hist, uncorrected; /* whole round trips, ns */
        int rc;
        char why[512];
};

struct perf_session { /* one end, for one launch */
        const struct perf_opts *o;
        bool driver;
        const char *url; /* the driver's: what it connects to */
        const char *phase;
        uint64_t stall_ns;
        uint64_t tx_bytes, rx_bytes; /* of a connection */
        unsigned n_conns, n_workers, notes_n;
        struct perf_conn *conns;
        struct perf_worker *workers; /* [0] is the thread that talks */
        struct tp_attr attr;
        const char *path;
        uint64_t token[2];
        char peer[TP_URL_MAX];
        char *peer_text; /* manifest of the other end: JSON */
        int cores[PERF_THREADS_MAX], n_cores;
        struct perf_case c;
        struct perf_stamps {
                uint64_t *sent, *there, *back; /* the driver: when each message left, arrived and was answered */
        } stamps;
        struct raw_end *raw;
        json *counters; /* as they were when the launch began */
        bool last;
        /* threads */
        pthread_mutex_t lock;
        pthread_cond_t wake, done;
        int (*task)(struct perf_worker *);
        uint64_t generation;
        unsigned busy;
        bool ending;
        atomic_bool failed;
};

/* What a launch of the driver leaves, in memory that its parent sees, too. */
struct perf_measure {
        uint64_t iterations, bytes, total_ns, local_ns, wrong, checked, cpu_local_ns, cpu_peer_ns, copied;
        struct hist hist, uncorrected;
};

#define PERF_STAMPS_MAX 2000u

struct perf_one_way {
        bool known, same_clock;
        uint64_t n;
        double p50_ns, min_ns, max_ns, error_ns;
};

struct perf_info {
        struct tp_attr attr;
        char transport[32], path[24], peer[TP_URL_MAX];
        int cores[PERF_THREADS_MAX], n_cores;
        unsigned slots, window;
        enum perf_op op;
        uint64_t region_bytes;
        char peer_text[PERF_TEXT_MAX];
};

struct perf_launch {
        bool first, last;
        uint64_t index;
        const struct perf_size *size;
        int rc;
        bool agreed;
        char why[512];
        struct perf_info info;
        struct perf_measure ours, raw;
        struct perf_one_way one_way;
        char counters_local[PERF_TEXT_MAX], counters_peer[PERF_TEXT_MAX];
};

/* ---- perf_link.c ---- */

/* Control messages of connection c of a worker; they poll the worker's context. */
int perf_tell(struct perf_conn *c, const struct perf_ctl *m);
/* As perf_tell, without waiting until it has gone: what the peer answers is not looked at yet. */
int perf_tell_now(struct perf_conn *c, const struct perf_ctl *m);
/* Waits for a control message of this kind on this connection. A refusal by the peer is -EPERM with the peer's
 * sentence. */
int perf_hear(struct perf_conn *c, enum perf_ctl_kind kind, struct perf_ctl *m);
/* Any kind. */
int perf_hear_any(struct perf_conn *c, struct perf_ctl *m);
/* -EPROTO: not a message of this program and version. */
int perf_ctl_parse(const struct perf_worker *w, const char *peer, const void *data, size_t len, struct perf_ctl *m);
uint32_t perf_ctl_version(void);
/* Tells why, whatever version the other end has. Returns code with the sentence. */
int perf_refuse(struct perf_conn *c, int code, const char *why);
/* Closes the connection of somebody who is not served, and tells him why if that can be done without waiting. */
void perf_turn_away(struct perf_worker *w, struct tp_ep *ep, const char *why);
/* What is no printable ASCII becomes '?'. */
void perf_printable(char *text);
int perf_tell_text(struct perf_conn *c, const char *text);
/* free() it. */
int perf_hear_text(struct perf_conn *c, char **text);
/* Looks after one event that is no message. 0, or -errno with a sentence. */
int perf_take(struct perf_worker *w, const struct tp_event *ev);
int perf_drain(struct perf_conn *c);
/* The next message that came while something else was waited for. */
bool perf_kept(struct perf_worker *w, struct tp_event *ev);
/* Called when a poll brought nothing; the slow part is outside. */
int perf_idle_look(struct perf_worker *w);
static inline int perf_idle(struct perf_worker *w)
{
        return ++w->idle % 1024 ? 0 : perf_idle_look(w);
}

/* ---- perf_conns.c ---- */

int perf_session_init(struct perf_session *s, const struct perf_opts *o, bool driver);
/* Once it is known how many there are. depth: the most that one connection has in flight. */
int perf_session_share(struct perf_session *s, unsigned n_conns, unsigned n_workers, unsigned depth);
void perf_session_free(struct perf_session *s);
/* Runs a task on all threads at once, each in its own; the first failure. */
int perf_parallel(struct perf_session *s, int (*task)(struct perf_worker *));
int perf_worker_open(struct perf_worker *w, const char *url);
/* Tasks: the driver's connections; where the peer's further threads listen; the peer's connections. */
int perf_conns_make(struct perf_worker *w);
int perf_thread_listen(struct perf_worker *w);
int perf_conns_take(struct perf_worker *w);

/* ---- perf_agree.c ---- */

/* Connects, agrees, and makes all connections and memory. */
int perf_agree_drive(struct perf_session *s, const struct perf_launch *l);
/* Takes one driver on this listener, whose context becomes the session's. -EPERM, -EPROTO: it was refused, and the
 * listener may take the next one. */
int perf_agree_serve(struct perf_session *s, struct tp_ctx *ctx, struct tp_listener *tl);

/* ---- perf_probe.c ---- */

#define PERF_BUSY "this end serves another driver just now"
/* Answers who is there. -EALREADY when that was all. */
int perf_probe_answer(struct perf_conn *c, const struct auth_key *key, struct perf_ctl *m);

/* ---- perf_case.c ---- */

#define PERF_N_MAX (1ull << 31) /* messages of a case on one connection */

void perf_case_encode(const struct perf_case *k, struct perf_ctl *m);
/* -EPROTO: out of the bounds of what was agreed. */
int perf_case_decode(const struct perf_session *s, const struct perf_ctl *m, struct perf_case *k);

/* The driver: one case; what it measured is added to *m (may be NULL). */
int perf_case_drive(struct perf_session *s, const struct perf_case *k, struct perf_measure *m);
/* The peer: serves cases until the driver says goodbye (0) or is lost (-errno). */
int perf_serve_cases(struct perf_session *s);

/* ---- perf_measure.c ---- */

/* The driver: one launch, over a session that has agreed. */
int perf_launch_run(struct perf_session *s, struct perf_launch *l);
/* What an operation left open means for messages of this size. */
enum perf_op perf_op_for(const struct perf_opts *o, const struct tp_attr *attr, const struct perf_size *size);
/* What the counters of this end's device moved since the launch began; NULL: there are none. */
json *perf_counted(const struct perf_session *s);

/* ---- perf_raw.c ---- */

/* The driver: makes both ends of the bare medium; then one case over it, added to *m. */
int perf_raw_begin(struct perf_session *s, const struct perf_case *k);
int perf_raw_case(struct perf_session *s, const struct perf_case *k, struct perf_measure *m);
/* The peer: answers to the control messages of those. */
int perf_raw_answer(struct perf_session *s, struct perf_ctl *m);
int perf_raw_serve(struct perf_session *s, struct perf_ctl *m);

/* ---- perf_flow.c: one case on one worker ---- */

/* What must be in place before the other end may begin; then the case. The driver needs the second only. */
void perf_flow_ready(struct perf_worker *w);
int perf_flow(struct perf_worker *w);
uint64_t perf_thread_cpu_ns(void);

/* ---- perf_data.c ---- */

uint64_t perf_stride(uint64_t size);
unsigned perf_slots(const struct perf_opts *o, uint64_t size);
/* Bytes of memory that each connection opens, and in all; for options that were checked. */
uint64_t perf_slots_bytes(const struct perf_opts *o, const struct perf_size *size);
uint64_t perf_octaves(const struct perf_size *size);
/* Bytes of message seq of a connection. */
uint64_t perf_size_at(const struct perf_case *k, unsigned conn, uint64_t seq);
void perf_slot_order(const struct perf_case *k, uint16_t *order);
/* The stream that a message belongs to: run, connection, direction, number. */
uint64_t perf_stream(const struct perf_case *k, unsigned conn, bool from_driver, uint64_t seq);
void perf_fill(void *p, uint64_t len, uint64_t stream);
/* Whether every byte is what perf_fill put there. */
bool perf_holds(const void *p, uint64_t len, uint64_t stream);

/* ---- perf_clock.c ---- */

/* One-way latency of messages of this case's size; leaves out->known false where it cannot be had. */
int perf_one_way(struct perf_session *s, const struct perf_case *k, struct perf_one_way *out);

/* ---- perf_host.c ---- */

/* Cores for n threads of one end: of the list that was given, else of those allowed, on the NUMA node of the device
 * where there is one. driver: this end takes the second half where both ends are here. Returns how many. */
int perf_cores(const struct perf_opts *o, bool driver, int numa, unsigned n, int *cores);
void perf_pin(int core);
/* The cores that this process may use; as they were before any pinning, from the first call on. */
const cpu_set_t *perf_allowed(void);
json *perf_host(const struct perf_session *s);
/* Counters of the device and interface, an object of numbers; NULL where there are none. */
json *perf_counters(const struct tp_attr *attr);
/* after - before, by name; counters that did not move are left out. */
json *perf_counters_delta(const json *before, const json *after);

/* ---- results ---- */

struct perf_quantile {
        const char *key, *head;
        double p;
};
#define PERF_QUANTILES 5
extern const struct perf_quantile perf_quantiles[PERF_QUANTILES];

struct perf_row {
        enum perf_test test;
        enum perf_op op;
        bool raw;
        const struct perf_size *size;
        struct perf_measure sum;
        double replicate[PERF_REPEATS_MAX];             /* lat: median round trip, ns; bw, rate: messages per second */
        double tails[PERF_REPEATS_MAX][PERF_QUANTILES]; /* lat: percentiles of each, ns; NaN: too few samples */
        size_t replicates;
        unsigned slots, window;
        uint64_t region_bytes;
        struct perf_one_way one_way;
        json *counters_local, *counters_peer;
};

struct perf_result {
        const struct perf_opts *o;
        struct perf_info info; /* of the first launch that agreed */
        bool known;
        bool interrupted;
        struct perf_row **rows;
        size_t n_rows;
};

/* How much of a round trip the figures show: 0.5 or 1. */
double perf_part(const struct perf_opts *o, enum perf_op op);
double perf_row_rate(const struct perf_row *row);
double perf_row_gbytes(const struct perf_row *row);

struct perf_versus { /* a transport beside the bare medium, over the repeats */
        struct estimate ratio, diff_ns;
};
/* False when no repeat has both. */
bool perf_versus(const struct perf_opts *o, const struct perf_row *a, const struct perf_row *raw,
                 struct perf_versus *out);

/* ---- perf_warn.c ---- */

typedef void (*perf_warn_fn)(void *to, const char *text);
void perf_warnings(const struct perf_result *r, const struct perf_row *row, perf_warn_fn warn, void *to);

/* ---- perf_print.c ---- */

/* Table on stdout, warnings on stderr. */
void perf_print_head(const struct perf_opts *o, const struct perf_info *info, enum perf_op op);
void perf_print_row(const struct perf_result *r, const struct perf_row *row);
void perf_print_second(const struct perf_opts *o, const struct perf_case *k, uint64_t second,
                       const struct perf_measure *m);
void perf_print_end(const struct perf_result *r);

/* ---- perf_json.c ---- */

json *perf_json(const struct perf_result *r);

/* ---- perf_launch.c ---- */

int perf_run(struct perf_opts *o);

#endif
