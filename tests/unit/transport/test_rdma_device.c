/* Registration on a real verbs device (Soft-RoCE will do): host memory is reached, and what a device without dmabuf
 * says when it is offered device memory. Exit 77 where there is no device. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <errno.h>
#include <infiniband/verbs.h>
#include <unistd.h>

#include "err.h"
#include "rdma_reg.h"

#define MEM_BYTES 30000u

static struct ibv_context *verbs;
static struct rdma_reg_port port = {.port = 1};
static struct rdma_reg_dev dev;
static _Alignas(4096) unsigned char memory[2 * 4096 + MEM_BYTES];

static void assert_text(const char *text, const char *part)
{
        if (!strstr(text, part))
                fail_msg("expected \"%s\" in: %s", part, text);
}

/* ---- "device memory": lies in host memory, and only its ops may touch it ---- */

static int pinned;

static int o_export(const struct mem_region *r, enum mem_mapping how, int *fd, uint64_t *offset)
{
        return -ENOTSUP;
}

static int o_pin(const struct mem_region *r, void *host, size_t len)
{
        pinned++;
        return 0;
}

static void o_unpin(const struct mem_region *r, void *host, size_t len)
{
        pinned--;
}

static struct mem_ops owner;

static struct mem_region device_region(void)
{
        struct mem_region r = mem_host_region(memory + 40, MEM_BYTES);

        owner = mem_host_ops;
        owner.export_dmabuf = o_export;
        owner.host_register = o_pin;
        owner.host_unregister = o_unpin;
        r.kind = MEM_DEVICE;
        r.device = 0;
        r.ops = &owner;
        return r;
}

static int setup(void **state)
{
        dev.p = &rdma_reg_verbs;
        dev.force = TP_GPU_AUTO;
        dev.dmabuf_state = 0;
        err_clear();
        return 0;
}

static void host_memory_is_reached(void **state)
{
        struct mem_region r = mem_host_region(memory + 40, MEM_BYTES);
        struct rdma_reg reg;

        assert_int_equal(rdma_reg_open(&dev, &r, &reg), 0);
        assert_string_equal(reg.path, "host");
        assert_int_not_equal(reg.mr.lkey, 0);
        assert_int_equal(r.ops->check(&r, 0, 4096, 99), 0);
        assert_int_equal(dev.p->probe_write(&dev, &reg.mr, reg.iova, 4096, 99), 0);
        assert_int_equal(r.ops->check(&r, 0, 4096, 99), 1);
        assert_int_equal(r.ops->check(&r, 8, 4088, 99), 0);
        rdma_reg_close(&reg);
}

static void a_probe_outside_fails(void **state)
{
        struct mem_region r = mem_host_region(memory, 4096);
        struct rdma_reg reg;

        assert_int_equal(rdma_reg_open(&dev, &r, &reg), 0);
        memset(memory, 5, sizeof(memory));
        assert_true(dev.p->probe_write(&dev, &reg.mr, reg.iova + 8, 4096, 99) < 0);
        assert_int_equal(memory[4096], 5);
        rdma_reg_close(&reg);
}

static const char *pretended_module(struct rdma_reg_dev *d)
{
        return "pretended";
}

/* The "device memory" is host memory, so plain registration reaches it: the whole chain of registration, probe write by
 * the network device and check by the owner, at real work. */
static void a_trusted_registration(void **state)
{
        struct rdma_reg_provider pretending = rdma_reg_verbs;
        struct mem_region r = device_region();
        struct rdma_reg reg;

        memset(memory, 7, sizeof(memory));
        pretending.peermem = pretended_module;
        dev.p = &pretending;
        dev.force = TP_GPU_PEERMEM;
        assert_int_equal(rdma_reg_open(&dev, &r, &reg), 0);
        assert_string_equal(reg.path, "peermem");
        assert_true(reg.verified);
        rdma_reg_close(&reg);
        for (size_t i = 0; i < sizeof(memory); i++)
                assert_int_equal(memory[i], 7);
}

static void device_memory_is_staged(void **state)
{
        struct mem_region r = device_region();
        struct rdma_reg reg;

        if (dev.p->probe_dmabuf(&dev) == 0 || dev.p->peermem(&dev))
                skip(); /* a device that can: nothing to be refused */
        assert_int_equal(rdma_reg_open(&dev, &r, &reg), 0);
        print_message("path %s, why: %s\n", reg.path, reg.why);
        assert_string_equal(reg.path, "staged");
        assert_text(reg.why, "dmabuf: EOPNOTSUPP");
        assert_text(reg.why, "peermem: no nvidia-peermem module");
        assert_int_equal(pinned, 1);
        rdma_reg_close(&reg);
        assert_int_equal(pinned, 0);
}

static void forced_paths_fail(void **state)
{
        struct mem_region r = device_region();
        struct rdma_reg reg;

        if (dev.p->probe_dmabuf(&dev) == 0 || dev.p->peermem(&dev))
                skip();
        dev.force = TP_GPU_DMABUF;
        assert_int_equal(rdma_reg_open(&dev, &r, &reg), -EOPNOTSUPP);
        print_message("%s\n", err_text());
        assert_text(err_text(), "force:dmabuf");
        dev.force = TP_GPU_PEERMEM;
        assert_int_equal(rdma_reg_open(&dev, &r, &reg), -ENODEV);
        print_message("%s\n", err_text());
        assert_text(err_text(), "modprobe nvidia-peermem");
}

static void addresses_of_nobody(void **state)
{
        struct mem_region r = mem_host_region((void *)(uintptr_t)0x1000, 4096);
        struct rdma_reg reg;

        assert_true(rdma_reg_open(&dev, &r, &reg) < 0);
        assert_text(err_text(), "ibv_reg_mr: EFAULT");
}

static bool find_device(void)
{
        struct ibv_device **list = ibv_get_device_list(NULL);
        union ibv_gid gid;
        static const union ibv_gid zero;

        if (list && list[0]) {
                verbs = ibv_open_device(list[0]);
                snprintf(dev.name, sizeof(dev.name), "%s/1", ibv_get_device_name(list[0]));
        }
        if (list)
                ibv_free_device_list(list);
        dev.pd = verbs ? ibv_alloc_pd(verbs) : NULL;
        if (!dev.pd)
                return false;
        /* Soft-RoCE's link-local GID leads nowhere without IPv6: take the last one. */
        for (int i = 0; i < 16 && ibv_query_gid(verbs, 1, i, &gid) == 0; i++)
                if (memcmp(&gid, &zero, sizeof(gid)) != 0)
                        port.gid_index = i;
        dev.user = &port;
        dev.access = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ;
        return true;
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test_setup(host_memory_is_reached, setup),
            cmocka_unit_test_setup(a_probe_outside_fails, setup),
            cmocka_unit_test_setup(a_trusted_registration, setup),
            cmocka_unit_test_setup(device_memory_is_staged, setup),
            cmocka_unit_test_setup(forced_paths_fail, setup),
            cmocka_unit_test_setup(addresses_of_nobody, setup),
        };

        if (!find_device()) {
                puts("skipped: no RDMA device that can be opened");
                return 77;
        }
        return cmocka_run_group_tests_name("rdma_device", tests, NULL, NULL);
}
