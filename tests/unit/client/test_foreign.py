"""Where others say that a call comes from is understood, and what is malformed is ignored and said to be."""

from __future__ import annotations

import logging
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import pytest

from ray_guard.client import carry, foreign, scope, segments
from ray_guard.client.decorator import tool
from ray_guard.client.spans import arguments_digest
from ray_guard.testing import RecordingChannel

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"
EAGLEEYE = "ray_guard.eagleeye.trace_id"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "known", segments._Known().of)
    monkeypatch.setattr(scope, "known", segments.known)
    monkeypatch.setattr(foreign, "_followed", [])


def opened(wire: RecordingChannel, name: str = "execute_tool x") -> dict[str, Any]:
    (found,) = wire.sent("open", name=name)
    return found


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (PARENT, (TRACE, SPAN, True)),
        (f" {PARENT}\n", (TRACE, SPAN, True)),
        (f"{PARENT[:-1]}0", (TRACE, SPAN, False)),
        (f"{PARENT[:-2]}03", (TRACE, SPAN, True)),
        (f"cc{PARENT[2:]}-what-the-future-holds", (TRACE, SPAN, True)),
        (f"{PARENT}-more", None),
        (f"ff{PARENT[2:]}", None),
        (PARENT.upper(), None),
        (f"00-{'0' * 32}-{SPAN}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        ("", None),
        (None, None),
    ],
)
def test_traceparent_is_read_as_w3c_has_it(text: str | None, place: object) -> None:
    assert foreign.parse_traceparent(text) == place


