"""Layouts in which products really write, beyond the plain line of each: headers, transports, versions, quoting.

The lines are ours; each reproduces a trap that samples of other projects, with expectations of their own, were read
wrongly in. What is expected is what those say, or the product's documentation.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ray_guard.attribution.observation import Action, Endpoint, Observation, Semantics
from ray_guard.attribution.sources.reader import FileReport, Record, read
from ray_guard.attribution.times import iso

AT = iso("2026-03-07T03:40:11Z", Semantics.PACKET).start_ns
SECOND = 1_000_000_000
HERE, THERE = Endpoint("10.0.0.5", 44318), Endpoint("198.51.100.7", 22)


def records(tmp_path: Path, content: str) -> tuple[list[Record], FileReport]:
    path = tmp_path / "log"
    path.write_text(content)
    report = FileReport(str(path))
    return list(read(path, report)), report


def only(tmp_path: Path, content: str, kind: str) -> Observation:
    found, report = records(tmp_path, content)
    assert not report.quarantined, report.first
    (record,) = found
    assert record.format == kind
    return record.seen


# ── nftables ──────────────────────────────────────────────────────────────────────────────────────────────────

PACKET = (
    "IN=eth0 OUT= MAC=02:00:00:00:00:01:02:00:00:00:00:02:08:00 SRC=10.0.0.5 DST=198.51.100.7 LEN=52 TOS=0x00 "
    "PREC=0x00 TTL=63 ID=0 DF PROTO=TCP SPT=44318 DPT=22 WINDOW=2853 RES=0x00 ACK URGP=0"
)


@pytest.mark.parametrize(
    ("before", "node", "rule", "action"),
    [
        ("Mar  7 03:40:11 gw kernel: [wan-out-default-D]", "gw", "[wan-out-default-D]", Action.DENIED),
        ("Mar  7 03:40:11 gw kernel: [LAN-20-A]", "gw", "[LAN-20-A]", Action.ALLOWED),
        ("Mar  7 03:40:11 gw kernel: [WAN_OUT-2000-R]", "gw", "[WAN_OUT-2000-R]", Action.DENIED),
        ("<6>2026-03-07T03:40:11Z gw kernel: DROPPED", "gw", "DROPPED", Action.DENIED),
        ("Mar  7 03:40:11 DENY: ", "", "DENY", Action.DENIED),
        ("Mar  7 03:40:11 gw [EGRESS-7-A] ", "gw", "[EGRESS-7-A]", Action.ALLOWED),
        ("Mar  7 03:40:11 gw user.info kernel: [  307.757925] seen ", "gw", "seen", Action.UNKNOWN),
    ],
)
def test_a_prefix_need_not_be_parted_from_the_packet(
    tmp_path: Path, before: str, node: str, rule: str, action: Action
) -> None:
    seen = only(tmp_path, before + PACKET, "nftables")
    assert (seen.src, seen.dst, seen.proto) == (HERE, THERE, "tcp")
    assert (seen.node, seen.rule, seen.action) == (node, rule, action)


def test_the_packet_that_an_icmp_error_quotes_is_not_the_packet(tmp_path: Path) -> None:
    seen = only(
        tmp_path,
        "Mar  7 03:40:11 gw kernel: IN=eth0 OUT= SRC=10.0.0.5 DST=198.51.100.7 LEN=88 TTL=118 ID=2 PROTO=ICMP TYPE=3 "
        "CODE=3 [SRC=198.51.100.7 DST=192.0.2.9 LEN=60 TTL=54 ID=0 DF PROTO=UDP SPT=21458 DPT=62936 LEN=40 ]",
        "nftables",
    )
    assert (seen.src, seen.dst, seen.proto) == (("10.0.0.5", None), ("198.51.100.7", None), "icmp")
    assert seen.bytes_out == 88


def test_the_length_is_the_packets_not_the_datagrams(tmp_path: Path) -> None:
    line = "Mar  7 03:40:11 gw kernel: IN= OUT=eth0 SRC=10.0.0.5 DST=198.51.100.7 LEN=540 PROTO=UDP SPT=5 DPT=6 LEN=520"
    assert only(tmp_path, line, "nftables").bytes_out == 540


@pytest.mark.parametrize(
    ("envelope", "semantics", "width"),
    [
        ({"__REALTIME_TIMESTAMP": "1772854811123456", "_HOSTNAME": "gw"}, Semantics.PACKET, 1_000),
        ({"_SOURCE_REALTIME_TIMESTAMP": "1772854811123456", "_HOSTNAME": "gw"}, Semantics.PACKET, 1_000),
        ({"@timestamp": "2026-03-07T03:40:11.123Z", "host": {"hostname": "gw"}}, Semantics.INGEST, 1_000_000),
    ],
)
def test_a_packet_out_of_the_journal_has_the_journals_time(
    tmp_path: Path, envelope: dict[str, object], semantics: Semantics, width: int
) -> None:
    key = "message" if "@timestamp" in envelope else "MESSAGE"
    seen = only(tmp_path, json.dumps(envelope | {key: "EGRESS-DENY: " + PACKET}), "nftables")
    assert (seen.node, seen.rule, seen.src) == ("gw", "EGRESS-DENY", HERE)
    assert (seen.time.start_ns // 1_000_000, seen.time.semantics) == (AT // 1_000_000 + 123, semantics)
    assert seen.time.end_ns - seen.time.start_ns == width
    assert seen.time.zoned
    assert seen.time.dated


# ── AWS ───────────────────────────────────────────────────────────────────────────────────────────────────────

VPC = "123456789010 eni-1 10.0.0.5 198.51.100.7 44318 22 6 1 44 1772854811 1772854869 REJECT OK"
LATER = " vpc-1 subnet-1 i-1 2 IPv4 10.0.0.9 198.51.100.8 eu-west-1 euw1-az2 - - - - egress 8"


@pytest.mark.parametrize(
    ("line", "src", "node"),
    [
        ("2 " + VPC, "10.0.0.5", ""),
        ("5 " + VPC + LATER, "10.0.0.9", "i-1"),
        ("8 " + VPC + LATER + " - - - - - - - - - - BPA", "10.0.0.9", "i-1"),
    ],
)
def test_flow_logs_without_a_header_have_amazons_order(tmp_path: Path, line: str, src: str, node: str) -> None:
    seen = only(tmp_path, line, "aws-vpc")
    assert (seen.src, seen.dst.port, seen.node) == ((src, 44318), 22, node)
    assert (seen.action, seen.bytes_out) == (Action.DENIED, 44)


def test_flow_logs_by_way_of_firehose_are_objects(tmp_path: Path) -> None:
    row = {"version": 5, "account_id": "1", "interface_id": "eni-1", "srcaddr": "10.0.0.5", "dstaddr": "198.51.100.7"}
    row |= {
        "srcport": 44318.0,
        "dstport": 22.0,
        "protocol": 6.0,
        "bytes": 412.0,
        "start": 1772854811,
        "end": 1772854869,
    }
    row |= {
        "action": "REJECT",
        "log_status": "OK",
        "instance_id": "-",
        "flow_direction": "ingress",
        "traffic_path": None,
    }
    seen = only(tmp_path, json.dumps(row), "aws-vpc")
    assert (seen.src, seen.dst, seen.proto, seen.action) == (HERE, THERE, "tcp", Action.DENIED)
    assert (seen.bytes_out, seen.node) == (412, "")
    assert records(tmp_path, json.dumps(row | {"log_status": "NODATA"}))[0] == []


def test_a_header_within_a_file_changes_the_columns(tmp_path: Path) -> None:
    found, report = records(
        tmp_path,
        "srcaddr dstaddr start end\n10.0.0.5 198.51.100.7 1772854811 1772854869\n"
        "start end dstaddr srcaddr action\n1772854811 1772854869 198.51.100.7 10.0.0.5 REJECT\n2 " + VPC,
    )
    assert not report.quarantined, report.first
    assert [each.seen.src.ip for each in found] == ["10.0.0.5"] * 3


# ── Suricata ──────────────────────────────────────────────────────────────────────────────────────────────────

EVE = {"timestamp": "2026-03-07T03:40:30.5+0000", "flow_id": 7, "src_ip": "10.0.0.5", "src_port": 44318, "proto": "TCP"}
EVE |= {"dest_ip": "198.51.100.7", "dest_port": 22}


def test_a_netflow_is_as_long_as_it_says_and_of_one_direction(tmp_path: Path) -> None:
    spent = {"pkts": 1, "bytes": 40, "start": "2026-03-07T03:40:11.0+0000", "end": "2026-03-07T03:40:12.0+0000"}
    seen = only(tmp_path, json.dumps(EVE | {"event_type": "netflow", "netflow": spent}), "suricata")
    assert (seen.time.start_ns - AT, seen.time.semantics, seen.bytes_out) == (0, Semantics.FLOW, 40)


def test_an_alert_without_its_type(tmp_path: Path) -> None:
    alert = {"action": "allowed", "signature_id": 2011540, "signature": "POLICY demo CA", "severity": 3}
    seen = only(tmp_path, json.dumps(EVE | {"alert": alert}), "suricata")
    assert (seen.src, seen.rule, seen.action) == (HERE, "2011540", Action.ALLOWED)


# ── Zeek ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_zeeks_fields_change_within_a_file_and_so_does_the_separator(tmp_path: Path) -> None:
    found, report = records(
        tmp_path,
        "#separator \\x09\n#fields\tts\tuid\tid.orig_h\tid.orig_p\tid.resp_h\tid.resp_p\tproto\n"
        "1772854811.000000\tC1\t10.0.0.5\t44318\t198.51.100.7\t22\ttcp\n#close\t2026-03-07-03-41-00\n"
        "#separator \\x2c\n#fields,id.resp_h,id.resp_p,id.orig_h,id.orig_p,ts\n"
        "198.51.100.7,22,10.0.0.5,44318,2026-03-07T03:40:11.000000Z\n",
    )
    assert not report.quarantined, report.first
    assert [(each.seen.src, each.seen.dst) for each in found] == [(HERE, THERE)] * 2
    assert [each.seen.time.start_ns for each in found] == [AT] * 2


def test_columns_that_are_no_zeek_log_leave_lines_to_their_own_format(tmp_path: Path) -> None:
    found, _ = records(tmp_path, "#fields\nMar  7 03:40:11 gw kernel: " + PACKET + "\n")
    assert [each.format for each in found] == ["nftables"]


# ── FortiGate ─────────────────────────────────────────────────────────────────────────────────────────────────

CEF = (
    "CEF:0|Fortinet|Fortigate|v7.4.9|00013|traffic:forward deny|3|deviceExternalId=FGVM1 FTNTFGTeventtime="
    "1772854811123456789 FTNTFGTtz=+0100 FTNTFGTlogid=0000000013 cat=traffic:forward FTNTFGTsubtype=forward "
    "src=10.0.0.5 spt=44318 dst=198.51.100.7 dpt=22 externalId=1234 proto=6 act=deny FTNTFGTpolicyid=859 "
    "FTNTFGTpolicyname=No way out app=TCP_22 FTNTFGTtrandisp=snat sourceTranslatedAddress=203.0.113.9 "
    "sourceTranslatedPort=61000 FTNTFGTduration=7 out=1504 in=2647 FTNTFGTcat=26 dvchost=fw-2"
)


@pytest.mark.parametrize(
    "line",
    [
        CEF,
        "Mar  7 03:40:12 fw-2 " + CEF,
        CEF.removeprefix("CEF:"),
        CEF.replace("FTNTFGT", "FortinetFortiGate"),
        CEF.replace("FTNTFGT", "ad.").replace("cat=traffic:forward", "cat=traffic"),
        CEF.replace("cat=traffic:forward ", ""),
    ],
)
def test_fortigate_as_cef(tmp_path: Path, line: str) -> None:
    seen = only(tmp_path, line, "fortigate")
    assert (seen.src, seen.dst, seen.proto, seen.action) == (HERE, THERE, "tcp", Action.DENIED)
    assert (seen.translated_src, seen.rule, seen.flow_id) == (("203.0.113.9", 61000), "859", "1234")
    assert (seen.node, seen.bytes_out, seen.bytes_in) == ("fw-2", 1504, 2647)
    assert (seen.time.start_ns - AT, seen.time.semantics) == (-7 * SECOND + 123_456_789, Semantics.FLOW)


def test_cef_without_an_event_time_says_it_otherwise(tmp_path: Path) -> None:
    line = CEF.replace("FTNTFGTeventtime=1772854811123456789 FTNTFGTtz", "start=Mar 07 2026 04:40:11 tz")
    seen = only(tmp_path, line.replace("FTNTFGTduration=7 ", ""), "fortigate")
    assert (seen.time.start_ns, seen.time.end_ns) == (AT, AT + SECOND)
    found, report = records(tmp_path, line.replace("start=Mar 07 2026 04:40:11", ""))
    assert found == []
    assert report.quarantined == {"time": 1}


def test_fortigate_parted_by_commas(tmp_path: Path) -> None:
    line = (
        'date=2026-03-07,time=04:40:11,devname="fw, 2",eventtime=1772854811,tz="+0100",logid="13",type="traffic",'
        "srcip=10.0.0.5,srcport=44318,dstip=198.51.100.7,dstport=22,proto=6,action=deny,policyid=12"
    )
    for written in (line, line.replace("eventtime=1772854811,", "")):
        seen = only(tmp_path, written, "fortigate")
        assert (seen.src, seen.dst, seen.action, seen.rule, seen.node) == (HERE, THERE, Action.DENIED, "12", "fw, 2")
        assert (seen.time.start_ns, seen.time.zoned) == (AT, True)


def test_a_connection_that_nobody_answered_was_not_refused(tmp_path: Path) -> None:
    line = (
        'date=2026-03-07 time=03:40:11 devid="F" type="traffic" subtype="forward" srcip=10.0.0.5 srcport=44318 '
        'dstip=198.51.100.7 dstport=22 proto=6 action="ip-conn" policyid=1'
    )
    assert only(tmp_path, line, "fortigate").informational


# ── PAN-OS ────────────────────────────────────────────────────────────────────────────────────────────────────

HEAD = "1,2026/03/07 03:40:11,0128,{},2049,2026/03/07 03:40:11,10.0.0.5,198.51.100.7,0.0.0.0,0.0.0.0,No way out,,,ssl,"
MIDDLE = "vsys1,trust,untrust,e1/2,e1/1,fwd,2026/03/07 03:40:11,22751,1,44318,22,0,0,0x400053,tcp,"


def test_a_url_with_commas_is_one_field(tmp_path: Path) -> None:
    line = (
        HEAD.format("THREAT,url") + MIDDLE + 'block-url,"pool.example:8443/a,b",(9999),mining,informational,'
        "client-to-server,42,0x0,10.0.0.0-10.255.255.255,US,,text/html,0,,,2,curl,,,,,,,0,0,0,0,0,,fw-1,,,,,0,,0,"
        "2026-03-07T03:40:11.730+00:00"
    )
    seen = only(tmp_path, line, "panos")
    assert (seen.host, seen.signature, seen.severity, seen.rule) == (
        "pool.example",
        "(9999)",
        "informational",
        "No way out",
    )
    assert (seen.action, seen.src, seen.dst) == (Action.DENIED, HERE, THERE)
    # The precise field lies within the second that the other one cut its digits off from.
    assert (seen.time.start_ns - AT, seen.time.end_ns - AT, seen.time.zoned) == (0, SECOND, True)


def test_the_precise_time_may_be_later_than_the_record(tmp_path: Path) -> None:
    line = HEAD.format("TRAFFIC,end") + MIDDLE + "allow,9,5,4,2,2026/03/07 03:40:01,10,any,0,1,0x0,a,b,0,1,1,aged-out"
    late = line + ",2026-03-07T03:40:12.547+00:00"
    assert only(tmp_path, late, "panos").time.end_ns == AT + SECOND + 548_000_000
    unset = line + ",2026-03-07T03:40:11.5+00:00,1969-12-31T16:00:00.000-08:00"
    assert only(tmp_path, unset, "panos").time.start_ns == AT - 10 * SECOND
    unset = line + ",1969-12-31T16:00:00.000-08:00"
    assert only(tmp_path, unset, "panos").time.start_ns == AT - 10 * SECOND + 8 * 3600 * SECOND


def test_a_record_without_a_begin_still_has_a_time(tmp_path: Path) -> None:
    line = HEAD.format("TRAFFIC,end") + MIDDLE + "allow,9,5,4,2,,10,any,0,1,0x0,a,b,0,1,1,aged-out"
    time = only(tmp_path, line, "panos").time
    assert (time.start_ns, time.semantics) == (AT, Semantics.END)


CLOUD = {
    "LogType": "TRAFFIC",
    "Subtype": "end",
    "TimeReceived": "2026-03-07T03:40:40.000000Z",
    "TimeGenerated": "2026-03-07T03:40:12.000000Z",
    "SessionStartTime": "2026-03-07T03:40:01.000000Z",
    "SessionDuration": 10,
    "SourceAddress": "10.0.0.5",
    "SourcePort": 44318,
    "DestinationAddress": "198.51.100.7",
    "DestinationPort": 22,
    "NATSource": "203.0.113.9",
    "NATSourcePort": 61000,
    "NATDestination": "",
    "NATDestinationPort": 0,
    "Protocol": "tcp",
    "Action": "reset-both",
    "Rule": "No way out",
    "BytesSent": 1758,
    "BytesReceived": 5976,
    "DeviceName": "fw-1",
}
SERVICE = (
    "CEF:0|Palo Alto Networks|LF|2.0|TRAFFIC|end|3|dtz=UTC rt=Mar 07 2026 03:40:40 PanOSIsNAT=true suser=an n "
    "start=Mar 07 2026 03:40:12 src=10.0.0.5 dst=198.51.100.7 sourceTranslatedAddress=203.0.113.9 cs1=No way out "
    "cs1Label=Rule spt=44318 dpt=22 sourceTranslatedPort=61000 proto=tcp act=reset-both out=5976 in=1758 "
    "PanOSSessionStartTime=Mar 07 2026 03:40:01 cn3=10 cn3Label=SessionDuration dvchost=fw-1"
)


@pytest.mark.parametrize(
    "line",
    [
        json.dumps(CLOUD),
        SERVICE,
        SERVICE.replace("LF|2.0|TRAFFIC|end", "PAN-OS|11.1.0|end|TRAFFIC"),
        SERVICE.replace("PanOSSessionStartTime=Mar 07 2026 03:40:01 ", "").replace("cn3=10", "cn3=11"),
    ],
)
def test_what_palo_altos_forwarding_makes_of_a_record(tmp_path: Path, line: str) -> None:
    seen = only(tmp_path, line, "panos")
    assert (seen.src, seen.dst, seen.proto, seen.action) == (HERE, THERE, "tcp", Action.DENIED)
    assert (seen.translated_src, seen.rule, seen.node) == (("203.0.113.9", 61000), "No way out", "fw-1")
    assert (seen.bytes_out, seen.bytes_in) == (1758, 5976)
    assert (seen.time.start_ns // SECOND, seen.time.zoned) == (AT // SECOND - 10, True)
    assert (seen.time.end_ns + 1) // SECOND == AT // SECOND + 2 or seen.time.end_ns == AT + SECOND + 1_000


def test_a_threat_of_the_log_service(tmp_path: Path) -> None:
    threat = {key: CLOUD[key] for key in CLOUD if not key.startswith(("Bytes", "Session"))}
    threat |= {
        "LogType": "THREAT",
        "Subtype": "url",
        "URLDomain": "pool.example",
        "ThreatID": "Miner(1)",
        "Action": "alert",
    }
    seen = only(tmp_path, json.dumps(threat), "panos")
    assert (seen.action, seen.signature, seen.host) == (Action.ALLOWED, "Miner(1)", "pool.example")
    assert records(tmp_path, json.dumps(CLOUD | {"LogType": "SYSTEM"}))[0] == []


# ── Falco, Tetragon, Hubble ───────────────────────────────────────────────────────────────────────────────────

SAID = (
    "Notice Unexpected connection (connection=10.0.0.5:44318->198.51.100.7:22 lport=44318 user=root process=ssh "
    "command=ssh -fNR 2222:localhost:22 mallory@198.51.100.7 (x) terminal=0 container_id=abc container_name=<NA>)"
)


@pytest.mark.parametrize(
    ("before", "zoned", "dated"),
    [
        ("2026-03-07T03:40:11.123456789+0000: ", True, True),
        ("2026-03-07T03:40:12Z node-3 falco[9]: 03:40:11.123456789: ", False, True),
        ("Mar  7 03:40:11 node-3 falco: 03:40:11.123456789: ", False, False),
    ],
)
def test_falco_as_text(tmp_path: Path, before: str, zoned: bool, dated: bool) -> None:
    seen = only(tmp_path, before + SAID, "falco")
    assert (seen.src, seen.dst, seen.severity, seen.rule) == (HERE, THERE, "Notice", "Unexpected connection")
    assert seen.process.command == "ssh -fNR 2222:localhost:22 mallory@198.51.100.7 (x)"
    assert (seen.process.executable, seen.process.container, seen.process.user) == ("ssh", "abc", "root")
    assert (seen.time.zoned, seen.time.dated) == (zoned, dated)
    if dated:
        assert seen.time.start_ns == AT + 123_456_789


def test_falcos_time_of_day_alone_is_no_time(tmp_path: Path) -> None:
    found, report = records(tmp_path, "03:40:11.123456789: " + SAID)
    assert found == []
    assert "time_format_iso_8601" in report.first[0].detail


PROCESS = {"exec_id": "bm9kZTox", "pid": 3120, "binary": "/usr/bin/ssh", "arguments": "-fN 198.51.100.7"}


@pytest.mark.parametrize(
    ("kind", "event", "src", "dst"),
    [
        (
            "process_connect",
            {"source_ip": "10.0.0.5", "source_port": 44318, "destination_ip": "198.51.100.7", "destination_port": 22},
            HERE,
            THERE,
        ),
        ("process_listen", {"ip": "10.0.0.5", "port": 44318, "protocol": "TCP"}, HERE, (None, None)),
        ("process_exit", {"signal": "SIGTERM"}, (None, None), (None, None)),
        ("process_lsm", {"args": [{"sockaddr_arg": {"addr": "198.51.100.7", "port": 22}}]}, (None, None), THERE),
        ("process_tracepoint", {"args": [{"syscall_id": {"id": 42, "abi": "x64"}}]}, (None, None), (None, None)),
    ],
)
def test_tetragons_other_events(
    tmp_path: Path, kind: str, event: dict[str, object], src: Endpoint, dst: Endpoint
) -> None:
    line = {kind: {"process": PROCESS, **event}, "node_name": "node-3", "time": "2026-03-07T03:40:11.5Z"}
    seen = only(tmp_path, json.dumps(line), "tetragon")
    assert (seen.src, seen.dst, seen.node) == (src, dst, "node-3")
    assert (seen.process.pid, seen.process.command) == (3120, "/usr/bin/ssh -fN 198.51.100.7")


def test_hubble_of_the_seventh_layer(tmp_path: Path) -> None:
    flow = {"time": "2026-03-07T03:40:11.5Z", "verdict": "DROPPED", "type": "L7", "node_name": "node-3"}
    flow |= {"IP": {"source": "10.0.0.5", "destination": "198.51.100.7"}}
    flow |= {"l4": {"TCP": {"source_port": 44318, "destination_port": 22}}}
    flow |= {"l7": {"type": "REQUEST", "http": {"method": "GET", "url": "http://pool.example:8080/x"}}}
    seen = only(tmp_path, json.dumps({"flow": flow}), "hubble")
    assert (seen.src, seen.dst, seen.host, seen.action) == (HERE, THERE, "pool.example", Action.DENIED)


# ── Azure, Google ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_first_version_of_azures_tuples_has_eight_fields(tmp_path: Path) -> None:
    tuples = [{"rule": "DenyAll", "flows": [{"flowTuples": ["1772854811,10.0.0.5,198.51.100.7,44318,22,T,O,D"]}]}]
    seen = only(tmp_path, json.dumps({"time": "x", "properties": {"Version": 1, "flows": tuples}}), "azure-flow")
    assert (seen.src, seen.dst, seen.action, seen.rule) == (HERE, THERE, Action.DENIED, "DenyAll")


def test_googles_array_of_entries(tmp_path: Path) -> None:
    connection = {"src_ip": "10.0.0.5", "src_port": 44318, "dest_ip": "198.51.100.7", "dest_port": 22, "protocol": 6}
    payload = {"connection": connection, "disposition": "DENIED"}
    entries = [{"insertId": name, "timestamp": "2026-03-07T03:40:11.5Z", "jsonPayload": payload} for name in "ab"]
    found, report = records(tmp_path, json.dumps(entries, indent=2))
    assert not report.quarantined
    assert [(each.format, each.seen.src, each.record) for each in found] == [("gcp-vpc", HERE, 0), ("gcp-vpc", HERE, 1)]


# ── what was read wrongly, or not at all, before ──────────────────────────────────────────────────────────────

OUT = PACKET + " UID=1000"


@pytest.mark.parametrize(
    ("line", "node", "rule"),
    [
        ("Sat 2026-03-07 03:40:11 UTC gw kernel: DENY: " + OUT, "gw", "DENY"),  # journalctl -o short-full
        ("1772854811.000000 gw kernel: DENY: " + OUT, "gw", "DENY"),  # … short-unix
        ("[Sat Mar  7 03:40:11 2026] DENY: " + OUT, "", "DENY"),  # dmesg -T
        ("2026-03-07T03:40:11,000000+00:00 DENY " + OUT, "", "DENY"),  # dmesg --time-format iso
        ("Sat Mar  7 03:40:11 2026 kern.warn kernel: [   12.345678] DENY: " + OUT, "", "DENY"),  # OpenWrt's logread
        ("Sat Mar  7 03:40:11 2026 [1772854811.123] kern.warn kernel: DENY: " + OUT, "", "DENY"),
        ("Mar  7 2026 03:40:11 gw kernel: DENY: " + OUT, "gw", "DENY"),
        ('<4>1 2026-03-07T03:40:11+00:00 gw kernel - - [meta sequenceId="9"] \ufeffDENY: ' + OUT, "gw", "DENY"),
        ("2026-03-07T03:40:11Z fd00::1 kernel: DENY: " + OUT, "fd00::1", "DENY"),
        ("2026-03-07T03:41:00.5Z stdout F 2026-03-07T03:40:11Z gw kernel: DENY: " + OUT, "gw", "DENY"),
        ("2026-03-07T03:40:11Z gw kernel: message repeated 2 times: [ [1.2] DENY: " + OUT + "]", "gw", "DENY"),
        ("2026-03-07T03:40:11Z gw kernel: DENY IN=a OUT=b SRC=9.9.9.9 " + OUT, "gw", "DENY IN=a OUT=b SRC=9.9.9.9"),
        ("2026-03-07T03:40:11Z gw kernel: DENY: " + OUT + "\0", "gw", "DENY"),
    ],
)
def test_headers_of_everybody_who_writes_kernel_lines(tmp_path: Path, line: str, node: str, rule: str) -> None:
    seen = only(tmp_path, line, "nftables")
    assert (seen.src, seen.dst, seen.node, seen.rule, seen.action) == (HERE, THERE, node, rule, Action.DENIED)
    assert (seen.time.start_ns, seen.process.user) == (AT, "1000" if not line.endswith("]") else "1000]")


def test_a_byte_that_is_no_utf8_costs_no_record(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"2026-03-07T03:40:11Z gw kernel: DENY M\xfcnchen: " + PACKET.encode())
    (record,) = read(path, FileReport(str(path)))
    assert (record.seen.src, record.seen.rule) == (HERE, "DENY M\ufffdnchen")


def test_tracing_is_no_objection(tmp_path: Path) -> None:
    assert only(tmp_path, "2026-03-07T03:40:11Z gw kernel: TRACE: raw:OUTPUT:rule:2 " + OUT, "nftables").informational


ULOGD = {"timestamp": "2026-03-07T03:40:11.5+0000", "dvc": "gw", "src_ip": "10.0.0.5", "src_port": 44318}
ULOGD |= {"dest_ip": "198.51.100.7", "dest_port": 22}


def test_what_ulogd_says_of_a_label_and_of_connections(tmp_path: Path) -> None:
    packet = ULOGD | {"oob.prefix": "seen", "ip6.nexthdr": 6, "action": "blocked"}
    seen = only(tmp_path, json.dumps(packet), "nftables")
    assert (seen.proto, seen.action, seen.node) == ("tcp", Action.DENIED, "gw")
    flow = ULOGD | {"orig.ip.protocol": 6, "reply.ip.saddr.str": "198.51.100.7", "reply.l4.sport": 22}
    flow |= {"reply.ip.daddr.str": "203.0.113.9", "reply.l4.dport": 61000, "flow.start.sec": AT // SECOND - 4}
    seen = only(tmp_path, json.dumps(flow), "nftables")
    assert (seen.src, seen.dst, seen.translated_src, seen.proto) == (HERE, THERE, ("203.0.113.9", 61000), "tcp")
    assert (seen.time.start_ns - AT, seen.time.semantics) == (-4 * SECOND, Semantics.FLOW)


@pytest.mark.parametrize(
    ("said", "host", "action"),
    [
        ({"event_type": "flow", "flow": {"action": "drop"}}, "", Action.DENIED),
        ({"event_type": "dns", "dns": {"queries": [{"rrname": "a.example"}]}}, "a.example", Action.UNKNOWN),
        ({"event_type": "http", "http": {"hostname": "a.example:8080"}}, "a.example", Action.UNKNOWN),
        ({"event_type": "alert", "verdict": {"action": "reject"}}, "", Action.DENIED),
    ],
)
def test_eve_of_later_releases(tmp_path: Path, said: dict[str, object], host: str, action: Action) -> None:
    seen = only(tmp_path, json.dumps(EVE | said), "suricata")
    assert (seen.host, seen.action) == (host, action)


ZEEK = {"ts": 1772854811.0, "id.orig_h": "10.0.0.5", "id.orig_p": 44318, "id.resp_h": "198.51.100.7", "id.resp_p": 22}


@pytest.mark.parametrize(
    ("line", "src", "host", "rule"),
    [
        (ZEEK | {"_path": "intel", "seen.indicator": "a.example"}, HERE, "", "intel a.example"),
        (ZEEK | {"ts": 1772854811000, "host": "a.example:80"}, HERE, "a.example", ""),
        (
            {"ts": "2026-03-07T03:40:11.000000Z", "note": "Signatures::Sensitive_Signature", "event_msg": "m"}
            | {"src_addr": "10.0.0.5", "src_port": 44318, "dst_addr": "198.51.100.7", "dst_port": 22},
            HERE,
            "",
            "Signatures::Sensitive_Signature",
        ),
        ({"_path": "stats", "ts": 1772854811.0, "peer": "zeek"}, (None, None), "", ""),
    ],
)
def test_zeeks_other_logs(tmp_path: Path, line: dict[str, object], src: Endpoint, host: str, rule: str) -> None:
    seen = only(tmp_path, json.dumps(line), "zeek")
    assert (seen.src, seen.host, seen.rule, seen.informational) == (src, host, rule, not rule)
    assert seen.time.start_ns == AT


UTM = (
    'date=2026-03-07 time=03:40:11 devid="F" tz="+0000" type="utm" subtype="ips" srcip=10.0.0.5 srcport=44318 '
    'dstip=198.51.100.7 dstport=22 proto=6 policyid=12 msg="m" '
)


@pytest.mark.parametrize(
    ("line", "action", "host"),
    [
        *((f'{UTM}action="{word}"', Action.DENIED, "") for word in ("reset_client", "reset_server", "drop_session")),
        (f'{UTM}action="detected"', Action.ALLOWED, ""),
        (f'{UTM}action="block" qname="a.example"', Action.DENIED, "a.example"),
        (f'{UTM}action="passthrough" hostname="a.example:8443"', Action.ALLOWED, "a.example"),
        (f'{UTM}action="close" utmaction="reset"', Action.DENIED, ""),
        # a path's last backslash is before the quote, and escapes nothing; a quote within a value is escaped
        (UTM.replace("srcip", 'file="C:\\dir\\" srcip') + 'action="blocked"', Action.DENIED, ""),
        (UTM + 'url="/\\" srcip=6.6.6.6 dstip=\\"" action="blocked"', Action.DENIED, ""),
    ],
)
def test_what_fortigate_did(tmp_path: Path, line: str, action: Action, host: str) -> None:
    seen = only(tmp_path, line, "fortigate")
    assert (seen.src, seen.dst, seen.action, seen.host) == (HERE, THERE, action, host)


def test_a_record_of_a_flow_without_its_ends_is_not_lost(tmp_path: Path) -> None:
    _, report = records(tmp_path, UTM.replace("srcip=", "src-ip=").replace("dstip=", "dst-ip="))
    assert report.quarantined == {"fields": 1}


ENDED = "allow,9,5,4,2,2026/03/07 03:40:01,10,any,0,1,0x0,a,b,0,1,1,"


@pytest.mark.parametrize(
    ("end", "action"),
    [("aged-out", Action.ALLOWED), ("policy-deny", Action.DENIED), ("threat", Action.DENIED)],
)
def test_a_session_that_was_cut_short(tmp_path: Path, end: str, action: Action) -> None:
    seen = only(tmp_path, (HEAD.format("TRAFFIC,end") + MIDDLE + ENDED + end).replace("0.0.0.0", "0.0.0.157"), "panos")
    assert (seen.action, seen.translated_src) == (action, (None, None))


LEEF = (
    "<14>Mar  7 03:40:12 fw-1 LEEF:1.0|Palo Alto Networks|PAN-OS Syslog Integration|11.1|deny|cat=TRAFFIC|"
    "ReceiveTime=2026/03/07 04:40:12|Subtype=deny|devTime=Mar 07 2026 03:40:12 GMT|src=10.0.0.5|dst=198.51.100.7|"
    "srcPostNAT=203.0.113.9|RuleName=No way|srcPort=44318|dstPort=22|srcPostNATPort=61000|proto=tcp|action=deny|"
    "dstBytes=2|srcBytes=58|StartTime=2026/03/07 04:40:01|ElapsedTime=10|DeviceName=fw-1"
)


@pytest.mark.parametrize(
    ("line", "zoned"),
    [
        (LEEF, True),
        (LEEF.replace("devTime=Mar 07 2026 03:40:12 GMT|", ""), False),
        (LEEF.replace("LEEF:1.0", "LEEF:2.0").replace("|deny|cat", "|deny|x7C|cat"), True),
    ],
)
def test_palo_altos_records_as_leef(tmp_path: Path, line: str, zoned: bool) -> None:
    seen = only(tmp_path, line, "panos")
    assert (seen.src, seen.dst, seen.translated_src) == (HERE, THERE, ("203.0.113.9", 61000))
    assert (seen.action, seen.rule, seen.bytes_out, seen.node) == (Action.DENIED, "No way", 58, "fw-1")
    assert seen.time.zoned is zoned
    assert seen.time.start_ns == AT - 10 * SECOND + (0 if zoned else 3600 * SECOND)


def test_a_nat_of_googles_own_is_a_map(tmp_path: Path) -> None:
    connection = {"src_ip": "10.0.0.5", "src_port": 44318, "dest_ip": "198.51.100.7", "dest_port": 22, "protocol": 6}
    connection |= {"nat_ip": "203.0.113.9", "nat_port": 61000}
    payload = {"connection": connection, "allocation_status": "OK", "endpoint": {"vm_name": "node-3"}}
    entry = {"insertId": "a", "timestamp": "2026-03-07T03:40:11.5Z", "jsonPayload": payload}
    seen = only(tmp_path, json.dumps(entry), "gcp-vpc")
    assert (seen.src, seen.translated_src, seen.node) == (HERE, ("203.0.113.9", 61000), "node-3")


# ── what formats write besides, and what becomes of it on its way ─────────────────────────────────────────────


@pytest.mark.parametrize(
    "said",
    [
        SAID + " k8s.ns=default k8s.pod=worker-0 container=abc",
        SAID.replace("process=", "program=").replace("container_id=", "container="),
        SAID.replace("terminal=0", "connection=192.0.2.1:1->192.0.2.2:2 user=nobody terminal=0"),
    ],
)
def test_falcos_text_has_fields_behind_its_list_and_commands_name_some_too(tmp_path: Path, said: str) -> None:
    seen = only(tmp_path, "2026-03-07T03:40:11.123456789+0000: " + said, "falco")
    assert (seen.src, seen.dst, seen.rule) == (HERE, THERE, "Unexpected connection")
    assert (seen.process.executable, seen.process.container, seen.process.user) == ("ssh", "abc", "root")
    assert seen.process.command.startswith("ssh -fNR 2222:localhost:22 mallory@198.51.100.7 (x)")


@pytest.mark.parametrize(
    ("header", "clock", "day"),
    [
        ("2026-03-08T00:00:01Z", "23:59:59.900000000", "2026-03-07"),
        ("2026-03-07T23:59:59Z", "00:00:00.100000000", "2026-03-08"),
        ("2026-03-07T12:00:01Z", "11:59:59.900000000", "2026-03-07"),
    ],
)
def test_a_time_of_day_at_midnight_is_of_the_day_it_was(tmp_path: Path, header: str, clock: str, day: str) -> None:
    seen = only(tmp_path, f"{header} stdout F {clock}: {SAID}", "falco")
    assert seen.time.start_ns == iso(f"{day}T{clock}", Semantics.PACKET).start_ns


@pytest.mark.parametrize("named", ["proc_cmdline", "proc.cmdline"])
def test_falcos_fields_by_stores_that_know_no_dots(tmp_path: Path, named: str) -> None:
    fields: dict[str, object] = {named: "ssh -R", "fd": {"name": "10.0.0.5:44318->198.51.100.7:22"}, "proc_pid": 7}
    event = {"rule": "r", "priority": "Notice", "output": "o", "time": "2026-03-07T03:40:11Z", "output_fields": fields}
    seen = only(tmp_path, json.dumps(event), "falco")
    assert (seen.src, seen.dst, seen.process.command, seen.process.pid) == (HERE, THERE, "ssh -R", 7)


LOST = {"rule": "Falco internal: syscall event drop", "priority": "Debug", "time": "2026-03-07T03:40:11Z"}


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (LOST | {"output": "Falco internal: 9 system calls dropped", "output_fields": {"n_drops": 9}}, "lost events"),
        (LOST | {"rule": "Falco internal: metrics snapshot", "output": "metrics", "output_fields": {}}, ""),
        ({"lost_events": {"source": "HUBBLE_RING_BUFFER", "num_events_lost": "5"}, "node_name": "n"}, "lost 5 events"),
        ({"agent_event": {"type": "POLICY_UPDATED"}, "node_name": "n", "time": "2026-03-07T03:40:11Z"}, ""),
        ({"node_status": {"state_change": "NODE_CONNECTED"}, "node_name": "n"}, ""),
        ("2 123456789010 eni-1 - - - - - - - 1772854811 1772854869 - SKIPDATA", "left out records"),
        ("2 123456789010 eni-1 - - - - - - - 1772854811 1772854869 - NODATA", ""),
    ],
)
def test_what_was_lost_before_is_counted_and_what_is_of_no_traffic_is_not(
    tmp_path: Path, line: dict[str, object] | str, why: str
) -> None:
    found, report = records(tmp_path, line if isinstance(line, str) else json.dumps(line))
    assert found == []
    assert report.quarantined == ({"fields": 1} if why else {})
    assert all(why in each.detail for each in report.first)


def test_a_transit_gateways_log_has_an_order_of_its_own(tmp_path: Path) -> None:
    line = (
        "6 TransitGateway 123456789010 tgw-1 tgw-attach-1 123456789010 123456789010 vpc-1 vpc-2 subnet-1 subnet-2 "
        "eni-1 eni-2 euw1-az1 euw1-az2 tgw-attach-2 10.0.0.5 198.51.100.7 44318 22 6 1 44 1772854811 1772854869 OK "
        "IPv4 0 0 0 0 2 eu-west-1 egress - -"
    )
    seen = only(tmp_path, line, "aws-vpc")
    assert (seen.src, seen.dst, seen.proto, seen.bytes_out) == (HERE, THERE, "tcp", 44)
    assert (seen.time.start_ns, seen.time.end_ns) == (AT, AT + 59 * SECOND)


@pytest.mark.parametrize(
    "before", ["2026-03-07T03:41:02.000Z ", "2026-03-07T03:41:02+00:00 eni-1-all ", "2026-03-07T03:41:02.000000Z "]
)
def test_cloudwatchs_own_time_before_a_flow(tmp_path: Path, before: str) -> None:
    assert only(tmp_path, f"{before}2 {VPC}", "aws-vpc").time.start_ns == AT


@pytest.mark.parametrize(
    ("event", "host", "signature", "action"),
    [
        ({"sni": "-", "tls_error": {"error_message": "no server name"}}, "", "no server name", Action.UNKNOWN),
        ({"sni": "pool.example", "tls_error": {"error_message": "x"}}, "pool.example", "x", Action.UNKNOWN),
        (
            {"sni": "pool.example", "revocation_check": {"status": "REVOKED", "action": "DROP"}},
            "pool.example",
            "certificate REVOKED",
            Action.DENIED,
        ),
    ],
)
def test_the_log_of_tls_inspection_is_no_suricatas(
    tmp_path: Path, event: dict[str, object], host: str, signature: str, action: Action
) -> None:
    inner = {"timestamp": "2026-03-07T03:40:11.5Z", "src_ip": "10.0.0.5", "src_port": "44318"}
    inner |= {"dest_ip": "198.51.100.7", "dest_port": "22"}
    line = {"firewall_name": "fw", "availability_zone": "z", "event_timestamp": 1772854811, "event": inner | event}
    seen = only(tmp_path, json.dumps(line), "aws-firewall")
    assert (seen.src, seen.dst, seen.proto, seen.node) == (HERE, THERE, "tcp", "fw")
    assert (seen.host, seen.signature, seen.action) == (host, signature, action)


CLOUD_FIREWALL = {"__topic__": "cloudfirewall_access_log", "__time__": "1772854900", "start_time": "1772854811"}
CLOUD_FIREWALL |= {"end_time": "1772854830", "direction": "out", "ip_protocol": "tcp", "rule_result": "pass"}
CLOUD_FIREWALL |= {"src_ip": "10.0.0.5", "src_port": "44318", "dst_ip": "198.51.100.7", "dst_port": "22"}
POLICY = "073a1475-6e11-43e2-8b28-98cee9c60000"


@pytest.mark.parametrize(
    ("change", "rule", "quiet"),
    [
        ({"acl_rule_id": POLICY}, "", True),  # the policy by which it was let through
        ({"acl_rule_id": POLICY, "rule_result": "alert"}, POLICY, False),
        ({"acl_rule_id": POLICY, "rule_result": "drop"}, POLICY, False),
        ({"ips_rule_id": POLICY, "ips_rule_name_en": "Mining behavior on the host"}, POLICY, False),
        ({"__topic__": "cloudfirewall_ips_log", "log_type": "internet_ips_log"}, "", True),
    ],
)
def test_what_of_an_alibaba_firewall_is_an_objection(
    tmp_path: Path, change: dict[str, str], rule: str, quiet: bool
) -> None:
    seen = only(tmp_path, json.dumps(CLOUD_FIREWALL | change), "alibaba-firewall")
    assert (seen.src, seen.dst, seen.rule, seen.informational) == (HERE, THERE, rule, quiet)


def test_behind_a_public_address_stands_the_instances_own(tmp_path: Path) -> None:
    line = CLOUD_FIREWALL | {"src_ip": "203.0.113.9", "src_private_ip": "10.0.0.5"}
    seen = only(tmp_path, json.dumps(line), "alibaba-firewall")
    assert (seen.src, seen.translated_src) == (HERE, ("203.0.113.9", 44318))
    seen = only(tmp_path, json.dumps(line | {"direction": "in"}), "alibaba-firewall")
    assert (seen.src.ip, seen.translated_src.ip) == ("203.0.113.9", None)
    written = {key: value for key, value in CLOUD_FIREWALL.items() if not key.endswith("_time")}
    seen = only(tmp_path, json.dumps(written | {"__time__": "2026-03-07 03:40:11"}), "alibaba-firewall")
    assert (seen.time.start_ns, seen.time.semantics) == (AT, Semantics.INGEST)


TUPLE = "1772854811123,10.0.0.5,198.51.100.7,44318,22,6,O,{},{},1,60,0,0"


@pytest.mark.parametrize(
    ("state", "encryption", "action", "semantics"),
    [
        ("B", "NX", Action.ALLOWED, Semantics.PACKET),
        ("C", "X", Action.ALLOWED, Semantics.END),
        ("E", "NX_HW_NOT_SUPPORTED", Action.ALLOWED, Semantics.END),
        ("D", "NX", Action.DENIED, Semantics.PACKET),
    ],
)
def test_states_of_a_virtual_networks_flow(
    tmp_path: Path, state: str, encryption: str, action: Action, semantics: Semantics
) -> None:
    groups = [{"rule": "r", "flowTuples": [TUPLE.format(state, encryption)]}]
    record = {"time": "x", "flowRecords": {"flows": [{"aclID": "a", "flowGroups": groups}]}}
    seen = only(tmp_path, json.dumps({"records": [record]}), "azure-flow")
    assert (seen.src, seen.dst, seen.action, seen.time.semantics) == (HERE, THERE, action, semantics)


def test_each_tuple_of_a_line_has_a_place_and_a_text_of_its_own(tmp_path: Path) -> None:
    tuples = [TUPLE.format(state, "NX") for state in "BCE"]
    groups = [{"rule": "r", "flowTuples": tuples}]
    line = json.dumps({"records": [{"flowRecords": {"flows": [{"flowGroups": groups}]}}]})
    found, _ = records(tmp_path, line)
    assert [line.encode()[each.byte_offset :][: len(each.raw)] for each in found] == [each.encode() for each in tuples]
    assert [each.raw.decode() for each in found] == tuples


def test_a_damaged_tuple_costs_the_others_nothing(tmp_path: Path) -> None:
    good = [
        "1772854811,10.0.0.5,198.51.100.7,44318,22,T,O,D,B,,,,",
        "1772854812,10.0.0.5,198.51.100.7,44319,22,T,O,A,B,,,,",
    ]
    tuples = [good[0], "0," + good[0][11:], "cut", good[1].replace(",O,", ",\ufffd,")]
    flows = {"rule": "r", "flows": [{"mac": "0", "flowTuples": tuples}]}
    line = json.dumps({"records": [{"properties": {"flows": [flows]}}]}, ensure_ascii=False)
    path = tmp_path / "log"
    path.write_bytes(raw := line.encode().replace("\ufffd".encode(), b"\xff"))
    report = FileReport(str(path))
    found = list(read(path, report))
    assert report.quarantined == {"time": 1, "fields": 1}
    assert [each.seen.src.port for each in found] == [44318, 44319]
    assert [raw[each.byte_offset :][: len(each.raw)] for each in found] == [each.raw for each in found]
    assert found[1].raw == good[1].encode().replace(b",O,", b",\xff,")
