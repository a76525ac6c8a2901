"""The budget tree: reserve, settle, and what can never happen."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ray_guard.errors import PolicyError
from ray_guard.policy.budgets import (
    UNLIMITED,
    Account,
    Exceeded,
    Limits,
    Near,
    Scope,
    limits_from_wire,
    tightest,
)

SENT, RECEIVED, TOTAL = "egress_sent_bytes", "egress_received_bytes", "egress_bytes"


def tree(**limits: Limits) -> tuple[Account, Account, Account, Account]:
    job = Account(Scope.JOB, "job", limits.get("job", {}))
    actor = Account(Scope.ACTOR, "actor", limits.get("actor", {}), parent=job)
    episode = Account(Scope.EPISODE, "episode", limits.get("episode", {}), parent=actor)
    call = Account(Scope.CALL, "call", limits.get("call", {}), parent=episode)
    return job, actor, episode, call


def test_reserve_and_settle_count_in_every_scope() -> None:
    job, actor, episode, call = tree(job={"connections": 10}, call={"connections": 3})
    assert call.reserve("connections", 2) is None
    assert [node.held("connections") for node in (job, actor, episode, call)] == [2, 2, 2, 2]
    assert (call.room("connections"), job.room("connections")) == (1, 8)
    assert call.settle("connections", 2, 1) is None
    assert [node.used("connections") for node in (job, actor, episode, call)] == [1, 1, 1, 1]
    assert job.held("connections") == 0
    assert (call.room("connections"), job.room("connections")) == (2, 9)


@pytest.mark.parametrize("scope", ["job", "actor", "episode", "call"])
def test_every_scope_can_refuse_and_then_nothing_is_reserved(scope: str) -> None:
    nodes = tree(**{scope: {SENT: 10}})
    call = nodes[-1]
    assert call.reserve(SENT, 8) is None
    assert call.reserve(SENT, 3) == Exceeded(SENT, 11, 10, Scope(scope), scope)
    assert [node.held(SENT) for node in nodes] == [8, 8, 8, 8]
    assert call.reserve(SENT, 2) is None


def test_several_kinds_are_reserved_together_or_not_at_all() -> None:
    call = tree(call={"connections": 5}, job={SENT: 10})[-1]
    exceeded = call.reserve_all({"connections": 1, SENT: 11})
    assert exceeded is not None
    assert (exceeded.kind, exceeded.scope) == (SENT, Scope.JOB)
    assert (call.held("connections"), call.held(SENT)) == (0, 0)
    assert call.reserve_all({"connections": 1, SENT: 10}) is None
    assert (call.held("connections"), call.held(SENT)) == (1, 10)


def test_bytes_count_by_direction_and_together() -> None:
    call = tree(call={TOTAL: 100, SENT: 60})[-1]
    assert call.reserve(SENT, 60) is None
    assert call.reserve(SENT, 1) == Exceeded(SENT, 61, 60, Scope.CALL, "call")
    assert call.reserve(RECEIVED, 41) == Exceeded(TOTAL, 101, 100, Scope.CALL, "call")
    assert call.reserve(RECEIVED, 40) is None
    call.settle(SENT, 60, 50)
    call.settle(RECEIVED, 40, 40)
    assert (call.used(SENT), call.used(RECEIVED), call.used(TOTAL)) == (50, 40, 90)
    assert (call.room(SENT), call.room(RECEIVED), call.room(TOTAL)) == (10, UNLIMITED, 10)
    assert call.reserve_all({SENT: 6, RECEIVED: 6}) == Exceeded(TOTAL, 102, 100, Scope.CALL, "call")


def test_zero_grants_nothing_and_absent_is_unlimited() -> None:
    call = tree(call={"connections": 0})[-1]
    assert call.limit("connections") == 0
    assert call.room("connections") == 0
    assert call.reserve("connections", 1) == Exceeded("connections", 1, 0, Scope.CALL, "call")
    assert call.limit(SENT) is UNLIMITED
    assert call.room(SENT) is UNLIMITED
    assert call.reserve(SENT, 1 << 50) is None
    assert not isinstance(UNLIMITED, int | float)


def test_what_happened_is_booked_even_beyond_the_limit() -> None:
    """Bytes on the direct path are counted afterwards: the overshoot must show, and be answered."""
    job, *_, call = tree(job={TOTAL: 100})
    assert call.charge(SENT, 90) is None
    assert call.charge(SENT, 20) == Exceeded(TOTAL, 110, 100, Scope.JOB, "job")
    assert (job.used(TOTAL), job.room(TOTAL)) == (110, 0)
    assert call.exhausted([TOTAL]) == Exceeded(TOTAL, 111, 100, Scope.JOB, "job")


def test_release_gives_back() -> None:
    call = tree(call={"connections": 1})[-1]
    assert call.reserve("connections", 1) is None
    call.release("connections", 1)
    assert (call.held("connections"), call.used("connections")) == (0, 0)
    assert call.reserve("connections", 1) is None


def test_a_reporting_limit_is_told_and_not_refused() -> None:
    job = Account(Scope.JOB, "job", {"connections": 5}, watched={"connections": 1})
    assert job.reserve("connections", 1) is None
    assert job.reserve("connections", 1) == Exceeded("connections", 2, 1, Scope.JOB, "job", report_only=True)
    assert job.held("connections") == 2
    refused = job.reserve("connections", 4)
    assert refused == Exceeded("connections", 6, 5, Scope.JOB, "job")
    assert job.held("connections") == 2


def test_an_enforced_limit_further_out_comes_before_a_reporting_one() -> None:
    job = Account(Scope.JOB, "job", {"connections": 1})
    call = Account(Scope.CALL, "call", watched={"connections": 0}, parent=job)
    told = call.reserve("connections", 1)
    assert told is not None
    assert told.report_only
    assert call.reserve("connections", 1) == Exceeded("connections", 2, 1, Scope.JOB, "job")


def test_levels_are_judged_in_their_own_scope() -> None:
    job, _, _, call = tree(call={"wall_seconds": 120, "memory": 1 << 31})
    assert call.measured("wall_seconds", 120) is None
    assert call.measured("wall_seconds", 120.5) == Exceeded("wall_seconds", 120.5, 120, Scope.CALL, "call")
    assert call.measured("wall_seconds", math.nan) is not None  # no reading is not a low reading
    assert job.measured("wall_seconds", 1e9) is None
    assert call.used("wall_seconds") == 0


def test_what_other_nodes_may_use_is_taken_here() -> None:
    job = Account(Scope.JOB, "job", {TOTAL: 100})
    told: list[Near] = []
    job.near = told.append
    job.spread(TOTAL, elsewhere=100, others=0)
    assert job.reserve(SENT, 1) == Exceeded(TOTAL, 101, 100, Scope.JOB, "job")
    job.spread(TOTAL, elsewhere=50, others=0)
    assert job.room(TOTAL) == 50
    assert job.reserve(SENT, 50) is None
    job.settle(SENT, 50, 30)
    assert told == []
    job.spread(TOTAL, elsewhere=70, others=50)
    assert (job.room(TOTAL), job.used(TOTAL)) == (0, 30)
    assert [near.value for near in told] == [80]


def test_refused_attempts_are_counted_apart() -> None:
    job, *_, call = tree(call={"connections": 0})
    call.count_refused()
    call.count_refused()
    assert (call.refused, job.refused, call.used("connections")) == (2, 2, 0)


def test_the_end_of_a_scope_gives_back_what_it_and_those_within_it_held() -> None:
    job, actor, episode, call = tree(job={SENT: 10})
    assert call.reserve(SENT, 6) is None
    assert actor.reserve(SENT, 3) is None
    episode.close()
    assert episode.closed
    assert call.closed
    assert (job.held(SENT), actor.held(SENT)) == (3, 3)
    # a flow that ends late still counts, and its reservation is not given back twice
    call.settle(SENT, 6, 4)
    assert (job.used(SENT), job.held(SENT)) == (4, 3)
    with pytest.raises(ValueError, match="call call is closed"):
        call.reserve(SENT, 1)
    with pytest.raises(ValueError, match="episode episode is closed"):
        Account(Scope.CALL, "late", parent=episode)
    episode.close()
    assert job.held(SENT) == 3


@pytest.mark.parametrize("amount", [-1, math.nan, math.inf, True])
def test_impossible_amounts_are_refused(amount: float) -> None:
    call = tree()[-1]
    with pytest.raises(ValueError, match="not negative"):
        call.reserve(SENT, amount)
    with pytest.raises(ValueError, match="not negative"):
        call.charge(SENT, amount)


def test_a_kind_that_does_not_exist_is_not_unlimited() -> None:
    call = tree()[-1]
    for use in (call.room, call.used, call.held, call.limit):
        with pytest.raises(ValueError, match="unknown kind"):
            use("egres_bytes")
    with pytest.raises(ValueError, match="unknown kind"):
        call.reserve("egres_bytes", 1)
    with pytest.raises(ValueError, match="unknown kind"):
        Account(Scope.CALL, "call", {"egres_bytes": 1})
    with pytest.raises(ValueError, match="sum of"):
        call.reserve(TOTAL, 1)


def test_more_given_back_than_reserved_is_a_bug_and_says_so() -> None:
    call = tree()[-1]
    assert call.reserve(SENT, 5) is None
    with pytest.raises(ValueError, match="given back"):
        call.settle(SENT, 6, 0)


def test_exceeded_becomes_the_public_error() -> None:
    error = Exceeded(TOTAL, 11, 10, Scope.CALL, "c7").error()
    assert (error.kind, error.value, error.limit, error.scope, error.source) == (TOTAL, 11, 10, "call", "c7")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_the_tightest_of_several() -> None:
    assert tightest({"connections": 5, TOTAL: 1}, {"connections": 3}, {}) == {"connections": 3, TOTAL: 1}
    assert tightest({"connections": 0}, {"connections": 3}) == {"connections": 0}
    assert tightest() == {}


def test_limits_of_a_message() -> None:
    assert limits_from_wire(Scope.CALL, {TOTAL: 5, "cpu_seconds": 1.5}) == {TOTAL: 5, "cpu_seconds": 1.5}
    faulty: list[object] = [[], {"x": 1}, {TOTAL: "5"}, {TOTAL: None}, {1: 1}, {"flops": math.inf}]
    for bad in faulty:
        with pytest.raises(PolicyError):
            limits_from_wire(Scope.CALL, bad)


class AnyOrder(RuleBasedStateMachine):
    """Whatever is reserved, settled, released, opened and closed, in whatever order: no limit is ever passed, every
    scope holds what those within it hold, and nothing is lost or counted twice."""

    def __init__(self) -> None:
        super().__init__()
        self.job = Account(Scope.JOB, "job", {TOTAL: 100, "connections": 7})
        self.actors = [Account(Scope.ACTOR, f"actor{n}", {SENT: 60, TOTAL: 80}, parent=self.job) for n in range(2)]
        self.calls: list[Account] = []
        self.open: list[tuple[Account, str, int]] = []
        self.settled = {SENT: 0, RECEIVED: 0, "connections": 0}

    @rule(actor=st.integers(0, 1), limit=st.integers(0, 50))
    def open_call(self, actor: int, limit: int) -> None:
        self.calls.append(Account(Scope.CALL, "call", {TOTAL: limit}, parent=self.actors[actor]))

    @rule(data=st.data(), kind=st.sampled_from([SENT, RECEIVED, "connections"]), amount=st.integers(0, 60))
    def reserve(self, data: Any, kind: str, amount: int) -> None:
        account = data.draw(st.sampled_from([self.job, *self.actors, *self.calls]))
        if account.closed:
            return
        room = account.room(kind)
        total = account.room(TOTAL) if kind != "connections" else UNLIMITED
        fits = (room is UNLIMITED or amount <= room) and (total is UNLIMITED or amount <= total)
        exceeded = account.reserve(kind, amount)
        assert (exceeded is None) == fits
        if exceeded is None:
            self.open.append((account, kind, amount))

    @rule(data=st.data())
    def settle(self, data: Any) -> None:
        if self.open:
            account, kind, amount = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
            if not account.closed:  # what settles after the end is late usage, and may pass a limit: tested above
                actual = data.draw(st.integers(0, amount))
                assert account.settle(kind, amount, actual) is None
                self.settled[kind] += actual

    @rule(data=st.data())
    def close(self, data: Any) -> None:
        if self.calls:
            data.draw(st.sampled_from(self.calls)).close()

    @invariant()
    def no_limit_is_passed(self) -> None:
        for account in (self.job, *self.actors, *self.calls):
            for kind in (TOTAL, SENT, "connections"):
                limit = account.limit(kind)
                assert limit is UNLIMITED or account.used(kind) + account.held(kind) <= limit

    @invariant()
    def nothing_is_lost(self) -> None:
        for kind, amount in self.settled.items():
            assert self.job.used(kind) == amount
            held = sum(each for account, k, each in self.open if k == kind and not account.closed)
            assert self.job.held(kind) == held
        assert self.job.used(TOTAL) == self.job.used(SENT) + self.job.used(RECEIVED)


TestAnyOrder = AnyOrder.TestCase


@given(st.lists(st.floats(0, 1e6), max_size=30))
def test_seconds_do_not_drift_below_zero(amounts: list[float]) -> None:
    job, *_, call = tree()
    for amount in amounts:
        assert call.reserve("gpu_seconds", amount) is None
    for amount in reversed(amounts):
        call.settle("gpu_seconds", min(amount, call.held("gpu_seconds")), amount)
    assert call.held("gpu_seconds") >= 0
    assert job.held("gpu_seconds") >= 0
    assert job.used("gpu_seconds") == pytest.approx(sum(amounts))


def test_a_level_is_held_in_every_scope_and_replaced() -> None:
    actor = Account(Scope.ACTOR, "a", {"memory": 100})
    one, two = (Account(Scope.CALL, name, {"memory": 80}, parent=actor) for name in "ab")
    assert one.level("memory", 0, 70) is None
    exceeded = two.level("memory", 0, 60)
    assert exceeded is not None
    assert (exceeded.scope, exceeded.value, exceeded.limit) == (Scope.ACTOR, 130, 100)
    assert actor.held("memory") == 130, "it is there, whether there is room or not"
    assert two.level("memory", 60, 30) is None
    exceeded = one.level("memory", 70, 90)
    assert exceeded is not None
    assert exceeded.scope is Scope.CALL
    assert one.level("memory", 90, 0) is None
    assert (actor.held("memory"), one.held("memory"), two.held("memory")) == (30, 0, 30)


def test_a_retained_scope_is_charged_until_it_is_let_go() -> None:
    episode = Account(Scope.EPISODE, "e", {"cpu_seconds": 5})
    call = Account(Scope.CALL, "c", {"processes": 3}, parent=episode)
    call.retain()
    call.retain()
    call.close()
    episode.close()
    assert not call.closed
    assert call.reserve("processes", 1) is None
    call.let_go()
    assert not call.closed
    exceeded = call.charge("cpu_seconds", 6)
    assert exceeded is not None
    assert exceeded.scope is Scope.EPISODE
    call.let_go()
    assert call.closed
    assert episode.held("processes") == 0


def test_letting_go_does_not_end_a_scope() -> None:
    call = Account(Scope.CALL, "c")
    call.retain()
    call.let_go()
    assert not call.closed
    call.close()
    assert call.closed


def test_each_scope_warns_once_of_each_kind_at_eighty_percent() -> None:
    job, _actor, episode, call = tree(job={SENT: 100, TOTAL: 1000}, episode={SENT: 10}, call={"processes": 5})
    told: list[tuple[str, float, str]] = []
    for node in (job, episode, call):
        node.near = lambda near: told.append((near.kind, near.value, near.source))
    call.reserve(SENT, 8)
    assert told == []  # what is only reserved may never be used
    call.settle(SENT, 8, 7)
    assert told == []
    call.charge(SENT, 1)
    call.charge(SENT, 1)
    assert told == [(SENT, 8, "episode")]
    call.charge(SENT, 71)
    assert told[1:] == [(SENT, 80, "job")]
    assert call.calm("processes") == 3
    call.level("processes", 0, 4)
    call.level("processes", 4, 1)
    call.level("processes", 1, 5)
    assert told[2:] == [("processes", 4, "call")]
    assert call.calm("processes") == 0


def test_a_level_that_is_measured_and_a_watched_limit_are_warned_of_too() -> None:
    account = Account(Scope.CALL, "call", {"wall_seconds": 10.0}, watched={"tokens": 10})
    told: list[Near] = []
    account.near = told.append
    assert account.measured("wall_seconds", 7.9) is account.measured("wall_seconds", 8.0) is None
    account.charge("tokens", 9)
    assert [(near.kind, near.value, near.limit) for near in told] == [("wall_seconds", 8.0, 10.0), ("tokens", 9, 10)]
    assert told[1].text() == "call call: tokens is at 9 of 10"


def test_a_limit_of_nothing_is_not_warned_of() -> None:
    account = Account(Scope.CALL, "call", {"connections": 0})
    account.near = lambda near: pytest.fail(near.text())
    assert account.charge("connections", 0) is None
