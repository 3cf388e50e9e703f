#include <errno.h>

#include "wl_fixture.h"

#include "digest.h"
#include "workload.h"

static struct graph micro(void)
{
        json *config = gpt2_config(NULL);
        struct graph g;

        must(gpt2_build(config, 2, 6, 12, DT_F32, &g));
        json_free(config);
        return g;
}

static void comes_back_from_the_wire(void **state)
{
        struct graph g = micro(), back, copy;

        must(graph_from_wire(g.h, g.h->total_bytes, &back));
        assert_memory_equal(back.h, g.h, g.h->total_bytes);
        must(graph_clone(&back, &copy));
        assert_true(digest_equal(digest_of(copy.h, copy.h->total_bytes), digest_of(g.h, g.h->total_bytes)));
        assert_ptr_not_equal(copy.h, back.h);
        assert_int_equal((char *)copy.segments - (char *)copy.h, (char *)g.segments - (char *)g.h);
        graph_free(&copy);
        graph_free(&back);
        graph_free(&g);
        graph_free(&g);
}

static void same_model_gives_the_same_bytes(void **state)
{
        struct graph a = micro(), b = micro();

        assert_int_equal(a.h->total_bytes, b.h->total_bytes);
        assert_memory_equal(a.h, b.h, a.h->total_bytes);
        graph_free(&a);
        graph_free(&b);
}

static void sizes_follow_rows(void **state)
{
        struct graph g = micro();
        int64_t dims[OP_DIMS_MAX];

        assert_int_equal(graph_tensor_bytes(&g, g.h->role[ROLE_IDS], 5, dims), 2 * 5 * 4);
        assert_int_equal(dims[0], 10);
        assert_int_equal(dims[1], 0);
        assert_int_equal(graph_tensor_bytes(&g, g.h->role[ROLE_ALL], 3, dims), 2 * 3 * 11 * 4);
        assert_int_equal(graph_tensor_bytes(&g, g.h->role[ROLE_TOKENS], 1, NULL), 12 * 2 * 4);
        graph_free(&g);
}

static void blind_has_only_constants_inputs_outputs_and_activations(void **state)
{
        struct graph g = micro(), back;

        graph_blind(&g);
        for (uint32_t i = 0; i < g.h->ntensors; i++) {
                uint8_t r = g.tensors[i].residency;

                assert_true(r == RES_CONSTANT || r == RES_INPUT || r == RES_OUTPUT || r == RES_ACTIVATION);
                assert_true(g.tensors[i].ndim != 3 || r == RES_INPUT); /* caches */
                assert_int_equal(g.tensors[i].seq_axis, -1);
        }
        for (uint32_t i = 0; i < g.h->nnodes; i++)
                assert_int_equal(g.nodes[i].phase, 0);
        must(graph_from_wire(g.h, g.h->total_bytes, &back));
        graph_free(&back);
        graph_free(&g);
}

/* ---- what is refused ---- */

static unsigned node_of(const struct graph *g, enum op_code code)
{
        for (unsigned i = 0; i < g->h->nnodes; i++)
                if (g->nodes[i].code == code)
                        return i;
        fail_msg("no such node");
        return 0;
}

static unsigned weight_of(const struct graph *g)
{
        return g->nodes[node_of(g, OP_LINEAR)].arg[2];
}

#define BREAK(name, ...)                  \
        static void name(struct graph *g) \
        {                                 \
                __VA_ARGS__;              \
        }

