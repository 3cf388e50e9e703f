/*
 * doctor --peer: whether this host and that listener work together, and if not, at which step they part.
 *
 * The steps run in a child, which sends its findings up a pipe after each: a name server that does not answer or a driver
 * that hangs is a finding too, and the whole never takes longer than it may.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "clock.h"
#include "doctor_inside.h"
#include "err.h"
#include "keys.h"
#include "manifest.h"
#include "perf_probe.h"
#include "transport.h"

#ifdef WITH_MODELS
#include "remote.h"
#endif

#define ADDRESSES_MAX 8
#define LINE_MAX_     65536 /* findings of one step, as JSON */
#define GRACE_NS      (300 * NS_PER_MS)

union address {
        struct sockaddr any;
        struct sockaddr_in v4;
        struct sockaddr_in6 v6;
        struct sockaddr_storage room;
};

struct pair {
        struct doctor *d;
        const struct doctor_peer_opts *o;
        struct tp_url url;
        struct auth_key key;
        bool networked; /* host and port, not a name on this host */
        uint64_t deadline_ns;
        union address at[ADDRESSES_MAX], source;
        socklen_t len[ADDRESSES_MAX];
        int n, chosen; /* the address that the route and the port were tried with */
        bool local;
};

static uint64_t left_ns(const struct pair *p)
{
        uint64_t now = clock_ns();

        return now < p->deadline_ns ? p->deadline_ns - now : 0;
}

/* ---- the transport and the key ---- */

static bool step_transport(struct pair *p)
{
        const char *plus = strrchr(p->url.scheme, '+'), *name = plus ? plus + 1 : p->url.scheme;
        const char *reason = doctor_no_transport(name);

        if (!strcmp(name, "loop") || !strcmp(name, "null")) {
                doctor_find(p->d, DOC_OFF, "transport", "%s has no other end outside its process", name);
                doctor_mend(p->d, BY_YOU, "name a peer by tcp://, shm:// or rdma://");
                return false;
        }
        if (!reason) {
                doctor_find(p->d, DOC_OK, "transport", "%s can be used here", name);
                return true;
        }
        doctor_find(p->d, DOC_OFF, "transport", "%s: %s", name, reason);
        doctor_mend(p->d, BY_YOU, "djinnbench doctor (what this host lacks); djinnbench list (what there is)");
        return false;
}

static bool step_key(struct pair *p)
{
        const char *path = p->o->key_file ? p->o->key_file : getenv("DJINN_KEY_FILE");

        if (!path || !*path)
                return true; /* whether that is right the other end will say */
        if (key_load(path, &p->key) == 0)
                return true;
        doctor_find(p->d, DOC_OFF, "key", "%s", err_text());
        doctor_mend(p->d, BY_YOU, "chmod 600 %s (new: head -c 32 /dev/urandom > FILE, the same FILE at both ends)",
                    path);
        return false;
}

/* ---- the name ---- */

static void address_text(const union address *a, char out[64])
{
        char scope[IF_NAMESIZE + 1] = "", name[IF_NAMESIZE];

        if (a->any.sa_family == AF_INET)
                inet_ntop(AF_INET, &a->v4.sin_addr, out, 64);
        else
                inet_ntop(AF_INET6, &a->v6.sin6_addr, out, 46);
        if (a->any.sa_family == AF_INET6 && a->v6.sin6_scope_id && if_indextoname(a->v6.sin6_scope_id, name))
                snprintf(scope, sizeof(scope), "%%%s", name);
        strncat(out, scope, 63 - strlen(out));
}

/* As ip(8) wants it: "fe80::1 dev eth0". */
static const char *ip_words(const char *address, char out[80])
{
        int len = (int)strcspn(address, "%");

        snprintf(out, 80, address[len] ? "%.*s dev %s" : "%.*s%s", len, address, address[len] ? address + len + 1 : "");
        return out;
}

static void say_name(struct pair *p, int rc)
{
        const char *host = p->url.host, *zone = strchr(host, '%');

        if (zone && !if_nametoindex(zone + 1)) {
                doctor_find(p->d, DOC_OFF, "name", "%s: this host has no interface '%s'", host, zone + 1);
                doctor_why(p->d, "what stands after '%%' is the interface of this host that leads to the peer");
                doctor_mend(p->d, BY_YOU, "name one that `ip link` lists");
                return;
        }
        doctor_find(p->d, DOC_OFF, "name", "%s: %s", host, gai_strerror(rc));
        doctor_why(p->d, "no address is known under this name");
        doctor_mend(p->d, BY_YOU, "spell it as `getent ahosts %s` finds it, or use the address", host);
}

