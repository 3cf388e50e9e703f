#include <errno.h>

#include "wl_fixture.h"

#include "workload.h"

static const struct encoder_shape shape = {
    .batch = 2, .rows = 5, .hidden = 8, .heads = 2, .layers = 2, .ff = 12, .eps = 1e-5, .act = ACT_RELU};

static unsigned count(const struct graph *g, enum op_code code)
{
        unsigned n = 0;

        for (uint32_t i = 0; i < g->h->nnodes; i++)
                n += g->nodes[i].code == code;
        return n;
}

static void order_of_post_and_pre_norm(void **state)
{
        static const enum op_code post[] = {OP_LINEAR, OP_ATTENTION, OP_LINEAR, OP_ADD, OP_LAYERNORM,
                                            OP_LINEAR, OP_ACT,       OP_LINEAR, OP_ADD, OP_LAYERNORM};
        static const enum op_code pre[] = {OP_LAYERNORM, OP_LINEAR, OP_ATTENTION, OP_LINEAR, OP_ADD,
                                           OP_LAYERNORM, OP_LINEAR, OP_ACT,       OP_LINEAR, OP_ADD};
        struct encoder_shape s = shape;
        struct graph g;

        must(encoder_build(&s, DT_F32, &g));
        assert_int_equal(g.h->nnodes, 20);
        for (int i = 0; i < 20; i++)
                assert_int_equal(g.nodes[i].code, post[i % 10]);
        assert_int_equal(g.nodes[19].arg[0], g.h->role[ROLE_OUTPUT]);
        assert_int_equal(g.h->rows_max, 5);
        assert_int_equal(g.segments[0].phase, PHASE_FORWARD);
        graph_free(&g);
        s.norm_first = s.final_norm = true;
        must(encoder_build(&s, DT_F32, &g));
        assert_int_equal(g.h->nnodes, 21);
        for (int i = 0; i < 20; i++)
                assert_int_equal(g.nodes[i].code, pre[i % 10]);
        assert_int_equal(g.nodes[20].code, OP_LAYERNORM);
        assert_int_equal(g.tensors[g.h->role[ROLE_OUTPUT]].residency, RES_OUTPUT);
        graph_free(&g);
}

static void variations(void **state)
{
        struct encoder_shape s = shape;
        struct graph g;
        uint32_t with_bias;

        must(encoder_build(&s, DT_F32, &g));
        with_bias = g.h->nrecipes;
        graph_free(&g);
        s.no_bias = true;
        must(encoder_build(&s, DT_BF16, &g));
        assert_int_equal(g.h->nrecipes, with_bias - 2 * 6);
        graph_free(&g);
        s.act = ACT_NONE;
        must(encoder_build(&s, DT_F32, &g));
        assert_int_equal(count(&g, OP_ACT), 0);
        graph_free(&g);
        s.heads = 3;
        assert_int_equal(encoder_build(&s, DT_F32, &g), -EINVAL);
        assert_sentence("not a multiple");
        assert_null(g.h);
        s.heads = 0;
        assert_int_equal(encoder_build(&s, DT_F32, &g), -EINVAL);
        s = shape;
        s.rows = INT64_C(1) << 40;
        assert_int_equal(encoder_build(&s, DT_F32, &g), -EINVAL);
        s = shape;
        s.layers = 4000;
        assert_int_equal(encoder_build(&s, DT_F32, &g), -EINVAL);
}

static int read_shape(const char *text, struct encoder_shape *s)
{
        json *config = json_parse(text, strlen(text), "config.json");

        assert_non_null(config);
        memset(s, 0, sizeof(*s));
        err_clear();
        int rc = encoder_shape_read(config, s);

        json_free(config);
        return rc;
}

#define TYPE  "\"model_type\":\"torch_transformer_encoder\","
#define SIZES "\"hidden_size\":48,\"num_layers\":3,\"num_heads\":4,\"ff_size\":96"

static void configs_are_read(void **state)
{
        struct encoder_shape s;

        must(read_shape("{" TYPE SIZES "}", &s));
        assert_int_equal(s.hidden, 48);
        assert_int_equal(s.layers, 3);
        assert_int_equal(s.heads, 4);
        assert_int_equal(s.ff, 96);
        assert_int_equal(s.act, ACT_RELU);
        assert_false(s.norm_first || s.no_bias);
        assert_close(s.eps, 1e-5, 0);
        must(read_shape("{" TYPE SIZES ",\"activation\":\"gelu\",\"norm_first\":true,\"bias\":false,"
                        "\"layer_norm_eps\":0.1}",
                        &s));
        assert_int_equal(s.act, ACT_GELU_ERF);
        assert_true(s.norm_first && s.no_bias);
        assert_close(s.eps, 0.1, 0);
        assert_int_equal(read_shape("{" SIZES "}", &s), -ENOTSUP);
        assert_int_equal(read_shape("{" TYPE SIZES ",\"activation\":\"mish\"}", &s), -ENOTSUP);
        assert_sentence("mish");
        assert_int_equal(read_shape("{" TYPE "\"hidden_size\":48}", &s), -EINVAL);
        assert_sentence("num_layers");
        assert_int_equal(read_shape("{" TYPE SIZES ",\"norm_first\":1}", &s), -EINVAL);
        assert_sentence("norm_first");
        assert_int_equal(read_shape("{" TYPE SIZES ",\"layer_norm_eps\":\"x\"}", &s), -EINVAL);
        assert_sentence("layer_norm_eps");
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(order_of_post_and_pre_norm),
            cmocka_unit_test(variations),
            cmocka_unit_test(configs_are_read),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
