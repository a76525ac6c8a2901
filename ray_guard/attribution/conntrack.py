"""What connection tracking says of its translations. Runs later, on any machine. Pure.

``conntrack -E`` with any ``-o`` but XML, dumps (``conntrack -L``, ``/proc/net/nf_conntrack``), ulogd2's NFCT as text or
JSON; each by itself, behind a syslog header, or in the journal's JSON. A line gives two tuples: the connection as its
inside began it, and the answers' as the outside sends them. Where one is not the other's mirror somebody translated.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import Any, Final, NamedTuple

from ray_guard.attribution import times
from ray_guard.attribution.observation import Endpoint, Semantics, Time, endpoint, protocol, whole
from ray_guard.attribution.sources.line import Line, Unusable, text_of


class Kind(StrEnum):
    NEW = "NEW"
    UPDATE = "UPDATE"
    DESTROY = "DESTROY"
    DUMP = "DUMP"
    """Of a table, written at a moment that it does not say."""


class Event(NamedTuple):
    """One line.

    Args:
        at: when it was written; None where the line says nothing of it.
        began: when the connection did, where that is said.
        inside, peer: both ends as the inside has them.
        outside, far: the same two as the outside has them.
        proto: ``tcp`` …
    """

    kind: Kind
    at: Time | None
    began: Time | None
    inside: Endpoint
    peer: Endpoint
    outside: Endpoint
    far: Endpoint
    proto: str


class Span(NamedTuple):
    """A translation, from its first to its last event. None: not seen."""

    began: Time | None
    ended: Time | None
    event: Event


_KINDS: Final = {"1": Kind.NEW, "2": Kind.UPDATE, "4": Kind.DESTROY}
"""As ulogd2 numbers them."""
_KIND: Final = re.compile(r"\[(NEW|UPDATE|DESTROY)\]")
_ENTRY: Final = re.compile(r"^(?:ipv[46] +\d+ +)?[a-z][a-z0-9-]* +\d+ +.*?\bsrc=\S+ dst=\S+ .*?\bsrc=\S+ dst=\S+")
_PAIR: Final = re.compile(r"\b(src|dst|sport|dport|spt|dpt)=(\S+)", re.IGNORECASE)
_TUPLE: Final = re.compile(r"\bsrc=", re.IGNORECASE)
_PROTOCOL: Final = re.compile(r"\bPROTO=(\w+)|\b[a-z][a-z0-9-]* +(\d{1,3}) +(?:\d+ +)?(?:[A-Z][A-Z_0-9]* +)?src=")
_STAMP: Final = re.compile(r"\[(\d{9,11}(?:\.\d+)?)\s*\]")
_BEGAN: Final = re.compile(r"\[start=([^\]]+)\]")
_LASTED: Final = re.compile(r"\bdelta-time=(\d+)")


def recognises(text: str) -> bool:
    """Whether a line, or what a collector put around it, is one of connection tracking's."""
    if "src=" not in text and "SRC=" not in text:
        return "reply.ip.daddr" in text
    return len(_TUPLE.findall(text)) == 2 and (_KIND.search(text) is not None or _ENTRY.search(text) is not None)


def event(line: Line) -> Event:
    """What a line says.

    Raises:
        Unusable: it is none of connection tracking's; with what to do about it, where that is known.
        BadTime: its time is none.
    """
    parsed = line.object
    if parsed is not None and "reply.ip.daddr.str" in parsed:
        return of_ulogd(parsed)
    inner = line.unwrapped() if parsed is not None else line
    text = line.text if inner is None else inner.text
    if text.startswith(("<flow", "<conntrack", "<?xml")):
        raise Unusable("unknown", "conntrack's XML; write the events with `conntrack -E -o timestamp,id`, without xml")
    kind = _KIND.search(text)
    if not recognises(text):
        raise Unusable("fields", f"no event of conntrack: {text:.80}")
    second = list(_TUPLE.finditer(text))[1].start()
    inside, peer = _ends(text[:second])
    far, outside = _ends(text[second:])
    named = _PROTOCOL.search(text)
    at = _time(text, parsed or {}) if kind is not None else None
    proto = protocol(named[1] or named[2]) if named is not None else ""
    return Event(
        Kind(kind[1]) if kind is not None else Kind.DUMP, at, _began(text, at), inside, peer, outside, far, proto
    )


