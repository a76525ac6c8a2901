"""Who may have caused an alert: joins alerts with calls, strongest evidence first. Runs later, on any machine.

The ladder: the recorded *socket*; the socket behind a *nat* map; the *process* that a kernel's witness names; a call
that names or used the *destination*; a call that was open in the *interval*. Each row of ``candidate`` is one call (or,
below zero, one rollout) for one alert, with the strongest tier that spoke for it.
"""

from __future__ import annotations

from typing import Final

import duckdb

from ray_guard.attribution import nat, prior

TIERS: Final = ("socket", "nat", "process", "destination", "interval")
BUCKET_NS: Final = 30_000_000_000
"""Width of the buckets that interval joins hash by."""
_GATEWAYS: Final = 3
"""How many may translate one after the other."""
_SOME: Final = 4_000
"""Translations of one map that its clock is told by."""
_COMPARED: Final = 50_000_000
"""Pairs of an alert without a port and a translation to its peer that are looked at: of the rarest peers first."""
_ALWAYS: Final = nat.ALWAYS
LOOKBACK_NS: Final = 300_000_000_000
"""How far back a record may look that says only when it was written, or when something ended."""
LINGER_NS: Final = 180_000_000_000
"""How long ago a call that tunnels, mines or scans may have ended and still be the cause."""


def join(db: duckdb.DuckDBPyConnection) -> None:
    """Fills ``candidate``: alert, call, tier (its number), gap_ns (0 inside), span_ns (how long the call was alive),
    reach, tells (its text names a destination), named (this one), used (the call has a recorded socket to there),
    watched (sockets of its rollout were recorded).

    Fills ``unmapped`` (alert): those of an address whose NAT map knows nobody for their port, or none of the job.

    Needs ``clock`` (source, skew_ns, drift, reference_ns, slack_ns) beside what :func:`store.prepare` makes.
    """
    for statement in _BEFORE:
        db.execute(statement)
    by_interval(db)
    for statement in _AFTER:
        db.execute(statement)


def translations(db: duckdb.DuckDBPyConnection) -> None:
    """Fills ``translation``: ``nat``, and of what its maps say one after the other so much that their clocks, which
    nothing is known of yet, can be told by it."""
    db.execute("CREATE OR REPLACE TABLE translation AS SELECT *, 1 AS gateways FROM nat")
    for depth in range(2, _GATEWAYS + 1):
        db.execute(
            f"""INSERT INTO translation BY NAME
                  SELECT {depth} AS gateways, {_THROUGH}, o.start_ns, o.end_ns
                  FROM translation i JOIN (
                      SELECT * FROM nat QUALIFY row_number() OVER (
                        PARTITION BY source ORDER BY hash(inside_port, start_ns), inside_ip, outside_port) <= {_SOME}) o
                    ON {_NEXT} AND i.gateways = {depth - 1}
                  ORDER BY abs(i.start_ns - o.start_ns), o.start_ns, i.inside_ip, i.inside_port LIMIT {100 * _SOME}"""
        )


def by_interval(db: duckdb.DuckDBPyConnection) -> None:
    """Fills ``by_interval`` (alert, call, gap_ns): each call that was open, on the machine meant, when an alert fell.

    The kernel of the join: needs ``alive``, ``timed`` and ``place``, and of each no more than numbers and times.
    """
    for statement in _BY_INTERVAL:
        db.execute(statement)


def _overlap(left: str, right: str, slack: str) -> str:
    return f"{left}.end_ns + {slack} > {right}.start_ns AND {left}.start_ns - {slack} < {right}.end_ns"


_APART: Final = "greatest(0, o.start_ns - w.end_ns, w.start_ns - o.end_ns)"
_MEET: Final = """w.bucket = greatest(w.first, o.first)
             AND w.end_ns + w.slack_ns > o.start_ns AND w.start_ns - w.slack_ns < o.end_ns"""
_GAP: Final = "greatest(0, f.start_ns - s.end_ns, s.start_ns - f.end_ns)"


