"""Who may have caused an alert: joins alerts with calls, strongest evidence first. Runs later, on any machine.

The ladder: the recorded *socket*; the socket behind a *nat* map; the *process* that a kernel's witness names; a call
that names or used the *destination*; a call that was open in the *interval*. Each row of ``candidate`` is one call (or,
below zero, one rollout) for one alert, with the strongest tier that spoke for it.
"""

from __future__ import annotations

from typing import Final

import duckdb

TIERS: Final = ("socket", "nat", "process", "destination", "interval")
BUCKET_NS: Final = 30_000_000_000
"""Width of the buckets that interval joins hash by."""
LOOKBACK_NS: Final = 300_000_000_000
"""How far back a record may look that says only when it was written, or when something ended."""


def join(db: duckdb.DuckDBPyConnection) -> None:
    """Fills ``candidate``: alert, call, tier (its number), gap_ns (0 inside), span_ns (how long the call was alive),
    reach, named, used (the call has a recorded socket to there), watched (its sockets were recorded at all).

    Needs ``clock`` (source, skew_ns, drift, reference_ns, slack_ns) beside what :func:`store.prepare` makes.
    """
    for statement in _JOIN:
        db.execute(statement)


def _overlap(left: str, right: str, slack: str) -> str:
    return f"{left}.end_ns + {slack} > {right}.start_ns AND {left}.start_ns - {slack} < {right}.end_ns"


_GAP: Final = "greatest(0, f.start_ns - s.end_ns, s.start_ns - f.end_ns)"

