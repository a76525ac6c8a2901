"""Limits that hold over several nodes: parts of them are leased before they are used. Runs in the supervisor.

A job is on many nodes, and each supervisor decides alone. So a job's limit is cut into parts, and only what has been
claimed for this node in the cluster's GCS (``ray_guard.actors.job_budget``, through the directory's helper) may be used
here: the sum over all nodes cannot pass the limit. More is claimed ahead of need, what lies idle is given back for
others, and where nobody answers, nothing more is granted.

The price: what other nodes hold idle is not to be had here until they give it back, within :data:`IDLE_S`, and the last
part of a limit may be left over on each node.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

from ray_guard.log import logger
from ray_guard.policy.budgets import UNLIMITED, WALL, Account, Amount, Limits

if TYPE_CHECKING:
    from ray_guard.egress.gate import Waiting

log = logger("ray_guard.leases")

PARTS: Final = 128
"""Into how many a limit is cut, where it has as many units."""
LOOK_S: Final = 0.25
"""How often it is looked whether more will be needed."""
RETRY_S: Final = 1.0
"""Between two questions while there is nothing to be had."""
PATIENCE_S: Final = 3.0
"""How long whoever needs a part waits for it."""
IDLE_S: Final = 5.0
"""What was not used in so long, nor is likely to be in four times that, is given back."""


class Desk(Protocol):
    """The cluster's directory."""

    nodes: int

    def ask(self, question: dict[str, Any], take: Callable[[dict[str, Any]], None]) -> None: ...


class _Waiter:
    """``asked``: the question that is under way asks for it too."""

    __slots__ = ("again", "amount", "asked")

    def __init__(self, amount: Amount, again: Callable[[], None]) -> None:
        self.amount = amount
        self.again = again
        self.asked = False


