"""What is said of each record, kept as columns and made into objects when asked. Runs later, on any machine.

A candidate is listed until :data:`ENOUGH` of the probability is named, and no more than :data:`MOST`; what is not
listed any more is shared out, so that what is shown sums to one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Final, NamedTuple, overload

import duckdb
import numpy as np
import pyarrow as pa

from ray_guard.attribution.candidates import TIERS
from ray_guard.attribution.intake import Intake, Source

ENOUGH: Final = 0.995
MOST: Final = 500
ATTRIBUTED: Final = 0.8
UNOBSERVED: Final = 0.5
VERDICTS: Final = ("attributed", "unobserved", "ambiguous")
_BLOCK: Final = 10_000
"""Records and candidates that are made into text or objects at a time."""
_SECOND: Final = 1_000_000_000


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
    """One record's answer. ``width_ns``: how long its own interval is, before what its semantics leave open."""

    source: Source
    record: int
    byte_offset: int
    width_ns: int
    start_ns: int
    end_ns: int
    informational: bool
    verdict: str
    candidates: list[Candidate]
    unobserved: float


class Block(NamedTuple):
    """Some records' answers as columns: first what is said of each record, then of each of their candidates.

    Args:
        source: number of the source.
        verdict: number in :data:`VERDICTS`.
        until: how many candidates there are up to the record's last.
        said: number in :data:`SAID`.
        of: row of ``about``.
        about: what calls are called, each once.
    """

    source: Any
    record: Any
    byte_offset: Any
    width_ns: Any
    start_ns: Any
    end_ns: Any
    informational: Any
    verdict: Any
    unobserved: Any
    until: Any
    confidence: Any
    call: Any
    said: Any
    gap_ns: Any
    of: Any
    about: pa.Table


class Facts(NamedTuple):
    """What is known of each record, arrays of one length.

    Args:
        informational: nobody objected.
        placed: it says which machine of the job it is of.
        unmapped: of an address whose NAT map knows nobody for its port.
    """

    informational: Any
    placed: Any
    unmapped: Any


