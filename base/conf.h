/*
 * YAML (libyaml; the only includer of yaml.h is conf.c) as a tree whose nodes know file:line:column, and a table-driven
 * binder onto structs: the table is the documentation, the parser, the range check and the list of known keys at once.
 * Documents are untrusted: size, depth, number of nodes and alias expansion are bounded; duplicate keys are errors.
 */
#ifndef DJINN_BASE_CONF_H
#define DJINN_BASE_CONF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct conf_doc; /* owns all nodes and strings */

enum conf_kind { CONF_SCALAR, CONF_MAP, CONF_LIST };

struct conf_node {
        enum conf_kind kind;
        const char *file;               /* "x.yaml" */
        unsigned line, col;             /* of the value, from 1 */
        unsigned key_line, key_col;     /* of the key, in a map */
        const char *key;                /* in a map; else NULL */
        const char *text;               /* of a scalar */
        bool plain;                     /* scalar without quotes: only such may be a number, boolean or null */
        struct conf_node *first, *next; /* children; siblings */
        size_t count;                   /* children */
};

/* 0, or -EINVAL / -errno with the sentence "file:line:col: ...". */
int conf_load(const char *path, struct conf_doc **out);
int conf_parse(const char *text, size_t len, const char *name, struct conf_doc **out);
void conf_free(struct conf_doc *doc);
const struct conf_node *conf_root(const struct conf_doc *doc);
const struct conf_node *conf_get(const struct conf_node *map, const char *key);

/* A plain null, ~ or nothing at all. conf_bind treats a field that holds it as absent. */
bool conf_is_null(const struct conf_node *n);

/* -EINVAL with "file:line:col: <sentence>"; conf_key_error points at the node's key. */
int conf_key_error(const struct conf_node *at, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
int conf_error(const struct conf_node *at, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

enum conf_type {
        CONF_T_STR,  /* const char *, owned by the doc */
        CONF_T_INT,  /* int64_t in [min, max] */
        CONF_T_NUM,  /* double in [min, max] */
        CONF_T_BOOL, /* bool */
        CONF_T_ENUM, /* int: index into choices (NULL-terminated) */
        CONF_T_NAME, /* const char *: [A-Za-z0-9._-]{1,64}, not starting with a dot (becomes part of a path) */
        CONF_T_NODE, /* const struct conf_node *, any kind: the caller goes on by itself */
        CONF_T_ECHO, /* accepted, checked to be a scalar, ignored by us, kept in the node for echoing */
};

struct conf_field {
        const char *key;
        enum conf_type type;
        size_t offset; /* into the struct bound to; ignored for CONF_T_ECHO */
        bool required;
        double min, max; /* CONF_T_INT, CONF_T_NUM; both 0: no limit. Integers are exact up to 2^53 */
        const char *const *choices;
        const char *help;
};

/* Fills *out from map; absent fields keep what *out held (defaults). Unknown key: an error that names the nearest
 * known key; wrong type, range, duplicate: an error that says what was expected. */
int conf_bind(const struct conf_node *map, const struct conf_field *fields, size_t nfields, void *out);

/* The scalar as an integer / number / boolean; -EINVAL with a sentence naming `what`. */
int conf_int(const struct conf_node *n, const char *what, int64_t min, int64_t max, int64_t *out);
int conf_num(const struct conf_node *n, const char *what, double min, double max, double *out);
int conf_bool(const struct conf_node *n, const char *what, bool *out);

/* The entry of `known` (NULL-terminated) nearest to word by edit distance, or NULL when none is near. For messages. */
const char *conf_nearest(const char *word, const char *const *known);
/* [A-Za-z0-9._-]{1,64}, not starting with a dot. */
bool conf_name_ok(const char *s);

#endif
