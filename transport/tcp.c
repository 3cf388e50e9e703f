/*
 * tcp, set-up: addresses, listening, the greeting, memory and keys. The hot path is tcp_data.c.
 *
 * Greeting: the connector sends 32 bytes (magic, version, role, its longest message, its session), the acceptor checks
 * them and answers with its own; only then does an endpoint with its buffers exist. Half-made connections live in a
 * fixed array with a deadline each; when it is full, the oldest makes room, so that strangers who say nothing cannot
 * keep others out: an honest peer needs one round trip.
 */
#include <assert.h>
#include <endian.h>
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <linux/sockios.h>

#include "clock.h"
#include "err.h"
#include "inet.h"
#include "inside.h"
#include "log.h"
#include "tcp_private.h"
#include "tcp_socket.h"

#define TCP_VERSION       1
#define TCP_HALF_MAX      64u
#define TCP_READY_MAX     64u
#define TCP_GREETING_NS   (5 * NS_PER_S)
#define TCP_CLOSE_WAIT_MS 20
#define TCP_BACKLOG       256
#define TCP_TELL_NS       (60 * NS_PER_S)
#define TCP_AGAIN_NS      (100 * NS_PER_MS) /* how long a listener rests that has no descriptor for a connection */
#define TCP_PEER_MSG_MAX  (16u << 20)       /* what a peer may claim to take */

static const char greeting_magic[8] = "djinnTCP";

enum greeting_role { GREETING_CONNECT = 1, GREETING_ACCEPT = 2 };

struct greeting { /* on the wire, little endian */
        char magic[8];
        uint16_t version;
        uint8_t role, zero;
        uint32_t msg_max;
        uint64_t session;
        uint64_t reserved;
};

static_assert(sizeof(struct greeting) == 32, "wire layout");
static_assert(offsetof(struct greeting, version) == 8, "wire layout");
static_assert(offsetof(struct greeting, msg_max) == 12, "wire layout");
static_assert(offsetof(struct greeting, session) == 16, "wire layout");

struct tcp_half {
        enum tcp_tag tag; /* first */
        int fd;           /* -1: free */
        uint64_t deadline_ns;
        struct tcp_listener *l;
        size_t have;
        struct greeting got;
};

struct tcp_listener {
        enum tcp_tag tag; /* first */
        int fd;
        bool deaf; /* not in the epoll set, because enough endpoints wait to be accepted, or until again_ns */
        uint64_t again_ns, told_ns; /* 0: it does not rest; when the user was last told why it does */
        unsigned n_ready;
        struct tcp_ep *ready, **ready_end;
        struct tcp_listener *prev, *next;
        struct tcp_half half[TCP_HALF_MAX];
        struct tp_listener base;
};

/* ---- greeting ---- */

static struct greeting greeting_make(enum greeting_role role, uint64_t session)
{
        struct greeting g = {
            .version = htole16(TCP_VERSION),
            .role = (uint8_t)role,
            .msg_max = htole32(TCP_MSG_MAX),
            .session = htole64(session),
        };

        memcpy(g.magic, greeting_magic, sizeof(g.magic));
        return g;
}

/* As far as it goes: what has come so far could still become a greeting. */
static bool greeting_begins(const struct greeting *g, size_t have)
{
        return !memcmp(g->magic, greeting_magic, have < sizeof(g->magic) ? have : sizeof(g->magic));
}

static int greeting_check(const struct greeting *g, enum greeting_role from, const char *peer)
{
        uint32_t msg_max = le32toh(g->msg_max);

        if (!greeting_begins(g, sizeof(*g)))
                return err_set(-EPROTO, "%s: what is there does not speak djinnbench's tcp transport", peer);
        if (le16toh(g->version) != TCP_VERSION)
                return err_set(-EPROTO, "%s: the peer speaks version %u of the tcp framing, this program version %u",
                               peer, le16toh(g->version), TCP_VERSION);
        if (g->role != from)
                return err_set(-EPROTO, "%s: greeted with role %u where %u was expected", peer, g->role, from);
        if (g->zero || g->reserved || msg_max < TP_MSG_MAX_LEAST || msg_max > TCP_PEER_MSG_MAX)
                return err_set(-EPROTO, "%s: the greeting holds values that no version sends", peer);
        return 0;
}

