/* What is taken from an earlier sweep's file, and every reason for which it is refused. */
#include <math.h>
#include <string.h>

#include "client_fixture.h"

#include "manifest.h"
#include "prng.h"
#include "rows.h"

#define BLOCKS   3u
#define REQUESTS 2u
#define TURNS    2u
#define SAMPLES  (BLOCKS * REQUESTS * TURNS)
#define RUNS     5

/* A native row, a remote one, and one that was never set up. Plans are numbers: nothing runs. */
struct scene {
        struct experiment exp;
        struct sweep_opts opts;
        struct workload_spec spec;
        struct conf_doc *conf;
        struct workload w;
        struct exp_baseline base[3];
        struct row rows[3];
        struct measured me;
        struct remote remote;
        struct remote_model model;
        struct plan plans[TURNS];
        struct exec execs[TURNS];
        struct digest digests[RUNS];
        uint32_t launch[RUNS];
        int32_t *order[RUNS];
        size_t order_len[RUNS];
};

static void scene_make(struct scene *s)
{
        static const char *const names[] = {"native_pytorch", "full_djinn", "semantic_blind"};

        *s = (struct scene){.exp = {.seed = 3,
                                    .requests_per_block = REQUESTS,
                                    .runs = RUNS,
                                    .dtype = DT_F32,
                                    .device = "cpu",
                                    .config_path = "c.yaml",
                                    .tag = "t",
                                    .reference_baseline = names[0],
                                    .blind_baseline = names[2],
                                    .target_baseline = names[1]}};
        must(conf_parse("{prompt_length: 16, new_tokens: 4}", 34, "c.yaml", &s->conf));
        s->spec = (struct workload_spec){.name = "w",
                                         .implementation = "hf_causal_lm",
                                         .kind = &workload_kinds[0],
                                         .params = conf_root(s->conf),
                                         .unit_name = "tokens",
                                         .new_tokens = 4,
                                         .batch_size = 1,
                                         .turns = TURNS};
        s->opts = (struct sweep_opts){.exp = &s->exp, .resume = "old.json"};
        s->w.driver = DRIVE_CAUSAL;
        s->model.info.weights_digest[0] = 0x1234;
        for (uint32_t t = 0; t < TURNS; t++)
                s->plans[t] = (struct plan){.up = {.messages = 1, .msg_bytes = 300, .payload_bytes = 100},
                                            .down = {.messages = 1, .msg_bytes = 200, .payload_bytes = 20 + t},
                                            .round_trips = 1};
        for (int i = 0; i < 3; i++) {
                const struct baseline_def *def = baseline_find(names[i]);
                struct row *r = &s->rows[i];

                s->base[i] = (struct exp_baseline){.name = names[i], .type = names[i], .def = def, .sw = def->sw};
                *r = (struct row){.b = &s->base[i],
                                  .transport = i ? "shm" : "local",
                                  .twin_of = -1,
                                  .wire_floor_ns = NAN,
                                  .r = &s->remote,
                                  .m = &s->model,
                                  .plans = s->plans,
                                  .execs = s->execs,
                                  .digests = s->digests};
                snprintf(r->name, sizeof r->name, "%s", names[i]);
        }
        s->rows[2].execs = NULL, s->rows[2].m = NULL, s->rows[2].plans = NULL, s->rows[2].digests = NULL;
        s->me = (struct measured){.opts = &s->opts,
                                  .w = &s->w,
                                  .spec = &s->spec,
                                  .rows = s->rows,
                                  .nrows = 3,
                                  .turns = TURNS,
                                  .launch = s->launch,
                                  .order = s->order,
                                  .order_len = s->order_len,
                                  .have_server = true,
                                  .profile_cost_us = NAN};
        snprintf(s->me.server_info.device, sizeof s->me.server_info.device, "cpu");
        snprintf(s->me.server_info.commit, sizeof s->me.server_info.commit, "abc");
        s->me.server_info.threads = 2;
        s->remote.server = s->me.server_info;
}

