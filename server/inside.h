/*
 * What the server's files share and nobody else sees. One thread owns everything here.
 *
 *   server.c         listeners, the poll loop, sleeping, dispatch
 *   session.c        connections, handshake, sessions
 *   regions.c        keys and memory that crosses the wire
 *   model.c          LOAD, tensors of a model, PUT, GET, DROP
 *   weights_cache.c  weights that sessions share
 *   plan_cache.c     prepared programs of a model
 *   placement.c      where a tensor's bytes are, inputs and feedback on their way there
 *   queue.c          which request is next
 *   exec.c           a request from taken to answered
 *   serialized.c     what CALL does beyond RUN
 *   answers.c        messages that need no engine
 *
 * Every message that arrives is copied into a struct request of its connection and stays there until it has been
 * answered; the answer is built in the request's own frame or fields and sent from there. So nothing that waits for a
 * peer blocks the loop: what cannot go on is asked again in the next round.
 */
#ifndef DJINN_SERVER_INSIDE_H
#define DJINN_SERVER_INSIDE_H

#include <poll.h>

#include "clock.h"
#include "device.h"
#include "digest.h"
#include "graph.h"
#include "protocol.h"
#include "queue.h"
#include "server.h"
#include "transport.h"
#include "weights.h"

/* Limits that a session is told in AUTH. */
#define SRV_MODELS     64u
#define SRV_REGIONS    256u /* per connection */
#define SRV_INFLIGHT   64u
#define SRV_INLINE_MAX 65536u
#define SRV_FLOP_MAX   1e14
/* Bounds that nobody is told: requests of a connection that are not yet answered (credit plus messages that need no
 * engine), live keys of a session, connections that have not proven themselves, connections of one session. */
#define SRV_REQUESTS  (SRV_INFLIGHT + 16u)
#define SRV_KEYS      16384u
#define SRV_STRANGERS 64u
#define SRV_CONNS     16u
#define SRV_SESSIONS  1100u
/* An operation is not interrupted, so what one iteration may read and write is bounded before it begins; and how many
 * pieces a request may return. */
#define SRV_MOVED_MAX  1e12
#define SRV_PIECES_MAX (1u << 20)

#define SRV_HANDSHAKE_NS (2 * NS_PER_S)
#define SRV_DRAIN_NS     (5 * NS_PER_S)   /* a peer that takes nothing for so long is given up */
#define SRV_LAST_WORD_NS (NS_PER_S / 5)   /* for a fatal ERROR to go out */
#define SRV_RUN_NS       (600 * NS_PER_S) /* deadline of a RUN that has none of its own */
#define SRV_SLICE_NS     NS_PER_MS        /* of execution, between looks at the other connections */
#define SRV_SPIN_NS      (5 * NS_PER_MS)  /* of polling after the last activity, before sleeping */
#define SRV_HOLD_MAX_NS  (60 * NS_PER_S)  /* of a PATTERN */

struct server;
struct session;
struct conn;
struct model;
struct request;

/* ---- weights that sessions share (weights_cache.c) ---- */

struct srv_weights {
        struct srv_weights *next;
        uint32_t refs;
        bool shared;            /* findable by others; PUT weights are not */
        struct digest identity; /* of source, model id or seed, and recipes */
        struct digest digest;   /* of the bytes, in graph order */
        uint64_t bytes;
        uint32_t n;
        struct mem_region *regions; /* per weight tensor, in graph order */
};

/* Whether tensor t is made by recipes: a weight, or what is left of one in a blind graph. */
bool srv_is_weight(const struct graph *g, unsigned t);
uint64_t srv_weights_bytes(const struct graph *g);
/* Finds or makes them; a reference is the caller's. -errno with a sentence. */
int srv_weights_get(struct server *srv, const struct graph *g, const struct msg_load *load, struct srv_weights **out);
void srv_weights_put(struct server *srv, struct srv_weights *w);

/* ---- plans (plan_cache.c) ---- */

struct srv_plan {
        uint32_t first, count, rows; /* the key, with fuse */
        bool fuse;
        bool kept; /* in the cache; else its request frees it */
        uint32_t ops;
        uint64_t used;  /* tick of the last use */
        uint64_t bytes; /* estimate of what it takes, counted against the session while it is kept */
        double flop;    /* with full caches: the bound that limits are checked against */
        struct dev_plan *dev;
};

#define SRV_PLAN_SLOTS 4096u /* of the table, a power of two; at most half of them are used */

struct srv_plans {
        struct srv_plan **slots;
        uint32_t count;
        uint64_t tick;
        struct session *s; /* whose memory kept plans are; NULL: nobody's */
};

