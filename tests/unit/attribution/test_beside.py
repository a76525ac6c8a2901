"""What is met beside the fourteen formats: a variant of one of them is read as what it says, all else is quarantined by
its name, and no line is lost without a count.

Expectations are what the programs' documentation says of the parts of a line (``ulogd``'s were written by ulogd2 itself
and made ours).
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_guard.attribution.observation import Action, Endpoint, Observation, Semantics
from ray_guard.attribution.sources.reader import FileReport, read

SECOND = 1_000_000_000
AT = 1_772_854_811 * SECOND
"""2026-03-07T03:40:11Z"""
HERE, THERE = Endpoint("10.0.0.5", 44318), Endpoint("198.51.100.7", 22)
DENY = (
    "DENY: IN=eth0 OUT= MAC=02:00:00:00:00:01:02:00:00:00:00:02:08:00 SRC=10.0.0.5 DST=198.51.100.7 LEN=52 TOS=0x00 "
    "PREC=0x00 TTL=63 ID=0 DF PROTO=TCP SPT=44318 DPT=22 WINDOW=2853 RES=0x00 SYN URGP=0"
)


def of(tmp_path: Path, content: str | bytes) -> tuple[list[Observation], FileReport]:
    path = tmp_path / "log"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    report = FileReport(str(path))
    return [each.seen for each in read(path, report)], report


def only(tmp_path: Path, content: str) -> Observation:
    (seen,), report = of(tmp_path, content)
    assert not report.quarantined, report.first
    return seen


# ── kernel lines, by every way they take ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("before", "node", "zoned"),
    [
        ("2026-03-07T03:40:11+0000 gw kernel: ", "gw", True),  # journalctl -o short-iso
        ("2026-03-07T03:40:11.000000+00:00 gw kernel: ", "gw", True),  # … short-iso-precise
        ("Mar 07 03:40:11.000000 gw kernel: ", "gw", False),  # … short-precise
        ("Sat 2026-03-07 11:40:11 +08 gw kernel: ", "gw", True),  # … short-full, where a zone has no letters
        ("kern  :warn  : [Sat Mar  7 03:40:11 2026] ", "", False),  # dmesg -x -T
        ("Mar  7 03:40:12 relay Mar  7 03:40:11 gw kernel: [  307.757925] ", "gw", False),
        ("2026-03-07T03:40:12+00:00 10.0.0.9 2026-03-07T03:40:11+00:00 gw kernel: ", "gw", True),
        ("<134>1 2026-03-07T03:40:12Z relay - - - - Mar  7 03:40:11 gw kernel: ", "gw", False),
        ("<134>1 2026-03-07T03:40:12Z relay - - - - <4>Mar  7 2026 03:40:11 gw kernel: ", "gw", False),
        ('<4>1 2026-03-07T03:40:11Z gw kernel 0 - [x@32473 iut="3" s="A\\]"][e b="c"] ', "gw", True),
        ("217 <4>1 2026-03-07T03:40:11.000Z gw kernel - - - ", "gw", True),  # octets counted: syslog over TCP
        ("Mar  7 03:40:11 s_net@gw/relay/other kernel: ", "gw", False),  # syslog-ng's chain of names
        ("2026-03-07 03:40:11,000 gw kernel: ", "gw", False),
        ("2026-03-07T03:41:11Z stderr F Mar  7 03:40:11 gw kernel: ", "gw", False),
    ],
)
def test_headers_of_relays_and_of_the_journal(tmp_path: Path, before: str, node: str, zoned: bool) -> None:
    seen = only(tmp_path, before + DENY)
    assert (seen.src, seen.dst, seen.node, seen.rule, seen.action) == (HERE, THERE, node, "DENY", Action.DENIED)
    assert seen.time.zoned is zoned
    year = 0 if seen.time.dated else AT - 5_629_211 * SECOND  # Mar 7 03:40:11 of 1970
    assert seen.time.start_ns + year == AT


def test_a_container_runtime_says_the_time_of_a_line_that_says_none(tmp_path: Path) -> None:
    seen = only(tmp_path, "2026-03-07T03:40:11.1Z stderr F " + DENY)
    assert (seen.time.start_ns, seen.time.semantics, seen.rule) == (AT + SECOND // 10, Semantics.INGEST, "DENY")


def test_a_message_of_the_journal_that_is_no_text(tmp_path: Path) -> None:
    """A number for each byte, as systemd's JSON has what is no UTF-8."""
    entry = {
        "__REALTIME_TIMESTAMP": "1772854811000000",
        "_HOSTNAME": "gw",
        "MESSAGE": [*b"M\xfcnchen ", *DENY.encode()],
    }
    seen = only(tmp_path, json.dumps(entry))
    assert (seen.src, seen.rule, seen.node, seen.time.start_ns) == (HERE, "M\ufffdnchen DENY", "gw", AT)


