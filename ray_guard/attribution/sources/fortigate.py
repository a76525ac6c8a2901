"""FortiGate logs: ``key=value`` pairs, parted by spaces or commas, or the same as CEF. Runs later. Pure.

``eventtime`` is an epoch in seconds or (newer) nanoseconds and needs no zone; ``date`` and ``time`` are civil time, of
the zone in ``tz``. A traffic record is written at the session's end, after ``duration`` seconds, and
carries the NAT map.
"""

from __future__ import annotations

import re
from typing import Final

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
from ray_guard.attribution.sources import cef
from ray_guard.attribution.sources.line import Line, Unusable
from ray_guard.attribution.sources.pairs import Pairs

FORMAT: Final = "fortigate"

_KEY: Final = r"(?<![\w-])[A-Za-z_]\w*+"
#: with ``set csv enable`` a comma ends a value that is not quoted
_PAIR_CSV: Final = re.compile(r'(?<![\w-])([A-Za-z_]\w*)=("(?:[^"\\]|\\.)*"|[^,"]*)')
_CSV: Final = re.compile(r"\b(?:date|time|logid|type)=[^\s,]+,\w+=")
_DENIES: Final = frozenset(
    "deny denied block blocked dropped drop drop_session reset reset_client reset_server clear_session "
    "detected_blocked quarantine quarantined ban ban-ip exempt-block".split()
)
#: what CEF has names of its own for; FortiGate puts a prefix before the others
_CEF_NAMES: Final = {
    "src": "srcip",
    "spt": "srcport",
    "dst": "dstip",
    "dpt": "dstport",
    "act": "action",
    "out": "sentbyte",
    "in": "rcvdbyte",
    "externalId": "sessionid",
    "externalID": "sessionid",
    "sourceTranslatedAddress": "transip",
    "sourceTranslatedPort": "transport",
    "destinationTranslatedAddress": "tranip",
    "destinationTranslatedPort": "tranport",
    "dhost": "hostname",
    "dvchost": "devname",
    "deviceExternalId": "devid",
}
_CEF_PREFIXES: Final = ("FTNTFGT", "FortinetFortiGate", "ad.")
_OF_ITSELF: Final = frozenset({"event"})
_UNNAMED: Final = frozenset({"", "N/A", "unknown"})


class Fortigate:
    format = FORMAT

    def __init__(self) -> None:
        self._pairs = Pairs(_KEY, r'[^\s"]*+', quotes=True)

    def recognises(self, line: Line) -> bool:
        text = line.text
        if "|Fortinet|" in text:
            return cef.parse(text) is not None
        return "=" in text and ("devid=" in text or "logid=" in text or "eventtime=" in text) and "type=" in text

    def read(self, line: Line) -> list[Observation]:
        said = _cef(line.text)
        if said is None:
            said = self._said(line.text)
            if " srcip=" in line.text and "srcip" not in said:
                # A path's last backslash stands before the quote that ends it, and escapes nothing.
                said = self._said(line.text.replace('\\" ', '" '))
        if "type" not in said:
            raise Unusable("malformed", "no type= among the pairs")
        if "srcip" not in said and "dstip" not in said:
            if said["type"] not in _OF_ITSELF:
                raise Unusable("fields", f"a record of type {said['type']:.20} without srcip= and dstip=")
            return []
        return [_observation(said)]

    def _said(self, text: str) -> dict[str, str]:
        return _listed(text) or self._pairs.of(text)


def _listed(text: str) -> dict[str, str] | None:
    """The pairs where commas part them, else None; a key that comes twice has its last value."""
    if text.find(",", 0, 400) < 0 or not _CSV.search(text, 0, 400):
        return None
    found = _PAIR_CSV.findall(text)
    return {key: value[1:-1].replace('\\"', '"') if value[:1] == '"' else value.strip() for key, value in found}


def _cef(text: str) -> dict[str, str] | None:
    """The pairs under their FortiGate names; None where the line is no CEF."""
    event = cef.parse(text) if "|Fortinet|" in text else None
    if event is None:
        return None
    said: dict[str, str] = {}
    for key, value in event.said.items():
        prefix = next((each for each in _CEF_PREFIXES if key.startswith(each)), "")
        if prefix:  # hides nothing that CEF has a field for: `FTNTFGTcat` is a web category
            said.setdefault(key.removeprefix(prefix), value)
        else:
            said[_CEF_NAMES.get(key, key)] = value
    # `cat=traffic:forward`, `cat=traffic`; some releases say it in the event's name alone.
    said["type"] = (event.said.get("cat") or event.name).partition(":")[0].split(" ")[0]
    return said


def _observation(said: dict[str, str]) -> Observation:
    action = said.get("action", "") or said.get("utmaction", "")
    denied = action in _DENIES or said.get("utmaction") in _DENIES
    security = said.get("type") in ("utm", "anomaly")
    attack = said.get("attack") or said.get("virus") or ""
    host = said.get("hostname") or said.get("qname") or ""
    return Observation(
        _time(said),
        src=endpoint(said.get("srcip"), said.get("srcport")),
        dst=endpoint(said.get("dstip"), said.get("dstport")),
        translated_src=_translated(said.get("transip"), said.get("transport")),
        translated_dst=_translated(said.get("tranip"), said.get("tranport")),
        proto=protocol(said.get("proto")),
        action=Action.DENIED if denied else Action.ALLOWED if action else Action.UNKNOWN,
        rule=(said.get("policyid") or said.get("policyname") or "") if denied or security else "",
        signature=attack or (said.get("msg", "") if security else ""),
        severity=said.get("severity") or said.get("crlevel") or "",
        host="" if host in _UNNAMED else without_port(host),
        node=said.get("devname", ""),
        bytes_out=whole(said.get("sentbyte")),
        bytes_in=whole(said.get("rcvdbyte")),
        flow_id=said.get("sessionid", ""),
    )


def _translated(ip: str | None, port: str | None) -> Endpoint:
    found = endpoint(ip, port)
    return NOBODY if found.ip in (None, "0.0.0.0", "::") else found  # noqa: S104 - says: no NAT


def _time(said: dict[str, str]) -> Time:
    if said.get("eventtime"):
        written = times.epoch(said["eventtime"], Semantics.PACKET)
    elif "date" not in said and (begin := said.get("rt") or said.get("start")):
        written = cef.time(begin, said.get("tz", ""), Semantics.PACKET)
    else:
        zone = said.get("tz", "")
        written = times.iso(f"{said.get('date', '')} {said.get('time', '')}{zone}", Semantics.PACKET)
    duration = whole(said.get("duration"))
    return times.ending(written, duration) if said.get("type") == "traffic" and duration else written
