"""The tables that attribution joins, in DuckDB. Runs later, on any machine.

``span`` comes from traces, ``alert`` from logs, ``nat`` from maps; the others are made of them:

``node``      one per machine: host name, Ray node id; ``node_ip`` its addresses
``call``      tool calls, with where they stand in the job, their text and how long they were alive
``flow``      sockets that a supervisor recorded, with the call (or only the rollout) they belong to
``process``   processes that it recorded, with the call that spawned them
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import duckdb
import pyarrow as pa

from ray_guard.attribution import prior
from ray_guard.attribution.nat import Mapping
from ray_guard.attribution.sources.reader import Record
from ray_guard.evidence import columns
from ray_guard.evidence.reader import Quarantine, read
from ray_guard.records import LINK, PARENT

_DEPTH: Final = 64
"""How many processes may stand between a socket and its call."""
_BATCH: Final = 20_000
_PARENT_LINK: Final = rf'"([0-9a-f]{{16}})",\s*\{{"{re.escape(LINK)}":\s*"{PARENT}"\}}'
"""In the column ``links``: the span that encloses one of a rollout's later segments."""

ALERT_SCHEMA: Final = pa.schema(
    [
        ("alert", pa.int64()),
        ("source", pa.int32()),
        ("start_ns", pa.int64()),
        ("end_ns", pa.int64()),
        ("semantics", pa.string()),
        ("dated", pa.bool_()),
        ("src_ip", pa.string()),
        ("src_port", pa.int32()),
        ("dst_ip", pa.string()),
        ("dst_port", pa.int32()),
        ("inside_ip", pa.string()),
        ("inside_port", pa.int32()),
        ("proto", pa.string()),
        ("denied", pa.bool_()),
        ("rule", pa.string()),
        ("host", pa.string()),
        ("node", pa.string()),
        ("pid", pa.int64()),
        ("command", pa.string()),
        ("informational", pa.bool_()),
    ]
)
NAT_SCHEMA: Final = pa.schema(
    [
        ("source", pa.int32()),
        ("start_ns", pa.int64()),
        ("end_ns", pa.int64()),
        ("inside_ip", pa.string()),
        ("inside_port", pa.int32()),
        ("outside_ip", pa.string()),
        ("outside_port", pa.int32()),
        ("proto", pa.string()),
        ("peer_ip", pa.string()),
        ("peer_port", pa.int32()),
    ]
)


def connect(memory: str = "3GB") -> duckdb.DuckDBPyConnection:
    """An empty store in memory; what does not fit goes to DuckDB's temporary folder."""
    db = duckdb.connect(config={"memory_limit": memory, "preserve_insertion_order": False})
    db.execute("SET enable_progress_bar = false")
    db.register("nothing", pa.Table.from_batches([], schema=columns.SCHEMA))
    db.execute("CREATE TABLE span AS SELECT * FROM nothing")
    db.unregister("nothing")
    for name, schema in (("alert", ALERT_SCHEMA), ("nat", NAT_SCHEMA)):
        db.register("nothing", pa.Table.from_batches([], schema=schema))
        db.execute(f"CREATE TABLE {name} AS SELECT * FROM nothing")
        db.unregister("nothing")
    return db


def add_spans(db: duckdb.DuckDBPyConnection, paths: Sequence[str | os.PathLike[str]], quarantine: Quarantine) -> None:
    """Reads traces into ``span``: ``*.parquet`` as it is, all else as OTLP JSON lines."""
    parquet = [os.fspath(path) for path in paths if os.fspath(path).endswith(".parquet")]
    others = [path for path in paths if os.fspath(path) not in parquet]
    for path in parquet:
        named = ", ".join(columns.SCHEMA.names)
        db.execute(f"INSERT INTO span SELECT {named} FROM read_parquet(?)", [path])
    for batch in columns.batches(read(others, quarantine)) if others else ():
        _insert(db, "span", pa.Table.from_batches([batch]))