BREAK(bad_magic, g->h->magic++)
BREAK(bad_total, g->h->total_bytes -= 4)
BREAK(many_tensors, g->h->ntensors = GRAPH_TENSORS_MAX + 1)
BREAK(huge_tensors, g->h->ntensors = UINT32_MAX)
BREAK(no_nodes, g->h->nnodes = 0)
BREAK(count_off_by_one, g->h->nrecipes--)
BREAK(no_batch, g->h->batch = 0)
BREAK(much_batch, g->h->batch = UINT32_MAX)
BREAK(no_rows, g->h->rows_max = 0)
BREAK(bad_blind, g->h->blind = 2)
BREAK(bad_graph_dtype, g->h->dtype = DT_COUNT)
BREAK(open_name, memset(g->h->name, 'x', sizeof(g->h->name)))
BREAK(bell_name, strcpy(g->h->name, "a\ab"))
BREAK(dirty_name, g->h->name[GRAPH_NAME_MAX - 1] = 'x')
BREAK(open_prefix, memset(g->h->prefix, 'x', sizeof(g->h->prefix)))
BREAK(bad_role, g->h->role[ROLE_IDS] = (uint16_t)g->h->ntensors)
BREAK(header_reserved, g->h->reserved[3] = 1)
BREAK(open_tensor_name, memset(g->tensors[3].name, 'x', GRAPH_NAME_MAX))
BREAK(empty_tensor_name, memset(g->tensors[3].name, 0, GRAPH_NAME_MAX))
BREAK(bad_dtype, g->tensors[3].dtype = DT_COUNT)
BREAK(no_dims, g->tensors[3].ndim = 0)
BREAK(five_dims, g->tensors[3].ndim = 5)
BREAK(bad_residency, g->tensors[3].residency = RES_COUNT)
BREAK(tensor_reserved, g->tensors[3].reserved = 1)
BREAK(zero_dim, g->tensors[weight_of(g)].dims[0] = 0)
BREAK(negative_dim, g->tensors[weight_of(g)].dims[1] = -3)
BREAK(huge_dim, g->tensors[weight_of(g)].dims[0] = INT64_MAX)
BREAK(overflowing_dims, g->tensors[weight_of(g)].dims[0] = g->tensors[weight_of(g)].dims[1] = INT64_C(1) << 39)
BREAK(dim_behind_last, g->tensors[weight_of(g)].dims[3] = 1)
BREAK(rows_in_a_weight, g->tensors[weight_of(g)].dims[0] = GRAPH_ROWS)
BREAK(rows_second, g->tensors[g->h->role[ROLE_ALL]].dims[1] = GRAPH_BATCH_ROWS)
BREAK(axis_of_an_activation, g->tensors[g->nodes[0].arg[0]].seq_axis = 0)
BREAK(axis_too_far, g->tensors[g->nodes[node_of(g, OP_KV_APPEND)].arg[0]].seq_axis = 3)
BREAK(recipe_missing, g->tensors[weight_of(g)].recipe = GRAPH_NONE)
BREAK(recipe_too_far, g->tensors[weight_of(g)].recipe = (uint16_t)g->h->nrecipes)
BREAK(recipe_of_an_input, g->tensors[g->h->role[ROLE_IDS]].recipe = 0)
BREAK(source_open, memset(g->recipes[1].source, 'x', sizeof(g->recipes[1].source)))
BREAK(recipe_loop, g->recipes[1].next = 1)
BREAK(recipe_back, g->recipes[1].next = 0)
BREAK(recipe_next_too_far, g->recipes[1].next = (uint16_t)g->h->nrecipes)
BREAK(recipe_fold, g->recipes[1].fold = 1)
BREAK(recipe_axis, g->recipes[1].axis = 2)
BREAK(recipe_nan, g->recipes[1].synth_scale = NAN)
BREAK(recipe_inf, g->recipes[1].synth_bias = INFINITY)
BREAK(segment_kind, g->segments[0].kind = SEG_KINDS)
BREAK(segment_twice, g->segments[1].kind = g->segments[0].kind)
BREAK(segment_empty, g->segments[0].count = 0)
BREAK(segment_long, g->segments[3].count = UINT32_MAX)
BREAK(segment_far, g->segments[3].first = UINT32_MAX)
BREAK(segment_overlap, g->segments[1].first--; g->segments[1].count++)
BREAK(segment_reserved, g->segments[1].reserved[5] = 1)
BREAK(segment_phase, g->segments[1].phase = 8)
BREAK(bad_code, g->nodes[0].code = OP_COUNT)
BREAK(bad_phase, g->nodes[0].phase = 8)
BREAK(node_reserved, g->nodes[0].reserved0 = 1)
BREAK(attr_reserved, g->nodes[0].attr.reserved[1] = 1)
BREAK(attr_rows, g->nodes[node_of(g, OP_EMIT)].attr.rows = 5)
BREAK(arg_too_far, g->nodes[0].arg[1] = (uint16_t)g->h->ntensors)
BREAK(arg_too_many, g->nodes[0].arg[5] = 0)
BREAK(arg_missing, g->nodes[0].arg[1] = GRAPH_NONE)
BREAK(read_before_written, g->nodes[1].arg[1] = g->nodes[4].arg[0])
BREAK(output_read_first, g->nodes[node_of(g, OP_ARGMAX)].arg[1] = g->h->role[ROLE_ALL])
BREAK(weight_written, g->nodes[0].arg[0] = g->nodes[0].arg[2])
BREAK(activation_stepped, g->tensors[g->nodes[node_of(g, OP_KV_APPEND)].arg[0]].residency = RES_ACTIVATION;
      g->tensors[g->nodes[node_of(g, OP_KV_APPEND)].arg[0]].seq_axis = -1)
