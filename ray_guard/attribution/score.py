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
CLASSES: Final = 16
"""reach (four) × what is known of the destination: nothing; the text names another; this one; a socket went there."""
_HARD: Final = np.array([0.997, 0.99, 0.98])
#: alerts that a call of each class causes, before any was seen; by reach: silent, unknown, network, suspect
_EXPECTED: Final = np.array(
    [
        *(1e-4, 2e-3, 3e-3, 0.2),
        *(1e-4, 1e-3, 1e-3, 0.03),
        *(0.05, 0.2, 0.2, 0.5),
        *(0.2, 0.4, 0.4, 0.6),
    ]
)
_PSEUDO_CALLS: Final = 4.0
"""How many calls' worth of experience the expectation counts for."""
_UNNAMED: Final = np.arange(2 * CLASSES) % CLASSES < 8
_GUESSED: Final = _UNNAMED & (np.arange(2 * CLASSES) % 4 < 2)
"""Calls of which nothing speaks: what they cause has to be guessed."""
_TALKING: Final = _UNNAMED & (np.arange(2 * CLASSES) % 4 == 2)
"""Calls that use the network, to wherever: a firewall may object to them all, or to none. It is quickly learned."""
_GUESSES: Final = 10.0 ** np.arange(-1.0, 2.6, 0.5)
"""By how much more than expected they may cause."""
_DOUBT: Final = 1.7
"""The logarithm of that is off by about so much."""
_NEGLIGIBLE: Final = 0.003
_LEARNED: Final = 2000
"""How many alerts of a group its rates are learned from."""
_APART: Final = 0.1
_MOST_APART: Final = 3.0
_ELSEWHERE: Final = 0.03
"""A call of a rollout whose sockets were recorded, none of this call to there: this one would have to be lost.
Of traces with more holes than that, as likely as their holes are."""
_FOREIGN: Final = 0.05
"""The alert's own address is of no machine of this job: a private one, or one whose NAT map does not lead to any."""
_GAP_NS: Final = 1_000_000_000
"""How hard evidence fades with the time that lies between."""
_SCALES_NS: Final = (30_000_000, 200_000_000, 1_000_000_000, 5_000_000_000)
"""By how much a corrected time may be off: a clock's error is a mixture of these, learned from the alerts by it."""
_LINGERING: Final = 0.15
"""How much of what a call that tunnels, mines or scans causes may come after its end: two thirds of that within:"""
_LINGERS_NS: Final = 60_000_000_000
_PSEUDO_TIMES: Final = 1.0
"""How many alerts' worth of experience says that each of these is as likely."""
_NAMING: Final = 0.5
"""How often a call that causes an alert names its destination."""
_COMMON: Final = 0.02
_PSEUDO_OPEN: Final = 100.0
"""How often any other call does, as far as so many open calls' worth of experience goes."""
_COINCIDENCE: Final = 0.05
"""The least that the chance of meeting such a call is taken for."""
_MISLED: Final = 0.02
"""How often a call that names or used the destination is there by chance, whatever the rates say."""
_MISTAKEN: Final = 0.05
"""How often the picture of calls and constant rates is wrong for an alert that only time connects, or time and text
of no machine in particular."""
_FEW: Final = 100
_ROUNDS: Final = 60
_SETTLED: Final = 1e-3


class Rows(NamedTuple):
    """Candidates, one row each, sorted by alert. Arrays of one length.

    ``alert`` counts from 0 without holes; times in nanoseconds. ``tells``: the call's text names some destination;
    ``named``: it names the alert's; ``used``: a recorded socket went there; ``watched``: sockets of its rollout were
    recorded.
    """

    alert: _INTS
    call: _INTS
    tier: _INTS
    gap: _INTS
    span: _INTS
    reach: _INTS
    tells: _BOOLS
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
        begin: of each alert, nanoseconds.
        episode: of each alert, the event it is part of: many of one machine to one place within moments.
        weight: of each alert, one over how many are part of that.
        placed: of each group, whether its records tell the machine.
    """

    of: _INTS
    kind: _INTS
    room: _FLOATS
    clock: _INTS
    foreign: _BOOLS
    slack: _INTS
    width: _INTS
    begin: _INTS
    episode: _INTS
    weight: _FLOATS
    placed: _BOOLS


def confidences(rows: Rows, groups: Groups, calls: _FLOATS, *, lost: float) -> tuple[_FLOATS, _FLOATS]:
    """(probability of each row, probability of nobody for each alert).

    Args:
        rows: the candidates.
        groups: what the alerts have in common.
        calls: (whether its text names a destination × reach): how many such calls there were at all.
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
        mixture = _mixture(rows, soft, groups, calls, max(lost, _ELSEWHERE))
        soft_probability, soft_nobody = _doubted(rows, groups, *mixture)
        probability[soft] = soft_probability[soft]
        open_ = ~hard
        nobody[open_] = soft_nobody[open_]
    return probability, nobody


