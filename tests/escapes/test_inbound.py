"""Ways to be reached: bind, listen, listen without bind, datagrams nobody asked for; sending from a bound port is free."""

# ruff: noqa: E501 - programs within strings

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import (
    PYTHON,
    ROOT,
    UNREADABLE,
    Attack,
    Host,
    Namespace,
    Stage,
    cases,
    escape,
    lacks,
    needs,
    skip_without,
)

from ray_guard.kernel import mounting

pytestmark = pytest.mark.kernel

_words: dict[str, str] = {}
"""What each attack would have been told from outside, by its token: who knows the word was reached."""


@contextlib.contextmanager
def _caller(told: dict[str, Any]) -> Iterator[None]:
    """Outside: as soon as the attack says where it can be reached, somebody calls there and tells it a word."""
    word = _words[told["token"]] = secrets.token_hex(8)
    where = Path(told["folder"], "where")
    over = threading.Event()

    def call() -> None:
        while not over.wait(0.005):
            try:
                kind, address = json.loads(where.read_text())
            except (OSError, ValueError):
                continue
            family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
            with contextlib.suppress(OSError), socket.socket(family, kind) as sock:
                sock.settimeout(1)
                sock.connect(address if isinstance(address, str) else ("127.0.0.1", address))
                sock.send(word.encode())
                if kind == socket.SOCK_STREAM:
                    sock.recv(1)  # until it is closed there

    thread = threading.Thread(target=call)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(5)


def _reached(told: dict[str, Any]) -> str:
    try:
        got = Path(told["folder"], "got").read_text()
    except FileNotFoundError:
        return ""
    return "it was reached from outside" if got == _words[told["token"]] else ""


_RECEIVE = """
where = sock.getsockname()
where = where[1] if isinstance(where, tuple) else where.decode() if isinstance(where, bytes) else where
with open(os.path.join(A['folder'], 'part'), 'w') as file:
    json.dump([sock.type & 0xf, where], file)
os.rename(file.name, os.path.join(A['folder'], 'where'))
sock.settimeout(0.6)
got = sock.recv(99) if sock.type & 0xf == DGRAM else sock.accept()[0].recv(99)
with open(os.path.join(A['folder'], 'got'), 'wb') as file:
    file.write(got)
"""


def _listening(name: str, body: str, *refused: str, **more: Any) -> Attack:
    """The harm is that somebody outside reached it."""
    lines = "\n".join("    " + line for line in (body.strip() + _RECEIVE).splitlines())
    return Attack(
        name, f"def main():\n{lines}\n", sink="", refused=refused, judge=_reached, beside=_caller, **more
    )  # fmt: skip


_FREE_PORT = """
spare = socket.socket(); spare.bind(('127.0.0.1', 0)); port = spare.getsockname()[1]; spare.close()
"""

