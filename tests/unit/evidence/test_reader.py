"""Reading evidence as it is found: torn, mixed with rubbish, begun and not ended."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_guard.evidence import otlp, reader
from ray_guard.evidence.journal import Journal
from ray_guard.evidence.reader import NotEvidence, Quarantine, merge, read
from ray_guard.records import Resource, SpanKind, SpanRecord

RESOURCE = Resource({"service.name": "env"})


def span(number: int, *, end: int | None = 20, source: str | None = "supervisor", name: str = "x") -> SpanRecord:
    return SpanRecord(
        trace_id=f"{1:032x}",
        span_id=f"{number:016x}",
        parent_id=None,
        name=name,
        kind=SpanKind.INTERNAL,
        start_ns=10,
        end_ns=end,
        attributes={} if source is None else {"ray_guard.source": source},
    )


def line(number: int, **changes: object) -> bytes:
    return otlp.encode(span(number, **changes), RESOURCE)  # type: ignore[arg-type]


def names(path: Path) -> tuple[list[int], Quarantine]:
    quarantine = Quarantine()
    return [int(entry.span.span_id, 16) for entry in read([path], quarantine)], quarantine


def test_a_journal_comes_back_with_positions(tmp_path: Path) -> None:
    with Journal(tmp_path / "e") as journal:
        journal.append(line(1))
        journal.append(line(2) + line(3))
    quarantine = Quarantine()
    entries = list(read([tmp_path / "e"], quarantine))
    assert [entry.span for entry in entries] == [span(1), span(2), span(3)]
    assert quarantine.total == 0
    assert len({id(entry.resource) for entry in entries}) == 1
    last = entries[-1].position
    assert last.line == 4  # after the line in which the segment says what it is
    assert str(last) == f"{journal.path}:4 (byte {journal.size - len(line(3))})"
    assert Path(journal.path).read_bytes()[last.offset :] == line(3)


def test_what_cannot_be_used_is_counted_with_its_place(tmp_path: Path) -> None:
    parts = [
        line(1),
        b"\x00\x01\x02\n",
        b'{"caf\xe9": 1}\n',
        b"not json\n",
        b'{"event_type": "alert"}\n',
        b'{"resourceSpans": [{"scopeSpans": [{"spans": [{"name": "no ids"}]}]}]}\n',
        b"\n  \r\n",
        line(2).replace(b"\n", b"\r\n"),
        line(3)[:100],
    ]
    (tmp_path / "x.otlp.jsonl").write_bytes(b"".join(parts))
    found, quarantine = names(tmp_path)
    assert found == [1, 2]
    assert quarantine.counts == {"binary": 2, "malformed": 1, "foreign": 1, "invalid": 1, "torn": 1}
    assert quarantine.total == 6
    assert [(item.reason, item.position.line) for item in quarantine.first] == [
        ("binary", 2),
        ("binary", 3),
        ("malformed", 4),
        ("foreign", 5),
        ("invalid", 6),
        ("torn", 10),
    ]
    assert quarantine.first[-1].position.offset == sum(map(len, parts[:-1]))


@given(cut=st.integers(0, 2000))
def test_a_tail_torn_anywhere_loses_that_record_alone(cut: int) -> None:
    whole = line(1) + line(2)
    data = whole + line(3)[: cut % len(line(3))]
    lines = list(reader.scan(io.BytesIO(data)))
    assert [item.content for item in lines[:2]] == [line(1)[:-1], line(2)[:-1]]
    if len(data) > len(whole):
        assert not lines[2].complete
        assert (lines[2].offset, lines[2].end) == (len(whole), len(data))
    else:
        assert len(lines) == 2


def test_a_last_record_that_only_lacks_its_newline_counts(tmp_path: Path) -> None:
    (tmp_path / "x.otlp.jsonl").write_bytes(line(1)[:-1])
    found, quarantine = names(tmp_path)
    assert found == [1]
    assert quarantine.total == 0


def test_huge_lines_are_skipped_without_being_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "LINE_LIMIT", 4096)
    monkeypatch.setattr(reader, "_PIECE", 1000)
    exact = b" " * 4095 + b"\n"
    data = line(1) + b"x" * 5000 + b"\n" + line(2) + exact + b"y" * 4096 + b"\n" + line(3) + b"z" * 9000
    (tmp_path / "x.otlp.jsonl").write_bytes(data)
    found, quarantine = names(tmp_path)
    assert found == [1, 2, 3]
    assert quarantine.counts == {"huge": 3}
    assert "5001 bytes" in quarantine.first[0].detail
    lines = list(reader.scan(io.BytesIO(data)))
    assert [item.offset for item in lines[1:]] == [item.end for item in lines[:-1]]
    assert lines[-1].end == len(data)


def test_scanning_goes_on_from_an_offset() -> None:
    data = line(1) + line(2)
    (only,) = reader.scan(io.BytesIO(data), len(line(1)), number=2)
    assert (only.number, only.offset, only.end, only.complete) == (2, len(line(1)), len(data), True)


def test_folders_of_many_nodes_are_read_in_order(tmp_path: Path) -> None:
    for name, number in (("b/2", 3), ("b/1", 2), ("a", 1)):
        path = tmp_path / f"{name}.otlp.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(line(number))
    (tmp_path / "forward-state.json").write_text("{}")
    assert names(tmp_path)[0] == [1, 2, 3]
    quarantine = Quarantine()
    again = list(read([tmp_path, tmp_path / "a.otlp.jsonl"], quarantine))
    assert len(again) == 3  # named twice, read once


@pytest.mark.parametrize("make", ["missing", "empty", "unrelated"])
def test_what_is_no_evidence_is_said(tmp_path: Path, make: str) -> None:
    folder = tmp_path / "e"
    if make != "missing":
        folder.mkdir()
    if make == "unrelated":
        (folder / "eve.json").write_text("{}")
    with pytest.raises(NotEvidence, match=r"no such file or folder|holds no \*\.otlp\.jsonl segment"):
        names(folder)


def test_a_fifo_in_the_folder_does_not_hold_the_reader(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.otlp.jsonl")
    (tmp_path / "b.otlp.jsonl").write_bytes(line(1))
    (tmp_path / "c.otlp.jsonl").symlink_to("nowhere")
    found, quarantine = names(tmp_path)
    assert found == [1]
    assert quarantine.counts == {"unreadable": 2}
    assert "regular file" in quarantine.first[0].detail


def merged(*spans: SpanRecord) -> list[str]:
    position = reader.Position("x", 1, 0)
    return [entry.span.name for entry in merge(reader.Entry(RESOURCE, item, position) for item in spans).values()]


@pytest.mark.parametrize(
    ("spans", "kept"),
    [
        ([span(1, end=None, name="begun"), span(1, name="ended")], ["ended"]),
        ([span(1, name="ended"), span(1, end=None, name="begun")], ["ended"]),
        ([span(1, name="first"), span(1, name="later")], ["later"]),
        ([span(1, end=None, name="begun")], ["begun"]),
        ([span(1, name="a"), span(2, name="b"), span(1, name="c")], ["c", "b"]),
        # a target that guesses the id of a supervisor's span changes nothing
        ([span(1, name="seen"), span(1, source="target", name="claimed")], ["seen"]),
        ([span(1, end=None, name="seen"), span(1, source="target", name="claimed")], ["seen"]),
        ([span(1, source="target", name="claimed"), span(1, name="seen")], ["seen"]),
        # closed by the supervisor after the target died
        ([span(1, end=None, source="target", name="begun"), span(1, name="closed")], ["closed"]),
        # other writers name no source
        ([span(1, end=None, source=None, name="begun"), span(1, source=None, name="ended")], ["ended"]),
    ],
)
def test_merge(spans: list[SpanRecord], kept: list[str]) -> None:
    assert merged(*spans) == kept


def test_the_same_span_id_in_another_trace_is_another_span() -> None:
    other = SpanRecord("f" * 32, span(1).span_id, None, "other", SpanKind.INTERNAL, 1, 2, {})
    assert merged(span(1), other) == ["x", "other"]
