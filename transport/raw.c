/*
 * raw: what the media share. An end of any medium, and the pair: a child process that serves, told what comes next over
 * a socket pair, never on the wire that is measured. While nothing is measured the child sleeps, so that it takes
 * nothing from what else this process measures in turn.
 */
#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/pidfd.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "clock.h"
#include "err.h"
#include "raw_inside.h"

#define STALL_NS    (10 * NS_PER_S)
#define YIELD_EVERY (1u << 12) /* polls before the core is offered to others: both ends may share one */
#define LOOK_EVERY  (1u << 15) /* polls between two looks at the clock and at the other process */

/* ---- media ---- */

static const struct raw_medium *find_medium(const char *url)
{
        size_t len = strcspn(url, ":");

        for (size_t i = 0; raw_media[i]; i++)
                if (strlen(raw_media[i]->scheme) == len && !strncmp(raw_media[i]->scheme, url, len))
                        return raw_media[i];
        return NULL;
}

const char *raw_unavailable(const char *url)
{
        const struct raw_medium *m = find_medium(url);

        return m ? m->unavailable() : "this medium has no raw form, or it is not part of this build";
}

static int check_opts(const struct raw_opts *in, struct raw_opts *o, const struct raw_medium **m)
{
        const char *reason = raw_unavailable(in->url);

        if (reason)
                return err_set(-ENOTSUP, "raw %s: %s", in->url, reason);
        *m = find_medium(in->url);
        *o = *in;
        o->max_bytes = o->max_bytes ? o->max_bytes : 1;
        o->depth = o->depth ? o->depth : 1;
        o->stall_ns = o->stall_ns ? o->stall_ns : STALL_NS;
        return 0;
}

/* ---- ends ---- */

static int own_end(const struct raw_medium *m, const struct raw_opts *o, struct raw_end *e, struct raw_end **out)
{
        e->medium = m;
        e->o = *o;
        e->o.url = strdup(o->url);
        if (!e->o.url) {
                m->free(e);
                return err_set(-ENOMEM, "raw %s: no memory", o->url);
        }
        *out = e;
        return 0;
}

int raw_offer(const struct raw_opts *in, struct raw_blob *offer, struct raw_end **out)
{
        const struct raw_medium *m;
        struct raw_opts o;
        struct raw_end *e;
        int rc = check_opts(in, &o, &m);

        memset(offer, 0, sizeof(*offer));
        rc = rc ? rc : m->offer(&o, offer, &e);
        return rc ? rc : own_end(m, &o, e, out);
}

int raw_answer(const struct raw_opts *in, const struct raw_blob *offer, struct raw_blob *answer, struct raw_end **out)
{
        const struct raw_medium *m;
        struct raw_opts o;
        struct raw_end *e;
        int rc = check_opts(in, &o, &m);

        memset(answer, 0, sizeof(*answer));
        rc = rc ? rc : m->answer(&o, offer, answer, &e);
        return rc ? rc : own_end(m, &o, e, out);
}

int raw_settle(struct raw_end *e, const struct raw_blob *answer)
{
        return e->medium->settle(e, answer);
}

/* Orders may have come from another host: what they ask for must fit what was set up. */
static int check_order(const struct raw_end *e, const struct raw_order *order)
{
        if (order->shape > RAW_STREAM || order->up > e->o.max_bytes || order->down > e->o.max_bytes ||
            (order->shape == RAW_STREAM && (order->depth == 0 || order->depth > e->o.depth)))
                return err_set(-EINVAL, "raw %s: an order of %zu bytes up, %zu down, depth %u; set up for %zu and %u",
                               e->o.url, order->up, order->down, order->depth, e->o.max_bytes, e->o.depth);
        return 0;
}

int raw_serve(struct raw_end *e, const struct raw_order *order)
{
        int rc = check_order(e, order);

        e->polls = 0;
        return rc ? rc : e->medium->serve(e, order);
}

int raw_drive(struct raw_end *e, const struct raw_order *order, const void *src, void *dst, struct hist *round_trips,
              uint64_t *total_ns)
{
        int rc = check_order(e, order);

        e->polls = 0;
        clock_stamp_init();
        e->started_ns = clock_ns();
        rc = rc ? rc : e->medium->drive(e, order, src, dst, round_trips);
        *total_ns = clock_ns() - e->started_ns;
        return rc;
}

