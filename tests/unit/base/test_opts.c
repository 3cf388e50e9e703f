#include "opts.h"

#include <errno.h>

#include "unit.h"

enum { MD, CSV };
static const char *const formats[] = {"markdown", "csv", NULL};

struct got {
        bool check;
        const char *config;
        int64_t runs;
        double rel;
        uint64_t bytes, wait_ns;
        int format;
        struct opt_list workloads, servers;
        const char *dir;
};

static const struct opt table[] = {
    {.name = "config",
     .metavar = "FILE",
     .type = OPT_STR,
     .offset = offsetof(struct got, config),
     .required = true,
     .help = "what to run"},
    {.name = "workloads",
     .metavar = "W",
     .type = OPT_LIST,
     .offset = offsetof(struct got, workloads),
     .help = "only these"},
    {.name = "server",
     .metavar = "URL",
     .type = OPT_LIST,
     .offset = offsetof(struct got, servers),
     .help = "one per transport"},
    {.name = "runs",
     .metavar = "N",
     .type = OPT_INT,
     .offset = offsetof(struct got, runs),
     .min = 1,
     .max = 1000,
     .preset = "30",
     .help = "blocks"},
    {.name = "rel", .metavar = "X", .type = OPT_NUM, .offset = offsetof(struct got, rel), .help = "a share"},
    {.name = "size",
     .metavar = "BYTES",
     .type = OPT_SIZE,
     .offset = offsetof(struct got, bytes),
     .min = 1,
     .max = 1 << 30,
     .preset = "4K",
     .help = "message size"},
    {.name = "wait",
     .metavar = "TIME",
     .type = OPT_DURATION,
     .offset = offsetof(struct got, wait_ns),
     .preset = "10s",
     .help = "how long"},
    {.name = "format",
     .type = OPT_CHOICE,
     .offset = offsetof(struct got, format),
     .choices = formats,
     .preset = "markdown",
     .help = "of the table"},
    {.name = "check", .type = OPT_FLAG, .offset = offsetof(struct got, check), .help = ".parse only, \"run\" not\\"},
    {.name = "output-dir",
     .also = "outdir",
     .metavar = "DIR",
     .type = OPT_STR,
     .offset = offsetof(struct got, dir),
     .help = "A very long help text that goes on beyond the right edge of the screen and has to be broken into "
             "several lines, each of which begins below the first"},
    {.name = "secret", .type = OPT_FLAG, .offset = offsetof(struct got, check)},
};

static const struct opts_spec spec = {
    .name = "djinnbench sweep",
    .usage = "--config FILE [options]",
    .about = "Runs the sweep.",
    .table = table,
    .count = sizeof(table) / sizeof(table[0]),
    .args_min = 0,
    .args_max = 2,
    .args_what = "at most two files",
};

static struct got got;
static struct opts_parsed parsed;

#define MAX_ARGS 24

/* line is split at single spaces. */
static int parse_with(const struct opts_spec *s, const char *line)
{
        static char buf[512];
        char *argv[MAX_ARGS], *save = NULL;
        int argc = 0;

        opts_free(&spec, &got, &parsed);
        memset(&got, 0, sizeof(got));
        snprintf(buf, sizeof(buf), "%s", line);
        for (char *w = strtok_r(buf, " ", &save); w && argc < MAX_ARGS; w = strtok_r(NULL, " ", &save))
                argv[argc++] = w;
        err_clear();
        return opts_parse(s, argc, argv, &got, &parsed);
}

static int parse(const char *line)
{
        return parse_with(&spec, line);
}

static int tear_down(void **state)
{
        opts_free(&spec, &got, &parsed);
        return 0;
}

static void all_types(void **state)
{
        assert_int_equal(parse("--config a.yaml --runs=7 --rel -2.5e-1 --size 1M --wait 200us --format csv --check "
                               "--output-dir out"),
                         0);
        assert_string_equal(got.config, "a.yaml");
        assert_int_equal(got.runs, 7);
        assert_true(got.rel == -0.25);
        assert_int_equal(got.bytes, 1 << 20);
        assert_int_equal(got.wait_ns, 200000);
        assert_int_equal(got.format, CSV);
        assert_true(got.check);
        assert_string_equal(got.dir, "out");
        assert_int_equal(parsed.nargs, 0);
}

