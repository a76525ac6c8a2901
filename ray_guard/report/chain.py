"""From one alert back to what caused it: iteration, rollout, turn, tool call, process, flow.

Runs later, on any machine. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

from ray_guard.evidence.reader import Entry
from ray_guard.records import AttributeValue, SpanRecord
from ray_guard.report import text
from ray_guard.report.index import Index, Kind, kind_of
from ray_guard.report.summary import command_of, destination_of, reason_of, tool_of

_UNKNOWN: Final = "not in this evidence"


@dataclass(frozen=True, slots=True)
class Alert:
    """What a firewall or IDS line says.

    Args:
        time_ns: Unix nanoseconds, by the trace's clock.
        peer_address: the far end, any textual form of an IP address.
        peer_port: its port.
        local_address: the near end, where the line has it.
        local_port: its port; with it the flow is certain, without it flows to the same place may be confused.
    """

    time_ns: int
    peer_address: str
    peer_port: int
    local_address: str | None = None
    local_port: int | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One link of the chain: ``entry`` None where the evidence has no span for it."""

    kind: Kind
    entry: Entry | None
    said: str


@dataclass(frozen=True, slots=True)
class Chain:
    """The way from an iteration down to one flow.

    ``tier`` is the evidence it rests on: ``socket`` (both ports agree) or ``destination`` (the far end and the time).
    """

    flow: Entry
    tier: str
    steps: tuple[Step, ...]


def chains(index: Index, alert: Alert, *, slack_s: float = 2.0) -> list[Chain]:
    """The flows an alert can be about, best first; more than one when the evidence cannot tell them apart.

    Args:
        index: the job's spans.
        alert: what was reported.
        slack_s: how far the alert's time may lie outside a flow's, in seconds.
    """
    peer = _address(alert.peer_address)
    slack_ns = round(slack_s * 1e9)
    found: list[tuple[bool, int, Entry]] = []
    for entry in index.of(Kind.FLOW):
        attributes = entry.span.attributes
        if attributes.get("network.peer.port") != alert.peer_port:
            continue
        if _address(attributes.get("network.peer.address")) != peer:
            continue
        away_ns = _away(entry.span, alert.time_ns)
        if away_ns > slack_ns:
            continue
        local = attributes.get("network.local.port")
        if alert.local_port is not None and local is not None and local != alert.local_port:
            continue
        near = attributes.get("network.local.address")
        if alert.local_address is not None and near and _address(near) != _address(alert.local_address):
            continue
        found.append((alert.local_port is not None and local == alert.local_port, away_ns, entry))
    exact = [item for item in found if item[0]]
    found = sorted(exact or found, key=lambda item: (item[1], item[2].span.start_ns, item[2].span.span_id))
    return [
        Chain(entry, "socket" if by_socket else "destination", _steps(index, entry)) for by_socket, _, entry in found
    ]


def explain(index: Index, alert: Alert, *, slack_s: float = 2.0, limit: int = 3) -> list[str]:
    """The chains as lines to print, the alert first. Never empty."""
    near = "" if alert.local_port is None else f"{text.endpoint(alert.local_address or '*', alert.local_port)} to "
    far = text.endpoint(alert.peer_address, alert.peer_port)
    lines = [_line("alert", f"{text.date(alert.time_ns)} UTC  {near}{far}")]
    found = chains(index, alert, slack_s=slack_s)
    if not found:
        return [*lines, _line("", "no recorded flow matches: whatever caused this did not pass the guard")]
    if len(found) > 1:
        lines.append(_line("", f"{len(found)} flows fit; without the near port they cannot be told apart"))
    for number, chain in enumerate(found[:limit]):
        if number:
            lines.append("")
        lines += [_line(step.kind.value, step.said) for step in chain.steps]
    if len(found) > limit:
        lines += ["", _line("", f"… {len(found) - limit} more")]
    return lines


def _line(label: str, said: str) -> str:
    return f"{label:<10} {text.printable(said)}".rstrip()


