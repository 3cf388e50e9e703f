/*
 * How the server's clock stands to ours. The clocks of two kernels drift apart, so the offset is measured before and after
 * what it is needed for, never within, and is taken to move in a straight line between the two.
 */
#ifndef DJINN_CLIENT_OFFSET_H
#define DJINN_CLIENT_OFFSET_H

#include <stdint.h>

struct offset {
        uint64_t at_ns;    /* of our clock */
        int64_t ns;        /* server's clock - ours */
        uint64_t error_ns; /* bound; UINT64_MAX: not measured yet */
};

#define OFFSET_UNKNOWN ((struct offset){.error_ns = UINT64_MAX})

/* One exchange: sent and arrived by our clock, received and offered by the server's. Becomes *best if none was faster: the
 * truth is within half of the round trip, less what the server held it. */
void offset_see(struct offset *best, uint64_t sent_ns, uint64_t received_ns, uint64_t offered_ns, uint64_t arrived_ns);

/* The offset at a time of ours between two measurements; outside, that of the nearer one. */
int64_t offset_between(const struct offset *a, const struct offset *b, uint64_t at_ns);

/* How far offset_between() can be off as long as the clocks do not turn back: both errors' larger, and all that the offset
 * moved, for between the measurements it may have done so at once. */
uint64_t offset_bound(const struct offset *a, const struct offset *b);

#endif
