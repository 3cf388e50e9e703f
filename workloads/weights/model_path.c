/*
 * Where models lie. In every root, in this order: <org>/<name>, <name>, and the hub cache's layout
 * models--<org>--<name>/snapshots/<commit>, with refs/<revision> holding the commit. Everything below a root is
 * resolved beneath it.
 */
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"
#include "err.h"
#include "files.h"
#include "weights.h"

#define ROOTS_MAX 64
#define ID_MAX    96

struct root {
        char *path;
        int fd;
        bool hub_only;
};

struct model_roots {
        struct root roots[ROOTS_MAX];
        size_t n;
};

/* ---- roots ---- */

/* A root that was asked for by name must be there; the usual places need not. */
static int add_root(struct model_roots *r, const char *path, bool hub_only, bool must)
{
        if (r->n == ROOTS_MAX)
                return err_set(-EINVAL, "more than %d model roots", ROOTS_MAX);
        int fd = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);

        if (fd < 0)
                return must ? err_set(-errno, "model root %s: cannot open: %s", path, strerror(errno)) : 0;
        char *copy = strdup(path);

        if (!copy) {
                close(fd);
                return err_set(-ENOMEM, "no memory for the model roots");
        }
        r->roots[r->n++] = (struct root){.path = copy, .fd = fd, .hub_only = hub_only};
        return 0;
}

static int add_env_list(struct model_roots *r, const char *list)
{
        char *copy = strdup(list), *save = NULL;
        int rc = copy ? 0 : err_set(-ENOMEM, "no memory for the model roots");

        for (char *p = copy ? strtok_r(copy, ":", &save) : NULL; p && rc == 0; p = strtok_r(NULL, ":", &save)) {
                rc = add_root(r, p, false, true);
                if (rc < 0)
                        err_trail(rc, "from DJINN_MODEL_PATH");
        }
        free(copy);
        return rc;
}

static int add_below(struct model_roots *r, const char *base, const char *below)
{
        char path[PATH_MAX];

        if (!base || !*base || snprintf(path, sizeof(path), "%s%s", base, below) >= (int)sizeof(path))
                return 0;
        return add_root(r, path, true, false);
}

static int add_usual(struct model_roots *r)
{
        const struct {
                const char *env, *below;
        } places[] = {
            {"HF_HUB_CACHE", ""},
            {"HF_HOME", "/hub"},
            {"XDG_CACHE_HOME", "/huggingface/hub"},
            {"HOME", "/.cache/huggingface/hub"},
        };
        int rc = 0;

        for (size_t i = 0; i < ARRAY_LEN(places) && rc == 0; i++)
                rc = add_below(r, getenv(places[i].env), places[i].below);
        return rc;
}

int model_roots_open(const char *const *roots, size_t n, struct model_roots **out)
{
        struct model_roots *r = calloc(1, sizeof(*r));
        const char *env = getenv("DJINN_MODEL_PATH");
        int rc = 0;

        *out = NULL;
        if (!r)
                return err_set(-ENOMEM, "no memory for the model roots");
        for (size_t i = 0; i < n && rc == 0; i++)
                rc = add_root(r, roots[i], false, true);
        if (rc == 0 && env)
                rc = add_env_list(r, env);
        if (rc == 0)
                rc = add_usual(r);
        if (rc < 0) {
                model_roots_close(r);
                return rc;
        }
        *out = r;
        return 0;
}

void model_roots_close(struct model_roots *r)
{
        if (!r)
                return;
        for (size_t i = 0; i < r->n; i++) {
                close(r->roots[i].fd);
                free(r->roots[i].path);
        }
        free(r);
}

/* ---- names ---- */

struct model_id {
        char org[ID_MAX], name[ID_MAX], revision[ID_MAX]; /* "": none */
};

/* One part of a path: [A-Za-z0-9._-], not starting with a dot. */
static bool part_ok(const char *s, size_t len)
{
        if (len == 0 || len >= ID_MAX || s[0] == '.')
                return false;
        for (size_t i = 0; i < len; i++)
                if (!isalnum((unsigned char)s[i]) && !strchr("._-", s[i]))
                        return false;
        return true;
}

static int id_parse(const char *text, struct model_id *id)
{
        const char *at = strchr(text, '@'), *end = at ? at : text + strlen(text);
        const char *slash = memchr(text, '/', (size_t)(end - text)), *name = slash ? slash + 1 : text;

        memset(id, 0, sizeof(*id));
        if ((slash && !part_ok(text, (size_t)(slash - text))) || !part_ok(name, (size_t)(end - name)) ||
            (at && !part_ok(at + 1, strlen(at + 1))))
                return err_set(-EINVAL,
                               "model_id \"%.128s\": expected name or org/name, with @revision if wanted, of "
                               "letters, digits, '.', '_' and '-'; a folder is named by --model-root",
                               text);
        if (slash)
                memcpy(id->org, text, (size_t)(slash - text));
        memcpy(id->name, name, (size_t)(end - name));
        if (at)
                memcpy(id->revision, at + 1, strlen(at + 1));
        return 0;
}

/* ---- looking ---- */

static int open_folder(const struct root *root, const char *path)
{
        return file_open_beneath(root->fd, path, O_PATH | O_DIRECTORY);
}

