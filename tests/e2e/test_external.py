#!/usr/bin/env python3
"""External baselines: a program that does the job is VALID, one that does not is not, and none is left over.

  test_external.py PROGRAM ROOT [Class]"""
import sys

try:
    import jsonschema
except ImportError:
    print("skipped: python3-jsonschema is not installed")
    sys.exit(77)

from lib import *

DATA = os.path.join(ROOT, "tests", "e2e", "data")
MICRO = causal("micro", prompt_length=6, new_tokens=2)
TURNS = causal("turns", prompt_length=4, new_tokens=2, turns=2, turn_tokens=2, batch_size=2)


def external(name, script, *args):
    return {"name": name, "type": "external", "command": [sys.executable, os.path.join(DATA, script)] + list(args)}


def sweep_config(workloads, *baselines, **experiment):
    exp = dict(transports=["shm"], requests_per_block=1)
    exp.update(experiment)
    return config(workloads, list(baselines), **exp)


class External(Case):
    def sweep(self, text, *args, **env):
        return super().sweep(text, *args, PYTHONDONTWRITEBYTECODE="1", **env)

    def row(self, result, workload, baseline):
        return result.rows(workload)[baseline, "local"]

    def assert_schema(self, result):
        with open(SCHEMA) as f:
            validator = jsonschema.Draft202012Validator(json.load(f))
        for w, doc in result.docs.items():
            self.assertEqual(["%s: %s" % (e.json_path, e.message[:200]) for e in validator.iter_errors(doc)], [], w)


class Honest(External):
    def test_a_program_that_does_the_job_is_valid(self):
        programs = external("plain", "external_gpt2.py"), external("back", "external_echo.py")
        r = self.sweep(sweep_config([MICRO, TURNS, echo("echo", 64)], NATIVE, FULL, *programs), "--allow-external")
        self.assert_schema(r)
        for workload, able, unable, why in (("micro", "plain", "back", "nothing but echo"),
                                            ("turns", "plain", "back", "nothing but echo"),
                                            ("echo", "back", "plain", "no echo here")):
            with self.subTest(workload=workload):
                row = self.row(r, workload, able)
                self.assertIn(row["validity"]["verdict"], ("VALID", "UNSTEADY"), r.told())
                self.assertLessEqual(row["check"]["max_rel_l2"], row["check"]["tolerance"])
                self.assertEqual(row["digest"], self.row(r, workload, "native_pytorch")["digest"])
                self.assertEqual(len(row["runs"]), 12 if workload == "turns" else 6)
                self.assertEqual((row["work"]["device"], row["work"]["threads"]), ("cpython", 1))
                skipped = self.row(r, workload, unable)["validity"]
                self.assertEqual(skipped["verdict"], "SKIPPED")
                self.assert_says(skipped["reason"], why)
        self.assert_no_numbers_but_latency(r)
        self.assert_nothing_left()

    def assert_no_numbers_but_latency(self, r):
        row = self.row(r, "micro", "plain")
        self.assertGreater(row["aggregates"]["latency_ms"]["median"], 0)
        self.assertEqual(set(row["aggregates"]), {"latency_ms", "throughput_units_per_s"})
        self.assertEqual({k for k, v in row["decomposition"].items() if v is not None}, {"latency_us"})
        self.assertEqual(set(row["ci"]), {"latency_ms"})
        self.assertEqual(row["derived"], {})
        for key in ("wire", "breakdown", "roofline", "switches", "residual", "path", "model_hash"):
            self.assertIsNone(row[key], key)
        self.assertEqual(row["metadata"]["external_name"], "plain-python-gpt2")
        self.assertEqual(row["metadata"]["command"][0], sys.executable)
        self.assertFalse([k for x in r.rows("micro").values() for k in x["derived"] if "plain" in k])

    def test_what_it_cannot_do_is_skipped(self):
        """Without a root of models there are no checkpoints, and weights are synthetic."""
        text = sweep_config([causal("synthetic", model="tiny-gpt2", prompt_length=4, new_tokens=2)], NATIVE,
                            external("plain", "external_gpt2.py"))
        r = self.run_program("sweep", "--config", self.write("config.yaml", text), "--output-dir", self.results,
                             "--allow-external", PYTHONDONTWRITEBYTECODE="1")
        row = self.row(r, "synthetic", "plain")
        self.assertEqual(row["weights"], "synthetic")
        self.assertEqual(row["validity"]["verdict"], "SKIPPED")
        self.assertEqual(row["validity"]["reason"], "plain says: it cannot make synthetic weights")
        self.assert_schema(r)

    def test_nothing_starts_without_permission(self):
        marker = os.path.join(self.dir, "started")
        program = {"name": "touch", "type": "external", "command": ["touch", marker]}
        r = self.sweep(sweep_config([echo("echo", 64)], NATIVE, program), "--allow-skip")
        self.assertEqual(self.row(r, "echo", "touch")["validity"]["verdict"], "SKIPPED", r.told())
        self.assert_says(self.row(r, "echo", "touch")["validity"]["reason"], "touch", "--allow-external")
        self.assert_schema(r)
        text = sweep_config([echo("echo", 64)], program)
        checked = self.run_program(*self.sweep_args(text, "--check", "--allow-external"))
        self.assertEqual(checked.status, 0, checked.told())
        self.assertFalse(os.path.exists(marker))

    def test_a_command_is_a_list_and_for_external_rows_only(self):
        for baseline, words in (({"name": "x", "type": "external"}, "command: missing"),
                                ({"name": "x", "type": "external", "command": "python3 x.py"}, "a list of words"),
                                ({"name": "x", "type": "external", "command": []}, "a list of words"),
                                ({"name": "x", "type": "external", "command": [["a"]]}, "expected a word"),
                                (dict(FULL, command=["a"]), "only a baseline of type external"),
                                ({"name": "x", "type": "external", "command": ["a"], "semantics": {"call": "step"}},
                                 "no switches")):
            with self.subTest(baseline=baseline):
                r = self.sweep(sweep_config([MICRO], baseline), "--allow-external")
                self.assert_refused(r, 2, "config.yaml:", words)

    def test_a_native_row_is_not_compared_with_an_external_one(self):
        program = external("plain", "external_echo.py")
        r = self.sweep(sweep_config([echo("echo", 64)], NATIVE, FULL, program, reference_baseline="plain",
                                    blind_baseline="plain"), "--allow-external")
        self.assert_schema(r)
        self.assertFalse([k for x in r.rows("echo").values() for k in x["derived"] if "plain" in k], r.told())


