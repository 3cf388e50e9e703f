#include "conf.h"

#include <errno.h>

#include "clock.h"
#include "unit.h"

static struct conf_doc *parse(const char *text)
{
        struct conf_doc *doc = NULL;
        int rc = conf_parse(text, strlen(text), "x.yaml", &doc);

        if (rc < 0)
                fail_msg("%s", err_text());
        return doc;
}

/* Refused, with these words; a text that begins "x.yaml:L:C:" checks the place too. */
static void refused(const char *text, const char *words)
{
        struct conf_doc *doc = NULL;

        err_clear();
        int rc = conf_parse(text, strlen(text), "x.yaml", &doc);

        if (rc == 0) {
                conf_free(doc);
                fail_msg("accepted: %s", text);
        }
        assert_null(doc);
        assert_sentence("x.yaml");
        assert_sentence(words);
}

static void tree(void **state)
{
        struct conf_doc *doc = parse("# question\n"
                                     "experiment:\n"
                                     "  runs: 5\n"
                                     "  tag: \"a: b\"\n"
                                     "workloads:\n"
                                     "  - name: one\n"
                                     "  - [1, 2]\n");
        const struct conf_node *root = conf_root(doc), *exp = conf_get(root, "experiment");
        const struct conf_node *list = conf_get(root, "workloads");

        assert_int_equal(root->kind, CONF_MAP);
        assert_int_equal(root->count, 2);
        assert_int_equal(exp->kind, CONF_MAP);
        assert_int_equal(exp->key_line, 2);
        assert_int_equal(exp->line, 3);
        assert_string_equal(conf_get(exp, "runs")->text, "5");
        assert_true(conf_get(exp, "runs")->plain);
        assert_int_equal(conf_get(exp, "runs")->line, 3);
        assert_int_equal(conf_get(exp, "runs")->col, 9);
        assert_string_equal(conf_get(exp, "tag")->text, "a: b");
        assert_false(conf_get(exp, "tag")->plain);
        assert_int_equal(list->kind, CONF_LIST);
        assert_int_equal(list->count, 2);
        assert_string_equal(list->first->first->text, "one");
        assert_null(list->first->key);
        assert_int_equal(list->first->next->count, 2);
        assert_string_equal(list->file, "x.yaml");
        assert_null(conf_get(root, "absent"));
        assert_null(conf_get(list, "x"));
        conf_free(doc);
}

static void broken_yaml_names_the_place(void **state)
{
        refused("a: [1, 2\nb: 3\n", "x.yaml:2:");
        refused("a: 1\n b: 2\n", "x.yaml:2:3: not YAML");
        refused("a: \"abc\n", "x.yaml:2:1: not YAML");
        refused("a: 1\n\tb: 2\n", "x.yaml:2:1: not YAML");
        refused("{", "not YAML");
        refused("a: 'x\n", "not YAML");
        refused("a: \xff\xfe\n", "x.yaml:1:4: not YAML");
        refused("ok: 1\nb: \x01\n", "x.yaml:2:4: not YAML: control");
        refused("a: @x\n", "x.yaml:1:4: not YAML");
        refused("", "x.yaml:1:1: the file is empty");
        refused("# only a comment\n", "the file is empty");
}

static void what_yaml_has_and_we_have_not(void **state)
{
        refused("a: 1\n---\nb: 2\n", "x.yaml:2:1: a second document");
        refused("a: !!int 5\n", "x.yaml:1:4: tags");
        refused("a: !python/object:os.system {x: 1}\n", "x.yaml:1:4: tags");
        refused("a: !x [1]\n", "tags");
        refused("base: &b {x: 1}\nd:\n  <<: *b\n", "x.yaml:3:3: merge keys");
        refused("? [a, b]\n: 1\n", "a key must be a plain word");
        refused("? {a: b}\n: 1\n", "a key must be a plain word");
        refused("a: &k x\n*k : 1\n", "x.yaml:2:1: a key must be a plain word");
        refused("&k a: 1\n", "not allowed on a key");
        refused("\"\": 1\n", "a key is missing");
        refused(": 1\n", "not YAML");
        refused("a: \"x\\0y\"\n", "x.yaml:1:4: a NUL character");
        refused("\"x\\0y\": 1\n", "a NUL character");
}

