#!/usr/bin/env python3
"""Configs and options that are wrong end with status 2 and a place, and write nothing; --check, plan and list touch no
network; where nothing listens the status is 3.

  test_badinput_config.py PROGRAM ROOT [Class]"""
from lib import *

WORK = "workloads:\n  - name: w\n    implementation: echo\n"
BASE = "baselines:\n  - name: b\n    type: full_djinn\n"
HEAD = "experiment:\n  device: cpu\n  transports: [shm]\n"

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    "a%d: &a%d [%s]\n" % (i, i, ", ".join(["*a%d" % (i - 1)] * 9)) for i in range(1, 10))

# text, line, column (0: any), words of the sentence
BAD = {
    "unknown key": (HEAD + "  runz: 5\n" + WORK + BASE, 4, 3, ["runz", "did you mean 'runs'"]),
    "wrong type": (HEAD + "  runs: many\n" + WORK + BASE, 4, 9, ["runs", "an integer", "many"]),
    "negative runs": (HEAD + "  runs: -3\n" + WORK + BASE, 4, 9, ["runs", "-3", "1 to 100000"]),
    "duplicate key": (HEAD + "  runs: 6\n  runs: 7\n" + WORK + BASE, 5, 3, ["runs", "twice"]),
    "scaling": (HEAD + WORK + "baselines:\n  - name: b\n    type: scaling\n", 9, 11,
                ["scaling is refused", "instead of measuring"]),
    "unknown type": (HEAD + WORK + "baselines:\n  - name: b\n    type: remote_jinn\n", 9, 11,
                     ["did you mean remote_djinn"]),
    "unknown implementation": (HEAD + "workloads:\n  - name: w\n    implementation: ecco\n" + BASE, 6, 21,
                               ["did you mean \"echo\""]),
    "broken YAML": (HEAD + "workloads: [\n" + BASE, 0, 0, ["not YAML"]),
    "tab": ("experiment:\n\tdevice: cpu\n", 2, 1, ["not YAML"]),
    "alias bomb": (BOMB, 0, 0, ["aliases expanded", "refused"]),
    "path as a name": (HEAD + "workloads:\n  - name: ../../w\n    implementation: echo\n" + BASE, 5, 11, ["1 to 64"]),
    "path as a tag": (HEAD + "  tag: /etc/passwd\n" + WORK + BASE, 4, 8, ["1 to 64"]),
    "two of a name": (HEAD + WORK + BASE + "  - name: b\n    type: rpc\n", 10, 5, ["\"b\"", "twice"]),
    "unknown transport": (HEAD.replace("shm", "carrier-pigeon") + WORK + BASE, 3, 16,
                          ["carrier-pigeon", "djinnbench list"]),
    "illegal switches": (HEAD + WORK + BASE + "    semantics: {outputs: all}\n", 10, 16, ["needs call: step"]),
    "wrong kind": ("- a\n- b\n", 1, 1, ["a map with experiment, workloads and baselines"]),
    "empty": ("", 0, 0, ["empty"]),
    "binary": ("\x01\x02\x7f" * 50, 0, 0, ["not YAML"]),
}


class Configs(Case):
    def test_each_is_refused_with_its_place(self):
        for name, (text, line, col, words) in BAD.items():
            for command in (("sweep",), ("plan", "--workload", "w", "--baseline", "b")):
                with self.subTest(name=name, command=command[0]):
                    path = self.write("bad.yaml", text)
                    extra = ("--output-dir", self.results) if command == ("sweep",) else ()
                    r = self.run_program(*command, "--config", path, *extra)
                    self.assert_refused(r, 2, path, *words)
                    self.assertRegex(r.err, re.escape(path) + (":%d:%d: " % (line, col) if line else r":\d+:\d+: "))
                    self.assertFalse(os.path.exists(self.results))
                    self.assertLess(r.seconds, 10 * SLOW)

    def test_check_refuses_the_same(self):
        for name in ("unknown key", "scaling", "alias bomb"):
            with self.subTest(name=name):
                r = self.run_program("sweep", "--check", "--config", self.write("bad.yaml", BAD[name][0]))
                self.assert_refused(r, 2, *BAD[name][3])

    def test_no_such_file(self):
        self.assert_refused(self.run_program("sweep", "--config", "/nonexistent/x.yaml"), 2, "/nonexistent/x.yaml")
        self.assert_refused(self.run_program("sweep", "--config", self.dir), 2, self.dir)


