"""The leaders that wait for a start, each with a thread that is ready to start a tool. Runs in the supervisor.

The zygote forks them; from then on each talks to the supervisor alone, over its own line. They are kept and used again:
there are as many as there were calls at once, a few of them idle, and none before the first start.
"""

from __future__ import annotations

import os
import select
import socket
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from ray_guard.kernel import seqpacket
from ray_guard.named import NamedTuple
from ray_guard.supervisor.loop import Loop

SPARE: Final = 8
"""How many idle leaders are kept."""


class Fit(NamedTuple):
    """Which calls a leader can serve: what it has mounted and which filter its tools have are for good."""

    covers: tuple[tuple[object, ...], ...] = ()
    """See :mod:`ray_guard.supervisor.mounts`."""
    gpu: bool = False


Heard = Callable[[dict[str, Any] | None, list[int]], None]
"""Called with each message of a leader, its descriptors the callee's; None: the leader is lost."""


class Leader:
    """One leader, from its fork to its end.

    Attributes:
        pid: its own.
        leaf: the folder of the control group that it is in, and with it what it starts; empty: none of its own.
        listener: where the notifications of its next tool arrive; for its taker to close.
        fault: why nothing can be started here; empty: it is ready.
        heard: set by whoever has taken it.
    """

    def __init__(self, leaders: Leaders, line: socket.socket, fit: Fit) -> None:
        self._leaders = leaders
        self.fit = fit
        self._line = line
        self._embryo: socket.socket | None = None
        self._started = True
        self.fresh = True
        self.pid = 0
        self.leaf = ""
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

    def prepare(self, descriptors: Sequence[int], *, joins: bool) -> bool:
        """Says what the tool will be: [memory file, view, working folder, its own …]; False: the leader has died.

        It is not executed before its notification is answered.

        Args:
            joins: the last descriptor is the entrance of a control group for it.
        """
        if self._embryo is None:
            return False
        try:
            seqpacket.send(self._embryo, {"op": "prepare", "joins": joins}, descriptors)
        except OSError:
            return False
        self.cancel()
        return True

    def start(self, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
        """Tells the leader what it is to lead."""
        self._started = True
        self.tell({**message, "op": "start"}, descriptors)

    def announce(self, group: int) -> bool:
        """Tells the leader of a process group; False: it could not be told now."""
        try:
            seqpacket.send(self._line, {"op": "group", "number": group}, flags=socket.MSG_DONTWAIT)
        except OSError:
            return False
        return True

    def cancel(self) -> None:
        """What was not prepared will not be started."""
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

    def ready(self, _events: int) -> None:
        """The loop's callback."""
        self.receive()

    def receive(self) -> bool:
        """Takes in a message of its line; False: there is none."""
        try:
            received = seqpacket.receive(self._line, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except (OSError, seqpacket.BadPacket):
            received = None
        if received is None:
            heard = self.heard
            self.drop()
            if heard is not None:
                heard(None, [])
            return True
        message, descriptors = received
        if message.get("op") == "ready":
            embryo, self.listener = descriptors
            self._embryo = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, embryo)
            self.pid = int(message["pid"])
            self.leaf = str(message["leaf"])
            self._started = False
            self._leaders.ready(self)
        elif message.get("op") == "unfit":
            self.fault = message
            self._leaders.ready(self)
        elif self.heard is not None:
            self.heard(message, descriptors)
        return True


class Leaders:
    """All leaders of this supervisor.

    Args:
        ask: has one more forked; gives the line to it.
        made: lines to those that were asked for already, for calls that need nothing special.
    """

    def __init__(self, loop: Loop, ask: Callable[[Fit], socket.socket], made: Sequence[socket.socket] = ()) -> None:
        self._loop = loop
        self._ask = ask
        self._idle: list[Leader] = []
        self._made: Counter[Fit] = Counter()
        self._waiting: deque[tuple[Fit, Use]] = deque()
        for line in made:
            self._adopt(line, Fit())

    def take(self, fit: Fit, use: Use) -> None:
        """Calls ``use`` with a leader: at once where one is idle, else as soon as one is ready; None: none can be."""
        for leader in self._idle[::-1]:
            if leader.fit == fit:
                self._idle.remove(leader)
                use(leader)
                return
        self._waiting.append((fit, use))
        if self._made[fit] < sum(wanted == fit for wanted, _ in self._waiting):
            self._adopt(self._ask(fit), fit)

    def _adopt(self, line: socket.socket, fit: Fit) -> None:
        leader = Leader(self, line, fit)
        self._made[fit] += 1
        self._loop.watch(line.fileno(), select.EPOLLIN, leader.ready)

    def ready(self, leader: Leader) -> None:
        """``leader`` is ready, or says why it cannot be."""
        self._is_made(leader)
        use = self._next(leader.fit)
        if use is not None:
            use(leader)
        elif leader.fault:
            leader.drop()
        else:
            self._idle.append(leader)
            if len(self._idle) > SPARE:
                self._idle[0].drop()

    def forget(self, leader: Leader) -> None:
        """``leader`` is gone, or let go."""
        self._loop.forget(leader.fileno())
        if leader in self._idle:
            self._idle.remove(leader)
        if self._is_made(leader):
            use = self._next(leader.fit)
            if use is not None:  # it was made for this one: no more processes can be had
                use(None)

    def _is_made(self, leader: Leader) -> bool:
        """Whether ``leader`` was on its way until now."""
        fresh, leader.fresh = leader.fresh, False
        if fresh:
            self._made[leader.fit] -= 1
            if not self._made[leader.fit]:
                del self._made[leader.fit]
        return fresh

    def _next(self, fit: Fit) -> Use | None:
        """Who has waited longest for a leader like that."""
        for at, (wanted, use) in enumerate(self._waiting):
            if wanted == fit:
                del self._waiting[at]
                return use
        return None


Use = Callable[[Leader | None], None]
"""Takes a leader; None: there can be none."""
