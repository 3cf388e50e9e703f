#!/usr/bin/env python3
"""Sweeps that are interrupted, whose server dies or stops, whose server is sent rubbish: what was measured is on disk,
a reason is given, nothing is left behind.

  test_sweep_end.py PROGRAM ROOT [Class]"""
import random
import sys
import socket
import threading

try:
    import jsonschema
except ImportError:
    print("skipped: python3-jsonschema is not installed")
    sys.exit(77)

from lib import *

# Far more blocks than can be run; the test ends it.
ENDLESS = config([causal("micro", prompt_length=16, new_tokens=4), echo("later", 64)], [NATIVE, FULL, OPAQUE, RPC],
                 runs=100000, requests_per_block=2, warmup_runs=1)


class Ending(Case):
    def start_sweep(self, text, *args):
        """A sweep that has begun to measure and has done so for a while."""
        self.said = os.path.join(self.dir, "stderr")
        with open(self.said, "w") as said:
            p = subprocess.Popen([PROGRAM] + list(self.sweep_args(text, *args)), stdout=subprocess.PIPE, stderr=said,
                                 text=True, env=self.environment(), cwd=self.dir)
        p.began = time.monotonic()
        self.addCleanup(self.put_away, p)
        self.until(lambda: re.search(r"measuring \d+ blocks", text_of(self.said)), "no measuring", p)
        # Both ends poll: a second of the client's own processor time is some blocks' worth, however busy the host is.
        began = cpu_s(p.pid)
        self.until(lambda: cpu_s(p.pid) > began + 1.0 * SLOW, "no progress", p)
        self.assertIsNone(p.poll(), text_of(self.said))
        return p

    def finish(self, p, timeout=120):
        r = super().finish(p, timeout)
        if r.err is None:
            r.err = text_of(self.said)
        return r

    def assert_finished_blocks_are_kept(self, r, requests=2):
        """Whole blocks only, in every row, in a file that the schema knows."""
        with open(SCHEMA) as f:
            validator = jsonschema.Draft202012Validator(json.load(f))
        doc = r.docs["micro"]
        self.assertEqual(["%s: %s" % (e.json_path, e.message[:200]) for e in validator.iter_errors(doc)], [])
        self.assertFalse(doc["manifest"]["complete"])
        blocks = len(doc["manifest"]["blocks"])
        self.assertGreater(blocks, 0, r.told())
        for key, row in r.rows("micro").items():
            with self.subTest(row=key):
                self.assertEqual(len(row["runs"]), blocks * requests)
                self.assertEqual({run["block"] for run in row["runs"]}, set(range(blocks)))
                if row["transport"] == "local":
                    continue
                for side in ("up", "down"):
                    self.assertEqual(row["wire"][side]["messages"], row["wire"]["predicted"][side]["messages"])
        return blocks


class Interrupted(Ending):
    def test_ctrl_c(self):
        for sig in (signal.SIGINT, signal.SIGTERM):
            with self.subTest(signal=sig):
                shutil.rmtree(self.results, True)
                p = self.start_sweep(ENDLESS)
                at = time.monotonic()
                p.send_signal(sig)
                r = self.finish(p, 20)
                self.assertLess(time.monotonic() - at, 5 * SLOW)
                self.assertEqual(r.status, 1, r.told())
                self.assert_says(r.err, "interrupted", "written: ")
                blocks = self.assert_finished_blocks_are_kept(r)
                self.assertNotIn("later", r.docs)
                wrong = {k: v for k, v in r.verdicts().items()
                         if v[0] not in (("VALID", "UNSTEADY") if blocks >= 6 else ("FEW", "UNSTEADY"))}
                self.assertEqual(wrong, {})
                self.assertRegex(r.out, r"\| micro +\| full_djinn")
                self.assert_nothing_left()

    def test_ctrl_c_of_the_whole_group(self):
        """As a terminal sends it: to the embedded server too, which leaves it to the client."""
        p = self.start_sweep(ENDLESS)
        for pid in self.strays():
            os.kill(pid, signal.SIGINT)
        r = self.finish(p, 20)
        self.assertEqual(r.status, 1, r.told())
        self.assert_finished_blocks_are_kept(r)
        self.assert_nothing_left()

    def test_before_anything_was_measured(self):
        for delay in (0.02, 0.1, 0.3):
            with self.subTest(delay=delay):
                p = self.start(*self.sweep_args(ENDLESS))
                time.sleep(delay)
                p.send_signal(signal.SIGINT)
                r = super().finish(p, 20)
                self.assertIn(r.status, (1, -signal.SIGINT), r.told())
                self.until(lambda: not self.strays(), "strays")
                self.assert_nothing_left()

    def test_a_killed_client_takes_its_server_along(self):
        p = self.start_sweep(ENDLESS)
        p.kill()
        p.wait()
        self.until(lambda: not self.strays(), "the embedded server has stayed", timeout=10)


