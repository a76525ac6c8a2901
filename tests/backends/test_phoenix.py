"""A real job before Arize Phoenix, which is killed meanwhile: everything is there once, and as it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from jobs import Job, Phoenix, send

from ray_guard.evidence.forward import STATE
from ray_guard.evidence.journal import Journal
from ray_guard.evidence.otlp import encode
from ray_guard.records import Resource, SpanKind, SpanRecord

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

PROJECT = "rollouts"
KINDS = {"invoke_agent": "AGENT", "chat": "LLM", "execute_tool": "TOOL"}
"""Which kind Phoenix gives a span by its ``gen_ai.operation.name``; the others it calls UNKNOWN."""
AFTER = SpanRecord(
    "a" * 32, "b" * 16, None, "after", SpanKind.INTERNAL, 1_795_000_000 * 10**9, 1_795_000_001 * 10**9, {}
)
"""Sent after all others: when it is there, those have been looked at."""


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_a_job(
    start: Callable[..., Job], phoenix: Phoenix, knocked: Callable[[int], None], tmp_path: Path, protocol: str
) -> None:
    variables = {
        "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
        "OTEL_RESOURCE_ATTRIBUTES": f"openinference.project.name={PROJECT}",
        "OTEL_EXPORTER_OTLP_TIMEOUT": "5",
    }
    job = start(phoenix.endpoint(protocol), **variables)
    job.iterate(1)
    phoenix.await_spans(PROJECT, lambda: set(job.ended_spans()))
    phoenix.kill()
    job.iterate(2)
    knocked(phoenix.ports[protocol])
    phoenix.start()
    job.iterate(3)
    job.end()
    phoenix.await_spans(PROJECT, lambda: set(job.ended_spans()))

    written = job.ended_spans()
    assert Counter(span.name for span in written.values())["invoke_agent agent"] == 6
    shown = phoenix.spans(PROJECT)
    assert len(shown) == len(written)
    for span in shown:
        compare(span, written[span["context"]["span_id"]])

    # Everything once more, as after a loss of the state: the ids say that they are the same.
    (job.evidence / STATE).unlink()
    send(job.evidence, job.environment)
    with Journal(tmp_path / "after") as journal:
        journal.append(encode(AFTER, Resource({"service.name": "ray_guard"})))
        send(tmp_path / "after", job.environment)
    phoenix.await_spans(PROJECT, lambda: {AFTER.span_id})
    last, *before = phoenix.spans(PROJECT)
    compare(last, AFTER)
    assert before == shown


def compare(shown: Mapping[str, Any], written: SpanRecord) -> None:
    """Raises AssertionError where Phoenix shows something else than the journal has."""
    assert shown["context"] == {"trace_id": written.trace_id, "span_id": written.span_id}
    assert (shown["name"], shown["parent_id"]) == (written.name, written.parent_id)
    assert shown["status_code"] == written.status.name
    assert shown["status_message"] == written.status_message
    for text, time_ns in ((shown["start_time"], written.start_ns), (shown["end_time"], written.end_ns)):
        assert abs(microseconds(text) * 1000 - (time_ns or 0)) <= 1000
    attributes = {key: list(value) if isinstance(value, tuple) else value for key, value in written.attributes.items()}
    assert {key: shown["attributes"][key] for key in attributes} == attributes
    assert shown["span_kind"] == KINDS.get(str(attributes.get("gen_ai.operation.name")), "UNKNOWN")
    if shown["span_kind"] == "LLM":
        tokens = attributes["gen_ai.usage.input_tokens"], attributes["gen_ai.usage.output_tokens"]
        shown_tokens = (shown["attributes"][f"llm.token_count.{each}"] for each in ("prompt", "completion"))
        assert tuple(shown_tokens) == tokens
    assert [(each["name"], dict(each["attributes"])) for each in shown["events"]] == [
        (each.name, dict(each.attributes)) for each in written.events
    ]


def microseconds(text: str) -> int:
    """Since the epoch; Phoenix keeps no finer ones."""
    when = datetime.fromisoformat(text)
    return int(when.timestamp()) * 1_000_000 + when.microsecond
