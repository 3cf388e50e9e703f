/*
 * rdma, devices and addresses: which device and port a URL means, which GID a connection uses, and what is known about
 * the device for reports.
 */
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <netdb.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "err.h"
#include "rdma_private.h"

#define VENDOR_SOFT_ROCE  0xffffffu
#define VENDOR_SOFT_IWARP 0x626d74u
#define GIDS_MAX          256

/* ---- what there is ---- */

static bool port_active(const char *dev)
{
        char path[320], line[32] = "";
        bool active = false;
        struct dirent *e;
        DIR *d;

        snprintf(path, sizeof(path), "/sys/class/infiniband/%s/ports", dev);
        d = opendir(path);
        while (d && !active && (e = readdir(d))) {
                char file[600];
                FILE *f;

                if (e->d_name[0] == '.')
                        continue;
                snprintf(file, sizeof(file), "%s/%s/state", path, e->d_name);
                f = fopen(file, "re");
                active = f && fgets(line, sizeof(line), f) && strstr(line, "ACTIVE");
                if (f)
                        fclose(f);
        }
        if (d)
                closedir(d);
        return active;
}

const char *rdma_unavailable(void)
{
        int n = 0;
        struct ibv_device **list = ibv_get_device_list(&n);
        bool active = false;

        for (int i = 0; list && i < n && !active; i++)
                active = port_active(ibv_get_device_name(list[i]));
        if (list)
                ibv_free_device_list(list);
        if (n == 0 && access("/sys/class/infiniband", F_OK) == 0)
                return "no RDMA device: load the adapter's driver (modprobe mlx5_ib, ...), or make an emulated one on "
                       "a "
                       "network interface: rdma link add rxe0 type rxe netdev eth0 (as root); libibverbs needs the "
                       "device's provider too (package ibverbs-providers)";
        if (n == 0)
                return "no RDMA device: this kernel has no RDMA drivers loaded (modprobe ib_uverbs and the adapter's, "
                       "or "
                       "rdma_rxe and `rdma link add rxe0 type rxe netdev eth0`, as root)";
        if (!active)
                return "no port of an RDMA device is active: see `rdma link` and the state of its network interface or "
                       "cable";
        return NULL;
}

/* ---- URL ---- */

static const struct {
        const char *key;
        size_t offset;
        int min, max;
} int_keys[] = {
    {"gid", offsetof(struct rdma_url, gid), 0, 65535},
    {"qps", offsetof(struct rdma_url, qps), 1, RDMA_QPS_MAX},
    {"mtu", offsetof(struct rdma_url, mtu), 256, 4096},
    {"tc", offsetof(struct rdma_url, tc), 0, 255},
    {"sl", offsetof(struct rdma_url, sl), 0, 15},
    {"window", offsetof(struct rdma_url, window), RDMA_WINDOW_MIN, RDMA_WINDOW_LIMIT},
    {"msg", offsetof(struct rdma_url, msg), TP_MSG_MAX_LEAST, RDMA_MSG_LIMIT},
    {"timeout", offsetof(struct rdma_url, timeout), 8, 22},
};

#define KNOWN_KEYS                                                                                     \
        "dev=NAME[/PORT], gid=INDEX, qps=1..16, mtu=256..4096, tc=0..255, sl=0..15, window=16..1024, " \
        "msg=4096..1048576, timeout=8..22, cm=0|1"

static int read_int(const char *url, size_t key, const char *text, struct rdma_url *out)
{
        char *end;
        long v;

        errno = 0;
        v = strtol(text, &end, 10);
        if (errno || end == text || *end || v < int_keys[key].min || v > int_keys[key].max)
                return err_set(-EINVAL, "%s: %s=%s, expected a number from %d to %d", url, int_keys[key].key, text,
                               int_keys[key].min, int_keys[key].max);
        *(int *)((char *)out + int_keys[key].offset) = (int)v;
        return 0;
}

static int read_pair(const char *url, const char *pair, size_t len, struct rdma_url *out)
{
        size_t klen = strcspn(pair, "=&");
        char value[64];

        if (klen >= len || len - klen - 1 >= sizeof(value))
                return err_set(-EINVAL, "%s: '%.*s' is no parameter of rdma; it knows " KNOWN_KEYS, url, (int)len,
                               pair);
        memcpy(value, pair + klen + 1, len - klen - 1);
        value[len - klen - 1] = '\0';
        for (size_t i = 0; i < ARRAY_LEN(int_keys); i++)
                if (strlen(int_keys[i].key) == klen && !memcmp(int_keys[i].key, pair, klen))
                        return read_int(url, i, value, out);
        if (klen == 3 && !memcmp(pair, "dev", 3)) {
                if (!value[0] || strlen(value) >= sizeof(out->dev))
                        return err_set(-EINVAL, "%s: dev=%s, expected a device such as mlx5_0 or mlx5_0/1", url, value);
                strcpy(out->dev, value);
                return 0;
        }
        if (klen == 2 && !memcmp(pair, "cm", 2)) {
                if (strcmp(value, "0") != 0 && strcmp(value, "1") != 0)
                        return err_set(-EINVAL, "%s: cm=%s, expected 0 or 1", url, value);
                out->cm = value[0] == '1';
                return 0;
        }
        return err_set(-EINVAL, "%s: '%.*s' is no parameter of rdma; it knows " KNOWN_KEYS, url, (int)klen, pair);
}