def add_alerts(db: duckdb.DuckDBPyConnection, records: Iterable[tuple[int, int, Record]]) -> Iterator[int]:
    """Reads (alert number, source number, record) into ``alert``; yields how many are in, now and then."""
    rows: list[dict[str, Any]] = []
    done = 0
    for number, source, record in records:
        rows.append(_alert(number, source, record))
        if len(rows) == _BATCH:
            _insert(db, "alert", pa.Table.from_pylist(rows, schema=ALERT_SCHEMA))
            done += len(rows)
            rows = []
            yield done
    if rows:
        _insert(db, "alert", pa.Table.from_pylist(rows, schema=ALERT_SCHEMA))
    yield done + len(rows)


def add_nat(db: duckdb.DuckDBPyConnection, mappings: Iterable[tuple[int, Mapping]]) -> None:
    """Reads (source whose clock they go by, mapping) into ``nat``."""
    rows = [
        {
            "source": source,
            "start_ns": each.start_ns,
            "end_ns": each.end_ns,
            "inside_ip": each.inside.ip,
            "inside_port": each.inside.port,
            "outside_ip": each.outside.ip,
            "outside_port": each.outside.port,
            "proto": each.proto,
            "peer_ip": each.peer.ip,
            "peer_port": each.peer.port,
        }
        for source, each in mappings
    ]
    if rows:
        _insert(db, "nat", pa.Table.from_pylist(rows, schema=NAT_SCHEMA))


def _insert(db: duckdb.DuckDBPyConnection, table: str, rows: pa.Table) -> None:
    db.register("incoming", rows)
    db.execute(f"INSERT INTO {table} SELECT * FROM incoming")
    db.unregister("incoming")


def _alert(number: int, source: int, record: Record) -> dict[str, Any]:
    seen = record.seen
    return {
        "alert": number,
        "source": source,
        "start_ns": seen.time.start_ns,
        "end_ns": seen.time.end_ns,
        "semantics": seen.time.semantics.value,
        "dated": seen.time.dated,
        "src_ip": seen.src.ip,
        "src_port": seen.src.port,
        "dst_ip": seen.dst.ip,
        "dst_port": seen.dst.port,
        "proto": seen.proto,
        "denied": seen.action.value == "denied",
        "rule": " ".join(dict.fromkeys(said for said in (seen.rule, seen.signature) if said)) or None,
        "host": seen.host.lower().rstrip(".") or None,
        "node": seen.node or None,
        "pid": seen.process.pid,
        "command": seen.process.command or None,
        "informational": seen.informational,
    }


def prepare(db: duckdb.DuckDBPyConnection) -> None:
    """Makes the tables of the job out of ``span``."""
    patterns = (prior.SUSPECT, prior.NETWORK, prior.SILENT, _PARENT_LINK)
    for name, pattern in zip(("suspect", "network", "silent", "parent_link"), patterns, strict=True):
        db.execute(f"SET VARIABLE {name} = ?", [pattern])
    for statement in _PREPARE:
        db.execute(statement)
    for table, kind in (("flow", "egress connect"), ("process", "process %")):
        _own(db, table, kind)
    for statement in _DERIVE:
        db.execute(statement)


def _own(db: duckdb.DuckDBPyConnection, table: str, kind: str) -> None:
    """Walks from each span of a kind up to its tool call, or to where its trace ends."""
    db.execute(
        f"""CREATE OR REPLACE TEMP TABLE climbing AS
            SELECT rowid AS n, trace_id, parent_id AS above, CAST(NULL AS BIGINT) AS call FROM span
            WHERE name {"LIKE" if "%" in kind else "="} ?""",
        [kind],
    )
    for _ in range(_DEPTH + 1):
        db.execute(
            """UPDATE climbing SET call = c.call FROM call c
               WHERE climbing.call IS NULL AND climbing.trace_id = c.trace_id AND climbing.above = c.span_id"""
        )
        db.execute(
            """UPDATE climbing SET above = s.parent_id FROM span s
               WHERE climbing.call IS NULL AND climbing.trace_id = s.trace_id AND climbing.above = s.span_id
                 AND s.name LIKE 'process %'"""
        )
        ((left,),) = db.execute(
            """SELECT count(*) FROM climbing k JOIN span s ON k.trace_id = s.trace_id AND k.above = s.span_id
               WHERE k.call IS NULL AND (s.name LIKE 'process %' OR s.name LIKE 'execute_tool%')"""
        ).fetchall()
        if not left:
            break
    db.execute(f"CREATE OR REPLACE TEMP TABLE {table}_owner AS SELECT n, call FROM climbing")


