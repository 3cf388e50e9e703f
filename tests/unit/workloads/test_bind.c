#include <errno.h>

#include "wl_fixture.h"

#include "clock.h"
#include "device.h"
#include "workload.h"

static struct graph micro(const char *extra, uint32_t batch)
{
        json *config = gpt2_config(extra);
        struct graph g;

        must(gpt2_build(config, batch, 6, 12, DT_F32, &g));
        json_free(config);
        return g;
}

/* Addresses for everything that is not scratch, made from the index, so that operands can be told apart. */
struct bound {
        size_t *offsets, total;
        void **addr;
        struct op_inst *insts;
        int n;
};

#define OUTSIDE ((char *)(1ull << 40))
#define SCRATCH ((char *)(1ull << 30))

static struct bound bind_range(const struct graph *g, uint32_t rows, uint32_t first, uint32_t count, bool fuse)
{
        struct bound b = {.offsets = calloc(g->h->ntensors, sizeof(size_t)),
                          .addr = calloc(g->h->ntensors, sizeof(void *)),
                          .insts = calloc(g->h->nnodes, sizeof(struct op_inst))};

        must(graph_scratch(g, rows, b.offsets, &b.total));
        for (uint32_t t = 0; t < g->h->ntensors; t++)
                b.addr[t] = OUTSIDE + (size_t)t * (1u << 24);
        struct graph_binding bind = {.g = g,
                                     .rows = rows,
                                     .first = first,
                                     .count = count,
                                     .addr = b.addr,
                                     .scratch = SCRATCH,
                                     .offsets = b.offsets,
                                     .fuse = fuse};

        b.n = graph_bind(&bind, b.insts, g->h->nnodes);
        must(b.n);
        return b;
}

static void unbind(struct bound *b)
{
        free(b->offsets);
        free(b->addr);
        free(b->insts);
}

static void instructions_hold_their_contract(void **state)
{
        struct graph g = micro(NULL, 2);

        for (uint32_t rows = 1; rows <= 6; rows++) {
                for (int fuse = 0; fuse < 2; fuse++) {
                        struct bound b = bind_range(&g, rows, 0, g.h->nnodes, fuse);

                        for (int i = 0; i < b.n; i++)
                                must(op_check(&b.insts[i]));
                        unbind(&b);
                }
        }
        graph_free(&g);
}

static bool overlap(const struct op_arg *a, const struct op_arg *b)
{
        return (char *)a->data < (char *)b->data + op_arg_bytes(b) &&
               (char *)b->data < (char *)a->data + op_arg_bytes(a);
}

static void check_no_overlap(const struct op_inst *inst)
{
        const struct op_info *info = &op_infos[inst->code];

        for (int a = 0; a < info->nargs; a++)
                for (int b = 0; b < info->nargs; b++)
                        if (a != b && info->role[a] & OP_OUT && inst->arg[a].data && inst->arg[b].data)
                                assert_false(overlap(&inst->arg[a], &inst->arg[b]));
}

static void nothing_is_written_where_it_is_read(void **state)
{
        static const char *const variants[] = {"", ",\"n_inner\":5", ",\"tie_word_embeddings\":false",
                                               ",\"n_inner\":200"};

        for (size_t v = 0; v < 4; v++) {
                struct graph g = micro(variants[v], 1 + (uint32_t)v % 2);

                for (uint32_t rows = 1; rows <= 6; rows++) {
                        struct bound b = bind_range(&g, rows, 0, g.h->nnodes, true);

                        for (int i = 0; i < b.n; i++)
                                check_no_overlap(&b.insts[i]);
                        unbind(&b);
                }
                graph_free(&g);
        }
}

