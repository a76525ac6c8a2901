"""NAT maps: which inside address and port stood behind an outside one, and when. Runs later, on any machine.

Read from what connection tracking writes (:mod:`~ray_guard.attribution.conntrack`), from FortiGate and PAN-OS logs,
whose records carry the map, and from CSV: ``start,end,inside_ip,inside_port,outside_ip,outside_port,proto``, by its
header in any order, times as epochs or RFC 3339, open where they are empty or 0. Ports that are empty or 0 on both
sides mean the whole address.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple

from ray_guard.attribution import conntrack, times
from ray_guard.attribution.observation import NOBODY, Endpoint, Observation, Semantics, Time, endpoint, protocol
from ray_guard.attribution.sources import reader
from ray_guard.attribution.sources.line import Line, Unusable
from ray_guard.attribution.sources.reader import FileReport

ALWAYS: Final = (0, 1 << 62)
_COLUMNS: Final = ("start", "end", "inside_ip", "inside_port", "outside_ip", "outside_port", "proto")
_MORE: Final = ("peer_ip", "peer_port")
_NEEDED: Final = frozenset({"inside_ip", "outside_ip"})
_OPEN: Final = frozenset({"", "0", "-"})
_HEAD: Final = 200
"""Lines by which a file is judged."""

Place = Callable[[Time], Time]
"""Says what a time does not: its year, its zone."""


class Mapping(NamedTuple):
    """``inside`` was seen from the outside as ``outside``, between two times of the map's own clock (nanoseconds).

    Args:
        start_ns, end_ns: those of :data:`ALWAYS` where they are not known.
        inside, outside: without ports, the whole address.
        peer: the far end that it held for, as the outside has it; unknown: any.
        aimed: what the inside called that far end, where that is translated too.
    """

    start_ns: int
    end_ns: int
    inside: Endpoint
    outside: Endpoint
    proto: str
    peer: Endpoint = NOBODY
    aimed: Endpoint = NOBODY


def of_record(seen: Observation) -> Mapping | None:
    """The map that a firewall's own record carries."""
    outside, peer = seen.translated_src, seen.translated_dst
    if outside.ip is None and peer.ip is None:
        return None
    return _translated(
        Mapping(
            seen.time.start_ns,
            seen.time.end_ns,
            seen.src,
            _filled(outside, seen.src),
            seen.proto,
            _filled(peer, seen.dst),
            seen.dst,
        )
    )


def _filled(after: Endpoint, before: Endpoint) -> Endpoint:
    """What a record says of a translation: an address alone keeps its port, a port alone says nothing."""
    return before if after.ip is None else Endpoint(after.ip, after.port or before.port)


def _translated(found: Mapping) -> Mapping | None:
    """A mapping that translates something; what is aimed at is said only where it is not the peer."""
    if found.inside.ip is None or found.outside.ip is None:
        return None
    if found.aimed != found.peer:
        return found
    return found._replace(aimed=NOBODY) if found.outside != found.inside else None


def load(path: Path, report: FileReport, place: Place = lambda time: time) -> Iterator[Mapping]:
    """The mappings of one file; what is none is counted in ``report``.

    Raises:
        NotAlerts: it cannot be opened.
    """
    head = [line for line in islice(reader.lines(path, FileReport("")), _HEAD) if not _is_idle(line)]
    try:
        first = head[0].text if head else ""
        if _delimiter(first) is not None or _is_row(first):
            yield from _csv(path, report, place)
        elif any(_is_tracking(line) for line in head):
            yield from _tracked(path, report, place)
        else:
            for record in reader.read(path, report):
                mapping = of_record(record.seen._replace(time=place(record.seen.time)))
                if mapping is not None:
                    yield mapping
    except Unusable as error:  # the first line: that of a file which is none of these
        report.reject(1, 0, error.reason, error.detail)


def _is_idle(line: Line) -> bool:
    stripped = line.raw.strip()
    return not stripped or stripped.startswith(b"#")


