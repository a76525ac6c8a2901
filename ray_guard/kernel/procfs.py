"""What /proc tells about other processes, any of which may be gone. Runs in target, supervisor and zygote."""

from __future__ import annotations

import ctypes
import functools
import os
import time
from collections.abc import Iterator
from typing import Final

from ray_guard.named import NamedTuple

_SHARES: Final = (b"\nPss:", b"\nPss_Shmem:")
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


_PF_FORKNOEXEC: Final = 0x40
"""``include/linux/sched.h``: set by fork, taken away by exec."""

_GONE: Final = (FileNotFoundError, ProcessLookupError, PermissionError)
"""A process that is gone, or not ours to read. Anything else (no descriptor left) is raised: it would read as zero."""


def _content(path: str, size: int) -> bytes:
    """What one read gives; empty where it is gone. (A file object would cost as much again.)"""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except _GONE:
        return b""
    try:
        return os.read(descriptor, size)
    except _GONE:
        return b""
    finally:
        os.close(descriptor)


def program(pid: int) -> bytes:
    """Differs as soon as a process has executed another program, and where addresses are random, the same one again.

    That is its auxiliary vector, which a child has of its parent. Empty: the process is gone, or unreadable.
    """
    return _content(f"/proc/{pid}/auxv", 4096)


def children(pid: int, thread: int | None = None) -> list[int]:
    """The processes that ``pid`` (or only that thread of it) has started and that are still its own.

    Some may be left out while others end. Empty where the kernel does not tell (CONFIG_PROC_CHILDREN).
    """
    found: list[int] = []
    try:
        threads = os.listdir(f"/proc/{pid}/task") if thread is None else [str(thread)]
    except _GONE:
        return found
    for each in threads:
        try:
            descriptor = os.open(f"/proc/{pid}/task/{each}/children", os.O_RDONLY | os.O_CLOEXEC)
        except _GONE:
            continue
        try:
            while data := os.read(descriptor, 1 << 16):  # one reading gives a page of them, in whole numbers
                found += map(int, data.split())
        except _GONE:
            continue
        finally:
            os.close(descriptor)
    return found


