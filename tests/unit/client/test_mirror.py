"""With the real OpenTelemetry SDK."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from opentelemetry import baggage, context, propagate, trace
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased, Sampler, SamplingResult, TraceIdRatioBased

from ray_guard import __version__
from ray_guard.client import carry, mirror, scope
from ray_guard.client.decorator import tool
from ray_guard.testing import RecordingChannel


class CountingIds(IdGenerator):
    """The user's own generator: his spans use it, ours must not."""

    def __init__(self) -> None:
        self.used = 0

    def generate_span_id(self) -> int:
        self.used += 1
        return self.used

    def generate_trace_id(self) -> int:
        self.used += 1
        return self.used

    def is_trace_id_random(self) -> bool:
        return False


class Backend:
    def __init__(self, provider: TracerProvider, exporter: InMemorySpanExporter, ids: CountingIds) -> None:
        self.provider = provider
        self.exporter = exporter
        self.ids = ids
        self.tracer = provider.get_tracer("user")

    def span(self, name: str) -> ReadableSpan:
        (found,) = [span for span in self.exporter.get_finished_spans() if span.name == name]
        return found

    def names(self) -> list[str]:
        return [span.name for span in self.exporter.get_finished_spans()]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Backend]:
    def provider(sampler: Sampler | None = None) -> Backend:
        ids, exporter = CountingIds(), InMemorySpanExporter()
        made = TracerProvider(sampler=sampler, id_generator=ids, shutdown_on_exit=False)
        made.add_span_processor(SimpleSpanProcessor(exporter))
        # What set_tracer_provider does, but it does so once in a process.
        monkeypatch.setattr(trace, "_TRACER_PROVIDER", made)
        return Backend(made, exporter, ids)

    return provider


@pytest.fixture
def backend(make: Callable[..., Backend]) -> Backend:
    return make()


@pytest.fixture(autouse=True)
def otel_context_is_restored() -> Iterator[None]:
    before = context.get_current()
    yield
    assert trace.get_current_span(context.get_current()) is trace.get_current_span(before)


def ids(span: ReadableSpan) -> tuple[str, str]:
    assert span.context is not None
    return mirror.hex_ids(span.context)


def opened(wire: RecordingChannel, name: str) -> dict[str, Any]:
    (found,) = wire.sent("open", name=name)
    return found


# --- our spans in the user's backend ------------------------------------------------------------------------------


def test_our_spans_reach_the_users_backend_with_the_same_ids(wire: RecordingChannel, backend: Backend) -> None:
    with scope.iteration(7), scope.episode(id="r1", group="g", agent="coder") as episode, scope.turn(1):
        with scope.tool_call("bash", {"a": 1}) as call:
            call.set_attribute("extra", 5)
        episode.reward(0.5)
    for message in wire.sent("open"):
        mirrored = backend.span(message["name"])
        assert ids(mirrored) == (message["trace"], message["span"])
        parent = None if mirrored.parent is None else f"{mirrored.parent.span_id:016x}"
        assert parent == message["parent"]
        assert mirrored.start_time == message["start"]
        assert mirrored.attributes is not None
        assert {**message["attributes"], **message["identity"]}.items() <= dict(mirrored.attributes).items()
        (end,) = wire.sent("close", span=message["span"])
        assert mirrored.end_time == end["end"]
    assert backend.span("execute_tool bash").attributes["extra"] == 5  # type: ignore[index]
    rollout = backend.span("invoke_agent coder")
    assert rollout.attributes["rl.reward.score"] == 0.5  # type: ignore[index]
    assert rollout.events[0].name == "gen_ai.evaluation.result"
    assert ids(backend.span("rl.iteration")) == mirror.hex_ids(rollout.links[0].context)
    assert backend.ids.used == 0, "the user's id generator is not used for ours"


def test_errors_are_mirrored(wire: RecordingChannel, backend: Backend) -> None:
    with pytest.raises(ValueError, match="bad"), scope.tool_call("x"):
        raise ValueError("bad")
    mirrored = backend.span("execute_tool x")
    assert mirrored.status.status_code is trace.StatusCode.ERROR
    assert mirrored.status.description == "bad"
    assert mirrored.events[0].name == "exception"
    assert mirrored.attributes["error.type"] == "ValueError"  # type: ignore[index]


def test_without_a_channel_the_mirror_alone_works(backend: Backend) -> None:
    with scope.episode(id="r1"), scope.tool_call("x"):
        pass
    assert backend.names() == ["execute_tool x", "invoke_agent agent"]