static void duplicates_are_refused(void **state)
{
        refused("a: 1\nb: 2\na: 3\n", "x.yaml:3:1: 'a' is given twice; first in line 1");
        refused("e:\n  runs: 1\n  tag: x\n  runs: 2\n", "x.yaml:4:3: 'runs' is given twice; first in line 2");
        refused("{a: 1, \"a\": 2}", "x.yaml:1:8: 'a' is given twice");
        conf_free(parse("a: {x: 1}\nb: {x: 1}\n"));
}

static void aliases_are_expanded(void **state)
{
        struct conf_doc *doc = parse("base: &b {runs: 7, list: [1, 2]}\n"
                                     "one: *b\n"
                                     "many: [*b, *b]\n"
                                     "word: &w hello\n"
                                     "again: *w\n");
        const struct conf_node *root = conf_root(doc), *one = conf_get(root, "one");

        assert_string_equal(conf_get(one, "runs")->text, "7");
        assert_int_equal(conf_get(one, "list")->count, 2);
        assert_int_equal(one->key_line, 2);
        assert_int_equal(one->line, 1); /* where its values are written */
        assert_int_equal(conf_get(root, "many")->count, 2);
        assert_string_equal(conf_get(conf_get(root, "many")->first->next, "runs")->text, "7");
        assert_null(conf_get(root, "many")->first->key);
        assert_string_equal(conf_get(root, "again")->text, "hello");
        conf_free(doc);
        doc = parse("a: &x 1\nb: *x\nc: &x 2\nd: *x\n"); /* defined again: the latest */
        assert_string_equal(conf_get(conf_root(doc), "b")->text, "1");
        assert_string_equal(conf_get(conf_root(doc), "d")->text, "2");
        conf_free(doc);
        refused("a: *none\n", "x.yaml:1:4: alias *none");
        refused("a: &a [1, *a]\n", "x.yaml:1:11: alias *a"); /* part of itself */
}

/* The text of `depth` lists, each of ten aliases of the one before. */
static const char *bomb(int depth)
{
        static char text[8192];
        size_t at = (size_t)sprintf(text, "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");

        for (int i = 1; i <= depth; i++) {
                at += (size_t)sprintf(text + at, "a%d: &a%d [", i, i);
                for (int k = 0; k < 10; k++)
                        at += (size_t)sprintf(text + at, "%s*a%d", k ? ", " : "", i - 1);
                at += (size_t)sprintf(text + at, "]\n");
        }
        return text;
}

static void an_alias_bomb_is_refused_quickly(void **state)
{
        const char *text = bomb(20);
        uint64_t start = clock_cpu_ns();

        refused(text, "x.yaml:5:");
        assert_sentence("more than 100000 values");
        assert_true(clock_cpu_ns() - start < NS_PER_S);
        conf_free(parse(bomb(3))); /* 10^4 values are no bomb */
}

/* Each level is one list around an alias: few nodes, but a chain that recursion would follow. */
static void deep_alias_chains_are_refused(void **state)
{
        char text[8192];
        size_t at = (size_t)sprintf(text, "a0: &a0 x\n");

        for (int i = 1; i <= 200; i++)
                at += (size_t)sprintf(text + at, "a%d: &a%d [*a%d]\n", i, i, i - 1);
        refused(text, "nested more than 64");
}

