#!/usr/bin/env python3
"""djinnbench perf as a user runs it: every test over every transport, its JSON, both ends by hand, and what goes wrong.

  test_perf.py DJINNBENCH
"""
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest

PROGRAM = None
QUICK = ["--duration", "20ms", "--repeats", "2"]
RESULT_KEYS = {"transport", "path", "emulated", "op", "test", "size", "depth", "connections", "iterations",
               "half_rtt_us", "gbytes_s", "gbits_s", "messages_s", "link_gbits_s", "wrong", "bytes_copied",
               "cpu_s_per_gb", "replicates", "histogram", "warnings"}
LATENCY_KEYS = {"min", "p50", "p90", "p99", "p999", "p9999", "max", "n", "ci95"}
TRANSPORTS = ("loop", "shm", "tcp")


def perf(*args, timeout=60):
    return subprocess.run([PROGRAM, "perf", *args], capture_output=True, text=True, timeout=timeout)


def perf_json(*args):
    """Runs perf with --json and returns the document; the run must be a good one."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "perf.json")
        run = perf(*args, "--json", path)
        assert run.returncode == 0, run.stderr
        with open(path, encoding="utf-8") as f:
            return json.load(f)


def cpu_s(pid, first):
    """Seconds that two fields of /proc/PID/stat say, counted from the state: OWN, or CHILDREN that were seen to end.
    0 for a process that is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as f:
            fields = f.read().rsplit(")", 1)[1].split()
    except OSError:
        return 0
    return (int(fields[first]) + int(fields[first + 1])) / os.sysconf("SC_CLK_TCK")


OWN, CHILDREN = 11, 13


def busiest_child_cpu_s(pid):
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as f:
        return max((cpu_s(child, OWN) for child in f.read().split()), default=0)


