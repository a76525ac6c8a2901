"""An attempt made by a child, so that nothing changes here whatever comes of it. Runs in supervisor, zygote, doctor."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Final

FAILED: Final = 255
"""The outcome of an attempt that raised."""


class Trial:
    """Begins at once, beside whatever else is to be done.

    Args:
        attempt: called in the child; its number (0 to 254) is the outcome.
    """

    def __init__(self, attempt: Callable[[], int]) -> None:
        self._pid = os.fork()
        if self._pid == 0:
            outcome = FAILED
            try:
                outcome = attempt()
            finally:
                os._exit(outcome)

    @functools.cached_property
    def outcome(self) -> int:
        """Waits for it. To be asked before this process forks again: the child is this process's alone."""
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
