"""What an ended span counts for: metrics derived from journal records, pure. Runs in the forwarder's process.

Standard library only. Names follow semantic-conventions-genai where it has one (commit 004902b), else ``ray_guard.*``;
all are listed in docs/traces.md. What only the supervisor can know (flows, violations, warnings, GPU time) is counted
from its own records alone, as in reports. Labels are kinds of things, never things: no ids, commands or addresses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Final, NamedTuple

from ray_guard.evidence.reader import is_proof
from ray_guard.records import Attributes, AttributeValue, SpanRecord, StatusCode

_TOKENS: Final = tuple(4**power for power in range(14))
_SECONDS: Final = tuple(round(0.01 * 2**power, 2) for power in range(14))


class Instrument(NamedTuple):
    """A histogram where there are ``boundaries``, else a counter. ``unit``: UCUM. ``labels``: those it may have."""

    name: str
    unit: str
    description: str
    labels: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()


_OPERATION, _PROVIDER, _MODEL = "gen_ai.operation.name", "gen_ai.provider.name", "gen_ai.request.model"
_TOOL_NAME, _TOKEN_TYPE = "gen_ai.tool.name", "gen_ai.token.type"
_SOURCE, _ERROR = "ray_guard.source", "error.type"
_REASON, _TRANSPORT, _DIRECTION = "ray_guard.egress.reason", "network.transport", "network.io.direction"
_VIOLATION, _BUDGET, _SCOPE = "ray_guard.violation.kind", "ray_guard.budget.kind", "ray_guard.budget.scope"
_CHAT: Final = (_OPERATION, _PROVIDER, _MODEL, _SOURCE)

TOKEN_USAGE: Final = Instrument(
    "gen_ai.client.token.usage", "{token}", "Tokens of a model call", (*_CHAT, _TOKEN_TYPE), _TOKENS
)
OPERATION: Final = Instrument(
    "gen_ai.client.operation.duration", "s", "Duration of a model call", (*_CHAT, _ERROR), _SECONDS
)
TOOL: Final = Instrument(
    "gen_ai.execute_tool.duration", "s", "Duration of a tool call", (_TOOL_NAME, _SOURCE, _ERROR), _SECONDS
)
AGENT: Final = Instrument("gen_ai.invoke_agent.duration", "s", "Duration of a rollout", (_SOURCE, _ERROR), _SECONDS)
FLOPS: Final = Instrument("ray_guard.flops", "{FLOP}", "What model calls computed", _CHAT)
CONNECTIONS: Final = Instrument(
    "ray_guard.egress.connections", "{connection}", "Granted flows that ended", (_TRANSPORT, _REASON)
)
DENIALS: Final = Instrument("ray_guard.egress.denials", "{connection}", "Refused flows", (_TRANSPORT, _REASON))
BYTES: Final = Instrument("ray_guard.egress.bytes", "By", "Payload of flows that ended", (_TRANSPORT, _DIRECTION))
VIOLATIONS: Final = Instrument("ray_guard.violations", "{violation}", "Violations", (_VIOLATION, _ERROR))
EXCEEDED: Final = Instrument("ray_guard.budget.exceeded", "{violation}", "Budgets that were passed", (_BUDGET, _SCOPE))
WARNINGS: Final = Instrument(
    "ray_guard.budget.warnings", "{warning}", "Budgets that were almost used up", (_BUDGET, _SCOPE)
)
GPU: Final = Instrument("ray_guard.gpu.time", "s", "GPU time of actors that ended")
ENDED: Final = Instrument("ray_guard.spans.ended_by_supervisor", "{span}", "Spans whose process died before them")
INSTRUMENTS: Final = (
    *(TOKEN_USAGE, OPERATION, TOOL, AGENT, FLOPS),
    *(CONNECTIONS, DENIALS, BYTES, VIOLATIONS, EXCEEDED, WARNINGS, GPU, ENDED),
)

_OF_A_BUDGET: Final = " budget"

Labels = Mapping[str, str]


class Measurement(NamedTuple):
    instrument: Instrument
    value: float
    labels: Labels


def measured(span: SpanRecord) -> Iterator[Measurement]:
    """What a span that ended counts for; nothing for most."""
    of = _BY_NAME.get(span.name) or _BY_FIRST_WORD.get(span.name.partition(" ")[0])
    if of is not None:
        yield from of(span)
    if "ray_guard.ended_by" in span.attributes:
        yield Measurement(ENDED, 1, {})


# --- by kind of span -------------------------------------------------------------------------------------------------


# ``ray_guard.source`` is among the labels where a target may say what it likes.


def _chat(span: SpanRecord) -> Iterator[Measurement]:
    about = span.attributes
    labels = {
        _OPERATION: str(about.get(_OPERATION) or "chat"),
        **_copied(about, _PROVIDER, _MODEL, _SOURCE),
    }
    yield Measurement(OPERATION, _seconds(span), labels | _error(span))
    if "ray_guard.charged_by" in about:
        return  # counted where its engine says it
    for kind in ("input", "output"):
        tokens = _number(about.get(f"gen_ai.usage.{kind}_tokens"))
        if tokens is not None:
            yield Measurement(TOKEN_USAGE, tokens, {**labels, _TOKEN_TYPE: kind})
    flops = _number(about.get("ray_guard.flops"))
    if flops:
        yield Measurement(FLOPS, flops, labels)


def _tool(span: SpanRecord) -> Iterator[Measurement]:
    labels = _copied(span.attributes, _TOOL_NAME, _SOURCE)
    yield Measurement(TOOL, _seconds(span), labels | _error(span))


def _agent(span: SpanRecord) -> Iterator[Measurement]:
    yield Measurement(AGENT, _seconds(span), _copied(span.attributes, _SOURCE) | _error(span))


def _flow(span: SpanRecord) -> Iterator[Measurement]:
    about = span.attributes
    if not is_proof(about) or about.get("ray_guard.egress.mute"):  # mute: a socket that cannot send
        return
    transport = _copied(about, _TRANSPORT)
    labels = transport | _copied(about, _REASON)
    yield Measurement(DENIALS if about.get("ray_guard.egress.decision") == "deny" else CONNECTIONS, 1, labels)
    for way, direction in (("sent", "transmit"), ("received", "receive")):
        count = _number(about.get(f"ray_guard.egress.bytes_{way}"))
        if count:
            yield Measurement(BYTES, count, transport | {_DIRECTION: direction})


def _violation(span: SpanRecord) -> Iterator[Measurement]:
    about = span.attributes
    if not is_proof(about):
        return
    kind, reason = str(about.get(_VIOLATION, "unnamed")), str(about.get(_ERROR, "_OTHER"))
    yield Measurement(VIOLATIONS, 1, {_VIOLATION: kind, _ERROR: reason})
    if reason.endswith(_OF_A_BUDGET):
        yield Measurement(EXCEEDED, 1, {_BUDGET: kind, _SCOPE: reason.removesuffix(_OF_A_BUDGET)})


def _warning(span: SpanRecord) -> Iterator[Measurement]:
    if is_proof(span.attributes):
        yield Measurement(WARNINGS, 1, _copied(span.attributes, _BUDGET, _SCOPE))


def _gpu(span: SpanRecord) -> Iterator[Measurement]:
    seconds = _number(span.attributes.get("ray_guard.gpu.seconds"))
    if seconds and is_proof(span.attributes):
        yield Measurement(GPU, seconds, {})


_Of = Callable[[SpanRecord], Iterator[Measurement]]
_BY_NAME: Final[Mapping[str, _Of]] = {
    "egress connect": _flow,
    "ray_guard.violation": _violation,
    "ray_guard.budget_warning": _warning,
    "ray_guard.gpu": _gpu,
}
_BY_FIRST_WORD: Final[Mapping[str, _Of]] = {"chat": _chat, "execute_tool": _tool, "invoke_agent": _agent}


def _copied(about: Attributes, *keys: str) -> dict[str, str]:
    return {key: str(about[key]) for key in keys if about.get(key) not in (None, "")}


def _error(span: SpanRecord) -> dict[str, str]:
    if span.status is not StatusCode.ERROR:
        return {}
    ended = "ray_guard.ended_by" in span.attributes
    return {_ERROR: "process_died" if ended else str(span.attributes.get(_ERROR) or "_OTHER")}


def _seconds(span: SpanRecord) -> float:
    return 0.0 if span.end_ns is None else max(0, span.end_ns - span.start_ns) / 1e9


def _number(value: AttributeValue | None) -> float | None:
    """As it is where it can be added up: targets may claim any number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if 0 <= value <= _CREDIBLE else None  # no sum of floats is too large to be sent