def same_host(one: str, other: str) -> str:
    """The SQL that tells whether two names are one host's: alike, or as far as the one of them without domain goes.
    Addresses have no domain."""
    first, second = (f"trim(lower({each}), '.')" for each in (one, other))
    bare = f"""(NOT contains({first}, '.') OR NOT contains({second}, '.'))
               AND split_part({first}, '.', 1) = split_part({second}, '.', 1)"""
    return f"({first} = {second} OR {bare})"


_HELD: Final = """(p.proto = '' OR m.proto = '' OR m.proto = p.proto)
             AND (m.peer_ip IS NULL OR p.peer_ip IS NULL OR m.peer_ip = p.peer_ip)
             AND (m.peer_port IS NULL OR p.peer_port IS NULL OR m.peer_port = p.peer_port)
             AND p.end_ns + p.slack_ns > m.start_ns - m.slack_ns AND p.start_ns - p.slack_ns < m.end_ns + m.slack_ns"""

_NEXT: Final = """i.outside_ip = o.inside_ip AND i.outside_port = o.inside_port
               AND (i.proto = '' OR o.proto = '' OR i.proto = o.proto)
               AND (i.peer_ip IS NULL OR coalesce(o.aimed_ip, o.peer_ip, i.peer_ip) = i.peer_ip)"""
"""Whether what comes out of the map ``i`` goes into the map ``o``, as far as addresses tell."""
_THROUGH: Final = """o.source, i.inside_ip, i.inside_port, o.outside_ip, o.outside_port, o.proto,
               o.peer_ip, o.peer_port,
               coalesce(i.aimed_ip, o.aimed_ip) AS aimed_ip, coalesce(i.aimed_port, o.aimed_port) AS aimed_port"""

