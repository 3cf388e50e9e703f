#!/usr/bin/env python3
"""An external baseline: GPT-2 from a checkpoint in plain Python, in double precision. See docs/external.md.

Speaks djinnbench.external/1: a JSON object per line on standard input, one per line back on standard output."""
import array
import json
import math
import os
import struct
import sys
import time
from operator import mul

PROTOCOL = "djinnbench.external/1"


class Refusal(Exception):
    """What this program does not do; the row is skipped with this text."""


def dot(a, b):
    return sum(map(mul, a, b))


def add(a, b):
    return [x + y for x, y in zip(a, b)]


class Gpt2:
    def __init__(self, path):
        with open(os.path.join(path, "config.json")) as f:
            config = json.load(f)
        self.heads, self.layers = config["n_head"], config["n_layer"]
        self.eps = config["layer_norm_epsilon"]
        self.tensors = {}
        self.load(os.path.join(path, "model.safetensors"))
        # The checkpoint has [in][out]; a product then is a dot with a column.
        for name in [n for n in self.tensors if n.startswith("h.") and isinstance(self.tensors[n][0], list)]:
            self.tensors[name] = [list(column) for column in zip(*self.tensors[name])]
        self.reset()

    def load(self, path):
        with open(path, "rb") as f:
            header = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
            data = f.read()
        for name, t in header.items():
            if name == "__metadata__":
                continue
            if t["dtype"] != "F32":
                raise Refusal("weights of type %s" % t["dtype"])
            flat = array.array("f", data[t["data_offsets"][0]:t["data_offsets"][1]]).tolist()
            if len(t["shape"]) == 2:
                n = t["shape"][1]
                flat = [flat[i:i + n] for i in range(0, len(flat), n)]
            self.tensors[name.removeprefix("transformer.")] = flat

    def reset(self):
        """Forgets all sequences; a cache is made again for each that comes."""
        self.caches = {}

    def linear(self, x, name):
        return [dot(x, column) + b for column, b in zip(self.tensors[name + ".weight"], self.tensors[name + ".bias"])]

    def norm(self, x, name):
        mean = sum(x) / len(x)
        centred = [v - mean for v in x]
        scale = 1 / math.sqrt(dot(centred, centred) / len(x) + self.eps)
        return [v * scale * w + b for v, w, b in
                zip(centred, self.tensors[name + ".weight"], self.tensors[name + ".bias"])]

    def attend(self, q, keys, values):
        size, out = len(q) // self.heads, []
        for h in range(0, len(q), size):
            scores = [dot(q[h:h + size], k[h:h + size]) / math.sqrt(size) for k in keys]
            top = max(scores)
            weights = [math.exp(s - top) for s in scores]
            total = sum(weights)
            out += [dot(weights, [v[h + i] for v in values]) / total for i in range(size)]
        return out

    def block(self, x, i, cache):
        n = len(x)
        qkv = self.linear(self.norm(x, "h.%d.ln_1" % i), "h.%d.attn.c_attn" % i)
        cache[i][0].append(qkv[n:2 * n])
        cache[i][1].append(qkv[2 * n:])
        x = add(x, self.linear(self.attend(qkv[:n], *cache[i]), "h.%d.attn.c_proj" % i))
        up = self.linear(self.norm(x, "h.%d.ln_2" % i), "h.%d.mlp.c_fc" % i)
        gelu = [0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v ** 3))) for v in up]
        return add(x, self.linear(gelu, "h.%d.mlp.c_proj" % i))

    def logits(self, sequence, ids):
        """Of the last position; what of ids the cache holds already is not computed again."""
        cache = self.caches.setdefault(sequence, [([], []) for _ in range(self.layers)])
        x = None
        for position in range(len(cache[0][0]), len(ids)):
            x = add(self.tensors["wte.weight"][ids[position]], self.tensors["wpe.weight"][position])
            for i in range(self.layers):
                x = self.block(x, i, cache)
        x = self.norm(x, "ln_f")
        return [dot(x, row) for row in self.tensors["wte.weight"]]

    def generate(self, input_ids, new_tokens, forced=None):
        """[steps][batch] tokens and [steps][batch][vocab] logits; forced: take these tokens instead of the largest."""
        ids, tokens, logits = [list(s) for s in input_ids], [], []
        for step in range(max(new_tokens, 1)):
            logits.append([self.logits(b, s) for b, s in enumerate(ids)])
            tokens.append(forced[step] if forced else [max(range(len(v)), key=v.__getitem__) for v in logits[-1]])
            for s, token in zip(ids, tokens[-1]):
                s.append(token)
        return tokens, logits


class Program:
    model = None

    def hello(self, m):
        if m["protocol"] != PROTOCOL:
            raise Refusal("it speaks %s only" % PROTOCOL)
        return {"type": "hello", "name": "plain-python-gpt2", "version": "1"}

    def prepare(self, m):
        if m["implementation"] != "hf_causal_lm":
            raise Refusal("no %s here" % m["implementation"])
        if m["weights"] != "checkpoint":
            raise Refusal("it cannot make %s weights" % m["weights"])
        self.model = Gpt2(m["model_path"])
        return {"type": "ready", "device": "cpython", "threads": 1}

    def start_turn(self, m):
        if m["turn"] == 0:
            self.model.reset()

    def check(self, m):
        self.start_turn(m)
        return {"type": "check", "logits": self.model.generate(m["input_ids"], m["new_tokens"], m["forced"])[1]}

    def run(self, m):
        start = time.perf_counter()
        self.start_turn(m)
        tokens, logits = self.model.generate(m["input_ids"], m["new_tokens"])
        ms = 1e3 * (time.perf_counter() - start)
        answer = {"tokens": tokens} if m["new_tokens"] else {"logits": logits}
        return dict(answer, type="result", latency_ms=ms)


def main(program):
    for line in sys.stdin:
        message = json.loads(line)
        if message["type"] == "bye":
            break
        try:
            answer = getattr(program, message["type"])(message)
        except Refusal as refusal:
            answer = {"type": "error", "text": str(refusal)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(Program())
