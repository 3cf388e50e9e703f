#include <errno.h>

#include "wl_fixture.h"

#include "log.h"
#include "workload.h"

#ifndef FIXTURES
#error "FIXTURES names tests/fixtures"
#endif

static struct conf_doc *doc;
static struct model_roots *roots;

static int set_up(void **state)
{
        unsetenv("DJINN_MODEL_PATH");
        unsetenv("HF_HUB_CACHE");
        unsetenv("HF_HOME");
        unsetenv("XDG_CACHE_HOME");
        setenv("HOME", "/nonexistent", 1);
        log_set_level(LOG_ERROR);
        must(model_roots_open((const char *[]){FIXTURES}, 1, &roots));
        return 0;
}

static int tear_down(void **state)
{
        model_roots_close(roots);
        conf_free(doc);
        doc = NULL;
        return 0;
}

static int build(const char *yaml, bool require, struct workload *w)
{
        const struct workload_opts opts = {.roots = roots, .dtype = DT_F32, .require_weights = require, .seed = 1};
        struct workload_spec s;

        conf_free(doc);
        doc = NULL;
        must(conf_parse(yaml, strlen(yaml), "x.yaml", &doc));
        must(workload_parse(conf_root(doc), &s));
        err_clear();
        return workload_build(&s, &opts, w);
}

#define CAUSAL(params) "name: a\nimplementation: hf_causal_lm\nparams: {" params "}\n"

static void a_found_checkpoint_is_what_runs(void **state)
{
        struct workload w;

        must(build(
            CAUSAL("model_id: x/gpt2-micro, prompt_text: hello world, prompt_length: 12, new_tokens: 5, turns: 3, "
                   "turn_tokens: 4"),
            true, &w));
        assert_int_equal(w.weights, WEIGHTS_CHECKPOINT);
        assert_null(w.synthetic_reason);
        assert_non_null(strstr(w.model_path, "gpt2-micro"));
        assert_non_null(w.tokenizer);
        assert_int_equal(w.prompt_nids, 8);
        assert_int_equal(w.graph.h->vocab, 512);
        /* 12 + 5, then twice 4 + 5. */
        assert_int_equal(w.graph.h->context_max, 35);
        assert_int_equal(w.graph.h->rows_max, 35);
        assert_true(w.has_weights);
        workload_free(&w);
}

static void otherwise_a_preset_runs(void **state)
{
        struct workload w;

        must(build(CAUSAL("model_id: gpt2, prompt_text: hello"), false, &w));
        assert_int_equal(w.weights, WEIGHTS_SYNTHETIC);
        assert_non_null(w.synthetic_reason);
        assert_null(w.tokenizer);
        assert_string_equal(w.model_path, "");
        workload_free(&w);
        assert_int_equal(build(CAUSAL("model_id: gpt2"), true, &w), -ENOENT);
        assert_sentence("--require-weights");
        assert_sentence(FIXTURES);
        assert_int_equal(build(CAUSAL("model_id: nobody/knows"), false, &w), -ENOENT);
        assert_sentence("nobody/knows");
        assert_int_equal(build(CAUSAL("model_id: ../x"), false, &w), -EINVAL);
}

static void what_is_not_built_is_a_reason(void **state)
{
        struct workload w;

        assert_int_equal(build(CAUSAL("model_id: meta-llama/Llama-2-7b-hf"), false, &w), -ENOTSUP);
        assert_sentence("needs the Llama builder");
        assert_int_equal(build(CAUSAL("model_id: llama-micro"), false, &w), -ENOTSUP);
        assert_sentence("needs the Llama builder");
        assert_int_equal(build("name: v\nimplementation: hf_vision\n", false, &w), -ENOTSUP);
        assert_sentence("needs the ResNet builder");
        assert_null(w.graph.h);
}

static void a_model_without_usable_weights_is_an_error(void **state)
{
        char dir[64], config[64];
        struct workload w;

        tmp_dir(dir);
        make_dirs(dir, "broken");
        snprintf(config, sizeof(config), "%s/broken", dir);
        model_roots_close(roots);
        must(model_roots_open((const char *[]){dir}, 1, &roots));
        assert_int_equal(build(CAUSAL("model_id: broken"), false, &w), -EINVAL);
        assert_sentence("config.json");
        put_text_file(config, "config.json",
                      "{\"n_embd\":8,\"n_layer\":1,\"n_head\":2,\"n_positions\":128,\"vocab_size\":11}");
        assert_int_equal(build(CAUSAL("model_id: broken"), false, &w), -EINVAL);
        assert_sentence("model.safetensors");
        assert_int_equal(build(CAUSAL("model_id: broken, prompt_length: 500"), false, &w), -EINVAL);
        assert_sentence("n_positions 128");
        tmp_gone(dir);
}

