"""The meter: bytes of direct TCP flows, exact at their end, watched while they live. Runs in the supervisor.

Nothing is held of a flow but its cookie. The kernel tells the final counts of every socket that ends (sock_diag
destroy events); while a flow belongs to a scope with a byte cap, one dump per tick tells how far it is. Such a flow is
cut late, by at most its rate times :data:`TICK_S`.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Protocol

from ray_guard.egress.gate import Waiting
from ray_guard.egress.threads import Threads
from ray_guard.kernel import procfs
from ray_guard.kernel.sock_diag import SO_COOKIE, LostEvents, SockDiag
from ray_guard.log import logger

log = logger("ray_guard.meter")

TICK_S: Final = 0.005
"""How often flows under a byte cap are read."""
_SETTLE_S: Final = 1.0
_CUT_AGAIN_S: Final = 0.02
_COLLECT_S: Final = 0.001
"""Delay of reading what has ended; more would blur whose FIN came first (:mod:`ray_guard.kernel.sock_diag`)."""
_TELL_S: Final = 0.004
"""Delay of telling the owners after that: the fewer calls meet with it, the more are told at once."""


class FlowOwner(Protocol):
    """Who is charged for a flow."""

    @property
    def capped(self) -> bool:
        """Whether any scope above the flow limits bytes, so that it must be watched while it lives."""

    def progressed(self, sent: int, received: int) -> bool:
        """``sent`` and ``received`` more payload bytes; False: no room is left, cut it."""

    def ended(self, flow: Flow, *, exact: bool) -> None:
        """The flow's counts are final."""


class Flow:
    """One granted TCP connection of a target.

    Args:
        holder: (thread, descriptor) that made it: the first place to look for it again.
        root: process whose tree may hold the socket by now.

    Attributes:
        local: its own end, known once the kernel has told of it.
    """

    __slots__ = ("address", "cookie", "cut", "holder", "local", "owner", "port", "received", "root", "sent")

    def __init__(  # noqa: PLR0917 - one per connection, made in one place
        self, cookie: int, address: str, port: int, holder: tuple[int, int], owner: FlowOwner, root: int
    ) -> None:
        self.cookie = cookie
        self.address = address
        self.port = port
        self.holder = holder
        self.owner = owner
        self.root = root
        self.local: tuple[str, int] | None = None
        self.sent = 0
        self.received = 0
        self.cut = False


