/* The yardstick: the executor that serves all others, timed inside the server without any message. */
#include <stddef.h>

#include "baselines.h"

const struct baseline_def baseline_native_pytorch = {
    .name = "native_pytorch",
    .what = "the serving executor itself, host buffer to host buffer, no wire",
    .reason = NULL,
    .sw = {.weights = SW_RESIDENT,
           .call = SW_REQUEST,
           .state = SW_STATE_RESIDENT,
           .outputs = SW_TOKEN,
           .buffers = SW_IN_PROCESS,
           .plan_cache = true,
           .blind = false},
};
