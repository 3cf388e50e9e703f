/*
 * The semantically rich graph: flat arrays in execution order, fixed width and little endian, so that the arrays are
 * what crosses the wire (protocol LOAD) after graph_validate(). Builders annotate while building, for they alone know
 * what a tensor is for; graph_blind() takes the annotation away again.
 *
 * One dimension may be symbolic: GRAPH_ROWS, the number of new positions (per sequence) that a call brings. A call
 * names segments (runs of nodes) and a value for it: a prefill is rows = prompt length, a decode step rows = 1, a
 * recomputation rows = whole history.
 */
#ifndef DJINN_WORKLOADS_GRAPH_H
#define DJINN_WORKLOADS_GRAPH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "op.h"

#define GRAPH_MAGIC       0x4e4a4447u   /* "GDJN" */
#define GRAPH_ROWS        (-1)          /* rows per sequence (1-D ids [batch*rows] use GRAPH_BATCH_ROWS) */
#define GRAPH_BATCH_ROWS  (-2)          /* batch * rows */
#define GRAPH_NONE        0xffffu
#define GRAPH_TENSORS_MAX 8192u
#define GRAPH_NODES_MAX   8192u
#define GRAPH_RECIPES_MAX 16384u
#define GRAPH_SEGMENTS_MAX 16u
#define GRAPH_NAME_MAX    64
#define GRAPH_BYTES_MAX   (8u << 20)

enum graph_residency {
        RES_WEIGHT,     /* the same for every request */
        RES_STATE,      /* outlives a call (KV cache); after graph_blind(): an input that nodes may also write */
        RES_ACTIVATION, /* dies inside a call */
        RES_CONSTANT,
        RES_INPUT,      /* written by the caller; nodes may write it too (the cursor; caches of a blind graph) */
        RES_OUTPUT,
        RES_COUNT
};

enum graph_phase { PHASE_PREFILL = 1, PHASE_DECODE = 2, PHASE_FORWARD = 4 };    /* a node's may be several */

/* What the application knows its tensors as: how a driver feeds the graph. Not used by the server. */
enum graph_role {
        ROLE_IDS,       /* I32[batch*rows] in */
        ROLE_CURSOR,    /* I32[2] in: {position, emitted} */
        ROLE_FORCED,    /* I32[steps,batch] in: tokens to feed instead of the chosen ones (check pass) */
        ROLE_TOKEN,     /* I32[batch]: chosen in this step */
        ROLE_TOKENS,    /* I32[steps,batch] out: all chosen so far */
        ROLE_LAST,      /* F32[batch,V] out: logits of the last position */
        ROLE_ALL,       /* F32[batch*rows,V] out: logits of every position */
        ROLE_INPUT,     /* feed-forward models: the input */
        ROLE_OUTPUT,    /* feed-forward models: the output */
        ROLE_COUNT
};

enum graph_segment_kind {
        SEG_BODY,       /* inputs -> hidden rows (feed-forward: -> output) */
        SEG_LAST,       /* last hidden row -> ROLE_LAST */
        SEG_CHOOSE,     /* ROLE_LAST -> ROLE_TOKEN, ROLE_TOKENS, cursor */
        SEG_ALL,        /* hidden rows -> ROLE_ALL */
        SEG_KINDS
};

struct graph_tensor {
        char name[GRAPH_NAME_MAX];      /* NUL-terminated */
        int64_t dims[OP_DIMS_MAX];      /* > 0, or GRAPH_ROWS / GRAPH_BATCH_ROWS in the first dimension only */
        uint8_t dtype;                  /* enum op_dtype */
        uint8_t ndim;
        uint8_t residency;              /* enum graph_residency */
        int8_t seq_axis;                /* state: the axis that grows with the history (caches [B,C,W]: 1); else -1 */
        uint16_t recipe;                /* weights: first recipe; else GRAPH_NONE */
        uint16_t reserved;
};
_Static_assert(sizeof(struct graph_tensor) == 104, "wire format");

struct graph_node {
        uint16_t code;                  /* enum op_code */
        uint8_t phase;                  /* set of enum graph_phase; 0 after graph_blind() */
        uint8_t reserved0;
        uint16_t arg[OP_ARGS_MAX];      /* tensor index, GRAPH_NONE: absent */
        struct op_attr attr;
};
_Static_assert(sizeof(struct graph_node) == 64, "wire format");

/* How one weight comes from a checkpoint: a chain of pieces, concatenated along `axis` of the result. */
enum graph_synth { SYNTH_NORMAL, SYNTH_ZERO, SYNTH_ONE };

struct graph_recipe {
        char source[96];                /* tensor's name in the checkpoint */
        uint32_t slice_start, slice_len;/* along the source's axis 0 after transposing; len 0: all */
        uint8_t transpose;              /* 2-D source stored [in,out] */
        uint8_t axis;                   /* of concatenation */
        uint8_t synth;                  /* enum graph_synth, without a checkpoint */
        uint8_t reserved;
        uint16_t next;                  /* next piece, GRAPH_NONE: last */
        uint16_t reserved2;
        float synth_scale, synth_bias;  /* value = bias + scale * noise(seed, hash of source, index) */
        uint32_t fold;                  /* reserved for folding (batch norm); 0 */
};
_Static_assert(sizeof(struct graph_recipe) == 124, "wire format");

struct graph_segment {
        uint32_t first, count;          /* nodes */
        uint8_t kind;                   /* enum graph_segment_kind */
        uint8_t phase;
        uint8_t reserved[6];
};
_Static_assert(sizeof(struct graph_segment) == 16, "wire format");

