"""The control group of one start: a leaf below its requester's own, which the tool and all it starts are born into.

Runs in the leaders, which make it and end it, and in the supervisor, which reads it. Version 2 alone is asked for:
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

from ray_guard.kernel import cgroup

_PREFIX: Final = "ray_guard-"
_PATIENCE_S: Final = 5
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@functools.cache
def place() -> str:
    """The folder of this process's group, if leaves can be made in it; else empty. Tried, once."""
    try:
        own = cgroup.folder("", cgroup.paths(cgroup.read(os.getpid()))[""])
        trial = f"{own}/{_name()}"
        os.mkdir(trial)
        works = os.path.exists(f"{trial}/cgroup.kill")
        os.rmdir(trial)
    except (OSError, KeyError):
        return ""
    return own if works else ""


def _name() -> str:
    return _PREFIX + os.urandom(6).hex()


def _is_name(name: str) -> bool:
    number = name.removeprefix(_PREFIX)
    return len(number) == 12 and number != name and not number.strip("0123456789abcdef")


class Leaf:
    """One, as whoever reads it knows it.

    Args:
        path: its folder.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def pids(self) -> list[int]:
        """All processes in it that live: zombies are not told. Raises OSError."""
        with open(f"{self.path}/cgroup.procs", "rb", buffering=0) as file:
            return [int(word) for word in file.readall().split()]

    def cpu_ns(self) -> int:
        """CPU time of all that ever was in it, to the microsecond. Raises OSError."""
        with open(f"{self.path}/cpu.stat", "rb", buffering=0) as file:
            return int(file.read(64).split(None, 2)[1]) * 1000

    def kill(self) -> None:
        """Kills all in it, and what they are forking. Without effect where it is gone."""
        with contextlib.suppress(OSError):
            self._write("cgroup.kill", b"1")

    def _write(self, name: str, data: bytes) -> None:
        with open(f"{self.path}/{name}", "wb", buffering=0) as file:
            file.write(data)

    def remove(self) -> None:
        """Takes it away; one that somebody is in stays."""
        with contextlib.suppress(OSError):
            os.rmdir(self.path)


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
        above: the same one, open, for who may have mounted something over it.

    Raises:
        OSError: none can be made (any more).
    """

    def __init__(self, parent: str, above: int | None = None) -> None:
        name = _name()
        super().__init__(f"{parent}/{name}")
        self._above = above
        self._name = self.path if above is None else name
        os.mkdir(self._name, dir_fd=above)
        self._descriptor = os.open(self._name, _FOLDER, dir_fd=above)
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)
        self.joined = True
        """What was forked last is in it."""
        self.killed = False
        """To be set by whoever knows that somebody else has killed it."""

    @functools.cached_property
    def counts_memory(self) -> bool:
        return os.access("memory.stat", os.F_OK, dir_fd=self._descriptor)

    def fork(self) -> int:
        """fork(2) with the child in the leaf, or where that is refused, beside it."""
        self.joined = True
        try:
            return cgroup.fork_into(self._descriptor)
        except OSError:  # Docker's default profile, for one
            pid = os.fork()
        if pid:
            try:
                self._write("cgroup.procs", b"%d" % pid)
            except OSError:
                self.joined = False
        return pid

    def _write(self, name: str, data: bytes) -> None:
        file = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=self._descriptor)
        try:
            os.write(file, data)
        finally:
            os.close(file)

    def kill(self) -> None:
        self.killed = True
        super().kill()

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            os.rmdir(self._name, dir_fd=self._above)

    def close(self) -> None:
        """It is of no use any more: removes it."""
        self.remove()
        os.close(self._descriptor)


class Place:
    """Where a leader has its leaf: below the group it is in itself, held open before it mounts anything.

    One serves for one call after the other, for it is empty in between (else the leader ends), and its readers go by
    differences. Not so where it counts memory: what a call left in a temporary file is there still. Nor once it was
    killed: the kernel then kills whatever is forked into it from another group (seen on Linux 6.18).
    """

    def __init__(self) -> None:
        self._above = os.open(place(), _FOLDER) if place() else -1
        self._leaf: OwnLeaf | None = None

    def leaf(self) -> OwnLeaf | None:
        """For the next tool; None: it has to do without."""
        if self._leaf is not None and (self._leaf.counts_memory or self._leaf.killed):
            self.close()
        if self._leaf is None and self._above >= 0:
            with contextlib.suppress(OSError):  # there may be too many of them
                self._leaf = OwnLeaf(place(), self._above)
        return self._leaf

    def close(self) -> None:
        """The last call of it has ended."""
        if self._leaf is not None:
            self._leaf.close()
            self._leaf = None


def sweep() -> None:
    """Ends and removes the leaves beside one's own whose owner is gone: nobody holds their lock."""
    if not place():
        return
    with os.scandir(place()) as entries:
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
