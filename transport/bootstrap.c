#include "bootstrap.h"

#include <endian.h>
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "clock.h"
#include "err.h"
#include "log.h"

#define BOOT_VERSION  1
#define BOOT_HALF_MAX 64u
#define BOOT_HALF_NS  (5 * NS_PER_S)
#define BOOT_BACKLOG  256
#define BOOT_AGAIN_NS (100 * NS_PER_MS) /* how long a listener rests that has no descriptor for a connection */
#define BOOT_TELL_NS  (60 * NS_PER_S)

static const char boot_magic[8] = "djinnBTS";

struct boot_head { /* on the wire, little endian */
        char magic[8];
        uint16_t version;
        uint16_t kind;
        uint32_t protocol;
        uint32_t len;
        uint32_t status; /* the positive errno */
        uint64_t count;
};

_Static_assert(sizeof(struct boot_head) == BOOT_HEAD_BYTES, "wire layout");
_Static_assert(offsetof(struct boot_head, protocol) == 12, "wire layout");
_Static_assert(offsetof(struct boot_head, count) == 24, "wire layout");

/* ---- frames ---- */

int boot_send(int fd, uint32_t protocol, enum boot_kind kind, int status, uint64_t count, const void *payload,
              size_t len)
{
        struct {
                struct boot_head head;
                uint8_t payload[BOOT_PAYLOAD_MAX];
        } out = {.head = {.version = htole16(BOOT_VERSION),
                          .kind = htole16((uint16_t)kind),
                          .protocol = htole32(protocol),
                          .len = htole32((uint32_t)len),
                          .status = htole32((uint32_t)-status),
                          .count = htole64(count)}};

        BUG_ON(len > BOOT_PAYLOAD_MAX);
        memcpy(out.head.magic, boot_magic, sizeof(boot_magic));
        if (len > 0)
                memcpy(out.payload, payload, len);
        len += BOOT_HEAD_BYTES;
        return send(fd, &out, len, MSG_NOSIGNAL | MSG_DONTWAIT) == (ssize_t)len ? 0 : -EPIPE;
}

/* What came from somebody whom we need not trust: no control characters on the user's terminal. */
static void printable(char *out, const void *from, size_t len)
{
        const char *in = from;

        for (size_t i = 0; i < len; i++)
                out[i] = in[i] >= ' ' && in[i] <= '~' ? in[i] : '?';
        out[len] = '\0';
}

static int head_check(const struct boot_head *h, uint32_t protocol, const char *peer)
{
        uint32_t status = le32toh(h->status);
        char other[sizeof(h->protocol) + 1];

        if (le16toh(h->version) != BOOT_VERSION)
                return err_set(-EPROTO, "%s: the peer speaks version %u of the bootstrap, this program version %u",
                               peer, le16toh(h->version), BOOT_VERSION);
        printable(other, &h->protocol, sizeof(h->protocol));
        if (le32toh(h->protocol) != protocol)
                return err_set(-EPROTO, "%s: a djinnbench listens there, but for another transport (%s)", peer, other);
        if (!h->kind || le16toh(h->kind) >= BOOT_KINDS || le32toh(h->len) > BOOT_PAYLOAD_MAX || status > 4095)
                return err_set(-EPROTO, "%s: sent a frame that no version sends", peer);
        return 0;
}

static int not_ours(const char *peer)
{
        return err_set(-EPROTO, "%s: what is there does not speak djinnbench's bootstrap", peer);
}

static size_t min_size(size_t a, size_t b)
{
        return a < b ? a : b;
}

int boot_receive(int fd, uint32_t protocol, struct boot_reader *r, const char *peer, struct boot_frame *out)
{
        struct boot_head h;

        for (;;) {
                size_t want = BOOT_HEAD_BYTES;
                ssize_t n;

                if (r->have >= BOOT_HEAD_BYTES) {
                        int rc;

                        memcpy(&h, r->bytes, sizeof(h));
                        rc = head_check(&h, protocol, peer);
                        if (rc < 0)
                                return rc;
                        want += le32toh(h.len);
                        if (r->have == want)
                                break;
                }
                n = recv(fd, r->bytes + r->have, want - r->have, MSG_DONTWAIT);
                if (n < 0)
                        return errno == EAGAIN || errno == EINTR ? 0 : -errno;
                if (n == 0)
                        return -EPIPE;
                r->have += (size_t)n;
                if (memcmp(r->bytes, boot_magic, min_size(r->have, sizeof(boot_magic))) != 0)
                        return not_ours(peer);
        }
        r->have = 0;
        out->kind = (enum boot_kind)le16toh(h.kind);
        out->status = -(int)le32toh(h.status);
        out->count = le64toh(h.count);
        out->len = le32toh(h.len);
        memcpy(out->payload, r->bytes + BOOT_HEAD_BYTES, out->len);
        return 1;
}

/* ---- connecting ---- */

static int refused(const char *url, const struct boot_frame *f)
{
        char text[BOOT_PAYLOAD_MAX + 1];

        printable(text, f->payload, f->len);
        return err_set(f->status ? f->status : -ECONNREFUSED, "%s: the peer refused the connection: %s", url, text);
}

