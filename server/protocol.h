/*
 * Protocol version 1: what client and server say to each other, over any transport.
 *
 * Every message starts with struct msg_header. Fields are fixed-width and little-endian, laid out without padding;
 * sizes and offsets are asserted below. Ids, indices and offsets cross the wire, never addresses. Both sides copy a frame
 * out of the transport's buffer before they look at it (a peer that shares memory may change it), validate it with the
 * pure functions here, and only then act.
 *
 *   client                              server
 *   HELLO versions, nonce           →
 *                                   ←   HELLO version, nonce, whether a key is needed
 *   AUTH  proof                     →
 *                                   ←   AUTH proof, session, limits, device         (nothing is learnt before this)
 *   LOAD  graph in parts, weights   →
 *                                   ←   LOADED model id, identity, costs            (after the last part)
 *   KEYS ask: tensors, staging, shadow →
 *                                   ←   KEYS one key each
 *   KEYS give: regions of ours      →
 *                                   ←   KEYS given
 *   [writes into tensors] RUN       →
 *                                   ←   [writes into our regions] DONE              (steady state: one RUN, one DONE)
 *   BYE                             →
 *
 * One request is answered by exactly one DONE or ERROR with its request id. ERROR ends the request; a violation of the
 * protocol is answered by ERROR with MSG_FATAL and the connection ends.
 */
#ifndef DJINN_SERVER_PROTOCOL_H
#define DJINN_SERVER_PROTOCOL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "graph.h"
#include "keys.h"

#define MSG_MAGIC   0x314e4a44u /* "DJN1" */
#define MSG_VERSION 1u

enum msg_opcode {
        MSG_HELLO = 1,          /* c→s, s→c */
        MSG_AUTH = 2,           /* c→s, s→c */
        MSG_JOIN = 3,           /* c→s: another endpoint of the same session; s→c the same */
        MSG_KEYS = 4,           /* c→s, s→c */
        MSG_LOAD = 5,           /* c→s */
        MSG_LOADED = 6,         /* s→c */
        MSG_PUT = 7,            /* c→s: weight bytes were written into staging; s→c ack */
        MSG_GET = 8,            /* c→s: write bytes of a tensor into our region; s→c ack */
        MSG_RUN = 9,            /* c→s */
        MSG_DONE = 10,          /* s→c */
        MSG_CALL = 11,          /* c→s: a RUN in a self-describing encoding (msgpack) */
        MSG_RESULT = 12,        /* s→c: its answer */
        MSG_CREDIT = 13,        /* s→c: how many requests may be in flight */
        MSG_CANCEL = 14,        /* c→s: give up request id */
        MSG_KEEP = 15,          /* c→s: state of the model outlives idle eviction; s→c ack */
        MSG_DROP = 16,          /* c→s: forget state, or unload the model; s→c ack */
        MSG_TIME = 17,          /* c→s, s→c: clock sample */
        MSG_PATTERN = 18,       /* c→s, s→c: calibration exchange */
        MSG_ECHO = 19,          /* c→s, s→c: same bytes back */
        MSG_STATS = 20,         /* c→s, s→c: counters of this connection */
        MSG_HEARTBEAT = 21,     /* either way, answered by nothing */
        MSG_ERROR = 22,         /* either way */
        MSG_BYE = 23,           /* either way */
        MSG_OPCODES
};

struct msg_header {
        uint32_t magic;
        uint16_t version;
        uint16_t opcode;
        uint32_t length;        /* of the whole frame, header included; equals what the transport delivered */
        uint32_t flags;
        uint64_t request_id;    /* echoed in the answer */
};
_Static_assert(sizeof(struct msg_header) == 24, "wire format");

/* ---- session ---- */

#define HELLO_INSECURE 1u       /* flags: this side agrees to go without a key off loopback */

struct msg_hello {              /* both ways */
        struct msg_header h;
        uint16_t version_min, version_max;      /* reply: both the chosen one */
        uint32_t needs_key;                     /* c→s: client has a key and demands proof; s→c likewise */
        uint8_t nonce[NONCE_BYTES];
};
_Static_assert(sizeof(struct msg_hello) == 64, "wire format");

