#!/usr/bin/env python3
"""The instrument, tested by injury: a delay put into one leaf appears in that column and in no other, bytes put onto
the wire appear as network, a job that is not the same is not published.

  test_sweep_injury.py PROGRAM ROOT [Class]"""
from lib import *

DELAY_US = 200
# Of the other columns none may move by more than max(10 us, 5 % of the injury).
LIMIT_US = max(10, 0.05 * DELAY_US)
TRANSPORTS = ("shm", "tcp")


class Injury(Case):
    """Echo of 64 B: nothing beside the framework itself, so that a column moves by the injury or not at all."""
    TEXT = config([echo("e", 64)], [NATIVE, FULL], runs=12, requests_per_block=10, warmup_runs=20)

    def columns(self, **env):
        """Per transport the columns in us: medians over the requests, which a stall of the machine does not move."""
        r = self.sweep(self.TEXT, DJINN_INJURE_KEEP="1", **env)
        self.assert_no_invalid(r)
        out = {}
        for t in TRANSPORTS:
            row = r.rows("e")["full_djinn", t]
            out[t] = {leaf: median([run[leaf + "_ms"] for run in row["runs"]]) * 1e3 for leaf in LEAVES}
            out[t]["residual"] = median([run["residual_ms"] for run in row["runs"]]) * 1e3
            out[t]["latency"] = median([run["latency_ms"] for run in row["runs"]]) * 1e3
            out[t]["network"] = median([run["network_ms"] for run in row["runs"]]) * 1e3
            self.assertEqual(bool(env), "injured on purpose" in row["warnings"])
        return out

    def wrong(self, before, after, leaf):
        """What moved that should not have, or did not move that should have."""
        found = []
        for t in TRANSPORTS:
            for name in before[t]:
                want = DELAY_US if name in (leaf, "latency") else 0
                moved = after[t][name] - before[t][name]
                if abs(moved - want) > LIMIT_US:
                    found.append("%s: %s moved by %.1f us, not by %d" % (t, name, moved, want))
        return found

    def delayed(self, leaf):
        found = None
        for _ in range(3):                      # the machine may have moved something; not three times
            before = self.columns()
            after = self.columns(DJINN_INJURE="delay:%s=%d" % (leaf, DELAY_US))
            found = self.wrong(before, after, leaf)
            if not found:
                return
        self.fail("\n".join(found))

    def test_client_serialize(self):
        self.delayed("client_serialize")

    def test_server_queue(self):
        self.delayed("server_queue_latency")

    def test_server_plan(self):
        self.delayed("server_plan")

    def test_server_placement(self):
        self.delayed("server_placement")

    def test_server_launch(self):
        self.delayed("server_launch")

    def test_server_execution(self):
        self.delayed("server_execution")

    def test_server_skeletonization(self):
        self.delayed("server_skeletonization")

    def test_client_deserialize(self):
        self.delayed("client_deserialize")


class Payload(Case):
    def test_ten_megabytes(self):
        """In the wire's bytes exactly; in time only on the way there."""
        text = config([echo("e", 64)], [NATIVE, FULL], runs=8, requests_per_block=2)
        before = self.sweep(text)
        after = self.sweep(text, DJINN_INJURE="payload=10000000", DJINN_INJURE_KEEP="1")
        self.assert_no_invalid(before)
        self.assert_no_invalid(after)
        for t in TRANSPORTS:
            with self.subTest(transport=t):
                a, b = before.rows("e")["full_djinn", t], after.rows("e")["full_djinn", t]
                up = [sum(x["wire"]["up"][k] for k in ("payload_bytes", "header_bytes")) for x in (a, b)]
                # tcp frames every piece that it is cut into; shm has nothing to add.
                self.assertGreaterEqual(up[1] - up[0], 10000000)
                self.assertLess(up[1] - up[0], 10000000 * (1.01 if t == "tcp" else 1 + 1e-9))
                for key in ("payload_bytes", "header_bytes", "messages"):
                    self.assertEqual(a["wire"]["down"][key], b["wire"]["down"][key])
                moved = {leaf: (median([run[leaf + "_ms"] for run in b["runs"]]) -
                                median([run[leaf + "_ms"] for run in a["runs"]])) * 1e3 for leaf in LEAVES}
                gone = moved.pop("client_network_c2s")
                self.assertGreater(gone, 200)           # 10 MB at 50 GB/s
                for leaf, us in moved.items():
                    self.assertLess(abs(us), max(10, 0.05 * gone), leaf)


