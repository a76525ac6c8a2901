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
from collections.abc import Iterator
from typing import Any, Final, NoReturn

from ray_guard.egress import rings
from ray_guard.kernel import borrowing, ipc, landlock, libc, procfs, seccomp, seqpacket, syscalls, trees
from ray_guard.supervisor import domain, handover, leaf, mounts, witness
from ray_guard.supervisor.embryo import bound_capabilities, close_all_but
from ray_guard.supervisor.keeping import Keeping
from ray_guard.supervisor.leader import lead
from ray_guard.supervisor.leaf import KILL_PATIENCE_S
from ray_guard.supervisor.leftovers import Held, sweep


def run(requests: socket.socket) -> NoReturn:
    """The zygote's life, until the supervisor hangs up."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # leaders report to the supervisor; nobody waits for them here
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP):
        signal.signal(number, lambda _signal, _frame: None)  # not ignored: what is executed would do so too
    libc.prctl(libc.PR_SET_DUMPABLE, 0)  # nobody of the same user may write its memory, nor its leaders'
    libc.prctl(libc.PR_SET_CHILD_SUBREAPER, 1)  # what has lost its leader comes here, to be ended
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a tool's descriptors may have any number
    supervisor = os.getppid()
    zygote = _Zygote(requests)
    gc.freeze()  # a collection in a child would copy every page
    gc.enable()
    while zygote.step():
        pass
    too_late = time.monotonic() + handover.PATIENCE_S
    zygote.keeping.unread.shut(supervisor, but=zygote.estates.held)
    zygote.keeping.wards.end(but=zygote.estates.pids)
    zygote.end_adopted(zygote.leaders)
    zygote.hand_over(supervisor, too_late)
    try:
        zygote.keeping.unread.write()
    except OSError:
        import traceback

        traceback.print_exc()
    zygote.dismiss_witness()
    zygote.held.clear()
    zygote.remove_leaves()
    os._exit(0)


_OWN_SWEPT: Final = 256
"""How often, in children, those that have ended are forgotten."""


def _program(*, gpu: bool) -> bytes:
    """The filter of a call."""
    borrows, own_ipc = borrowing.works(), ipc.can_be_own()
    ring = rings.call_ring(syscalls.MACHINE, landlock=landlock.abi(), borrows=borrows, own_ipc=own_ipc, gpu=gpu)
    return seccomp.encode(ring)


class _Zygote:
    def __init__(self, requests: socket.socket) -> None:
        self._requests = requests
        self._programs = {False: _program(gpu=False)}
        self._system = domain.prepare()
        with contextlib.suppress(OSError):  # its leaders say so
            domain.Domain(self._system).close()  # what is kept of it once they share
        self.keeping = Keeping()
        self._own: dict[int, int | None] = {}
        """Its own children and when they were born, to tell them from those it takes in."""
        self.leaders: set[int] = set()
        self.estates = handover.Estates()
        self.held = Held()
        self._supervisor = os.getppid()
        self._witness: socket.socket | None = None
        self._leaves: list[leaf.OwnLeaf] = []
        self._rehearsed = False

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
        if operation == "release":
            self.estates.release(int(message["line"]))
        if self.keeping.obey(message, descriptors):
            pass
        elif operation in ("bequeath", "disinherit", "book"):
            self.estates.obey(message, descriptors)
        elif operation == "remove":
            self._remove(str(message["path"]))
        elif operation == "hold":
            with contextlib.suppress(OSError):  # then its calls make it, and say so where they cannot
                self.held.hold(str(message["path"]))
        elif operation == "sweep":
            self._sweep(str(message["path"]))
        elif operation in ("mover", "signer", "recoverer", "judge", "witness"):
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
            if len(self._own) % _OWN_SWEPT == 0:
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

    def _rehearse(self) -> None:
        """Before the second leader: one is quick to be there, from two on their size counts."""
        if self.leaders and not self._rehearsed:
            self._rehearsed = True
            from ray_guard.supervisor.rehearsal import rehearse  # here alone: nobody's first call waits for it

            rehearse(self._programs[False], self._system)
            gc.freeze()

    def _fork_leader(self, line: int, covers: mounts.Covers, *, gpu: bool) -> None:
        self._rehearse()
        program = self._programs[gpu] = self._programs.get(gpu) or _program(gpu=gpu)
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
            try:
                bound_capabilities()
            except OSError:
                pass  # then each tool tries, and says so
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, line)
            code = lead(sock, program, self._system, covers, own.path if own is not None and own.joined else "")
        except BaseException:  # noqa: BLE001 - nothing may return into the zygote's loop
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)

    def _fork_helper(self, which: str, descriptors: list[int]) -> None:
        if which == "witness":
            self._witness, theirs = socket.socketpair()
            descriptors.append(theirs.detach())
        if self._is_parent(os.fork()):
            seqpacket.close_all(descriptors)
            return
        try:
            close_all_but((0, 1, 2, *descriptors))
            line = socket.socket(fileno=descriptors[0])
            if which == "witness":
                witness.run(line, socket.socket(fileno=descriptors[1]), self._supervisor)
                os._exit(0)
            # Here alone: what every tool is forked from stays small.
            if which == "mover":
                from ray_guard.egress.relay import mover

                mover.run(line)
            if which == "signer":
                from ray_guard.evidence import signer

                signer.run(line)
            if which == "judge":
                from ray_guard.evidence import judge

                judge.run(line)
            from ray_guard.evidence import recovery

            recovery.run(line)
            os._exit(0)
        except BaseException:  # noqa: BLE001 - nothing may return into the zygote's loop
            import traceback

            traceback.print_exc()
        finally:
            os._exit(1)

    def dismiss_witness(self) -> None:
        """All is done that it would do."""
        if self._witness is not None:
            with contextlib.suppress(OSError):
                self._witness.sendall(witness.ALL_DONE)

    def remove_leaves(self) -> None:
        """The supervisor is gone, and so are its leaders, or about to."""
        deadline = time.monotonic() + 2 * KILL_PATIENCE_S
        while (left := [each for each in self._leaves if not each.remove()]) and time.monotonic() < deadline:
            self._leaves = left
            time.sleep(0.002)

    def hand_over(self, supervisor: int, until: float) -> None:
        """Hands on what is kept to the next supervisor; what nobody takes is ended."""
        if not self.estates.held:
            return
        taken: set[int] = set()
        if handover.await_end(supervisor, until):
            try:
                taken = handover.hand_over(self._offers(), until, self._start_supervisor)
            except OSError:
                import traceback

                traceback.print_exc()
        for number, estate in list(self.estates.held.items()):
            if number in taken:
                self.keeping.unread.release(number)
                self.keeping.wards.release_tree(estate.pid)
            else:
                self.keeping.unread.shut_one(number)
            self.estates.release(number)
        self.keeping.wards.end()

    def _offers(self) -> Iterator[handover.Offer]:
        for number, estate in self.estates.held.items():
            ward, line = self.keeping.wards.target(estate.pid), self.keeping.unread.line(number)
            if line is None or (estate.pid and (ward is None or ward.lifeline is None)):
                continue
            last = self.keeping.unread.last_of(number)
            journaled = last is not None and self.keeping.unread.has_ended(number, str(last.get("span")))
            tied = () if ward is None or ward.lifeline is None else (ward.lifeline,)
            yield handover.Offer(estate, 0 if ward is None else ward.start_time, line, tied, last, journaled)

    def _start_supervisor(self, listener: socket.socket) -> None:
        if not self._is_parent(os.fork()):
            try:
                handover.become_supervisor(listener)
            except BaseException:  # noqa: BLE001 - nothing may return into the zygote's loop
                import traceback

                traceback.print_exc()
            finally:
                os._exit(0)

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
