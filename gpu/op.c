#include "op.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>

#include "check.h"
#include "err.h"

#define DIM_MAX   (INT64_C(1) << 40)
#define BYTES_MAX (INT64_C(1) << 46)
#define ATTR_MAX  (1 << 16) /* heads, head_dim: their products then fit int64 with room */

const char *const op_dtype_names[DT_COUNT] = {"float32", "float16", "bfloat16", "int32", "uint8"};

const struct op_info op_infos[OP_COUNT] = {
    [OP_COPY] = {"copy", 2, {OP_OUT, OP_IN}, {"out", "in"}},
    [OP_EMBED] = {"embed",
                  5,
                  {OP_OUT, OP_IN, OP_IN, OP_IN | OP_OPTIONAL, OP_IN | OP_OPTIONAL},
                  {"out", "ids", "table", "positions", "cursor"}},
    [OP_LAYERNORM] = {"layernorm", 4, {OP_OUT, OP_IN, OP_IN, OP_IN | OP_OPTIONAL}, {"out", "x", "gamma", "beta"}},
    [OP_LINEAR] = {"linear",
                   5,
                   {OP_OUT, OP_IN, OP_IN, OP_IN | OP_OPTIONAL, OP_IN | OP_OPTIONAL},
                   {"out", "x", "w", "bias", "residual"}},
    [OP_ACT] = {"act", 2, {OP_OUT, OP_IN}, {"out", "x"}},
    [OP_ADD] = {"add", 3, {OP_OUT, OP_IN, OP_IN}, {"out", "a", "b"}},
    [OP_KV_APPEND] = {"kv_append", 4, {OP_INOUT, OP_INOUT, OP_IN, OP_IN}, {"kcache", "vcache", "qkv", "cursor"}},
    [OP_ATTENTION] = {"attention",
                      5,
                      {OP_OUT, OP_IN, OP_IN | OP_OPTIONAL, OP_IN | OP_OPTIONAL, OP_IN | OP_OPTIONAL},
                      {"out", "qkv", "kcache", "vcache", "cursor"}},
    [OP_LAST_ROW] = {"last_row", 2, {OP_OUT, OP_IN}, {"out", "x"}},
    [OP_ARGMAX] = {"argmax", 2, {OP_OUT, OP_IN}, {"token", "logits"}},
    [OP_EMIT] = {"emit", 3, {OP_INOUT, OP_INOUT, OP_IN}, {"tokens", "cursor", "token"}},
};

/*
 * The contract of op.h as a table. shape: one letter per dimension; a capital is bound by the first operand that has
 * it and must be the same everywhere; o, q, k are widths of heads from the attributes, 2 is itself, * any shape but the
 * same for all. B and R are tied to attr.batch where uses_batch. dtype: f floating and shared, g that one or F32,
 * i I32, a any.
 */
struct rule {
        const char *shape[OP_ARGS_MAX];
        const char *dtype;
        bool uses_batch, uses_heads, uses_act;
};

static const struct rule rules[OP_COUNT] = {
    [OP_COPY] = {{"", ""}, "aa", false, false, false},
    [OP_EMBED] = {{"RH", "R", "VH", "PH", "2"}, "fiffi", true, false, false},
    [OP_LAYERNORM] = {{"RH", "RH", "H", "H"}, "ffff", false, false, false},
    [OP_LINEAR] = {{"RN", "RK", "NK", "N", "RN"}, "gffff", false, false, true},
    [OP_ACT] = {{"*", "*"}, "ff", false, false, true},
    [OP_ADD] = {{"*", "*", "*"}, "fff", false, false, false},
    [OP_KV_APPEND] = {{"BCk", "BCk", "Rq", "2"}, "fffi", true, true, false},
    [OP_ATTENTION] = {{"Ro", "Rq", "BCk", "BCk", "2"}, "ffffi", true, true, false},
    [OP_LAST_ROW] = {{"BH", "RH"}, "ff", true, false, false},
    [OP_ARGMAX] = {{"B", "BV"}, "if", false, false, false},
    [OP_EMIT] = {{"MB", "2", "B"}, "iii", false, false, false},
};

size_t op_dtype_bytes(enum op_dtype t)
{
        static const uint8_t bytes[DT_COUNT] = {4, 2, 2, 4, 1};

        return (unsigned)t < DT_COUNT ? bytes[t] : 0;
}

