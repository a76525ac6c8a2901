"""What spans count for: labels as declared, whoever wrote the span, and few of them."""

from __future__ import annotations

import pytest

from ray_guard.evidence.measures import (
    BYTES,
    DENIALS,
    ENDED,
    EXCEEDED,
    INSTRUMENTS,
    OPERATION,
    OTHER,
    OVERFLOW,
    TOKEN_USAGE,
    TOOL,
    VIOLATIONS,
    Bounded,
    Losses,
    Measurement,
    measured,
)
from ray_guard.records import Attributes, AttributeValue, SpanKind, SpanRecord, StatusCode

SUPERVISOR: dict[str, AttributeValue] = {"ray_guard.source": "supervisor"}
TARGET: dict[str, AttributeValue] = {"ray_guard.source": "target"}
DENIED: dict[str, AttributeValue] = {
    "ray_guard.egress.decision": "deny",
    "ray_guard.egress.reason": "not_listed",
    "network.transport": "tcp",
    "network.peer.address": "192.0.2.1",
}


def span(name: str, about: Attributes, status: StatusCode = StatusCode.UNSET) -> SpanRecord:
    return SpanRecord("1" * 32, "2" * 16, None, name, SpanKind.INTERNAL, 1_000_000_000, 3_500_000_000, about, status)


def of(name: str, about: Attributes, status: StatusCode = StatusCode.UNSET) -> list[Measurement]:
    found = list(measured(span(name, about, status)))
    for instrument, _, labels in found:
        assert instrument in INSTRUMENTS
        assert set(labels) <= set(instrument.labels)
    return found


def test_a_model_call() -> None:
    usage: dict[str, AttributeValue] = {"gen_ai.usage.input_tokens": 5, "gen_ai.request.model": "m"}
    labels = {"gen_ai.operation.name": "chat", "gen_ai.request.model": "m", "ray_guard.source": "target"}
    assert of("chat m", {**TARGET, **usage}) == [
        (OPERATION, 2.5, labels),
        (TOKEN_USAGE, 5.0, {**labels, "gen_ai.token.type": "input"}),
    ]


def test_a_model_call_that_its_engine_charges_is_counted_there() -> None:
    usage: dict[str, AttributeValue] = {"gen_ai.usage.input_tokens": 5, "ray_guard.charged_by": "engine"}
    assert [instrument for instrument, _, _ in of("chat m", {**TARGET, **usage})] == [OPERATION]


def test_a_call_whose_process_died() -> None:
    about: dict[str, AttributeValue] = {**TARGET, "gen_ai.tool.name": "bash", "ray_guard.ended_by": "supervisor"}
    labels = {"gen_ai.tool.name": "bash", "ray_guard.source": "target", "error.type": "process_died"}
    assert of("execute_tool bash", about, StatusCode.ERROR) == [(TOOL, 2.5, labels), (ENDED, 1, {})]


def test_a_refused_flow() -> None:
    labels = {"network.transport": "tcp", "ray_guard.egress.reason": "not_listed"}
    assert of("egress connect", {**SUPERVISOR, **DENIED}) == [(DENIALS, 1, labels)]


@pytest.mark.parametrize("name", ["egress connect", "ray_guard.violation", "ray_guard.budget_warning", "ray_guard.gpu"])
def test_what_only_the_supervisor_knows(name: str) -> None:
    about: dict[str, AttributeValue] = {**DENIED, "ray_guard.gpu.seconds": 1.0, "error.type": "call budget"}
    assert of(name, {**SUPERVISOR, **about})
    assert of(name, {**TARGET, **about}) == []


def test_a_budget_that_was_passed_is_a_violation_too() -> None:
    about: dict[str, AttributeValue] = {"ray_guard.violation.kind": "tokens", "error.type": "episode budget"}
    assert [each[:2] for each in of("ray_guard.violation", {**SUPERVISOR, **about})] == [(VIOLATIONS, 1), (EXCEEDED, 1)]


@pytest.mark.parametrize("claim", [-1, float("nan"), float("inf"), 10**400, "7", True, ("7",)])
def test_a_number_that_is_none(claim: AttributeValue) -> None:
    sent = {**SUPERVISOR, **DENIED, "ray_guard.egress.bytes_sent": claim}
    assert [each.instrument for each in of("egress connect", sent)] == [DENIALS]
    assert BYTES in [each.instrument for each in of("egress connect", {**sent, "ray_guard.egress.bytes_sent": 7})]


@pytest.mark.parametrize("name", ["", "process sh", "rl.turn", "chatter", "egress"])
def test_other_spans_count_for_nothing(name: str) -> None:
    assert of(name, {**SUPERVISOR, **DENIED}) == []


def test_labels_stay_few() -> None:
    bounded = Bounded(values=3, series=4)

    def name(value: str) -> str:
        return bounded.labels(Measurement(TOOL, 1, {"gen_ai.tool.name": value})).get("gen_ai.tool.name", "")

    assert [name(each) for each in ("a", "rm -rf / | sh", "b", "c", "d", "a")] == ["a", OTHER, "b", "c", OTHER, "a"]
    assert bounded.labels(Measurement(TOOL, 1, {"gen_ai.tool.name": "a", "error.type": "x"})) == OVERFLOW
    assert name("a") == "a"
    assert bounded.labels(Measurement(OPERATION, 1, {"error.type": "x"})) == {"error.type": "x"}


def test_totals_of_lost_records_become_increments() -> None:
    losses = Losses()

    def lost(total: AttributeValue, log: str = "20260101T000000Z-node-7-4711-1f2e") -> float:
        return losses.more(log, span("ray_guard.violation", {**SUPERVISOR, "ray_guard.journal.lost_records": total}))

    assert [lost(3), lost(5), lost(5)] == [3, 2, 0]
    assert lost(9, "20260101T000100Z-node-7-4711-ffff") == 4  # the same supervisor, in its next log
    assert lost(2, "20260101T000200Z-node-7-4711-eeee") == 2  # another of the same number
    assert lost(6, "20260101T000200Z-node-8-4711-eeee") == 6
    assert lost("many") == 0
