/* A config that is right gives the values that stand in it; each mistake is refused with its place and what was expected. */
#include "client_fixture.h"

#include "baseline.h"
#include "experiment.h"

#define EXP  "experiment:\n  device: cpu\n"
#define WORK "workloads:\n  - name: w\n    implementation: echo\n"
#define BASE "baselines:\n  - name: b\n    type: full_djinn\n"
/* Where the three parts begin when the ones before are these. */
#define WORK_AT 3u
#define BASE_AT 6u

static char path[] = "/tmp/experiment-XXXXXX";

static int load(const char *text, struct experiment *e)
{
        int rc;

        strcpy(path + strlen(path) - 6, "XXXXXX");
        write_temp(path, text);
        rc = experiment_load(path, e);
        unlink(path);
        return rc;
}

/* The sentence begins with file:line:col and holds the words. */
static void refused_at(const char *text, unsigned line, unsigned col, const char *const *words)
{
        struct experiment e;
        char place[64];
        int rc = load(text, &e);

        if (rc >= 0)
                fail_msg("accepted:\n%s", text);
        if (rc != -EINVAL)
                fail_msg("%d instead of -EINVAL: %s", rc, err_text());
        snprintf(place, sizeof(place), "%s:%u:%u: ", path, line, col);
        if (strncmp(err_text(), place, strlen(place)))
                fail_msg("expected the place %s in: %s\n%s", place, err_text(), text);
        for (; *words; words++)
                if (!strstr(err_text(), *words))
                        fail_msg("expected \"%s\" in: %s", *words, err_text());
        assert_null(e.doc);
        err_clear();
}

struct mistake {
        const char *part;   /* what stands in this section */
        unsigned line, col; /* line within the section, from 1 */
        const char *words[4];
};

static void refuse_each(const struct mistake *m, size_t n, const char *before, unsigned at, const char *after)
{
        char text[4096];

        for (size_t i = 0; i < n; i++) {
                snprintf(text, sizeof(text), "%s%s%s", before, m[i].part, after);
                refused_at(text, at - 1 + m[i].line, m[i].col, m[i].words);
        }
}

#define E(lines) "experiment:\n" lines
static void experiment_mistakes(void **state)
{
        static const struct mistake bad[] = {
            {E("  runz: 5\n"), 2, 3, {"runz", "did you mean 'runs'"}},
            {E("  Device: cpu\n"), 2, 3, {"did you mean 'device'"}},
            {E("  xyzzyplugh: 5\n"), 2, 3, {"unknown key 'xyzzyplugh'"}},
            {E("  runs: -3\n"), 2, 9, {"runs", "-3", "1 to 100000"}},
            {E("  runs: 0\n"), 2, 9, {"runs", "out of range"}},
            {E("  runs: 3.5\n"), 2, 9, {"runs", "an integer", "3.5"}},
            {E("  runs: \"8\"\n"), 2, 9, {"an integer", "quoted"}},
            {E("  runs: [8]\n"), 2, 9, {"an integer", "a list"}},
            {E("  runs: 99999999999999999999\n"), 2, 9, {"out of range"}},
            {E("  runs: 8\n  runs: 9\n"), 3, 3, {"runs", "twice", "line 2"}},
            {E("  warmup_runs: many\n"), 2, 16, {"warmup_runs", "an integer", "many"}},
            {E("  requests_per_block: 0\n"), 2, 23, {"requests_per_block"}},
            {E("  seed: -1\n"), 2, 9, {"seed"}},
            {E("  threads: 2000\n"), 2, 12, {"threads", "1024"}},
            {E("  device: {a: 1}\n"), 2, 11, {"device", "a text", "a map"}},
            {E("  dtype: float64\n"), 2, 10, {"float32, float16 or bfloat16", "float64"}},
            {E("  dtype: int32\n"), 2, 10, {"int32"}},
            {E("  tag: ../../etc/passwd\n"), 2, 8, {"tag", "a name of 1 to 64"}},
            {E("  tag: .hidden\n"), 2, 8, {"tag", "not beginning with '.'"}},
            {E("  tag: a/b\n"), 2, 8, {"tag"}},
            {E("  tag: \"a b\"\n"), 2, 8, {"tag"}},
            {E("  transports: shm\n"), 2, 15, {"a list such as [shm, tcp]"}},
            {E("  transports: []\n"), 2, 15, {"a list"}},
            {E("  transports: [shm, tpc]\n"), 2, 21, {"tpc", "djinnbench list"}},
            {E("  transports: [shm, shm]\n"), 2, 21, {"shm", "twice"}},
            {E("  transports: [[shm]]\n"), 2, 16, {"the name of a transport"}},
            {E("  transports: [\"null\"]\n"), 2, 16, {"not a transport that a sweep can use"}},
            {E("  transports: [fault]\n"), 2, 16, {"not a transport that a sweep can use"}},
            {"experiment: fast\n", 1, 13, {"experiment", "map"}},
            {"experiment: [cpu]\n", 1, 13, {"experiment", "map"}},
        };

        refuse_each(bad, ARRAY_LEN(bad), "", 1, WORK BASE);
}

