"""How far a log's clock is from the traces'. Runs later, on any machine.

An alert that belongs to something recorded allows a range of offsets: all that put it inside that thing's life. The
offset that most alerts allow at once is the skew. Recorded sockets tell it best; without them, calls whose text names
the destination, or that tunnel, mine or scan (:mod:`~ray_guard.attribution.skew`). Where neither singles out one offset
the skew is *not identifiable*, and is said to be so: a wrong one, silently used, would name wrong calls.

Over all calls alike the same search is useless: some call is open at any offset.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import duckdb
import numpy as np
import numpy.typing as npt

from ray_guard.attribution import prior, skew
from ray_guard.attribution.candidates import same_host
from ray_guard.attribution.skew import REACH_NS, SECOND

_SLACK_NS: Final = SECOND
_UNKNOWN_SLACK_NS: Final = 2 * SECOND
_TOLD_NS: Final = SECOND // 2
_NEARLY_ALL: Final = 0.9
_PAIRS: Final = 400_000
_FEW: Final = 5
_TOGETHER_NS: Final = 10 * SECOND
_PLACES: Final = 64
"""How many destinations of alerts that tell no machine are looked for, in at most so many commands:"""
_CALLS: Final = 200_000
_INTS = npt.NDArray[np.int64]
_FLOATS = npt.NDArray[np.float64]


class Clock(NamedTuple):
    """Source clock minus trace clock, zone included.

    Args:
        skew_ns: at ``reference_ns`` of the source's clock.
        drift: nanoseconds per nanosecond.
        low_ns, high_ns: interval of the skew.
        identifiable: False: nothing tells it to half a second; ``skew_ns`` is the best that is known, 0 for nothing.
        slack_ns: how far a corrected time may still be off.
        since: the first alert that it holds for: a clock may be set in between.
    """

    skew_ns: int = 0
    drift: float = 0.0
    reference_ns: int = 0
    low_ns: int = 0
    high_ns: int = 0
    identifiable: bool = False
    slack_ns: int = _UNKNOWN_SLACK_NS
    since: int = 0

    @property
    def bounded(self) -> bool:
        """Whether anything is known of the skew."""
        return self.high_ns > self.low_ns


def estimate(db: duckdb.DuckDBPyConnection, log: Sequence[int]) -> list[Clock]:
    """The clock of one log, from ``alert``, ``nat`` and the job's tables; where it was set in between, both.

    Args:
        log: its sources, in the order of their alerts: more than one where it was rotated.
    """
    found = db.execute(_SOCKETS, {"log": log, "reach": REACH_NS, "limit": _PAIRS}).fetchnumpy()
    best = Clock()
    if len(found["alert"]):
        ranges = found["alert"], found["low"], found["high"], found["seen"]
        best = of_ranges(*ranges)
        if stepped := of_step(*ranges, best):
            return list(stepped)
        if best.identifiable:
            return [best._replace(identifiable=not _another(*ranges, best))]
    # Where the sockets themselves were found and tell no clock, that somebody went there is nothing new.
    told = _by_texts(db, log, sockets=not len(found["alert"]))
    if best.bounded and not best.low_ns - SECOND <= told.skew_ns <= best.high_ns + SECOND:
        return [best]
    return [told if told.identifiable or not best.bounded else best]


def _by_texts(db: duckdb.DuckDBPyConnection, log: Sequence[int], *, sockets: bool) -> Clock:
    """By what commands name; ``sockets``: and by recorded sockets to there, whatever their port."""
    ((room_ns,),) = db.execute("SELECT coalesce(max(end_ns) - min(start_ns), 0) FROM alive").fetchall()
    for statement in _TELLING:
        db.execute(statement, {"log": log} if "$log" in statement else None)
    found = db.execute(_TEXTS, {"reach": REACH_NS, "sockets": sockets}).fetchnumpy()
    if not room_ns or not len(found["alert"]):
        return Clock()
    by = skew.of_texts(skew.Telling(**{name: found[name] for name in skew.Telling._fields}), room_ns)
    if not by.near:
        return Clock()
    slack = min(max(by.high - by.offset, by.offset - by.low), skew.FURTHEST_NS) + _SLACK_NS
    return Clock(by.offset, by.drift, by.reference, by.low, by.high, identifiable=by.told, slack_ns=slack)


def of_map(db: duckdb.DuckDBPyConnection, source: int) -> Clock:
    """The clock of a NAT map, from the sockets that it translated."""
    found = db.execute(_MAPPED, {"source": source, "reach": REACH_NS, "limit": _PAIRS}).fetchnumpy()
    if not len(found["alert"]):
        return Clock()
    return of_ranges(found["alert"], found["low"], found["high"], found["seen"])


def of_ranges(alert: _INTS, low: _INTS, high: _INTS, at: _INTS) -> Clock:
    """The offset that most alerts allow, each of which has nearly one range: a recorded socket's.

    Args:
        alert: whose range it is; an alert may have many.
        low, high: the offsets that put it inside one thing's life, nanoseconds.
        at: the alert's own time, for the drift.
    """
    alerts = len(np.unique(alert))
    reference = int(np.median(at))
    drift = _drift(low, high, at - reference) if alerts >= 30 else 0.0
    lows, highs = low - drift * (at - reference), high - drift * (at - reference)
    best, start, end, runner_up = _deepest(lows.astype(np.float64), highs.astype(np.float64))
    inside = (lows <= (start + end) / 2) & (highs >= (start + end) / 2)
    agreeing = len(np.unique(alert[inside]))
    enough = agreeing >= min(alerts, 2) and agreeing >= 0.5 * alerts
    # A port that is used again and again, or calls at regular intervals, agree at more offsets than one.
    if not enough or best < 1.3 * runner_up:
        return Clock()
    offset = 0.0 if start <= 0 <= end else (start + end) / 2
    slack = int(min((end - start) / 2, 5 * SECOND)) + _SLACK_NS
    # Flows that last for minutes agree at any of many offsets: that is used, but it tells no clock.
    told = end - start <= 2 * _TOLD_NS
    return Clock(int(offset), drift, reference, int(start), int(end), identifiable=told, slack_ns=slack)


def of_step(alert: _INTS, low: _INTS, high: _INTS, at: _INTS, whole: Clock) -> tuple[Clock, Clock] | None:
    """The clocks before and after it was set (by a time server, for summer): None where one clock does for all.

    Alerts count in the order of their log: who sets a clock back writes some times twice.

    Args:
        alert, low, high, at: as of :func:`of_ranges`.
        whole: what that made of them.
    """
    alerts, which = np.unique(alert, return_inverse=True)
    if whole.identifiable and _explained(alert, low, high, at, whole) > _NEARLY_ALL:
        return None
    # The two offsets that explain most, the second of what the first leaves.
    places = []
    left = np.ones(len(alert), dtype=bool)
    for _ in range(2):
        if not left.any():
            return None
        _, start, end, _ = _deepest(low[left].astype(np.float64), high[left].astype(np.float64))
        places.append(np.zeros(len(alerts), dtype=bool))
        places[-1][which[(low <= (start + end) / 2) & (high >= (start + end) / 2)]] = True
        left &= ~places[-1][which]
    before, after = places
    told = before != after
    if min(before[told].sum(), after[told].sum()) < _FEW:
        return None
    # Where to part them so that as many as can be are on their own side.
    gain = np.cumsum(np.where(told, np.where(before, 1, -1), 0))
    parted = int(np.argmax(np.abs(2 * gain - gain[-1]))) + 1
    if parted >= len(alerts):
        return None
    late = alert >= alerts[parted]
    clocks = []
    for side in (~late, late):
        ranges = alert[side], low[side], high[side], at[side]
        clocks.append(of_ranges(*ranges))
        if not clocks[-1].identifiable or _explained(*ranges, clocks[-1]) < _NEARLY_ALL:
            return None
    first, second = clocks
    return first, second._replace(since=int(alerts[parted]))


def _another(alert: _INTS, low: _INTS, high: _INTS, at: _INTS, clock: Clock) -> bool:
    """Whether what a clock leaves goes by a second one, as where many firewalls write into one file."""
    if (explained := _explained(alert, low, high, at, clock)) > _NEARLY_ALL:
        return False
    offset = clock.skew_ns + clock.drift * (at - clock.reference_ns)
    left = ~np.isin(alert, alert[(low - SECOND <= offset) & (high + SECOND >= offset)])
    other = of_ranges(alert[left], low[left], high[left], at[left])
    few = (1 - explained) * len(np.unique(alert)) < _FEW
    return other.identifiable and not few


def _explained(alert: _INTS, low: _INTS, high: _INTS, at: _INTS, clock: Clock) -> float:
    """The share of alerts that a clock explains, to a second."""
    offset = clock.skew_ns + clock.drift * (at - clock.reference_ns)
    met = alert[(low - SECOND <= offset) & (high + SECOND >= offset)]
    return len(np.unique(met)) / max(1, len(np.unique(alert)))


def _deepest(low: _FLOATS, high: _FLOATS) -> tuple[float, float, float, float]:
    """(depth, begin, end) of where most ranges overlap, and the greatest depth well away from there."""
    edges, order = skew.edges_of(low, high)
    depth = np.cumsum(np.where(order < len(low), 1.0, -1.0))
    top = int(np.argmax(depth))
    begin, end = edges[top], edges[min(top + 1, len(edges) - 1)]
    # Depth decays on both sides of the peak over the ranges that make it; what is beyond is another place.
    over = (low <= begin) & (high >= begin)
    width = float(np.median(high[over] - low[over])) + SECOND
    elsewhere = np.abs(edges - begin) > 2 * width
    return float(depth[top]), float(begin), float(end), float(depth[elsewhere].max(initial=0.0))


def _drift(low: _INTS, high: _INTS, since: _INTS) -> float:
    """The drift under which most ranges agree on one offset; 0 where that is hardly more than without any."""
    lows, highs, times = low.astype(np.float64), high.astype(np.float64), since.astype(np.float64)

    def agreeing(drift: float) -> float:
        return _deepest(lows - drift * times, highs - drift * times)[0]

    still = best = agreeing(0.0)
    centre, step, found = 0.0, 1e-4, 0.0
    for _ in range(3):
        for drift in centre + step * np.arange(-10, 11):
            depth = agreeing(float(drift))
            if depth > best:
                best, found = depth, float(drift)
        centre, step = found, step / 10
    return found if best > still * 1.01 + 2 else 0.0


def _sampled(most: int) -> str:
    return f"sampled AS (SELECT * FROM alert WHERE source IN (SELECT unnest($log)) ORDER BY hash(alert) LIMIT {most})"


_SIDES: Final = """sides AS (
   SELECT alert, start_ns, end_ns, src_ip AS local_ip, src_port AS local_port, dst_ip AS peer_ip, dst_port AS peer_port,
          host FROM sampled
   UNION ALL
   SELECT alert, start_ns, end_ns, dst_ip, dst_port, src_ip, src_port, host FROM sampled
   UNION ALL
   SELECT alert, start_ns, end_ns, inside_ip, inside_port, dst_ip, dst_port, host FROM sampled
   WHERE inside_ip IS NOT NULL)"""

_SOCKETS: Final = f"""
WITH {_sampled(4000)}, {_SIDES},
 told AS (SELECT * FROM sides UNION
   SELECT s.alert, s.start_ns, s.end_ns, m.inside_ip, m.inside_port, coalesce(m.aimed_ip, s.peer_ip),
     coalesce(m.aimed_port, s.peer_port), s.host
   FROM sides s JOIN translation m ON m.outside_ip = s.local_ip AND m.outside_port = s.local_port
     AND (m.peer_ip IS NULL OR m.peer_ip = s.peer_ip))
