"""The processes of one call, as they make themselves known: by exec and exit. Runs in the supervisor.

Both are notified and let through (CONTINUE): they carry no destination, and nothing is decided by what a process says
of itself.

- *exec*: its record is journaled before it proceeds. Whether it then happened is known only when the process is heard
  of again (:class:`_Attempt`): looking for a program along PATH makes many attempts, and most of them fail.
- *exit*: CPU time and memory are read while there is still something to read.

A process that a signal ends is heard of by its pidfd; who its parent was is learnt when it is first heard of.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, NamedTuple

from ray_guard.compute.ledger import Entry
from ray_guard.evidence.journal import JournalError
from ray_guard.kernel import pidfd, procfs
from ray_guard.supervisor.arguments import Memory, runnable
from ray_guard.supervisor.limits import Limits, now
from ray_guard.supervisor.process_spans import Image, ProcessSpans
from ray_guard.supervisor.target import Origin, Target, new_span_id

if TYPE_CHECKING:
    from ray_guard.egress.gate import Gate, Handler
    from ray_guard.kernel.seccomp import Notification
    from ray_guard.policy.budgets import Exceeded
    from ray_guard.supervisor.node import Node

log = logging.getLogger("ray_guard.processes")

_KNOWN_LIMIT: Final = 4096
_WATCHED_LIMIT: Final = 256
"""How many processes of a call are watched by a pidfd: descriptors are for all calls. The others are looked for."""
_AT_FDCWD: Final = -100 & 0xFFFFFFFF


class _Attempt(NamedTuple):
    """An exec that was let through."""

    image: Image
    token: tuple[bytes, ...]
    """The process's before: it is another afterwards if the exec has happened."""
    recorded: bool


@dataclass(slots=True, eq=False)
class Process:
    """One process.

    Attributes:
        origin: what its connections are put down to: the call, below the span of the process's own program.
        image: that program, where it has a span.
    """

    entry: Entry
    parent: Process | None
    parent_pid: int
    pidfd: int
    origin: Origin
    image: Image | None = None
    attempt: _Attempt | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """What a call's tree has used in all.

    Attributes:
        processes: how many made themselves known.
        left_out: programs that were executed beyond those that have spans.
        cpu_bound_seconds: the part of the CPU time that is an upper bound.
    """

    processes: int
    executed: int
    left_out: int
    cpu_seconds: float
    cpu_bound_seconds: float
    peak_memory: int