class Server(Ending):
    def start_both(self, transport):
        url = {"tcp": "tcp://127.0.0.1:0", "shm": "shm://end-%d" % os.getpid()}[transport]
        server, urls = self.serve(url)
        return server, self.start_sweep(ENDLESS, "--server", urls[0]), urls[0]

    def test_killed(self):
        for t in ("shm", "tcp"):
            with self.subTest(transport=t):
                shutil.rmtree(self.results, True)
                server, p, url = self.start_both(t)
                at = time.monotonic()
                server.kill()
                r = self.finish(p, 20)
                self.assertLess(time.monotonic() - at, 5 * SLOW)
                self.assertEqual(r.status, 1, r.told())
                self.assert_finished_blocks_are_kept(r)
                for key, row in r.rows("micro").items():
                    self.assertEqual(row["validity"]["verdict"], "INVALID", key)
                    self.assert_says(row["validity"]["reason"], url)
                self.assert_says(r.err, url)
                self.assertEqual(self.strays(), [])

    def test_terminated(self):
        server, p, url = self.start_both("tcp")
        server.terminate()
        r = self.finish(p, 20)
        self.assertEqual(r.status, 1, r.told())
        self.assert_finished_blocks_are_kept(r)
        self.assert_says(r.err, url)
        self.assertEqual(super().finish(server, 10).status, 0)

    def test_survives_a_client_that_vanishes(self):
        for t in ("shm", "tcp"):
            with self.subTest(transport=t):
                server, p, url = self.start_both(t)
                p.kill()
                p.wait()
                r = self.sweep(config([echo("e", 64)], [NATIVE, FULL], requests_per_block=1), "--server", url)
                self.assert_no_invalid(r)
                self.assertIsNone(server.poll())


class Stopped(Ending):
    def test_a_server_that_is_stopped(self):
        """Nothing says that it will not go on: patience is 30 s, once, not for each row."""
        url = "shm://stop-%d" % os.getpid()
        server, urls = self.serve(url)
        p = self.start_sweep(ENDLESS, "--server", urls[0])
        server.send_signal(signal.SIGSTOP)
        r = self.finish(p, 60)
        server.send_signal(signal.SIGCONT)
        self.assertEqual(r.status, 1, r.told())
        self.assert_finished_blocks_are_kept(r)
        self.assert_says(r.err, url, "stopped")


class Rubbish(Ending):
    def rubbish(self, port, stop, sent):
        """Connections of every ill kind, one after the other and some at once, until told to stop."""
        rng, held = random.Random(5), []
        while not stop.is_set():
            try:
                s = socket.create_connection(("127.0.0.1", port), 5)
                s.settimeout(0.05)
                kind = rng.randrange(5)
                if kind == 0:                           # noise
                    s.sendall(rng.randbytes(rng.randrange(1, 5000)))
                elif kind == 1:                         # the protocol's magic, then noise
                    s.sendall(b"DJN1" + rng.randbytes(200))
                elif kind == 2:                         # lengths that are huge
                    s.sendall(b"\xff" * 64)
                elif kind == 3:                         # a web browser
                    s.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                held.append(s)                          # kind 4 says nothing
                sent.append(kind)
                if len(held) > 20:
                    held.pop(0).close()
            except OSError:
                pass
            time.sleep(0.005)
        for s in held:
            s.close()

    def test_random_bytes_harm_nobody(self):
        server, urls = self.serve("tcp://127.0.0.1:0", "shm://rubbish-%d" % os.getpid())
        stop, sent = threading.Event(), []
        t = threading.Thread(target=self.rubbish, args=(int(urls[0].rsplit(":", 1)[1]), stop, sent))
        t.start()
        try:
            text = config([causal("micro", prompt_length=16, new_tokens=4), echo("e", 65536)], [NATIVE, FULL, RPC],
                          runs=20)
            r = self.sweep(text, "--server", *urls)
        finally:
            stop.set()
            t.join()
        self.assertGreater(len(sent), 20)
        self.assert_no_invalid(r)
        self.assertEqual(set(r.docs), {"micro", "e"})
        self.assertIsNone(server.poll())
        server.terminate()
        r = Case.finish(self, server, 20)
        self.assertEqual(r.status, 0, r.told())
        self.assertNotIn("Sanitizer", r.err)


if __name__ == "__main__":
    main()
