"""What is going to start a tool: a thread of the leader, filtered, and waiting to be told. Runs in the zygote.

The filter, the Landlock domain and the priority of a thread are its own, and what it starts has them too. So a call
costs no copy of the leader: its thread takes on what the tool shall have, starts it by posix_spawn, and ends. What
takes long and is the same for every tool is done before anybody asks.

The tool could signal such a thread, for both are in one domain, and with it end its own leader. So it does not run
before the thread has gone: it is stopped while it is executed (``supervisor.tools``), and its leader
lets it go.
"""

from __future__ import annotations

import _thread
import ctypes
import errno
import fcntl
import functools
import os
import select
import signal
import socket
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, Final

from ray_guard.kernel import ipc, libc, procfs, seccomp, seqpacket, spawn
from ray_guard.kernel.syscalls import NUMBERS
from ray_guard.policy.files import Grant
from ray_guard.supervisor import mounts
from ray_guard.supervisor.domain import Domain, read_view
from ray_guard.supervisor.start import Start, read_start

_UMASK: Final = 0o077
_SIGNALS: Final = tuple(map(int, signal.valid_signals()))


class Embryo:
    """The leader's side.

    Attributes:
        pid: the tool's, once :meth:`await_start` has returned.
        failure: why there is none; empty: nobody asked for one, or there is.
    """

    def __init__(self, program: bytes, system: Sequence[Grant], covers: mounts.Covers, leaf: str) -> None:
        self.pid = 0
        self.failure: dict[str, Any] = {}
        self._program, self._system, self._covers, self._leaf = program, system, covers, leaf
        self._listener = -1
        self._thread = 0
        self._name = os.urandom(6).hex()
        """The thread's, and of what it starts until that has executed something. Nobody can guess it."""
        self._line, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._news, self._tell = os.pipe()
        _thread.start_new_thread(self._live, ())
        os.read(self._news, 1)

    def announce(self, line: socket.socket) -> bool:
        """Gives the supervisor what it needs: the thread's own line, and its listener. False: it has failed."""
        if self._listener < 0:
            self.await_start(-1)
            return False
        told = {"op": "ready", "pid": os.getpid(), "leaf": self._leaf}
        try:
            seqpacket.send(line, told, [self._line.fileno(), self._listener])
        except OSError:
            pass  # the supervisor is gone: the line says so
        self._line.close()
        os.close(self._listener)
        return True

    def await_start(self, wake: int) -> None:
        """Waits until the thread has ended, whether it has started the tool or not. ``wake``: read at each SIGCHLD."""
        poll = select.poll()
        for descriptor in (self._news, wake):
            if descriptor >= 0:
                poll.register(descriptor, select.POLLIN)
        while (self._news, select.POLLHUP) not in poll.poll():
            if wake >= 0:
                _drain(wake)
                self._let_fail()
        os.close(self._news)
        while os.path.exists(f"/proc/self/task/{self._thread}"):
            os.sched_yield()

    def _let_fail(self) -> None:
        """What could not be executed is stopped too, and must go on to say so: the thread waits for it."""
        try:
            stopped = os.waitid(os.P_ALL, 0, os.WSTOPPED | os.WNOHANG | os.WNOWAIT)
            if stopped is not None and procfs.command_name(stopped.si_pid) == self._name:
                os.kill(stopped.si_pid, signal.SIGCONT)
        except (ChildProcessError, ProcessLookupError):
            pass  # it has gone on already

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _live(self) -> None:
        """The thread's life. Every failure is told, none is passed over."""
        stage = "setup"
        held: list[int] = []
        try:
            self._thread = _thread.get_native_id()
            signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # they are the leader's
            libc.set_name(self._name.encode())
            bound_capabilities()
            if ipc.can_be_own():
                ipc.enter_own_namespace()
            stage = "scope"
            domain = Domain(self._system)
            stage = "filter"
            self._listener = seccomp.install_on_thread(self._program)
            os.write(self._tell, b"-")
            stage = "setup"
            received = seqpacket.receive(self._theirs)
            if received is None:
                domain.close()
                return
            held = received[1]
            memory, viewed, folder, *given = held
            if received[0].get("joins"):
                _join(given.pop())
            start, view = read_start(memory), read_view(viewed)
            stage = "files"
            if not mounts.stand(self._covers):
                raise OSError(errno.ESTALE, "what is hidden or protected was replaced this moment; try again")
            _make_scratch(view["scratch"])
            stage = "setup"
            _inherit(start)
            # These two are the leader's as well, which does not mind.
            _enter(folder, view["cwd"])
            os.umask(start.umask)
            stage = "files"
            pairs = _apart(given, start.descriptors, held)
            domain.enter(view, [here for here, there in pairs if there <= 2])
            start.environment.update(view["environment"])
            libc.capset(0, 0, 0)
            stage = "exec"
            self.pid = _execute(start, pairs)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the requester must hear of it
            code = (error.errno if isinstance(error, OSError) else None) or errno.EINVAL
            self.failure = {"op": "failed", "stage": stage, "errno": code, "text": str(error)}
        finally:
            os.chdir("/")
            os.umask(_UMASK)
            seqpacket.close_all(held)  # whoever reads what the tool has written waits for the last of them
            self._theirs.close()
            os.close(self._tell)