struct msg_auth {
        struct msg_header h;
        uint8_t proof[PROOF_BYTES];             /* zeros without a key */
        uint64_t config_digest;                 /* c→s: reserved for JOIN; 0 */
};
_Static_assert(sizeof(struct msg_auth) == 64, "wire format");

struct msg_limits {
        uint64_t memory_bytes;                  /* that a session may hold on the server */
        uint64_t flop_per_request;
        uint32_t inflight;                      /* RUNs at once */
        uint32_t inline_bytes;                  /* in one RUN */
        uint32_t models;
        uint32_t regions;                       /* that a client may give */
};
_Static_assert(sizeof(struct msg_limits) == 32, "wire format");

struct msg_auth_reply {
        struct msg_header h;
        uint8_t proof[PROOF_BYTES];
        uint64_t session_id;
        uint64_t join_secret[2];                /* for MSG_JOIN */
        uint64_t boot_id[2];                    /* equal to the client's: one kernel, one clock */
        struct msg_limits limits;
        uint32_t threads;                       /* of the engine */
        uint32_t pid;
        uint64_t rss_bytes;
        double read_bytes_per_s, flop_per_s;    /* measured ceilings of the device, fp32 */
        double cache_bytes_per_s;               /* and of what fits into cache_bytes */
        uint64_t cache_bytes;
        char device[96];                        /* NUL-terminated */
        char library[64];
        char commit[48];
};
_Static_assert(sizeof(struct msg_auth_reply) == 384, "wire format");

struct msg_join {
        struct msg_header h;
        uint64_t session_id;
        uint64_t join_secret[2];
};
_Static_assert(sizeof(struct msg_join) == 48, "wire format");

/* ---- models ---- */

enum msg_weights { MSG_WEIGHTS_CHECKPOINT = 1, MSG_WEIGHTS_SEED = 2, MSG_WEIGHTS_PUT = 3, MSG_WEIGHTS_NONE = 4 };

struct msg_load {                               /* followed by part_len bytes of the graph block */
        struct msg_header h;
        uint32_t total_len, offset, part_len;   /* parts arrive in order; the last one makes the server load */
        uint32_t weights;                       /* enum msg_weights */
        uint64_t seed;
        uint64_t memory_hint;                   /* reserved, 0 */
        char model_id[160];                     /* MSG_WEIGHTS_CHECKPOINT: looked up on the server */
};
_Static_assert(sizeof(struct msg_load) == 216, "wire format");

struct msg_loaded {
        struct msg_header h;
        uint32_t model;
        uint32_t reserved;
        uint64_t graph_digest[2], weights_digest[2];    /* XXH3-128 {lo, hi}; of nothing when there are no weights */
        uint64_t weights_bytes, state_bytes, io_bytes;
        uint64_t load_ns;
};
_Static_assert(sizeof(struct msg_loaded) == 96, "wire format");

/* ---- memory ---- */

#define MSG_KEY_BYTES 64
enum msg_keys_kind {
        KEYS_ASK_TENSOR = 1,    /* key to tensor `index` of `model` (inputs and states only: weights never) */
        KEYS_ASK_STAGING = 2,   /* key to a staging buffer of at least len bytes (PUT, CALL) */
        KEYS_ASK_SHADOW = 3,    /* key to a shadow buffer of at least len bytes (PATTERN); also the source of its writes */
        KEYS_GIVE = 4,          /* region `index` of the client's: key, len */
        KEYS_REVOKE = 5         /* region `index` is no longer to be used */
};

struct msg_keys {               /* both ways; the answer has the key (ASK) or repeats the index (GIVE, REVOKE) */
        struct msg_header h;
        uint32_t kind, model, index, epoch;
        uint64_t len;
        uint8_t key[MSG_KEY_BYTES];
};
_Static_assert(sizeof(struct msg_keys) == 112, "wire format");

struct msg_put {                /* PUT: staging[0,len) holds bytes [offset, offset+len) of weight tensor */
        struct msg_header h;    /* GET: bytes [offset, offset+len) of tensor go to region `region` at region_off */
        uint32_t model, tensor;
        uint64_t offset, len;
        uint32_t region, reserved;
        uint64_t region_off;
};
_Static_assert(sizeof(struct msg_put) == 64, "wire format");

/* ---- running ---- */

