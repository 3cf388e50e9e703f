/*
 * CALL: a RUN in a self-describing encoding, copied in and out as RPC frameworks do. Decoding and its checks stand in
 * the plan leaf; copying inputs out of the body, in the placement leaf; encoding the result, in the skeletonization
 * leaf. Everything is copied: a body in staging first of all, because its owner could change it while it is looked at.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "err.h"
#include "inside.h"

static int grow(void **p, size_t *cap, size_t need, struct session *s, const char *what)
{
        void *grown;
        int rc;

        if (need <= *cap)
                return 0;
        rc = srv_charge(s, need - *cap, what);
        if (rc < 0)
                return rc;
        grown = realloc(*p, need);
        if (!grown) {
                srv_refund(s, need - *cap);
                return err_set(-ENOMEM, "no memory for %s of %zu bytes", what, need);
        }
        *p = grown;
        *cap = need;
        return 0;
}

static int fetch_body(struct request *r, const struct msg_call *m, const void **body)
{
        const struct tp_mem *staging = r->c->staging;
        int rc;

        *body = m + 1;
        if (!m->in_staging)
                return 0;
        if (!staging || m->body_len > staging->region.len)
                return err_set(-EINVAL, "a body of %llu bytes was never in staging", (unsigned long long)m->body_len);
        rc = grow((void **)&r->body, &r->body_cap, m->body_len, r->c->s, "a call's body");
        if (rc < 0)
                return rc;
        memcpy(r->body, staging->region.addr, m->body_len);
        r->bytes_copied += m->body_len;
        *body = r->body;
        return 0;
}

int srv_call_decode(struct server *srv, struct request *r)
{
        const struct msg_call *m = (const struct msg_call *)r->frame;
        const void *body;
        int rc = fetch_body(r, m, &body);

        if (rc >= 0)
                rc = serial_unpack_call(body, m->body_len, &r->call);
        if (rc < 0)
                return rc == -EPROTO ? -EINVAL : rc; /* a wrong body is not a broken protocol */
        if (r->call.run.h.flags & RUN_LOCAL)
                return err_set(-EINVAL, "CALL: a run in process cannot be asked for with it");
        r->flags = r->call.run.h.flags;
        r->region = m->region;
        r->region_len = m->region_len;
        r->v = (struct run_view){.run = &r->call.run,
                                 .ranges = r->call.ranges,
                                 .feedback = r->call.feedback,
                                 .inputs = r->call.inputs,
                                 .outputs = r->call.outputs};
        return 0;
}

/* Before the first iteration: room for what later iterations write over, and a blob for everything that is returned,
 * output after output. */
static int results_prepare(struct server *srv, struct request *r)
{
        size_t n = 0, at = 0;
        uint64_t bytes;
        int rc = srv_outputs_bytes(srv, r, &bytes);

        if (rc >= 0)
                rc = grow((void **)&r->each, &r->each_cap, bytes, r->c->s, "results");
        for (unsigned i = 0; i < r->v.run->noutputs; i++)
                n += r->v.outputs[i].flags & OUTPUT_EACH ? r->iterations : 1;
        if (rc >= 0)
                rc = grow((void **)&r->blobs, &r->blobs_cap, n * sizeof(*r->blobs), r->c->s, "results");
        if (rc < 0)
                return rc;
        r->nblobs = 0;
        for (unsigned i = 0; i < r->v.run->noutputs; i++) {
                const struct run_output *o = &r->v.outputs[i];

                for (uint32_t k = 0; k < (o->flags & OUTPUT_EACH ? r->iterations : 1); k++, at += o->len)
                        r->blobs[r->nblobs++] = (struct serial_blob){o->tensor, o->tensor_off, r->each + at, o->len};
        }
        return 0;
}

/* Outputs of one iteration: copied aside; those that are wanted only once, at the last. Where ops use host memory, what
 * nobody writes over is encoded from where it is. */
static int collect(struct server *srv, struct request *r, bool last)
{
        struct serial_blob *blob = r->blobs;

        for (unsigned i = 0; i < r->v.run->noutputs; i++) {
                const struct run_output *o = &r->v.outputs[i];
                const char *from = (const char *)r->m->tensors[o->tensor].addr + o->tensor_off;
                bool each = o->flags & OUTPUT_EACH;
                struct serial_blob *to = blob + (each ? r->iteration : 0);
                int rc;

                blob += each ? r->iterations : 1;
                if (!each && !last)
                        continue;
                if (last && srv->props.host_memory) {
                        to->data = from;
                } else {
                        rc = srv->dev->ops->get(srv->dev, (void *)to->data, from, o->len);
                        if (rc < 0)
                                return rc;
                        r->bytes_copied += o->len;
                }
                if (r->digest && (srv->props.host_memory || srv->dev->ops->sync(srv->dev) == 0))
                        digest_add(r->digest, to->data, o->len);
        }
        return 0;
}

int srv_call_each(struct server *srv, struct request *r)
{
        int rc = r->iteration == 0 ? results_prepare(srv, r) : 0;

        return rc < 0 ? rc : collect(srv, r, false);
}

static int build_in_region(struct request *r, struct serial_buf *buf)
{
        struct conn *c = r->c;

        if (r->region >= SRV_REGIONS || !c->rmem[r->region])
                return err_set(-EINVAL, "a result of %zu bytes fits no message and region %u was not given",
                               r->body_len, r->region);
        if (r->body_len > r->region_len || r->body_len > c->region_len[r->region])
                return err_set(-ENOSPC, "a result of %zu bytes does not fit region %u", r->body_len, r->region);
        if (srv_grow(c, &c->out, r->body_len, "results") < 0)
                return -EDQUOT;
        *buf = (struct serial_buf){.data = c->out->region.addr, .cap = r->body_len};
        return 0;
}

int srv_call_build(struct server *srv, struct request *r)
{
        struct serial_buf buf = {.data = r->frame + sizeof(struct msg_result)};
        int rc = r->iteration == 0 || !r->each_wanted ? results_prepare(srv, r) : 0;

        if (rc >= 0)
                rc = collect(srv, r, true);
        if (rc >= 0 && !srv->props.host_memory)
                rc = srv->dev->ops->sync(srv->dev);
        if (rc >= 0)
                rc = serial_result_bytes(&r->m->g, r->blobs, (unsigned)r->nblobs, &r->body_len);
        if (rc < 0)
                return rc;
        /* The packer grows no buffer that is as long as it needs, so the result lands where it is sent from. */
        buf.cap = r->body_len;
        r->in_region = r->body_len > r->c->attr.msg_max - sizeof(struct msg_result);
        if (r->in_region)
                rc = build_in_region(r, &buf);
        if (rc >= 0)
                rc = serial_pack_result(&buf, &r->m->g, r->blobs, (unsigned)r->nblobs);
        for (size_t i = 0; i < r->nblobs; i++)
                r->bytes_copied += r->blobs[i].len;
        return rc;
}

int srv_call_deliver(struct server *srv, struct request *r)
{
        struct conn *c = r->c;
        int rc;

        if (!r->in_region || r->out > 0)
                return STEP_NEXT;
        rc = srv_write(c, c->out, c->out->region.addr, r->body_len, c->rmem[r->region], 0);
        if (rc == STEP_NEXT)
                r->out = 1;
        return rc;
}
