"""Tokens and FLOPs: reserved before a request is admitted, settled after it. Runs in the supervisor.

A request is paid for by whoever computes it (the target's account) and by whoever asked: the call and the episode named
in its context, which are a neighbour's where the call came from another guarded actor. The ids of a context are
192 random bits that nobody is told but those who are called with it, and they count for scopes that are open in the
same job alone: no strange episode can be charged by guessing. A context that names none of these is paid for by the
target alone, and the answer says so.

A call may come from another node, whose scopes are not open here. Where they limit tokens or FLOPs the context says
so, and names the limits' leases (:mod:`ray_guard.supervisor.leases`): what is claimed of them here may be used here. So
such limits are leased on their own node too, and a request waits until what it needs is there.

What was reserved and never settled, because its process is gone, is charged as reserved: the tokens may have been
computed, and a crash must not be a way to compute for nothing. It is charged once and held no longer, so one crash
costs an episode no more than the one request.

Who calls a hooked engine within ``ray_guard.chat`` would be charged twice: by the engine, and by what the chat's
``usage`` says. A chat's reservation bears the id of its span; where a request is reserved below such a span, the chat
lets its own go, settles for nothing, and its span says who charges.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from ray_guard import errors
from ray_guard.errors import NotEnforced, RayGuardError
from ray_guard.evidence.journal import JournalError
from ray_guard.ids import new_span_id
from ray_guard.kernel.seqpacket import BadPacket
from ray_guard.log import logger
from ray_guard.named import NamedTuple
from ray_guard.policy.bill import Bill
from ray_guard.policy.budgets import Account, Amount, Exceeded, Limits, Scope, limits_from_wire
from ray_guard.records import AttributeValue, SpanKind, SpanRecord
from ray_guard.supervisor import fields
from ray_guard.supervisor.consequences import acts
from ray_guard.supervisor.leases import PARTS, Desk, Lease, Leases
from ray_guard.supervisor.target import OpenSpan, Origin, Target

if TYPE_CHECKING:
    from ray_guard.supervisor.model_calls import Paid
    from ray_guard.supervisor.purses import Purse, Purses

log = logger("ray_guard.quota")

TOKENS: Final = "tokens"
FLOPS: Final = "flops"
ENGINE: Final = "engine"
"""Who charges a ``chat`` where an engine's hook does."""
_OPEN_LIMIT: Final = 100_000
AWAY_S: Final = 60.0
"""After so long without a request what stands for a scope of another node is forgotten."""
_PARTS: Final[Mapping[str, int]] = {"episode": 8, "tool": 1}
"""Into how many parts the limits of these scopes are cut: they are small, and many."""
_DEPTH: Final = 64
"""Scopes within scopes that are followed upwards."""


class Asking(NamedTuple):
    """Who asked: the open scopes that a context names and those around them, innermost first.

    ``unknown``: it names an episode, or a call outside of any, that is not open here.
    """

    scopes: tuple[tuple[Target, OpenSpan], ...] = ()
    unknown: bool = False
    away: tuple[Account, ...] = ()
    """What stands here for scopes of another node, from the innermost outwards."""

    @property
    def scope(self) -> Scope:
        """The innermost that pays."""
        kinds = {span.scope for _, span in self.scopes}
        if "tool" in kinds:
            return Scope.CALL
        if self.away:
            return self.away[0].scope
        return Scope.EPISODE if "episode" in kinds else Scope.ACTOR


class _Reserved(NamedTuple):
    bill: Bill
    asking: Asking


class _Away:
    """What stands for a scope of another node; ``asked``: when it was last asked for."""

    __slots__ = ("account", "asked")

    def __init__(self, account: Account, asked: float) -> None:
        self.account = account
        self.asked = asked


class _Spender(NamedTuple):
    target: Target
    open: dict[str, _Reserved]