@pytest.mark.parametrize(
    "before", ["[  307.757925] ", "[  307.757925] gw kernel: ", "<4>[  307.757925] ", "4,1234,307757925,-;"]
)
def test_seconds_since_boot_are_no_time(tmp_path: Path, before: str) -> None:
    seen, report = of(tmp_path, before + DENY)
    assert (seen, report.quarantined) == ([], {"time": 1})
    assert "dmesg -T" in report.first[0].detail


# ── ulogd2 ────────────────────────────────────────────────────────────────────────────────────────────────────

PACKET = (
    "raw.pktlen=52,raw.pktcount=1,oob.prefix=drop, all: ,{time}oob.mark=0,oob.family=2,ip.saddr=10.0.0.5,"
    "ip.daddr=198.51.100.7,ip.protocol=6,ip.ttl=63,ip.totlen=52,tcp.sport=44318,tcp.dport=22,tcp.syn=1,oob.in=,"
    "oob.out=eth0,ip.saddr.str=10.0.0.5,ip.daddr.str=198.51.100.7"
)
FLOW = (
    "timestamp=2026/03/07-11:40:14,orig.ip.saddr=10.0.0.5,orig.ip.protocol=6,orig.l4.sport=44318,orig.l4.dport=22,"
    "orig.raw.pktlen=273,reply.l4.sport=22,reply.l4.dport=61000,reply.raw.pktlen=164,ct.id=553006567,{rest}"
    "orig.ip.saddr.str=10.0.0.5,orig.ip.daddr.str=198.51.100.7,reply.ip.saddr.str=198.51.100.7,"
    "reply.ip.daddr.str=203.0.113.9"
)


def test_packets_as_gprint_writes_them(tmp_path: Path) -> None:
    stamped = PACKET.format(time="oob.time.sec=1772854811,oob.time.usec=824919,")
    for line, start, zoned in (
        # the packet's own time is of no zone, where the line's is civil time
        ("timestamp=2026/03/07-11:40:12," + stamped, AT + 824_919_000, True),
        (stamped, AT + 824_919_000, True),
        ("timestamp=2026/03/07-03:40:11," + PACKET.format(time=""), AT, False),
        (stamped[: stamped.index(",ip.saddr.str")], AT + 824_919_000, True),  # without IP2STR
    ):
        seen = only(tmp_path, line)
        assert (seen.src, seen.dst, seen.proto, seen.rule, seen.bytes_out) == (HERE, THERE, "tcp", "drop, all", 52)
        assert (seen.time.start_ns, seen.time.zoned, seen.action) == (start, zoned, Action.DENIED)


