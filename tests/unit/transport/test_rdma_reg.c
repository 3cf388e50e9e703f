/* Registration by passport, driven by a scripted provider and a scripted owner: every step is made to fail in its turn,
 * and what was called, in which order, is written down. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <errno.h>

#include "err.h"
#include "rdma_reg.h"

#define MEM_BYTES 20000u
#define PAGE      4096u
#define NOWHERE   77 /* a probe write that reports success and reaches nothing */

static struct script {
        int probe, export_default, export_pcie, reg_dmabuf, reg_dmabuf_second, reg_mr, pin, write, write_second, check,
            get, put, dereg;
        const char *module;
        bool no_memory;
        uint64_t offset_error;
} s;

static struct seen {
        char calls[400];
        unsigned fds_open, fds_made, mrs, bounces, pins, dmabufs, writes;
        uint64_t offset, iova;
        size_t len;
        void *addr;
} seen;

static _Alignas(PAGE) unsigned char memory[2 * PAGE + MEM_BYTES];

static void called(const char *what)
{
        size_t used = strlen(seen.calls);

        snprintf(seen.calls + used, sizeof(seen.calls) - used, "%s ", what);
}

#define assert_calls(text) assert_string_equal(seen.calls, text)

static void assert_text(const char *text, const char *part)
{
        if (!strstr(text, part))
                fail_msg("expected \"%s\" in: %s", part, text);
}

/* ---- the provider ---- */

static int made(int rc, struct rdma_mr *out)
{
        if (rc == 0) {
                seen.mrs++;
                *out = (struct rdma_mr){&seen, 11, 22};
        }
        return rc;
}

static int p_reg_mr(struct rdma_reg_dev *d, void *addr, size_t len, struct rdma_mr *out)
{
        called("mr");
        seen.addr = addr;
        seen.len = len;
        return made(s.reg_mr, out);
}

static int p_reg_dmabuf(struct rdma_reg_dev *d, uint64_t offset, size_t len, uint64_t iova, int fd, struct rdma_mr *out)
{
        called(fd == 500 ? "dmabuf(own)" : "dmabuf");
        seen.offset = offset;
        seen.len = len;
        seen.iova = iova;
        return made(seen.dmabufs++ == 0 ? s.reg_dmabuf : s.reg_dmabuf_second, out);
}

static int p_dereg(struct rdma_reg_dev *d, struct rdma_mr *mr)
{
        called("dereg");
        assert_ptr_equal(mr->handle, &seen);
        if (s.dereg == 0)
                seen.mrs--;
        return s.dereg;
}

static int p_probe(struct rdma_reg_dev *d)
{
        called("probe");
        return s.probe;
}

static const char *p_peermem(struct rdma_reg_dev *d)
{
        called("peermem");
        return s.module;
}

static void p_close(struct rdma_reg_dev *d, int fd)
{
        called("close");
        assert_int_not_equal(fd, 500); /* the owner's */
        seen.fds_open--;
}

static void *p_bounce(struct rdma_reg_dev *d, size_t len)
{
        called("bounce");
        seen.bounces += !s.no_memory;
        return s.no_memory ? NULL : calloc(1, len);
}

static void p_bounce_free(struct rdma_reg_dev *d, void *p, size_t len)
{
        called("free");
        seen.bounces--;
        free(p);
}

static int p_write(struct rdma_reg_dev *d, const struct rdma_mr *mr, uint64_t iova, size_t len, uint64_t seed)
{
        int rc = seen.writes++ == 0 ? s.write : s.write_second;

        called("write");
        if (rc == NOWHERE)
                return 0;
        for (size_t i = 0; rc == 0 && i < len / 8; i++) {
                uint64_t w = mem_probe_word(seed, i);

                memcpy((char *)(uintptr_t)iova + 8 * i, &w, 8);
        }
        return rc;
}

static size_t p_page(struct rdma_reg_dev *d)
{
        return PAGE;
}

