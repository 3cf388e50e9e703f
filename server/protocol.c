/*
 * Frames: sizes, packing, and the checks that every frame passes before anybody acts on it. Pure functions: bytes in,
 * verdict out; nothing here allocates, and nothing but a refusal costs more than a walk over the arrays.
 *
 * The structs are laid out without padding in little-endian order, which is the order of every host that this program
 * is built for; the assert below keeps a big-endian build from speaking another protocol under the same magic.
 */
#include "protocol.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "check.h"
#include "err.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "frames are read and written in host order");
_Static_assert(MSG_KEY_BYTES == 64 && PROOF_BYTES == 32 && NONCE_BYTES == 32, "wire format");
_Static_assert(offsetof(struct msg_header, length) == 8 && offsetof(struct msg_header, request_id) == 16,
               "wire format");
_Static_assert(offsetof(struct msg_hello, nonce) == 32 && offsetof(struct msg_auth, config_digest) == 56,
               "wire format");
_Static_assert(offsetof(struct msg_auth_reply, limits) == 96 && offsetof(struct msg_auth_reply, device) == 176 &&
                   offsetof(struct msg_auth_reply, commit) == 336,
               "wire format");
_Static_assert(offsetof(struct msg_load, seed) == 40 && offsetof(struct msg_load, model_id) == 56, "wire format");
_Static_assert(offsetof(struct msg_loaded, graph_digest) == 32 && offsetof(struct msg_loaded, load_ns) == 88,
               "wire format");
_Static_assert(offsetof(struct msg_keys, len) == 40 && offsetof(struct msg_keys, key) == 48, "wire format");
_Static_assert(offsetof(struct msg_put, offset) == 32 && offsetof(struct msg_put, region_off) == 56, "wire format");
_Static_assert(offsetof(struct msg_run, nranges) == 32 && offsetof(struct msg_run, inline_len) == 40 &&
                   offsetof(struct msg_run, deadline_ns) == 48,
               "wire format");
_Static_assert(offsetof(struct run_output, tensor_off) == 16 && offsetof(struct run_input, tensor_off) == 16,
               "wire format");
_Static_assert(offsetof(struct msg_done, stamps) == 32 && offsetof(struct msg_done, digest) == 104 &&
                   offsetof(struct msg_done, ops) == 136,
               "wire format");
_Static_assert(offsetof(struct msg_call, body_len) == 24 && offsetof(struct msg_result, body_len) == 144,
               "wire format");
_Static_assert(offsetof(struct msg_pattern, reply_len) == 32 && offsetof(struct msg_pattern, nwrites) == 40,
               "wire format");
_Static_assert(offsetof(struct msg_error, phase) == 28 && offsetof(struct msg_error, text) == 32, "wire format");

const char *const msg_phase_names[PH_COUNT] = {
    [PH_HELLO] = "hello", [PH_AUTH] = "auth",       [PH_LOAD] = "load",   [PH_KEYS] = "keys",
    [PH_RUN] = "run",     [PH_PATTERN] = "pattern", [PH_OTHER] = "other",
};

/* What an opcode's frames look like. A frame has one of the two fixed lengths (0: there is no second), or, where the
 * opcode has a tail, at least the first and at most FRAME_MAX. */
#define FRAME_MAX (GRAPH_BYTES_MAX + 65536u)

struct frame_shape {
        const char *name;
        uint32_t len, other;
        bool tail;
        int (*check)(const void *frame, size_t len);
};

static int check_auth(const void *frame, size_t len);
static int check_load(const void *frame, size_t len);
static int check_keys(const void *frame, size_t len);
static int check_call(const void *frame, size_t len);
static int check_result(const void *frame, size_t len);
static int check_error(const void *frame, size_t len);

