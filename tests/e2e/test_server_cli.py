#!/usr/bin/env python3
"""djinnbench serve as a process: what it prints, writes, and exits with."""
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest

PROGRAM = sys.argv.pop(1)
PATIENCE = 60


def serve(*args):
    env = {k: v for k, v in os.environ.items() if k not in ('DJINN_KEY_FILE', 'DJINN_LOG')}
    return subprocess.Popen([PROGRAM, 'serve', '--device', 'reference', *args], env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def run(*args):
    p = serve(*args)
    try:
        out, err = p.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        p.kill()
        p.communicate()
        raise
    return p.returncode, out, err


class Serve(unittest.TestCase):
    def setUp(self):
        self.dir = tempfile.TemporaryDirectory()
        self.ready = os.path.join(self.dir.name, 'ready')

    def tearDown(self):
        self.dir.cleanup()

    def wait_ready(self, process):
        end = time.monotonic() + PATIENCE
        while not os.path.exists(self.ready):
            self.assertIsNone(process.poll(), 'it ended before it was ready')
            self.assertLess(time.monotonic(), end, 'it was never ready')
            time.sleep(0.01)
        with open(self.ready, encoding='utf-8') as f:
            return f.read().splitlines()

    def stop(self, process, sig):
        process.send_signal(sig)
        out, err = process.communicate(timeout=PATIENCE)
        self.assertEqual(process.returncode, 0, err)
        self.assertEqual(out, '')
        return err

    def test_listens_and_ends(self):
        for sig in (signal.SIGTERM, signal.SIGINT):
            name = f'shm://djinn-cli-{os.getpid()}'
            p = serve('--listen', 'tcp://127.0.0.1:0', name, '--ready-file', self.ready)
            urls = self.wait_ready(p)
            self.assertEqual(len(urls), 2)
            self.assertRegex(urls[0], r'^tcp://127\.0\.0\.1:[1-9]\d*$')
            self.assertEqual(urls[1], name)
            port = int(urls[0].rsplit(':', 1)[1])
            for junk in (b'GET / HTTP/1.0\r\n\r\n', os.urandom(5000), b''):
                with socket.create_connection(('127.0.0.1', port), timeout=PATIENCE) as s:
                    s.sendall(junk)
            # Listening twice on one port: the second says so and leaves the first alone.
            code, _, err = run('--listen', urls[0])
            self.assertEqual(code, 3, err)
            self.assertIn(str(port), err)
            self.assertIn('listening on ' + urls[0], self.stop(p, sig))
            os.unlink(self.ready)

    def test_few_descriptors(self):
        """Sessions are fitted to what may be opened, and it says so; more are taken where more are allowed."""
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        for limits, room in (((200, 200), 36), ((200, hard), 1100)):
            with self.subTest(limits=limits):
                p = subprocess.Popen(['prlimit', f'--nofile={limits[0]}:{limits[1]}', PROGRAM, 'serve', '--device',
                                      'reference', '--listen', 'tcp://127.0.0.1:0', '--ready-file', self.ready],
                                     stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                self.wait_ready(p)
                os.unlink(self.ready)
                said = re.search(r'room for (\d+) sessions at a time only.*ulimit -n 2328', self.stop(p, signal.SIGTERM))
                self.assertEqual(int(said.group(1)) if said else 1100, room)

    def test_host_and_port(self):
        p = serve('--host', '127.0.0.1', '--port', '0', '--ready-file', self.ready)
        self.assertRegex(self.wait_ready(p)[0], r'^tcp://127\.0\.0\.1:\d+$')
        self.stop(p, signal.SIGTERM)

    def test_idles_without_spinning(self):
        p = serve('--listen', 'tcp://127.0.0.1:0', '--ready-file', self.ready)
        self.wait_ready(p)
        ticks = os.sysconf('SC_CLK_TCK')

        def cpu():
            with open(f'/proc/{p.pid}/stat', encoding='ascii') as f:
                return sum(int(x) for x in f.read().rsplit(')', 1)[1].split()[11:13]) / ticks

        time.sleep(0.2)
        before = cpu()
        time.sleep(1.0)
        self.assertLess(cpu() - before, 0.2)
        self.stop(p, signal.SIGTERM)

    def test_wrong_use(self):
        key = os.path.join(self.dir.name, 'key')
        with open(key, 'wb') as f:
            f.write(os.urandom(64))
        os.chmod(key, 0o644)
        for args, word in ((['--listen', 'nonsense://x'], 'nonsense'),
                           (['--listen', 'tcp://0.0.0.0:0'], '--key-file'),
                           (['--listen', 'tcp://127.0.0.1:0', '--key-file', key], key),
                           (['--listen', 'tcp://127.0.0.1:0', '--threads', '-3'], 'threads'),
                           (['--port', '70000'], 'port'),
                           (['--lisen', 'tcp://127.0.0.1:0'], 'lisen')):
            code, out, err = run(*args)
            self.assertEqual((code, out), (2, ''), f'{args}: {err}')
            self.assertIn(word, err)

    def test_environment(self):
        for args, word in ((['--device', 'cuda'], 'cuda'), (['--gpu', '0'], 'cuda'),
                           (['--device', 'reference', '--listen', 'tcp://192.0.2.1:1', '--insecure'], '192.0.2.1')):
            p = subprocess.run([PROGRAM, 'serve', *args], capture_output=True, text=True, timeout=PATIENCE, check=False)
            self.assertEqual((p.returncode, p.stdout), (3, ''), p.stderr)
            self.assertIn(word, p.stderr)


if __name__ == '__main__':
    unittest.main()
