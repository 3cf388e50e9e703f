/*
 * raw over tcp: one bare connection between non-blocking sockets that never sleep. A message is one send(2), and is
 * received by as few recv(2) as it takes, in pieces as large as they come, where it belongs: an exchange into the
 * caller's memory or a buffer, a stream into a ring of as many slots as there may be messages in flight. What arrives is
 * counted, not framed.
 *
 * Who offers listens, on an address of the URL's host that the other end can reach, and tells it with a secret; who
 * answers connects and sends the secret first, so that a stranger at that port is not taken for the other end.
 */
#include <arpa/inet.h>
#include <assert.h>
#include <endian.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "clock.h"
#include "err.h"
#include "inet.h"
#include "inside.h"
#include "raw_inside.h"
#include "tcp_socket.h"
#include "transport.h"

#define RING_LEAST  (256u << 10) /* a stream of small messages is received in pieces of up to so much, too */
#define SPINS       512          /* calls in vain before the rest of the world is looked at */
#define STRANGER_NS (1 * NS_PER_S)
#define DISCARD     9 /* a port number for a socket that will never send */

struct tcp_blob { /* little endian */
        uint8_t address[16];
        uint8_t family; /* 4 or 6 */
        uint8_t zero;
        uint16_t port;
        uint32_t scope; /* of a link-local address: the same on one host only */
        uint64_t secret;
};

static_assert(sizeof(struct tcp_blob) == 32, "wire layout");
static_assert(sizeof(struct tcp_blob) <= RAW_BLOB_BYTES, "a blob's room");

struct tcp_end {
        struct raw_end base; /* first */
        int listen_fd, fd;
        uint64_t secret;
        uint8_t *ring, *src;
        size_t ring_bytes, src_bytes;
        size_t touched; /* of the ring: pages that are there */
};

static struct tcp_end *end_of(struct raw_end *e)
{
        return (struct tcp_end *)e;
}

static const char *tcp_unavailable(void)
{
        return NULL;
}

/* ---- ends ---- */

static void tcp_end_free(struct raw_end *base)
{
        struct tcp_end *e = end_of(base);

        if (e->fd >= 0)
                close(e->fd);
        if (e->listen_fd >= 0)
                close(e->listen_fd);
        if (e->ring)
                munmap(e->ring, e->ring_bytes);
        if (e->src)
                munmap(e->src, e->src_bytes);
        free(e);
}

static uint8_t *map(size_t bytes, int how)
{
        void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | how, -1, 0);

        return p == MAP_FAILED ? NULL : p;
}

static int end_new(const struct raw_opts *o, struct tcp_end **out)
{
        struct tcp_end *e = calloc(1, sizeof(*e));
        size_t ring;

        if (e) {
                e->fd = e->listen_fd = -1;
                if (!__builtin_mul_overflow(o->max_bytes, (size_t)o->depth, &ring)) {
                        e->ring_bytes = ring > RING_LEAST ? ring : RING_LEAST;
                        e->src_bytes = o->max_bytes;
                        e->ring = map(e->ring_bytes, MAP_NORESERVE);
                        e->src = map(e->src_bytes, MAP_POPULATE);
                }
                if (e->ring && e->src) {
                        *out = e;
                        return 0;
                }
                tcp_end_free(&e->base);
        }
        return err_set(-ENOMEM, "raw tcp: no memory for %u messages of %zu bytes", o->depth, o->max_bytes);
}

/* ---- addresses ---- */

union address {
        struct sockaddr any;
        struct sockaddr_in in;
        struct sockaddr_in6 in6;
        struct sockaddr_storage room;
};

static socklen_t address_bytes(const union address *a)
{
        return a->any.sa_family == AF_INET6 ? sizeof(a->in6) : sizeof(a->in);
}

static bool address_is_any(const union address *a)
{
        return a->any.sa_family == AF_INET6 ? IN6_IS_ADDR_UNSPECIFIED(&a->in6.sin6_addr)
                                            : a->in.sin_addr.s_addr == htonl(INADDR_ANY);
}

