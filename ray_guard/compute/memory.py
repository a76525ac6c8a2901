"""What a tree of processes has in memory: what is mapped, and files in memory that may be mapped by nobody.

Runs in the supervisor. A file in memory (memfd_create, a file in /dev/shm) takes up memory from when it is written, and
shows in no process's resident size until somebody maps it. System V segments that nobody has attached, and descriptors
that are on their way in a unix socket, are not found; a memory control group has them too.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

from ray_guard.kernel import procfs

_SHM = "/dev/shm"  # noqa: S108 - a mount point
_BLOCK = 512


def upper_bound(pids: Sequence[int], kept: int) -> int:
    """Bytes at most: what several have mapped is counted in each. ``kept``: see :func:`kept`."""
    return sum(map(procfs.resident, pids)) + kept


def divided(pids: Sequence[int], kept: int) -> int:
    """Bytes, with what is shared divided among those who share it. Slow to ask for."""
    shares = [procfs.resident_share(pid) for pid in pids]
    of_files = sum(share.shared_memory for share in shares)
    return sum(share.bytes for share in shares) - of_files + max(of_files, kept)


def kept(pids: Sequence[int]) -> int:
    """Bytes in files in memory that these processes hold open, or that lie in a /dev/shm of their own."""
    found: dict[int, int] = {}
    for pid in pids:
        for number in procfs.descriptors(pid):
            try:
                status = os.stat(f"/proc/{pid}/fd/{number}")
            except OSError:
                continue
            if status.st_dev == _device():
                found[status.st_ino] = status.st_blocks * _BLOCK
    return sum(found.values()) + next((there for pid in pids if (there := _own_shm(pid)) is not None), 0)


@functools.cache
def _device() -> int:
    """The number of the file system that the kernel keeps such files in."""
    descriptor = os.memfd_create("ray_guard", os.MFD_CLOEXEC)
    try:
        return os.fstat(descriptor).st_dev
    finally:
        os.close(descriptor)


@functools.cache
def _outer_shm() -> int:
    try:
        return os.stat(_SHM).st_dev
    except OSError:
        return -1


def _own_shm(pid: int) -> int | None:
    """Bytes in the /dev/shm that the process sees; 0: it is everybody's; None: the process is gone."""
    try:
        if os.stat(f"/proc/{pid}/root{_SHM}").st_dev == _outer_shm():
            return 0
        found = os.statvfs(f"/proc/{pid}/root{_SHM}")
    except OSError:
        return None
    return (found.f_blocks - found.f_bfree) * found.f_frsize
