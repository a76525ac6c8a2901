"""What a target sends as DNS, and what it gets: whatever the bytes, a question, a refusal, or nothing."""

from __future__ import annotations

import dns.exception
import dns.flags
import dns.message
import dns.rcode
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ray_guard.egress.resolver.messages import Question, answer, read


def query(name: str, kind: str = "A", **options: object) -> bytes:
    return dns.message.make_query(name, kind, **options).to_wire()


def labels(*parts: bytes) -> bytes:
    return b"".join(bytes([len(part)]) + part for part in parts) + b"\0"


def raw(
    name: bytes, kind: int = 1, cls: int = 1, *, flags: int = 0x0100, counts: tuple[int, ...] = (1, 0, 0, 0)
) -> bytes:
    head = b"\x12\x34" + flags.to_bytes(2, "big") + b"".join(count.to_bytes(2, "big") for count in counts)
    return head + name + kind.to_bytes(2, "big") + cls.to_bytes(2, "big")


@pytest.mark.parametrize(
    ("data", "name", "kind"),
    [
        (query("index.example.org"), "index.example.org", "A"),
        (query("index.example.org.", "AAAA"), "index.example.org", "AAAA"),
        (query("Index.EXAMPLE.org"), "Index.EXAMPLE.org", "A"),
        (query("a.example.org", "TXT", use_edns=0), "a.example.org", "TXT"),
        (raw(labels(b"a", b"b"), 65), "a.b", "HTTPS"),
        (raw(labels(b"a", b"b"), 10), "a.b", "NULL"),
        (raw(labels(b"a", b"b"), 255), "a.b", "ANY"),
        (raw(labels(b"a", b"b"), 65400), "a.b", "TYPE65400"),
        (raw(labels(b"evil.com\0.example", b"org")), "evil\\.com\\000\\.example.org", "A"),
        (raw(labels(b"index.example", b"org")), "index\\.example.org", "A"),
        (raw(labels("ä".encode(), b"org")), "\\195\\164.org", "A"),
        (raw(b"\0"), "", "A"),
        (raw(labels(*([b"x" * 63] * 3), b"y" * 61)), ".".join(["x" * 63] * 3 + ["y" * 61]), "A"),
    ],
)
def test_questions(data: bytes, name: str, kind: str) -> None:
    found = read(data)
    assert isinstance(found, Question)
    assert (found.name if name else found.name.strip(".@"), found.type) == (name, kind)


@pytest.mark.parametrize(
    ("data", "rcode"),
    [
        (raw(labels(b"a"), counts=(0, 0, 0, 0)), "FORMERR"),
        (raw(labels(b"a"), counts=(2, 0, 0, 0)), "FORMERR"),
        (raw(labels(b"a"))[:-1], "FORMERR"),
        (raw(labels(b"a")) + b"tail", "FORMERR"),
        (raw(b"\xc0\x0c"), "FORMERR"),  # a name that points at itself
        (raw(b"\x41" + b"x" * 65), "FORMERR"),  # a label of 65 bytes
        (raw(labels(*([b"x" * 63] * 4))), "FORMERR"),  # a name of 257
        (raw(labels(b"a"), counts=(1, 1, 0, 0)) + labels(b"a") + b"\0\1\0\1" + bytes(4) + b"\0\4abcd", "FORMERR"),
        (raw(labels(b"a"), flags=0x0100 | 2 << 11), "NOTIMP"),  # STATUS
        (raw(labels(b"a"), flags=5 << 11), "NOTIMP"),  # UPDATE
        (raw(labels(b"a"), cls=3), "REFUSED"),  # CHAOS
        (query("a", use_edns=1), "BADVERS"),
        (bytes(12), "FORMERR"),
    ],
)
def test_what_is_no_question_says_why(data: bytes, rcode: str) -> None:
    found = read(data)
    assert isinstance(found, bytes)
    reply = dns.message.from_wire(found)
    assert reply.flags & dns.flags.QR
    assert (found[:2], dns.rcode.to_text(reply.rcode())) == (data[:2], rcode)


