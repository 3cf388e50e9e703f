/*
 * torch.nn.TransformerEncoder, without a mask. Post-norm: x = norm1(x + attention(x)); x = norm2(x + mlp(x)).
 * Pre-norm (norm_first): x = x + attention(norm1(x)); x = x + mlp(norm2(x)); and a norm at the end if the model has one.
 */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "check.h"
#include "err.h"
#include "layers.h"
#include "workload.h"

static float gain(double g, int64_t k)
{
        return (float)(g / sqrt((double)k));
}

static unsigned attention(struct layers *l, const struct encoder_shape *s, unsigned x)
{
        int64_t head = s->hidden / s->heads;
        struct op_attr attr = {.heads = (int32_t)s->heads,
                               .kv_heads = (int32_t)s->heads,
                               .head_dim = (int32_t)head,
                               .scale = (float)(1.0 / sqrt((double)head))};
        const struct layer_linear in = {"layers.%lld.self_attn.qkv",
                                        "layers.%lld.self_attn.in_proj_weight",
                                        s->no_bias ? NULL : "layers.%lld.self_attn.in_proj_bias",
                                        3 * s->hidden,
                                        s->hidden,
                                        false,
                                        gain(2, s->hidden)};
        const struct layer_linear proj = {"layers.%lld.self_attn.proj",
                                          "layers.%lld.self_attn.out_proj.weight",
                                          s->no_bias ? NULL : "layers.%lld.self_attn.out_proj.bias",
                                          s->hidden,
                                          s->hidden,
                                          false,
                                          gain(1, s->hidden)};
        unsigned qkv = layer_linear(l, x, &in), heads = layer_rows(l, "layers.%lld.self_attn.heads", s->hidden);

        gb_node(l->b, OP_ATTENTION, &attr, 2, (unsigned[]){heads, qkv});
        return layer_linear(l, heads, &proj);
}

static unsigned mlp(struct layers *l, const struct encoder_shape *s, unsigned x)
{
        const struct layer_linear up = {"layers.%lld.up",
                                        "layers.%lld.linear1.weight",
                                        s->no_bias ? NULL : "layers.%lld.linear1.bias",
                                        s->ff,
                                        s->hidden,
                                        false,
                                        gain(1, s->hidden)};
        const struct layer_linear down = {"layers.%lld.down",
                                          "layers.%lld.linear2.weight",
                                          s->no_bias ? NULL : "layers.%lld.linear2.bias",
                                          s->hidden,
                                          s->ff,
                                          false,
                                          gain(2, s->ff)};
        unsigned wide = layer_linear(l, x, &up);

        if (s->act != ACT_NONE)
                wide = layer_act(l, "layers.%lld.act", wide, s->ff, s->act);
        return layer_linear(l, wide, &down);
}

static unsigned norm(struct layers *l, const struct encoder_shape *s, int which, unsigned x)
{
        char source[GRAPH_NAME_MAX];

        snprintf(source, sizeof(source), "layers.%lld.norm%d", (long long)l->layer, which);
        return layer_norm(l, source, x, s->hidden, s->eps, !s->no_bias);
}

static unsigned block(struct layers *l, const struct encoder_shape *s, unsigned x)
{
        const char *const sums[] = {"layers.%lld.sum1", "layers.%lld.sum2"};
        unsigned (*const parts[])(struct layers *, const struct encoder_shape *, unsigned) = {attention, mlp};

        for (int i = 0; i < 2; i++) {
                unsigned y = parts[i](l, s, s->norm_first ? norm(l, s, i + 1, x) : x);

                x = layer_add(l, sums[i], y, x, s->hidden);
                if (!s->norm_first)
                        x = norm(l, s, i + 1, x);
        }
        return x;
}

int encoder_build(const struct encoder_shape *s, enum op_dtype dtype, struct graph *out)
{
        memset(out, 0, sizeof(*out));
        if (s->heads < 1 || s->hidden < 1 || s->hidden % s->heads)
                return err_set(-EINVAL, "the encoder's hidden size %lld is not a multiple of %lld heads",
                               (long long)s->hidden, (long long)s->heads);
        if (s->batch < 1 || s->rows < 1 || s->batch > UINT16_MAX || s->rows > INT32_MAX || s->layers < 1)
                return err_set(-EINVAL, "an encoder of %lld layers for a batch of %lld times %lld rows cannot be built",
                               (long long)s->layers, (long long)s->batch, (long long)s->rows);
        struct graph_builder *b = gb_new("transformer_encoder", (uint32_t)s->batch, (uint32_t)s->rows, 0, dtype);
        struct layers l = {.b = b, .dtype = dtype};
        int64_t dims[] = {GRAPH_BATCH_ROWS, s->hidden};
        unsigned x = gb_tensor(b, "input", dtype, RES_INPUT, 2, dims);

        gb_prefix(b, "encoder.");
        gb_role(b, ROLE_INPUT, x);
        gb_segment(b, SEG_BODY, PHASE_FORWARD);
        for (l.layer = 0; l.layer < s->layers; l.layer++)
                x = block(&l, s, x);
        if (s->final_norm)
                x = layer_norm(&l, "norm", x, s->hidden, s->eps, !s->no_bias);
        gb_output(b, x);
        gb_role(b, ROLE_OUTPUT, x);
        return gb_finish(b, out);
}

int encoder_shape_read(const json *config, struct encoder_shape *out)
{
        const struct {
                const char *key, *other;
                int64_t max, *out;
        } sizes[] = {
            {"hidden_size", "d_model", 1 << 17, &out->hidden},
            {"num_layers", "num_hidden_layers", 4096, &out->layers},
            {"num_heads", "nhead", 1 << 16, &out->heads},
            {"ff_size", "dim_feedforward", 1 << 20, &out->ff},
        };
        const char *type = json_str(json_get(config, "model_type"), ""),
                   *act = json_str(json_get(config, "activation"), "relu");
        bool bias = true;
        int rc = 0;

        if (strcmp(type, "torch_transformer_encoder") != 0)
                return err_set(-ENOTSUP,
                               "config.json: model_type \"%.64s\" needs its own builder, which this version "
                               "does not have",
                               type);
        for (size_t i = 0; i < ARRAY_LEN(sizes) && rc == 0; i++)
                rc = layer_config_int(config, sizes[i].key, sizes[i].other, 1, sizes[i].max, -1, sizes[i].out);
        if (rc == 0)
                rc = layer_config_bool(config, "norm_first", false, &out->norm_first);
        if (rc == 0)
                rc = layer_config_bool(config, "bias", true, &bias);
        if (rc == 0)
                rc = layer_config_eps(config, "layer_norm_eps", &out->eps);
        if (rc < 0)
                return rc;
        out->no_bias = !bias;
        int found = layer_act_parse(act);

        if (found < 0)
                return err_set(-ENOTSUP, "config.json: activation \"%.64s\" is not known to this version", act);
        out->act = (enum op_act)found;
        return 0;
}
