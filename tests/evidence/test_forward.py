"""The forwarder as its own process, against a strict receiver: nothing lost, whatever dies in between."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pytest
from otlp import Traces, by_grpc, plain

from ray_guard.evidence.forward import STATE
from ray_guard.evidence.forwarder import forwarder_argv
from ray_guard.evidence.journal import Journal
from ray_guard.evidence.otlp import LineEncoder
from ray_guard.records import Resource, SpanEvent, SpanKind, SpanLink, SpanRecord, StatusCode

Serve = Callable[..., AbstractContextManager[str]]
Start = Callable[..., "subprocess.Popen[str]"]

RESOURCE = Resource({"service.name": "rome", "host.name": "node-a", "host.ip": ("192.0.2.1", "2001:db8::1")})
ENCODER = LineEncoder(RESOURCE)


def span(number: int, **changes: Any) -> SpanRecord:
    fields: dict[str, Any] = {
        "trace_id": f"{number // 100 + 1:032x}",
        "span_id": f"{number + 1:016x}",
        "parent_id": None,
        "name": "execute_tool bash",
        "kind": SpanKind.INTERNAL,
        "start_ns": 1_700_000_000_000_000_000 + number,
        "end_ns": 1_700_000_001_000_000_000 + number,
        "attributes": {"ray_guard.source": "supervisor", "number": number},
    }
    return SpanRecord(**(fields | changes))


def append(journal: Journal, numbers: range) -> set[str]:
    for number in numbers:
        journal.append(ENCODER.encode(span(number, end_ns=None)))
        journal.append(ENCODER.encode(span(number)))
    return {span(number).span_id for number in numbers}


def environment(endpoint: str, **more: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    spans_alone = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_METRICS_EXPORTER": "none"}
    return clean | spans_alone | {"OTEL_EXPORTER_OTLP_TIMEOUT": "1"} | more


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts forwarders as the supervisor would, and sees to it that none is left."""
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


def finish(process: subprocess.Popen[str], timeout: float = 30) -> tuple[int, str]:
    """Closes the forwarder's stdin, as the supervisor's death would, and waits for the last flush."""
    _, said = process.communicate(timeout=timeout)
    return process.returncode, said


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def test_everything_a_span_has_arrives(tmp_path: Path, start: Start, received: Traces, serve: Serve) -> None:
    full = span(
        1,
        parent_id="00f067aa0ba902b7",
        kind=SpanKind.CLIENT,
        name="egress connect",
        attributes={"text": "ä", "yes": True, "port": 443, "part": 0.5, "args": ("ssh", "-R"), "none": ()},
        status=StatusCode.ERROR,
        status_message="refused",
        events=(SpanEvent("denied", 1_700_000_000_500_000_000, {"rule": "none"}),),
        links=(SpanLink("f" * 32, "e" * 16, {"why": "iteration"}),),
    )
    with serve() as endpoint, Journal(tmp_path / "e") as journal:
        journal.append(ENCODER.encode(full) + ENCODER.encode(span(2, status=StatusCode.OK)))
        environ = environment(endpoint, OTEL_RESOURCE_ATTRIBUTES="deployment.environment.name=lab,host.name=other")
        process = start(tmp_path / "e", environ)
        received.wait(lambda r: len(r.spans) == 2)
        assert finish(process) == (0, "")
    (about, scope, sent), (_, _, second) = received.spans
    assert about == {
        "service.name": "rome",
        "host.name": "node-a",  # the journal's word over the environment's
        "host.ip": ["192.0.2.1", "2001:db8::1"],
        "deployment.environment.name": "lab",
    }
    assert scope.name == "ray_guard"
    assert (sent.trace_id.hex(), sent.span_id.hex(), sent.parent_span_id.hex()) == (
        full.trace_id,
        full.span_id,
        full.parent_id,
    )
    assert (sent.name, sent.kind, sent.start_time_unix_nano, sent.end_time_unix_nano) == (
        "egress connect",
        3,
        full.start_ns,
        full.end_ns,
    )
    assert plain(sent.attributes) == {
        "text": "ä",
        "yes": True,
        "port": 443,
        "part": 0.5,
        "args": ["ssh", "-R"],
        "none": [],
    }
    assert (sent.status.code, sent.status.message) == (2, "refused")
    (event,) = sent.events
    assert (event.name, event.time_unix_nano) == ("denied", 1_700_000_000_500_000_000)
    assert plain(event.attributes) == {"rule": "none"}
    (link,) = sent.links
    assert (link.trace_id.hex(), link.span_id.hex()) == ("f" * 32, "e" * 16)
    assert plain(link.attributes) == {"why": "iteration"}
    assert second.status.code == 1


