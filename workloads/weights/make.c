/* Recipes carried out: checkpoint or generator -> the bytes of one weight tensor. */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "digest.h"
#include "err.h"
#include "prng.h"
#include "weights.h"

#define CHUNK     65536u   /* floats read at a time */
#define RUN_MAX   256u     /* floats stored at a time when transposing */
#define F16_LIMIT 65520.0f /* rounds to infinity from here on */

/* The tensor being made, seen as a matrix: first dimension times all the others. */
struct target {
        const char *graph, *name;
        void *out;
        enum op_dtype dtype;
        int ndim;
        int64_t dims[OP_DIMS_MAX];
        size_t rows, cols;
};

/* One recipe's part of it: element (r, c) goes to out[base + r * target->cols + c]. */
struct piece {
        const struct graph_recipe *recipe;
        size_t start, rows, cols, base;
};

static int bad(const struct target *t, const char *source, const char *what)
{
        return err_set(-EINVAL, "%s: weight %s: source \"%s\" %s", t->graph, t->name, source, what);
}

static size_t product(const int64_t *dims, int n)
{
        size_t p = 1;

        for (int i = 0; i < n; i++)
                p *= (size_t)dims[i];
        return p;
}

/* ---- storing ---- */

static void store_f16(uint16_t *out, const float *v, size_t n)
{
        for (size_t i = 0; i < n; i++)
                out[i] = op_f32_to_f16(v[i]);
}

static void store_bf16(uint16_t *out, const float *v, size_t n)
{
        for (size_t i = 0; i < n; i++)
                out[i] = op_f32_to_bf16(v[i]);
}

/* A NaN in a weight would make every result NaN, and equal to every other: refused where it comes in. */
static bool all_fit(enum op_dtype dtype, const float *v, size_t n)
{
        float limit = dtype == DT_F16 ? F16_LIMIT : INFINITY;
        bool ok = true;

        for (size_t i = 0; i < n; i++)
                ok &= fabsf(v[i]) < limit;
        return ok;
}

static int store(const struct target *t, const struct piece *p, size_t at, const float *v, size_t n)
{
        if (!all_fit(t->dtype, v, n))
                return bad(t, p->recipe->source,
                           t->dtype == DT_F16 ? "holds a value that float16 cannot hold"
                                              : "holds a value that is not finite");
        if (t->dtype == DT_F32)
                memcpy((float *)t->out + at, v, n * sizeof(*v));
        else if (t->dtype == DT_F16)
                store_f16((uint16_t *)t->out + at, v, n);
        else
                store_bf16((uint16_t *)t->out + at, v, n);
        return 0;
}

/* ---- from a checkpoint ---- */

static const struct checkpoint_tensor *source_find(const struct graph *g, const struct checkpoint *c,
                                                   const char *source, const char **lack)
{
        char prefixed[sizeof(g->h->prefix) + sizeof(g->recipes->source)];
        const struct checkpoint_tensor *s = checkpoint_find(c, source);

        *lack = checkpoint_lack(c, source);
        if (s || !g->h->prefix[0])
                return s;
        snprintf(prefixed, sizeof(prefixed), "%s%s", g->h->prefix, source);
        s = checkpoint_find(c, prefixed);
        /* Of two reasons, the one of a tensor that is there tells more. */
        if (!s && strcmp(checkpoint_lack(c, prefixed), checkpoint_lack(c, "")) != 0)
                *lack = checkpoint_lack(c, prefixed);
        return s;
}

static void shape_text(const int64_t *dims, int n, char *out, size_t len)
{
        size_t at = (size_t)snprintf(out, len, "[");

        for (int i = 0; i < n && at < len; i++)
                at += (size_t)snprintf(out + at, len - at, "%s%lld", i ? "," : "", (long long)dims[i]);
        if (at < len)
                snprintf(out + at, len - at, "]");
}

static int bad_shape(const struct target *t, const struct piece *p, const struct checkpoint_tensor *s)
{
        char have[128], want[128];

        shape_text(s->dims, s->ndim, have, sizeof(have));
        shape_text(t->dims, t->ndim, want, sizeof(want));
        return err_set(-EINVAL, "%s: weight %s%s: source \"%s\" has the shape %s, which does not fit %s%s", t->graph,
                       t->name, p->recipe->next != GRAPH_NONE || p->base ? " (in pieces)" : "", p->recipe->source, have,
                       want, p->recipe->transpose ? " transposed" : "");
}

