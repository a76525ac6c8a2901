"""Metrics of the forwarder's process, against a strict OTLP receiver by HTTP and gRPC."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.metrics.v1.metrics_pb2 import AggregationTemporality
from otlp import METRICS, Receiver, Traces, by_grpc, by_http

from ray_guard.evidence.forwarder import forwarder_argv
from ray_guard.evidence.journal import Journal
from ray_guard.evidence.metrics import STATE
from ray_guard.evidence.otlp import LineEncoder
from ray_guard.records import Attributes, Resource, SpanKind, SpanRecord, StatusCode

ENCODER = LineEncoder(Resource({"service.name": "rome", "ray.actor_id": "a1"}))
SUPERVISOR = {"ray_guard.source": "supervisor"}
TARGET = {"ray_guard.source": "target"}
NAMES = set(
    "gen_ai.operation.name gen_ai.provider.name gen_ai.request.model gen_ai.token.type gen_ai.tool.name error.type "
    "ray_guard.source ray_guard.violation.kind ray_guard.budget.kind ray_guard.budget.scope ray_guard.egress.reason "
    "network.transport network.io.direction otel.metric.overflow".split()
)
"""All labels there are: none of an id, a command or an address."""

Key = tuple[str, frozenset[tuple[str, Any]]]


class Collector(Receiver):
    """Keeps the newest point of each series, and refuses what is not right."""

    signal = METRICS

    def __init__(self) -> None:
        super().__init__()
        self.points: dict[Key, Any] = {}
        self.resource: dict[str, str] = {}
        self.units: dict[str, str] = {}

    def __str__(self) -> str:
        return f"{self.requests} requests: {sorted(map(str, self.points))}"

    def keep(self, request: Any) -> None:
        found: dict[Key, Any] = {}
        (group,) = request.resource_metrics
        resource = {each.key: each.value.string_value for each in group.resource.attributes}
        assert resource["service.name"]
        assert resource["service.instance.id"]
        (scope,) = group.scope_metrics
        assert scope.scope.name == "ray_guard"
        for metric in scope.metrics:
            which = metric.WhichOneof("data")
            assert which, f"{metric.name} is empty"
            data = getattr(metric, which)
            assert metric.unit, f"{metric.name} has no unit"
            self.units[metric.name] = metric.unit
            if which != "gauge":
                assert data.aggregation_temporality == AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE
            if which == "sum":
                assert data.is_monotonic
            for point in data.data_points:
                labels = {each.key: each.value.string_value for each in point.attributes}
                assert set(labels) <= NAMES, labels
                key = metric.name, frozenset(labels.items())
                assert key not in found, f"{key} twice"
                assert point.time_unix_nano
                if which != "gauge":
                    assert 0 < point.start_time_unix_nano <= point.time_unix_nano
                if which == "histogram":
                    assert sum(point.bucket_counts) == point.count
                    assert len(point.bucket_counts) == len(point.explicit_bounds) + 1
                found[key] = point
        for key in self.points.keys() & found.keys():
            before, after = self.points[key], found[key]
            if before.start_time_unix_nano and before.start_time_unix_nano == after.start_time_unix_nano:
                assert _value(before) <= _value(after), f"{key} went back"
        self.points = found
        self.resource = resource

    def value(self, name: str, **labels: str) -> float | None:
        """The sum of all series of a metric that have these labels (dots as two underscores); None without any."""
        wanted = {(key.replace("__", "."), value) for key, value in labels.items()}
        found = [_value(point) for (of, has), point in self.points.items() if of == name and wanted <= has]
        return sum(found) if found else None

    def series(self, name: str) -> list[dict[str, Any]]:
        return [dict(has) for of, has in self.points if of == name]


def _value(point: Any) -> float:
    """Of a histogram: how many."""
    if hasattr(point, "bucket_counts"):
        return float(point.count)
    return float(getattr(point, point.WhichOneof("value")))


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    assert not made.errors, made.errors


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    with ExitStack() as stack:

        def begin(folder: Path, environ: dict[str, str], *extra: str) -> subprocess.Popen[str]:
            argv = forwarder_argv(folder, environ)
            assert argv is not None
            process = subprocess.Popen(
                [*argv, *extra], env=environ, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            stack.callback(_end, process)
            return process

        yield begin


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, said = process.communicate(timeout=30)
    return process.returncode, said


def environment(endpoint: str, **more: str) -> dict[str, str]:
    """Metrics alone, four times a second."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    metrics = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
        "OTEL_TRACES_EXPORTER": "none",
        "OTEL_METRIC_EXPORT_INTERVAL": "250",
        "OTEL_EXPORTER_OTLP_TIMEOUT": "1",
    }
    return clean | metrics | more


