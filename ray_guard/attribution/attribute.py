"""From alerts to what caused them: reads, aligns clocks, joins, scores. Runs later, on any machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from ipaddress import ip_address, ip_network
from pathlib import Path
from threading import get_native_id
from typing import Any, Final

import duckdb
import numpy as np

from ray_guard.attribution import candidates, clock, intake, nat, rotation, score, store
from ray_guard.attribution.answers import Answers, Facts
from ray_guard.attribution.clock import Clock
from ray_guard.attribution.intake import Options, Source
from ray_guard.attribution.sources.reader import FileReport
from ray_guard.evidence.reader import Quarantine

SECOND: Final = 1_000_000_000
_TICK_S: Final = 0.5
_LATER: Final = 10
_TOGETHER_NS: Final = 10 * SECOND
"""Alerts between the same two are of one event while none comes longer after the one before it."""
_EVER: Final = 1 << 62

Progress = Callable[[str], None]
Spread = Callable[[duckdb.DuckDBPyConnection, Sequence[str | os.PathLike[str]], Quarantine], tuple[int, int]]
"""Fills a store with a job's tables; the first and the last nanosecond of its traces."""
Meanwhile = Callable[[duckdb.DuckDBPyConnection], None]


@dataclass(slots=True)
class Map:
    """A NAT map that was given.

    Attributes:
        translations: how many it holds.
        clock: its own, where the sockets tell it; else that of a log.
    """

    report: FileReport
    translations: int = 0
    clock: Clock = field(default_factory=Clock)
    own_clock: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """Everything that ``ray-guard attribute`` says."""

    sources: list[Source]
    alerts: Answers
    quarantine: Quarantine
    maps: list[Map]
    db: duckdb.DuckDBPyConnection

    @property
    def reports(self) -> list[FileReport]:
        """Of each log and each map, what became of its lines."""
        reports = [*(each.report for each in self.sources), *(each.report for each in self.maps)]
        return list({id(each): each for each in reports}.values())


def attribute(
    traces: Sequence[str | os.PathLike[str]],
    alerts: Sequence[str | os.PathLike[str]],
    *,
    maps: Sequence[str | os.PathLike[str]] = (),
    options: Options | None = None,
    progress: Progress = lambda _: None,
    spread: Spread | None = None,
    meanwhile: Meanwhile = lambda _: None,
) -> Result:
    """Which rollout, turn and tool call caused each alert.

    Args:
        traces: OTLP JSON lines, Parquet (:mod:`ray_guard.evidence.columns`), evidence folders.
        alerts: logs, or folders of logs.
        maps: NAT maps.
        options: what the logs leave open.
        progress: is told in words how far it is.
        spread: arranges the traces in the store's stead, on other machines (:mod:`ray_guard.integrations.ray_data`).
            The answer is the same; what spans said besides is not there to be reported.
        meanwhile: what else to make of the job's tables while logs are still being read.

    Raises:
        NotEvidence, NotAlerts: a path holds nothing to read.
    """
    options = options or Options()
    db = store.connect()
    quarantine = Quarantine()
    progress("reading traces")
    if spread is None:
        store.add_spans(db, traces, quarantine)
        span = store.bounds(db)
    else:
        span = spread(db, traces, quarantine)
    logs = intake.Intake()
    # The store works without the interpreter: logs are read meanwhile.
    with ThreadPoolExecutor(1) as beside:
        job = beside.submit(_arranged, db, meanwhile, there=spread is not None)
        for done in logs.read(alerts, options, span):
            progress(f"{done:,} alert records read")
        while not job.done():
            progress("arranging the job's calls")
            wait([job], _TICK_S)
        job.result()
    store.canonical(db)
    given = [Map(FileReport(str(path))) for path in maps]
    mappings = logs.mappings
    for number, (path, each) in enumerate(zip(maps, given, strict=True), len(logs.sources)):
        before = len(mappings)
        found = nat.load(Path(path), each.report, partial(intake.placed, options=options, span=span))
        mappings.extend((number, mapping) for mapping in found)
        each.translations = len(mappings) - before
    store.add_alerts(db, logs.batches)
    logs.batches.clear()
    store.add_nat(db, mappings)
    progress(f"aligning {len(logs.sources)} clocks")
    _align(db, logs, given)
    progress("joining")
    candidates.join(db)
    progress("weighing")
    return Result(logs.sources, _weigh(db, logs), quarantine, given, db)


