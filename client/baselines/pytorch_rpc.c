/* What an RPC framework does: one call, arguments and results encoded and copied, no memory of the caller. */
#include <stddef.h>

#include "baselines.h"

const struct baseline_def baseline_pytorch_rpc = {
    .name = "pytorch_rpc",
    .what = "whole request in one call, self-describing encoding, nothing kept",
    .reason = NULL,
    .sw = {.weights = SW_RESIDENT,
           .call = SW_REQUEST,
           .state = SW_STATE_RECOMPUTE,
           .outputs = SW_TOKEN,
           .buffers = SW_SERIALIZED,
           .plan_cache = false,
           .blind = false},
};
