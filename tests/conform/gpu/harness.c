#include "harness.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "err.h"

#define CANARY_BYTES 128
#define CANARY       0xa5

/* Relative L2 error of an output: a few roundings of fp32; a fraction of one rounding of 16 bits, for both sides round
 * once from values that agree to fp32. */
static const double bounds[DT_COUNT] = {[DT_F32] = 1e-6, [DT_F16] = 2e-4, [DT_BF16] = 1.5e-3};

static void *room_for(struct job *j, size_t bytes)
{
        if (j->bytes + bytes + CANARY_BYTES > j->room) {
                j->room = 2 * (j->bytes + bytes + CANARY_BYTES);
                j->image = realloc(j->image, j->room);
                BUG_ON(!j->image);
                memset(j->image + j->bytes, CANARY, j->room - j->bytes);
        }
        return j->image + j->bytes;
}

void job_begin(struct job *j, struct harness *h, enum op_code code, const char *fmt, ...)
{
        va_list ap;

        *j = (struct job){.h = h, .inst = {.code = code, .attr = {.batch = 1}}};
        va_start(ap, fmt);
        vsnprintf(j->what, sizeof(j->what), fmt, ap);
        va_end(ap);
        room_for(j, CANARY_BYTES);
        j->bytes = CANARY_BYTES;
        /* Now and then operands start at odd places: only the alignment to their dtype is promised. */
        j->skew = prng_below(&h->prng, 4) == 0 ? 1 + prng_below(&h->prng, 5) : 0;
}

static size_t offset_of(const struct op_arg *a)
{
        return (size_t)(uintptr_t)a->data - 1;
}

static void put(struct job *j, const struct op_arg *a, int64_t i, double v)
{
        unsigned char *at = j->image + offset_of(a) + (size_t)i * op_dtype_bytes(a->dtype);
        uint16_t half = a->dtype == DT_F16 ? op_f32_to_f16((float)v) : op_f32_to_bf16((float)v);
        float f = (float)v;
        int32_t n = a->dtype == DT_I32 ? (int32_t)v : 0;

        switch (a->dtype) {
        case DT_F32:
                memcpy(at, &f, sizeof(f));
                break;
        case DT_I32:
                memcpy(at, &n, sizeof(n));
                break;
        case DT_U8:
                *at = (unsigned char)v;
                break;
        default:
                memcpy(at, &half, sizeof(half));
        }
}

static double element(const unsigned char *image, const struct op_arg *a, int64_t i)
{
        const unsigned char *at = image + offset_of(a) + (size_t)i * op_dtype_bytes(a->dtype);
        uint16_t half;
        float f;
        int32_t n;

        switch (a->dtype) {
        case DT_F32:
                memcpy(&f, at, sizeof(f));
                return (double)f;
        case DT_I32:
                memcpy(&n, at, sizeof(n));
                return n;
        case DT_U8:
                return *at;
        default:
                memcpy(&half, at, sizeof(half));
                return (double)(a->dtype == DT_F16 ? op_f16_to_f32(half) : op_bf16_to_f32(half));
        }
}

void job_arg(struct job *j, int arg, enum op_dtype dtype, int ndim, int64_t d0, int64_t d1, int64_t d2)
{
        struct op_arg *a = &j->inst.arg[arg];

        *a = (struct op_arg){.dtype = dtype, .ndim = ndim, .dims = {d0, d1, d2}};
        j->bytes = ALIGN_UP(j->bytes, (size_t)CACHE_LINE) + j->skew * op_dtype_bytes(dtype);
        room_for(j, op_arg_bytes(a));
        a->data = (void *)(uintptr_t)(j->bytes + 1);
        j->bytes += op_arg_bytes(a) + CANARY_BYTES;
        for (int64_t i = 0; i < op_arg_elems(a); i++)
                put(j, a, i, dtype == DT_U8 ? (double)prng_below(&j->h->prng, 256) : 2 * prng_unit(&j->h->prng) - 1);
}

void job_alias(struct job *j, int arg, int of)
{
        j->inst.arg[arg] = j->inst.arg[of];
}

void job_set(struct job *j, int arg, int64_t i, double v)
{
        put(j, &j->inst.arg[arg], i, v);
}

