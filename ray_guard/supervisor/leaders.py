"""The leaders that wait for a start, each with a process that is ready to become a tool. Runs in the supervisor.

The zygote forks them; from then on each talks to the supervisor alone, over its own line. They are kept and used again:
there are as many as there were calls at once, a few of them idle, and none before the first start.
"""

from __future__ import annotations

import os
import select
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from ray_guard.kernel import seqpacket
from ray_guard.supervisor.loop import Loop

SPARE: Final = 8
"""How many idle leaders are kept."""

Heard = Callable[[dict[str, Any] | None, list[int]], None]
"""Called with each message of a leader, its descriptors the callee's; None: the leader is lost."""


class Leader:
    """One leader, from its fork to its end.

    Attributes:
        pid: of the process that is ready to become a tool.
        listener: where that process's notifications arrive; for its taker to close.
        fault: why no process can be made ready here; empty: one is.
        heard: set by whoever has taken it.
    """

    def __init__(self, leaders: Leaders, line: socket.socket) -> None:
        self._leaders = leaders
        self._line = line
        self._embryo: socket.socket | None = None
        self._started = True
        self.fresh = True
        self.pid = 0
        self.listener = -1
        self.fault: dict[str, Any] = {}
        self.heard: Heard | None = None

    def fileno(self) -> int:
        return self._line.fileno()

    def tell(self, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
        """Tells the leader. One that is gone says so itself."""
        try:
            seqpacket.send(self._line, message, descriptors)
        except OSError:
            pass

    def prepare(self, message: dict[str, Any], descriptors: Sequence[int]) -> bool:
        """Tells the process that is ready what it will be; False: it has died while it waited."""
        return self._tell_embryo(message, descriptors)

    def go(self) -> None:
        """Lets it become the tool. Should it have ended, its leader says so."""
        self._tell_embryo({"op": "go"})
        self.cancel()

    def start(self, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
        """Tells the leader what it is to lead. The tool does not wait for that, so :meth:`go` comes first."""
        self._started = True
        self.tell({**message, "op": "start"}, descriptors)

    def _tell_embryo(self, message: dict[str, Any], descriptors: Sequence[int] = ()) -> bool:
        if self._embryo is None:
            return False
        try:
            seqpacket.send(self._embryo, message, descriptors)
        except OSError:
            return False
        return True

    def cancel(self) -> None:
        """Without :meth:`go` the process ends here."""
        if self._embryo is not None:
            self._embryo.close()
            self._embryo = None

    def release(self) -> None:
        """What it did is taken in (or of no interest any more: then it ends that first). It may serve again."""
        self.heard = None
        self.cancel()
        if not self._started:
            self.start({})
        self.tell({"op": "again"})

    def drop(self) -> None:
        """It is of no use any more: it ends when its line closes, and with it what it holds ready."""
        self.heard = None
        self._leaders.forget(self)
        self.cancel()
        if self.listener >= 0:
            os.close(self.listener)
            self.listener = -1
        self._line.close()

    def receive(self) -> None:
        """Takes in one message of its line."""
        try:
            received = seqpacket.receive(self._line)
        except (OSError, seqpacket.BadPacket):
            received = None
        if received is None:
            heard = self.heard
            self.drop()
            if heard is not None:
                heard(None, [])
            return
        message, descriptors = received
        if message.get("op") == "ready":
            embryo, self.listener = descriptors
            self._embryo = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, embryo)
            self.pid = int(message["pid"])
            self._started = False
            self._leaders.ready(self)
        elif message.get("op") == "unfit":
            self.fault = message
            self._leaders.ready(self)
        elif self.heard is not None:
            self.heard(message, descriptors)


class Leaders:
    """All leaders of this supervisor.

    Args:
        ask: has one more forked; gives the line to it.
        made: lines to those that were asked for already.
    """

    def __init__(self, loop: Loop, ask: Callable[[], socket.socket], made: Sequence[socket.socket] = ()) -> None:
        self._loop = loop
        self._ask = ask
        self._idle: list[Leader] = []
        self._made = 0
        self._waiting: deque[Callable[[Leader | None], None]] = deque()
        for line in made:
            self._adopt(line)

    def take(self, use: Callable[[Leader | None], None]) -> None:
        """Calls ``use`` with a leader: at once where one is idle, else as soon as one is ready; None: none can be."""
        if self._idle:
            use(self._idle.pop())
            return
        self._waiting.append(use)
        if self._made < len(self._waiting):
            self._adopt(self._ask())

    def _adopt(self, line: socket.socket) -> None:
        leader = Leader(self, line)
        self._made += 1
        self._loop.watch(line.fileno(), select.EPOLLIN, lambda _events: leader.receive())

    def ready(self, leader: Leader) -> None:
        """``leader`` has a process ready, or says why it has none."""
        if leader.fresh:
            leader.fresh = False
            self._made -= 1
        if self._waiting:
            self._waiting.popleft()(leader)
        elif leader.fault or len(self._idle) >= SPARE:
            leader.drop()
        else:
            self._idle.append(leader)

    def forget(self, leader: Leader) -> None:
        """``leader`` is gone, or let go."""
        self._loop.forget(leader.fileno())
        if leader in self._idle:
            self._idle.remove(leader)
        if leader.fresh:
            leader.fresh = False
            self._made -= 1
            if self._waiting:  # it was made for this one: no more processes can be had
                self._waiting.popleft()(None)