int op_dtype_parse(const char *name)
{
        static const struct {
                const char *name;
                enum op_dtype dtype;
        } known[] = {
            {"float32", DT_F32},   {"fp32", DT_F32},  {"f32", DT_F32},  {"float", DT_F32}, {"float16", DT_F16},
            {"fp16", DT_F16},      {"f16", DT_F16},   {"half", DT_F16}, {"int32", DT_I32}, {"i32", DT_I32},
            {"bfloat16", DT_BF16}, {"bf16", DT_BF16}, {"uint8", DT_U8}, {"u8", DT_U8},
        };

        for (size_t i = 0; name && i < ARRAY_LEN(known); i++)
                if (strcasecmp(name, known[i].name) == 0)
                        return known[i].dtype;
        return -1;
}

static float f32_of_bits(uint32_t u)
{
        float f;

        memcpy(&f, &u, sizeof(f));
        return f;
}

static uint32_t bits_of_f32(float f)
{
        uint32_t u;

        memcpy(&u, &f, sizeof(u));
        return u;
}

float op_f16_to_f32(uint16_t h)
{
        uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exp = (h >> 10) & 31u, frac = h & 0x3ffu;

        if (exp == 31)
                return f32_of_bits(sign | 0x7f800000u | frac << 13);
        if (exp == 0) {
                float tiny = (float)frac * 0x1p-24f;

                return sign ? -tiny : tiny;
        }
        return f32_of_bits(sign | (exp + 112) << 23 | frac << 13);
}

uint16_t op_f32_to_f16(float f)
{
        uint32_t u = bits_of_f32(f), sign = u >> 16 & 0x8000u, mag = u & 0x7fffffffu;

        if (mag > 0x7f800000u)
                return (uint16_t)(sign | 0x7e00u | (mag >> 13 & 0x3ffu));
        if (mag >= 0x477ff000u) /* 65520, half way between the largest finite value and the next */
                return (uint16_t)(sign | 0x7c00u);
        if (mag < 0x38800000u) { /* below 2^-14: adding 0.5 rounds at 2^-24, the unit of subnormals */
                float shifted = f32_of_bits(mag) + 0.5f;

                return (uint16_t)(sign | (bits_of_f32(shifted) - 0x3f000000u));
        }
        mag += 0xfffu + (mag >> 13 & 1u);
        return (uint16_t)(sign | ((mag >> 13) - (112u << 10)));
}

float op_bf16_to_f32(uint16_t h)
{
        return f32_of_bits((uint32_t)h << 16);
}

