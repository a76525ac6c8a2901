"""Evidence that outgrows one machine, read and arranged on a Ray cluster. Runs later, in a Ray driver and its tasks.

Each task reads a piece of the traces (a Parquet row group, an OTLP segment) and deals its spans out by trace; another
makes the tables of each part's traces. What comes back is narrow (calls with their text, sockets, processes), and the
driver goes on with it as with traces of its own. Every node must be able to read the paths; what is under way lies in
Ray's object store, which spills to disk. Plain tasks, not Ray Data: that needs pandas, for nothing that is used here.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from ray_guard.attribution import parts, store
from ray_guard.evidence import columns
from ray_guard.evidence.reader import Quarantine, read, segments

PART_BYTES: Final = 128 << 20
"""Bytes of traces, as they lie on disk, that one part should have at most."""

PATIENCE_S: Final = 10.0
"""How long an address may take to answer, its connecting and its first word together."""
_SETTINGS: Final = b"\x04"
_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + _SETTINGS + bytes(5)


class _Piece(NamedTuple):
    """What one task reads. ``group``: of a Parquet file, which row group; None: a segment."""

    path: str
    group: int | None


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
    pieces = _pieces(db, paths)
    size = sum(os.path.getsize(path) for path in {piece.path for piece in pieces})
    cores: float = ray.cluster_resources().get("CPU", 1)  # type: ignore[no-untyped-call]
    count = max(2, int(cores), size // PART_BYTES + 1)
    # One result more than parts: what could not be read.
    deal = ray.remote(_deal).options(num_returns=count + 1)
    dealt: list[Any] = [deal.remote(piece, count) for piece in pieces]
    for left in dealt:
        quarantine.counts.update(ray.get(left[-1]))
    derive = ray.remote(_derive)
    under_way = {derive.remote(*(each[part] for each in dealt)): part for part in range(count)}
    del dealt
    while under_way:
        (done, *_), _ = ray.wait(list(under_way))
        part = under_way.pop(done)
        for name, table in ray.get(done).items():
            parts.add(db, part, name, table)
    return parts.join(db)


def _pieces(db: duckdb.DuckDBPyConnection, paths: Sequence[str | os.PathLike[str]]) -> list[_Piece]:
    parquet = store.parquet(db, paths)
    others = [path for path in paths if os.fspath(path) not in parquet]
    pieces = [
        _Piece(os.path.abspath(path), group) for path in parquet for group in range(pq.ParquetFile(path).num_row_groups)
    ]
    return pieces + [_Piece(os.path.abspath(path), None) for path in (segments(others) if others else ())]


def _deal(piece: _Piece, count: int) -> list[pa.Table | Counter[str]]:
    """The piece's spans of each part, and what could not be read."""
    quarantine = Quarantine()
    of_part: list[list[pa.Table]] = [[columns.SCHEMA.empty_table()] for _ in range(count)]
    for table in _spans(piece, quarantine):
        for part, spans in parts.dealt(table, count):
            of_part[part].append(spans)
    return [*(pa.concat_tables(tables) for tables in of_part), quarantine.counts]


def _spans(piece: _Piece, quarantine: Quarantine) -> Iterator[pa.Table]:
    if piece.group is not None:
        yield pq.ParquetFile(piece.path).read_row_group(piece.group, columns=columns.SCHEMA.names)
    else:
        for batch in columns.batches(read([piece.path], quarantine)):
            yield pa.Table.from_batches([batch])


def _derive(*spans: pa.Table) -> dict[str, pa.Table]:
    """The tables of one part's traces."""
    return parts.derived(spans)
