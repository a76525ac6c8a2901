"""The tables of a job: whose a socket is, however many processes stand between it and its call."""

from __future__ import annotations

import pyarrow as pa
import pytest

from ray_guard.attribution import store
from ray_guard.evidence import columns
from ray_guard.evidence.reader import Entry, Position
from ray_guard.records import LINK, PARENT, ROOT_TRACE, Resource, SpanKind, SpanLink, SpanRecord
from ray_guard.report.index import Index


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
    store.arrange(db)
    assert db.execute("SELECT call FROM flow").fetchall() == [(1,)]
    assert db.execute("SELECT call FROM process").fetchall() == [(1,)] * depth


def test_a_call_says_its_first_commands_in_the_order_of_their_beginning_whatever_order_they_are_read_in() -> None:
    rows = [span(0, "execute_tool bash", None)]
    for n in range(10, 30):  # two begin at each moment
        began = {"start_ns": n // 2, "attributes": [("process.command_line", f"step-{n}")]}
        rows.append(span(n, "process sh", 0) | began)
    texts = set()
    for order in (rows, rows[::-1], rows[::3] + rows[1::3] + rows[2::3]):
        db = store.connect()
        db.register("incoming", pa.Table.from_pylist(order, schema=columns.SCHEMA))
        db.execute("INSERT INTO span SELECT * FROM incoming")
        store.arrange(db)
        texts.update(db.execute("SELECT text FROM words").fetchall())
    assert texts == {(" ; ".join(f"step-{n}" for n in range(10, 26)),)}


def test_a_rollout_in_several_traces_is_one_and_each_span_hangs_where_it_belongs() -> None:
    """As the guard writes it: the second segment begins within turn 4, the third within the call."""
    first, second, third = ("1" * 32, "2" * 32, "3" * 32)
    resource = Resource({"host.name": "n", "host.ip": ("192.0.2.1",)})

    def record(
        trace: str, number: int, parent: int | None, name: str, *above: tuple[str, int], **more: str | int
    ) -> None:
        links = tuple(SpanLink(trace, f"{span:016x}", {LINK: PARENT}) for trace, span in above)
        about = {ROOT_TRACE: first} if trace != first else {}
        written = SpanRecord(
            trace_id=trace,
            span_id=f"{number:016x}",
            parent_id=None if parent is None else f"{parent:016x}",
            name=name,
            kind=SpanKind.INTERNAL,
            start_ns=number,
            end_ns=1000,
            attributes={
                "rl.rollout.id": "r",
                **about,
                **{key.replace("__", "."): value for key, value in more.items()},
            },
            links=links,
        )
        entries.append(Entry(resource, written, Position("x", number, 0)))

    entries: list[Entry] = []
    record(first, 1, None, "invoke_agent a", rl__reward__score=1)
    record(first, 2, 1, "rl.turn", rl__turn=4)
    record(second, 3, None, "ray_guard.segment")
    record(second, 4, 3, "execute_tool bash", (first, 2))
    record(second, 5, 4, "process bash", process__pid=7)
    record(third, 6, None, "ray_guard.segment")
    record(third, 7, 6, "egress connect", (second, 5), network__peer__address="198.51.100.7")
    db = store.connect()
    for batch in columns.batches(iter(entries)):
        db.register("incoming", pa.Table.from_batches([batch]))
        db.execute("INSERT INTO span SELECT * FROM incoming")
    store.arrange(db)
    told = db.execute("SELECT call, trace_id, shown_trace_id, turn FROM call").fetchall()
    assert told == [(1, first, second, 4)], "the rollout it belongs to, and where it is found"
    assert db.execute("SELECT call, trace_id FROM flow").fetchall() == [(1, first)]
    assert db.execute("SELECT call, pid FROM process").fetchall() == [(1, 7)]
    assert db.execute("SELECT trace_id, rollout FROM rollout").fetchall() == [(first, "r")]
    index = Index(entries)
    flow = index.find(third, f"{7:016x}")
    assert flow is not None
    assert [each.span.name for each in index.lineage(flow)] == [
        "egress connect",
        "process bash",
        "execute_tool bash",
        "rl.turn",
        "invoke_agent a",
    ]
    assert index.place(flow).turn == 4
