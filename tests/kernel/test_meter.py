"""The meter where no descriptor can be taken: who holds a flow past its cap ends with it."""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
from collections.abc import Callable, Iterator

import pytest

from ray_guard.egress.meter import Flow, Meter
from ray_guard.kernel.sock_diag import SO_COOKIE, SockDiag
from ray_guard.supervisor.loop import Loop

pytestmark = pytest.mark.kernel


class _Capped:
    """Whoever owns the flow: it has room for so many bytes."""

    capped = True

    def __init__(self, room: int) -> None:
        self.room = room

    def progressed(self, sent: int, received: int) -> bool:
        self.room -= sent + received
        return self.room >= 0

    def ended(self, flow: Flow, *, exact: bool) -> None: ...


@pytest.fixture
def diag() -> Iterator[SockDiag]:
    found = SockDiag()
    yield found
    found.close()


@pytest.mark.parametrize(("room", "lives"), [(1 << 30, True), (1000, False)])
def test_the_holder_of_a_flow_past_its_cap_is_killed(
    diag: SockDiag, room: int, lives: bool, request: pytest.FixtureRequest
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        told, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            sock = socket.create_connection(server.getsockname())
            (cookie,) = struct.unpack("=Q", sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8))
            os.write(tell, b"%d %d" % (cookie, sock.fileno()))
            while True:
                sock.sendall(bytes(4096))
        request.addfinalizer(lambda: _end(pid))
        peer, _ = server.accept()
    cookie, number = map(int, os.read(told, 64).split())
    loop = Loop()
    meter = Meter(diag, loop, lambda: None, borrows=False)
    meter.begin(Flow(cookie, "127.0.0.1", 1, (pid, number), _Capped(room), pid))
    pidfd = os.pidfd_open(pid)
    over: list[bool] = []
    stop: Callable[[bool], None] = lambda ended: (over.append(ended), loop.stop())[1]  # noqa: E731
    loop.watch(pidfd, select.EPOLLIN, lambda _events: stop(True))
    loop.later(0.5, lambda: stop(False))
    with peer:
        peer.setblocking(False)

        def take(_events: int) -> None:
            peer.recv(1 << 20)

        loop.watch(peer.fileno(), select.EPOLLIN, take)
        loop.run()
        loop.forget(peer.fileno())
    assert over[0] is not lives


def _end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