/* ---- context ---- */

static const char *tcp_unavailable(void)
{
        return NULL;
}

static int epoll_join(int epfd, int fd, enum tcp_tag *who)
{
        struct epoll_event e = {.events = EPOLLIN, .data.ptr = who};

        return epoll_ctl(epfd, EPOLL_CTL_ADD, fd, &e) < 0 ? -errno : 0;
}

static int tcp_open(const char *url, const struct tp_open_opts *opts, struct tp_ctx **out)
{
        struct tcp_ctx *c = calloc(1, sizeof(*c));
        int rc;

        if (!c)
                return err_set(-ENOMEM, "tcp: no memory for a context");
        c->base.ops = &tp_tcp_ops;
        c->busy_end = &c->busy;
        c->timer_tag = TCP_TAG_TIMER;
        c->epfd = epoll_create1(EPOLL_CLOEXEC);
        c->timerfd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
        if (c->epfd < 0 || c->timerfd < 0 || (rc = epoll_join(c->epfd, c->timerfd, &c->timer_tag)) < 0) {
                rc = err_set(-errno, "tcp: cannot make a poll set: %s", strerror(errno));
                if (c->epfd >= 0)
                        close(c->epfd);
                if (c->timerfd >= 0)
                        close(c->timerfd);
                free(c);
                return rc;
        }
        *out = &c->base;
        return 0;
}

static void tcp_close(struct tp_ctx *base)
{
        struct tcp_ctx *c = tcp_ctx_of(base);

        while (c->listeners)
                tp_listener_close(&c->listeners->base);
        while (c->eps)
                tp_ep_close(&c->eps->base);
        close(c->epfd);
        close(c->timerfd);
        free(c);
}

/* ---- endpoints ---- */

static void rx_init(struct tcp_ep *ep)
{
        struct tcp_rx *rx = &ep->rx;

        for (uint32_t i = 0; i < TCP_CHUNKS; i++) {
                rx->chunk[i].data = ep->pool + (size_t)i * TCP_CHUNK;
                rx->chunk[i].next_free = i + 1 < TCP_CHUNKS ? i + 1 : TCP_NO_CHUNK;
        }
        rx->cur = 0;
        rx->free = 1;
        rx->want = SOFTRMA_HEAD_MAX;
        memset(ep->pool, 0, TCP_TOUCH); /* what a ping-pong uses is there before it begins */
}

