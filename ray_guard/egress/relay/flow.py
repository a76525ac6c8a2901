"""One relayed connection: two directions, each moved by splice(2) through a pipe. Runs in the mover.

A direction stops where its allowance stops, where its destination takes no more, and where nothing has come. It goes on
when the mover is told that this has changed; nothing is held of an idle one but its two sockets.

How it ends: a FIN is passed on and the other direction stays open; an error on one side, or a cut, resets the other,
*after* what was moved to it before has been taken (a reset right away would throw away bytes that are counted as sent).
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import socket
import struct
import termios
from collections.abc import Callable
from typing import Any, Final, Protocol

from ray_guard.egress.relay.speech import Refused, Verifier
from ray_guard.egress.relay.speech.choice import Speech

_READ: Final = 1 << 16
TURN: Final = 1 << 22
"""Bytes that one direction moves before others have their turn."""
_STREAM: Final = 1 << 17
_F_SETPIPE_SZ, _F_GETPIPE_SZ = 1031, 1032
_PIPE: Final = 1 << 20
_PIPES_KEPT: Final = 64
_FLAGS: Final = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK
_SIOCOUTQ: Final = 0x5411
_RESET: Final = struct.pack("ii", 1, 0)


class Relayed(Protocol):
    """What the mover knows of a connection."""

    number: int
    descriptors: tuple[int, int]
    why: str
    """Why it was cut; empty: it ended by itself."""

    @property
    def closing(self) -> bool:
        """Nothing is moved any more; its sockets are closed as soon as their peers have taken what was."""

    @property
    def parting(self) -> bool:
        """The target's end was told all; it has half a second to go by itself."""

    @property
    def streaming(self) -> bool:
        """It moved much the last time: soon there will be more."""

    @property
    def counts(self) -> tuple[int, int]:
        """Bytes sent and received, as the target sees them."""

    def ready(self, sock: socket.socket, *, readable: bool, writable: bool) -> None:
        """The kernel says that ``sock`` can be read, or takes more."""

    def move(self) -> bool:
        """Moves what can be moved; whether there may be more to move at once."""

    def finish(self) -> None:
        """Its call has ended."""

    def cut(self, why: str) -> None:
        """Ends both sides for a reason; nothing more is moved."""

    def linger(self, *, late: bool) -> bool:
        """While closing: resets the sides whose peer has taken everything (``late``: whose has not, too).

        Whether both are closed now.
        """

    def found(self) -> dict[str, Any]:
        """What was spoken; see :class:`~ray_guard.egress.relay.speech.choice.Speech`."""


class Waiter(Protocol):
    """What asks for an allowance."""

    waits: bool
    """It has asked and not been answered."""

    @property
    def flow(self) -> Relayed: ...


class Allowance(Protocol):
    """How many bytes a direction may still move."""

    left: float

    def want(self, direction: Waiter, need: int) -> None:
        """``need`` bytes wait and none is left: ask for more. Then it is moved on, or :meth:`Relayed.cut`."""

    def moved(self, count: int) -> None:
        """``count`` bytes that were taken from :attr:`left` have been moved."""


class Pipe:
    """Read end, write end and capacity in bytes. Empty pipes are kept for the next that needs one."""

    __slots__ = ("capacity", "read", "write")
    _kept: list[Pipe] = []  # noqa: RUF012 - of this process, which has one thread

    def __init__(self) -> None:
        self.read, self.write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            fcntl.fcntl(self.write, _F_SETPIPE_SZ, _PIPE)
        except OSError:
            pass  # the user has many large ones already: what it is will do
        self.capacity = fcntl.fcntl(self.write, _F_GETPIPE_SZ)

    @classmethod
    def get(cls) -> Pipe:
        return cls._kept.pop() if cls._kept else cls()

    def put(self, *, empty: bool) -> None:
        if empty and len(self._kept) < _PIPES_KEPT:
            self._kept.append(self)
        else:
            os.close(self.read)
            os.close(self.write)


