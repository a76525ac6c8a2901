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
import tempfile
from collections.abc import Iterable, Sequence
from typing import Final

import duckdb
import pyarrow as pa

from ray_guard.attribution import prior
from ray_guard.attribution.intake import ALERT_SCHEMA
from ray_guard.attribution.nat import Mapping
from ray_guard.attribution.observation import address
from ray_guard.evidence import columns
from ray_guard.evidence.reader import NotEvidence, Quarantine, read
from ray_guard.records import LINK, PARENT, ROOT_TRACE

_DEPTH: Final = 64
"""How many processes may stand between a socket and its call."""
_PARENT_LINK: Final = rf'"([0-9a-f]{{16}})",\s*\{{"{re.escape(LINK)}":\s*"{PARENT}"\}}'
"""In the column ``links``: the span that encloses one of a rollout's later segments."""

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
        ("aimed_ip", pa.string()),
        ("aimed_port", pa.int32()),
    ]
)


def connect(memory: str = "2GB", threads: int | None = None) -> duckdb.DuckDBPyConnection:
    """An empty store in memory; what does not fit goes to a temporary folder (``TMPDIR``), which dies with the store.

    Args:
        memory: what DuckDB may hold, as it writes sizes.
        threads: of DuckDB; None: one for each CPU this process may use.
    """
    db = duckdb.connect(
        config={
            "memory_limit": memory,
            "threads": threads or len(os.sched_getaffinity(0)),
            "temp_directory": os.path.join(tempfile.gettempdir(), f"ray-guard-attribute-{os.getpid()}"),
            "preserve_insertion_order": False,
        }
    )
    db.execute("SET enable_progress_bar = false")
    for name, schema in (("span", columns.SCHEMA), ("alert", ALERT_SCHEMA), ("nat", NAT_SCHEMA)):
        _create(db, name, schema)
    return db


def _create(db: duckdb.DuckDBPyConnection, name: str, schema: pa.Schema) -> None:
    db.register("nothing", pa.Table.from_batches([], schema=schema))
    db.execute(f"CREATE TABLE {name} AS SELECT * FROM nothing")
    db.unregister("nothing")


def add_spans(db: duckdb.DuckDBPyConnection, paths: Sequence[str | os.PathLike[str]], quarantine: Quarantine) -> None:
    """Reads traces into ``span``: ``*.parquet`` is read where it lies whenever it is asked for, all else is OTLP.

    Raises:
        NotEvidence: a path holds nothing to read.
    """
    lying = parquet(db, paths)
    others = [path for path in paths if os.fspath(path) not in lying]
    for batch in columns.batches(read(others, quarantine)) if others else ():
        insert(db, "span", pa.Table.from_batches([batch]))
    db.execute("ALTER TABLE span RENAME TO told")
    named = ", ".join(f'"{name}"' for name in columns.SCHEMA.names)
    more = "".join(f" UNION ALL SELECT {named} FROM read_parquet({_quoted(path)})" for path in lying)
    db.execute(f"CREATE VIEW span AS SELECT {named} FROM told{more}")


def look_again(db: duckdb.DuckDBPyConnection, paths: Sequence[str | os.PathLike[str]]) -> None:
    """Gives a store whose tables were made elsewhere (:mod:`~ray_guard.attribution.parts`) the ``span`` of the traces.

    What could not be read was counted when the tables were made.
    """
    db.execute("DROP TABLE span")
    _create(db, "span", columns.SCHEMA)
    add_spans(db, paths, Quarantine())
    settle(db)


