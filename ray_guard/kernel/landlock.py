"""landlock(7): domains that a process enters for good. Runs in the zygote, in a child that is about to become a tool.

Source: landlock(7), ``include/uapi/linux/landlock.h``. The numbers are the same on every architecture.
"""

from __future__ import annotations

import ctypes
import functools
import os
import stat
from enum import IntFlag
from typing import Final

from ray_guard.kernel import libc

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1
REFER_ABI: Final = 2
"""The interface version (Linux 5.19) from which renames and links between folders can be granted; before, none is."""
TRUNCATE_ABI: Final = 3
"""The interface version (Linux 6.2) from which truncating is judged."""
DEVICE_ABI: Final = 5
"""The interface version (Linux 6.10) from which ioctls of devices are judged."""
SIGNAL_SCOPE_ABI: Final = 6
"""The interface version (Linux 6.12) from which signals can be scoped."""


class Fs(IntFlag):
    """``LANDLOCK_ACCESS_FS_*``."""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_CHAR = 1 << 6
    MAKE_DIR = 1 << 7
    MAKE_REG = 1 << 8
    MAKE_SOCK = 1 << 9
    MAKE_FIFO = 1 << 10
    MAKE_BLOCK = 1 << 11
    MAKE_SYM = 1 << 12
    REFER = 1 << 13
    TRUNCATE = 1 << 14
    IOCTL_DEV = 1 << 15
    RESOLVE_UNIX = 1 << 16


class Scope(IntFlag):
    """``LANDLOCK_SCOPE_*``."""

    ABSTRACT_UNIX_SOCKET = 1 << 0
    SIGNAL = 1 << 1


OF_FILES: Final = Fs.EXECUTE | Fs.WRITE_FILE | Fs.READ_FILE | Fs.TRUNCATE | Fs.IOCTL_DEV
"""What a rule for anything but a folder may name; the kernel refuses such a rule with more."""
# Plain numbers: flags of enum are slow to combine, and whatever code a leader runs is memory of its own.
_OF_FILES, _REFER, _MAKE_BLOCK, _SIGNAL = int(OF_FILES), int(Fs.REFER), int(Fs.MAKE_BLOCK), int(Scope.SIGNAL)
_LAST_RIGHT: Final = {0: 0, 1: 13, 2: 14, 3: 15, 4: 15, 5: 16, 6: 16, 7: 16, 8: 16}
"""How many rights each interface version knows."""


class _RulesetAttr(ctypes.Structure):
    _fields_ = (
        ("handled_access_fs", ctypes.c_uint64),
        ("handled_access_net", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    )


class _PathBeneathAttr(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


_add_rule = libc.c_library["syscall"]  # a function object of its own, whose types are known: called often
_add_rule.restype = ctypes.c_long
_add_rule.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.POINTER(_PathBeneathAttr), ctypes.c_uint32)


def abi() -> int:
    """The interface version of this kernel; 0: there is no Landlock."""
    try:
        return libc.syscall(_CREATE_RULESET, 0, 0, _CREATE_RULESET_VERSION)
    except OSError:
        return 0


@functools.cache
def known_rights(version: int) -> Fs:
    """Every file right that an interface version knows; of a newer one, those this module knows."""
    return Fs((1 << _LAST_RIGHT.get(version, 17)) - 1)


@functools.cache
def known_scopes(version: int) -> Scope:
    return Scope.ABSTRACT_UNIX_SOCKET | Scope.SIGNAL if version >= SIGNAL_SCOPE_ABI else Scope(0)


class Ruleset:
    """A ruleset in the making: what it handles is denied but for what :meth:`allow` adds.

    Args:
        files: file rights that are denied unless a rule grants them.
        scoped: what is confined to the domain and those within it.

    Raises:
        OSError: EINVAL where this kernel does not know one of them, ENOSYS or EOPNOTSUPP where it has no Landlock.
    """

    __slots__ = ("_handled", "_rule", "descriptor")

    def __init__(self, files: int, scoped: int) -> None:
        attributes = _RulesetAttr(files, 0, scoped)
        # An older kernel takes the larger structure too, as long as what it does not know is zero.
        size = ctypes.sizeof(attributes)
        self._handled = int(files)
        self._rule = _PathBeneathAttr()
        self.descriptor = libc.syscall(_CREATE_RULESET, ctypes.addressof(attributes), size, 0)

    def allow(self, descriptor: int, rights: int) -> None:
        """Grants ``rights`` on what ``descriptor`` (O_PATH will do) stands for, and all below it.

        Rights that the ruleset does not handle, or that mean nothing for a file, are left out.
        """
        rights &= self._handled
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            rights &= _OF_FILES
        if rights:
            rule = self._rule
            rule.allowed_access, rule.parent_fd = rights, descriptor
            libc.check(_add_rule(_ADD_RULE, self.descriptor, _RULE_PATH_BENEATH, rule, 0), "landlock_add_rule")

    def enter(self) -> None:
        """The calling thread, and what it will start, are bound by it from here on. Needs no_new_privs."""
        libc.syscall(_RESTRICT_SELF, self.descriptor, 0)

    def close(self) -> None:
        os.close(self.descriptor)


def enter_process_scope() -> None:
    """From here on this thread, and what it will start, reach no process outside: no ptrace, no /proc/PID/mem; and from
    the sixth version on no signal.

    What it starts may enter a scope within this one: it is reached from here, not the other way round. Where signals
    are scoped, kill(-1) signals the processes of this scope, and no others. Needs no_new_privs. Applies to the calling
    thread alone, so it is for a single-threaded process.

    Raises:
        OSError: ENOSYS or EOPNOTSUPP where there is no Landlock.
    """
    version = abi()
    # Every domain that judges files at all denies renames and links between folders in *each* layer that does not say
    # otherwise: so this layer, which is not about files, has to. The first version has no word for it, and needs one.
    right = _REFER if version >= REFER_ABI else _MAKE_BLOCK
    ruleset = Ruleset(right, _SIGNAL if version >= SIGNAL_SCOPE_ABI else 0)
    try:
        root = os.open("/", os.O_PATH | os.O_CLOEXEC)
        ruleset.allow(root, right)
        os.close(root)
        ruleset.enter()
    finally:
        ruleset.close()
