"""Purses: what a process may reserve by itself, without asking each time. Runs in the supervisor.

A reservation is a round trip. Where every core is taken, as an engine does, each of its two ends may wait for one: the
requests of a batch came in so slowly then that vLLM generated half of what it could. So who reserves again and again
from one place gets a purse: an amount that all who pay there have reserved, and that it draws on. Each draw is settled
like a reservation.

A purse is three counters (eventfd) that both processes hold: what is left of each kind, and a lock, which its process
takes for the moment of a draw and the supervisor keeps while the purse is shut. What is left in a purse is lost for
nobody: where anybody's reservation finds no room, the purses of the same payers are emptied first
(:meth:`Purses.collect`). So nothing is granted twice, and nothing refused for the sake of what nobody uses.

A policy actor that outlives its supervisor keeps its purses. What they held counts as used from then on, so it may go
on drawing; how much of that it really used nobody hears any more.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING, Final

from ray_guard.log import logger
from ray_guard.policy.bill import Bill
from ray_guard.policy.budgets import UNLIMITED, Account, Amount, Exceeded, Scope

if TYPE_CHECKING:
    from ray_guard.supervisor.quota import Asking

log = logger("ray_guard.purses")

KINDS: Final = ("tokens", "flops")
IDLE_S: Final = 5.0
"""A purse that was not used for so long is emptied."""
PURSES_LIMIT: Final = 16
"""Of one process; each is three descriptors in both."""
_FIRST: Final = 64
"""As many times what was just asked for is in a new purse; it doubles with each time that it did not last."""
_MOST: Final = 1024
_SHARE: Final = 4
"""At most this part (a fourth) of the payers' room."""
_COUNTER_LIMIT: Final = 1 << 62
_FLAGS: Final = os.EFD_CLOEXEC | os.EFD_NONBLOCK

#: not from one on: a policy actor may still have purses of the supervisor before this one
_numbers: Final = itertools.count(int.from_bytes(os.urandom(6)) + 1)


class Purse:
    """One place's. Its bill holds what is left in it, and what was drawn and is not settled yet."""

    def __init__(self, payers: Collection[Account], asking: Asking) -> None:
        self.number = next(_numbers)
        self.bill = Bill(payers)
        self.asking = asking
        """Who asks from this place."""
        self.used = True
        """Since it was last looked whether it lies idle."""
        self.over = False
        """A scope that pays has ended: it is not filled again."""
        self._open = False
        self._times = _FIRST
        self._size = dict.fromkeys(KINDS, 0)
        lock, *left = _counters(1 + len(KINDS))
        self._lock = lock
        self._left = dict(zip(KINDS, left, strict=True))

    @property
    def descriptors(self) -> tuple[int, ...]:
        """For its process: the lock, and what is left of each of :data:`KINDS`."""
        return (self._lock, *self._left.values())

    @property
    def done(self) -> bool:
        """It is shut, and nothing is left to be settled."""
        return not self._open and not any(self.bill.reserved.values())

    def fill(self, asked: Mapping[str, Amount]) -> bool:
        """It did not last for ``asked``: fills it with more than before. False: there is not room enough for one."""
        self.used = True
        if self.over or any(self._most(kind) < asked.get(kind, 0) for kind in KINDS):
            return False
        for kind in KINDS:
            wanted = min(int(asked.get(kind, 0)) * self._times, _COUNTER_LIMIT)
            self._size[kind] = max(self._size[kind], wanted)
        self._times = min(2 * self._times, _MOST)
        self._put()
        if not self._open:
            self._open = True
            os.eventfd_write(self._lock, 1)
        return True

    def _most(self, kind: str) -> int:
        room = self.bill.room(kind)
        return _COUNTER_LIMIT if room is UNLIMITED else min(_COUNTER_LIMIT, int(room / _SHARE))

    def _put(self) -> None:
        held = self.bill.reserved
        more = {kind: max(0, min(self._size[kind] - int(held.get(kind, 0)), self._most(kind))) for kind in KINDS}
        if any(more.values()) and self.bill.grow(more):
            for kind, amount in more.items():
                if amount:
                    self._put_in(kind, amount)

    def _put_in(self, kind: str, amount: int) -> None:
        try:
            os.eventfd_write(self._left[kind], amount)
        except BlockingIOError:  # the process has filled the counter itself: it has what it may have, and no more of us
            self.bill.shrink({kind: amount})
            self.over = True

    def settle(self, drawn: Mapping[str, Amount], actual: Mapping[str, Amount]) -> Exceeded | None:
        """One draw is settled; as much is put in again, as far as there is room."""
        self.used = True
        exceeded = self.bill.settle_part(drawn, actual)
        if self._open and exceeded is None:
            self._put()
        return exceeded

    def empty(self) -> bool:
        """Takes back what is left and shuts it; False: its process is drawing at this moment."""
        if not self._open:
            return True
        if _taken(self._lock) == 0:
            return False
        self._open = False
        self._take_back()
        return True

    def _take_back(self) -> None:
        self.bill.shrink({kind: _taken(counter) for kind, counter in self._left.items()})

    def end(self) -> None:
        """Its process is gone: what the bill holds from here on was drawn and never settled."""
        self._open, self.over = False, True
        self._take_back()
        self.close()

    def close(self) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)


