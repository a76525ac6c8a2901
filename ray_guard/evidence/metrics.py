"""Metrics by OTLP, counted from the journal at least once. Runs in the forwarder's process: imports opentelemetry.

A thread reads the journal on, adds up what :mod:`ray_guard.evidence.measures` makes of each span, and exports the sums
at intervals. They are cumulative, so an export that fails costs nothing: the next has it all. How far was counted is
saved when the endpoint has taken it; what a process had sent and not saved when it was killed, the next counts again.
"""

from __future__ import annotations

import logging
import os
import platform
import select
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from opentelemetry.metrics import CallbackOptions, Counter, Histogram, Observation
from opentelemetry.metrics import Meter as SdkMeter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, MetricExporter, MetricExportResult, MetricsData
from opentelemetry.sdk.metrics.view import ExplicitBucketHistogramAggregation, View
from opentelemetry.sdk.resources import OTELResourceDetector, Resource

from ray_guard import __version__
from ray_guard.evidence.answers import Answers
from ray_guard.evidence.exporter import LastWord, protocol
from ray_guard.evidence.layout import log_of
from ray_guard.evidence.measures import INSTRUMENTS, Bounded, Instrument, Losses, Measurement, measured
from ray_guard.evidence.settings import check
from ray_guard.evidence.tail import Line, Progress, Tail, sizes

if TYPE_CHECKING:
    from ray_guard.evidence.forward import Forwarder

STATE: Final = "metrics-state.json"
_INTERVAL: Final = "OTEL_METRIC_EXPORT_INTERVAL"
_INTERVAL_S: Final = 60.0
_POLL_S: Final = 0.5
_BATCH_SPANS: Final = 512

_log = logging.getLogger("ray_guard.forward")


def interval_s(environ: Mapping[str, str]) -> float:
    """Seconds between exports (``OTEL_METRIC_EXPORT_INTERVAL``, in milliseconds); 60 where it says nothing usable."""
    said = environ.get(_INTERVAL, "").strip()
    try:
        milliseconds = float(said) if said else _INTERVAL_S * 1e3
    except ValueError:
        milliseconds = 0.0
    if 1 <= milliseconds <= threading.TIMEOUT_MAX:
        return milliseconds / 1e3
    _log.warning("%s=%r is not a number of milliseconds, 1 or more: metrics are sent every 60 s", _INTERVAL, said)
    return _INTERVAL_S


def open_metrics_exporter(environ: Mapping[str, str]) -> MetricsExporter:
    """The exporter that the standard variables ask for.

    Raises:
        ForwardError: as for spans.
    """
    exporter: MetricExporter
    spoken = protocol(environ, "METRICS")
    check(environ, "METRICS", spoken)
    if spoken == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as GrpcExporter

        exporter = GrpcExporter()
    else:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter as HttpExporter

        exporter = HttpExporter(session=Answers().session(environ, "METRICS"))
    return MetricsExporter(exporter)


class MetricsExporter:
    """Sends metrics, and says why where it could not."""

    def __init__(self, exporter: MetricExporter) -> None:
        self._exporter = exporter
        self._last = LastWord()

    def export(self, metrics: MetricsData) -> str | None:
        """None when the endpoint took them, else why not."""
        self._last.listen()
        try:
            result = self._exporter.export(metrics)
        except Exception as error:  # noqa: BLE001 - whatever it is, the next export has it all
            return f"{type(error).__name__}: {error}"
        return None if result is MetricExportResult.SUCCESS else self._last.why()

    def shutdown(self) -> None:
        """Ends a running export soon; called from another thread."""
        self._exporter.shutdown()


class Health:
    """How supervisor, journal and forwarder are, observed at each export.

    Args:
        folder: the journal's.
        supervisor: its pid, where it is known.
        forwarder: None where no spans are forwarded.
    """

    def __init__(self, folder: Path, supervisor: int | None, forwarder: Forwarder | None) -> None:
        self._folder = folder
        self._forwarder = forwarder
        self._supervisor = None if supervisor is None else _Process(supervisor)

    def register(self, meter: SdkMeter) -> None:
        if self._supervisor is not None:
            unit, up = "{supervisor}", "1: the supervisor is there, 0: it has ended"
            meter.create_observable_gauge("ray_guard.supervisor.up", [_observed(self._supervisor.is_there)], unit, up)
        meter.create_observable_gauge("ray_guard.journal.size", [_observed(self._size)], "By", "All segments")
        if (forwarder := self._forwarder) is None:
            return

        def lag() -> int:
            return sum(max(0, size - forwarder.offset(name)) for name, size in sizes(self._folder).items())

        behind = "Journal that is not forwarded yet"
        meter.create_observable_gauge("ray_guard.forwarder.lag", [_observed(lag)], "By", behind)
        for name, unit, count in (
            ("sent", "{span}", lambda: forwarder.sent),
            ("rejected", "{span}", lambda: forwarder.passed_over),
            ("failures", "{attempt}", lambda: forwarder.failed),
        ):
            meter.create_observable_counter(f"ray_guard.forwarder.{name}", [_observed(count)], unit)

    def _size(self) -> int:
        return sum(sizes(self._folder).values())


