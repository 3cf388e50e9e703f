/*
 * A request from arrival to answer: a row of steps, each of which goes on, or says that it cannot (the peer must take
 * something first) or need not now (time is up for this round). Nothing here waits; the loop comes back.
 *
 * The floor. On a RUN whose plans are cached, what the server adds to the device's work is: one copy of the frame out
 * of the transport, the walk of msg_run_check() over its few elements, one table look-up per range, one memcpy per
 * inline input, the posts, and seven readings of the clock (about 25 ns each) with RUN_PROFILE, three without. No
 * allocation, no lock, no log line, no system call of our own; tcp makes its one per answer. For an echo of 64 bytes
 * over shm or loop this is well under a microsecond from received to offered.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "err.h"
#include "injure.h"
#include "inside.h"
#include "log.h"

/* ---- posts ---- */

int srv_write(struct conn *c, struct tp_mem *mem, const void *src, size_t len, struct tp_rmem *to, uint64_t off)
{
        int rc;

        if (len == 0)
                return STEP_NEXT;
        rc = tp_write(c->ep, mem, src, len, to, off, TP_MORE, srv_cookie(c, COOKIE_WRITE));
        if (rc == -EAGAIN)
                return STEP_AGAIN;
        if (rc < 0)
                return rc;
        c->posts += rc == TP_POSTED;
        return STEP_NEXT;
}

bool srv_settled(const struct session *s)
{
        for (const struct conn *c = s->conns; c; c = c->sibling) {
                if (c->posts > 0)
                        return false;
        }
        return true;
}

/* ---- coming and going ---- */

static bool model_free_for(const struct queue_item *item)
{
        const struct request *r = container_of(item, struct request, item);

        return !r->m || !r->m->busy;
}

static void start(struct server *srv, struct request *r, uint32_t run_class)
{
        r->stage = ST_SETTLE;
        r->engine = true;
        r->v.run = NULL;
        r->hits = r->misses = r->ops = 0;
        r->bytes_copied = 0;
        r->item.arrival_ns = r->st.received_ns;
        r->deadline_ns = r->st.received_ns + SRV_RUN_NS;
        r->st = (struct run_stamps){.received_ns = r->st.received_ns};
        r->c->s->inflight++;
        queue_put(&srv->queue, &r->item, run_class);
}

/* More than the credit: the client breaks the protocol. */
static int credit_check(const struct session *s)
{
        if (s->inflight >= SRV_INFLIGHT)
                return err_set(-EPROTO, "more than %u requests in flight", SRV_INFLIGHT);
        return 0;
}

int srv_run(struct server *srv, struct request *r)
{
        const struct msg_run *run = (const struct msg_run *)r->frame;
        struct model *m;
        int rc = credit_check(r->c->s);

        if (rc < 0)
                return rc;
        if (run->run_class >= RUN_CLASSES)
                return err_set(-EINVAL, "RUN: class %u, expected below %d", run->run_class, RUN_CLASSES);
        m = srv_model(r->c->s, run->model);
        if (!m)
                return -ENOENT;
        srv_pin(r, m);
        r->flags = run->h.flags;
        start(srv, r, run->run_class);
        if (run->deadline_ns > 0 && run->deadline_ns < SRV_RUN_NS)
                r->deadline_ns = r->st.received_ns + run->deadline_ns;
        return 0;
}

int srv_call(struct server *srv, struct request *r)
{
        int rc = credit_check(r->c->s);

        if (rc < 0)
                return rc;
        r->flags = 0;
        r->is_call = true;
        start(srv, r, RUN_NORMAL); /* its class is in a body that has not been looked at */
        return 0;
}

/* r has done with its model, and the engine with r. */
static void release(struct request *r)
{
        srv_unpin(r);
        if (!r->engine)
                return;
        srv_plans_release(r);
        if (r->digest)
                (void)digest_end(r->digest);
        r->digest = NULL;
        r->engine = false;
        r->c->s->inflight--;
}