/* Takes fd over, also when it fails. */
static int ep_make(struct tp_ctx *ctx, int fd, uint64_t session, const struct greeting *peer, struct tcp_ep **out)
{
        struct tcp_ep *ep = aligned_alloc(CACHE_LINE, ALIGN_UP(sizeof(*ep), (size_t)CACHE_LINE));

        if (ep) {
                memset(ep, 0, sizeof(*ep));
                ep->tx.item = calloc(TCP_TX_RING, sizeof(*ep->tx.item));
                ep->pool = mmap(NULL, (size_t)TCP_CHUNKS * TCP_CHUNK, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        }
        if (!ep || !ep->tx.item || ep->pool == MAP_FAILED) {
                close(fd);
                if (ep && ep->pool != MAP_FAILED)
                        munmap(ep->pool, (size_t)TCP_CHUNKS * TCP_CHUNK);
                if (ep)
                        free(ep->tx.item);
                free(ep);
                return err_set(-ENOMEM, "tcp: no memory for a connection");
        }
        ep->tag = TCP_TAG_EP;
        ep->fd = fd;
        ep->session = session;
        ep->peer_session = le64toh(peer->session);
        ep->peer_msg_max = le32toh(peer->msg_max);
        ep->base.ops = &tp_tcp_ops;
        ep->base.ctx = ctx;
        inet_peer_url(fd, "tcp", ep->base.peer);
        tcp_socket_connected(fd);
        rx_init(ep);
        *out = ep;
        return 0;
}

/* From now on it is polled. */
static int ep_join(struct tcp_ep *ep)
{
        struct tcp_ctx *c = tcp_ctx_of(ep->base.ctx);
        int rc = tcp_together(c);

        rc = rc ? rc : epoll_join(c->epfd, ep->fd, &ep->tag);
        if (rc < 0)
                return err_set(rc, "%s: cannot poll the connection: %s", ep->base.peer, strerror(-rc));
        ep->interest = EPOLLIN;
        LIST_ADD(c->eps, ep);
        c->n_eps++;
        return 0;
}

int tcp_interest(struct tcp_ep *ep, uint32_t events)
{
        struct epoll_event e = {.events = events, .data.ptr = &ep->tag};
        int op = !events ? EPOLL_CTL_DEL : ep->interest ? EPOLL_CTL_MOD : EPOLL_CTL_ADD;

        if (events == ep->interest)
                return 0;
        if (epoll_ctl(tcp_ctx_of(ep->base.ctx)->epfd, op, ep->fd, &e) < 0)
                return -errno;
        ep->interest = events;
        return 0;
}

static void ep_free(struct tcp_ep *ep)
{
        close(ep->fd);
        munmap(ep->pool, (size_t)TCP_CHUNKS * TCP_CHUNK);
        softrma_table_free(&ep->keys);
        free(ep->tx.item);
        free(ep);
}

/*
 * What the kernel has taken is delivered even though we close, unless the peer is sending at that moment: what comes
 * for a closed socket resets the connection and throws the rest away. So where something came, we listen on until the
 * peer's kernel has all of ours, but not for long: others are waiting for this thread.
 */
static void ep_linger(struct tcp_ep *ep)
{
        uint64_t until = clock_ns() + TCP_CLOSE_WAIT_MS * NS_PER_MS;
        bool sending = false;
        int unsent;

        ep->tx.full = false;
        tcp_flush(ep);
        shutdown(ep->fd, SHUT_WR);
        for (;;) {
                ssize_t n = recv(ep->fd, NULL, 1u << 20, MSG_TRUNC | MSG_DONTWAIT);

                if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR))
                        return;
                sending = sending || n > 0;
                if (clock_ns() >= until)
                        return;
                if (n > 0)
                        continue;
                if (!sending || ioctl(ep->fd, SIOCOUTQ, &unsent) < 0 || unsent <= 1)
                        return; /* the 1 is our FIN */
                poll(&(struct pollfd){.fd = ep->fd, .events = POLLIN}, 1, 1);
        }
}

static void busy_remove(struct tcp_ctx *c, struct tcp_ep *ep)
{
        struct tcp_ep **at = &c->busy;

        while (*at && *at != ep)
                at = &(*at)->next_busy;
        if (!*at)
                return;
        *at = ep->next_busy;
        if (!*at)
                c->busy_end = at;
}

static void tcp_rmem_free(struct tp_rmem *base);
static void tcp_free(struct tp_mem *base);

static void tcp_ep_close(struct tp_ep *base)
{
        struct tcp_ep *ep = tcp_ep_of(base);
        struct tcp_ctx *c = tcp_ctx_of(base->ctx);

        if (ep->state == TCP_EP_LIVE && !ep->tx.dead)
                ep_linger(ep);
        tcp_interest(ep, 0);
        ep->state = TCP_EP_DOWN;
        while (ep->rmems)
                tcp_rmem_free(&ep->rmems->base);
        while (ep->mems)
                tcp_free(&ep->mems->base);
        busy_remove(c, ep);
        LIST_DEL(c->eps, ep);
        c->n_eps--;
        ep_free(ep);
}

/* ---- listening ---- */

static int tcp_listen(struct tp_ctx *ctx, const char *url, struct tp_listener **out)
{
        struct tcp_ctx *c = tcp_ctx_of(ctx);
        struct tcp_listener *l;
        struct tp_url u;
        int fd, rc = tpi_url_expect(url, "tcp", &u);

        if (rc < 0)
                return rc;
        fd = inet_listen(url, &u, TCP_BACKLOG, tcp_socket_tune);
        if (fd < 0)
                return fd;
        l = calloc(1, sizeof(*l));
        rc = l ? epoll_join(c->epfd, fd, &l->tag) : -ENOMEM;
        if (rc < 0) {
                close(fd);
                free(l);
                return err_set(rc, "%s: cannot listen: %s", url, strerror(-rc));
        }
        l->tag = TCP_TAG_LISTENER;
        l->fd = fd;
        l->ready_end = &l->ready;
        for (unsigned i = 0; i < TCP_HALF_MAX; i++)
                l->half[i] = (struct tcp_half){.tag = TCP_TAG_HALF, .fd = -1, .l = l};
        l->base.ops = &tp_tcp_ops;
        l->base.ctx = ctx;
        inet_listener_url(fd, "tcp", l->base.url);
        LIST_ADD(c->listeners, l);
        *out = &l->base;
        return 0;
}