int boot_exchange(int fd, const char *url, uint32_t protocol, const void *hello, size_t len, uint64_t deadline_ns,
                  const struct inet_idle *idle, struct boot_frame *answer)
{
        struct boot_reader r = {.have = 0};
        int rc = boot_send(fd, protocol, BOOT_HELLO, 0, 0, hello, len);

        while (rc == 0) {
                rc = inet_wait(fd, POLLIN, deadline_ns, idle);
                if (rc < 0)
                        return err_set(rc, "%s: connected, but no answer to the greeting came: %s", url, strerror(-rc));
                rc = boot_receive(fd, protocol, &r, url, answer);
        }
        if (rc == -EPROTO)
                return rc;
        if (rc < 0)
                return err_set(-ECONNRESET,
                               "%s: the peer closed the connection instead of greeting; is it a djinnbench server?",
                               url);
        if (answer->kind == BOOT_REFUSE)
                return refused(url, answer);
        if (answer->kind != BOOT_ANSWER)
                return err_set(-EPROTO, "%s: greeted with frame %d where an answer was expected", url, answer->kind);
        return 0;
}

/* ---- listening ---- */

struct boot_half {
        int fd; /* -1: free */
        uint64_t deadline_ns;
        void *made; /* once HELLO was answered */
        bool answered;
        struct boot_reader in;
};

/* Its epoll set holds the socket (tag 0), the timer (tag 1) and the half-made connections (tag 2 + index). */
struct boot_listener {
        struct boot_serve serve;
        int fd, epfd, timerfd;
        bool deaf;
        uint64_t again_ns, told_ns; /* 0: it does not rest; when the user was last told why it does */
        struct boot_half half[BOOT_HALF_MAX];
};

enum { TAG_SOCKET, TAG_TIMER, TAG_HALF };

static int join(int epfd, int fd, uint64_t tag)
{
        struct epoll_event e = {.events = EPOLLIN, .data.u64 = tag};

        return epoll_ctl(epfd, EPOLL_CTL_ADD, fd, &e) < 0 ? -errno : 0;
}

static void listener_free(struct boot_listener *l)
{
        if (l->fd >= 0)
                close(l->fd);
        if (l->epfd >= 0)
                close(l->epfd);
        if (l->timerfd >= 0)
                close(l->timerfd);
        free(l);
}

int boot_listen(const char *url, const struct tp_url *u, const struct boot_serve *serve, struct boot_listener **out)
{
        int fd = inet_listen(url, u, BOOT_BACKLOG, inet_tune), rc;
        struct boot_listener *l;

        if (fd < 0)
                return fd;
        l = calloc(1, sizeof(*l));
        if (!l) {
                close(fd);
                return err_set(-ENOMEM, "%s: no memory for a listener", url);
        }
        l->serve = *serve;
        l->fd = fd;
        for (unsigned i = 0; i < BOOT_HALF_MAX; i++)
                l->half[i].fd = -1;
        l->epfd = epoll_create1(EPOLL_CLOEXEC);
        l->timerfd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
        if (l->epfd < 0 || l->timerfd < 0 || join(l->epfd, fd, TAG_SOCKET) < 0 ||
            join(l->epfd, l->timerfd, TAG_TIMER) < 0) {
                rc = err_set(-errno, "%s: cannot listen: %s", url, strerror(errno));
                listener_free(l);
                return rc;
        }
        *out = l;
        return 0;
}

int boot_listener_fd(const struct boot_listener *l)
{
        return l->epfd;
}

void boot_listener_url(const struct boot_listener *l, char out[TP_URL_MAX])
{
        inet_listener_url(l->fd, l->serve.scheme, out);
}

static void half_drop(struct boot_listener *l, struct boot_half *h)
{
        close(h->fd); /* epoll forgets it with that */
        h->fd = -1;
        if (h->answered)
                l->serve.drop(l->serve.arg, h->made);
}

void boot_listener_close(struct boot_listener *l)
{
        for (unsigned i = 0; i < BOOT_HALF_MAX; i++)
                if (l->half[i].fd >= 0)
                        half_drop(l, &l->half[i]);
        listener_free(l);
}

static void timer_set(struct boot_listener *l, uint64_t at_ns)
{
        struct itimerspec t = {.it_value = {.tv_sec = (time_t)(at_ns / NS_PER_S), .tv_nsec = (long)(at_ns % NS_PER_S)}};

        timerfd_settime(l->timerfd, TFD_TIMER_ABSTIME, &t, NULL);
}

static struct boot_half *half_slot(struct boot_listener *l)
{
        struct boot_half *oldest = &l->half[0];

        for (unsigned i = 0; i < BOOT_HALF_MAX; i++) {
                if (l->half[i].fd < 0)
                        return &l->half[i];
                if (l->half[i].deadline_ns < oldest->deadline_ns)
                        oldest = &l->half[i];
        }
        log_debug("%s: %u connections have not greeted yet; the oldest is dropped", l->serve.scheme, BOOT_HALF_MAX);
        half_drop(l, oldest);
        return oldest;
}

