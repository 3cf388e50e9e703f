/*
 * libyaml's events go into a tree of nodes in one arena. An alias is expanded by copying the nodes of its anchor
 * (texts are shared), and every copied node counts against the same limit as a written one: that is what stops an alias
 * bomb after a bounded amount of work.
 */
#include "conf.h"

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <yaml.h>

#include "arena.h"
#include "check.h"
#include "err.h"
#include "files.h"

#define SIZE_MAX_BYTES (1u << 20)
#define DEPTH_MAX      64
#define NODES_MAX      100000
#define ANCHORS_MAX    256
#define ARENA_MAX      (64u << 20)
#define NAME_MAX_BYTES 64
#define WORD_MAX_BYTES 64
#define QUOTE_BYTES    64

struct conf_doc {
        struct arena arena;
        const char *file;
        struct conf_node *root;
};

struct anchor {
        struct anchor *next;
        const char *name;
        const struct conf_node *node;
};

struct builder {
        struct conf_doc *doc;
        const char *text;
        size_t len;
        yaml_parser_t parser;
        yaml_event_t event;
        bool has_event;
        size_t nodes, anchors;
        struct anchor *anchor;
};

/* ---- errors ---- */

static int error_at(const char *file, unsigned line, unsigned col, const char *fmt, va_list ap)
{
        char text[ERR_TEXT_MAX] = "";

        vsnprintf(text, sizeof(text), fmt, ap);
        return err_set(-EINVAL, "%s:%u:%u: %s", file, line, col, text);
}

int conf_error(const struct conf_node *at, const char *fmt, ...)
{
        va_list ap;

        va_start(ap, fmt);
        int rc = error_at(at->file, at->line, at->col, fmt, ap);

        va_end(ap);
        return rc;
}

int conf_key_error(const struct conf_node *at, const char *fmt, ...)
{
        va_list ap;

        va_start(ap, fmt);
        int rc = error_at(at->file, at->key ? at->key_line : at->line, at->key ? at->key_col : at->col, fmt, ap);

        va_end(ap);
        return rc;
}

/* At the event being looked at. */
__attribute__((format(printf, 2, 3))) static int refuse(struct builder *b, const char *fmt, ...)
{
        const yaml_mark_t *at = &b->event.start_mark;
        va_list ap;

        va_start(ap, fmt);
        int rc = error_at(b->doc->file, (unsigned)at->line + 1, (unsigned)at->column + 1, fmt, ap);

        va_end(ap);
        return rc;
}

static int no_memory(const struct builder *b)
{
        return err_set(-ENOMEM, "%s: no memory for the document", b->doc->file);
}

/* Line and column, from 0, of a byte offset; columns count characters, as the scanner's do. */
static yaml_mark_t mark_of(const char *text, size_t offset)
{
        yaml_mark_t at = {.index = offset};

        for (size_t i = 0; i < offset; i++) {
                at.column += ((unsigned char)text[i] & 0xc0) != 0x80;
                if (text[i] == '\n') {
                        at.line++;
                        at.column = 0;
                }
        }
        return at;
}

/* libyaml knows the place of what it could not read in two ways: the scanner by mark, the reader, which runs ahead of
 * it, by byte offset. */
static int parser_error(struct builder *b)
{
        const yaml_parser_t *p = &b->parser;
        bool reader = p->error == YAML_READER_ERROR && p->problem_offset <= b->len;
        yaml_mark_t at = reader ? mark_of(b->text, p->problem_offset) : p->problem_mark;

        if (p->error == YAML_MEMORY_ERROR)
                return no_memory(b);
        return err_set(-EINVAL, "%s:%zu:%zu: not YAML: %s%s%s", b->doc->file, at.line + 1, at.column + 1,
                       p->problem ? p->problem : "unreadable", p->context ? ", " : "", p->context ? p->context : "");
}

/* ---- building ---- */

static int next_event(struct builder *b)
{
        if (b->has_event)
                yaml_event_delete(&b->event);
        b->has_event = yaml_parser_parse(&b->parser, &b->event);
        return b->has_event ? 0 : parser_error(b);
}

static struct conf_node *new_node(struct builder *b)
{
        struct conf_node *n = arena_new(&b->doc->arena, struct conf_node);

        if (n)
                n->file = b->doc->file;
        return n;
}

