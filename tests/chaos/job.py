"""A job that makes calls and notes each, outside of any tracing, in a ledger: what the driver knows. Run by the suite.

    python job.py guard LEDGER POLICY          confined; EVIDENCE and OTEL_* come from the environment
    python job.py observe LEDGER FOLDER        a driver: nothing is enforced, its spans are journaled
    python job.py batch LEDGER ENDPOINT        OpenTelemetry's batch processor instead, nothing of ours

It does what it is told on stdin, a JSON line each, and answers with one. The ledger is written with ``write(2)``: what
stands there survives the job. ``s ID NUMBER``: the call has begun, as far as its caller can tell; ``f ID``: it is over.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

TOOL_EVERY = 100
"""One call in so many starts a process; the others are spans alone, as quick as they can be."""


class Ledger:
    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def note(self, text: str) -> None:
        os.write(self._descriptor, text.encode() + b"\n")


Scope = Callable[[int, bool], Any]
"""``with scope(number, whether it may start a process) as span id``."""


def guarded(policy: str) -> tuple[Scope, Callable[[], None]]:
    import ray_guard

    if "CHAOS_PYTHON" in os.environ:  # what a supervisor is started with
        sys.executable = os.environ["CHAOS_PYTHON"]
    ray_guard.confine(json.loads(policy))
    return calls_of_this_process(), lambda: None


def observed(_folder: str) -> tuple[Scope, Callable[[], None]]:
    from ray_guard.client import channel

    assert channel.observer() is not None
    return calls_of_this_process(), lambda: None


def calls_of_this_process() -> Scope:
    """Calls that ray_guard knows of."""
    import ray_guard

    @contextmanager
    def call(number: int, starts: bool) -> Iterator[str]:
        with ray_guard.tool_call("work", {"number": number}, id=f"{os.getpid()}-{number}") as scope:
            yield scope.span
            if starts and number % TOOL_EVERY == TOOL_EVERY - 1:
                ray_guard.run(["true"], check=True)

    return call


def batched(endpoint: str) -> tuple[Scope, Callable[[], None]]:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{endpoint}/v1/traces")))
    tracer = provider.get_tracer("chaos")

    @contextmanager
    def call(_number: int, _starts: bool) -> Iterator[str]:
        with tracer.start_as_current_span("execute_tool work") as span:
            yield f"{span.get_span_context().span_id:016x}"

    return call, provider.shutdown


class Job:
    def __init__(self, ledger: Ledger, scope: Scope) -> None:
        self._ledger = ledger
        self._scope = scope
        self._number = 0
        self._kept: list[Any] = []

    def spans(self, count: int) -> int:
        """:meth:`calls` of which none starts a process."""
        return self.calls(count, starts=False)

    def calls(self, count: int, *, starts: bool = True) -> int:
        """Makes so many calls, one after the other; how many there were so far."""
        for _ in range(count):
            number, self._number = self._number, self._number + 1
            with self._scope(number, starts) as span:
                self._ledger.note(f"s {span} {number}")
            self._ledger.note(f"f {span}")
        return self._number

    def touches(self, pid: int) -> list[int]:
        """What comes of reaching for a process, in ways that would do it no harm: error numbers."""

        def came(attempt: Callable[..., object], *arguments: Any) -> int:
            try:
                attempt(*arguments)
            except OSError as error:
                return error.errno or -1
            return 0

        return [
            came(os.kill, pid, signal.SIGCONT),
            came(os.kill, -os.getpgid(pid), signal.SIGCONT),
            came(signal.pidfd_send_signal, os.pidfd_open(pid), signal.SIGCONT),
            came(fcntl.fcntl, 0, fcntl.F_SETOWN, pid),
            came(os.sched_setaffinity, pid, os.sched_getaffinity(pid)),
            came(os.setpriority, os.PRIO_PROCESS, pid, os.getpriority(os.PRIO_PROCESS, pid)),
            came(resource.prlimit, pid, resource.RLIMIT_CORE, resource.prlimit(pid, resource.RLIMIT_CORE)),
        ]

    def flow(self, kind: str = "calls") -> None:
        """Makes calls (or ``spans``) without a pause until it is killed."""
        threading.Thread(target=getattr(self, kind), args=(10**9,), daemon=True).start()

    def hold(self, argv: list[str]) -> int:
        """A call that starts ``argv`` and does not end; the process's pid."""
        import ray_guard

        scope = ray_guard.tool_call("held", {})
        scope.__enter__()
        self._ledger.note(f"s {scope.span} -1")
        tool = ray_guard.Popen(argv)
        self._kept += [scope, tool]
        return tool.pid

    def child(self, argv: list[str]) -> int:
        """A plain child of this process; its pid."""
        child = subprocess.Popen(argv)
        self._kept.append(child)
        return child.pid

    @staticmethod
    def connects(port: int, count: int) -> list[int]:
        """The error numbers of so many connects; 0: it was connected."""
        found = []
        for _ in range(count):
            try:
                socket.create_connection(("127.0.0.1", port), 5).close()
                found.append(0)
            except OSError as error:
                found.append(error.errno or -1)
        return found


def main() -> None:
    how, ledger, given = sys.argv[1:]
    scope, finish = {"guard": guarded, "observe": observed, "batch": batched}[how](given)
    job = Job(Ledger(ledger), scope)
    print(json.dumps({"pid": os.getpid()}), flush=True)
    for line in sys.stdin:
        (name, arguments), *_ = json.loads(line).items()
        print(json.dumps({"result": getattr(job, name)(*arguments)}), flush=True)
    finish()


if __name__ == "__main__":
    main()
