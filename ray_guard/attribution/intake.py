"""From log files to columns: each record a row, its line packed away. Runs later, on any machine.

A million records as objects would take gigabytes; as columns and packed lines they take a few hundred megabytes.
"""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Final
from zoneinfo import ZoneInfo

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import zstandard

from ray_guard.attribution import nat, rotation
from ray_guard.attribution.clock import Clock
from ray_guard.attribution.observation import Action, Endpoint, Observation, Time
from ray_guard.attribution.sources.reader import FileReport, NotAlerts, Record, files, read

SECOND: Final = 1_000_000_000
BATCH: Final = 4_000
"""Records of one Arrow batch: all that are objects at a time."""
_EARLY: Final = 2
"""The last month in which a log may still be one that was begun the year before:"""
_TURN_NS: Final = 30 * 86_400 * SECOND
"""if it is within so much of the traces then."""
_DAY_NS: Final = 86_400 * SECOND
_EPOCH: Final = date(1970, 1, 1).toordinal()
_TURN_OF_YEAR_NS: Final = 200 * _DAY_NS
"""No line that stands out of order is further from the others, where each is in the year nearest to the traces."""
_QUARTER_NS: Final = 900 * SECOND
_LATE_NS: Final = 60 * SECOND
"""By less than this lines stand out of order."""
_PACK: Final = 2_000
"""Lines that are packed together: what has to be unpacked to see one of them."""

_INTS = npt.NDArray[np.int64]

ALERT_SCHEMA: Final = pa.schema(
    [
        ("alert", pa.int64()),
        ("source", pa.int32()),
        ("start_ns", pa.int64()),
        ("end_ns", pa.int64()),
        ("semantics", pa.string()),
        ("dated", pa.bool_()),
        ("src_ip", pa.string()),
        ("src_port", pa.int32()),
        ("dst_ip", pa.string()),
        ("dst_port", pa.int32()),
        ("inside_ip", pa.string()),
        ("inside_port", pa.int32()),
        ("proto", pa.string()),
        ("denied", pa.bool_()),
        ("rule", pa.string()),
        ("host", pa.string()),
        ("node", pa.string()),
        ("pid", pa.int64()),
        ("command", pa.string()),
        ("informational", pa.bool_()),
    ]
)


@dataclass(frozen=True, slots=True)
class Options:
    """What a log does not say, and the user does.

    Args:
        format: forced for all alert files; None: found out for each line.
        zone: IANA name or offset of civil times without zone.
        year: of dates without year.
    """

    format: str | None = None
    zone: ZoneInfo | None = None
    year: int | None = None


@dataclass(slots=True)
class Source:
    """One format within one file."""

    path: str
    format: str
    report: FileReport
    log: int = 0
    """The first source of the log that it is a part of: what shares a clock."""
    clocks: list[Clock] = field(default_factory=lambda: [Clock()])
    records: int = 0
    set_at: list[int] = field(default_factory=list)
    """The records from which on the clocks after the first hold."""

    @property
    def clock(self) -> Clock:
        """The first one: others follow where it was set in between."""
        return self.clocks[0]


class Lines:
    """Lines by their number, compressed some thousands at a time."""

    def __init__(self) -> None:
        self._packs: list[bytes] = []
        self._open: list[bytes] = []
        self._last: tuple[int, list[bytes]] = (-1, [])

    def extend(self, lines: Iterable[bytes]) -> None:
        self._open.extend(lines)
        while len(self._open) >= _PACK:
            self._packs.append(_packed(self._open[:_PACK]))
            del self._open[:_PACK]

    def __getitem__(self, number: int) -> bytes:
        pack, place = divmod(number, _PACK)
        if pack == len(self._packs):
            return self._open[place]
        if self._last[0] != pack:
            self._last = (pack, _unpacked(self._packs[pack]))
        return self._last[1][place]


def _packed(lines: list[bytes]) -> bytes:
    sizes = array("I", map(len, lines)).tobytes()
    return zstandard.ZstdCompressor(level=1).compress(sizes + b"".join(lines))


