"""Leases: bytes of a budget that the mover may move, reserved before and settled after. Pure; runs in the supervisor.

One :class:`Lease` per scope whose flows are relayed. What it has out counts as held in that scope and all around it, so
what is used and what may still be used together never pass a limit, whoever else draws on it meanwhile.
"""

from __future__ import annotations

from typing import Final, Literal

from ray_guard.policy.budgets import EGRESS, RECEIVED, SENT, UNLIMITED, Account, Amount, Exceeded, Unlimited

KINDS: Final = (SENT, RECEIVED)
_SHARE: Final = 8
"""What is asked for ahead of need is this part of the room at most: a lease that lies idle must not keep others out."""


class Lease:
    """What one account has out with the mover.

    Args:
        account: the scope that the flows are charged to. When it ends, what is out is held by the scope around it until
            it is settled: the mover learns of the end a moment later.
    """

    def __init__(self, number: int, account: Account) -> None:
        self.number = number
        self.account = account
        self.out: dict[str, int] = dict.fromkeys(KINDS, 0)
        self.limited = {kind: account.limits_any((kind, EGRESS)) for kind in KINDS}
        """By kind, whether anything limits it; the limits of an account never become more."""
        self.exceeded: Exceeded | None = None
        """The limit that had no room when it was last asked for more."""
        self.flows = 0
        self._holder: Account | None = account
        account.on_close(self._moved_up)

    def take(self, kind: str, need: int, wish: int) -> int | Exceeded:
        """Reserves for ``need`` bytes that wait, and ahead of them up to ``wish`` where there is plenty.

        Returns how many were granted (0 only where nothing is needed now), or the limit that has no room at all.
        """
        room = self._room(kind)
        if self._holder is None:
            amount = 0
        elif room is UNLIMITED:
            amount = max(need, wish)
        else:
            amount = int(min(room, max(need, min(wish, room // _SHARE))))
        if amount > 0 and self._holder is not None:
            exceeded = self._holder.reserve(kind, amount)
            if exceeded is None or exceeded.report_only:
                self.out[kind] += amount
                return amount
            return exceeded
        if need == 0:
            return 0
        return self._exceeded(kind, need)

    def settle(self, kind: str, used: int, returned: int) -> None:
        """``used`` bytes were moved, and ``returned`` will not be."""
        if not self.limited[kind]:
            self.account.charge(kind, used)
            return
        back = min(used + returned, self.out[kind])
        self.out[kind] -= back
        if self._holder is self.account:
            self.account.settle(kind, back, used)
            return
        if self._holder is not None:
            self._holder.release(kind, back)
        self.account.charge(kind, used)

    def lost(self) -> None:
        """The mover is gone: nobody knows what it still moved, so all that was out counts as used."""
        for kind in KINDS:
            if self.limited[kind]:
                self.settle(kind, self.out[kind], 0)

    def _room(self, kind: str) -> Amount | Literal[Unlimited.UNLIMITED]:
        """What may still be reserved."""
        rooms: list[Amount] = []
        if self._holder is not self.account:  # what is out is no longer held there, but its limits stand
            for each, out in ((kind, self.out[kind]), (EGRESS, sum(self.out.values()))):
                limit = self.account.limit(each)
                if limit is not UNLIMITED:
                    rooms.append(max(0, limit - self.account.used(each) - out))
        if self._holder is not None:
            for each in (kind, EGRESS):
                room = self._holder.room(each)
                if room is not UNLIMITED:
                    rooms.append(room)
        return min(rooms) if rooms else UNLIMITED

    def _exceeded(self, kind: str, need: int) -> Exceeded:
        exceeded = None if self._holder is None else self._holder.exhausted((kind, EGRESS))
        if exceeded is not None and not exceeded.report_only:
            return exceeded
        # Its own scope has ended; its limit is what is left to say.
        for each, out in ((kind, self.out[kind]), (EGRESS, sum(self.out.values()))):
            limit, used = self.account.limit(each), self.account.used(each) + out
            if limit is not UNLIMITED and used + need > limit:
                return Exceeded(each, used + need, limit, self.account.scope, self.account.source)
        return Exceeded(kind, need, 0, self.account.scope, self.account.source)

    def _moved_up(self) -> None:
        """The scope that holds what is out ends: the next one around it does from here on."""
        ending, self._holder = self._holder, None
        above = None if ending is None else ending.parent
        if ending is None or above is None or above.closed:
            return
        for kind, amount in self.out.items():
            ending.release(kind, amount)
            exceeded = above.reserve(kind, amount)
            if exceeded is not None and not exceeded.report_only:
                self.out[kind] = 0  # a direct flow has passed that limit already
        self._holder = above
        above.on_close(self._moved_up)