#define W(lines) "workloads:\n  - name: w\n" lines
static void workload_mistakes(void **state)
{
        static const struct mistake bad[] = {
            {W("    implementation: ecco\n"), 3, 21, {"ecco", "did you mean \"echo\""}},
            {W("    implementation: q\n"), 3, 21, {"unknown implementation", "djinnbench list"}},
            {W("    implementaton: echo\n"), 3, 5, {"did you mean 'implementation'"}},
            {W("    category: x\n"), 2, 5, {"'implementation' is missing"}},
            {"workloads:\n  - implementation: echo\n", 2, 5, {"'name' is missing"}},
            {W("    implementation: echo\n    params: 5\n"), 4, 13, {"params", "map"}},
            {W("    implementation: echo\n    params:\n      payload_byte: 5\n"),
             5,
             7,
             {"did you mean 'payload_bytes'"}},
            {W("    implementation: echo\n    params:\n      payload_bytes: -1\n"), 5, 22, {"payload_bytes"}},
            {W("    implementation: echo\n    params:\n      payload_bytes: 4K\n"), 5, 22, {"integer", "4K"}},
            {W("    implementation: hf_causal_lm\n"), 2, 5, {"model_id", "missing"}},
            {W("    implementation: hf_causal_lm\n    params:\n      model_id: m\n      new_tokens: -1\n"),
             6,
             19,
             {"new_tokens"}},
            {W("    implementation: hf_causal_lm\n    params:\n      model_id: m\n      generation:\n"
               "        do_sample: true\n"),
             7,
             9,
             {"greedy"}},
            {W("    implementation: synthetic_transformer\n    params:\n      hidden_size: 10\n      num_heads: 3\n"),
             5,
             7,
             {"not a multiple of num_heads"}},
            {"workloads:\n  - name: ../w\n    implementation: echo\n", 2, 11, {"name", "1 to 64"}},
            {"workloads:\n  - name: \"\"\n    implementation: echo\n", 2, 11, {"name"}},
            {"workloads:\n  - name: w\n    implementation: echo\n  - name: w\n    implementation: echo\n",
             4,
             5,
             {"\"w\"", "twice"}},
            {"workloads: echo\n", 1, 12, {"workloads", "a list with at least one entry"}},
            {"workloads: []\n", 1, 12, {"workloads", "a list with at least one entry"}},
            {"workloads:\n  - echo\n", 2, 5, {"a map with name, implementation and params"}},
        };

        refuse_each(bad, ARRAY_LEN(bad), EXP, WORK_AT, BASE);
}