def test_spans_are_sent_as_they_come_and_open_ones_are_not(
    tmp_path: Path, start: Start, received: Traces, serve: Serve
) -> None:
    with serve() as endpoint, Journal(tmp_path / "e") as journal:
        process = start(tmp_path / "e", environment(endpoint, OTEL_EXPORTER_OTLP_COMPRESSION="gzip"))
        expected = append(journal, range(10))
        received.wait(lambda r: len(r.spans) == 10)
        journal.append(ENCODER.encode(span(50, end_ns=None)))
        with Journal(tmp_path / "e") as second:  # a supervisor that came back
            expected |= append(second, range(100, 110))
            received.wait(lambda r: len(r.spans) == 20)
        assert finish(process) == (0, "")
    assert Counter(received.ids()) == Counter(expected)


def test_torn_and_foreign_lines_hold_nothing_up(tmp_path: Path, start: Start, received: Traces, serve: Serve) -> None:
    with serve() as endpoint, Journal(tmp_path / "e") as journal:
        (tmp_path / "e" / "a.otlp.jsonl").write_bytes(ENCODER.encode(span(900))[:150])
        (tmp_path / "e" / "b.otlp.jsonl").write_bytes(b"\x00\xff\n{}\n\n" + ENCODER.encode(span(901)) + b'{"torn')
        os.mkfifo(tmp_path / "e" / "c.otlp.jsonl")
        expected = append(journal, range(3)) | {span(901).span_id}
        process = start(tmp_path / "e", environment(endpoint))
        received.wait(lambda r: len(r.spans) == 4)
        with (tmp_path / "e" / "a.otlp.jsonl").open("ab") as torn:  # it was not torn: it was being written
            torn.write(ENCODER.encode(span(900))[150:])
        received.wait(lambda r: len(r.spans) == 5)
        assert finish(process) == (0, "")
    assert Counter(received.ids()) == Counter(expected | {span(900).span_id})


def test_a_collector_that_comes_late(tmp_path: Path, start: Start, received: Traces, serve: Serve) -> None:
    port = free_port()
    with Journal(tmp_path / "e") as journal:
        expected = append(journal, range(700))
        process = start(tmp_path / "e", environment(f"http://127.0.0.1:{port}"))
        assert process.stderr is not None
        assert "the endpoint does not take spans" in process.stderr.readline()
        assert process.poll() is None
        with serve(port):
            expected |= append(journal, range(700, 710))
            received.wait(lambda r: len(set(r.ids())) == 710)
            code, said = finish(process)
    assert (code, said) == (0, "ray-guard forward: the endpoint takes spans again\n")
    assert Counter(received.ids()) == Counter(expected)  # nothing was taken while it was down: nothing comes twice


def test_a_collector_that_answers_something_else(tmp_path: Path, start: Start, received: Traces, serve: Serve) -> None:
    answers = iter([503, 302, 503])  # the exporters take a redirection for success
    with (
        serve(answer=lambda _: next(answers, 200)) as endpoint,
        Journal(tmp_path / "e") as journal,
    ):
        expected = append(journal, range(20))
        process = start(tmp_path / "e", environment(endpoint))
        received.wait(lambda r: len(r.spans) >= 20)
        code, _ = finish(process)
    assert code == 0
    assert received.requests > 3
    assert Counter(received.ids()) == Counter(expected)


def test_spans_that_a_collector_leaves_out_are_counted_and_not_sent_again(
    tmp_path: Path, start: Start, received: Traces, serve: Serve
) -> None:
    received.reply.partial_success.rejected_spans = 3
    received.reply.partial_success.error_message = "three are too old"
    with serve() as endpoint, Journal(tmp_path / "e") as journal:
        expected = append(journal, range(20))
        process = start(tmp_path / "e", environment(endpoint), "--once")
        code, said = finish(process)
    assert code == 0
    assert "did not keep 3 of 20 spans: three are too old" in said
    assert Counter(received.ids()) == Counter(expected)
    assert json.loads((tmp_path / "e" / STATE).read_text())["rejected"] == 3


