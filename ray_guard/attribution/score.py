"""How sure: a probability over candidates, and over "nobody in this job". Runs later, on any machine. Pure numbers.

Hard evidence (a recorded socket, a witnessed process) is nearly certain; what is left is the chance that two things
were recorded as one. Soft evidence (open calls) is a mixture of Poisson processes: calls cause alerts while they live,
at a rate that depends on what they do; something else causes alerts at a constant rate. Both rates are learned from the
alerts themselves: where alerts fall on calls no more often than on any moment, calls explain nothing, and the answer is
"unobserved".
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

_INTS = npt.NDArray[np.int64]
_FLOATS = npt.NDArray[np.float64]
_BOOLS = npt.NDArray[np.bool_]

HARD_TIERS: Final = 3
"""socket, nat and process come before destination and interval."""
_HARD: Final = np.array([0.997, 0.99, 0.98])
#: how readily a call of each class causes an alert, beside one that is made to: silent, unknown, network, suspect
_READY: Final = np.array([0.01, 0.15, 0.5, 1.0])
_NAMED: Final = 30.0
_USED: Final = 60.0
_ELSEWHERE: Final = 0.03
"""A call whose sockets were recorded, none of them to there: what was lost would have to be this one."""
_FOREIGN: Final = 0.05
"""The alert's own address is private and no machine of this job has it."""
_GAP_NS: Final = 1_000_000_000
_ROUNDS: Final = 40


class Rows(NamedTuple):
    """Candidates, one row each, sorted by alert. Arrays of one length.

    ``alert`` counts from 0 without holes; times in nanoseconds.
    """

    alert: _INTS
    tier: _INTS
    gap: _INTS
    span: _INTS
    reach: _INTS
    named: _BOOLS
    used: _BOOLS
    watched: _BOOLS


class Exposure(NamedTuple):
    """What one group of alerts (a source, and whether the machine is known) could have been caused by.

    Args:
        readiness: sum of the calls' readiness, all calls that were possible.
        seconds: the time that is looked at.
        machines: how many are looked at.
    """

    readiness: float
    seconds: float
    machines: int


def readiness(reach: _INTS) -> _FLOATS:
    return _READY[reach]


def confidences(
    rows: Rows, group: _INTS, foreign: _BOOLS, exposures: list[Exposure], slack: _INTS
) -> tuple[_FLOATS, _FLOATS]:
    """(probability of each row, probability of nobody for each alert).

    Args:
        rows: the candidates.
        group: of each alert, an index into ``exposures``.
        foreign: for each alert, whether its own address belongs to no machine of the job.
        exposures: of each group.
        slack: for each alert, nanoseconds by which times may be off.
    """
    alerts = len(group)
    hard = np.zeros(alerts, dtype=bool)
    hard[rows.alert[rows.tier < HARD_TIERS]] = True
    weight = np.zeros(len(rows.alert))
    nobody = np.ones(alerts)

    of_hard = rows.tier < HARD_TIERS
    closeness = np.exp(-rows.gap / _GAP_NS)
    best = np.full(alerts, HARD_TIERS, dtype=np.int64)
    np.minimum.at(best, rows.alert[of_hard], rows.tier[of_hard])
    # The strongest tier alone speaks; what has a weaker witness only is a bystander.
    speaking = of_hard & (rows.tier == best[rows.alert])
    weight[speaking] = closeness[speaking] * _READY[rows.reach[speaking]]
    total = np.bincount(rows.alert, weight, alerts)
    nearest = np.zeros(alerts)
    np.maximum.at(nearest, rows.alert[speaking], closeness[speaking])
    certain = _HARD[np.minimum(best, HARD_TIERS - 1)] * np.maximum(nearest, 0.05)
    share = np.divide(weight, total[rows.alert], out=np.zeros_like(weight), where=total[rows.alert] > 0)
    probability = share * certain[rows.alert]
    nobody[hard] = 1 - certain[hard]

    soft = ~hard[rows.alert]
    if soft.any():
        soft_probability, soft_nobody = _mixture(rows, soft, group, foreign, exposures, slack)
        probability[soft] = soft_probability[soft]
        open_ = ~hard
        nobody[open_] = soft_nobody[open_]
    return probability, nobody


def _mixture(  # noqa: PLR0917 - the arrays of one computation
    rows: Rows, soft: _BOOLS, group: _INTS, foreign: _BOOLS, exposures: list[Exposure], slack: _INTS
) -> tuple[_FLOATS, _FLOATS]:
    alerts = len(group)
    life = (rows.span + 2 * slack[rows.alert]) / 1e9
    ready = _READY[rows.reach].copy()
    ready[rows.named] *= _NAMED
    ready[rows.used] *= _USED
    ready[rows.watched & ~rows.used] *= _ELSEWHERE
    ready *= np.exp(-rows.gap / _GAP_NS)
    ready[foreign[rows.alert]] *= _FOREIGN
    density = np.where(soft, ready / life, 0.0)

    count = np.bincount(group, minlength=len(exposures)).astype(np.float64)
    reach = np.array([max(each.readiness, 1e-6) for each in exposures])
    room = np.array([max(each.seconds, 1.0) * max(each.machines, 1) for each in exposures])
    # One alert of each kind is taken for granted, so that a handful decides nothing.
    caused, stray = count / 2 + 1, count / 2 + 1
    probability = np.zeros(len(rows.alert))
    nobody = np.ones(alerts)
    for _ in range(_ROUNDS):
        per_call = (caused + 1) / (reach + 1)
        per_second = (stray + 1) / room
        weight = density * per_call[group[rows.alert]]
        background = per_second[group]
        total = np.bincount(rows.alert, weight, alerts) + background
        probability = weight / total[rows.alert]
        nobody = background / total
        stray = np.bincount(group, nobody, len(exposures)).astype(np.float64)
        caused = count - stray
    return probability, nobody
