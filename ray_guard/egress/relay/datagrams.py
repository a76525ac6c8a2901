"""UDP under a byte limit: datagrams go by way of the supervisor, which counts each before it hands it on. Runs there.

The kernel tells nobody how much a UDP socket has sent and received. So where bytes are limited a target's socket
reaches no destination itself:

- connected, it is connected to a socket of ours on loopback, which hears nobody else, and a second one of ours is
  connected to the destination;
- a message that names its destination is sent from such a second socket, and what is answered comes from loopback. The
  target's socket is bound there, where nobody outside can send to.

Datagrams are handed on whole. One for which there is no room is dropped, and nothing follows it. What the target can
tell: whom it hears is one of ours (``recvfrom``, ``getpeername``), and no ICMP error reaches it.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import sys
from collections.abc import Callable
from typing import Final, Protocol

from ray_guard.egress.relay.crossing import Name, Socket, full_name, plain_name
from ray_guard.kernel import libc
from ray_guard.kernel.sock_diag import SO_COOKIE
from ray_guard.policy.budgets import RECEIVED, SENT

WAYS_LIMIT: Final = 1024
"""Ways of one supervisor at a time; beyond it ENOBUFS. Each holds two descriptors."""
_TURN: Final = 64
"""Datagrams handed on before others have their turn."""
_LARGEST: Final = 1 << 16
_SWEEP_S: Final = 2.0
_SO_DOMAIN, _SO_NETNS_COOKIE = 39, 71
_WILDCARDS: Final = ("0.0.0.0", "::", "::ffff:0.0.0.0")  # noqa: S104 - compared, not bound


class Owner(Protocol):
    """Whose datagrams they are."""

    def takes(self, kind: str, size: int) -> bool:
        """Whether there is room for ``size`` bytes more of ``kind``; if so they count."""

    def failed(self, error: int) -> None:
        """It was never connected."""

    def opened(self, way: Way) -> None:
        """From here on there is something to :meth:`Way.close`."""

    def closed(self, way: Way) -> None:
        """Nothing more goes this way."""


class Waiting(Protocol):
    def watch(self, descriptor: int, events: int, callback: Callable[[int], None]) -> None: ...
    def forget(self, descriptor: int) -> None: ...
    def later(self, seconds: float, callback: Callable[[], None]) -> None: ...


class Way:
    """From one socket of a target to one destination, and back.

    Args:
        key: cookie of the target's socket, and the destination where its messages name that.
        ours: one on loopback, and one that is connected to the destination.
        target: the name of the target's socket.
        over: called when it is closed.
    """

    __slots__ = ("_loop", "_over", "_owner", "closed", "far", "key", "local", "near", "received", "sent", "target")

    def __init__(
        self,
        loop: Waiting,
        key: tuple[int, bytes],
        *,
        ours: tuple[socket.socket, socket.socket],
        target: tuple[object, ...],
        owner: Owner,
        over: Callable[[Way], None],
    ) -> None:
        self.key = key
        self.near, self.far = ours
        self.target = target
        self.local: Name = plain_name(self.far, int(self.far.family))
        self.sent = self.received = 0
        self.closed = False
        self._loop = loop
        self._owner = owner
        self._over = over
        owner.opened(self)
        loop.watch(self.near.fileno(), select.EPOLLIN, lambda _events: self._outward())
        loop.watch(self.far.fileno(), select.EPOLLIN, lambda _events: self._inward())

    def takes(self, size: int) -> bool:
        """Whether a message of so many bytes may be sent from :attr:`far`; it counts."""
        if self.closed or not self._owner.takes(SENT, size):
            return False
        self.sent += size
        return True

    def _outward(self) -> None:
        for _ in range(_TURN):
            try:
                data = self.near.recv(_LARGEST)
            except BlockingIOError:
                return
            except OSError:  # an ICMP error, told once
                continue
            if not self.takes(len(data)):
                self.close()
                return
            _hand_on(self.far, data)

    def _inward(self) -> None:
        for _ in range(_TURN):
            try:
                data = self.far.recv(_LARGEST)
            except BlockingIOError:
                return
            except OSError:
                continue
            if not self._owner.takes(RECEIVED, len(data)):
                self.close()
                return
            self.received += len(data)
            _hand_on(self.near, data)

    def finish(self) -> None:
        """Its scope has ended: what the target had sent before still goes out."""
        if not self.closed:
            self._outward()
        self.close()

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        for sock in (self.near, self.far):
            self._loop.forget(sock.fileno())
            sock.close()
        self._over(self)
        self._owner.closed(self)


class Datagrams:
    """All ways of one supervisor."""

    def __init__(self, loop: Waiting) -> None:
        self._loop = loop
        self._ways: dict[tuple[int, bytes], Way] = {}
        self._sweeping = False

    def connect(self, sock: Socket, raw: bytes, owner: Owner) -> int:
        """Connects a target's socket by way of ours; 0 or why not (an errno)."""
        key = (_cookie(sock), b"")
        former = self._ways.get(key)
        error = 0
        ours: list[socket.socket] = []
        try:
            ours.append(self._far(sock, raw))
            ours.append(_near(sock, raw))
            error = -libc.connect(sock.fileno(), _address(sock, ours[1]))
        except OSError as failure:
            error = failure.errno or errno.ENETUNREACH
        if error:
            for each in ours:
                each.close()
            owner.failed(error)
            return error
        far, near = ours
        if former is not None:  # it was connected elsewhere until now
            former.close()
        self._begin(key, (near, far), sock, owner)
        return 0

    def way(self, sock: Socket, raw: bytes, owner: Owner) -> Way:
        """For a message of the target's socket to ``raw``. Raises OSError."""
        key = (_cookie(sock), raw)
        found = self._ways.get(key)
        if found is not None:
            return found
        far = self._far(sock, raw)
        try:
            if full_name(sock, _domain(sock))[1] == 0:
                result = libc.bind(sock.fileno(), loopback(_domain(sock), 0, mapped=is_mapped(raw)))
                if result:
                    raise OSError(-result, os.strerror(-result))
            near = _near(sock, raw)
        except OSError:
            far.close()
            raise
        return self._begin(key, (near, far), sock, owner)

    def _far(self, sock: Socket, raw: bytes) -> socket.socket:
        """One of ours that is connected to ``raw``. Raises OSError."""
        (family,) = struct.unpack_from("=H", raw)
        if len(self._ways) >= WAYS_LIMIT:
            self._sweep()
            if len(self._ways) >= WAYS_LIMIT:
                raise OSError(errno.ENOBUFS, "too many ways")
        if _domain(sock) != family:
            raise OSError(errno.EAFNOSUPPORT, "a socket of another family")
        far = socket.socket(family, socket.SOCK_DGRAM)
        try:
            far.setblocking(False)
            if _network(sock) != _network(far):
                raise OSError(errno.ENETUNREACH, "a socket of another network namespace")
            result = libc.connect(far.fileno(), raw)
            if result:
                raise OSError(-result, os.strerror(-result))
        except OSError:
            far.close()
            raise
        return far

    def _begin(
        self, key: tuple[int, bytes], ours: tuple[socket.socket, socket.socket], sock: Socket, owner: Owner
    ) -> Way:
        target = full_name(sock, _domain(sock))
        ours[0].connect(_seen_from(ours[0], target))
        way = self._ways[key] = Way(self._loop, key, ours=ours, target=target, owner=owner, over=self._forget)
        if not self._sweeping:
            self._sweeping = True
            self._loop.later(_SWEEP_S, self._due)
        return way

    def _forget(self, way: Way) -> None:
        if self._ways.get(way.key) is way:
            del self._ways[way.key]

    def _due(self) -> None:
        self._sweeping = False
        self._sweep()
        if self._ways:
            self._sweeping = True
            self._loop.later(_SWEEP_S, self._due)

    def _sweep(self) -> None:
        """Closes the ways of sockets that their targets have closed: nobody tells of that."""
        ports = _bound_ports()
        for way in list(self._ways.values()):
            if way.target[1] not in ports:
                way.finish()


