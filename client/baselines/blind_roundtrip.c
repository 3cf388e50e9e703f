/* Stateless calls that carry the state instead of computing it again. */
#include <stddef.h>

#include "baselines.h"

const struct baseline_def baseline_blind_roundtrip = {
    .name = "blind_roundtrip",
    .what = "a call per step, state goes back and comes again, logits of all positions",
    .reason = NULL,
    .sw = {.weights = SW_RESIDENT,
           .call = SW_STEP,
           .state = SW_STATE_ROUNDTRIP,
           .outputs = SW_ALL,
           .buffers = SW_REGISTERED,
           .plan_cache = false,
           .blind = true},
};
