/*
 * loop: both ends in one process, in one context or in two contexts of two threads. The reference for the other
 * backends: a reader who wants to know what the contract means reads this file.
 *
 * A connection holds two rings of messages, one per direction, each with one producer and one consumer. Order: a write
 * is a memcpy into the peer's memory that is finished when the post returns; a message is published by a store to the
 * ring's tail afterwards, and the receiver loads the tail before it reads anything. So what was written before a message
 * is visible when the message is.
 *
 * The mutex guards names, backlogs and tables of regions: set-up only.
 */
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"
#include "clock.h"
#include "err.h"
#include "inside.h"

#define LOOP_SLOTS     64u
#define LOOP_MSG_MAX   65536u
#define LOOP_BACKLOG   128u
#define LOOP_KEY_MAGIC 0x706f6f6c6b6579ull
#define REGION_DEAD    1u

extern const struct tp_ops tp_loop_ops;

struct loop_slot {
        size_t len;
        uint32_t imm;
        bool is_imm;
};

struct loop_ring {
        _Alignas(CACHE_LINE) atomic_uint_least64_t tail; /* the producer's: messages published */
        _Alignas(CACHE_LINE) atomic_uint_least64_t head; /* the consumer's: messages released, in order */
        _Alignas(CACHE_LINE) struct loop_slot slots[LOOP_SLOTS];
        unsigned char *data; /* LOOP_SLOTS * LOOP_MSG_MAX */
};

/* How one context wakes another; it lives until the last connection that could use it has gone. */
struct loop_waker {
        atomic_uint refs;
        atomic_bool armed;
        int efd;
};

/* Memory that a key may open. The owner's tp_mem and each tp_rmem hold a reference; `use` counts the copies that run
 * right now in steps of two, and its lowest bit says that the owner has taken the memory back. */
struct loop_region {
        struct loop_region *next;
        atomic_uint refs, use;
        uint64_t slot;
        unsigned side;
        bool owned;
        struct mem_region mem;
};

struct loop_conn {
        atomic_uint refs;
        uint64_t secret;
        struct loop_ring ring[2]; /* [side that sends] */
        atomic_bool closed[2];
        atomic_bool severed;
        struct loop_waker *waker[2];
        struct loop_region *regions; /* under loop_lock */
        uint64_t next_slot;
        struct loop_conn *next_pending;
};

struct loop_mem {
        struct tp_mem base;
        struct loop_region *region;
        struct loop_mem *next;
};

struct loop_rmem {
        struct tp_rmem base;
        struct loop_region *region;
        uint64_t off;
        struct loop_rmem *next;
};

struct loop_ep {
        struct tp_ep base;
        struct loop_conn *conn;
        unsigned side;
        uint64_t tx_tail, tx_head; /* tx_head: as last seen */
        uint64_t rx_next, rx_head;
        bool held[LOOP_SLOTS];
        bool down;
        struct loop_mem *mems;
        struct loop_rmem *rmems;
};

struct loop_listener {
        struct tp_listener base;
        char name[TP_URL_MAX];
        struct loop_conn *pending_first, *pending_last;
        atomic_uint pending;
        struct loop_listener *next;     /* in the process, under loop_lock */
        struct loop_listener *next_ctx; /* in the context */
};

struct loop_ctx {
        struct tp_ctx base;
        struct loop_waker *waker;
        struct loop_ep **eps;
        unsigned n_eps, cap_eps, first;
        struct loop_listener *listeners;
};

static pthread_mutex_t loop_lock = PTHREAD_MUTEX_INITIALIZER;
static struct loop_listener *loop_names;

/* ---- waking ---- */

static struct loop_waker *waker_new(void)
{
        struct loop_waker *w = calloc(1, sizeof(*w));

        if (!w)
                return NULL;
        atomic_init(&w->refs, 1);
        w->efd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        if (w->efd < 0) {
                free(w);
                return NULL;
        }
        return w;
}

static struct loop_waker *waker_get(struct loop_waker *w)
{
        atomic_fetch_add(&w->refs, 1);
        return w;
}

