"""NETLINK_SOCK_DIAG: exact byte counts of TCP sockets, without holding a duplicate of any. Runs in the supervisor.

Source: sock_diag(7), ``include/uapi/linux/{sock_diag,inet_diag,tcp}.h``.
"""

from __future__ import annotations

import errno
import functools
import os
import socket
import struct
from collections.abc import Container, Iterator
from typing import Final

from ray_guard.kernel import libc
from ray_guard.named import NamedTuple

SO_COOKIE: Final = 57
NETLINK_SOCK_DIAG: Final = 4
_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP = 270, 1
_GROUP_TCP_DESTROY, _GROUP_TCP6_DESTROY = 1, 3
_SOCK_DIAG_BY_FAMILY, _NLMSG_ERROR, _NLMSG_DONE = 20, 2, 3
_NLM_F_REQUEST, _NLM_F_DUMP = 1, 0x300
_INET_DIAG_INFO = 2
_HEADER = struct.Struct("=IHHII")
_MESSAGE = 72  # sizeof(struct inet_diag_msg)
_COOKIE = struct.Struct("=Q")
_COUNTS = struct.Struct("=QQ64xQQ")
"""bytes_acked, bytes_received, bytes_sent, bytes_retrans, from offset 120 of ``struct tcp_info`` on."""
_ATTRIBUTE = struct.Struct("=HH")
_SO_RCVBUFFORCE = 33
_MAPPED = bytes(10) + b"\xff\xff"
_FIN_WAIT2, _TIME_WAIT, _LISTEN = 5, 6, 10
_CONNECTED_STATES = 0xFFF & ~(1 << _LISTEN) & ~(1 << _TIME_WAIT)


class Counted(NamedTuple):
    """Payload bytes of one TCP socket, from the target's point of view."""

    cookie: int
    sent: int
    received: int
    fin_acked: bool
    """The peer has acknowledged our FIN."""
    connection: bytes
    """``struct inet_diag_sockid`` without the cookie, behind family and padding: names the 4-tuple in a question."""

    def local(self) -> tuple[str, int]:
        """The socket's own address, an IPv4-mapped one as IPv4, and port."""
        found = self.connection
        return _address(found[0], found[8:24]), found[4] << 8 | found[5]


@functools.lru_cache(maxsize=256)
def _address(family: int, packed: bytes) -> str:
    if family == socket.AF_INET:
        return socket.inet_ntop(socket.AF_INET, packed[:4])
    if packed.startswith(_MAPPED):
        return socket.inet_ntop(socket.AF_INET, packed[12:])
    return socket.inet_ntop(socket.AF_INET6, packed)


class LostEvents(Exception):
    """The node closed sockets faster than the events were read: what was lost must be charged by an upper bound.

    ``ended``: those that were not.
    """

    def __init__(self, ended: list[Counted]) -> None:
        super().__init__()
        self.ended = ended


def _parse(data: memoryview) -> Counted | None:
    """The counts in a ``struct inet_diag_msg`` with its attributes; None: it carries none."""
    at, end = _MESSAGE, len(data)
    while at + 4 <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if kind == _INET_DIAG_INFO and length >= 4 + 216:
            acked, received, sent, retransmitted = _COUNTS.unpack_from(data, at + 4 + 120)
            payload = sent - retransmitted  # bytes_acked counts SYN and FIN, bytes_sent counts neither
            (cookie,) = _COOKIE.unpack_from(data, 44)
            return Counted(cookie, payload, received, acked - payload >= 2, data[:44].tobytes())
        if length < 4:
            return None
        at += (length + 3) & ~3
    return None


