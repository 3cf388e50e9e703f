/*
 * The instruction set: what a device can be asked to do. reference.c is the definition of each op in plain C; every
 * device is compared with it op by op and dtype by dtype. Shapes are checked by op_check() before anything runs.
 *
 * Matrices are row-major and dense. R = batch * rows: `rows` new positions of each of `batch` sequences, sequence after
 * sequence. Arithmetic is at least fp32 inside an op; results are rounded once to the dtype of the output.
 *
 * Positions and lengths are device scalars, never immediates, so that one captured graph serves every step:
 * a cursor is I32[2] = {position of the first new row, tokens emitted so far}. Scalars and ids come from peers:
 * a position is clamped to [0, C], an id outside [0, V) gives a row of NaN, and no op ever reads or writes outside its
 * operands.
 */
#ifndef DJINN_GPU_OP_H
#define DJINN_GPU_OP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum op_dtype { DT_F32, DT_F16, DT_BF16, DT_I32, DT_U8, DT_COUNT };

extern const char *const op_dtype_names[DT_COUNT];      /* "float32", "float16", "bfloat16", "int32", "uint8" */
size_t op_dtype_bytes(enum op_dtype t);
/* "float32"/"fp32"/"f32", ...: the dtype, or -1. */
int op_dtype_parse(const char *name);
float op_f16_to_f32(uint16_t h);
uint16_t op_f32_to_f16(float f);        /* round to nearest even */
float op_bf16_to_f32(uint16_t h);
uint16_t op_f32_to_bf16(float f);       /* round to nearest even, NaN stays NaN */

enum op_code {
        /* out, in: the same bytes. */
        OP_COPY,
        /* out[R,H], ids I32[R], table[V,H], positions[P,H] (optional), cursor I32[2]:
         * out[r] = table[ids[r]] + positions[cursor[0] + r % rows]; a position >= P gives NaN. The cursor may be absent
         * where there are no positions. attr.batch */
        OP_EMBED,
        /* out[R,H], x[R,H], gamma[H], beta[H] (optional): (x - mean) / sqrt(var + eps) * gamma + beta. attr.eps */
        OP_LAYERNORM,
        /* out[R,N], x[R,K], w[N,K], bias[N] (optional), residual[R,N] (optional):
         * act(x w^T + bias) + residual. attr.act */
        OP_LINEAR,
        /* out, x: act(x), any shape. attr.act */
        OP_ACT,
        /* out, a, b: a + b, equal shapes. */
        OP_ADD,
        /* kcache[B,C,KV*D], vcache[B,C,KV*D] (both in and out), qkv[R,(Q+2KV)*D], cursor:
         * the k and v rows of each sequence go to positions cursor[0]...; rows past C are not stored.
         * attr.batch, heads Q, kv_heads KV, head_dim D */
        OP_KV_APPEND,
        /* out[R,Q*D], qkv[R,(Q+2KV)*D], kcache (optional), vcache (optional), cursor (optional):
         * softmax(q k^T * scale) v per head, query head h using kv head h / (Q/KV). With caches, row r of a sequence sees
         * positions 0..cursor[0]+r of its cache (which already holds the new rows); without, every row sees
         * all rows of its sequence, or 0..r if attr.causal. attr.batch, heads, kv_heads, head_dim, scale, causal */
        OP_ATTENTION,
        /* out[B,H], x[R,H]: the last row of each sequence. attr.batch */
        OP_LAST_ROW,
        /* token I32[B], logits[B,V]: index of the largest, the lowest on ties; NaN is never larger; all NaN gives 0. */
        OP_ARGMAX,
        /* tokens I32[M,B] (in and out), cursor I32[2] (in and out), token I32[B]:
         * tokens[cursor[1]] = token if cursor[1] < M; then cursor[0] += attr.rows, cursor[1] += 1. */
        OP_EMIT,
        OP_COUNT
};

enum op_act { ACT_NONE, ACT_RELU, ACT_GELU_TANH, ACT_GELU_ERF, ACT_SILU, ACT_COUNT };

#define OP_ARGS_MAX 6
#define OP_DIMS_MAX 4

enum op_role { OP_IN = 1, OP_OUT = 2, OP_INOUT = 3, OP_OPTIONAL = 4 };

struct op_info {
        const char *name;
        uint8_t nargs;
        uint8_t role[OP_ARGS_MAX];      /* enum op_role, in the order of the comment above (outputs first) */
        const char *arg_names[OP_ARGS_MAX];
};

extern const struct op_info op_infos[OP_COUNT];

/* Wire format too (graphs carry it): fixed width, little endian, no padding. */
struct op_attr {
        int32_t batch;          /* sequences; >= 1 */
        int32_t rows;           /* OP_EMIT: positions that this call added per sequence; filled in when binding */
        int32_t heads, kv_heads, head_dim;
        int32_t causal;
        int32_t act;            /* enum op_act */
        float eps, scale;
        int32_t reserved[3];
};
_Static_assert(sizeof(struct op_attr) == 48, "op_attr is part of the wire format");

struct op_arg {
        void *data;             /* device address; NULL: absent (only where optional) */
        enum op_dtype dtype;
        int ndim;
        int64_t dims[OP_DIMS_MAX];
};

struct op_inst {
        enum op_code code;
        struct op_attr attr;
        struct op_arg arg[OP_ARGS_MAX];
};

int64_t op_arg_elems(const struct op_arg *a);
size_t op_arg_bytes(const struct op_arg *a);

/* Shapes, dtypes and attributes fit the op's contract: 0, or -EINVAL with a sentence naming op and argument. Floating
 * operands of one instruction share a dtype, except that the output of LINEAR and the input of ARGMAX may be F32.
 * Every dimension is 1 or more. Addresses are not looked at, but for being there (dev_plan_make looks at them). */
int op_check(const struct op_inst *inst);

/* Work of one instruction when `past` positions are already in the caches. bytes: each operand touched once (caches:
 * only the positions seen). A multiply-add is 2 FLOP. */
struct op_cost {
        double flop, bytes, weight_bytes;
};
struct op_cost op_cost(const struct op_inst *inst, int64_t past);

#endif