SELECT t.alert, t.start_ns - f.end_ns AS low, t.end_ns - f.start_ns AS high, t.start_ns AS seen
FROM told t JOIN flow f ON f.local_ip = t.local_ip AND f.local_port = t.local_port
  AND f.peer_ip = t.peer_ip AND f.peer_port = t.peer_port
WHERE abs(t.start_ns - f.start_ns) < $reach LIMIT $limit"""

_TELLING: Final = (
    # An alert that tells no machine may be of any: ``node`` is NULL, and only some of the calls are looked at.
    f"""CREATE OR REPLACE TEMP TABLE heard AS
 WITH {_sampled(1000)}, {_SIDES},
  placed AS (
    SELECT s.alert, s.start_ns, s.end_ns, s.peer_ip, s.host, i.node FROM sides s JOIN node_ip i ON i.ip = s.local_ip
    UNION
    SELECT a.alert, a.start_ns, a.end_ns, a.dst_ip, a.host, n.node
    FROM sampled a JOIN node n ON {same_host("a.node", "n.host")} OR a.node = n.node_id),
  either AS (
    SELECT * FROM placed
    UNION
    SELECT alert, start_ns, end_ns, peer_ip, host, NULL FROM sides ANTI JOIN placed USING (alert))
 -- Many in a moment are one event: what they say of the clock they say once.
 SELECT *, 1.0 / count(*) OVER (PARTITION BY node, peer_ip, host, start_ns // {_TOGETHER_NS}) AS weight FROM either""",
    f"""CREATE OR REPLACE TEMP TABLE telling AS
 WITH placed AS (SELECT DISTINCT node, peer_ip, host FROM heard WHERE node IS NOT NULL),
  anywhere AS (SELECT peer_ip, host FROM heard WHERE node IS NULL GROUP BY ALL
               ORDER BY count(*) DESC, peer_ip, host LIMIT {_PLACES}),
  sought AS (SELECT call, text, reach FROM words WHERE reach >= 2 ORDER BY hash(call) LIMIT {_CALLS})
 SELECT p.node, p.peer_ip, p.host, l.call, l.start_ns, l.end_ns FROM placed p
   JOIN alive l ON l.node = p.node JOIN words w USING (call)
   WHERE {prior.names("w.text", "p.peer_ip")} OR {prior.names("w.text", "p.host")}
 UNION ALL
 SELECT NULL, p.peer_ip, p.host, l.call, l.start_ns, l.end_ns FROM anywhere p
   JOIN sought w ON {prior.names("w.text", "p.peer_ip")} OR {prior.names("w.text", "p.host")}
   JOIN alive l USING (call)""",
)
_TEXTS: Final = """
WITH named AS (
   SELECT h.alert, h.start_ns, h.end_ns, h.weight, c.start_ns AS begun, c.end_ns AS ended, 1.0 AS rate
   FROM heard h JOIN telling c ON c.node IS NOT DISTINCT FROM h.node AND c.peer_ip IS NOT DISTINCT FROM h.peer_ip
     AND c.host IS NOT DISTINCT FROM h.host
   UNION ALL
   SELECT h.alert, h.start_ns, h.end_ns, h.weight, f.start_ns, f.end_ns, 1.0
   FROM heard h JOIN flow f ON f.node = h.node AND f.peer_ip = h.peer_ip WHERE $sockets),
 suspect AS (
   SELECT h.alert, h.start_ns, h.end_ns, h.weight, l.start_ns, l.end_ns, 0.3
   FROM heard h JOIN alive l ON l.node = h.node JOIN words w USING (call)
   WHERE w.reach = 3 AND h.alert NOT IN (SELECT alert FROM named))
SELECT alert, start_ns - ended AS low, end_ns - begun AS high, start_ns AS seen, weight, rate
FROM (SELECT * FROM named UNION ALL SELECT * FROM suspect) WHERE abs(start_ns - begun) < $reach
ORDER BY alert, low, high"""
# A translation begins with its connection, and may outlast it by minutes.
_MAPPED: Final = f"""
WITH sampled AS (SELECT row_number() OVER (ORDER BY inside_ip, inside_port, start_ns) AS alert, *,
     coalesce(aimed_ip, peer_ip) AS far_ip FROM translation WHERE source = $source AND start_ns > 0
   ORDER BY hash(inside_port, start_ns), alert LIMIT 4000)
SELECT m.alert, m.start_ns - f.start_ns - {_TOLD_NS} AS low, m.start_ns - f.start_ns + {_TOLD_NS} AS high,
  m.start_ns AS seen
FROM sampled m JOIN flow f ON f.local_ip = m.inside_ip AND f.local_port = m.inside_port
  AND (m.far_ip IS NULL OR f.peer_ip = m.far_ip)
WHERE abs(m.start_ns - f.start_ns) < $reach LIMIT $limit"""