static const struct frame_shape shapes[MSG_OPCODES] = {
    [MSG_HELLO] = {"HELLO", sizeof(struct msg_hello), 0, false, NULL},
    [MSG_AUTH] = {"AUTH", sizeof(struct msg_auth), sizeof(struct msg_auth_reply), false, check_auth},
    [MSG_JOIN] = {"JOIN", sizeof(struct msg_join), 0, false, NULL},
    [MSG_KEYS] = {"KEYS", sizeof(struct msg_keys), 0, false, check_keys},
    [MSG_LOAD] = {"LOAD", sizeof(struct msg_load), 0, true, check_load},
    [MSG_LOADED] = {"LOADED", sizeof(struct msg_loaded), 0, false, NULL},
    [MSG_PUT] = {"PUT", sizeof(struct msg_put), sizeof(struct msg_model_ref), false, NULL},
    [MSG_GET] = {"GET", sizeof(struct msg_put), sizeof(struct msg_model_ref), false, NULL},
    [MSG_RUN] = {"RUN", sizeof(struct msg_run), 0, true, NULL},
    [MSG_DONE] = {"DONE", sizeof(struct msg_done), 0, false, NULL},
    [MSG_CALL] = {"CALL", sizeof(struct msg_call), 0, true, check_call},
    [MSG_RESULT] = {"RESULT", sizeof(struct msg_result), 0, true, check_result},
    [MSG_CREDIT] = {"CREDIT", sizeof(struct msg_credit), 0, false, NULL},
    [MSG_CANCEL] = {"CANCEL", sizeof(struct msg_model_ref), 0, false, NULL},
    [MSG_KEEP] = {"KEEP", sizeof(struct msg_model_ref), 0, false, NULL},
    [MSG_DROP] = {"DROP", sizeof(struct msg_model_ref), 0, false, NULL},
    [MSG_TIME] = {"TIME", sizeof(struct msg_time), 0, false, NULL},
    [MSG_PATTERN] = {"PATTERN", sizeof(struct msg_pattern_reply), 0, true, NULL},
    [MSG_ECHO] = {"ECHO", sizeof(struct msg_header), 0, true, NULL},
    [MSG_STATS] = {"STATS", sizeof(struct msg_header), sizeof(struct msg_stats), false, NULL},
    [MSG_HEARTBEAT] = {"HEARTBEAT", sizeof(struct msg_header), 0, false, NULL},
    [MSG_ERROR] = {"ERROR", sizeof(struct msg_error), 0, false, check_error},
    [MSG_BYE] = {"BYE", sizeof(struct msg_header), 0, false, NULL},
};

const char *msg_opcode_name(unsigned opcode)
{
        return opcode < MSG_OPCODES && shapes[opcode].name ? shapes[opcode].name : "unknown";
}

void msg_header_init(struct msg_header *h, enum msg_opcode opcode, size_t length, uint32_t flags, uint64_t request_id)
{
        *h = (struct msg_header){.magic = MSG_MAGIC,
                                 .version = MSG_VERSION,
                                 .opcode = (uint16_t)opcode,
                                 .length = (uint32_t)length,
                                 .flags = flags,
                                 .request_id = request_id};
}

/* ---- frames ---- */

static bool terminated(const char *s, size_t room)
{
        return memchr(s, '\0', room) != NULL;
}

static int check_auth(const void *frame, size_t len)
{
        const struct msg_auth_reply *m = frame;

        if (len == sizeof(struct msg_auth))
                return 0;
        if (!terminated(m->device, sizeof(m->device)) || !terminated(m->library, sizeof(m->library)) ||
            !terminated(m->commit, sizeof(m->commit)))
                return err_set(-EPROTO, "AUTH: a string is not terminated");
        return 0;
}

static int check_load(const void *frame, size_t len)
{
        const struct msg_load *m = frame;

        if (m->part_len != len - sizeof(*m))
                return err_set(-EPROTO, "LOAD: part_len is %u, %zu bytes follow", m->part_len, len - sizeof(*m));
        if (m->total_len > GRAPH_BYTES_MAX)
                return err_set(-EPROTO, "LOAD: a graph of %u bytes, at most %u", m->total_len, GRAPH_BYTES_MAX);
        if (m->offset > m->total_len || m->part_len > m->total_len - m->offset)
                return err_set(-EPROTO, "LOAD: part [%u, +%u) is outside the graph's %u bytes", m->offset, m->part_len,
                               m->total_len);
        if (m->weights < MSG_WEIGHTS_CHECKPOINT || m->weights > MSG_WEIGHTS_NONE)
                return err_set(-EPROTO, "LOAD: weights is %u, expected 1 to 4", m->weights);
        if (!terminated(m->model_id, sizeof(m->model_id)))
                return err_set(-EPROTO, "LOAD: model_id is not terminated");
        return 0;
}