static bool step_name(struct pair *p)
{
        struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found = NULL;
        char text[64], all[400] = "";
        int rc;

        if (!p->networked)
                return true;
        rc = getaddrinfo(p->url.host, p->url.port, &hints, &found);
        if (rc != 0) {
                say_name(p, rc);
                return false;
        }
        for (struct addrinfo *a = found; a && p->n < ADDRESSES_MAX; a = a->ai_next) {
                if (a->ai_addrlen > sizeof(p->at[0]))
                        continue;
                memcpy(&p->at[p->n], a->ai_addr, a->ai_addrlen);
                p->len[p->n] = a->ai_addrlen;
                address_text(&p->at[p->n++], text);
                snprintf(all + strlen(all), sizeof(all) - strlen(all), "%s%s", *all ? ", " : "", text);
        }
        freeaddrinfo(found);
        if (strcmp(all, p->url.host) == 0)
                return true;
        doctor_find(p->d, DOC_OK, "name", "%s is %s", p->url.host, all);
        json_set_str(doctor_facts(p->d), "addresses", all);
        return true;
}

/* ---- the route ---- */

struct route {
        union address source;
        char netdev[IF_NAMESIZE];
        int netdev_mtu, path_mtu;
        bool local; /* the address is one of ours */
};

static bool same_address(const struct sockaddr *a, const union address *b)
{
        if (!a || a->sa_family != b->any.sa_family)
                return false;
        if (a->sa_family == AF_INET)
                return ((const struct sockaddr_in *)(const void *)a)->sin_addr.s_addr == b->v4.sin_addr.s_addr;
        if (a->sa_family != AF_INET6)
                return false;
        const struct sockaddr_in6 *v6 = (const void *)a;

        /* A link-local one is the interface's alone. */
        return memcmp(&v6->sin6_addr, &b->v6.sin6_addr, sizeof(v6->sin6_addr)) == 0 &&
               v6->sin6_scope_id == b->v6.sin6_scope_id;
}

/* The interface that has the source address, and whether the destination is an interface's own. */
static void route_interface(const union address *to, struct route *r)
{
        struct ifaddrs *all;

        if (getifaddrs(&all) < 0)
                return;
        for (const struct ifaddrs *i = all; i; i = i->ifa_next) {
                if (same_address(i->ifa_addr, &r->source) && !*r->netdev)
                        snprintf(r->netdev, sizeof(r->netdev), "%s", i->ifa_name);
                r->local = r->local || same_address(i->ifa_addr, to);
        }
        freeifaddrs(all);
        if (to->any.sa_family == AF_INET && ntohl(to->v4.sin_addr.s_addr) >> 24 == IN_LOOPBACKNET)
                r->local = true;
        if (r->local)
                snprintf(r->netdev, sizeof(r->netdev), "lo");
}