int srv_plans_init(struct srv_plans *p);
struct srv_plan *srv_plans_find(struct srv_plans *p, uint32_t first, uint32_t count, uint32_t rows, bool fuse);
/* Takes plan in, throwing the one that was not used for longest out when full. */
void srv_plans_keep(struct srv_plans *p, struct srv_plan *plan);
void srv_plans_flush(struct srv_plans *p);
void srv_plans_free(struct srv_plans *p);
void srv_plan_free(struct srv_plan *plan);
/* r->plans for the whole program of r, from the cache where RUN_PLAN_CACHE allows; hits and misses counted. */
int srv_plans_resolve(struct server *srv, struct request *r);
/* Gives back what r holds: frees what is not kept. */
void srv_plans_release(struct request *r);

/* ---- models (model.c, placement.c) ---- */

struct srv_tensor {
        size_t bytes;          /* with rows_max rows */
        void *addr;            /* where it is now; NULL: not needed so far, or scratch */
        struct tp_mem *mem;    /* allocated by the first connection's medium, or registered there */
        struct mem_region dev; /* the device's own memory; addr NULL: none */
};

struct model {
        struct session *s;
        uint32_t id;
        enum msg_weights source;
        bool busy;      /* a request runs on it */
        uint32_t pins;  /* requests that name it in their m: as long as there are any it cannot be dropped */
        uint32_t keys;  /* live ones, to tensors that lie on the session's first connection */
        struct graph g; /* our own copy */
        struct srv_weights *weights;
        struct srv_tensor *tensors;
        void **addr;     /* per tensor, for graph_bind */
        size_t *offsets; /* per tensor, from graph_scratch */
        struct op_inst *insts;
        struct mem_region scratch;
        struct srv_plans plans;
        bool state_live; /* something keeps its states between calls */
};

int srv_load(struct server *srv, struct request *r);
int srv_put(struct server *srv, struct request *r);
int srv_get(struct server *srv, struct request *r);
int srv_keep(struct server *srv, struct request *r);
int srv_drop(struct server *srv, struct request *r);
void srv_model_free(struct server *srv, struct model *m);
/* NULL with a sentence: this session has no such model. */
struct model *srv_model(struct session *s, uint32_t id);
/* r names m until srv_unpin(), which also ends r's claim on it. */
void srv_pin(struct request *r, struct model *m);
void srv_unpin(struct request *r);

/* Allocates tensor t if it has no place yet, counted against the session. */
int srv_tensor_ready(struct server *srv, struct model *m, unsigned t);
/* The memory through which tensor t is written to c's peer: NULL where the medium reads plain memory. */
struct tp_mem *srv_tensor_mem(const struct conn *c, const struct srv_tensor *t);
/* Before the timed part: every tensor that the program names or its nodes touch has a place. */
int srv_place_tensors(struct server *srv, struct model *m, uint32_t first, uint32_t count);
/* The inputs of a request into their tensors. */
int srv_place_inputs(struct server *srv, struct request *r);
int srv_feedback(struct server *srv, struct request *r, const struct run_feedback *f, uint32_t iteration);

/* ---- requests ---- */

enum req_stage {
        ST_SETTLE, /* until the peer has taken what earlier requests of its session wrote out of their buffers */
        ST_CHECK,  /* frame against graph, plans */
        ST_PLACE,
        ST_ITERATE, /* feedback, launch */
        ST_RUNNING,
        ST_EACH,    /* outputs of this iteration */
        ST_BUILD,   /* the answer but for its time of departure */
        ST_DELIVER, /* outputs of the last iteration */
        ST_HOLD,    /* PATTERN: wait as long as the server once took, then its writes */
        ST_GET,     /* GET: its write */
        ST_REPLY,   /* send what is in reply */
        ST_SENT,    /* until the transport gives the reply's bytes back */
        ST_REST,    /* nothing is to be done */
        ST_COUNT
};

