"""What a tool's span costs the thread that calls the tool, next to a bare OpenTelemetry span and to other decorators.

    python benchmarks/span.py [--rounds 60] [--calls 60] [--json OUT]

Every call is timed by itself. Ours sends its two messages to a real supervisor, which journals them, and, to tell
the target's share from the supervisor's, over a socket pair to a process that only takes them off. Before anything is
timed, the messages of a call must have arrived at the one and be in the evidence folder of the other. Both exporters of
OpenTelemetry are no-ops, and batches are exported between the measurements. The other decorators run the same way, a
process each (contestants/decorators.py), where the peers are installed; so does a bare span once more, which tells what
their environment makes of it. Besides the time that the caller sees, the CPU time of its thread is taken: it compares
better on a machine that others use.
"""

from __future__ import annotations

import contextvars
import functools
import json
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import harness
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from ray_guard.client import channel, scope
from ray_guard.client.channel import Channel
from ray_guard.client.decorator import tool

BARE = "OpenTelemetry"
SAME = "OpenTelemetry, our attributes"
TOOL = "@tool, supervisor"
CALL = "tool_call, supervisor"
ARGUMENTS = {"command": "ls -la /srv/work && git status --short"}
PACKET = 1 << 17
DECORATORS = Path(__file__).resolve().parent / "contestants" / "decorators.py"
PEERS = {
    "langfuse": "Langfuse @observe",
    "logfire": "Logfire @instrument",
    "mlflow": "MLflow @trace",
    "openinference": "OpenInference @tool",
    "traceloop": "Traceloop @tool",
}
THERE = {"bare": "OpenTelemetry, peers' environment"}
CLOCKS = {"wall": time.perf_counter, "thread": time.thread_time}


class NoExport(SpanExporter):
    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return SpanExportResult.SUCCESS


def batched() -> TracerProvider:
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(NoExport()))
    return provider


def take_off(end: socket.socket, other: socket.socket) -> None:
    other.close()  # else the end of the benchmark would not be seen here
    packet = bytearray(PACKET)
    came = [end.recv(PACKET) for _ in range(2)]
    end.recv(PACKET)  # asked for the proof: sent sooner, the call would take it for a warning
    for each in came:
        end.send(each)
    while end.recv_into(packet):
        pass


def become(target_of: Channel | None) -> None:
    """As if this process were guarded over that channel, or not at all. (``adopt`` is for good.)"""
    vars(channel)["current"] = lambda: target_of


def to_reader() -> Channel:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    multiprocessing.get_context("fork").Process(target=take_off, args=(there, here), daemon=True).start()
    there.close()
    found = Channel(here, {"rl.run.id": "bench"})
    become(found)
    call()
    here.send(b"?")
    here.settimeout(10)
    arrived = [json.loads(here.recv(PACKET)) for _ in range(2)]
    here.settimeout(None)
    if [message["op"] for message in arrived] != ["open", "close"]:
        raise harness.NotConfining(f"the messages do not arrive, so there is nothing to measure: {arrived}")
    return found


def to_supervisor(folder: Path) -> Channel:
    os.environ["RAY_GUARD_EVIDENCE"] = str(folder)
    found = channel.observer()
    if found is None:
        raise harness.NotConfining("there is no supervisor")
    become(found)
    call()
    found.request({"op": "violations", "episode": None})  # answered after what was sent before it
    journal = "".join(path.read_text() for path in folder.glob("*.otlp.jsonl"))
    if journal.count('"execute_tool bash"') != 2:
        raise harness.NotConfining("a call is not in the evidence, so there is nothing to measure")
    return found


def call() -> None:
    with scope.tool_call("bash", ARGUMENTS):
        pass


@tool
def decorated(command: str) -> str:
    return command


def plain(command: str) -> str:
    return command


def episode() -> contextvars.Context:
    """A context within a rollout. Scopes ask at their root whether there is a provider, so each case has its own."""
    place = contextvars.copy_context()
    for each in (scope.episode(group="g", iteration=7, policy_version="41"), scope.turn(3)):
        place.run(each.__enter__)
    return place


@contextmanager
def decorators() -> Iterator[dict[str, harness.Driven]]:
    """The processes of the other decorators by name; none where the peers are not installed."""
    running: dict[str, harness.Driven] = {}
    if not harness.PEERS.exists():
        print(f"{harness.PEERS} is missing (make env-bench): without the other decorators")
    try:
        for kind, name in {**PEERS, **THERE}.items() if harness.PEERS.exists() else ():
            running[name] = harness.Driven(name, [harness.PEERS, DECORATORS, kind], os.environ)
            if running[name].ask("arrive") != [[1]]:
                raise harness.NotConfining(f"{name}: a call's span is not exported, so there is nothing to compare")
        yield running
    finally:
        for each in running.values():
            each.close()


