"""The supervisor's service: accepts targets until there have been none for a while. Runs in the supervisor."""

from __future__ import annotations

import gc
import os
import resource
import select
import socket
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from ray_guard.kernel import libc, rendezvous
from ray_guard.log import logger
from ray_guard.supervisor import leaf, memory_group, to_zygote
from ray_guard.supervisor.care import Care
from ray_guard.supervisor.leaders import Leaders
from ray_guard.supervisor.loop import Loop
from ray_guard.supervisor.node import Node
from ray_guard.supervisor.session import Session

log = logger("ray_guard.supervisor")

LINGER_S: Final = 2.0
"""How long a supervisor without targets waits for the next one."""
_FIRST_LINE_S: Final = 0.5
"""When the log's first line is written, and what writes it is loaded: not before the first call has begun."""
SWEEP_S: Final = 1.0
"""When what earlier ones have left is looked for: nobody's first call waits for that."""


def serve(descriptor: int, starts: socket.socket, zygote_pid: int, leaders: Sequence[socket.socket]) -> None:
    """Runs the supervisor on the listening socket ``descriptor`` until its last target has gone.

    Args:
        starts: where the zygote takes starts.
        zygote_pid: the zygote itself: without it there is nothing to supervise.
        leaders: lines to those that were asked for already.
    """
    libc.prctl(libc.PR_SET_DUMPABLE, 0)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    loop = Loop()
    pool = Leaders(loop, lambda fit: to_zygote.ask_for_leader(starts, fit.covers, gpu=fit.gpu), leaders)
    node = Node(loop, (rendezvous.folder(),), pool)
    listener = socket.socket(fileno=descriptor)
    loop.later(_FIRST_LINE_S, lambda: log.info("started, pid %d", os.getpid()))
    node.zygote = zygote_pid
    node.care = Care(loop, starts, partial(to_zygote.start_witness, starts))
    node.start_mover = partial(to_zygote.start_mover, starts)
    node.sealer.start = partial(to_zygote.start_signer, starts)
    node.sealer.recover = partial(to_zygote.start_recoverer, starts)
    node.start_judge = partial(to_zygote.start_judge, starts)
    node.remove = partial(to_zygote.remove, starts)
    node.end_adopted = partial(to_zygote.end_adopted, starts)

    def hold(path: str) -> None:
        to_zygote.hold(starts, path)
        loop.later(SWEEP_S, lambda: to_zygote.sweep_place(starts, os.path.dirname(path)))

    node.hold = hold
    supervisor = Supervisor(listener, loop, node)
    node.admit = supervisor.admit
    _watch_zygote(loop, zygote_pid, supervisor)
    for place in (leaf.place, memory_group.place):
        loop.later(SWEEP_S, partial(_sweep, place))
    gc.freeze()  # what is here now stays; what comes and goes is few and small
    gc.enable()
    gc.set_threshold(50_000, 20, 100)
    loop.run()
    node.close(ended=not supervisor.abandoned)


def _sweep(place: Callable[[], str]) -> None:
    leaf.sweep(place())


class Supervisor:
    """Accepts targets until there have been none for a while."""

    def __init__(self, listener: socket.socket, loop: Loop, node: Node) -> None:
        self._listener = listener
        self._loop = loop
        self._node = node
        self._sessions: set[Session] = set()
        self._visits = 0
        self.abandoned = False
        """Its targets end with it: what they had open is for the next supervisor to close."""
        listener.setblocking(False)
        loop.watch(listener.fileno(), select.EPOLLIN, lambda _events: self._accept())
        self._linger()

    def _accept(self) -> None:
        """Lets in all who have come."""
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self._visits += 1
            self.admit(sock)

    def admit(self, sock: socket.socket) -> Session:
        """Begins a session on that line."""
        session = Session(sock, self._node, self._left)
        self._sessions.add(session)
        return session

    def _left(self, session: Session) -> None:
        self._sessions.discard(session)
        if self._sessions:
            return
        if self._listener.fileno() < 0:
            self._loop.stop()
        else:
            self._linger()

    def abandon(self) -> None:
        """Cuts what the targets have open, and ends them with all that they have started."""
        self.abandoned = True
        for session in list(self._sessions):
            session.abandon()
        self._node.care.wards.end()

    def _linger(self) -> None:
        visits = self._visits

        def check() -> None:
            if not self._sessions and visits == self._visits:
                self._leave()

        self._loop.later(LINGER_S, check)

    def _leave(self) -> None:
        """Closes the door first, then looks who still stands in it."""
        rendezvous.leave(self._listener)
        self._accept()
        self._loop.forget(self._listener.fileno())
        self._listener.close()  # another supervisor may be started from here on
        if not self._sessions:
            self._loop.stop()


def _watch_zygote(loop: Loop, pid: int, supervisor: Supervisor) -> None:
    """Without its zygote no tool can be started nor ended: the supervisor ends, and with it its targets."""
    pidfd = os.pidfd_open(pid)

    def lost(_events: int) -> None:
        log.error("the zygote is gone")
        supervisor.abandon()
        loop.stop()

    loop.watch(pidfd, select.EPOLLIN, lost)
