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
CLASSES: Final = 12
"""reach (four) × what is known of the destination: nothing, named in the text, used by a recorded socket."""
_HARD: Final = np.array([0.997, 0.99, 0.98])
#: alerts that a call of each class causes, before any was seen; by reach: silent, unknown, network, suspect
_EXPECTED: Final = np.array([1e-4, 1e-3, 2e-3, 0.3, 0.05, 0.2, 0.2, 0.5, 0.2, 0.4, 0.4, 0.6])
_PSEUDO_CALLS: Final = 4.0
"""How many calls' worth of experience the expectation counts for."""
_ELSEWHERE: Final = 0.03
"""A call of a rollout whose sockets were recorded, none of this call to there: this one would have to be lost.
Of traces with more holes than that, as likely as their holes are."""
_FOREIGN: Final = 0.05
"""The alert's own address is of no machine of this job: a private one, or one whose NAT map does not lead to any."""
_GAP_NS: Final = 1_000_000_000
"""How hard evidence fades with the time that lies between."""
_SCALES_NS: Final = (30_000_000, 200_000_000, 1_000_000_000)
"""By how much a corrected time may be off: a clock's error is a mixture of these, learned from the alerts by it."""
_PSEUDO_TIMES: Final = 1.0
"""How many alerts' worth of experience says that each of these is as likely."""
_ROUNDS: Final = 200
_SETTLED: Final = 1e-3
_PLAIN: Final = np.arange(2 * CLASSES) % CLASSES < 3
"""Classes of calls that neither name the destination nor are made for such things."""
_DOUBT: Final = 5.0
"""How much more likely (log) alerts must be for it to be even that such calls cause more than the little expected."""


class Rows(NamedTuple):
    """Candidates, one row each, sorted by alert. Arrays of one length.

    ``alert`` counts from 0 without holes; times in nanoseconds.
    """

    alert: _INTS
    call: _INTS
    tier: _INTS
    gap: _INTS
    span: _INTS
    reach: _INTS
    named: _BOOLS
    used: _BOOLS
    watched: _BOOLS


class Groups(NamedTuple):
    """Alerts that share a background: one source, ordinary flows or objections, the machine known or not.

    Args:
        of: of each alert, its group.
        kind: of each group, 1 where its alerts are informational; what calls cause is learned for each kind.
        room: of each group, machines times seconds that are looked at.
        clock: of each group, the clock that its times go by, counted from 0.
        foreign: for each alert, whether its own address, or who stands behind it, is of no machine of the job.
        slack: for each alert, nanoseconds by which times may be off.
        width: of each alert, nanoseconds from its begin to its end.
    """

    of: _INTS
    kind: _INTS
    room: _FLOATS
    clock: _INTS
    foreign: _BOOLS
    slack: _INTS
    width: _INTS


def confidences(rows: Rows, groups: Groups, calls: _FLOATS, *, lost: float) -> tuple[_FLOATS, _FLOATS]:
    """(probability of each row, probability of nobody for each alert).

    Args:
        rows: the candidates.
        groups: what the alerts have in common.
        calls: how many calls of each reach there were at all.
        lost: the share of recorded sockets whose call is not in the traces, as far as these have holes.
    """
    alerts = len(groups.of)
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
    weight[speaking] = closeness[speaking] * _EXPECTED[rows.reach[speaking]] ** 0.25
    total = np.bincount(rows.alert, weight, alerts)
    nearest = np.zeros(alerts)
    np.maximum.at(nearest, rows.alert[speaking], closeness[speaking])
    certain = _HARD[np.minimum(best, HARD_TIERS - 1)] * np.maximum(nearest, 0.05)
    share = np.divide(weight, total[rows.alert], out=np.zeros_like(weight), where=total[rows.alert] > 0)
    probability = share * certain[rows.alert]
    nobody[hard] = 1 - certain[hard]

    soft = ~hard[rows.alert]
    if soft.any():
        soft_probability, soft_nobody = _mixture(rows, soft, groups, calls, max(lost, _ELSEWHERE))
        probability[soft] = soft_probability[soft]
        open_ = ~hard
        nobody[open_] = soft_nobody[open_]
    return probability, nobody


