/*
 * shm, set-up: names, handshake, memory. The hot path is shm_data.c, the layout shm_data.h.
 *
 * A listener is a UNIX socket (SOCK_SEQPACKET: records keep their bounds and their descriptors) in a folder that only we
 * can enter. The connector says HELLO; the acceptor makes one sealed memfd for the connection and hands it over with
 * WELCOME. The socket stays: descriptors of memory and wake-ups travel over it, and its end is the peer's death.
 *
 * Memory from tp_alloc is a sealed memfd of its own, handed over when its first key is exported. The peer maps it when it
 * imports the key. Each region has an epoch word in the segment that its owner steps when the region dies.
 */
#include "shm_data.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/membarrier.h>
#include <poll.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include "clock.h"
#include "err.h"

#define HALF_MAX      64u                  /* connectors that have not said HELLO yet */
#define HALF_NS       (2 * NS_PER_S)       /* and how long they may take */
#define READY_MAX     128u                 /* connections made that nobody has accepted yet */
#define HANDOVER_NS   (50 * NS_PER_MS)     /* how long a full socket may keep us from handing memory over, once */
#define EAGER_MAX     ((uint64_t)64 << 20) /* larger memory is mapped page by page, as it is touched */
#define SWEEP_MAX     64u                  /* sockets in our folder that are looked at when listening */
#define IDLE_AFTER_NS (1 * NS_PER_MS)      /* without an event: nothing happens here at present */
#define IDLE_LOOK_NS  (200 * NS_PER_US)    /* how often sockets are looked at while nothing happens, */
#define BUSY_LOOK_NS  (20 * NS_PER_MS)     /* and while something does */
#define SEALS         (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)

extern const struct tp_ops tp_shm_ops;

struct half { /* a connector that has not said HELLO yet */
        struct shm_watch watch;
        struct shm_listener *listener;
        uint64_t deadline_ns;
        int pid;
        struct half *next;
};

struct shm_listener {
        struct tp_listener base;
        struct shm_watch watch;
        char path[sizeof(((struct sockaddr_un *)0)->sun_path)];
        struct half *halves;
        unsigned n_halves;
        struct shm_ep *ready_first, *ready_last;
        unsigned n_ready;
        struct shm_listener *next;
};

/* ---- names ---- */

static int check_name(const char *url, const char *name)
{
        size_t n = strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-");

        if (name[0] == '\0' || name[n] != '\0' || n > 64 || name[0] == '.')
                return err_set(-EINVAL, "%s: the name is 1 to 64 of A-Z a-z 0-9 . _ - and starts with no dot", url);
        return 0;
}

/* The folder of sockets: under XDG_RUNTIME_DIR, else (or for the second look) under /tmp. */
static int folder_path(bool runtime_dir, char *buf, size_t len)
{
        const char *xdg = getenv("XDG_RUNTIME_DIR");
        int n;

        if (runtime_dir && xdg && xdg[0] == '/' && access(xdg, W_OK | X_OK) == 0)
                n = snprintf(buf, len, "%s/djinnbench", xdg);
        else
                n = snprintf(buf, len, "/tmp/djinnbench-%u", (unsigned)geteuid());
        return n > 0 && (size_t)n < len ? 0 : err_set(-ENAMETOOLONG, "XDG_RUNTIME_DIR is too long a path");
}

/* Opens it and insists that it is a folder, ours, and closed to others. Descriptor or -errno. */
static int open_folder(const char *path)
{
        struct stat st;
        int fd = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);

        if (fd < 0)
                return err_set(-errno, "%s: %s", path, strerror(errno));
        if (fstat(fd, &st) == 0 && st.st_uid == geteuid() && (st.st_mode & 077) == 0)
                return fd;
        close(fd);
        return err_set(-EPERM, "%s: not a folder of ours with mode 0700; remove it or set XDG_RUNTIME_DIR", path);
}

static int socket_address(const char *url, const char *folder, const char *name, struct sockaddr_un *sa)
{
        int n;

        memset(sa, 0, sizeof(*sa));
        sa->sun_family = AF_UNIX;
        n = snprintf(sa->sun_path, sizeof(sa->sun_path), "%s/%s.sock", folder, name);
        if (n < 0 || (size_t)n >= sizeof(sa->sun_path))
                return err_set(-ENAMETOOLONG, "%s: %s/%s.sock is too long for a socket", url, folder, name);
        return 0;
}

/* ---- control records ---- */

/* 0, or -errno; fd -1: none. */
static int ctl_send(int sock, struct shm_ctl c, int fd)
{
        union {
                struct cmsghdr align;
                char buf[CMSG_SPACE(sizeof(int))];
        } u;
        struct iovec iov = {.iov_base = &c, .iov_len = sizeof(c)};
        struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1};

        c.magic = SHM_MAGIC;
        c.version = SHM_VERSION;
        if (fd >= 0) {
                struct cmsghdr *h;

                memset(&u, 0, sizeof(u));
                m.msg_control = u.buf;
                m.msg_controllen = sizeof(u.buf);
                h = CMSG_FIRSTHDR(&m);
                h->cmsg_level = SOL_SOCKET;
                h->cmsg_type = SCM_RIGHTS;
                h->cmsg_len = CMSG_LEN(sizeof(int));
                memcpy(CMSG_DATA(h), &fd, sizeof(fd));
        }
        return sendmsg(sock, &m, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 ? -errno : 0;
}

