"""What this kernel, in this container, really offers: each feature is tried, none is inferred from a version.

Runs in the process of ``ray-guard doctor`` (and in children of it, where a trial cannot be taken back).
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from ray_guard.kernel import (
    borrowing,
    gpu_devices,
    gpu_majors,
    ipc,
    landlock,
    libc,
    mounting,
    nvml,
    procfs,
    seccomp,
    sock_diag,
)
from ray_guard.kernel.perf import TreeClock
from ray_guard.kernel.seccomp import NOTIFY, Rule
from ray_guard.kernel.syscalls import MACHINE, TABLES

_PATIENCE_S = 5


class Status(StrEnum):
    """``partly``: works with a limit that the detail names."""

    FULL = "full"
    PARTLY = "partly"
    MISSING = "missing"


NOTHING_MORE: Final[Mapping[str, Callable[[], str]]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Feature:
    name: str
    status: Status
    detail: str


def probe(more: Mapping[str, Callable[[], str]] = NOTHING_MORE) -> list[Feature]:
    """Tries everything. Takes a fraction of a second, changes nothing, sends nothing beyond loopback.

    Args:
        more: trials by feature, of what is not the kernel's. Each says what was found, or raises OSError or ValueError.
    """
    return [
        _tried("seccomp.architecture", _architecture),
        _tried("seccomp.user_notification", _notification),
        _tried("seccomp.thread_sync", _thread_sync),
        _tried("seccomp.sync_wake_up", _sync_wake_up),
        _tried("pidfd_getfd", _pidfd_getfd),
        _tried("proc_mem", _memory),
        _tried("sock_diag.destroy_events", _destroy_events),
        _tried("udp.mute", _mute),
        _tried("subreaper", _subreaper),
        _tried("landlock.signal_scope", _landlock),
        _tried("ipc.own", _own_ipc),
        _tried("landlock.files", _files),
        _tried("mounts", _mounts),
        _tried("unix_diag", _unix_diag),
        _tried("yama", _yama),
        _tried("perf.tree_clock", _tree_clock),
        _tried("gpu.census", _gpu_census),
        _tried("gpu.meter", _gpu_meter),
        *(_tried(name, trial) for name, trial in more.items()),
    ]


def _tried(name: str, trial: Callable[[], Feature | str]) -> Feature:
    try:
        found = trial()
    except (OSError, KeyError, ValueError) as error:
        return Feature(name, Status.MISSING, str(error))
    return found if isinstance(found, Feature) else Feature(name, Status.FULL, found)


def _in_child(work: Callable[[], None]) -> None:
    """Runs ``work`` in a child. Raises OSError with the child's errno, or ETIMEDOUT."""
    pid = os.fork()
    if pid == 0:
        code = errno.EPROTO
        try:
            signal.alarm(_PATIENCE_S)
            work()
            code = 0
        except OSError as error:
            code = error.errno or errno.EIO
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code:
        number = code if code > 0 else errno.ETIMEDOUT
        raise OSError(number, os.strerror(number))


def _architecture() -> str:
    if MACHINE not in TABLES:
        raise KeyError(f"{platform.machine()} is not supported")
    return MACHINE


def _listener(program_rules: list[Rule]) -> int:
    return seccomp.install_on_thread(seccomp.assemble(program_rules, MACHINE))


