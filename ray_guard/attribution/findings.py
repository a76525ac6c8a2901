"""What many attributions say together: recurrence, and reward against violation. Runs later, on any machine."""

from __future__ import annotations

from collections import Counter
from typing import Final

import duckdb
import numpy as np
import pyarrow as pa

from ray_guard.attribution import recurrence, reward
from ray_guard.attribution.attribute import Result
from ray_guard.attribution.templates import alike, template

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
    return recurrence.enriched(_counts(result, caused)) if caused else []


_BY_CALLS: Final = """SELECT {pattern} AS pattern, tool, stratum, count(*) AS members,
    count(DISTINCT trace_id) FILTER (alerts > 0) AS hits, count(*) AS calls, sum(alerts) AS alerts
  FROM {source} GROUP BY ALL"""
_BY_ROLLOUTS: Final = """SELECT pattern, '' AS tool, stratum, count(*) AS members,
    count(*) FILTER (alerts > 0) AS hits, sum(calls) AS calls, sum(alerts) AS alerts
  FROM (SELECT trace_id, {pattern} AS pattern, stratum, count(*) AS calls, sum(alerts) AS alerts
    FROM {source} GROUP BY ALL) GROUP BY ALL"""
#: dimension, what is counted in each stratum; a pattern without a name is counted and not listed
_DIMENSIONS: Final = (
    ("tool", _BY_CALLS.format(pattern="tool", source="compared")),
    ("command", _BY_CALLS.format(pattern="coalesce(words, '')", source="compared LEFT JOIN templated USING (call)")),
    ("task", _BY_ROLLOUTS.format(pattern="coalesce(\"group\", '')", source="compared")),
    ("checkpoint", _BY_ROLLOUTS.format(pattern="policy_version", source="versioned")),
)


def _within(strata: str) -> str:
    """SQL for all calls of the strata in which there were alerts."""
    same = " AND ".join(f"c.{column} IS NOT DISTINCT FROM s.{column}" for column in strata.split(", "))
    return f"""SELECT c.call, c.trace_id, s.stratum, coalesce(c.tool, '') AS tool, c."group", c.policy_version,
         coalesce(k.alerts, 0) AS alerts
       FROM call c LEFT JOIN causing k USING (call)
       JOIN (SELECT *, row_number() OVER (ORDER BY {strata}) AS stratum
             FROM (SELECT DISTINCT {strata} FROM call JOIN causing USING (call))) s ON {same}"""


def _counts(result: Result, caused: Counter[int]) -> recurrence.Counts:
    db = result.db
    prepare(db)
    _name_causing(result, caused)
    db.execute(f"CREATE OR REPLACE TABLE compared AS {_within('run, iteration, node')}")
    # A checkpoint is an iteration's, or nearly: to be compared at all it has to be with the others of its machines.
    db.execute(f"CREATE OR REPLACE TEMP VIEW versioned AS {_within('run, node')} WHERE c.policy_version <> ''")
    counts = recurrence.Counts()
    for dimension, counted in _DIMENSIONS:
        db.execute(
            f"""CREATE OR REPLACE TEMP TABLE counted AS
                SELECT *, sum(members) OVER stratum AS size, sum(hits) OVER stratum AS drawn FROM ({counted})
                WINDOW stratum AS (PARTITION BY stratum)"""
        )
        # Told by how many there are and where alerts were, not by which of them alerted: else the test would be biased.
        ((tested,),) = db.execute(
            """SELECT count(*) FROM (SELECT 1 FROM counted WHERE pattern <> '' GROUP BY pattern, tool
                 HAVING sum(least(members, drawn)) >= ?)""",
            [recurrence.FEWEST],
        ).fetchall()
        counts.tested += tested
        for pattern, tool, number, members, hits, calls, alerts, size, drawn in db.execute(
            """SELECT * FROM counted WHERE pattern <> ''
               QUALIFY sum(hits) OVER (PARTITION BY pattern, tool) >= ?""",
            [recurrence.FEWEST],
        ).fetchall():
            named, stratum = (dimension, pattern, tool), (dimension, number)
            counts.size[stratum], counts.alerting[stratum] = int(size), int(drawn)
            counts.members[named][stratum] = members
            counts.hits[named] += hits
            counts.calls[named] += int(calls)
            counts.alerts[named] += int(alerts)
    return counts


