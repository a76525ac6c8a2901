"""What a pidfd and a clock tell of a process: pidfd_open(2), PIDFD_GET_INFO, clock_gettime(2). Runs in the supervisor.

Source: ``include/uapi/linux/pidfd.h`` and ``kernel/time/posix-cpu-timers.c``, Linux 6.18.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from typing import Final

from ray_guard.kernel import procfs

_INFO: Final = struct.Struct("=QQ11Ii")
_GET_INFO: Final = 0xC0000000 | _INFO.size << 16 | 0xFF << 8 | 11
_WANTS_EXIT: Final = 1 << 3
_PARENT: Final = struct.Struct("=24xI")
_CPUCLOCK_SCHED: Final = 2


def parent(pidfd: int) -> int | None:
    """The parent of a live process; None: nobody can tell (before Linux 6.13: :func:`procfs.parent`, which is slow)."""
    found = bytearray(_INFO.size)
    try:
        fcntl.ioctl(pidfd, _GET_INFO, found, True)
    except OSError:
        return None
    return int(_PARENT.unpack_from(found)[0])


def exit_status(pidfd: int, pid: int) -> int | None:
    """How a process ended, as waitpid gives it; None: it runs, or nobody can tell any more (before Linux 6.15).

    The descriptor must have been opened before the process was waited for.
    """
    status = _told_exit(pidfd)
    if status is None:  # not waited for yet, then the pid is still its own
        status = procfs.zombie_status(pid)
    if status is None:  # it was waited for just now
        status = _told_exit(pidfd)
    return status


def _told_exit(pidfd: int) -> int | None:
    found = bytearray(_INFO.pack(_WANTS_EXIT, *(0,) * 13))
    try:
        fcntl.ioctl(pidfd, _GET_INFO, found, True)
    except OSError:  # ENOTTY: an older kernel; ESRCH: it has been waited for
        return None
    about = _INFO.unpack(found)
    return int(about[-1]) if about[0] & _WANTS_EXIT else None


def cpu_ns(pid: int) -> int | None:
    """CPU time of all threads of a process, those that have ended included; None: it has been waited for.

    Exact, where the ticks in /proc would leave out every process that lives shorter than one.
    """
    try:
        return time.clock_gettime_ns(~pid << 3 | _CPUCLOCK_SCHED)
    except OSError:
        return None


def opened(pid: int) -> int:
    """A pidfd of process ``pid``; ``-errno`` where it is gone, or a thread that leads no process."""
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        return -(error.errno or 1)
