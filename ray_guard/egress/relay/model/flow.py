"""A connection to the model endpoint, with sockets: read, written and ended as its dialogue says. Runs in the mover.

As :class:`~ray_guard.egress.relay.flow.Flow` is to the mover, but that its bytes are not moved: they are read, and
others are written. What is counted is what is written: to the engine as sent, to the tool as received.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, Final

from ray_guard.egress.relay.flow import Allowance, reset_when_taken
from ray_guard.egress.relay.model.dialogue import Catalogue, Dialogue

_READ: Final = 1 << 16
_TURN: Final = 1 << 20
HELD_LIMIT: Final = 128 << 20
"""Bytes that all these connections hold together."""


class Shared:
    """What all connections to model endpoints have in common: how many bytes they hold, what servers said."""

    def __init__(self) -> None:
        self.held = 0
        self._catalogues: dict[str, Catalogue] = {}

    def dialogue(self, told: dict[str, Any]) -> Dialogue:
        return Dialogue(told, self._catalogues.setdefault(str(told["authority"]), Catalogue()))


class Outlet:
    """One socket that is written to, as far as its allowance goes."""

    def __init__(self, flow: ModelFlow, sink: socket.socket, data: bytearray, allowance: Allowance) -> None:
        self.flow = flow
        self.sink = sink
        self.data = data
        self.allowance = allowance
        self.writable = True
        self.waits = False
        """It has asked for an allowance and not been answered."""
        self.count = 0

    def write(self) -> None:
        """Raises OSError: the other side is gone."""
        while self.data and self.writable and not self.waits:
            if self.allowance.left < 1:
                self.waits = True
                self.allowance.want(self, len(self.data))
                return
            try:
                moved = self.sink.send(self.data[: int(min(self.allowance.left, _READ))], socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self.writable = False
                return
            del self.data[:moved]
            self.count += moved
            self.allowance.left -= moved
            self.allowance.moved(moved)


class ModelFlow:
    """See the module.

    Args:
        number, tool, upstream, sent, received, ended: as of a :class:`~ray_guard.egress.relay.flow.Flow`.
        dialogue: what is spoken.
        tell: takes a message for the supervisor.
        shared: of all connections of this kind.
    """

    streaming = False

    def __init__(
        self,
        number: int,
        tool: socket.socket,
        upstream: socket.socket,
        dialogue: Dialogue,
        *,
        sent: Allowance,
        received: Allowance,
        tell: Callable[[dict[str, Any]], None],
        shared: Shared,
        ended: Callable[[ModelFlow], None],
    ) -> None:
        self.number = number
        self.descriptors = (tool.fileno(), upstream.fileno())
        self.tool = tool
        self.upstream = upstream
        self._dialogue = dialogue
        self.up = Outlet(self, upstream, dialogue.to_engine, sent)
        self.down = Outlet(self, tool, dialogue.to_tool, received)
        self._readable = {tool: True, upstream: True}
        self._tell = tell
        self._answer: dict[str, Any] | None = None
        self._shared = shared
        self._holds = 0
        self.why = ""
        self._closing = False
        self.parting = False
        """The client was answered for the last time. What it still sends is taken: a reset would cost it the answer."""
        self._ended = ended

    def ready(self, sock: socket.socket, *, readable: bool, writable: bool) -> None:
        """The kernel says that ``sock`` can be read, or takes more."""
        outlet = self.down if sock is self.tool else self.up
        self._readable[sock] = self._readable[sock] or readable
        outlet.writable = outlet.writable or writable

    @property
    def closing(self) -> bool:
        return self._closing

    @property
    def counts(self) -> tuple[int, int]:
        """Bytes sent and received, as the target sees them."""
        return self.up.count, self.down.count

    def found(self) -> dict[str, Any]:
        """As of a :class:`~ray_guard.egress.relay.speech.choice.Speech`."""
        return {"protocol": "http", "verified": True, "name": None}

    def move(self) -> bool:
        """Reads and writes what can be; whether there may be more at once."""
        return not self.closing and self._move()

    def _move(self) -> bool:
        try:
            answer, self._answer = self._answer, None
            if answer is not None:
                self._dialogue.answered(answer)
            if self._hears_tool:
                self._read(self.tool, self._from_tool)
            if self._hears_engine and not self.closing:
                self._read(self.upstream, self._from_engine)
            self._say()
            self.up.write()
            self.down.write()
        except OSError:
            self._break()
        if self.closing:
            return False
        self._hold(self._dialogue.size)
        if self._dialogue.closing:
            self._part()
            return False
        return self._hears_tool or self._hears_engine

    @property
    def _hears_tool(self) -> bool:
        return self._readable[self.tool] and self._dialogue.hears_tool

    @property
    def _hears_engine(self) -> bool:
        return self._readable[self.upstream] and self._dialogue.hears_engine

    def _read(self, sock: socket.socket, take: Callable[[bytes], None]) -> None:
        try:
            data = sock.recv(_READ)
        except BlockingIOError:
            self._readable[sock] = False
            return
        if not data:
            self._readable[sock] = False
        take(data)

    def _from_tool(self, data: bytes) -> None:
        if data:
            self._dialogue.from_tool(data)
            return
        if self._dialogue.tool_ended():
            self._break()
        elif not self._dialogue.to_tool:
            self._close()

    def _from_engine(self, data: bytes) -> None:
        if data:
            self._dialogue.from_engine(data)
        else:
            self._dialogue.engine_ended()

    def answered(self, answer: dict[str, Any]) -> None:
        """The supervisor has answered what was asked; :meth:`move` takes it from there."""
        self._answer = answer

    def _say(self) -> None:
        messages, self._dialogue.messages = self._dialogue.messages, []
        for message in messages:
            self._tell({**message, "flow": self.number})

    def _hold(self, size: int) -> None:
        self._shared.held += size - self._holds
        self._holds = size
        if self._shared.held > HELD_LIMIT and size > _TURN and not self.closing:
            self._dialogue.refuse_busy()
            self._say()

    def _part(self) -> None:
        """The last answer is on its way: the client gets all of it, then the connection ends."""
        if self.down.data:
            return
        if not self.parting:
            self.parting = True
            self.upstream.close()
            self._readable[self.upstream] = False
            self.up.data.clear()
            try:
                self.tool.shutdown(socket.SHUT_WR)
            except OSError:
                self._break()
                return
        try:
            while self._readable[self.tool]:
                if not self.tool.recv(_READ):
                    self._close()
                    return
        except BlockingIOError:
            self._readable[self.tool] = False
        except OSError:
            self._break()

    def finish(self) -> None:
        """Its call has ended: nobody reads the answer."""
        self.cut("ended")

    def cut(self, why: str) -> None:
        """Ends both sides for a reason; a client that was answered for the last time still gets what is on its way."""
        if self.parting:
            self._close()
        elif not self.closing:
            self.why = why
            self._break()

    def _break(self) -> None:
        self._dialogue.abandon()
        self._say()
        self._closing = True
        self._hold(0)

    def _close(self) -> None:
        """Both sides have been told everything."""
        self._break()
        self.tool.close()
        self.upstream.close()

    def linger(self, *, late: bool) -> bool:
        """As of a :class:`~ray_guard.egress.relay.flow.Flow`."""
        if not reset_when_taken((self.tool, self.upstream), late=late):
            return False
        self._ended(self)
        return True
