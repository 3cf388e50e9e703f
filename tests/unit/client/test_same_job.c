/*
 * The reference agrees with the fixture's own, and its comparison notices what it is there for: other logits, NaN, another
 * choice; it lets pass what is rounding.
 */
#include "client_fixture.h"

#include <fcntl.h>

#include "same_job.h"
#include "weights.h"

/* ---- the reference, on the fixture gpt2-micro ---- */

struct fixture {
        struct workload w;
        struct weights_source src;
        struct model_roots *roots;
        struct conf_doc *doc;
        int fd;
};

static void open_fixture(struct fixture *f, const char *model, const char *params)
{
        const char *const roots[] = {FIXTURES};
        struct workload_opts opts = {.dtype = DT_F32, .require_weights = true, .seed = 1};
        struct workload_spec spec;
        char text[512];

        *f = (struct fixture){.fd = -1};
        snprintf(text, sizeof(text), "name: w\nimplementation: hf_causal_lm\nparams: {model_id: %s, %s}\n", model,
                 params);
        must(conf_parse(text, strlen(text), "test", &f->doc));
        must(workload_parse(conf_root(f->doc), &spec));
        must(model_roots_open(roots, 1, &f->roots));
        opts.roots = f->roots;
        must(workload_build(&spec, &opts, &f->w));
        f->fd = model_find(f->roots, model, NULL, 0);
        assert_true(f->fd >= 0);
        f->src = (struct weights_source){.kind = WEIGHTS_CHECKPOINT};
        must(checkpoint_open(f->fd, model, &f->src.checkpoint));
}

static void close_fixture(struct fixture *f)
{
        checkpoint_close(f->src.checkpoint);
        close(f->fd);
        workload_free(&f->w);
        model_roots_close(f->roots);
        conf_free(f->doc);
}

static json *stored_case(json **doc, const char *model)
{
        char path[512], *text;
        FILE *f;
        size_t len;

        snprintf(path, sizeof(path), "%s/%s/reference.json", FIXTURES, model);
        f = fopen(path, "r");
        assert_non_null(f);
        text = malloc(1 << 20);
        len = fread(text, 1, 1 << 20, f);
        fclose(f);
        *doc = json_parse(text, len, path);
        free(text);
        assert_non_null(*doc);
        return (json *)json_first(json_get(*doc, "cases"));
}

/* The stored case's prompt instead of a drawn one: ids as text of the prompt are not needed, the workload's are set. */
static size_t take_prompt(struct fixture *f, const json *c)
{
        size_t n = 0;

        for (const json *i = json_first(json_get(c, "input_ids")); i; i = json_next(i))
                n++;
        f->w.prompt_ids = calloc(n, sizeof *f->w.prompt_ids);
        f->w.prompt_nids = 0;
        for (const json *i = json_first(json_get(c, "input_ids")); i; i = json_next(i))
                f->w.prompt_ids[f->w.prompt_nids++] = (int32_t)json_num(i, -1);
        return n;
}

static void reference_is_the_fixtures(void **state)
{
        static const char *const models[] = {"gpt2-micro", "tiny-gpt2"};

        for (size_t m = 0; m < ARRAY_LEN(models); m++) {
                struct fixture f;
                struct reference ref;
                json *doc, *c = stored_case(&doc, models[m]);
                size_t steps = 0, n = 0;
                char params[128];

                for (const json *i = json_first(json_get(c, "input_ids")); i; i = json_next(i))
                        n++;
                for (const json *i = json_first(json_get(c, "greedy_tokens")); i; i = json_next(i))
                        steps++;
                snprintf(params, sizeof(params), "prompt_length: %zu, new_tokens: %zu", n, steps);
                open_fixture(&f, models[m], params);
                take_prompt(&f, c);
                must(reference_make(&f.w, &f.src, 1, &ref));
                assert_int_equal(ref.steps, steps);
                steps = 0;
                for (const json *i = json_first(json_get(c, "greedy_tokens")); i; i = json_next(i))
                        assert_int_equal(ref.tokens[steps++], (int32_t)json_num(i, -1));
                n = 0;
                for (const json *i = json_first(json_get(c, "last_logits")); i && n < ref.vocab; i = json_next(i), n++)
                        assert_close(ref.logits[n], json_num(i, NAN), 1e-4 * fmax(1, fabs(json_num(i, NAN))));
                assert_true(n > 0);
                reference_free(&ref);
                json_free(doc);
                close_fixture(&f);
        }
}