@pytest.mark.parametrize(
    ("rest", "begin", "end"),
    [
        ("ct.event=1,flow.start.sec=1772854811,flow.start.usec=5,", 5_000, 6_000),
        ("ct.event=4,flow.start.sec=1772854811,flow.start.usec=5,flow.end.sec=1772854814,", 5_000, 3 * SECOND + 1_000),
    ],
)
def test_connections_as_gprint_and_json_write_them(tmp_path: Path, rest: str, begin: int, end: int) -> None:
    """The line's own time is civil time of a zone that it does not say: hours from when it was."""
    line = FLOW.format(rest=rest)
    pairs = {
        key: int(value) if value.isdigit() else value for key, value in (each.split("=") for each in line.split(","))
    }
    pairs |= {"timestamp": "2026-03-07T11:40:14", "src_ip": "10.0.0.5", "dest_ip": "198.51.100.7"}
    for written in (line, json.dumps(pairs)):
        seen = only(tmp_path, written)
        assert (seen.src, seen.dst, seen.translated_src, seen.proto) == (HERE, THERE, ("203.0.113.9", 61000), "tcp")
        assert (seen.bytes_out, seen.bytes_in, seen.informational) == (273, 164, True)
        assert (seen.time.start_ns - AT, seen.time.end_ns - AT, seen.time.zoned) == (begin, end, True)


def test_connections_as_text(tmp_path: Path) -> None:
    seen = only(
        tmp_path,
        "Mar  7 03:40:11 gw [NEW] ORIG: SRC=10.0.0.5 DST=198.51.100.7 PROTO=TCP SPT=44318 DPT=22 PKTS=0 BYTES=0 , "
        "REPLY: SRC=198.51.100.7 DST=203.0.113.9 PROTO=TCP SPT=22 DPT=61000 PKTS=0 BYTES=0 ",
    )
    assert (seen.src, seen.dst, seen.translated_src, seen.node) == (HERE, THERE, ("203.0.113.9", 61000), "gw")
    assert (seen.proto, seen.informational, seen.time.dated) == ("tcp", True, False)


# ── fast.log ──────────────────────────────────────────────────────────────────────────────────────────────────

OLD, NEW = "03/07/26-03:40:11.123456  [**] ", "03/07/2026-03:40:11.123456  [**] "
BODY = "[1:9000001:4] own [rule] {TCP} 1.1.1.1:1 -> 2.2.2.2:2 "
BOTH = "10.0.0.5:44318 -> 198.51.100.7:22"
HERE_ALONE, THERE_ALONE = Endpoint("10.0.0.5"), Endpoint("198.51.100.7")
WIDE = "2001:0db8:0000:0000:0000:0000:0000:0005:44318 -> 2001:db8::7:53"


@pytest.mark.parametrize(
    ("before", "after", "src", "dst", "proto"),
    [
        (NEW, "[**] [Classification: Misc activity] [Priority: 3] {TCP} " + BOTH, HERE, THERE, "tcp"),
        (OLD, "[**] [Classification: (null)] [Priority: 3] {TCP} " + BOTH, HERE, THERE, "tcp"),
        (NEW, "[**] [Priority: 3] {UDP} " + WIDE, Endpoint("2001:db8::5", 44318), Endpoint("2001:db8::7", 53), "udp"),
        # type and code in the ports' place
        (NEW, "[**] [Priority: 3] {ICMP} 10.0.0.5:8 -> 198.51.100.7:0", HERE_ALONE, THERE_ALONE, "icmp"),
        (NEW, "[**] [Priority: 3] {IPv6-ICMP} fe80::1 -> ff02::2", Endpoint("fe80::1"), Endpoint("ff02::2"), "icmp6"),
        (NEW, "[**] [Priority: 3] {PROTO:047} 10.0.0.5:0 -> 198.51.100.7:0", HERE_ALONE, THERE_ALONE, "gre"),
        ("2026-03-07T03:40:11.123456 gw suricata[9]: ", "[Priority: 3] {TCP} " + BOTH, HERE, THERE, "tcp"),
    ],
)
def test_alerts_of_fast_log(tmp_path: Path, before: str, after: str, src: Endpoint, dst: Endpoint, proto: str) -> None:
    seen = only(tmp_path, before + BODY + after)
    assert (seen.src, seen.dst, seen.proto) == (src, dst, proto)
    assert (seen.rule, seen.signature, seen.severity) == ("9000001", BODY[14:-1], "3")
    assert (seen.time.start_ns, seen.time.zoned, seen.action) == (AT + 123_456_000, False, Action.ALLOWED)
    assert seen.node == ("gw" if " gw " in before else "")


