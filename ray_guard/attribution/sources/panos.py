"""PAN-OS TRAFFIC and THREAT logs: CSV by position, often behind a syslog header. Runs later. Pure.

Times are the firewall's civil time without zone; newer versions add one field with zone, which tells it. A TRAFFIC
record is written at the session's end and says its begin and how long it took; it carries the NAT map.
"""

from __future__ import annotations

import csv
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
)
from ray_guard.attribution.sources.line import Line, Unusable

FORMAT: Final = "panos"

_BEGIN: Final = re.compile(
    r"(?:^|[\s>:])(\d*,\d{4}/\d\d/\d\d \d\d:\d\d:\d\d,[^,]*,(?:TRAFFIC|THREAT|[A-Z-]{3,20}),.*)$"
)
_ZONED: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?(Z|[+-]\d\d:\d\d)")
_DENIES: Final = frozenset(
    "deny drop drop-all-packets drop-icmp drop-packet reset-client reset-server reset-both block-ip block-url block "
    "block-continue sinkhole random-drop".split()
)


class Panos:
    format = FORMAT

    def recognises(self, line: Line) -> bool:
        return "," in line.text and _BEGIN.search(line.text) is not None

    def read(self, line: Line) -> list[Observation]:
        found = _BEGIN.search(line.text)
        if found is None:
            raise Unusable("malformed", "no time, serial number and type of a PAN-OS record")
        fields = next(csv.reader([found[1]]))
        if fields[3] not in ("TRAFFIC", "THREAT"):
            return []  # configuration, system, user-id …: not about traffic
        if len(fields) < 37:
            raise Unusable("fields", f"{fields[3]} record of {len(fields)} fields")
        return [_observation(fields)]


def _observation(fields: list[str]) -> Observation:
    traffic = fields[3] == "TRAFFIC"
    denied = fields[30] in _DENIES or (traffic and fields[4] in ("deny", "drop"))
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
        host="" if traffic else fields[31].partition("/")[0].partition(":")[0] if fields[4] == "url" else "",
        bytes_out=whole(fields[32]) if traffic else None,
        bytes_in=whole(fields[33]) if traffic else None,
        flow_id=fields[22],
    )


def _translated(after: Endpoint, before: Endpoint) -> Endpoint:
    return NOBODY if after.ip in (None, "0.0.0.0", "::") or after == before else after  # noqa: S104 - says: no NAT


def _time(fields: list[str], traffic: bool) -> Time:  # noqa: FBT001
    zone = next((match[1] for field in fields[37:] if (match := _ZONED.fullmatch(field))), "")
    generated = times.iso(fields[6] + zone, Semantics.PACKET)
    if traffic and fields[35]:
        begin = times.iso(fields[35] + zone, Semantics.FLOW)
        ended = times.lasting(begin, fields[36])
        return ended._replace(end_ns=max(ended.end_ns, generated.end_ns)) if fields[4] == "end" else ended
    return generated
