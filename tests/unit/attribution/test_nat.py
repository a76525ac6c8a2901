"""NAT maps, as each of their writers has them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_guard.attribution.intake import Options, placed
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
START, END = 1772854811_250000000, 1772854831_500001000


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
    assert found == Mapping(START, END - 1000 + 100_000_000, ("10.0.0.5", 44318), ("203.0.113.9", 61000), "tcp")  # type: ignore[arg-type]
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


TUPLES = (
    "src=10.0.0.5 dst=198.51.100.7 sport=44318 dport=22 {}"
    "src=198.51.100.7 dst=203.0.113.9 sport=22 dport=61000 [ASSURED]"
)
ULOGD = {
    "timestamp": "2026-03-07T03:40:31.600000+0000",
    "dvc": "gw",
    "src_ip": "10.0.0.5",
    "src_port": 44318,
    "dest_ip": "198.51.100.7",
    "dest_port": 22,
    "orig.ip.protocol": 6,
    "reply.ip.saddr.str": "198.51.100.7",
    "reply.l4.sport": 22,
    "reply.ip.daddr.str": "203.0.113.9",
    "reply.l4.dport": 61000,
    "ct.event": 4,
    "flow.start.sec": START // 10**9,
    "flow.start.usec": 250000,
    "flow.end.sec": END // 10**9,
    "flow.end.usec": 500000,
}
NFCT = (
    "[{}] ORIG: SRC=10.0.0.5 DST=198.51.100.7 PROTO=TCP SPT=44318 DPT=22 PKTS=3 BYTES=164 , "
    "REPLY: SRC=198.51.100.7 DST=203.0.113.9 PROTO=TCP SPT=22 DPT=61000 PKTS=2 BYTES=112 "
)


@pytest.mark.parametrize(
    ("text", "start", "end"),
    [
        # a dump says that it was, and not when; with timestamps kept by the kernel, since when
        ("tcp      6 431999 ESTABLISHED " + TUPLES.format("") + " mark=0 use=1", None, None),
        ("ipv4     2 tcp      6 9 CLOSE " + TUPLES.format("packets=3 bytes=164 ") + " mark=0 zone=0 use=2", None, None),
        ("tcp 6 9 CLOSE " + TUPLES.format("") + " [start=Sat Mar  7 03:40:11 2026] use=1 id=7", 0, None),
        # events with counters, ids, by more than one option; of a connection that the log knows the end of alone
        (
            f"[1772854831.5]\t[DESTROY] ipv4     2 tcp      6 9 CLOSE {TUPLES.format('packets=3 bytes=164 ')} id=7",
            None,
            20,
        ),
        (f"[1772854831.5]\t[DESTROY] tcp 6 {TUPLES.format('')} delta-time=20 id=7 [USERSPACE] portid=9", -1, 20),
        (f"[1772854811.25]\t [UPDATE] tcp 6 60 SYN_RECV {TUPLES.format('')}", None, None),
        (f"{NEW}\n{NEW.replace('11.25', '31.5').replace('61000', '61001')}", 0, 20),
        # through syslog, of a year to be found, and the journal
        ("Mar  7 03:40:11 gw conntrack[9]: " + NEW.partition("\t")[2], 0, None),
        ("2026-03-07T03:40:11.250000+00:00 gw ulogd[9]: " + NFCT.format("NEW"), 0, None),
        ("Mar  7 03:40:11 gw " + NFCT.format("NEW") + "\nMar  7 03:40:31 gw " + NFCT.format("DESTROY"), 0, 20),
        (json.dumps({"__REALTIME_TIMESTAMP": str(START // 1000), "MESSAGE": NEW.partition("\t")[2]}), 0, None),
        (json.dumps(ULOGD), 0, 20),
        (json.dumps(ULOGD | {"ct.event": 1, "flow.end.sec": None}), 0, None),
    ],
)
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_connection_tracking_however_it_is_written(
    tmp_path: Path, text: str, start: int | None, end: int | None, pack: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "map"
    path.write_bytes(pack((text + "\n").encode()))
    report = FileReport(str(path))
    found = next(iter(load(path, report, lambda time: placed(time, Options(), (START, END)))))
    assert not report.quarantined, report.first
    assert (found.inside, found.outside) == (("10.0.0.5", 44318), ("203.0.113.9", 61000))
    assert (found.proto, found.peer, found.aimed) == ("tcp", ("198.51.100.7", 22), (None, None))
    for said, expected, unknown in ((found.start_ns, start, ALWAYS[0]), (found.end_ns, end, ALWAYS[1])):
        assert said == unknown if expected is None else abs(said - START - expected * 10**9) <= 10**9


@pytest.mark.parametrize(
    ("proto", "tuples", "ends"),
    [
        ("udp      17 30", "src={} dst={} sport=7 dport=53 [UNREPLIED] src={} dst={} sport=53 dport=8", (7, 8)),
        (
            "sctp     132 9 COOKIE_WAIT",
            "src={} dst={} sport=7 dport=9 [UNREPLIED] src={} dst={} sport=9 dport=8",
            (7, 8),
        ),
        (
            "icmp     1 30",
            "src={} dst={} type=8 code=0 id=7 [UNREPLIED] src={} dst={} type=0 code=0 id=8",
            (None, None),
        ),
        ("icmpv6   58 30", "src={} dst={} type=128 code=0 id=7 src={} dst={} type=129 code=0 id=8", (None, None)),
    ],
)
def test_other_protocols(tmp_path: Path, proto: str, tuples: str, ends: tuple[int | None, int | None]) -> None:
    inside, peer, outside = (
        ("fd00::5", "2001:db8::7", "2001:db8::9") if "v6" in proto else ("10.0.0.5", "192.0.2.7", "192.0.2.9")
    )
    (found,), report = mappings(tmp_path, f"    [NEW] {proto} " + tuples.format(inside, peer, peer, outside))
    assert not report.quarantined
    assert (found.inside, found.outside) == ((inside, ends[0]), (outside, ends[1]))
    assert found.proto == {"icmpv6": "icmp6"}.get(proto.split(maxsplit=1)[0], proto.split(maxsplit=1)[0])


HEADER = "start,end,inside_ip,inside_port,outside_ip,outside_port,proto"
TURNED = """Proto;outside_port;outside_ip;Inside_IP;inside_port;end;start
tcp;61000;203.0.113.9;10.0.0.5;44318;2026-03-07T03:40:31Z;2026-03-07 03:40:11+00:00"""
ROW = "1772854811,1772854831,10.0.0.5,44318,203.0.113.9,61000,tcp"


@pytest.mark.parametrize(
    ("text", "start", "end", "port"),
    [
        (TURNED, 0, 21, 44318),
        ("# made by hand\n\n" + ROW, 0, 21, 44318),
        (ROW.replace("1772854831", ""), 0, None, 44318),
        (ROW.replace("1772854831", "0").replace("1772854811", "0"), None, None, 44318),
        (ROW.replace("44318", "0").replace("61000", ""), 0, 21, None),
        (ROW.replace("10.0.0.5", "::ffff:10.0.0.5").replace("1772854811", "1772854811000"), 0, 21, 44318),
        (f"{HEADER},peer_ip\n{ROW},198.51.100.7", 0, 21, 44318),
    ],
)  # fmt: skip
def test_csv_by_its_header(tmp_path: Path, text: str, start: int | None, end: int | None, port: int | None) -> None:
    (found,), report = mappings(tmp_path, text)
    assert not report.quarantined, report.first
    assert (found.inside, found.outside.ip, found.proto) == (("10.0.0.5", port), "203.0.113.9", "tcp")
    begin = START // 10**9 * 10**9
    assert found.start_ns == (ALWAYS[0] if start is None else begin)
    assert found.end_ns == ALWAYS[1] if end is None else abs(found.end_ns - begin - end * 10**9) <= 10**9


@pytest.mark.parametrize(
    ("text", "reason", "why"),
    [
        ('<flow type="new"><meta direction="original">', "unknown", "without xml"),
        ("start,end,inside_ip,outside_port\n" + ROW, "fields", "outside_ip"),
        (ROW + ",7", "unknown", "format"),
        (ROW.replace("1772854831", "1772854801"), "time", "ends before it begins"),
        (ROW.replace(",61000", ","), "fields", "a port on one side alone"),
        (NEW.replace("1772854811.250000", "9999999999.0"), "time", "between 2000 and 2100"),
    ],
)
def test_what_is_no_map_says_why(tmp_path: Path, text: str, reason: str, why: str) -> None:
    found, report = mappings(tmp_path, text)
    assert found == []
    assert report.first[0].reason == reason
    assert why in report.first[0].detail
