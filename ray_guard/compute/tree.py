"""Reading a process tree: who is in it. Runs in the supervisor.

Two ways, because they are wrong in different ways: :func:`members` costs in proportion to the tree and may miss a
process while others end, so it is for samples; :func:`count` reads all of /proc, and misses none that lived throughout.
Zombies are in both: they take up a process number until they are waited for.
"""

from __future__ import annotations

from typing import Final

from ray_guard.kernel import procfs

_DEPTH_LIMIT: Final = 1 << 16


def members(root: int) -> list[int]:
    """The processes below ``root`` (excluded)."""
    if not procfs.tells_children():
        return procfs.descendants(root)
    found: list[int] = []
    waiting = procfs.children(root)
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        waiting += procfs.children(pid)
    return found


def count(root: int) -> int:
    """How many processes there are below ``root`` (excluded).

    Exact as long as no new ones are made meanwhile. A process whose parent ended between two readings is asked for its
    parent again: it has another one by then.
    """
    parents: dict[int, int] = {}
    for pid in procfs.processes():
        _read(pid, parents)
    for _ in range(8):
        lost = [pid for pid, parent in parents.items() if parent not in parents and parent > 0]
        for pid in lost:
            _read(pid, parents)
        if not lost:
            break
    below: dict[int, bool] = {root: True, 0: False}
    for pid in parents:
        path: list[int] = []
        at = pid
        while at not in below and len(path) < _DEPTH_LIMIT:
            path.append(at)
            at = parents.get(at, 0)
        found = below.get(at, False)
        below.update(dict.fromkeys(path, found))
    return sum(below[pid] for pid in parents if pid != root)


def _read(pid: int, parents: dict[int, int]) -> None:
    parent = procfs.parent(pid)
    if parent is None:
        parents.pop(pid, None)
    else:
        parents[pid] = parent
