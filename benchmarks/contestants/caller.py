"""What a contestant of lost_spans.py runs: 300 tool calls, then its own SIGKILL (or an orderly end, as the control).

    python caller.py guard|otel|traceloop COUNT kill|end ENDPOINT

Only ``guard`` needs ray_guard; ``traceloop`` runs in the peers' environment.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock


def work(command: str) -> str:
    return command


def guard(_endpoint: str) -> tuple[Callable[[str], str], Callable[[], None]]:
    import ray_guard

    ray_guard.confine({"egress": {"allow": []}})
    ray_guard.episode(id="bench", group="g", iteration=1).__enter__()
    called: Any = ray_guard.tool(work)
    return called, lambda: None


def otel(endpoint: str) -> tuple[Callable[[str], str], Callable[[], None]]:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
    tracer = provider.get_tracer("bench")

    def called(command: str) -> str:
        with tracer.start_as_current_span("execute_tool work"):
            return work(command)

    return called, provider.shutdown


def traceloop(endpoint: str) -> tuple[Callable[[str], str], Callable[[], None]]:
    # Nothing of it may leave this machine: no telemetry of its own, no metrics, no prompts to fetch.
    os.environ |= {"TRACELOOP_TELEMETRY": "FALSE", "TRACELOOP_METRICS_ENABLED": "FALSE"}
    # It imports httpx, for its experiments alone, without requiring it.
    sys.modules.setdefault("httpx", MagicMock())
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from traceloop.sdk import Traceloop
    from traceloop.sdk.decorators import tool

    Traceloop.init(app_name="bench", exporter=OTLPSpanExporter(endpoint), telemetry_enabled=False, instruments=set())
    provider: Any = trace.get_tracer_provider()
    called: Any = tool(name="work")(work)
    return called, provider.shutdown


def main() -> None:
    kind, count, how, endpoint = sys.argv[1:]
    called, finish = {"guard": guard, "otel": otel, "traceloop": traceloop}[kind](endpoint)
    for number in range(int(count)):
        called(f"ls {number}")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    finish()


if __name__ == "__main__":
    main()
