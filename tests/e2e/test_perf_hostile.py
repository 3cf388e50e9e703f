#!/usr/bin/env python3
"""djinnbench perf --listen, and strangers at its door: garbage, silence, half a message, thousands of connections.

  test_perf_hostile.py DJINNBENCH
"""
import os
import random
import resource
import socket
import struct
import sys
import time
import unittest

import test_perf_ends as ends

GREETING = struct.pack("<8sHBBIQQ", b"djinnTCP", 1, 1, 0, 65536, 1234, 0)
HEAD = 176


def frame(payload, kind=1):
    return struct.pack("<HBBIQ", 0x4A44, kind, 0, 0, len(payload)) + payload


def control(kind, magic=0x4652455044, version=2, fields=()):
    body = struct.pack("<QII160s", magic, version, kind, b"\x1b[2J" * 40)
    body += b"".join(struct.pack("<Q", f & (2**64 - 1)) for f in fields)
    return body + bytes(2648 - len(body))


def cpu_seconds(pid):
    with open(f"/proc/{pid}/stat", encoding="ascii") as f:
        words = f.read().rsplit(")", 1)[1].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


class Strangers(ends.Case):
    def setUp(self):
        self.sockets = []
        self.addCleanup(lambda: [s.close() for s in self.sockets])

    def stranger(self, end, said=b""):
        host, port = end.url.removeprefix("tcp://").split(":")
        s = socket.create_connection((host, int(port)), timeout=10)
        self.sockets.append(s)
        try:
            s.sendall(said)
        except (ConnectionResetError, BrokenPipeError):
            pass
        return s

    def leave(self):
        while self.sockets:
            self.sockets.pop().close()

    def unhurt(self, end):
        self.assertNotIn("ended by signal", end.said())
        self.assertNotIn("Sanitizer", end.said())
        self.assertNotIn("\x1b", end.said())

    @staticmethod
    def free(pid):
        """The lowest descriptor that this process has not."""
        used = {int(fd) for fd in os.listdir(f"/proc/{pid}/fd")}
        return next(fd for fd in range(len(used) + 1) if fd not in used)

    def test_garbage_before_and_after_the_greeting(self):
        r = random.Random(5)
        with ends.Listener("--stall", "1s") as end:
            for i in range(60):
                noise = r.randbytes(r.choice((1, 15, 16, 31, 32, 33, 100, 5000)))
                said = (noise, GREETING[:r.randrange(33)], GREETING + noise, GREETING + frame(noise),
                        GREETING + frame(control(r.randrange(30), version=r.choice((1, 2, 77)))),
                        GREETING + frame(control(1, fields=[r.choice((0, 1, 2**63, -1, r.getrandbits(64)))
                                                            for _ in range(37)])),
                        GREETING + frame(noise, r.randrange(9)))[i % 7]
                self.stranger(end, said)
                self.leave()
            self.works(end.url)
            self.unhurt(end)

    def test_who_leaves_at_any_byte(self):
        hello = GREETING + frame(control(21)) + frame(control(3))  # a question of who is there
        with ends.Listener("--stall", "1s") as end:
            for at in (0, 1, 31, 32, 33, 47, 48, 49, 300, len(hello) // 2, len(hello) - 1, len(hello)):
                self.stranger(end, hello[:at])
                self.leave()
            self.works(end.url)
            self.unhurt(end)

    def test_the_silent_keep_nobody_out(self):
        with ends.Listener() as end:
            for i in range(500):
                self.stranger(end, GREETING[:i % 32])
            self.works(end.url)
            self.unhurt(end)

    def test_one_who_greets_and_falls_silent_is_given_up(self):
        with ends.Listener("--stall", "60s") as end:
            self.stranger(end, GREETING + frame(control(21))[:2000])
            start = time.monotonic()
            run = ends.perf("--connect", end.url, "--sizes", 64, "--duration", "10ms", "--repeats", 1, "--wait", 30)
            self.assertEqual(run.returncode, 0, run.stderr)
            self.assertLess(time.monotonic() - start, 20)
            self.unhurt(end)

    def test_no_descriptors_are_left(self):
        """The listener says so once, does not spin, and serves again when there are some."""
        with ends.Listener("--stall", "1s") as end:
            child = end.worker()
            soft, hard = resource.prlimit(child, resource.RLIMIT_NOFILE)
            resource.prlimit(child, resource.RLIMIT_NOFILE, (self.free(child), hard))
            self.addCleanup(self.leave)
            for _ in range(3):
                self.stranger(end, GREETING)
            ends.until(lambda: "cannot accept a connection" in end.said(), "the listener says so")
            before, start = cpu_seconds(child), time.monotonic()
            ends.until(lambda: time.monotonic() - start > 1, "a second")
            self.assertLess(cpu_seconds(child) - before, 0.5)
            self.assertEqual(end.said().count("cannot accept a connection"), 1)
            self.leave()
            resource.prlimit(child, resource.RLIMIT_NOFILE, (soft, hard))
            self.works(end.url)
            self.unhurt(end)


if __name__ == "__main__":
    ends.PROGRAM = os.path.abspath(sys.argv.pop(1))
    unittest.main()
