#include "mem_region.h"

#include <errno.h>

#include "unit.h"

static void host_copies_are_done_at_once(void **state)
{
        char memory[64] = {0}, back[8];
        struct mem_region r = mem_host_region(memory, sizeof(memory));
        uint64_t ticket = 99;

        assert_int_equal(r.kind, MEM_HOST);
        assert_int_equal(r.fd, -1);
        assert_true(r.page >= 4096);
        assert_int_equal(r.ops->put_async(&r, 56, "12345678", 8, &ticket), 0);
        assert_int_equal(r.ops->test(&r, ticket), 1);
        assert_memory_equal(memory + 56, "12345678", 8);
        assert_int_equal(r.ops->get_async(&r, 56, back, 8, &ticket), 0);
        assert_memory_equal(back, "12345678", 8);
        assert_int_equal(r.ops->flush(&r), 0);
        assert_int_equal(r.ops->host_register(&r, back, 8), 0);
}

static void a_probe_is_recognised(void **state)
{
        uint64_t memory[8], offset;
        struct mem_region r = mem_host_region(memory, sizeof(memory));
        int fd;

        for (uint64_t i = 0; i < 8; i++)
                memory[i] = mem_probe_word(5, i);
        assert_int_equal(r.ops->check(&r, 0, 64, 5), 1);
        assert_int_equal(r.ops->check(&r, 0, 64, 6), 0);
        assert_int_equal(r.ops->check(&r, 8, 56, 5), 0);
        memory[7]++;
        assert_int_equal(r.ops->check(&r, 0, 64, 5), 0);
        assert_int_equal(r.ops->check(&r, 8, 64, 5), -ERANGE);
        assert_int_equal(r.ops->export_dmabuf(&r, MEM_MAP_DEFAULT, &fd, &offset), -ENOTSUP);
}

static void nothing_outside_is_touched(void **state)
{
        char memory[64];
        struct mem_region r = mem_host_region(memory, sizeof(memory));
        uint64_t ticket;

        assert_int_equal(r.ops->put_async(&r, 60, "12345678", 8, &ticket), -ERANGE);
        assert_int_equal(r.ops->get_async(&r, 65, memory, 0, &ticket), -ERANGE);
        assert_int_equal(r.ops->get_async(&r, SIZE_MAX - 3, memory, 8, &ticket), -ERANGE);
        assert_int_equal(r.ops->put_async(&r, 32, memory, SIZE_MAX - 16, &ticket), -ERANGE);
        assert_int_equal(r.ops->put_async(&r, 64, NULL, 0, &ticket), 0);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(host_copies_are_done_at_once),
            cmocka_unit_test(a_probe_is_recognised),
            cmocka_unit_test(nothing_outside_is_touched),
        };

        return cmocka_run_group_tests_name("mem_region", tests, NULL, NULL);
}
