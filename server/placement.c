/*
 * Where a tensor's bytes are. Weights lie in device memory. Inputs, outputs and states lie in memory that the session's
 * medium allocated, where the device can use host memory: a peer writes straight into the tensor, and results are
 * written straight out of it. Where it cannot, they lie in device memory that is registered with the medium. They get
 * their place when they are first needed, for rows_max rows, so that their addresses and keys last.
 */
#include <errno.h>
#include <string.h>

#include "check.h"
#include "err.h"
#include "inside.h"

static int alloc_on_medium(struct model *m, struct srv_tensor *t)
{
        int rc = tp_alloc(m->s->home->ep, t->bytes, &t->mem);

        if (rc >= 0)
                t->addr = t->mem->region.addr;
        return rc;
}

static int alloc_on_device(struct server *srv, struct model *m, struct srv_tensor *t, bool reachable)
{
        int rc = srv->dev->ops->alloc(srv->dev, t->bytes, &t->dev);

        if (rc < 0)
                return rc;
        if (reachable) {
                rc = tp_reg(m->s->home->ep, &t->dev, &t->mem);
                if (rc < 0) {
                        srv->dev->ops->free(srv->dev, &t->dev);
                        t->dev = (struct mem_region){0};
                        return rc;
                }
        }
        t->addr = t->dev.addr;
        return 0;
}

int srv_tensor_ready(struct server *srv, struct model *m, unsigned t)
{
        struct srv_tensor *tensor = &m->tensors[t];
        bool reachable = m->g.tensors[t].residency != RES_CONSTANT;
        int rc;

        if (tensor->addr)
                return 0;
        rc = srv_charge(m->s, tensor->bytes, m->g.tensors[t].name);
        if (rc < 0)
                return rc;
        if (reachable && srv->props.host_memory)
                rc = alloc_on_medium(m, tensor);
        else
                rc = alloc_on_device(srv, m, tensor, reachable);
        if (rc < 0) {
                srv_refund(m->s, tensor->bytes);
                return err_trail(rc, "for tensor %s", m->g.tensors[t].name);
        }
        m->addr[t] = tensor->addr;
        return 0;
}

int srv_place_tensors(struct server *srv, struct model *m, uint32_t first, uint32_t count)
{
        for (uint32_t i = first; i < first + count; i++) {
                const struct graph_node *n = &m->g.nodes[i];

                for (unsigned a = 0; a < op_infos[n->code].nargs; a++) {
                        unsigned t = n->arg[a];
                        int rc = 0;

                        if (t != GRAPH_NONE && m->g.tensors[t].residency != RES_ACTIVATION)
                                rc = srv_tensor_ready(srv, m, t);
                        if (rc < 0)
                                return rc;
                }
        }
        return 0;
}

struct tp_mem *srv_tensor_mem(const struct conn *c, const struct srv_tensor *t)
{
        if (t->mem && t->mem->ep == c->ep)
                return t->mem;
        for (const struct conn_reg *reg = c->regs; reg; reg = reg->next) {
                if (reg->t == t)
                        return reg->mem;
        }
        return NULL;
}

/* Where the bytes of input i are that have yet to be placed; NULL: they are in the tensor. */
static const void *input_bytes(const struct request *r, unsigned i, size_t *local_off)
{
        const struct run_input *in = &r->v.inputs[i];
        const uint8_t *local = r->c->s->local + *local_off;

        if (r->flags & RUN_LOCAL) {
                *local_off += in->len;
                return local;
        }
        if (r->is_call)
                return r->call.blobs[i].data;
        return in->flags == INPUT_INLINE ? r->v.inline_bytes + in->offset : NULL;
}

int srv_place_inputs(struct server *srv, struct request *r)
{
        size_t local_off = 0;

        for (unsigned i = 0; i < r->v.run->ninputs; i++) {
                const struct run_input *in = &r->v.inputs[i];
                const struct srv_tensor *t = &r->m->tensors[in->tensor];
                const void *from = input_bytes(r, i, &local_off);
                int rc = 0;

                if (from) {
                        rc = srv->dev->ops->put(srv->dev, (char *)t->addr + in->tensor_off, from, in->len);
                        r->bytes_copied += in->len;
                } else if (!srv->props.host_memory) {
                        rc = srv->dev->ops->flush(srv->dev, &t->dev);
                }
                if (rc < 0)
                        return rc;
        }
        return 0;
}

int srv_feedback(struct server *srv, struct request *r, const struct run_feedback *f, uint32_t iteration)
{
        const char *src = r->m->tensors[f->src].addr;

        return srv->dev->ops->copy(srv->dev, r->m->tensors[f->dst].addr,
                                   src + f->src_off + (uint64_t)(iteration - 1) * f->src_step, f->len);
}
