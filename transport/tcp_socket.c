#include <ifaddrs.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

#include "inet.h"
#include "tcp_socket.h"

#define SOCKBUF (4 << 20)

static bool host_allows(const char *limit_file, long bytes)
{
        FILE *f = fopen(limit_file, "re");
        long limit = 0;

        if (!f)
                return false;
        if (fscanf(f, "%ld", &limit) != 1)
                limit = 0;
        fclose(f);
        return limit >= bytes;
}

/*
 * Setting a buffer's size ends the kernel's own tuning of it, so it is set only where the host's limit lets it become
 * large at once; elsewhere the kernel grows it as the transfer goes on.
 */
void tcp_socket_tune(int fd)
{
        const int size = SOCKBUF;

        inet_tune(fd);
        if (host_allows("/proc/sys/net/core/wmem_max", size))
                setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
        if (host_allows("/proc/sys/net/core/rmem_max", size))
                setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof(size));
}

static bool same_host(const struct sockaddr_storage *a, const struct sockaddr_storage *b)
{
        const struct sockaddr_in6 *a6 = (const void *)a, *b6 = (const void *)b;
        const struct sockaddr_in *a4 = (const void *)a, *b4 = (const void *)b;

        if (a->ss_family == AF_INET6)
                return !memcmp(&a6->sin6_addr, &b6->sin6_addr, sizeof(a6->sin6_addr)) &&
                       a6->sin6_scope_id == b6->sin6_scope_id; /* link-local ones are the interface's alone */
        return a->ss_family == AF_INET && a4->sin_addr.s_addr == b4->sin_addr.s_addr;
}

void tcp_socket_connected(int fd)
{
        static const char plain[] = "reno"; /* part of every kernel, and allowed to everybody */
        struct sockaddr_storage ours = {0}, theirs = {0};
        socklen_t n = sizeof(ours), m = sizeof(theirs);

        if (getsockname(fd, (struct sockaddr *)&ours, &n) == 0 &&
            getpeername(fd, (struct sockaddr *)&theirs, &m) == 0 && same_host(&ours, &theirs))
                setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, plain, sizeof(plain) - 1);
}

/* ---- the device below ---- */

static bool is_ours(const struct ifaddrs *i, const struct sockaddr_storage *ours)
{
        return i->ifa_addr && i->ifa_addr->sa_family == ours->ss_family && same_host((const void *)i->ifa_addr, ours);
}

/* The interface that has the address; packets between two ends on one host never leave it, whosever address it is. */
static void find_netdev(int fd, char *out, size_t room)
{
        struct sockaddr_storage ours = {0}, theirs = {0};
        socklen_t n = sizeof(ours), m = sizeof(theirs);
        struct ifaddrs *all;

        if (getsockname(fd, (struct sockaddr *)&ours, &n) < 0 || getpeername(fd, (struct sockaddr *)&theirs, &m) < 0)
                return;
        if (same_host(&ours, &theirs)) {
                snprintf(out, room, "lo");
                return;
        }
        if (getifaddrs(&all) < 0)
                return;
        for (const struct ifaddrs *i = all; i && !out[0]; i = i->ifa_next)
                if (is_ours(i, &ours))
                        snprintf(out, room, "%s", i->ifa_name);
        freeifaddrs(all);
}

/* A number that the kernel tells of an interface, or otherwise. */
static long netdev_number(const char *netdev, const char *what, long otherwise)
{
        char path[128];
        long value;
        FILE *f;

        snprintf(path, sizeof(path), "/sys/class/net/%.31s/%s", netdev, what);
        f = fopen(path, "re");
        if (!f)
                return otherwise;
        if (fscanf(f, "%ld", &value) != 1)
                value = otherwise;
        fclose(f);
        return value;
}

void tcp_socket_describe(int fd, struct tp_attr *out)
{
        char control[32] = "?";
        int segment = 0;
        socklen_t n = sizeof(segment), m = sizeof(control) - 1;
        long mbits;

        getsockopt(fd, IPPROTO_TCP, TCP_MAXSEG, &segment, &n);
        getsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, control, &m);
        find_netdev(fd, out->netdev, sizeof(out->netdev));
        out->mtu = segment > 0 ? (uint32_t)segment : 0;
        out->numa = out->netdev[0] ? (int)netdev_number(out->netdev, "device/numa_node", -1) : -1;
        mbits = out->netdev[0] ? netdev_number(out->netdev, "speed", 0) : 0;
        out->link_bits_per_s = mbits > 0 ? (double)mbits * 1e6 : 0;
        snprintf(out->detail, sizeof(out->detail), "congestion control %s, segments of %d bytes", control, segment);
}
