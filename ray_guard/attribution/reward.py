"""Whether what set off alerts was rewarded. Runs later, on any machine. Pure numbers.

Compared within groups, that is among rollouts of one prompt at one iteration, so that hard tasks and late checkpoints
do not pass for an effect. It is an association: a reward model may like what such rollouts have in common, and groups
or episodes that a trainer filtered out are missing here.

A group's difference weighs as much as it would tell if rewards scattered alike everywhere. The interval does not take
that for granted: it goes by how much the groups differ from each other, with the correction for few and unequal ones
of Bell and McCaffrey (2002) and Student's distribution. So does that of the trend, by how much the iterations scatter
around their line, and no less than chance alone would: rollouts of one iteration have their policy in common, and what
iterations have in common beyond the line (a drift to and fro) is not seen.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from math import lgamma, pi, sqrt
from typing import Any, Final

import numpy as np

_SURE: Final = 0.975
_POWER: Final = 0.8
_NORMAL: Final = 10_000.0
"""Degrees of freedom from which on Student's distribution is as good as the normal one."""
_POINTS: Final = 20_001


@dataclass(frozen=True, slots=True)
class Rollout:
    """One rollout: its group (None: of none), iteration, whether it set off an alert, reward and advantage.

    ``reward`` and ``advantage`` are None where they were never told, or are no finite number.
    """

    group: Hashable | None
    iteration: int | None
    reward: float | None
    violating: bool
    advantage: float | None = None


@dataclass(frozen=True, slots=True)
class Difference:
    """Violating rollouts less the others, within groups.

    Args:
        mean: None where no group has both.
        interval: 95 %; None with fewer than two such groups, or where all of them differ by the same.
        detectable: the least difference that so many groups would have shown with 80 % power; None likewise.
        groups: groups with both kinds.
        even: those of them in which every rollout has the same.
    """

    mean: float | None
    interval: tuple[float, float] | None
    detectable: float | None
    groups: int
    even: int


@dataclass(frozen=True, slots=True)
class Association:
    """Reward against violation.

    Args:
        reward, advantage: differences within groups.
        trend: change of the share of violating rollouts from one iteration to the next; None with a single iteration.
        trend_interval: 95 %; None with fewer than three iterations, or where all rollouts are alike.
        rollouts, violating: counts.
        unrewarded, violating_unrewarded: counts of rollouts without a reward, of all and of the violating ones.
    """

    reward: Difference
    advantage: Difference
    trend: float | None
    trend_interval: tuple[float, float] | None
    rollouts: int
    violating: int
    unrewarded: int
    violating_unrewarded: int


def associate(rollouts: Iterable[Rollout]) -> Association:
    """Measures all; nothing in it depends on the order of the rollouts."""
    known = list(rollouts)
    unrewarded = [each.violating for each in known if each.reward is None]
    return Association(
        within_groups(known, lambda each: each.reward),
        within_groups(known, lambda each: each.advantage),
        *_trend(known),
        len(known),
        sum(each.violating for each in known),
        len(unrewarded),
        sum(unrewarded),
    )


def within_groups(rollouts: Iterable[Rollout], value: Callable[[Rollout], float | None]) -> Difference:
    """How much more of something violating rollouts have than others of their group."""
    groups: dict[Hashable, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for each in rollouts:
        told = value(each)
        if each.group is not None and told is not None:
            groups[each.group, each.iteration][each.violating].append(told)
    both = [(good, bad) for good, bad in groups.values() if good and bad]
    if not both:
        return Difference(None, None, None, 0, 0)
    gaps, weights = np.array(
        sorted((np.mean(bad) - np.mean(good), len(bad) * len(good) / (len(bad) + len(good))) for good, bad in both)
    ).T
    share = weights / weights.sum()
    mean = float((share * gaps).sum())
    even = sum(len({*good, *bad}) == 1 for good, bad in both)
    error, freedom = _error(gaps - mean, share)
    if error is None:
        return Difference(mean, None, None, len(both), even)
    sure = student(_SURE, freedom)
    return Difference(
        mean,
        (mean - sure * error, mean + sure * error),
        (sure + student(_POWER, freedom)) * error,
        len(both),
        even,
    )


_ROUNDING: Final = 1e-9


def _error(residuals: Sequence[float], share: Sequence[float]) -> tuple[float | None, float]:
    """(standard error of a weighted mean, its degrees of freedom); None where nothing tells it."""
    left, part = np.asarray(residuals), np.asarray(share)
    if len(left) < 2 or np.abs(left).max() < _ROUNDING:
        return None, 0.0
    factor = part**2 / (1 - part)
    error = sqrt(float((factor * left**2).sum()))
    freedom = 1 / float((part**2).sum() + factor.sum() ** 2 - (factor**2).sum())
    return error, max(1.0, freedom)


def student(chance: float, freedom: float) -> float:
    """The quantile above a half of Student's distribution, any degrees of freedom from 1 on.

    With t = sqrt(freedom) * tan(angle) the density is a power of a cosine, which is summed up to the chance.
    """
    freedom = min(freedom, _NORMAL)
    # Where the density has become nothing: fine steps where it is.
    end = np.arctan(700 / sqrt(freedom)) if freedom > 2 else pi / 2
    angle = np.linspace(0, end, _POINTS)
    density = np.cos(angle) ** (freedom - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)]) * (angle[1] - angle[0])
    whole = sqrt(pi) * np.exp(lgamma(freedom / 2) - lgamma((freedom + 1) / 2))
    return float(sqrt(freedom) * np.tan(np.interp((chance - 0.5) * whole, below, angle)))


def _trend(rollouts: list[Rollout]) -> tuple[float | None, tuple[float, float] | None]:
    """Slope of the share of violating rollouts over iterations, each weighing as many rollouts as it has."""
    counts: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for each in rollouts:
        if each.iteration is not None:
            counts[each.iteration][0] += 1
            counts[each.iteration][1] += each.violating
    if len(counts) < 2:
        return None, None
    at = np.array(sorted(counts), dtype=np.float64)
    size = np.array([counts[int(i)][0] for i in at], dtype=np.float64)
    share = np.array([counts[int(i)][1] for i in at]) / size
    centred = at - np.average(at, weights=size)
    spread = float((size * centred**2).sum())
    slope = float((size * centred * share).sum()) / spread
    mean = float(np.average(share, weights=size))
    if len(counts) < 3 or not 0 < mean < 1:
        return slope, None
    chance = student(_SURE, _NORMAL) * sqrt(mean * (1 - mean) / spread)
    half = max(chance, _scatter(share - mean - slope * centred, size, centred))
    return slope, (slope - half, slope + half)


def _scatter(residuals: Any, size: Any, centred: Any) -> float:
    """Half of a slope's interval, by how far iterations lie from their line.

    ``weight`` is what each one's square has in the variance, ``freedom`` of Satterthwaite: the trace of the quadratic
    form, squared, through that of its square, where rollouts were independent and scattered alike.
    """
    total, spread = size.sum(), (size * centred**2).sum()
    leverage = size * (1 / total + centred**2 / spread)
    left = np.maximum(1 - leverage, _ROUNDING)
    weight = size * centred**2 / spread**2 / left
    error = sqrt(float((weight * size * residuals**2).sum()))
    seen = weight * size
    across = (
        (seen.sum() / total) ** 2
        + 2 * (seen * centred).sum() ** 2 / (total * spread)
        + ((seen * centred**2).sum() / spread) ** 2
    )
    freedom = float((weight * left).sum() ** 2 / ((weight**2 * (1 - 2 * leverage)).sum() + across))
    return student(_SURE, max(1.0, freedom)) * error
