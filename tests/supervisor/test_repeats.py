"""A connect that repeats a granted one goes a shorter way, and must be granted nothing that the long way refuses."""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import PYTHON, Host, Namespace, run_unconfined, wait

pytestmark = pytest.mark.kernel

_ATTEMPTS = 5


class Both:
    """TCP and UDP at the same port; counts what comes by TCP."""

    def __init__(self) -> None:
        self._tcp = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._tcp.getsockname()[1]
        self._udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._udp.bind(("127.0.0.1", self.port))
        self._udp.settimeout(5)
        self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._tcp.accept()[0].close()
                self.connections += 1

    def datagram(self) -> bytes:
        return self._udp.recv(100)

    def close(self) -> None:
        self._tcp.close()
        self._udp.close()


@pytest.fixture
def both() -> Iterator[Both]:
    made = Both()
    yield made
    made.close()


@contextlib.contextmanager
def confined(folder: Path, allow: list[str]) -> Iterator[Host]:
    namespace = Namespace()
    host = Host({"egress": {"allow": allow}}, folder / "evidence", namespace)
    try:
        yield host
    finally:
        host.close()
        namespace.close()


_UDP_THEN_TCP = f"""
import socket, sys
there = ('127.0.0.1', int(sys.argv[1]))
for _ in range({_ATTEMPTS}):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(there); sock.send(b'udp')
for _ in range({_ATTEMPTS}):
    with socket.socket() as sock: print(sock.connect_ex(there))
"""


@pytest.mark.parametrize("ring", ["actor", "call"])
def test_a_grant_by_udp_is_none_by_tcp(both: Both, tmp_path: Path, ring: str) -> None:
    argv = [PYTHON, "-I", "-S", "-c", _UDP_THEN_TCP, str(both.port)]
    assert run_unconfined(argv).stdout.split() == ["0"] * _ATTEMPTS
    wait(lambda: both.connections == _ATTEMPTS, "the control did not arrive")
    assert [both.datagram() for _ in range(_ATTEMPTS)] == [b"udp"] * _ATTEMPTS
    with confined(tmp_path, [f"udp://127.0.0.1:{both.port}"]) as host:
        outcome = host.run(ring, argv)
        assert outcome.stdout.split() == [str(errno.EACCES)] * _ATTEMPTS, outcome
        assert both.datagram() == b"udp"
        assert both.connections == _ATTEMPTS  # the control's


_CONNECT = """
import socket
result = []
for _ in range(5):
    with socket.socket() as sock: result.append(sock.connect_ex(('127.0.0.1', port)))
"""


def test_a_stricter_policy_ends_the_short_way(both: Both, tmp_path: Path) -> None:
    with confined(tmp_path, [f"127.0.0.1:{both.port}"]) as host:
        found: Any = host.inside(_CONNECT, port=both.port)
        assert found == [0] * 5, found
        host.inside("import ray_guard; ray_guard.confine({'egress': {'allow': ['127.0.0.1:1']}}); result = 1")
        assert host.inside(_CONNECT, port=both.port) == [errno.EACCES] * 5
    assert both.connections == 5
