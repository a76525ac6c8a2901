from __future__ import annotations

import json
import pickle
import threading
from typing import Any

import pytest

from ray_guard.client import carry, scope
from ray_guard.client.quota import reserve
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


def test_limits_of_tokens_travel_with_the_context(wire: RecordingChannel) -> None:
    """Another node does not know the scopes by their ids."""
    vars(wire).update(
        account="a" * 32, leases=True, quotas={"actor": {"tokens": 9}, "episode": {"tokens": 8}, "call": {"flops": 1e9}}
    )
    with scope.episode(budget={"tokens": 5, "flops": 1e12, "connections": 1}) as episode, scope.turn(1):
        with scope.tool_call("t") as call, scope.chat("m"):
            given = json.loads(json.dumps(scope.context()))
        outside = scope.context()["quotas"]
    actor = ["actor", "", "a" * 32, {"tokens": 9}]
    whole = [actor, ["episode", episode.span, "a" * 32, {"tokens": 5, "flops": 1e12}]]
    assert given["quotas"] == [*whole, ["call", call.span, "a" * 32, {"flops": 1e9}]]
    assert [list(entry) for entry in outside] == whole
    with scope.attach(given):
        assert json.loads(json.dumps(scope.context()))["quotas"] == given["quotas"]
        reserve(tokens=3)
    assert wire.sent("reserve")[-1]["place"]["quotas"] == given["quotas"]


def test_without_a_cluster_a_limited_scope_is_its_own_nodes_alone(wire: RecordingChannel) -> None:
    with scope.episode(budget={"tokens": 5}) as episode:
        assert scope.context()["quotas"] == (("episode", episode.span, "", None),)
    with scope.episode(budget={"connections": 5}):
        assert "quotas" not in scope.context()


@pytest.mark.parametrize("quotas", ["x", [["episode"]], [["episode", "a", "b", 3]], {"episode": 1}])
def test_malformed_limits_in_a_context_are_refused_by_name(quotas: object) -> None:
    with pytest.raises(PolicyError, match=r"context\.quotas"):
        scope.attach({"trace": "a" * 32, "span": "b" * 16, "quotas": quotas})