static void waker_put(struct loop_waker *w)
{
        if (w && atomic_fetch_sub(&w->refs, 1) == 1) {
                close(w->efd);
                free(w);
        }
}

/* Call after a sequentially consistent store of what the sleeper should see: it stores `armed` in that order too and
 * then looks again, so one of the two sees the other. */
static void waker_wake(struct loop_waker *w)
{
        const uint64_t one = 1;

        if (atomic_load(&w->armed) && atomic_exchange(&w->armed, false))
                (void)!write(w->efd, &one, sizeof(one));
}

/* ---- connections ---- */

static void conn_put(struct loop_conn *c)
{
        if (atomic_fetch_sub(&c->refs, 1) != 1)
                return;
        BUG_ON(c->regions != NULL);
        for (int i = 0; i < 2; i++) {
                munmap(c->ring[i].data, (size_t)LOOP_SLOTS * LOOP_MSG_MAX);
                waker_put(c->waker[i]);
        }
        free(c);
}

static struct loop_conn *conn_new(struct loop_waker *connector, struct loop_waker *acceptor)
{
        const size_t bytes = (size_t)LOOP_SLOTS * LOOP_MSG_MAX;
        struct loop_conn *c = aligned_alloc(CACHE_LINE, ALIGN_UP(sizeof(*c), (size_t)CACHE_LINE));
        void *data[2];

        if (!c)
                return NULL;
        memset(c, 0, sizeof(*c));
        for (int i = 0; i < 2; i++)
                data[i] = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (data[0] == MAP_FAILED || data[1] == MAP_FAILED) {
                for (int i = 0; i < 2; i++)
                        if (data[i] != MAP_FAILED)
                                munmap(data[i], bytes);
                free(c);
                return NULL;
        }
        c->ring[0].data = data[0];
        c->ring[1].data = data[1];
        atomic_init(&c->refs, 2);
        c->secret = tpi_random();
        c->waker[0] = waker_get(connector);
        c->waker[1] = waker_get(acceptor);
        return c;
}

/* One side has gone; the other finds out at its next poll. */
static void conn_close_side(struct loop_conn *c, unsigned side)
{
        atomic_store(&c->closed[side], true);
        waker_wake(c->waker[!side]);
        conn_put(c);
}

static struct loop_ep *ep_new(struct loop_ctx *ctx, struct loop_conn *conn, unsigned side, const char *peer)
{
        struct loop_ep *e;

        if (ctx->n_eps == ctx->cap_eps) {
                unsigned cap = ctx->cap_eps ? 2 * ctx->cap_eps : 8;
                struct loop_ep **v = realloc(ctx->eps, cap * sizeof(struct loop_ep *));

                if (!v)
                        return NULL;
                ctx->eps = v;
                ctx->cap_eps = cap;
        }
        e = calloc(1, sizeof(*e));
        if (!e)
                return NULL;
        e->base.ops = &tp_loop_ops;
        e->base.ctx = &ctx->base;
        e->conn = conn;
        e->side = side;
        snprintf(e->base.peer, sizeof(e->base.peer), "%s", peer);
        ctx->eps[ctx->n_eps++] = e;
        return e;
}

/* ---- context, listeners ---- */

static const char *loop_unavailable(void)
{
        return NULL;
}

static int loop_open(const char *url, const struct tp_open_opts *opts, struct tp_ctx **out)
{
        struct loop_ctx *c = calloc(1, sizeof(*c));

        if (!c)
                return err_set(-ENOMEM, "loop: no memory for a context");
        c->waker = waker_new();
        if (!c->waker) {
                free(c);
                return err_set(-EMFILE, "loop: no descriptor for waking");
        }
        c->base.ops = &tp_loop_ops;
        *out = &c->base;
        return 0;
}

static void loop_ep_close(struct tp_ep *ep);
static void loop_listener_close(struct tp_listener *l);