class Faulty(External):
    FAULTS = {"wronglogits": "not the same job: logits of step 1 differs from the reference",
              "wrongtokens": "not the same job: its run chose token",
              "forgets": "1 of 6 timed results differ from the untimed one",
              "impossible": "it says that a request took 3.6e+06 ms",
              "dies": "the program ended: exit status 3",
              "talks": "nothing else on standard output",
              "confused": "confused says: out of [31m memory"}

    def test_each_fault_is_invalid_and_says_why(self):
        faults = [external(f, "external_faults.py", f) for f in self.FAULTS]
        missing = {"name": "missing", "type": "external", "command": [os.path.join(self.dir, "no-such-program")]}
        r = self.sweep(sweep_config([MICRO], NATIVE, FULL, *faults, missing), "--allow-external")
        self.assertEqual(r.status, 1, r.told())
        self.assert_schema(r)
        for name, why in dict(self.FAULTS, missing="No such file or directory").items():
            with self.subTest(fault=name):
                validity = self.row(r, "micro", name)["validity"]
                self.assertEqual(validity["verdict"], "INVALID", validity)
                self.assert_says(validity["reason"], why)
                self.assertEqual(self.row(r, "micro", name)["derived"], {})
        self.assertIn(r.rows("micro")["full_djinn", "shm"]["validity"]["verdict"], ("VALID", "UNSTEADY"), r.told())
        self.assertNotIn("\x1b", r.err)
        self.assert_nothing_left()

    def test_interrupting_a_program_that_hangs(self):
        text = sweep_config([MICRO], NATIVE, external("hangs", "external_faults.py", "hangs"))
        p = self.start(*self.sweep_args(text, "--allow-external"), PYTHONDONTWRITEBYTECODE="1")
        while "hanging" not in (line := p.stderr.readline()):
            self.assertTrue(line, "it ended")
        p.send_signal(signal.SIGINT)
        r = self.finish(p, 20)
        self.assertEqual(r.status, 1, r.told())
        self.assertIn("interrupted", r.err)
        self.assertNotIn("Traceback", r.err)
        self.assert_nothing_left()

    def test_a_killed_sweep_leaves_no_program(self):
        text = sweep_config([MICRO], NATIVE, external("hangs", "external_faults.py", "hangs"))
        p = self.start(*self.sweep_args(text, "--allow-external"), PYTHONDONTWRITEBYTECODE="1")
        while "hanging" not in (line := p.stderr.readline()):
            self.assertTrue(line, "it ended")
        p.kill()
        p.wait()
        self.until(lambda: not self.strays(), "processes are left")


if __name__ == "__main__":
    main()
