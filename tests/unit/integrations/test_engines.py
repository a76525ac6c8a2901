"""Engine processes say who they are on a pipe; their phases follow what is done to the engine."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from ray_guard.client import channel, engine
from ray_guard.client.engine import Phase
from ray_guard.errors import NotEnforced
from ray_guard.integrations.vllm import engines, points
from ray_guard.integrations.vllm.engines import Engines


class Told:
    """In place of the supervisor: what it was told, in order."""

    def __init__(self) -> None:
        self.words: list[tuple[Any, ...]] = []
        self.refusal: Exception | None = None

    def register(self, pid: int, phase: Phase) -> Any:
        if self.refusal is not None:
            raise self.refusal
        self.words.append(("engine", pid, phase.value))
        told = self

        class Process:
            def enter(self, phase: Phase) -> None:
                told.words.append(("phase", pid, phase.value))

            def answers_requests(self) -> None:
                pass

            @contextmanager
            def request(self) -> Iterator[None]:
                told.words.append(("busy", pid))
                yield
                told.words.append(("idle", pid))

        return Process()

    def wait(self, count: int) -> list[tuple[Any, ...]]:
        deadline = time.monotonic() + 10
        while len(self.words) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.words


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    found = Told()
    monkeypatch.setattr(channel, "current", object)  # a line, whatever it is
    monkeypatch.setattr(engine, "register", found.register)
    return found


def start(method: str, target: Callable[[], None]) -> int:
    process = multiprocessing.get_context(method).Process(target=target)
    process.start()
    process.join()
    assert process.exitcode == 0
    return process.pid or 0


def _say_nonsense() -> None:
    engines._say(os.environ[engines.LINE], b"\xff\xfe\nengine nine\nphase lunch\nengine 7 8\n")


def _warm_up() -> None:
    engines.announce_phase(Phase.WARM_UP)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_register_themselves(told: Told, method: str) -> None:
    group = Engines()
    with group.starting():
        first = start(method, engines.announce)
        assert told.wait(1) == [("engine", first, "load")]
        start(method, _say_nonsense)
        start(method, _warm_up)
        second = start(method, engines.announce)
        assert told.wait(3)[1:] == [("phase", first, "warm_up"), ("engine", second, "warm_up")]
    assert engines.LINE not in os.environ
    assert set(group.pids()) == {first, second}
    group.close()
    group._reader.join(5)  # type: ignore[union-attr]
    assert not group._reader.is_alive()  # type: ignore[union-attr]
    engines._say("/nowhere", b"engine 1\n")  # whoever held the engine has gone


def test_an_engine_that_does_not_start_leaves_nothing_behind(told: Told) -> None:
    folders: list[str] = []

    def fail() -> None:
        folders.append(os.path.dirname(os.environ[engines.LINE]))
        raise RuntimeError("no model")

    with pytest.raises(RuntimeError), Engines().starting():
        fail()
    assert not os.path.exists(folders[0])


def test_phases_of_what_overlaps(told: Told) -> None:
    group = Engines()
    group.register(5)
    group.rest(Phase.ROLLOUT)
    with group.doing(Phase.WEIGHT_SYNC), group.doing(Phase.WEIGHT_SYNC):
        pass
    group.busy(True)
    group.busy(False)
    with group.doing(Phase.SLEEP):
        group.rest(Phase.SLEEP)
    assert [word[0] if len(word) == 2 else word[2] for word in told.words] == [
        "load", "rollout", "weight_sync", "weight_sync", "rollout", "busy", "idle", "sleep", "sleep",
    ]  # fmt: skip


def test_who_comes_while_requests_run_is_busy(told: Told) -> None:
    group = Engines()
    group.busy(True)
    group.register(5)
    group.busy(False)
    assert told.words == [("engine", 5, "load"), ("busy", 5), ("idle", 5)]


def test_a_policy_without_gpus_has_no_engines_and_goes_on(told: Told) -> None:
    told.refusal = NotEnforced(["gpu"], "gpu: none has no engine processes")
    group = Engines()
    group.register(5)
    told.refusal = None
    group.register(6)
    group.enter(Phase.ROLLOUT)
    assert (group.pids(), told.words) == ((), [])


@pytest.mark.parametrize("kind", ["LLMEngine", "AsyncLLM"])
async def test_what_is_done_to_an_engine_is_its_phase(told: Told, kind: str) -> None:
    class Plain:
        def sleep(self, level: int = 1) -> None: ...
        def collective_rpc(self, method: str) -> None: ...
        def wake_up(self, tags: list[str] | None = None) -> bool:
            return tags is None

    class Awaited:
        async def sleep(self, level: int = 1) -> None: ...
        async def collective_rpc(self, method: str) -> None: ...
        async def wake_up(self, tags: list[str] | None = None) -> bool:
            return tags is None

    module = {"LLMEngine": "vllm.v1.engine.llm_engine", "AsyncLLM": "vllm.v1.engine.async_llm"}[kind]
    plain: Any = Plain if kind == "LLMEngine" else Awaited
    for point in points.POINTS[module]:
        if point.name in ("sleep", "collective_rpc", "wake_up"):
            setattr(plain, point.name, point.around(getattr(plain, point.name)))
    group, made = Engines(), plain()
    made.output_processor = plain  # whatever it is, it is known by it
    group.register(5)
    group.enter(Phase.ROLLOUT)
    points._attached._engines[plain] = group

    async def call(name: str, *arguments: Any) -> list[str]:
        told.words.clear()
        answer = getattr(made, name)(*arguments)
        if answer is not None and hasattr(answer, "__await__"):
            await answer
        return [word[2] for word in told.words]

    assert await call("collective_rpc", "load_weights") == ["weight_sync", "rollout"]
    assert await call("sleep", 2) == ["sleep", "sleep"]
    assert await call("collective_rpc", "load_weights") == ["weight_sync", "sleep"]
    assert await call("wake_up", ["weights"]) == ["load", "sleep"], "half awake is asleep"
    assert await call("wake_up") == ["load", "rollout"]
