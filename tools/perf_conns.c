/* perf: the threads of one end, its connections and their memory. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "err.h"
#include "perf_inside.h"
#include "prng.h"

/* ---- threads ---- */

static void fail(struct perf_worker *w, int rc)
{
        w->rc = rc;
        if (rc < 0) {
                snprintf(w->why, sizeof(w->why), "%s", err_str(rc));
                atomic_store(&w->s->failed, true);
        }
}

static void *thread_main(void *arg)
{
        struct perf_worker *w = arg;
        struct perf_session *s = w->s;
        uint64_t seen = 0;

        for (;;) {
                pthread_mutex_lock(&s->lock);
                while (s->generation == seen && !s->ending)
                        pthread_cond_wait(&s->wake, &s->lock);
                seen = s->generation;
                pthread_mutex_unlock(&s->lock);
                if (s->ending)
                        return NULL;
                fail(w, s->task(w));
                pthread_mutex_lock(&s->lock);
                if (--s->busy == 0)
                        pthread_cond_signal(&s->done);
                pthread_mutex_unlock(&s->lock);
        }
}

static int threads_start(struct perf_session *s)
{
        for (unsigned i = 1; i < s->n_workers; i++) {
                struct perf_worker *w = &s->workers[i];
                int rc = w->started ? 0 : -pthread_create(&w->thread, NULL, thread_main, w);

                if (rc < 0)
                        return err_set(rc, "cannot start thread %u: %s", i, strerror(-rc));
                w->started = true;
        }
        return 0;
}

/* The first cause: a thread that gave up because another one failed says nothing of its own. */
static int first_failure(const struct perf_session *s)
{
        int rc = 0;

        for (unsigned i = 0; i < s->n_workers; i++) {
                const struct perf_worker *w = &s->workers[i];

                if (w->rc < 0 && (rc == 0 || rc == -ECANCELED))
                        rc = err_set(w->rc, "%s", w->why);
        }
        return rc;
}

int perf_parallel(struct perf_session *s, int (*task)(struct perf_worker *))
{
        int rc = threads_start(s);

        if (rc < 0)
                return rc;
        if (s->n_workers == 1)
                return task(&s->workers[0]);
        pthread_mutex_lock(&s->lock);
        s->task = task;
        s->busy = s->n_workers - 1;
        s->generation++;
        pthread_cond_broadcast(&s->wake);
        pthread_mutex_unlock(&s->lock);
        fail(&s->workers[0], task(&s->workers[0]));
        pthread_mutex_lock(&s->lock);
        while (s->busy)
                pthread_cond_wait(&s->done, &s->lock);
        pthread_mutex_unlock(&s->lock);
        return first_failure(s);
}

/* ---- a session ---- */

int perf_session_init(struct perf_session *s, const struct perf_opts *o, bool driver)
{
        *s = (struct perf_session){.o = o, .driver = driver, .stall_ns = o->stall_ns, .phase = "connecting"};
        pthread_mutex_init(&s->lock, NULL);
        pthread_cond_init(&s->wake, NULL);
        pthread_cond_init(&s->done, NULL);
        s->workers = calloc(PERF_THREADS_MAX, sizeof(*s->workers));
        s->conns = calloc(PERF_CONNS_MAX, sizeof(*s->conns));
        if (!s->workers || !s->conns)
                return err_set(-ENOMEM, "no memory for a session");
        for (unsigned i = 0; i < PERF_THREADS_MAX; i++) {
                s->workers[i].s = s;
                s->workers[i].index = i;
        }
        s->n_workers = s->n_conns = 1;
        s->conns[0].w = &s->workers[0];
        return 0;
}

/* Once the numbers are agreed: connection i belongs to thread i mod threads, at both ends. */
int perf_session_share(struct perf_session *s, unsigned n_conns, unsigned n_workers, unsigned depth)
{
        s->n_conns = n_conns;
        s->n_workers = n_workers;
        s->notes_n = 2 * depth + 16;
        for (unsigned i = 0; i < n_workers; i++) {
                struct perf_worker *w = &s->workers[i];

                w->conns = calloc(n_conns / n_workers + 1, sizeof(struct perf_conn *));
                w->touch = calloc(n_conns / n_workers + 1, sizeof(struct perf_conn *));
                w->order = calloc(PERF_DEPTH_MAX, sizeof(*w->order));
                if (!w->conns || !w->touch || !w->order)
                        return err_set(-ENOMEM, "no memory for %u connections", n_conns);
        }
        for (unsigned i = 0; i < n_conns; i++) {
                struct perf_conn *c = &s->conns[i];

                c->index = i;
                c->w = &s->workers[i % n_workers];
                c->w->conns[c->w->n_conns++] = c;
                c->notes = calloc(s->notes_n, sizeof(*c->notes));
                c->intended = s->driver && s->o->rate > 0 ? calloc(2 * (size_t)depth, sizeof(uint64_t)) : NULL;
                c->actual = c->intended ? c->intended + depth : NULL;
                if (!c->notes || (s->driver && s->o->rate > 0 && !c->intended))
                        return err_set(-ENOMEM, "no memory for %u connections", n_conns);
        }
        return 0;
}

