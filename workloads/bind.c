#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "err.h"
#include "graph.h"
#include "graph_priv.h"

/*
 * Scratch. The life of an activation runs from the node that first writes it to the last that reads it. Blocks that live
 * at the same time are kept sorted by offset and a new one takes the first gap that it fits in; so consecutive calls
 * that run neighbouring ranges find their activations where the ranges before left them, whatever the ranges were.
 *
 * Fusion makes one instruction of up to three nodes, which writes its result while it still reads the operands of the
 * first: the lives of operands are therefore stretched to the end of the longest chain that graph_bind may fuse, whether
 * or not it does so in a given call.
 */
#define SCRATCH_ALIGN 64
#define CHAIN_MAX     3

struct life {
        uint32_t first, last; /* nodes; first == NEVER: not an activation, or no node touches it */
        size_t end;           /* offset behind the block while it lives */
};

#define NEVER UINT32_MAX

static int bad_rows(const struct graph *g, uint32_t rows)
{
        return err_set(-EINVAL, "graph %s: %u rows, expected 1 to %u", g->h->name, rows, g->h->rows_max);
}

/* ---- fusion ---- */

static void count_readers(const struct graph *g, uint8_t *readers)
{
        memset(readers, 0, g->h->ntensors);
        for (uint32_t i = 0; i < g->h->nnodes; i++) {
                const struct graph_node *n = &g->nodes[i];
                const struct op_info *info = &op_infos[n->code];

                for (unsigned a = 0; a < info->nargs; a++)
                        if (info->role[a] & OP_IN && n->arg[a] != GRAPH_NONE && readers[n->arg[a]] < 2)
                                readers[n->arg[a]]++;
        }
}

struct chain {
        unsigned len; /* nodes, 1: nothing to fuse */
        int32_t act;
        unsigned residual, out; /* tensors */
};

/* Whether node n consumes tensor t and nothing else of the chain forbids it; u is what n writes. */
static bool extends(const struct graph *g, const struct graph_node *linear, const struct chain *c, unsigned t,
                    unsigned u, const uint8_t *readers)
{
        const struct graph_tensor *mid = &g->tensors[t];

        if (mid->residency != RES_ACTIVATION || readers[t] != 1)
                return false;
        if (mid->dtype != g->tensors[linear->arg[1]].dtype)
                return false;
        /* The fused instruction writes u while it reads these. */
        for (unsigned a = 1; a < op_infos[OP_LINEAR].nargs; a++)
                if (linear->arg[a] == u)
                        return false;
        return u != c->residual;
}

/* The longest chain LINEAR [ACT] [ADD] that begins at node i and ends before `end`. */
static struct chain chain_at(const struct graph *g, uint32_t i, uint32_t end, const uint8_t *readers)
{
        const struct graph_node *n = &g->nodes[i];
        struct chain c = {.len = 1, .residual = GRAPH_NONE};

        if (n->code != OP_LINEAR)
                return c;
        c.act = n->attr.act;
        c.residual = n->arg[4];
        c.out = n->arg[0];
        if (c.residual != GRAPH_NONE)
                return c;
        const struct graph_node *next = &g->nodes[i + 1];

        if (i + 1 < end && next->code == OP_ACT && c.act == ACT_NONE && next->arg[1] == c.out &&
            extends(g, n, &c, c.out, next->arg[0], readers)) {
                c = (struct chain){.len = 2, .act = next->attr.act, .residual = GRAPH_NONE, .out = next->arg[0]};
                next++;
        }
        if (i + c.len < end && next->code == OP_ADD && (next->arg[1] == c.out || next->arg[2] == c.out)) {
                struct chain longer = c;

                longer.len = c.len + 1;
                longer.residual = next->arg[1] == c.out ? next->arg[2] : next->arg[1];
                longer.out = next->arg[0];
                if (extends(g, n, &longer, c.out, longer.out, readers))
                        return longer;
        }
        return c;
}

/* ---- scratch ---- */

