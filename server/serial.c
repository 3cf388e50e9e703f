/*
 * CALL and RESULT bodies: a self-describing encoding by a library (msgpack-c; its only includer), with every payload
 * byte copied in when packing, as RPC frameworks do. Unpacking copies nothing: blobs point into the body, and whoever
 * needs them elsewhere copies and counts.
 *
 * Bodies come from peers. The library allocates a container's elements as soon as it has read their number, so the body
 * is walked first (skim) and refused when a container promises more than the bytes that are left could hold, or is
 * nested deeper than anything that we pack.
 */
#include "protocol.h"

#include <errno.h>
#include <inttypes.h>
#include <msgpack.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "err.h"

#define DEPTH_MAX 4

/* ---- buffer ---- */

void serial_free(struct serial_buf *b)
{
        free(b->data);
        *b = (struct serial_buf){0};
}

static int buf_reserve(struct serial_buf *b, size_t len)
{
        uint8_t *data;

        b->len = 0;
        if (len <= b->cap)
                return 0;
        data = realloc(b->data, len);
        if (!data)
                return err_set(-ENOMEM, "no memory for a message body of %zu bytes", len);
        b->data = data;
        b->cap = len;
        return 0;
}

/* Called by the packer; the exact length was reserved before. */
static int buf_write(void *data, const char *bytes, size_t len)
{
        struct serial_buf *b = data;

        BUG_ON(len > b->cap - b->len);
        if (len > 0)
                memcpy(b->data + b->len, bytes, len);
        b->len += len;
        return 0;
}

/* A packer that only counts: never looks at the bytes. */
static int count_write(void *data, const char *bytes, size_t len)
{
        size_t *n = data;

        return size_add(*n, len, n) ? 0 : -1;
}

/* ---- packing ---- */

static int pack_text(msgpack_packer *pk, const char *s)
{
        size_t len = strlen(s);

        return msgpack_pack_str(pk, len) || msgpack_pack_str_body(pk, s, len);
}

static int pack_key_u64(msgpack_packer *pk, const char *key, uint64_t value)
{
        return pack_text(pk, key) || msgpack_pack_uint64(pk, value);
}

/* Shape of len bytes of a tensor: whole rows where that is what they are, else a vector of elements (or bytes). */
static int blob_shape(const struct graph *g, const struct serial_blob *blob, int64_t dims[OP_DIMS_MAX], unsigned *dtype)
{
        const struct graph_tensor *t = &g->tensors[blob->tensor];
        size_t row = op_dtype_bytes(t->dtype);

        *dtype = t->dtype;
        for (int i = 1; i < t->ndim; i++) {
                dims[i] = t->dims[i];
                row *= (size_t)t->dims[i];
        }
        if (row > 0 && blob->len % row == 0) {
                dims[0] = (int64_t)(blob->len / row);
                return t->ndim;
        }
        if (blob->len % op_dtype_bytes(t->dtype) != 0)
                *dtype = DT_U8;
        dims[0] = (int64_t)(blob->len / op_dtype_bytes(*dtype));
        return 1;
}

static int pack_blob(msgpack_packer *pk, const struct graph *g, const struct serial_blob *blob)
{
        int64_t dims[OP_DIMS_MAX];
        unsigned dtype;
        int ndim = blob_shape(g, blob, dims, &dtype);
        int bad = msgpack_pack_map(pk, 5);

        bad |= pack_key_u64(pk, "tensor", blob->tensor);
        bad |= pack_key_u64(pk, "off", blob->tensor_off);
        bad |= pack_text(pk, "dtype") || pack_text(pk, op_dtype_names[dtype]);
        bad |= pack_text(pk, "shape") || msgpack_pack_array(pk, (size_t)ndim);
        for (int i = 0; i < ndim; i++)
                bad |= msgpack_pack_int64(pk, dims[i]);
        bad |= pack_text(pk, "data") || msgpack_pack_bin(pk, blob->len);
        if (blob->len > 0)
                bad |= msgpack_pack_bin_body(pk, blob->data, blob->len);
        return bad;
}