@pytest.mark.parametrize(("said", "action"), [("[Drop] ", Action.DENIED), ("[wDrop] ", Action.ALLOWED)])
def test_what_fast_log_says_was_done(tmp_path: Path, said: str, action: Action) -> None:
    rest = "[1:9000001:4] m [**] [Priority: 1] {TCP} " + BOTH
    assert only(tmp_path, f"03/07/2026-03:40:11.1  {said}[**] {rest}").action is action
    seen = only(tmp_path, f"03/07-03:40:11.123456 {said}[**] {rest}")  # Snort's, which leaves the year out
    assert (seen.action, seen.time.dated, seen.src) == (action, False, HERE)
    assert only(tmp_path, f"Mar  7 03:40:11 gw snort: {said}{rest}").node == "gw"


def test_a_dropped_packet_of_suricatas_is_no_ordinary_one(tmp_path: Path) -> None:
    seen = only(tmp_path, "03/07/2026-03:40:11.5: " + DENY.removeprefix("DENY: "))
    assert (seen.rule, seen.action, seen.time.start_ns) == ("drop", Action.DENIED, AT + SECOND // 2)


def test_an_alert_of_no_flow_is_quarantined(tmp_path: Path) -> None:
    seen, report = of(tmp_path, NEW + "[1:2:3] m [**] [Priority: 3] [**] [Raw pkt: 45 00 00 28]")
    assert (seen, report.quarantined) == ([], {"fields": 1})


# ── what is not read, and says so ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("===>PACKET BOUNDARY", "OPRINT"),
        ("ip.saddr.str=10.0.0.5", "OPRINT"),
        ('<flow><meta direction="original"><layer3 protonum="2">', "XML"),
        ("1772854811\t6\t10.0.0.5\t44318\t198.51.100.7\t22\t3\t164", "NACCT"),
        (
            "[1772854811.1]\t[NEW] tcp 6 120 src=10.0.0.5 dst=198.51.100.7 [UNREPLIED] src=1.1.1.1 dst=2.2.2.2",
            "--nat",
        ),
        ("03/07/2026-03:40:11.1 a.example [**] / [**] curl [**] 10.0.0.5:44318 -> 198.51.100.7:80", "eve.json"),
        ("03/07/2026-03:40:11.1 10.0.0.5:44318 -> 198.51.100.7:443  TLS: Subject='CN=a'", "eve.json"),
        ("__REALTIME_TIMESTAMP=1772854811000000", "-o export"),
        ("Mar  7 03:40:11 fw filterlog[9]: 5,,,1000000103,igb0,match,block,out,4", "pfSense"),
        ("Mar  7 03:40:11 asa %ASA-4-106023: Deny tcp src inside:10.0.0.5/1 dst outside:198.51.100.7/2", "Cisco"),
        ("CEF:0|Check Point|VPN-1|1|1|drop|5|src=10.0.0.5 dst=198.51.100.7", "another vendor"),
        ("PK\x03\x04\x14\0", "zip"),
        ("0123456789" * 20, "no format that is known"),
    ],
)
def test_what_is_of_no_format_is_named(tmp_path: Path, line: str, named: str) -> None:
    seen, report = of(tmp_path, line)
    assert (seen, report.quarantined) == ([], {"unknown": 1})
    assert named in report.first[0].detail


@settings(max_examples=300, deadline=None)
@given(line=st.text(alphabet='[]{}":,1a -', min_size=1, max_size=12).filter(lambda text: text.strip("[]{},: ")))
@pytest.mark.parametrize("around", ["%s", '{"message": %s}', '{"records": [%s]}'])
def test_no_line_is_lost_without_a_count(tmp_path_factory: pytest.TempPathFactory, around: str, line: str) -> None:
    content = around % (line if around == "%s" else json.dumps(line))
    seen, report = of(tmp_path_factory.getbasetemp(), f"first\n{content}\nlast")
    assert not seen
    assert report.quarantined.total() >= 3, (content, report.first)


