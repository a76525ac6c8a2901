"""``model_endpoint``: a tool reaches the engine's model calls through the relay, and nothing else of it.

The judge is the server: what it saw. Each attack is first run unconfined, where it must reach it.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import launcher
import pytest
from harness import PYTHON, ROOT, Host, Namespace, read_journal, wait
from model_server import ADMIN, LENGTH, LOOKS, MODEL, PIECES, PROMPT_TOKENS, ModelServer

pytestmark = pytest.mark.kernel

Span = dict[str, Any]

_CLIENT = """
import http.client, json, socket, sys, time
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


def flow(host: Host) -> Any:
    """The attributes of the first flow that has ended."""

    def find() -> Any:
        return [s["attributes"] for s in host.journal() if s["name"] == "egress connect" and s["ended"]]

    return wait(find, "no flow has ended")[0]


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


@pytest.mark.parametrize("path", LOOKS)
def test_nor_can_it_be_looked_at(scene: Scene, free: Host, path: str) -> None:
    program = "say(get(GIVEN))"
    assert scene.unconfined(program, path)[0] == 200
    scene.server.seen.clear()
    assert scene.tool(free, program, path)[0] == 403
    assert scene.server.seen == []


def test_its_models_are_told(scene: Scene, free: Host) -> None:
    status, answer, _ = scene.tool(free, 'say(get("/v1/models?client_version=1"))')
    assert (status, answer["data"][0]["id"]) == (200, MODEL)
    assert scene.server.seen[-1].path == "/v1/models"


def test_a_kept_connection_is_judged_request_by_request(scene: Scene, free: Host) -> None:
    program = """
link = connection()
first = post("/v1/chat/completions", GIVEN, link)
port = link.sock.getsockname()[1]
second = post("/v1/completions", {"model": GIVEN["model"], "prompt": "a", "max_tokens": 1}, link)
same = link.sock.getsockname()[1] == port
third = post("/update_weights", {}, link)
say([first[0], second[0], same, third[0], third[2].get("Connection")])
"""
    scene.server.seen.clear()
    assert scene.tool(free, program, HELLO) == [200, 200, True, 403, "close"]
    assert scene.server.paths() == ["POST /v1/chat/completions", "POST /v1/completions"]


_BODY = json.dumps(HELLO)
_HEAD = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost:PORT\r\nContent-Length: {len(_BODY)}\r\n"
_EVIL = "POST /update_weights HTTP/1.1\r\nHost: localhost:PORT\r\nContent-Length: 2\r\n\r\n{}"


@pytest.mark.parametrize(
    "data",
    [
        _HEAD + "Connection: close\r\n\r\n" + _BODY + _EVIL,
        _HEAD + "\r\n" + _BODY + _EVIL,
        _HEAD + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + _EVIL,
        _HEAD + "Content-Length: 5\r\n\r\n" + _BODY + _EVIL,
        _HEAD.replace("Content-Length", "Content-Length ") + "\r\n" + _BODY + _EVIL,
        _HEAD.replace("Content-Length: ", "X: a\r\n folded\r\nContent-Length: 0") + "\r\n" + _EVIL,
        _HEAD.replace("\r\n", "\n") + "\n" + _BODY + _EVIL,
        _EVIL.replace("/update_weights", "http://localhost:PORT/update_weights"),
        _EVIL.replace("/update_weights", "http://elsewhere/v1/completions"),
        _EVIL.replace("localhost", "elsewhere"),
        _EVIL.replace("/update_weights", "/v1/completions/../../update_weights"),
        _EVIL.replace("/update_weights", "/v1//completions/%2e%2e/update_weights"),
        _EVIL.replace("/update_weights", "//update_weights"),
        _EVIL.replace("/update_weights", "/v1/completions;/../update_weights"),
        _EVIL.replace("/update_weights", "/v1/completions\\..\\update_weights"),
        _EVIL.replace("POST", "CONNECT"),
        _EVIL.replace("Content-Length: 2", "Upgrade: h2c\r\nConnection: Upgrade\r\nContent-Length: 2"),
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _EVIL,
        "X" + _EVIL,
        "\r\n" + _EVIL,
    ],
)
def test_nothing_is_smuggled(scene: Scene, free: Host, data: str) -> None:
    """Whatever the relay makes of it, the server must not see the second request, nor any but what it may."""
    scene.server.seen.clear()
    answer = scene.tool(free, "say(raw(GIVEN.encode()))", data.replace("PORT", str(scene.server.port)))
    assert "update_weights" not in "".join(scene.server.paths())
    assert set(scene.server.paths()) <= {"POST /v1/chat/completions"}
    assert " 40" in answer or "Connection: close" in answer


