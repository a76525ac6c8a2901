"""The processes of one call, as they make themselves known: by exec and exit. Runs in the supervisor.

Both are notified and let through (CONTINUE): they carry no destination, and nothing is decided by what a process says
of itself.

- *exec*: what is to be executed is read before it proceeds. Whether it then happened is known only when the process is
  heard of again (:class:`_Attempt`): looking for a program along PATH makes many attempts, and most of them fail.
- *exit*: CPU time and memory are read while there is still something to read.

The beginning of a span is written before the exec goes on: what a supervisor that is killed takes along is no exec.
Where the journal takes no more, an exec is refused until it does. Whoever lives on is looked at a few milliseconds
later (:meth:`Processes._look`), or before anything is put down to it.

A process that a signal ends is heard of by its pidfd; who its parent was is learnt when it is first heard of.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Final

from ray_guard.compute.ledger import Entry
from ray_guard.evidence.journal import JournalError
from ray_guard.ids import new_span_id
from ray_guard.kernel import pidfd, procfs
from ray_guard.log import logger
from ray_guard.named import NamedTuple
from ray_guard.supervisor.arguments import read_command, runnable
from ray_guard.supervisor.leaf import Leaf
from ray_guard.supervisor.limits import Limits, now
from ray_guard.supervisor.memory_group import MemoryGroup
from ray_guard.supervisor.process_spans import Image, OpenImage, ProcessSpans
from ray_guard.supervisor.target import Origin, Target

if TYPE_CHECKING:
    from ray_guard.egress.gate import Gate, Handler
    from ray_guard.kernel.seccomp import Notification
    from ray_guard.policy.budgets import Exceeded
    from ray_guard.supervisor.node import Node

log = logger("ray_guard.processes")

_KNOWN_LIMIT: Final = 4096
_WATCHED_LIMIT: Final = 256
"""How many processes of a call are watched by a pidfd: descriptors are for all calls. The others are looked for."""
_ROUND_S: Final = 0.016
"""After so long at most what has ended is written; after one to two of them a new process, or program, is looked at."""
_ENDING_LIMIT: Final = 64
"""Each holds two descriptors until its end is written."""
_NS: Final = 1_000_000_000
_TICK_S: Final = 1 / os.sysconf("SC_CLK_TCK")
_FAR: Final = 1 << 24
"""Bytes: no library that makes system calls is that large."""
_AT_FDCWD: Final = -100 & 0xFFFFFFFF


class _Attempt:
    """An exec that was let through.

    Attributes:
        at: where the call was made: the instruction's address.
        there: there is a program to execute.
        begun: its span, once that has begun.
    """

    __slots__ = ("at", "begun", "image", "there")

    def __init__(self, image: Image, at: int, *, there: bool) -> None:
        self.image = image
        self.at = at
        self.there = there
        self.begun: OpenImage | None = None


class Process:
    """One process.

    Attributes:
        pidfd: -1 where it has none.
        watched: that one is, by the loop.
        forked: it has executed nothing yet.
        program: where it has: tells that from the next one (see procfs.program); empty: it was not asked for yet.
        ending: it has said so and is in :attr:`Processes._ending`.
        span: what is put down to it hangs under this one: of its own program, or of the one that forked it.
        image: its own program, where that has a span.
        origin: the call, below that span; made when first asked for.
    """

    __slots__ = (
        "attempt",
        "ending",
        "entry",
        "forked",
        "image",
        "origin",
        "parent",
        "parent_pid",
        "pidfd",
        "program",
        "span",
        "watched",
    )

    def __init__(self, entry: Entry, parent: Process | None, parent_pid: int, span: str) -> None:
        self.entry = entry
        self.parent = parent
        self.parent_pid = parent_pid
        self.pidfd = -1
        self.forked = True
        self.program = b""
        self.span = span
        self.watched = False
        self.ending = False
        self.origin: Origin | None = None
        self.image: OpenImage | None = None
        self.attempt: _Attempt | None = None


class _End(NamedTuple):
    """A process has said that it ends, and was let go.

    Attributes:
        executed: what it attempted last.
        cpu_ns: its clock by then; None: nobody could read it.
        peak: bytes of resident memory it had at most; 0: it has no span.
        read: the descriptor that this was read from; -1: none.
        at: Unix time in nanoseconds.
    """

    process: Process
    executed: bool
    cpu_ns: int | None
    status: int
    peak: int
    read: int
    at: int


class Usage(NamedTuple):
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
        root: that process. It has just executed what was asked for.
        leader: the one above it.
        end_call: ends the call; told which limit it passed.
        base_ns: CPU time the root had used before it executed.
        leaf, pages: the control groups they are all in; None: there is none.
    """

    def __init__(
        self,
        node: Node,
        target: Target,
        origin: Origin,
        *,
        root: int,
        leader: int,
        end_call: Callable[[Exceeded], None],
        base_ns: int,
        leaf: Leaf | None,
        pages: MemoryGroup | None,
    ) -> None:
        self.handlers: Mapping[str, Handler] = {
            "execve": self._execute,
            "execveat": self._execute_at,
            "exit_group": self._exit_always,
        }
        """For the gate."""
        self._loop = node.loop
        self._target = target
        self._origin = origin
        self._end_call = end_call
        self._spans = ProcessSpans(target, origin)
        self._executed = 0
        self._peak_memory = 0
        self._paths: set[bytes] = set()
        self._told: set[tuple[str, bool]] = set()
        self._closed = False
        self._known: dict[int, Process] = {}
        self._threads: dict[int, Process] = {}
        self._watched = 0
        self._new: list[Process] = []
        """Who was not looked at yet, since before the last round."""
        self._newest: list[Process] = []
        """And since then. Most are gone by the time that it would be their turn."""
        self._due = False
        self._ending: deque[_End] = deque()
        """Whose records are still to be written: a handful at once takes a third of what each takes by itself."""
        self._ended: dict[int, float] = {}
        """When a process has ended, or has said so: /proc shows it for a while yet."""
        self._orphans: dict[int, Process] = {}
        """Whose child a process was that has lost its parent before it was heard of."""
        self._base_ns = base_ns
        entry = Entry(root, 0, now(), base_ns)
        self._root = self._known[root] = Process(entry, None, target.pid, origin.parent_id or "")
        self._root.origin = origin
        self._root.forked = False
        self._limits = Limits(
            node.loop,
            node.census,
            origin.account,
            root=root,
            leader=leader,
            passed=self._passed,
            living=self._living,
            leaf=leaf,
            pages=pages,
        )

    def origin_of(self, tid: int) -> Origin:
        """What a call of thread ``tid`` is put down to: its process, where that is known."""
        process = self._find(tid)
        if process is None:
            return self._origin
        self._ask(process)
        if process.origin is None:
            process.origin = self._origin._replace(parent_id=process.span)
        return process.origin

    def has(self, span: str) -> bool:
        """Whether that is the span of a program of a process that lives."""
        return any(process.span == span for process in self._known.values())

    # -- who calls -----------------------------------------------------------------------------------------------------

    def _find(self, tid: int) -> Process | None:
        """The process of a thread; None: it is leaving, or gone."""
        process = self._known.get(tid) or self._threads.get(tid)
        if process is not None:
            if not process.ending:
                return process
            self._write_ends()  # its number may be another's by now
        descriptor = pidfd.opened(tid)
        if descriptor < 0 and (pid := procfs.thread_group(tid)) != tid:
            process = None if pid is None else self._find(pid)
            if process is not None:
                if len(self._threads) >= _KNOWN_LIMIT:
                    self._threads.clear()
                self._threads[tid] = process
            return process
        if tid in self._ended and (procfs.start_time(tid) or 0) * _TICK_S < self._ended[tid]:
            if descriptor >= 0:
                os.close(descriptor)
            return None
        return self._add(tid, descriptor)

    def _add(self, pid: int, descriptor: int) -> Process:
        parent_pid = pidfd.parent(descriptor) or procfs.parent(pid) or 0
        parent = self._orphans.pop(pid, None) or self._known.get(parent_pid)
        if self._limits.ledger.bounds:
            entry = self._limits.ledger.enter(pid, procfs.start_time(pid) or 0)
            entry.heir = parent is None or procfs.ignores(parent_pid, signal.SIGCHLD)
        else:
            entry = self._limits.ledger.enter(pid)
        if parent is not None:
            self._ask(parent)
        above = self._root if parent is None else parent
        process = Process(entry, parent, parent_pid, above.span)
        if descriptor >= 0 and self._watched < _WATCHED_LIMIT:
            self._watched += 1
            process.pidfd = descriptor
            self._look_later(process)
        elif descriptor >= 0:
            os.close(descriptor)
        if len(self._known) >= _KNOWN_LIMIT:
            self._forget_dead()
        self._known[pid] = process
        return process

    def _forget(self, process: Process, ended: float) -> None:
        """It has ended, or said so, by then."""
        pid = process.entry.pid
        if len(self._ended) >= _KNOWN_LIMIT:
            for old in list(self._ended)[: _KNOWN_LIMIT // 2]:
                del self._ended[old]
        self._ended[pid] = ended
        if self._known.get(pid) is process:
            del self._known[pid]
        if self._threads:
            self._threads = {tid: other for tid, other in self._threads.items() if other is not process}
        if process.pidfd >= 0:
            self._watched -= 1
            self._unwatch(process)
            os.close(process.pidfd)
            process.pidfd = -1

    def _unwatch(self, process: Process) -> None:
        if process.watched:
            process.watched = False
            self._loop.forget(process.pidfd)

    def _forget_dead(self) -> None:
        for process in list(self._known.values()):
            if process.pidfd < 0 and not process.ending and procfs.parent(process.entry.pid) is None:
                self._died(process)

    def _look_later(self, process: Process) -> None:
        if not self._due:
            self._come_round()
        self._newest.append(process)

    def _come_round(self) -> None:
        self._due = True
        self._loop.later(_ROUND_S, self._round)

    def _round(self) -> None:
        """What can wait: one waking for many."""
        self._due = False
        new, self._new, self._newest = self._new, self._newest, []
        if self._new:
            self._come_round()
        self._write_ends()
        self._look(new)
        self._spans.write()

    def _look(self, new: list[Process]) -> None:
        """What was new a few milliseconds ago and is still there: its end is watched for."""
        for process in new:
            if process.ending or self._known.get(process.entry.pid) is not process:
                continue
            if process.pidfd >= 0 and not process.watched:
                self._watch(process)
            attempt = process.attempt
            if attempt is None:
                continue
            if self._now_runs_another(process):
                self._settle(process, executed=True)
            elif attempt.there and attempt.begun is None:  # the kernel may be about to
                attempt.begun = self._began(attempt.image)

    def _watch(self, process: Process) -> None:
        process.watched = True
        self._loop.watch(process.pidfd, select.EPOLLIN, lambda _events: self._died(process))

    def _living(self, pids: list[int]) -> Iterable[Entry]:
        for pid in pids:
            if pid not in self._known:
                self._find(pid)
        if self._watched >= _WATCHED_LIMIT:
            self._forget_dead()
        return [process.entry for process in self._known.values()]

    # -- exec ----------------------------------------------------------------------------------------------------------

    def _execute(self, gate: Gate, call: Notification) -> None:
        self._let_execute(gate, call, (call.arg0, call.arg1), "cwd")

    def _execute_at(self, gate: Gate, call: Notification) -> None:
        number = call.arg0 & 0xFFFFFFFF
        self._let_execute(gate, call, (call.arg1, call.arg2), "cwd" if number == _AT_FDCWD else f"fd/{number}")

    def _let_execute(self, gate: Gate, call: Notification, pointers: tuple[int, int], folder: str) -> None:
        """``pointers``: to the path and to the arguments. ``folder``: what a relative path starts from (runnable)."""
        process = self._find(call.pid)
        attempt = None
        if process is not None:
            self._ask(process)
            attempt = process.attempt = self._attempt(gate, call, process, pointers, folder)
            if attempt is not None and attempt.there:
                attempt.begun = self._spans.begin(attempt.image)  # or it does not happen
        gate.listener.proceed(call.id)
        if process is not None and attempt is not None and self._newest[-1:] != [process]:
            self._look_later(process)

    def _attempt(
        self, gate: Gate, call: Notification, process: Process, pointers: tuple[int, int], folder: str
    ) -> _Attempt | None:
        """What a process is about to execute; None: that cannot be read, and the kernel will say so."""
        tid, pid = call.pid, process.entry.pid
        command = read_command(tid, *pointers)  # by number: whose memory it was is certain only if it still waits
        if command is None or not gate.listener.is_valid(call.id):
            return None
        if not command.path and folder != "cwd":
            command = command._replace(path=_link(f"/proc/{tid}/{folder}"))
        if not process.forked and not process.program:
            process.program = procfs.program(pid)
        parent = process.parent
        if parent is not None and parent.ending:
            self._write_ends()
        image = Image(
            pid,
            process.parent_pid if parent is None else parent.entry.pid,
            command.program(),
            new_span_id(),
            (self._root if parent is None else parent).span,
            time.time_ns(),
            pidfd.cpu_ns(pid) or process.entry.cpu_ns,
        )
        there = not self._spans.full and self._is_there(tid, command.path, folder)
        return _Attempt(image, call.instruction_pointer, there=there)

    def _is_there(self, tid: int, path: bytes, folder: str) -> bool:
        """Whether there is a program at ``path``: one that was there before, most often."""
        if path in self._paths:
            return True
        there = runnable(tid, os.fsdecode(path), folder)
        if there and path[:1] == b"/" and len(self._paths) < _KNOWN_LIMIT:
            self._paths.add(path)
        return there

    def _ask(self, process: Process) -> None:
        """Something is going to be put down to it: what it executes must be known, and its span have begun."""
        if process.ending:
            self._write_ends()
        elif process.attempt is not None:
            executed = self._now_runs_another(process)
            self._settle(process, executed=process.attempt.there if executed is None else executed)
            self._spans.write()

    def _now_runs_another(self, process: Process) -> bool | None:
        """Whether it has executed something since its last attempt; None: it is gone, or unreadable."""
        if process.forked:
            return procfs.has_executed(process.entry.pid)
        program = procfs.program(process.entry.pid)
        return program != process.program if program else None

    def _has_executed(self, process: Process, attempt: _Attempt, at: int) -> bool:
        """Whether a process that is about to end, by a call made ``at`` there, has executed what it attempted.

        Both calls are the same library's, so where they are far apart another program is loaded. (A process can make
        it look like that, as it can execute what it likes.) Where they are not, addresses may not be random.
        """
        return abs(at - attempt.at) >= _FAR or self._now_runs_another(process) is not False

    def _settle(self, process: Process, *, executed: bool, ends: bool = False) -> None:
        """The process's last exec has happened, or has not. ``ends``: it is ending, and its span with it."""
        attempt = process.attempt
        if attempt is None:
            return
        process.attempt = None
        if not executed:
            if attempt.there:  # there was a program, and the kernel would not run it
                begun = attempt.begun or self._spans.open(attempt.image)
                if begun is not None:
                    self._spans.end(begun, time.time_ns(), None, lost="it was not executed")
            return
        self._executed += 1
        process.forked = False
        process.program = b""
        if process.image is not None:
            self._spans.end(process.image, attempt.image.began, attempt.image.cpu_ns)
        process.image = attempt.begun or (self._spans.open if ends else self._began)(attempt.image)
        if process.image is not None:
            process.span = attempt.image.span
            process.origin = None

    def _began(self, image: Image) -> OpenImage | None:
        try:
            return self._spans.began(image)
        except JournalError:
            log.exception("a process could not be journaled")
            return None

    # -- exit ----------------------------------------------------------------------------------------------------------

    def _exit_always(self, gate: Gate, call: Notification) -> None:
        try:
            self._exit(gate, call)
        except Exception:  # one that were refused would crash: nothing comes after it in any C library
            gate.listener.proceed(call.id)
            raise

    def _exit(self, gate: Gate, call: Notification) -> None:
        process = self._find(call.pid)
        if process is None:
            gate.listener.proceed(call.id)
            return
        pid = process.entry.pid
        cpu = pidfd.cpu_ns(pid)
        attempt = process.attempt
        executed = attempt is not None and self._has_executed(process, attempt, call.instruction_pointer)
        peak, read = procfs.peak_resident(pid) if process.image is not None or executed else (0, -1)
        if not procfs.is_youngest(pid):
            for child in procfs.children(pid, pid):
                if child not in self._known and len(self._orphans) < _KNOWN_LIMIT:
                    self._orphans[child] = process
        gate.listener.proceed(call.id)
        process.ending = True
        self._ending.append(_End(process, executed, cpu, (call.arg0 & 0xFF) << 8, peak, read, time.time_ns()))
        self._unwatch(process)
        if not self._due:
            self._come_round()
        if process is self._root or len(self._ending) >= _ENDING_LIMIT:
            self._write_ends()
        if process is self._root:  # what is left is killed next: the later it is measured, the less is a bound
            self._limits.measure()

    def _write_ends(self) -> None:
        """Of those that were let go, a few milliseconds ago at most."""
        boot = now() - time.time_ns() / _NS
        while self._ending:
            process, executed, cpu, status, peak, read, at = self._ending.popleft()
            if read >= 0:
                os.close(read)
            self._forget(process, boot + at / _NS)
            process.ending = False
            self._settle(process, executed=executed, ends=True)
            if process.image is not None:
                self._peak_memory = max(self._peak_memory, peak)
                self._spans.end(process.image, at, cpu, status=status, peak=peak)
            self._limits.exited(process.entry, cpu)
        self._spans.write()

    def _died(self, process: Process) -> None:
        """It has ended without saying so: by a signal, for the most part."""
        pid, ended = process.entry.pid, time.time_ns()
        cpu = pidfd.cpu_ns(pid) if process.pidfd >= 0 else None
        if process.attempt is not None:  # nobody can tell
            self._settle(process, executed=process.attempt.there, ends=True)
        if process.image is not None:
            status = pidfd.exit_status(process.pidfd, pid) if process.pidfd >= 0 else None
            lost = "its end was not seen" if status is None else "it was ended from outside"
            self._spans.end(process.image, ended, cpu, status=status, lost=lost)
        self._spans.write()
        self._forget(process, now())
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
        self._write_ends()
        self._limits.look_last()
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


def _link(path: str) -> bytes:
    try:
        return os.readlink(path.encode())
    except OSError:
        return b""