static int pack_blobs(msgpack_packer *pk, const char *key, const struct graph *g, const struct serial_blob *blobs,
                      unsigned n)
{
        int bad = pack_text(pk, key) || msgpack_pack_array(pk, n);

        for (unsigned i = 0; i < n; i++)
                bad |= pack_blob(pk, g, &blobs[i]);
        return bad;
}

static int pack_numbers(msgpack_packer *pk, const uint64_t *v, size_t n)
{
        int bad = msgpack_pack_array(pk, n);

        for (size_t i = 0; i < n; i++)
                bad |= msgpack_pack_uint64(pk, v[i]);
        return bad;
}

static int pack_program(msgpack_packer *pk, const struct run_view *v)
{
        int bad = pack_text(pk, "ranges") || msgpack_pack_array(pk, v->run->nranges);

        for (unsigned i = 0; i < v->run->nranges; i++) {
                const struct run_range *r = &v->ranges[i];

                bad |= pack_numbers(pk, (uint64_t[]){r->first, r->count, r->rows, r->repeat, r->feedback}, 5);
        }
        bad |= pack_text(pk, "feedback") || msgpack_pack_array(pk, v->run->nfeedback);
        for (unsigned i = 0; i < v->run->nfeedback; i++) {
                const struct run_feedback *f = &v->feedback[i];

                bad |= pack_numbers(pk, (uint64_t[]){f->src, f->dst, f->src_off, f->src_step, f->len}, 5);
        }
        return bad;
}

static int pack_wanted(msgpack_packer *pk, const struct run_view *v)
{
        int bad = pack_text(pk, "outputs") || msgpack_pack_array(pk, v->run->noutputs);

        for (unsigned i = 0; i < v->run->noutputs; i++) {
                const struct run_output *o = &v->outputs[i];

                bad |= pack_numbers(pk, (uint64_t[]){o->tensor, o->flags, o->tensor_off, o->len}, 4);
        }
        return bad;
}

static int pack_call(msgpack_packer *pk, const struct run_view *v, const struct graph *g,
                     const struct serial_blob *inputs, unsigned ninputs)
{
        int bad = msgpack_pack_map(pk, 7);

        bad |= pack_key_u64(pk, "model", v->run->model);
        bad |= pack_key_u64(pk, "class", v->run->run_class);
        bad |= pack_key_u64(pk, "flags", v->run->h.flags);
        bad |= pack_program(pk, v);
        bad |= pack_blobs(pk, "inputs", g, inputs, ninputs);
        bad |= pack_wanted(pk, v);
        return bad;
}

int serial_call_bytes(const struct run_view *v, const struct graph *g, const struct serial_blob *inputs,
                      unsigned ninputs, size_t *out)
{
        msgpack_packer pk;

        *out = 0;
        msgpack_packer_init(&pk, out, count_write);
        return pack_call(&pk, v, g, inputs, ninputs) ? err_set(-EOVERFLOW, "CALL: the inputs are too long") : 0;
}

int serial_pack_call(struct serial_buf *b, const struct run_view *v, const struct graph *g,
                     const struct serial_blob *inputs, unsigned ninputs)
{
        msgpack_packer pk;
        size_t len;
        int rc = serial_call_bytes(v, g, inputs, ninputs, &len);

        if (rc >= 0)
                rc = buf_reserve(b, len);
        if (rc < 0)
                return rc;
        msgpack_packer_init(&pk, b, buf_write);
        BUG_ON(pack_call(&pk, v, g, inputs, ninputs) || b->len != len);
        return 0;
}

static int pack_result(msgpack_packer *pk, const struct graph *g, const struct serial_blob *outputs, unsigned n)
{
        return msgpack_pack_map(pk, 1) | pack_blobs(pk, "outputs", g, outputs, n);
}

int serial_result_bytes(const struct graph *g, const struct serial_blob *outputs, unsigned n, size_t *out)
{
        msgpack_packer pk;

        *out = 0;
        msgpack_packer_init(&pk, out, count_write);
        return pack_result(&pk, g, outputs, n) ? err_set(-EOVERFLOW, "RESULT: the outputs are too long") : 0;
}