static void scene_free(struct scene *s)
{
        for (int i = 0; i < 3; i++) {
                free(s->rows[i].samples);
                free(s->rows[i].nets);
        }
        for (int b = 0; b < RUNS; b++)
                free(s->order[b]);
        conf_free(s->conf);
}

static void add_block(struct scene *s, struct row *r, uint32_t b)
{
        for (uint32_t k = 0; k < REQUESTS; k++)
                for (uint32_t t = 0; t < TURNS; t++) {
                        struct sample *x = &r->samples[r->nsamples++];

                        *x = (struct sample){.block = b, .launch = s->launch[b], .turn = t, .digest_ok = true};
                        x->s.applied = r->b->sw.plan_cache ? RUN_PLAN_CACHE | RUN_KEEP_STATE : RUN_KEEP_STATE;
                        for (int l = 0; l < LEAF_COUNT; l++)
                                x->s.leaf_ns[l] = 1000 * b + 100 * t + l + k;
                        x->s.latency_ns = 1000000 + 1000 * b + 10 * k + t;
                        x->s.residual_ns = -5;
                        if (r == &s->rows[1])
                                r->nets[r->nnets++] = (struct net_sample){b, t, 5000 + b};
                }
}

/* The document of BLOCKS measured blocks: the last of them in a launch of its own. */
static json *measured_document(void)
{
        struct scene s;
        json *doc;

        scene_make(&s);
        s.launch[BLOCKS - 1] = 1;
        for (int i = 0; i < 2; i++) {
                s.rows[i].samples = calloc(SAMPLES, sizeof *s.rows[i].samples);
                s.rows[i].nets = calloc(SAMPLES, sizeof *s.rows[i].nets);
                for (uint32_t b = 0; b < BLOCKS; b++)
                        add_block(&s, &s.rows[i], b);
        }
        for (uint32_t b = 0; b < BLOCKS; b++) {
                static const int32_t order[] = {1, -2, 0};

                s.order[b] = malloc(sizeof order);
                memcpy(s.order[b], order, sizeof order);
                s.order_len[b] = ARRAY_LEN(order);
        }
        s.me.blocks = BLOCKS;
        s.rows[1].clock = (struct row_clock){.first_ns = -3, .last_ns = 7, .error_ns = 1234, .known = true};
        doc = result_document(&s.me);
        scene_free(&s);
        return doc;
}

static int taken(struct scene *s, const json *doc)
{
        scene_make(s);
        return resume_take(&s->me, doc);
}

/* The node at a path such as "workload.results.1.runs". */
static json *at(json *doc, const char *path)
{
        char part[64];

        while (*path) {
                size_t len = strcspn(path, ".");
                char *end;
                long i;

                snprintf(part, sizeof part, "%.*s", (int)len, path);
                path += len + (path[len] == '.');
                i = strtol(part, &end, 10);
                if (*end) {
                        doc = (json *)(uintptr_t)json_get(doc, part);
                } else {
                        doc = (json *)(uintptr_t)json_first(doc);
                        while (doc && i-- > 0)
                                doc = (json *)(uintptr_t)json_next(doc);
                }
                assert_non_null(doc);
        }
        return doc;
}

/* A file in which `key` of the object at `path` is `value` (JSON text; NULL: null) is refused with `word`. */
static void assert_refused(const char *path, const char *key, const char *value, const char *word)
{
        json *doc = measured_document();
        struct scene s;

        json_set(at(doc, path), key, value ? json_parse(value, strlen(value), "value") : json_of_null());
        if (taken(&s, doc) != -EINVAL)
                fail_msg("%s.%s = %s: not refused", path, key, value ? value : "null");
        if (!strstr(err_text(), word) || !strstr(err_text(), "old.json"))
                fail_msg("%s.%s = %s: \"%s\" does not say \"%s\"", path, key, value ? value : "null", err_text(), word);
        assert_int_equal(s.me.blocks, 0);
        for (int i = 0; i < 3; i++)
                assert_int_equal(s.rows[i].nsamples + s.rows[i].nnets + s.rows[i].resumed_samples, 0);
        scene_free(&s);
        json_free(doc);
}

