#include <limits.h>
#include <math.h>

#include "check.h"
#include "harness.h"

static const enum op_dtype floats[] = {DT_F32, DT_F16, DT_BF16};

#define FOR_FLOATS(t)      for (const enum op_dtype *t = floats; t < floats + ARRAY_LEN(floats); t++)
#define FOR_EACH(p, table) for (__typeof__(&(table)[0]) p = (table); p < (table) + ARRAY_LEN(table); p++)

void cases_copy(struct harness *h)
{
        static const int64_t sizes[] = {1, 2, 3, 63, 64, 65, 1000, 65537};

        for (int t = 0; t < DT_COUNT; t++) {
                FOR_EACH(n, sizes)
                {
                        struct job j;

                        job_begin(&j, h, OP_COPY, "%s[%lld]", op_dtype_names[t], (long long)*n);
                        job_arg(&j, 0, (enum op_dtype)t, 1, *n, 0, 0);
                        job_arg(&j, 1, (enum op_dtype)t, 1, *n, 0, 0);
                        job_run(&j);
                }
        }
}

void cases_embed(struct harness *h)
{
        static const struct {
                int batch, rows, vocab, width, positions, cursor;
        } shapes[] = {
            {1, 1, 1, 1, 1, 0},    {1, 1, 17, 64, 32, 31},    {1, 5, 17, 2, 32, 3},  {2, 3, 9, 48, 16, 0},
            {3, 4, 512, 65, 8, 6}, {1, 8, 100, 768, 16, 12},  {2, 2, 5, 16, 4, 4},   {2, 2, 5, 16, 4, INT_MAX},
            {2, 2, 5, 16, 4, -7},  {2, 2, 5, 16, 4, INT_MIN}, {1, 64, 33, 33, 0, 0}, {4, 1, 33, 15, 0, 0},
        };
        static const double odd_ids[] = {-1, INT_MAX, INT_MIN};

        FOR_FLOATS(t)
        {
                FOR_EACH(s, shapes)
                {
                        struct job j;
                        int total = s->batch * s->rows;

                        job_begin(&j, h, OP_EMBED, "%s B=%d rows=%d V=%d H=%d P=%d cursor=%d", op_dtype_names[*t],
                                  s->batch, s->rows, s->vocab, s->width, s->positions, s->cursor);
                        j.inst.attr.batch = s->batch;
                        job_arg(&j, 0, *t, 2, total, s->width, 0);
                        job_arg(&j, 1, DT_I32, 1, total, 0, 0);
                        for (int r = 0; r < total; r++)
                                job_set(&j, 1, r, (double)prng_below(&h->prng, (uint64_t)s->vocab));
                        for (int r = 3; r < total; r += 4)
                                job_set(&j, 1, r, r % 3 ? odd_ids[r % ARRAY_LEN(odd_ids)] : s->vocab);
                        job_arg(&j, 2, *t, 2, s->vocab, s->width, 0);
                        if (s->positions) {
                                job_arg(&j, 3, *t, 2, s->positions, s->width, 0);
                                job_cursor(&j, 4, s->cursor, 0);
                        }
                        job_run(&j);
                }
        }
}

void cases_layernorm(struct harness *h)
{
        static const int64_t rows[] = {1, 2, 7, 33}, widths[] = {1, 2, 3, 15, 16, 17, 48, 64, 100, 768, 1025};

        FOR_FLOATS(t)
        {
                for (size_t i = 0; i < ARRAY_LEN(rows) * ARRAY_LEN(widths); i++) {
                        int64_t r = rows[i % ARRAY_LEN(rows)], w = widths[i / ARRAY_LEN(rows)];
                        struct job j;

                        job_begin(&j, h, OP_LAYERNORM, "%s R=%lld H=%lld%s%s", op_dtype_names[*t], (long long)r,
                                  (long long)w, i % 3 ? " beta" : "", i % 5 ? "" : " in place");
                        j.inst.attr.eps = i % 2 ? 1e-5f : 1e-2f;
                        job_arg(&j, 0, *t, 2, r, w, 0);
                        if (i % 5)
                                job_arg(&j, 1, *t, 2, r, w, 0);
                        else
                                job_alias(&j, 1, 0);
                        job_scale(&j, 1, 3);
                        if (i == 9)
                                job_set(&j, 1, r * w - 1, (double)NAN);
                        job_arg(&j, 2, *t, 1, w, 0, 0);
                        if (i % 3)
                                job_arg(&j, 3, *t, 1, w, 0, 0);
                        job_run(&j);
                }
        }
}

struct linear {
        int64_t rows, k, n;
};