void rdma_url_default(struct rdma_url *out)
{
        *out = (struct rdma_url){.gid = -1, .qps = 1, .timeout = 14};
}

int rdma_url_read(const char *url, const struct tp_url *u, struct rdma_url *out)
{
        for (const char *p = u->query; *p;) {
                size_t n = strcspn(p, "&");
                int rc = n ? read_pair(url, p, n, out) : 0;

                if (rc < 0)
                        return rc;
                p += n + (p[n] == '&');
        }
        if (out->mtu && (out->mtu & (out->mtu - 1)))
                return err_set(-EINVAL, "%s: mtu=%d, expected 256, 512, 1024, 2048 or 4096", url, out->mtu);
        if (out->cm && out->qps > 1)
                return err_set(-EINVAL, "%s: cm=1 makes connections of one queue pair; leave out qps=%d or cm=1", url,
                               out->qps);
        return 0;
}

/* ---- GIDs ---- */

unsigned rdma_mtu_bytes(enum ibv_mtu mtu)
{
        return 128u << mtu;
}

enum ibv_mtu rdma_mtu_of(int bytes)
{
        enum ibv_mtu m = IBV_MTU_256;

        while (m < IBV_MTU_4096 && (int)rdma_mtu_bytes(m) < bytes)
                m++;
        return m;
}

bool rdma_gid_is_v4(const union ibv_gid *gid)
{
        static const uint8_t mapped[12] = {[10] = 0xff, [11] = 0xff};

        return !memcmp(gid->raw, mapped, sizeof(mapped));
}

static bool is_link_local(const union ibv_gid *g)
{
        return g->raw[0] == 0xfe && (g->raw[1] & 0xc0) == 0x80;
}

static bool read_line(const char *path, char *buf, size_t len)
{
        FILE *f = fopen(path, "re");
        bool ok = f && fgets(buf, (int)len, f);

        if (f)
                fclose(f);
        if (ok)
                buf[strcspn(buf, "\n")] = '\0';
        return ok && buf[0];
}

/* The kernel's table, read through sysfs: an ioctl for it came with later kernels than some in use. */
static bool gid_at(const struct rdma_port *p, int index, struct rdma_gid *out)
{
        const char *dev = ibv_get_device_name(p->verbs->device);
        static const union ibv_gid zero;
        char path[320], type[32];

        memset(out, 0, sizeof(*out));
        if (ibv_query_gid(p->verbs, p->number, index, &out->gid) != 0 || !memcmp(&out->gid, &zero, sizeof(zero)))
                return false;
        out->index = index;
        snprintf(path, sizeof(path), "/sys/class/infiniband/%s/ports/%u/gid_attrs/ndevs/%d", dev, p->number, index);
        if (!read_line(path, out->netdev, sizeof(out->netdev)))
                out->netdev[0] = '\0';
        snprintf(path, sizeof(path), "/sys/class/infiniband/%s/ports/%u/gid_attrs/types/%d", dev, p->number, index);
        out->link = RDMA_LINK_ROCE_V1;
        if (p->port.link_layer == IBV_LINK_LAYER_INFINIBAND)
                out->link = RDMA_LINK_IB;
        else if (p->verbs->device->transport_type == IBV_TRANSPORT_IWARP)
                out->link = RDMA_LINK_IWARP;
        else if (read_line(path, type, sizeof(type)) && strstr(type, "v2"))
                out->link = RDMA_LINK_ROCE_V2;
        return true;
}

/* An address as a GID; false for loopback, which no GID has, and for "any". */
static bool addr_gid(const struct sockaddr_storage *a, union ibv_gid *out)
{
        memset(out, 0, sizeof(*out));
        if (a->ss_family == AF_INET) {
                const struct sockaddr_in *in = (const void *)a;
                uint32_t host = ntohl(in->sin_addr.s_addr);

                out->raw[10] = out->raw[11] = 0xff;
                memcpy(out->raw + 12, &in->sin_addr, 4);
                return host != 0 && host >> 24 != 127;
        }
        if (a->ss_family == AF_INET6) {
                const struct sockaddr_in6 *in6 = (const void *)a;

                memcpy(out->raw, &in6->sin6_addr, 16);
                return !IN6_IS_ADDR_LOOPBACK(&in6->sin6_addr) && !IN6_IS_ADDR_UNSPECIFIED(&in6->sin6_addr);
        }
        return false;
}

