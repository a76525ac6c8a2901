"""What the evidence folder says, and where that can be checked: against the model's choices and the outside's count."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ray_guard.evidence.reader import Entry, Quarantine, merge, read
from ray_guard.evidence.redact import redact
from ray_guard.report import chain
from ray_guard.report.index import Index, Kind, kind_of
from rome.actions import ACTS, World, destinations
from rome.outside import Connection
from rome.records import Turn

_ROLLOUT = re.compile(r"\brollout-[0-9]+\b")


@dataclass(frozen=True)
class Flow:
    """One ``egress connect`` span and where it hangs. ``lineage``: the kinds of span from it up to its rollout."""

    rollout: str | None
    turn: int | None
    iteration: int | None
    call_id: str | None
    commands: tuple[str, ...]
    lineage: tuple[str, ...]
    transport: str
    destination: str
    local_port: int | None
    decision: str
    reason: str
    sent: int | None
    received: int | None
    time_ns: int


@dataclass(frozen=True)
class Alert:
    """One line as a firewall has it, who wrote it, and the way from there to its cause: (what, which) per step."""

    writer: str
    line: str
    tier: str
    path: tuple[tuple[str, str], ...]


class Record:
    """The evidence of one run, read once."""

    def __init__(self, folder: Path) -> None:
        self.quarantine = Quarantine()
        self.index = Index(merge(read([folder], self.quarantine)).values())
        self._entries = self.index.of(Kind.FLOW)
        self.flows = [self._flow(entry) for entry in self._entries]

    def flows_of(self, turn: Turn) -> list[Flow]:
        """The flows of a turn's tool call, without what the actor itself does for the turn (asking the policy)."""
        here = (turn.rollout, turn.number)
        return [flow for flow in self.flows if (flow.rollout, flow.turn) == here and flow.call_id]

    def gaps(self, flows: Sequence[Flow], turn: Turn) -> list[str]:
        """What is missing between these flows and their iteration.

        The turn's own word is not taken for it: the command that the kernel saw started must be what the model chose.
        """
        found = []
        for flow in flows:
            absent = {"process", "tool call", "turn", "rollout"} - set(flow.lineage)
            if absent:
                found.append(f"{flow.destination} does not hang under a {', '.join(sorted(absent))}")
            if flow.iteration is None or flow.call_id is None:
                found.append(f"{flow.destination} names no iteration or call")
            if redact(turn.command) not in flow.commands:  # evidence holds no secrets, not even what looks like one
                found.append(f"{flow.destination} hangs under {flow.commands}, not under the chosen command")
        return found

    def strays(self, turns: Sequence[Turn], world: World) -> list[str]:
        """Refusals of what an act tries to reach that are charged to anything but a call that chose this act."""
        chosen: dict[tuple[str | None, int | None], str] = {(turn.rollout, turn.number): turn.kind for turn in turns}
        acts = {place: kind for kind in ACTS for place in destinations(kind, world)}
        return [
            f"{flow.destination} refused to {flow.rollout} turn {flow.turn}, call {flow.call_id}"
            for flow in self.flows
            if flow.decision == "deny" and flow.destination in acts
            if not flow.call_id or chosen.get((flow.rollout, flow.turn)) != acts[flow.destination]
        ]

    def differences(self, arrived: Sequence[Connection]) -> list[str]:
        """Where the record and the far ends' own count of what arrived there differ: in flows, their rollout or bytes.

        Ports tell the flows apart. Which rollout a connection is of, the far end has been told by whoever connected.
        """
        recorded = {(flow.local_port, flow.destination): flow for flow in self.flows if flow.decision == "allow"}
        found = []
        for connection in arrived:
            place, port = f"{connection.local[0]}:{connection.local[1]}", connection.peer[1]
            flow = recorded.pop((port, place), None)
            named = set(_ROLLOUT.findall(" ".join(connection.achieved)))
            if flow is None or not flow.call_id:
                found.append(f"{place} from port {port}, {named}: no flow of a call on record")
            elif named - {flow.rollout}:
                found.append(f"{place} from port {port} is of {named}; on record it is of {flow.rollout}")
            elif (flow.sent, flow.received) != (connection.received, connection.sent):
                found.append(
                    f"{place} from port {port}: {flow.sent} sent and {flow.received} received on record, "
                    f"{connection.received} and {connection.sent} counted there"
                )
        places = {f"{connection.local[0]}:{connection.local[1]}" for connection in arrived}
        found += [f"{place} from port {port}: on record, not seen there" for port, place in recorded if place in places]
        return found

    def alert_of_connection(self, seen: Connection) -> Alert:
        """From a line of the far end's own log: it knows time, addresses and ports, and nothing of rollouts."""
        (address, port), (near, near_port) = seen.local, seen.peer
        line = f"{_date(seen.time_ns)} PASS tcp {near}:{near_port} -> {address}:{port}"
        alert = chain.Alert(seen.time_ns, address, port, near, near_port)
        return self._trace("from the server's own log", line, alert, slack_s=2.0)

    def alert_of_refusal(self, flow: Flow) -> Alert:
        """From a refusal. No firewall ever saw that flow, so the line is the guard's own: no near address and port."""
        address, _, port = flow.destination.rpartition(":")
        line = f"{_date(flow.time_ns)} DROP tcp -> {flow.destination}"
        alert = chain.Alert(flow.time_ns, address, int(port))
        return self._trace("the guard's own, for no firewall ever saw that flow", line, alert, slack_s=0.0)

    def _trace(self, writer: str, line: str, alert: chain.Alert, *, slack_s: float) -> Alert:
        found = chain.chains(self.index, alert, slack_s=slack_s)
        if not found:
            return Alert(writer, line, "", ())
        path = []
        for step in found[0].steps:
            if step.kind is Kind.TOOL and step.entry is not None:
                path += [("chat", said) for said in self._chats_before(step.entry)]
            path.append((step.kind.value, step.said))
        return Alert(writer, line, found[0].tier, tuple(path))

    def _chats_before(self, call: Entry) -> list[str]:
        """The model call of the same turn: the one that asked for this tool call."""
        return [
            f"{about.get('gen_ai.request.model')} · {about.get('gen_ai.usage.input_tokens')} tokens in, "
            f"{about.get('gen_ai.usage.output_tokens')} out · span {entry.span.span_id}"
            for entry in self.index.of(Kind.CHAT)
            if entry.span.trace_id == call.span.trace_id
            and entry.span.parent_id == call.span.parent_id
            and entry.span.start_ns <= call.span.start_ns
            for about in [entry.span.attributes]
        ]

    def _flow(self, entry: Entry) -> Flow:
        about, place = entry.span.attributes, self.index.place(entry)
        address, port = about.get("network.peer.address", ""), about.get("network.peer.port", "")
        lineage = list(self.index.lineage(entry))
        commands: list[str] = []
        for step in lineage:
            arguments = step.span.attributes.get("process.command_args")
            if isinstance(arguments, tuple):
                commands += arguments
        call = place.call.span.attributes if place.call else {}
        return Flow(
            rollout=place.rollout,
            turn=place.turn,
            iteration=place.iteration,
            call_id=str(call["gen_ai.tool.call.id"]) if "gen_ai.tool.call.id" in call else None,
            commands=tuple(commands),
            lineage=tuple(kind_of(step.span).value for step in lineage[1:]),
            transport=str(about.get("network.transport", "")),
            destination=f"{address}:{port}" if port != "" else str(address),
            local_port=_whole(about.get("network.local.port")),
            decision=str(about.get("ray_guard.egress.decision", "")),
            reason=str(about.get("ray_guard.egress.reason", "")),
            sent=_whole(about.get("ray_guard.egress.bytes_sent")),
            received=_whole(about.get("ray_guard.egress.bytes_received")),
            time_ns=entry.span.start_ns,
        )


def _date(time_ns: int) -> str:
    return datetime.fromtimestamp(time_ns / 1e9, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) else None
