"""Evidence that outgrows one machine, read and arranged by Ray Data on a cluster. Runs later, in a Ray driver.

Spans are grouped by parts that hold whole traces, and of each part the tables are made where it lies. What comes back
is narrow (calls with their text, sockets, processes), and the driver goes on with it as with traces of its own. Every
node must be able to read the paths; what is under way lies in Ray's object store, which spills to disk.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Final

import duckdb
import pyarrow as pa
import ray
import ray.data

from ray_guard.attribution import parts, store
from ray_guard.evidence import columns
from ray_guard.evidence.reader import Quarantine, read, segments

PART_BYTES: Final = 128 << 20
"""Bytes of traces, as they lie on disk, that one part should have at most."""

_LEFT: Final = -1
"""The part that holds what could not be read."""
PATIENCE_S: Final = 10.0
"""How long an address may take to answer, its connecting and its first word together."""
_SETTINGS: Final = b"\x04"
_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + _SETTINGS + bytes(5)


def join(address: str) -> None:
    """Joins a cluster, unless this process is in one. Raises ConnectionError, after :data:`PATIENCE_S` at the latest
    where nobody answers: Ray by itself tries for minutes."""
    if not ray.is_initialized():
        _knock(os.environ.get("RAY_ADDRESS") or address if address == "auto" else address)
        ray.init(address=address, log_to_driver=False)


def _knock(address: str) -> None:
    """Raises ConnectionError unless ``host:port`` answers as a gRPC server does (HTTP/2: its settings come first)."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # `auto`, `local`: Ray looks for it among this machine's processes
    try:
        with socket.create_connection((host.strip("[]"), int(port)), PATIENCE_S / 2) as line:
            if os.environ.get("RAY_USE_TLS", "0") in ("0", ""):
                line.sendall(_PREFACE)
                if line.recv(9)[3:4] != _SETTINGS:
                    raise ConnectionError("what listens there is not Ray")
    except (OSError, OverflowError) as error:
        raise ConnectionError(str(error) or type(error).__name__) from error


def spread(
    db: duckdb.DuckDBPyConnection, paths: Sequence[str | os.PathLike[str]], quarantine: Quarantine
) -> tuple[int, int]:
    """Fills a store with the job's tables, and returns the first and the last nanosecond of its traces.

    Raises:
        NotEvidence: a path holds nothing to read.
    """
    parquet = store.parquet(db, paths)
    others = [path for path in paths if os.fspath(path) not in parquet]
    tables, lines = map(_absolute, (parquet, segments(others) if others else ()))
    cores: float = ray.cluster_resources().get("CPU", 1)  # type: ignore[no-untyped-call]
    count = max(2, int(cores), sum(map(os.path.getsize, (*tables, *lines))) // PART_BYTES + 1)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    for name, table in parts.derived(columns.SCHEMA.empty_table()).items():  # else no traces would make no tables
        parts.add(db, count, name, table)
    made = _spans(tables, lines, count).groupby("part").map_groups(_derived, batch_format="pyarrow")
    for row in made.iter_rows():
        table = pa.ipc.open_stream(row["table"]).read_all()
        if row["part"] == _LEFT:
            quarantine.counts.update(dict(zip(*table.to_pydict().values(), strict=True)))
        else:
            parts.add(db, row["part"], row["name"], table)
    return parts.join(db)


def _absolute(paths: Iterable[str | os.PathLike[str]]) -> list[str]:
    return [os.path.abspath(path) for path in paths]


def _spans(tables: list[str], lines: list[str], count: int) -> Any:
    """All spans, each with its part."""
    found = []
    if tables:
        spans = ray.data.read_parquet(tables, columns=columns.SCHEMA.names)
        deal = partial(parts.dealt, count=count)
        found.append(spans.map_batches(deal, batch_size=None, batch_format="pyarrow"))
    if lines:
        paths = ray.data.from_items([{"path": path} for path in lines])
        found.append(paths.map_batches(partial(_read, count=count), batch_size=1, batch_format="pyarrow"))
    first, *more = found
    return first.union(*more) if more else first


def _read(paths: pa.Table, count: int) -> Iterator[pa.Table]:
    """The spans of a segment, and last what of it could not be read: a part of its own, reasons for names."""
    quarantine = Quarantine()
    for batch in columns.batches(read(paths["path"].to_pylist(), quarantine)):
        yield parts.dealt(pa.Table.from_batches([batch]), count)
    left = [{"name": reason, "iteration": times} for reason, times in quarantine.counts.items()]
    spans = pa.Table.from_pylist(left, schema=columns.SCHEMA)
    yield spans.append_column(parts.PART, pa.array([_LEFT] * len(left), parts.PART.type))


def _derived(spans: pa.Table) -> pa.Table:
    """The tables of one part, each packed into a cell: they are of several kinds."""
    (part,) = spans["part"].unique().to_pylist()
    spans = spans.drop_columns("part")
    if part == _LEFT:
        made = {"": pa.TableGroupBy(spans, "name").aggregate([("iteration", "sum")])}
    else:
        made = parts.derived(spans)
    packed = [{"part": part, "name": name, "table": _packed(table)} for name, table in made.items()]
    return pa.Table.from_pylist(packed, schema=_CELLS)


def _packed(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


_CELLS: Final = pa.schema([parts.PART, ("name", pa.string()), ("table", pa.large_binary())])
