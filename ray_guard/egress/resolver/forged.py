"""Datagrams that seem to come from the name server that was asked. Runs in the supervisor.

A program that sends its query without connecting takes an answer from any other address for a forgery (musl, dnspython,
nslookup). What is forged never leaves loopback. It takes CAP_NET_RAW, which root has even in Docker's containers; where
it is missing such a program is answered from the guard's own address, and believes it or not.
"""

from __future__ import annotations

import socket
import struct

Endpoint = tuple[str, int]


class Forger:
    """Sends UDP datagrams with a source of its own choice to loopback addresses.

    Raises:
        OSError: EPERM, this process may not.
    """

    def __init__(self) -> None:
        self._sockets = {socket.AF_INET: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)}
        try:
            self._sockets[socket.AF_INET6] = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW)
        except OSError:
            pass  # a host without IPv6

    def send(self, data: bytes, source: Endpoint, to: Endpoint) -> None:
        """Raises OSError: ``source`` and ``to`` are of different families, or as sendto(2)."""
        family = socket.AF_INET6 if ":" in to[0] else socket.AF_INET
        sock = self._sockets.get(family)
        if sock is None:
            raise OSError("no IPv6 here")
        ends = socket.inet_pton(family, source[0]) + socket.inet_pton(family, to[0])
        udp = datagram(data, source[1], to[1], ends)
        if family == socket.AF_INET:  # the kernel fills in length, id and checksum
            head = struct.pack(">BBHHHBBH", 0x45, 0, 0, 0, 0, 64, socket.IPPROTO_UDP, 0)
        else:
            head = struct.pack(">IHBB", 6 << 28, len(udp), socket.IPPROTO_UDP, 64)
        sock.sendto(head + ends + udp, socket.MSG_DONTWAIT, (to[0], 0))

    def close(self) -> None:
        for sock in self._sockets.values():
            sock.close()


def datagram(data: bytes, source: int, to: int, ends: bytes) -> bytes:
    """A UDP header (RFC 768) and ``data``. ``ends``: both packed addresses, source first, for the checksum."""
    length = 8 + len(data)
    pseudo = ends + struct.pack(">II", length, socket.IPPROTO_UDP)
    summed = pseudo + struct.pack(">HHHH", source, to, length, 0) + data + bytes(len(data) % 2)
    total = sum(struct.unpack(f">{len(summed) // 2}H", summed))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack(">HHHH", source, to, length, ~total & 0xFFFF or 0xFFFF) + data