@functools.cache
def _last_pid() -> int:
    """A descriptor of it; -1: the kernel does not tell (CONFIG_CHECKPOINT_RESTORE)."""
    try:
        return os.open("/proc/sys/kernel/ns_last_pid", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1


def is_youngest(pid: int) -> bool:
    """Whether nobody was born after that living process: then it has no children, and no threads. False: who knows.

    No number is given out twice while it is in use, so no round through all of them can end at this one.
    """
    descriptor = _last_pid()
    return descriptor >= 0 and os.pread(descriptor, 32, 0) == b"%d\n" % pid


@functools.cache
def tells_children() -> bool:
    """Whether :func:`children` works here."""
    return os.path.exists(f"/proc/self/task/{os.getpid()}/children")


def resident(pid: int) -> int:
    """Bytes of the process's memory that are resident, shared ones included; 0: it is gone."""
    fields = _content(f"/proc/{pid}/statm", 256).split()
    return int(fields[1]) * _PAGE if fields else 0


class Share(NamedTuple):
    """Resident memory, what is shared divided among its users. ``shared_memory``: the part of it in files in memory."""

    bytes: int
    shared_memory: int


def resident_share(pid: int) -> Share:
    """Bytes: exact over a tree, and slow to ask for."""
    data = _content(f"/proc/{pid}/smaps_rollup", 4096)
    found = [int(data[at:].split(None, 2)[1]) * 1024 for key in _SHARES if (at := data.find(key)) >= 0]
    return Share(*found) if len(found) == len(_SHARES) else Share(resident(pid), 0)


def descriptors(pid: int) -> list[str]:
    """Its numbers; empty where it is gone, or not ours to read."""
    try:
        return os.listdir(f"/proc/{pid}/fd")
    except _GONE:
        return []


def peak_resident(pid: int) -> tuple[int, int]:
    """The most bytes that were ever resident of it (0: it is gone), and a descriptor to be closed (-1: none).

    Each exit waits for this, and closing takes a third of it.
    """
    try:
        descriptor = os.open(f"/proc/{pid}/status", os.O_RDONLY | os.O_CLOEXEC)
    except _GONE:
        return 0, -1
    try:
        data = os.read(descriptor, 8192)
    except _GONE:
        return 0, descriptor
    at = data.find(b"\nVmHWM:")
    return int(data[at + 7 : data.index(b"kB", at)]) * 1024 if at >= 0 else 0, descriptor


def _stat_fields(pid: int) -> list[bytes] | None:
    """Fields of /proc/PID/stat from the state (field 3) on; None: no such process."""
    data = _content(f"/proc/{pid}/stat", 4096)
    return data[data.rindex(b")") + 2 :].split() if data else None  # the name may hold spaces and parentheses


def parent(pid: int) -> int | None:
    fields = _stat_fields(pid)
    return None if fields is None else int(fields[1])


def start_time(pid: int) -> int | None:
    """Clock ticks since boot when the process started: with the pid, its identity."""
    fields = _stat_fields(pid)
    return None if fields is None else int(fields[19])


def has_executed(pid: int) -> bool | None:
    """Whether a process has executed a program since it was forked; None: no such process."""
    fields = _stat_fields(pid)
    return None if fields is None else not int(fields[6]) & _PF_FORKNOEXEC


def is_zombie(pid: int) -> bool:
    fields = _stat_fields(pid)
    return fields is not None and fields[0] == b"Z"


def zombie_status(pid: int) -> int | None:
    """How a process ended that was not waited for yet, as waitpid gives it; None: it runs, or is gone."""
    fields = _stat_fields(pid)
    return int(fields[49]) if fields is not None and fields[0] in (b"Z", b"X") else None


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
    data = _content(f"/proc/{pid}/status", 8192)
    at = data.find(b"\n" + key)  # no line of it can be forged: in the name a newline is escaped
    if at < 0:
        return None
    return int(data[at + len(key) + 1 : data.index(b"\n", at + 1)].split()[0], base)


def has_capability(pid: int, capability: int) -> bool:
    """Whether the process has it in its effective set; an unreadable process has none."""
    effective = _status(pid, b"CapEff:", 16)
    return effective is not None and bool(effective >> capability & 1)


def filters(pid: int) -> int | None:
    """How many seccomp filters a process has; None: it is gone, or the kernel does not tell (before Linux 5.10)."""
    return _status(pid, b"Seccomp_filters:")


def self_image(tid: int) -> bytes:
    """``NAMESPACE-PID``: a thread's process as it sees itself, in its pid namespace (an inode); empty: it is gone."""
    own = _content(f"/proc/{tid}/status", 8192).partition(b"\nNStgid:")[2].partition(b"\n")[0].split()
    try:
        return b"%d-%s" % (os.stat(f"/proc/{tid}/ns/pid").st_ino, own[-1])
    except (OSError, IndexError):
        return b""


def uptime() -> float:
    """Seconds since boot, on the clock that start times are told in."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def ignores(pid: int, number: int) -> bool:
    """Whether the process ignores that signal."""
    mask = _status(pid, b"SigIgn:", 16)
    return mask is not None and bool(mask >> (number - 1) & 1)


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


def kinship() -> dict[int, tuple[int, int]]:
    """(parent, process group) of every process."""
    found: dict[int, tuple[int, int]] = {}
    for pid in processes():
        fields = _stat_fields(pid)
        if fields is not None:
            found[pid] = (int(fields[1]), int(fields[2]))
    return found


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


def command_name(pid: int) -> str:
    """The name that a process gives itself (comm); empty: it is gone."""
    try:
        with open(f"/proc/{pid}/comm", "rb", buffering=0) as file:
            return file.read(64).decode(errors="replace").rstrip("\n")
    except OSError:
        return ""


def overwrite_arguments(name: bytes) -> None:
    """Makes ``name`` what /proc shows as this process's command, and empties what it shows as its environment.

    The kernel shows the memory that both were handed over in. Nothing may be looked up there any more: variables that
    are to stay must have been set anew.
    """
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    start, end, environment_end = int(fields[45]), int(fields[46]), int(fields[48])
    ctypes.memset(start, 0, environment_end - start)
    ctypes.memmove(start, name, min(len(name), end - start - 1))
