"""The processes of one call, as they make themselves known: exec, fork and exit. Runs in the supervisor.

The three are notified and let through (CONTINUE): they carry no destination, so nothing is decided by what a process
says of itself. A fork alone may be refused, where the call has as many processes as it may have; that goes by counting.

- *exec*: its record is journaled before it proceeds. Whether it then happened is known only when the process is heard
  of again (:class:`_Attempt`): looking for a program along PATH makes many attempts, and most of them fail.
- *fork*: nobody is told the number of the child; it is learnt when the child is heard of, with its parent.
- *exit*: CPU time and memory are read while there is still something to read.

A process that a signal ends is heard of by its pidfd. A caller can flood all this: records are bounded, calls counted.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, NamedTuple

from ray_guard.compute import tree
from ray_guard.compute.ledger import Entry, Grants, Ledger
from ray_guard.evidence.journal import JournalError
from ray_guard.kernel import pidfd, procfs
from ray_guard.policy.budgets import Exceeded, Scope
from ray_guard.records import AttributeValue, SpanKind, SpanRecord, StatusCode
from ray_guard.supervisor.arguments import Arguments, Memory, runnable
from ray_guard.supervisor.target import Origin, Target, new_span_id

if TYPE_CHECKING:
    from ray_guard.egress.gate import Gate, Handler
    from ray_guard.kernel.seccomp import Notification
    from ray_guard.policy.decide import CompiledPolicy
    from ray_guard.supervisor.node import Node

log = logging.getLogger("ray_guard.processes")

CPU: Final = "cpu_seconds"
MEMORY: Final = "memory"
PROCESSES: Final = "processes"

SPANS_LIMIT: Final = 4096
"""Process spans of one call. Further ones are counted: their number stands on the span of the call's first process."""
SAMPLE_S: Final = 0.05
_CONFIRM_S: Final = 0.01
_GRANT_PATIENCE_S: Final = 0.05
"""How long a granted fork may take until its child is there to be counted."""
_KNOWN_LIMIT: Final = 4096
_AT_EMPTY_PATH: Final = 0x1000
_AT_FDCWD: Final = -100 & 0xFFFFFFFF
_NS: Final = 1_000_000_000


class _Attempt(NamedTuple):
    """An exec that was let through."""

    path: str
    arguments: Arguments
    token: tuple[bytes, ...]
    """The process's before: it is another afterwards if the exec has happened."""
    span: str
    parent: str
    began: int
    recorded: bool
    cpu_ns: int


@dataclass(slots=True, eq=False)
class Process:
    """One process. ``origin`` is what its connections are put down to: the call, below the process's own span."""

    entry: Entry
    parent: Process | None
    parent_pid: int
    pidfd: int
    origin: Origin
    image: _Attempt | None = None
    attempt: _Attempt | None = None
    forks: int = 0


@dataclass(slots=True)
class Usage:
    """What a call has used."""

    made: int = 0
    executed: int = 0
    unrecorded: int = 0
    cpu_seconds: float = 0.0
    exact: bool = True
    peak_memory: int = 0
    told: set[str] = field(default_factory=set)
    """Limits whose violation is in the journal."""


