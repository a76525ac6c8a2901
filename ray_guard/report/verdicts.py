"""What ``ray-guard attribute`` prints: each source and its clock, then a line for each alert. Runs later. Pure.

Lines are put together by column, as in :mod:`ray_guard.attribution.document`: there may be a million.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_guard.attribution.answers import SAID, VERDICTS, Block
from ray_guard.attribution.attribute import Map, Result
from ray_guard.attribution.document import numbers, put_together
from ray_guard.attribution.intake import Source
from ray_guard.report import causes
from ray_guard.report.text import counted, printable

_SECOND: Final = 1_000_000_000


def summary(result: Result) -> Iterator[str]:
    """The text, in parts of many lines each; informational records are counted and not listed."""
    yield _lines(_heading(result))
    paths = pa.array([each.path for each in result.alerts.sources], pa.string())
    for part in result.alerts.parted(np.flatnonzero(~result.alerts.informational)):
        yield _lines(_alerts(result.alerts.block(part), paths).to_pylist())


def _lines(lines: list[str]) -> str:
    if not "".join(lines).isprintable():
        lines = list(map(printable, lines))
    return "\n".join([*lines, ""])


def _heading(result: Result) -> list[str]:
    lines = [*map(_source, result.sources), *map(_map, result.maps)]
    for report in result.reports:
        firsts = {each.reason: each for each in reversed(report.first)}
        for first in sorted(firsts.values(), key=lambda each: each.line):
            count = report.quarantined[first.reason]
            lines.append(
                f"{report.path}: {count} quarantined as {first.reason}, first in line {first.line}: {first.detail}"
            )
    if result.quarantine.total:
        lines.append(f"traces: {counted(result.quarantine.counts)} quarantined")
    lines += causes.beware(result)
    quiet = result.alerts.informational
    counts = Counter(result.alerts.verdicts()[~quiet].tolist())
    return [*lines, f"{counted(counts) or 'no alerts'}; {quiet.sum()} informational records"]


def _source(source: Source) -> str:
    clock = source.clock
    skew = f"{clock.skew_ns / _SECOND:+.1f} s" if clock.identifiable else "not identifiable"
    if clock.bounded and not clock.identifiable:
        skew += f" between {clock.low_ns / _SECOND:+.1f} and {clock.high_ns / _SECOND:+.1f} s"
    for later in source.clocks[1:]:
        skew += f", set in between to {later.skew_ns / _SECOND:+.1f} s"
    left = source.report.quarantined.total()
    return f"{source.path}: {source.format}, {source.records} records, {left} quarantined, clock skew {skew}"


def _map(given: Map) -> str:
    left = given.report.quarantined.total()
    skew = f"clock skew {given.clock.skew_ns / _SECOND:+.1f} s" if given.own_clock else "clock taken to be the logs'"
    return f"{given.report.path}: NAT map, {given.translations} translations, {left} quarantined, {skew}"


#: what a call is called: here, and among its columns
_NAMES: Final = {name: name for name in ("iteration", "group", "rollout", "turn", "tool")} | {"call": "call_id"}
_TIERS: Final = pa.array([f" ({each.tier}): " for each in SAID])
_HUNDREDTHS: Final = pa.array([f"{each / 100:.2f}" for each in range(101)])


def _alerts(block: Block, paths: pa.Array) -> pa.Array:
    nobody = block.verdict == VERDICTS.index("unobserved")
    where = put_together(paths.take(pa.array(block.source)), ":", numbers(block.record), "  ")
    first = np.concatenate([[0], block.until[:-1]])[~nobody]  # one that is nobody's need have no candidate
    about = [
        put_together(f"{name} ", block.about[column].combine_chunks().cast(pa.string()))
        for name, column in _NAMES.items()
    ]
    whose = pc.binary_join_element_wise(*about, ", ", null_handling="skip")
    answers = pc.if_else(
        pa.array(nobody), put_together("nobody in this job (", _hundredths(block.unobserved), ")"), None
    )
    named = put_together(
        pa.array(VERDICTS).take(pa.array(block.verdict[~nobody])), " ", _hundredths(block.confidence[first]),
        _TIERS.take(pa.array(block.said[first])), whose.take(pa.array(block.of[first])),
    )  # fmt: skip
    return put_together(where, pc.replace_with_mask(answers, pa.array(~nobody), named))


def _hundredths(shares: np.ndarray) -> pa.Array:
    return _HUNDREDTHS.take(pa.array(np.rint(shares * 100).astype(np.int64)))
