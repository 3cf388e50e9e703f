/* The strongest remote execution that knows nothing of the model: buffers stay where they are, the loop is the client's. */
#include <stddef.h>

#include "baselines.h"

const struct baseline_def baseline_blind_opaque = {
    .name = "blind_opaque",
    .what = "a call per step, state kept as opaque buffers, logits of the last position",
    .reason = NULL,
    .sw = {.weights = SW_RESIDENT,
           .call = SW_STEP,
           .state = SW_STATE_RESIDENT,
           .outputs = SW_LAST,
           .buffers = SW_REGISTERED,
           .plan_cache = true,
           .blind = true},
};