def _ends(text: str) -> tuple[Endpoint, Endpoint]:
    said = {key.lower(): value for key, value in reversed(_PAIR.findall(text))}
    return (
        endpoint(said.get("src"), said.get("sport", said.get("spt"))),
        endpoint(said.get("dst"), said.get("dport", said.get("dpt"))),
    )


def _time(text: str, envelope: dict[str, Any]) -> Time | None:
    stamped = _STAMP.search(text)
    if stamped is not None:
        return times.epoch(stamped[1], Semantics.PACKET)
    if "__REALTIME_TIMESTAMP" in envelope:
        return times.epoch(envelope["__REALTIME_TIMESTAMP"], Semantics.INGEST)
    try:
        if text[:1].isdigit():
            return times.iso(text.split(" ", 1)[0], Semantics.PACKET)
        return times.syslog(text, Semantics.PACKET)[0]
    except times.BadTime:
        return None


def _began(text: str, at: Time | None) -> Time | None:
    said = _BEGAN.search(text)
    if said is not None:
        return times.ctime(said[1], Semantics.START)[0]
    lasted = _LASTED.search(text)
    if lasted is None or at is None:
        return None
    back = min(int(lasted[1]), 10**9) * times.SECOND
    return at._replace(start_ns=at.start_ns - back - times.SECOND, end_ns=at.end_ns - back)


def of_ulogd(parsed: dict[str, Any]) -> Event:
    """An event in NFCT's JSON, which calls the first tuple's ends what it calls a packet's."""

    def first(*names: str) -> Any:
        return next((parsed[name] for name in names if name in parsed), None)

    at = times.iso(parsed["timestamp"], Semantics.PACKET) if parsed.get("timestamp") else None
    began, ended = moment(parsed, "flow.start"), moment(parsed, "flow.end")
    if began is not None and at is not None and not at.zoned:
        at = began  # civil time, of a zone that is not said: it may be hours before or after
    return Event(
        _KINDS.get(text_of(parsed, "ct.event"), Kind.NEW if ended is None else Kind.DESTROY),
        ended or at,
        began,
        endpoint(first("src_ip", "orig.ip.saddr.str"), first("src_port", "orig.l4.sport")),
        endpoint(first("dest_ip", "orig.ip.daddr.str"), first("dest_port", "orig.l4.dport")),
        endpoint(parsed["reply.ip.daddr.str"], parsed.get("reply.l4.dport")),
        endpoint(parsed.get("reply.ip.saddr.str"), parsed.get("reply.l4.sport")),
        protocol(first("orig.ip.protocol", "ip.protocol", "ip6.nexthdr")),
    )


def moment(parsed: dict[str, Any], name: str) -> Time | None:
    """Seconds and microseconds that ulogd2 says under a name; None where it does not."""
    seconds, micros = whole(parsed.get(f"{name}.sec")), whole(parsed.get(f"{name}.usec")) or 0
    return times.epoch(f"{seconds}.{micros % 1_000_000:06d}", Semantics.START) if seconds else None


def spans(events: Iterable[Event]) -> Iterator[Span]:
    """Each translation from its first to its last event, in the order of their ends.

    What was lost in between is made good: a NEW, or another translation of the same connection, ends the one before.
    """
    open_: dict[tuple[Endpoint, Endpoint, str], Span] = {}
    for each in events:
        key = (each.inside, each.peer, each.proto)
        known = open_.get(key)
        if known is not None and (each.kind is Kind.NEW or _ways(known.event) != _ways(each)):
            yield known._replace(ended=each.began or each.at)
            known = None
        began = each.began or (each.at if each.kind is Kind.NEW else None)
        known = Span(began, None, each) if known is None else known._replace(began=known.began or each.began)
        if each.kind is Kind.DESTROY:
            open_.pop(key, None)
            yield known._replace(ended=each.at)
        else:
            open_[key] = known
    yield from open_.values()


def _ways(one: Event) -> tuple[Endpoint, Endpoint]:
    return one.outside, one.far
