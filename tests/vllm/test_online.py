"""``AsyncLLM`` with many episodes at once, and the OpenAI server by real HTTP: one engine for both."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import secrets
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from ray_guard.records import SpanRecord, StatusCode

pytestmark = [pytest.mark.vllm, pytest.mark.kernel, pytest.mark.timeout(300)]

LIMIT = 2500
SPAN = "b7ad6b7169203331"


@pytest.fixture(scope="module")
def server(serve: Callable[..., Any]) -> Any:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    program = serve("online", str(port))
    program.port = program.says("serving")
    deadline = time.monotonic() + 60
    with socket.socket() as probe:
        while probe.connect_ex(("127.0.0.1", port)):
            assert time.monotonic() < deadline, program.log()
            time.sleep(0.1)
    return program


class Answer:
    def __init__(self, status: int, body: bytes) -> None:
        self.status = status
        self.text = body.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.text)


def post(server: Any, headers: dict[str, str] | None = None, **body: Any) -> Answer:
    asked = {"model": "tiny", "prompt": [5], "ignore_eos": True, "temperature": 1.0, **body}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request(
        "POST", "/v1/completions", json.dumps(asked), {"Content-Type": "application/json", **(headers or {})}
    )
    answer = connection.getresponse()
    body_ = answer.read()
    connection.close()
    return Answer(answer.status, body_)


@pytest.fixture
def chats(server: Any, spans: Callable[[Path], list[SpanRecord]]) -> Callable[..., list[SpanRecord]]:
    def found(**attributes: Any) -> list[SpanRecord]:
        every = [span for span in spans(server.evidence) if span.name == "chat tiny"]
        return [s for s in every if all(s.attributes.get(k.replace("_", ".")) == v for k, v in attributes.items())]

    return found


def used(span: SpanRecord) -> int:
    return int(span.attributes["gen_ai.usage.input_tokens"]) + int(span.attributes["gen_ai.usage.output_tokens"])  # type: ignore[arg-type]


def reasons(span: SpanRecord) -> list[str]:
    return list(span.attributes["gen_ai.response.finish_reasons"])  # type: ignore[arg-type]


# AsyncLLM ----------------------------------------------------------------------------------------------------------


def test_each_task_pays_from_its_own_episode(server: Any, chats: Callable[..., list[SpanRecord]]) -> None:
    said = server.said()
    for name in ("rich", "other"):
        assert len(said[name]["served"]) == 4
        assert said[name]["refused"] is None
    poor = said["poor"]
    assert 0 < len(poor["served"]) < 4
    assert poor["refused"]["type"] == "BudgetExceeded"
    assert (poor["refused"]["kind"], poor["refused"]["scope"], poor["refused"]["limit"]) == ("tokens", "episode", 50)
    for name in ("rich", "other", "poor"):
        mine = chats(rl_rollout_id=name)
        served = [span for span in mine if span.status is not StatusCode.ERROR]
        assert [used(span) for span in served] == [each["input"] + each["output"] for each in said[name]["served"]]
        assert [span.attributes["rl.turn"] for span in mine] == [0, 1, 2, 3]


def test_who_leaves_pays_what_was_generated(server: Any, chats: Callable[..., list[SpanRecord]]) -> None:
    for name in ("left", "cancelled"):
        (span,) = chats(rl_rollout_id=name)
        assert span.end_ns is not None
        assert reasons(span) == ["abort"]
        assert used(span) < 150
    assert server.said()["in flight"] == 0


def test_pieces_of_two_sequences_are_one_span(server: Any, chats: Callable[..., list[SpanRecord]]) -> None:
    (span,) = chats(rl_rollout_id="pieces")
    assert span.attributes["gen_ai.usage.output_tokens"] == server.said()["pieces"] == 12
    assert reasons(span) == ["length", "length"]
    assert span.attributes["rl.policy.version"] == "w2", "what vLLM was told comes before the episode's"
    assert span.attributes["gen_ai.latency.time_to_first_token"] > 0  # type: ignore[operator]
    assert "gen_ai.latency.time_in_queue" not in span.attributes, "not measured without vLLM's statistics: not there"


# The OpenAI server -------------------------------------------------------------------------------------------------


def ended(chats: Callable[..., list[SpanRecord]], trace: str) -> SpanRecord:
    """The one span of that trace, once its end is journaled."""
    deadline = time.monotonic() + 20
    while True:
        found = [each for each in chats() if each.trace_id == trace]
        if found and all(each.end_ns is not None for each in found):
            (span,) = found
            return span
        assert time.monotonic() < deadline, found
        time.sleep(0.1)


def test_a_header_names_a_parent_and_no_budget(server: Any, chats: Callable[..., list[SpanRecord]]) -> None:
    trace = secrets.token_hex(16)
    answer = post(server, {"traceparent": f"00-{trace}-{SPAN}-01"}, max_tokens=4)
    assert answer.status == 200
    span = ended(chats, trace)
    assert span.parent_id == SPAN
    assert used(span) == answer.json["usage"]["total_tokens"]
    assert span.attributes["ray_guard.charge_scope"] == "actor"
    assert "rl.rollout.id" not in span.attributes


def test_over_budget_is_status_429_and_others_go_on(server: Any) -> None:
    with ThreadPoolExecutor(3) as pool:
        before = pool.submit(post, server, max_tokens=20)
        refused = pool.submit(post, server, max_tokens=240, n=11)
        after = pool.submit(post, server, max_tokens=20)
    assert [before.result().status, after.result().status] == [200, 200]
    assert refused.result().status == 429
    error = refused.result().json["error"]
    assert (error["code"], error["type"]) == (429, "Too Many Requests")
    assert "exceeds the limit of 2500" in error["message"]


def test_a_stream_over_budget_ends_with_the_same_error(server: Any) -> None:
    answer = post(server, max_tokens=240, n=11, stream=True)
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    assert [event["error"]["code"] for event in events] == [429]


@contextlib.contextmanager
def halted(processes: list[psutil.Process]) -> Iterator[None]:
    for each in processes:
        each.suspend()
    try:
        yield
    finally:
        for each in processes:
            each.resume()


def test_a_client_that_hangs_up_ends_its_request(server: Any, chats: Callable[..., list[SpanRecord]]) -> None:
    started = psutil.Process(server.process.pid).children(recursive=True)  # now: to look for them takes a while
    engine = [each for each in started if "VLLM" in each.name()]
    assert engine, "vLLM names its processes"
    trace = secrets.token_hex(16)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = {"model": "tiny", "prompt": [5], "ignore_eos": True, "max_tokens": 1200, "stream": True}
    headers = {"Content-Type": "application/json", "traceparent": f"00-{trace}-{SPAN}-01"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    assert connection.getresponse().readline().startswith(b"data: ")
    with halted(engine):  # else it may have said everything before anybody notices (1200 words take seconds)
        connection.sock.close()
        connection.close()
        span = ended(chats, trace)
    assert reasons(span) == ["abort"]
    assert used(span) < 1201


def test_an_exhausted_budget_refuses_before_a_stream_begins(
    server: Any, chats: Callable[..., list[SpanRecord]], spans: Callable[[Path], list[SpanRecord]]
) -> None:
    asked = 1 + 8 * 240
    while (answer := post(server, max_tokens=240, n=8)).status == 200:
        pass
    wanted = re.search(r"tokens (\d+) exceeds", answer.json["error"]["message"])
    assert wanted is not None
    left = LIMIT - (int(wanted[1]) - asked)
    while left > 0:
        size = min(left, 240)
        size -= left - size == 1  # a request takes two tokens at least
        assert post(server, max_tokens=size - 1).status == 200
        left -= size
    answer = post(server, max_tokens=1, stream=True)
    assert answer.status == 429, answer.text
    assert sum(used(span) for span in chats() if "gen_ai.usage.input_tokens" in span.attributes) == LIMIT
    server.process.send_signal(signal.SIGINT)
    server.ends()
    assert not [span for span in spans(server.evidence) if span.name == "ray_guard.unsettled"]
    assert all(span.end_ns is not None for span in chats())
    assert chats(rl_rollout_id="whoever started the server") == []
    by_http = [span for span in chats() if "rl.rollout.id" not in span.attributes]
    assert {span.parent_id for span in by_http} == {None, SPAN}