static void loop_close(struct tp_ctx *ctx)
{
        struct loop_ctx *c = container_of(ctx, struct loop_ctx, base);

        while (c->n_eps > 0)
                loop_ep_close(&c->eps[c->n_eps - 1]->base);
        while (c->listeners)
                loop_listener_close(&c->listeners->base);
        waker_put(c->waker);
        free(c->eps);
        free(c);
}

static struct loop_listener *find_name(const char *name)
{
        struct loop_listener *l = loop_names;

        while (l && strcmp(l->name, name) != 0)
                l = l->next;
        return l;
}

static int loop_listen(struct tp_ctx *ctx, const char *url, struct tp_listener **out)
{
        struct loop_ctx *c = container_of(ctx, struct loop_ctx, base);
        struct loop_listener *l;
        struct tp_url u;
        bool taken;
        int rc = tpi_url_expect(url, "loop", &u);

        if (rc < 0)
                return rc;
        l = calloc(1, sizeof(*l));
        if (!l)
                return err_set(-ENOMEM, "%s: no memory for a listener", url);
        l->base.ops = &tp_loop_ops;
        l->base.ctx = ctx;
        snprintf(l->base.url, sizeof(l->base.url), "%s", url);
        strcpy(l->name, u.host);
        pthread_mutex_lock(&loop_lock);
        taken = find_name(l->name) != NULL;
        if (!taken) {
                l->next = loop_names;
                loop_names = l;
        }
        pthread_mutex_unlock(&loop_lock);
        if (taken) {
                free(l);
                return err_set(-EADDRINUSE, "%s: this name is already listened on", url);
        }
        l->next_ctx = c->listeners;
        c->listeners = l;
        *out = &l->base;
        return 0;
}

static void unlink_listener(struct loop_listener *l)
{
        struct loop_ctx *c = container_of(l->base.ctx, struct loop_ctx, base);
        struct loop_listener **p;

        for (p = &c->listeners; *p != l; p = &(*p)->next_ctx)
                ;
        *p = l->next_ctx;
        pthread_mutex_lock(&loop_lock);
        for (p = &loop_names; *p != l; p = &(*p)->next)
                ;
        *p = l->next;
        pthread_mutex_unlock(&loop_lock);
}

static void loop_listener_close(struct tp_listener *tl)
{
        struct loop_listener *l = container_of(tl, struct loop_listener, base);

        unlink_listener(l);
        while (l->pending_first) { /* nobody can add any more */
                struct loop_conn *conn = l->pending_first;

                l->pending_first = conn->next_pending;
                conn_close_side(conn, 1);
        }
        free(l);
}

static struct loop_conn *pop_pending(struct loop_listener *l)
{
        struct loop_conn *conn;

        pthread_mutex_lock(&loop_lock);
        conn = l->pending_first;
        if (conn) {
                l->pending_first = conn->next_pending;
                if (!l->pending_first)
                        l->pending_last = NULL;
                atomic_fetch_sub(&l->pending, 1);
        }
        pthread_mutex_unlock(&loop_lock);
        return conn;
}

static int loop_accept(struct tp_listener *tl, struct tp_ep **out)
{
        struct loop_listener *l = container_of(tl, struct loop_listener, base);
        struct loop_conn *conn;
        struct loop_ep *e;

        if (atomic_load(&l->pending) == 0)
                return -EAGAIN;
        conn = pop_pending(l);
        if (!conn)
                return -EAGAIN;
        e = ep_new(container_of(tl->ctx, struct loop_ctx, base), conn, 1, tl->url);
        if (!e) {
                conn_close_side(conn, 1);
                return err_set(-ENOMEM, "%s: no memory for an endpoint", tl->url);
        }
        *out = &e->base;
        return 0;
}

