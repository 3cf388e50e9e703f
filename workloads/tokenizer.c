/*
 * Byte-level BPE. Text is cut at added tokens, then by GPT-2's pattern into words; the bytes of a word begin as one token
 * each and the pair of neighbours with the lowest rank (the leftmost of equals) is merged until none is left.
 *
 * All tables are made when the file is opened. The vocabulary is kept as digests of its entries: nobody needs the texts.
 */
#include "tokenizer.h"

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "check.h"
#include "digest.h"
#include "err.h"
#include "json.h"
#include "weights.h"

#define FILE_MAX_BYTES (128u << 20)
#define VALUES_MAX     16000000u
#define VOCAB_MAX      (1 << 22)
#define ADDED_MAX      65536u
#define TOKEN_MAX      65536u /* bytes of one entry of the vocabulary */
#define TEXT_MAX       (1u << 30)

static const char gpt2_pattern[] = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

struct word_slot {
        struct digest key;
        int32_t id; /* -1: free */
};

struct merge_slot {
        int32_t left, right; /* left -1: free */
        int32_t rank, merged;
};

struct added {
        char *text;
        size_t len;
        int32_t id;
        bool stripping; /* eats the space around it, which this version does not do */
};

struct tokenizer {
        struct word_slot *words;
        struct merge_slot *merges;
        size_t words_mask, merges_mask;
        struct added *added;
        size_t nadded, vocab;
        int32_t byte_id[256]; /* -1: not in the vocabulary */
        pcre2_code *pattern;  /* NULL: the whole text is one word */
        bool prefix_space, ignore_merges;
        bool added_first[256]; /* some added token begins with this byte */
};

/* ---- tables ---- */

/* A power of two that is at most half full with n. */
static size_t table_size(size_t n)
{
        size_t size = 16;

        while (size < 2 * n)
                size *= 2;
        return size;
}

static struct word_slot *word_slot(const struct tokenizer *t, struct digest key)
{
        size_t i = key.lo & t->words_mask;

        while (t->words[i].id >= 0 && !digest_equal(t->words[i].key, key))
                i = (i + 1) & t->words_mask;
        return &t->words[i];
}

static int32_t word_id(const struct tokenizer *t, const char *text, size_t len)
{
        return word_slot(t, digest_of(text, len))->id;
}

static struct merge_slot *merge_slot(const struct tokenizer *t, int32_t left, int32_t right)
{
        uint64_t h = ((uint64_t)(uint32_t)left << 32 | (uint32_t)right) * 0x9e3779b97f4a7c15ull;
        size_t i = (size_t)(h >> 32) & t->merges_mask;

        while (t->merges[i].left >= 0 && (t->merges[i].left != left || t->merges[i].right != right))
                i = (i + 1) & t->merges_mask;
        return &t->merges[i];
}

/* ---- reading the file ---- */

static int bad(const char *name, const char *what)
{
        return err_set(-EINVAL, "%s: %s", name, what);
}

static int unknown(const char *name, const char *what, const char *which)
{
        return err_set(-ENOTSUP, "%s: %s \"%.64s\" is not known to this version, which reads byte-level BPE", name,
                       what, which);
}

static int read_id(const json *v, int32_t *out)
{
        double d = json_num(v, -1);

        if (!(d >= 0 && d < VOCAB_MAX) || d != (double)(int32_t)d)
                return -EINVAL;
        *out = (int32_t)d;
        return 0;
}

static void count_id(struct tokenizer *t, int32_t id)
{
        if ((size_t)id >= t->vocab)
                t->vocab = (size_t)id + 1;
}

