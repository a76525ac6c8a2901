"""PAN-OS TRAFFIC and THREAT logs: CSV by position, often behind a syslog header; or by name. Runs later. Pure.

Times are the firewall's civil time without zone; newer versions add one field with zone, which tells it. A TRAFFIC
record is written at the session's end and says its begin and how long it took; it carries the NAT map. What Palo Alto's
log forwarding makes of it is read by :mod:`~ray_guard.attribution.sources.panos_cloud`.
"""

from __future__ import annotations

import csv
import re
from contextlib import suppress
from functools import lru_cache
from typing import Any, Final

from ray_guard.attribution import times
from ray_guard.attribution.observation import (
    NOBODY,
    Action,
    Endpoint,
    Observation,
    Semantics,
    Time,
    endpoint,
    protocol,
    whole,
    without_port,
)
from ray_guard.attribution.sources import panos_cloud
from ray_guard.attribution.sources.line import Line, Unusable, text_of

FORMAT: Final = "panos"

_BEGIN: Final = re.compile(
    r"(?:^|[\s>:])(\d*,\d{4}/\d\d/\d\d \d\d:\d\d:\d\d,[^,]*,(?:TRAFFIC|THREAT|[A-Z-]{3,20}),.*)$"
)
_PRECISE: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?(Z|[+-]\d\d:\d\d)")
_DENIES: Final = frozenset(
    "deny drop drop-all drop-all-packets drop-icmp drop-packet reset-client reset-server reset-both block-ip block-url "
    "block block-continue sinkhole random-drop".split()
)
#: of the firewall itself, or said of a flow beside its TRAFFIC record
_OTHERS: Final = frozenset(
    "CONFIG SYSTEM AUDIT ALARM USERID HIPMATCH HIP-MATCH IPTAG IP-TAG GLOBALPROTECT AUTHENTICATION AUTH CORRELATION "
    "DECRYPTION TUNNEL SCTP GTP URL DATA FILE WILDFIRE DNS DNSSECURITY DNS-SECURITY EXTPCAP".split()
)
#: why a session ended that a rule had let begin
_CUT_SHORT: Final = (["policy-deny"], ["threat"])
_DOMAIN: Final = re.compile(r"(?:[\w-]+\.)+[A-Za-z][\w-]*\.?")
_LATE: Final = 60 * times.SECOND
"""How much later than it was generated a record may have reached the part of the firewall that stamps it precisely."""


class Panos:
    format = FORMAT

    def recognises(self, line: Line) -> bool:
        if panos_cloud.fields(line) is not None:
            return True
        return line.object is None and "," in line.text and _record(line.text) is not None

    def read(self, line: Line) -> list[Observation]:
        named = panos_cloud.fields(line)
        if named is not None:
            return [_named(named)] if _is_of_a_flow(named["LogType"].upper()) else []
        found = _record(line.text)
        if found is None:
            raise Unusable("malformed", "no time, serial number and type of a PAN-OS record")
        try:
            fields = next(csv.reader([found]))
        except csv.Error as error:
            raise Unusable("malformed", str(error)) from error
        if not _is_of_a_flow(fields[3]):
            return []
        if len(fields) < 37:
            raise Unusable("fields", f"{fields[3]} record of {len(fields)} fields")
        return [_observation(fields)]


@lru_cache(maxsize=1)  # asked twice for each line
def _record(text: str) -> str | None:
    """The record behind whatever header."""
    found = _BEGIN.search(text)
    return None if found is None else found[1]


def _is_of_a_flow(kind: str) -> bool:
    """Raises Unusable for what is no kind of record."""
    if kind in ("TRAFFIC", "THREAT"):
        return True
    if kind not in _OTHERS:
        raise Unusable("fields", f"a record of type {kind!r:.30}")
    return False


