/* The messages of djinnbench.external/1. What the program answers is untrusted. */
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "clock.h"
#include "err.h"
#include "external.h"

#define PREPARE_NS  (600 * NS_PER_S)
#define BYE_NS      (2 * NS_PER_S)
#define THREADS_MAX 65536

struct external {
        struct external_opts o;
        const struct workload *w;
        struct child *child;
        struct external_info info;
        uint8_t *result; /* of the last answer */
        size_t result_len;
        bool checked; /* the last answer was to a check */
};

/* ---- asking ---- */

/* Text of the program's for people: one line without control characters. */
static void printable(const char *text, char *out, size_t size)
{
        snprintf(out, size, "%s", text);
        for (; *out; out++)
                if ((unsigned char)*out < 0x20 || *out == 0x7f)
                        *out = ' ';
}

/* While preparing an error means "not with me"; later it is a job not done. */
static int refused(struct external *x, const json *answer, bool preparing)
{
        char text[256];

        printable(json_str(json_get(answer, "text"), "no reason given"), text, sizeof(text));
        return err_set(preparing ? -ENOTSUP : -EPROTO, "%s says: %s", x->o.child.name, text);
}

static int of_type(struct external *x, const json *answer, const char *type, bool preparing)
{
        char got[64];

        printable(json_str(json_get(answer, "type"), "none"), got, sizeof(got));
        if (!strcmp(got, type))
                return 0;
        if (!strcmp(got, "error"))
                return refused(x, answer, preparing);
        return err_set(-EPROTO, "%s: an answer of type %s, expected %s", x->o.child.name, got, type);
}

/* Takes the question. After a failure the program is of no use any more and is killed. */
static int ask(struct external *x, json *question, const char *type, uint64_t timeout_ns, json **answer,
               uint64_t *wall_ns)
{
        bool preparing = !strcmp(type, "hello") || !strcmp(type, "ready");
        int rc = child_ask(x->child, question, timeout_ns, answer, wall_ns);

        json_free(question);
        if (rc == 0)
                rc = of_type(x, *answer, type, preparing);
        if (rc < 0) {
                json_free(*answer);
                *answer = NULL;
                child_kill(x->child);
        }
        return rc;
}

static json *message(const char *type)
{
        json *m = json_object();

        json_set_str(m, "type", type);
        return m;
}

/* ---- hello and prepare ---- */

static int take_text(struct external *x, const json *answer, const char *key, bool required, char *out, size_t size)
{
        const json *v = json_get(answer, key);

        printable(json_str(v, ""), out, size);
        if (json_is_str(v) ? *out || !required : json_is_null(v) && !required)
                return 0;
        return err_set(-EPROTO, "%s: its answer needs \"%s\", a text", x->o.child.name, key);
}

static int hello(struct external *x)
{
        json *q = message("hello"), *a;
        int rc;

        json_set_str(q, "protocol", EXTERNAL_PROTOCOL);
        rc = ask(x, q, "hello", x->o.run_ns, &a, NULL);
        if (rc < 0)
                return rc;
        rc = take_text(x, a, "name", true, x->info.name, sizeof(x->info.name));
        if (rc == 0)
                rc = take_text(x, a, "version", false, x->info.version, sizeof(x->info.version));
        json_free(a);
        return rc;
}

static const struct {
        const char *key;
        size_t offset;
} numbers[] = {
#define N(f)                                          \
        {                                             \
#f, offsetof(struct workload_spec, f) \
        }
    N(prompt_length), N(new_tokens), N(batch_size), N(turns),   N(turn_tokens),   N(sequence_length),
    N(hidden_size),   N(num_heads),  N(num_layers), N(ff_size), N(payload_bytes),
#undef N
};

/* Numbers as they are in force, defaults among them; whatever else the config says, as the text that it says. */
static json *params(const struct workload_spec *s)
{
        json *o = json_object();

        for (size_t i = 0; i < s->kind->nparams; i++)
                for (size_t k = 0; k < ARRAY_LEN(numbers); k++)
                        if (!strcmp(s->kind->params[i].key, numbers[k].key))
                                json_set_int(o, numbers[k].key,
                                             *(const int64_t *)((const char *)s + numbers[k].offset));
        for (const struct conf_node *p = s->params ? s->params->first : NULL; p; p = p->next)
                if (p->kind == CONF_SCALAR && !json_get(o, p->key))
                        json_set_str(o, p->key, p->text);
        return o;
}

