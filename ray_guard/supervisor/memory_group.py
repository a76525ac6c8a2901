"""What a call has in memory as the kernel charges it, and no further: a control group of version 1. Runs in supervisor.

It counts what no process has mapped (files in memory, System V segments, what is on its way), and its limit stops what
grows faster than it can be looked at. Version 2 does not offer it here: a group that has processes, as the requester's
has, cannot give those below it a memory controller. There, and where none can be made, memory is sampled
(:mod:`ray_guard.compute.memory`).

What counts for the policy's limit is resident memory; the kernel's limit is on more (page cache, which gives way, and
the kernel's own), so it lies above: :func:`ceiling`.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import signal
from typing import Final

from ray_guard.kernel import cgroup
from ray_guard.supervisor.leaf import new_name

_KIND: Final = "memory"
_SLACK: Final = 32 << 20


def ceiling(limit: int) -> int:
    """Bytes beyond which the kernel ends processes of a call whose limit that is."""
    return limit + limit // 8 + _SLACK


@functools.cache
def place() -> str:
    """The folder of this process's group, if others can be made in it; else empty. Tried, once."""
    try:
        own = cgroup.folder(_KIND, cgroup.paths(cgroup.read(os.getpid()))[_KIND])
        trial = MemoryGroup(own, _SLACK)
        os.close(trial.entrance)
        trial.close()
    except (OSError, KeyError):
        return ""
    return own


class MemoryGroup:
    """One start's.

    Args:
        parent: folder of the requester's own group.
        limit: the call's, in bytes.

    Raises:
        OSError: none can be made there.
    """

    def __init__(self, parent: str, limit: int) -> None:
        self.path = f"{parent}/{new_name()}"
        os.mkdir(self.path)
        self._lock = -1
        try:
            self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._lock, fcntl.LOCK_SH)  # see leaf.sweep
            with open(f"{self.path}/memory.limit_in_bytes", "wb", buffering=0) as file:
                file.write(b"%d" % ceiling(limit))
            self.entrance = os.open(f"{self.path}/tasks", os.O_WRONLY | os.O_CLOEXEC)
            """A thread that writes ``0`` here is in, with what it starts from then on; for its taker to close."""
        except OSError:
            self.close()
            raise

    def resident(self) -> int:
        """Bytes: what is private, and what is in files, in memory or mapped. Raises OSError."""
        with open(f"{self.path}/memory.stat", "rb", buffering=0) as file:
            found = dict(line.split() for line in file.read(1 << 14).splitlines())
        return int(found[b"rss"]) + max(int(found[b"shmem"]), int(found[b"mapped_file"]))

    def overrun(self) -> int:
        """Bytes it had at most, if the kernel had to end a process of it for that; else 0. Raises OSError."""
        with open(f"{self.path}/memory.oom_control", "rb", buffering=0) as file:
            about = dict(line.split() for line in file.read(1 << 12).splitlines())
        if not int(about.get(b"oom_kill", 0)):
            return 0
        with open(f"{self.path}/memory.max_usage_in_bytes", "rb", buffering=0) as file:
            return int(file.read(64))

    def close(self) -> None:
        """The call has ended, with all that was in it."""
        with contextlib.suppress(OSError):
            os.rmdir(self.path)
        if self._lock >= 0:
            os.close(self._lock)


def below(requester: int, limit: int) -> MemoryGroup | None:
    """One below that process's own group; None: there can be none."""
    if not place():
        return None
    try:
        return MemoryGroup(cgroup.folder(_KIND, cgroup.paths(cgroup.read(requester))[_KIND]), limit)
    except (OSError, KeyError):
        return None


def probe() -> str:
    """Tries it: 8 MiB that a process keeps in a file in memory, and maps nowhere, are counted.

    Raises:
        OSError: it cannot be had here.
        ValueError: it does not count them.
    """
    if not place():
        raise OSError("no memory group of version 1 can be made here: memory is sampled")
    group = MemoryGroup(place(), 64 << 20)
    try:
        ready, done = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.write(group.entrance, b"0")
                os.write(os.memfd_create("probe"), bytes(8 << 20))
                os.write(done, b"x")
                signal.pause()
            finally:
                os._exit(0)
        os.close(group.entrance)
        os.close(done)
        os.read(ready, 1)
        os.close(ready)
        found = group.resident()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    finally:
        group.close()
    if found < 8 << 20:
        raise ValueError(f"8 MiB in a file in memory read as {found} bytes")
    return "a call's memory is what the kernel charges it, and ends an eighth and 32 MiB above its limit at the latest"
