"""The supervisor under attack: garbage on its socket, floods of pending calls, dead callers, its own death."""

# ruff: noqa: E501 - programs within strings

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import signal
import socket
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import PYTHON, ROOT, Host, Namespace, Stage, grants, has_own_supervisors, lacks, wait

pytestmark = pytest.mark.kernel


@contextlib.contextmanager
def hosts(folder: Path, policy: dict[str, object], count: int = 1) -> Iterator[list[Host]]:
    """Confined processes with a supervisor that is theirs alone."""
    namespace = Namespace()
    made: list[Host] = []
    try:
        for number in range(count):
            evidence = folder.with_name(f"{folder.name}_evidence{number}")
            made.append(Host({**policy, "files": grants(folder)}, evidence, namespace))
        yield made
    finally:
        for host in made:
            host.close()
        namespace.close()


@contextlib.contextmanager
def full_backlog() -> Iterator[int]:
    """A loopback port whose connects hang: the backlog is full and nobody accepts."""
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen(0)
    fillers = []
    for _ in range(4):
        filler = socket.socket()
        filler.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            filler.connect(server.getsockname())
        fillers.append(filler)
    time.sleep(0.05)
    try:
        yield server.getsockname()[1]
    finally:
        for sock in (*fillers, server):
            sock.close()


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def descriptors(pid: int) -> int:
    """Without those of its leaders, a few of which stay: a line, and the line and listener of the next tool of each."""
    leaders = [leader for zygote in children(pid) for leader in children(zygote)]
    return len(os.listdir(f"/proc/{pid}/fd")) - 3 * len(leaders)


def links(pid: int) -> list[str]:
    """What its descriptors are, for messages."""
    found = []
    for number in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/{pid}/fd/{number}").split(":")[0])
    return sorted(found)


def no_leak(pid: int, before: int, seconds: float = 5.0) -> None:
    try:
        wait(lambda: descriptors(pid) <= before + 2, "", seconds)
    except AssertionError:
        raise AssertionError(f"{descriptors(pid) - before} descriptors leaked: {links(pid)}") from None


def resident(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


_CONNECT = "import socket, sys; s = socket.create_connection(('127.0.0.1', int(sys.argv[1]))); s.close(); print('ok')"


def works(host: Host, port: int) -> bool:
    return host.run("call", [PYTHON, "-I", "-S", "-c", _CONNECT, str(port)]).stdout == "ok\n"


# ---------------------------------------------------------------------------------------------------------------------
# its socket


@pytest.mark.skipif(not ROOT, reason="the supervisor is not dumpable: only root can count its descriptors")
def test_garbage_on_the_socket(stage: Stage, tmp_path: Path) -> None:
    """Whoever may connect may send anything: nothing ends the supervisor, leaks, or keeps others waiting."""
    port = stage.sinks.address("granted")
    with hosts(tmp_path, {"egress": {"allow": [f"127.0.0.1:{port}"]}}) as (host,):
        address = host.inside("from ray_guard.kernel import rendezvous; result = rendezvous.address()")
        before = descriptors(host.supervisor)
        garbage: list[bytes] = [secrets.token_bytes(n) for n in (1, 7, 100, 4096, 65536)]
        garbage += [b"{", b"[]", b"null", b"1", b'"x"', b"\xff\xfe", b"[" * 50_000, b'{"a":' * 20_000]
        garbage += [b'{"op":"nonsense"}', b'{"op":null}', b'{"op":["hello"]}', b'{"op":"armed"}', b'{"op":"start"}']
        for kind in ("actor", "observer", "program", 7, None):
            for more in (
                '"policy":[]',
                '"policy":{}',
                '"policy":{"all":[]}',
                '"evidence":"/dev/null"',
                '"identity":7',
                '"x":1',
            ):
                garbage.append(
                    b'{"op":"hello","kind":%s,%s}'
                    % (repr(kind).replace("'", '"').replace("None", "null").encode(), more.encode())
                )
        garbage += [b'{"op":"open","span":1}', b'{"op":"close"}', b'{"op":"intent","tid":"x"}', b'{"op":"reward"}',
                    b'{"op":"violations"}', b'{"op":"tighten"}', b'{"op":"identify","actor_id":{}}']  # fmt: skip
        strangers = []
        for packet in garbage:
            for passed in ((), (0,), (0, 1, 2)):
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                sock.connect(address)
                with contextlib.suppress(OSError):
                    (socket.send_fds(sock, [packet], list(passed)) if passed else sock.send(packet))
                strangers.append(sock)
        half_open = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(100)]
        for sock in half_open:
            sock.connect(address)
        assert works(host, port)
        for sock in (*strangers, *half_open):
            sock.close()
        no_leak(host.supervisor, before)
        assert works(host, port)
        assert resident(host.supervisor) < 60 << 20