/* Validation has seen to it that the first node to touch an activation writes it. */
static void touch(const struct graph *g, struct life *life, unsigned t, uint32_t node, uint32_t last)
{
        struct life *l = &life[t];

        if (g->tensors[t].residency != RES_ACTIVATION)
                return;
        if (l->first == NEVER)
                l->first = node;
        if (last > l->last)
                l->last = last;
}

static void find_lives(const struct graph *g, struct life *life, const uint8_t *readers)
{
        for (uint32_t t = 0; t < g->h->ntensors; t++)
                life[t].first = NEVER;
        for (uint32_t i = 0, chain_end = 0; i < g->h->nnodes; i++) {
                const struct graph_node *n = &g->nodes[i];
                const struct op_info *info = &op_infos[n->code];
                uint32_t end = i + chain_at(g, i, g->h->nnodes, readers).len - 1;

                chain_end = end > chain_end ? end : chain_end;
                for (unsigned a = 0; a < info->nargs; a++)
                        if (n->arg[a] != GRAPH_NONE)
                                touch(g, life, n->arg[a], i, info->role[a] & OP_IN ? chain_end : i);
        }
}

struct live_set {
        uint16_t *tensor; /* sorted by offset */
        uint32_t count;
};

static void bury(struct live_set *s, const struct life *life, uint32_t node)
{
        uint32_t kept = 0;

        for (uint32_t i = 0; i < s->count; i++)
                if (life[s->tensor[i]].last >= node)
                        s->tensor[kept++] = s->tensor[i];
        s->count = kept;
}

static void place(struct live_set *s, struct life *life, size_t *offsets, unsigned t, size_t bytes)
{
        size_t at = 0;
        uint32_t i = 0;

        for (; i < s->count && offsets[s->tensor[i]] - at < bytes; i++)
                at = life[s->tensor[i]].end;
        memmove(&s->tensor[i + 1], &s->tensor[i], (s->count - i) * sizeof(*s->tensor));
        s->tensor[i] = (uint16_t)t;
        s->count++;
        offsets[t] = at;
        life[t].end = at + bytes;
}

static size_t place_all(const struct graph *g, uint32_t rows, struct life *life, struct live_set *set, size_t *offsets)
{
        size_t total = 0;

        for (uint32_t i = 0; i < g->h->nnodes; i++) {
                const struct graph_node *n = &g->nodes[i];

                bury(set, life, i);
                for (unsigned a = 0; a < op_infos[n->code].nargs; a++) {
                        unsigned t = n->arg[a];

                        if (t == GRAPH_NONE || life[t].first != i || offsets[t] != SIZE_MAX)
                                continue;
                        /* At most 2^46 bytes each and GRAPH_TENSORS_MAX of them: no overflow in a validated graph. */
                        size_t bytes = ALIGN_UP(graph_tensor_bytes(g, t, rows, NULL), (size_t)SCRATCH_ALIGN);

                        place(set, life, offsets, t, bytes);
                        if (life[t].end > total)
                                total = life[t].end;
                }
        }
        return total;
}

int graph_scratch(const struct graph *g, uint32_t rows, size_t *offsets, size_t *total_bytes)
{
        uint8_t readers[GRAPH_TENSORS_MAX];
        uint16_t live[GRAPH_TENSORS_MAX];
        struct live_set set = {.tensor = live};

        if (rows < 1 || rows > g->h->rows_max)
                return bad_rows(g, rows);
        struct life *life = calloc(g->h->ntensors, sizeof(*life));

        if (!life)
                return err_set(-ENOMEM, "graph %s: no memory for planning its scratch", g->h->name);
        for (uint32_t t = 0; t < g->h->ntensors; t++)
                offsets[t] = SIZE_MAX;
        count_readers(g, readers);
        find_lives(g, life, readers);
        *total_bytes = place_all(g, rows, life, &set, offsets);
        free(life);
        return 0;
}

/* ---- instructions ---- */