def test_a_malformed_variable_is_said_once_with_what_would_be_right(
    wire: RecordingChannel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRACEPARENT", "00-nonsense-01")
    for _ in range(3):
        with scope.tool_call("y"):
            pass
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.exc_info is None
    for part in ("TRACEPARENT", "'00-nonsense-01'", "ignored", "00-<32 hex digits>"):
        assert part in record.getMessage()
    assert all(each["parent"] is None for each in wire.sent("open"))


def test_an_empty_variable_is_none_and_no_reason_to_say_anything(
    wire: RecordingChannel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRACEPARENT", " ")
    with scope.tool_call("x"):
        pass
    assert not caplog.records


class DataProto:
    """As ROLL's: what matters here is its ``meta_info``."""

    def __init__(self, meta_info: dict[str, Any]) -> None:
        self.meta_info = meta_info


@pytest.mark.parametrize(
    "given",
    [
        {"_otel_ctx": {"traceparent": PARENT}},
        {"_otel_ctx": {"traceparent": PARENT, "tracestate": "a=b"}, "seed": 42, "global_step": 7},
        DataProto({"_otel_ctx": {"traceparent": PARENT}}),
        {"traceparent": PARENT},
        {"Traceparent": PARENT, "Accept": "*/*"},
        {"traceparent": PARENT.encode()},
        foreign.Origin((TRACE, SPAN, True)),
    ],
)
def test_what_others_say_leads_on(wire: RecordingChannel, given: Any) -> None:
    with scope.attach(given), scope.tool_call("x"), scope.tool_call("inner"):
        pass
    with scope.attach(given), scope.episode(id="r1", iteration=None):
        pass
    assert carry.current() is None
    assert (opened(wire)["trace"], opened(wire)["parent"]) == (TRACE, SPAN)
    assert opened(wire)["identity"] == {"rl.run.id": "run-1"}
    assert opened(wire, "execute_tool inner")["parent"] == opened(wire)["span"]
    rollout = opened(wire, "invoke_agent agent")
    assert (rollout["parent"], rollout["links"]) == (None, [[TRACE, SPAN]]), "a rollout is a trace of its own"


def test_an_iteration_may_be_given_in_rolls_way(wire: RecordingChannel) -> None:
    with scope.episode(iteration={"_otel_ctx": {"traceparent": PARENT}}):
        pass
    assert opened(wire, "invoke_agent agent")["links"] == [[TRACE, SPAN]]


@pytest.mark.parametrize(
    "given",
    [
        {"_otel_ctx": {}},  # as ROLL has it where tracing is off
        {"_otel_ctx": None},
        {"_otel_ctx": "text"},
        {"_otel_ctx": {"traceparent": None}},
        {"_otel_ctx": {"traceparent": 7}},
        {"_otel_ctx": {1: 2}},
        DataProto({"_otel_ctx": {}}),
    ],
)
def test_what_says_nothing_changes_nothing(wire: RecordingChannel, given: Any) -> None:
    with scope.turn(1) as turn, scope.attach(given), scope.tool_call("x"):
        pass
    assert opened(wire)["parent"] == turn.span
    with scope.attach(given):
        assert carry.current() is None


def test_what_is_malformed_is_ignored_and_said(wire: RecordingChannel, caplog: pytest.LogCaptureFixture) -> None:
    with scope.attach({"_otel_ctx": {"traceparent": "x" * 500}}), scope.tool_call("x"):
        pass
    with scope.attach({"eagleeye-traceid": "a\nb"}), scope.tool_call("y"):
        pass
    assert opened(wire)["parent"] is None
    assert EAGLEEYE not in opened(wire, "execute_tool y")["identity"]
    first, second = caplog.records
    assert "_otel_ctx: traceparent" in first.getMessage()
    assert len(first.getMessage()) < 500
    assert "eagleeye-traceid 'a\\nb' is ignored" in second.getMessage()


def test_within_an_episode_its_budget_and_identity_stay(wire: RecordingChannel) -> None:
    with scope.episode(id="r1", group="g") as episode, scope.attach({"traceparent": PARENT}), scope.tool_call("x"):
        pass
    found = opened(wire)
    assert (found["trace"], found["parent"], found["episode"]) == (TRACE, SPAN, episode.span)
    assert found["identity"]["rl.rollout.id"] == "r1"


def test_a_tool_that_is_given_rolls_context_does_not_count_it_among_its_arguments(wire: RecordingChannel) -> None:
    @tool
    def x(command: str, **more: Any) -> str:
        return command

    x("ls", _otel_ctx={"traceparent": PARENT})
    assert (opened(wire)["trace"], opened(wire)["parent"]) == (TRACE, SPAN)
    assert opened(wire)["attributes"]["ray_guard.arguments.sha256"] == arguments_digest({"command": "ls"})
    with scope.turn(1) as turn:
        x("ls", _otel_ctx={"traceparent": PARENT})
    assert wire.sent("open")[-1]["parent"] == turn.span, "what encloses it here is nearer"


def test_opentelemetrys_own_carriers_are_read(wire: RecordingChannel) -> None:
    """What ROLL's two functions do is ``inject`` into a dict and ``extract`` from it: both directions, with ours."""
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.propagate import extract, inject
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import get_current_span

    provider = TracerProvider(shutdown_on_exit=False)
    carrier: dict[str, str] = {}
    with provider.get_tracer("roll").start_as_current_span("step") as span:
        inject(carrier)
    with scope.attach({"_otel_ctx": carrier}), scope.tool_call("x") as call:
        out: dict[str, str] = {}
        inject(out)
    theirs = span.get_span_context()
    assert (opened(wire)["trace"], opened(wire)["parent"]) == (f"{theirs.trace_id:032x}", f"{theirs.span_id:016x}")
    assert get_current_span(extract(out)).get_span_context().span_id == int(call.span, 16)


# --- EagleEye -----------------------------------------------------------------------------------------------------


def test_an_eagleeye_id_is_on_every_span_below(wire: RecordingChannel) -> None:
    with scope.attach({"EagleEye-TraceId": "eagle-1"}):
        assert carry.current() is None
        with scope.tool_call("x"), scope.tool_call("y"):
            given = scope.context()
        with scope.episode(id="r"), scope.turn(1):
            pass
        with scope.iteration(1):
            pass
    with scope.tool_call("outside"):
        pass
    *below, outside = wire.sent("open")
    assert len(below) == 5
    assert {each["identity"][EAGLEEYE] for each in below} == {"eagle-1"}
    assert EAGLEEYE not in outside["identity"]
    assert given["identity"][EAGLEEYE] == "eagle-1", "and goes on to other actors"


def test_with_a_span_and_within_a_scope(wire: RecordingChannel) -> None:
    with scope.attach({"traceparent": PARENT, "eagleeye-traceid": "eagle-2"}), scope.tool_call("x"):
        pass
    assert opened(wire)["parent"] == SPAN
    assert opened(wire)["identity"][EAGLEEYE] == "eagle-2"
    with scope.turn(3) as turn, scope.attach({"eagleeye-traceid": "eagle-3"}), scope.tool_call("y"):
        pass
    assert opened(wire, "execute_tool y")["parent"] == turn.span
    assert opened(wire, "execute_tool y")["identity"] == {"rl.run.id": "run-1", "rl.turn": 3, EAGLEEYE: "eagle-3"}


def test_a_server_that_keeps_it_in_a_variable_is_followed(wire: RecordingChannel) -> None:
    variable: ContextVar[str] = ContextVar("trace_id", default="")
    foreign.follow(variable)
    foreign.follow(variable)
    with scope.tool_call("x"):
        pass
    assert EAGLEEYE not in opened(wire)["identity"]
    token = variable.set("eagle-4")
    with scope.tool_call("y"):
        pass
    variable.reset(token)
    assert opened(wire, "execute_tool y")["identity"][EAGLEEYE] == "eagle-4"


def test_looking_for_it_among_arguments_runs_none_of_their_code() -> None:
    class Hostile:
        def __getattribute__(self, name: str) -> Any:
            raise RuntimeError(name)

    class Lazy:
        @property
        def meta_info(self) -> Any:
            raise RuntimeError("costly")

    arguments = (1, "text", None, Hostile(), Lazy(), SimpleNamespace(meta_info=3), {"a": 1}, DataProto({"a": 1}))
    assert foreign.find(arguments) is None
    found = foreign.find((*arguments, DataProto({"_otel_ctx": {"traceparent": PARENT}})))
    assert found == foreign.Origin((TRACE, SPAN, True))
