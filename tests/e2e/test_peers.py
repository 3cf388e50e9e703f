#!/usr/bin/env python3
"""docs/peers.md is true: each pair of commands in it runs, prints a figure, and the conversion that stands there puts
the two within an order of magnitude (what is faster is tools/peers' business, on a quiet machine). And tools/peers
itself: its statistics, its verdicts, that nothing of it stays.

  test_peers.py DJINNBENCH ROOT [PAIR...]      DJINN_RDMA=DEVICE,GID,ADDRESS lets the rdma pairs run
"""
import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest

PROGRAM, ROOT, ONLY = os.path.abspath(sys.argv[1]), os.path.abspath(sys.argv[2]), sys.argv[3:]
DOCUMENT = os.path.join(ROOT, "docs", "peers.md")
SCRIPT = os.path.join(ROOT, "tools", "peers")
PARSER = {"shm-lat-ucx": "ucx-lat", "shm-put-ucx": "ucx-bw", "tcp-lat-ucx": "ucx-lat", "tcp-lat-sockperf": "sockperf",
          "tcp-bw-iperf3": "iperf3", "rdma-lat": "perftest-lat", "rdma-bw": "perftest-bw"}
# What makes the document's durations short; the figures are then worth nothing but their order of magnitude.
SHORTER = [(r"--duration \S+", "--duration 100ms"), (r" -t 2\b", " -t 1"), (r" -n 1000000\b", " -n 50000"),
           (r" -n 100000\b", " -n 10000"), (r" -n 20000\b", " -n 1000"), (r" -n 10000\b(?! -w)", " -n 1000"),
           (r" -w 1000\b", " -w 100")]


# In iperf3's place: a server that listens and never ends, and a client that says that it runs and never ends.
STUCK = """#!%s
import socket, sys, time
if '-s' in sys.argv:
    s = socket.create_server(('127.0.0.1', int(sys.argv[sys.argv.index('-p') + 1])))
else:
    open('%s', 'w').write('1')
time.sleep(600)
"""


def load_script():
    loader = importlib.machinery.SourceFileLoader("peers", SCRIPT)
    sys.dont_write_bytecode = True
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("peers", loader))
    loader.exec_module(module)
    return module


peers = load_script()


def pairs():
    """{name: {role: command}} of the document's blocks."""
    with open(DOCUMENT, encoding="utf-8") as f:
        text = f.read()
    found = {}
    for name, block in re.findall(r"^```sh pair (\S+)\n(.*?)^```$", text, re.M | re.S):
        lines = block.strip().split("\n")
        found[name] = {role[2:]: command for role, command in zip(lines[::2], lines[1::2])}
    return found