def asked(peer: harness.Driven, calls: int, gap_s: float, clock: str) -> list[float]:
    return [each / 1000 for each in peer.ask(f"measure {calls} {round(gap_s * 1e6)} {clock}")[0]]


def samples(call: Callable[[], object], calls: int, gap_s: float, clock: str) -> list[float]:
    """Microseconds of each call; `gap_s` lies between calls, as work does between tool calls."""
    found, now = [], CLOCKS[clock]
    for _ in range(calls):
        if gap_s:
            time.sleep(gap_s)
        began = now()
        call()
        found.append((now() - began) * 1e6)
    return found


def main() -> None:
    options = harness.arguments(__doc__, rounds=60, calls=60).parse_args()
    report = harness.Report(options)
    with harness.scratch() as folder, decorators() as peers:
        # Two providers: the mirror adds its processor to one, which would then journal the bare spans as well.
        bare, mirrored = batched(), batched()
        tracer = bare.get_tracer("bench")
        reader, supervisor = to_reader(), to_supervisor(folder)

        def measured(
            call: Callable[[], object],
            place: contextvars.Context,
            to: Channel | None,
            sampled: Callable[..., list[float]],
        ) -> list[float]:
            bare.force_flush()
            mirrored.force_flush()
            become(to)
            return place.run(sampled, call)

        def spanned(attributes: dict[str, Any] | None = None) -> None:
            with tracer.start_as_current_span("execute_tool bash", attributes=attributes):
                pass

        outside = contextvars.Context()
        become(supervisor)
        inside = episode()
        with_attributes = functools.partial(spanned, inside.run(attributes_of_a_call))
        del os.environ["RAY_GUARD_EVIDENCE"]  # no observer from here on: unguarded is unguarded
        become(None)
        inside_unguarded = episode()
        trace.set_tracer_provider(mirrored)
        become(supervisor)
        inside_mirrored = episode()

        cases: list[tuple[str, Callable[[], object], contextvars.Context, Channel | None]] = [
            ("plain function", lambda: plain("ls"), outside, None),
            (BARE, spanned, outside, None),
            (SAME, with_attributes, outside, None),
            ("tool_call, unguarded", call, inside_unguarded, None),
            ("tool_call, bare reader", call, inside, reader),
            (CALL, call, inside, supervisor),
            (TOOL, lambda: decorated("ls"), inside, supervisor),
            ("tool_call, supervisor and mirror", call, inside_mirrored, supervisor),
        ]

        def contestants(calls: int, gap_s: float, clock: str) -> list[harness.Contestant]:
            how: dict[str, Any] = {"calls": calls, "gap_s": gap_s, "clock": clock}
            sampled = functools.partial(samples, **how)
            ours = [
                harness.Contestant(name, functools.partial(measured, act, place, to, sampled))
                for name, act, place, to in cases
            ]
            return ours + [harness.Contestant(name, functools.partial(asked, it, **how)) for name, it in peers.items()]

        # Between the rounds the supervisor journals what it was sent.
        few = max(3, options.rounds // 4)
        runs = {
            "in bursts": (contestants(options.calls, 0.0, "wall"), options.rounds),
            "in bursts, its CPU time": (contestants(options.calls, 0.0, "thread"), options.rounds),
            "one every 2 ms": (contestants(20, 0.002, "wall"), few),
            "one every 2 ms, its CPU time": (contestants(20, 0.002, "thread"), few),
        }
        found = {how: harness.compare(those, rounds, pause_s=0.01) for how, (those, rounds) in runs.items()}
    for how, outcomes in found.items():
        report.add(f"a tool's span, as its thread sees it, {how}", "µs", outcomes, (BARE, SAME, TOOL))
        by_name = {each.name: each for each in outcomes}
        for name in (CALL, TOOL):
            ratio = harness.ratios(by_name[name], by_name[BARE])[0]
            report.goal(f"{name}, {how} / bare OpenTelemetry span", ratio, 1.5)
        for name in PEERS.values():
            if name in by_name:
                ratio = harness.ratios(by_name[TOOL], by_name[name])[0]
                report.goal(f"{TOOL}, {how} / {name}", ratio, 1.0)
    report.close()


def attributes_of_a_call() -> dict[str, Any]:
    with scope.tool_call("bash", ARGUMENTS) as made:
        return {**made.identity, **made.opening()}


if __name__ == "__main__":
    main()
