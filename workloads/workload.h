/*
 * Workloads: what an application runs. A builder turns parameters (from a config or a model's config.json) into a graph;
 * one file per family, one entry in workload_kinds[].
 */
#ifndef DJINN_WORKLOADS_WORKLOAD_H
#define DJINN_WORKLOADS_WORKLOAD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "conf.h"
#include "digest.h"
#include "graph.h"
#include "json.h"
#include "weights.h"

enum workload_driver {
        DRIVE_CAUSAL,   /* prompt -> tokens */
        DRIVE_FORWARD,  /* one input -> one output */
};

struct workload_spec {                  /* parsed from the config's workloads[] entry */
        const char *name;               /* [A-Za-z0-9._-]{1,64} */
        const char *category;           /* may be NULL */
        const char *implementation;     /* "hf_causal_lm", "synthetic_transformer", "echo", ... */
        const struct workload_kind *kind;
        const struct conf_node *params; /* for echoing into results as spec */
        /* causal */
        const char *model_id;           /* NULL where the workload has no checkpoint */
        const char *prompt_text;        /* NULL: random ids */
        const char *prompt_file;        /* instead of prompt_text, read by workload_build, from the current folder */
        const struct conf_node *generation;
        int64_t prompt_length, new_tokens, batch_size, turns, turn_tokens;
        const char *unit_name;          /* "tokens", "sequences", "requests" */
        /* transformer */
        int64_t sequence_length, hidden_size, num_heads, num_layers, ff_size;
        /* echo */
        int64_t payload_bytes;
};

struct workload {                       /* built: what client and verify run */
        struct workload_spec spec;
        enum workload_driver driver;
        enum op_dtype dtype;
        struct graph graph;             /* annotated; clients blind a clone where a baseline is blind */
        enum weights_kind weights;
        bool has_weights;               /* echo has none */
        const char *synthetic_reason;   /* why weights are synthetic; NULL otherwise */
        char model_path[512];           /* folder of the checkpoint, "" if none */
        struct tokenizer *tokenizer;    /* NULL: none */
        int32_t *prompt_ids;            /* prompt_text, tokenised; NULL: random ids */
        size_t prompt_nids;
};

struct workload_kind {
        const char *implementation;     /* key in configs */
        const char *what;               /* one line for `list` */
        const char *reason;             /* NULL: can run; else why not ("needs the ResNet builder, ...") */
        const struct conf_field *params;/* known keys of params */
        size_t nparams;
        /* Fills defaults before binding, checks consistency after. */
        void (*defaults)(struct workload_spec *spec);
        int (*check)(struct workload_spec *spec, const struct conf_node *at);
        int (*build)(const struct workload_spec *spec, const json *config, enum op_dtype dtype, struct graph *out);
        enum workload_driver driver;
};

extern const struct workload_kind workload_kinds[];     /* ends with implementation NULL */

/* Parses one entry of workloads[]. A kind with a reason parses (its params unchecked beyond being a map) and is skipped
 * by the sweep. Unknown implementation: error with the nearest known one. Strings live as long as the doc. */
int workload_parse(const struct conf_node *entry, struct workload_spec *out);

struct workload_opts {
        struct model_roots *roots;
        enum op_dtype dtype;
        bool require_weights;
        uint64_t seed;
};

/* Looks the model up, builds the graph; where no checkpoint is found a preset of the same architecture serves
 * (weights WEIGHTS_SYNTHETIC), or -ENOENT when there is none or require_weights. config.json found but no usable
 * safetensors: an error that names the files. -ENOTSUP: the model (or the kind) is known, but this version cannot build
 * it; err_text() is the reason, to be shown as such. *out keeps a copy of *spec, whose strings must outlive it. */
int workload_build(const struct workload_spec *spec, const struct workload_opts *opts, struct workload *out);
void workload_free(struct workload *w);

/* The ids of a prompt for (seed, block), batch*length of them, sequence after sequence; length: per sequence. prompt_text
 * tokenised and repeated to length without padding, rotated by the block's number (once all rotations have been used,
 * the first id is drawn at random besides) so that inputs differ; or random ids below vocab. 0 or -EINVAL. */
int workload_prompt(const struct workload *w, uint64_t seed, uint32_t block, int32_t *ids, size_t length);
/* n new ids of turn `turn` >= 1, random below vocab. */
void workload_turn_ids(const struct workload *w, uint64_t seed, uint32_t block, uint32_t turn, int32_t *ids, size_t n);
/* Input of a feed-forward workload, uniform in [-1,1) (or random bytes for echo), in the graph's dtype. */
void workload_input(const struct workload *w, uint64_t seed, uint32_t block, void *out, size_t bytes);

/* Units of work of one request (SPEC: counted, not assumed): tokens produced (prompt tokens when new_tokens is 0),
 * sequences, requests. */
double workload_units(const struct workload_spec *spec);

/* ---- builders used by verify as well: from a model folder's config.json ---- */
int gpt2_build(const json *config, uint32_t batch, uint32_t rows_max, uint32_t context_max, enum op_dtype dtype,
               struct graph *out);
struct encoder_shape {
        int64_t batch, rows, hidden, heads, layers, ff;
        double eps;
        enum op_act act;        /* of the feed-forward part: ACT_RELU in torch's default */
        bool norm_first;        /* pre-norm */
        bool final_norm;        /* a layer norm at the end ("norm.weight") */
        bool no_bias;
};
/* The model's part of a shape (everything but batch, rows, final_norm) from a config.json of a TransformerEncoder. */
int encoder_shape_read(const json *config, struct encoder_shape *out);
int encoder_build(const struct encoder_shape *shape, enum op_dtype dtype, struct graph *out);
int echo_build(uint64_t payload_bytes, struct graph *out);

/* ---- running a graph here and now, without any server (verify, check pass): local.c ---- */

struct device;
struct local_model;
/* Makes weights and state on the device; calls run on it. */
int local_open(const struct graph *g, const struct weights_source *src, struct device *dev, struct local_model **out);
void local_close(struct local_model *m);
struct digest local_weights_digest(const struct local_model *m);
/* Runs segments (set of 1 << enum graph_segment_kind, in node order) with `rows` new positions. Inputs by role are
 * copied in first, outputs by role copied out after. */
struct local_io { enum graph_role role; void *data; size_t bytes; };
int local_run(struct local_model *m, unsigned segments, uint32_t rows, const struct local_io *in, size_t nin,
              const struct local_io *out, size_t nout);

#endif
