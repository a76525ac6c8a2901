"""Netfilter's LOG target (nftables, iptables): what the kernel writes to syslog, or ulogd2 in its place.

Runs later. Pure. A classic syslog line says neither year nor zone, and the kernel's uptime in brackets may be absent;
``dmesg -T``, OpenWrt's ``logread`` and the journal's outputs each have a header of their own; out of the journal's JSON
(or Filebeat's) the line has none, the time stands around it. The prefix is the rule, may say anything, and nothing need
part it from what follows; whether the packet was let through stands nowhere but in what people call it. An ICMP error
quotes, in brackets, the packet it is about: that one's addresses are not this one's. ulogd2's records of connections
(NFCT as JSON) are flows, with their translation.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, Final

from ray_guard.attribution import conntrack, times
from ray_guard.attribution.observation import (
    NO_PROCESS,
    NOBODY,
    Action,
    Observation,
    Process,
    Semantics,
    Time,
    endpoint,
    protocol,
    whole,
)
from ray_guard.attribution.sources import header
from ray_guard.attribution.sources.line import Line, Unusable, text_of
from ray_guard.attribution.sources.pairs import Pairs
from ray_guard.attribution.times import BadTime

FORMAT: Final = "nftables"

_LONGEST: Final = 1 << 14
"""Bytes: the kernel writes less than two thousand."""
#: an interface's name has at most 15 characters
_PACKET: Final = re.compile(r"IN=(?<!PHYSIN=)\S{0,32} (?:PHYSIN=\S{0,32} )?OUT=\S{0,32} ")
_SRC: Final = re.compile(r"SRC=(?<!\wSRC=)")
_QUOTED: Final = re.compile(r"\[SRC=.*?(?:\]|$)")
_KEY: Final = r"\b[A-Z]{2,8}"
_SIDES: Final = (("sport", "src"), ("dport", "dest"))
_FLOW: Final = "] ORIG: SRC="
"""What ulogd2's PRINTFLOW writes before a connection's first tuple."""
_PRINTED: Final = re.compile(r"(?:^|,)(timestamp|[a-z0-9]+(?:\.[a-z0-9_]+)+)=")
_FEW: Final = 8
"""Keys that GPRINT's line of any packet or connection has, and more."""
#: an address that IP2STR put into text stands behind the same that GPRINT itself did
_JSON_NAMES: Final = {
    "ip.saddr": "src_ip",
    "ip.daddr": "dest_ip",
    "orig.ip.saddr": "src_ip",
    "orig.ip.daddr": "dest_ip",
    "reply.ip.saddr": "reply.ip.saddr.str",
    "reply.ip.daddr": "reply.ip.daddr.str",
    "ip.saddr.str": "src_ip",
    "ip.daddr.str": "dest_ip",
    "orig.ip.saddr.str": "src_ip",
    "orig.ip.daddr.str": "dest_ip",
    **{f"{layer}.{side}": f"{name}_port" for layer in ("tcp", "udp", "sctp", "orig.l4") for side, name in _SIDES},
}
_UPTIME: Final = re.compile(r"\[ *\d+\.\d+\] ?")
#: what VyOS and Ubiquiti write after a rule's name: accepted, dropped, rejected
_VERDICT: Final = re.compile(r"-([ADR])\]$")
_DENIED: Final = re.compile(r"drop|deny|denied|den(?:y|ied)|reject|block|refus|forbid", re.IGNORECASE)
_LABELS: Final = {"allowed": Action.ALLOWED, "blocked": Action.DENIED}
_ALLOWED: Final = re.compile(r"accept|allow|permit|pass", re.IGNORECASE)


class Nftables:
    format = FORMAT

    def __init__(self) -> None:
        self._pairs = Pairs(_KEY, r"\S*+", first=True)  # LEN comes twice, of IP and UDP

    def recognises(self, line: Line) -> bool:
        parsed = line.object
        if parsed is not None:
            return "oob.prefix" in parsed or parsed.get("dvc") == "Netfilter" or "reply.ip.daddr.str" in parsed
        text = line.text
        if len(line.raw) > _LONGEST:
            return False
        if "SRC=" in text:
            return _packet_in(text) is not None or _FLOW in text
        return "ip.protocol=" in text and _printed(text) is not None

    def read(self, line: Line) -> list[Observation]:
        if line.object is not None and self.recognises(line):
            return [_connection(line.object) if "reply.ip.daddr.str" in line.object else _ulogd(line.object)]
        text = line.text
        begin = _packet_in(text)
        if begin is None:
            if _FLOW in text:
                time, node, _ = header.taken(text[: text.index("[")])
                return [_flow(conntrack.event(line)._replace(at=time), node)]
            if (printed := _printed(text)) is not None:
                return [_connection(printed) if "reply.ip.daddr.str" in printed else _ulogd(printed)]
            raise Unusable("malformed", "no IN= OUT= SRC= of a logged packet")
        fields = text[begin:]
        if "[SRC=" in fields:
            fields = _QUOTED.sub("", fields)
        said = self._pairs.of(fields)
        before = text[:begin]
        try:
            time, node, prefix = header.taken(before)
        except BadTime:
            if line.envelope is None:
                raise
            time, prefix = _journal(line.envelope), before
            node = text_of(line.envelope, "_HOSTNAME") or text_of(line.envelope, "host", "hostname")
        prefix = _UPTIME.sub("", prefix, count=1).strip(" :\ufeff")
        if text[2:3] == "/" and not prefix:
            prefix = "drop"  # Suricata's drop.log
        return [_packet(time, node, prefix, said)]


