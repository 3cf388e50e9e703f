#include <errno.h>

#include "wl_fixture.h"

#include "model_config.h"
#include "workload.h"

static struct conf_doc *doc;

static int parse(const char *yaml, struct workload_spec *s)
{
        conf_free(doc);
        doc = NULL;
        err_clear();
        must(conf_parse(yaml, strlen(yaml), "x.yaml", &doc));
        return workload_parse(conf_root(doc), s);
}

static int tear_down(void **state)
{
        conf_free(doc);
        doc = NULL;
        return 0;
}

static void defaults_of_each_kind(void **state)
{
        struct workload_spec s;

        must(parse("name: a\nimplementation: hf_causal_lm\nparams: {model_id: gpt2}\n", &s));
        assert_string_equal(s.name, "a");
        assert_null(s.category);
        assert_string_equal(s.model_id, "gpt2");
        assert_int_equal(s.prompt_length, 64);
        assert_int_equal(s.new_tokens, 32);
        assert_int_equal(s.batch_size, 1);
        assert_int_equal(s.turns, 1);
        assert_string_equal(s.unit_name, "tokens");
        assert_close(workload_units(&s), 32, 0);
        assert_int_equal(s.kind->driver, DRIVE_CAUSAL);

        must(parse("name: b\nimplementation: synthetic_transformer\n", &s));
        assert_int_equal(s.sequence_length, 256);
        assert_int_equal(s.hidden_size, 1024);
        assert_int_equal(s.num_heads, 8);
        assert_int_equal(s.num_layers, 6);
        assert_int_equal(s.ff_size, 4096);
        assert_close(workload_units(&s), 1, 0);

        must(parse("name: c\nimplementation: echo\nparams:\n  payload_bytes: 65536\n", &s));
        assert_int_equal(s.payload_bytes, 65536);
        assert_close(workload_units(&s), 1, 0);
}

static void units_are_counted(void **state)
{
        struct workload_spec s;

        must(parse("name: a\nimplementation: hf_causal_lm\nparams: {model_id: gpt2, batch_size: 3, new_tokens: 0, "
                   "prompt_length: 10}\n",
                   &s));
        assert_close(workload_units(&s), 30, 0);
        must(parse("name: a\nimplementation: hf_causal_lm\nparams: {model_id: gpt2, batch_size: 3, new_tokens: 5}\n",
                   &s));
        assert_close(workload_units(&s), 15, 0);
        must(parse("name: a\nimplementation: synthetic_transformer\nparams: {batch_size: 4, sequence_length: 8, "
                   "unit_name: tokens}\n",
                   &s));
        assert_close(workload_units(&s), 32, 0);
}

static void the_experiments_own_spellings(void **state)
{
        struct workload_spec s;

        must(parse(
            "name: hf_tiny_gpt2\ncategory: smoke\nimplementation: hf_causal_lm\nparams:\n"
            "  model_id: sshleifer/tiny-gpt2\n  prompt_text: \"some text\"\n  prompt_length: 64\n  new_tokens: 32\n"
            "  batch_size: 1\n  unit_name: \"tokens\"\n"
            "  generation: {do_sample: false, temperature: 0.0, top_p: 1.0}\n",
            &s));
        assert_string_equal(s.prompt_text, "some text");
        assert_non_null(conf_get(s.params, "generation"));
        must(parse("name: v\nimplementation: hf_vision\nparams: {model_id: microsoft/resnet-50, image_size: 224, "
                   "anything: 1}\n",
                   &s));
        assert_non_null(s.kind->reason);
        must(parse("name: v\nimplementation: synthetic_transformer\nparams: {dropout: 0.0}\n", &s));
}

