/*
 * Plans of one model, found by their exact key. A table with linear probing that is never more than half full; plans
 * move back when one before them is thrown out, so that no grave has to be stepped over.
 */
#include <errno.h>
#include <stdlib.h>

#include "check.h"
#include "err.h"
#include "inside.h"

#define MASK (SRV_PLAN_SLOTS - 1)

_Static_assert((SRV_PLAN_SLOTS & MASK) == 0, "a power of two");
_Static_assert(SRV_PLAN_SLOTS / 2 > RUN_RANGES_MAX, "the plans of one program must fit together");

static uint32_t slot_of(uint32_t first, uint32_t count, uint32_t rows, bool fuse)
{
        uint64_t h = (uint64_t)first << 32 | count;

        h = (h ^ (uint64_t)rows << 17 ^ fuse) * 0x9e3779b97f4a7c15ull;
        return (uint32_t)(h >> 40) & MASK;
}

static uint32_t home_of(const struct srv_plan *p)
{
        return slot_of(p->first, p->count, p->rows, p->fuse);
}

int srv_plans_init(struct srv_plans *p)
{
        p->slots = calloc(SRV_PLAN_SLOTS, sizeof(struct srv_plan *));
        return p->slots ? 0 : err_set(-ENOMEM, "no memory for a table of plans");
}

struct srv_plan *srv_plans_find(struct srv_plans *p, uint32_t first, uint32_t count, uint32_t rows, bool fuse)
{
        for (uint32_t i = slot_of(first, count, rows, fuse);; i = (i + 1) & MASK) {
                struct srv_plan *plan = p->slots[i];

                if (!plan)
                        return NULL;
                if (plan->first == first && plan->count == count && plan->rows == rows && plan->fuse == fuse) {
                        plan->used = ++p->tick;
                        return plan;
                }
        }
}

/* Closes the gap at slot i: whatever lies behind it and could lie there moves up. */
static void close_gap(struct srv_plans *p, uint32_t i)
{
        for (uint32_t k = (i + 1) & MASK; p->slots[k]; k = (k + 1) & MASK) {
                uint32_t home = home_of(p->slots[k]);

                if (((k - home) & MASK) < ((k - i) & MASK))
                        continue;
                p->slots[i] = p->slots[k];
                p->slots[k] = NULL;
                i = k;
        }
}

static void throw_out(struct srv_plans *p, uint32_t i)
{
        if (p->s)
                srv_refund(p->s, p->slots[i]->bytes);
        srv_plan_free(p->slots[i]);
        p->slots[i] = NULL;
        p->count--;
}

/* Slow, and meant to be: it comes with making a plan, which is slower. false: all were used after tick `until`. */
static bool throw_oldest_out(struct srv_plans *p, uint64_t until)
{
        uint32_t oldest = SRV_PLAN_SLOTS;
        uint64_t used = until;

        for (uint32_t i = 0; i < SRV_PLAN_SLOTS; i++) {
                if (p->slots[i] && p->slots[i]->used <= used) {
                        used = p->slots[i]->used;
                        oldest = i;
                }
        }
        if (oldest == SRV_PLAN_SLOTS)
                return false;
        throw_out(p, oldest);
        close_gap(p, oldest);
        return true;
}

void srv_plans_keep(struct srv_plans *p, struct srv_plan *plan)
{
        uint32_t i = home_of(plan);

        if (p->count == SRV_PLAN_SLOTS / 2)
                (void)throw_oldest_out(p, p->tick);
        while (p->slots[i])
                i = (i + 1) & MASK;
        p->slots[i] = plan;
        p->count++;
        plan->kept = true;
        plan->used = ++p->tick;
}

void srv_plan_free(struct srv_plan *plan)
{
        if (!plan)
                return;
        dev_plan_free(plan->dev);
        free(plan);
}

void srv_plans_flush(struct srv_plans *p)
{
        for (uint32_t i = 0; p->count > 0 && i < SRV_PLAN_SLOTS; i++) {
                if (p->slots[i])
                        throw_out(p, i);
        }
}

/* Kept where the session has the memory, if need be that of plans which this program (from tick `since` on) does not
 * use. What is not kept ends with its request. */
static void keep_if_paid(struct srv_plans *p, struct srv_plan *plan, uint64_t since)
{
        while (srv_charge(p->s, plan->bytes, "plans") < 0) {
                err_clear();
                if (!throw_oldest_out(p, since))
                        return;
        }
        srv_plans_keep(p, plan);
}

/* ---- making ---- */

/* Scratch of another size lies elsewhere: every plan made so far points at the old one, and r must not hold any. */
static int grow_scratch(struct server *srv, struct request *r, size_t need)
{
        struct model *m = r->m;
        struct mem_region grown;
        int rc;

        srv_plans_release(r);
        srv_plans_flush(&m->plans);
        rc = srv_charge(m->s, need - m->scratch.len, "activations");
        if (rc < 0)
                return rc;
        rc = srv->dev->ops->alloc(srv->dev, need, &grown);
        if (rc < 0) {
                srv_refund(m->s, need - m->scratch.len);
                return rc;
        }
        if (m->scratch.addr)
                srv->dev->ops->free(srv->dev, &m->scratch);
        m->scratch = grown;
        return 0;
}

/* What devices tell nobody: instructions, and room to widen operands of the one that takes most of it. On the large
 * side: rows of most operations, all of a LINEAR's input and of an attention's operands but for its caches' length. */
