/*
 * Devices whose memory is the host's (reference, cpu) share these slots of struct dev_ops, and the checks on addresses
 * that op_check() cannot make. Private to gpu/.
 */
#ifndef DJINN_GPU_HOST_H
#define DJINN_GPU_HOST_H

#include "device.h"

/* Zeroed, present (no page faults later), page-aligned. -ENOMEM with a sentence; -EINVAL for 0 bytes. */
int host_alloc(struct device *d, size_t len, struct mem_region *out);
void host_free(struct device *d, struct mem_region *region);
int host_put(struct device *d, void *dst, const void *host, size_t len);
int host_get(struct device *d, void *host, const void *src, size_t len);
int host_copy(struct device *d, void *dst, const void *src, size_t len);
int host_register(struct device *d, void *host, size_t len);
int host_export(struct device *d, struct mem_region *region);
int host_flush(struct device *d, const struct mem_region *region);
const char *host_supports(const struct device *d, const struct op_inst *inst);
int host_test(struct device *d, struct dev_event *ev);
int host_sync(struct device *d);

/* n >= 1 and all of them fit: op_check(), addresses aligned to their dtype, and no output shares bytes with another
 * operand, but exactly with an input that the op reads element by element. -EINVAL with a sentence. */
int host_check(const struct op_inst *insts, size_t n);

/* "Intel(R) Xeon(R) Processor", or "unknown processor". */
void host_cpu_name(char *buf, size_t len);
/* The caller's NUMA node, -1 unknown; memory of this host in bytes, 0 unknown. */
int host_numa(void);
size_t host_memory_bytes(void);

#endif