def _mixture(rows: Rows, soft: _BOOLS, groups: Groups, calls: _FLOATS, elsewhere: float) -> tuple[_FLOATS, _FLOATS]:
    group = groups.of[rows.alert]
    known = np.where(rows.used, 2, np.where(rows.named, 1, 0))
    of_class = (groups.kind[group] * CLASSES + known * 4 + rows.reach).astype(np.int64)
    factor = np.where(rows.watched & ~rows.used, elsewhere, 1.0)
    factor *= np.where(groups.foreign[rows.alert], _FOREIGN, 1.0)
    density = np.where(soft, factor, 0.0) * np.stack([_kernel(rows, groups, scale) for scale in _SCALES_NS])

    # Of the calls that name a destination only those count that met an alert to there: the others cannot be told.
    met = np.zeros(2 * CLASSES)
    if len(of_class):
        least = rows.call.min()
        calls_wide = int(rows.call.max() - least) + 1
        met += np.bincount(np.unique(of_class * calls_wide + rows.call - least) // calls_wide, minlength=2 * CLASSES)
    exposed = np.where(np.arange(2 * CLASSES) % CLASSES < 4, np.tile(calls, 6), met)

    learned = _learn(rows.alert, of_class, density, groups, exposed)
    # Calls of which nothing speaks are blamed only where alerts fall on them more often than chance explains.
    modest = _learn(rows.alert, of_class, density, groups, exposed, frozen=_PLAIN)
    # Which of both holds is itself uncertain; flexible rates have to earn what they explain by chance.
    trust = (
        1 / (1 + np.exp(np.clip(_DOUBT - (learned.likelihood - modest.likelihood), -30, 30)))[groups.kind][groups.of]
    )
    per_row = trust[rows.alert]
    probability = per_row * learned.probability + (1 - per_row) * modest.probability
    return probability, trust * learned.nobody + (1 - trust) * modest.nobody


def _kernel(rows: Rows, groups: Groups, scale: int) -> _FLOATS:
    """How likely (per second) a call's alert is to fall where this one fell, if times are off by about ``scale``."""
    # What that adds up to wherever it may fall: a call's life, the alert's own width, and margins, where it fades.
    margin = 2 * scale * (1 - np.exp(-groups.slack[rows.alert] / scale))
    life = (rows.span + groups.width[rows.alert] + margin) / 1e9
    density: _FLOATS = np.exp(-rows.gap / scale) / life
    return density


def _shares(responsible: _FLOATS, clock: _INTS, clocks: int) -> _FLOATS:
    """(scales × clocks): how often each clock is off by each scale, of (scales × pairs) what each explains."""
    found = np.stack([np.bincount(clock, each, clocks) for each in responsible]) + _PSEUDO_TIMES
    shares: _FLOATS = found / found.sum(axis=0)
    return shares


class _Fit(NamedTuple):
    probability: _FLOATS
    nobody: _FLOATS
    likelihood: _FLOATS
    """Of each kind of alerts: log of how much more likely they are than from a constant rate."""


def _learn(  # noqa: PLR0917 - the arrays of one computation
    alert: _INTS, of_class: _INTS, density: _FLOATS, groups: Groups, exposed: _FLOATS, frozen: _BOOLS | None = None
) -> _Fit:
    """Expectation-maximisation; classes in ``frozen`` keep the rate that was expected of them.

    Calls of one class that may have caused the same alert share its rate: they count as one until the end. Alerts that
    no call may have caused are nobody's whatever the rates are. ``density`` has a row for each of the scales.
    """
    alerts, count = len(groups.of), len(groups.room)
    some = np.flatnonzero(density.any(axis=0))
    pair, back = np.unique(alert[some] * (2 * CLASSES) + of_class[some], return_inverse=True)
    open_, of_open = np.unique(pair // (2 * CLASSES), return_inverse=True)
    pair_class = pair % (2 * CLASSES)
    pair_density = np.stack([np.bincount(back, each[some], len(pair)) for each in density])
    group = groups.of[open_]
    pair_group = group[of_open]
    size = np.bincount(groups.of, minlength=count).astype(np.float64)
    idle = size - np.bincount(group, minlength=count)
    expected = np.tile(_EXPECTED, 2)
    # From where half of the alerts are the calls' doing: from "nobody" it would not find back.
    promised = np.bincount(np.arange(2 * CLASSES) // CLASSES, exposed * expected, 2)
    scale = 0.5 * np.bincount(groups.kind, size, 2) / np.maximum(promised, 1e-9)
    per_call = expected * np.repeat(scale, CLASSES)
    stray = size / 2
    room = np.maximum(groups.room, 1.0)
    full = size > 0
    nobody, likelihood = np.ones(len(open_)), np.zeros(2)
    total, rate = np.ones(len(open_)), np.zeros((2 * CLASSES, count))
    pair_clock = groups.clock[pair_group]
    learned_off = off = np.full((len(density), groups.clock.max(initial=0) + 1), 1 / len(density))
    for _ in range(_ROUNDS):
        if frozen is not None:
            per_call = np.where(frozen, expected, per_call)
        caused = np.maximum(size - stray, 0) + 0.5
        off = learned_off
        share = caused / np.maximum(np.bincount(groups.kind, caused, 2)[groups.kind], 1e-9)
        rate = per_call[:, None] * share
        by_scale = pair_density * off[:, pair_clock] * rate[pair_class, pair_group]
        weight = by_scale.sum(axis=0)
        background = (stray + 0.5) / room
        total = np.bincount(of_open, weight, len(open_)) + background[group]
        before, nobody = nobody, background[group] / total
        gained = np.bincount(group, np.log(total * (room / np.maximum(size, 1))[group]), count)
        gained[full] += idle[full] * np.log(background[full] * room[full] / size[full])
        likelihood = np.bincount(groups.kind, gained, 2).astype(np.float64)
        stray = np.bincount(group, nobody, count) + idle
        responsible = np.bincount(pair_class, weight / total[of_open], 2 * CLASSES)
        learned_off = _shares(by_scale / total[of_open], pair_clock, off.shape[1])
        per_call = (responsible + expected * _PSEUDO_CALLS) / (exposed + _PSEUDO_CALLS)
        if np.abs(nobody - before).max(initial=0.0) < _SETTLED and np.abs(learned_off - off).max() < 10 * _SETTLED:
            break
    probability, everybody = np.zeros(len(alert)), np.ones(alerts)
    whole = np.ones(alerts)
    whole[open_], everybody[open_] = total, nobody
    group = groups.of[alert[some]]
    likely = (density[:, some] * off[:, groups.clock[group]]).sum(axis=0)
    probability[some] = likely * rate[of_class[some], group] / whole[alert[some]]
    return _Fit(probability, everybody, likelihood)
