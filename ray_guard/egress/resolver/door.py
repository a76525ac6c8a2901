"""Where queries come in: the guard's name server, as its targets' sockets see it. Runs in the supervisor.

Whatever name server a target names, its socket is led here (:mod:`ray_guard.egress.gate`): a socket that may send by
connecting it, or the message, to a port on loopback; a mute datagram socket by putting one end of a socketpair in its
place. Who asks is never taken from a query. It is known from the pair, or from the source address, which the gate has
noted when it led the socket here; a query from any other address is not answered.
"""

from __future__ import annotations

import errno
import logging
import select
import socket
import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final, Protocol

from ray_guard.egress import sockaddr
from ray_guard.policy.destination import canonical_address

log = logging.getLogger("ray_guard.door")

QUERY_LIMIT: Final = 4096
"""Bytes of a query: a name has 255 at most, the rest is header and options."""
_SOURCES_LIMIT: Final = 8192
_STREAMS_LIMIT: Final = 1024
_LINES_LIMIT: Final = 1024
_BATCH: Final = 16
_IDLE_S: Final = 10.0
_MAPPED: Final = bytes(10) + b"\xff\xff"

Endpoint = tuple[str, int]
Reply = Callable[[bytes], None]


class Waiting(Protocol):
    """What this needs of the supervisor's loop."""

    def watch(self, descriptor: int, events: int, callback: Callable[[int], None]) -> None: ...
    def forget(self, descriptor: int) -> None: ...
    def later(self, seconds: float, callback: Callable[[], None]) -> None: ...


class Asker(Protocol):
    """On whose behalf a socket asks."""

    def asks(self, query: bytes, reply: Reply, *, datagram: bool) -> None:
        """Takes a query; ``reply`` may be called once, now or later."""


class Door:
    """See the module. One per supervisor; opened when the first target that lists names is led to it.

    Raises:
        OSError: no port can be had on 127.0.0.1. (Without ::1 targets that ask an IPv6 name server are refused.)
    """

    def __init__(self, loop: Waiting) -> None:
        self._loop = loop
        self._sources: OrderedDict[Endpoint, Asker] = OrderedDict()
        self._callers: OrderedDict[Endpoint, Asker] = OrderedDict()
        self._streams: OrderedDict[int, _Stream] = OrderedDict()
        self._lines: dict[int, tuple[socket.socket, Asker]] = {}
        self._sockets: list[socket.socket] = []
        self._ports: dict[tuple[int, int], int] = {}
        for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            try:
                self._open(family, host)
            except OSError:
                if family == socket.AF_INET:
                    self.close()
                    raise

    def _open(self, family: int, host: str) -> None:
        for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
            sock = socket.socket(family, kind | socket.SOCK_NONBLOCK)
            self._sockets.append(sock)
            sock.bind((host, 0))
            if kind == socket.SOCK_STREAM:
                sock.listen(128)
            self._ports[family, kind] = sock.getsockname()[1]
            ready = self._datagrams if kind == socket.SOCK_DGRAM else self._accept
            self._loop.watch(sock.fileno(), select.EPOLLIN, _bound(ready, sock))

    @property
    def endpoints(self) -> frozenset[Endpoint]:
        """Where it listens: nobody comes here but those who are led."""
        hosts = {int(socket.AF_INET): "127.0.0.1", int(socket.AF_INET6): "::1"}
        return frozenset((hosts[int(family)], port) for (family, _), port in self._ports.items())

    # -- leading sockets here ------------------------------------------------------------------------------------------

    def address(self, raw: bytes, *, stream: bool) -> bytes:
        """The ``sockaddr``, of the family of ``raw``, to use in place of the name server's ``raw``.

        Raises:
            BadAddress: ENETUNREACH, there is none of that family.
        """
        kind = socket.SOCK_STREAM if stream else socket.SOCK_DGRAM
        (family,) = struct.unpack_from("=H", raw)
        mapped = family == sockaddr.AF_INET6 and raw[8:20] == _MAPPED
        port = self._ports.get((socket.AF_INET if mapped else family, kind))
        if port is None:
            raise sockaddr.BadAddress(errno.ENETUNREACH)
        if family == sockaddr.AF_INET:
            return struct.pack("=H", family) + struct.pack(">H", port) + bytes((127, 0, 0, 1)) + bytes(8)
        host = _MAPPED + bytes((127, 0, 0, 1)) if mapped else bytes(15) + b"\x01"
        return struct.pack("=H", family) + struct.pack(">HI", port, 0) + host + bytes(4)

    def expect(self, source: Endpoint, asker: Asker, *, stream: bool) -> None:
        """Queries from ``source`` are ``asker``'s from now on, whoever had that address before."""
        host, port = source
        known = self._callers if stream else self._sources
        # Not connected, it sends from the loopback address of whichever family it sends to.
        for each in (canonical_address(host), *(("127.0.0.1",) if host == "::" else ())):
            known.pop((each, port), None)
            known[each, port] = asker
        while len(known) > _SOURCES_LIMIT:
            known.popitem(last=False)

    def line(self, asker: Asker) -> socket.socket:
        """One end of a new pair on which ``asker`` asks, one query per message; its messages go nowhere else.

        Raises:
            OSError: EMFILE, there are too many.
        """
        if len(self._lines) >= _LINES_LIMIT:
            raise OSError(errno.EMFILE, "too many sockets ask for names")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._lines[ours.fileno()] = (ours, asker)
        self._loop.watch(ours.fileno(), select.EPOLLIN, _bound(self._on_line, ours))
        return theirs

    def forget(self, asker: Asker) -> None:
        """Nobody asks for ``asker`` any more."""
        for known in (self._sources, self._callers):
            for key in [key for key, value in known.items() if value is asker]:
                del known[key]
        for sock, owner in list(self._lines.values()):
            if owner is asker:
                self._hang_up(sock)
        for stream in list(self._streams.values()):
            if stream.asker is asker:
                stream.close()

    def close(self) -> None:
        for stream in list(self._streams.values()):
            stream.close()
        for sock, _ in list(self._lines.values()):
            self._hang_up(sock)
        for sock in self._sockets:
            self._loop.forget(sock.fileno())
            sock.close()
        self._sockets.clear()

    # -- queries -------------------------------------------------------------------------------------------------------

    def _datagrams(self, sock: socket.socket) -> None:
        for _ in range(_BATCH):
            try:
                data, source = sock.recvfrom(QUERY_LIMIT + 1)
            except OSError:  # none left, or a target that has gone since it asked
                return
            asker = self._sources.get((canonical_address(source[0]), source[1]))
            if asker is not None and len(data) <= QUERY_LIMIT:
                asker.asks(data, _reply_to(sock, source), datagram=True)

    def _on_line(self, sock: socket.socket) -> None:
        _, asker = self._lines[sock.fileno()]
        for _ in range(_BATCH):
            try:
                data = sock.recv(QUERY_LIMIT + 1)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._hang_up(sock)
                return
            if len(data) <= QUERY_LIMIT:
                asker.asks(data, _reply_on(sock), datagram=True)
            if sock.fileno() < 0:
                return

    def _hang_up(self, sock: socket.socket) -> None:
        if self._lines.pop(sock.fileno(), None) is not None:
            self._loop.forget(sock.fileno())
            sock.close()

    def _accept(self, sock: socket.socket) -> None:
        try:
            accepted, source = sock.accept()
        except OSError:
            return
        asker = self._callers.pop((canonical_address(source[0]), source[1]), None)
        if asker is None:
            accepted.close()
            return
        if len(self._streams) >= _STREAMS_LIMIT:  # the one that has been silent longest
            next(iter(self._streams.values())).close()
        stream = _Stream(accepted, asker, self._loop, self._streams)
        self._streams[accepted.fileno()] = stream


