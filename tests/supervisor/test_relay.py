"""The relay: byte caps of calls and episodes hold on the byte, and otherwise nobody notices it is there."""

# ruff: noqa: E501 - programs within strings

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from far_ends import Crowded, Peer, answer, echo, hold, pour, reset, swallow
from harness import PYTHON, ROOT, Host, Namespace, Outcome, needs, wait

pytestmark = pytest.mark.kernel

Span = dict[str, Any]
HUGE = 1 << 40


@contextlib.contextmanager
def host(folder: Path, allow: list[str], budgets: dict[str, Any], **more: Any) -> Iterator[Host]:
    with contextlib.ExitStack() as stack:
        namespace = Namespace()
        stack.callback(namespace.close)
        made = Host({"egress": {"allow": allow}, "budgets": budgets, **more}, folder / "evidence", namespace)
        stack.callback(made.close)
        yield made


@contextlib.contextmanager
def served(serve: Callable[[Peer, socket.socket], None], family: int = socket.AF_INET) -> Iterator[Peer]:
    peer = Peer(serve, family)
    try:
        yield peer
    finally:
        peer.close()


@pytest.fixture(scope="module")
def capped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Every loopback port granted, under a call cap that is never reached: everything goes by relay."""
    allow = ["127.0.0.1:1-65535", "[::1]:1-65535"]
    with host(tmp_path_factory.mktemp("relay"), allow, {"call": {"egress_bytes": HUGE}}) as made:
        yield made


def tool(confined: Host, program: str, *arguments: object, timeout: float = 30) -> Outcome:
    argv = [PYTHON, "-I", "-S", "-c", "import errno, os, select, socket, struct, sys, threading, time\n" + program]
    return confined.run("call", argv + [str(each) for each in arguments], timeout=timeout)


def flows(confined: Host, port: int) -> list[Span]:
    """The ended flows to ``port``."""
    spans = [span for span in confined.journal() if span["name"] == "egress connect"]
    return [s for s in spans if s["ended"] and s["attributes"].get("network.peer.port") == port]


def wait_for_flows(confined: Host, port: int, number: int) -> list[Span]:
    ended: list[Span] = wait(lambda: (f := flows(confined, port)) and len(f) == number and f, "not all have ended")
    return ended


def counts(confined: Host, port: int, number: int) -> tuple[int, int]:
    """(sent, received) over the flows to ``port`` once that many have ended; each must have been relayed."""
    ended = wait_for_flows(confined, port, number)
    assert {s["attributes"].get("ray_guard.egress.route") for s in ended} == {"relay"}
    assert not [s for s in ended if s["attributes"].get("ray_guard.egress.bytes_exact") is False]
    return (
        sum(s["attributes"]["ray_guard.egress.bytes_sent"] for s in ended),
        sum(s["attributes"]["ray_guard.egress.bytes_received"] for s in ended),
    )


def violations(confined: Host) -> set[str]:
    spans = [s for s in confined.journal() if s["name"] == "ray_guard.violation"]
    return {s["attributes"]["ray_guard.violation.kind"] for s in spans}


# ---------------------------------------------------------------------------------------------------------------------
# caps

_SENDING = """
port, how, most = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
sock = socket.create_connection(('127.0.0.1', port))
block = bytes(65536)
file = open('/proc/self/exe', 'rb')
sent, deadline = 0, time.monotonic() + 15
try:
    if how == 'zerocopy': sock.setsockopt(1, 60, 1)
    while sent < most and time.monotonic() < deadline:
        if how == 'send': sent += sock.send(block)
        elif how == 'sendfile': sent += os.sendfile(sock.fileno(), file.fileno(), 0, 1 << 16)
        elif how == 'splice':
            r, w = os.pipe(); os.write(w, block); sent += os.splice(r, sock.fileno(), 65536); os.close(r); os.close(w)
        elif how == 'zerocopy': sent += sock.send(block, 0x4000000)
        elif how == 'sendmsg': sent += sock.sendmsg([block, block[:5]])
    print('never stopped')