def test_one_span_that_is_refused_does_not_stop_the_others(
    tmp_path: Path, start: Start, received: Traces, serve: Serve
) -> None:

    def picky(body: bytes) -> int:
        return 400 if b"poison" in body else 200

    with serve(answer=picky) as endpoint, Journal(tmp_path / "e") as journal:
        expected = append(journal, range(5))
        journal.append(ENCODER.encode(span(40, name="poison")))
        expected |= append(journal, range(60, 70))
        process = start(tmp_path / "e", environment(endpoint))
        received.wait(lambda r: set(r.ids()) == expected)
        code, said = finish(process)
    assert code == 0
    assert f"span {span(40).span_id} of trace {span(40).trace_id} is passed over" in said
    assert json.loads((tmp_path / "e" / STATE).read_text())["rejected"] == 1


def test_a_collector_that_comes_back_while_a_span_is_suspected(
    tmp_path: Path, start: Start, received: Traces, serve: Serve
) -> None:
    back = threading.Event()

    def answer(body: bytes) -> int:
        if b"suspect" not in body:  # the forwarder asks whether others are taken: from here on all are
            back.set()
        return 200 if back.is_set() else 503

    with serve(answer=answer) as endpoint, Journal(tmp_path / "e") as journal:
        journal.append(ENCODER.encode(span(0, name="suspect")))
        expected = {span(0).span_id} | append(journal, range(1, 6))
        process = start(tmp_path / "e", environment(endpoint))
        received.wait(lambda r: set(r.ids()) == expected)
        code, said = finish(process)
    assert code == 0
    assert "passed over" not in said
    assert json.loads((tmp_path / "e" / STATE).read_text())["rejected"] == 0


def test_killed_and_started_again_it_goes_on_where_it_was(
    tmp_path: Path, start: Start, received: Traces, serve: Serve
) -> None:
    hold = threading.Event()

    def answer(_: bytes) -> int:
        if received.requests >= 2:
            hold.wait(20)  # taken, and the answer never seen: what follows may come twice
        return 200

    with serve(answer=answer) as endpoint, Journal(tmp_path / "e") as journal:
        expected = append(journal, range(2000))
        process = start(tmp_path / "e", environment(endpoint, OTEL_EXPORTER_OTLP_TIMEOUT="30"))
        received.wait(lambda r: r.requests >= 2)
        time.sleep(0.3)
        process.send_signal(signal.SIGKILL)
        process.wait()
        hold.set()
        expected |= append(journal, range(2000, 2010))
        again = start(tmp_path / "e", environment(endpoint))
        received.wait(lambda r: set(r.ids()) >= expected)
        assert finish(again)[0] == 0
        offsets = json.loads((tmp_path / "e" / STATE).read_text())["segments"]
        assert offsets == {Path(journal.path).name: journal.size}
    assert set(received.ids()) == expected
    twice = [name for name, count in Counter(received.ids()).items() if count > 1]
    assert len(twice) <= 512  # at most the batch under way; the first ones were not sent again
    assert received.different() == []


@pytest.mark.parametrize("state", ["", "{", "[]", '{"segments": {"x": "y"}}', '{"segments": 7}'])
def test_a_broken_state_file_costs_duplicates_not_spans(
    tmp_path: Path, start: Start, state: str, received: Traces, serve: Serve
) -> None:
    with serve() as endpoint, Journal(tmp_path / "e") as journal:
        expected = append(journal, range(3))
        (tmp_path / "e" / STATE).write_text(state)
        process = start(tmp_path / "e", environment(endpoint), "--once")
        code, said = finish(process)
    assert code == 0
    assert "sending from the beginning" in said
    assert Counter(received.ids()) == Counter(expected)


