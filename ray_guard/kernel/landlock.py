"""landlock(7): domains that a process enters for good. Runs in the zygote, in a child that is about to become a tool.

Source: landlock(7), ``include/uapi/linux/landlock.h``. The numbers are the same on every architecture.
"""

from __future__ import annotations

import ctypes
import os
from typing import Final

from ray_guard.kernel import libc

_CREATE_RULESET, _RESTRICT_SELF = 444, 446
_CREATE_RULESET_VERSION = 1
_SCOPE_SIGNAL = 2
SIGNAL_SCOPE_ABI: Final = 6
"""The interface version (Linux 6.12) from which signals can be scoped."""


class _RulesetAttr(ctypes.Structure):
    _fields_ = (
        ("handled_access_fs", ctypes.c_uint64),
        ("handled_access_net", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    )


def abi() -> int:
    """The interface version of this kernel; 0: there is no Landlock."""
    try:
        return libc.syscall(_CREATE_RULESET, 0, 0, _CREATE_RULESET_VERSION)
    except OSError:
        return 0


def enter_process_scope() -> None:
    """From here on this thread, and what it will start, reach no process outside: no signal, ptrace, /proc/PID/mem.

    What it starts may enter a scope within this one: it is reached from here, not the other way round. kill(-1) signals
    the processes of this scope, and no others. Needs no_new_privs. Applies to the calling thread alone, so it is for a
    single-threaded process.

    Raises:
        OSError: EINVAL where the kernel is older than Linux 6.12, ENOSYS or EOPNOTSUPP where it has no Landlock.
    """
    attributes = _RulesetAttr(0, 0, _SCOPE_SIGNAL)
    size = ctypes.sizeof(attributes)
    ruleset = libc.syscall(_CREATE_RULESET, ctypes.addressof(attributes), size, 0)
    try:
        libc.syscall(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
