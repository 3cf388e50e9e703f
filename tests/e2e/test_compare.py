#!/usr/bin/env python3
"""djinnbench compare as a CI runs it: every exit status, every format, real results of perf, and files that lie.

  test_compare.py DJINNBENCH ROOT
"""
import copy
import json
import os
import subprocess
import sys
import tempfile
import unittest
import xml.etree.ElementTree

PROGRAM = EXAMPLE = None
PASS, REGRESSION, USAGE, INCONCLUSIVE, NOT_COMPARABLE = 0, 1, 2, 4, 5
# Repeats around 1, so that a scale is all that tells two runs apart.
NOISE = [1.00, 1.01, 0.99, 1.005, 0.995, 1.002, 0.998, 1.00]


def perf_row(**fields):
    row = {"transport": "shm", "path": "host", "emulated": False, "raw": False, "op": "send", "test": "lat", "size": 64,
           "depth": 1, "connections": 1, "threads": 1, "bidirectional": False, "wrong": None, "warnings": []}
    row.update(fields)
    return row


def lat(scale=1.0, noise=NOISE, **fields):
    return perf_row(half_rtt_us={"p50": scale, "p99": 3 * scale},
                    replicates=[{"half_rtt_p50_us": scale * x} for x in noise], **fields)


def bw(scale=1.0, noise=NOISE, **fields):
    return perf_row(test="bw", op="write", size=1 << 20, depth=16, gbytes_s=scale, messages_s=scale * 1e3,
                    replicates=[{"gbytes_s": scale * x, "messages_s": 1e3 * scale * x} for x in noise], **fields)


def document(*rows, **manifest):
    about = {"host": "bench-1", "kernel": "Linux 6.1", "cpu": {"model": "a", "governor": "performance"},
             "build": {"version": "1", "commit": "abc", "compiler": "gcc", "options": "", "type": "release"},
             "perf": {"test": "lat", "repeats": len(NOISE), "peer": "shm://1", "depth": 16}}
    about.update(manifest)
    return {"schema": "djinnbench.perf/1", "manifest": about, "results": list(rows), "interrupted": False}