static void fail(struct server *srv, struct request *r, int rc, uint16_t field)
{
        release(r);
        srv_refuse(srv, r, rc, PH_RUN, field, rc == -EPROTO ? MSG_FATAL : 0);
}

/* ---- taken, planned ---- */

static int step_settle(struct server *srv, struct request *r)
{
        if (!srv_settled(r->c->s))
                return STEP_AGAIN;
        injure(LEAF_SERVER_QUEUE);
        r->st.taken_ns = clock_ns();
        r->stage = ST_CHECK;
        return STEP_NEXT;
}

static int operands_ready(struct server *srv, struct request *r)
{
        const struct run_view *v = &r->v;
        int rc = 0;

        for (unsigned i = 0; rc >= 0 && i < v->run->ninputs; i++)
                rc = srv_tensor_ready(srv, r->m, v->inputs[i].tensor);
        for (unsigned i = 0; rc >= 0 && i < v->run->noutputs; i++)
                rc = srv_tensor_ready(srv, r->m, v->outputs[i].tensor);
        for (unsigned i = 0; rc >= 0 && i < v->run->nfeedback; i++) {
                rc = srv_tensor_ready(srv, r->m, v->feedback[i].src);
                if (rc >= 0)
                        rc = srv_tensor_ready(srv, r->m, v->feedback[i].dst);
        }
        return rc;
}

static int flop_check(const struct server *srv, const struct request *r)
{
        double flop = 0;

        for (unsigned i = 0; i < r->v.run->nranges; i++)
                flop += r->plans[i]->flop * r->v.ranges[i].repeat;
        if (flop > srv->opts.flop_per_request)
                return err_set(-EDQUOT, "the program costs up to %.3g FLOP, the limit is %.3g", flop,
                               srv->opts.flop_per_request);
        return 0;
}

static void count_iterations(struct request *r)
{
        r->iterations = 0;
        r->each_wanted = false;
        for (unsigned i = 0; i < r->v.run->nranges; i++)
                r->iterations += r->v.ranges[i].repeat;
        for (unsigned i = 0; i < r->v.run->noutputs; i++)
                r->each_wanted |= r->v.outputs[i].flags & OUTPUT_EACH;
}

/* All outputs of the program: a lie about lengths ends at the session's limit before it overflows. */
int srv_outputs_bytes(const struct server *srv, const struct request *r, uint64_t *out)
{
        uint64_t pieces = 0;

        *out = 0;
        for (unsigned i = 0; i < r->v.run->noutputs; i++) {
                const struct run_output *o = &r->v.outputs[i];
                uint32_t times = o->flags & OUTPUT_EACH ? r->iterations : 1;

                pieces += times;
                *out += o->len * times;
                if (pieces > SRV_PIECES_MAX)
                        return err_set(-EDQUOT, "the outputs are more than %u pieces", SRV_PIECES_MAX);
                if (*out > srv->opts.memory_bytes)
                        return err_set(-EDQUOT, "the outputs are more than the %llu bytes that a session may hold",
                                       (unsigned long long)srv->opts.memory_bytes);
        }
        return 0;
}

/* RUN_LOCAL: what an application in this process would have: its input in a buffer of its own, and room for the
 * result. Untimed. */
