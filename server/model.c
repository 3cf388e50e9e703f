/*
 * Models of a session: LOAD makes one out of a graph block and a source of weights; PUT and GET move bytes of its
 * tensors; DROP forgets its states or all of it.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "err.h"
#include "inside.h"

struct model *srv_model(struct session *s, uint32_t id)
{
        if (id >= SRV_MODELS || !s->models[id]) {
                err_set(-ENOENT, "model %u is not loaded", id);
                return NULL;
        }
        return s->models[id];
}

void srv_pin(struct request *r, struct model *m)
{
        BUG_ON(r->m);
        r->m = m;
        m->pins++;
}

void srv_unpin(struct request *r)
{
        if (!r->m)
                return;
        if (r->claimed)
                r->m->busy = false;
        r->m->pins--;
        r->m = NULL;
        r->claimed = false;
}

/* ---- making one ---- */

static int model_tables(struct model *m)
{
        uint32_t n = m->g.h->ntensors;

        m->tensors = calloc(n, sizeof(*m->tensors));
        m->addr = calloc(n, sizeof(*m->addr));
        m->offsets = calloc(n, sizeof(*m->offsets));
        m->insts = calloc(m->g.h->nnodes, sizeof(*m->insts));
        if (!m->tensors || !m->addr || !m->offsets || !m->insts)
                return err_set(-ENOMEM, "no memory for a graph of %u tensors and %u nodes", n, m->g.h->nnodes);
        for (uint32_t t = 0; t < n; t++)
                m->tensors[t].bytes = graph_tensor_bytes(&m->g, t, m->g.h->rows_max, NULL);
        m->plans.s = m->s;
        return srv_plans_init(&m->plans);
}

/* Addresses of the weights; constants that nobody makes are zeros until they are PUT. */
static int place_constants(struct server *srv, struct model *m)
{
        uint32_t k = 0;
        int rc = 0;

        for (unsigned t = 0; rc >= 0 && t < m->g.h->ntensors; t++) {
                if (srv_is_weight(&m->g, t))
                        m->addr[t] = m->tensors[t].addr = m->weights->regions[k++].addr;
                else if (m->g.tensors[t].residency == RES_CONSTANT)
                        rc = srv_tensor_ready(srv, m, t);
        }
        return rc;
}

static int load_weights(struct server *srv, struct model *m, const struct msg_load *load)
{
        uint64_t bytes = srv_weights_bytes(&m->g);
        int rc;

        m->source = load->weights;
        if (load->weights == MSG_WEIGHTS_NONE && bytes > 0)
                return err_set(-EINVAL, "graph %s has weights and none were named", m->g.h->name);
        rc = srv_session_charge(m->s, bytes, "weights");
        if (rc < 0)
                return rc;
        rc = srv_weights_get(srv, &m->g, load, &m->weights);
        if (rc < 0)
                srv_session_refund(m->s, bytes);
        return rc;
}

static int model_new(struct server *srv, struct session *s, const struct msg_load *load, struct model **out)
{
        struct model *m;
        uint32_t id = 0;
        int rc;

        while (id < SRV_MODELS && s->models[id])
                id++;
        if (id == SRV_MODELS)
                return err_set(-EDQUOT, "this session has its %u models", SRV_MODELS);
        m = calloc(1, sizeof(*m));
        if (!m)
                return err_set(-ENOMEM, "no memory for a model");
        m->s = s;
        m->id = id;
        rc = graph_from_wire(s->load, s->load_len, &m->g);
        if (rc >= 0)
                rc = model_tables(m);
        if (rc >= 0)
                rc = load_weights(srv, m, load);
        if (rc >= 0)
                rc = place_constants(srv, m);
        if (rc < 0) {
                srv_model_free(srv, m);
                return rc;
        }
        s->models[id] = *out = m;
        return 0;
}