def loopback(family: int, port: int, *, mapped: bool) -> bytes:
    """A ``sockaddr`` on loopback for a socket of ``family``; ``mapped``: an IPv4-mapped one on an IPv6 socket."""
    if family == socket.AF_INET:
        return struct.pack("=H", family) + struct.pack(">H", port) + bytes([127, 0, 0, 1]) + bytes(8)
    host = "::ffff:127.0.0.1" if mapped else "::1"
    return struct.pack("=H", family) + struct.pack(">HI", port, 0) + socket.inet_pton(socket.AF_INET6, host) + bytes(4)


def _near(sock: Socket, raw: bytes) -> socket.socket:
    """One of ours on the loopback that the target's socket reaches from where it is bound."""
    host = str(full_name(sock, _domain(sock))[0])
    plain = "." in host if host not in _WILDCARDS else raw[0] == socket.AF_INET or is_mapped(raw)
    near = socket.socket(socket.AF_INET if plain else socket.AF_INET6, socket.SOCK_DGRAM)
    try:
        near.setblocking(False)
        near.bind(("127.0.0.1" if plain else "::1", 0))
    except OSError:
        near.close()
        raise
    return near


def _address(sock: Socket, near: socket.socket) -> bytes:
    """Where ours is, as an address for the target's socket."""
    return loopback(_domain(sock), near.getsockname()[1], mapped=near.family == socket.AF_INET)


def _seen_from(near: socket.socket, target: tuple[object, ...]) -> tuple[str, int]:
    """The target's socket, as an address for ours."""
    host, port = str(target[0]).removeprefix("::ffff:"), int(str(target[1]))
    if host in ("0.0.0.0", "::"):  # noqa: S104 - compared, not bound
        host = "127.0.0.1" if near.family == socket.AF_INET else "::1"
    return host, port


def _hand_on(sock: socket.socket, data: bytes) -> None:
    try:
        sock.send(data, socket.MSG_NOSIGNAL)
    except OSError:
        pass  # full, or nobody there: datagrams get lost


def _bound_ports() -> set[int]:
    """Ports of all UDP sockets of this network namespace."""
    ports = set()
    for name in ("udp", "udp6"):
        try:
            with open(f"/proc/self/net/{name}", "rb") as file:
                next(file, None)
                ports |= {int(line.split(maxsplit=2)[1].rpartition(b":")[2], 16) for line in file}
        except FileNotFoundError:  # no IPv6
            continue
    return ports


def is_mapped(raw: bytes) -> bool:
    return raw[0] == socket.AF_INET6 and raw[8:20] == bytes(10) + b"\xff\xff"


def _domain(sock: Socket) -> int:
    return sock.getsockopt(socket.SOL_SOCKET, _SO_DOMAIN)


def _cookie(sock: Socket) -> int:
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8), sys.byteorder)


def _network(sock: Socket) -> bytes:
    """Which network namespace the socket is of; empty before Linux 5.14, which does not say."""
    try:
        return sock.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
    except OSError:
        return b""