def test_the_smuggled_request_works_unconfined(scene: Scene) -> None:
    scene.server.seen.clear()
    data = (_HEAD + "\r\n" + _BODY + _EVIL.replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n", 1)).replace(
        "PORT", str(scene.server.port)
    )
    scene.unconfined("say(raw(GIVEN.encode()))", data)
    assert scene.server.paths() == ["POST /v1/chat/completions", "POST /update_weights"]


def test_what_goes_on_was_written_by_the_relay(scene: Scene, free: Host) -> None:
    """Headers and fields of the client's own do not pass; its key to the engine does."""
    headers = {
        "Authorization": "Bearer its-own",
        "traceparent": "00-11111111111111111111111111111111-2222222222222222-01",
        "x-ray-guard-reservation": "3" * 32,
        "X-Request-Id": "mine",
        "X-Data-Parallel-Rank": "1",
        "Cookie": "a=b",
    }
    program = 'say(post("/v1/chat/completions", GIVEN[0], **GIVEN[1]))'
    body = {**HELLO, "priority": -5, "request_id": "mine", "vllm_xargs": {"a": 1}, "unheard_of": 1}
    status, _, answered = scene.tool(free, program, [body, headers])
    assert status == 200
    assert answered["x-ray-guard-dropped"] == "priority, request_id, unheard_of, vllm_xargs"
    seen = scene.server.seen[-1]
    assert seen.body == HELLO
    expected = {"host", "user-agent", "accept", "accept-encoding", "content-type", "content-length", "authorization"}
    assert set(seen.headers) == {*expected, "traceparent", "x-ray-guard-reservation"}
    assert seen.headers["authorization"] == "Bearer its-own"
    assert seen.headers["x-ray-guard-reservation"] != "3" * 32
    assert "1111" not in seen.headers["traceparent"]


def image(url: object) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": url}]}]}


@pytest.mark.parametrize(
    ("path", "change", "code"),
    [
        ("/v1/chat/completions", image({"url": "http://x/"}), "reaches_out"),
        ("/v1/chat/completions", image("file:///etc/passwd"), "reaches_out"),
        ("/v1/chat/completions", {"kv_transfer_params": {"remote_host": "10.0.0.1"}}, "reaches_out"),
        ("/v1/chat/completions", {"chat_template": "{% for i in range(10**9) %}{% endfor %}"}, "code"),
        ("/v1/chat/completions", {"lora_request": {"lora_path": "/tmp/x"}}, "weights"),
        ("/v1/responses", {"tools": [{"type": "mcp", "server_url": "http://x/"}]}, "remote_tool"),
        ("/v1/responses", {"previous_response_id": "resp_1"}, "stored_state"),
        ("/v1/completions", {"prompt_embeds": "AAAA"}, "code"),
        ("/v1/completions", {"use_beam_search": True, "n": 4}, "uncounted"),
    ],
)  # fmt: skip
def test_the_engine_does_not_reach_out_for_a_tool(
    scene: Scene, free: Host, path: str, change: dict[str, Any], code: str
) -> None:
    base = {"/v1/responses": {"input": "a"}, "/v1/completions": {"prompt": "a"}}.get(path, HELLO)
    program = "say(post(*GIVEN))"
    assert scene.unconfined(program, [path, {"model": MODEL, **base, **change}])[0] == 200
    scene.server.seen.clear()
    status, answer, _ = scene.tool(free, program, [path, {"model": MODEL, **base, **change}])
    assert (status, answer["error"]["code"]) == (403, code)
    assert scene.server.paths() == []