class Listener:
    """A perf --listen of our own, with the address that it says."""

    def __init__(self, *args, url="tcp://127.0.0.1:0"):
        self.child = subprocess.Popen([PROGRAM, "perf", *args, "--listen", url], stderr=subprocess.PIPE, text=True)
        line = self.child.stderr.readline()
        self.url = re.search(r"listening on (\S+)", line).group(1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.child.kill()
        self.child.wait()
        self.child.stderr.close()


class Proxy:
    """Between driver and listener, on plain sockets: changes one byte, or cuts, after so many bytes from the driver."""

    def __init__(self, url, flip_at=None, cut_at=None):
        host, port = re.match(r"tcp://(.*):(\d+)", url).groups()
        self.to, self.flip_at, self.cut_at = (host, int(port)), flip_at, cut_at
        self.server = socket.create_server(("127.0.0.1", 0))
        self.url = "tcp://127.0.0.1:%d" % self.server.getsockname()[1]
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        with self.server, self.server.accept()[0] as down, socket.create_connection(self.to) as up:
            back = threading.Thread(target=self.pump, args=(up, down, None, None), daemon=True)
            back.start()
            self.pump(down, up, self.flip_at, self.cut_at)
            back.join()

    def pump(self, source, sink, flip_at, cut_at):
        seen = 0
        try:
            while data := bytearray(source.recv(65536)):
                if flip_at is not None and seen <= flip_at < seen + len(data):
                    data[flip_at - seen] ^= 0x10
                seen += len(data)
                if cut_at is not None and seen > cut_at:
                    break
                sink.sendall(data)
        except OSError:
            pass
        for s in (source, sink):
            try:
                s.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


class Everything(unittest.TestCase):
    def check_result(self, r):
        self.assertLessEqual(RESULT_KEYS, set(r))
        self.assertGreater(r["iterations"], 0)
        self.assertEqual(len(r["replicates"]), 2)
        if r["test"] == "lat":
            lat = r["half_rtt_us"]
            self.assertEqual(LATENCY_KEYS, set(lat))
            self.assertGreater(lat["min"], 0)
            self.assertLessEqual(lat["min"], lat["max"])
            self.assertEqual(sum(n for _, n in r["histogram"]), lat["n"])
            if lat["p50"] is not None:
                self.assertTrue(lat["min"] <= lat["p50"] <= lat["max"])
            self.assertIsNone(r["gbytes_s"])
        else:
            self.assertIsNone(r["half_rtt_us"])
            self.assertAlmostEqual(r["gbits_s"], 8 * r["gbytes_s"])
            self.assertGreater(r["messages_s"], 0)
            self.assertAlmostEqual(r["gbytes_s"] * 1e9 / r["messages_s"] if r["size"] else 0, r["size"], 3)

    def test_each_test_over_each_transport(self):
        for transport in TRANSPORTS:
            for test in ("lat", "bw", "rate"):
                with self.subTest(transport=transport, test=test):
                    sizes = [0, 1, 64, 102400] if test == "lat" else [1, 64, 102400]
                    doc = perf_json(test, "--transport", transport, "--sizes", ",".join(map(str, sizes)), *QUICK)
                    self.assertEqual(doc["schema"], "djinnbench.perf/1")
                    self.assertFalse(doc["interrupted"])
                    self.assertEqual([r["size"] for r in doc["results"]], sizes)
                    for r in doc["results"]:
                        self.assertEqual((r["transport"], r["test"]), (transport, test))
                        self.check_result(r)

    def test_each_operation_verified(self):
        for transport in TRANSPORTS:
            for test in ("lat", "bw"):
                for op in ("send", "write", "write_imm", "read"):
                    with self.subTest(transport=transport, test=test, op=op):
                        sizes = ("0," if test == "lat" else "") + "1,7,64,4000" + ("" if op == "send" else ",300K,3M")
                        doc = perf_json(test, "--transport", transport, "--op", op, "--sizes", sizes, "--verify",
                                        "--iters", "30", "--repeats", "2")
                        self.assertEqual({r["wrong"] for r in doc["results"]}, {0})
                        self.assertEqual({r["op"] for r in doc["results"]}, {op})
                        self.assertEqual({r["iterations"] for r in doc["results"]}, {60})

    def test_raw_stands_beside(self):
        for transport in ("shm", "tcp"):
            for test in ("lat", "bw"):
                with self.subTest(transport=transport, test=test):
                    doc = perf_json(test, "--transport", transport, "--sizes", "64,64K", "--raw", *QUICK)
                    self.assertEqual([r["raw"] for r in doc["results"]], [False, True] * 2)
                    for r in doc["results"]:
                        self.check_result(r)
        self.assertEqual(perf("--transport", "loop", "--raw").returncode, 2)

    def test_table_says_what_it_is(self):
        run = perf("lat", "--transport", "tcp", "--sizes", "64", "--iters", "500")
        self.assertEqual(run.returncode, 0)
        self.assertIn("half round trip, us", run.stdout)
        self.assertRegex(run.stdout, r"(?m)^ +64 send +1500 ")
        self.assertNotRegex(perf("bw", "--transport", "tcp", "--sizes", "64", "--iters", "500").stdout, "half")

    def test_ranges(self):
        doc = perf_json("--transport", "loop", "--sizes", "1..64:x4,100..300:+100", "--iters", "20", "--repeats", "2")
        self.assertEqual([r["size"] for r in doc["results"]], [1, 4, 16, 64, 100, 200, 300])

    def test_warns_of_one_core(self):
        core = str(min(os.sched_getaffinity(0)))
        run = perf("lat", "--transport", "tcp", "--sizes", "64", "--iters", "50", "--cpus", core + "," + core)
        self.assertEqual(run.returncode, 0)
        self.assertIn("one core", run.stderr)
        few = perf("lat", "--transport", "tcp", "--sizes", "64", "--iters", "5", "--repeats", "1")
        self.assertIn("too few samples", few.stderr)


class TwoEnds(unittest.TestCase):
    def test_listen_and_connect(self):
        for url in ("tcp://127.0.0.1:0", "tcp://[::1]:0", "shm://test-perf-%d" % os.getpid()):
            with self.subTest(url=url), Listener(url=url) as end:
                for _ in range(2):
                    run = perf("bw", "--connect", end.url, "--sizes", "64,1M", *QUICK)
                    self.assertEqual(run.returncode, 0, run.stderr)

    def test_a_warning_names_its_rows(self):
        run = perf("lat", "--transport", "shm", "--sizes", "64,1M", "--iters", "25", "--repeats", "1", "--verify")
        self.assertEqual(run.returncode, 0, run.stderr)
        self.assertIn("warning: filling and checking", run.stderr)  # all of them: none is named
        run = perf("lat", "--transport", "shm", "--sizes", "64,64M", "--duration", "100ms", "--repeats",
                   "1")
        self.assertEqual(run.returncode, 0, run.stderr)
        self.assertRegex(run.stderr, r"warning: 64M \w+: too few samples for")

    def test_every_address(self):
        url = "tcp://0.0.0.0:0"
        run = perf("--listen", url)
        self.assertEqual(run.returncode, 2)
        self.assertIn("can be reached from other hosts: both ends need the same --key-file", run.stderr)
        end = subprocess.Popen([PROGRAM, "perf", "--listen", url, "--insecure"], stderr=subprocess.PIPE, text=True)
        try:
            self.assertIn("and on this host's other addresses of that family", end.stderr.readline())
        finally:
            end.terminate()
            end.communicate()

    def test_once_ends(self):
        with Listener("--once") as end:
            self.assertEqual(perf("--connect", end.url, "--sizes", "64", *QUICK).returncode, 0)
            self.assertEqual(end.child.wait(timeout=20), 0)

    def test_wait_for_a_listener(self):
        with socket.create_server(("127.0.0.1", 0)) as s:
            url = "tcp://127.0.0.1:%d" % s.getsockname()[1]
        driver = subprocess.Popen([PROGRAM, "perf", "--connect", url, "--wait", "30", "--sizes", "64", *QUICK],
                                  stdout=subprocess.DEVNULL)
        with Listener(url=url):
            self.assertEqual(driver.wait(timeout=60), 0)

    def test_nothing_listens(self):
        with socket.create_server(("127.0.0.1", 0)) as s:
            url = "tcp://127.0.0.1:%d" % s.getsockname()[1]
        run = perf("--connect", url)
        self.assertEqual(run.returncode, 3)
        self.assertIn("nothing listens", run.stderr)

    def test_ends_that_disagree(self):
        cases = [(["bw"], ["lat"], "test"), (["--depth", "4"], ["--depth", "5"], "--depth"),
                 (["--op", "write"], ["--op", "send"], "--op"), (["--sizes", "64"], ["--sizes", "65"], "--sizes"),
                 (["--verify"], [], "--verify"), (["--duration", "1s"], ["--duration", "2s"], "--duration")]
        for here, there, word in cases:
            with self.subTest(option=word), Listener(*here) as end:
                run = perf(*there, "--connect", end.url)
                self.assertEqual(run.returncode, 2, run.stderr)
                self.assertIn(word + " differs", run.stderr)
        with Listener("bw", "--op", "write") as end:
            self.assertIn("the listening end has bw, the connecting end lat", perf("--connect", end.url).stderr)
            run = perf("bw", "--op", "send", "--connect", end.url)
            self.assertIn("the listening end has write, the connecting end send", run.stderr)
        with Listener("bw", "--depth", "4") as end:
            run = perf("bw", "--depth", "4", "--sizes", "64", *QUICK, "--connect", end.url)
            self.assertEqual(run.returncode, 0, run.stderr)

    def test_keys(self):
        with tempfile.TemporaryDirectory() as folder:
            files = []
            for i in range(2):
                files.append(os.path.join(folder, "key%d" % i))
                with open(os.open(files[i], os.O_WRONLY | os.O_CREAT, 0o600), "wb") as f:
                    f.write(bytes([i]) * 40)
            quick = ["--sizes", "64", *QUICK]
            with Listener("--key-file", files[0]) as end:
                self.assertEqual(perf(*quick, "--connect", end.url, "--key-file", files[0]).returncode, 0)
                self.assertEqual(perf(*quick, "--connect", end.url, "--key-file", files[1]).returncode, 2)
                self.assertEqual(perf(*quick, "--connect", end.url).returncode, 2)
                self.assertEqual(perf(*quick, "--connect", end.url, "--key-file", files[0]).returncode, 0)
            run = perf("--listen", "tcp://0.0.0.0:0")
            self.assertEqual(run.returncode, 2)
            self.assertIn("--key-file", run.stderr)

    def test_a_changed_byte_is_found(self):
        with Listener() as end:
            proxy = Proxy(end.url, flip_at=2500000)
            run = perf("bw", "--connect", proxy.url, "--op", "write", "--sizes", "1M", "--iters", "8", "--repeats", "1",
                       "--verify")
            self.assertEqual(run.returncode, 1, run.stderr)
            self.assertIn("1 transfers arrived wrong", run.stderr)
            self.assertIn("1 WRONG", run.stdout)

    def test_a_cut_connection_is_an_error_and_the_listener_goes_on(self):
        with Listener() as end:
            proxy = Proxy(end.url, cut_at=5000000)
            start = time.monotonic()
            run = perf("bw", "--connect", proxy.url, "--op", "write", "--sizes", "1M", "--iters", "100")
            self.assertEqual(run.returncode, 3)
            self.assertLess(time.monotonic() - start, 20)
            self.assertEqual(perf("--connect", end.url, "--sizes", "64", *QUICK).returncode, 0)

    def test_a_stranger_does_not_stop_the_listener(self):
        with Listener() as end:
            host, port = re.match(r"tcp://(.*):(\d+)", end.url).groups()
            for noise in (b"GET / HTTP/1.0\r\n\r\n", os.urandom(1000), b"djinnTCP", b""):
                with socket.create_connection((host, int(port))) as s:
                    s.sendall(noise)
            self.assertEqual(perf("--connect", end.url, "--sizes", "64", *QUICK).returncode, 0)


class Signals(unittest.TestCase):
    def start(self, folder, *args):
        """perf in a session of its own, with an XDG_RUNTIME_DIR of its own, after its table's head."""
        child = subprocess.Popen([PROGRAM, "perf", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                 env={**os.environ, "XDG_RUNTIME_DIR": folder}, start_new_session=True)
        self.addCleanup(child.kill)
        return child

    def until(self, what, child, condition):
        deadline = time.monotonic() + 60
        while not condition():
            self.assertIsNone(child.poll(), "perf ended")
            self.assertLess(time.monotonic(), deadline, what)
            time.sleep(0.01)

    def interrupt(self, child, path):
        """The one row, of 64 bytes, that is printed and written of what was measured until then."""
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=20)
        self.assertEqual(child.returncode, 1, err)
        self.assertRegex(out, r"(?m)^ +64 send ")
        with open(path, encoding="utf-8") as f:
            [row] = json.load(f)["results"]
        self.assertEqual(row["size"], 64)
        return row

    def sockets(self, folder):
        return sorted(os.listdir(os.path.join(folder, "djinnbench")))

    def test_what_was_measured_is_kept(self):
        for transport in TRANSPORTS:
            for test, op in (("lat", "send"), ("bw", "send"), ("bw", "write")):
                for how in (signal.SIGINT, signal.SIGTERM):
                    with self.subTest(transport=transport, test=test, op=op, signal=how), \
                            tempfile.TemporaryDirectory() as folder:
                        path = os.path.join(folder, "perf.json")
                        child = self.start(folder, test, "--transport", transport, "--op", op, "--sizes", "64,128",
                                           "--warmup", "0", "--iters", "999999999", "--repeats", "1", "--json", path)
                        child.stdout.readline()
                        # the group, as a terminal does; or the driver alone, as kill does
                        (os.killpg if how == signal.SIGINT else os.kill)(child.pid, how)
                        _, err = child.communicate(timeout=20)
                        self.assertEqual(child.returncode, 1, err)
                        self.assertIn("ended by a signal", err)
                        self.assertNotIn("other end", err)
                        with open(path, encoding="utf-8") as f:
                            doc = json.load(f)
                        self.assertTrue(doc["interrupted"])
                        # what an exchange measured is good as it is; of a stream, the segments that were confirmed,
                        # the first of which has so many messages where nothing is known yet
                        self.assertIn(len(doc["results"]), (0, 1))
                        self.assertTrue(all(r["iterations"] >= (1 if test == "lat" else 10000)
                                            for r in doc["results"]))
                        if transport == "shm":
                            self.assertEqual(self.sockets(folder), [])

    def test_confirmed_segments_of_a_stream_are_kept(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "perf.json")
            child = self.start(folder, "bw", "--transport", "tcp", "--sizes", "64", "--warmup", "0",
                               "--iters", "9999999999", "--repeats", "1", "--json", path)
            child.stdout.readline()
            # The first segment takes milliseconds of it.
            self.until("no 2 s of processor time", child, lambda: busiest_child_cpu_s(child.pid) > 2)
            row = self.interrupt(child, path)
            self.assertTrue(10000 <= row["iterations"] < 9999999999)
            self.assertGreater(row["gbytes_s"], 0)
            self.assertEqual(len(row["replicates"]), 1)

    def test_finished_rows_are_printed_and_written(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "perf.json")
            child = self.start(folder, "lat", "--transport", "shm", "--sizes", "64,128", "--duration", "100ms",
                               "--repeats", "1000", "--json", path)
            child.stdout.readline()
            # A repeat is a process of its own, which polls for 100 ms: half a second of those that ended is a few.
            self.until("no repeat ended", child, lambda: cpu_s(child.pid, CHILDREN) > 0.5)
            row = self.interrupt(child, path)
            self.assertTrue(0 < len(row["replicates"]) < 1000)

    def test_a_listener_ends_well(self):
        with tempfile.TemporaryDirectory() as folder:
            child = self.start(folder, "--listen", "shm://listener")
            self.assertIn("listening", child.stderr.readline())
            self.assertEqual(self.sockets(folder), ["listener.sock"])
            child.terminate()
            self.assertEqual(child.wait(timeout=20), 0)
            child.communicate()
            self.assertEqual(self.sockets(folder), [])

    def test_a_killed_driver_leaves_no_socket(self):
        with tempfile.TemporaryDirectory() as folder:
            child = self.start(folder, "lat", "--transport", "shm", "--iters", "99999999")
            child.stdout.readline()
            child.kill()
            child.wait()
            child.stdout.close()
            child.stderr.read()  # its end: the other end, which holds it too, is gone
            child.stderr.close()
            self.assertEqual(self.sockets(folder), [])


class WrongUse(unittest.TestCase):
    def test_exit_status_2(self):
        for args in (["latency"], ["--sizes", "0..8:x2"], ["--sizes", "8..1:x2"], ["--sizes", "x"], ["--sizes", ","],
                     ["--sizes", "2G"], ["--sizes", "1..4M"], ["--cpus", "0"], ["--cpus", "0,9999"],
                     ["--depth", "0"], ["--transport", "tcp", "--connect", "tcp://127.0.0.1:1"],
                     ["--listen", "tcp://127.0.0.1:0", "--connect", "tcp://127.0.0.1:1"], ["--op", "push"],
                     ["--transport", "pigeon"], ["--transport", "null"], ["--transport", "fault+null"],
                     ["--listen", "null://x"], ["--cpus", "0,99"], ["--cpus", "0 99"], ["--cpus", "0,4294967296"],
                     ["bw", "--sizes", "64,0"], ["rate", "--sizes", "0"], ["--json", "/nowhere/x.json"],
                     ["--json", "/"], ["--json", ""], ["--json", "/dev/null"],
                     ["--transport", "tcp", "--op", "send", "--sizes", "16M"], ["lat", "bw"]):
            with self.subTest(args=args):
                run = perf(*args)
                self.assertEqual(run.returncode, 2, run.stderr)
                self.assertTrue(run.stderr)
                self.assertFalse(run.stdout)

    def test_sentences(self):
        for args, words in ((["--transport", "null"], "delivers nothing"), (["--cpus", "0 9999"], "there is no core 9999"),
                            (["bw", "--sizes", "0"], "are for lat"), (["--json", "/nowhere/x"], "cannot be written")):
            with self.subTest(args=args):
                self.assertIn(words, perf(*args).stderr)
        cores = sorted(os.sched_getaffinity(0))
        both = "%d %d" % (cores[0], cores[-1])
        self.assertEqual(perf("--transport", "tcp", "--sizes", "64", *QUICK, "--cpus", both).returncode, 0)

    def test_what_is_not_built_is_the_environments_fault(self):
        run = perf("--transport", "dpdk", "--sizes", "64", *QUICK)
        if run.returncode != 0:
            self.assertEqual(run.returncode, 3)
            self.assertIn("dpdk", run.stderr)

    def test_help(self):
        run = perf("--help")
        self.assertEqual(run.returncode, 0)
        for word in ("--transport", "--raw", "--verify", "--listen", "half of a round trip"):
            self.assertIn(word, " ".join(run.stdout.split()))


if __name__ == "__main__":
    PROGRAM = os.path.abspath(sys.argv.pop(1))
    unittest.main()
