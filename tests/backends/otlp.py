"""Strict OTLP receivers, by HTTP and by gRPC: what is not right is refused, and the test that sent it fails.

Requests are decoded with OpenTelemetry's own protobuf. A receiver says what is right, for one signal; ``by_http`` and
``by_grpc`` serve one or several.
"""

from __future__ import annotations

import gzip
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, NamedTuple, Self

from google.protobuf.message import DecodeError, Message
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status


class Signal(NamedTuple):
    """How a signal is asked for."""

    path: str
    service: str
    request: type[Message]
    response: type[Message]


TRACES = Signal(
    "/v1/traces",
    "opentelemetry.proto.collector.trace.v1.TraceService",
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
METRICS = Signal(
    "/v1/metrics",
    "opentelemetry.proto.collector.metrics.v1.MetricsService",
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)


def plain(attributes: Any) -> dict[str, Any]:
    """Protobuf attributes as a dict. Raises AssertionError for one that is there twice or has no name or value."""
    found: dict[str, Any] = {}
    for item in attributes:
        assert item.key, "an attribute without a name"
        assert item.key not in found, f"attribute {item.key} twice"
        which = item.value.WhichOneof("value")
        assert which, f"attribute {item.key} has no value"
        content = getattr(item.value, which)
        found[item.key] = [value.string_value for value in content.values] if which == "array_value" else content
    return found


class Receiver:
    """Keeps what is right of one signal, and counts.

    Args:
        answer: the HTTP status for the body of a request. What it does not answer with 200 is not kept.

    Attributes:
        requests: how many came, whatever the answer.
        errors: what was wrong with those that were refused for what they hold.
        reply: what those are told that were taken; a test may have it say that spans were left out.
        changed: notified after each.
    """

    signal: ClassVar[Signal]

    def __init__(self, answer: Callable[[bytes], int] = lambda _: 200) -> None:
        self.answer = answer
        self.requests = 0
        self.reply: Any = self.signal.response()
        self.errors: list[str] = []
        self.changed = threading.Condition()

    def keep(self, request: Any) -> None:
        """Checks a request and keeps what it holds; called with ``changed`` held. Raises AssertionError."""
        raise NotImplementedError

    def receive(self, body: bytes) -> int:
        """The status to answer with."""
        code = self.answer(body)
        with self.changed:
            if code == 200:
                try:
                    self.keep(self.signal.request.FromString(body))
                except (AssertionError, DecodeError) as error:
                    self.errors.append(repr(error))
                    code = 400
            self.requests += 1
            self.changed.notify_all()
        return code

    def refuse(self, why: str) -> int:
        """For what is no request of this signal at all."""
        with self.changed:
            self.errors.append(why)
            self.changed.notify_all()
        return 400

    def wait(self, ready: Callable[[Self], bool], timeout: float = 30) -> None:
        """Until it is ``ready``. Raises AssertionError when it is not in time, or when something was wrong."""
        with self.changed:
            done = self.changed.wait_for(lambda: self.errors or ready(self), timeout)
        assert not self.errors, self.errors
        assert done, f"not in {timeout} s: {self}"


class Traces(Receiver):
    """Which spans arrived.

    Attributes:
        spans: (resource, scope, span) in the order of arrival; resources are dicts.
        forms: of each span id, the different spans that came under it.
    """

    signal = TRACES

    def __init__(self, answer: Callable[[bytes], int] = lambda _: 200) -> None:
        super().__init__(answer)
        self.spans: list[tuple[dict[str, Any], Any, Any]] = []
        self.forms: dict[str, set[bytes]] = defaultdict(set)

    def __str__(self) -> str:
        return f"{len(self.spans)} spans in {self.requests} requests"

    def keep(self, request: Any) -> None:
        assert request.resource_spans, "an empty request"
        found = []
        for group in request.resource_spans:
            about = plain(group.resource.attributes)
            assert about.get("service.name"), "a resource without service.name"
            for scope in group.scope_spans:
                assert scope.scope.name, "a scope without a name"
                for span in scope.spans:
                    _check(span)
                    found.append((about, scope.scope, span))
        assert found, "a request without spans"
        self.spans += found
        for _, _, span in found:
            self.forms[span.span_id.hex()].add(span.SerializeToString(deterministic=True))

    def ids(self) -> list[str]:
        return [span.span_id.hex() for _, _, span in self.spans]

    def lacks(self, spans: set[str]) -> set[str]:
        with self.changed:
            return spans - self.forms.keys()

    def await_all(self, spans: set[str], seconds: float) -> set[str]:
        """What is still missing of ``spans`` after at most so many seconds."""
        with self.changed:
            self.changed.wait_for(lambda: self.errors or spans <= self.forms.keys(), seconds)
            assert not self.errors, self.errors
            return spans - self.forms.keys()

    def different(self) -> list[str]:
        """Ids that came in two forms: no backend could tell that they are one span."""
        return [span for span, forms in self.forms.items() if len(forms) > 1]

    def check_references(self) -> None:
        """Parents and links lead to spans that arrived, parents within their trace. For when everything has."""
        traces = {span.span_id: span.trace_id for _, _, span in self.spans}
        for _, _, span in self.spans:
            named = f"{span.name} {span.span_id.hex()}"
            if span.parent_span_id:
                assert traces.get(span.parent_span_id) == span.trace_id, f"{named}: no such parent in its trace"
            for link in span.links:
                assert traces.get(link.span_id) == link.trace_id, f"{named}: a link to nowhere"


def _check(span: Any) -> None:
    """Raises AssertionError for a span that a backend may refuse, lose or show wrongly."""
    _check_ids(span.trace_id, span.span_id)
    named = f"{span.name} {span.span_id.hex()}"
    assert span.name, "a span without a name"
    assert span.kind != Span.SPAN_KIND_UNSPECIFIED, f"{named}: no kind"
    if span.parent_span_id:
        _check_ids(span.trace_id, span.parent_span_id)
        assert span.parent_span_id != span.span_id, f"{named}: its own parent"
    assert 0 < span.start_time_unix_nano <= span.end_time_unix_nano, f"{named}: without its times"
    plain(span.attributes)
    for event in span.events:
        assert event.name, f"{named}: an event without a name"
        assert event.time_unix_nano, f"{named}: {event.name} without its time"
        plain(event.attributes)
    for link in span.links:
        _check_ids(link.trace_id, link.span_id)
        plain(link.attributes)
    if span.status.message:
        assert span.status.code == Status.STATUS_CODE_ERROR, f"{named}: a message without an error"


def _check_ids(trace: bytes, span: bytes) -> None:
    assert (len(trace), len(span)) == (16, 8), f"ids of {len(trace)} and {len(span)} bytes"
    assert any(trace), "a trace id of zeros"
    assert any(span), "a span id of zeros"


# ---------------------------------------------------------------------------------------------------------------------
# how they are reached


@contextmanager
def by_http(*receivers: Receiver, port: int = 0) -> Iterator[str]:
    """Serves on loopback; yields the endpoint."""
    by_path = {each.signal.path: each for each in receivers}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            receiver, kind = by_path.get(self.path), self.headers["Content-Type"]
            if receiver is None:
                code = receivers[0].refuse(f"posted to {self.path}")
            elif kind != "application/x-protobuf":
                code = receiver.refuse(f"a Content-Type {kind}")
            else:
                code = receiver.receive(body)
            reply = receiver.reply.SerializeToString() if receiver and code == 200 else b""
            self.send_response(code)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def by_grpc(*receivers: Receiver, port: int = 0) -> Iterator[str]:
    """The same by gRPC: 400 is INVALID_ARGUMENT, whatever else is not 200 is UNAVAILABLE."""
    import grpc

    def method(receiver: Receiver) -> Callable[[bytes, Any], bytes]:
        def export(body: bytes, context: Any) -> bytes:
            code = receiver.receive(body)
            if code != 200:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT if code == 400 else grpc.StatusCode.UNAVAILABLE, "no")
            reply: bytes = receiver.reply.SerializeToString()
            return reply

        return export

    server = grpc.server(futures.ThreadPoolExecutor(2))
    for each in receivers:
        handlers = {"Export": grpc.unary_unary_rpc_method_handler(method(each))}
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(each.signal.service, handlers)])
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield f"http://127.0.0.1:{bound}"
    finally:
        server.stop(0).wait()