/* Independent of how offsets are chosen: run the node order with a shadow of who owns every byte. */
static void live_activations_share_no_bytes(void **state)
{
        struct graph g = micro(NULL, 2);

        for (uint32_t rows = 1; rows <= 6; rows += 5) {
                struct bound b = bind_range(&g, rows, 0, g.h->nnodes, false);
                uint16_t *owner = malloc(b.total * sizeof(*owner));

                memset(owner, 0xff, b.total * sizeof(*owner));
                for (uint32_t i = 0; i < g.h->nnodes; i++) {
                        const struct graph_node *n = &g.nodes[i];
                        const struct op_info *info = &op_infos[n->code];

                        for (int a = info->nargs - 1; a >= 0; a--) {
                                unsigned t = n->arg[a];

                                if (t == GRAPH_NONE || b.offsets[t] == SIZE_MAX)
                                        continue;
                                size_t bytes = graph_tensor_bytes(&g, t, rows, NULL);

                                assert_true(b.offsets[t] % 64 == 0 && b.offsets[t] + bytes <= b.total);
                                for (size_t k = 0; k < bytes; k++) {
                                        if (info->role[a] & OP_IN)
                                                assert_int_equal(owner[b.offsets[t] + k], t);
                                        if (info->role[a] & OP_OUT)
                                                owner[b.offsets[t] + k] = (uint16_t)t;
                                }
                        }
                }
                free(owner);
                unbind(&b);
        }
        graph_free(&g);
}

static void scratch_is_shared(void **state)
{
        struct graph g = micro(NULL, 2);
        size_t *offsets = calloc(g.h->ntensors, sizeof(*offsets)), total, sum = 0;

        must(graph_scratch(&g, 6, offsets, &total));
        for (uint32_t t = 0; t < g.h->ntensors; t++) {
                bool activation = g.tensors[t].residency == RES_ACTIVATION;

                assert_int_equal(offsets[t] != SIZE_MAX, activation);
                if (activation)
                        sum += graph_tensor_bytes(&g, t, 6, NULL);
        }
        assert_true(total > 0 && total < sum / 2);
        assert_int_equal(graph_scratch(&g, 0, offsets, &total), -EINVAL);
        assert_int_equal(graph_scratch(&g, 7, offsets, &total), -EINVAL);
        assert_sentence("7 rows, expected 1 to 6");
        free(offsets);
        graph_free(&g);
}

static void former_states_of_a_blind_graph_need_an_address(void **state)
{
        struct graph g = micro(NULL, 1);
        unsigned cache = GRAPH_NONE;
        size_t offsets[256], total, before[256];

        must(graph_scratch(&g, 3, before, &total));
        for (unsigned t = 0; t < g.h->ntensors; t++)
                cache = g.tensors[t].residency == RES_STATE ? t : cache;
        graph_blind(&g);
        must(graph_scratch(&g, 3, offsets, &total));
        assert_int_equal(g.tensors[cache].residency, RES_INPUT);
        assert_int_equal(offsets[cache], SIZE_MAX);
        /* Taking the annotation away changes no offset. */
        assert_memory_equal(offsets, before, g.h->ntensors * sizeof(offsets[0]));
        graph_free(&g);
}

static int count(const struct bound *b, enum op_code code)
{
        int n = 0;

        for (int i = 0; i < b->n; i++)
                n += b->insts[i].code == code;
        return n;
}

static void fuses_linear_act_and_add(void **state)
{
        struct graph g = micro(NULL, 1);
        struct bound plain = bind_range(&g, 2, 0, g.h->nnodes, false), fused = bind_range(&g, 2, 0, g.h->nnodes, true);

        assert_int_equal(plain.n, g.h->nnodes);
        assert_int_equal(count(&plain, OP_ACT), 2);
        assert_int_equal(count(&plain, OP_ADD), 4);
        assert_int_equal(count(&fused, OP_ACT), 0);
        assert_int_equal(count(&fused, OP_ADD), 0);
        assert_int_equal(fused.n, plain.n - 6);
        for (int i = 0, seen = 0; i < fused.n; i++)
                if (fused.insts[i].attr.act == ACT_GELU_TANH && ++seen)
                        assert_int_equal(fused.insts[i].code, OP_LINEAR);
        unbind(&plain);
        unbind(&fused);
        graph_free(&g);
}