/* ---- taking ---- */

static void what_was_measured_is_taken(void **state)
{
        json *doc = measured_document();
        struct scene s;

        must(taken(&s, doc));
        assert_int_equal(s.me.blocks, BLOCKS);
        assert_int_equal(s.me.resumed, BLOCKS);
        assert_int_equal(s.launch[0], 0);
        assert_int_equal(s.launch[BLOCKS - 1], 1);
        assert_int_equal(s.order_len[1], 3);
        assert_int_equal(s.order[1][1], -2);
        for (int i = 0; i < 2; i++) {
                const struct row *r = &s.rows[i];
                const struct sample *x = &r->samples[SAMPLES - 1];

                assert_int_equal(r->nsamples, SAMPLES);
                assert_int_equal(r->resumed_samples, SAMPLES);
                assert_int_equal(x->block, BLOCKS - 1);
                assert_int_equal(x->turn, 1);
                assert_int_equal(x->s.latency_ns, 1000000 + 1000 * (BLOCKS - 1) + 10 + 1);
                assert_int_equal(x->s.leaf_ns[LEAF_SERVER_EXECUTION],
                                 1000 * (BLOCKS - 1) + 100 + LEAF_SERVER_EXECUTION + 1);
                assert_int_equal(x->s.residual_ns, -5);
                assert_true(x->s.applied & RUN_KEEP_STATE);
        }
        assert_int_equal(s.rows[0].nnets, 0);
        assert_int_equal(s.rows[0].wire.up_messages, 0);
        assert_int_equal(s.rows[1].nnets, SAMPLES);
        assert_int_equal(s.rows[1].nets[0].ns, 5000);
        assert_int_equal(s.rows[1].wire.up_messages, TURNS * BLOCKS * REQUESTS);
        assert_false(s.rows[0].clock.known);
        assert_true(s.rows[1].clock.known);
        assert_int_equal(s.rows[1].clock.first_ns, -3);
        assert_int_equal(s.rows[1].clock.last_ns, 7);
        assert_int_equal(s.rows[1].clock.error_ns, 1234);
        assert_int_equal(s.rows[2].nsamples, 0); /* was never set up */
        assert_null(s.rows[2].samples);
        scene_free(&s);
        json_free(doc);
}

/* ---- other questions ---- */

static void other_sweeps_are_refused(void **state)
{
        assert_refused("", "schema", "\"djinnbench.result/2\"", "djinnbench.result/1");
        assert_refused("experiment", "seed", "4", "experiment.seed");
        assert_refused("experiment", "seed", "\"3\"", "experiment.seed");
        assert_refused("experiment", "requests_per_block", "3", "experiment.requests_per_block");
        assert_refused("experiment", "dtype", "\"bfloat16\"", "experiment.dtype");
        assert_refused("manifest", "host", "\"elsewhere\"", "manifest.host");
        assert_refused("manifest", "boot_id", "\"x\"", "manifest.boot_id");
        assert_refused("manifest", "boot_id", NULL, "manifest.boot_id");
        assert_refused("manifest", "injury", "\"client_serialize=5\"", "manifest.injury");
        assert_refused("manifest", "server", NULL, "manifest.server.device");
        assert_refused("manifest.server", "commit", "\"abd\"", "manifest.server.commit");
}

#define NATIVE_ROW "workload.results.0"
#define REMOTE_ROW "workload.results.1"