/* 1 with a record that is whole and ours (and a descriptor or -1), 0: the end, -errno: -EAGAIN, -EPROTO, ... */
static int ctl_recv(int sock, struct shm_ctl *c, int *fd)
{
        union {
                struct cmsghdr align;
                char buf[CMSG_SPACE(sizeof(int))];
        } u;
        struct iovec iov = {.iov_base = c, .iov_len = sizeof(*c)};
        struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = u.buf, .msg_controllen = sizeof(u.buf)};
        struct cmsghdr *h;
        ssize_t n = recvmsg(sock, &m, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);

        *fd = -1;
        if (n < 0)
                return errno == EINTR ? -EAGAIN : -errno;
        h = CMSG_FIRSTHDR(&m);
        if (h && h->cmsg_level == SOL_SOCKET && h->cmsg_type == SCM_RIGHTS && h->cmsg_len == CMSG_LEN(sizeof(int)))
                memcpy(fd, CMSG_DATA(h), sizeof(*fd));
        if (n == 0)
                return 0;
        if (n == sizeof(*c) && !(m.msg_flags & MSG_TRUNC) && c->magic == SHM_MAGIC)
                return 1;
        if (*fd >= 0)
                close(*fd);
        *fd = -1;
        return -EPROTO;
}

/* The other end must be the same user, or root. */
static int check_peer(int sock, int *pid)
{
        struct ucred cred;
        socklen_t len = sizeof(cred);

        if (getsockopt(sock, SOL_SOCKET, SO_PEERCRED, &cred, &len) < 0)
                return -errno;
        *pid = cred.pid;
        return cred.uid == geteuid() || cred.uid == 0 ? 0 : -EPERM;
}

/* ---- sealed memory ---- */

/* A memfd of len bytes whose size can never change again, or -errno. */
static int sealed_memfd(const char *name, uint64_t len)
{
        int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING), rc;

        if (fd < 0)
                return -errno;
        if (ftruncate(fd, (off_t)len) < 0 || fcntl(fd, F_ADD_SEALS, SEALS) < 0) {
                rc = -errno;
                close(fd);
                return rc;
        }
        return fd;
}

/* Page tables of much memory take seconds to fill, in which a thread that serves many would serve nobody. So large memory
 * faults at first touch instead. Its pages are taken in either case. */
static int eager(uint64_t len)
{
        return len <= EAGER_MAX ? MAP_POPULATE : 0;
}

/* Maps what a peer handed over, if it can neither shrink under our feet nor is smaller than it says. */
static void *map_sealed(int fd, uint64_t len, bool must_be_backed)
{
        struct stat st;
        int seals = fcntl(fd, F_GET_SEALS);
        void *p;

        if (seals < 0 || !(seals & F_SEAL_SHRINK) || fstat(fd, &st) < 0 || st.st_size < 0 || (uint64_t)st.st_size < len)
                return NULL;
        if (must_be_backed && (uint64_t)st.st_blocks * 512 < len)
                return NULL;
        p = mmap(NULL, len ? len : 1, PROT_READ | PROT_WRITE, MAP_SHARED | (must_be_backed ? eager(len) : 0), fd, 0);
        return p == MAP_FAILED ? NULL : p;
}

static bool register_membarrier(void)
{
        long cmds = syscall(SYS_membarrier, MEMBARRIER_CMD_QUERY, 0, 0);

        return cmds > 0 && (cmds & MEMBARRIER_CMD_GLOBAL_EXPEDITED) &&
               syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED, 0, 0) == 0;
}

/* ---- endpoints ---- */

static int watch(struct shm_ctx *c, struct shm_watch *w)
{
        struct epoll_event ev = {.events = EPOLLIN, .data.ptr = w};

        return epoll_ctl(c->epfd, EPOLL_CTL_ADD, w->fd, &ev) < 0 ? -errno : 0;
}

static void unwatch(struct shm_ctx *c, struct shm_watch *w)
{
        epoll_ctl(c->epfd, EPOLL_CTL_DEL, w->fd, NULL);
}

/* An endpoint over a mapped segment and a socket; takes both over only when it succeeds. */
static struct shm_ep *ep_new(struct shm_ctx *c, struct shm_segment *seg, unsigned side, int sock, bool peer_membarrier)
{
        struct shm_ep *e = aligned_alloc(CACHE_LINE, ALIGN_UP(sizeof(*e), (size_t)CACHE_LINE));

        if (!e)
                return NULL;
        memset(e, 0, sizeof(*e));
        e->base.ops = &tp_shm_ops;
        e->base.ctx = &c->base;
        e->seg = seg;
        e->side = side;
        e->me = &seg->side[side];
        e->peer = &seg->side[!side];
        e->tx_slots = seg->slots[side];
        e->rx_slots = seg->slots[!side];
        e->tx_bytes = seg->bytes[side];
        e->rx_bytes = seg->bytes[!side];
        e->fenced = !(c->membarrier && peer_membarrier);
        e->watch = (struct shm_watch){SHM_WATCH_EP, sock};
        if (watch(c, &e->watch) < 0) {
                free(e);
                return NULL;
        }
        return e;
}

/* Page faults of the part that every message touches belong to set-up. */
static void touch_segment(struct shm_segment *seg)
{
        madvise(seg, offsetof(struct shm_segment, bytes), MADV_POPULATE_WRITE);
}

static int ctx_add(struct shm_ctx *c, struct shm_ep *e)
{
        if (c->n_eps == c->cap_eps) {
                unsigned cap = c->cap_eps ? 2 * c->cap_eps : 8;
                struct shm_ep **v = realloc(c->eps, cap * sizeof(struct shm_ep *));

                if (!v)
                        return -ENOMEM;
                c->eps = v;
                c->cap_eps = cap;
        }
        c->eps[c->n_eps++] = e;
        return 0;
}

static void theirs_put(struct shm_ep *e, struct shm_theirs *t)
{
        if (!t || --t->refs > 0)
                return;
        if (t->fd >= 0) {
                close(t->fd);
                e->pending_fds--;
        }
        if (t->map) {
                munmap(t->map, t->len ? t->len : 1);
                e->imported_bytes -= t->len;
        }
        free(t);
}

static void mine_drop(struct shm_mem *m)
{
        if (m->fd >= 0) {
                munmap(m->base.region.addr, m->mapped);
                close(m->fd);
        }
        free(m);
}

static void release_region(struct shm_ep *e, const struct shm_mem *m)
{
        e->mine_epoch[m->region] = m->epoch + 1;
        atomic_store_explicit(&e->me->epoch[m->region], m->epoch + 1, memory_order_release);
        e->mine[m->region] = NULL;
}

