/*
 * fault: wraps another backend and breaks it on purpose, for tests of whatever lies above.
 *
 *   fault+tcp://127.0.0.1:5000?cut_after=100&eagain=20&delay_us=50&seed=7
 *
 *   cut_after=N  after N posts on an endpoint its connection breaks, as if a cable were cut
 *   eagain=P     P percent of the posts are refused with -EAGAIN though there was room
 *   delay_us=N   events are delivered N µs after they came
 *   seed=N       for the percentages; runs with the same seed refuse the same posts
 *
 * Everything else, other parameters among it, goes to the wrapped backend; its counters are passed on. This file
 * allocates on the way of an event: nobody measures over it.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "clock.h"
#include "err.h"
#include "inside.h"

#define PREFIX "fault+"
#define BATCH  16

extern const struct tp_ops tp_fault_ops;

struct fault_params {
        uint64_t cut_after; /* posts; 0: never */
        uint64_t eagain;    /* percent */
        uint64_t delay_us;
        uint64_t seed;
};

static const struct {
        const char *key;
        size_t offset;
        uint64_t max;
} fault_keys[] = {
    {"cut_after", offsetof(struct fault_params, cut_after), UINT64_MAX},
    {"eagain", offsetof(struct fault_params, eagain), 99},
    {"delay_us", offsetof(struct fault_params, delay_us), 10 * 1000 * 1000},
    {"seed", offsetof(struct fault_params, seed), UINT64_MAX},
};

struct fault_mem {
        struct tp_mem base;
        struct tp_mem *inner;
        struct fault_mem *next;
};

struct fault_rmem {
        struct tp_rmem base;
        struct tp_rmem *inner;
        struct fault_rmem *next;
};

struct fault_ep {
        struct tp_ep base;
        struct tp_ep *inner;
        struct fault_params params;
        struct prng prng;
        uint64_t posts, eagain;
        bool cut;
        struct fault_mem *mems;
        struct fault_rmem *rmems;
        struct fault_ep *next;
};

struct fault_listener {
        struct tp_listener base;
        struct tp_listener *inner;
        struct fault_params params;
        struct fault_listener *next;
};

struct late_event {
        uint64_t due_ns;
        struct tp_event ev;
};

struct fault_ctx {
        struct tp_ctx base;
        struct tp_ctx *inner;
        struct fault_ep *eps;
        struct fault_listener *listeners;
        struct late_event *late; /* in the order in which they came */
        size_t n_late, cap_late;
};

static struct fault_ep *ep_of(const struct tp_ep *ep)
{
        return container_of(ep, struct fault_ep, base);
}

static struct fault_ctx *ctx_of(const struct tp_ctx *ctx)
{
        return container_of(ctx, struct fault_ctx, base);
}

/* ---- parameters ---- */

static int parse_number(const char *url, const char *key, const char *text, uint64_t max, uint64_t *out)
{
        char *end;

        errno = 0;
        *out = strtoull(text, &end, 10);
        if (errno != 0 || end == text || *end != '\0' || text[0] == '-' || *out > max)
                return err_set(-EINVAL, "%s: %s=%s, expected a number up to %llu", url, key, text,
                               (unsigned long long)max);
        return 0;
}

static bool is_fault_key(const char *p, size_t len)
{
        for (size_t i = 0; i < ARRAY_LEN(fault_keys); i++)
                if (strlen(fault_keys[i].key) == len && !memcmp(p, fault_keys[i].key, len))
                        return true;
        return false;
}

/* What is left of the URL for the wrapped backend: no prefix, none of our parameters. */
static void strip(const char *url, char *out)
{
        const char *query;
        char sep = '?';
        size_t n;

        url += strncmp(url, PREFIX, strlen(PREFIX)) ? 0 : strlen(PREFIX);
        query = strchr(url, '?');
        n = query ? (size_t)(query - url) : strlen(url);
        memcpy(out, url, n);
        for (const char *p = query ? query + 1 : ""; *p;) {
                size_t len = strcspn(p, "&");

                if (!is_fault_key(p, strcspn(p, "=&"))) {
                        out[n++] = sep;
                        memcpy(out + n, p, len);
                        n += len;
                        sep = '&';
                }
                p += len + (p[len] == '&');
        }
        out[n] = '\0';
}

