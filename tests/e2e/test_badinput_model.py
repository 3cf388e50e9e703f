#!/usr/bin/env python3
"""Checkpoints that are cut off, lie, or are not there: refused with the tensor's or the file's name, never a crash.

  test_badinput_model.py PROGRAM ROOT [Class]"""
import struct

from lib import *


def split(raw):
    n, = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8:8 + n]), raw[8 + n:]


def join(header, data):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor_of(header):
    """One that the model needs."""
    return next(k for k in header if k.endswith("h.0.attn.c_attn.weight"))


def change(key, value):
    def lie(raw):
        header, data = split(raw)
        name = tensor_of(header)
        header[name][key] = value(header[name][key]) if callable(value) else value
        return join(header, data), [name.replace("transformer.", "")]
    return lie


def overlap(raw):
    header, data = split(raw)
    name = tensor_of(header)
    other = next(k for k in header if k not in ("__metadata__", name))
    begin = header[other]["data_offsets"][0]
    size = header[name]["data_offsets"][1] - header[name]["data_offsets"][0]
    header[name]["data_offsets"] = [begin, begin + size]
    return join(header, data), []


def drop(raw):
    header, data = split(raw)
    name = tensor_of(header)
    header["something_else"] = header.pop(name)
    return join(header, data), ["c_attn.weight"]


def poison(raw):
    """A NaN in the weights: no result could be compared with anything."""
    header, data = split(raw)
    name = tensor_of(header)
    at = header[name]["data_offsets"][0]
    return join(header, data[:at] + struct.pack("<f", float("nan")) + data[at + 4:]), ["c_attn.weight"]


