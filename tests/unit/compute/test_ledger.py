"""The CPU ledger: what is charged, when, and which part of it is a bound."""

from __future__ import annotations

import os

from ray_guard.compute.ledger import Ledger

TICKS = os.sysconf("SC_CLK_TCK")
S = 1_000_000_000


def test_a_clock_is_charged_once_however_often_it_is_read() -> None:
    ledger = Ledger(bounds=True)
    entry = ledger.enter(1, 10 * TICKS)
    assert [ledger.measured(entry, cpu * S, at) for cpu, at in ((1, 11.0), (3, 13.0), (3, 14.0))] == [S, 2 * S, 0]
    assert ledger.ended(entry, 4 * S, 15.0) == S
    assert (ledger.cpu_ns, ledger.bounded_ns) == (4 * S, 0)


def test_one_that_ended_unmeasured_is_charged_the_time_since_it_was_measured() -> None:
    ledger = Ledger(bounds=True)
    seen, unseen = ledger.enter(1, 10 * TICKS), ledger.enter(2, 12 * TICKS)
    ledger.measured(seen, S, 14.0)
    assert ledger.ended(seen, None, 14.5) == S // 2
    assert ledger.ended(unseen, None, 14.0) == 2 * S, "from its birth"
    assert ledger.bounded_ns == 5 * S // 2


def test_an_heir_is_charged_for_those_before_it_once() -> None:
    ledger = Ledger(bounds=True)
    entry = ledger.enter(1, 12 * TICKS)
    assert ledger.took_over(entry, 10.0) == 0
    entry.heir = True
    assert ledger.took_over(entry, 10.0) == 2 * S
    assert ledger.took_over(entry, 10.0) == 0
    older = ledger.enter(2, 9 * TICKS)
    older.heir = True
    assert ledger.took_over(older, 10.0) == 0, "it was there before anybody looked"


def test_where_a_sum_over_the_tree_settles_it_nothing_is_a_bound() -> None:
    ledger = Ledger()
    entry = ledger.enter(1, 10 * TICKS)
    assert ledger.ended(entry, None, 20.0) == 0
    assert ledger.settle(7 * S) == 7 * S
    assert ledger.settle(6 * S) == 0, "a smaller sum takes nothing back"
    assert (ledger.cpu_ns, ledger.bounded_ns, ledger.seen) == (7 * S, 0, 1)
