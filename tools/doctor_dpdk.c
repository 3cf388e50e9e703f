/* doctor: network cards for DPDK, VFIO, IOMMU. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "check.h"
#include "doctor_inside.h"

#define PCI "/sys/bus/pci/devices"

/* Drivers that hand a card to a program. */
static const char *const user_drivers[] = {"vfio-pci", "uio_pci_generic", "igb_uio"};

/* The class where it is shown; a card of another class that a program holds is no port. */
static bool may_be_nic(const struct doctor *d, const char *slot)
{
        char class[DOC_TEXT];

        return !doctor_look(d, class, PCI "/%s/class", slot) || strncmp(class, "0x02", 4) == 0;
}

static int say_bound(struct doctor *d, const char *driver)
{
        struct doctor_names slots = doctor_list(d, "/sys/bus/pci/drivers/%s", driver);
        char group[DOC_TEXT], path[DOC_TEXT + 16];
        int ports = 0;

        for (int i = 0; i < slots.n; i++) {
                const char *slot = slots.at[i]->d_name;

                if (!strchr(slot, ':') || !may_be_nic(d, slot))
                        continue;
                ports++;
                doctor_link(d, group, PCI "/%s/iommu_group", slot);
                snprintf(path, sizeof(path), "/dev/vfio/%s", group);
                if (*group && doctor_there(d, "/dev/vfio") && doctor_access(d, path, R_OK | W_OK) != 0) {
                        doctor_find(d, DOC_OFF, "dpdk port", "%s is bound to %s, but %s may not be opened", slot,
                                    driver, path);
                        doctor_mend(d, BY_ADMIN, "chown $USER %s (lasting: a udev rule)", path);
                } else {
                        doctor_find(d, DOC_OK, "dpdk port", "%s is bound to %s", slot, driver);
                }
                json_set_str(doctor_facts(d), "slot", slot);
                json_set_str(doctor_facts(d), "driver", driver);
        }
        doctor_list_free(&slots);
        return ports;
}

/* The network device of the default route: what the administrator is logged in through. */
static void default_netdev(const struct doctor *d, char out[DOC_TEXT])
{
        char *text = doctor_text(d, "/proc/net/route"), *save = NULL, name[64];
        unsigned long destination;

        out[0] = '\0';
        for (char *line = text ? strtok_r(text, "\n", &save) : NULL; line; line = strtok_r(NULL, "\n", &save))
                if (sscanf(line, "%63s %lx", name, &destination) == 2 && destination == 0) {
                        snprintf(out, DOC_TEXT, "%s", name);
                        break;
                }
        free(text);
}

/* A network card that the kernel drives and that does not carry the default route. */
static bool spare_card(const struct doctor *d, char slot[DOC_TEXT])
{
        struct doctor_names nets = doctor_list(d, "/sys/class/net");
        char route[DOC_TEXT], bus[DOC_TEXT];
        bool found = false;

        default_netdev(d, route);
        for (int i = 0; i < nets.n && !found; i++) {
                const char *net = nets.at[i]->d_name;

                found = strcmp(net, route) != 0 && doctor_link(d, bus, "/sys/class/net/%s/device/subsystem", net) &&
                        strcmp(bus, "pci") == 0 && doctor_link(d, slot, "/sys/class/net/%s/device", net);
        }
        doctor_list_free(&nets);
        return found;
}

void doctor_probe_dpdk(struct doctor *d)
{
        const char *no_dpdk = doctor_no_transport("dpdk");
        char slot[DOC_TEXT];
        int ports = 0;

        for (size_t i = 0; i < ARRAY_LEN(user_drivers); i++)
                ports += say_bound(d, user_drivers[i]);
        if (ports == 0) {
                doctor_find(d, DOC_OFF, "dpdk port", "no network card is bound to vfio-pci");
                if (spare_card(d, slot)) {
                        doctor_why(d, "the kernel drives them all; the one at %s does not carry the default route",
                                   slot);
                        doctor_mend(d, BY_ADMIN, "modprobe vfio-pci && dpdk-devbind.py --bind=vfio-pci %s", slot);
                } else {
                        doctor_why(d, "the kernel drives what there is, and none can be spared");
                        doctor_mend(d, BY_OWNER, "a second network card; then dpdk-devbind.py --bind=vfio-pci SLOT");
                }
        }
        if (no_dpdk)
                doctor_find(d, DOC_OFF, "dpdk", "%s%s", no_dpdk, ports ? ": the ports stay unused" : "");
}

