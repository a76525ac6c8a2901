"""System V IPC and POSIX message queues, which reach every process of a user. Runs in supervisor and zygote.

Landlock does not cover them. Where a tool can be given a namespace of its own they are its own, and end with it; else
they do not exist for it (:func:`ray_guard.egress.rings.call_ring`). Both sides go by the same answer, so it is asked
once, before the zygote forks anything.
"""

from __future__ import annotations

import functools
from typing import Final

from ray_guard.kernel import libc
from ray_guard.kernel.trial import Trial

_CLONE_NEWIPC: Final = 0x08000000


def enter_own_namespace() -> None:
    """Raises OSError (EPERM without CAP_SYS_ADMIN)."""
    libc.unshare(_CLONE_NEWIPC)


@functools.cache
def can_be_own() -> bool:
    """Whether :func:`enter_own_namespace` works here. Tried once per process; a forked one keeps the answer."""
    return TRIAL.outcome == 0


def _attempt() -> int:
    enter_own_namespace()
    return 0


TRIAL: Final = Trial(_attempt)
