/* Which implementations a config may name, and how their parameters are read, checked and built. */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "check.h"
#include "err.h"
#include "model_config.h"
#include "workload.h"

#define BATCH_MAX    4096
#define CONTEXT_MAX  (1 << 20)
#define PAYLOAD_MAX  (1 << 30)
#define ABSENT(what) "needs the " what " builder, which this version does not have"

#define FIELD(name_, type_, member, lo, hi, help_)                                                                   \
        {                                                                                                            \
                .key = name_, .type = type_, .offset = offsetof(struct workload_spec, member), .min = lo, .max = hi, \
                .help = help_                                                                                        \
        }

/* ---- hf_causal_lm ---- */

static const struct conf_field causal_params[] = {
    {.key = "model_id",
     .type = CONF_T_STR,
     .offset = offsetof(struct workload_spec, model_id),
     .required = true,
     .help = "name or org/name[@revision]"},
    FIELD("prompt_text", CONF_T_STR, prompt_text, 0, 0, "repeated to prompt_length; without it: random ids"),
    FIELD("prompt_file", CONF_T_STR, prompt_file, 0, 0, "file that holds the prompt's text"),
    FIELD("prompt_length", CONF_T_INT, prompt_length, 1, CONTEXT_MAX, "tokens of the prompt"),
    FIELD("new_tokens", CONF_T_INT, new_tokens, 0, CONTEXT_MAX, "tokens to generate; 0: the last logits"),
    FIELD("batch_size", CONF_T_INT, batch_size, 1, BATCH_MAX, "sequences"),
    FIELD("turns", CONF_T_INT, turns, 1, 1000, "requests of a conversation that keeps its history"),
    FIELD("turn_tokens", CONF_T_INT, turn_tokens, 1, CONTEXT_MAX, "new ids that each further turn appends"),
    FIELD("unit_name", CONF_T_STR, unit_name, 0, 0, "what throughput counts"),
    FIELD("generation", CONF_T_NODE, generation, 0, 0, "accepted where it means greedy"),
};

static void causal_defaults(struct workload_spec *s)
{
        s->prompt_length = 64;
        s->new_tokens = 32;
        s->batch_size = 1;
        s->turns = 1;
        s->turn_tokens = 16;
        s->unit_name = "tokens";
}

struct generation {
        bool do_sample;
        int64_t num_beams, no_repeat_ngram_size;
        double repetition_penalty;
};

/* The result must be the same tokens in every baseline: what is not greedy is refused, what greedy ignores is taken. */
static int check_generation(const struct conf_node *node)
{
        static const struct conf_field fields[] = {
            {.key = "do_sample", .type = CONF_T_BOOL, .offset = offsetof(struct generation, do_sample)},
            {.key = "num_beams", .type = CONF_T_INT, .offset = offsetof(struct generation, num_beams), .max = 1e6},
            {.key = "no_repeat_ngram_size",
             .type = CONF_T_INT,
             .offset = offsetof(struct generation, no_repeat_ngram_size),
             .max = 1e6},
            {.key = "repetition_penalty",
             .type = CONF_T_NUM,
             .offset = offsetof(struct generation, repetition_penalty)},
            {.key = "temperature", .type = CONF_T_ECHO},
            {.key = "top_p", .type = CONF_T_ECHO},
            {.key = "top_k", .type = CONF_T_ECHO},
            {.key = "use_cache", .type = CONF_T_ECHO},
            {.key = "pad_token_id", .type = CONF_T_ECHO},
            {.key = "eos_token_id", .type = CONF_T_ECHO},
        };
        struct generation g = {.num_beams = 1, .repetition_penalty = 1};
        int rc = conf_bind(node, fields, ARRAY_LEN(fields), &g);

        if (rc < 0)
                return rc;
        if (g.do_sample)
                return conf_error(node, "generation.do_sample is true: only greedy generation is run, because every "
                                        "baseline must return the same tokens");
        if (g.num_beams > 1 || g.no_repeat_ngram_size > 0 || g.repetition_penalty < 1 || g.repetition_penalty > 1)
                return conf_error(node, "generation: num_beams, no_repeat_ngram_size and repetition_penalty other than "
                                        "1, 0 and 1.0 are not greedy generation");
        return 0;
}

