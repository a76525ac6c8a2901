"""How far a log's clock is from the traces'. Runs later, on any machine.

An alert that belongs to something recorded allows a range of offsets: all that put it inside that thing's life. The
offset that most alerts allow at once is the skew. Recorded sockets tell it best; without them, calls whose text names
the destination or that use the network by their nature. Where neither singles out one offset the skew is *not
identifiable*, and is said to be so: a wrong one, silently used, would name wrong calls.

Over all calls alike the same search is useless: some call is open at any offset.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import duckdb
import numpy as np
import numpy.typing as npt

SECOND: Final = 1_000_000_000
REACH_NS: Final = 15 * 3600 * SECOND
"""The largest offset that is looked for: a time zone, and a clock that is wrong besides."""
_SLACK_NS: Final = SECOND
_UNKNOWN_SLACK_NS: Final = 2 * SECOND
_TOLD_NS: Final = SECOND // 2
_NEARLY_ALL: Final = 0.9
_PAIRS: Final = 400_000
_FEW: Final = 5
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


def estimate(db: duckdb.DuckDBPyConnection, source: int) -> list[Clock]:
    """The clock of one source, from ``alert``, ``nat`` and the job's tables; where it was set in between, both."""
    best = Clock()
    for pairs, sharp in ((_SOCKETS, True), (_TEXTS, False)):
        found = db.execute(pairs, {"source": source, "reach": REACH_NS, "limit": _PAIRS}).fetchnumpy()
        if len(found["alert"]):
            ranges = found["alert"], found["low"], found["high"], found["seen"]
            clock = of_ranges(*ranges, sharp=sharp)
            if sharp and (stepped := of_step(*ranges, clock)):
                return list(stepped)
            if sharp and clock.identifiable and _another(*ranges, clock):
                return [clock._replace(identifiable=False)]
            if clock.identifiable:
                return [clock]
            best = best if best.bounded else clock
    return [best]


def of_map(db: duckdb.DuckDBPyConnection, source: int) -> Clock:
    """The clock of a NAT map, from the sockets that it translated."""
    found = db.execute(_MAPPED, {"source": source, "reach": REACH_NS, "limit": _PAIRS}).fetchnumpy()
    if not len(found["alert"]):
        return Clock()
    return of_ranges(found["alert"], found["low"], found["high"], found["seen"], sharp=True)


def of_ranges(
    alert: _INTS,
    low: _INTS,
    high: _INTS,
    at: _INTS,
    *,
    sharp: bool,
) -> Clock:
    """The offset that most alerts allow.

    Args:
        alert: whose range it is; an alert may have many.
        low, high: the offsets that put it inside one thing's life, nanoseconds.
        at: the alert's own time, for the drift.
        sharp: each alert has nearly one range (sockets); else chance has to be ruled out.
    """
    alerts = len(np.unique(alert))
    weight = 1.0 / np.maximum(1, (high - low) / SECOND) if not sharp else np.ones(len(low))
    reference = int(np.median(at))
    drift = _drift(low, high, at - reference) if sharp and alerts >= 30 else 0.0
    lows, highs = low - drift * (at - reference), high - drift * (at - reference)
    best, start, end, runner_up = _deepest(lows.astype(np.float64), highs.astype(np.float64), weight)
    inside = (lows <= (start + end) / 2) & (highs >= (start + end) / 2)
    agreeing = len(np.unique(alert[inside]))
    enough = (
        agreeing >= (1 if alerts == 1 and sharp else 2 if sharp else _FEW)
        and agreeing >= (0.5 if sharp else 0.3) * alerts
    )
    # A port that is used again and again, or calls at regular intervals, agree at more offsets than one.
    if not enough or best < 1.3 * runner_up:
        return Clock()
    skew = 0.0 if start <= 0 <= end else (start + end) / 2
    slack = int(min((end - start) / 2, 5 * SECOND)) + _SLACK_NS
    # Flows that last for minutes agree at any of many offsets: that is used, but it tells no clock.
    told = not sharp or end - start <= 2 * _TOLD_NS
    return Clock(int(skew), drift, reference, int(start), int(end), identifiable=told, slack_ns=slack)


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
        _, start, end, _ = _deepest(low[left].astype(np.float64), high[left].astype(np.float64), np.ones(left.sum()))
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
        clocks.append(of_ranges(*ranges, sharp=True))
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
    other = of_ranges(alert[left], low[left], high[left], at[left], sharp=True)
    few = (1 - explained) * len(np.unique(alert)) < _FEW
    return other.identifiable and not few


