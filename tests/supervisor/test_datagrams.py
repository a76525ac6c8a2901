"""UDP under a limit of bytes: each datagram is counted before it is handed on, both ways. The judge is the far end."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import PYTHON, UNREADABLE, Host, Namespace, lacks, needs, wait

pytestmark = [pytest.mark.kernel, needs("pidfd_getfd")]  # else udp:// is refused


class Echo:
    """Answers each datagram with one ``factor`` times as long; counts what comes."""

    def __init__(self, factor: int = 1) -> None:
        self.received = self.datagrams = 0
        self._factor = factor
        self._sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        self._sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self._sock.bind(("::", 0))
        self.port: int = self._sock.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            data, peer = self._sock.recvfrom(1 << 16)
            if data == b"over":
                return
            self.received += len(data)
            self.datagrams += 1
            for _ in range(self._factor):
                self._sock.sendto(data, peer)

    def close(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"over", ("127.0.0.1", self.port))
        self._thread.join(5)
        self._sock.close()


@contextlib.contextmanager
def echo(factor: int = 1) -> Iterator[Echo]:
    made = Echo(factor)
    try:
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def capped(folder: Path, port: int, **limits: int) -> Iterator[Host]:
    allow = [f"udp://127.0.0.1:{port}", f"udp://[::1]:{port}"]
    namespace = Namespace()
    host = Host({"egress": {"allow": allow}, "budgets": {"call": limits}}, folder / "evidence", namespace)
    try:
        yield host
    finally:
        host.close()
        namespace.close()


def python(program: str, *arguments: object) -> list[str]:
    return [
        PYTHON,
        "-I",
        "-S",
        "-c",
        "import errno, os, socket, sys\nP = int(sys.argv[1])\n" + program,
        *map(str, arguments),
    ]


_TALK = """
said = []
for family, host in ((2, '127.0.0.1'), (10, '::1'), (10, '::ffff:127.0.0.1')):
    for bound in (False, True):
        for connected in (True, False):
            sock = socket.socket(family, 2); sock.settimeout(10)
            if bound: sock.bind(('', 0))
            if connected: sock.connect((host, P))
            for n in range(3):
                mine = os.urandom(100 + n)
                if connected: sock.send(mine)
                elif n == 1: sock.sendmsg([mine[:50], mine[50:]], [], 0, (host, P))
                else: sock.sendto(mine, (host, P))
                said.append(sock.recv(999) == mine)
print(len(said), all(said))
"""


@pytest.mark.parametrize("ring", ["call", "actor"])
def test_both_ways_by_every_kind_of_socket(tmp_path: Path, ring: str) -> None:
    if ring == "actor" and lacks(UNREADABLE):
        pytest.skip(UNREADABLE)
    with echo() as far, capped(tmp_path, far.port, egress_bytes=1 << 20) as host:
        assert host.run(ring, python(_TALK, far.port)).stdout == "36 True\n"
        assert far.received == 12 * 303
        host.close()

        def ended() -> Any:
            spans = [span for span in host.journal() if span["name"] == "egress connect" and span["ended"]]
            counted = [
                [s["attributes"].get(f"ray_guard.egress.bytes_{way}") for way in ("sent", "received")] for s in spans
            ]
            return counted if sum(sent or 0 for sent, _ in counted) >= far.received else None

        found = wait(ended, f"what was counted: {host.journal()}")
        assert [sum(column) for column in zip(*found, strict=True)] == [far.received] * 2


_SPEND = """
def quietly(act, *arguments):
    try: return act(*arguments)
    except OSError as error: return error.errno
there = ('127.0.0.1', P)
one = socket.socket(2, 2); one.connect(there)
two = socket.socket(2, 2)
three = socket.socket(2, 2); quietly(three.setsockopt, 17, 103, 90); three.connect(there)  # UDP_SEGMENT
read, write = os.pipe()
for _ in range(40):
    quietly(one.send, bytes(70)); quietly(two.sendto, bytes(70), there); quietly(three.send, bytes(900))
    os.write(write, bytes(50)); quietly(os.splice, read, one.fileno(), 50)
    four = socket.socket(2, 2); quietly(four.connect, there); quietly(four.send, bytes(70)); four.close()
"""


def test_no_byte_is_sent_past_the_limit(tmp_path: Path) -> None:
    with echo() as far, capped(tmp_path, far.port, egress_sent_bytes=2000) as host:
        host.run("call", python(_SPEND, far.port))
        host.close()
        assert 2000 - 90 <= far.received <= 2000
    with echo() as far, capped(tmp_path / "control", far.port, egress_sent_bytes=1 << 20) as host:
        host.run("call", python(_SPEND, far.port))
        assert far.received > 10_000, "the attack does not even work"


_HEAR = """
import select
there = ('127.0.0.1', P)
one = socket.socket(2, 2); one.connect(there)
two = socket.socket(2, 2); two.bind(('', 0))
for _ in range(5):
    try: one.send(bytes(10)); two.sendto(bytes(10), there)
    except OSError: pass  # nothing follows what had no room
got, expected = 0, int(sys.argv[2])
while ready := select.select([one, two], [], [], 10 if got < expected else 0.3)[0]:
    try: got += len(ready[0].recv(999))
    except OSError: pass
print(got)
"""


@pytest.mark.parametrize(("limit", "heard"), [(1 << 20, 1000), (155, 150)])
def test_no_byte_is_received_past_the_limit(tmp_path: Path, limit: int, heard: int) -> None:
    with echo(factor=10) as far, capped(tmp_path, far.port, egress_received_bytes=limit) as host:
        assert host.run("call", python(_HEAR, far.port, heard)).stdout == f"{heard}\n"


def test_nobody_outside_reaches_a_socket_that_is_counted(tmp_path: Path) -> None:
    program = """
sock = socket.socket(2, 2); sock.bind(('', 0)); sock.settimeout(10)
sock.sendto(b'first', ('127.0.0.1', P)); sock.recv(9)
print(sock.getsockname()[0])
"""
    with echo() as far, capped(tmp_path, far.port, egress_bytes=1 << 20) as host:
        assert host.run("call", python(program, far.port)).stdout == "127.0.0.1\n"