def _doubted(rows: Rows, groups: Groups, probability: _FLOATS, nobody: _FLOATS) -> tuple[_FLOATS, _FLOATS]:
    """What is left of soft evidence when the picture itself, of calls and constant rates, may be wrong.

    No timing alone is as good as certain: of each call a little goes to nobody. And of nobody a little goes to the
    calls that were open, to the less likely of them as well, unless that would name hundreds.
    """
    alerts = len(groups.of)
    told = (rows.named | rows.used) & groups.placed[groups.of[rows.alert]]
    taken = probability * np.where(told, _MISLED, _MISTAKEN)
    size = np.bincount(rows.alert, probability > 0, alerts)
    given = np.where((size > 0) & (size <= _FEW) & ~groups.foreign, nobody * _MISTAKEN, 0.0)
    spread = np.sqrt(probability)
    whole = np.bincount(rows.alert, spread, alerts)[rows.alert]
    share = np.divide(spread, whole, out=np.zeros_like(spread), where=whole > 0)
    left = probability - taken + given[rows.alert] * share
    return left, nobody - given + np.bincount(rows.alert, taken, alerts)


def _mixture(rows: Rows, soft: _BOOLS, groups: Groups, calls: _FLOATS, elsewhere: float) -> tuple[_FLOATS, _FLOATS]:
    group = groups.of[rows.alert]
    known = np.where(rows.used, 3, np.where(rows.named, 2, rows.tells))
    of_class = (groups.kind[group] * CLASSES + known * 4 + rows.reach).astype(np.int64)
    factor = np.where(rows.watched & ~rows.used, elsewhere, 1.0)
    factor *= np.where(groups.foreign[rows.alert], _FOREIGN, 1.0)
    together, lasted = _together(rows, groups)
    # Whose call had ended for longer than times may be off: what survives it comes when it will, by any clock.
    late = rows.gap >= groups.slack[rows.alert]
    factor *= together * np.where(groups.foreign[rows.alert], 1.0, _told_by_name(rows, late))
    density = np.stack([_kernel(rows, groups, lasted, scale) for scale in _SCALES_NS])
    density[:, late] = _LINGERING * np.exp(-rows.gap[late] / _LINGERS_NS) / (_LINGERS_NS / 1e9)
    density *= np.where(soft, factor, 0.0)

    # Of the calls that name a destination only those count that met an alert to there: the others cannot be told.
    told = np.flatnonzero(~_UNNAMED[of_class])
    pair = of_class[told] + 2 * CLASSES * rows.call[told]
    met = np.bincount(np.unique(pair) % (2 * CLASSES), minlength=2 * CLASSES)
    exposed = np.where(_UNNAMED, np.tile(np.concatenate([calls.ravel(), np.zeros(CLASSES - 8)]), 2), met)
    return _learn(rows, of_class, density, groups, exposed)


def _told_by_name(rows: Rows, late: _BOOLS) -> _FLOATS:
    """How much likelier each row is because its call names the destination: else such a call was met by chance, of
    which a place that many name, or many open calls, give more. Where sockets were recorded, they tell, and not the
    text; calls that had ended (``late``) are candidates for their text alone."""
    among, of_them = np.bincount(rows.alert), np.bincount(rows.alert, rows.named)
    # Of the others: what is looked for does not speak against itself.
    each = (of_them - 1 + _COMMON * _PSEUDO_OPEN) / (among - 1 + _PSEUDO_OPEN)
    chance = np.maximum(1 - np.exp(-among * each), _COINCIDENCE)
    return np.where(rows.named & ~rows.watched & ~late, np.maximum(_NAMING / chance, 1.0)[rows.alert], 1.0)


