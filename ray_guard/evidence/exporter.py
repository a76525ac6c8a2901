"""Journal records to an OTLP endpoint, through OpenTelemetry's own exporters.

Runs in the forwarder's process alone: imports opentelemetry.

Their exporters know the ``OTEL_EXPORTER_OTLP_*`` variables (headers, certificates, compression, timeouts); the spans
are ours, rebuilt with the ids, times, links and resource that the journal has.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Final

from opentelemetry.sdk.resources import OTELResourceDetector
from opentelemetry.sdk.resources import Resource as SdkResource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from ray_guard import __version__, records
from ray_guard.evidence.answers import Answers
from ray_guard.evidence.forwarder import ForwardError, endpoint
from ray_guard.evidence.settings import check

_SCOPE: Final = InstrumentationScope("ray_guard", __version__)
_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)
_KINDS: Final = {records.SpanKind.INTERNAL: SpanKind.INTERNAL, records.SpanKind.CLIENT: SpanKind.CLIENT}
_STATUS: Final = {
    records.StatusCode.UNSET: StatusCode.UNSET,
    records.StatusCode.OK: StatusCode.OK,
    records.StatusCode.ERROR: StatusCode.ERROR,
}


def open_exporter(environ: Mapping[str, str]) -> OtlpExporter:
    """The exporter that the standard variables ask for.

    Raises:
        ForwardError: no endpoint, a protocol that is not known or whose package is not installed, or another variable
            that cannot be meant.
    """
    if endpoint(environ) is None:
        raise ForwardError("no OTLP endpoint: set OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    exporter: SpanExporter
    answers = Answers()
    spoken = protocol(environ, "TRACES")
    check(environ, "TRACES", spoken)
    if spoken == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

        exporter = GrpcExporter()
    else:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

        exporter = HttpExporter(session=answers.session(environ, "TRACES"))
    return OtlpExporter(exporter, answers)


def protocol(environ: Mapping[str, str], signal: str) -> str:
    """``grpc`` or ``http/protobuf``, as the standard variables say for that signal (``TRACES``, ``METRICS``).

    Raises:
        ForwardError: another one, or the package for it is not installed.
    """
    own, general = f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"
    name = own if environ.get(own, "").strip() else general
    asked = environ.get(name, "").strip() or "http/protobuf"
    if asked not in ("grpc", "http/protobuf"):
        raise ForwardError(f"{name}={asked!r} is not known: http/protobuf or grpc")
    if asked == "grpc":
        try:
            import opentelemetry.exporter.otlp.proto.grpc  # noqa: F401 - whether it is there
        except ImportError as error:
            raise ForwardError(
                f"{name}=grpc needs the package opentelemetry-exporter-otlp-proto-grpc: "
                "pip install 'ray-guard[grpc]', or set http/protobuf"
            ) from error
    return asked


class LastWord(logging.Handler):
    """Keeps what this thread's exporter logged last: they return failures without a reason, and log each of them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._said = ""
        self._thread: int | None = None
        logger = logging.getLogger("opentelemetry")
        logger.addHandler(self)
        logger.propagate = False

    def listen(self) -> None:
        """Forgets what was said; from here on it is this thread that counts."""
        self._said, self._thread = "", threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self._thread:
            said = record.getMessage()
            # Of a time that ran out they say so, and before that, as a warning, what went wrong each time.
            self._said = f"{said} {self._said}".strip() if record.levelno >= logging.ERROR else said

    def why(self) -> str:
        return self._said or "refused without a reason"


class OtlpExporter:
    """Sends journal records (see :class:`ray_guard.evidence.forward.Exporter`)."""

    def __init__(self, exporter: SpanExporter, answers: Answers) -> None:
        self._exporter = exporter
        self._answers = answers
        self._resources: dict[object, SdkResource] = {}
        # OTEL_RESOURCE_ATTRIBUTES says where this runs; what the journal says of a span's own resource wins.
        self._around = OTELResourceDetector().detect().attributes
        self._last = LastWord()

    def export(self, spans: Sequence[tuple[records.Resource, records.SpanRecord]]) -> str | None:
        self._last.listen()
        self._answers.forget()
        try:
            result = self._exporter.export([self.readable(resource, span) for resource, span in spans])
        except Exception as error:  # noqa: BLE001 - whatever a span does to the exporter, the journal keeps it
            return f"{type(error).__name__}: {error}"
        return None if result is SpanExportResult.SUCCESS else self._last.why()

    def refused(self) -> tuple[int, str]:
        return self._answers.refused

    def pause_s(self) -> float:
        return self._answers.pause_s

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def readable(self, resource: records.Resource, span: records.SpanRecord) -> ReadableSpan:
        """The SDK's view of a record: same ids, times, attributes, events, links and status."""
        key = frozenset(resource.attributes.items())
        about = self._resources.get(key)
        if about is None:
            if len(self._resources) >= 1024:
                self._resources.clear()
            about = self._resources[key] = SdkResource({**self._around, **resource.attributes})
        return ReadableSpan(
            name=span.name,
            context=_context(span.trace_id, span.span_id),
            parent=None if span.parent_id is None else _context(span.trace_id, span.parent_id),
            resource=about,
            attributes=span.attributes,
            events=[Event(event.name, event.attributes, event.time_ns) for event in span.events],
            links=[Link(_context(link.trace_id, link.span_id), link.attributes) for link in span.links],
            kind=_KINDS[span.kind],
            status=Status(
                _STATUS[span.status], span.status_message if span.status is records.StatusCode.ERROR else None
            ),
            start_time=span.start_ns,
            end_time=span.end_ns,
            instrumentation_scope=_SCOPE,
        )


def _context(trace_id: str, span_id: str) -> SpanContext:
    return SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=False, trace_flags=_SAMPLED)