# ── what disks, editors and archives do to a file ─────────────────────────────────────────────────────────────

LINES = [f"Mar  7 03:40:1{n} gw kernel: {DENY.replace('44318', str(44318 + n))}" for n in range(5)]


@pytest.mark.parametrize(
    "content",
    ["\r".join(LINES), "\r\n".join(LINES), f"{LINES[0]}\n{LINES[1]}\r{LINES[2]}\r\n{LINES[3]}\r\r\n\ufeff{LINES[4]}\r"],
)
def test_lines_end_as_they_do(tmp_path: Path, content: str) -> None:
    path = tmp_path / "log"
    path.write_bytes(raw := content.encode())
    report = FileReport(str(path))
    found = list(read(path, report))
    assert [each.seen.src.port for each in found] == [44318 + n for n in range(5)]
    assert not report.quarantined
    assert [raw[each.byte_offset :][: len(each.raw)] for each in found] == [each.raw for each in found]


def test_the_files_in_an_archive_follow_one_another(tmp_path: Path) -> None:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w:gz") as archive:
        for name, content in (
            ("logs/a.1.gz", gzip.compress("\n".join(LINES[:2]).encode())),
            ("logs/a", "\n".join(LINES[2:4]).encode()),
            ("logs/b", LINES[4].encode("utf-16")),
            ("logs/empty", b""),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        archive.addfile(tarfile.TarInfo("logs/c"))
    seen, report = of(tmp_path, whole.getvalue())
    assert [each.src.port for each in seen] == [44318 + n for n in range(5)]
    assert not report.quarantined
    plain = gzip.decompress(whole.getvalue())
    seen, report = of(tmp_path, plain + plain)
    assert (len(seen), report.quarantined) == (10, {})
    for damaged in (whole.getvalue()[:-8], plain[:5000].replace(b"logs/empty", b"logs/emptx"), plain + b"x" * 512):
        seen, report = of(tmp_path, damaged)
        assert (len(seen), report.quarantined) == (5, {"unreadable": 1})


@pytest.mark.parametrize(
    ("said", "address"),
    [
        ("10.0.0.5/32", "10.0.0.5"),
        ("10.0.0.5/24", "10.0.0.5"),  # as an interface has it
        ("10.0.0.0/24", None),
        ("2001:db8::5/128", "2001:db8::5"),
        ("2001:db8::/64", None),
        ("fe80::1%eth0", "fe80::1"),
        ("::ffff:10.0.0.5", "10.0.0.5"),
        ("10.0.0.5/99", None),
        ("node-3.example", None),
        ("010.0.0.5", None),
    ],
)
def test_addresses_however_they_are_written(tmp_path: Path, said: str, address: str | None) -> None:
    assert only(tmp_path, LINES[0].replace("10.0.0.5", said)).src.ip == address


@pytest.mark.parametrize(
    "line",
    [
        'date=2026-03-07 time=03:40:11 devname="fw" devid="F" eventtime=1772854811 tz="+0000" type="tra',
        '{"LogType": "TRAXFIC", "TimeGenerated": "2026-03-07T03:40:12Z", "SourceAddress": "10.0.0.5"}',
        "1,2026/03/07 03:40:11,0128,TRAXFIC,end,2049,2026/03/07 03:40:11,10.0.0.5,198.51.100.7",
        '{"records": [{"properties": {"flows": [{"rule": "r", "flows": [{"flowTuplXs": ["1,2"]}]}]}}]}',
        "the srcaddr, its dstaddr (and start) were the same as before",
        '{"records": [1]}',
        '{"message": "[ 1.2] x"}',
        "[  307.757925] usb 1-1: new device",
    ],
)
def test_what_is_cut_or_damaged_is_counted(tmp_path: Path, line: str) -> None:
    seen, report = of(tmp_path, line)
    assert (seen, report.quarantined.total()) == ([], 1)