static void wrong_entries_are_refused_with_their_place(void **state)
{
        static const char *const bad[][3] = {
            {"name: a\nimplementation: hf_casual_lm\n", "x.yaml:2", "hf_causal_lm"},
            {"name: a\nimplementation: zzzzzzzzz\n", "x.yaml:2", "zzzzzzzzz"},
            {"name: a\nimplementation: hf_causal_lm\n", "x.yaml:1", "model_id"},
            {"name: a\nimplementation: hf_causal_lm\nparams: {}\n", "x.yaml:3", "model_id"},
            {"name: a\nimplementation: hf_causal_lm\nparams: {model_id: ''}\n", "x.yaml:3", "model_id"},
            {"name: ../a\nimplementation: echo\n", "x.yaml:1", "name"},
            {"implementation: echo\n", "x.yaml:1", "name"},
            {"name: a\nimplementation: echo\nparams: [1]\n", "x.yaml:3", "map"},
            {"name: a\nimplementation: hf_vision\nparams: 7\n", "x.yaml:3", "map"},
            {"name: a\nimplementation: echo\nparams: {payload_bytes: 0}\n", "x.yaml:3", "payload_bytes"},
            {"name: a\nimplementation: echo\nparams: {payload_byte: 4}\n", "x.yaml:3", "payload_bytes"},
            {"name: a\nimplementation: echo\nextra: 1\n", "x.yaml:3", "extra"},
            {"name: a\nimplementation: hf_causal_lm\nparams:\n  model_id: gpt2\n  new_tokens: -1\n", "x.yaml:5",
             "new_tokens"},
            {"name: a\nimplementation: hf_causal_lm\nparams:\n  model_id: gpt2\n  prompt_length: 0\n", "x.yaml:5",
             "prompt_length"},
            {"name: a\nimplementation: hf_causal_lm\nparams:\n  model_id: gpt2\n  turns: 0\n", "x.yaml:5", "turns"},
            {"name: a\nimplementation: hf_causal_lm\nparams:\n  model_id: gpt2\n  prompt_text: x\n  prompt_file: y\n",
             "x.yaml:4", "exclude"},
            {"name: a\nimplementation: hf_causal_lm\nparams:\n  model_id: gpt2\n  new_tokens: 1048576\n  turns: 1000\n",
             "x.yaml:4", "history"},
            {"name: a\nimplementation: hf_causal_lm\nparams:\n  model_id: g\n  generation: {do_sample: true}\n",
             "x.yaml:5", "greedy"},
            {"name: a\nimplementation: hf_causal_lm\nparams:\n  model_id: g\n  generation: {num_beams: 4}\n",
             "x.yaml:5", "num_beams"},
            {"name: a\nimplementation: hf_causal_lm\nparams:\n  model_id: g\n  generation: {do_smple: true}\n",
             "x.yaml:5", "do_sample"},
            {"name: a\nimplementation: hf_causal_lm\nparams:\n  model_id: g\n  generation: 5\n", "x.yaml:5", "map"},
            {"name: a\nimplementation: synthetic_transformer\nparams: {num_heads: 7}\n", "x.yaml:3", "num_heads"},
            {"name: a\nimplementation: synthetic_transformer\nparams: {hidden_size: big}\n", "x.yaml:3", "hidden_size"},
            {"- 1\n", "x.yaml:1", "map"},
        };
        struct workload_spec s;

        for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
                if (parse(bad[i][0], &s) != -EINVAL)
                        fail_msg("accepted: %s", bad[i][0]);
                assert_sentence(bad[i][1]);
                assert_sentence(bad[i][2]);
        }
}

static void presets_and_reasons(void **state)
{
        static const char *const there[] = {
            "gpt2",       "openai-community/gpt2", "gpt2-medium", "openai-community/gpt2-xl",
            "gpt2-large", "sshleifer/tiny-gpt2",   "tiny-gpt2",   "gpt2@main",
            "distilgpt2"};
        static const char *const not_there[] = {"gpt3", "someone/gpt2", "gpt2-", "sshleifer/gpt2", ""};

        for (size_t i = 0; i < sizeof(there) / sizeof(there[0]); i++) {
                json *config = model_config_preset(there[i]);
                struct graph g;

                if (!config)
                        fail_msg("no preset for %s", there[i]);
                must(gpt2_build(config, 1, 96, 96, DT_F32, &g));
                graph_free(&g);
                json_free(config);
                assert_null(model_config_reason(there[i]));
        }
        for (size_t i = 0; i < sizeof(not_there) / sizeof(not_there[0]); i++)
                assert_null(model_config_preset(not_there[i]));
        assert_non_null(strstr(model_config_reason("meta-llama/Llama-2-7b-hf"), "Llama"));
        assert_non_null(strstr(model_config_reason("microsoft/resnet-50"), "ResNet"));
        assert_non_null(model_config_reason("google/vit-base-patch16-224-in21k"));
        assert_non_null(model_config_type_reason("llama"));
        assert_null(model_config_type_reason("gpt2"));
}

static void every_kind_can_run_or_says_why(void **state)
{
        for (const struct workload_kind *k = workload_kinds; k->implementation; k++) {
                assert_non_null(k->what);
                assert_true((k->reason != NULL) != (k->build != NULL));
                if (!k->reason)
                        assert_true(k->params && k->nparams && k->defaults && k->check);
        }
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test_teardown(defaults_of_each_kind, tear_down),
            cmocka_unit_test_teardown(units_are_counted, tear_down),
            cmocka_unit_test_teardown(the_experiments_own_spellings, tear_down),
            cmocka_unit_test_teardown(wrong_entries_are_refused_with_their_place, tear_down),
            cmocka_unit_test(presets_and_reasons),
            cmocka_unit_test(every_kind_can_run_or_says_why),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
