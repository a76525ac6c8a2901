from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import decimal
import gc
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from ray_guard.client import carry, scope
from ray_guard.client.decorator import tool
from ray_guard.testing import RecordingChannel


def here() -> str | None:
    node = carry.current()
    return None if node is None else node.span


def in_thread(thread: threading.Thread) -> None:
    thread.start()
    thread.join()


# --- threads ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    getattr(sys.flags, "thread_inherit_context", 0) == 1,
    reason="this Python's threads inherit the context by themselves",
)
def test_without_carriers_a_thread_knows_nothing() -> None:
    seen: list[Any] = []
    with scope.turn(1):
        in_thread(threading.Thread(target=lambda: seen.append(here())))
    assert seen == [None]


class Subclass(threading.Thread):
    seen: str | None = "unset"

    def run(self) -> None:
        self.seen = here()


@pytest.mark.usefixtures("carriers")
def test_threads_start_where_their_starter_is() -> None:
    seen: list[Any] = []
    overriding, timer = Subclass(), threading.Timer(0, lambda: seen.append(here()))
    own_run = threading.Thread()
    own_run.run = lambda: seen.append(here())  # type: ignore[method-assign]
    with scope.tool_call("x") as call:
        in_thread(threading.Thread(target=lambda: seen.append(here())))
        in_thread(overriding)
        in_thread(timer)
        in_thread(own_run)
        assert here() == call.span
    assert seen == [call.span] * 3
    assert overriding.seen == call.span
    assert "run" not in overriding.__dict__
    assert "run" in own_run.__dict__
    in_thread(threading.Thread(target=lambda: seen.append(here())))
    assert seen[3] is None


@pytest.mark.usefixtures("carriers")
def test_threads_get_our_variable_and_nobody_elses() -> None:
    other: contextvars.ContextVar[int] = contextvars.ContextVar("other", default=0)
    seen: list[Any] = []
    other.set(5)
    with scope.turn(1), decimal.localcontext(decimal.Context(prec=3)):
        in_thread(threading.Thread(target=lambda: seen.append((other.get(), decimal.getcontext().prec))))
    expected = (5, 3) if getattr(sys.flags, "thread_inherit_context", 0) else (0, decimal.DefaultContext.prec)
    assert seen == [expected]


@pytest.mark.usefixtures("carriers")
def test_a_thread_that_cannot_start_is_left_as_it_was() -> None:
    thread = threading.Thread(target=lambda: None)
    with scope.turn(1):
        in_thread(thread)
        with pytest.raises(RuntimeError, match="once"):
            thread.start()
    assert "run" not in thread.__dict__


def test_carriers_go_on_once_and_come_off() -> None:
    start, submit = threading.Thread.start, ThreadPoolExecutor.submit
    carry.install_carriers()
    wrapped = threading.Thread.start
    carry.install_carriers()
    assert threading.Thread.start is wrapped
    carry.remove_carriers()
    carry.remove_carriers()
    assert threading.Thread.start is start
    assert ThreadPoolExecutor.submit is submit


# --- executors ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("carriers")
def test_each_job_of_a_pool_runs_where_it_was_submitted() -> None:
    with ThreadPoolExecutor(1) as pool:
        with scope.turn(1) as first:
            # This one makes the pool start its only thread, which must not stay in this scope.
            assert pool.submit(here).result() == first.span
            assert here() == first.span
        assert pool.submit(here).result() is None
        with scope.turn(2) as second:
            assert pool.submit(here).result() == second.span
            assert list(pool.map(lambda _: here(), range(3))) == [second.span] * 3
        assert pool.submit(here).result() is None
        with scope.turn(3), pytest.raises(ZeroDivisionError):
            pool.submit(lambda: 1 / 0).result()


@pytest.mark.usefixtures("carriers")
async def test_run_in_executor_and_to_thread_know_their_caller() -> None:
    loop = asyncio.get_running_loop()
    with scope.tool_call("x") as call:
        assert await loop.run_in_executor(None, here) == call.span
        assert await asyncio.to_thread(here) == call.span
        with ThreadPoolExecutor(1) as pool:
            assert await loop.run_in_executor(pool, here) == call.span
    assert await loop.run_in_executor(None, here) is None


