"""Reading process trees: who is in one, and how fast they can have grown. Runs in the supervisor."""

from __future__ import annotations

import os
from collections.abc import Callable

from ray_guard.kernel import procfs


def members(root: int) -> list[int]:
    """The processes below ``root`` (excluded), zombies too: they take up a process number until they are waited for.

    Costs in proportion to the tree. It may miss one while others end.
    """
    if not procfs.tells_children():
        return procfs.descendants(root)
    found: list[int] = []
    waiting = procfs.children(root)
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        waiting += procfs.children(pid)
    return found


class Births:
    """How many process numbers this namespace has given out: a tree cannot have grown by more than that.

    It takes one short reading to know that none of a hundred trees needs to be walked.
    """

    def __init__(self, read: Callable[[], bytes] | None = None) -> None:
        self._read = read or _reader("/proc/loadavg")
        with open("/proc/sys/kernel/pid_max", "rb", buffering=0) as file:
            self._limit = int(file.read(32))
        self._last = self._number()

    def _number(self) -> int:
        return int(self._read().split()[-1])

    def more(self) -> int:
        """Since this was asked last; threads count too, so it is rather too many than too few."""
        before, self._last = self._last, self._number()
        return (self._last - before) % self._limit


def _reader(path: str) -> Callable[[], bytes]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    return lambda: os.pread(descriptor, 256, 0)