/* A datagram socket that is connected asks the kernel for its route and sends nothing. 0 or -errno. */
static int route_of(const union address *to, socklen_t len, struct route *r)
{
        int v6 = to->any.sa_family == AF_INET6, rc = 0;
        int fd = socket(to->any.sa_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
        socklen_t source_len = sizeof(r->source), int_len = sizeof(r->path_mtu);
        struct ifreq req = {0};

        *r = (struct route){0};
        if (fd < 0)
                return -errno;
        if (connect(fd, &to->any, len) < 0 || getsockname(fd, &r->source.any, &source_len) < 0)
                rc = -errno;
        if (rc == 0) {
                route_interface(to, r);
                if (getsockopt(fd, v6 ? IPPROTO_IPV6 : IPPROTO_IP, v6 ? IPV6_MTU : IP_MTU, &r->path_mtu, &int_len) < 0)
                        r->path_mtu = 0;
                snprintf(req.ifr_name, sizeof(req.ifr_name), "%s", r->netdev);
                if (*r->netdev && ioctl(fd, SIOCGIFMTU, &req) == 0)
                        r->netdev_mtu = req.ifr_mtu;
        }
        close(fd);
        return rc;
}

static void say_route(struct pair *p, const char *to, const struct route *r)
{
        bool narrow = !r->local && r->path_mtu > 0 && r->netdev_mtu > 0 && r->path_mtu < r->netdev_mtu;
        char from[64], mtu[64];

        address_text(&r->source, from);
        if (r->local)
                snprintf(mtu, sizeof(mtu), ": this host itself");
        else
                snprintf(mtu, sizeof(mtu), ", MTU %d, of the path %d", r->netdev_mtu, r->path_mtu);
        doctor_find(p->d, narrow ? DOC_LIMITED : DOC_OK, "route", "%s from %s through %s%s", to, from,
                    *r->netdev ? r->netdev : "an interface that is not shown", mtu);
        json *f = doctor_facts(p->d);

        json_set_str(f, "address", to);
        json_set_str(f, "source", from);
        json_set_str(f, "netdev", *r->netdev ? r->netdev : NULL);
        json_set_bool(f, "local", r->local);
        json_set(f, "netdev_mtu", r->netdev_mtu ? json_of_int(r->netdev_mtu) : json_of_null());
        json_set(f, "path_mtu", r->path_mtu ? json_of_int(r->path_mtu) : json_of_null());
        if (narrow) {
                doctor_why(p->d, "something between the hosts carries smaller packets than %s", r->netdev);
                doctor_mend(p->d, BY_ADMIN, "tracepath %s shows where; raise the MTU there", to);
        }
}

static bool step_route(struct pair *p)
{
        struct route r;
        char to[64], words[80];
        int routed = 0;

        for (int i = 0; i < p->n; i++) {
                int rc = route_of(&p->at[i], p->len[i], &r);

                address_text(&p->at[i], to);
                if (rc == 0) {
                        if (routed++ == 0) {
                                p->chosen = i;
                                p->source = r.source;
                                p->local = r.local;
                        }
                        say_route(p, to, &r);
                        continue;
                }
                doctor_find(p->d, p->n == 1 ? DOC_OFF : DOC_UNKNOWN, "route", "%s: %s", to, strerror(-rc));
                doctor_why(p->d, "this host has no way to that address");
                doctor_mend(p->d, BY_ADMIN, "ip route get %s (what the kernel says); ip route add, or the interface up",
                            ip_words(to, words));
        }
        return routed > 0 || !p->networked;
}

/* ---- the GID ---- */

static bool is_loopback(const union address *a)
{
        if (a->any.sa_family == AF_INET)
                return ntohl(a->v4.sin_addr.s_addr) >> 24 == IN_LOOPBACKNET;
        return IN6_IS_ADDR_LOOPBACK(&a->v6.sin6_addr);
}

static void address_gid(const union address *a, uint8_t gid[16])
{
        static const uint8_t mapped[16] = {[10] = 0xff, [11] = 0xff};

        memcpy(gid, mapped, sizeof(mapped));
        if (a->any.sa_family == AF_INET)
                memcpy(gid + 12, &a->v4.sin_addr, 4);
        else
                memcpy(gid, &a->v6.sin6_addr, 16);
}

/* Where the URL names none, the rdma transport uses the device and the GID that own the route's source address. */
static bool step_gid(struct pair *p)
{
        char dev[DOC_TEXT], from[64], named[64];
        uint8_t gid[16];
        int port, index;

        if (strcmp(p->url.scheme, "rdma") != 0)
                return true;
        if (tp_url_param(&p->url, "dev", named, sizeof(named)) || tp_url_param(&p->url, "gid", named, sizeof(named))) {
                doctor_find(p->d, DOC_OK, "gid", "as the URL names it: %s", p->url.query);
                return true;
        }
        if (is_loopback(&p->source)) {
                doctor_find(p->d, DOC_OK, "gid", "this host itself: the first active device talks to itself");
                return true;
        }
        address_gid(&p->source, gid);
        address_text(&p->source, from);
        if (!doctor_gid_find(p->d, gid, dev, &port, &index)) {
                doctor_find(p->d, DOC_LIMITED, "gid", "no RoCE v2 GID has the route's source address %s", from);
                doctor_why(p->d, "the RDMA device is on another network than the route, or it is InfiniBand");
                doctor_mend(p->d, BY_YOU, "use the address that the peer's RDMA device has, or name ours: ?dev=&gid=");
                return true;
        }
        doctor_find(p->d, DOC_OK, "gid", "the route leaves by %s port %d: GID %d, %s", dev, port, index, from);
        json_set_str(doctor_facts(p->d), "device", dev);
        json_set_int(doctor_facts(p->d), "port", port);
        json_set_int(doctor_facts(p->d), "gid_index", index);
        return true;
}

/* ---- the port ---- */

/* 0 connected, or -errno. */
static int try_port(const union address *to, socklen_t len, uint64_t wait_ns)
{
        int fd = socket(to->any.sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), rc = 0;
        socklen_t rc_len = sizeof(rc);
        struct pollfd pfd = {.fd = fd, .events = POLLOUT};

        if (fd < 0)
                return -errno;
        if (connect(fd, &to->any, len) < 0) {
                if (errno != EINPROGRESS)
                        rc = errno;
                else if (poll(&pfd, 1, (int)(wait_ns / NS_PER_MS)) <= 0)
                        rc = ETIMEDOUT;
                else if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &rc, &rc_len) < 0)
                        rc = errno;
        }
        close(fd);
        return -rc;
}

