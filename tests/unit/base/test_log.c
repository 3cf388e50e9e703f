#include "log.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>

#include "check.h"
#include "unit.h"

/* Runs f with stderr in a pipe and returns what it wrote there in one read. */
static size_t capture(void (*f)(void), char *buf, size_t room)
{
        int pipes[2], saved = dup(STDERR_FILENO);

        assert_int_equal(pipe(pipes), 0);
        dup2(pipes[1], STDERR_FILENO);
        f();
        dup2(saved, STDERR_FILENO);
        close(saved);
        close(pipes[1]);
        ssize_t n = read(pipes[0], buf, room - 1);

        close(pipes[0]);
        assert_true(n >= 0);
        buf[n] = '\0';
        return (size_t)n;
}

static void speak(void)
{
        log_error("e %d", 1);
        log_warn("w");
        log_info("i");
        log_debug("d");
}

static void levels(void **state)
{
        char text[4096];

        log_set_level(LOG_WARN);
        capture(speak, text, sizeof(text));
        assert_string_equal(text, "djinnbench: error: e 1\ndjinnbench: warning: w\n");
        log_set_level(LOG_DEBUG);
        capture(speak, text, sizeof(text));
        assert_non_null(strstr(text, "\ndjinnbench: i\ndjinnbench: debug: d\n"));
}

static void speak_rudely(void)
{
        log_error("peer says \x1b[2J\x07");
}

static void control_characters_do_not_reach_the_terminal(void **state)
{
        char text[256];

        capture(speak_rudely, text, sizeof(text));
        assert_string_equal(text, "djinnbench: error: peer says ?[2J?\n");
}

static void speak_at_length(void)
{
        log_error("%05000d", 0);
}

static void long_lines_are_cut_and_still_end(void **state)
{
        char text[8192];
        size_t n = capture(speak_at_length, text, sizeof(text));

        assert_true(n > 1000 && n <= 2048);
        assert_int_equal(text[n - 1], '\n');
}

static void bug_on_dies_with_place_and_condition(void **state)
{
        int pipes[2], status;
        char text[512];

        assert_int_equal(pipe(pipes), 0);
        pid_t child = fork();

        if (child == 0) {
                signal(SIGABRT, SIG_DFL);
                dup2(pipes[1], STDERR_FILENO);
                BUG_ON(pipes[0] >= 0);
                _exit(0);
        }
        close(pipes[1]);
        ssize_t n = read(pipes[0], text, sizeof(text) - 1);

        close(pipes[0]);
        waitpid(child, &status, 0);
        assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT);
        assert_true(n > 0);
        text[n] = '\0';
        assert_non_null(strstr(text, "pipes[0] >= 0"));
        assert_non_null(strstr(text, "test_log.c:"));
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(levels),
            cmocka_unit_test(control_characters_do_not_reach_the_terminal),
            cmocka_unit_test(long_lines_are_cut_and_still_end),
            cmocka_unit_test(bug_on_dies_with_place_and_condition),
        };

        return cmocka_run_group_tests_name("log", tests, NULL, NULL);
}