/* The host of a URL, "*" for every address of this host, 127.0.0.1 where none is named. The port is any. */
static int resolve(const char *url, union address *out)
{
        struct tp_url u = {.scheme = "tcp", .host = "127.0.0.1"};
        int rc = strstr(url, "://") ? tp_url_parse(url, &u) : 0;
        struct addrinfo *ai;

        if (rc < 0)
                return rc;
        strcpy(u.port, "0");
        rc = inet_resolve(url, &u, !strcmp(u.host, "*"), &ai);
        if (rc < 0)
                return rc;
        memset(out, 0, sizeof(*out));
        memcpy(&out->room, ai->ai_addr, ai->ai_addrlen);
        freeaddrinfo(ai);
        return 0;
}

static void address_pack(const union address *a, struct tcp_blob *b)
{
        if (a->any.sa_family == AF_INET6) {
                b->family = 6;
                memcpy(b->address, &a->in6.sin6_addr, 16);
                b->port = htole16(ntohs(a->in6.sin6_port));
                b->scope = htole32(a->in6.sin6_scope_id);
        } else {
                b->family = 4;
                memcpy(b->address, &a->in.sin_addr, 4);
                b->port = htole16(ntohs(a->in.sin_port));
        }
}

/* Where to connect to. An end that listens on every address of its host names none: then it is our URL's. Interfaces
 * have numbers of their own on each host: that of a link-local address is taken from our URL, where it has one. */
static int address_unpack(const struct tcp_blob *b, const char *url, union address *a)
{
        uint16_t port = htons(le16toh(b->port));
        union address ours;
        int rc = 0;

        memset(a, 0, sizeof(*a));
        if (b->family == 6) {
                a->in6 = (struct sockaddr_in6){.sin6_family = AF_INET6, .sin6_scope_id = le32toh(b->scope)};
                memcpy(&a->in6.sin6_addr, b->address, 16);
        } else if (b->family == 4) {
                a->in.sin_family = AF_INET;
                memcpy(&a->in.sin_addr, b->address, 4);
        } else {
                return err_set(-EPROTO, "raw %s: the other end's offer is no offer of a connection over tcp", url);
        }
        if (address_is_any(a))
                rc = resolve(url, a);
        else if (b->family == 6 && IN6_IS_ADDR_LINKLOCAL(&a->in6.sin6_addr) && resolve(url, &ours) == 0 &&
                 ours.any.sa_family == AF_INET6 && ours.in6.sin6_scope_id)
                a->in6.sin6_scope_id = ours.in6.sin6_scope_id;
        if (a->any.sa_family == AF_INET6)
                a->in6.sin6_port = port;
        else
                a->in.sin_port = port;
        return rc;
}

/* The address of ours from which packets go to a. */
static int address_facing(union address *a)
{
        int fd = socket(a->any.sa_family, SOCK_DGRAM | SOCK_CLOEXEC, 0), rc = 0;
        socklen_t len = sizeof(*a);

        if (fd < 0)
                return -errno;
        a->in.sin_port = htons(DISCARD); /* at the same place for both families */
        if (connect(fd, &a->any, address_bytes(a)) < 0 || getsockname(fd, &a->any, &len) < 0)
                rc = -errno;
        a->in.sin_port = 0;
        close(fd);
        return rc;
}

static_assert(offsetof(struct sockaddr_in, sin_port) == offsetof(struct sockaddr_in6, sin6_port), "address_facing");

/* ---- meeting ---- */