def parquet(db: duckdb.DuckDBPyConnection, paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """The Parquet files among some paths. Raises NotEvidence where one cannot be read, or holds no spans."""
    found = [os.fspath(path) for path in paths if os.fspath(path).endswith(".parquet")]
    for path in found:
        _check_parquet(db, path)
    return found


def _check_parquet(db: duckdb.DuckDBPyConnection, path: str) -> None:
    """Raises NotEvidence unless the file has the columns of :mod:`ray_guard.evidence.columns`."""
    try:
        found = db.execute("SELECT * FROM read_parquet(?) LIMIT 0", [path]).description or ()
    except duckdb.Error as error:
        raise NotEvidence(path, f"cannot be read as Parquet: {str(error).splitlines()[0]}") from error
    missing = [name for name in columns.SCHEMA.names if name not in {column[0] for column in found}]
    if missing:
        raise NotEvidence(
            path, f"has no column {missing[0]}; `ray-guard export --format parquet` writes what is read here"
        )


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def add_alerts(db: duckdb.DuckDBPyConnection, batches: Sequence[pa.RecordBatch]) -> None:
    """Puts the records of :class:`~ray_guard.attribution.intake.Intake` into ``alert``."""
    if batches:
        insert(db, "alert", pa.Table.from_batches(batches))


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
            "aimed_ip": each.aimed.ip,
            "aimed_port": each.aimed.port,
        }
        for source, each in mappings
    ]
    if rows:
        insert(db, "nat", pa.Table.from_pylist(rows, schema=NAT_SCHEMA))


def insert(db: duckdb.DuckDBPyConnection, table: str, rows: pa.Table) -> None:
    """Appends to a table of the same columns."""
    db.register("incoming", rows)
    db.execute(f"INSERT INTO {table} SELECT * FROM incoming")
    db.unregister("incoming")


def bounds(db: duckdb.DuckDBPyConnection) -> tuple[int, int]:
    """The first and the last nanosecond of the traces."""
    ((first, last),) = db.execute("SELECT min(start_ns), max(coalesce(end_ns, start_ns)) FROM span").fetchall()
    return (first or 0, last or 0)


def arrange(db: duckdb.DuckDBPyConnection) -> None:
    """Makes the tables of the job out of the traces."""
    settle(db)
    derive(db)


def settle(db: duckdb.DuckDBPyConnection) -> None:
    """One row for each span, and no facts but the supervisor's.

    Only what comes more than once is looked at in full: by a hash first, so that it costs two columns of the rest.
    """
    ((kind,),) = db.execute("SELECT table_type FROM information_schema.tables WHERE table_name = 'span'").fetchall()
    db.execute(f"ALTER {'VIEW' if kind == 'VIEW' else 'TABLE'} span RENAME TO line")
    db.execute(
        """CREATE TEMP TABLE twice AS SELECT trace_id, span_id FROM line
           WHERE hash(trace_id, span_id) IN (
             SELECT each FROM (SELECT hash(trace_id, span_id) AS each FROM line)
             QUALIFY each = lag(each) OVER (ORDER BY each))
           GROUP BY trace_id, span_id HAVING count(*) > 1"""
    )
    # Of several lines about one span the supervisor's word counts before the target's, then the ended one.
    db.execute(
        """CREATE TEMP TABLE settled AS SELECT * FROM line SEMI JOIN twice USING (trace_id, span_id)
           QUALIFY row_number() OVER (PARTITION BY trace_id, span_id
             ORDER BY coalesce(source, '') <> 'target' DESC, end_ns IS NOT NULL DESC,
                      coalesce(end_ns, start_ns) DESC) = 1"""
    )
    ((count,),) = db.execute("SELECT count(*) FROM twice").fetchall()
    once = "SELECT * FROM line" + (" ANTI JOIN twice USING (trace_id, span_id)" if count else "")
    # What only a supervisor can know is no fact where a target says it.
    db.execute(
        f"""CREATE TEMP VIEW span AS {_put_together(db, f"({once} UNION ALL SELECT * FROM settled)")}
            WHERE NOT (coalesce(source, '') = 'target'
              AND (name = 'egress connect' OR name LIKE 'process %' OR name = 'ray_guard.violation'))"""
    )


