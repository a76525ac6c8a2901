"""What a process is about to execute, read from its memory. Runs in the supervisor.

Only to be recorded: the caller can change it after it was read, so nothing may be decided by it. Bounded in every
direction, for the caller chooses the pointers: an array without end, a megabyte of arguments, pages that fault.
"""

from __future__ import annotations

import os
import stat
import struct
import sys
from collections.abc import Sequence
from typing import Final

from ray_guard.evidence.redact import MARGIN, redact_arguments
from ray_guard.named import NamedTuple

try:  # as ``random`` does with its own: hashlib loads OpenSSL, which takes longer than a tool to start
    from _sha256 import sha256  # type: ignore[import-not-found]
except ImportError:
    from hashlib import sha256

SHOWN: Final = 64
SHOWN_LENGTH: Final = 256
JUDGED: Final = 10_000
_WINDOW: Final = 4096
_SHORT: Final = 1024
_PATH_LIMIT: Final = 4096
_POINTERS_LIMIT: Final = 4096
_BYTES_LIMIT: Final = 1 << 18
_ENCODING: Final = sys.getfilesystemencoding()


class Arguments(NamedTuple):
    """Of a program.

    Attributes:
        digest: over all of them, joined by NUL; empty: there are more than are read.
        whole: as far as they are judged, where not all is shown; secrets are still in them. Empty: all is shown.
    """

    shown: tuple[str, ...]
    digest: str
    whole: tuple[str, ...] = ()


def shown(argv: Sequence[str]) -> tuple[str, ...]:
    """The arguments as they are recorded: the first ones, long ones cut, and no secrets in them."""
    known = redact_arguments(tuple([word[: SHOWN_LENGTH + MARGIN] for word in argv[:SHOWN]]))
    return tuple([word if len(word) <= SHOWN_LENGTH else word[:SHOWN_LENGTH] + "…" for word in known])


def digest(argv: tuple[str, ...]) -> str:
    found: str = sha256("\0".join(argv).encode(errors="surrogateescape")).hexdigest()
    return found


class Memory:
    """The memory of one thread, as it is now: once another program is executed nothing of it is left.

    To be closed. What cannot be read is missing: no error leaves here.
    """

    def __init__(self, tid: int) -> None:
        try:
            self._descriptor = os.open(f"/proc/{tid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._descriptor = -1
        self._base = 0
        self._window = b""

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def is_gone(self) -> bool:
        """Whether no process has that memory any more; False where it was closed."""
        try:
            return self._descriptor >= 0 and not os.pread(self._descriptor, 1, self._base)
        except OSError:  # it is unmapped there by now
            return False

    def _read(self, address: int, length: int) -> bytes:
        if self._descriptor < 0:
            return b""
        try:
            return os.pread(self._descriptor, length, address)
        except (OSError, OverflowError):
            return b""

    def string(self, address: int, limit: int) -> bytes | None:
        """The NUL-terminated string there; None: it is unreadable, or longer than ``limit``."""
        at = address - self._base
        if not 0 <= at < len(self._window):  # arguments lie side by side, so one reading serves most of them
            self._base, self._window, at = address, self._read(address, _WINDOW), 0
        end = self._window.find(b"\0", at)
        found = self._window[at : end if end >= 0 else None]
        while end < 0 and 0 < len(found) <= limit:
            more = self._read(address + len(found), _WINDOW * 4)
            if not more:
                return None
            end = more.find(b"\0")
            found += more[: end if end >= 0 else None]
        return found if end >= 0 and len(found) <= limit else None

    def path(self, address: int) -> str | None:
        found = self.string(address, _PATH_LIMIT)
        return None if found is None else found.decode(_ENCODING, "surrogateescape")

    def arguments(self, array: int) -> Arguments | None:
        """None: the array or a string in it is unreadable, so that the kernel will say EFAULT."""
        if array == 0:
            return Arguments((), sha256().hexdigest())
        pointers = self._pointers(array)
        found = self._beside(pointers)
        if found is not None:
            return _read_as(found, sha256(b"\0".join(found)).hexdigest())
        room = _BYTES_LIMIT
        found = []
        for pointer in pointers:
            argument = self.string(pointer, room) if room > 0 and len(found) < _POINTERS_LIMIT else None
            if argument is None:
                if room > _BYTES_LIMIT // 2 and len(found) < _POINTERS_LIMIT and not self._read(pointer, 1):
                    return None
                return _read_as(found, "")
            found.append(argument)
            room -= len(argument) + 1
        return _read_as(found, sha256(b"\0".join(found)).hexdigest())

    def _beside(self, pointers: Sequence[int]) -> list[bytes] | None:
        """The strings, where one short reading has them all: most arguments are few, and lie side by side."""
        first = pointers[0] if pointers else 0
        if not 0 < len(pointers) <= SHOWN or not 0 <= max(pointers) - first < _SHORT or min(pointers) < first:
            return None
        self._base, self._window = first, self._read(first, _SHORT)
        window, end_of = self._window, self._window.find
        ends = [end_of(b"\0", pointer - first) for pointer in pointers]
        if -1 in ends:
            return None
        return [window[pointer - first : end] for pointer, end in zip(pointers, ends, strict=True)]

    def _pointers(self, array: int) -> list[int]:
        pointers: list[int] = []
        size = 136  # of most, whole: 16 arguments and the end
        while len(pointers) <= _POINTERS_LIMIT:
            data = self._read(array + 8 * len(pointers), size)
            more = struct.unpack_from(f"={len(data) // 8}Q", data)
            if 0 in more:
                return [*pointers, *more[: more.index(0)]]
            if not more:
                return [*pointers, 0]  # unreadable, as a string at 0 is
            pointers += more
            size = 1 << 12
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


def _read_as(arguments: list[bytes], digest: str) -> Arguments:
    argv = [argument.decode(_ENCODING, "surrogateescape") for argument in arguments]
    return Arguments(shown(argv), digest, unseen(argv))


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
