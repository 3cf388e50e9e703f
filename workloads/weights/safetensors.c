/*
 * safetensors: u64le header length, JSON header, data. Everything in the header is a claim by whoever wrote the file and
 * is checked against the file's size before any of it is used. Data is read by pread, never mapped.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "arena.h"
#include "check.h"
#include "err.h"
#include "files.h"
#include "json.h"
#include "weights.h"

#define HEADER_MAX_BYTES 100000000u
#define INDEX_MAX_BYTES  64000000u
#define SHARDS_MAX       4096u
#define TENSORS_MAX      1000000u
/* JSON values in a header: bounds the memory that parsing takes. */
#define VALUES_MAX 4000000u
#define OFFSET_MAX (INT64_C(1) << 50)
#define SINGLE     "model.safetensors"
#define INDEX      "model.safetensors.index.json"

struct shard {
        int fd;
        const char *name;
        uint64_t data_start, data_bytes;
};

struct entry {
        struct checkpoint_tensor t; /* what checkpoint_find hands out */
        const char *refused;        /* why it cannot be used; NULL: it can */
        uint32_t shard;
        uint64_t begin, end; /* in the shard's data */
};

struct checkpoint {
        const char *name;
        struct arena arena; /* names and reasons */
        struct shard *shards;
        struct entry *entries; /* sorted by name once open */
        size_t nshards, nentries, room;
};

/* ---- one entry of a header ---- */

static int bad(const struct checkpoint *c, const struct shard *s, const char *tensor, const char *what)
{
        return err_set(-EINVAL, "%s/%s: tensor \"%.200s\" %s", c->name, s->name, tensor, what);
}

static const struct stored {
        const char *name;
        uint8_t bytes;
        int dtype; /* enum op_dtype, -1: not read by this version */
} stored_dtypes[] = {
    {"F32", 4, DT_F32}, {"F16", 2, DT_F16}, {"BF16", 2, DT_BF16}, {"F64", 8, -1},     {"I64", 8, -1},
    {"I32", 4, -1},     {"I16", 2, -1},     {"I8", 1, -1},        {"U64", 8, -1},     {"U32", 4, -1},
    {"U16", 2, -1},     {"U8", 1, -1},      {"BOOL", 1, -1},      {"F8_E4M3", 1, -1}, {"F8_E5M2", 1, -1},
};

static const struct stored *stored_find(const char *name)
{
        for (size_t i = 0; i < ARRAY_LEN(stored_dtypes); i++)
                if (strcmp(stored_dtypes[i].name, name) == 0)
                        return &stored_dtypes[i];
        return NULL;
}

/* An element of an array as an integer in [0, max]. */
static bool whole(const json *v, int64_t max, int64_t *out)
{
        double d = json_num(v, -1);

        if (!json_is_num(v) || !(d >= 0 && d <= (double)max) || d != (double)(int64_t)d)
                return false;
        *out = (int64_t)d;
        return true;
}

/* Shape into e->t and the number of elements, which cannot overflow: each product stays below OFFSET_MAX. */
static int read_shape(const struct checkpoint *c, const struct shard *s, const json *shape, struct entry *e,
                      int64_t *elems)
{
        int64_t n = 1;
        size_t i = 0;
        bool zero = false;

        if (!json_is_array(shape))
                return bad(c, s, e->t.name, "has no list \"shape\"");
        for (const json *v = json_first(shape); v; v = json_next(v), i++) {
                int64_t dim;

                if (!whole(v, OFFSET_MAX, &dim))
                        return bad(c, s, e->t.name, "has a dimension that is not a whole number from 0 to 2^50");
                if (i < OP_DIMS_MAX)
                        e->t.dims[i] = dim;
                zero = zero || dim == 0;
                if (__builtin_mul_overflow(n, dim ? dim : 1, &n) || n > OFFSET_MAX)
                        return bad(c, s, e->t.name, "has a shape of more than 2^50 elements");
        }
        e->t.ndim = (int)(i < OP_DIMS_MAX ? i : OP_DIMS_MAX);
        if (i > OP_DIMS_MAX)
                e->refused = "has more than 4 dimensions";
        if (i == 0)
                e->refused = "has no dimensions";
        if (zero)
                e->refused = "is empty";
        *elems = zero ? 0 : n;
        return 0;
}

