"""Sockets that the supervisor made for a target, where it may not take the target's own. Runs in the supervisor.

pidfd_getfd is refused in Docker's and containerd's default profiles. There ``socket`` is notified: the supervisor makes
the socket, hands it over and keeps a duplicate *until it is connected or listens*, for what is done on the target's
behalf is done before that. It is one socket with two holders, so its options, a bind before the connect and an epoll
registration stay as the target made them; which one a call is about is told by the inode behind the descriptor.

What it costs, and why the other way is taken where there is one: a target's close of a socket that is still held here
is noticed only by looking through the descriptors of all processes. Things that do not work instead: a new socket put
over the target's at connect() loses options, bind and epoll registration; a duplicate that is kept suppresses FIN.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Callable
from typing import Final, Protocol
from weakref import WeakSet

from ray_guard.egress.threads import Thread, Threads
from ray_guard.kernel import procfs

HELD_LIMIT: Final = 1024
"""How many sockets one ring may have that are neither connected nor listening; then ``socket`` fails with EMFILE."""
_SETTLED_LIMIT: Final = 4096
_SWEEP_S: Final = (0.05, 5.0)
"""The first look for closed ones after a bind or connect, and the longest interval between looks."""
_CLOSED, _SYN_SENT = 7, 2


class Waiting(Protocol):
    def watch(self, descriptor: int, events: int, callback: Callback) -> None: ...
    def forget(self, descriptor: int) -> None: ...
    def later(self, seconds: float, callback: Nullary) -> None: ...


class Callback(Protocol):
    def __call__(self, events: int, /) -> None: ...


class Nullary(Protocol):
    def __call__(self) -> None: ...


class _Held:
    __slots__ = ("sock", "watched")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.watched = False


class MadeSockets(Threads):
    """The :class:`Threads` of a ring whose sockets were made here. See the module."""

    def __init__(self, loop: Waiting, family: WeakSet[MadeSockets]) -> None:
        super().__init__()
        self._loop = loop
        self._family = family
        self._held: dict[int, _Held] = {}
        self._settled: dict[int, bool] = {}
        """Sockets let go, by inode. True: by a connect that took its time and has not been asked about since."""
        self._sweep_in = 0.0
        self._sweeping = False
        self._closed = False
        family.add(self)

    def known(self) -> Callable[[int], Thread | None]:
        """Tells of none: there is no short way to these sockets."""
        return lambda _tid: None

    def descriptor(self, tid: int, number: int) -> int:
        """See :meth:`Threads.descriptor`. ``-EISCONN``: nothing can be done with it any more.

        It was connected, or listens, and was let go; or it came connected, accepted or as one of a pair. (A socket that
        was made before its process was confined gets this too.)
        """
        try:
            link = os.readlink(f"/proc/{tid}/fd/{number}")
        except FileNotFoundError:
            return -errno.EBADF
        except OSError as error:
            return -(error.errno or errno.EPERM)
        if not link.startswith("socket:["):
            # Not a socket: what the kernel says of it, it says of any other that is none.
            return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        inode = int(link[8:-1])
        held = self._held.get(inode)
        if held is None:
            return -errno.EISCONN
        self._loop.later(0, lambda: self._look(inode))
        return os.dup(held.sock.fileno())

    def hold(self, sock: socket.socket) -> None:
        """Takes ``sock``, which was made for the target, before it is handed over.

        Raises:
            OSError: EMFILE, the target has too many that are neither connected nor closed.
        """
        if len(self._held) >= HELD_LIMIT:
            sweep(self._family)
            if len(self._held) >= HELD_LIMIT:
                raise OSError(errno.EMFILE, "too many sockets that are not connected")
        inode = os.fstat(sock.fileno()).st_ino
        self._settled.pop(inode, None)  # the number is another socket's now
        self._held[inode] = _Held(sock)

    def asked_again(self, tid: int, number: int) -> bool:
        """Whether the caller asks how its nonblocking connect went, and it went well: told once, as the kernel does."""
        try:
            link = os.readlink(f"/proc/{tid}/fd/{number}")
        except OSError:
            return False
        inode = int(link[8:-1]) if link.startswith("socket:[") else -1
        if not self._settled.get(inode):
            return False
        self._settled[inode] = False
        return True

    def _look(self, inode: int) -> None:
        """After something was done with a socket: lets it go once nothing more can be."""
        held = self._held.get(inode)
        if held is None:
            return
        state = _state(held.sock)
        if state == _SYN_SENT:
            if not held.watched:
                held.watched = True
                self._loop.watch(held.sock.fileno(), select.EPOLLOUT, lambda _events: self._look(inode))
            return
        slow = held.watched
        if held.watched:
            held.watched = False
            self._loop.forget(held.sock.fileno())
        if state != _CLOSED:
            self._let_go(inode)
            if len(self._settled) >= _SETTLED_LIMIT:
                del self._settled[next(iter(self._settled))]
            self._settled[inode] = slow
        else:  # bound, or a connect that failed: its port must not outlive the target's own close for long
            self._sweep_in = _SWEEP_S[0]
            self._sweep_later()

    def _let_go(self, inode: int) -> None:
        held = self._held.pop(inode)
        if held.watched:
            self._loop.forget(held.sock.fileno())
        held.sock.close()

    def _sweep_later(self) -> None:
        if self._sweeping or self._closed:
            return
        self._sweeping = True

        def due() -> None:
            self._sweeping = False
            sweep(self._family)
            self._sweep_in = min(2 * self._sweep_in, _SWEEP_S[1])
            if self._held:
                self._sweep_later()

        self._loop.later(self._sweep_in, due)

    def sweep(self) -> None:
        """Lets go, now and in all rings, of what the targets have closed."""
        sweep(self._family)

    def keep_only(self, inodes: set[int]) -> None:
        """Lets go of what no process holds any more."""
        for inode in self._held.keys() - inodes:
            self._let_go(inode)

    @property
    def holds_any(self) -> bool:
        return bool(self._held)

    def close(self) -> None:
        self._closed = True
        for inode in list(self._held):
            self._let_go(inode)
        super().close()


def sweep(family: WeakSet[MadeSockets]) -> None:
    """Lets go of all sockets that the targets have closed: held on, they would keep their ports."""
    holding = [each for each in family if each.holds_any]
    if not holding:
        return
    own = os.getpid()
    inodes = {inode for pid in procfs.processes() if pid != own for inode in procfs.sockets_of(pid)}
    for each in holding:
        each.keep_only(inodes)


def _state(sock: socket.socket) -> int:
    """A ``tcpi_state``, for sockets of any kind: closed as long as something may still be done with it from here."""
    if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM:
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    if sock.family == socket.AF_UNIX:
        try:
            sock.getpeername()
        except OSError:
            return _CLOSED if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) else 0
        return 0
    return _CLOSED
