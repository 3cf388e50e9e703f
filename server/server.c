/*
 * The loop: poll every context, handle what came, let work go on; after a while of nothing, sleep on all contexts at
 * once. One thread; set-up of sessions and models happens here too, between requests.
 */
#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "check.h"
#include "err.h"
#include "inside.h"
#include "log.h"
#include "manifest.h"

_Static_assert(RUN_CLASSES == QUEUE_CLASSES, "a queue per class");

#define EVENTS_MAX   32
#define NAP_NS       (200 * NS_PER_MS) /* longest sleep: a stop is seen after so long at the latest */
#define HURRY_NAP_NS NS_PER_MS         /* while something waits for a peer or a deadline */
#define SESSION_FDS  2u                /* descriptors of a session that came over one transport or joined by another */
#define SPARE_FDS    (2 * SRV_STRANGERS) /* and of those that have no session yet, models, devices */
#define TICK_POLLS   64u                 /* idle rounds between looks at clock and listeners */

/* ---- dispatch ---- */

enum handled { FOR_STRANGERS = 1, FOR_GREETED = 2, FOR_OPEN = 4 };

struct handler {
        /* 0: r is in a stage to go on from (or has been queued, or put to rest); -errno: r is refused. */
        int (*handle)(struct server *srv, struct request *r);
        enum msg_phase phase;
        unsigned when;
};

static const struct handler handlers[MSG_OPCODES] = {
    [MSG_HELLO] = {srv_hello, PH_HELLO, FOR_STRANGERS},
    [MSG_AUTH] = {srv_auth, PH_AUTH, FOR_GREETED},
    [MSG_JOIN] = {srv_join, PH_AUTH, FOR_GREETED},
    [MSG_KEYS] = {srv_keys, PH_KEYS, FOR_OPEN},
    [MSG_LOAD] = {srv_load, PH_LOAD, FOR_OPEN},
    [MSG_PUT] = {srv_put, PH_LOAD, FOR_OPEN},
    [MSG_GET] = {srv_get, PH_OTHER, FOR_OPEN},
    [MSG_RUN] = {srv_run, PH_RUN, FOR_OPEN},
    [MSG_CALL] = {srv_call, PH_RUN, FOR_OPEN},
    [MSG_CANCEL] = {srv_cancel, PH_RUN, FOR_OPEN},
    [MSG_KEEP] = {srv_keep, PH_OTHER, FOR_OPEN},
    [MSG_DROP] = {srv_drop, PH_OTHER, FOR_OPEN},
    [MSG_TIME] = {srv_time, PH_OTHER, FOR_OPEN},
    [MSG_PATTERN] = {srv_pattern, PH_PATTERN, FOR_OPEN},
    [MSG_ECHO] = {srv_echo, PH_OTHER, FOR_OPEN},
    [MSG_STATS] = {srv_stats, PH_OTHER, FOR_OPEN},
    [MSG_HEARTBEAT] = {srv_heartbeat, PH_OTHER, FOR_OPEN},
    [MSG_ERROR] = {srv_error, PH_OTHER, FOR_STRANGERS | FOR_GREETED | FOR_OPEN},
    [MSG_BYE] = {srv_bye, PH_OTHER, FOR_STRANGERS | FOR_GREETED | FOR_OPEN},
};

static unsigned standing(const struct conn *c)
{
        return c->state == CONN_OPEN ? FOR_OPEN : c->state == CONN_GREETED ? FOR_GREETED : FOR_STRANGERS;
}

/* What has been queued or put to rest is nobody's business here any more. */
static bool goes_on(const struct request *r)
{
        return r->stage != ST_SETTLE && r->stage != ST_REST;
}

static void dispatch(struct server *srv, struct request *r)
{
        const struct msg_header *h = (const struct msg_header *)r->frame;
        unsigned standing_then = standing(r->c);
        enum msg_phase phase = PH_OTHER;
        int rc = msg_check(r->frame, r->len);

        r->stage = ST_REST;
        r->id = rc < 0 ? 0 : h->request_id;
        if (rc >= 0 && handlers[h->opcode].when & standing_then) {
                phase = handlers[h->opcode].phase;
                rc = handlers[h->opcode].handle(srv, r);
        } else if (standing_then != FOR_OPEN) {
                rc = err_set(-EACCES, "refused"); /* what was wrong is not for strangers */
        } else if (rc >= 0) {
                rc = err_set(-EPROTO, "%s is not for a server to hear, or not now", msg_opcode_name(h->opcode));
        }
        if (__builtin_expect(rc < 0, 0))
                srv_refuse(srv, r, rc, phase, 0xffff, rc == -EPROTO || standing_then != FOR_OPEN ? MSG_FATAL : 0);
        if (goes_on(r))
                srv_begin(srv, r);
}

