"""rtnetlink(7): this node's own addresses. Runs in the supervisor."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

_RTM_NEWADDR, _RTM_GETADDR, _NLMSG_DONE, _NLMSG_ERROR = 20, 22, 3, 2
_NLM_F_REQUEST_DUMP = 0x301
_IFA_ADDRESS, _IFA_LOCAL = 1, 2


def addresses() -> list[str]:
    """Every IPv4 and IPv6 address of every interface in this network namespace."""
    found: set[str] = set()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as sock:
        sock.settimeout(2.0)
        sock.bind((0, 0))
        sock.send(struct.pack("=IHHIIB3xI", 24, _RTM_GETADDR, _NLM_F_REQUEST_DUMP, 1, 0, 0, 0))
        done = False
        while not done:
            for kind, body in _messages(sock.recv(1 << 16)):
                done = done or kind in (_NLMSG_DONE, _NLMSG_ERROR)
                if kind == _RTM_NEWADDR:
                    found |= set(_addresses(body))
    return sorted(found)


def _messages(packet: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 16 <= len(packet):
        length, kind = struct.unpack_from("=IH", packet, at)
        if length < 16:
            return
        yield kind, packet[at + 16 : at + length]
        at += (length + 3) & ~3


def _addresses(body: bytes) -> Iterator[str]:
    family = body[0]
    if family not in (socket.AF_INET, socket.AF_INET6):
        return
    at = 8  # sizeof(struct ifaddrmsg)
    while at + 4 <= len(body):
        length, kind = struct.unpack_from("=HH", body, at)
        if length < 4:
            return
        if kind in (_IFA_ADDRESS, _IFA_LOCAL):
            yield socket.inet_ntop(family, body[at + 4 : at + length])
        at += (length + 3) & ~3