static uint64_t plan_bytes(const struct op_inst *insts, size_t n)
{
        uint64_t room = 0;

        for (size_t i = 0; i < n; i++) {
                uint64_t need = 0;

                for (unsigned a = 0; a < OP_ARGS_MAX; a++) {
                        const struct op_arg *arg = &insts[i].arg[a];
                        bool whole = insts[i].code == OP_LINEAR ? a == 1 : insts[i].code == OP_ATTENTION;

                        if (arg->ndim > 0)
                                need += whole ? (uint64_t)op_arg_elems(arg) : 4 * (uint64_t)arg->dims[arg->ndim - 1];
                }
                room = need > room ? need : room;
        }
        return sizeof(struct srv_plan) + n * (sizeof(*insts) + 128) + room * sizeof(float);
}

static int make(struct server *srv, struct model *m, const struct run_range *r, struct srv_plan *plan)
{
        const struct graph_binding b = {.g = &m->g,
                                        .rows = r->rows,
                                        .first = r->first,
                                        .count = r->count,
                                        .addr = m->addr,
                                        .scratch = m->scratch.addr,
                                        .offsets = m->offsets,
                                        .fuse = true};
        struct graph_cost cost;
        int n = graph_bind(&b, m->insts, m->g.h->nnodes);

        if (n >= 0 && graph_cost(&m->g, r->rows, r->first, r->count, m->g.h->context_max, &cost) < 0)
                n = -EINVAL;
        if (n >= 0 && cost.bytes > SRV_MOVED_MAX)
                n = err_set(-EDQUOT, "one iteration moves up to %.3g bytes, the limit is %.3g", cost.bytes,
                            SRV_MOVED_MAX);
        if (n >= 0)
                n = dev_plan_make(srv->dev, m->insts, (size_t)n, &plan->dev) < 0 ? -EINVAL : n;
        if (n < 0)
                return n;
        plan->bytes = plan_bytes(m->insts, (size_t)n);
        plan->ops = (uint32_t)n;
        plan->flop = cost.flop;
        return 0;
}

/* One plan, or -EAGAIN: scratch has grown and all plans are void; req holds none any more. */
static int plan_new(struct server *srv, struct request *req, const struct run_range *r, struct srv_plan **out)
{
        struct model *m = req->m;
        size_t need;
        int rc = srv_place_tensors(srv, m, r->first, r->count);

        if (rc >= 0)
                rc = graph_scratch(&m->g, r->rows, m->offsets, &need);
        if (rc >= 0 && need > m->scratch.len) {
                rc = grow_scratch(srv, req, need);
                return rc < 0 ? rc : -EAGAIN;
        }
        if (rc < 0)
                return rc;
        *out = calloc(1, sizeof(**out));
        if (!*out)
                return err_set(-ENOMEM, "no memory for a plan");
        **out = (struct srv_plan){.first = r->first, .count = r->count, .rows = r->rows, .fuse = true};
        rc = make(srv, m, r, *out);
        if (rc < 0) {
                srv_plan_free(*out);
                *out = NULL;
        }
        return rc;
}

/* The same range earlier in this program. */
static struct srv_plan *earlier(const struct request *r, unsigned i)
{
        for (unsigned k = 0; k < i; k++) {
                const struct srv_plan *p = r->plans[k];

                if (p && p->first == r->v.ranges[i].first && p->count == r->v.ranges[i].count &&
                    p->rows == r->v.ranges[i].rows)
                        return r->plans[k];
        }
        return NULL;
}

static int resolve_missing(struct server *srv, struct request *r, bool keep, uint64_t since)
{
        for (unsigned i = 0; i < r->v.run->nranges; i++) {
                int rc;

                if (!r->plans[i])
                        r->plans[i] = earlier(r, i);
                if (r->plans[i])
                        continue;
                r->misses++;
                rc = plan_new(srv, r, &r->v.ranges[i], &r->plans[i]);
                if (rc < 0)
                        return rc;
                if (keep)
                        keep_if_paid(&r->m->plans, r->plans[i], since);
        }
        return 0;
}

void srv_plans_release(struct request *r)
{
        for (unsigned i = 0; i < RUN_RANGES_MAX; i++) {
                struct srv_plan *p = r->plans[i];

                if (!p)
                        continue;
                for (unsigned k = i; k < RUN_RANGES_MAX; k++) {
                        if (r->plans[k] == p)
                                r->plans[k] = NULL;
                }
                if (!p->kept)
                        srv_plan_free(p);
        }
}

int srv_plans_resolve(struct server *srv, struct request *r)
{
        unsigned n = r->v.run->nranges;
        bool keep = r->flags & RUN_PLAN_CACHE;
        uint64_t since = r->m->plans.tick;
        int rc;

        for (unsigned i = 0; i < n && keep; i++) {
                const struct run_range *g = &r->v.ranges[i];

                r->plans[i] = srv_plans_find(&r->m->plans, g->first, g->count, g->rows, true);
                r->hits += r->plans[i] != NULL;
        }
        if (r->hits == n)
                return 0;
        /* Scratch grows at most once per range: each time to what that range needs. */
        while ((rc = resolve_missing(srv, r, keep, since)) == -EAGAIN)
                r->hits = r->misses = 0;
        return rc;
}

void srv_plans_free(struct srv_plans *p)
{
        if (p->slots)
                srv_plans_flush(p);
        free(p->slots);
        *p = (struct srv_plans){0};
}