static void threads_end(struct perf_session *s)
{
        pthread_mutex_lock(&s->lock);
        s->ending = true;
        pthread_cond_broadcast(&s->wake);
        pthread_mutex_unlock(&s->lock);
        for (unsigned i = 1; i < s->n_workers; i++)
                if (s->workers[i].started)
                        pthread_join(s->workers[i].thread, NULL);
}

void perf_session_free(struct perf_session *s)
{
        if (!s->workers)
                return;
        threads_end(s);
        if (s->raw)
                raw_free(s->raw);
        for (unsigned i = 0; i < s->n_conns && s->conns; i++) {
                if (s->conns[i].ep)
                        tp_ep_close(s->conns[i].ep);
                free(s->conns[i].notes);
                free(s->conns[i].intended);
        }
        for (unsigned i = 0; i < PERF_THREADS_MAX; i++) {
                struct perf_worker *w = &s->workers[i];

                if (w->ctx && (i || s->driver)) /* the listener's is its owner's */
                        tp_close(w->ctx);
                free(w->conns);
                free(w->touch);
                free(w->order);
                free(w->out);
        }
        free(s->workers);
        free(s->conns);
        free(s->peer_text);
        json_free(s->counters);
        pthread_mutex_destroy(&s->lock);
        pthread_cond_destroy(&s->wake);
        pthread_cond_destroy(&s->done);
}

int perf_worker_open(struct perf_worker *w, const char *url)
{
        struct tp_open_opts how = {.gpu_path = (enum tp_gpu_path)w->s->o->gpu_path};

        return tp_open(url, &how, &w->ctx);
}

/* ---- memory ---- */

/* This end sends: what the other end's operations need of it is small. */
static int make_memory(struct perf_conn *c, struct tp_key *key)
{
        const struct perf_session *s = c->w->s;
        int rc;

        if ((rc = tp_alloc(c->ep, s->tx_bytes, &c->tx_mem)) < 0 ||
            (rc = tp_alloc(c->ep, s->rx_bytes, &c->rx_mem)) < 0 ||
            (rc = tp_export_key(c->rx_mem, 0, s->rx_bytes, key)) < 0)
                return err_trail(rc, "while making %llu bytes of memory for connection %u",
                                 (unsigned long long)(s->tx_bytes + s->rx_bytes), c->index);
        c->tx = c->tx_mem->region.addr;
        c->rx = c->rx_mem->region.addr;
        return 0;
}

static int import_key(struct perf_conn *c, const struct tp_key *key)
{
        const struct perf_session *s = c->w->s;
        int rc = tp_import_key(c->ep, key, clock_ns() + s->stall_ns, &c->remote);

        if (rc == 0 && c->remote->len != s->rx_bytes)
                return err_set(-EPROTO, "%s: opened %llu bytes of memory where %llu were agreed on", c->ep->peer,
                               (unsigned long long)c->remote->len, (unsigned long long)s->rx_bytes);
        return rc;
}

/* ---- the driver's connections ---- */

/* Where the peer's further threads listen is known as its own host sees it; how to get there, as we do. */
static int thread_url(const struct perf_session *s, const char *theirs, char out[TP_URL_MAX])
{
        struct tp_url ours, other;
        int rc = tp_url_parse(s->url, &ours);

        rc = rc ? rc : tp_url_parse(theirs, &other);
        if (rc)
                return rc;
        snprintf(out, TP_URL_MAX, strchr(ours.host, ':') ? "%s://[%.100s]%s%s%s%s" : "%s://%.100s%s%s%s%s", ours.scheme,
                 other.port[0] ? ours.host : other.host, other.port[0] ? ":" : "", other.port, ours.query[0] ? "?" : "",
                 ours.query);
        return 0;
}

static int attach(struct perf_conn *c)
{
        struct perf_session *s = c->w->s;
        struct perf_ctl *m = calloc(1, sizeof(*m));
        int rc = m ? make_memory(c, &m->key) : err_set(-ENOMEM, "no memory for control messages");

        if (rc == 0) {
                m->kind = PERF_ATTACH;
                m->f[PF_TOKEN_0] = s->token[0];
                m->f[PF_TOKEN_1] = s->token[1];
                m->f[PF_INDEX] = c->index;
                rc = perf_tell(c, m);
        }
        rc = rc ? rc : perf_hear(c, PERF_ATTACHED, m);
        rc = rc ? rc : import_key(c, &m->key);
        free(m);
        return rc;
}

