"""How far a log's clock is from the traces'. Runs later, on any machine.

An alert that belongs to something recorded allows a range of offsets: all that put it inside that thing's life. The
offset that most alerts allow at once is the skew. Recorded sockets tell it best. Without them calls whose text names
the destination, or that tunnel, mine or scan, tell it less sharply: each offset is as likely as the alerts would be
under it, of which some fall on such calls and the others fall anywhere, and as clocks usually are (:func:`_usual`).
Where half a second around one offset does not hold most of the probability, the skew is *not identifiable*, and is
said to be so: a wrong one, silently used, would name wrong calls.

Over all calls alike the same search is useless: some call is open at any offset.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import duckdb
import numpy as np
import numpy.typing as npt

from ray_guard.attribution import prior

SECOND: Final = 1_000_000_000
REACH_NS: Final = 15 * 3600 * SECOND
"""The largest offset that is looked for: a time zone, and a clock that is wrong besides."""
_SLACK_NS: Final = SECOND
_UNKNOWN_SLACK_NS: Final = 2 * SECOND
_PAIRS: Final = 400_000
_TOGETHER_NS: Final = 10 * SECOND
_PLACES: Final = 64
"""How many destinations of alerts that tell no machine are looked for, in at most so many commands:"""
_CALLS: Final = 200_000
_EDGE_NS: Final = 50_000_000
"""A packet is logged a little after it was sent."""
_SHARES: Final = np.array([0.1, 0.3, 0.6, 0.9])
"""How many of the alerts may be the doing of calls that speak of them: each as likely."""
_TRIED: Final = 2_000
_WINDOWS: Final = 12
"""So many places are looked at in full, of so many whose neighbourhood is likeliest."""
_WINDOW_NS: Final = 20 * SECOND
_GRID_NS: Final = 100_000_000
_FURTHEST_NS: Final = 15 * SECOND
"""A neighbourhood that is wider than to this on both sides tells nothing."""
_NEAR_NS: Final = SECOND // 2
_MOST: Final = 0.9
_DRIFTING_NS: Final = 3600 * SECOND
_DRIFTS: Final = 4.0
"""How much likelier (log) alerts have to be under a drift than under none."""
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
    """

    skew_ns: int = 0
    drift: float = 0.0
    reference_ns: int = 0
    low_ns: int = 0
    high_ns: int = 0
    identifiable: bool = False
    slack_ns: int = _UNKNOWN_SLACK_NS


def estimate(db: duckdb.DuckDBPyConnection, source: int) -> Clock:
    """The clock of one source, from ``alert``, ``nat`` and the job's tables."""
    found = db.execute(_SOCKETS, {"source": source, "reach": REACH_NS, "limit": _PAIRS}).fetchnumpy()
    if len(found["alert"]):
        clock = of_ranges(found["alert"], found["low"], found["high"], found["seen"])
        if clock.identifiable:
            return clock
    for statement in _TELLING:
        db.execute(statement, {"source": source} if "$source" in statement else None)
    found = db.execute(_TEXTS, {"reach": REACH_NS}).fetchnumpy()
    ((room_ns,),) = db.execute("SELECT coalesce(max(end_ns) - min(start_ns), 0) FROM alive").fetchall()
    return of_texts(Telling(**{name: found[name] for name in Telling._fields}), room_ns) if room_ns else Clock()


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
    start, end = _deepest(lows.astype(np.float64), highs.astype(np.float64))[1:]
    inside = (lows <= (start + end) / 2) & (highs >= (start + end) / 2)
    agreeing = len(np.unique(alert[inside]))
    if agreeing < (1 if alerts == 1 else 2) or agreeing < 0.5 * alerts:
        return Clock()
    skew = 0.0 if start <= 0 <= end else (start + end) / 2
    slack = int(min((end - start) / 2, 5 * SECOND)) + _SLACK_NS
    return Clock(int(skew), drift, reference, int(start), int(end), identifiable=True, slack_ns=slack)


class Telling(NamedTuple):
    """Pairs of an alert and a call that it may be of, arrays of one length.

    Args:
        alert: which alert.
        low, high: the offsets that put it inside the call's life, nanoseconds.
        seen: the alert's own time.
        weight: how much the alert counts; those of one moment count as one together.
        rate: how readily such a call causes such an alert, compared with others of this alert.
    """

    alert: _INTS
    low: _INTS
    high: _INTS
    seen: _INTS
    weight: _FLOATS
    rate: _FLOATS


