"""Whose a process is that hangs on no target's tree any more. Runs in the supervisor.

A process of the actor ring that has lost its parents (a daemon) is still behind its target's filter, which it cannot
take off, in its namespaces, which it cannot leave, and younger than the filter. Above the last filtered process stands
whoever took it in: init, or a subreaper that is the target's ancestor too. A stranger's sandboxed process has its own
sandbox there.
"""

from __future__ import annotations

import os
from typing import Final, NamedTuple

from ray_guard.kernel import procfs

_NAMESPACES: Final = ("net", "pid", "mnt", "user")
_DEPTH: Final = 4096


class Mark(NamedTuple):
    """What all processes behind one target's filter have in common."""

    root: int
    since: int
    """Clock ticks since boot when the filter was there."""
    filters: int
    namespaces: tuple[int, ...]
    above: frozenset[int]
    """The target's ancestors, and 0 and 1: who may take in its orphans."""


def mark(root: int) -> Mark | None:
    """The mark of a target that has just been filtered; None: it is gone, or the kernel does not tell."""
    filters, namespaces = procfs.filters(root), _namespaces(root)
    if filters is None or namespaces is None:
        return None
    above = {0, 1}
    at = procfs.parent(root)
    while at is not None and at not in above:
        above.add(at)
        at = procfs.parent(at)
    since = int(os.sysconf("SC_CLK_TCK") * procfs.uptime())
    return Mark(root, since, filters, namespaces, frozenset(above))


def carries(pid: int, start_time: int, marked: Mark) -> bool:
    """Whether that process is an orphan of the marked target's tree."""
    if start_time < marked.since - 1:
        return False
    at, seen = pid, 0
    while (procfs.filters(at) or 0) >= marked.filters and seen < _DEPTH:
        above = procfs.parent(at)
        if above is None:
            return False
        if above in marked.above:
            return _namespaces(pid) == marked.namespaces
        at, seen = above, seen + 1
    return False


def _namespaces(pid: int) -> tuple[int, ...] | None:
    try:
        return tuple(os.stat(f"/proc/{pid}/ns/{name}").st_ino for name in _NAMESPACES)
    except OSError:
        return None
