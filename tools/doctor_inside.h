/*
 * doctor, inside: doctor.c (options, the table of probes, printing), doctor_look.c (looking and noting down),
 * doctor_host.c, doctor_rdma.c, doctor_gpu.c, doctor_dpdk.c (what each looks at), doctor_peer.c (--peer).
 *
 * A probe looks at one thing below d->root and adds findings. It changes nothing, needs no privilege, and never fails:
 * what cannot be seen is a finding too. Everything that it reads may be absent, cut short or garbage.
 */
#ifndef DJINN_TOOLS_DOCTOR_INSIDE_H
#define DJINN_TOOLS_DOCTOR_INSIDE_H

#include <dirent.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "json.h"

#define DOC_TEXT 256 /* bytes of a line that is looked at, with its end */
#define DOC_PATH 512

enum doctor_verdict {
        DOC_OK,
        DOC_LIMITED, /* works, not as well as it could */
        DOC_OFF,
        DOC_UNKNOWN /* cannot be seen from here */
};

extern const char *const doctor_verdict_names[];

/* Who may run what mends it. BY_ADMIN is "you" for a superuser; BY_OWNER (hardware, firmware) never is. */
enum doctor_who { BY_YOU, BY_ADMIN, BY_OWNER };

struct doctor {
        const char *root; /* stands before every path: "", or a tree that a test made */
        const char *section;
        bool superuser; /* may load modules and write /sys and /proc/sys */
        json *findings;
        json *last; /* the finding that why, mend and fact speak of */
};

/* ---- noting down ---- */

/* A new finding. */
void doctor_find(struct doctor *d, enum doctor_verdict verdict, const char *what, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));
/* Why it is not ok, of the last finding. */
void doctor_why(struct doctor *d, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* The command or the step that mends it, and who may. */
void doctor_mend(struct doctor *d, enum doctor_who who, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
/* The last finding's object for programs to read: filled by the caller. */
json *doctor_facts(struct doctor *d);

/* ---- looking ---- */

/* The first line of a file, unprintable bytes as '?'; "" and false where it cannot be read. */
bool doctor_look(const struct doctor *d, char out[DOC_TEXT], const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
/* A number in a file, decimal or 0x; otherwise where there is none. */
long long doctor_number(const struct doctor *d, long long otherwise, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
/* The whole of a small text file; free() it. NULL where it cannot be read. */
char *doctor_text(const struct doctor *d, const char *path);
/* The line that begins with label in a text such as /proc/self/status, without the label and the blanks behind it. */
bool doctor_line(const char *text, const char *label, char out[DOC_TEXT]);
bool doctor_there(const struct doctor *d, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* access(2): 0 or the errno. */
int doctor_access(const struct doctor *d, const char *path, int mode);
/* The last part of what a link points at: "mlx5_core" of .../driver. */
bool doctor_link(const struct doctor *d, char out[DOC_TEXT], const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
/* Where a device hangs: the real path behind "/devices/", "" where there is none. */
void doctor_where(const struct doctor *d, char out[DOC_PATH], const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* The printable names in a folder, sorted; n is 0 where there is no such folder. */
struct doctor_names {
        struct dirent **at;
        int n;
};
struct doctor_names doctor_list(const struct doctor *d, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
void doctor_list_free(struct doctor_names *names);
int doctor_count(const struct doctor *d, const char *folder);

/* How many numbers a list such as "0-3,8" names; 0 when it is none. */
long doctor_list_count(const char *list);
/* "8.0 MiB", "16.0 GiB" */
const char *doctor_size(char buf[32], unsigned long long bytes);
/* Numerical a.b of a kernel's release is at least major.minor. */
bool doctor_kernel_at_least(const struct doctor *d, int major, int minor);

/* ---- probes ---- */

void doctor_probe_kernel(struct doctor *d);
void doctor_probe_machine(struct doctor *d);
void doctor_probe_cores(struct doctor *d);
void doctor_probe_quota(struct doctor *d);
void doctor_probe_governor(struct doctor *d);
void doctor_probe_clock(struct doctor *d);
void doctor_probe_numa(struct doctor *d);
void doctor_probe_memlock(struct doctor *d);
void doctor_probe_huge_pages(struct doctor *d);
void doctor_probe_shm(struct doctor *d);

void doctor_probe_rdma(struct doctor *d);
void doctor_probe_rdma_access(struct doctor *d);

void doctor_probe_gpu(struct doctor *d);
void doctor_probe_gpu_module(struct doctor *d);
void doctor_probe_gpudirect(struct doctor *d);
void doctor_probe_acs(struct doctor *d);

void doctor_probe_dpdk(struct doctor *d);
void doctor_probe_vfio(struct doctor *d);
void doctor_probe_iommu(struct doctor *d);

/* ---- what several probes ask ---- */

/* Why this build has no such transport or device, NULL when it has it. */
const char *doctor_no_transport(const char *scheme);
const char *doctor_no_device(const char *name);

/* The GID that is chosen where none is named, of one port. */
struct doctor_gid {
        int index; /* -1: none can be used */
        int total; /* GIDs that are not empty */
        uint8_t bytes[16];
        char text[48]; /* "10.77.0.1" where IPv4-mapped, else as IPv6 */
        char type[16]; /* "RoCE v2", "RoCE v1", "IB" */
        char netdev[32];
        bool link_local;
};
void doctor_gid_choose(const struct doctor *d, const char *dev, int port, struct doctor_gid *out);
/* The port whose GID is the address (16 bytes, IPv4 mapped): true and where it stands. */
bool doctor_gid_find(const struct doctor *d, const uint8_t address[16], char dev[DOC_TEXT], int *port, int *index);
/* Payload of an RDMA packet over Ethernet with this MTU of the network device; 0: too small. */
int doctor_rdma_mtu(int netdev_mtu);

/* How far two PCI devices are from one another, as NVIDIA's tools name it. */
enum doctor_distance {
        NEAR_PIX,  /* below one PCIe bridge or switch */
        NEAR_PXB,  /* several bridges, none of them the processor's */
        NEAR_PHB,  /* through the processor's host bridge */
        NEAR_NODE, /* through two host bridges of one NUMA node */
        NEAR_SYS,  /* across the link between processors */
        NEAR_UNKNOWN
};
extern const char *const doctor_distance_names[], *const doctor_distance_texts[];
/* where: as doctor_where says; numa: -1 not said; nodes: how many the host has. Pure. */
enum doctor_distance doctor_distance(const char *where_a, int numa_a, const char *where_b, int numa_b, long nodes);
/* The redirecting bits of ACS's control register in a PCI configuration space: -1 no ACS there, -2 cannot be seen. Pure. */
int doctor_acs_bits(const uint8_t *config, size_t len);

/* ---- doctor_peer.c ---- */

struct doctor_peer_opts {
        const char *url, *key_file;
        uint64_t timeout_ns; /* of everything together */
};
/* Adds the pair's findings. true: the pair works. */
bool doctor_peer(struct doctor *d, const struct doctor_peer_opts *o);

#endif