@pytest.mark.usefixtures("carriers")
def test_coroutines_sent_to_a_loop_in_another_thread_know_their_sender() -> None:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def where() -> str | None:
        await asyncio.sleep(0)
        return here()

    with scope.turn(1) as turn:
        assert asyncio.run_coroutine_threadsafe(where(), loop).result() == turn.span
    assert asyncio.run_coroutine_threadsafe(where(), loop).result() is None
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


# --- many at once -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("carriers")
def test_episodes_in_threads_do_not_mix(wire: RecordingChannel) -> None:
    start = threading.Barrier(8)
    pool = ThreadPoolExecutor(3)

    @tool
    def work(n: int) -> int:
        node = carry.current()
        assert node is not None
        return int(str(node.identity["rl.rollout.id"]))

    def manager(n: int) -> None:
        start.wait()
        for turn in range(20):
            with scope.episode(id=str(n)), scope.turn(turn):
                assert work(n) == n
                assert pool.submit(work, n).result() == n

    with ThreadPoolExecutor(8) as managers:
        for done in [managers.submit(manager, n) for n in range(8)]:
            done.result()
    pool.shutdown()
    by_span = {m["span"]: m for m in wire.sent("open")}
    assert len(by_span) == 8 * 20 * 4
    for message in wire.sent("open", scope="tool"):
        rollout = by_span[message["episode"]]
        assert rollout["identity"]["rl.rollout.id"] == message["identity"]["rl.rollout.id"]
        assert rollout["trace"] == message["trace"]
        assert by_span[message["parent"]]["scope"] == "turn"


async def test_episodes_in_tasks_do_not_mix(wire: RecordingChannel) -> None:
    @tool
    async def work(n: int) -> None:
        before = here()
        await asyncio.sleep(0.001 * (n % 3))
        assert here() == before

    async def manager(n: int) -> None:
        async with scope.episode(id=str(n)) as episode:
            for turn in range(5):
                async with scope.turn(turn):
                    await asyncio.gather(work(n), work(n))
            assert here() == episode.span

    await asyncio.gather(*(manager(n) for n in range(20)))
    by_span = {m["span"]: m for m in wire.sent("open")}
    tools = wire.sent("open", scope="tool")
    assert len(tools) == 200
    for message in tools:
        assert by_span[message["episode"]]["identity"]["rl.rollout.id"] == message["identity"]["rl.rollout.id"]
        assert by_span[message["parent"]]["scope"] == "turn"


# --- generators ---------------------------------------------------------------------------------------------------


def test_a_generators_span_lasts_from_first_next_to_exhaustion(wire: RecordingChannel) -> None:
    @tool
    def stream() -> Iterator[str | None]:
        yield here()
        with scope.chat("m") as chat:
            yield here()
            assert here() == chat.span, "its own scopes come back with it"
        yield here()

    steps = stream()
    assert not wire.messages
    seen = []
    for step in steps:
        seen.append(step)
        assert here() is None, "the consumer is outside"
        assert not wire.sent("close", status=2)
    (opened,) = wire.sent("open", scope="tool")
    (chat,) = wire.sent("open", scope="chat")
    assert seen == [opened["span"], chat["span"], opened["span"]]
    assert chat["parent"] == opened["span"]
    assert wire.messages[-1]["op"] == "close"
    assert wire.messages[-1]["span"] == opened["span"]


def test_generators_pass_values_exceptions_and_results_both_ways(wire: RecordingChannel) -> None:
    @tool
    def echo() -> Generator[Any, Any, str]:
        got = []
        while True:
            try:
                got.append((yield len(got)))
            except KeyError as error:
                yield f"caught {error}"
            if got and got[-1] is None:
                return "done"

    steps = echo()
    assert next(steps) == 0
    assert steps.send("a") == 1
    assert steps.throw(KeyError("k")) == "caught 'k'"
    assert steps.send("b") == 1
    with pytest.raises(StopIteration) as stopped:
        steps.send(None)
    assert stopped.value.value == "done"
    assert [m["status"] for m in wire.sent("close")] == [0]