class Direction:
    """Bytes from one socket to the other. ``readable`` and ``writable`` are true until the kernel says otherwise.

    While there is a verifier, what comes is read and handed on as far as that says; then it is spliced.
    """

    __slots__ = (
        *("allowance", "count", "done", "fill", "flow", "out", "pipe"),
        *("readable", "sink", "source", "verifier", "waits", "writable"),
    )

    def __init__(
        self,
        flow: Flow,
        source: socket.socket,
        sink: socket.socket,
        allowance: Allowance,
        verifier: Verifier | None = None,
    ) -> None:
        self.flow = flow
        self.source = source
        self.sink = sink
        self.allowance = allowance
        self.verifier = verifier
        self.readable = self.writable = True
        self.waits = False
        """It has asked for an allowance and not been answered."""
        self.pipe: Pipe | None = None
        self.out = b""
        """Read and verified, to be handed on."""
        self.fill = 0
        """Bytes taken from the source and not handed on, be they in the pipe, in :attr:`out` or with the verifier."""
        self.count = 0
        """Bytes handed on so far."""
        self.done = False
        """The source has ended and the sink has been told."""

    def move(self) -> bool:
        """Moves up to :data:`TURN` bytes; whether there may be more to move at once.

        Raises:
            OSError: a side failed.
            Refused: what is spoken is not what may be.
        """
        turn = TURN
        while not self.done:
            if self.out or (self.fill and self.pipe is not None):
                if not self.writable:
                    return False
                if turn <= 0:
                    return True
                turn -= self._hand_on()
            elif not self.readable or self.waits:
                self._let_go()
                return False
            elif turn <= 0:
                return True
            elif self.allowance.left <= 0:
                self._ask()
            elif self.verifier is not None and not self.verifier.done:
                self._read(self.verifier)
            else:
                self._take()
        return False

    def _hand_on(self) -> int:
        try:
            if self.out:
                moved = self.sink.send(self.out, socket.MSG_NOSIGNAL)
                self.out = self.out[moved:]
            else:
                assert self.pipe is not None  # noqa: S101 - for the type checker
                moved = os.splice(self.pipe.read, self.sink.fileno(), self.fill, flags=_FLAGS)
        except BlockingIOError:
            self.writable = False
            return 0
        self.fill -= moved
        self.count += moved
        self.allowance.moved(moved)
        return moved

    def _read(self, verifier: Verifier) -> None:
        try:
            data = self.source.recv(int(min(self.allowance.left, _READ)))
        except BlockingIOError:
            self.readable = False
            return
        if not data:
            self._end()
            return
        self.allowance.left -= len(data)
        self.fill += len(data)
        self.out = verifier.feed(data)

    def _take(self) -> None:
        if self.pipe is None:
            self.pipe = Pipe.get()
        count = int(min(self.allowance.left, self.pipe.capacity))
        try:
            self.fill = os.splice(self.source.fileno(), self.pipe.write, count, flags=_FLAGS)
        except BlockingIOError:
            self.readable = False
            return
        self.allowance.left -= self.fill
        if self.fill == 0:
            self._end()

    def _ask(self) -> None:
        waiting = readable_bytes(self.source)
        if waiting:
            self.waits = True
            self.allowance.want(self, waiting)
            return
        try:
            if self.source.recv(1, socket.MSG_PEEK) == b"":
                self._end()
        except BlockingIOError:
            self.readable = False

    def _end(self) -> None:
        self.done = True
        self._let_go()
        self._give_back()  # what a verifier still holds is the beginning of something that does not come any more
        try:
            self.sink.shutdown(socket.SHUT_WR)
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise

    def _let_go(self) -> None:
        if self.pipe is not None:
            self.pipe.put(empty=self.fill == 0)
            self.pipe = None

    def stop(self) -> None:
        """Nothing more goes this way: what was taken and not handed on goes back to the allowance."""
        self.done = True
        self._let_go()
        self._give_back()

    def _give_back(self) -> None:
        self.allowance.left += self.fill
        self.fill, self.out = 0, b""


