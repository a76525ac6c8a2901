"""Netfilter's LOG target (nftables, iptables): what the kernel writes to syslog, or ulogd2 in its place.

Runs later. Pure. A classic syslog line says neither year nor zone, and the kernel's uptime in brackets may be absent;
out of the journal (``journalctl -o json``, Filebeat) the line has no header, the time stands around it. The prefix is
the rule, and nothing need part it from what follows; whether the packet was let through stands nowhere but in what
people call it. An ICMP error quotes, in brackets, the packet it is about: that one's addresses are not this one's.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, Final

from ray_guard.attribution import times
from ray_guard.attribution.observation import (
    NO_PROCESS,
    Action,
    Observation,
    Process,
    Semantics,
    Time,
    endpoint,
    protocol,
    whole,
)
from ray_guard.attribution.sources.line import Line, Unusable, text_of
from ray_guard.attribution.sources.pairs import Pairs
from ray_guard.attribution.times import BadTime

FORMAT: Final = "nftables"

_LONGEST: Final = 1 << 14
"""Bytes: the kernel writes less than two thousand."""
_PACKET: Final = re.compile(
    r"IN=(?<!PHYSIN=)\S* (?:PHYSIN=\S* )?OUT=\S* (?:PHYSOUT=\S* )?[^S\n]*+(?:(?!\bSRC=)S[^S\n]*+)*+SRC="
)
_QUOTED: Final = re.compile(r"\[SRC=.*?(?:\]|$)")
_KEY: Final = r"\b[A-Z]{2,8}"
_PRIORITY: Final = re.compile(r"<\d{1,3}>(?:1 )?")
_FROM: Final = re.compile(r"(?P<node>[^\s:\[]+) (?:\w+\.\w+ )?(?:kernel: ?|\S+\[\d+\]: |ulogd: ?|kernel - - - ?)?")
_UPTIME: Final = re.compile(r"\[ *\d+\.\d+\] ?")
#: what VyOS and Ubiquiti write after a rule's name: accepted, dropped, rejected
_VERDICT: Final = re.compile(r"-([ADR])\]$")
_DENIED: Final = re.compile(r"drop|deny|denied|den(?:y|ied)|reject|block|refus|forbid", re.IGNORECASE)
_ALLOWED: Final = re.compile(r"accept|allow|permit|pass", re.IGNORECASE)


class Nftables:
    format = FORMAT

    def __init__(self) -> None:
        self._pairs = Pairs(_KEY, r"\S*+", first=True)  # LEN comes twice, of IP and UDP
        self._asked: tuple[str, re.Match[str] | None] = "", None

    def recognises(self, line: Line) -> bool:
        parsed = line.object
        if parsed is not None:
            return "oob.prefix" in parsed or parsed.get("dvc") == "Netfilter"
        return len(line.raw) <= _LONGEST and "SRC=" in line.text and self._packet(line.text) is not None

    def read(self, line: Line) -> list[Observation]:
        if line.object is not None and self.recognises(line):
            return [_ulogd(line.object)]
        text = line.text
        packet = self._packet(text)
        if packet is None:
            raise Unusable("malformed", "no IN= OUT= SRC= of a logged packet")
        fields = text[packet.start() :]
        if "[SRC=" in fields:
            fields = _QUOTED.sub("", fields)
        said = self._pairs.of(fields)
        before = text[: packet.start()]
        try:
            time, rest = _stamp(before)
        except BadTime:
            if line.envelope is None:
                raise
            time, prefix = _journal(line.envelope), before
            node = text_of(line.envelope, "_HOSTNAME") or text_of(line.envelope, "host", "hostname")
        else:
            node, prefix = _sender(rest)
        return [_packet(time, node, _UPTIME.sub("", prefix, count=1).strip(" :"), said)]

    def _packet(self, text: str) -> re.Match[str] | None:
        """Where the packet stands; asked twice for each line."""
        if text is not self._asked[0]:
            self._asked = text, _PACKET.search(text)
        return self._asked[1]


@lru_cache(maxsize=1024)
def _sender(rest: str) -> tuple[str, str]:
    """(node, prefix) of what stands between the time and the packet."""
    sender = _FROM.match(rest + " ")
    return (sender["node"], (rest + " ")[sender.end() :]) if sender else ("", rest)


def _stamp(text: str) -> tuple[Time, str]:
    if text[:1] == "<" and (found := _PRIORITY.match(text)):
        text = text[found.end() :]
    if text[:1].isdigit():
        stamp, _, rest = text.partition(" ")
        if "T" not in stamp and rest:  # `2026-03-07 03:40:11 node …`
            clock, _, rest = rest.partition(" ")
            stamp = f"{stamp} {clock}"
        return times.iso(stamp, Semantics.PACKET), rest
    return times.syslog(text, Semantics.PACKET)


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
        rule=prefix,
        node=node,
        process=Process(user=said["UID"]) if "UID" in said else NO_PROCESS,
        bytes_out=whole(said.get("LEN")),
    )


def _ulogd(parsed: dict[str, Any]) -> Observation:
    prefix = text_of(parsed, "oob.prefix").strip(" :")
    return Observation(
        times.iso(parsed.get("timestamp"), Semantics.PACKET),
        src=endpoint(parsed.get("src_ip"), parsed.get("src_port")),
        dst=endpoint(parsed.get("dest_ip"), parsed.get("dest_port")),
        proto=protocol(parsed.get("ip.protocol")),
        action=_action(prefix),
        rule=prefix,
        node=text_of(parsed, "hostname"),
        bytes_out=whole(parsed.get("ip.totlen")),
    )


@lru_cache(maxsize=1024)
def _action(prefix: str) -> Action:
    verdict = _VERDICT.search(prefix)
    if _DENIED.search(prefix) or (verdict and verdict[1] in "DR"):
        return Action.DENIED
    return Action.ALLOWED if verdict or _ALLOWED.search(prefix) else Action.UNKNOWN