void raw_free(struct raw_end *e)
{
        const char *url = e->o.url;

        if (e->other_fd > 0)
                close(e->other_fd);
        e->medium->free(e);
        free((void *)(uintptr_t)url);
}

/* ---- waiting ---- */

/* A descriptor of the process becomes readable when it ends, also while nobody has reaped it. */
static bool other_has_died(struct raw_end *e)
{
        struct pollfd p = {.events = POLLIN};

        if (e->other <= 0)
                return false;
        if (e->other_fd == 0) {
                e->other_fd = pidfd_open(e->other, 0);
                if (e->other_fd < 0 && errno == ESRCH)
                        return true;
        }
        p.fd = e->other_fd;
        return e->other_fd > 0 && poll(&p, 1, 0) == 1;
}

static __attribute__((cold, noinline)) int look_around(struct raw_end *e)
{
        uint64_t now = clock_ns();

        if (e->polls == LOOK_EVERY)
                e->idle_since_ns = now;
        if (other_has_died(e))
                return err_set(-ECONNRESET, "raw %s: the process at the other end has died", e->o.url);
        if (now - e->idle_since_ns > e->o.stall_ns)
                return err_set(-ETIMEDOUT, "raw %s: nothing came from the other end for %.1f s", e->o.url,
                               (double)e->o.stall_ns / NS_PER_S);
        return 0;
}

int raw_idle(struct raw_end *e)
{
        cpu_relax();
        if (++e->polls % YIELD_EVERY == 0)
                sched_yield();
        return e->polls % LOOK_EVERY == 0 ? look_around(e) : 0;
}

/* ---- the pair ---- */

/* One record of the socket pair, either way. The child says it is ready before it serves an order and how that ended
 * afterwards. */
struct pair_note {
        int rc;
        char text[240]; /* rc < 0: the child's sentence */
        struct raw_order order;
        struct raw_blob blob;
};

struct raw_pair {
        struct raw_end *end;
        pid_t child;
        int sock;
        int failed; /* nothing works any more after a failure: ends may disagree about what comes next */
};

static int tell(int sock, const struct pair_note *n)
{
        return send(sock, n, sizeof(*n), MSG_NOSIGNAL) == (ssize_t)sizeof(*n) ? 0 : -ECONNRESET;
}

static int hear(int sock, struct pair_note *n)
{
        ssize_t got;

        do
                got = recv(sock, n, sizeof(*n), 0);
        while (got < 0 && errno == EINTR);
        if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
                return -ETIMEDOUT;
        return got == (ssize_t)sizeof(*n) ? 0 : -ECONNRESET;
}

/* Says how something ended, with the sentence if it failed. */
static int tell_outcome(int sock, struct pair_note *n, int rc)
{
        n->rc = rc;
        snprintf(n->text, sizeof(n->text), "%s", rc < 0 ? err_text() : "");
        return tell(sock, n);
}

static int serve_orders(int sock, const struct raw_opts *o)
{
        struct raw_end *e = NULL;
        struct pair_note n;
        int rc = hear(sock, &n);

        if (rc == 0) {
                struct raw_blob offer = n.blob;

                rc = raw_answer(o, &offer, &n.blob, &e);
                tell_outcome(sock, &n, rc);
        }
        if (rc == 0)
                e->other = getppid();
        while (rc == 0 && (rc = hear(sock, &n)) == 0 && (rc = tell_outcome(sock, &n, 0)) == 0)
                rc = tell_outcome(sock, &n, raw_serve(e, &n.order));
        return rc;
}

/* Nothing of the parent's stays open in the child: a connection that the parent closes must be seen to close. */
static void keep_only(int fd)
{
#ifdef SYS_close_range
        if (fd > 3)
                syscall(SYS_close_range, 3u, (unsigned)fd - 1, 0);
        syscall(SYS_close_range, fd >= 3 ? (unsigned)fd + 1 : 3u, ~0u, 0);
#endif
}

