"""Whoever keeps a policy actor by now cannot be signalled, rescheduled or limited by it. Runs in the supervisor.

The filter of an actor names its keepers, who judge and end it (:func:`ray_guard.egress.rings.actor_ring`). A policy
actor may outlive them, and a filter cannot be changed; so these calls are notified, and judged by whoever is there: all
of the supervisor's process group, which nobody else can join. Whom a call is about stands in a register, so what is
checked is what is executed.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ray_guard.kernel import procfs
from ray_guard.supervisor import bystanders

if TYPE_CHECKING:
    from ray_guard.egress.gate import Handler


def handlers() -> Mapping[str, Handler]:
    """For the gate of a policy actor."""
    first = bystanders.answering(lambda call: _judged(call.arg0))
    both = bystanders.answering(lambda call: _judged(call.arg0, call.arg1))
    return {
        **bystanders.handlers(_is_none),
        "kill": first,
        "tkill": first,
        "tgkill": both,
        "rt_sigqueueinfo": first,
        "rt_tgsigqueueinfo": both,
        "fcntl": bystanders.answering(lambda call: _judged(call.arg2)),  # F_SETOWN
    }


def _judged(*named: int) -> int:
    """``named``: processes or threads, or as negative numbers process groups."""
    return 0 if all(map(_may_be_signalled, named)) else errno.EPERM


def _may_be_signalled(who: int) -> bool:
    who &= 0xFFFFFFFF
    return _is_none(who) if who < 1 << 31 else (1 << 32) - who != os.getpgrp()


def _is_none(tid: int) -> bool:
    """Whether that thread is no keeper's."""
    try:
        return os.getpgid(procfs.thread_group(tid) or tid) != os.getpgrp()
    except OSError:
        return True  # there is no such process, as the kernel is about to say
