#!/usr/bin/env python3
"""djinnbench report as a user runs it: golden tables, choosing files, refusals, exit status.

  test_report.py DJINNBENCH [--update]     --update writes the golden files anew: look at the difference before trusting it
"""
import csv
import io
import json
import os
import subprocess
import sys
import tempfile
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
DATA = os.path.join(HERE, "data")
GOLDEN = os.path.join(HERE, os.pardir, "golden")
EXAMPLE = os.path.join(DATA, "example_result.json")
LEAVES = ["client_serialize", "client_network_c2s", "server_queue_latency", "server_plan", "server_placement",
          "server_launch", "server_execution", "server_skeletonization", "client_network_s2c", "client_deserialize",
          "client_step"]
EXPERIMENT = ["workload", "category", "baseline", "latency_mean_ms", "latency_p95_ms", "latency_delta_vs_native_ms",
              "data_mean_mb", "throughput_mean_units_s", "latency_overhead_pct_vs_native_pytorch",
              "speedup_vs_semantic_blind", "data_savings_pct_vs_semantic_blind", "semantic_efficiency_ratio",
              "client_serialize_mean_ms", "client_deserialize_mean_ms", "client_network_c2s_mean_ms",
              "client_network_s2c_mean_ms", "server_duration_mean_ms", "server_executor_time_mean_ms",
              "server_queue_latency_mean_ms", "server_plan_mean_ms", "server_placement_mean_ms",
              "server_execution_mean_ms", "server_skeletonization_mean_ms", "server_cleanup_mean_ms", "source_file"]
PROGRAM = None


def report(*args, cwd=DATA):
    return subprocess.run([PROGRAM, "report", *args], cwd=cwd, capture_output=True, text=True, timeout=60)


def example():
    with open(EXAMPLE, encoding="utf-8") as f:
        return json.load(f)


