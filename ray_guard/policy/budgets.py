"""The budget tree: job → actor → episode → call; every scope that has a limit must have room.

Runs in the supervisor. Standard library only, no clock: what was used is told to it.

Reserve before something is granted, settle when it is known what was really used:

    job = Account(Scope.JOB, "01000000", policy.limits(Scope.JOB))
    call = Account(Scope.CALL, span, policy.limits(Scope.CALL), parent=job)
    if (exceeded := call.reserve("connections", 1)) and not exceeded.report_only:
        refuse(exceeded)

Used plus reserved never passes a limit as long as nothing settles for more than it reserved; what does (bytes that were
counted only afterwards) is booked truthfully and answered with an :class:`Exceeded`.

A limit that is absent is :data:`UNLIMITED`, which is not a number: zero is a limit, and grants nothing. Not
thread-safe: one loop owns the tree.
"""

# ruff: noqa: SLF001 - the accounts of one tree are one data structure

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from enum import Enum, StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Literal

from ray_guard.errors import BudgetExceeded, PolicyError
from ray_guard.named import NamedTuple

if TYPE_CHECKING:
    from ray_guard.policy.bill import Bill


class Scope(StrEnum):
    JOB = "job"
    ACTOR = "actor"
    EPISODE = "episode"
    CALL = "call"


class Unlimited(Enum):
    """The type of :data:`UNLIMITED`."""

    UNLIMITED = "unlimited"

    def __repr__(self) -> str:
        return "UNLIMITED"


UNLIMITED: Final = Unlimited.UNLIMITED
Amount = int | float
Limits = Mapping[str, Amount]
"""Limit by kind; a kind that is absent is unlimited."""

NO_LIMITS: Final[Limits] = MappingProxyType({})

SENT: Final = "egress_sent_bytes"
RECEIVED: Final = "egress_received_bytes"
EGRESS: Final = "egress_bytes"
CONNECTIONS: Final = "connections"
NETWORK_KINDS: Final = (CONNECTIONS, EGRESS, SENT, RECEIVED)
"""What a new connection needs room in."""

WALL: Final = "wall_seconds"
KINDS: Final = (
    EGRESS,
    SENT,
    RECEIVED,
    CONNECTIONS,
    "cpu_seconds",
    "gpu_seconds",
    "tokens",
    "flops",
    "memory",
    "processes",
    "gpu_memory",
    WALL,
)
"""Every limit of the policy. Each can be set for each scope."""

NEAR: Final = 0.8
"""The share of a limit at which it is warned of."""

_LEVELS: Final = frozenset({"memory", "processes", "gpu_memory"})
"""Kinds that are held and given back, never used up."""
_BYTES: Final = frozenset({EGRESS, SENT, RECEIVED})
_EXACT_SCOPES: Final = frozenset({Scope.CALL, Scope.EPISODE})
_FRACTIONAL: Final = frozenset({"cpu_seconds", "gpu_seconds", WALL, "flops"})
_CHARGED: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {**{kind: (kind,) for kind in KINDS if kind != EGRESS}, SENT: (SENT, EGRESS), RECEIVED: (RECEIVED, EGRESS)}
)


class Exceeded(NamedTuple):
    """A limit without room.

    ``value`` is what would have been used (or was, when it is noticed afterwards), in the limit's own unit.
    ``report_only``: the limit belongs to a policy in mode ``report``, so what was asked for *was* granted.
    """

    kind: str
    value: Amount
    limit: Amount
    scope: Scope
    source: str
    report_only: bool = False

    def error(self) -> BudgetExceeded:
        return BudgetExceeded(self.kind, self.value, self.limit, self.scope.value, self.source)


class Near(NamedTuple):
    """A limit that is almost reached: :data:`NEAR` of it is used. Told once for each scope and kind."""

    kind: str
    value: Amount
    limit: Amount
    scope: Scope
    source: str

    def text(self) -> str:
        return f"{self.scope.value} {self.source}: {self.kind} is at {self.value:g} of {self.limit:g}"


