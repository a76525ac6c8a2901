"""mount(2) and mount namespaces. Runs in the zygote, and in the supervisor that asks whether it may.

Source: mount(2), mount_setattr(2), mount_namespaces(7).
"""

from __future__ import annotations

import ctypes
import functools
import os
from enum import Enum
from typing import Final

from ray_guard.kernel import libc
from ray_guard.kernel.trial import FAILED, Trial

MS_RDONLY: Final = 1
MS_NOSUID: Final = 2
MS_NODEV: Final = 4
MS_NOEXEC: Final = 8
MS_BIND: Final = 0x1000
MS_REC: Final = 0x4000
MS_SLAVE: Final = 1 << 19
CLONE_FS: Final = 0x200
CLONE_NEWNS: Final = 0x20000
CLONE_NEWUSER: Final = 0x10000000

_NR_MOUNT_SETATTR = 442
_AT_RECURSIVE = 0x8000
_MOUNT_ATTR_RDONLY = 1


_mount = libc.c_library["mount"]
_mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_setns = libc.c_library["setns"]
_setns.argtypes = (ctypes.c_int, ctypes.c_int)


class _MountAttr(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd"))


_READ_ONLY: Final = _MountAttr(_MOUNT_ATTR_RDONLY, 0, 0, 0)
_mount_setattr = libc.c_library["syscall"]
_mount_setattr.restype = ctypes.c_long
_mount_setattr.argtypes = (
    ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint, ctypes.POINTER(_MountAttr), ctypes.c_size_t
)  # fmt: skip


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    code = _mount(os.fsencode(source), os.fsencode(target), kind.encode(), flags, options.encode())
    libc.check(code, f"mount {target}")


def make_read_only(target: str) -> None:
    """The mount at ``target`` and all below it."""
    code = _mount_setattr(
        _NR_MOUNT_SETATTR, libc.AT_FDCWD, os.fsencode(target), _AT_RECURSIVE, _READ_ONLY, ctypes.sizeof(_READ_ONLY)
    )
    libc.check(code, f"mount_setattr {target}")


def setns(descriptor: int, kind: int) -> None:
    libc.check(_setns(descriptor, kind), "setns")


class Way(Enum):
    """How a process comes by a mount namespace of its own."""

    NONE = 0
    """Not at all."""
    PRIVILEGED = 1
    """It has CAP_SYS_ADMIN."""
    USER = 2
    """In a user namespace, in which its user and group are the only ones."""


def enter_own_namespace(how: Way) -> None:
    """A mount namespace of this process's own: what is mounted outside appears in it, nothing the other way round.

    Raises:
        OSError: EPERM where that is not for this process.
    """
    if how is Way.USER:
        user, group = os.geteuid(), os.getegid()
        libc.unshare(CLONE_NEWUSER | CLONE_NEWNS)
        for name, content in (
            ("setgroups", "deny"),  # or no group could be mapped
            ("uid_map", f"{user} {user} 1"),
            ("gid_map", f"{group} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(content)
    else:
        libc.unshare(CLONE_NEWNS)
    mount("none", "/", "none", MS_REC | MS_SLAVE)


@functools.cache
def way() -> Way:
    """How this process and its children could have one, and mount in it; tried once, and a forked one keeps it."""
    outcome = TRIAL.outcome
    return Way.NONE if outcome == FAILED else Way(outcome)


@functools.cache
def works() -> bool:
    return way() is not Way.NONE


def _attempt() -> int:
    libc.prctl(libc.PR_SET_DUMPABLE, 1)  # else /proc/self is root's
    for how in (Way.PRIVILEGED, Way.USER):
        try:
            enter_own_namespace(how)
            mount("tmpfs", "/dev", "tmpfs", MS_RDONLY, "size=4k")
            make_read_only("/dev")
        except OSError:
            continue
        return int(how.value)
    return int(Way.NONE.value)


TRIAL: Final = Trial(_attempt)
