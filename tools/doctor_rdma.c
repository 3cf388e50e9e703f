/*
 * doctor: RDMA devices, the GID that would be chosen, and who may open them.
 *
 * The choice of a GID is the rdma transport's, made here from what the kernel shows, as long as no peer says which network
 * it is on: RoCE v2 before v1, IPv4-mapped before global IPv6 before link-local, then the lowest index; over InfiniBand
 * index 0.
 */
#include <arpa/inet.h>
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "doctor_inside.h"

#define IB          "/sys/class/infiniband"
#define RDMA_CLASS  "0x0207"
#define ETH_CLASS   "0x0200"
#define MELLANOX    "0x15b3"
#define ROCE_HEADS  96 /* GRH, UDP, BTH, the longest extension, ICRC: what the kernel takes off a packet's MTU */
#define RDMA_MTU    4096
#define WANTED_MTU  4200
#define PORT_ACTIVE 4

/* ---- GIDs ---- */

static bool is_mapped(const uint8_t g[16])
{
        static const uint8_t head[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};

        return memcmp(g, head, sizeof(head)) == 0;
}

static bool is_link_local(const uint8_t g[16])
{
        return g[0] == 0xfe && (g[1] & 0xc0) == 0x80;
}

static bool is_empty(const uint8_t g[16])
{
        static const uint8_t none[16];

        return memcmp(g, none, sizeof(none)) == 0;
}

/* false where there is none at this index, or it is no GID. */
static bool gid_read(const struct doctor *d, const char *dev, int port, int index, struct doctor_gid *out)
{
        char text[DOC_TEXT];

        if (!doctor_look(d, text, IB "/%s/ports/%d/gids/%d", dev, port, index) ||
            inet_pton(AF_INET6, text, out->bytes) != 1 || is_empty(out->bytes))
                return false;
        out->index = index;
        out->link_local = is_link_local(out->bytes);
        if (is_mapped(out->bytes))
                inet_ntop(AF_INET, out->bytes + 12, out->text, sizeof(out->text));
        else
                inet_ntop(AF_INET6, out->bytes, out->text, sizeof(out->text));
        doctor_look(d, text, IB "/%s/ports/%d/gid_attrs/types/%d", dev, port, index);
        snprintf(out->type, sizeof(out->type), "%.15s", strstr(text, "RoCE v1") ? "RoCE v1" : text);
        doctor_look(d, text, IB "/%s/ports/%d/gid_attrs/ndevs/%d", dev, port, index);
        snprintf(out->netdev, sizeof(out->netdev), "%.31s", text);
        return true;
}

/* Higher is better. */
static int gid_rank(const struct doctor_gid *g)
{
        int kind = is_mapped(g->bytes) ? 3 : g->link_local ? 1 : 2;

        return (strcmp(g->type, "RoCE v2") == 0 ? 10 : 0) + kind;
}

void doctor_gid_choose(const struct doctor *d, const char *dev, int port, struct doctor_gid *out)
{
        struct doctor_names gids = doctor_list(d, IB "/%s/ports/%d/gids", dev, port);
        char layer[DOC_TEXT];
        int total = 0;

        doctor_look(d, layer, IB "/%s/ports/%d/link_layer", dev, port);
        *out = (struct doctor_gid){.index = -1};
        for (int i = 0; i < gids.n; i++) {
                struct doctor_gid g = {0};

                if (!isdigit((unsigned char)gids.at[i]->d_name[0]) ||
                    !gid_read(d, dev, port, atoi(gids.at[i]->d_name), &g))
                        continue;
                total++;
                if (strcmp(layer, "InfiniBand") == 0 ? g.index == 0 : out->index < 0 || gid_rank(&g) > gid_rank(out))
                        *out = g;
        }
        out->total = total;
        doctor_list_free(&gids);
}