_JOIN: Final = (
    # Alert times by the traces' clock, widened by what their semantics leave open.
    f"""CREATE OR REPLACE TABLE timed AS
          SELECT a.* EXCLUDE (start_ns, end_ns), k.slack_ns,
            CAST(a.start_ns - k.skew_ns - k.drift * (a.start_ns - k.reference_ns) AS BIGINT)
              - CASE WHEN a.semantics IN ('end', 'ingest') THEN {LOOKBACK_NS} ELSE 0 END AS start_ns,
            CAST(a.end_ns - k.skew_ns - k.drift * (a.end_ns - k.reference_ns) AS BIGINT) AS end_ns
          FROM alert a JOIN clock k USING (source)""",
    """CREATE OR REPLACE TABLE mapping AS
         SELECT n.* EXCLUDE (start_ns, end_ns), n.start_ns - k.skew_ns AS start_ns, n.end_ns - k.skew_ns AS end_ns
         FROM nat n JOIN clock k USING (source)""",
    # Either end may be ours: a sensor that saw an answer first exchanges them. A map adds who stood behind an address.
    """CREATE OR REPLACE TABLE side AS
         WITH plain AS (
           SELECT alert, inside_ip AS local_ip, inside_port AS local_port, dst_ip AS peer_ip, dst_port AS peer_port
             FROM timed WHERE inside_ip IS NOT NULL
           UNION ALL SELECT alert, src_ip, src_port, dst_ip, dst_port FROM timed WHERE src_ip IS NOT NULL
           UNION ALL SELECT alert, dst_ip, dst_port, src_ip, src_port FROM timed WHERE dst_ip IS NOT NULL)
         SELECT DISTINCT p.*, false AS mapped, t.start_ns, t.end_ns, t.slack_ns, t.proto, t.host
           FROM plain p JOIN timed t USING (alert)
         UNION
         SELECT p.alert, m.inside_ip, m.inside_port, p.peer_ip, p.peer_port, true,
             greatest(t.start_ns, m.start_ns - t.slack_ns), least(t.end_ns, m.end_ns + t.slack_ns), t.slack_ns,
             t.proto, t.host
           FROM plain p JOIN timed t USING (alert)
           JOIN mapping m ON m.outside_ip = p.local_ip AND m.outside_port = p.local_port
             AND (t.proto = '' OR m.proto = '' OR m.proto = t.proto)
             AND (m.peer_ip IS NULL OR p.peer_ip IS NULL OR m.peer_ip = p.peer_ip)
             AND t.end_ns + t.slack_ns > m.start_ns AND t.start_ns - t.slack_ns < m.end_ns""",
    f"""CREATE OR REPLACE TABLE by_socket AS
          SELECT s.alert,
            unnest(CASE WHEN f.ambiguous AND len(f.candidates) > 0 THEN f.candidates ELSE [NULL] END) AS one_of,
            f.call, f.trace_id, f.flow, CASE WHEN s.mapped THEN 1 ELSE 0 END AS tier, {_GAP} AS gap_ns, f.decision
          FROM side s JOIN flow f ON f.local_ip = s.local_ip AND f.local_port = s.local_port
            AND f.peer_ip = s.peer_ip AND f.peer_port = s.peer_port
            AND (s.proto = '' OR f.proto = s.proto)
            AND {_overlap("s", "f", "s.slack_ns")}""",
    # Where a machine is meant: by its address, by its name, or (behind a map that nobody has) any.
    """CREATE OR REPLACE TABLE place AS
         WITH known AS (
           SELECT DISTINCT s.alert, i.node FROM side s JOIN node_ip i ON i.ip = s.local_ip
           UNION
           SELECT t.alert, n.node FROM timed t JOIN node n
             ON t.node IS NOT NULL AND (lower(t.node) = lower(n.host) OR t.node = n.node_id
               OR split_part(lower(t.node), '.', 1) = split_part(lower(n.host), '.', 1)))
         SELECT alert, node, true AS known FROM known WHERE node IS NOT NULL
         UNION ALL
         SELECT t.alert, NULL, false FROM timed t WHERE t.alert NOT IN (SELECT alert FROM known)""",
    """CREATE OR REPLACE TABLE by_process AS
         SELECT t.alert, f.call, 2 AS tier, greatest(0, f.start_ns - t.end_ns, t.start_ns - f.end_ns) AS gap_ns
         FROM timed t JOIN place p USING (alert) JOIN process f
           ON (p.node IS NULL OR f.node = p.node) AND f.call IS NOT NULL
           AND (f.pid = t.pid OR (t.command <> '' AND f.command = t.command))
           AND t.end_ns + t.slack_ns > f.start_ns AND t.start_ns - t.slack_ns < f.end_ns
         WHERE t.pid IS NOT NULL OR t.command IS NOT NULL""",
    f"""CREATE OR REPLACE TABLE open_calls AS
          SELECT *, unnest(generate_series(start_ns // {BUCKET_NS}, end_ns // {BUCKET_NS})) AS bucket FROM alive""",
    f"""CREATE OR REPLACE TABLE wanted AS
          SELECT t.alert, p.node, t.start_ns, t.end_ns, t.slack_ns, unnest(generate_series(
            (t.start_ns - t.slack_ns) // {BUCKET_NS}, (t.end_ns + t.slack_ns) // {BUCKET_NS})) AS bucket
          FROM timed t JOIN place p USING (alert)""",
    # A pair may meet in several buckets: it counts in the first that both have.
    """CREATE OR REPLACE TABLE by_interval AS
         SELECT w.alert, o.call, 4 AS tier, greatest(0, o.start_ns - w.end_ns, w.start_ns - o.end_ns) AS gap_ns
         FROM wanted w JOIN open_calls o ON o.node = w.node AND o.bucket = w.bucket
           AND w.end_ns + w.slack_ns > o.start_ns AND w.start_ns - w.slack_ns < o.end_ns
         WHERE w.node IS NOT NULL
         UNION
         SELECT w.alert, o.call, 4, greatest(0, o.start_ns - w.end_ns, w.start_ns - o.end_ns)
         FROM wanted w JOIN open_calls o ON o.bucket = w.bucket
           AND w.end_ns + w.slack_ns > o.start_ns AND w.start_ns - w.slack_ns < o.end_ns
         WHERE w.node IS NULL""",
    # What a call's recorded sockets say of an alert's destination.
    """CREATE OR REPLACE TABLE used AS
         SELECT DISTINCT s.alert, f.call FROM side s JOIN flow f ON f.peer_ip = s.peer_ip
           AND (s.peer_port IS NULL OR f.peer_port = s.peer_port)
         WHERE f.call IS NOT NULL AND f.decision <> 'deny'
         UNION
         SELECT DISTINCT t.alert, f.call FROM timed t JOIN flow f ON f.host = t.host
         WHERE f.call IS NOT NULL AND f.decision <> 'deny'""",
    """CREATE OR REPLACE TABLE watched AS SELECT DISTINCT call FROM flow WHERE call IS NOT NULL""",
    """CREATE OR REPLACE TABLE candidate AS
         WITH met AS (
           SELECT alert, coalesce(c.call, b.call) AS call, tier, gap_ns FROM by_socket b
             LEFT JOIN call c ON b.one_of IS NOT NULL AND c.trace_id = b.trace_id AND c.span_id = b.one_of
           UNION ALL SELECT * FROM by_process
           UNION ALL SELECT * FROM by_interval),
         strongest AS (
           SELECT alert, call, min(tier) AS tier, min(gap_ns) AS gap_ns FROM met WHERE call IS NOT NULL GROUP BY ALL),
         best AS (SELECT alert, call, min(tier) AS tier, min(gap_ns) AS gap_ns FROM strongest GROUP BY alert, call)
         SELECT b.*, coalesce(l.end_ns - l.start_ns, 0) AS span_ns, t.source,
           coalesce(w.reach, 1) AS reach,
           coalesce(contains(w.text, t.dst_ip), false) OR coalesce(contains(w.text, t.src_ip), false)
             OR coalesce(t.host <> '' AND contains(lower(w.text), t.host), false) AS named,
           u.call IS NOT NULL AS used, v.call IS NOT NULL AS watched
         FROM best b JOIN timed t USING (alert) LEFT JOIN alive l USING (call) LEFT JOIN words w USING (call)
         LEFT JOIN used u USING (alert, call) LEFT JOIN watched v USING (call)""",
)