static int read_vocab(struct tokenizer *t, const json *vocab, const char *name)
{
        size_t n = json_count(vocab), size = table_size(n);

        if (!json_is_object(vocab) || n == 0 || n > VOCAB_MAX)
                return bad(name, "model.vocab is not an object of 1 to 4 million entries");
        t->words = calloc(size, sizeof(*t->words));
        if (!t->words)
                return err_set(-ENOMEM, "%s: no memory for %zu entries", name, n);
        t->words_mask = size - 1;
        for (size_t i = 0; i < size; i++)
                t->words[i].id = -1;
        for (const json *v = json_first(vocab); v; v = json_next(v)) {
                size_t len = strlen(json_key(v));
                struct digest key = digest_of(json_key(v), len);
                struct word_slot *slot = word_slot(t, key);

                if (len > TOKEN_MAX || slot->id >= 0 || read_id(v, &slot->id) < 0)
                        return err_set(-EINVAL,
                                       "%s: the entry \"%.64s\" of model.vocab is too long, there twice, or "
                                       "without an id below %d",
                                       name, json_key(v), VOCAB_MAX);
                slot->key = key;
                count_id(t, slot->id);
        }
        return 0;
}

/* One merge, "a b" or ["a", "b"]: where its halves are. */
static bool merge_parts(const json *m, const char **a, size_t *alen, const char **b, size_t *blen)
{
        if (json_is_str(m)) {
                const char *s = json_str(m, ""), *space = strchr(s, ' ');

                if (!space || strchr(space + 1, ' '))
                        return false;
                *a = s;
                *alen = (size_t)(space - s);
                *b = space + 1;
        } else {
                if (!json_is_array(m) || json_count(m) != 2)
                        return false;
                *a = json_str(json_first(m), "");
                *alen = strlen(*a);
                *b = json_str(json_next(json_first(m)), "");
        }
        *blen = strlen(*b);
        return *alen && *blen && *alen <= TOKEN_MAX && *blen <= TOKEN_MAX;
}

static int read_merge(struct tokenizer *t, const json *m, int32_t rank, const char *name)
{
        const char *a, *b;
        size_t alen, blen;

        if (!merge_parts(m, &a, &alen, &b, &blen))
                return err_set(-EINVAL, "%s: merge %d is not a pair of tokens", name, rank);
        char *joined = malloc(alen + blen);

        if (!joined)
                return err_set(-ENOMEM, "%s: no memory", name);
        memcpy(joined, a, alen);
        memcpy(joined + alen, b, blen);
        int32_t left = word_id(t, a, alen), right = word_id(t, b, blen), merged = word_id(t, joined, alen + blen);

        free(joined);
        if (left < 0 || right < 0 || merged < 0)
                return err_set(-EINVAL,
                               "%s: merge %d (\"%.64s\" and \"%.64s\") makes or needs a token that is not in "
                               "model.vocab",
                               name, rank, a, b);
        struct merge_slot *slot = merge_slot(t, left, right);

        /* A pair that stands twice counts with its last rank, as in the library that writes these files. */
        *slot = (struct merge_slot){.left = left, .right = right, .rank = rank, .merged = merged};
        return 0;
}

static int read_merges(struct tokenizer *t, const json *merges, const char *name)
{
        size_t n = json_count(merges), size = table_size(n);
        int32_t rank = 0;

        if (!json_is_array(merges) || n > VOCAB_MAX)
                return bad(name, "model.merges is not a list of at most 4 million merges");
        t->merges = calloc(size, sizeof(*t->merges));
        if (!t->merges)
                return err_set(-ENOMEM, "%s: no memory for %zu merges", name, n);
        t->merges_mask = size - 1;
        for (size_t i = 0; i < size; i++)
                t->merges[i].left = -1;
        for (const json *m = json_first(merges); m; m = json_next(m)) {
                int rc = read_merge(t, m, rank++, name);

                if (rc < 0)
                        return rc;
        }
        return 0;
}

/* GPT-2's alphabet, as UTF-8: printable bytes of Latin-1 stand for themselves, the others for U+0100, U+0101, ... in
 * order: 0 to 0x20, 0x7f to 0xa0, 0xad. Returns the length. */
