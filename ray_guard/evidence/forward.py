"""The forwarder: tails a journal and exports what ended to an OTLP endpoint, at least once; metrics beside it.

Runs as a process of its own, child of the supervisor: ``python -m ray_guard.evidence.forward FOLDER``.

The journal is the truth and the queue: nothing is held in memory that a restart would lose, an outage of any length
costs disk that was spent anyway, and an observer's trouble never reaches the supervisor. What is sent twice after a
crash has the same ids, so a backend stores it once. Only spans that ended are sent: OTLP has no others. Metrics are
counted from the same journal by a thread of their own (:mod:`ray_guard.evidence.metrics`): neither waits for the other.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import logging
import os
import secrets
import select
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from ray_guard.errors import RayGuardError
from ray_guard.evidence.forwarder import ForwardError, endpoint, metrics_endpoint
from ray_guard.evidence.settings import batch_size, delay_s
from ray_guard.evidence.tail import Line, Progress, Tail
from ray_guard.records import Resource, SpanRecord

if TYPE_CHECKING:
    from ray_guard.evidence.metrics import Meter, MetricsExporter

STATE: Final = "forward-state.json"
_LOCK: Final = "forward.lock"
_BATCH_SPANS: Final = 512
_POLL_S: Final = 0.5
_BACKOFF_S: Final = (0.5, 30.0)
_PATIENCE: Final = 3
_LOOKAHEAD: Final = 8

_log = logging.getLogger("ray_guard.forward")


class Exporter(Protocol):
    """What :mod:`ray_guard.evidence.exporter` makes of an endpoint."""

    def export(self, spans: Sequence[tuple[Resource, SpanRecord]]) -> str | None:
        """Sends the spans. None when the endpoint took them, else why not."""

    def refused(self) -> tuple[int, str]:
        """How many spans of an export that the endpoint took it did not keep, as it says itself, and why."""

    def pause_s(self) -> float:
        """How long the endpoint asked to be left alone when it last answered; 0 where it did not."""

    def shutdown(self) -> None:
        """Ends a running export soon; called from another thread."""


class Forwarder:
    """Sends batch after batch, and remembers what the endpoint took.

    ``failures``: attempts in a row that failed. So far: spans ``sent`` and ``passed_over``, attempts that ``failed``.

    A batch that fails is tried again, smaller, later and later, for as long as it takes. Only when a span fails alone
    while spans after it are taken is it the span and not the endpoint: it is then passed over, counted and logged.
    """

    def __init__(self, folder: Path, exporter: Exporter, stopping: threading.Event, batch: int = _BATCH_SPANS) -> None:
        self._progress = Progress.load(folder / STATE)
        self._tail = Tail(folder, self._progress)
        self._exporter = exporter
        self._stopping = stopping
        self._most = batch
        self._limit = batch
        self.failures = 0
        self.sent = 0
        self.passed_over = 0
        self.failed = 0
        self._remark = (False, "")

    def offset(self, segment: str) -> int:
        """How many bytes of a segment are done with. May be called from another thread."""
        return self._progress.offsets.get(segment, 0)

    def step(self) -> bool:
        """One batch. False when there was nothing to send; waits after a failure."""
        batch = self._tail.read(self._limit)
        if not batch:
            return False
        spans = [pair for line in batch for pair in line.spans]
        why = self._exporter.export(spans) if spans else None
        if why is None:
            self._taken(batch, len(spans))
            self._limit = min(self._most, self._limit * 2)
            if spans and self.failures:
                _log.warning("the endpoint takes spans again")
                self.failures = 0
            return True
        if not self.failures:
            _log.warning("the endpoint does not take spans: %s; the journal keeps them, trying on", why)
        self.failures += 1
        self.failed += 1
        if self._limit == 1 and self.failures >= _PATIENCE and self._reject(batch, why):
            return True
        self._limit = max(1, self._limit // 8)
        self._wait()
        return True

    def _taken(self, batch: Sequence[Line], spans: int) -> None:
        """The endpoint took so many spans of the batch; those it did not keep are not sent again (OTLP forbids it)."""
        if spans:
            refused, why = self._exporter.refused()
            refused = min(refused, spans)
            remark = (refused > 0, why)
            if remark not in (self._remark, (False, "")):
                _log.warning("the endpoint did not keep %d of %d spans: %s", refused, spans, why or "no reason given")
            self._remark = remark
            self.sent += spans - refused
            self.passed_over += refused
            self._progress.rejected += refused
        self._progress.advance(batch)
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
            self._taken(batch, len(spans))
            return True
        for _, span in spans:
            _log.warning("span %s of trace %s is passed over: %s", span.span_id, span.trace_id, why)
            self._progress.rejected += 1
            self.passed_over += 1
        self._taken(batch, 0)
        self.failures = 0
        return True

    def _wait(self) -> None:
        shortest, longest = _BACKOFF_S
        delay = min(longest, shortest * 2 ** min(self.failures - 1, 10))
        delay *= 0.75 + secrets.randbelow(500) / 1000  # many nodes must not return to a collector in step
        delay += min(longest, self._exporter.pause_s())
        # In the last flush there is no point in being patient.
        if self._stopping.wait(delay):
            time.sleep(0.2)


class Lifeline(threading.Thread):
    """Watches whoever we work for, and sees to it that we end in time after they do.

    Sets ``stopping`` on the parent's death, end of file on a stdin that is a pipe or socket, SIGTERM or SIGINT; then
    gives the last flush ``flush_s`` seconds.
    """

    def __init__(self, parent: int | None, flush_s: float, shutdowns: Sequence[Callable[[], None]]) -> None:
        super().__init__(name="lifeline", daemon=True)
        self.stopping = threading.Event()
        self._flush_s = flush_s
        self._shutdowns = shutdowns
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
        for shutdown in self._shutdowns:
            threading.Thread(target=shutdown, daemon=True).start()
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
        batch, delay = batch_size(os.environ), delay_s(os.environ, _POLL_S)
        exporter, metrics = _exporters(args.folder)
    except RayGuardError as error:
        sys.stderr.write(f"ray-guard forward: {error}\n")
        return 2
    lifeline = Lifeline(args.parent, args.flush_seconds, [each.shutdown for each in (exporter, metrics) if each])
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: lifeline.stop())
    lifeline.start()
    lock = _locked(args.folder, lifeline.stopping)
    if lock is None:
        return 0
    forwarder = None if exporter is None else Forwarder(args.folder, exporter, lifeline.stopping, batch)
    meter = None if metrics is None else _metering(args, metrics, forwarder, lifeline.stopping)
    all_sent = forwarder is None or _forward(args, forwarder, lifeline.stopping, delay)
    if meter is not None:
        meter.join()
        if forwarder is not None and meter.failing is None:
            meter.export()  # it did not wait for the last spans: how far they came is said now
        all_sent &= meter.failing is None
    return 0 if all_sent else 1


def _exporters(folder: Path) -> tuple[Exporter | None, MetricsExporter | None]:
    """For spans and for metrics, each where wanted. Raises ForwardError."""
    if not folder.is_dir():
        raise ForwardError(f"{folder} is not a folder")
    # Heavy (opentelemetry, requests): of this process alone, never of the supervisor.
    from ray_guard.evidence.exporter import open_exporter

    metrics = None
    if metrics_endpoint(os.environ) is not None:
        from ray_guard.evidence.metrics import open_metrics_exporter

        metrics = open_metrics_exporter(os.environ)
        if endpoint(os.environ) is None:
            return None, metrics
    return open_exporter(os.environ), metrics


def _metering(
    args: argparse.Namespace, exporter: MetricsExporter, forwarder: Forwarder | None, stopping: threading.Event
) -> Meter:
    from ray_guard.evidence.metrics import Health, Meter, interval_s

    health = Health(args.folder, args.parent, forwarder)
    meter = Meter(args.folder, exporter, health, stopping, interval=interval_s(os.environ), once=args.once)
    meter.start()
    return meter


def _forward(args: argparse.Namespace, forwarder: Forwarder, stopping: threading.Event, delay: float) -> bool:
    """Until it is time to end and all is sent, or nothing more can be. Whether all was."""
    folder, once = args.folder, args.once
    while True:
        # Asked before reading: what was written up to then is still sent.
        last = once or stopping.is_set()
        try:
            sent = forwarder.step()
        except FileNotFoundError:
            _log.warning("%s is gone", folder)
            return False
        if once and forwarder.failures > _PATIENCE:
            return False
        if sent:
            continue
        if last:
            return True
        stopping.wait(delay)


if __name__ == "__main__":
    # _exit: the exporter's threads and atexit hooks have nothing left to do, and could wait for the network.
    code = main()
    sys.stderr.flush()
    os._exit(code)