static void say_port(struct pair *p, const char *to, int rc)
{
        const char *port = p->url.port, *scheme = p->url.scheme;
        char words[80];

        doctor_find(p->d, DOC_OFF, "port", "%s port %s: %s", to, port, strerror(-rc));
        if (rc == -ECONNREFUSED) {
                doctor_why(p->d, "that host answers, and nothing listens there");
                doctor_mend(p->d, BY_YOU,
                            "there: djinnbench serve --listen %s://%s:%s --key-file KEY (or perf --listen)", scheme,
                            strchr(to, ':') ? "[::]" : "0.0.0.0", port);
        } else if (rc == -ETIMEDOUT) {
                doctor_why(p->d, "no answer at all: the host is down, or a firewall drops what goes to this port");
                doctor_mend(p->d, BY_ADMIN, "there: nft list ruleset, and let tcp port %s in", port);
        } else {
                doctor_why(p->d, "the network does not carry packets to it");
                doctor_mend(p->d, BY_ADMIN, "ip route get %s; ip neighbour show %s", ip_words(to, words), words);
        }
}

static bool step_port(struct pair *p)
{
        char cm[8], to[64];
        int rc = -ETIMEDOUT;

        /* rdma_cm has ports of its own, which sockets cannot ask; dpdk's are not the kernel's. */
        if (!p->networked || tp_url_param(&p->url, "cm", cm, sizeof(cm)) || !strcmp(p->url.scheme, "dpdk"))
                return true;
        for (int i = p->chosen; i < p->n; i++) {
                rc = try_port(&p->at[i], p->len[i], left_ns(p) / 3);
                address_text(&p->at[i], to);
                if (rc < 0)
                        continue;
                doctor_find(p->d, DOC_OK, "port", "%s port %s is open", to, p->url.port);
                return true;
        }
        say_port(p, to, rc);
        return false;
}

/* ---- who listens ---- */

static void say_path(struct pair *p, const struct tp_attr *a)
{
        char device[80] = "", mtu[32] = "";

        if (*a->device)
                snprintf(device, sizeof(device), ", device %s", a->device);
        if (a->mtu)
                snprintf(mtu, sizeof(mtu), ", MTU %u", a->mtu);
        doctor_find(p->d, a->emulated ? DOC_LIMITED : DOC_OK, "connection", "%s%s%s%s%s%s", a->name, device, mtu,
                    *a->detail ? ", " : "", a->detail, a->emulated ? ", emulated" : "");
        if (a->emulated)
                doctor_why(p->d, "a device made of software: its times are not those of hardware");
        json_set_str(doctor_facts(p->d), "transport", a->name);
        json_set_str(doctor_facts(p->d), "device", *a->device ? a->device : NULL);
        json_set(doctor_facts(p->d), "mtu", a->mtu ? json_of_int(a->mtu) : json_of_null());
        json_set_bool(doctor_facts(p->d), "emulated", a->emulated);
        json_set_str(doctor_facts(p->d), "detail", a->detail);
}

