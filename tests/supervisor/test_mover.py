"""The mover itself, with real connections on either side: what gets upstream, and what never does.

The supervisor's side of its line is played by the test; the judge is the server, which keeps what it was sent.
"""

from __future__ import annotations

import json
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from far_ends import Peer, echo, swallow
from harness import wait

from ray_guard.egress.relay.mover import Mover
from ray_guard.kernel import seqpacket

pytestmark = pytest.mark.kernel

TLS = {"expected": {"tls": ["index.example.org"]}, "denied": [], "port": 443}
HTTP = {"expected": {"http": ["index.example.org"]}, "denied": [], "port": 80}
SSH = {"expected": {"ssh": ["git.example.org"]}, "denied": [], "port": 22}
UNVERIFIED = {"expected": {"tcp": ["index.example.org"]}, "denied": [], "port": 443}
ADDRESS = {"expected": {}, "denied": ["ssh", "stratum"], "port": 3333}


class Desk:
    """The supervisor's end of a mover's line. Grants what is asked, up to ``cap`` bytes in all."""

    def __init__(self) -> None:
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._line.settimeout(5)
        self._theirs = theirs
        self.cap = 0
        self.granted = 0
        self._number = 0
        self._thread = threading.Thread(target=Mover(theirs).run)
        self._thread.start()

    def flow(self, peer: Peer, speech: dict[str, Any], *, limited: bool = False) -> socket.socket:
        """Begins a flow to ``peer``; returns the tool's end."""
        with socket.create_server(("127.0.0.1", 0)) as door:
            tool = socket.create_connection(door.getsockname())
            ours, _ = door.accept()
        upstream = socket.create_connection(("127.0.0.1", peer.port))
        self._number += 1
        message = {"op": "flow", "flow": self._number, "lease": 1, "limited": [limited] * 2, "speech": speech}
        with ours, upstream:
            seqpacket.send(self._line, message, [ours.fileno(), upstream.fileno()])
        tool.settimeout(5)
        return tool

    def tell(self, **message: Any) -> None:
        seqpacket.send(self._line, {"flow": self._number, **message})

    def ended(self) -> dict[str, Any]:
        """Answers what is asked until a flow has ended: that message."""
        while True:
            received = seqpacket.receive(self._line)
            assert received is not None
            message = received[0]
            if message["op"] == "ended":
                return message
            if message["op"] == "need":
                amount = min(message["need"], self.cap - self.granted)
                self.granted += amount
                answer = {"op": "grant" if amount or not message["need"] else "spent", "amount": amount}
                self.tell(**answer, lease=message["lease"], kind=message["kind"])

    def close(self) -> None:
        self._line.close()
        self._thread.join(5)
        assert not self._thread.is_alive()
        self._theirs.close()


@pytest.fixture
def desk() -> Iterator[Desk]:
    made = Desk()
    yield made
    made.close()


@pytest.fixture
def sink() -> Iterator[Peer]:
    peer = Peer(swallow)
    yield peer
    peer.close()


def hello(name: str | None) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname=name).do_handshake()
    return outgoing.read()


GET = b"GET / HTTP/1.1\r\nHost: index.example.org\r\n\r\n"
FRONTED = b"GET / HTTP/1.1\r\nHost: evil.test\r\n\r\n"
STRATUM = json.dumps({"id": 1, "method": "mining.subscribe", "params": []}).encode() + b"\n"


@pytest.mark.parametrize(
    ("speech", "data", "found"),
    [
        (TLS, hello("index.example.org") + b"more" * 100_000, ("tls", True, "index.example.org")),
        (HTTP, GET * 3, ("http", True, "index.example.org")),
        (SSH, b"SSH-2.0-OpenSSH_9.6\r\n" + bytes(100_000), ("ssh", True, None)),
        (UNVERIFIED, STRATUM, ("stratum", False, None)),
        (UNVERIFIED, b"SSH-2.0-x\r\n", ("ssh", False, None)),
        (ADDRESS, b"anything at all", (None, None, None)),
        (ADDRESS, hello(None) + bytes(1 << 20), ("tls", None, None)),
    ],
)
@pytest.mark.parametrize("portion", [1, 50, 1 << 16])
def test_what_agrees_goes_upstream_whole(
    desk: Desk, sink: Peer, *, speech: dict[str, Any], data: bytes, found: tuple[Any, ...], portion: int
) -> None:
    with desk.flow(sink, speech) as tool:
        for at in range(0, 200, portion):
            tool.sendall(data[at : at + portion])
        tool.sendall(data[max(portion, 200) :])
        tool.shutdown(socket.SHUT_WR)
        if speech is not SSH:  # there, what this server answers is no banner
            assert len(tool.recv(32, socket.MSG_WAITALL)) == 32
        ended = desk.ended()
    assert sink.received == len(data) == ended["sent"]
    assert ended["protocol"] == found[0]
    assert (ended.get("verified"), ended.get("name")) == found[1:]


