"""Other processes as a way out: their memory, descriptors, signals; and what a call leaves behind."""

# ruff: noqa: E501 - programs within strings

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import PYTHON, Attack, Host, Namespace, Stage, cases, escape, row

pytestmark = pytest.mark.kernel

# An unconfined process of the same user, without capabilities (a tool has none either, and as root that would save it),
# connected to a sink that is not granted, with a word in memory.
_VICTIM = """
import ctypes, json, os, socket, struct, sys, time
libc = ctypes.CDLL(None)
libc.prctl(0x59616D61, ctypes.c_ulong(-1 & 2**64 - 1), 0, 0, 0)
header, data = struct.pack("=Ii", 0x20080522, 0), bytes(24)
libc.capset(header, data)
libc.prctl(4, 1, 0, 0, 0)
sock = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
word = ctypes.create_string_buffer(b"untouched", 16)
read, write = os.pipe()
os.set_blocking(read, False)
about = {"pid": os.getpid(), "socket": sock.fileno(), "word": ctypes.addressof(word), "pipe": write}
print(json.dumps(about), flush=True)
while True:
    line = sys.stdin.readline()
    if not line: break
    try: print(os.read(read, 99).decode(), flush=True)
    except BlockingIOError: print(word.value.decode(), flush=True)
"""


class Victim:
    def __init__(self, port: int) -> None:
        self.process = subprocess.Popen(
            [PYTHON, "-I", "-S", "-c", _VICTIM, str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"VICTIMS_WORD": "untouched"},
        )
        import json

        assert self.process.stdout is not None
        self.about: dict[str, Any] = json.loads(self.process.stdout.readline())

    def state(self) -> str:
        for line in Path(f"/proc/{self.about['pid']}/status").read_text().splitlines():
            if line.startswith("State:"):
                return line.split()[1]
        return "gone"

    def harm(self) -> str:
        if self.process.poll() is not None:
            return "the victim is dead"
        if self.state() in "Tt":
            return "the victim is stopped"
        status = Path(f"/proc/{self.about['pid']}/status").read_text()
        if "TracerPid:\t0" not in status:
            return "the victim is traced"
        limits = Path(f"/proc/{self.about['pid']}/limits").read_text()
        if "Max core file size        1" in limits:
            return "the victim's limits are changed"
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        word = self.process.stdout.readline().strip()
        return "" if word == "untouched" else f"the victim's memory says {word!r}"

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


_victims: list[Victim] = []


@pytest.fixture(autouse=True)
def _no_victims_left() -> Iterator[None]:
    yield
    while _victims:
        _victims.pop().close()


def _against_victim(name: str, body: str, refused: tuple[str, ...] = (), **more: Any) -> Attack:
    lines = "\n".join("    " + line for line in body.strip().splitlines())
    return Attack(name, f"def main():\n    V = A['victim']\n{lines}\n", sink="", refused=refused, judge=_harm, **more)


def _read(told: dict[str, Any]) -> str:
    found = Path(told["folder"], "found")
    _harm(told)
    return "it read what the victim holds" if found.exists() and b"untouched" in found.read_bytes() else ""


def _written(told: dict[str, Any]) -> str:
    return _harm(told).replace("memory says", "pipe brought")


def _harm(told: dict[str, Any]) -> str:
    victim = next(v for v in _victims if v.about == told["victim"])
    found = victim.harm()
    victim.close()
    _victims.remove(victim)
    return found