class Flow:
    """See the module.

    Args:
        number: the supervisor's name for it.
        tool: our end of the target's connection.
        upstream: the connection made for it.
        sent, received: allowances of the two directions, as the target sees them.
        speech: who reads along.
        ended: called once, when both sockets are closed.
        tell: what is seen while it is open (:meth:`~ray_guard.egress.relay.speech.choice.Speech.seen`), once each.
    """

    def __init__(
        self,
        number: int,
        tool: socket.socket,
        upstream: socket.socket,
        *,
        sent: Allowance,
        received: Allowance,
        speech: Speech,
        ended: Callable[[Flow], None],
        tell: Callable[[dict[str, Any]], None],
    ) -> None:
        self.number = number
        self.descriptors = (tool.fileno(), upstream.fileno())
        self.tool = tool
        self.upstream = upstream
        self.speech = speech
        self.up = Direction(self, tool, upstream, sent, speech.sent)
        self.down = Direction(self, upstream, tool, received, speech.received)
        self.why = ""
        self._closing = False
        self.finishing = False
        self.streaming = False
        self.parting = False
        self._ended = ended
        self._tell = tell
        self._told: dict[str, Any] | None = None

    @property
    def closing(self) -> bool:
        return self._closing

    @property
    def counts(self) -> tuple[int, int]:
        return self.up.count, self.down.count

    def found(self) -> dict[str, Any]:
        return self.speech.found()

    def ready(self, sock: socket.socket, *, readable: bool, writable: bool) -> None:
        source, sink = (self.up, self.down) if sock is self.tool else (self.down, self.up)
        source.readable = source.readable or readable
        sink.writable = sink.writable or writable

    def move(self) -> bool:
        return not self.closing and self._move()

    def _move(self) -> bool:
        more = False
        before = self.up.count + self.down.count
        for direction in (self.up, self.down):
            try:
                more = direction.move() or more
            except OSError:
                self._break()
                return False
            except Refused as refused:
                self.cut(refused.reason)
                return False
            if self.closing:  # it asked, and was cut
                return False
        seen = self.speech.seen()
        if seen != self._told and seen is not None:
            self._told = seen
            self._tell({"op": "seen", "flow": self.number, **seen})
        self.streaming = self.up.count + self.down.count - before >= _STREAM
        if self.up.done and self.down.done:
            if self.finishing:
                self._break()  # nobody reads the answer: closed with it unread, what is on its way out would be lost
            else:
                self._close()
            return False
        if self.finishing and not more and not self.up.fill and not self.up.waits:
            self.cut("ended")  # nothing was on its way any more, yet the target's end stands open: it outlives its call
            return False
        return more

    def finish(self) -> None:
        """Its call has ended: what its processes had written before still goes out, nothing else does."""
        self.finishing = True
        self.down.stop()

    def cut(self, why: str) -> None:
        if not self.closing:
            self.why = why
            self._break()

    def _break(self) -> None:
        self._closing = True
        self.up.stop()
        self.down.stop()

    def linger(self, *, late: bool) -> bool:
        if not reset_when_taken((self.tool, self.upstream), late=late):
            return False
        self._ended(self)
        return True

    def _close(self) -> None:
        self._closing = True
        self.up.stop()
        self.down.stop()
        self.tool.close()
        self.upstream.close()
        self._ended(self)


def reset_when_taken(socks: tuple[socket.socket, ...], *, late: bool) -> bool:
    """Resets those whose peer has taken everything (``late``: all of them); whether all are closed."""
    for sock in socks:
        if sock.fileno() >= 0 and (late or unsent_bytes(sock) == 0):
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            except OSError:
                pass
            sock.close()
    return all(sock.fileno() < 0 for sock in socks)


def readable_bytes(sock: socket.socket) -> int:
    """Payload bytes that have come and wait to be read."""
    return _ask_count(sock, termios.FIONREAD)


def unsent_bytes(sock: socket.socket) -> int:
    """Payload bytes that the peer has not acknowledged; 0 for a socket that is dead."""
    return _ask_count(sock, _SIOCOUTQ)


def _ask_count(sock: socket.socket, request: int) -> int:
    count = array.array("i", [0])
    try:
        fcntl.ioctl(sock.fileno(), request, count)
    except OSError:
        return 0
    return count[0]
