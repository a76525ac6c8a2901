"""Cilium Hubble flows, as exported (``{"flow": {…}}``) or observed in the older form (the flow alone).

Runs later. Pure. A packet may be dropped, and logged, on another node than the one it came from; ``is_reply`` flows go
backwards.
"""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import urlsplit

from ray_guard.attribution import times
from ray_guard.attribution.observation import NOBODY, Action, Observation, Semantics, endpoint
from ray_guard.attribution.sources.line import Line, Unusable, at, text_of

FORMAT: Final = "hubble"

_ACTIONS: Final = {
    "FORWARDED": Action.ALLOWED,
    "REDIRECTED": Action.ALLOWED,
    "DROPPED": Action.DENIED,
    "ERROR": Action.DENIED,
    "1": Action.ALLOWED,
    "2": Action.DENIED,
    "3": Action.DENIED,
    "5": Action.ALLOWED,
}
#: what is exported besides flows
_OTHERS: Final = frozenset({"lost_events", "node_status", "agent_event", "debug_event"})


class Hubble:
    format = FORMAT

    def recognises(self, line: Line) -> bool:
        parsed = line.object
        if parsed is None:
            return False
        flow = _flow(parsed)
        if flow is None:
            return "node_name" in parsed and not _OTHERS.isdisjoint(parsed)
        return "verdict" in flow and ("IP" in flow or "l4" in flow or "source" in flow)

    def read(self, line: Line) -> list[Observation]:
        flow = _flow(line.object)
        if line.object is None:
            raise Unusable("malformed", "not a JSON object")
        lost = at(line.object, "lost_events")
        if lost is not None:
            raise Unusable("fields", f"Hubble lost {at(lost, 'num_events_lost')} events here: {at(lost, 'source')}")
        if flow is None or "verdict" not in flow:
            if _OTHERS.isdisjoint(line.object):
                raise Unusable("malformed", "no flow in the object")
            return []  # what became of a node or of the agent
        proto, l4 = next(iter((flow.get("l4") or {}).items()), ("", {}))
        verdict = text_of(flow, "verdict")
        denied = _ACTIONS.get(verdict, Action.UNKNOWN) is Action.DENIED
        policies = at(flow, "egress_denied_by") or at(flow, "ingress_denied_by") or []
        policy = next((text_of(each, "name") for each in policies if isinstance(each, dict)), "")
        why = text_of(flow, "drop_reason_desc") or text_of(flow, "drop_reason")
        return [
            Observation(
                times.iso(flow.get("time") or line.object.get("time"), Semantics.PACKET),
                src=endpoint(at(flow, "IP", "source"), at(l4, "source_port")),
                dst=endpoint(at(flow, "IP", "destination"), at(l4, "destination_port")),
                translated_src=endpoint(at(flow, "IP", "source_xlated")) if at(flow, "IP", "source_xlated") else NOBODY,
                proto={"icmpv4": "icmp", "icmpv6": "icmp6"}.get(proto.lower(), proto.lower()),
                action=_ACTIONS.get(verdict, Action.UNKNOWN),
                rule=(policy or why or "dropped") if denied else ("audit" if verdict in ("AUDIT", "4") else ""),
                host=_host(flow),
                node=text_of(flow, "node_name") or text_of(line.object, "node_name"),
                flow_id=text_of(flow, "uuid"),
            )
        ]


def _flow(parsed: dict[str, Any] | None) -> dict[str, Any] | None:
    inner = at(parsed, "flow")
    if isinstance(inner, dict):
        return inner
    return parsed if parsed is not None and "verdict" in parsed and ("IP" in parsed or "l4" in parsed) else None


def _host(flow: dict[str, Any]) -> str:
    query = text_of(flow, "l7", "dns", "query").rstrip(".")
    url = text_of(flow, "l7", "http", "url")
    named = urlsplit(url).hostname if "://" in url else None
    names = flow.get("destination_names")
    return query or named or (str(names[0]) if isinstance(names, list) and names else "")
