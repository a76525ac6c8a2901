"""Frozen values that cross a process border: spans, identities, resources.

Runs everywhere. No I/O, no third-party import: the supervisor and the zygote load this module too.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum, StrEnum
from types import MappingProxyType
from typing import Final

from ray_guard.named import NamedTuple

AttributeValue = str | bool | int | float | tuple[str, ...]
Attributes = Mapping[str, AttributeValue]

_NONE: Final[Attributes] = MappingProxyType({})


class Role(StrEnum):
    """Which defaults apply to a target (see DESIGN.md, Roles)."""

    TOOL = "tool"
    ENV = "env"
    POLICY = "policy"


class Mode(StrEnum):
    ENFORCE = "enforce"
    REPORT = "report"


class SpanKind(IntEnum):
    """OTLP numbers."""

    INTERNAL = 1
    CLIENT = 3


class StatusCode(IntEnum):
    """OTLP numbers."""

    UNSET = 0
    OK = 1
    ERROR = 2


class Source(StrEnum):
    """Who reported a span (``ray_guard.source``); only the supervisor's own are proof."""

    TARGET = "target"
    SUPERVISOR = "supervisor"


class SpanEvent(NamedTuple):
    name: str
    time_ns: int
    attributes: Attributes = _NONE


LINK: Final = "ray_guard.link"
"""The attribute of a link that says what it leads to: ``parent``, ``rollout`` or ``previous_segment``."""
PARENT: Final = "parent"
ROOT_TRACE: Final = "ray_guard.root_trace_id"
"""On every span of a rollout's later segments: the rollout's first trace."""
EAGLEEYE_TRACE: Final = "ray_guard.eagleeye.trace_id"
"""On every span below a request that ROCK named by ``eagleeye-traceid``."""
IDENTITY: Final = (
    "rl.run.id",
    "rl.iteration",
    "rl.rollout.id",
    "rl.group.id",
    "rl.turn",
    "rl.policy.version",
    ROOT_TRACE,
    EAGLEEYE_TRACE,
)
"""What is on every span, where it is known (CONTRACT.md section 4)."""


class SpanLink(NamedTuple):
    """``attributes`` may say what it leads to (:data:`LINK`); an iteration, where they do not."""

    trace_id: str
    span_id: str
    attributes: Attributes = _NONE


class SpanRecord(NamedTuple):
    """One span, begun or ended.

    ``trace_id`` is 32 and ``span_id`` 16 lower-case hex digits; times are Unix nanoseconds. ``end_ns`` None: the span
    is open; its journal line has no ``endTimeUnixNano`` and a later line with the same ids replaces it.
    """

    trace_id: str
    span_id: str
    parent_id: str | None
    name: str
    kind: SpanKind
    start_ns: int
    end_ns: int | None
    attributes: Attributes
    status: StatusCode = StatusCode.UNSET
    status_message: str = ""
    events: tuple[SpanEvent, ...] = ()
    links: tuple[SpanLink, ...] = ()

    @property
    def above(self) -> tuple[str, str] | None:
        """Trace and span of what encloses it: its parent, but for one that lies in an earlier segment."""
        for link in self.links:
            if link.attributes.get(LINK) == PARENT:
                return link.trace_id, link.span_id
        return None if self.parent_id is None else (self.trace_id, self.parent_id)


class Resource(NamedTuple):
    """Who a span is about: attributes of the OTLP resource (``service.name``, ``host.ip``, ``ray.actor_id`` …)."""

    attributes: Attributes
