"""Attempts made by a child, so that nothing changes here whatever comes of them. Runs in supervisor, zygote, doctor."""

from __future__ import annotations

import functools
import mmap
import os
import select
from collections.abc import Callable, Sequence
from typing import Final

FAILED: Final = 255
"""The outcome of an attempt that raised, or was not made."""


class Trial:
    """One attempt.

    Args:
        attempt: called in the child; its number (0 to 254) is the outcome.
    """

    def __init__(self, attempt: Callable[[], int]) -> None:
        self.attempt = attempt
        self.told: Callable[[], int] = self._begin

    @functools.cached_property
    def outcome(self) -> int:
        """Waits for it. A forked process may ask too, for as long as it keeps the descriptors it was forked with."""
        return self.told()

    def _begin(self) -> int:
        begin([self])
        return self.told()


def begin(trials: Sequence[Trial]) -> None:
    """Makes the attempts, one after the other in one child, while this process goes on."""
    outcomes = mmap.mmap(-1, len(trials))
    outcomes[:] = bytes([FAILED]) * len(trials)
    pid = os.fork()
    if pid == 0:
        try:
            for number, trial in enumerate(trials):
                try:
                    outcomes[number] = trial.attempt()
                except OSError:
                    continue
        finally:
            os._exit(0)
    pidfd = os.pidfd_open(pid)

    @functools.cache
    def ended() -> None:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.poll()
        os.close(pidfd)
        try:
            os.waitpid(pid, 0)
        except ChildProcessError:
            pass  # it is that of whoever this process was forked from, or nobody's (SIGCHLD is ignored)

    def told(number: int) -> int:
        ended()
        return outcomes[number]

    for number, trial in enumerate(trials):
        trial.told = functools.partial(told, number)