BREAK(weight_stepped, g->tensors[g->nodes[node_of(g, OP_KV_APPEND)].arg[0]].residency = RES_CONSTANT;
      g->tensors[g->nodes[node_of(g, OP_KV_APPEND)].arg[0]].seq_axis = -1)
BREAK(in_place, g->nodes[node_of(g, OP_ACT)].arg[0] = g->nodes[node_of(g, OP_ACT)].arg[1])
BREAK(wrong_shape, g->tensors[weight_of(g)].dims[1]++)
BREAK(wrong_dtype, g->tensors[weight_of(g)].dtype = DT_F16)
BREAK(wrong_heads, g->nodes[node_of(g, OP_ATTENTION)].attr.heads = 3)
BREAK(huge_heads, g->nodes[node_of(g, OP_ATTENTION)].attr.heads = INT32_MAX)
BREAK(no_attr_batch, g->nodes[node_of(g, OP_ATTENTION)].attr.batch = 0)
BREAK(nan_eps, g->nodes[node_of(g, OP_LAYERNORM)].attr.eps = NAN)
BREAK(bad_act, g->nodes[node_of(g, OP_ACT)].attr.act = ACT_COUNT)
BREAK(fits_one_row_only, g->tensors[g->nodes[0].arg[0]].dims[0] = 2)
BREAK(blind_with_weights, g->h->blind = 1)