static void a_chain_that_the_range_cuts_is_not_fused(void **state)
{
        struct graph g = micro(NULL, 1);

        for (uint32_t i = 0; i < g.h->nnodes; i++) {
                struct bound b = bind_range(&g, 2, i, 1, true);

                assert_int_equal(b.n, 1);
                assert_int_equal(b.insts[0].code, g.nodes[i].code);
                assert_int_equal(b.insts[0].attr.act, g.nodes[i].attr.act);
                unbind(&b);
        }
        graph_free(&g);
}

/* in -> LINEAR -> t -> (ACT ->) u (+ residual), with variations that must not be fused. */
enum twist { FUSABLE, TWO_READERS, OUTPUT_BETWEEN, RESULT_IS_OPERAND, SECOND_ACT, TWIST_COUNT };

static struct graph twisted(enum twist twist)
{
        struct graph_builder *b = gb_new("twist", 1, 4, 0, DT_F32);
        int64_t dims[] = {GRAPH_BATCH_ROWS, 4};
        struct graph_recipe r = {.source = "w", .synth_scale = 1};
        struct op_attr act = {.act = ACT_RELU}, gelu = {.act = ACT_GELU_ERF};
        unsigned in = gb_tensor(b, "in", DT_F32, RES_INPUT, 2, dims), w, x, t, u, out;
        struct graph g;

        w = gb_tensor(b, "w", DT_F32, RES_WEIGHT, 2, (int64_t[]){4, 4});
        gb_recipe(b, w, &r);
        x = gb_tensor(b, "x", DT_F32, RES_ACTIVATION, 2, dims);
        t = gb_tensor(b, "t", DT_F32, twist == OUTPUT_BETWEEN ? RES_OUTPUT : RES_ACTIVATION, 2, dims);
        u = twist == RESULT_IS_OPERAND ? x : gb_tensor(b, "u", DT_F32, RES_ACTIVATION, 2, dims);
        out = gb_tensor(b, "out", DT_F32, RES_OUTPUT, 2, dims);
        gb_segment(b, SEG_BODY, PHASE_FORWARD);
        gb_node(b, OP_COPY, NULL, 2, (unsigned[]){x, in});
        gb_node(b, OP_LINEAR, twist == SECOND_ACT ? &gelu : NULL, 3, (unsigned[]){t, x, w});
        gb_node(b, OP_ACT, &act, 2, (unsigned[]){u, t});
        gb_node(b, OP_ADD, NULL, 3, (unsigned[]){out, u, twist == TWO_READERS ? t : in});
        must(gb_finish(b, &g));
        return g;
}

static void only_safe_chains_are_fused(void **state)
{
        static const int want[TWIST_COUNT] = {
            [FUSABLE] = 2, [TWO_READERS] = 4, [OUTPUT_BETWEEN] = 4, [RESULT_IS_OPERAND] = 4, [SECOND_ACT] = 4};

        for (int twist = 0; twist < TWIST_COUNT; twist++) {
                struct graph g = twisted((enum twist)twist);
                struct bound b = bind_range(&g, 3, 0, 4, true);

                if (b.n != want[twist])
                        fail_msg("twist %d gave %d instructions, expected %d", twist, b.n, want[twist]);
                for (int i = 0; i < b.n; i++)
                        check_no_overlap(&b.insts[i]);
                unbind(&b);
                graph_free(&g);
        }
}

static void emit_knows_the_rows(void **state)
{
        struct graph g = micro(NULL, 1);
        struct bound b = bind_range(&g, 5, 0, g.h->nnodes, true);

        for (int i = 0; i < b.n; i++)
                assert_int_equal(b.insts[i].attr.rows, b.insts[i].code == OP_EMIT ? 5 : 0);
        unbind(&b);
        graph_free(&g);
}