def test_a_model_that_the_server_has_not_is_not_asked_for(scene: Scene, free: Host) -> None:
    """A server may load what it is asked for: an adapter, from a folder or a hub."""
    scene.server.seen.clear()
    status, answer, _ = scene.tool(free, _CHAT, {**HELLO, "model": "../../tmp/adapter"})
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert scene.server.paths() == []


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_tokens_are_charged_as_the_engine_counts_them(scene: Scene) -> None:
    """A call may take 2,000: each takes 14 in truth, though it reserves more, and the third does not fit any more."""
    host = scene.host(budgets={"call": {"tokens": 1000}})
    program = 'say([post("/v1/chat/completions", GIVEN) for _ in range(60)])'
    scene.server.seen.clear()
    answers = scene.tool(host, program, {**HELLO, "max_tokens": 100})
    passed = sum(status == 200 for status, _, _ in answers)
    assert len(scene.server.paths()) == passed
    assert 30 < passed < 60
    refused = next(each for each in answers if each[0] != 200)
    assert refused[0] == 429
    assert refused[1]["error"]["code"] == "insufficient_quota"
    assert "tokens" in refused[1]["error"]["message"]
    assert refused[2]["x-should-retry"] == "false"
    found = [span["attributes"] for span in chats(host, 60)]
    charged = sum(each.get("ray_guard.tokens.charged", 0) for each in found)
    assert charged == passed * (PROMPT_TOKENS + 3)
    assert ("tokens", "call budget") in violations(host)
    reserved = max(each["ray_guard.tokens.reserved"] for each in found)
    assert charged + reserved > 1000, "it was refused though there was room"


def test_what_is_left_is_put_into_a_request_that_does_not_say(scene: Scene) -> None:
    """What the model can take at most does not fit; so much of it does."""
    host = scene.host(budgets={"call": {"tokens": 800}})
    said = {key: value for key, value in HELLO.items() if key != "max_tokens"}
    status, _, _ = scene.tool(host, _CHAT, said)
    assert status == 200
    (span,) = chats(host)
    fill = scene.server.seen[-1].body["max_tokens"]
    assert fill == span["attributes"]["gen_ai.request.max_tokens"]
    assert span["attributes"]["ray_guard.tokens.reserved"] <= 800
    assert 300 < fill < 800


def test_where_there_is_room_the_request_stays_as_it_is(scene: Scene) -> None:
    host = scene.host(budgets={"call": {"tokens": 100_000}})
    said = {key: value for key, value in HELLO.items() if key != "max_tokens"}
    assert scene.tool(host, _CHAT, said)[0] == 200
    assert scene.server.seen[-1].body == said
    assert chats(host)[0]["attributes"]["ray_guard.tokens.reserved"] == LENGTH


def test_an_answer_that_never_comes_is_charged_as_reserved(scene: Scene) -> None:
    host = scene.host(budgets={"call": {"tokens": 10_000}})
    body = {**HELLO, "messages": [{"role": "user", "content": "break"}]}
    status, answer, _ = scene.tool(host, _CHAT, body)
    assert (status, answer["error"]["code"]) == (502, "bad_gateway")
    found = chats(host)[0]["attributes"]
    assert found["ray_guard.tokens.charged"] == found["ray_guard.tokens.reserved"] > 0
    assert found["ray_guard.tokens.bound"] == "reserved"


def test_a_request_that_the_engine_rejects_costs_nothing(scene: Scene) -> None:
    host = scene.host(budgets={"call": {"tokens": 10_000}})
    body = {**HELLO, "messages": [{"role": "user", "content": "reject"}]}
    assert scene.tool(host, _CHAT, body)[0] == 400
    assert chats(host)[0]["attributes"]["ray_guard.tokens.charged"] == 0


def test_flops_that_nobody_can_count_are_refused(scene: Scene) -> None:
    host = scene.host(budgets={"call": {"flops": 1e18}})
    scene.server.seen.clear()
    assert scene.tool(host, _CHAT, HELLO)[0] == 429
    assert scene.server.paths() == []
    assert ("flops", "unmeasured") in violations(host)


