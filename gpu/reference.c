/*
 * The definition of every op, in plain C: one element after the other, sums in double, no library, one thread. What a
 * device computes is right when it agrees with this. Slow on purpose; read it beside op.h.
 */
#include <errno.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "clock.h"
#include "devices.h"
#include "err.h"
#include "host.h"

static double load(const struct op_arg *a, int64_t i)
{
        switch (a->dtype) {
        case DT_F16:
                return (double)op_f16_to_f32(((const uint16_t *)a->data)[i]);
        case DT_BF16:
                return (double)op_bf16_to_f32(((const uint16_t *)a->data)[i]);
        default:
                return (double)((const float *)a->data)[i];
        }
}

static void store(const struct op_arg *a, int64_t i, double v)
{
        switch (a->dtype) {
        case DT_F16:
                ((uint16_t *)a->data)[i] = op_f32_to_f16((float)v);
                break;
        case DT_BF16:
                ((uint16_t *)a->data)[i] = op_f32_to_bf16((float)v);
                break;
        default:
                ((float *)a->data)[i] = (float)v;
        }
}

static void copy_elems(const struct op_arg *to, int64_t to_at, const struct op_arg *from, int64_t from_at, int64_t n)
{
        size_t size = op_dtype_bytes(to->dtype);

        memcpy((char *)to->data + (size_t)to_at * size, (const char *)from->data + (size_t)from_at * size,
               (size_t)n * size);
}

static int64_t clamp(int64_t v, int64_t lo, int64_t hi)
{
        return v < lo ? lo : v > hi ? hi : v;
}

static double act(int kind, double x)
{
        switch (kind) {
        case ACT_RELU:
                return x < 0 ? 0 : x;
        case ACT_GELU_TANH:
                return 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
        case ACT_GELU_ERF:
                return 0.5 * x * erfc(-x / sqrt(2));
        case ACT_SILU:
                return x / (1 + exp(-x));
        default:
                return x;
        }
}

static void ref_copy(const struct op_inst *inst)
{
        memmove(inst->arg[0].data, inst->arg[1].data, op_arg_bytes(&inst->arg[0]));
}

static void ref_embed(const struct op_inst *inst)
{
        const struct op_arg *out = &inst->arg[0], *table = &inst->arg[2], *pos = &inst->arg[3];
        const int32_t *ids = inst->arg[1].data, *cursor = inst->arg[4].data;
        int64_t width = out->dims[1], rows = out->dims[0] / inst->attr.batch;

        for (int64_t r = 0; r < out->dims[0]; r++) {
                int64_t p = pos->data ? clamp(cursor[0], 0, pos->dims[0]) + r % rows : 0;
                bool known = ids[r] >= 0 && ids[r] < table->dims[0] && (!pos->data || p < pos->dims[0]);

                for (int64_t h = 0; h < width; h++) {
                        double v = known ? load(table, ids[r] * width + h) : (double)NAN;

                        if (known && pos->data)
                                v += load(pos, p * width + h);
                        store(out, r * width + h, v);
                }
        }
}

static void ref_layernorm(const struct op_inst *inst)
{
        const struct op_arg *out = &inst->arg[0], *x = &inst->arg[1], *gamma = &inst->arg[2], *beta = &inst->arg[3];
        int64_t width = x->dims[1];

        for (int64_t r = 0; r < x->dims[0]; r++) {
                double mean = 0, var = 0;

                for (int64_t h = 0; h < width; h++)
                        mean += load(x, r * width + h) / (double)width;
                for (int64_t h = 0; h < width; h++) {
                        double d = load(x, r * width + h) - mean;

                        var += d * d / (double)width;
                }
                for (int64_t h = 0; h < width; h++) {
                        double v = (load(x, r * width + h) - mean) / sqrt(var + (double)inst->attr.eps);

                        store(out, r * width + h, v * load(gamma, h) + (beta->data ? load(beta, h) : 0));
                }
        }
}

static void ref_linear(const struct op_inst *inst)
{
        const struct op_arg *out = &inst->arg[0], *x = &inst->arg[1], *w = &inst->arg[2];
        const struct op_arg *bias = &inst->arg[3], *residual = &inst->arg[4];
        int64_t n = out->dims[1], k = x->dims[1];

        for (int64_t r = 0; r < out->dims[0]; r++) {
                for (int64_t c = 0; c < n; c++) {
                        double sum = bias->data ? load(bias, c) : 0;

                        for (int64_t i = 0; i < k; i++)
                                sum += load(x, r * k + i) * load(w, c * k + i);
                        sum = act(inst->attr.act, sum);
                        store(out, r * n + c, sum + (residual->data ? load(residual, r * n + c) : 0));
                }
        }
}

static void ref_act(const struct op_inst *inst)
{
        int64_t n = op_arg_elems(&inst->arg[0]);

        for (int64_t i = 0; i < n; i++)
                store(&inst->arg[0], i, act(inst->attr.act, load(&inst->arg[1], i)));
}

static void ref_add(const struct op_inst *inst)
{
        int64_t n = op_arg_elems(&inst->arg[0]);

        for (int64_t i = 0; i < n; i++)
                store(&inst->arg[0], i, load(&inst->arg[1], i) + load(&inst->arg[2], i));
}

