"""The supervisor's loop: who is called back, when, and who is not."""

from __future__ import annotations

import os
import select

from ray_guard.supervisor.loop import Loop


def test_an_event_of_a_closed_descriptor_is_not_its_successors() -> None:
    """Both are ready in one round; the first called closes the other, and a third descriptor gets its number."""
    loop = Loop()
    pipes = [os.pipe() for _ in range(2)]
    told: list[str] = []
    third: list[int] = []

    def close_the_other(mine: int, other: int) -> None:
        loop.forget(mine)
        loop.forget(other)
        os.close(other)
        read, write = os.pipe()
        third.extend([read, write])
        assert other in third
        loop.watch(other, select.EPOLLIN if other == read else select.EPOLLERR, lambda events: told.append(str(events)))
        loop.later(0.02, loop.stop)

    for (mine, _), (other, _) in (pipes, pipes[::-1]):
        loop.watch(mine, select.EPOLLIN, lambda _events, mine=mine, other=other: close_the_other(mine, other))
    for _, write in pipes:
        os.write(write, b"x")
    loop.run()
    assert told == []


def test_a_descriptor_is_heard_of_in_the_round_after_it_was_watched() -> None:
    loop = Loop()
    read, write = os.pipe()
    os.write(write, b"x")
    told: list[int] = []

    def stop(events: int) -> None:
        told.append(events)
        loop.stop()

    loop.later(0.0, lambda: loop.watch(read, select.EPOLLIN, stop))
    loop.run()
    assert told == [select.EPOLLIN]


def test_a_failing_callback_is_logged_and_the_loop_goes_on(caplog) -> None:  # type: ignore[no-untyped-def]
    loop = Loop()

    def fail() -> None:
        raise ValueError("a fault")

    loop.later(0.0, fail)
    loop.later(0.01, loop.stop)
    loop.run()
    assert "a fault" in caplog.text
