/* The table of presets; see ../baseline.h. */
#ifndef DJINN_CLIENT_BASELINES_H
#define DJINN_CLIENT_BASELINES_H

#include "../baseline.h"

extern const struct baseline_def baseline_native_pytorch, baseline_full_djinn, baseline_pytorch_rpc,
    baseline_blind_opaque, baseline_semantic_blind, baseline_blind_roundtrip, baseline_external;

#endif