static int local_prepare(struct server *srv, struct request *r, uint64_t out)
{
        struct session *s = r->c->s;
        uint64_t in = 0;
        int rc = 0;

        for (unsigned i = 0; i < r->v.run->ninputs; i++)
                in += r->v.inputs[i].len;
        if (in > s->local_cap) {
                rc = srv_charge(s, in - s->local_cap, "inputs");
                if (rc < 0)
                        return rc;
                free(s->local);
                s->local = malloc(in);
                if (!s->local) {
                        srv_refund(s, in);
                        s->local_cap = 0;
                        return err_set(-ENOMEM, "no memory for inputs of %llu bytes", (unsigned long long)in);
                }
                s->local_cap = in;
        }
        in = 0;
        for (unsigned i = 0; rc >= 0 && i < r->v.run->ninputs; in += r->v.inputs[i++].len) {
                const struct run_input *input = &r->v.inputs[i];

                if (input->flags == INPUT_INLINE)
                        memcpy(s->local + in, r->v.inline_bytes + input->offset, input->len);
                else
                        rc = srv->dev->ops->get(srv->dev, s->local + in,
                                                (char *)r->m->tensors[input->tensor].addr + input->tensor_off,
                                                input->len);
        }
        return rc < 0 ? rc : srv_grow(r->c, &r->c->out, out, "results");
}

/* A CALL knows its model only now. Where that is busy it goes back to its place in the queue and waits there as a RUN
 * does: nobody's engine, and within reach of deadline and cancellation. */
static int claim(struct server *srv, struct request *r)
{
        struct model *m;

        if (r->claimed)
                return STEP_NEXT;
        m = srv_model(r->c->s, r->v.run->model);
        if (!m)
                return -ENOENT;
        srv_pin(r, m);
        if (m->busy) {
                r->stage = ST_SETTLE;
                queue_put(&srv->queue, &r->item, r->item.run_class);
                return STEP_DONE;
        }
        m->busy = r->claimed = true;
        return STEP_NEXT;
}

static int parse(struct server *srv, struct request *r)
{
        if (r->v.run)
                return 0;
        return r->is_call ? srv_call_decode(srv, r) : msg_run_view(r->frame, r->len, &r->v);
}

static int resolve(struct server *srv, struct request *r)
{
        uint64_t out = 0;
        int rc = srv_plans_resolve(srv, r);

        if (rc >= 0)
                rc = operands_ready(srv, r);
        if (rc >= 0)
                rc = flop_check(srv, r);
        if (rc < 0)
                return rc;
        count_iterations(r);
        rc = srv_outputs_bytes(srv, r, &out);
        return rc >= 0 && r->flags & RUN_LOCAL ? local_prepare(srv, r, out) : rc;
}

static int step_check(struct server *srv, struct request *r)
{
        uint16_t index = 0xffff;
        int rc = parse(srv, r);

        if (rc >= 0)
                rc = claim(srv, r);
        if (rc == STEP_DONE)
                return rc;
        if (rc >= 0)
                rc = msg_run_check(&r->v, &r->m->g, r->is_call ? NULL : r->c->region_len, SRV_REGIONS, 0, &index);
        if (rc >= 0)
                rc = resolve(srv, r);
        if (rc < 0) {
                fail(srv, r, rc, index);
                return STEP_NEXT;
        }
        if (__builtin_expect(r->flags & RUN_DIGEST, 0)) {
                r->digest = digest_begin();
                if (!r->digest)
                        return err_set(-ENOMEM, "no memory for a digest");
        }
        injure(LEAF_SERVER_PLAN);
        if (r->flags & (RUN_PROFILE | RUN_LOCAL))
                r->st.planned_ns = clock_ns();
        r->stage = ST_PLACE;
        return STEP_NEXT;
}

/* ---- placed ---- */

static bool is_input(const struct run_view *v, unsigned t)
{
        for (unsigned i = 0; i < v->run->ninputs; i++) {
                if (v->inputs[i].tensor == t)
                        return true;
        }
        return false;
}

/* What is kept between calls: states, and in a blind graph, where nothing says which they are, every input. */
static bool is_state(const struct model *m, unsigned t)
{
        uint8_t residency = m->g.tensors[t].residency;

        return residency == RES_STATE || (m->g.h->blind && residency == RES_INPUT);
}

