#!/usr/bin/env python3
"""Who may talk to whom: keys, their files, and what happens off loopback.

  test_sweep_keys.py PROGRAM ROOT [Class]"""
from lib import *

TEXT = config([echo("e", 64)], [NATIVE, FULL], runs=6, requests_per_block=1, warmup_runs=1)


class Keys(Case):
    def assert_turned_away(self, r, *words):
        """Status 3, a reason, and nothing that only a client who has proven itself may know."""
        self.assert_refused(r, 3, *words)
        self.assertNotRegex(r.err, r"(?i)threads?\b|avx|oneDNN|reference|rows")

    def server_of(self, transport, **kind):
        url = {"tcp": "tcp://127.0.0.1:0", "shm": "shm://keys-%d" % os.getpid()}[transport]
        p, urls = self.serve(url, **kind)
        return p, urls[0]

    def test_the_same_key(self):
        for t in ("tcp", "shm"):
            with self.subTest(transport=t):
                key = self.key("k")
                p, url = self.server_of(t, key=key)
                r = self.sweep(TEXT, "--server", url, "--key-file", key)
                self.assert_no_invalid(r)
                r = self.sweep(TEXT, "--server", url, DJINN_KEY_FILE=key)
                self.assert_no_invalid(r)
                self.assertTrue(r.docs)
                p.terminate()
                self.assertEqual(self.finish(p).status, 0)

    def test_another_key(self):
        for t in ("tcp", "shm"):
            with self.subTest(transport=t):
                p, url = self.server_of(t, key=self.key("k"))
                other = self.key("other", "b")
                self.assert_turned_away(self.sweep(TEXT, "--server", url, "--key-file", other), url, "key")
                self.assertIsNone(p.poll())
                self.assert_no_invalid(self.sweep(TEXT, "--server", url, "--key-file", os.path.join(self.dir, "k")))

    def test_no_key(self):
        for t in ("tcp", "shm"):
            with self.subTest(transport=t):
                _, url = self.server_of(t, key=self.key("k"))
                self.assert_turned_away(self.sweep(TEXT, "--server", url), url, "--key-file")

    def test_a_server_that_cannot_prove_itself(self):
        """A client with a key does not talk to a server without."""
        _, url = self.server_of("tcp")
        self.assert_turned_away(self.sweep(TEXT, "--server", url, "--key-file", self.key("k")), url, "key")

    def test_key_files(self):
        bad = {"others can read": (self.key("open", mode=0o644), "chmod 600"),
               "missing": ("/nonexistent/key", "/nonexistent/key"),
               "short": (self.write("short", "abc\n", 0o600), "short"), "a folder": (self.dir, self.dir)}
        for name, (path, word) in bad.items():
            with self.subTest(name=name):
                self.assert_refused(self.sweep(TEXT, "--key-file", path), 2, word)
                r = self.run_program("serve", "--listen", "tcp://127.0.0.1:0", "--key-file", path)
                self.assert_refused(r, 2, word)
        self.assert_nothing_left()


class OffLoopback(Case):
    def test_a_server_without_key_does_not_start(self):
        for url in ("tcp://0.0.0.0:0", "tcp://[::]:0"):
            with self.subTest(url=url):
                self.assert_refused(self.run_program("serve", "--listen", url), 2, url, "--key-file", "--insecure")
        self.assert_refused(self.run_program("serve", "--host", "0.0.0.0", "--port", "0"), 2, "--key-file")

    def test_with_a_key(self):
        key = self.key("k")
        _, urls = self.serve("tcp://0.0.0.0:0", key=key)
        url = "tcp://127.0.0.1:" + urls[0].rsplit(":", 1)[1]
        self.assert_no_invalid(self.sweep(TEXT, "--server", url, "--key-file", key))
        self.assert_refused(self.sweep(TEXT, "--server", url), 3, "--key-file")

    def test_insecure_needs_both(self):
        _, urls = self.serve("tcp://0.0.0.0:0", extra=["--insecure"])
        url = "tcp://127.0.0.1:" + urls[0].rsplit(":", 1)[1]
        self.assert_refused(self.sweep(TEXT, "--server", url), 3, "insecure")
        self.assert_no_invalid(self.sweep(TEXT, "--server", url, "--insecure"))


class Listening(Case):
    def test_what_cannot_be_listened_on(self):
        p, urls = self.serve("tcp://127.0.0.1:0")
        self.assert_refused(self.run_program("serve", "--listen", urls[0]), 3, urls[0])
        self.assert_refused(self.run_program("serve", "--listen", "tcp://127.0.0.1:99999"), 2, "99999")
        self.assert_refused(self.run_program("serve", "--listen", "tcp://127.0.0.1:0", "--device", "cuda:0"), 3, "cuda")
        p.terminate()
        self.assertEqual(self.finish(p).status, 0)

    def test_a_server_leaves_nothing(self):
        for sig in (signal.SIGINT, signal.SIGTERM):
            p, _ = self.serve("tcp://127.0.0.1:0", "shm://gone-%d" % os.getpid())
            p.send_signal(sig)
            self.assertEqual(self.finish(p).status, 0)
            self.assert_nothing_left()

    def test_sockets_are_ours_alone(self):
        self.serve("shm://mode-%d" % os.getpid())
        paths = [os.path.join(d, f) for d, _, files in os.walk(self.runtime) for f in files]
        self.assertEqual(len(paths), 1)
        self.assertEqual(stat.S_IMODE(os.stat(paths[0]).st_mode), 0o600)
        self.assertEqual(stat.S_IMODE(os.stat(os.path.dirname(paths[0])).st_mode), 0o700)

    def test_a_socket_left_by_a_dead_server_is_taken_over(self):
        url = "shm://again-%d" % os.getpid()
        p, _ = self.serve(url)
        p.kill()
        p.wait()
        self.serve(url)
        self.assert_no_invalid(self.sweep(TEXT, "--server", url))

    def test_once(self):
        p, urls = self.serve("tcp://127.0.0.1:0", extra=["--once"])
        self.assert_no_invalid(self.sweep(TEXT, "--server", urls[0]))
        self.assertEqual(self.finish(p, 10).status, 0)


if __name__ == "__main__":
    main()
