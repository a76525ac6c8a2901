"""Checkpoints leave the host: by file, HTTP and OTLP, through outages, as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ray_guard.evidence.courier import CourierError, destination
from ray_guard.evidence.layout import segment_name
from ray_guard.evidence.note import ORIGIN, Checkpoint, Key
from ray_guard.evidence.verify.seals import read_checkpoints


def line(size: int, log: str = "log") -> bytes:
    key = Key(f"{ORIGIN}{log}", bytes(32))
    checkpoint = Checkpoint(log, size, bytes(32), ((segment_name(log, 1), size),), bytes(32), 1, 2)
    return json.dumps({"key": str(key), "checkpoint": checkpoint.signed(key, bytes(64))}).encode() + b"\n"


class Server:
    """Keeps what is posted; answers with ``status``."""

    def __init__(self) -> None:
        self.status = 200
        self.took: list[tuple[str, dict[str, str], bytes]] = []
        self.refused = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if outer.status == 200:
                    outer.took.append((self.path, dict(self.headers), body))
                else:
                    outer.refused += 1
                self.send_response(outer.status)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.http.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield made
    made.http.shutdown()
    made.http.server_close()
    thread.join()


@pytest.fixture
def send() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    running: list[subprocess.Popen[bytes]] = []

    def start(where: str, **environ: str) -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-P", "-m", "ray_guard.evidence.courier", where]
        pipe = subprocess.PIPE
        running.append(subprocess.Popen(argv, stdin=pipe, stdout=pipe, bufsize=0, env={**os.environ, **environ}))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


def give(process: subprocess.Popen[bytes], *lines: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(b"".join(lines))


def finish(process: subprocess.Popen[bytes]) -> int:
    assert process.stdin is not None
    process.stdin.close()
    return process.wait(20)


def wait(condition: Callable[[], Any], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_to_a_file(tmp_path: Path, send: Callable[..., subprocess.Popen[bytes]]) -> None:
    process = send(str(tmp_path / "kept"))
    give(process, line(1))
    wait((tmp_path / "kept").exists)
    give(process, line(2), line(7, "other"))
    assert finish(process) == 0
    found = read_checkpoints(tmp_path / "kept")
    assert {(note.checkpoint.log, note.checkpoint.size) for note, _ in found} == {("log", 1), ("log", 2), ("other", 7)}


def test_through_an_outage_the_newest_of_each_log_arrives(
    server: Server, send: Callable[..., subprocess.Popen[bytes]]
) -> None:
    server.status = 503
    process = send(f"{server.url}/checkpoints?job=7")
    assert process.stdout is not None
    give(process, line(1))
    assert b"503" in process.stdout.readline()
    give(process, line(2), line(3), line(5, "other"))
    wait(lambda: server.refused >= 2)
    server.status = 200
    assert process.stdout.readline() == b"\n"  # it works again
    assert finish(process) == 0
    assert [body for _, _, body in server.took] == [line(3), line(5, "other")]
    assert {path for path, _, _ in server.took} == {"/checkpoints?job=7"}


def test_an_endpoint_that_stays_down_ends_nothing_but_the_courier(send: Callable[..., subprocess.Popen[bytes]]) -> None:
    process = send("http://127.0.0.1:9/")
    give(process, line(1))
    began = time.monotonic()
    assert finish(process) == 1
    assert 4 < time.monotonic() - began < 9


def test_as_an_otlp_log_record(server: Server, send: Callable[..., subprocess.Popen[bytes]]) -> None:
    process = send("otlp", OTEL_EXPORTER_OTLP_ENDPOINT=f"{server.url}/", OTEL_EXPORTER_OTLP_HEADERS="a=b%20c")
    give(process, line(1))
    assert finish(process) == 0
    ((path, headers, body),) = server.took
    assert path == "/v1/logs"
    assert headers["A"] == "b c"
    from google.protobuf.json_format import Parse
    from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest

    record = Parse(body, ExportLogsServiceRequest()).resource_logs[0].scope_logs[0].log_records[0]
    assert record.body.string_value == json.loads(line(1))["checkpoint"]
    assert record.attributes[0].value.string_value == json.loads(line(1))["key"]


@pytest.mark.parametrize("spelled", ["relative/path", "ftp://host/", "http://", "", "https:///x", "otlp"])
def test_what_is_no_destination(spelled: str) -> None:
    with pytest.raises(CourierError):
        destination(spelled, {})