/* Dimensions of the source as used: transposed if the recipe says so. */
static bool used_dims(const struct checkpoint_tensor *s, const struct graph_recipe *r, int64_t dims[OP_DIMS_MAX])
{
        memcpy(dims, s->dims, sizeof(s->dims));
        if (!r->transpose)
                return true;
        dims[0] = s->dims[1];
        dims[1] = s->dims[0];
        return s->ndim == 2;
}

/* Which part of the source, and whether it fits the target but for the length along the axis of concatenation. */
static int fit(const struct target *t, const struct checkpoint_tensor *s, struct piece *p)
{
        const struct graph_recipe *r = p->recipe;
        int64_t dims[OP_DIMS_MAX];

        if (s->ndim != t->ndim || !used_dims(s, r, dims))
                return bad_shape(t, p, s);
        p->start = r->slice_start;
        if (p->start > (size_t)dims[0] || r->slice_len > (size_t)dims[0] - p->start)
                return bad_shape(t, p, s);
        p->rows = r->slice_len ? r->slice_len : (size_t)dims[0] - p->start;
        p->cols = product(dims + 1, s->ndim - 1);
        for (int i = 1; i < t->ndim; i++)
                if (dims[i] != t->dims[i] && !(r->axis == 1 && i == 1))
                        return bad_shape(t, p, s);
        return 0;
}

static int copy_straight(const struct target *t, const struct piece *p, struct checkpoint *c,
                         const struct checkpoint_tensor *s, float *buf)
{
        bool contiguous = p->cols == t->cols;
        size_t total = p->rows * p->cols, first = p->start * p->cols;

        for (size_t k = 0; k < total;) {
                size_t in_row = p->cols - k % p->cols;
                size_t n = contiguous ? total - k : in_row;

                n = n < CHUNK ? n : CHUNK;
                int rc = checkpoint_read_f32(c, s, first + k, n, buf);

                if (rc == 0)
                        rc = store(t, p, p->base + k / p->cols * t->cols + k % p->cols, buf, n);
                if (rc < 0)
                        return rc;
                k += n;
        }
        return 0;
}

/* One block of stored rows [first, first+n) becomes columns. */
static int scatter(const struct target *t, const struct piece *p, const float *block, size_t stored_cols, size_t first,
                   size_t n)
{
        float run[RUN_MAX];

        for (size_t r = 0; r < p->rows; r++) {
                for (size_t i = 0; i < n; i++)
                        run[i] = block[i * stored_cols + p->start + r];
                int rc = store(t, p, p->base + r * t->cols + first, run, n);

                if (rc < 0)
                        return rc;
        }
        return 0;
}

static int copy_transposed(const struct target *t, const struct piece *p, struct checkpoint *c,
                           const struct checkpoint_tensor *s, float *buf, size_t buf_floats)
{
        size_t stored_rows = (size_t)s->dims[0], stored_cols = (size_t)s->dims[1];
        size_t step = buf_floats / stored_cols;

        step = step < RUN_MAX ? step : RUN_MAX;
        for (size_t at = 0; at < stored_rows; at += step) {
                size_t n = stored_rows - at < step ? stored_rows - at : step;
                int rc = checkpoint_read_f32(c, s, at * stored_cols, n * stored_cols, buf);

                if (rc == 0)
                        rc = scatter(t, p, buf, stored_cols, at, n);
                if (rc < 0)
                        return rc;
        }
        return 0;
}

static int copy_piece(const struct target *t, const struct piece *p, struct checkpoint *c,
                      const struct checkpoint_tensor *s)
{
        size_t floats = CHUNK;

        /* A stored row is needed whole; the checkpoint has shown that the file holds it. */
        if (p->recipe->transpose && (size_t)s->dims[1] > floats)
                floats = (size_t)s->dims[1];
        float *buf = malloc(floats * sizeof(*buf));

        if (!buf)
                return err_set(-ENOMEM, "%s: weight %s: no memory", t->graph, t->name);
        int rc = p->recipe->transpose ? copy_transposed(t, p, c, s, buf, floats) : copy_straight(t, p, c, s, buf);

        free(buf);
        return rc;
}

/* ---- synthetic ---- */

/* Nearly normal, mean 0 and variance 1: the sum of four 16-bit uniform numbers. The sum is an integer and the product
 * of two floats is rounded once, so the value is the same wherever it is computed. */
static float noise(uint64_t seed, uint64_t stream, uint64_t index)
{
        uint64_t z = prng_at(seed, stream, index);
        int32_t sum = 0;

        for (int i = 0; i < 4; i++)
                sum += (int32_t)(z >> (16 * i) & 0xffff) - 32768;
        return (float)sum * (0.8660254f / 32768.0f);
}

/* The product is exact in double, so that a fused multiply-add, where the processor has one, gives the same. */
static float scaled(const struct graph_recipe *r, float z)
{
        return (float)((double)r->synth_bias + (double)r->synth_scale * (double)z);
}

