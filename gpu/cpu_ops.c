/*
 * Everything is computed in fp32. An operand of 16 bits is widened into scratch piece by piece, an output of 16 bits is
 * computed in scratch and rounded once; fp32 operands are used where they lie. Products go to oneDNN.
 */
#include "cpu_ops.h"

#include <dnnl.h>
#include <errno.h>
#include <limits.h>
#include <math.h>
#include <string.h>

#define CHUNK        2048  /* elements of a row-less op at a time: three of them stay in the first cache */
#define TILE         65536 /* elements of widened weights at a time: they stay in the second cache */
#define QUERY_ROWS   64    /* query rows of one head at a time */
#define PRODUCT_ROWS 4     /* from so many query rows on the library is faster than one row after the other */

static size_t min_size(size_t a, size_t b)
{
        return a < b ? a : b;
}

static size_t max_size(size_t a, size_t b)
{
        return a > b ? a : b;
}

static int64_t clamp(int64_t v, int64_t lo, int64_t hi)
{
        return v < lo ? lo : v > hi ? hi : v;
}

static void *element(const struct op_arg *a, size_t at)
{
        return (char *)a->data + at * op_dtype_bytes(a->dtype);
}

/* Elements at..at+n as fp32: where they lie, or widened into room. NULL for an absent operand. */
static const float *fetch(const struct cpu_step *s, const struct op_arg *a, size_t at, size_t n, float *room)
{
        if (!a->data || a->dtype == DT_F32)
                return a->data ? (const float *)a->data + at : NULL;
        if (a->dtype == DT_F16)
                s->kernels->f32_of_f16(room, element(a, at), n);
        else
                s->kernels->f32_of_bf16(room, element(a, at), n);
        return room;
}

/* Where to compute elements at... of an output: in place, or in room and then commit(). */
static float *target(const struct op_arg *a, size_t at, float *room)
{
        return a->dtype == DT_F32 ? (float *)a->data + at : room;
}

static void commit(const struct cpu_step *s, const struct op_arg *a, size_t at, size_t n, const float *from)
{
        if (a->dtype == DT_F16)
                s->kernels->f16_of_f32(element(a, at), from, n);
        else if (a->dtype == DT_BF16)
                s->kernels->bf16_of_f32(element(a, at), from, n);
}

static int cpu_copy(const struct cpu_step *s)
{
        memmove(s->inst.arg[0].data, s->inst.arg[1].data, op_arg_bytes(&s->inst.arg[0]));
        return 0;
}

static int cpu_embed(const struct cpu_step *s)
{
        const struct op_arg *out = &s->inst.arg[0], *table = &s->inst.arg[2], *pos = &s->inst.arg[3];
        const int32_t *ids = s->inst.arg[1].data, *cursor = s->inst.arg[4].data;
        size_t width = (size_t)out->dims[1];
        int64_t rows = out->dims[0] / s->inst.attr.batch;
        int64_t first = pos->data ? clamp(cursor[0], 0, pos->dims[0]) : 0;

        for (int64_t r = 0; r < out->dims[0]; r++) {
                float *to = target(out, (size_t)r * width, s->scratch);
                int64_t p = first + r % rows;

                if (ids[r] < 0 || ids[r] >= table->dims[0] || (pos->data && p >= pos->dims[0])) {
                        for (size_t i = 0; i < width; i++)
                                to[i] = NAN;
                } else {
                        const float *row = fetch(s, table, (size_t)ids[r] * width, width, s->scratch + width);
                        const float *add = fetch(s, pos, (size_t)p * width, width, s->scratch + 2 * width);

                        s->kernels->finish(to, row, NULL, add, width, ACT_NONE);
                }
                commit(s, out, (size_t)r * width, width, to);
        }
        return 0;
}

static size_t embed_scratch(const struct op_inst *inst)
{
        return 3 * (size_t)inst->arg[0].dims[1];
}

static int cpu_layernorm(const struct cpu_step *s)
{
        const struct op_arg *out = &s->inst.arg[0], *x = &s->inst.arg[1];
        size_t width = (size_t)x->dims[1];
        const float *gamma = fetch(s, &s->inst.arg[2], 0, width, s->scratch);
        const float *beta = fetch(s, &s->inst.arg[3], 0, width, s->scratch + width);

        for (size_t at = 0; at < (size_t)x->dims[0] * width; at += width) {
                const float *row = fetch(s, x, at, width, s->scratch + 2 * width);
                float *to = target(out, at, s->scratch + 3 * width);

                s->kernels->layernorm(to, row, gamma, beta, width, s->inst.attr.eps);
                commit(s, out, at, width, to);
        }
        return 0;
}