static int set_address(const struct graph_binding *b, unsigned t, void **out)
{
        if (b->offsets[t] != SIZE_MAX)
                *out = (char *)b->scratch + b->offsets[t];
        else
                *out = b->addr[t];
        if (!*out)
                return err_set(-EINVAL, "graph %s: tensor %u (%s) has no address", b->g->h->name, t,
                               b->g->tensors[t].name);
        return 0;
}

static int set_arg(const struct graph_binding *b, struct op_inst *inst, unsigned a, unsigned t)
{
        const struct graph_tensor *tensor = &b->g->tensors[t];
        struct op_arg *arg = &inst->arg[a];

        arg->dtype = (enum op_dtype)tensor->dtype;
        arg->ndim = tensor->ndim;
        graph_tensor_bytes(b->g, t, b->rows, arg->dims);
        return set_address(b, t, &arg->data);
}

static int bind_node(const struct graph_binding *b, uint32_t i, const struct chain *c, struct op_inst *out)
{
        const struct graph_node *n = &b->g->nodes[i];
        int rc = 0;

        graph_inst(b->g, i, b->rows, out);
        for (unsigned a = 0; a < op_infos[n->code].nargs && rc == 0; a++)
                if (n->arg[a] != GRAPH_NONE && !(a == 0 && c->len > 1))
                        rc = set_address(b, n->arg[a], &out->arg[a].data);
        if (rc == 0 && c->len > 1) {
                out->attr.act = c->act;
                rc = set_arg(b, out, 0, c->out);
                if (rc == 0 && c->residual != GRAPH_NONE)
                        rc = set_arg(b, out, 4, c->residual);
        }
        return rc;
}

int graph_bind(const struct graph_binding *b, struct op_inst *out, size_t max)
{
        const struct graph *g = b->g;
        uint8_t readers[GRAPH_TENSORS_MAX];
        size_t made = 0;

        if (b->rows < 1 || b->rows > g->h->rows_max)
                return bad_rows(g, b->rows);
        if (b->first > g->h->nnodes || b->count > g->h->nnodes - b->first)
                return err_set(-EINVAL, "graph %s: nodes %u and %u more, it has %u", g->h->name, b->first, b->count,
                               g->h->nnodes);
        if (b->fuse)
                count_readers(g, readers);
        for (uint32_t i = b->first, end = b->first + b->count; i < end;) {
                struct chain c = {.len = 1};

                if (b->fuse)
                        c = chain_at(g, i, end, readers);
                if (made == max)
                        return err_set(-ENOSPC, "graph %s: more than %zu instructions", g->h->name, max);
                int rc = bind_node(b, i, &c, &out[made++]);

                if (rc < 0)
                        return rc;
                i += c.len;
        }
        return (int)made;
}

/* ---- cost ---- */

int graph_cost(const struct graph *g, uint32_t rows, uint32_t first, uint32_t count, int64_t past,
               struct graph_cost *out)
{
        memset(out, 0, sizeof(*out));
        if (rows < 1 || rows > g->h->rows_max)
                return bad_rows(g, rows);
        if (first > g->h->nnodes || count > g->h->nnodes - first)
                return err_set(-EINVAL, "graph %s: nodes %u and %u more, it has %u", g->h->name, first, count,
                               g->h->nnodes);
        for (uint32_t i = first; i < first + count; i++) {
                const struct graph_node *n = &g->nodes[i];
                struct op_inst inst;

                graph_inst(g, i, rows, &inst);
                struct op_cost cost = op_cost(&inst, past);

                out->flop += cost.flop;
                out->bytes += cost.bytes;
                out->weight_bytes += cost.weight_bytes;
                out->ops++;
                if (n->code == OP_LINEAR && (n->arg[0] == g->h->role[ROLE_LAST] || n->arg[0] == g->h->role[ROLE_ALL])) {
                        out->head_flop += cost.flop;
                        out->head_weight_bytes += cost.weight_bytes;
                }
        }
        return 0;
}
