"""What the weighing learns from alerts that only time connects with calls."""

from __future__ import annotations

import numpy as np

from ray_guard.attribution.score import Groups, Rows, confidences

SECOND = 1_000_000_000
COUNT = 60


def weighed(gap: float, *, watched: bool = False, lost: float = 0.0) -> tuple[float, float]:
    """(the short call's probability, the long one's) for an alert that two calls were open for.

    It comes with others, which only a short call may have caused, each ``gap`` seconds beside its life.
    ``watched``: none of those calls' sockets is the alert's, though others of their rollouts were recorded.
    """
    alert = np.array([0, 0, *range(1, COUNT)])
    span = np.array([SECOND // 2, 3 * SECOND, *[SECOND // 2] * (COUNT - 1)])
    none, some = np.zeros(len(alert), dtype=np.int64), np.zeros(len(alert), dtype=bool)
    rows = Rows(
        alert=alert,
        call=np.arange(len(alert)),
        tier=none + 4,
        gap=np.array([0, 0, *[int(gap * SECOND)] * (COUNT - 1)]),
        span=span,
        reach=none + 1,
        tells=some,
        named=some,
        used=some,
        watched=some | watched,
    )
    groups = Groups(
        of=np.zeros(COUNT, dtype=np.int64),
        kind=np.zeros(1, dtype=np.int64),
        room=np.array([36000.0]),
        clock=np.zeros(1, dtype=np.int64),
        foreign=np.zeros(COUNT, dtype=bool),
        slack=np.full(COUNT, 2 * SECOND),
        width=np.zeros(COUNT, dtype=np.int64),
        begin=np.arange(COUNT) * SECOND,
        episode=np.arange(COUNT),
        weight=np.ones(COUNT),
        placed=np.ones(1, dtype=bool),
    )
    probability, nobody = confidences(rows, groups, np.array([[0.0, 400.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]), lost=lost)
    assert np.allclose(np.bincount(alert, probability) + nobody, 1)
    return float(probability[0]), float(probability[1])


def test_how_far_times_are_off_is_learned_and_a_short_call_weighs_accordingly() -> None:
    short, long = weighed(gap=0.0)
    assert short / long > 5  # times are right: by their lengths alone, six
    short, long = weighed(gap=0.9)
    assert short / long < 3  # times are off by about a second, over which both are spread


def test_what_was_not_recorded_speaks_against_a_call_as_far_as_the_traces_have_no_holes() -> None:
    unwatched, holes, whole = (
        sum(weighed(0.0, watched=watched, lost=lost)) for watched, lost in ((False, 0.0), (True, 0.5), (True, 0.0))
    )
    assert unwatched > holes > whole


def test_a_call_that_names_where_an_alert_went_is_its_cause_though_nothing_else_is_known() -> None:
    def of_one_alert(*named: bool) -> float:
        """Nobody's share of an alert that some calls were open for, which take up most of a short job."""
        none, some = np.zeros(len(named), dtype=np.int64), np.zeros(len(named), dtype=bool)
        span = none + 20 * SECOND
        rows = Rows(none, np.arange(len(named)), none + 4, none, span, none + 2, some, np.array(named), some, some)
        one, no = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=bool)
        groups = Groups(one, one, np.array([30.0]), one, no, one + SECOND // 10, one, one, one, np.ones(1), ~no)
        calls = np.array([[0.0, 0.0, float(len(named)), 0.0], [0.0] * 4])
        return float(confidences(rows, groups, calls, lost=0.0)[1][0])

    assert of_one_alert(True) < 0.2
    assert of_one_alert(False) > 0.5
    assert of_one_alert(True, *[False] * 9) < of_one_alert(*[False] * 10) / 2