static void ep_destroy(struct shm_ctx *c, struct shm_ep *e)
{
        struct shm_rmem *rm;

        while ((rm = e->rmems)) {
                e->rmems = rm->next;
                theirs_put(e, rm->theirs);
                free(rm);
        }
        for (unsigned i = 0; i < SHM_REGIONS; i++) {
                struct shm_mem *m = e->mine[i];

                theirs_put(e, e->theirs[i]);
                if (m) {
                        release_region(e, m);
                        mine_drop(m);
                }
        }
        unwatch(c, &e->watch);
        close(e->watch.fd);
        munmap(e->seg, sizeof(*e->seg));
        free(e);
}

void shm_kill(struct shm_ep *e, int status, const char *fmt, ...)
{
        va_list ap;

        if (e->slow & SHM_SLOW_KILLED)
                return;
        va_start(ap, fmt);
        vsnprintf(e->why, sizeof(e->why), fmt, ap);
        va_end(ap);
        e->kill_status = status;
        e->slow |= SHM_SLOW_KILLED;
        shutdown(e->watch.fd, SHUT_RDWR);
}

static void shm_sever(struct tp_ep *ep)
{
        shutdown(shm_ep_of(ep)->watch.fd, SHUT_RDWR);
}

/* A full socket means that wakers have been there already. */
void shm_wake(struct shm_ep *e)
{
        if (atomic_exchange(&e->peer->armed, 0) != 0)
                ctl_send(e->watch.fd, (struct shm_ctl){.type = SHM_CTL_WAKE}, -1);
}

/* ---- what the peer says over the socket ---- */

static void take_mem(struct shm_ep *e, const struct shm_ctl *c, int fd)
{
        struct shm_theirs *t = NULL;

        if (fd >= 0 && c->region < SHM_REGIONS && e->pending_fds < SHM_PENDING_FDS)
                t = malloc(sizeof(*t));
        if (!t) {
                if (fd >= 0)
                        close(fd);
                shm_kill(e, -EPROTO, "the peer handed over region %u without memory or beyond all bounds", c->region);
                return;
        }
        *t = (struct shm_theirs){.refs = 1, .epoch = c->epoch, .fd = fd, .len = c->len};
        e->pending_fds++;
        theirs_put(e, e->theirs[c->region]);
        e->theirs[c->region] = t;
}

static void take_free(struct shm_ep *e, const struct shm_ctl *c)
{
        if (c->region >= SHM_REGIONS || !e->theirs[c->region] || e->theirs[c->region]->epoch != c->epoch)
                return;
        theirs_put(e, e->theirs[c->region]);
        e->theirs[c->region] = NULL;
}

static void hang_up(struct shm_ep *e)
{
        e->slow |= SHM_SLOW_HUP;
        unwatch(shm_ctx_of(e->base.ctx), &e->watch);
}

static void drain(struct shm_ep *e)
{
        struct shm_ctl c;
        int fd, rc;

        while (!(e->slow & SHM_SLOW_HUP)) {
                rc = ctl_recv(e->watch.fd, &c, &fd);
                if (rc == -EAGAIN)
                        return;
                if (rc == -EPROTO)
                        shm_kill(e, -EPROTO, "a control record that is none");
                if (rc <= 0) {
                        hang_up(e);
                        return;
                }
                if (c.type == SHM_CTL_MEM) {
                        take_mem(e, &c, fd);
                        continue;
                }
                if (fd >= 0)
                        close(fd);
                if (c.type == SHM_CTL_FREE)
                        take_free(e, &c);
        }
}

/* ---- accepting ---- */

static void half_drop(struct half *h)
{
        struct half **p;

        for (p = &h->listener->halves; *p != h; p = &(*p)->next)
                ;
        *p = h->next;
        h->listener->n_halves--;
        free(h);
}

static void half_abandon(struct half *h)
{
        unwatch(shm_ctx_of(h->listener->base.ctx), &h->watch);
        close(h->watch.fd);
        half_drop(h);
}

/* One who is not us, or one too many, is closed without a word. */
static void accept_one(struct shm_listener *l, int fd)
{
        struct shm_ctx *c = shm_ctx_of(l->base.ctx);
        struct half *h = NULL;
        int pid;

        if (l->n_halves < HALF_MAX && check_peer(fd, &pid) == 0)
                h = calloc(1, sizeof(*h));
        if (!h) {
                close(fd);
                return;
        }
        h->watch = (struct shm_watch){SHM_WATCH_HALF, fd};
        h->listener = l;
        h->pid = pid;
        h->deadline_ns = clock_ns() + HALF_NS;
        h->next = l->halves;
        l->halves = h;
        l->n_halves++;
        if (watch(c, &h->watch) < 0)
                half_abandon(h);
}

static void accept_all(struct shm_listener *l)
{
        int fd;

        while (l->n_ready < READY_MAX && (fd = accept4(l->watch.fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK)) >= 0)
                accept_one(l, fd);
}

/* The segment, the WELCOME and the endpoint; the connector may already use it before tp_accept returns it. */
static struct shm_ep *welcome(struct shm_ctx *c, int sock, const struct shm_ctl *hello)
{
        struct shm_ctl w = {.type = SHM_CTL_WELCOME,
                            .flags = c->membarrier ? SHM_CTL_MEMBARRIER : 0,
                            .len = sizeof(struct shm_segment),
                            .secret = tpi_random()};
        int fd = sealed_memfd("djinnbench-segment", sizeof(struct shm_segment));
        struct shm_segment *seg = fd < 0 ? NULL : map_sealed(fd, sizeof(*seg), false);
        struct shm_ep *e = NULL;