/* Puts a new connection into the backlog of the listener of that name. */
static int queue_on(const char *url, const char *name, struct loop_waker *w, struct loop_conn **out)
{
        struct loop_listener *l;
        struct loop_conn *conn = NULL;
        int rc = 0;

        pthread_mutex_lock(&loop_lock);
        l = find_name(name);
        if (!l) {
                rc = err_set(-ECONNREFUSED, "%s: connect: nothing in this process listens on that name", url);
        } else if (atomic_load(&l->pending) >= LOOP_BACKLOG) {
                rc = -EAGAIN;
        } else {
                conn = conn_new(w, container_of(l->base.ctx, struct loop_ctx, base)->waker);
                if (!conn)
                        rc = err_set(-ENOMEM, "%s: no memory for a connection", url);
        }
        if (conn) {
                *(l->pending_last ? &l->pending_last->next_pending : &l->pending_first) = conn;
                l->pending_last = conn;
                atomic_fetch_add(&l->pending, 1);
                waker_wake(conn->waker[1]);
        }
        pthread_mutex_unlock(&loop_lock);
        *out = conn;
        return rc;
}

static int loop_connect(struct tp_ctx *ctx, const char *url, uint64_t deadline_ns, struct tp_ep **out)
{
        struct loop_ctx *c = container_of(ctx, struct loop_ctx, base);
        struct loop_conn *conn;
        struct loop_ep *e;
        struct tp_url u;
        int rc = tpi_url_expect(url, "loop", &u);

        if (rc < 0)
                return rc;
        while ((rc = queue_on(url, u.host, c->waker, &conn)) == -EAGAIN) {
                if (clock_ns() >= deadline_ns)
                        return err_set(-ETIMEDOUT, "%s: connect: the listener's backlog stayed full", url);
                usleep(100);
        }
        if (rc < 0)
                return rc;
        e = ep_new(c, conn, 0, url);
        if (!e) {
                conn_close_side(conn, 0);
                return err_set(-ENOMEM, "%s: no memory for an endpoint", url);
        }
        *out = &e->base;
        return 0;
}

static void loop_free(struct tp_mem *mem);
static void loop_rmem_free(struct tp_rmem *rmem);

static void loop_ep_close(struct tp_ep *ep)
{
        struct loop_ep *e = container_of(ep, struct loop_ep, base);
        struct loop_ctx *c = container_of(ep->ctx, struct loop_ctx, base);
        unsigned i = 0;

        while (e->mems)
                loop_free(&e->mems->base);
        while (e->rmems)
                loop_rmem_free(&e->rmems->base);
        while (c->eps[i] != e)
                i++;
        c->eps[i] = c->eps[--c->n_eps];
        conn_close_side(e->conn, e->side);
        free(e);
}

static void loop_attr(const struct tp_ep *ep, struct tp_attr *out)
{
        *out = (struct tp_attr){.name = "loop",
                                .msg_max = LOOP_MSG_MAX,
                                .rdma_max = SIZE_MAX,
                                .one_sided = true,
                                .expected_latency_ns = 200,
                                .expected_bytes_per_s = 8e9,
                                .tx_depth = LOOP_SLOTS};
}

/* ---- memory ---- */

static void region_put(struct loop_region *r)
{
        if (atomic_fetch_sub(&r->refs, 1) != 1)
                return;
        if (r->owned)
                munmap(r->mem.addr, ALIGN_UP(r->mem.len ? r->mem.len : 1, r->mem.page));
        free(r);
}

/* A copy may run between enter and leave; the owner's free waits for it. */
static bool region_enter(struct loop_region *r)
{
        if (!(atomic_fetch_add(&r->use, 2) & REGION_DEAD))
                return true;
        atomic_fetch_sub(&r->use, 2);
        return false;
}

static void region_leave(struct loop_region *r)
{
        atomic_fetch_sub(&r->use, 2);
}

static int add_region(struct loop_ep *e, const struct mem_region *mem, bool owned, struct tp_mem **out)
{
        struct loop_mem *m = calloc(1, sizeof(*m));
        struct loop_region *r = calloc(1, sizeof(*r));

        if (!m || !r) {
                free(m);
                free(r);
                return err_set(-ENOMEM, "%s: no memory to register memory", e->base.peer);
        }
        atomic_init(&r->refs, 1);
        r->mem = *mem;
        r->owned = owned;
        r->side = e->side;
        pthread_mutex_lock(&loop_lock);
        r->slot = e->conn->next_slot++;
        r->next = e->conn->regions;
        e->conn->regions = r;
        pthread_mutex_unlock(&loop_lock);
        m->base.ep = &e->base;
        m->base.region = *mem;
        m->base.path = "host";
        m->region = r;
        m->next = e->mems;
        e->mems = m;
        *out = &m->base;
        return 0;
}

