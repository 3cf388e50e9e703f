/*
 * One instruction, its operands side by side in one block with canaries between, run on the reference and on a device.
 * The device's block must equal the reference's: outputs within the bound of their dtype (NaN where the reference has
 * NaN), everything else bit for bit; a second run must repeat the first bit for bit.
 */
#ifndef DJINN_TESTS_CONFORM_GPU_HARNESS_H
#define DJINN_TESTS_CONFORM_GPU_HARNESS_H

#include "device.h"
#include "prng.h"

struct harness {
        struct device *reference, *device;
        struct prng prng;
        unsigned cases, failures;
};

struct job {
        struct harness *h;
        struct op_inst inst; /* data holds 1 + the offset in image while the job is built */
        unsigned char *image;
        size_t bytes, room;
        size_t skew; /* elements by which operands miss their 64-byte alignment */
        char what[160];
};

/* A job for this op; `what` names it in a message of failure. */
void job_begin(struct job *j, struct harness *h, enum op_code code, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));
/* Adds operand arg of ndim dimensions: floats uniform in [-1, 1), I32 and U8 random. */
void job_arg(struct job *j, int arg, enum op_dtype dtype, int ndim, int64_t d0, int64_t d1, int64_t d2);
/* Operand arg is the very same bytes as operand of. */
void job_alias(struct job *j, int arg, int of);
void job_set(struct job *j, int arg, int64_t i, double v);
void job_scale(struct job *j, int arg, double factor);
/* Adds the I32[2] operand. */
void job_cursor(struct job *j, int arg, int32_t position, int32_t emitted);
/* Runs and compares; frees the job. */
void job_run(struct job *j);

/* One per op. */
void cases_copy(struct harness *h);
void cases_embed(struct harness *h);
void cases_layernorm(struct harness *h);
void cases_linear(struct harness *h);
void cases_act(struct harness *h);
void cases_add(struct harness *h);
void cases_kv_append(struct harness *h);
void cases_attention(struct harness *h);
void cases_last_row(struct harness *h);
void cases_argmax(struct harness *h);
void cases_emit(struct harness *h);

#endif