static void ref_kv_append(const struct op_inst *inst)
{
        const struct op_arg *kc = &inst->arg[0], *vc = &inst->arg[1], *qkv = &inst->arg[2];
        const int32_t *cursor = inst->arg[3].data;
        int64_t capacity = kc->dims[1], width = kc->dims[2], q = (int64_t)inst->attr.heads * inst->attr.head_dim;
        int64_t rows = qkv->dims[0] / inst->attr.batch, first = clamp(cursor[0], 0, capacity);

        for (int64_t b = 0; b < inst->attr.batch; b++) {
                for (int64_t r = 0; r < rows && first + r < capacity; r++) {
                        int64_t from = (b * rows + r) * qkv->dims[1] + q;
                        int64_t to = (b * capacity + first + r) * width;

                        copy_elems(kc, to, qkv, from, width);
                        copy_elems(vc, to, qkv, from + width, width);
                }
        }
}

/* Where the keys (and, alike, the values) of one query lie: position p starts at element first + p * stride. */
struct view {
        const struct op_arg *k, *v;
        int64_t k_first, v_first, stride, seen;
};

static struct view attention_view(const struct op_inst *inst, int64_t b, int64_t row, int64_t kv_head)
{
        const struct op_arg *qkv = &inst->arg[1], *kc = &inst->arg[2], *vc = &inst->arg[3];
        const struct op_attr *at = &inst->attr;
        int64_t rows = qkv->dims[0] / at->batch, d = at->head_dim;

        if (kc->data) {
                const int32_t *cursor = inst->arg[4].data;
                int64_t capacity = kc->dims[1], first = b * capacity * kc->dims[2] + kv_head * d;

                return (struct view){kc,    vc,          first,
                                     first, kc->dims[2], clamp(clamp(cursor[0], 0, capacity) + row + 1, 1, capacity)};
        }
        int64_t first = b * rows * qkv->dims[1] + (at->heads + kv_head) * d;

        return (struct view){qkv, qkv, first, first + at->kv_heads * d, qkv->dims[1], at->causal ? row + 1 : rows};
}

/* One query row of one head; weight has room for every position. */
static void attend(const struct op_inst *inst, const struct view *at, int64_t q_first, int64_t out_first,
                   double *weight)
{
        const struct op_arg *qkv = &inst->arg[1];
        int64_t d = inst->attr.head_dim;
        double max = -(double)INFINITY, sum = 0;

        for (int64_t p = 0; p < at->seen; p++) {
                double score = 0;

                for (int64_t i = 0; i < d; i++)
                        score += load(qkv, q_first + i) * load(at->k, at->k_first + p * at->stride + i);
                weight[p] = score * (double)inst->attr.scale;
                max = weight[p] > max ? weight[p] : max;
        }
        for (int64_t p = 0; p < at->seen; p++) {
                weight[p] = exp(weight[p] - max);
                sum += weight[p];
        }
        for (int64_t i = 0; i < d; i++) {
                double v = 0;

                for (int64_t p = 0; p < at->seen; p++)
                        v += weight[p] / sum * load(at->v, at->v_first + p * at->stride + i);
                store(&inst->arg[0], out_first + i, v);
        }
}

static size_t attention_positions(const struct op_inst *inst)
{
        return (size_t)(inst->arg[2].data ? inst->arg[2].dims[1] : inst->arg[1].dims[0]);
}

static void ref_attention(const struct op_inst *inst, double *weight)
{
        const struct op_arg *qkv = &inst->arg[1];
        int64_t heads = inst->attr.heads, group = heads / inst->attr.kv_heads, d = inst->attr.head_dim;
        int64_t rows = qkv->dims[0] / inst->attr.batch;

        for (int64_t r = 0; r < qkv->dims[0]; r++) {
                for (int64_t h = 0; h < heads; h++) {
                        struct view at = attention_view(inst, r / rows, r % rows, h / group);

                        attend(inst, &at, r * qkv->dims[1] + h * d, (r * heads + h) * d, weight);
                }
        }
}

static void ref_last_row(const struct op_inst *inst)
{
        const struct op_arg *out = &inst->arg[0], *x = &inst->arg[1];
        int64_t rows = x->dims[0] / inst->attr.batch, width = x->dims[1];

        for (int64_t b = 0; b < inst->attr.batch; b++)
                copy_elems(out, b * width, x, (b * rows + rows - 1) * width, width);
}

static void ref_argmax(const struct op_inst *inst)
{
        int32_t *token = inst->arg[0].data;
        const struct op_arg *logits = &inst->arg[1];
        int64_t vocab = logits->dims[1];

        for (int64_t b = 0; b < logits->dims[0]; b++) {
                int64_t best = -1;

                for (int64_t i = 0; i < vocab; i++) {
                        double v = load(logits, b * vocab + i);

                        if (!isnan(v) && (best < 0 || v > load(logits, b * vocab + best)))
                                best = i;
                }
                token[b] = best < 0 ? 0 : (int32_t)best;
        }
}

