#include <errno.h>

#include "wl_fixture.h"

#include "workload.h"

static int build(const char *extra, uint32_t rows, uint32_t context, struct graph *g)
{
        json *config = gpt2_config(extra);
        int rc = gpt2_build(config, 2, rows, context, DT_F32, g);

        json_free(config);
        return rc;
}

static const struct graph_tensor *named(const struct graph *g, const char *name)
{
        for (uint32_t i = 0; i < g->h->ntensors; i++)
                if (strcmp(g->tensors[i].name, name) == 0)
                        return &g->tensors[i];
        return NULL;
}

static void segments_are_contiguous_in_order(void **state)
{
        static const enum graph_segment_kind order[] = {SEG_BODY, SEG_LAST, SEG_CHOOSE, SEG_ALL};
        struct graph g;
        uint32_t at = 0;

        must(build(NULL, 8, 8, &g));
        assert_int_equal(g.h->nsegments, 4);
        for (int i = 0; i < 4; i++) {
                assert_int_equal(g.segments[i].kind, order[i]);
                assert_int_equal(g.segments[i].first, at);
                at += g.segments[i].count;
                assert_int_equal(g.segments[i].phase, PHASE_PREFILL | PHASE_DECODE);
        }
        assert_int_equal(at, g.h->nnodes);
        graph_free(&g);
}

static void roles_and_states_are_annotated(void **state)
{
        struct graph g;
        unsigned states = 0;

        must(build(NULL, 4, 9, &g));
        const struct {
                enum graph_role role;
                uint8_t residency, ndim;
                int64_t dims[2];
        } want[] = {
            {ROLE_IDS, RES_INPUT, 1, {GRAPH_BATCH_ROWS, 0}},
            {ROLE_CURSOR, RES_INPUT, 1, {2, 0}},
            {ROLE_FORCED, RES_INPUT, 2, {9, 2}},
            {ROLE_TOKEN, RES_OUTPUT, 1, {2, 0}},
            {ROLE_TOKENS, RES_OUTPUT, 2, {9, 2}},
            {ROLE_LAST, RES_OUTPUT, 2, {2, 11}},
            {ROLE_ALL, RES_OUTPUT, 2, {GRAPH_BATCH_ROWS, 11}},
        };

        for (size_t i = 0; i < sizeof(want) / sizeof(want[0]); i++) {
                const struct graph_tensor *t = &g.tensors[g.h->role[want[i].role]];

                assert_int_equal(t->residency, want[i].residency);
                assert_int_equal(t->ndim, want[i].ndim);
                assert_int_equal(t->dims[0], want[i].dims[0]);
                assert_int_equal(t->dims[1], want[i].dims[1]);
        }
        assert_int_equal(g.h->role[ROLE_INPUT], GRAPH_NONE);
        for (uint32_t i = 0; i < g.h->ntensors; i++) {
                if (g.tensors[i].residency != RES_STATE)
                        continue;
                states++;
                assert_int_equal(g.tensors[i].seq_axis, 1);
                assert_int_equal(g.tensors[i].dims[0], 2);
                assert_int_equal(g.tensors[i].dims[1], 9);
                assert_int_equal(g.tensors[i].dims[2], 8);
        }
        assert_int_equal(states, 4);
        assert_int_equal(g.h->vocab, 11);
        assert_int_equal(g.h->context_max, 9);
        graph_free(&g);
}

static const struct graph_node *first_of(const struct graph *g, enum op_code code, unsigned skip)
{
        for (uint32_t i = 0; i < g->h->nnodes; i++)
                if (g->nodes[i].code == code && skip-- == 0)
                        return &g->nodes[i];
        fail_msg("no such node");
        return NULL;
}

static void config_changes_the_graph(void **state)
{
        struct graph g;

        must(build(NULL, 4, 8, &g));
        assert_int_equal(named(&g, "h.0.mlp.c_fc.weight")->dims[0], 32);
        assert_null(named(&g, "lm_head.weight"));
        assert_close(first_of(&g, OP_ATTENTION, 1)->attr.scale, 0.5, 0);
        assert_close(first_of(&g, OP_LAYERNORM, 0)->attr.eps, 1e-5, 1e-11);
        assert_int_equal(first_of(&g, OP_ACT, 0)->attr.act, ACT_GELU_TANH);
        graph_free(&g);

        must(build(",\"n_inner\":20,\"tie_word_embeddings\":false,\"scale_attn_by_inverse_layer_idx\":true,"
                   "\"layer_norm_epsilon\":0.001",
                   4, 8, &g));
        assert_int_equal(named(&g, "h.0.mlp.c_fc.weight")->dims[0], 20);
        assert_non_null(named(&g, "lm_head.weight"));
        assert_close(first_of(&g, OP_ATTENTION, 0)->attr.scale, 0.5, 0);
        assert_close(first_of(&g, OP_ATTENTION, 1)->attr.scale, 0.25, 0);
        assert_close(first_of(&g, OP_LAYERNORM, 0)->attr.eps, 1e-3, 1e-9);
        graph_free(&g);

        must(build(",\"n_inner\":null,\"scale_attn_weights\":false", 4, 8, &g));
        assert_int_equal(named(&g, "h.1.mlp.c_fc.weight")->dims[0], 32);
        assert_close(first_of(&g, OP_ATTENTION, 1)->attr.scale, 1, 0);
        graph_free(&g);
}

