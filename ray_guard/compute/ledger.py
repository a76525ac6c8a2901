"""The CPU time of one call's processes as a ledger. Pure: what was notified and measured is told to it.

Runs in the supervisor. Times are seconds of CLOCK_BOOTTIME, by which the kernel dates a process's start.

Why exited processes are not left to the kernel's sums: with SIGCHLD ignored they are in nobody's rusage. So each is
charged when its exit is notified, from its own clock. One that a signal ended is charged the time it can have run since
it was measured; so are those that came and went unseen, by whoever is found in their place
(:meth:`Ledger.took_over`). :attr:`Ledger.bounded_ns` says how much of the sum are such upper bounds.
"""

from __future__ import annotations

import os
from typing import Final

_TICK_S: Final = 1 / os.sysconf("SC_CLK_TCK")
_NS: Final = 1_000_000_000


class Entry:
    """A process that has been seen.

    Attributes:
        pid, born: its number, and its start in clock ticks.
        measured: when its clock was read last; at first, when it was born.
        cpu_ns: what it showed then.
        heir: who forked it has ended unseen, or sees to it that its children do.
    """

    __slots__ = ("born", "cpu_ns", "heir", "measured", "pid")

    def __init__(self, pid: int, born: int, measured: float, cpu_ns: int = 0) -> None:
        self.pid = pid
        self.born = born
        self.measured = measured
        self.cpu_ns = cpu_ns
        self.heir = False


class Ledger:
    """See the module. ``bounds``: charge what ended unmeasured; False where a sum over the whole tree settles it."""

    def __init__(self, *, bounds: bool = False) -> None:
        self.bounds = bounds
        self.seen = 0
        self.cpu_ns = 0
        self.bounded_ns = 0

    def enter(self, pid: int, born: int = 0) -> Entry:
        """A process has made itself known, or was found. ``born`` is not needed where nothing is bounded."""
        self.seen += 1
        return Entry(pid, born, born * _TICK_S)

    def measured(self, entry: Entry, cpu_ns: int, now: float) -> int:
        """Charges what the process used since it was measured last; returns it."""
        more = max(0, cpu_ns - entry.cpu_ns)
        entry.cpu_ns += more
        entry.measured = now
        self.cpu_ns += more
        return more

    def ended(self, entry: Entry, cpu_ns: int | None, now: float) -> int:
        """Charges a process's last; returns it. ``cpu_ns`` None: its clock could not be read any more."""
        if cpu_ns is not None:
            return self.measured(entry, cpu_ns, now)
        return self._bound(now - entry.measured) if self.bounds else 0

    def took_over(self, entry: Entry, since: float) -> int:
        """Charges what may have run in an heir's place from ``since`` to its own birth, once; returns it."""
        if not entry.heir:
            return 0
        entry.heir = False
        return self._bound(entry.born * _TICK_S - since)

    def _bound(self, seconds: float) -> int:
        charged = int(max(0.0, seconds) * _NS)
        self.cpu_ns += charged
        self.bounded_ns += charged
        return charged

    def settle(self, cpu_ns: int) -> int:
        """A sum over the whole tree: charges what it has more; returns it."""
        more = max(0, cpu_ns - self.cpu_ns)
        self.cpu_ns += more
        return more
