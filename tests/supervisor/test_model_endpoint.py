"""``model_endpoint``: a tool reaches the engine's model calls through the relay, and nothing else of it.

The judge is the server: what it saw. Each attack is first run unconfined, where it must reach it.
"""

# ruff: noqa: E501 - programs within strings

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import PYTHON, Host, Namespace, wait
from model_server import ADMIN, LENGTH, LOOKS, MODEL, PIECES, PROMPT_TOKENS, ModelServer

pytestmark = pytest.mark.kernel

Span = dict[str, Any]

_CLIENT = """
import http.client, json, socket, sys
PORT = int(sys.argv[1])
GIVEN = json.loads(sys.argv[2])
def connection(): return http.client.HTTPConnection("127.0.0.1", PORT, timeout=20)
def post(path, body, link=None, **headers):
    link = link or connection()
    link.request("POST", path, json.dumps(body), {"Content-Type": "application/json", **headers})
    return take(link.getresponse())
def get(path, link=None):
    link = link or connection()
    link.request("GET", path)
    return take(link.getresponse())
def take(answer):
    data = answer.read().decode()
    try: data = json.loads(data)
    except ValueError: pass
    return [answer.status, data, dict(answer.getheaders())]
def raw(data, port=PORT):
    with socket.create_connection(("127.0.0.1", port), 20) as sock:
        sock.sendall(data)
        sock.settimeout(5)
        got = b""
        try:
            while chunk := sock.recv(65536): got += chunk
        except OSError as error: got += b" " + type(error).__name__.encode()
    return got.decode("latin-1")
def say(value): print(json.dumps(value))
"""


class Scene:
    """A server, and hosts confined beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server = ModelServer()
        self.namespace = Namespace()
        self._stack = contextlib.ExitStack()
        self._stack.callback(self.server.close)
        self._stack.callback(self.namespace.close)
        self._count = 0

    def host(self, **policy: Any) -> Host:
        self._count += 1
        endpoint = {"model_endpoint": f"127.0.0.1:{self.server.port}"}
        made = Host({**endpoint, **policy}, self.folder / f"evidence{self._count}", self.namespace)
        self._stack.callback(made.close)
        return made

    def argv(self, program: str, given: object = None) -> list[str]:
        return [PYTHON, "-I", "-S", "-c", _CLIENT + program, str(self.server.port), json.dumps(given)]

    def tool(self, host: Host, program: str, given: object = None, ring: str = "call") -> Any:
        outcome = host.run(ring, self.argv(program, given), timeout=30)
        assert outcome.stdout.strip(), outcome
        return json.loads(outcome.stdout.splitlines()[-1])

    def unconfined(self, program: str, given: object = None) -> Any:
        argv = [*self.namespace.prefix, *self.argv(program, given)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
        return json.loads(done.stdout.splitlines()[-1])

    def close(self) -> None:
        self._stack.close()


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    made = Scene(tmp_path_factory.mktemp("model_endpoint"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def free(scene: Scene) -> Host:
    """No limits."""
    return scene.host()


def chats(host: Host, count: int = 1) -> list[Span]:
    """The ended ``chat`` spans, at least so many."""

    def find() -> Any:
        found = [s for s in host.journal() if s["name"].startswith("chat ") and s["ended"]]
        return found if len(found) >= count else None

    return wait(find, "no chat span has ended")


def violations(host: Host) -> list[tuple[str, str]]:
    found = [s["attributes"] for s in host.journal() if s["name"] == "ray_guard.violation"]
    return [(each["ray_guard.violation.kind"], each["error.type"]) for each in found]


_CHAT = 'say(post("/v1/chat/completions", GIVEN))'
HELLO = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}


def test_a_call_is_answered_and_recorded(scene: Scene) -> None:
    host = scene.host()
    before = len(scene.server.seen)
    status, answer, _ = scene.tool(host, _CHAT, HELLO)
    assert status == 200
    assert answer["choices"][0]["message"]["content"] == "".join(PIECES)
    request = scene.server.seen[-1]
    assert request.body["messages"] == HELLO["messages"]
    assert {each.method for each in scene.server.seen[before:]} == {"GET", "POST"}
    (span,) = chats(host)
    found = span["attributes"]
    assert span["name"] == f"chat {MODEL}"
    assert found["ray_guard.source"] == "supervisor"
    assert found["gen_ai.usage.input_tokens"] == PROMPT_TOKENS
    assert found["gen_ai.usage.output_tokens"] == 3
    assert found["gen_ai.response.finish_reasons"] == ["stop"]
    assert found["http.response.status_code"] == 200
    assert request.headers["traceparent"].split("-")[2] == span["id"]
    processes = {s["id"] for s in host.journal() if s["name"].startswith("process ")}
    assert span["parent"] in processes


@pytest.mark.parametrize("path", ADMIN)
def test_what_an_engine_does_beside_is_out_of_reach(scene: Scene, free: Host, path: str) -> None:
    program = "say(post(GIVEN, {}))"
    assert scene.unconfined(program, path)[0] == 200
    scene.server.seen.clear()
    status, answer, _ = scene.tool(free, program, path)
    assert status == 403
    assert answer["error"]["code"] == "path_not_allowed"
    assert scene.server.seen == []
    assert ("model_endpoint", "path_not_allowed") in violations(free)
