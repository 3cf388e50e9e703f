/*
 * bench_step [DEVICE [THREADS]]: microseconds of one forward call of transformer-shaped plans, whole and op by op, and
 * the ceilings that the device measured. A decode step appends to caches and chooses a token. Not a test: run by hand.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "check.h"
#include "clock.h"
#include "device.h"
#include "err.h"
#include "prng.h"

#define INSTS_MAX 512
#define BUDGET_NS (200 * NS_PER_MS)

struct model {
        const char *name;
        int layers, width, heads, inner, vocab, context, rows, past;
        bool decoder;
};

struct build {
        struct device *d;
        struct op_inst inst[INSTS_MAX];
        size_t n;
};

static struct op_arg tensor(struct build *b, enum op_dtype dtype, int ndim, int64_t d0, int64_t d1, int64_t d2)
{
        struct op_arg a = {.dtype = dtype, .ndim = ndim, .dims = {d0, d1, d2}};
        struct mem_region mem;

        BUG_ON(b->d->ops->alloc(b->d, op_arg_bytes(&a), &mem) < 0);
        float *host = calloc(1, op_arg_bytes(&a));

        BUG_ON(!host);
        for (int64_t i = 0; dtype == DT_F32 && i < op_arg_elems(&a); i++)
                host[i] = 0.1f * prng_at_f32(1, b->n, (uint64_t)i);
        b->d->ops->put(b->d, mem.addr, host, op_arg_bytes(&a));
        free(host);
        a.data = mem.addr;
        return a;
}

static struct op_arg matrix(struct build *b, int64_t rows, int64_t cols)
{
        return tensor(b, DT_F32, 2, rows, cols, 0);
}

static struct op_inst *inst(struct build *b, enum op_code code)
{
        BUG_ON(b->n == INSTS_MAX);
        b->inst[b->n] = (struct op_inst){.code = code, .attr = {.batch = 1, .eps = 1e-5f}};
        return &b->inst[b->n++];
}

static struct op_arg linear(struct build *b, struct op_arg x, int n, int act, const struct op_arg *residual)
{
        struct op_arg out = matrix(b, x.dims[0], n), w = matrix(b, n, x.dims[1]);
        struct op_arg bias = tensor(b, DT_F32, 1, n, 0, 0);
        struct op_inst *i = inst(b, OP_LINEAR);

        i->attr.act = act;
        i->arg[0] = out;
        i->arg[1] = x;
        i->arg[2] = w;
        i->arg[3] = bias;
        if (residual)
                i->arg[4] = *residual;
        return out;
}

static struct op_arg layernorm(struct build *b, struct op_arg x)
{
        struct op_arg out = matrix(b, x.dims[0], x.dims[1]);
        struct op_arg gamma = tensor(b, DT_F32, 1, x.dims[1], 0, 0), beta = tensor(b, DT_F32, 1, x.dims[1], 0, 0);
        struct op_inst *i = inst(b, OP_LAYERNORM);

        i->arg[0] = out;
        i->arg[1] = x;
        i->arg[2] = gamma;
        i->arg[3] = beta;
        return out;
}

static struct op_arg attention(struct build *b, const struct model *m, struct op_arg qkv, struct op_arg cursor)
{
        struct op_arg out = matrix(b, m->rows, m->width);
        struct op_attr attr = {.batch = 1,
                               .heads = m->heads,
                               .kv_heads = m->heads,
                               .head_dim = m->width / m->heads,
                               .scale = 1 / sqrtf((float)m->width / (float)m->heads)};
        struct op_arg k = {0}, v = {0};

        if (m->decoder) {
                k = tensor(b, DT_F32, 3, 1, m->context, m->width);
                v = tensor(b, DT_F32, 3, 1, m->context, m->width);
                *inst(b, OP_KV_APPEND) = (struct op_inst){OP_KV_APPEND, attr, {k, v, qkv, cursor}};
        } else {
                cursor = (struct op_arg){0};
        }
        *inst(b, OP_ATTENTION) = (struct op_inst){OP_ATTENTION, attr, {out, qkv, k, v, cursor}};
        return out;
}

static void choose(struct build *b, const struct model *m, struct op_arg hidden, struct op_arg cursor)
{
        struct op_arg last = matrix(b, 1, m->width), w = matrix(b, m->vocab, m->width), logits = matrix(b, 1, m->vocab);
        struct op_arg token = tensor(b, DT_I32, 1, 1, 0, 0), tokens = tensor(b, DT_I32, 2, 64, 1, 0);
        struct op_attr attr = {.batch = 1};

        *inst(b, OP_LAST_ROW) = (struct op_inst){OP_LAST_ROW, attr, {last, hidden}};
        *inst(b, OP_LINEAR) = (struct op_inst){OP_LINEAR, attr, {logits, last, w}};
        *inst(b, OP_ARGMAX) = (struct op_inst){OP_ARGMAX, attr, {token, logits}};
        /* rows 0: every run is the same step. */
        *inst(b, OP_EMIT) = (struct op_inst){OP_EMIT, attr, {tokens, cursor, token}};
}

