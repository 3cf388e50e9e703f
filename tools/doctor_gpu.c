/*
 * doctor: GPUs, and what stands between them and the RDMA devices. The requirements of each path (dma-buf: kernel 5.12, an
 * open kernel module of 515 or newer, a NIC driver that takes it; peer memory: nvidia_peermem) are those of the makers'
 * documentation; whether a path truly works only a verified transfer can say.
 */
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "check.h"
#include "doctor_inside.h"

#define PCI          "/sys/bus/pci/devices"
#define NVIDIA       "0x10de"
#define AMD          "0x1002"
#define GPUS_MAX     64
#define SMALL_BAR1   (256ull << 20) /* what boards without a large BAR show, however much memory they have */
#define OPEN_FIRST   515            /* the first driver whose open module exports dma-buf */
#define CONFIG_LEN   4096
#define ACS_REDIRECT 0x2c /* request redirect, completion redirect, egress control */
#define EXT_CAPS     0x100
#define EXT_CAP_ACS  0x000d
#define MENDS_LEN    160

struct gpu {
        char slot[32]; /* of the bus; "" where only a device file shows it */
        char model[96], where[DOC_PATH];
        bool driven;
        int numa;
        unsigned long long bar1;
};

struct gpus {
        struct gpu at[GPUS_MAX];
        int n;
};

/* ---- pure parts ---- */

const char *const doctor_distance_names[] = {
    [NEAR_PIX] = "PIX",   [NEAR_PXB] = "PXB", [NEAR_PHB] = "PHB",
    [NEAR_NODE] = "NODE", [NEAR_SYS] = "SYS", [NEAR_UNKNOWN] = "unknown",
};

const char *const doctor_distance_texts[] = {
    [NEAR_PIX] = "one PCIe switch",
    [NEAR_PXB] = "several PCIe switches",
    [NEAR_PHB] = "the processor's host bridge",
    [NEAR_NODE] = "two host bridges of one NUMA node",
    [NEAR_SYS] = "the link between processors",
    [NEAR_UNKNOWN] = "a way that is not shown",
};

static int parts_of(const char *path)
{
        int n = *path != '\0';

        for (; *path; path++)
                n += *path == '/';
        return n;
}

/* How many parts, from the root on, are the same. */
static int parts_shared(const char *a, const char *b)
{
        int shared = 0;

        for (;;) {
                size_t la = strcspn(a, "/"), lb = strcspn(b, "/");

                if (la == 0 || la != lb || strncmp(a, b, la) != 0)
                        return shared;
                shared++;
                if (!a[la] || !b[lb])
                        return shared;
                a += la + 1;
                b += lb + 1;
        }
}

/* A path is "pci0000:00/0000:00:01.0/0000:01:00.0": the host bridge, bridges, the device. */
enum doctor_distance doctor_distance(const char *where_a, int numa_a, const char *where_b, int numa_b, long nodes)
{
        int shared = parts_shared(where_a, where_b);
        int deepest = parts_of(where_a) > parts_of(where_b) ? parts_of(where_a) : parts_of(where_b);

        if (!*where_a || !*where_b)
                return NEAR_UNKNOWN;
        if (shared == 0) {
                if (nodes == 1 || (numa_a >= 0 && numa_a == numa_b))
                        return NEAR_NODE;
                return numa_a >= 0 && numa_b >= 0 ? NEAR_SYS : NEAR_UNKNOWN;
        }
        if (shared == 1)
                return NEAR_PHB;
        /* Below the bridge that both share, each may have one port of a switch and itself. */
        return deepest - shared <= 2 ? NEAR_PIX : NEAR_PXB;
}

int doctor_acs_bits(const uint8_t *config, size_t len)
{
        size_t at = EXT_CAPS;

        if (len < EXT_CAPS + 4)
                return -2;
        for (int hops = 0; hops < 64 && at >= EXT_CAPS && at + 8 <= len; hops++) {
                uint32_t head = config[at] | (uint32_t)config[at + 1] << 8 | (uint32_t)config[at + 2] << 16 |
                                (uint32_t)config[at + 3] << 24;

                if ((head & 0xffff) == EXT_CAP_ACS)
                        return (config[at + 6] | config[at + 7] << 8) & ACS_REDIRECT;
                at = head >> 20 & 0xffc;
        }
        return -1;
}

