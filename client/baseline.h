/*
 * Baselines: presets of the semantic switches (SPEC 4). One file in baselines/ and one entry in baseline_defs[] each. What a
 * switch means for the steps of a request is decided in plan.c, for all baselines alike.
 */
#ifndef DJINN_CLIENT_BASELINE_H
#define DJINN_CLIENT_BASELINE_H

#include <stdbool.h>

enum sw_weights { SW_RESIDENT, SW_SHIPPED };
enum sw_call { SW_REQUEST, SW_STEP, SW_OP };
enum sw_state { SW_STATE_RESIDENT, SW_STATE_ROUNDTRIP, SW_STATE_DELTA, SW_STATE_RECOMPUTE };
enum sw_outputs { SW_TOKEN, SW_LAST, SW_ALL };
enum sw_buffers { SW_REGISTERED, SW_SERIALIZED, SW_IN_PROCESS };

struct switches {
        int weights; /* enum sw_weights, ...: ints because the config binds choices into them */
        int call;
        int state;
        int outputs;
        int buffers;
        bool plan_cache;
        bool blind; /* the graph is given without phases and residency */
};

/* Names of the values, NULL-terminated, in the order of the enums: configs and results use these. */
extern const char *const sw_weights_names[],
    *const sw_call_names[], *const sw_state_names[], *const sw_outputs_names[], *const sw_buffers_names[];

struct baseline_def {
        const char *name;   /* "full_djinn" */
        const char *what;   /* one line for `list` */
        const char *reason; /* NULL: can run; else why not in this version */
        bool external;      /* another program does the work: no plan, no switches, no wire of ours */
        struct switches sw;
};

extern const struct baseline_def *const baseline_defs[]; /* ends with NULL */

const struct baseline_def *baseline_find(const char *name);

/* The preset that a config entry's type stands for ("remote_djinn" with semantic_aware true or false, "pytorch_rpc", ...).
 * NULL and *reason for a type of the experiment that this program does not run (ray_actor, vllm, native_server's own
 * process); NULL and *reason NULL for an unknown type. */
const struct baseline_def *baseline_of_type(const char *type, bool semantic_aware, const char **reason);
extern const char *const baseline_types[]; /* all types known, NULL-terminated */

#endif
