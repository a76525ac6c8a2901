"""Targets: whose records are written and whose budgets are charged. Runs in the supervisor.

A target is one guarded actor, one program under ``confine`` or ``ray-guard run``, or one observer (a driver whose spans
are journaled, nothing more). It holds the open spans that its process reported, and closes them when that process dies.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from ray_guard.egress.resolver.told import Told
from ray_guard.errors import PolicyError
from ray_guard.evidence.journal import Journal, JournalError
from ray_guard.evidence.otlp import EgressForm, Fragment, LineEncoder, fragment, resource_key
from ray_guard.ids import new_span_id, new_trace_id
from ray_guard.kernel.seqpacket import BadPacket
from ray_guard.log import logger
from ray_guard.named import NamedTuple
from ray_guard.policy.budgets import Account, Exceeded, Limits, Near, Scope, limits_from_wire, tightest
from ray_guard.policy.decide import CompiledPolicy
from ray_guard.records import AttributeValue, Resource, Source, SpanEvent, SpanKind, SpanRecord, StatusCode
from ray_guard.supervisor import fields
from ray_guard.supervisor.scratch import Scratches
from ray_guard.supervisor.segments import Tally, links_of
from ray_guard.supervisor.view import Views

log = logger("ray_guard.target")

BUDGET_WARNING: Final = "ray_guard.budget_warning"
"""Name of the span that says that a limit is almost reached."""
_VIOLATIONS_KEPT: Final = 10_000
_OPEN_LIMIT: Final = 100_000
_OFFENDERS_KEPT: Final = 4096
_OFFENCES_TOLD: Final = 32
_KIND: Final = "ray_guard.violation.kind"
_TOLD: Final = (
    *(_KIND, "ray_guard.violation.limit", "ray_guard.violation.value", "error.type"),
    *("ray_guard.detection.kind", "ray_guard.detection.rule"),
)


class OpenSpan:
    """A span that the target has begun and not ended.

    Attributes:
        ended: what it was ended for before its time (``on_violation``).
        origin: as :meth:`Target.origin_of_call` gives it; made when first asked for.
        told: names told to the tools of a call, whichever of them asked.
        charged_by: who charges a model call instead of whoever reported it; empty: nobody.
    """

    def __init__(
        self,
        record: SpanRecord,
        scope: str,
        identity: Mapping[str, AttributeValue],
        *,
        episode: str | None,
        account: Account | None,
    ) -> None:
        self.record = record
        self.scope = scope
        self.identity = identity
        self.episode = episode
        self.account = account
        self.violations = 0
        self.ended: Violation | None = None
        self.origin: Origin | None = None
        self.told = Told()
        self.charged_by = ""


class Origin(NamedTuple):
    """Which call something is put down to, and who pays for it."""

    trace_id: str
    parent_id: str | None
    identity: Fragment
    account: Account
    episode: str | None
    call: str | None
    tally: Tally
    candidates: tuple[str, ...] = ()
    """Calls it may as well belong to; empty: it is certain."""
    link: tuple[str, str] | None = None
    """Trace and span of what encloses it, where that lies in an earlier segment."""


class Violation(NamedTuple):
    """One entry of ``violations()``."""

    kind: str
    limit: AttributeValue | None
    value: AttributeValue | None
    span: str
    time_ns: int
    reason: str
    destination: str
    episode: str | None
    source: str = ""
    """Id of the scope whose limit it is."""
    action: str = ""
    """What follows, whatever ``on_violation`` says; empty: that."""

    def text(self) -> str:
        where = f" {self.destination}" if self.destination else ""
        return f"{self.kind}{where}: {self.reason}"

    def as_message(self) -> dict[str, Any]:
        names = ("kind", "limit", "value", "span", "reason", "destination", "source")
        return {**{name: getattr(self, name) for name in names}, "time": self.time_ns}


class SaidAtEnd(NamedTuple):
    """What is said of a span at its end. ``attributes``: of the first violation and finding; ``error``: of one that is
    a violation."""

    events: tuple[SpanEvent, ...] = ()
    attributes: Mapping[str, AttributeValue] = MappingProxyType({})
    error: bool = False


_NOTHING: Final = SaidAtEnd()


class Offences:
    """Violations of spans that have not ended: each is told there too, by an event, its kind and the status ERROR.

    So is what was found out about them (:mod:`ray_guard.supervisor.judging`), but that alone is no error.
    """

    def __init__(self) -> None:
        self._events: dict[str, list[SpanEvent]] = {}

    def add(self, span_id: str, event: SpanEvent) -> None:
        events = self._events.get(span_id)
        if events is None:
            if len(self._events) >= _OFFENDERS_KEPT:
                del self._events[next(iter(self._events))]
            events = self._events[span_id] = []
        if len(events) < _OFFENCES_TOLD:
            events.append(event)

    def take(self, span_id: str) -> SaidAtEnd:
        """What a span that ends has to tell."""
        events = self._events.pop(span_id, None)
        if events is None:
            return _NOTHING
        told: dict[str, AttributeValue] = {}
        for event in events:
            if event.attributes.keys().isdisjoint(told):
                told |= {key: value for key, value in event.attributes.items() if key in _TOLD}
        return SaidAtEnd(tuple(events), told, error=_KIND in told)

    def told(self, record: SpanRecord) -> SpanRecord:
        """``record``, which ends its span, with what its span has to tell."""
        events, attributes, error = self.take(record.span_id)
        if not events:
            return record
        record = record._replace(attributes={**attributes, **record.attributes}, events=(*record.events, *events))
        if not error:
            return record
        return record._replace(
            status=StatusCode.ERROR,
            status_message=record.status_message
            or f"{attributes['ray_guard.violation.kind']}: {attributes['error.type']}",
        )


class Target:
    """See the module. ``around`` is the account above its own: its submitter's, or the job's."""

    def __init__(
        self,
        *,
        pid: int,
        kind: str,
        policy: CompiledPolicy,
        resource: Resource,
        journal: Journal,
        around: Account,
        run_id: str,
        actor_id: str,
        views: Views,
        scratches: Scratches,
    ) -> None:
        self.pid = pid
        self.kind = kind
        self.policy = policy
        self.resource = resource
        self.journal = journal
        self.around = around
        self.run_id = run_id
        self.actor_id = actor_id
        self.views = views
        self.scratches = scratches
        self.trace_id = new_trace_id()
        self.key = new_trace_id()
        """Names its account to other nodes; nobody guesses it."""
        self.open: dict[str, OpenSpan] = {}
        self.intents: dict[int, str] = {}
        self.violations: deque[Violation] = deque(maxlen=_VIOLATIONS_KEPT)
        self.pump: Callable[[], None] = lambda: None
        """Reads what the target has sent so far; set by its session."""
        self.offended: Callable[[Origin, Violation], None] = lambda _origin, _violation: None
        """Told of every violation that stands in the journal; see :mod:`ray_guard.supervisor.consequences`."""
        self.unseen: Callable[[Origin, str, Sequence[str], str], None] = lambda _origin, _span, _argv, _path: None
        """Told of every program that is executed and not recorded, or not with all its arguments: the call, the span
        that it is put down to, arguments and path. See :mod:`ray_guard.supervisor.judging`."""
        self.warn: Callable[[str], None] = lambda _text: None
        """Has the target log a warning; set by its session."""
        self.account = self._scope_account(Scope.ACTOR, actor_id, around)
        self.encoder = LineEncoder(resource)
        self._own = self._own_origin()
        self._unknown: Origin | None = None
        """As :meth:`origin_unknown` gives it, until a span begins or ends."""
        self._fragments: dict[str, Fragment] = {}
        self._offences = Offences()
        self.offences = self._offences.take

    def _scope_account(self, scope: Scope, source: str, parent: Account, limits: Limits | None = None) -> Account:
        own = self.policy.limits(scope)
        account = Account(
            scope,
            source,
            own if limits is None else tightest(own, limits),
            watched=self.policy.watched(scope),
            parent=parent,
        )
        account.near = self.near
        account.began = time.monotonic()
        return account

    def _own_origin(self) -> Origin:
        identity = fragment({"rl.run.id": self.run_id, "ray_guard.source": Source.SUPERVISOR.value})
        return Origin(self.trace_id, None, identity, self.account, None, None, Tally())

    def identify(self, attributes: Mapping[str, AttributeValue]) -> None:
        """Completes the resource: what a worker learns only after it was confined (its actor's id and name)."""
        self.resource = Resource({**self.resource.attributes, **attributes})
        self.encoder = LineEncoder(self.resource)
        self._own = self._own_origin()  # anew: what a ring keeps in its words names the old resource
        self._unknown = None
        for span in self.open.values():
            span.origin = None

    # -- writing -------------------------------------------------------------------------------------------------------

    def write(self, record: SpanRecord, identity: Fragment | None = None, *, grants: bool = False) -> None:
        """Journals a record of the supervisor's own. ``grants``: of what must not begin unless this is recorded.

        Raises:
            JournalError: it could not be.
        """
        if record.end_ns is not None:
            record = self._offences.told(record)
        line = self.encoder.encode(record, identity or self._own.identity)
        if grants:
            self.journal.append(line)
        else:
            self.journal.keep(line)

    def egress_form(self, origin: Origin, attributes: str) -> EgressForm:
        """The lines of ``egress connect`` spans of ``origin`` with these attributes (encoded)."""
        whole = f"{origin.identity.encoded},{attributes}"
        return self.encoder.egress_form(origin.trace_id, origin.parent_id, whole, links_of(origin.link))

    def _write_reported(self, record: SpanRecord, identity: Mapping[str, AttributeValue]) -> None:
        key = repr(sorted(identity.items()))
        fixed = self._fragments.get(key)
        if fixed is None or len(self._fragments) > 1024:
            self._fragments.clear()
            fixed = fragment({**identity, "ray_guard.source": Source.TARGET.value})
            self._fragments[key] = fixed
        line = self.encoder.encode(record, fixed)
        if record.span_id in self.open:
            self.journal.keep(line)
        else:
            self.journal.report(line)

    # -- spans the target reports --------------------------------------------------------------------------------------

    def begin(self, message: Mapping[str, Any]) -> None:
        """A span begins. Raises BadPacket for what is no span."""
        if len(self.open) >= _OPEN_LIMIT:
            raise BadPacket("too many open spans")
        identity = fields.identity(message.get("identity"))
        identity.setdefault("rl.run.id", self.run_id)
        record = fields.begun(message)
        span_id = record.span_id
        scope = fields.text(message.get("scope"), 32)
        episode = message.get("episode")
        episode = None if episode is None else fields.identifier(episode, 16)
        account: Account | None = None
        if scope == "episode":
            budget = message.get("budget")
            try:
                limits = None if budget is None else limits_from_wire(Scope.EPISODE, budget)
            except PolicyError as error:
                raise BadPacket(str(error)) from error
            account, episode = self._scope_account(Scope.EPISODE, span_id, self.account, limits), span_id
        elif scope == "tool":
            account = self.call_account(span_id, episode)
        self._write_reported(record, identity)
        self.open[span_id] = OpenSpan(record, scope, identity, episode=episode, account=account)
        self._unknown = None

    def call_account(self, span_id: str, episode: str | None) -> Account:
        around = self.open.get(episode) if episode is not None else None
        parent = around.account if around is not None and around.account is not None else self.account
        return self._scope_account(Scope.CALL, span_id, parent)

    def end(self, message: Mapping[str, Any]) -> None:
        """A span ends. One that never began is an error of the target's; nothing is written for it."""
        span = self.open.get(fields.identifier(message.get("span"), 16))
        if span is None:
            return
        self._finish(span, fields.ended(span.record, message))

    def _finish(self, span: OpenSpan, record: SpanRecord) -> None:
        if span.scope == "episode":
            counted = {**record.attributes, "ray_guard.violation_count": span.violations}
            record = record._replace(attributes=counted)
        elif span.charged_by:
            record = record._replace(attributes={**record.attributes, "ray_guard.charged_by": span.charged_by})
        record = self._offences.told(record)
        # Forgotten only when it is written: were the disk full, the span would still be known as open.
        self._write_reported(record, span.identity)
        self.open.pop(record.span_id, None)
        self._unknown = None
        if span.account is not None:
            span.account.close()

    def lost(self) -> None:
        """The process is gone: what it had begun ends here, and says so."""
        now = time.time_ns()
        for span in reversed(list(self.open.values())):
            record = span.record._replace(
                end_ns=max(now, span.record.start_ns),
                attributes={**span.record.attributes, "ray_guard.ended_by": "supervisor"},
                status=StatusCode.ERROR,
                status_message="the process ended before the span did",
            )
            self._finish(span, record)

    # -- whose doing something is --------------------------------------------------------------------------------------

    def origin_of_thread(self, tid: int) -> Origin:
        """Which call thread ``tid`` of the actor's own process acts for.

        The thread said so just before the system call (the audit event), or nobody did: then every open call is a
        candidate, and none is guessed.
        """
        self.pump()
        call = self.intents.pop(tid, None)
        if call is not None and call in self.open:
            return self.origin_of_call(call)
        if self._unknown is None:
            self._unknown = self.origin_unknown()
        return self._unknown

    def origin_unknown(self) -> Origin:
        """Whatever in the actor ring nobody has put down to a call: every open call is a candidate."""
        calls = tuple(span_id for span_id, span in self.open.items() if span.scope == "tool")
        if not calls:
            return self._own
        traces = {self.open[call].record.trace_id for call in calls}
        trace = traces.pop() if len(traces) == 1 else self.trace_id
        return self._own._replace(trace_id=trace, candidates=calls[:64], tally=Tally())

    def own_origin(self) -> Origin:
        """The actor itself, for what no call can have caused."""
        return self._own

    def origin_of_call(self, call: str, parent: str | None = None) -> Origin:
        """The open call ``call``; ``parent`` is the process span within it, where that is known."""
        span = self.open[call]
        if span.origin is None:
            around = self.open.get(span.episode) if span.episode is not None else None
            account = span.account or (around.account if around is not None else None) or self.account
            identity = fragment({**span.identity, "ray_guard.source": Source.SUPERVISOR.value})
            span.origin = Origin(span.record.trace_id, call, identity, account, span.episode, call, Tally())
        return span.origin if parent is None else span.origin._replace(parent_id=parent)

    def episode_of(self, trace_id: str) -> str | None:
        """The open episode of a trace."""
        spans = (span for span in self.open.values() if span.scope == "episode")
        return next((span.episode for span in spans if span.record.trace_id == trace_id), None)

    def origin_of(self, span: OpenSpan) -> Origin:
        """An open call, or an open episode, of which then no call is known."""
        span_id = span.record.span_id
        if span.scope != "episode":
            return self.origin_of_call(span_id)
        identity = fragment({**span.identity, "ray_guard.source": Source.SUPERVISOR.value})
        account = span.account or self.account
        return Origin(span.record.trace_id, span_id, identity, account, span_id, None, Tally())

    def tag(self, span_id: str | None, event: SpanEvent) -> None:
        """Keeps what was found out about a span that is open for its end."""
        if span_id is not None:
            self._offences.add(span_id, event)

    def is_of(self, key: str) -> bool:
        """Whether what is recorded with that resource (:func:`ray_guard.evidence.otlp.resource_key`) is of this one."""
        return resource_key(self.resource.attributes) == key

    # -- violations ----------------------------------------------------------------------------------------------------

    def violation(
        self,
        origin: Origin,
        span_id: str | None,
        kind: str,
        *,
        reason: str,
        destination: str = "",
        limit: AttributeValue | None = None,
        value: AttributeValue | None = None,
        source: str = "",
        report_only: bool = False,
        action: str = "",
    ) -> None:
        """Journals a violation below ``span_id``, remembers it, and keeps it for the end of the offending span."""
        now = time.time_ns()
        attributes: dict[str, AttributeValue] = {"ray_guard.violation.kind": kind, "error.type": reason}
        if limit is not None:
            attributes["ray_guard.violation.limit"] = limit
        if value is not None:
            attributes["ray_guard.violation.value"] = value
        if destination:
            attributes["ray_guard.violation.destination"] = destination
        record = SpanRecord(
            trace_id=origin.trace_id,
            span_id=new_span_id(),
            parent_id=span_id or origin.parent_id,
            name="ray_guard.violation",
            kind=SpanKind.INTERNAL,
            start_ns=now,
            end_ns=now,
            attributes=attributes,
            status=StatusCode.ERROR,
            status_message=f"{kind}: {reason}",
        )
        self.write(record, origin.identity)
        origin.tally.another(origin)
        offending = span_id or origin.call or origin.episode or ""
        found = Violation(kind, limit, value, offending, now, reason, destination, origin.episode, source, action)
        self.violations.append(found)
        below = origin.parent_id if origin.link is None else origin.link[1]
        self._offences.add(span_id or below or offending, SpanEvent("ray_guard.violation", now, attributes))
        if origin.episode is not None and (episode := self.open.get(origin.episode)) is not None:
            episode.violations += 1
        if not report_only:
            self.offended(origin, found)

    def exceeded(self, origin: Origin, span_id: str | None, exceeded: Exceeded, destination: str = "") -> None:
        self.violation(
            origin,
            span_id,
            exceeded.kind,
            reason=f"{exceeded.scope.value} budget",
            destination=destination,
            limit=exceeded.limit,
            value=exceeded.value,
            source=exceeded.source,
            report_only=exceeded.report_only,
        )

    def near(self, near: Near) -> None:
        """A limit is almost reached: it is journaled, and the target logs it. That it cannot be stops nothing."""
        span = self.open.get(near.source)
        origin = self._own if span is None else self.origin_of(span)
        now = time.time_ns()
        attributes: dict[str, AttributeValue] = {
            "ray_guard.budget.kind": near.kind,
            "ray_guard.budget.scope": near.scope.value,
            "ray_guard.budget.value": near.value,
            "ray_guard.budget.limit": near.limit,
        }
        record = SpanRecord(
            trace_id=origin.trace_id,
            span_id=new_span_id(),
            parent_id=origin.parent_id,
            name=BUDGET_WARNING,
            kind=SpanKind.INTERNAL,
            start_ns=now,
            end_ns=now,
            attributes=attributes,
        )
        try:
            self.write(record, origin.identity)
        except JournalError:
            log.exception("a warning could not be journaled")
        self.warn(near.text())

    def ended_for(self, spans: Iterable[str]) -> Violation | None:
        """The violation that ended the first of these scopes which was ended."""
        found = (span.ended for each in spans if (span := self.open.get(each)) is not None)
        return next((violation for violation in found if violation is not None), None)

    def violations_of(self, episode: str | None) -> list[dict[str, Any]]:
        found = [each for each in self.violations if episode is None or each.episode == episode]
        return [each.as_message() for each in found[-500:]]

    def reward(self, rollout: str, value: float) -> None:
        """A reward that arrived later: a record of its own, in the trace of the rollout where that is still open."""
        now = time.time_ns()
        known = next((s for s in self.open.values() if s.identity.get("rl.rollout.id") == rollout), None)
        attributes: dict[str, AttributeValue] = {
            "gen_ai.evaluation.name": "reward",
            "gen_ai.evaluation.score.value": value,
        }
        record = SpanRecord(
            trace_id=known.record.trace_id if known else new_trace_id(),
            span_id=new_span_id(),
            parent_id=known.record.span_id if known else None,
            name="ray_guard.reward",
            kind=SpanKind.INTERNAL,
            start_ns=now,
            end_ns=now,
            attributes={"rl.reward.score": value},
            events=(SpanEvent("gen_ai.evaluation.result", now, attributes),),
        )
        identity = known.identity if known else {"rl.run.id": self.run_id}
        self._write_reported(record, {**identity, "rl.rollout.id": rollout})
