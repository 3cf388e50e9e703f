/* KEYS: memory of ours that a client may write, memory of a client's that we may write. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "err.h"
#include "inside.h"

_Static_assert(MSG_KEY_BYTES == TP_KEY_BYTES, "a transport's key travels in KEYS");

#define IMPORT_NS (20 * NS_PER_MS)

/* ---- tensors ---- */

int srv_tensor_reg(struct conn *c, struct model *m, struct srv_tensor *t, struct tp_mem **out)
{
        struct conn_reg *reg = c->regs;
        int rc;

        *out = t->mem;
        if (t->mem->ep == c->ep)
                return 0;
        while (reg && reg->t != t)
                reg = reg->next;
        if (!reg) {
                reg = calloc(1, sizeof(*reg));
                if (!reg)
                        return err_set(-ENOMEM, "no memory for registering a tensor");
                rc = tp_reg(c->ep, &t->mem->region, &reg->mem);
                if (rc < 0) {
                        free(reg);
                        return rc;
                }
                reg->m = m;
                reg->t = t;
                reg->next = c->regs;
                c->regs = reg;
        }
        *out = reg->mem;
        return 0;
}

void srv_tensor_unreg(struct model *m)
{
        for (struct conn *c = m->s->conns; c; c = c->sibling) {
                for (struct conn_reg **p = &c->regs, *reg; (reg = *p) != NULL;) {
                        if (reg->m != m) {
                                p = &reg->next;
                                continue;
                        }
                        *p = reg->next;
                        tp_free(reg->mem);
                        free(reg);
                }
        }
}

/* ---- KEYS ---- */

/* Keys die with their memory: with a model, a connection, or a buffer that is replaced. What lives is counted there. */
static uint32_t live_keys(const struct session *s)
{
        uint32_t n = 0;

        for (unsigned i = 0; i < SRV_MODELS; i++)
                n += s->models[i] ? s->models[i]->keys : 0;
        for (const struct conn *c = s->conns; c; c = c->sibling) {
                n += c->staging_keys + c->shadow_keys;
                for (const struct conn_reg *reg = c->regs; reg; reg = reg->next)
                        n += reg->keys;
        }
        return n;
}

/* Before anything is done for the key, so that a refusal leaves things as they are. */
static int may_have_key(const struct session *s)
{
        if (live_keys(s) >= SRV_KEYS)
                return err_set(-EDQUOT, "this session has %u keys, more than that it cannot need", SRV_KEYS);
        return 0;
}

/* *count: of the live keys to mem. */
static int give_key(struct request *r, struct tp_mem *mem, size_t len, uint32_t *count)
{
        struct msg_keys *m = (struct msg_keys *)r->frame;
        struct tp_key key;
        int rc = tp_export_key(mem, 0, len, &key);

        if (rc < 0)
                return rc;
        ++*count;
        memcpy(m->key, key.bytes, sizeof(m->key));
        m->len = len;
        m->epoch = ++r->c->s->keys;
        return 0;
}

/* Where keys to tensor t by way of this connection are counted. */
static uint32_t *tensor_keys(struct conn *c, struct model *m, const struct srv_tensor *t)
{
        struct conn_reg *reg = c->regs;

        while (reg && reg->t != t)
                reg = reg->next;
        return reg ? &reg->keys : &m->keys;
}

static int ask_tensor(struct server *srv, struct request *r)
{
        struct msg_keys *k = (struct msg_keys *)r->frame;
        struct model *m = srv_model(r->c->s, k->model);
        struct srv_tensor *t;
        struct tp_mem *mem;
        uint8_t residency;
        int rc;

        if (!m)
                return -ENOENT;
        if (k->index >= m->g.h->ntensors)
                return err_set(-EINVAL, "tensor %u: the graph has %u", k->index, m->g.h->ntensors);
        residency = m->g.tensors[k->index].residency;
        if (residency != RES_INPUT && residency != RES_STATE)
                return err_set(-EACCES, "tensor %u (%s) is neither an input nor a state: there is no key to it",
                               k->index, m->g.tensors[k->index].name);
        t = &m->tensors[k->index];
        rc = may_have_key(r->c->s);
        if (rc >= 0)
                rc = srv_tensor_ready(srv, m, k->index);
        if (rc >= 0)
                rc = srv_tensor_reg(r->c, m, t, &mem);
        return rc < 0 ? rc : give_key(r, mem, t->bytes, tensor_keys(r->c, m, t));
}

