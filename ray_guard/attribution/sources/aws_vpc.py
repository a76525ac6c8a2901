"""AWS flow logs, of VPCs and Transit Gateways: parted by spaces below a header; or JSON, Parquet. Runs later.

Pure. Without a header the columns are those of version 2, followed, where a line has more, by those that later versions
added, in Amazon's own order.

One record sums up one direction of a flow over a window (``start`` to ``end``, up to ten minutes). Where a packet
passed an intermediate device, ``pkt-srcaddr`` and ``pkt-dstaddr`` are the flow's true ends and ``srcaddr`` the
interface's own address: they count where they are there.
"""

from __future__ import annotations

import re
from typing import Any, Final

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
#: what versions 3, 4, 5, 7 and 8 added
_LATER: Final = (
    "vpc-id subnet-id instance-id tcp-flags type pkt-srcaddr pkt-dstaddr region az-id sublocation-type sublocation-id "
    "pkt-src-aws-service pkt-dst-aws-service flow-direction traffic-path ecs-cluster-arn ecs-cluster-name "
    "ecs-container-instance-arn ecs-container-instance-id ecs-container-id ecs-second-container-id ecs-service-name "
    "ecs-task-definition-arn ecs-task-arn ecs-task-id reject-reason"
).split()
#: the order of a Transit Gateway's logs
_TRANSIT: Final = (
    "version resource-type account-id tgw-id tgw-attachment-id tgw-src-vpc-account-id tgw-dst-vpc-account-id "
    "tgw-src-vpc-id tgw-dst-vpc-id tgw-src-subnet-id tgw-dst-subnet-id tgw-src-eni tgw-dst-eni tgw-src-az-id "
    "tgw-dst-az-id tgw-pair-attachment-id srcaddr dstaddr srcport dstport protocol packets bytes start end log-status "
    "type packets-lost-no-route packets-lost-blackhole packets-lost-mtu-exceeded packets-lost-ttl-expired tcp-flags "
    "region flow-direction pkt-src-aws-service pkt-dst-aws-service"
).split()
_GATEWAY: Final = re.compile(r"\d+ (TransitGateway|-) (\d+|-) tgw-\S+( \S+){32}")
_RECORD: Final = re.compile(r"\d+( \S+){9} (\d+|-) (\d+|-) (ACCEPT|REJECT|-) (OK|NODATA|SKIPDATA)(?P<later>( \S+)*)")
#: CloudWatch's own time and stream before what was logged, as it exports and tails
_BEFORE: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?(?:Z|\+00:00) (?:[\w.-]*eni-\S+ )?")
_COLUMNS: Final = frozenset((*_DEFAULT, *_LATER, *_TRANSIT))
_COLUMN: Final = re.compile(r"[a-z][a-z0-9-]*")
#: of which a header has two: others of them are words too
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
        if line.object is not None:
            return bool(_by_name(line.object))
        text = _said(line.text)
        if _is_header(text):
            return True
        if self._headed and len(text.split(" ")) == len(self._columns):
            return True
        found = _RECORD.fullmatch(text)
        if found is None:
            return _GATEWAY.fullmatch(text) is not None
        return found is not None and found["later"].count(" ") <= len(_LATER)

    def read(self, line: Line) -> list[Observation]:
        if line.object is not None:
            return _records(_by_name(line.object))
        text = _said(line.text)
        if _is_header(text):
            self._columns, self._headed = text.replace("_", "-").lower().split(), True
            return []
        fields = text.split()
        columns = self._columns
        if len(fields) != len(columns) and _RECORD.fullmatch(text):  # what stands here has no header of its own
            columns = (_DEFAULT + _LATER)[: len(fields)]
        elif len(fields) != len(columns) and _GATEWAY.fullmatch(text):
            columns = _TRANSIT
        if len(fields) != len(columns):
            raise Unusable("fields", f"{len(fields)} fields where the header names {len(columns)}")
        return _records(dict(zip(columns, fields, strict=True)))


def _said(text: str) -> str:
    before = _BEFORE.match(text) if text[4:5] == "-" else None
    return text if before is None else text[before.end() :]


def _by_name(parsed: dict[str, Any]) -> dict[str, str]:
    """The row in a JSON object, whose names have underscores; empty where it is none."""
    row = {key.replace("_", "-"): str(value) for key, value in parsed.items() if isinstance(value, (str, int, float))}
    return row if {"srcaddr", "dstaddr", "start", "end"} <= row.keys() else {}


def _records(row: dict[str, str]) -> list[Observation]:
    status = row.get("log-status", "OK")
    if status == "SKIPDATA" and address(row.get("srcaddr")) is None:
        raise Unusable("fields", f"Amazon left out records between {row.get('start')} and {row.get('end')}")
    if status == "NODATA":
        return []
    return [_observation(row)]


def _is_header(text: str) -> bool:
    words = text.replace("_", "-").lower().split()
    return (
        len(words) > 2
        and sum(word in _NAMES for word in words) >= 2
        and 2 * sum(word in _COLUMNS for word in words) >= len(words)
        and all(map(_COLUMN.fullmatch, words))
    )


def _observation(row: dict[str, str]) -> Observation:
    if "start" not in row or "end" not in row:
        raise Unusable("fields", "no start and end among the columns")
    sender = endpoint(row.get("srcaddr"), _number(row.get("srcport")))
    src = _true_end(row.get("pkt-srcaddr"), sender)
    dst = _true_end(row.get("pkt-dstaddr"), endpoint(row.get("dstaddr"), _number(row.get("dstport"))))
    action = _ACTIONS.get(row.get("action", ""), Action.UNKNOWN)
    return Observation(
        times.between(row["start"], row["end"], Semantics.WINDOW),
        src=src,
        dst=dst,
        translated_src=sender if sender != src else NOBODY,
        proto=protocol(row.get("protocol")),
        action=action,
        node="" if row.get("instance-id") == "-" else row.get("instance-id", ""),
        bytes_out=whole(_number(row.get("bytes"))),  # of this direction, on whichever side of the interface
    )


def _number(written: str | None) -> str | None:
    """Athena and Firehose write whole numbers as ``443.0``."""
    return None if written is None else written.removesuffix(".0")


def _true_end(packet_address: str | None, interface: Endpoint) -> Endpoint:
    true = address(packet_address)
    return interface if true is None else interface._replace(ip=true)