int serial_pack_result(struct serial_buf *b, const struct graph *g, const struct serial_blob *outputs, unsigned n)
{
        msgpack_packer pk;
        size_t len;
        int rc = serial_result_bytes(g, outputs, n, &len);

        if (rc >= 0)
                rc = buf_reserve(b, len);
        if (rc < 0)
                return rc;
        msgpack_packer_init(&pk, b, buf_write);
        BUG_ON(pack_result(&pk, g, outputs, n) || b->len != len);
        return 0;
}

/* ---- looking before leaping ---- */

#define CALL_OBJECTS_MAX 65536u /* twice what the longest program and all its operands need */
#define BLOB_OBJECTS     16u    /* at most, of one output in a RESULT: a map, five keys, five values, four dimensions */

struct skim {
        const uint8_t *at, *end;
        uint32_t objects; /* that may still come */
};

/* Big-endian unsigned of n bytes; false at the end of the body. */
static bool skim_uint(struct skim *s, unsigned n, uint64_t *out)
{
        if ((size_t)(s->end - s->at) < n)
                return false;
        *out = 0;
        while (n-- > 0)
                *out = *out << 8 | *s->at++;
        return true;
}

/* What a head byte means: bytes of its length field, what the length counts, a length that is in the byte itself. */
enum skim_what { SKIM_BYTES, SKIM_ITEMS, SKIM_PAIRS, SKIM_BAD };

static enum skim_what skim_head(uint8_t head, unsigned *len_bytes, uint64_t *len)
{
        static const uint8_t fixed[] = {/* ca.. floats, uints, ints */ 4,
                                        8,
                                        1,
                                        2,
                                        4,
                                        8,
                                        1,
                                        2,
                                        4,
                                        8};

        *len_bytes = 0;
        *len = 0;
        if (head <= 0x7f || head >= 0xe0 || head == 0xc0 || head == 0xc2 || head == 0xc3)
                return SKIM_BYTES;
        if (head <= 0x8f || (head >= 0x90 && head <= 0x9f)) {
                *len = head & 0x0f;
                return head <= 0x8f ? SKIM_PAIRS : SKIM_ITEMS;
        }
        if (head <= 0xbf) {
                *len = head & 0x1f;
                return SKIM_BYTES;
        }
        if (head >= 0xca && head <= 0xd3) {
                *len = fixed[head - 0xca];
                return SKIM_BYTES;
        }
        if ((head >= 0xc4 && head <= 0xc6) || (head >= 0xd9 && head <= 0xdb)) {
                *len_bytes = 1u << (head >= 0xd9 ? head - 0xd9 : head - 0xc4);
                return SKIM_BYTES;
        }
        if (head >= 0xdc) {
                *len_bytes = head & 1 ? 4 : 2;
                return head <= 0xdd ? SKIM_ITEMS : SKIM_PAIRS;
        }
        return SKIM_BAD; /* extension types and c1: nothing that we pack */
}

/* One object and everything in it: each element takes at least a byte, so a container of more elements than there are
 * bytes left is a lie. */
static bool skim_object(struct skim *s, unsigned depth)
{
        unsigned len_bytes;
        uint64_t len, n;
        enum skim_what what;

        if (s->at == s->end || depth > DEPTH_MAX || s->objects-- == 0)
                return false;
        what = skim_head(*s->at++, &len_bytes, &len);
        if (what == SKIM_BAD || (len_bytes > 0 && !skim_uint(s, len_bytes, &len)))
                return false;
        if (what == SKIM_PAIRS)
                len *= 2;
        if (len > (uint64_t)(s->end - s->at))
                return false;
        if (what == SKIM_BYTES) {
                s->at += len;
                return true;
        }
        for (n = 0; n < len; n++) {
                if (!skim_object(s, depth + 1))
                        return false;
        }
        return true;
}

/* objects: at most so many; each costs the parser more memory than it has bytes. */
static int body_parse(const void *body, size_t len, uint32_t objects, msgpack_unpacked *out)
{
        struct skim s = {body, (const uint8_t *)body + len, objects};
        size_t off = 0;

        msgpack_unpacked_init(out);
        if (len == 0 || !skim_object(&s, 0) || s.at != s.end)
                return err_set(-EPROTO, "body of %zu bytes: broken at byte %td", len, len ? s.at - (uint8_t *)body : 0);
        if (msgpack_unpack_next(out, body, len, &off) != MSGPACK_UNPACK_SUCCESS || off != len)
                return err_set(-EPROTO, "body of %zu bytes is not one msgpack object", len);
        if (out->data.type != MSGPACK_OBJECT_MAP)
                return err_set(-EPROTO, "body is not a map");
        return 0;
}

