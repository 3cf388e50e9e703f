/* What the tests of client/ share: models built from a few numbers, configs written to a file. */
#ifndef DJINN_TESTS_CLIENT_FIXTURE_H
#define DJINN_TESTS_CLIENT_FIXTURE_H

#include <errno.h>

#include "../base/unit.h"

#include "check.h"
#include "graph.h"
#include "json.h"
#include "workload.h"

static inline void must(int rc)
{
        if (rc < 0)
                fail_msg("%d: %s", rc, err_text());
}

struct gpt2_shape {
        int width, layers, heads, positions, vocab;
};

/* sshleifer/tiny-gpt2 and the fixture gpt2-micro, as far as shapes go. */
static const struct gpt2_shape tiny_gpt2 = {2, 2, 2, 1024, 50257}, gpt2_micro = {64, 3, 4, 128, 512};

static inline struct graph gpt2_graph(const struct gpt2_shape *s, uint32_t batch, uint32_t context, enum op_dtype dtype)
{
        struct graph g;
        char text[512];
        json *config;

        snprintf(text, sizeof(text),
                 "{\"model_type\":\"gpt2\",\"n_embd\":%d,\"n_layer\":%d,\"n_head\":%d,\"n_positions\":%d,"
                 "\"vocab_size\":%d,\"activation_function\":\"gelu_new\"}",
                 s->width, s->layers, s->heads, s->positions, s->vocab);
        config = json_parse(text, strlen(text), "config.json");
        assert_non_null(config);
        must(gpt2_build(config, batch, context, context, dtype, &g));
        json_free(config);
        return g;
}

static inline struct graph blind_of(const struct graph *g)
{
        struct graph blind;

        must(graph_clone(g, &blind));
        graph_blind(&blind);
        return blind;
}

/* A file that holds `text`; the path is written over `path`, which ends in XXXXXX. */
static inline void write_temp(char *path, const char *text)
{
        int fd = mkstemp(path);

        assert_true(fd >= 0);
        assert_int_equal(write(fd, text, strlen(text)), strlen(text));
        close(fd);
}

#endif