static size_t byte_text(unsigned b, char utf8[2])
{
        unsigned c = b <= 0x20 ? 0x100 + b : b >= 0x7f && b <= 0xa0 ? 0x121 + b - 0x7f : b == 0xad ? 0x143 : b;

        if (c < 0x80) {
                utf8[0] = (char)c;
                return 1;
        }
        utf8[0] = (char)(0xc0 | c >> 6);
        utf8[1] = (char)(0x80 | (c & 0x3f));
        return 2;
}

static void read_bytes(struct tokenizer *t)
{
        for (unsigned b = 0; b < 256; b++) {
                char utf8[2];

                t->byte_id[b] = word_id(t, utf8, byte_text(b, utf8));
        }
}

static bool absent_or_empty(const json *v)
{
        return json_is_null(v) || (json_is_str(v) && !*json_str(v, ""));
}

static int read_model(struct tokenizer *t, const json *model, const char *name)
{
        const char *type = json_str(json_get(model, "type"), "BPE");
        int rc;

        if (!json_is_object(model))
                return bad(name, "no \"model\"");
        if (strcmp(type, "BPE") != 0)
                return unknown(name, "model", type);
        if (json_bool(json_get(model, "byte_fallback"), false))
                return unknown(name, "model option", "byte_fallback");
        if (!absent_or_empty(json_get(model, "continuing_subword_prefix")))
                return unknown(name, "model option", "continuing_subword_prefix");
        if (!absent_or_empty(json_get(model, "end_of_word_suffix")))
                return unknown(name, "model option", "end_of_word_suffix");
        if (json_num(json_get(model, "dropout"), 0) > 0)
                return unknown(name, "model option", "dropout");
        t->ignore_merges = json_bool(json_get(model, "ignore_merges"), false);
        if ((rc = read_vocab(t, json_get(model, "vocab"), name)) < 0 ||
            (rc = read_merges(t, json_get(model, "merges"), name)) < 0)
                return rc;
        read_bytes(t);
        return 0;
}

static int compile(struct tokenizer *t, const char *name)
{
        int code;
        PCRE2_SIZE at;

        t->pattern =
            pcre2_compile((PCRE2_SPTR)gpt2_pattern, PCRE2_ZERO_TERMINATED, PCRE2_UTF | PCRE2_UCP, &code, &at, NULL);
        if (!t->pattern)
                return err_set(-ENOMEM, "%s: the pattern that cuts text into words does not compile (PCRE2 error %d)",
                               name, code);
        return 0;
}

/* ByteLevel, alone or as the only member of a Sequence. */
static int read_pre_tokenizer(struct tokenizer *t, const json *pre, const char *name)
{
        const json *list = json_get(pre, "pretokenizers");
        const char *type = json_str(json_get(pre, "type"), "");

        if (strcmp(type, "Sequence") == 0 && json_count(list) == 1) {
                pre = json_first(list);
                type = json_str(json_get(pre, "type"), "");
        }
        if (strcmp(type, "ByteLevel") != 0)
                return unknown(name, "pre_tokenizer", json_is_null(pre) ? "none" : type);
        t->prefix_space = json_bool(json_get(pre, "add_prefix_space"), true);
        return json_bool(json_get(pre, "use_regex"), true) ? compile(t, name) : 0;
}

static int read_normalizer(const json *norm, const char *name)
{
        const char *type = json_str(json_get(norm, "type"), "?");

        if (json_is_null(norm) || (strcmp(type, "Sequence") == 0 && json_count(json_get(norm, "normalizers")) == 0))
                return 0;
        return unknown(name, "normalizer", type);
}

