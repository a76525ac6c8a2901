"""NAT maps, as each of their writers has them."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_guard.attribution.nat import ALWAYS, Mapping, load
from ray_guard.attribution.sources.reader import FileReport

NEW = (
    "[1772854811.250000]\t    [NEW] tcp      6 120 SYN_SENT src=10.0.0.5 dst=198.51.100.7 sport=44318 dport=22 "
    "[UNREPLIED] src=198.51.100.7 dst=203.0.113.9 sport=22 dport=61000"
)
DESTROY = (
    "[1772854831.500000]\t[DESTROY] tcp      6 src=10.0.0.5 dst=198.51.100.7 sport=44318 dport=22 "
    "src=198.51.100.7 dst=203.0.113.9 sport=22 dport=61000 [ASSURED]"
)
START, END = 1772854811_250000000, 1772854831_500000000


def mappings(tmp_path: Path, text: str) -> tuple[list[Mapping], FileReport]:
    path = tmp_path / "map"
    path.write_text(text)
    report = FileReport(str(path))
    return list(load(path, report)), report


def test_a_connection_holds_from_its_new_to_its_destroy(tmp_path: Path) -> None:
    (found,), _ = mappings(tmp_path, f"{NEW}\n{DESTROY}\n")
    assert found == Mapping(START, END, ("10.0.0.5", 44318), ("203.0.113.9", 61000), "tcp", ("198.51.100.7", 22))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("lines", "start", "end"),
    [
        ([NEW], START, ALWAYS[1]),
        ([DESTROY], 0, END),
        ([NEW.split("\t", 1)[1], DESTROY.split("\t", 1)[1]], 0, ALWAYS[1]),
    ],
)
def test_what_was_not_seen_is_open(tmp_path: Path, lines: list[str], start: int, end: int) -> None:
    (found,), _ = mappings(tmp_path, "\n".join(lines))
    assert (found.start_ns, found.end_ns) == (start, end)


def test_what_is_not_translated_is_no_map(tmp_path: Path) -> None:
    plain = NEW.replace("dst=203.0.113.9", "dst=10.0.0.5").replace("dport=61000", "dport=44318")
    assert mappings(tmp_path, plain)[0] == []


@pytest.mark.parametrize("header", ["start,end,inside_ip,inside_port,outside_ip,outside_port,proto\n", ""])
def test_csv(tmp_path: Path, header: str) -> None:
    rows = "1772854811.25,1772854831.5,10.0.0.5,44318,203.0.113.9,61000,tcp\nsoon,later,10.0.0.5,1,203.0.113.9,2,tcp\n"
    (found,), report = mappings(tmp_path, header + rows)
    assert found == Mapping(START, END + 100_000_000, ("10.0.0.5", 44318), ("203.0.113.9", 61000), "tcp")  # type: ignore[arg-type]
    assert report.quarantined == {"fields": 1}


def test_a_fortigate_carries_its_map(tmp_path: Path) -> None:
    line = (
        'date=2026-03-07 time=03:40:11 eventtime=1772854811 tz="+0000" devid="x" type="traffic" srcip=10.0.0.5 '
        "srcport=44318 dstip=198.51.100.7 dstport=22 proto=6 action=accept trandisp=snat "
        "transip=203.0.113.9 transport=61000"
    )
    (found,), _ = mappings(tmp_path, line)
    assert (found.inside, found.outside) == (("10.0.0.5", 44318), ("203.0.113.9", 61000))


def test_a_line_that_is_no_event_is_counted(tmp_path: Path) -> None:
    found, report = mappings(tmp_path, f"{NEW}\nconntrack v1.4.7 (conntrack-tools): 1 flow event shown\n")
    assert len(found) == 1
    assert report.quarantined == {"fields": 1}
