/*
 * Weights: where the bytes come from and how a graph's recipes turn them into tensors. Checkpoints are untrusted files.
 * Knows safetensors and recipes, no model.
 */
#ifndef DJINN_WEIGHTS_H
#define DJINN_WEIGHTS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "digest.h"
#include "graph.h"

/* ---- safetensors: one folder's checkpoint, single file or shards with model.safetensors.index.json ---- */

struct checkpoint;

struct checkpoint_tensor {
        const char *name;
        enum op_dtype dtype;    /* F32, F16, BF16 (others are listed in errors, not here) */
        int ndim;
        int64_t dims[OP_DIMS_MAX];
        size_t bytes;
};

/* dir_fd: the model's folder. Headers are read and checked (sizes, overlaps, bounds, duplicates, header <= 100 MB,
 * offsets cover exactly the shape); data is read later by pread, so that a file truncated under our feet is an
 * error and not a SIGBUS. -ENOENT: no safetensors there (the sentence names the files that were looked for). */
int checkpoint_open(int dir_fd, const char *name, struct checkpoint **out);
void checkpoint_close(struct checkpoint *c);
/* NULL: not there, or there in a form that this version cannot read. */
const struct checkpoint_tensor *checkpoint_find(const struct checkpoint *c, const char *tensor);
/* Why checkpoint_find said NULL: "is not in the checkpoint", or "is stored as I64, ...". */
const char *checkpoint_lack(const struct checkpoint *c, const char *tensor);
/* Reads elements [first, first+count) converted to fp32. -EIO with the tensor's name when the file has become shorter. */
int checkpoint_read_f32(struct checkpoint *c, const struct checkpoint_tensor *t, size_t first, size_t count, float *out);

/* ---- model lookup (model_path.c): --model-root / DJINN_MODEL_PATH (colon-separated), HF_HUB_CACHE, HF_HOME/hub,
 * ~/.cache/huggingface/hub; ids "name" or "org/name[@revision]", refs/main or the revision; resolves beneath the
 * root. ---- */

struct model_roots;
/* roots: from --model-root, may be NULL/0. */
int model_roots_open(const char *const *roots, size_t n, struct model_roots **out);
void model_roots_close(struct model_roots *r);
/* O_PATH fd of the model's folder, or -ENOENT (not found anywhere: a preset may serve) with the list of places looked at.
 * path_out (TP for messages) gets the folder's path; may be NULL. */
int model_find(struct model_roots *r, const char *model_id, char *path_out, size_t path_len);
/* Opens a file of a model's folder for reading, resolved beneath it; in a hub cache, where snapshots/<revision>/<file>
 * is a link to ../../blobs/<hash>, that one link is followed. fd or -errno with a sentence; -ENOENT: not there. */
int model_file_open(int dir_fd, const char *name);
/* The same, read whole, NUL-terminated; free() it. */
int model_file_read(int dir_fd, const char *name, size_t max_bytes, char **out, size_t *len);

/* ---- a graph's weights, made ---- */

enum weights_kind { WEIGHTS_CHECKPOINT, WEIGHTS_SYNTHETIC };

struct weights_source {
        enum weights_kind kind;
        struct checkpoint *checkpoint;  /* WEIGHTS_CHECKPOINT */
        uint64_t seed;                  /* WEIGHTS_SYNTHETIC */
};

/* Fills `out` (graph_tensor_bytes long, host memory, dtype of the tensor) for weight tensor t by its recipes.
 * A missing source, a shape that does not fit, a value that is not finite or not representable: -EINVAL with the tensor's
 * name. Synthetic: the value of element i of a source depends on (seed, name of the source, i) only, where i counts in
 * the order of the tensor as used (transposed); several pieces need their slice_len then. */
int weights_make(const struct graph *g, unsigned t, const struct weights_source *src, void *out);

/* Identity of the weights of a graph: XXH3-128 over all weight tensors as made, in graph order. Callers fold each tensor
 * in as they make it. */
struct digest_stream;

#endif