static int build_text(const char *text, struct graph *g)
{
        json *config = json_parse(text, strlen(text), "config.json");

        assert_non_null(config);
        err_clear();
        int rc = gpt2_build(config, 1, 4, 8, DT_F16, g);

        json_free(config);
        return rc;
}

#define SIZES "\"vocab_size\":11,\"hidden_size\":6,\"num_hidden_layers\":1,\"num_attention_heads\":3,"

static void other_spellings_are_read(void **state)
{
        static const struct {
                const char *name;
                enum op_act act;
        } acts[] = {
            {"gelu", ACT_GELU_ERF}, {"relu", ACT_RELU}, {"silu", ACT_SILU}, {"gelu_pytorch_tanh", ACT_GELU_TANH}};
        char text[512];
        struct graph g;

        for (size_t i = 0; i < 4; i++) {
                snprintf(text, sizeof(text), "{" SIZES "\"%s\":16,\"activation_function\":\"%s\"}",
                         i % 2 ? "n_ctx" : "max_position_embeddings", acts[i].name);
                must(build_text(text, &g));
                assert_int_equal(first_of(&g, OP_ACT, 0)->attr.act, acts[i].act);
                assert_int_equal(named(&g, "wpe.weight")->dims[0], 16);
                assert_int_equal(named(&g, "wpe.weight")->dtype, DT_F16);
                graph_free(&g);
        }
}

static void what_is_not_built_is_refused_by_name(void **state)
{
        static const struct {
                const char *text;
                int rc;
                const char *sentence;
        } bad[] = {
            {"{" SIZES "\"n_positions\":16,\"model_type\":\"llama\"}", -ENOTSUP, "llama"},
            {"{" SIZES "\"n_positions\":16,\"activation_function\":\"quick_gelu\"}", -ENOTSUP, "quick_gelu"},
            {"{" SIZES "\"n_positions\":16,\"activation_function\":7}", -EINVAL, "activation_function"},
            {"{" SIZES "\"n_positions\":16,\"add_cross_attention\":true}", -ENOTSUP, "add_cross_attention"},
            {"{" SIZES "\"n_positions\":16,\"quantization_config\":{\"bits\":4}}", -ENOTSUP, "quantization_config"},
            {"{" SIZES "\"n_positions\":16,\"pruned_heads\":{\"0\":[1]}}", -ENOTSUP, "pruned_heads"},
            {"{" SIZES "\"n_positions\":16,\"tie_word_embeddings\":\"no\"}", -EINVAL, "tie_word_embeddings"},
            {"{" SIZES "\"n_positions\":16,\"layer_norm_epsilon\":-1}", -EINVAL, "layer_norm_epsilon"},
            {"{" SIZES "\"n_positions\":16,\"n_inner\":0}", -EINVAL, "n_inner"},
            {"{" SIZES "\"n_positions\":16,\"n_head\":4}", -EINVAL, "not a multiple"},
            {"{" SIZES "\"n_positions\":7}", -EINVAL, "n_positions 7"},
            {"{" SIZES "\"n_positions\":16,\"n_embd\":-6}", -EINVAL, "n_embd"},
            {"{" SIZES "\"n_positions\":16,\"n_layer\":1e9}", -EINVAL, "n_layer"},
            {"{" SIZES "\"n_positions\":16,\"n_layer\":1.5}", -EINVAL, "n_layer"},
            {"{" SIZES "\"n_positions\":16,\"n_layer\":4000}", -EINVAL, "more"},
            {"{\"n_embd\":6}", -EINVAL, "missing"},
            {"[]", -EINVAL, "not an object"},
        };
        struct graph g;

        for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
                int rc = build_text(bad[i].text, &g);

                if (rc != bad[i].rc)
                        fail_msg("%s gave %d", bad[i].text, rc);
                assert_null(g.h);
                assert_sentence(bad[i].sentence);
        }
}

static void random_configs_never_crash(void **state)
{
        static const char good[] = "{" SIZES "\"n_positions\":16,\"n_inner\":12,\"layer_norm_epsilon\":1e-5,"
                                   "\"tie_word_embeddings\":false,\"activation_function\":\"relu\"}";
        struct prng p;
        size_t accepted = 0;

        prng_seed(&p, 17);
        for (int round = 0; round < 5000; round++) {
                unsigned char b[sizeof(good)];
                struct graph g;

                memcpy(b, good, sizeof(good));
                size_t len = mutate(&p, b, sizeof(good) - 1);
                json *config = json_parse((char *)b, len, "config.json");

                if (config && gpt2_build(config, 1, 4, 8, DT_F32, &g) == 0) {
                        accepted++;
                        graph_free(&g);
                }
                json_free(config);
        }
        assert_true(accepted > 100);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(segments_are_contiguous_in_order),
            cmocka_unit_test(roles_and_states_are_annotated),
            cmocka_unit_test(config_changes_the_graph),
            cmocka_unit_test(other_spellings_are_read),
            cmocka_unit_test(what_is_not_built_is_refused_by_name),
            cmocka_unit_test(random_configs_never_crash),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
