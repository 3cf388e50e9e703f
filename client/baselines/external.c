/* A program of the user's, which does the work in its own way (../external.h). Its switches are unknown. */
#include <stddef.h>

#include "baselines.h"

const struct baseline_def baseline_external = {
    .name = "external",
    .what = "a program that the config names (command), started only with --allow-external",
    .reason = NULL,
    .external = true,
};
