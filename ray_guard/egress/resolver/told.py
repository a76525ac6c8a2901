"""What the resolver was asked and has told: names for each address, and until when. Pure; runs in the supervisor.

An answer holds for the longer of its time to live and the call it was given to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from ray_guard.named import NamedTuple

TOLD_LIMIT: Final = 4096
"""Pairs of address and name that are remembered; the oldest goes first."""
LEAST_S: Final = 30.0
"""An answer holds at least that long: many have a time to live of nothing, and a connect comes after the answer."""
LOOKUPS: Final = 1000
"""How many questions of one call are asked upstream; those of an actor's own processes, in an hour."""
LOOKUP_BYTES: Final = 64 << 10
"""How many bytes the names of these questions may have together: below a wildcard a name can carry what it likes."""
_PERIOD_S: Final = 3600.0
_LOOK_AGAIN_S: Final = 1.0


class _Entry(NamedTuple):
    until: float
    call: str | None


class Told:
    """The memory of one call, or of an actor's own processes: what was asked, how often, and told.

    Args:
        lasting: it is no call's: what may be asked is counted anew every hour.
    """

    def __init__(self, *, lasting: bool = False) -> None:
        self.said: set[tuple[str, str | None]] = set()
        """(name, call) that the journal speaks of already."""
        self._lasting = lasting
        self._since: float | None = None
        self._lookups = self._lookup_bytes = 0
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
        self._renew(now)
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

    def spend(self, size: int, now: float) -> bool:
        """Takes one question to be asked upstream, with a name of ``size`` bytes; False: there is no room."""
        self._renew(now)
        if self._lookups >= LOOKUPS or self._lookup_bytes + size > LOOKUP_BYTES:
            return False
        self._lookups += 1
        self._lookup_bytes += size
        return True

    def give_back(self, size: int) -> None:
        """Nobody was asked after all."""
        self._lookups = max(0, self._lookups - 1)
        self._lookup_bytes = max(0, self._lookup_bytes - size)

    def _renew(self, now: float) -> None:
        if self._lasting and (self._since is None or now - self._since >= _PERIOD_S):
            self._since = now
            self._lookups = self._lookup_bytes = 0
            self.said.clear()