class Quotas:
    """See the module.

    Args:
        leases: this node's.
        desk: where a target's are claimed; None: it is in no cluster.
        paid: model calls that are charged elsewhere, by their word.
        later: calls back after so many seconds.
    """

    def __init__(
        self,
        leases: Leases,
        desk: Callable[[Target], Desk | None],
        paid: Mapping[str, Paid],
        later: Callable[[float, Callable[[], None]], None],
    ) -> None:
        self._later = later
        self._purses: Purses | None = None
        self._leases = leases
        self._desk = desk
        self._paid = paid
        self._spenders: dict[int, _Spender] = {}
        self._away: dict[str, _Away] = {}

    def join(self, target: Target) -> None:
        """A target is here: it may reserve, and its open scopes may pay."""
        self._spenders[id(target)] = _Spender(target, {})
        self._spread(target, target.account, target.key, PARTS)

    def opened(self, target: Target, span_id: str) -> None:
        """A span of the target's has begun."""
        span = target.open.get(span_id)
        if span is not None and span.account is not None and span.scope in _PARTS:
            self._spread(target, span.account, f"{span.record.trace_id}/{span_id}", _PARTS[span.scope])

    def _spread(self, target: Target, account: Account, name: str, parts: int) -> None:
        """Puts a scope's limits under leases: it may be charged on other nodes."""
        desk = self._desk(target)
        if desk is not None and any(account.limits.get(kind) for kind in (TOKENS, FLOPS)):
            self._leases.enter(account, f"{target.run_id}/{name}", desk, (TOKENS, FLOPS), parts=parts, ahead=False)
            account.on_close(partial(self._leases.forget, account))

    def leave(self, target: Target) -> None:
        """A target is gone. What it has not settled is charged: see the module."""
        spender = self._spenders.pop(id(target), None)
        self._leases.forget(target.account)
        if spender is None:
            return
        purses = [] if self._purses is None else self._purses.leave(id(target))
        unsettled = [*spender.open.values(), *(_Reserved(purse.bill, purse.asking) for purse in purses)]
        charged: dict[str, Amount] = {}
        for reserved in unsettled:
            for kind, amount in reserved.bill.reserved.items():
                charged[kind] = charged.get(kind, 0) + amount
            _book(target, reserved.asking, reserved.bill.settle(reserved.bill.reserved))
        if any(charged.values()):
            _record_unsettled(target, charged)

    def of_job(self, run_id: str) -> list[Target]:
        """The targets of a job that are here."""
        return [spender.target for spender in self._spenders.values() if spender.target.run_id == run_id]

    def lacking(self, target: Target, message: Mapping[str, Any]) -> list[tuple[Lease, Amount]]:
        """The leases that must grow before a reservation can be answered. Raises BadPacket, NotEnforced."""
        place = message.get("place")
        if not self._leases and not (isinstance(place, dict) and place.get("quotas")):
            return []  # most jobs lease nothing
        amounts = {TOKENS: _count(message.get("tokens")), FLOPS: _flops(message.get("flops")) or 0}
        bill, _ = self._bill(target, message)
        return [each for account in bill.payers for each in self._leases.lacking(account, amounts)]

    def must_wait(self, target: Target, message: Mapping[str, Any]) -> bool:
        """Whether a reservation cannot be answered at this moment (:meth:`collect`). Raises BadPacket, NotEnforced."""
        if self._purses is None:
            return False
        bill, _ = self._bill(target, message)
        amounts = {TOKENS: _count(message.get("tokens")), FLOPS: _flops(message.get("flops")) or 0}
        return bill.lacks(amounts) and not self.collect(bill.payers)

    def collect(self, payers: Collection[Account]) -> bool:
        """Takes back what lies in purses that one of ``payers`` has filled.

        False: somebody is drawing from one at this moment, which takes microseconds.
        """
        return self._purses is None or self._purses.collect(payers)

    def _bill(self, target: Target, message: Mapping[str, Any]) -> tuple[Bill, Asking]:
        asking = self._asking(target, message.get("place"))
        here = [span.account for _, span in asking.scopes if span.account is not None]
        paid = self._paid.get(str(message.get("paid")))  # by the relay, for a tool that called the engine by HTTP
        return Bill([target.account, *here, *asking.away], besides=() if paid is None else paid.payers), asking

    def reserve(self, target: Target, message: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[int, ...]]:
        """The answer to a request's reservation, and descriptors that go with it.

        Raises BadPacket for what is none, NotEnforced, JournalError.
        """
        opened = self._spenders[id(target)].open
        key = fields.identifier(message.get("id"), 16)
        if key in opened or len(opened) >= _OPEN_LIMIT:
            raise BadPacket("reserved already" if key in opened else "too many open reservations")
        tokens, flops = _count(message.get("tokens")), _flops(message.get("flops"))
        bill, asking = self._bill(target, message)
        chats = [] if message.get("chat") else self._chats_around(target, message.get("place"))
        held = [(chat, chat.reserved) for _, chat in chats]
        for chat, amounts in held:
            chat.shrink(amounts)
        refusal = _refusal(target, bill, asking, tokens, flops)
        if refusal is not None:
            for chat, amounts in held:
                chat.grow(amounts)
            return errors.to_wire(refusal), ()
        for span, _ in chats:
            span.charged_by = ENGINE
        opened[key] = _Reserved(bill, asking)
        answer = {"ok": True, "scope": asking.scope.value, "unknown": asking.unknown}
        have = message.get("purse")
        if have is None or not _may_have_purse(target, asking, message):
            return answer, ()
        purse = self._purses_here().give(id(target), have, bill, asking, {TOKENS: tokens, FLOPS: flops or 0})
        if purse is None:
            return answer, ()
        return {**answer, "purse": purse.number}, () if purse.number == have else purse.descriptors

    def _purses_here(self) -> Purses:
        if self._purses is None:
            from ray_guard.supervisor.purses import Purses  # most targets ask no model

            self._purses = Purses(self._later)
        return self._purses

    def settle(self, target: Target, message: Mapping[str, Any]) -> None:
        """What a request has really used; nothing: it was never admitted."""
        tokens, flops = _count(message.get("tokens")), _flops(message.get("flops"))
        drawn = self._drawn(target, message)
        if drawn is None:
            reserved = self._spenders[id(target)].open.pop(fields.identifier(message.get("id"), 16), None)
            if reserved is None:
                raise BadPacket("settled without having been reserved")
            (bill, asking), held = reserved, reserved.bill.reserved
            span = target.open.get(str(message["id"]))
            if span is not None and span.charged_by:
                bill.release()
                return
        else:
            purse, held = drawn
            bill, asking = purse.bill, purse.asking
        if flops is None:
            flops = held.get(FLOPS, 0) if tokens else 0
        if message.get("measured") is False and bill.limiting(TOKENS) is not None:
            _tell_unmeasured(target, asking, TOKENS)
        actual: dict[str, Amount] = {TOKENS: tokens, FLOPS: flops}
        _book(target, asking, bill.settle(actual) if drawn is None else drawn[0].settle(held, actual))

    def _drawn(self, target: Target, message: Mapping[str, Any]) -> tuple[Purse, dict[str, Amount]] | None:
        """The purse that what is settled was drawn from, and how much; None: it was reserved here. Raises BadPacket."""
        number, amounts = message.get("purse"), message.get("drawn")
        if number is None:
            return None
        purse = None if self._purses is None else self._purses.find(id(target), number)
        if purse is None or not isinstance(amounts, list) or len(amounts) != 2:
            raise BadPacket(f"drawn from no purse of this process: {number!r:.40}, {amounts!r:.80}")
        return purse, {TOKENS: _count(amounts[0]), FLOPS: _flops(amounts[1]) or 0}

    # -- who pays ------------------------------------------------------------------------------------------------------

    def _asking(self, target: Target, place: object) -> Asking:
        if place is None:
            return Asking()
        if not isinstance(place, dict):
            raise BadPacket(f"a place is a mapping: {place!r:.80}")
        trace = fields.identifier(place.get("trace"), 32)
        ids = [
            fields.identifier(place[name], 16) for name in ("span", "call", "episode") if place.get(name) is not None
        ]
        outermost = place.get("episode") or place.get("call")
        found = self._open_scopes(target, trace, ids)
        if any(name not in found for name in ids):
            # What the asker has begun was sent before it asked, but perhaps not read yet.
            for neighbour in self._neighbours(target):
                neighbour.pump()
            found = self._open_scopes(target, trace, ids)
        scopes = [(owner, span) for owner, span in found.values() if span.account is not None]
        scopes.sort(key=lambda each: each[1].scope != "tool")  # calls are inside of episodes
        away = self._away_from_here(target, trace, place.get("quotas"), found)
        return Asking(tuple(scopes), outermost is not None and outermost not in found and not away, away)

    def _away_from_here(
        self, target: Target, trace: str, quotas: object, found: Mapping[str, object]
    ) -> tuple[Account, ...]:
        """What stands for those of the asker's limited scopes that are of another node. Raises NotEnforced."""
        if not isinstance(quotas, list):
            return ()
        here = {each.key for each in self.of_job(target.run_id)}
        account, away = target.account.root, []
        for scope, name, home, limits in _read_quotas(quotas):
            if home in here or name in found:
                continue  # open here, or over
            if limits is None:
                keys = [f"budgets.{scope.value}.{TOKENS}", f"budgets.{scope.value}.{FLOPS}"]
                raise NotEnforced(keys, "who asks is limited by another supervisor, in no cluster with this one")
            whole = home if scope is Scope.ACTOR else f"{trace}/{name}"
            account = self._stand_in(target, scope, f"{target.run_id}/{whole}", limits, account)
            away.append(account)
        return tuple(reversed(away))

    def _stand_in(self, target: Target, scope: Scope, name: str, limits: Limits, around: Account) -> Account:
        desk = self._desk(target)
        if desk is None:
            keys = [f"budgets.{scope.value}.{kind}" for kind in limits]
            raise NotEnforced(keys, "they are of a scope that is not open on this node, and there is no cluster to ask")
        now = time.monotonic()
        known = self._away.get(name)
        if known is None:
            self._prune(now)
            known = self._away[name] = _Away(Account(scope, name, limits, parent=around), now)
            known.account.near = target.near
            parts = {Scope.ACTOR: PARTS, Scope.EPISODE: _PARTS["episode"], Scope.CALL: _PARTS["tool"]}[scope]
            self._leases.enter(known.account, name, desk, limits, parts=parts, ahead=False)
        known.asked = now
        return known.account

    def _prune(self, now: float) -> None:
        """Forgets the scopes of other nodes that have not asked for long: nobody tells of their end."""
        for name, away in list(self._away.items()):
            if now - away.asked > AWAY_S and not (away.account.held(TOKENS) or away.account.held(FLOPS)):
                del self._away[name]
                self._leases.drop(away.account)
                away.account.close()

    def _chats_around(self, target: Target, place: object) -> list[tuple[OpenSpan, Bill]]:
        """The ``chat`` spans that ask, with what they have reserved themselves; not those around a call that asks."""
        found: list[tuple[OpenSpan, Bill]] = []
        at = place.get("span") if isinstance(place, dict) else None
        for _ in range(_DEPTH):
            hit = self._find(target, str(place["trace"]), at) if isinstance(place, dict) and at is not None else None
            if hit is None or hit[1].account is not None:
                break
            owner, span = hit
            spender = self._spenders.get(id(owner))
            if spender is not None and at in spender.open:
                found.append((span, spender.open[at].bill))
            at = span.record.parent_id
        return found

    def _open_scopes(self, target: Target, trace: str, ids: list[str]) -> dict[str, tuple[Target, OpenSpan]]:
        """The open spans with these ids and those around them, by id."""
        found: dict[str, tuple[Target, OpenSpan]] = {}
        for each in ids:
            at: str | None = each
            for _ in range(_DEPTH):
                if at is None or at in found:
                    break
                hit = self._find(target, trace, at)
                if hit is None:
                    break
                found[at] = hit
                at = hit[1].record.parent_id
        return found

    def _find(self, target: Target, trace: str, span_id: str) -> tuple[Target, OpenSpan] | None:
        for each in (target, *self._neighbours(target)):
            span = each.open.get(span_id)
            if span is not None and span.record.trace_id == trace:
                return each, span
        return None

    def _neighbours(self, target: Target) -> list[Target]:
        """The other targets of this job."""
        return [each for each in self.of_job(target.run_id) if each is not target]


