"""What is met beside logs of the known formats, and what to do about it. Runs later. Pure.

It is not read, and says so by its name: what is in quarantine as ``unknown`` is then no riddle.
"""

from __future__ import annotations

import re
from typing import Final

_PATTERNS: Final = tuple(
    (re.compile(pattern), what)
    for pattern, what in (
        (
            r"===>PACKET BOUNDARY$|(?:(?:ct|raw)|[a-z0-9]+(?:\.[a-z0-9_]+)+)=",
            "ulogd2's OPRINT; have it write LOGEMU, GPRINT or JSON",
        ),
        (r"<\?xml |</?(?:flow|log|packet|conntrack)>", "ulogd2's or conntrack's XML; have it write JSON, or text"),
        (r"\d+\t\d+\t[\d.]+\t\d+\t[\d.]+\t\d+\t\d+\t\d+$", "ulogd2's NACCT; have it write JSON"),
        (r".*\bsrc=\S+ dst=\S+ .*\bsrc=\S+ dst=", "connection tracking's own; give it to --nat"),
        (r"\d\d/\d\d/\d{4}-\S+ .*:\d+ -> ", "Suricata's text of one protocol; use its eve.json"),
        (r"Date: \d|-{40,}$|Counter +\| TM Name|\S+ +\| (?:Total|\S+) +\| \d+$", "Suricata's counters"),
        (r"[A-Z_]{2,40}=|\s+_?[A-Z_]{2,40}=", "`journalctl -o export` or `verbose`; use `-o json` or `-o short-iso`"),
        (r"\S+ \S+ .*\[\d\d/[A-Z][a-z]{2}/\d{4}:[\d:]+ [+-]\d{4}\]", "a web server's access log"),
        (r"\d{10}\.\d{3} +\d+ \S+ [A-Z_]+/\d{3} ", "Squid's access log"),
        (r".*%(?:ASA|FTD|FWSM)-\d-\d+", "a Cisco firewall's log"),
        (r".*\bfilterlog(?:\[\d+\])?:? ", "pfSense's or OPNsense's filter log"),
        (r".*\bRT_FLOW\b", "a Juniper firewall's log"),
        (r".*\b(?:CEF:\d|LEEF:[\d.]+)\|", "CEF or LEEF of another vendor than Fortinet and Palo Alto Networks"),
    )
)
_AHEAD: Final = 400
_MAGIC: Final = (
    (b"PK\x03\x04", "a zip archive; unpack it"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it"),
    (b"\x04\x22\x4d\x18", "packed by lz4; unpack it"),
    (b"\x1f\x9d", "packed by compress; unpack it"),
    (b"\xff\x06\x00\x00sN", "packed by snappy; unpack it"),
    (b"\xd4\xc3\xb2\xa1", "packets (pcap); read them with Suricata or Zeek first"),
    (b"\xa1\xb2\xc3\xd4", "packets (pcap); read them with Suricata or Zeek first"),
    (b"\x4d\x3c\xb2\xa1", "packets (pcap); read them with Suricata or Zeek first"),
    (b"\x0a\x0d\x0d\x0a", "packets (pcapng); read them with Suricata or Zeek first"),
    (b"ElfFile\x00", "a Windows event log"),
    (b"LPKSHHRH", "the journal's own file; write it with `journalctl --file … -o json`"),
    (b"SQLite f", "a database"),
    (b"Obj\x01", "Avro; export JSON or Parquet"),
    (b"\x0c\xa5", "nfdump's flows"),
)


def line(text: str) -> str:
    """What a line is that no format knows; empty where that is not known either."""
    head = text[:_AHEAD]
    return next((what for pattern, what in _PATTERNS if pattern.match(head)), "")


def file(begin: bytes) -> str:
    """What a file is that holds no lines, by its first eight bytes; empty where it may."""
    return next((what for magic, what in _MAGIC if begin.startswith(magic)), "")
