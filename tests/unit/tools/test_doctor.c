/* doctor's rules that need no host: distances, ACS, MTUs, lists, lines, and GIDs of a port that is made of files. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "check.h"
#include "doctor_inside.h"
#include "files.h"
#include "prng.h"

/* doctor.c's, which asks the build. */
const char *doctor_no_device(const char *name)
{
        return "not here";
}

/* ---- pure ---- */

#define AT "pci0000:15/0000:15:01.0/0000:16:00.0/0000:17:01.0/0000:19:00.0"

static void test_distance(void **state)
{
        static const struct {
                const char *where;
                int numa_a, numa_b;
                long nodes;
                enum doctor_distance want;
        } cases[] = {
            {"pci0000:15/0000:15:01.0/0000:16:00.0/0000:17:00.0/0000:18:00.0", 0, 0, 2, NEAR_PIX},
            {"pci0000:15/0000:15:01.0/0000:16:00.0/0000:17:01.0/0000:19:00.1", 0, 0, 2, NEAR_PIX},
            {"pci0000:15/0000:15:01.0/0000:20:00.0/0000:21:00.0/0000:22:00.0", 0, 0, 2, NEAR_PXB},
            {"pci0000:15/0000:15:02.0/0000:20:00.0", 0, 0, 2, NEAR_PHB},
            {"pci0000:15/0000:15:01.1/0000:20:00.0", 0, 0, 2, NEAR_PHB},
            {"pci0000:1/0000:15:01.0/0000:20:00.0", 0, 0, 2, NEAR_NODE},
            {"pci0000:40/0000:40:02.0", 0, 1, 2, NEAR_SYS},
            {"pci0000:40/0000:40:02.0", -1, -1, 1, NEAR_NODE},
            {"pci0000:40/0000:40:02.0", -1, 1, 2, NEAR_UNKNOWN},
            {"", 0, 0, 2, NEAR_UNKNOWN},
        };

        for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
                assert_int_equal(doctor_distance(AT, cases[i].numa_a, cases[i].where, cases[i].numa_b, cases[i].nodes),
                                 cases[i].want);
                assert_int_equal(doctor_distance(cases[i].where, cases[i].numa_b, AT, cases[i].numa_a, cases[i].nodes),
                                 cases[i].want);
        }
}

static void put_cap(uint8_t *config, size_t at, uint16_t id, size_t next, uint16_t control)
{
        uint32_t head = id | 1u << 16 | (uint32_t)next << 20;

        for (int i = 0; i < 4; i++)
                config[at + (size_t)i] = (uint8_t)(head >> 8 * i);
        config[at + 6] = (uint8_t)control;
        config[at + 7] = (uint8_t)(control >> 8);
}

static void test_acs(void **state)
{
        uint8_t config[4096] = {0};

        assert_int_equal(doctor_acs_bits(config, sizeof(config)), -1);
        assert_int_equal(doctor_acs_bits(config, 64), -2);
        assert_int_equal(doctor_acs_bits(config, 0), -2);
        put_cap(config, 0x100, 1, 0x148, 0xffff);
        put_cap(config, 0x148, 0xd, 0, 0x1d); /* validation, redirects, upstream forwarding */
        assert_int_equal(doctor_acs_bits(config, sizeof(config)), 0x0c);
        put_cap(config, 0x148, 0xd, 0, 0x11);
        assert_int_equal(doctor_acs_bits(config, sizeof(config)), 0);
        assert_int_equal(doctor_acs_bits(config, 0x14a), -1); /* cut off in the middle of it */
        put_cap(config, 0x148, 2, 0x100, 0);                  /* a ring */
        assert_int_equal(doctor_acs_bits(config, sizeof(config)), -1);
        put_cap(config, 0x148, 2, 0xfff, 0);
        assert_int_equal(doctor_acs_bits(config, sizeof(config)), -1);
}

/* Any bytes of any length: an answer, and no byte beyond them is read (a sanitizer looks). */
static void test_acs_of_noise(void **state)
{
        struct prng p = {0};

        prng_seed(&p, 1);
        for (int i = 0; i < 20000; i++) {
                size_t len = prng_below(&p, 4097);
                uint8_t *config = malloc(len + 1);

                assert_non_null(config);
                for (size_t k = 0; k < len; k++)
                        config[k] = (uint8_t)(prng_below(&p, 3) ? 0 : prng_below(&p, 256));
                assert_in_range(doctor_acs_bits(config, len) + 2, 0, 0x2e);
                free(config);
        }
}

static void test_rdma_mtu(void **state)
{
        static const int cases[][2] = {{0, 0},       {-5, 0},      {351, 0},     {352, 256},   {576, 256},
                                       {1500, 1024}, {4191, 2048}, {4192, 4096}, {9000, 4096}, {65535, 4096}};

        for (size_t i = 0; i < ARRAY_LEN(cases); i++)
                assert_int_equal(doctor_rdma_mtu(cases[i][0]), cases[i][1]);
}

