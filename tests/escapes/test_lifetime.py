"""Outliving the call: what a tool leaves running ends with it, however it hid."""

# ruff: noqa: E501 - programs within strings

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from harness import Attack, Stage, cases, escape

pytestmark = pytest.mark.kernel

_PATIENCE_S = 1.0
"""CONTRACT: what a call leaves running is dead within one second."""


def _beats(told: dict[str, Any]) -> int:
    try:
        return Path(told["folder"], "beat").stat().st_size
    except FileNotFoundError:
        return 0


def _lives_on(told: dict[str, Any]) -> str:
    """Whether something goes on beating after the call's end; and its end, should it have none."""
    deadline = time.monotonic() + _PATIENCE_S
    try:
        while True:
            before = _beats(told)
            time.sleep(0.25)  # on a busy machine a beat may be late
            if _beats(told) == before:
                return ""
            if time.monotonic() > deadline:
                return "it outlived its call"
    finally:
        Path(told["folder"], "stop").touch()


_PROGRAM = """
BEAT = r'''
import os, signal, sys, time
folder = sys.argv[1]
over = time.monotonic() + 20
{at_first}
while time.monotonic() < over and not os.path.exists(folder + '/stop'):
    with open(folder + '/beat', 'a') as file: file.write('x')
    time.sleep(0.01)
    {each_time}
'''
def main():
    null = os.open('/dev/null', os.O_RDWR)
    for number in (0, 1, 2): os.dup2(null, number)  # nobody waits for its output
    BEATING = [sys.executable, '-I', '-S', '-c', BEAT, A['folder']]
    {start}
    while not os.path.exists(A['folder'] + '/beat'): time.sleep(0.005)
    {after}
"""


def _surviving(name: str, start: str, at_first: str = "", each_time: str = "pass", after: str = "pass") -> Attack:
    parts = {"start": start, "at_first": at_first, "each_time": each_time, "after": after}
    program = _PROGRAM
    for key, text in parts.items():
        indent = " " * (4 if key != "at_first" else 0)
        program = program.replace("{" + key + "}", text.strip().replace("\n", "\n" + indent))
    return Attack(name, program, sink="", rings=("call",), judge=_lives_on)


_SPAWN = "subprocess.Popen(BEATING)"
SURVIVING = [
    _surviving("left in the background", _SPAWN),
    _surviving("setsid", "subprocess.Popen(BEATING, start_new_session=True)"),
    _surviving("a process group of its own", "subprocess.Popen(BEATING, process_group=0)"),
    _surviving("nohup", "subprocess.Popen(['nohup', *BEATING])"),
    _surviving("double fork", "if os.fork() == 0:\n    if os.fork(): os._exit(0)\n    os.setsid()\n    os.execv(BEATING[0], BEATING)"),
    _surviving("clone with CLONE_PARENT", """
if call(56, 0x8000 | 17, 0, 0, 0, 0) == 0:  # a sibling of its maker, a child of whoever started that
    os.execv(BEATING[0], BEATING)
"""),
    _surviving("vfork", "os.posix_spawn(BEATING[0], BEATING, os.environ, setsid=True)"),
    _surviving("env -i", "subprocess.Popen(BEATING, env={}, start_new_session=True)"),
    _surviving("ignoring signals", _SPAWN, at_first="for n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass"),
    _surviving("subreaper of its own", "if os.fork() == 0:\n    libc.prctl(36, 1, 0, 0, 0)\n    subprocess.Popen(BEATING, start_new_session=True)\n    time.sleep(20); os._exit(0)"),
    _surviving("stopped, to be woken by a sibling", "child = subprocess.Popen(BEATING)\nif os.fork() == 0:\n    os.setsid()\n    for _ in range(2000):\n        time.sleep(0.01)\n        os.kill(child.pid, 18)\n    os._exit(0)",
               after="os.kill(child.pid, 19)"),
    _surviving("traced by a sibling", """
child = subprocess.Popen(BEATING)
if os.fork() == 0:
    libc.ptrace(0x4206, child.pid, 0, 0x100000 * 0)
    time.sleep(20); os._exit(0)
"""),
    _surviving("renamed to a kernel thread", _SPAWN, at_first="import ctypes; ctypes.CDLL(None).prctl(15, b'kworker/0:1', 0, 0, 0)"),
    _surviving("re-forking swarm", _SPAWN, at_first="for _ in range(7):\n    if os.fork() == 0: break\nos.setsid() if os.getpid() != os.getsid(0) else None", each_time="if os.fork(): os._exit(0)"),
    _surviving("fork bomb, bounded", _SPAWN, at_first="for _ in range(6):\n    os.fork()"),
    _surviving("main program killed", _SPAWN, after="os.kill(os.getpid(), 9)"),
]  # fmt: skip


@cases(SURVIVING, "outliving the call")
def test_surviving(stage: Stage, attack: Attack, ring: str) -> None:
    escape(stage, attack, ring)