static void presets_and_given(void **state)
{
        assert_int_equal(parse("--config a.yaml --outdir=x"), 0);
        assert_int_equal(got.runs, 30);
        assert_int_equal(got.bytes, 4096);
        assert_true(got.wait_ns == 10000000000ull);
        assert_string_equal(got.dir, "x");
        assert_true(opts_given(&spec, &parsed, "config") && opts_given(&spec, &parsed, "output-dir"));
        assert_false(opts_given(&spec, &parsed, "runs") || opts_given(&spec, &parsed, "check"));
}

static void lists(void **state)
{
        assert_int_equal(
            parse("--workloads a b --config c.yaml --workloads=c --server shm://x --server tcp://y -- p q"), 0);
        assert_int_equal(got.workloads.count, 3);
        assert_string_equal(got.workloads.at[0], "a");
        assert_string_equal(got.workloads.at[1], "b");
        assert_string_equal(got.workloads.at[2], "c");
        assert_int_equal(got.servers.count, 2);
        assert_string_equal(got.servers.at[1], "tcp://y");
        assert_int_equal(parsed.nargs, 2);
        assert_string_equal(parsed.args[0], "p");
        assert_string_equal(parsed.args[1], "q");
}

static void positional_arguments(void **state)
{
        assert_int_equal(parse("one --config c two"), 0);
        assert_int_equal(parsed.nargs, 2);
        assert_string_equal(parsed.args[1], "two");
        assert_int_equal(parse("--config c -- --not-an-option -x"), 0);
        assert_string_equal(parsed.args[0], "--not-an-option");
        assert_string_equal(parsed.args[1], "-x");
        assert_int_equal(parse("- --config -"), 0);
        assert_string_equal(parsed.args[0], "-");
        assert_string_equal(got.config, "-");
        assert_int_equal(parse("--config c 1 2 3"), -EINVAL);
        assert_sentence("one argument too many: '3'; expected at most two files");
        struct opts_spec strict = spec;

        strict.args_min = 2;
        strict.args_what = "two files";
        assert_int_equal(parse_with(&strict, "--config c 1"), -EINVAL);
        assert_sentence("djinnbench sweep: expected two files, got 1");
        strict.args_min = strict.args_max = 0;
        assert_int_equal(parse_with(&strict, "--config c 1"), -EINVAL);
        assert_sentence("unexpected argument '1'");
}

static void mistakes_are_explained(void **state)
{
        static const struct {
                const char *line, *words;
        } bad[] = {
            {"--confg c", "unknown option --confg; did you mean --config?"},
            {"--confg=c", "did you mean --config?"},
            {"-config c", "did you mean --config?"},
            {"--output_dir c", "did you mean --output-dir?"},
            {"--zzzzzz", "unknown option --zzzzzz; 'djinnbench sweep --help' lists them"},
            {"--secre", "lists them"},
            {"-x", "unknown option -x"},
            {"--", "--config FILE is missing"},
            {"", "--config FILE is missing"},
            {"--config a --config b", "--config is given twice"},
            {"--config a --outdir b --output-dir c", "--output-dir is given twice"},
            {"--config", "--config needs a value: FILE"},
            {"--config --check", "--config needs a value"},
            {"--config c --workloads --check", "--workloads needs a value: W"},
            {"--config c --check=yes", "--check takes no value"},
            {"--config c --runs 0", "--runs: 0 is out of range; expected 1 to 1000"},
            {"--config c --runs ten", "--runs: expected an integer, not 'ten'"},
            {"--config c --runs 5x", "expected an integer"},
            {"--config c --runs=", "expected an integer"},
            {"--config c --runs 99999999999999999999", "does not fit"},
            {"--config c --rel x", "--rel: expected a number"},
            {"--config c --rel nan", "expected a number"},
            {"--config c --size 4Q", "--size: expected a size such as"},
            {"--config c --size -4", "expected a size"},
            {"--config c --size 2G", "--size: 2G is out of range; expected 1 to 1073741824 bytes"},
            {"--config c --wait 5parsecs", "--wait: expected a duration such as"},
            {"--config c --wait s", "expected a duration"},
            {"--config c --format xml", "--format: expected one of markdown|csv, not 'xml'"},
        };

        for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
                if (parse(bad[i].line) != -EINVAL)
                        fail_msg("accepted: %s", bad[i].line);
                assert_sentence(bad[i].words);
        }
}