void srv_model_free(struct server *srv, struct model *m)
{
        BUG_ON(m->pins);
        if (m->s->models[m->id] == m)
                m->s->models[m->id] = NULL;
        srv_plans_free(&m->plans);
        srv_tensor_unreg(m);
        for (unsigned t = 0; m->tensors && t < m->g.h->ntensors; t++) {
                struct srv_tensor *tensor = &m->tensors[t];

                if (!tensor->mem && !tensor->dev.addr)
                        continue;
                if (tensor->mem && m->s->home) /* else it has gone with its endpoint */
                        tp_free(tensor->mem);
                if (tensor->dev.addr)
                        srv->dev->ops->free(srv->dev, &tensor->dev);
                srv_refund(m->s, tensor->bytes);
        }
        if (m->scratch.addr) {
                srv_refund(m->s, m->scratch.len);
                srv->dev->ops->free(srv->dev, &m->scratch);
        }
        if (m->weights) {
                srv_session_refund(m->s, m->weights->bytes);
                srv_weights_put(srv, m->weights);
        }
        free(m->tensors);
        free(m->addr);
        free(m->offsets);
        free(m->insts);
        graph_free(&m->g);
        free(m);
}

/* ---- LOAD ---- */

static void load_forget(struct session *s)
{
        free(s->load);
        s->load = NULL;
        s->load_len = s->load_total = 0;
}

static int load_append(struct session *s, const struct msg_load *m)
{
        if (m->offset == 0) {
                load_forget(s);
                s->load = malloc(m->total_len ? m->total_len : 1);
                if (!s->load)
                        return err_set(-ENOMEM, "no memory for a graph of %u bytes", m->total_len);
                s->load_total = m->total_len;
        }
        if (!s->load || m->total_len != s->load_total || m->offset != s->load_len)
                return err_set(-EPROTO, "LOAD: a part at %u of %u, expected %u of %u", m->offset, m->total_len,
                               s->load_len, s->load_total);
        memcpy(s->load + s->load_len, m + 1, m->part_len);
        s->load_len += m->part_len;
        return 0;
}

static void loaded_fill(const struct server *srv, const struct model *m, struct msg_loaded *out)
{
        struct digest weights = m->weights->digest;

        *out = (struct msg_loaded){
            .model = m->id, .weights_digest = {weights.lo, weights.hi}, .weights_bytes = m->weights->bytes};
        for (unsigned t = 0; t < m->g.h->ntensors; t++) {
                uint8_t residency = m->g.tensors[t].residency;

                if (residency == RES_STATE)
                        out->state_bytes += m->tensors[t].bytes;
                if (residency == RES_INPUT || residency == RES_OUTPUT)
                        out->io_bytes += m->tensors[t].bytes;
        }
}

/* Loading blocks the loop: it is set-up, and whoever measures at the same time sees it in the queue's leaf. */
int srv_load(struct server *srv, struct request *r)
{
        const struct msg_load load = *(const struct msg_load *)r->frame;
        struct msg_loaded *out = (struct msg_loaded *)r->frame;
        struct session *s = r->c->s;
        uint64_t start = clock_ns();
        struct model *m = NULL;
        struct digest graph;
        int rc = load_append(s, (const struct msg_load *)r->frame);

        if (rc < 0 || s->load_len < s->load_total) {
                if (rc >= 0)
                        srv_request_rest(srv, r);
                return rc;
        }
        graph = digest_of(s->load, s->load_len);
        rc = model_new(srv, s, &load, &m);
        load_forget(s);
        if (rc < 0)
                return rc;
        loaded_fill(srv, m, out);
        out->graph_digest[0] = graph.lo;
        out->graph_digest[1] = graph.hi;
        out->load_ns = clock_ns() - start;
        srv_answer(srv, r, MSG_LOADED, out, sizeof(*out), 0);
        return 0;
}

/* ---- PUT, GET, KEEP, DROP ---- */

static int piece_check(const struct model *m, const struct msg_put *p)
{
        if (p->tensor >= m->g.h->ntensors)
                return err_set(-EINVAL, "tensor %u: the graph has %u", p->tensor, m->g.h->ntensors);
        if (p->offset > m->tensors[p->tensor].bytes || p->len > m->tensors[p->tensor].bytes - p->offset)
                return err_set(-EINVAL, "[%llu, +%llu) is outside tensor %u (%s) of %zu bytes",
                               (unsigned long long)p->offset, (unsigned long long)p->len, p->tensor,
                               m->g.tensors[p->tensor].name, m->tensors[p->tensor].bytes);
        return 0;
}