static void the_last_token_needs_no_position(void **state)
{
        struct workload w;

        must(build(CAUSAL("model_id: gpt2-micro, prompt_length: 128, new_tokens: 1"), false, &w));
        assert_int_equal(w.graph.h->context_max, 128);
        workload_free(&w);
        must(build(CAUSAL("model_id: gpt2-micro, prompt_length: 128, new_tokens: 0"), false, &w));
        workload_free(&w);
        assert_int_equal(build(CAUSAL("model_id: gpt2-micro, prompt_length: 128, new_tokens: 2"), false, &w), -EINVAL);
}

static void prompts_differ_and_repeat_when_asked_again(void **state)
{
        static const char *const yaml[] = {CAUSAL("model_id: gpt2-micro, prompt_text: h, batch_size: 2"),
                                           CAUSAL("model_id: gpt2-micro, prompt_text: hello world, batch_size: 2"),
                                           CAUSAL("model_id: gpt2-micro, batch_size: 2")};

        for (int v = 0; v < 3; v++) {
                int32_t blocks[20][64], again[64];
                struct workload w;

                must(build(yaml[v], false, &w));
                for (uint32_t b = 0; b < 20; b++) {
                        must(workload_prompt(&w, 5, b, blocks[b], 32));
                        for (int i = 0; i < 64; i++)
                                assert_true(blocks[b][i] >= 0 && blocks[b][i] < 512);
                        for (uint32_t c = 0; c < b; c++)
                                assert_memory_not_equal(blocks[b], blocks[c], sizeof(again));
                }
                must(workload_prompt(&w, 5, 7, again, 32));
                assert_memory_equal(again, blocks[7], sizeof(again));
                /* Block 0 begins with the text as it stands, repeated without padding. */
                for (size_t i = 0; w.prompt_nids && i < 32; i++)
                        assert_int_equal(blocks[0][i], w.prompt_ids[i % w.prompt_nids]);
                workload_turn_ids(&w, 5, 0, 1, again, 64);
                workload_turn_ids(&w, 5, 0, 2, blocks[0], 64);
                assert_memory_not_equal(again, blocks[0], sizeof(again));
                workload_free(&w);
        }
}

static void prompts_come_from_a_file(void **state)
{
        char dir[64], yaml[256];
        struct workload w;

        tmp_dir(dir);
        put_text_file(dir, "p.txt", "hello world");
        snprintf(yaml, sizeof(yaml), CAUSAL("model_id: gpt2-micro, prompt_file: %s/p.txt"), dir);
        must(build(yaml, false, &w));
        assert_int_equal(w.prompt_nids, 8);
        workload_free(&w);
        snprintf(yaml, sizeof(yaml), CAUSAL("model_id: gpt2-micro, prompt_file: %s/q.txt"), dir);
        assert_int_equal(build(yaml, false, &w), -ENOENT);
        assert_sentence("q.txt");
        tmp_gone(dir);
}

static void inputs_of_feed_forward_models(void **state)
{
        struct workload w;
        float x[48], y[48];
        unsigned char bytes[64], other[64];

        must(build(
            "name: t\nimplementation: synthetic_transformer\nparams: {hidden_size: 8, num_heads: 2, num_layers: 1, "
            "sequence_length: 6}\n",
            true, &w));
        assert_int_equal(w.weights, WEIGHTS_SYNTHETIC);
        assert_true(w.has_weights);
        workload_input(&w, 3, 0, x, sizeof(x));
        workload_input(&w, 3, 1, y, sizeof(y));
        for (int i = 0; i < 48; i++)
                assert_true(x[i] >= -1 && x[i] < 1);
        assert_memory_not_equal(x, y, sizeof(x));
        assert_int_equal(workload_prompt(&w, 1, 0, (int32_t[1]){0}, 1), -EINVAL);
        workload_free(&w);
        must(build("name: e\nimplementation: echo\n", true, &w));
        assert_false(w.has_weights);
        assert_null(w.synthetic_reason);
        workload_input(&w, 3, 0, bytes, sizeof(bytes));
        workload_input(&w, 3, 1, other, sizeof(other));
        assert_memory_not_equal(bytes, other, sizeof(bytes));
        workload_free(&w);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test_setup_teardown(a_found_checkpoint_is_what_runs, set_up, tear_down),
            cmocka_unit_test_setup_teardown(otherwise_a_preset_runs, set_up, tear_down),
            cmocka_unit_test_setup_teardown(what_is_not_built_is_a_reason, set_up, tear_down),
            cmocka_unit_test_setup_teardown(a_model_without_usable_weights_is_an_error, set_up, tear_down),
            cmocka_unit_test_setup_teardown(the_last_token_needs_no_position, set_up, tear_down),
            cmocka_unit_test_setup_teardown(prompts_differ_and_repeat_when_asked_again, set_up, tear_down),
            cmocka_unit_test_setup_teardown(prompts_come_from_a_file, set_up, tear_down),
            cmocka_unit_test_setup_teardown(inputs_of_feed_forward_models, set_up, tear_down),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
