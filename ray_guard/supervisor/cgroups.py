"""Which control groups a tool is in: its requester's, and below them its own. Runs in the supervisor."""

from __future__ import annotations

import os

from ray_guard.kernel import cgroup
from ray_guard.log import logger
from ray_guard.named import NamedTuple
from ray_guard.supervisor.leaders import Leader
from ray_guard.supervisor.leaf import PREFIX, Leaf, OwnLeaf, place

log = logger("ray_guard.cgroups")


class Groups(NamedTuple):
    """Where a tool is born, and where it belongs.

    Attributes:
        leaf: the one it is born into with its leader; None: there is none, or nobody tells.
        wanted: its requester's path in each hierarchy, where that is not its leader's; else empty.
    """

    leaf: Leaf | None
    wanted: dict[str, str]


def groups(leader: Leader, requester: int) -> Groups:
    """Those of what ``leader`` starts for ``requester``."""
    try:
        wanted, here = cgroup.paths(cgroup.read(requester)), cgroup.paths(cgroup.read(leader.pid))
    except OSError:
        return Groups(None, {})
    if leader.leaf:
        here[""] = os.path.dirname(here.get("", ""))
    return Groups(Leaf(leader.leaf, leader.pid) if leader.leaf else None, {} if wanted == here else wanted)


def follow(pid: int, born: Groups, requester: int) -> tuple[Leaf | None, tuple[str, ...]]:
    """Sees to it that a tool is in its requester's groups, and where it can be in a leaf below that of version 2.

    Returns:
        Its leaf, and the hierarchies in which it has to stay where it is.
    """
    if not born.wanted:  # as good as always
        return born.leaf, ()
    try:
        found = cgroup.paths(cgroup.read(pid))
    except OSError:
        return None, ()
    # What has entered a group of ours below its requester's stays there.
    own = {name for name, path in born.wanted.items() if found.get(name, "").startswith(f"{path.rstrip('/')}/{PREFIX}")}
    wanted = {name: path for name, path in born.wanted.items() if not name or name not in own}
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