def _notification() -> str:
    """The whole round trip: a child's connect is received, read and answered by this process."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(_PATIENCE_S)
            number = _listener([Rule("connect", NOTIFY)])
            socket.send_fds(theirs, [b"l"], [number])
            theirs.recv(1)
            probe_socket = socket.socket()
            code = probe_socket.connect_ex(("127.0.0.1", 9))
        except OSError as error:
            code = error.errno or 255
        os._exit(code)
    theirs.close()
    try:
        ours.settimeout(_PATIENCE_S)
        _, passed, _, _ = socket.recv_fds(ours, 1, 1)
        if passed:
            _answer_one(passed[0], ours)
    finally:
        ours.close()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code != errno.EACCES:
        raise OSError(code, f"a notified call was not answered ({os.strerror(code) if code > 0 else code})")
    return "connect was received, read and refused"


def _answer_one(fd: int, line: socket.socket) -> None:
    listener = seccomp.Listener(fd)
    line.send(b"g")
    if select.select([fd], [], [], _PATIENCE_S)[0]:
        notification = listener.receive()
        if notification is not None:
            listener.answer(notification.id, error=errno.EACCES)
    os.close(fd)


def _thread_sync() -> str:
    _in_child(lambda: os.close(seccomp.install_on_process(seccomp.assemble([Rule("connect", NOTIFY)], MACHINE))))
    return "a filter covers all threads of a running process"


def _sync_wake_up() -> Feature | str:
    def trial() -> None:
        if not seccomp.Listener(_listener([Rule("connect", NOTIFY)])).sync_wake_up:
            raise OSError(errno.ENOSYS, "before Linux 6.6: connects take a little longer")

    _in_child(trial)
    return "notified calls run on the waker's CPU"


def _pidfd_getfd() -> Feature | str:
    if borrowing.works():
        return "sockets of child processes can be connected in place"
    return Feature(
        "pidfd_getfd",
        Status.PARTLY,
        "refused (CAP_SYS_PTRACE is missing): the supervisor makes the sockets itself; no udp:// destinations; what is "
        "capped goes by relay, and who holds a flow of the cluster past its cap is killed; a socket from before the "
        "guard, or one that was connected, cannot be connected again",
    )


def _memory() -> str:
    told = ctypes.create_string_buffer(b"ray_guard")
    pid = os.fork()
    if pid == 0:
        signal.alarm(_PATIENCE_S)
        signal.pause()
        os._exit(0)
    try:
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            memory.seek(ctypes.addressof(told))
            read = memory.read(9)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if read != told.value:
        raise ValueError("another process's memory reads as something else")
    return "arguments of child processes can be read"


def _destroy_events() -> str:
    diag = sock_diag.SockDiag()
    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as client:
            (cookie,) = struct.unpack("=Q", client.getsockopt(socket.SOL_SOCKET, sock_diag.SO_COOKIE, 8))
            client.connect(server.getsockname())
            accepted, _ = server.accept()
            client.sendall(b"12345")
            accepted.recv(5)
            accepted.close()
        for _ in range(20):
            select.select([diag], [], [], 0.1)
            for counted in diag.events({cookie}):
                if counted.sent == 5:
                    return "byte counts of ended TCP connections are exact"
                raise ValueError(f"5 bytes were sent, {counted.sent} were told")
    finally:
        diag.close()
    raise ValueError("the end of a connection was not told")


def _mute() -> str:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sink,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as muted,
    ):
        sink.bind(("127.0.0.1", 0))
        try:
            muted.shutdown(socket.SHUT_WR)
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise
        muted.connect(sink.getsockname())
        try:
            muted.send(b"x")
        except BrokenPipeError:
            return "an actor's datagram sockets can be connected but cannot send"
    raise ValueError("a socket that was shut down could still send")


def _subreaper() -> str:
    _in_child(lambda: _ignore(libc.prctl(libc.PR_SET_CHILD_SUBREAPER, 1)))
    return "what a call leaves behind is found and ended"


def _ignore(_result: int) -> None:
    """For a trial that succeeds by not failing."""


def _own_ipc() -> Feature | str:
    if ipc.can_be_own():
        return "System V IPC and message queues of a tool are its own"
    return Feature("ipc.own", Status.PARTLY, "no CAP_SYS_ADMIN: tools have no System V IPC and no message queues")


_NO_LANDLOCK: Final = "no Landlock (Linux 5.13 and the boot option lsm= may bring it, or the container's profile)"


def _landlock() -> Feature | str:
    abi = landlock.abi()
    if abi == 0:
        raise OSError(errno.ENOSYS, f"{_NO_LANDLOCK}: every tool is refused")
    _in_child(_enter_scope)
    if abi < landlock.SIGNAL_SCOPE_ABI:
        return Feature(
            "landlock.signal_scope",
            Status.PARTLY,
            f"ABI {abi} (Linux 6.12 scopes signals): the supervisor judges and sends a tool's signals; kill(-1) and "
            "pidfd_send_signal are refused",
        )
    return f"ABI {abi}: a tool's signals stay within its call"


def _files() -> Feature | str:
    """A child is granted one folder: it reads there, and neither reads, writes nor truncates outside."""
    abi = landlock.abi()
    if abi == 0:
        raise OSError(errno.ENOSYS, _NO_LANDLOCK)
    with tempfile.TemporaryDirectory() as granted, tempfile.TemporaryDirectory() as other:
        for folder in (granted, other):
            with open(f"{folder}/file", "w") as file:
                file.write("content")
        _in_child(lambda: _try_files(granted, other))
    if abi >= landlock.TRUNCATE_ABI:
        return f"ABI {abi}: tools see the files they are granted"
    limits = "the supervisor judges truncate(2)"
    if abi < landlock.REFER_ABI:
        limits += ", and nothing is renamed or linked from one folder to another (EXDEV)"
    return Feature("landlock.files", Status.PARTLY, f"ABI {abi} (Linux 6.2 judges truncation): {limits}")


def _try_files(granted: str, other: str) -> None:
    abi = landlock.abi()
    ruleset = landlock.Ruleset(landlock.known_rights(abi), landlock.known_scopes(abi))
    ruleset.allow(os.open(granted, os.O_PATH), landlock.Fs.READ_FILE)
    if abi < landlock.TRUNCATE_ABI:  # what a tool's filter adds; there the supervisor answers instead
        seccomp.stack_on_thread(seccomp.assemble([Rule("truncate", seccomp.refuse(errno.EACCES))], MACHINE))
    libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)
    ruleset.enter()
    os.close(os.open(f"{granted}/file", os.O_RDONLY))
    attempts: tuple[Callable[[], object], ...] = (
        lambda: os.open(f"{other}/file", os.O_RDONLY),
        lambda: os.open(f"{granted}/file", os.O_WRONLY),
        lambda: os.truncate(f"{granted}/file", 0),
        lambda: os.unlink(f"{granted}/file"),
    )
    for attempt in attempts:
        try:
            attempt()
        except PermissionError:
            continue
        raise OSError(errno.EPROTO, "a file that was not granted could be reached")


def _mounts() -> Feature | str:
    how = {
        mounting.Way.PRIVILEGED: "a call has a mount namespace of its own",
        mounting.Way.USER: "a call has a mount namespace of its own, in a user namespace",
    }.get(mounting.way())
    if how is None:
        return Feature(
            "mounts",
            Status.PARTLY,
            "no mount namespaces here: where something hidden or protected lies below a grant, nothing new can be made "
            "beside it; no /dev/shm and no new terminals in tools",
        )
    return f"{how}: hidden and protected places below a grant are covered; /dev/shm is the call's own"


def _enter_scope() -> None:
    libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)
    landlock.enter_process_scope()


def _unix_diag() -> str:
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as bound:
        bound.bind(f"{folder}/probe")
        if sock_diag.unix_file(os.fstat(bound.fileno()).st_ino) is None:
            raise OSError(errno.ENOSYS, "the kernel does not tell what a unix socket is bound to")
    return "processes may connect to unix sockets of their own call"


def _yama() -> str:
    try:
        with open("/proc/sys/kernel/yama/ptrace_scope") as file:
            scope = int(file.read())
    except FileNotFoundError:
        return "not in this kernel"
    if scope >= 2 and not procfs.has_capability(os.getpid(), 19):
        raise OSError(errno.EPERM, f"ptrace_scope {scope}: only an administrator may look into processes")
    return f"ptrace_scope {scope}"


def _gpu_census() -> str:
    known = gpu_majors.majors()
    if not known:
        return "no GPU driver is loaded: nothing can be opened"
    _, unreadable = gpu_devices.Descriptors(known).scan()
    majors = ", ".join(f"{major} {kind.value}" for major, kind in sorted(known.items()))
    return f"device majors {majors}; {len(unreadable)} of this user's processes hide what they hold"


def _gpu_meter() -> Feature | str:
    """In a process of its own: NVML may hang in the driver."""
    kinds = set(gpu_majors.majors().values())
    if not kinds:
        return "no GPU driver is loaded: GPU-seconds are zero for certain"
    if gpu_majors.Kind.NVIDIA not in kinds:
        names = ", ".join(sorted(kind.value for kind in kinds))
        return Feature("gpu.meter", Status.PARTLY, f"GPUs of {names} are found, and not measured: NVML alone is asked")
    argv = [sys.executable, "-I", "-m", "ray_guard.kernel.nvml"]
    try:
        done = subprocess.run(argv, capture_output=True, timeout=2 * _PATIENCE_S, check=False, env={}, cwd="/")
        told = json.loads(done.stdout)
    except subprocess.TimeoutExpired as error:
        raise OSError(errno.ETIMEDOUT, f"NVML did not answer within {2 * _PATIENCE_S} s") from error
    if "error" in told:
        raise OSError(errno.ENODEV, told["error"])
    readings = [nvml.from_wire(device) for device in told["devices"]]
    about = f"{len(readings)} GPUs, driver {told['driver']}, {told['library']}"
    bounds = [f"GPU {each.device}: {each.samples}" for each in readings if isinstance(each.samples, nvml.Missing)]
    if bounds:
        return Feature("gpu.meter", Status.PARTLY, f"{about}; GPU-seconds are upper bounds: {', '.join(bounds)}")
    return about


def _tree_clock() -> Feature | str:
    try:
        clock = TreeClock(os.getpid())
    except OSError as error:
        return Feature(
            "perf.tree_clock",
            Status.PARTLY,
            f"{error.strerror}: CPU time of processes that a signal ends is charged as an upper bound",
        )
    try:
        _in_child(lambda: _ignore(sum(range(200_000))))
        if clock.read_ns() == 0:
            raise ValueError("the CPU time of a child was not counted")
    finally:
        clock.close()
    return "CPU time of all a call's processes is exact, waited for or not"