except OSError as error: print(type(error).__name__)
"""


@pytest.mark.parametrize("how", ["send", "sendfile", "splice", "zerocopy", "sendmsg"])
def test_not_one_byte_more_is_sent(tmp_path: Path, how: str) -> None:
    cap = 3_000_001
    with served(swallow) as peer:
        with host(tmp_path, [f"127.0.0.1:{peer.port}"], {"actor": {"egress_bytes": HUGE}}) as unlimited:
            unlimited.run("call", [PYTHON, "-I", "-S", "-c", "import os, socket, sys, time\n" + _SENDING, str(peer.port), how, str(2 * cap)])  # fmt: skip
            wait(lambda: peer.received > cap, "the positive control: without a call cap more goes out")
        peer.received = 0
        with host(tmp_path / "capped", [f"127.0.0.1:{peer.port}"], {"call": {"egress_bytes": cap}}) as confined:
            outcome = tool(confined, _SENDING, peer.port, how, HUGE)
            assert outcome.stdout.strip() in ("ConnectionResetError", "BrokenPipeError")
            assert counts(confined, peer.port, 1) == (cap, 0)
            wait(lambda: peer.received >= cap, "what was within the cap has not arrived")
            assert peer.received == cap
            assert violations(confined) == {"egress_bytes"}


def test_not_one_byte_more_is_received(tmp_path: Path) -> None:
    program = """
sock = socket.create_connection(('127.0.0.1', int(sys.argv[1])))
got = 0
try:
    while chunk := sock.recv(1 << 16): got += len(chunk)
except ConnectionResetError: pass
print(got)
"""
    cap = 2_345_678
    with served(pour) as peer, host(tmp_path, [f"127.0.0.1:{peer.port}"], {"episode": {"egress_received_bytes": cap}}) as confined:  # fmt: skip
        code = """
with ray_guard.episode(id='r', group='g', iteration=1):
    result = ray_guard.run(argv, capture_output=True, text=True).stdout
"""
        argv = [PYTHON, "-I", "-S", "-c", "import socket, sys\n" + program, str(peer.port)]
        assert int(confined.inside(code, argv=argv)) == cap
        assert counts(confined, peer.port, 1) == (0, cap)
        assert violations(confined) == {"egress_received_bytes"}


def test_many_short_flows_share_the_cap(tmp_path: Path) -> None:
    """Each flow sends little and is answered; the sum over all of them, both ways, is the cap exactly."""
    program = """
port, lock, total = int(sys.argv[1]), threading.Lock(), [0, 0]
def work():
    for _ in range(40):
        try:
            with socket.create_connection(('127.0.0.1', port)) as sock:
                sock.settimeout(5); sock.sendall(bytes(777)); got = 0
                while got < 777:
                    chunk = sock.recv(1000)
                    if not chunk: break
                    got += len(chunk)
        except (ConnectionError, PermissionError): pass
threads = [threading.Thread(target=work) for _ in range(6)]
[thread.start() for thread in threads]; [thread.join() for thread in threads]
"""
    cap = 100_000
    with served(echo) as peer, host(tmp_path, [f"127.0.0.1:{peer.port}"], {"call": {"egress_bytes": cap}}) as confined:
        assert tool(confined, program, peer.port).status == 0
        time.sleep(0.3)
        ended = [s for s in flows(confined, peer.port) if s["attributes"]["ray_guard.egress.decision"] == "allow"]
        sent = sum(s["attributes"]["ray_guard.egress.bytes_sent"] for s in ended)
        received = sum(s["attributes"]["ray_guard.egress.bytes_received"] for s in ended)
        assert sent + received == cap
        assert peer.received == sent


def test_calls_at_once_share_the_cap_of_their_episode(tmp_path: Path) -> None:
    cap = 5_000_000
    code = """
import threading
def one():
    with ray_guard.tool_call('send', {}):
        ray_guard.run(argv, capture_output=True)
with ray_guard.episode(id='r', group='g', iteration=1) as episode:
    import contextvars
    threads = [threading.Thread(target=contextvars.copy_context().run, args=(one,)) for _ in range(4)]
    [thread.start() for thread in threads]; [thread.join() for thread in threads]
