#!/usr/bin/env python3
"""What every user meets first: help, version, wrong use, man pages, list, doctor.

Usage: test_cli.py PROGRAM COMMAND,COMMAND... ROOT     the commands that this build has; the root of the tree
"""
import json
import os
import shutil
import subprocess
import sys
import unittest

PROGRAM = sys.argv[1]
BUILT = sys.argv[2].split(',')
CONFIGS, FIXTURES = os.path.join(sys.argv[3], 'configs'), os.path.join(sys.argv[3], 'tests', 'fixtures')
SCREEN_LINES = 45


def run(*args, stdout=subprocess.PIPE):
    return subprocess.run([PROGRAM, *args], stdout=stdout, stderr=subprocess.PIPE, text=True, check=False, timeout=60)


def known():
    """Every command of the table, built or not, from the overview."""
    lines = run('help').stdout.split('\n\n')[2].splitlines()
    return [line.split()[0] for line in lines]


class Help(unittest.TestCase):
    def test_overview_fits_a_screen(self):
        done = run('help')
        self.assertEqual(done.returncode, 0)
        lines = done.stdout.splitlines()
        self.assertLessEqual(len(lines), 24)
        self.assertEqual([line for line in lines if len(line) > 80 and 'not built' not in line], [])
        for command in BUILT:
            self.assertIn(f'\n  {command} ', done.stdout)
        self.assertEqual(run('--help').stdout, done.stdout)

    def test_each_command(self):
        for command in BUILT:
            with self.subTest(command):
                done = run('help', command)
                self.assertEqual((done.returncode, done.stderr), (0, ''))
                self.assertTrue(done.stdout.startswith(f'Usage: djinnbench {command}'), done.stdout)
                self.assertLessEqual(len(done.stdout.splitlines()), SCREEN_LINES)
                self.assertEqual([line for line in done.stdout.splitlines() if len(line) > 80], [])
                self.assertEqual(run(command, '--help').stdout, done.stdout)

    def test_version(self):
        self.assertRegex(run('--version').stdout, r'^djinnbench \d+\.\d+\.\d+ \(\w[\w-]*\)\n$')

    def test_man_pages(self):
        if not shutil.which('mandoc'):
            self.skipTest('mandoc is not installed')
        for page in [[]] + [[command] for command in BUILT]:
            with self.subTest(page):
                text = run('help', '--man', *page).stdout
                lint = subprocess.run(['mandoc', '-T', 'lint', '-W', 'warning'], input=text, text=True,
                                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
                # One source line per sentence is a habit for pages that people edit; these are generated.
                said = [line for line in lint.stdout.splitlines() if 'new sentence, new line' not in line]
                self.assertEqual(said, [])
                self.assertIn('.Sh EXIT STATUS', text)


class WrongUse(unittest.TestCase):
    def wrong(self, *args, says):
        done = run(*args)
        self.assertEqual((done.returncode, done.stdout), (2, ''), args)
        self.assertIn(says, done.stderr)
        return done.stderr

    def test_no_command(self):
        self.wrong(says='Usage: djinnbench COMMAND')

    def test_unknown_command_names_the_nearest(self):
        self.wrong('lits', says="did you mean 'list'?")
        self.wrong('help', 'doktor', says="did you mean 'doctor'?")
        self.wrong('xyzzy', says="'djinnbench help' lists them")

    def test_unknown_option(self):
        for command in BUILT:
            with self.subTest(command):
                text = self.wrong(command, '--frobnicate', says=f'djinnbench {command}: ')
                self.assertEqual(len(text.splitlines()), 1, text)

    def test_command_of_another_build(self):
        for command in set(known()) - set(BUILT):
            self.wrong(command, says='not part of this build')
            self.wrong('help', command, says='not part of this build')

    def test_full_disk_is_no_success(self):
        with open('/dev/full', 'w', encoding='utf-8') as full:
            done = run('list', stdout=full)
        self.assertEqual(done.returncode, 3)
        self.assertIn('cannot write to standard output', done.stderr)


class List(unittest.TestCase):
    def test_json_and_text_agree(self):
        sections = json.loads(run('list', '--json').stdout)
        text = run('list').stdout
        for name, entries in sections.items():
            self.assertIn(f'{name}:\n', text)
            self.assertGreater(len(entries), 0)
            for e in entries:
                self.assertEqual(e['available'], e['reason'] is None)
                self.assertIn(f'\n  {e["name"]} ', text)
                self.assertIn(e['reason'] or e['what'], text)
        self.assertEqual(set(sections), {'transports', 'devices', 'workloads', 'baselines'} if 'sweep' in BUILT
                         else {'transports'})

    def test_what_is_promised(self):
        transports = {e['name']: e for e in json.loads(run('list', '--json').stdout)['transports']}
        for name in ('shm', 'tcp', 'loop', 'null'):
            self.assertTrue(transports[name]['available'], transports[name])
        self.assertIn('not part of this build', transports['dpdk']['reason'])
        rdma = transports['rdma']
        if not rdma['available']: # not built, or no device here
            self.assertRegex(rdma['reason'], 'not part of this build|no RDMA device')


@unittest.skipUnless('sweep' in BUILT, 'this build has no sweep')
class Configs(unittest.TestCase):
    def test_each_is_a_question_that_can_be_planned(self):
        self.assertIn('smoke.yaml', os.listdir(CONFIGS))
        for name in sorted(os.listdir(CONFIGS)):
            with self.subTest(name):
                path = os.path.join(CONFIGS, name)
                with open(path, encoding='utf-8') as f:
                    self.assertRegex(f.readline(), '^# Question: ')
                # What needs a device that this host lacks can still be planned, over another transport.
                done = run('sweep', '--config', path, '--check', '--device', 'cpu', '--model-root', FIXTURES,
                           '--transports', 'shm')
                self.assertEqual(done.returncode, 0, done.stderr)


class Doctor(unittest.TestCase):
    """Scripted hosts and --peer: tests/e2e/test_doctor.py."""

    def test_this_host(self):
        self.assertEqual(run('doctor').returncode, 0)
        report = json.loads(run('doctor', '--json').stdout)
        self.assertEqual(report['schema'], 'djinnbench.doctor/1')
        self.assertGreater(len(report['findings']), 10)

    def test_peer_that_is_not_there(self):
        done = run('doctor', '--peer', 'tcp://127.0.0.1:1', '--json')
        self.assertEqual(done.returncode, 3)
        self.assertFalse(json.loads(done.stdout)['works'])


if __name__ == '__main__':
    unittest.main(argv=[sys.argv[0], '-v'])
