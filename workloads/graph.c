#include "graph.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "err.h"
#include "graph_priv.h"

#define BATCH_MAX        (1u << 16)
#define ROWS_MAX         (1u << 20)
#define CONTEXT_MAX      (1u << 24)
#define VOCAB_MAX        (1u << 24)
#define DIM_MAX          (INT64_C(1) << 40)
#define TENSOR_BYTES_MAX (UINT64_C(1) << 46) /* GRAPH_TENSORS_MAX of them still fit size_t */
#define PHASES_ALL       (PHASE_PREFILL | PHASE_DECODE | PHASE_FORWARD)

/* ---- layout of the block ---- */

static size_t block_bytes(const struct graph_header *h)
{
        return sizeof(*h) + h->ntensors * sizeof(struct graph_tensor) + h->nnodes * sizeof(struct graph_node) +
               h->nrecipes * sizeof(struct graph_recipe) + h->nsegments * sizeof(struct graph_segment);
}

/* Counts in the header must have been checked. */
static void point_into(struct graph *g, void *block)
{
        char *at = (char *)block + sizeof(struct graph_header);

        g->h = (struct graph_header *)block;
        g->tensors = (struct graph_tensor *)at;
        at += g->h->ntensors * sizeof(struct graph_tensor);
        g->nodes = (struct graph_node *)at;
        at += g->h->nnodes * sizeof(struct graph_node);
        g->recipes = (struct graph_recipe *)at;
        at += g->h->nrecipes * sizeof(struct graph_recipe);
        g->segments = (struct graph_segment *)at;
}

void graph_free(struct graph *g)
{
        free(g->h);
        memset(g, 0, sizeof(*g));
}

int graph_clone(const struct graph *g, struct graph *out)
{
        void *block = malloc(g->h->total_bytes);

        if (!block)
                return err_set(-ENOMEM, "graph %s: no memory for a copy of %u bytes", g->h->name, g->h->total_bytes);
        memcpy(block, g->h, g->h->total_bytes);
        point_into(out, block);
        return 0;
}

const struct graph_segment *graph_segment(const struct graph *g, enum graph_segment_kind kind)
{
        for (uint32_t i = 0; i < g->h->nsegments; i++)
                if (g->segments[i].kind == kind)
                        return &g->segments[i];
        return NULL;
}

void graph_blind(struct graph *g)
{
        for (uint32_t i = 0; i < g->h->ntensors; i++) {
                struct graph_tensor *t = &g->tensors[i];

                if (t->residency == RES_WEIGHT)
                        t->residency = RES_CONSTANT;
                else if (t->residency == RES_STATE)
                        t->residency = RES_INPUT;
                t->seq_axis = -1;
        }
        for (uint32_t i = 0; i < g->h->nnodes; i++)
                g->nodes[i].phase = 0;
        for (uint32_t i = 0; i < g->h->nsegments; i++)
                g->segments[i].phase = 0;
        g->h->blind = 1;
}

/* ---- sizes ---- */

static int64_t dim_at(const struct graph *g, int64_t dim, uint32_t rows)
{
        if (dim == GRAPH_ROWS)
                return rows;
        if (dim == GRAPH_BATCH_ROWS)
                return (int64_t)g->h->batch * rows;
        return dim;
}

size_t graph_tensor_bytes(const struct graph *g, unsigned t, uint32_t rows, int64_t out_dims[OP_DIMS_MAX])
{
        const struct graph_tensor *tensor = &g->tensors[t];
        size_t bytes = op_dtype_bytes((enum op_dtype)tensor->dtype);

        for (int i = 0; i < OP_DIMS_MAX; i++) {
                int64_t dim = i < tensor->ndim ? dim_at(g, tensor->dims[i], rows) : 0;

                if (out_dims)
                        out_dims[i] = dim;
                if (i < tensor->ndim && !size_mul(bytes, (size_t)dim, &bytes))
                        bytes = SIZE_MAX;
        }
        return bytes;
}

