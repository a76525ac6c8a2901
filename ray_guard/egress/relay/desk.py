"""The desk: flows that are with the mover, and the bytes it may move. Runs in the supervisor.

The mover asks for more as it goes. Where there is no room, what it holds for others and does not need just now is
called back first: a flow is cut only when nothing is left anywhere.
"""

from __future__ import annotations

import itertools
import select
import socket
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from ray_guard.egress.relay.crossing import Crossing, End
from ray_guard.egress.relay.leases import KINDS, Lease
from ray_guard.kernel import seqpacket
from ray_guard.log import logger
from ray_guard.policy.budgets import Account

if TYPE_CHECKING:
    from ray_guard.egress.gate import Waiting

log = logger("ray_guard.relay")

MOVER_LOST: Final = "mover_lost"
_KEEPALIVE: Final = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4))
_SPOKEN: Final = ("ask", "called", "refused", "seen")
Message = dict[str, Any]


class Desk:
    """See the module.

    Args:
        loop: the supervisor's.
        start: starts a mover at the other end of a line.
        gone: told of each flow that has ended.
    """

    def __init__(self, loop: Waiting, start: Callable[[socket.socket], None], gone: Callable[[Crossing], None]) -> None:
        self._loop = loop
        self._start = start
        self._gone = gone
        self._moving: dict[int, Crossing] = {}
        self._numbers = itertools.count(1)
        self._leases: dict[int, Lease] = {}
        self._lease_of: dict[Account, Lease] = {}
        self._line: socket.socket | None = None
        self._outbox: deque[tuple[Message, tuple[socket.socket, ...]]] = deque()
        self._recalling = False
        self._asked: list[Message] = []

    # -- flows ---------------------------------------------------------------------------------------------------------

    def move(self, crossing: Crossing, ours: socket.socket) -> None:
        """Hands both ends of a flow over."""
        ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A target's end that has closed and vanished must not leave its other half standing for ever.
        for option, value in _KEEPALIVE:
            ours.setsockopt(socket.IPPROTO_TCP, option, value)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        lease = crossing.lease = self._lease(crossing.owner.account)
        crossing.moving = True
        self._moving[crossing.number] = crossing
        crossing.owner.relayed(crossing)
        limited = [lease.limited[kind] for kind in KINDS]
        message = {"op": "flow", "flow": crossing.number, "lease": lease.number, "limited": limited}
        self._tell({**message, "speech": crossing.owner.speech}, (ours, crossing.upstream))

    def finish(self, crossing: Crossing) -> None:
        """Its scope has ended: what was on its way still goes out, within half a second."""
        self._tell({"op": "finish", "flow": crossing.number})

    def _ended(self, message: Message) -> None:
        crossing = self._moving.get(message["flow"])
        if crossing is None:
            return
        if message["why"] == "budget" and crossing.lease is not None and crossing.lease.exceeded is not None:
            crossing.owner.over_budget(crossing.lease.exceeded)
        why = "" if message["why"] == "ended" else message["why"]
        spoken = [message.get(each) for each in ("protocol", "verified", "name")]
        self._leave(crossing, End(message["sent"], message["received"], True, why, *spoken))

    def _spoken(self, message: Message) -> None:
        """Whoever reads along on a flow asks its owner, or tells it."""
        crossing = self._moving.get(message["flow"])
        if crossing is not None:
            about = {"op": "answer", "flow": crossing.number}
            crossing.owner.heard(message, lambda answer: self._tell({**answer, **about}))

    def _leave(self, crossing: Crossing, end: End) -> None:
        del self._moving[crossing.number]
        if crossing.lease is not None:
            crossing.lease.flows -= 1
            self._drop(crossing.lease)
        self._gone(crossing)
        crossing.owner.left(crossing, end)

    # -- leases --------------------------------------------------------------------------------------------------------

    def _lease(self, account: Account) -> Lease:
        lease = self._lease_of.get(account)
        if lease is None:
            lease = self._lease_of[account] = Lease(next(self._numbers), account)
            self._leases[lease.number] = lease
            account.on_close(lambda: self._scope_ended(lease))
        lease.flows += 1
        return lease

    def _scope_ended(self, lease: Lease) -> None:
        for crossing in [each for each in self._moving.values() if each.lease is lease]:
            self.finish(crossing)
        self._drop(lease)

    def _drop(self, lease: Lease) -> None:
        if lease.flows == 0 and lease.account.closing:
            self._lease_of.pop(lease.account, None)
            self._leases.pop(lease.number, None)

    def _needed(self, message: Message, *, recalled: bool = False) -> None:
        lease, kind, need = self._leases.get(message["lease"]), message["kind"], message["need"]
        if lease is None:
            return
        answer = {"op": "grant", "lease": lease.number, "kind": kind, "amount": 0}
        took = lease.take(kind, need, message["wish"])
        if isinstance(took, int):
            self._tell({**answer, "amount": took})
        elif not recalled and any(other.out[each] for other in self._leases.values() for each in KINDS):
            self._asked.append(message)
            if not self._recalling:
                self._recalling = True
                self._tell({"op": "recall"})
        else:
            lease.exceeded = took
            self._tell({**answer, "op": "spent"})

    # -- the line ------------------------------------------------------------------------------------------------------

    def _tell(self, message: Message, passed: tuple[socket.socket, ...] = ()) -> None:
        if self._line is None:
            self._start_mover()
        self._outbox.append((message, passed))
        if len(self._outbox) == 1:
            self._send()

    def _start_mover(self) -> None:
        line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._start(theirs)
        line.setblocking(False)
        self._line = line
        self._loop.watch(line.fileno(), select.EPOLLIN, self._ready)

    def _send(self) -> None:
        while self._outbox and self._line is not None:
            message, passed = self._outbox[0]
            try:
                seqpacket.send(self._line, message, [sock.fileno() for sock in passed])
            except BlockingIOError:
                self._loop.forget(self._line.fileno())
                self._loop.watch(self._line.fileno(), select.EPOLLIN | select.EPOLLOUT, self._ready)
                return
            except OSError:
                self._lost()
                return
            self._outbox.popleft()
            for sock in passed:
                sock.close()

    def _ready(self, events: int) -> None:
        line = self._line
        if line is None:
            return
        if events & select.EPOLLOUT:
            self._loop.forget(line.fileno())
            self._loop.watch(line.fileno(), select.EPOLLIN, self._ready)
            self._send()
        if events & ~select.EPOLLOUT and self._line is line:
            self._hear(line)

    def _hear(self, line: socket.socket) -> None:
        try:
            received = seqpacket.receive(line)
        except (BlockingIOError, InterruptedError):
            return
        except (OSError, seqpacket.BadPacket):
            received = None
        if received is None:
            self._lost()
            return
        message, descriptors = received
        seqpacket.close_all(descriptors)
        for number, kind, used, returned in message["books"]:
            lease = self._leases.get(number)
            if lease is not None:
                lease.settle(kind, used, returned)
        operation = message["op"]
        if operation == "need":
            self._needed(message)
        elif operation == "ended":
            self._ended(message)
        elif operation in _SPOKEN:
            self._spoken(message)
        elif operation == "recalled":
            self._recalling = False
            asked, self._asked = self._asked, []
            for each in asked:
                self._needed(each, recalled=True)

    def _lost(self) -> None:
        """The mover has died, and all flows with it. What it had been granted counts as used."""
        line, self._line = self._line, None
        if line is None:
            return
        log.error("the mover is gone, and %d flows with it", len(self._moving))
        self._loop.forget(line.fileno())
        line.close()
        for _, passed in self._outbox:
            for sock in passed:
                sock.close()
        self._outbox.clear()
        self._recalling = False
        self._asked.clear()
        for lease in list(self._leases.values()):
            lease.lost()
        for crossing in list(self._moving.values()):
            self._leave(crossing, End(0, 0, False, MOVER_LOST, None, None, None))

    def close(self) -> None:
        """The supervisor ends: the mover, and with it all flows, does too."""
        if self._line is not None:
            self._loop.forget(self._line.fileno())
            self._line.close()
            self._line = None