static void deep_nesting_is_refused(void **state)
{
        enum { DEEP = 1 << 20 };
        char *text = malloc(DEEP + 1);

        memset(text, '[', DEEP);
        text[DEEP] = '\0';
        uint64_t start = clock_cpu_ns();

        refused(text, "x.yaml:1:");
        text[65] = '\0';
        refused(text, "x.yaml:1:65: nested more than 64 levels");
        memset(text + 60, ']', 60); /* 60 deep is fine */
        text[120] = '\0';
        conf_free(parse(text));
        for (int i = 0; i + 1 < DEEP; i += 2)
                memcpy(text + i, "- ", 2);
        text[DEEP] = '\0';
        refused(text, "x.yaml:1:");
        assert_true(clock_cpu_ns() - start < 2 * NS_PER_S);
        free(text);
}

static void size_is_bounded(void **state)
{
        enum { BIG = (1 << 20) + 1 };
        char *text = malloc(BIG + 1);

        memset(text, '#', BIG);
        text[BIG] = '\0';
        refused(text, "larger than the limit of 1048576 bytes");
        for (size_t at = 0; at + 8 <= BIG; at += 8) { /* 131 000 keys; sorting them finds the same ones fast */
                char line[16];

                snprintf(line, sizeof(line), "%05zx: \n", at / 8 % 90000);
                memcpy(text + at, line, 8);
        }
        text[90001 * 8] = '\0';
        uint64_t start = clock_cpu_ns();

        refused(text, "x.yaml:90001:1: '00000' is given twice; first in line 1");
        assert_true(clock_cpu_ns() - start < 2 * NS_PER_S);
        free(text);
}

/* ---- binding ---- */

enum colour { RED, GREEN, BLUE };
static const char *const colours[] = {"red", "green", "blue", NULL};

struct bound {
        const char *tag, *name;
        int64_t runs, any;
        double rate;
        bool check;
        int colour;
        const struct conf_node *params;
};

static const struct conf_field fields[] = {
    {.key = "tag", .type = CONF_T_STR, .offset = offsetof(struct bound, tag)},
    {.key = "name", .type = CONF_T_NAME, .offset = offsetof(struct bound, name), .required = true, .help = "of it"},
    {.key = "runs", .type = CONF_T_INT, .offset = offsetof(struct bound, runs), .min = 1, .max = 1000},
    {.key = "any", .type = CONF_T_INT, .offset = offsetof(struct bound, any)},
    {.key = "rate", .type = CONF_T_NUM, .offset = offsetof(struct bound, rate), .min = 0, .max = 1},
    {.key = "check", .type = CONF_T_BOOL, .offset = offsetof(struct bound, check)},
    {.key = "colour", .type = CONF_T_ENUM, .offset = offsetof(struct bound, colour), .choices = colours},
    {.key = "params", .type = CONF_T_NODE, .offset = offsetof(struct bound, params)},
    {.key = "rpc_server_name", .type = CONF_T_ECHO},
};

static int bind_text(const char *text, struct bound *out)
{
        static struct conf_doc *doc;

        conf_free(doc); /* the strings of the last one are still read by the caller */
        doc = NULL;
        if (!text)
                return 0;
        doc = parse(text);
        *out = (struct bound){.runs = 5, .rate = 0.5, .tag = "default", .colour = GREEN};
        return conf_bind(conf_root(doc), fields, sizeof(fields) / sizeof(fields[0]), out);
}

static void binds(void **state)
{
        struct bound b;

        assert_int_equal(bind_text("name: gpt-2_x.1\nruns: 20\nany: -9223372036854775808\nrate: 2.5e-1\ncheck: on\n"
                                   "colour: blue\nparams: {x: 1}\nrpc_server_name: worker\ntag: 5\n",
                                   &b),
                         0);
        assert_string_equal(b.name, "gpt-2_x.1");
        assert_int_equal(b.runs, 20);
        assert_true(b.any == INT64_MIN);
        assert_true(b.rate == 0.25 && b.check && b.colour == BLUE);
        assert_string_equal(conf_get(b.params, "x")->text, "1");
        assert_string_equal(b.tag, "5");
        bind_text(NULL, &b);
}

