from __future__ import annotations

import asyncio
import json
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

import pytest

from ray_guard.client import carry, channel, scope
from ray_guard.client.spans import arguments_digest
from ray_guard.errors import BudgetExceeded, EgressDenied, NotEnforced, PolicyError, RayGuardError, SupervisorLost
from ray_guard.testing import RecordingChannel


def opened(wire: RecordingChannel, name: str) -> dict[str, Any]:
    (found,) = wire.sent("open", name=name)
    return found


def closed(wire: RecordingChannel, name: str) -> dict[str, Any]:
    (found,) = wire.sent("close", span=opened(wire, name)["span"])
    return found


def test_tool_call_is_known_before_it_does_anything(wire: RecordingChannel) -> None:
    with scope.tool_call("bash", {"command": "ls"}) as call:
        assert len(wire.sent("open")) == 1
        assert not wire.sent("close")
        assert carry.current() is call
    message = opened(wire, "execute_tool bash")
    assert re.fullmatch(r"[0-9a-f]{16}", message["span"])
    assert re.fullmatch(r"[0-9a-f]{32}", message["trace"])
    assert message["parent"] is None
    assert message["scope"] == "tool"
    assert message["kind"] == 1
    assert message["attributes"] == {
        "gen_ai.operation.name": "execute_tool",
        "gen_ai.tool.name": "bash",
        "gen_ai.tool.call.id": f"call_{message['span']}",
        "ray_guard.arguments.sha256": arguments_digest({"command": "ls"}),
    }
    assert message["identity"] == {"rl.run.id": "run-1"}
    end = closed(wire, "execute_tool bash")
    assert end["end"] >= message["start"]
    assert (end["status"], end["events"]) == (0, [])


def test_a_rollout_as_the_contract_draws_it(wire: RecordingChannel) -> None:
    with scope.iteration(12), scope.episode(id="r1", group="g1", policy_version="v7", agent="coder") as episode:
        with scope.turn(4):
            with scope.chat("qwen3") as chat:
                chat.usage(10, 3)
            with scope.tool_call("bash", {"command": "ls"}, id="toolu_1"), scope.tool_call("inner"):
                pass
        episode.reward(0.7)
    names = ["rl.iteration", "invoke_agent coder", "rl.turn", "chat qwen3", "execute_tool bash", "execute_tool inner"]
    iteration, rollout, turn, chatting, tool, inner = (opened(wire, name) for name in names)

    assert iteration["parent"] is None
    assert rollout["parent"] is None
    assert rollout["trace"] != iteration["trace"]
    assert rollout["links"] == [[iteration["trace"], iteration["span"]]]
    assert turn["parent"] == rollout["span"]
    assert chatting["parent"] == tool["parent"] == turn["span"]
    assert inner["parent"] == tool["span"]
    assert {m["trace"] for m in (turn, chatting, tool, inner)} == {rollout["trace"]}
    assert (iteration["episode"], rollout["episode"]) == (None, None)
    assert {m["episode"] for m in (turn, chatting, tool, inner)} == {rollout["span"]}
    assert [m["scope"] for m in (iteration, rollout, turn, chatting, tool)] == [
        "iteration",
        "episode",
        "turn",
        "chat",
        "tool",
    ]
    assert chatting["kind"] == 3

    assert iteration["identity"] == {"rl.run.id": "run-1", "rl.iteration": 12}
    whole = {
        "rl.run.id": "run-1",
        "rl.iteration": 12,
        "rl.rollout.id": "r1",
        "rl.group.id": "g1",
        "rl.policy.version": "v7",
    }
    assert rollout["identity"] == whole
    assert turn["identity"] == chatting["identity"] == tool["identity"] == {**whole, "rl.turn": 4}

    assert chatting["attributes"] == {"gen_ai.operation.name": "chat", "gen_ai.request.model": "qwen3"}
    assert closed(wire, "chat qwen3")["attributes"] == {
        "gen_ai.usage.input_tokens": 10,
        "gen_ai.usage.output_tokens": 3,
    }
    assert tool["attributes"]["gen_ai.tool.call.id"] == "toolu_1"
    assert rollout["attributes"] == {"gen_ai.operation.name": "invoke_agent", "gen_ai.agent.name": "coder"}
    end = closed(wire, "invoke_agent coder")
    assert end["attributes"] == {"rl.reward.score": 0.7}
    ((name, _, details),) = end["events"]
    assert name == "gen_ai.evaluation.result"
    assert details == {"gen_ai.evaluation.name": "reward", "gen_ai.evaluation.score.value": 0.7}


