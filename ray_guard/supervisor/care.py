"""Puts targets into the care of those who are left should this process die. Runs in the supervisor.

The zygote and, a moment after the first target, the witness (:mod:`ray_guard.supervisor.witness`) hold what is needed
to end a target's tree, and to know what it had said and nobody had read.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import socket
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from ray_guard.kernel import procfs, seqpacket
from ray_guard.log import logger
from ray_guard.supervisor.inbox import Inbox
from ray_guard.supervisor.unread import About
from ray_guard.supervisor.wards import Ward, Wards

if TYPE_CHECKING:
    from ray_guard.egress.made import Waiting

log = logger("ray_guard.care")

_WITNESS_S: Final = 0.1
"""When the witness is started: nobody's first call waits for it."""
_AGAIN_S: Final = 1.0


class Care:
    """That of all targets.

    Args:
        starts: the zygote's line.
        start_witness: starts a witness at that end of its line.
    """

    def __init__(self, loop: Waiting, starts: socket.socket, start_witness: Callable[[socket.socket], None]) -> None:
        self.wards = Wards()
        """Ended by this process where the zygote is lost."""
        self.inbox = Inbox()
        self._loop = loop
        self._starts = starts
        seqpacket.send(starts, {"op": "inbox"}, [self.inbox.fileno()])
        self._start_witness = start_witness
        self._witness: socket.socket | None = None
        self._wants_witness = False
        self._lines: dict[int, Line] = {}
        self._numbers = itertools.count()

    def take(self, line: socket.socket, about: About, pid: int, lifeline: socket.socket | None) -> Line:
        """Puts a target into care.

        Args:
            lifeline: held open, here too: when all who hold it are gone the kernel kills the process. None: an
                observer, which nobody ends.
        """
        ward = None
        if lifeline is not None:
            born = procfs.start_time(pid) or 0  # 0: it has ended already, but what it said is kept
            ward = Ward(pid, born, os.dup(lifeline.fileno()), pid)
            self.wards.add(ward)
        taken = Line(self, next(self._numbers), line, about, ward)
        self._lines[taken.number] = taken
        seqpacket.send(self._starts, *taken.said())
        if self._witness is None:
            self._want_witness(_WITNESS_S)
        else:
            self._witnessed(*taken.said())
        return taken

    def ward(self, pid: int, root: int) -> None:
        """Puts a process beside the target ``root`` into care."""
        start_time = procfs.start_time(pid)
        if start_time is not None:  # else it has ended already
            self.wards.add(Ward(pid, start_time, None, root))
            self.tell({"op": "ward", "pid": pid, "start_time": start_time, "root": root})

    def tell(self, message: dict[str, Any]) -> None:
        """All who are left should this process die. Raises OSError."""
        self._witnessed(message)
        seqpacket.send(self._starts, message)

    def tell_zygote(self, message: dict[str, Any], descriptors: tuple[int, ...] = ()) -> None:
        """The zygote alone. Raises OSError."""
        seqpacket.send(self._starts, message, descriptors)

    def release(self, line: Line) -> None:
        """It was read to its end, and its process is gone. Raises OSError."""
        self._lines.pop(line.number, None)
        self.wards.release(line.pid)
        self.tell({"op": "release", "pid": line.pid, "line": line.number})

    # -- the witness ---------------------------------------------------------------------------------------------------

    def _want_witness(self, seconds: float) -> None:
        if not self._wants_witness:
            self._wants_witness = True
            self._loop.later(seconds, self._call_witness)

    def _call_witness(self) -> None:
        self._wants_witness = False
        if not self._lines:
            return
        witness, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self._start_witness(theirs)
            except OSError as error:
                witness.close()
                log.warning("the witness cannot be started: %s", error)
                return
        self._witness = witness
        self._loop.watch(witness.fileno(), select.EPOLLIN, lambda _events: self._lost_witness())
        self._witnessed({"op": "inbox"}, (self.inbox.fileno(),))
        for line in self._lines.values():
            self._witnessed(*line.said())

    def _witnessed(self, message: dict[str, Any], descriptors: tuple[int, ...] = ()) -> None:
        if self._witness is not None:
            with contextlib.suppress(OSError):  # its end is about to be told
                seqpacket.send(self._witness, message, descriptors)

    def _lost_witness(self) -> None:
        assert self._witness is not None  # noqa: S101 - it is watched only while it is there
        self._loop.forget(self._witness.fileno())
        self._witness.close()
        self._witness = None
        log.warning("the witness is gone")
        self._want_witness(_AGAIN_S)


class Line:
    """One target in care: its line to this process, and the process that ends with this one."""

    def __init__(self, care: Care, number: int, line: socket.socket, about: About, ward: Ward | None) -> None:
        self.number = number
        self.pid = 0 if ward is None else ward.pid
        self._care = care
        self._line = line
        self._about = about
        self._ward = ward

    def said(self) -> tuple[dict[str, Any], tuple[int, ...]]:
        """How it is told of: a message and its descriptors."""
        message: dict[str, Any] = {"op": "line", "line": self.number, "about": self._about}
        passed: tuple[int, ...] = (self._line.fileno(),)
        if self._ward is not None and self._ward.lifeline is not None:
            message |= {"pid": self.pid, "start_time": self._ward.start_time}
            passed = (self._ward.lifeline, *passed)
        return message, passed

    def rename(self, resource: Mapping[str, Any]) -> None:
        """It has learnt which actor it is."""
        self._about = self._about._replace(resource=dict(resource))
        self._care.tell({"op": "rename", "line": self.number, "resource": resource})

    def bequeath(self, book: int, armed: tuple[int, ...]) -> None:
        """It is handed on, should this process die: see :mod:`ray_guard.supervisor.handover`.

        Args:
            armed: its listener, and the end of its lifeline that stops it, unless it holds that itself; none: a driver.
        """
        self._care.tell_zygote({"op": "bequeath", "pid": self.pid, "line": self.number}, (book, *armed))

    def renew_book(self, book: int) -> None:
        """Its book was written anew."""
        self._care.tell_zygote({"op": "book", "line": self.number}, (book,))

    def disinherit(self) -> None:
        """It ends with this process again. Raises OSError."""
        self._care.tell_zygote({"op": "disinherit", "line": self.number})

    def end(self) -> None:
        """It was read to its end, and its process is gone. Raises OSError."""
        self._care.release(self)
