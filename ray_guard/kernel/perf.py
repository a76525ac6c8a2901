"""perf_event_open(2): the CPU time of a process and of all it will ever start. Runs in the supervisor.

The one clock that nothing escapes: a software counter that every child inherits, whose count the kernel adds up when
one ends, whoever waits for it or nobody. Many hosts refuse it (Docker's default profile, ``perf_event_paranoid`` 3).
Source: perf_event_open(2), ``include/uapi/linux/perf_event.h``.
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Final

from ray_guard.kernel import libc
from ray_guard.kernel.syscalls import NUMBERS

_ATTR: Final = struct.Struct("=IIQQQQQ72x")
_TYPE_SOFTWARE, _TASK_CLOCK = 1, 1
_INHERIT, _EXCLUDE_KERNEL, _EXCLUDE_HYPERVISOR = 1 << 1, 1 << 5, 1 << 6  # the latter two: asked of the unprivileged
_FD_CLOEXEC = 8


class TreeClock:
    """From now on. Raises OSError where the kernel or the host refuses it."""

    def __init__(self, pid: int) -> None:
        flags = _INHERIT | _EXCLUDE_KERNEL | _EXCLUDE_HYPERVISOR
        attr = ctypes.create_string_buffer(_ATTR.pack(_TYPE_SOFTWARE, _ATTR.size, _TASK_CLOCK, 0, 0, 0, flags))
        number = NUMBERS["perf_event_open"]
        self._descriptor = libc.syscall(number, ctypes.addressof(attr), pid, -1, -1, _FD_CLOEXEC)

    def read_ns(self) -> int:
        return int.from_bytes(os.read(self._descriptor, 8), "little")

    def close(self) -> None:
        os.close(self._descriptor)
