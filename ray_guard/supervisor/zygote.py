"""The zygote: starts tool processes outside any actor's filter, each with a listener of its own.

Runs in the zygote: a single-threaded child of the supervisor, forked before that grew, since what is small is forked
fast. It forks *leaders*, each with a thread that is already filtered and waits to start a tool; from then on they talk
to the supervisor alone.

    supervisor ──leader──▶ zygote ──fork──▶ leader ── thread (filter …
         ◀── ready (its listener, its line) ── line ─┘    │
         ──── prepare (what the tool will be) ───────────▶│ … domain) ──posix_spawn──▶ the tool
         ◀─── its exec, notified; answered, it is stopped ─────────────────────────────┘ ▲
         ──── start ── line ─▶ leader ── when the thread is gone: continue ──────────────┘
         ◀─── started · failed · exited ─┘
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import resource
import signal
import socket
import time
from collections.abc import Mapping
from typing import Any, Final, NoReturn

from ray_guard.egress import rings
from ray_guard.kernel import borrowing, ipc, landlock, libc, procfs, seccomp, seqpacket, syscalls, trees
from ray_guard.named import NamedTuple
from ray_guard.supervisor import domain, leaf, mounts
from ray_guard.supervisor.embryo import bound_capabilities, close_all_but
from ray_guard.supervisor.leader import KILL_PATIENCE_S, lead
from ray_guard.supervisor.leftovers import Held, sweep
from ray_guard.supervisor.unread import About, Unread


def run(requests: socket.socket) -> NoReturn:
    """The zygote's life, until the supervisor hangs up."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # leaders report to the supervisor; nobody waits for them here
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP):
        signal.signal(number, lambda _signal, _frame: None)  # not ignored: what is executed would do so too
    libc.prctl(libc.PR_SET_DUMPABLE, 0)  # nobody of the same user may write its memory, nor its leaders'
    libc.prctl(libc.PR_SET_CHILD_SUBREAPER, 1)  # what has lost its leader comes here, to be ended
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a tool's descriptors may have any number
    with contextlib.suppress(OSError):  # then each tool tries, and says so
        bound_capabilities()
    supervisor = os.getppid()
    zygote = _Zygote(requests)
    gc.freeze()  # a collection in a child would copy every page
    gc.enable()
    while zygote.step():
        pass
    zygote.unread.shut(supervisor)
    zygote.end_wards()
    zygote.end_adopted(zygote.leaders)
    try:
        zygote.unread.write()
    except OSError:
        import traceback

        traceback.print_exc()
    zygote.held.clear()
    zygote.remove_leaves()
    os._exit(0)


class _Ward(NamedTuple):
    """A process whose tree is ended here when the supervisor is gone."""

    pid: int
    start_time: int
    lifeline: int | None
    """A target's, held open: where the zygote dies too, its closing kills the target. None: a process beside one."""

    @property
    def lives(self) -> bool:
        return procfs.start_time(self.pid) == self.start_time


_WARDS_SWEPT: Final = 256
"""How often, in wards, those that have ended are forgotten."""