def of_texts(pairs: Telling, room_ns: int) -> Clock:
    """The offset under which alerts are likeliest to fall on calls whose text speaks of them.

    Under the right offset a share of the alerts falls on such calls, each anywhere in one's life, and the others
    anywhere in ``room_ns``; that share is not known. Half of a second around the best offset has to hold most of the
    probability, or the skew is not identifiable.
    """
    if not len(pairs.alert):
        return Clock()
    reference = int(np.median(pairs.seen))

    def drifting(drift: float) -> _Posterior:
        lag = (drift * (pairs.seen - reference)).astype(np.int64)
        return _posterior(pairs._replace(low=pairs.low - lag, high=pairs.high - lag), room_ns)

    found, drift = drifting(0.0), 0.0
    if room_ns > _DRIFTING_NS and _within(found, _centre(found), _FURTHEST_NS) >= _MOST:
        for step in (SECOND / room_ns, SECOND / room_ns / 8):
            for other in drift + step * np.arange(-8, 9):
                shifted = drifting(float(other))
                if shifted.evidence > found.evidence + (_DRIFTS if drift == 0.0 else 0.0):
                    found, drift = shifted, float(other)
    best = _centre(found)
    order = np.argsort(found.offset, kind="stable")
    below = np.cumsum(found.mass[order])
    low, high = (
        int(found.offset[order][min(int(np.searchsorted(below, q * below[-1])), len(order) - 1)]) for q in (0.025, 0.975)
    )
    skew = 0 if low <= 0 <= high else int(best)
    slack = int(min(max(high - skew, skew - low), _FURTHEST_NS)) + _SLACK_NS
    if _within(found, best, _NEAR_NS) >= _MOST:
        return Clock(skew, drift, reference, low, high, identifiable=True, slack_ns=slack)
    # Not told to half a second; but the alerts may well tell the neighbourhood.
    return Clock(skew, drift, reference, slack_ns=slack) if _within(found, best, _FURTHEST_NS) >= _MOST else Clock()


def _within(found: _Posterior, offset: float, width_ns: int) -> float:
    return float(found.mass[np.abs(found.offset - offset) <= width_ns].sum())


class _Posterior(NamedTuple):
    offset: _FLOATS
    """Nanoseconds; the places where the skew may well be, a few hundredths of a second apart."""
    mass: _FLOATS
    """The probability of each."""
    evidence: float
    """Log of how likely the alerts are, all of these places together."""


def _posterior(pairs: Telling, room_ns: int) -> _Posterior:
    alert = np.unique(pairs.alert, return_inverse=True)[1]
    weight = np.zeros(int(alert.max()) + 1)
    weight[alert] = pairs.weight
    low, high = pairs.low - _EDGE_NS, pairs.high + _EDGE_NS
    # How much likelier the alert is there, as one of this call's and not anywhere in the whole room.
    gain = pairs.rate / np.bincount(alert, pairs.rate)[alert] * room_ns / (high - low)
    none = np.log1p(-_SHARES) * weight.sum()
    step = np.log1p(np.outer(_SHARES / (1 - _SHARES), gain)) * weight[alert]
    edges, order = _edges(low, high)
    # Of an alert's calls that overlap each adds its own: where this is low, the sum is lower.
    depth = np.logaddexp.reduce(np.cumsum(np.concatenate([step, -step], axis=1)[:, order], axis=1) + none[:, None])
    edges, depth = np.append(edges, np.inf), np.append(np.logaddexp.reduce(none), depth)
    until = _usual(edges)
    usual = np.diff(until, prepend=0.0)
    with np.errstate(divide="ignore"):
        most = depth + np.log(usual)
    begins = np.append(-np.inf, edges[:-1])
    centres: list[float] = []
    for segment in np.argsort(-most)[:_TRIED]:
        centre = float(np.clip(0.0, begins[segment], edges[segment]))
        if all(abs(centre - other) > 2 * _WINDOW_NS for other in centres):
            centres.append(centre)
        if len(centres) == _WINDOWS:
            break
    top = float(most.max())
    elsewhere = float(np.exp(most - top).sum())
    offsets, masses = [], []
    for centre in centres:
        grid = centre + np.arange(-_WINDOW_NS, _WINDOW_NS + 1, _GRID_NS, dtype=np.float64)
        here = _usual(grid + _GRID_NS / 2) - _usual(grid - _GRID_NS / 2)
        inside = (low < grid[-1]) & (high > grid[0])
        some, which = np.unique(alert[inside], return_inverse=True)
        joined = np.zeros((len(some), len(grid) + 1))
        np.add.at(joined, (which, np.searchsorted(grid, low[inside])), gain[inside])
        np.subtract.at(joined, (which, np.searchsorted(grid, high[inside], side="right")), gain[inside])
        joined = np.maximum(np.cumsum(joined[:, :-1], axis=1), 0.0)
        likely = [
            weight[some] @ np.log1p(share / (1 - share) * joined) + base
            for share, base in zip(_SHARES, none, strict=True)
        ]
        offsets.append(grid)
        masses.append(np.exp(np.logaddexp.reduce(likely) - top) * here)
        bound = np.clip(until, *_usual(grid[[0, -1]] + np.array([-_GRID_NS, _GRID_NS]) / 2))
        elsewhere -= float((np.exp(depth - top) * np.diff(bound, prepend=bound[0])).sum())
    mass = np.concatenate(masses)
    found = float(mass.sum())
    return _Posterior(
        np.concatenate(offsets), mass / (found + max(elsewhere, 0.0)), top + float(np.log(max(found, 1e-300)))
    )


def _edges(low: _FLOATS, high: _FLOATS) -> tuple[_FLOATS, _INTS]:
    """Where ranges begin and end, in order, and that order of all begins followed by all ends."""
    edges = np.concatenate([low, high]).astype(np.float64)
    # Of edges at one place those that open come first: ranges that touch agree.
    order = np.lexsort((np.arange(len(edges)) >= len(low), edges))
    return edges[order], order


