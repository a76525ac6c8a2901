"""GPU device nodes and who holds one: /dev, /proc/PID/fd. Runs in the supervisor and its helper.

By device number (:mod:`ray_guard.kernel.gpu_majors`), not by path: a node may be made anywhere. Source:
``fs/proc/fd.c``.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from typing import Final, NamedTuple

from ray_guard.kernel.gpu_majors import Kind, Majors

_CPUCLOCK_SCHED: Final = 2


class Node(NamedTuple):
    """A device node that programs find: its path and kind."""

    path: str
    kind: Kind


_NAMES: Final = ((re.compile(r"nvidia\d+\Z"), Kind.NVIDIA), (re.compile(r"kfd\Z"), Kind.KFD))


def nodes(folder: str = "/dev") -> list[Node]:
    """The GPU nodes of this mount namespace, by their usual names; render nodes too."""
    found = []
    for where, patterns in ((folder, _NAMES), (f"{folder}/dri", ((re.compile(r"renderD\d+\Z"), Kind.DRM),))):
        try:
            names = sorted(os.listdir(where))
        except OSError:
            continue
        for name in names:
            for pattern, kind in patterns:
                path = f"{where}/{name}"
                if pattern.match(name) and _is_character_device(path):
                    found.append(Node(path, kind))
    return found


def _is_character_device(path: str) -> bool:
    try:
        return stat.S_ISCHR(os.stat(path).st_mode)
    except OSError:
        return False


def rendered_by(device: int) -> str | None:
    """Name of the driver behind a DRM node; None: unknown."""
    try:
        link = os.readlink(f"/sys/dev/char/{os.major(device)}:{os.minor(device)}/device/driver")
    except OSError:
        return None
    return os.path.basename(link)


class _Seen(NamedTuple):
    cpu_ns: int
    devices: frozenset[int] | None


class Descriptors:
    """Finds the processes that hold a GPU's descriptor, scan after scan.

    A process that has not run since the last scan has opened nothing since then, and its CPU time in nanoseconds costs
    one system call where its descriptors would cost hundreds. (Clock read first, descriptors after it: what is opened
    in between shows in the next scan's clock. io_uring's kernel threads, which could open for it, are refused.)

    Args:
        known: the majors to look for.
        turns: in how many scans every process that runs has its turn, so that one scan costs a part of all; a process
            that is new is looked at whenever it is found.
        uid: whose processes matter if they cannot be read.
    """

    def __init__(self, known: Majors, *, turns: int = 1, uid: int | None = None) -> None:
        self.majors = dict(known)
        self._turns = turns
        self._turn = 0
        self._uid = os.getuid() if uid is None else uid
        self._seen: dict[int, _Seen] = {}

    def scan(self) -> tuple[dict[int, frozenset[int]], list[int]]:
        """Holders (pid → device numbers), and processes of this user whose descriptors are not to be read."""
        seen, before = {}, self._seen
        clock, turns = time.clock_gettime_ns, self._turns
        self._turn = turn = (self._turn + 1) % turns
        for name in os.listdir("/proc"):
            if not name.isdigit():
                continue
            pid = int(name)
            try:
                cpu = clock(~pid << 3 | _CPUCLOCK_SCHED)
            except OSError:
                continue  # gone, or waiting to be reaped: it holds nothing any more
            known = before.get(pid)
            if known is None or (pid % turns == turn and known.cpu_ns != cpu):
                known = _Seen(cpu, self._held(name))
            seen[pid] = known
        self._seen = seen
        holders = {pid: found.devices for pid, found in seen.items() if found.devices}
        return holders, [pid for pid, found in seen.items() if found.devices is None]

    def _held(self, name: str) -> frozenset[int] | None:
        """The GPU devices of process ``name``. None: ours to read, and unreadable."""
        try:
            found = self._devices(f"/proc/{name}/fd")
            if found is None:  # or its first thread has ended, and those that go on hold what there is
                threads = (self._devices(f"/proc/{name}/task/{tid}/fd") for tid in os.listdir(f"/proc/{name}/task"))
                found = next((devices for devices in threads if devices is not None), _NOTHING)
            return found
        except OSError as error:
            unreadable = error.errno in (errno.EACCES, errno.EPERM) and self._is_ours(name)
            return None if unreadable else _NOTHING

    def _devices(self, path: str) -> frozenset[int] | None:
        """The GPU devices among the descriptors listed at ``path``. None: there are no descriptors."""
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            names = os.listdir(folder)
            return self._among(folder, names) if names else None
        finally:
            os.close(folder)

    def _among(self, folder: int, names: list[str]) -> frozenset[int]:
        found = set()
        for name in names:
            try:
                device = os.stat(name, dir_fd=folder).st_rdev
            except OSError:
                continue  # closed meanwhile
            if device and os.major(device) in self.majors:
                found.add(device)
        return frozenset(found) if found else _NOTHING

    def _is_ours(self, name: str) -> bool:
        """Whether it runs as our user: one that is not dumpable has files that belong to root."""
        try:
            owner = os.stat(f"/proc/{name}").st_uid
            if owner not in (0, self._uid):
                return False
            with open(f"/proc/{name}/status", "rb", buffering=0) as file:
                for line in file.read(4096).splitlines():
                    if line.startswith(b"Uid:"):
                        return self._uid in map(int, line.split()[1:])
        except OSError:
            pass
        return False


_NOTHING: Final[frozenset[int]] = frozenset()
