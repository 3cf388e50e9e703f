#!/usr/bin/env python3
"""External baselines that go wrong, each in its own way: external_faults.py FAULT."""
import os
import sys

from external_gpt2 import Program, main


class WrongLogits(Program):
    def check(self, m):
        answer = super().check(m)
        answer["logits"][-1][0][7] += 1
        return answer


class WrongTokens(Program):
    """Checks well and then runs something else."""
    def run(self, m):
        answer = super().run(m)
        answer["tokens"][-1][0] ^= 1
        return answer


class Forgets(Program):
    """Answers with other tokens from the third block on, when it is asked the same again."""
    asked = {}

    def run(self, m):
        answer = super().run(m)
        times = self.asked[m["block"]] = self.asked.get(m["block"], 0) + 1
        if m["block"] == 2 and times > 1:
            answer["tokens"][0][0] ^= 1
        return answer


class Impossible(Program):
    def run(self, m):
        return dict(super().run(m), latency_ms=3600e3)


class Dies(Program):
    def run(self, m):
        if m["block"] == 1:
            os._exit(3)
        return super().run(m)


class Hangs(Program):
    """Says so, and waits for a line that does not come, of a pipe of its own."""
    def run(self, m):
        print("hanging", file=sys.stderr, flush=True)
        os.read(os.pipe()[0], 1)


class Talks(Program):
    def check(self, m):
        print("loading weights... done")
        return super().check(m)


class Confused(Program):
    def run(self, m):
        return {"type": "error", "text": "out of\x1b[31m memory"}


FAULTS = {c.__name__.lower(): c for c in (WrongLogits, WrongTokens, Forgets, Impossible, Dies, Hangs, Talks, Confused)}

if __name__ == "__main__":
    main(FAULTS[sys.argv[1]]())