static size_t layernorm_scratch(const struct op_inst *inst)
{
        return 4 * (size_t)inst->arg[1].dims[1];
}

/* How a LINEAR is cut: columns [0, N) in tiles, each tile's product in scratch unless it may lie in the output. */
struct linear_cut {
        size_t rows, k, n, tile;
        bool direct;
};

static struct linear_cut linear_cut(const struct op_inst *inst)
{
        const struct op_arg *a = inst->arg;
        struct linear_cut c = {(size_t)a[1].dims[0], (size_t)a[1].dims[1], (size_t)a[2].dims[0], 0, false};

        /* In place over the residual the product must not destroy what is still to be added. */
        c.direct = a[0].dtype == DT_F32 && a[2].dtype == DT_F32 && a[0].data != a[4].data;
        c.tile = c.direct ? c.n : min_size(c.n, max_size(TILE / c.k, 16));
        return c;
}

static size_t linear_scratch(const struct op_inst *inst)
{
        struct linear_cut c = linear_cut(inst);

        if (c.direct)
                return 0;
        return c.rows * c.k + c.tile * c.k + c.rows * c.tile + 3 * c.tile;
}

/* y[rows, n] (rows ldy apart) = x[rows, k] w[n, k]^T */
static int product(const struct cpu_step *s, const float *x, const float *w, float *y, size_t rows, size_t k, size_t n,
                   size_t ldy)
{
        if (rows == 1 && k <= NARROW_K_MAX) {
                s->kernels->narrow(y, x, w, n, k);
                return 0;
        }
        return dnnl_sgemm('N', 'T', (dnnl_dim_t)rows, (dnnl_dim_t)n, (dnnl_dim_t)k, 1.0f, x, (dnnl_dim_t)k, w,
                          (dnnl_dim_t)k, 0.0f, y, (dnnl_dim_t)ldy) == dnnl_success
                   ? 0
                   : -ENOMEM;
}

static int linear_direct(const struct cpu_step *s, const struct linear_cut *c)
{
        const struct op_arg *a = s->inst.arg;
        float *y = a[0].data;
        const float *bias = a[3].data, *residual = a[4].data;
        int rc = product(s, a[1].data, a[2].data, y, c->rows, c->k, c->n, c->n);

        if (rc < 0 || (!bias && !residual && s->inst.attr.act == ACT_NONE))
                return rc;
        for (size_t at = 0; at < c->rows * c->n; at += c->n)
                s->kernels->finish(y + at, y + at, bias, residual ? residual + at : NULL, c->n, s->inst.attr.act);
        return 0;
}

/* Columns at..at+n. room: weights, product, then bias, residual and result of one row. */
static int linear_tile(const struct cpu_step *s, const struct linear_cut *c, const float *x, size_t at, size_t n,
                       float *room)
{
        const struct op_arg *a = s->inst.arg;
        float *y = room + c->tile * c->k, *row = y + c->rows * c->tile;
        const float *w = fetch(s, &a[2], at * c->k, n * c->k, room);
        const float *bias = fetch(s, &a[3], at, n, row);
        int rc = product(s, x, w, y, c->rows, c->k, n, n);

        for (size_t r = 0; rc == 0 && r < c->rows; r++) {
                const float *residual = fetch(s, &a[4], r * c->n + at, n, row + c->tile);
                float *to = target(&a[0], r * c->n + at, row + 2 * c->tile);

                s->kernels->finish(to, y + r * n, bias, residual, n, s->inst.attr.act);
                commit(s, &a[0], r * c->n + at, n, to);
        }
        return rc;
}

static int cpu_linear(const struct cpu_step *s)
{
        struct linear_cut c = linear_cut(&s->inst);
        int rc = 0;

        if (c.direct)
                return linear_direct(s, &c);
        const float *x = fetch(s, &s->inst.arg[1], 0, c.rows * c.k, s->scratch);

        for (size_t at = 0; rc == 0 && at < c.n; at += c.tile)
                rc = linear_tile(s, &c, x, at, min_size(c.tile, c.n - at), s->scratch + c.rows * c.k);
        return rc;
}