def _put_together(db: duckdb.DuckDBPyConnection, spans: str) -> str:
    """A rollout of many spans is spread over several traces: here it is one, and each span hangs where it belongs."""
    db.execute(
        f"""CREATE TEMP TABLE segment AS SELECT trace_id AS shown, min(attributes['{ROOT_TRACE}']) AS root FROM line
            WHERE name = 'ray_guard.segment' GROUP BY trace_id HAVING root IS NOT NULL"""
    )
    ((count,),) = db.execute("SELECT count(*) FROM segment").fetchall()
    if not count:  # most jobs: then two columns less are read
        return f"SELECT *, trace_id AS shown_trace_id FROM {spans}"
    return f"""SELECT one.* REPLACE (
                 coalesce(g.root, one.trace_id) AS trace_id,
                 CASE WHEN g.root IS NULL THEN parent_id
                      ELSE coalesce(nullif(regexp_extract(links, {_quoted(_PARENT_LINK)}, 1), ''), parent_id) END
                   AS parent_id),
                 one.trace_id AS shown_trace_id
               FROM {spans} one LEFT JOIN segment g ON g.shown = one.trace_id"""


def derive(db: duckdb.DuckDBPyConnection) -> None:
    """Makes the tables of the job out of ``span``: narrow ones, and ``span`` itself is not copied."""
    patterns = {"suspect": prior.SUSPECT, "network": prior.NETWORK, "silent": prior.SILENT, "tells": prior.TELLS}
    for name, pattern in patterns.items():
        db.execute(f"SET VARIABLE {name} = ?", [pattern])
    for statement in _DERIVE:
        db.execute(statement)


def canonical(db: duckdb.DuckDBPyConnection) -> None:
    """Writes the job's addresses as :func:`~ray_guard.attribution.observation.address` writes those of logs.

    Only what has a colon or blanks can be written in more than one way: a job of IPv4 is not touched.
    """
    for table, column in (("node_ip", "ip"), ("flow", "local_ip"), ("flow", "peer_ip")):
        said = db.execute(
            f"SELECT DISTINCT {column} FROM {table} WHERE contains({column}, ':') OR contains({column}, ' ')"
        ).fetchall()
        other = {ip: found for (ip,) in said if (found := address(ip)) not in (None, ip)}
        if other:
            db.register("incoming", pa.table({"written": [*other], "known": [*other.values()]}))
            db.execute(f"UPDATE {table} SET {column} = known FROM incoming WHERE {column} = written")
            db.unregister("incoming")


NODE_IP: Final = """CREATE OR REPLACE TABLE node_ip AS
         SELECT DISTINCT node, unnest(string_split(ips, ',')) AS ip FROM node WHERE ips <> ''"""
_NODE: Final = """JOIN named_node n ON n.host IS NOT DISTINCT FROM s.host AND n.node_id IS NOT DISTINCT FROM s.node_id
           AND n.host_ips IS NOT DISTINCT FROM s.host_ips"""


def _numbered(table: str) -> str:
    return f"(SELECT rowid AS row, row_number() OVER (ORDER BY start_ns, span_id, trace_id) AS number FROM {table})"


