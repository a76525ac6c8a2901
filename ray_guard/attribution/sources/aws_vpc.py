"""AWS VPC flow logs, versions 2 to 5: fields parted by spaces; a header names the columns. Runs later. Pure.

One record sums up one direction of a flow over a window (``start`` to ``end``, up to ten minutes). Where a packet
passed an intermediate device, ``pkt-srcaddr`` and ``pkt-dstaddr`` are the flow's true ends and ``srcaddr`` the
interface's own address: they count where they are there.
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
    address,
    endpoint,
    protocol,
    whole,
)
from ray_guard.attribution.sources.line import Line, Unusable

FORMAT: Final = "aws-vpc"

_DEFAULT: Final = (
    "version account-id interface-id srcaddr dstaddr srcport dstport protocol packets bytes start end action log-status"
).split()
_ACTIONS: Final = {"ACCEPT": Action.ALLOWED, "REJECT": Action.DENIED}
_RECORD: Final = re.compile(r"\d+ \S+ \S+ \S+ \S+ \S+ \S+ \S+ \S+ \S+ \S+ \S+ \S+ (OK|NODATA|SKIPDATA)")
_NAMES: Final = frozenset(
    {"srcaddr", "dstaddr", "start", "interface-id", "log-status", "pkt-srcaddr", "flow-direction"}
)


class AwsVpc:
    """Remembers the header: the columns may come in any order."""

    format = FORMAT

    def __init__(self) -> None:
        self._columns = list(_DEFAULT)
        self._headed = False

    def recognises(self, line: Line) -> bool:
        text = line.text
        if _is_header(text):
            return True
        fields = text.split(" ")
        if self._headed:
            return len(fields) == len(self._columns)
        return _RECORD.fullmatch(text) is not None

    def read(self, line: Line) -> list[Observation]:
        text = line.text
        if _is_header(text):
            self._columns, self._headed = text.replace("_", "-").lower().split(), True
            return []
        fields = text.split()
        if len(fields) != len(self._columns):
            raise Unusable("fields", f"{len(fields)} fields where the header names {len(self._columns)}")
        row = dict(zip(self._columns, fields, strict=True))
        if row.get("log-status", "OK") in ("NODATA", "SKIPDATA"):
            return []
        return [_observation(row)]


def _is_header(text: str) -> bool:
    words = text.replace("_", "-").lower().split()
    return len(words) > 2 and sum(word in _NAMES for word in words) >= 2


def _observation(row: dict[str, str]) -> Observation:
    if "start" not in row or "end" not in row:
        raise Unusable("fields", "no start and end among the columns")
    interface = endpoint(row.get("srcaddr"), row.get("srcport")), endpoint(row.get("dstaddr"), row.get("dstport"))
    src = _true_end(row.get("pkt-srcaddr"), interface[0])
    dst = _true_end(row.get("pkt-dstaddr"), interface[1])
    action = _ACTIONS.get(row.get("action", ""), Action.UNKNOWN)
    count = whole(row.get("bytes"))
    ingress = row.get("flow-direction") == "ingress"
    return Observation(
        times.between(row["start"], row["end"], Semantics.WINDOW),
        src=src,
        dst=dst,
        translated_src=interface[0] if interface[0] != src else NOBODY,
        proto=protocol(row.get("protocol")),
        action=action,
        node="" if row.get("instance-id") == "-" else row.get("instance-id", ""),
        bytes_out=None if ingress else count,
        bytes_in=count if ingress else None,
    )


def _true_end(packet_address: str | None, interface: Endpoint) -> Endpoint:
    true = address(packet_address)
    return interface if true is None else interface._replace(ip=true)
