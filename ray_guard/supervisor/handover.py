"""Policy actors and drivers outlive their supervisor: their zygote hands them to the next one. Runs in the zygote.

A policy actor holds an engine whose start takes minutes. When its supervisor dies, the kernel stops it (the lifeline's
F_SETSIG), and what its tree asks is not answered: its zygote holds the listener, so that the kernel keeps these calls
waiting instead of failing them. With the listener the zygote holds the actor's line, whose unread messages wait there,
the end of another whose closing kills it, and its book (:mod:`ray_guard.supervisor.book`). All that goes to the next
supervisor: the one that somebody has started meanwhile, or one that the zygote forks. What nobody has taken over in
:data:`PATIENCE_S` is ended with all below it.

Of a driver, which is only observed, there is but its line and its book: what it says meanwhile waits on that line.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterable
from typing import Any, Final

from ray_guard.kernel import libc, rendezvous, seqpacket
from ray_guard.named import NamedTuple
from ray_guard.supervisor.embryo import close_all_but

PATIENCE_S: Final = 5.0
"""Contract: a policy actor is taken over within so long, or ends."""
_LOOK_S: Final = 0.002
_LISTENER: Final = 3


class Estate(NamedTuple):
    """What is held of one policy actor or driver.

    Attributes:
        pid: of the process that ends where nobody takes it over; 0: a driver, which does not.
        line: the number of its line to the supervisor, which is held elsewhere.
        listener: none of a driver.
        stopper: the end of a line that stops it; none: it holds that itself.
    """

    pid: int
    line: int
    book: int
    listener: tuple[int, ...]
    stopper: tuple[int, ...]

    def close(self) -> None:
        seqpacket.close_all((self.book, *self.listener, *self.stopper))


class Estates:
    """All that a zygote holds, by the number of the line."""

    def __init__(self) -> None:
        self.held: dict[int, Estate] = {}

    def obey(self, message: dict[str, Any], descriptors: list[int]) -> None:
        """The supervisor's word. The descriptors are ours from here on."""
        number = int(message["line"])
        if message["op"] == "bequeath":
            book, *armed = descriptors
            self.release(number)
            self.held[number] = Estate(int(message["pid"]), number, book, tuple(armed[:1]), tuple(armed[1:]))
        elif message["op"] == "disinherit":
            self.release(number)
        else:  # "book"
            (book,) = descriptors
            os.close(self.held[number].book)
            self.held[number] = self.held[number]._replace(book=book)

    def release(self, number: int) -> None:
        if number in self.held:
            self.held.pop(number).close()

    @property
    def pids(self) -> set[int]:
        return {estate.pid for estate in self.held.values()}


class Offer(NamedTuple):
    """A target that the next supervisor may take over.

    Attributes:
        line: its line to the supervisor.
        lifeline: the end of another whose closing kills it; none: a driver.
        last: what it has said that the supervisor had read and not done with.
        journaled: it is the end of a span, and journaled all the same.
    """

    estate: Estate
    start_time: int
    line: int
    lifeline: tuple[int, ...]
    last: dict[str, Any] | None
    journaled: bool


def hand_over(offers: Iterable[Offer], until: float, start: Callable[[socket.socket], None]) -> set[int]:
    """Offers all to the next supervisor; the numbers of those lines that it has taken.

    Args:
        until: when it is too late (``time.monotonic()``).
        start: starts a supervisor on a listening socket.
    """
    waiting: dict[int, tuple[socket.socket, int]] = {}
    taken: set[int] = set()
    sock = _next_supervisor(until, start)
    if sock is None:
        return taken
    with sock, contextlib.ExitStack() as answers:
        poll = select.poll()
        for estate, start_time, line, lifeline, last, journaled in offers:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            answers.enter_context(ours)
            with theirs, contextlib.suppress(OSError):
                passed = [theirs.fileno(), line, estate.book, *estate.listener, *lifeline]
                said = {"op": "adopt", "start_time": start_time, "last": last, "journaled": journaled}
                seqpacket.send(sock, said, passed)
                waiting[ours.fileno()] = ours, estate.line
                poll.register(ours, select.POLLIN)
        while waiting and (left := until - time.monotonic()) > 0:
            for descriptor, _ in poll.poll(left * 1000):
                poll.unregister(descriptor)
                answer, number = waiting.pop(descriptor)
                if _agrees(answer):
                    taken.add(number)
    return taken


def _agrees(answer: socket.socket) -> bool:
    try:
        received = seqpacket.receive(answer)
    except (OSError, seqpacket.BadPacket):
        return False
    return received is not None and received[0].get("ok") is True


def _next_supervisor(until: float, start: Callable[[socket.socket], None]) -> socket.socket | None:
    """A connection to whoever is the supervisor now, started if there is none."""
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            sock = rendezvous.connect()
            if sock is not None:
                return sock
            listener = rendezvous.bind()
            if listener is not None:
                with listener:
                    start(listener)
                    return rendezvous.connect()
        time.sleep(_LOOK_S)  # one is leaving, or about to listen
    return None


def await_end(supervisor: int, until: float) -> bool:
    """Waits until the process that forked this one has closed everything: no signal of a lifeline comes after that."""
    while os.getppid() == supervisor:
        if time.monotonic() >= until:
            return False
        time.sleep(_LOOK_S)
    return True


def become_supervisor(listener: socket.socket) -> None:
    """Makes this child of the zygote the next supervisor, until its last target has gone."""
    os.dup2(listener.fileno(), _LISTENER)
    close_all_but((0, 1, 2, _LISTENER))
    os.setsid()
    for number in (signal.SIGCHLD, signal.SIGQUIT, signal.SIGTSTP):
        signal.signal(number, signal.SIG_DFL)
    libc.prctl(libc.PR_SET_DUMPABLE, 1)  # it tries what it may do on children of its own
    from ray_guard.supervisor.__main__ import main

    main(_LISTENER)