async def test_generators_do_not_leak_the_otel_context_either(wire: RecordingChannel, backend: Backend) -> None:
    @tool
    def stream() -> Iterator[int]:
        with backend.tracer.start_as_current_span("inner"):
            yield trace.get_current_span().get_span_context().span_id
            yield trace.get_current_span().get_span_context().span_id

    seen = []
    for span_id in stream():
        seen.append(span_id)
        assert not trace.get_current_span().get_span_context().is_valid
    inner = backend.span("inner")
    assert seen == [inner.context.span_id] * 2  # type: ignore[union-attr]
    assert f"{inner.parent.span_id:016x}" == opened(wire, "execute_tool stream")["span"]  # type: ignore[union-attr]


# --- samplers -----------------------------------------------------------------------------------------------------


def test_the_users_sampler_is_obeyed_and_evidence_is_not_sampled(
    wire: RecordingChannel, make: Callable[..., Backend]
) -> None:
    backend = make(ParentBased(ALWAYS_OFF))
    with scope.episode(), scope.tool_call("x") as call:
        held = trace.get_current_span().get_span_context()
        assert mirror.hex_ids(held) == (call.trace, call.span)
        assert not held.trace_flags.sampled
        assert scope.traceparent().endswith("-00")  # type: ignore[union-attr]
        assert scope.context()["sampled"] is False
    assert backend.names() == []
    assert len(wire.sent("open")) == len(wire.sent("close")) == 2


def test_a_ratio_samples_whole_rollouts(wire: RecordingChannel, make: Callable[..., Backend]) -> None:
    backend = make(ParentBased(TraceIdRatioBased(0.5)))
    for n in range(40):
        with scope.episode(id=str(n)), scope.turn(1), scope.tool_call("x"):
            pass
    assert 0 < len(backend.names()) < 120
    assert len(backend.names()) % 3 == 0
    assert len(wire.sent("open")) == 120


# --- the user's spans ---------------------------------------------------------------------------------------------


def test_the_users_spans_inside_get_identity_and_are_journaled(wire: RecordingChannel, backend: Backend) -> None:
    with scope.episode(id="r1", group="g") as episode, scope.turn(2), scope.tool_call("outer") as outer:
        span = backend.tracer.start_span("step", kind=trace.SpanKind.PRODUCER, attributes={"n": 1, "list": ["a", "b"]})
        with trace.use_span(span, end_on_exit=True):
            span.add_event("note", {"k": "v"})
            span.set_attribute("later", 2.5)
            with scope.tool_call("inner"):
                pass
    identity = {"rl.run.id": "run-1", "rl.rollout.id": "r1", "rl.group.id": "g", "rl.turn": 2}
    message = opened(wire, "step")
    assert message["scope"] == "user"
    assert message["kind"] == 4
    assert message["parent"] == outer.span
    assert message["trace"] == episode.trace
    assert message["episode"] == episode.span
    assert message["identity"] == identity
    assert message["attributes"] == {"n": 1, "list": ["a", "b"]}
    (end,) = wire.sent("close", span=message["span"])
    assert end["attributes"] == {"n": 1, "list": ["a", "b"], "later": 2.5}
    assert end["events"][0][0] == "note"
    assert end["events"][0][2] == {"k": "v"}
    theirs = backend.span("step")
    assert identity.items() <= dict(theirs.attributes or {}).items()
    assert ids(theirs) == (message["trace"], message["span"])
    # Ours inside of his hangs under his: the tree is the same in the backend and in the evidence.
    assert opened(wire, "execute_tool inner")["parent"] == message["span"]
    assert f"{backend.span('execute_tool inner').parent.span_id:016x}" == message["span"]  # type: ignore[union-attr]


def test_the_users_spans_outside_of_scopes_are_his_alone(wire: RecordingChannel, backend: Backend) -> None:
    with scope.tool_call("x"):
        pass
    wire.messages.clear()
    with backend.tracer.start_as_current_span("his"):
        pass
    assert wire.messages == []
    assert not backend.span("his").attributes


def test_inside_the_users_span_a_tool_is_its_child_and_an_episode_links_to_it(
    wire: RecordingChannel, backend: Backend
) -> None:
    with backend.tracer.start_as_current_span("his") as span:
        his = mirror.hex_ids(span.get_span_context())
        with scope.tool_call("x"):
            pass
        with scope.episode():
            pass
    tool_message, rollout = opened(wire, "execute_tool x"), opened(wire, "invoke_agent agent")
    assert (tool_message["trace"], tool_message["parent"]) == his
    assert rollout["trace"] != his[0]
    assert rollout["parent"] is None
    assert rollout["links"] == [list(his)]
    assert backend.span("invoke_agent agent").parent is None