bool doctor_gid_find(const struct doctor *d, const uint8_t address[16], char dev[DOC_TEXT], int *port, int *index)
{
        struct doctor_names devs = doctor_list(d, IB);
        bool found = false;

        for (int i = 0; i < devs.n && !found; i++) {
                struct doctor_names ports = doctor_list(d, IB "/%s/ports", devs.at[i]->d_name);

                for (int p = 0; p < ports.n && !found; p++) {
                        int number = atoi(ports.at[p]->d_name);
                        struct doctor_names gids = doctor_list(d, IB "/%s/ports/%d/gids", devs.at[i]->d_name, number);

                        for (int g = 0; g < gids.n && !found; g++) {
                                struct doctor_gid gid = {0};

                                found = gid_read(d, devs.at[i]->d_name, number, atoi(gids.at[g]->d_name), &gid) &&
                                        memcmp(gid.bytes, address, 16) == 0 && strcmp(gid.type, "RoCE v2") == 0;
                                if (!found)
                                        continue;
                                snprintf(dev, DOC_TEXT, "%s", devs.at[i]->d_name);
                                *port = number;
                                *index = gid.index;
                        }
                        doctor_list_free(&gids);
                }
                doctor_list_free(&ports);
        }
        doctor_list_free(&devs);
        return found;
}

int doctor_rdma_mtu(int netdev_mtu)
{
        int mtu = RDMA_MTU;

        while (mtu >= 256 && mtu > netdev_mtu - ROCE_HEADS)
                mtu /= 2;
        return mtu >= 256 ? mtu : 0;
}

/* ---- one port ---- */

struct port {
        const char *dev;
        int number;
        char state[DOC_TEXT], phys[DOC_TEXT], rate[DOC_TEXT], layer[DOC_TEXT], netdev[DOC_TEXT];
        bool up, ethernet;
        const char *emulated; /* by what; NULL: hardware */
        long long numa, netdev_mtu;
        int mtu;
        struct doctor_gid gid;
};

/* Soft-RoCE shows the network device below it in `parent`; what hangs on no device of the host at all is software too. */
static const char *emulated_by(const struct doctor *d, const char *dev)
{
        char text[DOC_TEXT], where[DOC_PATH];

        if (doctor_look(d, text, IB "/%s/parent", dev))
                return "Soft-RoCE";
        doctor_look(d, text, IB "/%s/node_desc", dev);
        if (strstr(text, "Software iWARP"))
                return "Soft-iWARP";
        doctor_where(d, where, IB "/%s", dev);
        return strncmp(where, "virtual/", 8) == 0 ? "software" : NULL;
}

static void port_netdev(const struct doctor *d, struct port *p)
{
        struct doctor_names names;

        snprintf(p->netdev, sizeof(p->netdev), "%s", p->gid.netdev);
        if (!*p->netdev)
                doctor_look(d, p->netdev, IB "/%s/parent", p->dev);
        if (*p->netdev)
                return;
        names = doctor_list(d, IB "/%s/device/net", p->dev);
        if (names.n > 0)
                snprintf(p->netdev, sizeof(p->netdev), "%s", names.at[0]->d_name);
        doctor_list_free(&names);
}

static void port_look(const struct doctor *d, const char *dev, int number, struct port *p)
{
        *p = (struct port){.dev = dev, .number = number};
        doctor_look(d, p->state, IB "/%s/ports/%d/state", dev, number);
        doctor_look(d, p->phys, IB "/%s/ports/%d/phys_state", dev, number);
        doctor_look(d, p->rate, IB "/%s/ports/%d/rate", dev, number);
        doctor_look(d, p->layer, IB "/%s/ports/%d/link_layer", dev, number);
        p->up = atoi(p->state) == PORT_ACTIVE;
        p->ethernet = strcmp(p->layer, "InfiniBand") != 0;
        p->emulated = emulated_by(d, dev);
        p->numa = doctor_number(d, -1, IB "/%s/device/numa_node", dev);
        doctor_gid_choose(d, dev, number, &p->gid);
        port_netdev(d, p);
        p->netdev_mtu = *p->netdev ? doctor_number(d, 0, "/sys/class/net/%s/mtu", p->netdev) : 0;
        p->mtu = p->ethernet && p->netdev_mtu > 0 && p->netdev_mtu < 65536 ? doctor_rdma_mtu((int)p->netdev_mtu) : 0;
}

