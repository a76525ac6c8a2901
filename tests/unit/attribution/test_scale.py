"""What was made to hold much: packed lines, traces in Parquet, answers made when asked, JSON written piece by piece."""

from __future__ import annotations

import json
from collections import Counter
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_guard.attribution import document, store
from ray_guard.attribution.attribute import attribute
from ray_guard.attribution.intake import Lines
from ray_guard.evidence import columns
from ray_guard.evidence.reader import NotEvidence

SECOND = 1_000_000_000
BEGIN = 1_772_854_800 * SECOND


def span(number: int, name: str, parent: int | None, **more: object) -> dict[str, object]:
    about: dict[str, object] = {"trace_id": "t", "span_id": f"{number}", "parent_id": parent and f"{parent}"}
    about |= {"name": name, "start_ns": BEGIN, "end_ns": BEGIN + 60 * SECOND, "source": "supervisor", "rollout": "r"}
    return about | {"host": "n", "host_ips": ["10.0.0.5"], "group": 'g"\u00e9', "iteration": 3} | more


SPANS = [
    span(1, "execute_tool bash", None, attributes=[("gen_ai.tool.call.arguments", "curl 198.51.100.7")]),
    span(2, "process sh", 1),
    span(
        3,
        "egress connect",
        2,
        attributes=[
            ("network.local.address", "10.0.0.5"),
            ("network.local.port", "40000"),
            ("network.peer.address", "198.51.100.7"),
            ("network.peer.port", "22"),
        ],
    ),
]


def written(tmp_path: Path, rows: list[dict[str, object]]) -> str:
    path = tmp_path / "it's spans.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=columns.SCHEMA), path)
    return str(path)


def log(tmp_path: Path) -> str:
    path = tmp_path / 'a "log".json'
    path.write_text(
        "".join(
            json.dumps(
                {
                    "timestamp": f"2026-03-07T03:40:{10 + n:02d}.5+0000",
                    "event_type": "alert" if n % 2 == 0 else "flow",
                    "src_ip": "10.0.0.5" if n < 4 else "203.0.113.9",
                    "src_port": 40000,
                    "dest_ip": "198.51.100.7",
                    "dest_port": 22,
                    "proto": "TCP",
                    **({"alert": {"signature": "odd"}} if n % 2 == 0 else {}),
                }
            )
            + "\n"
            for n in range(6)
        )
    )
    return str(path)


def test_spans_in_parquet_are_joined_where_they_lie(tmp_path: Path) -> None:
    result = attribute([written(tmp_path, SPANS)], [log(tmp_path)])
    assert [alert.verdict for alert in result.alerts][:4] == ["attributed"] * 4
    assert result.alerts[0].candidates[0].tier == "socket"
    # Of an address that nobody has a map of: the call that was open names where they went.
    assert {alert.candidates[0].tier for alert in result.alerts[4:]} == {"destination"}
    assert result.alerts[-1].record == 5
    assert [each.record for each in result.alerts[1:3]] == [1, 2]
    assert Counter(result.alerts.verdicts().tolist()) == Counter(alert.verdict for alert in result.alerts)
    assert json.loads(result.alerts.line(5))["src_ip"] == "203.0.113.9"


def test_a_given_nat_map_speaks_against_ports_that_it_does_not_know(tmp_path: Path) -> None:
    traces, alerts, said = written(tmp_path, SPANS[:1]), Path(log(tmp_path)), {}
    lines = alerts.read_text().splitlines(keepends=True)
    alerts.write_text("".join([*lines, lines[4].replace('"src_port": 40000', '"src_port": 61000')]))
    for name, address, at in (("other", "203.0.113.10", 0), ("late", "203.0.113.9", -50), ("right", "203.0.113.9", 0)):
        begin = BEGIN // SECOND + at
        rows = [f"{begin},{begin + 20},10.0.0.5,39000,{address},61000,tcp", f"{begin + 90},,10.0.0.5,9,{address},1,tcp"]
        (tmp_path / name).write_text("\n".join(rows))
        stranger = attribute([traces], [alerts], maps=[tmp_path / name]).alerts[
            4
        ]  # port 40000, which no row translates
        (only,) = stranger.candidates
        assert "the call was open on that machine at that time" not in only.evidence
        said[name] = "the NAT map knows no machine of this job there at that time" in only.against, stranger.unobserved
    assert {name: spoken for name, (spoken, _) in said.items()} == {"other": False, "late": False, "right": True}
    assert said["right"][1] > said["late"][1]
    assert said["right"][1] > said["other"][1]


def test_what_is_written_piece_by_piece_is_what_json_would_write(tmp_path: Path) -> None:
    for alerts in (log(tmp_path), str(tmp_path / "none.json")):
        (tmp_path / "none.json").touch()
        result, out = attribute([written(tmp_path, SPANS)], [alerts]), BytesIO()
        document.write(result, out, lambda result=result: document.found(result))
        answer = json.loads(out.getvalue())
        assert out.getvalue() == (json.dumps(answer, indent=1) + "\n").encode()
        assert len(answer["alerts"]) == len(result.alerts)


def test_of_several_lines_about_a_span_the_supervisors_counts(tmp_path: Path) -> None:
    told = span(3, "egress connect", 2, source="target", attributes=[("network.peer.address", "192.0.2.1")])
    alone = span(4, "egress connect", 2, source="target")
    path = written(tmp_path, [*SPANS, told, SPANS[2] | {"end_ns": None}, alone])
    result = attribute([path], [log(tmp_path)])
    assert result.db.execute("SELECT span_id, peer_ip, call FROM flow").fetchall() == [("3", "198.51.100.7", 1)]


@pytest.mark.parametrize("content", [b"no parquet", None])
def test_what_is_no_table_of_spans_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x.parquet"
    if content is None:
        pq.write_table(pa.table({"trace_id": ["t"]}), path)
    else:
        path.write_bytes(content)
    with pytest.raises(NotEvidence, match=r"x\.parquet: (has no column span_id|cannot be read as Parquet)"):
        store.parquet(store.connect(), [path])


@pytest.mark.parametrize("count", [0, 1, 1999, 2000, 2001, 4000])
def test_packed_lines_come_back(count: int) -> None:
    lines = Lines()
    said = [f"{n}".encode() * (n % 7) for n in range(count)]
    for line in said:
        lines.extend([line])
    assert [lines[n] for n in range(count)] == said