/* Injury: states are lost, but for those that come with the call. */
static int drop_states(struct server *srv, struct request *r)
{
        static const uint8_t zeros[65536];
        int rc = 0;

        for (unsigned t = 0; t < r->m->g.h->ntensors; t++) {
                const struct srv_tensor *tensor = &r->m->tensors[t];

                if (!is_state(r->m, t) || !tensor->addr || is_input(&r->v, t))
                        continue;
                for (size_t off = 0; rc >= 0 && off < tensor->bytes; off += sizeof(zeros)) {
                        size_t left = tensor->bytes - off;

                        rc = srv->dev->ops->put(srv->dev, (char *)tensor->addr + off, zeros,
                                                left < sizeof(zeros) ? left : sizeof(zeros));
                }
        }
        return rc;
}

static int step_place(struct server *srv, struct request *r)
{
        int rc = 0;

        if (__builtin_expect(injury.drop_state, 0))
                rc = drop_states(srv, r);
        if (rc >= 0)
                rc = srv_place_inputs(srv, r);
        if (rc < 0)
                return rc;
        injure(LEAF_SERVER_PLACEMENT);
        if (r->flags & RUN_PROFILE)
                r->st.placed_ns = clock_ns();
        r->range = r->repeat = r->iteration = 0;
        r->local_off = 0;
        r->stage = ST_ITERATE;
        return STEP_NEXT;
}

/* ---- executed ---- */

/* Between iterations: somebody may have given up, and others may be waiting for a look. */
static int pause_check(struct server *srv, struct request *r)
{
        uint64_t now = clock_ns();

        if (r->cancelled)
                return err_set(-ECANCELED, "cancelled after %u of %u iterations", r->iteration, r->iterations);
        if (now > r->deadline_ns)
                return err_set(-ETIMEDOUT, "deadline passed after %u of %u iterations", r->iteration, r->iterations);
        return now > srv->slice_end_ns ? STEP_YIELD : STEP_NEXT;
}

static int step_iterate(struct server *srv, struct request *r)
{
        const struct run_range *g = &r->v.ranges[r->range];
        int rc = pause_check(srv, r);

        if (rc != STEP_NEXT)
                return rc;
        if (__builtin_expect(injury.drop_state, 0) && r->iteration) {
                rc = drop_states(srv, r);
                if (rc < 0)
                        return rc;
        }
        for (unsigned i = 0; g->feedback && i < r->v.run->nfeedback; i++) {
                rc = srv_feedback(srv, r, &r->v.feedback[i], r->iteration);
                if (rc < 0)
                        return rc;
        }
        rc = dev_run(r->plans[r->range]->dev, &r->ev);
        if (rc < 0)
                return rc;
        r->stage = ST_RUNNING;
        return STEP_NEXT;
}

static void next_iteration(struct request *r)
{
        r->iteration++;
        if (++r->repeat == r->v.ranges[r->range].repeat) {
                r->repeat = 0;
                r->range++;
        }
        r->stage = ST_ITERATE;
}

static void executed(struct request *r)
{
        injure(LEAF_SERVER_LAUNCH);
        if (__builtin_expect(injury.active, 0) && injury.delay_ns[LEAF_SERVER_EXECUTION]) {
                injure(LEAF_SERVER_EXECUTION);
                r->st.exec_ns += injury.delay_ns[LEAF_SERVER_EXECUTION];
        }
        if (r->flags & RUN_PROFILE)
                r->st.executed_ns = clock_ns();
        r->stage = ST_BUILD;
}

static int step_running(struct server *srv, struct request *r)
{
        int rc = dev_test(srv->dev, &r->ev);

        if (rc <= 0)
                return rc < 0 ? rc : STEP_YIELD;
        r->st.exec_ns += r->ev.exec_ns;
        r->ops += r->plans[r->range]->ops;
        r->out = 0;
        if (r->iteration + 1 == r->iterations)
                executed(r);
        else if (r->each_wanted)
                r->stage = ST_EACH;
        else
                next_iteration(r);
        return STEP_NEXT;
}

/* ---- outputs ---- */

static const char *output_bytes(const struct request *r, const struct run_output *o)
{
        return (const char *)r->m->tensors[o->tensor].addr + o->tensor_off;
}

