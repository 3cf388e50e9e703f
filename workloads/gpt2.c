/*
 * GPT-2. Node order: body (embedding to the final layer norm, all rows), last, choose, all; so {body, last, choose} is
 * one contiguous run, which is what a decode step is.
 *
 * The checkpoint's linear layers are Conv1D, stored [in, out]; c_attn is query, key and value side by side, which
 * transposed is exactly the packed qkv of OP_ATTENTION. Names come with or without "transformer." before them.
 */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "check.h"
#include "err.h"
#include "layers.h"
#include "workload.h"

struct gpt2 {
        int64_t embd, layers, heads, inner, positions, vocab;
        double eps;
        enum op_act act;
        bool tied, scale_attn, scale_by_layer;
};

/* ---- config.json ---- */

static int read_sizes(const json *config, struct gpt2 *m)
{
        const struct {
                const char *key, *other;
                int64_t min, max, otherwise;
                int64_t *out;
        } fields[] = {
            {"n_embd", "hidden_size", 1, 1 << 17, -1, &m->embd},
            {"n_layer", "num_hidden_layers", 1, 4096, -1, &m->layers},
            {"n_head", "num_attention_heads", 1, 1 << 16, -1, &m->heads},
            {"n_positions", "max_position_embeddings", 1, 1 << 24, 0, &m->positions},
            {"vocab_size", NULL, 1, 1 << 24, -1, &m->vocab},
            {"n_inner", NULL, 1, 1 << 20, INT64_MAX, &m->inner},
        };
        int rc = 0;

        for (size_t i = 0; i < ARRAY_LEN(fields) && rc == 0; i++) {
                /* The oldest files say n_ctx for n_positions. */
                const char *other = fields[i].out == &m->positions && json_is_null(json_get(config, "n_positions")) &&
                                            !json_is_null(json_get(config, "n_ctx"))
                                        ? "n_ctx"
                                        : fields[i].other;

                rc = layer_config_int(config, fields[i].key, other, fields[i].min, fields[i].max, fields[i].otherwise,
                                      fields[i].out);
        }
        if (rc == 0 && m->inner == INT64_MAX)
                m->inner = 4 * m->embd;
        if (rc == 0 && m->embd % m->heads)
                rc = err_set(-EINVAL, "config.json: n_embd %lld is not a multiple of n_head %lld", (long long)m->embd,
                             (long long)m->heads);
        return rc;
}

static int read_flags(const json *config, struct gpt2 *m)
{
        bool cross;
        const struct {
                const char *key;
                bool otherwise, *out;
        } flags[] = {
            {"tie_word_embeddings", true, &m->tied},
            {"scale_attn_weights", true, &m->scale_attn},
            {"scale_attn_by_inverse_layer_idx", false, &m->scale_by_layer},
            {"add_cross_attention", false, &cross},
        };

        for (size_t i = 0; i < ARRAY_LEN(flags); i++) {
                int rc = layer_config_bool(config, flags[i].key, flags[i].otherwise, flags[i].out);

                if (rc < 0)
                        return rc;
        }
        if (cross)
                return err_set(-ENOTSUP, "config.json: add_cross_attention is not known to this version");
        return 0;
}

static int read_numbers(const json *config, struct gpt2 *m)
{
        const json *act = json_get(config, "activation_function");
        int found = layer_act_parse(json_str(act, "gelu_new"));
        int rc = layer_config_eps(config, "layer_norm_epsilon", &m->eps);

        if (rc < 0)
                return rc;
        if (!json_is_null(act) && !json_is_str(act))
                return err_set(-EINVAL, "config.json: \"activation_function\" is not a string");
        if (found < 0)
                return err_set(-ENOTSUP, "config.json: activation_function \"%.64s\" is not known to this version",
                               json_str(act, ""));
        m->act = (enum op_act)found;
        return 0;
}

/* What would change the result and is not built is refused by its name. (Dropout is off when a model is run, and
 * reorder_and_upcast_attn changes only the rounding of half precision.) */
static int refuse_unknown(const json *config)
{
        static const char *const features[] = {"quantization_config", "pruned_heads", "rope_scaling",
                                               "rope_parameters"};
        const char *type = json_str(json_get(config, "model_type"), "gpt2");

        if (!json_is_object(config))
                return err_set(-EINVAL, "config.json: not an object");
        if (strcmp(type, "gpt2") != 0)
                return err_set(-ENOTSUP,
                               "config.json: model_type \"%.64s\" needs the %.64s builder, which this version "
                               "does not have",
                               type, type);
        for (size_t i = 0; i < ARRAY_LEN(features); i++) {
                const json *v = json_get(config, features[i]);

                if (!json_is_null(v) && json_count(v) > 0)
                        return err_set(-ENOTSUP, "config.json: \"%s\" is not known to this version", features[i]);
        }
        return 0;
}