struct request {
        struct queue_item item; /* in the queue */
        struct request *next;   /* in the active or the free list */
        struct conn *c;
        struct model *m; /* pinned. RUN, GET: from the start; CALL: once it is decoded */
        uint64_t id;
        enum req_stage stage;
        bool engine; /* RUN or CALL: executes, counts as in flight */
        bool is_call;
        bool claimed; /* m is busy because of it */
        bool cancelled;
        bool ends_conn; /* its reply is a fatal ERROR */
        uint8_t *frame; /* c->attr.msg_max bytes; the private copy */
        size_t len;
        void *reply; /* in frame, or one of the fields below */
        size_t reply_len;
        uint32_t posts; /* of the reply */
        uint64_t deadline_ns;
        uint64_t stuck_ns; /* since when the peer takes nothing; 0: it does */
        /* RUN, CALL */
        struct run_view v;
        uint32_t flags;
        struct run_stamps st;
        struct srv_plan *plans[RUN_RANGES_MAX];
        uint32_t range, repeat;         /* where in the program: range, iteration of it */
        uint32_t iteration, iterations; /* of the whole program */
        uint32_t out;                   /* next output to deliver */
        struct dev_event ev;
        struct digest_stream *digest;
        uint64_t bytes_copied;
        uint32_t hits, misses, ops;
        size_t local_off; /* RUN_LOCAL: into the result buffer */
        bool each_wanted; /* some output has OUTPUT_EACH */
        struct msg_done done;
        /* CALL */
        struct serial_call call;
        uint8_t *body; /* copy of a body that came through staging */
        size_t body_cap;
        uint8_t *each; /* outputs of OUTPUT_EACH, output after output */
        size_t each_cap;
        struct serial_blob *blobs;
        size_t nblobs, blobs_cap;
        bool in_region;
        size_t body_len;
        uint32_t region; /* for a body that fits no message */
        uint64_t region_len;
        /* PATTERN */
        const uint32_t *lengths;
        uint64_t hold_until_ns, off;
};

/* ---- connections and sessions (session.c, regions.c) ---- */

enum conn_state {
        CONN_NEW,     /* nothing said */
        CONN_GREETED, /* HELLO answered */
        CONN_OPEN,
        CONN_LEAVING, /* a fatal ERROR is on its way out */
        CONN_DEAD     /* to be reaped */
};

struct conn_reg {
        struct conn_reg *next;
        const struct model *m;
        const struct srv_tensor *t;
        struct tp_mem *mem;
        uint32_t keys; /* live ones, to mem */
};

struct conn {
        struct conn *next;    /* of the server */
        struct conn *sibling; /* of the session */
        struct tp_ep *ep;
        struct tp_attr attr;
        struct session *s;
        enum conn_state state;
        bool loopback;
        uint64_t deadline_ns; /* CONN_NEW, CONN_GREETED, CONN_LEAVING */
        uint8_t nonce_c[NONCE_BYTES], nonce_s[NONCE_BYTES];
        struct request *free; /* requests at rest */
        struct request *all[SRV_REQUESTS];
        uint32_t nrequests, busy; /* made; not at rest */
        struct conn_reg *regs;    /* tensors that live on another connection's medium, registered here too */
        struct msg_credit credit;
        struct tp_rmem *rmem[SRV_REGIONS];
        uint64_t region_len[SRV_REGIONS];
        struct tp_mem *staging, *shadow, *out; /* out: results that come from no tensor */
        uint32_t staging_keys, shadow_keys;    /* live ones */
        uint32_t posts;                        /* writes that are not complete: their sources must not change */
        char why[200];                         /* of its end, for the log */
};

struct session {
        struct session *next;
        struct server *srv;
        uint64_t id, secret[2];
        struct conn *home; /* its first connection: memory is allocated there, it ends with it */
        struct conn *conns;
        uint32_t nconns;
        struct model *models[SRV_MODELS];
        uint64_t memory_used; /* shared weights included, as if they were its own */
        uint32_t keys;        /* ever made: the epoch of the next; those that live are counted where their memory is */
        uint32_t inflight;
        uint8_t *load; /* graph block that is arriving */
        uint32_t load_len, load_total;
        uint8_t *local; /* RUN_LOCAL: the application's input buffer */
        size_t local_cap;
        uint64_t requests, plan_hits, plan_misses, cleanup_ns;
};

/* Cookies of posts: what completed, in the low bits of a pointer to it. */
enum cookie { COOKIE_NOBODY = 0, COOKIE_REPLY = 1, COOKIE_WRITE = 2, COOKIE_MASK = 7 };

static inline uint64_t srv_cookie(const void *p, enum cookie tag)
{
        return (uint64_t)(uintptr_t)p | tag;
}

int srv_conn_add(struct server *srv, struct tp_ep *ep, bool loopback);
void srv_conn_reap(struct server *srv, struct conn *c);
/* Marks a connection dead; it is reaped when the batch of events is through. */
void srv_conn_end(struct server *srv, struct conn *c, const char *why);
int srv_hello(struct server *srv, struct request *r);
int srv_auth(struct server *srv, struct request *r);
int srv_join(struct server *srv, struct request *r);
int srv_keys(struct server *srv, struct request *r);
/* A key for a tensor's memory, or what the medium of another connection of the session needs to reach it. */
int srv_tensor_reg(struct conn *c, struct model *m, struct srv_tensor *t, struct tp_mem **out);
void srv_tensor_unreg(struct model *m);
void srv_credit(struct conn *c);
/* Memory of a session against its limit and the server's. -EDQUOT with a sentence. */
int srv_charge(struct session *s, uint64_t bytes, const char *what);
void srv_refund(struct session *s, uint64_t bytes);
/* The halves of it, for weights: many sessions count what the server has once. */
int srv_session_charge(struct session *s, uint64_t bytes, const char *what);
void srv_session_refund(struct session *s, uint64_t bytes);
int srv_total_charge(struct server *srv, uint64_t bytes, const char *what);
void srv_total_refund(struct server *srv, uint64_t bytes);
/* Grows *mem, allocated on c's medium, to at least len. The old one's keys die. */
int srv_grow(struct conn *c, struct tp_mem **mem, size_t len, const char *what);

