/* A program that speaks lines: what it says arrives; however it fails, it is dead afterwards and we know why. */
#include "client_fixture.h"

#include <sys/stat.h>
#include <sys/wait.h>

#include "child.h"
#include "clock.h"

#define LONG_NS  (60 * NS_PER_S)
#define SHORT_NS (NS_PER_S / 20)

static char folder[] = "/tmp/child-XXXXXX", mark[64];

static int make_folder(void **state)
{
        if (!mkdtemp(folder))
                return -1;
        snprintf(mark, sizeof(mark), "%s/mark", folder);
        return 0;
}

static int remove_folder(void **state)
{
        unlink(mark);
        return rmdir(folder);
}

/* $0 of the script is `mark`, a path where it may leave a file. */
static int start_opts(const char *script, struct child_opts o, struct child **c)
{
        static const char *argv[5];

        argv[0] = "sh", argv[1] = "-c", argv[2] = script, argv[3] = mark, argv[4] = NULL;
        o.name = "row";
        o.argv = argv;
        unlink(mark);
        return child_start(&o, c);
}

static struct child *start(const char *script)
{
        struct child *c;

        must(start_opts(script, (struct child_opts){0}, &c));
        return c;
}

static int ask(struct child *c, const char *key, uint64_t timeout_ns, json **answer)
{
        json *q = json_object();
        int rc;

        json_set_int(q, key, 1);
        rc = child_ask(c, q, timeout_ns, answer, NULL);
        json_free(q);
        return rc;
}

static void assert_no_children(void)
{
        assert_int_equal(waitpid(-1, NULL, WNOHANG), -1);
        assert_int_equal(errno, ECHILD);
}

static void until_marked(void)
{
        struct stat st;
        uint64_t end = clock_ns() + LONG_NS;

        while (stat(mark, &st) < 0 || !st.st_size)
                assert_true(clock_ns() < end);
}

#define REPEAT "while IFS= read -r l; do printf '%s\\n' \"$l\"; done"

static void lines_come_back(void **state)
{
        struct child *c = start(REPEAT);
        json *a;

        for (int i = 0; i < 3; i++) {
                must(ask(c, "hello", LONG_NS, &a));
                assert_true(json_num(json_get(a, "hello"), 0) == 1);
                json_free(a);
        }
        assert_false(child_dead(c));
        child_end(c, LONG_NS);
        assert_no_children();
}

/* Longer than a pipe and than the first buffer, both ways; the wall time is there. */
static void long_lines(void **state)
{
        struct child *c = start(REPEAT);
        json *q = json_object(), *list = json_array(), *a;
        uint64_t wall = 0;

        for (int i = 0; i < 30000; i++)
                json_push(list, json_of_int(123456));
        json_set(q, "list", list);
        must(child_ask(c, q, LONG_NS, &a, &wall));
        assert_int_equal(json_count(json_get(a, "list")), 30000);
        assert_true(wall > 0);
        json_free(a);
        json_free(q);
        child_end(c, LONG_NS);
}

static void no_such_program(void **state)
{
        const char *argv[] = {"/nonexistent/program", NULL};
        struct child_opts o = {.name = "row", .argv = argv};
        struct child *c;

        assert_int_equal(child_start(&o, &c), -ENOENT);
        assert_sentence("row: cannot start /nonexistent/program: No such file");
        assert_null(c);
        assert_no_children();
}

static void failures(void **state)
{
        static const struct {
                const char *script;
                int rc;
                const char *words;
        } cases[] = {
            {"read l; exit 3", -EPIPE, "row: the program ended: exit status 3"},
            {"exit 0", -EPIPE, "exit status 0"},
            {"read l; kill -9 $$", -EPIPE, "killed by signal 9"},
            {"sleep 100 & read l; exit 5", -EPIPE, "exit status 5"}, /* the pipe outlives it */
            {"read l; exec >&-; read m", -EPIPE, "closed its standard output"},
            {"read l; echo loading", -EPROTO, "one JSON object in a line"},
            {"read l; echo '[1]'", -EPROTO, "no object"},
            {"read l; echo", -EPROTO, "one JSON object in a line"},
            {"read l; printf '{}\\n{}\\n'; read m", -EPROTO, "more than one line"},
            {"read l; printf '{\"a\": NaN}\\n'; read m", -EPROTO, "not JSON"},
            {"read l; while :; do printf xxxxxxxxxxxxxxxxxxxxxxxx; done", -EFBIG, "more than 1000 bytes"},
            {"read l; read m", -ETIMEDOUT, "no answer within 0.1 s"},
            {"read l; printf '{\"half\": '; read m", -ETIMEDOUT, "no answer"},
        };

        for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
                bool late = cases[i].rc == -ETIMEDOUT;
                struct child *c;
                json *a;
                int rc;

                must(start_opts(cases[i].script, (struct child_opts){.line_max = 1000}, &c));
                rc = ask(c, "hello", late ? SHORT_NS : LONG_NS, &a);
                if (rc != cases[i].rc)
                        fail_msg("%s: %d instead of %d: %s", cases[i].script, rc, cases[i].rc, err_text());
                assert_sentence(cases[i].words);
                assert_null(a);
                assert_true(child_dead(c));
                assert_no_children();
                assert_int_equal(ask(c, "again", LONG_NS, &a), -EPIPE);
                child_end(c, LONG_NS);
        }
}