void graph_inst(const struct graph *g, unsigned node, uint32_t rows, struct op_inst *out)
{
        const struct graph_node *n = &g->nodes[node];
        unsigned nargs = op_infos[n->code].nargs;

        memset(out, 0, sizeof(*out));
        out->code = (enum op_code)n->code;
        out->attr = n->attr;
        if (n->code == OP_EMIT)
                out->attr.rows = (int32_t)rows;
        for (unsigned i = 0; i < nargs; i++) {
                if (n->arg[i] == GRAPH_NONE)
                        continue;
                const struct graph_tensor *t = &g->tensors[n->arg[i]];
                struct op_arg *arg = &out->arg[i];

                arg->dtype = (enum op_dtype)t->dtype;
                arg->ndim = t->ndim;
                for (int d = 0; d < t->ndim; d++)
                        arg->dims[d] = dim_at(g, t->dims[d], rows);
                /* Present, and no two tensors the same; nobody looks behind it until graph_bind sets the real one. */
                arg->data = (void *)(((uintptr_t)n->arg[i] + 1) * CACHE_LINE);
        }
}

/* ---- validation ---- */

/* NUL-terminated, zeros behind the NUL (so that equal graphs have equal bytes), nothing that disturbs a terminal. */
static bool text_ok(const char *s, size_t room, bool may_be_empty)
{
        size_t len = strnlen(s, room);

        if (len == room || (len == 0 && !may_be_empty))
                return false;
        for (size_t i = 0; i < len; i++)
                if ((unsigned char)s[i] < 0x20 || s[i] == 0x7f)
                        return false;
        for (size_t i = len; i < room; i++)
                if (s[i])
                        return false;
        return true;
}

static bool zeros(const void *p, size_t len)
{
        const unsigned char *b = p;

        for (size_t i = 0; i < len; i++)
                if (b[i])
                        return false;
        return true;
}

static int in_range(const char *what, uint32_t v, uint32_t min, uint32_t max)
{
        if (v < min || v > max)
                return err_set(-EINVAL, "graph: %s is %u, expected %u to %u", what, v, min, max);
        return 0;
}

/* The counts, on which the place of everything else depends; len: bytes that are really there. */
static int check_counts(const struct graph_header *h, size_t len)
{
        const struct {
                const char *what;
                uint32_t v, min, max;
        } limits[] = {
            {"the magic number", h->magic, GRAPH_MAGIC, GRAPH_MAGIC},
            {"the number of tensors", h->ntensors, 1, GRAPH_TENSORS_MAX},
            {"the number of nodes", h->nnodes, 1, GRAPH_NODES_MAX},
            {"the number of recipes", h->nrecipes, 0, GRAPH_RECIPES_MAX},
            {"the number of segments", h->nsegments, 1, GRAPH_SEGMENTS_MAX},
            {"batch", h->batch, 1, BATCH_MAX},
            {"rows_max", h->rows_max, 1, ROWS_MAX},
            {"context_max", h->context_max, 0, CONTEXT_MAX},
            {"vocab", h->vocab, 0, VOCAB_MAX},
            {"the dtype", h->dtype, 0, DT_COUNT - 1},
            {"blind", h->blind, 0, 1},
        };
        int rc = 0;

        for (size_t i = 0; i < ARRAY_LEN(limits) && rc == 0; i++)
                rc = in_range(limits[i].what, limits[i].v, limits[i].min, limits[i].max);
        if (rc == 0 && (h->total_bytes != len || block_bytes(h) != len))
                rc = err_set(-EINVAL, "graph: %zu bytes came, the header says %u and its counts need %zu", len,
                             h->total_bytes, block_bytes(h));
        return rc;
}

static int check_header(const struct graph *g)
{
        const struct graph_header *h = g->h;

        if (!text_ok(h->name, sizeof(h->name), false) || !text_ok(h->prefix, sizeof(h->prefix), true))
                return err_set(-EINVAL, "graph: name or prefix is not a NUL-terminated text");
        if (!zeros(h->reserved, sizeof(h->reserved)))
                return err_set(-EINVAL, "graph %s: reserved bytes of the header are not 0", h->name);
        for (int i = 0; i < ROLE_COUNT; i++)
                if (h->role[i] != GRAPH_NONE && h->role[i] >= h->ntensors)
                        return err_set(-EINVAL, "graph %s: role %d names tensor %u of %u", h->name, i, h->role[i],
                                       h->ntensors);
        return 0;
}

