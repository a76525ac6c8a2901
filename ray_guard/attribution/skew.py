"""How likely each offset of a log's clock is, by what calls' texts say. Runs later, on any machine. Pure.

Without recorded sockets the calls that name an alert's destination, or that tunnel, mine or scan, tell the clock. Under
the right offset a share of the alerts falls on such calls and the others fall anywhere; each offset is as likely as
that makes the alerts, and as clocks usually are.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

SECOND: Final = 1_000_000_000
REACH_NS: Final = 15 * 3600 * SECOND
"""The largest offset that is looked for: a time zone, and a clock that is wrong besides."""
_EDGE_NS: Final = 50_000_000
"""A packet is logged a little after it was sent."""
_SHARES: Final = np.array([0.1, 0.3, 0.6, 0.9])
"""How many of the alerts may be the doing of calls that speak of them: each as likely."""
_TRIED: Final = 2_000
_WINDOWS: Final = 12
"""So many places are looked at in full, of so many whose neighbourhood is likeliest."""
_WINDOW_NS: Final = 20 * SECOND
_GRID_NS: Final = 100_000_000
FURTHEST_NS: Final = 15 * SECOND
"""A neighbourhood that is wider than to this on both sides tells nothing."""
_NEAR_NS: Final = SECOND // 2
_MOST: Final = 0.9
_GAP: Final = 1e-3
"""How much less likely than the likeliest offset one is that parts two neighbourhoods."""
_DRIFTING_NS: Final = 3600 * SECOND
_DRIFTS: Final = 4.0
"""How much likelier (log) alerts have to be under a drift than under none."""
_INTS = npt.NDArray[np.int64]
_FLOATS = npt.NDArray[np.float64]


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


class Skew(NamedTuple):
    """What texts tell of a clock, nanoseconds.

    Args:
        offset, drift: the likeliest; the offset at ``reference``.
        low, high: between which 0.95 of the probability lies.
        told: whether half a second around the offset holds most of it.
        near: whether a neighbourhood of a quarter of a minute does.
    """

    offset: int
    drift: float
    reference: int
    low: int
    high: int
    told: bool
    near: bool


def of_texts(pairs: Telling, room_ns: int) -> Skew:
    """The offset under which alerts are likeliest to fall on calls whose text speaks of them.

    Under the right offset a share of the alerts falls on such calls, each anywhere in one's life, and the others
    anywhere in ``room_ns``; that share is not known. There has to be a pair.
    """
    reference = int(np.median(pairs.seen))

    def drifting(drift: float) -> _Posterior:
        lag = (drift * (pairs.seen - reference)).astype(np.int64)
        return _posterior(pairs._replace(low=pairs.low - lag, high=pairs.high - lag), room_ns)

    found, drift = drifting(0.0), 0.0
    if room_ns > _DRIFTING_NS and _around(found, _centre(found)) >= _MOST:
        for step in (SECOND / room_ns, SECOND / room_ns / 8):
            for other in drift + step * np.arange(-8, 9):
                shifted = drifting(float(other))
                if shifted.evidence > found.evidence + (_DRIFTS if drift == 0.0 else 0.0):
                    found, drift = shifted, float(other)
    best = _centre(found)
    order = np.argsort(found.offset, kind="stable")
    below = np.cumsum(found.mass[order])
    low, high = (
        int(found.offset[order][min(int(np.searchsorted(below, q * below[-1])), len(order) - 1)])
        for q in (0.025, 0.975)
    )
    return Skew(
        0 if low <= 0 <= high else int(best),
        drift,
        reference,
        low,
        high,
        told=_within(found, best, _NEAR_NS) >= _MOST,
        near=_around(found, best) >= _MOST,
    )


def _within(found: _Posterior, offset: float, width_ns: int) -> float:
    return float(found.mass[np.abs(found.offset - offset) <= width_ns].sum())


def _around(found: _Posterior, offset: float) -> float:
    """The probability of an offset's neighbourhood: as far as it goes without a gap, and no further than a clock may be
    off for its alerts to tell anything. What repeats itself agrees at intervals, and has gaps."""
    order = np.argsort(found.offset, kind="stable")
    place, mass = found.offset[order], found.mass[order]
    at = min(int(np.searchsorted(place, offset)), len(place) - 1)
    little = np.flatnonzero(mass < _GAP * mass.max())
    begin, end = np.append(-1, little[little < at])[-1] + 1, np.append(little[little > at], len(mass))[0]
    near = slice(int(begin), int(end))
    return float(mass[near][np.abs(place[near] - offset) <= FURTHEST_NS].sum())


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
    low, high = ((each + edge).astype(np.float64) for each, edge in ((pairs.low, -_EDGE_NS), (pairs.high, _EDGE_NS)))
    # How much likelier the alert is there, as one of this call's and not anywhere in the whole room.
    gain = pairs.rate / np.bincount(alert, pairs.rate)[alert] * room_ns / (high - low)
    none = np.log1p(-_SHARES) * weight.sum()
    step = np.log1p(np.outer(_SHARES / (1 - _SHARES), gain)) * weight[alert]
    edges, order = edges_of(low, high)
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
    offsets, masses, peaks = [], [], [float(np.logaddexp.reduce(none))]
    outside = usual.copy()
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
        depths = np.logaddexp.reduce(likely)
        masses.append((depths, here))
        peaks.append(float(depths.max()))
        bound = np.clip(until, *_usual(grid[[0, -1]] + np.array([-_GRID_NS, _GRID_NS]) / 2))
        outside -= np.diff(bound, prepend=bound[0])
    # What was looked at in full is what could be likeliest: nowhere else is more so than in the second of these.
    peaks.sort()
    top, most_elsewhere = peaks[-1], np.minimum(depth, peaks[-2])
    elsewhere = float((np.exp(most_elsewhere - top) * np.maximum(outside, 0.0)).sum())
    mass = np.concatenate([np.exp(depths - top) * here for depths, here in masses])
    found = float(mass.sum())
    return _Posterior(np.concatenate(offsets), mass / (found + elsewhere), top + float(np.log(max(found, 1e-300))))


def edges_of(low: _FLOATS, high: _FLOATS) -> tuple[_FLOATS, _INTS]:
    """Where ranges begin and end, in order, and that order of all begins followed by all ends."""
    edges = np.concatenate([low, high])
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
    begin, end = np.searchsorted(offset, offset - _NEAR_NS), np.searchsorted(offset, offset + _NEAR_NS + 1)
    best = int(np.argmax(below[end] - below[begin]))
    mine = slice(int(begin[best]), int(end[best]))
    half = (below[mine.start] + below[mine.stop]) / 2
    return float(offset[min(int(np.searchsorted(below, half)), len(offset)) - 1])