_DERIVE: Final = (
    """CREATE TEMP TABLE said_node AS SELECT *, coalesce(array_to_string(list_sort(host_ips), ','), '') AS ips
         FROM (SELECT DISTINCT host, node_id, host_ips FROM span)""",
    """CREATE OR REPLACE TABLE node AS SELECT row_number() OVER (ORDER BY host, node_id, ips) AS node, * FROM (
         SELECT DISTINCT coalesce(host, '') AS host, coalesce(node_id, '') AS node_id, ips FROM said_node)""",
    """CREATE TEMP TABLE named_node AS SELECT n.node, s.host, s.node_id, s.host_ips FROM said_node s
         JOIN node n ON n.host = coalesce(s.host, '') AND n.node_id = coalesce(s.node_id, '') AND n.ips = s.ips""",
    NODE_IP,
    """CREATE OR REPLACE TEMP TABLE about AS SELECT trace_id, min(run) AS run, min(iteration) AS iteration,
         min("group") AS "group", min(rollout) AS rollout, min(policy_version) AS policy_version,
         bool_or(name <> 'ray_guard.reward') AS lived, bool_or(name LIKE 'invoke_agent%') AS agent,
         max(coalesce(end_ns, start_ns)) AS last_ns
         FROM span GROUP BY trace_id""",
    f"""CREATE TEMP TABLE call_span AS
         SELECT s.trace_id, s.shown_trace_id, s.span_id, s.parent_id, s.source, n.node,
           coalesce(s.run, a.run) AS run, coalesce(s.iteration, a.iteration) AS iteration,
           coalesce(s."group", a."group") AS "group", coalesce(s.rollout, a.rollout) AS rollout, s.turn,
           coalesce(s.policy_version, a.policy_version) AS policy_version,
           coalesce(s.attributes['gen_ai.tool.name'], substr(s.name, 14)) AS tool,
           s.attributes['gen_ai.tool.call.id'] AS call_id,
           s.start_ns, greatest(coalesce(s.end_ns, a.last_ns), s.start_ns + 1) AS end_ns,
           coalesce(s.attributes['gen_ai.tool.call.arguments'], s.attributes['input.value'], '') AS arguments
         FROM span s JOIN about a USING (trace_id) {_NODE} WHERE s.name LIKE 'execute_tool%'""",
    # Who knows nothing of rollouts has a trace for each.
    """UPDATE about SET rollout = trace_id WHERE rollout IS NULL
         AND (agent OR trace_id IN (SELECT trace_id FROM call_span WHERE source IS NULL AND rollout IS NULL))""",
    """UPDATE call_span SET rollout = a.rollout FROM about a
         WHERE call_span.rollout IS NULL AND a.rollout IS NOT NULL AND a.trace_id = call_span.trace_id""",
    # Two witnesses of one call, in one trace one within the other: the guard's own has its sockets.
    """DELETE FROM call_span s USING call_span g WHERE s.source IS NULL AND g.source IS NOT NULL
         AND g.trace_id = s.trace_id AND (g.start_ns BETWEEN s.start_ns AND s.end_ns AND g.end_ns <= s.end_ns
           OR s.start_ns BETWEEN g.start_ns AND g.end_ns AND s.end_ns <= g.end_ns)""",
    """CREATE TEMP TABLE turn AS SELECT s.rowid AS row, t.turn FROM call_span s JOIN span t
         ON t.trace_id = s.trace_id AND t.span_id = s.parent_id WHERE s.turn IS NULL AND t.name = 'rl.turn'""",
    # What is numbered is sorted: as little as tells the order.
    f"""CREATE OR REPLACE TABLE call AS
         SELECT m.number AS call, s.* EXCLUDE (parent_id, source) REPLACE (coalesce(s.turn, t.turn) AS turn)
         FROM call_span s JOIN {_numbered("call_span")} m ON m.row = s.rowid LEFT JOIN turn t ON t.row = s.rowid""",
    "DROP TABLE call_span",
    f"""CREATE TEMP TABLE process_span AS
         SELECT s.trace_id, s.span_id, s.parent_id, n.node, TRY_CAST(s.attributes['process.pid'] AS BIGINT) AS pid,
           s.start_ns, s.end_ns,
           coalesce(array_to_string(TRY_CAST(s.attributes['process.command_args'] AS VARCHAR[]), ' '),
                    s.attributes['process.command_line'], s.attributes['process.command_args'],
                    s.attributes['process.executable.path'], '') AS command
         FROM span s {_NODE} WHERE s.name LIKE 'process %'""",
    f"""CREATE TEMP TABLE flow_span AS
         SELECT s.trace_id, s.span_id, s.parent_id, n.node, s.rollout, s.start_ns, s.end_ns,
           s.attributes['network.local.address'] AS local_ip,
           TRY_CAST(s.attributes['network.local.port'] AS INTEGER) AS local_port,
           s.attributes['network.peer.address'] AS peer_ip,
           TRY_CAST(s.attributes['network.peer.port'] AS INTEGER) AS peer_port,
           lower(coalesce(s.attributes['network.transport'], 'tcp')) AS proto,
           lower(s.attributes['server.address']) AS host,
           coalesce(s.attributes['ray_guard.egress.decision'], 'allow') AS decision,
           s.attributes['ray_guard.egress.scope'] = 'ambiguous' AS ambiguous,
           TRY_CAST(s.attributes['ray_guard.egress.candidates'] AS VARCHAR[]) AS candidates
         FROM span s {_NODE} WHERE s.name = 'egress connect'""",
    # What stands between a process and its call: other processes. From the calls down, so that none is passed twice.
    """CREATE TEMP TABLE process_parent AS SELECT k.rowid AS row, p.rowid AS above FROM process_span k
         JOIN process_span p ON p.trace_id = k.trace_id AND p.span_id = k.parent_id""",
    f"""CREATE TEMP TABLE process_owner AS
         WITH RECURSIVE owned AS (
           SELECT k.rowid AS row, c.call, 0 AS between FROM process_span k
             JOIN call c ON c.trace_id = k.trace_id AND c.span_id = k.parent_id
           UNION ALL
           SELECT p.row, o.call, o.between + 1 FROM owned o JOIN process_parent p ON p.above = o.row
             WHERE o.between < {_DEPTH})
         SELECT row, call FROM owned""",
    """CREATE TEMP TABLE flow_owner AS SELECT k.rowid AS row, o.call FROM flow_span k
         JOIN (SELECT trace_id, span_id, call FROM call
           UNION ALL SELECT p.trace_id, p.span_id, o.call FROM process_span p JOIN process_owner o ON o.row = p.rowid) o
           ON o.trace_id = k.trace_id AND o.span_id = k.parent_id""",
    # Below zero: a rollout, where a socket belongs to none of its calls. A reward told after its end has a trace of its
    # own, which is none.
    """CREATE OR REPLACE TABLE rollout AS SELECT -row_number() OVER (ORDER BY trace_id) AS call, trace_id, run,
         iteration, "group", rollout, policy_version FROM about WHERE rollout IS NOT NULL AND lived""",
    """CREATE OR REPLACE TABLE process AS
         SELECT o.call, s.node, s.pid, s.start_ns, coalesce(s.end_ns, a.last_ns) AS end_ns, s.command
         FROM process_span s LEFT JOIN process_owner o ON o.row = s.rowid JOIN about a USING (trace_id)""",
    f"""CREATE OR REPLACE TABLE flow AS
         SELECT m.number AS flow, coalesce(o.call, r.call) AS call, s.node, s.trace_id, s.span_id,
           coalesce(s.rollout, a.rollout) AS rollout, s.start_ns, coalesce(s.end_ns, a.last_ns) AS end_ns,
           s.local_ip, s.local_port, s.peer_ip, s.peer_port, s.proto, s.host, s.decision, s.ambiguous, s.candidates
         FROM flow_span s JOIN {_numbered("flow_span")} m ON m.row = s.rowid LEFT JOIN flow_owner o ON o.row = s.rowid
         JOIN about a USING (trace_id) LEFT JOIN rollout r USING (trace_id)""",
    "DROP TABLE flow_span",
    # A call is alive as long as anything it started: a background process belongs to the call that spawned it.
    """CREATE OR REPLACE TABLE alive AS
         SELECT c.call, c.node, c.start_ns, greatest(c.end_ns, coalesce(l.end_ns, c.end_ns)) AS end_ns,
                c.end_ns AS over_ns
         FROM call c LEFT JOIN (
           SELECT call, max(end_ns) AS end_ns FROM (
             SELECT call, end_ns FROM process UNION ALL SELECT call, end_ns FROM flow) GROUP BY call) l USING (call)""",
    """CREATE OR REPLACE TABLE words AS SELECT *,
         reach >= 2 AND regexp_matches(text, getvariable('tells')) AS tells FROM (SELECT *,
           CASE WHEN text = '' THEN 1
                WHEN regexp_matches(text, getvariable('suspect')) THEN 3
                WHEN regexp_matches(text, getvariable('network')) THEN 2
                WHEN regexp_matches(text, getvariable('silent')) THEN 0 ELSE 1 END AS reach FROM (
         SELECT c.call, concat_ws(' ; ', nullif(c.arguments, ''), array_to_string(p.commands, ' ; ')) AS text
         FROM call c LEFT JOIN (
           SELECT o.call, arg_min(left(s.command, 400), {'at': s.start_ns, 'id': s.span_id}, 16) AS commands
           FROM process_span s JOIN process_owner o ON o.row = s.rowid WHERE s.command <> ''
           GROUP BY o.call) p USING (call)))""",
    "DROP TABLE process_span",
)
