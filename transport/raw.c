/*
 * The medium itself. The child is told what to do through a small shared page (control), never on the wire, so that
 * what travels is exactly the payload.
 */
#include "raw.h"

#include <errno.h>
#include <limits.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "clock.h"
#include "err.h"

#define RAW_SLOTS      64u /* of a stream over shared memory */
#define RAW_AREA_LEAST (4u << 20)
#define RAW_CHECK      (1u << 16) /* polls between two looks whether the other process lives */
#define RAW_YIELD      (1u << 12) /* polls before the core is offered to others: both ends may share one */

enum raw_op { RAW_EXCHANGE, RAW_STREAM, RAW_QUIT };

/* A line of its own for each word that one process writes and the other one polls. */
struct raw_line {
        _Alignas(CACHE_LINE) _Atomic uint64_t seq;
};

struct raw_control {
        struct raw_line go;     /* counts the commands given; the rest of the order is valid then */
        struct raw_line answer; /* shm: counts the exchanges answered; stream: messages seen */
        struct raw_line slot[RAW_SLOTS];
        _Alignas(CACHE_LINE) enum raw_op op;
        uint64_t up, down, n;
        unsigned depth;
};

struct raw_pair;

/* One medium: the three things that the two processes do. */
struct raw_medium {
        const char *scheme;
        int (*open)(struct raw_pair *p);             /* before the fork */
        int (*join)(struct raw_pair *p, bool child); /* after it */
        int (*exchange)(struct raw_pair *p, const void *src, size_t up, void *dst, size_t down);
        int (*stream)(struct raw_pair *p, const void *src, size_t size, uint64_t n, unsigned depth);
        int (*serve)(struct raw_pair *p); /* the child; ends with the parent */
};

struct raw_pair {
        const struct raw_medium *medium;
        struct raw_control *c;
        size_t max_bytes, area;
        uint8_t *up, *down; /* shm: shared; tcp: this process's own buffers */
        uint8_t *child_src;
        pid_t child;
        int listen_fd, fd;
        uint64_t seq;
        unsigned polls;
};

static uint8_t *map(size_t bytes, int how)
{
        void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, how | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

        return p == MAP_FAILED ? NULL : p;
}

static size_t area_bytes(const struct raw_pair *p)
{
        return p->max_bytes > RAW_AREA_LEAST ? p->max_bytes : RAW_AREA_LEAST;
}

/* To be called while nothing comes: relaxes, and now and then finds out whether anybody is left. */
static int idle(struct raw_pair *p)
{
        cpu_relax();
        if (++p->polls % RAW_YIELD == 0)
                sched_yield();
        if (p->polls % RAW_CHECK == 0 && p->child > 0 && waitpid(p->child, NULL, WNOHANG) == p->child)
                p->child = -1;
        if (p->child < 0)
                return err_set(-ECONNRESET, "the process at the other end of the raw %s measurement has died",
                               p->medium->scheme);
        return 0;
}

static int wait_seq(struct raw_pair *p, struct raw_line *l, uint64_t seq)
{
        int rc = 0;

        while (!rc && atomic_load_explicit(&l->seq, memory_order_acquire) < seq)
                rc = idle(p);
        p->polls = 0;
        return rc;
}

static void order(struct raw_pair *p, enum raw_op op, uint64_t up, uint64_t down, uint64_t n, unsigned depth)
{
        struct raw_control *c = p->c;

        c->op = op;
        c->up = up;
        c->down = down;
        c->n = n;
        c->depth = depth;
        atomic_store_explicit(&c->go.seq, ++p->seq, memory_order_release);
}

/* ---- shared memory ---- */

static int shm_open_pair(struct raw_pair *p)
{
        p->area = area_bytes(p);
        p->up = map(p->area, MAP_SHARED);
        p->down = map(p->area, MAP_SHARED);
        p->child_src = map(p->area, MAP_PRIVATE);
        return p->up && p->down && p->child_src ? 0 : -ENOMEM;
}

static int shm_join(struct raw_pair *p, bool child)
{
        return 0;
}