static void port_facts(struct doctor *d, const struct port *p)
{
        json *f = doctor_facts(d);

        json_set_str(f, "device", p->dev);
        json_set_int(f, "port", p->number);
        json_set_str(f, "state", p->state);
        json_set_str(f, "phys_state", p->phys);
        json_set_str(f, "link_layer", p->layer);
        json_set_str(f, "rate", p->rate);
        json_set_str(f, "netdev", *p->netdev ? p->netdev : NULL);
        json_set(f, "netdev_mtu", p->netdev_mtu > 0 ? json_of_int(p->netdev_mtu) : json_of_null());
        json_set(f, "rdma_mtu", p->mtu ? json_of_int(p->mtu) : json_of_null());
        json_set(f, "numa_node", p->numa >= 0 ? json_of_int(p->numa) : json_of_null());
        json_set_bool(f, "emulated", p->emulated != NULL);
        json_set_int(f, "gids", p->gid.total);
        json_set(f, "gid_index", p->gid.index >= 0 ? json_of_int(p->gid.index) : json_of_null());
        json_set_str(f, "gid", p->gid.index >= 0 ? p->gid.text : NULL);
        json_set_str(f, "gid_type", p->gid.index >= 0 ? p->gid.type : NULL);
}

/* "1: DOWN" without its number. */
static const char *state_word(const char *text)
{
        const char *colon = strstr(text, ": ");

        return colon ? colon + 2 : *text ? text : "state not shown";
}

static void say_down(struct doctor *d, const struct port *p)
{
        doctor_find(d, DOC_OFF, "rdma device", "%s port %d: %s, %s", p->dev, p->number, state_word(p->state),
                    *p->layer ? p->layer : "link layer not shown");
        doctor_why(d, "the link is not active%s%s%s", *p->phys ? " (physical state " : "",
                   *p->phys ? state_word(p->phys) : "", *p->phys ? ")" : "");
        if (!p->ethernet)
                doctor_mend(d, BY_OWNER, "cable and switch port; a subnet manager (opensm) on this fabric");
        else if (*p->netdev)
                doctor_mend(d, BY_ADMIN, "ip link set %s up; then cable and switch port", p->netdev);
        else
                doctor_mend(d, BY_OWNER, "cable and switch port");
}

static void say_gid(struct doctor *d, const struct port *p)
{
        const struct doctor_gid *g = &p->gid;
        const char *netdev = *p->netdev ? p->netdev : "NETDEV";

        if (!p->ethernet)
                return;
        if (g->index < 0) {
                doctor_find(d, DOC_OFF, "gid", "%s port %d has none", p->dev, p->number);
                doctor_why(d, "without an address of its network device a RoCE port cannot be reached");
                doctor_mend(d, BY_ADMIN, "ip link set %s up && ip address add ADDRESS/PREFIX dev %s", netdev, netdev);
                return;
        }
        if (strcmp(g->type, "RoCE v2") == 0 && !g->link_local) {
                doctor_find(d, DOC_OK, "gid", "%s port %d: index %d, %s, %s, of %d", p->dev, p->number, g->index,
                            g->text, g->type, g->total);
        } else {
                bool v2 = strcmp(g->type, "RoCE v2") == 0;

                doctor_find(d, DOC_LIMITED, "gid", "%s port %d: index %d, %s, %s, of %d", p->dev, p->number, g->index,
                            g->text, *g->type ? g->type : "type not shown", g->total);
                doctor_why(d, v2 ? "the only ones are link-local: they reach no further than this network"
                                 : "no RoCE v2 GID: v1 is not routed, and both ends must use the same version");
                doctor_mend(d, BY_ADMIN, "ip address add ADDRESS/PREFIX dev %s", netdev);
        }
        port_facts(d, p);
}