_PREPARE: Final = (
    # Of several lines about one span the supervisor's word counts before the target's, then the ended one.
    # A rollout of many spans is spread over several traces: here it is one again, and each span hangs where it belongs.
    """CREATE OR REPLACE TABLE span AS SELECT * REPLACE (
           coalesce(attributes['ray_guard.root_trace_id'], trace_id) AS trace_id,
           CASE WHEN attributes['ray_guard.root_trace_id'] IS NULL THEN parent_id
                ELSE coalesce(nullif(regexp_extract(links, getvariable('parent_link'), 1), ''), parent_id) END
             AS parent_id),
         span.trace_id AS shown_trace_id
       FROM span QUALIFY row_number() OVER (
         PARTITION BY span.trace_id, span_id
         ORDER BY coalesce(source, '') <> 'target' DESC, end_ns IS NOT NULL DESC,
                  coalesce(end_ns, start_ns) DESC) = 1""",
    # What only a supervisor can know is no fact where a target says it.
    """DELETE FROM span WHERE source = 'target'
         AND (name = 'egress connect' OR name LIKE 'process %' OR name = 'ray_guard.violation')""",
    """CREATE OR REPLACE TABLE node AS SELECT row_number() OVER (ORDER BY host, node_id, ips) AS node, * FROM (
         SELECT DISTINCT coalesce(host, '') AS host, coalesce(node_id, '') AS node_id,
                coalesce(array_to_string(list_sort(host_ips), ','), '') AS ips FROM span)""",
    """CREATE OR REPLACE TABLE node_ip AS SELECT DISTINCT node, unnest(string_split(ips, ',')) AS ip FROM node
         WHERE ips <> ''""",
    """CREATE OR REPLACE TEMP TABLE about AS SELECT trace_id, any_value(run) AS run, any_value(iteration) AS iteration,
         any_value("group") AS "group", any_value(rollout) AS rollout, any_value(policy_version) AS policy_version,
         max(coalesce(end_ns, start_ns)) AS last_ns FROM span GROUP BY trace_id""",
    """CREATE OR REPLACE TABLE call AS
         SELECT row_number() OVER (ORDER BY s.start_ns, s.span_id) AS call, s.trace_id, s.shown_trace_id, s.span_id,
           n.node, coalesce(s.run, a.run) AS run, coalesce(s.iteration, a.iteration) AS iteration,
           coalesce(s."group", a."group") AS "group", coalesce(s.rollout, a.rollout) AS rollout,
           coalesce(s.turn, t.turn) AS turn, coalesce(s.policy_version, a.policy_version) AS policy_version,
           coalesce(s.attributes['gen_ai.tool.name'], substr(s.name, 14)) AS tool,
           s.attributes['gen_ai.tool.call.id'] AS call_id,
           s.start_ns, greatest(coalesce(s.end_ns, a.last_ns), s.start_ns + 1) AS end_ns,
           coalesce(s.attributes['gen_ai.tool.call.arguments'], s.attributes['input.value'], '') AS arguments
         FROM span s JOIN about a USING (trace_id)
         JOIN node n ON n.host = coalesce(s.host, '') AND n.node_id = coalesce(s.node_id, '')
           AND n.ips = coalesce(array_to_string(list_sort(s.host_ips), ','), '')
         LEFT JOIN span t ON t.trace_id = s.trace_id AND t.span_id = s.parent_id AND t.name = 'rl.turn'
         WHERE s.name LIKE 'execute_tool%'""",
)
_DERIVE: Final = (
    # Below zero: a rollout, where a socket belongs to none of its calls.
    """CREATE OR REPLACE TABLE rollout AS SELECT -row_number() OVER (ORDER BY trace_id) AS call, trace_id, run,
         iteration, "group", rollout, policy_version FROM about WHERE rollout IS NOT NULL""",
    """CREATE OR REPLACE TABLE process AS
         SELECT o.call, n.node, TRY_CAST(s.attributes['process.pid'] AS BIGINT) AS pid, s.start_ns,
           coalesce(s.end_ns, a.last_ns) AS end_ns,
           coalesce(array_to_string(TRY_CAST(s.attributes['process.command_args'] AS VARCHAR[]), ' '),
                    s.attributes['process.command_line'], s.attributes['process.command_args'],
                    s.attributes['process.executable.path'], '') AS command
         FROM span s JOIN process_owner o ON o.n = s.rowid JOIN about a USING (trace_id)
         JOIN node n ON n.host = coalesce(s.host, '') AND n.node_id = coalesce(s.node_id, '')
           AND n.ips = coalesce(array_to_string(list_sort(s.host_ips), ','), '')""",
    """CREATE OR REPLACE TABLE flow AS
         SELECT row_number() OVER (ORDER BY s.start_ns, s.span_id) AS flow, coalesce(o.call, r.call) AS call, n.node,
           s.trace_id, s.span_id,
           coalesce(s.rollout, a.rollout) AS rollout, s.start_ns, coalesce(s.end_ns, a.last_ns) AS end_ns,
           s.attributes['network.local.address'] AS local_ip,
           TRY_CAST(s.attributes['network.local.port'] AS INTEGER) AS local_port,
           s.attributes['network.peer.address'] AS peer_ip,
           TRY_CAST(s.attributes['network.peer.port'] AS INTEGER) AS peer_port,
           lower(coalesce(s.attributes['network.transport'], 'tcp')) AS proto,
           lower(s.attributes['server.address']) AS host,
           coalesce(s.attributes['ray_guard.egress.decision'], 'allow') AS decision,
           s.attributes['ray_guard.egress.scope'] = 'ambiguous' AS ambiguous,
           TRY_CAST(s.attributes['ray_guard.egress.candidates'] AS VARCHAR[]) AS candidates
         FROM span s JOIN flow_owner o ON o.n = s.rowid JOIN about a USING (trace_id)
         LEFT JOIN rollout r USING (trace_id)
         JOIN node n ON n.host = coalesce(s.host, '') AND n.node_id = coalesce(s.node_id, '')
           AND n.ips = coalesce(array_to_string(list_sort(s.host_ips), ','), '')""",
    # A call is alive as long as anything it started: a background process belongs to the call that spawned it.
    """CREATE OR REPLACE TABLE alive AS
         SELECT c.call, c.node, c.start_ns, greatest(c.end_ns, coalesce(l.end_ns, c.end_ns)) AS end_ns,
                c.end_ns AS over_ns
         FROM call c LEFT JOIN (
           SELECT call, max(end_ns) AS end_ns FROM (
             SELECT call, end_ns FROM process UNION ALL SELECT call, end_ns FROM flow) GROUP BY call) l USING (call)""",
    """CREATE OR REPLACE TABLE words AS SELECT *,
           CASE WHEN text = '' THEN 1
                WHEN regexp_matches(text, getvariable('suspect')) THEN 3
                WHEN regexp_matches(text, getvariable('network')) THEN 2
                WHEN regexp_matches(text, getvariable('silent')) THEN 0 ELSE 1 END AS reach FROM (
         SELECT c.call, concat_ws(' ; ', nullif(c.arguments, ''), p.commands) AS text
         FROM call c LEFT JOIN (
           SELECT call, string_agg(left(command, 400), ' ; ' ORDER BY start_ns) AS commands FROM (
             SELECT * FROM process WHERE command <> '' AND call IS NOT NULL
             QUALIFY row_number() OVER (PARTITION BY call ORDER BY start_ns) <= 16) GROUP BY call) p USING (call))""",
)