static int digest_output(struct server *srv, struct request *r, const struct run_output *o)
{
        uint8_t piece[4096];
        const char *at = output_bytes(r, o);
        int rc = 0;

        if (!r->digest)
                return 0;
        if (srv->props.host_memory) {
                digest_add(r->digest, at, o->len);
                return 0;
        }
        for (uint64_t off = 0; rc >= 0 && off < o->len; off += sizeof(piece)) {
                size_t n = o->len - off < sizeof(piece) ? o->len - off : sizeof(piece);

                rc = srv->dev->ops->get(srv->dev, piece, at + off, n);
                if (rc >= 0)
                        rc = srv->dev->ops->sync(srv->dev);
                digest_add(r->digest, piece, n);
        }
        return rc;
}

/* Output o of this iteration into the client's region. */
static int write_output(struct request *r, const struct run_output *o)
{
        struct conn *c = r->c;

        return srv_write(c, srv_tensor_mem(c, &r->m->tensors[o->tensor]), output_bytes(r, o), o->len,
                         c->rmem[o->region], o->region_off + (uint64_t)r->iteration * o->step);
}

/* RUN_LOCAL: into the application's result buffer. */
static int keep_output(struct server *srv, struct request *r, const struct run_output *o)
{
        int rc =
            srv->dev->ops->get(srv->dev, (char *)r->c->out->region.addr + r->local_off, output_bytes(r, o), o->len);

        r->local_off += o->len;
        return rc < 0 ? rc : STEP_NEXT;
}

/* Digested once, when it was accepted: what the peer cannot take now is tried again. */
static int each_output(struct server *srv, struct request *r, const struct run_output *o)
{
        int rc = r->flags & RUN_LOCAL ? keep_output(srv, r, o) : write_output(r, o);
        int digested = rc == STEP_NEXT ? digest_output(srv, r, o) : 0;

        return digested < 0 ? digested : rc;
}

/* The next iteration writes over these outputs, so it starts when the peer has them. */
static int step_each(struct server *srv, struct request *r)
{
        for (; !r->is_call && r->out < r->v.run->noutputs; r->out++) {
                const struct run_output *o = &r->v.outputs[r->out];
                int rc = o->flags & OUTPUT_EACH ? each_output(srv, r, o) : STEP_NEXT;

                if (rc != STEP_NEXT)
                        return rc;
        }
        if (r->is_call) {
                int rc = srv_call_each(srv, r);

                if (rc < 0)
                        return rc;
        }
        if (r->c->posts > 0)
                return STEP_AGAIN;
        next_iteration(r);
        return STEP_NEXT;
}

/* ---- answered ---- */

static int last_outputs(struct server *srv, struct request *r)
{
        int rc = 0;

        if (r->is_call)
                return srv_call_build(srv, r);
        for (unsigned i = 0; rc >= 0 && i < r->v.run->noutputs; i++) {
                if (r->flags & RUN_LOCAL)
                        rc = keep_output(srv, r, &r->v.outputs[i]);
        }
        if (rc >= 0 && r->flags & RUN_LOCAL) {
                injure(LEAF_SERVER_SKELETONIZATION);
                r->st.local_ns = clock_ns() - r->st.planned_ns;
        }
        return rc;
}

/* Goes on at r->out: long ones add up, and others are due a look. */
static int digest_outputs(struct server *srv, struct request *r)
{
        while (!r->is_call && r->out < r->v.run->noutputs) {
                int rc = digest_output(srv, r, &r->v.outputs[r->out++]);

                if (rc < 0)
                        return rc;
                if (clock_ns() > srv->slice_end_ns)
                        return STEP_YIELD;
        }
        return STEP_NEXT;
}

