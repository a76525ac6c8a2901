"""How many processes a call may have, and what memory and CPU time they may take together. Runs in the supervisor.

All three are sampled, the more often the less room there is, and passing one ends the call. They are booked in the
call's account, and so in its episode's, its actor's and its job's: theirs are limits over several calls. What no limit
asks for is not sampled.

What does not work: to count forks by notifying them. A signal whose handler was set without SA_RESTART interrupts a
notified call that has not been received yet, and fork then fails with EINTR, which no program expects: 6 of 100
``true | true | true`` said "Cannot fork" in dash, which forks while its first child ends.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

from ray_guard.compute import memory, tree
from ray_guard.compute.ledger import Entry, Ledger
from ray_guard.kernel import pidfd
from ray_guard.kernel.perf import TreeClock
from ray_guard.policy.budgets import UNLIMITED, Account, Exceeded, Scope
from ray_guard.supervisor.leaf import Leaf, LeafClock
from ray_guard.supervisor.memory_group import MemoryGroup

if TYPE_CHECKING:
    from ray_guard.egress.gate import Waiting

CPU: Final = "cpu_seconds"
MEMORY: Final = "memory"
PROCESSES: Final = "processes"

SAMPLE_MOST_S: Final = 0.25
SAMPLE_LEAST_S: Final = 0.005
"""Between two samples passes as long as the limit cannot be reached in, within these."""
GROWTH: Final = 8 << 30
"""Bytes per second that a tree is taken to grow by at most."""
_CPUS: Final = os.cpu_count() or 1
_NS: Final = 1_000_000_000


def now() -> float:
    """The ledger's clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Census:
    """Counts the processes of all calls that limit them, when so many were born that one limit can have been passed.

    All at once, for calls share limits of their episode or actor, and none while nobody has born any.
    """

    def __init__(self, loop: Waiting) -> None:
        self._loop = loop
        self._births = tree.Births()
        self._watched: set[Limits] = set()
        self._room = 0.0
        self._ticking = False

    def watch(self, limits: Limits) -> None:
        self._watched.add(limits)
        self._room = 0
        if not self._ticking:
            self._ticking = True
            self._loop.later(SAMPLE_LEAST_S, self._tick)

    def forget(self, limits: Limits) -> None:
        self._watched.discard(limits)

    def reserve(self, account: Account) -> Exceeded | None:
        """Makes room for the first process of a call, or says which limit leaves none."""
        exceeded = account.reserve(PROCESSES, 1)
        if exceeded is not None and not exceeded.report_only:  # some may have ended since they were counted
            self._count()
            exceeded = account.reserve(PROCESSES, 1)
        return exceeded

    def _tick(self) -> None:
        self._ticking = bool(self._watched)
        if not self._ticking:
            return
        self._loop.later(SAMPLE_LEAST_S, self._tick)
        self._room -= self._births.more()
        if self._room < 0:
            self._count()

    def _count(self) -> None:
        for limits in self._watched:
            limits.count()
        self._room = min((limits.room() for limits in self._watched), default=0)