static int shm_exchange(struct raw_pair *p, const void *src, size_t up, void *dst, size_t down)
{
        struct raw_control *c = p->c;
        uint64_t answer = atomic_load_explicit(&c->answer.seq, memory_order_relaxed) + 1;
        int rc;

        memcpy(p->up, src, up);
        order(p, RAW_EXCHANGE, up, down, 0, 0);
        rc = wait_seq(p, &c->answer, answer);
        if (rc)
                return rc;
        if (dst)
                memcpy(dst, p->down, down);
        return 0;
}

static unsigned shm_slots(const struct raw_pair *p, size_t size, unsigned depth)
{
        size_t fit = size ? p->area / size : RAW_SLOTS;
        unsigned n = depth < RAW_SLOTS ? depth : RAW_SLOTS;

        return n < fit ? n : (unsigned)fit;
}

static int shm_stream(struct raw_pair *p, const void *src, size_t size, uint64_t n, unsigned depth)
{
        struct raw_control *c = p->c;
        uint64_t base = atomic_load_explicit(&c->answer.seq, memory_order_relaxed);
        unsigned slots = shm_slots(p, size, depth);
        int rc = 0;

        for (unsigned i = 0; i < RAW_SLOTS; i++)
                atomic_store_explicit(&c->slot[i].seq, 0, memory_order_relaxed);
        order(p, RAW_STREAM, size, 0, n, slots);
        for (uint64_t i = 0; i < n && !rc; i++) {
                if (i >= slots)
                        rc = wait_seq(p, &c->answer, base + i - slots + 1);
                memcpy(p->up + i % slots * size, src, size);
                atomic_store_explicit(&c->slot[i % slots].seq, i + 1, memory_order_release);
        }
        return rc ? rc : wait_seq(p, &c->answer, base + n);
}

static void shm_serve_stream(struct raw_pair *p)
{
        struct raw_control *c = p->c;
        uint64_t base = atomic_load_explicit(&c->answer.seq, memory_order_relaxed);

        for (uint64_t i = 0; i < c->n; i++) {
                wait_seq(p, &c->slot[i % c->depth], i + 1);
                atomic_store_explicit(&c->answer.seq, base + i + 1, memory_order_release);
        }
}

static int shm_serve(struct raw_pair *p)
{
        struct raw_control *c = p->c;

        for (uint64_t seq = 1;; seq++) {
                wait_seq(p, &c->go, seq);
                if (c->op == RAW_QUIT)
                        return 0;
                if (c->op == RAW_STREAM) {
                        shm_serve_stream(p);
                        continue;
                }
                memcpy(p->down, p->child_src, c->down);
                atomic_store_explicit(&c->answer.seq, atomic_load_explicit(&c->answer.seq, memory_order_relaxed) + 1,
                                      memory_order_release);
        }
}

/* ---- sockets ---- */

static int tcp_open_pair(struct raw_pair *p)
{
        struct sockaddr_in in = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};

        p->area = area_bytes(p);
        p->up = map(p->area, MAP_PRIVATE);
        p->child_src = map(p->area, MAP_PRIVATE);
        p->listen_fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (!p->up || !p->child_src || p->listen_fd < 0)
                return -ENOMEM;
        if (bind(p->listen_fd, (struct sockaddr *)&in, sizeof(in)) < 0 || listen(p->listen_fd, 1) < 0)
                return -errno;
        return 0;
}