/* flags of RUN (and echoed, as applied, in DONE) */
#define RUN_PLAN_CACHE  0x01u   /* plans may be looked up and kept; else made for this call and thrown away */
#define RUN_KEEP_STATE  0x02u   /* states outlive the call; else they are forgotten at its end */
#define RUN_LOCAL       0x04u   /* time the run here, host buffer to host buffer; the result is delivered afterwards */
#define RUN_DIGEST      0x08u   /* put the digest of the outputs into DONE */
#define RUN_PROFILE     0x10u   /* stamps wanted */
#define DONE_PLAN_HIT   0x100u  /* every plan of this run came from the cache */
#define DONE_SERIALIZED 0x200u  /* came as CALL */

enum run_class { RUN_BACKGROUND, RUN_NORMAL, RUN_INTERACTIVE, RUN_REALTIME, RUN_CLASSES };

#define RUN_RANGES_MAX   16u
#define RUN_FEEDBACK_MAX 8u
#define RUN_INPUTS_MAX   1024u
#define RUN_OUTPUTS_MAX  1024u
#define RUN_REPEAT_MAX   65536u

/* The program: ranges in order, each `repeat` times. Iterations are counted over the whole program from 0. */
struct run_range {
        uint32_t first, count;  /* nodes */
        uint32_t rows;          /* value of GRAPH_ROWS */
        uint32_t repeat;
        uint32_t feedback;      /* 1: before each iteration of this range apply the feedback pairs */
        uint32_t reserved;
};
_Static_assert(sizeof(struct run_range) == 24, "wire format");

struct run_feedback {           /* dst[0,len) = src[src_off + (iteration-1)*src_step, +len) */
        uint32_t src, dst;      /* tensors; dst an input */
        uint32_t src_off, src_step;
        uint64_t len;
};
_Static_assert(sizeof(struct run_feedback) == 24, "wire format");

#define INPUT_INLINE  1u        /* bytes are in the frame at `offset` behind the arrays */
#define INPUT_WRITTEN 2u        /* bytes were written into the tensor one-sided, before this message */

struct run_input {
        uint32_t tensor;
        uint32_t flags;
        uint64_t offset;        /* INLINE: into the inline bytes */
        uint64_t tensor_off;    /* where in the tensor they belong */
        uint64_t len;
};
_Static_assert(sizeof(struct run_input) == 32, "wire format");

#define OUTPUT_EACH 1u          /* after every iteration, not only after the last */

struct run_output {             /* bytes [tensor_off, +len) go to region `region` at region_off + iteration*step */
        uint32_t tensor;
        uint32_t flags;
        uint32_t region;
        uint32_t step;          /* bytes between iterations; 0 without OUTPUT_EACH */
        uint64_t tensor_off;
        uint64_t len;
        uint64_t region_off;
};
_Static_assert(sizeof(struct run_output) == 40, "wire format");

struct msg_run {                /* followed by ranges, feedback, inputs, outputs, inline bytes, in this order */
        struct msg_header h;    /* flags: RUN_* */
        uint32_t model;
        uint32_t run_class;
        uint16_t nranges, nfeedback, ninputs, noutputs;
        uint32_t inline_len;
        uint32_t reserved;
        uint64_t deadline_ns;   /* from arrival; 0: the server's own limit */
        uint64_t extra_len;     /* bytes of staging that the injury test wrote; 0 otherwise */
};
_Static_assert(sizeof(struct msg_run) == 64, "wire format");

struct run_stamps {             /* clock of the server; 0: not taken */
        uint64_t received_ns;   /* request complete (frame in our hands, before it was looked at) */
        uint64_t taken_ns;      /* by an executor */
        uint64_t planned_ns;    /* plan looked up or made, checked, bound */
        uint64_t placed_ns;     /* inputs where the device reads them */
        uint64_t executed_ns;   /* last device work done */
        uint64_t offered_ns;    /* response built; its first byte is offered next */
        uint64_t exec_ns;       /* device time of the operations, a duration */
        uint64_t local_ns;      /* RUN_LOCAL: duration host buffer to host buffer */
        uint64_t cleanup_ns;    /* of the previous request: duration of what came after its response */
};
_Static_assert(sizeof(struct run_stamps) == 72, "wire format");