uint16_t op_f32_to_bf16(float f)
{
        uint32_t u = bits_of_f32(f);

        if ((u & 0x7fffffffu) > 0x7f800000u)
                return (uint16_t)(u >> 16 | 0x40u);
        return (uint16_t)((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

int64_t op_arg_elems(const struct op_arg *a)
{
        int64_t n = 1;

        for (int i = 0; i < a->ndim; i++)
                n *= a->dims[i];
        return n;
}

size_t op_arg_bytes(const struct op_arg *a)
{
        return (size_t)op_arg_elems(a) * op_dtype_bytes(a->dtype);
}

/* ---- op_check ---- */

static int bad(const struct op_inst *inst, int arg, const char *what)
{
        const struct op_info *info = &op_infos[inst->code];

        return err_set(-EINVAL, "%s: operand '%s' %s", info->name, info->arg_names[arg], what);
}

/* dtype known, 1 to 4 dimensions, every one >= 1, and the bytes fit. */
static int check_sizes(const struct op_inst *inst, int i)
{
        const struct op_arg *a = &inst->arg[i];
        int64_t bytes = 1;

        if ((unsigned)a->dtype >= DT_COUNT)
                return bad(inst, i, "has an unknown dtype");
        if (a->ndim < 1 || a->ndim > OP_DIMS_MAX)
                return bad(inst, i, "must have 1 to 4 dimensions");
        bytes = (int64_t)op_dtype_bytes(a->dtype);
        for (int d = 0; d < a->ndim; d++) {
                if (a->dims[d] < 1 || a->dims[d] > DIM_MAX)
                        return bad(inst, i, "has a dimension below 1 or above 2^40");
                if (__builtin_mul_overflow(bytes, a->dims[d], &bytes) || bytes > BYTES_MAX)
                        return bad(inst, i, "is larger than 2^46 bytes");
        }
        return 0;
}

static int check_presence(const struct op_inst *inst)
{
        const struct op_info *info = &op_infos[inst->code];

        for (int i = 0; i < OP_ARGS_MAX; i++) {
                bool present = inst->arg[i].data != NULL;

                if (i >= info->nargs && present)
                        return err_set(-EINVAL, "%s: takes %d operands, operand %d given", info->name, info->nargs,
                                       i + 1);
                if (i < info->nargs && !present && !(info->role[i] & OP_OPTIONAL))
                        return bad(inst, i, "is missing");
                if (present) {
                        int rc = check_sizes(inst, i);

                        if (rc < 0)
                                return rc;
                }
        }
        return 0;
}

static bool floating(enum op_dtype t)
{
        return t == DT_F32 || t == DT_F16 || t == DT_BF16;
}

static int check_dtypes(const struct op_inst *inst)
{
        const char *rule = rules[inst->code].dtype;
        int shared = -1;

        for (int i = 0; rule[i]; i++)
                if (rule[i] == 'f' && inst->arg[i].data && shared < 0)
                        shared = (int)inst->arg[i].dtype;
        for (int i = 0; rule[i]; i++) {
                int t = (int)inst->arg[i].dtype;

                if (!inst->arg[i].data || rule[i] == 'a')
                        continue;
                if (rule[i] == 'i' && t != DT_I32)
                        return bad(inst, i, "must be int32");
                if (rule[i] == 'i')
                        continue;
                if (!floating((enum op_dtype)t))
                        return bad(inst, i, "must be float32, float16 or bfloat16");
                if (t != shared && !(rule[i] == 'g' && t == DT_F32))
                        return bad(inst, i, "has another dtype than the other floating operands");
        }
        return 0;
}

static int check_attr(const struct op_inst *inst)
{
        const struct rule *rule = &rules[inst->code];
        const struct op_attr *at = &inst->attr;
        const char *name = op_infos[inst->code].name;

        if (rule->uses_batch && at->batch < 1)
                return err_set(-EINVAL, "%s: batch is %d, expected 1 or more", name, at->batch);
        if (rule->uses_act && (at->act < 0 || at->act >= ACT_COUNT))
                return err_set(-EINVAL, "%s: unknown activation %d", name, at->act);
        if (rule->uses_heads) {
                if (at->heads < 1 || at->heads > ATTR_MAX || at->kv_heads < 1 || at->kv_heads > at->heads ||
                    at->head_dim < 1 || at->head_dim > ATTR_MAX)
                        return err_set(-EINVAL, "%s: heads %d, kv_heads %d, head_dim %d: expected 1 to %d each", name,
                                       at->heads, at->kv_heads, at->head_dim, ATTR_MAX);
                if (at->heads % at->kv_heads)
                        return err_set(-EINVAL, "%s: %d heads are not a multiple of %d kv_heads", name, at->heads,
                                       at->kv_heads);
        }
        if (inst->code == OP_ATTENTION && !isfinite(at->scale))
                return err_set(-EINVAL, "%s: scale is not finite", name);
        if (inst->code == OP_LAYERNORM && !(at->eps >= 0 && isfinite(at->eps)))
                return err_set(-EINVAL, "%s: eps must be finite and not negative", name);
        if (inst->code == OP_EMIT && at->rows < 0)
                return err_set(-EINVAL, "%s: rows is %d, expected 0 or more", name, at->rows);
        return 0;
}

/* What the letter must be, or 0 when an operand is yet to bind it. */
static int64_t letter_value(const struct op_inst *inst, char c, const int64_t bound[26])
{
        const struct op_attr *at = &inst->attr;

        switch (c) {
        case '2':
                return 2;
        case 'o':
                return (int64_t)at->heads * at->head_dim;
        case 'q':
                return ((int64_t)at->heads + 2 * (int64_t)at->kv_heads) * at->head_dim;
        case 'k':
                return (int64_t)at->kv_heads * at->head_dim;
        default:
                return bound[c - 'A'];
        }
}

static int check_shape(const struct op_inst *inst, int i, int64_t bound[26])
{
        const struct op_arg *a = &inst->arg[i];
        const char *shape = rules[inst->code].shape[i];
        const struct op_info *info = &op_infos[inst->code];

        if (a->ndim != (int)strlen(shape))
                return err_set(-EINVAL, "%s: operand '%s' has %d dimensions, expected %zu", info->name,
                               info->arg_names[i], a->ndim, strlen(shape));
        for (int d = 0; d < a->ndim; d++) {
                int64_t want = letter_value(inst, shape[d], bound);

                if (want == 0)
                        bound[shape[d] - 'A'] = a->dims[d];
                else if (want != a->dims[d])
                        return err_set(-EINVAL, "%s: dimension %d of operand '%s' is %lld, expected %lld", info->name,
                                       d, info->arg_names[i], (long long)a->dims[d], (long long)want);
        }
        return 0;
}

static bool same_dims(const struct op_arg *a, const struct op_arg *b)
{
        return a->ndim == b->ndim && memcmp(a->dims, b->dims, sizeof(a->dims[0]) * (size_t)a->ndim) == 0;
}

static int check_shapes(const struct op_inst *inst)
{
        const struct rule *rule = &rules[inst->code];
        int64_t bound[26] = {0};
        int rc = 0;

        if (rule->uses_batch)
                bound['B' - 'A'] = inst->attr.batch;
        for (int i = 0; i < op_infos[inst->code].nargs && rc == 0; i++) {
                if (!inst->arg[i].data || rule->shape[i][0] == '\0')
                        continue;
                if (rule->shape[i][0] != '*')
                        rc = check_shape(inst, i, bound);
                else if (!same_dims(&inst->arg[i], &inst->arg[0]))
                        rc = bad(inst, i, "has another shape than the output");
        }
        if (rc == 0 && rule->uses_batch && bound['R' - 'A'] % inst->attr.batch)
                rc = err_set(-EINVAL, "%s: %lld rows are not a multiple of batch %d", op_infos[inst->code].name,
                             (long long)bound['R' - 'A'], inst->attr.batch);
        return rc;
}

/* What spans operands and is not a matter of shape. */
static int check_together(const struct op_inst *inst)
{
        const struct op_arg *a = inst->arg;

        if (inst->code == OP_COPY && op_arg_bytes(&a[0]) != op_arg_bytes(&a[1]))
                return bad(inst, 0, "has another size in bytes than 'in'");
        if (inst->code == OP_ARGMAX && a[1].dims[1] > INT32_MAX)
                return bad(inst, 1, "has more columns than an int32 token can name");
        if (inst->code == OP_EMBED && a[3].data && !a[4].data)
                return bad(inst, 4, "is missing, but positions are given");
        if (inst->code == OP_ATTENTION && (!a[2].data != !a[3].data || !a[2].data != !a[4].data))
                return bad(inst, 2, "and 'vcache' and 'cursor' must be given together or not at all");
        return 0;
}

int op_check(const struct op_inst *inst)
{
        static int (*const checks[])(const struct op_inst *) = {check_presence, check_dtypes, check_attr, check_shapes,
                                                                check_together};

        if ((unsigned)inst->code >= OP_COUNT)
                return err_set(-EINVAL, "unknown op code %d", (int)inst->code);
        for (size_t i = 0; i < ARRAY_LEN(checks); i++) {
                int rc = checks[i](inst);

                if (rc < 0)
                        return rc;
        }
        return 0;
}

/* ---- op_cost ---- */

static double arg_bytes(const struct op_inst *inst, int i)
{
        return inst->arg[i].data ? (double)op_arg_bytes(&inst->arg[i]) : 0;
}

static double all_bytes(const struct op_inst *inst)
{
        double sum = 0;

        for (int i = 0; i < op_infos[inst->code].nargs; i++)
                sum += arg_bytes(inst, i);
        return sum;
}

static struct op_cost cost_copy(const struct op_inst *inst, int64_t past)
{
        return (struct op_cost){.bytes = all_bytes(inst)};
}

static struct op_cost cost_embed(const struct op_inst *inst, int64_t past)
{
        const struct op_arg *a = inst->arg;
        double out = arg_bytes(inst, 0), ids = arg_bytes(inst, 1);
        double positions = a[3].data ? out / inst->attr.batch + arg_bytes(inst, 4) : 0;

        /* One row of the table per id, not the whole table. */
        return (struct op_cost){
            .flop = a[3].data ? (double)op_arg_elems(&a[0]) : 0,
            .bytes = 2 * out + ids + positions,
            .weight_bytes = out + (a[3].data ? out / inst->attr.batch : 0),
        };
}

static struct op_cost cost_layernorm(const struct op_inst *inst, int64_t past)
{
        /* Sum; subtract, square, sum; subtract, scale, gamma, beta. */
        return (struct op_cost){
            .flop = 8.0 * (double)op_arg_elems(&inst->arg[0]),
            .bytes = all_bytes(inst),
            .weight_bytes = arg_bytes(inst, 2) + arg_bytes(inst, 3),
        };
}

static struct op_cost cost_linear(const struct op_inst *inst, int64_t past)
{
        const struct op_arg *a = inst->arg;
        double out = (double)op_arg_elems(&a[0]);
        int per_out = (a[3].data != NULL) + (a[4].data != NULL) + (inst->attr.act != ACT_NONE);

        return (struct op_cost){
            .flop = out * (2.0 * (double)a[1].dims[1] + per_out),
            .bytes = all_bytes(inst),
            .weight_bytes = arg_bytes(inst, 2) + arg_bytes(inst, 3),
        };
}

static struct op_cost cost_elementwise(const struct op_inst *inst, int64_t past)
{
        return (struct op_cost){.flop = (double)op_arg_elems(&inst->arg[0]), .bytes = all_bytes(inst)};
}

static int64_t clamp(int64_t v, int64_t lo, int64_t hi)
{
        return v < lo ? lo : v > hi ? hi : v;
}

static struct op_cost cost_kv_append(const struct op_inst *inst, int64_t past)
{
        const struct op_arg *cache = &inst->arg[0];
        int64_t room = cache->dims[1] - clamp(past, 0, cache->dims[1]);
        int64_t stored = clamp(inst->arg[2].dims[0] / inst->attr.batch, 0, room);
        double rows = 2.0 * (double)(stored * cache->dims[0] * cache->dims[2]);

        return (struct op_cost){.bytes = 2 * rows * (double)op_dtype_bytes(cache->dtype) + arg_bytes(inst, 3)};
}

/* Sum over rows r of min(first + r, most), in closed form: the rows come from a graph that a peer sent. */
static double ramp_sum(int64_t first, int64_t rows, int64_t most)
{
        int64_t rising = most - first + 1;      /* rows until the ramp is level */

        rising = clamp(rising, 0, rows);
        return (double)rising * (double)first + 0.5 * (double)rising * (double)(rising - 1) +
               (double)(rows - rising) * (double)most;
}

static struct op_cost cost_attention(const struct op_inst *inst, int64_t past)
{
        const struct op_arg *a = inst->arg;
        const struct op_attr *at = &inst->attr;
        int64_t rows = a[1].dims[0] / at->batch, context = a[2].data ? a[2].dims[1] : rows;
        int64_t first = a[2].data ? clamp(past, 0, context) + 1 : at->causal ? 1 : rows;
        int64_t widest = clamp(first + rows - 1, 1, context);
        double scores = ramp_sum(first < context ? first : context, rows, context), bytes = arg_bytes(inst, 0);

        if (a[2].data)
                bytes += arg_bytes(inst, 0) + arg_bytes(inst, 4) +
                         2.0 * (double)(widest * at->batch * a[2].dims[2]) * (double)op_dtype_bytes(a[2].dtype);
        else
                bytes += arg_bytes(inst, 1);
        /* Two products of head_dim, then scale, maximum, exponential, sum and division per score. */
        scores *= (double)at->batch * at->heads;
        return (struct op_cost){.flop = scores * (4.0 * at->head_dim + 5.0), .bytes = bytes};
}

static struct op_cost cost_last_row(const struct op_inst *inst, int64_t past)
{
        return (struct op_cost){.bytes = 2 * arg_bytes(inst, 0)};
}

static struct op_cost cost_argmax(const struct op_inst *inst, int64_t past)
{
        return (struct op_cost){.flop = (double)op_arg_elems(&inst->arg[1]), .bytes = all_bytes(inst)};
}

static struct op_cost cost_emit(const struct op_inst *inst, int64_t past)
{
        /* One row of tokens is written; the cursor is read and written. */
        return (struct op_cost){.flop = 2, .bytes = 2 * arg_bytes(inst, 2) + 2 * arg_bytes(inst, 1)};
}

struct op_cost op_cost(const struct op_inst *inst, int64_t past)
{
        static struct op_cost (*const costs[OP_COUNT])(const struct op_inst *, int64_t) = {
            [OP_COPY] = cost_copy,           [OP_EMBED] = cost_embed,         [OP_LAYERNORM] = cost_layernorm,
            [OP_LINEAR] = cost_linear,       [OP_ACT] = cost_elementwise,     [OP_ADD] = cost_elementwise,
            [OP_KV_APPEND] = cost_kv_append, [OP_ATTENTION] = cost_attention, [OP_LAST_ROW] = cost_last_row,
            [OP_ARGMAX] = cost_argmax,       [OP_EMIT] = cost_emit,
        };

        return costs[inst->code](inst, past);
}