@pytest.mark.parametrize("data", [b"", b"\0" * 11, raw(labels(b"a"), flags=0x8180)])
def test_what_is_not_even_a_query_gets_no_answer(data: bytes) -> None:
    assert read(data) is None


def test_an_answer_keeps_the_name_as_it_was_asked() -> None:
    """Some resolvers mix upper and lower case, and take an answer for forged that does not."""
    asked = read(query("InDeX.example.ORG", "A", use_edns=0))
    assert isinstance(asked, Question)
    reply = dns.message.from_wire(answer(asked, "NOERROR", ["192.0.2.7", "192.0.2.8"], 30, datagram=True))
    assert reply.id == asked.message.id
    assert reply.question[0].name.to_text() == "InDeX.example.ORG."
    (found,) = reply.answer
    assert (found.name.to_text(), found.ttl, sorted(each.address for each in found)) == (
        "InDeX.example.ORG.",
        30,
        ["192.0.2.7", "192.0.2.8"],
    )


@pytest.mark.parametrize(("rcode", "addresses"), [("NXDOMAIN", []), ("NOERROR", []), ("REFUSED", [])])
def test_answers_without_addresses(rcode: str, addresses: list[str]) -> None:
    asked = read(query("a.b", "HTTPS"))
    assert isinstance(asked, Question)
    reply = dns.message.from_wire(answer(asked, rcode, addresses, 1, datagram=True))
    assert (dns.rcode.to_text(reply.rcode()), reply.answer, reply.authority) == (rcode, [], [])


@pytest.mark.parametrize(("options", "fits"), [({}, 30), ({"use_edns": 0, "payload": 1232}, 70)])
def test_what_does_not_fit_a_datagram_is_asked_for_by_stream(options: dict[str, int], fits: int) -> None:
    asked = read(query("a.b", "A", **options))
    assert isinstance(asked, Question)
    for count, whole in ((fits - 5, True), (fits + 20, False)):
        addresses = [f"192.0.2.{i}" for i in range(1, count)]
        reply = dns.message.from_wire(answer(asked, "NOERROR", addresses, 1, datagram=True))
        assert bool(reply.flags & dns.flags.TC) is not whole
        assert bool(reply.answer) is whole
        assert len(dns.message.from_wire(answer(asked, "NOERROR", addresses, 1, datagram=False)).answer[0]) == count - 1


@given(st.binary(max_size=600))
@example(bytes(12) + b"\xc0\x0c" * 10)
@settings(max_examples=500)
def test_any_bytes(data: bytes) -> None:
    _understood(data)


@given(
    st.binary(max_size=60),
    st.integers(0, 0xFFFF),
    st.tuples(*[st.integers(0, 3)] * 4),
    st.integers(0, 0xFFFF),
    st.integers(0, 0xFFFF),
)
@settings(max_examples=500)
def test_bytes_that_look_like_a_query(name: bytes, flags: int, counts: tuple[int, ...], kind: int, cls: int) -> None:
    _understood(raw(name, kind, cls, flags=flags, counts=counts))


@given(st.integers(0, 60), st.integers(0, 255))
def test_a_query_with_one_byte_changed(at: int, value: int) -> None:
    data = bytearray(query("index.example.org", "A", use_edns=0))
    data[at % len(data)] = value
    _understood(bytes(data))


def _understood(data: bytes) -> None:
    """Whatever it is, something follows: and what follows can be answered."""
    found = read(data)
    if isinstance(found, Question):
        found = answer(found, "NXDOMAIN", [], 1, datagram=True)
    if found is not None:
        assert found[:2] == data[:2]
        assert found[2] & 0x80
        try:
            dns.message.from_wire(found)
        except dns.exception.DNSException as error:
            raise AssertionError(f"{data!r} is answered by what is no DNS: {found!r}") from error