def _attributes(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    at = 0
    while at + 4 <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < 4:
            return
        yield kind, data[at + 4 : at + length]
        at += (length + 3) & ~3


def _messages(packet: bytes) -> Iterator[tuple[int, memoryview]]:
    view, at = memoryview(packet), 0
    while at + 16 <= len(view):
        length, kind, _, _, _ = _HEADER.unpack_from(view, at)
        if length < 16:
            return
        yield kind, view[at + 16 : at + length]
        at += (length + 3) & ~3


class SockDiag:
    """One event socket (destroy notifications of the whole network namespace) and one for questions."""

    def __init__(self) -> None:
        self._events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG)
        self._events.setblocking(False)
        try:
            self._events.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 8 << 20)
        except OSError:  # unprivileged: up to net.core.rmem_max
            self._events.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        self._events.bind((0, 0))
        for group in (_GROUP_TCP_DESTROY, _GROUP_TCP6_DESTROY):
            self._events.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, group)
        self._inbox = libc.Inbox(64, 1024)
        self._questions = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG)
        self._questions.settimeout(1.0)
        self._questions.bind((0, 0))

    def fileno(self) -> int:
        """Readable when a TCP socket of the namespace has ended."""
        return self._events.fileno()

    def events(self, wanted: Container[int]) -> list[Counted]:
        """Final counts of those ``wanted`` sockets (by cookie) that ended since the last call.

        Raises:
            LostEvents: some were dropped by the kernel; the rest is delivered by the next call.
        """
        ended: list[Counted] = []
        inbox, cookie_in = self._inbox, _COOKIE.unpack_from
        view, lengths, size = memoryview(inbox.data), inbox.lengths, inbox.size
        while True:
            received = inbox.receive(self._events.fileno())
            if received == -errno.ENOBUFS:
                raise LostEvents(ended)
            if received < 0 and received != -errno.EAGAIN:
                raise OSError(-received, os.strerror(-received))
            for number in range(received):
                # Every socket of the node passes here: look at the cookie before anything else.
                at = number * size
                length = lengths[number]
                if length < 16 + _MESSAGE or cookie_in(view, at + 60)[0] not in wanted:
                    continue
                counted = _parse(view[at + 16 : at + length])
                if counted is not None:
                    ended.append(self._without_fin(counted))
            if received < inbox.count:
                return ended

    def _without_fin(self, ended: Counted) -> Counted:
        """``bytes_received`` counts the peer's FIN, where the full socket still saw it: take it out again.

        It did not where the connection was reset (our FIN was never acknowledged), nor where we closed first and the
        peer has not yet: then a time-wait socket in FIN_WAIT2 stands in its place. One case stays off by one byte: we
        close while the peer is still sending, which resets the connection after our FIN was acknowledged.
        """
        if not ended.fin_acked or ended.received == 0 or self._state(ended.connection) == _FIN_WAIT2:
            return ended
        return ended._replace(received=ended.received - 1)

    def _state(self, connection: bytes) -> int | None:
        """State of the socket, or time-wait socket, that now has this 4-tuple; None: there is none."""
        body = struct.pack("=BBBxI", connection[0], socket.IPPROTO_TCP, 0, 0xFFFFFFFF) + connection[4:] + b"\xff" * 8
        self._questions.send(_HEADER.pack(16 + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0) + body)
        for kind, data in _messages(self._questions.recv(1 << 16)):
            if kind == _SOCK_DIAG_BY_FAMILY:
                return data[1]
        return None

    def live(self) -> dict[int, Counted]:
        """Current counts of every connected TCP socket of the namespace, by cookie: one dump, whatever their number."""
        found: dict[int, Counted] = {}
        for family in (socket.AF_INET, socket.AF_INET6):
            for data in self._dump(family, 1 << (_INET_DIAG_INFO - 1)):
                counted = _parse(data)
                if counted is not None:
                    found[counted.cookie] = counted
        return found

    def _dump(self, family: int, extensions: int) -> list[memoryview]:
        body = struct.pack("=BBBxI48x", family, socket.IPPROTO_TCP, extensions, _CONNECTED_STATES)
        header = _HEADER.pack(16 + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST | _NLM_F_DUMP, 1, 0)
        self._questions.send(header + body)
        found: list[memoryview] = []
        while True:
            for kind, data in _messages(self._questions.recv(1 << 17)):
                if kind in (_NLMSG_DONE, _NLMSG_ERROR):
                    return found
                found.append(data)

    def inode(self, cookie: int) -> int:
        """Inode of the TCP socket ``cookie``, by which /proc/PID/fd names it; 0: no process holds it."""
        for family in (socket.AF_INET, socket.AF_INET6):
            for data in self._dump(family, 0):
                if len(data) >= _MESSAGE and _COOKIE.unpack_from(data, 44)[0] == cookie:
                    return int.from_bytes(data[68:72], "little")
        return 0

    def close(self) -> None:
        self._events.close()
        self._questions.close()


def connection_cookie(family: int, local: tuple[str, int], remote: tuple[str, int]) -> int:
    """Cookie of the TCP socket with these ends, as itself sees them; 0: there is none."""
    ends = struct.pack(">HH", local[1], remote[1])
    for host, _ in (local, remote):
        ends += socket.inet_pton(family, host).ljust(16, b"\0")
    body = struct.pack("=BBBxI", family, socket.IPPROTO_TCP, 0, 0xFFFFFFFF) + ends + struct.pack("=I", 0) + b"\xff" * 8
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG) as sock:
        sock.settimeout(1.0)
        sock.send(_HEADER.pack(16 + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0) + body)
        for kind, data in _messages(sock.recv(1 << 14)):
            if kind == _SOCK_DIAG_BY_FAMILY and len(data) >= _MESSAGE:
                cookie: int = _COOKIE.unpack_from(data, 44)[0]
                return cookie
    return 0


_UDIAG_SHOW_VFS, _UNIX_DIAG_VFS, _UNIX_MESSAGE = 2, 1, 16


def unix_file(socket_inode: int) -> tuple[int, int] | None:
    """(device as the kernel numbers it, low 32 bits of the inode) of the file that a unix socket is bound to.

    Args:
        socket_inode: ``st_ino`` of a descriptor of the socket.

    Returns:
        None where the socket is bound to no file.

    Raises:
        OSError: the kernel has no ``unix_diag``, or the socket is gone.
    """
    states, cookie = 0xFFFFFFFF, b"\xff" * 8
    body = struct.pack("=BBHIII8s", socket.AF_UNIX, 0, 0, states, socket_inode, _UDIAG_SHOW_VFS, cookie)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG) as sock:
        sock.settimeout(1.0)
        sock.send(_HEADER.pack(16 + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0) + body)
        for kind, data in _messages(sock.recv(1 << 14)):
            if kind == _NLMSG_ERROR:
                (error,) = struct.unpack_from("=i", data)
                raise OSError(-error, f"unix_diag: {os.strerror(-error)}")
            if kind == _SOCK_DIAG_BY_FAMILY:
                for attribute, value in _attributes(data[_UNIX_MESSAGE:]):
                    if attribute == _UNIX_DIAG_VFS and len(value) >= 8:
                        inode, device = struct.unpack_from("=II", value)
                        return device, inode
    return None
