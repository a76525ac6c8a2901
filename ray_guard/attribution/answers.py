"""What is said of each record, kept as columns and made into objects when asked. Runs later, on any machine.

A candidate is listed until :data:`ENOUGH` of the probability is named, and no more than :data:`MOST`; what is not
listed any more is shared out, so that what is shown sums to one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, overload

import duckdb
import numpy as np

from ray_guard.attribution.candidates import TIERS
from ray_guard.attribution.intake import Intake, Source

ENOUGH: Final = 0.995
MOST: Final = 500
ATTRIBUTED: Final = 0.8
UNOBSERVED: Final = 0.5
_BLOCK: Final = 10_000
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
    candidates: list[Candidate]
    unobserved: float

    @property
    def verdict(self) -> str:
        if self.candidates and self.candidates[0].confidence >= ATTRIBUTED:
            return "attributed"
        return "unobserved" if self.unobserved >= UNOBSERVED else "ambiguous"


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
        rows: the candidates: alert, call, tier, gap_ns, reach, named, used, watched, in any order.
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
        self._intake, self._times = intake, times
        self._facts, self.informational = facts, facts.informational
        count = len(intake.source)
        order = np.lexsort((rows["call"], -probability, rows["alert"]))
        begin = np.searchsorted(rows["alert"][order], np.arange(count + 1))
        listed, named = _listed(begin, probability[order], nobody)
        scale = np.divide(1.0, named, out=np.ones(count), where=named > 0)
        self.unobserved = nobody * scale
        # Rows that nobody will see are let go.
        place = np.arange(len(order)) - np.repeat(begin[:-1], np.diff(begin))
        order = order[place < np.repeat(listed, np.diff(begin))]
        self._begin = np.concatenate([[0], np.cumsum(listed)])
        self._rows = {
            name: rows[name][order] for name in ("call", "tier", "gap_ns", "reach", "named", "used", "watched")
        }
        self._confidence = probability[order] * np.repeat(scale, listed)
        self._about = _About(db, np.unique(self._rows["call"]))

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
        for first in range(0, len(numbers), _BLOCK):
            yield from self._block(numbers[first : first + _BLOCK])

    def line(self, number: int) -> bytes:
        """A record's line."""
        return self._intake.lines[number]

    def firsts(self) -> tuple[Any, Any]:
        """(confidence of each record's first candidate, 0 where it has none; that candidate's call)."""
        some = np.diff(self._begin) > 0
        confidence, call = np.zeros(len(self)), np.zeros(len(self), dtype=np.int64)
        confidence[some] = self._confidence[self._begin[:-1][some]]
        call[some] = self._rows["call"][self._begin[:-1][some]]
        return confidence, call

    def verdicts(self) -> Any:
        """The verdict of each record."""
        confidence, _ = self.firsts()
        return np.where(
            confidence >= ATTRIBUTED, "attributed", np.where(self.unobserved >= UNOBSERVED, "unobserved", "ambiguous")
        )

    def middles(self) -> Any:
        """The middle of each record's own interval, by the traces' clock, in Unix nanoseconds."""
        return self._times["end_ns"] - self._times["width_ns"] // 2

    def _block(self, numbers: Any) -> Iterator[Attribution]:
        intake, begin = self._intake, self._begin[numbers]
        size = self._begin[numbers + 1] - begin
        until = np.cumsum(size)
        rows = np.repeat(begin - until + size, size) + np.arange(until[-1])
        about = self._about.of(self._rows["call"][rows])
        columns = [column[rows].tolist() for column in self._rows.values()]
        columns += [np.repeat(said[numbers], size).tolist() for said in (self._facts.placed, self._facts.unmapped)]
        candidates = [
            _candidate(confidence, each, *row)
            for confidence, each, row in zip(
                self._confidence[rows].tolist(), about, zip(*columns, strict=True), strict=True
            )
        ]
        times = [self._times[name][numbers].tolist() for name in ("width_ns", "start_ns", "end_ns")]
        facts = zip(
            numbers.tolist(),
            *times,
            self.informational[numbers].tolist(),
            self.unobserved[numbers].tolist(),
            (until - size).tolist(),
            until.tolist(),
            strict=True,
        )
        for number, width, start, end, quiet, unobserved, first, last in facts:
            yield Attribution(
                intake.sources[intake.source[number]],
                intake.record[number],
                intake.offset[number],
                width,
                start,
                end,
                quiet,
                candidates[first:last],
                unobserved,
            )


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
        self._table = self._table.sort_by("call").combine_chunks()
        self._calls = self._table["call"].to_numpy()

    def of(self, calls: Any) -> list[dict[str, Any]]:
        """What each is called, in the order asked; one dict for one call, however often it is asked."""
        distinct, back = np.unique(calls, return_inverse=True)
        rows = self._table.take(np.searchsorted(self._calls, distinct))
        columns = (rows[name].to_pylist() for name in rows.column_names)
        made = [dict(zip(rows.column_names, row, strict=True)) for row in zip(*columns, strict=True)]
        return [made[n] for n in back.tolist()]


_TIER_SAYS: Final = {
    "socket": "the supervisor recorded this very socket in this call",
    "nat": "behind the NAT map stands a socket that was recorded in this call",
    "process": "the process that the sensor names was started by this call",
    "interval": "the call was open on that machine at that time",
}


def _candidate(  # noqa: PLR0917 - the columns of one row
    confidence: float,
    about: dict[str, Any],
    call: int,
    rung: int,
    gap: int,
    reach: int,
    named: bool,  # noqa: FBT001
    used: bool,  # noqa: FBT001
    watched: bool,  # noqa: FBT001
    placed: bool,  # noqa: FBT001
    unmapped: bool,  # noqa: FBT001
) -> Candidate:
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
        against.append("the NAT map knows no machine behind this port at that time")
    if gap:
        against.append(f"{gap / _SECOND:.3g} s outside its life, by the corrected clock")
    return Candidate(confidence, tier, call, about, evidence, against)
