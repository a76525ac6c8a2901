"""The forwarder: tails a journal and exports what ended to an OTLP endpoint, at least once.

Runs as a process of its own, child of the supervisor: ``python -m ray_guard.evidence.forward FOLDER``. Importing this
module loads the standard library only, because the supervisor asks it for :func:`forwarder_argv`.

The journal is the truth and the queue: nothing is held in memory that a restart would lose, an outage of any length
costs disk that was spent anyway, and an observer's trouble never reaches the supervisor. What is sent twice after a
crash has the same ids, so a backend stores it once. Only spans that ended are sent: OTLP has no others.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import logging
import os
import secrets
import select
import signal
import stat
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from ray_guard.errors import RayGuardError
from ray_guard.evidence.layout import SUFFIX
from ray_guard.evidence.otlp import NotOtlp, decode
from ray_guard.evidence.reader import open_segment, scan
from ray_guard.records import Resource, SpanRecord

STATE: Final = "forward-state.json"
_LOCK: Final = "forward.lock"
_BATCH_SPANS: Final = 512
#: Collectors take 4 MiB a request by default; the protobuf is smaller than the JSON.
_BATCH_BYTES: Final = 2 * 1024 * 1024
_POLL_S: Final = 0.5
_BACKOFF_S: Final = (0.5, 30.0)
_PATIENCE: Final = 3
_LOOKAHEAD: Final = 8

_log = logging.getLogger("ray_guard.forward")


class ForwardError(RayGuardError):
    """Forwarding cannot start: the endpoint's configuration, or the folder."""


class Exporter(Protocol):
    """What :mod:`ray_guard.evidence.exporter` makes of an endpoint."""

    def export(self, spans: Sequence[tuple[Resource, SpanRecord]]) -> str | None:
        """Sends the spans. None when the endpoint took them, else why not."""

    def shutdown(self) -> None:
        """Ends a running export soon; called from another thread."""


@dataclass(frozen=True, slots=True)
class Line:
    """One journal line's ended spans, and where the line ends."""

    segment: str
    end: int
    spans: list[tuple[Resource, SpanRecord]]


