"""Scheduling and limits of processes: a tool may change them within its call, not outside. Runs in the supervisor.

Neither Landlock nor the user's own rights keep a tool from renicing, pinning or limiting a process of the same user,
and lowering the supervisor's limits would end it. Whom such a call is about stands in a register, so what is checked is
what is executed; a call about oneself by number 0 is not notified at all (:func:`ray_guard.egress.rings.call_ring`).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from ray_guard.kernel import procfs

if TYPE_CHECKING:
    from ray_guard.egress.gate import Gate, Handler
    from ray_guard.kernel.seccomp import Notification

_BY_PID: Final = ("prlimit64", "sched_setaffinity", "sched_setparam", "sched_setscheduler", "sched_setattr")
_BY_KIND: Final = {"setpriority": 0, "ioprio_set": 1}
"""Calls whose first argument says whom the second one names: this number a process, the next one a process group."""


_LOOKS: Final = 3

Within = Callable[[int], bool]
"""Whether a process, or thread, is the call's."""


def within(leader: int) -> Within:
    """For the call that process ``leader`` leads."""

    def is_within(tid: int) -> bool:
        # All that a call starts descends from its leader, which adopts what has lost its parents: that may happen just
        # while they are looked up.
        pid = procfs.thread_group(tid)
        if pid is None or pid == leader:
            return False
        return any(procfs.is_in_tree(pid, leader) for _ in range(_LOOKS))

    return is_within


def handlers(is_within: Within) -> Mapping[str, Handler]:
    """For the gate of a call."""
    by_pid = answering(lambda call: _judged(is_within, call.arg0))
    found: dict[str, Handler] = dict.fromkeys(_BY_PID, by_pid)
    for name, process in _BY_KIND.items():
        found[name] = answering(_judging_kind(is_within, process))
    return found


def answering(judge: Callable[[Notification], int]) -> Handler:
    """Lets through what ``judge`` has nothing against; else it is the error number."""

    def handle(gate: Gate, call: Notification) -> None:
        error = judge(call)
        if error:
            gate.refuse(call, error)
        else:
            gate.listener.proceed(call.id)

    return handle


def _judging_kind(is_within: Within, process: int) -> Callable[[Notification], int]:
    def judge(call: Notification) -> int:
        kind, who = call.arg0 & 0xFFFFFFFF, call.arg1 & 0xFFFFFFFF
        if kind == process:
            return 0 if who == 0 else _judged(is_within, who)
        if kind == process + 1:  # a group lies within one session, and a call's processes lead theirs
            return 0 if who == 0 else _judged(is_within, member(who))
        return errno.EPERM  # a user's processes are not the call's alone

    return judge


def _judged(is_within: Within, who: int) -> int:
    return 0 if is_within(who & 0xFFFFFFFF) else errno.EPERM


def member(group: int) -> int:
    """A process of the group; 0, which is none, where there is no such group."""
    for pid in procfs.processes():
        try:
            if os.getpgid(pid) == group:
                return pid
        except OSError:
            continue
    return 0
