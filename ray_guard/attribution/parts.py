"""A job's tables made in parts, and put together again. Runs later, on any machine.

All that :func:`ray_guard.attribution.store.arrange` makes of a span it makes of its trace alone. So traces may be dealt
out to as many stores as there is evidence for; what they make of them is narrow, and is numbered anew when it meets.
The numbers are those that one store would have given, so that whatever follows is the same to the byte.
"""

from __future__ import annotations

from typing import Final

import duckdb
import pyarrow as pa

from ray_guard.attribution import store
from ray_guard.evidence import columns

_TABLES: Final = ("node", "call", "rollout", "process", "flow", "alive", "words", "root")

PART: Final = pa.field("part", pa.int32())


def dealt(spans: pa.Table, count: int) -> pa.Table:
    """The spans with the part that their trace falls to: a column more, from 0 to ``count`` less one."""
    spans = spans.select(columns.SCHEMA.names).cast(columns.SCHEMA)
    db = duckdb.connect(config={"threads": 1})
    ids = spans.select(["trace_id"])  # noqa: F841 - read by its name
    part = db.sql(f"SELECT CAST(hash(trace_id) % {int(count)} AS INTEGER) AS part FROM ids").to_arrow_table()
    return spans.append_column(PART, part["part"])


def derived(spans: pa.Table) -> dict[str, pa.Table]:
    """The tables of one part, with numbers of its own. ``root`` has what findings ask of rollouts' own spans."""
    db = store.connect("1GB", threads=1)
    store.insert(db, "span", spans)
    first, last = store.bounds(db)
    store.arrange(db)
    made = {name: db.sql(f"SELECT * FROM {name}").to_arrow_table() for name in _TABLES[:-1]}
    made["root"] = db.sql(
        """SELECT trace_id, span_id, name, start_ns, end_ns, run, iteration, rollout,
             attributes['rl.reward.score'] AS score, attributes['rl.advantage'] AS advantage
           FROM span WHERE name LIKE 'invoke_agent%' OR name = 'ray_guard.reward'"""
    ).to_arrow_table()
    return made | {"bounds": pa.table({"first_ns": [first], "last_ns": [last]})}


def add(db: duckdb.DuckDBPyConnection, part: int, name: str, table: pa.Table) -> None:
    """Takes one table of one part; any order will do."""
    db.register("incoming", table)
    db.execute(f"CREATE TABLE IF NOT EXISTS part_{name} AS SELECT 0 AS part, * FROM incoming LIMIT 0")
    db.execute(f"INSERT INTO part_{name} BY NAME SELECT {int(part)} AS part, * FROM incoming")
    db.unregister("incoming")


def join(db: duckdb.DuckDBPyConnection) -> tuple[int, int]:
    """Makes the tables of the job out of what was added. The first and the last nanosecond of the traces."""
    for statement in _JOIN:
        db.execute(statement)
    for name in (*_TABLES, "bounds"):
        db.execute(f"DROP TABLE part_{name}")
    ((first, last),) = db.execute("SELECT min(first_ns), max(last_ns) FROM bounds WHERE last_ns > 0").fetchall()
    return (first or 0, last or 0)


_NUMBERED: Final = "LEFT JOIN number n ON n.part = p.part AND n.old = p.call"
_PLACED: Final = "JOIN node_number m ON m.part = p.part AND m.old = p.node"
_JOIN: Final = (
    "CREATE TEMP TABLE bounds AS SELECT * FROM part_bounds",
    """CREATE TABLE node AS SELECT row_number() OVER (ORDER BY host, node_id, ips) AS node, * FROM (
         SELECT DISTINCT host, node_id, ips FROM part_node)""",
    store.NODE_IP,
    """CREATE TEMP TABLE node_number AS SELECT p.part, p.node AS old, n.node
         FROM part_node p JOIN node n USING (host, node_id, ips)""",
    """CREATE TEMP TABLE number AS
         SELECT part, call AS old, row_number() OVER (ORDER BY start_ns, span_id, trace_id) AS call FROM part_call
         UNION ALL SELECT part, call, -row_number() OVER (ORDER BY trace_id) FROM part_rollout""",
    f"""CREATE TABLE call AS SELECT n.call, p.* EXCLUDE (part, call, node), m.node
          FROM part_call p {_NUMBERED} {_PLACED}""",
    f"CREATE TABLE rollout AS SELECT n.call, p.* EXCLUDE (part, call) FROM part_rollout p {_NUMBERED}",
    f"""CREATE TABLE process AS SELECT n.call, p.* EXCLUDE (part, call, node), m.node
          FROM part_process p {_NUMBERED} {_PLACED}""",
    f"""CREATE TABLE flow AS SELECT row_number() OVER (ORDER BY p.start_ns, p.span_id, p.trace_id) AS flow, n.call,
          p.* EXCLUDE (part, flow, call, node), m.node FROM part_flow p {_NUMBERED} {_PLACED}""",
    f"""CREATE TABLE alive AS SELECT n.call, p.* EXCLUDE (part, call, node), m.node
          FROM part_alive p {_NUMBERED} {_PLACED}""",
    f"CREATE TABLE words AS SELECT n.call, p.* EXCLUDE (part, call) FROM part_words p {_NUMBERED}",
    """INSERT INTO span BY NAME SELECT * EXCLUDE (part, score, advantage),
         MAP {'rl.reward.score': score, 'rl.advantage': advantage} AS attributes FROM part_root""",
)
