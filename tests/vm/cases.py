"""What is tried in the lab. A case is a function of the lab (inside.py); what it returns is shown beside "passed". It
raises Failed or Skipped. Times are those of an emulated processor: none is compared but to another one of the same boot."""
import collections
import glob
import ipaddress
import json
import os
import re
import signal

from agent import Failed, Skipped

Case = collections.namedtuple('Case', 'name what hosts long seconds call parts')
CASES = {}

KEY = 'a5' * 32 + '\n'
LOSS = 'delay 1ms loss 1%'      # what netem does to every packet of both machines
IFA_F_TENTATIVE = 0x40          # linux/if_addr.h
DEADLINE_S = 30                 # a peer that is stopped or killed is reported within this, emulation included
PEERS_ROUNDS = 10


def case(what, hosts=1, seconds=60, long=False):
    """seconds: the most that it may take; part of the machine's deadline."""
    def book(f):
        name = f.__name__.replace('_', '-')
        CASES[name] = Case(name, what, hosts, long, seconds, f, None)
        return f
    return book


def parts_case(what, hosts=1, seconds=60, long=False):
    """A function that gives (name, call) for each part, each of which is a result of its own."""
    def book(f):
        name = f.__name__.replace('_', '-')
        CASES[name] = Case(name, what, hosts, long, seconds, None, f)
        return f
    return book


def expect(true, what):
    if not true:
        raise Failed(what)


# ---- programs ----

def key_files(lab):
    return lab.here.write('key', KEY), lab.peer.write('key', KEY)


def listening(machine, *argv):
    """A program that says where it listens, and that address."""
    p = machine.start(*argv)
    return p, p.says(r'listening on (\S+)').group(1)


def meson_tests(lab, program, first=None):
    """Arguments of the tests that the build has for a program."""
    with open(os.path.join(lab.build, 'meson-info', 'intro-tests.json'), encoding='utf-8') as f:
        commands = [t['cmd'] for t in json.load(f)]
    return [c[1:] for c in commands if os.path.basename(c[0]) == program and first in (None, c[1])]


def run_test(lab, *argv, timeout):
    """A test program by the convention: 77 skips with the reason as its last line."""
    p = lab.here.run(*argv, timeout=timeout, status=None, DJINN_RDMA_HOST=lab.here.address)
    if p.status == 77:
        raise Skipped((p.err.strip() or p.out.strip()).splitlines()[-1].removeprefix('skipped: '))
    expect(p.status == 0, p.told())
    return p


def conformance(program, backend):
    """The tests that the build has for a program over a backend, each a part of the case."""
    def parts(lab):
        path = os.path.join(lab.build, 'tests', 'conform', 'transport', program)
        found = meson_tests(lab, program, backend)
        if not found:
            def none():
                raise Failed(f'this build has no tests of {backend}: was it configured with -Drdma=disabled?')
            return [('none', none)]
        return [(args[1], lambda args=args: run_test(lab, path, *args, timeout=240).out.strip())
                for args in found]
    return parts


for conform_backend, conform_long in (('rdma', False), ('rdma4', True), ('rdma+cm', True), ('fault+rdma', True)):
    conform_name = f'conform-{conform_backend}'
    CASES[conform_name] = Case(conform_name, f'the conformance suite over {conform_backend}', 1, conform_long, 600,
                               None, conformance('tp_conform', conform_backend))
CASES['hotpath-rdma'] = Case('hotpath-rdma', 'no allocation, lock or log call of ours for a message over rdma', 1,
                             False, 60, None, conformance('tp_hotpath', 'rdma'))


# ---- what the host has ----

@case('doctor names the device, its port and that it is emulated')
def doctor(lab):
    p = lab.here.run(lab.program, 'doctor', status=None)
    expect(p.status == 0, p.told())
    for word in ('rxe0', 'emulated'):
        expect(word in p.out, f'no word of {word}: {p.told()}')
    text = lab.here.run(lab.program, 'doctor', '--json').out
    expect(isinstance(json.loads(text), dict), text[:500])


@case('list calls rdma available')
def listed(lab):
    p = lab.here.run(lab.program, 'list')
    found = re.search(r'^ +rdma +.*\n +(.*)', p.out, re.M)
    expect(found and found.group(1).startswith('available'), found.group(0) if found else p.told())
    return found.group(1)


# ---- sweeps ----

def check_rows(folder, transports, baselines=6):
    """Every row VALID; each row of a transport names its path, and that it is emulated or not."""
    count = 0
    found = glob.glob(os.path.join(folder, '*', '*.json'))
    expect(found, f'no result in {folder}')
    for path in found:
        with open(path, encoding='utf-8') as f:
            doc = json.load(f)
        rows = doc['workload']['results']
        for r in rows:
            name = f'{os.path.basename(os.path.dirname(path))} {r["baseline"]} over {r["transport"]}'
            expect(r['validity']['verdict'] == 'VALID', f'{name}: {r["validity"]}')
            if r['transport'] not in transports:
                continue
            count += 1
            expect(r['path'] == 'host', f'{name}: path {r["path"]}')
            expect(r['emulated'] is (r['transport'] == 'rdma'), f'{name}: emulated {r["emulated"]}')
        seen = {(r['baseline'], r['transport']) for r in rows if r['transport'] in transports}
        expect(len(seen) == (baselines - 1) * len(transports), f'{path}: rows {sorted(seen)}')
    return f'{count} rows VALID over {" and ".join(transports)}'


