"""A leader: the subreaper of one tool's tree at a time. Runs in the zygote, as its child.

It keeps a thread ready that will start the next tool, and ends everything that is left
when the tool has ended, when it is told to, or when the supervisor is gone. Nothing here decides anything.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

from ray_guard.kernel import landlock, libc, mounting, procfs, seqpacket
from ray_guard.policy.files import Grant
from ray_guard.supervisor import mounts
from ray_guard.supervisor.embryo import Embryo
from ray_guard.supervisor.groups import Everybody, Groups, Scope
from ray_guard.supervisor.leaf import KILL_PATIENCE_S

TERM_PATIENCE_S: Final = 1.0
_REAPED_AT_ONCE: Final = 256


def lead(
    line: socket.socket,
    program: bytes,
    system: Sequence[Grant],
    covers: mounts.Covers,
    leaf: str,
) -> int:
    """A leader's life: one start after the other from ``line``, until the supervisor hangs up; its exit status.

    It ends as well behind a call that it could not end: what a call left must never be taken for the next one's.

    Args:
        leaf: the folder of the control group that it was born into, its own; empty: there is none.
    """
    signal.signal(signal.SIGCHLD, _wake)
    for descriptor in (0, 1, 2):
        os.set_inheritable(descriptor, False)  # a tool has what it was given, and nothing of ours
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    os.setsid()
    libc.prctl(libc.PR_SET_CHILD_SUBREAPER, 1)
    obstacle: tuple[str, str, OSError] | None = None
    if mounting.works():
        try:
            mounts.enter(covers)
            if not mounts.stand(covers):
                raise OSError(errno.ESTALE, "what is to be covered changes all the time")
        except OSError as error:
            obstacle = ("files", "mounts", error)
    # A domain of its own, with the tool's within: from here on kill(-1) means this call's processes, and no others
    # (where signals are scoped).
    libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)
    try:
        landlock.enter_process_scope()
    except OSError as error:
        obstacle = ("scope", "Landlock", error)
    if obstacle is not None:
        stage, what, why = obstacle
        return _unfit(line, {"stage": stage, "errno": why.errno, "text": f"{what}: {why.strerror or why}"})
    return _serve(line, wake_read, partial(Embryo, program, system, covers, leaf))


def _wake(_signal: int, _frame: object) -> None:
    """What matters is written to the wake-up descriptor."""


def _serve(line: socket.socket, wake: int, conceive: Callable[[], Embryo]) -> int:
    scoped = landlock.abi() >= landlock.SIGNAL_SCOPE_ABI
    while True:
        embryo = conceive()
        if not embryo.announce(line):
            return _unfit(line, embryo.failure)
        try:
            received = seqpacket.receive(line)
        except (OSError, seqpacket.BadPacket):
            return 0
        if received is None:
            return 0
        message, asking = received
        call = _Call(line, wake, message, Scope() if scoped else Groups())
        if not call.run(embryo, asking) or not call.await_release():
            return 0
        if mounting.works():
            mounts.clear()


def _unfit(line: socket.socket, fault: dict[str, Any]) -> int:
    """Nothing can be started here: says why, and waits until that has been taken in."""
    try:
        seqpacket.send(line, {**fault, "op": "unfit"})
        seqpacket.receive(line)
    except (OSError, seqpacket.BadPacket):
        pass
    return 0


def _say(line: socket.socket, message: dict[str, Any]) -> None:
    """Tells whoever is there to hear it."""
    try:
        seqpacket.send(line, message)
    except OSError:
        pass


class _Call:
    """One start, from its request to the death of its tree."""

    def __init__(self, line: socket.socket, wake: int, request: dict[str, Any], everybody: Everybody) -> None:
        self._line = line
        self._wake = wake
        self._everybody = everybody
        wall = request.get("wall_seconds")
        self._wall = None if wall is None else float(wall)
        self._keeps = request.get("survivors") == "keep"
        self._held = bool(request.get("held"))
        """The supervisor has something to do between the start and the tool's first step, and will say so."""
        self._pid = 0
        self._deadline: float | None = None
        self._status: int | None = None
        self._released = False
        self._cpu_seconds = 0.0
        self._peak_memory = 0

    def await_release(self) -> bool:
        """Waits until the supervisor has taken the end in; False: it is gone.

        The next thread can wait that long: the supervisor may share this core, and somebody waits for it.
        """
        while not self._released:
            try:
                received = seqpacket.receive(self._line)
            except (OSError, seqpacket.BadPacket):
                return False
            if received is None:
                return False
            self._released = received[0].get("op") == "again"  # else it was for the tool, and crossed with its end
        return True

    def run(self, embryo: Embryo, asking: Sequence[int]) -> bool:
        """Waits until the tool has started and ended, ends what is left; False: something could not be ended.

        Args:
            asking: the line to whoever asked for it, if there still is one.
        """
        embryo.await_start(self._wake)
        self._pid = embryo.pid
        if not self._pid:
            seqpacket.close_all(asking)
            self._tell(embryo.failure or {"op": "failed"})
            return not self._end_all()
        self._deadline = None if self._wall is None else time.monotonic() + self._wall
        started = {"op": "started", "pid": self._pid}
        self._tell(started)
        goes = self._may_go()
        if goes:
            os.kill(self._pid, signal.SIGCONT)  # the supervisor has stopped it: see embryo
        for descriptor in asking:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, descriptor) as line:
                _say(line, started)
        timed_out = goes and self._attend()
        kept = self._survivors() if self._keeps and not timed_out and self._status is not None else 0
        if kept:
            self._tell({**self._outcome(), "op": "left", "survivors": kept})
            timed_out = self._attend()
        survivors = self._end_all()
        self._tell({**self._outcome(), "timed_out": timed_out, "unkillable": survivors})
        return not survivors

    def _outcome(self) -> dict[str, Any]:
        return {
            "op": "exited",
            "status": self._status if self._status is not None else signal.SIGKILL,
            "cpu_seconds": self._cpu_seconds,
            "peak_memory": self._peak_memory,
        }

    def _survivors(self) -> int:
        """How many processes the tool has left behind."""
        if not self._reap():
            return 0
        return sum(not procfs.is_zombie(pid) for pid in procfs.descendants(os.getpid()))

    def _tell(self, message: dict[str, Any]) -> None:
        _say(self._line, message)  # or else its end of the line says that it is gone, and everything ends

    def _attend(self) -> bool:
        """Waits for the tool's end, or where that is past for that of all it left; whether the call's time ran out."""
        poll = select.poll()
        for descriptor in (self._line.fileno(), self._wake):
            poll.register(descriptor, select.POLLIN)
        limit = self._deadline
        timed_out = False
        alone = self._status is None
        left = self._reap()  # it may have ended before anybody looked
        while self._status is None if alone else left:
            timeout = None if limit is None else max(0.0, limit - time.monotonic())
            for descriptor, _ in poll.poll(None if timeout is None else timeout * 1000 + 1):
                if descriptor == self._wake:
                    os.read(self._wake, 512)
                elif not self._obey():
                    return timed_out
            left = self._reap()
            if limit is not None and time.monotonic() >= limit and (self._status is None if alone else left):
                if timed_out:
                    return True
                timed_out = True
                limit = time.monotonic() + TERM_PATIENCE_S
                self._everybody.signal(signal.SIGTERM)
        return timed_out

    def _may_go(self) -> bool:
        """Waits until the tool may take its first step; False: it shall not."""
        while self._held:  # before that the supervisor may tell of the group it leads
            if not self._obey():
                return False
        return True

    def _obey(self) -> bool:
        """One message from the supervisor; False: end everything."""
        try:
            received = seqpacket.receive(self._line)
        except (OSError, seqpacket.BadPacket):
            return False
        operation = None if received is None else received[0].get("op")
        if received is not None and operation == "group":
            self._everybody.add(int(received[0]["number"]))
            return True
        if operation == "go":
            self._held = False
            return True
        if received is None or operation != "signal":
            self._released = operation == "again"
            return False
        try:
            if self._status is None:  # not reaped yet, so the pid is still the tool's
                os.kill(self._pid, int(received[0]["number"]))
        except (OSError, ValueError, KeyError):
            pass
        return True

    def _reap(self) -> bool:
        """Takes in what has ended; whether any child is left. Orphans of the call are children too.

        Not more at once than there is time for: a swarm may leave them quicker than they are taken in.
        """
        for _ in range(_REAPED_AT_ONCE):
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            self._cpu_seconds += usage.ru_utime + usage.ru_stime
            self._peak_memory = max(self._peak_memory, usage.ru_maxrss * 1024)
            if pid == self._pid:
                self._status = status
        return True

    def _end_all(self) -> list[int]:
        """Kills until nothing is left below this process; what cannot be killed in time is returned."""
        deadline = time.monotonic() + KILL_PATIENCE_S
        told = False
        while self._reap():
            if time.monotonic() > deadline:
                return [pid for pid in procfs.descendants(os.getpid()) if not procfs.is_zombie(pid)]
            if self._everybody.grows:
                if not told:
                    told = True
                    self._tell({"op": "ending"})  # from then on no process leaves its group
                while select.select([self._line], [], [], 0)[0] and self._obey():
                    pass
            self._everybody.signal(signal.SIGKILL)
            time.sleep(0.0005)
        return []
