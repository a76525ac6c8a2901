"""What one record of a log says, whatever the log's format. Runs later, on any machine. Pure.

The names follow OCSF (Network Activity 4001, Detection Finding 2004) where they are given out: :func:`to_ocsf`.
"""

from __future__ import annotations

import ipaddress
import socket
from enum import StrEnum
from functools import lru_cache
from typing import Any, Final, NamedTuple


class Semantics(StrEnum):
    """What a record's time is the time of."""

    PACKET = "packet"
    """One packet, or one event in the kernel."""
    START = "start"
    """The begin of something that goes on."""
    END = "end"
    """The end of something that had begun before: how long before is not said."""
    FLOW = "flow"
    """Begin and end of one flow."""
    WINDOW = "window"
    """An aggregation window: traffic at any time within it."""
    INGEST = "ingest"
    """When the record was written or received: what it tells happened before."""


class Time(NamedTuple):
    """When something happened, as an interval: nobody's clock says more than its last digit.

    Args:
        start_ns: Unix nanoseconds, by the source's own clock.
        end_ns: the first nanosecond after it; at least one after ``start_ns``.
        semantics: what happened in it.
        zoned: whether the log says its time zone; else the times are civil time taken for UTC.
        dated: whether the log says the year; else the year is 1970 (or 1972, for a 29 February).
    """

    start_ns: int
    end_ns: int
    semantics: Semantics
    zoned: bool = True
    dated: bool = True


class Action(StrEnum):
    ALLOWED = "allowed"
    DENIED = "denied"
    UNKNOWN = ""


class Endpoint(NamedTuple):
    """One side of a flow. ``ip`` is canonical text; None is unknown."""

    ip: str | None = None
    port: int | None = None


NOBODY: Final = Endpoint()


class Process(NamedTuple):
    """Who did it, where the source can see processes. None and the empty text are unknown."""

    pid: int | None = None
    parent_pid: int | None = None
    exec_id: str = ""
    executable: str = ""
    command: str = ""
    container: str = ""
    user: str = ""


NO_PROCESS: Final = Process()


class Observation(NamedTuple):
    """One record.

    Args:
        time: by the source's clock.
        src: where the record says it came from; a sensor that saw an answer first may have both sides exchanged.
        translated_src: the source after NAT, where the record carries the map.
        rule: the rule that made the log write this record, or refused the flow. The rule by which an ordinary flow
            was let through is not one: every flow has that.
        signature: what was recognised (an IDS signature, an attack's name).
        host: name of the far side: domain, SNI, Host, queried name.
        node: whose log it is, where the record says so: host name, node name, instance id.
        within: bytes from the begin of the line to where this record stands, where a line or document holds several.
        part: the text that it is of there; empty: the whole line.
    """

    time: Time
    src: Endpoint = NOBODY
    dst: Endpoint = NOBODY
    translated_src: Endpoint = NOBODY
    translated_dst: Endpoint = NOBODY
    proto: str = ""
    action: Action = Action.UNKNOWN
    rule: str = ""
    signature: str = ""
    severity: str = ""
    host: str = ""
    node: str = ""
    process: Process = NO_PROCESS
    bytes_out: int | None = None
    bytes_in: int | None = None
    flow_id: str = ""
    within: int = 0
    part: str = ""

    @property
    def informational(self) -> bool:
        """Nobody objected: no rule, no signature, no denial."""
        return not self.rule and not self.signature and self.action is not Action.DENIED


@lru_cache(maxsize=65536)
def address(text: object) -> str | None:
    """The canonical text of an IP address; None for anything else (also ``-`` and the empty text)."""
    if not isinstance(text, str) or not text or text == "-":
        return None
    try:
        socket.inet_pton(socket.AF_INET, text)
    except (OSError, ValueError):
        return _rare_address(text)
    return text  # it takes canonical text alone, and says so in a fifth of the time


def _rare_address(text: str) -> str | None:
    bare, _, prefix = text.strip().strip("[]").partition("/")
    try:
        parsed = ipaddress.ip_address(bare.partition("%")[0])
        if prefix and parsed == ipaddress.ip_interface(f"{parsed}/{prefix}").network.network_address:
            return str(parsed) if int(prefix) == parsed.max_prefixlen else None  # a network, and no machine
    except ValueError:
        return None
    mapped = getattr(parsed, "ipv4_mapped", None)
    return str(mapped or parsed)


def port(value: object) -> int | None:
    """A port number; None for what is none. Ports also come as text and as floats."""
    number = value if type(value) is int else whole(value)
    return number if number is not None and 0 <= number <= 65535 else None


def whole(value: object) -> int | None:
    """An integer of 64 bits, however it was written; None for what is none."""
    if value is None or isinstance(value, bool):
        return None
    try:
        number = int(value) if isinstance(value, (str, int)) else int(float(value))  # type: ignore[arg-type]
    except (ValueError, TypeError, OverflowError):
        return None
    return number if -(1 << 63) <= number < 1 << 63 else None


def endpoint(ip: object, number: object = None) -> Endpoint:
    return NOBODY if ip is None and number is None else Endpoint(address(ip), port(number))


_PROTOCOLS: Final = {
    "1": "icmp",
    "6": "tcp",
    "17": "udp",
    "41": "ipv6",
    "47": "gre",
    "50": "esp",
    "58": "icmp6",
    "132": "sctp",
}


def protocol(value: object) -> str:
    """``tcp``, ``udp`` …, from a name in any case or an IANA number; an unknown number stays a number."""
    if value is None or value == "-":
        return ""
    return _protocol(str(value))


@lru_cache(maxsize=1024)
def _protocol(written: str) -> str:
    text = written.strip().lower().removesuffix(".0")
    return {"ipv6-icmp": "icmp6", "icmpv6": "icmp6"}.get(text) or _PROTOCOLS.get(text, text)


def without_port(host: str) -> str:
    """A host without the port that an HTTP header names beside it; an address in brackets without these."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0] if host.count(":") == 1 else host


def to_ocsf(seen: Observation) -> dict[str, Any]:
    """The record as an OCSF event: Network Activity, or a Detection Finding where a rule or signature spoke."""
    finding = bool(seen.rule or seen.signature)
    event: dict[str, Any] = {
        "class_uid": 2004 if finding else 4001,
        "time": seen.time.start_ns // 1_000_000,
        "start_time": seen.time.start_ns // 1_000_000,
        "end_time": seen.time.end_ns // 1_000_000,
        "disposition": {Action.ALLOWED: "Allowed", Action.DENIED: "Blocked", Action.UNKNOWN: "Unknown"}[seen.action],
        "src_endpoint": _ocsf_endpoint(seen.src),
        "dst_endpoint": _ocsf_endpoint(seen.dst) | ({"hostname": seen.host} if seen.host else {}),
        "connection_info": {"protocol_name": seen.proto or "unknown"},
    }
    if finding:
        event["finding_info"] = {"title": seen.signature or seen.rule, "uid": seen.rule or seen.signature}
    if seen.severity:
        event["severity"] = seen.severity
    if seen.node:
        event["device"] = {"hostname": seen.node}
    if seen.bytes_out is not None or seen.bytes_in is not None:
        event["traffic"] = {"bytes_out": seen.bytes_out, "bytes_in": seen.bytes_in}
    if seen.process is not NO_PROCESS:
        event["actor"] = {
            "process": {"pid": seen.process.pid, "cmd_line": seen.process.command, "uid": seen.process.exec_id}
        }
    return event


def _ocsf_endpoint(side: Endpoint) -> dict[str, Any]:
    return {key: value for key, value in (("ip", side.ip), ("port", side.port)) if value is not None}