class Meter:
    """All direct flows of the node.

    Args:
        diag: the kernel's counters.
        loop: the supervisor's event loop.
        told: called when the owners of all flows that have ended together were told.
        borrows: the supervisor can take descriptors of its targets; else the processes that hold a flow which has
            passed its cap are killed. (Few can: there what is capped goes by relay, but for the cluster's own flows.)
    """

    def __init__(self, diag: SockDiag, loop: Waiting, told: Callable[[], None], *, borrows: bool = True) -> None:
        self._diag = diag
        self._loop = loop
        self._borrows = borrows
        self._all_told = told
        self._threads = Threads()
        self._ended: list[Flow] = []
        """What the kernel has told of and the owners do not know yet."""
        self.flows: dict[int, Flow] = {}
        """Those that have not ended, by cookie. To be looked into, not changed."""
        self._ticking = False
        loop.watch(diag.fileno(), select.EPOLLIN, lambda _events: self._told())

    def begin(self, flow: Flow) -> None:
        self.flows[flow.cookie] = flow
        if flow.owner.capped and not self._ticking:
            self._ticking = True
            self._loop.later(TICK_S, self._tick)

    def _told(self) -> None:
        """Sockets have ended. They are taken in together, a moment later: calls that wait come first."""
        self._loop.forget(self._diag.fileno())
        self._loop.later(_COLLECT_S, self._collect_late)

    def _collect_late(self) -> None:
        waited_for = bool(self._ended)
        self._read_ended()
        if self._ended and not waited_for:
            self._loop.later(_TELL_S, self._tell)
        self._loop.watch(self._diag.fileno(), select.EPOLLIN, lambda _events: self._told())

    def collect(self) -> None:
        """Settles every flow whose end the kernel has told."""
        self._read_ended()
        self._tell()

    def _read_ended(self) -> None:
        try:
            ended = self._diag.events(self.flows)
        except LostEvents as lost:  # what is left in the queue makes it readable again
            log.warning("destroy events were lost; flows that are gone will be marked inexact")
            self._loop.later(_SETTLE_S, self._audit)
            ended = lost.ended
        for counted in ended:
            flow = self.flows.pop(counted.cookie, None)
            if flow is not None:
                flow.local = counted.local()
                self._advance(flow, counted.sent, counted.received)
                self._ended.append(flow)

    def _tell(self) -> None:
        ended, self._ended = self._ended, []
        for flow in ended:
            flow.owner.ended(flow, exact=True)
        if ended:
            self._all_told()

    def settle(self, cookie: int, sent: int, received: int) -> None:
        """Ends a flow by counts read elsewhere (its socket goes on without it)."""
        flow = self.flows.pop(cookie, None)
        if flow is not None:
            self._advance(flow, sent, received)
            flow.owner.ended(flow, exact=True)
            self._all_told()

    def discard(self, cookie: int) -> None:
        """Forgets a flow that was never established."""
        self.flows.pop(cookie, None)

    def finish(self, flows: Iterable[Flow]) -> None:
        """Cuts flows whose scope has ended; their ends are told by the kernel as any other's."""
        self.collect()
        open_still = [flow for flow in flows if flow.cookie in self.flows]
        if open_still:
            live = self._diag.live()
            for flow in open_still:
                if flow.cookie in live and not flow.cut:
                    self.cut(flow)

    def _advance(self, flow: Flow, sent: int, received: int) -> bool:
        more_sent, more_received = max(0, sent - flow.sent), max(0, received - flow.received)
        flow.sent, flow.received = max(sent, 0), max(received, 0)
        return flow.owner.progressed(more_sent, more_received) if more_sent or more_received else True

    def _tick(self) -> None:
        if not any(flow.owner.capped for flow in self.flows.values()):
            self._ticking = False
            return
        self._read_live()
        self._loop.later(TICK_S, self._tick)

    def _read_live(self) -> None:
        live = self._diag.live()
        for flow in list(self.flows.values()):
            counted = live.get(flow.cookie)
            if counted is None:
                continue
            if flow.local is None:
                flow.local = counted.local()
            if not self._advance(flow, counted.sent, counted.received) and not flow.cut:
                if self._borrows:
                    self.cut(flow)
                else:
                    self._kill_holders(flow)

    def _audit(self) -> None:
        """After lost events: what is neither live nor ended is charged what was last seen, and marked."""
        live = self._diag.live()
        for flow in list(self.flows.values()):
            if flow.cookie not in live:
                del self.flows[flow.cookie]
                flow.owner.ended(flow, exact=False)
        self._all_told()

    # -- cutting -------------------------------------------------------------------------------------------------------

    def cut(self, flow: Flow) -> bool:
        """Shuts the flow's socket down, wherever in the tree it is held by now; False: it was not found."""
        started = time.monotonic()
        flow.cut = True
        if self._shut_down(flow, *flow.holder):
            return True
        # The first holder has died or handed it on.
        inode = self._diag.inode(flow.cookie)
        if any(self._shut_down(flow, pid, held) for pid, held in self._holders(flow, inode)):
            return True
        log.warning("flow %d to %s:%d was not found (%.1f ms)", flow.cookie, flow.address, flow.port,
                    1e3 * (time.monotonic() - started))  # fmt: skip
        if inode and flow.cookie in self.flows:  # on its way from one process to another
            self._loop.later(_CUT_AGAIN_S, lambda: self._cut_again(flow))
        return False

    @staticmethod
    def _holders(flow: Flow, inode: int) -> Iterator[tuple[int, int]]:
        """(process, descriptor) of those that hold the socket: its target's tree first, then an orphan of no tree."""
        if inode:
            for pid in (flow.root, *procfs.descendants(flow.root), *procfs.processes()):
                held = procfs.sockets_of(pid).get(inode)
                if held is not None:
                    yield pid, held

    def _kill_holders(self, flow: Flow) -> None:
        """Nothing else ends a flow whose descriptor cannot be taken."""
        inode = self._diag.inode(flow.cookie)
        for pid, held in self._holders(flow, inode):
            try:
                pidfd = os.pidfd_open(pid)
            except OSError:
                continue
            try:
                if pid != os.getpid() and os.readlink(f"/proc/{pid}/fd/{held}") == f"socket:[{inode}]":
                    log.warning("process %d is killed: its flow to %s:%d cannot be cut", pid, flow.address, flow.port)
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            except OSError:
                pass  # it has ended
            finally:
                os.close(pidfd)

    def _cut_again(self, flow: Flow) -> None:
        if flow.cookie in self.flows:
            self.cut(flow)

    def _shut_down(self, flow: Flow, pid: int, number: int) -> bool:
        duplicate = self._threads.descriptor(pid, number)
        if duplicate < 0:
            return False
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=duplicate) as sock:
                (cookie,) = struct.unpack("=Q", sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8))
                if cookie != flow.cookie:
                    return False
                # Discard what is queued: after the cut nothing may follow, not even what was accepted before it.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return False
        return True