/* One more node, at this depth, whether written or copied. */
static int account(struct builder *b, unsigned depth)
{
        if (++b->nodes > NODES_MAX)
                return refuse(b, "more than %d values (aliases expanded): refused", NODES_MAX);
        if (depth > DEPTH_MAX)
                return refuse(b, "nested more than %d levels deep: refused", DEPTH_MAX);
        return 0;
}

static int copy_tree(struct builder *b, const struct conf_node *from, unsigned depth, struct conf_node **out)
{
        int rc = account(b, depth);

        if (rc < 0)
                return rc;
        struct conf_node *n = new_node(b);

        if (!n)
                return no_memory(b);
        *n = *from;
        n->first = n->next = NULL;
        struct conf_node **tail = &n->first;

        for (const struct conf_node *c = from->first; c; c = c->next) {
                rc = copy_tree(b, c, depth + 1, tail);
                if (rc < 0)
                        return rc;
                tail = &(*tail)->next;
        }
        *out = n;
        return 0;
}

static int build_alias(struct builder *b, unsigned depth, struct conf_node **out)
{
        const char *name = (const char *)b->event.data.alias.anchor;

        for (const struct anchor *a = b->anchor; a; a = a->next) {
                if (strcmp(a->name, name) != 0)
                        continue;
                int rc = copy_tree(b, a->node, depth, out);

                if (rc == 0)
                        (*out)->key = NULL;
                return rc;
        }
        return refuse(b, "alias *%.64s: no anchor &%.64s is complete before it", name, name);
}

/* Newest first, because YAML lets an anchor be defined again. Called when the node is complete: an alias to a node
 * that it is part of finds nothing. */
static int remember(struct builder *b, const char *name, const struct conf_node *node)
{
        struct anchor *a = arena_new(&b->doc->arena, struct anchor);

        if (!a)
                return no_memory(b);
        if (++b->anchors > ANCHORS_MAX)
                return conf_error(node, "more than %d anchors: refused", ANCHORS_MAX);
        *a = (struct anchor){.next = b->anchor, .name = name, .node = node};
        b->anchor = a;
        return 0;
}

/* A copy of the text in the arena; NUL bytes ("\0" in double quotes) would cut it short. */
static int take_text(struct builder *b, const char **out)
{
        const char *text = (const char *)b->event.data.scalar.value;
        size_t len = b->event.data.scalar.length;

        if (memchr(text, 0, len))
                return refuse(b, "a NUL character in a text");
        *out = arena_strndup(&b->doc->arena, text, len);
        return *out ? 0 : no_memory(b);
}

static int by_key_then_place(const void *pa, const void *pb)
{
        const struct conf_node *a = *(const struct conf_node *const *)pa, *b = *(const struct conf_node *const *)pb;
        int order = strcmp(a->key, b->key);

        if (order)
                return order;
        if (a->key_line != b->key_line)
                return a->key_line < b->key_line ? -1 : 1;
        return (a->key_col > b->key_col) - (a->key_col < b->key_col);
}

static int check_duplicates(struct builder *b, const struct conf_node *map)
{
        size_t i = 0;
        int rc = 0;

        if (map->count < 2)
                return 0;
        const struct conf_node **v = malloc(map->count * sizeof(*v));

        if (!v)
                return no_memory(b);
        for (const struct conf_node *c = map->first; c; c = c->next)
                v[i++] = c;
        qsort(v, map->count, sizeof(*v), by_key_then_place);
        for (i = 1; i < map->count && rc == 0; i++)
                if (strcmp(v[i - 1]->key, v[i]->key) == 0)
                        rc = conf_key_error(v[i], "'%.*s' is given twice; first in line %u", QUOTE_BYTES, v[i]->key,
                                            v[i - 1]->key_line);
        free(v);
        return rc;
}

static int build_value(struct builder *b, unsigned depth, struct conf_node **out);

struct key {
        const char *text;
        unsigned line, col;
};

