"""The threads behind one listener: reading their memory, borrowing their descriptors. Runs in the supervisor.

Both are kept open for threads that ask often, because opening them costs more than using them. What is kept can only be
too old, never another ring's: a dead thread's pidfd answers ESRCH and a dead memory reads as nothing, and then both are
opened anew. (A thread that asked between vfork and exec leaves its parent's memory here. What is read there is judged
and acted on as read, so it can mislead nobody but the thread itself.)
"""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from ray_guard.kernel import libc, procfs
from ray_guard.named import NamedTuple

_CAPACITY: Final = 32


class Thread(NamedTuple):
    pidfd: int
    memory: int


class Threads:
    """See the module. Not shared between rings."""

    def __init__(self, capacity: int = _CAPACITY) -> None:
        self._open: OrderedDict[int, Thread] = OrderedDict()
        self._capacity = capacity

    def known(self) -> Callable[[int], Thread | None]:
        """Tells what is open of a thread that asked before: as good as the methods below where it works."""
        return self._open.get

    def read(self, tid: int, address: int, length: int) -> bytes | int:
        """``length`` bytes at ``address`` of the thread's memory, or ``-errno`` (EFAULT where they are not all there).

        The caller checks afterwards that the thread still waits: until then the bytes may be a stranger's.
        """
        thread = self._open.get(tid)
        if thread is not None:
            data = _pread(thread.memory, address, length)
            if data != -errno.ESRCH:
                return data
            self._forget(tid)
        try:
            thread = self._enter(tid)
        except OSError as error:
            return -(error.errno or errno.ESRCH)
        return _pread(thread.memory, address, length)

    def descriptor(self, tid: int, number: int) -> int:
        """A duplicate (close-on-exec) of the thread's descriptor ``number``, or ``-errno``."""
        thread = self._open.get(tid)
        if thread is not None:
            duplicate = libc.pidfd_getfd(thread.pidfd, number)
            if duplicate != -errno.ESRCH:
                return duplicate
            self._forget(tid)
        try:
            thread = self._enter(tid)
        except OSError as error:
            return -(error.errno or errno.ESRCH)
        return libc.pidfd_getfd(thread.pidfd, number)

    def _enter(self, tid: int) -> Thread:
        pidfd = _pidfd(tid)
        try:
            memory = os.open(f"/proc/{tid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            os.close(pidfd)
            raise
        while len(self._open) >= self._capacity:
            self._forget(next(iter(self._open)))
        thread = self._open[tid] = Thread(pidfd, memory)
        return thread

    def _forget(self, tid: int) -> None:
        for descriptor in self._open.pop(tid):
            os.close(descriptor)

    def close(self) -> None:
        while self._open:
            self._forget(next(iter(self._open)))


def _pread(memory: int, address: int, length: int) -> bytes | int:
    try:
        data = os.pread(memory, length, address)
    except OverflowError:
        return -errno.EFAULT  # beyond what any process can have
    except OSError as error:
        return -errno.EFAULT if error.errno == errno.EIO else -(error.errno or errno.EFAULT)
    if len(data) == length:
        return data
    return -errno.ESRCH if not data else -errno.EFAULT


def _pidfd(tid: int) -> int:
    try:
        return os.pidfd_open(tid, libc.PIDFD_THREAD)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    leader = procfs.thread_group(tid)  # before Linux 6.9; threads nearly always share one descriptor table
    if leader is None:
        raise ProcessLookupError(errno.ESRCH, "the thread is gone")
    return os.pidfd_open(leader)
