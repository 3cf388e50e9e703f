/*
 * verify: a model folder's stored cases (reference.json) run on a device of this host. One function per task in a table;
 * a task that has no builder yet says so.
 */
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "check.h"
#include "device.h"
#include "digest.h"
#include "err.h"
#include "json.h"
#include "tools.h"
#include "weights.h"
#include "workload.h"

#define TOLERANCE           1e-5            /* relative L2 error in float32 */
#define NEAR_TIE            (4 * TOLERANCE) /* of the largest logit: closer than this, rounding may choose either */
#define CONFIG_MAX_BYTES    (8u << 20)
#define REFERENCE_MAX_BYTES (256u << 20)

struct verify_opts {
        const char *model, *device;
        int64_t threads;
};

static const struct opt verify_options[] = {
    {"model", .metavar = "DIR", .type = OPT_STR, .offset = offsetof(struct verify_opts, model), .required = true,
     .help = "folder with config.json, safetensors and reference.json"},
    {"device", .metavar = "D", .type = OPT_STR, .offset = offsetof(struct verify_opts, device), .preset = "cpu",
     .help = "device to run on (see `djinnbench list`)"},
    {"threads", .metavar = "N", .type = OPT_INT, .offset = offsetof(struct verify_opts, threads), .max = 1024,
     .help = "threads of the device; 0: all cores but one"},
};

const struct opts_spec verify_spec = {
    .name = "djinnbench verify",
    .usage = "--model DIR [--device D]",
    .about = "Runs every case of DIR/reference.json in float32 and prints, as JSON, how far the results are from it: "
             "max_abs_err, rel_l2 and, for language models, whether the argmax of every position and the greedily "
             "chosen tokens are equal. Where the two best logits are nearly equal another choice is rounding and not "
             "an error; such places are listed. Exit status 1 when a case fails.",
    .table = verify_options,
    .count = ARRAY_LEN(verify_options),
};

struct verify {
        int dir_fd;
        json *config, *reference;
        struct checkpoint *checkpoint;
        struct device *dev;
        json *cases; /* of the output */
        json *out;
        bool failed;
};

/* ---- numbers ---- */

struct error {
        double max_abs, rel_l2;
};

/* NaN anywhere makes both NaN, which passes no limit. */
static struct error compare(const float *have, const double *want, size_t n)
{
        double worst = 0, diff2 = 0, want2 = 0;

        for (size_t i = 0; i < n; i++) {
                double d = fabs((double)have[i] - want[i]);

                worst = d > worst || isnan(d) ? d : worst;
                diff2 += d * d;
                want2 += want[i] * want[i];
        }
        if (isnan(diff2))
                worst = diff2;
        return (struct error){worst, sqrt(want2 > 0 ? diff2 / want2 : diff2)};
}

static struct error worse(struct error a, struct error b)
{
        return (struct error){!(a.max_abs >= b.max_abs) ? b.max_abs : a.max_abs,
                              !(a.rel_l2 >= b.rel_l2) ? b.rel_l2 : a.rel_l2};
}

static size_t argmax(const float *v, size_t n)
{
        size_t best = 0;

        for (size_t i = 1; i < n; i++)
                if (v[i] > v[best])
                        best = i;
        return best;
}

static double largest(const float *v, size_t n)
{
        double most = 0;

        for (size_t i = 0; i < n; i++)
                most = fabs((double)v[i]) > most ? fabs((double)v[i]) : most;
        return most;
}

/* A list of numbers into a new array; absent: NULL and 0. */
static int read_numbers(const json *list, const char *what, double **out, size_t *n)
{
        size_t i = 0;

        *out = NULL;
        *n = json_count(list);
        if (json_is_null(list))
                return 0;
        if (!json_is_array(list))
                return err_set(-EINVAL, "reference.json: \"%s\" is not a list", what);
        *out = calloc(*n + 1, sizeof(**out));
        if (!*out)
                return err_set(-ENOMEM, "reference.json: no memory for \"%s\"", what);
        for (const json *v = json_first(list); v; v = json_next(v)) {
                if (!json_is_num(v))
                        return err_set(-EINVAL, "reference.json: \"%s\" holds something that is no number", what);
                (*out)[i++] = json_num(v, 0);
        }
        return 0;
}