static void done_fill(struct request *r)
{
        struct session *s = r->c->s;
        uint32_t flags = r->flags;

        if (r->misses == 0)
                flags |= DONE_PLAN_HIT;
        if (r->is_call)
                flags |= DONE_SERIALIZED;
        r->done = (struct msg_done){.iterations = r->iterations,
                                    .bytes_copied = r->bytes_copied,
                                    .plan_hits = r->hits,
                                    .plan_misses = r->misses,
                                    .ops = r->ops};
        r->done.h.flags = flags;
        if (r->digest) {
                struct digest d = digest_end(r->digest);

                r->digest = NULL;
                r->done.digest[0] = d.lo;
                r->done.digest[1] = d.hi;
        }
        s->requests++;
        s->plan_hits += r->hits;
        s->plan_misses += r->misses;
        r->m->state_live = r->flags & RUN_KEEP_STATE;
}

static int step_build(struct server *srv, struct request *r)
{
        int rc = r->out == 0 ? last_outputs(srv, r) : 0;

        if (rc >= 0 && r->digest)
                rc = digest_outputs(srv, r);
        if (rc < 0 || rc == STEP_YIELD)
                return rc;
        done_fill(r);
        if (!(r->flags & RUN_LOCAL))
                injure(LEAF_SERVER_SKELETONIZATION);
        r->out = 0;
        r->iteration = r->flags & RUN_LOCAL ? 0 : r->iterations - 1;
        r->local_off = 0;
        r->stage = ST_DELIVER;
        if (r->flags & RUN_PROFILE) {
                r->st.cleanup_ns = r->c->s->cleanup_ns;
                r->st.offered_ns = clock_ns();
        }
        return STEP_NEXT;
}

/* RUN_LOCAL: what the timed part left in the result buffer, in the order in which it came. */
static int deliver_local(struct request *r)
{
        struct conn *c = r->c;

        for (; r->iteration < r->iterations; r->iteration++, r->out = 0) {
                for (; r->out < r->v.run->noutputs; r->out++) {
                        const struct run_output *o = &r->v.outputs[r->out];
                        int rc;

                        if (!(o->flags & OUTPUT_EACH) && r->iteration + 1 < r->iterations)
                                continue;
                        rc = srv_write(c, c->out, (char *)c->out->region.addr + r->local_off, o->len,
                                       c->rmem[o->region], o->region_off + (uint64_t)r->iteration * o->step);
                        if (rc != STEP_NEXT)
                                return rc;
                        r->local_off += o->len;
                }
        }
        return STEP_NEXT;
}

static int deliver(struct server *srv, struct request *r)
{
        if (r->is_call)
                return srv_call_deliver(srv, r);
        if (r->flags & RUN_LOCAL)
                return deliver_local(r);
        for (; r->out < r->v.run->noutputs; r->out++) {
                const struct run_output *o = &r->v.outputs[r->out];
                int rc = write_output(r, o);

                if (rc != STEP_NEXT)
                        return rc;
                /* Long ones add up: others are due a look. */
                if (o->len > 65536 && r->out + 1u < r->v.run->noutputs && clock_ns() > srv->slice_end_ns) {
                        r->out++;
                        return STEP_YIELD;
                }
        }
        return STEP_NEXT;
}

static void injure_stamps(struct run_stamps *t)
{
        uint64_t *stamps[] = {&t->received_ns, &t->taken_ns,    &t->planned_ns,
                              &t->placed_ns,   &t->executed_ns, &t->offered_ns};

        for (size_t i = 0; i < ARRAY_LEN(stamps); i++)
                *stamps[i] = injure_clock(*stamps[i]);
}