def _address(value: AttributeValue | None) -> IPv4Address | IPv6Address | str:
    """Canonical, so that ``::ffff:192.0.2.1`` is ``192.0.2.1``; what is no address stays text."""
    try:
        address = ip_address(str(value))
    except ValueError:
        return str(value)
    return getattr(address, "ipv4_mapped", None) or address


def _away(span: SpanRecord, time_ns: int) -> int:
    """Nanoseconds between a moment and a span; 0 within it. A span without end is still going on."""
    if time_ns < span.start_ns:
        return span.start_ns - time_ns
    return 0 if span.end_ns is None else max(0, time_ns - span.end_ns)


def _steps(index: Index, flow: Entry) -> tuple[Step, ...]:
    place = index.place(flow)
    above: dict[Kind, Entry] = {}
    for entry in index.lineage(flow):
        above.setdefault(kind_of(entry.span), entry)
    rollout = above.get(Kind.ROLLOUT)
    iteration = _linked_iteration(index, rollout)
    steps = [
        Step(
            Kind.ITERATION,
            iteration,
            _joined(
                None if place.iteration is None else str(place.iteration),
                place.run and f"run {place.run}",
                iteration and f"trace {iteration.span.trace_id}",
            ),
        ),
        Step(
            Kind.ROLLOUT,
            rollout,
            _joined(
                place.rollout,
                place.group and f"group {place.group}",
                place.policy_version and f"policy version {place.policy_version}",
                f"actor {place.actor}",
                f"trace {flow.span.trace_id}",
            ),
        ),
        Step(Kind.TURN, above.get(Kind.TURN), _UNKNOWN if place.turn is None else str(place.turn)),
    ]
    call = place.call
    steps.append(
        Step(
            Kind.TOOL,
            call,
            _UNKNOWN
            if call is None
            else _joined(
                tool_of(place),
                str(call.span.attributes.get("gen_ai.tool.call.id", "")),
                _period(call.span),
                f"span {call.span.span_id}",
            ),
        )
    )
    process = place.process
    if process is None:
        said = "in the actor's own process, or not recorded"
    else:
        pid = process.span.attributes.get("process.pid")
        said = _joined(pid if pid is None else f"pid {pid}", command_of(place))
    steps += [Step(Kind.PROCESS, process, said), Step(Kind.FLOW, flow, _flow(flow))]
    return tuple(steps)


def _linked_iteration(index: Index, rollout: Entry | None) -> Entry | None:
    for link in () if rollout is None else rollout.span.links:
        entry = index.find(link.trace_id, link.span_id)
        if entry is not None and kind_of(entry.span) is Kind.ITERATION:
            return entry
    return None


def _flow(entry: Entry) -> str:
    attributes = entry.span.attributes
    local, port = attributes.get("network.local.address"), attributes.get("network.local.port")
    where = destination_of(entry)
    far = text.endpoint(where.address, where.port)
    named = f" ({where.name})" if where.name else ""
    near = f"{text.endpoint(str(local), port if isinstance(port, int) else None)} to " if local else ""
    decision, reason = attributes.get("ray_guard.egress.decision"), reason_of(entry)
    outcome = {"allow": "allowed", "deny": "refused"}.get(str(decision), str(decision or ""))
    moved = [
        f"{text.size(value)} {way}"
        for way in ("sent", "received")
        if isinstance(value := attributes.get(f"ray_guard.egress.bytes_{way}"), int)
    ]
    scope = attributes.get("ray_guard.egress.scope")
    return _joined(
        f"{where.transport or 'tcp'} {near}{far}{named}",
        f"{outcome}: {reason}" if reason else outcome,
        ", ".join(moved) if decision != "deny" else "",
        _period(entry.span),
        "attribution ambiguous" if scope == "ambiguous" else "",
    )


def _period(span: SpanRecord) -> str:
    begun = f"{text.clock(span.start_ns)} UTC"
    if span.end_ns is None:
        return f"{begun}, never ended"
    return f"{begun} for {text.seconds((span.end_ns - span.start_ns) / 1e9)}"


def _joined(*parts: str | None) -> str:
    """The parts there are, a first one that is missing named as such."""
    first, *rest = parts
    said: Sequence[str] = [part for part in rest if part]
    return " · ".join([first or _UNKNOWN, *said])
