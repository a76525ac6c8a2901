"""target: a rollout of many spans is spread over several traces, for what shows traces fails beyond some 10,000 spans.

The first trace has the rollout for its root. When it holds :data:`SPANS_LIMIT` spans another trace is begun, a
*segment*, with a span of no length for its root (``ray_guard.segment``), which links to the rollout and to the segment
before. From then on every scope is opened in the newest segment: below what encloses it where that is there too, else
below the segment's root, with a link to what encloses it. So each parent lies in its span's own trace, as OpenTelemetry
has it, and links lead everywhere: onwards, back, and to the true parent. All spans of a later segment carry
``ray_guard.root_trace_id``, so that one search finds the whole rollout.

What is counted are the spans of this process, and those that the supervisor says it has written for its tools. The
limit is where a segment ends, not a promise: scopes that are open go on in theirs.
"""

from __future__ import annotations

from typing import Any, Final

SPANS_LIMIT: Final = 5_000
"""Spans of a segment after which the next one is begun."""

_KNOWN_LIMIT: Final = 256

Place = tuple[str, str, bool]
"""Trace, span and what the user's OpenTelemetry sampler said of it."""

ROLLOUT: Final = "rollout"
PREVIOUS: Final = "previous_segment"


class Segments:
    """The segments of one rollout (or of whatever encloses its spans), and how many spans the newest has."""

    __slots__ = ("_turn", "count", "first", "last", "newest", "number", "root")

    def __init__(self, trace: str, span: str) -> None:
        self.root = trace
        """The first trace."""
        self.first = (trace, span)
        """What all are about: the rollout, or the span of others that this process was called from."""
        self.newest: Place = (trace, span, True)
        """The newest segment and its root: in one piece, for threads read it while another begins the next."""
        self.last: Any = None
        """What was last opened in a later segment than what encloses it: that, and the identity for there."""
        self.number = 1
        self.count = 1
        # Who takes the only item out begins the next segment; others go on in the old one meanwhile. list.pop is
        # atomic, and unlike a lock it does not keep a forked child waiting for a thread that it does not have.
        self._turn = [True]

    def take_turn(self) -> bool:
        """Whether the caller is the one to begin the next segment."""
        try:
            self._turn.pop()
        except IndexError:
            return False
        if self.count > SPANS_LIMIT:
            return True
        self._turn.append(True)
        return False

    def go_on(self, trace: str, span: str, *, sampled: bool) -> None:
        """The next segment has begun."""
        self.newest = (trace, span, sampled)
        self.count = 2
        self.number += 1

    def give_back(self) -> None:
        self._turn.append(True)


class _Known:
    """Those of traces that others have begun: each call from there counts."""

    def __init__(self) -> None:
        self._known: dict[str, Segments] = {}

    def of(self, trace: str, span: str) -> Segments:
        found = self._known.get(trace)
        if found is None:
            if len(self._known) >= _KNOWN_LIMIT:
                for oldest in list(self._known)[: _KNOWN_LIMIT // 2]:
                    self._known.pop(oldest, None)
            found = self._known[trace] = Segments(trace, span)
        return found


known = _Known().of