class _Zygote:
    def __init__(self, requests: socket.socket) -> None:
        self._requests = requests
        self._programs = {
            gpu: seccomp.encode(
                rings.call_ring(
                    syscalls.MACHINE,
                    landlock=landlock.abi(),
                    borrows=borrowing.works(),
                    own_ipc=ipc.can_be_own(),
                    gpu=gpu,
                )
            )
            for gpu in (False, True)
        }
        self._system = domain.prepare()
        with contextlib.suppress(OSError):  # its leaders say so
            domain.Domain(self._system).close()  # what is kept of it once they share
        self._wards: dict[int, _Ward] = {}
        self._own: dict[int, int | None] = {}
        """Its own children and when they were born, to tell them from those it takes in."""
        self.leaders: set[int] = set()
        self.held = Held()
        self.unread = Unread()
        self._leaves: list[leaf.OwnLeaf] = []

    def step(self) -> bool:
        """Handles what has come; False: the supervisor is gone."""
        try:
            received = seqpacket.receive(self._requests)
        except seqpacket.BadPacket:
            return True  # one leader is not made, and says so: its line is closed with the packet
        except OSError:
            return False
        if received is None:
            return False
        self._obey(*received)
        return True

    def _obey(self, message: dict[str, Any], descriptors: list[int]) -> None:
        operation = message.get("op")
        if "about" in message:
            self.unread.hold(int(message["line"]), descriptors.pop(), About(*message["about"]))
        if operation == "ward":
            pid = int(message["pid"])
            self._wards[pid] = _Ward(pid, int(message["start_time"]), descriptors[0] if descriptors else None)
            if len(self._wards) % _WARDS_SWEPT == 0:
                self._wards = {
                    pid: ward for pid, ward in self._wards.items() if ward.lifeline is not None or ward.lives
                }
        elif operation == "rename":
            self.unread.rename(int(message["line"]), message["resource"])
        elif operation == "remove":
            self._remove(str(message["path"]))
        elif operation == "hold":
            with contextlib.suppress(OSError):  # then its calls make it, and say so where they cannot
                self.held.hold(str(message["path"]))
        elif operation == "sweep":
            self._sweep(str(message["path"]))
        elif operation == "release":
            self.unread.release(int(message["line"]))
            ward = self._wards.pop(int(message["pid"]), None)
            if ward is not None and ward.lifeline is not None:
                os.close(ward.lifeline)
        elif operation in ("mover", "signer", "recoverer"):
            self._fork_helper(operation, descriptors)
        elif operation == "end_adopted":
            self.end_adopted({int(message["leader"])})
        elif operation == "leader":
            (line,) = descriptors
            try:
                self._fork_leader(line, message["covers"], gpu=bool(message["gpu"]))
            except OSError:  # no more processes: this leader is lost, and says so, for its line closes here
                import traceback

                traceback.print_exc()
            os.close(line)

    def _is_parent(self, pid: int) -> bool:
        """Notes a child that was just forked; False: this is it."""
        if pid:
            self._own[pid] = procfs.start_time(pid)
            if len(self._own) % _WARDS_SWEPT == 0:
                self._own = {each: born for each, born in self._own.items() if procfs.start_time(each) == born}
        return pid != 0

    def _remove(self, path: str) -> None:
        """Takes away a call's temporary folder: mostly it is empty, else a child does it, for it may be large."""
        try:
            os.rmdir(path)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return
        else:
            return
        if not self._is_parent(os.fork()):
            try:
                trees.remove(path)
            finally:
                os._exit(0)

    def _sweep(self, place: str) -> None:
        if not self._is_parent(os.fork()):
            try:
                sweep(place)
            finally:
                os._exit(0)

    def _fork_leader(self, line: int, covers: mounts.Covers, *, gpu: bool) -> None:
        self._leaves = [each for each in self._leaves if not each.remove()]
        own = leaf.new()
        try:
            pid = os.fork() if own is None else own.fork()
        except OSError:
            if own is not None:
                own.close()
            raise
        if self._is_parent(pid):
            self.leaders = {each for each in self.leaders if self._is_own(each)} | {pid}
            if own is not None:
                own.let_go()
                self._leaves.append(own)
            return
        code = 1
        try:
            # A leader's copies would keep alive the lines of targets that are the zygote's wards.
            close_all_but((0, 1, 2, line, *(() if own is None else (own.descriptor,))))
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, line)
            code = lead(
                sock, self._programs[gpu], self._system, covers, own.path if own is not None and own.joined else ""
            )
        except BaseException:  # noqa: BLE001 - nothing may return into the zygote's loop
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)

    def _fork_helper(self, which: str, descriptors: list[int]) -> None:
        if self._is_parent(os.fork()):
            seqpacket.close_all(descriptors)
            return
        try:
            close_all_but((0, 1, 2, *descriptors))
            line = socket.socket(fileno=descriptors[0])
            # Here alone: what every tool is forked from stays small.
            if which == "mover":
                from ray_guard.egress.relay import mover

                mover.run(line)
            if which == "signer":
                from ray_guard.evidence import signer

                signer.run(line)
            from ray_guard.evidence import recovery

            recovery.run(line)
            os._exit(0)
        except BaseException:  # noqa: BLE001 - nothing may return into the zygote's loop
            import traceback

            traceback.print_exc()
        finally:
            os._exit(1)

    def remove_leaves(self) -> None:
        """The supervisor is gone, and so are its leaders, or about to."""
        deadline = time.monotonic() + 2 * KILL_PATIENCE_S
        while (left := [each for each in self._leaves if not each.remove()]) and time.monotonic() < deadline:
            self._leaves = left
            time.sleep(0.002)

    def end_wards(self) -> None:
        """The supervisor is gone, and its lifelines have stopped the targets: ends all below them.

        Children first: a target that died before them would leave them to nobody.
        """
        deadline = time.monotonic() + KILL_PATIENCE_S
        wards = [ward for ward in self._wards.values() if ward.lives]
        while wards and time.monotonic() < deadline:
            below = {pid for ward in wards for pid in procfs.descendants(ward.pid) if not procfs.is_zombie(pid)}
            for pid in below or {ward.pid for ward in wards}:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            if not below:
                return

    def _is_own(self, pid: int) -> bool:
        born = procfs.start_time(pid)
        return born is not None and self._own.get(pid) == born

    def end_adopted(self, leaders: set[int]) -> None:
        """Ends what has lost its leader, with all below it. ``leaders``: whose end is waited for."""
        deadline = time.monotonic() + 2 * KILL_PATIENCE_S
        while time.monotonic() < deadline:
            leading = any(self._is_own(pid) for pid in leaders)
            adopted = [pid for pid in procfs.children(os.getpid()) if not self._is_own(pid)]
            for pid in [each for root in adopted for each in (root, *procfs.descendants(root))]:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            if not adopted and not leading:
                return
            time.sleep(0.002)