static json *preparation(const struct workload *w, uint64_t seed)
{
        bool checkpoint = w->has_weights && w->weights == WEIGHTS_CHECKPOINT;
        json *q = message("prepare");

        json_set_str(q, "workload", w->spec.name);
        json_set_str(q, "implementation", w->spec.implementation);
        json_set(q, "params", params(&w->spec));
        json_set_str(q, "dtype", op_dtype_names[w->dtype]);
        json_set_str(q, "model_path", checkpoint ? w->model_path : NULL);
        json_set_str(q, "weights", !w->has_weights ? "none" : checkpoint ? "checkpoint" : "synthetic");
        json_set_int(q, "seed", (int64_t)seed);
        return q;
}

static int prepare(struct external *x, uint64_t seed)
{
        json *a;
        int rc = ask(x, preparation(x->w, seed), "ready", x->o.prepare_ns, &a, NULL);

        if (rc < 0)
                return rc;
        rc = take_text(x, a, "device", true, x->info.device, sizeof(x->info.device));
        if (rc == 0 && json_int(a, "threads", 1, THREADS_MAX, &x->info.threads) < 0)
                rc = err_set(-EPROTO, "%s: its answer to prepare needs \"threads\", how many it computes with",
                             x->o.child.name);
        json_free(a);
        return rc;
}

/* Room for the largest answer: logits of all steps, or the output. */
static int make_room(struct external *x)
{
        const struct graph *g = &x->w->graph;
        size_t n = 0;

        if (x->w->driver != DRIVE_CAUSAL)
                n = graph_tensor_bytes(g, g->h->role[ROLE_OUTPUT], g->h->rows_max, NULL);
        else if (!size_mul((size_t)g->h->batch * g->h->vocab, (size_t)x->w->spec.new_tokens + 1, &n) ||
                 !size_mul(n, sizeof(float), &n))
                return err_set(-EOVERFLOW, "%s: its logits are too many", x->o.child.name);
        x->result = malloc(n + 1);
        return x->result ? 0 : err_set(-ENOMEM, "%s: no memory for its results", x->o.child.name);
}

int external_open(const struct external_opts *opts, const struct workload *w, uint64_t seed, struct external **out)
{
        struct external *x = calloc(1, sizeof(*x));
        int rc;

        *out = NULL;
        if (!x)
                return err_set(-ENOMEM, "%s: no memory", opts->child.name);
        x->o = *opts;
        x->o.prepare_ns = opts->prepare_ns ? opts->prepare_ns : PREPARE_NS;
        x->w = w;
        rc = make_room(x);
        if (rc == 0)
                rc = child_start(&x->o.child, &x->child);
        if (rc == 0)
                rc = hello(x);
        if (rc == 0)
                rc = prepare(x, seed);
        if (rc < 0) {
                if (x->child)
                        child_kill(x->child);
                external_close(x);
                return rc;
        }
        *out = x;
        return 0;
}

void external_close(struct external *x)
{
        json *bye;

        if (!x)
                return;
        if (x->child && !child_dead(x->child)) {
                bye = message("bye");
                (void)child_tell(x->child, bye, BYE_NS);
                json_free(bye);
        }
        child_end(x->child, x->o.child.stop && *x->o.child.stop ? 0 : BYE_NS);
        free(x->result);
        free(x);
}

const struct external_info *external_info(const struct external *x)
{
        return &x->info;
}

bool external_alive(const struct external *x)
{
        return x && !child_dead(x->child);
}

/* ---- numbers to the program ---- */