static void half_begin(struct boot_listener *l, int fd)
{
        struct boot_half *h = half_slot(l);

        *h = (struct boot_half){.fd = fd, .deadline_ns = clock_ns() + BOOT_HALF_NS};
        if (join(l->epfd, fd, TAG_HALF + (uint64_t)(h - l->half)) < 0) {
                close(fd);
                h->fd = -1;
                return;
        }
        timer_set(l, h->deadline_ns); /* late for older ones, which does no harm: see halves_expire */
}

static int half_refuse(struct boot_listener *l, struct boot_half *h, int rc)
{
        const char *why = err_str(rc);

        boot_send(h->fd, l->serve.protocol, BOOT_REFUSE, rc, 0, why, strnlen(why, BOOT_PAYLOAD_MAX));
        log_debug("%s: refused a connection: %s", l->serve.scheme, why);
        return rc;
}

static int half_hello(struct boot_listener *l, struct boot_half *h, const struct boot_frame *f)
{
        uint8_t answer[BOOT_PAYLOAD_MAX];
        size_t len = 0;
        int rc = l->serve.hello(l->serve.arg, h->fd, f, answer, &len, &h->made);

        if (rc < 0)
                return half_refuse(l, h, rc);
        h->answered = true;
        return boot_send(h->fd, l->serve.protocol, BOOT_ANSWER, 0, 0, answer, len);
}

static void half_progress(struct boot_listener *l, struct boot_half *h)
{
        char peer[TP_URL_MAX];
        struct boot_frame f;
        int rc;

        if (h->fd < 0)
                return;
        inet_peer_url(h->fd, l->serve.scheme, peer);
        rc = boot_receive(h->fd, l->serve.protocol, &h->in, peer, &f);
        if (rc == 0)
                return;
        if (rc == -EPROTO)
                half_refuse(l, h, rc);
        if (rc > 0 && !h->answered && f.kind == BOOT_HELLO) {
                rc = half_hello(l, h, &f);
                if (rc == 0)
                        return;
        } else if (rc > 0 && h->answered && f.kind == BOOT_READY) {
                int fd = h->fd;

                epoll_ctl(l->epfd, EPOLL_CTL_DEL, fd, NULL);
                h->fd = -1;
                l->serve.ready(l->serve.arg, fd, h->made);
                return;
        }
        half_drop(l, h);
}

/* The timer is set for the youngest; each time that it fires it is set for the oldest that is left. */
static void halves_expire(struct boot_listener *l)
{
        uint64_t now = clock_ns(), next = UINT64_MAX, ticks;

        if (read(l->timerfd, &ticks, sizeof(ticks)) < 0 && errno == EAGAIN)
                return;
        if (l->again_ns > now)
                next = l->again_ns;
        else
                l->again_ns = 0; /* boot_listener_progress hears again */
        for (unsigned i = 0; i < BOOT_HALF_MAX; i++) {
                struct boot_half *h = &l->half[i];

                if (h->fd < 0)
                        continue;
                if (h->deadline_ns <= now)
                        half_drop(l, h);
                else if (h->deadline_ns < next)
                        next = h->deadline_ns;
        }
        if (next != UINT64_MAX)
                timer_set(l, next);
}

static void hear(struct boot_listener *l, bool more)
{
        struct epoll_event e = {.events = more ? EPOLLIN : 0, .data.u64 = TAG_SOCKET};

        if (l->deaf != more)
                return;
        epoll_ctl(l->epfd, EPOLL_CTL_MOD, l->fd, &e);
        l->deaf = !more;
}

/* The connection stays in the kernel's queue, where it would wake us again and again. */
static void rest(struct boot_listener *l, int error)
{
        uint64_t now = clock_ns();

        if (error != EMFILE && error != ENFILE && error != ENOBUFS && error != ENOMEM)
                return;
        if (!l->told_ns || now - l->told_ns > BOOT_TELL_NS) {
                l->told_ns = now;
                log_warn("%s: cannot accept a connection: %s; those who connect wait until there is room",
                         l->serve.scheme, strerror(error));
        }
        l->again_ns = now + BOOT_AGAIN_NS;
        hear(l, false);
        timer_set(l, l->again_ns);
}

static void take_new(struct boot_listener *l)
{
        for (unsigned i = 0; i < BOOT_HALF_MAX; i++) {
                int fd = accept4(l->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);

                if (fd < 0) {
                        rest(l, errno);
                        return;
                }
                half_begin(l, fd);
        }
}

void boot_listener_progress(struct boot_listener *l, bool more)
{
        struct epoll_event got[16];
        int n;

        hear(l, more && l->again_ns == 0);
        n = epoll_wait(l->epfd, got, ARRAY_LEN(got), 0);
        for (int i = 0; i < n; i++) {
                if (got[i].data.u64 == TAG_SOCKET)
                        take_new(l);
                else if (got[i].data.u64 == TAG_TIMER)
                        halves_expire(l);
                else
                        half_progress(l, &l->half[got[i].data.u64 - TAG_HALF]);
        }
        hear(l, more && l->again_ns == 0);
}