static int loop_alloc(struct tp_ep *ep, size_t len, struct tp_mem **out)
{
        struct loop_ep *e = container_of(ep, struct loop_ep, base);
        size_t page = (size_t)sysconf(_SC_PAGESIZE), bytes;
        struct mem_region mem;
        void *addr;
        int rc;

        if (!size_add(len ? len : 1, page - 1, &bytes))
                return err_set(-ENOMEM, "%s: alloc of %zu bytes is too large", ep->peer, len);
        bytes &= ~(page - 1);
        addr = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (addr == MAP_FAILED)
                return err_set(-ENOMEM, "%s: alloc of %zu bytes: %s", ep->peer, len, strerror(errno));
        mem = (struct mem_region){.addr = addr,
                                  .len = len,
                                  .kind = MEM_HOST,
                                  .device = -1,
                                  .page = page,
                                  .numa = -1,
                                  .fd = -1,
                                  .ops = &mem_host_ops};
        rc = add_region(e, &mem, true, out);
        if (rc < 0)
                munmap(addr, bytes);
        return rc;
}

static int loop_reg(struct tp_ep *ep, const struct mem_region *region, struct tp_mem **out)
{
        if (region->kind != MEM_HOST)
                return err_set(-ENOTSUP,
                               "%s: the processor moves host memory only; stage device memory through tp_alloc's",
                               ep->peer);
        return add_region(container_of(ep, struct loop_ep, base), region, false, out);
}

static void loop_free(struct tp_mem *mem)
{
        struct loop_mem *m = container_of(mem, struct loop_mem, base);
        struct loop_ep *e = container_of(mem->ep, struct loop_ep, base);
        struct loop_region **rp;
        struct loop_mem **mp;

        for (mp = &e->mems; *mp != m; mp = &(*mp)->next)
                ;
        *mp = m->next;
        pthread_mutex_lock(&loop_lock);
        for (rp = &e->conn->regions; *rp != m->region; rp = &(*rp)->next)
                ;
        *rp = m->region->next;
        pthread_mutex_unlock(&loop_lock);
        atomic_fetch_or(&m->region->use, REGION_DEAD);
        while (atomic_load(&m->region->use) != REGION_DEAD)
                cpu_relax();
        region_put(m->region);
        free(m);
}

static int loop_export_key(struct tp_mem *mem, size_t off, size_t len, struct tp_key *out)
{
        struct loop_mem *m = container_of(mem, struct loop_mem, base);
        struct loop_ep *e = container_of(mem->ep, struct loop_ep, base);
        struct tpi_key k = {LOOP_KEY_MAGIC, e->side, m->region->slot, 0, off, len, tpi_random()};

        if (!tpi_inside(off, len, mem->region.len))
                return err_set(-ERANGE, "%s: key for [%zu, +%zu) of memory of %zu bytes", e->base.peer, off, len,
                               mem->region.len);
        tpi_key_seal(out, &k, e->conn->secret);
        return 0;
}

static struct loop_region *find_region(struct loop_conn *c, unsigned side, uint64_t slot)
{
        struct loop_region *r;

        pthread_mutex_lock(&loop_lock);
        for (r = c->regions; r && (r->side != side || r->slot != slot); r = r->next)
                ;
        if (r)
                atomic_fetch_add(&r->refs, 1);
        pthread_mutex_unlock(&loop_lock);
        return r;
}