def test_garbage_on_an_actors_own_line(stage: Stage, tmp_path: Path) -> None:
    """A target's own code may write to its channel whatever it likes: it harms nobody else."""
    port = stage.sinks.address("granted")
    code = """
import os
from ray_guard.client import channel
line = channel.current()
for packet in (b'', b'x', b'{', b'{}', b'[]', os.urandom(9000), b'{"op":"open","span":"zz"}', b'{"op":"armed","listener":0}',
               b'{"op":"hello"}', b'{"op":"start"}', b'{"op":"close","span":"0123456789abcdef"}', b'{"op":"intent","tid":-5,"span":7}'):
    try: line._sock.send(packet)
    except OSError: pass
try: line.request({"op": "start", "argv": 7}, [0, 1])
except Exception as error: result = type(error).__name__
"""
    with hosts(tmp_path, {"egress": {"allow": [f"127.0.0.1:{port}"]}}, 2) as (bad, good):
        with contextlib.suppress(AssertionError):
            bad.inside(code)
        assert works(good, port)


# ---------------------------------------------------------------------------------------------------------------------
# floods


@pytest.mark.skipif(not ROOT, reason="the supervisor is not dumpable: only root can count its descriptors")
@pytest.mark.parametrize("blocking", [True, False])
def test_thousands_of_pending_connects(stage: Stage, tmp_path: Path, blocking: bool) -> None:
    """Bounded in descriptors and memory; the next tool's connects go on; nothing is left when the flood is killed."""
    granted = stage.sinks.address("granted")
    flood = f"""
import resource, socket, sys, threading, time
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
threading.stack_size(65536)
def one():
    sock = socket.socket()
    sock.setblocking({blocking})
    try: sock.connect(('127.0.0.1', int(sys.argv[1])))
    except OSError: pass
    time.sleep(60)
for _ in range(2000):
    threading.Thread(target=one, daemon=True).start()
print('up', flush=True)
time.sleep(60)
"""
    with full_backlog() as hanging:
        allow = [f"127.0.0.1:{granted}", f"127.0.0.1:{hanging}"]
        with hosts(tmp_path, {"egress": {"allow": allow}}, 2) as (bad, good):
            assert good.supervisor == bad.supervisor
            before = descriptors(good.supervisor)
            bad.inside(
                "global tool\ntool = ray_guard.Popen([python, '-I', '-S', '-c', flood, str(port)], stdout=-1)\n"
                "tool.stdout.readline()\n__import__('builtins').tool = tool",
                python=PYTHON, flood=flood, port=hanging,
            )  # fmt: skip
            took = []
            for _ in range(5):
                began = time.monotonic()
                assert works(good, granted)
                took.append(time.monotonic() - began)
            held = descriptors(good.supervisor)
            memory = resident(good.supervisor)
            bad.inside("tool = __import__('builtins').tool\ntool.kill()\ntool.wait(5)\ntool.stdout.close()")
            print(f"2000 pending: others {statistics.median(took):.3f} s, {held} descriptors, {memory >> 20} MiB")
            assert held <= before + 1024 + 256  # connects that wait, and what is not closed yet
            assert memory < 80 << 20
            assert statistics.median(took) < 2.0, took
            no_leak(good.supervisor, before, 10)
            assert works(good, granted)