/* A list of whole numbers in [0, below). */
static int read_ids(const json *list, const char *what, int64_t below, int32_t **out, size_t *n)
{
        double *v;
        int rc = read_numbers(list, what, &v, n);

        *out = rc == 0 ? calloc(*n + 1, sizeof(**out)) : NULL;
        if (rc == 0 && !*out)
                rc = err_set(-ENOMEM, "reference.json: no memory for \"%s\"", what);
        for (size_t i = 0; i < *n && rc == 0; i++) {
                if (!(v[i] >= 0 && v[i] < (double)below) || v[i] != floor(v[i]))
                        rc = err_set(-EINVAL, "reference.json: \"%s\"[%zu] is %g, expected a whole number below %lld",
                                     what, i, v[i], (long long)below);
                else
                        (*out)[i] = (int32_t)v[i];
        }
        free(v);
        return rc;
}

/* ---- language models ---- */

struct causal_case {
        int32_t *ids, *argmax, *greedy;
        size_t nids, nargmax, ngreedy;
        double *last, *first, *margin;
        size_t nlast, nfirst, nmargin;
};

static void causal_case_free(struct causal_case *c)
{
        free(c->ids);
        free(c->argmax);
        free(c->greedy);
        free(c->last);
        free(c->first);
        free(c->margin);
}

static int causal_case_read(const json *j, int64_t vocab, struct causal_case *c)
{
        int rc;

        memset(c, 0, sizeof(*c));
        if ((rc = read_ids(json_get(j, "input_ids"), "input_ids", vocab, &c->ids, &c->nids)) < 0 ||
            (rc = read_ids(json_get(j, "argmax_per_position"), "argmax_per_position", vocab, &c->argmax, &c->nargmax)) <
                0 ||
            (rc = read_ids(json_get(j, "greedy_tokens"), "greedy_tokens", vocab, &c->greedy, &c->ngreedy)) < 0 ||
            (rc = read_numbers(json_get(j, "last_logits"), "last_logits", &c->last, &c->nlast)) < 0 ||
            (rc = read_numbers(json_get(j, "first_logits_row"), "first_logits_row", &c->first, &c->nfirst)) < 0 ||
            (rc = read_numbers(json_get(j, "greedy_top2_margin"), "greedy_top2_margin", &c->margin, &c->nmargin)) < 0)
                return rc;
        if (c->nids == 0 || c->nlast == 0 || c->nlast > (size_t)vocab || c->nfirst > (size_t)vocab ||
            (c->nargmax && c->nargmax != c->nids))
                return err_set(-EINVAL,
                               "reference.json: a case needs input_ids, last_logits of at most %lld values, and "
                               "one argmax_per_position for each id",
                               (long long)vocab);
        return 0;
}

struct causal {
        struct local_model *m;
        size_t vocab;
        float *last, *all; /* logits: of the last position, of every position */
        json *ties;
};

static void note_tie(struct causal *k, const char *where, size_t at, double margin)
{
        json *tie = json_object();

        json_set_int(tie, where, (int64_t)at);
        json_set_num(tie, "margin", margin);
        json_push(k->ties, tie);
}

/* Whether token `want` is as good as the best of these logits, but for rounding. */
static bool near_tie(const float *logits, size_t n, size_t have, size_t want, double *margin)
{
        *margin = (double)logits[have] - (double)logits[want];
        return *margin <= NEAR_TIE * largest(logits, n);
}

static int prefill(struct causal *k, const struct causal_case *c, int32_t *token)
{
        int32_t cursor[2] = {0, 0};
        const struct local_io in[] = {{ROLE_IDS, c->ids, c->nids * sizeof(*c->ids)},
                                      {ROLE_CURSOR, cursor, sizeof(cursor)}};
        const struct local_io out[] = {{ROLE_LAST, k->last, k->vocab * sizeof(float)},
                                       {ROLE_ALL, k->all, c->nids * k->vocab * sizeof(float)},
                                       {ROLE_TOKEN, token, sizeof(*token)}};

        return local_run(k->m, 1u << SEG_BODY | 1u << SEG_LAST | 1u << SEG_CHOOSE | 1u << SEG_ALL, (uint32_t)c->nids,
                         in, ARRAY_LEN(in), out, ARRAY_LEN(out));
}

static int decode(struct causal *k, int32_t fed, int32_t *token)
{
        const struct local_io in[] = {{ROLE_IDS, &fed, sizeof(fed)}};
        const struct local_io out[] = {{ROLE_LAST, k->last, k->vocab * sizeof(float)},
                                       {ROLE_TOKEN, token, sizeof(*token)}};

        return local_run(k->m, 1u << SEG_BODY | 1u << SEG_LAST | 1u << SEG_CHOOSE, 1, in, ARRAY_LEN(in), out,
                         ARRAY_LEN(out));
}

