"""The JSON that ``ray-guard attribute --json`` writes (CONTRACT.md, section 5). Runs later. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from json.encoder import encode_basestring_ascii as _quote
from typing import Any, Final, Protocol

from ray_guard.attribution import findings
from ray_guard.attribution.answers import Attribution, Candidate
from ray_guard.attribution.attribute import Map, Result
from ray_guard.attribution.clock import Clock
from ray_guard.attribution.intake import Source
from ray_guard.attribution.recurrence import Recurrence
from ray_guard.attribution.reward import Association

SCHEMA: Final = 1
_SECOND: Final = 1_000_000_000
_BLOCK: Final = 1000


class _Text(Protocol):
    def write(self, text: str, /) -> object: ...


def write(result: Result, out: _Text, findings: Mapping[str, Any]) -> None:
    """Writes the whole answer as JSON, alert by alert: it need never be in memory at once.

    Args:
        result: of the attribution.
        out: takes the text.
        findings: what :func:`found` made of it.
    """
    first = {"schema": SCHEMA, "sources": [_source(each) for each in result.sources]}
    if result.maps:
        first["maps"] = [_map(each) for each in result.maps]
    out.write(json.dumps(first, indent=1)[:-2] + ',\n "alerts": [')
    empty, block = True, []
    for alert in result.alerts:
        block.append(_alert(alert))
        if len(block) == _BLOCK:
            out.write(("" if empty else ",") + ",".join(block))
            empty, block = False, []
    if block:
        out.write(("" if empty else ",") + ",".join(block))
        empty = False
    out.write("]" if empty else "\n ]")
    out.write("," + json.dumps(findings, indent=1)[1:] + "\n")


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


def _alert(alert: Attribution) -> str:
    """As ``json.dumps`` with an indent of 1 writes it; that takes five times as long."""
    candidates = ",".join(map(_candidate, alert.candidates))
    quiet = ',\n   "informational": true' if alert.informational else ""
    return (
        f'\n  {{\n   "source": {_quote(alert.source.path)},\n   "record": {alert.record},\n   "byte_offset": '
        f'{alert.byte_offset},\n   "time": [\n    "{_iso(alert.start_ns)}",\n    "{_iso(alert.end_ns)}"\n   ],\n'
        f'   "verdict": "{alert.verdict}",\n   "candidates": [{candidates}{candidates and _CLOSE}],\n'
        f'   "unobserved": {round(alert.unobserved, 6)!r}{quiet}\n  }}'
    )


_CLOSE: Final = "\n   "


def _candidate(candidate: Candidate) -> str:
    about = candidate.about
    trace = about.get("shown_trace_id", about.get("trace_id"))
    return (
        f'\n    {{\n     "confidence": {round(candidate.confidence, 6)!r},\n     "tier": "{candidate.tier}",\n'
        f'     "run": {_value(about["run"])},\n     "iteration": {_value(about["iteration"])},\n'
        f'     "group": {_value(about["group"])},\n     "rollout": {_value(about["rollout"])},\n'
        f'     "turn": {_value(about["turn"])},\n     "tool": {_value(about["tool"])},\n'
        f'     "call_id": {_value(about["call_id"])},\n     "trace_id": {_value(trace)},\n'
        f'     "span_id": {_value(about["span_id"])},\n'
        f'     "evidence": {_list(candidate.evidence)},\n     "against": {_list(candidate.against)}\n    }}'
    )


def _value(value: str | int | None) -> str:
    return "null" if value is None else _quote(value) if isinstance(value, str) else repr(value)


def _list(said: list[str]) -> str:
    return "[\n      " + ",\n      ".join(map(_quote, said)) + "\n     ]" if said else "[]"


def _seconds(ns: int) -> float:
    return round(ns / _SECOND, 3)


def _iso(ns: int) -> str:
    """By the traces' clock, UTC, as many digits as there are."""
    seconds, rest = divmod(ns, _SECOND)
    digits = f"{rest:09d}".rstrip("0")
    return f"{_second(seconds)}.{digits}Z" if digits else f"{_second(seconds)}Z"


@lru_cache(maxsize=4096)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