class Writer:
    """Appends ended spans, each of one second and with ids of its own."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.written = 0

    def __call__(self, name: str, about: Attributes, *, failed: bool = False, times: int = 1) -> None:
        for _ in range(times):
            self.written += 1
            self._journal.append(ENCODER.encode(_span(self.written, name, about, failed=failed)))


def _span(number: int, name: str, about: Attributes, *, failed: bool) -> SpanRecord:
    start = 1_700_000_000_000_000_000
    status = StatusCode.ERROR if failed else StatusCode.UNSET
    kind, ids = SpanKind.INTERNAL, (f"{number:032x}", f"{number:016x}")
    return SpanRecord(*ids, None, name, kind, start, start + 1_000_000_000, about, status)


def write_a_job(write: Writer) -> None:
    usage: dict[str, float] = {
        "gen_ai.usage.input_tokens": 300,
        "gen_ai.usage.output_tokens": 7,
        "ray_guard.flops": 1e12,
    }
    write("chat qwen", {**TARGET, "gen_ai.request.model": "qwen", **usage}, times=2)
    write("chat qwen", {**TARGET, "gen_ai.request.model": "qwen"})  # tokens unknown: not zero
    write("execute_tool bash", {**TARGET, "gen_ai.tool.name": "bash"}, times=3)
    write("execute_tool bash", {**TARGET, "gen_ai.tool.name": "bash", "error.type": "OSError"}, failed=True)
    flow = {**SUPERVISOR, "network.transport": "tcp", "network.peer.address": "192.0.2.1", "server.address": "x.org"}
    granted = {"ray_guard.egress.decision": "allow", "ray_guard.egress.reason": "rule"}
    refused = {"ray_guard.egress.decision": "deny", "ray_guard.egress.reason": "not_listed"}
    sent = {"ray_guard.egress.bytes_sent": 1000, "ray_guard.egress.bytes_received": 50}
    write("egress connect", {**flow, **granted, **sent}, times=2)
    write("egress connect", {**flow, **refused}, times=3)
    write("egress connect", {**flow, **refused, **TARGET}, times=9)  # only the supervisor knows what it refused
    violation = {"ray_guard.violation.kind": "egress", "ray_guard.violation.destination": "tcp://192.0.2.1:22"}
    write("ray_guard.violation", {**SUPERVISOR, **violation, "error.type": "not_listed"}, failed=True, times=3)
    passed = {"ray_guard.violation.kind": "egress_bytes", "error.type": "call budget"}
    write("ray_guard.violation", {**SUPERVISOR, **passed}, failed=True)
    near: dict[str, str | int] = {
        "ray_guard.budget.kind": "tokens",
        "ray_guard.budget.scope": "episode",
        "ray_guard.budget.limit": 5,
    }
    write("ray_guard.budget_warning", {**SUPERVISOR, **near})
    write("ray_guard.gpu", {**SUPERVISOR, "ray_guard.gpu.seconds": 12.5})


@pytest.mark.parametrize(("serve", "protocol"), [(by_http, "http/protobuf"), (by_grpc, "grpc")])
def test_a_job_in_numbers(
    tmp_path: Path,
    collector: Collector,
    start: Callable[..., subprocess.Popen[str]],
    serve: Callable[[Receiver], AbstractContextManager[str]],
    protocol: str,
) -> None:
    with serve(collector) as endpoint, Journal(tmp_path / "e") as journal:
        write = Writer(journal)
        write_a_job(write)
        process = start(tmp_path / "e", environment(endpoint, OTEL_EXPORTER_OTLP_METRICS_PROTOCOL=protocol))
        collector.wait(lambda c: c.value("ray_guard.journal.records") == journal.records)
        value = collector.value
        assert value("gen_ai.client.operation.duration", gen_ai__request__model="qwen") == 3
        assert value("gen_ai.client.token.usage", gen_ai__token__type="input") == 2
        tokens = {
            dict(has)["gen_ai.token.type"]: point.sum
            for (name, has), point in collector.points.items()
            if name == "gen_ai.client.token.usage"
        }
        assert tokens == {"input": 600, "output": 14}
        assert value("ray_guard.flops") == 2e12
        assert value("gen_ai.execute_tool.duration", gen_ai__tool__name="bash") == 4
        assert value("gen_ai.execute_tool.duration", error__type="OSError") == 1
        assert value("ray_guard.egress.connections", ray_guard__egress__reason="rule") == 2
        assert value("ray_guard.egress.denials", ray_guard__egress__reason="not_listed") == 3
        assert value("ray_guard.egress.bytes", network__io__direction="transmit") == 2000
        assert value("ray_guard.egress.bytes", network__io__direction="receive") == 100
        assert value("ray_guard.violations") == 4
        assert value("ray_guard.violations", ray_guard__violation__kind="egress", error__type="not_listed") == 3
        assert value("ray_guard.budget.exceeded", ray_guard__budget__scope="call") == 1
        assert value("ray_guard.budget.warnings", ray_guard__budget__kind="tokens") == 1
        assert value("ray_guard.gpu.time") == 12.5
        assert value("ray_guard.journal.lost_records") == 0
        assert value("ray_guard.journal.size") == journal.size
        assert value("ray_guard.supervisor.up") == 1
        assert value("ray_guard.forwarder.lag") is None  # no spans are forwarded
        assert collector.resource["service.name"] == "ray_guard"
        assert collector.units["gen_ai.client.token.usage"] == "{token}"
        write("execute_tool bash", {**TARGET, "gen_ai.tool.name": "bash"})
        assert finish(process) == (0, "")
    assert collector.value("gen_ai.execute_tool.duration") == 5  # the last export has what came last


def test_an_outage_and_a_restart_count_nothing_twice(
    tmp_path: Path, collector: Collector, start: Callable[..., subprocess.Popen[str]]
) -> None:
    answers = iter([500] * 4)
    collector.answer = lambda _: next(answers, 200)
    with by_http(collector) as endpoint, Journal(tmp_path / "e") as journal:
        write = Writer(journal)
        write("execute_tool bash", TARGET, times=10)
        process = start(tmp_path / "e", environment(endpoint))
        assert process.stderr is not None
        assert "does not take metrics" in process.stderr.readline()
        write("execute_tool bash", TARGET, times=5)
        collector.wait(lambda c: c.value("gen_ai.execute_tool.duration") == 15)
        assert finish(process) == (0, "ray-guard forward: the endpoint takes metrics again\n")
        (first,) = {point.start_time_unix_nano for (name, _), point in collector.points.items() if "tool" in name}
        instance = collector.resource["service.instance.id"]

        write("execute_tool bash", TARGET, times=2)
        process = start(tmp_path / "e", environment(endpoint))
        collector.wait(lambda c: c.value("gen_ai.execute_tool.duration") == 2)  # a new stream: from zero, what is new
        (second,) = {point.start_time_unix_nano for (name, _), point in collector.points.items() if "tool" in name}
        assert second > first
        assert collector.resource["service.instance.id"] == instance
        _wait(lambda: _counted(tmp_path / "e") == {Path(journal.path).name: journal.size})

        # Killed with an export under way: what it had counted and nobody took, the next counts.
        under_way, answered = threading.Event(), threading.Event()

        def hold(_: bytes) -> int:
            under_way.set()
            answered.wait(20)
            return 503

        collector.answer = hold
        write("execute_tool bash", TARGET, times=3)
        assert under_way.wait(20)
        process.send_signal(signal.SIGKILL)
        process.wait()
        collector.answer = lambda _: 200
        answered.set()
        process = start(tmp_path / "e", environment(endpoint))
        collector.wait(lambda c: c.value("gen_ai.execute_tool.duration") == 3)
        assert finish(process)[0] == 0
        assert _counted(tmp_path / "e") == {Path(journal.path).name: journal.size}


def _counted(folder: Path) -> Any:
    return json.loads((folder / STATE).read_text())["segments"]


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_spans_and_metrics_do_not_wait_for_each_other(
    tmp_path: Path, collector: Collector, start: Callable[..., subprocess.Popen[str]]
) -> None:
    """Traces to an endpoint that is down: metrics go on, and say how far behind the forwarder is."""
    with by_http(collector) as endpoint, Journal(tmp_path / "e") as journal:
        Writer(journal)("execute_tool bash", TARGET, times=4)
        environ = environment(endpoint, OTEL_TRACES_EXPORTER="otlp")
        environ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"] = "http://127.0.0.1:9/v1/traces"
        start(tmp_path / "e", environ)
        collector.wait(lambda c: bool(c.value("ray_guard.forwarder.failures")))
        assert collector.value("gen_ai.execute_tool.duration") == 4
        assert collector.value("ray_guard.forwarder.lag") == journal.size
        assert collector.value("ray_guard.forwarder.sent") == 0


def test_spans_that_were_taken_are_no_lag(
    tmp_path: Path, collector: Collector, received: Traces, start: Callable[..., subprocess.Popen[str]]
) -> None:
    with by_http(collector, received) as endpoint, Journal(tmp_path / "e") as journal:
        write = Writer(journal)
        write("execute_tool bash", TARGET, times=4)
        process = start(tmp_path / "e", environment(endpoint, OTEL_TRACES_EXPORTER="otlp"))
        collector.wait(lambda c: c.value("ray_guard.forwarder.sent") == 4)
        collector.wait(lambda c: c.value("ray_guard.forwarder.lag") == 0)
        write("execute_tool bash", TARGET, times=3)
        assert finish(process) == (0, "")
    assert collector.value("ray_guard.forwarder.sent") == 7  # the last export waits for the last spans
    assert collector.value("ray_guard.forwarder.lag") == 0
    assert (len(received.spans), received.requests, received.errors) == (7, 2, [])


def test_when_the_supervisor_ends_it_is_said(
    tmp_path: Path, collector: Collector, start: Callable[..., subprocess.Popen[str]]
) -> None:
    parent = subprocess.Popen(["sleep", "60"])
    try:
        with by_http(collector) as endpoint, Journal(tmp_path / "e") as journal:
            Writer(journal)("execute_tool bash", TARGET)
            process = start(tmp_path / "e", environment(endpoint), "--parent", str(parent.pid))
            collector.wait(lambda c: c.value("ray_guard.supervisor.up") == 1)
            parent.kill()
            parent.wait()
            assert process.wait(20) == 0
    finally:
        parent.kill()
        parent.wait()
    assert collector.value("ray_guard.supervisor.up") == 0


def test_an_endpoint_without_metrics_costs_a_line(
    tmp_path: Path, collector: Collector, received: Traces, start: Callable[..., subprocess.Popen[str]]
) -> None:
    collector.answer = lambda _: 404
    with by_http(collector, received) as endpoint, Journal(tmp_path / "e") as journal:
        Writer(journal)("execute_tool bash", TARGET, times=4)
        process = start(tmp_path / "e", environment(endpoint, OTEL_TRACES_EXPORTER="otlp"))
        collector.wait(lambda c: c.requests >= 3)
        code, said = finish(process)
    assert code == 1
    assert said.count("\n") == 1
    assert "404" in said
    assert "OTEL_METRICS_EXPORTER=none" in said
    assert (len(received.spans), received.errors) == (4, [])


def test_what_targets_call_things_does_not_multiply_series(
    tmp_path: Path, collector: Collector, start: Callable[..., subprocess.Popen[str]]
) -> None:
    with by_http(collector) as endpoint, Journal(tmp_path / "e") as journal:
        write = Writer(journal)
        for number in range(300):
            write("execute_tool x", {**TARGET, "gen_ai.tool.name": f"tool-{number}"})
        write("execute_tool x", {**TARGET, "gen_ai.tool.name": "curl 'http://192.0.2.1/$(id)'\n"})
        claims: tuple[int | float | str, ...] = (-5, float("nan"), float("inf"), 10**400, "many")
        for claim in claims:
            write("chat m", {**TARGET, "gen_ai.usage.input_tokens": claim, "ray_guard.flops": claim})
        write("chat m", {**TARGET, "gen_ai.usage.input_tokens": 4})
        process = start(tmp_path / "e", environment(endpoint), "--once")
        assert finish(process) == (0, "")
    assert collector.value("gen_ai.execute_tool.duration") == 301
    names = {each["gen_ai.tool.name"] for each in collector.series("gen_ai.execute_tool.duration")}
    assert len(names) == 65
    assert "(other)" in names
    assert collector.value("gen_ai.client.token.usage") == 1
    assert collector.value("gen_ai.client.operation.duration") == len(claims) + 1
    assert collector.value("ray_guard.flops") is None


@pytest.mark.parametrize("said", ["0", "-1", "soon", "nan", "inf"])
def test_an_interval_that_is_none(
    tmp_path: Path, collector: Collector, start: Callable[..., subprocess.Popen[str]], said: str
) -> None:
    with by_http(collector) as endpoint, Journal(tmp_path / "e") as journal:
        Writer(journal)("execute_tool bash", TARGET)
        process = start(tmp_path / "e", environment(endpoint, OTEL_METRIC_EXPORT_INTERVAL=said), "--once")
        code, words = finish(process)
    assert code == 0
    assert f"OTEL_METRIC_EXPORT_INTERVAL={said!r}" in words
    assert collector.value("gen_ai.execute_tool.duration") == 1


def test_lost_records(tmp_path: Path, collector: Collector, start: Callable[..., subprocess.Popen[str]]) -> None:
    full = {**SUPERVISOR, "ray_guard.violation.kind": "evidence", "error.type": "full"}
    with by_http(collector) as endpoint, Journal(tmp_path / "e") as journal:
        write = Writer(journal)
        for lost in (3, 8, 8):  # the journal says how many so far
            write("ray_guard.violation", {**full, "ray_guard.journal.lost_records": lost}, failed=True)
        write("ray_guard.violation", {**full, **TARGET, "ray_guard.journal.lost_records": 99}, failed=True)
        assert finish(start(tmp_path / "e", environment(endpoint), "--once")) == (0, "")
    assert collector.value("ray_guard.journal.lost_records") == 8
    assert collector.value("ray_guard.violations", ray_guard__violation__kind="evidence") == 3


def test_a_real_denial_of_a_real_supervisor(tmp_path: Path, collector: Collector) -> None:
    """``ray-guard run`` on its own: its supervisor starts the forwarder, as the standard variables ask."""
    (tmp_path / "policy.yaml").write_text("version: 1\negress: {allow: []}\n")
    attempt = "import socket; print(socket.socket().connect_ex(('127.0.0.1', %d)))"
    with by_http(collector) as endpoint:
        port = int(endpoint.rpartition(":")[2])
        unconfined = subprocess.run([sys.executable, "-c", attempt % port], capture_output=True, text=True, timeout=60)
        assert unconfined.stdout == "0\n"
        run = partial(subprocess.run, cwd=tmp_path, env=environment(endpoint), text=True, timeout=60)
        argv = [sys.executable, "-m", "ray_guard.cli", "run", "--policy", "policy.yaml", "--evidence", "e", "--"]
        confined = run([*argv, sys.executable, "-c", attempt % port], capture_output=True)
        assert confined.stdout == "13\n", confined.stderr
        collector.wait(lambda c: c.value("ray_guard.egress.denials", network__transport="tcp") == 1, 30)
        assert collector.value("ray_guard.violations", ray_guard__violation__kind="egress") == 1
        assert collector.value("gen_ai.execute_tool.duration") == 1
        assert collector.value("ray_guard.egress.bytes") is None