static void half_drop(struct tcp_half *h)
{
        close(h->fd); /* epoll forgets it with that */
        h->fd = -1;
        tcp_ctx_of(h->l->base.ctx)->n_half--;
}

static void tcp_listener_close(struct tp_listener *base)
{
        struct tcp_listener *l = container_of(base, struct tcp_listener, base);
        struct tcp_ctx *c = tcp_ctx_of(base->ctx);

        for (unsigned i = 0; i < TCP_HALF_MAX; i++)
                if (l->half[i].fd >= 0)
                        half_drop(&l->half[i]);
        while (l->ready) {
                struct tcp_ep *ep = l->ready;

                l->ready = ep->next_ready;
                ep_free(ep);
        }
        close(l->fd);
        LIST_DEL(c->listeners, l);
        free(l);
}

static void timer_set(struct tcp_ctx *c, uint64_t at_ns)
{
        struct itimerspec t = {.it_value = {.tv_sec = (time_t)(at_ns / NS_PER_S), .tv_nsec = (long)(at_ns % NS_PER_S)}};

        timerfd_settime(c->timerfd, TFD_TIMER_ABSTIME, &t, NULL);
}

static struct tcp_half *half_slot(struct tcp_listener *l)
{
        struct tcp_half *oldest = &l->half[0];

        for (unsigned i = 0; i < TCP_HALF_MAX; i++) {
                if (l->half[i].fd < 0)
                        return &l->half[i];
                if (l->half[i].deadline_ns < oldest->deadline_ns)
                        oldest = &l->half[i];
        }
        log_debug("%s: %u connections have not greeted yet; the oldest is dropped", l->base.url, TCP_HALF_MAX);
        half_drop(oldest);
        return oldest;
}

static void half_begin(struct tcp_listener *l, int fd)
{
        struct tcp_ctx *c = tcp_ctx_of(l->base.ctx);
        struct tcp_half *h = half_slot(l);

        *h = (struct tcp_half){.tag = TCP_TAG_HALF, .fd = fd, .deadline_ns = clock_ns() + TCP_GREETING_NS, .l = l};
        if (epoll_join(c->epfd, fd, &h->tag) < 0) {
                close(fd);
                h->fd = -1;
                return;
        }
        if (c->n_half++ == 0 && l->again_ns == 0)
                timer_set(c, h->deadline_ns);
}

static void listener_ready(struct tcp_listener *l, struct tcp_ep *ep)
{
        ep->next_ready = NULL;
        *l->ready_end = ep;
        l->ready_end = &ep->next_ready;
        l->n_ready++;
}

/* The connector has said all of its greeting: answer, and make an endpoint of it. */
static void half_finish(struct tcp_half *h)
{
        uint64_t session = tpi_random();
        struct greeting mine = greeting_make(GREETING_ACCEPT, session);
        struct tcp_listener *l = h->l;
        struct tcp_ep *ep;
        char peer[TP_URL_MAX];
        int fd = h->fd, rc;

        inet_peer_url(fd, "tcp", peer);
        rc = greeting_check(&h->got, GREETING_CONNECT, peer);
        /* A peer of another version is answered all the same, so that it can tell its user which one is here. */
        if (greeting_begins(&h->got, sizeof(h->got)) &&
            send(fd, &mine, sizeof(mine), MSG_NOSIGNAL | MSG_DONTWAIT) != sizeof(mine))
                rc = rc < 0 ? rc : err_set(-EPIPE, "%s: went away while greeting", peer);
        if (rc < 0) {
                log_debug("%s: refused a connection: %s", l->base.url, err_text());
                half_drop(h);
                return;
        }
        epoll_ctl(tcp_ctx_of(l->base.ctx)->epfd, EPOLL_CTL_DEL, fd, NULL);
        h->fd = -1;
        tcp_ctx_of(l->base.ctx)->n_half--;
        if (ep_make(l->base.ctx, fd, session, &h->got, &ep) == 0)
                listener_ready(l, ep);
}