static int check_keys(const void *frame, size_t len)
{
        const struct msg_keys *m = frame;

        if (m->kind < KEYS_ASK_TENSOR || m->kind > KEYS_REVOKE)
                return err_set(-EPROTO, "KEYS: kind is %u, expected 1 to 5", m->kind);
        return 0;
}

static int check_call(const void *frame, size_t len)
{
        const struct msg_call *m = frame;

        if (m->in_staging > 1)
                return err_set(-EPROTO, "CALL: in_staging is %u, expected 0 or 1", m->in_staging);
        if ((m->in_staging ? 0 : m->body_len) != len - sizeof(*m))
                return err_set(-EPROTO, "CALL: body_len is %" PRIu64 ", %zu bytes follow", m->body_len,
                               len - sizeof(*m));
        return 0;
}

static int check_result(const void *frame, size_t len)
{
        const struct msg_result *m = frame;

        if (m->in_region > 1)
                return err_set(-EPROTO, "RESULT: in_region is %u, expected 0 or 1", m->in_region);
        if ((m->in_region ? 0 : m->body_len) != len - sizeof(*m))
                return err_set(-EPROTO, "RESULT: body_len is %" PRIu64 ", %zu bytes follow", m->body_len,
                               len - sizeof(*m));
        return 0;
}

static int check_error(const void *frame, size_t len)
{
        const struct msg_error *m = frame;

        if (!terminated(m->text, sizeof(m->text)))
                return err_set(-EPROTO, "ERROR: text is not terminated");
        if (m->phase >= PH_COUNT)
                return err_set(-EPROTO, "ERROR: phase is %u, expected below %d", m->phase, PH_COUNT);
        return 0;
}

int msg_check(const void *frame, size_t len)
{
        const struct msg_header *h = frame;
        const struct frame_shape *s;

        if (len < sizeof(*h))
                return err_set(-EPROTO, "frame of %zu bytes is shorter than a header (%zu)", len, sizeof(*h));
        if (h->magic != MSG_MAGIC)
                return err_set(-EPROTO, "frame's magic is %08x, expected %08x", h->magic, MSG_MAGIC);
        if (h->version != MSG_VERSION)
                return err_set(-EPROTO, "frame is of protocol version %u, expected %u", h->version, MSG_VERSION);
        if (h->opcode >= MSG_OPCODES || !shapes[h->opcode].name)
                return err_set(-EPROTO, "opcode %u is unknown", h->opcode);
        if (h->length != len)
                return err_set(-EPROTO, "%s: frame says %u bytes, %zu came", msg_opcode_name(h->opcode), h->length,
                               len);
        s = &shapes[h->opcode];
        if (s->tail ? len < s->len || len > FRAME_MAX : len != s->len && (s->other == 0 || len != s->other))
                return err_set(-EPROTO, "%s: no frame of this kind has %zu bytes", s->name, len);
        return s->check ? s->check(frame, len) : 0;
}

int msg_pattern_view(const void *frame, size_t len, const uint32_t **lengths)
{
        const struct msg_pattern *m = frame;

        if (len < sizeof(*m))
                return err_set(-EPROTO, "PATTERN: %zu bytes, at least %zu", len, sizeof(*m));
        if (m->nwrites > (len - sizeof(*m)) / sizeof(uint32_t))
                return err_set(-EPROTO, "PATTERN: %u lengths do not fit into %zu bytes", m->nwrites, len - sizeof(*m));
        if (m->reply_len < sizeof(struct msg_pattern_reply) || m->reply_len > FRAME_MAX)
                return err_set(-EPROTO, "PATTERN: reply_len is %u, at least %zu", m->reply_len,
                               sizeof(struct msg_pattern_reply));
        *lengths = (const uint32_t *)((const char *)frame + sizeof(*m));
        return 0;
}

/* ---- RUN ---- */

size_t msg_run_bytes(unsigned nranges, unsigned nfeedback, unsigned ninputs, unsigned noutputs, size_t inline_len)
{
        return sizeof(struct msg_run) + nranges * sizeof(struct run_range) + nfeedback * sizeof(struct run_feedback) +
               ninputs * sizeof(struct run_input) + noutputs * sizeof(struct run_output) + inline_len;
}

/* NULL data: the caller fills the place itself. */
static uint8_t *append(uint8_t *at, const void *data, size_t len)
{
        if (len > 0 && data)
                memcpy(at, data, len);
        return at + len;
}