static void say_port(struct doctor *d, const struct port *p)
{
        char numa[32] = "", netdev[96] = "", mtu[32] = "", emulated[48] = "";

        if (p->numa >= 0)
                snprintf(numa, sizeof(numa), ", NUMA node %lld", p->numa);
        if (*p->netdev)
                snprintf(netdev, sizeof(netdev), ", netdev %.64s", p->netdev);
        if (p->mtu)
                snprintf(mtu, sizeof(mtu), ", MTU %d", p->mtu);
        if (p->emulated)
                snprintf(emulated, sizeof(emulated), ", emulated (%s)", p->emulated);
        bool limited = p->emulated || (p->mtu && p->mtu < RDMA_MTU);

        doctor_find(d, limited ? DOC_LIMITED : DOC_OK, "rdma device", "%s port %d: active, %s, %s%s%s%s%s", p->dev,
                    p->number, *p->layer ? p->layer : "link layer not shown", *p->rate ? p->rate : "rate not shown",
                    netdev, mtu, numa, emulated);
        port_facts(d, p);
        if (p->emulated && p->mtu < RDMA_MTU && p->mtu)
                doctor_why(d,
                           "emulated: for tests, times are not hardware's; packets carry %d bytes because %s has MTU "
                           "%lld",
                           p->mtu, p->netdev, p->netdev_mtu);
        else if (p->emulated)
                doctor_why(d, "emulated by the processor: for tests; its times are not those of hardware");
        else if (limited)
                doctor_why(d, "packets carry %d bytes instead of %d because %s has MTU %lld", p->mtu, RDMA_MTU,
                           p->netdev, p->netdev_mtu);
        if (limited && p->mtu && p->mtu < RDMA_MTU)
                doctor_mend(d, BY_ADMIN, "ip link set %s mtu %d (at both ends, and in the switch)", p->netdev,
                            WANTED_MTU);
        say_gid(d, p);
}

/* ---- all ---- */

/* Cards whose RDMA half has no driver: no device shows, though the hardware is there. */
static int say_cards_without_device(struct doctor *d)
{
        struct doctor_names slots = doctor_list(d, "/sys/bus/pci/devices");
        char vendor[DOC_TEXT], class[DOC_TEXT], driver[DOC_TEXT];
        int found = 0;

        for (int i = 0; i < slots.n; i++) {
                const char *slot = slots.at[i]->d_name;

                doctor_look(d, vendor, "/sys/bus/pci/devices/%s/vendor", slot);
                doctor_look(d, class, "/sys/bus/pci/devices/%s/class", slot);
                if (strncmp(class, RDMA_CLASS, 6) != 0 &&
                    (strcmp(vendor, MELLANOX) != 0 || strncmp(class, ETH_CLASS, 6) != 0))
                        continue;
                if (doctor_there(d, "/sys/bus/pci/devices/%s/infiniband", slot))
                        continue;
                found++;
                bool bound = doctor_link(d, driver, "/sys/bus/pci/devices/%s/driver", slot);

                doctor_find(d, DOC_OFF, "rdma device", "card at %s shows no RDMA device (driver: %s)", slot,
                            bound ? driver : "none");
                if (bound && strcmp(driver, "vfio-pci") == 0) {
                        doctor_why(d, "vfio-pci holds it, for DPDK or a virtual machine");
                        doctor_mend(d, BY_ADMIN, "dpdk-devbind.py --bind=mlx5_core %s", slot);
                } else {
                        doctor_why(d, "the kernel's half of the driver is not loaded");
                        doctor_mend(d, BY_ADMIN, "modprobe mlx5_ib (of other makers: irdma, bnxt_re); see dmesg");
                }
        }
        doctor_list_free(&slots);
        return found;
}

/* The module is on disk, or in the kernel. */
static bool has_rxe(const struct doctor *d)
{
        static const char *const ends[] = {"", ".xz", ".zst", ".gz"};
        char release[DOC_TEXT];

        if (doctor_there(d, "/sys/module/rdma_rxe"))
                return true;
        doctor_look(d, release, "/proc/sys/kernel/osrelease");
        for (unsigned i = 0; i < 4; i++)
                if (doctor_there(d, "/lib/modules/%s/kernel/drivers/infiniband/sw/rxe/rdma_rxe.ko%s", release, ends[i]))
                        return true;
        return false;
}

