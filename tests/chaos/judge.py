"""The judge, who stands outside: holds what the driver knows (the ledger) against what evidence or receiver know."""

from __future__ import annotations

import gzip
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from ray_guard.evidence.reader import NotEvidence, Quarantine, read


class Ledger(NamedTuple):
    """What the job noted: the calls it began, by id, and those of them that it ended."""

    started: dict[str, int]
    finished: set[str]


def read_ledger(path: Path) -> Ledger:
    started: dict[str, int] = {}
    finished: set[str] = set()
    for line in path.read_text().splitlines():
        kind, span, *number = line.split()
        if kind == "s":
            started[span] = int(number[0])
        else:
            finished.add(span)
    return Ledger(started, finished)


@dataclass
class Findings:
    """How ledger and evidence agree.

    Attributes:
        lost: calls that began and are not in the evidence, and calls whose own end is not.
        unclosed: calls in the evidence that nobody has ended.
        duplicates: ids that ended twice, and calls that stand under two ids.
        closed_by: who ended the others.
    """

    started: int
    lost: list[str]
    unclosed: list[str]
    duplicates: list[str]
    closed_by: Counter[str] = field(default_factory=Counter)

    def by(self) -> str:
        return ", ".join(f"{who} {count}" for who, count in sorted(self.closed_by.items()))


def judge(evidence: Path, ledger: Ledger) -> Findings:
    begun: set[str] = set()
    ends: dict[str, list[str]] = defaultdict(list)
    numbers: dict[str, set[str]] = defaultdict(set)
    quarantine = Quarantine()
    try:
        for entry in read([evidence], quarantine):
            span = entry.span
            if not span.name.startswith("execute_tool"):
                continue
            begun.add(span.span_id)
            if span.end_ns is not None:
                assert span.end_ns >= span.start_ns
                ends[span.span_id].append(_closer(span.attributes))
            digest = span.attributes.get("gen_ai.tool.call.id")
            if digest is not None:
                numbers[str(digest)].add(span.span_id)
    except NotEvidence:
        pass  # nothing has been written
    torn = {"torn"}  # the half of a line that was never answered for
    assert set(quarantine.counts) <= torn, quarantine.first
    missing = [span for span in ledger.started if span not in begun]
    unended = [span for span in ledger.finished if span in begun and "itself" not in ends[span]]
    return Findings(
        started=len(ledger.started),
        lost=[f"{span}: its begin" for span in missing] + [f"{span}: its end, {ends[span]}" for span in unended],
        unclosed=[span for span in ledger.started if span in begun and not ends[span]],
        duplicates=[span for span, found in ends.items() if len(found) > 1]
        + [span for spans in numbers.values() if len(spans) > 1 for span in spans],
        closed_by=Counter(ends[span][0] for span in ledger.started if ends[span]),
    )


def _closer(attributes: Any) -> str:
    if "ray_guard.recovered_from" in attributes:
        return "next supervisor"
    return str(attributes.get("ray_guard.ended_by", "itself"))


class Receiver:
    """An OTLP/HTTP receiver: which spans arrived, in how many different forms each.

    Args:
        answer: the status for each request; what is not answered with 200 is not kept.
    """

    def __init__(self, answer: Callable[[], int] = lambda: 200) -> None:
        self.forms: dict[str, set[bytes]] = defaultdict(set)
        self.requests = 0
        self.answer = answer
        self._lock = threading.Lock()

    def take(self, body: bytes) -> int:
        with self._lock:
            self.requests += 1
            code = self.answer()
            if code == 200:
                request = ExportTraceServiceRequest.FromString(body)
                for group in request.resource_spans:
                    for scope in group.scope_spans:
                        for span in scope.spans:
                            self.forms[span.span_id.hex()].add(span.SerializeToString(deterministic=True))
            return code

    def lacks(self, spans: set[str]) -> set[str]:
        with self._lock:
            return spans - self.forms.keys()

    def await_all(self, spans: set[str], seconds: float) -> set[str]:
        """What is still missing of ``spans`` after at most so many seconds."""
        deadline = time.monotonic() + seconds
        while (missing := self.lacks(spans)) and time.monotonic() < deadline:
            time.sleep(0.05)
        return missing

    def different(self) -> list[str]:
        """Ids that came in two forms: no backend could tell that they are one span."""
        return [span for span, forms in self.forms.items() if len(forms) > 1]

    @contextmanager
    def serving(self, port: int = 0) -> Iterator[str]:
        """Listens on loopback; yields the endpoint."""
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                code = receiver.take(body)
                reply = ExportTraceServiceResponse().SerializeToString() if code == 200 else b""
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