size_t msg_run_pack(void *frame, const struct msg_run *run, const struct run_range *ranges,
                    const struct run_feedback *feedback, const struct run_input *inputs,
                    const struct run_output *outputs, const void *inline_bytes)
{
        size_t len = msg_run_bytes(run->nranges, run->nfeedback, run->ninputs, run->noutputs, run->inline_len);
        uint8_t *at = append(frame, run, sizeof(*run));

        at = append(at, ranges, run->nranges * sizeof(*ranges));
        at = append(at, feedback, run->nfeedback * sizeof(*feedback));
        at = append(at, inputs, run->ninputs * sizeof(*inputs));
        at = append(at, outputs, run->noutputs * sizeof(*outputs));
        if (inline_bytes)
                append(at, inline_bytes, run->inline_len);
        msg_header_init(frame, MSG_RUN, len, run->h.flags, run->h.request_id);
        return len;
}

static int run_counts_check(const struct msg_run *r)
{
        if (r->nranges == 0 || r->nranges > RUN_RANGES_MAX)
                return err_set(-EPROTO, "RUN: %u ranges, expected 1 to %u", r->nranges, RUN_RANGES_MAX);
        if (r->nfeedback > RUN_FEEDBACK_MAX)
                return err_set(-EPROTO, "RUN: %u feedback pairs, at most %u", r->nfeedback, RUN_FEEDBACK_MAX);
        if (r->ninputs > RUN_INPUTS_MAX)
                return err_set(-EPROTO, "RUN: %u inputs, at most %u", r->ninputs, RUN_INPUTS_MAX);
        if (r->noutputs > RUN_OUTPUTS_MAX)
                return err_set(-EPROTO, "RUN: %u outputs, at most %u", r->noutputs, RUN_OUTPUTS_MAX);
        return 0;
}

int msg_run_view(const void *frame, size_t len, struct run_view *out)
{
        const struct msg_run *r = frame;
        const uint8_t *at = frame;
        size_t want;
        int rc;

        if (len < sizeof(*r))
                return err_set(-EPROTO, "RUN: %zu bytes, at least %zu", len, sizeof(*r));
        rc = run_counts_check(r);
        if (rc < 0)
                return rc;
        want = msg_run_bytes(r->nranges, r->nfeedback, r->ninputs, r->noutputs, r->inline_len);
        if (len != want)
                return err_set(-EPROTO, "RUN: its counts add up to %zu bytes, %zu came", want, len);
        out->run = r;
        out->ranges = (const struct run_range *)(at += sizeof(*r));
        out->feedback = (const struct run_feedback *)(at += r->nranges * sizeof(*out->ranges));
        out->inputs = (const struct run_input *)(at += r->nfeedback * sizeof(*out->feedback));
        out->outputs = (const struct run_output *)(at += r->ninputs * sizeof(*out->inputs));
        out->inline_bytes = at + r->noutputs * sizeof(*out->outputs);
        return 0;
}

/* ---- RUN against a graph ---- */

/* Residencies that a caller may write, and read, as a set of 1 << enum graph_residency. Weights and constants are never
 * the peer's to touch; activations share bytes with each other, so that what a caller would read is chance. */
#define MAY_WRITE (1u << RES_INPUT | 1u << RES_STATE)
#define MAY_READ  (1u << RES_OUTPUT | 1u << RES_STATE | 1u << RES_INPUT)

#define RUN_FLAGS (RUN_PLAN_CACHE | RUN_KEEP_STATE | RUN_LOCAL | RUN_DIGEST | RUN_PROFILE)

/* [off, +len) within room, without overflow. */
static bool within(uint64_t off, uint64_t len, uint64_t room)
{
        return off <= room && len <= room - off;
}

static int tensor_check(const struct graph *g, unsigned t, unsigned allowed, const char *what, unsigned i)
{
        if (t >= g->h->ntensors)
                return err_set(-EINVAL, "RUN: %s %u names tensor %u, the graph has %u", what, i, t, g->h->ntensors);
        if (!(allowed & 1u << g->tensors[t].residency))
                return err_set(-EINVAL, "RUN: %s %u: tensor %u (%s) is not one that a caller may use so", what, i, t,
                               g->tensors[t].name);
        return 0;
}

