"""Our ends on loopback, which targets' sockets are connected to. Runs in the supervisor."""

from __future__ import annotations

import errno
import socket
import struct
import time
from typing import Final

from ray_guard.egress.relay.crossing import Name
from ray_guard.kernel.sock_diag import connection_cookie

_LOOPBACK: Final = {int(socket.AF_INET): "127.0.0.1", int(socket.AF_INET6): "::1"}
_FILL_S: Final = 0.01
_UNDER_WAY: Final = (errno.EINPROGRESS, errno.EALREADY, errno.EINTR)
_RESET: Final = struct.pack("ii", 1, 0)


class Door:
    """Where the sockets of one family come in: by the address they come from, and nobody else."""

    def __init__(self, family: int) -> None:
        self.family = family
        self._sock = socket.create_server((_LOOPBACK[family], 0), family=socket.AddressFamily(family), backlog=4096)
        self._sock.setblocking(False)
        self._closed = socket.socket(family, socket.SOCK_STREAM)
        self._closed.bind((_LOOPBACK[family], 0))

    def fileno(self) -> int:
        return self._sock.fileno()

    def name(self) -> Name:
        """Address and port."""
        host, port = self._sock.getsockname()[:2]
        return host, port

    def ports(self) -> tuple[int, int]:
        """Its own, and that of :meth:`closed`."""
        return self.name()[1], int(self._closed.getsockname()[1])

    def address(self, *, mapped: bool) -> bytes:
        """Its ``sockaddr``; ``mapped``: as an IPv6 socket takes it that was to reach IPv4."""
        return _address(self._sock, mapped=mapped)

    def closed(self, *, mapped: bool) -> bytes:
        """The ``sockaddr`` of a port where every connect is refused: it is taken, and nobody listens."""
        return _address(self._closed, mapped=mapped)

    def accept(self) -> tuple[socket.socket, Name] | None:
        """The next that came in and where from; None: nobody."""
        try:
            accepted, peer = self._sock.accept()
        except OSError:
            return None
        return accepted, peer[:2]

    def close(self) -> None:
        self._sock.close()
        self._closed.close()


def reject(sock: socket.socket) -> None:
    """Resets a connection that nobody expected."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    sock.close()


class Room:
    """A waiting room, for one socket that must be seen connecting: it gets no answer here.

    It is a listener whose queue is full, by a connection of our own: the kernel drops every further SYN, so the socket
    stays in SYN_SENT. (A socket filter would do the same, but needs CAP_NET_ADMIN.) :meth:`meet` connects a socket of
    ours to it from the same port: crossed SYNs are a connection (RFC 9293, 3.5). Once the room is closed and nobody has
    met it, its next SYN (sent anew after 1 s, 3 s, 7 s …) is refused.
    """

    def __init__(self, family: int) -> None:
        self.family = family
        self._sock = _shared(family)
        self._own = socket.socket(family, socket.SOCK_STREAM)
        try:
            self._own.setblocking(False)
            self._sock.bind((_LOOPBACK[family], 0))
            self._sock.listen(0)
            self._own.connect_ex(self._sock.getsockname())
            deadline = time.monotonic() + _FILL_S
            while not self._full():  # on loopback it is by now
                if time.monotonic() > deadline:
                    raise OSError(errno.EAGAIN, "the waiting room does not fill")
        except OSError:
            self.close()
            raise

    def _full(self) -> bool:
        info = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 28)
        queued: int = struct.unpack_from("=I", info, 24)[0]  # tcpi_unacked: of a listener, those that wait
        return queued > 0

    def port(self) -> int:
        return int(self._sock.getsockname()[1])

    def address(self, *, mapped: bool) -> bytes:
        """Its ``sockaddr``; see :meth:`Door.address`."""
        return _address(self._sock, mapped=mapped)

    def meet(self, waiting: Name, cookie: int) -> Meeting:
        """Begins to connect a socket of ours to the one that waits. Raises OSError."""
        ours = _shared(self.family)
        try:
            ours.bind(self._sock.getsockname())
        except OSError:
            ours.close()
            raise
        return Meeting(ours, waiting, cookie)

    def close(self) -> None:
        self._sock.close()
        self._own.close()


class Meeting:
    """A socket of ours on its way to the one in the waiting room."""

    def __init__(self, ours: socket.socket, waiting: Name, cookie: int) -> None:
        self.ours = ours
        self._waiting = waiting
        self._cookie = cookie

    def step(self) -> int:
        """0: connected, and to no other socket than that; EINPROGRESS; or why not."""
        error = self.ours.connect_ex(self._waiting)
        if error in _UNDER_WAY:
            return errno.EINPROGRESS
        if error not in (0, errno.EISCONN):
            return error
        # The target may have closed its socket, and that port may be anybody's by now: whose is it?
        host, port = self.ours.getsockname()[:2]
        met = connection_cookie(self.ours.family, self._waiting, (host, port))
        return 0 if met == self._cookie else errno.ECONNABORTED


def _shared(family: int) -> socket.socket:
    """A socket whose port others of ours may have too."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return sock


def _address(sock: socket.socket, *, mapped: bool) -> bytes:
    host, port = sock.getsockname()[:2]
    packed = socket.inet_pton(sock.family, host)
    if sock.family == socket.AF_INET and not mapped:
        return struct.pack("=H", socket.AF_INET) + struct.pack(">H", port) + packed + bytes(8)
    if mapped:
        packed = bytes(10) + b"\xff\xff" + packed
    return struct.pack("=H", socket.AF_INET6) + struct.pack(">HI", port, 0) + packed + bytes(4)
