"""Processes beside a call: how they are scheduled, what they may use, what they share by System V IPC and queues."""

# ruff: noqa: E501 - programs within strings

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import PYTHON, Attack, Stage, cases, escape

pytestmark = pytest.mark.kernel

_IPC_CREAT, _IPC_RMID = 0o1000, 0
_libc = ctypes.CDLL(None, use_errno=True)


def _state(pid: int) -> dict[str, Any]:
    priority = subprocess.run(["ionice", "-p", str(pid)], capture_output=True, text=True, check=True).stdout
    return {
        "nice": os.getpriority(os.PRIO_PROCESS, pid),
        "policy": os.sched_getscheduler(pid),
        "affinity": sorted(os.sched_getaffinity(pid)),
        "files": resource.prlimit(pid, resource.RLIMIT_NOFILE),
        "io": priority,
    }


class _Bystander:
    """An unconfined process of the same user, and how it was before."""

    def __init__(self) -> None:
        # In a session of its own; without capabilities, as a tool is: else those alone would save it as root.
        program = "import ctypes, struct, os, time; os.setsid(); ctypes.CDLL(None).capset(struct.pack('=Ii', 0x20080522, 0), bytes(24)); print(flush=True); time.sleep(600)"
        self.process = subprocess.Popen([PYTHON, "-I", "-S", "-c", program], stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        self.process.stdout.readline()
        self.before = _state(self.process.pid)

    def harm(self) -> str:
        after = _state(self.process.pid)
        self.close()
        return ", ".join(f"{key}: {was} -> {after[key]}" for key, was in self.before.items() if after[key] != was)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


_bystanders: dict[int, _Bystander] = {}


def _harm(told: dict[str, Any]) -> str:
    return _bystanders.pop(told["bystander"]).harm()


def _against(name: str, program: str) -> Attack:
    indented = "".join(f"    {line}\n" for line in program.strip().splitlines())
    return Attack(name, f"def main():\n    P = A['bystander']\n{indented}", "", ("EPERM",), ("call",), _harm)


RESCHEDULED = [
    _against("renice", "os.setpriority(0, P, 15)"),
    _against("renice its group", "os.setpriority(1, os.getpgid(P), 15)"),
    _against("pin", "os.sched_setaffinity(P, {min(os.sched_getaffinity(P))})"),
    _against("sched_setscheduler", "os.sched_setscheduler(P, os.SCHED_IDLE, os.sched_param(0))"),
    _against("sched_setattr", "call(314, P, struct.pack('=IIQiIQQQ', 48, 5, 0, 0, 0, 0, 0, 0), 0)"),
    _against("ioprio_set", "call(251, 1, P, 3 << 13)"),
    _against("ioprio_set of its group", "call(251, 2, os.getpgid(P), 3 << 13)"),
    _against("prlimit", "call(302, P, 7, struct.pack('=QQ', 9, 9), 0)"),
]


@cases(RESCHEDULED, "other processes")
def test_a_bystander_is_left_alone(stage: Stage, attack: Attack, ring: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = stage.arguments

    def with_bystander() -> dict[str, Any]:
        bystander = _Bystander()
        _bystanders[bystander.process.pid] = bystander
        return {**arguments(), "bystander": bystander.process.pid}

    monkeypatch.setattr(stage, "arguments", with_bystander)
    try:
        escape(stage, attack, ring)
    finally:
        while _bystanders:
            _bystanders.popitem()[1].close()


_kept_waiting: set[str] = set()
"""Folders of attacks for which somebody outside could not open a file."""


@contextlib.contextmanager
def _reader(told: dict[str, Any]) -> Iterator[None]:
    """Outside: opens the file that the attack may read, as soon as that says so."""
    folder, over = Path(told["folder"]), threading.Event()
    (folder / "shared").write_text("shared")

    def read() -> None:
        while not (folder / "ready").exists():
            if over.wait(0.005):
                return
        try:
            os.close(os.open(folder / "shared", os.O_RDONLY | os.O_NONBLOCK))
        except BlockingIOError:
            _kept_waiting.add(told["folder"])
        (folder / "over").touch()

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(5)


LEASE = Attack(
    "lease of a file that others read",
    """
def main():
    signal.signal(signal.SIGIO, signal.SIG_IGN)
    descriptor = os.open(A['folder'] + '/shared', os.O_RDONLY)
    call(72, descriptor, 1024, 1)  # F_SETLEASE, F_WRLCK: who opens it waits for 45 seconds
    open(A['folder'] + '/ready', 'w').close()
    while not os.path.exists(A['folder'] + '/over'): time.sleep(0.005)
""",
    sink="",
    refused=("EINVAL",),
    rings=("call",),
    judge=lambda told: "others wait for it" if told["folder"] in _kept_waiting else "",
    beside=_reader,
)


@cases([LEASE], "other processes")
def test_nobody_waits_for_a_file(stage: Stage, attack: Attack, ring: str) -> None:
    escape(stage, attack, ring)


def test_within_its_call_a_tool_reschedules_and_limits(stage: Stage) -> None:
    program = """
import os, resource, threading, time
child = os.fork()
if child == 0:
    time.sleep(60)
os.setpriority(0, child, 15)
os.setpriority(1, os.getpgid(child), 16)
os.sched_setaffinity(child, {min(os.sched_getaffinity(0))})
os.sched_setscheduler(child, os.SCHED_BATCH, os.sched_param(0))
resource.prlimit(child, resource.RLIMIT_NOFILE, (64, 64))
thread = threading.Thread(target=lambda: os.sched_setaffinity(threading.get_native_id(), os.sched_getaffinity(0)))
thread.start(); thread.join()
if os.fork() == 0:  # one that loses its parent is the call's all the same
    orphan = os.fork()
    if orphan == 0:
        time.sleep(0.2)
        os.setpriority(0, child, 17)
        os._exit(0)
    os._exit(0)
time.sleep(0.5)
print(os.getpriority(0, child), os.sched_getscheduler(child), resource.prlimit(child, resource.RLIMIT_NOFILE))
os.kill(child, 9)
"""
    outcome = stage.host().run("call", [PYTHON, "-I", "-S", "-c", program])
    assert outcome.stdout == "17 3 (64, 64)\n", outcome


@pytest.fixture
def queue() -> Iterator[int]:
    """A System V message queue of this user's, outside any call."""
    key = 0x52470000 | os.getpid() & 0xFFFF
    number = _libc.msgget(key, _IPC_CREAT | 0o600)
    assert number >= 0, os.strerror(ctypes.get_errno())
    yield key
    _libc.msgctl(number, _IPC_RMID, 0)


def test_a_message_queue_outside_is_not_reached(stage: Stage, queue: int) -> None:
    program = f"""
import ctypes, struct
libc = ctypes.CDLL(None, use_errno=True)
number = libc.msgget({queue}, 0)
message = ctypes.create_string_buffer(struct.pack('=q', 1) + b'leak', 12)
print(number if number < 0 else libc.msgsnd(number, message, 4, 0), ctypes.get_errno())
"""
    argv = [PYTHON, "-I", "-S", "-c", program]
    number = _libc.msgget(queue, 0)
    buffer = ctypes.create_string_buffer(64)

    def arrived() -> int:
        return int(_libc.msgrcv(number, buffer, 32, 0, 0o4000))  # IPC_NOWAIT

    assert subprocess.run(argv, capture_output=True, text=True, check=True).stdout == "0 0\n"
    assert arrived() == 4
    outcome = stage.host().run("call", argv)
    assert arrived() == -1, outcome
    assert outcome.stdout in ("-1 2\n", "-1 38\n")  # ENOENT where a call has its own, else ENOSYS


def test_shared_memory_outside_is_not_reached(stage: Stage) -> None:
    number = _libc.shmget(0, 4096, _IPC_CREAT | 0o600)
    assert number >= 0
    _libc.shmat.restype = ctypes.c_void_p
    mine = ctypes.cast(_libc.shmat(number, None, 0), ctypes.POINTER(ctypes.c_char * 8))
    try:
        mine.contents.value = b"before"
        program = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
at = libc.shmat({number}, None, 0)
if at == 2**64 - 1: raise SystemExit("refused")
ctypes.cast(at, ctypes.POINTER(ctypes.c_char * 8)).contents.value = b"after"
"""
        argv = [PYTHON, "-I", "-S", "-c", program]
        stage.host().run("call", argv)
        assert mine.contents.value == b"before"
        subprocess.run(argv, check=True)
        assert mine.contents.value == b"after"
    finally:
        _libc.shmctl(number, _IPC_RMID, 0)