static int take_key(struct builder *b, struct key *key)
{
        const yaml_event_t *ev = &b->event;

        if (ev->type != YAML_SCALAR_EVENT)
                return refuse(b, "a key must be a plain word");
        if (ev->data.scalar.length == 0)
                return refuse(b, "a key is missing before ':'");
        if (ev->data.scalar.tag || ev->data.scalar.anchor)
                return refuse(b, "tags and anchors are not allowed on a key");
        key->line = (unsigned)ev->start_mark.line + 1;
        key->col = (unsigned)ev->start_mark.column + 1;
        int rc = take_text(b, &key->text);

        if (rc == 0 && strcmp(key->text, "<<") == 0 && ev->data.scalar.style == YAML_PLAIN_SCALAR_STYLE)
                return refuse(b, "merge keys (<<) are not supported; write the fields out, or use an alias for a "
                                 "whole value");
        return rc;
}

static int build_map(struct builder *b, unsigned depth, struct conf_node *map)
{
        struct conf_node **tail = &map->first;
        struct key key = {0};
        int rc;

        while ((rc = next_event(b)) == 0 && b->event.type != YAML_MAPPING_END_EVENT) {
                if ((rc = take_key(b, &key)) < 0 || (rc = next_event(b)) < 0 ||
                    (rc = build_value(b, depth + 1, tail)) < 0)
                        return rc;
                (*tail)->key = key.text;
                (*tail)->key_line = key.line;
                (*tail)->key_col = key.col;
                tail = &(*tail)->next;
                map->count++;
        }
        return rc < 0 ? rc : check_duplicates(b, map);
}

static int build_list(struct builder *b, unsigned depth, struct conf_node *list)
{
        struct conf_node **tail = &list->first;
        int rc;

        while ((rc = next_event(b)) == 0 && b->event.type != YAML_SEQUENCE_END_EVENT) {
                if ((rc = build_value(b, depth + 1, tail)) < 0)
                        return rc;
                tail = &(*tail)->next;
                list->count++;
        }
        return rc;
}

struct shape {
        enum conf_kind kind;
        const yaml_char_t *anchor, *tag;
};

static struct shape event_shape(const yaml_event_t *ev)
{
        if (ev->type == YAML_MAPPING_START_EVENT)
                return (struct shape){CONF_MAP, ev->data.mapping_start.anchor, ev->data.mapping_start.tag};
        if (ev->type == YAML_SEQUENCE_START_EVENT)
                return (struct shape){CONF_LIST, ev->data.sequence_start.anchor, ev->data.sequence_start.tag};
        return (struct shape){CONF_SCALAR, ev->data.scalar.anchor, ev->data.scalar.tag};
}

static int fill(struct builder *b, unsigned depth, struct conf_node *n)
{
        if (n->kind == CONF_MAP)
                return build_map(b, depth, n);
        if (n->kind == CONF_LIST)
                return build_list(b, depth, n);
        n->plain = b->event.data.scalar.style == YAML_PLAIN_SCALAR_STYLE;
        return take_text(b, &n->text);
}

/* The value whose first event is the current one. */
static int build_value(struct builder *b, unsigned depth, struct conf_node **out)
{
        if (b->event.type == YAML_ALIAS_EVENT)
                return build_alias(b, depth, out);
        struct shape shape = event_shape(&b->event);
        const char *anchor = NULL;
        int rc = account(b, depth);

        if (rc < 0)
                return rc;
        if (shape.tag)
                return refuse(b, "tags (%.64s) are not used here; leave it out", (const char *)shape.tag);
        struct conf_node *n = new_node(b);

        if (!n || (shape.anchor && !(anchor = arena_strdup(&b->doc->arena, (const char *)shape.anchor))))
                return no_memory(b);
        n->kind = shape.kind;
        n->line = (unsigned)b->event.start_mark.line + 1;
        n->col = (unsigned)b->event.start_mark.column + 1;
        *out = n;
        rc = fill(b, depth, n);
        return rc == 0 && anchor ? remember(b, anchor, n) : rc;
}

/* stream-start, document-start, the value, document-end, stream-end; nothing else. */
static int build_document(struct builder *b)
{
        int rc = next_event(b);

        if (rc == 0)
                rc = next_event(b);
        if (rc < 0)
                return rc;
        if (b->event.type == YAML_STREAM_END_EVENT)
                return refuse(b, "the file is empty");
        if ((rc = next_event(b)) < 0 || (rc = build_value(b, 1, &b->doc->root)) < 0)
                return rc;
        if ((rc = next_event(b)) < 0 || (rc = next_event(b)) < 0)
                return rc;
        if (b->event.type != YAML_STREAM_END_EVENT)
                return refuse(b, "a second document begins; one file holds one document");
        return 0;
}