static int piece_check(const struct graph *g, unsigned t, uint64_t off, uint64_t len, const char *what, unsigned i)
{
        size_t room = graph_tensor_bytes(g, t, g->h->rows_max, NULL);

        if (!within(off, len, room))
                return err_set(-EINVAL,
                               "RUN: %s %u: bytes [%" PRIu64 ", +%" PRIu64 ") are outside tensor %u (%s) of %zu", what,
                               i, off, len, t, g->tensors[t].name, room);
        return 0;
}

static int range_check(const struct run_range *r, const struct graph *g, unsigned i)
{
        if (!within(r->first, r->count, g->h->nnodes) || r->count == 0)
                return err_set(-EINVAL, "RUN: range %u: nodes [%u, +%u) are not in the graph of %u", i, r->first,
                               r->count, g->h->nnodes);
        if (r->rows == 0 || r->rows > g->h->rows_max)
                return err_set(-EINVAL, "RUN: range %u: rows is %u, expected 1 to %u", i, r->rows, g->h->rows_max);
        if (r->repeat == 0 || r->repeat > RUN_REPEAT_MAX)
                return err_set(-EINVAL, "RUN: range %u: repeat is %u, expected 1 to %u", i, r->repeat, RUN_REPEAT_MAX);
        if (r->feedback > 1 || r->reserved != 0)
                return err_set(-EINVAL, "RUN: range %u: feedback is %u, expected 0 or 1 (and reserved 0)", i,
                               r->feedback);
        if (r->feedback && i == 0)
                return err_set(-EINVAL, "RUN: range 0 cannot have feedback: there is no iteration before its first");
        return 0;
}

/* The last iteration before which feedback is applied, 0 where it never is; all iterations in *total. */
static int ranges_check(const struct run_view *v, const struct graph *g, uint64_t *total, uint64_t *last_feedback,
                        uint16_t *index_out)
{
        *total = *last_feedback = 0;
        for (unsigned i = 0; i < v->run->nranges; i++) {
                int rc = range_check(&v->ranges[i], g, i);

                if (rc < 0) {
                        *index_out = (uint16_t)i;
                        return rc;
                }
                *total += v->ranges[i].repeat;
                if (v->ranges[i].feedback)
                        *last_feedback = *total - 1;
        }
        if (*total > RUN_REPEAT_MAX)
                return err_set(-EINVAL, "RUN: %" PRIu64 " iterations in all, at most %u", *total, RUN_REPEAT_MAX);
        return 0;
}

static int feedback_check(const struct run_feedback *f, const struct graph *g, uint64_t last, unsigned i)
{
        uint64_t farthest = f->src_off;
        int rc;

        rc = tensor_check(g, f->src, MAY_READ, "source of feedback", i);
        if (rc < 0)
                return rc;
        rc = tensor_check(g, f->dst, MAY_WRITE, "destination of feedback", i);
        if (rc < 0)
                return rc;
        if (f->src == f->dst)
                return err_set(-EINVAL, "RUN: feedback %u goes from tensor %u to itself", i, f->src);
        if (last > 0)
                farthest += (last - 1) * f->src_step; /* below 2^48: no overflow */
        rc = piece_check(g, f->src, farthest, f->len, "source of feedback", i);
        if (rc < 0)
                return rc;
        return piece_check(g, f->dst, 0, f->len, "destination of feedback", i);
}

static int input_check(const struct run_input *in, const struct run_view *v, const struct graph *g, bool blobs,
                       unsigned i)
{
        int rc = tensor_check(g, in->tensor, MAY_WRITE, "input", i);

        if (rc < 0)
                return rc;
        if (blobs ? in->flags != 0 : in->flags != INPUT_INLINE && in->flags != INPUT_WRITTEN)
                return err_set(-EINVAL, "RUN: input %u: flags %#x, expected %s", i, in->flags,
                               blobs ? "none" : "inline or written");
        if (in->flags == INPUT_INLINE && !within(in->offset, in->len, v->run->inline_len))
                return err_set(-EINVAL, "RUN: input %u: [%" PRIu64 ", +%" PRIu64 ") is outside the %u inline bytes", i,
                               in->offset, in->len, v->run->inline_len);
        return piece_check(g, in->tensor, in->tensor_off, in->len, "input", i);
}

