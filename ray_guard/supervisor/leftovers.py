"""Scratch folders of a supervisor: held while it lives, taken away with it, else by the next one. Runs in the zygote.

All calls of one supervisor have theirs in one folder (per place), which the zygote holds a lock on: whoever can lock it
knows that nobody owns it any more. A process id would not do: other containers share the place, and count their own.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from typing import Final

from ray_guard.kernel import trees

_PREFIX: Final = "ray_guard."
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_YOUNG_S: Final = 5.0
"""A call may have made it a moment before its zygote holds it."""
_PATIENCE_S: Final = 2.0
"""How long calls that are being ended may still put something there."""


def name(number: str) -> str:
    """Of the folder of one supervisor."""
    return _PREFIX + number


class Held:
    """Those of this zygote's supervisor."""

    def __init__(self) -> None:
        self._descriptors: dict[str, int] = {}

    def hold(self, path: str) -> None:
        """Makes it, unless a call has. Raises OSError."""
        if path not in self._descriptors:
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, 0o700)
            descriptor = os.open(path, _FOLDER)
            if os.fstat(descriptor).st_uid != os.geteuid():
                os.close(descriptor)
                raise PermissionError(path)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            self._descriptors[path] = descriptor

    def clear(self) -> None:
        """Takes all away: the supervisor is gone."""
        over = time.monotonic() + _PATIENCE_S
        for path in self._descriptors:
            trees.remove(path)
            while os.path.lexists(path) and time.monotonic() < over:
                time.sleep(0.02)
                trees.remove(path)


def sweep(place: str) -> None:
    """Takes away what supervisors of this user have left in ``place`` that were killed with their zygotes."""
    with contextlib.suppress(OSError):
        for entry in os.listdir(place):
            number = entry.removeprefix(_PREFIX)
            if number != entry and len(number) == 12 and not number.strip("0123456789abcdef"):
                _sweep_one(f"{place}/{entry}")


def _sweep_one(path: str) -> None:
    try:
        descriptor = os.open(path, _FOLDER)
    except OSError:
        return  # gone, a symbolic link, or not ours to read
    try:
        found = os.fstat(descriptor)
        if found.st_uid == os.geteuid() and stat.S_ISDIR(found.st_mode) and time.time() - found.st_mtime > _YOUNG_S:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            trees.remove(path)
    except OSError:
        pass  # somebody holds it
    finally:
        os.close(descriptor)
