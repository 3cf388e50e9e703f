#include <errno.h>

#include "wl_fixture.h"

#include "device.h"
#include "workload.h"

#ifndef FIXTURES
#error "FIXTURES names tests/fixtures"
#endif

static void echo_comes_back(void **state)
{
        static const char *const names[] = {"reference", "cpu"};

        for (int d = 0; d < 2; d++) {
                char in[100], out[100] = {0};
                struct local_model *m;
                struct device *dev;
                struct graph g;

                for (int i = 0; i < 100; i++)
                        in[i] = (char)(i * 3);
                must(echo_build(100, &g));
                must(dev_open(names[d], 1, &dev));
                must(local_open(&g, &(struct weights_source){.kind = WEIGHTS_SYNTHETIC}, dev, &m));
                must(local_run(m, 1u << SEG_BODY, 1, &(struct local_io){ROLE_INPUT, in, 100}, 1,
                               &(struct local_io){ROLE_OUTPUT, out, 100}, 1));
                assert_memory_equal(in, out, 100);
                assert_int_equal(local_run(m, 1u << SEG_BODY, 1, &(struct local_io){ROLE_INPUT, in, 101}, 1, NULL, 0),
                                 -EINVAL);
                assert_int_equal(local_run(m, 1u << SEG_BODY, 1, &(struct local_io){ROLE_IDS, in, 4}, 1, NULL, 0),
                                 -EINVAL);
                assert_int_equal(local_run(m, 1u << SEG_LAST, 1, NULL, 0, NULL, 0), -EINVAL);
                assert_int_equal(local_run(m, 1u << SEG_BODY, 2, NULL, 0, NULL, 0), -EINVAL);
                local_close(m);
                dev_close(dev);
                graph_free(&g);
        }
        struct graph g;

        assert_int_equal(echo_build(0, &g), -EINVAL);
        assert_int_equal(echo_build(UINT64_MAX, &g), -EINVAL);
        assert_null(g.h);
}

struct fixture {
        struct graph g;
        struct checkpoint *c;
        struct device *dev;
        struct local_model *m;
};

static struct fixture micro(uint32_t batch, bool blind, enum op_dtype dtype)
{
        json *config = json_load(FIXTURES "/gpt2-micro/config.json", 1 << 20);
        int fd = open_dir(FIXTURES "/gpt2-micro");
        struct fixture f;

        assert_non_null(config);
        must(gpt2_build(config, batch, 16, 16, dtype, &f.g));
        must(checkpoint_open(fd, "gpt2-micro", &f.c));
        close(fd);
        json_free(config);
        if (blind)
                graph_blind(&f.g);
        must(dev_open("cpu", 1, &f.dev));
        must(local_open(&f.g, &(struct weights_source){.kind = WEIGHTS_CHECKPOINT, .checkpoint = f.c}, f.dev, &f.m));
        return f;
}

static void done(struct fixture *f)
{
        local_close(f->m);
        dev_close(f->dev);
        checkpoint_close(f->c);
        graph_free(&f->g);
}

#define DECODE (1u << SEG_BODY | 1u << SEG_LAST | 1u << SEG_CHOOSE)

/* Prompt, then seven steps; the tokens of all of it. */
static void generate(struct fixture *f, const int32_t *ids, uint32_t batch, uint32_t length, int32_t *tokens)
{
        int32_t cursor[2] = {0, 0}, next[8];
        const struct local_io token = {ROLE_TOKEN, next, batch * 4}, all = {ROLE_TOKENS, tokens, 8 * batch * 4};
        struct local_io in[] = {{ROLE_IDS, (void *)(uintptr_t)ids, batch * length * 4}, {ROLE_CURSOR, cursor, 8}};

        must(local_run(f->m, DECODE, length, in, 2, &token, 1));
        in[0] = (struct local_io){ROLE_IDS, next, batch * 4};
        for (int i = 0; i < 7; i++)
                must(local_run(f->m, DECODE, 1, in, 1, i < 6 ? &token : &all, 1));
}

static const int32_t prompt[] = {15, 493, 72, 22, 299, 466, 75};
static const int32_t answer[] = {335, 432, 453, 335, 19, 327, 327, 327};

static void generates_the_tokens_of_the_reference(void **state)
{
        struct fixture f = micro(1, false, DT_F32);
        int32_t tokens[8];

        generate(&f, prompt, 1, 7, tokens);
        assert_memory_equal(tokens, answer, sizeof(answer));
        /* Again: what is left in the caches must not matter. */
        generate(&f, prompt, 1, 7, tokens);
        assert_memory_equal(tokens, answer, sizeof(answer));
        done(&f);
}