#define B(lines)    "baselines:\n  - name: b\n" lines
#define S(switches) B("    type: full_djinn\n    semantics: {" switches "}\n")
static void baseline_mistakes(void **state)
{
        static const struct mistake bad[] = {
            {B("    type: scaling\n"), 3, 11, {"scaling is refused", "another baseline's", "instead of measuring"}},
            {B("    type: scaling\n    factor: 2\n"), 3, 11, {"scaling is refused"}},
            {B("    type: remote_jinn\n"), 3, 11, {"remote_jinn", "did you mean remote_djinn"}},
            {B("    type: 5\n"), 3, 11, {"unknown"}},
            {B("    typo: full_djinn\n"), 3, 5, {"did you mean 'type'"}},
            {B("    notes: x\n"), 2, 5, {"'type' is missing"}},
            {B("    type: [full_djinn]\n"), 3, 11, {"a text", "a list"}},
            {B("    type: full_djinn\n    semantic_aware: maybe\n"), 4, 21, {"semantic_aware", "true or false"}},
            {B("    type: full_djinn\n    dtype: float16\n"), 4, 12, {"dtype", "float32", "cannot be compared"}},
            {B("    type: full_djinn\n    rpc_timeout_s: [1]\n"), 4, 20, {"rpc_timeout_s", "a single value"}},
            {B("    type: external\n"), 2, 5, {"command", "missing"}},
            {B("    type: external\n    command: prog\n"), 4, 14, {"command", "a list of words"}},
            {B("    type: external\n    command: []\n"), 4, 14, {"command", "a list of words"}},
            {B("    type: external\n    command: [a, [b]]\n"), 4, 18, {"command", "a word"}},
            {B("    type: external\n    command: [a]\n    semantics: {call: step}\n"), 5, 5, {"no switches"}},
            {B("    type: full_djinn\n    command: [a]\n"), 4, 5, {"only a baseline of type external"}},
            {B("    type: full_djinn\n    semantics: aware\n"), 4, 16, {"a map of switches"}},
            {S("colour: blue"), 4, 17, {"unknown key 'colour'"}},
            {S("call: stepp"), 4, 23, {"call", "request, step or op"}},
            {S("state: gone"), 4, 24, {"resident, roundtrip, delta or recompute"}},
            {S("plan_cache: 1"), 4, 29, {"plan_cache", "true or false"}},
            {S("weights: shipped"), 4, 16, {"shipped", "not in this version"}},
            {S("call: op"), 4, 16, {"op", "not in this version"}},
            {S("state: delta"), 4, 16, {"delta needs call: step"}},
            {S("state: roundtrip"), 4, 16, {"roundtrip needs call: step"}},
            {S("outputs: all"), 4, 16, {"all needs call: step"}},
            {S("call: step, state: roundtrip, buffers: serialized"), 4, 16, {"travelling state"}},
            {S("buffers: in process, call: step"), 4, 16, {"in process", "call: request"}},
            {B("    type: native\n    semantics: {call: step}\n"), 4, 16, {"in process", "call: request"}},
            {"baselines:\n  - name: a/b\n    type: full_djinn\n", 2, 11, {"name", "1 to 64"}},
            {"baselines:\n  - name: ..\n    type: full_djinn\n", 2, 11, {"name"}},
            {"baselines:\n  - name: b\n    type: native\n  - name: b\n    type: rpc\n", 4, 5, {"\"b\"", "twice"}},
            {"baselines: {}\n", 1, 12, {"baselines", "list"}},
            {"baselines:\n  - full_djinn\n", 2, 5, {"a map with name and type"}},
        };

        refuse_each(bad, ARRAY_LEN(bad), EXP WORK, BASE_AT, "");
}

/* ---- the file as a whole ---- */

static void broken_yaml(void **state)
{
        static const struct {
                const char *text;
                unsigned line, col;
                const char *words[3];
        } bad[] = {
            {EXP WORK "baselines: [\n", 7, 1, {"not YAML"}},
            {"experiment:\n\tdevice: cpu\n", 2, 1, {"not YAML"}},
            {"experiment: {device: cpu\nworkloads: []\n", 2, 10, {"not YAML"}},
            {"- experiment\n", 1, 1, {"a map with experiment, workloads and baselines"}},
            {"hello\n", 1, 1, {"a map with experiment, workloads and baselines"}},
            {EXP WORK, 1, 1, {"'baselines' is missing"}},
            {EXP BASE, 1, 1, {"'workloads' is missing"}},
            {WORK BASE, 1, 1, {"'experiment' is missing"}},
            {EXP WORK BASE "baseline:\n", 9, 1, {"unknown key 'baseline'", "did you mean 'baselines'"}},
            {EXP WORK BASE "---\n" EXP, 9, 1, {"second document"}},
            {"experiment: !!python/object:os.system {}\n", 1, 13, {"tags"}},
            {"experiment: *nowhere\n", 1, 13, {"nowhere", "anchor"}},
            {"experiment:\n  device: \"a\\0b\"\n", 2, 11, {"NUL"}},
        };

        for (size_t i = 0; i < ARRAY_LEN(bad); i++)
                refused_at(bad[i].text, bad[i].line, bad[i].col, bad[i].words);
}

static void files_that_are_none(void **state)
{
        struct experiment e;
        char big[64];

        assert_int_equal(experiment_load("/nonexistent/x.yaml", &e), -ENOENT);
        assert_sentence("/nonexistent/x.yaml");
        assert_true(experiment_load("/tmp", &e) < 0);
        assert_sentence("/tmp");
        assert_int_equal(load("", &e), -EINVAL);
        assert_sentence("empty");
        snprintf(big, sizeof(big), "/tmp/experiment-big-XXXXXX");
        int fd = mkstemp(big);

        assert_int_equal(ftruncate(fd, 64 << 20), 0);
        close(fd);
        assert_int_equal(experiment_load(big, &e), -EFBIG);
        unlink(big);
        assert_sentence(big);
}