static void half_progress(struct tcp_half *h)
{
        ssize_t n;

        if (h->fd < 0)
                return;
        n = recv(h->fd, (uint8_t *)&h->got + h->have, sizeof(h->got) - h->have, 0);
        if (n < 0 && (errno == EAGAIN || errno == EINTR))
                return;
        if (n <= 0) {
                half_drop(h);
                return;
        }
        h->have += (size_t)n;
        if (!greeting_begins(&h->got, h->have)) {
                log_debug("%s: refused a connection that does not speak this protocol", h->l->base.url);
                half_drop(h);
        } else if (h->have == sizeof(h->got)) {
                half_finish(h);
        }
}

static void listener_hear(struct tcp_listener *l, bool hear)
{
        struct epoll_event e = {.events = hear ? EPOLLIN : 0, .data.ptr = &l->tag};

        if (l->deaf != hear)
                return;
        epoll_ctl(tcp_ctx_of(l->base.ctx)->epfd, EPOLL_CTL_MOD, l->fd, &e);
        l->deaf = !hear;
}

/* The connection stays in the kernel's queue, where it would wake us again and again. */
static void listener_rest(struct tcp_listener *l, int error)
{
        uint64_t now = clock_ns();

        if (error != EMFILE && error != ENFILE && error != ENOBUFS && error != ENOMEM)
                return;
        if (!l->told_ns || now - l->told_ns > TCP_TELL_NS) {
                l->told_ns = now;
                log_warn("%s: cannot accept a connection: %s; those who connect wait until there is room", l->base.url,
                         strerror(error));
        }
        l->again_ns = now + TCP_AGAIN_NS;
        listener_hear(l, false);
        timer_set(tcp_ctx_of(l->base.ctx), l->again_ns);
}