static int tcp_join(struct raw_pair *p, bool child)
{
        struct sockaddr_in in;
        socklen_t len = sizeof(in);
        const int one = 1;

        if (child) {
                p->fd = accept4(p->listen_fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        } else {
                p->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
                if (getsockname(p->listen_fd, (struct sockaddr *)&in, &len) < 0 || p->fd < 0 ||
                    connect(p->fd, (struct sockaddr *)&in, len) < 0)
                        return -errno;
        }
        if (p->fd < 0)
                return -errno;
        close(p->listen_fd);
        p->listen_fd = -1;
        setsockopt(p->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
        return 0;
}

static int socket_error(const struct raw_pair *p, ssize_t n)
{
        if (n < 0 && (errno == EAGAIN || errno == EINTR))
                return 0;
        return err_set(-ECONNRESET, "the process at the other end of the raw %s measurement closed its socket",
                       p->medium->scheme);
}

static int put_all(struct raw_pair *p, const uint8_t *src, size_t len)
{
        int rc = 0;

        while (len && !rc) {
                ssize_t n = send(p->fd, src, len, MSG_NOSIGNAL | MSG_DONTWAIT);

                if (n > 0) {
                        src += n;
                        len -= (size_t)n;
                } else if ((rc = socket_error(p, n)) == 0) {
                        rc = idle(p);
                }
        }
        return rc;
}

/* Waits for the next bytes; returns how many came. */
static int get_some(struct raw_pair *p, uint8_t *dst, size_t max)
{
        for (;;) {
                ssize_t n = recv(p->fd, dst, max < INT_MAX ? max : INT_MAX, MSG_DONTWAIT);
                int rc = n > 0 ? (int)n : socket_error(p, n);

                if (rc)
                        return rc;
                rc = idle(p);
                if (rc)
                        return rc;
        }
}

static int get_all(struct raw_pair *p, uint8_t *dst, size_t len)
{
        while (len) {
                int n = get_some(p, dst, len);

                if (n < 0)
                        return n;
                dst += n;
                len -= (size_t)n;
        }
        return 0;
}

/* A message of no bytes would be nothing at all on a stream: one byte stands for it. */
static size_t on_wire(size_t len)
{
        return len ? len : 1;
}

static int tcp_exchange(struct raw_pair *p, const void *src, size_t up, void *dst, size_t down)
{
        int rc;

        order(p, RAW_EXCHANGE, up, down, 0, 0);
        rc = put_all(p, up ? src : p->up, on_wire(up));
        return rc ? rc : get_all(p, dst && down ? dst : p->up, on_wire(down));
}

/* The child confirms every half window, and the end. */
static uint64_t stream_batch(unsigned depth)
{
        return depth > 1 ? depth / 2 : 1;
}

static int tcp_stream(struct raw_pair *p, const void *src, size_t size, uint64_t n, unsigned depth)
{
        uint64_t batch = stream_batch(depth), confirmed = 0;
        uint8_t ack;
        int rc = 0;

        order(p, RAW_STREAM, size, 0, n, depth);
        for (uint64_t i = 0; i < n && !rc; i++) {
                while (!rc && i - confirmed >= depth) {
                        rc = get_all(p, &ack, 1);
                        confirmed += batch;
                }
                if (!rc)
                        rc = put_all(p, size ? src : p->up, on_wire(size));
        }
        while (!rc && confirmed < n) {
                rc = get_all(p, &ack, 1);
                confirmed += batch;
        }
        return rc;
}

/* got: bytes of it that have been read already. The stream is confirmed by counting its bytes, read in pieces as large
 * as they come. */
static int tcp_serve_stream(struct raw_pair *p, uint64_t got)
{
        uint64_t size = on_wire(p->c->up), total = p->c->n * size, step = stream_batch(p->c->depth) * size;
        uint64_t confirmed = 0;
        int rc = 0;

        for (;;) {
                while (!rc && confirmed < total && (got - confirmed >= step || got == total)) {
                        rc = put_all(p, p->child_src, 1);
                        confirmed = total - confirmed < step ? total : confirmed + step;
                }
                if (rc || got == total)
                        return rc;
                rc = get_some(p, p->up, total - got < p->area ? total - got : p->area);
                if (rc < 0)
                        return rc;
                got += (uint64_t)rc;
                rc = 0;
        }
}

/* The first bytes of an order's payload say that there is an order; what it is stands in the control page by then. */
static int tcp_serve(struct raw_pair *p)
{
        for (uint64_t seq = 1;; seq++) {
                struct raw_control *c = p->c;
                int rc = get_some(p, p->up, p->area);

                if (rc < 0 || atomic_load_explicit(&c->go.seq, memory_order_acquire) < seq)
                        return rc;
                if (c->op == RAW_STREAM) {
                        rc = tcp_serve_stream(p, (uint64_t)rc);
                } else {
                        rc = get_all(p, p->up + rc, on_wire(c->up) - (size_t)rc);
                        rc = rc ? rc : put_all(p, p->child_src, on_wire(c->down));
                }
                if (rc)
                        return rc;
        }
}

static const struct raw_medium media[] = {
    {"shm", shm_open_pair, shm_join, shm_exchange, shm_stream, shm_serve},
    {"tcp", tcp_open_pair, tcp_join, tcp_exchange, tcp_stream, tcp_serve},
};

/* ---- both ---- */

/* Nothing of the parent's stays open in the child: a connection that the parent closes must be seen to close. */
static void keep_only(int fd)
{
#ifdef SYS_close_range
        if (fd > 3)
                syscall(SYS_close_range, 3u, (unsigned)fd - 1, 0);
        syscall(SYS_close_range, fd >= 3 ? (unsigned)fd + 1 : 3u, ~0u, 0);
#endif
}

static _Noreturn void child_main(struct raw_pair *p, pid_t parent, int cpu)
{
        cpu_set_t set;

        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != parent)
                _exit(1);
        if (cpu >= 0) {
                CPU_ZERO(&set);
                CPU_SET((unsigned)cpu, &set);
                sched_setaffinity(0, sizeof(set), &set);
        }
        keep_only(p->listen_fd);
        _exit(p->medium->join(p, true) == 0 && p->medium->serve(p) == 0 ? 0 : 1);
}

static void pair_free(struct raw_pair *p)
{
        if (p->fd >= 0)
                close(p->fd);
        if (p->listen_fd >= 0)
                close(p->listen_fd);
        if (p->up)
                munmap(p->up, p->area);
        if (p->down)
                munmap(p->down, p->area);
        if (p->child_src)
                munmap(p->child_src, p->area);
        if (p->c)
                munmap(p->c, sizeof(*p->c));
        free(p);
}

static const struct raw_medium *find_medium(const char *scheme)
{
        for (size_t i = 0; i < ARRAY_LEN(media); i++)
                if (!strcmp(media[i].scheme, scheme))
                        return &media[i];
        return NULL;
}

int raw_open(const char *scheme, size_t max_bytes, int cpu_peer, struct raw_pair **out)
{
        const struct raw_medium *m = find_medium(scheme);
        struct raw_pair *p;
        pid_t parent = getpid();
        int rc;

        if (!m)
                return err_set(-ENOTSUP, "there is no raw measurement of %s, only of shm and tcp", scheme);
        p = calloc(1, sizeof(*p));
        if (!p)
                return err_set(-ENOMEM, "no memory for a raw measurement");
        p->medium = m;
        p->max_bytes = max_bytes;
        p->fd = p->listen_fd = -1;
        p->c = (struct raw_control *)map(sizeof(*p->c), MAP_SHARED);
        rc = p->c ? m->open(p) : -ENOMEM;
        if (rc == 0 && (p->child = fork()) < 0)
                rc = -errno;
        if (rc == 0 && p->child == 0)
                child_main(p, parent, cpu_peer);
        if (rc == 0 && (rc = m->join(p, false)) < 0) {
                raw_close(p);
                return err_set(rc, "raw %s: cannot reach the other process: %s", scheme, strerror(-rc));
        }
        if (rc < 0) {
                pair_free(p);
                return err_set(rc, "raw %s: cannot start: %s", scheme, strerror(-rc));
        }
        *out = p;
        return 0;
}

int64_t raw_exchange(struct raw_pair *p, const void *src, size_t up, void *dst, size_t down)
{
        uint64_t t0;
        int rc;

        BUG_ON(up > p->max_bytes || down > p->max_bytes);
        t0 = clock_ns();
        rc = p->medium->exchange(p, src, up, dst, down);
        return rc ? rc : (int64_t)(clock_ns() - t0);
}

int64_t raw_stream(struct raw_pair *p, const void *src, size_t size, uint64_t n, unsigned depth)
{
        uint64_t t0;
        int rc;

        BUG_ON(size > p->max_bytes || depth == 0);
        t0 = clock_ns();
        rc = p->medium->stream(p, src, size, n, depth);
        return rc ? rc : (int64_t)(clock_ns() - t0);
}

void raw_close(struct raw_pair *p)
{
        if (p->child > 0) {
                order(p, RAW_QUIT, 0, 0, 0, 0);
                kill(p->child, SIGKILL);
                waitpid(p->child, NULL, 0);
        }
        pair_free(p);
}
