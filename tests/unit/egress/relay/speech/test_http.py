from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_guard.egress.relay.speech import Refused
from ray_guard.egress.relay.speech.http import HEAD_LIMIT, Requests

NAMES = frozenset({"index.example.org", "files.example.org"})
HOST = b"Host: index.example.org\r\n"
GET = b"GET / HTTP/1.1\r\n" + HOST + b"\r\n"


def feed(data: bytes, size: int, port: int = 80) -> tuple[bytes, str | None]:
    """What passes of ``data`` in portions of ``size``, and why no more did."""
    verifier, passed = Requests(NAMES, port), b""
    try:
        for at in range(0, len(data), size):
            passed += verifier.feed(data[at : at + size])
    except Refused as refused:
        return passed, refused.reason
    return passed, None


POST = b"POST / HTTP/1.1\r\n" + HOST
CHUNKED = b"POST /u HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "data",
    [
        GET,
        GET * 5,
        b"GET / HTTP/1.0\r\n" + HOST + b"\r\n",
        b"GET /a?b=c&d HTTP/1.1\r\nAccept: */*\r\nhOsT:   INDEX.example.org  \r\nX-Empty:\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: index.example.org:80\r\n\r\n" + GET,
        b"GET http://index.example.org/a HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET HTTP://Index.Example.Org:80/ HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET http://index.example.org HTTP/1.1\r\n" + HOST + b"\r\n",
        b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n",
        b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 10\r\n\r\n0123456789" + GET,
        b"POST / HTTP/1.1\r\nContent-Length: 40\r\n"
        + HOST
        + b"\r\nGET / HTTP/1.1\r\nHost: evil.test\r\n\r\n......"
        + GET,
        b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 0\r\n\r\n" + GET,
        CHUNKED + b"5\r\nhello\r\n0\r\n\r\n" + GET,
        CHUNKED + b"A\r\n0123456789\r\n00b\r\n01234567890\r\n0\r\n\r\n" + GET,
        CHUNKED + b"0\r\n\r\n" + GET,
        CHUNKED + b"1\r\nx\r\n0\r\nX-Trailer: 1\r\nY: 2\r\n\r\n" + GET,
        CHUNKED + b"12\r\nGET / HTTP/1.1\r\n\r\n\r\n0\r\n\r\n" + GET,
        b"PUT /x HTTP/1.1\r\n" + HOST + b"Expect: 100-continue\r\nContent-Length: 3\r\n\r\nabc",
        b"GET / HTTP/1.1\r\nHost: files.example.org\r\n\r\n" + GET,
    ],
)
def test_what_agrees_passes_unchanged_in_whatever_portions(data: bytes) -> None:
    for size in range(1, len(data) + 1):
        assert feed(data, size) == (data, None)