static void ack(struct server *srv, struct request *r, enum msg_opcode op, uint32_t model, uint32_t what)
{
        struct msg_model_ref *a = (struct msg_model_ref *)r->frame;

        a->model = model;
        a->what = what;
        srv_answer(srv, r, op, a, sizeof(*a), 0);
}

int srv_put(struct server *srv, struct request *r)
{
        const struct msg_put p = *(const struct msg_put *)r->frame;
        const struct tp_mem *staging = r->c->staging;
        struct model *m;
        bool own;
        int rc;

        if (r->len != sizeof(p))
                return err_set(-EPROTO, "PUT: an acknowledgement from a client");
        m = srv_model(r->c->s, p.model);
        if (!m)
                return -ENOENT;
        rc = piece_check(m, &p);
        if (rc < 0)
                return rc;
        own = srv_is_weight(&m->g, p.tensor) ? m->source == MSG_WEIGHTS_PUT
                                             : m->g.tensors[p.tensor].residency == RES_CONSTANT;
        if (!own)
                return err_set(-EACCES, "tensor %u (%s) is not one that this session may PUT", p.tensor,
                               m->g.tensors[p.tensor].name);
        if (m->busy)
                return err_set(-EBUSY, "model %u is running", p.model);
        if (!staging || p.len > staging->region.len)
                return err_set(-EINVAL, "%llu bytes were never in staging", (unsigned long long)p.len);
        rc = srv->dev->ops->put(srv->dev, (char *)m->addr[p.tensor] + p.offset, staging->region.addr, p.len);
        if (rc < 0)
                return rc;
        ack(srv, r, MSG_PUT, p.model, p.tensor);
        return 0;
}

int srv_get(struct server *srv, struct request *r)
{
        const struct msg_put *p = (const struct msg_put *)r->frame;
        struct model *m;
        uint8_t residency;
        int rc;

        if (r->len != sizeof(*p))
                return err_set(-EPROTO, "GET: an acknowledgement from a client");
        m = srv_model(r->c->s, p->model);
        if (!m)
                return -ENOENT;
        rc = piece_check(m, p);
        if (rc < 0)
                return rc;
        residency = m->g.tensors[p->tensor].residency;
        if (residency != RES_STATE && residency != RES_OUTPUT && residency != RES_INPUT)
                return err_set(-EACCES, "tensor %u (%s) is not one that a client may read", p->tensor,
                               m->g.tensors[p->tensor].name);
        if (p->region >= SRV_REGIONS || p->region_off > r->c->region_len[p->region] ||
            p->len > r->c->region_len[p->region] - p->region_off || !r->c->rmem[p->region])
                return err_set(-EINVAL, "[%llu, +%llu) is not in a region %u that was given",
                               (unsigned long long)p->region_off, (unsigned long long)p->len, p->region);
        rc = srv_tensor_ready(srv, m, p->tensor);
        if (rc < 0)
                return rc;
        srv_pin(r, m);
        r->stage = ST_GET;
        return 0;
}

int srv_keep(struct server *srv, struct request *r)
{
        const struct msg_model_ref ref = *(const struct msg_model_ref *)r->frame;
        struct model *m = srv_model(r->c->s, ref.model);

        if (!m)
                return -ENOENT;
        m->state_live = true;
        ack(srv, r, MSG_KEEP, ref.model, ref.what);
        return 0;
}

int srv_drop(struct server *srv, struct request *r)
{
        const struct msg_model_ref ref = *(const struct msg_model_ref *)r->frame;
        struct model *m = srv_model(r->c->s, ref.model);

        if (!m)
                return -ENOENT;
        if (ref.what > 1)
                return err_set(-EINVAL, "DROP: what is %u, expected 0 or 1", ref.what);
        if (ref.what == 1 && (m->pins > 0 || !srv_settled(m->s)))
                return err_set(-EBUSY, "model %u has requests that are not answered", ref.model);
        m->state_live = false;
        if (ref.what == 1)
                srv_model_free(srv, m);
        ack(srv, r, MSG_DROP, ref.model, ref.what);
        return 0;
}
