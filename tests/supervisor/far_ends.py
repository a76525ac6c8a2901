"""Servers that tools of the tests talk to through the relay, and what they saw. They run in the test's own process."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import struct
import threading
import time
from collections.abc import Callable


class Peer:
    """A TCP server on loopback, one thread per connection. ``received`` is all that came, whatever its form."""

    def __init__(self, serve: Callable[[Peer, socket.socket], None], family: int = socket.AF_INET) -> None:
        host = "::1" if family == socket.AF_INET6 else "127.0.0.1"
        self._sock = socket.create_server((host, 0), family=family, backlog=512)
        self._serve_one = serve
        self._lock = threading.Lock()
        self.port: int = self._sock.getsockname()[1]
        self.received = 0
        self.connections = 0
        self.errors: list[str] = []
        self.hashes: list[str] = []
        self.peers: list[tuple[str, int]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def took(self, count: int) -> None:
        with self._lock:
            self.received += count

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                accepted, peer = self._sock.accept()
                self.connections += 1
                self.peers.append(peer[:2])
                threading.Thread(target=self._serve, args=(accepted,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock:
            try:
                self._serve_one(self, sock)
            except OSError as error:
                self.errors.append(type(error).__name__)

    def close(self) -> None:
        self._sock.close()


def swallow(peer: Peer, sock: socket.socket) -> None:
    """Takes everything; answers with its SHA-256 at the end."""
    digest = hashlib.sha256()
    while chunk := sock.recv(1 << 18):
        peer.took(len(chunk))
        digest.update(chunk)
    peer.hashes.append(digest.hexdigest())
    sock.sendall(digest.digest())


def pour(peer: Peer, sock: socket.socket) -> None:
    """Sends without end."""
    block = bytes(1 << 16)
    while True:
        sock.sendall(block)


def echo(peer: Peer, sock: socket.socket) -> None:
    while chunk := sock.recv(1 << 16):
        peer.took(len(chunk))
        sock.sendall(chunk)


def answer(peer: Peer, sock: socket.socket) -> None:
    """Takes everything up to the FIN, and only then answers, at length."""
    count = 0
    while chunk := sock.recv(1 << 16):
        count += len(chunk)
        peer.took(len(chunk))
    sock.sendall(b"%d " % count + bytes(100_000))


def reset(peer: Peer, sock: socket.socket) -> None:
    """Sends a little, then resets."""
    sock.sendall(b"so far")
    time.sleep(0.1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def hold(peer: Peer, sock: socket.socket) -> None:
    """Takes nothing for a second, then everything."""
    time.sleep(1)
    while chunk := sock.recv(1 << 16):
        peer.took(len(chunk))


class Crowded:
    """A listener whose queue is full: a connect to it hangs until :meth:`open` (within a second or so) or refusal."""

    def __init__(self) -> None:
        self._sock = socket.socket()
        self._sock.bind(("127.0.0.1", 0))
        self._sock.listen(0)
        self.port: int = self._sock.getsockname()[1]
        self._queued = socket.create_connection(("127.0.0.1", self.port))

    def open(self) -> socket.socket:
        """Makes room, and takes in the next that comes."""
        self._sock.settimeout(10)
        self._sock.accept()[0].close()
        return self._sock.accept()[0]

    def close(self) -> None:
        self._queued.close()
        self._sock.close()