@pytest.mark.parametrize(
    ("data", "reason", "before"),
    [
        (b"GET / HTTP/1.1\r\nHost: evil.test\r\n\r\n", "host_mismatch", b""),
        (GET + b"GET / HTTP/1.1\r\nHost: evil.test\r\n\r\n", "host_mismatch", GET),
        (CHUNKED + b"0\r\n\r\nGET / HTTP/1.1\r\nHost: evil.test\r\n\r\n", "host_mismatch", CHUNKED + b"0\r\n\r\n"),
        (b"GET / HTTP/1.1\r\nHost: index.example.org.\r\n\r\n", "host_mismatch", b""),
        (b"GET / HTTP/1.1\r\nHost: index.example.org:8080\r\n\r\n", "host_mismatch", b""),
        (b"GET / HTTP/1.1\r\nHost: index.example.org:80:80\r\n\r\n", "host_mismatch", b""),
        (b"GET / HTTP/1.1\r\nHost: index.example.org, evil.test\r\n\r\n", "host_mismatch", b""),
        (b"GET / HTTP/1.1\r\nHost: a@index.example.org\r\n\r\n", "host_mismatch", b""),
        (b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", "host_mismatch", b""),
        (b"GET / HTTP/1.1\r\nHost:\r\n\r\n", "host_mismatch", b""),
        (b"GET / HTTP/1.1\r\n\r\n", "host_absent", b""),
        (b"GET / HTTP/1.0\r\n\r\n", "host_absent", b""),
        (b"GET / HTTP/1.1\r\n" + HOST + HOST + b"\r\n", "http_smuggling", b""),
        (b"GET / HTTP/1.1\r\n" + HOST + b"Host: evil.test\r\n\r\n", "http_smuggling", b""),
        (b"GET / HTTP/1.1\r\n" + HOST + b" folded: evil\r\n\r\n", "malformed_http", b""),
        (b"GET / HTTP/1.1\r\nHost : index.example.org\r\n\r\n", "malformed_http", b""),
        (b"GET / HTTP/1.1\r\n" + HOST + b"X: a\0b\r\n\r\n", "malformed_http", b""),
        (b"GET / HTTP/1.1\r\n" + HOST + b"X: a\rb\r\n\r\n", "malformed_http", b""),
        (b"GET / HTTP/1.1\nHost: index.example.org\n\n", "malformed_http", b""),
        (b"GET / HTTP/1.1\r\nHost: index.example.org\n\r\n\r\n", "malformed_http", b""),
        (b"GET / HTTP/1.1\r\n" + HOST + b"no colon\r\n\r\n", "malformed_http", b""),
        (b"GET http://evil.test/ HTTP/1.1\r\n" + HOST + b"\r\n", "host_mismatch", b""),
        (b"GET http://index.example.org:81/ HTTP/1.1\r\n" + HOST + b"\r\n", "host_mismatch", b""),
        (b"GET http://index.example.org@evil.test/ HTTP/1.1\r\n" + HOST + b"\r\n", "malformed_http", b""),
        (b"GET https://index.example.org/ HTTP/1.1\r\n" + HOST + b"\r\n", "malformed_http", b""),
        (b"GET //evil.test/ HTTP/1.1\r\nHost: evil.test\r\n\r\n", "host_mismatch", b""),
        (b"GET index HTTP/1.1\r\n" + HOST + b"\r\n", "malformed_http", b""),
        (b"GET * HTTP/1.1\r\n" + HOST + b"\r\n", "malformed_http", b""),
        (b"GET  / HTTP/1.1\r\n" + HOST + b"\r\n", "not_http", b""),
        (b"GET / HTTP/1.1 \r\n" + HOST + b"\r\n", "not_http", b""),
        (b"GET / HTTP/2.0\r\n" + HOST + b"\r\n", "not_http", b""),
        (b"GET /\r\n" + HOST + b"\r\n", "not_http", b""),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "not_http", b""),
        (b"\r\nGET / HTTP/1.1\r\n" + HOST + b"\r\n", "not_http", b""),
        (b"CONNECT index.example.org:443 HTTP/1.1\r\n" + HOST + b"\r\n", "http_upgrade", b""),
        (b"CONNECT evil.test:443 HTTP/1.1\r\n" + HOST + b"\r\n", "http_upgrade", b""),
        (b"GET / HTTP/1.1\r\n" + HOST + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n", "http_upgrade", b""),
        (b"GET / HTTP/1.1\r\n" + HOST + b"Upgrade: h2c\r\nHTTP2-Settings: AAMA\r\n\r\n", "http_upgrade", b""),
        (POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", "http_smuggling", b""),
        (b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello", "http_smuggling", b""),
        (b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 5, 5\r\n\r\nhello", "http_smuggling", b""),
        (b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: +5\r\n\r\nhello", "http_smuggling", b""),
        (b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 0x5\r\n\r\nhello", "http_smuggling", b""),
        (b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: -1\r\n\r\n", "http_smuggling", b""),
        (b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: xchunked\r\n\r\n", "http_smuggling", b""),
        (b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: gzip, chunked\r\n\r\n", "http_smuggling", b""),
        (POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n", "http_smuggling", b""),
        (b"POST / HTTP/1.0\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n", "http_smuggling", b""),
        (CHUNKED + b"5;x=y\r\nhello\r\n", "http_smuggling", CHUNKED),
        (CHUNKED + b"5 \r\nhello\r\n", "http_smuggling", CHUNKED),
        (CHUNKED + b"5\nhello\r\n", "http_smuggling", CHUNKED),
        (CHUNKED + b"0x5\r\nhello\r\n", "http_smuggling", CHUNKED),
        (CHUNKED + b"-5\r\nhello\r\n", "http_smuggling", CHUNKED),
        (CHUNKED + b"\r\nhello\r\n", "http_smuggling", CHUNKED),
        (CHUNKED + b"ffffffffffffffff\r\nhello", "http_smuggling", CHUNKED),
        (CHUNKED + b"000000000000000000000005\r\nhello", "http_smuggling", CHUNKED),
        (CHUNKED + b"5\r\nhello!\r\n", "http_smuggling", CHUNKED + b"5\r\nhello"),
        (CHUNKED + b"0\r\nHost: evil.test\r\n\r\n", "http_smuggling", CHUNKED + b"0\r\n"),
        (CHUNKED + b"0\r\nContent-Length: 5\r\n\r\n", "http_smuggling", CHUNKED + b"0\r\n"),
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n\r\n", "not_http", b""),
        (b'{"id":1,"method":"mining.subscribe"}\n', "malformed_http", b""),
        (real := b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n", "malformed_http", b""),
    ],
)  # fmt: skip
def test_what_does_not_agree_is_refused_with_its_reason(data: bytes, reason: str, before: bytes) -> None:
    assert feed(data, 1) == (before, reason)
    for size in (2, 3, 5, 8, 13, len(data)):
        passed, why = feed(data, size)
        assert why == reason, size
        assert before.startswith(passed), "what came along with the refused goes nowhere either"


def test_the_port_of_the_connection_may_be_stated() -> None:
    data = b"GET / HTTP/1.1\r\nHost: index.example.org:8080\r\n\r\n"
    assert feed(data, 10, port=8080) == (data, None)
    assert feed(data, 10, port=80) == (b"", "host_mismatch")


def test_a_head_without_end_is_refused_before_it_fills_memory() -> None:
    assert feed(b"X" * (HEAD_LIMIT + 2000), 1000) == (b"", "malformed_http")


def test_a_long_head_costs_no_more_than_its_length() -> None:
    verifier = Requests(NAMES, 80)
    data = b"GET / HTTP/1.1\r\n" + b"X-Long: 1\r\n" * 5000 + HOST + b"\r\n"
    passed = b"".join(verifier.feed(data[at : at + 1]) for at in range(len(data)))
    assert passed == data


def test_a_body_passes_as_it_comes() -> None:
    verifier = Requests(NAMES, 80)
    head = b"PUT / HTTP/1.1\r\n" + HOST + b"Content-Length: 1000000\r\n\r\n"
    assert verifier.feed(head + b"a") == head + b"a"
    assert verifier.feed(b"b" * 100) == b"b" * 100


_PIECES = st.sampled_from(
    [GET, CHUNKED, HOST, b"\r\n", b"\n", b"0\r\n\r\n", b"5\r\nhello\r\n", b"GET / HTTP/1.1\r\n", b"Host: evil.test\r\n",
     b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"abc", b" ", b"\t", b"\0", b"POST / HTTP/1.1\r\n"]
)  # fmt: skip


@given(st.lists(st.one_of(_PIECES, st.binary(max_size=20)), max_size=20), st.integers(1, 60))
def test_whatever_comes_is_held_passed_or_refused(pieces: list[bytes], size: int) -> None:
    data = b"".join(pieces)
    passed, reason = feed(data, size)
    assert data.startswith(passed)
    most, same = feed(data, 1)
    assert same == reason
    assert most.startswith(passed)
    # No request to another host passes, except within the body of one that may.
    if b"evil" in passed:
        assert passed.index(b"index.example.org") < passed.index(b"evil")