/* tiny-gpt2, of width 2, chooses the same token whatever came before; gpt2-micro does not. */
static void sensitivity_is_the_models(void **state)
{
        struct fixture f;
        struct reference ref;

        open_fixture(&f, "gpt2-micro", "prompt_length: 32, new_tokens: 16");
        must(reference_make(&f.w, &f.src, 1, &ref));
        assert_true(ref.token_sensitive);
        assert_true(ref.state_sensitive);
        reference_free(&ref);
        close_fixture(&f);
        open_fixture(&f, "tiny-gpt2", "prompt_length: 32, new_tokens: 16");
        must(reference_make(&f.w, &f.src, 1, &ref));
        assert_false(ref.token_sensitive && ref.state_sensitive);
        reference_free(&ref);
        close_fixture(&f);
}

/* Turn by turn with state must be what one pass over the whole history is: tokens of a later turn follow all before. */
static void turns_continue_one_conversation(void **state)
{
        struct fixture f;
        struct reference ref, whole;
        struct conversation c;
        char params[128];
        size_t per_turn;

        open_fixture(&f, "gpt2-micro", "prompt_length: 20, new_tokens: 5, turns: 3, turn_tokens: 6");
        must(reference_make(&f.w, &f.src, 9, &ref));
        per_turn = (size_t)ref.steps * ref.batch;
        must(conversation_new(&f.w, &c));
        must(conversation_start(&c, &f.w, 9, 0));
        conversation_turn(&c, &f.w, 9, 0, 1, ref.tokens);
        conversation_turn(&c, &f.w, 9, 0, 2, ref.tokens + per_turn);
        assert_int_equal(workload_shape(&f.w, 2, true, false).history, 20 + 2 * 11);
        assert_int_equal(workload_shape(&f.w, 2, true, false).cached, 20 + 11 + 4);
        assert_int_equal(workload_shape(&f.w, 2, false, false).cached, 0);
        snprintf(params, sizeof(params), "prompt_length: %u, new_tokens: 5", 20 + 2 * 11);

        struct fixture one;

        open_fixture(&one, "gpt2-micro", params);
        one.w.prompt_nids = 20 + 2 * 11;
        one.w.prompt_ids = calloc(one.w.prompt_nids, sizeof *one.w.prompt_ids);
        memcpy(one.w.prompt_ids, c.ids, one.w.prompt_nids * sizeof *c.ids);
        must(reference_make(&one.w, &one.src, 9, &whole));
        assert_memory_equal(whole.tokens, ref.tokens + 2 * per_turn, per_turn * sizeof *ref.tokens);
        reference_free(&whole);
        close_fixture(&one);
        conversation_free(&c);
        reference_free(&ref);
        close_fixture(&f);
}

static void batches_are_separate_sequences(void **state)
{
        struct fixture f;
        struct reference ref;
        struct conversation c;

        open_fixture(&f, "gpt2-micro", "prompt_length: 16, new_tokens: 4, batch_size: 2");
        must(reference_make(&f.w, &f.src, 5, &ref));
        assert_int_equal(ref.batch, 2);
        must(conversation_new(&f.w, &c));
        must(conversation_start(&c, &f.w, 5, 0));
        assert_true(memcmp(c.ids, c.ids + c.cap, 16 * sizeof *c.ids) != 0);
        for (uint32_t b = 0; b < 2; b++) {
                struct fixture one;
                struct reference alone;

                open_fixture(&one, "gpt2-micro", "prompt_length: 16, new_tokens: 4");
                one.w.prompt_nids = 16;
                one.w.prompt_ids = calloc(16, sizeof *one.w.prompt_ids);
                memcpy(one.w.prompt_ids, c.ids + (size_t)b * c.cap, 16 * sizeof *c.ids);
                must(reference_make(&one.w, &one.src, 5, &alone));
                for (uint32_t i = 0; i < 4; i++)
                        assert_int_equal(alone.tokens[i], ref.tokens[i * 2 + b]);
                reference_free(&alone);
                close_fixture(&one);
        }
        conversation_free(&c);
        reference_free(&ref);
        close_fixture(&f);
}

/* What each sequence was answered goes behind that sequence: tokens come as [steps][batch]. */
static void answers_go_to_their_sequence(void **state)
{
        static const int32_t answers[3][2] = {{1, 101}, {2, 102}, {3, 103}};
        struct conversation c;
        struct fixture f;

        open_fixture(&f, "gpt2-micro", "prompt_length: 16, new_tokens: 3, batch_size: 2, turns: 2, turn_tokens: 4");
        must(conversation_new(&f.w, &c));
        assert_int_equal(c.cap, 16 + 3 + 4 + 3);
        must(conversation_start(&c, &f.w, 5, 0));
        conversation_turn(&c, &f.w, 5, 0, 1, &answers[0][0]);
        for (int b = 0; b < 2; b++)
                for (int i = 0; i < 3; i++)
                        assert_int_equal(c.ids[(size_t)b * c.cap + 16 + (size_t)i], answers[i][b]);
        conversation_free(&c);
        close_fixture(&f);
}

