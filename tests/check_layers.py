#!/usr/bin/env python3
"""Holds the include table of CONTRIBUTING.md: which folder may know which.

The build enforces most of it, because a folder's headers are found only through its dependency. This test is the second
line: it sees the includes that the build lets through (folders that lie inside each other share an include path) and
libraries that only one file may know.

Usage: check_layers.py ROOT             exit 1 and one line per violation
       check_layers.py --self-test      plants one violation of each kind and expects to find it
"""
import os
import re
import sys
import tempfile

# folder -> folders whose headers its files may include, beside its own.
ALLOWED = {
    'base': [],
    'transport': ['base'],
    'gpu': ['base'],
    'graph': ['base', 'gpu'],
    'weights': ['base', 'gpu', 'graph'],
    'workloads': ['base', 'gpu', 'graph', 'weights'],
    'protocol': ['base', 'gpu', 'graph'],
    'server': ['base', 'transport', 'gpu', 'graph', 'protocol', 'weights'],
    'client': ['base', 'transport', 'gpu', 'graph', 'workloads', 'protocol'],
}
EVERYTHING = list(ALLOWED)
ALLOWED['tools'] = EVERYTHING
ALLOWED['tests'] = EVERYTHING + ['tools']

# "The graph yes, a model never": single headers where a whole folder would be too much. None means the whole folder.
ONLY_HEADERS = {
    ('weights', 'gpu'): ['op.h'],
    ('protocol', 'gpu'): ['op.h'],
}

# Files that are a library of their own inside a folder: path pattern -> library.
LIBRARIES = [
    (r'workloads/weights/', 'weights'),
    (r'workloads/(graph|graph_priv|bind)\.[ch]$', 'graph'),
    (r'server/(protocol|serial)\.[ch]$', 'protocol'),
    (r'(base|transport|gpu|workloads|server|client|tools|tests)/', None),
]

# A library's header -> the only file that may include it.
ONLY_IN = {
    r'^yaml\.h$': 'base/conf.c',
    r'^cjson/|^cJSON\.h$': 'base/json.c',
    r'^sodium': 'base/keys.c',
    r'^xxhash\.h$': 'base/digest.c',
    r'^msgpack': 'server/serial.c',
}
HAVE_ONLY_IN = 'transport/registry.c'

INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*([<"])([^">]+)[">]', re.M)
HAVE = re.compile(r'^[ \t]*#[ \t]*(?:if|ifdef|ifndef|elif)\b[^\n]*\bHAVE_\w+', re.M)
PRIVATE = re.compile(r'(_priv|_private|(^|_)inside)\.h$')


def library_of(path):
    for pattern, library in LIBRARIES:
        if re.match(pattern, path):
            return library or path.split('/')[0]
    return None


def sources(root):
    for top in sorted({'base', 'transport', 'gpu', 'workloads', 'server', 'client', 'tools', 'tests'}):
        for folder, _, names in os.walk(os.path.join(root, top)):
            for name in sorted(names):
                if re.search(r'\.(c|h|h\.in|cu|cuh)$', name):
                    yield os.path.relpath(os.path.join(folder, name), root).replace(os.sep, '/')


def owners_of(paths):
    """Header name -> paths."""
    owners = {}
    for path in paths:
        if re.search(r'\.h(\.in)?$', path):
            owners.setdefault(re.sub(r'\.in$', '', os.path.basename(path)), []).append(path)
    return owners


def check_quoted(path, name, owners):
    base, mine = os.path.basename(name), library_of(path)
    targets = owners.get(base, [])
    # As the compiler: the file's own folder first; a test's is the one that it mirrors.
    near = [t for t in targets if os.path.dirname(t) == os.path.dirname(path)
            or mine == 'tests' and t.split('/')[0] in path.split('/')]
    if not targets:
        return f'includes "{name}", which is no header of this tree'
    if not near and len(targets) > 1:
        return f'includes "{name}", which may be any of {", ".join(targets)}'
    target = (near or targets)[0]
    theirs = library_of(target)
    if mine == theirs:
        return None
    if theirs not in ALLOWED[mine]:
        return f'includes "{name}" of {theirs}; {mine} may know only: {", ".join(ALLOWED[mine]) or "itself"}'
    only = ONLY_HEADERS.get((mine, theirs))
    if only and base not in only:
        return f'includes "{name}" of {theirs}; {mine} may know only {", ".join(only)} there'
    if PRIVATE.search(base) and mine != 'tests':
        return f'includes "{name}", which is private to {os.path.dirname(target)}/'
    return None


def check_library(path, name):
    for pattern, home in ONLY_IN.items():
        if re.match(pattern, name) and path != home and not path.startswith('tests/'):
            return f'includes <{name}>; only {home} may'
    return None


def check(root):
    paths = list(sources(root))
    owners, errors = owners_of(paths), []
    for path in paths:
        with open(os.path.join(root, path), encoding='utf-8') as f:
            text = f.read()
        for m in INCLUDE.finditer(text):
            error = (check_quoted(path, m[2], owners) if m[1] == '"' else None) or check_library(path, m[2])
            if error:
                errors.append(f'{path}:{text.count(chr(10), 0, m.start(1)) + 1}: {error}')
        for m in HAVE.finditer(text):
            if path != HAVE_ONLY_IN and not path.startswith('tests/'):
                errors.append(f'{path}:{text.count(chr(10), 0, m.start()) + 1}: HAVE_* belongs in {HAVE_ONLY_IN} only')
    return errors, len(paths)


PLANTED = {
    'transport/a.c': '#include "device.h"\n',                   # transport may not know devices
    'base/b.c': '#include "transport.h"\n',                     # base knows nobody
    'workloads/graph.c': '#include "workload.h"\n',             # the graph may not know models
    'server/c.c': '#include "workload.h"\n',                    # nor may the server
    'server/protocol.c': '#include "device.h"\n',               # op.h and no more
    'client/d.c': '#include "server.h"\n',                      # client and server meet on the wire only
    'tools/e.c': '#include "tcp_private.h"\n',                  # private to transport
    'gpu/f.c': '#include <yaml.h>\n',                           # conf.c's
    'client/g.c': '#  include <cjson/cJSON.h>\n',               # json.c's
    'client/h.c': '#include <msgpack.h>\n',                     # serial.c's
    'gpu/i.c': '#if defined(HAVE_CUDA)\n#endif\n',              # registry.c's
    'tools/j.c': '#include "nowhere.h"\n',
    'tools/k.c': '#include "inside.h"\n',                       # whose?
}
INNOCENT = {
    'base/conf.c': '#include <yaml.h>\n#include "err.h"\n',
    'base/err.h': '', 'server/inside.h': '', 'transport/inside.h': '', 'transport/inside.c': '#include "inside.h"\n',
    'transport/transport.h': '#include "err.h"\n', 'transport/tcp_private.h': '',
    'transport/registry.c': '#ifdef HAVE_TCP\n#endif\n#include "tcp_private.h"\n',
    'gpu/device.h': '#include "op.h"\n', 'gpu/op.h': '', 'workloads/graph.h': '#include "op.h"\n',
    'workloads/workload.h': '#include "graph.h"\n', 'server/server.h': '', 'server/protocol.h': '#include "op.h"\n',
    'server/serial.c': '#include <msgpack.h>\n#include "protocol.h"\n',
    'tests/unit/transport/test_tcp.c': '#include "tcp_private.h"\n#include "inside.h"\n#include "transport.h"\n',
}


def self_test():
    def plant(root, files):
        for path, text in files.items():
            os.makedirs(os.path.dirname(os.path.join(root, path)), exist_ok=True)
            with open(os.path.join(root, path), 'w', encoding='utf-8') as f:
                f.write(text)

    wrong = []
    with tempfile.TemporaryDirectory() as root:
        plant(root, INNOCENT)
        wrong += [f'an innocent tree is accused: {e}' for e in check(root)[0]]
    for path, text in PLANTED.items():
        with tempfile.TemporaryDirectory() as root:
            plant(root, {**INNOCENT, path: text})
            found = check(root)[0]
            if len(found) != 1 or path not in found[0]:
                wrong.append(f'planted in {path}: {text.strip()!r}: found {found}')
    return wrong


def main():
    if sys.argv[1:] == ['--self-test']:
        wrong = self_test()
        print('\n'.join(wrong) or f'each of {len(PLANTED)} planted violations was found')
        return 1 if wrong else 0
    errors, files = check(sys.argv[1])
    if files < 10:
        errors.append(f'{sys.argv[1]}: only {files} sources found; is this the root of the tree?')
    print('\n'.join(errors) or f'{files} sources keep to the table')
    return 1 if errors else 0


if __name__ == '__main__':
    sys.exit(main())