/* The reference's tokens are fed, so every step is compared with the same history, and a near-tie costs one step. While
 * all tokens are equal that is what free running does. */
static int check_greedy(struct causal *k, const struct causal_case *c, int32_t token, json *chosen, bool *match)
{
        *match = true;
        for (size_t i = 0; i < c->ngreedy; i++) {
                double margin;

                if (i > 0) {
                        int rc = decode(k, c->greedy[i - 1], &token);

                        if (rc < 0)
                                return rc;
                }
                json_push(chosen, json_of_int(token));
                if (token == c->greedy[i])
                        continue;
                bool tie = near_tie(k->last, k->vocab, argmax(k->last, k->vocab), (size_t)c->greedy[i], &margin);

                if (tie && (i >= c->nmargin || c->margin[i] <= NEAR_TIE * largest(k->last, k->vocab)))
                        note_tie(k, "greedy_step", i, margin);
                else
                        *match = false;
        }
        return 0;
}

static bool check_argmax(struct causal *k, const struct causal_case *c)
{
        bool match = true;

        for (size_t i = 0; i < c->nargmax; i++) {
                const float *row = k->all + i * k->vocab;
                size_t have = argmax(row, k->vocab);
                double margin;

                if (have == (size_t)c->argmax[i])
                        continue;
                if (near_tie(row, k->vocab, have, (size_t)c->argmax[i], &margin))
                        note_tie(k, "position", i, margin);
                else
                        match = false;
        }
        return match;
}

static int causal_run_case(struct verify *v, struct causal *k, const struct causal_case *c)
{
        json *out = json_object(), *chosen = json_array();
        bool greedy = true;
        int32_t token = 0;

        k->ties = json_array();
        json_set_int(out, "input_tokens", (int64_t)c->nids);
        json_set(out, "greedy_tokens", chosen);
        json_set(out, "near_ties", k->ties);
        json_push(v->cases, out);
        int rc = prefill(k, c, &token);

        if (rc < 0)
                return rc;
        struct error last = compare(k->last, c->last, c->nlast), first = compare(k->all, c->first, c->nfirst);
        struct error both = worse(last, first);
        bool positions = check_argmax(k, c);

        rc = check_greedy(k, c, token, chosen, &greedy);
        bool pass = both.rel_l2 <= TOLERANCE && positions && greedy;

        json_set_num(out, "max_abs_err", both.max_abs);
        json_set_num(out, "rel_l2", both.rel_l2);
        json_set_num(out, "last_rel_l2", last.rel_l2);
        json_set_num(out, "first_rel_l2", first.rel_l2);
        json_set_bool(out, "argmax_match", positions);
        json_set_bool(out, "greedy_match", greedy);
        json_set_bool(out, "pass", pass);
        v->failed = v->failed || !pass;
        return rc;
}

/* What the largest case needs: positions in one call, and in the caches. */
static int causal_extent(const struct verify *v, int64_t vocab, uint32_t *rows, uint32_t *context)
{
        *rows = 1;
        *context = 1;
        for (const json *j = json_first(json_get(v->reference, "cases")); j; j = json_next(j)) {
                struct causal_case c;
                int rc = causal_case_read(j, vocab, &c);
                size_t all = rc == 0 ? c.nids + (c.ngreedy ? c.ngreedy - 1 : 0) : 0;

                if (rc == 0 && all > INT32_MAX)
                        rc = err_set(-EINVAL, "reference.json: a case of %zu positions", all);
                if (rc == 0) {
                        *rows = c.nids > *rows ? (uint32_t)c.nids : *rows;
                        *context = all > *context ? (uint32_t)all : *context;
                }
                causal_case_free(&c);
                if (rc < 0)
                        return rc;
        }
        return 0;
}

static void describe(struct verify *v, const struct local_model *m)
{
        char hex[33];

        digest_hex(local_weights_digest(m), hex);
        json_set_str(v->out, "weights_digest", hex);
}

static int causal_cases(struct verify *v, struct causal *k)
{
        int rc = 0;

        describe(v, k->m);
        for (const json *j = json_first(json_get(v->reference, "cases")); j && rc == 0; j = json_next(j)) {
                struct causal_case c;

                rc = causal_case_read(j, (int64_t)k->vocab, &c);
                if (rc == 0)
                        rc = causal_run_case(v, k, &c);
                causal_case_free(&c);
        }
        return rc;
}