void doctor_probe_vfio(struct doctor *d)
{
        char text[DOC_TEXT];

        if (!doctor_there(d, "/dev/vfio/vfio")) {
                doctor_find(d, DOC_OFF, "vfio", "no /dev/vfio/vfio");
                doctor_why(d, "the module is not loaded, or this container was not given the device");
                doctor_mend(d, BY_ADMIN, "modprobe vfio-pci (of a container: --device=/dev/vfio)");
        } else if (doctor_access(d, "/dev/vfio/vfio", R_OK | W_OK) != 0) {
                doctor_find(d, DOC_OFF, "vfio", "/dev/vfio/vfio may not be opened");
                doctor_mend(d, BY_ADMIN, "chmod 0666 /dev/vfio/vfio");
        } else if (doctor_look(d, text, "/sys/module/vfio/parameters/enable_unsafe_noiommu_mode") && *text == 'Y') {
                doctor_find(d, DOC_LIMITED, "vfio", "/dev/vfio/vfio may be opened, without an IOMMU");
                doctor_why(d, "a card that goes wrong can write anywhere");
        } else {
                doctor_find(d, DOC_OK, "vfio", "/dev/vfio/vfio may be opened");
        }
}

static const char *iommu_words(const struct doctor *d)
{
        char *text = doctor_text(d, "/proc/cpuinfo");
        const char *words = !text                          ? "intel_iommu=on (AMD: amd_iommu=on)"
                            : strstr(text, "GenuineIntel") ? "intel_iommu=on"
                            : strstr(text, "AuthenticAMD") ? "amd_iommu=on"
                                                           : "intel_iommu=on (AMD: amd_iommu=on)";

        free(text);
        return words;
}

/* Translation costs every DMA between peers a way through the processor; "identity" does not. */
void doctor_probe_iommu(struct doctor *d)
{
        struct doctor_names groups = doctor_list(d, "/sys/kernel/iommu_groups");
        bool peers = doctor_count(d, "/proc/driver/nvidia/gpus") > 0 && doctor_count(d, "/sys/class/infiniband") > 0;
        char type[DOC_TEXT];
        int translated = 0;

        for (int i = 0; i < groups.n; i++)
                translated += doctor_look(d, type, "/sys/kernel/iommu_groups/%s/type", groups.at[i]->d_name) &&
                              strncmp(type, "DMA", 3) == 0;
        if (groups.n == 0) {
                doctor_find(d, DOC_OFF, "iommu", "off or not visible");
                doctor_why(d, "vfio-pci needs it; RDMA and GPUDirect do not");
                doctor_mend(d, BY_OWNER, "kernel command line: %s iommu=pt; firmware: VT-d or AMD-Vi on; reboot",
                            iommu_words(d));
        } else if (translated && peers) {
                doctor_find(d, DOC_LIMITED, "iommu", "on, translating in %d of %d groups", translated, groups.n);
                doctor_why(d, "traffic between a GPU and a card goes through the processor to be translated");
                doctor_mend(d, BY_OWNER, "kernel command line: iommu=pt; reboot");
        } else {
                doctor_find(d, DOC_OK, "iommu", "on, %d groups%s", groups.n,
                            translated ? ", translating" : ", passing through");
        }
        json_set_int(doctor_facts(d), "groups", groups.n);
        json_set_int(doctor_facts(d), "translating", translated);
        doctor_list_free(&groups);
}