/* Nine levels of nine aliases are 10^9 nodes; what is refused is refused before they are made. */
static void alias_bomb(void **state)
{
        char text[2048] = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n";
        struct experiment e;

        for (int i = 1; i < 10; i++) {
                size_t at = strlen(text);

                at += (size_t)snprintf(text + at, sizeof(text) - at, "a%d: &a%d [", i, i);
                for (int k = 0; k < 9; k++)
                        at += (size_t)snprintf(text + at, sizeof(text) - at, "%s*a%d", k ? ", " : "", i - 1);
                snprintf(text + at, sizeof(text) - at, "]\n");
        }
        assert_int_equal(load(text, &e), -EINVAL);
        assert_sentence("aliases expanded");
        assert_sentence("refused");
}

/* ---- what is right ---- */

static void defaults(void **state)
{
        struct experiment e;

        must(load(EXP WORK BASE, &e));
        assert_string_equal(e.device, "cpu");
        assert_int_equal(e.dtype, DT_F32);
        assert_string_equal(e.tag, "run");
        assert_int_equal(e.runs, 30);
        assert_int_equal(e.warmup_runs, 5);
        assert_int_equal(e.requests_per_block, 1);
        assert_int_equal(e.threads, 0);
        assert_int_equal(e.seed, 0);
        assert_int_equal(e.ntransports, 0);
        assert_null(e.result_dir);
        assert_null(e.server_address);
        assert_string_equal(e.reference_baseline, "native_pytorch");
        assert_string_equal(e.blind_baseline, "semantic_blind");
        assert_string_equal(e.target_baseline, "full_djinn");
        assert_int_equal(e.nworkloads, 1);
        assert_int_equal(e.workloads[0].payload_bytes, 64);
        experiment_free(&e);
}

static void every_key(void **state)
{
        struct experiment e;

        must(load(
            "experiment:\n"
            "  device: \"cuda:0\"\n  dtype: bf16\n  runs: 7\n  warmup_runs: 0\n  tag: A_b-1.2\n"
            "  result_dir: /tmp/r\n  djinn_server_address: \"tcp://h:1\"\n  reference_baseline: n\n"
            "  blind_baseline: s\n  target_baseline: f\n  transports: [tcp, shm]\n  seed: 9007199254740992\n"
            "  requests_per_block: 3\n  threads: 2\n"
            "workloads:\n"
            "  - name: g\n    category: c\n    implementation: hf_causal_lm\n    params:\n"
            "      model_id: \"o/m\"\n      prompt_text: \"hi there\"\n      prompt_length: 12\n      new_tokens: 0\n"
            "      batch_size: 2\n      turns: 3\n      turn_tokens: 4\n      unit_name: tok\n"
            "      generation: {do_sample: false, temperature: 0.0, top_p: 1.0}\n"
            "  - name: t\n    implementation: synthetic_transformer\n    params: {hidden_size: 12, num_heads: 3}\n"
            "baselines:\n"
            "  - {name: n, type: local_synthetic, notes: yardstick}\n"
            "  - {name: f, type: remote_djinn, semantic_aware: true}\n"
            "  - {name: s, type: remote_djinn, semantic_aware: false}\n"
            "  - name: p\n    type: pytorch_rpc\n    rpc_server_name: rpc_server\n    rpc_client_name: c\n"
            "    rpc_timeout_s: 30\n    device: \"cuda:0\"\n    runs: 5\n    warmup_runs: 1\n    dtype: bfloat16\n",
            &e));
        assert_string_equal(e.device, "cuda:0");
        assert_int_equal(e.dtype, DT_BF16);
        assert_int_equal(e.runs, 7);
        assert_int_equal(e.warmup_runs, 0);
        assert_string_equal(e.tag, "A_b-1.2");
        assert_string_equal(e.result_dir, "/tmp/r");
        assert_string_equal(e.server_address, "tcp://h:1");
        assert_string_equal(e.reference_baseline, "n");
        assert_string_equal(e.blind_baseline, "s");
        assert_string_equal(e.target_baseline, "f");
        assert_int_equal(e.ntransports, 2);
        assert_string_equal(e.transports[0], "tcp");
        assert_string_equal(e.transports[1], "shm");
        assert_int_equal(e.seed, 9007199254740992);
        assert_int_equal(e.requests_per_block, 3);
        assert_int_equal(e.threads, 2);
        assert_int_equal(e.nworkloads, 2);
        assert_string_equal(e.workloads[0].model_id, "o/m");
        assert_string_equal(e.workloads[0].category, "c");
        assert_string_equal(e.workloads[0].prompt_text, "hi there");
        assert_int_equal(e.workloads[0].prompt_length, 12);
        assert_int_equal(e.workloads[0].new_tokens, 0);
        assert_int_equal(e.workloads[0].batch_size, 2);
        assert_int_equal(e.workloads[0].turns, 3);
        assert_int_equal(e.workloads[0].turn_tokens, 4);
        assert_string_equal(e.workloads[0].unit_name, "tok");
        assert_int_equal(e.workloads[1].ff_size, 48);
        assert_int_equal(e.nbaselines, 4);
        assert_string_equal(e.baselines[0].notes, "yardstick");
        assert_string_equal(e.baselines[0].def->name, "native_pytorch");
        assert_string_equal(e.baselines[1].def->name, "full_djinn");
        assert_true(e.baselines[1].semantic_aware);
        assert_string_equal(e.baselines[2].def->name, "semantic_blind");
        assert_string_equal(e.baselines[3].def->name, "pytorch_rpc");
        assert_string_equal(e.baselines[3].type, "pytorch_rpc");
        experiment_free(&e);
}

