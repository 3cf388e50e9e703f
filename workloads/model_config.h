/* Built-in configurations by model id: an architecture with synthetic weights where no checkpoint is found. */
#ifndef DJINN_WORKLOADS_MODEL_CONFIG_H
#define DJINN_WORKLOADS_MODEL_CONFIG_H

#include "json.h"

/* The config.json of a known model, "name" or "org/name", with or without @revision: a new document, or NULL without a
 * sentence when the id is not known or its builder does not exist. */
json *model_config_preset(const char *model_id);
/* Why a known id cannot run in this version ("needs the Llama builder, ..."), or NULL. */
const char *model_config_reason(const char *model_id);
/* The same for a model_type of a config.json that was found. */
const char *model_config_type_reason(const char *model_type);

#endif
