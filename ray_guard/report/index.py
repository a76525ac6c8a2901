"""The spans of a job, found by id, by kind and by what they belong to.

Runs later, on any machine: from evidence alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Final

from ray_guard.evidence.reader import Entry, is_proof
from ray_guard.records import AttributeValue, SpanRecord


class Kind(Enum):
    """What a span stands for (CONTRACT.md, section 4)."""

    ITERATION = "iteration"
    ROLLOUT = "rollout"
    TURN = "turn"
    CHAT = "chat"
    TOOL = "tool call"
    PROCESS = "process"
    FLOW = "flow"
    VIOLATION = "violation"
    DETECTION = "finding"
    GPU = "GPU usage"
    WARNING = "budget warning"
    OTHER = "other"


_BY_NAME: Final = {
    "rl.iteration": Kind.ITERATION,
    "rl.turn": Kind.TURN,
    "egress connect": Kind.FLOW,
    "ray_guard.violation": Kind.VIOLATION,
    "ray_guard.detection": Kind.DETECTION,
    "ray_guard.gpu": Kind.GPU,
    "ray_guard.budget_warning": Kind.WARNING,
}
_BY_FIRST_WORD: Final = {
    "invoke_agent": Kind.ROLLOUT,
    "chat": Kind.CHAT,
    "execute_tool": Kind.TOOL,
    "process": Kind.PROCESS,
}
_IDENTITY: Final = ("rl.run.id", "rl.iteration", "rl.group.id", "rl.rollout.id", "rl.turn", "rl.policy.version")
#: What only the supervisor can know. A target's claim of one of these is no fact.
_NEEDS_PROOF: Final = frozenset({Kind.PROCESS, Kind.FLOW, Kind.VIOLATION, Kind.DETECTION, Kind.GPU, Kind.WARNING})


def kind_of(span: SpanRecord) -> Kind:
    return _BY_NAME.get(span.name) or _BY_FIRST_WORD.get(span.name.split(" ", 1)[0], Kind.OTHER)


@dataclass(frozen=True, slots=True)
class Place:
    """Where in the job a span belongs. Each is None where the evidence does not say."""

    actor: str
    run: str | None
    iteration: int | None
    group: str | None
    rollout: str | None
    turn: int | None
    policy_version: str | None
    call: Entry | None
    process: Entry | None


class Index:
    """All spans of a job after merging.

    Args:
        entries: one per span, as :func:`ray_guard.evidence.reader.merge` gives them.

    Attributes:
        claimed: spans of a kind that only the supervisor can know, reported by a target: kept out of everything else.
    """

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.claimed = 0
        self._spans: dict[tuple[str, str], Entry] = {}
        self._kinds: dict[Kind, list[Entry]] = {kind: [] for kind in Kind}
        for entry in entries:
            kind = kind_of(entry.span)
            if kind in _NEEDS_PROOF and not is_proof(entry.span.attributes):
                self.claimed += 1
                continue
            self._spans[entry.span.trace_id, entry.span.span_id] = entry
            self._kinds[kind].append(entry)

    def __len__(self) -> int:
        return len(self._spans)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._spans.values())

    def of(self, kind: Kind) -> list[Entry]:
        """The spans of a kind, in order of their begin."""
        return sorted(self._kinds[kind], key=lambda entry: (entry.span.start_ns, entry.span.span_id))

    def find(self, trace_id: str, span_id: str) -> Entry | None:
        return self._spans.get((trace_id, span_id))

    def lineage(self, entry: Entry) -> Iterator[Entry]:
        """The span, what encloses it, and so on up to the last one known. A circle in hostile evidence ends it."""
        seen: set[str] = set()
        current: Entry | None = entry
        while current is not None and current.span.span_id not in seen:
            yield current
            seen.add(current.span.span_id)
            above = current.span.above
            current = self._spans.get(above) if above is not None else None

    def above(self, entry: Entry, kind: Kind) -> Entry | None:
        """The next span of that kind above."""
        return next((each for each in self.lineage(entry) if each is not entry and kind_of(each.span) is kind), None)

    def place(self, entry: Entry) -> Place:
        """Where the span belongs: by what it says itself, else by what is above it."""
        said: dict[str, AttributeValue] = {}
        call = process = None
        for step in self.lineage(entry):
            attributes = step.span.attributes
            for key in _IDENTITY:
                if key not in said and attributes.get(key, "") != "":
                    said[key] = attributes[key]
            kind = kind_of(step.span)
            if kind is Kind.TOOL and call is None:
                call = step
            elif kind is Kind.PROCESS and process is None:
                process = step
        return Place(
            actor=actor_name(entry),
            run=_text(said.get("rl.run.id", entry.resource.attributes.get("rl.run.id"))),
            iteration=_whole(said.get("rl.iteration")),
            group=_text(said.get("rl.group.id")),
            rollout=_text(said.get("rl.rollout.id")),
            turn=_whole(said.get("rl.turn")),
            policy_version=_text(said.get("rl.policy.version")),
            call=call,
            process=process,
        )


def actor_name(entry: Entry) -> str:
    """How to call whoever a span is about: the actor's name, else its id, else the service."""
    about = entry.resource.attributes
    name, identifier = _text(about.get("ray.actor_name")), _text(about.get("ray.actor_id"))
    if name:
        return name
    if identifier:
        return f"actor {identifier[:8]}"
    return _text(about.get("service.name")) or "unnamed"


def _text(value: AttributeValue | None) -> str | None:
    return None if value is None or value == "" else str(value)


def _whole(value: AttributeValue | None) -> int | None:
    """An integer attribute; some writers have it as text or double."""
    try:
        return int(value) if isinstance(value, (int, float, str)) else None
    except (ValueError, OverflowError):
        return None