static int listen_at(struct tcp_end *e, union address *a)
{
        socklen_t len = sizeof(*a);
        int rc = 0;

        e->listen_fd = socket(a->any.sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        if (e->listen_fd < 0)
                return -errno;
        tcp_socket_tune(e->listen_fd);
        if (bind(e->listen_fd, &a->any, address_bytes(a)) < 0) {
                if (errno != EADDRNOTAVAIL)
                        return -errno;
                rc = address_facing(a); /* the URL names the other end's host */
                if (rc == 0 && bind(e->listen_fd, &a->any, address_bytes(a)) < 0)
                        rc = -errno;
        }
        if (rc == 0 && (listen(e->listen_fd, 8) < 0 || getsockname(e->listen_fd, &a->any, &len) < 0))
                rc = -errno;
        return rc;
}

static int tcp_offer(const struct raw_opts *o, struct raw_blob *offer, struct raw_end **out)
{
        struct tcp_blob b = {0};
        struct tcp_end *e;
        union address a;
        int rc = end_new(o, &e);

        if (rc < 0)
                return rc;
        rc = resolve(o->url, &a);
        if (rc == 0 && (rc = listen_at(e, &a)) < 0)
                err_set(rc, "raw %s: cannot listen: %s", o->url, strerror(-rc));
        if (rc < 0) {
                tcp_end_free(&e->base);
                return rc;
        }
        e->secret = tpi_random();
        b.secret = htole64(e->secret);
        address_pack(&a, &b);
        memcpy(offer->bytes, &b, sizeof(b));
        *out = &e->base;
        return 0;
}

static int connect_to(int fd, const union address *a, uint64_t deadline_ns)
{
        int rc = 0, error = 0;
        socklen_t len = sizeof(error);

        tcp_socket_tune(fd);
        if (connect(fd, &a->any, address_bytes(a)) < 0 && errno != EINPROGRESS)
                return -errno;
        rc = inet_wait(fd, POLLOUT, deadline_ns, NULL);
        if (rc == 0 && getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &len) < 0)
                rc = -errno;
        if (rc == 0 && error == 0)
                tcp_socket_connected(fd);
        return rc ? rc : -error;
}

static int tcp_answer(const struct raw_opts *o, const struct raw_blob *offer, struct raw_blob *answer,
                      struct raw_end **out)
{
        struct tcp_blob b;
        struct tcp_end *e;
        union address a;
        int rc = end_new(o, &e);

