"""A call's view of the file system, entered by the process that is about to become the tool. Runs in the zygote.

What every view has in common is put into a ruleset before anybody asks; a start adds what is its own and enters.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import os
import stat
from collections.abc import Iterable, Sequence
from typing import Any, Final

from ray_guard.kernel import devices, landlock, libc, mounting
from ray_guard.kernel.landlock import Fs
from ray_guard.policy.files import DEVICE, LIST, READ, WRITE, Grant, device_grants, system_grants

_RIGHTS: Final = {
    READ: int(Fs.READ_FILE | Fs.READ_DIR | Fs.EXECUTE),
    LIST: int(Fs.READ_DIR),
    WRITE: int(Fs.WRITE_FILE | Fs.TRUNCATE | Fs.REMOVE_DIR | Fs.REMOVE_FILE | Fs.MAKE_DIR | Fs.MAKE_REG | Fs.MAKE_SOCK
    | Fs.MAKE_FIFO | Fs.MAKE_SYM | Fs.REFER),
    DEVICE: int(Fs.READ_FILE | Fs.WRITE_FILE | Fs.IOCTL_DEV | Fs.TRUNCATE),
}  # fmt: skip
"""No letter stands for making device nodes."""
_READING, _WRITING, _OF_TERMINALS = int(Fs.READ_FILE), int(Fs.WRITE_FILE | Fs.TRUNCATE), int(Fs.IOCTL_DEV)


_DEVICES: Final = device_grants()
_NOTHING_THERE: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG})
"""Not there, or not for this user: then nothing is granted."""


@functools.cache
def _rights(letters: str) -> int:
    rights = 0
    for letter in letters:
        rights |= _RIGHTS[letter]
    return rights


def prepare() -> tuple[Grant, ...]:
    """What a domain begins with on this host; asked once by the zygote."""
    return system_grants(_listed, os.path.realpath, mounts=mounting.works())


def _listed(folder: str) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries if not entry.is_symlink()]


class Domain:
    """A ruleset in waiting.

    Args:
        system: see :func:`prepare`.

    Raises:
        OSError: this kernel has no Landlock.
    """

    def __init__(self, system: Iterable[Grant]) -> None:
        self._abi = landlock.abi()
        self._ready: landlock.Ruleset | None = self._ruleset(system)

    def close(self) -> None:
        """It is not needed."""
        if self._ready is not None:
            self._ready.close()

    def _ruleset(self, grants: Iterable[Grant]) -> landlock.Ruleset:
        ruleset = landlock.Ruleset(landlock.known_rights(self._abi), landlock.known_scopes(self._abi))
        _add(ruleset, _DEVICES)
        _add(ruleset, grants)
        return ruleset

    def enter(self, view: dict[str, Any], given: Sequence[int]) -> None:
        """Binds the calling thread to ``view``, for good; it reaches no process outside, its leader least of all.

        Args:
            view: as ``supervisor.view`` made it.
            given: standard streams, which the tool may open again by name where they are files.

        Raises:
            OSError: it cannot be.
        """
        for layer in view["layers"]:
            system, self._ready = self._ready, None
            if not layer["system"] or system is None:
                if system is not None:
                    system.close()
                system = self._ruleset(prepare() if layer["system"] else ())
            _add(system, (Grant(path, rights) for path, rights in layer["grants"]))
            _add_streams(system, given)
            system.enter()
            system.close()
        if self._ready is not None:  # nothing about files is enforced
            self._ready.close()
            landlock.enter_process_scope()


def _add(ruleset: landlock.Ruleset, grants: Iterable[Grant]) -> None:
    for path, letters in grants:
        # What was resolved when the policy was read must not lead elsewhere now.
        descriptor = libc.openat2(path, os.O_PATH | os.O_CLOEXEC, libc.RESOLVE_NO_SYMLINKS)
        if descriptor == -errno.ENOSYS:  # refused by the filter that makes up for an older Landlock
            descriptor = _open_in_place(path)
        if -descriptor in _NOTHING_THERE:
            continue
        if descriptor < 0:
            raise OSError(-descriptor, os.strerror(-descriptor), path)
        try:
            ruleset.allow(descriptor, _rights(letters))
        finally:
            os.close(descriptor)


def _open_in_place(path: str) -> int:
    """What :func:`libc.openat2` does without symbolic links: what was opened says itself where it is."""
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        return -(error.errno or errno.ENOENT)
    if os.readlink(f"/proc/self/fd/{descriptor}") == path:
        return descriptor
    os.close(descriptor)
    return -errno.ELOOP


def _add_streams(ruleset: landlock.Ruleset, streams: Iterable[int]) -> None:
    """/dev/stdin and its like open the file behind a stream once more: as it was opened, and no further."""
    for descriptor in streams:
        status = os.fstat(descriptor)
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        terminal = devices.kind(status.st_mode, status.st_rdev) is devices.Kind.HARMLESS
        if not (stat.S_ISREG(status.st_mode) or terminal) or flags & os.O_PATH:
            continue
        access = flags & os.O_ACCMODE
        rights = _OF_TERMINALS if terminal else 0
        if access in (os.O_RDONLY, os.O_RDWR):
            rights |= _READING
        if access in (os.O_WRONLY, os.O_RDWR) and not flags & os.O_APPEND:  # else what is there could be overwritten
            rights |= _WRITING
        try:
            ruleset.allow(descriptor, rights)
        except OSError as error:
            if error.errno != errno.EBADFD:  # a file of no file system (memfd): nobody asks for a right there
                raise


def read_view(descriptor: int) -> dict[str, Any]:
    """The view in a memory file."""
    view: dict[str, Any] = json.loads(str(os.pread(descriptor, os.fstat(descriptor).st_size, 0), "utf-8"))
    return view
