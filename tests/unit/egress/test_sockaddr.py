"""Every disguise of an address is the same destination."""

from __future__ import annotations

import errno
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_guard.egress.sockaddr import BadAddress, Inet, Netlink, Unix, Unspecified, decode


def v4(address: str, port: int) -> bytes:
    return struct.pack("=H", socket.AF_INET) + struct.pack("!H", port) + socket.inet_aton(address) + bytes(8)


def v6(address: str, port: int) -> bytes:
    packed = socket.inet_pton(socket.AF_INET6, address)
    return struct.pack("=H", socket.AF_INET6) + struct.pack("!HI", port, 0) + packed + bytes(4)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (v4("192.0.2.7", 443), Inet("192.0.2.7", 443)),
        (v4("0.0.0.0", 80), Inet("127.0.0.1", 80)),
        (v6("::ffff:192.0.2.7", 443), Inet("192.0.2.7", 443)),
        (v6("::ffff:0.0.0.0", 80), Inet("127.0.0.1", 80)),
        (v6("::", 80), Inet("::1", 80)),
        (v6("2001:db8:0:0::7", 1), Inet("2001:db8::7", 1)),
        (struct.pack("=H", socket.AF_UNIX) + b"/run/x.sock\0garbage", Unix(b"/run/x.sock")),
        (struct.pack("=H", socket.AF_UNIX) + b"relative", Unix(b"relative")),
        (struct.pack("=H", socket.AF_UNIX) + b"\0abstract\0", Unix(None, b"abstract")),
        (struct.pack("=H", socket.AF_UNIX), Unix(None)),
        (struct.pack("=HHII", socket.AF_NETLINK, 0, 7, 1), Netlink(7, 1)),
        (struct.pack("=H", socket.AF_UNSPEC), Unspecified()),
    ],
)
def test_decoded(raw: bytes, expected: object) -> None:
    assert decode(raw) == expected


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (b"", errno.EINVAL),
        (b"\x02", errno.EINVAL),
        (v4("192.0.2.7", 443)[:15], errno.EINVAL),
        (v6("::1", 443)[:23], errno.EINVAL),
        (struct.pack("=H14x", socket.AF_PACKET), errno.EAFNOSUPPORT),
        (struct.pack("=H14x", 40), errno.EAFNOSUPPORT),
    ],
)
def test_what_cannot_be_meant_is_the_kernels_own_error(raw: bytes, error: int) -> None:
    with pytest.raises(BadAddress) as caught:
        decode(raw)
    assert caught.value.errno == error


@given(st.binary(max_size=128))
def test_any_bytes_are_an_address_or_a_bad_one(raw: bytes) -> None:
    try:
        address = decode(raw)
    except BadAddress:
        return
    assert isinstance(address, Inet | Unix | Netlink | Unspecified)
