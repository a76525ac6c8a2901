"""How long what was told holds: the longer of its time to live and the call."""

from __future__ import annotations

from ray_guard.egress.resolver.told import LEAST_S, LOOKUP_BYTES, LOOKUPS, TOLD_LIMIT, Told


def nobody(_call: str) -> bool:
    return False


def test_the_latest_name_of_an_address_comes_first() -> None:
    told = Told()
    told.tell("a", ["192.0.2.1", "192.0.2.2"], now=0, ttl=60, call=None)
    told.tell("b", ["192.0.2.1"], now=1, ttl=60, call=None)
    assert told.names() == {"192.0.2.1": ("b", "a"), "192.0.2.2": ("a",)}
    told.tell("a", ["192.0.2.1"], now=2, ttl=60, call=None)
    assert told.names()["192.0.2.1"] == ("a", "b")


def test_it_holds_as_long_as_it_lives() -> None:
    told = Told()
    told.tell("a", ["192.0.2.1"], now=100, ttl=60, call=None)
    version = told.version
    told.expire(159.9, nobody)
    assert told.names()
    assert told.version == version
    told.expire(160, nobody)
    assert not told.names()
    assert told.version != version


def test_and_long_enough_to_be_used_if_it_does_not_live_at_all() -> None:
    told = Told()
    told.tell("a", ["192.0.2.1"], now=100, ttl=0, call=None)
    told.expire(100 + LEAST_S - 0.1, nobody)
    assert told.names()
    told.expire(100 + LEAST_S, nobody)
    assert not told.names()


def test_an_answer_that_is_repeated_lives_longer_never_shorter() -> None:
    told = Told()
    told.tell("a", ["192.0.2.1"], now=0, ttl=100, call=None)
    told.tell("a", ["192.0.2.1"], now=1, ttl=40, call=None)
    told.expire(60, nobody)
    assert told.names()
    told.tell("a", ["192.0.2.1"], now=60, ttl=100, call=None)
    told.expire(150, nobody)
    assert told.names()
    told.expire(160, nobody)
    assert not told.names()


def test_a_call_keeps_what_it_was_told() -> None:
    told = Told()
    told.tell("a", ["192.0.2.1"], now=0, ttl=40, call="c1")
    told.tell("b", ["192.0.2.2"], now=0, ttl=40, call="c2")
    told.expire(50, "c1".__eq__)
    assert told.names() == {"192.0.2.1": ("a",)}
    told.expire(52, nobody)
    assert not told.names()


def test_the_memory_is_bounded() -> None:
    told = Told()
    for i in range(TOLD_LIMIT + 10):
        told.tell(f"n{i}", ["192.0.2.1"], now=0, ttl=60, call=None)
    (names,) = told.names().values()
    assert (len(names), names[0], names[-1]) == (TOLD_LIMIT, f"n{TOLD_LIMIT + 9}", "n10")


def test_questions_are_counted() -> None:
    told = Told()
    assert all(told.spend(10, 0) for _ in range(LOOKUPS))
    assert not told.spend(10, 1e9)
    told.give_back(10)
    assert told.spend(10, 1)
    assert not told.spend(10, 1)


def test_and_the_bytes_of_their_names() -> None:
    told = Told()
    assert told.spend(LOOKUP_BYTES - 5, 0)
    assert not told.spend(6, 0)
    assert told.spend(5, 0)


def test_an_actor_may_ask_anew_every_hour() -> None:
    told = Told(lasting=True)
    told.said.add(("a", None))
    assert all(told.spend(10, 1000) for _ in range(LOOKUPS))
    assert not told.spend(10, 1000 + 3599)
    assert told.spend(10, 1000 + 3600)
    assert not told.said
