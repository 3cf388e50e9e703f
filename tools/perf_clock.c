/*
 * perf: one-way latency, and how far two clocks can be trusted for it.
 *
 * On one host both ends read the same clock. On two, the peer's is compared with ours before, in the middle of and
 * after the messages: of many exchanges the fastest bounds the offset best, to half of its round trip. Between the
 * comparisons the offset is taken to move in a straight line; how far the middle one lies off that line is added to the
 * error.
 */
#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "err.h"
#include "manifest.h"
#include "perf_inside.h"
#include "stats.h"

#define COMPARISONS 64

struct offset { /* peer's clock minus ours, at a time of ours */
        double at, ns, error_ns;
};

static int compare(struct perf_session *s, struct offset *out)
{
        struct perf_conn *c = &s->conns[0];
        struct perf_ctl *m = calloc(1, sizeof(*m));
        int rc = m ? 0 : err_set(-12, "no memory for control messages");

        out->error_ns = 1e18;
        for (int i = 0; i < COMPARISONS && !rc; i++) {
                uint64_t t0 = clock_ns(), t1;

                memset(m, 0, sizeof(*m));
                m->kind = PERF_CLOCK;
                rc = perf_tell(c, m);
                rc = rc ? rc : perf_hear(c, PERF_CLOCK, m);
                t1 = clock_ns();
                if (!rc && (double)(t1 - t0) / 2 < out->error_ns) {
                        out->error_ns = (double)(t1 - t0) / 2;
                        out->at = (double)t0 + out->error_ns;
                        out->ns = (double)m->f[PF_NOW] - out->at;
                }
        }
        free(m);
        return rc;
}

static bool one_kernel(const struct perf_session *s)
{
        json *peer = json_parse(s->peer_text, strlen(s->peer_text), "manifest of the other end");
        json *here = manifest_host();
        const char *a = json_str(json_get(peer, "boot_id"), ""), *b = json_str(json_get(here, "boot_id"), "-");
        bool same = !strcmp(a, b);

        json_free(peer);
        json_free(here);
        return same;
}

static double line_at(const struct offset *a, const struct offset *b, double at)
{
        return b->at > a->at ? a->ns + (b->ns - a->ns) * (at - a->at) / (b->at - a->at) : a->ns;
}

static void evaluate(const struct perf_stamps *t, uint64_t n, const struct offset o[3], struct perf_one_way *out)
{
        double *v = calloc(n, sizeof(*v)), bend;

        if (!v)
                return;
        for (uint64_t i = 0; i < n; i++) {
                double at = (double)t->sent[i] + (double)(t->back[i] - t->sent[i]) / 2;

                v[i] = (double)t->there[i] - line_at(&o[0], &o[2], at) - (double)t->sent[i];
        }
        bend = o[1].ns - line_at(&o[0], &o[2], o[1].at);
        for (int i = 0; i < 3; i++)
                out->error_ns = o[i].error_ns > out->error_ns ? o[i].error_ns : out->error_ns;
        out->error_ns += bend < 0 ? -bend : bend;
        if (out->same_clock)
                out->error_ns = 0;
        out->known = true;
        out->n = n;
        out->p50_ns = stats_median(v, n);
        out->min_ns = stats_percentile(v, n, 0);
        out->max_ns = stats_percentile(v, n, 100);
        free(v);
}

int perf_one_way(struct perf_session *s, const struct perf_case *k, struct perf_one_way *out)
{
        struct offset o[3] = {{0}};
        uint64_t *room = calloc(3 * PERF_STAMPS_MAX, sizeof(*room));
        struct perf_case half = *k;
        int rc = 0;

        memset(out, 0, sizeof(*out));
        if (!room)
                return err_set(-12, "no memory for stamps");
        half.shape = PERF_STAMPS;
        half.n = k->n / 2;
        half.verify = half.open = false;
        out->same_clock = one_kernel(s);
        for (int i = 0; i < 3 && !rc; i++) {
                if (!out->same_clock)
                        rc = compare(s, &o[i]);
                if (rc || i == 2)
                        break;
                s->stamps =
                    (struct perf_stamps){room + (uint64_t)i * half.n, room + PERF_STAMPS_MAX + (uint64_t)i * half.n,
                                         room + 2 * PERF_STAMPS_MAX + (uint64_t)i * half.n};
                rc = perf_case_drive(s, &half, NULL);
        }
        s->stamps = (struct perf_stamps){room, room + PERF_STAMPS_MAX, room + 2 * PERF_STAMPS_MAX};
        if (!rc)
                evaluate(&s->stamps, 2 * half.n, o, out);
        free(room);
        return rc;
}