"""
    budgets = {"episode": {"egress_bytes": cap}, "call": {"egress_bytes": 4_000_000}}
    with served(swallow) as peer, host(tmp_path, [f"127.0.0.1:{peer.port}"], budgets) as confined:
        argv = [
            PYTHON,
            "-I",
            "-S",
            "-c",
            "import os, socket, sys, time\n" + _SENDING,
            str(peer.port),
            "send",
            str(HUGE),
        ]
        confined.inside(code, argv=argv)
        sent = [s["attributes"].get("ray_guard.egress.bytes_sent", 0) for s in wait_for_flows(confined, peer.port, 4)]
        assert sum(sent) == cap
        assert peer.received == cap


def test_an_idle_flow_keeps_nobody_out(tmp_path: Path) -> None:
    """A flow that has moved a byte and holds still must leave the rest of the cap to the next, and the cap is whole."""
    program = """
port = int(sys.argv[1])
idle = [socket.create_connection(('127.0.0.1', port)) for _ in range(10)]
for sock in idle: sock.sendall(b'x'); assert sock.recv(1) == b'x'
sock = socket.create_connection(('127.0.0.1', port))
sent = 0
try:
    while True: sent += sock.send(bytes(100)); got = sock.recv(100, socket.MSG_WAITALL); assert got
except (OSError, AssertionError): pass
"""
    cap = 20_020
    with served(echo) as peer, host(tmp_path, [f"127.0.0.1:{peer.port}"], {"call": {"egress_bytes": cap}}) as confined:
        tool(confined, program, peer.port)
        assert sum(counts(confined, peer.port, 11)) == cap


# ---------------------------------------------------------------------------------------------------------------------
# nobody notices

_UPLOAD = """
import hashlib
family, size = int(sys.argv[1]), int(sys.argv[3])
sock = socket.socket(family); sock.connect((sys.argv[4], int(sys.argv[2])))
block = os.urandom(1 << 20); digest = hashlib.sha256()
while size: part = block[:size]; sock.sendall(part); digest.update(part); size -= len(part)
sock.shutdown(socket.SHUT_WR)
answer = sock.recv(32, socket.MSG_WAITALL)
print('whole' if answer == digest.digest() and sock.recv(1) == b'' else 'broken')
"""


@pytest.mark.parametrize(
    ("listening", "family", "address"),
    [
        (socket.AF_INET, socket.AF_INET, "127.0.0.1"),
        (socket.AF_INET6, socket.AF_INET6, "::1"),
        (socket.AF_INET, socket.AF_INET6, "::ffff:127.0.0.1"),
    ],
)
def test_an_upload_arrives_whole(capped: Host, listening: int, family: int, address: str) -> None:
    size = (64 << 20) + 12_345 if address == "127.0.0.1" else 3 << 20
    with served(swallow, listening) as peer:
        outcome = tool(capped, _UPLOAD, int(family), peer.port, size, address)
        assert outcome.stdout == "whole\n", outcome
        assert counts(capped, peer.port, 1) == (size, 32)


def test_many_flows_at_once(capped: Host) -> None:
    """Blocking and nonblocking, echoed, each with its own bytes."""
    program = """
port, bad = int(sys.argv[1]), []
def work(n):
    for k in range(10):
        sock = socket.socket()
        if n % 2:
            sock.setblocking(False); sock.connect_ex(('127.0.0.1', port))
            select.select([], [sock], [], 5); assert sock.getsockopt(1, 4) == 0
            sock.setblocking(True)
        else: sock.connect(('127.0.0.1', port))
        mine = os.urandom(5000 + n)
        sock.sendall(mine); got = sock.recv(len(mine), socket.MSG_WAITALL)
        if got != mine: bad.append(n)
        sock.close()
threads = [threading.Thread(target=work, args=(n,)) for n in range(20)]
[thread.start() for thread in threads]; [thread.join() for thread in threads]
print(bad)
"""
    with served(echo) as peer:
        outcome = tool(capped, program, peer.port)
        assert outcome.stdout == "[]\n", outcome
        expected = sum(10 * (5000 + n) for n in range(20))
        assert counts(capped, peer.port, 200) == (expected, expected)


@pytest.mark.parametrize("direction", ["client first", "server first"])
def test_half_close(capped: Host, direction: str) -> None:
    program = """
