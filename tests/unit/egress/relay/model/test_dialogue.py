"""One connection to the model endpoint, without sockets: what is asked, passed on, counted, and when it ends."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_guard.egress.relay.model.dialogue import Catalogue, Dialogue

TOLD = {"hosts": ["127.0.0.1", "localhost"], "port": 8000, "authority": "127.0.0.1:8000", "enforced": True}
ADMITTED = {"call": 1, "fill": None, "traceparent": "00-a-b-01", "reservation": "c"}
CARDS = json.dumps({"data": [{"id": "m", "max_model_len": 100}]}).encode()


def request(path: str = "/v1/chat/completions", method: str = "POST", *more: str, **body: Any) -> bytes:
    data = json.dumps({"model": "m", "messages": [], **body}).encode() if method == "POST" else b""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost:8000", f"Content-Length: {len(data)}", *more]
    return "".join(line + "\r\n" for line in [*lines, ""]).encode() + data


def answer(body: bytes, *more: str, status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}", "Content-Type: application/json", f"Content-Length: {len(body)}", *more]
    return "".join(line + "\r\n" for line in [*lines, ""]).encode() + body


def usage(prompt: int, output: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": output}


DONE = answer(json.dumps({"choices": [{"finish_reason": "stop"}], "usage": usage(7, 5)}).encode())
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(text: str) -> bytes:
    return f"{len(text):x}\r\n{text}\r\n".encode()


def event(**more: Any) -> str:
    return f"data: {json.dumps(more)}\n\n"


class Line:
    """A dialogue, its engine's catalogue known or not, and what it said."""

    def __init__(self, *, knows: bool = True, **told: Any) -> None:
        catalogue = Catalogue()
        if knows:
            catalogue.learn({"m": 100})
        self.dialogue = Dialogue({**TOLD, **told}, catalogue)

    def take(self, name: str) -> bytes:
        buffer: bytearray = getattr(self.dialogue, name)
        taken = bytes(buffer)
        buffer.clear()
        return taken

    def said(self) -> list[dict[str, Any]]:
        messages, self.dialogue.messages = self.dialogue.messages, []
        return messages

    def sent(self, **body: Any) -> Line:
        """A request is with the engine."""
        self.dialogue.from_tool(request(**body))
        (asked,) = self.said()
        assert asked["op"] == "ask"
        self.dialogue.answered({**ADMITTED, "call": asked["call"]})
        assert self.take("to_engine")
        return self