static const struct {
        const char *what;
        void (*apply)(struct graph *g);
        const char *sentence;
} breaks[] = {
    {"bad_magic", bad_magic, "the magic number"},
    {"bad_total", bad_total, "the header says"},
    {"many_tensors", many_tensors, "the number of tensors"},
    {"huge_tensors", huge_tensors, "the number of tensors"},
    {"no_nodes", no_nodes, "the number of nodes"},
    {"count_off_by_one", count_off_by_one, "its counts need"},
    {"no_batch", no_batch, "batch is 0"},
    {"much_batch", much_batch, "batch is"},
    {"no_rows", no_rows, "rows_max is 0"},
    {"bad_blind", bad_blind, "blind is 2"},
    {"bad_graph_dtype", bad_graph_dtype, "the dtype"},
    {"open_name", open_name, "name or prefix"},
    {"bell_name", bell_name, "name or prefix"},
    {"dirty_name", dirty_name, "name or prefix"},
    {"open_prefix", open_prefix, "name or prefix"},
    {"bad_role", bad_role, "role 0 names tensor"},
    {"header_reserved", header_reserved, "reserved"},
    {"open_tensor_name", open_tensor_name, "the name of tensor 3"},
    {"empty_tensor_name", empty_tensor_name, "the name of tensor 3"},
    {"bad_dtype", bad_dtype, "unknown dtype"},
    {"no_dims", no_dims, "1 to 4 dimensions"},
    {"five_dims", five_dims, "1 to 4 dimensions"},
    {"bad_residency", bad_residency, "unknown residency"},
    {"tensor_reserved", tensor_reserved, "reserved"},
    {"zero_dim", zero_dim, "a dimension below 1"},
    {"negative_dim", negative_dim, "a dimension below 1"},
    {"huge_dim", huge_dim, "a dimension below 1 or above"},
    {"overflowing_dims", overflowing_dims, "larger than 2^46"},
    {"dim_behind_last", dim_behind_last, "behind its last"},
    {"rows_in_a_weight", rows_in_a_weight, "symbolic"},
    {"rows_second", rows_second, "symbolic"},
    {"axis_of_an_activation", axis_of_an_activation, "sequence axis"},
    {"axis_too_far", axis_too_far, "sequence axis"},
    {"recipe_missing", recipe_missing, "without a recipe"},
    {"recipe_too_far", recipe_too_far, "a recipe that it cannot have"},
    {"recipe_of_an_input", recipe_of_an_input, "a recipe that it cannot have"},
    {"source_open", source_open, "the source of recipe 1"},
    {"recipe_loop", recipe_loop, "does not follow it"},
    {"recipe_back", recipe_back, "does not follow it"},
    {"recipe_next_too_far", recipe_next_too_far, "does not follow it"},
    {"recipe_fold", recipe_fold, "out of its range"},
    {"recipe_axis", recipe_axis, "out of its range"},
    {"recipe_nan", recipe_nan, "out of its range"},
    {"recipe_inf", recipe_inf, "out of its range"},
    {"segment_kind", segment_kind, "unknown kind"},
    {"segment_twice", segment_twice, "unknown kind or one that was there"},
    {"segment_empty", segment_empty, "is empty"},
    {"segment_long", segment_long, "beyond the"},
    {"segment_far", segment_far, "beyond the"},
    {"segment_overlap", segment_overlap, "out of order"},
    {"segment_reserved", segment_reserved, "reserved"},
    {"segment_phase", segment_phase, "phase"},
    {"bad_code", bad_code, "unknown op code"},
    {"bad_phase", bad_phase, "phase"},
    {"node_reserved", node_reserved, "reserved"},
    {"attr_reserved", attr_reserved, "reserved"},
    {"attr_rows", attr_rows, "reserved fields"},
    {"arg_too_far", arg_too_far, "operand that is not there"},
    {"arg_too_many", arg_too_many, "operand that is not there"},
    {"arg_missing", arg_missing, "'ids' is missing"},
    {"read_before_written", read_before_written, "no node before it writes"},
    {"output_read_first", output_read_first, "no node before it writes"},
    {"weight_written", weight_written, "another operand of it too"},
    {"activation_stepped", activation_stepped, "steps a tensor that no node before it writes"},
    {"weight_stepped", weight_stepped, "writes a weight or a constant"},
    {"in_place", in_place, "another operand of it too"},
    {"wrong_shape", wrong_shape, "in node"},
    {"wrong_dtype", wrong_dtype, "in node"},
    {"wrong_heads", wrong_heads, "in node"},
    {"huge_heads", huge_heads, "in node"},
    {"no_attr_batch", no_attr_batch, "batch is 0"},
    {"nan_eps", nan_eps, "eps"},
    {"bad_act", bad_act, "unknown activation"},
    {"fits_one_row_only", fits_one_row_only, "with 6 rows"},
    {"blind_with_weights", blind_with_weights, "a blind graph does not have"},
};

static void every_lie_is_refused(void **state)
{
        for (size_t i = 0; i < sizeof(breaks) / sizeof(breaks[0]); i++) {
                struct graph g = micro(), back;
                size_t len = g.h->total_bytes;

                breaks[i].apply(&g);
                err_clear();
                if (graph_from_wire(g.h, len, &back) != -EINVAL)
                        fail_msg("%s was accepted", breaks[i].what);
                assert_null(back.h);
                if (!strstr(err_text(), breaks[i].sentence))
                        fail_msg("%s: expected \"%s\" in: %s", breaks[i].what, breaks[i].sentence, err_text());
                graph_free(&g);
        }
}

static void lengths_are_checked_first(void **state)
{
        struct graph g = micro(), back;

        for (size_t len = 0; len < g.h->total_bytes; len += len < 400 ? 1 : 97)
                assert_int_equal(graph_from_wire(g.h, len, &back), -EINVAL);
        assert_int_equal(graph_from_wire(g.h, (size_t)GRAPH_BYTES_MAX + 1, &back), -EINVAL);
        graph_free(&g);
}

