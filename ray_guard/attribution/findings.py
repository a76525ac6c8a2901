"""What many attributions say together: recurrence, and reward against violation. Runs later, on any machine."""

from __future__ import annotations

from collections import Counter
from typing import Final

import duckdb
import numpy as np
import pyarrow as pa

from ray_guard.attribution import recurrence, reward
from ray_guard.attribution.attribute import Result
from ray_guard.attribution.prior import template

_TEXTS: Final = 50_000
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
    return recurrence.of_counts(_counts(result, caused)) if caused else []


#: dimension, pattern, tool, whether iterations are compared with each other, from where
_DIMENSIONS: Final = (
    ("tool", "tool", "tool", False, "compared"),
    ("command", "words", "tool", False, "compared JOIN templated USING (call)"),
    ("task", '"group"', "''", False, """compared WHERE "group" <> ''"""),
    ("checkpoint", "policy_version", "''", True, "compared WHERE policy_version <> ''"),
)


def _counts(result: Result, caused: Counter[int]) -> recurrence.Counts:
    db = result.db
    _name_causing(result, caused)
    db.execute(
        """CREATE OR REPLACE TABLE compared AS
           SELECT c.call, c.iteration, c.node, coalesce(c.tool, '') AS tool, c."group", c.policy_version,
             coalesce(k.alerts, 0) AS alerts
           FROM call c LEFT JOIN causing k USING (call)
           WHERE (c.iteration, c.node) IN (SELECT (d.iteration, d.node) FROM call d JOIN causing USING (call))
              OR k.call IS NOT NULL"""
    )
    _make_templates(db)
    counts = recurrence.Counts()
    for across, source in ((False, "compared"), (True, "compared WHERE policy_version <> ''")):
        for *where, size, alerting in db.execute(
            f"SELECT {_stratum(across)}, count(*), count(*) FILTER (alerts > 0) FROM {source} GROUP BY ALL"
        ).fetchall():
            counts.size[tuple(where)], counts.alerting[tuple(where)] = size, alerting
    for dimension, pattern, tool, across, source in _DIMENSIONS:
        for said, of_tool, *where, members, hits, alerts in db.execute(
            f"""SELECT * FROM (
                  SELECT {pattern} AS pattern, {tool} AS of_tool, {_stratum(across)}, count(*),
                    count(*) FILTER (alerts > 0) AS hits, CAST(sum(alerts) AS BIGINT)
                  FROM {source} GROUP BY ALL)
                QUALIFY sum(hits) OVER (PARTITION BY pattern, of_tool) >= ?""",
            [recurrence.FEWEST],
        ).fetchall():
            named = (dimension, said, of_tool)
            counts.members[named][tuple(where)] = members
            counts.hits[named] += hits
            counts.alerts[named] += alerts
    return counts


def _stratum(across: bool) -> str:  # noqa: FBT001 - a row of the table above
    return "'checkpoints' AS iteration, node" if across else "iteration, node"


def _make_templates(db: duckdb.DuckDBPyConnection) -> None:
    """Fills ``templated``: call, words."""
    db.execute("CREATE OR REPLACE TEMP TABLE template (text VARCHAR, words VARCHAR)")
    # Of its own: what is written meanwhile would end the reading.
    reading = db.cursor()
    reading.execute("SELECT DISTINCT text FROM words WHERE text <> '' AND call IN (SELECT call FROM compared)")
    while rows := reading.fetchmany(_TEXTS):
        texts = [text for (text,) in rows]
        db.register("made", pa.table({"text": texts, "words": list(map(template, texts))}))
        db.execute("INSERT INTO template SELECT * FROM made WHERE words <> ''")
        db.unregister("made")
    db.execute(
        """CREATE OR REPLACE TEMP TABLE templated AS
           SELECT call, t.words FROM compared JOIN words w USING (call) JOIN template t ON t.text = w.text"""
    )


def association(result: Result, caused: Counter[int]) -> reward.Association:
    """Reward against violation, over all rollouts of the traces."""
    _name_causing(result, caused)
    rows = result.db.execute(
        """WITH violating AS (
             SELECT trace_id FROM call JOIN causing USING (call)
             UNION SELECT trace_id FROM rollout JOIN causing USING (call)),
           told AS (
             SELECT trace_id, max(TRY_CAST(attributes['rl.reward.score'] AS DOUBLE)) AS score FROM span
             WHERE name LIKE 'invoke_agent%' GROUP BY trace_id)
           SELECT r."group", r.iteration, t.score, r.trace_id IN (SELECT trace_id FROM violating)
           FROM rollout r LEFT JOIN told t USING (trace_id) ORDER BY r.trace_id"""
    ).fetchall()
    return reward.associate(
        reward.Rollout(group, iteration, score if score is not None and abs(score) < float("inf") else None, violating)
        for group, iteration, score, violating in rows
    )


def _name_causing(result: Result, caused: Counter[int]) -> None:
    made = pa.table({"call": pa.array(list(caused), pa.int64()), "alerts": pa.array(list(caused.values()), pa.int64())})
    result.db.register("made", made)
    result.db.execute("CREATE OR REPLACE TEMP TABLE causing AS SELECT * FROM made")
    result.db.unregister("made")