def test_a_slow_connect_holds_up_nobody(stage: Stage, tmp_path: Path) -> None:
    """Connects of a second thread while a first one hangs: no slower than the timer's patience."""
    granted = stage.sinks.address("granted")
    program = """
import socket, sys, threading, time
def hang():
    try: socket.create_connection(('127.0.0.1', int(sys.argv[2])), timeout=None)
    except OSError: pass
def measure():
    took = []
    for _ in range(200):
        sock = socket.socket()
        began = time.perf_counter()
        sock.connect(('127.0.0.1', int(sys.argv[1])))
        took.append(time.perf_counter() - began)
        sock.close()
    return sorted(took)
alone = measure()
for _ in range(20): threading.Thread(target=hang, daemon=True).start()
time.sleep(0.3)
beside = measure()
import json
print(json.dumps({"alone": alone[100], "beside": beside[100], "worst": beside[-4]}), flush=True)
import os
os._exit(0)
"""
    with contextlib.ExitStack() as stack:
        hanging = stack.enter_context(full_backlog())
        policy = {"egress": {"allow": [f"127.0.0.1:{granted}", f"127.0.0.1:{hanging}"]}}
        (host,) = stack.enter_context(hosts(tmp_path, policy))
        said = host.run("call", [PYTHON, "-I", "-S", "-c", program, str(granted), str(hanging)]).said
    print({name: f"{1e6 * value:.0f} µs" for name, value in said.items()})
    assert said["beside"] < said["alone"] + 0.01
    assert said["worst"] < 0.5


@pytest.mark.skipif(not ROOT, reason="the supervisor is not dumpable: only root can count its descriptors")
def test_descriptors_do_not_leak(stage: Stage, tmp_path: Path) -> None:
    """Calls that fail in every way, many times over."""
    granted = stage.sinks.address("granted")
    program = """
import array, os, socket, struct, sys
port, unix, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
file = open('/dev/null')
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
ours, theirs = socket.socketpair()
granted = struct.pack('=HH4s8x', socket.AF_INET, socket.htons(port), socket.inet_aton('127.0.0.1'))
told = set()
for n in range(300):
    for number in (file.fileno(), ours.fileno(), 9999):
        libc.connect(number, granted, 16)
        told.add(ctypes.get_errno())
    for number in (42, 49, 50, 44, 46, 307):
        libc.syscall(number, file.fileno(), 0, 16, 0, 8, 16)
        libc.syscall(number, ours.fileno(), 8, 16, 0, 8, 16)
    for address in (('127.0.0.1', port), ('127.0.0.1', 1)):
        with socket.socket() as sock:
            try: sock.connect(address)
            except OSError: pass
    for path in (unix, '/etc/passwd', '/nowhere'):
        with socket.socket(socket.AF_UNIX) as sock:
            try: sock.connect(path)
            except OSError: pass
    socket.send_fds(ours, [b'x'], [0, 1, 2])
    for fd in socket.recv_fds(theirs, 1, 3)[1]: os.close(fd)
    try: ours.sendmsg([b'x'], [(1, 1, array.array('i', [0, 9999]))])
    except OSError: pass
    path = os.path.join(folder, str(n))
    with socket.socket(socket.AF_UNIX) as sock: sock.bind(path)
    os.unlink(path)
print(sorted(told))
"""
    with hosts(tmp_path, {"egress": {"allow": [f"127.0.0.1:{granted}"]}}) as (host,):
        assert works(host, granted)
        before = descriptors(host.supervisor)
        argv = [PYTHON, "-I", "-S", "-c", program, str(granted), str(stage.sinks.address("unix")), str(tmp_path)]
        outcome = host.run("call", argv, timeout=60)
        assert outcome.status == 0, outcome
        pair = errno.EISCONN if lacks("pidfd_getfd") else errno.EINVAL
        assert outcome.stdout.strip() == str(sorted([errno.EBADF, pair, errno.ENOTSOCK]))  # on the short way too
        no_leak(host.supervisor, before)