class Document(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.pairs = pairs()

    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="djb-")
        self.addCleanup(folder.cleanup)
        self.addCleanup(peers.CHILDREN.end_all)
        self.dir = folder.name
        programs = os.path.join(self.dir, "bin")
        os.mkdir(programs)
        os.symlink(PROGRAM, os.path.join(programs, "djinnbench"))
        key = os.path.join(self.dir, "key")
        with open(os.open(key, os.O_CREAT | os.O_WRONLY, 0o600), "w", encoding="ascii") as f:
            f.write("ab" * 32 + "\n")
        self.env = {"PATH": programs + ":" + os.environ["PATH"], "KEY": key, "XDG_RUNTIME_DIR": self.dir}

    def prepared(self, command, ports):
        """The document's line, shorter, on ports of its own."""
        for pattern, new in SHORTER:
            command = re.sub(pattern, new, command)
        return re.sub(r"(?<=-p )\d+|(?<=:)\d{5}\b",
                      lambda m: str(ports.setdefault(m.group(0), peers.free_port())), command)

    def side(self, server, client, ports):
        """Runs a client, with its server where it has one, and returns what the client prints."""
        child = None
        if server:
            line = self.prepared(server, ports)
            port = int(re.search(r"-p (\d+)|:(\d{4,5})\b", line).expand(r"\1\2") or 0)
            child = peers.serve(["sh", "-c", "exec env " + line], self.env, port)
        try:
            return peers.CHILDREN.output(["sh", "-c", "exec env " + self.prepared(client, ports)], self.env, 40)
        finally:
            if child:
                peers.CHILDREN.end(child)

    def missing(self, pair):
        for role, command in pair.items():
            program = next(w for w in command.split() if not re.match(r"^(\w+=.*|taskset|-c|\d)$", w))
            if program != "djinnbench" and not shutil.which(program):
                return "%s is not installed" % program
        if len(os.sched_getaffinity(0) & {0, 1}) < 2:
            return "cores 0 and 1 are not both ours"
        return None

    def check(self, name):
        pair = self.pairs[name]
        if self.missing(pair):
            self.skipTest(self.missing(pair))
        if name.startswith("rdma"):
            if not os.environ.get("DJINN_RDMA"):
                self.skipTest("no RDMA device named (DJINN_RDMA=DEVICE,GID,ADDRESS)")
            self.env.update(zip(("DEVICE", "GID", "ADDRESS"), os.environ["DJINN_RDMA"].split(",")))
        # A busy machine can make one of the two ten times slower for a moment, but not thrice.
        ours, theirs = 0, 1
        for _ in range(3):
            try:
                ours, theirs = self.figures(name, pair)
            except peers.Nonsense:
                continue
            print("%s: ours %.4g, theirs %.4g" % (name, ours, theirs), file=sys.stderr)
            if 0.1 < ours / theirs < 10:
                return
        # One that sleeps between messages waits for a slice of the processor each time when others want it.
        busy, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
        if busy > 1.5 * cores:
            self.skipTest("%s: ours %g, theirs %g: %.1f want %d cores" % (name, ours, theirs, busy, cores))
        self.fail("%s: ours %g, theirs %g" % (name, ours, theirs))

    def figures(self, name, pair):
        ports, path = {}, os.path.join(self.dir, "perf.json")
        theirs = peers.PARSERS[PARSER[name]](self.side(pair.get("their server"), pair["theirs"], ports))[0]
        self.side(pair.get("our server"), pair["ours"] + " --json " + path, ports)
        with open(path, encoding="utf-8") as f:
            row = json.load(f)["results"][0]
        return row["half_rtt_us"]["p50"] if row["test"] == "lat" else row["gbytes_s"], theirs

    def test_each_pair_has_a_case_and_a_parser(self):
        self.assertEqual(set(self.pairs), set(PARSER))
        self.assertLessEqual(set(self.pairs), {c["name"] for c in peers.cases()})
        for name, pair in self.pairs.items():
            self.assertLessEqual({"theirs", "ours"}, set(pair), name)

    def test_units(self):
        """What the document multiplies by, and what the parsers do."""
        ucx = "  3000     32.959    34.222    34.222    29220.66   29220.66       29221       29221\n"
        self.assertAlmostEqual(peers.PARSERS["ucx-bw"](ucx)[0], 29220.66 * 0.001048576)
        self.assertAlmostEqual(peers.PARSERS["ucx-lat"](ucx)[0], 32.959)
        write = " #bytes  #iterations  BW peak[Gb/sec]  BW average[Gb/sec]\n 65536  200  0.71  0.69   \t\t 0.001307\n"
        self.assertAlmostEqual(peers.PARSERS["perftest-bw"](write)[0], 1307 * 65536 / 1e9)
        self.assertAlmostEqual(peers.PARSERS["perftest-bw"](write)[0], 0.69 * 0.125, delta=0.001)
        send = " 64      400          11.30          142.84       11.93    \t   13.79   10.30  \t102.83  \t142.84 \n"
        self.assertAlmostEqual(peers.PARSERS["perftest-lat"](send)[0], 11.93)
        self.assertAlmostEqual(peers.PARSERS["iperf3"]('{"end":{"sum_received":{"bits_per_second":8e9}}}')[0], 1.0)
        self.assertAlmostEqual(peers.PARSERS["sockperf"]("x ---> percentile 50.000 =    2.974\n")[0], 2.974)
        with open(DOCUMENT, encoding="utf-8") as f:
            text = f.read()
        for factor in ("0.001048576", "0.125", "1.25e-10"):
            self.assertIn(factor, text)
        with self.assertRaises(peers.Nonsense):
            peers.PARSERS["perftest-lat"](" 64      1000          inf            inf          inf   -nan\n")
        for parser in PARSER.values():
            with self.assertRaises(peers.Broken):
                peers.PARSERS[parser]("nothing\n")


def add_pair(name):
    setattr(Document, "test_pair_" + name.replace("-", "_"), lambda self: self.check(name))


