"""On other hosts, simulated by tests/hosts/launcher.py, the guard works as documented, or refuses and says why."""

# ruff: noqa: E501 - programs within strings

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import launcher
import pytest
from harness import PYTHON, ROOT, Host, Namespace, Outcome, Sinks, run_unconfined

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(not ROOT, reason="needs supervisors of its own, and so mount namespaces"),
]


@contextlib.contextmanager
def on(name: str, folder: Path, policy: dict[str, Any]) -> Iterator[Host]:
    """A confined process on the simulated host ``name``."""
    namespace = Namespace()
    namespace.prefix += launcher.prefix(name)
    try:
        host = Host(policy, folder / "evidence", namespace)
        try:
            yield host
        finally:
            host.close()
    finally:
        namespace.close()


def granting(sinks: Sinks, **more: Any) -> dict[str, Any]:
    port = sinks.address("granted")
    allow = [f"127.0.0.1:{port}", f"unix://{sinks.address('unix_granted')}"]
    return {"egress": {"allow": allow, **more}}


def python(program: str, *arguments: object) -> list[str]:
    return [PYTHON, "-I", "-S", "-c", program, *map(str, arguments)]


RINGS = pytest.mark.parametrize("ring", ["actor", "call"])

_EGRESS = """
import asyncio, json, os, socket, sys
granted, denied, unix = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
token = sys.argv[4].encode()
s = socket.create_connection(('127.0.0.1', granted)); s.send(token + b'1'); s.close()
u = socket.socket(socket.AF_UNIX); u.connect(unix); u.send(token)
async def through():
    _, writer = await asyncio.open_connection('127.0.0.1', granted)
    writer.write(token + b'2'); await writer.drain(); writer.close(); await writer.wait_closed()
asyncio.run(through())
child = os.fork()
if child == 0:
    s = socket.create_connection(('127.0.0.1', granted)); s.sendmsg([token + b'3']); os._exit(0)
os.waitpid(child, 0)
try: socket.create_connection(('127.0.0.1', denied)).send(token); said = 'connected'
except OSError as error: said = error.errno
print(json.dumps({'said': said}))
"""


def judge_egress(sinks: Sinks, outcome: Outcome, token: str) -> None:
    """What was granted arrived, what was not did not."""
    assert outcome.said == {"said": 13}, outcome
    sinks.flush("tcp")
    sinks.flush("granted")
    data = sinks.seen("granted")[1].decode()
    assert all(f"{token}{n}" in data for n in "123")
    assert token in sinks.seen("unix_granted")[1].decode()
    assert token not in sinks.seen("tcp")[1].decode()


def told(sinks: Sinks) -> list[object]:
    return [sinks.address("granted"), sinks.address("tcp"), sinks.address("unix_granted")]


def test_unconfined_it_arrives(sinks: Sinks) -> None:
    outcome = run_unconfined(python(_EGRESS, *told(sinks), "control"))
    assert outcome.said == {"said": "connected"}
    sinks.flush("tcp")
    assert "control" in sinks.seen("tcp")[1].decode()


# ---------------------------------------------------------------------------------------------------------------------
# Docker, containerd, Kubernetes: no descriptor can be taken