        if (rc < 0)
                return rc;
        memcpy(&b, offer->bytes, sizeof(b));
        rc = address_unpack(&b, o->url, &a);
        if (rc == 0) {
                e->fd = socket(a.any.sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
                rc = e->fd < 0 ? -errno : connect_to(e->fd, &a, clock_ns() + o->stall_ns);
                if (rc == 0 && send(e->fd, &b.secret, sizeof(b.secret), MSG_NOSIGNAL) != sizeof(b.secret))
                        rc = -ECONNRESET;
                if (rc < 0)
                        err_set(rc, "raw %s: cannot connect to port %u of the other end: %s", o->url, le16toh(b.port),
                                strerror(-rc));
        }
        if (rc < 0) {
                tcp_end_free(&e->base);
                return rc;
        }
        memcpy(answer->bytes, &b.secret, sizeof(b.secret));
        *out = &e->base;
        return 0;
}

/* Takes the next connection if it is the other end's, else throws it away. */
static int take_one(struct tcp_end *e, uint64_t deadline_ns)
{
        uint64_t secret = 0, patience = clock_ns() + STRANGER_NS;
        int fd = accept4(e->listen_fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);

        if (fd < 0)
                return errno == EAGAIN || errno == EINTR || errno == ECONNABORTED ? -EAGAIN : -errno;
        if (inet_wait(fd, POLLIN, patience < deadline_ns ? patience : deadline_ns, NULL) == 0 &&
            recv(fd, &secret, sizeof(secret), 0) == sizeof(secret) && le64toh(secret) == e->secret) {
                tcp_socket_connected(fd);
                e->fd = fd;
                return 0;
        }
        close(fd);
        return -EAGAIN;
}

static int tcp_settle(struct raw_end *base, const struct raw_blob *answer)
{
        struct tcp_end *e = end_of(base);
        uint64_t deadline = clock_ns() + base->o.stall_ns, secret;
        int rc = -EAGAIN;

        memcpy(&secret, answer->bytes, sizeof(secret));
        if (le64toh(secret) != e->secret)
                return err_set(-EPROTO, "raw %s: the answer is to another offer", base->o.url);
        while (rc == -EAGAIN) {
                rc = inet_wait(e->listen_fd, POLLIN, deadline, NULL);
                rc = rc ? rc : take_one(e, deadline);
        }
        if (rc < 0)
                return err_set(rc, "raw %s: the other end's connection does not come: %s", base->o.url, strerror(-rc));
        close(e->listen_fd);
        e->listen_fd = -1;
        return 0;
}

/* ---- bytes ---- */

static __attribute__((cold, noinline)) int broken(struct tcp_end *e, ssize_t n)
{
        if (n < 0 && (errno == EAGAIN || errno == EINTR))
                return 0;
        return err_set(-ECONNRESET, "raw %s: the other end closed the connection%s%s", e->base.o.url, n < 0 ? ": " : "",
                       n < 0 ? strerror(errno) : "");
}

static __attribute__((cold, noinline)) int put_slowly(struct tcp_end *e, const uint8_t *src, size_t len)
{
        int rc = 0;

        while (len && !rc) {
                ssize_t n = send(e->fd, src, len, MSG_NOSIGNAL);

                if (n > 0) {
                        raw_moved(&e->base);
                        src += n;
                        len -= (size_t)n;
                } else if ((rc = broken(e, n)) == 0) {
                        rc = raw_idle(&e->base);
                }
        }
        return rc;
}

static inline int put_all(struct tcp_end *e, const uint8_t *src, size_t len)
{
        ssize_t n = send(e->fd, src, len, MSG_NOSIGNAL);

        if (n == (ssize_t)len)
                return 0;
        return n > 0 ? put_slowly(e, src + n, len - (size_t)n) : put_slowly(e, src, len);
}

/* Waits for the next bytes; how many came, at most max. */
static inline ssize_t get_some(struct tcp_end *e, uint8_t *dst, size_t max)
{
        for (unsigned vain = 0;; vain++) {
                ssize_t n = recv(e->fd, dst, max, 0);
                int rc;

                if (n > 0) {
                        raw_moved(&e->base);
                        return n;
                }
                if (n == 0 || vain >= SPINS || errno != EAGAIN) {
                        rc = broken(e, n);
                        rc = rc ? rc : raw_idle(&e->base);
                        if (rc)
                                return rc;
                }
        }
}

static inline int get_all(struct tcp_end *e, uint8_t *dst, size_t len)
{
        while (len) {
                ssize_t n = get_some(e, dst, len);

                if (n < 0)
                        return (int)n;
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

/* What a first touch costs is not the medium's: pages are there before they are measured. */
static void touch(struct tcp_end *e, size_t bytes)
{
        for (; e->touched < bytes; e->touched += 4096)
                ((volatile uint8_t *)e->ring)[e->touched] = 0;
}

/* ---- orders ---- */

static int drive_exchange(struct tcp_end *e, const struct raw_order *o, const void *src, void *dst,
                          struct hist *round_trips)
{
        size_t up = on_wire(o->up), down = on_wire(o->down);
        const uint8_t *from = o->up ? src : e->src;
        uint8_t *to = dst && o->down ? dst : e->ring;
        uint64_t t0, t1;
        int rc = 0;

        touch(e, down);
        e->base.started_ns = clock_ns();
        t0 = clock_stamp();
        for (uint64_t i = 0; i < o->n && !rc; i++) {
                rc = put_all(e, from, up);
                rc = rc ? rc : get_all(e, to, down);
                if (round_trips) {
                        t1 = clock_stamp();
                        hist_add(round_trips, clock_stamp_ns(t0, t1));
                        t0 = t1;
                }
        }
        return rc;
}

static int serve_exchange(struct tcp_end *e, const struct raw_order *o)
{
        size_t up = on_wire(o->up), down = on_wire(o->down);
        int rc = 0;

        touch(e, up);
        for (uint64_t i = 0; i < o->n && !rc; i++) {
                rc = get_all(e, e->ring, up);
                rc = rc ? rc : put_all(e, e->src, down);
        }
        return rc;
}

static unsigned slots_of(const struct raw_order *o)
{
        return o->slots && o->slots < o->depth ? o->slots : o->depth;
}

/* One byte confirms a batch of messages: every half window, and what is left at the end. */
static uint64_t batch_of(const struct raw_order *o)
{
        return o->depth > 1 ? o->depth / 2 : 1;
}

static int get_confirmations(struct tcp_end *e, uint64_t batch, uint64_t *confirmed)
{
        uint8_t ack[64];
        ssize_t n = get_some(e, ack, sizeof(ack));

        if (n < 0)
                return (int)n;
        *confirmed += batch * (uint64_t)n;
        return 0;
}

static int drive_stream(struct tcp_end *e, const struct raw_order *o, const void *src)
{
        uint64_t batch = batch_of(o), confirmed = 0;
        const uint8_t *first = o->up ? src : e->src, *from = first;
        size_t size = on_wire(o->up);
        unsigned slots = slots_of(o), at = 0;
        int rc = 0;

        e->base.started_ns = clock_ns();
        for (uint64_t i = 0; i < o->n && !rc; i++) {
                while (!rc && i - confirmed >= o->depth)
                        rc = get_confirmations(e, batch, &confirmed);
                rc = rc ? rc : put_all(e, from, size);
                at = at + 1 == slots ? 0 : at + 1;
                from = first + at * o->src_stride;
        }
        while (!rc && confirmed < o->n)
                rc = get_confirmations(e, batch, &confirmed);
        return rc;
}

/* Bytes of the ring that a stream uses: a whole number of rounds, so that no message lies across its end. */
static size_t ring_of(const struct raw_order *o)
{
        size_t window = on_wire(o->up) * slots_of(o);

        return window < RING_LEAST ? RING_LEAST / window * window : window;
}

static int serve_stream(struct tcp_end *e, const struct raw_order *o)
{
        uint64_t size = on_wire(o->up), total = o->n * size, step = batch_of(o) * size, got = 0, confirmed = 0;
        size_t ring = ring_of(o), at = 0;
        int rc = 0;

        touch(e, ring);
        while (!rc && got < total) {
                ssize_t n = get_some(e, e->ring + at, total - got < ring - at ? (size_t)(total - got) : ring - at);

                if (n < 0)
                        return (int)n;
                got += (uint64_t)n;
                at = at + (size_t)n == ring ? 0 : at + (size_t)n;
                while (!rc && confirmed < total && (got - confirmed >= step || got == total)) {
                        rc = put_all(e, e->src, 1);
                        confirmed = total - confirmed < step ? total : confirmed + step;
                }
        }
        return rc;
}

static int tcp_serve(struct raw_end *base, const struct raw_order *o)
{
        return o->shape == RAW_STREAM ? serve_stream(end_of(base), o) : serve_exchange(end_of(base), o);
}

static int tcp_drive(struct raw_end *base, const struct raw_order *o, const void *src, void *dst,
                     struct hist *round_trips)
{
        struct tcp_end *e = end_of(base);

        return o->shape == RAW_STREAM ? drive_stream(e, o, src) : drive_exchange(e, o, src, dst, round_trips);
}

const struct raw_medium raw_tcp_medium = {
    .scheme = "tcp",
    .unavailable = tcp_unavailable,
    .offer = tcp_offer,
    .answer = tcp_answer,
    .settle = tcp_settle,
    .serve = tcp_serve,
    .drive = tcp_drive,
    .free = tcp_end_free,
};
