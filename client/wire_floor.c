/*
 * The floor under each row: the same bytes in the same number of exchanges by the medium's plainest means, measured once
 * before the blocks, with the other end where the server sits.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "raw.h"
#include "rows.h"

#define EXCHANGES 101u       /* of one call; one order, so that both ends are awake */
#define LARGE     (4u << 20) /* bytes both ways from which on few are enough, each an order of its own */
#define FEW       5u

/* The median of EXCHANGES, in ns; NaN: could not be measured. */
static double floor_of_small(struct raw_pair *raw, const struct raw_order *o, const void *src)
{
        struct hist *h = malloc(sizeof(*h));
        double median = NAN;
        uint64_t ns;

        if (!h)
                return NAN;
        hist_reset(h);
        if (raw_run(raw, o, src, NULL, h, &ns) == 0)
                median = hist_percentile(h, 50);
        free(h);
        return median;
}

static double floor_of_large(struct raw_pair *raw, const struct raw_order *o, const void *src)
{
        double v[FEW];

        for (unsigned i = 0; i < FEW; i++) {
                uint64_t ns;

                if (raw_run(raw, o, src, NULL, NULL, &ns) < 0)
                        return NAN;
                v[i] = (double)ns;
        }
        return stats_median(v, FEW);
}

static double floor_of(struct raw_pair *raw, const struct plan_call *c, const void *src)
{
        struct raw_order o = {.shape = RAW_EXCHANGE,
                              .up = c->up.msg_bytes + c->up.bulk_bytes,
                              .down = c->down.msg_bytes + c->down.bulk_bytes};

        o.n = o.up + o.down > LARGE ? 1 : EXCHANGES;
        return o.n == 1 ? floor_of_large(raw, &o, src) : floor_of_small(raw, &o, src);
}

/* The same bytes by raw means, summed over the calls; calls of equal size are measured once, sizes between by the
 * nearest measured (a stepping baseline's calls grow by a position each). */
static double floor_of_plan(struct raw_pair *raw, const struct plan *p, const void *src)
{
        double sum = 0, last = 0;
        uint64_t last_bytes = 0;

        for (size_t i = 0; i < p->ncalls; i++) {
                const struct plan_call *c = &p->calls[i];
                uint64_t bytes = c->up.msg_bytes + c->up.bulk_bytes + c->down.msg_bytes + c->down.bulk_bytes;

                if (i == 0 || bytes > last_bytes + last_bytes / 8 || bytes < last_bytes - last_bytes / 8) {
                        last = floor_of(raw, c, src);
                        last_bytes = bytes;
                }
                sum += last * (double)bytes / (double)last_bytes;
        }
        return sum;
}

/* Bytes of the largest transfer of any row's plan, one direction. */
static uint64_t largest_transfer(const struct measured *me)
{
        uint64_t most = 4096;

        for (size_t i = 0; i < me->nrows; i++)
                for (uint32_t t = 0; t < me->turns && me->rows[i].plans; t++)
                        for (size_t k = 0; k < me->rows[i].plans[t].ncalls; k++) {
                                const struct plan_call *c = &me->rows[i].plans[t].calls[k];
                                uint64_t up = c->up.msg_bytes + c->up.bulk_bytes;
                                uint64_t down = c->down.msg_bytes + c->down.bulk_bytes;

                                most = up > most ? up : most;
                                most = down > most ? down : most;
                        }
        return most;
}

static void floor_rows(struct measured *me, const char *transport, struct raw_pair *raw, const void *src)
{
        for (size_t i = 0; i < me->nrows; i++) {
                struct row *r = &me->rows[i];
                double sum = 0;

                if (strcmp(r->transport, transport) || !r->plans || r->verdict != VERDICT_VALID)
                        continue;
                for (uint32_t t = 0; t < me->turns; t++)
                        sum += floor_of_plan(raw, &r->plans[t], src);
                r->wire_floor_ns = sum / me->turns;
        }
}

/* The other end is a process of this host, so it is called where the server is one, too: what a medium costs between two
 * hosts cannot be told from here. */
void wire_floors(struct measured *me, const char *transport)
{
        struct raw_opts o = {.url = transport, .max_bytes = largest_transfer(me), .cpu_peer = me->opts->cpu_peer};
        struct raw_pair *raw = NULL;
        void *src = malloc(o.max_bytes);

        if (src)
                memset(src, 0x5a, o.max_bytes);
        if (src && raw_open(&o, &raw) == 0) {
                floor_rows(me, transport, raw, src);
                raw_close(raw);
        }
        free(src);
}