struct msg_done {
        struct msg_header h;    /* flags: RUN_* as applied | DONE_* */
        int32_t status;         /* 0 */
        uint32_t iterations;
        struct run_stamps stamps;
        uint64_t digest[2];     /* of the outputs in order, with RUN_DIGEST */
        uint64_t bytes_copied;  /* by the server for this request (placement, serialization) */
        uint32_t plan_hits, plan_misses;
        uint32_t ops;           /* instructions run */
        uint32_t reserved;
};
_Static_assert(sizeof(struct msg_done) == 144, "wire format");

/* CALL: the RUN and its inputs as one msgpack map, in the frame or (offset WRITTEN) in staging. RESULT likewise. */
struct msg_call {               /* followed by body_len bytes when in_staging is 0 */
        struct msg_header h;
        uint64_t body_len;
        uint32_t in_staging;    /* CALL: body in the staging buffer. RESULT: body in region */
        uint32_t region;        /* CALL: where a body that does not fit a message goes */
        uint64_t region_len;
};
_Static_assert(sizeof(struct msg_call) == 48, "wire format");

struct msg_result {             /* followed by body_len bytes when in_region is 0 */
        struct msg_done done;   /* opcode MSG_RESULT */
        uint64_t body_len;
        uint32_t in_region;
        uint32_t reserved;
};
_Static_assert(sizeof(struct msg_result) == 160, "wire format");

/* ---- the rest ---- */

struct msg_model_ref {          /* KEEP, DROP, CANCEL (h.request_id names the request), and acks of PUT, GET, KEEP, DROP */
        struct msg_header h;
        uint32_t model;
        uint32_t what;          /* DROP: 0 state, 1 model */
};
_Static_assert(sizeof(struct msg_model_ref) == 32, "wire format");

struct msg_credit {
        struct msg_header h;
        uint32_t inflight, reserved;
};
_Static_assert(sizeof(struct msg_credit) == 32, "wire format");

struct msg_time {
        struct msg_header h;
        uint64_t client_ns;     /* echoed */
        uint64_t received_ns, offered_ns;
};
_Static_assert(sizeof(struct msg_time) == 48, "wire format");

/* One exchange of a calibration: the frame is as long as the RUN that it stands for. The server waits hold_ns from
 * arrival, writes pieces of the given lengths from its shadow buffer into region `region` one after the other, and answers
 * with a frame of reply_len bytes. */
struct msg_pattern {            /* followed by nwrites uint32_t lengths, then padding */
        struct msg_header h;
        uint64_t hold_ns;
        uint32_t reply_len;     /* >= sizeof(struct msg_pattern_reply) */
        uint32_t region;
        uint32_t nwrites;
        uint32_t reserved;
};
_Static_assert(sizeof(struct msg_pattern) == 48, "wire format");

struct msg_pattern_reply {
        struct msg_header h;
        uint64_t received_ns, offered_ns;
};
_Static_assert(sizeof(struct msg_pattern_reply) == 40, "wire format");

struct msg_stats {
        struct msg_header h;
        uint64_t msgs_tx, msgs_rx, msg_bytes_tx, msg_bytes_rx, bulk_bytes_tx, bulk_ops;
        uint64_t header_bytes_tx, header_bytes_rx, bytes_copied, retries;       /* transport's, of this connection */
        uint64_t cpu_ns, rss_bytes;                                             /* of the server process */
        uint64_t requests, plan_hits, plan_misses;
};
_Static_assert(sizeof(struct msg_stats) == 144, "wire format");

#define MSG_FATAL 1u            /* flag of ERROR: the connection ends */
enum msg_phase { PH_HELLO, PH_AUTH, PH_LOAD, PH_KEYS, PH_RUN, PH_PATTERN, PH_OTHER, PH_COUNT };
extern const char *const msg_phase_names[PH_COUNT];

struct msg_error {
        struct msg_header h;
        int32_t code;           /* -errno */
        uint16_t phase;         /* enum msg_phase */
        uint16_t field;         /* index of the array element concerned, 0xffff: none */
        char text[216];         /* NUL-terminated */
};
_Static_assert(sizeof(struct msg_error) == 248, "wire format");

/* ---- pure functions: bytes in, verdict out ---- */

const char *msg_opcode_name(unsigned opcode);

/* Fills in magic, version, opcode, length. */
void msg_header_init(struct msg_header *h, enum msg_opcode opcode, size_t length, uint32_t flags, uint64_t request_id);

