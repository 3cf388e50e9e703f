/* The configuration of a sweep: tables that say what each key may be, and the few rules that span keys. */
#include <errno.h>
#include <string.h>

#include "err.h"
#include "experiment.h"
#include "transport.h"

/* ---- experiment: ---- */

struct exp_keys {
        const char *device, *dtype, *tag, *result_dir, *server_address, *reference, *blind, *target;
        const struct conf_node *transports;
        int64_t runs, warmup_runs, requests_per_block, threads, seed;
};

#define K(k, t, f, ...)                                                                  \
        {                                                                                \
                .key = k, .type = t, .offset = offsetof(struct exp_keys, f), __VA_ARGS__ \
        }
static const struct conf_field exp_fields[] = {
    K("device", CONF_T_STR, device, .help = "cpu, reference, cuda:0"),
    K("dtype", CONF_T_STR, dtype, .help = "float32, float16, bfloat16"),
    K("runs", CONF_T_INT, runs, .min = 1, .max = 100000, .help = "blocks"),
    K("warmup_runs", CONF_T_INT, warmup_runs, .min = 0, .max = 100000),
    K("tag", CONF_T_NAME, tag),
    K("result_dir", CONF_T_STR, result_dir),
    K("djinn_server_address", CONF_T_STR, server_address),
    K("reference_baseline", CONF_T_STR, reference),
    K("blind_baseline", CONF_T_STR, blind),
    K("target_baseline", CONF_T_STR, target),
    K("transports", CONF_T_NODE, transports, .help = "list of shm, tcp, ..."),
    K("seed", CONF_T_INT, seed, .min = 0, .max = 9007199254740992.0),
    K("requests_per_block", CONF_T_INT, requests_per_block, .min = 1, .max = 100000),
    K("threads", CONF_T_INT, threads, .min = 0, .max = 1024, .help = "of the engine, the same in every baseline"),
};
#undef K

static int bind_dtype(const struct conf_node *at, const char *text, struct experiment *e)
{
        int dtype = op_dtype_parse(text);

        if (dtype != DT_F32 && dtype != DT_F16 && dtype != DT_BF16)
                return conf_error(at, "dtype: expected float32, float16 or bfloat16, not \"%s\"", text);
        e->dtype = (enum op_dtype)dtype;
        return 0;
}

static int bind_transports(const struct conf_node *list, struct experiment *e)
{
        if (list->kind != CONF_LIST || !list->count)
                return conf_error(list, "transports: expected a list such as [shm, tcp]");
        e->ntransports = 0;
        for (const struct conf_node *n = list->first; n; n = n->next) {
                const struct tp_backend *b = tp_backends;

                if (n->kind != CONF_SCALAR)
                        return conf_error(n, "transports: expected the name of a transport");
                while (b->scheme && strcmp(b->scheme, n->text))
                        b++;
                if (!b->scheme || !strcmp(n->text, "null") || !strcmp(n->text, "fault"))
                        return conf_error(n,
                                          "transports: \"%s\" is not a transport that a sweep can use; `djinnbench "
                                          "list` names them",
                                          n->text);
                if (e->ntransports == EXP_TRANSPORTS_MAX)
                        return conf_error(n, "transports: more than %d", EXP_TRANSPORTS_MAX);
                for (size_t i = 0; i < e->ntransports; i++)
                        if (!strcmp(e->transports[i], n->text))
                                return conf_error(n, "transports: \"%s\" stands twice", n->text);
                e->transports[e->ntransports++] = n->text;
        }
        return 0;
}

static int bind_experiment(const struct conf_node *map, struct experiment *e)
{
        struct exp_keys k = {
            .device = "cpu",
            .dtype = "float32",
            .tag = "run",
            .runs = 30,
            .warmup_runs = 5,
            .requests_per_block = 1,
            .reference = "native_pytorch",
            .blind = "semantic_blind",
            .target = "full_djinn",
        };
        int rc;

        if (map->kind != CONF_MAP)
                return conf_error(map, "experiment: expected a map");
        rc = conf_bind(map, exp_fields, ARRAY_LEN(exp_fields), &k);
        if (rc < 0)
                return rc;
        e->device = k.device, e->tag = k.tag, e->result_dir = k.result_dir, e->server_address = k.server_address;
        e->runs = k.runs, e->warmup_runs = k.warmup_runs, e->requests_per_block = k.requests_per_block;
        e->threads = k.threads, e->seed = (uint64_t)k.seed;
        e->reference_baseline = k.reference, e->blind_baseline = k.blind, e->target_baseline = k.target;
        rc = bind_dtype(conf_get(map, "dtype") ? conf_get(map, "dtype") : map, k.dtype, e);
        if (rc == 0 && k.transports)
                rc = bind_transports(k.transports, e);
        return rc;
}

/* ---- baselines[]: ---- */

struct base_keys {
        const char *name, *type, *notes, *dtype;
        bool semantic_aware;
        const struct conf_node *semantics, *command;
};

