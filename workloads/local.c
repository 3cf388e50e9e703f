/* A graph run here and now, on a device of this process, without any server: for verify and the check pass. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "device.h"
#include "digest.h"
#include "err.h"
#include "workload.h"

#define PLANS 8

struct cached_plan {
        struct dev_plan *plan; /* NULL: free */
        unsigned segments;
        uint32_t rows;
};

struct local_model {
        struct graph g;
        struct device *dev;
        struct mem_region *regions; /* per tensor; addr NULL: not made yet */
        void **addr;
        size_t *offsets;
        struct mem_region scratch;
        struct cached_plan plans[PLANS];
        unsigned next_plan;
        struct digest weights;
};

/* ---- set-up ---- */

/* Memory for tensor t, zeroed, on first need: a model whose logits of all positions nobody asks for does not pay for
 * them. */
static int ensure(struct local_model *m, unsigned t)
{
        if (m->addr[t])
                return 0;
        size_t bytes = graph_tensor_bytes(&m->g, t, m->g.h->rows_max, NULL);
        int rc = m->dev->ops->alloc(m->dev, bytes, &m->regions[t]);

        if (rc < 0)
                return err_trail(rc, "while allocating tensor %s of %s", m->g.tensors[t].name, m->g.h->name);
        m->addr[t] = m->regions[t].addr;
        return 0;
}

static int load_weight(struct local_model *m, unsigned t, const struct weights_source *src,
                       struct digest_stream *digest)
{
        size_t bytes = graph_tensor_bytes(&m->g, t, 1, NULL);
        void *host = malloc(bytes);
        int rc = host ? weights_make(&m->g, t, src, host)
                      : err_set(-ENOMEM, "%s: no memory for weight %s of %zu bytes", m->g.h->name, m->g.tensors[t].name,
                                bytes);

        if (rc == 0)
                rc = ensure(m, t);
        if (rc == 0) {
                digest_add(digest, host, bytes);
                rc = m->dev->ops->put(m->dev, m->addr[t], host, bytes);
        }
        if (rc == 0)
                rc = m->dev->ops->sync(m->dev);
        free(host);
        return rc;
}

static int load_weights(struct local_model *m, const struct weights_source *src)
{
        struct digest_stream *digest = digest_begin();
        int rc = digest ? 0 : err_set(-ENOMEM, "%s: no memory", m->g.h->name);

        for (unsigned t = 0; t < m->g.h->ntensors && rc == 0; t++)
                if (m->g.tensors[t].recipe != GRAPH_NONE)
                        rc = load_weight(m, t, src, digest);
        if (digest)
                m->weights = digest_end(digest);
        return rc;
}

static int make_tables(struct local_model *m, const struct graph *g)
{
        size_t n = g->h->ntensors;
        int rc = graph_clone(g, &m->g);

        if (rc < 0)
                return rc;
        m->regions = calloc(n, sizeof(*m->regions));
        m->addr = calloc(n, sizeof(*m->addr));
        m->offsets = calloc(n, sizeof(*m->offsets));
        if (!m->regions || !m->addr || !m->offsets)
                return err_set(-ENOMEM, "%s: no memory for its tables", g->h->name);
        return 0;
}

int local_open(const struct graph *g, const struct weights_source *src, struct device *dev, struct local_model **out)
{
        struct local_model *m = calloc(1, sizeof(*m));

        *out = NULL;
        if (!m)
                return err_set(-ENOMEM, "%s: no memory", g->h->name);
        m->dev = dev;
        int rc = make_tables(m, g);

        if (rc == 0)
                rc = load_weights(m, src);
        if (rc < 0) {
                local_close(m);
                return rc;
        }
        *out = m;
        return 0;
}

static void drop_plans(struct local_model *m)
{
        for (unsigned i = 0; i < PLANS; i++) {
                dev_plan_free(m->plans[i].plan);
                m->plans[i].plan = NULL;
        }
}

void local_close(struct local_model *m)
{
        if (!m)
                return;
        m->dev->ops->sync(m->dev);
        drop_plans(m);
        for (unsigned t = 0; m->addr && m->regions && t < m->g.h->ntensors; t++)
                if (m->addr[t])
                        m->dev->ops->free(m->dev, &m->regions[t]);
        if (m->scratch.addr)
                m->dev->ops->free(m->dev, &m->scratch);
        free(m->regions);
        free(m->addr);
        free(m->offsets);
        graph_free(&m->g);
        free(m);
}

struct digest local_weights_digest(const struct local_model *m)
{
        return m->weights;
}

/* ---- running ---- */

/* Scratch for this many rows. A larger block has another address, so plans made for the old one die. */
static int ensure_scratch(struct local_model *m, uint32_t rows)
{
        size_t need;
        int rc = graph_scratch(&m->g, rows, m->offsets, &need);

        if (rc < 0 || need <= m->scratch.len)
                return rc;
        drop_plans(m);
        if (m->scratch.addr)
                m->dev->ops->free(m->dev, &m->scratch);
        memset(&m->scratch, 0, sizeof(m->scratch));
        return m->dev->ops->alloc(m->dev, need, &m->scratch);
}

