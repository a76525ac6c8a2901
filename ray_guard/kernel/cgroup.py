"""Control groups, both versions: which a process is in, moving or starting one there. Runs in supervisor and zygote.

See cgroups(7), clone(2). A hierarchy is named as in /proc/PID/cgroup: by its controllers, or ``""`` for version 2.
"""

from __future__ import annotations

import ctypes
import functools
import os
import signal
from collections.abc import Mapping

_DELETED = " (deleted)"
_NR_CLONE3 = 435
_CLONE_INTO_CGROUP = 1 << 33
_before_fork = ctypes.pythonapi["PyOS_BeforeFork"]
_after_fork_here = ctypes.pythonapi["PyOS_AfterFork_Parent"]
_after_fork_in_child = ctypes.pythonapi["PyOS_AfterFork_Child"]
_holding_syscall = ctypes.PyDLL(None, use_errno=True)["syscall"]
"""Called without letting go of the interpreter's lock: a child must have it."""


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


def mount_points() -> tuple[str, ...]:
    """Where hierarchies are mounted here."""
    return tuple(dict.fromkeys(where for where, _ in mounts().values()))


def move(pid: int, there: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """Moves a process whose paths are ``here`` to ``there``; the hierarchies in which it could not be."""
    left = []
    for name, path in there.items():
        if here.get(name) != path:
            try:
                join(folder(name, path), pid)
            except OSError:
                left.append(name)
    return left


def join(where: str, pid: int) -> None:
    """Moves process ``pid`` (0: this one) into the group in folder ``where``; it takes milliseconds. Raises OSError."""
    with open(f"{where}/cgroup.procs", "wb", buffering=0) as file:
        file.write(b"%d" % pid)


class _CloneArgs(ctypes.Structure):
    _names = "flags pidfd child_tid parent_tid exit_signal stack stack_size tls set_tid set_tid_size cgroup"
    _fields_ = tuple((name, ctypes.c_uint64) for name in _names.split())


def fork_into(group: int) -> int:
    """fork(2) of a single-threaded process with the child in a group of version 2, an open folder.

    As quick as a fork, where moving a process waits for a grace period of the kernel's. Not by the C library, which
    knows no such call: what that would do for the child (locks of other threads) is not needed where there are none.

    Raises:
        OSError: ENOSYS (before Linux 5.7, or refused), EACCES, EBUSY, ENODEV: as clone(2) says.
    """
    arguments = _CloneArgs(flags=_CLONE_INTO_CGROUP, exit_signal=signal.SIGCHLD, cgroup=group)
    _before_fork()
    pid: int = _holding_syscall(_NR_CLONE3, ctypes.byref(arguments), ctypes.c_size_t(ctypes.sizeof(arguments)))
    if pid == 0:
        _after_fork_in_child()
    else:
        _after_fork_here()
    if pid < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "clone3")
    return pid


def folder(name: str, path: str) -> str:
    """Where a path of a hierarchy is to be found. Raises OSError where it is not mounted here."""
    where, root = mounts().get(name.split(",", maxsplit=1)[0], ("", ""))
    root = root.rstrip("/")
    if not where or path.endswith(_DELETED) or not f"{path.rstrip('/')}/".startswith(f"{root}/"):
        raise FileNotFoundError(path)
    return where + path.removeprefix(root).rstrip("/")
