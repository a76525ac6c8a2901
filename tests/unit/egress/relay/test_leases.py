from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_guard.egress.relay.leases import KINDS, Lease
from ray_guard.policy.budgets import EGRESS, RECEIVED, SENT, Account, Exceeded, Scope


def test_what_is_out_counts_as_held_until_it_is_settled() -> None:
    episode = Account(Scope.EPISODE, "e", {EGRESS: 1000})
    call = Account(Scope.CALL, "c", parent=episode)
    lease = Lease(1, call)
    assert lease.take(SENT, 400, 0) == 400
    assert (episode.held(EGRESS), episode.used(EGRESS)) == (400, 0)
    lease.settle(SENT, 100, 50)
    assert (episode.held(EGRESS), episode.used(EGRESS), call.used(SENT)) == (250, 100, 100)
    lease.settle(SENT, 0, 250)
    assert (episode.held(EGRESS), episode.used(EGRESS)) == (0, 100)


def test_need_is_met_as_far_as_there_is_room_and_no_further() -> None:
    lease = Lease(1, Account(Scope.CALL, "c", {EGRESS: 1000}))
    assert lease.take(SENT, 600, 0) == 600
    assert lease.take(RECEIVED, 600, 0) == 400
    exceeded = lease.take(SENT, 1, 0)
    assert isinstance(exceeded, Exceeded)
    assert (exceeded.kind, exceeded.limit, exceeded.scope) == (EGRESS, 1000, Scope.CALL)
    assert lease.take(SENT, 0, 100) == 0, "who asks ahead of need is not over the budget"


def test_what_is_asked_ahead_is_a_part_of_the_room_only() -> None:
    lease = Lease(1, Account(Scope.CALL, "c", {EGRESS: 8000}))
    assert lease.take(SENT, 0, 1 << 20) == 1000
    assert lease.take(SENT, 5, 1 << 20) == 875
    assert lease.take(SENT, 0, 10) == 10


def test_the_tightest_of_all_limits_counts() -> None:
    job = Account(Scope.JOB, "j", {SENT: 70})
    actor = Account(Scope.ACTOR, "a", {EGRESS: 500}, parent=job)
    lease = Lease(1, Account(Scope.CALL, "c", {RECEIVED: 90}, parent=actor))
    assert lease.take(SENT, 100, 0) == 70
    assert lease.take(RECEIVED, 100, 0) == 90
    over = lease.take(SENT, 100, 0)
    assert isinstance(over, Exceeded)
    assert (over.kind, over.scope) == (SENT, Scope.JOB)


def test_without_a_limit_there_is_nothing_to_reserve_and_use_still_counts() -> None:
    actor = Account(Scope.ACTOR, "a")
    lease = Lease(1, Account(Scope.CALL, "c", {RECEIVED: 5}, parent=actor))
    assert lease.limited == {SENT: False, RECEIVED: True}
    lease.settle(SENT, 123, 0)
    assert (actor.used(EGRESS), actor.held(EGRESS)) == (123, 0)


def test_what_a_limit_only_reports_is_granted() -> None:
    lease = Lease(1, Account(Scope.CALL, "c", watched={EGRESS: 10}))
    assert lease.take(SENT, 100, 0) == 100


def test_when_its_scope_ends_what_is_out_is_held_above_until_it_is_settled() -> None:
    episode = Account(Scope.EPISODE, "e", {EGRESS: 1000})
    call = Account(Scope.CALL, "c", {EGRESS: 700}, parent=episode)
    lease = Lease(1, call)
    assert lease.take(SENT, 600, 0) == 600
    call.close()
    assert episode.held(EGRESS) == 600, "given back now, others could take it while it is still being moved"
    other = Lease(2, Account(Scope.CALL, "d", parent=episode))
    assert other.take(SENT, 1000, 0) == 400
    other.settle(SENT, 0, 400)
    assert lease.take(SENT, 1000, 0) == 100, "its own limit holds to the end"
    assert isinstance(lease.take(SENT, 1, 0), Exceeded)
    lease.settle(SENT, 650, 50)
    assert (episode.used(EGRESS), episode.held(EGRESS), call.used(EGRESS)) == (650, 0, 650)
    episode.close()


def test_when_all_scopes_end_at_once_nothing_is_granted_any_more() -> None:
    job = Account(Scope.JOB, "j", {EGRESS: 1000})
    actor = Account(Scope.ACTOR, "a", parent=job)
    lease = Lease(1, Account(Scope.CALL, "c", {EGRESS: 700}, parent=actor))
    assert lease.take(SENT, 600, 0) == 600
    actor.close()
    assert job.held(EGRESS) == 600
    lease.settle(SENT, 600, 0)
    assert (job.used(EGRESS), job.held(EGRESS)) == (600, 0)
    alone = Account(Scope.CALL, "c", {EGRESS: 700})
    orphan = Lease(2, alone)
    alone.close()
    assert isinstance(orphan.take(SENT, 1, 0), Exceeded)


def test_without_its_mover_all_that_was_out_counts_as_used() -> None:
    call = Account(Scope.CALL, "c", {EGRESS: 1000})
    lease = Lease(1, call)
    lease.take(SENT, 300, 0)
    lease.take(RECEIVED, 200, 0)
    lease.lost()
    assert (call.used(EGRESS), call.held(EGRESS)) == (500, 0)


_STEPS = st.tuples(
    st.sampled_from(["take", "use", "return", "close"]), st.integers(0, 2), st.sampled_from(KINDS), st.integers(0, 500)
)


@given(st.lists(_STEPS, max_size=60), st.integers(0, 1000), st.integers(0, 1000))
def test_used_and_out_never_pass_a_limit(steps: list[tuple[str, int, str, int]], whole: int, own: int) -> None:
    """Whatever is taken, used, returned and closed, in whatever order: the mover may use all it has and is within."""
    episode = Account(Scope.EPISODE, "e", {EGRESS: whole})
    calls = [Account(Scope.CALL, str(n), {SENT: own}, parent=episode) for n in range(3)]
    leases = [Lease(n, call) for n, call in enumerate(calls)]
    for what, at, kind, amount in steps:
        lease = leases[at]
        if what == "take":
            taken: Any = lease.take(kind, amount, 2 * amount)
            assert isinstance(taken, Exceeded) or taken <= 2 * amount
        elif what == "close":
            calls[at].close()
        else:
            count = min(amount, lease.out[kind])
            lease.settle(kind, *((count, 0) if what == "use" else (0, count)))
        out = sum(each.out[kind] for each in leases for kind in KINDS)
        assert episode.held(EGRESS) == out
        assert episode.used(EGRESS) + out <= whole
        for call, each in zip(calls, leases, strict=True):
            assert call.used(SENT) + each.out[SENT] <= own


@pytest.mark.parametrize("kind", KINDS)
def test_settling_more_than_is_out_books_it_all(kind: str) -> None:
    call = Account(Scope.CALL, "c", {EGRESS: 1000})
    lease = Lease(1, call)
    lease.take(kind, 10, 0)
    lease.settle(kind, 25, 0)
    assert (call.used(EGRESS), call.held(EGRESS)) == (25, 0)
