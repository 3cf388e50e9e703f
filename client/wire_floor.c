/*
 * The floor under each row: the same bytes in the same number of exchanges by the medium's plainest means, measured once
 * before the blocks, with the other end where the server sits.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "raw.h"
#include "rows.h"

#define FLOOR_REPEATS 101u

static double floor_of(struct raw_pair *raw, const struct plan_call *c, const void *src)
{
        double v[FLOOR_REPEATS];
        size_t up = c->up.msg_bytes + c->up.bulk_bytes, down = c->down.msg_bytes + c->down.bulk_bytes;

        for (unsigned i = 0; i < FLOOR_REPEATS; i++) {
                int64_t ns = raw_exchange(raw, src, up, NULL, down);

                if (ns < 0)
                        return NAN;
                v[i] = (double)ns;
                if (up + down > 4u << 20 && i >= 4)
                        return stats_median(v, i + 1);
        }
        return stats_median(v, FLOOR_REPEATS);
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

void wire_floors(struct measured *me, const char *transport)
{
        uint64_t most = 4096;
        struct raw_pair *raw = NULL;
        void *src;

        for (size_t i = 0; i < me->nrows; i++)
                for (uint32_t t = 0; t < me->turns && me->rows[i].plans; t++)
                        for (size_t k = 0; k < me->rows[i].plans[t].ncalls; k++) {
                                const struct plan_call *c = &me->rows[i].plans[t].calls[k];
                                uint64_t up = c->up.msg_bytes + c->up.bulk_bytes;
                                uint64_t down = c->down.msg_bytes + c->down.bulk_bytes;

                                most = up > most ? up : most;
                                most = down > most ? down : most;
                        }
        src = malloc(most);
        if (src)
                memset(src, 0x5a, most);
        if (src && raw_open(transport, most, me->opts->cpu_peer, &raw) == 0) {
                for (size_t i = 0; i < me->nrows; i++) {
                        struct row *r = &me->rows[i];
                        double sum = 0;

                        if (strcmp(r->transport, transport) || !r->plans || r->verdict != VERDICT_VALID)
                                continue;
                        for (uint32_t t = 0; t < me->turns; t++)
                                sum += floor_of_plan(raw, &r->plans[t], src);
                        r->wire_floor_ns = sum / me->turns;
                }
                raw_close(raw);
        }
        free(src);
}