sock = socket.create_connection(('127.0.0.1', int(sys.argv[1])))
if sys.argv[2] == 'client first':
    sock.sendall(b'question'); sock.shutdown(socket.SHUT_WR)
    answer = b''
    while chunk := sock.recv(1 << 16): answer += chunk
    print(answer.split()[0].decode(), len(answer))
else:
    assert sock.recv(10) == b''
    sock.sendall(bytes(100_000)); sock.shutdown(socket.SHUT_WR); print('8 100002')
"""

    def shut_first(peer: Peer, sock: socket.socket) -> None:
        sock.shutdown(socket.SHUT_WR)
        while chunk := sock.recv(1 << 16):
            peer.took(len(chunk))

    with served(answer if direction == "client first" else shut_first) as peer:
        outcome = tool(capped, program, peer.port, direction)
        assert outcome.stdout == "8 100002\n", outcome
        expected = (8, 100_002) if direction == "client first" else (100_000, 0)
        assert counts(capped, peer.port, 1) == expected
        assert peer.received == expected[0]


def test_a_reset_is_passed_on_behind_what_came_before(capped: Host) -> None:
    program = """
sock = socket.create_connection(('127.0.0.1', int(sys.argv[1])))
time.sleep(0.4)
print(sock.recv(100).decode())
try: print(sock.recv(100))
except ConnectionResetError: print('reset')
"""
    with served(reset) as peer:
        assert tool(capped, program, peer.port).stdout == "so far\nreset\n"


def test_a_reset_by_the_tool_is_passed_on(capped: Host) -> None:
    program = """
sock = socket.create_connection(('127.0.0.1', int(sys.argv[1])))
sock.sendall(b'x'); assert sock.recv(1) == b'x'
sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0)); sock.close()
time.sleep(0.2)
"""
    with served(echo) as peer:
        assert tool(capped, program, peer.port).status == 0
        wait(lambda: peer.errors == ["ConnectionResetError"], "the server saw no reset")


def test_a_slow_reader_holds_the_sender_up(capped: Host) -> None:
    """No buffer grows: while the server reads nothing, the tool cannot write more than sockets and a pipe hold."""
    program = """
sock = socket.create_connection(('127.0.0.1', int(sys.argv[1])))
sock.setblocking(False)
block, sent, began = bytes(1 << 16), 0, time.monotonic()
while time.monotonic() < began + 0.7:
    try: sent += sock.send(block)
    except BlockingIOError: time.sleep(0.01)
print(sent)
"""
    with served(hold) as peer:
        outcome = tool(capped, program, peer.port)
        sent = int(outcome.stdout)
        assert sent < 64 << 20
        # The tool has ended with all of it still under way: it arrives all the same.
        assert counts(capped, peer.port, 1)[0] <= sent


# ---------------------------------------------------------------------------------------------------------------------
# connecting

_CONNECTING = """
port, how = int(sys.argv[1]), sys.argv[2]
sock = socket.socket()
if how == 'timeout': sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack('qq', 0, 300_000))
if how == 'nonblocking': sock.setblocking(False)
began = time.monotonic()
code = sock.connect_ex(('127.0.0.1', port))
if code == errno.EINPROGRESS and how == 'nonblocking':
    poll = select.epoll(); poll.register(sock, select.EPOLLOUT)
    assert time.monotonic() - began < 0.3, 'a nonblocking connect has blocked'
    again = sock.connect_ex(('127.0.0.1', port))
    assert again in (errno.EALREADY, 0, errno.ECONNREFUSED, errno.EISCONN), again
    if again == errno.EALREADY: print(poll.poll(20)[0][1] & ~select.EPOLLRDHUP)
    code = again if again == errno.ECONNREFUSED else sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