def _counters(count: int) -> list[int]:
    """So many, or none. Raises OSError."""
    made: list[int] = []
    try:
        for _ in range(count):
            made.append(os.eventfd(0, _FLAGS))
    except OSError:
        for descriptor in made:
            os.close(descriptor)
        raise
    return made


def _taken(counter: int) -> int:
    """Takes all that is in a counter."""
    try:
        return os.eventfd_read(counter)
    except BlockingIOError:
        return 0


class Purses:
    """Those of a node.

    Args:
        later: calls back after so many seconds.
    """

    def __init__(self, later: Callable[[float, Callable[[], None]], None]) -> None:
        self._later = later
        self._of: dict[int, dict[int, Purse]] = {}
        self._looking = False

    def give(self, owner: int, number: object, bill: Bill, asking: Asking, asked: Mapping[str, Amount]) -> Purse | None:
        """A filled purse for a process that has just reserved ``asked``; None: there is not room enough for one.

        Args:
            owner: tells the process from others.
            number: of the purse that it has for this place, if it has one.
            bill: who pays there.
        """
        mine = self._of.setdefault(owner, {})
        purse = mine.get(number) if isinstance(number, int) else None
        if purse is not None and purse.bill.payers == bill.payers:
            return purse if purse.fill(asked) else None
        if len(mine) >= PURSES_LIMIT:
            _forget(mine, [each for each in mine.values() if each.over] or [next(iter(mine.values()))])
        if len(mine) >= PURSES_LIMIT:
            return None
        try:
            purse = Purse(bill.payers, asking)
        except OSError as error:
            log.warning("no purse: %s", error)
            return None
        if not purse.fill(asked):
            purse.close()
            return None
        mine[purse.number] = purse
        for account in purse.bill.payers:
            if account.scope in (Scope.CALL, Scope.EPISODE):
                account.on_close(partial(_over, purse))
        if not self._looking:
            self._looking = True
            self._later(IDLE_S, self._look)
        return purse

    def find(self, owner: int, number: object) -> Purse | None:
        return self._of.get(owner, {}).get(number) if isinstance(number, int) else None

    def collect(self, payers: Collection[Account]) -> bool:
        """Empties all that one of ``payers`` has filled; False: somebody draws at this moment, so ask again."""
        wanted = frozenset(payers)
        shut = [purse.empty() for purse in self._all() if not wanted.isdisjoint(purse.bill.payers)]
        return all(shut)

    def leave(self, owner: int) -> list[Purse]:
        """A process is gone: its purses, ended."""
        ended = list(self._of.pop(owner, {}).values())
        for purse in ended:
            purse.end()
        return ended

    def _all(self) -> list[Purse]:
        return [purse for mine in self._of.values() for purse in mine.values()]

    def _look(self) -> None:
        """Empties what lies idle, and forgets what is done with."""
        for mine in self._of.values():
            _forget(mine, [purse for purse in mine.values() if purse.over or not purse.used])
            for purse in mine.values():
                purse.used = False
        self._looking = any(self._of.values())
        if self._looking:
            self._later(IDLE_S, self._look)


def _forget(purses: dict[int, Purse], some: Collection[Purse]) -> None:
    """Empties some of a process's purses, and forgets those of which nothing is left to be settled."""
    for purse in some:
        purse.empty()
        if purse.done:
            purse.close()
            del purses[purse.number]


def _over(purse: Purse) -> None:
    purse.over = True
    purse.empty()
