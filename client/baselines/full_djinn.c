/* Everything that the graph's annotation allows: one RUN and one DONE, nothing sent twice, nothing copied. */
#include <stddef.h>

#include "baselines.h"

const struct baseline_def baseline_full_djinn = {
    .name = "full_djinn",
    .what = "whole request in one call, state and plans stay, registered buffers",
    .reason = NULL,
    .sw = {.weights = SW_RESIDENT,
           .call = SW_REQUEST,
           .state = SW_STATE_RESIDENT,
           .outputs = SW_TOKEN,
           .buffers = SW_REGISTERED,
           .plan_cache = true,
           .blind = false},
};
