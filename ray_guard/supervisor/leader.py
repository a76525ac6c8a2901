"""A leader: the subreaper of one tool's tree at a time. Runs in the zygote, as its child.

It keeps a process ready that will be the next tool, starts that when there is a start, and ends everything that is left
when the tool has ended, when it is told to, or when the supervisor is gone. Nothing here decides anything.
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import socket
import time
from collections.abc import Sequence
from typing import Any, Final, Self

from ray_guard.kernel import landlock, libc, mounting, procfs, seccomp, seqpacket
from ray_guard.policy.files import Grant
from ray_guard.supervisor import mounts
from ray_guard.supervisor.embryo import Embryo

KILL_PATIENCE_S: Final = 1.0
"""Contract: what a call leaves running is dead within one second; what is not by then is reported as unkillable."""
TERM_PATIENCE_S: Final = 1.0
_COURTESY_MS: Final = 20


def lead(
    line: socket.socket,
    program: tuple[seccomp.Instruction, ...],
    system: Sequence[Grant],
    covers: Sequence[Sequence[object]],
) -> int:
    """A leader's life: one start after the other from ``line``, until the zygote hangs up; its exit status.

    It ends as well behind a call that it could not end: what a call left must never be taken for the next one's.
    """
    signal.signal(signal.SIGCHLD, lambda _signal, _frame: None)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP):
        signal.signal(number, signal.SIG_IGN)
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    os.setsid()
    libc.prctl(libc.PR_SET_CHILD_SUBREAPER, 1)
    obstacle: tuple[str, OSError] | None = None
    if mounting.works():
        try:
            mounts.enter(covers)
            if not mounts.stand(covers):
                raise OSError(errno.ESTALE, "what is to be covered changes all the time")
        except OSError as error:
            obstacle = ("files", error)
    # A domain of its own, with the tool's within: from here on kill(-1) means this call's processes, and no others.
    libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)
    try:
        landlock.enter_process_scope()
    except OSError as error:
        obstacle = ("scope", error)
    while True:
        embryo = None if obstacle is not None else Embryo(program, system)
        received = seqpacket.receive(line)
        if received is None:
            return 0  # with this process the embryo's line closes, and it ends
        message, descriptors = received
        if obstacle is None and not mounts.stand(covers):
            seqpacket.send(line, {"op": "again", "start": message}, descriptors)
            return 0
        link, supervisor, *own = descriptors
        call = _Call(socket.socket(fileno=link), supervisor, wake_read, message.get("wall_seconds"))
        with call:
            if embryo is None:
                _refuse(call, obstacle)
                seqpacket.close_all(own)
                return 0
            if not call.run(embryo, own):
                return 0
        if mounting.works():
            mounts.clear()
        try:
            seqpacket.send(line, {"op": "ready"})
        except OSError:
            return 0  # the zygote is gone


def _refuse(call: _Call, obstacle: tuple[str, OSError] | None) -> None:
    stage, error = obstacle or ("scope", OSError())
    call.refuse(stage, error.errno, f"{'Landlock' if stage == 'scope' else 'mounts'}: {error.strerror or error}")


class _Call:
    """One start, from its request to the death of its tree."""

    def __init__(self, link: socket.socket, supervisor: int, wake: int, wall_seconds: float | None) -> None:
        self._link = link
        self._supervisor = supervisor
        self._wake = wake
        self._wall = None if wall_seconds is None else float(wall_seconds)
        self._pid = 0
        self._status: int | None = None
        self._cpu_seconds = 0.0
        self._peak_memory = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # The next fork can wait until the supervisor has taken the end in: it may share this core, and somebody waits.
        poll = select.poll()
        poll.register(self._link, select.POLLIN)
        poll.poll(_COURTESY_MS)
        self._link.close()
        os.close(self._supervisor)

    def run(self, embryo: Embryo, own: Sequence[int]) -> bool:
        """Starts the tool, waits for its end, ends what is left; False: something could not be ended."""
        self._pid = embryo.pid
        if not self._launch(embryo, own):
            return not self._end_all()
        timed_out = self._attend()
        survivors = self._end_all()
        self._tell(
            {
                "op": "exited",
                "status": self._status if self._status is not None else signal.SIGKILL,
                "timed_out": timed_out,
                "unkillable": survivors,
                "cpu_seconds": self._cpu_seconds,
                "peak_memory": self._peak_memory,
            }
        )
        return not survivors

    def _tell(self, message: dict[str, Any], descriptors: tuple[int, ...] = ()) -> None:
        try:
            seqpacket.send(self._link, message, descriptors)
        except OSError:
            pass  # the supervisor is gone: its pidfd says so too, and everything ends

    def refuse(self, stage: str, error: int | None, text: str) -> None:
        self._tell({"op": "failed", "stage": stage, "errno": error, "text": text})

    def _launch(self, embryo: Embryo, own: Sequence[int]) -> bool:
        """Starts the tool; False: it could not be, and that was told."""
        armed = embryo.listener >= 0
        if armed:
            embryo.prepare(own)  # while the supervisor writes its record and opens the gate
            self._tell({"op": "armed", "pid": embryo.pid}, (embryo.listener,))
            os.close(embryo.listener)
            if self._await_go():
                embryo.go()
        seqpacket.close_all(own)
        failure = embryo.failure()
        if armed and not failure:
            self._tell({"op": "started", "pid": self._pid})
            return True
        if failure:
            self._tell(json.loads(failure))
        else:
            self.refuse("filter", -embryo.listener, "the listener cannot be taken")
        return False

    def _await_go(self) -> bool:
        try:
            answer = seqpacket.receive(self._link)
        except (OSError, seqpacket.BadPacket):
            return False
        return answer is not None and answer[0].get("op") == "go"

    def _attend(self) -> bool:
        """Waits for the tool's end, passing on signals; whether its time ran out."""
        poll = select.poll()
        for descriptor in (self._link.fileno(), self._supervisor, self._wake):
            poll.register(descriptor, select.POLLIN)
        limit = None if self._wall is None else time.monotonic() + self._wall
        timed_out = False
        self._reap()  # it may have ended before anybody looked
        while self._status is None:
            timeout = None if limit is None else max(0.0, limit - time.monotonic())
            for descriptor, _ in poll.poll(None if timeout is None else timeout * 1000 + 1):
                if descriptor == self._wake:
                    os.read(self._wake, 512)
                elif descriptor == self._supervisor or not self._obey():
                    return timed_out
            self._reap()
            if limit is not None and time.monotonic() >= limit and self._status is None:
                if timed_out:
                    return True
                timed_out = True
                limit = time.monotonic() + TERM_PATIENCE_S
                self._signal_all(signal.SIGTERM)
        return timed_out

    def _obey(self) -> bool:
        """One message from the supervisor; False: end everything."""
        try:
            received = seqpacket.receive(self._link)
        except (OSError, seqpacket.BadPacket):
            return False
        if received is None or received[0].get("op") != "signal":
            return False
        try:
            os.kill(self._pid, int(received[0]["number"]))  # not reaped yet, so the pid is still the tool's
        except (OSError, ValueError, KeyError):
            pass
        return True

    def _reap(self) -> bool:
        """Takes in what has ended; whether any child is left. Orphans of the call are children too."""
        while True:
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

    @staticmethod
    def _signal_all(number: int) -> None:
        """Signals every process of the call at once.

        The kernel walks them under one lock that no fork can slip through, and the domain keeps everybody else out of
        it. A list read from /proc does not work: processes that replace themselves are quicker than its reader.
        """
        try:
            os.kill(-1, number)
        except OSError:
            pass  # ESRCH: nobody is left; EPERM: others exist, none of this call

    def _end_all(self) -> list[int]:
        """Kills until nothing is left below this process; what cannot be killed in time is returned."""
        deadline = time.monotonic() + KILL_PATIENCE_S
        while True:
            self._signal_all(signal.SIGKILL)
            if not self._reap():
                return []
            if time.monotonic() > deadline:
                return [pid for pid in procfs.descendants(os.getpid()) if not procfs.is_zombie(pid)]
            time.sleep(0.0005)
