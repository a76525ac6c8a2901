"""What a process is about to execute, read from its memory. Runs in the supervisor.

Only to be recorded: the caller can change it after it was read, so nothing may be decided by it. Bounded in every
direction, for the caller chooses the pointers: an array without end, a megabyte of arguments, pages that fault.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
import struct
import sys
from collections.abc import Sequence
from typing import Final

from ray_guard.evidence.otlp import ProcessForm, process_form
from ray_guard.evidence.redact import MARGIN, redact_arguments
from ray_guard.kernel.libc import Peephole
from ray_guard.named import NamedTuple

try:  # as ``random`` does with its own: hashlib loads OpenSSL, which takes longer than a tool to start
    from _sha256 import sha256  # type: ignore[import-not-found]
except ImportError:
    from hashlib import sha256

SHOWN: Final = 64
SHOWN_LENGTH: Final = 256
_NAME_SHOWN: Final = 128
JUDGED: Final = 10_000
_WINDOW: Final = 4096
_LONG_WINDOW: Final = 4 * _WINDOW
_PAGE: Final = 4096
_FEW: Final = struct.Struct("=17Q")
"""The pointers of most arguments, with the end of the array."""
_AROUND: Final = 1024
"""Bytes on either side of the path, or from the first argument on."""
_PATH_LIMIT: Final = 4096
_POINTERS_LIMIT: Final = 4096
_BYTES_LIMIT: Final = 1 << 18
_ENCODING: Final = sys.getfilesystemencoding()


class Program(NamedTuple):
    """A program and its arguments.

    Attributes:
        path: decoded, as it was given.
        shown: the arguments as they are recorded.
        whole: as far as they are judged, where not all is shown; secrets are still in them. Empty: all is shown.
        form: as it is recorded.
    """

    path: str
    shown: tuple[str, ...]
    whole: tuple[str, ...]
    form: ProcessForm


class Command(NamedTuple):
    """What is to be executed, as it lies in the caller's memory.

    Attributes:
        whole: there are no more arguments than were read.
        short: it was read at one go, as most are.
    """

    path: bytes
    arguments: tuple[bytes, ...]
    whole: bool = True
    short: bool = False

    def program(self) -> Program:
        """To be recorded. The arguments' hash is over all of them, joined by NUL; none where they are not whole."""
        return _short_program(self) if self.short else _program(self)


def _program(command: Command) -> Program:
    path = command.path.decode(_ENCODING, "surrogateescape")
    argv = [word.decode(_ENCODING, "surrogateescape") for word in command.arguments]
    words = shown(argv)
    hashed = sha256(b"\0".join(command.arguments)).hexdigest() if command.whole else ""
    return Program(path, words, unseen(argv), process_form(path.rpartition("/")[2][:_NAME_SHOWN], path, words, hashed))


_short_program = functools.lru_cache(maxsize=256)(_program)  # what is executed once is often executed again


def shown(argv: Sequence[str]) -> tuple[str, ...]:
    """The arguments as they are recorded: the first ones, long ones cut, and no secrets in them."""
    known = redact_arguments(tuple([word[: SHOWN_LENGTH + MARGIN] for word in argv[:SHOWN]]))
    return tuple([word if len(word) <= SHOWN_LENGTH else word[:SHOWN_LENGTH] + "…" for word in known])


def digest(argv: tuple[str, ...]) -> str:
    found: str = sha256("\0".join(argv).encode(errors="surrogateescape")).hexdigest()
    return found


_peephole = Peephole(_LONG_WINDOW)


def read_command(tid: int, path: int, array: int) -> Command | None:
    """What a thread gives to execve. None: something of it is unreadable, so that the kernel will say EFAULT."""
    return _read_short(tid, path, array) or _Memory(tid).command(path, array)


def _read_short(tid: int, path: int, array: int) -> Command | None:
    """The command, where one or two readings have it all: most arguments are few, and lie side by side.

    Shells have them beside the path: all around it on its page is read, and the array. None: it is not so.
    """
    data = _peephole.data
    page = path & -_PAGE
    begin, end = max(page, path - _AROUND), min(page + _PAGE, path + _AROUND)
    room = end - begin
    if _peephole.read(tid, begin, room, array, _FEW.size) != room + _FEW.size:
        return None
    pointers = _FEW.unpack_from(data, room)
    stop = data.find(b"\0", path - begin, room)
    if stop < 0 or 0 not in pointers:
        return None
    name = bytes(data[path - begin : stop])
    pointers = pointers[: pointers.index(0)]
    if not pointers:
        return Command(name, (), short=True)
    first, last = min(pointers), max(pointers)
    if first < begin or last >= end:
        if last - first >= _AROUND:
            return None
        begin, room = first, _peephole.read(tid, first, _AROUND)
        if room <= 0:
            return None
    words = []
    for pointer in pointers:
        stop = data.find(b"\0", pointer - begin, room)
        if stop < 0:
            return None
        words.append(bytes(data[pointer - begin : stop]))
    return Command(name, tuple(words), short=True)


