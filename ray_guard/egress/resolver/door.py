"""Where queries come in: the guard's name server, as its targets' sockets see it. Runs in the supervisor.

Whatever name server a target names, its socket is led here (:mod:`ray_guard.egress.gate`): a socket that may send by
connecting it, or the message, to a port on loopback; a mute datagram socket by putting one end of a socketpair in its
place. Who asks is never taken from a query. It is known from the pair, or from the source address, which the gate has
noted when it led the socket here; a query from any other address is not answered.
"""

from __future__ import annotations

import errno
import select
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

from ray_guard.egress import sockaddr
from ray_guard.egress.resolver.forged import Forger
from ray_guard.log import logger
from ray_guard.policy.destination import canonical_address

log = logger("ray_guard.door")

QUERY_LIMIT: Final = 4096
"""Bytes of a query: a name has 255 at most, the rest is header and options."""
OWN_SOURCES: Final = 256
"""How many sockets of one owner may ask by datagram; beyond that the first is forgotten, and gets no answer."""
OWN_STREAMS: Final = 64
"""How many connections (or socketpairs) of one owner are kept; then the oldest is closed."""
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

    @property
    def owner(self) -> object:
        """With whose end (and at whose expense) it is forgotten."""

    def asks(self, query: bytes, reply: Reply, *, datagram: bool) -> None:
        """Takes a query; ``reply`` may be called once, now or later."""


class Door:
    """See the module. One per supervisor; opened when the first target that lists names is led to it.

    Raises:
        OSError: no port can be had on 127.0.0.1. (Without ::1 targets that ask an IPv6 name server are refused.)
    """

    def __init__(self, loop: Waiting) -> None:
        self._loop = loop
        self._sources: dict[Endpoint, Asker] = {}
        self._apparent: dict[Endpoint, Endpoint] = {}
        """By source, where answers must seem to come from: sockets that asked without connecting."""
        try:
            self._forger: Forger | None = Forger()
        except OSError:
            self._forger = None
        self._callers: dict[Endpoint, Asker] = {}
        """Of TCP connections that have not been accepted yet."""
        self._owned: dict[int, _Owned] = {}
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

    def expect(self, source: Endpoint, asker: Asker, *, stream: bool, asked: Endpoint | None = None) -> None:
        """Queries from ``source`` are ``asker``'s from now on, whoever had that address before.

        ``asked``: the name server that a socket sent to without connecting; it may want the answer from there.
        """
        host, port = source
        known = self._callers if stream else self._sources
        owned = self._of(asker)
        # Not connected, it sends from the loopback address of whichever family it sends to.
        for each in (canonical_address(host), *(("127.0.0.1",) if host == "::" else ())):
            known[each, port] = asker
            if asked is not None and (":" in each) == (":" in asked[0]):
                self._apparent[each, port] = asked
            else:
                self._apparent.pop((each, port), None)
            owned.sources.append((each, port))
        while len(owned.sources) > OWN_SOURCES:
            self._unexpect(owned.sources.popleft(), asker.owner)

    def _of(self, asker: Asker) -> _Owned:
        return self._owned.setdefault(id(asker.owner), _Owned())

    def _unexpect(self, source: Endpoint, owner: object) -> None:
        for known in (self._sources, self._callers):
            if (asker := known.get(source)) is not None and asker.owner is owner:  # it may be another's by now
                del known[source]
                self._apparent.pop(source, None)

    def line(self, asker: Asker) -> socket.socket:
        """One end of a new pair on which ``asker`` asks, one query per message; its messages go nowhere else.

        Raises:
            OSError: EMFILE, this process has no more descriptors.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._keep(_Line(ours, asker, self._loop, self._of(asker).held))
        return theirs

    def _keep(self, held: _Held) -> None:
        mine = self._of(held.asker).held
        mine[id(held)] = held
        while len(mine) > OWN_STREAMS:
            next(iter(mine.values())).close()

    def forget(self, owner: object) -> None:
        """Nobody asks for ``owner`` any more."""
        owned = self._owned.pop(id(owner), None)
        if owned is None:
            return
        for source in owned.sources:
            self._unexpect(source, owner)
        for held in list(owned.held.values()):
            held.close()

    def close(self) -> None:
        for owned in self._owned.values():
            for held in list(owned.held.values()):
                held.close()
        for sock in self._sockets:
            self._loop.forget(sock.fileno())
            sock.close()
        self._sockets.clear()
        if self._forger is not None:
            self._forger.close()

    # -- queries -------------------------------------------------------------------------------------------------------

    def _datagrams(self, sock: socket.socket) -> None:
        for _ in range(_BATCH):
            try:
                data, source = sock.recvfrom(QUERY_LIMIT + 1)
            except OSError:  # none left, or a target that has gone since it asked
                return
            key = (canonical_address(source[0]), source[1])
            asker = self._sources.get(key)
            if asker is not None and len(data) <= QUERY_LIMIT:
                asker.asks(data, self._reply_to(sock, key), datagram=True)

    def _reply_to(self, sock: socket.socket, source: Endpoint) -> Reply:
        asked, forger = self._apparent.get(source), self._forger

        def reply(message: bytes) -> None:
            try:
                if asked is not None and forger is not None:
                    forger.send(message, asked, source)
                else:
                    sock.sendto(message, socket.MSG_DONTWAIT, source)
            except OSError:
                pass  # a datagram more that is lost, or a target that has gone

        return reply

    def _accept(self, sock: socket.socket) -> None:
        try:
            accepted, source = sock.accept()
        except OSError:
            return
        asker = self._callers.pop((canonical_address(source[0]), source[1]), None)
        if asker is None:
            accepted.close()
            return
        self._keep(_Stream(accepted, asker, self._loop, self._of(asker).held))


class _Held:
    """A socket that belongs to one asker alone, until it is closed from either side."""

    def __init__(self, sock: socket.socket, asker: Asker, loop: Waiting, held: dict[int, _Held]) -> None:
        sock.setblocking(False)
        self.asker = asker
        self._sock = sock
        self._loop = loop
        self._held = held
        loop.watch(sock.fileno(), select.EPOLLIN, lambda _events: self._ready())

    def _ready(self) -> None:
        try:
            data = self._sock.recv(QUERY_LIMIT + 1)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._came(data)
        else:
            self._ended()

    def _ended(self) -> None:
        """The other side sends nothing more."""
        self.close()

    def _came(self, data: bytes) -> None:
        raise NotImplementedError

    def _send(self, data: bytes) -> None:
        if self._sock.fileno() < 0:
            return
        try:
            sent = self._sock.send(data, socket.MSG_NOSIGNAL)
        except OSError:
            sent = -1
        if sent != len(data):  # it reads nothing of what it asks for
            self.close()

    def close(self) -> None:
        if self._sock.fileno() >= 0:
            self._held.pop(id(self), None)
            self._loop.forget(self._sock.fileno())
            self._sock.close()


class _Line(_Held):
    """Our end of the socketpair that stands in the place of a target's datagram socket."""

    def _came(self, data: bytes) -> None:
        if len(data) <= QUERY_LIMIT:
            self.asker.asks(data, self._send, datagram=True)