/* Staging and shadow are replaced when they grow, so nothing may be under way. */
static int ask_buffer(struct request *r, struct tp_mem **mem, uint32_t *count, const char *what)
{
        const struct msg_keys *k = (const struct msg_keys *)r->frame;
        uint64_t old = *mem ? (*mem)->region.len : 0;
        int rc;

        if (r->c->busy > 1 || r->c->posts > 0)
                return err_set(-EBUSY, "a %s buffer cannot be asked for while requests are in flight", what);
        rc = may_have_key(r->c->s);
        if (rc >= 0)
                rc = srv_grow(r->c, mem, k->len, what);
        if (rc < 0)
                return rc;
        if ((*mem)->region.len != old)
                *count = 0;
        return give_key(r, *mem, (*mem)->region.len, count);
}

static int ask_staging(struct server *srv, struct request *r)
{
        return ask_buffer(r, &r->c->staging, &r->c->staging_keys, "staging");
}

static int ask_shadow(struct server *srv, struct request *r)
{
        return ask_buffer(r, &r->c->shadow, &r->c->shadow_keys, "shadow");
}

static int region_index(const struct msg_keys *k)
{
        if (k->index >= SRV_REGIONS)
                return err_set(-EINVAL, "region %u: a connection has %u", k->index, SRV_REGIONS);
        return 0;
}

static int give_region(struct server *srv, struct request *r)
{
        struct msg_keys *k = (struct msg_keys *)r->frame;
        struct conn *c = r->c;
        struct tp_rmem *rmem;
        struct tp_key key;
        int rc = region_index(k);

        if (rc < 0)
                return rc;
        if (c->rmem[k->index])
                return err_set(-EEXIST, "region %u was given already: revoke it first", k->index);
        memcpy(key.bytes, k->key, sizeof(key.bytes));
        rc = tp_import_key(c->ep, &key, clock_ns() + IMPORT_NS, &rmem);
        if (rc < 0)
                return rc;
        if (k->len > rmem->len) {
                rc = err_set(-EINVAL, "region %u: its key opens %llu bytes, not %llu", k->index,
                             (unsigned long long)rmem->len, (unsigned long long)k->len);
                tp_rmem_free(rmem);
                return rc;
        }
        c->rmem[k->index] = rmem;
        c->region_len[k->index] = k->len;
        return 0;
}

static int revoke_region(struct server *srv, struct request *r)
{
        const struct msg_keys *k = (const struct msg_keys *)r->frame;
        struct conn *c = r->c;
        int rc = region_index(k);

        if (rc < 0)
                return rc;
        if (!c->rmem[k->index])
                return err_set(-ENOENT, "region %u was not given", k->index);
        if (c->busy > 1 || c->posts > 0)
                return err_set(-EBUSY, "region %u cannot be revoked while requests are in flight", k->index);
        tp_rmem_free(c->rmem[k->index]);
        c->rmem[k->index] = NULL;
        c->region_len[k->index] = 0;
        return 0;
}

int srv_keys(struct server *srv, struct request *r)
{
        static int (*const kinds[])(struct server *, struct request *) = {
            [KEYS_ASK_TENSOR] = ask_tensor, [KEYS_ASK_STAGING] = ask_staging, [KEYS_ASK_SHADOW] = ask_shadow,
            [KEYS_GIVE] = give_region,      [KEYS_REVOKE] = revoke_region,
        };
        struct msg_keys *k = (struct msg_keys *)r->frame;
        int rc = kinds[k->kind](srv, r); /* msg_check has looked at kind */

        if (rc < 0)
                return rc;
        srv_answer(srv, r, MSG_KEYS, k, sizeof(*k), 0);
        return 0;
}