static void sizes_and_durations(void **state)
{
        uint64_t v;

        assert_int_equal(opts_size("1.5K", "x", &v), 0);
        assert_int_equal(v, 1536);
        assert_int_equal(opts_size("64", "x", &v), 0);
        assert_int_equal(v, 64);
        assert_int_equal(opts_size("2MiB", "x", &v), 0);
        assert_int_equal(v, 2 << 20);
        assert_int_equal(opts_size("9T", "x", &v), 0);
        assert_true(v == 9ull << 40);
        assert_int_equal(opts_size("9999999999T", "the size", &v), -EINVAL);
        assert_sentence("the size");
        assert_int_equal(opts_size("", "x", &v), -EINVAL);
        assert_int_equal(opts_size(".", "x", &v), -EINVAL);
        assert_int_equal(opts_size("1e3", "x", &v), -EINVAL);
        assert_int_equal(opts_size("0x10", "x", &v), -EINVAL);
        assert_int_equal(opts_duration("1.5s", "x", &v), 0);
        assert_true(v == 1500000000ull);
        assert_int_equal(opts_duration("3", "x", &v), 0);
        assert_true(v == 3000000000ull);
        assert_int_equal(opts_duration("2m", "x", &v), 0);
        assert_true(v == 120000000000ull);
        assert_int_equal(opts_duration("7ns", "x", &v), 0);
        assert_int_equal(v, 7);
}

static void help_is_asked_for(void **state)
{
        assert_int_equal(parse("--nonsense -h"), 0);
        assert_true(parsed.help);
        assert_int_equal(parse("--help"), 0);
        assert_true(parsed.help);
        assert_int_equal(parse("--config c -- -h"), 0);
        assert_false(parsed.help);
}

static char *printed(void (*print)(FILE *, const struct opts_spec *))
{
        char *text = NULL;
        size_t len;
        FILE *f = open_memstream(&text, &len);

        print(f, &spec);
        fclose(f);
        return text;
}

static void help_screen(void **state)
{
        char *text = printed(opts_help), *save = NULL;

        assert_non_null(strstr(text, "Usage: djinnbench sweep --config FILE [options]\n\nRuns the sweep.\n\n"));
        assert_non_null(strstr(text, "  --config FILE         what to run\n"));
        assert_non_null(strstr(text, "  --runs N              blocks (default 30)\n"));
        assert_non_null(strstr(text, "  --workloads W...      only these\n"));
        assert_non_null(
            strstr(text, "  --format markdown|csv\n                        of the table (default markdown)"));
        assert_null(strstr(text, "secret"));
        for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
                assert_true(strlen(line) < 80);
                assert_true(line[strlen(line) - 1] != ' ');
        }
        free(text);
}

static void man_page(void **state)
{
        char *text = printed(opts_man);

        assert_memory_equal(text, ".Bl -tag -width Ds\n.It Fl Fl config Ar \"\\&FILE\"\n\\&what to run\n", 60);
        assert_non_null(strstr(text, ".It Fl Fl runs Ar \"\\&N\"\n\\&blocks (default \\&30)\n"));
        assert_non_null(strstr(text, ".It Fl Fl check\n\\&.parse only, \\(dqrun\\(dq not\\e\n"));
        assert_non_null(strstr(text, "\n.El\n"));
        assert_null(strstr(text, "secret"));
        free(text);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(all_types),
            cmocka_unit_test(presets_and_given),
            cmocka_unit_test(lists),
            cmocka_unit_test(positional_arguments),
            cmocka_unit_test(mistakes_are_explained),
            cmocka_unit_test(sizes_and_durations),
            cmocka_unit_test(help_is_asked_for),
            cmocka_unit_test(help_screen),
            cmocka_unit_test(man_page),
        };

        return cmocka_run_group_tests_name("opts", tests, NULL, tear_down);
}