static int verify_causal(struct verify *v)
{
        const struct weights_source src = {.kind = WEIGHTS_CHECKPOINT, .checkpoint = v->checkpoint};
        struct causal k = {0};
        struct graph g = {0};
        uint32_t rows, context;
        int64_t vocab;
        int rc = json_int(v->config, "vocab_size", 1, 1 << 24, &vocab);

        if (rc < 0)
                return rc == -ENOENT ? err_set(-EINVAL, "config.json: \"vocab_size\" is missing") : rc;
        if ((rc = causal_extent(v, vocab, &rows, &context)) < 0 ||
            (rc = gpt2_build(v->config, 1, rows, context, DT_F32, &g)) < 0)
                return rc;
        k.vocab = (size_t)vocab;
        k.last = malloc(k.vocab * sizeof(float));
        k.all = calloc(rows, k.vocab * sizeof(float));
        rc = k.last && k.all ? local_open(&g, &src, v->dev, &k.m) : err_set(-ENOMEM, "no memory for the logits");
        if (rc == 0)
                rc = causal_cases(v, &k);
        local_close(k.m);
        free(k.last);
        free(k.all);
        graph_free(&g);
        return rc;
}

/* ---- encoder ---- */

static int encoder_run(struct verify *v, const struct encoder_shape *shape, const double *input, float *io, size_t n)
{
        const struct weights_source src = {.kind = WEIGHTS_CHECKPOINT, .checkpoint = v->checkpoint};
        const struct local_io in = {ROLE_INPUT, io, n * sizeof(*io)}, out = {ROLE_OUTPUT, io, n * sizeof(*io)};
        struct local_model *m = NULL;
        struct graph g;
        int rc = encoder_build(shape, DT_F32, &g);

        for (size_t i = 0; i < n; i++)
                io[i] = (float)input[i];
        if (rc == 0)
                rc = local_open(&g, &src, v->dev, &m);
        if (rc == 0) {
                describe(v, m);
                rc = local_run(m, 1u << SEG_BODY, (uint32_t)shape->rows, &in, 1, &out, 1);
        }
        local_close(m);
        graph_free(&g);
        return rc;
}

static int encoder_compare(struct verify *v, const struct encoder_shape *shape, const double *input, const double *want,
                           size_t n)
{
        float *io = malloc(n * sizeof(*io));
        int rc = io ? encoder_run(v, shape, input, io, n) : err_set(-ENOMEM, "no memory for a case");

        if (rc == 0) {
                struct error e = compare(io, want, n);
                json *out = json_object();

                json_set_num(out, "max_abs_err", e.max_abs);
                json_set_num(out, "rel_l2", e.rel_l2);
                json_set_bool(out, "pass", e.rel_l2 <= TOLERANCE);
                json_push(v->cases, out);
                v->failed = v->failed || !(e.rel_l2 <= TOLERANCE);
        }
        free(io);
        return rc;
}

static int encoder_case(struct verify *v, struct encoder_shape *shape, const json *j)
{
        double *dims = NULL, *input = NULL, *want = NULL;
        size_t ndims, ninput, nwant;
        int rc = read_numbers(json_get(j, "shape"), "shape", &dims, &ndims);

        if (rc == 0)
                rc = read_numbers(json_get(j, "input"), "input", &input, &ninput);
        if (rc == 0)
                rc = read_numbers(json_get(j, "output"), "output", &want, &nwant);
        if (rc == 0 &&
            (ndims != 3 || !(dims[0] >= 1 && dims[1] >= 1 && dims[0] * dims[1] < 1e9) ||
             dims[2] != (double)shape->hidden || dims[0] * dims[1] * dims[2] != (double)ninput || ninput != nwant))
                rc = err_set(-EINVAL,
                             "reference.json: a case needs a shape [batch, rows, %lld] and as many values in "
                             "input and output",
                             (long long)shape->hidden);
        if (rc == 0) {
                shape->batch = (int64_t)dims[0];
                shape->rows = (int64_t)dims[1];
                rc = encoder_compare(v, shape, input, want, ninput);
        }
        free(dims);
        free(input);
        free(want);
        return rc;
}

static int verify_encoder(struct verify *v)
{
        struct encoder_shape shape = {0};
        int rc = encoder_shape_read(v->config, &shape);

        /* Whether there is a norm at the end is not in the config: the checkpoint says. */
        shape.final_norm =
            checkpoint_find(v->checkpoint, "norm.weight") || checkpoint_find(v->checkpoint, "encoder.norm.weight");
        for (const json *j = json_first(json_get(v->reference, "cases")); j && rc == 0; j = json_next(j))
                rc = encoder_case(v, &shape, j);
        return rc;
}