/* Inputs of a block are the same whoever asks, and others in the next block. */
static void inputs_differ_from_block_to_block(void **state)
{
        struct conversation a, b;
        struct fixture f;

        open_fixture(&f, "gpt2-micro", "prompt_length: 16, new_tokens: 4");
        must(conversation_new(&f.w, &a));
        must(conversation_new(&f.w, &b));
        must(conversation_start(&a, &f.w, 5, 3));
        must(conversation_start(&b, &f.w, 5, 3));
        assert_memory_equal(a.ids, b.ids, 16 * sizeof *a.ids);
        must(conversation_start(&b, &f.w, 5, 4));
        assert_true(memcmp(a.ids, b.ids, 16 * sizeof *a.ids) != 0);
        must(conversation_start(&b, &f.w, 6, 3));
        assert_true(memcmp(a.ids, b.ids, 16 * sizeof *a.ids) != 0);
        conversation_free(&a);
        conversation_free(&b);
        close_fixture(&f);
}

/* ---- comparing, on logits made by hand ---- */

#define V     16
#define STEPS 3

static float want[2][STEPS][V], got[STEPS][V];
static struct reference hand = {.turns = 2, .steps = STEPS, .batch = 1, .vocab = V, .logits = &want[0][0][0]};

static int make_logits(void **state)
{
        for (int t = 0; t < 2; t++)
                for (int s = 0; s < STEPS; s++)
                        for (int i = 0; i < V; i++)
                                want[t][s][i] = (float)((i * 3 + s + t) % V);
        memcpy(got, want[0], sizeof(got));
        return 0;
}

static struct check_result compare(uint32_t turn, double tolerance)
{
        struct check_result c = {0};

        check_logits(&hand, turn, &got[0][0], tolerance, &c);
        return c;
}

static void equal_logits_pass(void **state)
{
        struct check_result c = compare(0, 1e-4);

        assert_true(c.done && c.passed && c.argmax_equal);
        assert_close(c.max_rel_l2, 0, 0);
        assert_close(c.tolerance, 1e-4, 0);
        assert_int_equal(c.near_tie, -1);
        memcpy(got, want[1], sizeof(got));
        assert_true(compare(1, 1e-4).passed);
        assert_false(compare(0, 1e-4).passed);
}

static void altered_logits_fail(void **state)
{
        struct check_result c;

        got[1][2] += 0.1f;
        c = compare(0, 1e-4);
        assert_false(c.passed);
        assert_true(c.argmax_equal);
        assert_true(c.max_rel_l2 > 1e-4);
        assert_non_null(strstr(c.why, "step 1 differs from the reference"));
        assert_true(compare(0, 0.05).passed);
}

static void rounding_passes(void **state)
{
        for (int s = 0; s < STEPS; s++)
                for (int i = 0; i < V; i++)
                        got[s][i] *= 1.0f + 1e-6f * (float)(i - 4);
        struct check_result c = compare(0, 1e-4);

        assert_true(c.passed && c.max_rel_l2 > 0 && c.max_rel_l2 < 1e-5);
}

static void nan_and_infinity_fail(void **state)
{
        static const float poison[] = {NAN, INFINITY, -INFINITY};

        for (size_t p = 0; p < ARRAY_LEN(poison); p++)
                for (int s = 0; s < STEPS; s++) {
                        make_logits(NULL);
                        got[s][0] = poison[p];
                        assert_false(compare(0, 1e-1).passed);
                }
        for (int i = 0; i < V; i++)
                got[0][i] = NAN;
        assert_false(compare(0, 1e-1).passed);
        memset(got, 0, sizeof(got));
        assert_false(compare(0, 1e-1).passed);
}

/* The largest changes place although the error is small: only possible where the reference itself is near a tie. */
static void a_flip_is_told_from_a_near_tie(void **state)
{
        struct check_result c;

        for (int i = 0; i < V; i++)
                want[0][1][i] = got[1][i] = i == 3 ? 101.0f : 100.0f;
        got[1][3] = 100;
        got[1][5] = 101;
        c = compare(0, 1e-2); /* margin 1 is below 4 tolerances of 101 */
        assert_true(c.passed);
        assert_true(c.argmax_equal);
        assert_int_equal(c.near_tie, 1);
        c = compare(0, 2e-3); /* margin 1 is above 4 tolerances, the error 1.4 / 400 too */
        assert_false(c.passed);
        c = (struct check_result){0};
        want[0][1][3] = 102; /* a flip that the error alone would let pass */
        got[1][3] = 100.95f;
        got[1][5] = 101.05f;
        check_logits(&hand, 0, &got[0][0], 4e-3, &c);
        assert_true(c.max_rel_l2 < 4e-3);
        assert_false(c.argmax_equal);
        assert_false(c.passed);
}