        if (seg) {
                touch_segment(seg);
                seg->magic = SHM_MAGIC;
                e = ep_new(c, seg, 1, sock, hello->flags & SHM_CTL_MEMBARRIER);
        }
        if (e)
                e->secret = w.secret;
        if (e && ctl_send(sock, w, fd) < 0)
                e->slow |= SHM_SLOW_HUP;
        if (!e && seg)
                munmap(seg, sizeof(*seg));
        if (fd >= 0)
                close(fd);
        return e;
}

static void half_speaks(struct half *h)
{
        struct shm_listener *l = h->listener;
        struct shm_ctx *c = shm_ctx_of(l->base.ctx);
        struct shm_ep *e = NULL;
        struct shm_ctl hello;
        int fd, rc = ctl_recv(h->watch.fd, &hello, &fd);

        if (rc == -EAGAIN)
                return;
        if (fd >= 0)
                close(fd);
        if (rc == 1 && hello.type == SHM_CTL_HELLO && hello.version == SHM_VERSION &&
            hello.len == sizeof(struct shm_segment)) {
                unwatch(c, &h->watch);
                e = welcome(c, h->watch.fd, &hello);
        }
        if (!e) {
                half_abandon(h);
                return;
        }
        snprintf(e->base.peer, sizeof(e->base.peer), "%.200s (process %d)", l->base.url, h->pid);
        half_drop(h);
        *(l->ready_last ? &l->ready_last->next_ready : &l->ready_first) = e;
        l->ready_last = e;
        l->n_ready++;
}

/* ---- looking at sockets ---- */

static void expire_halves(struct shm_ctx *c, uint64_t now)
{
        for (struct shm_listener *l = c->listeners; l; l = l->next)
                for (struct half *h = l->halves, *next; h; h = next) {
                        next = h->next;
                        if (now > h->deadline_ns)
                                half_abandon(h);
                }
}

/* Nothing is freed here but the half that an event is about, and epoll reports each descriptor once. */
void shm_attend(struct shm_ctx *c)
{
        struct epoll_event ev[64];
        int n = epoll_wait(c->epfd, ev, ARRAY_LEN(ev), 0);

        for (int i = 0; i < n; i++) {
                struct shm_watch *w = ev[i].data.ptr;

                switch (w->kind) {
                case SHM_WATCH_LISTENER:
                        accept_all(container_of(w, struct shm_listener, watch));
                        break;
                case SHM_WATCH_HALF:
                        half_speaks(container_of(w, struct half, watch));
                        break;
                case SHM_WATCH_EP:
                        drain(container_of(w, struct shm_ep, watch));
                        break;
                }
        }
        c->attended_ns = clock_ns();
        expire_halves(c, c->attended_ns);
}

/* A peer that sent or released something since the last look is alive: as long as all do, nobody makes a system call. */
static bool somebody_is_silent(struct shm_ctx *c)
{
        bool silent = c->listeners != NULL;

        for (unsigned i = 0; i < c->n_eps; i++) {
                struct shm_ep *e = c->eps[i];
                uint64_t sign = e->rx_next + atomic_load_explicit(&e->peer->head, memory_order_relaxed);

                silent |= sign == e->life_mark;
                e->life_mark = sign;
        }
        return silent;
}

/* Something was sent or came since the last tick. */
static bool is_busy(struct shm_ctx *c)
{
        bool busy = false;

        for (unsigned i = 0; i < c->n_eps; i++) {
                struct shm_ep *e = c->eps[i];
                uint64_t sum = e->rx_next + e->tx_next;

                busy |= sum != e->tick_mark;
                e->tick_mark = sum;
        }
        return busy;
}

void shm_tick(struct shm_ctx *c)
{
        uint64_t now = clock_ns(), every;

        if (is_busy(c))
                c->event_ns = now;
        every = now - c->event_ns < IDLE_AFTER_NS ? BUSY_LOOK_NS : IDLE_LOOK_NS;
        if (!c->attention) {
                if (now - c->attended_ns < every)
                        return;
                c->attended_ns = now;
                if (!somebody_is_silent(c))
                        return;
        }
        c->attention = false;
        shm_attend(c);
}

/* ---- sleeping ---- */

static int shm_fd(struct tp_ctx *ctx)
{
        return shm_ctx_of(ctx)->epfd;
}

void shm_disarm(struct tp_ctx *ctx)
{
        struct shm_ctx *c = shm_ctx_of(ctx);

        for (unsigned i = 0; i < c->n_eps; i++)
                atomic_store_explicit(&c->eps[i]->me->armed, 0, memory_order_relaxed);
        c->armed = false;
        c->attention = true; /* whoever woke us left a record in the socket */
}

static bool news(struct shm_ctx *c)
{
        bool any = false;

        for (struct shm_listener *l = c->listeners; l; l = l->next)
                any |= l->n_ready > 0;
        for (unsigned i = 0; i < c->n_eps; i++)
                any |= shm_ep_has_news(c->eps[i]);
        return any;
}

static int shm_arm(struct tp_ctx *ctx)
{
        struct shm_ctx *c = shm_ctx_of(ctx);

        for (unsigned i = 0; i < c->n_eps; i++) {
                struct shm_ep *e = c->eps[i];

                atomic_store(&e->me->armed, e->starved || e->op.active ? SHM_ARMED_SPACE : SHM_ARMED);
        }
        if (c->membarrier)
                syscall(SYS_membarrier, MEMBARRIER_CMD_GLOBAL_EXPEDITED, 0, 0);
        if (news(c)) {
                shm_disarm(ctx);
                return -EAGAIN;
        }
        c->armed = true;
        for (unsigned i = 0; i < c->n_eps; i++)
                c->eps[i]->base.n.naps++;
        return 0;
}

/* ---- context ---- */

static const char *shm_unavailable(void)
{
        return NULL;
}

static int shm_open_ctx(const char *url, const struct tp_open_opts *opts, struct tp_ctx **out)
{
        struct shm_ctx *c = calloc(1, sizeof(*c));

        if (!c)
                return err_set(-ENOMEM, "shm: no memory for a context");
        c->epfd = epoll_create1(EPOLL_CLOEXEC);
        if (c->epfd < 0) {
                free(c);
                return err_set(-errno, "shm: no epoll descriptor: %s", strerror(errno));
        }
        c->base.ops = &tp_shm_ops;
        c->membarrier = register_membarrier();
        *out = &c->base;
        return 0;
}

