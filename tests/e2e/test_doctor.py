#!/usr/bin/env python3
"""djinnbench doctor on hosts that are made of files, and --peer against whoever listens, or nobody.

A scripted host is a tree that stands in the place of / (--root): what /proc, /sys and /dev show there is all that doctor
knows. Usage: test_doctor.py PROGRAM ROOT [Class]"""
import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import unittest

import jsonschema

import lib

PCI = "sys/bus/pci/devices/"
IB = "sys/class/infiniband/"

TEXT = {"type": "string", "minLength": 1}
FINDING = {
    "type": "object", "additionalProperties": False,
    "required": ["section", "finding", "verdict", "state", "why", "mend", "who", "facts"],
    "properties": {"section": TEXT, "finding": TEXT, "verdict": {"enum": ["ok", "limited", "off", "unknown"]},
                   "state": TEXT, "why": {"type": ["string", "null"]}, "mend": {"type": ["string", "null"]},
                   "who": {"enum": ["you", "administrator", None]}, "facts": {"type": "object"}},
}
SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["schema", "host", "findings"],
    "properties": {"schema": {"const": "djinnbench.doctor/1"}, "host": {"type": "object"},
                   "findings": {"type": "array", "items": FINDING, "minItems": 1}, "peer": TEXT,
                   "works": {"type": "boolean"}},
    "dependentRequired": {"peer": ["works"]},
}


class Link(str):
    """A symbolic link, by where it points."""


# What every Linux has; a scripted host adds to it.
PLAIN = {
    "proc/sys/kernel/osrelease": "6.1.0-18-amd64\n",
    "proc/cpuinfo": "processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fpu vme sse\n",
    "proc/self/status": "Name:\tx\nUid:\t1000\t1000\t1000\t1000\nCapEff:\t0000000000000000\nCpus_allowed_list:\t0-7\n",
    "proc/self/uid_map": "         0          0 4294967295\n",
    "proc/self/limits": "Limit                     Soft Limit           Hard Limit           Units     \n"
                        "Max locked memory         unlimited            unlimited            bytes     \n",
    "sys/devices/system/cpu/online": "0-7\n",
    "sys/devices/system/node/online": "0\n",
}
ROOT_STATUS = "Uid:\t0\t0\t0\t0\nCapEff:\t000001ffffffffff\nCpus_allowed_list:\t0-7\n"


def port(dev, number=1, state="4: ACTIVE", layer="Ethernet", rate="100 Gb/sec (4X EDR)", gids=(), netdev="eth1"):
    """gids: (GID, type) by index."""
    at = "%s%s/ports/%d/" % (IB, dev, number)
    files = {at + "state": state + "\n", at + "link_layer": layer + "\n", at + "rate": rate + "\n",
             at + "phys_state": "5: LinkUp\n" if "ACTIVE" in state else "3: Disabled\n"}
    for i, (gid, kind) in enumerate(gids):
        files.update({at + "gids/%d" % i: gid + "\n", at + "gid_attrs/types/%d" % i: kind + "\n",
                      at + "gid_attrs/ndevs/%d" % i: netdev + "\n"})
    return files


EMPTY = "0000:0000:0000:0000:0000:0000:0000:0000"
LOCAL = "fe80:0000:0000:0000:5054:00ff:fe12:3456"
GLOBAL = "2001:0db8:0000:0000:0000:0000:0000:0001"
MAPPED = "0000:0000:0000:0000:0000:ffff:0a4d:0001"
BOTH = [(LOCAL, "IB/RoCE v1"), (LOCAL, "RoCE v2"), (GLOBAL, "RoCE v2"), (MAPPED, "IB/RoCE v1"), (MAPPED, "RoCE v2"),
        (EMPTY, "")]


def device(path, **attributes):
    """A PCI device at its place in the tree of bridges, and its link on the bus."""
    slot = path.rsplit("/", 1)[1]
    files = {"sys/devices/%s/%s" % (path, k): v for k, v in attributes.items()}
    files["sys/devices/%s/numa_node" % path] = files.get("sys/devices/%s/numa_node" % path, "0\n")
    files[PCI + slot] = Link("../../../devices/" + path)
    return files


def card(dev, path, driver="mlx5_core", gids=BOTH, mtu="9000", **attributes):
    """An RDMA card: PCI device, driver, RDMA device, network device."""
    files = device(path, vendor="0x15b3\n", **{"class": "0x020000\n"}, **attributes)
    inside = "sys/devices/%s/infiniband/%s/" % (path, dev)
    for name, text in port(dev, gids=gids).items():
        files[inside + name[len(IB + dev) + 1:]] = text
    files[inside + "device"] = Link("../../../" + path.rsplit("/", 1)[1])
    files["sys/devices/%s/driver" % path] = Link("/sys/bus/pci/drivers/" + driver)
    files[IB + dev] = Link("../../devices/%s/infiniband/%s" % (path, dev))
    files.update({"sys/class/net/eth1/mtu": mtu + "\n", "dev/infiniband/uverbs0": "", "dev/infiniband/rdma_cm": "",
                  "sys/module/ib_uverbs/refcnt": "1\n"})
    return files