static const struct rdma_reg_provider provider = {
    .reg_mr = p_reg_mr,
    .reg_dmabuf = p_reg_dmabuf,
    .dereg = p_dereg,
    .probe_dmabuf = p_probe,
    .peermem = p_peermem,
    .close_fd = p_close,
    .bounce_alloc = p_bounce,
    .bounce_free = p_bounce_free,
    .probe_write = p_write,
    .page = p_page,
};

/* ---- the owner ---- */

static int o_put(const struct mem_region *r, size_t off, const void *src, size_t len, uint64_t *ticket)
{
        return s.put ? s.put : mem_host_ops.put_async(r, off, src, len, ticket);
}

static int o_get(const struct mem_region *r, size_t off, void *dst, size_t len, uint64_t *ticket)
{
        return s.get ? s.get : mem_host_ops.get_async(r, off, dst, len, ticket);
}

static int o_test(const struct mem_region *r, uint64_t ticket)
{
        return 1;
}

static int o_flush(const struct mem_region *r)
{
        return 0;
}

static int o_pin(const struct mem_region *r, void *host, size_t len)
{
        called("pin");
        seen.pins += s.pin == 0;
        return s.pin;
}

static void o_unpin(const struct mem_region *r, void *host, size_t len)
{
        called("unpin");
        seen.pins--;
}

static int o_export(const struct mem_region *r, enum mem_mapping how, int *fd, uint64_t *offset)
{
        int rc = how == MEM_MAP_PCIE ? s.export_pcie : s.export_default;

        called(how == MEM_MAP_PCIE ? "export(pcie)" : "export");
        if (rc < 0)
                return rc;
        *fd = 100 + (int)seen.fds_made++;
        seen.fds_open++;
        *offset = 7 * PAGE + (uintptr_t)r->addr % PAGE + s.offset_error;
        return 0;
}

static int o_check(const struct mem_region *r, size_t off, size_t len, uint64_t seed)
{
        return s.check ? s.check : mem_host_ops.check(r, off, len, seed);
}

static const struct mem_ops owner = {
    .put_async = o_put,
    .get_async = o_get,
    .test = o_test,
    .flush = o_flush,
    .host_register = o_pin,
    .host_unregister = o_unpin,
    .export_dmabuf = o_export,
    .check = o_check,
};

static struct rdma_reg_dev dev;
static struct mem_region region;
static struct rdma_reg reg;

static int setup(void **state)
{
        s = (struct script){0};
        seen = (struct seen){0};
        dev = (struct rdma_reg_dev){.p = &provider, .name = "nic0/1"};
        region = mem_host_region(memory + 24, MEM_BYTES);
        region.kind = MEM_DEVICE;
        region.device = 3;
        region.ops = &owner;
        for (size_t i = 0; i < sizeof(memory); i++)
                memory[i] = (unsigned char)(i * 7);
        err_clear();
        return 0;
}

/* Whatever happened: nothing is left, and the memory holds what it held. */
static int teardown(void **state)
{
        assert_int_equal(seen.mrs, 0);
        assert_int_equal(seen.fds_open, 0);
        assert_int_equal(seen.bounces, 0);
        assert_int_equal(seen.pins, 0);
        for (size_t i = 0; i < sizeof(memory); i++)
                if (memory[i] != (unsigned char)(i * 7))
                        fail_msg("byte %zu of the memory was changed", i);
        return 0;
}

static void opens(const char *path)
{
        int rc = rdma_reg_open(&dev, &region, &reg);

        if (rc != 0)
                fail_msg("%d: %s", rc, err_text());
        assert_string_equal(reg.path, path);
        assert_int_equal(reg.mr.lkey, 11);
        assert_int_equal(reg.len, MEM_BYTES);
        assert_int_equal(seen.fds_open, 0);
}

static void fails(int code)
{
        assert_int_equal(rdma_reg_open(&dev, &region, &reg), code);
        assert_null(reg.dev);
        assert_text(err_text(), "nic0/1");
        rdma_reg_close(&reg); /* nothing is nothing */
}

/* ---- host memory ---- */