static void the_first_near_tie_is_kept(void **state)
{
        want[0][2][0] = got[2][0] = 20;
        want[0][2][7] = got[2][7] = 20;
        struct check_result c = compare(0, 1e-4);

        assert_true(c.passed);
        assert_int_equal(c.near_tie, 2);
}

static void turns_accumulate(void **state)
{
        struct check_result c = {0};

        got[0][0] += 1;
        check_logits(&hand, 0, &got[0][0], 1e-4, &c);
        assert_false(c.passed);
        make_logits(NULL);
        memcpy(got, want[1], sizeof(got));
        check_logits(&hand, 1, &got[0][0], 1e-4, &c);
        assert_false(c.passed);
        assert_non_null(strstr(c.why, "step 0"));
}

/* ---- feed-forward outputs ---- */

static void outputs_are_compared_in_their_dtype(void **state)
{
        static const enum op_dtype dtypes[] = {DT_F32, DT_F16, DT_BF16};
        const struct encoder_shape shape = {
            .batch = 1, .rows = 4, .hidden = 8, .heads = 2, .layers = 1, .ff = 16, .eps = 1e-5, .act = ACT_RELU};

        for (size_t i = 0; i < ARRAY_LEN(dtypes); i++) {
                size_t bytes = 32 * op_dtype_bytes(dtypes[i]);
                uint8_t ref_out[128], out[128];
                struct reference ref = {.output_len = bytes, .output_bytes = ref_out};
                struct workload w = {.driver = DRIVE_FORWARD};
                struct check_result c = {0};

                must(encoder_build(&shape, dtypes[i], &w.graph));
                for (size_t k = 0; k < 32; k++) {
                        float v = (float)k / 16 - 1;
                        uint16_t h = dtypes[i] == DT_F16 ? op_f32_to_f16(v) : op_f32_to_bf16(v);

                        memcpy(ref_out + k * op_dtype_bytes(dtypes[i]), dtypes[i] == DT_F32 ? (void *)&v : (void *)&h,
                               op_dtype_bytes(dtypes[i]));
                }
                memcpy(out, ref_out, bytes);
                check_output(&ref, &w, out, bytes, check_tolerance(dtypes[i]), &c);
                assert_true(c.done && c.passed && c.max_rel_l2 == 0);
                out[bytes - 1] ^= 0x40; /* an exponent bit of the last element */
                c = (struct check_result){0};
                check_output(&ref, &w, out, bytes, check_tolerance(dtypes[i]), &c);
                assert_false(c.passed);
                c = (struct check_result){0};
                check_output(&ref, &w, ref_out, bytes - 2, check_tolerance(dtypes[i]), &c);
                assert_false(c.passed);
                graph_free(&w.graph);
        }
}

static void echoed_bytes_must_be_equal(void **state)
{
        uint8_t ref_out[64], out[64];
        struct reference ref = {.output_len = 64, .output_bytes = ref_out};
        struct workload w = {.driver = DRIVE_FORWARD};
        struct check_result c = {0};

        must(echo_build(64, &w.graph));
        memset(ref_out, 3, 64);
        memset(out, 3, 64);
        check_output(&ref, &w, out, 64, 1e-4, &c);
        assert_true(c.passed);
        out[63]++;
        check_output(&ref, &w, out, 64, 1e-4, &c);
        assert_false(c.passed);
        graph_free(&w.graph);
}

static void tolerances_are_the_stated_ones(void **state)
{
        assert_close(check_tolerance(DT_F32), 1e-4, 0);
        assert_true(check_tolerance(DT_F32) < check_tolerance(DT_F16));
        assert_true(check_tolerance(DT_F16) < check_tolerance(DT_BF16));
        assert_true(check_tolerance(DT_BF16) <= 0.1);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(reference_is_the_fixtures),
            cmocka_unit_test(sensitivity_is_the_models),
            cmocka_unit_test(turns_continue_one_conversation),
            cmocka_unit_test(batches_are_separate_sequences),
            cmocka_unit_test(answers_go_to_their_sequence),
            cmocka_unit_test(inputs_differ_from_block_to_block),
            cmocka_unit_test_setup(equal_logits_pass, make_logits),
            cmocka_unit_test_setup(altered_logits_fail, make_logits),
            cmocka_unit_test_setup(rounding_passes, make_logits),
            cmocka_unit_test_setup(nan_and_infinity_fail, make_logits),
            cmocka_unit_test_setup(a_flip_is_told_from_a_near_tie, make_logits),
            cmocka_unit_test_setup(the_first_near_tie_is_kept, make_logits),
            cmocka_unit_test_setup(turns_accumulate, make_logits),
            cmocka_unit_test(outputs_are_compared_in_their_dtype),
            cmocka_unit_test(echoed_bytes_must_be_equal),
            cmocka_unit_test(tolerances_are_the_stated_ones),
        };

        return cmocka_run_group_tests_name("same_job", tests, NULL, NULL);
}
