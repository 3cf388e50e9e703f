#!/usr/bin/env python3
"""The stages of tools/check. Each builds in build-check/STAGE and runs its tests by `meson test`; a stage that fails does
not keep the next ones from running."""
import argparse
import collections
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BUILD = os.path.join(ROOT, 'build-check')
OPTIONAL_OFF = ['-Drdma=disabled', '-Ddpdk=disabled', '-Dcuda=disabled']

# The thread sanitizer sees what has threads: transports and server.
THREADED = r'/tests/((unit|conform)/(transport|protocol|server)/|e2e/test_server)'
# A sanitizer's finding must fail the test, also where the program would have gone on.
SANITIZER_ENV = {
    'ASAN_OPTIONS': 'detect_stack_use_after_return=1:strict_string_checks=1',
    'UBSAN_OPTIONS': 'halt_on_error=1:print_stacktrace=1',
    'TSAN_OPTIONS': 'halt_on_error=1:second_deadlock_stack=1',
}

STAGES = [
    # name, what, compiler, meson options, which tests: all, short (not the suite 'long'), units (of the short ones unit
    # and conformance), threaded, none, lab (those of tests/vm, with the build of the stage before)
    ('gcc', 'gcc, every test', 'gcc', ['-Dbuildtype=debugoptimized'], 'all'),
    ('vm', 'virtual machines with RDMA (Soft-RoCE)', 'gcc', ['-Dbuildtype=debugoptimized'], 'lab'),
    ('clang', 'clang, units and conformance', 'clang', ['-Dbuildtype=debugoptimized'], 'units'),
    ('address', 'address and undefined-behaviour sanitizers', 'gcc',
     ['-Dbuildtype=debugoptimized', '-Db_sanitize=address,undefined', '-Db_lundef=false'], 'short'),
    ('thread', 'thread sanitizer, transports and server', 'gcc',
     ['-Dbuildtype=debugoptimized', '-Db_sanitize=thread', '-Db_lundef=false'], 'threaded'),
    ('transport-only', 'no model code', 'gcc', ['-Dbuildtype=debugoptimized', '-Dtransport_only=true'], 'short'),
    ('release', 'release, every optional part disabled', 'gcc', ['-Dbuildtype=release', *OPTIONAL_OFF, '-Dtests=false'],
     'none'),
]
SHORT = {'short': ['--no-suite', 'long'], 'units': ['--no-suite', 'long', '--suite', 'unit', '--suite', 'conform']}
LAB_BUILD = 'gcc'       # whose programs run in the lab
QUICK = ['gcc']


class Count:
    def __init__(self):
        self.passed = self.failed = self.skipped = 0
        self.failures, self.reasons = [], collections.defaultdict(collections.Counter)

    def fail(self, note):
        self.failed += 1
        self.failures.append('failed: ' + note)

    def skip(self, stage, reason):
        self.skipped += 1
        self.reasons[reason][stage] += 1

    def notes(self):
        skipped = [f'skipped: {reason}: ' + ', '.join(f'{stage} {n}' for stage, n in stages.items())
                   for reason, stages in self.reasons.items()]
        return skipped + self.failures


def say(text):
    print('== check: ' + text, flush=True)


def run(command, **env):
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, check=False).returncode == 0


def configure(folder, compiler, options):
    """Into a log, which is shown when it failed; the reader of a passing check has no use for it."""
    command = ['meson', 'setup', *options, folder, ROOT]
    if os.path.exists(os.path.join(folder, 'build.ninja')):
        command.insert(2, '--reconfigure')
    else:
        shutil.rmtree(folder, ignore_errors=True)
    done = subprocess.run(command, env={**os.environ, 'CC': compiler}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, check=False)
    if done.returncode and '--reconfigure' in command:      # moved, or made by another meson
        shutil.rmtree(folder)
        return configure(folder, compiler, options)
    if done.returncode:
        print(done.stdout, flush=True)
    return done.returncode == 0