static _Noreturn void child_main(int sock, pid_t parent, const struct raw_opts *o)
{
        const struct timeval forever = {0};
        cpu_set_t set;

        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != parent)
                _exit(1);
        if (o->cpu_peer >= 0) {
                CPU_ZERO(&set);
                CPU_SET((unsigned)o->cpu_peer, &set);
                sched_setaffinity(0, sizeof(set), &set);
        }
        keep_only(sock);
        setsockopt(sock, SOL_SOCKET, SO_RCVTIMEO, &forever, sizeof(forever)); /* the parent's silence is no failure */
        _exit(serve_orders(sock, o) == -ECONNRESET ? 0 : 1);
}

static int child_failed(const struct raw_pair *p, int rc, const struct pair_note *n)
{
        if (rc == 0)
                return err_set(n->rc, "at the other end: %s", n->text);
        return err_set(rc, "raw: the process at the other end %s", rc == -ETIMEDOUT ? "does not answer" : "has died");
}

/* Waits for the child's word. */
static int hear_outcome(const struct raw_pair *p, struct pair_note *n)
{
        int rc = hear(p->sock, n);

        return rc < 0 || n->rc < 0 ? child_failed(p, rc, n) : 0;
}

static int meet(struct raw_pair *p, const struct raw_opts *o)
{
        struct pair_note n = {0};
        int rc = raw_offer(o, &n.blob, &p->end);

        if (rc < 0)
                return rc;
        p->end->other = p->child;
        if ((rc = tell(p->sock, &n)) < 0)
                return child_failed(p, rc, &n);
        rc = hear_outcome(p, &n);
        return rc ? rc : raw_settle(p->end, &n.blob);
}

static int start_child(struct raw_pair *p, const struct raw_opts *o)
{
        uint64_t wait_ns = 2 * (o->stall_ns ? o->stall_ns : STALL_NS); /* the child's own complaint comes first */
        struct timeval tv = {.tv_sec = (time_t)(wait_ns / NS_PER_S),
                             .tv_usec = (suseconds_t)(wait_ns % NS_PER_S / NS_PER_US) + 1};
        pid_t parent = getpid();
        int sv[2];

        if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sv) < 0)
                return err_set(-errno, "raw %s: no socket pair: %s", o->url, strerror(errno));
        p->sock = sv[0];
        p->child = fork();
        if (p->child == 0)
                child_main(sv[1], parent, o);
        close(sv[1]);
        if (p->child < 0)
                return err_set(-errno, "raw %s: cannot start the process for the other end: %s", o->url,
                               strerror(errno));
        setsockopt(p->sock, SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof(tv));
        return 0;
}

int raw_open(const struct raw_opts *o, struct raw_pair **out)
{
        const char *reason = raw_unavailable(o->url);
        struct raw_pair *p;
        int rc;

        if (reason)
                return err_set(-ENOTSUP, "raw %s: %s", o->url, reason);
        p = calloc(1, sizeof(*p));
        if (!p)
                return err_set(-ENOMEM, "raw %s: no memory", o->url);
        p->sock = -1;
        rc = start_child(p, o);
        rc = rc ? rc : meet(p, o);
        if (rc < 0) {
                raw_close(p);
                return rc;
        }
        *out = p;
        return 0;
}

static int run_order(struct raw_pair *p, const struct raw_order *order, const void *src, void *dst,
                     struct hist *round_trips, uint64_t *total_ns)
{
        struct pair_note n = {.order = *order};
        int rc;

        if ((rc = tell(p->sock, &n)) < 0)
                return child_failed(p, rc, &n);
        rc = hear_outcome(p, &n);
        rc = rc ? rc : raw_drive(p->end, order, src, dst, round_trips, total_ns);
        return rc ? rc : hear_outcome(p, &n);
}

int raw_run(struct raw_pair *p, const struct raw_order *order, const void *src, void *dst, struct hist *round_trips,
            uint64_t *total_ns)
{
        int rc = check_order(p->end, order);

        if (rc < 0)
                return rc;
        if (p->failed)
                return err_set(p->failed, "raw %s: an earlier measurement failed", p->end->o.url);
        p->failed = run_order(p, order, src, dst, round_trips, total_ns);
        return p->failed;
}

void raw_close(struct raw_pair *p)
{
        if (p->child > 0) {
                kill(p->child, SIGKILL);
                waitpid(p->child, NULL, 0);
        }
        if (p->sock >= 0)
                close(p->sock);
        if (p->end)
                raw_free(p->end);
        free(p);
}
