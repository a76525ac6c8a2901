"""What a supervisor leaves of a policy actor: what its book says when it is read, whenever its writer was killed."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from ray_guard.kernel import seqpacket
from ray_guard.policy.budgets import CONNECTIONS, Account, Scope
from ray_guard.supervisor import book, inbox
from ray_guard.supervisor.book import Book

HELLO = {"kind": "program", "evidence": "/e"}


@pytest.fixture
def written() -> Iterator[Book]:
    made = Book(HELLO, "key")
    yield made
    made.close()


def opened(number: int) -> dict[str, Any]:
    return {"op": "open", "span": f"{number:016x}", "name": "x" * 1000}


def closed(number: int) -> dict[str, Any]:
    return {"op": "close", "span": f"{number:016x}"}


def test_what_still_counts_is_said(written: Book) -> None:
    said = [
        {"op": "tighten", "policy": {"a": 1}},
        {"op": "engine_state", "pid": 7, "phase": "rollout", "in_flight": None},
        {"op": "engine_state", "pid": 7, "phase": None, "in_flight": 3},
        {"op": "identify", "actor_id": "0"},
        {"op": "identify", "actor_id": "1"},
        {"op": "reserve", "tokens": 3},
        opened(1),
        opened(2),
        closed(1),
        {"op": "tighten", "policy": {"b": 2}},
    ]
    for message in said:
        written.take(message)
    estate = book.read(written.fileno())
    assert (estate.hello, estate.key) == (HELLO, "key")
    assert estate.opened == [opened(2)]
    assert estate.said == [
        said[0],
        {"op": "engine_state", "pid": 7, "phase": "rollout", "in_flight": 3},
        said[4],
        said[9],
    ]


def test_what_was_reserved_counts_as_used(written: Book) -> None:
    job = Account(Scope.JOB, "j")
    actor = Account(Scope.ACTOR, "a", {CONNECTIONS: 10, "tokens": 100}, parent=job)
    episode = Account(Scope.EPISODE, "e", {"tokens": 50}, parent=actor)
    actor.charge(CONNECTIONS, 3)
    assert episode.reserve("tokens", 20) is None
    assert episode.reserve("processes", 2) is None  # held, and given back by who is gone
    episode.bar()
    written.use(actor, {"e": episode}, 77)
    used = book.read(written.fileno()).used
    assert used == ({CONNECTIONS: 3, "tokens": 20}, {CONNECTIONS: 3, "tokens": 20}, {"e": {"tokens": 20}}, ["e"])
    again = Account(Scope.ACTOR, "a", {CONNECTIONS: 10, "tokens": 100})
    again.inherit(used.actor)
    assert (again.room(CONNECTIONS), again.room("tokens")) == (7, 80)


def test_it_is_written_anew_before_it_grows(written: Book) -> None:
    passed: list[int] = []
    written.renewed = lambda descriptor: passed.append(os.dup(descriptor))
    for number in range(5000):
        written.take(opened(number))
        written.take(closed(number))
    written.take(opened(1))
    assert passed
    assert os.fstat(written.fileno()).st_size < 2 << 20
    assert book.read(written.fileno()).opened == [opened(1)]
    for descriptor in passed:
        assert len(book.read(descriptor).opened) <= 1  # whole when it was passed on
        os.close(descriptor)


def test_half_a_line_was_not_said(written: Book) -> None:
    written.take(opened(1))
    os.write(written.fileno(), b'{"op":"close","span":"00')
    assert book.read(written.fileno()).opened == [opened(1)]


def test_what_is_no_book_is_refused(written: Book) -> None:
    os.write(written.fileno(), b"[]\n")
    with pytest.raises(ValueError, match="no book"):
        book.read(written.fileno())


@pytest.mark.parametrize(
    ("last", "journaled", "open_then", "pending"),
    [
        pytest.param(closed(1), True, [], [], id="an end that was journaled is not journaled again"),
        pytest.param(closed(1), False, [opened(1)], [closed(1)], id="an end that was not"),
        pytest.param(closed(2), False, [opened(1)], [], id="an end that was noted too"),
        pytest.param(opened(2), False, [opened(1)], [opened(2)], id="a begin"),
        pytest.param(opened(1), False, [opened(1)], [], id="a begin that was noted"),
        pytest.param({"op": "reserve"}, False, [opened(1)], [], id="a question: who asked knows"),
        pytest.param(None, False, [opened(1)], [], id="nothing"),
    ],
)
def test_the_message_it_died_over(
    written: Book, last: dict[str, Any] | None, *, journaled: bool, open_then: list[Any], pending: list[Any]
) -> None:
    written.take(opened(1))
    estate = book.read(written.fileno(), last, journaled=journaled)
    assert (estate.opened, estate.pending) == (open_then, pending)


def test_a_message_is_in_the_inbox_until_it_was_taken_in() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    box = inbox.Inbox()
    with ours, theirs:
        for name in ("a" * 500, "b"):
            seqpacket.send(ours, {"op": "open", "name": name})
        assert inbox.read(box.fileno()) is None
        box.receive(theirs, 3)
        assert inbox.read(box.fileno()) == (3, {"op": "open", "name": "a" * 500})
        box.done()
        assert inbox.read(box.fileno()) is None
        box.receive(theirs, 4)  # shorter: what is left of the one before is none of it
        assert inbox.read(box.fileno()) == (4, {"op": "open", "name": "b"})
        with pytest.raises(BlockingIOError):
            box.receive(theirs, 5)
        assert inbox.read(box.fileno()) is None