print(errno.errorcode.get(code, code), sock.connect_ex(('127.0.0.1', port)) if code == 0 else '')
if code == 0: sock.settimeout(5); sock.sendall(b'through'); print(sock.recv(10).decode())
"""


@pytest.mark.parametrize("how", ["blocking", "nonblocking"])
def test_a_refused_connect_is_refused(capped: Host, how: str) -> None:
    closed = socket.socket()
    closed.bind(("127.0.0.1", 0))
    with closed:
        outcome = tool(capped, _CONNECTING, closed.getsockname()[1], how)
        assert outcome.stdout.split()[-1] == "ECONNREFUSED", outcome


@pytest.mark.parametrize("how", ["blocking", "nonblocking"])
def test_a_slow_upstream_is_waited_for(capped: Host, how: str) -> None:
    crowded = Crowded()
    accepted: list[socket.socket] = []

    def open_late() -> None:
        time.sleep(0.5)
        sock = crowded.open()
        accepted.append(sock)
        sock.sendall(sock.recv(100))

    thread = threading.Thread(target=open_late)
    thread.start()
    outcome = tool(capped, _CONNECTING, crowded.port, how)
    thread.join()
    assert outcome.stdout.split() == (["4"] if how == "nonblocking" else []) + ["0", {"blocking": "106", "nonblocking": "0"}[how], "through"], outcome  # fmt: skip
    assert counts(capped, crowded.port, 1) == (7, 7)
    accepted[0].close()
    crowded.close()


def test_a_slow_upstream_that_refuses_in_the_end(capped: Host) -> None:
    crowded = Crowded()
    threading.Timer(0.5, crowded.close).start()
    outcome = tool(capped, _CONNECTING, crowded.port, "nonblocking")
    assert outcome.stdout.split()[-1] == "ECONNREFUSED", outcome


def test_a_blocking_connect_keeps_its_own_time_limit(capped: Host) -> None:
    crowded = Crowded()
    outcome = tool(capped, _CONNECTING, crowded.port, "timeout")
    assert outcome.stdout.split() == ["EINPROGRESS"], outcome
    assert outcome.seconds < 3
    crowded.close()


def test_a_slow_upstream_holds_up_nobody_else(capped: Host) -> None:
    program = """
slow, port = int(sys.argv[1]), int(sys.argv[2])
waiting = []
for _ in range(20):
    sock = socket.socket(); sock.setblocking(False); sock.connect_ex(('127.0.0.1', slow)); waiting.append(sock)
thread = threading.Thread(target=lambda: socket.socket().connect_ex(('127.0.0.1', slow)), daemon=True); thread.start()
began = time.monotonic()
for _ in range(50):
    with socket.create_connection(('127.0.0.1', port)) as sock: sock.sendall(b'x'); assert sock.recv(1) == b'x'
print(time.monotonic() - began < 15, flush=True)  # the slow ones take minutes
os._exit(0)
"""
    crowded = Crowded()
    with served(echo) as peer:
        outcome = tool(capped, program, crowded.port, peer.port)
        assert outcome.stdout == "True\n", outcome
    crowded.close()


@needs("pidfd_getfd")
def test_a_socket_is_used_again_after_af_unspec(capped: Host) -> None:
    program = """
import ctypes
sock = socket.socket()
for size in (1000, 2000, 3000):
    sock.connect(('127.0.0.1', int(sys.argv[1]))); sock.sendall(bytes(size)); sock.recv(size, socket.MSG_WAITALL)
    ctypes.CDLL(None).connect(sock.fileno(), struct.pack('=H14x', 0), 16)
"""
    with served(echo) as peer:
        assert tool(capped, program, peer.port).status == 0
        assert counts(capped, peer.port, 3) == (6000, 6000)


def test_a_bound_socket_leaves_by_its_address(capped: Host) -> None:
    program = """