static int tensor_bad(const struct graph *g, uint32_t i, const char *what)
{
        return err_set(-EINVAL, "graph %s: tensor %u (%s) %s", g->h->name, i, g->tensors[i].name, what);
}

static int check_dims(const struct graph *g, uint32_t i)
{
        const struct graph_tensor *t = &g->tensors[i];
        uint64_t bytes = op_dtype_bytes((enum op_dtype)t->dtype);

        for (int d = 0; d < OP_DIMS_MAX; d++) {
                int64_t dim = t->dims[d];

                if (d >= t->ndim) {
                        if (dim)
                                return tensor_bad(g, i, "has a dimension behind its last");
                        continue;
                }
                if (dim == GRAPH_ROWS || dim == GRAPH_BATCH_ROWS) {
                        if (d > 0 || t->residency == RES_WEIGHT || t->residency == RES_CONSTANT ||
                            t->residency == RES_STATE)
                                return tensor_bad(g, i, "may not have a symbolic dimension there");
                        dim = dim_at(g, dim, g->h->rows_max);
                }
                if (dim < 1 || dim > DIM_MAX)
                        return tensor_bad(g, i, "has a dimension below 1 or above 2^40");
                if (__builtin_mul_overflow(bytes, (uint64_t)dim, &bytes) || bytes > TENSOR_BYTES_MAX)
                        return tensor_bad(g, i, "is larger than 2^46 bytes");
        }
        return 0;
}

static int check_tensor(const struct graph *g, uint32_t i)
{
        const struct graph_tensor *t = &g->tensors[i];
        bool made = t->residency == RES_WEIGHT || t->residency == RES_CONSTANT;

        if (!text_ok(t->name, sizeof(t->name), false))
                return err_set(-EINVAL, "graph %s: the name of tensor %u is not a NUL-terminated text", g->h->name, i);
        if (t->dtype >= DT_COUNT)
                return tensor_bad(g, i, "has an unknown dtype");
        if (t->ndim < 1 || t->ndim > OP_DIMS_MAX)
                return tensor_bad(g, i, "must have 1 to 4 dimensions");
        if (t->residency >= RES_COUNT)
                return tensor_bad(g, i, "has an unknown residency");
        if (g->h->blind && (t->residency == RES_WEIGHT || t->residency == RES_STATE))
                return tensor_bad(g, i, "has a residency that a blind graph does not have");
        if (t->seq_axis != -1 && (t->residency != RES_STATE || t->seq_axis < 0 || t->seq_axis >= t->ndim))
                return tensor_bad(g, i, "has a sequence axis that it cannot have");
        if (t->recipe != GRAPH_NONE && (!made || t->recipe >= g->h->nrecipes))
                return tensor_bad(g, i, "has a recipe that it cannot have");
        if (t->residency == RES_WEIGHT && t->recipe == GRAPH_NONE)
                return tensor_bad(g, i, "is a weight without a recipe");
        if (t->reserved)
                return tensor_bad(g, i, "has reserved bytes that are not 0");
        return check_dims(g, i);
}

static int check_recipe(const struct graph *g, uint32_t i)
{
        const struct graph_recipe *r = &g->recipes[i];

        if (!text_ok(r->source, sizeof(r->source), false))
                return err_set(-EINVAL, "graph %s: the source of recipe %u is not a NUL-terminated text", g->h->name,
                               i);
        if (r->transpose > 1 || r->axis > 1 || r->synth > SYNTH_ONE || r->reserved || r->reserved2 || r->fold ||
            !isfinite(r->synth_scale) || !isfinite(r->synth_bias))
                return err_set(-EINVAL, "graph %s: recipe %u (%s) has a field out of its range", g->h->name, i,
                               r->source);
        /* Pieces follow one another upwards, so a chain ends. */
        if (r->next != GRAPH_NONE && (r->next <= i || r->next >= g->h->nrecipes))
                return err_set(-EINVAL, "graph %s: recipe %u (%s) goes on at %u, which does not follow it", g->h->name,
                               i, r->source, r->next);
        return 0;
}