class Processes:
    """See the module.

    Args:
        node, target, policy: whose they are, and the limits.
        origin: the call, below the span of its first process.
        root: that process, forked, filtered and about to execute what was asked for.
        end_call: ends the call; told why.
    """

    def __init__(
        self,
        node: Node,
        target: Target,
        policy: CompiledPolicy,
        origin: Origin,
        root: int,
        end_call: Callable[[str], None],
    ) -> None:
        self._node = node
        self._target = target
        self._origin = origin
        self._end_call = end_call
        self._limit = _limit(policy, PROCESSES)
        self._memory = _limit(policy, MEMORY)
        self._counts_cpu = origin.account.limits_any((CPU,))
        self._ledger = Ledger(tracks_births=self._counts_cpu)
        self.usage = Usage()
        self._grants = Grants(_GRANT_PATIENCE_S)
        self._waiting: list[Notification] = []
        self._gate: Gate | None = None
        self._closed = False
        self._known: dict[int, Process] = {}
        self._threads: dict[int, Process] = {}
        self._leaving: dict[int, int] = {}
        self._adopted: dict[int, Process] = {}
        image = procfs.image(root)
        self._leader = 0 if image is None else image.parent
        self._birth = () if image is None else image.token
        """The first process's, before it has executed anything: what it tries until then is the start itself."""
        self._base_ns = pidfd.cpu_ns(root) or 0
        entry = Entry(root, 0 if image is None else image.start_time, time.monotonic(), self._base_ns)
        self._root = self._known[root] = Process(entry, None, target.pid, -1, origin)
        self._samples = self._counts_cpu or self._memory is not None
        if self._samples:
            node.loop.later(SAMPLE_S, self._sample)

    @property
    def handlers(self) -> Mapping[str, Handler]:
        """For the gate."""
        return {
            "execve": self._execve,
            "execveat": self._execveat,
            "clone": self._fork,
            "fork": self._fork,
            "vfork": self._fork,
            "exit_group": self._exit,
        }

    def origin_of(self, tid: int) -> Origin:
        """What a call of thread ``tid`` is put down to: its process, where that is known."""
        process = self._known.get(tid) or self._threads.get(tid) or self._find(tid)
        if process is None:
            return self._origin
        if process.attempt is not None:
            self._settle(process, procfs.image(process.entry.pid))
        return process.origin

    # -- who calls -----------------------------------------------------------------------------------------------------

    def _find(self, tid: int) -> Process | None:
        """The process of a thread that is not known yet; None: it is leaving, or gone."""
        descriptor = pidfd.opened(tid)
        if descriptor < 0:  # a thread that leads no process
            pid = procfs.thread_group(tid)
            if pid is None:
                return None
            process = self._known.get(pid)
            if process is None and pid != tid:
                process = self._find(pid)
            if process is not None:
                if len(self._threads) >= _KNOWN_LIMIT:
                    self._threads.clear()
                self._threads[tid] = process
            return process
        image = procfs.image(tid)
        if image is None or self._leaving.get(tid) == image.start_time:
            os.close(descriptor)
            return None
        return self._add(tid, image, descriptor)

    def _add(self, pid: int, image: procfs.Image, descriptor: int) -> Process:
        parent = self._adopted.pop(pid, None) or self._known.get(image.parent)
        entry = self._ledger.seen(pid, image.start_time, time.monotonic())
        origin = self._origin
        if parent is not None:
            if parent.attempt is not None:
                self._settle(parent, procfs.image(parent.entry.pid))
            origin = parent.origin
        process = Process(entry, parent, image.parent, -1, origin)
        if len(self._known) < _KNOWN_LIMIT:
            process.pidfd = descriptor
            self._node.loop.watch(descriptor, select.EPOLLIN, lambda _events: self._died(process))
        else:  # how it ends is then known only if it says so itself
            os.close(descriptor)
        if len(self._known) >= 4 * _KNOWN_LIMIT:
            self._forget_dead()
        self._known[pid] = process
        return process

    def _forget(self, process: Process) -> None:
        pid = process.entry.pid
        if self._known.get(pid) is process:
            del self._known[pid]
        if self._threads:
            self._threads = {tid: other for tid, other in self._threads.items() if other is not process}
        if process.pidfd >= 0:
            self._node.loop.forget(process.pidfd)
            os.close(process.pidfd)
            process.pidfd = -1

    def _forget_dead(self) -> None:
        for process in list(self._known.values()):
            if process.pidfd < 0 and process is not self._root and procfs.start_time(process.entry.pid) is None:
                self._died(process)

    # -- exec ----------------------------------------------------------------------------------------------------------

    def _execve(self, gate: Gate, call: Notification) -> None:
        self._executes(gate, call, call.arg0, call.arg1, "cwd")

    def _execveat(self, gate: Gate, call: Notification) -> None:
        number = call.arg0 & 0xFFFFFFFF
        folder = "cwd" if number == _AT_FDCWD else f"fd/{number}"
        self._executes(gate, call, call.arg1, call.arg2, folder)

    def _executes(self, gate: Gate, call: Notification, path: int, array: int, folder: str) -> None:
        tid = call.pid
        process = self._known.get(tid) or self._threads.get(tid) or self._find(tid)
        image = None if process is None else procfs.image(process.entry.pid)
        if process is None or image is None or (process is self._root and image.token == self._birth):
            gate.listener.proceed(call.id)
            return
        self._grants.done(tid)
        if process.attempt is not None:
            self._settle(process, image)
        with Memory(tid) as memory:
            name = memory.path(path)
            arguments = None if name is None else memory.arguments(array)
        if name is not None and arguments is not None and gate.listener.is_valid(call.id):
            if not name and folder.startswith("fd/"):
                name = _link(f"/proc/{tid}/{folder}")
            attempt = _Attempt(
                name,
                arguments,
                image.token,
                new_span_id(),
                self._parent_span(process),
                time.time_ns(),
                self.usage.executed - self.usage.unrecorded < SPANS_LIMIT and runnable(tid, name, folder),
                pidfd.cpu_ns(process.entry.pid) or process.entry.cpu_ns,
            )
            process.attempt = attempt
            if attempt.recorded:
                self._write(process, attempt)
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
        if image is not None and image.token == attempt.token:
            if attempt.recorded:  # there was a program, and the kernel would not run it
                self._write(process, attempt, ended=time.time_ns(), error="exec failed")
            return
        self.usage.executed += 1
        before, process.image = process.image, attempt
        if before is not None:
            self._write_end(process, before, attempt.cpu_ns, attempt.began)
        if not attempt.recorded:
            if self.usage.executed - self.usage.unrecorded > SPANS_LIMIT:
                self.usage.unrecorded += 1
                process.image = None
                return
            process.image = attempt = attempt._replace(recorded=True)
            self._write(process, attempt)
        process.origin = replace(self._origin, parent_id=attempt.span)

    # -- fork ----------------------------------------------------------------------------------------------------------

    def _fork(self, gate: Gate, call: Notification) -> None:
        now = time.monotonic()
        process = self._known.get(call.pid) or self._threads.get(call.pid) or self._find(call.pid)
        if process is not None:
            process.forks += 1
        if self._limit is not None:
            self._grants.done(call.pid)
            if self._ledger.live >= self._limit.amount:
                if self._limit.watched:
                    self._exceeded(PROCESSES, self._ledger.live + 1)
                else:
                    self._gate = gate
                    self._waiting.append(call)
                    if len(self._waiting) == 1:
                        self._confirm()
                    return
            self._grants.begin(call.pid, now)
        self._ledger.granted(now)
        gate.listener.proceed(call.id)

    def _confirm(self) -> None:
        """There seem to be too many processes: counts them, and answers the forks that wait for it."""
        gate, limit = self._gate, self._limit
        if self._closed or gate is None or limit is None or not self._waiting:
            self._waiting.clear()
            return
        live = tree.count(self._leader)
        now = time.monotonic()
        for call in list(self._waiting):
            pending = self._grants.pending(now)
            if live >= limit.amount:
                self._waiting.remove(call)
                gate.refuse(call, errno.EAGAIN)
                self._exceeded(PROCESSES, live + 1)
            elif live + pending < limit.amount:
                self._waiting.remove(call)
                if gate.listener.is_valid(call.id):
                    self._ledger.granted(now)
                    self._grants.begin(call.pid, now)
                    gate.listener.proceed(call.id)
        self._ledger.counted(live + self._grants.pending(now))
        if self._waiting:  # a fork that was granted has not shown its child: soon it has, or there is none
            self._node.loop.later(_CONFIRM_S, self._confirm)

    # -- exit ----------------------------------------------------------------------------------------------------------

    def _exit(self, gate: Gate, call: Notification) -> None:
        tid = call.pid
        process = self._known.get(tid) or self._threads.get(tid) or self._find(tid)
        if process is None:
            gate.listener.proceed(call.id)
            return
        pid = process.entry.pid
        self._grants.done(tid)
        if process.attempt is not None:
            self._settle(process, procfs.image(pid))
        cpu = pidfd.cpu_ns(pid)
        peak = 0
        if process.image is not None or process is self._root:
            peak = procfs.peak_resident(pid)
            self.usage.peak_memory = max(self.usage.peak_memory, peak)
        if process.image is not None:
            status = (call.arg0 & 0xFF) << 8
            self._write_end(process, process.image, cpu, time.time_ns(), status=status, peak=peak)
            process.image = None
        if process.forks:
            self._adopt(process)
        if len(self._leaving) >= _KNOWN_LIMIT:
            for old in list(self._leaving)[: _KNOWN_LIMIT // 2]:
                del self._leaving[old]
        self._leaving[pid] = process.entry.born
        self._forget(process)
        charged = self._ledger.ended(process.entry, cpu, time.monotonic(), notified=True)
        gate.listener.proceed(call.id)
        self._charge(charged)

    def _adopt(self, process: Process) -> None:
        """Whose the children were that it leaves behind: from now on /proc says the leader's."""
        for pid in procfs.children(process.entry.pid):
            child = self._known.get(pid)
            if child is None and len(self._adopted) < _KNOWN_LIMIT:
                self._adopted[pid] = process

    def _died(self, process: Process) -> None:
        """It has ended without saying so: by a signal."""
        pid = process.entry.pid
        ended = time.time_ns()
        cpu = pidfd.cpu_ns(pid) if procfs.start_time(pid) == process.entry.born else None
        measured = cpu if cpu is not None or self._counts_cpu else process.entry.cpu_ns
        status = pidfd.exit_status(process.pidfd, pid) if process.pidfd >= 0 else None
        if process.attempt is not None:
            self._settle(process, None)
        if process.image is not None:
            self._write_end(process, process.image, cpu, ended, status=status, asked=True)
            process.image = None
        self._forget(process)
        # Where no limit asks for samples the kernel's own sum at the end covers it: see close().
        self._charge(self._ledger.ended(process.entry, measured, time.monotonic(), notified=True))

    # -- measuring -----------------------------------------------------------------------------------------------------

    def _sample(self) -> None:
        if self._closed:
            return
        began = time.monotonic()
        pids = set(tree.members(self._leader))
        for pid in pids:
            if pid not in self._known:
                self._find(pid)
        now = time.monotonic()
        charged = 0
        for process in list(self._known.values()):
            cpu = pidfd.cpu_ns(process.entry.pid)
            if cpu is not None:
                charged += self._ledger.measured(process.entry, cpu, now)
        if self._counts_cpu:
            charged += self._ledger.charge_unseen(began - _CONFIRM_S, now)
        self._charge(charged)
        if self._memory is not None:
            held = tree.memory(pids, int(self._memory.amount))
            self.usage.peak_memory = max(self.usage.peak_memory, held)
            if held > self._memory.amount:
                self._exceeded(MEMORY, held)
        self._node.loop.later(SAMPLE_S, self._sample)

    def _charge(self, cpu_ns: int) -> None:
        if cpu_ns:
            exceeded = self._origin.account.charge(CPU, cpu_ns / _NS)
            if exceeded is not None:
                self._violated(exceeded)

    def _exceeded(self, kind: str, value: float) -> None:
        limit = {PROCESSES: self._limit, MEMORY: self._memory}[kind]
        if limit is not None:
            source = self._origin.account.source
            self._violated(Exceeded(kind, value, limit.amount, Scope.CALL, source, report_only=limit.watched))

    def _violated(self, exceeded: Exceeded) -> None:
        """Says so once, and ends the call where refusing cannot help."""
        if exceeded.kind in self.usage.told or self._closed:
            return
        self.usage.told.add(exceeded.kind)
        try:
            self._target.exceeded(self._origin, self._origin.parent_id, exceeded)
        except JournalError:
            log.exception("a violation could not be journaled")
        if exceeded.kind != PROCESSES and not exceeded.report_only:
            self._end_call(spelled(exceeded))

    # -- the end -------------------------------------------------------------------------------------------------------

    def close(self, cpu_seconds: float = 0.0, peak_memory: int = 0) -> Usage:
        """The call's tree is dead.

        Args:
            cpu_seconds, peak_memory: what the kernel told of those that were waited for.
        """
        for process in list(self._known.values()):
            if process is not self._root or process.image is not None or process.attempt is not None:
                self._died(process)
        self._charge(self._ledger.settle(int(cpu_seconds * _NS) - self._base_ns))
        self._closed = True
        self._known.clear()
        usage = self.usage
        usage.made = self._ledger.made
        usage.cpu_seconds = self._ledger.cpu_seconds
        usage.exact = self._ledger.exact
        usage.peak_memory = max(usage.peak_memory, peak_memory)
        return usage

    # -- records -------------------------------------------------------------------------------------------------------

    def _write_end(
        self,
        process: Process,
        image: _Attempt,
        cpu_ns: int | None,
        ended: int,
        *,
        status: int | None = None,
        peak: int = 0,
        asked: bool = False,
    ) -> None:
        more: dict[str, AttributeValue] = {}
        if cpu_ns is not None:
            more["ray_guard.process.cpu_seconds"] = max(0, cpu_ns - image.cpu_ns) / _NS
        elif asked:
            more["ray_guard.process.cpu_seconds"] = max(0, process.entry.cpu_ns - image.cpu_ns) / _NS
            more["ray_guard.process.cpu_exact"] = False
        if peak:
            more["ray_guard.process.peak_memory"] = peak
        if status is not None:
            more |= exit_attributes(status)
        elif asked:
            more["ray_guard.process.exit"] = "unknown"
        self._write(process, image, ended=ended, more=more)

    def _write(
        self,
        process: Process,
        image: _Attempt,
        *,
        ended: int | None = None,
        more: Mapping[str, AttributeValue] | None = None,
        error: str = "",
    ) -> None:
        attributes: dict[str, AttributeValue] = {
            "process.pid": process.entry.pid,
            "process.parent_pid": process.parent_pid if process.parent is None else process.parent.entry.pid,
            "process.executable.path": image.path,
            "process.command_args": image.arguments.shown,
        }
        if image.arguments.digest:
            attributes["ray_guard.arguments.sha256"] = image.arguments.digest
        if more:
            attributes.update(more)
        failed = bool(error) or attributes.get("process.exit.code", 0) != 0
        record = SpanRecord(
            trace_id=self._origin.trace_id,
            span_id=image.span,
            parent_id=image.parent,
            name=f"process {os.path.basename(image.path)[:128]}",
            kind=SpanKind.INTERNAL,
            start_ns=image.began,
            end_ns=ended,
            attributes=attributes,
            status=StatusCode.ERROR if failed else StatusCode.UNSET,
            status_message=error,
        )
        try:
            self._target.write(record, self._origin.identity)
        except JournalError:
            log.exception("a process could not be journaled")
            if ended is None:
                raise


class _Limit(NamedTuple):
    amount: float
    watched: bool


def _limit(policy: CompiledPolicy, kind: str) -> _Limit | None:
    for limits, watched in ((policy.limits(Scope.CALL), False), (policy.watched(Scope.CALL), True)):
        if kind in limits:
            return _Limit(limits[kind], watched)
    return None


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def exit_attributes(status: int) -> dict[str, AttributeValue]:
    """How a process ended, from what waitpid gave: as a shell counts it, and by which signal."""
    code = os.waitstatus_to_exitcode(status)
    found: dict[str, AttributeValue] = {"process.exit.code": 128 - code if code < 0 else code}
    if code < 0:
        found["process.exit.signal"] = -code
    return found


def spelled(exceeded: Exceeded) -> str:
    """Why a call was ended, in a line."""
    return f"{exceeded.scope.value} budget: {exceeded.kind} {exceeded.value:g} of {exceeded.limit:g}"
