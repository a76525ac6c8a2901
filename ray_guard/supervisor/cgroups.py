"""Which control groups a tool is in: its requester's, and below them its own. Runs in the supervisor."""

from __future__ import annotations

import logging
import os

from ray_guard.kernel import cgroup
from ray_guard.supervisor.leaf import Leaf, OwnLeaf, place

log = logging.getLogger("ray_guard.cgroups")


def follow(pid: int, leader: int, leaf: str, requester: int) -> tuple[Leaf | None, tuple[str, ...]]:
    """Sees to it that a tool is in its requester's groups, and where it can be in a leaf below that of version 2.

    Args:
        pid, leader, leaf: the process that will be the tool, who forked it, and the leaf that it is in; empty: in none.

    Returns:
        Its leaf, and the hierarchies in which it has to stay where it is.
    """
    try:
        there, here = cgroup.read(requester), cgroup.read(leader)
        if there == here:  # as good as always: then what was made ahead is right
            return Leaf(leaf) if leaf else None, ()
        wanted, found = cgroup.paths(there), cgroup.paths(cgroup.read(pid))
    except OSError:
        return None, ()
    moved = _new_leaf_below(wanted) if place() else None
    left = cgroup.move(pid, wanted, found)
    if left:
        log.warning("a tool of %d stays in the supervisor's control groups: %s", requester, left)
    if moved is not None and "" in left:
        moved.close()
        moved = None
    return moved, tuple(name or "unified" for name in left)


def _new_leaf_below(wanted: dict[str, str]) -> OwnLeaf | None:
    """One below another process's group of version 2, which takes that one's place in ``wanted``."""
    try:
        made = OwnLeaf(cgroup.folder("", wanted[""]))
    except (OSError, KeyError):
        return None
    wanted[""] = f"{wanted[''].rstrip('/')}/{os.path.basename(made.path)}"
    return made
