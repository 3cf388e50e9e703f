/*
 * What the builders of transformers share: layers as nodes with their weights, in the builders' folder only. Errors are
 * sticky in the graph builder and come out of gb_finish.
 */
#ifndef DJINN_WORKLOADS_LAYERS_H
#define DJINN_WORKLOADS_LAYERS_H

#include <stdbool.h>
#include <stdint.h>

#include "graph.h"
#include "json.h"

struct layers {
        struct graph_builder *b;
        enum op_dtype dtype;
        int64_t layer; /* "%lld" of the names below */
};

/* A weight named as its source in the checkpoint. Without a checkpoint: bias + scale * noise. */
unsigned layer_vector(struct layers *l, const char *source, int64_t n, float scale, float bias);
/* [n,k]; transpose: the checkpoint stores it as [k,n]. */
unsigned layer_matrix(struct layers *l, const char *source, int64_t n, int64_t k, bool transpose, float scale);

/* An activation [batch*rows, width]; name may hold one %lld for the layer. */
unsigned layer_rows(struct layers *l, const char *name, int64_t width);

struct layer_linear {
        const char *out;           /* name of the activation */
        const char *weight, *bias; /* sources; bias NULL: none. May hold one %lld */
        int64_t n, k;
        bool transpose;
        float scale; /* of synthetic weights; 1/sqrt(k) keeps the variance */
};
unsigned layer_linear(struct layers *l, unsigned x, const struct layer_linear *spec);
/* LayerNorm with `source`.weight and, if bias, `source`.bias; the output is named after the source. */
unsigned layer_norm(struct layers *l, const char *source, unsigned x, int64_t width, double eps, bool bias);
unsigned layer_act(struct layers *l, const char *name, unsigned x, int64_t width, enum op_act act);
unsigned layer_add(struct layers *l, const char *name, unsigned a, unsigned b, int64_t width);

/* The activation that a config names, or -1. */
int layer_act_parse(const char *name);

/* config[a] or config[b] (b NULL: one spelling), an integer in [min, max]. Absent and null: otherwise, which must be
 * given as at least min, else the field is required. 0 or -EINVAL with a sentence. */
int layer_config_int(const json *config, const char *a, const char *b, int64_t min, int64_t max, int64_t otherwise,
                     int64_t *out);
/* true or false; absent and null: otherwise. */
int layer_config_bool(const json *config, const char *key, bool otherwise, bool *out);
/* A layer norm's epsilon, 1e-5 where absent. */
int layer_config_eps(const json *config, const char *key, double *out);

#endif
