/* Messages that need no engine: calibration, clock, echo, counters, farewells. */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "check.h"
#include "err.h"
#include "injure.h"
#include "inside.h"
#include "log.h"

uint64_t srv_rss_bytes(void)
{
        unsigned long long total, resident = 0;
        FILE *f = fopen("/proc/self/statm", "re");

        if (!f)
                return 0;
        if (fscanf(f, "%llu %llu", &total, &resident) != 2)
                resident = 0;
        fclose(f);
        return resident * (uint64_t)sysconf(_SC_PAGESIZE);
}

/* ---- PATTERN ---- */

static int pattern_fits(const struct conn *c, const struct msg_pattern *m, const uint32_t *lengths)
{
        uint64_t sum = 0;

        for (uint32_t i = 0; i < m->nwrites; i++)
                sum += lengths[i];
        if (m->reply_len > c->attr.msg_max)
                return err_set(-EINVAL, "PATTERN: a reply of %u bytes, a message has at most %zu", m->reply_len,
                               c->attr.msg_max);
        if (m->hold_ns > SRV_HOLD_MAX_NS)
                return err_set(-EINVAL, "PATTERN: hold_ns is %llu, at most %llu", (unsigned long long)m->hold_ns,
                               (unsigned long long)SRV_HOLD_MAX_NS);
        if (sum == 0)
                return 0;
        if (m->region >= SRV_REGIONS || sum > c->region_len[m->region])
                return err_set(-EINVAL, "PATTERN: %llu bytes do not fit region %u", (unsigned long long)sum, m->region);
        if (!c->shadow || sum > c->shadow->region.len)
                return err_set(-EINVAL, "PATTERN: no shadow buffer of %llu bytes", (unsigned long long)sum);
        return 0;
}

/* What a request writes back was in this processor's cache a moment before, for it was computed here. The shadow was last
 * written by the peer: a word of each line brings it over, inside the hold, which the client takes off. */
static void bring_over(const struct conn *c, const struct msg_pattern *m, const uint32_t *lengths)
{
        uint64_t sum = 0;

        for (uint32_t i = 0; i < m->nwrites; i++)
                sum += lengths[i];
        for (uint64_t off = 0; off < sum; off += CACHE_LINE)
                (void)*((const volatile uint8_t *)c->shadow->region.addr + off);
}

int srv_pattern(struct server *srv, struct request *r)
{
        const struct msg_pattern *m = (const struct msg_pattern *)r->frame;
        int rc = msg_pattern_view(r->frame, r->len, &r->lengths);

        if (rc >= 0)
                rc = pattern_fits(r->c, m, r->lengths);
        if (rc < 0)
                return rc;
        bring_over(r->c, m, r->lengths);
        r->hold_until_ns = r->st.received_ns + m->hold_ns;
        r->st.offered_ns = 0;
        r->off = 0;
        r->out = 0;
        r->stage = ST_HOLD;
        return 0;
}

/* Nobody else wants anything of this thread: it may spin. */
static bool alone(const struct server *srv, const struct request *r)
{
        return srv->queue.count == 0 && (!srv->active || (srv->active == r && !r->next));
}

/* Spins in slices while it is alone, for the sake of exactness; beside others it comes back in the next round. The
 * answer's head is shorter than the question's, and what lies behind it in the frame is as good as any. */
int srv_pattern_hold(struct server *srv, struct request *r)
{
        const struct msg_pattern *m = (const struct msg_pattern *)r->frame;
        struct msg_pattern_reply *a = (struct msg_pattern_reply *)r->frame;
        struct conn *c = r->c;
        uint32_t len = m->reply_len;

        if (r->st.offered_ns == 0) {
                uint64_t until = r->hold_until_ns < srv->slice_end_ns ? r->hold_until_ns : srv->slice_end_ns;

                if (alone(srv, r))
                        clock_spin_until(until);
                r->st.offered_ns = clock_ns();
                if (r->st.offered_ns < r->hold_until_ns) {
                        r->st.offered_ns = 0;
                        return STEP_YIELD;
                }
        }
        for (; r->out < m->nwrites; r->out++) {
                uint32_t piece = r->lengths[r->out];
                int rc = piece == 0 ? STEP_NEXT
                                    : srv_write(c, c->shadow, (char *)c->shadow->region.addr + r->off, piece,
                                                c->rmem[m->region], r->off);

                if (rc != STEP_NEXT)
                        return rc;
                r->off += piece;
        }
        a->received_ns = r->st.received_ns;
        a->offered_ns = r->st.offered_ns;
        srv_answer(srv, r, MSG_PATTERN, a, len, 0);
        return STEP_NEXT;
}

_Static_assert(sizeof(struct msg_pattern_reply) <= sizeof(struct msg_pattern), "lengths outlive the answer's head");

/* ---- the rest ---- */

int srv_time(struct server *srv, struct request *r)
{
        struct msg_time *m = (struct msg_time *)r->frame;

        m->received_ns = r->st.received_ns;
        m->offered_ns = clock_ns();
        if (__builtin_expect(injury.active, 0)) {
                m->received_ns = injure_clock(m->received_ns);
                m->offered_ns = injure_clock(m->offered_ns);
        }
        srv_answer(srv, r, MSG_TIME, m, sizeof(*m), 0);
        return 0;
}

int srv_echo(struct server *srv, struct request *r)
{
        srv_answer(srv, r, MSG_ECHO, r->frame, r->len, ((const struct msg_header *)r->frame)->flags);
        return 0;
}

int srv_stats(struct server *srv, struct request *r)
{
        const struct tp_counters *n = &r->c->ep->n;
        const struct session *s = r->c->s;
        struct msg_stats *m = (struct msg_stats *)r->frame;

        *m = (struct msg_stats){.msgs_tx = n->msgs_tx,
                                .msgs_rx = n->msgs_rx,
                                .msg_bytes_tx = n->msg_bytes_tx,
                                .msg_bytes_rx = n->msg_bytes_rx,
                                .bulk_bytes_tx = n->bulk_bytes_tx,
                                .bulk_ops = n->bulk_ops,
                                .header_bytes_tx = n->header_bytes_tx,
                                .header_bytes_rx = n->header_bytes_rx,
                                .bytes_copied = n->bytes_copied,
                                .retries = n->retries,
                                .cpu_ns = clock_cpu_ns(),
                                .rss_bytes = srv_rss_bytes(),
                                .requests = s->requests,
                                .plan_hits = s->plan_hits,
                                .plan_misses = s->plan_misses};
        srv_answer(srv, r, MSG_STATS, m, sizeof(*m), 0);
        return 0;
}

int srv_heartbeat(struct server *srv, struct request *r)
{
        srv_request_rest(srv, r);
        return 0;
}

int srv_bye(struct server *srv, struct request *r)
{
        srv_conn_end(srv, r->c, "good-bye");
        srv_request_rest(srv, r);
        return 0;
}

int srv_error(struct server *srv, struct request *r)
{
        const struct msg_error *e = (const struct msg_error *)r->frame;

        log_debug("%s: says: %s", r->c->ep->peer, e->text);
        if (e->h.flags & MSG_FATAL)
                srv_conn_end(srv, r->c, e->text);
        srv_request_rest(srv, r);
        return 0;
}
