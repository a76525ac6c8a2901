"""One of the decorators that span.py measures @tool against, in the peers' environment.

    python decorators.py langfuse|logfire|mlflow|openinference|traceloop|bare

Commands on standard input, an answer of integers each:

    arrive                        whether a call's span reaches the exporter (1 or 0)
    measure CALLS GAP_US CLOCK    nanoseconds of each call, by the clock ``wall`` or ``thread`` (its CPU time)

Every one exports in batches, as it does by default, to an exporter that takes the spans and drops them: nothing leaves
the process, and exporting is in no figure. Batches are exported before each measurement. Calls are made within one
span of the same decorator, as a tool's are within its rollout's, for a root costs some of them more. What each does
per call of ``work(command)``:

- ``langfuse``: @observe(as_type="tool"): a span with type, arguments and result as JSON.
- ``logfire``: @instrument: a span with code location, message, the arguments and a JSON schema of them, scrubbed; by
  default not the result. Its console is off, and so is sending to its service.
- ``mlflow``: @trace(span_type="TOOL"): a span, kept with its trace in memory, with type, arguments and result as JSON.
  It exports over OTLP, batched; the exporter to a tracking server, its default, wants one.
- ``openinference``: OITracer.tool: a span with kind, name, JSON schema of the parameters, arguments and result.
- ``traceloop``: @tool: a span with kind, entity name and path, arguments and result as JSON.
- ``bare``: a span of OpenTelemetry with no attributes, to tell what the process itself makes of it.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

COMMAND = "ls -la /srv/work && git status --short"
NOWHERE = "http://127.0.0.1:9"
CLOCKS = {"wall": time.perf_counter_ns, "thread": time.thread_time_ns}

Decorate = Callable[[Callable[..., Any]], Callable[..., Any]]


class Dropped(SpanExporter):
    """Knows the names of what it dropped last."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.names = [span.name for span in spans]
        return SpanExportResult.SUCCESS


def batched(exporter: SpanExporter) -> TracerProvider:
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def bare(exporter: SpanExporter) -> tuple[Decorate, Callable[[], object]]:
    provider = batched(exporter)
    tracer = provider.get_tracer("bench")

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def called(*arguments: Any) -> Any:
            with tracer.start_as_current_span(function.__name__):
                return function(*arguments)

        return called

    return decorate, provider.force_flush


def langfuse(exporter: SpanExporter) -> tuple[Decorate, Callable[[], object]]:
    from langfuse import Langfuse, observe

    provider = TracerProvider()  # its own processor, which is a batch processor, is added to it
    Langfuse(
        public_key="pk-bench",
        secret_key="sk-bench",
        base_url=NOWHERE,
        tracer_provider=provider,
        span_exporter=exporter,
    )
    return observe(as_type="tool"), provider.force_flush


def logfire(exporter: SpanExporter) -> tuple[Decorate, Callable[[], object]]:
    import logfire as it

    it.configure(send_to_logfire=False, console=False, additional_span_processors=[BatchSpanProcessor(exporter)])
    return it.instrument(), it.force_flush


def mlflow(exporter: SpanExporter) -> tuple[Decorate, Callable[[], object]]:
    # It uses OTLP only if an endpoint is named, and without a server would look for a store, which this package lacks.
    os.environ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"] = f"{NOWHERE}/v1/traces"
    os.environ["MLFLOW_TRACKING_URI"] = NOWHERE
    import mlflow as it
    from mlflow.tracing import provider

    vars(provider)["get_otlp_exporter"] = lambda: exporter
    provider.provider.get_or_init_tracer("bench")
    return it.trace(span_type="TOOL"), provider.provider.get().force_flush


def openinference(exporter: SpanExporter) -> tuple[Decorate, Callable[[], object]]:
    from openinference.instrumentation import TracerProvider as Provider

    provider = Provider()
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider.get_tracer("bench").tool, provider.force_flush


def traceloop(exporter: SpanExporter) -> tuple[Decorate, Callable[[], object]]:
    os.environ |= {"TRACELOOP_TELEMETRY": "FALSE", "TRACELOOP_METRICS_ENABLED": "FALSE"}
    from traceloop.sdk import Traceloop
    from traceloop.sdk.decorators import tool

    Traceloop.init(app_name="bench", exporter=exporter, telemetry_enabled=False, instruments=set())
    provider: Any = trace.get_tracer_provider()
    return tool(), provider.force_flush


def work(command: str) -> str:
    return command


def main() -> None:
    # Some greet on standard output, which is the driver's.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    kinds = {each.__name__: each for each in (langfuse, logfire, mlflow, openinference, traceloop, bare)}
    exporter = Dropped()
    decorate, flush = kinds[sys.argv[1]](exporter)
    called = decorate(work)
    found: list[int] = []
    calls, gap_s, clock = 0, 0.0, CLOCKS["wall"]

    def rollout() -> None:
        for _ in range(calls):
            if gap_s:
                time.sleep(gap_s)
            began = clock()
            called(COMMAND)
            found.append(clock() - began)

    within = decorate(rollout)
    for line in sys.stdin:
        command, *words = line.split()
        flush()
        found.clear()
        if command == "arrive":
            calls = 1
            within()
            flush()
            print(int(any("work" in name for name in exporter.names)), file=answers, flush=True)
        else:
            calls, gap_s, clock = int(words[0]), int(words[1]) / 1e6, CLOCKS[words[2]]
            within()
            print(*found, file=answers, flush=True)


if __name__ == "__main__":
    main()