static int check_segments(const struct graph *g)
{
        uint32_t at = 0, kinds = 0;

        for (uint32_t i = 0; i < g->h->nsegments; i++) {
                const struct graph_segment *s = &g->segments[i];

                if (s->kind >= SEG_KINDS || kinds & 1u << s->kind)
                        return err_set(-EINVAL, "graph %s: segment %u has an unknown kind or one that was there",
                                       g->h->name, i);
                kinds |= 1u << s->kind;
                if (s->first < at || s->count == 0 || s->first > g->h->nnodes || s->count > g->h->nnodes - s->first)
                        return err_set(-EINVAL,
                                       "graph %s: segment %u (nodes %u, %u of them) is empty, out of order or "
                                       "beyond the %u nodes",
                                       g->h->name, i, s->first, s->count, g->h->nnodes);
                if (s->phase & ~PHASES_ALL || (g->h->blind && s->phase) || !zeros(s->reserved, sizeof(s->reserved)))
                        return err_set(-EINVAL, "graph %s: segment %u has a phase or reserved bytes out of range",
                                       g->h->name, i);
                at = s->first + s->count;
        }
        return 0;
}

static int node_bad(const struct graph *g, uint32_t i, const char *what)
{
        const struct graph_node *n = &g->nodes[i];

        return err_set(-EINVAL, "graph %s: node %u (%s) %s", g->h->name, i,
                       n->code < OP_COUNT ? op_infos[n->code].name : "?", what);
}

static int check_node_fields(const struct graph *g, uint32_t i)
{
        const struct graph_node *n = &g->nodes[i];

        if (n->code >= OP_COUNT)
                return node_bad(g, i, "has an unknown op code");
        if (n->phase & ~PHASES_ALL || (g->h->blind && n->phase))
                return node_bad(g, i, "has a phase out of range");
        if (n->reserved0 || !zeros(n->attr.reserved, sizeof(n->attr.reserved)) || n->attr.rows)
                return node_bad(g, i, "has reserved fields that are not 0");
        for (unsigned a = 0; a < OP_ARGS_MAX; a++)
                if (n->arg[a] != GRAPH_NONE && (a >= op_infos[n->code].nargs || n->arg[a] >= g->h->ntensors))
                        return node_bad(g, i, "has an operand that is not there");
        return 0;
}

/* A written tensor stands in no other operand of its node: ops need not cope with operands that overlap. */
static bool aliased(const struct graph_node *n)
{
        const struct op_info *info = &op_infos[n->code];

        for (unsigned a = 0; a < info->nargs; a++)
                for (unsigned b = 0; b < info->nargs; b++)
                        if (a != b && info->role[a] & OP_OUT && n->arg[a] != GRAPH_NONE && n->arg[a] == n->arg[b])
                                return true;
        return false;
}

static int check_access(const struct graph *g, uint32_t i, unsigned t, unsigned role, uint8_t *defined)
{
        uint8_t res = g->tensors[t].residency;
        bool fixed = res == RES_WEIGHT || res == RES_CONSTANT;

        if (role == OP_IN && (res == RES_ACTIVATION || res == RES_OUTPUT) && !defined[t])
                return node_bad(g, i, "reads a tensor that no node before it writes");
        if (role & OP_OUT && fixed)
                return node_bad(g, i, "writes a weight or a constant");
        if (role == OP_INOUT && res == RES_ACTIVATION && !defined[t])
                return node_bad(g, i, "steps a tensor that no node before it writes");
        if (role & OP_OUT)
                defined[t] = 1;
        return 0;
}