static void shm_listener_close(struct tp_listener *tl)
{
        struct shm_listener *l = container_of(tl, struct shm_listener, base), **p;
        struct shm_ctx *c = shm_ctx_of(tl->ctx);
        struct shm_ep *e;

        while (l->halves)
                half_abandon(l->halves);
        while ((e = l->ready_first)) {
                l->ready_first = e->next_ready;
                ep_destroy(c, e);
        }
        unlink(l->path);
        unwatch(c, &l->watch);
        close(l->watch.fd);
        for (p = &c->listeners; *p != l; p = &(*p)->next)
                ;
        *p = l->next;
        free(l);
}

static void shm_close(struct tp_ctx *ctx)
{
        struct shm_ctx *c = shm_ctx_of(ctx);

        while (c->n_eps > 0)
                ep_destroy(c, c->eps[--c->n_eps]);
        while (c->listeners)
                shm_listener_close(&c->listeners->base);
        close(c->epfd);
        free(c->eps);
        free(c);
}

/* ---- listening ---- */

/* A socket that nobody listens on any more is what a killed process left behind. */
static bool is_stale(const struct sockaddr_un *sa)
{
        int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        bool stale = fd >= 0 && connect(fd, (const struct sockaddr *)sa, sizeof(*sa)) < 0 && errno == ECONNREFUSED;

        if (fd >= 0)
                close(fd);
        return stale;
}

static bool is_socket_name(const char *name)
{
        size_t n = strlen(name);

        return n > 5 && !strcmp(name + n - 5, ".sock");
}

/* Removes what others that were killed left behind. Nobody can be between bind and listen: we hold the folder's lock. */
static void sweep_folder(const char *folder)
{
        DIR *d = opendir(folder);
        struct sockaddr_un sa = {.sun_family = AF_UNIX};
        const struct dirent *entry;
        unsigned looked = 0;

        while (d && looked < SWEEP_MAX && (entry = readdir(d))) {
                int n;

                if (!is_socket_name(entry->d_name))
                        continue;
                n = snprintf(sa.sun_path, sizeof(sa.sun_path), "%s/%s", folder, entry->d_name);
                looked++;
                if (n > 0 && (size_t)n < sizeof(sa.sun_path) && is_stale(&sa))
                        unlink(sa.sun_path);
        }
        if (d)
                closedir(d);
}

static int bind_socket(const char *url, const struct sockaddr_un *sa)
{
        int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), rc;

        if (fd < 0)
                return err_set(-errno, "%s: listen: no socket: %s", url, strerror(errno));
        rc = bind(fd, (const struct sockaddr *)sa, sizeof(*sa));
        if (rc < 0 && errno == EADDRINUSE && is_stale(sa)) {
                unlink(sa->sun_path);
                rc = bind(fd, (const struct sockaddr *)sa, sizeof(*sa));
        }
        if (rc < 0 || chmod(sa->sun_path, 0600) < 0 || listen(fd, 128) < 0) {
                rc = -errno;
                close(fd);
                return err_set(rc, "%s: listen on %s: %s", url, sa->sun_path, strerror(-rc));
        }
        return fd;
}

/* Two that start at once must not both take the same socket for stale: a lock on the folder keeps them apart. */
static int listen_in_folder(const char *url, const char *name, struct sockaddr_un *sa)
{
        char folder[sizeof(sa->sun_path)];
        int dir, fd, rc = folder_path(true, folder, sizeof(folder));

        if (rc < 0 || (rc = socket_address(url, folder, name, sa)) < 0)
                return rc;
        if (mkdir(folder, 0700) < 0 && errno != EEXIST)
                return err_set(-errno, "%s: cannot make the folder %s: %s", url, folder, strerror(errno));
        dir = open_folder(folder);
        if (dir < 0)
                return err_trail(dir, "%s: listen", url);
        flock(dir, LOCK_EX);
        sweep_folder(folder);
        fd = bind_socket(url, sa);
        close(dir);
        return fd;
}

static int shm_listen(struct tp_ctx *ctx, const char *url, struct tp_listener **out)
{
        struct shm_ctx *c = shm_ctx_of(ctx);
        struct shm_listener *l;
        struct sockaddr_un sa;
        struct tp_url u;
        int fd, rc;

        rc = tpi_url_expect(url, "shm", &u);
        if (rc < 0 || (rc = check_name(url, u.host)) < 0)
                return rc;
        fd = listen_in_folder(url, u.host, &sa);
        if (fd < 0)
                return fd;
        l = calloc(1, sizeof(*l));
        if (l) {
                l->watch = (struct shm_watch){SHM_WATCH_LISTENER, fd};
                rc = watch(c, &l->watch);
        }
        if (!l || rc < 0) {
                unlink(sa.sun_path);
                close(fd);
                free(l);
                return err_set(-ENOMEM, "%s: listen: no memory", url);
        }
        l->base.ops = &tp_shm_ops;
        l->base.ctx = ctx;
        snprintf(l->base.url, sizeof(l->base.url), "%s", url);
        snprintf(l->path, sizeof(l->path), "%s", sa.sun_path);
        l->next = c->listeners;
        c->listeners = l;
        *out = &l->base;
        return 0;
}

static int shm_accept(struct tp_listener *tl, struct tp_ep **out)
{
        struct shm_listener *l = container_of(tl, struct shm_listener, base);
        struct shm_ep *e = l->ready_first;

        if (!e)
                return -EAGAIN;
        l->ready_first = e->next_ready;
        if (!l->ready_first)
                l->ready_last = NULL;
        l->n_ready--;
        if (ctx_add(shm_ctx_of(tl->ctx), e) < 0) {
                ep_destroy(shm_ctx_of(tl->ctx), e);
                return err_set(-ENOMEM, "%s: accept: no memory", tl->url);
        }
        *out = &e->base;
        return 0;
}