@pytest.fixture(scope="module")
def docker(sinks: Sinks, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    # Ports that the kernel hands out may be bound again by number: a common way to find a free one.
    low, high = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    with on("docker", tmp_path_factory.mktemp("docker"), granting(sinks, listen=[f"{low}-{high}"])) as host:
        yield host


def test_the_simulated_host_refuses_what_docker_refuses() -> None:
    program = (
        "import os; from ray_guard.kernel import libc; r, w = os.pipe(); pid = os.fork() or os.read(r, 1);"
        "print(libc.pidfd_getfd(os.pidfd_open(pid), 1)); os.write(w, b'x')"
    )
    command = [PYTHON, "-c", program]
    real = subprocess.run(command, capture_output=True, text=True, timeout=20)
    simulated = subprocess.run([*launcher.prefix("docker"), *command], capture_output=True, text=True, timeout=20)
    assert int(real.stdout) >= 0
    assert int(simulated.stdout) == -1
    assert subprocess.run([*launcher.prefix("docker"), "unshare", "-n", "true"], capture_output=True).returncode != 0


@RINGS
def test_docker_egress(sinks: Sinks, docker: Host, ring: str) -> None:
    judge_egress(sinks, docker.run(ring, python(_EGRESS, *told(sinks), f"docker-{ring}")), f"docker-{ring}")


_SOCKETS = """
import errno, json, os, select, socket, struct, sys, time
port, denied = int(sys.argv[1]), int(sys.argv[2])
granted = ('127.0.0.1', port)
found = {}
s = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
found['nonblocking'] = s.getblocking() is False
found['cloexec'] = not s.get_inheritable()
s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1); s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 50000)
poll = select.epoll(); poll.register(s, select.EPOLLOUT)
s.bind(('127.0.0.1', 0)); bound = s.getsockname()
first = s.connect_ex(granted)
while not poll.poll(5): pass
time.sleep(0.05)
found['connected'] = first in (0, errno.EINPROGRESS) and s.getpeername() == granted
found['asked again'] = [s.connect_ex(granted), s.connect_ex(granted)] in ([0, errno.EISCONN], [errno.EISCONN] * 2)
found['bound as before'] = s.getsockname() == bound
found['options'] = bool(s.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)) and s.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 100000
copy = os.dup(s.fileno()); found['copy'] = os.write(copy, b'x') == 1

# a free port is looked for, closed, and used: nobody may still hold it
free = socket.socket(); free.bind(('127.0.0.1', 0)); where = free.getsockname(); free.close()
again = socket.socket(); again.bind(where); found['port is free again'] = again.getsockname() == where
# a connect that fails, and then another on the same socket
t = socket.socket()
failed = [t.connect_ex(('127.0.0.1', denied)), t.connect_ex(granted)]
found['after a refusal'] = failed == [errno.EACCES, 0]
many = 3000
for _ in range(many): socket.socket().close()
found['many'] = True
held = [socket.socket() for _ in range(500)]
held[499].connect(granted); found['the last of many'] = held[499].getpeername() == granted
file = open('/dev/null')
try: socket.socket(fileno=os.dup(file.fileno()))
except OSError as error: found['no socket'] = error.errno == errno.ENOTSOCK
a, b = socket.socketpair()
b.close()
try: a.sendmsg([b'x']); found['pair'] = False
except BrokenPipeError: found['pair'] = True
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
try: u.connect(('127.0.0.1', denied)); u.send(b'x'); found['mute'] = False
except OSError: found['mute'] = True
print(json.dumps(found))
"""


@RINGS
def test_docker_sockets_stay_what_the_target_made_of_them(sinks: Sinks, docker: Host, ring: str) -> None:
    outcome = docker.run(ring, python(_SOCKETS, sinks.address("granted"), sinks.address("udp")), timeout=40)
    found = outcome.said
    assert len(found) >= 13, outcome
    assert [name for name, holds in found.items() if not holds] == []


_CLOSES = """
import socket, sys, time
s = socket.create_connection(('127.0.0.1', int(sys.argv[1])))
s.sendall(b'x')
assert s.recv(1) == b'y'
s.close()  # and lives on: the peer must see the end all the same
time.sleep(1.5)
"""


@RINGS
def test_docker_a_close_is_seen_at_once(tmp_path: Path, ring: str) -> None:
    """The supervisor's copy is let go when the socket is connected: kept, it would suppress the FIN."""
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    ends: list[float] = []

    def serve() -> None:
        peer, _ = server.accept()
        with peer:
            assert peer.recv(1) == b"x"
            peer.sendall(b"y")
            answered = time.monotonic()
            peer.settimeout(5)
            assert peer.recv(1) == b""
            ends.append(time.monotonic() - answered)

    thread = threading.Thread(target=serve)
    thread.start()
    with on("docker", tmp_path, {"egress": {"allow": [f"127.0.0.1:{port}"]}}) as host:
        assert host.run(ring, python(_CLOSES, port)).status == 0
    thread.join(10)
    server.close()
    assert ends
    assert ends[0] < 1.0  # the process lived 1.5 s longer


@pytest.mark.parametrize(
    ("policy", "key"),
    [
        ({"egress": {"allow": ["udp://127.0.0.1:9"]}}, "egress.allow"),
        (
            {"egress": {"allow": ["127.0.0.1:9"]}, "budgets": {"actor": {"egress_bytes": 1000}}},
            "budgets.actor.egress_bytes",
        ),
    ],
)
def test_docker_what_cannot_be_held_is_refused_by_name(tmp_path: Path, policy: dict[str, Any], key: str) -> None:
    with pytest.raises(RuntimeError, match=f"NotEnforced.*{key}.*pidfd_getfd"), on("docker", tmp_path, policy):
        pass


def test_docker_doctor_says_limited() -> None:
    command = [*launcher.prefix("docker"), PYTHON, "-m", "ray_guard.cli", "doctor"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    (egress,) = [line for line in said.splitlines() if line.startswith("egress ")]
    assert "enforced (limited: pidfd_getfd)" in egress


# ---------------------------------------------------------------------------------------------------------------------
# an ordinary user: as such, under Kubernetes' "restricted", under Yama


@pytest.fixture(scope="module", params=launcher.UNPRIVILEGED)
def nobody(request: pytest.FixtureRequest, sinks: Sinks) -> Iterator[tuple[str, Host]]:
    """(host, a confined process of a user without any right on it)"""
    for each in (sinks.folder, *sinks.folder.parents):
        if each.stat().st_uid == 0 and each != Path("/"):
            os.chmod(each, each.stat().st_mode | 0o011)
    os.chmod(sinks.address("unix_granted"), 0o777)
    home = tempfile.mkdtemp(prefix="ray_guard_nobody_", dir="/tmp")
    os.chown(home, 65534, 65534)
    try:
        with on(request.param, Path(home), granting(sinks)) as host:
            yield request.param, host
    finally:
        shutil.rmtree(home, ignore_errors=True)


_INSIDE = """
import os, socket
result = [os.getuid()]
for port in (granted, denied):
    try:
        with socket.create_connection(('127.0.0.1', port)) as sock: sock.send(token.encode())
        result.append(0)
    except OSError as error: result.append(error.errno)
"""


def test_an_ordinary_users_own_process(sinks: Sinks, nobody: tuple[str, Host]) -> None:
    name, host = nobody
    told = {"granted": sinks.address("granted"), "denied": sinks.address("tcp"), "token": f"own-{name}"}
    assert host.inside(_INSIDE, **told) == [65534, 0, 13]
    sinks.flush("tcp")
    sinks.flush("granted")
    assert f"own-{name}" in sinks.seen("granted")[1].decode()
    assert f"own-{name}" not in sinks.seen("tcp")[1].decode()


def test_an_ordinary_users_tool(sinks: Sinks, nobody: tuple[str, Host]) -> None:
    name, host = nobody
    judge_egress(sinks, host.run("call", python(_EGRESS, *told(sinks), f"tool-{name}")), f"tool-{name}")


def test_an_ordinary_users_child(sinks: Sinks, nobody: tuple[str, Host]) -> None:
    """Under Yama a process is readable for those it has named, and its children have named nobody: nothing is let out."""
    name, host = nobody
    outcome = host.run("actor", python(_EGRESS, *told(sinks), f"child-{name}"))
    if name != "yama":
        judge_egress(sinks, outcome, f"child-{name}")
        return
    assert "PermissionError: [Errno 1]" in outcome.stderr, outcome
    for sink in ("granted", "tcp"):
        sinks.flush(sink)
        assert f"child-{name}" not in sinks.seen(sink)[1].decode()


# ---------------------------------------------------------------------------------------------------------------------
# others


def test_a_listener_that_is_present_already_is_said(sinks: Sinks, tmp_path: Path) -> None:
    said = r"NotEnforced.*seccomp\.listener.*another sandbox"
    with pytest.raises(RuntimeError, match=said), on("listener", tmp_path, granting(sinks)):
        pass


@pytest.mark.parametrize("name", ["landlock-none", "landlock-4"])
def test_without_signal_scopes_tools_are_refused_and_the_actor_holds(sinks: Sinks, tmp_path: Path, name: str) -> None:
    """Below ABI 6 a tool could signal its leader; without Landlock it could write the memory of its actor."""
    with on(name, tmp_path, granting(sinks)) as host:
        judge_egress(sinks, host.run("actor", python(_EGRESS, *told(sinks), name)), name)
        with pytest.raises(AssertionError, match=r"NotEnforced.*processes\.scope.*Landlock"):
            host.run("call", ["true"])


def test_the_simulated_landlock_is_the_fourth() -> None:
    command = [
        *launcher.prefix("landlock-4"),
        PYTHON,
        "-c",
        "from ray_guard.kernel import landlock; print(landlock.abi())",
    ]
    assert subprocess.run(command, capture_output=True, text=True, timeout=30).stdout == "4\n"