/* Random damage never crashes, and what is accepted can be bound, costed and blinded. */
static void random_damage_never_crashes(void **state)
{
        struct graph g = micro();
        size_t len = g.h->total_bytes, accepted = 0;
        struct op_inst *insts = calloc(g.h->nnodes, sizeof(*insts));
        struct prng p;

        prng_seed(&p, 7);
        for (int round = 0; round < 20000; round++) {
                unsigned char *b = malloc(len);
                struct graph back;
                size_t offsets[256], total;
                void *addr[256];

                memcpy(b, g.h, len);
                size_t cut = mutate(&p, b, len);

                if (graph_from_wire(b, cut, &back) == 0) {
                        struct graph_cost cost;
                        static char memory;

                        accepted++;
                        for (size_t i = 0; i < 256; i++)
                                addr[i] = &memory;
                        must(graph_scratch(&back, back.h->rows_max, offsets, &total));
                        struct graph_binding bind = {.g = &back,
                                                     .rows = back.h->rows_max,
                                                     .count = back.h->nnodes,
                                                     .addr = addr,
                                                     .scratch = &memory,
                                                     .offsets = offsets,
                                                     .fuse = true};

                        must(graph_bind(&bind, insts, g.h->nnodes));
                        if (back.h->rows_max < 1000)
                                must(graph_cost(&back, back.h->rows_max, 0, back.h->nnodes, 3, &cost));
                        graph_blind(&back);
                        graph_free(&back);
                }
                free(b);
        }
        assert_true(accepted > 0);
        free(insts);
        graph_free(&g);
}

/* ---- building ---- */

static void builder_errors_are_sticky(void **state)
{
        char longname[GRAPH_NAME_MAX + 1];
        struct graph_builder *b = gb_new("x", 1, 1, 0, DT_F32);
        struct graph g;

        memset(longname, 'n', sizeof(longname) - 1);
        longname[sizeof(longname) - 1] = 0;
        gb_tensor(b, longname, DT_F32, RES_INPUT, 1, (int64_t[]){1});
        err_set(-EIO, "something else");
        gb_role(b, ROLE_INPUT, 77);
        assert_int_equal(gb_finish(b, &g), -EINVAL);
        assert_sentence("too long");
        assert_null(g.h);

        b = gb_new("x", 1, 1, 0, DT_F32);
        gb_role(b, ROLE_INPUT, 0);
        assert_int_equal(gb_finish(b, &g), -EINVAL);
        assert_sentence("not there");

        assert_int_equal(gb_finish(gb_new("empty", 1, 1, 0, DT_F32), &g), -EINVAL);
        assert_sentence("the number of tensors");
        assert_int_equal(gb_finish(NULL, &g), -ENOMEM);
}

static void segments_and_pieces_chain(void **state)
{
        struct graph_builder *b = gb_new("x", 1, 1, 0, DT_F32);
        struct graph_recipe piece = {.source = "a", .slice_len = 2};
        unsigned in = gb_tensor(b, "in", DT_F32, RES_INPUT, 2, (int64_t[]){1, 3});
        unsigned w = gb_tensor(b, "w", DT_F32, RES_WEIGHT, 2, (int64_t[]){4, 3});
        unsigned out = gb_tensor(b, "out", DT_F32, RES_OUTPUT, 2, (int64_t[]){1, 4});
        struct graph g;

        gb_recipe(b, w, &piece);
        strcpy(piece.source, "b");
        gb_recipe(b, w, &piece);
        gb_segment(b, SEG_BODY, PHASE_FORWARD);
        gb_node(b, OP_LINEAR, NULL, 3, (unsigned[]){out, in, w});
        must(gb_finish(b, &g));
        assert_string_equal(g.recipes[g.tensors[w].recipe].source, "a");
        assert_string_equal(g.recipes[g.recipes[g.tensors[w].recipe].next].source, "b");
        assert_int_equal(g.segments[0].count, 1);
        assert_int_equal(g.nodes[0].attr.batch, 1);
        assert_int_equal(g.nodes[0].phase, PHASE_FORWARD);
        assert_ptr_equal(graph_segment(&g, SEG_BODY), g.segments);
        assert_null(graph_segment(&g, SEG_ALL));
        graph_free(&g);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(comes_back_from_the_wire),
            cmocka_unit_test(same_model_gives_the_same_bytes),
            cmocka_unit_test(sizes_follow_rows),
            cmocka_unit_test(blind_has_only_constants_inputs_outputs_and_activations),
            cmocka_unit_test(every_lie_is_refused),
            cmocka_unit_test(lengths_are_checked_first),
            cmocka_unit_test(random_damage_never_crashes),
            cmocka_unit_test(builder_errors_are_sticky),
            cmocka_unit_test(segments_and_pieces_chain),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
