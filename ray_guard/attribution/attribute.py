"""From alerts to what caused them: reads, aligns clocks, joins, scores. Runs later, on any machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any, Final
from zoneinfo import ZoneInfo

import duckdb
import numpy as np

from ray_guard.attribution import candidates, clock, nat, score, store
from ray_guard.attribution.clock import Clock
from ray_guard.attribution.observation import Time
from ray_guard.attribution.sources.reader import FileReport, Record, files, read
from ray_guard.evidence.reader import Quarantine

SECOND: Final = 1_000_000_000
_ENOUGH: Final = 0.995
"""Candidates are listed until this much of the probability is named."""
_MOST: Final = 500

Progress = Callable[[str], None]


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
    """One format within one file: what shares a clock."""

    path: str
    format: str
    report: FileReport
    clock: Clock = field(default_factory=Clock)
    records: int = 0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A call, or a rollout alone (``span_id`` None), that may be the cause. ``call``: its number in the store."""

    confidence: float
    tier: str
    call: int
    about: dict[str, Any]
    evidence: list[str]
    against: list[str]


@dataclass(frozen=True, slots=True)
class Attribution:
    """One record's answer."""

    source: Source
    record: int
    byte_offset: int
    raw: bytes
    time: Time
    start_ns: int
    end_ns: int
    informational: bool
    candidates: list[Candidate]
    unobserved: float

    @property
    def verdict(self) -> str:
        if self.candidates and self.candidates[0].confidence >= 0.8:
            return "attributed"
        return "unobserved" if self.unobserved >= 0.5 else "ambiguous"


@dataclass(frozen=True, slots=True)
class Result:
    """Everything that ``ray-guard attribute`` says."""

    sources: list[Source]
    alerts: list[Attribution]
    quarantine: Quarantine
    nat_reports: list[FileReport]
    db: duckdb.DuckDBPyConnection


@dataclass(slots=True)
class _Kept:
    """What of a record the store does not need."""

    source: list[int] = field(default_factory=list)
    record: list[int] = field(default_factory=list)
    offset: list[int] = field(default_factory=list)
    raw: list[bytes] = field(default_factory=list)
    time: list[Time] = field(default_factory=list)


def attribute(
    traces: Sequence[str | os.PathLike[str]],
    alerts: Sequence[str | os.PathLike[str]],
    *,
    maps: Sequence[str | os.PathLike[str]] = (),
    options: Options | None = None,
    progress: Progress = lambda _: None,
) -> Result:
    """Which rollout, turn and tool call caused each alert.

    Args:
        traces: OTLP JSON lines, Parquet (:mod:`ray_guard.evidence.columns`), evidence folders.
        alerts: logs, or folders of logs.
        maps: NAT maps.
        options: what the logs leave open.
        progress: is told in words how far it is.

    Raises:
        NotEvidence, NotAlerts: a path holds nothing to read.
    """
    options = options or Options()
    db = store.connect()
    quarantine = Quarantine()
    progress("reading traces")
    store.add_spans(db, traces, quarantine)
    store.prepare(db)
    span = _trace_span(db)

    sources: list[Source] = []
    kept = _Kept()
    mappings: list[tuple[int, nat.Mapping]] = []
    records = _records(alerts, options, span, sources, kept, mappings)
    for done in store.add_alerts(db, records):
        progress(f"{done:,} alert records read")
    reports = [FileReport(str(path)) for path in maps]
    for number, (path, report) in enumerate(zip(maps, reports, strict=True)):
        mappings.extend((len(sources) + number, mapping) for mapping in nat.load(Path(path), report))
    store.add_nat(db, mappings)
    progress(f"aligning {len(sources)} clocks")
    _align(db, sources, len(maps))
    progress("joining")
    candidates.join(db)
    progress("weighing")
    found = _weigh(db, sources, kept)
    return Result(sources, found, quarantine, reports, db)


def _trace_span(db: duckdb.DuckDBPyConnection) -> tuple[int, int]:
    # fetchall, here and elsewhere: a result that is not read to its end keeps the connection.
    ((first, last),) = db.execute("SELECT min(start_ns), max(coalesce(end_ns, start_ns)) FROM span").fetchall()
    return (first or 0, last or 0)


def _records(  # noqa: PLR0917 - what it fills
    paths: Iterable[str | os.PathLike[str]],
    options: Options,
    span: tuple[int, int],
    sources: list[Source],
    kept: _Kept,
    mappings: list[tuple[int, nat.Mapping]],
) -> Iterator[tuple[int, int, Record]]:
    for given in paths:
        for path in files(given):
            report = FileReport(str(path) if Path(given).is_dir() else os.fspath(given))
            here: dict[str, int] = {}
            for record in read(path, report, options.format):
                if record.format not in here:
                    here[record.format] = len(sources)
                    sources.append(Source(report.path, record.format, report))
                source = here[record.format]
                sources[source].records += 1
                placed = record._replace(seen=record.seen._replace(time=_placed(record.seen.time, options, span)))
                number = len(kept.source)
                kept.source.append(source)
                kept.record.append(record.record)
                kept.offset.append(record.byte_offset)
                kept.raw.append(record.raw)
                kept.time.append(placed.seen.time)
                mapping = nat.of_record(placed.seen)
                if mapping is not None:
                    mappings.append((source, mapping))
                yield number, source, placed
            if not here:
                sources.append(Source(report.path, options.format or "unknown", report))


