"""The judge: reads a journal as it grows, and says what in it tunnels, mines, probes or leaks.

Runs in the judge, a child of the zygote and helper of the supervisor, only where a policy's ``detect`` asks for it.
Nobody's system call waits for it: what it judges stands in the journal already. It holds no
queue, for the journal is one: in a flood it falls behind, and says how far it is. What it says is recorded, and acted
on, by the supervisor. Messages are those of :mod:`ray_guard.kernel.seqpacket`:

    judge → supervisor   ready {pid}
    supervisor → judge   read {folder, log, number, offset}    a log, from there on
    judge → supervisor   found {folder, trace, span, process, call, kind, rule, rules, ended, identity, resource}
    judge → supervisor   at {folder, log, number, offset}      all before it is judged
    supervisor → judge   rules {path}                          Sigma rules, to judge by from now on
    judge → supervisor   rules {path, digest | error}
    supervisor → judge   command {folder, trace, span, call, argv, path}    of a program that has no span
    supervisor → judge   drain                                 answered once all that is there now is judged
    judge → supervisor   drained

``rules`` of a finding is the digest of the Sigma rules that made it; empty: one of our own did. ``process`` is the span
of the program above a flow, ``call`` the innermost above either that is no program's, as far as the judge has read.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final, NoReturn

from ray_guard.evidence.cases import Case, Cases
from ray_guard.evidence.layout import segment_name
from ray_guard.evidence.otlp import LINE_LIMIT
from ray_guard.kernel import inotify, libc, seqpacket

_PIECE: Final = 1 << 18
_BATCH: Final = 256
_ROUND_S: Final = 0.01
"""Between two looks at least: many records cost one waking."""
_BLIND_S: Final = 0.05
"""Between two looks where the kernel does not say that a file has grown."""
_SAY_S: Final = 0.25
_PATIENCE_S: Final = 2.0
"""Of CPU time, for one record."""
_PROCESS: Final = b'"name":"process '
_EGRESS: Final = b'"name":"egress connect"'
_OURS: Final = b'"key":"ray_guard.source","value":{"stringValue":"supervisor"}'


def run(line: socket.socket) -> NoReturn:
    """The judge's life, until the supervisor hangs up."""
    libc.prctl(libc.PR_SET_DUMPABLE, 0)
    name = ctypes.create_string_buffer(b"ray-guard-judge")
    libc.prctl(libc.PR_SET_NAME, ctypes.addressof(name))
    signal.signal(signal.SIGPROF, _too_long)
    try:
        _Judge(line).serve()
    except ConnectionError:
        pass  # the supervisor is gone
    os._exit(0)


class _TooLong(Exception):
    """One record has taken all the time that it gets."""


def _too_long(_number: int, _frame: object) -> None:
    raise _TooLong


