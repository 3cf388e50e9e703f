#!/usr/bin/env python3
"""Runs cases inside a machine of the lab; run.py starts it there. A line of JSON per case goes to $OUT/results.jsonl as
soon as the case has ended, so that what was done before a break-down is known.

  inside.py BUILD NAME...       (NAME as in cases.py)
"""
import json
import os
import sys
import time
import traceback

import agent
import cases


class Lab:
    """What a case gets: the machines, the build, and where results go."""

    def __init__(self, build):
        self.build = build
        self.program = os.path.join(build, 'tools', 'djinnbench')
        self.root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        self.out = os.environ['OUT']
        self.here = agent.Machine(agent.Table(), os.environ['HOST_IP'])
        self.peer = self.here
        if os.environ['PEER_IP'] != os.environ['HOST_IP']:
            self.peer = agent.Machine(agent.Distant(os.environ['PEER_IP']), os.environ['PEER_IP'])

    def record(self, name, result, seconds, note=''):
        with open(os.path.join(self.out, 'results.jsonl'), 'a', encoding='utf-8') as f:
            f.write(json.dumps({'name': name, 'result': result, 'seconds': round(seconds, 1), 'note': note}) + '\n')

    def attempt(self, name, call):
        begun = time.monotonic()
        try:
            note, result = call() or '', 'passed'
        except agent.Skipped as e:
            note, result = str(e), 'skipped'
        except agent.Failed as e:
            note, result = str(e), 'failed'
        except Exception:       # a case that breaks must not take the others with it
            note, result = traceback.format_exc(), 'failed'
        for machine in (self.here, self.peer):
            machine.table.clear()
        self.record(name, result, time.monotonic() - begun, note)


def main():
    if os.environ['HOST_INDEX'] == '1':
        agent.serve(os.environ['HOST_IP'])
        return 0
    lab = Lab(sys.argv[1])
    for name in sys.argv[2:]:
        case = cases.CASES[name]
        if case.parts:
            for part, call in case.parts(lab):
                lab.attempt(f'{name} {part}', call)
        else:
            lab.attempt(name, lambda: case.call(lab))
    lab.record('', 'end', time.monotonic())
    return 0


if __name__ == '__main__':
    sys.exit(main())