static void test_list_count(void **state)
{
        assert_int_equal(doctor_list_count("0"), 1);
        assert_int_equal(doctor_list_count("0-3,8"), 5);
        assert_int_equal(doctor_list_count(""), 0);
        assert_int_equal(doctor_list_count("x"), 0);
        assert_int_equal(doctor_list_count("3-1"), 0);
        assert_int_equal(doctor_list_count("0-9223372036854775807,0-9223372036854775807"), 0);
}

static void test_line_and_size(void **state)
{
        char out[DOC_TEXT], buf[32];

        assert_true(doctor_line("a: 1\nCapEff:\t00ff\nb: 2\n", "CapEff", out));
        assert_string_equal(out, "00ff");
        assert_true(doctor_line("b:", "b", out));
        assert_string_equal(out, "");
        assert_false(doctor_line("xb: 1\n", "b", out));
        assert_false(doctor_line(NULL, "b", out));
        assert_true(doctor_line("b: \x1b[2J\xff\n", "b", out));
        assert_string_equal(out, "?[2J?");
        assert_string_equal(doctor_size(buf, 8388608), "8 MiB");
        assert_string_equal(doctor_size(buf, 1536), "1.5 KiB");
        assert_string_equal(doctor_size(buf, 1ull << 36), "64 GiB");
}

/* ---- a port made of files ---- */

static char root[] = "/tmp/doctor-test-XXXXXX";
static struct doctor host = {.root = root};

static void put(const char *path, const char *text)
{
        char full[512], *slash;
        FILE *f;

        snprintf(full, sizeof(full), "%s/sys/class/infiniband/d/ports/1/%s", root, path);
        slash = strrchr(full, '/');
        *slash = '\0';
        assert_int_equal(file_mkdirs(full), 0);
        *slash = '/';
        f = fopen(full, "w");
        assert_non_null(f);
        fputs(text, f);
        fclose(f);
}

static void put_gid(int index, const char *gid, const char *type)
{
        char path[64];

        snprintf(path, sizeof(path), "gids/%d", index);
        put(path, gid);
        snprintf(path, sizeof(path), "gid_attrs/types/%d", index);
        put(path, type);
}

/* Each GID that comes is better than those before, whatever its index. */
static void test_gid(void **state)
{
        static const struct {
                int index;
                const char *gid, *type, *text;
        } better[] = {
            {7, "fe80:0000:0000:0000:0000:0000:0000:0001", "IB/RoCE v1", "fe80::1"},
            {6, "2001:0db8:0000:0000:0000:0000:0000:0001", "IB/RoCE v1", "2001:db8::1"},
            {8, "0000:0000:0000:0000:0000:ffff:0a4d:0001", "IB/RoCE v1", "10.77.0.1"},
            {10, "fe80:0000:0000:0000:0000:0000:0000:0001", "RoCE v2", "fe80::1"},
            {11, "2001:0db8:0000:0000:0000:0000:0000:0001", "RoCE v2", "2001:db8::1"},
            {12, "0000:0000:0000:0000:0000:ffff:0a4d:0001", "RoCE v2", "10.77.0.1"},
            {2, "0000:0000:0000:0000:0000:ffff:0a4d:0002", "RoCE v2", "10.77.0.2"},
        };
        uint8_t wanted[16] = {[10] = 0xff, [11] = 0xff, [12] = 10, [13] = 77, [15] = 1};
        int port = 0, index = 0;
        struct doctor_gid g;
        char dev[DOC_TEXT];

        doctor_gid_choose(&host, "d", 1, &g);
        assert_int_equal(g.index, -1);
        put("link_layer", "Ethernet\n");
        put_gid(0, "0000:0000:0000:0000:0000:0000:0000:0000\n", "");
        put_gid(1, "no GID at all\n", "RoCE v2\n");
        for (size_t i = 0; i < ARRAY_LEN(better); i++) {
                put_gid(better[i].index, better[i].gid, better[i].type);
                doctor_gid_choose(&host, "d", 1, &g);
                assert_int_equal(g.index, better[i].index);
                assert_string_equal(g.text, better[i].text);
                assert_int_equal(g.total, i + 1);
        }
        assert_true(doctor_gid_find(&host, wanted, dev, &port, &index));
        assert_int_equal(index, 12); /* 8 is of RoCE v1 */
        assert_int_equal(port, 1);
        assert_string_equal(dev, "d");
        wanted[15] = 9;
        assert_false(doctor_gid_find(&host, wanted, dev, &port, &index));
}

static int make_root(void **state)
{
        return mkdtemp(root) ? 0 : -1;
}

static int remove_root(void **state)
{
        char command[64];

        snprintf(command, sizeof(command), "rm -r %s", root);
        return system(command);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(test_distance), cmocka_unit_test(test_acs),        cmocka_unit_test(test_acs_of_noise),
            cmocka_unit_test(test_rdma_mtu), cmocka_unit_test(test_list_count), cmocka_unit_test(test_line_and_size),
            cmocka_unit_test(test_gid),
        };

        return cmocka_run_group_tests(tests, make_root, remove_root);
}