AGAINST_VICTIM = [
    Attack("pidfd_getfd of a connected socket", """
def main():
    # A foreign process's connection to the outside is as good as one of one's own.
    V = A['victim']
    os.write(call(438, os.pidfd_open(V['pid']), V['socket'], 0), TOKEN)
""", refused=("EPERM",)),
    Attack("descriptor of another process reopened through /proc", """
def main():
    V = A['victim']
    os.write(os.open('/proc/%d/fd/%d' % (V['pid'], V['pipe']), os.O_WRONLY), b'poisoned')
""", sink="", refused=("EACCES", "EPERM"), rings=("call",), judge=_written),
    Attack("environment of another process", """
def main():
    data = open('/proc/%d/environ' % A['victim']['pid'], 'rb').read()
    open(A['folder'] + '/found', 'wb').write(data)
""", sink="", refused=("EACCES", "EPERM"), rings=("call",), judge=_read),
    Attack("process_vm_readv", """
def main():
    V = A['victim']
    found = ctypes.create_string_buffer(9)
    call(310, V['pid'], struct.pack('=QQ', ctypes.addressof(found), 9), 1, struct.pack('=QQ', V['word'], 9), 1, 0)
    open(A['folder'] + '/found', 'wb').write(found.value)
""", sink="", refused=("EPERM",), judge=_read),
    _against_victim("process_vm_writev", """
word = ctypes.create_string_buffer(b'poisoned', 16)
call(311, V['pid'], struct.pack('=QQ', ctypes.addressof(word), 16), 1, struct.pack('=QQ', V['word'], 16), 1, 0)
""", ("EPERM",)),
    _against_victim("ptrace attach", """
libc.ptrace.restype = ctypes.c_long
if libc.ptrace(16, V['pid'], 0, 0): raise OSError(ctypes.get_errno(), 'attach')
time.sleep(0.1)
os.kill(os.getpid(), 9)
""" .replace("time.sleep(0.1)\nos.kill(os.getpid(), 9)", """os.waitpid(V['pid'], 0x40000000)
libc.ptrace(5, V['pid'], ctypes.c_long(V['word']), ctypes.c_long(0x64656e6f73696f70))
libc.ptrace(17, V['pid'], 0, 0)"""), ("EPERM",)),
    _against_victim("ptrace seize", """
libc.ptrace.restype = ctypes.c_long
if libc.ptrace(0x4206, V['pid'], 0, 0): raise OSError(ctypes.get_errno(), 'seize')
libc.ptrace(0x4207, V['pid'], 0, 0)
os.waitpid(V['pid'], 0x40000000)
libc.ptrace(5, V['pid'], ctypes.c_long(V['word']), ctypes.c_long(0x64656e6f73696f70))
libc.ptrace(17, V['pid'], 0, 0)
""", ("EPERM",)),
    _against_victim("/proc/PID/mem", """
with open('/proc/%d/mem' % V['pid'], 'r+b', buffering=0) as memory:
    memory.seek(V['word'])
    memory.write(b'poisoned')
""", ("EACCES", "EPERM"), rings=("call",)),  # an actor's files are detected, not prevented: CONTRACT, two promises
    _against_victim("SIGKILL", "os.kill(V['pid'], 9)\ntime.sleep(0.1)", ("EPERM",), rings=("call",)),
    _against_victim("SIGSTOP by pidfd", "signal.pidfd_send_signal(os.pidfd_open(V['pid']), signal.SIGSTOP)\ntime.sleep(0.1)",
                    ("EPERM", "ENOSYS"), rings=("call",)),
    _against_victim("SIGKILL to every process of the session", """
os.kill(V['pid'], 0)
libc.tgkill(V['pid'], V['pid'], 9)
time.sleep(0.1)
""", ("EPERM",), rings=("call",)),
    _against_victim("SIGSTOP by rt_sigqueueinfo", """
call(129, V['pid'], 19, struct.pack('=iii', 19, 0, -1) + bytes(116))
time.sleep(0.1)
""", ("EPERM",), rings=("call",)),
    _against_victim("SIGSTOP by F_SETOWN", """
import fcntl
ours, theirs = socket.socketpair()
fcntl.fcntl(ours, 10, 19); fcntl.fcntl(ours, 8, V['pid']); fcntl.fcntl(ours, 4, 0o20000)
theirs.send(b'x')
time.sleep(0.1)
""", rings=("call",)),
    _against_victim("prlimit of another process", """
call(302, V['pid'], 4, struct.pack('=QQ', 1, 1), 0)
""", ("EPERM",), rings=("call",)),
]  # fmt: skip