#define K(k, t, f, ...)                                                                   \
        {                                                                                 \
                .key = k, .type = t, .offset = offsetof(struct base_keys, f), __VA_ARGS__ \
        }
#define ECHO(k)                               \
        {                                     \
                .key = k, .type = CONF_T_ECHO \
        }
static const struct conf_field base_fields[] = {
    K("name", CONF_T_NAME, name, .required = true),
    K("type", CONF_T_STR, type, .required = true),
    K("notes", CONF_T_STR, notes),
    K("dtype", CONF_T_STR, dtype),
    K("semantic_aware", CONF_T_BOOL, semantic_aware),
    K("semantics", CONF_T_NODE, semantics),
    K("command", CONF_T_NODE, command, .help = "type external: the program and its arguments"),
    ECHO("device"),
    ECHO("runs"),
    ECHO("warmup_runs"),
    ECHO("server_address"),
    ECHO("rpc_server_name"),
    ECHO("rpc_client_name"),
    ECHO("rpc_timeout_s"),
    ECHO("base_url"),
    ECHO("api_key"),
    ECHO("actor_name"),
};
#undef K

#define K(k, f, names)                                                                                  \
        {                                                                                               \
                .key = k, .type = CONF_T_ENUM, .offset = offsetof(struct switches, f), .choices = names \
        }
static int bind_semantics(const struct conf_node *map, struct switches *sw)
{
        const struct conf_field fields[] = {
            K("weights", weights, sw_weights_names),
            K("call", call, sw_call_names),
            K("state", state, sw_state_names),
            K("outputs", outputs, sw_outputs_names),
            K("buffers", buffers, sw_buffers_names),
            {.key = "plan_cache", .type = CONF_T_BOOL, .offset = offsetof(struct switches, plan_cache)},
            {.key = "blind", .type = CONF_T_BOOL, .offset = offsetof(struct switches, blind)},
        };
        int rc;

        if (map->kind != CONF_MAP)
                return conf_error(map, "semantics: expected a map of switches");
        rc = conf_bind(map, fields, ARRAY_LEN(fields), sw);
        if (rc < 0)
                return rc;
        rc = switches_check(sw);
        return rc < 0 ? conf_error(map, "semantics: %s", err_text()) : 0;
}
#undef K

int switches_check(const struct switches *sw)
{
        if (sw->weights == SW_SHIPPED)
                return err_set(-EINVAL, "weights: shipped is not in this version");
        if (sw->call == SW_OP)
                return err_set(-EINVAL, "call: op is not in this version");
        if (sw->buffers == SW_IN_PROCESS && sw->call != SW_REQUEST)
                return err_set(-EINVAL,
                               "buffers: in process needs call: request (the server times one run, not a loop)");
        if (sw->state == SW_STATE_DELTA && sw->call != SW_STEP)
                return err_set(-EINVAL, "state: delta needs call: step");
        if (sw->state == SW_STATE_ROUNDTRIP && sw->call != SW_STEP)
                return err_set(-EINVAL, "state: roundtrip needs call: step");
        if (sw->outputs == SW_ALL && sw->call == SW_REQUEST)
                return err_set(-EINVAL,
                               "outputs: all needs call: step (a whole request has no single set of positions)");
        if (sw->buffers == SW_SERIALIZED && (sw->state == SW_STATE_ROUNDTRIP || sw->state == SW_STATE_DELTA))
                return err_set(-EINVAL, "buffers: serialized with a travelling state is not in this version");
        return 0;
}

/* argv of an external program: such a baseline has one and has no switches, all others the reverse. */
static int bind_command(const struct conf_node *entry, const struct base_keys *k, struct exp_baseline *b)
{
        bool external = b->def && b->def->external;
        size_t n = 0;

        if (!external)
                return k->command ? conf_key_error(k->command, "command: only a baseline of type external has one") : 0;
        if (k->semantics)
                return conf_key_error(k->semantics, "semantics: an external program has no switches");
        if (!k->command)
                return conf_error(entry, "command: missing; type external needs one, such as [python3, gpt2.py]");
        if (k->command->kind != CONF_LIST || !k->command->count)
                return conf_error(k->command, "command: expected a list of words, such as [python3, gpt2.py]");
        for (const struct conf_node *w = k->command->first; w; w = w->next) {
                if (w->kind != CONF_SCALAR || (n == 0 && !*w->text))
                        return conf_error(w, "command: expected a word");
                if (n == EXP_COMMAND_MAX)
                        return conf_error(w, "command: more than %d words", EXP_COMMAND_MAX);
                b->command[n++] = w->text;
        }
        return 0;
}

static int refuse_scaling(const struct conf_node *entry)
{
        const struct conf_node *type = conf_get(entry, "type");

        if (type && type->kind == CONF_SCALAR && !strcmp(type->text, "scaling"))
                return conf_error(type, "type: scaling is refused: it computes its numbers from another baseline's "
                                        "instead of measuring; give a type that runs (see `djinnbench list`)");
        return 0;
}

