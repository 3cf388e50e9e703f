/*
 * JSON: the only includer of cJSON.h is json.c. Documents are trees owned by their root; pointers returned by
 * getters live as long as the root. Numbers are doubles (integers exact to 2^53).
 */
#ifndef DJINN_BASE_JSON_H
#define DJINN_BASE_JSON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct cJSON json;

/* Parsing. name stands in errors ("config.json: offset 17: ..."). NULL on failure, err_text() says why.
 * Depth is bounded (cJSON's limit) and trailing garbage refused. */
json *json_parse(const char *text, size_t len, const char *name);
json *json_load(const char *path, size_t max_bytes);
void json_free(json *root);

/* Reading: all accept NULL and answer as if the value were absent. */
const json *json_get(const json *object, const char *key);
const json *json_first(const json *container); /* first element or member; iterate with json_next */
const json *json_next(const json *element);
const char *json_key(const json *member);
size_t json_count(const json *container);
bool json_is_null(const json *v); /* absent or null */
bool json_is_num(const json *v);
bool json_is_str(const json *v);
bool json_is_bool(const json *v);
bool json_is_array(const json *v);
bool json_is_object(const json *v);
double json_num(const json *v, double otherwise);
const char *json_str(const json *v, const char *otherwise);
bool json_bool(const json *v, bool otherwise);
/* An integer in [min, max]: 0, -ENOENT absent or null, -EINVAL wrong type, fraction or range (sentence set). */
int json_int(const json *object, const char *key, int64_t min, int64_t max, int64_t *out);

/* Writing: containers own what is added to them. Out of memory ends the program with a sentence. */
json *json_object(void);
json *json_array(void);
void json_set(json *object, const char *key, json *value); /* takes value */
void json_push(json *array, json *value);                  /* takes value */
json *json_of_num(double v);                               /* NaN and infinities become null */
json *json_of_int(int64_t v);
json *json_of_str(const char *s); /* NULL becomes null; invalid UTF-8 is replaced */
json *json_of_bool(bool v);
json *json_of_null(void);
json *json_copy(const json *v);
void json_set_num(json *object, const char *key, double v);
void json_set_int(json *object, const char *key, int64_t v);
void json_set_str(json *object, const char *key, const char *s);
void json_set_bool(json *object, const char *key, bool v);
void json_set_null(json *object, const char *key);

/* Text; free() it. Numbers print with as many digits as reading back the same double needs. */
char *json_text(const json *v, bool pretty);
/* Writes atomically: temporary file in the same folder, fsync, rename. */
int json_save(const json *v, const char *path);

#endif
