from __future__ import annotations

import socket
import struct

from hypothesis import given
from hypothesis import strategies as st

from ray_guard.egress.resolver.forged import datagram


def total(data: bytes) -> int:
    """The Internet checksum's sum (RFC 1071): all ones where the checksum within is right."""
    data += bytes(len(data) % 2)
    summed = sum(struct.unpack(f">{len(data) // 2}H", data))
    while summed >> 16:
        summed = (summed & 0xFFFF) + (summed >> 16)
    return summed


@given(
    st.binary(max_size=64),
    st.integers(0, 65535),
    st.integers(0, 65535),
    st.sampled_from([(socket.AF_INET, "203.0.113.53", "127.0.0.1"), (socket.AF_INET6, "2001:db8::53", "::1")]),
)
def test_the_checksum_is_right(data: bytes, source: int, to: int, where: tuple[socket.AddressFamily, str, str]) -> None:
    family, *ends = where
    packed = b"".join(socket.inet_pton(family, end) for end in ends)
    found = datagram(data, source, to, packed)
    assert struct.unpack(">HHH", found[:6]) == (source, to, len(data) + 8)
    assert found[8:] == data
    assert found[6:8] != b"\0\0"  # that would say there is none
    assert total(packed + struct.pack(">II", len(found), 17) + found) == 0xFFFF
