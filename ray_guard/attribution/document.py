"""The JSON that ``ray-guard attribute --json`` writes (CONTRACT.md, section 5). Runs later. Pure.

As ``json.dumps`` with an indent of 1 writes it, but by column: Arrow puts texts together twenty times as fast as an
encoder that looks at each object, and without the interpreter, so that all processors do it at once.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from json.encoder import encode_basestring_ascii as _quote
from typing import Any, Final, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_guard.attribution import findings
from ray_guard.attribution.answers import SAID, VERDICTS, Answers, Block, Said, outside
from ray_guard.attribution.attribute import Map, Result
from ray_guard.attribution.clock import Clock
from ray_guard.attribution.intake import Source
from ray_guard.attribution.recurrence import Recurrence
from ray_guard.attribution.reward import Association

SCHEMA: Final = 1
_SECOND: Final = 1_000_000_000


class _Bytes(Protocol):
    def write(self, text: Any, /) -> object: ...


def write(result: Result, out: _Bytes, findings: Callable[[], Mapping[str, Any]]) -> None:
    """Writes the whole answer as JSON, block by block: it need never be in memory at once.

    Args:
        result: of the attribution.
        out: takes the text, as bytes or what has them.
        findings: asked, when all alerts are written, for what :func:`found` made of them.
    """
    first = {"schema": SCHEMA, "sources": [_source(each) for each in result.sources]}
    if result.maps:
        first["maps"] = [_map(each) for each in result.maps]
    out.write((json.dumps(first, indent=1)[:-2] + ',\n "alerts": [').encode())
    comma = 1  # before each alert but the first
    for text in _texts(result.alerts):
        out.write(memoryview(text)[comma:])
        comma = 0
    out.write(b"]" if comma else b"\n ]")
    out.write(("," + json.dumps(findings(), indent=1)[1:] + "\n").encode())


def _texts(alerts: Answers) -> Iterator[pa.Buffer]:
    """The text of all alerts, a comma before each."""
    processors = len(os.sched_getaffinity(0))
    sources = pa.array([_quote(each.path) for each in alerts.sources])
    ahead: deque[Future[pa.Buffer]] = deque()
    with ThreadPoolExecutor(processors) as pool:
        for part in alerts.parted(np.arange(len(alerts))):
            ahead.append(pool.submit(lambda part: _alerts(alerts.block(part), sources), part))
            if len(ahead) > processors:
                yield ahead.popleft().result()
        for each in ahead:
            yield each.result()


def found(result: Result) -> dict[str, Any]:
    """What is said of all alerts together: recurrence, reward, and what of the traces could not be read."""
    caused = findings.causes(result)
    return {
        "recurrence": [_recurrence(each) for each in findings.recurrences(result, caused)],
        "reward": _reward(findings.association(result, caused)),
        "traces": {"quarantined": dict(result.quarantine.counts)},
    }


def _recurrence(found: Recurrence) -> dict[str, Any]:
    return {
        "dimension": found.dimension,
        "pattern": found.pattern,
        "tool": found.tool,
        "alerts": found.alerts,
        "calls": found.calls,
        "p_value": found.p_value,
        "q_value": found.q_value,
    }


def _reward(found: Association) -> dict[str, Any]:
    reward, advantage = found.reward, found.advantage
    return {
        "within_group_difference": reward.mean,
        "interval": None if reward.interval is None else list(reward.interval),
        "trend_per_iteration": found.trend,
        "trend_interval": None if found.trend_interval is None else list(found.trend_interval),
        "groups": reward.groups,
        "groups_of_one_reward": reward.even,
        "rollouts": found.rollouts,
        "violating_rollouts": found.violating,
        "rollouts_without_reward": found.unrewarded,
        "violating_rollouts_without_reward": found.violating_unrewarded,
        "detectable_difference": reward.detectable,
        "advantage_difference": advantage.mean,
        "advantage_interval": None if advantage.interval is None else list(advantage.interval),
        "note": _NOTE,
    }


_NOTE: Final = (
    "an association within groups, and no cause is shown; what a trainer filtered out before it was recorded is "
    "missing: groups whose rewards were all alike, and episodes that were cut short"
)


def _source(source: Source) -> dict[str, Any]:
    steps = [_step(*each) for each in zip(source.set_at, source.clocks[1:], strict=True)]
    return {
        "path": source.path,
        "format": source.format,
        "records": source.records,
        "quarantined": source.report.quarantined.total(),
        "quarantine": dict(source.report.quarantined),
        "sha256": source.report.sha256,
        **_clock(source.clock, source.clock.identifiable),
        **({"clock_steps": steps} if steps else {}),
    }


def _step(record: int, clock: Clock) -> dict[str, Any]:
    """A clock that holds from a record on, after it was set."""
    return {"record": record, **_clock(clock, clock.identifiable)}


def _map(given: Map) -> dict[str, Any]:
    return {
        "path": given.report.path,
        "translations": given.translations,
        "quarantined": given.report.quarantined.total(),
        "quarantine": dict(given.report.quarantined),
        "sha256": given.report.sha256,
        **_clock(given.clock, given.own_clock),
    }


def _clock(clock: Clock, told: bool) -> dict[str, Any]:  # noqa: FBT001
    return {
        "clock_skew_s": _seconds(clock.skew_ns) if told else None,
        "clock_skew_interval_s": [_seconds(clock.low_ns), _seconds(clock.high_ns)] if clock.bounded else None,
        "clock_drift_ppm": round(clock.drift * 1e6, 3) if told else None,
        "skew_identifiable": told,
    }


def _seconds(ns: int) -> float:
    return round(ns / _SECOND, 3)


def _alerts(block: Block, sources: pa.Array) -> pa.Buffer:
    candidates = _candidates(block)
    until = np.concatenate([[0], block.until])
    texts = put_together(
        ',\n  {\n   "source": ', sources.take(pa.array(block.source)),
        ',\n   "record": ', numbers(block.record),
        ',\n   "byte_offset": ', numbers(block.byte_offset),
        ',\n   "time": [\n    "', _times(block.start_ns),
        '",\n    "', _times(block.end_ns),
        '"\n   ],\n   "verdict": "', _VERDICTS.take(pa.array(block.verdict)),
        '",\n   "candidates": [', pc.binary_join(pa.ListArray.from_arrays(until.astype(np.int32), candidates), ","),
        _CLOSE.take(pa.array(np.diff(until) > 0).cast(pa.int8())),
        '],\n   "unobserved": ', _shares(block.unobserved),
        _QUIET.take(pa.array(block.informational).cast(pa.int8())),
        "\n  }",
    )  # fmt: skip
    return pc.binary_join(pa.ListArray.from_arrays([0, len(texts)], texts), "")[0].as_buffer()


_VERDICTS: Final = pa.array(VERDICTS)
_CLOSE: Final = pa.array(["", "\n   "])
_QUIET: Final = pa.array(["", ',\n   "informational": true'])


def _candidates(block: Block) -> pa.Array:
    about = (
        part
        for name, column in _ABOUT.items()
        for part in (f',\n     "{name}": ', _values(block.about[column].combine_chunks()))
    )
    said, closing = pa.array(block.said), pa.array(2 * block.said + (block.gap_ns > 0))
    gaps, of_gap = np.unique(block.gap_ns, return_inverse=True)
    outsides = pa.array([outside(gap) if gap else "" for gap in gaps.tolist()], pa.string())
    return put_together(
        '\n    {\n     "confidence": ', _shares(block.confidence),
        ',\n     "tier": "', _TIERS.take(said), '"',
        put_together(*about).take(pa.array(block.of)),
        _BEFORE_GAP.take(closing), outsides.take(pa.array(of_gap)), _AFTER_GAP.take(closing),
    )  # fmt: skip


#: of a candidate: its name here, and among what calls are called
_ABOUT: Final = {name: name for name in ("run", "iteration", "group", "rollout", "turn", "tool", "call_id")} | {
    "trace_id": "shown_trace_id",
    "span_id": "span_id",
}
_GAP: Final = "GAP"


def _closing(said: Said, *more: str) -> tuple[str, str, str]:
    """A candidate from its evidence on: up to what is said of its gap, that, and what follows."""
    text = f',\n     "evidence": {_list(said.evidence)},\n     "against": {_list([*said.against, *more])}\n    }}'
    return text.partition(_GAP)


def _list(said: Sequence[str]) -> str:
    return "[\n      " + ",\n      ".join(map(_quote, said)) + "\n     ]" if said else "[]"


_TIERS: Final = pa.array([each.tier for each in SAID])
#: twice as many: where there is no gap, and where there is one
_CLOSINGS: Final = [_closing(each, *gap) for each in SAID for gap in ((), (_GAP,))]
_BEFORE_GAP: Final = pa.array([before for before, _, _ in _CLOSINGS])
_AFTER_GAP: Final = pa.array([after for _, _, after in _CLOSINGS])


def put_together(*parts: pa.Array | str) -> pa.Array:
    """One text of several columns, row by row."""
    return pc.binary_join_element_wise(*parts, "")


def numbers(column: Any) -> pa.Array:
    """As text."""
    return pa.array(column).cast(pa.string())


def _shares(column: Any) -> pa.Array:
    """As Python writes a number of six digits."""
    distinct, back = np.unique(column.round(6), return_inverse=True)
    return pa.array(map(repr, distinct.tolist()), pa.string()).take(pa.array(back))


def _times(column: Any) -> pa.Array:
    """By the traces' clock, UTC, as many digits as there are."""
    text = pa.array(column.astype("datetime64[ns]")).cast(pa.string())
    text = pc.binary_replace_slice(text.cast(pa.binary()), 10, 11, b"T").cast(pa.string())
    return put_together(pc.utf8_rtrim(pc.utf8_rtrim(text, "0"), "."), "Z")


#: bytes that are not themselves in JSON
_ESCAPED: Final = np.array([_quote(chr(byte)) != f'"{chr(byte)}"' for byte in range(256)])


def _values(column: pa.Array) -> pa.Array:
    """Each as JSON writes it."""
    if pa.types.is_integer(column.type):
        text = column.cast(pa.string())
    elif _ESCAPED[np.frombuffer(column.buffers()[2] or b"", np.uint8)].any():
        distinct = column.dictionary_encode()
        text = pa.array(map(_quote, distinct.dictionary.to_pylist()), pa.string()).take(distinct.indices)
    else:
        text = put_together('"', column, '"')
    return text.fill_null("null")