_SERVES = """
from ray_guard.client.quota import announce_price, reserve
import ray_guard
announce_price(["tiny"], per_token=1000.0, per_context_token=0.0)
result = None
"""
_RESERVES = """
try:
    reserve(tokens=most, flops=1.0, paid=word).settle(tokens=200)
    result = "granted"
except ray_guard.BudgetExceeded as error:
    result = error.scope
"""


def test_who_serves_the_model_says_its_price_and_does_not_charge_again(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one-time word in the request stands for those who pay already: here the job, which has room for one."""
    monkeypatch.setenv("RAY_GUARD_RUN_ID", "price")
    budgets = {"job": {"tokens": 700, "flops": 1e9}}
    serving = scene.host(role="policy", budgets=budgets, model_endpoint=None)
    serving.inside(_SERVES)
    asking = scene.host(budgets=budgets)
    body = {**HELLO, "messages": [{"role": "user", "content": "long slow"}], "stream": True, "max_tokens": 100}
    scene.server.seen.clear()
    answers: list[Any] = []
    tool = threading.Thread(target=lambda: answers.append(scene.tool(asking, _CHAT, body)[0]))
    tool.start()
    seen = wait(lambda: [each for each in scene.server.seen if each.method == "POST"], "nothing was asked")[0]
    word = seen.headers["x-ray-guard-reservation"]
    assert serving.inside(_SERVES + _RESERVES, most=400, word="0" * 32) == "job"
    assert serving.inside(_SERVES + _RESERVES, most=400, word=word) == "granted"
    tool.join()
    assert answers == [200]
    assert chats(asking)[0]["attributes"]["ray_guard.flops"] == 1000 * (PROMPT_TOKENS + 100)
    assert serving.inside(_SERVES + _RESERVES, most=600, word=word) == "job"  # once it has ended the word says nothing
    # An engine without a cache computes the prompt again for each choice, and counts it once among the tokens.
    choosing = scene.host(budgets={"call": {"flops": 1e9}})
    assert scene.tool(choosing, _CHAT, {**HELLO, "n": 4})[0] == 200
    assert chats(choosing)[0]["attributes"]["ray_guard.flops"] == 1000 * (4 * PROMPT_TOKENS + 4 * 3)


def test_nobody_but_a_policy_actor_says_a_price(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_GUARD_RUN_ID", "cheap")
    host = scene.host(role="env", budgets={"call": {"flops": 1e12}})
    host.inside(_SERVES)
    assert scene.tool(host, _CHAT, HELLO)[0] == 429


# -- streams -----------------------------------------------------------------------------------------------------------

_STREAM = """
link = connection()
link.request("POST", GIVEN[0], json.dumps(GIVEN[1]))
answer = link.getresponse()
say([answer.status, answer.read().decode(), dict(answer.getheaders())])
"""


def events(text: str) -> list[Any]:
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


@pytest.mark.parametrize("asked", [None, {"include_usage": True}, {"include_usage": False}])
def test_a_stream_is_passed_on_and_its_usage_is_counted(scene: Scene, asked: dict[str, bool] | None) -> None:
    host = scene.host(budgets={"call": {"tokens": 10_000}})
    body = {**HELLO, "stream": True} | ({} if asked is None else {"stream_options": asked})
    status, text, _ = scene.tool(host, _STREAM, ["/v1/chat/completions", body])
    assert status == 200
    found = events(text)
    assert found[-1] == "[DONE]"
    pieces = [each["choices"][0]["delta"]["content"] for each in found[:-1] if each["choices"]]
    assert pieces == list(PIECES)
    told = [each["usage"] for each in found[:-1] if each.get("usage")]
    assert len(told) == (1 if asked == {"include_usage": True} else 0)
    attributes = chats(host)[0]["attributes"]
    assert attributes["ray_guard.tokens.charged"] == PROMPT_TOKENS + 3
    assert attributes["ray_guard.tokens.bound"] == "exact"
    assert attributes["gen_ai.usage.cache_read.input_tokens"] == 8
    assert attributes["gen_ai.response.finish_reasons"] == ["stop"]
    assert 0 < attributes["gen_ai.latency.time_to_first_token"] < 10


@pytest.mark.parametrize("how", [{"Connection": "close"}, {}])
def test_a_long_answer_comes_whole_to_who_reads_slowly(scene: Scene, free: Host, how: dict[str, str]) -> None:
    """More than any buffer on the way holds."""
    program = """
link = connection()
link.connect()
link.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
link.request("POST", "/v1/chat/completions", json.dumps(GIVEN[0]), GIVEN[1])
answer = link.getresponse()
data = b""
while chunk := answer.read(4096):
    data += chunk
    if len(data) < 200_000: time.sleep(0.005)
say([data.count(b"data:"), data.endswith(b"data: [DONE]\\n\\n")])
"""
    text = "long " + "wide " * 2
    body = {**HELLO, "messages": [{"role": "user", "content": text}], "stream": True, "max_tokens": 1000}
    assert scene.tool(free, program, [body, how]) == [1001, True]


@pytest.mark.parametrize("stream", [False, True])
def test_responses_are_counted_too(scene: Scene, stream: bool) -> None:
    host = scene.host(budgets={"call": {"tokens": 10_000}})
    body = {
        "model": MODEL,
        "input": "hello",
        "stream": stream,
        "store": True,
        "tools": [{"type": "function", "name": "f"}],
    }
    status, text, _ = scene.tool(host, _STREAM, ["/v1/responses", body])
    assert status == 200
    assert scene.server.seen[-1].body["store"] is False
    if stream:
        assert [each["type"] for each in events(text)][-1] == "response.completed"
    attributes = chats(host)[0]["attributes"]
    assert attributes["ray_guard.tokens.charged"] == PROMPT_TOKENS + 3
    assert attributes["gen_ai.usage.cache_read.input_tokens"] == 4


def test_a_client_that_goes_away_cancels(scene: Scene) -> None:
    """The server notices at once, and what it had told until then is charged."""
    host = scene.host(budgets={"call": {"tokens": 10_000}})
    program = """
body = json.dumps(GIVEN).encode()
with socket.create_connection(("127.0.0.1", PORT), 20) as sock:
    head = f"POST /v1/chat/completions HTTP/1.1\\r\\nHost: localhost:{PORT}\\r\\nContent-Length: {len(body)}"
    sock.sendall(head.encode() + b"\\r\\n\\r\\n" + body)
    got = b""
    while got.count(b"data:") < 5: got += sock.recv(4096)
say("gone")
"""
    body = {**HELLO, "messages": [{"role": "user", "content": "long slow"}], "stream": True, "max_tokens": 900}
    before, produced = scene.server.cancelled, scene.server.produced
    assert scene.tool(host, program, body) == "gone"
    wait(lambda: scene.server.cancelled > before, "the server was not told")
    assert scene.server.produced - produced < 100
    attributes = chats(host)[0]["attributes"]
    assert attributes["ray_guard.tokens.bound"] == "lower"
    assert PROMPT_TOKENS + 5 <= attributes["ray_guard.tokens.charged"] < PROMPT_TOKENS + 100
    assert attributes["error.type"] == "cut"


# -- bytes -------------------------------------------------------------------------------------------------------------


def test_bytes_are_counted_and_capped(scene: Scene) -> None:
    stream = ["/v1/chat/completions", {**HELLO, "stream": True}]
    free = scene.host(budgets={"call": {"egress_bytes": 1 << 30}})
    status, text, _ = scene.tool(free, _STREAM, stream)
    assert status == 200
    found = flow(free)
    assert found["ray_guard.egress.reason"] == "model_endpoint"
    assert found["ray_guard.egress.bytes_received"] > len(text)
    whole = found["ray_guard.egress.bytes_sent"] + found["ray_guard.egress.bytes_received"]

    capped = scene.host(budgets={"call": {"egress_bytes": whole // 2}})
    assert capped.run("call", scene.argv(_STREAM, stream)).status != 0
    used = flow(capped)
    assert used["ray_guard.egress.bytes_sent"] + used["ray_guard.egress.bytes_received"] <= whole // 2
    assert ("egress_bytes", "call budget") in violations(capped)


# -- where it is -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ring", ["call", "actor"])
def test_it_holds_in_both_rings(scene: Scene, ring: str) -> None:
    host = scene.host(role="env")
    scene.server.seen.clear()
    program = 'say([post("/v1/chat/completions", GIVEN)[0], post("/update_weights", {})[0]])'
    assert scene.tool(host, program, HELLO, ring=ring) == [200, 403]
    assert scene.server.paths() == ["POST /v1/chat/completions"]


_REACH = """
try: say(raw(b"POST /update_weights HTTP/1.1\\r\\nHost: a\\r\\nContent-Length: 0\\r\\nConnection: close\\r\\n\\r\\n"))
except OSError as error: say(error.errno)
"""


@pytest.mark.parametrize("ring", ["call", "actor"])
@pytest.mark.parametrize("allow", [[], ["127.0.0.0/8:*"], ["0.0.0.0/0:*"]])
def test_no_rule_opens_its_port(scene: Scene, ring: str, allow: list[str]) -> None:
    """Listed or not, it is reached through the relay or not at all; nor at another address of its node."""
    assert scene.unconfined(_REACH).startswith("HTTP/1.1 200")
    host = scene.host(egress={"allow": allow})
    scene.server.seen.clear()
    assert "host_mismatch" in scene.tool(host, _REACH, ring=ring)
    other = _REACH.replace("raw(", 'socket.create_connection(("127.0.0.2", PORT), 3) and raw(')
    assert scene.tool(host, other, ring=ring) == 13
    assert scene.server.paths() == []


def test_a_connection_that_stands_already_is_refused(scene: Scene) -> None:
    """It would not go through the relay."""
    program = """
import socket
kept = socket.create_connection(("127.0.0.1", arguments["port"]))
import ray_guard
try:
    ray_guard.confine({"model_endpoint": f"127.0.0.1:{arguments['port']}"})
    result = "confined"
except ray_guard.NotEnforced as error:
    result = str(error)
"""
    argv = [*scene.namespace.prefix, PYTHON, "-c", f"arguments = {{'port': {scene.server.port}}}{program}print(result)"]
    environment = {"RAY_GUARD_EVIDENCE": str(scene.folder / "standing"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, env=environment)
    assert f"tcp://127.0.0.1:{scene.server.port}" in done.stdout, done


def test_in_mode_report_nothing_is_refused_and_everything_is_said(scene: Scene) -> None:
    host = scene.host(mode="report", budgets={"call": {"tokens": 1}})
    scene.server.seen.clear()
    program = """
link = connection()
say([post("/v1/chat/completions", GIVEN, link)[0], post("/update_weights", {}, link)[0]])
"""
    assert scene.tool(host, program, HELLO) == [200, 200]
    assert scene.server.paths() == ["POST /v1/chat/completions", "POST /update_weights"]
    assert ("model_endpoint", "path_not_allowed") in violations(host)
    assert ("tokens", "call budget") in violations(host)


def test_two_policies_must_both_name_it(scene: Scene) -> None:
    """One that does not is one that refuses; one that lists the address agrees, and it stays with the relay."""
    where = f"127.0.0.1:{scene.server.port}"
    code = """
import ray_guard
ray_guard.confine(policy)
result = None
"""
    scene.server.seen.clear()
    host = scene.host()
    host.inside(code, policy={"egress": {"allow": [where]}})
    program = 'say([post("/v1/chat/completions", GIVEN)[0], post("/update_weights", {})[0]])'
    assert scene.tool(host, program, HELLO) == [200, 403]
    assert scene.server.paths() == ["POST /v1/chat/completions"]
    host.inside(code, policy={"egress": {"allow": []}})
    assert scene.tool(host, _REACH) == 13


def test_the_server_that_is_not_there(scene: Scene) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        host = scene.host(model_endpoint=f"127.0.0.1:{port}")
        argv = scene.argv(_REACH)
        argv[-2] = str(port)
        assert json.loads(host.run("call", argv).stdout.splitlines()[-1]) == 111


def test_an_endpoint_of_ipv6(tmp_path: Path) -> None:
    server = ModelServer("::1")
    try:
        with contextlib.ExitStack() as stack:
            namespace = Namespace()
            stack.callback(namespace.close)
            host = Host({"model_endpoint": f"[::1]:{server.port}"}, tmp_path / "evidence", namespace)
            stack.callback(host.close)
            program = 'say([post("/v1/chat/completions", GIVEN)[0], post("/update_weights", {})[0]])'
            text = _CLIENT.replace("127.0.0.1", "::1") + program
            argv = [PYTHON, "-I", "-S", "-c", text, str(server.port), json.dumps(HELLO)]
            assert json.loads(host.run("call", argv).stdout) == [200, 403]
            assert server.paths() == ["POST /v1/chat/completions"]
            assert server.seen[-1].headers["host"] == f"[::1]:{server.port}"
    finally:
        server.close()


@pytest.mark.skipif(not ROOT, reason="a hosts file of its own needs root")
@pytest.mark.parametrize("proxy", [None, "http://127.0.0.1:9"])
def test_an_endpoint_that_is_a_name(scene: Scene, tmp_path: Path, proxy: str | None) -> None:
    """By the hosts file here; no proxy is on the way to it."""
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n127.0.0.1 engine.example.org other.example.org\n")
    with contextlib.ExitStack() as stack:
        namespace = Namespace()
        stack.callback(namespace.close)
        own = len(launcher.prefix())  # a simulated host may refuse to mount
        outside = namespace.prefix[:-own] if own else namespace.prefix
        subprocess.run([*outside, "mount", "--bind", str(hosts), "/etc/hosts"], check=True)
        policy = {"model_endpoint": f"engine.example.org:{scene.server.port}", "egress": {"proxy": proxy}}
        host = Host(policy, tmp_path / "evidence", namespace)
        stack.callback(host.close)

        def ask(name: str) -> Any:
            program = 'say([post("/v1/chat/completions", GIVEN)[0], post("/update_weights", {})[0]])'
            text = _CLIENT.replace("127.0.0.1", name) + program
            argv = [PYTHON, "-I", "-S", "-c", text, str(scene.server.port), json.dumps(HELLO)]
            return host.run("call", argv)

        scene.server.seen.clear()
        assert json.loads(ask("engine.example.org").stdout) == [200, 403]
        assert scene.server.seen[-1].headers["host"] == f"engine.example.org:{scene.server.port}"
        assert scene.server.paths() == ["POST /v1/chat/completions"]
        assert json.loads(ask("other.example.org").stdout) == [403, 403]  # the address is right, the host is not
        assert scene.server.paths() == ["POST /v1/chat/completions"]


def test_what_is_refused_there_is_a_violation_like_others(scene: Scene) -> None:
    host = scene.host(on_violation="kill_call")
    scene.server.seen.clear()
    began = time.monotonic()
    with pytest.raises(AssertionError, match=r"EgressDenied.*path_not_allowed"):  # as the confined process was told
        host.run("call", scene.argv('post("/update_weights", {}); time.sleep(19)'))
    assert time.monotonic() - began < 15
    assert scene.server.seen == []


def test_a_command_that_calls_a_model(scene: Scene, tmp_path: Path) -> None:
    """``ray-guard run`` with limits of tokens: an agent CLI without Ray or Python of ours around it."""
    policy = tmp_path / "policy.json"
    endpoint = f"127.0.0.1:{scene.server.port}"
    policy.write_text(json.dumps({"model_endpoint": endpoint, "budgets": {"call": {"tokens": 700}}}))
    program = 'say([post("/v1/chat/completions", GIVEN)[0] for GIVEN in [GIVEN, {**GIVEN, "max_tokens": 1000}]])'
    evidence = tmp_path / "evidence"
    command = [PYTHON, "-m", "ray_guard.cli", "run", "--policy", str(policy), "--evidence", str(evidence), "--"]
    argv = [*scene.namespace.prefix, *command, *scene.argv(program, HELLO)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done
    assert json.loads(done.stdout) == [200, 429]
    spans = [span for span in read_journal(evidence) if span["name"] == f"chat {MODEL}"]
    assert [span["attributes"].get("ray_guard.tokens.charged") for span in spans] == [PROMPT_TOKENS + 3, None]
