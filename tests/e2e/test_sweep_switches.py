#!/usr/bin/env python3
"""The ablation: each switch laid over a preset still does the same job, and sends what its plan says.

  test_sweep_switches.py PROGRAM ROOT [Class]"""
from lib import *


def over(name, preset, **semantics):
    return {"name": name, "type": preset, "semantics": semantics}


SWITCHED = [
    over("native_recompute", "native", state="recompute", plan_cache=False),
    over("native_last", "native", outputs="last"),
    over("step", "full_djinn", call="step"),
    over("step_last", "full_djinn", call="step", outputs="last"),
    over("step_all", "full_djinn", call="step", outputs="all"),
    over("recompute", "full_djinn", state="recompute"),
    over("last", "full_djinn", outputs="last"),
    over("serialized", "full_djinn", buffers="serialized"),
    over("step_serialized", "full_djinn", call="step", buffers="serialized"),
    over("stateless_serialized", "full_djinn", call="step", state="recompute", outputs="all", buffers="serialized"),
    over("uncached", "full_djinn", plan_cache=False),
    over("delta", "full_djinn", call="step", state="delta"),
    over("roundtrip", "full_djinn", call="step", state="roundtrip"),
    over("opaque_delta", "blind_opaque", state="delta"),
    over("blind_request", "full_djinn", blind=True),
    over("roundtrip_last", "blind_roundtrip", outputs="last", plan_cache=True),
]


class Switches(Case):
    WORKLOADS = [causal("turns", prompt_length=16, new_tokens=3, turns=3, turn_tokens=4, batch_size=2),
                 causal("one", prompt_length=16, new_tokens=1), causal("none", prompt_length=16, new_tokens=0),
                 {"name": "encoder", "implementation": "synthetic_transformer",
                  "params": {"sequence_length": 16, "hidden_size": 48, "num_heads": 4, "num_layers": 2}}]

    def every_switch(self, dtype):
        text = config(self.WORKLOADS, [NATIVE, FULL] + SWITCHED, dtype=dtype, runs=2, warmup_runs=1,
                      requests_per_block=1)
        r = self.sweep(text)
        bad = {k: v for k, v in r.verdicts().items() if v[0] not in ("VALID", "UNSTEADY", "FEW")}
        self.assertEqual(bad, {}, r.told())
        for w in r.docs:
            for key, row in r.rows(w).items():
                with self.subTest(workload=w, row=key):
                    self.assertEqual(row["switches"]["requested"], row["switches"]["applied"])
                    self.assertEqual(row["wire"]["round_trips"], row["wire"]["predicted"]["round_trips"])
                    for side in ("up", "down"):
                        self.assertEqual(row["wire"][side]["messages"], row["wire"]["predicted"][side]["messages"])
        return r

    def test_in_fp32(self):
        self.every_switch("float32")

    def test_in_fp16(self):
        self.every_switch("float16")

    def test_in_bf16(self):
        self.every_switch("bfloat16")


class Calibration(Case):
    def test_every_write_of_an_answer_is_replayed(self):
        """16 steps return 16 times the logits of 50257 tokens: 3.2 MB cannot be as quick as one of them."""
        text = config([causal("tiny", model="tiny-gpt2", prompt_length=16, new_tokens=16)],
                      [NATIVE, over("last", "full_djinn", outputs="last")], transports=["shm"])
        d = self.sweep(text).rows("tiny")["last", "shm"]["decomposition"]
        self.assertGreater(d["network_us"]["value"], 0.3 * d["wire_floor_us"]["value"])


if __name__ == "__main__":
    main()