static int read_offsets(const struct checkpoint *c, const struct shard *s, const json *offsets, struct entry *e)
{
        const json *first = json_first(offsets);
        int64_t begin, end;

        if (!json_is_array(offsets) || json_count(offsets) != 2 || !whole(first, OFFSET_MAX, &begin) ||
            !whole(json_next(first), OFFSET_MAX, &end))
                return bad(c, s, e->t.name, "has no \"data_offsets\" of two whole numbers");
        if (begin > end)
                return bad(c, s, e->t.name, "ends before it begins");
        if ((uint64_t)end > s->data_bytes)
                return err_set(
                    -EINVAL,
                    "%s/%s: tensor \"%.200s\" ends at byte %lld of the data, of which there are only %llu: the "
                    "file is truncated or its header lies",
                    c->name, s->name, e->t.name, (long long)end, (unsigned long long)s->data_bytes);
        e->begin = (uint64_t)begin;
        e->end = (uint64_t)end;
        return 0;
}

static int read_entry(struct checkpoint *c, uint32_t shard, const json *member, struct entry *e)
{
        const struct shard *s = &c->shards[shard];
        const json *dtype = json_get(member, "dtype");
        int64_t elems = 0;

        memset(e, 0, sizeof(*e));
        e->shard = shard;
        e->t.name = arena_strdup(&c->arena, json_key(member));
        if (!e->t.name)
                return err_set(-ENOMEM, "%s/%s: no memory for its tensors' names", c->name, s->name);
        if (!json_is_object(member) || !json_is_str(dtype))
                return bad(c, s, e->t.name, "is not an object with a \"dtype\"");
        int rc = read_shape(c, s, json_get(member, "shape"), e, &elems);

        if (rc == 0)
                rc = read_offsets(c, s, json_get(member, "data_offsets"), e);
        if (rc < 0)
                return rc;
        const struct stored *st = stored_find(json_str(dtype, ""));

        e->t.bytes = (size_t)(e->end - e->begin);
        if (st && (uint64_t)elems * st->bytes != e->end - e->begin)
                return err_set(-EINVAL, "%s/%s: tensor \"%.200s\" takes %llu bytes, its shape and dtype need %llu",
                               c->name, s->name, e->t.name, (unsigned long long)(e->end - e->begin),
                               (unsigned long long)((uint64_t)elems * st->bytes));
        if (st && st->dtype >= 0) {
                e->t.dtype = (enum op_dtype)st->dtype;
                return 0;
        }
        char why[96];

        snprintf(why, sizeof(why), "is stored as %.32s, and only F32, F16 and BF16 are read", json_str(dtype, ""));
        e->refused = arena_strdup(&c->arena, why);
        return e->refused ? 0 : err_set(-ENOMEM, "%s: no memory", c->name);
}

/* ---- one file ---- */

static int by_offset(const void *a, const void *b)
{
        const struct entry *x = a, *y = b;

        if (x->begin != y->begin)
                return x->begin < y->begin ? -1 : 1;
        return x->end < y->end ? -1 : x->end > y->end;
}

/* The format wants the data covered exactly once, without holes. */
static int check_cover(const struct checkpoint *c, const struct shard *s, struct entry *e, size_t n)
{
        uint64_t at = 0;

        qsort(e, n, sizeof(*e), by_offset);
        for (size_t i = 0; i < n; i++) {
                if (e[i].begin < at)
                        return err_set(-EINVAL, "%s/%s: tensor \"%.200s\" overlaps \"%.200s\"", c->name, s->name,
                                       e[i].t.name, e[i - 1].t.name);
                if (e[i].begin > at)
                        return bad(c, s, e[i].t.name, "begins behind a hole in the data");
                at = e[i].end;
        }
        if (at != s->data_bytes)
                return err_set(-EINVAL, "%s/%s: %llu bytes of data belong to no tensor", c->name, s->name,
                               (unsigned long long)(s->data_bytes - at));
        return 0;
}