static int read_added(struct tokenizer *t, const json *list, const char *name)
{
        if (json_is_null(list))
                return 0;
        if (!json_is_array(list) || json_count(list) > ADDED_MAX)
                return bad(name, "added_tokens is not a list of at most 65536 tokens");
        t->added = calloc(json_count(list) + 1, sizeof(*t->added));
        if (!t->added)
                return err_set(-ENOMEM, "%s: no memory", name);
        for (const json *v = json_first(list); v; v = json_next(v)) {
                struct added *a = &t->added[t->nadded];
                const char *text = json_str(json_get(v, "content"), "");

                if (!*text || read_id(json_get(v, "id"), &a->id) < 0)
                        return bad(name, "an added token without content or id");
                a->text = strdup(text);
                if (!a->text)
                        return err_set(-ENOMEM, "%s: no memory", name);
                a->len = strlen(text);
                t->added_first[(unsigned char)*text] = true;
                a->stripping = json_bool(json_get(v, "lstrip"), false) || json_bool(json_get(v, "rstrip"), false) ||
                               json_bool(json_get(v, "single_word"), false);
                count_id(t, a->id);
                t->nadded++;
        }
        return 0;
}

static int read_root(struct tokenizer *t, const json *root, const char *name)
{
        int rc = read_normalizer(json_get(root, "normalizer"), name);

        if (rc == 0)
                rc = read_pre_tokenizer(t, json_get(root, "pre_tokenizer"), name);
        if (rc == 0)
                rc = read_model(t, json_get(root, "model"), name);
        if (rc == 0)
                rc = read_added(t, json_get(root, "added_tokens"), name);
        return rc;
}

/* Bounds what parsing can take before it begins. */
static json *parse(const char *text, size_t len, const char *name)
{
        size_t values = 0;

        for (size_t i = 0; i < len; i++)
                values += text[i] == ',' || text[i] == '[' || text[i] == '{';
        if (values > VALUES_MAX) {
                err_set(-EINVAL, "%s: more than %u values", name, VALUES_MAX);
                return NULL;
        }
        return json_parse(text, len, name);
}

int tokenizer_open(int dir_fd, const char *name, struct tokenizer **out)
{
        char *text;
        size_t len;
        int rc = model_file_read(dir_fd, name, FILE_MAX_BYTES, &text, &len);

        *out = NULL;
        if (rc < 0)
                return rc;
        json *root = parse(text, len, name);

        free(text);
        if (!root)
                return -EINVAL;
        struct tokenizer *t = calloc(1, sizeof(*t));

        rc = t ? read_root(t, root, name) : err_set(-ENOMEM, "%s: no memory", name);
        json_free(root);
        if (rc < 0) {
                tokenizer_close(t);
                return rc;
        }
        *out = t;
        return 0;
}

void tokenizer_close(struct tokenizer *t)
{
        if (!t)
                return;
        for (size_t i = 0; i < t->nadded; i++)
                free(t->added[i].text);
        pcre2_code_free(t->pattern);
        free(t->added);
        free(t->words);
        free(t->merges);
        free(t);
}

size_t tokenizer_vocab(const struct tokenizer *t)
{
        return t->vocab;
}

/* ---- merging one word ---- */

struct symbol {
        int32_t id;         /* -1: swallowed by its left neighbour */
        int32_t prev, next; /* -1: none */
};

struct candidate { /* of a merge: stale once either symbol has changed */
        int32_t rank, at, left, right, merged;
};

struct encoder {
        const struct tokenizer *t;
        struct symbol *symbols;
        struct candidate *heap;
        size_t room, nheap; /* symbols; at most three candidates per symbol */
        int32_t *ids;
        size_t nids, ids_room;
};

static bool before(const struct candidate *a, const struct candidate *b)
{
        return a->rank != b->rank ? a->rank < b->rank : a->at < b->at;
}

static void heap_push(struct encoder *e, struct candidate c)
{
        size_t i = e->nheap++;

        for (; i > 0 && before(&c, &e->heap[(i - 1) / 2]); i = (i - 1) / 2)
                e->heap[i] = e->heap[(i - 1) / 2];
        e->heap[i] = c;
}

static struct candidate heap_pop(struct encoder *e)
{
        struct candidate top = e->heap[0], last = e->heap[--e->nheap];
        size_t i = 0;

        for (;;) {
                size_t child = 2 * i + 1;

                if (child >= e->nheap)
                        break;
                if (child + 1 < e->nheap && before(&e->heap[child + 1], &e->heap[child]))
                        child++;
                if (!before(&e->heap[child], &last))
                        break;
                e->heap[i] = e->heap[child];
                i = child;
        }
        e->heap[i] = last;
        return top;
}