static int ensure_operands(struct local_model *m, const struct graph_segment *s)
{
        for (uint32_t i = s->first; i < s->first + s->count; i++) {
                const struct graph_node *n = &m->g.nodes[i];

                for (unsigned a = 0; a < OP_ARGS_MAX; a++) {
                        int rc =
                            n->arg[a] != GRAPH_NONE && m->offsets[n->arg[a]] == SIZE_MAX ? ensure(m, n->arg[a]) : 0;

                        if (rc < 0)
                                return rc;
                }
        }
        return 0;
}

static int bind_segments(struct local_model *m, unsigned segments, uint32_t rows, struct op_inst *insts)
{
        struct graph_binding b = {
            .g = &m->g, .rows = rows, .addr = m->addr, .scratch = m->scratch.addr, .offsets = m->offsets, .fuse = true};
        int made = 0;

        for (uint32_t i = 0; i < m->g.h->nsegments; i++) {
                const struct graph_segment *s = &m->g.segments[i];

                if (!(segments & 1u << s->kind))
                        continue;
                int rc = ensure_operands(m, s);

                b.first = s->first;
                b.count = s->count;
                if (rc == 0)
                        rc = graph_bind(&b, insts + made, m->g.h->nnodes - (size_t)made);
                if (rc < 0)
                        return rc;
                made += rc;
        }
        return made;
}

static int make_plan(struct local_model *m, unsigned segments, uint32_t rows, struct dev_plan **out)
{
        struct op_inst *insts = malloc(m->g.h->nnodes * sizeof(*insts));
        int rc = insts ? ensure_scratch(m, rows) : err_set(-ENOMEM, "%s: no memory for a plan", m->g.h->name);

        if (rc == 0)
                rc = bind_segments(m, segments, rows, insts);
        if (rc == 0)
                rc = err_set(-EINVAL, "%s: none of these segments is in the graph", m->g.h->name);
        if (rc > 0)
                rc = dev_plan_make(m->dev, insts, (size_t)rc, out);
        free(insts);
        return rc;
}

static int find_plan(struct local_model *m, unsigned segments, uint32_t rows, struct dev_plan **out)
{
        for (unsigned i = 0; i < PLANS; i++) {
                const struct cached_plan *c = &m->plans[i];

                if (c->plan && c->segments == segments && c->rows == rows) {
                        *out = c->plan;
                        return 0;
                }
        }
        int rc = make_plan(m, segments, rows, out);

        if (rc < 0)
                return rc;
        struct cached_plan *c = &m->plans[m->next_plan++ % PLANS];

        dev_plan_free(c->plan);
        *c = (struct cached_plan){.plan = *out, .segments = segments, .rows = rows};
        return 0;
}

/* The tensor of a role, with memory; io must not be larger than it. */
static int io_tensor(struct local_model *m, const struct local_io *io, uint32_t rows)
{
        unsigned t = m->g.h->role[io->role];

        if (t == GRAPH_NONE)
                return err_set(-EINVAL, "%s: the graph has no tensor in role %d", m->g.h->name, (int)io->role);
        if (io->bytes > graph_tensor_bytes(&m->g, t, rows, NULL))
                return err_set(-EINVAL, "%s: %zu bytes do not fit tensor %s with %u rows", m->g.h->name, io->bytes,
                               m->g.tensors[t].name, rows);
        int rc = ensure(m, t);

        return rc < 0 ? rc : (int)t;
}

static int execute(struct local_model *m, struct dev_plan *plan)
{
        struct dev_event ev = {0};
        int rc = dev_run(plan, &ev);

        if (rc == 0)
                rc = m->dev->ops->sync(m->dev);
        if (rc == 0)
                rc = dev_test(m->dev, &ev);
        return rc < 0 ? rc : 0;
}

int local_run(struct local_model *m, unsigned segments, uint32_t rows, const struct local_io *in, size_t nin,
              const struct local_io *out, size_t nout)
{
        struct dev_plan *plan;
        int rc = find_plan(m, segments, rows, &plan);

        for (size_t i = 0; i < nin && rc >= 0; i++) {
                rc = io_tensor(m, &in[i], rows);
                if (rc >= 0)
                        rc = m->dev->ops->put(m->dev, m->addr[rc], in[i].data, in[i].bytes);
        }
        if (rc >= 0)
                rc = execute(m, plan);
        for (size_t i = 0; i < nout && rc >= 0; i++) {
                rc = io_tensor(m, &out[i], rows);
                if (rc >= 0)
                        rc = m->dev->ops->get(m->dev, out[i].data, m->addr[rc], out[i].bytes);
        }
        if (rc >= 0)
                rc = m->dev->ops->sync(m->dev);
        return rc < 0 ? rc : 0;
}