static void bad_bindings_are_refused(void **state)
{
        struct graph g = micro(NULL, 1);
        struct bound b = bind_range(&g, 2, 0, g.h->nnodes, true);
        struct graph_binding bind = {
            .g = &g, .rows = 2, .count = g.h->nnodes, .addr = b.addr, .scratch = SCRATCH, .offsets = b.offsets};

        assert_int_equal(graph_bind(&bind, b.insts, 3), -ENOSPC);
        bind.first = 1;
        assert_int_equal(graph_bind(&bind, b.insts, g.h->nnodes), -EINVAL);
        bind.first = UINT32_MAX;
        assert_int_equal(graph_bind(&bind, b.insts, g.h->nnodes), -EINVAL);
        bind.first = 0;
        bind.rows = 7;
        assert_int_equal(graph_bind(&bind, b.insts, g.h->nnodes), -EINVAL);
        bind.rows = 2;
        b.addr[g.h->role[ROLE_IDS]] = NULL;
        assert_int_equal(graph_bind(&bind, b.insts, g.h->nnodes), -EINVAL);
        assert_sentence("(ids) has no address");
        unbind(&b);
        graph_free(&g);
}

static void cost_is_the_sum_of_the_ops(void **state)
{
        struct graph g = micro(NULL, 2);
        struct bound b = bind_range(&g, 3, 0, g.h->nnodes, false);
        struct graph_cost all, body, last;
        double flop = 0, weights = 0;

        for (int i = 0; i < b.n; i++) {
                flop += op_cost(&b.insts[i], 4).flop;
                weights += op_cost(&b.insts[i], 4).weight_bytes;
        }
        must(graph_cost(&g, 3, 0, g.h->nnodes, 4, &all));
        assert_close(all.flop, flop, 0);
        assert_close(all.weight_bytes, weights, 0);
        assert_int_equal(all.ops, g.h->nnodes);
        const struct graph_segment *s = graph_segment(&g, SEG_BODY), *l = graph_segment(&g, SEG_LAST);

        must(graph_cost(&g, 3, s->first, s->count, 4, &body));
        assert_close(body.head_flop, 0, 0);
        must(graph_cost(&g, 3, l->first, l->count, 4, &last));
        /* Two sequences, 8 wide, 11 words. */
        assert_close(last.head_flop, 2 * 2.0 * 8 * 11, 0);
        assert_close(last.head_weight_bytes, 8 * 11 * 4, 0);
        assert_int_equal(graph_cost(&g, 3, 0, g.h->nnodes + 1, 0, &all), -EINVAL);
        unbind(&b);
        graph_free(&g);
}

/* Runs the whole node order on a device with host memory and returns the logits of all positions. */
static float *run_all(const struct graph *g, struct device *dev, uint32_t rows, bool fuse, size_t *bytes)
{
        const struct weights_source src = {.kind = WEIGHTS_SYNTHETIC, .seed = 5};
        struct bound b = bind_range(g, rows, 0, g->h->nnodes, fuse);
        char *scratch = aligned_alloc(64, b.total);
        struct dev_plan *plan;
        struct dev_event ev;

        for (uint32_t t = 0; t < g->h->ntensors; t++) {
                b.addr[t] = aligned_alloc(64, (graph_tensor_bytes(g, t, rows, NULL) + 63) / 64 * 64);
                memset(b.addr[t], 0, graph_tensor_bytes(g, t, rows, NULL));
                if (g->tensors[t].recipe != GRAPH_NONE)
                        must(weights_make(g, t, &src, b.addr[t]));
        }
        for (uint32_t i = 0; i < g->h->batch * rows; i++)
                ((int32_t *)b.addr[g->h->role[ROLE_IDS]])[i] = (int32_t)(i * 7 % g->h->vocab);
        /* Garbage in the scratch must not matter. */
        memset(scratch, 0xff, b.total);
        struct graph_binding bind = {.g = g,
                                     .rows = rows,
                                     .count = g->h->nnodes,
                                     .addr = b.addr,
                                     .scratch = scratch,
                                     .offsets = b.offsets,
                                     .fuse = fuse};

        b.n = graph_bind(&bind, b.insts, g->h->nnodes);
        must(b.n);
        must(dev_plan_make(dev, b.insts, (size_t)b.n, &plan));
        must(dev_run(plan, &ev));
        must(dev->ops->sync(dev));
        dev_plan_free(plan);
        *bytes = graph_tensor_bytes(g, g->h->role[ROLE_ALL], rows, NULL);
        float *all = b.addr[g->h->role[ROLE_ALL]];

        for (uint32_t t = 0; t < g->h->ntensors; t++)
                if (b.addr[t] != all)
                        free(b.addr[t]);
        free(scratch);
        unbind(&b);
        return all;
}