/* with: bit 0 bias, bit 1 residual, bit 2 residual in place, bit 3 fp32 output. */
static void linear_case(struct harness *h, enum op_dtype t, const struct linear *s, int act, int with)
{
        enum op_dtype out = with & 8 ? DT_F32 : t;
        bool in_place = (with & 4) && out == t;
        struct job j;

        job_begin(&j, h, OP_LINEAR, "%s R=%lld K=%lld N=%lld act=%d with=%d", op_dtype_names[t], (long long)s->rows,
                  (long long)s->k, (long long)s->n, act, with);
        j.inst.attr.act = act;
        job_arg(&j, 0, out, 2, s->rows, s->n, 0);
        job_arg(&j, 1, t, 2, s->rows, s->k, 0);
        job_arg(&j, 2, t, 2, s->n, s->k, 0);
        if (with & 1)
                job_arg(&j, 3, t, 1, s->n, 0, 0);
        if (in_place)
                job_alias(&j, 4, 0);
        else if (with & 6)
                job_arg(&j, 4, t, 2, s->rows, s->n, 0);
        job_run(&j);
}

void cases_linear(struct harness *h)
{
        static const struct linear shapes[] = {
            {1, 1, 1},     {1, 2, 3},    {1, 2, 1009}, {1, 3, 17},    {1, 4, 33},     {1, 5, 16},    {1, 16, 5},
            {1, 64, 192},  {1, 256, 64}, {1, 64, 512}, {1, 768, 48},  {1, 3072, 24},  {1, 100, 1},   {2, 2, 50},
            {2, 64, 65},   {3, 17, 31},  {4, 64, 192}, {5, 48, 96},   {16, 64, 64},   {17, 33, 129}, {64, 64, 192},
            {64, 256, 64}, {128, 1, 7},  {65, 2, 100}, {33, 768, 40}, {2, 1500, 150},
        };
        int i = 0;

        FOR_FLOATS(t)
        {
                FOR_EACH(s, shapes)
                {
                        linear_case(h, *t, s, ACT_NONE, 0);
                        linear_case(h, *t, s, ACT_NONE, 3);
                        linear_case(h, *t, s, i % ACT_COUNT, i % 16);
                        linear_case(h, *t, s, (i + 2) % ACT_COUNT, (i + 7) % 16);
                        i++;
                }
        }
}

void cases_act(struct harness *h)
{
        static const int64_t sizes[] = {1, 3, 15, 16, 17, 1000, 2048, 5000};
        static const double scales[] = {1, 6, 30};

        FOR_FLOATS(t)
        {
                for (int act = 0; act < ACT_COUNT; act++) {
                        FOR_EACH(n, sizes)
                        {
                                FOR_EACH(scale, scales)
                                {
                                        struct job j;
                                        bool in_place = *n == 17;

                                        job_begin(&j, h, OP_ACT, "%s n=%lld act=%d scale=%g", op_dtype_names[*t],
                                                  (long long)*n, act, *scale);
                                        j.inst.attr.act = act;
                                        job_arg(&j, 0, *t, 1, *n, 0, 0);
                                        if (in_place)
                                                job_alias(&j, 1, 0);
                                        else
                                                job_arg(&j, 1, *t, 1, *n, 0, 0);
                                        job_scale(&j, 1, *scale);
                                        if (*n > 100) {
                                                job_set(&j, 1, 0, (double)NAN);
                                                job_set(&j, 1, 1, 0);
                                                job_set(&j, 1, 2, -300);
                                                job_set(&j, 1, 3, 300);
                                                job_set(&j, 1, 4, (double)INFINITY);
                                        }
                                        job_run(&j);
                                }
                        }
                }
        }
}

void cases_add(struct harness *h)
{
        static const int64_t sizes[] = {1, 2, 15, 16, 17, 768, 2048, 2049, 9999};

        FOR_FLOATS(t)
        {
                FOR_EACH(n, sizes)
                {
                        for (int alias = 0; alias < 3; alias++) {
                                struct job j;

                                job_begin(&j, h, OP_ADD, "%s n=%lld in place of operand %d", op_dtype_names[*t],
                                          (long long)*n, alias);
                                job_arg(&j, 0, *t, 2, *n, 1, 0);
                                for (int i = 1; i <= 2; i++) {
                                        if (i == alias)
                                                job_alias(&j, i, 0);
                                        else
                                                job_arg(&j, i, *t, 2, *n, 1, 0);
                                }
                                job_run(&j);
                        }
                }
        }
}

struct heads {
        int batch, rows, heads, kv_heads, dim, capacity;
};

static void set_heads(struct job *j, const struct heads *s)
{
        j->inst.attr.batch = s->batch;
        j->inst.attr.heads = s->heads;
        j->inst.attr.kv_heads = s->kv_heads;
        j->inst.attr.head_dim = s->dim;
}