int conf_parse(const char *text, size_t len, const char *name, struct conf_doc **out)
{
        struct conf_doc *doc = calloc(1, sizeof(*doc));
        struct builder b = {.doc = doc, .text = text, .len = len};

        if (!doc)
                return err_set(-ENOMEM, "%s: no memory for the document", name);
        arena_init(&doc->arena, 16384, ARENA_MAX);
        doc->file = arena_strdup(&doc->arena, name);
        if (!doc->file || !yaml_parser_initialize(&b.parser)) {
                conf_free(doc);
                return err_set(-ENOMEM, "%s: no memory for the document", name);
        }
        yaml_parser_set_encoding(&b.parser, YAML_UTF8_ENCODING);
        yaml_parser_set_input_string(&b.parser, (const unsigned char *)text, len);
        int rc = len > SIZE_MAX_BYTES ? err_set(-EFBIG, "%s: larger than the limit of %u bytes", name, SIZE_MAX_BYTES)
                                      : build_document(&b);

        if (b.has_event)
                yaml_event_delete(&b.event);
        yaml_parser_delete(&b.parser);
        if (rc < 0)
                conf_free(doc);
        else
                *out = doc;
        return rc;
}

int conf_load(const char *path, struct conf_doc **out)
{
        char *text;
        size_t len;
        int rc = file_read(path, SIZE_MAX_BYTES, &text, &len);

        if (rc < 0)
                return rc;
        rc = conf_parse(text, len, path, out);
        free(text);
        return rc;
}

void conf_free(struct conf_doc *doc)
{
        if (!doc)
                return;
        arena_free(&doc->arena);
        free(doc);
}

const struct conf_node *conf_root(const struct conf_doc *doc)
{
        return doc->root;
}

const struct conf_node *conf_get(const struct conf_node *map, const char *key)
{
        if (!map || map->kind != CONF_MAP)
                return NULL;
        for (const struct conf_node *n = map->first; n; n = n->next)
                if (strcmp(n->key, key) == 0)
                        return n;
        return NULL;
}

/* ---- scalars ---- */

static bool word_in(const char *text, const char *const *words)
{
        for (; *words; words++)
                if (strcmp(text, *words) == 0)
                        return true;
        return false;
}

bool conf_is_null(const struct conf_node *n)
{
        static const char *const nulls[] = {"", "~", "null", "Null", "NULL", NULL};

        return !n || (n->kind == CONF_SCALAR && n->plain && word_in(n->text, nulls));
}

/* "a list", "the text 'x'": what stands there instead of what was expected. */
static const char *describe(const struct conf_node *n, char *buf, size_t room)
{
        if (n->kind == CONF_MAP)
                return "a map";
        if (n->kind == CONF_LIST)
                return "a list";
        if (conf_is_null(n))
                return "nothing";
        snprintf(buf, room, "%s%.*s%s", n->plain ? "'" : "the quoted text \"", QUOTE_BYTES, n->text,
                 n->plain ? "'" : "\"");
        return buf;
}

static int expected(const struct conf_node *n, const char *what, const char *wanted)
{
        char buf[QUOTE_BYTES + 32];

        return conf_error(n, "%s: expected %s, not %s", what, wanted, describe(n, buf, sizeof(buf)));
}

static bool is_plain(const struct conf_node *n)
{
        return n->kind == CONF_SCALAR && n->plain;
}

int conf_int(const struct conf_node *n, const char *what, int64_t min, int64_t max, int64_t *out)
{
        char *end = NULL;

        if (!is_plain(n))
                return expected(n, what, "an integer");
        const char *digits = n->text + (n->text[0] == '-' || n->text[0] == '+');

        errno = 0;
        long long v = strtoll(n->text, &end, 10);

        if (!isdigit((unsigned char)digits[0]) || *end)
                return expected(n, what, "an integer");
        if (errno == ERANGE || v < min || v > max)
                return conf_error(n, "%s: %.*s is out of range; expected %lld to %lld", what, QUOTE_BYTES, n->text,
                                  (long long)min, (long long)max);
        *out = v;
        return 0;
}

