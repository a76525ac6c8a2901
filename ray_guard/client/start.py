"""Asking the supervisor for a tool process, and the line to it. Runs in the target, and in ``ray-guard run``.

The tool is not this process's child: the zygote starts it, outside this actor's filter, so that it has a listener of
its own. What subprocess learns from waitpid comes here on a line of its own (*control*), one per process.

``ray-guard run`` is a process per command: what is imported here delays every one of them.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import socket
import stat
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ray_guard.client.channel import Channel, receive_answer
from ray_guard.client.segments import Segments
from ray_guard.errors import SupervisorLost
from ray_guard.kernel import seqpacket

START_TIMEOUT_S: Final = 30.0
CALL_VARIABLE: Final = "RAY_GUARD_CALL"
"""Set in a tool's environment: there everything is confined already, and ``run`` is plain subprocess."""
_LIMITS: Final = tuple(name for name in dir(resource) if name.startswith("RLIMIT_"))


def start_message(
    argv: Sequence[str | bytes | os.PathLike[str]],
    *,
    executable: str | bytes | os.PathLike[str] | None,
    environment: dict[Any, Any],
    umask: int,
    numbers: Sequence[int],
    restore_signals: bool,
    terminal: int | None = None,
) -> bytes:
    """What the tool is to be, as the content of a memory file (argv and environment may be long).

    Raises:
        ValueError: what no program can be given, as subprocess says it.

    Args:
        terminal: one of ``numbers``: it becomes the controlling terminal of the tool's session.
    """
    words = [os.fsdecode(word) for word in argv]
    program = None if executable is None else os.fsdecode(executable)
    variables = {os.fsdecode(key): os.fsdecode(value) for key, value in environment.items()}
    if "\0" in "".join((*words, program or "", *variables, *variables.values())):
        raise ValueError("embedded null byte")
    if "=" in "".join(variables):
        raise ValueError("illegal environment variable name")
    return json.dumps(
        {
            "argv": words,
            "executable": program,
            "environment": variables,
            "umask": _own_umask() if umask < 0 else umask,
            "group": os.getegid(),
            "groups": sorted(os.getgroups()),
            "nice": os.getpriority(os.PRIO_PROCESS, 0),
            "limits": {name: resource.getrlimit(getattr(resource, name)) for name in _LIMITS},
            "affinity": sorted(os.sched_getaffinity(0)),
            "descriptors": list(numbers),
            "terminal": terminal,
            "restore_signals": restore_signals,
        }
    ).encode()


def _own_umask() -> int:
    with open("/proc/self/status", "rb", buffering=0) as file:  # asking os.umask would set it for all threads
        for line in file.read(4096).splitlines():
            if line.startswith(b"Umask:"):
                return int(line.split()[1], 8)
    return 0o022


class Control:
    """The line to one tool.

    Args:
        channel: of the process that starts it.
        payload: see :func:`start_message`.
        folder: the working folder, as an open descriptor.
        descriptors: the tool's own, in the order of the payload's numbers.
        place: where in the traces it belongs: ``span`` (the open tool call), ``trace``, ``parent``, ``identity``.

    Raises:
        OSError: the program cannot be started, with exec's own errno.
        NotEnforced: the guard cannot hold it.
        SupervisorLost: nobody answers.
    """

    def __init__(
        self,
        channel: Channel,
        payload: bytes,
        folder: int,
        descriptors: Sequence[int],
        place: Mapping[str, Any],
        *,
        segments: Segments | None = None,
    ) -> None:
        self._segments = segments
        self._lock = threading.Lock()
        self._channel = channel  # kept open: its end is the end of what was started over it
        self.exited: dict[str, Any] | None = None
        memory = os.memfd_create("ray_guard-start", os.MFD_CLOEXEC)
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                os.write(memory, payload)
                channel.pass_on({"op": "start", **place}, [theirs.fileno(), memory, folder, *descriptors])
            self._sock.settimeout(START_TIMEOUT_S)
            answer, _ = receive_answer(self._sock)
        except BaseException:
            self._sock.close()
            raise
        finally:
            os.close(memory)
        self._sock.settimeout(None)
        if answer.get("op") == "failed":
            self._sock.close()
            number = int(answer["errno"])
            raise OSError(number, os.strerror(number))
        if answer.get("op") == "exited":  # its leader was lost before it could say that it had started
            self.exited = answer
        self.pid = int(answer["pid"])

    def wait(self, timeout: float | None) -> dict[str, Any] | None:
        """The tool's end, within ``timeout`` seconds (None: whenever it comes); None: it still runs.

        A supervisor that is lost has ended the tool: then the status is that of SIGKILL.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._take(0.0):
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return None
            self._readable(left)
        return self.exited

    def _readable(self, timeout: float | None) -> bool:
        poll = select.poll()  # not select.select: a large actor has descriptors beyond 1024
        poll.register(self._sock, select.POLLIN)
        return bool(poll.poll(None if timeout is None else max(0.0, timeout) * 1000))

    def _take(self, timeout: float) -> bool:
        """Takes in the tool's end if it has been told, in whichever thread comes first."""
        with self._lock:
            if self.exited is None and self._readable(timeout):
                try:
                    message, _ = receive_answer(self._sock)
                except SupervisorLost:
                    message = {"op": "exited", "status": int(signal.SIGKILL)}
                if message.get("op") == "exited":
                    self.exited = message
                    if self._segments is not None:
                        self._segments.count += int(message.get("spans", 0))
            return self.exited is not None

    def signal(self, number: int) -> None:
        try:
            seqpacket.send(self._sock, {"op": "signal", "number": int(number)})
        except OSError:
            pass  # it has ended meanwhile

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()


def checked_descriptor(number: int) -> int:
    """A descriptor that a tool may have. Raises ValueError for one that would be a way out."""
    mode = os.fstat(number).st_mode
    if stat.S_ISSOCK(mode):
        with socket.socket(fileno=os.dup(number)) as sock:
            if sock.family != socket.AF_UNIX or sock.getpeername() or sock.getsockname():
                raise ValueError(
                    f"descriptor {number} is a connected socket, which no rule could judge any more: "
                    "pass a pipe, a file or a socketpair"
                )
    elif stat.S_ISDIR(mode):
        raise ValueError(f"descriptor {number} is a folder: pass files, pipes or socketpairs")
    return number


def standard_descriptor(number: int, opened: list[int]) -> int:
    """This process's own standard descriptor for a tool to inherit; /dev/null where it is closed or a network socket.

    A unix socket is fine here: under a service manager that is where output goes.
    """
    try:
        if not stat.S_ISSOCK(os.fstat(number).st_mode):
            return number
        with socket.socket(fileno=os.dup(number)) as sock:
            if sock.family == socket.AF_UNIX:
                return number
    except OSError:
        pass  # closed
    opened.append(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))
    return opened[-1]
