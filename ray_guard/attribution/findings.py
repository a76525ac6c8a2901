"""What many attributions say together: recurrence, and reward against violation. Runs later, on any machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Final

import numpy as np

from ray_guard.attribution import recurrence, reward
from ray_guard.attribution.attribute import Result
from ray_guard.attribution.prior import template

_CAUSE: Final = 0.5
"""A call is taken for an alert's cause where that is likelier than not."""


def causes(result: Result) -> Counter[int]:
    """Alerts by the call (below zero: the rollout) that most likely caused them; informational records stay out."""
    confidence, call = result.alerts.firsts()
    blamed = call[~result.alerts.informational & (confidence > _CAUSE)]
    numbers, counts = np.unique(blamed, return_counts=True)
    return Counter(dict(zip(numbers.tolist(), counts.tolist(), strict=True)))


def recurrences(result: Result, caused: Counter[int]) -> list[recurrence.Recurrence]:
    """Patterns of commands, tools, tasks and checkpoints, over all calls of the strata in which there were alerts."""
    return recurrence.enriched(_calls(result, caused))


def _calls(result: Result, caused: Counter[int]) -> Iterator[recurrence.Call]:
    if not caused:
        return
    _name_causing(result, caused)
    rows = result.db.execute(
        """SELECT c.call, c.iteration, c.node, c.tool, w.text, c."group", c.policy_version
           FROM call c JOIN words w USING (call)
           WHERE (c.iteration, c.node) IN (SELECT (d.iteration, d.node) FROM call d JOIN causing USING (call))
              OR c.call IN (SELECT call FROM causing)"""
    ).fetchall()
    known: dict[str, str] = {}
    for call, iteration, node, tool, text, group, version in rows:
        words = known.setdefault(text, template(text) if text else "")
        patterns = [("tool", tool or "", tool or "")]
        if words:
            patterns.append(("command", words, tool or ""))
        if group:
            patterns.append(("task", group, ""))
        alerts = caused.get(call, 0)
        yield recurrence.Call((iteration, node), tuple(patterns), alerts)
        if version:
            yield recurrence.Call(("checkpoints", node), (("checkpoint", version, ""),), alerts)


def association(result: Result, caused: Counter[int]) -> reward.Association:
    """Reward against violation, over all rollouts of the traces."""
    _name_causing(result, caused)
    rows = result.db.execute(
        """WITH violating AS (
             SELECT trace_id FROM call JOIN causing USING (call)
             UNION SELECT trace_id FROM rollout JOIN causing USING (call)),
           told AS (
             SELECT trace_id, any_value(TRY_CAST(attributes['rl.reward.score'] AS DOUBLE)) AS score FROM span
             WHERE name LIKE 'invoke_agent%' GROUP BY trace_id)
           SELECT r."group", r.iteration, t.score, r.trace_id IN (SELECT trace_id FROM violating)
           FROM rollout r LEFT JOIN told t USING (trace_id) ORDER BY r.trace_id"""
    ).fetchall()
    return reward.associate(
        reward.Rollout(group, iteration, score if score is not None and abs(score) < float("inf") else None, violating)
        for group, iteration, score, violating in rows
    )


def _name_causing(result: Result, caused: Counter[int]) -> None:
    result.db.register("named", {"call": np.fromiter(caused, dtype=np.int64)})
    result.db.execute("CREATE OR REPLACE TEMP TABLE causing AS SELECT call FROM named")
    result.db.unregister("named")