def test_content_of_other_instrumentations_stays_out_of_the_evidence(
    wire: RecordingChannel, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(name: str) -> str:
        with scope.tool_call("x"), backend.tracer.start_as_current_span(name) as span:
            span.set_attribute("gen_ai.prompt.0.content", "secret")
            span.set_attribute("traceloop.entity.input", "secret")
            span.set_attribute("n", 1)
        (end,) = wire.sent("close", span=opened(wire, name)["span"])
        return json.dumps(end)

    assert "secret" not in record("quiet")
    assert backend.span("quiet").attributes["gen_ai.prompt.0.content"] == "secret"  # type: ignore[index]
    monkeypatch.setenv("RAY_GUARD_CAPTURE_CONTENT", "1")
    assert "secret" in record("loud")


def test_a_users_span_that_outlives_the_scope_is_ended_all_the_same(wire: RecordingChannel, backend: Backend) -> None:
    with scope.tool_call("x"):
        span = backend.tracer.start_span("long")
    span.set_status(trace.Status(trace.StatusCode.ERROR, "late"))
    span.end()
    (end,) = wire.sent("close", span=opened(wire, "long")["span"])
    assert (end["status"], end["message"]) == (2, "late")


# --- the provider is added to, once -------------------------------------------------------------------------------


def test_one_processor_is_added_once_whoever_comes_first(wire: RecordingChannel, backend: Backend) -> None:
    start = threading.Barrier(8)

    def work() -> None:
        start.wait()
        with scope.tool_call("x"):
            pass

    threads = [threading.Thread(target=work) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    processors = backend.provider._active_span_processor._span_processors
    assert [type(p).__name__ for p in processors] == ["SimpleSpanProcessor", "UserSpans"]
    assert trace.get_tracer_provider() is backend.provider
    assert len(backend.names()) == 8


def test_a_provider_set_later_is_found_by_the_next_root(
    wire: RecordingChannel, make: Callable[..., Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", None)
    with scope.episode(agent="before"):
        backend = make()
    with scope.episode(agent="after"):
        pass
    assert backend.names() == ["invoke_agent after"]


def test_who_asks_for_a_tracer_of_our_name_gets_ids_of_his_own(wire: RecordingChannel, backend: Backend) -> None:
    with scope.tool_call("x") as call:
        for _ in range(3):
            backend.provider.get_tracer("ray_guard", __version__).start_span("his").end()
    his = {ids(span) for span in backend.exporter.get_finished_spans() if span.name == "his"}
    assert len(his) == 3
    assert call.span not in {span_id for _, span_id in his}


class Refusing(Sampler):
    def should_sample(self, *args: Any, **kwargs: Any) -> SamplingResult:
        raise RuntimeError("sampler broken")

    def get_description(self) -> str:
        return "refusing"


def test_a_mirror_that_fails_is_said_once_and_switched_off(
    wire: RecordingChannel, make: Callable[..., Backend], caplog: pytest.LogCaptureFixture
) -> None:
    backend = make(Refusing())
    for _ in range(3):
        with scope.tool_call("x") as call:
            assert mirror.hex_ids(trace.get_current_span().get_span_context()) == (call.trace, call.span)
    assert len(wire.sent("close", status=0)) == 3
    assert backend.names() == []
    assert [r.name for r in caplog.records] == ["ray_guard"]


class Breaking(SpanProcessor):
    def on_start(self, span: Any, parent_context: Any = None) -> None:
        raise RuntimeError("processor broken")


def test_a_processor_of_the_users_that_fails_breaks_no_tool(
    wire: RecordingChannel, backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    backend.provider.add_span_processor(Breaking())
    for _ in range(2):
        with scope.tool_call("x"):
            pass
    assert len(wire.sent("close", status=0)) == 2
    assert len(caplog.records) == 1


def test_our_processor_that_fails_is_said_once_and_switched_off(
    wire: RecordingChannel, backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    with scope.tool_call("x") as call:
        wire.lost = True
        for n in range(3):
            with backend.tracer.start_as_current_span(f"his {n}"):
                pass
        wire.lost = False
        assert carry.current() is call
    assert [n for n in backend.names() if n.startswith("his")] == ["his 0", "his 1", "his 2"]
    assert len(caplog.records) == 1
    assert len(wire.sent("close")) == 1


def test_opentelemetry_that_cannot_be_used_shuts_the_door(
    wire: RecordingChannel, backend: Backend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr(mirror, "begin", broken)
    for _ in range(3):
        with scope.tool_call("x"):
            pass
    assert len(wire.sent("close", status=0)) == 3
    assert len(caplog.records) == 1


# --- without a provider -------------------------------------------------------------------------------------------


@pytest.fixture
def no_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", None)
    monkeypatch.delenv("OTEL_PYTHON_TRACER_PROVIDER", raising=False)


@pytest.mark.usefixtures("no_provider")
def test_propagators_see_our_span(wire: RecordingChannel) -> None:
    with scope.episode(), scope.tool_call("x") as call:
        headers: dict[str, str] = {}
        propagate.inject(headers)
        span = trace.get_current_span()
        assert not span.is_recording()
        assert call.span in repr(span)
        span.set_attribute("a", 1)
    assert headers["traceparent"] == f"00-{call.trace}-{call.span}-01"


@pytest.mark.usefixtures("no_provider")
def test_a_span_from_outside_is_the_parent_of_a_tool(wire: RecordingChannel) -> None:
    header = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"}
    token = context.attach(propagate.extract(header))
    try:
        with scope.tool_call("x"):
            assert trace.get_current_span().get_span_context().trace_flags.sampled is False
    finally:
        context.detach(token)
    message = opened(wire, "execute_tool x")
    assert (message["trace"], message["parent"]) == ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331")


@pytest.mark.usefixtures("no_provider")
def test_baggage_stays_and_what_is_attached_inside_is_left_alone() -> None:
    token = context.attach(baggage.set_baggage("k", "v"))
    with scope.tool_call("x"):
        assert baggage.get_baggage("k") == "v"
    assert baggage.get_baggage("k") == "v"
    context.detach(token)


def test_attach_leads_into_the_otel_context(wire: RecordingChannel, backend: Backend) -> None:
    with scope.episode(id="r1"), scope.tool_call("x") as call:
        given = scope.context()

    def elsewhere() -> None:
        with scope.attach(given):
            held = trace.get_current_span().get_span_context()
            assert held.is_remote
            with backend.tracer.start_as_current_span("his"), scope.chat("m"):
                pass

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    his = opened(wire, "his")
    assert (his["trace"], his["parent"]) == (call.trace, call.span)
    assert his["identity"]["rl.rollout.id"] == "r1"
    assert opened(wire, "chat m")["parent"] == his["span"]


@pytest.mark.usefixtures("carriers")
def test_threads_carry_the_otel_context_too(wire: RecordingChannel, backend: Backend) -> None:
    def work() -> None:
        with backend.tracer.start_as_current_span("his"):
            pass

    with scope.tool_call("x") as call:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert opened(wire, "his")["parent"] == call.span


def test_a_forked_child_does_not_end_the_users_spans_of_its_parent(wire: RecordingChannel, backend: Backend) -> None:
    reading, writing = os.pipe()
    with scope.tool_call("x"), backend.tracer.start_as_current_span("his") as span:
        child = os.fork()
        if child == 0:
            try:
                wire.messages.clear()
                span.end()
                with scope.tool_call("in child"):
                    pass
                os.write(writing, json.dumps([m["op"] for m in wire.messages]).encode())
            finally:
                os._exit(0)
        os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        assert json.loads(answer.read()) == ["open", "close"]


def test_ray_guard_never_loads_opentelemetry_itself() -> None:
    code = """
import sys
import ray_guard
from ray_guard.client import audit, decorator, scope
with scope.episode(), scope.tool_call("x"):
    pass
print([m for m in sys.modules if m.startswith("opentelemetry") or m in ("pydantic", "ray", "torch", "pynvml")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_scopes_that_end_in_any_order_leave_none_behind(wire: RecordingChannel, backend: Backend) -> None:
    """One that has ended must not become the parent of what comes later."""
    first, second, third = (scope.tool_call(name) for name in "abc")
    for each in (first, second, third):
        each.__enter__()
    second.__exit__(None, None, None)
    assert trace.get_current_span().get_span_context().span_id == int(third.span, 16)
    first.__exit__(None, None, None)
    third.__exit__(None, None, None)
    assert not trace.get_current_span().get_span_context().is_valid
    with scope.tool_call("later"):
        pass
    assert opened(wire, "execute_tool later")["parent"] is None
