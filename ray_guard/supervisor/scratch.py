"""Temporary folders of calls: made with a call's first start, gone with its end. Runs in the supervisor."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from ray_guard.errors import NotEnforced

log = logging.getLogger("ray_guard.scratch")


class Scratches:
    """Those of one target's calls.

    Args:
        base: where they are made: the target's own temporary folder.
        remove: takes away what is not empty, elsewhere: it may be large.
    """

    def __init__(self, base: str, remove: Callable[[str], None]) -> None:
        self._base = os.path.realpath(base)
        self._remove = remove
        self._users: dict[str, int] = {}
        self._ended: set[str] = set()

    def path(self, call: str) -> str:
        return f"{self._base}/ray_guard-call-{call}"

    def enter(self, call: str) -> str:
        """One more process of ``call`` starts; the folder's path.

        Raises:
            NotEnforced: it cannot be made.
        """
        path = self.path(call)
        if call not in self._users:
            try:
                os.mkdir(path, 0o700)
            except OSError as error:
                raise NotEnforced(["files.write"], f"no scratch folder: {path}: {error.strerror}") from error
            self._users[call] = 0
        self._users[call] += 1
        return path

    def leave(self, call: str, *, last: bool = False) -> None:
        """One of its processes has ended with all it started. ``last``: the call was that process alone."""
        self._users[call] -= 1
        if last:
            self._ended.add(call)
        self._clear(call)

    def end(self, call: str) -> None:
        """The call has ended: with its last process the folder goes."""
        if call in self._users:
            self._ended.add(call)
            self._clear(call)

    def end_all(self) -> None:
        for call in list(self._users):
            self.end(call)

    def _clear(self, call: str) -> None:
        if self._users[call] > 0 or call not in self._ended:
            return
        del self._users[call]
        self._ended.discard(call)
        path = self.path(call)
        try:
            os.rmdir(path)
        except OSError:
            try:
                self._remove(path)
            except OSError as error:
                log.warning("%s cannot be removed: %s", path, error)