def test_an_offset_within_a_line_is_not_trusted(tmp_path: Path, start: Start, received: Traces, serve: Serve) -> None:
    with serve() as endpoint, Journal(tmp_path / "e") as journal:
        expected = append(journal, range(3))
        (tmp_path / "e" / STATE).write_text(
            json.dumps({"segments": {Path(journal.path).name: 17, "gone.otlp.jsonl": 3}})
        )
        assert finish(start(tmp_path / "e", environment(endpoint), "--once"))[0] == 0
        assert json.loads((tmp_path / "e" / STATE).read_text())["segments"] == {Path(journal.path).name: journal.size}
    assert set(received.ids()) == expected


def test_when_the_supervisor_dies_the_rest_is_flushed(tmp_path: Path, received: Traces, serve: Serve) -> None:
    """Real parent, SIGKILLed right after it has written: only its pidfd tells the forwarder."""
    program = """
import os, subprocess, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from ray_guard.evidence.forwarder import forwarder_argv
from ray_guard.evidence.journal import Journal
from ray_guard.evidence.otlp import encode
from ray_guard.records import *
child = subprocess.Popen(forwarder_argv(sys.argv[1], os.environ), stdin=subprocess.DEVNULL)
print(child.pid, flush=True)
sys.stdin.readline()
with Journal(sys.argv[1]) as journal:
    for number in range(1, 301):
        span = SpanRecord("a" * 32, f"{number:016x}", None, "x", SpanKind.INTERNAL, 1, 2, {})
        journal.append(encode(span, Resource({"service.name": "rome"})))
    os.kill(os.getpid(), 9)
"""
    (tmp_path / "e").mkdir(mode=0o700)
    with serve() as endpoint:
        supervisor = subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "e"), str(Path(__file__).parents[2])],
            env=environment(endpoint),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert supervisor.stdout is not None
        forwarder = os.pidfd_open(int(supervisor.stdout.readline()))
        supervisor.communicate("go\n", timeout=30)
        assert supervisor.returncode == -signal.SIGKILL
        received.wait(lambda r: len(r.spans) == 300)
        _wait_for(forwarder, 10)


def _wait_for(pidfd: int, timeout: float) -> None:
    assert select.select([pidfd], [], [], timeout)[0], f"still there after {timeout} s"
    os.close(pidfd)


def test_a_dead_parent_is_noticed_at_the_start(tmp_path: Path, start: Start, received: Traces, serve: Serve) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    with serve() as endpoint, Journal(tmp_path / "e") as journal:
        expected = append(journal, range(3))
        process = start(tmp_path / "e", environment(endpoint), "--parent", str(dead.pid))
        assert process.wait(timeout=30) == 0  # stdin still open
    assert set(received.ids()) == expected


def test_the_last_flush_is_bounded(tmp_path: Path, start: Start, serve: Serve) -> None:
    stuck = threading.Event()
    with (
        serve(answer=lambda _: 200 if stuck.wait(20) else 503) as endpoint,
        Journal(tmp_path / "e") as journal,
    ):
        append(journal, range(3))
        process = start(
            tmp_path / "e", environment(endpoint, OTEL_EXPORTER_OTLP_TIMEOUT="60"), "--flush-seconds", "0.5"
        )
        time.sleep(1.5)
        began = time.monotonic()
        code, said = finish(process)
        assert time.monotonic() - began < 5
        stuck.set()
    assert code == 1
    assert "did not end within 0.5 s" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_flush_too(
    tmp_path: Path, start: Start, number: signal.Signals, received: Traces, serve: Serve
) -> None:
    with serve() as endpoint, Journal(tmp_path / "e") as journal:
        process = start(tmp_path / "e", environment(endpoint))
        append(journal, range(1))
        received.wait(lambda r: len(r.spans) == 1)
        append(journal, range(1, 3))
        process.send_signal(number)
        assert process.wait(timeout=20) == 0
    assert len(received.spans) == 3


def test_two_forwarders_of_one_folder_do_not_send_everything_twice(
    tmp_path: Path, start: Start, received: Traces, serve: Serve
) -> None:
    with serve() as endpoint, Journal(tmp_path / "e") as journal:
        first, second = (start(tmp_path / "e", environment(endpoint)) for _ in range(2))
        expected = append(journal, range(50))
        received.wait(lambda r: len(r.spans) >= 50)
        time.sleep(1)
        assert Counter(received.ids()) == Counter(expected)
        assert finish(first)[0] == 0
        expected |= append(journal, range(50, 60))
        received.wait(lambda r: len(r.spans) == 60)  # the second took over
        assert finish(second)[0] == 0
    assert Counter(received.ids()) == Counter(expected)


