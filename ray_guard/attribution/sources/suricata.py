"""Suricata EVE: one JSON object a line, ``event_type`` says of what; or ``fast.log``. Runs later. Pure.

``timestamp`` is the time of the packet that the event is about; a flow's record is written when the flow is over and
says begin and end itself. Source and destination are those of that packet: the source may be the remote side.
"""

from __future__ import annotations

from typing import Any, Final

from ray_guard.attribution import times
from ray_guard.attribution.observation import (
    Action,
    Observation,
    Semantics,
    Time,
    endpoint,
    protocol,
    whole,
    without_port,
)
from ray_guard.attribution.sources import fast
from ray_guard.attribution.sources.line import Line, Unusable, at, text_of

FORMAT: Final = "suricata"

_ACTIONS: Final = {"blocked": Action.DENIED, "drop": Action.DENIED, "allowed": Action.ALLOWED, "pass": Action.ALLOWED}
_NAMED: Final = (("tls", "sni"), ("http", "hostname"), ("quic", "sni"))
"""Where the far side's name stands, but for DNS."""


class Suricata:
    format = FORMAT

    def recognises(self, line: Line) -> bool:
        parsed = line.object
        if parsed is None:
            return fast.recognises(line.text)
        if "timestamp" not in parsed:
            return False
        # Alerts of old releases, and of shippers that file events by type, come without the type.
        return isinstance(parsed.get("event_type"), str) or ("flow_id" in parsed and "src_ip" in parsed)

    def read(self, line: Line) -> list[Observation]:
        if line.object is None:
            if fast.recognises(line.text):
                return [fast.read(line.text)]
            raise Unusable("malformed", "neither a JSON object nor an alert of fast.log")
        if line.object.get("event_type") == "stats":
            return []
        return [event(line.object)]


def event(parsed: dict[str, Any], node: str = "") -> Observation:
    """One EVE event; AWS Network Firewall carries the same."""
    alert = parsed.get("alert")
    signature = rule = severity = ""
    action = Action.UNKNOWN
    if isinstance(alert, dict):
        signature = text_of(alert, "signature")
        rule = text_of(alert, "signature_id")
        severity = text_of(alert, "severity")
        action = _ACTIONS.get(text_of(alert, "action"), Action.UNKNOWN)
    # A drop event has no alert where a rule without message dropped; with inline mode the verdict says more.
    verdict = text_of(parsed, "verdict", "action") or text_of(parsed, "flow", "action")
    if parsed.get("event_type") == "drop" or verdict in ("drop", "reject"):
        action = Action.DENIED
        rule = rule or text_of(parsed, "drop", "reason") or "drop"
    return Observation(
        _time(parsed),
        src=endpoint(parsed.get("src_ip"), parsed.get("src_port")),
        dst=endpoint(parsed.get("dest_ip"), parsed.get("dest_port")),
        proto=protocol(parsed.get("proto")),
        action=action,
        rule=rule,
        signature=signature,
        severity=severity,
        host=_host(parsed),
        node=node or text_of(parsed, "host"),
        # A netflow event is of one direction.
        bytes_out=whole(at(parsed.get("flow"), "bytes_toserver") or at(parsed.get("netflow"), "bytes")),
        bytes_in=whole(at(parsed.get("flow"), "bytes_toclient")),
        flow_id=text_of(parsed, "flow_id"),
    )


def _time(parsed: dict[str, Any]) -> Time:
    if parsed.get("event_type") in ("flow", "netflow"):
        about = at(parsed, "flow") or at(parsed, "netflow") or {}
        begin, end = text_of(about, "start"), text_of(about, "end")
        if begin and end:
            start = times.iso(begin, Semantics.FLOW)
            return start._replace(end_ns=max(start.end_ns, times.iso(end, Semantics.FLOW).end_ns))
    written = parsed.get("timestamp")
    if isinstance(written, (int, float)):
        return times.epoch(written, Semantics.PACKET)
    return times.iso(written, Semantics.PACKET)


def _host(parsed: dict[str, Any]) -> str:
    for layer, name in _NAMED:
        if layer in parsed and (named := text_of(parsed, layer, name)):
            return without_port(named)
    dns = parsed.get("dns")
    if dns is None:
        return ""
    queried = at(dns, "rrname") or at(dns, "queries") or at(dns, "query")  # by the version of the record
    if isinstance(queried, list):
        queried = next((at(each, "rrname") for each in queried if isinstance(each, dict)), None)
    return queried if isinstance(queried, str) else ""