struct graph_header {
        uint32_t magic, total_bytes;
        uint32_t ntensors, nnodes, nrecipes, nsegments;
        uint32_t batch;                 /* sequences, >= 1 */
        uint32_t rows_max;              /* largest legal value of GRAPH_ROWS; feed-forward models run with just that */
        uint32_t context_max;           /* C of the caches, 0 without state */
        uint32_t vocab;                 /* 0 where there is none */
        uint16_t role[ROLE_COUNT];      /* tensor index or GRAPH_NONE */
        uint8_t blind;                  /* 1: phase and residency were stripped */
        uint8_t dtype;                  /* of weights and activations */
        char name[GRAPH_NAME_MAX];      /* for people; the server prints it and never decides by it */
        char prefix[32];                /* a source that is not in the checkpoint is tried again as prefix + source */
        uint8_t reserved[4];
};
_Static_assert(sizeof(struct graph_header) == 160, "wire format");

/* One block of memory: header, tensors, nodes, recipes, segments in this order. */
struct graph {
        struct graph_header *h;         /* start of the block, total_bytes long */
        struct graph_tensor *tensors;
        struct graph_node *nodes;
        struct graph_recipe *recipes;
        struct graph_segment *segments;
};

/* Copies an untrusted block and checks everything in it: counts, sizes, names terminated, indices, definition before
 * use inside the node order, residencies (weights and constants are never written; inputs may be: the cursor, the caches
 * of a blind graph; activations and outputs are written before they are read, but the first access to an output may be
 * in-and-out, as of ROLE_TOKENS, so outputs begin zeroed), no tensor written by a node that is another operand of it,
 * op_check on every node with rows = 1 and rows_max. 0 or -EINVAL with a sentence. */
int graph_from_wire(const void *block, size_t len, struct graph *out);
void graph_free(struct graph *g);
int graph_clone(const struct graph *g, struct graph *out);
/* Strips phase and residency down to constant, input, output (and what lies between): RES_WEIGHT becomes RES_CONSTANT
 * (still made by its recipes), RES_STATE becomes RES_INPUT that nodes may write and a caller may name as output,
 * seq_axis -1, phases 0, h->blind 1. Storage rule for everybody: only RES_ACTIVATION lives in scratch; every other
 * tensor has storage of its own that stays from call to call. In place. */
void graph_blind(struct graph *g);
const struct graph_segment *graph_segment(const struct graph *g, enum graph_segment_kind kind);  /* NULL: none */

/* Bytes of tensor t with this many rows; dims resolved into out_dims (may be NULL). */
size_t graph_tensor_bytes(const struct graph *g, unsigned t, uint32_t rows, int64_t out_dims[OP_DIMS_MAX]);

/* XXH3-128 of the block: identity of a graph. */
struct digest;

/* ---- building ---- */

struct graph_builder;
struct graph_builder *gb_new(const char *name, uint32_t batch, uint32_t rows_max, uint32_t context_max,
                             enum op_dtype dtype);
/* Tensor with `ndim` dims; returns its index. Errors are sticky and come out of gb_finish. */
unsigned gb_tensor(struct graph_builder *b, const char *name, enum op_dtype dtype, enum graph_residency res, int ndim,
                   const int64_t *dims);
/* First recipe of weight t, or another piece of it. */
void gb_recipe(struct graph_builder *b, unsigned t, const struct graph_recipe *piece);
void gb_seq_axis(struct graph_builder *b, unsigned t, int axis);
/* The activation t is what the model returns: its residency becomes RES_OUTPUT. */
void gb_output(struct graph_builder *b, unsigned t);
void gb_role(struct graph_builder *b, enum graph_role role, unsigned t);
void gb_segment(struct graph_builder *b, enum graph_segment_kind kind, uint8_t phase);   /* nodes from here on */
void gb_node(struct graph_builder *b, enum op_code code, const struct op_attr *attr, unsigned nargs,
             const unsigned *args);
void gb_prefix(struct graph_builder *b, const char *prefix);
void gb_vocab(struct graph_builder *b, uint32_t vocab);
/* Frees b. 0, or -EINVAL / -ENOMEM with a sentence. */
int gb_finish(struct graph_builder *b, struct graph *out);

/* ---- binding: graph + rows + addresses -> instructions for a device (bind.c) ---- */

/* Offsets of all activations in one scratch block for this value of rows, the same for every range of nodes (so that
 * consecutive calls may hand activations on); tensors whose lives do not overlap share bytes. offsets: one per tensor,
 * multiples of 64; SIZE_MAX for tensors that are not activations and for activations that no node touches. Liveness runs
 * over the whole node order. One allocation, freed on return; ten microseconds for a hundred nodes together with
 * graph_bind. */
int graph_scratch(const struct graph *g, uint32_t rows, size_t *offsets, size_t *total_bytes);

struct graph_binding {
        const struct graph *g;
        uint32_t rows;
        uint32_t first, count;          /* nodes */
        void *const *addr;              /* per tensor: device address of everything that is not an activation */
        void *scratch;                  /* device address */
        const size_t *offsets;          /* from graph_scratch */
        bool fuse;                      /* LINEAR [ACT] [ADD] where the tensors between have one reader, in range */
};

/* Writes at most max instructions to out; returns how many, or -errno with a sentence (a tensor without address). */
int graph_bind(const struct graph_binding *b, struct op_inst *out, size_t max);

/* Work of a range with `past` positions in the caches: flop, bytes, weight bytes; head: only LINEAR nodes whose output
 * is ROLE_LAST or ROLE_ALL are counted into head_*. Addresses are not needed. */
struct graph_cost {
        double flop, bytes, weight_bytes;
        double head_flop, head_weight_bytes;
        uint32_t ops;
};
int graph_cost(const struct graph *g, uint32_t rows, uint32_t first, uint32_t count, int64_t past,
               struct graph_cost *out);

#endif
