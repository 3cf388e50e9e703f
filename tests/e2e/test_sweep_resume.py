#!/usr/bin/env python3
"""Going on with a sweep that was interrupted: it ends as one that was not, and only the same questions are gone on with.

  test_sweep_resume.py PROGRAM ROOT [Class]"""
from lib import *

WORKLOAD = causal("micro", prompt_length=16, new_tokens=4)
BASELINES = [NATIVE, FULL, OPAQUE, RPC]
RUNS = 400                              # so many that the signal comes in between


def text(workload=WORKLOAD, baselines=BASELINES, runs=RUNS, **experiment):
    return config([workload], baselines, runs=runs, requests_per_block=2, warmup_runs=1, **experiment)


class Resuming(Case):
    def interrupted(self, content):
        """The file that a sweep has left when it was told to stop, with some of its blocks, and those."""
        said = os.path.join(self.dir, "stderr")
        with open(said, "w") as err:
            p = subprocess.Popen([PROGRAM] + list(self.sweep_args(content)), stdout=subprocess.DEVNULL, stderr=err,
                                 env=self.environment(), cwd=self.dir)
        self.addCleanup(lambda: (p.kill(), p.wait()))
        self.until(lambda: re.search(r"measuring \d+ blocks", text_of(said)), "no measuring", p)
        time.sleep(0.3 * SLOW)          # some blocks' worth; how many is read from the result
        p.send_signal(signal.SIGINT)
        self.assertEqual(p.wait(20 * SLOW), 1, text_of(said))
        doc = self.documents()["micro"]
        self.assertFalse(doc["manifest"]["complete"], text_of(said))
        self.assertGreater(len(doc["manifest"]["blocks"]), 0)
        return self.write("old.json", json.dumps(doc)), doc

    def go_on(self, old, content, *args):
        return self.sweep(content, "--resume", old, *args)


class Continues(Resuming):
    def test_to_the_end(self):
        old, before = self.interrupted(text())
        had = len(before["manifest"]["blocks"])
        runs = had + 6
        r = self.go_on(old, text(runs=runs))
        self.assert_no_invalid(r)
        doc = r.docs["micro"]
        self.assertTrue(doc["manifest"]["complete"])
        self.assertEqual(doc["manifest"]["launches"], 2)
        self.assertEqual(len(doc["manifest"]["blocks"]), runs)
        self.assertEqual(doc["manifest"]["blocks"][:had], before["manifest"]["blocks"])
        old_rows = {(x["baseline"], x["transport"]): x for x in before["workload"]["results"]}
        for key, row in r.rows("micro").items():
            with self.subTest(row=key):
                self.assertEqual([run["block"] for run in row["runs"]], [b for b in range(runs) for _ in range(2)])
                self.assertEqual([run["launch"] for run in row["runs"]], [0] * 2 * had + [1] * 12)
                for a, b in zip(old_rows[key]["runs"], row["runs"]):
                    a["wire_floor_ms"] = b["wire_floor_ms"]        # of each launch
                    self.assertEqual(a, b)
                if row["transport"] != "local":
                    self.assertEqual(row["wire"]["up"]["messages"], row["wire"]["predicted"]["up"]["messages"])
        self.assert_nothing_left()

    def test_with_nothing_left_to_do(self):
        """All blocks are there: the row is what it was, by the file alone."""
        old, before = self.interrupted(text())
        r = self.go_on(old, text(runs=len(before["manifest"]["blocks"])))
        doc = r.docs["micro"]
        self.assertTrue(doc["manifest"]["complete"])
        self.assertEqual(doc["manifest"]["blocks"], before["manifest"]["blocks"])
        for key, row in r.rows("micro").items():
            self.assertIn(row["validity"]["verdict"], ("VALID", "UNSTEADY", "FEW"), key)
            self.assertEqual(row["switches"]["applied"]["buffers"], row["switches"]["requested"]["buffers"], key)


class Refuses(Resuming):
    def test_other_questions(self):
        old, before = self.interrupted(text())
        had = len(before["manifest"]["blocks"])
        threads = before["manifest"]["server"]["threads"]       # which the device's name has in it
        stepping = dict(FULL, semantics={"call": "step"})
        other = {"seed": text(seed=2), "requests_per_block": text().replace('"requests_per_block": 2',
                                                                           '"requests_per_block": 3'),
                 "metadata.spec.new_tokens": text(causal("micro", prompt_length=16, new_tokens=5)),
                 "metadata.spec.model_id": text(causal("micro", model="tiny-gpt2", prompt_length=16, new_tokens=4)),
                 "switches.requested.call": text(baselines=[NATIVE, stepping, OPAQUE, RPC]),
                 "manifest.server.device": text(threads=threads % 2 + 1),
                 "semantic_blind": text(baselines=[NATIVE, BLIND]),
                 "manifest.blocks": text(runs=max(had - 1, 1))}
        self.assertGreater(had, 1)
        for word, content in other.items():
            with self.subTest(field=word):
                self.assert_refused(self.go_on(old, content), 2, old, word)
        self.assert_nothing_left()

    def test_other_places(self):
        old, before = self.interrupted(text())
        for key in ("host", "boot_id"):
            doc = json.loads(json.dumps(before))
            doc["manifest"][key] = "0000"
            with self.subTest(field=key):
                r = self.go_on(self.write("other.json", json.dumps(doc)), text())
                self.assert_refused(r, 2, "other.json", "manifest." + key)

    def test_hostile_files(self):
        old, before = self.interrupted(text())

        def with_value(path, value):
            doc = x = json.loads(json.dumps(before))
            for key in path[:-1]:
                x = x[key]
            x[path[-1]] = value
            return json.dumps(doc)

        row = ["workload", "results", 1]
        files = {"no blocks": with_value(["manifest", "blocks"], []), "a number": with_value(["manifest", "blocks"], 7),
                 "no runs": with_value(row + ["runs"], []),
                 "far block": with_value(row + ["runs", 0, "block"], 4294967295),
                 "far launch": with_value(row + ["runs", 0, "launch"], 1e18),
                 "no row": with_value(["workload", "results"], []),
                 "cut": json.dumps(before)[:3000], "empty": "", "list": "[]", "noise": "\0\1\2" * 100}
        for name, content in files.items():
            with self.subTest(file=name):
                r = self.go_on(self.write("hostile.json", content), text())
                self.assert_refused(r, 2, "hostile.json")
        self.assert_refused(self.go_on("/nonexistent.json", text()), 2, "/nonexistent.json")
        self.assert_nothing_left()


if __name__ == "__main__":
    main()