static int check_flow(const struct graph *g)
{
        uint8_t defined[GRAPH_TENSORS_MAX];

        memset(defined, 0, g->h->ntensors);
        for (uint32_t i = 0; i < g->h->nnodes; i++) {
                const struct graph_node *n = &g->nodes[i];
                const struct op_info *info = &op_infos[n->code];

                if (aliased(n))
                        return node_bad(g, i, "writes a tensor that is another operand of it too");
                for (unsigned a = info->nargs; a-- > 0;) { /* outputs stand first: inputs are looked at before */
                        if (n->arg[a] == GRAPH_NONE)
                                continue;
                        int rc = check_access(g, i, n->arg[a], info->role[a] & OP_INOUT, defined);

                        if (rc < 0)
                                return rc;
                }
        }
        return 0;
}

/* Dimensions are linear in rows: what fits at 1 and at rows_max fits between them. */
static int check_ops(const struct graph *g)
{
        for (uint32_t i = 0; i < g->h->nnodes; i++) {
                const uint32_t rows[] = {1, g->h->rows_max};

                for (size_t k = 0; k < ARRAY_LEN(rows); k++) {
                        struct op_inst inst;

                        graph_inst(g, i, rows[k], &inst);
                        int rc = op_check(&inst);

                        if (rc < 0)
                                return err_trail(rc, "in node %u of graph %s with %u rows", i, g->h->name, rows[k]);
                }
        }
        return 0;
}

/* A recipe is part of one chain, and that of one tensor: shared chains would make a small graph a lot of work. */
static int check_chains(const struct graph *g)
{
        uint8_t taken[GRAPH_RECIPES_MAX] = {0};

        for (uint32_t i = 0; i < g->h->ntensors + g->h->nrecipes; i++) {
                bool first = i < g->h->ntensors;
                uint32_t to = first ? g->tensors[i].recipe : g->recipes[i - g->h->ntensors].next;

                if (to != GRAPH_NONE && taken[to]++)
                        return err_set(-EINVAL, "graph %s: recipe %u (%s) belongs to more than one tensor or chain",
                                       g->h->name, to, g->recipes[to].source);
        }
        return 0;
}

/* Counts have been checked and the pointers set. */
static int check_all(const struct graph *g)
{
        static int (*const per_item[])(const struct graph *, uint32_t) = {check_tensor, check_recipe,
                                                                          check_node_fields};
        const uint32_t counts[] = {g->h->ntensors, g->h->nrecipes, g->h->nnodes};
        int rc = check_header(g);

        for (size_t k = 0; k < ARRAY_LEN(counts); k++)
                for (uint32_t i = 0; i < counts[k] && rc == 0; i++)
                        rc = per_item[k](g, i);
        if (rc == 0)
                rc = check_chains(g);
        if (rc == 0)
                rc = check_segments(g);
        if (rc == 0)
                rc = check_flow(g);
        if (rc == 0)
                rc = check_ops(g);
        return rc;
}

int graph_from_wire(const void *block, size_t len, struct graph *out)
{
        struct graph_header h;

        memset(out, 0, sizeof(*out));
        if (len < sizeof(h) || len > GRAPH_BYTES_MAX)
                return err_set(-EINVAL, "graph: %zu bytes, expected %zu to %u", len, sizeof(h), GRAPH_BYTES_MAX);
        void *copy = malloc(len);

        if (!copy)
                return err_set(-ENOMEM, "graph: no memory for %zu bytes", len);
        /* Copied once and only then looked at: the sender may still be writing to the block. */
        memcpy(copy, block, len);
        memcpy(&h, copy, sizeof(h));
        int rc = check_counts(&h, len);

        if (rc == 0) {
                point_into(out, copy);
                rc = check_all(out);
        }
        if (rc < 0) {
                free(copy);
                memset(out, 0, sizeof(*out));
        }
        return rc;
}

/* ---- building ---- */

struct list {
        void *items;
        uint32_t count, room;
};

struct graph_builder {
        struct graph_header h;
        struct list tensors, nodes, recipes, segments;
        uint8_t phase;
        int rc;
        char why[256];
};

