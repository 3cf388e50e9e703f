#!/usr/bin/env python3
"""What perf --json writes is what results/djinnbench.perf.schema.json says, for each test, operation and pair of ends;
the schema refuses what is wrong; and every perf file in results/ is valid.

  test_perf_schema.py DJINNBENCH ROOT
"""
import copy
import glob
import json
import os
import re
import subprocess
import sys
import tempfile
import unittest

try:
    import jsonschema
except ImportError:
    print("skipped: python3-jsonschema is not installed")
    sys.exit(77)

PROGRAM, ROOT = os.path.abspath(sys.argv[1]), sys.argv[2]
SCHEMA = os.path.join(ROOT, "results", "djinnbench.perf.schema.json")
QUICK = ["--duration", "20ms", "--repeats", "2"]


def load(path):
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def published():
    for path in sorted(glob.glob(os.path.join(ROOT, "results", "**", "*.json"), recursive=True)):
        if not path.endswith(".schema.json") and str(load(path).get("schema", "")).startswith("djinnbench.perf/"):
            yield path


class PerfSchema(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.validator = jsonschema.Draft202012Validator(load(SCHEMA))

    def errors(self, doc):
        return ["%s: %s" % (e.json_path, e.message[:300]) for e in self.validator.iter_errors(doc)]

    def perf(self, *args):
        with tempfile.TemporaryDirectory(prefix="djb-") as folder:
            path = os.path.join(folder, "perf.json")
            r = subprocess.run([PROGRAM, "perf", *args, "--json", path], capture_output=True, text=True, timeout=120)
            self.assertEqual(r.returncode, 0, r.stderr)
            return load(path)

    def test_the_schema_is_a_schema(self):
        jsonschema.Draft202012Validator.check_schema(load(SCHEMA))

    def test_every_published_file_is_valid(self):
        for path in published():
            with self.subTest(path=path):
                self.assertEqual(self.errors(load(path)), [])

    def test_what_perf_writes(self):
        for args in (["lat", "--transport", "loop", "--sizes", "64,4K"],
                     ["lat", "--transport", "shm", "--sizes", "64", "--raw"],
                     ["lat", "--transport", "shm", "--sizes", "64", "--op", "read"],
                     ["lat", "--transport", "tcp", "--sizes", "64", "--verify"],
                     ["lat", "--transport", "shm", "--sizes", "64", "--rate", "2000"],
                     ["lat", "--transport", "loop", "--sizes", "64", "--iters", "5"],
                     ["bw", "--transport", "shm", "--sizes", "64K", "--op", "write", "--raw"],
                     ["bw", "--transport", "tcp", "--sizes", "64K", "--bidirectional"],
                     ["rate", "--transport", "shm", "--sizes", "64", "--depth", "64", "--connections", "2"]):
            with self.subTest(args=" ".join(args)):
                doc = self.perf(*args, *QUICK[2 if "--iters" in args else 0:])
                self.assertEqual(self.errors(doc), [])
                self.assertEqual(len(doc["results"][0]["replicates"]), 2)

    def test_both_ends_apart(self):
        with subprocess.Popen([PROGRAM, "perf", "--listen", "tcp://127.0.0.1:0", "--once"], stderr=subprocess.PIPE,
                              text=True) as listener:
            try:
                url = re.search(r"listening on (\S+)", listener.stderr.readline()).group(1)
                doc = self.perf("lat", "--connect", url, "--sizes", "64", *QUICK)
            finally:
                listener.kill()
        self.assertEqual(self.errors(doc), [])
        self.assertEqual(doc["manifest"]["peer"]["boot_id"], doc["manifest"]["boot_id"])

    def test_what_is_wrong_is_refused(self):
        def misspelt(row, doc):
            row["half_rtt"] = None

        def absent(row, doc):
            del row["emulated"]

        def text(row, doc):
            row["size"] = "64"

        def no_figure(row, doc):
            row["half_rtt_us"] = None

        def bandwidth_of_latency(row, doc):
            row["gbytes_s"] = 1.0

        def negative(row, doc):
            row["half_rtt_us"]["p50"] = -1

        def replicate(row, doc):
            row["replicates"][0] = {"p50": 1}

        def interval(row, doc):
            row["half_rtt_us"]["ci95"] = [1]

        def other_schema(row, doc):
            doc["schema"] = "djinnbench.perf/2"

        def no_config(row, doc):
            del doc["manifest"]["perf"]["depth"]

        good = self.perf("lat", "--transport", "loop", "--sizes", "64", *QUICK)
        self.assertEqual(self.errors(good), [])
        for damage in (misspelt, absent, text, no_figure, bandwidth_of_latency, negative, replicate, interval,
                       other_schema, no_config):
            with self.subTest(damage=damage.__name__):
                doc = copy.deepcopy(good)
                damage(doc["results"][0], doc)
                self.assertNotEqual(self.errors(doc), [])


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], verbosity=2)