static void other_questions_are_refused(void **state)
{
        assert_refused(REMOTE_ROW ".metadata.spec", "prompt_length", "\"17\"", "metadata.spec.prompt_length");
        assert_refused(REMOTE_ROW ".metadata.spec", "implementation", "\"echo\"", "metadata.spec.implementation");
        assert_refused(REMOTE_ROW ".metadata.spec", "batch_size", "\"2\"", "metadata.spec");
        assert_refused(REMOTE_ROW ".metadata", "spec", NULL, "metadata.spec");
        assert_refused(REMOTE_ROW ".switches.requested", "weights", "\"shipped\"", "switches.requested.weights");
        assert_refused(REMOTE_ROW ".switches.requested", "call", "\"step\"", "switches.requested.call");
        assert_refused(REMOTE_ROW ".switches.requested", "state", "\"recompute\"", "switches.requested.state");
        assert_refused(REMOTE_ROW ".switches.requested", "outputs", "\"all\"", "switches.requested.outputs");
        assert_refused(REMOTE_ROW ".switches.requested", "plan_cache", "\"off\"", "switches.requested.plan_cache");
        assert_refused(REMOTE_ROW ".switches.requested", "buffers", "\"serialized\"", "switches.requested.buffers");
        assert_refused(REMOTE_ROW, "switches", "[1]", "switches.requested");
        assert_refused(REMOTE_ROW, "model_hash", "\"00\"", "model_hash");
        assert_refused(REMOTE_ROW, "model_hash", NULL, "model_hash");
        assert_refused(REMOTE_ROW ".wire.predicted.up", "payload_bytes", "101", "wire.predicted.up.payload_bytes");
        assert_refused(REMOTE_ROW ".wire.predicted.up", "messages", "2", "wire.predicted.up.messages");
        assert_refused(REMOTE_ROW ".wire.predicted.down", "payload_bytes", "20", "wire.predicted.down.payload_bytes");
        assert_refused(REMOTE_ROW ".wire.predicted.down", "messages", "0", "wire.predicted.down.messages");
        assert_refused(REMOTE_ROW ".wire.predicted", "round_trips", "2", "wire.predicted.round_trips");
        assert_refused(NATIVE_ROW ".wire.predicted.up", "messages", "1", "wire.predicted.up.messages");
        assert_refused(REMOTE_ROW ".work", "threads", "1", "work.threads");
        assert_refused(REMOTE_ROW ".work", "device", "\"reference\"", "work.device");
        assert_refused(REMOTE_ROW, "transport", "\"tcp\"", "full_djinn over shm");
        assert_refused(REMOTE_ROW ".validity", "verdict", "\"INVALID\"", "full_djinn over shm");
        assert_refused(NATIVE_ROW ".validity", "verdict", "\"SKIPPED\"", "native_pytorch over local");
        assert_refused(NATIVE_ROW ".validity", "verdict", "1", "native_pytorch over local");
}

/* ---- numbers that lie ---- */

static void blocks_and_runs_must_agree(void **state)
{
        assert_refused("manifest", "blocks", "[]", "manifest.blocks");
        assert_refused("manifest", "blocks", NULL, "manifest.blocks");
        assert_refused("manifest", "blocks", "7", "manifest.blocks");
        assert_refused("manifest", "blocks", "[[],[],[],[],[],[]]", "manifest.blocks");
        assert_refused("manifest", "blocks", "[[],[]]", "number of its runs");
        assert_refused("manifest", "blocks", "[[],[],[],[]]", "number of its runs");
        assert_refused("manifest", "blocks", "[[],[],5]", "order");
        assert_refused("manifest", "blocks", "[[],[],[0,1,2,0,1,2,0]]", "order");
        assert_refused("manifest", "blocks", "[[],[],[3]]", "order");
        assert_refused("manifest", "blocks", "[[],[],[-1]]", "order");
        assert_refused("manifest", "blocks", "[[],[],[0.5]]", "order");
        assert_refused("manifest", "blocks", "[[],[],[{\"calibrate\": 3}]]", "order");
        assert_refused("manifest", "blocks", "[[],[],[{}]]", "order");
        assert_refused(REMOTE_ROW, "runs", "[]", "number of its runs");
        assert_refused(REMOTE_ROW, "runs", "[1]", "number of its runs");
        assert_refused(REMOTE_ROW, "runs", NULL, "number of its runs");
        assert_refused(REMOTE_ROW, "runs", "[1,2,3,4,5,6,7,8,9,10,11,12]", "a run of it");
}