/* ---- unpacking ---- */

static bool text_is(const msgpack_object *o, const char *s)
{
        return o->type == MSGPACK_OBJECT_STR && o->via.str.size == strlen(s) &&
               memcmp(o->via.str.ptr, s, o->via.str.size) == 0;
}

/* Every map has exactly the keys that we pack, in any order: values go to out[], in the order of keys[]. */
static int map_fields(const msgpack_object *o, const char *const *keys, size_t nkeys, const msgpack_object **out,
                      const char *what)
{
        if (o->type != MSGPACK_OBJECT_MAP)
                return err_set(-EPROTO, "%s is not a map", what);
        memset(out, 0, nkeys * sizeof(*out));
        for (uint32_t i = 0; i < o->via.map.size; i++) {
                const msgpack_object_kv *kv = &o->via.map.ptr[i];
                size_t k = 0;

                while (k < nkeys && !text_is(&kv->key, keys[k]))
                        k++;
                if (k == nkeys || out[k])
                        return err_set(-EPROTO, "%s has an unknown or repeated key", what);
                out[k] = &kv->val;
        }
        for (size_t k = 0; k < nkeys; k++) {
                if (!out[k])
                        return err_set(-EPROTO, "%s lacks \"%s\"", what, keys[k]);
        }
        return 0;
}

static int number(const msgpack_object *o, uint64_t max, uint64_t *out, const char *what)
{
        *out = 0;
        if (o->type != MSGPACK_OBJECT_POSITIVE_INTEGER || o->via.u64 > max)
                return err_set(-EPROTO, "%s is not an integer from 0 to %" PRIu64, what, max);
        *out = o->via.u64;
        return 0;
}

static int numbers(const msgpack_object *o, const uint64_t *max, size_t n, uint64_t *out, const char *what)
{
        if (o->type != MSGPACK_OBJECT_ARRAY || o->via.array.size != n)
                return err_set(-EPROTO, "one of %s is not an array of %zu integers", what, n);
        for (size_t i = 0; i < n; i++) {
                int rc = number(&o->via.array.ptr[i], max[i], &out[i], what);

                if (rc < 0)
                        return rc;
        }
        return 0;
}

static int array_len(const msgpack_object *o, unsigned max, unsigned *out, const char *what)
{
        *out = 0;
        if (o->type != MSGPACK_OBJECT_ARRAY || o->via.array.size > max)
                return err_set(-EPROTO, "%s is not an array of at most %u", what, max);
        *out = o->via.array.size;
        return 0;
}

/* dtype and shape must describe the data that comes with them. */
static int blob_described(const msgpack_object *dtype, const msgpack_object *shape, size_t len)
{
        size_t bytes = 0;

        for (unsigned t = 0; t < DT_COUNT; t++) {
                if (text_is(dtype, op_dtype_names[t]))
                        bytes = op_dtype_bytes(t);
        }
        if (bytes == 0)
                return err_set(-EPROTO, "a blob's dtype is not one of ours");
        if (shape->type != MSGPACK_OBJECT_ARRAY || shape->via.array.size == 0 || shape->via.array.size > OP_DIMS_MAX)
                return err_set(-EPROTO, "a blob's shape is not an array of 1 to %d", OP_DIMS_MAX);
        for (uint32_t i = 0; i < shape->via.array.size; i++) {
                const msgpack_object *d = &shape->via.array.ptr[i];

                if (d->type != MSGPACK_OBJECT_POSITIVE_INTEGER || !size_mul(bytes, d->via.u64, &bytes))
                        return err_set(-EPROTO, "dimension %u of a blob is not a size", i);
        }
        if (bytes != len)
                return err_set(-EPROTO, "a blob's shape means %zu bytes, %zu came", bytes, len);
        return 0;
}