/* ---- GPUs ---- */

/* The second line of `resource` is BAR1, through which others reach the GPU's memory: "start end flags". */
static unsigned long long bar1_of(const struct doctor *d, const char *slot)
{
        char path[DOC_TEXT], *text;
        unsigned long long start = 0, end = 0;
        const char *line;

        snprintf(path, sizeof(path), PCI "/%s/resource", slot);
        text = doctor_text(d, path);
        line = text ? strchr(text, '\n') : NULL;
        if (!line || sscanf(line + 1, "%llx %llx", &start, &end) != 2 || end <= start)
                start = end = 0;
        free(text);
        return end ? end - start + 1 : 0;
}

static void gpu_add(const struct doctor *d, struct gpus *g, const char *slot)
{
        char path[DOC_TEXT], *text;
        struct gpu *gpu = &g->at[g->n];

        for (int i = 0; i < g->n; i++)
                if (strcmp(g->at[i].slot, slot) == 0)
                        return;
        if (g->n == GPUS_MAX)
                return;
        g->n++;
        snprintf(gpu->slot, sizeof(gpu->slot), "%.31s", slot);
        gpu->driven = doctor_there(d, "/proc/driver/nvidia/gpus/%s", slot);
        gpu->numa = (int)doctor_number(d, -1, PCI "/%s/numa_node", slot);
        gpu->bar1 = bar1_of(d, slot);
        doctor_where(d, gpu->where, PCI "/%s", slot);
        snprintf(path, sizeof(path), "/proc/driver/nvidia/gpus/%s/information", slot);
        text = doctor_text(d, path);
        char model[DOC_TEXT];

        doctor_line(text, "Model:", model);
        snprintf(gpu->model, sizeof(gpu->model), "%.95s", *model ? model : "NVIDIA GPU, model not shown");
        free(text);
}

static bool on_bus(const struct doctor *d, const char *slot, const char *vendor, const char *class)
{
        char text[DOC_TEXT];

        return doctor_look(d, text, PCI "/%s/vendor", slot) && strcmp(text, vendor) == 0 &&
               doctor_look(d, text, PCI "/%s/class", slot) && strncmp(text, class, strlen(class)) == 0;
}

/* From the bus and from the driver: a container may hide the one or the other. */
static void gpus_look(const struct doctor *d, struct gpus *g)
{
        struct doctor_names slots = doctor_list(d, PCI), driven = doctor_list(d, "/proc/driver/nvidia/gpus");

        *g = (struct gpus){0};
        for (int i = 0; i < driven.n; i++)
                gpu_add(d, g, driven.at[i]->d_name);
        for (int i = 0; i < slots.n; i++)
                if (on_bus(d, slots.at[i]->d_name, NVIDIA, "0x03"))
                        gpu_add(d, g, slots.at[i]->d_name);
        doctor_list_free(&slots);
        doctor_list_free(&driven);
}

/* /dev/nvidia0, nvidia1, ...: all that some containers show. */
static int device_files(const struct doctor *d)
{
        struct doctor_names names = doctor_list(d, "/dev");
        int n = 0;

        for (int i = 0; i < names.n; i++)
                n += strncmp(names.at[i]->d_name, "nvidia", 6) == 0 && isdigit((unsigned char)names.at[i]->d_name[6]);
        doctor_list_free(&names);
        return n;
}

static int other_makers(const struct doctor *d)
{
        struct doctor_names slots = doctor_list(d, PCI);
        int n = 0;

        for (int i = 0; i < slots.n; i++)
                n += on_bus(d, slots.at[i]->d_name, AMD, "0x03") || on_bus(d, slots.at[i]->d_name, AMD, "0x12");
        doctor_list_free(&slots);
        return n;
}