def test_the_engine_sees_nothing_before_it_is_admitted() -> None:
    line = Line()
    line.dialogue.from_tool(request())
    assert line.take("to_engine") == b""
    (asked,) = line.said()
    assert (asked["op"], asked["model"], asked["output"], asked["length"]) == ("ask", "m", None, 100)
    line.dialogue.answered({**ADMITTED, "fill": 9})
    sent = line.take("to_engine")
    assert sent.startswith(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:8000\r\n")
    assert sent.endswith(b'{"model":"m","messages":[],"max_tokens":9}')
    line.dialogue.from_engine(DONE)
    assert line.take("to_tool").endswith(DONE.split(b"\r\n\r\n")[1])
    (called,) = line.said()
    assert (called["status"], called["input"], called["output"], called["final"]) == (200, 7, 5, True)
    assert not line.dialogue.closing


@pytest.mark.parametrize("enforced", [True, False])
def test_a_head_is_read_to_its_limit_and_refused_beyond_it(enforced: bool) -> None:
    """It is never left waiting: a client whose head is not read on would hang."""
    for size, ends in ((40_000, True), (80_000, enforced)):
        line = Line(enforced=enforced)
        data = request("/v1/models", "GET", "X-Long: " + "x" * size)
        for at in range(0, len(data), 1 << 14):
            if line.dialogue.closing:
                break
            assert line.dialogue.hears_tool
            line.dialogue.from_tool(data[at : at + (1 << 14)])
        assert line.dialogue.closing == (ends and size > 65_536)
        assert line.take("to_tool").startswith(b"HTTP/1.1 400") == line.dialogue.closing
        assert bool(line.take("to_engine")) != line.dialogue.closing


def test_who_waits_to_be_asked_for_the_body_is_asked() -> None:
    """As curl does with long ones; but not where the body is not wanted."""
    line = Line()
    data = request("/v1/chat/completions", "POST", "Expect: 100-continue")
    head = data.index(b"\r\n\r\n") + 4
    line.dialogue.from_tool(data[:head])
    assert line.take("to_tool") == b"HTTP/1.1 100 Continue\r\n\r\n"
    line.dialogue.from_tool(data[head:])
    assert [each["op"] for each in line.said()] == ["ask"]
    other = Line()
    other.dialogue.from_tool(request("/update_weights", "POST", "Expect: 100-continue")[:head])
    assert other.take("to_tool").startswith(b"HTTP/1.1 403 ")


def test_who_is_refused_learns_it_and_the_connection_stays() -> None:
    line = Line()
    line.dialogue.from_tool(request() + request())
    line.said()
    line.dialogue.answered({"call": 1, "status": 429, "code": "insufficient_quota", "error": "no room"})
    assert line.take("to_tool").startswith(b"HTTP/1.1 429 ")
    assert line.take("to_engine") == b""
    assert [each["call"] for each in line.said()] == [2]  # the next, which had come already
    assert not line.dialogue.closing


def test_what_was_sent_ahead_waits_for_its_turn() -> None:
    line = Line()
    line.dialogue.from_tool(request() + request(path="/update_weights") + request())
    assert len(line.said()) == 1
    line.dialogue.answered(ADMITTED)
    line.dialogue.from_engine(DONE)
    called, refused = line.said()
    assert (called["op"], refused["op"], refused["reason"]) == ("called", "refused", "path_not_allowed")
    assert line.dialogue.closing
    assert line.take("to_engine").count(b"HTTP/1.1") == 1


def test_the_server_is_asked_once_for_its_models() -> None:
    line = Line(knows=False)
    line.dialogue.from_tool(request())
    assert line.take("to_engine").startswith(b"GET /v1/models HTTP/1.1\r\n")
    assert line.said() == []
    line.dialogue.from_engine(answer(CARDS))
    assert [each["length"] for each in line.said()] == [100]
    assert line.take("to_tool") == b""
    line.dialogue.answered(ADMITTED)
    line.dialogue.from_engine(DONE)
    line.dialogue.from_tool(request())
    assert line.said()[-1]["op"] == "ask"


@pytest.mark.parametrize("status", ["401 Unauthorized", "500 Internal Server Error", "204 No Content"])
def test_a_server_that_does_not_want_to_say_is_asked_again(status: str) -> None:
    """Else a wrong key would make it one of which nothing is known, for everybody."""
    line = Line(knows=False)
    line.dialogue.from_tool(request(model="not/served"))
    line.take("to_engine")
    line.dialogue.from_engine(answer(b"", status=status))
    assert line.said() == []
    assert line.take("to_tool").startswith(b"HTTP/1.1 " + (status if status[0] != "2" else "503").encode()[:3])
    line.dialogue.from_tool(request(model="not/served"))
    assert line.take("to_engine").startswith(b"GET /v1/models ")
    line.dialogue.from_engine(answer(CARDS))
    assert b"model_not_found" in line.take("to_tool")
    assert line.said() == []


def test_a_stream_is_cut_where_it_breaks_and_says_what_was_told() -> None:
    line = Line().sent(stream=True)
    line.dialogue.from_engine(STREAM + chunk(event(choices=[{"index": 0}], usage=usage(7, 1))))
    line.dialogue.from_engine(chunk(event(choices=[{"index": 1}], usage=usage(7, 4))))
    assert b"usage" not in line.take("to_tool")
    line.dialogue.engine_ended()
    (called,) = line.said()
    assert (called["input"], called["output"], called["final"]) == (7, 5, False)
    assert called["error"]
    assert line.dialogue.closing
    assert line.take("to_tool") == b""  # above all no last chunk


@pytest.mark.parametrize("ends", ["tool", "engine", "abandon", "garbage"])
@pytest.mark.parametrize("at", ["asked", "sent", "answering"])
def test_however_it_ends_what_was_admitted_is_settled_once(ends: str, at: str) -> None:
    line = Line()
    if at == "asked":
        line.dialogue.from_tool(request())
        line.said()
    else:
        line.sent()
    if at == "answering":
        line.dialogue.from_engine(DONE[:40])
    if ends == "tool":
        line.dialogue.tool_ended()
    elif ends == "engine":
        line.dialogue.engine_ended()
    elif ends == "garbage":
        line.dialogue.from_engine(b"\0\r\n\r\n" * 3)
    else:
        line.dialogue.abandon()
    line.dialogue.abandon()
    line.dialogue.answered(ADMITTED)
    assert [each["op"] for each in line.said()].count("called") <= 1
    assert line.dialogue.closing
    if at == "asked":
        assert line.take("to_engine") == b""


@pytest.mark.parametrize("how", ["Connection: close", "HTTP/1.0"])
def test_a_stream_to_who_wants_no_more_goes_on_to_its_end(how: str) -> None:
    line = Line()
    data = request("/v1/chat/completions", "POST", how, stream=True) if ":" in how else request(stream=True)
    line.dialogue.from_tool(data.replace(b"HTTP/1.1", b"HTTP/1.0") if how == "HTTP/1.0" else data)
    line.dialogue.answered({**ADMITTED, "call": line.said()[0]["call"]})
    line.dialogue.from_engine(STREAM + chunk(event(choices=[{"index": 0}])))
    assert not line.dialogue.closing
    assert b"Connection: close" in line.take("to_tool")
    line.dialogue.from_engine(chunk(event(choices=[], usage=usage(7, 5))) + chunk("data: [DONE]\n\n") + b"0\r\n\r\n")
    assert b"[DONE]" in line.take("to_tool")
    assert line.dialogue.closing
    assert line.said()[-1]["output"] == 5


def test_an_answer_that_was_not_asked_for_ends_it() -> None:
    line = Line()
    line.dialogue.from_engine(DONE)
    assert line.dialogue.closing
    assert b"HTTP/1.1 200" not in line.take("to_tool")


def test_in_mode_report_what_is_no_call_passes_as_it_came() -> None:
    line = Line(enforced=False)
    data = request(path="/update_weights")
    line.dialogue.from_tool(data[:50])
    line.dialogue.from_tool(data[50:] + b"and on")
    assert line.take("to_engine") == data + b"and on"
    line.dialogue.from_engine(b"whatever")
    assert line.take("to_tool") == b"whatever"
    assert [each["op"] for each in line.said()] == ["refused"]


_ENGINE = st.sampled_from([DONE, STREAM, DONE[:30], chunk(event(choices=[], usage=usage(1, 2))), b"0\r\n\r\n", b"\r\n"])
_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("tool"), st.sampled_from([request(), request(stream=True), request()[:60], b"x", b"\r\n"])),
        st.tuples(st.just("engine"), _ENGINE | st.binary(max_size=30)),
        st.tuples(st.just("answer"), st.sampled_from([b"", b"no"])),
        st.tuples(st.sampled_from(["tool_ends", "engine_ends", "abandon"]), st.just(b"")),
    ),
    max_size=20,
)


@given(_STEPS)
def test_whatever_comes_in_whatever_order(steps: list[tuple[str, bytes]]) -> None:
    """Nothing is raised; a call is settled once, after it was asked for; the engine is asked for what may be asked."""
    line, calls, settled = Line(), 0, []
    for step, data in steps:
        if step == "tool" and line.dialogue.hears_tool:
            line.dialogue.from_tool(data)
        elif step == "engine" and not line.dialogue.closing:
            line.dialogue.from_engine(data)
        elif step == "answer":
            refused = {"call": calls, "status": 429, "code": "a", "error": "b"}
            line.dialogue.answered(refused if data else {**ADMITTED, "call": calls})
        elif step == "tool_ends":
            line.dialogue.tool_ended()
        elif step == "engine_ends":
            line.dialogue.engine_ended()
        elif step == "abandon":
            line.dialogue.abandon()
        for message in line.said():
            if message["op"] == "ask":
                calls = message["call"]
            elif message["op"] == "called":
                settled.append(message["call"])
        sent = line.take("to_engine")
        assert sent == b"" or sent.startswith((b"POST /v1/chat/completions ", b"GET /v1/models "))
    assert len(settled) == len(set(settled))
    assert all(each <= calls for each in settled)