def sweep(lab, name, transports, *args, timeout):
    folder = os.path.join(lab.out, name)
    p = lab.here.run(lab.program, 'sweep', '--config', os.path.join(lab.root, 'configs', 'lab.yaml'), '--output-dir',
                     folder, '--model-root', os.path.join(lab.root, 'tests', 'fixtures'), *args, timeout=timeout,
                     status=None)
    # A row that is not VALID is the better sentence, where there are rows.
    if p.status in (0, 1) and glob.glob(os.path.join(folder, '*', '*.json')):
        said = check_rows(folder, transports)
    expect(p.status == 0, p.told())
    return said


@case('a sweep with every baseline over rdma, embedded server', seconds=90)
def sweep_embedded(lab):
    return sweep(lab, 'sweep', ['rdma'], timeout=90)


def serving(lab, machine, transport, key):
    return listening(machine, lab.program, 'serve', '--listen', f'{transport}://{machine.address}:0', '--device', 'reference',
                     '--key-file', key, '--model-root', os.path.join(lab.root, 'tests', 'fixtures'))


def sweep_between(lab, name, transport, timeout):
    here, there = key_files(lab)
    server, url = serving(lab, lab.peer, transport, there)
    said = sweep(lab, name, [transport], '--server', url, '--key-file', here, timeout=timeout)
    server.signal(signal.SIGTERM)
    expect(server.end(30) == 0, server.told())
    return said


@case('a sweep with every baseline over rdma, server on the other machine', hosts=2, seconds=90)
def sweep_two(lab):
    return sweep_between(lab, 'sweep', 'rdma', 90)


@case('a sweep with every baseline over tcp, server on the other machine', hosts=2, seconds=90, long=True)
def sweep_two_tcp(lab):
    return sweep_between(lab, 'sweep-tcp', 'tcp', 90)


class Lossy:
    """Both machines delay and lose packets meanwhile."""

    def __init__(self, lab):
        self.machines = (lab.here, lab.peer)

    def __enter__(self):
        for m in self.machines:
            m.run('tc', 'qdisc', 'add', 'dev', 'wire', 'root', 'netem', *LOSS.split())

    def __exit__(self, *_):
        for m in self.machines:
            m.run('tc', 'qdisc', 'del', 'dev', 'wire', 'root')


@case('a sweep while netem delays and loses packets', hosts=2, seconds=240, long=True)
def sweep_lossy(lab):
    with Lossy(lab):
        return sweep_between(lab, 'sweep-lossy', 'rdma', 240)


# ---- perf ----

def perf(lab, transport, *args, timeout, address=None):
    """One end of perf here, the other on the peer, at its address; the results of its JSON."""
    here, there = key_files(lab)
    # A message may be so long as the end that takes it allows; 64 KiB only where that is asked for.
    query = '?msg=65536' if transport == 'rdma' else ''
    listener, url = listening(lab.peer, lab.program, 'perf', '--listen', f'{transport}://{address or lab.peer.address}:0{query}',
                              '--once', '--key-file', there)
    url = url.partition('?')[0] + query
    path = os.path.join(lab.out, 'perf.json')
    p = lab.here.run(lab.program, 'perf', *args, '--connect', url, '--key-file', here, '--json', path, timeout=timeout)
    listener.end(30)
    expect(listener.status == 0, listener.told())
    with open(path, encoding='utf-8') as f:
        results = json.load(f)['results']
    expect(results, p.told())
    for r in results:
        expect(r['wrong'] == (0 if '--verify' in args else None), f'wrong: {r["wrong"]}: {p.told()}')
        expect(r['transport'] == transport, r['transport'])
        expect(r['emulated'] is (transport == 'rdma'), f'{transport}: emulated {r["emulated"]}')
    return results


def verified(lab, op, count, timeout):
    results = perf(lab, 'rdma', 'bw', '--op', op, '--sizes', '1..64K:log', '--verify', '--iters', count, '--repeats',
                   '1', timeout=timeout)
    return f'{count} transfers, 0 wrong, {results[0]["gbytes_s"]:.3f} GB/s'


OPS = ('send', 'write', 'write_imm', 'read')


def verify_parts(count, timeout):
    return lambda lab: [(op, lambda op=op: verified(lab, op, count, timeout)) for op in OPS]


for verify_name, verify_hosts, verify_count, verify_long, verify_s in (
        ('verify', 1, 10000, False, 30), ('verify-long', 1, 100000, True, 200),
        ('verify-two', 2, 1000, False, 30), ('verify-two-long', 2, 10000, True, 120)):
    CASES[verify_name] = Case(verify_name, f'{verify_count} checked transfers of each operation, sizes to 64 KiB',
                              verify_hosts, verify_long, verify_s * len(OPS), None,
                              verify_parts(verify_count, verify_s))


