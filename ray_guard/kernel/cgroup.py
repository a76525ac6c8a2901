"""Control groups, both versions: which a process is in, and moving another one there. Runs in the supervisor.

See cgroups(7). A hierarchy is named as in /proc/PID/cgroup: by its controllers, or ``""`` for version 2.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

_DELETED = " (deleted)"


def read(pid: int) -> bytes:
    """What /proc says, to be compared. Raises OSError where there is no such process, or no control groups."""
    with open(f"/proc/{pid}/cgroup", "rb", buffering=0) as file:
        return file.read(1 << 16)


def paths(said: bytes) -> dict[str, str]:
    """The path in each hierarchy, from what :func:`read` gives."""
    lines = (line.split(":", 2) for line in said.decode(errors="surrogateescape").splitlines())
    return {line[1]: line[2] for line in lines if len(line) == 3}


@functools.cache
def mounts() -> dict[str, tuple[str, str]]:
    """(mount point, path that is mounted there) of each hierarchy that is mounted here."""
    found: dict[str, tuple[str, str]] = {}
    with open("/proc/self/mountinfo") as file:
        for line in file:
            fields, _, about = line.partition(" - ")
            kind, _, options = about.rstrip("\n").split(" ", 2)
            root, where = fields.split(" ")[3:5]
            if kind == "cgroup2":
                found.setdefault("", (where, root))
            elif kind == "cgroup":
                for option in options.split(","):
                    found.setdefault(option, (where, root))
    return found


def move(pid: int, there: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """Moves a process whose paths are ``here`` to ``there``; the hierarchies in which it could not be."""
    left = []
    for name, path in there.items():
        if here.get(name) != path:
            try:
                with open(f"{_folder(name, path)}/cgroup.procs", "w") as file:
                    file.write(str(pid))
            except OSError:
                left.append(name)
    return left


def _folder(name: str, path: str) -> str:
    """Where a path of a hierarchy is to be found. Raises OSError where it is not mounted here."""
    where, root = mounts().get(name.split(",", maxsplit=1)[0], ("", ""))
    root = root.rstrip("/")
    if not where or path.endswith(_DELETED) or not f"{path.rstrip('/')}/".startswith(f"{root}/"):
        raise FileNotFoundError(path)
    return where + path.removeprefix(root).rstrip("/")