static void consider(struct encoder *e, int32_t at)
{
        if (at < 0 || e->symbols[at].next < 0)
                return;
        int32_t left = e->symbols[at].id, right = e->symbols[e->symbols[at].next].id;
        const struct merge_slot *m = merge_slot(e->t, left, right);

        if (m->left >= 0)
                heap_push(e, (struct candidate){m->rank, at, left, right, m->merged});
}

static void merge(struct encoder *e, const struct candidate *c)
{
        struct symbol *s = &e->symbols[c->at];

        if (s->id != c->left || s->next < 0 || e->symbols[s->next].id != c->right)
                return;
        struct symbol *gone = &e->symbols[s->next];

        s->id = c->merged;
        s->next = gone->next;
        gone->id = -1;
        if (s->next >= 0)
                e->symbols[s->next].prev = c->at;
        consider(e, s->prev);
        consider(e, c->at);
}

static int no_memory(void)
{
        return err_set(-ENOMEM, "no memory for tokenising the prompt");
}

static int reserve_word(struct encoder *e, size_t n)
{
        if (n <= e->room)
                return 0;
        struct symbol *symbols = realloc(e->symbols, n * sizeof(*symbols));

        if (symbols)
                e->symbols = symbols;
        struct candidate *heap = symbols ? realloc(e->heap, 3 * n * sizeof(*heap)) : NULL;

        if (!heap)
                return no_memory();
        e->heap = heap;
        e->room = n;
        return 0;
}

static int emit(struct encoder *e, int32_t id)
{
        if (e->nids == e->ids_room) {
                size_t room = e->ids_room ? 2 * e->ids_room : 64;
                int32_t *bigger = realloc(e->ids, room * sizeof(*bigger));

                if (!bigger)
                        return no_memory();
                e->ids = bigger;
                e->ids_room = room;
        }
        e->ids[e->nids++] = id;
        return 0;
}

/* A word that is in the vocabulary as it stands is one token where the file says ignore_merges. */
static int32_t whole_word(const struct encoder *e, const unsigned char *word, size_t len)
{
        char text[2 * 256];
        size_t n = 0;

        if (!e->t->ignore_merges || len > sizeof(text) / 2)
                return -1;
        for (size_t i = 0; i < len; i++)
                n += byte_text(word[i], text + n);
        return word_id(e->t, text, n);
}

static int encode_word(struct encoder *e, const unsigned char *word, size_t len)
{
        int32_t n = 0, whole = whole_word(e, word, len);
        int rc = whole >= 0 ? 0 : reserve_word(e, len);

        if (rc < 0 || whole >= 0)
                return rc < 0 ? rc : emit(e, whole);
        for (size_t i = 0; i < len; i++) {
                int32_t id = e->t->byte_id[word[i]];

                if (id < 0) /* there is no unknown token to stand for it */
                        continue;
                e->symbols[n] = (struct symbol){.id = id, .prev = n - 1, .next = n + 1};
                n++;
        }
        if (n == 0)
                return 0;
        e->symbols[n - 1].next = -1;
        e->nheap = 0;
        for (int32_t i = 0; i < n; i++)
                consider(e, i);
        while (e->nheap) {
                struct candidate c = heap_pop(e);

                merge(e, &c);
        }
        for (int32_t i = 0; i >= 0 && rc == 0; i = e->symbols[i].next)
                rc = emit(e, e->symbols[i].id);
        return rc;
}

/* ---- cutting text ---- */

