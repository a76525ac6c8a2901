"""What a tool's span costs, next to a bare OpenTelemetry span: both measured here, in one run, in random order.

    python benchmarks/span.py [--rounds 150] [--calls 100] [--json OUT]

Each round times every variant once, `calls` calls each, in a random order; reported are medians of the time per call
and of the ratios within a round, so that a noisy neighbour hits both sides. Ours goes through a real SOCK_SEQPACKET pair
to another process that takes every message off; before anything is timed, it is checked that both messages of a call
arrive there.
"""

from __future__ import annotations

import argparse
import contextvars
import json
import multiprocessing
import random
import socket
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from ray_guard.client import channel, scope
from ray_guard.client.decorator import tool

BASE = "OpenTelemetry span as current, batch processor"
WARM_UP = 5
ARGUMENTS = {"command": "ls -la /srv/work && git status --short"}


class NoExport(SpanExporter):
    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return SpanExportResult.SUCCESS


class SocketChannel:
    """The sending half of the real channel: one packet, one system call."""

    identity = {"rl.run.id": "bench"}

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def send_packet(self, packet: bytes) -> None:
        self._end.send(packet)

    def send(self, message: dict[str, Any]) -> None:
        self._end.send(json.dumps(message).encode())

    def request(self, message: dict[str, Any], descriptors: Sequence[int] = (), timeout: float | None = None) -> Any:
        raise NotImplementedError


def serve(end: socket.socket, other: socket.socket, lingering: bool) -> None:
    other.close()  # else the end of the benchmark would not be seen here
    packet = bytearray(131_072)
    for _ in range(2):  # the check: answer with what came
        size = end.recv_into(packet)
        end.send(packet[:size])
    while end.recv_into(packet):
        # Like the supervisor: whoever has just spoken is listened to again 2 ms later, so that a burst of messages does
        # not wake this process for each (where no core is free, the sender would wait for it).
        while lingering and drained(end, packet):
            time.sleep(0.002)


def drained(end: socket.socket, packet: bytearray) -> bool:
    """Takes off all that is there; False when there was nothing."""
    end.setblocking(False)
    try:
        found = 0
        while end.recv_into(packet):
            found += 1
    except BlockingIOError:
        return found > 0
    finally:
        end.setblocking(True)
    return False


def plain(command: str) -> str:
    return command


@tool
def decorated(command: str) -> str:
    return command


def ours() -> None:
    with scope.tool_call("bash", ARGUMENTS):
        pass


def timed(call: Callable[[], object], calls: int) -> tuple[float, float]:
    """Seconds by the clock, and of this thread's CPU (which leaves out who else was given the core meanwhile)."""
    began, began_cpu = time.perf_counter(), time.thread_time()
    for _ in range(calls):
        call()
    return time.perf_counter() - began, time.thread_time() - began_cpu


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=150)
    options.add_argument("--calls", type=int, default=100)
    options.add_argument("--lingering", action="store_true", help="the reader lets messages gather for 2 ms")
    options.add_argument("--json", type=Path)
    chosen = options.parse_args()

    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    reader = multiprocessing.get_context("fork").Process(target=serve, args=(there, here, chosen.lingering), daemon=True)
    reader.start()
    there.close()
    wire = SocketChannel(here)

    # Two providers: the mirror adds its processor to one, which would then journal the bare spans as well.
    bare_provider, provider = TracerProvider(), TracerProvider()
    for each in (bare_provider, provider):
        each.add_span_processor(BatchSpanProcessor(NoExport()))
    tracer = bare_provider.get_tracer("bench")

    def use(found: SocketChannel | None) -> None:
        channel.current = lambda: found  # type: ignore[assignment]

    use(wire)
    ours()
    arrived = [json.loads(here.recv(131_072)) for _ in range(2)]
    if [m["op"] for m in arrived] != ["open", "close"] or arrived[0]["span"] != arrived[1]["span"]:
        sys.exit(f"the messages do not arrive, so there is nothing to measure: {arrived}")

    def bare() -> None:
        with tracer.start_as_current_span("execute_tool bash"):
            pass

    def bare_with_attributes() -> None:
        with tracer.start_as_current_span("execute_tool bash", attributes={"gen_ai.tool.name": "bash", "n": 1}):
            pass

    # Scopes ask for a provider at their root: so each of these has an episode of its own, in a context of its own.
    def inside_episode() -> contextvars.Context:
        place = contextvars.copy_context()
        for each in (
            scope.episode(group="g", iteration=7, policy_version="41"),
            scope.turn(3),
        ):
            place.run(each.__enter__)
        return place

    without_provider = inside_episode()
    trace.set_tracer_provider(provider)
    with_provider = inside_episode()
    is_mirrored = len(provider._active_span_processor._span_processors) == 2
    if not is_mirrored:
        sys.exit("the provider is not mirrored to, so there is nothing to measure")

    def unguarded() -> None:
        use(None)
        try:
            ours()
        finally:
            use(wire)

    empty = contextvars.Context()
    variants: dict[str, tuple[contextvars.Context, Callable[[], object]]] = {
        BASE: (empty, bare),
        "the same with two attributes": (empty, bare_with_attributes),
        "plain function": (empty, lambda: plain("ls")),
        "tool_call": (without_provider, ours),
        "@tool": (without_provider, lambda: decorated("ls")),
        "tool_call, mirrored to the user's batch processor": (with_provider, ours),
        "tool_call, unguarded process": (without_provider, unguarded),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    cpus: dict[str, list[float]] = {name: [] for name in variants}
    shuffled = list(variants.items())
    for turn in range(chosen.rounds + WARM_UP):
        random.shuffle(shuffled)
        for name, (place, call) in shuffled:
            # Batches are exported in a thread of this process: finished here, so that no variant pays for another's.
            bare_provider.force_flush()
            provider.force_flush()
            took, cpu = place.run(timed, call, chosen.calls)
            if turn >= WARM_UP:
                times[name].append(took / chosen.calls * 1e6)
                cpus[name].append(cpu / chosen.calls * 1e6)
    here.close()
    reader.join(10)

    def ratio(found: list[float], base: list[float]) -> float:
        return statistics.median(a / b for a, b in zip(found, base, strict=True))

    report = {
        name: {
            "median_us": statistics.median(times[name]),
            "median_cpu_us": statistics.median(cpus[name]),
            "ratio_to_opentelemetry": ratio(times[name], times[BASE]),
            "cpu_ratio_to_opentelemetry": ratio(cpus[name], cpus[BASE]),
        }
        for name in variants
    }
    print(f"{'per call, medians':52s}       clock  ratio     thread CPU  ratio")
    for name, row in report.items():
        print(
            f"{name:52s} {row['median_us']:8.2f} us {row['ratio_to_opentelemetry']:6.3f}    "
            f"{row['median_cpu_us']:8.2f} us {row['cpu_ratio_to_opentelemetry']:6.3f}"
        )
    if chosen.json:
        chosen.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
