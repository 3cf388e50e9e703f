#!/usr/bin/env python3
"""Writes example_result.json: a result file whose arithmetic holds, with every kind of verdict.

The numbers are drawn (seeded), not measured. The tests of the schema and of `report` read the written file; run this
again only when the schema changes:  ./make_example_result.py > example_result.json
"""
import hashlib
import json
import random
import statistics
import sys

BLOCKS = 8
TOKENS, PROMPT, VOCAB = 32, 64, 512
LEAVES = ["client_serialize_ms", "client_network_c2s_ms", "server_queue_latency_ms", "server_plan_ms",
          "server_placement_ms", "server_launch_ms", "server_execution_ms", "server_skeletonization_ms",
          "client_network_s2c_ms", "client_deserialize_ms", "client_step_ms"]
SUMMED = LEAVES + ["residual_ms", "server_residual_ms"]
MIB = 1 << 20
HISTORY = sum(PROMPT + t for t in range(TOKENS))  # positions of a history that is sent again for every token

# Mean nanoseconds of each leaf in the order of SUMMED; what each baseline sends; how its switches stand.
NATIVE_EXECUTION = 4_180_000
SHM = {"net": 1_500, "floor": 1_100}
TCP = {"net": 11_000, "floor": 9_500}
BASELINES = {
    "full_djinn": {
        "type": "remote_djinn", "calls": 1, "up": PROMPT * 4, "down": TOKENS * 4, "aware": True,
        "switches": ["resident", "request", "resident", "token", "on", "registered"],
        "leaves": [620, None, 410, 350, 290, 21_000, 4_181_000, 480, None, 300, 210, 60, 90]},
    "blind_opaque": {
        "type": "remote_djinn", "calls": TOKENS, "up": PROMPT * 4 + (TOKENS - 1) * 4, "down": TOKENS * VOCAB * 4,
        "aware": False, "switches": ["resident", "step", "resident", "last", "on", "registered"],
        "leaves": [11_000, None, 9_500, 8_800, 7_900, 64_000, 4_262_000, 15_000, None, 6_200, 31_000, 800, 1_900]},
    "semantic_blind": {
        "type": "remote_djinn", "calls": TOKENS, "up": HISTORY * 4, "down": HISTORY * VOCAB * 4, "aware": False,
        "switches": ["resident", "step", "recompute", "all", "off", "registered"],
        "leaves": [19_000, None, 12_000, 96_000, 11_000, 402_000, 41_800_000, 910_000, None, 7_000, 44_000, 900, 2_100]},
    "pytorch_rpc": {
        "type": "pytorch_rpc", "calls": 1, "up": PROMPT * 4, "down": TOKENS * 4, "aware": None,
        "switches": ["resident", "request", "recompute", "token", "off", "serialized"],
        "leaves": [9_400, None, 600, 92_000, 1_100, 399_000, 41_200_000, 2_900, None, 6_600, 300, 70, 110]},
}
SWITCH_KEYS = ["weights", "call", "state", "outputs", "plan_cache", "buffers"]
VERDICTS = {
    ("blind_opaque", "tcp"): ("FEW", "4 blocks; 6 are needed for an interval"),
    ("semantic_blind", "tcp"): ("UNSTEADY", "warm-up ended at its bound of 200 requests; the last windows differ by 6 %"),
    ("pytorch_rpc", "tcp"): ("INVALID", "digest differs from the untimed one in 1 of 8 requests (first: run 5)"),
}


def quantile(values, p):
    values, k = sorted(values), (len(values) - 1) * p
    low = int(k)
    return values[low] + (values[min(low + 1, len(values) - 1)] - values[low]) * (k - low)


def interval(values):
    """Exact interval of the median: below 9 samples it reaches from the least to the greatest."""
    return {"lo": min(values), "hi": max(values)} if len(values) >= 6 else None