static int read_config(const json *config, struct gpt2 *m)
{
        int rc = refuse_unknown(config);

        if (rc == 0)
                rc = read_sizes(config, m);
        if (rc == 0)
                rc = read_flags(config, m);
        if (rc == 0)
                rc = read_numbers(config, m);
        return rc;
}

/* ---- graph ---- */

struct build {
        struct layers l;
        const struct gpt2 *m;
        unsigned ids, cursor, wte, wpe;
};

/* Synthetic weights: the projections have gain so that what the residual stream carries comes from the layers and not
 * from the token's own embedding; otherwise a tied head would choose the last token again and again whatever was before
 * it. */
static float gain(double g, int64_t k)
{
        return (float)(g / sqrt((double)k));
}

static unsigned cache(struct build *g, const char *kind, uint32_t batch, uint32_t context_max)
{
        char name[GRAPH_NAME_MAX];

        snprintf(name, sizeof(name), "h.%lld.attn.%s_cache", (long long)g->l.layer, kind);
        unsigned t = gb_tensor(g->l.b, name, g->l.dtype, RES_STATE, 3, (int64_t[]){batch, context_max, g->m->embd});

        gb_seq_axis(g->l.b, t, 1);
        return t;
}

static unsigned attention(struct build *g, unsigned x, uint32_t batch, uint32_t context_max)
{
        const struct gpt2 *m = g->m;
        int64_t head = m->embd / m->heads;
        double scale = m->scale_attn ? 1.0 / sqrt((double)head) : 1.0;
        struct op_attr attr = {.heads = (int32_t)m->heads,
                               .kv_heads = (int32_t)m->heads,
                               .head_dim = (int32_t)head,
                               .causal = 1,
                               .scale = (float)(m->scale_by_layer ? scale / (double)(g->l.layer + 1) : scale)};
        const struct layer_linear qkv = {
            "h.%lld.attn.qkv", "h.%lld.attn.c_attn.weight", "h.%lld.attn.c_attn.bias", 3 * m->embd, m->embd, true,
            gain(2, m->embd)};
        const struct layer_linear proj = {
            "h.%lld.attn.proj", "h.%lld.attn.c_proj.weight", "h.%lld.attn.c_proj.bias", m->embd, m->embd, true,
            gain(1, m->embd)};
        unsigned packed = layer_linear(&g->l, x, &qkv);
        unsigned k = cache(g, "k", batch, context_max), v = cache(g, "v", batch, context_max);

        gb_node(g->l.b, OP_KV_APPEND, &attr, 4, (unsigned[]){k, v, packed, g->cursor});
        unsigned heads = layer_rows(&g->l, "h.%lld.attn.heads", m->embd);

        gb_node(g->l.b, OP_ATTENTION, &attr, 5, (unsigned[]){heads, packed, k, v, g->cursor});
        return layer_linear(&g->l, heads, &proj);
}

static unsigned mlp(struct build *g, unsigned x)
{
        const struct gpt2 *m = g->m;
        const struct layer_linear fc = {
            "h.%lld.mlp.fc", "h.%lld.mlp.c_fc.weight", "h.%lld.mlp.c_fc.bias", m->inner, m->embd, true,
            gain(1, m->embd)};
        const struct layer_linear proj = {
            "h.%lld.mlp.proj", "h.%lld.mlp.c_proj.weight", "h.%lld.mlp.c_proj.bias", m->embd, m->inner, true,
            gain(2, m->inner)};
        unsigned wide = layer_linear(&g->l, x, &fc);

        if (m->act != ACT_NONE)
                wide = layer_act(&g->l, "h.%lld.mlp.act", wide, m->inner, m->act);
        return layer_linear(&g->l, wide, &proj);
}

static unsigned body(struct build *g, uint32_t batch, uint32_t context_max)
{
        const struct gpt2 *m = g->m;
        char name[GRAPH_NAME_MAX];
        unsigned x = layer_rows(&g->l, "embed", m->embd);

        gb_node(g->l.b, OP_EMBED, NULL, 5, (unsigned[]){x, g->ids, g->wte, g->wpe, g->cursor});
        for (g->l.layer = 0; g->l.layer < m->layers; g->l.layer++) {
                snprintf(name, sizeof(name), "h.%lld.ln_1", (long long)g->l.layer);
                unsigned y = layer_norm(&g->l, name, x, m->embd, m->eps, true);

                y = attention(g, y, batch, context_max);
                x = layer_add(&g->l, "h.%lld.attn.out", y, x, m->embd);
                snprintf(name, sizeof(name), "h.%lld.ln_2", (long long)g->l.layer);
                y = layer_norm(&g->l, name, x, m->embd, m->eps, true);
                y = mlp(g, y);
                x = layer_add(&g->l, "h.%lld.mlp.out", y, x, m->embd);
        }
        return layer_norm(&g->l, "ln_f", x, m->embd, m->eps, true);
}

