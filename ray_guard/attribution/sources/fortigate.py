"""FortiGate logs: ``key=value`` pairs, values in quotes where they need them. Runs later. Pure.

``eventtime`` is an epoch in seconds or (newer) nanoseconds and needs no zone; ``date`` and ``time`` are civil time, of
the zone in ``tz``. A traffic record is written at the session's end, after ``duration`` seconds, and
carries the NAT map.
"""

from __future__ import annotations

import re
from typing import Final

from ray_guard.attribution import times
from ray_guard.attribution.observation import NOBODY, Action, Observation, Semantics, Time, endpoint, protocol, whole
from ray_guard.attribution.sources.line import Line, Unusable

FORMAT: Final = "fortigate"

_PAIR: Final = re.compile(r'([A-Za-z_][\w-]*)=("(?:[^"\\]|\\.)*"|[^\s"]*)')
_DENIES: Final = frozenset(
    "deny denied block blocked dropped drop reset ip-conn clear_session detected_blocked".split()
)
_UNNAMED: Final = frozenset({"", "N/A", "unknown"})


class Fortigate:
    format = FORMAT

    def recognises(self, line: Line) -> bool:
        text = line.text
        return "=" in text and ("devid=" in text or "logid=" in text or "eventtime=" in text) and "type=" in text

    def read(self, line: Line) -> list[Observation]:
        said = pairs(line.text)
        if "type" not in said:
            raise Unusable("malformed", "no type= among the pairs")
        if "srcip" not in said and "dstip" not in said:
            return []  # of the device itself
        return [_observation(said)]


def pairs(text: str) -> dict[str, str]:
    """``key=value`` and ``key="value"``; a key that comes twice has its last value."""
    return {key: value[1:-1].replace('\\"', '"') if value[:1] == '"' else value for key, value in _PAIR.findall(text)}


def _observation(said: dict[str, str]) -> Observation:
    action = said.get("action", "") or said.get("utmaction", "")
    denied = action in _DENIES or said.get("utmaction") in ("block", "blocked")
    security = said.get("type") in ("utm", "anomaly")
    attack = said.get("attack") or said.get("virus") or ""
    translated = endpoint(said.get("transip"), said.get("transport"))
    return Observation(
        _time(said),
        src=endpoint(said.get("srcip"), said.get("srcport")),
        dst=endpoint(said.get("dstip"), said.get("dstport")),
        translated_src=translated if translated.ip not in (None, "0.0.0.0") else NOBODY,  # noqa: S104 - says: no NAT
        translated_dst=endpoint(said.get("tranip"), said.get("tranport")),
        proto=protocol(said.get("proto")),
        action=Action.DENIED if denied else Action.ALLOWED if action else Action.UNKNOWN,
        rule=(said.get("policyid") or said.get("policyname") or "") if denied or security else "",
        signature=attack or (said.get("msg", "") if security else ""),
        severity=said.get("severity") or said.get("crlevel") or "",
        host="" if said.get("hostname", "") in _UNNAMED else said["hostname"],
        node=said.get("devname", ""),
        bytes_out=whole(said.get("sentbyte")),
        bytes_in=whole(said.get("rcvdbyte")),
        flow_id=said.get("sessionid", ""),
    )


def _time(said: dict[str, str]) -> Time:
    if said.get("eventtime"):
        written = times.epoch(said["eventtime"], Semantics.PACKET)
    else:
        zone = said.get("tz", "")
        written = times.iso(f"{said.get('date', '')} {said.get('time', '')}{zone}", Semantics.PACKET)
    duration = whole(said.get("duration"))
    if said.get("type") == "traffic" and duration:
        return written._replace(start_ns=written.start_ns - duration * times.SECOND, semantics=Semantics.FLOW)
    return written
