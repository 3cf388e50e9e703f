#include "layers.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "check.h"
#include "err.h"

struct name {
        char text[GRAPH_NAME_MAX];
};

/* A name that does not fit stays too long, so that gb_tensor refuses it. */
static struct name named(const struct layers *l, const char *pattern)
{
        struct name n = {""};
        const char *mark = strstr(pattern, "%lld");

        if (!mark)
                snprintf(n.text, sizeof(n.text), "%s", pattern);
        else
                snprintf(n.text, sizeof(n.text), "%.*s%lld%s", (int)(mark - pattern), pattern, (long long)l->layer,
                         mark + strlen("%lld"));
        return n;
}

static unsigned weight(struct layers *l, const char *source, int ndim, const int64_t *dims, bool transpose, float scale,
                       float bias)
{
        struct name n = named(l, source);
        struct graph_recipe r = {
            .transpose = transpose, .synth = SYNTH_NORMAL, .synth_scale = scale, .synth_bias = bias};
        unsigned t = gb_tensor(l->b, n.text, l->dtype, RES_WEIGHT, ndim, dims);

        _Static_assert(sizeof(r.source) >= sizeof(n.text), "a tensor's name fits a recipe's source");
        memcpy(r.source, n.text, sizeof(n.text));
        gb_recipe(l->b, t, &r);
        return t;
}

unsigned layer_vector(struct layers *l, const char *source, int64_t n, float scale, float bias)
{
        return weight(l, source, 1, &n, false, scale, bias);
}

unsigned layer_matrix(struct layers *l, const char *source, int64_t n, int64_t k, bool transpose, float scale)
{
        return weight(l, source, 2, (int64_t[]){n, k}, transpose, scale, 0);
}

unsigned layer_rows(struct layers *l, const char *name, int64_t width)
{
        return gb_tensor(l->b, named(l, name).text, l->dtype, RES_ACTIVATION, 2, (int64_t[]){GRAPH_BATCH_ROWS, width});
}

unsigned layer_linear(struct layers *l, unsigned x, const struct layer_linear *spec)
{
        unsigned w = layer_matrix(l, spec->weight, spec->n, spec->k, spec->transpose, spec->scale);
        unsigned bias = spec->bias ? layer_vector(l, spec->bias, spec->n, 0.02f, 0) : GRAPH_NONE;
        unsigned out = layer_rows(l, spec->out, spec->n);

        gb_node(l->b, OP_LINEAR, NULL, 4, (unsigned[]){out, x, w, bias});
        return out;
}

unsigned layer_norm(struct layers *l, const char *source, unsigned x, int64_t width, double eps, bool bias)
{
        char name[GRAPH_NAME_MAX + 8];
        struct op_attr attr = {.eps = (float)eps};

        snprintf(name, sizeof(name), "%s.weight", source);
        unsigned gamma = layer_vector(l, name, width, 0.1f, 1);

        snprintf(name, sizeof(name), "%s.bias", source);
        unsigned beta = bias ? layer_vector(l, name, width, 0.02f, 0) : GRAPH_NONE;

        unsigned out = layer_rows(l, source, width);

        gb_node(l->b, OP_LAYERNORM, &attr, 4, (unsigned[]){out, x, gamma, beta});
        return out;
}

unsigned layer_act(struct layers *l, const char *name, unsigned x, int64_t width, enum op_act act)
{
        struct op_attr attr = {.act = (int32_t)act};
        unsigned out = layer_rows(l, name, width);

        gb_node(l->b, OP_ACT, &attr, 2, (unsigned[]){out, x});
        return out;
}

unsigned layer_add(struct layers *l, const char *name, unsigned a, unsigned b, int64_t width)
{
        unsigned out = layer_rows(l, name, width);

        gb_node(l->b, OP_ADD, NULL, 3, (unsigned[]){out, a, b});
        return out;
}

int layer_act_parse(const char *name)
{
        static const struct {
                const char *name;
                enum op_act act;
        } known[] = {
            {"gelu_new", ACT_GELU_TANH},
            {"gelu_pytorch_tanh", ACT_GELU_TANH},
            {"gelu_fast", ACT_GELU_TANH},
            {"gelu", ACT_GELU_ERF},
            {"gelu_python", ACT_GELU_ERF},
            {"relu", ACT_RELU},
            {"silu", ACT_SILU},
            {"swish", ACT_SILU},
            {"linear", ACT_NONE},
        };

        for (size_t i = 0; name && i < ARRAY_LEN(known); i++)
                if (strcmp(name, known[i].name) == 0)
                        return known[i].act;
        return -1;
}

int layer_config_int(const json *config, const char *a, const char *b, int64_t min, int64_t max, int64_t otherwise,
                     int64_t *out)
{
        int rc = json_int(config, a, min, max, out);

        if (rc == -ENOENT && b)
                rc = json_int(config, b, min, max, out);
        if (rc != -ENOENT)
                return rc < 0 ? err_trail(rc, "in config.json") : 0;
        if (otherwise < min)
                return err_set(-EINVAL, "config.json: \"%s\" is missing", a);
        *out = otherwise;
        return 0;
}

int layer_config_bool(const json *config, const char *key, bool otherwise, bool *out)
{
        const json *v = json_get(config, key);

        if (!json_is_null(v) && !json_is_bool(v))
                return err_set(-EINVAL, "config.json: \"%s\" is neither true nor false", key);
        *out = json_bool(v, otherwise);
        return 0;
}

int layer_config_eps(const json *config, const char *key, double *out)
{
        const json *v = json_get(config, key);

        *out = json_num(v, 1e-5);
        if ((!json_is_null(v) && !json_is_num(v)) || !(*out >= 0 && *out < 1))
                return err_set(-EINVAL, "config.json: \"%s\" is not a number from 0 to 1", key);
        return 0;
}