def _arranged(db: duckdb.DuckDBPyConnection, then: Meanwhile, *, there: bool) -> None:
    # Reading lines takes longest and has one thread: it goes first. On Linux a thread has a priority of its own.
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, get_native_id(), _LATER)
    if not there:
        store.arrange(db)
    then(db)


def _align(db: duckdb.DuckDBPyConnection, logs: intake.Intake, maps: list[Map]) -> None:
    """Fills ``clock``: the sources' clocks, and those of the maps, numbered on from them."""
    candidates.translations(db)
    sources = logs.sources
    for log in rotation.logs(db, [(source.path, source.format) for source in sources]):
        estimated = clock.estimate(db, log)
        for number in log:
            sources[number].log = log[0]
            sources[number].clocks = estimated if len(estimated) == 1 else _during(estimated, logs, number)
            sources[number].set_at = [logs.record[each.since] for each in sources[number].clocks[1:]]
    clocks = [source.clock for source in sources]
    for number, given in enumerate(maps, len(sources)):
        found = clock.of_map(db, number)
        given.own_clock = found.identifiable
        # A map that shares no socket with the traces is taken to be the firewall's own.
        likely = max(clocks, key=lambda each: each.identifiable, default=found)
        given.clock = found if found.identifiable else likely
        clocks.append(given.clock)
    db.execute(
        """CREATE OR REPLACE TABLE clock (
             source INTEGER, skew_ns BIGINT, drift DOUBLE, reference_ns BIGINT, slack_ns BIGINT,
             first_alert BIGINT, until_alert BIGINT)"""
    )
    held = [source.clocks for source in sources] + [[each] for each in clocks[len(sources) :]]
    for number, one_after_another in enumerate(held):
        for each, until in _untils(one_after_another):
            row = (number, each.skew_ns, each.drift, each.reference_ns, each.slack_ns, each.since, until)
            db.execute("INSERT INTO clock VALUES (?, ?, ?, ?, ?, ?, ?)", row)


def _during(clocks: list[Clock], logs: intake.Intake, source: int) -> list[Clock]:
    """The clocks that hold for some of a source's alerts, of those of the log that it is a part of."""
    mine = np.flatnonzero(np.array(logs.source) == source)
    return [each for each, until in _untils(clocks) if each.since <= mine[-1] and until > mine[0]]


def _untils(clocks: list[Clock]) -> Iterator[tuple[Clock, int]]:
    """Each with the alert from which on it holds no more."""
    return zip(clocks, [*(each.since for each in clocks[1:]), _EVER], strict=True)


