"""A process that is going to be a tool: forked, filtered, and waiting to be told what it will be. Runs in the zygote.

Forking and filtering take milliseconds, exec one: so the first two are done before anybody asks. What is the same for
every tool is settled at birth; what its requester wants comes with the start.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import os
import resource
import signal
import socket
import stat
import termios
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, Final, NoReturn

from ray_guard.kernel import borrowing, ipc, libc, seccomp, seqpacket
from ray_guard.policy.files import Grant
from ray_guard.supervisor import mounts
from ray_guard.supervisor.domain import Domain, read_view
from ray_guard.supervisor.leaf import OwnLeaf
from ray_guard.supervisor.start import Start, read_start

_FIRST_FREE: Final = 255
"""Descriptors are parked above this, and above all of the tool's own numbers, while those are being filled."""


class Embryo:
    """The leader's side.

    Attributes:
        pid: the tool's, from the beginning.
        leaf: the control group it was born into; None: there is none.
        listener: where its notifications arrive; ``-errno`` where it could not be taken.
    """

    def __init__(
        self,
        program: tuple[seccomp.Instruction, ...],
        system: Sequence[Grant],
        covers: mounts.Covers,
        leaf: OwnLeaf | None = None,
    ) -> None:
        armed_read, armed_write = os.pipe()
        self._failed, failed_write = os.pipe()
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        _altered_signals()
        self.leaf = leaf
        self.pid = os.fork() if leaf is None else leaf.fork()
        if self.pid == 0:
            _live(program, system, covers, theirs.detach(), armed_write, failed_write)
        theirs.close()
        os.close(armed_write)
        os.close(failed_write)
        number = os.read(armed_read, 16)
        os.close(armed_read)
        self.listener = self._take(int(number)) if number else -errno.ECHILD

    def _take(self, number: int) -> int:
        if not borrowing.works():
            return _handed_over(self._line)
        pidfd = os.pidfd_open(self.pid)
        try:
            return libc.pidfd_getfd(pidfd, number)
        finally:
            os.close(pidfd)

    def announce(self, line: socket.socket) -> None:
        """Gives the supervisor what it needs of this process: its own line and its listener."""
        leaf = self.leaf.path if self.leaf is not None and self.leaf.joined else ""
        told = {"op": "ready", "pid": self.pid, "leader": os.getpid(), "leaf": leaf}
        try:
            seqpacket.send(line, told, [self._line.fileno(), self.listener])
        except OSError:
            pass  # the supervisor is gone: the line says so
        self._line.close()
        os.close(self.listener)

    def abandon(self) -> None:
        """There will be no tool: ends the process."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def failure(self) -> dict[str, Any]:
        """Waits until it is the tool (then empty) or has said why it cannot be."""
        found = os.read(self._failed, 4096)
        os.close(self._failed)
        failure: dict[str, Any] = json.loads(found) if found else {}
        return failure

    def fault(self) -> dict[str, Any] | None:
        """Why no listener came; None: the process was killed, and another one may live."""
        self._line.close()
        failure = self.failure()
        if failure or self.listener == -errno.ECHILD:
            return failure or None
        error = f"the listener cannot be taken: {os.strerror(-self.listener)}"
        return {"stage": "filter", "errno": -self.listener, "text": error}


def _live(  # noqa: PLR0917 - everything that the process will ever know
    program: tuple[seccomp.Instruction, ...],
    system: Sequence[Grant],
    covers: mounts.Covers,
    line: int,
    armed: int,
    failed: int,
) -> NoReturn:
    """The embryo's own life, up to exec. Every failure is told, none is passed over."""
    stage = "setup"
    try:
        close_all_but((0, 1, 2, line, armed, failed))
        os.setsid()
        libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)  # a tool without its leader would be nobody's
        _reset_signals()
        bound_capabilities()
        if ipc.can_be_own():
            ipc.enter_own_namespace()
        stage = "scope"
        domain = Domain(system)
        stage = "filter"
        listener = seccomp.install_on_thread(program)
        libc.prctl(libc.PR_SET_DUMPABLE, 1)  # the zygote is not; the leader must be able to take the listener
        if not borrowing.works():  # this ring looks at no message, so one can be sent with nobody there to answer
            _hand_over(line, listener)
        os.write(armed, b"%d" % listener)
        os.close(armed)
        stage = "setup"
        told, (memory, viewed, folder, *given) = _told(line)
        os.close(listener)  # the leader has it, else there would be no start
        start, view = read_start(memory), read_view(viewed)
        _enter(folder, view["cwd"])
        # Park what must survive above the tool's own numbers, fill those, close everything else.
        free = max(_FIRST_FREE, *start.descriptors) + 1
        line, failed, domain.descriptor = _park(line, free), _park(failed, free), _park(domain.descriptor, free)
        parked = [_park(descriptor, free) for descriptor in given]
        for number, descriptor in zip(start.descriptors, parked, strict=True):
            os.dup2(descriptor, number, inheritable=True)
        close_all_but((*start.descriptors, line, failed, domain.descriptor))
        if start.terminal is not None:
            fcntl.ioctl(start.terminal, termios.TIOCSCTTY, 0)
        _inherit(start)
        _limit_data(told.get("memory"))
        stage = "files"
        if not mounts.stand(covers):
            raise OSError(errno.ESTALE, "what is hidden or protected was replaced this moment; try again")
        _make_scratch(view["scratch"])
        domain.enter(view, [number for number in start.descriptors if number <= 2])
        start.environment.update(view["environment"])
        libc.capset(0, 0, 0)
        _told(line)
        stage = "exec"
        _execute(start)
    except BaseException as error:  # noqa: BLE001 - whatever it is, the requester must hear of it
        code = (error.errno if isinstance(error, OSError) else None) or errno.EINVAL
        report = {"op": "failed", "stage": stage, "errno": code, "text": str(error)}
        os.write(failed, json.dumps(report).encode()[:4000])
    _end()