def _explained(alert: _INTS, low: _INTS, high: _INTS, at: _INTS, clock: Clock) -> float:
    """The share of alerts that a clock explains, to a second."""
    offset = clock.skew_ns + clock.drift * (at - clock.reference_ns)
    met = alert[(low - SECOND <= offset) & (high + SECOND >= offset)]
    return len(np.unique(met)) / max(1, len(np.unique(alert)))


def _deepest(low: _FLOATS, high: _FLOATS, weight: _FLOATS) -> tuple[float, float, float, float]:
    """(depth, begin, end) of where most ranges overlap, and the greatest depth well away from there."""
    edges = np.concatenate([low, high])
    steps = np.concatenate([weight, -weight])
    # Of edges at one place those that open come first: ranges that touch agree.
    order = np.lexsort((-steps, edges))
    edges, depth = edges[order], np.cumsum(steps[order])
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
    one = np.ones(len(low))

    def agreeing(drift: float) -> float:
        return _deepest(lows - drift * times, highs - drift * times, one)[0]

    still = best = agreeing(0.0)
    centre, step, found = 0.0, 1e-4, 0.0
    for _ in range(3):
        for drift in centre + step * np.arange(-10, 11):
            depth = agreeing(float(drift))
            if depth > best:
                best, found = depth, float(drift)
        centre, step = found, step / 10
    return found if best > still * 1.01 + 2 else 0.0


_SAMPLE: Final = """sampled AS (SELECT * FROM alert WHERE source = $source ORDER BY hash(alert) LIMIT 4000)"""
_SIDES: Final = """sides AS (
   SELECT alert, start_ns, end_ns, src_ip AS local_ip, src_port AS local_port, dst_ip AS peer_ip, dst_port AS peer_port,
          host FROM sampled
   UNION ALL
   SELECT alert, start_ns, end_ns, dst_ip, dst_port, src_ip, src_port, host FROM sampled
   UNION ALL
   SELECT alert, start_ns, end_ns, inside_ip, inside_port, dst_ip, dst_port, host FROM sampled
   WHERE inside_ip IS NOT NULL)"""

_SOCKETS: Final = f"""
WITH {_SAMPLE}, {_SIDES},
 told AS (SELECT * FROM sides UNION
   SELECT s.alert, s.start_ns, s.end_ns, m.inside_ip, m.inside_port, coalesce(m.aimed_ip, s.peer_ip),
     coalesce(m.aimed_port, s.peer_port), s.host
   FROM sides s JOIN translation m ON m.outside_ip = s.local_ip AND m.outside_port = s.local_port
     AND (m.peer_ip IS NULL OR m.peer_ip = s.peer_ip))
SELECT t.alert, t.start_ns - f.end_ns AS low, t.end_ns - f.start_ns AS high, t.start_ns AS seen
FROM told t JOIN flow f ON f.local_ip = t.local_ip AND f.local_port = t.local_port
  AND f.peer_ip = t.peer_ip AND f.peer_port = t.peer_port
WHERE abs(t.start_ns - f.start_ns) < $reach LIMIT $limit"""

_TEXTS: Final = f"""
WITH {_SAMPLE}, {_SIDES},
 near AS (SELECT s.*, i.node FROM sides s JOIN node_ip i ON i.ip = s.local_ip),
 telling AS (
   SELECT n.alert, n.start_ns - l.end_ns AS low, n.end_ns - l.start_ns AS high, n.start_ns AS seen,
     contains(w.text, n.peer_ip) OR coalesce(n.host <> '' AND contains(lower(w.text), n.host), false)
       OR coalesce(u.call IS NOT NULL, false) AS named,
     w.reach = 3 AS suspect
   FROM near n JOIN alive l ON l.node = n.node AND abs(n.start_ns - l.start_ns) < $reach
   JOIN words w USING (call)
   LEFT JOIN (SELECT DISTINCT call, peer_ip FROM flow) u ON u.call = l.call AND u.peer_ip = n.peer_ip
   WHERE w.text <> '')
SELECT alert, low, high, seen FROM telling
WHERE named OR (suspect AND NOT (SELECT coalesce(bool_or(named), false) FROM telling)) LIMIT $limit"""
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
