"""Reading a process tree: who lives in it, and how much memory it holds. Runs in the supervisor.

Two ways, because they are wrong in different ways: :func:`members` costs in proportion to the tree and may miss a
process while others end, so it is for samples; :func:`count` reads all of /proc, and misses none that lived throughout.
"""

from __future__ import annotations

from collections.abc import Iterable

from ray_guard.kernel import procfs


def members(root: int) -> list[int]:
    """The processes below ``root`` (excluded), zombies included."""
    found: list[int] = []
    waiting = procfs.children(root)
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        waiting += procfs.children(pid)
    return found


def count(root: int) -> int:
    """How many processes live below ``root`` (excluded), zombies left out.

    Exact as long as no new ones are made meanwhile. A process whose parent ended between two readings is asked for its
    parent again: it has another one by then.
    """
    parents: dict[int, int] = {}
    dead: set[int] = set()
    for pid in procfs.processes():
        _read(pid, parents, dead)
    for _ in range(8):
        lost = [pid for pid, parent in parents.items() if parent not in parents and parent > 0]
        for pid in lost:
            _read(pid, parents, dead)
        if not lost:
            break
    below: dict[int, bool] = {root: True, 0: False}
    for pid in parents:
        path = []
        at = pid
        while at not in below and len(path) < 4096:
            path.append(at)
            at = parents.get(at, 0)
        found = below.get(at, False)
        below.update(dict.fromkeys(path, found))
    return sum(below[pid] for pid in parents if pid != root and pid not in dead)


def _read(pid: int, parents: dict[int, int], dead: set[int]) -> None:
    image = procfs.image(pid)
    if image is None:
        parents.pop(pid, None)
        return
    parents[pid] = image.parent
    if image.state in (b"Z", b"X"):
        dead.add(pid)


def memory(pids: Iterable[int], limit: int) -> int:
    """Bytes of resident memory that these processes hold together.

    Pages they share are counted once only where counting them in each would pass ``limit``: that is slow to ask for.
    """
    pids = list(pids)
    total = sum(procfs.resident(pid) for pid in pids)
    return total if total <= limit else sum(procfs.resident_share(pid) for pid in pids)