for pair_name in PARSER:
    if not ONLY or any(pair_name.startswith(x) for x in ONLY):
        add_pair(pair_name)


class Script(unittest.TestCase):
    def run_script(self, *args, path=None, timeout=120):
        env = dict(os.environ, PATH=path) if path else None
        return subprocess.run([sys.executable, "-B", SCRIPT, *args], capture_output=True, text=True, timeout=timeout,
                              env=env)

    def test_statistics(self):
        self.assertEqual(peers.median([3, 1, 2, 10]), 2.5)
        self.assertIsNone(peers.interval("ratio", [1] * 5, [1] * 5))
        lo, hi = peers.interval("ratio", [1.0, 1.1, 0.9, 1.05, 0.95, 1.0], [2.0, 2.1, 1.9, 2.0, 2.05, 1.95])
        self.assertTrue(0.44 < lo < 0.5 < hi < 0.56, (lo, hi))
        self.assertAlmostEqual(peers.compared("difference", [3, 3], [1, 1]), 2)
        self.assertEqual(peers.interval("absolute", [5] * 6, None), [5, 5])

    def test_list_and_wrong_use(self):
        r = self.run_script("--list", "--program", PROGRAM)
        self.assertEqual(r.returncode, 0, r.stderr)
        self.assertIn("ucx_perftest", r.stdout)
        for args in (["nothing"], ["--rounds", "0"], ["--cpus", "0,0"], ["--cpus", "x"], ["--program", "/none"]):
            self.assertEqual(self.run_script("--program", PROGRAM, *args).returncode, 2, args)

    def test_a_case_with_its_json(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "out.json")
            r = self.run_script("shm-lat-raw", "rdma", "--program", PROGRAM, "--rounds", "2", "--seconds", "0.02",
                                "--json", path)
            self.assertIn(r.returncode, (0, 1), r.stderr + r.stdout)
            with open(path, encoding="utf-8") as f:
                doc = json.load(f)
        case = doc["cases"][0]
        self.assertEqual((doc["schema"], case["name"], len(case["rounds"])), ("djinnbench.peers/1", "shm-lat-raw", 2))
        self.assertIn(case["verdict"], ("pass", "miss"))
        self.assertEqual({c["verdict"] for c in doc["cases"][1:]}, {"skipped"})

    def test_what_is_not_installed_is_skipped_with_its_name(self):
        with tempfile.TemporaryDirectory() as folder:
            for name in ("taskset", "sh"):
                os.symlink(shutil.which(name), os.path.join(folder, name))
            r = self.run_script("tcp-bw-iperf3", "--program", PROGRAM, "--rounds", "1", "--seconds", "0.02",
                                path=folder)
        self.assertEqual(r.returncode, 3, r.stderr + r.stdout)
        self.assertIn("iperf3 is not installed", r.stdout)

    def test_interrupted_it_leaves_no_process(self):
        """A peer that serves for ever is ended with the script."""
        with tempfile.TemporaryDirectory() as folder:
            fake, port_file = os.path.join(folder, "iperf3"), os.path.join(folder, "port")
            with open(fake, "w", encoding="ascii") as f:
                f.write(STUCK % (sys.executable, port_file))
            os.chmod(fake, 0o755)
            mark = "PEERS_MARK=" + folder
            p = subprocess.Popen([sys.executable, "-B", SCRIPT, "tcp-bw-iperf3", "--program", PROGRAM, "--rounds", "1",
                                  "--seconds", "0.05"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                 env=dict(os.environ, PATH=folder + ":" + os.environ["PATH"], PEERS_MARK=folder))
            try:
                end = time.monotonic() + 60
                while not os.path.exists(port_file):
                    self.assertTrue(time.monotonic() < end and p.poll() is None, "the client was not started")
                    time.sleep(0.01)
                p.send_signal(signal.SIGTERM)
                self.assertEqual(p.wait(timeout=30), 3)
            finally:
                p.kill()
                p.wait()
            self.assertEqual(marked(mark), [])


def marked(mark):
    """Processes whose environment holds the mark."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open("/proc/%s/environ" % pid, "rb") as f:
                if mark.encode() in f.read() and int(pid) != os.getpid():
                    found.append(int(pid))
        except OSError:
            pass
    return found


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], verbosity=2)