def introspect(folder, what):
    done = subprocess.run(['meson', 'introspect', what, folder], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def threaded_tests(folder):
    """Names of the tests and files that have to be built for them."""
    files = {t['id']: t['filename'] for t in introspect(folder, '--targets')}
    tests = [t for t in introspect(folder, '--tests')
             if any(re.search(THREADED, word) for word in t['cmd']) and 'long' not in suites(t)]
    wanted = {f for t in tests for d in t['depends'] for f in files[d]}
    return [t['name'] for t in tests], sorted(os.path.relpath(f, folder) for f in wanted)


def suites(test):
    return [s.rpartition(':')[2] for s in test['suite']]


def skip_reason(test):
    """What a test that exits 77 said last: by convention the reason."""
    said = ((test.get('stderr') or '').strip() or (test.get('stdout') or '').strip()).splitlines()
    if not said:
        return f'{test["name"]} gave no reason'
    reason = re.sub(r'^\S+ over \S+: ', '', said[-1].removeprefix('skipped: '))   # a case over a backend
    return re.sub(r'\d{3,}', '…', reason)      # process ids and ports do not make two reasons of one


def tally(folder, stage, count):
    """Adds up the log of a `meson test`; returns how many results it holds."""
    results = 0
    with open(os.path.join(folder, 'meson-logs', 'testlog.json'), encoding='utf-8') as log:
        for line in log:
            test = json.loads(line)
            results += 1
            if test['result'] in ('OK', 'EXPECTEDFAIL'):
                count.passed += 1
            elif test['result'] == 'SKIP':
                count.skip(stage, skip_reason(test))
            else:
                count.fail(f'{stage}: {test["name"]}: {test["result"]}')
    return results


def run_tests(folder, stage, selected, names, prefix, count):
    log = os.path.join(folder, 'meson-logs', 'testlog.json')
    if os.path.exists(log):
        os.unlink(log)
    # The timeouts are there for hangs, not for slow machines.
    command = [*prefix, 'meson', 'test', '-C', folder, '--no-rebuild', '--print-errorlogs', '--timeout-multiplier', '5']
    passed = run(command + SHORT.get(selected, []) + names, **SANITIZER_ENV)
    failed = count.failed
    if not os.path.exists(log) or tally(folder, stage, count) == 0:
        count.fail(f'{stage}: no test ran')
    elif not passed and count.failed == failed:
        count.fail(f'{stage}: meson test failed, though no test did')


def run_lab(folder, stage, long, count):
    """tests/vm counts by itself and says what failed; a case there is a test here."""
    with tempfile.TemporaryDirectory() as scratch:
        results = os.path.join(scratch, 'results')
        command = [sys.executable, os.path.join(ROOT, 'tests', 'vm', 'run.py'), folder, '--json', results]
        with subprocess.Popen(command + (['--long'] if long else []), stdout=subprocess.PIPE, text=True) as p:
            last = ''
            for line in p.stdout:
                print(line, end='', flush=True)
                last = line.strip() or last
        if p.returncode == 77:
            return count.skip(stage, last.removeprefix('skipped: '))
        if not os.path.exists(results):
            return count.fail(f'{stage}: the lab ended with status {p.returncode}')
        with open(results, encoding='utf-8') as f:
            for r in json.load(f):
                if r['result'] == 'passed':
                    count.passed += 1
                elif r['result'] == 'skipped':
                    count.skip(stage, r['note'])
                else:
                    count.fail(f'{stage}: {r["name"]}: {r["note"].splitlines()[0] if r["note"] else "failed"}')
    return None


def thread_sanitizer_prefix():
    """Older sanitizers do not start where the kernel randomizes addresses widely: then they are run without. None when
    they do not start at all."""
    with tempfile.TemporaryDirectory() as folder:
        program = os.path.join(folder, 'a')
        with open(program + '.c', 'w', encoding='utf-8') as f:
            f.write('int main(void) { return 0; }\n')
        if not run(['gcc', '-fsanitize=thread', program + '.c', '-o', program]):
            return None
        for prefix in ([], ['setarch', '-R']):
            if subprocess.run([*prefix, program], stderr=subprocess.DEVNULL, check=False).returncode == 0:
                return prefix
    return None


def run_stage(stage, compiler, options, selected, long, count):
    folder, names, files, prefix = os.path.join(BUILD, LAB_BUILD if selected == 'lab' else stage), [], [], []
    if selected == 'threaded':
        prefix = thread_sanitizer_prefix()
        if prefix is None:
            return count.skip(stage, 'programs with this sanitizer do not start on this kernel')
    if not configure(folder, compiler, options):
        return count.fail(f'{stage}: does not configure')
    if selected == 'threaded':
        names, files = threaded_tests(folder)
        if not names:
            return count.fail(f'{stage}: no test is selected')
    if not run(['ninja', '--quiet', '-C', folder, *files]):
        return count.fail(f'{stage}: does not build')
    if selected == 'none':
        if not run([os.path.join(folder, 'tools', 'djinnbench'), 'list']):
            count.fail(f'{stage}: djinnbench list fails')
        return None
    if selected == 'lab':
        return run_lab(folder, stage, long, count)
    return run_tests(folder, stage, selected, names, prefix, count)


def arguments():
    names = [s[0] for s in STAGES]
    parser = argparse.ArgumentParser(prog='tools/check', description='Builds in every way and runs every test.')
    parser.add_argument('stages', metavar='STAGE', nargs='*', help='only these: ' + ', '.join(names))
    parser.add_argument('--quick', action='store_true', help='one build, and the tests that take seconds')
    parser.add_argument('--long', action='store_true', help="also the lab's tests that take minutes")
    parser.add_argument('--no-install', action='store_true', help='install nothing')
    options = parser.parse_intermixed_args()
    for name in options.stages:
        if name not in names:
            parser.error(f'unknown stage {name}; expected one of {", ".join(names)}')
    return options


def main():
    options = arguments()
    wanted = options.stages or (QUICK if options.quick else [s[0] for s in STAGES])
    count, times = Count(), []
    for stage, what, compiler, meson_options, selected in STAGES:
        if stage not in wanted:
            continue
        if options.quick and selected == 'all':
            selected = 'short'
        say(f'stage {stage}: {what}')
        begun, before = time.monotonic(), (count.passed, count.failed, count.skipped)
        run_stage(stage, compiler, meson_options, selected, options.long, count)
        done = [now - then for now, then in zip((count.passed, count.failed, count.skipped), before)]
        times.append(f'{stage:15} {time.monotonic() - begun:6.1f} s  {done[0]} passed, {done[1]} failed, {done[2]} skipped')
        say(times[-1])
    print()
    for line in times + count.notes():
        say(line)
    print(f'{count.passed} passed, {count.failed} failed, {count.skipped} skipped', flush=True)
    return 1 if count.failed else 0


if __name__ == '__main__':
    sys.exit(main())