/* ---- connecting ---- */

/* Waits a little for the socket, and meanwhile serves our own listeners: the peer may be this very thread. */
static int wait_a_little(struct shm_ctx *c, int sock, uint64_t deadline_ns)
{
        struct pollfd p = {.fd = sock, .events = POLLIN};

        if (clock_ns() >= deadline_ns)
                return -ETIMEDOUT;
        shm_attend(c);
        poll(&p, sock >= 0, 1);
        return 0;
}

/* A connected socket or -errno. */
static int connect_path(struct shm_ctx *c, const struct sockaddr_un *sa, uint64_t deadline_ns)
{
        int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), rc = 0;

        if (fd < 0)
                return -errno;
        while (rc == 0 && connect(fd, (const struct sockaddr *)sa, sizeof(*sa)) < 0)
                rc = errno == EAGAIN ? wait_a_little(c, -1, deadline_ns) : -errno; /* EAGAIN: the backlog is full */
        if (rc == 0)
                return fd;
        close(fd);
        return rc == -ENOENT ? -ECONNREFUSED : rc;
}

/* The listener may have seen another XDG_RUNTIME_DIR than we do, so both folders are looked into. */
static int connect_name(struct shm_ctx *c, const char *url, const char *name, uint64_t deadline_ns)
{
        struct sockaddr_un sa;
        char folder[sizeof(sa.sun_path)];
        int rc = -ECONNREFUSED;

        for (int runtime_dir = 1; runtime_dir >= 0 && rc == -ECONNREFUSED; runtime_dir--) {
                rc = folder_path(runtime_dir, folder, sizeof(folder));
                if (rc < 0 || (rc = socket_address(url, folder, name, &sa)) < 0)
                        return rc;
                rc = open_folder(folder);
                if (rc < 0) {
                        rc = rc == -ENOENT ? -ECONNREFUSED : rc;
                        continue;
                }
                close(rc);
                rc = connect_path(c, &sa, deadline_ns);
        }
        return rc;
}

/* Says HELLO and waits for WELCOME with the segment: the mapped segment, or NULL and *rc. */
static struct shm_segment *shake_hands(struct shm_ctx *c, int sock, uint64_t deadline_ns, struct shm_ctl *w, int *rc)
{
        struct shm_ctl hello = {
            .type = SHM_CTL_HELLO, .flags = c->membarrier ? SHM_CTL_MEMBARRIER : 0, .len = sizeof(struct shm_segment)};
        struct shm_segment *seg = NULL;
        int fd = -1, pid;

        *rc = check_peer(sock, &pid);
        if (*rc == 0)
                *rc = ctl_send(sock, hello, -1);
        if (*rc < 0)
                return NULL;
        while ((*rc = ctl_recv(sock, w, &fd)) == -EAGAIN)
                if ((*rc = wait_a_little(c, sock, deadline_ns)) < 0)
                        return NULL;
        if (*rc == 1 && w->type == SHM_CTL_WELCOME && w->version == SHM_VERSION && w->len == sizeof(*seg) && fd >= 0)
                seg = map_sealed(fd, sizeof(*seg), false);
        if (fd >= 0)
                close(fd);
        if (!seg)
                *rc = *rc == 0 ? -ECONNRESET : *rc == 1 ? -EPROTO : *rc;
        return seg;
}

static int connect_failed(const char *url, int rc, const char *phase)
{
        switch (rc) {
        case -ECONNREFUSED:
                return err_set(rc, "%s: connect: nothing listens on that name", url);
        case -ETIMEDOUT:
                return err_set(rc, "%s: %s: no answer before the deadline", url, phase);
        case -EPROTO:
                return err_set(rc, "%s: %s: the listener is of another version", url, phase);
        case -EPERM:
                return err_trail(rc, "%s: %s: the socket or its folder is not ours", url, phase);
        default:
                return err_set(rc, "%s: %s: %s", url, phase, strerror(-rc));
        }
}

static int shm_connect(struct tp_ctx *ctx, const char *url, uint64_t deadline_ns, struct tp_ep **out)
{
        struct shm_ctx *c = shm_ctx_of(ctx);
        struct shm_segment *seg;
        struct shm_ep *e;
        struct tp_url u;
        struct shm_ctl w;
        int sock, rc = tpi_url_expect(url, "shm", &u);

        if (rc < 0 || (rc = check_name(url, u.host)) < 0)
                return rc;
        err_clear();
        sock = connect_name(c, url, u.host, deadline_ns);
        if (sock < 0)
                return connect_failed(url, sock, "connect");
        seg = shake_hands(c, sock, deadline_ns, &w, &rc);
        if (!seg) {
                close(sock);
                return connect_failed(url, rc, "handshake");
        }
        touch_segment(seg);
        e = ep_new(c, seg, 0, sock, w.flags & SHM_CTL_MEMBARRIER);
        if (!e || ctx_add(c, e) < 0) {
                if (e) {
                        ep_destroy(c, e);
                } else {
                        munmap(seg, sizeof(*seg));
                        close(sock);
                }
                return err_set(-ENOMEM, "%s: connect: no memory", url);
        }
        e->secret = w.secret;
        snprintf(e->base.peer, sizeof(e->base.peer), "%s", url);
        *out = &e->base;
        return 0;
}

static void shm_ep_close(struct tp_ep *ep)
{
        struct shm_ctx *c = shm_ctx_of(ep->ctx);
        struct shm_ep *e = shm_ep_of(ep);
        unsigned i = 0;

        while (c->eps[i] != e)
                i++;
        c->eps[i] = c->eps[--c->n_eps];
        ep_destroy(c, e);
}

static void shm_attr(const struct tp_ep *ep, struct tp_attr *out)
{
        *out = (struct tp_attr){.name = "shm",
                                .msg_max = SHM_MSG_MAX,
                                .rdma_max = SIZE_MAX,
                                .one_sided = true,
                                .expected_latency_ns = 200,
                                .expected_bytes_per_s = 10e9,
                                .tx_depth = SHM_SLOTS};
}