static void build(struct build *b, const struct model *m)
{
        struct op_arg cursor = tensor(b, DT_I32, 1, 2, 0, 0), x = matrix(b, m->rows, m->width);
        const int32_t at[2] = {m->past, 0};

        b->d->ops->put(b->d, cursor.data, at, sizeof(at));
        if (m->decoder) {
                struct op_arg ids = tensor(b, DT_I32, 1, m->rows, 0, 0), table = matrix(b, m->vocab, m->width);
                struct op_arg positions = matrix(b, m->context, m->width);

                *inst(b, OP_EMBED) = (struct op_inst){OP_EMBED, {.batch = 1}, {x, ids, table, positions, cursor}};
        }
        for (int l = 0; l < m->layers; l++) {
                struct op_arg a = m->decoder ? layernorm(b, x) : x;

                a = attention(b, m, linear(b, a, 3 * m->width, ACT_NONE, NULL), cursor);
                x = linear(b, a, m->width, ACT_NONE, &x);
                a = layernorm(b, x);
                a = linear(b, a, m->inner, m->decoder ? ACT_GELU_TANH : ACT_RELU, NULL);
                x = linear(b, a, m->width, ACT_NONE, &x);
        }
        x = layernorm(b, x);
        if (m->decoder)
                choose(b, m, x, cursor);
}

/* Median microseconds of the plan, by the device's own clock. */
static double plan_us(struct device *d, const struct op_inst *insts, size_t n)
{
        static double us[100000];
        struct dev_plan *p;
        struct dev_event ev = {0};
        size_t runs = 0;

        if (dev_plan_make(d, insts, n, &p) < 0) {
                fprintf(stderr, "%s\n", err_text());
                exit(1);
        }
        for (uint64_t end = clock_ns() + BUDGET_NS; runs < 3 || (clock_ns() < end && runs < ARRAY_LEN(us)); runs++) {
                dev_run(p, &ev);
                d->ops->sync(d);
                us[runs] = (double)ev.exec_ns / 1e3;
        }
        dev_plan_free(p);
        double best = us[runs / 2];

        /* Enough for a benchmark: the smallest of the second half, past any warm-up. */
        for (size_t i = runs / 2; i < runs; i++)
                best = us[i] < best ? us[i] : best;
        return best;
}

static void measure(struct device *d, const struct model *m)
{
        static struct build b;
        double sum[OP_COUNT] = {0}, flop = 0, bytes = 0;
        int count[OP_COUNT] = {0};

        b = (struct build){.d = d};
        build(&b, m);
        double whole = plan_us(d, b.inst, b.n);

        for (size_t i = 0; i < b.n; i++) {
                struct op_cost c = op_cost(&b.inst[i], m->past);

                flop += c.flop;
                bytes += c.bytes;
                count[b.inst[i].code]++;
                /* One of each op and layer position is measured alone when the plan is short. */
                if (b.n <= 64)
                        sum[b.inst[i].code] += plan_us(d, &b.inst[i], 1);
        }
        printf("%-26s %3zu ops %10.2f us %8.1f GFLOP/s %7.1f GB/s\n", m->name, b.n, whole, flop / whole / 1e3,
               bytes / whole / 1e3);
        for (int op = 0; op < OP_COUNT; op++)
                if (sum[op] > 0)
                        printf("    %-10s %3d x %8.3f us\n", op_infos[op].name, count[op], sum[op] / count[op]);
}

int main(int argc, char **argv)
{
        static const struct model models[] = {
            {"gpt2-micro decode at 40", 3, 64, 4, 256, 512, 128, 1, 40, true},
            {"gpt2-micro decode at 127", 3, 64, 4, 256, 512, 128, 1, 127, true},
            {"gpt2-micro prefill 64", 3, 64, 4, 256, 512, 128, 64, 0, true},
            {"tiny-gpt2 decode at 40", 2, 2, 2, 8, 50257, 1024, 1, 40, true},
            {"tiny-gpt2 prefill 16", 2, 2, 2, 8, 50257, 1024, 16, 0, true},
            {"gpt2 decode at 128", 12, 768, 12, 3072, 50257, 1024, 1, 128, true},
            {"gpt2 prefill 64", 12, 768, 12, 3072, 50257, 1024, 64, 0, true},
            {"bert layer 128 rows", 1, 768, 12, 3072, 1, 128, 128, 0, false},
            {"bert 128 rows", 12, 768, 12, 3072, 1, 128, 128, 0, false},
        };
        struct device *d;
        struct dev_props props;

        if (dev_open(argc > 1 ? argv[1] : "cpu", argc > 2 ? atoi(argv[2]) : 1, &d) < 0) {
                fprintf(stderr, "%s\n", err_text());
                return 1;
        }
        uint64_t start = clock_ns();

        d->ops->measure(d);
        d->ops->query(d, &props);
        printf("%s; measured in %.0f ms: %.1f GB/s read, %.1f GFLOP/s\n", props.name,
               (double)(clock_ns() - start) / 1e6, props.read_bytes_per_s / 1e9, props.flop_per_s[DT_F32] / 1e9);
        for (size_t i = 0; i < ARRAY_LEN(models); i++)
                measure(d, &models[i]);
        dev_close(d);
        return 0;
}