def limits_from_wire(scope: Scope, limits: object, *, key: str = "budgets") -> dict[str, Amount]:
    """Limits as they came in a message, checked: kinds that exist in this scope, numbers that are finite and not
    negative. Raises :class:`PolicyError`."""
    if not isinstance(limits, dict):
        raise PolicyError(key, limits, "limits are a mapping from kind to number")
    checked: dict[str, Amount] = {}
    for kind, value in limits.items():
        if kind not in KINDS:
            raise PolicyError(f"{key}.{kind}", value, f"no limit of a scope, {scope.value} or other")
        fits = isinstance(value, int) or (isinstance(value, float) and kind in _FRACTIONAL and math.isfinite(value))
        if not fits or isinstance(value, bool) or value < 0:
            raise PolicyError(f"{key}.{kind}", value, "a limit is a number, not negative, in the limit's own unit")
        checked[kind] = value
    return checked


def tightest(*limits: Limits) -> dict[str, Amount]:
    """The smaller limit of each kind; a kind that only one of them limits keeps that limit."""
    smallest: dict[str, Amount] = {}
    for each in limits:
        for kind, value in each.items():
            smallest[kind] = min(value, smallest.get(kind, value))
    return smallest


class Account:
    """One scope's usage and limits.

    Args:
        scope: which level of the tree it is.
        source: id of the scope, for :class:`Exceeded`.
        limits: what is enforced.
        watched: limits of policies in mode ``report``: passing one is told, not refused.
        parent: the scope around this one; what is used here is used there too.
    """

    def __init__(
        self,
        scope: Scope,
        source: str,
        limits: Limits = NO_LIMITS,
        *,
        watched: Limits = NO_LIMITS,
        parent: Account | None = None,
    ) -> None:
        for kind in (*limits, *watched):
            _known(kind)
        self.scope = scope
        self.source = source
        self._limits = dict(limits)
        self._watched = dict(watched)
        self._parent = parent
        self._used: dict[str, Amount] = {}
        self._books: tuple[dict[str, Amount], ...] = (self._used, *(() if parent is None else parent._books))
        """What was used here and in each scope around."""
        self._held: dict[str, Amount] = {}
        self._elsewhere: dict[str, Amount] = {}
        self._others: dict[str, Amount] = {}
        self._warned: set[str] = set()
        self._brink: dict[str, Amount] = {}
        """By kind, from where on a limit of this scope is almost reached, until that was told."""
        self.near: Callable[[Near], None] = lambda _near: None
        """Told when a limit of this scope is almost reached. It must not raise."""
        self.began: float | None = None
        """Since when its time counts (its owner's clock); None: it does not."""
        self.grow: Callable[[str], bool] = lambda _kind: False
        """Asks for more of a limit of which this node has only a part; whether there may soon be some."""
        self._refused = 0
        self._closed = False
        self.closing = False
        """:meth:`close` was called."""
        self._ended = False
        self._retained = 0
        self.barred: bool = parent is not None and parent.barred
        """Nothing more is granted to this scope (:meth:`bar`)."""
        self.free: bool = not any(kind in self._limits or kind in self._watched for kind in NETWORK_KINDS) and (
            parent is None or parent.free
        )
        """Neither this scope nor one around it limits connections or bytes, and none is barred."""
        if self._limits or self._watched:
            self._look_out()
        self._children: dict[Account, None] = {}
        self._bills: dict[Bill, None] = {}
        """What is held here by several paths together."""
        self._closing: list[Callable[[], None]] = []
        if parent is not None:
            if parent.closed:
                raise ValueError(f"{parent.scope.value} {parent.source} is closed")
            parent._children[self] = None

    def __repr__(self) -> str:
        return f"<Account {self.scope.value} {self.source} used={self._used} held={self._held} limits={self._limits}>"

    @property
    def parent(self) -> Account | None:
        return self._parent

    @property
    def root(self) -> Account:
        """The outermost scope around this one: its job's."""
        node = self
        while node._parent is not None:
            node = node._parent
        return node

    @property
    def closed(self) -> bool:
        return self._closed

    # Asking ----------------------------------------------------------------------------------------------------------

    def used(self, kind: str) -> Amount:
        """What was settled, here and in every scope below."""
        return self._used.get(_known(kind), 0)

    def held(self, kind: str) -> Amount:
        """What is reserved and not settled yet, here and in every scope below."""
        return self._held.get(_known(kind), 0)

    def limit(self, kind: str) -> Amount | Literal[Unlimited.UNLIMITED]:
        """This scope's own enforced limit."""
        return self._limits.get(_known(kind), UNLIMITED)

    @property
    def limits(self) -> Limits:
        """This scope's own enforced limits."""
        return dict(self._limits)

    def room(self, kind: str) -> Amount | Literal[Unlimited.UNLIMITED]:
        """What may still be reserved: the least room of this scope and those around it; never negative."""
        _known(kind)
        least: Amount | Literal[Unlimited.UNLIMITED] = UNLIMITED
        for node in self.upwards():
            if kind in node._limits:
                own = max(0, node._limits[kind] - node._taken(kind))
                least = own if least is UNLIMITED else min(least, own)
        return least

    def calm(self, kind: str) -> Amount | Literal[Unlimited.UNLIMITED]:
        """:meth:`room`, up to the next warning where one is still to come: nothing need be looked at before that."""
        least = self.room(kind)
        for node in self.upwards():
            if kind in node._limits and kind not in node._warned:
                own = max(0, math.ceil(NEAR * node._limits[kind]) - 1 - node._taken(kind))
                least = own if least is UNLIMITED else min(least, own)
        return least

    def exhausted(self, kinds: Iterable[str]) -> Exceeded | None:
        """The first limit among ``kinds`` that has no room for one more unit, as :meth:`reserve` would find it.

        An enforced limit comes before a watched one.
        """
        return self._find([(kind, 1) for kind in kinds])

    @property
    def exact(self) -> bool:
        """Whether bytes must stop on the byte: a call's or an episode's cap is around."""
        node: Account | None = self
        while node is not None:
            if node.scope in _EXACT_SCOPES and not _BYTES.isdisjoint(node._limits):
                return True
            node = node._parent
        return False

    def limits_any(self, kinds: Iterable[str]) -> bool:
        """Whether this scope or one around it limits (or watches) any of ``kinds``."""
        return any(kind in node._limits or kind in node._watched for node in self.upwards() for kind in kinds)

    def count(self, kind: str, amount: int = 1) -> None:
        """:meth:`charge` where nothing limits ``kind`` (see :attr:`free`): this stands on every connect."""
        for each in _CHARGED[kind]:
            for used in self._books:
                used[each] = used.get(each, 0) + amount

    # Booking ---------------------------------------------------------------------------------------------------------

    def reserve(self, kind: str, amount: Amount) -> Exceeded | None:
        """Takes ``amount`` from this scope and all around it, or from none of them.

        Bytes name their direction (``egress_sent_bytes``, ``egress_received_bytes``) and count for ``egress_bytes``
        as well. None: granted. An :class:`Exceeded` with ``report_only`` was granted too.
        """
        amount = _amount(amount)
        return self._take([(each, amount) for each in _charged(kind)])

    def reserve_all(self, amounts: Limits) -> Exceeded | None:
        """:meth:`reserve` for several kinds at once: all of them or none."""
        return self._take(list(charged_amounts(amounts).items()))

    def settle(self, kind: str, reserved: Amount, actual: Amount) -> Exceeded | None:
        """Gives ``reserved`` back and books ``actual`` instead, here and in every scope around.

        ``actual`` beyond ``reserved`` is booked too, because it happened; the limit it passed is returned. After
        :meth:`close` the reservation is gone already, and late usage still counts.
        """
        charged = _charged(kind)
        actual = _amount(actual)
        if reserved and not self._closed:
            self._release(charged, _amount(reserved))
        if actual:
            for used in self._books:
                for each in charged:
                    used[each] = used.get(each, 0) + actual
            self._notice(charged)
        return self._find([(each, 0) for each in charged])

    def charge(self, kind: str, actual: Amount) -> Exceeded | None:
        """Books what was used without having been reserved; the limit it passed is returned."""
        return self.settle(kind, 0, actual)

    def release(self, kind: str, reserved: Amount) -> None:
        """Gives a reservation back: what it was for did not happen."""
        self.settle(kind, reserved, 0)

    def measured(self, kind: str, value: Amount) -> Exceeded | None:
        """Judges a value (``wall_seconds``) by this scope's limit alone; nothing is booked."""
        self._warn(_known(kind), value)
        for limits, report_only in ((self._limits, False), (self._watched, True)):
            if kind in limits and not value <= limits[kind]:
                return Exceeded(kind, value, limits[kind], self.scope, self.source, report_only)
        return None

    def level(self, kind: str, before: Amount, now: Amount) -> Exceeded | None:
        """Something that is held (``memory``, ``processes``, ``gpu_memory``) has changed, whether there is room or not.

        Args:
            before: what of it is reserved here already, and given back.
            now: what is reserved instead; the limit that this passes is returned.
        """
        if self._closed:
            return None
        self._release((_known(kind),), before)
        node: Account | None = self
        while node is not None:
            node._held[kind] = node._held.get(kind, 0) + now
            node = node._parent
        self._notice((kind,))
        return self._find([(kind, 0)])

    def tighten(self, limits: Limits, watched: Limits = NO_LIMITS) -> None:
        """Another policy holds as well: the smaller limit of each kind. What was used already counts."""
        for kind in (*limits, *watched):
            _known(kind)
        self._limits = tightest(self._limits, limits)
        self._watched = tightest(self._watched, watched)
        self._look_out()
        if any(kind in NETWORK_KINDS for kind in (*limits, *watched)):
            self._watch_network()

    def _watch_network(self) -> None:
        self.free = False
        for child in self._children:
            child._watch_network()

    def spent(self) -> dict[str, Amount]:
        """What counts as used should whoever owns this tree die now: what is reserved may have been used by then."""
        spent = dict(self._used)
        for kind, amount in self._held.items():
            if amount and kind not in _LEVELS:
                spent[kind] = spent.get(kind, 0) + amount
        return spent

    def inherit(self, spent: Limits) -> None:
        """Books what this scope had used under an owner that is gone: here alone, the scopes around have theirs."""
        for kind, amount in spent.items():
            if kind not in _LEVELS:
                self._used[_known(kind)] = self._used.get(kind, 0) + _amount(amount)
        self._notice(spent)

    def spread(self, kind: str, *, elsewhere: Amount, others: Amount) -> None:
        """This scope is on several nodes, and only a part of its limit may be used here.

        Args:
            elsewhere: the part of the limit that may not: it counts as taken.
            others: what of that other nodes have claimed: it counts for the warning.
        """
        self._elsewhere[_known(kind)] = _amount(elsewhere)
        self._others[kind] = _amount(others)
        self._look_out()
        self._warn(kind, self._used.get(kind, 0))

    @property
    def refused(self) -> int:
        """Attempts that were refused, here and in every scope below; they are no ``connections``."""
        return self._refused

    def count_refused(self) -> None:
        for node in self.upwards():
            node._refused += 1

    def on_close(self, told: Callable[[], None]) -> None:
        """``told`` is called once, when the scope ends: after those within it, before what it holds is given back."""
        self._closing.append(told)

    def retain(self) -> None:
        """Something goes on charging this scope after its end: it is closed only when all is :meth:`let_go`."""
        self._retained += 1

    def let_go(self) -> None:
        self._retained -= 1
        if self._ended:
            self.close()

    def bar(self) -> None:
        """Nothing more is granted to this scope and those within it, limits or not; what it has is still counted."""
        self.barred, self.free = True, False
        for child in self._children:
            child.bar()

    def close(self) -> None:
        """The scope has ended, and those within it: what they had reserved is given back. Idempotent."""
        self._ended = True
        if self._closed or self._retained:
            return
        self.closing = True
        for child in list(self._children):
            child.close()
        while self._closing:
            self._closing.pop()()
        for bill in list(self._bills):
            bill.leave(self)
        for kind, amount in list(self._held.items()):
            self._release((kind,), amount)
        self._closed = True
        if self._parent is not None:
            self._parent._children.pop(self, None)

    # -----------------------------------------------------------------------------------------------------------------

    def upwards(self) -> Iterable[Account]:
        """This scope and those around it."""
        node: Account | None = self
        while node is not None:
            yield node
            node = node._parent

    def _taken(self, kind: str) -> Amount:
        return self._used.get(kind, 0) + self._held.get(kind, 0) + self._elsewhere.get(kind, 0)

    def _hold(self, amounts: Limits) -> None:
        """Reserves, in this scope alone: for a :class:`~ray_guard.policy.bill.Bill`."""
        for kind, amount in amounts.items():
            self._held[kind] = self._held.get(kind, 0) + amount

    def _let_go(self, amounts: Limits) -> None:
        for kind, amount in amounts.items():
            self._held[kind] = max(0, self._held.get(kind, 0) - amount)

    def _notice(self, kinds: Iterable[str]) -> None:
        """Warns of what is almost used up, here and in the scopes around."""
        node: Account | None = self
        while node is not None:
            if node._brink:  # on the path of every connect that is limited
                for kind in kinds:
                    if kind in node._brink:
                        node._warn(kind, (node._held if kind in _LEVELS else node._used).get(kind, 0))
            node = node._parent

    def _warn(self, kind: str, value: Amount) -> None:
        if value and kind in self._brink and value >= self._brink[kind]:
            del self._brink[kind]
            self._warned.add(kind)
            limit = min(limits[kind] for limits in (self._limits, self._watched) if kind in limits)
            self.near(Near(kind, value + self._others.get(kind, 0), limit, self.scope, self.source))

    def _look_out(self) -> None:
        """What there is to warn of, now that limits have changed."""
        limits = tightest(self._limits, self._watched)
        self._brink = {
            kind: NEAR * limit - self._others.get(kind, 0) for kind, limit in limits.items() if kind not in self._warned
        }

    def _find(self, asked: list[tuple[str, Amount]]) -> Exceeded | None:
        """The first limit that ``asked`` would pass, enforced ones first, from this scope outwards."""
        noticed: Exceeded | None = None
        node: Account | None = self
        while node is not None:
            if node._limits or node._watched:  # on the path of every connect, and most scopes have none
                for kind, amount in asked:
                    exceeded = node._judge(kind, amount)
                    if exceeded is not None:
                        if not exceeded.report_only:
                            return exceeded
                        noticed = exceeded if noticed is None else noticed
            node = node._parent
        return noticed

    def _judge(self, kind: str, amount: Amount) -> Exceeded | None:
        """This scope's own limit, if ``amount`` more passes it; the enforced one before the watched one."""
        # "not <=" rather than ">": what cannot be compared is refused.
        if kind in self._limits:
            value = self._taken(kind) + amount
            if not value <= self._limits[kind]:
                return Exceeded(kind, value, self._limits[kind], self.scope, self.source)
        if kind in self._watched:
            value = self._taken(kind) + amount
            if not value <= self._watched[kind]:
                return Exceeded(kind, value, self._watched[kind], self.scope, self.source, report_only=True)
        return None

    def _take(self, asked: list[tuple[str, Amount]]) -> Exceeded | None:
        if self._closed:
            raise ValueError(f"{self.scope.value} {self.source} is closed")
        exceeded = self._find(asked)
        if exceeded is None or exceeded.report_only:
            node: Account | None = self
            while node is not None:
                held = node._held
                for kind, amount in asked:
                    held[kind] = held.get(kind, 0) + amount
                node = node._parent
        return exceeded

    def _release(self, kinds: tuple[str, ...], reserved: Amount) -> None:
        for kind in kinds:
            held = self._held.get(kind, 0)
            if reserved > held * (1 + 1e-9):
                raise ValueError(f"{kind}: {reserved} given back, but only {held} are reserved")
        node: Account | None = self
        while node is not None:
            for kind in kinds:
                # Seconds are floats: what a chain of additions left over must not turn into negative holdings.
                left = node._held.get(kind, 0) - reserved
                node._held[kind] = max(0, left)
            node = node._parent


def charged_amounts(amounts: Limits) -> dict[str, Amount]:
    """What ``amounts`` come to by kind: bytes of one direction count as bytes too."""
    summed: dict[str, Amount] = {}
    for kind, amount in amounts.items():
        for each in _charged(kind):
            summed[each] = summed.get(each, 0) + _amount(amount)
    return summed


def _known(kind: str) -> str:
    """Refuses a kind that does not exist: it would be unlimited, because nobody limits it."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of limit: {kind!r}")
    return kind


def _charged(kind: str) -> tuple[str, ...]:
    if kind == EGRESS:
        raise ValueError(f"{EGRESS} is the sum of {SENT} and {RECEIVED}: book these")
    return _CHARGED[_known(kind)]


def _amount(value: Amount) -> Amount:
    if isinstance(value, bool) or not 0 <= value < math.inf:
        raise ValueError(f"an amount is a finite number, not negative: {value!r}")
    return value
