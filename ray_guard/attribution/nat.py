"""NAT maps: which inside address and port stood behind an outside one, and when. Runs later, on any machine.

Read from conntrack's event lines (``conntrack -E -o timestamp``, ulogd2's NFCT), from FortiGate and PAN-OS logs, whose
records carry the map, and from CSV (``start,end,inside_ip,inside_port,outside_ip,outside_port,proto``; epoch seconds).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from ray_guard.attribution import times
from ray_guard.attribution.observation import NOBODY, Endpoint, Observation, Semantics, endpoint, protocol
from ray_guard.attribution.sources.reader import FileReport, NotAlerts, read

ALWAYS: Final = (0, 1 << 62)
_STAMP: Final = re.compile(r"^\s*\[(\d{9,11}\.\d+)\s*\]")
_KIND: Final = re.compile(r"\[(NEW|UPDATE|DESTROY)\]")
_PAIR: Final = re.compile(r"\b(src|dst|sport|dport|SRC|DST|SPT|DPT)=(\S+)")
_PROTOCOL: Final = re.compile(r"\b(?:PROTO=)?(tcp|udp|icmp|sctp|TCP|UDP|ICMP|SCTP)\b")
_COLUMNS: Final = ("start", "end", "inside_ip", "inside_port", "outside_ip", "outside_port", "proto")


class Mapping(NamedTuple):
    """``inside`` was seen from the outside as ``outside``, between two times of the map's own clock (nanoseconds).

    ``peer`` is the far end that it held for; unknown: any.
    """

    start_ns: int
    end_ns: int
    inside: Endpoint
    outside: Endpoint
    proto: str
    peer: Endpoint = NOBODY


def of_record(seen: Observation) -> Mapping | None:
    """The map that a firewall's own record carries."""
    outside = seen.translated_src
    if outside.ip is None or seen.src.ip is None or outside.ip == seen.src.ip:
        return None
    return Mapping(seen.time.start_ns, seen.time.end_ns, seen.src, outside, seen.proto, seen.dst)


def load(path: Path, report: FileReport) -> Iterator[Mapping]:
    """The mappings of one file; what is none is counted in ``report``.

    Raises:
        NotAlerts: it cannot be opened.
    """
    try:
        with path.open("rb") as file:
            head = file.read(4096).decode("utf-8", "replace")
    except OSError as error:
        raise NotAlerts(str(path), f"cannot be read: {error.strerror}") from error
    first = next((line for line in head.splitlines() if line.strip()), "")
    if [word.strip() for word in first.lower().split(",")][:6] == list(_COLUMNS[:6]) or _is_row(first):
        yield from _csv(path, report)
    elif _KIND.search(head):
        yield from _conntrack(path, report)
    else:
        for record in read(path, report):
            mapping = of_record(record.seen)
            if mapping is not None:
                yield mapping


def _is_row(line: str) -> bool:
    fields = line.split(",")
    return len(fields) in (6, 7) and endpoint(fields[2]).ip is not None and endpoint(fields[4]).ip is not None


def _csv(path: Path, report: FileReport) -> Iterator[Mapping]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                # Line by line: none of the columns has line breaks, and a stray quote shall not swallow the rest.
                fields = [field.strip() for field in next(csv.reader([line]))]
                if not any(fields) or fields[0].lower() == "start":
                    continue
                start, _ = times.epoch_ns(fields[0])
                end, width = times.epoch_ns(fields[1]) if fields[1] else ALWAYS
                inside, outside = endpoint(fields[2], fields[3]), endpoint(fields[4], fields[5])
            except (times.BadTime, IndexError, csv.Error, StopIteration) as error:
                report.reject(number, 0, "fields", str(error))
                continue
            if inside.ip is None or outside.ip is None:
                report.reject(number, 0, "fields", f"no addresses in {line.strip():.80}")
                continue
            report.records["csv"] += 1
            proto = protocol(fields[6]) if len(fields) > 6 else ""
            yield Mapping(start, end + (width if end < ALWAYS[1] else 0), inside, outside, proto)


def _conntrack(path: Path, report: FileReport) -> Iterator[Mapping]:
    """A connection holds from its NEW to its DESTROY; without times, always."""
    begun: dict[tuple[Endpoint, Endpoint, str], tuple[int, Endpoint]] = {}
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            kind, pairs = _KIND.search(line), _PAIR.findall(line)
            if kind is None or len(pairs) < 8:
                if line.strip():
                    report.reject(number, 0, "fields", f"no event of conntrack: {line.strip():.80}")
                continue
            try:
                at = _time(line)
            except times.BadTime as error:
                report.reject(number, 0, "time", str(error))
                continue
            report.records["conntrack"] += 1
            original = {key.lower(): value for key, value in pairs[:4]}
            reply = {key.lower(): value for key, value in pairs[4:8]}
            inside = endpoint(original.get("src"), original.get("sport") or original.get("spt"))
            peer = endpoint(original.get("dst"), original.get("dport") or original.get("dpt"))
            outside = endpoint(reply.get("dst"), reply.get("dport") or reply.get("dpt"))
            if outside == inside or outside.ip is None or inside.ip is None:
                continue
            named = _PROTOCOL.search(line)
            key = (inside, peer, named[1].lower() if named else "")
            if kind[1] == "DESTROY":
                start, _ = begun.pop(key, (0, outside))
                yield Mapping(start, ALWAYS[1] if at is None else at, inside, outside, key[2], peer)
            elif key not in begun or kind[1] == "NEW":
                begun[key] = (0 if at is None else at, outside)
    for (inside, peer, proto), (start, outside) in begun.items():
        yield Mapping(start, ALWAYS[1], inside, outside, proto, peer)


def _time(line: str) -> int | None:
    stamped = _STAMP.match(line)
    if stamped is not None:
        return times.epoch_ns(stamped[1])[0]
    try:
        return times.iso(line.split(" ", 1)[0], Semantics.PACKET).start_ns
    except times.BadTime:
        return None