static void a_blind_graph_gives_the_same(void **state)
{
        struct fixture f = micro(1, true, DT_F32), open = micro(1, false, DT_F32);
        int32_t tokens[8];

        generate(&f, prompt, 1, 7, tokens);
        assert_memory_equal(tokens, answer, sizeof(answer));
        assert_true(digest_equal(local_weights_digest(f.m), local_weights_digest(open.m)));
        done(&f);
        done(&open);
}

static void sequences_of_a_batch_are_apart(void **state)
{
        struct fixture f = micro(2, false, DT_F32);
        int32_t ids[14], tokens[16];

        for (int i = 0; i < 7; i++) {
                ids[i] = 3 * i + 1;
                ids[7 + i] = prompt[i];
        }
        generate(&f, ids, 2, 7, tokens);
        for (int i = 0; i < 8; i++)
                assert_int_equal(tokens[2 * i + 1], answer[i]);
        done(&f);
}

/* Recomputing the history gives what the caches give. */
static void recomputation_agrees_with_the_cache(void **state)
{
        struct fixture f = micro(1, false, DT_F32);
        int32_t ids[15], cursor[2];
        static float last[512];

        memcpy(ids, prompt, sizeof(prompt));
        memcpy(ids + 7, answer, sizeof(answer));
        for (uint32_t n = 7; n < 15; n++) {
                int32_t token;
                const struct local_io in[] = {{ROLE_IDS, ids, n * 4}, {ROLE_CURSOR, cursor, 8}};
                const struct local_io out[] = {{ROLE_TOKEN, &token, 4}, {ROLE_LAST, last, sizeof(last)}};

                cursor[0] = cursor[1] = 0;
                must(local_run(f.m, DECODE, n, in, 2, out, 2));
                assert_int_equal(token, answer[n - 7]);
        }
        done(&f);
}

static void half_precision_runs(void **state)
{
        static float full[512], half[512];
        static const enum op_dtype dtypes[] = {DT_F16, DT_BF16};

        for (int d = 0; d < 2; d++) {
                struct fixture f = micro(1, false, DT_F32), h = micro(1, false, dtypes[d]);
                int32_t cursor[2] = {0, 0};
                const struct local_io in[] = {{ROLE_IDS, (void *)(uintptr_t)prompt, 28}, {ROLE_CURSOR, cursor, 8}};
                double diff = 0, size = 0;

                must(local_run(f.m, 3, 7, in, 2, &(struct local_io){ROLE_LAST, full, sizeof(full)}, 1));
                must(local_run(h.m, 3, 7, in, 2, &(struct local_io){ROLE_LAST, half, sizeof(half)}, 1));
                for (int i = 0; i < 512; i++) {
                        diff += ((double)full[i] - half[i]) * ((double)full[i] - half[i]);
                        size += (double)full[i] * full[i];
                }
                assert_true(sqrt(diff / size) < (dtypes[d] == DT_F16 ? 0.01 : 0.08));
                assert_true(diff > 0);
                done(&f);
                done(&h);
        }
}

static void missing_weights_are_an_error(void **state)
{
        char dir[64];
        json *config = json_load(FIXTURES "/gpt2-micro/config.json", 1 << 20);
        struct local_model *m;
        struct checkpoint *c;
        struct device *dev;
        struct graph g;
        const float one = 1;

        tmp_dir(dir);
        put_safetensors(dir, "model.safetensors", "{\"x\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 0,
                        &one, 4);
        int fd = open_dir(dir);

        must(checkpoint_open(fd, "m", &c));
        close(fd);
        must(gpt2_build(config, 1, 4, 4, DT_F32, &g));
        must(dev_open("reference", 1, &dev));
        assert_int_equal(local_open(&g, &(struct weights_source){.kind = WEIGHTS_CHECKPOINT, .checkpoint = c}, dev, &m),
                         -EINVAL);
        assert_null(m);
        assert_sentence("wte.weight");
        assert_sentence("is not in the checkpoint");
        dev_close(dev);
        checkpoint_close(c);
        graph_free(&g);
        json_free(config);
        tmp_gone(dir);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(echo_comes_back),
            cmocka_unit_test(generates_the_tokens_of_the_reference),
            cmocka_unit_test(a_blind_graph_gives_the_same),
            cmocka_unit_test(sequences_of_a_batch_are_apart),
            cmocka_unit_test(recomputation_agrees_with_the_cache),
            cmocka_unit_test(half_precision_runs),
            cmocka_unit_test(missing_weights_are_an_error),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