def _usual(offset: _FLOATS) -> _FLOATS:
    """How likely a clock is off by no more than this (nanoseconds), before anything is known of it.

    Most follow a time server, to a tenth of a second; others are off by seconds or minutes, each order as likely; some
    logs are written in another zone; a few are off by anything.
    """
    x = np.asarray(offset, dtype=np.float64) / SECOND
    near = np.where(x < 0, 0.5 * np.exp(np.minimum(x, 0) / 0.1), 1 - 0.5 * np.exp(-np.maximum(x, 0) / 0.1))
    order = np.log(np.clip(np.abs(x), 0.05, 900.0) / 0.05) / np.log(900.0 / 0.05)
    zones = 1800.0 * np.arange(-28, 29)
    minutes = np.clip((x[..., None] - zones + 60) / 120, 0, 1).mean(axis=-1)
    reach = REACH_NS / SECOND
    anything = np.clip((x + reach) / (2 * reach), 0, 1)
    cumulative: _FLOATS = 0.45 * near + 0.35 * (0.5 + np.sign(x) * order / 2) + 0.1 * minutes + 0.1 * anything
    return cumulative


def _centre(found: _Posterior) -> float:
    """The middle of the half second to each side of which most of the probability lies."""
    order = np.argsort(found.offset, kind="stable")
    offset, below = found.offset[order], np.append(0.0, np.cumsum(found.mass[order]))
    begin, end = (np.searchsorted(offset, offset + sign * _NEAR_NS, side) for sign, side in ((-1, "left"), (1, "right")))
    best = int(np.argmax(below[end] - below[begin]))
    mine = slice(int(begin[best]), int(end[best]))
    half = (below[mine.start] + below[mine.stop]) / 2
    return float(offset[min(int(np.searchsorted(below, half)), len(offset)) - 1])


def _deepest(low: _FLOATS, high: _FLOATS) -> tuple[float, float, float]:
    """(depth, begin, end) of where most ranges overlap."""
    edges, order = _edges(low, high)
    depth = np.cumsum(np.where(order < len(low), 1.0, -1.0))
    top = int(np.argmax(depth))
    return float(depth[top]), float(edges[top]), float(edges[min(top + 1, len(edges) - 1)])


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
   SELECT s.alert, s.start_ns, s.end_ns, m.inside_ip, m.inside_port, s.peer_ip, s.peer_port, s.host
   FROM sides s JOIN nat m ON m.outside_ip = s.local_ip AND m.outside_port = s.local_port)
SELECT t.alert, t.start_ns - f.end_ns AS low, t.end_ns - f.start_ns AS high, t.start_ns AS seen
FROM told t JOIN flow f ON f.local_ip = t.local_ip AND f.local_port = t.local_port
  AND f.peer_ip = t.peer_ip AND f.peer_port = t.peer_port
WHERE abs(t.start_ns - f.start_ns) < $reach LIMIT $limit"""

_TELLING: Final = (
    # An alert that tells no machine may be of any: ``node`` is NULL, and only some of the calls are looked at.
    f"""CREATE OR REPLACE TEMP TABLE heard AS
 WITH {_SAMPLE}, {_SIDES},
  placed AS (
    SELECT s.alert, s.start_ns, s.end_ns, s.peer_ip, s.host, i.node FROM sides s JOIN node_ip i ON i.ip = s.local_ip
    UNION
    SELECT a.alert, a.start_ns, a.end_ns, a.dst_ip, a.host, n.node
    FROM sampled a JOIN node n ON lower(a.node) = lower(n.host) OR a.node = n.node_id
      OR split_part(lower(a.node), '.', 1) = split_part(lower(n.host), '.', 1)),
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
     AND c.host IS NOT DISTINCT FROM h.host),
 suspect AS (
   SELECT h.alert, h.start_ns, h.end_ns, h.weight, l.start_ns, l.end_ns, 0.3
   FROM heard h JOIN alive l ON l.node = h.node JOIN words w USING (call)
   WHERE w.reach = 3 AND h.alert NOT IN (SELECT alert FROM named))
SELECT alert, start_ns - ended AS low, end_ns - begun AS high, start_ns AS seen, weight, rate
FROM (SELECT * FROM named UNION ALL SELECT * FROM suspect) WHERE abs(start_ns - begun) < $reach
ORDER BY alert, low, high"""
_MAPPED: Final = """
WITH sampled AS (SELECT row_number() OVER () AS alert, * FROM nat WHERE source = $source AND start_ns > 0
   ORDER BY hash(inside_port, start_ns) LIMIT 4000)
SELECT m.alert, m.start_ns - f.end_ns AS low, m.end_ns - f.start_ns AS high, m.start_ns AS seen
FROM sampled m JOIN flow f ON f.local_ip = m.inside_ip AND f.local_port = m.inside_port
  AND (m.peer_ip IS NULL OR f.peer_ip = m.peer_ip)
WHERE abs(m.start_ns - f.start_ns) < $reach LIMIT $limit"""
