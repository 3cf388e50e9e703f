/*
 * The device contract: where ops run. One file per kind of device, one table (struct dev_ops), one entry in dev_kinds[].
 * "reference" (plain C) defines the ops; "cpu" runs them through a maths library; "cuda" comes later.
 *
 * One thread uses a device. Work is queued in order on one stream: dev_run returns when the work is queued (a device
 * without queues has done it by then); dev_test says when it is done. Plans are immutable and may be run again and again:
 * everything that changes from step to step lies in device memory.
 */
#ifndef DJINN_GPU_DEVICE_H
#define DJINN_GPU_DEVICE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "mem_region.h"
#include "op.h"

struct device;
struct dev_plan;

struct dev_props {
        char name[96];          /* "cpu: Intel(R) Xeon(R) ... (OpenBLAS SkylakeX, 1 thread)" */
        char library[64];       /* maths library and version */
        int threads;
        size_t memory_bytes;
        double read_bytes_per_s;        /* ceilings measured by dev_measure, 0 until then */
        double flop_per_s[DT_COUNT];    /* matrix product, by dtype; 0 unknown */
        size_t cache_bytes;             /* what fits here is read at cache_bytes_per_s instead; 0: no such cache */
        double cache_bytes_per_s;       /* measured too */
        int numa;
        char pci[16];
        bool host_memory;       /* ops may be given plain host addresses; put and get are memcpy */
};

struct dev_opts {
        int ordinal;
        int threads;            /* of the engine; 0: one less than the cores, at least 1 */
};

/* When queued work is done: started and filled by dev_run, asked by dev_test. */
struct dev_event {
        uint64_t ticket;
        uint64_t exec_ns;       /* device time of the operations, valid once dev_test said 1 */
};

struct dev_ops {
        const char *name;
        const char *(*unavailable)(void);       /* NULL or the reason */
        int (*open)(const struct dev_opts *opts, struct device **out);
        void (*close)(struct device *d);
        void (*query)(const struct device *d, struct dev_props *out);
        /* Measures the ceilings in dev_props (under a second). */
        int (*measure)(struct device *d);
        /* Zeroed device memory, at least 64-byte aligned (device pages where the device has them). */
        int (*alloc)(struct device *d, size_t len, struct mem_region *out);
        void (*free)(struct device *d, struct mem_region *region);
        /* Bytes between host memory and device memory, queued in order with the runs. */
        int (*put)(struct device *d, void *dst, const void *host, size_t len);
        int (*get)(struct device *d, void *host, const void *src, size_t len);
        int (*copy)(struct device *d, void *dst, const void *src, size_t len);
        int (*host_register)(struct device *d, void *host, size_t len);
        int (*export)(struct device *d, struct mem_region *region);     /* fills fd, ipc_handle; -ENOTSUP */
        int (*flush)(struct device *d, const struct mem_region *region);
        /* NULL: yes; else why not. */
        const char *(*supports)(const struct device *d, const struct op_inst *inst);
        /* Prepares n instructions (checked by op_check here) for running as one; copies them. An output that shares
         * bytes with another operand is refused, unless it is the very same bytes as an input of COPY, ACT, ADD, the x
         * of LAYERNORM or the residual of LINEAR. */
        int (*plan_make)(struct device *d, const struct op_inst *insts, size_t n, struct dev_plan **out);
        void (*plan_free)(struct dev_plan *p);
        int (*run)(struct dev_plan *p, struct dev_event *ev);
        int (*test)(struct device *d, struct dev_event *ev);    /* 1 done, 0 not yet, -errno failed */
        int (*sync)(struct device *d);                          /* until all queued work is done */
};

struct device {
        const struct dev_ops *ops;
};

struct dev_plan {
        struct device *dev;
};

struct dev_kind {
        const char *name;               /* "cpu", "reference", "cuda" */
        const struct dev_ops *ops;      /* NULL: not built */
        const char *reason;             /* why not built */
        const char *what;               /* one line for `list` */
};

extern const struct dev_kind dev_kinds[];       /* ends with name NULL */

/* "cpu", "reference", "cuda", "cuda:1": -ENOENT unknown, -ENODEV not here, with the reason. */
int dev_open(const char *name, int threads, struct device **out);
const char *dev_unavailable(const struct dev_kind *k);

static inline void dev_close(struct device *d)
{
        d->ops->close(d);
}

static inline int dev_plan_make(struct device *d, const struct op_inst *insts, size_t n, struct dev_plan **out)
{
        return d->ops->plan_make(d, insts, n, out);
}

static inline void dev_plan_free(struct dev_plan *p)
{
        if (p)
                p->dev->ops->plan_free(p);
}

static inline int dev_run(struct dev_plan *p, struct dev_event *ev)
{
        return p->dev->ops->run(p, ev);
}

static inline int dev_test(struct device *d, struct dev_event *ev)
{
        return d->ops->test(d, ev);
}

#endif
