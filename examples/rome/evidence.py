"""What the evidence folder says, and where that can be checked: against the model's choices and the outside's count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ray_guard.evidence.reader import Entry, Quarantine, merge, read
from ray_guard.report.index import Index, Kind, kind_of
from rome.actions import ORDINARY, World, destinations
from rome.outside import Connection
from rome.records import Turn


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
    """One line as a firewall would have it, and the way from there to whoever caused it, a step per line."""

    line: str
    path: tuple[str, ...]


class Record:
    """The evidence of one run, read once."""

    def __init__(self, folder: Path) -> None:
        self.quarantine = Quarantine()
        self.index = Index(merge(read([folder], self.quarantine)).values())
        self._entries = self.index.of(Kind.FLOW)
        self.flows = [self._flow(entry) for entry in self._entries]

    def flows_of(self, rollout: str, turn: int) -> list[Flow]:
        return [flow for flow in self.flows if (flow.rollout, flow.turn) == (rollout, turn)]

    def broken(self, flows: Sequence[Flow], turn: Turn) -> str:
        """What is missing between these flows and their iteration; empty when nothing is.

        The turn's own word is not taken for it: the command that the kernel saw started must be what the model chose.
        """
        for flow in flows:
            absent = {"process", "tool call", "turn", "rollout"} - set(flow.lineage)
            if absent:
                return f"{flow.destination} does not hang under a {', '.join(sorted(absent))}"
            if flow.iteration is None or flow.call_id is None:
                return f"{flow.destination} names no iteration or call"
            if turn.command not in flow.commands:
                return f"{flow.destination} hangs under {flow.commands}, not under the chosen command"
        return ""

    def strays(self, turns: Sequence[Turn], world: World) -> list[str]:
        """Refusals of what only an act tries to reach, charged to a call that chose something else."""
        chosen = {(turn.rollout, turn.number): turn.kind for turn in turns}
        found = []
        for flow in self.flows:
            if flow.decision != "deny" or flow.transport == "unix":
                continue
            kind = chosen.get((flow.rollout or "", -1 if flow.turn is None else flow.turn), "nothing")
            if kind in ORDINARY or flow.destination not in destinations(kind, world):
                found.append(f"{flow.destination} refused to {flow.rollout} turn {flow.turn}, which chose {kind}")
        return found

    def differences(self, served: Sequence[Connection]) -> list[str]:
        """Where the record and an allowed server's own count of its connections differ: rollout, bytes or number."""
        allowed = {flow.local_port: flow for flow in self.flows if flow.decision == "allow" and flow.transport == "tcp"}
        found = []
        for connection in served:
            flow = allowed.get(connection.peer[1])
            if flow is None or f"?{flow.rollout}:" not in " ".join(connection.achieved):
                found.append(f"{connection.achieved} from port {connection.peer[1]} is on record as {flow}")
            elif (flow.sent, flow.received) != (connection.received, connection.sent):
                found.append(
                    f"{flow.destination} from port {connection.peer[1]}: {flow.sent} sent and {flow.received} received "
                    f"on record, {connection.received} and {connection.sent} counted there"
                )
        places = Counter(f"{connection.local[0]}:{connection.local[1]}" for connection in served)
        recorded = Counter(flow.destination for flow in allowed.values())
        found += [
            f"{place}: {recorded[place]} flows on record, {count} counted there"
            for place, count in places.items()
            if recorded[place] != count
        ]
        return found

    def alerts(self, seen: Sequence[Connection]) -> list[Alert]:
        return []

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


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) else None