/* Saturating: the numbers may come from a peer. */
static void step(int32_t *v, int32_t by)
{
        if (__builtin_add_overflow(*v, by, v))
                *v = INT32_MAX;
}

static void ref_emit(const struct op_inst *inst)
{
        const struct op_arg *tokens = &inst->arg[0];
        int32_t *cursor = inst->arg[1].data;

        if (cursor[1] >= 0 && cursor[1] < tokens->dims[0])
                copy_elems(tokens, cursor[1] * tokens->dims[1], &inst->arg[2], 0, tokens->dims[1]);
        step(&cursor[0], inst->attr.rows);
        step(&cursor[1], 1);
}

/* ---- the device ---- */

struct ref_device {
        struct device base;
        struct dev_props props;
};

struct ref_plan {
        struct dev_plan base;
        double *weight; /* of the longest attention */
        size_t n;
        struct op_inst inst[];
};

static const char *ref_unavailable(void)
{
        return NULL;
}

static int ref_open(const struct dev_opts *opts, struct device **out)
{
        if (opts->ordinal != 0)
                return err_set(-ENODEV, "reference:%d: there is only one reference device", opts->ordinal);
        struct ref_device *d = calloc(1, sizeof(*d));

        if (!d)
                return err_set(-ENOMEM, "no memory for the reference device");
        d->base.ops = &dev_reference_ops;
        d->props = (struct dev_props){
            .library = "none",
            .threads = 1,
            .memory_bytes = host_memory_bytes(),
            .numa = host_numa(),
            .host_memory = true,
        };
        char cpu[64];

        host_cpu_name(cpu, sizeof(cpu));
        snprintf(d->props.name, sizeof(d->props.name), "reference: %s (plain C, 1 thread)", cpu);
        *out = &d->base;
        return 0;
}

static void ref_close(struct device *d)
{
        free(container_of(d, struct ref_device, base));
}

static void ref_query(const struct device *d, struct dev_props *out)
{
        *out = container_of(d, const struct ref_device, base)->props;
}

/* Nobody compares this device's speed with anything, so its ceilings stay unknown. */
static int ref_measure(struct device *d)
{
        return 0;
}

static int ref_plan_make(struct device *d, const struct op_inst *insts, size_t n, struct dev_plan **out)
{
        size_t longest = 0, bytes;
        int rc = host_check(insts, n);

        if (rc < 0)
                return rc;
        for (size_t i = 0; i < n; i++)
                if (insts[i].code == OP_ATTENTION && attention_positions(&insts[i]) > longest)
                        longest = attention_positions(&insts[i]);
        if (!size_mul(n, sizeof(insts[0]), &bytes) || !size_add(bytes, sizeof(struct ref_plan), &bytes))
                return err_set(-EINVAL, "a plan of %zu instructions is too long", n);
        struct ref_plan *p = calloc(1, bytes);

        if (p && longest)
                p->weight = calloc(longest, sizeof(p->weight[0]));
        if (!p || (longest && !p->weight)) {
                free(p);
                return err_set(-ENOMEM, "no memory for a plan of %zu instructions", n);
        }
        p->base.dev = d;
        p->n = n;
        memcpy(p->inst, insts, n * sizeof(insts[0]));
        *out = &p->base;
        return 0;
}

static void ref_plan_free(struct dev_plan *base)
{
        struct ref_plan *p = container_of(base, struct ref_plan, base);

        free(p->weight);
        free(p);
}

static int ref_run(struct dev_plan *base, struct dev_event *ev)
{
        static void (*const ops[OP_COUNT])(const struct op_inst *) = {
            [OP_COPY] = ref_copy,           [OP_EMBED] = ref_embed,       [OP_LAYERNORM] = ref_layernorm,
            [OP_LINEAR] = ref_linear,       [OP_ACT] = ref_act,           [OP_ADD] = ref_add,
            [OP_KV_APPEND] = ref_kv_append, [OP_LAST_ROW] = ref_last_row, [OP_ARGMAX] = ref_argmax,
            [OP_EMIT] = ref_emit,
        };
        const struct ref_plan *p = container_of(base, const struct ref_plan, base);
        uint64_t start = clock_ns();

        for (size_t i = 0; i < p->n; i++) {
                if (p->inst[i].code == OP_ATTENTION)
                        ref_attention(&p->inst[i], p->weight);
                else
                        ops[p->inst[i].code](&p->inst[i]);
        }
        ev->ticket++;
        ev->exec_ns = clock_ns() - start;
        return 0;
}

const struct dev_ops dev_reference_ops = {
    .name = "reference",
    .unavailable = ref_unavailable,
    .open = ref_open,
    .close = ref_close,
    .query = ref_query,
    .measure = ref_measure,
    .alloc = host_alloc,
    .free = host_free,
    .put = host_put,
    .get = host_get,
    .copy = host_copy,
    .host_register = host_register,
    .export = host_export,
    .flush = host_flush,
    .supports = host_supports,
    .plan_make = ref_plan_make,
    .plan_free = ref_plan_free,
    .run = ref_run,
    .test = host_test,
    .sync = host_sync,
};
