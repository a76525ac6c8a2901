"""What each call sees of the file system, put together from its policy and its surroundings. Runs in the supervisor.

The decisions are :mod:`ray_guard.policy.files`'s; the tool's own process enters what came of them
(:mod:`ray_guard.supervisor.domain`). Here paths are resolved and folders listed, once per target where that will do.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import stat
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from ray_guard.kernel import cgroup, devices, landlock, libc, mounting
from ray_guard.kernel.trial import Trial
from ray_guard.named import NamedTuple
from ray_guard.policy.decide import CompiledPolicy
from ray_guard.policy.files import (
    DEVICE,
    HIDE,
    PIN,
    PROTECT,
    READ,
    WRITE,
    Cover,
    Files,
    Grant,
    Looking,
    Places,
    Plan,
    Surroundings,
    may_change,
    places_from_wire,
    plan,
    system_grants,
)
from ray_guard.records import Mode
from ray_guard.supervisor.leaders import Fit
from ray_guard.supervisor.start import Start

_CLOCK_NS: Final = 10_000_000
"""How far the times of files may lag behind: they go by the kernel's tick."""
_REMEMBERED: Final = 64
_SHARED_MEMORY: Final = "/dev/shm"  # noqa: S108 - with a mount namespace the call's own


def listed(folder: str) -> list[str]:
    """Names in ``folder`` that are no symbolic links. Raises OSError."""
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries if not entry.is_symlink()]


@functools.cache
def _system() -> tuple[Grant, ...]:
    return system_grants(listed, os.path.realpath, mounts=mounting.works())


def unavailable() -> frozenset[str]:
    """What of a policy cannot be held on this host (names as in ``policy.enforcement``)."""
    if landlock.abi():
        return frozenset()
    return frozenset({"require.files", *(f"files.{key}" for key in ("read", "write", "hide", "protect"))})


class View(NamedTuple):
    """One start's."""

    payload: bytes
    writable: tuple[frozenset[str], ...]
    """One set per policy; what all of them name may be changed."""
    covers: tuple[Cover, ...]
    enforced: bool
    """False: every policy only reports; nothing is refused."""
    gpu: bool
    """GPUs may be used."""

    def may_change(self, path: str) -> bool:
        covered = frozenset(cover.path for cover in self.covers if cover.how != PIN)
        return all(may_change(each, path) for each in self.writable) and not may_change(covered, path)

    def fit(self) -> Fit:
        """Which leader the call needs: with what mounted (path, how, and which file it was just now)."""
        covers: list[tuple[object, ...]] = []
        for cover in self.covers:
            status = os.stat(cover.path, follow_symlinks=False)
            covers.append((cover.path, cover.how, status.st_dev, status.st_ino))
        return Fit(tuple(covers), self.gpu)

    def bind(self, duplicate: int, raw: bytes, tid: int) -> int:
        """bind(2) of a unix socket to a path for a thread of the call, where it may write; 0 or ``-errno``.

        In a thread of its own, which the kernel holds to that: looking where the path leads beforehand would be a race.
        """
        if not self.enforced:
            return libc.bind(duplicate, raw)
        elsewhere = frozenset(path for paths in self.writable for path in paths if self._is_elsewhere(path))
        results = [-errno.EACCES]
        thread = threading.Thread(target=lambda: results.append(self._bind(duplicate, raw, tid, elsewhere)))
        thread.start()
        thread.join()
        if elsewhere and results[-1] == -errno.EACCES:  # a thread cannot enter a user namespace, a process can
            return -Trial(lambda: -self._bind_inside(duplicate, raw, tid)).outcome
        return results[-1]

    def _bind(self, duplicate: int, raw: bytes, tid: int, elsewhere: frozenset[str]) -> int:
        try:
            if mounting.way() is mounting.Way.PRIVILEGED:
                _enter_namespace(tid)
            self._bound_to_writable(elsewhere)
        except OSError as error:
            return -(error.errno or errno.EACCES)
        return libc.bind(duplicate, raw)

    def _bind_inside(self, duplicate: int, raw: bytes, tid: int) -> int:
        """Where the call's mounts are in a user namespace; in a process that does nothing else."""
        try:
            _enter_namespace(tid, mounting.CLONE_NEWUSER)
            self._bound_to_writable()
        except OSError:
            return -errno.EACCES
        return libc.bind(duplicate, raw)

    def _bound_to_writable(self, elsewhere: frozenset[str] = frozenset()) -> None:
        """From here on this thread has the rights of a tool, as far as sockets are concerned."""
        libc.capset(0, 0, 0)
        libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)
        for paths in self.writable:
            _allow_sockets(paths - elsewhere)

    def _is_elsewhere(self, folder: str) -> bool:
        """Whether the call sees something else there, in a namespace that a thread of this process cannot enter."""
        if mounting.way() is not mounting.Way.USER:
            return False
        return folder == _SHARED_MEMORY or any(cover.path.startswith(folder + "/") for cover in self.covers)

    def descriptor(self) -> int:
        """A memory file of it, for the tool's process to read."""
        memory = os.memfd_create("ray_guard-view", os.MFD_CLOEXEC)
        os.write(memory, self.payload)
        return memory


