"""Temporary folders of calls: made by a call's processes when they start, gone with its end. Runs in the supervisor.

Nothing here touches the disk: that can take as long as it likes, and this process has others to answer.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from ray_guard.supervisor import leftovers


class Scratches:
    """Those of one target's calls.

    Args:
        base: where they are made: the target's own temporary folder.
        number: which supervisor this is: its calls have theirs in one folder there.
        hold: has that folder made and held, elsewhere.
        remove: has one taken away, elsewhere.
    """

    def __init__(self, base: str, number: str, hold: Callable[[str], None], remove: Callable[[str], None]) -> None:
        self._folder = f"{os.path.realpath(base)}/{leftovers.name(number)}"
        self._hold = hold
        self._remove = remove
        self._users: dict[str, int] = {}
        self._ended: set[str] = set()

    def enter(self, call: str) -> str:
        """One more process of ``call`` starts; the folder's path."""
        self._hold(self._folder)
        self._hold = _held
        self._users[call] = self._users.get(call, 0) + 1
        return self._path(call)

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

    def _path(self, call: str) -> str:
        return f"{self._folder}/{call}"

    def _clear(self, call: str) -> None:
        if self._users[call] > 0 or call not in self._ended:
            return
        del self._users[call]
        self._ended.discard(call)
        self._remove(self._path(call))


def _held(_folder: str) -> None:
    """It was asked for once."""