sock = socket.socket(); sock.bind(('127.0.0.7', 0)); sock.connect(('127.0.0.1', int(sys.argv[1])))
sock.sendall(b'x'); assert sock.recv(1) == b'x'; print(sock.getsockname()[0])
"""
    with served(echo) as peer:
        assert tool(capped, program, peer.port).stdout == "127.0.0.7\n"
        assert peer.peers[0][0] == "127.0.0.7"


def test_the_span_names_the_address_that_others_saw(capped: Host) -> None:
    with served(echo) as peer:
        tool(capped, "socket.create_connection(('127.0.0.1', int(sys.argv[1]))).sendall(b'x'); time.sleep(0.1)", peer.port)  # fmt: skip
        counts(capped, peer.port, 1)
        (span,) = flows(capped, peer.port)
        found = span["attributes"]
        assert (found["network.local.address"], found["network.local.port"]) == peer.peers[0]


# ---------------------------------------------------------------------------------------------------------------------
# strangers, and ends


def doors(supervisor: int) -> list[int]:
    """Ports that the supervisor itself listens on."""
    inodes = {os.readlink(f"/proc/{supervisor}/fd/{fd}") for fd in os.listdir(f"/proc/{supervisor}/fd")}
    with open(f"/proc/{supervisor}/net/tcp") as file:
        fields = [line.split() for line in file.readlines()[1:]]
    return [int(each[1].split(":")[1], 16) for each in fields if each[3] == "0A" and f"socket:[{each[9]}]" in inodes]


@pytest.mark.skipif(not ROOT, reason="an unprivileged user cannot see what the supervisor listens on")
def test_nobody_comes_in_by_the_relays_own_ports(capped: Host) -> None:
    with served(echo) as peer:
        once = "with socket.create_connection(('127.0.0.1', int(sys.argv[1]))) as s: s.sendall(b'x'); s.recv(1)"
        assert tool(capped, once, peer.port).status == 0
        # Beside the door stand for a moment the waiting rooms of calls that have ended.
        wait(lambda: len(doors(capped.supervisor)) == 1, "one door", 20)
        ports = doors(capped.supervisor)
        before = peer.connections
        # Although the policy lists every port of loopback:
        program = """
for port in sys.argv[1:]:
    try: socket.create_connection(('127.0.0.1', int(port)), timeout=2); print('connected')
    except OSError as error: print(type(error).__name__)
"""
        assert set(tool(capped, program, *ports).stdout.split()) == {"PermissionError"}
        # Nor anybody on this host who is not confined:
        for port in ports:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=0.3) as sock:
                sock.settimeout(2)
                assert sock.recv(1) == b""  # or a reset
                pytest.fail("a stranger was let in")
        assert tool(capped, once, peer.port).status == 0, "and those who may still do"
        assert peer.connections == before + 1


def test_what_a_call_leaves_open_is_cut(capped: Host) -> None:
    program = """
if os.fork(): os._exit(0)
os.setsid()
sock = socket.create_connection(('127.0.0.1', int(sys.argv[1])))
while True: sock.send(b'still here'); time.sleep(0.01)
"""
    with served(swallow) as peer:
        tool(capped, program + "", peer.port)
        sent, _ = counts(capped, peer.port, 1) if peer.connections else (0, 0)
        assert peer.received == sent


def test_flows_of_a_call_in_process_end_with_it(capped: Host) -> None:
    code = """
import socket
with ray_guard.episode(id='r', group='g', iteration=1):
    with ray_guard.tool_call('inside', {}):
        sock = socket.create_connection(('127.0.0.1', port))
        sock.sendall(b'x'); assert sock.recv(1) == b'x'
    import time; time.sleep(0.2)
    try: sock.sendall(b'y'); result = repr(sock.recv(1))
    except OSError as error: result = type(error).__name__
"""
    with served(echo) as peer:
        assert capped.inside(code, port=peer.port) in ("ConnectionResetError", "BrokenPipeError")
        assert counts(capped, peer.port, 1) == (1, 1)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def movers(supervisor: int) -> list[int]:
    """The helpers that move the bytes of this supervisor's flows: children of its zygote."""
    found = []
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with contextlib.suppress(OSError):
            named = Path(f"/proc/{pid}/comm").read_text().strip() == "ray-guard-mover"
            if named and parent(parent(pid)) == supervisor:
                found.append(pid)
    return found