/* inner: TP_URL_MAX bytes. */
static int parse_params(const char *url, struct fault_params *out, char *inner)
{
        struct tp_url u;
        char value[32];
        int rc;

        memset(out, 0, sizeof(*out));
        if (strlen(url) >= TP_URL_MAX)
                return err_set(-EINVAL, "URL of %zu characters, at most %d are allowed", strlen(url), TP_URL_MAX - 1);
        strip(url, inner);
        if (!strstr(url, "://")) /* a scheme alone, from tp_open */
                return 0;
        rc = tp_url_parse(url, &u);
        for (size_t i = 0; rc == 0 && i < ARRAY_LEN(fault_keys); i++)
                if (tp_url_param(&u, fault_keys[i].key, value, sizeof(value)))
                        rc = parse_number(url, fault_keys[i].key, value, fault_keys[i].max,
                                          (uint64_t *)((char *)out + fault_keys[i].offset));
        return rc;
}

/* ---- context and listeners ---- */

static const char *fault_unavailable(void)
{
        return NULL;
}

static int fault_open(const char *url, const struct tp_open_opts *opts, struct tp_ctx **out)
{
        struct fault_ctx *c;
        struct fault_params params;
        char inner[TP_URL_MAX];
        int rc = parse_params(url, &params, inner);

        if (rc < 0)
                return rc;
        if (strncmp(url, PREFIX, strlen(PREFIX)) != 0 || !strncmp(inner, PREFIX, strlen(PREFIX)))
                return err_set(-EINVAL, "%s: fault wraps one other transport: fault+tcp://host:port", url);
        c = calloc(1, sizeof(*c));
        if (!c)
                return err_set(-ENOMEM, "%s: no memory for a context", url);
        rc = tp_open(inner, opts, &c->inner);
        if (rc < 0) {
                free(c);
                return rc;
        }
        c->base.ops = &tp_fault_ops;
        *out = &c->base;
        return 0;
}

static int fault_listen(struct tp_ctx *ctx, const char *url, struct tp_listener **out)
{
        struct fault_ctx *c = ctx_of(ctx);
        struct fault_listener *l = calloc(1, sizeof(*l));
        const char *query = strchr(url, '?');
        char inner[TP_URL_MAX];
        int rc;

        if (!l)
                return err_set(-ENOMEM, "%s: no memory for a listener", url);
        rc = parse_params(url, &l->params, inner);
        if (rc == 0)
                rc = tp_listen(c->inner, inner, &l->inner);
        if (rc < 0) {
                free(l);
                return rc;
        }
        l->base.ops = &tp_fault_ops;
        l->base.ctx = ctx;
        snprintf(l->base.url, sizeof(l->base.url), PREFIX "%.*s%s", (int)strcspn(l->inner->url, "?"), l->inner->url,
                 query ? query : "");
        l->next = c->listeners;
        c->listeners = l;
        *out = &l->base;
        return 0;
}

static void fault_listener_close(struct tp_listener *tl)
{
        struct fault_listener *l = container_of(tl, struct fault_listener, base), **p;

        for (p = &ctx_of(tl->ctx)->listeners; *p != l; p = &(*p)->next)
                ;
        *p = l->next;
        tp_listener_close(l->inner);
        free(l);
}

/* ---- endpoints ---- */

static void sync_counters(struct fault_ep *e)
{
        e->base.n = e->inner->n;
        e->base.n.eagain += e->eagain;
}

