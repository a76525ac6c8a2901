"""Judges the first bytes of a connection. Runs later, and live. Pure.

What a protocol says of itself holds on any port. SSH itself is flagged: a tool that may speak it does so to a host that
its policy names, and is not asked about here.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Final

from ray_guard.detect import Finding, Kind, pools

SSH: Final = "payload.ssh"
_MINING: Final = re.compile(
    rb'"method"\s*:\s*"(?:mining\.(?:subscribe|authorize|notify|submit|configure|set_difficulty|extranonce\.subscribe)|'
    rb'eth_(?:submitLogin|getWork|submitWork|submitHashrate)|login|getjob|job|keepalived|getblocktemplate)"'
)
_MONERO: Final = re.compile(rb'"(?:pass|agent|rigid|algo|blob|job_id|seed_hash)"\s*:|"login"\s*:\s*"[48]')
_ESCAPED: Final = re.compile(rb"\\u00([0-7][0-9a-fA-F])")
_TERMINAL: Final = re.compile(rb"\x1b\[[0-9;?]{0,16}[A-Za-z]|\x1b\][^\x07\x1b]{0,200}(?:\x07|\x1b\\)")
_CHISEL: Final = re.compile(
    rb"(?i)sec-websocket-protocol:\s*(?:chisel|penguin|wstunnel|v1\.wstunnel|v1, authorization)|"
    rb"upgrade:\s*(?:wstunnel|gost|tailscale-control|derp)|"
    rb"^x-inlets-\w+:|^cf-cloudflared-|^user-agent:\s*(?:ngrok|cloudflared|frp|chisel|tailscale)|"
    rb"\ACONNECT \S*\.(?:ngrok|argotunnel|trycloudflare)\.",
    re.MULTILINE,
)
_POOL: Final = re.compile(pools.NAME.encode())
_HTTP_MINING: Final = re.compile(
    rb"(?i)^x-mining-\w+:|^user-agent:\s*(?:xmrig|cpuminer|cgminer|bfgminer|ethminer|t-rex|nbminer|lolminer|"
    rb"srbminer|teamredminer)|\ACONNECT \S{0,253}" + pools.NAME.encode(),
    re.MULTILINE,
)
_FRAMED: Final = re.compile(
    rb"\A(?:\x00\x01\x00\x01\x00\x00\x00[\x01\x02]|\x00\x02\x00\x01\x00\x00\x00\x00|\x17\x16\x03[\x00-\x04])"
)
"""A session of yamux (frp, rathole and their like), and frp's own TLS."""
_SOCKS: Final = re.compile(
    rb"\A(?:\x05\x01\x00|\x05\x02\x00[\x01\x02]|\x05\x03\x00[\x01\x02]{2}|"
    rb"\x04[\x01\x02].{6}[\x20-\x7e]{0,64}\x00(?:[\w.-]{1,253}\x00)?)"
    rb"(?:\x05[\x01-\x03]\x00[\x01\x03\x04].{4,260})?\Z|\ACONNECT \S{1,255}:22 HTTP/",
    re.DOTALL,
)
_FRP: Final = re.compile(rb'\A[o1c2rw]\x00{4,}.{1,8}\{.*"(?:privilege_key|run_id|proxy_name)"', re.DOTALL)
_BORE: Final = re.compile(rb'\A\{"(?:Hello|Accept|Authenticate|Challenge)":\s*(?:\d|")')
_TUNNEL_NAMES: Final = re.compile(
    rb"(?i)(?<![\w-])(?:ngrok(?:-agent)?\.(?:com|io|app)|argotunnel\.com|cftunnel\.com|trycloudflare\.com|"
    rb"bore\.pub|serveo\.net|"
    rb"localhost\.run|loca\.lt|localtunnel\.me|pagekite\.net|pinggy\.(?:io|link)|playit\.gg|zrok\.io|"
    rb"tailscale\.com|telebit\.io)"
)
_SHELL: Final = re.compile(
    rb"(?:ba|da|z)?sh(?:-\d[\w.]*)?[$#] \Z|no job control in this shell|can't access tty|\Auid=\d+\([\w-]+\) gid=|"
    rb"\A(?:/bin/)?(?:ba|da|z)?sh: \d*|^[^\s@]{1,64}@[\w.-]{1,255}:[^\n]{0,255}[$#] \Z|"
    rb"Microsoft Windows \[Version|^PS [A-Z/][^\n]{0,255}> \Z|\A\$ \Z|\A# \Z",
    re.MULTILINE,
)
_SECRET: Final = re.compile(
    rb"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY|aws_secret_access_key|^root:[^:\n]*:0:0:|"
    rb"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bghp_\w{36}\b|\bhf_[A-Za-z]{34}\b",
    re.MULTILINE,
)
_BANNER: Final = re.compile(rb"(?:[^\r\n]{0,255}\r?\n){0,16}SSH-[12]\.")
"""Lines may stand before it (RFC 4253)."""
_METADATA: Final = re.compile(
    rb"(?i)^host:\s*(?:169\.254\.169\.254|169\.254\.170\.2|100\.100\.100\.200|metadata\.google\.internal|"
    rb"\[fd00:ec2::254\])|"
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
    if b"\\u00" in payload:  # JSON's own disguise
        payload = _ESCAPED.sub(lambda found: bytes((int(found[1], 16),)), payload)
    if _BANNER.match(payload):
        return Finding(Kind.REVERSE_TUNNEL, SSH)
    if _MINING.search(payload) and (
        b"mining." in payload or b"eth_" in payload or _MONERO.search(payload) or b'"getblocktemplate"' in payload
    ):
        return Finding(Kind.MINING, "payload.json_rpc")
    for kind, rule, pattern in (
        (Kind.MINING, "payload.http_mining", _HTTP_MINING),
        (Kind.REVERSE_TUNNEL, "payload.websocket_tunnel", _CHISEL),
        (Kind.REVERSE_TUNNEL, "payload.frp", _FRP),
        (Kind.REVERSE_TUNNEL, "payload.bore", _BORE),
        (Kind.REVERSE_TUNNEL, "payload.yamux", _FRAMED),
        (Kind.REVERSE_TUNNEL, "payload.proxy", _SOCKS),
        (Kind.METADATA, "payload.metadata", _METADATA),
    ):
        if pattern.search(payload):
            return Finding(kind, rule)
    if payload[:1] == b"\x16" and payload[5:6] == b"\x01":
        if _TUNNEL_NAMES.search(payload):
            return Finding(Kind.REVERSE_TUNNEL, "payload.tunnel_name")
        if _POOL.search(payload):
            return Finding(Kind.MINING, "payload.pool_name")
    if _names_of(payload):
        return Finding(Kind.DNS_TUNNEL, "payload.dns_label")
    if direction == "sent":
        # Of what a client sends: a prompt, or a secret. Of what it is sent, both are common on ordinary pages.
        if _SHELL.search(_TERMINAL.sub(b"", payload)):
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