static int causal_check(struct workload_spec *s, const struct conf_node *at)
{
        if (!*s->model_id)
                return conf_error(at, "params.model_id is empty");
        if (s->prompt_text && s->prompt_file)
                return conf_error(at, "params: prompt_text and prompt_file exclude one another");
        double history = (double)s->prompt_length + (double)s->turns * (double)(s->new_tokens + s->turn_tokens);

        if (history > 2.0 * CONTEXT_MAX)
                return conf_error(at, "params: a history of %.0f positions, above the limit of %d", history,
                                  2 * CONTEXT_MAX);
        return s->generation ? check_generation(s->generation) : 0;
}

static int causal_build(const struct workload_spec *s, const json *config, enum op_dtype dtype, struct graph *out)
{
        /* The whole conversation; a recomputation brings all of it in one call. */
        int64_t context = s->prompt_length + s->turns * s->new_tokens + (s->turns - 1) * s->turn_tokens;
        const char *type = json_str(json_get(config, "model_type"), "gpt2");
        const char *reason = model_config_type_reason(type);
        int64_t positions;

        if (reason)
                return err_set(-ENOTSUP, "model_type \"%s\" %s", type, reason);
        /* The token chosen last is fed to nobody. */
        if (s->new_tokens && json_int(config, "n_positions", 1, 1 << 24, &positions) == 0 && context == positions + 1)
                context--;
        return gpt2_build(config, (uint32_t)s->batch_size, (uint32_t)context, (uint32_t)context, dtype, out);
}

/* ---- synthetic_transformer ---- */

static const struct conf_field transformer_params[] = {
    FIELD("batch_size", CONF_T_INT, batch_size, 1, BATCH_MAX, "sequences"),
    FIELD("sequence_length", CONF_T_INT, sequence_length, 1, CONTEXT_MAX, "rows of each"),
    FIELD("hidden_size", CONF_T_INT, hidden_size, 1, 1 << 16, "width"),
    FIELD("num_heads", CONF_T_INT, num_heads, 1, 1 << 12, "attention heads"),
    FIELD("num_layers", CONF_T_INT, num_layers, 1, 512, "layers"),
    FIELD("ff_size", CONF_T_INT, ff_size, 1, 1 << 18, "width of the feed-forward part; default 4 * hidden_size"),
    {.key = "dropout", .type = CONF_T_ECHO, .help = "without effect: dropout is off when a model is run"},
    FIELD("unit_name", CONF_T_STR, unit_name, 0, 0, "what throughput counts: tokens, or sequences"),
};

static void transformer_defaults(struct workload_spec *s)
{
        s->batch_size = 1;
        s->sequence_length = 256;
        s->hidden_size = 1024;
        s->num_heads = 8;
        s->num_layers = 6;
        s->unit_name = "sequences";
}

static int transformer_check(struct workload_spec *s, const struct conf_node *at)
{
        if (!s->ff_size)
                s->ff_size = 4 * s->hidden_size;
        if (s->hidden_size % s->num_heads)
                return conf_error(at, "params: hidden_size %lld is not a multiple of num_heads %lld",
                                  (long long)s->hidden_size, (long long)s->num_heads);
        return 0;
}

static int transformer_build(const struct workload_spec *s, const json *config, enum op_dtype dtype, struct graph *out)
{
        const struct encoder_shape shape = {.batch = s->batch_size,
                                            .rows = s->sequence_length,
                                            .hidden = s->hidden_size,
                                            .heads = s->num_heads,
                                            .layers = s->num_layers,
                                            .ff = s->ff_size,
                                            .eps = 1e-5,
                                            .act = ACT_RELU};

        return encoder_build(&shape, dtype, out);
}

/* ---- echo ---- */

static const struct conf_field echo_params[] = {
    FIELD("payload_bytes", CONF_T_INT, payload_bytes, 1, PAYLOAD_MAX, "bytes there, and back"),
    FIELD("unit_name", CONF_T_STR, unit_name, 0, 0, "what throughput counts"),
};

static void echo_defaults(struct workload_spec *s)
{
        s->payload_bytes = 64;
        s->unit_name = "requests";
        s->batch_size = 1;
}

static int echo_check(struct workload_spec *s, const struct conf_node *at)
{
        return 0;
}

static int echo_of_spec(const struct workload_spec *s, const json *config, enum op_dtype dtype, struct graph *out)
{
        return echo_build((uint64_t)s->payload_bytes, out);
}

/* ---- the table ---- */

