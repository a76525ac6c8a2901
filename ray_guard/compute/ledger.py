"""The CPU time of one call's processes as a ledger. Pure: what was notified and measured is told to it.

Runs in the supervisor. Times are seconds of CLOCK_BOOTTIME, by which the kernel dates a process's start.

Why exited processes are not left to the kernel's sums: with SIGCHLD ignored they are in nobody's rusage, and a swarm
that forks itself anew falls between any two samples. So each is charged when its exit is notified, from its own clock;
one that ended unnoticed (by a signal, or before it made any notified call) is charged the time it can have lived at
most, and the sum is then no longer :attr:`Ledger.exact`.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Final

_BIRTHS_KEPT: Final = 65_536
_TICK_S: Final = 1 / os.sysconf("SC_CLK_TCK")
_NS: Final = 1_000_000_000


@dataclass(slots=True, eq=False)
class Entry:
    """A process that has been seen.

    Attributes:
        pid, born: its number and its start in clock ticks: together its identity.
        measured: when its clock was read last.
        cpu_ns: what it showed then.
    """

    pid: int
    born: int
    measured: float
    cpu_ns: int = 0


@dataclass(slots=True)
class Ledger:
    """See the module. ``bounds``: charge what ended unmeasured by the time it lived. Needed where CPU is limited."""

    bounds: bool = False
    made: int = 1
    """Processes made, the first included: exact, but for forks that failed after they were granted."""
    cpu_ns: int = 0
    bounded_ns: int = 0
    """The part of :attr:`cpu_ns` that is an upper bound."""
    _births: list[float] = field(default_factory=list)
    """When each process was granted that has not been seen yet; ascending."""

    @property
    def cpu_seconds(self) -> float:
        return self.cpu_ns / _NS

    @property
    def exact(self) -> bool:
        return self.bounded_ns == 0

    def granted(self, now: float) -> None:
        """A process is about to be made."""
        self.made += 1
        if self.bounds:
            if len(self._births) >= _BIRTHS_KEPT:  # its child may still live, and then it is charged twice
                self._bound(now - self._births.pop(0))
            self._births.append(now)

    def seen(self, pid: int, born: int, now: float) -> Entry:
        """A process has made itself known, or was found."""
        if self._births:
            # Whose birth it was is not known; of those that can be it, the last leaves the others the longer lives.
            at = bisect_right(self._births, (born + 1) * _TICK_S)
            if at:
                del self._births[at - 1]
        return Entry(pid, born, max(0.0, min(now, born * _TICK_S)))

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

    def charge_unseen(self, before: float, now: float) -> int:
        """All that live were just looked for: charges those granted ``before`` then that were not there."""
        count = bisect_right(self._births, before)
        charged = sum(self._bound(now - birth) for birth in self._births[:count])
        del self._births[:count]
        return charged

    def settle(self, cpu_ns: int) -> int:
        """The kernel's own sum over those that were waited for, at the end: charges what it has more; returns it."""
        more = max(0, cpu_ns - self.cpu_ns)
        self.cpu_ns += more
        return more

    def _bound(self, seconds: float) -> int:
        charged = int(max(0.0, seconds) * _NS)
        self.cpu_ns += charged
        self.bounded_ns += charged
        return charged


class Grants:
    """Forks that were granted and whose children may not be there yet: they count, or a limit could be overrun.

    Args:
        patience_s: after this long a granted fork has been carried out, or has failed.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._since: dict[int, float] = {}

    def begin(self, tid: int, now: float) -> None:
        self._since[tid] = now

    def done(self, tid: int) -> None:
        """The thread has made another call: its fork has returned."""
        self._since.pop(tid, None)

    def pending(self, now: float) -> int:
        """How many may still come."""
        if self._since:
            self._since = {tid: since for tid, since in self._since.items() if now - since < self._patience_s}
        return len(self._since)
