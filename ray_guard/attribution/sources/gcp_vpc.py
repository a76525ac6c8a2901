"""Google Cloud VPC flow and firewall rules logs: a LogEntry with ``jsonPayload``, or that payload alone.

Runs later. Pure. A flow's window is ``start_time`` to ``end_time``; a firewall record has the entry's own
``timestamp``. Behind Cloud NAT the address in ``connection`` may be the translated one; its own log says both.
"""

from __future__ import annotations

from typing import Any, Final

from ray_guard.attribution import times
from ray_guard.attribution.observation import Action, Observation, Semantics, Time, endpoint, protocol, whole
from ray_guard.attribution.sources.line import Line, Unusable, at, text_of

FORMAT: Final = "gcp-vpc"


class GcpVpc:
    format = FORMAT

    def recognises(self, line: Line) -> bool:
        return (
            isinstance(at(_payload(line.object), "connection"), dict)
            and "src_ip" in _payload(line.object)["connection"]
        )

    def read(self, line: Line) -> list[Observation]:
        payload = _payload(line.object)
        connection = at(payload, "connection")
        if line.object is None or not isinstance(connection, dict):
            raise Unusable("malformed", "no connection in the payload")
        denied = text_of(payload, "disposition").upper() == "DENIED"
        allowed = text_of(payload, "disposition").upper() == "ALLOWED"
        return [
            Observation(
                _time(line.object, payload),
                src=endpoint(connection.get("src_ip"), connection.get("src_port")),
                dst=endpoint(connection.get("dest_ip"), connection.get("dest_port")),
                translated_src=endpoint(connection.get("nat_ip"), connection.get("nat_port")),
                proto=protocol(connection.get("protocol")),
                action=Action.DENIED if denied else Action.ALLOWED if allowed else Action.UNKNOWN,
                # An allowing rule is no objection: logging is switched on for all that it lets through.
                rule=text_of(payload, "rule_details", "reference") if denied else "",
                node=text_of(payload, "src_instance", "vm_name")
                or text_of(payload, "instance", "vm_name")
                or text_of(payload, "endpoint", "vm_name")
                or text_of(payload, "src_gke_details", "pod", "pod_name"),
                bytes_out=whole(payload.get("bytes_sent")),
            )
        ]


def _payload(parsed: dict[str, Any] | None) -> dict[str, Any]:
    inner = at(parsed, "jsonPayload")
    return inner if isinstance(inner, dict) else parsed or {}


def _time(entry: dict[str, Any], payload: dict[str, Any]) -> Time:
    begin, end = text_of(payload, "start_time"), text_of(payload, "end_time")
    if begin and end:
        start = times.iso(begin, Semantics.WINDOW)
        return start._replace(end_ns=max(start.end_ns, times.iso(end, Semantics.WINDOW).end_ns))
    if "timestamp" in entry or "timestamp" in payload:
        return times.iso(entry.get("timestamp") or payload.get("timestamp"), Semantics.PACKET)
    return times.iso(entry.get("receiveTimestamp"), Semantics.INGEST)