static int output_region_check(const struct run_output *o, uint64_t total, const uint64_t *region_len,
                               unsigned nregions, unsigned i)
{
        uint64_t end = o->len;

        if (o->region >= nregions)
                return err_set(-EINVAL, "RUN: output %u: region %u was not given (%u were)", i, o->region, nregions);
        if (o->flags & OUTPUT_EACH)
                end += (total - 1) * o->step; /* len is within a tensor, the rest below 2^48: no overflow */
        if (!within(o->region_off, end, region_len[o->region]))
                return err_set(-EINVAL, "RUN: output %u: [%" PRIu64 ", +%" PRIu64 ") is outside region %u of %" PRIu64,
                               i, o->region_off, end, o->region, region_len[o->region]);
        return 0;
}

static int output_check(const struct run_output *o, const struct graph *g, uint64_t total, const uint64_t *region_len,
                        unsigned nregions, unsigned i)
{
        int rc = tensor_check(g, o->tensor, MAY_READ, "output", i);

        if (rc < 0)
                return rc;
        if (o->flags & ~OUTPUT_EACH)
                return err_set(-EINVAL, "RUN: output %u: unknown flags %#x", i, o->flags);
        if (!(o->flags & OUTPUT_EACH) && o->step != 0)
                return err_set(-EINVAL, "RUN: output %u: a step of %u without OUTPUT_EACH", i, o->step);
        rc = piece_check(g, o->tensor, o->tensor_off, o->len, "output", i);
        if (rc < 0 || !region_len)
                return rc;
        return output_region_check(o, total, region_len, nregions, i);
}

static int flop_check(const struct run_view *v, const struct graph *g, double limit, uint16_t *index_out)
{
        double flop = 0;

        for (unsigned i = 0; i < v->run->nranges; i++) {
                const struct run_range *r = &v->ranges[i];
                struct graph_cost cost;
                int rc = graph_cost(g, r->rows, r->first, r->count, g->h->context_max, &cost);

                if (rc < 0) {
                        *index_out = (uint16_t)i;
                        return rc;
                }
                flop += cost.flop * r->repeat;
                if (flop <= limit)
                        continue;
                *index_out = (uint16_t)i;
                return err_set(-EINVAL, "RUN: up to range %u the program costs %.3g FLOP, the limit is %.3g", i, flop,
                               limit);
        }
        return 0;
}

static int operands_check(const struct run_view *v, const struct graph *g, uint64_t total, uint64_t last_feedback,
                          const uint64_t *region_len, unsigned nregions, uint16_t *index_out)
{
        unsigned i = 0;
        int rc = 0;

        for (unsigned k = 0; k < v->run->nfeedback && rc >= 0; k++)
                rc = feedback_check(&v->feedback[k], g, last_feedback, i = k);
        for (unsigned k = 0; k < v->run->ninputs && rc >= 0; k++)
                rc = input_check(&v->inputs[k], v, g, region_len == NULL, i = k);
        for (unsigned k = 0; k < v->run->noutputs && rc >= 0; k++)
                rc = output_check(&v->outputs[k], g, total, region_len, nregions, i = k);
        if (rc < 0)
                *index_out = (uint16_t)i;
        return rc < 0 ? rc : 0;
}

int msg_run_check(const struct run_view *v, const struct graph *g, const uint64_t *region_len, unsigned nregions,
                  double flop_limit, uint16_t *index_out)
{
        uint64_t total, last_feedback;
        int rc;

        *index_out = 0xffff;
        if (v->run->h.flags & ~RUN_FLAGS)
                return err_set(-EINVAL, "RUN: unknown flags %#x", v->run->h.flags & ~RUN_FLAGS);
        if (v->run->run_class >= RUN_CLASSES)
                return err_set(-EINVAL, "RUN: class %u, expected below %d", v->run->run_class, RUN_CLASSES);
        if (v->run->reserved != 0)
                return err_set(-EINVAL, "RUN: reserved is %u, expected 0", v->run->reserved);
        rc = ranges_check(v, g, &total, &last_feedback, index_out);
        if (rc < 0)
                return rc;
        rc = operands_check(v, g, total, last_feedback, region_len, nregions, index_out);
        if (rc < 0)
                return rc;
        return flop_limit > 0 ? flop_check(v, g, flop_limit, index_out) : 0;
}