def _may_have_purse(target: Target, asking: Asking, message: Mapping[str, Any]) -> bool:
    """Not where a violation ends scopes, which a purse would outlive, nor for what others pay."""
    if asking.away or message.get("paid") is not None:
        return False
    return not any(acts(owner.policy) for owner in (target, *(owner for owner, _ in asking.scopes)))


def _book(target: Target, asking: Asking, exceeded: Exceeded | None) -> None:
    """Journals what a settlement has passed."""
    if exceeded is not None:
        try:
            _tell(target, asking, exceeded)
        except JournalError:
            log.exception("a violation could not be journaled")


def _refusal(target: Target, bill: Bill, asking: Asking, tokens: int, flops: float | None) -> RayGuardError | None:
    """Reserves, or says why not. Raises JournalError."""
    if bill.barred:
        return _ended(asking)
    amounts: dict[str, Amount] = {TOKENS: tokens}
    if flops is not None:
        amounts[FLOPS] = flops
    elif tokens and (limited := bill.limiting(FLOPS)) is not None:
        _tell_unmeasured(target, asking, FLOPS)
        detail = "what a token of this model costs is not known here: give its config.json"
        return NotEnforced([f"budgets.{limited.scope.value}.{FLOPS}"], detail)
    exceeded = bill.reserve(amounts)
    if exceeded is not None:
        _tell(target, asking, exceeded)
        if not exceeded.report_only:
            return exceeded.error()
    return None