static void absent_and_null_keep_the_default(void **state)
{
        struct bound b;

        assert_int_equal(bind_text("name: a\nruns: ~\nrate:\ntag: null\ncolour: NULL\nparams:\n", &b), 0);
        assert_int_equal(b.runs, 5);
        assert_true(b.rate == 0.5 && b.colour == GREEN && !b.check && !b.params);
        assert_string_equal(b.tag, "default");
        assert_int_equal(bind_text("name: a\ntag: \"null\"\n", &b), 0);
        assert_string_equal(b.tag, "null"); /* quoted: a text */
        bind_text(NULL, &b);
}

static void misfits_are_explained(void **state)
{
        static const struct {
                const char *text, *words;
        } bad[] = {
            {"name: a\nrun: 5\n", "x.yaml:2:1: unknown key 'run'; did you mean 'runs'?"},
            {"name: a\nparms:\n  x: 1\n", "x.yaml:2:1: unknown key 'parms'; did you mean 'params'?"},
            {"name: a\nRate: 1\n", "did you mean 'rate'?"},
            {"name: a\nrpc-server-nam: 1\n", "did you mean 'rpc_server_name'?"},
            {"name: a\nxyzzy: 1\n", "x.yaml:2:1: unknown key 'xyzzy'"},
            {"runs: 5\n", "x.yaml:1:1: 'name' is missing (of it)"},
            {"name: ~\n", "'name' is missing"},
            {"name: a\nruns: -3\n", "x.yaml:2:7: runs: -3 is out of range; expected 1 to 1000"},
            {"name: a\nruns: 1001\n", "expected 1 to 1000"},
            {"name: a\nruns: five\n", "x.yaml:2:7: runs: expected an integer, not 'five'"},
            {"name: a\nruns: \"5\"\n", "expected an integer, not the quoted text \"5\""},
            {"name: a\nruns: 5.0\n", "expected an integer"},
            {"name: a\nruns: 0x10\n", "expected an integer"},
            {"name: a\nruns: [5]\n", "x.yaml:2:7: runs: expected an integer, not a list"},
            {"name: a\nruns: {a: 5}\n", "not a map"},
            {"name: a\nany: 9223372036854775808\n", "out of range"},
            {"name: a\nrate: 1.5\n", "rate: 1.5 is out of range; expected 0 to 1"},
            {"name: a\nrate: .nan\n", "expected a number, not '.nan'"},
            {"name: a\nrate: inf\n", "expected a number"},
            {"name: a\nrate: 1e999\n", "out of range"},
            {"name: a\nrate: 1.2.3\n", "expected a number"},
            {"name: a\ncheck: maybe\n", "check: expected true or false, not 'maybe'"},
            {"name: a\ncheck: 1\n", "expected true or false"},
            {"name: a\ncheck: \"true\"\n", "expected true or false"},
            {"name: a\ncolour: pink\n", "x.yaml:2:9: colour: expected red, green or blue, not 'pink'"},
            {"name: a\ntag: [x]\n", "tag: expected a text, not a list"},
            {"name: a\nrpc_server_name: {x: 1}\n", "expected a single value, not a map"},
            {"name: ../a\n", "name: expected a name of 1 to 64"},
            {"- name: a\n", "x.yaml:1:1: this entry: expected a map"},
        };
        struct bound b;

        for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
                if (bind_text(bad[i].text, &b) != -EINVAL)
                        fail_msg("accepted: %s", bad[i].text);
                assert_sentence(bad[i].words);
        }
        bind_text(NULL, &b);
}

