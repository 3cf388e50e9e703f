/* What Djinn's blind mode did when it ran: stateless calls that return everything they produced. */
#include <stddef.h>

#include "baselines.h"

const struct baseline_def baseline_semantic_blind = {
    .name = "semantic_blind",
    .what = "a call per step, history sent again, logits of all positions",
    .reason = NULL,
    .sw = {.weights = SW_RESIDENT,
           .call = SW_STEP,
           .state = SW_STATE_RECOMPUTE,
           .outputs = SW_ALL,
           .buffers = SW_REGISTERED,
           .plan_cache = false,
           .blind = true},
};
