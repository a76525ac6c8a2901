"""On other hosts, simulated by tests/hosts/launcher.py, the guard works as documented, or refuses and says why."""

# ruff: noqa: E501 - programs within strings

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import launcher
import pytest
from far_ends import Peer, swallow
from harness import PYTHON, ROOT, Host, Namespace, Outcome, Sinks, run_unconfined, wait

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(not ROOT, reason="needs supervisors of its own, and so mount namespaces"),
]


@contextlib.contextmanager
def on(name: str, folder: Path, policy: dict[str, Any], *, covered: str = "") -> Iterator[Host]:
    """A confined process on the simulated host ``name``; ``covered``: a folder that is empty there."""
    namespace = Namespace()
    if covered:
        subprocess.run([*namespace.outside, "mount", "-t", "tmpfs", "-o", "ro", "none", covered], check=True)
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


def test_docker_datagrams_to_others_are_refused_by_name(tmp_path: Path) -> None:
    policy = {"egress": {"allow": ["udp://127.0.0.1:9"]}}
    with pytest.raises(RuntimeError, match=r"NotEnforced.*egress\.allow.*pidfd_getfd"), on("docker", tmp_path, policy):
        pass


_POURS = """
import socket, sys
s = socket.create_connection(('127.0.0.1', int(sys.argv[1])))
try:
    for _ in range(64): s.sendall(bytes(4096))
except OSError: pass
"""


@RINGS
@pytest.mark.parametrize("scope", ["call", "actor", "job"])
def test_docker_a_byte_cap_holds_on_the_byte(tmp_path: Path, scope: str, ring: str) -> None:
    """No descriptor can be taken to cut a direct flow, so what is capped goes by relay."""
    if (scope, ring) == ("call", "actor"):
        pytest.skip("a child of the actor's own is no call")
    cap = 100_001
    with contextlib.closing(Peer(swallow)) as peer:
        assert run_unconfined(python(_POURS, peer.port)).status == 0
        wait(lambda: peer.received == 64 * 4096, "the control did not arrive")
        policy = {"egress": {"allow": [f"127.0.0.1:{peer.port}"]}, "budgets": {scope: {"egress_bytes": cap}}}
        with on("docker", tmp_path, policy) as host:
            host.run(ring, python(_POURS, peer.port))
            wait(lambda: peer.received == 64 * 4096 + cap, "the granted bytes did not arrive")
        assert peer.received == 64 * 4096 + cap