static int step_deliver(struct server *srv, struct request *r)
{
        int rc = deliver(srv, r);

        if (rc != STEP_NEXT)
                return rc;
        /* Without RUN_PROFILE nothing was asked for and nothing is told. */
        if (r->flags & RUN_PROFILE)
                r->done.stamps = r->st;
        else
                r->done.stamps.local_ns = r->st.local_ns;
        if (__builtin_expect(injury.active, 0))
                injure_stamps(&r->done.stamps);
        if (r->is_call) {
                struct msg_result *res = (struct msg_result *)r->frame;

                *res = (struct msg_result){.done = r->done, .body_len = r->body_len, .in_region = r->in_region};
                srv_answer(srv, r, MSG_RESULT, res, sizeof(*res) + (r->in_region ? 0 : r->body_len), r->done.h.flags);
        } else {
                srv_answer(srv, r, MSG_DONE, &r->done, sizeof(r->done), r->done.h.flags);
        }
        return STEP_NEXT;
}

static int step_get(struct server *srv, struct request *r)
{
        const struct msg_put p = *(const struct msg_put *)r->frame;
        struct msg_model_ref *a = (struct msg_model_ref *)r->frame;
        struct model *m = r->m;
        int rc;

        rc = srv_write(r->c, srv_tensor_mem(r->c, &m->tensors[p.tensor]), (char *)m->tensors[p.tensor].addr + p.offset,
                       p.len, r->c->rmem[p.region], p.region_off);
        if (rc != STEP_NEXT)
                return rc;
        srv_unpin(r); /* the write is counted by itself */
        a->model = p.model;
        a->what = p.tensor;
        srv_answer(srv, r, MSG_GET, a, sizeof(*a), 0);
        return STEP_NEXT;
}

/* What comes after the answer; how long it took is told with the next one. */
static void clean_up(struct server *srv, struct request *r)
{
        struct session *s = r->c->s;
        bool timed = r->flags & RUN_PROFILE;
        uint64_t start = timed ? clock_ns() : 0;

        release(r);
        if (timed)
                s->cleanup_ns = clock_ns() - start;
}

static int step_reply(struct server *srv, struct request *r)
{
        int rc = tp_send(r->c->ep, r->reply, r->reply_len, 0, srv_cookie(r, COOKIE_REPLY));

        if (rc == -EAGAIN)
                return STEP_AGAIN;
        if (r->engine)
                clean_up(srv, r);
        else if (((const struct msg_header *)r->reply)->opcode == MSG_AUTH)
                srv_credit(r->c);
        if (rc < 0)
                srv_conn_end(srv, r->c, err_str(rc));
        if (rc == TP_POSTED) {
                r->posts = 1;
                r->stage = ST_SENT;
        } else {
                srv_request_rest(srv, r);
        }
        return STEP_DONE;
}

/* ---- the row ---- */

typedef int (*step_fn)(struct server *srv, struct request *r);

static const step_fn steps[ST_COUNT] = {
    [ST_SETTLE] = step_settle,    [ST_CHECK] = step_check, [ST_PLACE] = step_place, [ST_ITERATE] = step_iterate,
    [ST_RUNNING] = step_running,  [ST_EACH] = step_each,   [ST_BUILD] = step_build, [ST_DELIVER] = step_deliver,
    [ST_HOLD] = srv_pattern_hold, [ST_GET] = step_get,     [ST_REPLY] = step_reply,
};

/* The peer takes nothing: for a while that is ordinary. */
static int stuck(struct server *srv, struct request *r)
{
        uint64_t now = clock_ns();

        if (r->stuck_ns == 0)
                r->stuck_ns = now;
        else if (now - r->stuck_ns > SRV_DRAIN_NS)
                srv_conn_end(srv, r->c, "it took nothing that it was sent for 5 s");
        return STEP_AGAIN;
}

int srv_advance(struct server *srv, struct request *r)
{
        for (;;) {
                int rc = steps[r->stage](srv, r);

                if (__builtin_expect(rc == STEP_NEXT, 1)) {
                        r->stuck_ns = 0;
                        continue;
                }
                if (rc == STEP_AGAIN)
                        return stuck(srv, r);
                if (rc > 0)
                        return rc;
                fail(srv, r, rc, 0xffff);
        }
}

static void activate(struct server *srv, struct request *r)
{
        r->next = srv->active;
        srv->active = r;
}

