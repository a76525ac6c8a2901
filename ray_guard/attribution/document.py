"""The JSON that ``ray-guard attribute --json`` writes (CONTRACT.md, section 5). Runs later. Pure."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

from ray_guard.attribution import findings
from ray_guard.attribution.attribute import Attribution, Candidate, Result, Source
from ray_guard.attribution.recurrence import Recurrence
from ray_guard.attribution.reward import Association

SCHEMA: Final = 1
_SECOND: Final = 1_000_000_000


def document(result: Result) -> dict[str, Any]:
    """The whole answer as plain data."""
    caused = findings.causes(result)
    return {
        "schema": SCHEMA,
        "sources": [_source(each) for each in result.sources],
        "alerts": [_alert(each) for each in result.alerts],
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
    return {
        "within_group_difference": found.difference,
        "interval": None if found.interval is None else list(found.interval),
        "trend_per_iteration": found.trend,
        "groups": found.groups,
        "rollouts": found.rollouts,
        "violating_rollouts": found.violating,
        "rollouts_without_reward": found.unrewarded,
        "detectable_difference": found.detectable,
        "note": "an association within groups; filtered episodes are missing, and no cause is shown",
    }


def _source(source: Source) -> dict[str, Any]:
    clock = source.clock
    return {
        "path": source.path,
        "format": source.format,
        "records": source.records,
        "quarantined": source.report.quarantined.total(),
        "quarantine": dict(source.report.quarantined),
        "sha256": source.report.sha256,
        "clock_skew_s": _seconds(clock.skew_ns) if clock.identifiable else None,
        "clock_skew_interval_s": [_seconds(clock.low_ns), _seconds(clock.high_ns)] if clock.identifiable else None,
        "clock_drift_ppm": round(clock.drift * 1e6, 3) if clock.identifiable else None,
        "skew_identifiable": clock.identifiable,
    }


def _alert(alert: Attribution) -> dict[str, Any]:
    row: dict[str, Any] = {
        "source": alert.source.path,
        "record": alert.record,
        "byte_offset": alert.byte_offset,
        "time": [_iso(alert.start_ns), _iso(alert.end_ns)],
        "verdict": alert.verdict,
        "candidates": [_candidate(each) for each in alert.candidates],
        "unobserved": round(alert.unobserved, 6),
    }
    if alert.informational:
        row["informational"] = True
    return row


def _candidate(candidate: Candidate) -> dict[str, Any]:
    about = candidate.about
    return {
        "confidence": round(candidate.confidence, 6),
        "tier": candidate.tier,
        "run": about.get("run"),
        "iteration": about.get("iteration"),
        "group": about.get("group"),
        "rollout": about.get("rollout"),
        "turn": about.get("turn"),
        "tool": about.get("tool"),
        "call_id": about.get("call_id"),
        "trace_id": about.get("shown_trace_id", about.get("trace_id")),
        "span_id": about.get("span_id"),
        "evidence": candidate.evidence,
        "against": candidate.against,
    }


def _seconds(ns: int) -> float:
    return round(ns / _SECOND, 3)


def _iso(ns: int) -> str:
    """By the traces' clock, UTC, as many digits as there are."""
    seconds, rest = divmod(ns, _SECOND)
    text = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    digits = f"{rest:09d}".rstrip("0")
    return f"{text}.{digits}Z" if digits else f"{text}Z"