/* Header and length of a frame that is a private copy: magic, version, opcode known, h.length == len, and len within what
 * this opcode may have. 0 or -EPROTO with a sentence. Strings inside are checked to be terminated. */
int msg_check(const void *frame, size_t len);
/* A PATTERN as the server gets it: its lengths are inside the frame and reply_len is one that a reply can have.
 * -EPROTO with a sentence. */
int msg_pattern_view(const void *frame, size_t len, const uint32_t **lengths);

/* A RUN with pointers into the (private, validated) frame. */
struct run_view {
        const struct msg_run *run;
        const struct run_range *ranges;
        const struct run_feedback *feedback;
        const struct run_input *inputs;
        const struct run_output *outputs;
        const uint8_t *inline_bytes;
};

size_t msg_run_bytes(unsigned nranges, unsigned nfeedback, unsigned ninputs, unsigned noutputs, size_t inline_len);
/* Writes arrays behind a msg_run whose counts are set; frame has msg_run_bytes() room. inline_bytes NULL: the caller fills
 * the last inline_len bytes itself. Returns the frame's length. */
size_t msg_run_pack(void *frame, const struct msg_run *run, const struct run_range *ranges,
                    const struct run_feedback *feedback, const struct run_input *inputs,
                    const struct run_output *outputs, const void *inline_bytes);
/* Structure only: counts and lengths add up to len. */
int msg_run_view(const void *frame, size_t len, struct run_view *out);
/* Against a graph: node ranges, rows within rows_max, tensors' residency (inputs, states written; weights never),
 * offsets and lengths within tensors, regions below nregions with region_len[], repeat bounds, total FLOP within limit
 * (0: not looked at; somebody who knows the plans' costs does it). region_len NULL: a CALL, whose inputs are blobs
 * (flags 0) and whose outputs go into its RESULT. index_out gets the offending element for ERROR.field, 0xffff where it is
 * none in particular. 0 or -EINVAL with a sentence. */
int msg_run_check(const struct run_view *v, const struct graph *g, const uint64_t *region_len, unsigned nregions,
                  double flop_limit, uint16_t *index_out);

/* ---- CALL bodies: msgpack (serial.c) ---- */

/* Growable buffer owned by the caller; reused from call to call. */
struct serial_buf { uint8_t *data; size_t len, cap; };
void serial_free(struct serial_buf *b);

struct serial_blob { uint32_t tensor; uint64_t tensor_off; const void *data; uint64_t len; };

/* {"model":, "class":, "flags":, "ranges":[[..]], "feedback":[[..]], "inputs":[{"tensor","off","dtype","shape","data"}],
 *  "outputs":[[tensor, flags, off, len]]}: every input's bytes are copied in. */
int serial_pack_call(struct serial_buf *b, const struct run_view *v, const struct graph *g,
                     const struct serial_blob *inputs, unsigned ninputs);
/* Exact length that serial_pack_call will produce, without bytes (for plans). */
int serial_call_bytes(const struct run_view *v, const struct graph *g, const struct serial_blob *inputs,
                      unsigned ninputs, size_t *out);
/* Decodes an untrusted body into arrays owned by `dec` (reused), ready for msg_run_check; input blobs point into body. */
struct serial_call {
        struct msg_run run;
        struct run_range ranges[RUN_RANGES_MAX];
        struct run_feedback feedback[RUN_FEEDBACK_MAX];
        struct run_input *inputs;       /* flags 0: bytes are in blobs[] */
        struct run_output *outputs;     /* region and region_off unused */
        struct serial_blob *blobs;
        unsigned cap;
};
int serial_unpack_call(const void *body, size_t len, struct serial_call *dec);
void serial_call_free(struct serial_call *dec);
/* {"outputs":[{"tensor","dtype","shape","data"}...]} in the order of the call's outputs (OUTPUT_EACH: one per
 * iteration, in order of time). */
int serial_pack_result(struct serial_buf *b, const struct graph *g, const struct serial_blob *outputs, unsigned n);
int serial_result_bytes(const struct graph *g, const struct serial_blob *outputs, unsigned n, size_t *out);
/* blobs point into body; n is the number expected, another number is -EPROTO. */
int serial_unpack_result(const void *body, size_t len, struct serial_blob *out, unsigned n);

#endif