def prepare(db: duckdb.DuckDBPyConnection) -> None:
    """Makes what the traces alone tell, whatever the alerts are: ``templated`` (call, words) and ``rewarded``.

    For whoever has time for it before the alerts are read; else what follows does it.
    """
    ((done,),) = db.execute("SELECT count(*) FROM duckdb_tables() WHERE table_name = 'rewarded'").fetchall()
    if not done:
        _make_templates(db)
        db.execute(_REWARDED)


def _make_templates(db: duckdb.DuckDBPyConnection) -> None:
    db.execute(
        f"""CREATE TABLE said AS SELECT text, {alike("text")} AS alike
            FROM (SELECT DISTINCT text FROM words WHERE text <> '')"""
    )
    db.execute("CREATE TABLE template (alike VARCHAR, words VARCHAR)")
    # Of its own: what is written meanwhile would end the reading.
    reading = db.cursor()
    reading.execute("SELECT DISTINCT alike FROM said")
    while rows := reading.fetchmany(_TEXTS):
        texts = [text for (text,) in rows]
        db.register("made", pa.table({"alike": texts, "words": list(map(template, texts))}))
        db.execute("INSERT INTO template SELECT * FROM made WHERE words <> ''")
        db.unregister("made")
    db.execute(
        """CREATE TABLE templated AS SELECT call, t.words
           FROM words JOIN said USING (text) JOIN template t USING (alike)"""
    )
    db.execute("DROP TABLE said")
    db.execute("DROP TABLE template")


def _number(name: str) -> str:
    value = f"TRY_CAST(attributes['{name}'] AS DOUBLE)"
    return f"CASE WHEN isfinite({value}) THEN {value} END"


#: the last reward and advantage of each rollout, finite numbers: on its span, or told later in a trace of its own
_REWARDED: Final = f"""CREATE TABLE rewarded AS
    WITH said AS (
      SELECT trace_id, run, rollout, coalesce(end_ns, start_ns) AS at_ns, {_number("rl.reward.score")} AS score,
        {_number("rl.advantage")} AS advantage
      FROM span WHERE name LIKE 'invoke_agent%' OR name = 'ray_guard.reward'),
    named AS (
      SELECT run, rollout, min(trace_id) AS trace_id FROM rollout GROUP BY ALL HAVING count(*) = 1),
    placed AS (
      SELECT * FROM said SEMI JOIN rollout USING (trace_id)
      UNION ALL
      SELECT n.trace_id, s.* EXCLUDE (trace_id) FROM said s ANTI JOIN rollout USING (trace_id)
        JOIN named n ON n.rollout = s.rollout AND n.run IS NOT DISTINCT FROM s.run)
    SELECT trace_id, arg_max(score, (at_ns, score)) AS score, arg_max(advantage, (at_ns, advantage)) AS advantage
    FROM placed GROUP BY trace_id"""


def association(result: Result, caused: Counter[int]) -> reward.Association:
    """Reward against violation, over all rollouts of the traces. Leaves the table ``rewarded``."""
    prepare(result.db)
    _name_causing(result, caused)
    rows = result.db.execute(
        """WITH violating AS (
             SELECT trace_id FROM call JOIN causing USING (call)
             UNION SELECT trace_id FROM rollout JOIN causing USING (call))
           SELECT r.run, r."group", r.iteration, t.score, t.advantage, r.trace_id IN (SELECT trace_id FROM violating)
           FROM rollout r LEFT JOIN rewarded t USING (trace_id) ORDER BY r.trace_id"""
    ).fetchall()
    return reward.associate(
        reward.Rollout(None if group is None else (run, group), iteration, score, violating, advantage)
        for run, group, iteration, score, advantage, violating in rows
    )


def _name_causing(result: Result, caused: Counter[int]) -> None:
    made = pa.table({"call": pa.array(list(caused), pa.int64()), "alerts": pa.array(list(caused.values()), pa.int64())})
    result.db.register("made", made)
    result.db.execute("CREATE OR REPLACE TEMP TABLE causing AS SELECT * FROM made")
    result.db.unregister("made")