/* ---- events ---- */

static void on_message(struct server *srv, struct conn *c, const struct tp_event *ev)
{
        struct request *r;

        if (c->state == CONN_LEAVING || ev->len > c->attr.msg_max) {
                tp_release(c->ep, ev->cookie);
                return;
        }
        r = srv_request_new(c);
        if (!r) {
                tp_release(c->ep, ev->cookie);
                srv_conn_end(srv, c, "more messages than were answered");
                return;
        }
        memcpy(r->frame, ev->data, ev->len);
        r->len = ev->len;
        tp_release(c->ep, ev->cookie);
        r->st.received_ns = srv->now_ns;
        dispatch(srv, r);
}

static void on_done(struct server *srv, struct conn *c, const struct tp_event *ev)
{
        void *p = (void *)(uintptr_t)(ev->cookie & ~(uint64_t)COOKIE_MASK);

        if (ev->status < 0)
                srv_conn_end(srv, c, err_str(ev->status));
        if ((ev->cookie & COOKIE_MASK) == COOKIE_WRITE) {
                c->posts--;
        } else if ((ev->cookie & COOKIE_MASK) == COOKIE_REPLY) {
                struct request *r = p;

                r->posts = 0;
                srv_request_rest(srv, r);
        }
}

static void on_event(struct server *srv, const struct tp_event *ev)
{
        struct conn *c = ev->ep->user;

        if (!c || c->state == CONN_DEAD) {
                if (ev->kind == TP_EV_MSG)
                        tp_release(ev->ep, ev->cookie);
                return;
        }
        switch (ev->kind) {
        case TP_EV_MSG:
                on_message(srv, c, ev);
                break;
        case TP_EV_DONE:
                on_done(srv, c, ev);
                break;
        case TP_EV_DOWN:
                srv_conn_end(srv, c, ev->status < 0 ? err_str(ev->status) : "the peer went away");
                break;
        case TP_EV_IMM:
                srv_conn_end(srv, c, "it sent an immediate, which nobody asked for");
                break;
        }
}

/* Everything that has come, one batch per context. The batch may hold events of a connection that one of them ends, so
 * the dead are buried afterwards. */
static int poll_all(struct server *srv)
{
        struct tp_event ev[EVENTS_MAX];
        int all = 0;

        for (size_t i = 0; i < srv->nctxs; i++) {
                int n = tp_poll(srv->ctxs[i], ev, EVENTS_MAX);

                if (n <= 0)
                        continue;
                srv->now_ns = clock_ns();
                srv->slice_end_ns = srv->now_ns + SRV_SLICE_NS;
                for (int k = 0; k < n; k++)
                        on_event(srv, &ev[k]);
                all += n;
        }
        return all;
}

static void reap(struct server *srv)
{
        struct conn *c = srv->conns;

        srv->reap = false;
        while (c) {
                if (c->state != CONN_DEAD) {
                        c = c->next;
                        continue;
                }
                srv_conn_reap(srv, c); /* may take siblings along */
                c = srv->conns;
        }
}

/* ---- now and then ---- */

static void accept_all(struct server *srv)
{
        for (size_t i = 0; i < srv->nlisteners; i++) {
                struct tp_ep *ep;

                while (tp_accept(srv->listeners[i].l, &ep) == 0) {
                        if (srv_conn_add(srv, ep, srv->listeners[i].loopback) < 0)
                                break;
                }
        }
}

static void check_deadlines(struct server *srv, uint64_t now)
{
        for (struct conn *c = srv->conns; c && srv->nstrangers + srv->nleaving > 0; c = c->next) {
                if (c->state == CONN_OPEN || c->state == CONN_DEAD || now < c->deadline_ns)
                        continue;
                srv_conn_end(srv, c, c->state == CONN_LEAVING ? "refused" : "no handshake within 2 s");
        }
        if (srv->queue.count > 0)
                srv_expire(srv, now);
}

/* ---- sleeping ---- */

static void disarm_all(struct server *srv, size_t n)
{
        for (size_t i = 0; i < n; i++)
                tp_disarm(srv->ctxs[i]);
}

static void nap(struct server *srv, uint64_t ns)
{
        const struct timespec ts = {.tv_nsec = (long)ns};
        size_t armed = 0;

        while (armed < srv->nctxs && tp_arm(srv->ctxs[armed]) == 0)
                armed++;
        if (armed == srv->nctxs) {
                for (size_t i = 0; i < srv->nctxs; i++)
                        srv->fds[i] = (struct pollfd){.fd = tp_fd(srv->ctxs[i]), .events = POLLIN};
                ppoll(srv->fds, srv->nctxs, &ts, NULL);
        }
        disarm_all(srv, armed);
}