static void say_gpu(struct doctor *d, const struct gpu *gpu)
{
        char numa[32] = "", bar[64] = "", size[32];

        if (!gpu->driven) {
                doctor_find(d, DOC_OFF, "gpu", "an NVIDIA GPU is on the bus at %s, but no driver has it", gpu->slot);
                doctor_why(d, "NVIDIA's driver is not installed, not loaded, or not shown to this container");
                doctor_mend(d, BY_ADMIN,
                            "modprobe nvidia (Debian: apt install nvidia-open); of a container: --gpus all");
                return;
        }
        if (gpu->numa >= 0)
                snprintf(numa, sizeof(numa), ", NUMA node %d", gpu->numa);
        if (gpu->bar1)
                snprintf(bar, sizeof(bar), ", BAR1 %s", doctor_size(size, gpu->bar1));
        bool small = gpu->bar1 && gpu->bar1 <= SMALL_BAR1;

        doctor_find(d, small ? DOC_LIMITED : DOC_OK, "gpu", "%s at %s%s%s", gpu->model, gpu->slot, numa, bar);
        json_set_str(doctor_facts(d), "slot", gpu->slot);
        json_set_str(doctor_facts(d), "model", gpu->model);
        json_set(doctor_facts(d), "numa_node", gpu->numa >= 0 ? json_of_int(gpu->numa) : json_of_null());
        json_set(doctor_facts(d), "bar1_bytes", gpu->bar1 ? json_of_num((double)gpu->bar1) : json_of_null());
        if (small) {
                doctor_why(d, "a card reaches only so much of its memory at a time, shared by all that register it");
                doctor_mend(d, BY_OWNER, "firmware: Above 4G Decoding and Resizable BAR on (where the board has it)");
        }
}

void doctor_probe_gpu(struct doctor *d)
{
        const char *no_cuda = doctor_no_device("cuda");
        struct gpus g;
        int files, others = other_makers(d);

        gpus_look(d, &g);
        files = device_files(d);
        for (int i = 0; i < g.n; i++)
                say_gpu(d, &g.at[i]);
        if (g.n == 0 && files > 0)
                doctor_find(d, DOC_OK, "gpu", "%d, by their device files; the bus does not show them here", files);
        if (others)
                doctor_find(d, DOC_OFF, "gpu", "%d of AMD: no device of this program drives them", others);
        if (g.n == 0 && files == 0 && others == 0) {
                doctor_find(d, DOC_OFF, "gpu", "none");
                doctor_why(d, "the CPU runs the same sweep");
                doctor_mend(d, BY_OWNER, "an NVIDIA GPU and its driver");
        }
        if (no_cuda) {
                doctor_find(d, DOC_OFF, "cuda", "%s%s", no_cuda,
                            g.n || files ? ": the GPU is there and stays unused" : "");
                json_set_int(doctor_facts(d), "gpus", g.n ? g.n : files);
        }
}

/* "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build ...": the version's first number. */
static int driver_version(const struct doctor *d, char version[DOC_TEXT], bool *open)
{
        char line[DOC_TEXT];

        version[0] = '\0';
        *open = false;
        if (doctor_look(d, line, "/proc/driver/nvidia/version")) {
                char *save = NULL;

                *open = strstr(line, "Open Kernel Module") != NULL;
                for (char *word = strtok_r(line, " \t", &save); word; word = strtok_r(NULL, " \t", &save))
                        if (isdigit((unsigned char)*word) && strchr(word, '.')) {
                                snprintf(version, DOC_TEXT, "%s", word);
                                break;
                        }
        }
        if (!*version)
                doctor_look(d, version, "/sys/module/nvidia/version");
        return atoi(version);
}

static const char *peermem_module(const struct doctor *d)
{
        static const char *const names[] = {"nvidia_peermem", "nv_peer_mem"};

        for (size_t i = 0; i < ARRAY_LEN(names); i++)
                if (doctor_there(d, "/sys/module/%s", names[i]))
                        return names[i];
        return NULL;
}