static void say_versions(struct pair *p, const char *version, const char *commit)
{
        const char *ours = manifest_commit();
        bool same = strcmp(commit, ours) == 0 && (!*version || strcmp(version, manifest_version()) == 0);

        if (!*commit) {
                doctor_find(p->d, DOC_UNKNOWN, "versions", "the other end does not tell");
                return;
        }
        if (same)
                doctor_find(p->d, DOC_OK, "versions", "both %s, commit %.12s%s", manifest_version(), ours,
                            strstr(ours, "-dirty") ? "-dirty" : "");
        else
                doctor_find(p->d, DOC_LIMITED, "versions", "here %s commit %.12s%s, there %s%scommit %.12s%s",
                            manifest_version(), ours, strstr(ours, "-dirty") ? "-dirty" : "", version,
                            *version ? " " : "", commit, strstr(commit, "-dirty") ? "-dirty" : "");
        json_set_str(doctor_facts(p->d), "ours", ours);
        json_set_str(doctor_facts(p->d), "theirs", commit);
        if (!same) {
                doctor_why(p->d, "they talk to one another, but a result of the two belongs to no one commit");
                doctor_mend(p->d, BY_YOU, "build both ends from one commit");
        }
}

/* present: this end has a key. needed: the other end has one. */
static bool say_keys(struct pair *p, bool needed, bool agree)
{
        bool present = p->key.present;

        if (present && needed && agree) {
                doctor_find(p->d, DOC_OK, "key", "both ends proved that they hold the same");
                return true;
        }
        if (!present && !needed) {
                doctor_find(p->d, p->url.loopback ? DOC_OK : DOC_LIMITED, "key", "none at either end");
                if (!p->url.loopback) {
                        doctor_why(p->d, "off this host both ends must then say --insecure, and anybody may connect");
                        doctor_mend(p->d, BY_YOU, "the same --key-file FILE at both ends");
                }
                return true;
        }
        doctor_find(p->d, DOC_OFF, "key", "%s",
                    !present  ? "the other end wants one, and none was given here"
                    : !needed ? "the other end has none, and one was given here"
                              : "the two ends hold different ones");
        doctor_mend(p->d, BY_YOU, "%s",
                    !present  ? "djinnbench doctor --peer URL --key-file FILE (the file that the other end was given)"
                    : !needed ? "start the other end with the same --key-file, or leave it away here"
                              : "copy one key file to both ends: scp FILE OTHER:FILE");
        return false;
}

static bool say_silence(struct pair *p, const char *sentence)
{
        doctor_find(p->d, DOC_OFF, "listener", "%s", sentence);
        doctor_why(p->d, "it takes connections and does not answer: stopped, overloaded, or no djinnbench at all");
        doctor_mend(p->d, BY_YOU, "there: ss -ltnp 'sport = :%s' says which process it is; start it anew", p->url.port);
        return false;
}

static bool say_refusal(struct pair *p, int rc, const char *sentence)
{
        if (rc == -ETIMEDOUT)
                return say_silence(p, sentence);
        doctor_find(p->d, DOC_OFF, "listener", "%s", sentence);
        if (rc == -ECONNREFUSED && !p->networked) {
                doctor_why(p->d, "nobody listens under this name, or another user does");
                doctor_mend(p->d, BY_YOU, "djinnbench serve --listen %s (or perf --listen %s)", p->o->url, p->o->url);
        } else if (rc == -EPROTO || rc == -ECONNRESET || rc == -EPIPE) {
                doctor_why(p->d, "what listens there is no djinnbench, or one of another version");
                doctor_mend(p->d, BY_YOU, "there: ss -ltnp 'sport = :%s' says which process it is", p->url.port);
        }
        return false;
}

/* No perf, but somebody: the sweep's protocol is next. */
static bool is_stranger(int rc)
{
        return rc != -ECONNREFUSED && rc != -ETIMEDOUT && rc != -ENOTSUP && rc != -ENOMEM;
}

/* 1 it is a perf and everything was said (*works), 0 it is something else, -errno with a sentence. */
static int ask_perf(struct pair *p, bool *works)
{
        struct perf_peer_info info;
        struct tp_ctx *ctx;
        int rc = tp_open(p->o->url, NULL, &ctx);

        if (rc < 0)
                return rc;
        rc = perf_probe(ctx, p->o->url, &p->key, clock_ns() + left_ns(p) / 2, &info);
        tp_close(ctx);
        if (rc < 0)
                return is_stranger(rc) ? 0 : rc;
        doctor_find(p->d, info.busy ? DOC_LIMITED : DOC_OK, "listener", "djinnbench perf --listen");
        json_set_str(doctor_facts(p->d), "listener", "perf");
        json_set_bool(doctor_facts(p->d), "busy", info.busy);
        if (info.busy)
                doctor_why(p->d, "it serves another driver just now and says no more");
        say_path(p, &info.attr);
        *works = info.busy || say_keys(p, info.needs_key, info.key_agrees);
        if (!info.busy)
                say_versions(p, info.version, info.commit);
        return 1;
}

