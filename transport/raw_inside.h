/* raw, inside: raw.c holds what the media share and the pair; raw_shm.c, raw_tcp.c, raw_verbs.c a medium each. */
#ifndef DJINN_TRANSPORT_RAW_INSIDE_H
#define DJINN_TRANSPORT_RAW_INSIDE_H

#include <stdbool.h>
#include <sys/types.h>

#include "raw.h"

/* An end begins with this; a medium embeds it first in a struct of its own. */
struct raw_end {
        const struct raw_medium *medium;
        struct raw_opts o; /* a copy; url stays valid as long as the end */
        pid_t other;       /* process to look after while nothing comes; 0: not known (another host) */
        int other_fd;      /* raw.c's: pidfd of it; 0: not looked yet */
        uint64_t polls, idle_since_ns;
        uint64_t started_ns; /* of an order, for total_ns: a medium whose ends wait for each other first sets it anew */
};

struct raw_medium {
        const char *scheme;
        const char *(*unavailable)(void);
        /* The fields of struct raw_end are set by raw.c behind these; on failure they free what they made. */
        int (*offer)(const struct raw_opts *o, struct raw_blob *offer, struct raw_end **out);
        int (*answer)(const struct raw_opts *o, const struct raw_blob *offer, struct raw_blob *answer,
                      struct raw_end **out);
        int (*settle)(struct raw_end *e, const struct raw_blob *answer);
        int (*serve)(struct raw_end *e, const struct raw_order *order);
        int (*drive)(struct raw_end *e, const struct raw_order *order, const void *src, void *dst,
                     struct hist *round_trips);
        void (*free)(struct raw_end *e);
};

extern const struct raw_medium raw_shm_medium, raw_tcp_medium, raw_verbs_medium;
/* Those that were built: registry.c makes it, for it knows. NULL-terminated. */
extern const struct raw_medium *const raw_media[];

/* For waiting loops: called while nothing comes; relaxes, and now and then looks at the clock and whether the other
 * process still lives. 0 to go on, -ECONNRESET, -ETIMEDOUT with a sentence. Callers say raw_moved() when something
 * came after a wait. */
int raw_idle(struct raw_end *e);
static inline void raw_moved(struct raw_end *e)
{
        e->polls = 0;
}

#endif
