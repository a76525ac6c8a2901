"""The control group of a call: nothing leaves it, and it ends with the call, whatever becomes of its leader."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import PYTHON, Host, Namespace, has_own_supervisors, wait

from ray_guard.kernel import procfs
from ray_guard.supervisor.leaf import place

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(not has_own_supervisors(), reason="needs a supervisor of its own"),
    pytest.mark.skipif(not place(), reason="missing: a cgroup2 hierarchy in which this process may make groups"),
]


@contextlib.contextmanager
def confined(folder: Path, **policy: Any) -> Iterator[Host]:
    """A confined process with a supervisor of its own."""
    namespace = Namespace()
    host = None
    try:
        host = Host({"egress": {"allow": []}, **policy}, folder / "evidence", namespace)
        yield host
    finally:
        if host is not None:
            host.close()
        namespace.close()


def group_of(pid: int | str) -> str:
    """In version 2."""
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return next(line.removeprefix("0::") for line in lines if line.startswith("0::"))


def marked(mark: str) -> list[int]:
    """Processes with that in their command line."""
    found = []
    for pid in procfs.processes():
        with contextlib.suppress(OSError):
            if mark in Path(f"/proc/{pid}/cmdline").read_bytes().decode() and not procfs.is_zombie(pid):
                found.append(pid)
    return found


LEAVE = """
import ctypes, os, sys, time
home, escape = sys.argv[1:3]
errors = []
def attempt(what):
    try: what()
    except OSError as error: errors.append(error.errno)
def join(folder):
    with open(folder + "/cgroup.procs", "w") as file: file.write("0")
def clone_into():
    folder = os.open(home, os.O_RDONLY | os.O_DIRECTORY)
    arguments = (ctypes.c_uint64 * 11)(1 << 33, 0, 0, 0, 17, 0, 0, 0, 0, 0, folder)
    libc = ctypes.CDLL(None, use_errno=True)
    pid = libc.syscall(435, ctypes.byref(arguments), ctypes.c_size_t(88))
    if pid < 0: raise OSError(ctypes.get_errno(), "clone3")
    if pid == 0: time.sleep(1); os._exit(0)
def make():
    os.mkdir(escape); join(escape)
def mount():
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", b"/tmp", b"cgroup2", 0, None): raise OSError(ctypes.get_errno(), "mount")
def unshare():
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x02000000): raise OSError(ctypes.get_errno(), "unshare")
for what in (lambda: join(home), make, clone_into, unshare, *([mount] if len(sys.argv) > 3 else [])): attempt(what)
print(errors, flush=True)
time.sleep(1)
"""


@pytest.mark.parametrize("write", [["cwd", "scratch"], ["/"], ["/sys"]], ids=str)
def test_nothing_leaves_it(tmp_path: Path, write: list[str]) -> None:
    """As root, whose files those of the hierarchy are."""
    home = place()
    escape = Path(home, f"ray_guard-escape-{secrets.token_hex(4)}")
    attack = [PYTHON, "-I", "-S", "-c", LEAVE, home, str(escape)]
    loose = subprocess.run(attack, capture_output=True, text=True, timeout=20)
    assert loose.stdout == "[]\n", "unconfined every way but the mount works"
    wait(lambda: not (escape / "cgroup.procs").read_text(), "the control has not ended")
    escape.rmdir()
    with confined(tmp_path, files={"read": ["system", "env", "cwd"], "write": write}) as host:
        code = """
import os
with ray_guard.tool_call('leave', {}):
    tool = ray_guard.Popen(argv, stdout=-1, text=True)
    said = tool.stdout.readline()
    with open(f'/proc/{tool.pid}/cgroup') as file: result = [said, file.read().split('0::')[1].split()[0], tool.pid]
    tool.kill()
"""
        said, group, _ = host.inside(code, argv=[*attack, "mount"])
        assert len(said.split(",")) == 5, f"something succeeded: {said}"
        assert group.startswith(f"{group_of(host.supervisor).rstrip('/')}/ray_guard-")
        assert not escape.exists()


def test_a_tree_whose_leader_is_lost_is_ended(tmp_path: Path) -> None:
    """By the kernel's out-of-memory killer, for one. Nobody is above the tree then."""
    mark = f"orphan-{secrets.token_hex(4)}"
    script = f"setsid -f sh -c 'setsid -f sh -c \"sleep 61; : {mark}\"; sleep 62; : {mark}'; sleep 63; : {mark}"
    code = """
import os, signal
with ray_guard.tool_call('orphans', {}):
    tool = ray_guard.Popen(['sh', '-c', script])
    result = tool.pid
    globals()['tool'] = tool
"""
    with confined(tmp_path, survivors="keep") as host:
        pid = host.inside(code, script=script)
        wait(lambda: len(marked(mark)) == 3, "not all has started")
        leader = procfs.parent(pid)
        assert leader is not None
        os.kill(leader, signal.SIGKILL)
        wait(lambda: not marked(mark), "what the leader has led lives on", 1.5)


def test_what_a_lost_supervisor_has_left_is_ended_and_what_is_in_use_is_not(tmp_path: Path) -> None:
    left, used = (Path(place(), f"ray_guard-{secrets.token_hex(6)}") for _ in range(2))
    sleepers = []
    for folder in (left, used):
        folder.mkdir()
        sleeper = subprocess.Popen(["sleep", "60"])
        sleepers.append(sleeper)
        (folder / "cgroup.procs").write_text(str(sleeper.pid))
    descriptor = os.open(used, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        with confined(tmp_path) as host:
            assert host.run("call", ["true"]).status == 0
            assert sleepers[0].wait(5) == -signal.SIGKILL
            with confined(tmp_path / "second"):
                wait(lambda: not left.exists(), "the group is left", 5)
            assert sleepers[1].poll() is None
            assert used.exists()
    finally:
        os.close(descriptor)
        for sleeper in sleepers:
            sleeper.kill()
            sleeper.wait()
        used.rmdir()


def test_none_is_left_behind(tmp_path: Path) -> None:
    with confined(tmp_path) as host:
        for _ in range(20):
            assert host.run("call", ["true"]).status == 0
        below = [pid for pid in procfs.descendants(host.supervisor) if "/ray_guard-" in group_of(pid)]
        groups = {Path(place(), Path(group_of(pid)).name) for pid in below}
        assert 0 < len(groups) <= 8, "one for each process that is ready"
        assert all(group.exists() for group in groups), "they are looked for where they are"
    wait(lambda: not any(group.exists() for group in groups), f"groups are left of {groups}")
