"""A limit over several nodes: all of them together never pass it, and idle parts go where they are needed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_guard.actors.job_budget import claim
from ray_guard.policy.budgets import Account, Scope
from ray_guard.supervisor import leases
from ray_guard.supervisor.leases import Leases


class Store:
    def __init__(self) -> None:
        self.held: dict[str, str] = {}

    def put_new(self, key: str, value: str) -> bool:
        return self.held.setdefault(key, value) is value

    def delete(self, key: str) -> None:
        del self.held[key]

    def delete_all(self, prefix: str) -> None:
        self.held = {key: value for key, value in self.held.items() if not key.startswith(prefix)}

    def keys(self, prefix: str) -> Iterable[str]:
        return [key for key in self.held if key.startswith(prefix)]


class Desk:
    """Answers from `store`, when told to."""

    def __init__(self, store: Store, nodes: int = 2) -> None:
        self.nodes = nodes
        self.store = store
        self.asked: list[tuple[dict[str, Any], Callable[[dict[str, Any]], None]]] = []

    def ask(self, question: dict[str, Any], take: Callable[[dict[str, Any]], None]) -> None:
        self.asked.append((question, take))

    def answer(self, *, error: str = "") -> None:
        asked, self.asked = self.asked, []
        for question, take in asked:
            take({"error": error} if error else claim(self.store, question, self.nodes))


class Timers:
    def __init__(self) -> None:
        self.due: list[tuple[float, Callable[[], None]]] = []

    def later(self, seconds: float, callback: Callable[[], None]) -> None:
        self.due.append((seconds, callback))

    def fire(self, seconds: float) -> None:
        due, self.due = self.due, []
        self.due = [each for each in due if each[0] != seconds]
        for after, callback in due:
            if after == seconds:
                callback()


class Node:
    def __init__(self, store: Store, limits: dict[str, Any], nodes: int = 2) -> None:
        self.timers = Timers()
        self.desk = Desk(store, nodes)
        self.job = Account(Scope.JOB, "job", limits)
        self.leases = Leases(self.timers)  # type: ignore[arg-type]
        self.known = 0
        self.enter()

    def enter(self) -> None:
        self.leases.wait(self.leases.enter(self.job, "job", self.desk), self._heard)

    def _heard(self) -> None:
        self.known += 1

    def look(self) -> None:
        self.timers.fire(leases.LOOK_S)
        self.desk.answer()

    def idle(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = time.monotonic() + 2 * leases.IDLE_S
        monkeypatch.setattr(time, "monotonic", lambda: now)
        self.look()


def test_before_anybody_answers_nothing_is_granted() -> None:
    node = Node(Store(), {"tokens": 1000})
    assert node.job.room("tokens") == 0
    assert node.known == 0
    node.timers.fire(leases.PATIENCE_S)
    assert node.known == 1  # it goes on, and is refused
    exceeded = node.job.reserve("tokens", 1)
    assert exceeded is not None
    assert (exceeded.value, exceeded.limit) == (1001, 1000)
    node.desk.answer(error="no GCS")
    assert node.job.room("tokens") == 0
    node.look()
    assert node.job.room("tokens") > 0  # a later answer is one


def test_a_level_that_outgrows_its_part_is_given_more_while_there_is_any(monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node(Store(), {"memory": 1000, "wall_seconds": 5})
    node.desk.answer()
    assert not node.leases.covers(node.job, "wall_seconds"), "time passes on all nodes alike"
    call = Account(Scope.CALL, "call", parent=node.job)
    assert call.level("memory", 0, 900) is not None
    assert node.job.grow("memory")
    node.desk.answer()
    assert call.level("memory", 900, 900) is None
    assert call.level("memory", 900, 1100) is not None
    while node.job.grow("memory"):
        node.desk.answer()
    assert call.level("memory", 1100, 1100) is not None, "all of it is here, and it is more"
    assert not node.job.grow("tokens")


@pytest.mark.parametrize("error", [None, "no GCS"])
def test_who_outgrows_a_part_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch, error: str | None) -> None:
    node = Node(Store(), {"memory": 1000})
    node.desk.answer()
    Account(Scope.CALL, "call", parent=node.job).level("memory", 0, 900)
    assert node.job.grow("memory")
    if error:
        node.desk.answer(error=error)
    else:
        now = time.monotonic() + leases.PATIENCE_S
        monkeypatch.setattr(time, "monotonic", lambda: now)
    assert not node.job.grow("memory")


def test_what_was_used_before_the_limit_came_is_leased_too() -> None:
    node = Node(Store(), {})
    node.job.charge("tokens", 700)
    node.job.tighten({"tokens": 1000})
    node.enter()
    node.desk.answer()
    node.leases.wait(node.leases.lacking(node.job, {"tokens": 100}), lambda: None)
    node.desk.answer()
    assert node.job.reserve("tokens", 100) is None


def test_two_nodes_share_and_never_pass_the_limit_together() -> None:
    store = Store()
    nodes = [Node(store, {"tokens": 1000}), Node(store, {"tokens": 1000})]
    for node in nodes:
        node.desk.answer()
        assert node.known == 1
        assert 180 <= node.job.room("tokens") <= 260  # type: ignore[operator]
    for _ in range(200):
        for node in nodes:
            if node.job.reserve("tokens", 7) is None:
                node.job.settle("tokens", 7, 7)
            node.look()
    used = [node.job.used("tokens") for node in nodes]
    assert sum(used) <= 1000
    assert sum(used) >= 1000 - 2 * 7 - 2 * 8  # the last part of each may be too small for one request
    assert min(used) > 300


def test_what_one_request_needs_is_fetched_at_once() -> None:
    node = Node(Store(), {"tokens": 1000})
    node.desk.answer()
    lacking = node.leases.lacking(node.job, {"tokens": 900, "flops": 1})
    assert len(lacking) == 1
    heard: list[int] = []
    node.leases.wait(lacking, lambda: heard.append(1))
    node.leases.wait(node.leases.lacking(node.job, {"tokens": 50}), lambda: heard.append(2))
    assert heard == [2]  # that much is here
    node.desk.answer()
    assert heard == [2, 1]
    assert node.job.reserve("tokens", 900) is None
    node.timers.fire(leases.PATIENCE_S)
    assert heard == [2, 1]


def test_who_waits_for_a_question_that_was_asked_before_is_asked_for_as_well() -> None:
    node = Node(Store(), {"tokens": 1000}, nodes=50)
    heard: list[int] = []
    node.leases.wait(node.leases.lacking(node.job, {"tokens": 600}), lambda: heard.append(1))
    node.desk.answer()
    assert heard == []
    node.desk.answer()
    assert heard == [1]
    assert node.job.reserve("tokens", 600) is None


def test_what_lies_idle_goes_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    idle = Node(store, {"tokens": 1000}, nodes=1)
    idle.desk.answer()
    held = idle.job.room("tokens")
    idle.desk.nodes = 2
    busy = Node(store, {"tokens": 1000})
    busy.desk.answer()
    idle.idle(monkeypatch)
    assert idle.job.room("tokens") <= held / 2 + 8  # type: ignore[operator]
    lacking = busy.leases.lacking(busy.job, {"tokens": 700})
    busy.leases.wait(lacking, lambda: None)
    busy.desk.answer()
    assert busy.job.reserve("tokens", 700) is None


def test_at_the_end_all_that_was_not_used_is_given_back() -> None:
    store = Store()
    node = Node(store, {"tokens": 1000, "gpu_seconds": 36.0})
    node.desk.answer()
    node.job.charge("tokens", 20)
    node.leases.leave(node.job)
    node.desk.answer()
    assert len(store.held) == 3  # parts of 7 or 8 tokens
    assert node.job.reserve("tokens", 8) is not None
    node.look()
    assert len(store.held) == 3
    node.enter()
    other = Desk(store)
    node.leases.lose(node.desk)
    node.desk = other
    node.enter()
    node.desk.answer()
    assert node.job.reserve("tokens", 8) is None


def test_the_job_is_warned_of_by_what_all_nodes_have_claimed() -> None:
    store = Store()
    first, second = Node(store, {"tokens": 100}, nodes=1), Node(store, {"tokens": 100}, nodes=1)
    told: list[float] = []
    second.job.near = lambda near: told.append(near.value)
    first.desk.answer()
    second.desk.answer()
    second.job.charge("tokens", 20)
    assert told == []
    second.job.charge("tokens", 5)
    second.look()
    second.job.charge("tokens", 5)
    assert told == [80]


def test_a_limit_of_nothing_needs_no_lease() -> None:
    node = Node(Store(), {"connections": 0})
    assert (node.desk.asked, node.known) == ([], 1)
    assert node.job.reserve("connections", 1) is not None


@given(st.data(), st.sampled_from([3, 50, 1000, 1e18]))
@settings(deadline=None, max_examples=60)
def test_the_sum_over_nodes_never_passes_the_limit(data: st.DataObject, limit: float) -> None:
    store = Store()
    kind = "flops" if isinstance(limit, float) else "tokens"
    nodes = [Node(store, {kind: limit}, nodes=3) for _ in range(3)]
    for _ in range(data.draw(st.integers(1, 30))):
        node = data.draw(st.sampled_from(nodes))
        action = data.draw(st.sampled_from(["spend", "look", "answer", "leave", "enter", "fetch"]))
        amount = data.draw(st.integers(0, 10)) * limit // 10
        if action == "spend" and node.job.reserve(kind, amount) is None:
            node.job.settle(kind, amount, amount)
        elif action == "look":
            node.look()
        elif action == "answer":
            node.desk.answer()
        elif action == "leave":
            node.leases.leave(node.job)
        elif action == "enter":
            node.enter()
        elif action == "fetch":
            node.leases.wait(node.leases.lacking(node.job, {kind: amount}), lambda: None)
        assert sum(each.job.used(kind) for each in nodes) <= limit * (1 + 1e-12)