/* Every type of the experiment's runs, or is skipped with a reason that a reader of the table understands. */
static void types_of_the_experiment(void **state)
{
        static const struct {
                const char *line, *def, *reason;
        } types[] = {
            {"type: local_synthetic", "native_pytorch", NULL},
            {"type: native_server\n    base_url: \"http://h:1\"\n    api_key: k", "native_pytorch", NULL},
            {"type: native", "native_pytorch", NULL},
            {"type: remote_djinn\n    server_address: \"h:1\"\n    semantic_aware: true", "full_djinn", NULL},
            {"type: remote_djinn", "semantic_blind", NULL},
            {"type: pytorch_rpc", "pytorch_rpc", NULL},
            {"type: rpc", "pytorch_rpc", NULL},
            {"type: blind_opaque", "blind_opaque", NULL},
            {"type: blind_roundtrip", "blind_roundtrip", NULL},
            {"type: api_remoting", "api_remoting", "call: op"},
            {"type: naive", "naive", "weights: shipped"},
            {"type: ray_actor\n    actor_name: a", NULL, "Ray"},
            {"type: vllm\n    base_url: \"http://h:1\"", NULL, "vLLM"},
            {"type: external\n    command: [prog, --flag, x]", "external", NULL},
            {"type: native_client", NULL, "not in this version"},
        };

        for (size_t i = 0; i < ARRAY_LEN(types); i++) {
                struct experiment e;
                char text[512];

                snprintf(text, sizeof(text), EXP WORK "baselines:\n  - name: b\n    %s\n", types[i].line);
                must(load(text, &e));
                if (types[i].def)
                        assert_string_equal(e.baselines[0].def->name, types[i].def);
                else
                        assert_null(e.baselines[0].def);
                if (!types[i].reason)
                        assert_null(e.baselines[0].skip);
                else if (!e.baselines[0].skip || !strstr(e.baselines[0].skip, types[i].reason))
                        fail_msg("%s: reason \"%s\"", types[i].line, e.baselines[0].skip);
                experiment_free(&e);
        }
        for (size_t i = 0; baseline_types[i]; i++) {
                const char *reason;
                const struct baseline_def *def = baseline_of_type(baseline_types[i], true, &reason);

                assert_true(def || reason);
        }
}