def _together(rows: Rows, groups: Groups) -> tuple[_FLOATS, _FLOATS]:
    """(how much less likely each row is because its call was not open for alerts that came together with this one,
    nanoseconds of its call's life that these alerts take up).

    Many alerts of one machine to one place within moments have one cause, mostly: who explains but some of them is
    less likely than who explains more. And all of them have to fall into its life: the longer they last, the less of it
    is left for when they begin.
    """
    of = groups.episode[rows.alert]
    factor, lasted = np.ones(len(of)), np.zeros(len(of))
    many = np.flatnonzero((groups.weight[rows.alert] < 1) & (groups.kind[groups.of[rows.alert]] == 0))
    if not len(many):
        return factor, lasted
    least = rows.call[many].min()
    wide = int(rows.call[many].max() - least) + 1
    _, back = np.unique(of[many] * wide + rows.call[many] - least, return_inverse=True)
    covered = np.bincount(back, np.exp(-rows.gap[many] / _GAP_NS))[back]
    most = np.zeros(len(groups.of))
    np.maximum.at(most, rows.alert[many], covered)
    factor[many] = _APART ** np.minimum(most[rows.alert[many]] - covered, _MOST_APART)
    began, ended = np.full(back.max() + 1, np.iinfo(np.int64).max), np.zeros(back.max() + 1, dtype=np.int64)
    at = groups.begin[rows.alert[many]]
    np.minimum.at(began, back, at)
    np.maximum.at(ended, back, at)
    lasted[many] = np.minimum((ended - began)[back], rows.span[many] * (1 - 1 / (np.bincount(back)[back] + 1)))
    return factor, lasted


def _kernel(rows: Rows, groups: Groups, lasted: _FLOATS, scale: int) -> _FLOATS:
    """How likely (per second) a call's alert is to fall where this one fell, if times are off by about ``scale``."""
    # What that adds up to wherever it may fall: a call's life, the alert's own width, and margins, where it fades.
    margin = 2 * scale * (1 - np.exp(-groups.slack[rows.alert] / scale))
    life = (rows.span - lasted + groups.width[rows.alert] + margin) / 1e9
    density: _FLOATS = np.exp(-rows.gap / scale) / life
    return density


class _Pairs(NamedTuple):
    """Calls of one class that may have caused the same alert: until the end they share its rate and count as one.

    ``density`` has a row for each scale.
    """

    alert: _INTS
    of_class: _INTS
    density: _FLOATS


class _Rates(NamedTuple):
    """What one guess of how much calls cause makes of the alerts.

    Args:
        rate: of each class in each group; per call, as far as the group sees it.
        background: of each group, per machine and second.
        off: how often each clock is off by each scale.
        credit: of each kind of alerts, log of how well the guess explains them.
    """

    rate: _FLOATS
    background: _FLOATS
    off: _FLOATS
    credit: _FLOATS