static int take_next(struct server *srv)
{
        struct queue_item *item;
        struct request *r;
        int rc;

        item = queue_take(&srv->queue, srv->now_ns, model_free_for);
        if (!item)
                return 0;
        r = container_of(item, struct request, item);
        if (r->m)
                r->m->busy = r->claimed = true;
        srv->slice_end_ns = clock_ns() + SRV_SLICE_NS;
        rc = srv_advance(srv, r);
        if (rc != STEP_DONE)
                activate(srv, r);
        return 1;
}

/* One round: what is under way goes on; where none of it holds the engine, the next request is taken. One at a time, so
 * that what arrives meanwhile gets its time of arrival soon. */
int srv_work(struct server *srv)
{
        bool engine_free = true;
        int moved = 0;

        for (struct request **p = &srv->active, *r; (r = *p) != NULL;) {
                struct request *next = r->next;
                int rc;

                /* A slice for each: nobody is left without by those who come first in the list. */
                srv->slice_end_ns = clock_ns() + SRV_SLICE_NS;
                rc = srv_advance(srv, r);
                moved |= rc != STEP_AGAIN;
                if (rc == STEP_DONE) {
                        *p = next;
                        continue;
                }
                engine_free &= rc == STEP_AGAIN || !r->engine;
                p = &r->next;
        }
        return engine_free ? take_next(srv) | moved : moved;
}

void srv_begin(struct server *srv, struct request *r)
{
        if (srv_advance(srv, r) != STEP_DONE)
                activate(srv, r);
}

/* ---- giving up ---- */

static bool of_conn(const struct queue_item *item, void *arg)
{
        return container_of(item, struct request, item)->c == arg;
}

static void drop_item(struct queue_item *item, void *arg)
{
        release(container_of(item, struct request, item));
}

void srv_forget(struct server *srv, struct conn *c)
{
        queue_purge(&srv->queue, of_conn, drop_item, c);
        for (struct request **p = &srv->active, *r; (r = *p) != NULL;) {
                if (r->c != c) {
                        p = &r->next;
                        continue;
                }
                *p = r->next;
                if (r->stage == ST_RUNNING)
                        (void)srv->dev->ops->sync(srv->dev);
                release(r);
        }
}

struct wanted {
        const struct conn *c;
        uint64_t id;
};

static bool is_wanted(const struct queue_item *item, void *arg)
{
        const struct request *r = container_of(item, struct request, item);
        const struct wanted *w = arg;

        return r->c == w->c && r->id == w->id;
}

/* The cancelled request is answered by its ERROR; CANCEL itself by nothing. One that is not there was answered. */
int srv_cancel(struct server *srv, struct request *r)
{
        struct wanted w = {.c = r->c, .id = r->id};
        struct queue_item *item = queue_find(&srv->queue, is_wanted, &w);

        for (struct request *a = srv->active; a; a = a->next) {
                if (a->engine && a->c == w.c && a->id == w.id)
                        a->cancelled = true;
        }
        if (item) {
                struct request *q = container_of(item, struct request, item);

                queue_remove(&srv->queue, item);
                fail(srv, q, err_set(-ECANCELED, "cancelled before it began"), 0xffff);
                srv_begin(srv, q);
        }
        srv_request_rest(srv, r);
        return 0;
}

static bool is_late(const struct queue_item *item, void *arg)
{
        return container_of(item, struct request, item)->deadline_ns < *(const uint64_t *)arg;
}

void srv_expire(struct server *srv, uint64_t now_ns)
{
        struct queue_item *item;

        while ((item = queue_find(&srv->queue, is_late, &now_ns)) != NULL) {
                struct request *r = container_of(item, struct request, item);

                queue_remove(&srv->queue, item);
                fail(srv, r, err_set(-ETIMEDOUT, "deadline passed in the queue"), 0xffff);
                srv_begin(srv, r);
        }
}