static void names(void **state)
{
        char longest[66];

        memset(longest, 'a', 65);
        longest[65] = '\0';
        assert_false(conf_name_ok(longest));
        longest[64] = '\0';
        assert_true(conf_name_ok(longest));
        assert_true(conf_name_ok("A-b_c.9") && conf_name_ok("-"));
        assert_false(conf_name_ok("") || conf_name_ok(".") || conf_name_ok("..") || conf_name_ok(".hidden"));
        assert_false(conf_name_ok("a/b") || conf_name_ok("a b") || conf_name_ok("a\n") || conf_name_ok("\xc3\xa9"));
}

static void nearest(void **state)
{
        static const char *const known[] = {"tcp", "shm", "rdma", "dpdk", "loop", "requests_per_block", NULL};
        char giant[300];

        assert_string_equal(conf_nearest("tpc", known), "tcp");
        assert_string_equal(conf_nearest("SHM", known), "shm");
        assert_string_equal(conf_nearest("rmda", known), "rdma");
        assert_string_equal(conf_nearest("requests-per-bloc", known), "requests_per_block");
        assert_null(conf_nearest("quantum", known));
        assert_null(conf_nearest("", known));
        assert_null(conf_nearest("x", known));
        memset(giant, 'r', sizeof(giant));
        giant[299] = '\0';
        assert_null(conf_nearest(giant, known));
}

static void loads_files(void **state)
{
        char path[] = "/tmp/test-conf-XXXXXX";
        int fd = mkstemp(path);
        struct conf_doc *doc;

        assert_int_equal(write(fd, "a: 1\n", 5), 5);
        assert_int_equal(conf_load(path, &doc), 0);
        assert_string_equal(conf_root(doc)->file, path);
        conf_free(doc);
        assert_int_equal(write(fd, "a: 2\n", 5), 5);
        assert_int_equal(conf_load(path, &doc), -EINVAL);
        assert_sentence(path);
        assert_sentence(":2:1: 'a' is given twice");
        assert_int_equal(ftruncate(fd, (1 << 20) + 1), 0);
        assert_int_equal(conf_load(path, &doc), -EFBIG);
        close(fd);
        unlink(path);
        assert_int_equal(conf_load(path, &doc), -ENOENT);
        assert_sentence("cannot open");
}

/* Every one-byte change of a document either parses or is refused with its place. */
static void changed_documents_harm_nobody(void **state)
{
        static const char good[] =
            "a: &x [1, 'two', \"\\u20ac\"]\nb: {c: *x, d: ~}\nlist:\n  - |\n    text\n  - >-\n    f\n";
        char text[sizeof(good)];

        for (size_t at = 0; at + 1 < sizeof(good); at++) {
                for (int c = 0; c < 256; c++) {
                        struct conf_doc *doc = NULL;

                        memcpy(text, good, sizeof(good));
                        text[at] = (char)c;
                        err_clear();
                        int rc = conf_parse(text, sizeof(good) - 1, "x.yaml", &doc);

                        assert_true((rc == 0) == (doc != NULL));
                        if (rc < 0)
                                assert_sentence("x.yaml:");
                        conf_free(doc);
                }
        }
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(tree),
            cmocka_unit_test(broken_yaml_names_the_place),
            cmocka_unit_test(what_yaml_has_and_we_have_not),
            cmocka_unit_test(duplicates_are_refused),
            cmocka_unit_test(aliases_are_expanded),
            cmocka_unit_test(an_alias_bomb_is_refused_quickly),
            cmocka_unit_test(deep_alias_chains_are_refused),
            cmocka_unit_test(deep_nesting_is_refused),
            cmocka_unit_test(size_is_bounded),
            cmocka_unit_test(binds),
            cmocka_unit_test(absent_and_null_keep_the_default),
            cmocka_unit_test(misfits_are_explained),
            cmocka_unit_test(names),
            cmocka_unit_test(nearest),
            cmocka_unit_test(loads_files),
            cmocka_unit_test(changed_documents_harm_nobody),
        };

        return cmocka_run_group_tests_name("conf", tests, NULL, NULL);
}