static unsigned tensor(struct build *g, const char *name, enum op_dtype dtype, enum graph_residency res, int role,
                       int ndim, const int64_t *dims)
{
        unsigned t = gb_tensor(g->l.b, name, dtype, res, ndim, dims);

        gb_role(g->l.b, (enum graph_role)role, t);
        return t;
}

static void heads(struct build *g, unsigned hidden, uint32_t batch, uint32_t context_max)
{
        const struct gpt2 *m = g->m;
        const uint8_t phases = PHASE_PREFILL | PHASE_DECODE;
        struct graph_builder *b = g->l.b;
        int64_t per_step[] = {context_max, batch};

        gb_segment(b, SEG_LAST, phases);
        /* Tied: the table of the embedding is the head. */
        unsigned head =
            m->tied ? g->wte : layer_matrix(&g->l, "lm_head.weight", m->vocab, m->embd, false, gain(1, m->embd));
        unsigned row = gb_tensor(b, "last_row", g->l.dtype, RES_ACTIVATION, 2, (int64_t[]){batch, m->embd});
        unsigned last = tensor(g, "last_logits", DT_F32, RES_OUTPUT, ROLE_LAST, 2, (int64_t[]){batch, m->vocab});

        gb_node(b, OP_LAST_ROW, NULL, 2, (unsigned[]){row, hidden});
        gb_node(b, OP_LINEAR, NULL, 3, (unsigned[]){last, row, head});

        gb_segment(b, SEG_CHOOSE, phases);
        unsigned token = tensor(g, "token", DT_I32, RES_OUTPUT, ROLE_TOKEN, 1, (int64_t[]){batch});
        unsigned tokens = tensor(g, "tokens", DT_I32, RES_OUTPUT, ROLE_TOKENS, 2, per_step);

        gb_node(b, OP_ARGMAX, NULL, 2, (unsigned[]){token, last});
        gb_node(b, OP_EMIT, NULL, 3, (unsigned[]){tokens, g->cursor, token});

        gb_segment(b, SEG_ALL, phases);
        unsigned all =
            tensor(g, "all_logits", DT_F32, RES_OUTPUT, ROLE_ALL, 2, (int64_t[]){GRAPH_BATCH_ROWS, m->vocab});

        gb_node(b, OP_LINEAR, NULL, 3, (unsigned[]){all, hidden, head});
        /* Read by no node: a place from which tokens can be fed instead of the chosen ones. */
        tensor(g, "forced", DT_I32, RES_INPUT, ROLE_FORCED, 2, per_step);
}

int gpt2_build(const json *config, uint32_t batch, uint32_t rows_max, uint32_t context_max, enum op_dtype dtype,
               struct graph *out)
{
        struct gpt2 m = {0};
        int rc = read_config(config, &m);

        memset(out, 0, sizeof(*out));
        if (rc < 0)
                return rc;
        if (context_max > m.positions || rows_max > context_max)
                return err_set(-EINVAL,
                               "%u positions (%u of them in one call) are needed, the model has n_positions %lld",
                               context_max, rows_max, (long long)m.positions);
        struct graph_builder *b = gb_new("gpt2", batch, rows_max, context_max, dtype);
        struct build g = {.l = {.b = b, .dtype = dtype}, .m = &m};

        gb_prefix(b, "transformer.");
        gb_vocab(b, (uint32_t)m.vocab);
        g.ids = tensor(&g, "ids", DT_I32, RES_INPUT, ROLE_IDS, 1, (int64_t[]){GRAPH_BATCH_ROWS});
        g.cursor = tensor(&g, "cursor", DT_I32, RES_INPUT, ROLE_CURSOR, 1, (int64_t[]){2});
        g.wte = layer_matrix(&g.l, "wte.weight", m.vocab, m.embd, false, gain(1, m.embd));
        g.wpe = layer_matrix(&g.l, "wpe.weight", m.positions, m.embd, false, gain(1, m.embd));
        gb_segment(b, SEG_BODY, PHASE_PREFILL | PHASE_DECODE);
        heads(&g, body(&g, batch, context_max), batch, context_max);
        return gb_finish(b, out);
}