def _placed(time: Time, options: Options, span: tuple[int, int]) -> Time:
    """The time with what the log did not say: the year nearest to the traces', the zone that the user named."""
    start = time.start_ns
    if not time.dated:
        start = _dated(start, options.year, span)
    if not time.zoned and options.zone is not None:
        civil = datetime.fromtimestamp(start // SECOND, UTC).replace(tzinfo=options.zone)
        offset = civil.utcoffset()
        start -= int(offset.total_seconds()) * SECOND if offset is not None else 0
    return time._replace(start_ns=start, end_ns=start + time.end_ns - time.start_ns)


def _dated(start_ns: int, year: int | None, span: tuple[int, int]) -> int:
    moment = datetime.fromtimestamp(start_ns // SECOND, UTC)
    middle = datetime.fromtimestamp(((span[0] + span[1]) // 2 or start_ns) // SECOND, UTC).year
    best: int | None = None
    for candidate in (year,) if year is not None else (middle - 1, middle, middle + 1):
        try:
            placed = int(moment.replace(year=candidate).timestamp()) * SECOND + start_ns % SECOND
        except ValueError:
            continue  # the 29th of February of a year that has none
        if best is None or _distance(placed, span) < _distance(best, span):
            best = placed
    return start_ns if best is None else best


def _distance(moment: int, span: tuple[int, int]) -> int:
    return max(span[0] - moment, moment - span[1], 0)


def _align(db: duckdb.DuckDBPyConnection, sources: list[Source], maps: int) -> None:
    """Fills ``clock``: the sources' clocks, and those of the maps, numbered on from them."""
    for number, source in enumerate(sources):
        source.clock = clock.estimate(db, number)
    clocks = [source.clock for source in sources]
    for number in range(len(sources), len(sources) + maps):
        found = clock.of_map(db, number)
        # A map that shares no socket with the traces is taken to be the firewall's own.
        clocks.append(found if found.identifiable else max(clocks, key=lambda each: each.identifiable, default=found))
    db.execute(
        """CREATE OR REPLACE TABLE clock (
             source INTEGER, skew_ns BIGINT, drift DOUBLE, reference_ns BIGINT, slack_ns BIGINT)"""
    )
    for number, each in enumerate(clocks):
        row = (number, each.skew_ns, each.drift, each.reference_ns, each.slack_ns)
        db.execute("INSERT INTO clock VALUES (?, ?, ?, ?, ?)", row)


def _weigh(db: duckdb.DuckDBPyConnection, sources: list[Source], kept: _Kept) -> list[Attribution]:
    rows = db.execute(
        """SELECT alert, call, tier, gap_ns, span_ns, reach, named, used, watched FROM candidate
           ORDER BY alert, call"""
    ).fetchnumpy()
    alerts = len(kept.source)
    times = db.execute("SELECT alert, start_ns, end_ns, slack_ns FROM timed ORDER BY alert").fetchnumpy()
    facts = db.execute(
        """SELECT t.alert, t.source, t.informational, bool_or(p.known) AS known, any_value(t.src_ip) AS src_ip,
                  any_value(t.inside_ip) AS inside_ip
           FROM timed t JOIN place p USING (alert) GROUP BY ALL ORDER BY t.alert"""
    ).fetchall()
    informational = np.zeros(alerts, dtype=bool)
    known = np.zeros(alerts, dtype=bool)
    foreign = np.zeros(alerts, dtype=bool)
    for alert, _, quiet, somewhere, src_ip, inside_ip in facts:
        informational[alert], known[alert] = quiet, somewhere
        foreign[alert] = not somewhere and _private(inside_ip or src_ip)
    # An ordinary flow and an objection have nothing in common: each kind learns its own rates.
    group = np.array(kept.source, dtype=np.int64) * 4 + known * 2 + informational
    calls, room = _exposures(db, 4 * len(sources), group, times["start_ns"], times["end_ns"])
    probability, nobody = score.confidences(
        score.Rows(
            rows["alert"],
            rows["call"],
            rows["tier"].astype(np.int64),
            rows["gap_ns"],
            rows["span_ns"],
            rows["reach"].astype(np.int64),
            rows["named"].astype(bool),
            rows["used"].astype(bool),
            rows["watched"].astype(bool),
        ),
        score.Groups(
            group,
            np.arange(4 * len(sources)) % 2,
            room,
            foreign,
            times["slack_ns"],
            times["end_ns"] - times["start_ns"],
        ),
        calls,
    )
    return _answers(db, sources, kept, times, informational, rows, probability, nobody)


def _exposures(db: duckdb.DuckDBPyConnection, groups: int, group: Any, start: Any, end: Any) -> tuple[Any, Any]:
    """(calls of each reach, machine-seconds of each group): what alerts could have been caused by."""
    ((machines,),) = db.execute("SELECT count(*) FROM node").fetchall()
    reaches = db.execute(
        """SELECT coalesce(w.reach, 1) AS reach, count(*), min(a.start_ns), max(a.end_ns)
           FROM alive a LEFT JOIN words w USING (call) GROUP BY ALL"""
    ).fetchall()
    calls = np.zeros(4)
    for reach, count, _, _ in reaches:
        calls[reach] = count
    room = np.ones(groups)
    for number in np.unique(group):
        mine = group == number
        first = min([int(start[mine].min()), *(row[2] for row in reaches)])
        last = max([int(end[mine].max()), *(row[3] for row in reaches)])
        room[number] = (last - first) / SECOND * (machines if number & 2 else 1)
    return calls, room


#: what a job's machines may have for addresses; Python's is_private holds much more
_INSIDE: Final = tuple(map(ip_network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")))


def _private(address: str | None) -> bool:
    return address is not None and any(ip_address(address) in network for network in _INSIDE)


def _answers(  # noqa: PLR0917 - the columns of one table
    db: duckdb.DuckDBPyConnection,
    sources: list[Source],
    kept: _Kept,
    times: Any,
    informational: Any,
    rows: Any,
    probability: Any,
    nobody: Any,
) -> list[Attribution]:
    order = np.lexsort((rows["call"], -probability, rows["alert"]))
    alert = rows["alert"][order]
    bounds = np.searchsorted(alert, np.arange(len(kept.source) + 1))
    wanted = np.unique(rows["call"])
    about = _about(db, wanted)
    found: list[Attribution] = []
    for number in range(len(kept.source)):
        listed: list[Candidate] = []
        named = float(nobody[number])
        for row in order[bounds[number] : bounds[number + 1]][:_MOST]:
            if named >= _ENOUGH and listed:
                break
            listed.append(_candidate(float(probability[row]), row, rows, about))
            named += listed[-1].confidence
        # What is not listed any more is shared out, so that what is shown sums to one.
        scale = 1 / named if named > 0 else 1.0
        found.append(
            Attribution(
                sources[kept.source[number]],
                kept.record[number],
                kept.offset[number],
                kept.raw[number],
                kept.time[number],
                int(times["start_ns"][number]),
                int(times["end_ns"][number]),
                bool(informational[number]),
                [_scaled(each, scale) for each in listed],
                float(nobody[number]) * scale,
            )
        )
    return found


def _scaled(each: Candidate, scale: float) -> Candidate:
    return Candidate(each.confidence * scale, each.tier, each.call, each.about, each.evidence, each.against)


def _about(db: duckdb.DuckDBPyConnection, wanted: Any) -> dict[int, dict[str, Any]]:
    db.register("wanted_calls", {"call": wanted})
    rows = db.execute(
        """SELECT c.call, run, iteration, "group", rollout, turn, tool, call_id, trace_id, span_id, policy_version,
             shown_trace_id
           FROM call c JOIN wanted_calls w ON w.call = c.call
           UNION ALL
           SELECT r.call, run, iteration, "group", rollout, NULL, NULL, NULL, trace_id, NULL, policy_version,
             trace_id
           FROM rollout r JOIN wanted_calls w ON w.call = r.call"""
    )
    names = [column[0] for column in rows.description or ()]
    about = {row[0]: dict(zip(names, row, strict=True)) for row in rows.fetchall()}
    db.unregister("wanted_calls")
    return about


_TIER_SAYS: Final = {
    "socket": "the supervisor recorded this very socket in this call",
    "nat": "behind the NAT map stands a socket that was recorded in this call",
    "process": "the process that the sensor names was started by this call",
    "interval": "the call was open on that machine at that time",
}


def _candidate(confidence: float, row: int, rows: Any, about: dict[int, dict[str, Any]]) -> Candidate:
    call = int(rows["call"][row])
    tier = candidates.TIERS[int(rows["tier"][row])]
    evidence, against = [], []
    named, used, watched = bool(rows["named"][row]), bool(rows["used"][row]), bool(rows["watched"][row])
    if tier == "interval" and (named or used):
        tier = "destination"
    if tier in _TIER_SAYS:
        evidence.append(_TIER_SAYS[tier])
    if used and tier not in ("socket", "nat"):
        evidence.append("a socket to that destination was recorded in this call")
    if named:
        evidence.append("the command names the destination")
    reach = int(rows["reach"][row])
    if tier in ("destination", "interval"):
        if reach == 3:
            evidence.append("the command tunnels, mines or scans")
        elif reach == 2:
            evidence.append("the command uses the network")
        elif reach == 0:
            against.append("the command does not use the network by itself")
        if watched and not used:
            against.append("sockets of this call were recorded, none of them to this destination")
    gap = int(rows["gap_ns"][row])
    if gap:
        against.append(f"{gap / SECOND:.3g} s outside its life, by the corrected clock")
    return Candidate(confidence, tier, call, about.get(call, {}), evidence, against)
