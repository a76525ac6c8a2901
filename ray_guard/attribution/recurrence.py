"""Which tools, commands, tasks and checkpoints are enriched among alerts. Runs later, on any machine.

An exact stratified test: within one iteration on one machine, alerting calls are taken to be drawn at random from all
calls there; how many of a pattern would be among them follows from counting (hypergeometric, summed over the strata).
That is the permutation test within strata, carried to its end. Checkpoints, which differ from iteration to iteration,
are compared within machines alone.

What one rollout does again and again has happened once: of a command or tool its alerting calls count once a rollout,
and tasks and checkpoints are compared by rollouts. Over all patterns that could have recurred, whether they did or not,
Benjamini and Hochberg's rate of false discoveries.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import lgamma
from typing import Final

import numpy as np
import numpy.typing as npt

FEWEST: Final = 2
"""A pattern that alerted once has not recurred."""
_FLOATS = npt.NDArray[np.floating]
_Chances = tuple[int, _FLOATS]
"""The least number, and the chances of it and of those that follow."""


@dataclass(frozen=True, slots=True)
class Recurrence:
    """A pattern and how unlikely its alerts are by chance. ``calls``: how many calls of the pattern there were."""

    dimension: str
    pattern: str
    tool: str
    alerts: int
    calls: int
    p_value: float
    q_value: float


Pattern = tuple[str, str, str]
"""Dimension, pattern, tool."""


@dataclass(slots=True)
class Counts:
    """What alerts are drawn from, counted: calls, or rollouts.

    Attributes:
        size, alerting: of each stratum, how many there are, and how many of them alerted.
        members: of each pattern, how many there are by stratum.
        hits: of each pattern, how many of them alerted.
        calls, alerts: of each pattern, for what is said of it.
        tested: how many patterns could have alerted :data:`FEWEST` times, given where alerts were.
    """

    size: Counter[Hashable] = field(default_factory=Counter)
    alerting: Counter[Hashable] = field(default_factory=Counter)
    members: dict[Pattern, Counter[Hashable]] = field(default_factory=lambda: defaultdict(Counter))
    hits: Counter[Pattern] = field(default_factory=Counter)
    calls: Counter[Pattern] = field(default_factory=Counter)
    alerts: Counter[Pattern] = field(default_factory=Counter)
    tested: int = 0


def enriched(counts: Counts) -> list[Recurrence]:
    """Patterns that alerted at least twice, the least likely first; others may be left out of the counts."""
    found = [  # ties go by name
        (pattern, p_value(counts.hits[pattern], strata, counts.size, counts.alerting))
        for pattern, strata in counts.members.items()
        if counts.hits[pattern] >= FEWEST
    ]
    found.sort(key=lambda each: (each[1], each[0]))
    adjusted = benjamini_hochberg([p for _, p in found], max(counts.tested, len(found)))
    return [
        Recurrence(*pattern, counts.alerts[pattern], counts.calls[pattern], p, q)
        for (pattern, p), q in zip(found, adjusted, strict=True)
    ]


def p_value(
    hits: int, members: Mapping[Hashable, int], size: Mapping[Hashable, int], alerting: Mapping[Hashable, int]
) -> float:
    """Chance of at least ``hits`` alerting calls among a pattern's, alerts drawn at random within each stratum."""
    kinds = Counter((size[stratum], marked, alerting.get(stratum, 0)) for stratum, marked in members.items())
    parts = [_repeated(_hypergeometric(*kind), times) for kind, times in sorted(kinds.items()) if kind[2]]
    # In pairs, then pairs of pairs: one after the other, long rows would be gone through for every short one.
    while len(parts) > 1:
        odd = parts[len(parts) & ~1 :]
        parts = [_sum(*two) for two in zip(parts[::2], parts[1::2], strict=False)] + odd
    if not parts:
        return float(hits <= 0)
    least, chance = parts[0]
    return float(min(1.0, chance[max(hits - least, 0) :].sum()))


_NOTHING: Final = 1e-300
"""Chances below are left out: they add nothing, and numbers below 2e-308 take a hundred times as long."""


def _sum(one: _Chances, other: _Chances) -> _Chances:
    return _trimmed(one[0] + other[0], np.convolve(one[1], other[1]))


def _repeated(one: _Chances, times: int) -> _Chances:
    """The sum of so many alike: by squares, then squares of squares."""
    if times == 1:
        return one
    half = _repeated(one, times // 2)
    whole = _sum(half, half)
    return _sum(whole, one) if times % 2 else whole


def _trimmed(least: int, chance: _FLOATS) -> _Chances:
    some = np.flatnonzero(chance > _NOTHING)
    return (least + int(some[0]), chance[some[0] : some[-1] + 1]) if len(some) else (least, chance[:1])


@lru_cache(maxsize=65536)
def _hypergeometric(size: int, marked: int, drawn: int) -> _Chances:
    """Of how many marked ones there are among ``drawn`` out of ``size``."""
    least, most = max(0, drawn - (size - marked)), min(drawn, marked)
    first = _choose(marked, least) + _choose(size - marked, drawn - least) - _choose(size, drawn)
    k = np.arange(least, most)
    # From each to the next.
    ratio = (marked - k) / (k + 1) * (drawn - k) / (size - marked - drawn + k + 1)
    return _trimmed(least, np.exp(first + np.concatenate([[0.0], np.cumsum(np.log(ratio))])))


def _choose(n: int, k: int) -> float:
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)


def benjamini_hochberg(p_values: list[float], tested: int) -> list[float]:
    """q-values of the least p-values, in ascending order, of ``tested`` ones."""
    least = 1.0
    adjusted: list[float] = []
    for rank in range(len(p_values), 0, -1):
        least = min(least, p_values[rank - 1] * tested / rank)
        adjusted.append(least)
    return adjusted[::-1]