class Options(Case):
    def refused(self, status, words, *args, **env):
        r = self.sweep(config([echo("e", 64)]), *args, **env)
        self.assert_refused(r, status, *words)
        self.assert_nothing_left()

    def test_what_the_config_does_not_have(self):
        self.refused(2, ["--workloads", "\"nope\""], "--workloads", "nope")
        self.refused(2, ["--baselines", "\"nope\""], "--baselines", "full_djinn", "nope")

    def test_values(self):
        self.refused(2, ["runs", "-3"], "--runs=-3")
        self.refused(2, ["runs"], "--runs", "x")
        self.refused(2, ["--tag"], "--tag", "../up")
        self.refused(2, ["\"pigeon\"", "djinnbench list"], "--transports", "pigeon")
        self.refused(2, ["loop"], "--transports", "loop")
        self.refused(2, ["--unheard"], "--unheard-of")
        self.refused(2, ["--cpus"], "--cpus", "one")

    def test_environment(self):
        self.refused(2, ["DJINN_INJURE", "no such leaf"], DJINN_INJURE="delay:nowhere=5")
        self.refused(2, ["DJINN_INJURE"], DJINN_INJURE="break_it")

    def test_a_transport_that_is_not_built_is_the_environments_fault(self):
        self.refused(3, ["rdma"], "--transports", "rdma")

    def test_a_device_that_is_not_there(self):
        r = self.sweep(config([echo("e", 64)]), "--device", "cuda:0")
        self.assertEqual(r.status, 3, r.told())
        self.assert_says(r.err, "cuda")
        r = self.sweep(config([echo("e", 64)]), "--device", "abacus")
        self.assertIn(r.status, (2, 3), r.told())
        self.assert_says(r.err, "abacus")
        self.assert_nothing_left()

    def test_nothing_listens(self):
        for url in ("tcp://127.0.0.1:1", "shm://nobody-%d" % os.getpid()):
            with self.subTest(url=url):
                r = self.sweep(config([echo("e", 64)]), "--server", url)
                self.assert_refused(r, 3, url)
                self.assertLess(r.seconds, 35 * SLOW)

    def test_a_server_by_environment(self):
        for name in ("DJINN_SERVER_ADDRESS", "GENIE_SERVER_ADDRESS"):
            with self.subTest(name=name):
                r = self.sweep(config([echo("e", 64)]), **{name: "127.0.0.1:1"})
                self.assert_refused(r, 3, "127.0.0.1:1")

    def test_bad_urls(self):
        for url in ("tcp://", "tcp://host:99999", "carrier://x", "tcp://h:1:2:3"):
            with self.subTest(url=url):
                self.assert_refused(self.sweep(config([echo("e", 64)]), "--server", url), 2, url)

    def test_an_output_folder_that_cannot_be(self):
        text = config([echo("e", 64)], [NATIVE], runs=1, transports=["shm"])
        r = self.run_program("sweep", "--config", self.write("c.yaml", text), "--output-dir", "/proc/nowhere")
        self.assertIn(r.status, (1, 3), r.told())
        self.assert_says(r.err, "/proc/nowhere")


class DryRuns(Case):
    TEXT = config([causal("tiny", model="tiny-gpt2", prompt_length=64, new_tokens=32), echo("e", 1000)],
                  FIVE + [{"name": "ray", "type": "ray_actor"}])

    def test_check_runs_nothing(self):
        r = self.sweep(self.TEXT, "--check")
        self.assertEqual(r.status, 0, r.told())
        self.assertEqual(r.docs, {})
        self.assertFalse(os.path.exists(self.results))
        self.assert_nothing_left()
        self.assertRegex(r.out, r"full_djinn +1 round trips, payload up 264 B, down 128 B")
        self.assertRegex(r.out, r"semantic_blind +32 round trips, payload up 10432 B, down 511415232 B")
        self.assertRegex(r.out, r"blind_opaque +32 round trips, payload up 636 B, down 6432896 B")
        self.assertRegex(r.out, r"native_pytorch +in the server's process")
        self.assertRegex(r.out, r"full_djinn +1 round trips, payload up 1000 B, down 1000 B")
        self.assertRegex(r.out, r"ray +SKIPPED: .*Ray")
        self.assertRegex(r.out, r"about \d+ s")

    def test_check_of_the_experiments_own_config(self):
        r = self.run_program("sweep", "--check", "--config", os.path.join(ROOT, "configs", "overhead_hf_smoke.yaml"))
        self.assertEqual(r.status, 0, r.told())
        self.assert_says(r.out, "llama_decode_1tok: SKIPPED", "resnet50_batch8: SKIPPED",
                         "hf_tiny_gpt2: weights synthetic")

    def test_plan(self):
        path = self.write("c.yaml", self.TEXT)
        args = ("plan", "--config", path, "--model-root", FIXTURES, "--workload", "tiny", "--baseline")
        r = self.run_program(*args, "semantic_blind")
        self.assertEqual(r.status, 0, r.told())
        self.assert_says(r.out, "round trips: 32", "payload bytes: up 10432, down 511415232", "blind graph")
        r = self.run_program(*args, "blind_roundtrip")         # a preset that the config does not list
        self.assertEqual(r.status, 0, r.told())
        self.assert_says(r.out, "state roundtrip")
        self.assert_refused(self.run_program(*args, "nobody"), 2, "nobody")
        self.assert_refused(self.run_program(*args, "ray"), 2, "Ray")
        self.assert_refused(self.run_program(*args[:-3], "--workload", "w", "--baseline", "full_djinn"), 2, "\"w\"")

    def test_list(self):
        r = self.run_program("list")
        self.assertEqual(r.status, 0, r.told())
        for name in ("shm", "tcp", "loop", "rdma", "dpdk", "cpu", "reference", "cuda", "hf_causal_lm",
                     "synthetic_transformer", "echo", "hf_vision", "native_pytorch", "full_djinn", "semantic_blind",
                     "blind_opaque", "pytorch_rpc", "naive", "api_remoting"):
            self.assertRegex(r.out, r"(?m)^\s*%s\b" % name)

    def test_skipped_rows(self):
        """A row that cannot run is in the result with its reason; --allow-skip says that this is all right."""
        text = config([echo("e", 64)], [NATIVE, FULL, {"name": "ray", "type": "ray_actor"}], transports=["shm"])
        r = self.sweep(text, "--allow-skip")
        verdict, reason = r.verdicts()["e", "ray", "local"]
        self.assertEqual(verdict, "SKIPPED", r.told())
        self.assertIn("Ray", reason)
        if "UNSTEADY" not in r.out:
            self.assertEqual(r.status, 0, r.told())
        self.assertEqual(self.sweep(text).status, 1)


if __name__ == "__main__":
    main()
