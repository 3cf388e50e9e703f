#!/usr/bin/env python3
"""Runs the cases of cases.py in the lab of virtual machines (vmlab), one boot for those of one kind.

  run.py BUILD [--long] [--json FILE] [--keep DIR] [CASE...]
  run.py --list [--long] [CASE...]

BUILD is a build folder with the tests built. A CASE may be the beginning of a name. Exit status: 0 none failed, 1 some
did, 2 wrong use, 77 the lab cannot be had here (the reason is the last line).
"""
import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time

import cases

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
BOOT_S = 60     # of a machine on a busy host, until the first case


def say(text):
    print('== vm: ' + text, flush=True)


def chosen(options):
    """A name that is a case's means that one, else all that begin so."""
    wanted = [c for c in cases.CASES.values() if options.long or not c.long]
    if options.case:
        wanted = [c for c in cases.CASES.values()
                  if c.name in options.case or any(c.name.startswith(n) for n in options.case if n not in cases.CASES)]
    if not wanted:
        sys.exit(f'run.py: no case is named {" or ".join(options.case)}; --list names them')
    return wanted


def results_of(folder):
    try:
        with open(os.path.join(folder, '0', 'results.jsonl'), encoding='utf-8') as f:
            return [json.loads(line) for line in f]
    except OSError:
        return []


def boot(hosts, wanted, options, folder):
    """One boot; returns results, or None and the reason where the lab cannot be had."""
    limit = BOOT_S + sum(c.seconds for c in wanted)
    inside = ['python3', os.path.join(HERE, 'inside.py'), os.path.abspath(options.build), *(c.name for c in wanted)]
    command = [os.path.join(HERE, 'vmlab'), '--rxe', '--hosts', str(hosts), '--timeout', str(limit), '--out', folder,
               '--', 'PYTHONDONTWRITEBYTECODE=1 exec ' + shlex.join(inside)]
    begun = time.monotonic()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as lab:
        try:
            said, _ = lab.communicate()
        finally:
            lab.terminate()     # it ends its machines; nothing where it has ended
    if lab.returncode == 77:
        return None, said.strip().splitlines()[-1].removeprefix('vmlab: ')
    results = results_of(folder)
    ended = results and results[-1]['result'] == 'end'
    results = [r for r in results if r['result'] != 'end']
    if not ended:
        last = f' after "{results[-1]["name"]}"' if results else ''
        results.append({'name': f'boot of {hosts}', 'result': 'failed', 'seconds': round(time.monotonic() - begun, 1),
                        'note': f'the machine broke down{last} (status {lab.returncode}; limit {limit} s): '
                                + said[-3000:]})
    for r in results:
        r['hosts'] = hosts
    return results, ''


def arguments():
    parser = argparse.ArgumentParser(prog='run.py', description='Runs tests in virtual machines with Soft-RoCE.')
    parser.add_argument('build', metavar='BUILD', nargs='?')
    parser.add_argument('case', metavar='CASE', nargs='*')
    parser.add_argument('--long', action='store_true', help='also what takes minutes')
    parser.add_argument('--list', action='store_true', help='name the cases and end')
    parser.add_argument('--json', metavar='FILE', help='write the results there')
    parser.add_argument('--keep', metavar='DIR', help='leave what the machines wrote in DIR')
    options = parser.parse_intermixed_args()
    if options.list and options.build and not os.path.isdir(options.build):
        options.case.insert(0, options.build)
    elif not options.list and not options.build:
        parser.error('a build folder is needed')
    return options


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = arguments()
    wanted = chosen(options)
    if options.list:
        for c in wanted:
            print(f'{c.name:24} {c.hosts} host{"s" if c.hosts > 1 else " "} {"long " if c.long else "short"} {c.what}')
        return 0
    everything = []
    with tempfile.TemporaryDirectory() as scratch:
        for hosts in sorted({c.hosts for c in wanted}):
            group = [c for c in wanted if c.hosts == hosts]
            begun = time.monotonic()
            folder = os.path.join(options.keep or scratch, f'hosts-{hosts}')
            results, reason = boot(hosts, group, options, folder)
            if results is None:
                print(f'skipped: {reason}')
                return 77
            for r in results:
                note = r['note'].splitlines()
                say(f'{r["result"]:7} {r["seconds"]:6.1f} s  {r["name"]}' + (f': {note[0]}' if note else ''))
                for line in note[1:] if r['result'] == 'failed' else []:
                    say('        ' + line)
            say(f'{hosts} host{"s" if hosts > 1 else ""}: {time.monotonic() - begun:.1f} s with the boot')
            everything += results
    if options.json:
        with open(options.json, 'w', encoding='utf-8') as f:
            json.dump(everything, f, indent=1)
    counts = {k: sum(r['result'] == k for r in everything) for k in ('passed', 'failed', 'skipped')}
    print(', '.join(f'{n} {k}' for k, n in counts.items()), flush=True)
    return 1 if counts['failed'] else 0


if __name__ == '__main__':
    sys.exit(main())