@pytest.mark.skipif(not ROOT, reason="the supervisor is not dumpable: only root can count its descriptors")
def test_a_caller_that_dies_mid_call(tmp_path: Path) -> None:
    """Killed while its connect, its unix connect and its sends are pending: the supervisor lets go of all of it."""
    path = str(tmp_path / "full")
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen(0)
    with contextlib.ExitStack() as stack:
        hanging = stack.enter_context(full_backlog())
        stack.callback(server.close)
        program = """
import os, socket, sys, threading, time
def tcp(): socket.create_connection(('127.0.0.1', int(sys.argv[1])))
def unix():
    for _ in range(4): held.append(socket.socket(socket.AF_UNIX)); held[-1].connect(sys.argv[2])
def send():
    a, b = socket.socketpair(); held.extend((a, b))
    while True: socket.send_fds(a, [bytes(60000)], [0, 1])
held = []
for work in (tcp, unix, send) * 3: threading.Thread(target=work, daemon=True).start()
time.sleep(0.3)
print('up', flush=True)
time.sleep(60)
"""
        policy = {"egress": {"allow": [f"127.0.0.1:{hanging}", f"unix://{path}"]}}
        host = stack.enter_context(hosts(tmp_path, policy))[0]
        assert host.run("call", ["true"]).status == 0
        before = descriptors(host.supervisor)
        code = """
tool = ray_guard.Popen([python, '-I', '-S', '-c', program, str(port), path], stdout=-1)
tool.stdout.readline()
tool.kill()
result = tool.wait(5)
tool.stdout.close()
"""
        assert host.inside(code, python=PYTHON, program=program, port=hanging, path=path) == -9
        no_leak(host.supervisor, before, 5)
        assert host.run("call", ["true"]).status == 0


# ---------------------------------------------------------------------------------------------------------------------
# its death


@pytest.mark.skipif(not has_own_supervisors(), reason="needs a supervisor of its own, and so a mount namespace")
def test_the_supervisor_is_killed(tmp_path: Path) -> None:
    """Actor, its children, tools and their established flows: dead within one second."""
    _kill_the_supervisor(tmp_path, ("child", "tool"))


@pytest.mark.skipif(not has_own_supervisors(), reason="needs a supervisor of its own, and so a mount namespace")
def test_the_supervisor_is_killed_and_an_actor_has_orphans(tmp_path: Path) -> None:
    _kill_the_supervisor(tmp_path, ("child", "tool", "orphan"))


def _kill_the_supervisor(tmp_path: Path, names: tuple[str, ...]) -> None:
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    server.settimeout(10)
    linger = """
import os, socket, sys, time
sock = socket.create_connection(('127.0.0.1', int(sys.argv[1])))
with open(sys.argv[2], 'w') as file: file.write(str(os.getpid()))
over = time.monotonic() + 30
while time.monotonic() < over:
    sock.send(b'x')
    time.sleep(0.01)
"""
    argv = [PYTHON, "-I", "-S", "-c", linger, str(port)]
    with hosts(tmp_path, {"egress": {"allow": [f"127.0.0.1:{port}"]}}) as (host,):
        files = {name: tmp_path / name for name in names}
        code = """
import builtins, subprocess
builtins.keep = [subprocess.Popen([*argv, files['child']]), ray_guard.Popen([*argv, files['tool']])]
if 'orphan' in files:
    subprocess.run(['sh', '-c', 'setsid "$@" &', 'sh', *argv, files['orphan']])
"""
        host.inside(code, argv=argv, files={name: str(path) for name, path in files.items()})
        pids = {}
        for name, path in files.items():
            wait(lambda path=path: path.exists() and path.read_text(), f"{name} did not start")
            pids[name] = int(path.read_text())
        flows = [server.accept()[0] for _ in names]
        os.kill(host.supervisor, signal.SIGKILL)
        began = time.monotonic()
        pids["actor"] = host.pid
        gone: dict[str, float] = {}
        while len(gone) < len(pids) and time.monotonic() - began < 5:
            for name, pid in pids.items():
                if name not in gone and not alive(pid):
                    gone[name] = time.monotonic() - began
            time.sleep(0.002)
        for pid in pids.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for flow in flows:
            flow.close()
        server.close()
        print({name: f"{1e3 * seconds:.0f} ms" for name, seconds in gone.items()})
        assert set(gone) == set(pids), f"still alive: {set(pids) - set(gone)}"
        assert max(gone.values()) < 1.0