class Clock(Case):
    """A server whose clock runs fast, as that of another machine may: what is on the way is known all the same."""
    PPM = 5000                                  # for the sweep is over in some ms
    TEXT = config([echo("e", 64)], [NATIVE, FULL, RPC], runs=12, requests_per_block=40, warmup_runs=20)

    def measured(self, **env):
        """Per row the medians of c2s, s2c and the calibrated network in us, and the row."""
        r = self.sweep(self.TEXT, DJINN_INJURE_KEEP="1", **env)
        self.assert_no_invalid(r)               # so the exchanges that asked for the time were not counted
        return {k: ([median([run[key] for run in row["runs"]]) * 1e3
                     for key in ("client_network_c2s_ms", "client_network_s2c_ms", "network_ms")], row)
                for k, row in r.rows("e").items() if k[1] != "local"}, r

    def test_one_clock_is_exact(self):
        """Two processes of one kernel: nothing to measure, nothing to doubt."""
        rows, r = self.measured()
        self.assertEqual(r.rows("e")["native_pytorch", "local"]["clock"], None)
        for k, (_, row) in rows.items():
            self.assertEqual(row["clock"], {"offset_ns": 0, "moved_ns": 0, "error_bound_ns": 0}, k)

    def wrong(self):
        found = []
        rows, r = self.measured(DJINN_INJURE="server_clock=%d" % self.PPM)
        moved = r.docs["e"]["manifest"]["clock"]
        self.assertGreater(moved["offset_ns"], 0)
        for k, ((up, down, network), row) in rows.items():
            clock, bound = row["clock"], row["clock"]["error_bound_ns"] / 1e3
            self.assertGreater(bound, 0, k)
            self.assertGreater(clock["moved_ns"], 0, k)
            for run in row["runs"]:             # nothing arrives before it was sent, give or take the bound
                self.assertGreater(min(run["client_network_c2s_ms"], run["client_network_s2c_ms"]) * 1e3, -bound - 1, k)
            # Following it, each way is a share of the round trip; not following, they are off by what it moved.
            if clock["moved_ns"] / 1e3 < 5 * network:
                found.append("%s: moved by %d ns only, %.1f us on the way" % (k, clock["moved_ns"], network))
            for name, us in ("c2s", up), ("s2c", down):
                if not 0.1 * network < us < 0.9 * network + 5:
                    found.append("%s: %s %.1f us of %.1f us" % (k, name, us, network))
            if row["wire_floor_reason"] is not None or row["decomposition"]["wire_floor_us"] is None:
                found.append("%s: no wire floor: %s" % (k, row["wire_floor_reason"]))
        return found

    def test_a_drifting_clock_is_followed(self):
        found = None
        for _ in range(3):                      # a stall of the machine between two looks at a clock; not three times
            found = self.wrong()
            if not found:
                return
        self.fail("\n".join(found))

    def test_a_server_elsewhere_has_no_wire_floor(self):
        _, urls = self.serve("tcp://127.0.0.1:0", DJINN_INJURE="server_clock=500", DJINN_INJURE_KEEP="1")
        r = self.sweep(config([echo("e", 64)], [NATIVE, FULL], transports=["tcp"]), "--server", urls[0])
        row = r.rows("e")["full_djinn", "tcp"]
        self.assertIsNone(row["decomposition"]["wire_floor_us"])
        self.assert_says(row["wire_floor_reason"], "this sweep starts the server")
        for key in ("offset_ns", "error_bound_ns"):     # its clock is far ahead, and was looked at
            self.assertGreater(row["clock"][key], 0)
        self.assertIsNone(r.rows("e")["native_pytorch", "local"]["wire_floor_reason"])


class OtherJobs(Case):
    TEXT = config([causal("micro", prompt_length=16, new_tokens=6),
                   causal("turns", prompt_length=16, new_tokens=4, turns=3, turn_tokens=4)], FIVE, transports=["shm"])
    KEEPS = ("native_pytorch", "full_djinn", "blind_opaque")

    def verdicts_of(self, injury, keep):
        env = {"DJINN_INJURE": injury}
        if keep:
            env["DJINN_INJURE_KEEP"] = "1"
        r = self.sweep(self.TEXT, **env)
        self.assertEqual(r.status, 1, r.told())
        return r.verdicts()

    def test_without_state(self):
        """A server that forgets: noticed wherever state was to stay, and only there."""
        for (w, baseline, _), (verdict, reason) in self.verdicts_of("drop_state", True).items():
            with self.subTest(workload=w, baseline=baseline):
                if baseline in self.KEEPS:
                    self.assertEqual(verdict, "INVALID")
                    self.assert_says(reason, "not the same job")
                elif baseline == "semantic_blind":      # sends the whole history with every call
                    self.assertIn(verdict, ("VALID", "UNSTEADY"))

    def test_without_half_of_the_prompt(self):
        for (w, baseline, _), (verdict, reason) in self.verdicts_of("trim_input", True).items():
            with self.subTest(workload=w, baseline=baseline):
                self.assertEqual(verdict, "INVALID")
                self.assert_says(reason, "not the same job")

    def test_nothing_injured_is_published(self):
        for injury in ("delay:server_plan=1", "payload=1", "drop_state", "trim_input"):
            with self.subTest(injury=injury):
                self.assertEqual({v[0] for v in self.verdicts_of(injury, False).values()}, {"INVALID"})


if __name__ == "__main__":
    main()