def _unpacked(pack: bytes) -> list[bytes]:
    whole = zstandard.ZstdDecompressor().decompress(pack)
    at = _PACK * array("I").itemsize
    lines = []
    for size in array("I", whole[:at]):
        lines.append(whole[at : at + size])
        at += size
    return lines


@dataclass(slots=True)
class Intake:
    """What was read, so far.

    Attributes:
        sources: in the order they were met.
        batches: the records, as :data:`ALERT_SCHEMA`.
        source, record, offset: of each record its source's number, its number in the file, where its line begins.
        lines: of each record its line.
        mappings: NAT maps that firewalls' own records carry, with the source whose clock they go by.
    """

    sources: list[Source] = field(default_factory=list)
    batches: list[pa.RecordBatch] = field(default_factory=list)
    source: array[int] = field(default_factory=lambda: array("l"))
    record: array[int] = field(default_factory=lambda: array("q"))
    offset: array[int] = field(default_factory=lambda: array("q"))
    lines: Lines = field(default_factory=Lines)
    mappings: list[tuple[int, nat.Mapping]] = field(default_factory=list)
    _repeated: dict[int, int] = field(default_factory=dict)
    """Of alerts whose civil time came twice, as clocks were set back: how much later the second was, nanoseconds."""

    def read(self, paths: Iterable[str | os.PathLike[str]], options: Options, span: tuple[int, int]) -> Iterator[int]:
        """Reads logs; yields how many records there are, now and then.

        Args:
            paths: logs, or folders of logs.
            options: what they leave open.
            span: first and last nanosecond of the traces: a year that is not said is the one nearest to them.

        Raises:
            NotAlerts: a path holds nothing to read.
        """
        found = ((given, path) for given in paths for path in files(given))
        met: dict[str, FileReport] = {}
        for given, path in rotation.in_order(found, lambda one: str(one[1])):
            inside = Path(given).is_dir()
            report = FileReport(str(path) if inside else os.fspath(given))
            first = met.setdefault(os.path.realpath(path), report)
            if first is not report:
                report.reject(0, 0, "twice", f"the same file as {first.path}")
                report.sha256 = first.sha256
                yield from self.take((), report, options, span)
                continue
            records = read(path, report, options.format)
            yield from self.take(_passing(records, report) if inside else records, report, options, span)
        self._settle(options, span)

    def _settle(self, options: Options, span: tuple[int, int]) -> None:
        """What a time alone leaves open, and its place in its log tells: the year; which of two hours with one name."""
        dated = [batch["dated"].to_numpy(zero_copy_only=False) for batch in self.batches]
        if all(each.all() for each in dated) and not self._repeated:
            return
        alerts = pa.Table.from_batches(self.batches)
        start, end = (alerts[name].to_numpy().copy() for name in ("start_ns", "end_ns"))
        for mine in self._by_log(np.flatnonzero(~np.concatenate(dated))):
            moved = in_order(start[mine], span, from_first=options.year is not None) - start[mine]
            start[mine] += moved
            end[mine] += moved
        by = np.zeros(len(start), dtype=np.int64)
        by[list(self._repeated)] = list(self._repeated.values())
        for mine in self._by_log(np.array(list(self._repeated), dtype=np.int64)):
            moved = np.where(_second_time(start[mine]), by[mine], 0)
            start[mine] += moved
            end[mine] += moved
        for name, settled in (("start_ns", start), ("end_ns", end)):
            alerts = alerts.set_column(alerts.column_names.index(name), name, pa.array(settled))
        self.batches = alerts.to_batches()

    def _by_log(self, alerts: _INTS) -> Iterator[_INTS]:
        """Alerts, parted by the log that they are of, in its order."""
        of_log = np.empty(len(self.sources), dtype=np.int64)
        for log in rotation.alike((source.path, source.format) for source in self.sources):
            of_log[log] = log[0]
        owner = of_log[np.array(self.source)[alerts]]
        order = np.argsort(owner, kind="stable")
        if len(alerts):
            yield from np.split(alerts[order], np.flatnonzero(np.diff(owner[order])) + 1)

    def take(
        self, records: Iterable[Record], report: FileReport, options: Options, span: tuple[int, int]
    ) -> Iterator[int]:
        """Takes the records of one file, as :meth:`read` does of many."""
        here: dict[str, int] = {}
        records = iter(records)
        while batch := list(islice(records, BATCH)):
            self._add(batch, report, here, options, span)
            yield len(self.source)
        if not here:
            self.sources.append(Source(report.path, options.format or "unknown", report))
        yield len(self.source)

    def _add(
        self, batch: list[Record], report: FileReport, here: dict[str, int], options: Options, span: tuple[int, int]
    ) -> None:
        first = len(self.source)
        formats, numbers, offsets, raws, seen = zip(*batch, strict=True)
        for name, count in Counter(formats).items():
            if name not in here:
                here[name] = len(self.sources)
                self.sources.append(Source(report.path, name, report))
            self.sources[here[name]].records += count
        self.source.extend(map(here.__getitem__, formats))
        self.record.extend(numbers)
        self.offset.extend(offsets)
        self.lines.extend(raws)
        times = [placed(each.time, options, span) for each in seen]
        if options.zone is not None:
            for number, (each, time) in enumerate(zip(seen, times, strict=True), first):
                if not each.time.zoned and (by := _repeated(time.start_ns // _QUARTER_NS, options.zone)):
                    self._repeated[number] = by
        for number, (each, time) in enumerate(zip(seen, times, strict=True), first):
            mapping = nat.of_record(each if time is each.time else each._replace(time=time))
            if mapping is not None:
                self.mappings.append((self.source[number], mapping))
        made = _columns(first, self.source[first:], times, seen)
        columns = [pa.array(made[each.name], each.type) for each in ALERT_SCHEMA]
        self.batches.append(pa.RecordBatch.from_arrays(columns, schema=ALERT_SCHEMA))


def _columns(
    first: int, source: array[int], times: Sequence[Time], seen: Sequence[Observation]
) -> dict[str, Sequence[Any]]:
    """The columns of :data:`ALERT_SCHEMA`, by name."""
    of, time = _turned(Observation, seen), _turned(Time, times)
    src, dst = _turned(Endpoint, of.src), _turned(Endpoint, of.dst)
    nothing = [None] * len(seen)
    return {
        "alert": range(first, first + len(seen)),
        "source": source,
        "start_ns": time.start_ns,
        "end_ns": time.end_ns,
        "semantics": time.semantics,
        "dated": time.dated,
        "src_ip": src.ip,
        "src_port": src.port,
        "dst_ip": dst.ip,
        "dst_port": dst.port,
        "inside_ip": nothing,
        "inside_port": nothing,
        "proto": of.proto,
        "denied": [each is Action.DENIED for each in of.action],
        "rule": list(map(_rule, of.rule, of.signature)),
        "host": [each.lower().rstrip(".") or None if each else None for each in of.host],
        "node": [each or None for each in of.node],
        "pid": [each.pid for each in of.process],
        "command": [each.command or None for each in of.process],
        "informational": [each.informational for each in seen],
    }


def _turned(kind: Any, rows: Iterable[tuple[Any, ...]]) -> Any:
    """Rows of a kind as one of that kind: under each field's name stands its column."""
    return kind(*zip(*rows, strict=True))


def _rule(rule: str, signature: str) -> str | None:
    return (f"{rule} {signature}" if rule and signature and rule != signature else rule or signature) or None


def _passing(records: Iterator[Record], report: FileReport) -> Iterator[Record]:
    """The records of a file that a folder holds: that it cannot be read is counted, and costs no other file."""
    try:
        yield from records
    except NotAlerts as error:
        report.reject(0, 0, "unreadable", error.why)


def placed(time: Time, options: Options, span: tuple[int, int]) -> Time:
    """The time with what the log did not say: the year nearest to the traces', the zone that the user named."""
    if time.dated and (time.zoned or options.zone is None):
        return time
    start = time.start_ns
    if not time.dated:
        start = _dated(start, options.year, span)
    if not time.zoned and options.zone is not None:
        civil = datetime.fromtimestamp(start // SECOND, UTC).replace(tzinfo=options.zone)
        offset = civil.utcoffset()
        start -= int(offset.total_seconds()) * SECOND if offset is not None else 0
    return time._replace(start_ns=start, end_ns=start + time.end_ns - time.start_ns)


def in_order(starts: _INTS, span: tuple[int, int], *, from_first: bool) -> _INTS:
    """Moments of one log, each in the year nearest to ``span``, in years that follow one another as they do.

    Where a log falls back by nearly a year it went on into the next. What stays is what is nearest to ``span``, else
    (``from_first``) the begin, of which the user named the year.
    """
    leaps = np.diff(starts, prepend=starts[:1])
    years = np.cumsum((leaps < -_TURN_OF_YEAR_NS).astype(np.int64) - (leaps > _TURN_OF_YEAR_NS))
    if not years.any():
        return starts
    away = np.maximum(span[0] - starts, starts - span[1])
    years -= years[0 if from_first else np.argmin(away)]
    days = (starts // _DAY_NS).astype("M8[D]")
    months = days.astype("M8[M]")
    within = days - months.astype("M8[D]")
    leap_day = (months.astype(np.int64) % 12 == 1) & (within.astype(np.int64) == 28)  # is where it can be
    turned = (months + 12 * np.where(leap_day, 0, years)).astype("M8[D]") + within
    settled: _INTS = turned.astype(np.int64) * _DAY_NS + starts % _DAY_NS
    return settled


def _second_time(starts: _INTS) -> npt.NDArray[np.bool_]:
    """Which moments of one log, all of them in hours whose civil time comes twice, are in the second such hour.

    Their order tells: where the log falls back, the second begins.
    """
    later = np.zeros(len(starts), dtype=bool)
    nights = np.flatnonzero(np.abs(np.diff(starts)) > _DAY_NS) + 1
    for night in np.split(np.arange(len(starts)), nights):
        leaps = np.diff(starts[night])
        if len(leaps) and leaps.min() < -_LATE_NS:
            later[night[np.argmin(leaps) + 1 :]] = True
    return later


@lru_cache(maxsize=4096)
def _repeated(quarter: int, zone: ZoneInfo) -> int:
    """By how much a moment's civil time comes once more, nanoseconds; 0 where it does not."""
    civil = datetime.fromtimestamp(quarter * _QUARTER_NS // SECOND, zone)
    first, second = civil.utcoffset(), civil.replace(fold=1).utcoffset()
    return (
        int((first - second).total_seconds()) * SECOND
        if first is not None and second is not None and first > second
        else 0
    )


def _dated(start_ns: int, year: int | None, span: tuple[int, int]) -> int:
    day = start_ns // _DAY_NS
    return start_ns + (_day_in_its_year(day, year, span) - day) * _DAY_NS


@lru_cache(maxsize=4096)
def _day_in_its_year(day: int, year: int | None, span: tuple[int, int]) -> int:
    """The day since the epoch that a day is, whose year is not said."""
    written = date.fromordinal(_EPOCH + day)
    middle = datetime.fromtimestamp(((span[0] + span[1]) // 2 or day * _DAY_NS) // SECOND, UTC).year
    best: int | None = None
    # A leap year may be far; who names a year names the one that the log begins in.
    reach = 8 if (written.month, written.day) == (2, 29) else 1
    near = range(middle - reach, middle + reach + 1)
    for candidate in near if year is None else (year, year + 1) if written.month <= _EARLY else (year,):
        try:
            at = written.replace(year=candidate).toordinal() - _EPOCH
        except ValueError:
            continue  # the 29th of February of a year that has none
        away = _distance(at * _DAY_NS, span)
        turned = year is not None and candidate > year and away > _TURN_NS
        if best is None or (away < _distance(best * _DAY_NS, span) and not turned):
            best = at
    return day if best is None else best


def _distance(day_ns: int, span: tuple[int, int]) -> int:
    """From a day's end: of two years as near a log is rather of the one before."""
    return max(span[0] - day_ns - _DAY_NS, day_ns + _DAY_NS - span[1], 0)
