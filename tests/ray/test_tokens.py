"""Tokens that a policy actor spends are charged to the episode of the env actor that asked, in real Ray."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import ray

from ray_guard import BudgetExceeded, chat, episode, guard, tool, violations
from ray_guard.client.quota import reserve

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


@guard(allow=[], role="policy", budgets={"actor": {"tokens": 1000}})
@ray.remote(num_cpus=0, max_concurrency=8)
class Engine:
    """What a hook does around each request."""

    def generate(self, most: int, really: int) -> str:
        with reserve(tokens=most) as held:
            held.settle(tokens=really)
        return held.scope

    async def generate_later(self, most: int, really: int) -> str:
        return self.generate(most, really)

    def die_with(self, most: int) -> None:
        self.held = reserve(tokens=most)
        os.kill(os.getpid(), signal.SIGKILL)


@guard(allow=[], budgets={"episode": {"tokens": 100}}, on_violation="end_episode")
@ray.remote(num_cpus=0, max_concurrency=4)
class Env:
    @tool
    def ask(self, engine: Any, most: int, really: int) -> str:
        """A tool as frameworks have them: whatever goes wrong becomes text for the model."""
        try:
            said: str = ray.get(engine.generate.remote(most, really))
            return said
        except Exception as error:  # noqa: BLE001
            return f"error: {error}"

    def roll_out(self, name: str, engine: Any, *requests: tuple[int, int]) -> tuple[list[str], str, list[str]]:
        said: list[str] = []
        try:
            with episode(id=name):
                for most, really in requests:
                    said.append(self.ask(engine, most, really))
        except BudgetExceeded as error:
            return said, f"{error.kind} {error.value} of {error.limit} in {error.scope}", _kinds()
        return said, "", _kinds()


@guard(allow=[], budgets={"episode": {"tokens": 100}})
@ray.remote(num_cpus=0)
class Bereaved:
    def roll_out(self, engine: Any, most: int) -> tuple[str, list[float]]:
        """How its engine went, and what there is room for afterwards."""
        lost = ""
        with episode(id="crash"):
            try:
                ray.get(engine.die_with.remote(most))
            except ray.exceptions.RayActorError as error:
                lost = type(error).__name__
            return lost, [_over(100 - most + more) for more in (0, 1)]


def _over(tokens: int) -> float:
    try:
        reserve(tokens=tokens).release()
    except BudgetExceeded as error:
        return error.value
    return 0


def _kinds() -> list[str]:
    return [violation["kind"] for violation in violations()]


@pytest.fixture(scope="module")
def engine(cluster: Any) -> Any:
    return Engine.remote()


def test_the_episode_that_asked_is_charged_and_ended_when_it_has_used_up_its_tokens(engine: Any) -> None:
    env = Env.remote()
    said, ended, _ = ray.get(env.roll_out.remote("enough", engine, (60, 50), (50, 50)))
    assert (said, ended) == (["call", "call"], "")
    said, ended, kinds = ray.get(env.roll_out.remote("too much", engine, (60, 50), (51, 51), (1, 1)))
    assert said == ["call"]  # what the tool made of the error never reached the model
    assert ended == "tokens 101 of 100 in episode"
    assert kinds == ["tokens"]


def test_episodes_side_by_side_are_charged_apart(engine: Any) -> None:
    env = Env.remote()
    rollouts = [env.roll_out.remote(f"side {n}", engine, (50, 50), (50, 50)) for n in range(4)]
    assert [each[:2] for each in ray.get(rollouts)] == [(["call", "call"], "")] * 4


def test_a_drivers_episode_is_charged_too(engine: Any) -> None:
    with episode(id="driver", budget={"tokens": 20}):
        assert ray.get(engine.generate.remote(20, 20)) == "episode"
        with pytest.raises(BudgetExceeded, match="tokens 21 exceeds the limit of 20"):
            ray.get(engine.generate_later.remote(1, 1))
    assert ray.get(engine.generate.remote(1, 1)) == "actor"


def test_whoever_computes_is_held_to_its_own_limit() -> None:
    small = Engine.remote()
    env = Env.options(name="asks a small one").remote()
    for turn in range(10):
        said, ended, _ = ray.get(env.roll_out.remote(f"small {turn}", small, (100, 100)))
        assert (said, ended) == (["call"], "")
    said, ended, kinds = ray.get(env.roll_out.remote("small last", small, (1, 1)))
    assert "tokens 1001 exceeds the limit of 1000" in said[0]
    assert (ended, kinds) == ("", [])


def test_an_engine_that_dies_is_no_way_to_compute_for_nothing(recorded: Callable[..., Any]) -> None:
    dying = Engine.options(max_restarts=0).remote()
    lost, over = ray.get(Bereaved.remote().roll_out.remote(dying, 30))
    assert lost
    assert over == [0, 101]
    (unsettled,) = recorded(lambda span: span.name == "ray_guard.unsettled")
    assert unsettled.attributes["ray_guard.tokens"] == 30


@guard(allow=[], budgets={"episode": {"tokens": 10}})
@ray.remote(num_cpus=0)
class Chatting:
    def roll_out(self) -> str:
        with episode(id="chatting"):
            with chat("elsewhere") as first:
                first.usage(8, 2)
            try:
                with chat("elsewhere"):
                    return "begun"
            except BudgetExceeded as error:
                return f"{error.kind} {error.value} of {error.limit}"


def test_a_chat_in_an_actor_is_refused_at_its_beginning_when_nothing_is_left() -> None:
    assert ray.get(Chatting.remote().roll_out.remote()) == "tokens 11 of 10"


@guard(allow=[], budgets={"episode": {"tokens": 100}})
@ray.remote(num_cpus=0)
class ChattingWithAnEngine:
    def roll_out(self, engine: Any) -> list[float]:
        """What there is room for after two chats of 50, each of which would cost as much again by its usage."""
        with episode(id="chatting with an engine"):
            for _ in range(2):
                with chat("policy") as said:
                    ray.get(engine.generate.remote(50, 30))
                    said.usage(20, 10)
            return [_over(more) for more in (40, 41)]


def test_a_chat_around_an_engine_of_another_actor_is_charged_once(engine: Any, recorded: Callable[..., Any]) -> None:
    assert ray.get(ChattingWithAnEngine.remote().roll_out.remote(engine)) == [0, 101]
    chats = recorded(lambda span: span.name == "chat policy" and span.end_ns)
    assert [span.attributes["ray_guard.charged_by"] for span in chats] == ["engine"] * 2
