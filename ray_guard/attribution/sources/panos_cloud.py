"""PAN-OS records by name: as Palo Alto's log forwarding (Strata Logging Service, Cortex Data Lake) hands them on, or
as a firewall's own template for a collector writes them: JSON, CEF, LEEF.

Runs later. Pure. The fields are those of the firewall's own CSV, by name instead of by position. JSON times are UTC and
say so; CEF says its zone in ``dtz``; LEEF has one moment twice, with and without. Only records of traffic and of
threats are about flows.
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


#: of the templates for LEEF, the firewall's own and the service's
_LEEF_NAMES: Final = {
    "src": "SourceAddress",
    "dst": "DestinationAddress",
    "srcPort": "SourcePort",
    "dstPort": "DestinationPort",
    "srcPostNAT": "NATSource",
    "dstPostNAT": "NATDestination",
    "srcPostNATPort": "NATSourcePort",
    "dstPostNATPort": "NATDestinationPort",
    "proto": "Protocol",
    "action": "Action",
    "Action": "Action",
    "srcBytes": "BytesSent",
    "dstBytes": "BytesReceived",
    "RuleName": "Rule",
    "Rule": "Rule",
    "SessionID": "SessionID",
    "ElapsedTime": "SessionDuration",
    "StartTime": "SessionStartTime",
    "SessionEndReason": "SessionEndReason",
    "ReceiveTime": "TimeGenerated",
    "TimeReceived": "TimeGenerated",
    "TimeGenerated": "TimeGenerated",
    "cat": "LogType",
    "Type": "LogType",
    "Subtype": "Subtype",
    "SubType": "Subtype",
    "Severity": "VendorSeverity",
    "VendorSeverity": "VendorSeverity",
    "Miscellaneous": "URL",
    "DeviceName": "DeviceName",
}
_TWICE_A_ZONE_S: Final = 900
"""Zones are whole quarters of an hour apart."""


def fields(line: Line) -> dict[str, Any] | None:
    """A record's fields under their JSON names, ``Zone`` among them; None where the line is none."""
    parsed = line.object
    if parsed is not None:
        ours = isinstance(parsed.get("LogType"), str) and ("TimeGenerated" in parsed or "LogTime" in parsed)
        return {**parsed, "Zone": "UTC"} if ours else None
    event = cef.parse(line.text) if "|Palo Alto Networks|" in line.text else None
    if event is None:
        event = cef.leef(line.text)
        return None if event is None else _of_leef(event)
    said = {name: event.said[key] for key, name in _CEF_NAMES.items() if event.said.get(key)}
    # The service writes `TRAFFIC|end`, the template for a firewall of one's own `end|TRAFFIC`.
    kind, subtype = (event.name, event.id) if event.name in ("TRAFFIC", "THREAT") else (event.id, event.name)
    return {**said, "LogType": kind, "Subtype": subtype, "Zone": event.said.get("dtz", "")}


def _of_leef(event: cef.Event) -> dict[str, Any] | None:
    said: dict[str, Any] = {
        name: event.said[key] for key, name in _LEEF_NAMES.items() if event.said.get(key) not in (None, "")
    }
    if "LogType" not in said or "TimeGenerated" not in said:
        return None
    return {**said, "ThreatID": event.id, "Zone": _leef_zone(said["TimeGenerated"], event.said.get("devTime", ""))}


def _leef_zone(civil: str, device: str) -> str:
    """The zone of a time, which is given once more as GMT; empty where it is not."""
    stamp, _, zone = device.rpartition(" ")
    if zone not in ("GMT", "UTC"):
        return ""
    try:
        apart = times.iso(civil, Semantics.PACKET).start_ns - cef.time(stamp, "UTC", Semantics.PACKET).start_ns
    except times.BadTime:
        return ""
    quarters = round(apart / times.SECOND / _TWICE_A_ZONE_S)
    hours, left = divmod(abs(quarters), 4)
    return f"{'-' if quarters < 0 else '+'}{hours:02}{15 * left:02}" if hours <= 14 else ""


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