static int grow(struct checkpoint *c, size_t more)
{
        size_t want = c->nentries + more;

        if (want > TENSORS_MAX)
                return err_set(-EINVAL, "%s: more than %u tensors", c->name, TENSORS_MAX);
        if (want <= c->room)
                return 0;
        struct entry *bigger = realloc(c->entries, want * sizeof(*bigger));

        if (!bigger)
                return err_set(-ENOMEM, "%s: no memory for %zu tensors", c->name, want);
        c->entries = bigger;
        c->room = want;
        return 0;
}

static int read_entries(struct checkpoint *c, uint32_t shard, const json *header)
{
        size_t first = c->nentries;
        int rc;

        if (!json_is_object(header))
                return err_set(-EINVAL, "%s/%s: the header is not an object", c->name, c->shards[shard].name);
        if ((rc = grow(c, json_count(header))) < 0)
                return rc;
        for (const json *m = json_first(header); m; m = json_next(m)) {
                if (strcmp(json_key(m), "__metadata__") == 0)
                        continue;
                if ((rc = read_entry(c, shard, m, &c->entries[c->nentries])) < 0)
                        return rc;
                c->nentries++;
        }
        return check_cover(c, &c->shards[shard], c->entries + first, c->nentries - first);
}

/* pread of all of it; -EIO when the file ends before. */
static int read_at(int fd, void *buf, size_t len, uint64_t offset)
{
        for (size_t got = 0; got < len;) {
                ssize_t n = pread(fd, (char *)buf + got, len - got, (off_t)(offset + got));

                if (n < 0 && errno == EINTR)
                        continue;
                if (n < 0)
                        return -errno;
                if (n == 0)
                        return -EIO;
                got += (size_t)n;
        }
        return 0;
}

static bool too_many_values(const char *text, size_t len)
{
        size_t n = 0;

        for (size_t i = 0; i < len; i++)
                n += text[i] == ',' || text[i] == '[' || text[i] == '{';
        return n > VALUES_MAX;
}

static int parse_header(struct checkpoint *c, uint32_t shard, const char *text, size_t len)
{
        struct shard *s = &c->shards[shard];

        if (too_many_values(text, len))
                return err_set(-EINVAL, "%s/%s: the header holds more than %u values", c->name, s->name, VALUES_MAX);
        json *header = json_parse(text, len, s->name);

        if (!header)
                return err_trail(-EINVAL, "in the header of %s/%s", c->name, s->name);
        int rc = read_entries(c, shard, header);

        json_free(header);
        return rc;
}

static int read_header(struct checkpoint *c, uint32_t shard)
{
        struct shard *s = &c->shards[shard];
        unsigned char raw[8];
        struct stat st;
        uint64_t len = 0;

        if (fstat(s->fd, &st) < 0 || !S_ISREG(st.st_mode))
                return err_set(-EINVAL, "%s/%s: not a regular file", c->name, s->name);
        if (st.st_size < (off_t)sizeof(raw) || read_at(s->fd, raw, sizeof(raw), 0) < 0)
                return err_set(-EINVAL, "%s/%s: %lld bytes are too few for a safetensors file", c->name, s->name,
                               (long long)st.st_size);
        for (int i = 7; i >= 0; i--)
                len = len << 8 | raw[i];
        uint64_t room = (uint64_t)st.st_size - sizeof(raw);

        if (len > HEADER_MAX_BYTES || len > room)
                return err_set(-EINVAL,
                               "%s/%s: the header claims %llu bytes, the file holds %llu and the limit is %u: "
                               "not a safetensors file, or truncated",
                               c->name, s->name, (unsigned long long)len, (unsigned long long)room, HEADER_MAX_BYTES);
        s->data_start = sizeof(raw) + len;
        s->data_bytes = room - len;
        char *text = malloc(len + 1);

        if (!text)
                return err_set(-ENOMEM, "%s/%s: no memory for a header of %llu bytes", c->name, s->name,
                               (unsigned long long)len);
        int rc = read_at(s->fd, text, len, sizeof(raw));

        text[len] = '\0';
        if (rc < 0)
                rc = err_set(rc, "%s/%s: cannot read the header: %s", c->name, s->name, strerror(-rc));
        else
                rc = parse_header(c, shard, text, len);
        free(text);
        return rc;
}

