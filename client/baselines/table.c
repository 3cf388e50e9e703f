/* All baselines, and which of them a type in the experiment's configs stands for. */
#include <stddef.h>
#include <string.h>

#include "check.h"
#include "baselines.h"

const char *const sw_weights_names[] = {"resident", "shipped", NULL};
const char *const sw_call_names[] = {"request", "step", "op", NULL};
const char *const sw_state_names[] = {"resident", "roundtrip", "delta", "recompute", NULL};
const char *const sw_outputs_names[] = {"token", "last", "all", NULL};
const char *const sw_buffers_names[] = {"registered", "serialized", "in process", NULL};

/* The two presets of SPEC 4 that take a call per graph node or ship weights wait for their decision rules in plan.c. */
static const struct baseline_def baseline_api_remoting = {
    .name = "api_remoting",
    .what = "a call per graph node, pipelined",
    .reason = "calls of one graph node (call: op) are not in this version",
    .sw = {.call = SW_OP, .state = SW_STATE_RESIDENT, .outputs = SW_ALL, .buffers = SW_REGISTERED, .blind = true},
};

static const struct baseline_def baseline_naive = {
    .name = "naive",
    .what = "weights, state and history with every call",
    .reason = "weights sent with every call (weights: shipped) are not in this version",
    .sw = {.weights = SW_SHIPPED,
           .call = SW_STEP,
           .state = SW_STATE_ROUNDTRIP,
           .outputs = SW_ALL,
           .buffers = SW_SERIALIZED,
           .blind = true},
};

const struct baseline_def *const baseline_defs[] = {
    &baseline_native_pytorch, &baseline_full_djinn,
    &baseline_pytorch_rpc,    &baseline_blind_opaque,
    &baseline_semantic_blind, &baseline_blind_roundtrip,
    &baseline_api_remoting,   &baseline_naive,
    &baseline_external,       NULL,
};

static const struct {
        const char *type;
        const struct baseline_def *aware, *blind; /* by semantic_aware */
        const char *reason;                       /* instead: why it does not run here */
} types[] = {
    {"local_synthetic", &baseline_native_pytorch, &baseline_native_pytorch, NULL},
    {"native_server", &baseline_native_pytorch, &baseline_native_pytorch, NULL},
    {"native", &baseline_native_pytorch, &baseline_native_pytorch, NULL},
    {"remote_djinn", &baseline_full_djinn, &baseline_semantic_blind, NULL},
    {"pytorch_rpc", &baseline_pytorch_rpc, &baseline_pytorch_rpc, NULL},
    {"rpc", &baseline_pytorch_rpc, &baseline_pytorch_rpc, NULL},
    {"full_djinn", &baseline_full_djinn, &baseline_full_djinn, NULL},
    {"semantic_blind", &baseline_semantic_blind, &baseline_semantic_blind, NULL},
    {"blind_opaque", &baseline_blind_opaque, &baseline_blind_opaque, NULL},
    {"blind_roundtrip", &baseline_blind_roundtrip, &baseline_blind_roundtrip, NULL},
    {"api_remoting", &baseline_api_remoting, &baseline_api_remoting, NULL},
    {"naive", &baseline_naive, &baseline_naive, NULL},
    {"ray_actor", NULL, NULL, "ray_actor needs Ray and Python; it can only join as an external baseline"},
    {"vllm", NULL, NULL, "vllm needs a vLLM server; it can only join as an external baseline"},
    {"external", &baseline_external, &baseline_external, NULL},
    {"native_client", NULL, NULL, "native_client (the client's own device) is not in this version"},
};

const char *const baseline_types[] = {
    "local_synthetic", "native_server",  "native",       "remote_djinn",    "pytorch_rpc",  "rpc",
    "full_djinn",      "semantic_blind", "blind_opaque", "blind_roundtrip", "api_remoting", "naive",
    "ray_actor",       "vllm",           "external",     "native_client",   NULL,
};
_Static_assert(ARRAY_LEN(types) + 1 == ARRAY_LEN(baseline_types), "one name per type");

const struct baseline_def *baseline_find(const char *name)
{
        for (size_t i = 0; baseline_defs[i]; i++)
                if (!strcmp(baseline_defs[i]->name, name))
                        return baseline_defs[i];
        return NULL;
}

const struct baseline_def *baseline_of_type(const char *type, bool semantic_aware, const char **reason)
{
        *reason = NULL;
        for (size_t i = 0; i < ARRAY_LEN(types); i++) {
                if (strcmp(types[i].type, type))
                        continue;
                *reason = types[i].reason;
                return semantic_aware ? types[i].aware : types[i].blind;
        }
        return NULL;
}
