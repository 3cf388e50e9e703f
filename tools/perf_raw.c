/*
 * perf: the bare medium beside the transport, by the same processes. Both ends of it are agreed on by control messages;
 * the peer offers, because its address is the one that both know.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "err.h"
#include "perf_inside.h"

static struct raw_opts raw_how(const struct perf_session *s, const struct perf_case *k)
{
        return (struct raw_opts){.url = s->url,
                                 .kind = k->op == PERF_SEND   ? RAW_SEND
                                         : k->op == PERF_READ ? RAW_READ
                                                              : RAW_WRITE,
                                 .max_bytes = k->hi,
                                 .depth = k->window,
                                 .cpu_peer = -1,
                                 .stall_ns = s->stall_ns};
}

int perf_raw_begin(struct perf_session *s, const struct perf_case *k)
{
        struct raw_opts how = raw_how(s, k);
        struct perf_conn *c = &s->conns[0];
        struct perf_ctl *m = malloc(sizeof(*m));
        struct raw_blob offer, answer;
        int rc;

        if (!m)
                return err_set(-ENOMEM, "no memory for control messages");
        s->phase = "making the bare medium";
        perf_case_encode(k, m);
        m->kind = PERF_RAW_OFFER;
        m->f[PF_N] = 1; /* how many is said with each order */
        rc = perf_tell(c, m);
        rc = rc ? rc : perf_hear(c, PERF_RAW_OFFER, m);
        if (!rc) {
                memcpy(offer.bytes, m->body, sizeof(offer.bytes));
                rc = raw_answer(&how, &offer, &answer, &s->raw);
        }
        if (!rc) {
                memset(m, 0, sizeof(*m));
                m->kind = PERF_RAW_ANSWER;
                memcpy(m->body, answer.bytes, sizeof(answer.bytes));
                rc = perf_tell(c, m);
        }
        rc = rc ? rc : perf_hear(c, PERF_READY, m);
        free(m);
        return rc;
}

int perf_raw_case(struct perf_session *s, const struct perf_case *k, struct perf_measure *m)
{
        struct raw_order order = {.shape = k->test == PERF_LAT ? RAW_EXCHANGE : RAW_STREAM,
                                  .up = k->lo,
                                  .down = k->test == PERF_LAT && k->op != PERF_READ ? k->lo : 0,
                                  .n = k->n,
                                  .depth = k->window,
                                  .slots = k->slots,
                                  .src_stride = k->stride};
        struct perf_conn *c = &s->conns[0];
        struct perf_ctl *msg = malloc(sizeof(*msg));
        struct hist *h = &s->workers[0].hist;
        uint64_t cpu, ns = 0;
        int rc;

        if (!msg)
                return err_set(-ENOMEM, "no memory for control messages");
        s->phase = "measuring the bare medium";
        hist_reset(h);
        perf_case_encode(k, msg);
        msg->kind = PERF_RAW_ORDER;
        rc = perf_tell(c, msg);
        cpu = perf_thread_cpu_ns();
        rc = rc ? rc : raw_drive(s->raw, &order, c->tx, NULL, k->test == PERF_LAT ? h : NULL, &ns);
        cpu = perf_thread_cpu_ns() - cpu;
        rc = rc ? rc : perf_hear(c, PERF_RAW_DONE, msg);
        if (!rc) {
                m->iterations += k->n;
                m->bytes += k->n * k->lo;
                m->total_ns += ns;
                m->cpu_local_ns += cpu;
                m->cpu_peer_ns += msg->f[PF_CPU_NS];
                hist_merge(&m->hist, h);
        }
        free(msg);
        return rc;
}

int perf_raw_answer(struct perf_session *s, struct perf_ctl *m)
{
        struct raw_blob blob;
        struct raw_opts how;
        struct perf_case k;
        int rc = perf_case_decode(s, m, &k);

        if (rc)
                return rc;
        if (k.stride * k.window > 2 * PERF_REGION_MAX) /* a slot for each message in flight, whatever k.slots */
                return perf_refuse(
                    &s->conns[0], -EINVAL,
                    "more memory is asked for than this end gives: the bare medium needs size times depth");
        how = raw_how(s, &k);
        if (s->raw)
                raw_free(s->raw);
        s->raw = NULL;
        rc = raw_offer(&how, &blob, &s->raw);
        if (rc)
                return perf_refuse(&s->conns[0], rc, err_str(rc));
        memset(m, 0, sizeof(*m));
        m->kind = PERF_RAW_OFFER;
        memcpy(m->body, blob.bytes, sizeof(blob.bytes));
        rc = perf_tell(&s->conns[0], m);
        rc = rc ? rc : perf_hear(&s->conns[0], PERF_RAW_ANSWER, m);
        if (rc)
                return rc;
        memcpy(blob.bytes, m->body, sizeof(blob.bytes));
        rc = raw_settle(s->raw, &blob);
        if (rc)
                return perf_refuse(&s->conns[0], rc, err_str(rc));
        memset(m, 0, sizeof(*m));
        m->kind = PERF_READY;
        return perf_tell(&s->conns[0], m);
}

int perf_raw_serve(struct perf_session *s, struct perf_ctl *m)
{
        struct raw_order order;
        struct perf_case k;
        uint64_t cpu;
        int rc = perf_case_decode(s, m, &k);

        if (rc || !s->raw)
                return rc ? rc : err_set(-EPROTO, "%s: no bare medium was made", s->peer);
        order = (struct raw_order){.shape = k.test == PERF_LAT ? RAW_EXCHANGE : RAW_STREAM,
                                   .up = k.lo,
                                   .down = k.test == PERF_LAT && k.op != PERF_READ ? k.lo : 0,
                                   .n = k.n,
                                   .depth = k.window,
                                   .slots = k.slots};
        s->phase = "serving the bare medium";
        cpu = perf_thread_cpu_ns();
        rc = raw_serve(s->raw, &order);
        memset(m, 0, sizeof(*m));
        m->kind = PERF_RAW_DONE;
        m->f[PF_CPU_NS] = perf_thread_cpu_ns() - cpu;
        return rc ? rc : perf_tell(&s->conns[0], m);
}