@pytest.mark.skipif(not has_own_supervisors(), reason="needs a supervisor of its own, and so a mount namespace")
def test_without_a_supervisor_nothing_connects(stage: Stage, tmp_path: Path) -> None:
    """While the supervisor is stopped calls wait; once it is killed they fail: nothing ever gets through."""
    stage.sinks.clear()
    program = """
import socket, sys, time
for name in ('tcp', 'granted'):
    try: socket.create_connection(('127.0.0.1', int(sys.argv[1])), timeout=5).sendall(b'LEAK')
    except OSError: pass
"""
    with hosts(tmp_path, {"egress": {"allow": []}}) as (host,):
        code = """
import builtins, subprocess
builtins.keep = subprocess.Popen(argv)
result = builtins.keep.pid
"""
        os.kill(host.supervisor, signal.SIGSTOP)
        try:
            pid = host.inside(code, argv=[PYTHON, "-I", "-S", "-c", program, str(stage.sinks.address("tcp"))])
            time.sleep(0.3)
            assert alive(pid)
        finally:
            os.kill(host.supervisor, signal.SIGKILL)
        wait(lambda: not alive(pid), "the actor's child lives on", 3)
        stage.sinks.flush("tcp")
        assert stage.sinks.seen("tcp") == (0, b"")


def test_an_actor_is_killed(stage: Stage, tmp_path: Path) -> None:
    """Its tools end with it; its open spans are closed; others go on."""
    port = stage.sinks.address("granted")
    with hosts(tmp_path, {"egress": {"allow": [f"127.0.0.1:{port}"]}}, 2) as (victim, other):
        code = """
import builtins
builtins.scope = ray_guard.tool_call('left open', {})
builtins.scope.__enter__()
builtins.keep = ray_guard.Popen(['sleep', '100'])
result = builtins.keep.pid
"""
        tool = victim.inside(code)
        assert alive(tool)
        os.kill(victim.pid, signal.SIGKILL)
        wait(lambda: not alive(tool), "the tool lives on")
        span = wait(
            lambda: next((s for s in victim.journal() if s["name"] == "execute_tool left open" and s["ended"]), None),
            "the open span was not closed",
        )
        assert span["attributes"]["ray_guard.ended_by"] == "supervisor"
        assert works(other, port)
        victim.close()


def test_the_supervisor_ends_after_its_last_target(tmp_path: Path) -> None:
    if not has_own_supervisors():
        pytest.skip("needs a supervisor of its own, and so a mount namespace")
    with hosts(tmp_path, {"egress": {"allow": []}}) as (host,):
        supervisor = host.supervisor
        children = subprocess.run(["pgrep", "-P", str(supervisor)], capture_output=True, text=True).stdout.split()
        assert alive(supervisor)
        assert children
    wait(lambda: not alive(supervisor), "it lives on", 6)
    wait(lambda: not any(alive(int(child)) for child in children), "its zygote lives on", 2)
