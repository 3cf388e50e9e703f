/* A workload built from its spec: model looked up, graph made, prompt tokenised; and its inputs. All of it untimed. */
#include "workload.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "check.h"
#include "err.h"
#include "files.h"
#include "log.h"
#include "model_config.h"
#include "prng.h"
#include "tokenizer.h"

#define CONFIG_MAX_BYTES (8u << 20)
#define PROMPT_MAX_BYTES (16u << 20)

/* ---- building ---- */

static json *load_config(int dir_fd)
{
        char *text;
        size_t len;

        if (model_file_read(dir_fd, "config.json", CONFIG_MAX_BYTES, &text, &len) < 0)
                return NULL;
        json *config = json_parse(text, len, "config.json");

        free(text);
        return config;
}

/* A model that is there but has no weights that can be used is an error, not a reason for synthetic ones. */
static int check_checkpoint(int dir_fd, const char *path)
{
        struct checkpoint *c;
        int rc = checkpoint_open(dir_fd, path, &c);

        if (rc < 0)
                return err_trail(rc == -ENOENT ? -EINVAL : rc, "the model was found, its weights cannot be used");
        checkpoint_close(c);
        return 0;
}

static int open_tokenizer(struct workload *w, int dir_fd)
{
        if (!w->spec.prompt_text && !w->spec.prompt_file)
                return 0;
        int rc = tokenizer_open(dir_fd, "tokenizer.json", &w->tokenizer);

        if (rc == -ENOTSUP)
                log_warn("workload %s: %s; ids are drawn at random", w->spec.name, err_text());
        else if (rc == -ENOENT)
                log_info("workload %s: %s has no tokenizer.json; ids are drawn at random", w->spec.name, w->model_path);
        else if (rc < 0)
                return err_trail(rc, "in %s", w->model_path);
        return 0;
}

static int build_found(struct workload *w, int dir_fd)
{
        json *config = load_config(dir_fd);

        if (!config)
                return err_trail(-EINVAL, "in the model's folder %s", w->model_path);
        int rc = w->spec.kind->build(&w->spec, config, w->dtype, &w->graph);

        json_free(config);
        if (rc < 0)
                return err_trail(rc, "in %s", w->model_path);
        w->weights = WEIGHTS_CHECKPOINT;
        rc = check_checkpoint(dir_fd, w->model_path);
        return rc < 0 ? rc : open_tokenizer(w, dir_fd);
}

static int build_preset(struct workload *w, const struct workload_opts *opts)
{
        const char *reason = model_config_reason(w->spec.model_id);
        json *config = model_config_preset(w->spec.model_id);

        if (reason) {
                json_free(config);
                return err_set(-ENOTSUP, "%s %s", w->spec.model_id, reason);
        }
        if (!config)
                return err_trail(-ENOENT, "and there is no built-in configuration of that name");
        if (opts->require_weights) {
                json_free(config);
                return err_trail(-ENOENT, "and --require-weights forbids synthetic ones");
        }
        int rc = w->spec.kind->build(&w->spec, config, w->dtype, &w->graph);

        json_free(config);
        w->weights = WEIGHTS_SYNTHETIC;
        w->synthetic_reason = "no checkpoint was found: a built-in configuration of the same architecture is run";
        return rc;
}

static int build_model(struct workload *w, const struct workload_opts *opts)
{
        int fd = -ENOENT, rc;

        if (opts->roots)
                fd = model_find(opts->roots, w->spec.model_id, w->model_path, sizeof(w->model_path));
        else
                err_set(-ENOENT, "model %s was not looked for: no model root", w->spec.model_id);
        if (fd == -ENOENT)
                return build_preset(w, opts);
        if (fd < 0)
                return fd;
        rc = build_found(w, fd);
        close(fd);
        return rc;
}

static int prompt_text(const struct workload_spec *s, char **text, size_t *len)
{
        if (s->prompt_file)
                return file_read(s->prompt_file, PROMPT_MAX_BYTES, text, len);
        *text = strdup(s->prompt_text ? s->prompt_text : "");
        if (!*text)
                return err_set(-ENOMEM, "no memory for the prompt");
        *len = strlen(*text);
        return 0;
}

static int tokenize_prompt(struct workload *w)
{
        char *text;
        size_t len;
        int rc = prompt_text(&w->spec, &text, &len);

        if (rc < 0)
                return rc;
        if (w->tokenizer)
                rc = tokenizer_encode(w->tokenizer, text, len, &w->prompt_ids, &w->prompt_nids);
        free(text);
        for (size_t i = 0; i < w->prompt_nids && rc == 0; i++)
                if ((uint32_t)w->prompt_ids[i] >= w->graph.h->vocab)
                        rc = err_set(-EINVAL, "%s: the tokenizer gives id %d, the model knows %u", w->model_path,
                                     w->prompt_ids[i], w->graph.h->vocab);
        return rc;
}