def aggregate(values):
    return {"mean": statistics.fmean(values), "median": statistics.median(values), "p95": quantile(values, 0.95),
            "min": min(values), "max": max(values), "sd": statistics.stdev(values), "n": len(values), "p90": None,
            "p95_bounded": None, "p99": None, "ci95": interval(values)}


def estimate(values):
    ci = interval(values)
    said = None
    if ci and ci["lo"] <= 0 <= ci["hi"]:
        said = "not distinguishable from 0, at most %.1f µs" % ci["hi"]
    return {"value": statistics.median(values), "ci95": ci, "within_launch": True, "statement": said}


def noisy(rng, ns, share=0.02):
    """The long leaves repeat well, the short ones do not."""
    return max(1, round(ns * rng.gauss(1, share if ns < 1e5 else share / 10)))


def one_run(rng, run_id, leaves_ns, up, down, digest_ok=True):
    ns = [noisy(rng, v) for v in leaves_ns]
    run = {"run_id": run_id, "block": run_id, "launch": 0, "turn": None, "latency_ms": sum(ns) / 1e6,
           "input_mb": up / MIB, "output_mb": down / MIB, "total_data_mb": (up + down) / MIB, "units_processed": TOKENS}
    run["throughput_units_per_s"] = TOKENS / (run["latency_ms"] / 1000)
    run.update({key: v / 1e6 for key, v in zip(SUMMED, ns)})
    run["overlap_ms"] = 0.0
    run["digest_ok"] = digest_ok
    return run


