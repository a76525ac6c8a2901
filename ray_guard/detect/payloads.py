"""Judges the first bytes of a connection. Runs later, and live. Pure.

What a protocol says of itself holds on any port. SSH itself is flagged: a tool that may speak it does so to a host that
its policy names, and is not asked about here.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Final

from ray_guard.detect import Finding, Kind

_MINING: Final = re.compile(
    rb'"method"\s*:\s*"(?:mining\.(?:subscribe|authorize|notify|submit|configure|set_difficulty|extranonce\.subscribe)|'
    rb'eth_(?:submitLogin|getWork|submitWork|submitHashrate)|login|getjob|job|keepalived|getblocktemplate)"'
)
_MONERO: Final = re.compile(rb'"(?:pass|agent|rigid|algo|blob|job_id|seed_hash)"\s*:')
_CHISEL: Final = re.compile(
    rb"(?i)sec-websocket-protocol:\s*(?:chisel|penguin|wstunnel|v1\.wstunnel)|upgrade:\s*(?:wstunnel|gost)"
)
_FRP: Final = re.compile(rb'\A[o1c2rw]\x00{4,}.{1,8}\{.*"(?:privilege_key|run_id|proxy_name)"', re.DOTALL)
_BORE: Final = re.compile(rb'\A\{"(?:Hello|Accept|Authenticate|Challenge)":\s*(?:\d|")')
_TUNNEL_NAMES: Final = re.compile(
    rb"(?i)(?<![\w-])(?:ngrok(?:-agent)?\.(?:com|io|app)|argotunnel\.com|cftunnel\.com|trycloudflare\.com|bore\.pub|serveo\.net|"
    rb"localhost\.run|loca\.lt|localtunnel\.me|pagekite\.net|pinggy\.(?:io|link)|playit\.gg|zrok\.io|tailscale\.com|telebit\.io)"
)
_SHELL: Final = re.compile(
    rb"(?:ba|da|z)?sh(?:-\d[\w.]*)?[$#] \Z|no job control in this shell|can't access tty|\Auid=\d+\([\w-]+\) gid=|"
    rb"\A(?:/bin/)?(?:ba|da|z)?sh: \d*|^[^\s@]{1,64}@[\w.-]{1,255}:[^\n]{0,255}[$#] \Z|"
    rb"Microsoft Windows \[Version|\A\$ \Z|\A# \Z",
    re.MULTILINE,
)
_SECRET: Final = re.compile(
    rb"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY|aws_secret_access_key|^root:[^:\n]*:0:0:|"
    rb"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bghp_\w{36}\b|\bhf_[A-Za-z]{34}\b",
    re.MULTILINE,
)
_METADATA: Final = re.compile(
    rb"(?i)^host:\s*(?:169\.254\.169\.254|169\.254\.170\.2|100\.100\.100\.200|metadata\.google\.internal|\[fd00:ec2::254\])|"
    rb"\A(?:GET|PUT|HEAD) /(?:latest/(?:meta-data|api/token|user-data|dynamic)|computeMetadata/v1|"
    rb"metadata/(?:instance|identity))",
    re.MULTILINE,
)


def judge(payload: bytes, direction: str) -> Finding | None:
    """What the bytes are; None: nothing that is known.

    Args:
        payload: the first bytes of one direction.
        direction: ``sent`` by the tool, or ``received``.
    """
    if payload.startswith((b"SSH-2.0-", b"SSH-1.99-", b"SSH-1.5-")):
        return Finding(Kind.REVERSE_TUNNEL, "payload.ssh")
    if _MINING.search(payload) and (
        b"mining." in payload or b"eth_" in payload or _MONERO.search(payload) or b'"params"' in payload
    ):
        return Finding(Kind.MINING, "payload.json_rpc")
    for kind, rule, pattern in (
        (Kind.REVERSE_TUNNEL, "payload.websocket_tunnel", _CHISEL),
        (Kind.REVERSE_TUNNEL, "payload.frp", _FRP),
        (Kind.REVERSE_TUNNEL, "payload.bore", _BORE),
        (Kind.METADATA, "payload.metadata", _METADATA),
    ):
        if pattern.search(payload):
            return Finding(kind, rule)
    if payload[:1] == b"\x16" and payload[5:6] == b"\x01" and _TUNNEL_NAMES.search(payload):
        return Finding(Kind.REVERSE_TUNNEL, "payload.tunnel_name")
    if _names_of(payload):
        return Finding(Kind.DNS_TUNNEL, "payload.dns_label")
    if direction == "sent":
        # Of what a client sends: a prompt, or a secret. Of what it is sent, both are common on ordinary pages.
        if _SHELL.search(payload):
            return Finding(Kind.REVERSE_SHELL, "payload.prompt")
        if _SECRET.search(payload):
            return Finding(Kind.EXFILTRATION, "payload.secret")
    return None


def _names_of(payload: bytes) -> bool:
    """Whether these are DNS queries (by UDP, or TCP with its length) whose names carry data."""
    for message in (payload, payload[2:]):
        if len(message) < 17 or message[4:6] != b"\x00\x01" or message[2] & 0x80:
            continue
        labels, at = [], 12
        while at < len(message) and 0 < message[at] < 64 and at + message[at] < len(message):
            labels.append(message[at + 1 : at + 1 + message[at]])
            at += message[at] + 1
        if at < len(message) and message[at] == 0 and labels and carries(labels):
            return True
    return False


def carries(labels: list[bytes]) -> bool:
    """Labels that are data: long, or long together, and without the repetitions of words."""
    front = labels[:-2]
    text = b"".join(front)
    return len(text) >= 30 and (max(map(len, front)) >= 40 or entropy(text) > 3.8 or len(text) >= 100)


def entropy(text: bytes) -> float:
    """Bits a byte."""
    counts = Counter(text)
    return -sum(count / len(text) * math.log2(count / len(text)) for count in counts.values()) if text else 0.0
