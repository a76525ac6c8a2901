from __future__ import annotations

import ssl
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_guard.egress.relay.speech import Refused
from ray_guard.egress.relay.speech.tls import ClientHello

NAMES = frozenset({"index.example.org", "files.example.org"})


def real_hello(name: str | None) -> bytes:
    """What OpenSSL sends."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname=name).do_handshake()
    return outgoing.read()


def extension(kind: int, data: bytes) -> bytes:
    return struct.pack(">HH", kind, len(data)) + data


def sni(*names: bytes, kind: int = 0) -> bytes:
    entries = b"".join(struct.pack(">BH", kind, len(name)) + name for name in names)
    return extension(0, struct.pack(">H", len(entries)) + entries)


def body(
    extensions: bytes | None, *, session: bytes = b"", suites: bytes = b"\x13\x01", compressions: bytes = b"\0"
) -> bytes:
    made = b"\x03\x03" + bytes(32) + bytes([len(session)]) + session + struct.pack(">H", len(suites)) + suites
    made += bytes([len(compressions)]) + compressions
    return made if extensions is None else made + struct.pack(">H", len(extensions)) + extensions


def handshake(content: bytes, kind: int = 1) -> bytes:
    return bytes([kind]) + len(content).to_bytes(3, "big") + content


def records(message: bytes, size: int = 16384, kind: int = 22, version: bytes = b"\x03\x01") -> bytes:
    parts = [message[at : at + size] for at in range(0, len(message), size)]
    return b"".join(bytes([kind]) + version + struct.pack(">H", len(part)) + part for part in parts)


def hello(extensions: bytes | None, **more: bytes) -> bytes:
    return records(handshake(body(extensions, **more)))


GOOD = sni(b"index.example.org")


def fed(data: bytes, size: int) -> bytes | str:
    """What passes when ``data`` comes ``size`` bytes at a time, or why nothing does."""
    verifier, passed = ClientHello(NAMES), b""
    try:
        for at in range(0, len(data), size):
            passed += verifier.feed(data[at : at + size])
    except Refused as refused:
        assert passed == b""
        return refused.reason
    return passed


@pytest.mark.parametrize("name", sorted(NAMES))
@pytest.mark.parametrize("size", [1, 2, 3, 7, 100, 10_000])
def test_a_real_hello_passes_whole_in_whatever_portions(name: str, size: int) -> None:
    data = real_hello(name)
    assert fed(data, size) == data
    assert fed(data + b"what follows", size) == data + b"what follows"


def test_nothing_passes_before_the_last_byte() -> None:
    data = real_hello("index.example.org")
    for cut in range(len(data)):
        verifier = ClientHello(NAMES)
        assert verifier.feed(data[:cut]) == b""
        assert not verifier.done
        assert verifier.feed(data[cut:]) == data
        assert verifier.name == "index.example.org"
        assert verifier.feed(b"more") == b"more"


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_a_hello_over_many_records_is_put_together(size: int) -> None:
    data = records(handshake(body(GOOD)), size)
    assert fed(data, 10_000) == fed(data, 1) == data


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (real_hello(None), "sni_absent"),
        (real_hello("other.example.org"), "sni_mismatch"),
        (real_hello("index.example.org.evil.test"), "sni_mismatch"),
        (hello(GOOD + extension(0xFE0D, b"\0" * 40)), "encrypted_client_hello"),
        (hello(extension(0xFE0D, b"\0" * 40) + GOOD), "encrypted_client_hello"),
        (hello(GOOD + extension(0xFFCE, b"")), "encrypted_client_hello"),
        (hello(sni(b"other.example.org") + extension(0xFE0D, b"")), "encrypted_client_hello"),
        (hello(None), "sni_absent"),
        (hello(b""), "sni_absent"),
        (hello(extension(10, b"\0\2\0\x17")), "sni_absent"),
        (hello(GOOD + GOOD), "malformed_tls"),
        (hello(GOOD + extension(43, b"") + extension(43, b"")), "malformed_tls"),
        (hello(sni(b"index.example.org", b"evil.example.org")), "malformed_tls"),
        (hello(sni(b"evil.example.org", b"index.example.org")), "malformed_tls"),
        (hello(sni()), "malformed_tls"),
        (hello(sni(b"index.example.org", kind=1)), "malformed_tls"),
        (hello(sni(b"")), "sni_mismatch"),
        (hello(sni(b"index.example.org.")), "sni_mismatch"),
        (hello(sni(b"index.example.org\0")), "sni_mismatch"),
        (hello(sni(b"index.example.org\0.evil.test")), "sni_mismatch"),
        (hello(sni(b"evil.test\0index.example.org")), "sni_mismatch"),
        (hello(sni("índex.example.org".encode())), "sni_mismatch"),
        (hello(sni(b"127.0.0.1")), "sni_mismatch"),
        (hello(extension(0, GOOD[4:] + b"x")), "malformed_tls"),
        (hello(extension(0, b"")), "malformed_tls"),
        (hello(GOOD, session=bytes(33)), "malformed_tls"),
        (hello(GOOD, suites=b""), "malformed_tls"),
        (hello(GOOD, suites=b"\x13"), "malformed_tls"),
        (hello(GOOD, compressions=b""), "malformed_tls"),
        (records(handshake(body(GOOD) + b"x")), "malformed_tls"),
        (records(handshake(body(GOOD)[:-1])), "malformed_tls"),
        (records(handshake(body(GOOD)) + handshake(body(GOOD))), "malformed_tls"),
        (records(handshake(body(GOOD), kind=2)), "malformed_tls"),
        (records(b"\x01\xff\xff\xff" + bytes(100)), "malformed_tls"),
        (records(handshake(body(GOOD)), kind=23), "not_tls"),
        (records(handshake(body(GOOD)), version=b"\x02\x00"), "not_tls"),
        (b"\x16\x03\x01\0\0", "malformed_tls"),
        (b"\x16\x03\x01\x40\x01" + bytes(0x4001), "malformed_tls"),
        (records(handshake(body(GOOD))[:20]) + b"\x15\x03\x01\0\2\1\0", "malformed_tls"),
        (b"\x80\x2e\x01\x00\x02" + bytes(50), "not_tls"),  # SSLv2
        (b"SSH-2.0-OpenSSH_9\r\n", "not_tls"),
        (b"GET / HTTP/1.1\r\n\r\n", "not_tls"),
        (b'{"id":1,"method":"mining.subscribe"}\n', "not_tls"),
        (b"\0", "not_tls"),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 100_000])
def test_what_does_not_agree_is_refused_with_its_reason(data: bytes, reason: str, size: int) -> None:
    assert fed(data, size) == reason


CIPHERS = records(b"\x01", kind=20)
ALERT = records(b"\x01\x5a", kind=21)
EARLY = GOOD + extension(42, b"")


def between(size: int, first: bytes, *more: bytes) -> tuple[bytes, str]:
    """What passes when ``more`` follows a hello, and why it ends there; "": it does not."""
    verifier, passed, data = ClientHello(NAMES), b"", b"".join((hello(first), *more))
    try:
        for at in range(0, len(data), size):
            passed += verifier.feed(data[at : at + size])
    except Refused as refused:
        return passed[len(hello(first)) :], refused.reason
    assert passed[: len(hello(first))] == hello(first)
    return passed[len(hello(first)) :], ""


@pytest.mark.parametrize("size", [1, 4, 10_000])
@pytest.mark.parametrize("again", [hello(GOOD), records(handshake(body(GOOD)), 3)])
def test_a_second_hello_that_was_asked_for_passes_if_it_names_the_same(again: bytes, size: int) -> None:
    for before in ((), (CIPHERS,), (ALERT, CIPHERS)):
        said = b"".join((*before, again, b"\x17\x03\x03\x00\x01x", again))
        assert between(size, GOOD, *before, again, b"\x17\x03\x03\x00\x01x", again) == (said, "")


@pytest.mark.parametrize("size", [1, 4, 10_000])
@pytest.mark.parametrize("name", [b"evil.test", b"files.example.org"])  # a listed one too: it was not the first's
def test_a_second_hello_never_passes_with_another_name(name: bytes, size: int) -> None:
    application = records(bytes(300), kind=23, version=b"\x03\x03")
    other = records(handshake(body(sni(name))), 5)
    empty = b"\x14\x03\x03\x00\x00"
    for first, before in (
        (GOOD, ()),
        (GOOD, (CIPHERS,)),
        (GOOD, (ALERT, empty, CIPHERS, b"\x14\xff\xff\x00\x02ab")),
        (EARLY, (application, CIPHERS, application)),  # a server that does not want early data reads past it
    ):
        passed, why = between(size, first, *before, other)
        if size == 1:
            assert passed == b"".join(before)
        assert (passed in (b"", b"".join(before)), why) == (True, "sni_mismatch")
    assert between(size, GOOD, b"\x16\x03\x03\x00\x00", other)[1] == "malformed_tls"
    assert between(size, GOOD, hello(extension(10, b"\0\2\0\x17")))[1] == "sni_absent"


def test_after_the_hellos_nothing_is_read() -> None:
    for follows in (records(b"\x10", kind=22), records(b"x", kind=23), b"what is no record"):
        verifier = ClientHello(NAMES)
        verifier.feed(hello(GOOD) + CIPHERS)
        assert not verifier.done
        assert verifier.feed(follows) == follows
        assert verifier.done


def test_upper_case_is_the_same_name() -> None:
    data = hello(sni(b"Index.EXAMPLE.org"))
    assert fed(data, 1) == data


def test_a_hello_that_never_ends_is_refused_before_it_fills_memory() -> None:
    assert fed(records(b"\x01\x00\xff\xff" + bytes(60_000), 1), 1000) == "malformed_tls"


@given(st.lists(st.binary(max_size=50), max_size=20))
def test_any_bytes_are_refused_or_held(portions: list[bytes]) -> None:
    verifier = ClientHello(NAMES)
    try:
        for portion in portions:
            assert verifier.feed(portion) == b""
    except Refused:
        pass


@given(st.data())
def test_a_damaged_hello_never_passes_with_another_name(data: st.DataObject) -> None:
    message = bytearray(hello(extension(10, b"\0\2\0\x17") + GOOD))
    for _ in range(data.draw(st.integers(1, 3))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    size = data.draw(st.integers(1, len(message)))
    verifier, passed = ClientHello(NAMES), b""
    try:
        for at in range(0, len(message), size):
            passed += verifier.feed(bytes(message[at : at + size]))
    except Refused:
        assert passed == b""
    assert passed in (b"", bytes(message))
    assert not passed or verifier.name in NAMES