const struct workload_kind workload_kinds[] = {
    {.implementation = "hf_causal_lm",
     .what = "a causal language model by name (GPT-2): prompt to tokens",
     .params = causal_params,
     .nparams = ARRAY_LEN(causal_params),
     .defaults = causal_defaults,
     .check = causal_check,
     .build = causal_build,
     .driver = DRIVE_CAUSAL},
    {.implementation = "synthetic_transformer",
     .what = "torch.nn.TransformerEncoder (post-norm, ReLU) with seeded weights",
     .params = transformer_params,
     .nparams = ARRAY_LEN(transformer_params),
     .defaults = transformer_defaults,
     .check = transformer_check,
     .build = transformer_build,
     .driver = DRIVE_FORWARD},
    {.implementation = "echo",
     .what = "no model: the bytes come back",
     .params = echo_params,
     .nparams = ARRAY_LEN(echo_params),
     .defaults = echo_defaults,
     .check = echo_check,
     .build = echo_of_spec,
     .driver = DRIVE_FORWARD},
    {.implementation = "hf_vision",
     .what = "an image classifier by name",
     .reason = ABSENT("ResNet"),
     .driver = DRIVE_FORWARD},
    {.implementation = "hf_multimodal",
     .what = "an image and text model by name",
     .reason = ABSENT("CLIP"),
     .driver = DRIVE_FORWARD},
    {.implementation = "synthetic_cnn",
     .what = "a convolutional network with seeded weights",
     .reason = ABSENT("convolution"),
     .driver = DRIVE_FORWARD},
    {.implementation = "synthetic_hybrid",
     .what = "convolutions, then a transformer, with seeded weights",
     .reason = ABSENT("convolution"),
     .driver = DRIVE_FORWARD},
    {0},
};

static const struct workload_kind *kind_find(const char *implementation)
{
        for (const struct workload_kind *k = workload_kinds; k->implementation; k++)
                if (strcmp(k->implementation, implementation) == 0)
                        return k;
        return NULL;
}

static int unknown_kind(const struct conf_node *at, const char *implementation)
{
        const char *known[ARRAY_LEN(workload_kinds)] = {NULL};

        for (size_t i = 0; workload_kinds[i].implementation; i++)
                known[i] = workload_kinds[i].implementation;
        const char *near = conf_nearest(implementation, known);

        if (near)
                return conf_error(at, "unknown implementation \"%.64s\"; did you mean \"%s\"?", implementation, near);
        return conf_error(at, "unknown implementation \"%.64s\"; `djinnbench list` names them", implementation);
}

static int parse_params(struct workload_spec *s, const struct conf_node *entry)
{
        const struct workload_kind *k = s->kind;
        /* A workload without params: the entry's place stands in errors. */
        const struct conf_node none = {
            .kind = CONF_MAP, .file = entry->file, .line = entry->line, .col = entry->col, .key = "params"};
        const struct conf_node *params = s->params ? s->params : &none;

        if (params->kind != CONF_MAP)
                return conf_error(params, "params: expected a map");
        if (k->reason)
                return 0;
        k->defaults(s);
        int rc = conf_bind(params, k->params, k->nparams, s);

        return rc < 0 ? rc : k->check(s, params);
}

int workload_parse(const struct conf_node *entry, struct workload_spec *out)
{
        static const struct conf_field fields[] = {
            {.key = "name", .type = CONF_T_NAME, .offset = offsetof(struct workload_spec, name), .required = true},
            {.key = "category", .type = CONF_T_STR, .offset = offsetof(struct workload_spec, category)},
            {.key = "implementation",
             .type = CONF_T_STR,
             .offset = offsetof(struct workload_spec, implementation),
             .required = true},
            {.key = "params", .type = CONF_T_NODE, .offset = offsetof(struct workload_spec, params)},
        };

        memset(out, 0, sizeof(*out));
        if (entry->kind != CONF_MAP)
                return conf_error(entry, "workloads[]: expected a map with name, implementation and params");
        int rc = conf_bind(entry, fields, ARRAY_LEN(fields), out);

        if (rc < 0)
                return rc;
        out->kind = kind_find(out->implementation);
        if (!out->kind)
                return unknown_kind(conf_get(entry, "implementation"), out->implementation);
        return parse_params(out, entry);
}

double workload_units(const struct workload_spec *s)
{
        if (s->kind->driver == DRIVE_CAUSAL)
                return (double)s->batch_size * (double)(s->new_tokens ? s->new_tokens : s->prompt_length);
        if (s->sequence_length && s->unit_name && strcmp(s->unit_name, "tokens") == 0)
                return (double)s->batch_size * (double)s->sequence_length;
        return s->batch_size ? (double)s->batch_size : 1;
}