/* ---- memory of ours ---- */

static int claim_region(struct shm_ep *e, struct shm_mem *m)
{
        for (uint32_t i = 0; i < SHM_REGIONS; i++) {
                if (e->mine[i])
                        continue;
                m->region = i;
                m->epoch = ++e->mine_epoch[i];
                e->mine[i] = m;
                atomic_store_explicit(&e->me->epoch[i], m->epoch, memory_order_release);
                return 0;
        }
        return err_set(-ENOSPC, "%s: %u regions on one connection, no more are allowed", e->base.peer, SHM_REGIONS);
}

static struct shm_mem *mem_new(struct shm_ep *e)
{
        struct shm_mem *m = calloc(1, sizeof(*m));

        if (!m || claim_region(e, m) < 0) {
                free(m);
                return NULL;
        }
        m->fd = -1;
        m->base.ep = &e->base;
        m->base.path = "host";
        return m;
}

/* Pages are taken now, so that no write from either end can meet the end of memory as a signal: a tenth of a second per
 * GB. Clearing and mapping them costs several times that; see eager(). */
static int alloc_pages(struct shm_mem *m, size_t bytes)
{
        void *p;
        int rc;

        m->fd = sealed_memfd("djinnbench-memory", bytes);
        if (m->fd < 0)
                return m->fd;
        if (fallocate(m->fd, 0, 0, (off_t)bytes) < 0 ||
            (p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | eager(bytes), m->fd, 0)) == MAP_FAILED) {
                rc = -errno;
                close(m->fd);
                m->fd = -1;
                return rc;
        }
        m->mapped = bytes;
        m->base.region.addr = p;
        return 0;
}

static int shm_alloc(struct tp_ep *ep, size_t len, struct tp_mem **out)
{
        struct shm_ep *e = shm_ep_of(ep);
        size_t page = (size_t)sysconf(_SC_PAGESIZE), bytes;
        struct shm_mem *m;
        int rc;

        if (!size_add(len ? len : 1, page - 1, &bytes) || bytes > SHM_IMPORT_MAX)
                return err_set(-ENOMEM, "%s: alloc of %zu bytes: at most %llu can be shared", ep->peer, len,
                               (unsigned long long)SHM_IMPORT_MAX);
        bytes &= ~(page - 1);
        m = mem_new(e);
        if (!m)
                return err_trail(-ENOMEM, "alloc of %zu bytes", len);
        rc = alloc_pages(m, bytes);
        if (rc < 0) {
                release_region(e, m);
                free(m);
                return err_set(rc, "%s: alloc of %zu bytes: %s", ep->peer, len, strerror(-rc));
        }
        m->base.region.len = len;
        m->base.region.kind = MEM_HOST;
        m->base.region.device = -1;
        m->base.region.page = page;
        m->base.region.numa = -1;
        m->base.region.fd = m->fd;
        m->base.region.ops = &mem_host_ops;
        *out = &m->base;
        return 0;
}

static int shm_reg(struct tp_ep *ep, const struct mem_region *region, struct tp_mem **out)
{
        struct shm_mem *m;

        if (region->kind != MEM_HOST)
                return err_set(-ENOTSUP,
                               "%s: the processor moves host memory only; stage device memory through tp_alloc's",
                               ep->peer);
        m = mem_new(shm_ep_of(ep));
        if (!m)
                return err_trail(-ENOMEM, "registering %zu bytes", region->len);
        m->base.region = *region;
        m->base.path = "copy";
        snprintf(m->base.why, sizeof(m->base.why),
                 "host: this memory was not allocated by the transport, so the peer cannot map it; "
                 "its bytes go through the segment");
        *out = &m->base;
        return 0;
}

static void shm_free(struct tp_mem *mem)
{
        struct shm_mem *m = container_of(mem, struct shm_mem, base);
        struct shm_ep *e = shm_ep_of(mem->ep);

        release_region(e, m);
        if (m->handed_over) /* if the socket is full the peer keeps a mapping until it closes; the key is dead anyway */
                ctl_send(e->watch.fd, (struct shm_ctl){.type = SHM_CTL_FREE, .region = m->region, .epoch = m->epoch},
                         -1);
        mine_drop(m);
}

/* ---- keys ---- */

/* A peer that lives reads its socket, at the latest when it imports a key, and the socket holds more records than it can
 * leave unread. One that does not read it costs us one short wait, and then its connection. */
static int hand_over(struct shm_ep *e, struct shm_mem *m)
{
        struct shm_ctl c = {.type = SHM_CTL_MEM, .region = m->region, .epoch = m->epoch, .len = m->base.region.len};
        uint64_t deadline = clock_ns() + HANDOVER_NS;
        struct pollfd p = {.fd = e->watch.fd, .events = POLLOUT};
        int rc;

        while ((rc = ctl_send(e->watch.fd, c, m->fd)) == -EAGAIN && clock_ns() < deadline)
                poll(&p, 1, (int)(HANDOVER_NS / NS_PER_MS));
        if (rc == -EAGAIN) {
                rc = -ETIMEDOUT;
                shm_kill(e, rc, "the peer does not read its control socket");
                return err_set(rc, "%s: handing memory over: %s", e->base.peer, e->why);
        }
        m->handed_over = rc == 0;
        return rc < 0 ? err_set(rc, "%s: handing memory over to the peer: %s", e->base.peer, strerror(-rc)) : 0;
}

/* Copied operations carry no key, so the region remembers what its keys opened: the span of all of them. A peer holds
 * the connection's secret and sees whole regions that it maps: nothing finer would keep it out of more. */
static void open_window(struct shm_mem *m, uint64_t off, uint64_t len)
{
        uint64_t end = off + len;

        m->open_off = m->exported && m->open_off < off ? m->open_off : off;
        m->open_end = m->exported && m->open_end > end ? m->open_end : end;
        m->exported = true;
}

