/* What a result must say of the place where it was measured: host, kernel, CPU, governor, NUMA, memory, build. */
#ifndef DJINN_BASE_MANIFEST_H
#define DJINN_BASE_MANIFEST_H

#include "json.h"

/* A new object: {host, boot_id, kernel, cpu{model, cores_online, governor, smt, numa_nodes}, memory_bytes,
 * clock{cost_ns, resolution_ns, source}, build{version, commit, compiler, options, type}, when}. Unknown values are null. */
json *manifest_host(void);
/* /proc/sys/kernel/random/boot_id as two words: the same for two processes exactly when they share a kernel. */
void manifest_boot_id(uint64_t out[2]);
const char *manifest_version(void);
const char *manifest_commit(void);

#endif
