"""The control group of one start: a leaf below its requester's own, which the tool and all it starts are born into.

Its leader is born into it, by the zygote, and so is what it starts: to move a process takes milliseconds. It serves for
one call after the other, for it is empty but for the leader in between (else that ends), and its readers go by
differences. Runs in the zygote and its leaders, which make it and end it, and in the supervisor, which reads it.
Version 2 alone is asked for:
``cgroup.kill``, ``cgroup.procs`` and the CPU time in ``cpu.stat`` need no controller there, so a leaf below a group
that has processes offers them everywhere. Where no leaf can be made nothing here is used: the tree of processes tells.

A tool cannot leave it: no grant of its view lets it write below /sys/fs/cgroup, ``clone3`` is refused to it, and it has
no capability to mount another view of the hierarchy.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import signal
import time
from collections.abc import Callable
from typing import Final, NoReturn

from ray_guard.kernel import cgroup, pidfd

KILL_PATIENCE_S: Final = 1.0
"""Contract: what a call leaves running is dead within one second; what is not by then is reported as unkillable."""
PREFIX: Final = "ray_guard-"
_PATIENCE_S: Final = 5
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@functools.cache
def place() -> str:
    """The folder of this process's group, if leaves can be made in it; else empty. Tried, once."""
    try:
        own = cgroup.folder("", cgroup.paths(cgroup.read(os.getpid()))[""])
        trial = f"{own}/{new_name()}"
        os.mkdir(trial)
        works = os.path.exists(f"{trial}/cgroup.kill")
        os.rmdir(trial)
    except (OSError, KeyError):
        return ""
    return own if works else ""


def new_name() -> str:
    """Of a group of ours: nobody else's is called that."""
    return PREFIX + os.urandom(6).hex()


def _is_name(name: str) -> bool:
    number = name.removeprefix(PREFIX)
    return len(number) == 12 and number != name and not number.strip("0123456789abcdef")


class Leaf:
    """One, as whoever reads it knows it.

    Args:
        path: its folder.
        leader: a process in it that is none of the call's; 0: there is none, or it is lost.
    """

    def __init__(self, path: str, leader: int = 0) -> None:
        self.path = path
        self.leader = leader

    def pids(self) -> list[int]:
        """All of the call's processes that live: zombies are not told. Raises OSError."""
        with open(f"{self.path}/cgroup.procs", "rb", buffering=0) as file:
            return [pid for pid in map(int, file.readall().split()) if pid != self.leader]

    def cpu_ns(self) -> int:
        """CPU time of all that ever was in it but the leader, to the microsecond. Raises OSError."""
        with open(f"{self.path}/cpu.stat", "rb", buffering=0) as file:
            used = int(file.read(64).split(None, 2)[1]) * 1000
        return used - (pidfd.cpu_ns(self.leader) or 0 if self.leader else 0)

    def kill(self) -> None:
        """Kills all in it but the leader. Without one, what they are forking too. Without effect where it is gone."""
        with contextlib.suppress(OSError):
            if not self.leader:
                self._write("cgroup.kill", b"1")
                return
            for pid in self.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _write(self, name: str, data: bytes) -> None:
        with open(f"{self.path}/{name}", "wb", buffering=0) as file:
            file.write(data)

    def remove(self) -> bool:
        """Takes it away; False: somebody is in it."""
        try:
            os.rmdir(self.path)
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True


class LeafClock:
    """CPU time of all that is in a leaf or has been, from now on. Raises OSError where it cannot be read."""

    def __init__(self, leaf: Leaf) -> None:
        self._leaf = leaf
        self._base = leaf.cpu_ns()

    def read_ns(self) -> int:
        return self._leaf.cpu_ns() - self._base

    def close(self) -> None:
        """Nothing is held."""


class OwnLeaf(Leaf):
    """One that is made here, and locked until it is removed: so everybody knows that it has an owner.

    Args:
        parent: the folder of the group above.

    Raises:
        OSError: none can be made (any more).
    """

    def __init__(self, parent: str) -> None:
        super().__init__(f"{parent}/{new_name()}")
        os.mkdir(self.path)
        self.descriptor = os.open(self.path, _FOLDER)
        """Open, and so locked, as long as somebody owns it."""
        fcntl.flock(self.descriptor, fcntl.LOCK_SH)
        self.joined = True
        """What was forked last is in it."""

    def fork(self) -> int:
        """fork(2) with the child in the leaf, or where that is refused, beside it."""
        self.joined = True
        try:
            return cgroup.fork_into(self.descriptor)
        except OSError:  # Docker's default profile, for one
            pid = os.fork()
        if pid:
            try:
                self._write("cgroup.procs", b"%d" % pid)
            except OSError:
                self.joined = False
        return pid

    def let_go(self) -> None:
        """It is another process's now."""
        os.close(self.descriptor)

    def close(self) -> None:
        """It is of no use any more: removes it."""
        self.remove()
        self.let_go()


def new() -> OwnLeaf | None:
    """One below this process's own group; None: there can be none (any more)."""
    if not place():
        return None
    try:
        return OwnLeaf(place())
    except OSError:
        return None


def sweep(parent: str) -> None:
    """Ends and removes the groups of ours in that folder whose owner is gone: nobody holds their lock."""
    if not parent:
        return
    with os.scandir(parent) as entries:
        found = [entry.path for entry in entries if _is_name(entry.name)]
    for path in found:
        with contextlib.suppress(OSError):
            descriptor = os.open(path, _FOLDER)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left = Leaf(path)
                left.kill()
                left.remove()
            finally:
                os.close(descriptor)


def probe() -> str:
    """Tries it: a process in a leaf and the one it has put into a session of its own are counted, timed and killed.

    Raises:
        OSError: it cannot be had here.
        ValueError: it does not do what it should.
    """
    if not place():
        raise OSError("no control group of version 2 can be made here: calls are ended and measured by their tree")
    leaf = OwnLeaf(place())
    try:
        pid = leaf.fork()
        if pid == 0:
            _outlive()
        clock = LeafClock(leaf)
        if not leaf.joined:
            raise OSError("no process can be started in a control group here")
        _await(lambda: len(leaf.pids()) == 2)
        _await(lambda: clock.read_ns() > 0)
        leaf.kill()
        _await(lambda: not leaf.pids())
        os.waitpid(pid, 0)
    finally:
        leaf.close()
    return "a call has a control group of its own: its end, its processes and their CPU time are exact"


def _outlive() -> NoReturn:
    signal.alarm(_PATIENCE_S)
    if os.fork() == 0:
        os.setsid()
        signal.alarm(_PATIENCE_S)
    while True:
        pass


def _await(condition: Callable[[], bool]) -> None:
    over = time.monotonic() + _PATIENCE_S
    while not condition():
        if time.monotonic() > over:
            raise ValueError("a control group does not tell what it holds, or cannot be killed")
        time.sleep(0.001)