LIES = {
    "cut in the data": lambda raw: (raw[:len(raw) * 2 // 3], []),
    "cut in the header": lambda raw: (raw[:200], []),
    "cut in the length": lambda raw: (raw[:5], []),
    "empty": lambda raw: (b"", []),
    "a header of 2^63 bytes": lambda raw: (struct.pack("<Q", 1 << 63) + raw[8:], []),
    "a header longer than the file": lambda raw: (struct.pack("<Q", len(raw)) + raw[8:], []),
    "a header that is no JSON": lambda raw: (struct.pack("<Q", 16) + b"{\"a\": [1, 2, 3,,", []),
    "a header that is a list": lambda raw: (struct.pack("<Q", 2) + b"[]", []),
    "random bytes": lambda raw: (os.urandom(4096), []),
    "offsets past the end": change("data_offsets", lambda v: [v[0] + (1 << 40), v[1] + (1 << 40)]),
    "offsets backwards": change("data_offsets", lambda v: [v[1], v[0]]),
    "negative offsets": change("data_offsets", [-8, 0]),
    "huge offsets": change("data_offsets", [0, 1 << 64]),
    "a shape that overflows": change("shape", [1 << 40, 1 << 40]),
    "a negative shape": change("shape", lambda v: [-v[0], v[1]]),
    "a shape larger than the bytes": change("shape", lambda v: [v[0] * 2, v[1]]),
    "a shape that is a text": change("shape", "big"),
    "a dtype that is none": change("dtype", "F99"),
    "a dtype of other size": change("dtype", "F16"),
    "overlapping tensors": overlap,
    "a tensor that is missing": drop,
    "a weight that is no number": poison,
}


class Checkpoints(Case):
    def model(self, change_file=None, **config_changes):
        """A copy of gpt2-micro under root/m, changed."""
        folder = os.path.join(self.dir, "root", "m")
        shutil.rmtree(folder, True)
        shutil.copytree(os.path.join(FIXTURES, "gpt2-micro"), folder)
        for d, _, files in os.walk(folder):
            for f in files:
                os.chmod(os.path.join(d, f), 0o644)
        words = []
        if change_file:
            path = os.path.join(folder, "model.safetensors")
            with open(path, "rb") as f:
                raw, words = change_file(f.read())
            with open(path, "wb") as f:
                f.write(raw)
        if config_changes:
            path = os.path.join(folder, "config.json")
            with open(path) as f:
                c = json.load(f)
            c.update(config_changes)
            with open(path, "w") as f:
                json.dump(c, f)
        return folder, words

    def sweep_of(self):
        shutil.rmtree(self.results, True)
        text = config([causal("w", model="m", prompt_length=8, new_tokens=2)], [NATIVE, FULL], runs=1,
                      transports=["shm"])
        return self.run_program("sweep", "--config", self.write("c.yaml", text), "--output-dir", self.results,
                                "--model-root", os.path.join(self.dir, "root"))

    def assert_no_crash(self, r):
        self.assertGreater(r.status, 0, r.told())
        self.assertLess(r.status, 4, r.told())
        self.assertNotRegex(r.err, "Sanitizer|BUG")

    def test_verify_refuses_each_lie(self):
        for name, lie in LIES.items():
            with self.subTest(name=name):
                folder, words = self.model(lie)
                r = self.run_program("verify", "--model", folder)
                self.assert_no_crash(r)
                self.assert_says(r.err, *words)
                self.assertLess(r.seconds, 20 * SLOW)

    def test_sweep_refuses_each_lie(self):
        """No row is VALID, every row has a reason, and the server has survived."""
        for name in ("cut in the data", "a header of 2^63 bytes", "offsets past the end", "a shape that overflows",
                     "a tensor that is missing", "a weight that is no number"):
            with self.subTest(name=name):
                _, words = self.model(LIES[name])
                r = self.sweep_of()
                self.assert_no_crash(r)
                self.assertEqual(r.status, 1, r.told())
                for key, (verdict, reason) in r.verdicts().items():
                    self.assertEqual(verdict, "INVALID", key)
                    self.assert_says(reason, *words)
                self.assert_nothing_left()

    def test_configs_that_do_not_fit(self):
        for changes in ({"n_embd": 65}, {"n_head": 0}, {"n_layer": 10 ** 9}, {"vocab_size": -1}, {"n_positions": 4},
                        {"n_embd": "wide"}, {"model_type": "gpt9"}, {"n_layer": 4}, {"activation_function": "sine"}):
            with self.subTest(changes=changes):
                self.model(**changes)
                r = self.sweep_of()
                self.assert_no_crash(r)
                self.assertEqual(r.status, 1, r.told())
                for verdict, reason in r.verdicts().values():
                    self.assertIn(verdict, ("INVALID", "SKIPPED"))
                    self.assertTrue(reason)

    def test_a_model_without_weights_is_an_error(self):
        folder, _ = self.model()
        os.unlink(os.path.join(folder, "model.safetensors"))
        r = self.sweep_of()
        self.assertEqual(r.status, 1, r.told())
        self.assert_says(r.err, "model.safetensors")

    def test_names_do_not_leave_their_root(self):
        for name in ("../../etc", "/etc/passwd", "..", "a/../../b", "m/../m"):
            with self.subTest(name=name):
                shutil.rmtree(self.results, True)
                text = config([causal("w", model=name, prompt_length=8, new_tokens=2)], [NATIVE], runs=1,
                              transports=["shm"])
                r = self.sweep(text)
                self.assertIn(r.status, (1, 2), r.told())
                self.assertNotIn("VALID", {v[0] for v in r.verdicts().values()})

    def test_synthetic_weights_are_said_and_can_be_forbidden(self):
        text = config([causal("w", model="sshleifer/tiny-gpt2", prompt_length=8, new_tokens=2)], [NATIVE, FULL],
                      transports=["shm"])
        r = self.run_program("sweep", "--config", self.write("c.yaml", text), "--output-dir", self.results)
        self.assertEqual({row["weights"] for row in r.rows("w").values()}, {"synthetic"})
        self.assert_no_invalid(r)
        shutil.rmtree(self.results)
        r = self.run_program("sweep", "--require-weights", "--config", self.write("c.yaml", text),
                             "--output-dir", self.results)
        self.assertEqual(r.status, 1, r.told())
        self.assert_says(r.err, "--require-weights forbids")


if __name__ == "__main__":
    main()
