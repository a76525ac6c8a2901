"""An HTTP proxy on the way to a name: CONNECT (RFC 9110, 9.3.6). Runs in the supervisor."""

from __future__ import annotations

import errno
import re
import socket
from typing import Final, NamedTuple

_HEAD_LIMIT: Final = 1 << 14
_STATUS: Final = re.compile(rb"HTTP/1\.[01] ([0-9]{3})[ \r]")
_FORBIDDEN: Final = (401, 403, 407)


class Proxied(NamedTuple):
    """Where the proxy is, and what it is asked for."""

    address: bytes
    """The proxy's, a ``sockaddr``."""
    name: str
    port: int


class Handshake:
    """Asks a proxy for its way on, over a connected nonblocking socket.

    What comes behind the answer's head belongs to the destination, and stays in the socket.
    """

    def __init__(self, proxied: Proxied) -> None:
        authority = f"{proxied.name}:{proxied.port}".encode()
        self._to_send = b"CONNECT %b HTTP/1.1\r\nHost: %b\r\n\r\n" % (authority, authority)

    def step(self, sock: socket.socket) -> int:
        """0: the way is open; EINPROGRESS: not yet; EACCES, the proxy forbids it; else ECONNREFUSED."""
        try:
            if self._to_send:
                self._to_send = self._to_send[sock.send(self._to_send, socket.MSG_NOSIGNAL) :]
                if self._to_send:
                    return errno.EINPROGRESS
            seen = sock.recv(_HEAD_LIMIT, socket.MSG_PEEK)
            end = seen.find(b"\r\n\r\n")
            if end < 0:
                return errno.EINPROGRESS if 0 < len(seen) < _HEAD_LIMIT else errno.ECONNREFUSED
            sock.recv(end + 4)
        except BlockingIOError:
            return errno.EINPROGRESS
        except OSError:
            return errno.ECONNREFUSED
        return self._judge(seen)

    @staticmethod
    def _judge(head: bytes) -> int:
        found = _STATUS.match(head)
        status = int(found[1]) if found is not None else 0
        if 200 <= status < 300:
            return 0
        return errno.EACCES if status in _FORBIDDEN else errno.ECONNREFUSED
