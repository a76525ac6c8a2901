"""The mover: a helper process of the supervisor that moves relayed bytes. Runs in the mover, a child of the zygote.

It decides nothing: every byte it moves was reserved by the supervisor (:mod:`ray_guard.egress.relay.leases`), which it
asks for more as it goes, and told how many were used. It lives and dies with the line to the supervisor; its end closes
all flows. Messages are those of :mod:`ray_guard.kernel.seqpacket`:

    supervisor → mover   flow (with two sockets) · grant · spent · recall · finish · cut · answer
    mover → supervisor   need · ended · recalled · usage · seen · ask · refused · called; each with ``books``:
                         [lease, kind, used, returned] …
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import select
import signal
import socket
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final, NoReturn

from ray_guard.egress.relay.flow import Flow, Relayed, Waiter
from ray_guard.egress.relay.speech.choice import Speech
from ray_guard.kernel import libc, seqpacket
from ray_guard.policy.budgets import RECEIVED, SENT

if TYPE_CHECKING:
    from ray_guard.egress.relay.model.flow import ModelFlow, Shared

_TELL_S: Final = 0.1
"""How often usage is told while bytes flow; an allowance that lay idle so long goes back."""
_LINGER_STEP_S: Final = 0.005
_LINGER_S: Final = 0.5
FINISH_S: Final = 0.5
"""How long after its call what was written before may still go out."""
_GATHER_S: Final = 0.00015
"""While a flow streams, how long bytes gather first: waking for every segment costs more than moving it."""
_FIRST_WISH: Final = 1 << 16
_LAST_WISH: Final = 1 << 23
_EVENTS: Final = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET
_READ: Final = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_WRITE: Final = select.EPOLLOUT | select.EPOLLHUP | select.EPOLLERR
_UNLIMITED: Final = float("inf")


def run(line: socket.socket) -> NoReturn:
    """The mover's life, until the supervisor hangs up."""
    libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)  # the zygote's death: the supervisor ends with it
    libc.prctl(libc.PR_SET_DUMPABLE, 0)
    name = ctypes.create_string_buffer(b"ray-guard-mover")
    libc.prctl(libc.PR_SET_NAME, ctypes.addressof(name))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    gc.freeze()
    Mover(line).run()
    os._exit(0)


class Pool:
    """What all flows of one scope may move in one direction: their :class:`~ray_guard.egress.relay.flow.Allowance`."""

    def __init__(self, mover: Mover, lease: int, kind: str, *, limited: bool) -> None:
        self._mover = mover
        self._lease = lease
        self._kind = kind
        self._limited = limited
        self.left = 0.0 if limited else _UNLIMITED
        self._used = 0
        self._asked = False
        self._wish = _FIRST_WISH
        self._waiting: list[tuple[Waiter, int]] = []
        self.moving = False
        """Bytes were moved since usage was last told."""

    def want(self, direction: Waiter, need: int) -> None:
        self._waiting.append((direction, need))
        if not self._asked:
            self._ask()

    def moved(self, count: int) -> None:
        self._used += count
        if not self.moving:
            self.moving = True
            self._mover.busy(self)
        if self._limited and not self._asked and self.left < self._wish // 2:
            self._ask()  # ahead of need, so that a fast flow does not stop for the answer

    def _ask(self) -> None:
        self._asked = True
        need = max((need for _, need in self._waiting), default=0)
        self._mover.tell({"op": "need", "lease": self._lease, "kind": self._kind, "need": need, "wish": self._wish},
                         [self.book()])  # fmt: skip
        self._wish = min(2 * self._wish, _LAST_WISH)

    def granted(self, amount: int) -> None:
        self._asked = False
        self.left += amount
        waiting, self._waiting = self._waiting, []
        if amount == 0 and waiting:  # the question was asked before they came
            self._waiting = waiting
            self._ask()
            return
        for direction, _ in waiting:
            direction.waits = False
            self._mover.schedule(direction.flow)

    def spent(self) -> None:
        """There is no room: whoever has bytes waiting is over the budget."""
        self._asked = False
        waiting, self._waiting = self._waiting, []
        for direction, _ in waiting:
            self._mover.cut(direction.flow, "budget")

    def book(self, *, give_back: bool = False) -> list[Any]:
        """[lease, kind, bytes used since the last time, bytes given back]."""
        returned = 0
        if give_back and self._limited:
            returned, self.left, self._wish = int(self.left), 0.0, _FIRST_WISH
        used, self._used = self._used, 0
        return [self._lease, self._kind, used, returned]