int perf_conns_make(struct perf_worker *w)
{
        struct perf_session *s = w->s;
        char url[TP_URL_MAX];
        int rc = 0;

        snprintf(url, sizeof(url), "%s", s->url);
        if (w->index) {
                perf_pin(s->n_cores ? s->cores[w->index % (unsigned)s->n_cores] : -1);
                rc = thread_url(s, w->url, url);
                rc = rc ? rc : perf_worker_open(w, url);
        }
        for (unsigned i = 0; i < w->n_conns && !rc; i++) {
                struct perf_conn *c = w->conns[i];

                if (!c->ep) {
                        rc = tp_connect(w->ctx, url, clock_ns() + s->stall_ns, &c->ep);
                        if (rc < 0)
                                return err_trail(rc, "while making connection %u of %u", c->index + 1, s->n_conns);
                        c->ep->user = c;
                }
                rc = attach(c);
                if (perf_stopped && !rc)
                        rc = err_set(-EINTR, "%s: ended by a signal", s->phase);
        }
        return rc;
}

/* ---- the peer's ---- */

/* Another thread of ours listens beside the first: on a port of its own, or under a name of its own. */
int perf_thread_listen(struct perf_worker *w)
{
        const struct perf_session *s = w->s;
        struct tp_url u;
        char url[TP_URL_MAX];
        int rc = 0;

        if (w->index == 0)
                return 0;
        perf_pin(s->n_cores ? s->cores[w->index % (unsigned)s->n_cores] : -1);
        if ((rc = tp_url_parse(s->url, &u)) < 0)
                return rc;
        if (u.port[0])
                snprintf(url, sizeof(url), strchr(u.host, ':') ? "%s://[%s]:0%s%s" : "%s://%s:0%s%s", u.scheme, u.host,
                         u.query[0] ? "?" : "", u.query);
        else
                snprintf(url, sizeof(url), "%s://%.100s-t%u%s%s", u.scheme, u.host, w->index, u.query[0] ? "?" : "",
                         u.query);
        rc = perf_worker_open(w, url);
        rc = rc ? rc : tp_listen(w->ctx, url, &w->tl);
        if (rc == 0)
                snprintf(w->url, sizeof(w->url), "%s", w->tl->url);
        return rc;
}

static int answer_attach(struct perf_worker *w, struct tp_ep *ep, const struct perf_ctl *hello)
{
        struct perf_session *s = w->s;
        uint64_t index = hello->f[PF_INDEX];
        struct perf_ctl *m;
        struct perf_conn *c;
        int rc;

        if (index >= s->n_conns || index % s->n_workers != w->index || s->conns[index].tx_mem ||
            (index == 0) != (s->conns[0].ep == ep) || (index != 0 && ep->user))
                return err_set(-EPROTO, "%s: %s asks for a connection that was not agreed on", s->phase, ep->peer);
        c = &s->conns[index];
        c->ep = ep;
        ep->user = c;
        m = calloc(1, sizeof(*m));
        rc = m ? make_memory(c, &m->key) : err_set(-ENOMEM, "no memory for control messages");
        if (rc == 0) {
                m->kind = PERF_ATTACHED;
                rc = perf_tell(c, m);
        }
        free(m);
        return rc ? rc : import_key(c, &hello->key);
}

static bool is_ours(const struct perf_session *s, const struct perf_ctl *m)
{
        return m->kind == PERF_ATTACH && m->f[PF_TOKEN_0] == s->token[0] && m->f[PF_TOKEN_1] == s->token[1];
}

/* Somebody else, who wants to be served meanwhile, is told so: what he says does not end what he has no part in. */
static int first_message(struct perf_worker *w, const struct tp_event *ev, unsigned *attached)
{
        struct perf_ctl *m = malloc(sizeof(*m));
        int rc = m ? perf_ctl_parse(w, ev->ep->peer, ev->data, ev->len, m) : err_set(-ENOMEM, "no memory");

        tp_release(ev->ep, ev->cookie);
        if (rc == 0 && is_ours(w->s, m)) {
                rc = answer_attach(w, ev->ep, m);
                *attached += rc == 0;
        } else if (ev->ep->user == NULL) {
                perf_turn_away(w, ev->ep, PERF_BUSY "; try again, or with --wait S");
                rc = 0;
        } else if (rc == 0) {
                rc = err_set(-EPROTO, "%s: control message %d from %s where a connection was expected", w->s->phase,
                             (int)m->kind, ev->ep->peer);
        }
        free(m);
        return rc;
}

/* Takes this thread's connections as they come; the first one is there already. */
int perf_conns_take(struct perf_worker *w)
{
        unsigned attached = 0;
        int rc = 0;

        while (attached < w->n_conns && !rc) {
                struct tp_event ev;
                struct tp_ep *ep;
                int n = perf_kept(w, &ev) ? 1 : tp_poll(w->ctx, &ev, 1);

                rc = n < 0 ? n : n == 0 ? perf_idle(w) : 0;
                if (n > 0) {
                        w->idle = 0;
                        if (ev.kind == TP_EV_MSG)
                                rc = first_message(w, &ev, &attached);
                        else if (ev.ep->user)
                                rc = perf_take(w, &ev);
                        else if (ev.kind == TP_EV_DOWN)
                                tp_ep_close(ev.ep);
                }
                n = rc ? rc : tp_accept(w->tl, &ep);
                if (n == 0)
                        ep->user = NULL;
                else if (n != -EAGAIN && !rc)
                        rc = n;
        }
        return rc;
}