static void fusion_changes_nothing_but_rounding(void **state)
{
        struct graph g = micro(",\"n_inner\":24", 2);
        struct device *dev;

        must(dev_open("reference", 1, &dev));
        for (uint32_t rows = 1; rows <= 6; rows++) {
                size_t bytes = 0;
                float *plain = run_all(&g, dev, rows, false, &bytes), *fused = run_all(&g, dev, rows, true, &bytes);

                /* What was between two nodes was rounded to float32 before it was fused away. */
                for (size_t i = 0; i < bytes / sizeof(float); i++)
                        assert_close(fused[i], plain[i], 2e-6);
                assert_true(fabsf(plain[0]) > 1e-3f);
                free(plain);
                free(fused);
        }
        dev_close(dev);
        graph_free(&g);
}

/* With plans uncached this is done in every call: it must stay in the tens of microseconds. The bound is wide, because a
 * test may run on a busy machine; the best of many is taken. */
static void binding_is_fast(void **state)
{
        const struct encoder_shape shape = {.batch = 1,
                                            .rows = 128,
                                            .hidden = 768,
                                            .heads = 12,
                                            .layers = 12,
                                            .ff = 3072,
                                            .eps = 1e-5,
                                            .act = ACT_RELU};
        struct graph g;
        uint64_t best = UINT64_MAX;

        must(encoder_build(&shape, DT_F32, &g));
        struct bound b = bind_range(&g, 128, 0, g.h->nnodes, true);
        struct graph_binding bind = {.g = &g,
                                     .rows = 128,
                                     .count = g.h->nnodes,
                                     .addr = b.addr,
                                     .scratch = SCRATCH,
                                     .offsets = b.offsets,
                                     .fuse = true};

        for (int i = 0; i < 200; i++) {
                uint64_t t0 = clock_ns();

                must(graph_scratch(&g, 128, b.offsets, &b.total));
                must(graph_bind(&bind, b.insts, g.h->nnodes));
                uint64_t ns = clock_ns() - t0;

                best = ns < best ? ns : best;
        }
        print_message("scratch and bind of %u nodes: %.1f us\n", g.h->nnodes, (double)best / 1e3);
        assert_true(best < 1000 * NS_PER_US);
        unbind(&b);
        graph_free(&g);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(instructions_hold_their_contract),
            cmocka_unit_test(nothing_is_written_where_it_is_read),
            cmocka_unit_test(live_activations_share_no_bytes),
            cmocka_unit_test(scratch_is_shared),
            cmocka_unit_test(former_states_of_a_blind_graph_need_an_address),
            cmocka_unit_test(fuses_linear_act_and_add),
            cmocka_unit_test(a_chain_that_the_range_cuts_is_not_fused),
            cmocka_unit_test(only_safe_chains_are_fused),
            cmocka_unit_test(emit_knows_the_rows),
            cmocka_unit_test(bad_bindings_are_refused),
            cmocka_unit_test(cost_is_the_sum_of_the_ops),
            cmocka_unit_test(fusion_changes_nothing_but_rounding),
            cmocka_unit_test(binding_is_fast),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
