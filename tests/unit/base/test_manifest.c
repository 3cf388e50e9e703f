#include "manifest.h"

#include "unit.h"

static void says_where_it_was(void **state)
{
        static const char *const keys[] = {"host",         "boot_id", "kernel", "cpu",
                                           "memory_bytes", "clock",   "build",  "when"};
        json *m = manifest_host();
        const json *cpu = json_get(m, "cpu"), *build = json_get(m, "build"), *clock = json_get(m, "clock");

        for (size_t i = 0; i < sizeof(keys) / sizeof(keys[0]); i++)
                assert_non_null(json_get(m, keys[i]));
        assert_true(json_num(json_get(cpu, "cores_online"), 0) >= 1);
        assert_non_null(json_get(cpu, "model"));
        assert_non_null(json_get(cpu, "governor"));
        assert_non_null(json_get(cpu, "smt"));
        assert_non_null(json_get(cpu, "numa_nodes"));
        assert_true(json_num(json_get(m, "memory_bytes"), 0) > 1e6);
        assert_true(json_num(json_get(clock, "cost_ns"), 0) > 0);
        assert_non_null(strstr(json_str(json_get(build, "options"), ""), "b_sanitize="));
        assert_true(strlen(json_str(json_get(build, "compiler"), "")) > 3);
        assert_string_equal(json_str(json_get(build, "version"), ""), manifest_version());
        assert_string_equal(json_str(json_get(build, "commit"), ""), manifest_commit());
        assert_true(strlen(manifest_commit()) >= 7);
        assert_int_equal(strlen(json_str(json_get(m, "when"), "")), 20);
        json_free(m);
}

/* Both forms come from the same file, and a second look sees the same kernel. */
static void boot_id_is_one(void **state)
{
        uint64_t a[2], b[2];
        char hex[33], plain[33] = "";
        json *m = manifest_host();
        const char *text = json_str(json_get(m, "boot_id"), NULL);

        manifest_boot_id(a);
        manifest_boot_id(b);
        assert_memory_equal(a, b, sizeof(a));
        for (size_t at = 0; text && *text; text++)
                if (*text != '-' && at < 32)
                        plain[at++] = *text;
        snprintf(hex, sizeof(hex), "%016llx%016llx", (unsigned long long)a[0], (unsigned long long)a[1]);
        if (plain[0])
                assert_string_equal(hex, plain);
        json_free(m);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(says_where_it_was),
            cmocka_unit_test(boot_id_is_one),
        };

        return cmocka_run_group_tests_name("manifest", tests, NULL, NULL);
}
