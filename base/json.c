#include "json.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cjson/cJSON.h>

#include "check.h"
#include "err.h"
#include "files.h"
#include "log.h"

#define EXACT_MAX  9007199254740992.0 /* 2^53 */
#define SAVE_TRIES 100

/* A result that cannot be built in memory cannot be reported either; there is nothing better to do than to say so. */
static _Noreturn void out_of_memory(void)
{
        log_error("out of memory while building a JSON document");
        exit(3);
}

static json *must(json *v)
{
        if (!v)
                out_of_memory();
        return v;
}

/* ---- UTF-8 ---- */

/* Bytes of the well-formed UTF-8 sequence at s (RFC 3629: no surrogates, no overlong forms), or 0. */
static size_t utf8_len(const unsigned char *s, size_t left)
{
        static const struct {
                unsigned char first_lo, first_hi, second_lo, second_hi, len;
        } form[] = {
            {0x00, 0x7f, 0x00, 0xff, 1}, {0xc2, 0xdf, 0x80, 0xbf, 2}, {0xe0, 0xe0, 0xa0, 0xbf, 3},
            {0xe1, 0xec, 0x80, 0xbf, 3}, {0xed, 0xed, 0x80, 0x9f, 3}, {0xee, 0xef, 0x80, 0xbf, 3},
            {0xf0, 0xf0, 0x90, 0xbf, 4}, {0xf1, 0xf3, 0x80, 0xbf, 4}, {0xf4, 0xf4, 0x80, 0x8f, 4},
        };

        for (size_t i = 0; i < ARRAY_LEN(form); i++) {
                if (s[0] < form[i].first_lo || s[0] > form[i].first_hi)
                        continue;
                if (form[i].len > left)
                        return 0;
                if (form[i].len > 1 && (s[1] < form[i].second_lo || s[1] > form[i].second_hi))
                        return 0;
                for (size_t k = 2; k < form[i].len; k++)
                        if ((s[k] & 0xc0) != 0x80)
                                return 0;
                return form[i].len;
        }
        return 0;
}

/* ---- parsing ---- */

static int refuse(const char *name, size_t offset, const char *why)
{
        return err_set(-EINVAL, "%s: offset %zu: %s", name, offset, why);
}

/* cJSON accepts raw control characters, broken UTF-8 and \u0000 (which ends the C string early, so that two different
 * keys look the same) in strings. Those are refused here, before it sees them. Returns the offset behind the string
 * that begins at `at`, or -EINVAL. An unterminated string is left for cJSON to refuse. */
static ssize_t scan_string(const char *text, size_t len, size_t at, const char *name)
{
        size_t i = at + 1;

        while (i < len && text[i] != '"') {
                if ((unsigned char)text[i] < 0x20)
                        return refuse(name, i, "a control character in a string");
                if (text[i] == '\\') {
                        if (len - i >= 6 && memcmp(text + i, "\\u0000", 6) == 0)
                                return refuse(name, i, "\\u0000 in a string");
                        i += 2;
                        continue;
                }
                size_t n = utf8_len((const unsigned char *)text + i, len - i);

                if (n == 0)
                        return refuse(name, i, "not UTF-8");
                i += n;
        }
        return (ssize_t)(i < len ? i + 1 : len);
}

static int scan_text(const char *text, size_t len, const char *name)
{
        for (size_t i = 0; i < len;) {
                if (text[i] == '\0')
                        return refuse(name, i, "a NUL byte");
                if (text[i] != '"') {
                        i++;
                        continue;
                }
                ssize_t next = scan_string(text, len, i, name);

                if (next < 0)
                        return (int)next;
                i = (size_t)next;
        }
        return 0;
}

