/*
 * Weights in device memory, shared by every model and session that asks for the same ones: the same checkpoint or seed,
 * the same recipes, shapes and dtype. Whether a graph is blind makes no difference to its weights. Weights that a
 * client PUTs are its own. None is ever registered for a peer.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "check.h"
#include "err.h"
#include "inside.h"
#include "log.h"

bool srv_is_weight(const struct graph *g, unsigned t)
{
        return g->tensors[t].recipe != GRAPH_NONE;
}

uint64_t srv_weights_bytes(const struct graph *g)
{
        uint64_t sum = 0; /* at most 2^13 tensors of 2^46 bytes */

        for (unsigned t = 0; t < g->h->ntensors; t++)
                sum += srv_is_weight(g, t) ? graph_tensor_bytes(g, t, 1, NULL) : 0;
        return sum;
}

static uint32_t weights_count(const struct graph *g)
{
        uint32_t n = 0;

        for (unsigned t = 0; t < g->h->ntensors; t++)
                n += srv_is_weight(g, t);
        return n;
}

/* ---- identity ---- */

static void identify_tensor(struct digest_stream *d, const struct graph *g, const struct graph_tensor *t)
{
        digest_add(d, t->dims, sizeof(t->dims));
        digest_add(d, &t->dtype, 1);
        digest_add(d, &t->ndim, 1);
        for (unsigned i = t->recipe; i != GRAPH_NONE; i = g->recipes[i].next) {
                struct graph_recipe piece = g->recipes[i];

                piece.next = piece.next == GRAPH_NONE; /* where it stands among the recipes says nothing */
                digest_add(d, &piece, sizeof(piece));
        }
}

static int identify(const struct graph *g, const struct msg_load *load, struct digest *out)
{
        struct digest_stream *d = digest_begin();

        if (!d)
                return err_set(-ENOMEM, "no memory for a digest");
        digest_add(d, &load->weights, sizeof(load->weights));
        if (load->weights == MSG_WEIGHTS_CHECKPOINT) {
                digest_add(d, load->model_id, strlen(load->model_id) + 1);
                digest_add(d, g->h->prefix, sizeof(g->h->prefix));
        } else {
                digest_add(d, &load->seed, sizeof(load->seed));
        }
        for (unsigned t = 0; t < g->h->ntensors; t++) {
                if (srv_is_weight(g, t))
                        identify_tensor(d, g, &g->tensors[t]);
        }
        *out = digest_end(d);
        return 0;
}

/* ---- making ---- */

static int make_tensor(struct server *srv, const struct graph *g, unsigned t, const struct weights_source *src,
                       struct mem_region *out, struct digest_stream *digest)
{
        size_t bytes = graph_tensor_bytes(g, t, 1, NULL);
        void *host;
        int rc = srv->dev->ops->alloc(srv->dev, bytes, out);

        if (rc < 0 || !src)
                return rc;
        host = srv->props.host_memory ? out->addr : malloc(bytes);
        if (!host)
                return err_set(-ENOMEM, "no memory for weight %s", g->tensors[t].name);
        rc = weights_make(g, t, src, host);
        if (rc >= 0)
                digest_add(digest, host, bytes);
        if (rc >= 0 && host != out->addr)
                rc = srv->dev->ops->put(srv->dev, out->addr, host, bytes);
        if (rc >= 0 && host != out->addr)
                rc = srv->dev->ops->sync(srv->dev);
        if (host != out->addr)
                free(host);
        return rc;
}

static int make_all(struct server *srv, const struct graph *g, const struct weights_source *src, struct srv_weights *w)
{
        struct digest_stream *digest = digest_begin();
        uint32_t k = 0;
        int rc = 0;

        if (!digest)
                return err_set(-ENOMEM, "no memory for a digest");
        for (unsigned t = 0; rc >= 0 && t < g->h->ntensors; t++) {
                if (srv_is_weight(g, t))
                        rc = make_tensor(srv, g, t, src, &w->regions[k++], digest);
        }
        w->digest = digest_end(digest);
        return rc;
}