#ifdef WITH_MODELS
static void say_server(struct pair *p, const struct remote *r)
{
        char commit[sizeof(r->server.commit) + 1], device[sizeof(r->server.device) + 1];

        snprintf(commit, sizeof(commit), "%.*s", (int)sizeof(r->server.commit), r->server.commit);
        snprintf(device, sizeof(device), "%.*s", (int)sizeof(r->server.device), r->server.device);
        doctor_find(p->d, DOC_OK, "listener", "djinnbench serve, protocol %u, device %s", MSG_VERSION, device);
        json_set_str(doctor_facts(p->d), "listener", "serve");
        json_set_bool(doctor_facts(p->d), "same_kernel", r->same_kernel);
        say_path(p, &r->attr);
        say_keys(p, r->opts.key.present, true);
        say_versions(p, "", commit);
}

/* Whether a refusal was about keys; the server has then been told apart from a stranger. */
static bool is_about_keys(int rc, const char *sentence)
{
        return (rc == -EACCES || rc == -EPERM) && (strstr(sentence, "key") || strstr(sentence, "auth"));
}

static bool ask_server(struct pair *p)
{
        struct remote_opts opts = {.key = p->key, .insecure = !p->key.present, .timeout_ns = left_ns(p) / 3 + 1};
        char sentence[ERR_TEXT_MAX];
        struct remote r;
        int rc = remote_open(p->o->url, &opts, &r);

        if (rc == 0) {
                say_server(p, &r);
                remote_close(&r);
                return true;
        }
        snprintf(sentence, sizeof(sentence), "%s", err_str(rc));
        if (!is_about_keys(rc, sentence))
                return say_refusal(p, rc, sentence);
        doctor_find(p->d, DOC_OK, "listener", "djinnbench serve, protocol %u", MSG_VERSION);
        json_set_str(doctor_facts(p->d), "listener", "serve");
        say_keys(p, !strstr(sentence, "has no key") && !strstr(sentence, "has none"), false);
        doctor_why(p->d, "%s", sentence);
        return false;
}
#else
/* Without the sweep's protocol in this build, whether a connection can be made is all that is left to ask. */
static bool ask_server(struct pair *p)
{
        char sentence[ERR_TEXT_MAX];
        struct tp_attr attr;
        struct tp_ctx *ctx;
        struct tp_ep *ep;
        int rc = tp_open(p->o->url, NULL, &ctx);

        if (rc == 0 && (rc = tp_connect(ctx, p->o->url, clock_ns() + left_ns(p) / 2, &ep)) == 0) {
                tp_attr(ep, &attr);
                doctor_find(p->d, DOC_OK, "listener", "a djinnbench, but no perf");
                doctor_why(p->d, "this build has no models, so it cannot ask a serve who it is");
                say_path(p, &attr);
                tp_close(ctx);
                return true;
        }
        snprintf(sentence, sizeof(sentence), "%s", err_str(rc));
        return say_refusal(p, rc, sentence);
}
#endif

static bool step_listener(struct pair *p)
{
        char sentence[ERR_TEXT_MAX];
        bool works = false;
        int rc = ask_perf(p, &works);

        if (rc > 0)
                return works;
        if (rc == 0) {
                err_clear();
                return ask_server(p);
        }
        snprintf(sentence, sizeof(sentence), "%s", err_str(rc));
        return say_refusal(p, rc, sentence);
}

/* ---- all steps, in a child ---- */

static const struct {
        const char *name;
        bool (*take)(struct pair *p); /* false: the pair does not work, and the rest cannot be asked */
} steps[] = {
    {"transport", step_transport}, {"key", step_key}, {"name", step_name},
    {"route", step_route},         {"gid", step_gid}, {"port", step_port},
    {"listener", step_listener},
};

/* What one step found, as a line of JSON; the arrow of time is the order of lines. */
static bool send_up(int fd, const json *findings, bool works)
{
        json *line = json_object();
        char *text;
        size_t len, at = 0;

        json_set(line, "findings", json_copy(findings));
        json_set_bool(line, "works", works);
        text = json_text(line, false);
        len = strlen(text);
        text[len] = '\n'; /* in the place of its end */
        while (at < len + 1) {
                ssize_t n = write(fd, text + at, len + 1 - at);

                if (n < 0 && errno != EINTR)
                        break;
                at += n > 0 ? (size_t)n : 0;
        }
        free(text);
        json_free(line);
        return at == len + 1;
}

