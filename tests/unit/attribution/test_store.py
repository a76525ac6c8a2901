"""The tables of a job: whose a socket is, however many processes stand between it and its call."""

from __future__ import annotations

import pyarrow as pa
import pytest

from ray_guard.attribution import store
from ray_guard.evidence import columns


def span(number: int, name: str, parent: int | None) -> dict[str, object]:
    return {
        "trace_id": "t",
        "span_id": str(number),
        "parent_id": None if parent is None else str(parent),
        "name": name,
        "start_ns": number,
        "end_ns": 1000,
        "source": "supervisor",
        "rollout": "r",
    }


@pytest.mark.parametrize("depth", [0, 1, 2, 5, 64])
def test_a_socket_is_its_calls_below_any_number_of_processes(depth: int) -> None:
    rows = [span(0, "execute_tool bash", None)]
    rows += [span(1 + n, "process sh", n) for n in range(depth)]
    rows.append(span(1 + depth, "egress connect", depth))
    db = store.connect()
    db.register("incoming", pa.Table.from_pylist(rows, schema=columns.SCHEMA))
    db.execute("INSERT INTO span SELECT * FROM incoming")
    store.settle(db)
    store.derive(db)
    assert db.execute("SELECT call FROM flow").fetchall() == [(1,)]
    assert db.execute("SELECT call FROM process").fetchall() == [(1,)] * depth