/* The word `slot` of a key is the region; its upper half says that only the owner can reach it. */
#define KEY_BY_OWNER (1ull << 32)

static int shm_export_key(struct tp_mem *mem, size_t off, size_t len, struct tp_key *out)
{
        struct shm_mem *m = container_of(mem, struct shm_mem, base);
        struct shm_ep *e = shm_ep_of(mem->ep);
        struct tpi_key k = {.magic = SHM_KEY_MAGIC,
                            .side = e->side,
                            .slot = m->region | (m->fd < 0 ? KEY_BY_OWNER : 0),
                            .epoch = m->epoch,
                            .off = off,
                            .len = len,
                            .serial = tpi_random()};
        int rc;

        if (!tpi_inside(off, len, mem->region.len))
                return err_set(-ERANGE, "%s: key for [%zu, +%zu) of memory of %zu bytes", e->base.peer, off, len,
                               mem->region.len);
        if (m->fd >= 0 && !m->handed_over && (rc = hand_over(e, m)) < 0)
                return rc;
        open_window(m, off, len);
        tpi_key_seal(out, &k, e->secret);
        return 0;
}

/* The region of a key; NULL and *rc else. Its descriptor was sent before the key was made, so it is here or it never
 * comes: nobody waits. */
static struct shm_theirs *find_theirs(struct shm_ep *e, uint32_t region, uint64_t epoch, int *rc)
{
        drain(e);
        if (e->theirs[region] && e->theirs[region]->epoch == epoch)
                return e->theirs[region];
        if (atomic_load_explicit(&e->peer->epoch[region], memory_order_acquire) != epoch)
                *rc = err_set(-ESTALE, "%s: memory key: its region was freed", e->base.peer);
        else if (e->slow & ~SHM_SLOW_OP)
                *rc = err_set(-ENOTCONN, "%s: memory key: the connection is down", e->base.peer);
        else
                *rc = err_set(-EACCES, "%s: memory key: its memory was not handed over", e->base.peer);
        return NULL;
}

static int map_region(struct shm_ep *e, struct shm_theirs *t)
{
        if (t->map)
                return 0;
        if (t->len > SHM_IMPORT_MAX - e->imported_bytes)
                return err_set(-ENOSPC, "%s: memory key: more than %llu bytes of the peer's are mapped", e->base.peer,
                               (unsigned long long)SHM_IMPORT_MAX);
        t->map = map_sealed(t->fd, t->len, true);
        if (!t->map)
                return err_set(-EACCES, "%s: memory key: what was handed over is not sealed memory of %llu bytes",
                               e->base.peer, (unsigned long long)t->len);
        e->imported_bytes += t->len;
        e->pending_fds--;
        close(t->fd);
        t->fd = -1;
        return 0;
}

static int attach(struct shm_ep *e, const struct tpi_key *k, struct shm_rmem *rm)
{
        int rc = 0;
        struct shm_theirs *t = find_theirs(e, rm->region, k->epoch, &rc);

        if (!t)
                return rc;
        if (!tpi_inside(k->off, k->len, t->len))
                return err_set(-EACCES, "%s: memory key: outside its region", e->base.peer);
        rc = map_region(e, t);
        if (rc < 0)
                return rc;
        t->refs++;
        rm->theirs = t;
        rm->addr = t->map + k->off;
        return 0;
}

static int shm_import_key(struct tp_ep *ep, const struct tp_key *key, uint64_t deadline_ns, struct tp_rmem **out)
{
        struct shm_ep *e = shm_ep_of(ep);
        struct shm_rmem *rm;
        struct tpi_key k;
        int rc = tpi_key_open(key, e->secret, SHM_KEY_MAGIC, !e->side, &k);

        if (rc < 0)
                return rc;
        if ((k.slot & ~KEY_BY_OWNER) >= SHM_REGIONS)
                return err_set(-EACCES, "%s: memory key: no such region", ep->peer);
        rm = calloc(1, sizeof(*rm));
        if (!rm)
                return err_set(-ENOMEM, "%s: no memory to import a key", ep->peer);
        rm->base.ep = ep;
        rm->base.len = k.len;
        rm->epoch = k.epoch;
        rm->region = (uint32_t)(k.slot & ~KEY_BY_OWNER);
        rm->off = k.off;
        rc = k.slot & KEY_BY_OWNER ? 0 : attach(e, &k, rm);
        if (rc < 0) {
                free(rm);
                return rc;
        }
        rm->next = e->rmems;
        e->rmems = rm;
        *out = &rm->base;
        return 0;
}

static void shm_rmem_free(struct tp_rmem *rmem)
{
        struct shm_rmem *rm = container_of(rmem, struct shm_rmem, base), **p;
        struct shm_ep *e = shm_ep_of(rmem->ep);

        if (e->op.active && e->op.rmem == rm)
                shm_cancel(rmem->ep, e->op.cookie);
        for (p = &e->rmems; *p != rm; p = &(*p)->next)
                ;
        *p = rm->next;
        theirs_put(e, rm->theirs);
        free(rm);
}

const struct tp_ops tp_shm_ops = {
    .name = "shm",
    .unavailable = shm_unavailable,
    .open = shm_open_ctx,
    .close = shm_close,
    .listen = shm_listen,
    .listener_close = shm_listener_close,
    .accept = shm_accept,
    .connect = shm_connect,
    .ep_close = shm_ep_close,
    .attr = shm_attr,
    .alloc = shm_alloc,
    .reg = shm_reg,
    .free = shm_free,
    .export_key = shm_export_key,
    .import_key = shm_import_key,
    .rmem_free = shm_rmem_free,
    .poll = shm_poll,
    .fd = shm_fd,
    .arm = shm_arm,
    .disarm = shm_disarm,
    .send = shm_send,
    .release = shm_release,
    .write = shm_write,
    .write_imm = shm_write_imm,
    .read = shm_read,
    .cancel = shm_cancel,
    .sever = shm_sever,
};