static int fit_synthetic(const struct target *t, struct piece *p)
{
        const struct graph_recipe *r = p->recipe;
        bool alone = r->next == GRAPH_NONE && p->base == 0;

        if (!r->slice_len && !alone)
                return bad(t, r->source, "is one of several pieces and needs a length to be made without a checkpoint");
        if (r->axis == 1 && !alone)
                return bad(t, r->source, "cannot be made without a checkpoint beside another column");
        p->start = r->slice_start;
        p->rows = r->slice_len ? r->slice_len : t->rows;
        p->cols = t->cols;
        return 0;
}

static int make_synthetic(const struct target *t, const struct piece *p, uint64_t seed)
{
        const struct graph_recipe *r = p->recipe;
        uint64_t stream = digest_of(r->source, strlen(r->source)).lo;
        size_t first = p->start * p->cols, total = p->rows * p->cols;
        float run[RUN_MAX];

        for (size_t k = 0; k < total;) {
                size_t n = total - k < RUN_MAX ? total - k : RUN_MAX;

                for (size_t i = 0; i < n; i++) {
                        if (r->synth == SYNTH_NORMAL)
                                run[i] = scaled(r, noise(seed, stream, first + k + i));
                        else
                                run[i] = r->synth == SYNTH_ONE ? 1 : 0;
                }
                int rc = store(t, p, p->base + k, run, n);

                if (rc < 0)
                        return rc;
                k += n;
        }
        return 0;
}

/* ---- all pieces ---- */

/* Where the piece goes and whether there is room. done: rows or columns filled by the pieces before it. */
static int place(const struct target *t, struct piece *p, size_t *done)
{
        bool sideways = p->recipe->axis == 1;
        size_t room = (sideways ? t->cols : t->rows) - *done, need = sideways ? p->cols : p->rows;

        if (need > room || need == 0)
                return bad(t, p->recipe->source, "does not fit into what its pieces leave free");
        if (sideways && (t->ndim != 2 || p->rows != t->rows))
                return bad(t, p->recipe->source, "does not have the rows of the tensor that it is a column of");
        p->base = sideways ? *done : *done * t->cols;
        *done += need;
        return 0;
}

static int make_piece(const struct graph *g, const struct target *t, struct piece *p, const struct weights_source *src,
                      size_t *done)
{
        const struct checkpoint_tensor *s = NULL;
        const char *lack = NULL;
        int rc;

        p->base = *done; /* not alone, for fit_synthetic */
        if (src->kind == WEIGHTS_CHECKPOINT) {
                s = source_find(g, src->checkpoint, p->recipe->source, &lack);
                if (!s)
                        return bad(t, p->recipe->source, lack);
                rc = fit(t, s, p);
        } else {
                rc = fit_synthetic(t, p);
        }
        if (rc == 0)
                rc = place(t, p, done);
        if (rc < 0)
                return rc;
        return s ? copy_piece(t, p, src->checkpoint, s) : make_synthetic(t, p, src->seed);
}

int weights_make(const struct graph *g, unsigned t, const struct weights_source *src, void *out)
{
        const struct graph_tensor *tensor = &g->tensors[t];
        struct target target = {.graph = g->h->name,
                                .name = tensor->name,
                                .out = out,
                                .dtype = (enum op_dtype)tensor->dtype,
                                .ndim = tensor->ndim};
        size_t done = 0;

        if (tensor->recipe == GRAPH_NONE)
                return err_set(-EINVAL, "%s: tensor %s has no recipe", target.graph, target.name);
        if (target.dtype != DT_F32 && target.dtype != DT_F16 && target.dtype != DT_BF16)
                return err_set(-EINVAL, "%s: weight %s is neither float32, float16 nor bfloat16", target.graph,
                               target.name);
        memcpy(target.dims, tensor->dims, sizeof(target.dims));
        target.rows = (size_t)target.dims[0];
        target.cols = product(target.dims + 1, target.ndim - 1);
        const struct graph_recipe *first = &g->recipes[tensor->recipe], *r = first;

        for (;;) {
                struct piece p = {.recipe = r};
                int rc = r->axis == first->axis ? make_piece(g, &target, &p, src, &done)
                                                : bad(&target, r->source, "is joined along another axis");

                if (rc < 0)
                        return rc;
                if (r->next == GRAPH_NONE)
                        break;
                r = &g->recipes[r->next];
        }
        if (done != (first->axis == 1 ? target.cols : target.rows))
                return bad(&target, first->source, "and what follows it do not fill the tensor");
        return 0;
}
