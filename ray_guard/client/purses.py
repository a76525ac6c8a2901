"""target: what this process may reserve by itself: purses that the supervisor has filled. Standard library only.

See :mod:`ray_guard.supervisor.purses`. A purse belongs to one place: those of an episode and call pay, whichever turn
asks. It is asked for with a place's first reservation, unless that was in vain for the last few: then with its second.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

_PLACES: Final = 16
"""That are remembered. Who is one of a hundred that ask in turn gets no purse."""
_IN_VAIN: Final = 4

Place = tuple[str | None, ...]


class Purse:
    """One that was filled. ``descriptors``: the lock, and what is left of tokens and of FLOPs; they are its own."""

    def __init__(self, number: int, descriptors: Sequence[int], scope: str, *, unknown: bool) -> None:
        self.number = number
        self.scope = scope
        self.unknown = unknown
        self.helped = False
        """Something was drawn from it."""
        self._lock, self._tokens, self._flops = descriptors
        self._threads = threading.Lock()

    def draw(self, tokens: int, flops: int) -> bool:
        """Takes that much out of it; False: it is shut, or there is not enough left."""
        with self._threads:
            if not _take(self._lock):
                return False
            try:
                return self._draw(tokens, flops)
            finally:
                os.eventfd_write(self._lock, 1)

    def _draw(self, tokens: int, flops: int) -> bool:
        left = _take(self._tokens)
        if left < tokens:
            _put(self._tokens, left)
            return False
        if flops:
            rest = _take(self._flops)
            _put(self._flops, rest - flops if rest >= flops else rest)
            if rest < flops:
                _put(self._tokens, left)
                return False
        _put(self._tokens, left - tokens)
        self.helped = True
        return True

    def put_back(self, tokens: int, flops: int) -> bool:
        """What was drawn is not needed; False: it must be settled instead."""
        with self._threads:
            if not _take(self._lock):
                return False
            _put(self._tokens, tokens)
            _put(self._flops, flops)
            os.eventfd_write(self._lock, 1)
            return True

    def __del__(self) -> None:
        for descriptor in (self._lock, self._tokens, self._flops):
            os.close(descriptor)


def _take(counter: int) -> int:
    try:
        return os.eventfd_read(counter)
    except BlockingIOError:
        return 0


def _put(counter: int, amount: int) -> None:
    if amount:
        os.eventfd_write(counter, amount)


class Purses:
    """Those of this process, by place."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[Place, Purse | None] = OrderedDict()
        self._in_vain = 0
        """So many of the last places have not used their purses, or asked again."""

    def find(self, place: Place) -> tuple[Purse | None, bool]:
        """The place's purse, if it has one, and whether to ask for one."""
        with self._lock:
            if place in self._known:
                self._known.move_to_end(place)
                return self._known[place], True
            if len(self._known) >= _PLACES:
                _, purse = self._known.popitem(last=False)
                self._in_vain = 0 if purse is not None and purse.helped else self._in_vain + 1
            self._known[place] = None
            return None, self._in_vain < _IN_VAIN

    def keep(self, place: Place, purse: Purse) -> None:
        with self._lock:
            self._known[place] = purse

    def forget(self) -> None:
        """In a forked child: they are its parent's."""
        self._lock = threading.Lock()
        self._known = OrderedDict()


purses: Final = Purses()
os.register_at_fork(after_in_child=purses.forget)