@cases(AGAINST_VICTIM, "other processes")
def test_victim(stage: Stage, attack: Attack, ring: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = stage.arguments

    def with_victim() -> dict[str, Any]:
        victim = Victim(stage.sinks.address("tcp"))
        _victims.append(victim)
        return {**arguments(), "victim": victim.about}

    monkeypatch.setattr(stage, "arguments", with_victim)
    escape(stage, attack, ring)


def test_a_tool_can_signal_within_its_call(stage: Stage) -> None:
    outcome = stage.host().run("call", ["sh", "-c", "sleep 100 & kill $! && wait $!; echo $?"])
    assert outcome.stdout == "143\n"


def test_a_debugger_works_within_its_call(stage: Stage) -> None:
    program = """
import ctypes, os, signal
libc = ctypes.CDLL(None, use_errno=True)
child = os.fork()
if child == 0:
    import time
    time.sleep(100)
if libc.ptrace(16, child, 0, 0): raise SystemExit("attach: %d" % ctypes.get_errno())
os.waitpid(child, 0)
print("attached")
os.kill(child, 9)
"""
    assert stage.host().run("call", [PYTHON, "-I", "-S", "-c", program]).stdout == "attached\n"


# ---------------------------------------------------------------------------------------------------------------------
# descriptors handed around


@row("other processes", "datagram socket handed from a tool to its actor")
def test_a_tool_cannot_hand_its_datagram_socket_to_the_actor(stage: Stage) -> None:
    """An actor's own datagram sockets cannot send, for its sendmsg is not looked at; a tool's can."""
    tool = """
import array, socket, sys
line = socket.socket(fileno=int(sys.argv[1]))
for family, kind in ((socket.AF_INET, socket.SOCK_DGRAM), (socket.AF_INET6, socket.SOCK_DGRAM), (socket.AF_UNIX, socket.SOCK_DGRAM)):
    sock = socket.socket(family, kind)
    try:
        line.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [sock.fileno()]))])
        print('passed')
    except OSError as error:
        print(error.errno)
        line.send(b'-')
"""
    code = """
import socket
ours, theirs = socket.socketpair()
done = ray_guard.run([python, '-I', '-S', '-c', tool, str(theirs.fileno())], pass_fds=[theirs.fileno()], capture_output=True, text=True)
theirs.close()
result = [done.stdout + done.stderr]
for where in (('127.0.0.1', udp), ('::1', udp), unix):
    data, descriptors, _, _ = socket.recv_fds(ours, 1, 4)
    for descriptor in descriptors:
        sock = socket.socket(fileno=descriptor)
        try:
            sock.sendmsg([b'LEAK'], [], 0, where)
            result.append('sent')
        except OSError as error:
            result.append(str(error))
"""
    stage.sinks.clear()
    sinks = {"udp": stage.sinks.address("udp"), "unix": stage.sinks.address("unix_dgram")}
    said = stage.host().inside(code, tool=tool, python=PYTHON, **sinks)
    for sink in ("udp", "unix_dgram"):
        stage.sinks.flush(sink)
        assert stage.sinks.seen(sink) == (0, b""), said


def test_streams_and_files_may_be_handed_around(stage: Stage) -> None:
    """The positive side: descriptors of pipes, files and connected stream sockets travel between a call's processes."""
    program = """
import array, os, socket
ours, theirs = socket.socketpair()
read, write = os.pipe()
left, right = socket.socketpair()
socket.send_fds(ours, [b'x'], [read, left.fileno()])
_, (pipe, stream), _, _ = socket.recv_fds(theirs, 1, 4)
os.write(write, b'one'); right.send(b'two')
print(os.read(pipe, 9).decode(), os.read(stream, 9).decode())
"""
    for ring in ("actor", "call"):
        assert stage.host().run(ring, [PYTHON, "-I", "-S", "-c", program]).stdout == "one two\n"


@row("other processes", "connection of its actor passed to a tool")
def test_an_inherited_connection_is_not_passed_to_a_tool(stage: Stage) -> None:
    code = """
import socket
sock = socket.create_connection(('127.0.0.1', port))
try:
    ray_guard.run(['true'], pass_fds=[sock.fileno()])
except ValueError as error:
    result = str(error)
"""
    assert "connected socket" in stage.host().inside(code, port=stage.sinks.address("granted"))


@pytest.mark.parametrize("count", [40, 61, 62, 120])
def test_many_passed_descriptors_hurt_nobody(stage: Stage, count: int) -> None:
    """More than fit are refused to whoever passes them; the supervisor and everybody else live on."""
    code = """
import os
pairs = [os.pipe() for _ in range(count)]
try:
    done = ray_guard.run(['sh', '-c', 'ls /proc/self/fd | wc -l'], pass_fds=[read for read, _ in pairs], capture_output=True, text=True)
    result = int(done.stdout) - 4
except (OSError, ValueError) as error:
    result = f'{type(error).__name__}: {error}'
finally:
    for pair in pairs:
        os.close(pair[0]); os.close(pair[1])
"""
    host = stage.host()
    found = host.inside(code, count=count)
    assert found == count or isinstance(found, str), found
    assert host.run("call", ["true"]).status == 0


@pytest.mark.parametrize("number", [5, 200, 256, 257, 258, 259, 400, 1000])
def test_a_passed_descriptor_keeps_its_number(stage: Stage, number: int) -> None:
    """Whatever number it has, it must not collide with what the zygote holds meanwhile."""
    code = """
import os
read, write = os.pipe()
os.dup2(read, number); os.write(write, b'through'); os.close(write)
try:
    result = ray_guard.run(['sh', '-c', f'cat /proc/self/fd/{number}'], pass_fds=[number], capture_output=True, text=True).stdout
finally:
    os.close(number); os.close(read)
"""
    assert stage.host().inside(code, number=number) == "through"


# ---------------------------------------------------------------------------------------------------------------------
# what a call leaves behind


@row("outliving the call", "connection kept by a survivor")
def test_a_survivors_connection_is_cut_with_the_call(stage: Stage) -> None:
    """The flow of a process that a call left behind ends with the call, within a second."""
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(10)
    evidence = stage.evidence("cut")
    namespace = Namespace()
    host = Host({"egress": {"allow": [f"127.0.0.1:{server.getsockname()[1]}"]}}, evidence, namespace)
    try:
        script = f"exec 3<>/dev/tcp/127.0.0.1/{server.getsockname()[1]}; setsid -f sh -c 'while :; do echo x >&3; sleep 0.01; done' & sleep 0.2"
        outcome = host.run("call", ["bash", "-c", script])
        ended = time.monotonic()
        accepted, _ = server.accept()
        accepted.settimeout(5)
        try:
            while accepted.recv(1 << 16):
                pass
        except ConnectionResetError:
            pass
        assert time.monotonic() - ended < 1.0, outcome
        accepted.close()
    finally:
        host.close()
        namespace.close()
        server.close()


def test_threads_may_race_with_calls(stage: Stage) -> None:
    """Eight calls at once, each with an ending of its own: none ends another's processes."""
    code = """
import threading, time
result = {}
def one(n):
    with ray_guard.tool_call(f't{n}', {}):
        done = ray_guard.run(['sh', '-c', f'sleep 0.{n}; echo {n}'], capture_output=True, text=True)
        result[str(n)] = (done.returncode, done.stdout)
threads = [threading.Thread(target=one, args=(n,)) for n in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""
    assert stage.host().inside(code) == {str(n): [0, f"{n}\n"] for n in range(8)}