/* ACT and ADD: b may be absent. */
static int elementwise(const struct cpu_step *s, const struct op_arg *b, int act)
{
        const struct op_arg *out = &s->inst.arg[0], *a = &s->inst.arg[1];
        size_t n = (size_t)op_arg_elems(out), most = out->dtype == DT_F32 ? n : CHUNK;

        for (size_t at = 0; at < n; at += most) {
                size_t len = min_size(most, n - at);
                float *to = target(out, at, s->scratch);
                const float *x = fetch(s, a, at, len, s->scratch + CHUNK);
                const float *y = b ? fetch(s, b, at, len, s->scratch + 2 * CHUNK) : NULL;

                s->kernels->finish(to, x, NULL, y, len, act);
                commit(s, out, at, len, to);
        }
        return 0;
}

static int cpu_act(const struct cpu_step *s)
{
        return elementwise(s, NULL, s->inst.attr.act);
}

static int cpu_add(const struct cpu_step *s)
{
        return elementwise(s, &s->inst.arg[2], ACT_NONE);
}

static size_t chunk_scratch(const struct op_inst *inst)
{
        return 3 * CHUNK;
}

static int cpu_kv_append(const struct cpu_step *s)
{
        const struct op_arg *kc = &s->inst.arg[0], *vc = &s->inst.arg[1], *qkv = &s->inst.arg[2];
        const int32_t *cursor = s->inst.arg[3].data;
        int64_t capacity = kc->dims[1], width = kc->dims[2], rows = qkv->dims[0] / s->inst.attr.batch;
        int64_t first = clamp(cursor[0], 0, capacity), stored = clamp(rows, 0, capacity - first);
        int64_t q = (int64_t)s->inst.attr.heads * s->inst.attr.head_dim;
        size_t bytes = (size_t)width * op_dtype_bytes(kc->dtype);

        for (int64_t b = 0; b < s->inst.attr.batch; b++) {
                for (int64_t r = 0; r < stored; r++) {
                        size_t from = (size_t)((b * rows + r) * qkv->dims[1] + q);
                        size_t to = (size_t)((b * capacity + first + r) * width);

                        memcpy(element(kc, to), element(qkv, from), bytes);
                        memcpy(element(vc, to), element(qkv, from + (size_t)width), bytes);
                }
        }
        return 0;
}

/* ---- attention ---- */

/* Rows of one head as fp32, `stride` elements apart. */
struct rows {
        const float *at;
        size_t stride;
};

/* One head of one sequence, cut into blocks of query rows. */
struct head {
        struct rows q, k, v;
        float *out;
        size_t out_stride, dim;
        size_t first; /* positions that row 0 sees besides its own */
        size_t span;  /* positions that the last row sees */
        bool causal;
        float scale;
        float *weight; /* QUERY_ROWS x span */
};

static size_t seen(const struct head *h, size_t row)
{
        return h->causal ? min_size(h->first + row + 1, h->span) : h->span;
}

static void attend_row(const struct cpu_step *s, const struct head *h, size_t row)
{
        size_t n = seen(h, row);
        float *out = h->out + row * h->out_stride;

        s->kernels->scores(h->weight, h->q.at + row * h->q.stride, h->k.at, h->k.stride, n, h->dim, h->scale);
        s->kernels->softmax(h->weight, n);
        s->kernels->mix(out, h->weight, h->v.at, h->v.stride, n, h->dim);
}

/* A weight of 0 hides a position from the product only while its values are finite. */
static bool block_maskable(const struct cpu_step *s, const struct head *h, size_t from, size_t to)
{
        for (size_t p = from; p < to; p++)
                if (!s->kernels->finite(h->v.at + p * h->v.stride, h->dim))
                        return false;
        return true;
}

/* Rows first..first+n as two products with the softmax between them. */
static int attend_block(const struct cpu_step *s, const struct head *h, size_t first, size_t n)
{
        size_t span = seen(h, first + n - 1);
        dnnl_dim_t rows = (dnnl_dim_t)n, cols = (dnnl_dim_t)span, dim = (dnnl_dim_t)h->dim;
        float *out = h->out + first * h->out_stride;
        dnnl_status_t st = dnnl_sgemm('N', 'T', rows, cols, dim, h->scale, h->q.at + first * h->q.stride,
                                      (dnnl_dim_t)h->q.stride, h->k.at, (dnnl_dim_t)h->k.stride, 0.0f, h->weight, cols);

        for (size_t r = 0; st == dnnl_success && r < n; r++) {
                float *weight = h->weight + r * span;
                size_t visible = seen(h, first + r);

                s->kernels->softmax(weight, visible);
                memset(weight + visible, 0, (span - visible) * sizeof(weight[0]));
        }
        if (st == dnnl_success)
                st = dnnl_sgemm('N', 'N', rows, dim, cols, 1.0f, h->weight, cols, h->v.at, (dnnl_dim_t)h->v.stride,
                                0.0f, out, (dnnl_dim_t)h->out_stride);
        return st == dnnl_success ? 0 : -ENOMEM;
}