static bool has_libcuda(const struct doctor *d)
{
        static const char *const folders[] = {
            "/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64",       "/usr/lib",
            "/usr/local/nvidia/lib64",   "/usr/local/cuda/compat",     "/usr/lib/wsl/lib", "/run/opengl-driver/lib",
        };

        for (size_t i = 0; i < ARRAY_LEN(folders); i++)
                if (doctor_there(d, "%s/libcuda.so.1", folders[i]))
                        return true;
        return false;
}

static void say_gpu_files(struct doctor *d)
{
        int refused = doctor_access(d, "/dev/nvidiactl", R_OK | W_OK);

        if (!doctor_there(d, "/dev/nvidiactl")) {
                doctor_find(d, DOC_OFF, "gpu access", "the driver is there, but /dev/nvidiactl is not");
                doctor_why(d, "this container or job was not given the GPU");
                doctor_mend(d, BY_ADMIN, "docker run --gpus all ... (srun --gres=gpu:1); on the host: nvidia-modprobe");
        } else if (refused) {
                doctor_find(d, DOC_OFF, "gpu access", "/dev/nvidiactl may not be opened");
                doctor_mend(d, BY_ADMIN, "chmod 0666 /dev/nvidia* (or the group that owns them)");
        } else {
                doctor_find(d, DOC_OK, "gpu access", "/dev/nvidiactl may be opened");
        }
        if (has_libcuda(d)) {
                doctor_find(d, DOC_OK, "libcuda", "the driver's library is installed");
                return;
        }
        doctor_find(d, DOC_LIMITED, "libcuda", "libcuda.so.1 is not in the usual folders");
        doctor_why(d, "the half of the driver that programs load");
        doctor_mend(d, BY_ADMIN, "apt install libcuda1, of the driver's version; of a container: --gpus all");
}

void doctor_probe_gpu_module(struct doctor *d)
{
        char version[DOC_TEXT];
        bool open;
        int major = driver_version(d, version, &open);

        if (major == 0 && device_files(d) == 0)
                return;
        if (major == 0) {
                doctor_find(d, DOC_UNKNOWN, "gpu driver", "/proc/driver/nvidia/version is not shown here");
        } else {
                bool dmabuf = open && major >= OPEN_FIRST;

                doctor_find(d, dmabuf ? DOC_OK : DOC_LIMITED, "gpu driver", "%s, %s kernel module", version,
                            open ? "open" : "closed");
                if (!dmabuf) {
                        doctor_why(d, "only the open module, %d or newer, exports GPU memory as dma-buf", OPEN_FIRST);
                        doctor_mend(d, BY_ADMIN, "apt install nvidia-open (NVIDIA's repository), then reboot");
                }
                json_set_str(doctor_facts(d), "version", version);
                json_set_bool(doctor_facts(d), "open", open);
        }
        say_gpu_files(d);
}

/* ---- GPUDirect ---- */

struct nic {
        char dev[64], driver[DOC_TEXT], where[DOC_PATH];
        int numa;
        bool card; /* on the bus: hardware, not emulated */
};

static bool nic_takes_dmabuf(const char *driver)
{
        static const char *const known[] = {"mlx5_core", "efa", "ice", "irdma", "bnxt_en", "mana"};

        for (size_t i = 0; i < ARRAY_LEN(known); i++)
                if (strcmp(known[i], driver) == 0)
                        return true;
        return false;
}

static void nic_look(const struct doctor *d, const char *dev, struct nic *n)
{
        char parent[DOC_TEXT];

        *n = (struct nic){0};
        snprintf(n->dev, sizeof(n->dev), "%.63s", dev);
        n->card = !doctor_look(d, parent, "/sys/class/infiniband/%s/parent", dev) &&
                  doctor_there(d, "/sys/class/infiniband/%s/device", dev);
        doctor_link(d, n->driver, "/sys/class/infiniband/%s/device/driver", dev);
        doctor_where(d, n->where, "/sys/class/infiniband/%s/device", dev);
        n->numa = (int)doctor_number(d, -1, "/sys/class/infiniband/%s/device/numa_node", dev);
}

