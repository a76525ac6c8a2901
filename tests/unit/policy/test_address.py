"""One destination has many spellings; the canonical one is unique."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_guard.policy.destination import canonical_address, canonical_packed, is_loopback, parse_address


@pytest.mark.parametrize(
    ("spelling", "canonical"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("::FFFF:A00:1", "10.0.0.1"),
        ("0.0.0.0", "127.0.0.1"),
        ("::ffff:0.0.0.0", "127.0.0.1"),
        ("::", "::1"),
        ("0:0:0:0:0:0:0:1", "::1"),
        ("2001:DB8:0:0::1", "2001:db8::1"),
        ("fe80::1%eth0", "fe80::1"),
        ("fe80::1%3", "fe80::1"),
    ],
)
def test_spellings(spelling: str, canonical: str) -> None:
    assert canonical_address(spelling) == canonical


@pytest.mark.parametrize(
    "text", ["", "127.1", "0x7f.0.0.1", "2130706433", "010.0.0.1", "1.2.3", "::1%", "a", "1.2.3.4/8"]
)
def test_what_is_no_address_raises(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        canonical_address(text)


@pytest.mark.parametrize("length", [0, 3, 5, 15, 17])
def test_a_sockaddr_of_the_wrong_length_raises(length: int) -> None:
    with pytest.raises(ValueError, match="4 or 16 bytes"):
        canonical_packed(bytes(length))


_packed = st.one_of(
    st.binary(min_size=4, max_size=4),
    st.binary(min_size=16, max_size=16),
    st.binary(min_size=4, max_size=4).map(lambda tail: bytes(10) + b"\xff\xff" + tail),
    st.binary(min_size=4, max_size=4).map(lambda tail: bytes(12) + tail),
)


@given(_packed)
def test_canonicalisation_is_idempotent(packed: bytes) -> None:
    once = canonical_packed(packed)
    assert canonical_address(once) == once
    assert canonical_packed(socket.inet_pton(socket.AF_INET6 if ":" in once else socket.AF_INET, once)) == once


@given(_packed, _packed)
def test_one_text_per_address(first: bytes, second: bytes) -> None:
    """Two sockaddrs have the same text exactly when they are the same number."""
    one, two = canonical_packed(first), canonical_packed(second)
    assert (one == two) == (parse_address(one) == parse_address(two))


def test_loopback() -> None:
    assert is_loopback(parse_address("127.255.0.1"))
    assert is_loopback(parse_address("::"))
    assert is_loopback(parse_address("::ffff:127.0.0.1"))
    assert not is_loopback(parse_address("128.0.0.1"))
    assert not is_loopback(parse_address("::2"))
