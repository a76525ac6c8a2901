"""inotify(7): to wake when a folder's files grow. Runs in the judge.

What changed is not read: whoever waits looks for itself, and one waking stands for many changes.
"""

from __future__ import annotations

import contextlib
import os
from typing import Final, Self

from ray_guard.kernel.libc import c_library, get_errno

_IN_MODIFY: Final = 0x00000002
_IN_CREATE: Final = 0x00000100
_PIECE: Final = 1 << 16


class Watcher:
    """Readable when a file in one of its folders was made or written to.

    Raises:
        OSError: the user has too many of them (``fs.inotify.max_user_instances``).
    """

    def __init__(self) -> None:
        self._descriptor: int = c_library.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if self._descriptor < 0:
            raise OSError(get_errno(), f"inotify_init1: {os.strerror(get_errno())}")

    def fileno(self) -> int:
        return self._descriptor

    def add(self, folder: str) -> None:
        """Raises OSError."""
        if c_library.inotify_add_watch(self._descriptor, os.fsencode(folder), _IN_MODIFY | _IN_CREATE) < 0:
            raise OSError(get_errno(), f"inotify_add_watch: {os.strerror(get_errno())}", folder)

    def clear(self) -> None:
        """What was told until now is known."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self._descriptor, _PIECE):
                pass

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