static int loop_import_key(struct tp_ep *ep, const struct tp_key *key, uint64_t deadline_ns, struct tp_rmem **out)
{
        struct loop_ep *e = container_of(ep, struct loop_ep, base);
        struct loop_region *r;
        struct loop_rmem *rm;
        struct tpi_key k;
        int rc = tpi_key_open(key, e->conn->secret, LOOP_KEY_MAGIC, !e->side, &k);

        if (rc < 0)
                return rc;
        r = find_region(e->conn, !e->side, k.slot);
        if (!r)
                return err_set(-ESTALE, "%s: memory key: its region was freed", ep->peer);
        rm = calloc(1, sizeof(*rm));
        if (!rm || !tpi_inside(k.off, k.len, r->mem.len)) {
                region_put(r);
                free(rm);
                return rm ? err_set(-EACCES, "%s: memory key: outside its region", ep->peer)
                          : err_set(-ENOMEM, "%s: no memory to import a key", ep->peer);
        }
        rm->base.ep = ep;
        rm->base.len = k.len;
        rm->region = r;
        rm->off = k.off;
        rm->next = e->rmems;
        e->rmems = rm;
        *out = &rm->base;
        return 0;
}

static void loop_rmem_free(struct tp_rmem *rmem)
{
        struct loop_rmem *rm = container_of(rmem, struct loop_rmem, base), **p;
        struct loop_ep *e = container_of(rmem->ep, struct loop_ep, base);

        for (p = &e->rmems; *p != rm; p = &(*p)->next)
                ;
        *p = rm->next;
        region_put(rm->region);
        free(rm);
}

/* ---- hot path ---- */

static bool ep_broken(const struct loop_ep *e)
{
        return atomic_load(&e->conn->closed[!e->side]) || atomic_load(&e->conn->severed);
}

/* Descriptors go out in ring order; the slot's event keeps its loan until released. */
static bool ep_receive(struct loop_ep *e, struct tp_event *ev)
{
        struct loop_ring *r = &e->conn->ring[!e->side];
        const struct loop_slot *s = &r->slots[e->rx_next % LOOP_SLOTS];

        if (atomic_load_explicit(&r->tail, memory_order_acquire) == e->rx_next)
                return false;
        *ev = (struct tp_event){.kind = s->is_imm ? TP_EV_IMM : TP_EV_MSG, .ep = &e->base, .len = s->len};
        e->held[e->rx_next % LOOP_SLOTS] = true;
        ev->cookie = e->rx_next++;
        if (s->is_imm) {
                ev->imm = s->imm;
                tp_release(&e->base, ev->cookie);
                ev->cookie = 0;
                return true;
        }
        ev->data = r->data + (ev->cookie % LOOP_SLOTS) * LOOP_MSG_MAX;
        e->base.n.msgs_rx++;
        e->base.n.msg_bytes_rx += s->len;
        return true;
}

static bool ep_poll(struct loop_ep *e, struct tp_event *ev)
{
        bool broken;

        if (e->down)
                return false;
        broken = ep_broken(e); /* before the ring: what was sent before the end is still delivered */
        if (ep_receive(e, ev))
                return true;
        if (!broken)
                return false;
        e->down = true;
        *ev = (struct tp_event){.kind = TP_EV_DOWN, .ep = &e->base, .status = -ECONNRESET};
        err_set(-ECONNRESET, "%s: the peer closed the connection", e->base.peer);
        return true;
}

static int loop_poll(struct tp_ctx *ctx, struct tp_event *ev, int max)
{
        struct loop_ctx *c = container_of(ctx, struct loop_ctx, base);
        int n = 0;

        for (unsigned i = 0; i < c->n_eps && n < max; i++) {
                struct loop_ep *e = c->eps[(c->first + i) % c->n_eps];

                while (n < max && ep_poll(e, &ev[n]))
                        n++;
        }
        c->first++; /* nobody is always last when max is small */
        return n;
}

static int loop_fd(struct tp_ctx *ctx)
{
        return container_of(ctx, struct loop_ctx, base)->waker->efd;
}

static void loop_disarm(struct tp_ctx *ctx)
{
        struct loop_ctx *c = container_of(ctx, struct loop_ctx, base);
        uint64_t n;

        atomic_store(&c->waker->armed, false);
        (void)!read(c->waker->efd, &n, sizeof(n));
}

