/*
 * The cpu device: oneDNN for products, cpu_kernels.c for the rest, on the thread that calls. Only products use more
 * than one thread, and only when asked; oneDNN has them from OpenMP.
 */
#include <dnnl.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "check.h"
#include "clock.h"
#include "cpu_kernels.h"
#include "cpu_ops.h"
#include "devices.h"
#include "err.h"
#include "host.h"

/* Of the OpenMP runtime that oneDNN is linked with. Declared here because clang has no omp.h of that runtime. */
void omp_set_num_threads(int n);
int omp_pause_resource_all(int kind);
#define OMP_PAUSE_HARD 2

#define READ_BYTES   (64u << 20) /* more than the second cache of any processor this runs on */
#define PRODUCT_SIZE 768
#define MEASURE_RUNS 6 /* the best counts: others may use the host too */
#define CACHE_MEASURE_RUNS 200

struct cpu_device {
        struct device base;
        const struct cpu_kernels *kernels;
        struct dev_props props;
};

struct cpu_plan {
        struct dev_plan base;
        int threads;
        float *scratch;
        size_t n;
        struct cpu_step step[];
};

static const struct cpu_kernels *best_kernels(void)
{
#if defined(__x86_64__)
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
                return &cpu_kernels_avx512;
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
                return &cpu_kernels_avx2;
#endif
        return &cpu_kernels_generic;
}

static const char *cpu_unavailable(void)
{
        return NULL;
}

/* oneDNN makes its machine code at the first call of each kind: one row, few rows, many rows, both layouts. */
static int warm_up(void)
{
        static const int rows[] = {1, 4, 16, 64};
        float *m = calloc(3 * 64 * 64, sizeof(m[0]));
        dnnl_status_t st = m ? dnnl_success : dnnl_out_of_memory;

        for (size_t i = 0; st == dnnl_success && i < ARRAY_LEN(rows); i++) {
                float *a = m, *b = m + 64 * 64, *c = m + 2 * 64 * 64;

                st = dnnl_sgemm('N', 'T', rows[i], 64, 64, 1.0f, a, 64, b, 64, 0.0f, c, 64);
                if (st == dnnl_success)
                        st = dnnl_sgemm('N', 'N', rows[i], 64, 64, 1.0f, a, 64, b, 64, 0.0f, c, 64);
        }
        free(m);
        return st == dnnl_success ? 0 : err_set(-ENOMEM, "cpu: oneDNN cannot start (status %d)", (int)st);
}

static void describe(struct cpu_device *d, int threads)
{
        const dnnl_version_t *v = dnnl_version();
        struct dev_props *p = &d->props;
        char cpu[40];

        host_cpu_name(cpu, sizeof(cpu));
        p->threads = threads;
        p->memory_bytes = host_memory_bytes();
        p->numa = host_numa();
        p->host_memory = true;
        snprintf(p->library, sizeof(p->library), "oneDNN %d.%d.%d", v->major, v->minor, v->patch);
        snprintf(p->name, sizeof(p->name), "cpu: %s (%.15s, %s, %d thread%s)", cpu, p->library, d->kernels->isa,
                 threads, threads == 1 ? "" : "s");
}

static int cpu_open(const struct dev_opts *opts, struct device **out)
{
        if (opts->ordinal != 0)
                return err_set(-ENODEV, "cpu:%d: there is only one cpu device", opts->ordinal);
        struct cpu_device *d = calloc(1, sizeof(*d));

        if (!d)
                return err_set(-ENOMEM, "no memory for the cpu device");
        d->base.ops = &dev_cpu_ops;
        d->kernels = best_kernels();
        omp_set_num_threads(1); /* threads start with the first product that wants them, not here */
        describe(d, opts->threads);
        int rc = warm_up();

        if (rc < 0)
                free(d);
        else
                *out = &d->base;
        return rc;
}

static void cpu_close(struct device *base)
{
        struct cpu_device *d = container_of(base, struct cpu_device, base);

        /* Nobody's threads may spin on for a device that is gone. */
        if (d->props.threads > 1)
                omp_pause_resource_all(OMP_PAUSE_HARD);
        free(d);
}

static void cpu_query(const struct device *d, struct dev_props *out)
{
        *out = container_of(d, const struct cpu_device, base)->props;
}

/* Seconds of the fastest of some runs of w[n,k] times a vector, which reads w once with every thread there is. */
static double time_read(const struct cpu_device *d, const float *w, size_t n, size_t k, float *x, float *y, int runs)
{
        double best = 1e9;

        for (int i = 0; i < runs; i++) {
                uint64_t start = clock_ns();

                dnnl_sgemm('N', 'T', 1, (dnnl_dim_t)n, (dnnl_dim_t)k, 1.0f, x, (dnnl_dim_t)k, w, (dnnl_dim_t)k, 0.0f, y,
                           (dnnl_dim_t)n);
                double product_s = (double)(clock_ns() - start) / 1e9;

                start = clock_ns();
                y[0] = d->kernels->sum(w, n * k);
                double sum_s = (double)(clock_ns() - start) / 1e9;

                best = product_s < best ? product_s : best;
                best = sum_s < best ? sum_s : best;
        }
        return best;
}

static double time_product(float *m)
{
        const dnnl_dim_t n = PRODUCT_SIZE;
        double best = 1e9;

        for (int i = 0; i < MEASURE_RUNS; i++) {
                uint64_t start = clock_ns();

                dnnl_sgemm('N', 'T', n, n, n, 1.0f, m, n, m + n * n, n, 0.0f, m + 2 * n * n, n);
                double s = (double)(clock_ns() - start) / 1e9;

                best = s < best ? s : best;
        }
        return best;
}