void job_scale(struct job *j, int arg, double factor)
{
        const struct op_arg *a = &j->inst.arg[arg];

        for (int64_t i = 0; i < op_arg_elems(a); i++)
                put(j, a, i, element(j->image, a, i) * factor);
}

void job_cursor(struct job *j, int arg, int32_t position, int32_t emitted)
{
        job_arg(j, arg, DT_I32, 1, 2, 0, 0);
        job_set(j, arg, 0, position);
        job_set(j, arg, 1, emitted);
}

static void fail(struct job *j, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

static void fail(struct job *j, const char *fmt, ...)
{
        va_list ap;

        if (j->h->failures++ > 20)
                return;
        printf("FAIL %s (%s): ", op_infos[j->inst.code].name, j->what);
        va_start(ap, fmt);
        vprintf(fmt, ap);
        va_end(ap);
        printf("\n");
}

/* The image after the instruction ran on d `runs` times, each from the same start; NULL when it did not run. */
static unsigned char *image_after(struct job *j, struct device *d)
{
        struct op_inst inst = j->inst;
        struct dev_event ev = {0};
        struct dev_plan *plan = NULL;
        struct mem_region mem;
        unsigned char *first = malloc(j->bytes), *second = malloc(j->bytes);
        int rc = d->ops->alloc(d, j->bytes, &mem);

        BUG_ON(!first || !second || rc < 0);
        for (int i = 0; i < op_infos[inst.code].nargs; i++)
                if (inst.arg[i].data)
                        inst.arg[i].data = (char *)mem.addr + offset_of(&inst.arg[i]);
        rc = dev_plan_make(d, &inst, 1, &plan);
        for (int run = 0; rc == 0 && run < 2; run++) {
                d->ops->put(d, mem.addr, j->image, j->bytes);
                rc = dev_run(plan, &ev);
                if (rc == 0)
                        rc = d->ops->sync(d);
                d->ops->get(d, run ? second : first, mem.addr, j->bytes);
        }
        if (rc < 0)
                fail(j, "%s: does not run: %s", d->ops->name, err_str(rc));
        else if (memcmp(first, second, j->bytes) != 0)
                fail(j, "%s: two runs differ", d->ops->name);
        dev_plan_free(plan);
        d->ops->free(d, &mem);
        free(second);
        if (rc == 0)
                return first;
        free(first);
        return NULL;
}

static void compare_output(struct job *j, const struct op_arg *a, const char *name, const unsigned char *want,
                           const unsigned char *got)
{
        double error = 0, norm = 0;

        for (int64_t i = 0; i < op_arg_elems(a); i++) {
                double w = element(want, a, i), g = element(got, a, i);

                if (isnan(w) != isnan(g) || (isinf(w) && w != g)) {
                        fail(j, "'%s' element %lld is %g, the reference has %g", name, (long long)i, g, w);
                        return;
                }
                if (isnan(w) || isinf(w))
                        continue;
                error += (g - w) * (g - w);
                norm += w * w;
        }
        if (sqrt(error) > bounds[a->dtype] * sqrt(norm))
                fail(j, "'%s' has relative L2 error %.3g, allowed %.3g", name, sqrt(error / norm), bounds[a->dtype]);
}

/* Outputs that are computed are compared as numbers and then made equal; what is left must be equal bit for bit. */
static void compare(struct job *j, const unsigned char *want, unsigned char *got)
{
        const struct op_info *info = &op_infos[j->inst.code];

        for (int i = 0; i < info->nargs; i++) {
                const struct op_arg *a = &j->inst.arg[i];
                bool number = a->dtype == DT_F32 || a->dtype == DT_F16 || a->dtype == DT_BF16;

                if (!a->data || info->role[i] != OP_OUT || !number || j->inst.code == OP_COPY)
                        continue;
                compare_output(j, a, info->arg_names[i], want, got);
                memcpy(got + offset_of(a), want + offset_of(a), op_arg_bytes(a));
        }
        for (size_t i = 0; i < j->bytes; i++) {
                if (want[i] == got[i])
                        continue;
                fail(j, "byte %zu of the block differs: outside an output, or in a copied one", i);
                return;
        }
}

void job_run(struct job *j)
{
        unsigned char *want = image_after(j, j->h->reference), *got = image_after(j, j->h->device);

        j->h->cases++;
        if (want && got)
                compare(j, want, got);
        free(want);
        free(got);
        free(j->image);
}