class _Judge:
    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._logs: dict[str, Log] = {}
        self._cases = Cases()
        self._poll = select.poll()
        self._poll.register(line, select.POLLIN)
        self._watcher: inotify.Watcher | None = None
        try:
            self._watcher = inotify.Watcher()
            self._poll.register(self._watcher, select.POLLIN)
        except OSError:  # the user has no more of them: it looks by itself
            pass

    def serve(self) -> None:
        seqpacket.send(self._line, {"op": "ready", "pid": os.getpid()})
        while True:
            busy = self._step_all()
            timeout = 0.0 if busy else None if self._watcher is not None else _BLIND_S
            ready = {descriptor for descriptor, _events in self._poll.poll(None if timeout is None else timeout * 1e3)}
            if self._line.fileno() in ready and not self._listen():
                return
            if not busy:
                time.sleep(_ROUND_S)
            if self._watcher is not None and self._watcher.fileno() in ready:
                self._watcher.clear()

    def _listen(self) -> bool:
        """Takes the messages that are there; False: there will be no more."""
        for _ in range(_BATCH):
            try:
                received = seqpacket.receive(self._line, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return True
            if received is None:
                return False
            seqpacket.close_all(received[1])
            self._obey(received[0])
        return True

    def _obey(self, message: dict[str, Any]) -> None:
        if message["op"] == "read":
            self._read(message)
        elif message["op"] == "rules":
            seqpacket.send(self._line, {"op": "rules", "path": message["path"], **self._cases.take(message["path"])})
        elif message["op"] == "command":
            for case in _timed(
                partial(self._cases.of_command, message), partial(self._cases.unjudged_command, message)
            ):
                seqpacket.send(self._line, {"op": "found", "folder": message["folder"], **case})
        else:
            while self._step_all():
                pass
            for log in self._logs.values():
                self._say(log)
            seqpacket.send(self._line, {"op": "drained"})

    def _read(self, message: dict[str, Any]) -> None:
        folder, log = str(message["folder"]), str(message["log"])
        if log in self._logs:
            return
        if self._watcher is not None:
            try:
                self._watcher.add(folder)
            except OSError:
                self._poll.unregister(self._watcher)
                self._watcher = None
        self._logs[log] = Log(folder, log, int(message["number"]), int(message["offset"]))

    def _step_all(self) -> bool:
        return sum(self._step(log) for log in self._logs.values()) > 0

    def _step(self, log: Log) -> bool:
        """Judges a piece of what has come; False: nothing has."""
        lines = log.take()
        for line in lines:
            for case in self._judged(line):
                seqpacket.send(self._line, {"op": "found", "folder": log.folder, **case})
        if log.said != (log.number, log.offset) and (not lines or time.monotonic() - log.told >= _SAY_S):
            self._say(log)
        return bool(lines)

    def _say(self, log: Log) -> None:
        log.said, log.told = (log.number, log.offset), time.monotonic()
        place = {"folder": log.folder, "log": log.name, "number": log.number, "offset": log.offset}
        seqpacket.send(self._line, {"op": "at", **place})

    def _judged(self, line: bytes) -> list[Case]:
        if _OURS not in line or not (_PROCESS in line or _EGRESS in line):
            return []
        return _timed(partial(self._cases.of, line), partial(self._cases.unjudged, line))


def _timed(judge: Callable[[], Iterable[Case]], unjudged: Callable[[], Iterable[Case]]) -> list[Case]:
    """What ``judge`` says, or ``unjudged`` where that takes too long, or fails."""
    try:
        signal.setitimer(signal.ITIMER_PROF, _PATIENCE_S)
        try:
            return list(judge())
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    except _TooLong:
        return list(unjudged())
    except Exception:  # noqa: BLE001 - a judge that ended here would end here again
        traceback.print_exc()
        return list(unjudged())


class Log:
    """A journal's log, read on from where one left off, a piece at a time.

    Attributes:
        number, offset: the segment, and how much of it was taken.
        said, told: what of that the supervisor knows, and when it was told (``time.monotonic()``).
    """

    def __init__(self, folder: str, name: str, number: int, offset: int) -> None:
        self.folder = folder
        self.name = name
        self.number = number
        self.offset = offset
        self.said = (number, offset)
        self.told = 0.0
        self._descriptor = -1
        self._rest = b""

    def take(self) -> list[bytes]:
        """The next whole lines; none: there are no more as yet."""
        piece = self._piece()
        if not piece and self._next():
            piece = self._piece()
        if not piece:
            return []
        *lines, self._rest = (self._rest + piece).split(b"\n")
        if len(self._rest) > LINE_LIMIT:  # no line of a journal's: its end is waited for
            self.offset += len(self._rest)
            self._rest = b""
        self.offset += sum(map(len, lines)) + len(lines)
        return lines

    def _piece(self) -> bytes:
        if self._descriptor < 0:
            try:
                self._descriptor = os.open(
                    f"{self.folder}/{segment_name(self.name, self.number)}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
                )
            except FileNotFoundError:
                return b""
        return os.pread(self._descriptor, _PIECE, self.offset + len(self._rest))

    def _next(self) -> bool:
        """Whether there is another segment: then the last one is complete."""
        if self._descriptor < 0 or not os.path.exists(f"{self.folder}/{segment_name(self.name, self.number + 1)}"):
            return False
        if self._piece():  # it was written between the two looks
            return True
        self.close()
        self._rest = b""
        self.number, self.offset = self.number + 1, 0
        return True

    def close(self) -> None:
        """It can be read on."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