/* Takes the inner endpoint over, also when it fails. */
static int wrap(struct fault_ctx *c, struct tp_ep *inner, const struct fault_params *params, struct tp_ep **out)
{
        struct fault_ep *e = calloc(1, sizeof(*e));

        if (!e) {
                tp_ep_close(inner);
                return err_set(-ENOMEM, "fault: no memory for an endpoint");
        }
        e->base.ops = &tp_fault_ops;
        e->base.ctx = &c->base;
        snprintf(e->base.peer, sizeof(e->base.peer), PREFIX "%.240s", inner->peer);
        e->inner = inner;
        e->params = *params;
        prng_seed(&e->prng, params->seed);
        inner->user = e;
        e->next = c->eps;
        c->eps = e;
        sync_counters(e);
        *out = &e->base;
        return 0;
}

static int fault_accept(struct tp_listener *tl, struct tp_ep **out)
{
        struct fault_listener *l = container_of(tl, struct fault_listener, base);
        struct tp_ep *inner;
        int rc = tp_accept(l->inner, &inner);

        return rc < 0 ? rc : wrap(ctx_of(tl->ctx), inner, &l->params, out);
}

static int fault_connect(struct tp_ctx *ctx, const char *url, uint64_t deadline_ns, struct tp_ep **out)
{
        struct fault_params params;
        char inner_url[TP_URL_MAX];
        struct tp_ep *inner;
        int rc = parse_params(url, &params, inner_url);

        if (rc == 0)
                rc = tp_connect(ctx_of(ctx)->inner, inner_url, deadline_ns, &inner);
        return rc < 0 ? rc : wrap(ctx_of(ctx), inner, &params, out);
}

static void drop_late(struct fault_ctx *c, const struct tp_ep *ep)
{
        size_t kept = 0;

        for (size_t i = 0; i < c->n_late; i++)
                if (c->late[i].ev.ep != ep)
                        c->late[kept++] = c->late[i];
        c->n_late = kept;
}

static void fault_ep_close(struct tp_ep *ep)
{
        struct fault_ctx *c = ctx_of(ep->ctx);
        struct fault_ep *e = ep_of(ep), **p;
        struct fault_rmem *rm;
        struct fault_mem *m;

        drop_late(c, ep);
        while ((m = e->mems)) {
                e->mems = m->next;
                free(m);
        }
        while ((rm = e->rmems)) {
                e->rmems = rm->next;
                free(rm);
        }
        tp_ep_close(e->inner);
        for (p = &c->eps; *p != e; p = &(*p)->next)
                ;
        *p = e->next;
        free(e);
}

static void fault_close(struct tp_ctx *ctx)
{
        struct fault_ctx *c = ctx_of(ctx);

        while (c->eps)
                fault_ep_close(&c->eps->base);
        while (c->listeners)
                fault_listener_close(&c->listeners->base);
        tp_close(c->inner);
        free(c->late);
        free(c);
}

static void fault_attr(const struct tp_ep *ep, struct tp_attr *out)
{
        tp_attr(ep_of(ep)->inner, out);
}

static void fault_sever(struct tp_ep *ep)
{
        struct fault_ep *e = ep_of(ep);

        e->cut = true;
        e->inner->ops->sever(e->inner);
}

/* ---- memory ---- */

static int add_mem(struct fault_ep *e, int rc, struct tp_mem *inner, struct tp_mem **out)
{
        struct fault_mem *m;

        if (rc < 0)
                return rc;
        m = calloc(1, sizeof(*m));
        if (!m) {
                tp_free(inner);
                return err_set(-ENOMEM, "%s: no memory to register memory", e->base.peer);
        }
        m->base = *inner;
        m->base.ep = &e->base;
        m->inner = inner;
        m->next = e->mems;
        e->mems = m;
        *out = &m->base;
        return 0;
}

static int fault_alloc(struct tp_ep *ep, size_t len, struct tp_mem **out)
{
        struct tp_mem *inner = NULL;
        int rc = tp_alloc(ep_of(ep)->inner, len, &inner);

        return add_mem(ep_of(ep), rc, inner, out);
}

static int fault_reg(struct tp_ep *ep, const struct mem_region *region, struct tp_mem **out)
{
        struct tp_mem *inner = NULL;
        int rc = tp_reg(ep_of(ep)->inner, region, &inner);

        return add_mem(ep_of(ep), rc, inner, out);
}