static bool in_a_hurry(const struct server *srv)
{
        return srv->active || srv->queue.count > 0 || srv->nstrangers > 0 || srv->nleaving > 0;
}

static bool finished(const struct server *srv)
{
        /* Set by a signal handler, or by another thread where the server is embedded. */
        return (srv->opts.stop && __atomic_load_n(srv->opts.stop, __ATOMIC_RELAXED)) ||
               (srv->opts.once && srv->served && srv->nsessions == 0);
}

static void serve(struct server *srv)
{
        uint64_t last = clock_ns();

        for (unsigned idle = 1; !finished(srv); idle++) {
                int moved = poll_all(srv);

                if (__builtin_expect(srv->reap, 0))
                        reap(srv);
                moved |= srv_work(srv);
                if (__builtin_expect(srv->reap, 0))
                        reap(srv);
                if (moved)
                        srv->moved = true;
                if (idle % TICK_POLLS)
                        continue;
                accept_all(srv);
                srv->now_ns = clock_ns();
                check_deadlines(srv, srv->now_ns);
                if (srv->moved)
                        last = srv->now_ns;
                srv->moved = false;
                if (srv->now_ns - last > srv->opts.spin_ns)
                        nap(srv, in_a_hurry(srv) ? HURRY_NAP_NS : NAP_NS);
        }
}

/* ---- set-up ---- */

static int context_for(struct server *srv, const char *url, const struct tp_url *u, struct tp_ctx **out)
{
        int rc;

        for (size_t i = 0; i < srv->nctxs; i++) {
                if (strcmp(srv->schemes[i], u->scheme) == 0) {
                        *out = srv->ctxs[i];
                        return 0;
                }
        }
        rc = tp_open(url, NULL, out);
        if (rc < 0)
                return rc;
        memcpy(srv->schemes[srv->nctxs], u->scheme, sizeof(u->scheme));
        srv->ctxs[srv->nctxs++] = *out;
        return 0;
}

static int listen_on(struct server *srv, const char *url)
{
        struct srv_listener *l = &srv->listeners[srv->nlisteners];
        struct tp_ctx *ctx;
        struct tp_url u;
        int rc = tp_url_parse(url, &u);

        if (rc >= 0)
                rc = context_for(srv, url, &u, &ctx);
        if (rc >= 0)
                rc = tp_listen(ctx, url, &l->l);
        if (rc < 0)
                return err_trail(rc, "while listening on %s", url);
        l->loopback = u.loopback;
        srv->nlisteners++;
        log_info("listening on %s%s", l->l->url, u.any ? ", and on this host's other addresses of that family" : "");
        return 0;
}

static int listen_all(struct server *srv)
{
        size_t n = srv->opts.nurls;

        srv->ctxs = calloc(n + 1, sizeof(struct tp_ctx *));
        srv->fds = calloc(n + 1, sizeof(*srv->fds));
        srv->schemes = calloc(n + 1, sizeof(*srv->schemes));
        srv->listeners = calloc(n + 1, sizeof(*srv->listeners));
        if (!srv->ctxs || !srv->fds || !srv->schemes || !srv->listeners)
                return err_set(-ENOMEM, "no memory for %zu listeners", n);
        if (n == 0)
                return err_set(-EINVAL, "nothing to listen on was named");
        for (size_t i = 0; i < n; i++) {
                int rc = listen_on(srv, srv->opts.urls[i]);

                if (rc < 0)
                        return rc;
        }
        return 0;
}

static int open_device(struct server *srv)
{
        int rc = dev_open(srv->opts.device ? srv->opts.device : "cpu", srv->opts.threads, &srv->dev);

        if (rc >= 0)
                rc = srv->dev->ops->measure(srv->dev);
        if (rc >= 0)
                srv->dev->ops->query(srv->dev, &srv->props);
        return rc;
}

static int pin(int cpu)
{
        cpu_set_t set;

        if (cpu < 0)
                return 0;
        CPU_ZERO(&set);
        CPU_SET((size_t)cpu, &set);
        if (sched_setaffinity(0, sizeof(set), &set) < 0)
                return err_set(-errno, "CPU %d: cannot pin the polling thread to it: %s", cpu, strerror(errno));
        return 0;
}