static void runs_must_fit(void **state)
{
        static const char *const values[][2] = {
            {"block", "1"},          {"block", "-1"},      {"block", "4294967295"}, {"block", "1e30"},
            {"block", NULL},         {"launch", "-1"},     {"launch", "1"},         {"launch", "1e18"},
            {"launch", "\"0\""},     {"turn", "1"},        {"turn", "2"},           {"turn", "-1"},
            {"latency_ms", "0"},     {"latency_ms", "-1"}, {"latency_ms", NULL},    {"latency_ms", "1e300"},
            {"latency_ms", "\"1\""},
        };

        for (size_t i = 0; i < ARRAY_LEN(values); i++)
                assert_refused(REMOTE_ROW ".runs.2", values[i][0], values[i][1], "a run of it");
        assert_refused(REMOTE_ROW ".runs.3", "turn", NULL, "a run of it");   /* no turn is the first */
        assert_refused(NATIVE_ROW ".runs.11", "launch", "0", "a run of it"); /* half a block in another launch */
}

/* Bytes of a file changed at random: taken or refused, never anything else. */
static void mangled_files_do_no_harm(void **state)
{
        static const char noise[] = "0123456789-+.eE\"{}[],:ntrufalse\\\0\377";
        json *doc = measured_document();
        char *text = json_text(doc, false), *copy = malloc(strlen(text));
        size_t len = strlen(text), took = 0, refused = 0;
        struct prng rng;

        prng_seed(&rng, 11);
        for (int i = 0; i < 3000; i++) {
                struct scene s;
                json *mangled;

                memcpy(copy, text, len);
                for (uint64_t n = 1 + prng_below(&rng, 3); n > 0; n--)
                        copy[prng_below(&rng, (uint32_t)len)] = noise[prng_below(&rng, sizeof noise - 1)];
                mangled = json_parse(copy, len, "mangled");
                if (!mangled)
                        continue;
                if (taken(&s, mangled) == 0)
                        took++;
                else
                        refused++;
                scene_free(&s);
                json_free(mangled);
        }
        assert_true(took > 0);
        assert_true(refused > 0);
        free(copy);
        free(text);
        json_free(doc);
}

/* Every value of a file, one after the other, replaced by one of another kind. */
static void replace_each(json *root, json *x, unsigned *n)
{
        static const char *const others[] = {"null", "[]", "{}", "-1", "1e300", "\"\"", "true"};

        for (const json *k = json_first(x), *next; k; k = next) {
                const char *key = json_key(k);

                next = json_next(k);
                if (json_is_object(k) || json_is_array(k))
                        replace_each(root, (json *)(uintptr_t)k, n);
                if (!json_is_object(x) || ++*n % 3) /* a third of them: runs are alike */
                        continue;
                json *saved = json_copy(k);
                char name[64];

                snprintf(name, sizeof name, "%s", key);
                for (size_t i = 0; i < ARRAY_LEN(others); i++) {
                        struct scene s;

                        json_set(x, name, json_parse(others[i], strlen(others[i]), "other"));
                        (void)taken(&s, root);
                        scene_free(&s);
                }
                json_set(x, name, saved);
                next = json_next(json_get(x, name));
        }
}

static void values_of_other_kinds_do_no_harm(void **state)
{
        json *doc = measured_document();
        struct scene s;
        unsigned n = 0;

        replace_each(doc, doc, &n);
        assert_true(n > 500);
        must(taken(&s, doc)); /* everything is as it was */
        scene_free(&s);
        json_free(doc);
}

int main(void)
{
        static const struct CMUnitTest tests[] = {
            cmocka_unit_test(what_was_measured_is_taken),
            cmocka_unit_test(other_sweeps_are_refused),
            cmocka_unit_test(other_questions_are_refused),
            cmocka_unit_test(blocks_and_runs_must_agree),
            cmocka_unit_test(runs_must_fit),
            cmocka_unit_test(mangled_files_do_no_harm),
            cmocka_unit_test(values_of_other_kinds_do_no_harm),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