def test_without_its_mover_a_flow_ends_and_the_next_has_a_new_one(tmp_path: Path) -> None:
    cap = 50_000_000
    program = """
sock = socket.create_connection(('127.0.0.1', int(sys.argv[1])))
try:
    while True: sock.send(bytes(1000)); time.sleep(0.001)
except OSError as error: print(type(error).__name__)
with socket.create_connection(('127.0.0.1', int(sys.argv[1]))) as sock: sock.sendall(b'x'); sock.shutdown(1); print(len(sock.recv(32)))
"""
    with served(swallow) as peer, host(tmp_path, [f"127.0.0.1:{peer.port}"], {"call": {"egress_bytes": cap}}) as confined:  # fmt: skip

        def kill() -> None:
            wait(lambda: movers(confined.supervisor) and peer.received > 0, "no mover")
            for pid in movers(confined.supervisor):
                os.kill(pid, 9)

        thread = threading.Thread(target=kill)
        thread.start()
        outcome = tool(confined, program, peer.port)
        thread.join()
        first, second = outcome.stdout.split()
        assert first in ("ConnectionResetError", "BrokenPipeError")
        assert second == "32"
        ended = wait(lambda: (f := flows(confined, peer.port)) and len(f) == 2 and f, "not ended")
        assert [s["attributes"].get("ray_guard.egress.bytes_exact", True) for s in ended] == [False, True]


@pytest.mark.skipif(not ROOT, reason="an unprivileged user has one supervisor, which others of these tests use")
def test_when_the_supervisor_dies_relayed_flows_end(tmp_path: Path) -> None:
    program = """
sock = socket.create_connection(('127.0.0.1', int(sys.argv[1])))
while True: sock.send(bytes(1000)); time.sleep(0.001)
"""
    with served(swallow) as peer, host(tmp_path, [f"127.0.0.1:{peer.port}"], {"call": {"egress_bytes": HUGE}}) as confined:  # fmt: skip

        def kill() -> None:
            wait(lambda: peer.received > 0, "nothing came")
            os.kill(confined.supervisor, 9)

        thread = threading.Thread(target=kill)
        thread.start()
        with contextlib.suppress(AssertionError, BrokenPipeError, OSError):
            tool(confined, program, peer.port)
        thread.join()
        wait(lambda: peer.hashes or peer.errors, "the flow went on")


# ---------------------------------------------------------------------------------------------------------------------
# what is spoken

_SPEAKING = """
sock = socket.create_connection(('127.0.0.1', int(sys.argv[1])))
try:
    for byte in sys.argv[2].encode(): sock.sendall(bytes([byte]))
    sock.shutdown(socket.SHUT_WR); print('answered' if sock.recv(1) else 'closed')
except OSError as error: print(type(error).__name__)
"""
_STRATUM = '{"id": 1, "method": "mining.subscribe", "params": []}\n'


@pytest.mark.parametrize(("says", "tag"), [(_STRATUM, "stratum"), ("SSH-2.0-OpenSSH_9.6\r\n", "ssh")])
def test_miners_and_tunnels_on_a_port_that_is_open_for_something_else(tmp_path: Path, says: str, tag: str) -> None:
    with served(swallow) as peer, contextlib.ExitStack() as stack:
        budgets = {"call": {"egress_bytes": HUGE}}
        plain = stack.enter_context(host(tmp_path / "tcp", [f"tcp://127.0.0.1:{peer.port}"], budgets))
        assert tool(plain, _SPEAKING, peer.port, says).stdout == "answered\n", "a rule that says tcp:// means anything"
        assert peer.received == len(says)
        counts(plain, peer.port, 1)
        (span,) = flows(plain, peer.port)
        assert span["attributes"]["ray_guard.egress.protocol"] == tag
        peer.received = 0
        confined = stack.enter_context(host(tmp_path / "plain", [f"127.0.0.1:{peer.port}"], budgets))
        assert tool(confined, _SPEAKING, peer.port, says).stdout.strip() in ("ConnectionResetError", "BrokenPipeError")
        counts(confined, peer.port, 1)
        (span,) = flows(confined, peer.port)
        assert span["attributes"]["error.type"] == f"{tag}_not_allowed"
        assert peer.received < len(says.strip()), "the line that tells must not arrive whole"
        found = [s["attributes"] for s in confined.journal() if s["name"] == "ray_guard.violation"]
        assert [each["error.type"] for each in found] == [f"{tag}_not_allowed"]


def test_what_is_spoken_is_on_the_span(capped: Host) -> None:
    with served(swallow) as peer:
        tool(capped, _SPEAKING, peer.port, "GET / HTTP/1.1\r\n\r\n")
        counts(capped, peer.port, 1)
        (span,) = flows(capped, peer.port)
        assert span["attributes"]["ray_guard.egress.protocol"] == "http"
