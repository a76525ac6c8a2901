"""Judges the first bytes of a connection. Runs later, and live. Pure.

What a protocol says of itself holds on any port. SSH itself is flagged: a tool that may speak it does so to a host that
its policy names, and is not asked about here.
"""

from __future__ import annotations

import re
from typing import Final

from ray_guard.detect import Finding, Kind, pools

SSH: Final = "payload.ssh"
_MINING: Final = re.compile(
    rb'"method"\s*:\s*"(?:mining\.(?:subscribe|authorize|notify|submit|configure|set_difficulty|extranonce\.subscribe)|'
    rb'eth_(?:submitLogin|getWork|submitWork|submitHashrate)|login|getjob|job|keepalived|getblocktemplate)"'
)
_MONERO: Final = (
    re.compile(rb'"login"\s*:\s*"(?:[48]|[^"]{1,128}"[^{}]{0,512}"(?:pass|agent|rigid|algo)"\s*:)'),
    re.compile(rb'"(?:pass|agent|rigid|algo)"\s*:[^{}]{0,512}"login"\s*:\s*"'),
    re.compile(rb'"(?:blob|seed_hash|rigid)"\s*:|"job_id"\s*:[^{}]{0,512}"(?:nonce|target|result)"\s*:'),
)
"""What a pool of Monero's kind is told or tells beside a method's name, which others use too."""
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
    rb"(?<!Credential=)(?<!AccessKeyId=)\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bghp_\w{36}\b|\bhf_[A-Za-z]{34}\b",
    re.MULTILINE,
)
_AUTHORIZATION: Final = re.compile(rb"(?im)^(?:proxy-)?authorization:[^\r\n]*")
"""Where a credential stands that is put to its own use."""
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
        b"mining." in payload
        or b"eth_" in payload
        or any(each.search(payload) for each in _MONERO)
        or b'"getblocktemplate"' in payload
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
        if _SECRET.search(_AUTHORIZATION.sub(b"", payload)):
            return Finding(Kind.EXFILTRATION, "payload.secret")
    return None


def _names_of(payload: bytes) -> bool:
    """Whether this is a DNS query (by UDP, or TCP with its length) whose name carries data."""
    by_tcp = len(payload) > 2 and int.from_bytes(payload[:2]) >= len(payload) - 2
    return _carries_data(payload) or (by_tcp and _carries_data(payload[2:]))


def _carries_data(message: bytes) -> bool:
    # one question, asked of a server (no opcode, no answers), at most two records beside it (EDNS, a signature)
    if len(message) < 17 or message[2] & 0xF8 or message[4:11] != b"\0\1\0\0\0\0\0" or message[11] > 2:
        return False
    labels, at = [], 12
    while at < len(message) and 0 < message[at] < 64:
        labels.append(message[at + 1 : at + 1 + message[at]])
        at += message[at] + 1
    asked = message[at : at + 5]
    return len(asked) == 5 and asked[0] == 0 and asked[3] == 0 and asked[4] in _CLASSES and carries(labels)


_CLASSES: Final = (1, 3, 255)
"""Internet, Chaos, any."""
_RUN: Final = 16
_CARRIED: Final = 41
"""More than a digest of SHA-1, which machines are named by."""
_LONG: Final = 100


def carries(labels: list[bytes]) -> bool:
    """Labels that are data by themselves: long ones without the hyphens of names, or very long ones together."""
    front = labels[:-2]
    runs = (run for label in front for run in re.split(rb"[-_]", label))
    return sum(len(run) for run in runs if len(run) >= _RUN) >= _CARRIED or sum(map(len, front)) >= _LONG
