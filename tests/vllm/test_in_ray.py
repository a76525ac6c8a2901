"""A guarded env actor asks a guarded policy actor: the tokens land on the episode that asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_guard.records import SpanRecord, StatusCode

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.kernel, pytest.mark.slow, pytest.mark.timeout(300)]


Ran = tuple[dict[str, Any], list[SpanRecord]]


@pytest.fixture(scope="module")
def ran(serve: Callable[..., Any], spans: Callable[[Path], list[SpanRecord]]) -> Ran:
    program = serve("in_ray")
    return program.ends(), spans(program.evidence)


def test_tokens_of_the_policy_actor_are_the_asking_episodes(ran: Ran) -> None:
    rollouts, found = ran[0]["rollouts"], ran[1]
    rich, poor = rollouts["rich"], rollouts["poor"]
    assert (len(rich["served"]), rich["refused"], rich["violations"]) == (4, None, [])
    assert len(poor["served"]) == 2, "a third of 19 tokens does not fit into 50"
    assert poor["refused"]["type"] == "RayTaskError(BudgetExceeded)"  # a class of both, by Ray
    assert (poor["refused"]["kind"], poor["refused"]["scope"], poor["refused"]["limit"]) == ("tokens", "episode", 50)
    assert poor["violations"] == ["tokens", "tokens"]
    for name, rollout in rollouts.items():
        mine = [span for span in found if span.attributes.get("rl.rollout.id") == name]
        turns = {span.span_id: span for span in mine if span.name == "rl.turn"}
        chats = [span for span in mine if span.name == "chat tiny"]
        assert [turns[str(span.parent_id)].attributes["rl.turn"] for span in chats] == [0, 1, 2, 3]
        served = [span.attributes for span in chats if span.status is not StatusCode.ERROR]
        assert {attributes["ray_guard.charge_scope"] for attributes in served} == {"episode"}
        usage = [[attributes[f"gen_ai.usage.{way}_tokens"] for way in ("input", "output")] for attributes in served]
        spent = [tuple(each) for each in usage]
        assert spent == [(each["input"], each["output"]) for each in rollout["served"]]


def test_the_core_is_killed_and_its_request_is_charged_once(ran: Ran) -> None:
    assert ran[0]["dies"]["type"] == "EngineDeadError"
    (span,) = [s for s in ran[1] if s.name == "chat tiny" and s.attributes.get("rl.rollout.id") == "last"]
    assert span.status is StatusCode.ERROR
    assert list(span.attributes["gen_ai.response.finish_reasons"]) == ["error"]  # type: ignore[arg-type]
    assert span.attributes["gen_ai.usage.input_tokens"] > 0  # type: ignore[operator]
    assert not [s for s in ran[1] if s.name == "ray_guard.unsettled"]
