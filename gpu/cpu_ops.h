/* The ops of the cpu device, one function each, on operands in host memory. Private to gpu/. */
#ifndef DJINN_GPU_CPU_OPS_H
#define DJINN_GPU_CPU_OPS_H

#include "cpu_kernels.h"
#include "op.h"

struct cpu_step {
        int (*run)(const struct cpu_step *s); /* 0, or -ENOMEM: the library had no room for packing */
        const struct cpu_kernels *kernels;
        float *scratch; /* cpu_step_scratch() floats, shared by all steps of a plan */
        struct op_inst inst;
};

/* Fills everything but scratch. */
void cpu_step_init(struct cpu_step *s, const struct op_inst *inst, const struct cpu_kernels *kernels);
/* How many floats of scratch the instruction needs. */
size_t cpu_step_scratch(const struct op_inst *inst);

#endif
