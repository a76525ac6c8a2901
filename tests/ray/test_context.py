"""Where the caller is travels with its calls, and what it does there is journaled under its episode."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import ray

from ray_guard import context, episode, guard, tool, tool_call

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


def place() -> str | None:
    return context()["span"]


@guard(allow=[])
@ray.remote(num_cpus=0, max_concurrency=4)
class Callee:
    def sync(self) -> str | None:
        return place()

    def takes_anything(self, *args: Any, **kwargs: Any) -> tuple[str | None, dict[str, Any]]:
        return place(), kwargs

    def stream(self, n: int) -> Iterator[str | None]:
        for _ in range(n):
            yield place()

    @staticmethod
    def still() -> str | None:
        return place()

    @tool
    def work(self) -> str | None:
        return place()


class Base:
    async def inherited(self) -> str | None:
        await asyncio.sleep(0)
        return place()


@ray.remote(num_cpus=0)
@guard(allow=[])
class AsyncCallee(Base):
    async def later(self) -> str | None:
        await asyncio.sleep(0.01)
        return place()

    async def stream(self, n: int) -> AsyncIterator[str | None]:
        for _ in range(n):
            await asyncio.sleep(0)
            yield place()

    def plain(self) -> str | None:
        return place()


@ray.remote(num_cpus=0)
@guard(allow=[])
class Caller:
    def through(self, handle: Any) -> tuple[str, str | None]:
        with episode(id="callers") as scope:
            return scope.span, ray.get(handle.sync.remote())

    def onwards(self, name: str) -> str | None:
        return ray.get(ray.get_actor(name).sync.remote())


@ray.remote(num_cpus=0)
class Unguarded:
    def place(self, **kwargs: Any) -> tuple[str | None, dict[str, Any]]:
        return place(), kwargs


@guard(allow=[])
@ray.remote(num_cpus=0)
def task(a: int) -> str | None:
    return place()


@ray.remote(num_cpus=0)
@guard(allow=[])
def stream_task(n: int) -> Iterator[str | None]:
    for _ in range(n):
        yield place()


@pytest.fixture(scope="module")
def callee(cluster: Any) -> Any:
    return Callee.options(name="callee").remote()


def test_every_kind_of_method_knows_its_caller(callee: Any) -> None:
    with episode(id="sync") as scope:
        assert ray.get(callee.sync.remote()) == scope.span
        assert ray.get(callee.takes_anything.remote(1, a=2)) == (scope.span, {"a": 2})
        assert ray.get(callee.sync.options(name="x").remote()) == scope.span
        assert [ray.get(ref) for ref in callee.stream.remote(3)] == [scope.span] * 3
        assert ray.get(callee.still.remote()) == scope.span
    assert ray.get(callee.sync.remote()) is None
    assert ray.get(callee.takes_anything.remote()) == (None, {})


def test_calls_side_by_side_keep_apart(callee: Any) -> None:
    found: dict[str, Any] = {}

    def roll_out(number: int) -> None:
        with episode(id=f"side by side {number}") as scope:
            found[scope.span] = ray.get([callee.sync.remote() for _ in range(5)])

    threads = [threading.Thread(target=roll_out, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(places == [span] * 5 for span, places in found.items())


def test_async_methods_know_their_caller(cluster: Any) -> None:
    actor = AsyncCallee.remote()
    with episode(id="async one") as one:
        first = [actor.later.remote(), actor.inherited.remote(), actor.plain.remote()]
        streamed = [ray.get(ref) for ref in actor.stream.remote(3)]
    with episode(id="async two") as two:
        second = [actor.later.remote() for _ in range(3)]
    assert ray.get(first) == [one.span] * 3
    assert streamed == [one.span] * 3
    assert ray.get(second) == [two.span] * 3
    assert ray.get(actor.later.remote()) is None


def test_tasks_know_their_caller(cluster: Any) -> None:
    with episode(id="task") as scope:
        assert ray.get(task.remote(1)) == scope.span
        assert [ray.get(ref) for ref in stream_task.remote(2)] == [scope.span] * 2
    assert ray.get(task.remote(1)) is None


def test_context_goes_from_actor_to_actor_by_any_handle(callee: Any) -> None:
    caller = Caller.remote()
    span, place_there = ray.get(caller.through.remote(callee))
    assert place_there == span
    with tool_call("onwards", {}) as call:
        assert ray.get(caller.onwards.remote("callee")) == call.span


def test_an_unguarded_actor_is_called_as_ever(cluster: Any) -> None:
    with episode(id="unguarded"):
        assert ray.get(Unguarded.remote().place.remote(a=1)) == (None, {"a": 1})


def test_a_tool_in_another_actor_is_journaled_under_the_episode(callee: Any, recorded: Callable[..., Any]) -> None:
    with episode(id="across", group="g7", iteration=3) as scope:
        assert ray.get(callee.work.remote()) is not None
    (call,) = recorded(lambda span: span.trace_id == scope.trace and span.end_ns and span.name == "execute_tool work")
    assert call.parent_id == scope.span
    assert call.attributes["rl.rollout.id"] == "across"
    assert call.attributes["rl.group.id"] == "g7"
    assert recorded(lambda span: span.span_id == scope.span and span.end_ns), "the driver's own episode"


@guard(allow=[])
@ray.remote(num_cpus=0)
class Victim:
    @tool(name="endless")
    def endless(self) -> None:
        time.sleep(600)

    def pid(self) -> int:
        return os.getpid()


def test_a_killed_actors_open_call_is_closed_by_the_supervisor(recorded: Callable[..., Any]) -> None:
    victim = Victim.options(max_concurrency=2, name="victim").remote()
    ray.get(victim.pid.remote())
    with episode(id="killed") as scope:
        pending = victim.endless.remote()
        begun = recorded(lambda span: span.trace_id == scope.trace and span.name == "execute_tool endless")
        assert begun
        assert begun[0].end_ns is None
        ray.kill(victim)
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(pending)
    (closed,) = recorded(lambda span: span.name == "execute_tool endless" and span.end_ns)
    assert closed.span_id == begun[0].span_id
    assert closed.attributes["ray_guard.ended_by"] == "supervisor"
    assert closed.status == 2
