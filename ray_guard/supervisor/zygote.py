"""The zygote and its leaders: start tool processes outside any actor's filter, each with a listener of its own.

Runs in the zygote: a single-threaded child of the supervisor, forked before it grew. For each start it forks a
*leader*, which becomes the subreaper of the tool's whole tree, starts the tool, and ends everything that is left when
the tool has ended, when it is told to, or when the supervisor is gone. Nothing here decides anything.

    supervisor ──start──▶ zygote ──fork──▶ leader ──fork──▶ tool (filter, then exec)
         ◀── armed (listener) · started · failed · exited ── link ──┘
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import json
import os
import platform
import resource
import select
import signal
import socket
import time
import traceback
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from ray_guard.egress import rings
from ray_guard.kernel import landlock, libc, procfs, seccomp, seqpacket

KILL_PATIENCE_S: Final = 1.0
"""Contract: what a call leaves running is dead within one second; what is not by then is reported as unkillable."""
TERM_PATIENCE_S: Final = 1.0
_FIRST_FREE: Final = 255
"""Descriptors are parked above this, and above all of the tool's own numbers, while those are being filled."""


@dataclass(frozen=True, slots=True)
class Start:
    """What a requester asked for: the content of the start's memory file.

    Strings are as ``os.fsdecode`` makes them, so that undecodable bytes survive the way.
    """

    argv: tuple[str, ...]
    executable: str | None
    environment: dict[str, str]
    umask: int
    nice: int
    limits: dict[str, tuple[int, int]]
    affinity: tuple[int, ...]
    descriptors: tuple[int, ...]
    """Numbers in the tool, in the order in which the descriptors are passed."""
    new_group: bool
    restore_signals: bool

    @classmethod
    def parse(cls, data: bytes) -> Start:
        """Raises ValueError for anything that is not a start."""
        try:
            fields = json.loads(data)
            return cls(
                argv=tuple(_texts(fields["argv"])),
                executable=None if fields["executable"] is None else str(fields["executable"]),
                environment={str(key): str(value) for key, value in fields["environment"].items()},
                umask=int(fields["umask"]) & 0o777,
                nice=int(fields["nice"]),
                limits={str(name): (int(soft), int(hard)) for name, (soft, hard) in fields["limits"].items()},
                affinity=tuple(int(cpu) for cpu in fields["affinity"]),
                descriptors=tuple(int(number) for number in fields["descriptors"]),
                new_group=bool(fields["new_group"]),
                restore_signals=bool(fields["restore_signals"]),
            )
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"malformed start: {error!r}") from error


def _texts(values: object) -> list[str]:
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise ValueError("argv must be a list of strings, not empty")
    return values


def read_start(descriptor: int, limit: int = 16 << 20) -> Start:
    """The start in a memory file. Raises ValueError where it is malformed, OSError E2BIG where it is too long."""
    size = os.fstat(descriptor).st_size
    if size > limit:
        raise OSError(errno.E2BIG, os.strerror(errno.E2BIG))
    return Start.parse(os.pread(descriptor, size, 0))


# ---------------------------------------------------------------------------------------------------------------------
# the zygote