/* Opens the file and reads its header; the shard stands in the list even when that fails, so that close finds it. */
static int add_shard(struct checkpoint *c, int dir_fd, const char *file)
{
        int fd = model_file_open(dir_fd, file);

        if (fd < 0)
                return fd;
        struct shard *bigger = realloc(c->shards, (c->nshards + 1) * sizeof(*bigger));

        if (!bigger) {
                close(fd);
                return err_set(-ENOMEM, "%s: no memory", c->name);
        }
        c->shards = bigger;
        c->shards[c->nshards] = (struct shard){.fd = fd, .name = arena_strdup(&c->arena, file)};
        c->nshards++;
        if (!c->shards[c->nshards - 1].name)
                return err_set(-ENOMEM, "%s: no memory", c->name);
        return read_header(c, (uint32_t)(c->nshards - 1));
}

/* ---- all files ---- */

static int by_name(const void *a, const void *b)
{
        return strcmp(((const struct entry *)a)->t.name, ((const struct entry *)b)->t.name);
}

static const struct entry *entry_find(const struct checkpoint *c, const char *name)
{
        const struct entry key = {.t.name = name};

        return c->nentries ? bsearch(&key, c->entries, c->nentries, sizeof(*c->entries), by_name) : NULL;
}

static int sort_entries(struct checkpoint *c)
{
        if (c->nentries)
                qsort(c->entries, c->nentries, sizeof(*c->entries), by_name);
        for (size_t i = 1; i < c->nentries; i++)
                if (strcmp(c->entries[i - 1].t.name, c->entries[i].t.name) == 0)
                        return err_set(-EINVAL, "%s: tensor \"%.200s\" stands in two files, %s and %s", c->name,
                                       c->entries[i].t.name, c->shards[c->entries[i - 1].shard].name,
                                       c->shards[c->entries[i].shard].name);
        return 0;
}

static int shard_of(const struct checkpoint *c, const char *file)
{
        for (size_t i = 0; i < c->nshards; i++)
                if (strcmp(c->shards[i].name, file) == 0)
                        return (int)i;
        return -1;
}

static bool file_name_ok(const char *s)
{
        return *s && *s != '.' && !strchr(s, '/') && strlen(s) < 256;
}

static int open_shards(struct checkpoint *c, int dir_fd, const json *map)
{
        if (!json_is_object(map) || json_count(map) == 0)
                return err_set(-EINVAL, "%s/%s: no \"weight_map\"", c->name, INDEX);
        for (const json *m = json_first(map); m; m = json_next(m)) {
                const char *file = json_str(m, "");
                int rc;

                if (!file_name_ok(file))
                        return err_set(-EINVAL,
                                       "%s/%s: tensor \"%.200s\" is said to be in \"%.200s\", which is not the "
                                       "name of a file beside it",
                                       c->name, INDEX, json_key(m), file);
                if (shard_of(c, file) >= 0)
                        continue;
                if (c->nshards == SHARDS_MAX)
                        return err_set(-EINVAL, "%s/%s: more than %u files", c->name, INDEX, SHARDS_MAX);
                if ((rc = add_shard(c, dir_fd, file)) < 0)
                        return err_trail(rc == -ENOENT ? -EINVAL : rc, "named by %s/%s", c->name, INDEX);
        }
        return 0;
}

/* The index must not promise what its files do not hold. */
static int check_map(const struct checkpoint *c, const json *map)
{
        for (const json *m = json_first(map); m; m = json_next(m)) {
                const struct entry *e = entry_find(c, json_key(m));

                if (!e || strcmp(c->shards[e->shard].name, json_str(m, "")) != 0)
                        return err_set(-EINVAL, "%s/%s: tensor \"%.200s\" is not in %.200s", c->name, INDEX,
                                       json_key(m), json_str(m, ""));
        }
        return 0;
}