static double number(const void *at, enum op_dtype t, size_t i)
{
        switch (t) {
        case DT_F16:
                return op_f16_to_f32(((const uint16_t *)at)[i]);
        case DT_BF16:
                return op_bf16_to_f32(((const uint16_t *)at)[i]);
        case DT_U8:
                return ((const uint8_t *)at)[i];
        case DT_I32:
                return ((const int32_t *)at)[i];
        default:
                return ((const float *)at)[i];
        }
}

static json *flat(const void *at, enum op_dtype t, size_t n)
{
        json *list = json_array();

        for (size_t i = 0; i < n; i++)
                json_push(list, json_of_num(number(at, t, i)));
        return list;
}

/* rows lists of n ids that lie `stride` apart */
static json *lists(const int32_t *ids, size_t rows, size_t n, size_t stride)
{
        json *all = json_array();

        for (size_t r = 0; r < rows; r++)
                json_push(all, flat(ids + r * stride, DT_I32, n));
        return all;
}

static void set_input(json *q, const struct external *x, uint32_t turn, const struct exec_data *d)
{
        const struct graph *g = &x->w->graph;
        unsigned in;

        if (x->w->driver == DRIVE_CAUSAL) {
                uint32_t n = workload_shape(x->w, turn, false, false).history;

                json_set(q, "input_ids", lists(d->history, g->h->batch, n, d->history_cap));
                json_set_int(q, "new_tokens", x->w->spec.new_tokens);
                return;
        }
        in = g->h->role[ROLE_INPUT];
        json_set(q, "input",
                 flat(d->input, g->tensors[in].dtype,
                      graph_tensor_bytes(g, in, g->h->rows_max, NULL) / op_dtype_bytes(g->tensors[in].dtype)));
}

/* ---- numbers from the program ---- */

struct sink {
        const char *name, *key;
        void *at;
        enum op_dtype t;
        size_t n;      /* elements so far */
        double lo, hi; /* of integers */
};

static int put_number(struct sink *s, const json *v)
{
        double x = json_num(v, NAN);

        if (!json_is_num(v) || ((s->t == DT_I32 || s->t == DT_U8) && (x != floor(x) || x < s->lo || x > s->hi)))
                return err_set(-EPROTO, "%s: \"%s\": element %zu is not %s", s->name, s->key, s->n,
                               s->t == DT_I32 || s->t == DT_U8 ? "an integer within its range" : "a number");
        switch (s->t) {
        case DT_I32:
                ((int32_t *)s->at)[s->n++] = (int32_t)x;
                break;
        case DT_U8:
                ((uint8_t *)s->at)[s->n++] = (uint8_t)x;
                break;
        case DT_F16:
                ((uint16_t *)s->at)[s->n++] = op_f32_to_f16((float)x);
                break;
        case DT_BF16:
                ((uint16_t *)s->at)[s->n++] = op_f32_to_bf16((float)x);
                break;
        default:
                ((float *)s->at)[s->n++] = (float)x;
        }
        return 0;
}

/* Nested lists of exactly these lengths. */
static int put_list(struct sink *s, const json *v, const size_t *dim, unsigned ndims)
{
        int rc = 0;

        if (!ndims)
                return put_number(s, v);
        if (!json_is_array(v) || json_count(v) != dim[0])
                return err_set(-EPROTO, "%s: \"%s\": expected a list of %zu where a %s of %zu came", s->name, s->key,
                               dim[0], json_is_array(v) ? "list" : "value", json_count(v));
        for (const json *e = json_first(v); e && rc == 0; e = json_next(e))
                rc = put_list(s, e, dim + 1, ndims - 1);
        return rc;
}

static int take(struct external *x, const json *answer, struct sink *s, const size_t *dim, unsigned ndims)
{
        int rc;

        s->name = x->o.child.name;
        s->at = x->result;
        rc = put_list(s, json_get(answer, s->key), dim, ndims);
        x->result_len = s->n * op_dtype_bytes(s->t);
        return rc;
}

static int take_logits(struct external *x, const json *answer)
{
        const struct graph_header *h = x->w->graph.h;
        size_t steps = x->w->spec.new_tokens ? (size_t)x->w->spec.new_tokens : 1, dim[] = {steps, h->batch, h->vocab};
        struct sink s = {.key = "logits", .t = DT_F32};

        return take(x, answer, &s, dim, 3);
}

