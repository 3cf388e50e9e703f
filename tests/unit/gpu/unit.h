/* cmocka needs these three in front. */
#ifndef DJINN_TESTS_UNIT_GPU_UNIT_H
#define DJINN_TESTS_UNIT_GPU_UNIT_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "op.h"

static inline struct op_arg arg_of(const void *data, enum op_dtype t, int ndim, int64_t d0, int64_t d1, int64_t d2)
{
        return (struct op_arg){.data = (void *)(uintptr_t)data, .dtype = t, .ndim = ndim, .dims = {d0, d1, d2}};
}

#define VECTOR(p, t, n)     arg_of(p, t, 1, n, 0, 0)
#define MATRIX(p, t, r, c)  arg_of(p, t, 2, r, c, 0)
#define CUBE(p, t, b, r, c) arg_of(p, t, 3, b, r, c)

#endif