class _Stream(_Held):
    """A target's TCP connection: each message comes after its length (RFC 1035, 4.2.2)."""

    def __init__(self, sock: socket.socket, asker: Asker, loop: Waiting, held: dict[int, _Held]) -> None:
        super().__init__(sock, asker, loop, held)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # two answers, one after the other
        self._buffer = b""
        self._waiting = 0
        self._half_closed = False
        self._active = True
        loop.later(_IDLE_S, self._check)

    def _came(self, data: bytes) -> None:
        self._active = True
        self._buffer += data
        while len(self._buffer) >= 2 and self._sock.fileno() >= 0:
            length = int.from_bytes(self._buffer[:2], "big")
            if length > QUERY_LIMIT:
                self.close()
                return
            if len(self._buffer) < 2 + length:
                return
            query, self._buffer = self._buffer[2 : 2 + length], self._buffer[2 + length :]
            self._waiting += 1
            self.asker.asks(query, self._reply, datagram=False)

    def _ended(self) -> None:
        self._half_closed = True
        self._loop.forget(self._sock.fileno())  # it would be told again and again
        if self._waiting == 0:
            self.close()

    def _reply(self, message: bytes) -> None:
        self._active = True
        self._waiting -= 1
        self._send(len(message).to_bytes(2, "big") + message)
        if self._half_closed and self._waiting == 0:
            self.close()

    def _check(self) -> None:
        if self._sock.fileno() < 0:
            return
        if self._active:
            self._active = False
            self._loop.later(_IDLE_S, self._check)
        else:
            self.close()


class _Owned:
    """What one owner's sockets have here."""

    def __init__(self) -> None:
        self.sources: deque[Endpoint] = deque()
        self.held: dict[int, _Held] = {}


def _bound(ready: Callable[[socket.socket], None], sock: socket.socket) -> Callable[[int], None]:
    return lambda _events: ready(sock)