_BY_INTERVAL: Final = (
    # Bucketed as they stream by: spread out over their buckets, neither side need ever be in memory as a table.
    f"""CREATE OR REPLACE TABLE by_interval AS
         WITH o AS (
           SELECT call, node, start_ns, end_ns, start_ns // {BUCKET_NS} AS first,
             unnest(generate_series(start_ns // {BUCKET_NS}, end_ns // {BUCKET_NS})) AS bucket FROM alive),
         w AS (
           SELECT t.alert, p.node, t.start_ns, t.end_ns, t.slack_ns, (t.start_ns - t.slack_ns) // {BUCKET_NS} AS first,
             unnest(generate_series(
               (t.start_ns - t.slack_ns) // {BUCKET_NS}, (t.end_ns + t.slack_ns) // {BUCKET_NS})) AS bucket
           FROM timed t JOIN place p USING (alert))
         SELECT w.alert, o.call, {_APART} AS gap_ns
         FROM w JOIN o ON o.node = w.node AND o.bucket = w.bucket AND {_MEET}
         WHERE w.node IS NOT NULL
         UNION ALL
         SELECT w.alert, o.call, {_APART}
         FROM (SELECT * FROM w WHERE node IS NULL) w JOIN o ON o.bucket = w.bucket AND {_MEET}""",
)
_BEFORE: Final = (
    # Alert times by the traces' clock, widened by what their semantics leave open.
    f"""CREATE OR REPLACE TABLE timed AS
          SELECT a.* EXCLUDE (start_ns, end_ns) REPLACE (
              -- Types and codes of ICMP stand where ports do; 0 is none.
              CASE WHEN proto IN ('icmp', 'icmp6') THEN NULL ELSE nullif(src_port, 0) END AS src_port,
              CASE WHEN proto IN ('icmp', 'icmp6') THEN NULL ELSE nullif(dst_port, 0) END AS dst_port),
            k.slack_ns,
            CAST(a.start_ns - k.skew_ns - k.drift * (a.start_ns - k.reference_ns) AS BIGINT)
              - CASE WHEN a.semantics IN ('end', 'ingest') THEN {LOOKBACK_NS} ELSE 0 END AS start_ns,
            CAST(a.end_ns - k.skew_ns - k.drift * (a.end_ns - k.reference_ns) AS BIGINT) AS end_ns
          FROM alert a JOIN clock k ON k.source = a.source AND a.alert >= k.first_alert AND a.alert < k.until_alert""",
    # An outside port is one connection's at a time: what was not seen of it lies between the ones before and after.
    f"""CREATE OR REPLACE TABLE mapping AS
         WITH seen AS (
           SELECT *, nullif(start_ns, {_ALWAYS[0]}) AS began, nullif(end_ns, {_ALWAYS[1]}) AS ended FROM nat),
         bounded AS (
           SELECT * EXCLUDE (began, ended) REPLACE (
             CASE WHEN ended IS NULL THEN start_ns
                  ELSE coalesce(began, least(lag(ended IGNORE NULLS) OVER w, ended - 1), start_ns) END AS start_ns,
             CASE WHEN began IS NULL THEN end_ns
                  ELSE coalesce(ended, greatest(lead(began IGNORE NULLS) OVER w, began + 1), end_ns) END AS end_ns)
           FROM seen WINDOW w AS (PARTITION BY source, outside_ip, outside_port, proto, peer_ip, peer_port
                        ORDER BY coalesce(began, ended), inside_ip, inside_port))
         SELECT b.* EXCLUDE (start_ns, end_ns), 1 AS gateways, k.slack_ns,
           CAST(b.start_ns - k.skew_ns - k.drift * (b.start_ns - k.reference_ns) AS BIGINT) AS start_ns,
           CAST(b.end_ns - k.skew_ns - k.drift * (b.end_ns - k.reference_ns) AS BIGINT) AS end_ns
         FROM bounded b JOIN clock k USING (source) WHERE b.start_ns < b.end_ns""",
    # From one gateway to the next: who is an outside for the one is an inside for the other.
    *(
        f"""INSERT INTO mapping BY NAME
             SELECT {depth} AS gateways, {_THROUGH},
               greatest(i.slack_ns, o.slack_ns) AS slack_ns, greatest(i.start_ns, o.start_ns) AS start_ns,
               least(i.end_ns, o.end_ns) AS end_ns
             FROM mapping i JOIN mapping o ON {_NEXT} AND i.gateways = {depth - 1} AND o.gateways = 1
               AND i.end_ns + i.slack_ns + o.slack_ns > o.start_ns AND i.start_ns - i.slack_ns - o.slack_ns < o.end_ns
             WHERE greatest(i.start_ns, o.start_ns) < least(i.end_ns, o.end_ns)"""
        for depth in range(2, _GATEWAYS + 1)
    ),
    # Either end may be ours: a sensor that saw an answer first exchanges them. A map adds who stood behind an address.
    # A side may come twice: what is made of them takes each pair once.
    f"""CREATE OR REPLACE TABLE side AS
         WITH plain AS (
           SELECT alert, inside_ip AS local_ip, inside_port AS local_port, dst_ip AS peer_ip, dst_port AS peer_port,
               start_ns, end_ns, slack_ns, proto, host
             FROM timed WHERE inside_ip IS NOT NULL
           UNION ALL SELECT alert, src_ip, src_port, dst_ip, dst_port, start_ns, end_ns, slack_ns, proto, host
             FROM timed WHERE src_ip IS NOT NULL
           UNION ALL SELECT alert, dst_ip, dst_port, src_ip, src_port, start_ns, end_ns, slack_ns, proto, host
             FROM timed WHERE dst_ip IS NOT NULL)
         SELECT alert, local_ip, local_port, peer_ip, peer_port, false AS mapped, start_ns, end_ns, slack_ns, proto,
             host FROM plain
         UNION ALL
         SELECT p.alert, m.inside_ip, m.inside_port,
             coalesce(m.aimed_ip, p.peer_ip), coalesce(m.aimed_port, p.peer_port), true,
             greatest(p.start_ns, m.start_ns - p.slack_ns), least(p.end_ns, m.end_ns + p.slack_ns), p.slack_ns,
             p.proto, p.host
           FROM plain p JOIN mapping m ON m.outside_ip = p.local_ip AND m.outside_port = p.local_port AND {_HELD}
         UNION ALL
         -- Of a whole address no port is said, nor of what has none.
         SELECT p.alert, m.inside_ip, p.local_port,
             coalesce(m.aimed_ip, p.peer_ip), coalesce(m.aimed_port, p.peer_port), true,
             p.start_ns, p.end_ns, p.slack_ns, p.proto, p.host
           FROM plain p JOIN (SELECT * FROM mapping WHERE outside_port IS NULL) m ON m.outside_ip = p.local_ip
             AND {_HELD}""",
    # Without a port the map tells who went to that peer then; one that was given, for what logs carry is not all.
    f"""INSERT INTO side
         WITH p AS (SELECT * FROM side WHERE local_port IS NULL AND peer_ip IS NOT NULL AND NOT mapped),
         m AS (SELECT *, peer_ip AS to_ip FROM mapping
           WHERE outside_port IS NOT NULL AND source NOT IN (SELECT source FROM alert)),
         few AS (
           SELECT outside_ip, to_ip FROM (SELECT outside_ip, to_ip, count(*) AS rows FROM m GROUP BY ALL)
             JOIN (SELECT local_ip, peer_ip, count(*) AS alerts FROM p GROUP BY ALL)
               ON local_ip = outside_ip AND peer_ip = to_ip
           QUALIFY sum(rows * alerts) OVER (ORDER BY rows * alerts, outside_ip, to_ip) <= {_COMPARED})
         SELECT p.alert, m.inside_ip, m.inside_port,
             coalesce(m.aimed_ip, p.peer_ip), coalesce(m.aimed_port, p.peer_port), true,
             greatest(p.start_ns, m.start_ns - p.slack_ns), least(p.end_ns, m.end_ns + p.slack_ns), p.slack_ns,
             p.proto, p.host
           FROM p JOIN (SELECT * FROM m SEMI JOIN few USING (outside_ip, to_ip)) m
             ON m.outside_ip = p.local_ip AND m.to_ip = p.peer_ip AND {_HELD}""",
    # Behind an address whose map was given stood somebody whom the map, as far as it reaches, does not know. What logs
    # say of their own records' translation is no such map: it is silent of all that they do not record. Nor is one of
    # which no row fits any record of that address: its clock may be wrong.
    """CREATE OR REPLACE TABLE unmapped AS
         WITH reach AS (
           SELECT outside_ip, min(start_ns) AS start_ns, max(end_ns) AS end_ns FROM mapping
           WHERE source NOT IN (SELECT source FROM alert) AND outside_ip <> inside_ip
           GROUP BY outside_ip HAVING bool_and(outside_port IS NOT NULL OR proto IN ('icmp', 'icmp6'))),
         fits AS (
           SELECT DISTINCT p.local_ip FROM side p JOIN side m ON m.alert = p.alert AND m.mapped WHERE NOT p.mapped)
         SELECT DISTINCT s.alert FROM side s JOIN reach r ON r.outside_ip = s.local_ip
           AND s.start_ns >= r.start_ns AND s.end_ns <= r.end_ns
         WHERE NOT s.mapped AND s.local_port IS NOT NULL AND s.local_ip IN (SELECT local_ip FROM fits)
           AND s.alert NOT IN (SELECT alert FROM side WHERE mapped)
         -- Or somebody who is none of the job's machines, by a map that knows those by their addresses.
         UNION
         SELECT s.alert FROM side s JOIN side m ON m.alert = s.alert AND m.mapped
           WHERE NOT s.mapped AND s.local_ip IN (
             SELECT outside_ip FROM mapping SEMI JOIN node_ip ON ip = inside_ip WHERE outside_ip <> inside_ip)
           GROUP BY s.alert HAVING bool_and(m.local_ip NOT IN (SELECT ip FROM node_ip))""",
    f"""CREATE OR REPLACE TABLE by_socket AS
          SELECT s.alert,
            unnest(CASE WHEN f.ambiguous AND len(f.candidates) > 0 THEN f.candidates ELSE [NULL] END) AS one_of,
            f.call, f.trace_id, f.flow, CASE WHEN s.mapped THEN 1 ELSE 0 END AS tier, {_GAP} AS gap_ns, f.decision
          FROM side s JOIN flow f ON f.local_ip = s.local_ip AND f.local_port = s.local_port
            AND f.peer_ip = s.peer_ip AND f.peer_port = s.peer_port
            AND (s.proto = '' OR f.proto = s.proto)
            AND {_overlap("s", "f", "s.slack_ns")}""",
    # Where a machine is meant: by its address, by its name, or (behind a map that nobody has) any.
    # Names are few: they are compared with each other, not alert by alert.
    f"""CREATE OR REPLACE TABLE place AS
         WITH meant AS (
           SELECT w.node AS said, n.node FROM (SELECT DISTINCT node FROM timed WHERE node IS NOT NULL) w JOIN node n
             ON w.node = n.node_id OR {same_host("w.node", "n.host")}
           UNION SELECT w.node, i.node FROM (SELECT DISTINCT node FROM timed) w JOIN node_ip i ON i.ip = w.node),
         known AS (
           SELECT s.alert, i.node FROM side s JOIN node_ip i ON i.ip = s.local_ip
           UNION
           SELECT t.alert, m.node FROM timed t JOIN meant m ON m.said = t.node)
         SELECT alert, node, true AS known FROM known WHERE node IS NOT NULL
         UNION ALL
         SELECT t.alert, NULL, false FROM timed t ANTI JOIN known USING (alert)""",
    *(
        f"""{verb} SELECT t.alert, f.call, 2 AS tier,
              greatest(0, f.start_ns - t.end_ns, t.start_ns - f.end_ns) AS gap_ns
            FROM timed t JOIN place p USING (alert) JOIN process f
              ON {same} AND {where} AND f.call IS NOT NULL
              AND t.end_ns + t.slack_ns > f.start_ns AND t.start_ns - t.slack_ns < f.end_ns"""
        for verb, same, where in (
            ("CREATE OR REPLACE TABLE by_process AS", "f.pid = t.pid", "f.node = p.node"),
            ("INSERT INTO by_process", "f.pid = t.pid", "p.node IS NULL"),
            ("INSERT INTO by_process", "f.command = t.command AND t.command <> ''", "f.node = p.node"),
            ("INSERT INTO by_process", "f.command = t.command AND t.command <> ''", "p.node IS NULL"),
        )
    ),
)
_AFTER: Final = (
    # Who recorded one socket of a rollout would have recorded those of its other calls as well.
    """CREATE OR REPLACE TABLE watched AS SELECT call FROM call SEMI JOIN flow USING (trace_id)
         UNION SELECT call FROM flow WHERE call IS NOT NULL""",
    # What tunnels, mines or scans may go on when its call has ended, where no processes are recorded. Pairs are made of
    # what such calls name and where alerts went, not of calls and alerts.
    f"""CREATE OR REPLACE TABLE lingering AS
         WITH suspect AS (
             SELECT l.call, l.node, l.end_ns, unnest(list_distinct({prior.NAMED.format(text="w.text")})) AS name
             FROM alive l JOIN words w USING (call) WHERE w.reach = 3),
           gone AS (
             SELECT DISTINCT t.alert, p.node, t.start_ns, t.slack_ns, unnest([t.dst_ip, t.host]) AS name
             FROM timed t JOIN place p USING (alert)
             WHERE alert NOT IN (SELECT alert FROM by_socket UNION SELECT alert FROM by_process)),
           heard AS (
             SELECT *, unnest([start_ns // {LINGER_NS}, start_ns // {LINGER_NS} - 1]) AS bucket
             FROM gone SEMI JOIN suspect USING (name, node))
         SELECT DISTINCT t.alert, s.call, t.start_ns - s.end_ns AS gap_ns
         FROM heard t JOIN suspect s ON s.name = t.name AND s.node = t.node AND s.end_ns // {LINGER_NS} = t.bucket
           AND s.end_ns <= t.start_ns - t.slack_ns AND s.end_ns > t.start_ns - {LINGER_NS}""",
    # A call meets an alert in one interval only: what has to be brought together is the little hard evidence.
    """CREATE OR REPLACE TABLE best AS
         WITH met AS (
           SELECT alert, coalesce(c.call, b.call) AS call, tier, gap_ns FROM by_socket b
             LEFT JOIN call c ON b.one_of IS NOT NULL AND c.trace_id = b.trace_id AND c.span_id = b.one_of
           UNION ALL SELECT * FROM by_process),
         hard AS (SELECT alert, call, min(tier) AS tier, min(gap_ns) AS gap_ns FROM met WHERE call IS NOT NULL
           GROUP BY alert, call)
         SELECT alert, call, coalesce(h.tier, 4) AS tier, least(h.gap_ns, i.gap_ns) AS gap_ns
         FROM (FROM by_interval UNION ALL FROM lingering) i FULL JOIN hard h USING (alert, call)""",
    # What a call's recorded sockets say of an alert's destination: asked of those who may have caused it alone, since
    # a place that everybody talks to would make a pair of every alert with every call.
    """CREATE OR REPLACE TABLE used AS
         WITH open AS (SELECT call, peer_ip, peer_port, host FROM flow WHERE call IS NOT NULL AND decision <> 'deny'),
         asked AS (SELECT b.alert, b.call, s.peer_ip, s.peer_port
                   FROM best b SEMI JOIN open USING (call) JOIN side s USING (alert))
         SELECT a.alert, a.call FROM asked a
           SEMI JOIN open o ON o.call = a.call AND o.peer_ip = a.peer_ip AND o.peer_port = a.peer_port
         UNION
         SELECT a.alert, a.call FROM (SELECT * FROM asked WHERE peer_port IS NULL) a
           SEMI JOIN open o ON o.call = a.call AND o.peer_ip = a.peer_ip
         UNION
         SELECT b.alert, b.call FROM best b JOIN timed t USING (alert)
           SEMI JOIN open o ON o.call = b.call AND o.host = t.host""",
    # Texts that hold an address are few, and so are alerts that name a host: each is looked for among those alone.
    f"""CREATE OR REPLACE TABLE named AS
         SELECT b.alert, b.call FROM (SELECT * FROM words WHERE regexp_matches(text, '{prior.ADDRESS}')) w
           JOIN best b USING (call) JOIN timed t USING (alert)
           WHERE {prior.names("w.text", "t.dst_ip")} OR {prior.names("w.text", "t.src_ip")}
         UNION
         SELECT b.alert, b.call FROM (SELECT * FROM timed WHERE host <> '') t
           JOIN best b USING (alert) JOIN words w USING (call) WHERE {prior.names("w.text", "t.host")}""",
    """CREATE OR REPLACE TABLE candidate AS
         WITH about AS (
           SELECT call, l.end_ns - l.start_ns AS span_ns, w.reach, w.tells, v.call IS NOT NULL AS watched
           FROM alive l FULL JOIN watched v USING (call) LEFT JOIN words w USING (call))
         SELECT b.*, coalesce(a.span_ns, 0) AS span_ns, coalesce(a.reach, 1) AS reach,
           coalesce(a.tells, false) AS tells, n.call IS NOT NULL AS named, u.call IS NOT NULL AS used,
           coalesce(a.watched, false) AS watched
         FROM best b LEFT JOIN about a USING (call) LEFT JOIN named n USING (alert, call)
           LEFT JOIN used u USING (alert, call)""",
    "DROP TABLE by_interval",
    "DROP TABLE lingering",
    "DROP TABLE best",
    "DROP TABLE used",
    "DROP TABLE named",
)
