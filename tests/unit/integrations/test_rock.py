"""ROCK's ``eagleeye-traceid``: what its client sends from a scope leads back to the trace, and its servers' ids in."""

from __future__ import annotations

import asyncio
import importlib
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from ray_guard.client import channel, foreign, scope
from ray_guard.integrations import rock
from ray_guard.records import EAGLEEYE_TRACE
from ray_guard.testing import RecordingChannel

UTILS = """
from contextvars import ContextVar
trace_id_ctx_var = ContextVar("trace_id", default="")
"""
CLIENT = """
import json, urllib.request
from rock.utils import trace_id_ctx_var
class Config:
    def __init__(self, extra_headers=None):
        self.extra_headers = extra_headers
class Sandbox:
    def __init__(self, url, config):
        self._url, self.config = url, config
    def _build_headers(self):
        headers = {"X-Cluster": "test"}
        if self.config.extra_headers:
            headers.update(self.config.extra_headers)
        return headers
    def execute(self, command):
        body = json.dumps({"command": command}).encode()
        request = urllib.request.Request(f"{self._url}/execute", body, self._build_headers())
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package with ROCK's names and shape, in place of a real one; the hook waits for it."""
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "rock"}
    folder = tmp_path / "rock" / "sdk" / "sandbox"
    folder.mkdir(parents=True)
    (tmp_path / "rock" / "utils").mkdir()
    for each in (tmp_path / "rock", tmp_path / "rock" / "sdk", folder):
        (each / "__init__.py").write_text("")
    (tmp_path / "rock" / "utils" / "__init__.py").write_text(UTILS)
    (folder / "client.py").write_text(CLIENT)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(foreign, "_followed", [])
    rock.install()
    yield folder / "client.py"
    rock.remove()
    for name in [name for name in sys.modules if name.split(".")[0] == "rock"]:
        del sys.modules[name]
    sys.modules.update(kept)


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> RecordingChannel:
    recording = RecordingChannel(identity={"rl.run.id": "run-1"})
    monkeypatch.setattr(channel, "current", lambda: recording)
    return recording


@pytest.fixture
def admin() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """ROCK's admin, as far as headers go."""
    seen: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append({name.lower(): value for name, value in self.headers.items()})
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_request_from_a_scope_brings_its_trace(
    package: Path, wire: RecordingChannel, admin: tuple[str, list[dict[str, str]]]
) -> None:
    client = importlib.import_module("rock.sdk.sandbox.client")
    url, seen = admin
    sandbox = client.Sandbox(url, client.Config())
    sandbox.execute("outside")
    with scope.episode(id="r1"), scope.tool_call("bash") as call:
        sandbox.execute("ls")
    with scope.attach({"eagleeye-traceid": "theirs"}), scope.tool_call("bash"):
        sandbox.execute("ls")
    assert [each.get("eagleeye-traceid") for each in seen] == [None, call.trace, "theirs"]
    assert [each["x-cluster"] for each in seen] == ["test"] * 3


def test_a_callers_own_is_left_and_noted(
    package: Path, wire: RecordingChannel, admin: tuple[str, list[dict[str, str]]]
) -> None:
    client = importlib.import_module("rock.sdk.sandbox.client")
    url, seen = admin
    with scope.tool_call("bash"):
        client.Sandbox(url, client.Config({"EagleEye-TraceId": "mine"})).execute("ls")
    assert seen[0]["eagleeye-traceid"] == "mine"
    assert wire.sent("close")[0]["attributes"][EAGLEEYE_TRACE] == "mine"


def test_a_server_of_rocks_hands_its_id_on(package: Path, wire: RecordingChannel) -> None:
    utils = importlib.import_module("rock.utils")

    async def request(trace: str) -> None:
        utils.trace_id_ctx_var.set(trace)  # as its middleware does
        await asyncio.sleep(0)
        with scope.tool_call("bash"), scope.tool_call("inner"):
            pass

    async def both() -> None:
        await asyncio.gather(request("eagle-1"), request("eagle-2"))

    asyncio.run(both())
    assert [each["identity"][EAGLEEYE_TRACE] for each in wire.sent("open")] == ["eagle-1"] * 2 + ["eagle-2"] * 2


def test_another_rock_is_left_alone_and_that_is_said(
    package: Path, wire: RecordingChannel, caplog: pytest.LogCaptureFixture
) -> None:
    package.write_text("class Box: ...")
    with caplog.at_level(logging.WARNING):
        importlib.import_module("rock.sdk.sandbox.client")
    assert "ROCK's client is not as expected" in caplog.text


def test_headers_that_cannot_be_added_to_break_no_request(package: Path, wire: RecordingChannel) -> None:
    package.write_text(CLIENT.replace("return headers", "return tuple(headers)"))
    client = importlib.import_module("rock.sdk.sandbox.client")
    with scope.tool_call("bash"):
        assert client.Sandbox("", client.Config())._build_headers() == ("X-Cluster",)


def test_nothing_is_loaded_by_waiting() -> None:
    program = (
        "import sys; from ray_guard.integrations.rock import install; install(); "
        "print([name for name in sys.modules if name.split('.')[0] in ('rock', 'httpx', 'pydantic', 'ray')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
