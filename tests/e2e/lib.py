"""What the end-to-end tests of the sweep share: a folder and an environment of their own, configs, runs, results.

Every test is called as   test_x.py PROGRAM ROOT [Class]   and uses the standard library and jsonschema only."""
import contextlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import unittest

PROGRAM, ROOT = os.path.abspath(sys.argv[1]), os.path.abspath(sys.argv[2])
FIXTURES = os.path.join(ROOT, "tests", "fixtures")
SCHEMA = os.path.join(ROOT, "results", "djinnbench.result.schema.json")

LEAVES = ["client_serialize", "client_network_c2s", "server_queue_latency", "server_plan", "server_placement",
          "server_launch", "server_execution", "server_skeletonization", "client_network_s2c", "client_deserialize",
          "client_step"]

NATIVE = {"name": "native_pytorch", "type": "local_synthetic"}
FULL = {"name": "full_djinn", "type": "remote_djinn", "semantic_aware": True}
BLIND = {"name": "semantic_blind", "type": "remote_djinn", "semantic_aware": False}
OPAQUE = {"name": "blind_opaque", "type": "blind_opaque"}
RPC = {"name": "pytorch_rpc", "type": "pytorch_rpc"}
FIVE = [NATIVE, FULL, BLIND, OPAQUE, RPC]

# What a sanitizer build takes longer for; times of such a build mean nothing anyway.
SLOW = float(os.environ.get("DJINN_TEST_SLOW", "1"))


def causal(name, model="gpt2-micro", **params):
    return {"name": name, "implementation": "hf_causal_lm", "params": dict({"model_id": model}, **params)}


def echo(name, size):
    return {"name": name, "implementation": "echo", "params": {"payload_bytes": size}}


def config(workloads, baselines=None, **experiment):
    """A config as text: JSON is YAML too."""
    exp = {"device": "cpu", "dtype": "float32", "runs": 6, "warmup_runs": 2, "requests_per_block": 2, "seed": 1,
           "tag": "t", "transports": ["shm", "tcp"]}
    exp.update(experiment)
    return json.dumps({"experiment": exp, "workloads": workloads, "baselines": baselines or FIVE}, indent=1)


class Result:
    """What a finished program left."""

    def __init__(self, status, out, err, seconds, docs):
        self.status, self.out, self.err, self.seconds, self.docs = status, out, err, seconds, docs

    def rows(self, workload):
        return {(r["baseline"], r["transport"]): r for r in self.docs[workload]["workload"]["results"]}

    def verdicts(self):
        return {(w, r["baseline"], r["transport"]): (r["validity"]["verdict"], r["validity"]["reason"])
                for w, doc in self.docs.items() for r in doc["workload"]["results"]}

    def told(self):
        return "status %s after %.1f s\n--- stdout\n%s\n--- stderr\n%s" % (self.status, self.seconds, self.out[-3000:],
                                                                        self.err[-3000:])


