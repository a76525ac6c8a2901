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
_PRIORITY: Final = re.compile(r"<\d{1,3}>(?:1 )?")
_CONTAINER: Final = re.compile(r"\S+ std(?:out|err) [FP] ")
_NODE: Final = r"(?P<node>[^\s:\[]+|(?:[0-9A-Fa-f]*:){2,7}[0-9A-Fa-f]*) "
_PROGRAM: Final = (
    r"(?:\w+\.\w+ )?(?:kernel: ?|\S+\[\d+\]: |ulogd: ?|"
    r"(?:kernel|ulogd) (?:-|\d+) (?:-|\w+) (?:-|(?:\[[^\]]*\])+) ?\ufeff?)?(?:message repeated \d+ times: \[ ?)?"
)
_FROM: Final = re.compile(_NODE + _PROGRAM)
_FROM_HERE: Final = re.compile(r"(?:\[\d+\.\d+\] )?(?P<node>)" + _PROGRAM)
_WEEKDAY: Final = re.compile(r"[A-Z][a-z]{2} (?=\d{4}-)")
_ZONE: Final = re.compile(r"[A-Z]{3,5} ")
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
        return len(line.raw) <= _LONGEST and "SRC=" in line.text and _packet_in(line.text) is not None

    def read(self, line: Line) -> list[Observation]:
        if line.object is not None and self.recognises(line):
            return [_connection(line.object) if "reply.ip.daddr.str" in line.object else _ulogd(line.object)]
        text = line.text
        begin = _packet_in(text)
        if begin is None:
            raise Unusable("malformed", "no IN= OUT= SRC= of a logged packet")
        fields = text[begin:]
        if "[SRC=" in fields:
            fields = _QUOTED.sub("", fields)
        said = self._pairs.of(fields)
        before = text[:begin]
        try:
            time, sender, rest = _stamp(before)
        except BadTime:
            if line.envelope is None:
                raise
            time, prefix = _journal(line.envelope), before
            node = text_of(line.envelope, "_HOSTNAME") or text_of(line.envelope, "host", "hostname")
        else:
            node, prefix = _written_by(sender, rest)
        return [_packet(time, node, _UPTIME.sub("", prefix, count=1).strip(" :\ufeff"), said)]


@lru_cache(maxsize=1)  # asked twice for each line
def _packet_in(text: str) -> int | None:
    """Where the packet begins: a prefix before it may look like one."""
    ends = [found.start() for found in _SRC.finditer(text)]
    begins = [found.start() for found in _PACKET.finditer(text, 0, ends[-1] if ends else 0)]
    return begins[-1] if begins else None


@lru_cache(maxsize=1024)
def _written_by(sender: re.Pattern[str], rest: str) -> tuple[str, str]:
    """(node, prefix) of what stands between the time and the packet."""
    found = sender.match(rest + " ")
    return (found["node"], (rest + " ")[found.end() :]) if found else ("", rest)


def _stamp(text: str) -> tuple[Time, re.Pattern[str], str]:
    """(time, what says who wrote it, the rest). Raises BadTime for what has no time that is known."""
    if found := _PRIORITY.match(text) or (_CONTAINER.match(text) if " std" in text else None):
        text = text[found.end() :]
    if text[:1].isdigit():
        stamp, _, rest = text.partition(" ")
        if "-" not in stamp:  # `journalctl -o short-unix`
            return times.epoch(stamp, Semantics.PACKET), _FROM, rest
        if "T" not in stamp and rest:  # `2026-03-07 03:40:11 node …`
            clock, _, rest = rest.partition(" ")
            stamp = f"{stamp} {clock}"
        # `dmesg --time-format iso`, which knows no node, has a comma
        return times.iso(stamp, Semantics.PACKET), _FROM_HERE if "," in stamp else _FROM, rest
    try:
        time, rest = times.syslog(text, Semantics.PACKET)
    except BadTime:
        return _other_stamp(text)
    if rest[:5].strip().isdigit():  # `Mar  7 03:40:11 2026`
        return _other_stamp(text)
    return time, _FROM, rest


def _other_stamp(text: str) -> tuple[Time, re.Pattern[str], str]:
    """`dmesg -T`, OpenWrt's `logread`, `journalctl -o short-full`, syslog with a year."""
    if found := _WEEKDAY.match(text):
        day, clock, rest = (text[found.end() :] + "  ").split(" ", 2)
        zone = _ZONE.match(rest)
        known = "UTC" if zone is not None and zone[0] in ("UTC ", "GMT ") else ""
        return (
            times.iso(f"{day} {clock}{known}", Semantics.PACKET),
            _FROM,
            rest[zone.end() if zone is not None else 0 :],
        )
    bracket = text.startswith("[")
    time, rest = times.ctime(text.removeprefix("["), Semantics.PACKET)
    # What begins with a weekday was written on the machine itself, which does not say its own name.
    here = bracket or text[3:7].strip().isalpha()
    return time, _FROM_HERE if here else _FROM, rest.removeprefix("]").lstrip()


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
    seen = conntrack.of_ulogd(parsed)
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
        node=_device(parsed),
        bytes_out=whole(parsed.get("orig.raw.pktlen")),
        bytes_in=whole(parsed.get("reply.raw.pktlen")),
        flow_id=text_of(parsed, "ct.id"),
    )


def _device(parsed: dict[str, Any]) -> str:
    """Who wrote it, unless ulogd was not told."""
    return text_of(parsed, "hostname") or text_of(parsed, "dvc").removeprefix("Netfilter")


def _ulogd(parsed: dict[str, Any]) -> Observation:
    prefix = text_of(parsed, "oob.prefix").strip(" :")
    # What a group's label says: with `boolean_label` ulogd calls 1 allowed, anything else blocked.
    label = _LABELS.get(text_of(parsed, "action"))
    return Observation(
        times.iso(parsed.get("timestamp"), Semantics.PACKET),
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