class Answers(Sequence[Attribution]):
    """The answers, in the records' order.

    Args:
        db: the store, for what calls are called.
        intake: the records.
        times: start_ns, end_ns (by the traces' clock) and width_ns of each.
        facts: of each record.
        rows: the candidates: alert, call, tier, gap_ns, reach, named, used, watched, by alert and call.
        probability: of each row.
        nobody: of each record.
    """

    def __init__(  # noqa: PLR0917 - the columns of one table
        self,
        db: duckdb.DuckDBPyConnection,
        intake: Intake,
        times: Any,
        facts: Facts,
        rows: Any,
        probability: Any,
        nobody: Any,
    ) -> None:
        self._intake, self._times, self.informational = intake, times, facts.informational
        self._place = [np.asarray(each) for each in (intake.source, intake.record, intake.offset)]
        count = len(intake.source)
        order = np.lexsort((-probability, rows["alert"]))  # stable: where alike, by call
        begin = np.searchsorted(rows["alert"][order], np.arange(count + 1))
        listed, named = _listed(begin, probability[order], nobody)
        scale = np.divide(1.0, named, out=np.ones(count), where=named > 0)
        self.unobserved = nobody * scale
        # Rows that nobody will see are let go.
        place = np.arange(len(order)) - np.repeat(begin[:-1], np.diff(begin))
        order = order[place < np.repeat(listed, np.diff(begin))]
        self._begin = np.concatenate([[0], np.cumsum(listed)])
        self._call, self._gap = rows["call"][order], rows["gap_ns"][order]
        told = [rows[name][order] for name in ("tier", "reach", "named", "used", "watched")]
        told += [np.repeat(each, listed) for each in (facts.placed, facts.unmapped)]
        self._said = np.ravel_multi_index([each.astype(np.int16) for each in told], _SHAPE).astype(np.int16)
        self._confidence = probability[order] * np.repeat(scale, listed)
        self._about = _About(db, _distinct(self._call))
        first, _ = self.firsts()
        self._verdict = np.select([first >= ATTRIBUTED, self.unobserved >= UNOBSERVED], [0, 1], 2)

    def __len__(self) -> int:
        return len(self._intake.source)

    @overload
    def __getitem__(self, index: int) -> Attribution: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Attribution]: ...
    def __getitem__(self, index: int | slice) -> Attribution | Sequence[Attribution]:
        if isinstance(index, slice):
            return [self[n] for n in range(*index.indices(len(self)))]
        return next(self.of(np.arange(len(self))[index : index + 1 or None]))

    def __iter__(self) -> Iterator[Attribution]:
        return self.of(np.arange(len(self)))

    def of(self, numbers: Any) -> Iterator[Attribution]:
        """The answers of some records, in the order asked."""
        for part in self.parted(numbers):
            yield from _objects(self.block(part), self._intake.sources)

    def parted(self, numbers: Any) -> list[Any]:
        """The same numbers, in parts that are each a block's."""
        rows = np.cumsum(1 + np.diff(self._begin)[numbers])
        return [part for part in np.split(numbers, np.flatnonzero(np.diff(rows // _BLOCK)) + 1) if len(part)]

    def block(self, numbers: Any) -> Block:
        """The answers of some records as columns."""
        begin = self._begin[numbers]
        size = self._begin[numbers + 1] - begin
        until = np.cumsum(size)
        rows = np.repeat(begin - until + size, size) + np.arange(until[-1])
        about, of = self._about.of(self._call[rows])
        columns = (
            *(each[numbers] for each in self._place),
            *(self._times[name][numbers] for name in ("width_ns", "start_ns", "end_ns")),
            self.informational[numbers],
            self._verdict[numbers],
            self.unobserved[numbers],
            until,
            *(each[rows] for each in (self._confidence, self._call, self._said, self._gap)),
            of,
            about,
        )
        return Block._make(columns)

    @property
    def sources(self) -> Sequence[Source]:
        """By number."""
        return self._intake.sources

    def line(self, number: int) -> bytes:
        """A record's line."""
        return self._intake.lines[number]

    def firsts(self) -> tuple[Any, Any]:
        """(confidence of each record's first candidate, 0 where it has none; that candidate's call)."""
        some = np.diff(self._begin) > 0
        confidence, call = np.zeros(len(self)), np.zeros(len(self), dtype=np.int64)
        confidence[some] = self._confidence[self._begin[:-1][some]]
        call[some] = self._call[self._begin[:-1][some]]
        return confidence, call

    def verdicts(self) -> Any:
        """The verdict of each record."""
        return np.array(VERDICTS)[self._verdict]

    def middles(self) -> Any:
        """The middle of each record's own interval, by the traces' clock, in Unix nanoseconds."""
        return self._times["end_ns"] - self._times["width_ns"] // 2


def _distinct(calls: Any) -> Any:
    """In order. Calls are numbered nearly without holes: what is there is ticked off, ten times as fast as sorted."""
    if not len(calls):
        return calls
    least = calls.min()
    there = np.zeros(calls.max() - least + 1, dtype=bool)
    there[calls - least] = True
    return np.flatnonzero(there) + least


def _listed(begin: Any, probability: Any, nobody: Any) -> tuple[Any, Any]:
    """(how many candidates of each record are listed, how much of the probability they and nobody name)."""
    count, size = np.zeros(len(nobody), dtype=np.int64), np.diff(begin)
    named = nobody.astype(np.float64).copy()
    going = np.flatnonzero(size > 0)
    rank = 0
    while len(going) and rank < MOST:
        named[going] += probability[begin[going] + rank]
        count[going] += 1
        rank += 1
        going = going[(named[going] < ENOUGH) & (size[going] > rank)]
    return count, named


class _About:
    """What calls and rollouts are called, by number."""

    def __init__(self, db: duckdb.DuckDBPyConnection, calls: Any) -> None:
        db.register("wanted_calls", {"call": calls})
        self._table = db.sql(
            """SELECT c.call, run, iteration, "group", rollout, turn, tool, call_id, trace_id, span_id, policy_version,
                 shown_trace_id
               FROM call c JOIN wanted_calls w ON w.call = c.call
               UNION ALL
               SELECT r.call, run, iteration, "group", rollout, NULL, NULL, NULL, trace_id, NULL, policy_version,
                 trace_id
               FROM rollout r JOIN wanted_calls w ON w.call = r.call"""
        ).to_arrow_table()
        db.unregister("wanted_calls")
        self._table = self._table.combine_chunks()
        calls = self._table["call"].to_numpy()
        self._order = np.argsort(calls)
        self._calls = calls[self._order]

    def of(self, calls: Any) -> tuple[pa.Table, Any]:
        """(what each is called, one row for one call, however often it is asked; the row of each call asked)."""
        distinct, back = np.unique(calls, return_inverse=True)
        return self._table.take(self._order[np.searchsorted(self._calls, distinct)]), back


class Said(NamedTuple):
    """What is said of a candidate without numbers."""

    tier: str
    evidence: tuple[str, ...]
    against: tuple[str, ...]


_TIER_SAYS: Final = {
    "socket": "the supervisor recorded this very socket in this call",
    "nat": "behind the NAT map stands a socket that was recorded in this call",
    "process": "the process that the sensor names was started by this call",
    "interval": "the call was open on that machine at that time",
}


def _said(rung: int, reach: int, *facts: int) -> Said:
    named, used, watched, placed, unmapped = facts
    tier = TIERS[rung]
    evidence, against = [], []
    if tier == "interval" and (named or used):
        tier = "destination"
    if tier == "interval" and not placed:
        evidence.append("the call was open at that time; the record does not tell the machine")
    elif tier in _TIER_SAYS:
        evidence.append(_TIER_SAYS[tier])
    if used and tier not in ("socket", "nat"):
        evidence.append("a socket to that destination was recorded in this call")
    if named:
        evidence.append("the command names the destination")
    if tier in ("destination", "interval"):
        if reach == 3:
            evidence.append("the command tunnels, mines or scans")
        elif reach == 2:
            evidence.append("the command uses the network")
        elif reach == 0:
            against.append("the command does not use the network by itself")
        if watched and not used:
            against.append("sockets of its rollout were recorded, none of this call to this destination")
    if unmapped and tier in ("destination", "interval"):
        against.append("the NAT map knows no machine of this job there at that time")
    return Said(tier, tuple(evidence), tuple(against))


_SHAPE: Final = (len(TIERS), 4, 2, 2, 2, 2, 2)
"""Tier, reach, named, used, watched, placed, unmapped."""
SAID: Final = tuple(_said(*each) for each in product(*map(range, _SHAPE)))


def outside(gap_ns: int) -> str:
    """What speaks against a candidate that was not alive then."""
    return f"{gap_ns / _SECOND:.3g} s outside its life, by the corrected clock"


def _objects(block: Block, sources: Sequence[Source]) -> Iterator[Attribution]:
    names = block.about.column_names
    columns = (block.about[name].to_pylist() for name in names)
    about = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    candidates = []
    for confidence, call, number, gap, of in zip(
        *(each.tolist() for each in (block.confidence, block.call, block.said, block.gap_ns, block.of)), strict=True
    ):
        tier, evidence, against = SAID[number]
        against = (*against, outside(gap)) if gap else against
        candidates.append(Candidate(confidence, tier, call, about[of], list(evidence), list(against)))
    first = 0
    for source, record, offset, width, start, end, quiet, verdict, unobserved, until in zip(
        *(each.tolist() for each in block[:10]), strict=True
    ):
        mine = candidates[first:until]
        yield Attribution(
            sources[source], record, offset, width, start, end, quiet, VERDICTS[verdict], mine, unobserved
        )
        first = until