def test_the_iteration_may_be_a_number_a_scope_or_a_context(wire: RecordingChannel) -> None:
    with scope.iteration(3) as iteration:
        given = scope.context()
    for n, value in enumerate((3, iteration, given)):
        with scope.episode(id=f"r{n}", iteration=value, agent=f"a{n}"):
            pass
    plain, by_scope, by_context = (opened(wire, f"invoke_agent a{n}") for n in range(3))
    assert all(m["identity"]["rl.iteration"] == 3 for m in (plain, by_scope, by_context))
    assert plain["links"] == []
    assert by_scope["links"] == by_context["links"] == [[iteration.trace, iteration.span]]


def test_an_enclosing_iteration_given_again_is_linked_once(wire: RecordingChannel) -> None:
    with scope.iteration(3) as iteration, scope.episode(iteration=iteration):
        pass
    assert len(opened(wire, "invoke_agent agent")["links"]) == 1


def test_an_episode_without_id_has_a_fresh_one(wire: RecordingChannel) -> None:
    with scope.episode() as first, scope.tool_call("x"):
        pass
    with scope.episode() as second:
        pass
    assert first.id != second.id
    assert opened(wire, "execute_tool x")["identity"]["rl.rollout.id"] == first.id


def test_an_episode_within_another_is_a_rollout_of_its_own(wire: RecordingChannel) -> None:
    with scope.episode(id="outer", group="g", agent="a"), scope.turn(2), scope.episode(id="inner", agent="b") as inner:
        pass
    message = opened(wire, "invoke_agent b")
    assert message["identity"] == {"rl.run.id": "run-1", "rl.rollout.id": "inner"}
    assert message["links"] == [[opened(wire, "rl.turn")["trace"], opened(wire, "rl.turn")["span"]]]
    assert message["trace"] == inner.trace != opened(wire, "invoke_agent a")["trace"]


def test_names_and_identities_of_any_type_are_written(wire: RecordingChannel) -> None:
    strange: Any = {"id": 17, "group": ("a", 1), "iteration": "warm-up", "policy_version": 5, "agent": "x" * 1000}
    first: Any = "first"
    nameless: Any = None
    with scope.episode(**strange), scope.turn(first), scope.tool_call(nameless), scope.chat("m\ud800"):
        pass
    (tool,) = wire.sent("open", scope="tool")
    assert tool["name"] == "execute_tool None"
    assert tool["identity"] == {
        "rl.run.id": "run-1",
        "rl.iteration": "warm-up",
        "rl.rollout.id": "17",
        "rl.group.id": "('a', 1)",
        "rl.policy.version": "5",
        "rl.turn": "first",
    }