INBOUND = [
    _listening(
        "bind and listen",
        _FREE_PORT + "sock = socket.socket(); sock.bind(('127.0.0.1', port)); sock.listen()",
        "EPERM",
    ),
    _listening(
        "bind all and listen", _FREE_PORT + "sock = socket.socket(); sock.bind(('', port)); sock.listen()", "EPERM"
    ),
    _listening("listen without bind", "sock = socket.socket(); sock.listen()", "EPERM"),
    _listening("bind port 0 and listen", "sock = socket.socket(); sock.bind(('', 0)); sock.listen()", "EPERM"),
    _listening(
        "IPv6 bind port 0 and listen", "sock = socket.socket(AF_INET6); sock.bind(('::', 0)); sock.listen()", "EPERM"
    ),
    _listening("listen by raw system call", "sock = socket.socket(); call(50, sock.fileno(), 1)", "EPERM"),
    _listening(
        "listen by a descriptor passed to a child",
        """
ours, theirs = socket.socketpair()
if os.fork() == 0:
    _, (descriptor,), _, _ = socket.recv_fds(theirs, 1, 1)
    try: call(50, descriptor, 1)
    except OSError as error: os._exit(error.errno)
    os._exit(0)
sock = socket.socket(); sock.bind(('', 0))
socket.send_fds(ours, [b'x'], [sock.fileno()])
status = os.waitstatus_to_exitcode(os.wait()[1])
if status: raise OSError(status, 'refused')
""",
        "EPERM",
    ),
    _listening("MPTCP listen", "sock = socket.socket(AF_INET, STREAM, 262); sock.listen()", "EPROTONOSUPPORT"),
    _listening(
        "UDP bind", _FREE_PORT + "sock = socket.socket(AF_INET, DGRAM); sock.bind(('127.0.0.1', port))", "EPERM"
    ),
    _listening(
        "UDP port shared by SO_REUSEPORT",
        _FREE_PORT + "sock = socket.socket(AF_INET, DGRAM); sock.setsockopt(1, 15, 1); sock.bind(('127.0.0.1', port))",
        "EPERM",
    ),
    _listening(
        "UDP datagrams to a port of the kernel's choice",  # free to send from, but not for everybody to send to
        "sock = socket.socket(AF_INET, DGRAM); sock.bind(('', 0))",
        "ETIMEDOUT",  # it hears nobody
        "EPERM",  # or is not bound, where that takes a right the supervisor has not
        rings=("actor", "call"),
    ),
    _listening(
        "IPv6 UDP datagrams to a port of the kernel's choice",
        "sock = socket.socket(AF_INET6, DGRAM); sock.bind(('::', 0))",
        "ETIMEDOUT",  # it hears nobody
        "EPERM",  # or is not bound, where that takes a right the supervisor has not
        rings=("actor", "call"),
    ),
    _listening(
        "UDP after the filter against datagrams was taken off",
        """
sock = socket.socket(AF_INET, DGRAM); sock.bind(('', 0))
try: sock.setsockopt(1, 27, 0)  # SO_DETACH_FILTER
except OSError: pass
try: sock.setsockopt(1, 26, struct.pack('HxxxxxxP', 1, ctypes.addressof(ctypes.create_string_buffer(struct.pack('=HBBI', 6, 0, 0, 0xffff), 8))))
except OSError: pass
""",
        "ETIMEDOUT",  # it hears nobody
        "EPERM",  # or is not bound, where that takes a right the supervisor has not
        rings=("actor", "call"),
    ),
    _listening(
        "UDP with a filter of one's own, locked beforehand",
        """
sock = socket.socket(AF_INET, DGRAM)
code = ctypes.create_string_buffer(struct.pack('=HBBI', 6, 0, 0, 0xffff), 8)
try: sock.setsockopt(1, 26, struct.pack('HxxxxxxP', 1, ctypes.addressof(code)))
except OSError: pass
try: sock.setsockopt(1, 44, 1)  # SO_LOCK_FILTER: for good
except OSError: pass
sock.bind(('', 0))
""",
        "ETIMEDOUT",
        "EPERM",
        rings=("actor", "call"),
    ),
    _listening(
        "abstract unix bind",
        "sock = socket.socket(AF_UNIX); sock.bind('\\0ray_guard_' + A['token']); sock.listen()",
        "EACCES",
    ),
    _listening("autobound unix address", "sock = socket.socket(AF_UNIX); sock.bind(''); sock.listen()", "EACCES"),
]


@cases(INBOUND, "inbound")
def test_inbound(stage: Stage, attack: Attack, ring: str) -> None:
    escape(stage, attack, ring)


@contextlib.contextmanager
def _opening_at_once(told: dict[str, Any]) -> Iterator[None]:
    """Outside: a socket that connects to the attack's port again and again, from a port the attack knows."""
    _words[told["token"]] = secrets.token_hex(8)
    over = threading.Event()
    file = Path(told["folder"], "where")

    def call() -> None:
        with socket.socket() as first:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
        Path(told["folder"], "peer.part").write_text(str(port))
        os.rename(Path(told["folder"], "peer.part"), Path(told["folder"], "peer"))
        while not over.is_set():
            try:
                there = int(file.read_text())
            except (OSError, ValueError):
                continue
            with contextlib.suppress(OSError), socket.socket() as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.settimeout(0.5)
                sock.bind(("127.0.0.1", port))
                sock.connect(("127.0.0.1", there))
                sock.send(_words[told["token"]].encode())
                sock.recv(1)

    thread = threading.Thread(target=call)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(5)


SIMULTANEOUS = Attack(
    "simultaneous open",
    """
def main():
    # Two that connect to each other at the same moment need no listener.
    over = time.monotonic() + 4
    while not os.path.exists(A['folder'] + '/peer'): time.sleep(0.001)
    peer = int(open(A['folder'] + '/peer').read())
    first = socket.socket(); first.bind(('127.0.0.1', 0)); port = first.getsockname()[1]; first.close()
    port = port
    open(A['folder'] + '/part', 'w').write(str(port)); os.rename(A['folder'] + '/part', A['folder'] + '/where')
    failed = None
    while time.monotonic() < over:
        sock = socket.socket(); sock.setsockopt(1, 2, 1)
        try:
            sock.bind(('127.0.0.1', port))
            sock.connect(('127.0.0.1', peer))
            sock.settimeout(0.5)
            got = sock.recv(99)
            if got:
                open(A['folder'] + '/got', 'wb').write(got)
                return
        except OSError as error:
            failed = error
            if error.errno in (errno.EACCES, errno.EPERM): raise
        sock.close()
    say(missing='two connects never met: %s' % failed)
""",
    sink="",
    refused=("EACCES", "EPERM"),
    judge=_reached,
    beside=_opening_at_once,
)


@cases([SIMULTANEOUS], "inbound")
def test_simultaneous_open(stage: Stage, attack: Attack, ring: str) -> None:
    escape(stage, attack, ring)


