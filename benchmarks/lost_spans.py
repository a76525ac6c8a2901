"""How many of 300 tool calls are known after the process was killed right behind the last one.

    python benchmarks/lost_spans.py [--calls 300] [--rounds 3] [--json OUT]

Ours: whole spans in the journal, with the end that the process itself reported. Beside it OpenTelemetry's batch
processor with an OTLP exporter, and Traceloop's @tool, to a receiver on loopback. The control: the same ends in order,
and every span must arrive.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import harness
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from ray_guard.evidence.reader import Quarantine, read

CALLER = Path(__file__).resolve().parent / "contestants" / "caller.py"
SETTLE_S = 2.0


class Receiver(ThreadingHTTPServer):
    """Takes OTLP over HTTP and counts the spans."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.spans: set[bytes] = set()
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}/v1/traces"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
        for group in request.resource_spans:
            for scope in group.scope_spans:
                self.server.spans |= {span.span_id for span in scope.spans}  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def journaled(folder: Path) -> int:
    """Whole tool spans in the evidence."""
    ended = {
        entry.span.span_id
        for entry in read([folder], Quarantine())
        if entry.span.name.startswith("execute_tool")
        and entry.span.end_ns is not None
        and "ray_guard.ended_by" not in entry.span.attributes
    }
    return len(ended)


def known(kind: str, calls: int, how: str, folder: Path) -> int:
    """Runs one contestant to its end; how many of its calls are known then, at rest."""
    receiver = Receiver()
    python = harness.require_peers() if kind == "traceloop" else sys.executable
    environment = {**os.environ, "RAY_GUARD_EVIDENCE": str(folder)}
    command = [python, str(CALLER), kind, str(calls), how, receiver.endpoint]
    status = subprocess.run(command, env=environment, check=False, stdout=subprocess.DEVNULL).returncode
    if how == "kill" and status != -signal.SIGKILL:
        raise SystemExit(f"{kind}: status {status}")
    deadline = time.monotonic() + SETTLE_S
    while True:
        found = journaled(folder) if kind == "guard" and folder.exists() else len(receiver.spans)
        if found == calls or time.monotonic() > deadline:
            receiver.shutdown()
            receiver.server_close()
            return found
        time.sleep(0.1)


def main() -> None:
    options = harness.arguments(__doc__ or "", rounds=3, calls=300).parse_args()
    report = harness.Report(options)
    kinds = {"guard": "guard, journal", "otel": "OpenTelemetry batch processor", "traceloop": "Traceloop @tool"}
    if not harness.PEERS.exists():
        del kinds["traceloop"]
    lost = dict.fromkeys(kinds.values(), 0)
    with harness.scratch() as folder:
        for kind, name in kinds.items():
            arrived = known(kind, options.calls, "end", folder / f"{kind}-control")
            if arrived < options.calls:
                raise SystemExit(f"{name}: an orderly end delivers {arrived} of {options.calls}: nothing to compare")
            for number in range(options.rounds):
                lost[name] += options.calls - known(kind, options.calls, "kill", folder / f"{kind}-{number}")
    title = f"spans lost of {options.rounds} × {options.calls}, SIGKILL right after the last"
    report.add_facts(title, lost)
    report.goal("spans lost by the guard", lost["guard, journal"], 0)
    report.close()


if __name__ == "__main__":
    main()