/* The table of SPEC 4. */
static void presets(void **state)
{
        static const struct {
                const char *name;
                struct switches sw;
        } want[] = {
            {"native_pytorch", {SW_RESIDENT, SW_REQUEST, SW_STATE_RESIDENT, SW_TOKEN, SW_IN_PROCESS, true, false}},
            {"full_djinn", {SW_RESIDENT, SW_REQUEST, SW_STATE_RESIDENT, SW_TOKEN, SW_REGISTERED, true, false}},
            {"pytorch_rpc", {SW_RESIDENT, SW_REQUEST, SW_STATE_RECOMPUTE, SW_TOKEN, SW_SERIALIZED, false, false}},
            {"blind_opaque", {SW_RESIDENT, SW_STEP, SW_STATE_RESIDENT, SW_LAST, SW_REGISTERED, true, true}},
            {"semantic_blind", {SW_RESIDENT, SW_STEP, SW_STATE_RECOMPUTE, SW_ALL, SW_REGISTERED, false, true}},
            {"blind_roundtrip", {SW_RESIDENT, SW_STEP, SW_STATE_ROUNDTRIP, SW_ALL, SW_REGISTERED, false, true}},
            {"api_remoting", {SW_RESIDENT, SW_OP, SW_STATE_RESIDENT, SW_ALL, SW_REGISTERED, false, true}},
            {"naive", {SW_SHIPPED, SW_STEP, SW_STATE_ROUNDTRIP, SW_ALL, SW_SERIALIZED, false, true}},
        };

        for (size_t i = 0; i < ARRAY_LEN(want); i++) {
                const struct baseline_def *d = baseline_find(want[i].name);
                const struct switches *a = &want[i].sw, *b = &d->sw;

                assert_non_null(d);
                assert_non_null(d->what);
                if (a->weights != b->weights || a->call != b->call || a->state != b->state ||
                    a->outputs != b->outputs || a->buffers != b->buffers || a->plan_cache != b->plan_cache ||
                    a->blind != b->blind)
                        fail_msg("%s has other switches than SPEC 4", want[i].name);
                assert_int_equal(d->reason != NULL, a->call == SW_OP || a->weights == SW_SHIPPED);
        }
        assert_null(baseline_find("nobody"));
}

static void semantics_are_laid_over_the_preset(void **state)
{
        struct experiment e;

        must(load(EXP WORK "baselines:\n"
                           "  - {name: a, type: full_djinn, semantics: {call: step, state: recompute, outputs: last}}\n"
                           "  - {name: b, type: full_djinn, semantics: {plan_cache: off}}\n"
                           "  - {name: c, type: blind_opaque, semantics: {state: delta}}\n"
                           "  - {name: d, type: full_djinn, semantics: {buffers: serialized}}\n",
                  &e));
        assert_int_equal(e.baselines[0].sw.call, SW_STEP);
        assert_int_equal(e.baselines[0].sw.state, SW_STATE_RECOMPUTE);
        assert_int_equal(e.baselines[0].sw.outputs, SW_LAST);
        assert_true(e.baselines[0].sw.plan_cache);
        assert_false(e.baselines[1].sw.plan_cache);
        assert_int_equal(e.baselines[1].sw.call, SW_REQUEST);
        assert_int_equal(e.baselines[2].sw.state, SW_STATE_DELTA);
        assert_true(e.baselines[2].sw.blind);
        assert_int_equal(e.baselines[3].sw.buffers, SW_SERIALIZED);
        experiment_free(&e);
}

/* A workload whose builder does not exist is parsed, so that the sweep can say why it was skipped. */
static void workloads_for_later(void **state)
{
        struct experiment e;

        must(load(
            EXP
            "workloads:\n  - name: r\n    implementation: hf_vision\n    params: {model_id: x, image_size: 224}\n" BASE,
            &e));
        assert_non_null(e.workloads[0].kind->reason);
        experiment_free(&e);
}

static void configs_of_the_tree(void **state)
{
        static const char *const names[] = {"smoke", "overhead_hf_smoke", "framework_floor"};

        for (size_t i = 0; i < ARRAY_LEN(names); i++) {
                struct experiment e;
                char file[512];

                snprintf(file, sizeof(file), "%s/%s.yaml", CONFIGS, names[i]);
                must(experiment_load(file, &e));
                assert_true(e.nworkloads > 0 && e.nbaselines > 0);
                experiment_free(&e);
        }
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(experiment_mistakes),
            cmocka_unit_test(workload_mistakes),
            cmocka_unit_test(baseline_mistakes),
            cmocka_unit_test(broken_yaml),
            cmocka_unit_test(files_that_are_none),
            cmocka_unit_test(alias_bomb),
            cmocka_unit_test(defaults),
            cmocka_unit_test(every_key),
            cmocka_unit_test(types_of_the_experiment),
            cmocka_unit_test(presets),
            cmocka_unit_test(semantics_are_laid_over_the_preset),
            cmocka_unit_test(workloads_for_later),
            cmocka_unit_test(configs_of_the_tree),
        };

        return cmocka_run_group_tests_name("experiment", tests, NULL, NULL);
}