/* A request at rest on this connection; NULL: too many are not answered. */
struct request *srv_request_new(struct conn *c);
void srv_request_rest(struct server *srv, struct request *r);
/* Answers: fills in the header over r->reply and sends it, now or when the peer takes it. */
void srv_answer(struct server *srv, struct request *r, enum msg_opcode op, void *reply, size_t len, uint32_t flags);
/* Answers with ERROR {rc, err_text()}; MSG_FATAL ends the connection after it. */
void srv_refuse(struct server *srv, struct request *r, int rc, enum msg_phase phase, uint16_t field, uint32_t flags);

/* ---- exec.c, serialized.c, answers.c ---- */

/* Step results. */
#define STEP_AGAIN 0 /* nothing can be done now: the peer must take or give something first */
#define STEP_NEXT  1 /* go on with r->stage */
#define STEP_YIELD 2 /* could go on; others are due a look */
#define STEP_DONE  3 /* r has been put to rest */

int srv_run(struct server *srv, struct request *r);
int srv_call(struct server *srv, struct request *r);
int srv_cancel(struct server *srv, struct request *r);
/* Takes r as far as it goes; r is not to be touched after STEP_DONE. */
int srv_advance(struct server *srv, struct request *r);
/* Advances r for the first time; what is not done is looked at again in each round. */
void srv_begin(struct server *srv, struct request *r);
/* Requests whose deadline passed in the queue are answered. */
void srv_expire(struct server *srv, uint64_t now_ns);
/* Everything of this connection that waits or runs is forgotten. */
void srv_forget(struct server *srv, struct conn *c);
/* Runs what can run: 1 something moved. */
int srv_work(struct server *srv);
/* One write to c's peer: STEP_NEXT it is on its way (c->posts counts it until it completes), STEP_AGAIN, -errno. */
int srv_write(struct conn *c, struct tp_mem *mem, const void *src, size_t len, struct tp_rmem *to, uint64_t off);
/* Whether every write of this session has completed. */
bool srv_settled(const struct session *s);

/* Bytes of all outputs of a program, iterations included. -EDQUOT: more than a session may hold, or too many pieces. */
int srv_outputs_bytes(const struct server *srv, const struct request *r, uint64_t *out);

int srv_call_decode(struct server *srv, struct request *r);
int srv_call_each(struct server *srv, struct request *r);
int srv_call_build(struct server *srv, struct request *r);
int srv_call_deliver(struct server *srv, struct request *r);

int srv_pattern(struct server *srv, struct request *r);
int srv_pattern_hold(struct server *srv, struct request *r);
int srv_time(struct server *srv, struct request *r);
int srv_echo(struct server *srv, struct request *r);
int srv_stats(struct server *srv, struct request *r);
int srv_heartbeat(struct server *srv, struct request *r);
int srv_bye(struct server *srv, struct request *r);
int srv_error(struct server *srv, struct request *r);
uint64_t srv_rss_bytes(void);

struct srv_listener {
        struct tp_listener *l;
        bool loopback;
};

struct server {
        struct server_opts opts;
        struct device *dev;
        struct dev_props props;
        struct model_roots *roots;
        struct tp_ctx **ctxs; /* one per scheme */
        size_t nctxs;
        char (*schemes)[16]; /* of the contexts */
        struct pollfd *fds;  /* of the contexts, for sleeping */
        struct srv_listener *listeners;
        size_t nlisteners;
        struct conn *conns;
        struct session *sessions;
        uint32_t nsessions, nstrangers, nleaving;
        uint64_t memory_used; /* by all sessions, shared weights once */
        bool served;          /* a session has been there */
        bool reap;            /* some connection is dead */
        bool moved;           /* something happened since the last look at the clock */
        struct srv_weights *weights;
        struct queue queue;
        struct request *active; /* taken and not answered, and answers that wait for their peer */
        uint64_t now_ns;        /* when the batch of events that is being handled came */
        uint64_t slice_end_ns;
        uint64_t boot_id[2];
};

#endif