static void host_memory(void **state)
{
        region = mem_host_region(memory, MEM_BYTES);
        dev.force = TP_GPU_DMABUF; /* concerns device memory only */
        opens("host");
        assert_string_equal(reg.why, "");
        assert_int_equal(reg.iova, (uintptr_t)memory);
        rdma_reg_close(&reg);
        rdma_reg_close(&reg);
        assert_calls("mr dereg ");
}

static void host_refusals(void **state)
{
        static const struct {
                int code;
                const char *part;
        } cases[] = {
            {-ENOMEM, "ulimit -l"},           {-ENOMEM, "memlock is "},    {-EFAULT, "not mapped in this process"},
            {-EINVAL, "this kind of access"}, {-EPERM, "/dev/infiniband"}, {-EBUSY, "EBUSY"},
        };

        region = mem_host_region(memory, MEM_BYTES);
        for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
                s.reg_mr = cases[i].code;
                fails(cases[i].code);
                assert_text(err_text(), cases[i].part);
                assert_text(err_text(), "ibv_reg_mr");
        }
}

static void lengths(void **state)
{
        dev.max_mr_bytes = MEM_BYTES - 1;
        fails(-E2BIG);
        region.len = 0;
        fails(-EINVAL);
        region.len = SIZE_MAX;
        fails(-EINVAL);
        assert_calls("");
}

/* ---- dmabuf ---- */

static void dmabuf_at_once(void **state)
{
        opens("dmabuf");
        assert_string_equal(reg.why, "");
        assert_true(reg.verified);
        assert_int_equal(seen.offset, 7 * PAGE + 24);
        assert_int_equal(seen.iova % PAGE, seen.offset % PAGE);
        assert_int_equal(seen.iova, (uintptr_t)region.addr);
        assert_int_equal(seen.len, MEM_BYTES);
        assert_calls("probe export dmabuf close write write ");
        rdma_reg_close(&reg);
}

static void capability_is_asked_once(void **state)
{
        opens("dmabuf");
        rdma_reg_close(&reg);
        opens("dmabuf");
        rdma_reg_close(&reg);
        assert_calls("probe export dmabuf close write write dereg export dmabuf close write write dereg ");
}

static void own_descriptor_is_not_closed(void **state)
{
        region.fd = 500;
        region.fd_offset = 3 * PAGE + 24;
        opens("dmabuf");
        assert_int_equal(seen.offset, 3 * PAGE + 24);
        assert_calls("probe dmabuf(own) write write ");
        rdma_reg_close(&reg);
}

static void own_descriptor_is_refused(void **state)
{
        region.fd = 500;
        region.fd_offset = 24;
        s.reg_dmabuf = -EBADF;
        opens("staged");
        assert_text(reg.why, "dmabuf: EBADF: the descriptor is no dmabuf; ");
        assert_calls("probe dmabuf(own) peermem bounce pin mr ");
        rdma_reg_close(&reg);
}

static void offset_must_fit_the_address(void **state)
{
        s.offset_error = 8;
        dev.force = TP_GPU_DMABUF;
        fails(-EINVAL);
        assert_text(err_text(), "same place within a page of 4096");
        assert_calls("probe export close export(pcie) close ");
}

static void other_mapping(void **state)
{
        s.reg_dmabuf = -EINVAL;
        opens("dmabuf+pcie");
        assert_calls("probe export dmabuf close export(pcie) dmabuf close write write ");
        rdma_reg_close(&reg);
}

static void other_mapping_after_a_failed_probe(void **state)
{
        s.write = NOWHERE;
        opens("dmabuf+pcie");
        assert_calls("probe export dmabuf close write dereg export(pcie) dmabuf close write write ");
        rdma_reg_close(&reg);
}

/* ---- one step after the other fails ---- */

static void chain(void **state)
{
        s.probe = -EOPNOTSUPP;
        opens("staged");
        assert_string_equal(reg.why, "dmabuf: EOPNOTSUPP: kernel, driver or rdma-core lacks dmabuf; peermem: no "
                                     "nvidia-peermem module is loaded");
        assert_calls("probe peermem bounce pin mr ");
        assert_ptr_equal(seen.addr, reg.bounce);
        assert_int_equal(reg.iova, (uintptr_t)reg.bounce);
        assert_true(reg.pinned);
        assert_false(reg.verified);
        rdma_reg_close(&reg);
        assert_calls("probe peermem bounce pin mr dereg unpin free ");
}

