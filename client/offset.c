#include "offset.h"

#include <stdlib.h>

void offset_see(struct offset *best, uint64_t sent_ns, uint64_t received_ns, uint64_t offered_ns, uint64_t arrived_ns)
{
        uint64_t trip = arrived_ns - sent_ns, held = offered_ns - received_ns;
        uint64_t wire = held < trip ? trip - held : 0;
        uint64_t ours = sent_ns + trip / 2, theirs = received_ns + held / 2;

        if (wire / 2 >= best->error_ns)
                return;
        *best = (struct offset){.at_ns = ours, .ns = (int64_t)(theirs - ours), .error_ns = wire / 2};
}

int64_t offset_between(const struct offset *a, const struct offset *b, uint64_t at_ns)
{
        if (at_ns <= a->at_ns || b->at_ns <= a->at_ns)
                return a->ns;
        if (at_ns >= b->at_ns)
                return b->ns;
        return a->ns +
               (int64_t)((double)(b->ns - a->ns) * ((double)(at_ns - a->at_ns) / (double)(b->at_ns - a->at_ns)));
}

uint64_t offset_bound(const struct offset *a, const struct offset *b)
{
        uint64_t error_ns = a->error_ns > b->error_ns ? a->error_ns : b->error_ns;

        return error_ns + (uint64_t)llabs(b->ns - a->ns);
}
