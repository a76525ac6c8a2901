"""driver: metrics by ``ray.util.metrics``, for clusters whose Prometheus scrapes Ray's own agents.

An actor on each node reads the journal of that node on, as the forwarder does, and tells Ray's agent there what this
job's spans count for (:mod:`ray_guard.evidence.measures`). Ray wants names without dots:
``gen_ai.execute_tool.duration`` is scraped as ``ray_gen_ai_execute_tool_duration``. All are listed in docs/traces.md.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any, Final

import ray
from ray.util.metrics import Counter, Gauge, Histogram
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_guard.actors import internals, process
from ray_guard.evidence.layout import log_of
from ray_guard.evidence.measures import INSTRUMENTS, Bounded, Instrument, Losses, Measurement, measured
from ray_guard.evidence.tail import Line, Progress, Tail, sizes
from ray_guard.records import SpanRecord

_POLL_S: Final = 1.0
_BATCH_SPANS: Final = 512
_RUN: Final = "rl.run.id"


def export_metrics() -> list[Any]:
    """Starts an actor on each node that is alive now: for nodes that come later, call it again.

    They take no CPU and end with the job. Call it from an unguarded driver.

    Returns:
        their handles; ``ray.get([each.counted.remote() for each in handles])`` says how many records each has read.
    """
    internals.ensure_connected()
    process.announce_driver()
    run, folder = process.run_id(), os.environ.get("RAY_GUARD_EVIDENCE", "")
    meter = ray.remote(num_cpus=0, max_restarts=-1)(_Meter)
    return [
        meter.options(
            name=f"ray_guard.metrics.{node['NodeID']}",
            namespace=f"ray_guard.{run}",
            get_if_exists=True,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        ).remote(run, folder)
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
    ]


class _Meter:
    """Counts one job's spans in one node's journal, from its beginning; again where it is restarted."""

    def __init__(self, run: str, folder: str) -> None:
        self._run = run
        self._folder = Path(folder or os.path.join(internals.logs_folder(), "ray_guard"))
        self._progress = Progress(self._folder)  # never saved: Ray's counters begin anew with this process
        self._tail = Tail(self._folder, self._progress)
        self._instruments = {each: _create(each) for each in INSTRUMENTS}
        self._lost = Counter("ray_guard_journal_lost_records", "Records there was no room for")
        self._size = Gauge("ray_guard_journal_size_bytes", "All segments of the journal on this node")
        self._losses = Losses()
        self._bounded = Bounded()
        self._counted = 0
        threading.Thread(target=self._read, name="meter", daemon=True).start()

    def counted(self) -> int:
        """How many records of the journal were read."""
        return self._counted

    def _read(self) -> None:
        pause = threading.Event()
        while True:
            try:
                lines = self._tail.read(_BATCH_SPANS)
                self._size.set(sum(sizes(self._folder).values()))
            except FileNotFoundError:
                lines = []  # nothing on this node has been guarded yet
            self._count(lines)
            self._progress.advance(lines)
            self._counted += len(lines)
            if not lines:
                pause.wait(_POLL_S)

    def _count(self, lines: list[Line]) -> None:
        for line in lines:
            log = log_of(line.segment)
            for _, span in line.spans:
                if (lost := self._losses.more(log[0] if log else "", span)) > 0:
                    self._lost.inc(lost)
                if self._is_ours(span):
                    for measurement in measured(span):
                        self._add(measurement)

    def _is_ours(self, span: SpanRecord) -> bool:
        """Jobs of a cluster share a journal. What is nobody's concerns all: its supervisor, or the evidence."""
        return span.attributes.get(_RUN, self._run) == self._run

    def _add(self, measurement: Measurement) -> None:
        labels = self._bounded.labels(measurement)
        tags = {_plain(label): labels.get(label, "") for label in measurement.instrument.labels}
        instrument = self._instruments[measurement.instrument]
        if isinstance(instrument, Histogram):
            instrument.observe(measurement.value, tags)
        else:
            instrument.inc(measurement.value, tags)


def _create(instrument: Instrument) -> Counter | Histogram:
    name, tags = _plain(instrument.name), tuple(_plain(label) for label in instrument.labels)
    if instrument.boundaries:
        return Histogram(name, instrument.description, list(instrument.boundaries), tags)
    return Counter(name, instrument.description, tags)


def _plain(name: str) -> str:
    return name.replace(".", "_")
