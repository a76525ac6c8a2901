"""chmod, chown, utime and xattr of a tool, which no Landlock judges: done on its behalf. Runs in the supervisor.

So is truncate, where Landlock does not judge it (before its third version).

What a path or descriptor means to the caller is pinned once; where it lies in what the call may write, the change is
made to what was pinned, without a capability, so with the rights that the tool has itself. Elsewhere it is EPERM.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Callable, Mapping
from typing import Final

from ray_guard.egress.gate import Gate, Handler
from ray_guard.egress.sockaddr import BadAddress
from ray_guard.kernel import libc
from ray_guard.kernel.seccomp import Notification
from ray_guard.kernel.syscalls import NUMBERS
from ray_guard.supervisor.view import View

_PAGE: Final = 4096
PATH_LIMIT: Final = 4096
_NAME_LIMIT: Final = 256
_VALUE_LIMIT: Final = 1 << 16
_AT_FDCWD: Final = 0xFFFFFF9C
_AT_SYMLINK_NOFOLLOW: Final = 0x100
_AT_EMPTY_PATH: Final = 0x1000
_SHARED_MEMORY: Final = "/dev/shm/"  # noqa: S108 - with a mount namespace the call's own
_NOWHERE: Final = ("pipe:", "socket:", "anon_inode:", "/memfd:")
"""What lies in no folder: descriptors of the tool's own."""

Act = Callable[[str], None]