class Case(unittest.TestCase):
    """A test with a folder (self.dir) that goes away; nothing of ours in the environment, sockets in the folder."""

    def setUp(self):
        self.make_dir()
        self.addCleanup(shutil.rmtree, self.dir, True)

    def make_dir(self):
        self.dir = tempfile.mkdtemp(prefix="djb-", dir="/tmp")
        self.results = os.path.join(self.dir, "results")
        self.runtime = os.path.join(self.dir, "run")
        os.mkdir(self.runtime, 0o700)
        self.children = []

    def environment(self, **extra):
        env = {k: v for k, v in os.environ.items()
               if not k.startswith(("DJINN_", "GENIE_", "HF_")) and k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
        env.update(XDG_RUNTIME_DIR=self.runtime, HOME=self.dir)
        env.update(extra)
        return env

    def write(self, name, content, mode=0o644):
        path = os.path.join(self.dir, name)
        with open(path, "wb" if isinstance(content, bytes) else "w") as f:
            f.write(content)
        os.chmod(path, mode)
        return path

    def key(self, name, digit="a", mode=0o600):
        return self.write(name, digit * 64 + "\n", mode)

    # ---- running ----

    def start(self, *args, **env):
        p = subprocess.Popen([PROGRAM] + [str(a) for a in args], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             text=True, env=self.environment(**env), cwd=self.dir)
        p.began = time.monotonic()
        self.children.append(p)
        self.addCleanup(self.put_away, p)
        return p

    @staticmethod
    def put_away(p):
        if p.poll() is None:
            p.kill()
        p.communicate()

    def finish(self, p, timeout=120):
        """Waits; a program that does not end is a failure, and ended."""
        try:
            out, err = p.communicate(timeout=timeout * SLOW)
        except subprocess.TimeoutExpired:
            p.kill()
            out, err = p.communicate()
            self.fail("did not end within %d s\n%s\n%s" % (timeout, out[-2000:], (err or "")[-2000:]))
        return Result(p.returncode, out, err, time.monotonic() - p.began, self.documents())

    def run_program(self, *args, timeout=120, **env):
        return self.finish(self.start(*args, **env), timeout)

    def sweep_args(self, text, *args):
        path = text if os.path.exists(text) else self.write("config.yaml", text)
        return ("sweep", "--config", path, "--model-root", FIXTURES, "--output-dir", self.results) + args

    def sweep(self, text, *args, timeout=120, **env):
        shutil.rmtree(self.results, True)
        return self.run_program(*self.sweep_args(text, *args), timeout=timeout, **env)

    def documents(self):
        docs = {}
        for folder, _, files in os.walk(self.results):
            for f in files:
                self.assertTrue(f.endswith(".json"), "a file that is no result: %s" % f)
                with open(os.path.join(folder, f)) as text:
                    docs[os.path.basename(folder)] = json.load(text)
        return docs

    def serve(self, *urls, key=None, extra=(), **env):
        """A server, and the URLs that it listens on."""
        ready = os.path.join(self.dir, "ready-%d" % len(self.children))
        args = ["serve", "--ready-file", ready, "--model-root", FIXTURES, "--listen"] + list(urls)
        if key:
            args += ["--key-file", key]
        p = self.start(*args, *extra, **env)
        self.until(lambda: text_of(ready).endswith("\n"), "the server did not start", p)
        return p, text_of(ready).split()

    def until(self, condition, what, p=None, timeout=30):
        end = time.monotonic() + timeout * SLOW
        while not condition():
            if p is not None and p.poll() is not None:
                self.fail("%s: it ended: %s" % (what, "".join(p.communicate())[-2000:]))
            if time.monotonic() > end:
                self.fail("%s within %d s" % (what, timeout))
            time.sleep(0.01)

    # ---- claims ----

    def assert_says(self, text, *words):
        for w in words:
            self.assertIn(w, text)

    def assert_refused(self, r, status, *words):
        """This status, a sentence on stderr, nothing on stdout, no result, no trace of a crash."""
        self.assertEqual(r.status, status, r.told())
        self.assert_says(r.err, *words)
        self.assertEqual(r.out, "", r.told())
        self.assertEqual(r.docs, {}, r.told())
        self.assertNotRegex(r.err, "Sanitizer|BUG|assert", r.told())

    def assert_no_invalid(self, r):
        """What a busy machine can do to a row is UNSTEADY; everything else is ours."""
        bad = {k: v for k, v in r.verdicts().items() if v[0] not in ("VALID", "UNSTEADY")}
        self.assertEqual(bad, {}, r.told())

    def assert_nothing_left(self):
        """No socket in the shared-memory folder, and no process that was started here or by what was."""
        left = [os.path.join(d, f) for d, _, files in os.walk(self.runtime) for f in files]
        self.assertEqual(left, [])
        self.assertEqual(self.strays(), [])

    def strays(self):
        """Processes whose environment names our folder."""
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                with open("/proc/%s/environ" % pid, "rb") as f:
                    if self.dir.encode() not in f.read():
                        continue
                with open("/proc/%s/stat" % pid) as f:
                    if f.read().rsplit(")", 1)[1].split()[0] != "Z":
                        found.append(int(pid))
        return found


def cpu_s(pid):
    """Processor time that a running process has used so far."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as f:
        fields = f.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def text_of(path):
    """What stands in a file; nothing, where there is none."""
    with contextlib.suppress(OSError), open(path) as f:
        return f.read()
    return ""


def median(values):
    v = sorted(values)
    return (v[len(v) // 2] + v[(len(v) - 1) // 2]) / 2


def main():
    """Runs the class that is named, or all."""
    names = sys.argv[3:]
    unittest.main(argv=sys.argv[:1] + names, verbosity=2)