def _tell_unmeasured(target: Target, asking: Asking, kind: str) -> None:
    """Nobody knows how much it is that a scope limits. Found out, not done: it has no consequences."""
    owner, span = next(iter(asking.scopes), (target, None))
    origin = target.own_origin() if span is None else owner.origin_of(span)
    owner.violation(origin, None, kind, reason="unmeasured", report_only=True)


def _ended(asking: Asking) -> RayGuardError:
    """What ended a scope that would pay: nothing more is granted to it."""
    for target, span in asking.scopes:
        violation = target.ended_for([span.record.span_id])
        if violation is not None:
            return errors.of_violation(violation.as_message())
    return RayGuardError("a scope that would pay was ended for a violation")


def _tell(target: Target, asking: Asking, exceeded: Exceeded) -> None:
    """Journals that a limit was passed, where the scope is whose it is. Raises JournalError."""
    if any(account.source == exceeded.source for account in asking.away):
        # Its own node does not hear of it, and the one who computes has done nothing wrong.
        exceeded = exceeded._replace(report_only=True)
    whose, origin = _whose(target, asking, exceeded)
    whose.exceeded(origin, None, exceeded)


def _whose(target: Target, asking: Asking, exceeded: Exceeded) -> tuple[Target, Origin]:
    """Whose limit it is. The job's is that of whoever computes."""
    for owner, span in asking.scopes:
        account = span.account
        while account is not None and (owner is target or account.scope is not Scope.JOB):
            if (account.scope, account.source) == (exceeded.scope, exceeded.source):
                return owner, owner.origin_of(span)
            account = account.parent
    return target, target.own_origin()