def gpu(path, model="NVIDIA A100-SXM4-80GB", bar1=64 << 30, version="570.86.15", opened=True, numa="0"):
    slot = path.rsplit("/", 1)[1]
    files = device(path, vendor="0x10de\n", numa_node=numa + "\n", **{"class": "0x030200\n"},
                   resource="0x00000000c0000000 0x00000000c0ffffff 0x0000000000040200\n0x%016x 0x%016x 0x14220c\n"
                   % (1 << 40, (1 << 40) + bar1 - 1))
    files["proc/driver/nvidia/gpus/%s/information" % slot] = "Model: \t\t %s\nIRQ:   \t\t 1\n" % model
    files["proc/driver/nvidia/version"] = "NVRM version: NVIDIA UNIX %s  %s  Release Build\nGCC version:\n" % (
        "Open Kernel Module for x86_64" if opened else "x86_64 Kernel Module", version)
    files.update({"dev/nvidiactl": "", "dev/nvidia0": "", "usr/lib/x86_64-linux-gnu/libcuda.so.1": ""})
    return files


SWITCH = "pci0000:15/0000:15:01.0/0000:16:00.0/"
NIC_AT, GPU_AT = SWITCH + "0000:17:00.0/0000:18:00.0", SWITCH + "0000:17:01.0/0000:19:00.0"

SOFT_ROCE = dict(port("rxe0", gids=[(LOCAL, "RoCE v2"), (MAPPED, "RoCE v2")], netdev="wire", rate="2.5 Gb/sec (1X SDR)"),
                 **{IB + "rxe0/parent": "wire\n", IB + "rxe0/node_desc": "rxe\n", "sys/class/net/wire/mtu": "1500\n",
                    "dev/infiniband/uverbs0": "", "dev/infiniband/rdma_cm": ""})


