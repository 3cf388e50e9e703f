#!/usr/bin/env python3
"""djinnbench verify against the fixtures, and against checkpoints made here whose results are computed here, in double
precision and straight from the papers' formulas: other widths, n_inner, storage dtypes, shards, names, heads."""
import json
import math
import os
import random
import struct
import subprocess
import sys
import tempfile

PROGRAM, FIXTURES = sys.argv[1], sys.argv[2]
failures = []


# ---- storage ----

def to_bytes(values, dtype):
    """The bytes, and the values that they really hold."""
    if dtype == "F32":
        raw = struct.pack("<%df" % len(values), *values)
        return raw, struct.unpack("<%df" % len(values), raw)
    if dtype == "F16":
        raw = struct.pack("<%de" % len(values), *values)
        return raw, struct.unpack("<%de" % len(values), raw)
    half = [struct.unpack("<I", struct.pack("<f", v))[0] >> 16 for v in values]
    return struct.pack("<%dH" % len(half), *half), [struct.unpack("<f", struct.pack("<I", h << 16))[0] for h in half]


def write_safetensors(path, tensors):
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, (shape, raw, dtype) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + data)


class Weights:
    """Random tensors; get() gives the values as stored."""

    def __init__(self, seed, dtype):
        self.random, self.dtype, self.stored, self.values = random.Random(seed), dtype, {}, {}

    def add(self, name, shape, scale, bias=0.0, prefix=""):
        n = math.prod(shape)
        raw, values = to_bytes([bias + scale * self.random.gauss(0, 1) for _ in range(n)], self.dtype)
        self.stored[prefix + name] = (shape, raw, self.dtype)
        self.values[name] = (values, shape)

    def rows(self, name):
        values, (n, k) = self.values[name]
        return [values[i * k:(i + 1) * k] for i in range(n)]

    def vector(self, name):
        return self.values[name][0]

    def save(self, folder, shards):
        names = list(self.stored)
        if shards == 1:
            write_safetensors(folder + "/model.safetensors", self.stored)
            return
        files, index = {}, {}
        for i, name in enumerate(names):
            file = "model-%05d-of-%05d.safetensors" % (i % shards + 1, shards)
            files.setdefault(file, {})[name] = self.stored[name]
            index[name] = file
        for file, tensors in files.items():
            write_safetensors(folder + "/" + file, tensors)
        with open(folder + "/model.safetensors.index.json", "w") as f:
            json.dump({"metadata": {"total_size": 1}, "weight_map": index}, f)


# ---- arithmetic ----

def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b))


def linear(rows, weight, bias):
    """weight: [out][in]."""
    return [[dot(x, w) + b for w, b in zip(weight, bias)] for x in rows]


def transpose(m):
    return [list(c) for c in zip(*m)]


def norm(rows, gamma, beta, eps):
    out = []
    for x in rows:
        mean = math.fsum(x) / len(x)
        var = math.fsum((v - mean) ** 2 for v in x) / len(x)
        out.append([(v - mean) / math.sqrt(var + eps) * g + b for v, g, b in zip(x, gamma, beta)])
    return out


def add(a, b):
    return [[x + y for x, y in zip(r, s)] for r, s in zip(a, b)]


ACTS = {
    "gelu_new": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3))),
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "relu": lambda x: max(x, 0.0),
    "silu": lambda x: x / (1 + math.exp(-x)),
}


def attention(qkv, width, heads, scale, causal):
    d, out = width // heads, [[0.0] * width for _ in qkv]
    for h in range(heads):
        for i, row in enumerate(qkv):
            q = row[h * d:(h + 1) * d]
            seen = qkv[:i + 1] if causal else qkv
            scores = [scale * dot(q, r[width + h * d:width + (h + 1) * d]) for r in seen]
            top = max(scores)
            e = [math.exp(s - top) for s in scores]
            total = math.fsum(e)
            for c in range(d):
                out[i][h * d + c] = math.fsum(w * r[2 * width + h * d + c] for w, r in zip(e, seen)) / total
    return out