def run(requests: socket.socket) -> NoReturn:
    """The zygote's life: one leader per request, until the supervisor hangs up."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # leaders report to the supervisor; nobody waits for them here
    libc.prctl(libc.PR_SET_DUMPABLE, 0)  # nobody of the same user may write its memory, nor its leaders'
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a tool's descriptors may have any number
    program = rings.call_ring(platform.machine())
    gc.freeze()  # a collection in a child would copy every page
    wards: dict[int, _Ward] = {}
    while True:
        try:
            received = seqpacket.receive(requests)
        except seqpacket.BadPacket:
            continue  # one start is lost, and says so: its link is closed with the packet
        except OSError:
            received = None
        if received is None:
            _end_wards(list(wards.values()))
            os._exit(0)
        message, descriptors = received
        if message.get("op") == "ward":
            wards[int(message["pid"])] = _Ward(int(message["pid"]), int(message["start_time"]), descriptors[0])
            continue
        if message.get("op") == "release":
            ward = wards.pop(int(message["pid"]), None)
            if ward is not None:
                os.close(ward.lifeline)
            continue
        if os.fork() == 0:
            requests.close()
            for ward in wards.values():
                os.close(ward.lifeline)  # a leader's copy would keep the line alive when the zygote is gone
            code = 1
            try:
                code = _Leader(message, descriptors, program).run()
            except BaseException:  # noqa: BLE001 - nothing may return into the zygote's loop
                traceback.print_exc()
            finally:
                os._exit(code)
        seqpacket.close_all(descriptors)


@dataclass(frozen=True, slots=True)
class _Ward:
    """A target whose tree is ended here when the supervisor is gone."""

    pid: int
    start_time: int
    lifeline: int
    """Held open; where the zygote dies too, its closing kills the target."""


def _end_wards(wards: list[_Ward]) -> None:
    """The supervisor is gone, and its lifelines have stopped the targets: end their trees while these hang together.

    Children first: a target that died before them would leave them to nobody.
    """
    deadline = time.monotonic() + KILL_PATIENCE_S
    wards = [ward for ward in wards if procfs.start_time(ward.pid) == ward.start_time]
    while wards and time.monotonic() < deadline:
        below = {pid for ward in wards for pid in procfs.descendants(ward.pid) if not procfs.is_zombie(pid)}
        for pid in below or {ward.pid for ward in wards}:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if not below:
            return


class _Leader:
    """Subreaper of one tool's tree."""

    def __init__(
        self, message: dict[str, Any], descriptors: list[int], program: tuple[seccomp.Instruction, ...]
    ) -> None:
        link, self._supervisor, memory, self._folder, *self._standard = descriptors
        self._link = socket.socket(fileno=link)
        self._start = read_start(memory)
        os.close(memory)
        wall = message.get("wall_seconds")
        self._wall = None if wall is None else float(wall)
        self._program = program
        self._pid = 0
        self._status: int | None = None

    def run(self) -> int:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP):
            signal.signal(number, signal.SIG_IGN)
        os.setsid()
        libc.prctl(libc.PR_SET_CHILD_SUBREAPER, 1)
        # A domain of its own, with the tool's within: from here on kill(-1) means this call's processes, and no others.
        libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)
        try:
            landlock.enter_process_scope()
        except OSError as error:
            self._tell({"op": "failed", "stage": "scope", "errno": error.errno, "text": f"Landlock: {error.strerror}"})
            return 0
        if not self._launch():
            return 0
        timed_out = self._attend()
        survivors = self._end_all()
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        self._tell(
            {
                "op": "exited",
                "status": self._status if self._status is not None else signal.SIGKILL,
                "timed_out": timed_out,
                "unkillable": survivors,
                "cpu_seconds": usage.ru_utime + usage.ru_stime,
                "peak_memory": usage.ru_maxrss * 1024,
            }
        )
        return 0

    def _tell(self, message: dict[str, Any], descriptors: tuple[int, ...] = ()) -> None:
        try:
            seqpacket.send(self._link, message, descriptors)
        except OSError:
            pass  # the supervisor is gone: its pidfd says so too, and everything ends

    def _launch(self) -> bool:
        """Starts the tool; False: it could not be, and that was told."""
        armed_read, armed_write = os.pipe()
        go_read, go_write = os.pipe()
        failed_read, failed_write = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            _become_tool(
                self._start,
                self._program,
                self._folder,
                self._standard,
                armed=armed_write,
                go=go_read,
                failed=failed_write,
            )
        for descriptor in (armed_write, go_read, failed_write, self._folder, *self._standard):
            os.close(descriptor)
        number = os.read(armed_read, 16)
        os.close(armed_read)
        listener = -1
        if number:
            pidfd = os.pidfd_open(self._pid)
            listener = libc.pidfd_getfd(pidfd, int(number))
            os.close(pidfd)
        if listener >= 0:
            self._tell({"op": "armed", "pid": self._pid}, (listener,))
            os.close(listener)
            if self._await_go():
                os.write(go_write, b"g")
        os.close(go_write)
        failure = os.read(failed_read, 4096)
        os.close(failed_read)
        if listener >= 0 and not failure:
            self._tell({"op": "started", "pid": self._pid, "executable": _executable(self._pid)})
            return True
        self._end_all()
        if failure:
            self._tell(json.loads(failure))
        else:
            self._tell({"op": "failed", "stage": "filter", "errno": -listener, "text": "the listener cannot be taken"})
        return False

    def _await_go(self) -> bool:
        try:
            answer = seqpacket.receive(self._link)
        except (OSError, seqpacket.BadPacket):
            return False
        return answer is not None and answer[0].get("op") == "go"

    def _attend(self) -> bool:
        """Waits for the tool's end, passing on signals; whether its time ran out."""
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda _signal, _frame: None)
        poll = select.poll()
        for descriptor in (self._link.fileno(), self._supervisor, wake_read):
            poll.register(descriptor, select.POLLIN)
        limit = None if self._wall is None else time.monotonic() + self._wall
        timed_out = False
        self._reap()  # it may have ended before the handler stood
        while self._status is None:
            timeout = None if limit is None else max(0.0, limit - time.monotonic())
            for descriptor, _ in poll.poll(None if timeout is None else timeout * 1000 + 1):
                if descriptor == wake_read:
                    os.read(wake_read, 512)
                elif descriptor == self._supervisor or not self._obey():
                    return timed_out
            self._reap()
            if limit is not None and time.monotonic() >= limit and self._status is None:
                if timed_out:
                    return True
                timed_out = True
                limit = time.monotonic() + TERM_PATIENCE_S
                self._signal_all(signal.SIGTERM)
        return timed_out

    def _obey(self) -> bool:
        """One message from the supervisor; False: end everything."""
        try:
            received = seqpacket.receive(self._link)
        except (OSError, seqpacket.BadPacket):
            return False
        if received is None or received[0].get("op") != "signal":
            return False
        try:
            os.kill(self._pid, int(received[0]["number"]))  # not reaped yet, so the pid is still the tool's
        except (OSError, ValueError, KeyError):
            pass
        return True

    def _reap(self) -> bool:
        """Takes in what has ended; whether any child is left. Orphans of the call are children too."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self._pid:
                self._status = status

    @staticmethod
    def _signal_all(number: int) -> None:
        """Signals every process of the call at once.

        The kernel walks them under one lock that no fork can slip through, and the domain keeps everybody else out of
        it. A list read from /proc does not work: processes that replace themselves are quicker than its reader.
        """
        try:
            os.kill(-1, number)
        except OSError:
            pass  # ESRCH: nobody is left; EPERM: others exist, none of this call

    def _end_all(self) -> list[int]:
        """Kills until nothing is left below this process; what cannot be killed in time is returned."""
        deadline = time.monotonic() + KILL_PATIENCE_S
        while True:
            self._signal_all(signal.SIGKILL)
            if not self._reap():
                return []
            if time.monotonic() > deadline:
                return [pid for pid in procfs.descendants(os.getpid()) if not procfs.is_zombie(pid)]
            time.sleep(0.0005)


# ---------------------------------------------------------------------------------------------------------------------
# the tool, before it is one


def _become_tool(
    start: Start,
    program: tuple[seccomp.Instruction, ...],
    folder: int,
    standard: list[int],
    *,
    armed: int,
    go: int,
    failed: int,
) -> NoReturn:
    """Turns this freshly forked process into the tool. Every failure is told, none is passed over."""
    stage = "setup"
    try:
        os.setsid()
        os.fchdir(folder)
        # Park what must survive above the tool's own numbers, fill those, close everything else.
        free = max(_FIRST_FREE, *start.descriptors) + 1
        armed, go, failed = (_park(descriptor, free) for descriptor in (armed, go, failed))
        parked = [_park(descriptor, free) for descriptor in standard]
        for number, descriptor in zip(start.descriptors, parked, strict=True):
            os.dup2(descriptor, number, inheritable=True)
        kept = sorted({*start.descriptors, armed, go, failed})
        for low, high in zip([-1, *kept], [*kept, 0x7FFFFFFF], strict=True):
            if high - low > 1:
                libc.close_range(low + 1, high - 1)
        _inherit(start)
        _drop_capabilities()
        stage = "scope"
        # Within the leader's own domain, so that the tool cannot stop, kill or take over its leader.
        landlock.enter_process_scope()
        stage = "filter"
        listener = seccomp.install_on_thread(program)
        libc.prctl(libc.PR_SET_DUMPABLE, 1)  # the zygote is not; the leader must be able to take the listener
        os.write(armed, b"%d" % listener)
        os.close(armed)
        if not os.read(go, 1):
            os._exit(125)
        os.close(listener)
        os.close(go)
        stage = "exec"
        _execute(start)
    except BaseException as error:  # noqa: BLE001 - whatever it is, the requester must hear of it
        code = (error.errno if isinstance(error, OSError) else None) or errno.EINVAL
        report = {"op": "failed", "stage": stage, "errno": code, "text": str(error)}
        os.write(failed, json.dumps(report).encode()[:4000])
    os._exit(127)


def _executable(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/exe")
    except OSError:
        return None  # it has ended already


def _park(descriptor: int, at_least: int) -> int:
    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, at_least)


def _inherit(start: Start) -> None:
    """What a child of the requester would have inherited from it."""
    os.umask(start.umask)
    for name, (soft, hard) in start.limits.items():
        try:
            resource.setrlimit(getattr(resource, name), (soft, hard))
        except (OSError, ValueError):
            pass  # raising a limit above one's own is not for everybody; it then stays as it is, lower
    if start.affinity:
        try:
            os.sched_setaffinity(0, start.affinity)
        except OSError:
            pass
    more = start.nice - os.nice(0)
    if more > 0:
        os.nice(more)
    for number in signal.valid_signals():
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            try:
                ignored = number == signal.SIGPIPE and not start.restore_signals
                signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
            except (OSError, ValueError):
                pass  # the two that the C library keeps for itself
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _drop_capabilities() -> None:
    """No capability is left, nor can one come back: by exec of a set-user-id file least of all."""
    _, permitted, inheritable = libc.capget()
    if not permitted and not inheritable:
        return
    try:
        libc.prctl(libc.PR_CAP_AMBIENT, libc.PR_CAP_AMBIENT_CLEAR_ALL)
        for capability in range(64):
            libc.prctl(libc.PR_CAPBSET_DROP, capability)
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL: past the last capability of this kernel
            raise
    libc.capset(0, 0, 0)


def _execute(start: Start) -> NoReturn:
    program = start.executable if start.executable is not None else start.argv[0]
    if "/" in program:
        os.execve(program, start.argv, start.environment)
    os.execvpe(program, start.argv, start.environment)


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
