"""PAN-OS records as Palo Alto's log forwarding (Strata Logging Service, Cortex Data Lake) hands them on: JSON, or CEF.

Runs later. Pure. The fields are those of the firewall's own CSV, by name instead of by position. JSON times are UTC and
say so; CEF says its zone in ``dtz``. Only records of traffic and of threats are about flows.
"""

from __future__ import annotations

from typing import Any, Final

from ray_guard.attribution import times
from ray_guard.attribution.observation import Semantics, Time, whole
from ray_guard.attribution.sources import cef
from ray_guard.attribution.sources.line import Line, text_of

#: CEF's names for what the JSON form names; ``cs1`` and the like are labelled, and always the same
_CEF_NAMES: Final = {
    "src": "SourceAddress",
    "c6a2": "SourceAddress",
    "spt": "SourcePort",
    "dst": "DestinationAddress",
    "c6a3": "DestinationAddress",
    "dpt": "DestinationPort",
    "sourceTranslatedAddress": "NATSource",
    "sourceTranslatedPort": "NATSourcePort",
    "destinationTranslatedAddress": "NATDestination",
    "destinationTranslatedPort": "NATDestinationPort",
    "proto": "Protocol",
    "act": "Action",
    "in": "BytesSent",  # by CEF's definition: from source to destination
    "out": "BytesReceived",
    "cs1": "Rule",
    "cn1": "SessionID",
    "cn3": "SessionDuration",
    "start": "TimeGenerated",
    "PanOSSessionStartTime": "SessionStartTime",
    "PanOSThreatID": "ThreatID",
    "PanOSSeverity": "VendorSeverity",
    "PanOSURLDomain": "URLDomain",
    "request": "URL",
    "dvchost": "DeviceName",
}


def fields(line: Line) -> dict[str, Any] | None:
    """A record's fields under their JSON names, ``Zone`` among them; None where the line is none."""
    parsed = line.object
    if parsed is not None:
        ours = isinstance(parsed.get("LogType"), str) and ("TimeGenerated" in parsed or "LogTime" in parsed)
        return {**parsed, "Zone": "UTC"} if ours else None
    event = cef.parse(line.text) if "|Palo Alto Networks|" in line.text else None
    if event is None:
        return None
    said = {name: event.said[key] for key, name in _CEF_NAMES.items() if event.said.get(key)}
    # The service writes `TRAFFIC|end`, the template for a firewall of one's own `end|TRAFFIC`.
    kind, subtype = (event.name, event.id) if event.name in ("TRAFFIC", "THREAT") else (event.id, event.name)
    return {**said, "LogType": kind, "Subtype": subtype, "Zone": event.said.get("dtz", "")}


def time(said: dict[str, Any]) -> Time:
    """When it was: of a session all its life, of a threat the moment.

    Raises:
        BadTime: it does not say, or says something else.
    """
    zone = text_of(said, "Zone")
    generated = cef.time(text_of(said, "TimeGenerated"), zone, Semantics.PACKET)
    begun = text_of(said, "SessionStartTime")
    if said["LogType"].upper() != "TRAFFIC":
        return generated
    if not begun:  # written at the end, as far as anything says how long it took
        lasted = whole(said.get("SessionDuration"))
        return times.ending(generated, lasted) if lasted else generated
    begin = times.lasting(cef.time(begun, zone, Semantics.FLOW), said.get("SessionDuration"))
    return begin._replace(start_ns=min(begin.start_ns, generated.start_ns), end_ns=max(begin.end_ns, generated.end_ns))
