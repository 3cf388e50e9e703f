#include "inet.h"

#include <errno.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "clock.h"
#include "err.h"

static int unknown(const char *url, const char *host, int rc)
{
        const char *zone = strchr(host, '%');

        if (rc == EAI_SYSTEM)
                return err_set(-errno, "%s: cannot resolve '%s': %s", url, host, strerror(errno));
        if (zone && !if_nametoindex(zone + 1))
                return err_set(-EHOSTUNREACH, "%s: this host has no interface '%s'%s", url, zone + 1,
                               strncmp(zone, "%25", 3) ? "" : "; a '%' stands for itself here");
        return err_set(-EHOSTUNREACH, "%s: cannot resolve '%s': %s", url, host, gai_strerror(rc));
}

int inet_resolve(const char *url, const struct tp_url *u, bool passive, struct addrinfo **out)
{
        struct addrinfo hints = {.ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM};
        const char *host = passive && !strcmp(u->host, "*") ? NULL : u->host;
        int rc;

        if (!u->port[0])
                return err_set(-EINVAL, "%s: no port, expected %s://host:port%s", url, u->scheme,
                               passive ? " (port 0: any free one)" : "");
        hints.ai_flags = AI_NUMERICSERV | (passive ? AI_PASSIVE : 0);
        rc = getaddrinfo(host, u->port, &hints, out);
        return rc ? unknown(url, u->host, rc) : 0;
}

void inet_tune(int fd)
{
        const int one = 1, idle_s = 2, interval_s = 1, probes = 3;

        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
        setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof(one));
        setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle_s, sizeof(idle_s));
        setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval_s, sizeof(interval_s));
        setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof(probes));
}

/* ---- listening ---- */

static int listen_on(const struct addrinfo *ai, int backlog, void (*tune)(int fd))
{
        const int one = 1;
        int fd = socket(ai->ai_family, ai->ai_socktype | SOCK_NONBLOCK | SOCK_CLOEXEC, ai->ai_protocol);

        if (fd < 0)
                return -errno;
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
        tune(fd);
        if (bind(fd, ai->ai_addr, ai->ai_addrlen) < 0 || listen(fd, backlog) < 0) {
                int rc = -errno;

                close(fd);
                return rc;
        }
        return fd;
}

int inet_listen(const char *url, const struct tp_url *u, int backlog, void (*tune)(int fd))
{
        struct addrinfo *ai;
        int fd = -EADDRNOTAVAIL, rc = inet_resolve(url, u, true, &ai);

        if (rc < 0)
                return rc;
        for (struct addrinfo *a = ai; a && fd < 0; a = a->ai_next)
                fd = listen_on(a, backlog, tune);
        freeaddrinfo(ai);
        return fd < 0 ? err_set(fd, "%s: cannot listen: %s", url, strerror(-fd)) : fd;
}

/* ---- connecting ---- */

int inet_wait(int fd, short events, uint64_t deadline_ns, const struct inet_idle *idle)
{
        struct pollfd p[2] = {{.fd = fd, .events = events}, {.fd = idle ? idle->fd : -1, .events = POLLIN}};

        for (;;) {
                uint64_t now = clock_ns(), left_ms;

                if (now >= deadline_ns)
                        return -ETIMEDOUT;
                left_ms = (deadline_ns - now) / NS_PER_MS + 1;
                if (poll(p, 2, left_ms < 100 ? (int)left_ms : 100) < 0 && errno != EINTR)
                        return -errno;
                if (p[0].revents)
                        return 0;
                if (p[1].revents)
                        idle->progress(idle->arg);
        }
}

static int connect_to(const struct addrinfo *ai, void (*tune)(int fd), uint64_t deadline_ns,
                      const struct inet_idle *idle)
{
        int fd = socket(ai->ai_family, ai->ai_socktype | SOCK_NONBLOCK | SOCK_CLOEXEC, ai->ai_protocol);
        int rc = 0, error = 0;
        socklen_t len = sizeof(error);

        if (fd < 0)
                return -errno;
        tune(fd);
        if (connect(fd, ai->ai_addr, ai->ai_addrlen) < 0 && errno != EINPROGRESS)
                rc = -errno;
        if (!rc)
                rc = inet_wait(fd, POLLOUT, deadline_ns, idle);
        if (!rc && getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &len) == 0)
                rc = -error;
        if (!rc)
                return fd;
        close(fd);
        return rc;
}

int inet_connect(const char *url, const struct tp_url *u, void (*tune)(int fd), uint64_t deadline_ns,
                 const struct inet_idle *idle)
{
        struct addrinfo *ai;
        int fd = -EADDRNOTAVAIL, rc = inet_resolve(url, u, false, &ai);

        if (rc < 0)
                return rc;
        for (struct addrinfo *a = ai; a && fd < 0; a = a->ai_next)
                fd = connect_to(a, tune, deadline_ns, idle);
        freeaddrinfo(ai);
        if (fd == -ECONNREFUSED)
                return err_set(fd, "%s: nothing listens there", url);
        return fd < 0 ? err_set(fd, "%s: cannot connect: %s", url, strerror(-fd)) : fd;
}

/* ---- who it is ---- */

void inet_url(const struct sockaddr *a, const char *scheme, char out[TP_URL_MAX])
{
        char host[NI_MAXHOST] = "?", port[NI_MAXSERV] = "0";
        bool v6 = a->sa_family == AF_INET6;

        getnameinfo(a, v6 ? sizeof(struct sockaddr_in6) : sizeof(struct sockaddr_in), host, sizeof(host), port,
                    sizeof(port), NI_NUMERICHOST | NI_NUMERICSERV);
        snprintf(out, TP_URL_MAX, v6 ? "%s://[%.100s]:%.8s" : "%s://%.100s:%.8s", scheme, host, port);
}

void inet_peer_url(int fd, const char *scheme, char out[TP_URL_MAX])
{
        struct sockaddr_storage a = {0};
        socklen_t len = sizeof(a);

        getpeername(fd, (struct sockaddr *)&a, &len);
        inet_url((struct sockaddr *)&a, scheme, out);
}

/* An address to listen on that means "every one of this host" is no address to connect to: say loopback. */
void inet_listener_url(int fd, const char *scheme, char out[TP_URL_MAX])
{
        struct sockaddr_storage a = {0};
        struct sockaddr_in6 *in6 = (void *)&a;
        struct sockaddr_in *in = (void *)&a;
        socklen_t len = sizeof(a);

        getsockname(fd, (struct sockaddr *)&a, &len);
        if (a.ss_family == AF_INET6 && IN6_IS_ADDR_UNSPECIFIED(&in6->sin6_addr))
                in6->sin6_addr = in6addr_loopback;
        else if (a.ss_family == AF_INET && in->sin_addr.s_addr == htonl(INADDR_ANY))
                in->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        inet_url((struct sockaddr *)&a, scheme, out);
}
