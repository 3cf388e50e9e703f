#include <errno.h>

#include "wl_fixture.h"

#include "weights.h"

static char root[64];

static int set_up(void **state)
{
        tmp_dir(root);
        unsetenv("DJINN_MODEL_PATH");
        unsetenv("HF_HUB_CACHE");
        unsetenv("HF_HOME");
        unsetenv("XDG_CACHE_HOME");
        setenv("HOME", "/nonexistent", 1);
        return 0;
}

static int tear_down(void **state)
{
        tmp_gone(root);
        return 0;
}

/* The path found, or NULL with rc. */
static int find(const char *const *roots, size_t n, const char *id, char path[512])
{
        struct model_roots *r;

        must(model_roots_open(roots, n, &r));
        path[0] = 0;
        int fd = model_find(r, id, path, 512);

        model_roots_close(r);
        if (fd >= 0)
                close(fd);
        return fd < 0 ? fd : 0;
}

static int find_here(const char *id, char path[512])
{
        const char *roots[] = {root};

        return find(roots, 1, id, path);
}

static void assert_ends(const char *path, const char *end)
{
        size_t n = strlen(path), m = strlen(end);

        if (n < m || strcmp(path + n - m, end) != 0)
                fail_msg("expected ...%s, found %s", end, path);
}

static void plain_folders(void **state)
{
        char path[512];

        make_dirs(root, "org/name");
        make_dirs(root, "name");
        must(find_here("org/name", path));
        assert_ends(path, "/org/name");
        must(find_here("name", path));
        assert_ends(path, "/name");
        must(find_here("other/name", path));
        assert_ends(path, "/name");
        assert_int_equal(find_here("org/nome", path), -ENOENT);
        assert_sentence("org/nome");
        assert_sentence(root);
}

static void make_hub(const char *base)
{
        char dir[600];

        make_dirs(base, "models--org--name/refs");
        make_dirs(base, "models--org--name/snapshots/abc123");
        make_dirs(base, "models--org--name/snapshots/def456");
        make_dirs(base, "models--org--name/blobs");
        assert_true((size_t)snprintf(dir, sizeof(dir), "%s/models--org--name", base) < sizeof(dir));
        put_text_file(dir, "refs/main", "abc123\n");
        put_text_file(dir, "refs/v2", "def456");
        put_text_file(dir, "blobs/0123", "the blob");
}

static void hub_layout(void **state)
{
        char path[512];

        make_hub(root);
        must(find_here("org/name", path));
        assert_ends(path, "models--org--name/snapshots/abc123");
        must(find_here("org/name@v2", path));
        assert_ends(path, "def456");
        must(find_here("org/name@def456", path));
        assert_ends(path, "def456");
        assert_int_equal(find_here("org/name@v3", path), -ENOENT);
        assert_int_equal(find_here("name", path), -ENOENT);
        /* A revision is asked for: a plain folder has none. */
        make_dirs(root, "org/name");
        must(find_here("org/name@v2", path));
        assert_ends(path, "def456");
        char ref[600];

        snprintf(ref, sizeof(ref), "%s/models--org--name", root);
        put_text_file(ref, "refs/v2", "../../../../etc");
        assert_int_equal(find_here("org/name@v2", path), -EINVAL);
}