def _sample(groups: Groups) -> _BOOLS:
    """The alerts that rates are learned from: no more than so many of each group, evenly over all that it has."""
    order = np.argsort(groups.of, kind="stable")
    size = np.bincount(groups.of, minlength=len(groups.room))
    place = np.arange(len(order)) - np.repeat(np.cumsum(size) - size, size)
    every = np.maximum(1, -(-size // _LEARNED))
    taken = np.zeros(len(order), dtype=bool)
    taken[order] = place % np.repeat(every, size) == 0
    return taken


def _fit(pairs: _Pairs, taken: _BOOLS, groups: Groups, exposed: _FLOATS, guess: float) -> _Rates:
    """Expectation-maximisation on the alerts taken; ``guess`` is how much more than expected unnamed calls cause."""
    count, kinds = len(groups.room), groups.kind
    mine = taken[pairs.alert]
    open_, of_open = np.unique(pairs.alert[mine], return_inverse=True)
    of_class, density = pairs.of_class[mine], pairs.density[:, mine]
    group, worth = groups.of[open_], groups.weight[open_]
    of_pair, each = group[of_open], worth[of_open]
    size = np.bincount(groups.of, groups.weight * taken, count)
    idle = np.maximum(size - np.bincount(group, worth, count), 0.0)
    whole = np.bincount(groups.of, groups.weight, count)
    # Of a part of the alerts everything is learned as if all caused so much less.
    part = np.bincount(kinds, size, 2) / np.maximum(np.bincount(kinds, whole, 2), 1e-9)
    usual = np.tile(_EXPECTED, 2) * np.where(_GUESSED, guess, 1.0) * np.repeat(np.maximum(part, 1e-9), CLASSES)
    believed = np.where(_GUESSED, 1 / usual, np.where(_TALKING, 0.5 / usual, _PSEUDO_CALLS))
    """As many calls' worth of experience say what is usual."""
    per_call = usual.copy()
    promised = np.bincount(np.arange(2 * CLASSES) // CLASSES, exposed * usual, 2)
    stray = size * np.clip(1 - promised / np.maximum(np.bincount(kinds, size, 2), 1e-9), 0.1, 0.9)[kinds]
    room = np.maximum(groups.room, 1.0)
    full = size > 0
    clock = groups.clock[of_pair]
    learned_off = off = np.full((len(density), groups.clock.max(initial=0) + 1), 1 / len(density))
    nobody, total = np.ones(len(open_)), np.ones(len(open_))
    rate, background = np.zeros((2 * CLASSES, count)), np.ones(count)
    for _ in range(_ROUNDS):
        off = learned_off
        caused = np.maximum(size - stray, 0) + 0.5
        share = caused / np.maximum(np.bincount(kinds, caused, 2)[kinds], 1e-9)
        rate = per_call[:, None] * share
        background = (stray + 0.5) / room
        by_scale = density * off[:, clock] * rate[of_class, of_pair]
        weight = by_scale.sum(axis=0)
        total = np.bincount(of_open, weight, len(open_)) + background[group]
        before, nobody = nobody, background[group] / total
        stray = np.bincount(group, nobody * worth, count) + idle
        per_call = np.bincount(of_class, weight / total[of_open] * each, 2 * CLASSES)
        per_call = (per_call + usual * believed) / (exposed + believed)
        learned_off = _shares(by_scale / total[of_open] * each, clock, off.shape[1])
        if np.abs(nobody - before).max(initial=0.0) < _SETTLED and np.abs(learned_off - off).max() < 10 * _SETTLED:
            break
    credit = np.bincount(kinds[group], worth * np.log(total), 2)
    credit += np.bincount(kinds[full], (idle * np.log(background))[full] - (background * room)[full], 2)
    rated = per_call * exposed
    belief = usual * believed * np.log(per_call / usual) - believed * per_call
    return _Rates(rate, background, off, credit + (belief - rated).reshape(2, CLASSES).sum(axis=1))


def _shares(responsible: _FLOATS, clock: _INTS, clocks: int) -> _FLOATS:
    """(scales × clocks): how often each clock is off by each scale, of (scales × pairs) what each explains."""
    found = np.stack([np.bincount(clock, each, clocks) for each in responsible]) + _PSEUDO_TIMES
    shares: _FLOATS = found / found.sum(axis=0)
    return shares


def _learn(rows: Rows, of_class: _INTS, density: _FLOATS, groups: Groups, exposed: _FLOATS) -> tuple[_FLOATS, _FLOATS]:
    """(probability of each row, of nobody): the mean over what the rates may be, each as far as the alerts bear it out.

    How much calls of which nothing speaks cause is what is known least, and often the alerts do not tell it: where
    such a call is always open, each alert may be its doing or nobody's. So a range of guesses is tried, each with all
    other rates learned under it, and none is chosen.
    """
    alerts = len(groups.of)
    some = np.flatnonzero(density.any(axis=0))
    key, back = np.unique(rows.alert[some] * (2 * CLASSES) + of_class[some], return_inverse=True)
    pairs = _Pairs(
        key // (2 * CLASSES),
        key % (2 * CLASSES),
        np.stack([np.bincount(back, each[some], len(key)) for each in density]),
    )
    taken = _sample(groups)
    fits = [_fit(pairs, taken, groups, exposed, guess) for guess in _GUESSES]
    credit = np.stack([fit.credit for fit in fits]) - (np.log(_GUESSES)[:, None] / _DOUBT) ** 2 / 2
    trust = np.exp(credit - credit.max(axis=0))
    trust /= trust.sum(axis=0)
    # Of what is hardly borne out nothing is seen in the answer.
    trust[trust < _NEGLIGIBLE] = 0.0
    trust /= trust.sum(axis=0)
    off = fits[int(np.argmax(trust[:, 0]))].off
    nobody, share = np.zeros(alerts), np.zeros(len(key))
    of_pair = groups.of[pairs.alert]
    likely = (pairs.density * off[:, groups.clock[of_pair]]).sum(axis=0)
    for fit, weight in zip(fits, trust, strict=True):
        if not weight.any():
            continue
        mine = weight[groups.kind[groups.of]]
        rate = fit.rate[pairs.of_class, of_pair]
        background = fit.background[groups.of]
        whole = np.bincount(pairs.alert, likely * rate, alerts) + background
        nobody += mine * background / whole
        share += mine[pairs.alert] * rate / whole[pairs.alert]
    probability = np.zeros(len(rows.alert))
    by_clock = off[:, groups.clock[groups.of[rows.alert[some]]]]
    probability[some] = (density[:, some] * by_clock).sum(axis=0) * share[back]
    return probability, nobody