@pytest.mark.parametrize(
    ("speech", "data", "why"),
    [
        (TLS, hello(None), "sni_absent"),
        (TLS, hello("evil.test"), "sni_mismatch"),
        (TLS, b"SSH-2.0-OpenSSH_9.6\r\n", "not_tls"),
        (TLS, STRATUM, "not_tls"),
        (TLS, GET, "not_tls"),
        (HTTP, FRONTED, "host_mismatch"),
        (HTTP, b"CONNECT index.example.org:443 HTTP/1.1\r\nHost: index.example.org\r\n\r\n", "http_upgrade"),
        (HTTP, hello("index.example.org") + b"\r\n\r\n", "malformed_http"),
        (SSH, STRATUM, "not_ssh"),
        (ADDRESS, STRATUM, "stratum_not_allowed"),
        (ADDRESS, b"SSH-2.0-x\r\n", "ssh_not_allowed"),
    ],
)
@pytest.mark.parametrize("portion", [1, 1 << 16])
def test_what_does_not_agree_never_goes_upstream(
    desk: Desk, sink: Peer, *, speech: dict[str, Any], data: bytes, why: str, portion: int
) -> None:
    with desk.flow(sink, speech) as tool:
        tool.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        error: OSError | None = None
        try:
            for at in range(0, len(data), portion):
                tool.sendall(data[at : at + portion])
            tool.recv(10)
        except OSError as raised:
            error = raised
        ended = desk.ended()
    assert isinstance(error, ConnectionError), "the tool must be told"
    assert ended["why"] == why
    wait(lambda: sink.received == ended["sent"], "what was moved has not arrived")
    if speech is not ADDRESS:
        assert sink.received == 0
    else:  # that is looked at as it flows: the line that tells never gets there whole
        assert sink.received < len(data.rstrip())


def test_the_second_request_is_looked_at_too(desk: Desk, sink: Peer) -> None:
    with desk.flow(sink, HTTP) as tool:
        tool.sendall(GET)
        deadline = time.monotonic() + 5
        while sink.received < len(GET) and time.monotonic() < deadline:
            time.sleep(0.01)
        tool.sendall(FRONTED)
        assert desk.ended()["why"] == "host_mismatch"
    assert sink.received == len(GET)


def test_a_server_that_is_no_ssh_server_is_not_heard(desk: Desk) -> None:
    def speak(_peer: Peer, sock: socket.socket) -> None:
        sock.sendall(b"HTTP/1.1 200 OK\r\n" * 1000)
        sock.recv(1)

    peer = Peer(speak)
    with desk.flow(peer, SSH) as tool:
        assert desk.ended()["why"] == "not_ssh"
        with pytest.raises(ConnectionError):
            tool.recv(100)
    peer.close()


def test_a_server_may_show_what_the_client_hides(desk: Desk) -> None:
    """A reversed tunnel: the server is the one that says SSH first."""

    def speak(_peer: Peer, sock: socket.socket) -> None:
        sock.sendall(b"SSH-2.0-x\r\n")
        sock.recv(1)

    peer = Peer(speak)
    with desk.flow(peer, ADDRESS) as tool:
        assert desk.ended()["why"] == "ssh_not_allowed"
        with pytest.raises(ConnectionError):
            tool.recv(100)
    peer.close()


def test_both_directions_stop_on_the_byte(desk: Desk) -> None:
    peer = Peer(echo)
    desk.cap = 12_345
    with desk.flow(peer, ADDRESS, limited=True) as tool:
        thread = threading.Thread(target=_send_much, args=(tool,))
        thread.start()
        ended = desk.ended()
        got = 0
        try:
            while chunk := tool.recv(1000):
                got += len(chunk)
        except ConnectionError:
            pass
        thread.join()
    assert ended["why"] == "budget"
    assert ended["sent"] + ended["received"] <= desk.granted <= desk.cap
    assert peer.received == ended["sent"]
    assert got == ended["received"]
    peer.close()


def _send_much(tool: socket.socket) -> None:
    try:
        for _ in range(1000):
            tool.sendall(bytes(1000))
    except OSError:
        pass


def test_a_flow_that_holds_still_costs_nothing(desk: Desk, sink: Peer) -> None:
    tools = [desk.flow(sink, ADDRESS) for _ in range(300)]
    for tool in tools[:150]:
        tool.sendall(b"x")
    deadline = time.monotonic() + 5
    while sink.received < 150 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)  # usage has been told
    before = time.thread_time(), time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before[1] < 0.05
    for tool in tools:
        tool.close()
    for _ in tools:
        desk.ended()


def test_finishing_lets_out_what_was_written_and_nothing_else(desk: Desk, sink: Peer) -> None:
    with desk.flow(sink, ADDRESS) as tool:
        tool.sendall(b"before")
        tool.close()
        desk.tell(op="finish")
        assert desk.ended()["sent"] == 6
    assert sink.received == 6
    with desk.flow(sink, ADDRESS) as tool:
        tool.sendall(b"x")
        desk.tell(op="finish")
        began = time.monotonic()
        ended = desk.ended()
        assert ended["why"] == "ended"
        assert time.monotonic() - began < 1
        readable, _, _ = select.select([tool], [], [], 2)
        assert readable
        with pytest.raises(ConnectionError):
            tool.recv(1)