static void fault_free(struct tp_mem *mem)
{
        struct fault_mem *m = container_of(mem, struct fault_mem, base), **p;

        for (p = &ep_of(mem->ep)->mems; *p != m; p = &(*p)->next)
                ;
        *p = m->next;
        tp_free(m->inner);
        free(m);
}

static int fault_export_key(struct tp_mem *mem, size_t off, size_t len, struct tp_key *out)
{
        return tp_export_key(container_of(mem, struct fault_mem, base)->inner, off, len, out);
}

static int fault_import_key(struct tp_ep *ep, const struct tp_key *key, uint64_t deadline_ns, struct tp_rmem **out)
{
        struct fault_ep *e = ep_of(ep);
        struct fault_rmem *rm;
        struct tp_rmem *inner;
        int rc = tp_import_key(e->inner, key, deadline_ns, &inner);

        if (rc < 0)
                return rc;
        rm = calloc(1, sizeof(*rm));
        if (!rm) {
                tp_rmem_free(inner);
                return err_set(-ENOMEM, "%s: no memory to import a key", ep->peer);
        }
        rm->base.ep = ep;
        rm->base.len = inner->len;
        rm->inner = inner;
        rm->next = e->rmems;
        e->rmems = rm;
        *out = &rm->base;
        return 0;
}

static void fault_rmem_free(struct tp_rmem *rmem)
{
        struct fault_rmem *rm = container_of(rmem, struct fault_rmem, base), **p;

        for (p = &ep_of(rmem->ep)->rmems; *p != rm; p = &(*p)->next)
                ;
        *p = rm->next;
        tp_rmem_free(rm->inner);
        free(rm);
}

/* ---- events ---- */

static int enqueue(struct fault_ctx *c, const struct tp_event *ev, uint64_t due_ns)
{
        if (c->n_late == c->cap_late) {
                size_t cap = c->cap_late ? 2 * c->cap_late : 64;
                struct late_event *v = realloc(c->late, cap * sizeof(*v));

                if (!v)
                        return -ENOMEM;
                c->late = v;
                c->cap_late = cap;
        }
        c->late[c->n_late++] = (struct late_event){due_ns, *ev};
        return 0;
}

/* Everything the wrapped context has, with our endpoints in it and the time at which it is due. */
static int collect(struct fault_ctx *c)
{
        struct tp_event ev[BATCH];
        int n = tp_poll(c->inner, ev, BATCH);

        for (int i = 0; i < n; i++) {
                struct fault_ep *e = ev[i].ep->user;

                sync_counters(e);
                ev[i].ep = &e->base;
                if (enqueue(c, &ev[i], clock_ns() + e->params.delay_us * NS_PER_US) < 0)
                        return err_set(-ENOMEM, "%s: no memory to delay an event", e->base.peer);
        }
        return n;
}

static int fault_poll(struct tp_ctx *ctx, struct tp_event *ev, int max)
{
        struct fault_ctx *c = ctx_of(ctx);
        int rc = collect(c), n = 0;
        uint64_t now;

        if (rc < 0)
                return rc;
        now = c->n_late > 0 ? clock_ns() : 0;
        while (n < max && (size_t)n < c->n_late && c->late[n].due_ns <= now) {
                ev[n] = c->late[n].ev;
                n++;
        }
        if (n == 0) /* c->late may be NULL */
                return 0;
        c->n_late -= (size_t)n;
        memmove(c->late, c->late + n, c->n_late * sizeof(*c->late));
        return n;
}

static int fault_fd(struct tp_ctx *ctx)
{
        return tp_fd(ctx_of(ctx)->inner);
}

static int fault_arm(struct tp_ctx *ctx)
{
        struct fault_ctx *c = ctx_of(ctx);
        int rc = c->n_late > 0 ? -EAGAIN : tp_arm(c->inner);

        for (struct fault_ep *e = c->eps; e && rc == 0; e = e->next)
                sync_counters(e);
        return rc;
}

