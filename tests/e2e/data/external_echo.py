#!/usr/bin/env python3
"""The smallest external baseline: gives back what it is given."""
import json
import sys
import time

for line in sys.stdin:
    m = json.loads(line)
    if m["type"] == "bye":
        break
    start = time.perf_counter()
    output = list(m.get("input", []))
    ms = 1e3 * (time.perf_counter() - start)
    answers = {
        "hello": {"type": "hello", "name": "echo"},
        "prepare": {"type": "ready", "device": "cpython", "threads": 1}
                   if m.get("implementation") == "echo" else {"type": "error", "text": "nothing but echo"},
        "check": {"type": "check", "output": output},
        "run": {"type": "result", "output": output, "latency_ms": ms},
    }
    print(json.dumps(answers[m["type"]]), flush=True)