int workload_build(const struct workload_spec *spec, const struct workload_opts *opts, struct workload *out)
{
        int rc;

        memset(out, 0, sizeof(*out));
        if (spec->kind->reason)
                return err_set(-ENOTSUP, "%s %s", spec->implementation, spec->kind->reason);
        if (opts->dtype != DT_F32 && opts->dtype != DT_F16 && opts->dtype != DT_BF16)
                return err_set(-EINVAL, "dtype %s: expected float32, float16 or bfloat16", op_dtype_names[opts->dtype]);
        out->spec = *spec;
        out->driver = spec->kind->driver;
        out->dtype = opts->dtype;
        if (spec->model_id) {
                rc = build_model(out, opts);
                if (rc == 0)
                        rc = tokenize_prompt(out);
        } else {
                rc = spec->kind->build(spec, NULL, opts->dtype, &out->graph);
                out->weights = WEIGHTS_SYNTHETIC;
                out->synthetic_reason = "the workload has no checkpoint";
        }
        if (rc < 0) {
                workload_free(out);
                return err_trail(rc, "in workload %s", spec->name);
        }
        out->has_weights = out->graph.h->nrecipes > 0;
        if (!out->has_weights)
                out->synthetic_reason = NULL;
        return 0;
}

void workload_free(struct workload *w)
{
        graph_free(&w->graph);
        tokenizer_close(w->tokenizer);
        free(w->prompt_ids);
        memset(w, 0, sizeof(*w));
}

/* ---- inputs ---- */

enum { STREAM_PROMPT, STREAM_TURN, STREAM_INPUT, STREAM_FRESH };

/* Different for every workload and purpose; the block is part of the index. */
static uint64_t stream_of(const struct workload *w, unsigned purpose, uint32_t turn)
{
        return digest_of(w->spec.name, strlen(w->spec.name)).lo + ((uint64_t)turn << 8 | purpose);
}

static uint64_t index_of(uint32_t block, size_t i)
{
        return (uint64_t)block << 40 | (uint64_t)i;
}

/* Uniform below n, without a division; the bias is below n / 2^64. */
static int32_t id_at(uint64_t seed, uint64_t stream, uint64_t index, uint32_t n)
{
        return (int32_t)((unsigned __int128)prng_at(seed, stream, index) * n >> 64);
}

static void prompt_of_text(const struct workload *w, uint64_t seed, uint64_t number, int32_t *ids, size_t length)
{
        size_t n = w->prompt_nids, shift = (size_t)(number % n);
        uint64_t cycle = number / n;

        for (size_t i = 0; i < length; i++)
                ids[i] = w->prompt_ids[(i + shift) % n];
        if (cycle)
                ids[0] = id_at(seed, stream_of(w, STREAM_FRESH, 0), number, w->graph.h->vocab);
}

int workload_prompt(const struct workload *w, uint64_t seed, uint32_t block, int32_t *ids, size_t length)
{
        uint32_t batch = w->graph.h->batch, vocab = w->graph.h->vocab;

        if (!vocab || length == 0)
                return err_set(-EINVAL, "workload %s: has no prompt", w->spec.name);
        for (uint32_t b = 0; b < batch; b++) {
                int32_t *row = ids + (size_t)b * length;

                if (w->prompt_nids) {
                        prompt_of_text(w, seed, (uint64_t)block * batch + b, row, length);
                        continue;
                }
                for (size_t i = 0; i < length; i++)
                        row[i] = id_at(seed, stream_of(w, STREAM_PROMPT, 0), index_of(block, b * length + i), vocab);
        }
        return 0;
}

void workload_turn_ids(const struct workload *w, uint64_t seed, uint32_t block, uint32_t turn, int32_t *ids, size_t n)
{
        uint64_t stream = stream_of(w, STREAM_TURN, turn);

        for (size_t i = 0; i < n; i++)
                ids[i] = id_at(seed, stream, index_of(block, i), w->graph.h->vocab);
}

void workload_input(const struct workload *w, uint64_t seed, uint32_t block, void *out, size_t bytes)
{
        uint64_t stream = stream_of(w, STREAM_INPUT, 0);
        enum op_dtype dtype = (enum op_dtype)w->graph.h->dtype;
        size_t n = bytes / op_dtype_bytes(dtype);

        for (size_t i = 0; i < n; i++) {
                float f = prng_at_f32(seed, stream, index_of(block, i));

                if (dtype == DT_F32)
                        ((float *)out)[i] = f;
                else if (dtype == DT_F16)
                        ((uint16_t *)out)[i] = op_f32_to_f16(f);
                else if (dtype == DT_BF16)
                        ((uint16_t *)out)[i] = op_f32_to_bf16(f);
                else
                        ((uint8_t *)out)[i] = (uint8_t)prng_at(seed, stream, index_of(block, i));
        }
}
