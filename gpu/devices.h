/* The devices that dev_kinds[] is made of. Private to gpu/. */
#ifndef DJINN_GPU_DEVICES_H
#define DJINN_GPU_DEVICES_H

#include "device.h"

#define DEV_THREADS_MAX 1024

extern const struct dev_ops dev_cpu_ops;
extern const struct dev_ops dev_reference_ops;

#endif