static void say_none(struct doctor *d)
{
        struct doctor_names nets = doctor_list(d, "/sys/class/net");
        const char *net = "NETDEV";

        for (int i = nets.n - 1; i >= 0; i--)
                if (doctor_there(d, "/sys/class/net/%s/device", nets.at[i]->d_name))
                        net = nets.at[i]->d_name;
        doctor_find(d, DOC_OFF, "rdma device", "none");
        if (has_rxe(d)) {
                doctor_why(d, "no card; this kernel can emulate one (Soft-RoCE), for tests");
                doctor_mend(d, BY_ADMIN, "modprobe rdma_rxe && rdma link add rxe0 type rxe netdev %s", net);
        } else {
                doctor_why(d, "no card, and this kernel has no rdma_rxe to emulate one");
                doctor_mend(d, BY_OWNER, "an RDMA card and its driver; for tests, a kernel with rdma_rxe");
        }
        doctor_list_free(&nets);
}

void doctor_probe_rdma(struct doctor *d)
{
        struct doctor_names devs = doctor_list(d, IB);
        int cards;

        for (int i = 0; i < devs.n; i++) {
                struct doctor_names ports = doctor_list(d, IB "/%s/ports", devs.at[i]->d_name);
                struct port p;

                if (ports.n == 0)
                        doctor_find(d, DOC_UNKNOWN, "rdma device", "%s: the kernel shows no port of it",
                                    devs.at[i]->d_name);
                for (int n = 0; n < ports.n; n++) {
                        port_look(d, devs.at[i]->d_name, atoi(ports.at[n]->d_name), &p);
                        if (p.up) {
                                say_port(d, &p);
                                continue;
                        }
                        say_down(d, &p);
                        port_facts(d, &p);
                }
                doctor_list_free(&ports);
        }
        cards = say_cards_without_device(d);
        if (devs.n == 0 && cards == 0)
                say_none(d);
        doctor_list_free(&devs);
}

/* Whoever uses verbs opens /dev/infiniband/uverbsN. */
void doctor_probe_rdma_access(struct doctor *d)
{
        struct doctor_names nodes = doctor_list(d, "/dev/infiniband");
        char path[DOC_TEXT + 32];
        int seen = 0, refused = 0;

        if (doctor_count(d, IB) == 0) {
                doctor_list_free(&nodes);
                return;
        }
        for (int i = 0; i < nodes.n; i++) {
                if (strncmp(nodes.at[i]->d_name, "uverbs", 6) != 0)
                        continue;
                snprintf(path, sizeof(path), "/dev/infiniband/%s", nodes.at[i]->d_name);
                seen++;
                refused += doctor_access(d, path, R_OK | W_OK) != 0;
        }
        doctor_list_free(&nodes);
        if (seen == 0) {
                bool module = doctor_there(d, "/sys/module/ib_uverbs");

                doctor_find(d, DOC_OFF, "rdma access", "devices exist, but no /dev/infiniband/uverbs*");
                doctor_why(d,
                           module ? "this container or job was not given them" : "the module ib_uverbs is not loaded");
                doctor_mend(d, BY_ADMIN,
                            module ? "docker run --device=/dev/infiniband ... (or the job's equal)"
                                   : "modprobe ib_uverbs");
        } else if (refused) {
                doctor_find(d, DOC_OFF, "rdma access", "%d of %d /dev/infiniband/uverbs* may not be opened", refused,
                            seen);
                doctor_why(d, "they can be opened by another user or group only");
                doctor_mend(d, BY_ADMIN, "chmod 0666 /dev/infiniband/uverbs* (lasting: the udev rule of rdma-core)");
        } else {
                doctor_find(d, DOC_OK, "rdma access", "/dev/infiniband/uverbs* may be opened");
        }
        if (seen && !doctor_there(d, "/dev/infiniband/rdma_cm")) {
                doctor_find(d, DOC_LIMITED, "rdma_cm", "no /dev/infiniband/rdma_cm");
                doctor_why(d, "connections with ?cm=1 need it; those without do not");
                doctor_mend(d, BY_ADMIN, "modprobe rdma_ucm");
        }
}