/* ---- any ---- */

static const struct task {
        const char *name;
        int (*run)(struct verify *v);
        const char *reason; /* run NULL */
} tasks[] = {
    {"causal_lm", verify_causal, NULL},
    {"encoder", verify_encoder, NULL},
    {"image_classification", NULL, "needs the ResNet builder, which this version does not have"},
};

static int run_task(struct verify *v)
{
        const char *name = json_str(json_get(v->reference, "task"), "");

        if (json_count(json_get(v->reference, "cases")) == 0 || !json_is_array(json_get(v->reference, "cases")))
                return err_set(-EINVAL, "reference.json: no \"cases\"");
        for (size_t i = 0; i < ARRAY_LEN(tasks); i++) {
                if (strcmp(tasks[i].name, name) != 0)
                        continue;
                if (!tasks[i].run)
                        return err_set(-ENOTSUP, "task \"%s\" %s", name, tasks[i].reason);
                json_set_str(v->out, "task", name);
                return tasks[i].run(v);
        }
        return err_set(-ENOTSUP, "reference.json: task \"%.64s\" is not one of causal_lm, encoder", name);
}

static json *load(int dir_fd, const char *name, size_t max)
{
        char *text;
        size_t len;

        if (model_file_read(dir_fd, name, max, &text, &len) < 0)
                return NULL;
        json *j = json_parse(text, len, name);

        free(text);
        return j;
}

/* The folder's files and the device; the status to return when that fails. */
static int open_all(struct verify *v, const struct verify_opts *o, enum exit_status *status)
{
        int rc;

        *status = EXIT_USAGE;
        v->dir_fd = open(o->model, O_PATH | O_DIRECTORY | O_CLOEXEC);
        if (v->dir_fd < 0)
                return err_set(-errno, "--model %s: cannot open: %s", o->model, strerror(errno));
        v->config = load(v->dir_fd, "config.json", CONFIG_MAX_BYTES);
        v->reference = v->config ? load(v->dir_fd, "reference.json", REFERENCE_MAX_BYTES) : NULL;
        if (!v->reference)
                return err_trail(-EINVAL, "in %s", o->model);
        if ((rc = checkpoint_open(v->dir_fd, o->model, &v->checkpoint)) < 0)
                return rc;
        rc = dev_open(o->device, (int)o->threads, &v->dev);
        if (rc == -ENODEV || rc == -ENOMEM)
                *status = EXIT_ENVIRONMENT;
        return rc;
}

static void close_all(struct verify *v)
{
        if (v->dev)
                dev_close(v->dev);
        checkpoint_close(v->checkpoint);
        json_free(v->config);
        json_free(v->reference);
        json_free(v->out);
        if (v->dir_fd >= 0)
                close(v->dir_fd);
}

static void print(struct verify *v, const struct verify_opts *o)
{
        struct dev_props props;

        v->dev->ops->query(v->dev, &props);
        json_set_str(v->out, "device", o->device);
        json_set_str(v->out, "device_name", props.name);
        json_set_str(v->out, "library", props.library);
        json_set_str(v->out, "dtype", op_dtype_names[DT_F32]);
        json_set_num(v->out, "tolerance", TOLERANCE);
        json_set_bool(v->out, "pass", !v->failed);
        char *text = json_text(v->out, true);

        fputs(text, stdout);
        free(text);
}

static int verify_run(const struct verify_opts *o)
{
        struct verify v = {.dir_fd = -1, .out = json_object(), .cases = json_array()};
        enum exit_status status;
        int rc;

        json_set_str(v.out, "model", o->model);
        json_set(v.out, "cases", v.cases);
        rc = open_all(&v, o, &status);
        if (rc == 0) {
                rc = run_task(&v);
                status = rc == -ENOMEM ? EXIT_ENVIRONMENT : EXIT_USAGE;
        }
        if (rc == 0) {
                print(&v, o);
                status = v.failed ? EXIT_INVALID : EXIT_DONE;
        } else {
                command_fail(&verify_spec, rc, status);
        }
        close_all(&v);
        return (int)status;
}

int verify_main(int argc, char **argv)
{
        struct verify_opts o = {0};
        struct opts_parsed parsed;
        int rc = command_parse(&verify_spec, argc, argv, &o, &parsed);

        if (rc == COMMAND_GO_ON)
                rc = verify_run(&o);
        opts_free(&verify_spec, &o, &parsed);
        return rc;
}
