#include "files.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>

#include "unit.h"

static char dir[] = "/tmp/test-files-XXXXXX";
static int root;

static void put(const char *name, const char *text, size_t len)
{
        int fd = openat(root, name, O_WRONLY | O_CREAT | O_TRUNC, 0600);

        assert_true(fd >= 0);
        assert_int_equal(write(fd, text, len), len);
        close(fd);
}

static int set_up(void **state)
{
        assert_non_null(mkdtemp(dir));
        root = open(dir, O_RDONLY | O_DIRECTORY);
        return root < 0;
}

static int tear_down(void **state)
{
        char command[128];

        close(root);
        snprintf(command, sizeof(command), "rm -rf %s", dir);
        return system(command);
}

static const char *path(const char *name)
{
        static char buf[256];

        snprintf(buf, sizeof(buf), "%s/%s", dir, name);
        return buf;
}

static void reads_whole_and_ends_with_nul(void **state)
{
        char big[100000], *text;
        size_t len;

        for (size_t i = 0; i < sizeof(big); i++)
                big[i] = (char)(i * 7);
        put("big", big, sizeof(big));
        assert_int_equal(file_read(path("big"), sizeof(big), &text, &len), 0);
        assert_int_equal(len, sizeof(big));
        assert_memory_equal(text, big, len);
        assert_int_equal(text[len], 0);
        free(text);
        put("empty", "", 0);
        assert_int_equal(file_read(path("empty"), 0, &text, &len), 0);
        assert_int_equal(len, 0);
        assert_string_equal(text, "");
        free(text);
}

static void larger_than_the_limit_is_refused(void **state)
{
        char *text;
        size_t len;

        put("ten", "0123456789", 10);
        assert_int_equal(file_read(path("ten"), 9, &text, &len), -EFBIG);
        assert_sentence("/ten: larger than the limit of 9 bytes");
        assert_int_equal(file_read(path("ten"), 10, &text, &len), 0);
        free(text);
}

/* Their size is 0 for fstat. */
static void proc_files_and_pipes_are_read_to_their_end(void **state)
{
        char chunk[3000], *text;
        int pipes[2];
        size_t len;

        assert_int_equal(file_read("/proc/self/status", 1 << 20, &text, &len), 0);
        assert_true(len > 100 && strlen(text) == len);
        free(text);
        memset(chunk, 'p', sizeof(chunk));
        assert_int_equal(pipe(pipes), 0);
        for (int i = 0; i < 5; i++)
                assert_int_equal(write(pipes[1], chunk, sizeof(chunk)), sizeof(chunk));
        close(pipes[1]);
        assert_int_equal(file_read_fd(pipes[0], "pipe", 1 << 20, &text, &len), 0);
        assert_int_equal(len, 15000);
        free(text);
        close(pipes[0]);
}

static void errors_name_the_file(void **state)
{
        char *text;
        size_t len;

        assert_int_equal(file_read(path("absent"), 10, &text, &len), -ENOENT);
        assert_sentence("/absent: cannot open: No such file");
        assert_int_equal(file_read(dir, 10, &text, &len), -EISDIR);
        assert_sentence(dir);
}

static void makes_folders(void **state)
{
        struct stat st;

        assert_int_equal(file_mkdirs(path("a/b//c/")), 0);
        assert_int_equal(stat(path("a/b/c"), &st), 0);
        assert_true(S_ISDIR(st.st_mode));
        assert_int_equal(file_mkdirs(path("a/b/c")), 0);
        assert_int_equal(file_mkdirs("/"), 0);
        put("a/file", "x", 1);
        assert_int_equal(file_mkdirs(path("a/file/d")), -ENOTDIR);
        assert_sentence("a/file");
        assert_int_equal(file_mkdirs(""), -ENOENT);
}

static int try_open(const char *name)
{
        int fd = file_open_beneath(root, name, O_RDONLY);

        if (fd >= 0)
                close(fd);
        return fd < 0 ? fd : 0;
}

static void beneath_stays_beneath(void **state)
{
        assert_int_equal(file_mkdirs(path("hub/snapshots")), 0);
        assert_int_equal(file_mkdirs(path("hub/blobs")), 0);
        put("hub/blobs/0123", "weights", 7);
        assert_int_equal(symlinkat("../blobs/0123", root, "hub/snapshots/model"), 0);
        assert_int_equal(symlinkat("../../../etc/passwd", root, "hub/snapshots/out"), 0);
        assert_int_equal(symlinkat("/etc/passwd", root, "hub/snapshots/absolute"), 0);
        assert_int_equal(symlinkat("/", root, "hub/top"), 0);

        assert_int_equal(try_open("hub/blobs/0123"), 0);
        assert_int_equal(try_open("hub/snapshots/model"), 0); /* out of snapshots/, not out of the root */
        assert_int_equal(try_open("hub"), 0);
        assert_int_equal(try_open("hub/snapshots/out"), -EXDEV);
        assert_sentence("hub/snapshots/out: leads out of its root folder");
        assert_int_equal(try_open("hub/snapshots/absolute"), -EXDEV);
        assert_int_equal(try_open("hub/top/etc/passwd"), -EXDEV);
        assert_int_equal(try_open("../passwd"), -EXDEV);
        assert_int_equal(try_open("hub/../../x"), -EXDEV);
        assert_int_equal(try_open("/etc/passwd"), -EXDEV);
        assert_int_equal(try_open("hub/none"), -ENOENT);
        assert_sentence("hub/none: cannot open");
}

static void a_fifo_is_refused_not_waited_for(void **state)
{
        assert_int_equal(mkfifoat(root, "fifo", 0600), 0);
        assert_int_equal(try_open("fifo"), -EINVAL);
        assert_sentence("fifo: neither a file nor a folder");
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(reads_whole_and_ends_with_nul),
            cmocka_unit_test(larger_than_the_limit_is_refused),
            cmocka_unit_test(proc_files_and_pipes_are_read_to_their_end),
            cmocka_unit_test(errors_name_the_file),
            cmocka_unit_test(makes_folders),
            cmocka_unit_test(beneath_stays_beneath),
            cmocka_unit_test(a_fifo_is_refused_not_waited_for),
        };

        return cmocka_run_group_tests_name("files", tests, set_up, tear_down);
}