# ---- GPT-2 ----

def gpt2_forward(w, c, ids):
    width, heads = c["n_embd"], c["n_head"]
    wte, wpe = w.rows("wte.weight"), w.rows("wpe.weight")
    x = [[a + b for a, b in zip(wte[t], wpe[i])] for i, t in enumerate(ids)]
    eps = c.get("layer_norm_epsilon", 1e-5)
    for l in range(c["n_layer"]):
        p = "h.%d." % l
        scale = 1 / math.sqrt(width // heads) if c.get("scale_attn_weights", True) else 1.0
        if c.get("scale_attn_by_inverse_layer_idx"):
            scale /= l + 1
        y = norm(x, w.vector(p + "ln_1.weight"), w.vector(p + "ln_1.bias"), eps)
        y = linear(y, transpose(w.rows(p + "attn.c_attn.weight")), w.vector(p + "attn.c_attn.bias"))
        y = attention(y, width, heads, scale, True)
        x = add(x, linear(y, transpose(w.rows(p + "attn.c_proj.weight")), w.vector(p + "attn.c_proj.bias")))
        y = norm(x, w.vector(p + "ln_2.weight"), w.vector(p + "ln_2.bias"), eps)
        y = linear(y, transpose(w.rows(p + "mlp.c_fc.weight")), w.vector(p + "mlp.c_fc.bias"))
        act = ACTS[c.get("activation_function", "gelu_new")]
        y = [[act(v) for v in r] for r in y]
        x = add(x, linear(y, transpose(w.rows(p + "mlp.c_proj.weight")), w.vector(p + "mlp.c_proj.bias")))
    x = norm(x, w.vector("ln_f.weight"), w.vector("ln_f.bias"), eps)
    head = wte if c.get("tie_word_embeddings", True) else w.rows("lm_head.weight")
    return linear(x, head, [0.0] * len(head))


def argmax(v):
    return max(range(len(v)), key=lambda i: (v[i], -i))


def gpt2_model(folder, seed, dtype="F32", shards=1, prefix="transformer.", lengths=(1, 5), new=3, old=False, **config):
    c = {"model_type": "gpt2", "n_embd": 12, "n_layer": 2, "n_head": 3, "n_positions": 24, "vocab_size": 29,
         "n_inner": None, **config}
    width, inner = c["n_embd"], c["n_inner"] or 4 * c["n_embd"]
    w = Weights(seed, dtype)
    w.add("wte.weight", [c["vocab_size"], width], 0.5, prefix=prefix)
    w.add("wpe.weight", [c["n_positions"], width], 0.5, prefix=prefix)
    for l in range(c["n_layer"]):
        p = prefix + "h.%d." % l
        for name, shape, scale, bias in [
                ("ln_1.weight", [width], .1, 1), ("ln_1.bias", [width], .1, 0),
                ("attn.c_attn.weight", [width, 3 * width], .4, 0), ("attn.c_attn.bias", [3 * width], .1, 0),
                ("attn.c_proj.weight", [width, width], .4, 0), ("attn.c_proj.bias", [width], .1, 0),
                ("ln_2.weight", [width], .1, 1), ("ln_2.bias", [width], .1, 0),
                ("mlp.c_fc.weight", [width, inner], .4, 0), ("mlp.c_fc.bias", [inner], .1, 0),
                ("mlp.c_proj.weight", [inner, width], .4, 0), ("mlp.c_proj.bias", [width], .1, 0)]:
            w.add("h.%d." % l + name, shape, scale, bias, prefix)
        # What older files hold besides, in a dtype that is not read.
        w.stored[p + "attn.bias"] = ([1, 1, 2, 2], b"\1\0\1\1", "U8")
    w.add("ln_f.weight", [width], .1, 1, prefix)
    w.add("ln_f.bias", [width], .1, 0, prefix)
    if not c.get("tie_word_embeddings", True):
        w.add("lm_head.weight", [c["vocab_size"], width], .5)
    cases, r = [], random.Random(seed + 1)
    for length in lengths:
        ids = [r.randrange(c["vocab_size"]) for _ in range(length)]
        logits = gpt2_forward(w, c, ids)
        history, greedy, margins, last = list(ids), [], [], logits[-1]
        for step in range(new):
            best = sorted(last, reverse=True)[:2]
            margins.append(best[0] - best[1])
            greedy.append(argmax(last))
            history.append(greedy[-1])
            if step + 1 < new:
                last = gpt2_forward(w, c, history)[-1]
        cases.append({"input_ids": ids, "last_logits_first": len(logits[-1]), "last_logits": logits[-1],
                      "first_logits_row": logits[0][:8], "argmax_per_position": [argmax(v) for v in logits],
                      "greedy_tokens": greedy, "greedy_top2_margin": margins})
    os.mkdir(folder)
    w.save(folder, shards)
    if old:
        for new_key, old_key in (("n_embd", "hidden_size"), ("n_layer", "num_hidden_layers"),
                                 ("n_head", "num_attention_heads"), ("n_positions", "n_ctx")):
            c[old_key] = c.pop(new_key)
    with open(folder + "/config.json", "w") as f:
        json.dump(c, f)
    with open(folder + "/reference.json", "w") as f:
        json.dump({"task": "causal_lm", "cases": cases}, f)


# ---- encoder ----

def encoder_model(folder, seed, dtype="F32", shards=1, prefix="", shape=(2, 5), final=False, **config):
    c = {"model_type": "torch_transformer_encoder", "hidden_size": 12, "num_layers": 2, "num_heads": 3, "ff_size": 20,
         "activation": "relu", "norm_first": False, "layer_norm_eps": 1e-5, **config}
    width, ff, eps, act = c["hidden_size"], c["ff_size"], c["layer_norm_eps"], ACTS[c["activation"]]
    w = Weights(seed, dtype)
    for l in range(c["num_layers"]):
        for name, s, scale, bias in [
                ("self_attn.in_proj_weight", [3 * width, width], .3, 0), ("self_attn.in_proj_bias", [3 * width], .1, 0),
                ("self_attn.out_proj.weight", [width, width], .3, 0), ("self_attn.out_proj.bias", [width], .1, 0),
                ("linear1.weight", [ff, width], .3, 0), ("linear1.bias", [ff], .1, 0),
                ("linear2.weight", [width, ff], .3, 0), ("linear2.bias", [width], .1, 0),
                ("norm1.weight", [width], .1, 1), ("norm1.bias", [width], .1, 0),
                ("norm2.weight", [width], .1, 1), ("norm2.bias", [width], .1, 0)]:
            w.add("layers.%d." % l + name, s, scale, bias, prefix)
    if final:
        w.add("norm.weight", [width], .1, 1, prefix)
        w.add("norm.bias", [width], .1, 0, prefix)
    flat, result, r = [], [], random.Random(seed + 1)
    for _ in range(shape[0]):
        x = [[r.gauss(0, 1) for _ in range(width)] for _ in range(shape[1])]
        x = [[struct.unpack("<f", struct.pack("<f", v))[0] for v in row] for row in x]
        flat += [v for row in x for v in row]
        for l in range(c["num_layers"]):
            p = "layers.%d." % l

            def part(kind, y):
                if kind == 1:
                    y = linear(y, w.rows(p + "self_attn.in_proj_weight"), w.vector(p + "self_attn.in_proj_bias"))
                    y = attention(y, width, c["num_heads"], 1 / math.sqrt(width // c["num_heads"]), False)
                    return linear(y, w.rows(p + "self_attn.out_proj.weight"), w.vector(p + "self_attn.out_proj.bias"))
                y = linear(y, w.rows(p + "linear1.weight"), w.vector(p + "linear1.bias"))
                return linear([[act(v) for v in row] for row in y], w.rows(p + "linear2.weight"),
                              w.vector(p + "linear2.bias"))

            for kind in (1, 2):
                def ln(y):
                    return norm(y, w.vector(p + "norm%d.weight" % kind), w.vector(p + "norm%d.bias" % kind), eps)
                x = add(x, part(kind, ln(x))) if c["norm_first"] else ln(add(x, part(kind, x)))
        if final:
            x = norm(x, w.vector("norm.weight"), w.vector("norm.bias"), eps)
        result += [v for row in x for v in row]
    os.mkdir(folder)
    w.save(folder, shards)
    with open(folder + "/config.json", "w") as f:
        json.dump(c, f)
    with open(folder + "/reference.json", "w") as f:
        json.dump({"task": "encoder", "cases": [{"shape": [*shape, width], "input": flat, "output": result}]}, f)


# ---- checks ----

def verify(folder, device):
    run = subprocess.run([PROGRAM, "verify", "--model", folder, "--device", device, "--threads", "1"],
                         capture_output=True, text=True, timeout=300)
    return run.returncode, run.stdout, run.stderr


def expect(condition, what):
    if not condition:
        failures.append(what)
        print("FAILED:", what)


def expect_pass(folder, device):
    name = "%s on %s" % (os.path.basename(folder), device)
    status, out, err = verify(folder, device)
    expect(status == 0, "%s: status %d %s %s" % (name, status, err, out[-1500:]))
    if status != 0:
        return
    result = json.loads(out)
    causal = result["task"] == "causal_lm"
    worst = max(c["rel_l2"] for c in result["cases"])
    expect(worst <= 1e-5, "%s: rel_l2 %g" % (name, worst))
    expect(all("max_abs_err" in c for c in result["cases"]), name + ": max_abs_err")
    expect(not causal or all(c["greedy_match"] for c in result["cases"]), name + ": greedy_match")
    print("%-40s rel_l2 %.2g" % (name, worst))


def edit(folder, change):
    with open(folder + "/reference.json") as f:
        reference = json.load(f)
    change(reference)
    with open(folder + "/reference.json", "w") as f:
        json.dump(reference, f)


def expect_fail(folder, status, *words):
    have, out, err = verify(folder, "cpu")
    name = os.path.basename(folder)
    expect(have == status, "%s: status %d, expected %d: %s" % (name, have, status, err))
    for word in words:
        expect(word in out + err, "%s: \"%s\" is not in: %s" % (name, word, err or out))


def main():
    with tempfile.TemporaryDirectory() as tmp:
        made = [
            ("wide", dict(n_embd=100, n_head=5, n_layer=1, vocab_size=131)),
            ("one-head", dict(n_embd=7, n_head=1, n_inner=3)),
            ("n-inner", dict(n_inner=33, activation_function="gelu")),
            ("old-names", dict(old=True, activation_function="relu", layer_norm_epsilon=1e-3)),
            ("fp16", dict(dtype="F16", prefix="")),
            ("bf16-sharded", dict(dtype="BF16", shards=3)),
            ("fp16-untied", dict(dtype="F16", tie_word_embeddings=False, shards=2)),
            ("untied-bare", dict(prefix="", tie_word_embeddings=False, activation_function="silu")),
            ("scaled", dict(scale_attn_by_inverse_layer_idx=True, n_layer=3)),
            ("unscaled", dict(scale_attn_weights=False)),
            ("full-context", dict(lengths=(24, 1), new=1)),
            ("no-greedy", dict(new=0)),
        ]
        for i, (name, options) in enumerate(made):
            gpt2_model(tmp + "/gpt2-" + name, 100 + i, **options)
        encoders = [
            ("plain", {}),
            ("odd", dict(hidden_size=35, num_heads=5, ff_size=17, num_layers=1, shape=(3, 4))),
            ("one-row", dict(shape=(1, 1))),
            ("gelu-pre", dict(activation="gelu", norm_first=True, final=True)),
            ("bf16", dict(dtype="BF16", shards=2, prefix="encoder.", layer_norm_eps=0.1)),
            ("fp16", dict(dtype="F16")),
        ]
        for i, (name, options) in enumerate(encoders):
            encoder_model(tmp + "/encoder-" + name, 200 + i, **options)
        folders = [FIXTURES + "/" + n for n in ("gpt2-micro", "tiny-gpt2", "encoder-micro")]
        folders += sorted(tmp + "/" + n for n in os.listdir(tmp))
        for folder in folders:
            for device in ("cpu", "reference"):
                if device == "cpu" or not folder.endswith("tiny-gpt2"):
                    expect_pass(folder, device)

        # It must be able to fail.
        def wrong_logit(r):
            r["cases"][1]["last_logits"][3] += 0.01

        def wrong_token(r):
            r["cases"][1]["greedy_tokens"][1] = (r["cases"][1]["greedy_tokens"][1] + 1) % 29

        def wrong_argmax(r):
            r["cases"][1]["argmax_per_position"][2] = (r["cases"][1]["argmax_per_position"][2] + 1) % 29

        def wrong_output(r):
            r["cases"][0]["output"][5] += 0.01

        def bad_id(r):
            r["cases"][0]["input_ids"][0] = 29

        def no_cases(r):
            r["cases"] = []

        def other_task(r):
            r["task"] = "poetry"

        def short_input(r):
            r["cases"][0]["input"].pop()

        broken = [("wrong-logit", gpt2_model, wrong_logit, 1, ['"pass": false']),
                  ("wrong-token", gpt2_model, wrong_token, 1, ['"greedy_match": false']),
                  ("wrong-argmax", gpt2_model, wrong_argmax, 1, ['"argmax_match": false']),
                  ("wrong-output", encoder_model, wrong_output, 1, ['"pass": false']),
                  ("bad-id", gpt2_model, bad_id, 2, ["input_ids"]),
                  ("no-cases", gpt2_model, no_cases, 2, ["cases"]),
                  ("other-task", gpt2_model, other_task, 2, ["poetry"]),
                  ("short-input", encoder_model, short_input, 2, ["shape"])]
        for name, make, change, status, words in broken:
            make(tmp + "/" + name, 7)
            edit(tmp + "/" + name, change)
            expect_fail(tmp + "/" + name, status, *words)

        gpt2_model(tmp + "/cut", 7)
        with open(tmp + "/cut/model.safetensors", "rb+") as f:
            f.truncate(os.path.getsize(tmp + "/cut/model.safetensors") - 5)
        expect_fail(tmp + "/cut", 2, "ln_f.bias", "truncated")
        gpt2_model(tmp + "/unknown-act", 7, activation_function="gelu")
        with open(tmp + "/unknown-act/config.json") as f:
            config = json.load(f)
        config["activation_function"] = "snake"
        with open(tmp + "/unknown-act/config.json", "w") as f:
            json.dump(config, f)
        expect_fail(tmp + "/unknown-act", 2, "snake")
        expect_fail(FIXTURES + "/resnet-micro", 2, "needs the ResNet builder")
        expect_fail(FIXTURES + "/llama-micro", 2, "llama")
        expect_fail(tmp + "/nothing", 2, "nothing")
        status, _, err = verify(FIXTURES + "/gpt2-micro", "abacus")
        expect(status == 2 and "abacus" in err, "unknown device: %d %s" % (status, err))
        status, _, err = verify(FIXTURES + "/gpt2-micro", "cuda")
        expect(status == 3 and "cuda" in err, "device that is not here: %d %s" % (status, err))
    sys.exit(1 if failures else 0)


main()