def _weigh(db: duckdb.DuckDBPyConnection, logs: intake.Intake) -> Answers:
    # Beside hard evidence an open call counts for nothing, unless the destination tells how many such calls there were.
    rows = db.execute(
        f"""SELECT alert, call, tier, gap_ns, span_ns, reach, tells, named, used, watched FROM candidate
            WHERE tier < {score.HARD_TIERS} OR named OR used
              OR alert NOT IN (SELECT alert FROM candidate WHERE tier < {score.HARD_TIERS})
            ORDER BY alert, call"""
    ).fetchnumpy()
    said = db.execute(
        """SELECT t.start_ns, t.end_ns, t.slack_ns, a.end_ns - a.start_ns AS width_ns,
             t.informational, t.alert IN (SELECT alert FROM place WHERE known) AS known,
             CAST(hash(t.source, t.informational, t.src_ip, t.dst_ip) >> 1 AS BIGINT) AS between
           FROM timed t JOIN alert a USING (alert) ORDER BY alert"""
    ).fetchnumpy()
    informational, known = said["informational"].astype(bool), said["known"].astype(bool)
    strangers = db.sql(
        """SELECT t.alert, coalesce(inside_ip, src_ip) AS ip
           FROM timed t ANTI JOIN (FROM place WHERE known) USING (alert)"""
    ).to_arrow_table()
    ips = strangers["ip"].combine_chunks().dictionary_encode()
    private = np.array([*map(_private, ips.dictionary.to_pylist()), False])
    foreign = np.zeros(len(known), dtype=bool)
    foreign[strangers["alert"].to_numpy()] = private[ips.indices.fill_null(-1).to_numpy()]
    unmapped = np.zeros(len(known), dtype=bool)
    unmapped[db.execute("SELECT alert FROM unmapped").fetchnumpy()["alert"]] = True
    # An ordinary flow and an objection have nothing in common: each kind learns its own rates.
    group = np.array([each.log for each in logs.sources])[logs.source] * 4 + known * 2 + informational
    groups = 4 * len(logs.sources)
    episode = _episodes(said["between"], said["start_ns"])
    calls, room = _exposures(db, groups, group, said["start_ns"], said["end_ns"])
    # A socket that hangs under no call is its rollout's; where calls are always there, it is because one was lost.
    ((lost,),) = db.execute("SELECT coalesce(avg(CAST(call < 0 AS INTEGER)), 0.0) FROM flow").fetchall()
    probability, nobody = score.confidences(
        score.Rows(
            rows["alert"],
            rows["call"],
            rows["tier"].astype(np.int64),
            rows["gap_ns"],
            rows["span_ns"],
            rows["reach"].astype(np.int64),
            rows["tells"].astype(bool),
            rows["named"].astype(bool),
            rows["used"].astype(bool),
            rows["watched"].astype(bool),
        ),
        score.Groups(
            group,
            np.arange(groups) % 2,
            room,
            np.arange(groups) // 4,
            foreign | unmapped,
            said["slack_ns"],
            said["end_ns"] - said["start_ns"],
            said["start_ns"],
            episode,
            1.0 / np.bincount(episode)[episode],
            np.arange(groups) & 2 > 0,
        ),
        calls,
        lost=lost,
    )
    return Answers(db, logs, said, Facts(informational, known, unmapped), rows, probability, nobody)


def _episodes(between: Any, start: Any) -> Any:
    """Numbers alerts by the event they are part of: those between the same two, none long after the one before it."""
    order = np.lexsort((start, between))
    apart = np.diff(start[order]) > _TOGETHER_NS
    begins = np.concatenate([[True], (np.diff(between[order]) != 0) | apart])[: len(order)]
    episode = np.empty(len(order), dtype=np.int64)
    episode[order] = np.cumsum(begins) - 1
    return episode


def _exposures(db: duckdb.DuckDBPyConnection, groups: int, group: Any, start: Any, end: Any) -> tuple[Any, Any]:
    """(calls by whether they name a destination and by reach, machine-seconds of each group).

    A log need not begin and end with the traces: what it was silent of before its first record and after its last
    could not cause an alert in it, neither by calls nor by nobody's.
    """
    ((machines,),) = db.execute("SELECT count(*) FROM node").fetchall()
    ((first, last),) = db.execute("SELECT min(start_ns), max(end_ns) FROM alive").fetchall()
    first, last = (int(start.min()), int(end.max())) if first is None and len(start) else (first or 0, last or 0)
    room = np.ones(groups)
    heard = (first, last)
    if len(start):
        heard = _heard(start, end, first, last)
        for source in np.unique(group // 4):
            mine = group // 4 == source
            begin, until = _heard(start[mine], end[mine], first, last)
            for number in range(4 * source, 4 * source + 4):
                room[number] = max(until - begin, SECOND) / SECOND * (machines if number & 2 else 1)
    calls = np.zeros((2, 4))
    for tells, reach, count in db.execute(
        """SELECT coalesce(w.tells, false), coalesce(w.reach, 1), count(*) FROM alive a LEFT JOIN words w USING (call)
           WHERE a.end_ns >= ? AND a.start_ns <= ? GROUP BY ALL""",
        heard,
    ).fetchall():
        calls[int(tells), reach] = count
    return calls, room


def _heard(start: Any, end: Any, first: int, last: int) -> tuple[int, int]:
    """From when to when a log was written, judged by its records: few leave more open, and none more than the traces'
    span (``first`` to ``last``) and its own."""
    begin, until = int(start.min()), int(end.max())
    beyond = int((until - begin) / max(len(start) - 1, 1))
    if len(start) == 1:
        return min(begin, first), max(until, last)
    return min(begin, max(begin - beyond, first)), max(until, min(until + beyond, last))


#: what a job's machines may have for addresses; Python's is_private holds much more
_INSIDE: Final = tuple(map(ip_network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")))


def _private(address: str) -> bool:
    return any(ip_address(address) in network for network in _INSIDE)
