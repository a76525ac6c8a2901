"""The zygote: starts tool processes outside any actor's filter, each with a listener of its own.

Runs in the zygote: a single-threaded child of the supervisor, forked before that grew, since what is small is forked
fast. It forks *leaders*, each with a process that is already filtered and waits to become a tool, and hands the starts
out to them.

    supervisor ──start──▶ zygote ──start──▶ leader ──fork──▶ tool (filter … start, exec)
         ◀── armed (listener) · started · failed · exited ── link ──┘
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import platform
import resource
import select
import signal
import socket
import time
from typing import Any, Final, NamedTuple, NoReturn

from ray_guard.egress import rings
from ray_guard.kernel import borrowing, libc, procfs, seccomp, seqpacket, trees
from ray_guard.supervisor import domain
from ray_guard.supervisor.embryo import bound_capabilities, close_all_but
from ray_guard.supervisor.leader import KILL_PATIENCE_S, lead

SPARE: Final = 8
"""How many idle leaders are kept. There are as many as there were calls at once, and none before the first start."""


def run(requests: socket.socket) -> NoReturn:
    """The zygote's life, until the supervisor hangs up."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # leaders report to the supervisor; nobody waits for them here
    libc.prctl(libc.PR_SET_DUMPABLE, 0)  # nobody of the same user may write its memory, nor its leaders'
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a tool's descriptors may have any number
    with contextlib.suppress(OSError):  # then each tool tries, and says so
        bound_capabilities()
    zygote = _Zygote(requests)
    gc.freeze()  # a collection in a child would copy every page
    while zygote.step():
        pass
    zygote.end_wards()
    os._exit(0)


class _Ward(NamedTuple):
    """A process whose tree is ended here when the supervisor is gone."""

    pid: int
    start_time: int
    lifeline: int | None
    """A target's, held open: where the zygote dies too, its closing kills the target. None: a process beside one."""

    @property
    def lives(self) -> bool:
        return procfs.start_time(self.pid) == self.start_time


_WARDS_SWEPT: Final = 256
"""How often, in wards, those that have ended are forgotten."""