static int attend(const struct cpu_step *s, const struct head *h, size_t rows)
{
        int rc = 0;

        for (size_t first = 0; rc == 0 && first < rows; first += QUERY_ROWS) {
                size_t n = min_size(QUERY_ROWS, rows - first);

                if (n >= PRODUCT_ROWS && block_maskable(s, h, seen(h, first), seen(h, first + n - 1)))
                        rc = attend_block(s, h, first, n);
                else
                        for (size_t r = first; r < first + n; r++)
                                attend_row(s, h, r);
        }
        return rc;
}

/* n rows of `dim` elements as fp32: where they lie, or gathered into *room, which moves on. */
static struct rows fetch_rows(const struct cpu_step *s, const struct op_arg *a, size_t at, size_t stride, size_t n,
                              size_t dim, float **room)
{
        struct rows gathered = {*room, dim};

        if (a->dtype == DT_F32)
                return (struct rows){(const float *)a->data + at, stride};
        for (size_t r = 0; r < n; r++)
                fetch(s, a, at + r * stride, dim, *room + r * dim);
        *room += n * dim;
        return gathered;
}

struct attention {
        size_t batch, rows, heads, kv_heads, dim;
        size_t span;     /* positions that are seen at all */
        size_t capacity; /* rows of k and v per sequence */
};

static struct attention attention_sizes(const struct op_inst *inst)
{
        const struct op_attr *at = &inst->attr;
        struct attention n = {
            (size_t)at->batch, 0, (size_t)at->heads, (size_t)at->kv_heads, (size_t)at->head_dim, 0, 0};

        n.rows = (size_t)inst->arg[1].dims[0] / n.batch;
        n.capacity = inst->arg[2].data ? (size_t)inst->arg[2].dims[1] : n.rows;
        n.span = n.capacity;
        return n;
}

/* Weights of a block; k and v of a head; q and out of a head. */
static size_t attention_scratch(const struct op_inst *inst)
{
        struct attention n = attention_sizes(inst);

        return min_size(n.rows, QUERY_ROWS) * n.capacity + 2 * n.capacity * n.dim + 2 * n.rows * n.dim;
}

/* The query heads that share kv head g of sequence b. */
static int attend_group(const struct cpu_step *s, const struct attention *n, struct head h, size_t b, size_t g)
{
        const struct op_arg *out = &s->inst.arg[0], *qkv = &s->inst.arg[1];
        const struct op_arg *k = s->inst.arg[2].data ? &s->inst.arg[2] : qkv;
        const struct op_arg *v = s->inst.arg[3].data ? &s->inst.arg[3] : qkv;
        size_t width = (size_t)qkv->dims[1], out_width = n->heads * n->dim, group = n->heads / n->kv_heads;
        size_t kv_width = k == qkv ? width : n->kv_heads * n->dim;
        size_t k_at = b * n->capacity * kv_width + (k == qkv ? out_width : 0) + g * n->dim;
        size_t v_at = k == qkv ? k_at + n->kv_heads * n->dim : k_at;
        float *room = s->scratch + min_size(n->rows, QUERY_ROWS) * n->capacity;
        int rc = 0;

        h.k = fetch_rows(s, k, k_at, kv_width, n->span, n->dim, &room);
        h.v = fetch_rows(s, v, v_at, kv_width, n->span, n->dim, &room);
        for (size_t head = g * group; rc == 0 && head < (g + 1) * group; head++) {
                size_t out_at = b * n->rows * out_width + head * n->dim;
                float *room_q = room;

                h.q = fetch_rows(s, qkv, b * n->rows * width + head * n->dim, width, n->rows, n->dim, &room_q);
                h.out = target(out, out_at, room_q);
                h.out_stride = out->dtype == DT_F32 ? out_width : n->dim;
                rc = attend(s, &h, n->rows);
                for (size_t r = 0; rc == 0 && out->dtype != DT_F32 && r < n->rows; r++)
                        commit(s, out, out_at + r * out_width, n->dim, h.out + r * n->dim);
        }
        return rc;
}