/* A model that fits the cores' own caches is read from there, step after step: held against the memory's rate it would
 * seem to beat its roofline. Half of a cache, read until it is there. */
static void measure_cache(struct cpu_device *d, const float *w, size_t k, float *x)
{
        long own = sysconf(_SC_LEVEL2_CACHE_SIZE);
        size_t n;

        if (own <= 0)
                return;
        d->props.cache_bytes = (size_t)own * (size_t)d->props.threads;
        n = d->props.cache_bytes / 2 / sizeof(float) / k;
        if (n == 0 || n * k * sizeof(float) > READ_BYTES)
                n = READ_BYTES / sizeof(float) / k;
        d->props.cache_bytes_per_s =
            (double)(n * k * sizeof(float)) / time_read(d, w, n, k, x, x + k, CACHE_MEASURE_RUNS);
}

static int cpu_measure(struct device *base)
{
        struct cpu_device *d = container_of(base, struct cpu_device, base);
        const size_t k = 1024, n = READ_BYTES / sizeof(float) / k, spare = k + n;
        struct mem_region mem;
        int rc = host_alloc(base, READ_BYTES + spare * sizeof(float), &mem);

        if (rc < 0)
                return err_trail(rc, "while measuring the cpu device");
        float *w = mem.addr, *x = w + n * k;
        double flop = 2.0 * PRODUCT_SIZE * PRODUCT_SIZE * PRODUCT_SIZE;

        omp_set_num_threads(d->props.threads);
        d->props.read_bytes_per_s = READ_BYTES / time_read(d, w, n, k, x, x + k, MEASURE_RUNS);
        measure_cache(d, w, k, x);
        d->props.flop_per_s[DT_F32] = flop / time_product(w);
        /* 16-bit operands are widened and multiplied as fp32: the same ceiling. */
        d->props.flop_per_s[DT_F16] = d->props.flop_per_s[DT_BF16] = d->props.flop_per_s[DT_F32];
        host_free(base, &mem);
        return 0;
}

static void cpu_plan_free(struct dev_plan *base)
{
        struct cpu_plan *p = container_of(base, struct cpu_plan, base);

        free(p->scratch);
        free(p);
}

/* One scratch for all steps: they run one after the other. */
static int plan_scratch(struct cpu_plan *p)
{
        size_t floats = 0, bytes;

        for (size_t i = 0; i < p->n; i++) {
                size_t need = cpu_step_scratch(&p->step[i].inst);

                floats = need > floats ? need : floats;
        }
        if (floats == 0)
                return 0;
        if (!size_mul(floats, sizeof(float), &bytes) || !size_add(bytes, CACHE_LINE, &bytes) ||
            !(p->scratch = aligned_alloc(CACHE_LINE, ALIGN_UP(bytes, (size_t)CACHE_LINE))))
                return err_set(-ENOMEM, "no memory for %zu floats of scratch", floats);
        memset(p->scratch, 0, bytes); /* present before the first run */
        for (size_t i = 0; i < p->n; i++)
                p->step[i].scratch = p->scratch;
        return 0;
}

static int cpu_plan_make(struct device *base, const struct op_inst *insts, size_t n, struct dev_plan **out)
{
        const struct cpu_device *d = container_of(base, struct cpu_device, base);
        size_t bytes;
        int rc = host_check(insts, n);

        if (rc < 0)
                return rc;
        if (!size_mul(n, sizeof(struct cpu_step), &bytes) || !size_add(bytes, sizeof(struct cpu_plan), &bytes))
                return err_set(-EINVAL, "a plan of %zu instructions is too long", n);
        struct cpu_plan *p = calloc(1, bytes);

        if (!p)
                return err_set(-ENOMEM, "no memory for a plan of %zu instructions", n);
        p->base.dev = base;
        p->threads = d->props.threads;
        p->n = n;
        for (size_t i = 0; i < n; i++)
                cpu_step_init(&p->step[i], &insts[i], d->kernels);
        rc = plan_scratch(p);
        if (rc < 0)
                cpu_plan_free(&p->base);
        else
                *out = &p->base;
        return rc;
}

static int cpu_run(struct dev_plan *base, struct dev_event *ev)
{
        const struct cpu_plan *p = container_of(base, const struct cpu_plan, base);
        int rc = 0;

        /* OpenMP keeps the number per calling thread, and the thread that opened the device may be another. */
        omp_set_num_threads(p->threads);
        uint64_t start = clock_ns();

        for (const struct cpu_step *s = p->step; rc == 0 && s < p->step + p->n; s++)
                rc = s->run(s);
        ev->ticket++;
        ev->exec_ns = clock_ns() - start;
        return rc;
}

const struct dev_ops dev_cpu_ops = {
    .name = "cpu",
    .unavailable = cpu_unavailable,
    .open = cpu_open,
    .close = cpu_close,
    .query = cpu_query,
    .measure = cpu_measure,
    .alloc = host_alloc,
    .free = host_free,
    .put = host_put,
    .get = host_get,
    .copy = host_copy,
    .host_register = host_register,
    .export = host_export,
    .flush = host_flush,
    .supports = host_supports,
    .plan_make = cpu_plan_make,
    .plan_free = cpu_plan_free,
    .run = cpu_run,
    .test = host_test,
    .sync = host_sync,
};