def test_docker_doctor_says_limited() -> None:
    command = [*launcher.prefix("docker"), PYTHON, "-m", "ray_guard.cli", "doctor"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    (egress,) = [line for line in said.splitlines() if line.startswith("egress ")]
    assert "enforced (limited: pidfd_getfd)" in egress
    (found,) = [line for line in said.splitlines() if line.startswith("pidfd_getfd ")]
    assert "no udp:// destinations" in found
    assert "capped" in found


# ---------------------------------------------------------------------------------------------------------------------
# an ordinary user: as such, under Kubernetes' "restricted", under Yama


def reachable(sinks: Sinks) -> None:
    """For everybody."""
    for each in (sinks.folder, *sinks.folder.parents):
        if each.stat().st_uid == 0 and each != Path("/"):
            os.chmod(each, each.stat().st_mode | 0o011)
    os.chmod(sinks.address("unix_granted"), 0o777)


@contextlib.contextmanager
def home() -> Iterator[Path]:
    """A folder of nobody's."""
    made = tempfile.mkdtemp(prefix="ray_guard_nobody_", dir="/tmp")
    os.chown(made, 65534, 65534)
    try:
        yield Path(made)
    finally:
        shutil.rmtree(made, ignore_errors=True)


@pytest.fixture(scope="module", params=["k8s", "unprivileged", "yama"])
def nobody(request: pytest.FixtureRequest, sinks: Sinks) -> Iterator[tuple[str, Host]]:
    """(host, a confined process of a user without any right on it)"""
    reachable(sinks)
    with home() as folder, on(request.param, folder, granting(sinks)) as host:
        yield request.param, host


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


def test_without_landlock_tools_are_refused_and_the_actor_holds(sinks: Sinks, tmp_path: Path) -> None:
    """A tool could write the memory of its actor, and any file of its user."""
    with on("landlock-none", tmp_path, granting(sinks)) as host:
        judge_egress(sinks, host.run("actor", python(_EGRESS, *told(sinks), "landlock-none")), "landlock-none")
        with pytest.raises(AssertionError, match=r"NotEnforced.*processes\.scope.*Landlock"):
            host.run("call", ["true"])


# ---------------------------------------------------------------------------------------------------------------------
# an older Landlock: filter and supervisor make up for it


OLDER = ("landlock-1", "landlock-4", "k8s-landlock-2")


@pytest.mark.parametrize("name", OLDER)
def test_the_simulated_landlock_is_older(name: str) -> None:
    program = "from ray_guard.kernel import landlock; print(landlock.abi())"
    done = subprocess.run([*launcher.prefix(name), PYTHON, "-c", program], capture_output=True, text=True, timeout=30)
    assert done.stdout == f"{name[-1]}\n"


@pytest.fixture(scope="module", params=OLDER)
def older(request: pytest.FixtureRequest, sinks: Sinks) -> Iterator[tuple[str, Host, Path]]:
    """(host, a confined process there, a folder of its user that tools may read and not write)"""
    reachable(sinks)
    with home() as folder:
        folder.chmod(0o755)  # a tool of root's has no capability to pass it by
        for each in ("readable", "work"):
            (folder / each).mkdir()
            (folder / each).chmod(0o777)
        files = {"read": ["system", "env", str(folder / "readable")], "write": ["scratch", str(folder / "work")]}
        with on(request.param, folder, {**granting(sinks), "files": files}) as host:
            yield request.param, host, folder


def test_an_older_landlock_egress(sinks: Sinks, older: tuple[str, Host, Path]) -> None:
    name, host, _ = older
    judge_egress(sinks, host.run("call", python(_EGRESS, *told(sinks), f"tool-{name}")), f"tool-{name}")


_SIGNALS = """
import ctypes, fcntl, json, os, socket, struct, sys
libc, said = ctypes.CDLL(None, use_errno=True), {}
P = int(sys.argv[1])
information = struct.pack('=iii', 10, 0, -1) + bytes(116)
def call(*arguments):
    if libc.syscall(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments)) < 0:
        raise OSError(ctypes.get_errno(), '')
def sigio(who):
    a, b = socket.socketpair()
    fcntl.fcntl(a, 10, 10); fcntl.fcntl(a, 8, who); fcntl.fcntl(a, 4, 0o20000); b.send(b'x')
for how, act in {
    'kill': lambda: os.kill(P, 10), 'killpg': lambda: os.killpg(P, 10), 'tkill': lambda: call(200, P, 10),
    'tgkill': lambda: call(234, P, P, 10), 'rt_sigqueueinfo': lambda: call(129, P, 10, information),
    'rt_tgsigqueueinfo': lambda: call(297, P, P, 10, information),
    'F_SETOWN': lambda: sigio(P), 'F_SETOWN group': lambda: sigio(-P),
}.items():
    try: act(); said[how] = 0
    except OSError as error: said[how] = error.errno
print(json.dumps(said))
"""
_VICTIM = """
import ctypes, os, signal, struct, sys, time
user = int(sys.argv[1])
os.setgroups([]); os.setresgid(user, user, user); os.setresuid(user, user, user)
os.setpgid(0, 0); ctypes.CDLL(None).capset(struct.pack('=Ii', 0x20080522, 0), bytes(24))
taken = 0
def take(*_):
    global taken; taken += 1
signal.signal(signal.SIGUSR1, take)
print(flush=True)
input()
print(taken, flush=True)
"""


def signalled(attack: Callable[[int], dict[str, Any]], user: int) -> tuple[dict[str, Any], bool]:
    """What ``attack`` said, and whether a process of that user beside it was signalled."""
    command = python(_VICTIM, user)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as victim:
        assert victim.stdin is not None
        assert victim.stdout is not None
        victim.stdout.readline()
        said = attack(victim.pid)
        victim.stdin.write("\n")
        victim.stdin.flush()
        return said, victim.stdout.readline() != "0\n"


def test_an_older_landlock_signals_stay_within_the_call(older: tuple[str, Host, Path]) -> None:
    _, host, _ = older
    said, harm = signalled(lambda pid: run_unconfined(python(_SIGNALS, pid)).said, 0)
    assert set(said.values()) == {0}
    assert harm
    user = os.stat(f"/proc/{host.pid}").st_uid
    said, harm = signalled(lambda pid: host.run("call", python(_SIGNALS, pid)).said, user)
    assert set(said.values()) == {errno.EPERM}
    assert not harm


_WITHIN = """
import ctypes, fcntl, json, os, signal, socket, struct, sys, threading, time
libc, found = ctypes.CDLL(None, use_errno=True), {}
def child():
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0); os.write(write, b'x'); time.sleep(30); os._exit(0)
    os.read(read, 1)
    return pid
def ended(pid): return os.WTERMSIG(os.waitpid(pid, 0)[1])
for how, send in {
    'kill': lambda pid: os.kill(pid, 15), 'killpg': lambda pid: os.killpg(pid, 15),
    'tgkill': lambda pid: libc.syscall(234, pid, pid, 15),
    'sigqueue': lambda pid: libc.syscall(129, pid, 15, struct.pack('=iii', 15, 0, -1) + bytes(116)),
}.items():
    pid = child(); send(pid); found[how] = ended(pid) == 15
taken = []
signal.signal(signal.SIGUSR1, lambda number, frame: taken.append(number))
os.kill(os.getpid(), 10); found['oneself'] = len(taken) == 1
os.kill(0, 10); found['own group'] = len(taken) == 2
os.killpg(os.getpgrp(), 10); found['own group by number'] = len(taken) == 3
signal.raise_signal(10); found['raise'] = len(taken) == 4
signal.pthread_kill(threading.main_thread().ident, 10); found['thread'] = len(taken) == 5
a, b = socket.socketpair()
fcntl.fcntl(a, 10, 10); fcntl.fcntl(a, 8, os.getpid()); fcntl.fcntl(a, 4, 0o20000); b.send(b'x')
time.sleep(0.05); found['F_SETOWN'] = len(taken) == 6
try: os.kill(99999999, 0)
except ProcessLookupError: found['nobody'] = True
pid = os.fork()
if pid == 0: os.setsid(); os._exit(os.getsid(0) != os.getpid())
found['session'] = os.waitpid(pid, 0)[1] == 0
print(json.dumps(found))
"""


def test_an_older_landlock_signals_work_within_the_call(older: tuple[str, Host, Path]) -> None:
    _, host, _ = older
    outcome = host.run("call", python(_WITHIN))
    assert len(outcome.said) == 12, outcome
    assert [name for name, holds in outcome.said.items() if not holds] == []


# Each generation replaces the one before, in a session of its own: only the last is there to be killed.
_SWARM = """
import os, signal, sys
signal.signal(15, signal.SIG_IGN)
beat = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
for _ in range(4):
    if os.fork() == 0:
        os.close(1)
        while True:
            os.write(beat, b'.')
            if os.fork(): os._exit(0)
            if len(sys.argv) > 2: os.setsid()
"""


@pytest.mark.parametrize("leaves", [[], ["its session"]])
def test_an_older_landlock_what_a_call_leaves_is_ended(older: tuple[str, Host, Path], leaves: list[str]) -> None:
    _, host, folder = older
    beat = folder / "work" / f"beat{len(leaves)}"
    assert host.run("call", python(_SWARM, beat, *leaves)).status == 0
    assert beat.stat().st_size > 0
    before = beat.stat().st_size
    time.sleep(0.3)
    assert beat.stat().st_size == before


_FILES = """
import ctypes, json, os, sys
libc, said = ctypes.CDLL(None, use_errno=True), {}
libc.truncate.argtypes = (ctypes.c_char_p, ctypes.c_long)
def truncate(path):
    if libc.truncate(path.encode(), 0): raise OSError(ctypes.get_errno(), '')
for how, act in {
    'truncate': truncate,
    'O_RDONLY': lambda path: os.open(path, os.O_RDONLY | os.O_TRUNC),
    'neither': lambda path: os.open(path, 3 | os.O_TRUNC),
    'O_WRONLY': lambda path: os.open(path, os.O_WRONLY | os.O_TRUNC),
    'unlink': os.unlink,
}.items():
    path = os.path.join(sys.argv[1], how)
    try: act(path); said[how] = 0
    except OSError as error: said[how] = error.errno
print(json.dumps(said))
"""
_WAYS = ("truncate", "O_RDONLY", "neither", "O_WRONLY", "unlink")


def test_an_older_landlock_nothing_is_emptied(older: tuple[str, Host, Path]) -> None:
    _, host, folder = older

    def filled(name: str) -> Path:
        for way in _WAYS:
            (folder / name / way).write_text("content")
            (folder / name / way).chmod(0o666)
        return folder / name

    def whole(name: str) -> set[str]:
        return {way for way in _WAYS if (folder / name / way).exists() and (folder / name / way).read_text()}

    assert set(run_unconfined(python(_FILES, filled("readable"))).said.values()) == {0}
    assert whole("readable") == set()
    said = host.run("call", python(_FILES, filled("readable"))).said
    assert whole("readable") == set(_WAYS), said
    assert set(said.values()) <= {errno.EACCES, errno.EPERM}
    said = host.run("call", python(_FILES, filled("work"))).said
    assert (said["truncate"], said["O_WRONLY"], said["unlink"]) == (0, 0, 0)


def test_an_older_landlock_cpu_time_counts_from_the_first_step(tmp_path: Path) -> None:
    """A leader told of its tool's group still waits for the clock: what ran before it would not be counted, ever."""
    policy = {"egress": {"allow": []}, "budgets": {"call": {"cpu_seconds": 0.5}}}
    spin = f"{PYTHON} -I -S -c 'while True: pass'; true"
    with on("landlock-4", tmp_path, policy, covered="/sys/fs/cgroup") as host:  # a group of its own is such a clock
        for _ in range(3):
            outcome = host.run("call", ["sh", "-c", spin])
            assert outcome.status == -signal.SIGKILL, outcome


def test_an_older_landlock_doctor_says_what_makes_up_for_it() -> None:
    command = [*launcher.prefix("landlock-1"), PYTHON, "-m", "ray_guard.cli", "doctor"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.splitlines()
    (processes,) = [line for line in said if line.startswith("processes ")]
    (files,) = [line for line in said if line.startswith("files ")]
    assert "enforced (limited: landlock.signal_scope)" in processes
    assert "enforced (limited: landlock.signal_scope, landlock.files" in files