/* The commit that refs/<revision> names, into commit. */
static int read_ref(const struct root *root, const char *path, char commit[ID_MAX])
{
        char *text;
        size_t len;
        int fd = file_open_beneath(root->fd, path, O_RDONLY);

        if (fd < 0)
                return fd;
        int rc = file_read_fd(fd, path, 4096, &text, &len);

        close(fd);
        if (rc < 0)
                return rc;
        while (len && isspace((unsigned char)text[len - 1]))
                len--;
        if (part_ok(text, len)) {
                memcpy(commit, text, len);
                commit[len] = '\0';
        } else {
                rc = err_set(-EINVAL, "%s/%s: does not hold the name of a revision", root->path, path);
        }
        free(text);
        return rc;
}

static int open_hub(const struct root *root, const struct model_id *id, char *path, size_t path_len)
{
        char base[2 * ID_MAX + 16], ref[3 * ID_MAX + 32], commit[ID_MAX] = "";
        const char *revision = id->revision[0] ? id->revision : "main";

        snprintf(base, sizeof(base), "models--%s%s%s", id->org, id->org[0] ? "--" : "", id->name);
        snprintf(ref, sizeof(ref), "%s/refs/%s", base, revision);
        int rc = read_ref(root, ref, commit);

        /* A revision may be the commit itself. */
        if (rc == -ENOENT && id->revision[0])
                snprintf(commit, sizeof(commit), "%s", id->revision);
        else if (rc < 0)
                return rc;
        snprintf(path, path_len, "%s/snapshots/%s", base, commit);
        return open_folder(root, path);
}

static bool gone(int rc)
{
        return rc == -ENOENT || rc == -ENOTDIR;
}

/* In one root: fd, -ENOENT, or an error that ends the search. path: what was opened, beneath the root. */
static int find_in(const struct root *root, const struct model_id *id, char *path, size_t path_len)
{
        int fd = -ENOENT;

        if (!root->hub_only && !id->revision[0]) {
                if (id->org[0]) {
                        snprintf(path, path_len, "%s/%s", id->org, id->name);
                        fd = open_folder(root, path);
                }
                if (gone(fd)) {
                        snprintf(path, path_len, "%s", id->name);
                        fd = open_folder(root, path);
                }
        }
        if (gone(fd))
                fd = open_hub(root, id, path, path_len);
        return gone(fd) ? -ENOENT : fd;
}

static int not_found(const struct model_roots *r, const char *model_id)
{
        char places[ERR_TEXT_MAX] = "";
        size_t used = 0;

        for (size_t i = 0; i < r->n && used < sizeof(places) - 1; i++)
                used += (size_t)snprintf(places + used, sizeof(places) - used, "%s%s", i ? ", " : "", r->roots[i].path);
        return err_set(-ENOENT, "model %s was not found; looked in: %.700s", model_id,
                       *places ? places : "(no model root is given, and there is no hub cache)");
}

int model_find(struct model_roots *r, const char *model_id, char *path_out, size_t path_len)
{
        char path[4 * ID_MAX + 64];
        struct model_id id;
        int rc = id_parse(model_id, &id);

        if (rc < 0)
                return rc;
        for (size_t i = 0; i < r->n; i++) {
                int fd = find_in(&r->roots[i], &id, path, sizeof(path));

                if (fd == -ENOENT)
                        continue;
                if (fd < 0)
                        return err_trail(fd, "while looking for model %s in %s", model_id, r->roots[i].path);
                if (path_out)
                        snprintf(path_out, path_len, "%s/%s", r->roots[i].path, path);
                return fd;
        }
        return not_found(r, model_id);
}

/* ---- files of a model ---- */

/* snapshots/<commit>/<file> -> ../../blobs/<hash>: exactly this form, and nothing that the blob itself leads to. */
static int open_blob(int dir_fd, const char *name)
{
        static const char form[] = "../../blobs/";
        char link[256];
        ssize_t len = readlinkat(dir_fd, name, link, sizeof(link) - 1);

        if (len < (ssize_t)sizeof(form) || strncmp(link, form, sizeof(form) - 1) != 0)
                return -EXDEV;
        link[len] = '\0';
        const char *blob = link + sizeof(form) - 1;

        if (!part_ok(blob, strlen(blob)))
                return -EXDEV;
        int blobs = openat(dir_fd, "../../blobs", O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);

        if (blobs < 0)
                return -EXDEV;
        int fd = file_open_beneath(blobs, blob, O_RDONLY | O_NOFOLLOW);

        close(blobs);
        return fd;
}

int model_file_open(int dir_fd, const char *name)
{
        int fd = file_open_beneath(dir_fd, name, O_RDONLY);

        if (fd != -EXDEV)
                return fd;
        fd = open_blob(dir_fd, name);
        if (fd == -EXDEV)
                return err_set(-EXDEV, "%s: a link that leads out of the model's folder", name);
        return fd;
}

int model_file_read(int dir_fd, const char *name, size_t max_bytes, char **out, size_t *len)
{
        int fd = model_file_open(dir_fd, name);

        if (fd < 0)
                return fd;
        int rc = file_read_fd(fd, name, max_bytes, out, len);

        close(fd);
        return rc;
}