def test_a_generator_given_up_is_closed_and_its_clean_up_runs_inside(wire: RecordingChannel) -> None:
    cleaned = []

    @tool
    def stream() -> Iterator[int]:
        try:
            yield 1
        finally:
            cleaned.append(here())

    steps = stream()
    next(steps)
    steps.close()  # type: ignore[attr-defined]
    lost = stream()
    next(lost)
    del lost
    gc.collect()
    assert cleaned == [m["span"] for m in wire.sent("open")]
    assert [m["status"] for m in wire.sent("close")] == [0, 0]

    @tool
    def stubborn() -> Iterator[int]:
        try:
            yield 1
        finally:
            raise OSError("cannot clean up")

    steps = stubborn()
    next(steps)
    with pytest.raises(OSError, match="cannot clean up"):
        steps.close()  # type: ignore[attr-defined]
    assert wire.sent("close")[-1]["attributes"] == {"error.type": "OSError"}


def test_interleaved_generators_keep_apart(wire: RecordingChannel) -> None:
    @tool
    def stream(n: int) -> Iterator[str | None]:
        while True:
            yield here()

    with scope.turn(1) as turn:
        one, two = stream(1), stream(2)
        first, second = next(one), next(two)
        for _ in range(3):
            assert next(one) == first
            assert next(two) == second
            assert here() == turn.span
        one.close()  # type: ignore[attr-defined]
        assert next(two) == second
        two.close()  # type: ignore[attr-defined]


def test_a_generator_may_be_resumed_in_another_thread(wire: RecordingChannel) -> None:
    @tool
    def stream() -> Iterator[str | None]:
        for _ in range(3):
            yield here()

    steps = stream()
    seen = [next(steps)]
    in_thread(threading.Thread(target=lambda: seen.append(next(steps))))
    seen.extend(steps)
    assert len(set(seen)) == 1
    assert here() is None
    assert len(wire.sent("close")) == 1


async def test_async_generators_do_not_leak_and_close(wire: RecordingChannel) -> None:
    @tool
    async def stream() -> AsyncIterator[str | None]:
        try:
            for _ in range(3):
                await asyncio.sleep(0)
                yield here()
        finally:
            await asyncio.sleep(0)
            assert here() == wire.sent("open")[-1]["span"]

    async for step in stream():
        assert step == wire.sent("open")[-1]["span"]
        assert here() is None
    given_up = stream()
    await anext(given_up)
    await given_up.aclose()  # type: ignore[attr-defined]
    elsewhere = stream()
    seen = [await anext(elsewhere), await asyncio.create_task(elsewhere.__anext__())]  # type: ignore[arg-type]
    await elsewhere.aclose()  # type: ignore[attr-defined]
    assert len(set(seen)) == 1
    assert here() is None
    assert [m["status"] for m in wire.sent("close")] == [0, 0, 0]


async def test_async_generators_pass_values_and_exceptions_both_ways(wire: RecordingChannel) -> None:
    @tool
    async def echo() -> AsyncGenerator[Any, Any]:
        got = None
        while True:
            try:
                got = yield got
            except KeyError as error:
                got = f"caught {error}"

    steps = echo()
    assert await anext(steps) is None
    assert await steps.asend("a") == "a"
    assert await steps.athrow(KeyError("k")) == "caught 'k'"
    with pytest.raises(ZeroDivisionError):
        await steps.athrow(ZeroDivisionError())
    assert [m["status"] for m in wire.sent("close")] == [2]
    with pytest.raises(StopAsyncIteration):
        await anext(steps)


async def test_an_async_generator_cancelled_while_it_waits_says_so(wire: RecordingChannel) -> None:
    @tool
    async def stream() -> AsyncIterator[int]:
        yield 1
        await asyncio.sleep(60)
        yield 2

    steps = stream()
    await anext(steps)
    waiting = asyncio.ensure_future(anext(steps))
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert wire.sent("close")[0]["attributes"] == {"ray_guard.cancelled": True}
    assert here() is None


def test_attach_goes_around_generators_too() -> None:
    given = {"trace": "a" * 32, "span": "b" * 16}

    def stream() -> Iterator[str | None]:
        yield here()

    steps = carry.run_generator(scope.attach(given), stream)
    assert next(steps) == "b" * 16
    assert here() is None
    steps.close()


def test_processes_of_a_pool_are_given_the_context_by_hand() -> None:
    with scope.turn(1) as turn:
        given = scope.context()
    with concurrent.futures.ProcessPoolExecutor(1) as pool:
        assert pool.submit(in_process, given).result() == turn.span


def in_process(given: dict[str, Any]) -> str | None:
    with scope.attach(given):
        return here()
