"""What /proc tells about other processes, any of which may be gone. Runs in target, supervisor and zygote."""

from __future__ import annotations

import os
from collections.abc import Iterator


def _stat_fields(pid: int) -> list[bytes] | None:
    """Fields of /proc/PID/stat from the state (field 3) on; None: no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            data = file.read(4096)
    except OSError:
        return None
    return data[data.rindex(b")") + 2 :].split()  # the name may hold spaces and parentheses


def parent(pid: int) -> int | None:
    fields = _stat_fields(pid)
    return None if fields is None else int(fields[1])


def start_time(pid: int) -> int | None:
    """Clock ticks since boot when the process started: with the pid, its identity."""
    fields = _stat_fields(pid)
    return None if fields is None else int(fields[19])


def is_zombie(pid: int) -> bool:
    fields = _stat_fields(pid)
    return fields is not None and fields[0] == b"Z"


def thread_group(tid: int) -> int | None:
    """Process id of a thread; None: no such thread."""
    return _status(tid, b"Tgid:")


def traced_pid(pid: int, pidfd: int) -> int | None:
    """Which process descriptor ``pidfd`` of process ``pid`` stands for; None: none, or it is no pidfd."""
    try:
        with open(f"/proc/{pid}/fdinfo/{pidfd}", "rb", buffering=0) as file:
            for line in file.read(4096).splitlines():
                if line.startswith(b"Pid:"):
                    found = int(line.split()[1])
                    return found if found > 0 else None
    except (OSError, ValueError):
        pass
    return None


def _status(pid: int, key: bytes, base: int = 10) -> int | None:
    try:
        with open(f"/proc/{pid}/status", "rb", buffering=0) as file:
            for line in file.read(8192).splitlines():
                if line.startswith(key):
                    return int(line.split()[1], base)
    except (OSError, ValueError):
        pass
    return None


def has_capability(pid: int, capability: int) -> bool:
    """Whether the process has it in its effective set; an unreadable process has none."""
    effective = _status(pid, b"CapEff:", 16)
    return effective is not None and bool(effective >> capability & 1)


def umask(pid: int) -> int:
    """The process's umask; 0o077, the strictest in use, where it cannot be read."""
    mask = _status(pid, b"Umask:", 8)
    return 0o077 if mask is None else mask


def is_in_tree(pid: int, root: int) -> bool:
    """Whether ``pid`` is ``root`` or descends from it. A process that lost its parents is not."""
    seen = 0
    at: int | None = pid
    while at is not None and at > 1 and seen < 4096:
        if at == root:
            return True
        at, seen = parent(at), seen + 1
    return False


def mounted_device(descriptor: int, other: int) -> int | None:
    """The device of the file system that an own descriptor's file is on, as the kernel numbers it; None: unknown.

    Not ``st_dev``: btrfs and overlayfs tell another number there. The mount may be in the namespace of process
    ``other``, where the descriptor was opened by way of that.
    """
    mount = b""
    with open(f"/proc/self/fdinfo/{descriptor}", "rb", buffering=0) as file:
        for line in file.read(4096).splitlines():
            if line.startswith(b"mnt_id:"):
                mount = line.split()[1]
    for process in ("self", other):
        with open(f"/proc/{process}/mountinfo", "rb") as file:
            for line in file:
                fields = line.split(maxsplit=3)
                if fields[0] == mount:
                    major, minor = fields[2].split(b":")
                    return int(major) << 20 | int(minor)
    return None


def processes() -> Iterator[int]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            yield int(name)


def descendants(root: int) -> list[int]:
    """All processes below ``root``, parents before children, zombies included."""
    children: dict[int, list[int]] = {}
    for pid in processes():
        above = parent(pid)
        if above is not None:
            children.setdefault(above, []).append(pid)
    found: list[int] = []
    waiting = list(children.get(root, ()))
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        waiting += children.get(pid, ())
    return found


def sockets_of(pid: int) -> dict[int, int]:
    """Socket inode → descriptor number, for every socket the process holds."""
    found: dict[int, int] = {}
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return found
    for name in names:
        try:
            link = os.readlink(f"/proc/{pid}/fd/{name}")
        except OSError:
            continue
        if link.startswith("socket:["):
            found[int(link[8:-1])] = int(name)
    return found


def command_line(pid: int) -> tuple[str, ...]:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            parts = file.read(1 << 16).split(b"\0")
    except OSError:
        return ()
    return tuple(part.decode(errors="replace") for part in parts[:-1])