static int print_urls(const struct server *srv, FILE *f)
{
        int rc;

        if (!f)
                return -errno;
        for (size_t i = 0; i < srv->nlisteners; i++)
                fprintf(f, "%s\n", srv->listeners[i].l->url);
        rc = ferror(f) ? -EIO : 0;
        return fclose(f) == 0 ? rc : -errno;
}

/* Whoever waits for the file must never read half of it. */
static int write_ready_file(const struct server *srv)
{
        const char *path = srv->opts.ready_file;
        char temporary[4096];
        int rc;

        if (!path)
                return 0;
        if (snprintf(temporary, sizeof(temporary), "%s.%d", path, (int)getpid()) >= (int)sizeof(temporary))
                return err_set(-ENAMETOOLONG, "ready file: the path is too long");
        rc = print_urls(srv, fopen(temporary, "we"));
        if (rc == 0 && rename(temporary, path) < 0)
                rc = -errno;
        if (rc < 0) {
                unlink(temporary);
                return err_set(rc, "%s: cannot write the ready file: %s", path, strerror(-rc));
        }
        return 0;
}

static int tell_ready(const struct server *srv)
{
        int rc = write_ready_file(srv);

        if (rc < 0 || srv->opts.ready_fd < 0)
                return rc;
        rc = print_urls(srv, fdopen(srv->opts.ready_fd, "w"));
        return rc < 0 ? err_set(rc, "cannot tell that the server is ready: %s", strerror(-rc)) : 0;
}

/* A connection for which there is no descriptor would wait in the kernel and never hear why. So the process takes all
 * that it may have, and sessions are refused, with a sentence, before they run out. */
static void fit_descriptors(struct server_opts *o)
{
        uint64_t wanted = SPARE_FDS + (uint64_t)SESSION_FDS * o->sessions_max;
        struct rlimit l;

        if (getrlimit(RLIMIT_NOFILE, &l) < 0)
                return;
        if (l.rlim_cur < wanted && l.rlim_cur < l.rlim_max) {
                l.rlim_cur = l.rlim_max < wanted ? l.rlim_max : wanted;
                if (setrlimit(RLIMIT_NOFILE, &l) < 0 || getrlimit(RLIMIT_NOFILE, &l) < 0)
                        return;
        }
        if (l.rlim_cur >= wanted)
                return;
        o->sessions_max = l.rlim_cur > SPARE_FDS + SESSION_FDS ? (uint32_t)(l.rlim_cur - SPARE_FDS) / SESSION_FDS : 1;
        log_warn("room for %u sessions at a time only: this process may have %llu open files; for more raise the limit "
                 "(ulimit -n %llu)",
                 o->sessions_max, (unsigned long long)l.rlim_cur, (unsigned long long)wanted);
}

static void defaults(struct server *srv)
{
        struct server_opts *o = &srv->opts;

        uint64_t host_bytes = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);

        if (o->memory_bytes == 0)
                o->memory_bytes = host_bytes / 4;
        if (o->memory_total_bytes == 0)
                o->memory_total_bytes = host_bytes / 2 > o->memory_bytes ? host_bytes / 2 : o->memory_bytes;
        if (o->sessions_max == 0)
                o->sessions_max = SRV_SESSIONS;
        fit_descriptors(o);
        if (o->flop_per_request <= 0)
                o->flop_per_request = SRV_FLOP_MAX;
        if (o->spin_ns == 0)
                o->spin_ns = SRV_SPIN_NS;
        manifest_boot_id(srv->boot_id);
}

static int set_up(struct server *srv)
{
        int rc = open_device(srv);

        if (rc >= 0)
                rc = model_roots_open(srv->opts.model_roots, srv->opts.nmodel_roots, &srv->roots);
        if (rc >= 0)
                rc = listen_all(srv);
        if (rc >= 0)
                rc = pin(srv->opts.cpu);
        return rc < 0 ? rc : tell_ready(srv);
}

static void tear_down(struct server *srv)
{
        while (srv->conns) {
                srv_conn_end(srv, srv->conns, "the server ends");
                reap(srv);
        }
        for (size_t i = 0; i < srv->nctxs; i++)
                tp_close(srv->ctxs[i]); /* with its listeners */
        if (srv->roots)
                model_roots_close(srv->roots);
        if (srv->dev)
                dev_close(srv->dev);
        free(srv->ctxs);
        free(srv->fds);
        free(srv->schemes);
        free(srv->listeners);
}

int server_run(const struct server_opts *opts)
{
        struct server srv = {.opts = *opts};
        int rc;

        defaults(&srv);
        rc = set_up(&srv);
        if (rc >= 0)
                serve(&srv);
        tear_down(&srv);
        return rc;
}