class _Stream:
    """A target's TCP connection: each message comes after its length (RFC 1035, 4.2.2)."""

    def __init__(self, sock: socket.socket, asker: Asker, loop: Waiting, streams: OrderedDict[int, _Stream]) -> None:
        sock.setblocking(False)
        self.asker = asker
        self._sock = sock
        self._loop = loop
        self._streams = streams
        self._came = b""
        self._active = True
        loop.watch(sock.fileno(), select.EPOLLIN, lambda _events: self._ready())
        loop.later(_IDLE_S, self._check)

    def _ready(self) -> None:
        try:
            data = self._sock.recv(QUERY_LIMIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        self._active = True
        self._streams.move_to_end(self._sock.fileno())
        self._came += data
        while len(self._came) >= 2:
            length = int.from_bytes(self._came[:2], "big")
            if length > QUERY_LIMIT:
                self.close()
                return
            if len(self._came) < 2 + length:
                return
            query, self._came = self._came[2 : 2 + length], self._came[2 + length :]
            self.asker.asks(query, self._reply, datagram=False)

    def _reply(self, message: bytes) -> None:
        if self._sock.fileno() < 0:
            return
        framed = len(message).to_bytes(2, "big") + message
        try:
            sent = self._sock.send(framed, socket.MSG_NOSIGNAL)
        except OSError:
            sent = -1
        if sent != len(framed):  # it reads nothing of what it asks for
            self.close()

    def _check(self) -> None:
        if self._sock.fileno() < 0:
            return
        if self._active:
            self._active = False
            self._loop.later(_IDLE_S, self._check)
        else:
            self.close()

    def close(self) -> None:
        if self._sock.fileno() >= 0:
            self._streams.pop(self._sock.fileno(), None)
            self._loop.forget(self._sock.fileno())
            self._sock.close()


def _bound(ready: Callable[[socket.socket], None], sock: socket.socket) -> Callable[[int], None]:
    return lambda _events: ready(sock)


def _reply_to(sock: socket.socket, source: tuple[Any, ...]) -> Reply:
    def reply(message: bytes) -> None:
        try:
            sock.sendto(message, socket.MSG_DONTWAIT, source)
        except OSError:
            pass  # a datagram more that is lost, or a target that has gone

    return reply


def _reply_on(sock: socket.socket) -> Reply:
    def reply(message: bytes) -> None:
        try:
            sock.send(message, socket.MSG_NOSIGNAL)
        except OSError:
            pass  # closed meanwhile, or its reader is too slow

    return reply