class _Memory:
    """The memory of one thread, as it is now. What cannot be read is missing: no error leaves here."""

    def __init__(self, tid: int) -> None:
        self._tid = tid
        self._base = 0
        self._window = b""

    def command(self, path: int, array: int) -> Command | None:
        name = self.string(path, _PATH_LIMIT)
        return None if name is None else self._arguments(array, name)

    def _read(self, address: int, length: int) -> bytes:
        try:
            size = _peephole.read(self._tid, address, length)
        except ValueError:  # no number of 64 bits: nobody's address
            return b""
        if size in (-errno.EPERM, -errno.ENOSYS):  # as Docker's default profile had it for years
            return self._read_file(address, length)
        return bytes(_peephole.data[:size]) if size > 0 else b""

    def _read_file(self, address: int, length: int) -> bytes:
        try:
            descriptor = os.open(f"/proc/{self._tid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return b""
        try:
            return os.pread(descriptor, length, address)
        except (OSError, OverflowError):
            return b""
        finally:
            os.close(descriptor)

    def string(self, address: int, limit: int) -> bytes | None:
        """The NUL-terminated string there; None: it is unreadable, or longer than ``limit``."""
        at = address - self._base
        if not 0 <= at < len(self._window):  # arguments lie side by side, so one reading serves most of them
            self._base, self._window, at = address, self._read(address, _WINDOW), 0
        end = self._window.find(b"\0", at)
        found = self._window[at : end if end >= 0 else None]
        while end < 0 and 0 < len(found) <= limit:
            more = self._read(address + len(found), _LONG_WINDOW)
            if not more:
                return None
            end = more.find(b"\0")
            found += more[: end if end >= 0 else None]
        return found if end >= 0 and len(found) <= limit else None

    def _arguments(self, array: int, path: bytes) -> Command | None:
        """The rest of a command whose arguments may be any."""
        if array == 0:
            return Command(path, ())
        room = _BYTES_LIMIT
        found: list[bytes] = []
        for pointer in self._pointers(array):
            argument = self.string(pointer, room) if room > 0 and len(found) < _POINTERS_LIMIT else None
            if argument is None:
                if room > _BYTES_LIMIT // 2 and len(found) < _POINTERS_LIMIT and not self._read(pointer, 1):
                    return None
                return Command(path, tuple(found), whole=False)
            found.append(argument)
            room -= len(argument) + 1
        return Command(path, tuple(found))

    def _pointers(self, array: int) -> list[int]:
        pointers: list[int] = []
        size = _FEW.size
        while len(pointers) <= _POINTERS_LIMIT:
            data = self._read(array + 8 * len(pointers), size)
            more = struct.unpack_from(f"={len(data) // 8}Q", data)
            if 0 in more:
                return [*pointers, *more[: more.index(0)]]
            if not more:
                return [*pointers, 0]  # unreadable, as a string at 0 is
            pointers += more
            size = _WINDOW
        return pointers


def unseen(argv: Sequence[str]) -> tuple[str, ...]:
    """The arguments, as :func:`judged`, where not all of them is shown; empty: all is."""
    return judged(argv) if len(argv) > SHOWN or any(len(word) > SHOWN_LENGTH for word in argv) else ()


def judged(argv: Sequence[str]) -> tuple[str, ...]:
    """The first :data:`JUDGED` characters of the arguments: whatever they are, a packet holds them."""
    room, words = JUDGED, []
    for word in argv:
        words.append(word[:room])
        room -= len(word)
        if room <= 0:
            break
    return tuple(words)


def runnable(tid: int, path: str, folder: str = "cwd") -> bool:
    """Whether there is a program at ``path`` as the thread sees it: the kernel may still refuse to run it.

    Args:
        folder: what a relative path starts from, below /proc/TID.
    """
    try:
        found = os.stat(path if path.startswith("/proc/") else f"/proc/{tid}/root{path}" if path[:1] == "/" else
                        f"/proc/{tid}/{folder}/{path}" if path else f"/proc/{tid}/{folder}")  # fmt: skip
    except (OSError, ValueError):
        return False
    return stat.S_ISREG(found.st_mode) and bool(found.st_mode & 0o111)
