"""Parts of a limit: whoever asks when, each is one holder's."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import pytest

from ray_guard.actors.job_budget import began, claim, forget


class Memory:
    """A store as the GCS's is: a new key is written for one."""

    def __init__(self) -> None:
        self.held: dict[str, str] = {}
        self._lock = threading.Lock()
        self.fails_after = 10**6

    def put_new(self, key: str, value: str) -> bool:
        self.fails_after -= 1
        if self.fails_after < 0:
            raise TimeoutError("the GCS does not answer")
        with self._lock:
            return self.held.setdefault(key, value) is value

    def delete(self, key: str) -> None:
        self.held.pop(key, None)

    def delete_all(self, prefix: str) -> None:
        self.held = {key: value for key, value in self.held.items() if not key.startswith(prefix)}

    def keys(self, prefix: str) -> Iterable[str]:
        return [key for key in self.held if key.startswith(prefix)]


def ask(store: Memory, holder: str, least: int = 1, nodes: int = 1, **more: Any) -> dict[str, Any]:
    return claim(store, {"name": "job/tokens", "holder": holder, "parts": 16, "least": least, **more}, nodes)


def test_one_takes_its_share_of_half_of_what_is_free_and_more_only_where_it_is_needed() -> None:
    store = Memory()
    assert len(ask(store, "a")["claimed"]) == 8
    assert len(ask(store, "b", nodes=4)["claimed"]) == 1
    last = ask(store, "b", least=20)
    assert (len(last["claimed"]), last["free"]) == (7, 0)
    assert ask(store, "a") == {"claimed": [], "free": 0}


def test_what_is_given_back_is_free_and_nothing_is_claimed_with_it() -> None:
    store = Memory()
    mine = ask(store, "a", least=16)["claimed"]
    assert ask(store, "a", least=0, give=mine[:3]) == {"claimed": [], "free": 3}
    assert sorted(ask(store, "b", least=3)["claimed"]) == sorted(mine[:3])


def test_a_job_began_when_the_first_node_saw_it() -> None:
    store = Memory()
    assert began(store, {"name": "job", "at": 1000.5}) == {"began": 1000.5}
    assert began(store, {"name": "job", "at": 1200.0}) == {"began": 1000.5}
    assert began(store, {"name": "job", "at": 900.0}) == {"began": 900.0}
    assert began(store, {"name": "another", "at": 1200.0}) == {"began": 1200.0}
    assert len(store.held) == 3


def test_limits_are_apart() -> None:
    store = Memory()
    ask(store, "a", least=16)
    assert len(claim(store, {"name": "job/flops", "holder": "a", "parts": 4, "least": 4}, 1)["claimed"]) == 4


def test_a_part_is_one_holders_whoever_asks_at_once() -> None:
    store = Memory()
    found: list[int] = []

    def take(holder: str) -> None:
        for _ in range(16):
            found.extend(ask(store, holder, nodes=100)["claimed"])

    threads = [threading.Thread(target=take, args=(str(number),)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(16))


def test_what_was_claimed_before_the_store_failed_is_told() -> None:
    store = Memory()
    store.fails_after = 2
    assert len(ask(store, "a", least=5)["claimed"]) == 2
    with pytest.raises(TimeoutError):
        ask(store, "a")


@pytest.mark.parametrize("parts", [0, -1, 1 << 20])
def test_a_limit_has_a_sane_number_of_parts(parts: int) -> None:
    with pytest.raises(ValueError, match="parts"):
        ask(Memory(), "a", parts=parts)


def test_a_limit_that_is_over_leaves_nothing_behind() -> None:
    store = Memory()
    ask(store, "a", least=16)
    claim(store, {"name": "job/tokens2", "holder": "a", "parts": 1, "least": 1}, 1)
    assert forget(store, {"name": "job/tokens"}) == {}
    assert list(store.held) == ["share/job/tokens2/0"]
