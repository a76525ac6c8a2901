from __future__ import annotations

import json
import pickle
import threading
from typing import Any

import pytest

from ray_guard.client import carry, scope
from ray_guard.errors import PolicyError
from ray_guard.testing import RecordingChannel

TRACE, SPAN = "a" * 32, "b" * 16


def test_context_is_plain_data_that_leads_back(wire: RecordingChannel) -> None:
    rollout = scope.episode(id="r1", group="g", iteration=3, policy_version="v")
    with rollout, scope.turn(2), scope.tool_call("x") as call:
        given = json.loads(json.dumps(scope.context()))
    assert given == {
        "trace": call.trace,
        "span": call.span,
        "identity": {
            "rl.run.id": "run-1",
            "rl.iteration": 3,
            "rl.rollout.id": "r1",
            "rl.group.id": "g",
            "rl.policy.version": "v",
            "rl.turn": 2,
        },
        "episode": call.episode,
        "call": call.span,
        "scope": "tool",
        "sampled": True,
        "capture": False,
    }

    def elsewhere() -> None:
        with scope.attach(given), scope.chat("m"):
            pass
        assert carry.current() is None

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    (message,) = wire.sent("open", name="chat m")
    assert (message["trace"], message["parent"], message["episode"]) == (call.trace, call.span, call.episode)
    assert message["identity"] == given["identity"]


def test_a_context_from_outside_of_any_scope_changes_nothing(wire: RecordingChannel) -> None:
    nowhere = scope.context()
    assert nowhere["trace"] is None
    assert nowhere["identity"] == {"rl.run.id": "run-1"}
    with scope.turn(1) as turn, scope.attach(nowhere):
        assert carry.current() is turn


async def test_attach_is_async_too_and_restores_what_was() -> None:
    with scope.turn(1) as turn:
        async with scope.attach({"trace": TRACE, "span": SPAN}):
            assert scope.context()["trace"] == TRACE
        assert carry.current() is turn


def test_an_attached_episode_may_be_asked_about(wire: RecordingChannel) -> None:
    wire.answers["violations"] = {"violations": []}
    with scope.attach({"trace": TRACE, "span": SPAN, "episode": "c" * 16}):
        assert scope.violations() == []
    assert wire.sent("violations")[0]["episode"] == "c" * 16


def test_an_iteration_from_another_actor_is_linked_to(wire: RecordingChannel) -> None:
    with scope.iteration(5) as iteration:
        given = scope.context()
    with scope.attach(given), scope.episode(id="r1"):
        pass
    (message,) = wire.sent("open", scope="episode")
    assert message["links"] == [[iteration.trace, iteration.span]]
    assert message["identity"]["rl.iteration"] == 5


@pytest.mark.parametrize(
    ("given", "key"),
    [
        (None, "context"),
        ("garbage", "context"),
        ([1], "context"),
        ({"trace": TRACE}, "context.span"),
        ({"span": SPAN}, "context.trace"),
        ({"trace": TRACE.upper(), "span": SPAN}, "context.trace"),
        ({"trace": "0" * 32, "span": SPAN}, "context.trace"),
        ({"trace": TRACE, "span": "b" * 15}, "context.span"),
        ({"trace": TRACE, "span": 7}, "context.span"),
        ({"trace": TRACE, "span": SPAN, "episode": "x" * 16}, "context.episode"),
        ({"trace": TRACE, "span": SPAN, "call": f'{SPAN}"'}, "context.call"),
        ({"trace": TRACE, "span": SPAN, "identity": [1]}, "context.identity"),
        ({"trace": TRACE, "span": SPAN, "identity": {"other": 1}}, "context.identity"),
        ({"trace": TRACE, "span": SPAN, "identity": {"rl.turn": [1]}}, "context.identity.rl.turn"),
        ({"trace": TRACE, "span": SPAN, "identity": {"rl.turn": 2**70}}, "context.identity.rl.turn"),
        ({"trace": TRACE, "span": SPAN, "identity": {"rl.group.id": "x" * 9000}}, "context.identity.rl.group.id"),
    ],
)
def test_garbage_is_refused_by_key_value_and_remedy(given: Any, key: str) -> None:
    with pytest.raises(PolicyError) as caught:
        scope.attach(given)
    assert caught.value.key == key
    assert caught.value.remedy
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), PolicyError)