class Processes:
    """See the module.

    Args:
        node, target: whose they are.
        origin: the call, below the span of its first process.
        root: that process, forked, filtered and about to execute what was asked for.
        end_call: ends the call; told which limit it passed.
    """

    def __init__(
        self, node: Node, target: Target, origin: Origin, root: int, end_call: Callable[[Exceeded], None]
    ) -> None:
        self._loop = node.loop
        self._target = target
        self._origin = origin
        self._end_call = end_call
        self._spans = ProcessSpans(target, origin)
        self._executed = 0
        self._peak_memory = 0
        self._told: set[tuple[str, bool]] = set()
        self._closed = False
        self._known: dict[int, Process] = {}
        self._threads: dict[int, Process] = {}
        self._watched = 0
        self._ended: dict[int, int] = {}
        """Number and birth of processes that have ended, or have said so: /proc shows them for a while yet."""
        self._orphans: dict[int, Process] = {}
        """Whose child a process was that has lost its parent before it was heard of."""
        image = procfs.image(root)
        self._birth = () if image is None else image.token
        """The first process's, before it has executed anything: what it tries until then is the start itself."""
        self._base_ns = pidfd.cpu_ns(root) or 0
        entry = Entry(root, 0 if image is None else image.start_time, now(), self._base_ns)
        self._root = self._known[root] = Process(entry, None, target.pid, -1, origin)
        leader = 0 if image is None else image.parent
        self._limits = Limits(
            node.loop,
            node.census,
            origin.account,
            root=root,
            leader=leader,
            passed=self._passed,
            living=self._living,
        )

    @property
    def handlers(self) -> Mapping[str, Handler]:
        """For the gate."""
        return {
            "execve": lambda gate, call: self._execute(gate, call, call.arg0, call.arg1, "cwd"),
            "execveat": self._execute_at,
            "exit_group": self._exit,
        }

    def origin_of(self, tid: int) -> Origin:
        """What a call of thread ``tid`` is put down to: its process, where that is known."""
        process = self._find(tid)
        if process is None:
            return self._origin
        if process.attempt is not None:
            self._settle(process, procfs.image(process.entry.pid))
        return process.origin

    # -- who calls -----------------------------------------------------------------------------------------------------

    def _find(self, tid: int) -> Process | None:
        """The process of a thread; None: it is leaving, or gone."""
        process = self._known.get(tid) or self._threads.get(tid)
        if process is not None:
            return process
        descriptor = pidfd.opened(tid)
        if descriptor < 0 and (pid := procfs.thread_group(tid)) != tid:
            process = None if pid is None else self._find(pid)
            if process is not None:
                if len(self._threads) >= _KNOWN_LIMIT:
                    self._threads.clear()
                self._threads[tid] = process
            return process
        image = procfs.image(tid)
        if image is None or self._ended.get(tid) == image.start_time:
            if descriptor >= 0:
                os.close(descriptor)
            return None
        return self._add(tid, image, descriptor)

    def _add(self, pid: int, image: procfs.Image, descriptor: int) -> Process:
        parent = self._orphans.pop(pid, None) or self._known.get(image.parent)
        entry = self._limits.ledger.enter(pid, image.start_time)
        if self._limits.ledger.bounds:
            entry.heir = parent is None or procfs.ignores(image.parent, signal.SIGCHLD)
        if parent is not None and parent.attempt is not None:
            self._settle(parent, procfs.image(parent.entry.pid))
        process = Process(entry, parent, image.parent, -1, self._origin if parent is None else parent.origin)
        if descriptor >= 0 and self._watched < _WATCHED_LIMIT:
            self._watched += 1
            process.pidfd = descriptor
            self._loop.watch(descriptor, select.EPOLLIN, lambda _events: self._died(process))
        elif descriptor >= 0:
            os.close(descriptor)
        if len(self._known) >= _KNOWN_LIMIT:
            self._forget_dead()
        self._known[pid] = process
        return process

    def _forget(self, process: Process) -> None:
        """It has ended, or is just about to."""
        pid = process.entry.pid
        if len(self._ended) >= _KNOWN_LIMIT:
            for old in list(self._ended)[: _KNOWN_LIMIT // 2]:
                del self._ended[old]
        self._ended[pid] = process.entry.born
        if self._known.get(pid) is process:
            del self._known[pid]
        if self._threads:
            self._threads = {tid: other for tid, other in self._threads.items() if other is not process}
        if process.pidfd >= 0:
            self._watched -= 1
            self._loop.forget(process.pidfd)
            os.close(process.pidfd)
            process.pidfd = -1

    def _forget_dead(self) -> None:
        for process in list(self._known.values()):
            if process.pidfd < 0 and procfs.start_time(process.entry.pid) != process.entry.born:
                self._died(process)

    def _living(self, pids: list[int]) -> Iterable[Entry]:
        for pid in pids:
            if pid not in self._known:
                self._find(pid)
        if self._watched >= _WATCHED_LIMIT:
            self._forget_dead()
        return [process.entry for process in self._known.values()]

    # -- exec ----------------------------------------------------------------------------------------------------------

    def _execute_at(self, gate: Gate, call: Notification) -> None:
        number = call.arg0 & 0xFFFFFFFF
        self._execute(gate, call, call.arg1, call.arg2, "cwd" if number == _AT_FDCWD else f"fd/{number}")

    def _execute(self, gate: Gate, call: Notification, path: int, array: int, folder: str) -> None:
        tid = call.pid
        process = self._find(tid)
        image = None if process is None else procfs.image(process.entry.pid)
        if process is not None and image is not None and not (process is self._root and image.token == self._birth):
            if process.attempt is not None:
                self._settle(process, image)
            with Memory(tid) as memory:
                name = memory.path(path)
                arguments = None if name is None else memory.arguments(array)
            if name is not None and arguments is not None and gate.listener.is_valid(call.id):
                if not name and folder != "cwd":
                    name = _link(f"/proc/{tid}/{folder}")
                tried = Image(
                    process.entry.pid,
                    process.parent_pid if process.parent is None else process.parent.entry.pid,
                    name,
                    arguments,
                    new_span_id(),
                    self._parent_span(process),
                    time.time_ns(),
                    pidfd.cpu_ns(process.entry.pid) or process.entry.cpu_ns,
                )
                there = not self._spans.full and runnable(tid, name, folder)
                process.attempt = _Attempt(tried, image.token, there and self._spans.begin(tried))
        gate.listener.proceed(call.id)

    def _parent_span(self, process: Process) -> str:
        """The span of the process that forked this one, else of the call's first."""
        above = process.parent
        return (above.origin.parent_id if above is not None else None) or self._origin.parent_id or ""

    def _settle(self, process: Process, image: procfs.Image | None) -> None:
        """Whether the process's last exec has happened. ``image`` None: the process is gone, so nobody can tell."""
        attempt = process.attempt
        if attempt is None:
            return
        process.attempt = None
        if not attempt.recorded if image is None else image.token == attempt.token:
            if attempt.recorded:  # there was a program, and the kernel would not run it
                self._spans.end(attempt.image, time.time_ns(), None, lost="it was not executed")
            return
        self._executed += 1
        if process.image is not None:
            self._spans.end(process.image, attempt.image.began, attempt.image.cpu_ns)
        process.image = attempt.image if attempt.recorded or self._began(attempt.image) else None
        if process.image is not None:
            process.origin = replace(self._origin, parent_id=process.image.span)

    def _began(self, image: Image) -> bool:
        try:
            return self._spans.begin(image)
        except JournalError:
            log.exception("a process could not be journaled")
            return False

    # -- exit ----------------------------------------------------------------------------------------------------------

    def _exit(self, gate: Gate, call: Notification) -> None:
        process = self._find(call.pid)
        if process is None:
            gate.listener.proceed(call.id)
            return
        pid = process.entry.pid
        if process.attempt is not None:
            self._settle(process, procfs.image(pid))
        cpu = pidfd.cpu_ns(pid)
        if process.image is not None:
            peak = procfs.peak_resident(pid)
            self._peak_memory = max(self._peak_memory, peak)
            status = (call.arg0 & 0xFF) << 8
            self._spans.end(process.image, time.time_ns(), cpu, status=status, peak=peak)
        for child in procfs.children(pid, pid):
            if child not in self._known and len(self._orphans) < _KNOWN_LIMIT:
                self._orphans[child] = process
        self._forget(process)
        gate.listener.proceed(call.id)
        self._limits.exited(process.entry, cpu)
        if process is self._root:  # what is left is killed next: the later it is measured, the less is a bound
            self._limits.measure()

    def _died(self, process: Process) -> None:
        """It has ended without saying so: by a signal, for the most part."""
        pid, ended = process.entry.pid, time.time_ns()
        cpu = pidfd.cpu_ns(pid) if procfs.start_time(pid) == process.entry.born else None
        self._settle(process, None)
        if process.image is not None:
            status = pidfd.exit_status(process.pidfd, pid) if process.pidfd >= 0 else None
            lost = "its end was not seen" if status is None else "it was ended from outside"
            self._spans.end(process.image, ended, cpu, status=status, lost=lost)
        self._forget(process)
        self._limits.exited(process.entry, cpu)

    # -- limits --------------------------------------------------------------------------------------------------------

    def _passed(self, exceeded: Exceeded) -> None:
        """Says so once, and ends the call."""
        key = (exceeded.kind, exceeded.report_only)
        if key in self._told:
            return
        self._told.add(key)
        try:
            self._target.exceeded(self._origin, self._origin.parent_id, exceeded)
        except JournalError:
            log.exception("a violation could not be journaled")
        if not exceeded.report_only and not self._closed:
            self._end_call(exceeded)

    def close(self, cpu_seconds: float = 0.0, peak_memory: int = 0) -> Usage:
        """The call's tree is dead.

        Args:
            cpu_seconds, peak_memory: what the kernel has told of those that were waited for.
        """
        self._closed = True
        for process in list(self._known.values()):
            self._died(process)
        self._limits.close(int(cpu_seconds * 1e9) - self._base_ns)
        ledger = self._limits.ledger
        return Usage(
            1 + ledger.seen,
            self._executed,
            self._spans.left_out,
            ledger.cpu_ns / 1e9,
            ledger.bounded_ns / 1e9,
            max(self._peak_memory, self._limits.peak_memory, peak_memory),
        )


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
