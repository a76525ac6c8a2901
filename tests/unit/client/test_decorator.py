from __future__ import annotations

import asyncio
import functools
import inspect
import subprocess
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from typing import Any

import pytest

from ray_guard.client import carry, scope
from ray_guard.client.decorator import tool
from ray_guard.client.spans import arguments_digest
from ray_guard.testing import RecordingChannel


def digest(wire: RecordingChannel) -> str:
    found: str = wire.sent("open")[-1]["attributes"]["ray_guard.arguments.sha256"]
    return found


def marked(function: Any) -> Any:
    function.__ray_num_returns__ = 2
    return function


class Worker:
    @tool
    @marked
    def plain(self, command: str, /, timeout: float = 3.0, *rest: int, flag: bool = False) -> str:
        """Does it."""
        return f"{command} {timeout} {rest} {flag}"

    @tool(name="bash")
    async def awaited(self, command: str) -> str:
        await asyncio.sleep(0)
        return command

    @tool
    def stream(self, count: int) -> Iterator[int]:
        yield from range(count)

    @tool
    async def astream(self, count: int) -> AsyncIterator[int]:
        for n in range(count):
            await asyncio.sleep(0)
            yield n

    @tool
    @staticmethod
    def static_below(a: int) -> int:
        return a

    @staticmethod
    @tool
    def static_above(a: int) -> int:
        return a

    @tool
    @classmethod
    def of_class_below(cls, a: int) -> str:
        return f"{cls.__name__}{a}"

    @classmethod
    @tool
    def of_class_above(cls, a: int) -> str:
        return f"{cls.__name__}{a}"


def test_the_kind_of_function_is_kept() -> None:
    assert not inspect.iscoroutinefunction(Worker.plain)
    assert inspect.iscoroutinefunction(Worker.awaited)
    assert asyncio.iscoroutinefunction(Worker().awaited)
    assert inspect.isgeneratorfunction(Worker.stream)
    assert inspect.isasyncgenfunction(Worker.astream)
    assert not inspect.iscoroutinefunction(Worker.astream)
    for function in (Worker.plain, Worker.awaited, Worker.stream, Worker.astream):
        assert inspect.isfunction(function), "Ray takes only functions for methods"


def test_name_signature_dict_and_doc_are_kept() -> None:
    assert Worker.plain.__name__ == "plain"
    assert Worker.plain.__qualname__ == "Worker.plain"
    assert Worker.plain.__module__ == __name__
    assert Worker.plain.__doc__ == "Does it."
    assert Worker.plain.__dict__["__ray_num_returns__"] == 2
    assert str(inspect.signature(Worker.plain)) == str(inspect.signature(inspect.unwrap(Worker.plain)))
    assert list(inspect.signature(Worker().plain).parameters) == ["command", "timeout", "rest", "flag"]


async def test_each_kind_is_one_span_and_gives_what_it_gave(wire: RecordingChannel) -> None:
    worker = Worker()
    assert worker.plain("ls", 1, 2, 3, flag=True) == "ls 1 (2, 3) True"
    assert await worker.awaited("ls") == "ls"
    assert list(worker.stream(3)) == [0, 1, 2]
    assert [n async for n in worker.astream(3)] == [0, 1, 2]
    assert worker.static_below(1) == worker.static_above(1) == Worker.static_below(1) == 1
    assert worker.of_class_below(1) == Worker.of_class_above(1) == "Worker1"
    names = [m["name"].removeprefix("execute_tool ") for m in wire.sent("open")]
    assert names == [
        "plain",
        "bash",
        "stream",
        "astream",
        "static_below",
        "static_above",
        "static_below",
        "of_class_below",
        "of_class_above",
    ]
    assert [m["span"] for m in wire.sent("close")] == [m["span"] for m in wire.sent("open")]


def test_arguments_go_by_name_without_self_and_defaults(wire: RecordingChannel) -> None:
    worker = Worker()
    worker.plain("ls")
    assert digest(wire) == arguments_digest({"command": "ls"})
    worker.plain("ls", 1, 2, 3, flag=True)
    assert digest(wire) == arguments_digest({"command": "ls", "timeout": 1, "*rest": [2, 3], "flag": True})
    worker.plain("ls", timeout=1)
    first = digest(wire)
    worker.plain("ls", 1)
    assert digest(wire) == first, "by position or by name is the same call"
    worker.of_class_above(5)
    assert digest(wire) == arguments_digest({"a": 5})
    worker.static_above(5)
    assert digest(wire) == arguments_digest({"a": 5})


def test_a_call_that_does_not_fit_is_the_functions_own_error(wire: RecordingChannel) -> None:
    @tool
    def one(a: int) -> int:
        return a

    with pytest.raises(TypeError, match="positional argument"):
        one(1, 2)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="missing"):
        one()  # type: ignore[call-arg]
    assert [m["status"] for m in wire.sent("close")] == [2, 2]