class Folder:
    """A results folder made of (path, document or text)."""

    def __init__(self, **files):
        self.dir = tempfile.TemporaryDirectory()
        unittest.addModuleCleanup(self.dir.cleanup)
        for path, content in files.items():
            self.add(path, content)

    def add(self, path, content):
        path = os.path.join(self.dir.name, path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as f:
            f.write(content if isinstance(content, str) else json.dumps(content))

    def report(self, *args):
        return report("--results-dir", self.dir.name, *args)


def valid_only(workload="gpt2_micro", latency=None):
    doc = example()
    doc["workload"]["workload"] = workload
    doc["workload"]["results"] = [r for r in doc["workload"]["results"] if r["validity"]["verdict"] == "VALID"]
    if latency:
        doc["workload"]["results"][0]["aggregates"]["latency_ms"]["mean"] = latency
    return doc


def rows(out):
    return list(csv.DictReader(io.StringIO(out.stdout)))


class Golden(unittest.TestCase):
    def check(self, table, form, suffix):
        out = report("--results-dir", "example_result.json", "--table", table, "--format", form)
        path = os.path.join(GOLDEN, "report_%s.%s" % (table, suffix))
        self.assertEqual(out.stderr, "")
        if "--update" in sys.argv:
            with open(path, "w", encoding="utf-8") as f:
                f.write(out.stdout)
        with open(path, encoding="utf-8") as f:
            self.assertEqual(out.stdout, f.read())

    def test_golden(self):
        for table in ("1", "sample", "full"):
            for form, suffix in (("markdown", "md"), ("csv", "csv")):
                with self.subTest(table=table, format=form):
                    self.check(table, form, suffix)


class Content(unittest.TestCase):
    def full(self):
        return rows(report("--results-dir", EXAMPLE, "--table", "full", "--format", "csv"))

    def test_leaves_add_up_in_the_table(self):
        seen = 0
        for row in self.full():
            if row["breakdown_latency_ms"] == "":
                self.assertEqual(row["verdict"], "SKIPPED")
                continue
            parts = [row["breakdown_%s_ms" % k] for k in LEAVES + ["residual", "server_residual"]]
            total = sum(float(p) for p in parts if p)
            self.assertAlmostEqual(total, float(row["breakdown_latency_ms"]), delta=1e-9)
            seen += 1
        self.assertEqual(seen, 9)

    def test_the_experiments_columns_are_there(self):
        self.assertEqual([k for k in EXPERIMENT if k not in self.full()[0]], [])

    def test_missing_is_empty_and_negative_is_negative(self):
        by = {(r["baseline"], r["transport"]): r for r in self.full()}
        skipped = by["ray", "local"]
        self.assertEqual([k for k, v in skipped.items() if v.replace(".", "").lstrip("-").isdigit()],
                         ["launches", "profile_cost_us"])
        self.assertLess(float(by["full_djinn", "shm"]["extra_execution_us_lo"]), 0)
        self.assertEqual(by["native_pytorch", "local"]["up_payload_bytes"], "0")
        self.assertEqual(by["native_pytorch", "local"]["client_serialize_mean_ms"], "")

    def test_zero_copy_needs_both_to_be_zero(self):
        by = {(r["baseline"], r["transport"]): r["zero_copy"] for r in self.full()}
        self.assertEqual(by["full_djinn", "shm"], "yes")
        self.assertEqual(by["full_djinn", "tcp"], "no")
        self.assertEqual(by["pytorch_rpc", "shm"], "no")
        self.assertEqual(by["native_pytorch", "local"], "")
        doc = valid_only()
        doc["workload"]["results"][1]["wire"]["driver_copies"] = None
        out = Folder(**{"w/a_20251122T120000Z.json": doc}).report("--table", "full", "--format", "csv")
        self.assertEqual(rows(out)[1]["zero_copy"], "")

    def test_network_is_a_transport_on_shared_memory(self):
        doc = example()
        doc["workload"]["results"] = [r for r in doc["workload"]["results"] if r["transport"] in ("local", "shm")]
        heading = Folder(**{"w/a_20251122T120000Z.json": doc}).report().stdout.splitlines()[0]
        self.assertIn("| Transport (µs) |", heading)
        self.assertNotIn("Network", heading)

    def test_json_is_the_readme_form(self):
        flat = json.loads(report("--results-dir", EXAMPLE, "--format", "json").stdout)
        self.assertEqual((flat[0]["workload"], flat[0]["category"]), ("gpt2_micro", "smoke"))
        for got, raw in zip(flat[0]["results"], example()["workload"]["results"]):
            self.assertEqual(got["baseline"], raw["baseline"])
            self.assertEqual(got["aggregates"], raw["aggregates"])
            self.assertNotIn("runs", got)

    def test_the_footer_names_commit_and_hash(self):
        raw = report("--results-dir", EXAMPLE).stdout.splitlines()[-1]
        self.assertIn("commit 0123456789abcdef0123456789abcdef01234567", raw)
        self.assertRegex(raw, "XXH3-128 [0-9a-f]{32}$")

    def test_injury_and_interruption_are_told(self):
        doc = valid_only()
        doc["manifest"]["injury"] = "delay:server_plan=200"
        doc["manifest"]["complete"] = False
        out = Folder(**{"w/a_20251122T120000Z.json": doc}).report().stdout
        self.assertIn("INJURED ON PURPOSE: delay:server_plan=200", out)
        self.assertIn("interrupted", out)

    def test_bytes_that_differ_from_the_plan_are_told(self):
        doc = valid_only()
        doc["workload"]["results"][1]["wire"]["up"]["payload_bytes"] += 1
        out = Folder(**{"w/a_20251122T120000Z.json": doc}).report().stdout
        self.assertIn("bytes up: the plan said 256, the transport counted 257", out)

    def one_changed(self, change, *args):
        doc = valid_only()
        change(doc["workload"]["results"][0], doc["workload"]["results"][1])
        return Folder(**{"w/a_20251122T120000Z.json": doc}).report(*args).stdout

    def test_overhead_says_what_the_difference_says(self):
        def apart(native, row):
            row["decomposition"]["delta_us"].update(value=-84.0, ci95={"lo": -90.0, "hi": -80.0})
            row["decomposition"]["native_us"]["value"] = 4200.0

        def touching(native, row):
            row["decomposition"]["delta_us"].update(value=84.0, ci95={"lo": 0.0, "hi": 90.0})

        self.assertIn("| -2.0 % (native at 41 %)", self.one_changed(apart))
        line = [x for x in self.one_changed(touching).splitlines() if "full_djinn" in x][0]
        self.assertIn("| n.d. (native at 41 %)", line)

    def test_a_share_above_the_ceiling_is_not_quoted(self):
        def above(native, row):
            native["roofline"]["share"] = 1.37

        out = self.one_changed(above)
        self.assertIn("(native at \\> 100 %)", out)
        self.assertNotIn("137 %", out)
        self.assertEqual(out.count("the ceiling was measured while the host was busy"), 1)
        self.assertIn("1.37", self.one_changed(above, "--table", "full", "--format", "csv"))

    def test_wide_intervals_are_told_once(self):
        def wide(native, row):
            for r in (native, row):
                r["decomposition"] = None
                r["aggregates"]["latency_ms"]["ci95"] = {"lo": 1.0, "hi": 3.5}

        notes = [x for x in self.one_changed(wide).splitlines() if "wider than x3" in x]
        self.assertEqual(notes, ["- latency's interval wider than x3: gpt2_micro (native_pytorch local, full_djinn shm): "
                                 "the host was busy; repeat"])

    def test_notes_are_grouped_by_kind_and_workload(self):
        doc = valid_only()
        for r in doc["workload"]["results"]:
            r["check"]["digest_sensitive"] = False
            r["warnings"] = ["twice", "twice"]
        out = Folder(**{"w/a_20251122T120000Z.json": doc}).report().stdout
        self.assertEqual(out.count("digest_sensitive: false: gpt2_micro (all rows): "), 1)
        self.assertEqual(out.count("digest_sensitive"), 1)
        self.assertEqual(out.count("warning: gpt2_micro (all rows): twice"), 1)
        self.assertEqual(out.count("twice"), 1)

    def test_cells_of_the_full_table_are_narrow(self):
        def long(native, row):
            row["check"]["bit_equal_to"] = ["baseline_%d/shm" % i for i in range(20)]
            row["work"]["device"] = "cpu: " + "x" * 100

        out = self.one_changed(long, "--table", "full")
        cells = [c.strip() for x in out.splitlines() if x.startswith("|") for c in x.split(" | ")[1:]]
        self.assertLessEqual(max(map(len, cells)), 42)
        self.assertIn("baseline_19/shm", out)
        self.assertIn("x" * 100, out)

    def test_two_clocks_are_owned_up_to(self):
        doc = valid_only()
        for i, r in enumerate(doc["workload"]["results"]):
            r["clock"] = {"offset_ns": 5, "moved_ns": 1, "error_bound_ns": 1000 * i + 1500} if i < 2 else None
        folder = Folder(**{"w/a_20251122T120000Z.json": doc})
        self.assertIn("known to 2.5 µs per round trip", folder.report("--table", "full").stdout)
        self.assertNotIn("two clocks", folder.report("--table", "1").stdout)  # it has no such columns
        for r in doc["workload"]["results"]:
            r["clock"] = {"offset_ns": 0, "moved_ns": 0, "error_bound_ns": 0}
        folder = Folder(**{"w/a_20251122T120000Z.json": doc})
        self.assertNotIn("two clocks", folder.report("--table", "full").stdout)

    def test_the_sample_table_says_what_the_file_holds(self):
        doc = valid_only()
        doc["experiment"]["runs"] = 999
        blocks = len(doc["manifest"]["blocks"])
        out = Folder(**{"w/a_20251122T120000Z.json": doc}).report("--table", "sample").stdout
        self.assertIn("**Runs**: %d blocks; " % blocks, out)
        self.assertNotIn("999", out)
        self.assertIn("new_tokens=%s" % doc["workload"]["results"][0]["metadata"]["spec"]["new_tokens"], out)

    def test_emulated_devices_are_marked(self):
        doc = valid_only()
        doc["workload"]["results"][1].update(transport="rdma", path="host", emulated=True)
        self.assertIn("rdma/host (emulated)", Folder(**{"w/a_20251122T120000Z.json": doc}).report().stdout)


class Files(unittest.TestCase):
    def test_exit_status(self):
        good = Folder(**{"gpt2_micro/a_20251122T120000Z.json": valid_only()})
        self.assertEqual(good.report().returncode, 0)
        self.assertEqual(report("--results-dir", EXAMPLE).returncode, 1)  # one of its rows is INVALID
        self.assertEqual(Folder().report().returncode, 2)
        self.assertEqual(report("--results-dir", "/nonexistent").returncode, 2)
        for wrong in (["--format", "html"], ["--format", "latex"], ["--table", "2"], ["--colour"]):
            out = good.report(*wrong)
            self.assertEqual((out.returncode, out.stdout), (2, ""), wrong)
            self.assertTrue(out.stderr.startswith("djinnbench report: "), out.stderr)

    def test_other_files_are_left_alone(self):
        f = Folder(**{"gpt2_micro/a_20251122T120000Z.json": valid_only(), "perf.json": "{", "w/notes.txt": "x",
                      ".hidden/a_20251122T120000Z.json": "{", "djinnbench.result.schema.json": "{}"})
        self.assertEqual((f.report().returncode, f.report().stderr), (0, ""))

    def test_unusable_files_are_named_and_the_others_reported(self):
        wrong_type = valid_only()
        wrong_type["workload"]["results"][2]["breakdown"]["client_step_ms"] = "0.03"
        f = Folder(**{"a/a_20251122T120000Z.json": valid_only("a"), "b/b_20251122T120000Z.json": wrong_type,
                      "c/c_20251122T120000Z.json": '{"schema": "djinnbench.result/1"',
                      "d/d_20251122T120000Z.json": {"schema": "djinnbench.perf/1"},
                      "e/e_20251122T120000Z.json": '{"schema": "djinnbench.result/1", "x": 1e999}',
                      "f/f_20251122T120000Z.json": "[" * 100000, "g/g_20251122T120000Z.json": ""})
        out = f.report("--format", "csv")
        self.assertEqual(out.returncode, 1)
        self.assertEqual({r["workload"] for r in rows(out)}, {"a"})
        self.assertIn("b_20251122T120000Z.json: workload.results[2].breakdown.client_step_ms: expected a number, "
                      "found a string", out.stderr)
        self.assertIn('expected "djinnbench.result/1", found "djinnbench.perf/1"', out.stderr)
        self.assertEqual(len(out.stderr.splitlines()), 6)

    def test_only_unusable_files(self):
        out = Folder(**{"a/a_20251122T120000Z.json": "{}"}).report()
        self.assertEqual((out.returncode, out.stdout), (2, ""))
        self.assertIn("schema: expected a string, found nothing", out.stderr)

    def test_latest_only_goes_by_the_stamp_and_not_by_the_tag(self):
        f = Folder(**{"w/zz_20251121T235959Z.json": valid_only("w", 111), "w/aa_20251122T000000Z.json": valid_only("w", 222),
                      "v/x_20200101T000000Z.json": valid_only("v", 333)})
        means = [float(r["latency_mean_ms"]) for r in rows(f.report("--latest-only", "--table", "sample", "--format", "csv"))
                 if r["baseline"] == "native_pytorch"]
        self.assertEqual(means, [333, 222])
        both = f.report("--table", "1").stdout
        self.assertIn("| w@example 20251122T120009Z |", both)
        long = valid_only("w" * 40)
        twice = Folder(**{"w/a_20251122T000000Z.json": long, "w/a_20251122T000001Z.json": long}).report().stdout
        self.assertIn("| %s@example 20251122T120009Z |" % ("w" * 40), twice)
        self.assertIn("| v ", both)

    def test_runs_stand_in_the_order_of_time(self):
        f = Folder(**{"a/new_20251122T000002Z.json": valid_only("a"), "z/new_20251122T000001Z.json": valid_only("z"),
                      "a/zz_20251121T000000Z.json": valid_only("a")})
        files = [os.path.basename(r["source_file"]) for r in rows(f.report("--format", "csv"))
                 if r["baseline"] == "native_pytorch"]
        self.assertEqual(files, ["zz_20251121T000000Z.json", "new_20251122T000001Z.json", "new_20251122T000002Z.json"])

    def test_workloads(self):
        f = Folder(**{"%s/x_20200101T000000Z.json" % w: valid_only(w) for w in "abc"})
        out = f.report("--workloads", "a", "c", "--format", "csv")
        self.assertEqual((out.returncode, {r["workload"] for r in rows(out)}), (0, {"a", "c"}))
        out = f.report("--workloads", "a", "nine", "--format", "csv")
        self.assertEqual((out.returncode, {r["workload"] for r in rows(out)}), (1, {"a"}))
        self.assertIn("no usable result of workload 'nine'", out.stderr)

    def test_the_experiments_spellings_and_output(self):
        f = Folder(**{"w/x_20200101T000000Z.json": valid_only()})
        path = os.path.join(f.dir.name, "table.md")
        out = report("--input-dir", f.dir.name, "--output-format", "markdown", "--output", path)
        self.assertEqual((out.returncode, out.stdout), (0, ""))
        with open(path, encoding="utf-8") as written:
            self.assertEqual(written.read(), f.report().stdout)
        out = f.report("--output", "/nonexistent/x/table.md")
        self.assertEqual(out.returncode, 3)
        self.assertIn("/nonexistent/x/table.md: cannot write", out.stderr)

    def test_a_failed_report_leaves_the_old_one(self):
        f = Folder(**{"table.md": "old"})
        path = os.path.join(f.dir.name, "table.md")
        self.assertEqual(f.report("--output", path).returncode, 2)
        with open(path, encoding="utf-8") as written:
            self.assertEqual(written.read(), "old")

    def test_no_formula_reaches_a_spreadsheet(self):
        doc = valid_only("=1+2")
        doc["workload"]["results"][0]["baseline"] = "@x\n\"|y"
        doc["workload"]["results"][0]["validity"]["reason"] = "+cmd"
        f = Folder(**{"w/x_20200101T000000Z.json": doc})
        for table in ("1", "sample", "full"):
            for row in csv.reader(io.StringIO(f.report("--table", table, "--format", "csv").stdout)):
                for cell in row:
                    try:
                        float(cell)
                    except ValueError:
                        self.assertNotIn(cell[:1] or "x", "=+-@\t\r\n", cell)


if __name__ == "__main__":
    PROGRAM = os.path.abspath(sys.argv[1])
    unittest.main(argv=sys.argv[:1], verbosity=2)
