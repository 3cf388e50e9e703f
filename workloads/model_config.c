#include "model_config.h"

#include <string.h>

#include "check.h"

#define NEEDS(what) "needs the " what " builder, which this version does not have"

struct gpt2_preset {
        const char *org, *name; /* the organisation that must be named if one is */
        int width, layers, heads;
};

/* Vocabulary and positions are the same in all of them. */
static const struct gpt2_preset gpt2_presets[] = {
    {"sshleifer", "tiny-gpt2", 2, 2, 2},
    {"openai-community", "gpt2", 768, 12, 12},
    {"openai-community", "gpt2-medium", 1024, 24, 16},
    {"openai-community", "gpt2-large", 1280, 36, 20},
    {"openai-community", "gpt2-xl", 1600, 48, 25},
    {"distilbert", "distilgpt2", 768, 6, 12},
};

static const struct {
        const char *prefix, *reason;
} families[] = {
    {"meta-llama/", NEEDS("Llama")},       {"TinyLlama/", NEEDS("Llama")},
    {"microsoft/resnet", NEEDS("ResNet")}, {"google/vit", NEEDS("vision transformer")},
    {"openai/clip", NEEDS("CLIP")},        {"microsoft/phi", NEEDS("Phi")},
};

static const struct {
        const char *type, *reason;
} types[] = {
    {"llama", NEEDS("Llama")}, {"resnet", NEEDS("ResNet")}, {"vit", NEEDS("vision transformer")},
    {"clip", NEEDS("CLIP")},   {"phi", NEEDS("Phi")},
};

/* "name", "org/name", either with "@revision". */
static bool same_model(const char *id, const char *org, const char *name)
{
        size_t org_len = strlen(org), len;

        if (strncmp(id, org, org_len) == 0 && id[org_len] == '/')
                id += org_len + 1;
        len = strcspn(id, "@");
        return len == strlen(name) && memcmp(id, name, len) == 0;
}

json *model_config_preset(const char *model_id)
{
        for (size_t i = 0; i < ARRAY_LEN(gpt2_presets); i++) {
                const struct gpt2_preset *p = &gpt2_presets[i];

                if (!same_model(model_id, p->org, p->name))
                        continue;
                json *config = json_object();

                json_set_str(config, "model_type", "gpt2");
                json_set_int(config, "n_embd", p->width);
                json_set_int(config, "n_layer", p->layers);
                json_set_int(config, "n_head", p->heads);
                json_set_int(config, "n_positions", 1024);
                json_set_int(config, "vocab_size", 50257);
                json_set_num(config, "layer_norm_epsilon", 1e-5);
                json_set_str(config, "activation_function", "gelu_new");
                return config;
        }
        return NULL;
}

const char *model_config_reason(const char *model_id)
{
        for (size_t i = 0; i < ARRAY_LEN(families); i++)
                if (strncmp(model_id, families[i].prefix, strlen(families[i].prefix)) == 0)
                        return families[i].reason;
        return NULL;
}

const char *model_config_type_reason(const char *model_type)
{
        for (size_t i = 0; i < ARRAY_LEN(types); i++)
                if (strcmp(model_type, types[i].type) == 0)
                        return types[i].reason;
        return NULL;
}