/* The paths of one pair. refused_*: why not; "" where it can be. */
struct paths {
        char dmabuf[MENDS_LEN], peermem[MENDS_LEN];
};

static void paths_look(const struct doctor *d, const struct nic *n, struct paths *p)
{
        char version[DOC_TEXT];
        bool open;
        int major = driver_version(d, version, &open);

        *p = (struct paths){0};
        if (!doctor_kernel_at_least(d, 5, 12))
                snprintf(p->dmabuf, sizeof(p->dmabuf), "the kernel is older than 5.12");
        else if (!open || major < OPEN_FIRST)
                snprintf(p->dmabuf, sizeof(p->dmabuf), "the GPU's kernel module is not the open one of %d or newer",
                         OPEN_FIRST);
        else if (!nic_takes_dmabuf(n->driver))
                snprintf(p->dmabuf, sizeof(p->dmabuf), "driver %.40s is not known to take it",
                         *n->driver ? n->driver : "(not shown)");
        if (!peermem_module(d))
                snprintf(p->peermem, sizeof(p->peermem), "nvidia_peermem is not loaded");
}

static void say_pair(struct doctor *d, const struct gpu *gpu, const struct nic *n, enum doctor_distance near)
{
        struct paths p;
        bool far = near == NEAR_SYS;

        paths_look(d, n, &p);
        bool direct = !*p.dmabuf || !*p.peermem;

        doctor_find(d, direct && !far ? DOC_OK : DOC_LIMITED, "gpudirect", "GPU %s and %s: %s (%s); %s%s%s%s",
                    *gpu->slot ? gpu->slot : "(no slot shown)", n->dev, doctor_distance_names[near],
                    doctor_distance_texts[near], *p.dmabuf ? "" : "dmabuf",
                    direct && !*p.dmabuf && !*p.peermem ? ", " : "", *p.peermem ? "" : "peermem",
                    direct ? "" : "staged only");
        json *f = doctor_facts(d);

        json_set_str(f, "gpu", gpu->slot);
        json_set_str(f, "device", n->dev);
        json_set_str(f, "distance", doctor_distance_names[near]);
        json_set_bool(f, "dmabuf", !*p.dmabuf);
        json_set_bool(f, "peermem", !*p.peermem);
        if (*p.dmabuf)
                json_set_str(f, "dmabuf_why", p.dmabuf);
        if (*p.peermem)
                json_set_str(f, "peermem_why", p.peermem);
        if (!direct) {
                doctor_why(d, "bytes go through host memory. dmabuf: %s; peermem: %s", p.dmabuf, p.peermem);
                doctor_mend(d, BY_ADMIN, "modprobe nvidia-peermem");
        } else if (far) {
                doctor_why(d, "the way between processors is slow for peers; no nearer card is there");
                doctor_mend(d, BY_OWNER, "a card in a slot of NUMA node %d", gpu->numa);
        } else if (*p.dmabuf) {
                doctor_why(d, "dmabuf not: %s", p.dmabuf);
        }
}

/* Of each GPU, the nearest card. */
static void say_nearest(struct doctor *d, const struct gpus *g, const struct nic *nics, int n)
{
        char text[DOC_TEXT];
        long nodes;

        doctor_look(d, text, "/sys/devices/system/node/online");
        nodes = doctor_list_count(text);
        for (int i = 0; i < g->n; i++) {
                enum doctor_distance best = NEAR_UNKNOWN;
                const struct gpu *gpu = &g->at[i];
                int nearest = 0;

                for (int k = 0; k < n; k++) {
                        enum doctor_distance near =
                            doctor_distance(gpu->where, gpu->numa, nics[k].where, nics[k].numa, nodes);

                        if (near >= best)
                                continue;
                        best = near;
                        nearest = k;
                }
                say_pair(d, gpu, &nics[nearest], best);
        }
}

