"""Which tools, commands, tasks and checkpoints are enriched among alerts. Runs later, on any machine.

An exact stratified test: within one iteration on one machine, alerting calls are taken to be drawn at random from all
calls there; how many of a pattern would be among them follows from counting (hypergeometric, summed over the strata).
That is the permutation test within strata, carried to its end. Checkpoints, which differ from iteration to iteration,
are compared within machines alone. Over many patterns, Benjamini and Hochberg's rate of false discoveries.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from math import lgamma
from typing import Final

import numpy as np
import numpy.typing as npt

_FEWEST: Final = 2
"""A pattern that alerted once has not recurred."""
_FLOATS = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Call:
    """One tool call as the test sees it.

    Args:
        stratum: iteration and machine.
        patterns: (dimension, pattern, tool) that it is an instance of.
        alerts: how many alerts are put down to it.
    """

    stratum: Hashable
    patterns: tuple[tuple[str, str, str], ...]
    alerts: int = 0


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


def enriched(calls: Iterable[Call]) -> list[Recurrence]:
    """Patterns that alerted at least twice, the least likely first."""
    size: Counter[Hashable] = Counter()
    alerting: Counter[Hashable] = Counter()
    members: dict[tuple[str, str, str], Counter[Hashable]] = defaultdict(Counter)
    hits: Counter[tuple[str, str, str]] = Counter()
    alerts: Counter[tuple[str, str, str]] = Counter()
    for call in calls:
        size[call.stratum] += 1
        alerting[call.stratum] += call.alerts > 0
        for pattern in call.patterns:
            members[pattern][call.stratum] += 1
            hits[pattern] += call.alerts > 0
            alerts[pattern] += call.alerts
    found = [  # ties go by name
        (pattern, p_value(hits[pattern], strata, size, alerting))
        for pattern, strata in members.items()
        if hits[pattern] >= _FEWEST
    ]
    found.sort(key=lambda each: (each[1], each[0]))
    adjusted = benjamini_hochberg([p for _, p in found])
    return [
        Recurrence(*pattern, alerts[pattern], members[pattern].total(), p, q)
        for (pattern, p), q in zip(found, adjusted, strict=True)
    ]


def p_value(
    hits: int, members: Mapping[Hashable, int], size: Mapping[Hashable, int], alerting: Mapping[Hashable, int]
) -> float:
    """Chance of at least ``hits`` alerting calls among a pattern's, alerts drawn at random within each stratum."""
    distribution: npt.NDArray[np.floating] = np.ones(1)
    for stratum, count in members.items():
        drawn = alerting.get(stratum, 0)
        if drawn:
            distribution = np.convolve(distribution, _hypergeometric(size[stratum], count, drawn))
    return float(min(1.0, distribution[hits:].sum()))


def _hypergeometric(size: int, marked: int, drawn: int) -> _FLOATS:
    """Probabilities of 0, 1, … marked ones among ``drawn`` out of ``size``."""
    least, most = max(0, drawn - (size - marked)), min(drawn, marked)
    chance = np.zeros(most + 1)
    for k in range(least, most + 1):
        chance[k] = np.exp(_choose(marked, k) + _choose(size - marked, drawn - k) - _choose(size, drawn))
    return chance


def _choose(n: int, k: int) -> float:
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)


def benjamini_hochberg(p_values: list[float]) -> list[float]:
    """q-values of p-values that come in ascending order."""
    count, least = len(p_values), 1.0
    adjusted: list[float] = []
    for rank in range(count, 0, -1):
        least = min(least, p_values[rank - 1] * count / rank)
        adjusted.append(least)
    return adjusted[::-1]