class Metadata:
    """The handlers of one call's gate."""

    def __init__(self, view: View) -> None:
        self._view = view

    def handlers(self) -> Mapping[str, Handler]:
        return {
            "truncate": self._truncate,
            "chmod": self._chmod,
            "fchmod": self._fchmod,
            "fchmodat": self._fchmodat,
            "chown": self._chown,
            "lchown": self._lchown,
            "fchown": self._fchown,
            "fchownat": self._fchownat,
            "utime": self._utime,
            "utimes": self._utimes,
            "futimesat": self._futimesat,
            "utimensat": self._utimensat,
            "setxattr": self._setxattr,
            "lsetxattr": self._lsetxattr,
            "fsetxattr": self._fsetxattr,
            "removexattr": self._removexattr,
            "lremovexattr": self._lremovexattr,
            "fremovexattr": self._fremovexattr,
        }

    # -- size ----------------------------------------------------------------------------------------------------------

    def _truncate(self, gate: Gate, n: Notification) -> None:
        size = (n.arg1 ^ 1 << 63) - (1 << 63)
        self._at_path(gate, n, _AT_FDCWD, n.arg0, lambda path: os.truncate(path, size))

    # -- mode ----------------------------------------------------------------------------------------------------------

    def _chmod(self, gate: Gate, n: Notification) -> None:
        self._at_path(gate, n, _AT_FDCWD, n.arg0, _mode(n.arg1))

    def _fchmod(self, gate: Gate, n: Notification) -> None:
        self._at_descriptor(gate, n, n.arg0, _mode(n.arg1))

    def _fchmodat(self, gate: Gate, n: Notification) -> None:
        self._at_path(gate, n, n.arg0, n.arg1, _mode(n.arg2))

    # -- owner ---------------------------------------------------------------------------------------------------------

    def _chown(self, gate: Gate, n: Notification) -> None:
        self._at_path(gate, n, _AT_FDCWD, n.arg0, _owner(n.arg1, n.arg2))

    def _lchown(self, gate: Gate, n: Notification) -> None:
        self._at_path(gate, n, _AT_FDCWD, n.arg0, _owner(n.arg1, n.arg2), flags=_AT_SYMLINK_NOFOLLOW)

    def _fchown(self, gate: Gate, n: Notification) -> None:
        self._at_descriptor(gate, n, n.arg0, _owner(n.arg1, n.arg2))

    def _fchownat(self, gate: Gate, n: Notification) -> None:
        self._at_path(gate, n, n.arg0, n.arg1, _owner(n.arg2, n.arg3), flags=n.arg4)

    # -- times ---------------------------------------------------------------------------------------------------------

    def _utime(self, gate: Gate, n: Notification) -> None:
        times = _timespecs(gate.read(n, n.arg1, 16), 0) if n.arg1 else None
        self._at_path(gate, n, _AT_FDCWD, n.arg0, _times(times))

    def _utimes(self, gate: Gate, n: Notification) -> None:
        times = _timespecs(gate.read(n, n.arg1, 32), 1000) if n.arg1 else None
        self._at_path(gate, n, _AT_FDCWD, n.arg0, _times(times))

    def _futimesat(self, gate: Gate, n: Notification) -> None:
        times = _timespecs(gate.read(n, n.arg2, 32), 1000) if n.arg2 else None
        if n.arg1:
            self._at_path(gate, n, n.arg0, n.arg1, _times(times))
        else:
            self._at_descriptor(gate, n, n.arg0, _times(times))

    def _utimensat(self, gate: Gate, n: Notification) -> None:
        times = gate.read(n, n.arg2, 32) if n.arg2 else None
        if n.arg1:
            self._at_path(gate, n, n.arg0, n.arg1, _times(times), flags=n.arg3)
        else:
            self._at_descriptor(gate, n, n.arg0, _times(times))

    # -- extended attributes -------------------------------------------------------------------------------------------

    def _setxattr(self, gate: Gate, n: Notification) -> None:
        self._at_path(gate, n, _AT_FDCWD, n.arg0, _attribute(gate, n))

    def _lsetxattr(self, gate: Gate, n: Notification) -> None:
        self._at_path(gate, n, _AT_FDCWD, n.arg0, _attribute(gate, n), flags=_AT_SYMLINK_NOFOLLOW)

    def _fsetxattr(self, gate: Gate, n: Notification) -> None:
        self._at_descriptor(gate, n, n.arg0, _attribute(gate, n))

    def _removexattr(self, gate: Gate, n: Notification) -> None:
        self._at_path(gate, n, _AT_FDCWD, n.arg0, _no_attribute(gate, n))

    def _lremovexattr(self, gate: Gate, n: Notification) -> None:
        self._at_path(gate, n, _AT_FDCWD, n.arg0, _no_attribute(gate, n), flags=_AT_SYMLINK_NOFOLLOW)

    def _fremovexattr(self, gate: Gate, n: Notification) -> None:
        self._at_descriptor(gate, n, n.arg0, _no_attribute(gate, n))

    # -- what they have in common --------------------------------------------------------------------------------------

    def _at_path(self, gate: Gate, n: Notification, folder: int, pointer: int, act: Act, *, flags: int = 0) -> None:
        flags &= 0xFFFFFFFF
        if flags & ~(_AT_SYMLINK_NOFOLLOW | _AT_EMPTY_PATH):
            raise BadAddress(errno.EINVAL)
        path = text(gate, n, pointer, PATH_LIMIT, errno.ENAMETOOLONG)
        if not path:
            if not flags & _AT_EMPTY_PATH:
                raise BadAddress(errno.ENOENT)
            self._at_descriptor(gate, n, folder, act)
            return
        self._change(gate, n, _pinned(n.pid, folder & 0xFFFFFFFF, path, follow=not flags & _AT_SYMLINK_NOFOLLOW), act)

    def _at_descriptor(self, gate: Gate, n: Notification, number: int, act: Act) -> None:
        number &= 0xFFFFFFFF
        link = f"/proc/{n.pid}/" + ("cwd" if number == _AT_FDCWD else f"fd/{number}")
        try:
            pinned = os.open(link, os.O_PATH | os.O_CLOEXEC)
        except OSError as error:
            raise BadAddress(errno.EBADF if error.errno == errno.ENOENT else error.errno or errno.EBADF) from error
        self._change(gate, n, pinned, act)

    def _change(self, gate: Gate, n: Notification, pinned: int, act: Act) -> None:
        """Judges what is pinned, changes it, and answers."""
        error = 0
        try:
            if not gate.listener.is_valid(n.id):  # the thread's descriptors may be another's by now
                return
            if not self._view.enforced or self._may_change(n.pid, pinned):
                with libc.without_capabilities():
                    act(f"/proc/self/fd/{pinned}")
            else:
                error = errno.EPERM
        except OSError as failed:
            error = failed.errno or errno.EPERM
        finally:
            os.close(pinned)
        gate.listener.answer(n.id, error=error)

    def _may_change(self, tid: int, pinned: int) -> bool:
        path = os.readlink(f"/proc/self/fd/{pinned}")
        if path.startswith(_NOWHERE):  # by /proc/PID/fd it may be somebody else's, whom Landlock keeps apart
            return _is_held_by(tid, pinned)
        if f"{path}/".startswith(_SHARED_MEMORY) and not _is_seen_by(tid, pinned):
            return False  # by a symbolic link, for one: what this process sees there is the host's
        return self._view.may_change(path.removesuffix(" (deleted)"))