def _enter_namespace(tid: int, user: int = 0) -> None:
    """This thread sees what the call sees, from where it stands; ``user``: CLONE_NEWUSER, where that leads there."""
    folder = os.open(f"/proc/{tid}/cwd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    namespace = os.open(f"/proc/{tid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    if user:
        owner = os.open(f"/proc/{tid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        mounting.setns(owner, user)
        os.close(owner)
    libc.unshare(mounting.CLONE_FS)
    mounting.setns(namespace, mounting.CLONE_NEWNS)
    os.fchdir(folder)
    os.close(folder)
    os.close(namespace)


def _allow_sockets(paths: Iterable[str]) -> None:
    """From here on this thread makes sockets below ``paths`` alone."""
    ruleset = landlock.Ruleset(landlock.Fs.MAKE_SOCK, landlock.Scope(0))
    try:
        for path in paths:
            folder = libc.openat2(path, os.O_PATH | os.O_CLOEXEC, libc.RESOLVE_NO_SYMLINKS)
            if folder < 0:
                continue
            ruleset.allow(folder, landlock.Fs.MAKE_SOCK)
            os.close(folder)
        ruleset.enter()
    finally:
        ruleset.close()


class Views:
    """Those of one target.

    Args:
        told: the target's own account of its surroundings (``client.places``).

    Raises:
        ValueError: that account is malformed.
    """

    def __init__(self, told: Any) -> None:
        found = places_from_wire(told or {})
        self._found = {name: tuple(dict.fromkeys(map(os.path.realpath, paths))) for name, paths in found.items()}
        self.temporary = (*self._found["temporary"], "/tmp")[0]  # noqa: S108 - where nothing was told
        self._last: tuple[object, View] = (None, View(b"", (), (), enforced=False, gpu=False))
        self._plans: dict[tuple[object, ...], tuple[Plan, ...]] = {}

    def of(
        self,
        policy: CompiledPolicy,
        start: Start,
        folder: int,
        *,
        scratch: str,
        since: int,
        hidden: tuple[list[str], list[str]],
    ) -> View:
        """The view of one start.

        Args:
            folder: its working folder.
            scratch: its call's temporary folder, for whichever policy grants one.
            since: when the call began (Unix ns).
            hidden: folders of the guard itself, and Ray's on this node.

        Raises:
            PolicyError, NotEnforced: ``files`` is malformed, or cannot be held here. (Where there is no Landlock
                the leader says so.)
        """
        wires = [wire for wire in policy.wires if wire.get("mode") == Mode.ENFORCE.value]
        mounts = mounting.works()
        cwd = os.readlink(f"/proc/self/fd/{folder}")
        search_path = start.environment.get("PATH", "")
        key = (tuple(map(id, policy.wires)), cwd, search_path, *map(tuple, hidden))
        handed_over = [Grant(path, READ) for path in self._handed_over(start.argv, since, (*hidden[0], *hidden[1]))]
        gpu = policy.gpu == "any" or not wires
        plans = self._plans.get(key)
        if plans is not None and not handed_over and not gpu and self._last[0] == (key, scratch):
            return self._last[1]
        if plans is None:
            plans = tuple(self._plan(Files.from_wire(wire["files"]), cwd, search_path, *hidden) for wire in wires)
            if all(each.exact for each in plans):  # else folders were listed, and have other entries next time
                if len(self._plans) >= _REMEMBERED:
                    self._plans.clear()
                self._plans[key] = plans
        layers: list[dict[str, Any]] = []
        writable = []
        own = [Grant(scratch, READ + WRITE)]
        for wire, each in zip(wires, plans, strict=True):
            grants_scratch = "scratch" in wire["files"]["write"]
            if grants_scratch and mounts:
                own.append(Grant(_SHARED_MEMORY, READ + WRITE))
            grants = [*each.grants, *((*own, *handed_over) if grants_scratch else ())]
            if mounts:
                grants.append(Grant("/dev/pts", DEVICE))
            layers.append({"system": each.system, "grants": grants})
            own_paths = frozenset(grant.path for grant in own) if grants_scratch else frozenset()
            writable.append(each.writable() | own_paths)
        environment = {}
        if wires and all("scratch" in wire["files"]["write"] for wire in wires):
            environment["TMPDIR"] = scratch
        if gpu:
            nodes = [Grant(path, DEVICE) for path in devices.gpu_nodes()]
            for layer in layers:
                layer["grants"] += nodes
        covers = {cover.path: cover for each in plans for cover in each.covers if cover.how == PIN}
        covers |= {cover.path: cover for each in plans for cover in each.covers if cover.how == PROTECT}
        covers |= {cover.path: cover for each in plans for cover in each.covers if cover.how == HIDE}
        ordered = sorted(covers.values(), key=lambda cover: (cover.path.count("/"), cover.path))
        content = {
            "layers": layers,
            "environment": environment,
            "scratch": environment.get("TMPDIR"),
            "cwd": cwd if ordered else None,
        }
        view = View(json.dumps(content).encode(), tuple(writable), tuple(ordered), enforced=bool(wires), gpu=gpu)
        if not handed_over and not gpu:  # the next start of the same call is like this one, most often
            self._last = ((key, scratch), view)
        return view

    def _handed_over(self, argv: Sequence[str], since: int, hidden: Sequence[str]) -> Iterator[str]:
        """Files named in the arguments that the target has made in its own temporary folder for this very call.

        That is how frameworks hand a program to an interpreter. They are as good as the call's own scratch, for the
        time of one start and to be read alone.
        """
        for word in argv[1:]:
            path = os.path.normpath(word)
            above = os.path.dirname(path)
            if path != word or self.temporary not in (above, os.path.dirname(above)):
                continue
            if any(path.startswith(f"{folder}/") for folder in hidden):
                continue
            places = (path,) if above == self.temporary else (above, path)
            try:
                found = [os.lstat(place) for place in places]
            except (OSError, ValueError):
                continue
            if stat.S_ISREG(found[-1].st_mode) and all(_is_own(status, since) for status in found):
                yield path

    def _plan(self, files: Files, cwd: str, search_path: str, hidden: Sequence[str], ray: Sequence[str]) -> Plan:
        places = Places(
            homes=self._found["homes"],
            environment=self._found["environment"],
            prefixes=self._found["prefixes"],
            never=(*self._found["never"], *cgroup.mount_points()),
            hidden=(*hidden, *self._found["hidden"]),
            ray=tuple(ray),
        )
        folders = tuple(os.path.realpath(path) for path in search_path.split(":") if os.path.isabs(path))
        around = Surroundings(places, _system(), cwd, folders, mounts=mounting.works())
        found = plan(files, around, Looking(listed, os.path.realpath, os.path.exists))
        return found._replace(grants=tuple(grant for grant in found.grants if _is_fit(grant)))


def _is_own(status: os.stat_result, since: int) -> bool:
    """Whether it is the user's and was made, or last changed, after that; never what a symbolic link leads to."""
    return (
        status.st_uid == os.geteuid() and status.st_ctime_ns >= since - _CLOCK_NS and not stat.S_ISLNK(status.st_mode)
    )


def _is_fit(grant: Grant) -> bool:
    """Whether it is no grant of a device that ``files`` cannot grant."""
    if not grant.path.startswith("/dev/"):
        return True
    try:
        status = os.stat(grant.path)
    except OSError:
        return False
    return devices.kind(status.st_mode, status.st_rdev) in (None, devices.Kind.HARMLESS)


def refused_descriptor(descriptor: int, policy: CompiledPolicy) -> str:
    """Why this descriptor may not become a tool's; empty: it may."""
    status = os.fstat(descriptor)
    kind = devices.kind(status.st_mode, status.st_rdev)
    if kind in (None, devices.Kind.HARMLESS) or (kind is devices.Kind.GPU and policy.gpu == "any"):
        return ""
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    return f"a descriptor of device {number} ({'block' if stat.S_ISBLK(status.st_mode) else 'character'})"