/* A question longer than the pipe, to one who does not read it. */
static void nobody_reads(void **state)
{
        static const char *const scripts[] = {"exit 0", "exec <&-; read l < /dev/zero", "sleep 100"};
        json *q = json_object(), *a;
        char *text = calloc(1, 1 << 20);

        memset(text, 'x', (1 << 20) - 1);
        json_set_str(q, "text", text);
        for (size_t i = 0; i < ARRAY_LEN(scripts); i++) {
                struct child *c = start(scripts[i]);
                int rc = child_ask(c, q, SHORT_NS, &a, NULL);

                if (rc != -EPIPE && rc != -ETIMEDOUT)
                        fail_msg("%s: %d: %s", scripts[i], rc, err_text());
                assert_true(i != 2 || rc == -ETIMEDOUT);
                child_end(c, LONG_NS);
        }
        json_free(q);
        free(text);
        assert_no_children();
}

/* An answer that lies there before the question is not taken for one. */
static void speaks_unasked(void **state)
{
        struct child *c = start("printf '{}\\n'; echo spoken > \"$0\"; read l; read m");
        json *a;

        until_marked();
        assert_int_equal(ask(c, "hello", LONG_NS, &a), -EPROTO);
        assert_sentence("without being asked");
        child_end(c, LONG_NS);
        assert_no_children();
}

static void interrupted(void **state)
{
        static const volatile sig_atomic_t stop = 1;
        struct child *c;
        json *a;

        must(start_opts("read l; read m", (struct child_opts){.stop = &stop}, &c));
        assert_int_equal(ask(c, "hello", LONG_NS, &a), -EINTR);
        assert_true(child_dead(c));
        child_end(c, LONG_NS);
        assert_no_children();
}

static bool runs(pid_t pid)
{
        char path[64], text[512] = "", *state;
        FILE *f;

        snprintf(path, sizeof(path), "/proc/%d/stat", (int)pid);
        f = fopen(path, "r");
        if (!f)
                return false;
        (void)!fgets(text, sizeof(text), f);
        fclose(f);
        state = strrchr(text, ')');
        return state && state[2] != 'Z';
}

static void what_it_started_dies_too(void **state)
{
        struct child *c = start("sleep 100 >/dev/null & echo $! > \"$0\"; read l");
        uint64_t end = clock_ns() + LONG_NS;
        int pid = 0;
        FILE *f;

        until_marked();
        f = fopen(mark, "r");
        assert_int_equal(fscanf(f, "%d", &pid), 1);
        fclose(f);
        assert_true(runs(pid));
        child_end(c, LONG_NS);
        while (runs(pid))
                assert_true(clock_ns() < end);
        assert_no_children();
}

static void may_end_by_itself(void **state)
{
        struct child *c = start("read l; cat > /dev/null; echo \"$l\" > \"$0\"");
        json *q = json_object();
        struct stat st;

        must(child_tell(c, q, LONG_NS));
        json_free(q);
        child_end(c, LONG_NS);
        assert_int_equal(stat(mark, &st), 0);
        assert_int_equal(st.st_size, 3);
        assert_no_children();
}

static void is_killed_when_patience_ends(void **state)
{
        uint64_t began = clock_ns();

        child_end(start("trap '' TERM INT; while :; do :; done"), SHORT_NS);
        assert_true(clock_ns() - began >= SHORT_NS);
        assert_no_children();
}

static void runs_where_it_is_told(void **state)
{
        cpu_set_t all, one;
        struct child *c;
        json *a;
        int cpu = 0;

        assert_int_equal(sched_getaffinity(0, sizeof(all), &all), 0);
        while (!CPU_ISSET(cpu, &all))
                cpu++;
        CPU_ZERO(&one);
        CPU_SET(cpu, &one);
        must(start_opts("read l; printf '{\"n\": %d}\\n' $(env -u OMP_NUM_THREADS nproc)",
                        (struct child_opts){.cpus = &one}, &c));
        must(ask(c, "hello", LONG_NS, &a));
        assert_true(json_num(json_get(a, "n"), 0) == 1);
        json_free(a);
        child_end(c, LONG_NS);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(lines_come_back),       cmocka_unit_test(long_lines),
            cmocka_unit_test(no_such_program),       cmocka_unit_test(failures),
            cmocka_unit_test(nobody_reads),          cmocka_unit_test(speaks_unasked),
            cmocka_unit_test(interrupted),           cmocka_unit_test(what_it_started_dies_too),
            cmocka_unit_test(may_end_by_itself),     cmocka_unit_test(is_killed_when_patience_ends),
            cmocka_unit_test(runs_where_it_is_told),
        };

        return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