_CREDIBLE: Final = 1e30


# --- bounds ----------------------------------------------------------------------------------------------------------


class Bounded:
    """Keeps labels few, whatever targets call their tools, models and errors.

    Of each label of an instrument the first ``values`` different ones are kept, the others become ``(other)``, as does
    what does not look like a name; and of an instrument's combinations the first ``series``. Sums stay right.
    """

    def __init__(self, *, values: int = 64, series: int = 1000) -> None:
        self._values = values
        self._series = series
        self._seen: dict[tuple[str, str], set[str]] = {}
        self._sets: dict[str, set[frozenset[tuple[str, str]]]] = {}

    def labels(self, measurement: Measurement) -> Labels:
        name = measurement.instrument.name
        labels = {key: self._value(name, key, value) for key, value in measurement.labels.items()}
        sets = self._sets.setdefault(name, set())
        this = frozenset(labels.items())
        if this not in sets:
            if len(sets) >= self._series:
                return OVERFLOW
            sets.add(this)
        return labels

    def _value(self, name: str, key: str, value: str) -> str:
        seen = self._seen.setdefault((name, key), set())
        if value in seen:
            return value
        if len(seen) >= self._values or not _NAME.fullmatch(value):
            return OTHER
        seen.add(value)
        return value


OTHER: Final = "(other)"
OVERFLOW: Final[Labels] = {"otel.metric.overflow": "true"}
_NAME: Final = re.compile(r"[\w.:/@+ -]{1,100}")


class Losses:
    """What journals say of the records they lost: a supervisor's totals, turned into increments."""

    def __init__(self) -> None:
        self._said: dict[str, float] = {}

    def more(self, log: str, span: SpanRecord) -> float:
        """How many are new by this span. ``log``: in whose segment it stands; a supervisor's next log counts on."""
        total = _number(span.attributes.get("ray_guard.journal.lost_records"))
        if total is None or not is_proof(span.attributes):
            return 0
        writer = log.partition("-")[2].rpartition("-")[0]  # host and pid
        before = self._said.get(writer, 0)
        self._said[writer] = total
        return total - before if total >= before else total