def ward(starts: socket.socket, pid: int) -> None:
    """Puts a process's tree into the zygote's care, should the supervisor die; called by the supervisor."""
    start_time = procfs.start_time(pid)
    if start_time is not None:  # else it has ended already
        seqpacket.send(starts, {"op": "ward", "pid": pid, "start_time": start_time})


class WardedLine(NamedTuple):
    """A target's line to the supervisor, in the zygote's care too: see :mod:`ray_guard.supervisor.unread`."""

    starts: socket.socket
    number: int
    pid: int
    """Of the process that ends with the supervisor; 0: an observer, which nobody ends."""

    def begin(self, line: socket.socket, about: About, lifeline: socket.socket) -> None:
        """Puts it into the zygote's care, should the supervisor die; called by the supervisor.

        Args:
            lifeline: held open by the zygote, whose end kills the process.
        """
        message: dict[str, Any] = {"op": "line", "line": self.number, "about": about}
        passed = [line.fileno()]
        if self.pid:
            born = procfs.start_time(self.pid) or 0  # 0: it has ended already, but what it said is kept
            message |= {"op": "ward", "pid": self.pid, "start_time": born}
            passed.insert(0, lifeline.fileno())
        seqpacket.send(self.starts, message, passed)

    def rename(self, resource: Mapping[str, Any]) -> None:
        """It has learnt which actor it is; called by the supervisor."""
        seqpacket.send(self.starts, {"op": "rename", "line": self.number, "resource": resource})

    def end(self) -> None:
        """It was read to its end, and its process is gone; called by the supervisor. Raises OSError."""
        seqpacket.send(self.starts, {"op": "release", "pid": self.pid, "line": self.number})


def end_adopted(starts: socket.socket, leader: int) -> None:
    """A leader was lost: ends what it has led; called by the supervisor."""
    seqpacket.send(starts, {"op": "end_adopted", "leader": leader})


def remove(starts: socket.socket, path: str) -> None:
    """Takes away a call's temporary folder; called by the supervisor."""
    seqpacket.send(starts, {"op": "remove", "path": path})


def hold(starts: socket.socket, path: str) -> None:
    """Makes the folder of this supervisor's calls and holds it, while this process lives; called by the supervisor."""
    seqpacket.send(starts, {"op": "hold", "path": path})


def sweep_place(starts: socket.socket, place: str) -> None:
    """Takes away what lost supervisors have left there; called by the supervisor."""
    seqpacket.send(starts, {"op": "sweep", "path": place})


def start_mover(starts: socket.socket, line: socket.socket) -> None:
    """Starts a mover of relayed bytes at this end of its line; called by the supervisor."""
    seqpacket.send(starts, {"op": "mover"}, [line.fileno()])


def start_signer(starts: socket.socket, line: socket.socket) -> None:
    """Starts the signer of the logs at this end of its line; called by the supervisor."""
    seqpacket.send(starts, {"op": "signer"}, [line.fileno()])


def start_recoverer(starts: socket.socket, line: socket.socket) -> None:
    """Starts the recoverer of former logs at this end of its line; called by the supervisor."""
    seqpacket.send(starts, {"op": "recoverer"}, [line.fileno()])


def ask_for_leader(starts: socket.socket, covers: mounts.Covers = (), *, gpu: bool = False) -> socket.socket:
    """The line to a new leader; called by the supervisor. Where it cannot be forked the line ends at once.

    Args:
        covers, gpu: see :class:`ray_guard.supervisor.leaders.Fit`.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        try:
            seqpacket.send(starts, {"op": "leader", "covers": covers, "gpu": gpu}, [theirs.fileno()])
        except OSError:
            pass  # the zygote is gone, and the supervisor about to end
    return ours


def fork(close: list[int]) -> tuple[socket.socket, int]:
    """Forks the zygote; in the supervisor returns the socket that starts are sent on, and the zygote's pid."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            for descriptor in close:
                os.close(descriptor)
            run(theirs)
        finally:
            os._exit(1)
    theirs.close()
    return ours, pid
