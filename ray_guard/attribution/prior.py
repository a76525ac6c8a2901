"""How likely a command is to use the network at all, judged from its text. Runs later. Pure.

Used where no socket was recorded: to weigh calls that were open when an alert fell, and to find a skew. Classes,
not numbers: how much each is worth is learned from the alerts at hand (:mod:`~ray_guard.attribution.score`).
"""

from __future__ import annotations

import re
from enum import IntEnum
from typing import Final


class Reach(IntEnum):
    """What a tool call's text lets one expect, from nothing to much."""

    SILENT = 0
    """Known not to talk: listing, editing, arithmetic."""
    UNKNOWN = 1
    """Could be anything: a script, a build, a test run; or no text is recorded."""
    NETWORK = 2
    """Talks to somebody by its nature: curl, pip install, git clone."""
    SUSPECT = 3
    """Tunnels, miners, scanners."""


# RE2, which DuckDB judges texts with, has no look-around: these patterns do without.
SUSPECT: Final = (
    r"(?i)\bssh\b[^|;&]*\s-\w*[RDLWw]|\bautossh\b|RemoteForward|\b(?:chisel|frpc|ngrok|cloudflared|bore|gost|rathole|socat|proxychains4?)\b"
    r"|stratum\+|\b(?:xmrig|t-rex|ethminer|nbminer|lolminer|cgminer|cpuminer|minerd|xmr-stak|nanominer)\b"
    r"|\b(?:nmap|masscan|zmap|rustscan|hping3?|arp-scan)\b|/dev/(?:tcp|udp)/|\bnc(?:at)?\b[^|;&]*\s-\w*[elz]"
    r"|169\.254\.169\.254|metadata\.google\.internal|100\.100\.100\.200"
)
NETWORK: Final = (
    r"(?i)\b(?:curl|wget|ssh|scp|sftp|rsync|ftp|telnet|nc|ncat|netcat|dig|nslookup|host|ping|traceroute|whois|http|aria2c)\b"
    r"|\b(?:pip3?|uv|conda|npm|yarn|pnpm|cargo|gem|go|apt|apt-get|yum|dnf|apk|brew|docker|podman|helm)\s+(?:\w+\s+)*?"
    r"(?:install|add|get|update|upgrade|pull|push|fetch|download|sync|ci|login|build)\b"
    r"|\bgit\s+(?:-\S+\s+)*(?:clone|fetch|pull|push|ls-remote|submodule)\b"
    r"|\b(?:https?|ftp|ssh|wss?|tcp|udp)://|\brequests\.|\burllib|\bsocket\.|\baiohttp|\bhttpx|\bparamiko|\bhf_hub|snapshot_download"
    r"|\b\d{1,3}(?:\.\d{1,3}){3}\b"
)
SILENT: Final = (
    r"^(?:\{\s*\"(?:command|cmd)\"\s*:\s*\")?\s*(?:cd\s+\S+\s*(?:&&|;)\s*)*(?:ls|cat|head|tail|grep|rg|find|wc|sort|uniq|echo|pwd|which|file|stat|tree|sed|awk|cut|tr|diff|"
    r"mkdir|touch|cp|mv|rm|chmod|date|env|true|false|test|du|df|ps|whoami|id|uname|jq|git\s+(?:status|diff|log|show|add|commit))\b"
)


TELLS: Final = r"\b\d{1,3}(?:\.\d{1,3}){3}\b|\w://[\w\[]|\w@\w+\.\w|::"
"""The text names some destination."""


def reach(text: str) -> Reach:
    """The class of a command line, or of a tool's arguments as JSON; ``candidates`` asks the same in SQL."""
    if not text:
        return Reach.UNKNOWN
    for pattern, found in ((SUSPECT, Reach.SUSPECT), (NETWORK, Reach.NETWORK), (SILENT, Reach.SILENT)):
        if re.search(pattern, text):
            return found
    return Reach.UNKNOWN


ADDRESS: Final = r"\d\.\d|[0-9A-Fa-f:]:[0-9A-Fa-f:]"
"""What a text has that holds any address, and few others."""

NAMED: Final = r"""regexp_extract_all(regexp_replace(lower({text}), '\\[nrt]', ' ', 'g'),
    '[0-9a-z_-]+(?:[.][0-9a-z_-]+)+|[0-9a-f]*:[0-9a-f:.]+')"""
"""The SQL for the addresses and hosts that a text names, with others that look like them."""


def names(text: str, what: str) -> str:
    """The SQL that tells whether a text names an address or a host, and no longer one that holds it. Both in SQL."""
    quoted = f"replace({what}, '.', '[.]')"
    before, after = r"(^|[^0-9A-Za-z_.-]|\\[nrt])", r"($|[^0-9A-Za-z_.-]|[.]($|[^0-9A-Za-z]))"
    return f"""(CASE WHEN coalesce({what}, '') = '' THEN false WHEN contains(lower({text}), {what})
                 THEN regexp_matches(lower({text}), '{before}' || {quoted} || '{after}') ELSE false END)"""