static void peermem_after_dmabuf(void **state)
{
        s.probe = -EPROTONOSUPPORT;
        s.module = "nvidia_peermem";
        opens("peermem");
        assert_text(reg.why, "dmabuf: EPROTONOSUPPORT: ");
        assert_null(strstr(reg.why, "peermem:"));
        assert_true(reg.verified);
        assert_ptr_equal(seen.addr, region.addr);
        assert_calls("probe peermem mr write write ");
        rdma_reg_close(&reg);
}

static void export_is_not_possible(void **state)
{
        s.export_default = -ENOTSUP;
        opens("staged");
        assert_text(reg.why, "dmabuf: EOPNOTSUPP: the memory's owner cannot export it");
        assert_calls("probe export peermem bounce pin mr ");
        rdma_reg_close(&reg);
}

static void both_exports_fail(void **state)
{
        s.export_default = -EINVAL;
        s.export_pcie = -ENOTSUP;
        opens("staged");
        assert_text(reg.why, "dmabuf: EINVAL: the owner refuses the range");
        assert_calls("probe export export(pcie) peermem bounce pin mr ");
        rdma_reg_close(&reg);
}

static void both_registrations_fail(void **state)
{
        s.reg_dmabuf = -ENOMEM;
        s.reg_dmabuf_second = -EINVAL;
        opens("staged");
        assert_text(reg.why, "dmabuf: ENOMEM: no room: BAR1"); /* the first cause */
        assert_calls("probe export dmabuf close export(pcie) dmabuf close peermem bounce pin mr ");
        rdma_reg_close(&reg);
}

static void peermem_takes_no_address(void **state)
{
        s.probe = -EOPNOTSUPP;
        s.module = "nv_peer_mem";
        s.reg_mr = -EFAULT;
        fails(-EFAULT); /* the same call refuses the bounce buffer here */
        assert_text(err_text(), "peermem: ibv_reg_mr: EFAULT: a module is loaded but took no charge");
        assert_text(err_text(), "dmabuf: dmabuf capability: EOPNOTSUPP");
        assert_text(err_text(), "staged: host buffer: EFAULT");
        assert_text(err_text(), "device 3");
        assert_text(err_text(), "20000 bytes");
        assert_calls("probe peermem mr bounce pin mr unpin free ");
}

static void no_memory_for_the_bounce_buffer(void **state)
{
        s.probe = -EOPNOTSUPP;
        s.no_memory = true;
        fails(-ENOMEM);
        assert_text(err_text(), "staged: host buffer: ENOMEM");
        assert_calls("probe peermem bounce ");
}

static void unpinned_is_slow_not_wrong(void **state)
{
        s.probe = -EOPNOTSUPP;
        s.pin = -ENOMEM;
        opens("staged");
        assert_false(reg.pinned);
        assert_text(reg.why, "staged: not pinned, slow copies");
        rdma_reg_close(&reg);
        assert_calls("probe peermem bounce pin mr dereg free ");
}

/* ---- the probe ---- */

static void probe_finds_what_registration_hid(void **state)
{
        s.write = s.write_second = NOWHERE;
        s.module = "nvidia_peermem";
        opens("staged");
        assert_text(reg.why, "dmabuf: EIO: the device did not see a probe write");
        assert_text(reg.why, "peermem: EIO: the device did not see a probe write");
        assert_calls("probe export dmabuf close write dereg export(pcie) dmabuf close write dereg peermem mr write "
                     "dereg bounce pin mr ");
        rdma_reg_close(&reg);
}

static void probe_looks_at_the_end_too(void **state)
{
        dev.force = TP_GPU_DMABUF;
        s.write_second = NOWHERE;
        fails(-EIO);
        assert_text(err_text(), "did not reach the memory");
}