static int open_index(struct checkpoint *c, int dir_fd)
{
        char *text;
        size_t len;
        int rc = model_file_read(dir_fd, INDEX, INDEX_MAX_BYTES, &text, &len);

        if (rc < 0)
                return rc;
        json *index = too_many_values(text, len) ? NULL : json_parse(text, len, INDEX);

        free(text);
        if (!index)
                return err_trail(-EINVAL, "%s/%s cannot be used", c->name, INDEX);
        const json *map = json_get(index, "weight_map");

        rc = open_shards(c, dir_fd, map);
        if (rc == 0)
                rc = sort_entries(c);
        if (rc == 0)
                rc = check_map(c, map);
        json_free(index);
        return rc;
}

static int open_files(struct checkpoint *c, int dir_fd)
{
        static const char *const others[] = {"pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5",
                                             "flax_model.msgpack"};
        int rc = add_shard(c, dir_fd, SINGLE);

        if (rc != -ENOENT)
                return rc < 0 ? rc : sort_entries(c);
        rc = open_index(c, dir_fd);
        if (rc != -ENOENT)
                return rc;
        for (size_t i = 0; i < ARRAY_LEN(others); i++)
                if (faccessat(dir_fd, others[i], F_OK, 0) == 0)
                        return err_set(-ENOENT,
                                       "%s: neither %s nor %s is there; %s is, but it is not read: convert it to "
                                       "safetensors",
                                       c->name, SINGLE, INDEX, others[i]);
        return err_set(-ENOENT, "%s: neither %s nor %s is there", c->name, SINGLE, INDEX);
}

int checkpoint_open(int dir_fd, const char *name, struct checkpoint **out)
{
        struct checkpoint *c = calloc(1, sizeof(*c));

        *out = NULL;
        if (!c)
                return err_set(-ENOMEM, "%s: no memory", name);
        arena_init(&c->arena, 1 << 16, 0);
        c->name = arena_strdup(&c->arena, name);
        int rc = c->name ? open_files(c, dir_fd) : err_set(-ENOMEM, "%s: no memory", name);

        if (rc < 0) {
                checkpoint_close(c);
                return rc;
        }
        *out = c;
        return 0;
}

void checkpoint_close(struct checkpoint *c)
{
        if (!c)
                return;
        for (size_t i = 0; i < c->nshards; i++)
                close(c->shards[i].fd);
        free(c->shards);
        free(c->entries);
        arena_free(&c->arena);
        free(c);
}

const struct checkpoint_tensor *checkpoint_find(const struct checkpoint *c, const char *tensor)
{
        const struct entry *e = entry_find(c, tensor);

        return e && !e->refused ? &e->t : NULL;
}

const char *checkpoint_lack(const struct checkpoint *c, const char *tensor)
{
        const struct entry *e = entry_find(c, tensor);

        return e ? (e->refused ? e->refused : "is there") : "is not in the checkpoint";
}

/* ---- data ---- */

/* Half-width values were read into the upper half of out; converting upwards never overtakes what is to be read. */
static void widen(enum op_dtype dtype, float *out, size_t count)
{
        const char *half = (const char *)out + count * 2;

        for (size_t i = 0; i < count; i++) {
                uint16_t h;

                memcpy(&h, half + i * 2, sizeof(h));
                out[i] = dtype == DT_F16 ? op_f16_to_f32(h) : op_bf16_to_f32(h);
        }
}

int checkpoint_read_f32(struct checkpoint *c, const struct checkpoint_tensor *t, size_t first, size_t count, float *out)
{
        const struct entry *e = container_of(t, const struct entry, t);
        const struct shard *s = &c->shards[e->shard];
        size_t size = op_dtype_bytes(t->dtype), total = t->bytes / size;

        if (first > total || count > total - first)
                return err_set(-EINVAL, "%s/%s: tensor \"%.200s\" has %zu elements, asked for %zu from %zu", c->name,
                               s->name, t->name, total, count, first);
        char *into = (char *)out + (size < sizeof(*out) ? count * (sizeof(*out) - size) : 0);
        int rc = read_at(s->fd, into, count * size, s->data_start + e->begin + first * size);

        if (rc < 0)
                return err_set(rc, "%s/%s: tensor \"%.200s\" cannot be read: %s", c->name, s->name, t->name,
                               rc == -EIO ? "the file has become shorter than its header says" : strerror(-rc));
        if (size < sizeof(*out))
                widen(t->dtype, out, count);
        return 0;
}