class Scripted(lib.Case):
    def tree(self, *parts):
        root = tempfile.mkdtemp(dir=self.dir)
        for files in parts:
            for path, content in files.items():
                full = os.path.join(root, path)
                os.makedirs(os.path.dirname(full), exist_ok=True)
                if os.path.lexists(full):
                    os.unlink(full)
                if isinstance(content, Link):
                    os.symlink(content, full)
                    continue
                with open(full, "wb") as f:
                    f.write(content if isinstance(content, bytes) else content.encode())
        return root

    def look(self, *parts, **popen):
        """The findings by name, after a look at the screen too."""
        root = self.tree(*parts)
        os.chmod(self.dir, 0o755)
        os.chmod(root, 0o755)
        done, screen = (subprocess.run([lib.PROGRAM, "doctor", "--root", root] + more, stdout=subprocess.PIPE,
                                       stderr=subprocess.PIPE, env=self.environment(), timeout=60, check=False, **popen)
                        for more in (["--json"], []))
        self.assertEqual((done.returncode, done.stderr), (0, b""))
        self.assertEqual((screen.returncode, screen.stderr), (0, b""))
        doc = json.loads(done.stdout)
        jsonschema.validate(doc, SCHEMA)
        self.check_screen(screen.stdout.decode("ascii"), doc)
        found = {}
        for f in doc["findings"]:
            self.assertEqual(f["mend"] is None, f["who"] is None, f)
            found.setdefault(f["finding"], []).append(f)
        return found

    def check_screen(self, text, doc):
        """100 columns, every finding, nothing that moves a cursor."""
        for line in text.splitlines():
            self.assertLessEqual(len(line), 100, line)
            self.assertTrue(line.isprintable(), repr(line))
        flat = "".join(text.split())
        for f in doc["findings"]:
            if f["finding"] == "clock":     # measured anew each time
                continue
            for part in (f["state"], f["why"], f["mend"]):
                self.assertIn("".join((part or "").split()), flat)

    def assert_finding(self, f, verdict, *words, why=(), mend=None, who=None):
        self.assertEqual(f["verdict"], verdict, f)
        self.assert_says(f["state"], *words)
        self.assert_says(f["why"] or "", *why)
        if mend:
            self.assertIn(mend, f["mend"])
            self.assertEqual(f["who"], who, f)

    # ---- whole hosts ----

    def test_nothing_at_all(self):
        found = self.look({})
        for name in ("rdma device", "gpu", "gpudirect", "dpdk port", "vfio", "iommu"):
            self.assertEqual([f["verdict"] for f in found[name]], ["off"], name)
        for name in ("kernel", "cores", "governor", "numa", "huge pages", "memlock"):
            self.assertEqual([f["verdict"] for f in found[name]], ["unknown"], name)
        self.assertNotIn("rdma access", found)

    def test_plain_host(self):
        found = self.look(PLAIN)
        for name in ("kernel", "machine", "cores", "numa", "memlock", "cpu quota"):
            self.assertEqual(found[name][0]["verdict"], "ok", found[name])
        self.assert_finding(found["iommu"][0], "off", mend="intel_iommu=on", who="administrator")

    def test_soft_roce(self):
        found = self.look(PLAIN, SOFT_ROCE)
        self.assert_finding(found["rdma device"][0], "limited", "rxe0 port 1: active", "emulated (Soft-RoCE)", "netdev wire",
                            "MTU 1024", why=("not hardware's", "wire has MTU 1500"), mend="ip link set wire mtu 4200",
                            who="administrator")
        self.assertTrue(found["rdma device"][0]["facts"]["emulated"])
        self.assert_finding(found["gid"][0], "ok", "index 1, 10.77.0.1, RoCE v2, of 2")
        self.assert_finding(found["gpudirect"][0], "off", "both")
        self.assert_finding(found["rdma access"][0], "ok")

    def test_card_and_gpu_without_peermem(self):
        found = self.look(PLAIN, card("mlx5_0", NIC_AT), gpu(GPU_AT))
        self.assert_finding(found["rdma device"][0], "ok", "mlx5_0 port 1: active, Ethernet, 100 Gb/sec (4X EDR)",
                            "netdev eth1", "MTU 4096", "NUMA node 0")
        self.assert_finding(found["gid"][0], "ok", "index 4, 10.77.0.1, RoCE v2, of 5")
        self.assert_finding(found["gpu"][0], "ok", "NVIDIA A100-SXM4-80GB at 0000:19:00.0", "BAR1 64 GiB")
        self.assert_finding(found["gpu driver"][0], "ok", "570.86.15, open")
        self.assert_finding(found["gpudirect"][0], "ok", "GPU 0000:19:00.0 and mlx5_0: PIX", "; dmabuf")
        self.assertEqual(found["gpudirect"][0]["facts"]["peermem_why"], "nvidia_peermem is not loaded")

    def test_closed_module_without_peermem(self):
        found = self.look(PLAIN, card("mlx5_0", NIC_AT), gpu(GPU_AT, opened=False, version="535.54.03", bar1=256 << 20))
        self.assert_finding(found["gpu"][0], "limited", "BAR1 256 MiB", mend="Resizable BAR", who="administrator")
        self.assert_finding(found["gpu driver"][0], "limited", "535.54.03, closed", mend="nvidia-open", who="administrator")
        self.assert_finding(found["gpudirect"][0], "limited", "staged only", why=("open one of 515", "nvidia_peermem"),
                            mend="modprobe nvidia-peermem", who="administrator")

    def test_closed_module_with_peermem(self):
        found = self.look(PLAIN, card("mlx5_0", NIC_AT), gpu(GPU_AT, opened=False),
                          {"sys/module/nvidia_peermem/refcnt": "0\n"})
        self.assert_finding(found["gpudirect"][0], "ok", "; peermem", why=("dmabuf not",))

    def test_old_kernel(self):
        found = self.look(PLAIN, card("mlx5_0", NIC_AT), gpu(GPU_AT), {"proc/sys/kernel/osrelease": "5.4.0-1\n"})
        self.assert_finding(found["kernel"][0], "limited", why=("5.12",))
        self.assert_finding(found["gpudirect"][0], "limited", "staged only", why=("older than 5.12",))

    def test_gpu_but_no_card(self):
        found = self.look(PLAIN, gpu(GPU_AT))
        self.assert_finding(found["gpu"][0], "ok", "A100")
        self.assert_finding(found["gpudirect"][0], "off", "the RDMA device is missing", mend="an RDMA card", who="administrator")
        self.assert_finding(found["rdma device"][0], "off", "none")
        self.assertNotIn("acs", found)
        for f in found.get("cuda", []):
            self.assert_finding(f, "off", "the GPU is there and stays unused")

    def test_gpu_and_soft_roce(self):
        found = self.look(PLAIN, gpu(GPU_AT), SOFT_ROCE)
        self.assert_finding(found["gpudirect"][0], "off", "staged only", why=("emulated",))

    def test_gpu_by_its_device_files_only(self):
        found = self.look(PLAIN, {"dev/nvidia0": "", "dev/nvidia1": "", "dev/nvidiactl": "", "dev/nvidia-uvm": ""})
        self.assert_finding(found["gpu"][0], "ok", "2, by their device files")
        self.assert_finding(found["gpudirect"][0], "off", "the RDMA device is missing")
        self.assert_finding(found["libcuda"][0], "limited", mend="libcuda1", who="administrator")

    def test_gpu_without_a_driver(self):
        found = self.look(PLAIN, device(GPU_AT, vendor="0x10de\n", **{"class": "0x030200\n"}))
        self.assert_finding(found["gpu"][0], "off", "on the bus at 0000:19:00.0", mend="modprobe nvidia", who="administrator")
        found = self.look(PLAIN, device(GPU_AT, vendor="0x1002\n", **{"class": "0x038000\n"}))
        self.assert_finding(found["gpu"][0], "off", "1 of AMD")

    def test_card_without_its_rdma_half(self):
        found = self.look(PLAIN, device(NIC_AT, vendor="0x15b3\n", **{"class": "0x020000\n"}))
        self.assert_finding(found["rdma device"][0], "off", "0000:18:00.0", "driver: none", mend="modprobe mlx5_ib",
                            who="administrator")

    # ---- where things hang ----

    def distance(self, nic, at, nic_numa="0\n", gpu_numa="0"):
        found = self.look(PLAIN, card("mlx5_0", nic, numa_node=nic_numa), gpu(at, numa=gpu_numa),
                          {"sys/devices/system/node/online": "0-1\n"})
        return found["gpudirect"][0]

    def test_distances(self):
        for nic, numa, name in (
                (SWITCH + "0000:17:00.0/0000:18:00.0", "0", "PIX"),
                (SWITCH + "0000:17:00.0/0000:20:00.0/0000:21:00.0/0000:22:00.0", "0", "PXB"),
                ("pci0000:15/0000:15:02.0/0000:30:00.0", "0", "PHB"),
                ("pci0000:40/0000:40:01.0/0000:41:00.0", "0", "NODE"),
                ("pci0000:40/0000:40:01.0/0000:41:00.0", "1", "SYS"),
                ("pci0000:40/0000:40:01.0/0000:41:00.0", "-1", "unknown")):
            f = self.distance(nic, GPU_AT, numa + "\n")
            self.assertEqual(f["facts"]["distance"], name, f)
            self.assertEqual(f["verdict"], "limited" if name == "SYS" else "ok")

    def test_nearest_card_is_the_one_that_is_named(self):
        far = card("mlx5_0", "pci0000:40/0000:40:01.0/0000:41:00.0", numa_node="1\n")
        found = self.look(PLAIN, far, card("mlx5_1", NIC_AT), gpu(GPU_AT), {"sys/devices/system/node/online": "0-1\n"})
        self.assertEqual([f["facts"]["device"] for f in found["gpudirect"]], ["mlx5_1"])

    def test_acs(self):
        def config(bits, length=4096):
            data = bytearray(4096)
            data[0x100:0x104] = struct.pack("<I", 0x1 | 1 << 16 | 0x148 << 20)   # another capability first
            data[0x148:0x150] = struct.pack("<IHH", 0xd | 1 << 16, 0xff, bits)
            return bytes(data[:length])

        bridge = "sys/devices/%s0000:17:01.0/config" % SWITCH
        for bits, length, verdict in ((0x1d, 4096, "limited"), (0x01, 4096, "ok"), (0x1d, 64, "unknown")):
            others = {"sys/devices/%s/config" % p: config(0) for p in
                      ("pci0000:15/0000:15:01.0", "pci0000:15/0000:15:01.0/0000:16:00.0")}
            links = {PCI + p.rsplit("/", 1)[1]: Link("../../../devices/" + p) for p in
                     ("pci0000:15/0000:15:01.0", "pci0000:15/0000:15:01.0/0000:16:00.0", SWITCH + "0000:17:01.0")}
            found = self.look(PLAIN, card("mlx5_0", NIC_AT), gpu(GPU_AT), others, links, {bridge: config(bits, length)})
            self.assertEqual(found["acs"][0]["verdict"], verdict, found["acs"])
            if verdict == "limited":
                self.assertIn("setpci -s 0000:17:01.0", found["acs"][0]["mend"])

    # ---- ports and GIDs ----

    def test_down_port(self):
        found = self.look(PLAIN, SOFT_ROCE, port("mlx5_0", state="1: DOWN", gids=[(LOCAL, "RoCE v2")]))
        down, up = found["rdma device"]
        self.assert_finding(down, "off", "mlx5_0 port 1: DOWN", why=("physical state Disabled",), mend="ip link set eth1 up",
                            who="administrator")
        self.assertEqual(up["facts"]["device"], "rxe0")

    def test_infiniband(self):
        found = self.look(PLAIN, port("mlx5_0", layer="InfiniBand", gids=[(LOCAL, "IB/RoCE v1")]),
                          port("mlx5_0", 2, state="2: INIT", layer="InfiniBand"), {"dev/infiniband/uverbs0": ""})
        up, waiting = found["rdma device"]
        self.assert_finding(up, "ok", "InfiniBand")
        self.assert_finding(waiting, "off", "port 2: INIT", mend="subnet manager", who="administrator")
        self.assertNotIn("gid", found)

    def test_link_local_only(self):
        found = self.look(PLAIN, port("mlx5_0", gids=[(LOCAL, "IB/RoCE v1"), (LOCAL, "RoCE v2")]))
        self.assert_finding(found["gid"][0], "limited", "index 1, fe80::5054:ff:fe12:3456, RoCE v2", why=("link-local",),
                            mend="ip address add ADDRESS/PREFIX dev eth1", who="administrator")

    def test_choice_of_gid(self):
        for gids, index in (([(GLOBAL, "RoCE v2"), (MAPPED, "RoCE v2")], 1),
                            ([(LOCAL, "RoCE v2"), (GLOBAL, "RoCE v2")], 1),
                            ([(MAPPED, "IB/RoCE v1"), (LOCAL, "RoCE v2")], 1),
                            ([(MAPPED, "IB/RoCE v1"), (LOCAL, "IB/RoCE v1")], 0),
                            ([(EMPTY, "RoCE v2"), (MAPPED, "RoCE v2"), (MAPPED, "RoCE v2")], 1)):
            found = self.look(PLAIN, port("mlx5_0", gids=gids))
            self.assertEqual(found["gid"][0]["facts"]["gid_index"], index, found["gid"])
        found = self.look(PLAIN, port("mlx5_0", gids=[(EMPTY, "")]))
        self.assert_finding(found["gid"][0], "off", "has none", mend="ip address add", who="administrator")

    def test_no_device_files(self):
        found = self.look(PLAIN, port("mlx5_0"))
        self.assert_finding(found["rdma access"][0], "off", mend="modprobe ib_uverbs", who="administrator")
        found = self.look(PLAIN, port("mlx5_0"), {"sys/module/ib_uverbs/refcnt": "1\n"})
        self.assert_finding(found["rdma access"][0], "off", mend="--device=/dev/infiniband", who="administrator")

    @unittest.skipUnless(os.geteuid() == 0, "only root can become somebody else; nobody else can be refused a file of his")
    def test_device_files_of_somebody_else(self):
        root_only = self.tree(PLAIN, SOFT_ROCE)
        os.chmod(os.path.join(root_only, "dev/infiniband/uverbs0"), 0o600)
        os.chmod(self.dir, 0o755)
        os.chmod(root_only, 0o755)
        program = shutil.copy(lib.PROGRAM, self.dir)    # where everybody may execute it
        os.chmod(program, 0o755)
        done = subprocess.run([program, "doctor", "--json", "--root", root_only], stdout=subprocess.PIPE, check=True,
                              user=pwd.getpwnam("nobody").pw_uid, env=self.environment())
        found = {f["finding"]: f for f in json.loads(done.stdout)["findings"]}
        self.assert_finding(found["rdma access"], "off", "1 of 1", mend="chmod 0666", who="administrator")

    # ---- host and memory ----

    def test_governor(self):
        at = "sys/devices/system/cpu/cpu%d/cpufreq/scaling_governor"
        found = self.look(PLAIN, {at % i: "performance\n" for i in range(8)}, {at % 3: "powersave\n"})
        self.assert_finding(found["governor"][0], "limited", "powersave on 1 of 8", mend="cpupower", who="administrator")
        found = self.look(PLAIN, {at % i: "performance\n" for i in range(8)})
        self.assert_finding(found["governor"][0], "ok", "performance on 8 of 8")

    def test_administrator_is_you_for_root(self):
        at = "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"
        found = self.look(PLAIN, {at: "schedutil\n", "proc/self/status": ROOT_STATUS})
        self.assertEqual(found["governor"][0]["who"], "you")
        self.assertEqual(found["iommu"][0]["who"], "administrator")     # firmware
        found = self.look(PLAIN, {at: "schedutil\n", "proc/self/status": ROOT_STATUS,
                                  "proc/self/uid_map": "         0       1000          1\n"})
        self.assertEqual(found["governor"][0]["who"], "administrator")  # root of a user namespace

    def test_memlock(self):
        line = "Max locked memory         %-20s %-20s bytes     \n"
        for soft, hard, verdict, mend, who in (("8388608", "8388608", "limited", "limits.d", "administrator"),
                                               ("65536", "unlimited", "limited", "ulimit -l unlimited", "you"),
                                               ("unlimited", "unlimited", "ok", None, None)):
            found = self.look(PLAIN, {"proc/self/limits": line % (soft, hard)})
            self.assert_finding(found["memlock"][0], verdict, mend=mend, who=who)
        found = self.look(PLAIN, {"proc/self/limits": line % (65536, 65536), "proc/self/status": ROOT_STATUS})
        self.assert_finding(found["memlock"][0], "ok", "64 KiB", "CAP_IPC_LOCK")

    def test_huge_pages(self):
        at = "sys/kernel/mm/hugepages/hugepages-2048kB/"
        found = self.look(PLAIN, {at + "nr_hugepages": "512\n", at + "free_hugepages": "500\n",
                                  "proc/mounts": "none /dev/hugepages hugetlbfs rw 0 0\n"})
        self.assert_finding(found["huge pages"][0], "ok", "500 of 512 pages of 2048kB")
        found = self.look(PLAIN, {at + "nr_hugepages": "512\n", at + "free_hugepages": "0\n", "proc/mounts": "x / ext4 rw\n"})
        self.assertEqual([f["verdict"] for f in found["huge pages"]], ["limited", "limited"])
        found = self.look(PLAIN, {at + "nr_hugepages": "0\n"})
        self.assert_finding(found["huge pages"][0], "off", mend="vm.nr_hugepages=512", who="administrator")

    def test_quota(self):
        found = self.look(PLAIN, {"sys/fs/cgroup/cpu.max": "max 100000\n", "proc/self/cgroup": "0::/a/b\n",
                                  "sys/fs/cgroup/a/b/cpu.max": "400000 100000\n", "sys/fs/cgroup/a/cpu.max": "150000 100000\n"})
        self.assert_finding(found["cpu quota"][0], "limited", "1.5 cores")

    def test_few_cores_and_a_virtual_machine(self):
        status = PLAIN["proc/self/status"].replace("0-7", "4,6")
        found = self.look(PLAIN, {"proc/self/status": status, "sys/class/dmi/id/sys_vendor": "QEMU\n",
                                  "proc/cpuinfo": "flags\t: fpu\nflags\t\t: fpu hypervisor sse\n"})
        self.assert_finding(found["cores"][0], "limited", "2 of 8 are ours (4,6)", mend="taskset -c 0-7", who="you")
        self.assert_finding(found["machine"][0], "limited", "virtual: QEMU")

    # ---- dpdk ----

    def test_bound_card(self):
        slot = "0000:02:00.0"
        found = self.look(PLAIN, {"sys/bus/pci/drivers/vfio-pci/" + slot: "", "sys/bus/pci/drivers/vfio-pci/bind": "",
                                  "sys/bus/pci/drivers/vfio-pci/0000:03:00.0": "", PCI + "0000:03:00.0/class": "0x030000\n",
                                  PCI + slot + "/class": "0x020000\n", "dev/vfio/vfio": "", "dev/vfio/7": "",
                                  PCI + slot + "/iommu_group": Link("../../../../kernel/iommu_groups/7"),
                                  "sys/kernel/iommu_groups/7/type": "DMA-FQ\n"})
        self.assertEqual([f["state"] for f in found["dpdk port"]], [slot + " is bound to vfio-pci"])
        self.assert_finding(found["vfio"][0], "ok")
        self.assert_finding(found["iommu"][0], "ok", "1 groups, translating")

    def test_spare_card_is_proposed(self):
        nets = {}
        for net, slot in (("eth0", "0000:00:03.0"), ("eth1", "0000:00:04.0")):
            nets["sys/class/net/%s/device" % net] = Link("../../../devices/pci0000:00/" + slot)
            nets["sys/devices/pci0000:00/%s/subsystem" % slot] = Link("../../../bus/pci")
        routes = "Iface\tDestination\tGateway\neth0\t00000000\t0100000A\neth1\t0000000A\t00000000\n"
        found = self.look(PLAIN, nets, {"proc/net/route": routes})
        self.assert_finding(found["dpdk port"][0], "off", mend="--bind=vfio-pci 0000:00:04.0", who="administrator")

    def test_translation_between_peers(self):
        found = self.look(PLAIN, card("mlx5_0", NIC_AT), gpu(GPU_AT), {"sys/kernel/iommu_groups/0/type": "DMA\n"})
        self.assert_finding(found["iommu"][0], "limited", mend="iommu=pt", who="administrator")

    # ---- garbage ----

    def test_garbage(self):
        """Whatever a file holds, doctor ends by itself, with findings."""
        whole = {}
        for files in (PLAIN, SOFT_ROCE, card("mlx5_0", NIC_AT), gpu(GPU_AT), {
                "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages": "1\n", "sys/fs/cgroup/cpu.max": "1 1\n",
                "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "x\n", "proc/self/cgroup": "0::/a\n",
                "sys/kernel/iommu_groups/0/type": "DMA\n", "proc/mounts": "a b c\n", "proc/net/route": "a\n",
                "sys/devices/%s0000:17:01.0/config" % SWITCH: b"", PCI + "0000:17:01.0": Link("../../../devices/" + SWITCH + "0000:17:01.0")}):
            whole.update(files)
        for garbage in (b"", b"\0", b"\n", b"\x1b[2J\x07\xff\xfe\n", b"9" * 5000, b"-99999999999999999999999\n", b"%s%n%s",
                        b"0000:0000:0000:0000:0000:ffff:0a4d:0001:0000\n", b"/" * 4000, os.urandom(300), b"0-", b"1-0\n",
                        b"0-99999999999999999999,", b"\xff" * 4096, b"4: ACTIVE " + b"x" * 70000, b" \t" * 1000,
                        b"y" * (1 << 20) + b"y", b"0::" + b"/a" * 300 + b"\n"):
            found = self.look({k: v if isinstance(v, Link) else garbage for k, v in whole.items()})
            self.assertIn("rdma device", found)

    def test_folders_in_the_place_of_files(self):
        found = self.look({k + "/x": "" for k, v in dict(PLAIN, **SOFT_ROCE).items() if not isinstance(v, Link)})
        self.assertIn("gpu", found)

    def test_names_of_a_hostile_tree(self):
        found = self.look(PLAIN, {IB + "a\x1b[2Jb/ports/1/state": "4: ACTIVE\n", IB + "n" * 200 + "/ports/1/state": "4: ACTIVE\n",
                                  IB + "z/ports/99999999999/state": "4: ACTIVE\n", IB + "%s%n/ports/x/state": "",
                                  PCI + "s" * 200 + "/vendor": "0x10de\n", PCI + "s" * 200 + "/class": "0x030000\n"})
        self.assertIn("rdma device", found)