def _make_scratch(path: str | None) -> None:
    """The call's temporary folder, unless an earlier process of the same call has made it."""
    if path is None:
        return
    try:
        os.mkdir(path, 0o700)
    except FileNotFoundError:  # the zygote is about to make and hold the one above, for all calls
        with suppress(FileExistsError):
            os.mkdir(os.path.dirname(path), 0o700)
        _make_scratch(path)
    except FileExistsError:
        found = os.lstat(path)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise


def _enter(folder: int, path: str | None) -> None:
    """The working folder; by its path where something is covered: the descriptor leads around what is."""
    if path is None:
        os.fchdir(folder)
        return
    os.chdir(path)
    if not os.path.samestat(os.stat("."), os.fstat(folder)):
        raise OSError(errno.ESTALE, f"{path} is another folder by now")


def _hand_over(line: int, listener: int) -> None:
    sock = socket.socket(fileno=line)
    try:
        seqpacket.send(sock, {"op": "listener"}, [listener])
    finally:
        sock.detach()


def _handed_over(line: socket.socket) -> int:
    """The listener, where it comes by message; ``-errno`` where it did not."""
    try:
        received = seqpacket.receive(line)
    except (OSError, seqpacket.BadPacket):
        received = None
    if received is None or len(received[1]) != 1:
        return -errno.ECHILD
    return received[1][0]


def _told(line: int) -> tuple[dict[str, Any], list[int]]:
    """The supervisor's next message with its descriptors. Without one there will be no tool: this process ends."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, line)
    try:
        received = seqpacket.receive(sock)
    finally:
        sock.detach()
    if received is None:
        _end()
    return received


def _end() -> NoReturn:
    """Not by exit: that is notified, and there may be nobody to answer."""
    os.kill(os.getpid(), signal.SIGKILL)
    os._exit(127)


def close_all_but(kept: Iterable[int]) -> None:
    """Closes every descriptor of this process that is not ``kept``."""
    kept = sorted(set(kept))
    for low, high in zip([-1, *kept], [*kept, 0x7FFFFFFF], strict=True):
        if high - low > 1:
            libc.close_range(low + 1, high - 1)


def _park(descriptor: int, at_least: int) -> int:
    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, at_least)


@functools.cache
def _altered_signals() -> tuple[int, ...]:
    """Those that this process, a leader, does not leave at their default. Asked once: it costs more than to reset."""
    numbers = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
    # None: the C library keeps it for itself
    return tuple(int(number) for number in numbers if signal.getsignal(number) not in (signal.SIG_DFL, None))


def _reset_signals() -> None:
    for number in _altered_signals():
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def bound_capabilities() -> None:
    """From here on no capability can come back that is given up: by exec of a set-user-id file least of all."""
    _, permitted, inheritable = libc.capget()
    if not permitted and not inheritable:
        return
    if libc.prctl(libc.PR_CAPBSET_READ, 0) == 0:
        return  # the zygote has done it for all
    try:
        libc.prctl(libc.PR_CAP_AMBIENT, libc.PR_CAP_AMBIENT_CLEAR_ALL)
        for capability in range(64):
            libc.prctl(libc.PR_CAPBSET_DROP, capability)
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL: past the last capability of this kernel
            raise


def _inherit(start: Start) -> None:
    """What a child of the requester would have inherited from it. Raises OSError for groups that cannot be taken on."""
    if sorted(os.getgroups()) != list(start.groups):
        os.setgroups(start.groups)
    if os.getegid() != start.group:
        os.setresgid(start.group, start.group, start.group)
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
    if not start.restore_signals:
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as it is in Python, and so in what it starts


def _limit_data(limit: int | None) -> None:
    """So that no single process outgrows the call's memory by far between two samples. Its children inherit it.

    Twice the limit: what counts here is reserved, and threads reserve stacks that they never touch.
    """
    if limit is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        data = 2 * limit if hard == resource.RLIM_INFINITY else min(2 * limit, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (data, data))


def _execute(start: Start) -> NoReturn:
    program = start.executable if start.executable is not None else start.argv[0]
    if not program:  # a folder of PATH itself
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    if "/" in program:
        os.execve(program, start.argv, start.environment)
    os.execvpe(program, start.argv, start.environment)