async def test_exceptions_pass_unchanged_through_each_kind(wire: RecordingChannel) -> None:
    error = RuntimeError("boom")

    @tool
    def plain() -> None:
        raise error

    @tool
    async def awaited() -> None:
        await asyncio.sleep(0)
        raise error

    @tool
    def stream() -> Iterator[int]:
        yield 1
        raise error

    @tool
    async def astream() -> AsyncIterator[int]:
        yield 1
        raise error

    async def drain() -> None:
        async for _ in astream():
            pass

    calls: list[Callable[[], Any]] = [plain, lambda: list(stream())]
    for call in calls:
        with pytest.raises(RuntimeError) as caught:
            call()
        assert caught.value is error
    acalls: list[Callable[[], Awaitable[None]]] = [awaited, drain]
    for acall in acalls:
        with pytest.raises(RuntimeError) as caught:
            await acall()
        assert caught.value is error
    assert [m["attributes"]["error.type"] for m in wire.sent("close")] == ["RuntimeError"] * 4


async def test_a_task_that_is_cancelled_within_a_tool(wire: RecordingChannel) -> None:
    started = asyncio.Event()

    @tool
    async def waits() -> None:
        started.set()
        await asyncio.Event().wait()

    @tool
    async def outer() -> str:
        task = asyncio.ensure_future(waits())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(waits(), 0.01)
        return "went on"

    assert await outer() == "went on"
    ends = {m["span"]: m for m in wire.sent("close")}
    assert [ends[m["span"]]["status"] for m in wire.sent("open")] == [0, 0, 0]
    inner = [ends[m["span"]]["attributes"] for m in wire.sent("open", name="execute_tool waits")]
    assert inner == [{"ray_guard.cancelled": True}] * 2


async def test_exceptions_keep_traceback_cause_and_notes_through_each_kind(wire: RecordingChannel) -> None:
    def fail() -> None:
        try:
            raise KeyError("first")
        except KeyError as error:
            second = ValueError("second")
            second.add_note("noted")
            raise second from error

    @tool
    def plain() -> None:
        fail()

    @tool
    async def awaited() -> None:
        fail()

    @tool
    def stream() -> Iterator[int]:
        yield 1
        fail()

    @tool
    async def astream() -> AsyncIterator[int]:
        yield 1
        fail()

    async def drain() -> None:
        async for _ in astream():
            pass

    async def caught(call: Callable[[], Any]) -> ValueError:
        try:
            result = call()
            if inspect.isawaitable(result):
                await result
        except ValueError as error:
            return error
        raise AssertionError("nothing was raised")

    for call, name in ((plain, "plain"), (awaited, "awaited"), (lambda: list(stream()), "stream"), (drain, "astream")):
        error = await caught(call)
        frames = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
        assert frames[-2:] == [name, "fail"], "the tool's own frames are the last, as without us"
        assert isinstance(error.__cause__, KeyError)
        assert error.__notes__ == ["noted"]
        ((_, _, details),) = wire.sent("close")[-1]["events"]
        assert f"in {name}\n" in details["exception.stacktrace"]
        assert details["exception.type"] == "ValueError"


def test_a_generator_never_begun_is_no_call(wire: RecordingChannel) -> None:
    @tool
    def stream() -> Iterator[int]:
        yield 1

    stream()
    assert not wire.messages


def test_a_generator_that_will_not_end_is_the_generators_own_error(wire: RecordingChannel) -> None:
    @tool
    def stubborn() -> Iterator[int]:
        try:
            yield 1
        except GeneratorExit:
            yield 2

    steps = stubborn()
    next(steps)
    with pytest.raises(RuntimeError, match="ignored GeneratorExit"):
        steps.close()  # type: ignore[attr-defined]
    assert wire.sent("close")[0]["attributes"]["error.type"] == "RuntimeError"
    assert carry.current() is None


async def test_what_a_call_spawns_belongs_to_it_for_as_long_as_it_runs(wire: RecordingChannel, carriers: None) -> None:
    """A thread, a task and a job that outlive the call that began them still name it as their parent."""
    release = threading.Event()
    over = asyncio.Event()
    kept: list[Any] = []

    @tool
    def inner(how: str) -> str:
        return how

    async def later() -> None:
        await over.wait()
        inner("task")

    def blocking(how: str) -> None:
        release.wait(30)
        inner(how)

    @tool
    async def spawns() -> None:
        thread = threading.Thread(target=blocking, args=("thread",))
        thread.start()
        loop = asyncio.get_running_loop()
        kept.extend((thread, asyncio.ensure_future(later()), loop.run_in_executor(None, blocking, "executor")))

    await spawns()
    (outer,) = wire.sent("open", name="execute_tool spawns")
    assert wire.sent("close")[0]["span"] == outer["span"]
    release.set()
    over.set()
    await asyncio.gather(*kept[1:])
    await asyncio.to_thread(kept[0].join)
    inners = wire.sent("open", name="execute_tool inner")
    assert [each["parent"] for each in inners] == [outer["span"]] * 3
    assert carry.current() is None