void doctor_probe_gpudirect(struct doctor *d)
{
        struct doctor_names devs = doctor_list(d, "/sys/class/infiniband");
        struct nic *nics = calloc((size_t)devs.n + 1, sizeof(*nics));
        bool gpu, emulated = false;
        struct gpus g;
        int cards = 0;

        for (int i = 0; nics && i < devs.n; i++) {
                nic_look(d, devs.at[i]->d_name, &nics[cards]);
                emulated = emulated || !nics[cards].card;
                cards += nics[cards].card;
        }
        doctor_list_free(&devs);
        gpus_look(d, &g);
        gpu = g.n > 0 || device_files(d) > 0;
        if (gpu && cards && g.n > 0) {
                say_nearest(d, &g, nics, cards);
                free(nics);
                return;
        }
        free(nics);
        if (gpu && cards) {
                doctor_find(d, DOC_UNKNOWN, "gpudirect", "the bus does not show the GPU here");
        } else if (gpu && emulated) {
                doctor_find(d, DOC_OFF, "gpudirect", "staged only");
                doctor_why(d, "the RDMA device is emulated and takes neither dma-buf nor peer memory");
                doctor_mend(d, BY_OWNER, "an RDMA card, near the GPU");
        } else {
                doctor_find(d, DOC_OFF, "gpudirect", "%s",
                            gpu     ? "the RDMA device is missing"
                            : cards ? "the GPU is missing"
                                    : "both a GPU and an RDMA card are missing");
                doctor_why(d, "it takes a GPU and an RDMA card");
                if (gpu)
                        doctor_mend(d, BY_OWNER, "an RDMA card, near the GPU");
        }
}

/* ---- access control services ---- */

static int acs_of(const struct doctor *d, const char *slot)
{
        uint8_t config[CONFIG_LEN];
        char path[2 * DOC_PATH];
        size_t len = 0;
        FILE *f;

        snprintf(path, sizeof(path), "%s" PCI "/%s/config", d->root, slot);
        f = fopen(path, "re");
        if (f) {
                len = fread(config, 1, sizeof(config), f);
                fclose(f);
        }
        return doctor_acs_bits(config, len);
}

/* Bridges above GPUs that send traffic between peers up to the processor, where a switch could turn it around. */
void doctor_probe_acs(struct doctor *d)
{
        char first[32] = "";
        int redirecting = 0, hidden = 0, seen = 0;
        struct gpus g;

        gpus_look(d, &g);
        if (g.n == 0 || doctor_count(d, "/sys/class/infiniband") == 0)
                return;
        for (int i = 0; i < g.n; i++) {
                char where[DOC_PATH], *save = NULL, *last = NULL;

                snprintf(where, sizeof(where), "%s", g.at[i].where);
                strtok_r(where, "/", &save); /* the host bridge has none */
                for (char *part = strtok_r(NULL, "/", &save); part; part = strtok_r(NULL, "/", &save)) {
                        int bits = last ? acs_of(d, last) : -1;

                        hidden += bits == -2;
                        seen += last != NULL;
                        if (bits > 0 && redirecting++ == 0)
                                snprintf(first, sizeof(first), "%.31s", last);
                        last = part;
                }
        }
        if (seen == 0)
                return;
        if (redirecting) {
                doctor_find(d, DOC_LIMITED, "acs", "redirects at %s%s", first, redirecting > 1 ? " and others" : "");
                doctor_why(d,
                           "traffic between GPU and card below one switch goes up to the processor and back; off only "
                           "on bare metal");
                doctor_mend(d, BY_ADMIN, "setpci -s %s ECAP_ACS+6.w=0000 (of each bridge; again after each boot)",
                            first);
        } else if (hidden) {
                doctor_find(d, DOC_UNKNOWN, "acs", "%d bridges show their registers to root only", hidden);
                doctor_mend(d, BY_ADMIN, "sudo djinnbench doctor");
        } else {
                doctor_find(d, DOC_OK, "acs", "no bridge above a GPU redirects");
        }
}