static void fault_disarm(struct tp_ctx *ctx)
{
        tp_disarm(ctx_of(ctx)->inner);
}

/* ---- posts ---- */

/* Whether fate lets this post through: 0, -EAGAIN, or -ENOTCONN after the cut. */
static int fate(struct fault_ep *e)
{
        if (e->cut)
                return err_set(-ENOTCONN, "%s: the connection was cut after %llu posts", e->base.peer,
                               (unsigned long long)e->posts);
        if (e->params.eagain > 0 && prng_below(&e->prng, 100) < e->params.eagain) {
                e->eagain++;
                sync_counters(e);
                return -EAGAIN;
        }
        return 0;
}

static int posted(struct fault_ep *e, int rc)
{
        sync_counters(e);
        if (rc >= 0 && ++e->posts == e->params.cut_after)
                fault_sever(&e->base);
        return rc;
}

static struct tp_mem *mem_of(struct tp_mem *mem)
{
        return mem ? container_of(mem, struct fault_mem, base)->inner : NULL;
}

static struct tp_rmem *rmem_of(struct tp_rmem *rmem)
{
        return container_of(rmem, struct fault_rmem, base)->inner;
}

static int fault_send(struct tp_ep *ep, const void *buf, size_t len, unsigned flags, uint64_t cookie)
{
        struct fault_ep *e = ep_of(ep);
        int rc = fate(e);

        return rc < 0 ? rc : posted(e, tp_send(e->inner, buf, len, flags, cookie));
}

static void fault_release(struct tp_ep *ep, uint64_t loan)
{
        tp_release(ep_of(ep)->inner, loan);
}

static int fault_write(struct tp_ep *ep, struct tp_mem *mem, const void *src, size_t len, struct tp_rmem *rmem,
                       uint64_t roff, unsigned flags, uint64_t cookie)
{
        struct fault_ep *e = ep_of(ep);
        int rc = fate(e);

        return rc < 0 ? rc : posted(e, tp_write(e->inner, mem_of(mem), src, len, rmem_of(rmem), roff, flags, cookie));
}

static int fault_write_imm(struct tp_ep *ep, struct tp_mem *mem, const void *src, size_t len, struct tp_rmem *rmem,
                           uint64_t roff, uint32_t imm, unsigned flags, uint64_t cookie)
{
        struct fault_ep *e = ep_of(ep);
        int rc = fate(e);

        return rc < 0
                   ? rc
                   : posted(e, tp_write_imm(e->inner, mem_of(mem), src, len, rmem_of(rmem), roff, imm, flags, cookie));
}

static int fault_read(struct tp_ep *ep, struct tp_mem *mem, void *dst, size_t len, struct tp_rmem *rmem, uint64_t roff,
                      unsigned flags, uint64_t cookie)
{
        struct fault_ep *e = ep_of(ep);
        int rc = fate(e);

        return rc < 0 ? rc : posted(e, tp_read(e->inner, mem_of(mem), dst, len, rmem_of(rmem), roff, flags, cookie));
}

static int fault_cancel(struct tp_ep *ep, uint64_t cookie)
{
        return tp_cancel(ep_of(ep)->inner, cookie);
}

const struct tp_ops tp_fault_ops = {
    .name = "fault",
    .unavailable = fault_unavailable,
    .open = fault_open,
    .close = fault_close,
    .listen = fault_listen,
    .listener_close = fault_listener_close,
    .accept = fault_accept,
    .connect = fault_connect,
    .ep_close = fault_ep_close,
    .attr = fault_attr,
    .alloc = fault_alloc,
    .reg = fault_reg,
    .free = fault_free,
    .export_key = fault_export_key,
    .import_key = fault_import_key,
    .rmem_free = fault_rmem_free,
    .poll = fault_poll,
    .fd = fault_fd,
    .arm = fault_arm,
    .disarm = fault_disarm,
    .send = fault_send,
    .release = fault_release,
    .write = fault_write,
    .write_imm = fault_write_imm,
    .read = fault_read,
    .cancel = fault_cancel,
    .sever = fault_sever,
};