def _observation(fields: list[str]) -> Observation:
    traffic = fields[3] == "TRAFFIC"
    denied = fields[30] in _DENIES or (traffic and (fields[4] in ("deny", "drop") or fields[46:47] in _CUT_SHORT))
    src, dst = endpoint(fields[7], fields[24]), endpoint(fields[8], fields[25])
    return Observation(
        _time(fields, traffic),
        src=src,
        dst=dst,
        translated_src=_translated(endpoint(fields[9], fields[26]), src),
        translated_dst=_translated(endpoint(fields[10], fields[27]), dst),
        proto=protocol(fields[29]),
        action=Action.DENIED if denied else Action.ALLOWED,
        rule=fields[11] if denied or not traffic else "",
        signature="" if traffic else fields[32],
        severity="" if traffic else fields[34],
        host="" if traffic else _named_host(fields[4], fields[31]),
        bytes_out=whole(fields[32]) if traffic else None,
        bytes_in=whole(fields[33]) if traffic else None,
        flow_id=fields[22],
    )


def _named(said: dict[str, Any]) -> Observation:
    traffic = said["LogType"].upper() == "TRAFFIC"
    subtype = text_of(said, "Subtype").lower()
    denied = text_of(said, "Action").lower() in _DENIES or (
        traffic and (subtype in ("deny", "drop") or [text_of(said, "SessionEndReason")] in _CUT_SHORT)
    )
    src = endpoint(said.get("SourceAddress"), said.get("SourcePort"))
    dst = endpoint(said.get("DestinationAddress"), said.get("DestinationPort"))
    return Observation(
        panos_cloud.time(said),
        src=src,
        dst=dst,
        translated_src=_translated(endpoint(said.get("NATSource"), said.get("NATSourcePort")), src),
        translated_dst=_translated(endpoint(said.get("NATDestination"), said.get("NATDestinationPort")), dst),
        proto=protocol(said.get("Protocol")),
        action=Action.DENIED if denied else Action.ALLOWED,
        rule=text_of(said, "Rule") if denied or not traffic else "",
        signature="" if traffic else text_of(said, "ThreatID") or text_of(said, "ThreatName"),
        severity="" if traffic else text_of(said, "VendorSeverity"),
        host="" if traffic else _named_host(subtype, text_of(said, "URLDomain") or text_of(said, "URL")),
        node=text_of(said, "DeviceName"),
        bytes_out=whole(said.get("BytesSent")) if traffic else None,
        bytes_in=whole(said.get("BytesReceived")) if traffic else None,
        flow_id=text_of(said, "SessionID"),
    )


def _named_host(subtype: str, said: str) -> str:
    """The far side's name: in a URL, or (a query that was recognised) by itself; else that field names a file."""
    if subtype == "url":
        return without_port(said.partition("://")[2 if "://" in said else 0].partition("/")[0])
    return said if subtype in ("spyware", "dns") and _DOMAIN.fullmatch(said) else ""


def _translated(after: Endpoint, before: Endpoint) -> Endpoint:
    # All zeros says: no NAT. Some releases count on from there (0.0.0.157).
    return NOBODY if after.ip is None or after.ip.startswith("0.") or after.ip == "::" or after == before else after


def _time(fields: list[str], traffic: bool) -> Time:  # noqa: FBT001
    zone, written = "", None
    for field in fields[37:]:
        if field[10:11] == "T" and (match := _PRECISE.fullmatch(field)):
            zone = match[1]
            with suppress(times.BadTime):  # 1969 stands for unset, and its zone is true all the same
                written = times.iso(field, Semantics.PACKET)
            break
    generated = times.iso(fields[6] + zone, Semantics.PACKET)
    if written is not None and 0 <= written.start_ns - generated.start_ns < _LATE:
        # The seconds were cut off, or the clock was read before the record was made: both times are true.
        generated = generated._replace(end_ns=max(generated.end_ns, written.end_ns))
    if not traffic:
        return generated
    try:
        begin = times.lasting(times.iso(fields[35] + zone, Semantics.FLOW), fields[36])
    except times.BadTime:  # left out, or a custom layout: the record itself has a time all the same
        return generated._replace(semantics=Semantics.END)
    return begin._replace(end_ns=max(begin.end_ns, generated.end_ns)) if fields[4] == "end" else begin