static bool something_is_there(const struct loop_ctx *c)
{
        for (const struct loop_listener *l = c->listeners; l; l = l->next_ctx)
                if (atomic_load(&l->pending) > 0)
                        return true;
        for (unsigned i = 0; i < c->n_eps; i++) {
                const struct loop_ep *e = c->eps[i];

                if (!e->down && (atomic_load(&e->conn->ring[!e->side].tail) != e->rx_next || ep_broken(e)))
                        return true;
        }
        return false;
}

static int loop_arm(struct tp_ctx *ctx)
{
        struct loop_ctx *c = container_of(ctx, struct loop_ctx, base);

        atomic_store(&c->waker->armed, true);
        if (something_is_there(c)) {
                loop_disarm(ctx);
                return -EAGAIN;
        }
        for (unsigned i = 0; i < c->n_eps; i++)
                c->eps[i]->base.n.naps++;
        return 0;
}

static int not_connected(const struct loop_ep *e)
{
        return err_set(-ENOTCONN, "%s: the connection is down", e->base.peer);
}

/* 0, or why nothing can be put into the ring now. */
static int ring_ready(struct loop_ep *e)
{
        if (e->down)
                return not_connected(e);
        if (e->tx_tail - e->tx_head < LOOP_SLOTS)
                return 0;
        e->tx_head = atomic_load_explicit(&e->conn->ring[e->side].head, memory_order_acquire);
        if (e->tx_tail - e->tx_head < LOOP_SLOTS)
                return 0;
        e->base.n.eagain++;
        return -EAGAIN;
}

static void ring_publish(struct loop_ep *e, struct loop_slot slot)
{
        struct loop_ring *r = &e->conn->ring[e->side];

        r->slots[e->tx_tail % LOOP_SLOTS] = slot;
        atomic_store(&r->tail, ++e->tx_tail);
        waker_wake(e->conn->waker[!e->side]);
}

static int loop_send(struct tp_ep *ep, const void *buf, size_t len, unsigned flags, uint64_t cookie)
{
        struct loop_ep *e = container_of(ep, struct loop_ep, base);
        int rc;

        if (len > LOOP_MSG_MAX)
                return err_set(-EMSGSIZE, "%s: message of %zu bytes, at most %u", ep->peer, len, LOOP_MSG_MAX);
        rc = ring_ready(e);
        if (rc < 0)
                return rc;
        if (len > 0)
                memcpy(e->conn->ring[e->side].data + (e->tx_tail % LOOP_SLOTS) * LOOP_MSG_MAX, buf, len);
        ring_publish(e, (struct loop_slot){.len = len});
        ep->n.msgs_tx++;
        ep->n.msg_bytes_tx += len;
        return TP_COMPLETE;
}

/* Loans come back in any order; the producer is told of the longest run from the oldest on. */
static void loop_release(struct tp_ep *ep, uint64_t loan)
{
        struct loop_ep *e = container_of(ep, struct loop_ep, base);

        BUG_ON(loan >= e->rx_next || loan < e->rx_head || !e->held[loan % LOOP_SLOTS]);
        e->held[loan % LOOP_SLOTS] = false;
        while (e->rx_head < e->rx_next && !e->held[e->rx_head % LOOP_SLOTS])
                e->rx_head++;
        atomic_store(&e->conn->ring[!e->side].head, e->rx_head);
        waker_wake(e->conn->waker[!e->side]);
}

static int bulk_check(struct loop_ep *e, const struct tp_mem *mem, const void *p, size_t len,
                      const struct tp_rmem *rmem, uint64_t roff)
{
        if (e->down)
                return not_connected(e);
        if (!tpi_inside(roff, len, rmem->len) || !tpi_in_mem(mem, p, len))
                return err_set(-ERANGE, "%s: bulk of %zu bytes at %llu does not fit the key's %llu bytes", e->base.peer,
                               len, (unsigned long long)roff, (unsigned long long)rmem->len);
        return 0;
}

