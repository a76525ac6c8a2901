"""A real job before a strict OTLP receiver, by HTTP while it runs and by gRPC afterwards."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
from jobs import OF_A_ROLLOUT, Job, send
from otlp import Traces, by_grpc, by_http, plain

from ray_guard.evidence.forward import STATE

pytestmark = pytest.mark.ray


def test_a_job_by_http_and_by_grpc(start: Callable[..., Job]) -> None:
    received = Traces()
    with by_http(received) as endpoint:
        job = start(endpoint)
        rollouts = job.iterate(1) + job.iterate(2)
        job.end()
        received.wait(lambda r: r.forms.keys() == job.ended_spans().keys(), 60)
    assert len(received.spans) == len(received.forms)  # nothing went wrong: nothing came twice
    received.check_references()

    by_trace: dict[str, list[Any]] = defaultdict(list)
    resources = {}
    for about, _, span in received.spans:
        by_trace[span.trace_id.hex()].append(span)
        resources[span.span_id.hex()] = about
    iterations = {span.span_id.hex(): span for _, _, span in received.spans if span.name == "rl.iteration"}
    assert [plain(each.attributes)["rl.iteration"] for each in iterations.values()] == [1, 2]
    for number, known in enumerate(rollouts):
        spans = by_trace[known["trace"]]
        assert Counter(span.name for span in spans) == OF_A_ROLLOUT
        (root,) = (span for span in spans if not span.parent_span_id)
        assert root.span_id.hex() == known["span"]
        (link,) = root.links
        assert (link.trace_id, link.span_id.hex()) == (iterations[known["iteration"]].trace_id, known["iteration"])
        for span in spans:
            about, attributes = resources[span.span_id.hex()], plain(span.attributes)
            assert about["service.name"] == "ray_guard"
            assert about["host.ip"]
            assert about["ray.actor_name"] == f"env-{number % 2}"
            assert about["ray.actor_id"]
            assert attributes["rl.rollout.id"] == known["rollout"]
            assert attributes["rl.run.id"] == about["rl.run.id"]
    actors = [about for about in resources.values() if "ray.actor_id" in about]  # the others are the driver's
    assert len({about["ray.actor_id"] for about in actors}) == 2
    assert len({(about["ray.job_id"], about["ray.node_id"]) for about in resources.values()}) == 1
    assert len({about["rl.run.id"] for about in resources.values()}) == 1

    again = Traces()
    (job.evidence / STATE).unlink()
    with by_grpc(again) as endpoint:
        there = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}
        send(job.evidence, job.environment | there)
    assert again.errors == []
    assert again.forms == received.forms