static void probe_errors(void **state)
{
        int *const steps[] = {&s.write, &s.check, &s.get};

        for (size_t i = 0; i < sizeof(steps) / sizeof(steps[0]); i++) {
                setup(state);
                dev.force = TP_GPU_DMABUF;
                s.write_second = -ETIMEDOUT;
                *steps[i] = -ETIMEDOUT;
                fails(-ETIMEDOUT);
                assert_text(err_text(), "probe write: ETIMEDOUT");
        }
}

static void nobody_can_tell(void **state)
{
        s.check = -ENOTSUP;
        opens("dmabuf");
        assert_false(reg.verified);
        assert_calls("probe export dmabuf close "); /* nothing was written */
        rdma_reg_close(&reg);
        s.check = 0;
        s.write = -ENOTSUP;
        seen.writes = 0;
        opens("dmabuf");
        assert_false(reg.verified);
        rdma_reg_close(&reg);
}

static void regions_of_few_bytes(void **state)
{
        static const size_t lens[] = {1, 7, 8, 9, 4096, 4097, 8192};

        for (size_t i = 0; i < sizeof(lens) / sizeof(lens[0]); i++) {
                region.len = lens[i];
                assert_int_equal(rdma_reg_open(&dev, &region, &reg), 0);
                assert_int_equal(reg.verified, lens[i] >= 8);
                rdma_reg_close(&reg);
        }
}

/* ---- forced ---- */

static void forced_dmabuf(void **state)
{
        dev.force = TP_GPU_DMABUF;
        s.probe = -EOPNOTSUPP;
        s.module = "nvidia_peermem";
        fails(-EOPNOTSUPP);
        assert_text(err_text(), "--gpu-path force:dmabuf");
        assert_text(err_text(), "Linux 5.12");
        assert_calls("probe ");
}

static void forced_peermem(void **state)
{
        dev.force = TP_GPU_PEERMEM;
        fails(-ENODEV);
        assert_text(err_text(), "--gpu-path force:peermem");
        assert_text(err_text(), "modprobe nvidia-peermem");
        s.module = "nvidia_peermem";
        opens("peermem");
        assert_text(reg.why, "dmabuf: not tried, another path is forced");
        assert_calls("peermem peermem mr write write ");
        rdma_reg_close(&reg);
}

static void forced_staged(void **state)
{
        dev.force = TP_GPU_STAGED;
        opens("staged");
        assert_text(reg.why, "dmabuf: not tried");
        assert_text(reg.why, "peermem: not tried");
        assert_calls("bounce pin mr ");
        rdma_reg_close(&reg);
}

/* A registration that the device will not end keeps its memory: the device may still write there. */
static void dereg_fails(void **state)
{
        void *bounce;

        dev.force = TP_GPU_STAGED;
        s.dereg = -EBUSY;
        opens("staged");
        bounce = reg.bounce;
        rdma_reg_close(&reg);
        assert_calls("bounce pin mr dereg ");
        free(bounce);
        seen = (struct seen){0};
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
        const struct CMUnitTest tests[] = {
            TEST(host_memory),
            TEST(host_refusals),
            TEST(lengths),
            TEST(dmabuf_at_once),
            TEST(capability_is_asked_once),
            TEST(own_descriptor_is_not_closed),
            TEST(own_descriptor_is_refused),
            TEST(offset_must_fit_the_address),
            TEST(other_mapping),
            TEST(other_mapping_after_a_failed_probe),
            TEST(chain),
            TEST(peermem_after_dmabuf),
            TEST(export_is_not_possible),
            TEST(both_exports_fail),
            TEST(both_registrations_fail),
            TEST(peermem_takes_no_address),
            TEST(no_memory_for_the_bounce_buffer),
            TEST(unpinned_is_slow_not_wrong),
            TEST(probe_finds_what_registration_hid),
            TEST(probe_looks_at_the_end_too),
            TEST(probe_errors),
            TEST(nobody_can_tell),
            TEST(regions_of_few_bytes),
            TEST(forced_dmabuf),
            TEST(forced_peermem),
            TEST(forced_staged),
            TEST(dereg_fails),
        };

        return cmocka_run_group_tests_name("rdma_reg", tests, NULL, NULL);
}