int conf_num(const struct conf_node *n, const char *what, double min, double max, double *out)
{
        char *end = NULL;

        /* The set of characters keeps out strtod's hexadecimal, infinity and NaN. */
        if (!is_plain(n) || !n->text[0] || n->text[strspn(n->text, "+-.0123456789eE")])
                return expected(n, what, "a number");
        double v = strtod(n->text, &end);

        if (*end)
                return expected(n, what, "a number");
        if (!isfinite(v) || v < min || v > max)
                return conf_error(n, "%s: %.*s is out of range; expected %g to %g", what, QUOTE_BYTES, n->text, min,
                                  max);
        *out = v;
        return 0;
}

int conf_bool(const struct conf_node *n, const char *what, bool *out)
{
        static const char *const yes[] = {"true", "True", "TRUE", "yes", "Yes", "YES", "on", "On", "ON", NULL};
        static const char *const no[] = {"false", "False", "FALSE", "no", "No", "NO", "off", "Off", "OFF", NULL};

        if (!is_plain(n))
                return expected(n, what, "true or false");
        *out = word_in(n->text, yes);
        return *out || word_in(n->text, no) ? 0 : expected(n, what, "true or false");
}

bool conf_name_ok(const char *s)
{
        static const char allowed[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-";
        size_t len = strspn(s, allowed);

        return s[len] == '\0' && len >= 1 && len <= NAME_MAX_BYTES && s[0] != '.';
}

/* ---- nearest ---- */

static size_t min2(size_t a, size_t b)
{
        return a < b ? a : b;
}

/* Edit distance where swapping two neighbours is one step; both words are at most WORD_MAX_BYTES long. */
static size_t distance(const char *a, const char *b)
{
        size_t row[3][WORD_MAX_BYTES + 1], la = strlen(a), lb = strlen(b);

        for (size_t j = 0; j <= lb; j++)
                row[0][j] = j;
        for (size_t i = 1; i <= la; i++) {
                size_t *now = row[i % 3], *last = row[(i - 1) % 3], *before = row[(i + 1) % 3];

                now[0] = i;
                for (size_t j = 1; j <= lb; j++) {
                        now[j] = min2(min2(last[j], now[j - 1]) + 1, last[j - 1] + (a[i - 1] != b[j - 1]));
                        if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1])
                                now[j] = min2(now[j], before[j - 2] + 1);
                }
        }
        return row[la % 3][lb];
}

/* Upper case and '-' for '_' are the commonest slips and cost nothing. */
static bool fold(const char *word, char *out)
{
        size_t len = strlen(word);

        if (len > WORD_MAX_BYTES)
                return false;
        for (size_t i = 0; i <= len; i++)
                out[i] = word[i] == '-' ? '_' : (char)tolower((unsigned char)word[i]);
        return true;
}

/* Is `known` at less than *limit edits from the folded word? Then that is the new limit. */
static bool nearer(const char *folded, const char *known, size_t *limit)
{
        char k[WORD_MAX_BYTES + 1];

        if (!fold(known, k))
                return false;
        size_t d = distance(folded, k);

        if (d >= *limit)
                return false;
        *limit = d;
        return true;
}

/* How many edits still count as near; never all the letters of the word. */
static size_t near_limit(const char *folded)
{
        size_t len = strlen(folded);

        return min2(2 + len / 4, len);
}

const char *conf_nearest(const char *word, const char *const *known)
{
        char w[WORD_MAX_BYTES + 1];
        const char *best = NULL;

        if (!fold(word, w))
                return NULL;
        size_t limit = near_limit(w);

        for (; *known; known++)
                if (nearer(w, *known, &limit))
                        best = *known;
        return best;
}

/* ---- binding ---- */

static int64_t to_int64(double v)
{
        if (v <= -0x1p63)
                return INT64_MIN;
        return v >= 0x1p63 ? INT64_MAX : (int64_t)v;
}

static int set_int(const struct conf_node *n, const struct conf_field *f, void *slot)
{
        bool open = f->min == 0 && f->max == 0;

        return conf_int(n, f->key, open ? INT64_MIN : to_int64(f->min), open ? INT64_MAX : to_int64(f->max), slot);
}

static int set_num(const struct conf_node *n, const struct conf_field *f, void *slot)
{
        bool open = f->min == 0 && f->max == 0;

        return conf_num(n, f->key, open ? -HUGE_VAL : f->min, open ? HUGE_VAL : f->max, slot);
}

