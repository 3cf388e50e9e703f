#!/usr/bin/env python3
"""Each header compiles alone, twice in a row, seeing only the folders that its own folder may know and those that these
may know in turn, because their headers may include them.

Usage: check_headers.py ROOT COMPILER...        compilers that are not installed are left out; none at all: exit 77
"""
import concurrent.futures
import os
import shutil
import subprocess
import sys

import check_layers

FOLDERS = {'graph': 'workloads', 'weights': 'workloads/weights', 'protocol': 'server'}
FLAGS = ['-std=gnu17', '-D_GNU_SOURCE', '-Wall', '-Wextra', '-Wundef', '-Wno-unused-parameter', '-Werror', '-fsyntax-only']


def known_to(library):
    known = [library]
    for one in known:
        known += [f for f in check_layers.ALLOWED[one] if f not in known]
    return known


def command(compiler, root, path):
    seen = [os.path.dirname(path)] + [FOLDERS.get(f, f) for f in known_to(check_layers.library_of(path))]
    include = [flag for f in dict.fromkeys(seen) for flag in ('-iquote', os.path.join(root, f))]
    return [compiler, *FLAGS, *include, '-x', 'c', '-']


def compile_alone(compiler, root, path):
    # Twice: the second time finds a missing include guard.
    text = f'#include "{os.path.basename(path)}"\n' * 2
    done = subprocess.run(command(compiler, root, path), input=text, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f'{compiler}: {path} does not compile alone:\n{done.stderr}'


def main():
    root, compilers = sys.argv[1], [c for c in sys.argv[2:] if shutil.which(c)]
    if not compilers:
        print(f'none of {" ".join(sys.argv[2:])} is installed')
        return 77
    headers = [p for p in check_layers.sources(root) if p.endswith('.h') and not p.startswith('tests/')]
    jobs = [(c, root, p) for c in compilers for p in headers]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        errors = [e for e in pool.map(lambda job: compile_alone(*job), jobs) if e]
    print('\n'.join(errors) or f'{len(headers)} headers compile alone with {" and ".join(compilers)}')
    return 1 if errors or len(headers) < 10 else 0


if __name__ == '__main__':
    sys.exit(main())
