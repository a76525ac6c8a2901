"""Requests of a client of the model endpoint: what is read, what is refused, and that nothing is read two ways."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ray_guard.egress.relay.model.framing import Malformed
from ray_guard.egress.relay.model.requests import BODY_LIMIT, Head, NotAllowed, Requests, Server

SERVER = Server(frozenset({"engine.example", "10.0.0.5", "2001:db8::5", "localhost"}), 8000)
HOST = b"Host: engine.example:8000\r\n"


def post(*more: bytes, path: bytes = b"/v1/completions", body: bytes = b"", host: bytes = HOST) -> bytes:
    return b"POST " + path + b" HTTP/1.1\r\n" + host + b"".join(each + b"\r\n" for each in more) + b"\r\n" + body


def get(path: bytes, *more: bytes, method: bytes = b"GET", body: bytes = b"") -> bytes:
    return post(*more, path=path, body=body).replace(b"POST", method, 1)


def read(data: bytes, size: int = 1 << 20) -> list[tuple[str, bytes]] | str:
    """(path, body) of each request in ``data``, which comes in portions; or why one was not taken."""
    requests, found = Requests(SERVER), []
    head: Head | None = None
    try:
        for at in range(0, len(data), size):
            requests.feed(data[at : at + size])
            while True:
                head = head or requests.head()
                body = None if head is None else requests.body()
                if head is None or body is None:
                    break
                found.append((head.path, body))
                head = None
                requests.next()
    except (Malformed, NotAllowed) as fault:
        return fault.reason
    return found


TWO = post(b"Content-Length: 2", body=b"{}")
CHUNKED = post(b"Transfer-Encoding: chunked")


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (TWO, [("/v1/completions", b"{}")]),
        (TWO * 3, [("/v1/completions", b"{}")] * 3),
        (post(), [("/v1/completions", b"")]),
        (CHUNKED + b"1\r\n{\r\n001\r\n}\r\n0\r\n\r\n" + TWO, [("/v1/completions", b"{}")] * 2),
        (CHUNKED + b"2\r\n{}\r\n0\r\nX-Trailer: dropped\r\n\r\n" + TWO, [("/v1/completions", b"{}")] * 2),
        (post(path=b"/v1/chat/completions?a=b&c"), [("/v1/chat/completions", b"")]),
        (post(path=b"http://engine.example:8000/v1/responses"), [("/v1/responses", b"")]),
        (post(host=b"hOsT:  ENGINE.example:8000 \r\n"), [("/v1/completions", b"")]),
        (post(host=b"Host: 10.0.0.5:8000\r\n"), [("/v1/completions", b"")]),
        (post(host=b"Host: [2001:DB8:0::5]:8000\r\n"), [("/v1/completions", b"")]),
        (get(b"/v1/models"), [("/v1/models", b"")]),
        (get(b"/v1/models/a.b:c-1"), [("/v1/models/a.b:c-1", b"")]),
    ],
)
def test_what_is_read_in_whatever_portions(data: bytes, found: list[tuple[str, bytes]]) -> None:
    for size in range(1, len(data) + 1):
        assert read(data, size) == found


FRAMING = [
    (post(b"Content-Length: 2", b"Transfer-Encoding: chunked"), "http_smuggling"),
    (post(b"Content-Length: 2", b"Content-Length: 2"), "http_smuggling"),
    (post(b"Content-Length: 2, 2"), "http_smuggling"),
    (post(b"Content-Length: +2"), "http_smuggling"),
    (post(b"Content-Length: 0x2"), "http_smuggling"),
    (post(b"Content-Length: \xb2"), "http_smuggling"),
    (post(b"Transfer-Encoding: gzip, chunked"), "http_smuggling"),
    (post(b"Transfer-Encoding: \x0bchunked"), "malformed_http"),
    (post(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"), "http_smuggling"),
    (CHUNKED.replace(b"HTTP/1.1", b"HTTP/1.0"), "http_smuggling"),
    (CHUNKED + b"2;a=b\r\n{}", "http_smuggling"),
    (CHUNKED + b"2\n{}", "http_smuggling"),
    (CHUNKED + b"2\r\n{}}\r\n", "http_smuggling"),
    (CHUNKED + b"-1\r\n", "http_smuggling"),
    (CHUNKED + b"0\r\nContent-Length: 5\r\n\r\n", "http_smuggling"),
    (CHUNKED + b"0\r\nHost: a\r\n\r\n", "http_smuggling"),
    (get(b"/v1/models", b"Content-Length: 2", body=b"{}"), "http_smuggling"),
    (post(b" folded"), "malformed_http"),
    (post(b"a b: c"), "malformed_http"),
    (post(b"Content-Length : 2"), "malformed_http"),
    (post(b"a: b\nContent-Length: 2"), "malformed_http"),
    (post(b"a: b\rContent-Length: 2"), "malformed_http"),
    (post(b"a: \x00"), "malformed_http"),
    (post().replace(b"\r\n", b"\n"), "malformed_http"),
    (b"\r\n" + post(), "malformed_http"),
    (post().replace(b"POST ", b"POST  "), "malformed_http"),
    (post().replace(b"HTTP/1.1", b"HTTP/2.0"), "malformed_http"),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "malformed_http"),
    (b"\x16\x03\x01\x00\x05\r\n\r\n", "malformed_http"),
    (b"POST /v1/completions\r\n\r\n", "malformed_http"),
    (post(b"a: " + b"b" * (1 << 16)), "malformed_http"),
    (post(b"Content-Length: %d" % (BODY_LIMIT + 1)), "body_too_large"),
    (CHUNKED + b"%x\r\n" % (BODY_LIMIT + 1) + b"a" * (BODY_LIMIT + 1), "body_too_large"),
    (post(b"Expect: a"), "malformed_http"),
    (post(b"Authorization: a", b"Authorization: b"), "malformed_http"),
]
ADDRESSED = [
    (post(host=b""), "host_absent"),
    (post(host=HOST + HOST), "http_smuggling"),
    (post(host=b"Host: elsewhere:8000\r\n"), "host_mismatch"),
    (post(host=b"Host: engine.example\r\n"), "host_mismatch"),
    (post(host=b"Host: engine.example:8001\r\n"), "host_mismatch"),
    (post(host=b"Host: engine.example:8000, elsewhere\r\n"), "host_mismatch"),
    (post(host=b"Host: a@engine.example:8000\r\n"), "host_mismatch"),
    (post(path=b"http://elsewhere:8000/v1/completions"), "host_mismatch"),
    (post(path=b"http://engine.example:8000@elsewhere/v1/completions"), "malformed_http"),
    (post(path=b"https://engine.example:8000/v1/completions"), "malformed_http"),
    (post(path=b"*"), "malformed_http"),
    (post(path=b"engine.example:8000"), "malformed_http"),
]
OTHER_PATHS = (
    b"/v1/completions/ /V1/completions //v1/completions /v1//completions /v1/./completions /v1/x/../completions "
    b"/v1/completion%73 /v1/completions%3f /v1/completions;a /v1/completions#a /v1/completions?a=/../x "
    b"/v1/completions/render /v1/chat/completions/batch /v1/load_lora_adapter /v1/responses/r/cancel /update_weights "
    b"/v1/embeddings /tokenize /v1\\completions http://engine.example:8000//v1/completions"
).split()
OTHER_LOOKS = b"/v1/models/.. /v1/models/a/b /v1/models/ /v1/models/%2e /v1/responses/r /health /metrics /".split()
ASKING = [
    *((post(path=path), "path_not_allowed") for path in OTHER_PATHS),
    *((get(path), "path_not_allowed") for path in OTHER_LOOKS),
    (get(b"/v1/completions"), "method_not_allowed"),
    (post(path=b"/v1/models"), "method_not_allowed"),
    (get(b"/v1/completions", method=b"OPTIONS"), "method_not_allowed"),
    (get(b"/v1/completions", method=b"post"), "method_not_allowed"),
    (get(b"engine.example:8000", method=b"CONNECT"), "http_upgrade"),
    (post(b"Upgrade: websocket", b"Connection: Upgrade"), "http_upgrade"),
    (post(b"HTTP2-Settings: a"), "http_upgrade"),
]


@pytest.mark.parametrize(("data", "reason"), [*FRAMING, *ADDRESSED, *ASKING])
def test_what_is_refused_in_whatever_portions(data: bytes, reason: str) -> None:
    sizes = (1, 2, 3, 7, 100, len(data)) if len(data) < 1000 else (4096, len(data))
    for size in sizes:
        assert read(data, size) == reason
    assert read(TWO + data) == reason


def test_what_of_a_head_goes_on() -> None:
    requests = Requests(SERVER)
    requests.feed(post(b"Authorization: Bearer a", b"Expect: 100-Continue", b"Connection: a, Close", b"Cookie: b"))
    head = requests.head()
    assert head == Head("POST", "/v1/completions", b"Bearer a", b"HTTP/1.1", keep=False, expects=True, length=0)


_LINES = [HOST, b"\r\n", b"\n", b"\r", b"Content-Length: 2\r\n", b"Transfer-Encoding: chunked\r\n", b"0\r\n\r\n"]
_STARTS = [post(), TWO, CHUNKED, b"POST /update_weights HTTP/1.1\r\n", b"GET /v1/models HTTP/1.1\r\n", b"2\r\n{}\r\n"]


@given(
    st.lists(st.sampled_from([*_LINES, *_STARTS, b"{}", b" ", b":"]) | st.binary(max_size=20), max_size=12),
    st.integers(1, 40),
)
@example([post(b"Content-Length: 0"), b"POST /update_weights HTTP/1.1\r\n", HOST, b"\r\n"], 3)
def test_whatever_comes_is_read_the_same_in_any_portions(pieces: list[bytes], size: int) -> None:
    """And no path but those of the list comes out of it."""
    data = b"".join(pieces)
    found = read(data)
    assert read(data, size) == found
    if isinstance(found, list):
        assert {path for path, _ in found} <= {"/v1/completions", "/v1/models"}


@given(st.binary(max_size=400))
def test_no_bytes_raise_anything_else(data: bytes) -> None:
    with contextlib.suppress(Malformed, NotAllowed):
        requests = Requests(SERVER)
        requests.feed(data)
        if requests.head() is not None:
            requests.body()