@pytest.mark.parametrize("ring", ["actor", "call"])
def test_a_port_of_ones_own_to_send_from_is_free(stage: Stage, ring: str) -> None:
    if ring == "actor":
        skip_without(UNREADABLE)
    program = """
import socket, sys
sock = socket.socket()
sock.bind(('127.0.0.1', 0))
own = sock.getsockname()
sock.connect(('127.0.0.1', int(sys.argv[1])))
print(sock.getsockname() == own and own[1] > 0)
"""
    argv = [PYTHON, "-I", "-S", "-c", program, str(stage.sinks.address("granted"))]
    assert stage.host().run(ring, argv).stdout == "True\n"


@pytest.mark.parametrize("ring", ["actor", "call"])
def test_own_unix_sockets_work(stage: Stage, ring: str) -> None:
    """What a call binds itself it may connect to: multiprocessing, ssh's ControlMaster, language servers."""
    if ring == "actor":
        skip_without(UNREADABLE)
    program = """
import os, socket, sys
path = os.path.join(sys.argv[1], 's')
for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
    server = socket.socket(socket.AF_UNIX, kind); server.bind(path); server.listen()
    client = socket.socket(socket.AF_UNIX, kind); client.connect(path)
    server.accept()[0].send(b'hello'); print(client.recv(9).decode(), oct(os.stat(path).st_mode & 0o777))
    os.unlink(path)
os.chdir(sys.argv[1]); os.umask(0o077)
server = socket.socket(socket.AF_UNIX); server.bind('relative'); server.listen()
client = socket.socket(socket.AF_UNIX); client.connect('./relative'); print(oct(os.stat('relative').st_mode & 0o777), server.getsockname())
"""
    with tempfile.TemporaryDirectory(dir=stage.folder) as folder:
        outcome = stage.host().run(ring, [PYTHON, "-I", "-S", "-c", "import os; os.umask(0o022)\n" + program, folder])
    assert outcome.stdout == "hello 0o755\nhello 0o755\n0o700 relative\n", outcome


def test_own_unix_sockets_work_beside_what_is_protected(stage: Stage, folder: Path) -> None:
    """An environment, or evidence, in the project's folder: an ordinary user's call has mounts there."""
    (folder / "kept").mkdir()
    program = """
import os, socket, sys
for where in (sys.argv[1], '/dev/shm', sys.argv[1] + '/kept', sys.argv[1] + '/evidence', os.path.dirname(sys.argv[1])):
    server = socket.socket(socket.AF_UNIX); client = socket.socket(socket.AF_UNIX); path = os.path.join(where, 's')
    try: server.bind(path); server.listen(); client.connect(path)
    except OSError as error: print(error.errno)
    else: print(oct(os.stat(path).st_mode))
"""
    files = {"read": ["system", "env"], "write": ["scratch", str(folder)], "protect": [str(folder / "kept")]}
    namespace = Namespace()
    host = Host({"egress": {"allow": []}, "files": files}, folder / "evidence", namespace)
    try:
        outcome = host.run("call", [PYTHON, "-I", "-S", "-c", program, str(folder)])
    finally:
        host.close()
        namespace.close()
    said = outcome.stdout.splitlines()
    if mounting.works() and not lacks("mount namespaces"):
        assert said[:2] == ["0o140755"] * 2, outcome
    assert len(said) == 5, outcome
    assert all(line.isdecimal() for line in said[2:]), outcome
    assert not (folder / "kept/s").exists()


@pytest.mark.skipif(not ROOT, reason="missing: root, to have a folder of another user")
def test_a_unix_socket_takes_no_capability_of_the_supervisor(stage: Stage, folder: Path) -> None:
    """Root's tool has none, and so makes nothing in another user's folder, not even by who binds for it."""
    os.chown(folder, 12345, 12345)
    program = "import socket, sys; sock = socket.socket(1); sock.bind(sys.argv[1] + '/s')"
    argv = [PYTHON, "-I", "-S", "-c", program, str(folder)]
    assert "PermissionError" in stage.host().run("call", argv).stderr
    assert not (folder / "s").exists()
    subprocess.run(argv, check=True)  # with its capabilities root does


@needs("pidfd_getfd")  # else no more than egress.made.HELD_LIMIT may be neither connected nor listening
@pytest.mark.parametrize("ring", ["actor", "call"])
def test_own_unix_sockets_may_come_and_go(stage: Stage, ring: str) -> None:
    """More of them than are remembered at a time: an actor lives long."""
    if ring == "actor":
        skip_without(UNREADABLE)
    program = """
import os, resource, socket, sys, time
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
path = os.path.join(sys.argv[1], 's')
kept = []
for n in range(1100):
    server = socket.socket(socket.AF_UNIX); server.bind(f'{path}{n}'); kept.append(server)
for n in range(1100): os.unlink(f'{path}{n}')
time.sleep(0.1)
server = socket.socket(socket.AF_UNIX); server.bind(path); server.listen()
client = socket.socket(socket.AF_UNIX); client.connect(path)
print('connected')
"""
    with tempfile.TemporaryDirectory(dir=stage.folder) as folder:
        assert stage.host().run(ring, [PYTHON, "-I", "-S", "-c", program, folder]).stdout == "connected\n"