/* Higher is better, 0: not to be used. RoCE v2 can be routed, v1 cannot; an IPv4 address is what most fabrics route;
 * a link-local one ends at the first router. The address that the bootstrap uses already is known to lead there. */
static unsigned gid_score(const struct rdma_gid *g, const union ibv_gid *local, const struct rdma_gid *want)
{
        if (want && (want->link != g->link ||
                     (g->link == RDMA_LINK_ROCE_V2 && rdma_gid_is_v4(&want->gid) != rdma_gid_is_v4(&g->gid))))
                return 0;
        return 1 + (g->link == RDMA_LINK_ROCE_V2 ? 16 : 0) + (local && !memcmp(local, &g->gid, 16) ? 8 : 0) +
               (local && rdma_gid_is_v4(local) == rdma_gid_is_v4(&g->gid) ? 4 : 0) + (is_link_local(&g->gid) ? 0 : 2) +
               (rdma_gid_is_v4(&g->gid) ? 1 : 0);
}

static void gid_describe(struct rdma_gid *g)
{
        static const char *const links[] = {"", "InfiniBand", "RoCE v1", "RoCE v2", "iWARP"};
        char addr[INET6_ADDRSTRLEN] = "?";

        if (rdma_gid_is_v4(&g->gid))
                inet_ntop(AF_INET, g->gid.raw + 12, addr, sizeof(addr));
        else
                inet_ntop(AF_INET6, g->gid.raw, addr, sizeof(addr));
        snprintf(g->text, sizeof(g->text), "GID %d %.39s (%s)", g->index, addr, links[g->link]);
}

int rdma_gid_choose(const struct rdma_port *p, int wanted_index, int fd, const struct rdma_gid *want, const char *peer,
                    struct rdma_gid *out)
{
        struct sockaddr_storage a = {0};
        socklen_t len = sizeof(a);
        union ibv_gid local;
        bool have_local = fd >= 0 && getsockname(fd, (struct sockaddr *)&a, &len) == 0 && addr_gid(&a, &local);
        unsigned best = 0;
        struct rdma_gid g;

        if (p->port.link_layer == IBV_LINK_LAYER_INFINIBAND && wanted_index < 0) {
                *out = (struct rdma_gid){.index = -1, .link = RDMA_LINK_IB};
                snprintf(out->text, sizeof(out->text), "LID %u (InfiniBand)", p->port.lid);
                return 0;
        }
        for (int i = 0; i < p->port.gid_tbl_len && i < GIDS_MAX; i++) {
                unsigned score;

                if ((wanted_index >= 0 && i != wanted_index) || !gid_at(p, i, &g))
                        continue;
                score = wanted_index >= 0 ? 1 : gid_score(&g, have_local ? &local : NULL, want);
                if (score > best) {
                        best = score;
                        *out = g;
                }
        }
        if (best == 0 && wanted_index >= 0)
                return err_set(-EINVAL, "%s: %s has no GID with index %d; `show_gids` or `rdma link` lists them", peer,
                               p->name, wanted_index);
        if (best == 0)
                return err_set(-EADDRNOTAVAIL,
                               "%s: %s has no GID%s; give its network interface an address, or name one by ?gid=", peer,
                               p->name, want ? " of the kind and address family that the peer uses" : "");
        gid_describe(out);
        return 0;
}

/* ---- devices ---- */

static int device_numa(const char *dev)
{
        char path[320], text[16];

        snprintf(path, sizeof(path), "/sys/class/infiniband/%s/device/numa_node", dev);
        return read_line(path, text, sizeof(text)) ? atoi(text) : -1;
}

static double device_rate(const struct rdma_port *p)
{
        static const struct {
                uint32_t code;
                double gbit;
        } speeds[] = {{1, 2.5}, {2, 5}, {4, 10}, {8, 10}, {16, 14.0625}, {32, 25.78125}, {64, 50}, {128, 100}};
        static const struct {
                uint8_t code, lanes;
        } widths[] = {{1, 1}, {2, 4}, {4, 8}, {8, 12}, {16, 2}};
        double gbit = 0, lanes = 0;

        if (p->emulated) /* what it claims is made up; the network interface below it decides */
                return 0;
        for (size_t i = 0; i < ARRAY_LEN(speeds); i++)
                gbit = speeds[i].code == p->port.active_speed ? speeds[i].gbit : gbit;
        for (size_t i = 0; i < ARRAY_LEN(widths); i++)
                lanes = widths[i].code == p->port.active_width ? widths[i].lanes : lanes;
        return gbit * lanes * 1e9;
}

