"""A strict OTLP/HTTP receiver: decodes with OpenTelemetry's own protobuf, and refuses what is not right."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)


def plain(attributes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in attributes:
        assert item.key not in found, f"attribute {item.key} twice"
        which = item.value.WhichOneof("value")
        assert which, f"attribute {item.key} has no value"
        content = getattr(item.value, which)
        found[item.key] = [value.string_value for value in content.values] if which == "array_value" else content
    return found


@dataclass
class Received:
    """What arrived, in order: (resource, scope, span) with the attributes as dicts."""

    spans: list[tuple[dict[str, Any], Any, Any]] = field(default_factory=list)
    requests: int = 0
    errors: list[str] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def take(self, body: bytes) -> None:
        """Checks a request and keeps its spans. Raises AssertionError or DecodeError for a wrong one."""
        request = ExportTraceServiceRequest()
        request.ParseFromString(body)
        assert request.resource_spans, "an empty request"
        found = []
        for group in request.resource_spans:
            about = plain(group.resource.attributes)
            for scope in group.scope_spans:
                for span in scope.spans:
                    assert len(span.trace_id) == 16
                    assert any(span.trace_id)
                    assert len(span.span_id) == 8
                    assert any(span.span_id)
                    assert len(span.parent_span_id) in (0, 8)
                    assert span.name
                    assert 0 < span.start_time_unix_nano <= span.end_time_unix_nano, "a span without its times"
                    for link in span.links:
                        assert (len(link.trace_id), len(link.span_id)) == (16, 8)
                    plain(span.attributes)
                    found.append((about, scope.scope, span))
        with self.changed:
            self.spans += found
            self.changed.notify_all()

    def ids(self) -> list[str]:
        return [span.span_id.hex() for _, _, span in self.spans]

    def wait(self, ready: Callable[[Received], bool], timeout: float = 30) -> None:
        with self.changed:
            done = self.changed.wait_for(lambda: ready(self), timeout)
        assert not self.errors, self.errors
        assert done, f"after {timeout} s: {len(self.spans)} spans in {self.requests} requests"


@contextmanager
def http_receiver(received: Received, port: int = 0, answer: Callable[[bytes], int] = lambda _: 200) -> Iterator[str]:
    """Serves on loopback and yields the endpoint. What ``answer`` does not answer with 200 is not kept."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            body = self.rfile.read(length)
            if len(body) < length:  # the sender was killed meanwhile: no request at all
                self.close_connection = True
                return
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            code = 200
            try:
                assert self.path == "/v1/traces", self.path
                assert self.headers["Content-Type"] == "application/x-protobuf"
                code = answer(body)
                if code == 200:
                    received.take(body)
            except (AssertionError, DecodeError) as error:
                code = 400
                received.errors.append(repr(error))
            with received.changed:
                received.requests += 1
                received.changed.notify_all()
            reply = ExportTraceServiceResponse().SerializeToString()
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