static int from_checkpoint(struct server *srv, const struct graph *g, const struct msg_load *load,
                           struct srv_weights *w)
{
        struct weights_source src = {.kind = WEIGHTS_CHECKPOINT};
        int dir = model_find(srv->roots, load->model_id, NULL, 0);
        int rc = dir;

        if (rc >= 0)
                rc = checkpoint_open(dir, load->model_id, &src.checkpoint);
        if (dir >= 0)
                close(dir);
        if (rc < 0)
                return rc;
        rc = make_all(srv, g, &src, w);
        checkpoint_close(src.checkpoint);
        return rc;
}

static int make_weights(struct server *srv, const struct graph *g, const struct msg_load *load, struct srv_weights *w)
{
        const struct weights_source seeded = {.kind = WEIGHTS_SYNTHETIC, .seed = load->seed};

        if (load->weights == MSG_WEIGHTS_CHECKPOINT)
                return from_checkpoint(srv, g, load, w);
        return make_all(srv, g, load->weights == MSG_WEIGHTS_SEED ? &seeded : NULL, w);
}

static void weights_free(struct server *srv, struct srv_weights *w)
{
        srv_total_refund(srv, w->bytes);
        for (uint32_t i = 0; i < w->n; i++) {
                if (w->regions[i].addr)
                        srv->dev->ops->free(srv->dev, &w->regions[i]);
        }
        free(w->regions);
        free(w);
}

/* The identity is no proof against somebody who looks for two that are alike: what would be read past the end of other
 * weights must not be taken for them. */
static bool fits(const struct srv_weights *w, const struct graph *g)
{
        uint32_t k = 0;

        if (w->n != weights_count(g) || w->bytes != srv_weights_bytes(g))
                return false;
        for (unsigned t = 0; t < g->h->ntensors; t++) {
                if (srv_is_weight(g, t) && w->regions[k++].len < graph_tensor_bytes(g, t, 1, NULL))
                        return false;
        }
        return true;
}

static struct srv_weights *find(struct server *srv, const struct graph *g, struct digest identity)
{
        struct srv_weights *w = srv->weights;

        while (w && !(w->shared && digest_equal(w->identity, identity) && fits(w, g)))
                w = w->next;
        return w;
}

int srv_weights_get(struct server *srv, const struct graph *g, const struct msg_load *load, struct srv_weights **out)
{
        struct srv_weights *w;
        struct digest identity;
        int rc = identify(g, load, &identity);

        if (rc < 0)
                return rc;
        w = load->weights == MSG_WEIGHTS_PUT ? NULL : find(srv, g, identity);
        if (w) {
                w->refs++;
                *out = w;
                return 0;
        }
        w = calloc(1, sizeof(*w));
        if (w)
                w->regions = calloc(weights_count(g) + 1, sizeof(*w->regions));
        if (!w || !w->regions) {
                free(w);
                return err_set(-ENOMEM, "no memory for the weights of %s", g->h->name);
        }
        w->refs = 1;
        w->shared = load->weights != MSG_WEIGHTS_PUT;
        w->identity = identity;
        rc = srv_total_charge(srv, srv_weights_bytes(g), "weights");
        if (rc >= 0) {
                w->bytes = srv_weights_bytes(g);
                w->n = weights_count(g);
                rc = make_weights(srv, g, load, w);
        }
        if (rc < 0) {
                weights_free(srv, w);
                return rc;
        }
        w->next = srv->weights;
        srv->weights = w;
        *out = w;
        return 0;
}

void srv_weights_put(struct server *srv, struct srv_weights *w)
{
        struct srv_weights **p = &srv->weights;

        if (!w || --w->refs > 0)
                return;
        while (*p != w)
                p = &(*p)->next;
        *p = w->next;
        weights_free(srv, w);
}