static void listener_progress(struct tcp_listener *l)
{
        for (unsigned i = 0; i < TCP_BACKLOG; i++) {
                int fd;

                if (l->n_ready >= TCP_READY_MAX) {
                        listener_hear(l, false);
                        return;
                }
                fd = accept4(l->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
                if (fd < 0) {
                        listener_rest(l, errno);
                        return;
                }
                half_begin(l, fd);
        }
}

static void halves_expire(struct tcp_ctx *c)
{
        uint64_t now = clock_ns(), next = UINT64_MAX, ticks;

        if (read(c->timerfd, &ticks, sizeof(ticks)) < 0 && errno == EAGAIN)
                return;
        for (struct tcp_listener *l = c->listeners; l; l = l->next) {
                if (l->again_ns > now) {
                        next = l->again_ns < next ? l->again_ns : next;
                } else if (l->again_ns) {
                        l->again_ns = 0;
                        listener_hear(l, l->n_ready < TCP_READY_MAX);
                }
                for (unsigned i = 0; i < TCP_HALF_MAX; i++) {
                        struct tcp_half *h = &l->half[i];

                        if (h->fd < 0)
                                continue;
                        if (h->deadline_ns <= now)
                                half_drop(h);
                        else if (h->deadline_ns < next)
                                next = h->deadline_ns;
                }
        }
        if (next != UINT64_MAX)
                timer_set(c, next);
}

void tcp_setup_progress(struct tcp_ctx *c, enum tcp_tag *who)
{
        switch (*who) {
        case TCP_TAG_LISTENER:
                listener_progress(container_of(who, struct tcp_listener, tag));
                break;
        case TCP_TAG_HALF:
                half_progress(container_of(who, struct tcp_half, tag));
                break;
        case TCP_TAG_TIMER:
                halves_expire(c);
                break;
        case TCP_TAG_EP:
                break;
        }
}

static int tcp_accept(struct tp_listener *base, struct tp_ep **out)
{
        struct tcp_listener *l = container_of(base, struct tcp_listener, base);
        struct tcp_ep *ep = l->ready;
        int rc;

        if (!ep)
                return -EAGAIN;
        l->ready = ep->next_ready;
        if (!l->ready)
                l->ready_end = &l->ready;
        l->n_ready--;
        listener_hear(l, l->again_ns == 0);
        rc = ep_join(ep);
        if (rc < 0) {
                ep_free(ep);
                return rc;
        }
        *out = &ep->base;
        return 0;
}

/* ---- connecting ---- */

static void idle_progress(void *arg)
{
        struct tcp_ctx *c = arg;
        struct epoll_event got[16];
        int n = epoll_wait(c->epfd, got, ARRAY_LEN(got), 0);

        for (int i = 0; i < n; i++)
                tcp_setup_progress(c, got[i].data.ptr);
}

static int greet(int fd, const char *url, uint64_t deadline_ns, const struct inet_idle *idle, uint64_t *session,
                 struct greeting *theirs)
{
        struct greeting mine;
        size_t have = 0;

        *session = tpi_random();
        mine = greeting_make(GREETING_CONNECT, *session);
        if (send(fd, &mine, sizeof(mine), MSG_NOSIGNAL) != sizeof(mine))
                return err_set(-ECONNRESET, "%s: closed before greeting", url);
        while (have < sizeof(*theirs)) {
                ssize_t n;
                int rc = inet_wait(fd, POLLIN, deadline_ns, idle);

                if (rc < 0)
                        return err_set(rc, "%s: connected, but no greeting came: %s", url, strerror(-rc));
                n = recv(fd, (uint8_t *)theirs + have, sizeof(*theirs) - have, 0);
                if (n < 0 && (errno == EAGAIN || errno == EINTR))
                        continue;
                if (n <= 0)
                        return err_set(-ECONNRESET,
                                       "%s: the peer closed the connection instead of greeting; is it a "
                                       "djinnbench server?",
                                       url);
                have += (size_t)n;
                if (!greeting_begins(theirs, have))
                        break;
        }
        return greeting_check(theirs, GREETING_ACCEPT, url);
}

static int tcp_connect(struct tp_ctx *ctx, const char *url, uint64_t deadline_ns, struct tp_ep **out)
{
        struct tcp_ctx *c = tcp_ctx_of(ctx);
        struct inet_idle idle = {.fd = c->listeners ? c->epfd : -1, .progress = idle_progress, .arg = c};
        struct greeting theirs;
        struct tcp_ep *ep;
        struct tp_url u;
        uint64_t session;
        int fd, rc = tpi_url_expect(url, "tcp", &u);

        if (rc < 0)
                return rc;
        fd = inet_connect(url, &u, tcp_socket_tune, deadline_ns, &idle);
        if (fd < 0)
                return fd;
        rc = greet(fd, url, deadline_ns, &idle, &session, &theirs);
        if (rc < 0) {
                close(fd);
                return rc;
        }
        rc = ep_make(ctx, fd, session, &theirs, &ep);
        if (rc < 0)
                return rc;
        rc = ep_join(ep);
        if (rc < 0) {
                ep_free(ep);
                return rc;
        }
        *out = &ep->base;
        return 0;
}

static void tcp_attr(const struct tp_ep *base, struct tp_attr *out)
{
        const struct tcp_ep *ep = container_of(base, const struct tcp_ep, base);

        *out = (struct tp_attr){
            .name = "tcp",
            .msg_max = ep->peer_msg_max,
            .rdma_max = SOFTRMA_BULK_MAX,
            .one_sided = false,
            .emulated = false,
            .driver_copies = 2,
            .expected_latency_ns = 15000,
            .expected_bytes_per_s = 2.5e9,
            .tx_depth = TCP_TX_DEPTH,
        };
        tcp_socket_describe(ep->fd, out);
}

/* ---- memory ---- */

static int mem_add(struct tcp_ep *ep, const struct mem_region *region, bool owned, struct tp_mem **out)
{
        struct tcp_mem *m = calloc(1, sizeof(*m));

        if (!m)
                return err_set(-ENOMEM, "%s: no memory for a registration", ep->base.peer);
        m->base.ep = &ep->base;
        m->base.region = *region;
        m->base.path = "host";
        m->owned = owned;
        LIST_ADD(ep->mems, m);
        *out = &m->base;
        return 0;
}

static size_t map_bytes(size_t len)
{
        return ALIGN_UP(len ? len : 1, (size_t)sysconf(_SC_PAGESIZE));
}

static int tcp_alloc(struct tp_ep *ep, size_t len, struct tp_mem **out)
{
        struct mem_region r;
        void *addr;
        int rc;

        if (len > SOFTRMA_BULK_MAX)
                return err_set(-ENOMEM, "%s: %zu bytes of memory were asked for", ep->peer, len);
        addr = mmap(NULL, map_bytes(len), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (addr == MAP_FAILED)
                return err_set(-ENOMEM, "%s: cannot map %zu bytes: %s", ep->peer, len, strerror(errno));
        r = mem_host_region(addr, len);
        rc = mem_add(tcp_ep_of(ep), &r, true, out);
        if (rc < 0)
                munmap(addr, map_bytes(len));
        return rc;
}

static int tcp_reg(struct tp_ep *ep, const struct mem_region *region, struct tp_mem **out)
{
        if (region->kind != MEM_HOST)
                return err_set(-ENOTSUP, "%s: sockets move host memory only; stage device memory through tp_alloc's",
                               ep->peer);
        return mem_add(tcp_ep_of(ep), region, false, out);
}

static void tcp_free(struct tp_mem *base)
{
        struct tcp_mem *m = container_of(base, struct tcp_mem, base);
        struct tcp_ep *ep = tcp_ep_of(base->ep);

        tcp_forget_mem(ep, base);
        LIST_DEL(ep->mems, m);
        if (m->owned)
                munmap(base->region.addr, map_bytes(base->region.len));
        free(m);
}

static int tcp_export_key(struct tp_mem *mem, size_t off, size_t len, struct tp_key *out)
{
        struct tcp_ep *ep = tcp_ep_of(mem->ep);

        if (!tpi_inside(off, len, mem->region.len))
                return err_set(-ERANGE, "%s: a key for bytes %zu+%zu of memory that has %zu", mem->ep->peer, off, len,
                               mem->region.len);
        return softrma_export(&ep->keys, (uint8_t *)mem->region.addr + off, len, mem, tpi_random(), ep->session, out);
}

static int tcp_import_key(struct tp_ep *base, const struct tp_key *key, uint64_t deadline_ns, struct tp_rmem **out)
{
        struct tcp_ep *ep = tcp_ep_of(base);
        struct softrma_key k;
        struct tcp_rmem *r;
        int rc = softrma_key_read(key, ep->peer_session, &k);

        if (rc < 0)
                return err_trail(rc, "while importing a key from %s", base->peer);
        r = calloc(1, sizeof(*r));
        if (!r)
                return err_set(-ENOMEM, "%s: no memory for an imported key", base->peer);
        r->base.ep = base;
        r->base.len = k.len;
        r->key = k;
        LIST_ADD(ep->rmems, r);
        *out = &r->base;
        return 0;
}

static void tcp_rmem_free(struct tp_rmem *base)
{
        struct tcp_rmem *r = container_of(base, struct tcp_rmem, base);
        struct tcp_ep *ep = tcp_ep_of(base->ep);

        LIST_DEL(ep->rmems, r);
        free(r);
}

/* For fault.c: both kernels see the end of the stream. */
static void tcp_sever(struct tp_ep *base)
{
        shutdown(tcp_ep_of(base)->fd, SHUT_RDWR);
}

const struct tp_ops tp_tcp_ops = {
    .name = "tcp",
    .unavailable = tcp_unavailable,
    .open = tcp_open,
    .close = tcp_close,
    .listen = tcp_listen,
    .listener_close = tcp_listener_close,
    .accept = tcp_accept,
    .connect = tcp_connect,
    .ep_close = tcp_ep_close,
    .attr = tcp_attr,
    .alloc = tcp_alloc,
    .reg = tcp_reg,
    .free = tcp_free,
    .export_key = tcp_export_key,
    .import_key = tcp_import_key,
    .rmem_free = tcp_rmem_free,
    .poll = tcp_poll,
    .fd = tcp_fd,
    .arm = tcp_arm,
    .disarm = tcp_disarm,
    .send = tcp_send,
    .release = tcp_release,
    .write = tcp_write,
    .write_imm = tcp_write_imm,
    .read = tcp_read,
    .cancel = tcp_cancel,
    .sever = tcp_sever,
};
