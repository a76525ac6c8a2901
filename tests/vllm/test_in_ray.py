"""A guarded env actor asks a guarded policy actor, by Ray or, from a tool, by HTTP: its episode pays."""

from __future__ import annotations

import socket
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


def test_an_agent_in_the_call_ring_is_served_by_the_policy_actor(
    serve: Callable[..., Any], spans: Callable[[Path], list[SpanRecord]]
) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    program = serve("endpoint_in_ray", str(port))
    found, recorded = program.ends()["found"], spans(program.evidence)
    assert found["models"] == ["tiny"]
    assert found["answered"] == [200] * 3
    assert found["others"] == [403] * 3
    assert found["too much"] == 429
    by_relay = [span for span in recorded if span.attributes.get("ray_guard.model_endpoint") and span.end_ns]
    answered = [span for span in by_relay if "error.type" not in span.attributes]
    assert [span.attributes["ray_guard.tokens.charged"] for span in answered] == found["tokens"]
    assert {span.attributes["rl.rollout.id"] for span in by_relay} == {"agent"}
    # The engine's own span of the same call is below it: one trace, through both actors.
    own = [span for span in recorded if span.name == "chat tiny" and span not in by_relay]
    assert [span.parent_id for span in own] == [span.span_id for span in answered]
    for mine, theirs in zip(own, answered, strict=True):
        used = [mine.attributes[f"gen_ai.usage.{way}_tokens"] for way in ("input", "output")]
        assert sum(used) == theirs.attributes["ray_guard.tokens.charged"]  # type: ignore[arg-type]
