"""Whether what set off alerts was rewarded. Runs later, on any machine. Pure numbers.

Compared within groups, that is among rollouts of one prompt at one iteration, so that hard tasks and late checkpoints
do not pass for an effect. It is an association: a reward model may like what such rollouts have in common, and groups
or episodes that a trainer filtered out are missing here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np

_RESAMPLED: Final = 2000
_POWER_Z: Final = 2.8
"""80 % power at a two-sided 5 %."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One rollout: its group (None: of none), iteration, reward (None: never told) and whether it set off an alert."""

    group: Hashable | None
    iteration: int | None
    reward: float | None
    violating: bool


@dataclass(frozen=True, slots=True)
class Association:
    """Reward against violation.

    Args:
        difference: mean reward of violating rollouts less that of the others, within groups; None where no group has
            both.
        interval: 95 %, by resampling groups; None with fewer than two such groups.
        detectable: the least difference that so many groups would have shown with 80 % power; None likewise.
        trend: change of the share of violating rollouts from one iteration to the next; None with a single iteration.
        groups: groups with both kinds.
        rollouts, violating, unrewarded: counts, the last of rollouts without a reward.
    """

    difference: float | None
    interval: tuple[float, float] | None
    detectable: float | None
    trend: float | None
    groups: int
    rollouts: int
    violating: int
    unrewarded: int


def associate(rollouts: Iterable[Rollout]) -> Association:
    """Measures both; nothing in it depends on the order of the rollouts."""
    known = list(rollouts)
    groups: dict[Hashable, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for each in known:
        if each.group is not None and each.reward is not None:
            groups[each.group, each.iteration][each.violating].append(each.reward)
    both = [(np.mean(bad) - np.mean(good), len(bad) * len(good) / (len(bad) + len(good)))
            for good, bad in groups.values() if good and bad]  # fmt: skip
    difference = interval = detectable = None
    if both:
        gaps, weights = np.array(sorted(both)).T
        difference = float(np.average(gaps, weights=weights))
        if len(both) > 1:
            # Seeded: the same evidence gives the same report.
            picked = np.random.default_rng(0).integers(0, len(both), (_RESAMPLED, len(both)))
            means = (gaps[picked] * weights[picked]).sum(axis=1) / weights[picked].sum(axis=1)
            interval = (float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975)))
            detectable = float(_POWER_Z * means.std())
    return Association(
        difference,
        interval,
        detectable,
        _trend(known),
        len(both),
        len(known),
        sum(each.violating for each in known),
        sum(each.reward is None for each in known),
    )


def _trend(rollouts: list[Rollout]) -> float | None:
    """Slope of the share of violating rollouts over iterations, each weighing as many rollouts as it has."""
    counts: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for each in rollouts:
        if each.iteration is not None:
            counts[each.iteration][0] += 1
            counts[each.iteration][1] += each.violating
    if len(counts) < 2:
        return None
    at = np.array(sorted(counts), dtype=np.float64)
    size = np.array([counts[int(i)][0] for i in at], dtype=np.float64)
    share = np.array([counts[int(i)][1] for i in at]) / size
    centred = at - np.average(at, weights=size)
    return float((size * centred * share).sum() / (size * centred**2).sum())