class Compare(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="djb-")
        self.addCleanup(folder.cleanup)
        self.dir = folder.name

    def write(self, name, content):
        path = os.path.join(self.dir, name)
        with open(path, "w", encoding="utf-8") as f:
            f.write(content if isinstance(content, str) else json.dumps(content))
        return path

    def compare(self, a, b, *args, timeout=60):
        a, b = (x if isinstance(x, str) else self.write(n, x) for n, x in (("a.json", a), ("b.json", b)))
        return subprocess.run([PROGRAM, "compare", a, b, *args], capture_output=True, text=True, timeout=timeout)

    def status(self, want, a, b, *args):
        r = self.compare(a, b, *args)
        self.assertEqual(r.returncode, want, r.stdout + r.stderr)
        return r.stdout

    def refused(self, word, a, b, *args):
        r = self.compare(a, b, *args)
        self.assertEqual(r.returncode, USAGE, r.stdout + r.stderr)
        self.assertIn(word, r.stderr)
        self.assertEqual(r.stdout, "")
        self.assertEqual(len(r.stderr.strip().split("\n")), 1, r.stderr)

    # ---- the statuses ----

    def test_pass(self):
        out = self.status(PASS, document(lat(), bw()), document(lat(1.02), bw(0.98)))
        self.assertIn("**pass**", out)
        self.status(PASS, document(lat(), bw()), document(lat(0.5), bw(2.0)))

    def test_regression(self):
        out = self.status(REGRESSION, document(lat(), bw()), document(lat(1.1), bw()))
        self.assertIn("regression", out)
        self.status(REGRESSION, document(lat(), bw()), document(lat(), bw(0.9)))

    def test_inconclusive(self):
        self.status(INCONCLUSIVE, document(lat()), document(lat(1.05)))
        out = self.status(INCONCLUSIVE, document(lat(noise=NOISE[:2])), document(lat(noise=NOISE[:2])))
        self.assertIn("2 and 2 repeats", out)
        wide = [0.8, 1.2, 0.7, 1.3, 0.9, 1.1, 1.0, 1.0]
        self.status(INCONCLUSIVE, document(lat(noise=wide)), document(lat(noise=wide)))

    def test_a_regression_outweighs_what_is_inconclusive(self):
        self.status(REGRESSION, document(lat(), bw()), document(lat(1.05), bw(0.5)))

    def test_not_comparable_unless_allowed(self):
        here = document(lat())
        build = dict(here["manifest"]["build"], type="debug")
        cpu = dict(here["manifest"]["cpu"], governor="powersave")
        perf = dict(here["manifest"]["perf"], depth=1)
        for there in (document(lat(), host="bench-2"), document(lat(), build=build), document(lat(), cpu=cpu),
                      document(lat(), perf=perf), document(lat(path="staged")), document(lat(emulated=True)),
                      document(lat(), bw()), dict(document(lat()), interrupted=True)):
            with self.subTest(there=there):
                self.status(NOT_COMPARABLE, here, there)
                self.status(NOT_COMPARABLE, there, here)
                self.status(PASS, here, there, "--allow-different")

    def test_commit_peer_and_repeats_may_differ(self):
        here = document(lat())
        build = dict(here["manifest"]["build"], commit="def", version="2")
        perf = dict(here["manifest"]["perf"], peer="shm://2", repeats=6)
        self.status(PASS, here, document(lat(noise=NOISE[:6]), build=build, perf=perf))

    def test_what_is_invalid_or_has_nothing_in_common_is_never_compared(self):
        self.status(NOT_COMPARABLE, document(lat()), document(lat(wrong=2)), "--allow-different")
        self.status(NOT_COMPARABLE, document(lat()), document(bw()), "--allow-different")
        self.status(NOT_COMPARABLE, document(lat()), EXAMPLE, "--allow-different")

    def test_wrong_use(self):
        good = document(lat())
        for args in ((), ("one.json",), ("a", "b", "c"), ("a", "b", "--format", "html")):
            r = subprocess.run([PROGRAM, "compare", *args], capture_output=True, text=True, timeout=60)
            self.assertEqual(r.returncode, USAGE, r.stderr)
        self.refused("No such file", os.path.join(self.dir, "none.json"), good)
        self.refused("NAME:PERCENT", good, good, "--metric", "p50")
        self.refused("percentage", good, good, "--metric", "p50:x")
        self.refused("percentage", good, good, "--metric", "p50:-1")
        self.refused("percentage", good, good, "--metric", "p50:nan")
        self.refused("did you mean p99", good, good, "--metric", "p99x:3")
        self.refused("twice", good, good, "--metric", "p50:3", "latency:4")
        self.refused("no row", good, good, "--metric", "gbytes_s:3")

    # ---- metrics, formats ----

    def test_gates_of_ones_own(self):
        a, b = document(lat(), bw()), document(lat(1.1), bw(0.9))
        self.status(PASS, a, b, "--metric", "p50:15", "gbytes_s:15%")
        self.status(REGRESSION, a, b, "--metric", "latency:5", "--metric", "bandwidth:15")
        self.status(PASS, a, b, "--metric", "messages_s:20")
        # A tail without figures per repeat has no interval.
        self.assertIn("0 and 0 repeats", self.status(INCONCLUSIVE, a, b, "--metric", "p99:50"))

    def test_json(self):
        doc = json.loads(self.status(REGRESSION, document(lat()), document(lat(1.2)), "--format", "json"))
        self.assertEqual((doc["schema"], doc["verdict"], doc["status"]), ("djinnbench.compare/1", "regression", 1))
        row = doc["rows"][0]
        self.assertAlmostEqual(row["ratio"], 1.2)
        self.assertTrue(row["ci95"][0] < 1.2 < row["ci95"][1], row)
        self.assertEqual((row["interval"], row["better"], row["verdict"]), ("bootstrap", "lower", "regression"))

    def test_junit_counts_what_it_holds(self):
        for b, status in ((document(lat(1.0), bw()), PASS), (document(lat(1.2), bw()), REGRESSION),
                          (document(lat(1.05), bw()), INCONCLUSIVE), (document(lat()), NOT_COMPARABLE)):
            suite = xml.etree.ElementTree.fromstring(
                self.status(status, document(lat(), bw()), b, "--format", "junit")).find("testsuite")
            for key, tag in (("failures", "failure"), ("errors", "error")):
                self.assertEqual(int(suite.get(key)), len(suite.findall("testcase/" + tag)))
            self.assertEqual(int(suite.get("tests")), len(suite.findall("testcase")))
            self.assertEqual(status == REGRESSION, suite.get("failures") != "0")
            self.assertEqual(status in (INCONCLUSIVE, NOT_COMPARABLE), suite.get("errors") != "0")

    def test_markup_in_a_file_stays_text(self):
        evil = "<x a='1'>&]]>|`\"\x1b[2J\u202e"
        out = self.status(NOT_COMPARABLE, document(lat(transport=evil), host=evil), document(lat(transport=evil)),
                          "--format", "junit")
        xml.etree.ElementTree.fromstring(out)
        self.assertNotIn("\x1b", out)
        out = self.status(NOT_COMPARABLE, document(lat(transport=evil), host=evil), document(lat(transport=evil)))
        self.assertTrue(out.isascii() and "\x1b" not in out, out)
        self.assertNotRegex(out, r"[^\\]<")

    # ---- bad files ----

    def test_files_that_lie(self):
        good = document(lat())
        self.refused("schema", good, {"schema": "djinnbench.perf/9", "results": []})
        self.refused("a.json", self.write("a.json", "{"), good)
        self.refused("two rows", document(lat(), lat()), good)
        self.refused("b.json", good, document())
        self.refused("no object", document(5), good)
        self.refused("transport", good, document(lat(transport=None)))
        self.refused("transport", good, document(lat(transport=["x"])))
        for value in (-1, 0, "1", [], {}, True):
            with self.subTest(value=value):
                bad = lat()
                bad["replicates"][3]["half_rtt_p50_us"] = value
                self.refused("positive number", good, document(bad))
        bad = lat()
        bad["replicates"] = "many"
        self.refused("no list", good, document(bad))
        bad["replicates"] = [1, 2, 3]
        self.refused("no object", good, document(bad))
        self.refused("1 to 4096", good, document(*[lat(size=i) for i in range(5000)]))
        self.refused("more than", good, document(dict(lat(), replicates=[{}] * 70000)))
        infinite = self.write("inf.json", json.dumps(good).replace('"p99": 3.0', '"p99": 1e999'))
        self.assertIn(self.compare(infinite, good).returncode, (PASS, USAGE))

    def test_nonsense_ends_with_a_status(self):
        """Any part of a good file replaced by any shape: an answer or a refusal, never a crash."""
        good = document(lat(), bw())
        for shape in (None, 0, -1.5, 1e300, "x" * 5000, [], {}, [[]], {"p50": {}}, True):
            for where in (("schema",), ("manifest",), ("manifest", "cpu"), ("results",), ("results", 0),
                          ("results", 0, "replicates"), ("results", 0, "half_rtt_us"), ("results", 0, "size"),
                          ("results", 0, "test"), ("results", 0, "wrong"), ("results", 0, "warnings"),
                          ("results", 1, "replicates", 2), ("results", 1, "replicates", 2, "gbytes_s")):
                bad = copy.deepcopy(good)
                at = bad
                for key in where[:-1]:
                    at = at[key]
                at[where[-1]] = shape
                r = self.compare(bad, good)
                with self.subTest(where=where, shape=str(shape)[:20]):
                    self.assertIn(r.returncode, (PASS, USAGE, INCONCLUSIVE, NOT_COMPARABLE), r.stderr)
                    self.assertNotRegex(r.stderr, "Sanitizer|BUG")

    # ---- results of the program itself ----

    def test_two_runs_of_perf(self):
        paths = [os.path.join(self.dir, "%d.json" % i) for i in range(2)]
        for path in paths:
            subprocess.run([PROGRAM, "perf", "lat", "--transport", "loop", "--sizes", "64,4K", "--duration", "20ms",
                            "--repeats", "6", "--json", path], check=True, capture_output=True, timeout=60)
        doc = json.loads(self.status(PASS, *paths, "--format", "json", "--metric", "p50:1000"))
        self.assertEqual([r["row"].split(" depth")[0] for r in doc["rows"]],
                         ["loop lat send 64 B", "loop lat send 4096 B"])
        self.assertEqual({r["interval"] for r in doc["rows"]}, {"bootstrap"})
        self.status(PASS, paths[0], paths[0], "--metric", "p50:1000")

    def test_a_sweep(self):
        """The example has a row of each verdict: what is INVALID makes the whole incomparable, the rest is shown."""
        self.assertIn("INVALID", self.status(NOT_COMPARABLE, EXAMPLE, EXAMPLE))
        with open(EXAMPLE, encoding="utf-8") as f:
            doc = json.load(f)
        rows = doc["workload"]["results"]
        doc["workload"]["results"] = [r for r in rows if r["validity"]["verdict"] in ("VALID", "SKIPPED")]
        out = self.status(PASS, doc, doc)
        self.assertIn("within launch", out)
        slow = copy.deepcopy(doc)
        for run in slow["workload"]["results"][0]["runs"]:
            run["latency_ms"] *= 1.2
        self.status(REGRESSION, doc, slow)
        self.status(PASS, doc, slow, "--metric", "latency:30")
        few = copy.deepcopy(doc)
        few["workload"]["results"][0]["validity"] = {"verdict": "FEW", "reason": "x"}
        self.assertIn("FEW", self.status(INCONCLUSIVE, doc, few))
        other = copy.deepcopy(doc)
        other["workload"]["results"][0]["model_hash"] = "0"
        self.status(NOT_COMPARABLE, doc, other)


if __name__ == "__main__":
    PROGRAM = os.path.abspath(sys.argv[1])
    EXAMPLE = os.path.join(sys.argv[2], "tests", "e2e", "data", "example_result.json")
    unittest.main(argv=sys.argv[:1], verbosity=2)
