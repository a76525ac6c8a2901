"""Evidence for other tools: OTLP, Parquet, training data. Runs later, on any machine.

What is written is one record per span, merged over all segments: the supervisor's word before a target's, an end before
a begin.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Final

from ray_guard.evidence.otlp import LineEncoder
from ray_guard.evidence.reader import Entry
from ray_guard.records import Resource
from ray_guard.report.index import Index
from ray_guard.report.trajectories import trajectories

FORMATS: Final = ("otlp", "parquet", "sft")


def export(entries: Iterable[Entry], form: str, out: Path, *, clean: bool = False) -> int:
    """Writes the file, whole or not at all; returns how many spans or trajectories are in it.

    Args:
        entries: merged, one per span.
        form: one of :data:`FORMATS`.
        clean: for ``sft``: also the rollouts in which nothing was violated.

    Raises:
        OSError: it cannot be written.
    """
    if form == "parquet":
        return _replaced(out, lambda file: _parquet(entries, file))
    lines = _otlp(entries) if form == "otlp" else _sft(entries, clean=clean)
    return _replaced(out, lambda file: _write(lines, file))


def _replaced(out: Path, write: Callable[[IO[bytes]], int]) -> int:
    beside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with beside.open("xb") as file:
            count = write(file)
        beside.replace(out)
    finally:
        beside.unlink(missing_ok=True)
    return count


def _write(lines: Iterable[bytes], file: IO[bytes]) -> int:
    count = 0
    for line in lines:
        file.write(line)
        count += 1
    return count


def _otlp(entries: Iterable[Entry]) -> Iterator[bytes]:
    """Spans that ended: OTLP has no others."""
    encoders: dict[int, tuple[Resource, LineEncoder]] = {}
    for entry in entries:
        if entry.span.end_ns is None:
            continue
        known = encoders.get(id(entry.resource))
        if known is None or known[0] is not entry.resource:
            known = encoders[id(entry.resource)] = (entry.resource, LineEncoder(entry.resource))
        yield known[1].encode(entry.span)


def _sft(entries: Iterable[Entry], *, clean: bool) -> Iterator[bytes]:
    for each in trajectories(Index(entries), clean=clean):
        yield json.dumps(each, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _parquet(entries: Iterable[Entry], file: IO[bytes]) -> int:
    import pyarrow.parquet as pq  # here alone: it takes longer to load than the other formats to write

    from ray_guard.evidence.columns import SCHEMA, batches

    count = 0
    with pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
        for batch in batches(entries):
            writer.write_batch(batch)
            count += batch.num_rows
    return count