def _observed(read: Callable[[], int]) -> Callable[[CallbackOptions], Iterable[Observation]]:
    def observe(_: CallbackOptions) -> Iterator[Observation]:
        try:
            value = read()
        except OSError:
            return  # not observed, which is not zero
        yield Observation(value)

    return observe


class _Process:
    def __init__(self, pid: int) -> None:
        try:
            self._pidfd: int | None = os.pidfd_open(pid)
        except ProcessLookupError:
            self._pidfd = None

    def is_there(self) -> int:
        return int(self._pidfd is not None and not select.select([self._pidfd], [], [], 0)[0])


class Sums:
    """All instruments, and what they have come to in this process: cumulative, with its start as their start."""

    def __init__(self, folder: Path, health: Health) -> None:
        self._reader = InMemoryMetricReader()
        views = [
            View(instrument_name=each.name, aggregation=ExplicitBucketHistogramAggregation(each.boundaries))
            for each in INSTRUMENTS
            if each.boundaries
        ]
        provider = MeterProvider([self._reader], _resource(folder), shutdown_on_exit=False, views=views)
        meter = provider.get_meter("ray_guard", __version__)
        self._instruments = {each: _create(meter, each) for each in INSTRUMENTS}
        self._records = meter.create_counter("ray_guard.journal.records", "{record}", "Records read from the journal")
        self._lost = meter.create_counter("ray_guard.journal.lost_records", "{record}", "Records there was no room for")
        self._lost.add(0)  # known to be none from here on
        self._losses = Losses()
        self._bounded = Bounded()
        health.register(meter)

    def count(self, lines: Sequence[Line]) -> None:
        for line in lines:
            log = log_of(line.segment)
            for _, span in line.spans:
                for measurement in measured(span):
                    self._add(measurement)
                self._lost.add(self._losses.more(log[0] if log else "", span))
        self._records.add(len(lines))

    def _add(self, measurement: Measurement) -> None:
        labels = self._bounded.labels(measurement)
        instrument = self._instruments[measurement.instrument]
        if isinstance(instrument, Histogram):
            instrument.record(measurement.value, labels)
        else:
            instrument.add(measurement.value, labels)

    def collect(self) -> MetricsData | None:
        return self._reader.get_metrics_data()


def _create(meter: SdkMeter, instrument: Instrument) -> Counter | Histogram:
    make = meter.create_histogram if instrument.boundaries else meter.create_counter
    return make(instrument.name, instrument.unit, instrument.description)


def _resource(folder: Path) -> Resource:
    """Of the node's guard, not of one actor. The instance stays the same when the forwarder is started anew."""
    host = platform.node()
    instance = uuid.uuid5(uuid.NAMESPACE_OID, f"ray_guard {host} {os.path.realpath(folder)}")
    own = {
        "service.name": "ray_guard",
        "service.version": __version__,
        "service.instance.id": str(instance),
        "host.name": host,
    }
    return Resource({**own, **OTELResourceDetector().detect().attributes})


class Meter(threading.Thread):
    """Counts and exports until it is time to end, then once more.

    ``failing``: why the endpoint did not take the last export; None when it did.
    """

    def __init__(
        self,
        folder: Path,
        exporter: MetricsExporter,
        health: Health,
        stopping: threading.Event,
        *,
        interval: float,
        once: bool = False,
    ) -> None:
        super().__init__(name="meter", daemon=True)
        self._folder = folder
        self._exporter = exporter
        self._stopping = stopping
        self._interval = interval
        self._once = once
        self._progress = Progress.load(folder / STATE)
        self._tail = Tail(folder, self._progress)
        self._sums = Sums(folder, health)
        self.failing: str | None = None

    def run(self) -> None:
        due = time.monotonic() + self._interval
        while True:
            # Asked before reading: what was written up to then is still counted.
            last = self._once or self._stopping.is_set()
            try:
                lines = self._tail.read(_BATCH_SPANS)
            except FileNotFoundError:
                _log.warning("%s is gone", self._folder)
                lines, last = [], True
            self._sums.count(lines)
            self._progress.advance(lines)
            ends = last and not lines
            if ends or time.monotonic() >= due:
                self.export()
                due = time.monotonic() + self._interval
            if ends:
                return
            if not lines:
                self._stopping.wait(max(0, min(_POLL_S, due - time.monotonic())))

    def export(self) -> None:
        """Sends the sums as they are. Once the thread has ended, for whoever started it."""
        metrics = self._sums.collect()
        if metrics is None:
            return
        why = self._exporter.export(metrics)
        if why is not None and self.failing is None:
            _log.warning(
                "the endpoint does not take metrics: %s; trying on (OTEL_METRICS_EXPORTER=none: it need not)",
                why,
            )
        elif why is None and self.failing is not None:
            _log.warning("the endpoint takes metrics again")
        self.failing = why
        if why is None:
            try:
                self._progress.save()
            except OSError as error:
                _log.warning("%s cannot be saved: %s", self._progress.path, error.strerror or error)