def test_once_gives_up_on_a_dead_endpoint(tmp_path: Path, start: Start) -> None:
    with Journal(tmp_path / "e") as journal:
        append(journal, range(1))
        code, said = finish(start(tmp_path / "e", environment(f"http://127.0.0.1:{free_port()}"), "--once"))
    assert code == 1
    assert "does not take spans" in said
    assert not (tmp_path / "e" / STATE).exists()


def test_grpc(tmp_path: Path, start: Start, received: Traces) -> None:
    answers = iter([503, 503])
    received.answer = lambda _: next(answers, 200)
    with by_grpc(received) as endpoint, Journal(tmp_path / "e") as journal:
        expected = append(journal, range(10))
        process = start(tmp_path / "e", environment(endpoint, OTEL_EXPORTER_OTLP_PROTOCOL="grpc"))
        received.wait(lambda r: len(r.spans) >= 10)
        assert finish(process)[0] == 0
    assert Counter(received.ids()) == Counter(expected)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}, "'http/json' is not known"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "needs the package opentelemetry-exporter-otlp-proto-grpc"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, "no OTLP endpoint"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4318"}, "a URL with http or https"),
        ({"OTEL_EXPORTER_OTLP_TIMEOUT": "soon"}, "OTEL_EXPORTER_OTLP_TIMEOUT='soon' is not usable"),
        ({"OTEL_EXPORTER_OTLP_HEADERS": "secret"}, "OTEL_EXPORTER_OTLP_HEADERS: item 1 is no header"),
        ({"OTEL_EXPORTER_OTLP_COMPRESSION": "brotli"}, "gzip, deflate or none"),
        ({"OTEL_EXPORTER_OTLP_CERTIFICATE": "/nowhere/ca.pem"}, "No such file"),
        ({"OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "many"}, "OTEL_BSP_MAX_EXPORT_BATCH_SIZE='many' is not usable"),
    ],
)
def test_what_cannot_work_is_said_at_once(tmp_path: Path, variables: dict[str, str], said: str) -> None:
    # A finder that knows no grpc exporter stands for a machine where it is not installed.
    program = (
        "import sys\n"
        "class Without:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.startswith('opentelemetry.exporter.otlp.proto.grpc'): raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Without())\n"
        "import runpy\n"
        "runpy.run_module('ray_guard.evidence.forward', run_name='__main__')\n"  # as the supervisor starts it
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env=environment("http://127.0.0.1:9") | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 2
    assert said in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "ray_guard.evidence.forward", str(tmp_path / "none")],
        env=environment("http://127.0.0.1:9"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 2
    assert "is not a folder" in ended.stderr


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "  "}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_SDK_DISABLED": "True"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_TRACES_EXPORTER": "none"}, True),
        (
            {
                "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318",
                "OTEL_TRACES_EXPORTER": "console",
                "OTEL_METRICS_EXPORTER": "none",
            },
            False,
        ),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://c:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://c:4318", "OTEL_METRICS_EXPORTER": "prometheus"}, False),
        (
            {
                "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318",
                "OTEL_TRACES_EXPORTER": "none",
                "OTEL_METRICS_EXPORTER": "none",
            },
            False,
        ),
    ],
)
def test_argv_only_where_an_endpoint_is_configured(environ: dict[str, str], wanted: bool) -> None:
    argv = forwarder_argv("/evidence", environ)
    assert (argv is not None) is wanted
    if argv is not None:
        assert argv[1:] == ["-P", "-m", "ray_guard.evidence.forward", "/evidence", "--parent", str(os.getpid())]


def test_asking_for_argv_loads_the_standard_library_only() -> None:
    program = (
        "import sys; import ray_guard.evidence.forward;"
        "print([m for m in ('opentelemetry', 'requests', 'grpc', 'pydantic', 'asyncio') if m in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.strip() == "[]"
