"""The processes of one call as a ledger: how many were made, how many live, what CPU time they took. Pure.

Runs in the supervisor, which tells it what was notified (a fork granted, an exit begun) and what was measured. Nothing
here reads a clock or the system: times are ``time.monotonic()`` seconds that the caller passes.

Why exited processes are not left to the kernel's sums: with SIGCHLD ignored they are in nobody's rusage, and a swarm
that forks itself anew falls between any two samples. So each is charged when its exit is notified, from its own clock;
one that ended unnoticed (by a signal, or before it made any notified call) is charged the time it can have lived at
most, and the sum is then no longer :attr:`Ledger.exact`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

_GRANTS_KEPT: Final = 65_536
_NS: Final = 1e-9


@dataclass(slots=True, eq=False)
class Entry:
    """A process that has been seen.

    Attributes:
        pid, born: its number and its start in clock ticks: together its identity.
        cpu_ns: what has been charged for it.
        measured: when that was measured.
    """

    pid: int
    born: int
    measured: float
    cpu_ns: int = 0


@dataclass(slots=True)
class Ledger:
    """See the module.

    Args:
        tracks_births: keep the time of each fork until its child has been seen, so that children which end unseen can
            be charged (:meth:`charge_unseen`). Needed only where CPU time is limited.
    """

    tracks_births: bool = False
    made: int = 1
    """Processes made, the first included: exact, but for forks that failed after they were granted."""
    live: int = 1
    """At least as many as live now: one that a signal ended is not known to be gone until they are counted."""
    cpu_ns: int = 0
    exact: bool = True
    bounded_ns: int = 0
    """The part of :attr:`cpu_ns` that is an upper bound."""
    _unseen: deque[float] = field(default_factory=lambda: deque(maxlen=_GRANTS_KEPT))

    @property
    def cpu_seconds(self) -> float:
        return self.cpu_ns * _NS

    def granted(self, now: float) -> None:
        """A process is about to be made."""
        self.made += 1
        self.live += 1
        if self.tracks_births:
            if len(self._unseen) == _GRANTS_KEPT:  # its child may still live, and then it is charged twice
                self._bound(now - self._unseen[0])
            self._unseen.append(now)

    def seen(self, pid: int, born: int, now: float, cpu_ns: int = 0) -> Entry:
        """A process has made itself known; ``cpu_ns`` is not charged for it (the first: what was before the start)."""
        if self._unseen:
            self._unseen.popleft()
        return Entry(pid, born, now, cpu_ns)

    def measured(self, entry: Entry, cpu_ns: int, now: float) -> int:
        """Charges what the process used since it was measured last; returns it."""
        more = max(0, cpu_ns - entry.cpu_ns)
        entry.cpu_ns += more
        entry.measured = now
        self.cpu_ns += more
        return more

    def ended(self, entry: Entry, cpu_ns: int | None, now: float, *, notified: bool) -> int:
        """Charges a process's last; returns it.

        Args:
            cpu_ns: its clock at the end; None: nobody read it, so it is charged the time since it was measured.
            notified: its exit was, so it is one fewer that lives.
        """
        if notified:
            self.live -= 1
        if cpu_ns is not None:
            return self.measured(entry, cpu_ns, now)
        return self._bound(now - entry.measured)

    def charge_unseen(self, before: float, now: float) -> int:
        """Charges every process that was granted ``before`` then and was not found among the living; returns it."""
        charged = 0
        while self._unseen and self._unseen[0] < before:
            charged += self._bound(now - self._unseen.popleft())
        return charged

    def settle(self, cpu_ns: int) -> int:
        """The kernel's own sum over those that were waited for, at the end: charges what it has more; returns it."""
        more = max(0, cpu_ns - self.cpu_ns)
        self.cpu_ns += more
        return more

    def counted(self, live: int) -> None:
        """They were counted one by one."""
        self.live = live

    def _bound(self, seconds: float) -> int:
        charged = int(max(0.0, seconds) / _NS)
        self.cpu_ns += charged
        self.bounded_ns += charged
        self.exact = False
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
