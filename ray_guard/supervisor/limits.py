"""How many processes a call may have, and what memory and CPU time they may take together. Runs in the supervisor.

A fork is refused before it is one too many; memory and CPU time are sampled, and passing them ends the call. All three
are booked in the call's account, and so in its episode's, its actor's and its job's: theirs are limits over several
calls. Where no limit asks for it nothing is counted, nor sampled.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

from ray_guard.compute import tree
from ray_guard.compute.ledger import Entry, Grants, Ledger
from ray_guard.kernel import pidfd, procfs
from ray_guard.policy.budgets import UNLIMITED, Account, Exceeded

if TYPE_CHECKING:
    from ray_guard.egress.gate import Gate, Waiting
    from ray_guard.kernel.seccomp import Notification

CPU: Final = "cpu_seconds"
MEMORY: Final = "memory"
PROCESSES: Final = "processes"
WALL: Final = "wall_seconds"

SAMPLE_MOST_S: Final = 0.25
SAMPLE_LEAST_S: Final = 0.005
"""Between two samples passes as long as the limit cannot be reached in, within these."""
GROWTH: Final = 8 << 30
"""Bytes per second that a tree is taken to grow by at most."""
_CONFIRM_S: Final = 0.01
_PATIENCE_S: Final = 0.25
"""How long a granted fork may take until its child is there to be counted."""
_UNCOUNTED_LIMIT: Final = 64
"""How many forks are granted at most between two countings, for exits that leave a zombie look like an end."""
_COUNT_S: Final = 1.0
_REST: Final = 4
"""How many times as long as it took to count is waited until that is done again."""
_CPUS: Final = os.cpu_count() or 1
_NS: Final = 1_000_000_000


def now() -> float:
    """The ledger's clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Limits:
    """See the module.

    Args:
        loop: the supervisor's.
        account: the call's. One process is reserved there already.
        leader: the process above the tree.
        passed: told of each limit that was passed.
        living: the entries of all processes that live, given the numbers of those in the tree.
    """

    def __init__(
        self,
        loop: Waiting,
        account: Account,
        leader: int,
        passed: Callable[[Exceeded], None],
        living: Callable[[list[int]], Iterable[Entry]],
    ) -> None:
        self._loop = loop
        self._account = account
        self._leader = leader
        self._passed = passed
        self._living = living
        self._counts, self._weighs, self._times = (account.limits_any((kind,)) for kind in (PROCESSES, MEMORY, CPU))
        self.ledger = Ledger(bounds=self._times)
        self.peak_memory = 0
        self._held = 0
        self._processes = 1
        """As many as may be there: an exit that was not notified is noticed when they are counted."""
        self._uncounted = 0
        self._grants = Grants(_PATIENCE_S)
        self._waiting: list[tuple[Gate, Notification]] = []
        self._exceeded: Exceeded | None = None
        self._due = False
        self._rested = 0.0
        self._closed = False
        if self._weighs or self._times:
            loop.later(self._pause(), self._sample)

    # -- processes -----------------------------------------------------------------------------------------------------

    def heard_of(self, tid: int) -> None:
        """The thread makes another call."""
        if self._counts:
            self._grants.done(tid)

    def fork(self, gate: Gate, call: Notification) -> None:
        """Answers a call that makes a process."""
        if not self._counts:
            self._grant(gate, call)
        elif self._waiting or self._uncounted >= _UNCOUNTED_LIMIT or not self._granted(gate, call):
            self._waiting.append((gate, call))
            if len(self._waiting) == 1:  # who asks all the time waits a little: counting reads all of /proc
                self._loop.later(self._rested - now(), self._answer)
        elif not self._due:
            self._due = True
            self._loop.later(_COUNT_S, self._count_in_time)

    def _grant(self, gate: Gate, call: Notification) -> None:
        self.ledger.granted(now())
        gate.listener.proceed(call.id)

    def _granted(self, gate: Gate, call: Notification) -> bool:
        """Whether there was room for one more process, so that it was granted."""
        if self._account.closed:
            return False
        self._exceeded = self._account.reserve(PROCESSES, 1)
        if self._exceeded is not None:
            if not self._exceeded.report_only:
                return False
            self._passed(self._exceeded)
        self._processes += 1
        self._uncounted += 1
        self._grants.begin(call.pid, now())
        self._grant(gate, call)
        return True

    def _answer(self) -> None:
        """There seem to be too many processes: counts them, and answers the forks that wait for it."""
        if self._closed:
            return
        began = now()
        self._count()
        while self._waiting:
            gate, call = self._waiting[0]
            if gate.listener.fd >= 0 and gate.listener.is_valid(call.id) and not self._granted(gate, call):
                if self._grants.pending(now()):
                    break  # a fork that was granted has not shown its child: soon it has, or there is none
                gate.refuse(call, errno.EAGAIN)
                if self._exceeded is not None:
                    self._passed(self._exceeded)
            self._waiting.pop(0)
        pause = max(_CONFIRM_S, _REST * (now() - began))
        self._rested = now() + pause
        if self._waiting:
            self._loop.later(pause, self._answer)

    def _count(self) -> None:
        count = tree.count(self._leader) + self._grants.pending(now())
        self._account.level(PROCESSES, self._processes, count)
        self._processes, self._uncounted = count, 0

    def _count_in_time(self) -> None:
        """What ended unnoticed would else be held against other calls of the same episode or actor."""
        self._due = False
        if not self._closed:
            self._count()

    # -- CPU time and memory -------------------------------------------------------------------------------------------

    def exited(self, entry: Entry, cpu_ns: int | None, *, notified: bool) -> None:
        """A process has ended, or is about to and has said so. ``cpu_ns`` None: nobody read its clock."""
        if notified and self._counts and self._processes:
            self._processes -= 1
            self._account.level(PROCESSES, 1, 0)
        self._charge(self.ledger.ended(entry, cpu_ns, now()))

    def measure_last(self) -> None:
        """What is left is about to be killed: the later it was measured, the less of its time is a bound."""
        if self._times:
            self._measure()

    def _measure(self) -> list[int]:
        """Charges what all processes have used so far; returns their numbers."""
        began = now()
        pids = tree.members(self._leader)
        charged = 0
        for entry in self._living(pids):
            cpu = pidfd.cpu_ns(entry.pid)
            if cpu is not None:
                charged += self.ledger.measured(entry, cpu, now())
        self._charge(charged + self.ledger.charge_unseen(began - _CONFIRM_S, now()))
        return pids

    def _sample(self) -> None:
        if self._closed:
            return
        pids = self._measure() if self._times else tree.members(self._leader)
        if self._weighs:
            self._weigh(pids)
        self._loop.later(self._pause(), self._sample)

    def _weigh(self, pids: list[int]) -> None:
        exceeded = self._hold(sum(map(procfs.resident, pids)))
        if exceeded is not None:  # what processes share was counted in each: to divide it among them takes longer
            exceeded = self._hold(sum(map(procfs.resident_share, pids)))
        if exceeded is not None:
            self._passed(exceeded)
        self.peak_memory = max(self.peak_memory, self._held)

    def _hold(self, held: int) -> Exceeded | None:
        before, self._held = self._held, held
        return self._account.level(MEMORY, before, held)

    def _charge(self, cpu_ns: int) -> None:
        if cpu_ns:
            exceeded = self._account.charge(CPU, cpu_ns / _NS)
            if exceeded is not None:
                self._passed(exceeded)

    def _pause(self) -> float:
        pause = SAMPLE_MOST_S
        for kind, rate in ((CPU, _CPUS), (MEMORY, GROWTH)):
            room = self._account.room(kind)
            if room is not UNLIMITED:
                pause = min(pause, room / rate)
        return max(SAMPLE_LEAST_S, pause)

    # ------------------------------------------------------------------------------------------------------------------

    def close(self, cpu_ns: int) -> None:
        """The tree is dead. ``cpu_ns``: what the kernel has counted for those that were waited for."""
        self._charge(self.ledger.settle(cpu_ns))
        self._closed = True
        self._waiting.clear()
        if self._counts:
            self._account.level(PROCESSES, self._processes, 0)
        self._account.level(MEMORY, self._held, 0)