static int unpack_blob(const msgpack_object *o, struct serial_blob *out)
{
        static const char *const keys[] = {"tensor", "off", "dtype", "shape", "data"};
        const msgpack_object *f[ARRAY_LEN(keys)];
        uint64_t tensor;
        int rc = map_fields(o, keys, ARRAY_LEN(keys), f, "a blob");

        if (rc >= 0)
                rc = number(f[0], UINT32_MAX, &tensor, "a blob's tensor");
        if (rc >= 0)
                rc = number(f[1], UINT64_MAX, &out->tensor_off, "a blob's off");
        if (rc >= 0 && f[4]->type != MSGPACK_OBJECT_BIN)
                rc = err_set(-EPROTO, "a blob's data is not binary");
        if (rc < 0)
                return rc;
        out->tensor = (uint32_t)tensor;
        out->data = f[4]->via.bin.ptr;
        out->len = f[4]->via.bin.size;
        return blob_described(f[2], f[3], out->len);
}

static int unpack_ranges(const msgpack_object *o, struct serial_call *dec)
{
        static const uint64_t max[5] = {UINT32_MAX, UINT32_MAX, UINT32_MAX, UINT32_MAX, UINT32_MAX};
        unsigned n;
        int rc = array_len(o, RUN_RANGES_MAX, &n, "ranges");

        for (unsigned i = 0; rc >= 0 && i < n; i++) {
                uint64_t v[5];

                rc = numbers(&o->via.array.ptr[i], max, 5, v, "ranges");
                if (rc >= 0)
                        dec->ranges[i] = (struct run_range){.first = (uint32_t)v[0],
                                                            .count = (uint32_t)v[1],
                                                            .rows = (uint32_t)v[2],
                                                            .repeat = (uint32_t)v[3],
                                                            .feedback = (uint32_t)v[4]};
        }
        if (rc >= 0 && n == 0)
                rc = err_set(-EPROTO, "ranges is empty");
        if (rc >= 0)
                dec->run.nranges = (uint16_t)n;
        return rc;
}

static int unpack_feedback(const msgpack_object *o, struct serial_call *dec)
{
        static const uint64_t max[5] = {UINT32_MAX, UINT32_MAX, UINT32_MAX, UINT32_MAX, UINT64_MAX};
        unsigned n;
        int rc = array_len(o, RUN_FEEDBACK_MAX, &n, "feedback");

        for (unsigned i = 0; rc >= 0 && i < n; i++) {
                uint64_t v[5];

                rc = numbers(&o->via.array.ptr[i], max, 5, v, "feedback");
                if (rc >= 0)
                        dec->feedback[i] = (struct run_feedback){.src = (uint32_t)v[0],
                                                                 .dst = (uint32_t)v[1],
                                                                 .src_off = (uint32_t)v[2],
                                                                 .src_step = (uint32_t)v[3],
                                                                 .len = v[4]};
        }
        if (rc >= 0)
                dec->run.nfeedback = (uint16_t)n;
        return rc;
}

static int call_reserve(struct serial_call *dec, unsigned n)
{
        void *inputs, *outputs, *blobs;

        if (n <= dec->cap)
                return 0;
        inputs = realloc(dec->inputs, n * sizeof(*dec->inputs));
        dec->inputs = inputs ? inputs : dec->inputs;
        outputs = realloc(dec->outputs, n * sizeof(*dec->outputs));
        dec->outputs = outputs ? outputs : dec->outputs;
        blobs = realloc(dec->blobs, n * sizeof(*dec->blobs));
        dec->blobs = blobs ? blobs : dec->blobs;
        if (!inputs || !outputs || !blobs)
                return err_set(-ENOMEM, "no memory for a call's %u operands", n);
        dec->cap = n;
        return 0;
}

static int unpack_inputs(const msgpack_object *o, struct serial_call *dec)
{
        for (unsigned i = 0; i < dec->run.ninputs; i++) {
                int rc = unpack_blob(&o->via.array.ptr[i], &dec->blobs[i]);

                if (rc < 0)
                        return err_trail(rc, "input %u", i);
                dec->inputs[i] = (struct run_input){
                    .tensor = dec->blobs[i].tensor, .tensor_off = dec->blobs[i].tensor_off, .len = dec->blobs[i].len};
        }
        return 0;
}