static int encode_words(struct encoder *e, const char *text, size_t len, pcre2_match_data *match)
{
        const unsigned char *bytes = (const unsigned char *)text;
        size_t at = 0;

        while (at < len) {
                /* The text was checked to be UTF-8 when it came in, and is cut between characters only. */
                int n = pcre2_match(e->t->pattern, (PCRE2_SPTR)text, len, at, PCRE2_NO_UTF_CHECK, match, NULL);

                if (n < 0 && n != PCRE2_ERROR_NOMATCH)
                        return err_set(-EINVAL, "the prompt cannot be cut into words (PCRE2 error %d)", n);
                const PCRE2_SIZE *span = pcre2_get_ovector_pointer(match);
                size_t begin = n < 0 ? len : span[0], end = n < 0 ? len : span[1];
                int rc = begin > at ? encode_word(e, bytes + at, begin - at) : 0;

                if (rc == 0 && end > begin)
                        rc = encode_word(e, bytes + begin, end - begin);
                if (rc < 0)
                        return rc;
                at = end > at ? end : at + 1;
        }
        return 0;
}

static int encode_part(struct encoder *e, const char *text, size_t len, pcre2_match_data *match)
{
        char *spaced = NULL;
        int rc;

        if (len == 0)
                return 0;
        if (e->t->prefix_space && text[0] != ' ') {
                spaced = malloc(len + 1);
                if (!spaced)
                        return no_memory();
                spaced[0] = ' ';
                memcpy(spaced + 1, text, len);
                text = spaced;
                len++;
        }
        rc = e->t->pattern ? encode_words(e, text, len, match) : encode_word(e, (const unsigned char *)text, len);
        free(spaced);
        return rc;
}

/* The longest added token at the beginning of text, or NULL. */
static const struct added *added_at(const struct tokenizer *t, const char *text, size_t len)
{
        const struct added *best = NULL;

        if (!t->added_first[(unsigned char)*text])
                return NULL;
        for (size_t i = 0; i < t->nadded; i++) {
                const struct added *a = &t->added[i];

                if (a->len <= len && a->text[0] == text[0] && memcmp(a->text, text, a->len) == 0 &&
                    (!best || a->len > best->len))
                        best = a;
        }
        return best;
}

static int encode_text(struct encoder *e, const char *text, size_t len, pcre2_match_data *match)
{
        size_t from = 0;
        int rc = 0;

        for (size_t at = 0; at < len && rc == 0;) {
                const struct added *a = added_at(e->t, text + at, len - at);

                if (!a) {
                        at++;
                        continue;
                }
                if (a->stripping)
                        return err_set(-ENOTSUP,
                                       "the prompt holds \"%.64s\", an added token that takes the space around "
                                       "it; this version does not do that",
                                       a->text);
                rc = encode_part(e, text + from, at - from, match);
                if (rc == 0)
                        rc = emit(e, a->id);
                at += a->len;
                from = at;
        }
        return rc < 0 ? rc : encode_part(e, text + from, len - from, match);
}

/* PCRE2 checks UTF-8 in passing; an empty pattern would do, the real one is at hand. */
static int check_utf8(const struct tokenizer *t, const char *text, size_t len, pcre2_match_data *match)
{
        int n = t->pattern && len ? pcre2_match(t->pattern, (PCRE2_SPTR)text, len, 0, PCRE2_ANCHORED, match, NULL) : 0;

        if (n < 0 && n != PCRE2_ERROR_NOMATCH)
                return err_set(-EINVAL, "the prompt is not UTF-8 (PCRE2 error %d)", n);
        return 0;
}

int tokenizer_encode(const struct tokenizer *t, const char *text, size_t len, int32_t **ids, size_t *n)
{
        struct encoder e = {.t = t};

        *ids = NULL;
        *n = 0;
        if (len > TEXT_MAX)
                return err_set(-EINVAL, "a prompt of %zu bytes, above the limit of %u", len, TEXT_MAX);
        pcre2_match_data *match = pcre2_match_data_create(1, NULL);
        int rc = match ? check_utf8(t, text, len, match) : no_memory();

        if (rc == 0)
                rc = encode_text(&e, text, len, match);
        pcre2_match_data_free(match);
        free(e.symbols);
        free(e.heap);
        if (rc < 0) {
                free(e.ids);
                return rc;
        }
        *ids = e.ids;
        *n = e.nids;
        return 0;
}