def breakdown(runs):
    runs = sorted(runs, key=lambda r: r["latency_ms"])
    runs = runs[len(runs) // 4:len(runs) - len(runs) // 4]
    return {k: statistics.fmean(r[k] for r in runs) if runs[0].get(k) is not None else None
            for k in SUMMED + ["overlap_ms", "latency_ms"]}


def switches(values):
    return {"requested": dict(zip(SWITCH_KEYS, values)), "applied": dict(zip(SWITCH_KEYS, values))}


def work(extra=1.0):
    return {"requests": BLOCKS, "tokens": TOKENS, "flop": round(18_874_368 * extra), "flop_head": 2_097_152,
            "weight_bytes": 23_592_960, "weight_bytes_head": 4_194_304, "ops": 1216, "threads": 1, "device": "cpu"}


def common(name, kind, transport, runs, values, extra=1.0):
    keys = ["latency_ms", "throughput_units_per_s", "total_data_mb"] + [k for k in SUMMED if k in runs[0]]
    aggregates = {k: aggregate([r[k] for r in runs]) for k in keys if runs[0][k] is not None}
    return {
        "baseline": name, "runner_type": kind, "transport": transport, "path": None if transport == "local" else "host",
        "emulated": False, "runs": runs, "aggregates": aggregates,
        "metadata": {"unit_name": "tokens", "device": "cpu", "dtype": "float32",
                     "spec": {"implementation": "hf_causal_lm", "model_id": "gpt2-micro", "prompt_length": PROMPT,
                              "new_tokens": TOKENS, "batch_size": 1}, "baseline": name, "runner_type": kind},
        "derived": {}, "ci": {"latency_ms": dict(aggregates["latency_ms"]["ci95"], label="within launch")
                              if aggregates["latency_ms"]["ci95"] else None},
        "work": work(extra), "wire": None, "breakdown": breakdown(runs), "decomposition": None,
        "roofline": {"bound": "memory", "share": 0.41 / extra, "bytes_per_s": 5.6e9, "flop_per_s": 4.5e9},
        "check": {"reference": "native_pytorch", "max_rel_l2": 3.1e-7, "tolerance": 1e-5, "argmax_equal": True,
                  "digest_sensitive": True, "near_tie_position": None, "bit_equal_to": ["native_pytorch"]},
        "digest": hashlib.md5(b"gpt2-micro").hexdigest(), "weights": "checkpoint",
        "model_hash": hashlib.md5(b"model").hexdigest(), "switches": switches(values),
        "setup_ms": 48.2 if transport != "local" else 31.7, "cold_start_ms": 9.8,
        "cpu_s": {"client": 0.071, "server": 0.069}, "memory": {"client_rss_bytes": 21 * MIB, "server_rss_bytes": 64 * MIB},
        "warmup": {"requests": 60, "steady": True}, "outliers": [], "autocorrelation_lag1": 0.07, "aa": None,
        "validity": {"verdict": "VALID", "reason": None}}


def native_row(rng):
    runs = []
    for i in range(BLOCKS):
        values = {"server_launch_ms": 12_000, "server_execution_ms": NATIVE_EXECUTION, "server_placement_ms": 240,
                  "server_skeletonization_ms": 260, "server_residual_ms": 80}
        run = one_run(rng, i, [values.get(k, 1) for k in SUMMED], 0, 0)
        spent = sum(round(run[k] * 1e6) for k in values)
        for k in SUMMED:
            if k not in values:
                run[k] = None
        run["latency_ms"] = spent / 1e6
        run["throughput_units_per_s"] = TOKENS / (run["latency_ms"] / 1000)
        runs.append(run)
    row = common("native_pytorch", "local_synthetic", "local", runs,
                 ["resident", "request", "resident", "token", "on", "in process"])
    row["breakdown"]["overlap_ms"] = 0.0
    none = {"payload_bytes": 0, "header_bytes": 0, "messages": 0, "copies_bytes": 0, "retransmitted_bytes": 0}
    row["wire"] = {"up": dict(none), "down": dict(none), "round_trips": 0,
                   "predicted": {"up": {"payload_bytes": 0}, "down": {"payload_bytes": 0}, "round_trips": 0},
                   "driver_copies": 0}
    latency = estimate([r["latency_ms"] * 1000 for r in runs])
    row["decomposition"] = {"latency_us": latency, "native_us": latency, "delta_us": None, "network_us": None,
                            "extra_execution_us": None, "framework_overhead_us": None, "wire_floor_us": None}
    row["check"]["bit_equal_to"] = []
    row["memory"]["client_rss_bytes"] = None
    noise = [rng.gauss(0, 2.5) for _ in range(BLOCKS)]
    row["aa"] = {"delta_us": estimate(noise), "ratio": {"value": 1.0003, "ci95": {"lo": 0.9989, "hi": 1.0014}}}
    return row


def wire(spec, transport, up, down):
    calls = spec["calls"]

    def way(payload, header):
        return {"payload_bytes": payload, "header_bytes": header * calls, "messages": calls,
                "copies_bytes": payload * 2 if spec["switches"][-1] == "serialized" else 0,
                "retransmitted_bytes": 0 if transport == "shm" else None}
    return {"up": way(up, 96), "down": way(down, 128), "round_trips": calls,
            "predicted": {"up": {"payload_bytes": up, "messages": calls}, "down": {"payload_bytes": down, "messages": calls},
                          "round_trips": calls}, "driver_copies": 0 if transport == "shm" else 1}


def remote_row(rng, name, transport, native):
    spec, medium = BASELINES[name], SHM if transport == "shm" else TCP
    verdict, reason = VERDICTS.get((name, transport), ("VALID", None))
    up, down = spec["up"], spec["down"]
    one_way = [medium["net"] * spec["calls"] + up // 8, medium["net"] * spec["calls"] + down // 8]
    leaves = list(spec["leaves"])
    leaves[1], leaves[8] = one_way
    runs = [one_run(rng, i, leaves, up, down, not (verdict == "INVALID" and i == 5))
            for i in range(4 if verdict == "FEW" else BLOCKS)]
    for run in runs:
        run["network_ms"] = noisy(rng, sum(one_way) * 0.98) / 1e6
        run["wire_floor_ms"] = noisy(rng, (medium["floor"] * 2 * spec["calls"]) + (up + down) // 8) / 1e6
        run["server_duration_ms"] = sum(run[k] for k in LEAVES if k.startswith("server_")) + run["server_residual_ms"]
    row = common(name, spec["type"], transport, runs, spec["switches"],
                 1.0 if spec["switches"][2] == "resident" else 8.5)
    if spec["aware"] is not None:
        row["metadata"]["semantic_aware"] = spec["aware"]
    row["wire"] = wire(spec, transport, up, down)
    row["aggregates"]["network_ms"] = aggregate([r["network_ms"] for r in runs])
    row["aggregates"]["server_duration_ms"] = aggregate([r["server_duration_ms"] for r in runs])
    pairs = list(zip(runs, native["runs"]))
    us = {"latency": [a["latency_ms"] * 1e3 for a in runs], "native": [b["latency_ms"] * 1e3 for _, b in pairs],
          "network": [a["network_ms"] * 1e3 for a in runs],
          "extra_execution": [(a["server_execution_ms"] - b["server_execution_ms"]) * 1e3 for a, b in pairs],
          "wire_floor": [a["wire_floor_ms"] * 1e3 for a in runs]}
    us["delta"] = [a - b for a, b in zip(us["latency"], us["native"])]
    us["framework_overhead"] = [d - n - e for d, n, e in zip(us["delta"], us["network"], us["extra_execution"])]
    us["network_difference"] = [(a["client_network_c2s_ms"] + a["client_network_s2c_ms"] - a["network_ms"]) * 1e3
                                for a in runs]
    row["decomposition"] = {k + "_us": estimate(v) for k, v in us.items()}
    row["residual"] = {"median_ms": statistics.median(r["residual_ms"] for r in runs),
                       "server_median_ms": statistics.median(r["server_residual_ms"] for r in runs),
                       "limit_ms": max(0.02 * row["aggregates"]["latency_ms"]["median"], 0.005 * spec["calls"]),
                       "share_over": 0.0}
    row["validity"] = {"verdict": verdict, "reason": reason}
    if verdict == "UNSTEADY":
        row["warmup"] = {"requests": 200, "steady": False}
        row["autocorrelation_lag1"] = 0.44
    return row


def skipped_row():
    row = {k: None for k in ["path", "work", "wire", "breakdown", "decomposition", "roofline", "check", "digest",
                             "weights", "model_hash", "switches", "setup_ms", "cold_start_ms", "cpu_s", "memory",
                             "warmup", "autocorrelation_lag1", "aa"]}
    row.update({"baseline": "ray", "runner_type": "ray_actor", "transport": "local", "emulated": False, "runs": [],
                "aggregates": {}, "derived": {}, "ci": {}, "outliers": [],
                "metadata": {"unit_name": None, "device": None, "dtype": None, "spec": {}, "baseline": "ray",
                             "runner_type": "ray_actor"},
                "validity": {"verdict": "SKIPPED", "reason": "type ray_actor: Ray is not part of this program"}})
    return row


def derive(row, rows, native):
    """The experiment's figures (SPEC 6: a ratio is one of medians), then ours; null where not defined."""
    def median_of(r, key):
        return r["aggregates"][key]["median"] if r and r["aggregates"] else None

    def sibling(name):
        found = [r for r in rows if r["baseline"] == name and r["transport"] == row["transport"]]
        return found[0] if found else None

    def ratio(a, b):
        return a / b if a is not None and b else None
    blind, opaque = sibling("semantic_blind"), sibling("blind_opaque")
    mine, ref = median_of(row, "latency_ms"), median_of(native, "latency_ms")
    overhead = (mine / ref - 1) * 100
    data, blind_data = median_of(row, "total_data_mb"), median_of(blind, "total_data_mb")
    savings = (blind_data - data) / blind_data * 100 if blind else None
    delta = row["decomposition"]["delta_us"]
    clear = delta and delta["ci95"] and delta["ci95"]["lo"] > 0
    row["derived"] = {
        "latency_overhead_pct_vs_native_pytorch": overhead,
        "speedup_vs_semantic_blind": ratio(median_of(blind, "latency_ms"), mine),
        "speedup_vs_blind_opaque": ratio(median_of(opaque, "latency_ms"), mine),
        "data_savings_pct_vs_semantic_blind": savings,
        "semantic_efficiency_ratio": savings / overhead if clear and savings is not None else None,
        "bytes_saved_per_added_us": (blind_data - data) * MIB / delta["value"] if clear and blind else None,
        "latency_delta_ms_vs_semantic_blind": median_of(blind, "latency_ms") - mine if blind else None,
        "server_duration_delta_ms_vs_semantic_blind":
            median_of(blind, "server_duration_ms") - median_of(row, "server_duration_ms")
            if blind and "server_duration_ms" in row["aggregates"] else None}
    row["ci"]["latency_overhead_pct_vs_native_pytorch"] = (
        {"lo": delta["ci95"]["lo"] / ref / 10, "hi": delta["ci95"]["hi"] / ref / 10, "label": "within launch"}
        if delta and delta["ci95"] else None)


def manifest(rng, rows):
    blocks = []
    for _ in range(BLOCKS):
        order = [i for i, r in enumerate(rows) if r["runs"]]
        rng.shuffle(order)
        remote = [i for i in order if rows[i]["transport"] != "local"]
        for i in remote:
            order.insert(rng.randrange(len(order) + 1), {"calibrate": i})
        blocks.append(order)
    build = {"version": "0.1.0", "commit": "0123456789abcdef0123456789abcdef01234567", "compiler": "gcc 12.2.0",
             "options": "", "type": "release"}
    return {
        "host": "bench-1", "boot_id": "9d2f4a52-6d0c-4a57-9a31-0c1de2b5a9aa", "kernel": "6.1.0-18-amd64",
        "cpu": {"model": "AMD EPYC 9R14", "cores_online": 2, "governor": None, "smt": False, "numa_nodes": 1},
        "memory_bytes": 24 << 30, "gpu": None, "nic": None,
        "clock": {"cost_ns": 21.0, "resolution_ns": 1.0, "source": "tsc", "offset_ns": 0, "error_bound_ns": 0},
        "build": build, "when": "2025-11-22T12:00:00Z",
        "server": {"host": "bench-1", "boot_id": "9d2f4a52-6d0c-4a57-9a31-0c1de2b5a9aa", "build": build, "device": "cpu",
                   "threads": 1},
        "ceilings": {"device": "cpu", "bytes_per_s": 1.37e10, "flop_per_s": 1.1e11}, "seed": 42, "blocks": blocks,
        "launches": 1, "arrivals": "closed", "profile": "on", "profile_cost_us": 0.6, "injury": None,
        "argv": ["djinnbench", "sweep", "--config", "configs/smoke.yaml"], "complete": True}


def main():
    rng = random.Random(51)
    native = native_row(rng)
    rows = [native] + [remote_row(rng, name, t, native) for name in BASELINES for t in ("shm", "tcp")]
    for row in rows:
        derive(row, rows, native)
    rows.append(skipped_row())
    doc = {
        "schema": "djinnbench.result/1", "config": "configs/smoke.yaml", "generated_at": "2025-11-22T12:00:09Z",
        "experiment": {"device": "cpu", "dtype": "float32", "runs": BLOCKS, "warmup_runs": 5, "tag": "example",
                       "result_dir": "djinnbench-results", "djinn_server_address": None,
                       "reference_baseline": "native_pytorch", "blind_baseline": "semantic_blind",
                       "target_baseline": "full_djinn", "transports": ["shm", "tcp"], "seed": 42, "requests_per_block": 1},
        "manifest": manifest(rng, rows),
        "workload": {"workload": "gpt2_micro", "category": "smoke", "timestamp": "2025-11-22T12:00:09Z", "results": rows}}
    json.dump(doc, sys.stdout, indent=1, ensure_ascii=False)
    sys.stdout.write("\n")


main()
