"""Where the supervisor's own spans of one call go on when its trace holds as many as a trace should.

Runs in the supervisor. The same rules as in the target (:mod:`ray_guard.client.segments`): a segment is a trace of its
own with a root of no length, which links to what it continues, and each span in it links to what encloses it. A call
may open as many connections as its policy lets it, and have a span for each that is refused.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from ray_guard.evidence.journal import JournalError
from ray_guard.evidence.otlp import Fragment, fragment
from ray_guard.ids import new_span_id, new_trace_id
from ray_guard.log import logger
from ray_guard.named import NamedTuple
from ray_guard.records import LINK, PARENT, ROOT_TRACE, SpanKind, SpanLink, SpanRecord

if TYPE_CHECKING:
    from ray_guard.supervisor.target import Origin, Target

log = logger("ray_guard.segments")

SPANS_LIMIT: Final = 5_000


class _Segment(NamedTuple):
    trace: str
    span: str
    origins: dict[str | None, Origin]
    """By the parent that they stand for."""


class Tally:
    """How many spans of a call the supervisor has written into the call's own trace, and where further ones go."""

    __slots__ = ("_newest", "_number", "_spans", "_told", "spans")

    def __init__(self) -> None:
        self.spans = 0
        self._told = 0
        self._spans = 0
        self._number = 1
        self._newest: _Segment | None = None

    def untold(self) -> int:
        """Those that the target was not told of yet: it counts them with its own."""
        told, self._told = self._told, self.spans
        return self.spans - told

    def another(self, origin: Origin) -> None:
        """One more span is written where ``origin`` says."""
        if self._newest is not None and origin.trace_id == self._newest.trace:
            self._spans += 1
        else:
            self.spans += 1

    def placed(self, target: Target, origin: Origin) -> Origin:
        """``origin`` for one more span: itself, or the place for it in the newest segment."""
        if self.spans < SPANS_LIMIT:
            self.spans += 1
            return origin
        if self._newest is None or self._spans >= SPANS_LIMIT:
            self._begin(target, origin)
        segment = self._newest
        if segment is None:
            return origin  # it could not be journaled: better a long trace than an orphan
        self._spans += 1
        found = segment.origins.get(origin.parent_id)
        if found is None:
            if len(segment.origins) >= SPANS_LIMIT:
                segment.origins.clear()
            link = None if origin.parent_id is None else (origin.trace_id, origin.parent_id)
            found = segment.origins[origin.parent_id] = origin._replace(
                trace_id=segment.trace,
                parent_id=segment.span,
                identity=_with_root(origin.identity, origin.trace_id),
                link=link,
            )
        return found

    def _begin(self, target: Target, origin: Origin) -> None:
        now, before = time.time_ns(), self._newest
        first = origin.call or origin.episode or origin.parent_id
        links = []
        if before is not None:
            links.append(SpanLink(before.trace, before.span, {LINK: "previous_segment"}))
        elif first is not None:
            links.append(SpanLink(origin.trace_id, first, {LINK: "previous_segment"}))
        record = SpanRecord(
            trace_id=new_trace_id(),
            span_id=new_span_id(),
            parent_id=None,
            name="ray_guard.segment",
            kind=SpanKind.INTERNAL,
            start_ns=now,
            end_ns=now,
            attributes={"ray_guard.segment.number": self._number + 1},
            links=tuple(links),
        )
        try:
            target.write(record, _with_root(origin.identity, origin.trace_id))
        except JournalError:
            log.exception("a segment could not be journaled")
            return
        self._newest, self._spans, self._number = _Segment(record.trace_id, record.span_id, {}), 1, self._number + 1


def _with_root(identity: Fragment, trace: str) -> Fragment:
    if ROOT_TRACE in identity.keys:
        return identity  # the call itself lies in a later segment of its rollout
    return Fragment(identity.keys | {ROOT_TRACE}, f"{identity.encoded},{fragment({ROOT_TRACE: trace}).encoded}")


def links_of(link: tuple[str, str] | None) -> tuple[SpanLink, ...]:
    """What a span in a later segment has to tell of what encloses it."""
    return () if link is None else (SpanLink(*link, {LINK: PARENT}),)