static int unpack_wanted(const msgpack_object *o, struct serial_call *dec)
{
        static const uint64_t max[4] = {UINT32_MAX, UINT32_MAX, UINT64_MAX, UINT64_MAX};

        for (unsigned i = 0; i < dec->run.noutputs; i++) {
                uint64_t v[4];
                int rc = numbers(&o->via.array.ptr[i], max, 4, v, "outputs");

                if (rc < 0)
                        return rc;
                dec->outputs[i] = (struct run_output){
                    .tensor = (uint32_t)v[0], .flags = (uint32_t)v[1], .tensor_off = v[2], .len = v[3]};
        }
        return 0;
}

static int unpack_fields(const msgpack_object *const *f, struct serial_call *dec)
{
        uint64_t model, run_class = 0, flags = 0;
        unsigned ninputs = 0, noutputs = 0;
        int rc = number(f[0], UINT32_MAX, &model, "model");

        if (rc >= 0)
                rc = number(f[1], UINT32_MAX, &run_class, "class");
        if (rc >= 0)
                rc = number(f[2], UINT32_MAX, &flags, "flags");
        if (rc >= 0)
                rc = unpack_ranges(f[3], dec);
        if (rc >= 0)
                rc = unpack_feedback(f[4], dec);
        if (rc >= 0)
                rc = array_len(f[5], RUN_INPUTS_MAX, &ninputs, "inputs");
        if (rc >= 0)
                rc = array_len(f[6], RUN_OUTPUTS_MAX, &noutputs, "outputs");
        if (rc >= 0)
                rc = call_reserve(dec, ninputs > noutputs ? ninputs : noutputs);
        if (rc < 0)
                return rc;
        dec->run.model = (uint32_t)model;
        dec->run.run_class = (uint32_t)run_class;
        dec->run.h.flags = (uint32_t)flags;
        dec->run.ninputs = (uint16_t)ninputs;
        dec->run.noutputs = (uint16_t)noutputs;
        rc = unpack_inputs(f[5], dec);
        return rc < 0 ? rc : unpack_wanted(f[6], dec);
}

int serial_unpack_call(const void *body, size_t len, struct serial_call *dec)
{
        static const char *const keys[] = {"model", "class", "flags", "ranges", "feedback", "inputs", "outputs"};
        const msgpack_object *f[ARRAY_LEN(keys)];
        msgpack_unpacked doc;
        int rc = body_parse(body, len, CALL_OBJECTS_MAX, &doc);

        dec->run = (struct msg_run){0};
        if (rc >= 0)
                rc = map_fields(&doc.data, keys, ARRAY_LEN(keys), f, "the body");
        if (rc >= 0)
                rc = unpack_fields(f, dec);
        msgpack_unpacked_destroy(&doc);
        return rc < 0 ? err_trail(rc, "in a CALL") : 0;
}

void serial_call_free(struct serial_call *dec)
{
        free(dec->inputs);
        free(dec->outputs);
        free(dec->blobs);
        *dec = (struct serial_call){0};
}

int serial_unpack_result(const void *body, size_t len, struct serial_blob *out, unsigned n)
{
        static const char *const keys[] = {"outputs"};
        const msgpack_object *f[1];
        msgpack_unpacked doc;
        int rc = body_parse(body, len, n < UINT32_MAX / BLOB_OBJECTS - 1 ? (n + 1) * BLOB_OBJECTS : UINT32_MAX, &doc);

        if (rc >= 0)
                rc = map_fields(&doc.data, keys, 1, f, "the body");
        if (rc >= 0 && (f[0]->type != MSGPACK_OBJECT_ARRAY || f[0]->via.array.size != n))
                rc = err_set(-EPROTO, "outputs is not an array of %u", n);
        for (unsigned i = 0; rc >= 0 && i < n; i++)
                rc = unpack_blob(&f[0]->via.array.ptr[i], &out[i]);
        msgpack_unpacked_destroy(&doc);
        return rc < 0 ? err_trail(rc, "in a RESULT") : 0;
}