@case('perf between the machines: latency over rdma and tcp', hosts=2)
def perf_two(lab):
    said = []
    for transport in ('rdma', 'tcp'):
        results = perf(lab, transport, 'lat', '--sizes', '64,4K', '--iters', '300', '--repeats', '1', timeout=30)
        said.append(f'{transport} 64 B {results[0]["half_rtt_us"]["p50"]:.0f} us')
    return ', '.join(said)


def link_local(machine):
    """The address that an interface has by itself, once the kernel has found nobody else to have it."""
    for _ in range(60):
        for line in machine.run('cat', '/proc/net/if_inet6').out.splitlines():
            digits, _, _, _, flags, name = line.split()
            if digits.startswith('fe80') and not int(flags, 16) & IFA_F_TENTATIVE:
                return '[%s%%%s]' % (ipaddress.ip_address(bytes.fromhex(digits)), name)
        machine.run('sleep', '0.5')
    raise Failed('no interface has a link-local address')


@case('perf between the machines by link-local IPv6 addresses', hosts=2, seconds=90)
def perf_ipv6(lab):
    address = link_local(lab.peer)
    link_local(lab.here)
    said = [address]
    for transport in ('rdma', 'tcp'):
        results = perf(lab, transport, 'lat', '--sizes', '64', '--iters', '300', '--repeats', '1', '--raw', timeout=30,
                       address=address)
        with open(os.path.join(lab.out, 'perf.json'), encoding='utf-8') as f:
            detail = json.load(f)['manifest']['perf']['detail']
        expect(transport == 'tcp' or re.search(r'GID \d+ fe80:', detail), f'no IPv6 GID: {detail}')
        said.append(f'{transport} 64 B {results[0]["half_rtt_us"]["p50"]:.0f} us')
    return ', '.join(said)


@case('perf while netem delays and loses packets: slow, and nothing wrong', hosts=2, seconds=90)
def perf_lossy(lab):
    with Lossy(lab):
        for op in ('send', 'write'):
            results = perf(lab, 'rdma', 'bw', '--op', op, '--sizes', '4K', '--verify', '--iters', '500', '--repeats',
                           '1', timeout=45)
            expect(results[0]['gbytes_s'] > 0, 'no bandwidth')


# ---- peers that go ----

def lose_perf(lab, signum):
    """A perf whose listening end is sent a signal while both work: the driver ends with a sentence that names it."""
    here, there = key_files(lab)
    listener, url = listening(lab.peer, lab.program, 'perf', '--listen', f'rdma://{lab.peer.address}:0', '--key-file',
                              there)
    driver = lab.here.start(lab.program, 'perf', 'lat', '--sizes', '64', '--duration', '300s', '--connect', url,
                            '--key-file', here)
    listener.works(0.5)
    driver.works(0.5)
    listener.signal(signum)
    driver.end(DEADLINE_S)
    expect(driver.status not in (0, None) and driver.status > 0, driver.told())
    expect(lab.peer.address in driver.err or 'rdma://' in driver.err, f'the peer is not named: {driver.told()}')
    return driver.err.strip().splitlines()[-1]


def lost_peers(lab):
    return [(f'{name} of perf', lambda s=s: lose_perf(lab, s)) for name, s in (('SIGKILL', signal.SIGKILL),
                                                                              ('SIGSTOP', signal.SIGSTOP))]


for lost_name, lost_hosts in (('lost-peer', 1), ('lost-peer-two', 2)):
    CASES[lost_name] = Case(lost_name, 'a peer that is killed or stopped is reported', lost_hosts, False,
                            4 * DEADLINE_S, None, lost_peers)


@case('a server that dies in the middle of a sweep over rdma', seconds=90)
def lost_server(lab):
    """What was measured is kept, the rows are INVALID with the reason, the program ends."""
    key, _ = key_files(lab)
    server, url = serving(lab, lab.here, 'rdma', key)
    p = lab.here.start(lab.program, 'sweep', '--config', os.path.join(lab.root, 'configs', 'lab.yaml'), '--runs',
                       '100000', '--output-dir', os.path.join(lab.out, 'lost'), '--model-root',
                       os.path.join(lab.root, 'tests', 'fixtures'), '--server', url, '--key-file', key)
    p.says(r'measuring \d+ blocks')
    p.works(1)
    server.signal(signal.SIGKILL)
    p.end(DEADLINE_S)
    expect(p.status == 1 and 'gone' in p.out + p.err, p.told())
    return (p.err.strip() or p.out.strip()).splitlines()[-1]


# ---- other programs on the same device ----

@case('ib_send_lat and ib_write_bw against ours, in turn', seconds=500, long=True)
def peers(lab):
    path = os.path.join(lab.out, 'peers.json')
    p = lab.here.run(os.path.join(lab.root, 'tools', 'peers'), 'rdma', '--program', lab.program, '--rdma-address',
                     lab.here.address, '--rounds', str(PEERS_ROUNDS), '--json', path, timeout=500, status=None)
    expect(p.status in (0, 1), p.told())
    return p.out.strip()[-1500:]
