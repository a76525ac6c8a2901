"""What the resolver has told: which names each address was given for, and until when. Pure; runs in the supervisor.

An answer holds for the longer of its time to live and the call it was given to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Final, NamedTuple

TOLD_LIMIT: Final = 4096
"""Pairs of address and name that are remembered; the oldest goes first."""
LEAST_S: Final = 30.0
"""An answer holds at least that long: many have a time to live of nothing, and a connect comes after the answer."""
_LOOK_AGAIN_S: Final = 1.0


class _Entry(NamedTuple):
    until: float
    call: str | None


class Told:
    """The memory of one call, or of an actor's own processes."""

    def __init__(self) -> None:
        self.version = 0
        """Another number whenever something was told or forgotten."""
        self._entries: dict[tuple[str, str], _Entry] = {}
        self._next = math.inf

    def tell(self, name: str, addresses: Iterable[str], *, now: float, ttl: float, call: str | None) -> None:
        """``name`` was answered with ``addresses`` (canonical), ``ttl`` seconds to live, for ``call``."""
        until = now + max(ttl, LEAST_S)
        for address in addresses:
            known = self._entries.pop((address, name), None)
            self._entries[address, name] = _Entry(until if known is None else max(until, known.until), call)
        while len(self._entries) > TOLD_LIMIT:
            del self._entries[next(iter(self._entries))]
        self._next = min(self._next, until)
        self.version += 1

    def expire(self, now: float, is_open: Callable[[str], bool]) -> None:
        """Forgets what has lived its time and whose call (if any) is no longer open."""
        if now < self._next:
            return
        before = len(self._entries)
        self._entries = {
            key: entry
            for key, entry in self._entries.items()
            if entry.until > now or (entry.call is not None and is_open(entry.call))
        }
        later = min((entry.until for entry in self._entries.values()), default=math.inf)
        self._next = max(later, now + _LOOK_AGAIN_S)
        if len(self._entries) != before:
            self.version += 1

    def names(self) -> Mapping[str, tuple[str, ...]]:
        """For each address its names, the one told last first."""
        found: dict[str, list[str]] = {}
        for address, name in reversed(self._entries):
            found.setdefault(address, []).append(name)
        return {address: tuple(names) for address, names in found.items()}
