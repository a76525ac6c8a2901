"""Amounts that several paths of the budget tree pay together, each scope once.

Runs in the supervisor. Standard library only.

An account has one parent, but tokens may concern two paths: the policy actor's that computes them, and that of the call
and episode that asked. They meet in the job at the latest, which pays once:

    bill = Bill([policy_actor, asking_call])
    if (exceeded := bill.reserve({"tokens": 900})) and not exceeded.report_only:
        refuse(exceeded)
    bill.settle({"tokens": 312})

A scope that ends before its bill is settled gives back what the bill holds there; the others go on holding.

A bill may also stand for many requests, whose sum is not known before: it is raised and lowered, and settled in parts.
"""

# ruff: noqa: SLF001 - a bill is a reservation in accounts: one data structure

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal

from ray_guard.policy.budgets import UNLIMITED, Account, Amount, Exceeded, Limits, Unlimited, charged_amounts


class Bill:
    """One reservation: see the module.

    Args:
        payers: each pays, and every scope around each.
        besides: whom somebody else has charged already.

    Raises:
        ValueError: one of them is closed.
    """

    def __init__(self, payers: Iterable[Account], *, besides: Collection[Account] = ()) -> None:
        charged = dict.fromkeys(node for payer in payers for node in payer.upwards())
        self.payers = tuple(node for node in charged if node not in besides)
        for node in self.payers:
            if node.closed:
                raise ValueError(f"{node.scope.value} {node.source} is closed")
        self._held: dict[str, Amount] = {}

    @property
    def reserved(self) -> Limits:
        """What is held at this moment, by kind."""
        return dict(self._held)

    @property
    def barred(self) -> bool:
        """Whether one of the payers is granted nothing more."""
        return any(node.barred for node in self.payers)

    def limiting(self, kind: str) -> Account | None:
        """The first payer with an enforced limit of ``kind``."""
        return next((node for node in self.payers if kind in node._limits), None)

    def reserve(self, amounts: Limits) -> Exceeded | None:
        """Takes ``amounts`` from every payer, or from none. An :class:`Exceeded` with ``report_only`` was granted."""
        if self._held:
            raise ValueError("reserved already")
        asked = charged_amounts(amounts)
        exceeded = self._find(asked)
        if exceeded is None or exceeded.report_only:
            self._held = dict(asked)
            for node in self.payers:
                node._bills[self] = None
                node._hold(asked)
        return exceeded

    def lacks(self, amounts: Limits) -> bool:
        """Whether :meth:`reserve` would find a limit without room."""
        return self._find(charged_amounts(amounts)) is not None

    def room(self, kind: str) -> Amount | Literal[Unlimited.UNLIMITED]:
        """How much more may be reserved before a limit is passed, be it one that is only watched."""
        rooms = [
            max(0, limits[kind] - node._taken(kind))
            for node in self.payers
            for limits in (node._limits, node._watched)
            if kind in limits
        ]
        return min(rooms, default=UNLIMITED)

    def grow(self, amounts: Limits) -> bool:
        """Takes that much more from every payer; not where a limit would be passed."""
        asked = charged_amounts(amounts)
        if self._find(asked) is not None:
            return False
        for kind, amount in asked.items():
            self._held[kind] = self._held.get(kind, 0) + amount
        for node in self.payers:
            if not node.closed:
                node._bills[self] = None
                node._hold(asked)
        return True

    def shrink(self, amounts: Limits) -> None:
        """Gives back a part of what is held."""
        part = {kind: min(amount, self._held.get(kind, 0)) for kind, amount in charged_amounts(amounts).items()}
        for kind, amount in part.items():
            self._held[kind] -= amount
        for node in self.payers:
            if self in node._bills:
                node._let_go(part)

    def settle_part(self, reserved: Limits, actual: Limits) -> Exceeded | None:
        """:meth:`settle` for one of many requests, that held ``reserved``."""
        self.shrink(reserved)
        return self._book(charged_amounts(actual))

    def settle(self, actual: Limits) -> Exceeded | None:
        """Gives back what is held and books ``actual`` instead, more than that too: it happened.

        Scopes that have ended meanwhile are booked as well. The limit that was passed is returned.
        """
        booked = charged_amounts(actual)
        for node in self.payers:
            if self in node._bills:
                self.leave(node)
        self._held = {}
        return self._book(booked)

    def release(self) -> None:
        """What it was for did not happen."""
        self.settle({})

    def leave(self, node: Account) -> None:
        """Gives back what is held in one payer, which ends."""
        del node._bills[self]
        node._let_go(self._held)

    def _book(self, booked: Limits) -> Exceeded | None:
        for node in self.payers:
            for kind, amount in booked.items():
                node._used[kind] = node._used.get(kind, 0) + amount
                node._warn(kind, node._used[kind])
        return self._find(dict.fromkeys(booked, 0))

    def _find(self, asked: Limits) -> Exceeded | None:
        noticed: Exceeded | None = None
        for node in self.payers:
            for kind, amount in asked.items():
                exceeded = node._judge(kind, amount)
                if exceeded is not None and not exceeded.report_only:
                    return exceeded
                noticed = noticed or exceeded
        return noticed