static int by_key(const void *a, const void *b)
{
        return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* A document in which two readers may see two different values for one key is refused. */
static int check_duplicates(const json *object, const char *name)
{
        size_t n = json_count(object), i = 0;
        int rc = 0;

        if (n < 2)
                return 0;
        const char **key = malloc(n * sizeof(*key));

        if (!key)
                return err_set(-ENOMEM, "%s: no memory", name);
        for (const json *m = json_first(object); m; m = json_next(m))
                key[i++] = m->string;
        qsort(key, n, sizeof(*key), by_key);
        for (i = 1; i < n && rc == 0; i++)
                if (strcmp(key[i - 1], key[i]) == 0)
                        rc = err_set(-EINVAL, "%s: the key \"%.64s\" stands twice in one object", name, key[i]);
        free(key);
        return rc;
}

/* Recursion is bounded by cJSON's own limit on depth. */
static int check_tree(const json *v, const char *name)
{
        int rc = cJSON_IsObject(v) ? check_duplicates(v, name) : 0;

        if (cJSON_IsNumber(v) && !isfinite(v->valuedouble))
                return err_set(-EINVAL, "%s: a number is too large for a double", name);
        for (const json *child = v->child; child && rc == 0; child = child->next)
                rc = check_tree(child, name);
        return rc;
}

static const char *skip_space(const char *p, const char *end)
{
        while (p < end && strchr(" \t\r\n", *p))
                p++;
        return p;
}

json *json_parse(const char *text, size_t len, const char *name)
{
        const char *end = NULL;

        if (scan_text(text, len, name) < 0)
                return NULL;
        json *root = cJSON_ParseWithLengthOpts(text, len, &end, false);
        size_t at = end ? (size_t)(end - text) : 0;

        if (!root) {
                refuse(name, at, "not JSON, or nested too deeply, from here on");
                return NULL;
        }
        end = skip_space(end, text + len);
        if (end < text + len)
                refuse(name, (size_t)(end - text), "something follows the end of the JSON value");
        else if (check_tree(root, name) == 0)
                return root;
        cJSON_Delete(root);
        return NULL;
}

json *json_load(const char *path, size_t max_bytes)
{
        char *text;
        size_t len;

        if (file_read(path, max_bytes, &text, &len) < 0)
                return NULL;
        json *root = json_parse(text, len, path);

        free(text);
        return root;
}

void json_free(json *root)
{
        cJSON_Delete(root);
}

/* ---- reading ---- */

const json *json_get(const json *object, const char *key)
{
        return cJSON_IsObject(object) ? cJSON_GetObjectItemCaseSensitive(object, key) : NULL;
}

const json *json_first(const json *container)
{
        return cJSON_IsObject(container) || cJSON_IsArray(container) ? container->child : NULL;
}

const json *json_next(const json *element)
{
        return element ? element->next : NULL;
}

const char *json_key(const json *member)
{
        return member ? member->string : NULL;
}

size_t json_count(const json *container)
{
        size_t n = 0;

        for (const json *e = json_first(container); e; e = e->next)
                n++;
        return n;
}

bool json_is_null(const json *v)
{
        return !v || cJSON_IsNull(v);
}

bool json_is_num(const json *v)
{
        return cJSON_IsNumber(v);
}

bool json_is_str(const json *v)
{
        return cJSON_IsString(v);
}

bool json_is_bool(const json *v)
{
        return cJSON_IsBool(v);
}

bool json_is_array(const json *v)
{
        return cJSON_IsArray(v);
}

bool json_is_object(const json *v)
{
        return cJSON_IsObject(v);
}

double json_num(const json *v, double otherwise)
{
        return cJSON_IsNumber(v) ? v->valuedouble : otherwise;
}

const char *json_str(const json *v, const char *otherwise)
{
        return cJSON_IsString(v) ? v->valuestring : otherwise;
}

bool json_bool(const json *v, bool otherwise)
{
        return cJSON_IsBool(v) ? cJSON_IsTrue(v) : otherwise;
}

int json_int(const json *object, const char *key, int64_t min, int64_t max, int64_t *out)
{
        const json *v = json_get(object, key);

        if (json_is_null(v))
                return -ENOENT;
        if (!json_is_num(v))
                return err_set(-EINVAL, "\"%s\": expected an integer", key);
        double d = v->valuedouble;

        if (d != floor(d) || fabs(d) > EXACT_MAX || (int64_t)d < min || (int64_t)d > max)
                return err_set(-EINVAL, "\"%s\": expected an integer from %lld to %lld, not %.17g", key, (long long)min,
                               (long long)max, d);
        *out = (int64_t)d;
        return 0;
}

/* ---- building ---- */

json *json_object(void)
{
        return must(cJSON_CreateObject());
}

json *json_array(void)
{
        return must(cJSON_CreateArray());
}

void json_set(json *object, const char *key, json *value)
{
        BUG_ON(!cJSON_IsObject(object) || !value);
        if (cJSON_GetObjectItemCaseSensitive(object, key)) {
                if (!cJSON_ReplaceItemInObjectCaseSensitive(object, key, value))
                        out_of_memory();
        } else if (!cJSON_AddItemToObject(object, key, value)) {
                out_of_memory();
        }
}

void json_push(json *array, json *value)
{
        BUG_ON(!cJSON_IsArray(array) || !value);
        if (!cJSON_AddItemToArray(array, value))
                out_of_memory();
}

json *json_of_num(double v)
{
        return must(isfinite(v) ? cJSON_CreateNumber(v) : cJSON_CreateNull());
}

json *json_of_int(int64_t v)
{
        return must(cJSON_CreateNumber((double)v));
}

/* Each byte that belongs to no well-formed sequence becomes U+FFFD. */
json *json_of_str(const char *s)
{
        static const char replacement[] = "\xef\xbf\xbd";
        size_t len = s ? strlen(s) : 0, room, used = 0;

        if (!s)
                return json_of_null();
        if (!size_mul(len, 3, &room) || !size_add(room, 1, &room))
                out_of_memory();
        char *clean = malloc(room);

        if (!clean)
                out_of_memory();
        for (size_t i = 0; i < len;) {
                size_t n = utf8_len((const unsigned char *)s + i, len - i);

                memcpy(clean + used, n ? s + i : replacement, n ? n : 3);
                used += n ? n : 3;
                i += n ? n : 1;
        }
        clean[used] = '\0';
        json *v = must(cJSON_CreateString(clean));

        free(clean);
        return v;
}

json *json_of_bool(bool v)
{
        return must(cJSON_CreateBool(v));
}

json *json_of_null(void)
{
        return must(cJSON_CreateNull());
}

json *json_copy(const json *v)
{
        return must(cJSON_Duplicate(v, true));
}

void json_set_num(json *object, const char *key, double v)
{
        json_set(object, key, json_of_num(v));
}

void json_set_int(json *object, const char *key, int64_t v)
{
        json_set(object, key, json_of_int(v));
}

void json_set_str(json *object, const char *key, const char *s)
{
        json_set(object, key, json_of_str(s));
}

void json_set_bool(json *object, const char *key, bool v)
{
        json_set(object, key, json_of_bool(v));
}

void json_set_null(json *object, const char *key)
{
        json_set(object, key, json_of_null());
}

/* ---- printing ----
 * Our own, because cJSON's printer stops at 15 digits when the value is merely close to the double. */

struct text {
        char *at;
        size_t len, room;
};

static void put(struct text *t, const char *s, size_t len)
{
        size_t need;

        if (!size_add(t->len, len, &need) || !size_add(need, 1, &need))
                out_of_memory();
        if (need > t->room) {
                size_t room = need > SIZE_MAX / 2 ? need : need * 2;
                char *bigger = realloc(t->at, room);

                if (!bigger)
                        out_of_memory();
                t->at = bigger;
                t->room = room;
        }
        memcpy(t->at + t->len, s, len);
        t->len += len;
        t->at[t->len] = '\0';
}

static void put_str(struct text *t, const char *s)
{
        put(t, s, strlen(s));
}

static void put_quoted(struct text *t, const char *s)
{
        static const char special[] = "\"\\\b\f\n\r\t", letter[] = "\"\\bfnrt";
        char escape[8];

        put(t, "\"", 1);
        for (; *s; s++) {
                const char *hit = strchr(special, *s);

                if (hit) {
                        int n = snprintf(escape, sizeof(escape), "\\%c", letter[hit - special]);

                        put(t, escape, (size_t)n);
                } else if ((unsigned char)*s < 0x20 || *s == 0x7f) {
                        int n = snprintf(escape, sizeof(escape), "\\u%04x", (unsigned char)*s);

                        put(t, escape, (size_t)n);
                } else {
                        put(t, s, 1);
                }
        }
        put(t, "\"", 1);
}

/* The shortest form that reads back as the same double. */
static void put_num(struct text *t, double v)
{
        char digits[40];

        if (v == floor(v) && fabs(v) <= EXACT_MAX) {
                snprintf(digits, sizeof(digits), "%.0f", v);
        } else {
                for (int precision = 15; precision <= 17; precision++) {
                        snprintf(digits, sizeof(digits), "%.*g", precision, v);
                        if (strtod(digits, NULL) == v)
                                break;
                }
        }
        put_str(t, digits);
}

static void put_break(struct text *t, bool pretty, int depth)
{
        if (!pretty)
                return;
        put(t, "\n", 1);
        for (int i = 0; i < depth; i++)
                put(t, "  ", 2);
}

/* Raw samples come in long arrays: those of plain numbers stay on one line. */
static bool is_flat(const json *v)
{
        if (!cJSON_IsArray(v))
                return false;
        for (const json *e = v->child; e; e = e->next)
                if (cJSON_IsArray(e) || cJSON_IsObject(e) || cJSON_IsString(e))
                        return false;
        return true;
}

static void put_value(struct text *t, const json *v, bool pretty, int depth);

static void put_container(struct text *t, const json *v, bool pretty, int depth)
{
        bool object = cJSON_IsObject(v), lines = pretty && v->child && !is_flat(v);

        put(t, object ? "{" : "[", 1);
        for (const json *e = v->child; e; e = e->next) {
                put_break(t, lines, depth + 1);
                if (object) {
                        put_quoted(t, e->string);
                        put(t, ": ", pretty ? 2 : 1);
                }
                put_value(t, e, pretty, depth + 1);
                if (e->next)
                        put(t, ", ", pretty && !lines ? 2 : 1);
        }
        put_break(t, lines, depth);
        put(t, object ? "}" : "]", 1);
}

static void put_value(struct text *t, const json *v, bool pretty, int depth)
{
        if (cJSON_IsObject(v) || cJSON_IsArray(v))
                put_container(t, v, pretty, depth);
        else if (cJSON_IsString(v))
                put_quoted(t, v->valuestring);
        else if (cJSON_IsNumber(v) && isfinite(v->valuedouble))
                put_num(t, v->valuedouble);
        else if (cJSON_IsBool(v))
                put_str(t, cJSON_IsTrue(v) ? "true" : "false");
        else
                put_str(t, "null");
}

char *json_text(const json *v, bool pretty)
{
        struct text t = {0};

        put_value(&t, v, pretty, 0);
        if (pretty)
                put(&t, "\n", 1);
        return t.at;
}

/* ---- saving ---- */

static int write_full(int fd, const char *text, size_t len)
{
        while (len) {
                ssize_t n = write(fd, text, len);

                if (n < 0 && errno == EINTR)
                        continue;
                if (n < 0)
                        return -errno;
                text += n;
                len -= (size_t)n;
        }
        return fsync(fd) < 0 ? -errno : 0;
}

/* Opens a new file beside path, mode 0666 less the umask (mkstemp would make results unreadable for others). */
static int open_beside(const char *path, char **temp)
{
        int fd = -1;

        for (int i = 0; fd < 0 && i < SAVE_TRIES; i++) {
                if (asprintf(temp, "%s.%ld-%d.tmp", path, (long)getpid(), i) < 0)
                        out_of_memory();
                fd = open(*temp, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
                if (fd >= 0)
                        return fd;
                int err = errno;

                free(*temp);
                if (err != EEXIST)
                        return -err;
        }
        return -EEXIST;
}

/* So that the rename itself is on disk; where a folder cannot be synced there is nothing to do about it. */
static void sync_folder(const char *path)
{
        char *copy = strdup(path);
        char *slash = copy ? strrchr(copy, '/') : NULL;

        if (slash)
                slash[slash == copy ? 1 : 0] = '\0';
        int fd = open(slash ? copy : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);

        if (fd >= 0) {
                (void)!fsync(fd);
                close(fd);
        }
        free(copy);
}

int json_save(const json *v, const char *path)
{
        char *temp = NULL;
        int fd = open_beside(path, &temp);

        if (fd < 0)
                return err_set(fd, "%s: cannot write: %s", path, strerror(-fd));
        char *text = json_text(v, true);
        int rc = write_full(fd, text, strlen(text));

        free(text);
        if (close(fd) < 0 && rc == 0)
                rc = -errno;
        if (rc == 0 && rename(temp, path) < 0)
                rc = -errno;
        if (rc < 0) {
                unlink(temp);
                err_set(rc, "%s: cannot write: %s", path, strerror(-rc));
        } else {
                sync_folder(path);
        }
        free(temp);
        return rc;
}