static void port_describe(struct rdma_port *p)
{
        const char *dev = ibv_get_device_name(p->verbs->device);
        char path[320], text[64];

        snprintf(p->name, sizeof(p->name), "%.50s/%u", dev, p->number);
        snprintf(path, sizeof(path), "/sys/class/infiniband/%s/parent", dev); /* rxe alone has this file */
        p->emulated = p->dev.vendor_id == VENDOR_SOFT_ROCE || p->dev.vendor_id == VENDOR_SOFT_IWARP ||
                      read_line(path, text, sizeof(text));
        /* rxe copies each payload into a socket buffer and out of one; siw sometimes hands pages over instead. */
        p->driver_copies = !p->emulated ? 0 : p->dev.vendor_id == VENDOR_SOFT_IWARP ? -1 : 2;
        p->numa = device_numa(dev);
        p->link_bits_per_s = device_rate(p);
}

/* The device's port `number`, or with 0 its first active one: 0, or -ENODEV. */
static int port_find(struct rdma_port *p, unsigned number)
{
        if (ibv_query_device(p->verbs, &p->dev) != 0)
                return -ENODEV;
        for (unsigned i = 1; i <= p->dev.phys_port_cnt; i++) {
                if ((number && i != number) || ibv_query_port(p->verbs, (uint8_t)i, &p->port) != 0)
                        continue;
                p->number = (uint8_t)i;
                if (p->port.state == IBV_PORT_ACTIVE)
                        return 0;
        }
        return -ENODEV;
}

/* Our own address on the way to the URL's host: connecting a datagram socket asks the routing table and sends nothing. */
static bool route_gid(const struct tp_url *u, union ibv_gid *out)
{
        struct addrinfo hints = {.ai_family = AF_UNSPEC, .ai_socktype = SOCK_DGRAM}, *ai;
        struct sockaddr_storage a = {0};
        socklen_t len = sizeof(a);
        bool found = false;
        int fd;

        if (!u->host[0] || getaddrinfo(u->host, u->port[0] && strcmp(u->port, "0") ? u->port : "1", &hints, &ai) != 0)
                return false;
        fd = socket(ai->ai_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
        if (fd >= 0 && connect(fd, ai->ai_addr, ai->ai_addrlen) == 0 &&
            getsockname(fd, (struct sockaddr *)&a, &len) == 0)
                found = addr_gid(&a, out);
        if (fd >= 0)
                close(fd);
        freeaddrinfo(ai);
        return found;
}

static bool port_has_gid(const struct rdma_port *p, const union ibv_gid *gid)
{
        struct rdma_gid g;

        for (int i = 0; i < p->port.gid_tbl_len && i < GIDS_MAX; i++)
                if (gid_at(p, i, &g) && !memcmp(&g.gid, gid, sizeof(*gid)))
                        return true;
        return false;
}

/* Looks through the devices; those whose port has `gid` (NULL: any) and whose name is `name` (NULL: any). */
static bool port_search(struct ibv_device **list, const char *name, unsigned number, const union ibv_gid *gid,
                        struct rdma_port *out)
{
        for (; *list; list++) {
                if (name && strcmp(ibv_get_device_name(*list), name) != 0)
                        continue;
                memset(out, 0, sizeof(*out));
                out->verbs = ibv_open_device(*list);
                if (!out->verbs)
                        continue;
                if (port_find(out, number) == 0 && (!gid || port_has_gid(out, gid)))
                        return true;
                ibv_close_device(out->verbs);
                out->verbs = NULL;
        }
        return false;
}

int rdma_port_open(const char *url, const struct tp_url *u, const struct rdma_url *par, struct rdma_port *out)
{
        struct ibv_device **list = ibv_get_device_list(NULL);
        char name[sizeof(par->dev)];
        unsigned number = 0;
        union ibv_gid gid;
        bool found;

        if (!list)
                return err_set(-ENODEV, "%s: cannot list RDMA devices: %s", url, strerror(errno));
        if (par->dev[0]) {
                size_t n = strcspn(par->dev, "/");

                snprintf(name, sizeof(name), "%.*s", (int)n, par->dev);
                number = par->dev[n] ? (unsigned)atoi(par->dev + n + 1) : 0;
                found = port_search(list, name, number, NULL, out);
        } else {
                found = route_gid(u, &gid) && port_search(list, NULL, 0, &gid, out);
                found = found || port_search(list, NULL, 0, NULL, out);
        }
        ibv_free_device_list(list);
        if (!found && par->dev[0])
                return err_set(-ENODEV, "%s: there is no RDMA device %s with an active port; `rdma link` lists them",
                               url, par->dev);
        if (!found)
                return err_set(-ENODEV,
                               "%s: no RDMA device could be opened with an active port (permission for "
                               "/dev/infiniband/uverbs*? state in `rdma link`?)",
                               url);
        port_describe(out);
        return 0;
}