def _record_unsettled(target: Target, charged: Mapping[str, Amount]) -> None:
    now = time.time_ns()
    origin = target.own_origin()
    attributes: dict[str, AttributeValue] = {f"ray_guard.{kind}": amount for kind, amount in charged.items()}
    record = SpanRecord(
        trace_id=origin.trace_id,
        span_id=new_span_id(),
        parent_id=None,
        name="ray_guard.unsettled",
        kind=SpanKind.INTERNAL,
        start_ns=now,
        end_ns=now,
        attributes=attributes,
    )
    try:
        target.write(record, origin.identity)
    except JournalError:
        log.exception("unsettled reservations could not be journaled")


def _read_quotas(quotas: list[Any]) -> Iterator[tuple[Scope, str, str, Limits | None]]:
    """The scopes in a context that limit tokens or FLOPs, from the outermost inwards. Raises BadPacket."""
    for entry in quotas:
        try:
            word, name, home, given = entry
            scope = Scope(word)
            limits = None if given is None else limits_from_wire(scope, given)
        except (TypeError, ValueError) as error:  # a PolicyError is one
            raise BadPacket(f"not a limited scope: {entry!r:.200}: {error}") from error
        if scope is Scope.JOB or not set(limits or ()) <= {TOKENS, FLOPS}:
            raise BadPacket(f"not a limited scope: {entry!r:.200}")
        name = "" if scope is Scope.ACTOR else fields.identifier(name, 16)
        yield scope, name, "" if home == "" else fields.identifier(home, 32), limits


def _count(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53:
        return value
    raise BadPacket(f"not a number of tokens: {value!r:.80}")


def _flops(value: object) -> float | None:
    """None: not known. Nothing that has tokens costs nothing, so zero is taken for not known as well."""
    if value is None:
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf:
        return value or None
    raise BadPacket(f"not a number of FLOPs: {value!r:.80}")
