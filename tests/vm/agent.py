"""Programs of one machine of the lab: started, watched, signalled and ended, here or, through a connection, by the
other machine. Both are used alike: a Machine makes Processes."""
import glob
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import time

PORT = 7077
CONNECT_S = 60


class Table:
    """The programs of this machine, by number; what they say is kept in files."""

    def __init__(self):
        self.folder = tempfile.mkdtemp(prefix='agent-')
        self.numbers = itertools.count(1)
        self.running = {}

    def start(self, argv, env):
        number = next(self.numbers)
        with open(self.file(number, 'out'), 'wb') as out, open(self.file(number, 'err'), 'wb') as err:
            self.running[number] = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                                                    env={**os.environ, **env}, start_new_session=True)
        return number

    def state(self, number):
        """Exit status (None: runs), stdout, stderr, seconds of processor time while it runs."""
        p = self.running[number]
        said = [open(self.file(number, s), encoding='utf-8', errors='replace').read() for s in ('out', 'err')]
        return [p.poll(), *said, self.cpu_s(p)]

    def signal(self, number, signum):
        """To the program and what it started."""
        if self.running[number].poll() is None:
            os.killpg(self.running[number].pid, signum)

    def write(self, name, text):
        path = os.path.join(self.folder, name)
        with open(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), 'w', encoding='utf-8') as f:
            f.write(text)
        return path

    def clear(self):
        for p in self.running.values():
            if p.poll() is None:
                os.killpg(p.pid, signal.SIGKILL)
                p.wait()
        self.running = {}

    def file(self, number, stream):
        return os.path.join(self.folder, f'{number}.{stream}')

    @staticmethod
    def cpu_s(p):
        """Of the program and what it started: they are a session."""
        ticks = 0
        for path in glob.glob('/proc/[0-9]*/stat'):
            try:
                with open(path, encoding='ascii') as f:
                    fields = f.read().rsplit(')', 1)[1].split()
            except OSError:
                continue        # it has just ended
            if int(fields[3]) == p.pid:
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf('SC_CLK_TCK')


class Distant:
    """The table of the other machine."""

    def __init__(self, address):
        end = time.monotonic() + CONNECT_S
        while True:
            try:
                self.lines = socket.create_connection((address, PORT), timeout=CONNECT_S).makefile('rw')
                return
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)

    def __getattr__(self, call):
        def ask(*args):
            self.lines.write(json.dumps([call, *args]) + '\n')
            self.lines.flush()
            answer = json.loads(self.lines.readline())
            if 'error' in answer:
                raise OSError(answer['error'])
            return answer['result']
        return ask


def serve(address):
    """What the second machine does until the first one has hung up."""
    with socket.create_server((address, PORT)) as listener:
        connection, _ = listener.accept()
    table = Table()
    with connection, connection.makefile('rw') as lines:
        for line in lines:
            call, *args = json.loads(line)
            try:
                answer = {'result': getattr(table, call)(*args)}
            except OSError as e:
                answer = {'error': str(e)}
            lines.write(json.dumps(answer) + '\n')
            lines.flush()
    table.clear()


class Failed(Exception):
    """A case's finding; everything else that is raised is a fault of the case."""


class Skipped(Exception):
    """Why a case cannot run here."""


class Process:
    def __init__(self, machine, argv, number):
        self.machine, self.argv, self.number = machine, argv, number
        self.begun = time.monotonic()
        self.status, self.out, self.err, self.cpu_s = None, '', '', 0.0

    def look(self):
        self.status, self.out, self.err, self.cpu_s = self.machine.table.state(self.number)
        return self.status

    def told(self):
        return (f'{" ".join(self.argv)}\n  status {self.status} after {time.monotonic() - self.begun:.1f} s\n'
                f'  stdout: {self.out[-1500:]}\n  stderr: {self.err[-1500:]}')

    def until(self, what, true, timeout):
        """Waits for a condition; a program that ends before is a failure, as is the time."""
        end = time.monotonic() + timeout
        while True:
            ended = self.look() is not None
            if true(self):
                return
            if ended or time.monotonic() > end:
                raise Failed(f'no sign of {what} within {timeout} s: {self.told()}')
            time.sleep(0.1)

    def end(self, timeout):
        """Waits for the end; returns the exit status."""
        self.until('an end', lambda p: p.status is not None, timeout)
        return self.status

    def says(self, pattern, timeout=60):
        self.until(f'"{pattern}"', lambda p: re.search(pattern, p.out + p.err), timeout)
        return re.search(pattern, self.out + self.err)

    def works(self, seconds, timeout=60):
        """Until it has used so much more processor time: it is busy, however slow the machine is."""
        self.look()
        since = self.cpu_s
        self.until('work', lambda p: p.cpu_s > since + seconds, timeout)

    def signal(self, signum):
        self.machine.table.signal(self.number, int(signum))


class Machine:
    def __init__(self, table, address):
        self.table, self.address = table, address

    def start(self, *argv, **env):
        argv = [str(a) for a in argv]
        return Process(self, argv, self.table.start(argv, env))

    def run(self, *argv, timeout=120, status=0, **env):
        """A program that must end in time, and with this status (None: whichever)."""
        p = self.start(*argv, **env)
        p.end(timeout)
        if status is not None and p.status != status:
            raise Failed(f'exit status {p.status}, expected {status}: {p.told()}')
        return p

    def write(self, name, text):
        return self.table.write(name, text)
