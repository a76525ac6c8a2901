"""What several paths of the budget tree pay together."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_guard.policy.bill import Bill
from ray_guard.policy.budgets import Account, Exceeded, Limits, Scope


class Tree:
    """A policy actor, and an env actor whose episode's call asks it; one job."""

    def __init__(self, **limits: Limits) -> None:
        def account(scope: Scope, name: str, parent: Account | None) -> Account:
            return Account(scope, name, limits.get(name, {}), parent=parent)

        self.job = account(Scope.JOB, "job", None)
        self.engine = account(Scope.ACTOR, "engine", self.job)
        self.env = account(Scope.ACTOR, "env", self.job)
        self.episode = account(Scope.EPISODE, "episode", self.env)
        self.call = account(Scope.CALL, "call", self.episode)

    @property
    def all(self) -> tuple[Account, ...]:
        return self.job, self.engine, self.env, self.episode, self.call

    def bill(self) -> Bill:
        return Bill([self.engine, self.call])

    def held(self) -> list[Any]:
        return [node.held("tokens") for node in self.all]

    def used(self) -> list[Any]:
        return [node.used("tokens") for node in self.all]


def test_both_paths_pay_and_the_job_once() -> None:
    tree = Tree()
    bill = tree.bill()
    assert bill.reserve({"tokens": 100}) is None
    assert tree.held() == [100] * 5
    assert bill.settle({"tokens": 60}) is None
    assert (tree.held(), tree.used()) == ([0] * 5, [60] * 5)


@pytest.mark.parametrize("scope", ["job", "engine", "env", "episode", "call"])
def test_every_scope_of_both_paths_can_refuse_and_then_nothing_is_held(scope: str) -> None:
    tree = Tree(**{scope: {"tokens": 150}})
    assert tree.bill().reserve({"tokens": 100}) is None
    exceeded = tree.bill().reserve({"tokens": 51})
    assert exceeded is not None
    assert (exceeded.kind, exceeded.value, exceeded.limit, exceeded.source) == ("tokens", 151, 150, scope)
    assert tree.held() == [100] * 5
    assert tree.bill().reserve({"tokens": 50}) is None


def test_kinds_are_reserved_together_or_not_at_all() -> None:
    tree = Tree(engine={"flops": 1e9}, call={"tokens": 100})
    exceeded = tree.bill().reserve({"tokens": 10, "flops": 2e9})
    assert exceeded is not None
    assert exceeded.kind == "flops"
    assert tree.held() == [0] * 5


def test_a_scope_that_ends_gives_back_its_part_and_the_others_go_on() -> None:
    tree = Tree()
    bill, other = tree.bill(), tree.bill()
    assert bill.reserve({"tokens": 100}) is other.reserve({"tokens": 7}) is None
    tree.call.reserve("connections", 1)
    tree.episode.close()
    assert tree.held() == [107, 107, 107, 0, 0]
    assert tree.job.held("connections") == 0
    bill.settle({"tokens": 60})
    assert tree.held() == [7, 7, 7, 0, 0]
    assert tree.used() == [60] * 5
    tree.engine.close()
    other.release()
    assert (tree.held(), tree.used()) == ([0] * 5, [60] * 5)


def test_what_was_used_beyond_the_reservation_is_booked_and_told() -> None:
    tree = Tree(episode={"tokens": 100})
    bill = tree.bill()
    bill.reserve({"tokens": 100})
    assert bill.settle({"tokens": 130}) == Exceeded("tokens", 130, 100, Scope.EPISODE, "episode")
    assert tree.used() == [130] * 5
    assert tree.bill().reserve({"tokens": 0}) is not None


def test_a_watched_limit_is_told_and_granted() -> None:
    job = Account(Scope.JOB, "job", watched={"tokens": 10})
    bill = Bill([Account(Scope.ACTOR, "actor", parent=job)])
    exceeded = bill.reserve({"tokens": 11})
    assert exceeded is not None
    assert exceeded.report_only
    assert job.held("tokens") == 11


def test_a_closed_scope_pays_nothing_new() -> None:
    tree = Tree()
    tree.call.close()
    with pytest.raises(ValueError, match="call call is closed"):
        tree.bill()


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=20), st.integers(0, 20))
def test_used_and_held_never_pass_a_limit_whatever_order_things_end_in(
    requests: list[tuple[int, int]], ends: int
) -> None:
    tree = Tree(job={"tokens": 300}, engine={"tokens": 200}, episode={"tokens": 100})
    bills = []
    spent = 0
    for number, (most, really) in enumerate(requests):
        if number == ends:
            tree.episode.close()
        bill = Bill([tree.engine] if tree.call.closed else [tree.engine, tree.call])
        if bill.reserve({"tokens": most}) is None:
            bills.append((bill, min(most, really)))
        for node, limit in ((tree.job, 300), (tree.engine, 200), (tree.episode, 100)):
            assert node.used("tokens") + node.held("tokens") <= limit
    for bill, really in reversed(bills):
        bill.settle({"tokens": really})
        spent += really
    assert tree.job.used("tokens") == tree.engine.used("tokens") == spent
    assert tree.held() == [0] * 5


def test_a_bill_for_many_requests_grows_shrinks_and_is_settled_in_parts() -> None:
    tree = Tree(engine={"tokens": 150}, call={"tokens": 400})
    bill = tree.bill()
    assert bill.room("tokens") == 150
    assert bill.grow({"tokens": 100})
    assert tree.held() == [100] * 5
    assert not bill.grow({"tokens": 51})
    assert bill.room("tokens") == 50
    bill.shrink({"tokens": 20})
    assert (tree.held(), bill.reserved) == ([80] * 5, {"tokens": 80})
    assert bill.settle_part({"tokens": 30}, {"tokens": 12}) is None
    assert (tree.held(), tree.used()) == ([50] * 5, [12] * 5)
    bill.shrink({"tokens": 1000})  # no more than is held
    assert tree.held() == [0] * 5
    exceeded = bill.settle_part({}, {"tokens": 139})
    assert exceeded is not None
    assert (exceeded.value, exceeded.source) == (151, "engine")


def test_what_grows_after_a_scope_has_ended_holds_nothing_there() -> None:
    tree = Tree()
    bill = tree.bill()
    assert bill.grow({"tokens": 100})
    tree.call.close()
    assert bill.grow({"tokens": 10})
    assert tree.held() == [110, 110, 110, 110, 0]
    bill.settle_part({"tokens": 110}, {"tokens": 50})
    assert (tree.held(), tree.used()) == ([0] * 5, [50] * 5)


def test_a_limit_that_is_only_watched_is_no_room_either() -> None:
    job = Account(Scope.JOB, "job", watched={"tokens": 10})
    bill = Bill([job])
    assert bill.room("tokens") == 10
    assert not bill.grow({"tokens": 11})
    assert bill.lacks({"tokens": 11})