static int region_gone(const struct loop_ep *e)
{
        return err_set(-ESTALE, "%s: the peer has freed the memory of this key", e->base.peer);
}

static int loop_write(struct tp_ep *ep, struct tp_mem *mem, const void *src, size_t len, struct tp_rmem *rmem,
                      uint64_t roff, unsigned flags, uint64_t cookie)
{
        struct loop_ep *e = container_of(ep, struct loop_ep, base);
        struct loop_rmem *rm = container_of(rmem, struct loop_rmem, base);
        int rc = bulk_check(e, mem, src, len, rmem, roff);

        if (rc < 0)
                return rc;
        if (!region_enter(rm->region))
                return region_gone(e);
        rc = tpi_region_put(&rm->region->mem, rm->off + roff, src, len);
        region_leave(rm->region);
        if (rc < 0)
                return err_set(rc, "%s: write: the device's copy failed", ep->peer);
        ep->n.bulk_ops++;
        ep->n.bulk_bytes_tx += len;
        return TP_COMPLETE;
}

static int loop_write_imm(struct tp_ep *ep, struct tp_mem *mem, const void *src, size_t len, struct tp_rmem *rmem,
                          uint64_t roff, uint32_t imm, unsigned flags, uint64_t cookie)
{
        struct loop_ep *e = container_of(ep, struct loop_ep, base);
        int rc = ring_ready(e);

        if (rc < 0)
                return rc;
        rc = loop_write(ep, mem, src, len, rmem, roff, flags, cookie);
        if (rc == TP_COMPLETE)
                ring_publish(e, (struct loop_slot){.len = len, .imm = imm, .is_imm = true});
        return rc;
}

static int loop_read(struct tp_ep *ep, struct tp_mem *mem, void *dst, size_t len, struct tp_rmem *rmem, uint64_t roff,
                     unsigned flags, uint64_t cookie)
{
        struct loop_ep *e = container_of(ep, struct loop_ep, base);
        struct loop_rmem *rm = container_of(rmem, struct loop_rmem, base);
        int rc = bulk_check(e, mem, dst, len, rmem, roff);

        if (rc < 0)
                return rc;
        if (!region_enter(rm->region))
                return region_gone(e);
        rc = tpi_region_get(&rm->region->mem, rm->off + roff, dst, len);
        region_leave(rm->region);
        if (rc < 0)
                return err_set(rc, "%s: read: the device's copy failed", ep->peer);
        ep->n.bulk_ops++;
        ep->n.bulk_bytes_rx += len;
        return TP_COMPLETE;
}

/* Every post is complete when it returns, so there is never anything to give up. */
static int loop_cancel(struct tp_ep *ep, uint64_t cookie)
{
        return err_set(-ENOENT, "%s: no such operation is outstanding", ep->peer);
}

static void loop_sever(struct tp_ep *ep)
{
        struct loop_ep *e = container_of(ep, struct loop_ep, base);

        atomic_store(&e->conn->severed, true);
        waker_wake(e->conn->waker[0]);
        waker_wake(e->conn->waker[1]);
}

const struct tp_ops tp_loop_ops = {
    .name = "loop",
    .unavailable = loop_unavailable,
    .open = loop_open,
    .close = loop_close,
    .listen = loop_listen,
    .listener_close = loop_listener_close,
    .accept = loop_accept,
    .connect = loop_connect,
    .ep_close = loop_ep_close,
    .attr = loop_attr,
    .alloc = loop_alloc,
    .reg = loop_reg,
    .free = loop_free,
    .export_key = loop_export_key,
    .import_key = loop_import_key,
    .rmem_free = loop_rmem_free,
    .poll = loop_poll,
    .fd = loop_fd,
    .arm = loop_arm,
    .disarm = loop_disarm,
    .send = loop_send,
    .release = loop_release,
    .write = loop_write,
    .write_imm = loop_write_imm,
    .read = loop_read,
    .cancel = loop_cancel,
    .sever = loop_sever,
};