static void fail(struct graph_builder *b, int rc, const char *what, const char *which)
{
        if (b->rc)
                return;
        b->rc = rc;
        snprintf(b->why, sizeof(b->why), "graph %s: %s (%s)", b->h.name, what, which);
}

/* Place for one more item, zeroed; NULL once something failed. */
static void *append(struct graph_builder *b, struct list *l, size_t size, uint32_t max, const char *what)
{
        if (!b->rc && l->count == max)
                fail(b, -EINVAL, "the model needs more of these than a graph may have", what);
        if (!b->rc && l->count == l->room) {
                uint32_t room = l->room ? l->room * 2 : 64;
                void *bigger = realloc(l->items, room * size);

                if (!bigger) {
                        fail(b, -ENOMEM, "no memory", what);
                } else {
                        l->items = bigger;
                        l->room = room;
                }
        }
        if (b->rc)
                return NULL;
        void *item = (char *)l->items + l->count++ * size;

        memset(item, 0, size);
        return item;
}

/* memset before: zeros behind the NUL. */
static void put_text(struct graph_builder *b, char *out, size_t room, const char *s)
{
        if (strlen(s) >= room)
                fail(b, -EINVAL, "this name is too long", s);
        else
                memcpy(out, s, strlen(s));
}

struct graph_builder *gb_new(const char *name, uint32_t batch, uint32_t rows_max, uint32_t context_max,
                             enum op_dtype dtype)
{
        struct graph_builder *b = calloc(1, sizeof(*b));

        if (!b)
                return NULL;
        b->h.magic = GRAPH_MAGIC;
        b->h.batch = batch;
        b->h.rows_max = rows_max;
        b->h.context_max = context_max;
        b->h.dtype = (uint8_t)dtype;
        for (int i = 0; i < ROLE_COUNT; i++)
                b->h.role[i] = GRAPH_NONE;
        /* A model's name is for people: a long one is cut. */
        memcpy(b->h.name, name, strnlen(name, sizeof(b->h.name) - 1));
        return b;
}

unsigned gb_tensor(struct graph_builder *b, const char *name, enum op_dtype dtype, enum graph_residency res, int ndim,
                   const int64_t *dims)
{
        struct graph_tensor *t = b ? append(b, &b->tensors, sizeof(*t), GRAPH_TENSORS_MAX, "tensors") : NULL;

        if (!t)
                return GRAPH_NONE;
        if (ndim < 1 || ndim > OP_DIMS_MAX) {
                fail(b, -EINVAL, "this tensor must have 1 to 4 dimensions", name);
                return GRAPH_NONE;
        }
        put_text(b, t->name, sizeof(t->name), name);
        memcpy(t->dims, dims, (size_t)ndim * sizeof(*dims));
        t->dtype = (uint8_t)dtype;
        t->ndim = (uint8_t)ndim;
        t->residency = (uint8_t)res;
        t->seq_axis = -1;
        t->recipe = GRAPH_NONE;
        return b->tensors.count - 1;
}

static struct graph_tensor *tensor_of(struct graph_builder *b, unsigned t)
{
        if (b && !b->rc && t >= b->tensors.count)
                fail(b, -EINVAL, "a tensor is named that is not there", "builder");
        return b && !b->rc ? (struct graph_tensor *)b->tensors.items + t : NULL;
}

void gb_recipe(struct graph_builder *b, unsigned t, const struct graph_recipe *piece)
{
        struct graph_tensor *tensor = tensor_of(b, t);
        struct graph_recipe *r = tensor ? append(b, &b->recipes, sizeof(*r), GRAPH_RECIPES_MAX, "recipes") : NULL;

        if (!r)
                return;
        uint16_t *link = &tensor->recipe;

        *r = *piece;
        r->next = GRAPH_NONE;
        while (*link != GRAPH_NONE)
                link = &((struct graph_recipe *)b->recipes.items)[*link].next;
        *link = (uint16_t)(b->recipes.count - 1);
}