static int cpu_attention(const struct cpu_step *s)
{
        struct attention n = attention_sizes(&s->inst);
        struct head h = {.dim = n.dim, .scale = s->inst.attr.scale, .weight = s->scratch};
        bool cached = s->inst.arg[2].data != NULL;
        int rc = 0;

        h.causal = cached || s->inst.attr.causal;
        if (cached) {
                const int32_t *cursor = s->inst.arg[4].data;

                h.first = (size_t)clamp(cursor[0], 0, (int64_t)n.capacity);
                n.span = min_size(h.first + n.rows, n.capacity);
        }
        h.span = n.span;
        for (size_t b = 0; b < n.batch; b++)
                for (size_t g = 0; rc == 0 && g < n.kv_heads; g++)
                        rc = attend_group(s, &n, h, b, g);
        return rc;
}

/* ---- choosing ---- */

static int cpu_last_row(const struct cpu_step *s)
{
        const struct op_arg *out = &s->inst.arg[0], *x = &s->inst.arg[1];
        size_t batch = (size_t)s->inst.attr.batch, rows = (size_t)x->dims[0] / batch, width = (size_t)x->dims[1];

        for (size_t b = 0; b < batch; b++)
                memcpy(element(out, b * width), element(x, (b * rows + rows - 1) * width),
                       width * op_dtype_bytes(x->dtype));
        return 0;
}

static int cpu_argmax(const struct cpu_step *s)
{
        const struct op_arg *logits = &s->inst.arg[1];
        int32_t *token = s->inst.arg[0].data;
        size_t vocab = (size_t)logits->dims[1];

        for (size_t b = 0; b < (size_t)logits->dims[0]; b++)
                token[b] = (int32_t)s->kernels->argmax(fetch(s, logits, b * vocab, vocab, s->scratch), vocab);
        return 0;
}

static size_t argmax_scratch(const struct op_inst *inst)
{
        return inst->arg[1].dtype == DT_F32 ? 0 : (size_t)inst->arg[1].dims[1];
}

static int cpu_emit(const struct cpu_step *s)
{
        const struct op_arg *tokens = &s->inst.arg[0], *token = &s->inst.arg[2];
        int32_t *cursor = s->inst.arg[1].data;

        if (cursor[1] >= 0 && cursor[1] < tokens->dims[0])
                memcpy(element(tokens, (size_t)cursor[1] * (size_t)tokens->dims[1]), token->data, op_arg_bytes(token));
        /* Saturating: the numbers may come from a peer. */
        if (__builtin_add_overflow(cursor[0], s->inst.attr.rows, &cursor[0]))
                cursor[0] = INT32_MAX;
        if (__builtin_add_overflow(cursor[1], 1, &cursor[1]))
                cursor[1] = INT32_MAX;
        return 0;
}

static size_t no_scratch(const struct op_inst *inst)
{
        return 0;
}

static const struct {
        int (*run)(const struct cpu_step *s);
        size_t (*scratch)(const struct op_inst *inst);
} ops[OP_COUNT] = {
    [OP_COPY] = {cpu_copy, no_scratch},
    [OP_EMBED] = {cpu_embed, embed_scratch},
    [OP_LAYERNORM] = {cpu_layernorm, layernorm_scratch},
    [OP_LINEAR] = {cpu_linear, linear_scratch},
    [OP_ACT] = {cpu_act, chunk_scratch},
    [OP_ADD] = {cpu_add, chunk_scratch},
    [OP_KV_APPEND] = {cpu_kv_append, no_scratch},
    [OP_ATTENTION] = {cpu_attention, attention_scratch},
    [OP_LAST_ROW] = {cpu_last_row, no_scratch},
    [OP_ARGMAX] = {cpu_argmax, argmax_scratch},
    [OP_EMIT] = {cpu_emit, no_scratch},
};

void cpu_step_init(struct cpu_step *s, const struct op_inst *inst, const struct cpu_kernels *kernels)
{
        *s = (struct cpu_step){.run = ops[inst->code].run, .kernels = kernels, .inst = *inst};
}

size_t cpu_step_scratch(const struct op_inst *inst)
{
        return ops[inst->code].scratch(inst);
}