def _drain(wake: int) -> None:
    try:
        os.read(wake, 512)
    except BlockingIOError:
        pass


def _join(entrance: int) -> None:
    """Enters a control group, this thread alone. It takes milliseconds, and the supervisor has others to answer."""
    os.write(entrance, b"0")


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


def close_all_but(kept: Iterable[int]) -> None:
    """Closes every descriptor of this process that is not ``kept``."""
    kept = sorted(set(kept))
    for low, high in zip([-1, *kept], [*kept, 0x7FFFFFFF], strict=True):
        if high - low > 1:
            libc.close_range(low + 1, high - 1)


@functools.cache
def _ignored_signals() -> tuple[int, ...]:
    """By this process, and so by whatever it starts, unless they are restored."""
    return tuple(each for each in _SIGNALS if signal.getsignal(each) is signal.SIG_IGN)


def bound_capabilities() -> None:
    """From here on no capability can come back that is given up: by exec of a set-user-id file least of all."""
    _, permitted, inheritable = libc.capget()
    if not permitted and not inheritable:
        return
    if libc.prctl(libc.PR_CAPBSET_READ, 0) == 0:
        return  # the zygote has done it for all
    libc.prctl(libc.PR_CAP_AMBIENT, libc.PR_CAP_AMBIENT_CLEAR_ALL)
    for capability in range(libc.count_capabilities()):
        libc.prctl(libc.PR_CAPBSET_DROP, capability)


def _inherit(start: Start) -> None:
    """What a child of the requester would have inherited from it. Raises OSError for groups that cannot be taken on.

    Its limits come from the supervisor: here they would be the leader's. The calls that change groups are made without
    the C library, which would make them for all threads.
    """
    if sorted(os.getgroups()) != list(start.groups):
        groups = (ctypes.c_uint32 * len(start.groups))(*start.groups)
        libc.syscall(NUMBERS["setgroups"], len(groups), ctypes.addressof(groups))
    if os.getegid() != start.group:
        libc.syscall(NUMBERS["setresgid"], start.group, start.group, start.group)
    if start.affinity:
        try:
            os.sched_setaffinity(0, start.affinity)
        except OSError:
            pass
    more = start.nice - os.nice(0)
    if more > 0:
        os.nice(more)


def _apart(given: Sequence[int], numbers: Sequence[int], held: list[int]) -> list[tuple[int, int]]:
    """(here, there) of each descriptor: none is here where another will be there. What it opens goes to ``held``."""
    free = max(numbers, default=0) + 1
    pairs: list[tuple[int, int]] = []
    for here, there in zip(given, numbers, strict=True):
        if here in numbers:
            held.append(fcntl.fcntl(here, fcntl.F_DUPFD_CLOEXEC, free))
            pairs.append((held[-1], there))
        else:
            pairs.append((here, there))
    return pairs


def _execute(start: Start, pairs: Sequence[tuple[int, int]]) -> int:
    """Starts the program; looked for along PATH as exec(3) does."""
    program = start.executable if start.executable is not None else start.argv[0]
    if not program:  # a folder of PATH itself
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    variables = [f"{name}={value}" for name, value in start.environment.items()]
    ignored = set(_ignored_signals())
    if not start.restore_signals:
        ignored.discard(signal.SIGPIPE)  # as it is in Python, and so in what it starts
    here = {there: here for here, there in pairs}
    terminal = None if start.terminal is None else here[start.terminal]
    failure: OSError = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    found: OSError | None = None
    for path in [program] if "/" in program else _along_path(program, start.environment):
        try:
            os.stat(path)
            return spawn.spawn(path, start.argv, variables, pairs, restored=ignored, terminal=terminal)
        except (FileNotFoundError, NotADirectoryError) as error:
            failure = error
        except OSError as error:
            found = found or error
    raise found or failure


def _along_path(program: str, environment: dict[str, str]) -> list[str]:
    return [os.path.join(folder, program) for folder in environment.get("PATH", os.defpath).split(os.pathsep)]