class Limits:
    """See the module.

    Args:
        loop, census: the supervisor's.
        account: the call's. One process is reserved there already.
        root: the first process, which has not executed anything yet.
        leader: the one above it.
        passed: told of each limit that was passed.
        living: the entries of all processes that live, given the numbers of those in the tree.
        leaf, pages: the control groups they are all in; None: there is none.
    """

    def __init__(
        self,
        loop: Waiting,
        census: Census,
        account: Account,
        *,
        root: int,
        leader: int,
        passed: Callable[[Exceeded], None],
        living: Callable[[list[int]], Iterable[Entry]],
        leaf: Leaf | None = None,
        pages: MemoryGroup | None = None,
    ) -> None:
        self._loop = loop
        self._census = census
        self._account = account
        self._leader = leader
        self._passed = passed
        self._living = living
        self._weighs, self._times = (account.limits_any((kind,)) for kind in (MEMORY, CPU))
        self._leaf = leaf
        self._pages = pages
        self._clock = _clock(root, leaf) if self._times else None
        self.ledger = Ledger(bounds=self._times and self._clock is None)
        self.peak_memory = 0
        self._held = {PROCESSES: 1, MEMORY: 0}
        self._looked = now()
        self._over = False
        self._waits = False
        if account.limits_any((PROCESSES,)):
            census.watch(self)
        if self._weighs or self._times:
            loop.later(self._pause(), self._sample)

    def count(self) -> None:
        """Counts the processes."""
        self._waits = False
        if not self._over:
            exceeded = self._hold(PROCESSES, self._living_at_least())
            if exceeded is None:
                exceeded = self._hold(PROCESSES, len(tree.members(self._leader)))
            if exceeded is not None:
                self._waits = self._grows(exceeded)
                if not self._waits:
                    self._tell(exceeded)

    def _living_at_least(self) -> int:
        """How many its control group tells of: with one reading, where the tree, which has zombies too, takes many."""
        if self._leaf is None:
            return 0
        try:
            return len(self._leaf.pids())
        except OSError:
            return 0

    def room(self) -> float:
        """How many may be born before they must be counted again."""
        if self._waits:
            return -1  # for what may be leased meanwhile
        room = self._account.calm(PROCESSES)
        return 0 if room is UNLIMITED else room

    def exited(self, entry: Entry, cpu_ns: int | None) -> None:
        """A process has ended, or is about to and has said so. ``cpu_ns`` None: nobody read its clock."""
        if self._clock is None:  # else the tree's own has it
            charged = self.ledger.ended(entry, cpu_ns, now())
            if self._times:
                self._charge(charged)

    def measure(self) -> None:
        """Charges what all processes have used so far."""
        if self._clock is not None:
            self._charge(self.ledger.settle(self._clock.read_ns()))
        elif self._times:
            charged = 0
            looked, self._looked = self._looked, now()
            for entry in self._living(tree.members(self._leader)):
                charged += self.ledger.took_over(entry, looked)
                cpu = pidfd.cpu_ns(entry.pid)
                if cpu is not None:
                    charged += self.ledger.measured(entry, cpu, now())
            self._charge(charged)

    def _sample(self) -> None:
        if self._over:
            return
        try:
            self.measure()
            if self._weighs:
                self._weigh()
        finally:  # one reading that fails is logged; that there is a next one must not hang on it
            self._loop.later(self._pause(), self._sample)

    def look_last(self) -> None:
        """The tree is dead: whether the kernel had to end some of it, unseen between two samples."""
        if self._pages is not None and not self._over:
            self._weigh_group(self._pages)

    def _weigh(self) -> None:
        if self._pages is None:
            self._weigh_tree()
        else:
            self._weigh_group(self._pages)

    def _weigh_group(self, pages: MemoryGroup) -> None:
        exceeded = self._hold(MEMORY, max(pages.resident(), pages.overrun()))
        self.peak_memory = max(self.peak_memory, self._held[MEMORY])
        if exceeded is not None and not self._grows(exceeded):
            self._tell(exceeded)

    def _weigh_tree(self) -> None:
        pids = tree.members(self._leader)
        kept = memory.kept(pids)
        exceeded = self._hold(MEMORY, memory.upper_bound(pids, kept))
        if exceeded is not None:  # what processes share was counted in each: to divide it among them takes longer
            exceeded = self._hold(MEMORY, memory.divided(pids, kept))
        self.peak_memory = max(self.peak_memory, self._held[MEMORY])
        if exceeded is not None and not self._grows(exceeded):
            self._tell(exceeded)

    def _grows(self, exceeded: Exceeded) -> bool:
        """Whether it is a part of a job's limit that was passed, and there may be more: the next sample will tell."""
        return exceeded.scope is Scope.JOB and self._account.root.grow(exceeded.kind)

    def _tell(self, exceeded: Exceeded) -> None:
        self._passed(exceeded)
        if not exceeded.report_only:  # it is being ended: what it held must not be held against the next one
            self._give_back()

    def _give_back(self) -> None:
        self._over = True
        for kind in self._held:
            self._hold(kind, 0)

    def _hold(self, kind: str, amount: int) -> Exceeded | None:
        before, self._held[kind] = self._held[kind], amount
        return self._account.level(kind, before, amount)

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

    def close(self, cpu_ns: int) -> None:
        """The tree is dead. ``cpu_ns``: what the kernel has counted for those that were waited for."""
        self.measure()
        charged = self.ledger.settle(cpu_ns)
        self._charge(charged if self._times else self.ledger.cpu_ns)
        self._give_back()
        self._census.forget(self)
        if self._clock is not None:
            self._clock.close()


def _clock(root: int, leaf: Leaf | None) -> TreeClock | LeafClock | None:
    """A clock that all of a tree runs on, those that have ended included; None: there is none here."""
    with contextlib.suppress(OSError):
        if leaf is not None:
            return LeafClock(leaf)
    with contextlib.suppress(OSError, KeyError):
        return TreeClock(root)
    return None