class Mover:
    """See the module."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._epoll = select.epoll()
        self._epoll.register(line, select.EPOLLIN)
        self._sockets: dict[int, tuple[Relayed, socket.socket]] = {}
        self._flows: dict[int, Relayed] = {}
        self._pools: dict[tuple[int, str], Pool] = {}
        self._members: dict[int, int] = {}
        """How many flows each lease has."""
        self._leases: dict[int, int] = {}
        self._models: dict[int, ModelFlow] = {}
        self._shared: Shared | None = None
        self._ready: deque[Relayed] = deque()
        self._queued: set[Relayed] = set()
        self._closing: dict[Relayed, float] = {}
        self._finishing: dict[Relayed, float] = {}
        self._busy: list[Pool] = []
        self._tell_at = _UNLIMITED
        self._gather = False
        self._open = True

    def run(self) -> None:
        """Until the supervisor hangs up."""
        while self._open:
            if self._gather and not self._ready:
                time.sleep(_GATHER_S)
            self._gather = False
            for descriptor, events in self._epoll.poll(self._timeout()):
                if descriptor == self._line.fileno():
                    self._hear()
                else:
                    self._woken(descriptor, events)
            for _ in range(len(self._ready)):
                flow = self._ready.popleft()
                self._queued.discard(flow)
                self._move(flow)
            now = time.monotonic()
            self._sweep(now)
            if now >= self._tell_at:
                self._tell_usage(now)

    def _timeout(self) -> float:
        if self._ready:
            return 0
        if self._closing or self._finishing:
            return _LINGER_STEP_S
        return -1 if self._tell_at == _UNLIMITED else max(0.0, self._tell_at - time.monotonic())

    # -- flows ---------------------------------------------------------------------------------------------------------

    def _woken(self, descriptor: int, events: int) -> None:
        found = self._sockets.get(descriptor)
        if found is not None:  # an earlier event of this round may have closed it
            flow, sock = found
            flow.ready(sock, readable=bool(events & _READ), writable=bool(events & _WRITE))
            self.schedule(flow)

    def schedule(self, flow: Relayed) -> None:
        if flow not in self._queued:
            self._queued.add(flow)
            self._ready.append(flow)

    def _move(self, flow: Relayed) -> None:
        try:
            if flow.move():
                self.schedule(flow)
            self._gather = self._gather or flow.streaming
        except Exception as fault:  # noqa: BLE001 - one flow's trouble must not end the others
            self.cut(flow, f"{type(fault).__name__}: {fault}")
        if flow.closing and flow.number in self._flows:
            self._closing.setdefault(flow, time.monotonic() + _LINGER_S)
        elif flow.parting:
            self._finishing.setdefault(flow, time.monotonic() + FINISH_S)

    def cut(self, flow: Relayed, why: str) -> None:
        flow.cut(why)
        self.schedule(flow)

    def _sweep(self, now: float) -> None:
        for flow, deadline in list(self._finishing.items()):
            if now >= deadline and not flow.closing:
                self.cut(flow, "ended")
                self._closing.setdefault(flow, now)
        for flow, deadline in list(self._closing.items()):
            flow.linger(late=now >= deadline)

    def _ended(self, flow: Relayed) -> None:
        for descriptor in flow.descriptors:  # closed, they have left the epoll set; the number may be another's by now
            if self._sockets.get(descriptor, (None,))[0] is flow:
                del self._sockets[descriptor]
        del self._flows[flow.number]
        self._models.pop(flow.number, None)
        self._closing.pop(flow, None)
        self._finishing.pop(flow, None)
        lease = self._leases.pop(flow.number)
        self._members[lease] -= 1
        last = self._members[lease] == 0
        books = [self._pools[lease, kind].book(give_back=last) for kind in (SENT, RECEIVED)]
        if last:
            del self._members[lease]
            for kind in (SENT, RECEIVED):
                del self._pools[lease, kind]
        sent, received = flow.counts
        self.tell({"op": "ended", "flow": flow.number, "sent": sent, "received": received,
                   "why": flow.why, **flow.found()}, books)  # fmt: skip

    # -- the supervisor ------------------------------------------------------------------------------------------------

    def tell(self, message: dict[str, Any], books: list[list[Any]]) -> None:
        try:
            seqpacket.send(self._line, {**message, "books": books})
        except OSError:
            self._open = False

    def busy(self, pool: Pool) -> None:
        self._busy.append(pool)
        if self._tell_at == _UNLIMITED:
            self._tell_at = time.monotonic() + _TELL_S

    def _tell_usage(self, now: float) -> None:
        busy, self._busy = self._busy, []
        books = []
        for pool in self._pools.values():
            if pool.moving or pool.left:
                books.append(pool.book(give_back=not pool.moving))
            pool.moving = False
        books = [book for book in books if book[2] or book[3]]
        if books:
            self.tell({"op": "usage"}, books)
        self._tell_at = now + _TELL_S if busy else _UNLIMITED

    def _hear(self) -> None:
        while self._open:
            try:
                received = seqpacket.receive(self._line, socket.MSG_DONTWAIT)
            except (BlockingIOError, InterruptedError):
                return
            except (OSError, seqpacket.BadPacket):
                received = None
            if received is None:
                self._open = False
                return
            self._obey(*received)

    def _obey(self, message: dict[str, Any], descriptors: list[int]) -> None:
        operation = message["op"]
        if operation == "flow":
            self._begin(message, *(socket.socket(fileno=descriptor) for descriptor in descriptors))
        elif operation == "recall":
            books = [pool.book(give_back=True) for pool in self._pools.values()]
            self.tell({"op": "recalled"}, [book for book in books if book[2] or book[3]])
        elif operation in ("grant", "spent"):
            pool = self._pools.get((message["lease"], message["kind"]))
            if pool is None:  # its last flow has ended meanwhile
                if operation == "grant":
                    self.tell({"op": "usage"}, [[message["lease"], message["kind"], 0, message["amount"]]])
            elif operation == "grant":
                pool.granted(message["amount"])
            else:
                pool.spent()
        else:
            flow = self._flows.get(message["flow"])
            if flow is None or flow.closing:
                return
            if operation == "answer" and flow.number in self._models:
                self._models[flow.number].answered(message)
                self.schedule(flow)
            elif operation == "finish":
                flow.finish()
                self._finishing[flow] = time.monotonic() + FINISH_S
                self.schedule(flow)
            else:
                self.cut(flow, str(message["why"]))

    def _begin(self, message: dict[str, Any], tool: socket.socket, upstream: socket.socket) -> None:
        lease = message["lease"]
        for kind, limited in zip((SENT, RECEIVED), message["limited"], strict=True):
            if (lease, kind) not in self._pools:
                self._pools[lease, kind] = Pool(self, lease, kind, limited=limited)
        sent, received = self._pools[lease, SENT], self._pools[lease, RECEIVED]
        if "model" in message["speech"]:
            flow = self._model(message, tool, upstream, sent, received)
        else:
            speech = Speech(message["speech"])
            flow = Flow(
                message["flow"],
                tool,
                upstream,
                sent=sent,
                received=received,
                speech=speech,
                ended=self._ended,
                tell=lambda said: self.tell(said, []),
            )
        self._flows[flow.number] = flow
        self._leases[flow.number] = lease
        self._members[lease] = self._members.get(lease, 0) + 1
        for sock in (tool, upstream):
            sock.setblocking(False)
            self._sockets[sock.fileno()] = (flow, sock)
            self._epoll.register(sock, _EVENTS)
        self.schedule(flow)

    def _model(
        self, message: dict[str, Any], tool: socket.socket, upstream: socket.socket, sent: Pool, received: Pool
    ) -> Relayed:
        """A connection to a model endpoint."""
        from ray_guard.egress.relay.model.flow import ModelFlow, Shared  # most movers never have one

        if self._shared is None:
            self._shared = Shared()
        told, number = message["speech"]["model"], message["flow"]
        flow = self._models[number] = ModelFlow(
            number,
            tool,
            upstream,
            self._shared.dialogue(told),
            sent=sent,
            received=received,
            tell=lambda said: self.tell(said, []),
            shared=self._shared,
            ended=self._ended,
        )
        return flow