static const struct heads head_shapes[] = {
    {1, 1, 1, 1, 1, 1},      {1, 1, 2, 2, 1, 9},     {1, 1, 4, 4, 16, 64},   {2, 1, 4, 2, 16, 33},
    {1, 2, 2, 2, 3, 10},     {1, 3, 4, 1, 16, 20},   {2, 4, 4, 4, 16, 40},   {3, 5, 6, 3, 8, 17},
    {1, 17, 2, 1, 33, 50},   {1, 63, 2, 2, 16, 128}, {1, 64, 4, 4, 16, 128}, {1, 65, 2, 2, 64, 100},
    {2, 130, 2, 2, 16, 140}, {1, 7, 12, 12, 64, 30}, {1, 40, 2, 1, 80, 40},
};

/* Start, middle, last place where all rows fit, one more, last position, past the end, and nonsense. */
static int cursor_case(const struct heads *s, int i)
{
        const int cursors[] = {0,
                               s->capacity / 2,
                               s->capacity > s->rows ? s->capacity - s->rows : 0,
                               s->capacity - s->rows + 1,
                               s->capacity - 1,
                               s->capacity,
                               s->capacity + 5,
                               INT_MAX,
                               -3,
                               INT_MIN};

        return cursors[i];
}
#define CURSOR_CASES 10

void cases_kv_append(struct harness *h)
{
        FOR_FLOATS(t)
        {
                FOR_EACH(s, head_shapes)
                {
                        for (int c = 0; c < CURSOR_CASES; c++) {
                                int kv = s->kv_heads * s->dim;
                                struct job j;

                                job_begin(&j, h, OP_KV_APPEND, "%s B=%d rows=%d heads=%d/%d D=%d C=%d cursor=%d",
                                          op_dtype_names[*t], s->batch, s->rows, s->heads, s->kv_heads, s->dim,
                                          s->capacity, cursor_case(s, c));
                                set_heads(&j, s);
                                job_arg(&j, 0, *t, 3, s->batch, s->capacity, kv);
                                job_arg(&j, 1, *t, 3, s->batch, s->capacity, kv);
                                job_arg(&j, 2, *t, 2, s->batch * s->rows, s->heads * s->dim + 2 * kv, 0);
                                job_cursor(&j, 3, cursor_case(s, c), 0);
                                job_run(&j);
                        }
                }
        }
}

/* What lies behind the last visible position must not matter, whatever it is. */
static void poison_unseen(struct job *j, const struct heads *s, int cursor)
{
        int64_t first = cursor < 0 ? 0 : cursor > s->capacity ? s->capacity : cursor;
        int64_t kv = (int64_t)s->kv_heads * s->dim;

        for (int64_t b = 0; b < s->batch; b++) {
                for (int64_t p = first + s->rows; p < s->capacity; p++) {
                        for (int64_t i = 0; i < kv; i++) {
                                job_set(j, 2, (b * s->capacity + p) * kv + i, (double)NAN);
                                job_set(j, 3, (b * s->capacity + p) * kv + i, (double)INFINITY);
                        }
                }
        }
}

static void attention_cached(struct harness *h, enum op_dtype t, const struct heads *s, int cursor)
{
        int kv = s->kv_heads * s->dim;
        struct job j;

        job_begin(&j, h, OP_ATTENTION, "%s B=%d rows=%d heads=%d/%d D=%d C=%d cursor=%d", op_dtype_names[t], s->batch,
                  s->rows, s->heads, s->kv_heads, s->dim, s->capacity, cursor);
        set_heads(&j, s);
        j.inst.attr.scale = 1 / sqrtf((float)s->dim);
        job_arg(&j, 0, t, 2, s->batch * s->rows, s->heads * s->dim, 0);
        job_arg(&j, 1, t, 2, s->batch * s->rows, s->heads * s->dim + 2 * kv, 0);
        job_scale(&j, 1, 3);
        job_arg(&j, 2, t, 3, s->batch, s->capacity, kv);
        job_arg(&j, 3, t, 3, s->batch, s->capacity, kv);
        poison_unseen(&j, s, cursor);
        job_cursor(&j, 4, cursor, 0);
        job_run(&j);
}

/* later_nan: the last row of v is NaN, which an earlier row of a causal head must not notice. */
static void attention_plain(struct harness *h, enum op_dtype t, const struct heads *s, int causal, bool later_nan)
{
        int width = (s->heads + 2 * s->kv_heads) * s->dim, total = s->batch * s->rows;
        struct job j;

        job_begin(&j, h, OP_ATTENTION, "%s B=%d rows=%d heads=%d/%d D=%d causal=%d%s", op_dtype_names[t], s->batch,
                  s->rows, s->heads, s->kv_heads, s->dim, causal, later_nan ? " NaN" : "");
        set_heads(&j, s);
        j.inst.attr.causal = causal;
        j.inst.attr.scale = 0.3f;
        job_arg(&j, 0, t, 2, total, s->heads * s->dim, 0);
        job_arg(&j, 1, t, 2, total, width, 0);
        job_scale(&j, 1, 3);
        if (later_nan)
                job_set(&j, 1, (int64_t)total * width - 1, (double)NAN);
        job_run(&j);
}