static int take_tokens(struct external *x, const json *answer)
{
        const struct graph_header *h = x->w->graph.h;
        size_t dim[] = {(size_t)x->w->spec.new_tokens, h->batch};
        struct sink s = {.key = "tokens", .t = DT_I32, .lo = 0, .hi = (double)h->vocab - 1};

        return take(x, answer, &s, dim, 2);
}

static int take_output(struct external *x, const json *answer)
{
        const struct graph *g = &x->w->graph;
        unsigned out = g->h->role[ROLE_OUTPUT];
        enum op_dtype t = g->tensors[out].dtype;
        size_t dim[] = {graph_tensor_bytes(g, out, g->h->rows_max, NULL) / op_dtype_bytes(t)};
        struct sink s = {
            .key = "output", .t = t, .lo = t == DT_U8 ? 0 : INT32_MIN, .hi = t == DT_U8 ? UINT8_MAX : INT32_MAX};

        return take(x, answer, &s, dim, 1);
}

static int take_result(struct external *x, const json *answer)
{
        if (x->w->driver != DRIVE_CAUSAL)
                return take_output(x, answer);
        return x->checked || !x->w->spec.new_tokens ? take_logits(x, answer) : take_tokens(x, answer);
}

/* ---- check and run ---- */

static int finish(struct external *x, json *answer, int rc)
{
        json_free(answer);
        if (rc < 0)
                child_kill(x->child);
        return rc;
}

int external_check(struct external *x, uint32_t turn, const struct exec_data *d)
{
        size_t steps = (size_t)x->w->spec.new_tokens, batch = x->w->graph.h->batch;
        json *q = message("check"), *a;
        int rc;

        json_set_int(q, "turn", turn);
        set_input(q, x, turn, d);
        if (x->w->driver == DRIVE_CAUSAL)
                json_set(q, "forced", lists(d->forced, steps, batch, batch));
        rc = ask(x, q, "check", x->o.prepare_ns, &a, NULL);
        if (rc < 0)
                return rc;
        x->checked = true;
        return finish(x, a, take_result(x, a));
}

static int take_latency(struct external *x, const json *answer, uint64_t wall_ns, uint64_t *latency_ns)
{
        double ms = json_num(json_get(answer, "latency_ms"), NAN);

        if (!(ms > 0))
                return err_set(-EPROTO, "%s: its result needs \"latency_ms\", a number above 0", x->o.child.name);
        if (ms * 1e6 > (double)wall_ns)
                return err_set(-EPROTO,
                               "%s: it says that a request took %.6g ms, but its answer was here after %.6g ms",
                               x->o.child.name, ms, (double)wall_ns / 1e6);
        *latency_ns = (uint64_t)ceil(ms * 1e6);
        return 0;
}

int external_run(struct external *x, uint32_t turn, uint32_t block, const struct exec_data *d, uint64_t *latency_ns)
{
        json *q = message("run"), *a;
        uint64_t wall_ns;
        int rc;

        json_set_int(q, "turn", turn);
        json_set_int(q, "block", block);
        set_input(q, x, turn, d);
        rc = ask(x, q, "result", x->o.run_ns, &a, &wall_ns);
        if (rc < 0)
                return rc;
        x->checked = false;
        rc = take_result(x, a);
        if (rc == 0)
                rc = take_latency(x, a, wall_ns, latency_ns);
        return finish(x, a, rc);
}

const void *external_result(const struct external *x, size_t *len)
{
        *len = x->result_len;
        return x->result;
}

/* ---- the same job ---- */

void external_judge(const struct external *x, const struct reference *ref, uint32_t turn, struct check_result *c)
{
        double tolerance = check_tolerance(x->w->dtype);

        if (x->w->driver != DRIVE_CAUSAL)
                check_output(ref, x->w, x->result, x->result_len, tolerance, c);
        else if (x->checked || !x->w->spec.new_tokens)
                check_logits(ref, turn, (const float *)x->result, tolerance, c);
        else
                check_tokens(ref, turn, (const int32_t *)x->result, c);
}
