/* What the tests of workloads share: configs, folders that go away, safetensors files written by hand. */
#ifndef DJINN_TESTS_WL_FIXTURE_H
#define DJINN_TESTS_WL_FIXTURE_H

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <sys/stat.h>

#include "../base/unit.h"

#include "graph.h"
#include "json.h"
#include "prng.h"

/* Width 8, 2 layers: {"n_embd":8,...} with `extra` (", \"key\": value") at the end. */
static inline json *gpt2_config(const char *extra)
{
        char text[1024];

        snprintf(text, sizeof(text),
                 "{\"model_type\":\"gpt2\",\"n_embd\":8,\"n_layer\":2,\"n_head\":2,\"n_positions\":32,"
                 "\"vocab_size\":11,\"activation_function\":\"gelu_new\"%s}",
                 extra ? extra : "");
        json *j = json_parse(text, strlen(text), "config.json");

        if (!j)
                fail_msg("%s", err_text());
        return j;
}

static inline void must(int rc)
{
        if (rc < 0)
                fail_msg("%d: %s", rc, err_text());
}

static inline char *tmp_dir(char path[64])
{
        strcpy(path, "/tmp/wl-XXXXXX");
        assert_non_null(mkdtemp(path));
        return path;
}

static inline int tmp_remove_one(const char *path, const struct stat *st, int kind, struct FTW *at)
{
        return remove(path);
}

static inline void tmp_gone(const char *path)
{
        nftw(path, tmp_remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

static inline void put_file(const char *dir, const char *name, const void *data, size_t len)
{
        char path[1024];

        assert_true((size_t)snprintf(path, sizeof(path), "%s/%s", dir, name) < sizeof(path));
        FILE *f = fopen(path, "wb");

        assert_non_null(f);
        assert_int_equal(fwrite(data, 1, len, f), len);
        fclose(f);
}

static inline void put_text_file(const char *dir, const char *name, const char *text)
{
        put_file(dir, name, text, strlen(text));
}

static inline void make_dirs(const char *dir, const char *below)
{
        char path[1024];

        assert_true((size_t)snprintf(path, sizeof(path), "%s/%s/", dir, below) < sizeof(path));
        for (char *p = path + strlen(dir) + 1; *p; p++) {
                if (*p != '/')
                        continue;
                *p = '\0';
                if (mkdir(path, 0700) < 0)
                        assert_int_equal(errno, EEXIST);
                *p = '/';
        }
}

static inline int open_dir(const char *path)
{
        int fd = open(path, O_PATH | O_DIRECTORY);

        assert_true(fd >= 0);
        return fd;
}

/* Header of claimed length `claim` (0: its true length), then len bytes of data. */
static inline void put_safetensors(const char *dir, const char *name, const char *header, uint64_t claim,
                                   const void *data, size_t len)
{
        uint64_t n = claim ? claim : strlen(header);
        size_t total = 8 + strlen(header) + len;
        char *all = malloc(total);

        assert_non_null(all);
        memcpy(all, &n, 8);
        memcpy(all + 8, header, strlen(header));
        if (len)
                memcpy(all + 8 + strlen(header), data, len);
        put_file(dir, name, all, total);
        free(all);
}

/* A random edit: flips, overwrites, inserts nothing, keeps the length unless it cuts. */
static inline size_t mutate(struct prng *p, unsigned char *b, size_t len)
{
        static const unsigned char odd[] = {0, 1, 0x7f, 0x80, 0xff, '{', '}', '[', ']', '"', ',', ':', '9', '-', 'e'};
        unsigned edits = 1 + (unsigned)prng_below(p, 4);

        for (unsigned i = 0; i < edits && len; i++) {
                size_t at = prng_below(p, len);

                switch (prng_below(p, 5)) {
                case 0:
                        b[at] ^= (unsigned char)(1u << prng_below(p, 8));
                        break;
                case 1:
                        b[at] = (unsigned char)prng_u64(p);
                        break;
                case 2:
                        b[at] = odd[prng_below(p, sizeof(odd))];
                        break;
                case 3:
                        memmove(b + at, b + prng_below(p, len - (len - at < 8 ? len - at : 8) + 1),
                               len - at < 8 ? len - at : 8);
                        break;
                default:
                        if (prng_below(p, 8) == 0)
                                len = at;
                }
        }
        return len;
}

#endif