static _Noreturn void child_main(struct pair *p, int fd)
{
        struct doctor d = *p->d;

        prctl(PR_SET_PDEATHSIG, SIGKILL);
        p->d = &d;
        for (size_t i = 0; i < ARRAY_LEN(steps); i++) {
                d.findings = json_array();
                bool works = steps[i].take(p);

                if (!send_up(fd, d.findings, works) || !works)
                        break;
                json_free(d.findings);
        }
        _exit(0);
}

/* Takes over the findings of complete lines; returns how many lines. *works: the last one's word. */
static size_t take_lines(struct doctor *d, char *buf, size_t *have, bool *works)
{
        size_t lines = 0;
        char *end;

        while ((end = memchr(buf, '\n', *have))) {
                size_t len = (size_t)(end - buf) + 1;
                json *line = json_parse(buf, len - 1, "doctor --peer");

                for (const json *f = json_first(json_get(line, "findings")); f; f = json_next(f))
                        json_push(d->findings, json_copy(f));
                *works = json_bool(json_get(line, "works"), false);
                json_free(line);
                memmove(buf, end + 1, *have - len);
                *have -= len;
                lines++;
        }
        return lines;
}

static void say_stuck(struct pair *p, size_t step, bool ended)
{
        const char *name = steps[step < ARRAY_LEN(steps) ? step : ARRAY_LEN(steps) - 1].name;

        if (ended)
                doctor_find(p->d, DOC_OFF, name, "this step ended the program that took it");
        else
                doctor_find(p->d, DOC_OFF, name, "no end within %.1f s", (double)p->o->timeout_ns / 1e9);
        doctor_why(p->d,
                   strcmp(name, "name") == 0 ? "the name server does not answer" : "the other end, or a driver, hangs");
        doctor_mend(p->d, BY_YOU,
                    strcmp(name, "name") == 0 ? "use the address in the place of the name"
                                              : "djinnbench doctor --peer %s --timeout 30s",
                    p->o->url);
}

/* Reads what the child finds until it ends or time is up. true: all steps were taken and the last one worked. */
static bool read_findings(struct pair *p, int fd)
{
        static char buf[LINE_MAX_];
        size_t have = 0, lines = 0;
        bool works = false, ended = false, late = false;

        while (!ended && !late) {
                uint64_t now = clock_ns(), until = p->deadline_ns + GRACE_NS;
                struct pollfd pfd = {.fd = fd, .events = POLLIN};

                late = now >= until || have == sizeof(buf);
                if (late || poll(&pfd, 1, (int)((until - now) / NS_PER_MS) + 1) <= 0)
                        continue;
                ssize_t n = read(fd, buf + have, sizeof(buf) - have);

                ended = n == 0;
                have += n > 0 ? (size_t)n : 0;
                lines += take_lines(p->d, buf, &have, &works);
        }
        if (lines == ARRAY_LEN(steps) || (ended && lines > 0 && !works))
                return works;
        say_stuck(p, lines, ended);
        return false;
}

bool doctor_peer(struct doctor *d, const struct doctor_peer_opts *o)
{
        struct pair p = {.d = d, .o = o, .deadline_ns = clock_ns() + o->timeout_ns};
        int fds[2];
        pid_t pid;
        bool works;

        if (tp_url_parse(o->url, &p.url) < 0 || pipe(fds) < 0) {
                doctor_find(d, DOC_OFF, "url", "%s", err_str(-errno));
                return false;
        }
        p.networked = *p.url.port != '\0';
        fflush(stdout); /* nothing buffered is printed twice */
        pid = fork();
        if (pid == 0) {
                close(fds[0]);
                child_main(&p, fds[1]);
        }
        close(fds[1]);
        if (pid < 0)
                doctor_find(d, DOC_UNKNOWN, "pair", "no process for it: %s", strerror(errno));
        works = pid > 0 && read_findings(&p, fds[0]);
        close(fds[0]);
        if (pid > 0) {
                kill(pid, SIGKILL);
                waitpid(pid, NULL, 0);
        }
        return works;
}