def _is_held_by(tid: int, pinned: int) -> bool:
    """Whether the thread has a descriptor of it."""
    found = os.fstat(pinned)
    try:
        numbers = os.listdir(f"/proc/{tid}/fd")
    except OSError:
        return False
    for number in numbers:
        try:
            if os.path.samestat(os.stat(f"/proc/{tid}/fd/{number}"), found):
                return True
        except OSError:  # closed meanwhile
            continue
    return False


def _is_seen_by(tid: int, pinned: int) -> bool:
    """Whether what lies in /dev/shm lies in the thread's: a call has one of its own."""
    try:
        return os.stat(f"/proc/{tid}/root{_SHARED_MEMORY}").st_dev == os.fstat(pinned).st_dev
    except OSError:
        return False


def _pinned(tid: int, folder: int, path: bytes, *, follow: bool) -> int:
    """What ``path`` means to the thread, as an O_PATH descriptor."""
    own = {b"/proc/self/": b"/proc/%d/", b"/proc/thread-self/": b"/proc/%d/", b"/dev/fd/": b"/proc/%d/fd/"}
    for prefix, instead in own.items():  # would mean this process
        if path.startswith(prefix):
            path = instead % tid + path[len(prefix) :]
    if (path + b"/").startswith(_SHARED_MEMORY.encode()):
        path = b"/proc/%d/root%s" % (tid, path)
    at = None
    flags = os.O_PATH | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        if path.startswith(b"/proc/"):  # another process's descriptors are not for a process without capabilities
            return os.open(path, flags)
        if not path.startswith(b"/"):
            start = f"/proc/{tid}/cwd" if folder == _AT_FDCWD else f"/proc/{tid}/fd/{folder}"
            try:
                at = os.open(start, os.O_PATH | os.O_CLOEXEC)
            except FileNotFoundError as error:
                raise BadAddress(errno.EBADF) from error
        with libc.without_capabilities():
            return os.open(path, flags, dir_fd=at)
    except OSError as error:
        raise BadAddress(error.errno or errno.ENOENT) from error
    finally:
        if at is not None:
            os.close(at)


def text(gate: Gate, n: Notification, pointer: int, limit: int, too_long: int) -> bytes:
    """The text at ``pointer``, without its NUL. Raises BadAddress EFAULT, or ``too_long``."""
    found = b""
    while len(found) < limit:
        part = min(_PAGE - pointer % _PAGE, limit - len(found))  # what is mapped is mapped to its page's end
        found += gate.read(n, pointer, part)
        end = found.find(b"\0")
        if end >= 0:
            return found[:end]
        pointer += part
    raise BadAddress(too_long)


def _mode(mode: int) -> Act:
    return lambda path: os.chmod(path, mode & 0o7777)


def _owner(user: int, group: int) -> Act:
    def identity(number: int) -> int:
        number &= 0xFFFFFFFF
        return -1 if number == 0xFFFFFFFF else number

    return lambda path: os.chown(path, identity(user), identity(group))


def _timespecs(raw: bytes, scale: int) -> bytes:
    """Two ``struct timespec``, from ``struct utimbuf`` (scale 0) or two ``struct timeval`` (scale 1000)."""
    if scale == 0:
        accessed, modified = struct.unpack("=qq", raw)
        return struct.pack("=4q", accessed, 0, modified, 0)
    accessed, a_micro, modified, m_micro = struct.unpack("=4q", raw)
    if not (0 <= a_micro < 1_000_000 and 0 <= m_micro < 1_000_000):
        raise BadAddress(errno.EINVAL)
    return struct.pack("=4q", accessed, a_micro * scale, modified, m_micro * scale)


def _times(timespecs: bytes | None) -> Act:
    def act(path: str) -> None:
        name = ctypes.create_string_buffer(path.encode())
        given = None if timespecs is None else ctypes.create_string_buffer(timespecs, len(timespecs))
        libc.syscall(
            NUMBERS["utimensat"],
            libc.AT_FDCWD,
            ctypes.addressof(name),
            0 if given is None else ctypes.addressof(given),
            0,
        )

    return act


def _attribute(gate: Gate, n: Notification) -> Act:
    size = n.arg3
    if size > _VALUE_LIMIT:
        raise BadAddress(errno.E2BIG)
    name = text(gate, n, n.arg1, _NAME_LIMIT, errno.ERANGE)
    value = gate.read(n, n.arg2, size)
    return lambda path: os.setxattr(path, name, value, n.arg4 & 0xFFFFFFFF)


def _no_attribute(gate: Gate, n: Notification) -> Act:
    name = text(gate, n, n.arg1, _NAME_LIMIT, errno.ERANGE)
    return lambda path: os.removexattr(path, name)