@lru_cache(maxsize=1)  # asked twice for each line
def _packet_in(text: str) -> int | None:
    """Where the packet begins: a prefix before it may look like one."""
    ends = [found.start() for found in _SRC.finditer(text)]
    begins = [found.start() for found in _PACKET.finditer(text, 0, ends[-1] if ends else 0)]
    return begins[-1] if begins else None


def _journal(envelope: dict[str, Any]) -> Time:
    """journald's own microseconds, or what a shipper made of them."""
    for key in ("_SOURCE_REALTIME_TIMESTAMP", "__REALTIME_TIMESTAMP"):
        if key in envelope:
            return times.epoch(envelope[key], Semantics.PACKET)
    written = next((envelope[key] for key in ("@timestamp", "timestamp", "time") if key in envelope), None)
    return times.iso(written, Semantics.INGEST)


def _packet(time: Time, node: str, prefix: str, said: dict[str, str]) -> Observation:
    return Observation(
        time,
        src=endpoint(said.get("SRC"), said.get("SPT")),
        dst=endpoint(said.get("DST"), said.get("DPT")),
        proto=protocol(said.get("PROTO")),
        action=_action(prefix),
        rule="" if prefix.startswith("TRACE:") else prefix,
        node=node,
        process=Process(user=said["UID"]) if "UID" in said else NO_PROCESS,
        bytes_out=whole(said.get("LEN")),
    )


def _connection(parsed: dict[str, Any]) -> Observation:
    """A connection as NFCT records it: what it was translated to is the mirror of what the answers come back to."""
    return _flow(conntrack.of_ulogd(parsed), _device(parsed))._replace(
        bytes_out=whole(parsed.get("orig.raw.pktlen")),
        bytes_in=whole(parsed.get("reply.raw.pktlen")),
        flow_id=text_of(parsed, "ct.id"),
    )


def _flow(seen: conntrack.Event, node: str) -> Observation:
    if seen.at is None:
        raise BadTime("a connection without timestamp or flow.end.sec")
    time = seen.at if seen.began is None else seen.at._replace(start_ns=min(seen.began.start_ns, seen.at.start_ns))
    return Observation(
        time._replace(semantics=Semantics.FLOW),
        src=seen.inside,
        dst=seen.peer,
        translated_src=NOBODY if seen.outside == seen.inside else seen.outside,
        translated_dst=NOBODY if seen.far == seen.peer else seen.far,
        proto=seen.proto,
        node=node,
    )


def _printed(text: str) -> dict[str, Any] | None:
    """What ulogd2's GPRINT wrote, as its JSON would have it; None where it did not."""
    keys = list(_PRINTED.finditer(text))
    if not keys or keys[0].start() or len(keys) < _FEW:
        return None
    ends = [*(key.start() for key in keys[1:]), len(text)]
    said = {key[1]: text[key.end() : end] for key, end in zip(keys, ends, strict=True)}
    found: dict[str, Any] = {_JSON_NAMES.get(key, key): value for key, value in said.items()}
    found["timestamp"] = said.get("timestamp", "").replace("-", " ")
    return found


def _device(parsed: dict[str, Any]) -> str:
    """Who wrote it, unless ulogd was not told."""
    return text_of(parsed, "hostname") or text_of(parsed, "dvc").removeprefix("Netfilter")


def _ulogd(parsed: dict[str, Any]) -> Observation:
    prefix = text_of(parsed, "oob.prefix").strip(" :")
    # What a group's label says: with `boolean_label` ulogd calls 1 allowed, anything else blocked.
    label = _LABELS.get(text_of(parsed, "action"))
    # The packet's own time, which is of no zone, where the other is the machine's.
    time = conntrack.moment(parsed, "oob.time") or times.iso(parsed.get("timestamp"), Semantics.PACKET)
    return Observation(
        time._replace(semantics=Semantics.PACKET),
        src=endpoint(parsed.get("src_ip"), parsed.get("src_port")),
        dst=endpoint(parsed.get("dest_ip"), parsed.get("dest_port")),
        proto=protocol(parsed.get("ip.protocol", parsed.get("ip6.nexthdr"))),
        action=_action(prefix) if label is None else label,
        rule=prefix,
        node=_device(parsed),
        bytes_out=whole(parsed.get("ip.totlen")),
    )


@lru_cache(maxsize=1024)
def _action(prefix: str) -> Action:
    verdict = _VERDICT.search(prefix)
    if _DENIED.search(prefix) or (verdict and verdict[1] in "DR"):
        return Action.DENIED
    return Action.ALLOWED if verdict or _ALLOWED.search(prefix) else Action.UNKNOWN