static int set_bool(const struct conf_node *n, const struct conf_field *f, void *slot)
{
        return conf_bool(n, f->key, slot);
}

static int set_str(const struct conf_node *n, const struct conf_field *f, void *slot)
{
        if (n->kind != CONF_SCALAR)
                return expected(n, f->key, "a text");
        *(const char **)slot = n->text;
        return 0;
}

static int set_name(const struct conf_node *n, const struct conf_field *f, void *slot)
{
        if (n->kind != CONF_SCALAR || !conf_name_ok(n->text))
                return expected(n, f->key, "a name of 1 to 64 letters, digits, '.', '_', '-', not beginning with '.'");
        *(const char **)slot = n->text;
        return 0;
}

static int set_node(const struct conf_node *n, const struct conf_field *f, void *slot)
{
        *(const struct conf_node **)slot = n;
        return 0;
}

static int set_echo(const struct conf_node *n, const struct conf_field *f, void *slot)
{
        return n->kind == CONF_SCALAR ? 0 : expected(n, f->key, "a single value");
}

/* "a, b or c" */
static void list_words(const char *const *words, char *buf, size_t room)
{
        size_t used = 0;

        buf[0] = '\0';
        for (size_t i = 0; words[i] && used < room; i++) {
                const char *between = i == 0 ? "" : words[i + 1] ? ", " : " or ";
                int n = snprintf(buf + used, room - used, "%s%s", between, words[i]);

                used += n > 0 ? (size_t)n : 0;
        }
}

static int set_enum(const struct conf_node *n, const struct conf_field *f, void *slot)
{
        char words[512];

        for (int i = 0; n->kind == CONF_SCALAR && f->choices[i]; i++) {
                if (strcmp(n->text, f->choices[i]) != 0)
                        continue;
                *(int *)slot = i;
                return 0;
        }
        list_words(f->choices, words, sizeof(words));
        return expected(n, f->key, words);
}

static int (*const setters[])(const struct conf_node *, const struct conf_field *, void *) = {
    [CONF_T_STR] = set_str,   [CONF_T_INT] = set_int,   [CONF_T_NUM] = set_num,   [CONF_T_BOOL] = set_bool,
    [CONF_T_ENUM] = set_enum, [CONF_T_NAME] = set_name, [CONF_T_NODE] = set_node, [CONF_T_ECHO] = set_echo,
};

static int unknown_key(const struct conf_node *n, const struct conf_field *fields, size_t nfields)
{
        char w[WORD_MAX_BYTES + 1];
        const char *best = NULL;
        size_t limit = fold(n->key, w) ? near_limit(w) : 0;

        for (size_t i = 0; i < nfields && limit; i++)
                if (nearer(w, fields[i].key, &limit))
                        best = fields[i].key;
        if (best)
                return conf_key_error(n, "unknown key '%.*s'; did you mean '%s'?", QUOTE_BYTES, n->key, best);
        return conf_key_error(n, "unknown key '%.*s'", QUOTE_BYTES, n->key);
}

static const struct conf_field *field_of(const char *key, const struct conf_field *fields, size_t nfields)
{
        for (size_t i = 0; i < nfields; i++)
                if (strcmp(fields[i].key, key) == 0)
                        return &fields[i];
        return NULL;
}

static int check_required(const struct conf_node *map, const struct conf_field *fields, size_t nfields)
{
        for (size_t i = 0; i < nfields; i++)
                if (fields[i].required && conf_is_null(conf_get(map, fields[i].key)))
                        return conf_error(map, "'%s' is missing%s%s%s", fields[i].key, fields[i].help ? " (" : "",
                                          fields[i].help ? fields[i].help : "", fields[i].help ? ")" : "");
        return 0;
}

int conf_bind(const struct conf_node *map, const struct conf_field *fields, size_t nfields, void *out)
{
        if (map->kind != CONF_MAP)
                return expected(map, map->key ? map->key : "this entry", "a map of keys and values");
        for (const struct conf_node *n = map->first; n; n = n->next) {
                const struct conf_field *f = field_of(n->key, fields, nfields);

                if (!f)
                        return unknown_key(n, fields, nfields);
                int rc = conf_is_null(n) ? 0 : setters[f->type](n, f, (char *)out + f->offset);

                if (rc < 0)
                        return rc;
        }
        return check_required(map, fields, nfields);
}