def test_an_exception_is_recorded_and_raised_unchanged(wire: RecordingChannel) -> None:
    error = ValueError("no such file")
    with pytest.raises(ValueError, match="no such file") as caught, scope.tool_call("bash"):
        raise error
    assert caught.value is error
    end = closed(wire, "execute_tool bash")
    assert end["status"] == 2
    assert end["message"] == "no such file"
    assert end["attributes"] == {"error.type": "ValueError"}
    ((name, _, details),) = end["events"]
    assert name == "exception"
    assert details["exception.type"] == "ValueError"
    assert "test_scope.py" in details["exception.stacktrace"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_what_is_no_exception_ends_the_span_too(wire: RecordingChannel, error: BaseException) -> None:
    with pytest.raises(type(error)), scope.tool_call("bash"):
        raise error
    assert closed(wire, "execute_tool bash")["status"] == 2


def test_what_was_cancelled_is_recorded_and_no_error(wire: RecordingChannel) -> None:
    with pytest.raises(asyncio.CancelledError), scope.tool_call("bash"):
        raise asyncio.CancelledError("enough")
    end = closed(wire, "execute_tool bash")
    assert (end["status"], end["message"], end["attributes"]) == (0, "", {"ray_guard.cancelled": True})
    ((name, _, details),) = end["events"]
    assert (name, details["exception.message"]) == ("exception", "enough")
    assert details["exception.type"].endswith("CancelledError")


def test_a_generator_that_is_given_up_is_no_error(wire: RecordingChannel) -> None:
    def steps() -> Iterator[int]:
        with scope.tool_call("stream"):
            yield 1

    stream = steps()
    next(stream)
    stream.close()
    assert closed(wire, "execute_tool stream")["status"] == 0


def test_a_span_is_never_dropped_for_an_attribute(wire: RecordingChannel) -> None:
    class Hostile:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(name)

    class BadKey:
        def __str__(self) -> str:
            raise RuntimeError("no")

        def __hash__(self) -> int:
            return 1

    with scope.tool_call("x", {"a": Hostile(), BadKey(): 1}) as call:
        call.set_attribute("hostile", Hostile())
        call.set_attribute("nan", float("nan"))
        call.add_event("note", {"v": {1, 2}})
    end = closed(wire, "execute_tool x")
    assert set(end["attributes"]) == {"hostile", "nan"}
    assert end["attributes"]["nan"] == "nan"
    assert end["events"][0][2] == {"v": "set"}


def test_attributes_and_events_are_bounded(wire: RecordingChannel) -> None:
    with scope.tool_call("x") as call:
        for n in range(1000):
            call.set_attribute(f"a{n}", n)
        call.set_attribute("a5", "again")
        for n in range(1000):
            call.add_event(f"e{n}")
    names = [event[0] for event in closed(wire, "execute_tool x")["events"]]
    assert len(names) == 128
    assert names[-1] == "e999"
    attributes = closed(wire, "execute_tool x")["attributes"]
    assert len(attributes) == 129
    assert attributes["a5"] == "again"
    assert attributes["ray_guard.truncated"] is True


def test_a_scope_is_entered_once(wire: RecordingChannel) -> None:
    with scope.turn(1) as turn:
        pass
    with pytest.raises(RuntimeError, match="entered once"):
        turn.__enter__()
    assert len(wire.sent("open")) == 1


async def test_scopes_are_async_context_managers_too(wire: RecordingChannel) -> None:
    async with scope.iteration(1), scope.episode() as episode, scope.turn(1), scope.chat("m"), scope.tool_call("t"):
        assert scope.context()["episode"] == episode.span
    assert len(wire.sent("close")) == 5


def test_content_is_kept_only_where_asked_for(wire: RecordingChannel, monkeypatch: pytest.MonkeyPatch) -> None:
    with scope.tool_call("quiet", {"command": "secret"}) as call:
        call.result("secret result")
    monkeypatch.setenv("RAY_GUARD_CAPTURE_CONTENT", "1")
    long = {"text": "y" * 50_000}
    with scope.episode(), scope.tool_call("loud", {"command": "secret"}) as call:
        call.result({"b": 1, "a": [2]})
    with scope.tool_call("long", long):
        pass
    assert "secret" not in json.dumps([opened(wire, "execute_tool quiet"), closed(wire, "execute_tool quiet")])
    assert opened(wire, "execute_tool loud")["attributes"]["gen_ai.tool.call.arguments"] == '{"command":"secret"}'
    assert closed(wire, "execute_tool loud")["attributes"]["gen_ai.tool.call.result"] == '{"a":[2],"b":1}'
    attributes = opened(wire, "execute_tool long")["attributes"]
    assert len(attributes["gen_ai.tool.call.arguments"]) == 8192
    assert attributes["ray_guard.arguments.sha256"] == arguments_digest(long)


# --- rewards, budgets, usage --------------------------------------------------------------------------------------


def test_the_last_reward_counts_and_each_is_an_event(wire: RecordingChannel) -> None:
    with scope.episode() as episode:
        episode.reward(1)
        episode.reward(float("nan"))
        episode.reward(-0.5)
        for wrong in ("good", None):
            with pytest.raises((TypeError, ValueError)):
                episode.reward(wrong)  # type: ignore[arg-type]
    end = closed(wire, "invoke_agent agent")
    assert end["attributes"] == {"rl.reward.score": -0.5}
    assert [event[2]["gen_ai.evaluation.score.value"] for event in end["events"]] == [1.0, "nan", -0.5]


def test_a_budget_travels_in_the_limits_own_units(wire: RecordingChannel) -> None:
    with scope.episode(budget={"egress_bytes": "20MiB", "tokens": 5000}):
        pass
    with scope.tool_call("x"):
        pass
    assert opened(wire, "invoke_agent agent")["budget"] == {"egress_bytes": 20 << 20, "tokens": 5000}
    assert opened(wire, "execute_tool x")["budget"] is None


@pytest.mark.parametrize(
    ("budget", "key"),
    [
        ({"egress_bites": 1}, "budget.egress_bites"),
        ({"egress_bytes": "20 parsecs"}, "budget.egress_bytes"),
        ([1], "budget"),
        (7, "budget"),
    ],
)
def test_a_wrong_budget_names_its_key(budget: Any, key: str) -> None:
    with pytest.raises(PolicyError) as caught:
        scope.episode(budget=budget)
    assert caught.value.key == key


def test_usage_adds_up_and_refuses_what_is_no_count(wire: RecordingChannel) -> None:
    with scope.chat("m", attributes={"gen_ai.provider.name": "vllm"}) as chat:
        chat.usage(5, 1)
        chat.usage(input_tokens=6, output_tokens=2)
        for wrong in (-1, 1.5):
            with pytest.raises(ValueError, match="whole number"):
                chat.usage(wrong, 0)  # type: ignore[arg-type]
    assert opened(wire, "chat m")["attributes"]["gen_ai.provider.name"] == "vllm"
    assert closed(wire, "chat m")["attributes"] == {"gen_ai.usage.input_tokens": 11, "gen_ai.usage.output_tokens": 3}


def test_a_late_reward_is_sent_from_anywhere(wire: RecordingChannel) -> None:
    scope.record_reward("r1", 0.25)
    assert wire.sent("reward") == [{"op": "reward", "episode": "r1", "value": 0.25}]


def test_a_reward_that_would_be_lost_is_refused() -> None:
    with pytest.raises(NotEnforced, match="lost"):
        scope.record_reward("r1", 0.25)


# --- violations ---------------------------------------------------------------------------------------------------

DENIED = {
    "kind": "egress",
    "limit": None,
    "value": None,
    "span": "1" * 16,
    "time": 5,
    "reason": "no_rule",
    "destination": "tcp://198.51.100.7:22",
}
OVER = {**DENIED, "kind": "egress_bytes", "limit": 100, "value": 150, "reason": "call budget"}


def test_violations_are_asked_for_by_episode(wire: RecordingChannel) -> None:
    wire.answers["violations"] = {"violations": [DENIED]}
    assert scope.violations() == [DENIED]
    with scope.episode() as episode, scope.tool_call("x"):
        assert scope.violations() == [DENIED]
    assert episode.violations() == [DENIED], "a trainer asks after the end"
    assert [m["episode"] for m in wire.sent("violations")] == [None, episode.span, episode.span]


def test_violations_raise_the_named_error(wire: RecordingChannel) -> None:
    wire.answers["violations"] = {"violations": []}
    assert scope.violations(raise_=True) == []
    wire.answers["violations"] = {"violations": [DENIED, OVER]}
    with pytest.raises(EgressDenied) as denied:
        scope.violations(raise_=True)
    assert denied.value.destination == "tcp://198.51.100.7:22"
    assert denied.value.reason == "no_rule"
    wire.answers["violations"] = {"violations": [OVER]}
    with pytest.raises(BudgetExceeded) as over:
        scope.violations(raise_=True)
    assert (over.value.kind, over.value.value, over.value.limit, over.value.scope) == ("egress_bytes", 150, 100, "call")
    wire.answers["violations"] = {"violations": [{"kind": "survivor", "reason": "unkillable"}]}
    with pytest.raises(RayGuardError, match="survivor: unkillable"):
        scope.violations(raise_=True)


def test_no_guard_is_not_no_violation() -> None:
    with pytest.raises(NotEnforced, match="not guarded"):
        scope.violations()


def test_an_answer_that_is_nonsense_is_no_answer(wire: RecordingChannel) -> None:
    wire.answers["violations"] = {"violations": "none"}
    with pytest.raises(SupervisorLost):
        scope.violations()


# --- without a guard, without a supervisor ------------------------------------------------------------------------


def test_without_a_guard_scopes_are_only_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_GUARD_RUN_ID", "run-9")
    with scope.episode(id="r1") as episode, scope.tool_call("x", {"a": 1}) as call:
        call.result(5)
        call.set_attribute("a", 1)
        episode.reward(1.0)
        place = scope.context()
    assert place["identity"] == {"rl.run.id": "run-9", "rl.rollout.id": "r1"}
    assert (place["span"], place["call"], place["episode"]) == (call.span, call.span, episode.span)


def test_an_observer_is_asked_at_most_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(channel, "observer", lambda: asked.append(1))
    for _ in range(50):
        with scope.tool_call("x"):
            pass
    assert len(asked) == 1


def test_an_observer_that_fails_breaks_nothing_and_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recording = RecordingChannel()
    monkeypatch.setattr(channel, "observer", lambda: recording)
    with scope.tool_call("before"):
        recording.lost = True
    for _ in range(3):
        with scope.tool_call("after"):
            pass
    assert [m["name"] for m in recording.sent("open")] == ["execute_tool before"]
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert caplog.records[0].name == "ray_guard"


def test_an_observer_that_cannot_be_had_breaks_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def observer() -> None:
        raise NotEnforced(["supervisor"], "cannot be started")

    monkeypatch.setattr(channel, "observer", observer)
    for _ in range(3):
        with scope.tool_call("x"):
            pass
    assert len(caplog.records) == 1


def test_in_a_confined_process_no_tool_starts_without_evidence(wire: RecordingChannel) -> None:
    wire.lost = True
    ran = []
    with pytest.raises(SupervisorLost), scope.tool_call("x"):
        ran.append(1)
    assert not ran
    assert carry.current() is None


def test_the_tools_own_error_comes_before_the_supervisors(wire: RecordingChannel) -> None:
    def tool() -> None:
        with scope.tool_call("x"):
            wire.lost = True
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        tool()
    wire.lost = False
    with pytest.raises(SupervisorLost), scope.tool_call("y"):
        wire.lost = True
    assert carry.current() is None


def test_a_process_confined_within_a_scope_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    later = RecordingChannel()
    with scope.episode():
        monkeypatch.setattr(channel, "current", lambda: later)
        with scope.tool_call("x"):
            pass
    assert [m["op"] for m in later.messages] == ["open", "close"]


# --- processes ----------------------------------------------------------------------------------------------------

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_traceparent_of_the_environment_is_parent_or_link(
    wire: RecordingChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACEPARENT", PARENT)
    with scope.tool_call("x"), scope.tool_call("y"):
        pass
    with scope.episode():
        pass
    tool, nested = opened(wire, "execute_tool x"), opened(wire, "execute_tool y")
    rollout = opened(wire, "invoke_agent agent")
    assert (tool["trace"], tool["parent"]) == (PARENT[3:35], PARENT[36:52])
    assert nested["parent"] == tool["span"]
    assert rollout["trace"] != PARENT[3:35]
    assert rollout["parent"] is None
    assert rollout["links"] == [[PARENT[3:35], PARENT[36:52]]]


@pytest.mark.parametrize(
    "text", ["", "nonsense", PARENT[:-3], PARENT.upper(), f"ff{PARENT[2:]}", "00-" + "0" * 32 + PARENT[35:]]
)
def test_a_traceparent_that_is_none_is_ignored(
    wire: RecordingChannel, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("TRACEPARENT", text)
    with scope.tool_call("x"):
        pass
    assert opened(wire, "execute_tool x")["parent"] is None


def test_traceparent_for_children() -> None:
    assert scope.traceparent() is None
    with scope.tool_call("x") as call:
        assert scope.traceparent() == f"00-{call.trace}-{call.span}-01"


def test_a_forked_child_keeps_its_place_but_does_not_end_its_parents_span(wire: RecordingChannel) -> None:
    reading, writing = os.pipe()
    with scope.episode(id="r1"), scope.tool_call("outer") as call:
        child = os.fork()
        if child == 0:
            try:
                wire.messages.clear()
                with scope.tool_call("in child"):
                    pass
                call.__exit__(None, None, None)
                os.write(writing, json.dumps(wire.messages).encode())
            finally:
                os._exit(0)
        os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        messages = json.loads(answer.read())
    assert [m["op"] for m in messages] == ["open", "close"], "the child's own span, and nothing of its parent's"
    assert messages[0]["parent"] == call.span
    assert messages[0]["identity"]["rl.rollout.id"] == "r1"
    assert closed(wire, "execute_tool outer")["status"] == 0


def test_scopes_that_end_in_any_order_never_bring_back_one_that_ended(wire: RecordingChannel) -> None:
    first, second = scope.tool_call("a"), scope.tool_call("b")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert carry.current() is second
    second.__exit__(None, None, None)
    assert carry.current() is None
