"""When purses are filled, emptied and forgotten; what a process does with one is in tests/supervisor."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator

import pytest

from ray_guard.policy.bill import Bill
from ray_guard.policy.budgets import Account, Limits, Scope
from ray_guard.supervisor.purses import PURSES_LIMIT, Purse, Purses
from ray_guard.supervisor.quota import Asking

OWNER = 1


class Desk:
    """A policy actor and the episode that asks it."""

    def __init__(self, limits: Limits) -> None:
        self.due: list[Callable[[], None]] = []
        self.purses = Purses(lambda _seconds, action: self.due.append(action))
        self.job = Account(Scope.JOB, "job", limits)
        self.engine = Account(Scope.ACTOR, "engine", parent=self.job)
        self.episode = Account(Scope.EPISODE, "episode", parent=self.job)

    def give(self, number: int = 0, tokens: int = 10) -> Purse | None:
        return self.purses.give(OWNER, number, Bill([self.engine, self.episode]), Asking(), {"tokens": tokens})

    def look(self) -> None:
        due, self.due = self.due, []
        for action in due:
            action()


def left(purse: Purse) -> int:
    """What a process would find in it; it stays there."""
    tokens = purse.descriptors[1]
    found = os.eventfd_read(tokens)
    os.eventfd_write(tokens, found)
    return found


@pytest.fixture
def desk() -> Iterator[Desk]:
    made = Desk({"tokens": 10_000})
    yield made
    made.purses.leave(OWNER)


def test_it_grows_with_each_time_that_it_did_not_last_up_to_a_fourth_of_the_room(desk: Desk) -> None:
    purse = desk.give()
    assert purse is not None
    assert left(purse) == desk.job.held("tokens") == 640
    assert desk.give(purse.number) is purse
    assert left(purse) == 1280
    for _ in range(3):
        desk.give(purse.number)
    assert desk.job.held("tokens") < 10_000
    assert desk.give(purse.number, tokens=5000) is None, "there is no room for a purse of such requests"


def test_what_is_settled_is_put_in_again(desk: Desk) -> None:
    purse = desk.give()
    assert purse is not None
    os.eventfd_write(purse.descriptors[1], os.eventfd_read(purse.descriptors[1]) - 10)
    assert purse.settle({"tokens": 10}, {"tokens": 4}) is None
    assert (left(purse), desk.job.held("tokens"), desk.job.used("tokens")) == (640, 640, 4)


def test_what_lies_idle_is_emptied_and_forgotten(desk: Desk) -> None:
    purse = desk.give()
    assert purse is not None
    desk.look()
    assert desk.job.held("tokens") == 640, "it was used since the last look"
    desk.look()
    assert desk.job.held("tokens") == 0
    assert desk.purses.find(OWNER, purse.number) is None
    assert not desk.due, "nobody looks while there are none"
    # Its descriptors are somebody else's by now: a scope that ends later has no business with them.
    pipes = [os.pipe() for _ in range(3)]
    for _, write in pipes:
        os.write(write, b"12345678")
    desk.episode.close()
    assert [os.read(read, 8) for read, _ in pipes] == [b"12345678"] * 3
    for each in pipes:
        os.close(each[0])
        os.close(each[1])


def test_a_draw_that_is_not_settled_keeps_it(desk: Desk) -> None:
    purse = desk.give()
    assert purse is not None
    os.eventfd_write(purse.descriptors[1], os.eventfd_read(purse.descriptors[1]) - 10)
    desk.look()
    desk.look()
    assert desk.job.held("tokens") == 10
    assert desk.purses.find(OWNER, purse.number) is purse
    purse.settle({"tokens": 10}, {"tokens": 10})
    desk.look()
    desk.look()
    assert desk.purses.find(OWNER, purse.number) is None
    assert (desk.job.held("tokens"), desk.job.used("tokens")) == (0, 10)


def test_an_episodes_end_shuts_it(desk: Desk) -> None:
    purse = desk.give()
    assert purse is not None
    desk.episode.close()
    assert desk.job.held("tokens") == 0
    assert not purse.fill({"tokens": 10})


def test_a_process_has_few_and_a_new_place_gets_the_oldest_ones() -> None:
    desk = Desk({})
    mine = [desk.give() for _ in range(PURSES_LIMIT + 5)]
    assert all(mine)
    known = [purse for purse in mine if purse is not None and desk.purses.find(OWNER, purse.number)]
    assert known == mine[5:]
    assert len(desk.purses.leave(OWNER)) == PURSES_LIMIT


def test_without_descriptors_there_is_none_and_nothing_is_lost(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def eventfd(initial: int, flags: int, make: Callable[[int, int], int] = os.eventfd) -> int:
        if len(made) == 2:
            raise OSError(errno.EMFILE, "too many open files")
        made.append(make(initial, flags))
        return made[-1]

    monkeypatch.setattr(os, "eventfd", eventfd)
    assert desk.give() is None
    assert desk.job.held("tokens") == 0
    for descriptor in made:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