void cases_attention(struct harness *h)
{
        FOR_FLOATS(t)
        {
                FOR_EACH(s, head_shapes)
                {
                        for (int c = 0; c < CURSOR_CASES; c++)
                                attention_cached(h, *t, s, cursor_case(s, c));
                        attention_plain(h, *t, s, 0, false);
                        attention_plain(h, *t, s, 1, false);
                        attention_plain(h, *t, s, 1, true);
                }
        }
}

void cases_last_row(struct harness *h)
{
        static const int64_t shapes[][3] = {{1, 1, 1}, {1, 5, 3}, {3, 1, 64}, {2, 7, 65}, {4, 16, 768}};

        FOR_FLOATS(t)
        {
                FOR_EACH(s, shapes)
                {
                        struct job j;

                        job_begin(&j, h, OP_LAST_ROW, "%s B=%lld rows=%lld H=%lld", op_dtype_names[*t],
                                  (long long)(*s)[0], (long long)(*s)[1], (long long)(*s)[2]);
                        j.inst.attr.batch = (int32_t)(*s)[0];
                        job_arg(&j, 0, *t, 2, (*s)[0], (*s)[2], 0);
                        job_arg(&j, 1, *t, 2, (*s)[0] * (*s)[1], (*s)[2], 0);
                        job_run(&j);
                }
        }
}

/* Rows that are easy to get wrong, one after the other. */
static void argmax_row(struct job *j, int64_t row, int64_t vocab, int kind)
{
        int64_t at = row * vocab, pick = (int64_t)prng_below(&j->h->prng, (uint64_t)vocab);
        double all = kind == 1 ? (double)NAN : kind == 2 ? -(double)INFINITY : 0.25;

        if (kind >= 1 && kind <= 3)
                for (int64_t i = 0; i < vocab; i++)
                        job_set(j, 1, at + i, all);
        if (kind == 2) /* nothing above -inf, and the first is NaN */
                job_set(j, 1, at, (double)NAN);
        if (kind == 4)
                job_set(j, 1, at + pick, (double)NAN);
        if (kind == 5)
                job_set(j, 1, at + vocab - 1, 7);
        if (kind == 6) {
                job_set(j, 1, at + vocab / 3, 9);
                job_set(j, 1, at + vocab - 1, 9);
                job_set(j, 1, at + vocab / 2, 9);
        }
        if (kind == 7) {
                job_set(j, 1, at, (double)NAN);
                job_set(j, 1, at + pick, (double)INFINITY);
        }
}
#define ARGMAX_KINDS 8

void cases_argmax(struct harness *h)
{
        static const int64_t vocabs[] = {1, 2, 15, 16, 17, 31, 33, 512, 50257};

        FOR_FLOATS(t)
        {
                FOR_EACH(v, vocabs)
                {
                        for (int repeat = 0; repeat < 5; repeat++) {
                                struct job j;

                                job_begin(&j, h, OP_ARGMAX, "%s V=%lld", op_dtype_names[*t], (long long)*v);
                                job_arg(&j, 0, DT_I32, 1, ARGMAX_KINDS, 0, 0);
                                job_arg(&j, 1, *t, 2, ARGMAX_KINDS, *v, 0);
                                for (int kind = 0; kind < ARGMAX_KINDS; kind++)
                                        argmax_row(&j, kind, *v, kind);
                                job_run(&j);
                        }
                }
        }
}

void cases_emit(struct harness *h)
{
        static const struct {
                int steps, batch, position, emitted, rows;
        } shapes[] = {
            {1, 1, 0, 0, 1},    {4, 1, 7, 3, 5},
            {4, 3, 7, 4, 1},    {4, 3, 7, -1, 1},
            {8, 2, 100, 0, 64}, {8, 2, INT_MAX, INT_MAX, 1},
            {8, 2, -5, 7, 0},   {8, 2, INT_MIN, INT_MIN, 3},
        };

        FOR_EACH(s, shapes)
        {
                struct job j;

                job_begin(&j, h, OP_EMIT, "M=%d B=%d cursor=%d,%d rows=%d", s->steps, s->batch, s->position, s->emitted,
                          s->rows);
                j.inst.attr.rows = s->rows;
                job_arg(&j, 0, DT_I32, 2, s->steps, s->batch, 0);
                job_cursor(&j, 1, s->position, s->emitted);
                job_arg(&j, 2, DT_I32, 1, s->batch, 0, 0);
                for (int i = 0; i < s->batch; i++)
                        job_set(&j, 2, i, 1000 + i);
                job_run(&j);
        }
}