@dataclass(slots=True)
class Progress:
    """How far each segment has been sent, in bytes, kept beside the journal.

    Losing it costs duplicates, never spans; so it is replaced atomically and not synced.
    """

    path: Path
    offsets: dict[str, int] = field(default_factory=dict)
    rejected: int = 0

    @classmethod
    def load(cls, path: Path) -> Progress:
        """As saved; from the beginning where there is nothing usable."""
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            offsets = {str(name): int(offset) for name, offset in saved["segments"].items()}
            return cls(path, offsets, int(saved.get("rejected", 0)))
        except FileNotFoundError:
            return cls(path)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            _log.warning("%s is not readable (%s): sending from the beginning", path, error)
            return cls(path)

    def save(self) -> None:
        """Replaces the file.

        Raises:
            OSError: the disk is full or the folder gone.
        """
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        content = json.dumps({"version": 1, "segments": self.offsets, "rejected": self.rejected}, sort_keys=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(content)
        temporary.replace(self.path)


class Tail:
    """Reads on where sending left off, over all segments of a folder, oldest first."""

    def __init__(self, folder: Path, progress: Progress) -> None:
        self._folder = folder
        self._progress = progress
        self._exhausted: dict[str, int] = {}  # segment → its size when there was no whole line left in it

    def read(self, spans: int, size: int = _BATCH_BYTES) -> list[Line]:
        """The next whole lines: at most ``spans`` ended spans and about ``size`` bytes. Empty when all is sent.

        Lines without an ended span come along (they move the offset); what cannot be read is passed over: the
        report's reader counts it.
        """
        batch: list[Line] = []
        for name, length in self._segments():
            offset = self._progress.offsets.get(name, 0)
            if length == offset or self._exhausted.get(name) == length:
                continue
            try:
                with open_segment(self._folder / name) as file:
                    if offset and (file.seek(offset - 1) != offset - 1 or file.read(1) != b"\n"):
                        # Not where a line begins: the state is of another file. Twice is better than never.
                        _log.warning("%s: offset %d is within a line: sending it from the beginning", name, offset)
                        offset = 0
                    for line in scan(file, offset):
                        if not line.complete:
                            self._exhausted[name] = length
                            break
                        batch.append(Line(name, line.end, _ended(line.content)))
                        spans -= len(batch[-1].spans)
                        size -= line.end - line.offset
                        if spans <= 0 or size <= 0:
                            return batch
            except OSError as error:
                _log.warning("%s cannot be read: %s", name, error.strerror or error)
                self._exhausted[name] = length
        return batch

    def _segments(self) -> list[tuple[str, int]]:
        found: list[tuple[str, int]] = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if not entry.name.endswith(SUFFIX):
                    continue
                with contextlib.suppress(OSError):  # gone between listing and looking
                    about = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(about.st_mode):
                        found.append((entry.name, about.st_size))
        names = {name for name, _ in found}
        for gone in self._progress.offsets.keys() - names:
            del self._progress.offsets[gone]
        return sorted(found)


def _ended(content: bytes | None) -> list[tuple[Resource, SpanRecord]]:
    # Half of a journal is begun spans: not worth parsing to see that they have no end.
    if not content or (b'"endTimeUnixNano"' not in content and b'"end_time_unix_nano"' not in content):
        return []
    try:
        return [pair for pair in decode(content) if pair[1].end_ns is not None]
    except NotOtlp:
        return []


class Forwarder:
    """Sends batch after batch, and remembers what the endpoint took. ``failures``: attempts in a row that failed.

    A batch that fails is tried again, smaller, later and later, for as long as it takes. Only when a span fails alone
    while spans after it are taken is it the span and not the endpoint: it is then passed over, counted and logged.
    """

    def __init__(self, folder: Path, exporter: Exporter, stopping: threading.Event) -> None:
        self._progress = Progress.load(folder / STATE)
        self._tail = Tail(folder, self._progress)
        self._exporter = exporter
        self._stopping = stopping
        self._limit = _BATCH_SPANS
        self.failures = 0
        self.sent = 0

    def step(self) -> bool:
        """One batch. False when there was nothing to send; waits after a failure."""
        batch = self._tail.read(self._limit)
        if not batch:
            return False
        spans = [pair for line in batch for pair in line.spans]
        why = self._exporter.export(spans) if spans else None
        if why is None:
            self._taken(batch)
            self.sent += len(spans)
            self._limit = min(_BATCH_SPANS, self._limit * 2)
            if spans and self.failures:
                _log.warning("the endpoint takes spans again")
                self.failures = 0
            return True
        if not self.failures:
            _log.warning("the endpoint does not take spans: %s; the journal keeps them, trying on", why)
        self.failures += 1
        if self._limit == 1 and self.failures >= _PATIENCE and self._reject(batch, why):
            return True
        self._limit = max(1, self._limit // 8)
        self._wait()
        return True

    def _taken(self, batch: Sequence[Line]) -> None:
        for line in batch:
            self._progress.offsets[line.segment] = line.end
        try:
            self._progress.save()
        except OSError as error:
            # Sending goes on: without the file a restart repeats spans, and the ids say that they are the same.
            _log.warning("%s cannot be saved: %s", self._progress.path, error.strerror or error)

    def _reject(self, batch: Sequence[Line], why: str) -> bool:
        """Whether the one span of the batch is to blame, and not the endpoint. Passes it over if so."""
        ahead = [pair for line in self._tail.read(_LOOKAHEAD)[len(batch) :] for pair in line.spans]
        if not any(self._exporter.export([pair]) is None for pair in ahead):
            return False
        spans = [pair for line in batch for pair in line.spans]
        if self._exporter.export(spans) is None:  # the endpoint had come back just then
            self.sent += len(spans)
            self._taken(batch)
            return True
        for _, span in spans:
            _log.warning("span %s of trace %s is passed over: %s", span.span_id, span.trace_id, why)
            self._progress.rejected += 1
        self._taken(batch)
        self.failures = 0
        return True

    def _wait(self) -> None:
        shortest, longest = _BACKOFF_S
        delay = min(longest, shortest * 2 ** min(self.failures - 1, 10))
        delay *= 0.75 + secrets.randbelow(500) / 1000  # many nodes must not return to a collector in step
        # In the last flush there is no point in being patient.
        if self._stopping.wait(delay):
            time.sleep(0.2)


class Lifeline(threading.Thread):
    """Watches whoever we work for, and sees to it that we end in time after they do.

    Sets ``stopping`` on the parent's death, end of file on a stdin that is a pipe or socket, SIGTERM or SIGINT; then
    gives the last flush ``flush_s`` seconds.
    """

    def __init__(self, parent: int | None, flush_s: float, exporter: Exporter) -> None:
        super().__init__(name="lifeline", daemon=True)
        self.stopping = threading.Event()
        self._flush_s = flush_s
        self._exporter = exporter
        self._poll = select.poll()
        self._wake_r, self._wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._poll.register(self._wake_r, select.POLLIN)
        self._stdin: int | None = None
        if parent is not None:
            try:
                self._poll.register(os.pidfd_open(parent), select.POLLIN)
            except ProcessLookupError:
                self.stop()  # it died before we came up
        with contextlib.suppress(OSError, ValueError):
            mode = os.fstat(0).st_mode
            if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
                self._stdin = 0
                self._poll.register(0, select.POLLIN)

    def stop(self) -> None:
        """Safe in a signal handler."""
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_w, b"x")

    def run(self) -> None:
        while not self._ended():
            pass
        self.stopping.set()
        time.sleep(self._flush_s)
        _log.warning("the last flush did not end within %g s; the rest stays in the journal", self._flush_s)
        # An export may hang in the exporter's own retries: ended politely, then not.
        threading.Thread(target=self._exporter.shutdown, daemon=True).start()
        time.sleep(1)
        os._exit(1)

    def _ended(self) -> bool:
        for descriptor, event in self._poll.poll():
            if descriptor != self._stdin:
                return True
            if event & select.POLLIN and os.read(descriptor, 4096):
                continue  # nobody should talk to us; not a reason to end
            return True
        return False


def _locked(folder: Path, stopping: threading.Event) -> int | None:
    """Waits to be the only forwarder of the folder; None when it is time to go first."""
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # Another supervisor's forwarder sends all segments here, ours too; we take over when it ends.
            if stopping.wait(_POLL_S):
                os.close(descriptor)
                return None
        else:
            return descriptor


def main(argv: Sequence[str] | None = None) -> int:
    """The process: 0 when all was sent, 1 when something was left in the journal, 2 when it could not start."""
    parser = argparse.ArgumentParser(prog="ray_guard.evidence.forward", description="Exports a journal by OTLP.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parent", type=int, help="end when this process ends")
    parser.add_argument("--once", action="store_true", help="send what is there, then end; 1 if the endpoint is down")
    parser.add_argument("--flush-seconds", type=float, default=5.0, help="for the last flush (default 5)")
    args = parser.parse_args(argv)
    logging.basicConfig(format="ray-guard forward: %(message)s", level=logging.WARNING, stream=sys.stderr)
    try:
        if not args.folder.is_dir():
            raise ForwardError(f"{args.folder} is not a folder")
        # Heavy (opentelemetry, requests): of this process alone, never of the supervisor, which imports this module.
        from ray_guard.evidence.exporter import open_exporter

        exporter = open_exporter(os.environ)
    except ForwardError as error:
        sys.stderr.write(f"ray-guard forward: {error}\n")
        return 2
    lifeline = Lifeline(args.parent, args.flush_seconds, exporter)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: lifeline.stop())
    lifeline.start()
    lock = _locked(args.folder, lifeline.stopping)
    if lock is None:
        return 0
    forwarder = Forwarder(args.folder, exporter, lifeline.stopping)
    while True:
        # Asked before reading: what was written up to then is still sent.
        last = args.once or lifeline.stopping.is_set()
        try:
            sent = forwarder.step()
        except FileNotFoundError:
            _log.warning("%s is gone", args.folder)
            return 1
        if args.once and forwarder.failures > _PATIENCE:
            return 1
        if sent:
            continue
        if last:
            return 0
        lifeline.stopping.wait(_POLL_S)


if __name__ == "__main__":
    # _exit: the exporter's threads and atexit hooks have nothing left to do, and could wait for the network.
    code = main()
    sys.stderr.flush()
    os._exit(code)