def _is_tracking(line: Line) -> bool:
    try:
        return conntrack.recognises(line.text) or line.text.startswith(("<?xml", "<conntrack", "<flow"))
    except Unusable:
        return False


def _delimiter(header: str) -> str | None:
    """What parts the columns of a CSV's header; None where the line is none."""
    for each in ",;\t":
        names = {name.strip().strip('"').lower() for name in header.split(each)}
        if len(names) > 1 and names & _NEEDED:
            return each
    return None


def _is_row(line: str) -> bool:
    fields = line.split(",")
    return len(fields) in (6, 7) and endpoint(fields[2]).ip is not None and endpoint(fields[4]).ip is not None


def _csv(path: Path, report: FileReport, place: Place) -> Iterator[Mapping]:
    columns, delimiter = list(_COLUMNS), ","
    for number, line in enumerate(reader.lines(path, report), 1):
        if _is_idle(line):
            continue
        try:
            if (parted := _delimiter(line.text)) is not None:
                delimiter = parted
                columns = [name.strip().strip('"').lower() for name in line.text.split(delimiter)]
                if lacking := sorted(_NEEDED - set(columns)):
                    raise Unusable("fields", f"the header has no column {lacking[0]}; it needs {', '.join(_COLUMNS)}")
                continue
            # Line by line: none of the columns has line breaks, and a stray quote shall not swallow the rest.
            fields = [field.strip() for field in next(csv.reader([line.text], delimiter=delimiter))]
            if any(fields):
                yield _row(columns, fields, place)
                report.records["csv"] += 1
        except Unusable as error:
            report.reject(number, line.offset, error.reason, error.detail)
        except (times.BadTime, ValueError, csv.Error, StopIteration) as error:
            report.reject(number, line.offset, "fields", str(error))


def _row(columns: list[str], fields: list[str], place: Place) -> Mapping:
    if not len(columns) - 1 <= len(fields) <= len(columns):  # the last one, proto, may be left out
        raise Unusable("fields", f"{len(fields)} fields where {len(columns)} are named")
    said = dict.fromkeys((*_COLUMNS, *_MORE), "") | dict(zip(columns, fields, strict=False))
    inside, outside, peer = (
        endpoint(said[f"{side}_ip"], None if said[f"{side}_port"] in _OPEN else said[f"{side}_port"])
        for side in ("inside", "outside", "peer")
    )
    if inside.ip is None or outside.ip is None:
        raise Unusable("fields", f"no addresses in {','.join(fields):.80}")
    if (inside.port is None) is not (outside.port is None):
        raise Unusable("fields", f"a port on one side alone in {','.join(fields):.80}")
    start = ALWAYS[0] if said["start"] in _OPEN else _time(said["start"], place).start_ns
    end = ALWAYS[1] if said["end"] in _OPEN else _time(said["end"], place).end_ns
    if end <= start:
        raise Unusable("time", f"ends before it begins: {','.join(fields):.80}")
    return Mapping(start, end, inside, outside, protocol(said["proto"]) if said["proto"] not in _OPEN else "", peer)


def _time(written: str, place: Place) -> Time:
    number = written.replace(".", "", 1).isdigit()
    return place(times.epoch(written, Semantics.PACKET) if number else times.iso(written, Semantics.PACKET))


def _tracked(path: Path, report: FileReport, place: Place) -> Iterator[Mapping]:
    def events() -> Iterator[conntrack.Event]:
        for number, line in enumerate(reader.lines(path, report), 1):
            if _is_idle(line):
                continue
            try:
                yield conntrack.event(line)
                report.records["conntrack"] += 1
            except Unusable as error:
                report.reject(number, line.offset, error.reason, error.detail)
            except times.BadTime as error:
                report.reject(number, line.offset, "time", str(error))

    for span in conntrack.spans(events()):
        start = ALWAYS[0] if span.began is None else place(span.began).start_ns
        end = ALWAYS[1] if span.ended is None else place(span.ended).end_ns
        event = span.event
        end = max(end, start + 1)
        found = _translated(Mapping(start, end, event.inside, event.outside, event.proto, event.far, event.peer))
        if found is not None:
            yield found