class _Zygote:
    def __init__(self, requests: socket.socket) -> None:
        self._requests = requests
        self._programs = {
            gpu: rings.call_ring(platform.machine(), borrows=borrowing.works(), gpu=gpu) for gpu in (False, True)
        }
        seccomp.encode(self._programs[False])
        self._system = domain.prepare()
        self._wards: dict[int, _Ward] = {}
        self._leaders: dict[int, socket.socket] = {}
        self._idle: list[socket.socket] = []
        self._fit: dict[int, tuple[Any, bool]] = {}
        """What each leader has mounted and whether it grants GPUs, by its line's number: it serves such calls alone."""
        self._poll = select.poll()
        self._poll.register(requests, select.POLLIN)

    def step(self) -> bool:
        """Handles what has come; False: the supervisor is gone."""
        came = {descriptor for descriptor, _ in self._poll.poll()}
        for descriptor in came - {self._requests.fileno()}:  # first: who is idle again can take a start
            self._hear(self._leaders[descriptor])
        if self._requests.fileno() not in came:
            return True
        try:
            received = seqpacket.receive(self._requests)
        except seqpacket.BadPacket:
            return True  # one start is lost, and says so: its link is closed with the packet
        except OSError:
            return False
        if received is None:
            return False
        self._obey(*received)
        return True

    def _obey(self, message: dict[str, Any], descriptors: list[int]) -> None:
        operation = message.get("op")
        if operation == "ward":
            pid = int(message["pid"])
            self._wards[pid] = _Ward(pid, int(message["start_time"]), descriptors[0] if descriptors else None)
            if len(self._wards) % _WARDS_SWEPT == 0:
                self._wards = {
                    pid: ward for pid, ward in self._wards.items() if ward.lifeline is not None or ward.lives
                }
        elif operation == "remove":
            self._remove(str(message["path"]))
        elif operation == "release":
            ward = self._wards.pop(int(message["pid"]), None)
            if ward is not None and ward.lifeline is not None:
                os.close(ward.lifeline)
        else:
            self._start(message, descriptors)

    def _start(self, message: dict[str, Any], descriptors: list[int]) -> None:
        try:
            while not self._assign(self._leader((message["mounts"], message["gpu"])), message, descriptors):
                pass  # that one died while it was idle
        except OSError:  # no more processes: this start is lost, and says so, for its link closes here
            import traceback

            traceback.print_exc()
        seqpacket.close_all(descriptors)

    @staticmethod
    def _remove(path: str) -> None:
        """Takes away a call's temporary folder: mostly it is empty, else a child does it, for it may be large."""
        try:
            os.rmdir(path)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return
        else:
            return
        if os.fork() == 0:
            try:
                trees.remove(path)
            finally:
                os._exit(0)

    def _leader(self, fit: tuple[Any, bool]) -> socket.socket:
        for at, leader in enumerate(self._idle):
            if self._fit[leader.fileno()] == fit:
                return self._idle.pop(at)
        return self._fork_leader(fit)

    def _assign(self, leader: socket.socket, message: dict[str, Any], descriptors: list[int]) -> bool:
        try:
            seqpacket.send(leader, message, descriptors)
        except OSError:
            self._forget(leader)
            return False
        return True

    def _hear(self, leader: socket.socket) -> None:
        """A leader is idle again, or has ended."""
        try:
            received = seqpacket.receive(leader)
        except (OSError, seqpacket.BadPacket):
            received = None
        if received is None:
            self._forget(leader)
            return
        if received[0].get("op") == "again":  # what it had covered is not any more: another takes the start
            self._forget(leader)
            self._start(received[0]["start"], received[1])
            return
        self._idle.append(leader)
        if len(self._idle) > SPARE:
            self._forget(self._idle[0])  # one too many ends when its line closes

    def _forget(self, leader: socket.socket) -> None:
        self._poll.unregister(leader)
        del self._leaders[leader.fileno()], self._fit[leader.fileno()]
        if leader in self._idle:
            self._idle.remove(leader)
        leader.close()

    def _fork_leader(self, fit: tuple[Any, bool]) -> socket.socket:
        line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork() != 0:
            theirs.close()
            self._leaders[line.fileno()] = line
            self._fit[line.fileno()] = fit
            self._poll.register(line, select.POLLIN)
            return line
        code = 1
        try:
            # A leader's copies would keep alive the lines of others, and the pipes of the start that is waiting.
            close_all_but((0, 1, 2, theirs.fileno()))
            code = lead(theirs, self._programs[fit[1]], self._system, fit[0])
        except BaseException:  # noqa: BLE001 - nothing may return into the zygote's loop
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)

    def end_wards(self) -> None:
        """The supervisor is gone, and its lifelines have stopped the targets: ends all below them.

        Children first: a target that died before them would leave them to nobody.
        """
        deadline = time.monotonic() + KILL_PATIENCE_S
        wards = [ward for ward in self._wards.values() if ward.lives]
        while wards and time.monotonic() < deadline:
            below = {pid for ward in wards for pid in procfs.descendants(ward.pid) if not procfs.is_zombie(pid)}
            for pid in below or {ward.pid for ward in wards}:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            if not below:
                return


def ward(starts: socket.socket, pid: int, lifeline: socket.socket | None = None) -> None:
    """Puts a process's tree into the zygote's care, should the supervisor die; called by the supervisor."""
    start_time = procfs.start_time(pid)
    if start_time is None:
        return  # it has ended already
    passed = [] if lifeline is None else [lifeline.fileno()]
    seqpacket.send(starts, {"op": "ward", "pid": pid, "start_time": start_time}, passed)


def remove(starts: socket.socket, path: str) -> None:
    """Takes away a call's temporary folder; called by the supervisor."""
    seqpacket.send(starts, {"op": "remove", "path": path})


def fork(close: list[int]) -> tuple[socket.socket, int]:
    """Forks the zygote; in the supervisor returns the socket that starts are sent on, and the zygote's pid."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            for descriptor in close:
                os.close(descriptor)
            run(theirs)
        finally:
            os._exit(1)
    theirs.close()
    return ours, pid