static void places_are_searched_in_order(void **state)
{
        char path[512], cache[600], home[600];
        const char *roots[] = {root};

        make_dirs(root, "a/one");
        make_dirs(root, "b/two");
        make_dirs(root, "h/hub");
        make_dirs(root, "home/.cache/huggingface/hub");
        snprintf(path, sizeof(path), "%s/a:%s/b", root, root);
        setenv("DJINN_MODEL_PATH", path, 1);
        must(find(NULL, 0, "one", path));
        must(find(NULL, 0, "two", path));
        unsetenv("DJINN_MODEL_PATH");
        snprintf(cache, sizeof(cache), "%s/h/hub", root);
        make_hub(cache);
        assert_int_equal(find(NULL, 0, "org/name", path), -ENOENT);
        setenv("HF_HUB_CACHE", cache, 1);
        must(find(NULL, 0, "org/name", path));
        unsetenv("HF_HUB_CACHE");
        snprintf(home, sizeof(home), "%s/h", root);
        setenv("HF_HOME", home, 1);
        must(find(NULL, 0, "org/name", path));
        unsetenv("HF_HOME");
        snprintf(home, sizeof(home), "%s/home", root);
        setenv("HOME", home, 1);
        snprintf(cache, sizeof(cache), "%s/home/.cache/huggingface/hub", root);
        make_hub(cache);
        must(find(NULL, 0, "org/name", path));
        make_dirs(root, "org/name");
        must(find(roots, 1, "org/name", path));
        assert_ends(path, "/org/name");
        setenv("DJINN_MODEL_PATH", "/no/such/place", 1);
        struct model_roots *r;

        assert_true(model_roots_open(NULL, 0, &r) < 0);
        assert_sentence("DJINN_MODEL_PATH");
        unsetenv("DJINN_MODEL_PATH");
        assert_true(model_roots_open((const char *[]){"/no/such/root"}, 1, &r) < 0);
        assert_sentence("/no/such/root");
}

static void names_cannot_leave_the_root(void **state)
{
        static const char *const bad[] = {"",        "..",   "../x", "a/..",   "a/../b", "/etc", "a//b", "a/b/c",
                                          ".hidden", "a/.b", "a@",   "a@../x", "a@b/c",  "a b",  "a\n",  "~"};
        char path[512], link[600];

        for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
                if (find_here(bad[i], path) != -EINVAL)
                        fail_msg("\"%s\" was accepted", bad[i]);
        }
        snprintf(link, sizeof(link), "%s/out", root);
        assert_int_equal(symlink("/etc", link), 0);
        assert_int_equal(find_here("out", path), -EXDEV);
        make_dirs(root, "real");
        snprintf(link, sizeof(link), "%s/in", root);
        assert_int_equal(symlink("real", link), 0);
        must(find_here("in", path));
}

static int open_snapshot(void)
{
        char dir[512];

        snprintf(dir, sizeof(dir), "%s/models--org--name/snapshots/abc123", root);
        return open_dir(dir);
}

static void blobs_are_followed_and_nothing_else(void **state)
{
        static const char *const bad[] = {"../../../secret",     "../../blobs/../../secret", "/etc/passwd",
                                          "../../blobs/.hidden", "../../blobs/out",          "../../refs/main"};
        char link[600], *text;
        size_t len;

        make_hub(root);
        put_text_file(root, "secret", "no");
        snprintf(link, sizeof(link), "%s/models--org--name/blobs/out", root);
        assert_int_equal(symlink("/etc/passwd", link), 0);
        snprintf(link, sizeof(link), "%s/models--org--name/snapshots/abc123/file", root);
        assert_int_equal(symlink("../../blobs/0123", link), 0);
        int dir = open_snapshot();

        must(model_file_read(dir, "file", 100, &text, &len));
        assert_string_equal(text, "the blob");
        free(text);
        assert_int_equal(model_file_read(dir, "file", 3, &text, &len), -EFBIG);
        assert_int_equal(model_file_open(dir, "none"), -ENOENT);
        for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
                unlink(link);
                assert_int_equal(symlink(bad[i], link), 0);
                int fd = model_file_open(dir, "file");

                if (fd >= 0)
                        fail_msg("the link to %s was followed", bad[i]);
        }
        close(dir);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test_setup_teardown(plain_folders, set_up, tear_down),
            cmocka_unit_test_setup_teardown(hub_layout, set_up, tear_down),
            cmocka_unit_test_setup_teardown(places_are_searched_in_order, set_up, tear_down),
            cmocka_unit_test_setup_teardown(names_cannot_leave_the_root, set_up, tear_down),
            cmocka_unit_test_setup_teardown(blobs_are_followed_and_nothing_else, set_up, tear_down),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