void gb_seq_axis(struct graph_builder *b, unsigned t, int axis)
{
        struct graph_tensor *tensor = tensor_of(b, t);

        if (tensor)
                tensor->seq_axis = (int8_t)axis;
}

void gb_output(struct graph_builder *b, unsigned t)
{
        struct graph_tensor *tensor = tensor_of(b, t);

        if (tensor)
                tensor->residency = RES_OUTPUT;
}

void gb_role(struct graph_builder *b, enum graph_role role, unsigned t)
{
        if (tensor_of(b, t))
                b->h.role[role] = (uint16_t)t;
}

void gb_segment(struct graph_builder *b, enum graph_segment_kind kind, uint8_t phase)
{
        struct graph_segment *s = b ? append(b, &b->segments, sizeof(*s), GRAPH_SEGMENTS_MAX, "segments") : NULL;

        if (!s)
                return;
        s->kind = (uint8_t)kind;
        s->phase = phase;
        s->first = b->nodes.count;
        b->phase = phase;
}

void gb_node(struct graph_builder *b, enum op_code code, const struct op_attr *attr, unsigned nargs,
             const unsigned *args)
{
        struct graph_node *n = b ? append(b, &b->nodes, sizeof(*n), GRAPH_NODES_MAX, "nodes") : NULL;

        if (!n)
                return;
        n->code = (uint16_t)code;
        n->phase = b->phase;
        if (attr)
                n->attr = *attr;
        if (!n->attr.batch)
                n->attr.batch = (int32_t)b->h.batch;
        for (unsigned i = 0; i < OP_ARGS_MAX; i++)
                n->arg[i] = i < nargs ? (uint16_t)args[i] : GRAPH_NONE;
        /* The segment that was begun last grows by this node. */
        if (b->segments.count)
                ((struct graph_segment *)b->segments.items)[b->segments.count - 1].count++;
}

void gb_prefix(struct graph_builder *b, const char *prefix)
{
        if (b)
                put_text(b, b->h.prefix, sizeof(b->h.prefix), prefix);
}

void gb_vocab(struct graph_builder *b, uint32_t vocab)
{
        if (b)
                b->h.vocab = vocab;
}

static char *put_list(char *at, const struct list *l, size_t size)
{
        if (l->count)
                memcpy(at, l->items, l->count * size);
        return at + l->count * size;
}

static int assemble(struct graph_builder *b, struct graph *out)
{
        b->h.ntensors = b->tensors.count;
        b->h.nnodes = b->nodes.count;
        b->h.nrecipes = b->recipes.count;
        b->h.nsegments = b->segments.count;
        size_t total = block_bytes(&b->h);

        if (total > GRAPH_BYTES_MAX)
                return err_set(-EINVAL, "graph %s: %zu bytes, above the limit of %u", b->h.name, total,
                               GRAPH_BYTES_MAX);
        b->h.total_bytes = (uint32_t)total;
        int rc = check_counts(&b->h, total);
        char *block = rc == 0 ? malloc(total) : NULL;

        if (!block)
                return rc < 0 ? rc : err_set(-ENOMEM, "graph %s: no memory for %zu bytes", b->h.name, total);
        memcpy(block, &b->h, sizeof(b->h));
        char *at = put_list(block + sizeof(b->h), &b->tensors, sizeof(struct graph_tensor));

        at = put_list(at, &b->nodes, sizeof(struct graph_node));
        at = put_list(at, &b->recipes, sizeof(struct graph_recipe));
        put_list(at, &b->segments, sizeof(struct graph_segment));
        point_into(out, block);
        rc = check_all(out);
        if (rc < 0)
                graph_free(out);
        return rc;
}

int gb_finish(struct graph_builder *b, struct graph *out)
{
        memset(out, 0, sizeof(*out));
        if (!b)
                return err_set(-ENOMEM, "no memory for building a graph");
        int rc = b->rc ? err_set(b->rc, "%s", b->why) : assemble(b, out);

        free(b->tensors.items);
        free(b->nodes.items);
        free(b->recipes.items);
        free(b->segments.items);
        free(b);
        return rc;
}
