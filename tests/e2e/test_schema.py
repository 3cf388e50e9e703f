#!/usr/bin/env python3
"""Every result file in results/, and the example, is what the JSON Schema says; and the schema says enough.

  test_schema.py ROOT [FILE...]     ROOT is the source tree; FILEs are further results, as a sweep has just written them
"""
import copy
import glob
import json
import os
import sys
import unittest

try:
    import jsonschema
except ImportError:
    print("skipped: python3-jsonschema is not installed")
    sys.exit(77)

ROOT, FILES = sys.argv[1], sys.argv[2:]
SCHEMA = os.path.join(ROOT, "results", "djinnbench.result.schema.json")
EXAMPLE = os.path.join(ROOT, "tests", "e2e", "data", "example_result.json")
APART = {"latency_ms", "overlap_ms", "server_executor_time_ms", "server_duration_ms", "server_cleanup_ms",
         "time_to_first_token_ms", "time_per_output_token_ms"}


def load(path):
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def result_files():
    """Of the JSON files in results/ those that say that they are results, and those that say nothing."""
    found = []
    for path in sorted(glob.glob(os.path.join(ROOT, "results", "**", "*.json"), recursive=True)):
        if not path.endswith(".schema.json") and not str(load(path).get("schema", "")).startswith("djinnbench.perf/"):
            found.append(path)
    return found + FILES + [EXAMPLE]


class Schema(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.schema = load(SCHEMA)
        cls.validator = jsonschema.Draft202012Validator(cls.schema)

    def errors(self, doc):
        return ["%s: %s" % (e.json_path, e.message[:300]) for e in self.validator.iter_errors(doc)]

    def row(self, doc, verdict="VALID", transport=None):
        return next(r for r in doc["workload"]["results"]
                    if r["validity"]["verdict"] == verdict and transport in (None, r["transport"]))

    def test_the_schema_is_a_schema(self):
        jsonschema.Draft202012Validator.check_schema(self.schema)

    def test_every_file_is_valid(self):
        for path in result_files():
            with self.subTest(path=path):
                self.assertEqual(self.errors(load(path)), [])

    def test_every_breakdown_adds_up(self):
        for path in result_files():
            for row in load(path)["workload"]["results"]:
                with self.subTest(path=path, baseline=row["baseline"], transport=row["transport"]):
                    b = row["breakdown"]
                    if b is None:
                        continue
                    total = sum(v for k, v in b.items() if k not in APART and v is not None)
                    self.assertAlmostEqual(total, b["latency_ms"], delta=1e-6 * b["latency_ms"])

    def test_every_run_adds_up(self):
        keys = [k for k in self.schema["$defs"]["breakdown"]["anyOf"][1]["properties"] if k not in APART]
        self.assertEqual(len(keys), 13)
        for run in self.row(load(EXAMPLE), transport="tcp")["runs"]:
            self.assertAlmostEqual(sum(run[k] for k in keys), run["latency_ms"], delta=1e-9)

    def test_bytes_are_as_planned_in_every_valid_row(self):
        for path in result_files():
            for row in load(path)["workload"]["results"]:
                if row["validity"]["verdict"] != "VALID" or not row["wire"]["predicted"]:
                    continue
                wire = row["wire"]
                for way in ("up", "down"):
                    self.assertEqual(wire[way]["payload_bytes"], wire["predicted"][way]["payload_bytes"], path)
                self.assertEqual(wire["round_trips"], wire["predicted"]["round_trips"], path)

    def test_the_example_has_every_verdict_and_two_transports(self):
        rows = load(EXAMPLE)["workload"]["results"]
        self.assertEqual({r["validity"]["verdict"] for r in rows}, {"VALID", "INVALID", "UNSTEADY", "FEW", "SKIPPED"})
        self.assertEqual({r["transport"] for r in rows}, {"local", "shm", "tcp"})

    def test_order_names_rows_that_exist(self):
        for path in result_files():
            doc = load(path)
            for block in doc["manifest"]["blocks"]:
                for turn in block:
                    index = turn["calibrate"] if isinstance(turn, dict) else turn
                    self.assertLess(index, len(doc["workload"]["results"]), path)

    def test_what_is_wrong_is_refused(self):
        def no_wire(doc):
            del self.row(doc)["wire"]

        def misspelt(doc):
            self.row(doc)["brakedown"] = None

        def text(doc):
            self.row(doc)["breakdown"]["client_step_ms"] = "0"

        def verdict(doc):
            self.row(doc)["validity"]["verdict"] = "OK"

        def no_reason(doc):
            self.row(doc, "FEW")["validity"]["reason"] = None

        def skipped_with_numbers(doc):
            self.row(doc, "SKIPPED")["aggregates"] = copy.deepcopy(self.row(doc)["aggregates"])

        def wrong_digest(doc):
            self.row(doc)["runs"][0]["digest_ok"] = False

        def few_runs(doc):
            del self.row(doc)["runs"][5:]

        def derived(doc):
            self.row(doc)["derived"]["speedup"] = 50

        def estimate(doc):
            del self.row(doc, transport="tcp")["decomposition"]["delta_us"]["ci95"]

        def other_schema(doc):
            doc["schema"] = "djinnbench.result/2"

        def path(doc):
            doc["workload"]["workload"] = "../x"

        def negative(doc):
            self.row(doc)["wire"]["up"]["payload_bytes"] = -1
        for damage in (no_wire, misspelt, text, verdict, no_reason, skipped_with_numbers, wrong_digest, few_runs, derived,
                       estimate, other_schema, path, negative):
            with self.subTest(damage=damage.__name__):
                doc = load(EXAMPLE)
                damage(doc)
                self.assertNotEqual(self.errors(doc), [])


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], verbosity=2)