def test_functions_partials_callable_objects_and_builtins_are_tools(wire: RecordingChannel) -> None:
    class Caller:
        def __call__(self, a: int) -> int:
            return a + 1

    def add(a: int, b: int) -> int:
        return a + b

    assert tool(functools.partial(add, 1))(b=2) == 3
    assert tool(Caller())(1) == 2
    assert tool(name="length")(len)([1, 2]) == 2
    assert tool(lambda x: x)(3) == 3
    assert [m["name"].split()[1] for m in wire.sent("open")] == ["partial", "Caller", "length", "<lambda>"]


async def test_a_callable_object_may_be_async(wire: RecordingChannel) -> None:
    class Caller:
        async def __call__(self, a: int) -> int:
            return a + 1

    called = tool(name="c")(Caller())
    assert inspect.iscoroutinefunction(called)
    assert await called(1) == 2


@pytest.mark.parametrize("wrong", [7, "bash", Worker, None.__class__])
def test_what_cannot_be_a_tool_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="functions and methods"):
        tool(wrong)


def test_the_results_of_tools_are_kept_where_content_is(
    wire: RecordingChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_GUARD_CAPTURE_CONTENT", "1")
    Worker().plain("ls")
    assert wire.sent("close")[0]["attributes"]["gen_ai.tool.call.result"] == "ls 3.0 () False"


# --- functions that hide their kind -------------------------------------------------------------------------------


async def test_a_plain_function_that_returns_a_coroutine_keeps_its_span_open(wire: RecordingChannel) -> None:
    async def work() -> str:
        await asyncio.sleep(0)
        assert carry.current() is not None
        return "done"

    @tool
    def hidden() -> Awaitable[str]:
        return work()

    pending = hidden()
    assert carry.current() is None
    assert not wire.sent("close")
    assert await pending == "done"
    assert len(wire.sent("close")) == 1


async def test_a_plain_function_that_returns_a_generator_keeps_its_span_open(wire: RecordingChannel) -> None:
    def steps() -> Generator[int, None, str]:
        assert carry.current() is not None
        yield 1
        assert carry.current() is not None
        yield 2
        return "end"

    async def asteps() -> AsyncIterator[int]:
        assert carry.current() is not None
        yield 1
        raise KeyError("inside")

    @tool
    def hidden() -> Any:
        return steps()

    @tool
    def ahidden() -> Any:
        return asteps()

    stream = hidden()
    assert carry.current() is None
    assert list(stream) == [1, 2]
    assert len(wire.sent("close")) == 1
    astream = ahidden()
    assert await anext(astream) == 1
    assert carry.current() is None
    with pytest.raises(KeyError):
        await anext(astream)
    assert wire.sent("close")[1]["status"] == 2


# --- pickling -----------------------------------------------------------------------------------------------------

MAIN = """
import sys, asyncio, inspect
import cloudpickle
from ray_guard.client.decorator import tool

class Worker:
    @tool
    def plain(self, a): return a
    @tool(name="b")
    async def awaited(self, a): return a
    @tool
    def stream(self, n): yield from range(n)
    @tool
    async def astream(self, n):
        for i in range(n): yield i

@tool
def function(a): return a

if sys.argv[1] == "write":
    sys.stdout.buffer.write(cloudpickle.dumps((Worker, function)))
"""

READ = """
import sys, asyncio, inspect, pickle
from ray_guard.client import channel
from ray_guard.testing import RecordingChannel
wire = RecordingChannel()
channel.current = lambda: wire
Worker, function = pickle.loads(sys.stdin.buffer.read())
w = Worker()
async def every():
    return [n async for n in w.astream(2)]
print(w.plain(1), asyncio.run(w.awaited(2)), list(w.stream(2)), asyncio.run(every()), function(3))
print(inspect.iscoroutinefunction(Worker.awaited), inspect.isgeneratorfunction(Worker.stream),
      inspect.isasyncgenfunction(Worker.astream))
print(len(wire.sent("open")), len(wire.sent("close")))
"""


def test_classes_of_main_pickle_as_ray_does_it(tmp_path: Any) -> None:
    pytest.importorskip("cloudpickle", reason="Ray brings its own")
    script = tmp_path / "job.py"
    script.write_text(MAIN)
    written = subprocess.run([sys.executable, str(script), "write"], capture_output=True, check=True)
    read = subprocess.run([sys.executable, "-c", READ], input=written.stdout, capture_output=True, check=True)
    assert read.stdout.decode().splitlines() == ["1 2 [0, 1] [0, 1] 3", "True True True", "5 5"]


def test_typing_keeps_the_decorated_type() -> None:
    @tool
    def plain(a: int) -> str:
        return str(a)

    @tool(name="x")
    def named(a: int) -> str:
        return str(a)

    text: str = plain(1) + named(2)
    with scope.turn(1):
        assert text == "12"