class Lease:
    """The parts of one limit of one account.

    Args:
        name: of the limit, the same on every node.
        holder: this supervisor.
        parts: into how many it is cut, where it has as many units.
        ahead: more is claimed before it is needed.
    """

    def __init__(self, account: Account, kind: str, name: str, holder: str, *, parts: int, ahead: bool) -> None:
        self.known = False
        """Whether anybody has answered yet."""
        self.desk: Desk | None = None
        """Where parts are claimed."""
        self._account = account
        self._kind = kind
        self._name = name
        self._holder = holder
        limit = self._limit
        self._parts = min(parts, limit) if isinstance(limit, int) else parts
        self._ahead = ahead
        self._mine: list[int] = []
        self._free = self._parts
        self._last = 1
        """Parts in the last lease."""
        self._asked = False
        self._failed = False
        """The last answer was none."""
        self._tried = float("-inf")
        self._waiting: list[_Waiter] = []
        self._seen: Amount = account.used(kind)
        self._spread()

    @property
    def _limit(self) -> Amount:
        limit = self._account.limit(self._kind)
        return 0 if limit is UNLIMITED else limit

    @property
    def _leased(self) -> Amount:
        return sum(self._part(number) for number in self._mine)

    @property
    def _room(self) -> Amount:
        """What is left of that; negative where more was used before the limit came."""
        return self._leased - self._account.used(self._kind) - self._account.held(self._kind)

    def _part(self, number: int) -> Amount:
        """How much a part is. Together they are the limit exactly."""
        limit = self._limit
        if isinstance(limit, int):
            return limit * (number + 1) // self._parts - limit * number // self._parts
        return limit / self._parts

    @property
    def _least(self) -> Amount:
        """The smallest part there is, though not nothing."""
        return max(1, self._limit // self._parts) if isinstance(self._limit, int) else self._limit / self._parts

    def _spread(self) -> None:
        """Tells the account what of its limit may not be used here."""
        others = max(0, self._parts - self._free - len(self._mine)) * self._limit / self._parts
        self._account.spread(self._kind, elsewhere=max(0, self._limit - self._leased), others=others)

    def lacks(self, amount: Amount) -> bool:
        """Whether there is too little here (nothing at all, where ``amount`` is 0), and perhaps more to be had."""
        if (self._mine and self._room >= amount) or len(self._mine) >= self._parts:
            return False
        return bool(self._free) or time.monotonic() - self._tried >= RETRY_S

    def grow(self) -> bool:
        """Asks for more of a limit whose part here was passed; whether some may come within :data:`PATIENCE_S`."""
        if not self._asked and self.lacks(0):
            self._ask()
        return self._asked and not self._failed and time.monotonic() - self._tried < PATIENCE_S

    def fetch(self, amount: Amount, again: Callable[[], None]) -> None:
        """Claims what ``amount`` needs; ``again`` is called when it is known what there is."""
        self._waiting.append(_Waiter(amount, again))
        self._ask()

    def _ask(self) -> None:
        if self._asked or self.desk is None:
            return
        amount = sum(waiter.amount for waiter in self._waiting)
        for waiter in self._waiting:
            waiter.asked = True
        self._asked, self._tried = True, time.monotonic()
        self._send(self.desk, max(1, math.ceil(max(0, amount - self._room) / self._least)), [])

    def _send(self, desk: Desk, least: int, give: list[int]) -> None:
        question = {
            "op": "claim",
            "name": self._name,
            "holder": self._holder,
            "parts": self._parts,
            "least": min(least, self._parts),
            "give": give,
        }
        desk.ask(question, self._answered if least else lambda _answer: None)

    def _answered(self, answer: Mapping[str, Any]) -> None:
        self._asked = False
        try:
            claimed = [int(number) for number in answer["claimed"]]
            self._free = int(answer["free"])
        except (KeyError, ValueError, TypeError):
            log.warning("no part of %s: %.200r", self._name, answer)
            self._failed = True
        else:
            self.known, self._failed = True, False
            self._mine += claimed
            self._last = len(claimed) or self._last
            self._spread()
        waiting = self._waiting
        self._waiting = [waiter for waiter in waiting if not waiter.asked]
        for waiter in waiting:
            if waiter.asked:
                waiter.again()
        if self._waiting:
            self._ask()

    def look(self) -> None:
        """Claims more where less is left than half of the last lease, or than one part."""
        if self._ahead and not self._asked and self.lacks(max(self._least, self._last * self._least / 2)):
            self._ask()

    def tidy(self, *, ended: bool = False) -> None:
        """Gives back whole parts that nobody here is likely to use."""
        used = self._account.used(self._kind)
        recent, self._seen = used - self._seen, used
        if self.desk is None or not (ended or self.desk.nodes > 1):
            return
        kept = 0 if ended else max(self._least, 4 * recent, self._room / 2)
        room, given = self._room, []
        while self._mine and room - self._part(self._mine[-1]) >= kept:
            room -= self._part(self._mine[-1])
            given.append(self._mine.pop())
        if given:
            self._free += len(given)
            self._last = max(1, min(self._last, len(self._mine)))
            self._spread()  # before anybody else can have them
            self._send(self.desk, 0, given)

    def forget(self) -> None:
        """The limit is over, on every node."""
        if self.desk is not None:
            self.desk.ask({"op": "forget", "name": self._name}, lambda _answer: None)
            self.desk = None

    def renew(self, desk: Desk) -> None:
        """Its account has come back to this node, or is here for the first time."""
        if self.desk is not desk:
            self.desk, self._asked, self.known = desk, False, False


class Leases:
    """Those of a node."""

    def __init__(self, loop: Waiting) -> None:
        self._loop = loop
        self._holder = os.urandom(8).hex()
        self._leases: dict[Account, dict[str, Lease]] = {}
        self._active: set[Account] = set()
        self._looking = False
        self._tidied = time.monotonic()

    def __bool__(self) -> bool:
        return bool(self._leases)

    def enter(
        self,
        account: Account,
        name: str,
        desk: Desk,
        kinds: Iterable[str] | None = None,
        *,
        parts: int = PARTS,
        ahead: bool = True,
    ) -> list[tuple[Lease, Amount]]:
        """Puts the account's limits under leases; those of which nothing is known yet, with how little would do.

        Args:
            name: of the account, the same on every node.
            desk: where parts are claimed.
            kinds: of limits; None: all, but for time, which passes on all nodes alike.
            parts, ahead: see :class:`Lease`.
        """
        leases = self._leases.setdefault(account, {})
        account.grow = partial(self._grow, account)
        for kind in account.limits.keys() - {WALL} if kinds is None else kinds:
            if kind not in leases and account.limits.get(kind):  # zero grants nothing anywhere
                leases[kind] = Lease(account, kind, f"{name}/{kind}", self._holder, parts=parts, ahead=ahead)
        for lease in leases.values():
            lease.renew(desk)
        self._active.add(account)
        if not self._looking and leases:
            self._looking = True
            self._loop.later(LOOK_S, self._look)
        return [(lease, 0) for lease in leases.values() if not lease.known]

    def _grow(self, account: Account, kind: str) -> bool:
        lease = self._leases.get(account, {}).get(kind)
        return lease is not None and lease.grow()

    def covers(self, account: Account, kind: str) -> bool:
        """Whether that limit of this scope alone is under a lease."""
        return kind in self._leases.get(account, {})

    def lacking(self, account: Account, amounts: Limits) -> list[tuple[Lease, Amount]]:
        """Leases of this scope alone that are too small for ``amounts`` and may grow."""
        leases = self._leases.get(account, {})
        asked = [(leases[kind], amount) for kind, amount in amounts.items() if kind in leases]
        return [(lease, amount) for lease, amount in asked if lease.lacks(amount)]

    def wait(self, lacking: Iterable[tuple[Lease, Amount]], again: Callable[[], None]) -> None:
        """Claims what is lacking; ``again`` is called once, when all is known or :data:`PATIENCE_S` are over."""
        left = 1
        done = False

        def answered() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                finish()

        def finish() -> None:
            nonlocal done
            if not done:
                done = True
                again()

        for lease, amount in lacking:
            left += 1
            lease.fetch(amount, answered)
        self._loop.later(PATIENCE_S, finish)
        answered()

    def leave(self, account: Account) -> None:
        """Nobody of this account is here any more: what is left of its leases is given back."""
        self._active.discard(account)
        for lease in self._leases.get(account, {}).values():
            lease.tidy(ended=True)

    def drop(self, account: Account) -> None:
        """:meth:`leave`, for good: what it has used stays used."""
        self.leave(account)
        self._leases.pop(account, None)

    def forget(self, account: Account) -> None:
        """The account's scope has ended, on every node."""
        self._active.discard(account)
        for lease in self._leases.pop(account, {}).values():
            lease.forget()

    def lose(self, desk: Desk) -> None:
        """A desk closes: what is left of all leases made there is given back."""
        for leases in self._leases.values():
            for lease in leases.values():
                if lease.desk is desk:
                    lease.tidy(ended=True)
                    lease.desk = None

    def _look(self) -> None:
        self._looking = bool(self._active)
        if not self._active:
            return
        self._loop.later(LOOK_S, self._look)
        tidy = time.monotonic() - self._tidied >= IDLE_S
        if tidy:
            self._tidied = time.monotonic()
        for account in self._active:
            for lease in self._leases[account].values():
                lease.look()
                if tidy:
                    lease.tidy()