class Options(lib.Case):
    def test_this_host(self):
        r = self.run_program("doctor", "--json")
        self.assertEqual((r.status, r.err), (0, ""), r.told())
        jsonschema.validate(json.loads(r.out), SCHEMA)

    def test_wrong_use(self):
        self.assert_refused(self.run_program("doctor", "--peer", "tcp://::"), 2, "--peer")
        self.assert_refused(self.run_program("doctor", "--timeout", "1s"), 2, "--peer")
        self.assert_refused(self.run_program("doctor", "--peer", "h:1", "--timeout", "1ms"), 2, "timeout")


class Peer(lib.Case):
    """Within its time doctor ends by itself, whatever is or is not at the other end."""

    def ask(self, url, *args, works, seconds=6, **env):
        r = self.run_program("doctor", "--peer", url, "--json", *args, timeout=30, **env)
        self.assertEqual((r.status, r.err), (0 if works else 3, ""), r.told())
        self.assertLess(r.seconds, seconds * lib.SLOW, r.told())
        doc = json.loads(r.out)
        jsonschema.validate(doc, SCHEMA)
        self.assertEqual((doc["peer"], doc["works"]), (url, works))
        self.assertEqual(any(f["verdict"] == "off" for f in doc["findings"]), not works, r.told())
        return {f["finding"]: f for f in doc["findings"]}

    @contextlib.contextmanager
    def listener(self):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            s.listen()
            yield s, "tcp://127.0.0.1:%d" % s.getsockname()[1]

    def test_nobody(self):
        with self.listener() as (_, url):
            pass
        found = self.ask(url, works=False, seconds=1)
        self.assertEqual(found["port"]["verdict"], "off")
        self.assert_says(found["port"]["mend"], "djinnbench serve --listen", "perf --listen")
        self.assertTrue(found["route"]["facts"]["local"])
        self.assertEqual(found["route"]["facts"]["netdev"], "lo")
        self.assert_says(self.ask("shm://nobody-%d" % os.getpid(), works=False)["listener"]["mend"], "serve --listen")

    def test_nobody_over_ipv6(self):
        try:
            with socket.socket(socket.AF_INET6) as s:
                s.bind(("::1", 0))
                port = s.getsockname()[1]
        except OSError as e:
            self.skipTest("no IPv6 here: %s" % e)
        found = self.ask("tcp://[::1]:%d" % port, works=False)
        self.assert_says(found["port"]["mend"], "--listen tcp://[::]:%d" % port)

    def test_interface_that_is_not_there(self):
        found = self.ask("tcp://[fe80::1%nosuch]:1", works=False)
        self.assert_says(found["name"]["state"], "this host has no interface 'nosuch'")
        self.assert_says(found["name"]["mend"], "ip link")

    def test_silence(self):
        with self.listener() as (_, url):
            found = self.ask(url, "--timeout", "1s", works=False, seconds=2)
        self.assertEqual(found["port"]["verdict"], "ok")
        self.assert_says(found["listener"]["why"], "does not answer")

    def test_silence_by_default(self):
        with self.listener() as (_, url):
            self.ask(url, works=False, seconds=6)

    def child_of(self, p):
        found = []

        def look():
            found[:] = lib.text_of("/proc/%d/task/%d/children" % (p.pid, p.pid)).split()
            return found
        self.until(look, "no child came", p)
        return int(found[0])

    def test_step_that_hangs_or_dies(self):
        """Not even a step that never comes back keeps doctor from ending."""
        for sig, state in ((signal.SIGSTOP, "no end within 2.0 s"), (signal.SIGKILL, "ended the program")):
            with self.listener() as (_, url):
                p = self.start("doctor", "--peer", url, "--json", "--timeout", "2s")
                os.kill(self.child_of(p), sig)
                r = self.finish(p)
            self.assertEqual(r.status, 3, r.told())
            self.assertLess(r.seconds, 4 * lib.SLOW)
            self.assertIn(state, json.loads(r.out)["findings"][-1]["state"])

    def test_stranger(self):
        with self.listener() as (s, url):
            p = self.start("doctor", "--peer", url, "--json")
            s.settimeout(0.1)
            while p.poll() is None:
                with contextlib.suppress(OSError), s.accept()[0] as c:
                    c.sendall(b"SSH-2.0-OpenSSH_9.2p1\r\n" + b"x" * 100)
            r = self.finish(p)
        self.assertEqual(r.status, 3, r.told())
        listener = [f for f in json.loads(r.out)["findings"] if f["finding"] == "listener"][0]
        self.assert_says(listener["why"], "no djinnbench")

    def test_nowhere(self):
        found = self.ask("tcp://no-such-host.invalid:5556", works=False)
        self.assertEqual(found["name"]["verdict"], "off")
        self.assertEqual(self.ask("loop://x", works=False)["transport"]["verdict"], "off")

    def test_server(self):
        key, other = self.key("key"), self.key("other", "b")
        _, urls = self.serve("tcp://127.0.0.1:0", "shm://doctor-%d" % os.getpid(), key=key, extra=("--device", "reference"))
        for url in urls:
            found = self.ask(url, "--key-file", key, works=True)
            self.assertEqual(found["listener"]["facts"]["listener"], "serve")
            self.assertEqual([found[n]["verdict"] for n in ("key", "versions", "connection")], ["ok"] * 3)
            self.ask(url, DJINN_KEY_FILE=key, works=True)
            self.assert_says(self.ask(url, "--key-file", other, works=False)["key"]["state"], "different")
            self.assert_says(self.ask(url, works=False)["key"]["state"], "none was given here")

    def test_server_without_a_key(self):
        _, urls = self.serve("tcp://127.0.0.1:0", extra=("--device", "reference"))
        self.assert_says(self.ask(urls[0], works=True)["key"]["state"], "none at either end")
        found = self.ask(urls[0], "--key-file", self.key("key"), works=False)
        self.assert_says(found["key"]["state"], "the other end has none")
        found = self.ask(urls[0], "--key-file", self.key("open", mode=0o644), works=False)
        self.assert_says(found["key"]["mend"], "chmod 600")

    def perf(self, *args):
        p = self.start("perf", "--listen", "tcp://127.0.0.1:0", *args)
        line = p.stderr.readline()
        self.assertIn("listening on ", line)
        return p, line.split()[-1]

    def test_perf(self):
        """Asking leaves the listener as it was, even one that is there for one driver only."""
        key, other = self.key("key"), self.key("other", "b")
        p, url = self.perf("--key-file", key, "--once")
        found = self.ask(url, "--key-file", key, works=True)
        self.assertEqual(found["listener"]["facts"], {"listener": "perf", "busy": False})
        self.assertEqual([found[n]["verdict"] for n in ("key", "versions", "connection")], ["ok"] * 3)
        self.assert_says(self.ask(url, "--key-file", other, works=False)["key"]["state"], "different")
        self.assert_says(self.ask(url, works=False)["key"]["state"], "none was given here")
        driver = self.run_program("perf", "lat", "--connect", url, "--key-file", key, "--sizes", "64", "--iters", "100",
                                  "--repeats", "1")
        self.assertEqual(driver.status, 0, driver.told())
        self.assertEqual(self.finish(p).status, 0)

    def test_perf_without_a_key(self):
        _, url = self.perf()
        self.assert_says(self.ask(url, works=True)["key"]["state"], "none at either end")
        self.assert_says(self.ask(url, "--key-file", self.key("key"), works=False)["key"]["state"], "the other end has none")

    def test_stopped_server(self):
        p, urls = self.serve("tcp://127.0.0.1:0", extra=("--device", "reference"))
        p.send_signal(signal.SIGSTOP)
        found = self.ask(urls[0], "--timeout", "2s", works=False, seconds=3)
        self.assertEqual(found["listener"]["verdict"], "off")
        p.send_signal(signal.SIGCONT)
        self.ask(urls[0], works=True)


if __name__ == "__main__":
    lib.main()