static int bind_baseline(const struct conf_node *entry, struct experiment *e)
{
        struct exp_baseline *b = &e->baselines[e->nbaselines];
        struct base_keys k = {0};
        const char *near;
        int rc;

        if (e->nbaselines == EXP_BASELINES_MAX)
                return conf_error(entry, "baselines: more than %d", EXP_BASELINES_MAX);
        if (entry->kind != CONF_MAP)
                return conf_error(entry, "baselines: expected a map with name and type");
        rc = refuse_scaling(entry);
        if (rc == 0)
                rc = conf_bind(entry, base_fields, ARRAY_LEN(base_fields), &k);
        if (rc < 0)
                return rc;
        for (size_t i = 0; i < e->nbaselines; i++)
                if (!strcmp(e->baselines[i].name, k.name))
                        return conf_error(entry, "baselines: the name \"%s\" stands twice", k.name);
        *b = (struct exp_baseline){
            .name = k.name, .type = k.type, .notes = k.notes, .node = entry, .semantic_aware = k.semantic_aware};
        b->def = baseline_of_type(k.type, k.semantic_aware, &b->skip);
        if (!b->def && !b->skip) {
                near = conf_nearest(k.type, baseline_types);
                return conf_error(conf_get(entry, "type"), "type: \"%s\" is unknown%s%s", k.type,
                                  near ? "; did you mean " : "", near ? near : "");
        }
        if (k.dtype && op_dtype_parse(k.dtype) != (int)e->dtype)
                return conf_error(conf_get(entry, "dtype"),
                                  "dtype: every baseline runs in the experiment's dtype (%s): "
                                  "rows of different dtypes cannot be compared",
                                  op_dtype_names[e->dtype]);
        if (b->def) {
                b->sw = b->def->sw;
                b->skip = b->def->reason;
                if (k.semantics && !b->def->external)
                        rc = bind_semantics(k.semantics, &b->sw);
        }
        if (rc == 0)
                rc = bind_command(entry, &k, b);
        if (rc == 0)
                e->nbaselines++;
        return rc;
}

static int bind_workload(const struct conf_node *entry, struct experiment *e)
{
        struct workload_spec *w = &e->workloads[e->nworkloads];
        int rc;

        if (e->nworkloads == EXP_WORKLOADS_MAX)
                return conf_error(entry, "workloads: more than %d", EXP_WORKLOADS_MAX);
        rc = workload_parse(entry, w);
        if (rc < 0)
                return rc;
        for (size_t i = 0; i < e->nworkloads; i++)
                if (!strcmp(e->workloads[i].name, w->name))
                        return conf_error(entry, "workloads: the name \"%s\" stands twice", w->name);
        e->nworkloads++;
        return 0;
}

static int bind_list(const struct conf_node *root, const char *key, struct experiment *e,
                     int (*bind)(const struct conf_node *, struct experiment *))
{
        const struct conf_node *list = conf_get(root, key);
        int rc = 0;

        if (!list)
                return conf_error(root, "%s: missing; a config has experiment, workloads and baselines", key);
        if (list->kind != CONF_LIST || !list->count)
                return conf_error(list, "%s: expected a list with at least one entry", key);
        for (const struct conf_node *n = list->first; n && rc == 0; n = n->next)
                rc = bind(n, e);
        return rc;
}

struct root_keys {
        const struct conf_node *experiment, *workloads, *baselines;
};

static int bind_root(const struct conf_node *root, struct experiment *e)
{
        static const struct conf_field fields[] = {
            {.key = "experiment",
             .type = CONF_T_NODE,
             .offset = offsetof(struct root_keys, experiment),
             .required = true},
            {.key = "workloads",
             .type = CONF_T_NODE,
             .offset = offsetof(struct root_keys, workloads),
             .required = true},
            {.key = "baselines",
             .type = CONF_T_NODE,
             .offset = offsetof(struct root_keys, baselines),
             .required = true},
        };
        struct root_keys k = {0};
        int rc;

        if (root->kind != CONF_MAP)
                return conf_error(root, "expected a map with experiment, workloads and baselines");
        rc = conf_bind(root, fields, ARRAY_LEN(fields), &k);
        if (rc == 0)
                rc = bind_experiment(k.experiment, e);
        if (rc == 0)
                rc = bind_list(root, "workloads", e, bind_workload);
        if (rc == 0)
                rc = bind_list(root, "baselines", e, bind_baseline);
        return rc;
}

int experiment_load(const char *path, struct experiment *out)
{
        int rc;

        *out = (struct experiment){.config_path = path};
        rc = conf_load(path, &out->doc);
        if (rc == 0)
                rc = bind_root(conf_root(out->doc), out);
        if (rc < 0)
                experiment_free(out);
        return rc;
}

bool exp_wanted(const char *name, const char *const *only, size_t n)
{
        for (size_t i = 0; i < n; i++)
                if (!strcmp(only[i], name))
                        return true;
        return n == 0;
}

void experiment_free(struct experiment *e)
{
        conf_free(e->doc);
        e->doc = NULL;
}
