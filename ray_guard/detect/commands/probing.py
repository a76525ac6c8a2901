"""Commands that look for hosts and ports. Runs later, and live. Pure."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Final

from ray_guard.detect import Finding, Kind
from ray_guard.detect.commands.line import Line, is_loopback
from ray_guard.detect.shell import NETCATS, READERS, Command

_ADDRESS: Final = re.compile(r"(?<![\w.])(\d{1,3}(?:\.\d{1,3}){3})(?![\w.]*\w\.)")
_NETWORK: Final = re.compile(
    r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}/(?:[12]\d|3[01]|[1-9])(?!\d)|(?<![\w.])(?:\d{1,3}\.){3}(?:\d{1,3})?(?:\d-\d{1,3}|\*)(?![\w.])"
)
_SCANNERS: Final = frozenset(
    "nmap zenmap masscan zmap rustscan unicornscan arp-scan netdiscover nbtscan naabu zgrab zgrab2 sx ike-scan "
    "onesixtyone "
    "dnsrecon dmitry nikto nuclei ncrack patator medusa hping3 hping crackmapexec nxc netexec enum4linux "
    "enum4linux-ng smbmap "
    "responder snmpwalk snmp-check fscan kscan gobuster feroxbuster dirsearch wfuzz whatweb wpscan amass fierce "
    "legba scanless".split()
)
_SCANS_BY_NAME: Final = re.compile(
    r"(?i)(?:\w{1,20}[-_])?(?:port|net(?:work)?|subnet|lan|ip|host|udp|tcp|arp|mdns|ping|syn)[\w-]{0,20}?[-_]?(?:scan(?:ner)?|sweep(?:er)?)$"
)
#: tools of others, and what their arguments must show to look for hosts
_WAYS: Final = {
    "fping": r"(?:^|\s)-\w*g|/\d{1,2}\b|(?:^|\s)-f\b|\$\w+\.\$\w+",
    "hydra": r"(?:^|\s)-[lLpPC]\s",
    "smbclient": r"(?:^|\s)-\w*L",
    "showmount": r"(?:^|\s)-[ead]+\s",
    "rpcinfo": r"(?:^|\s)-p\s+\S",
    "httpx": r"(?:^|\s)-(?:l|list|ports|p)\s",
    "ffuf": r"(?:^|\s)-u\s",
    "nbtstat": r"-A\b",
    "traceroute-ng": r".",
}
_TELLS_OF_ITSELF: Final = frozenset(("--version", "--help", "-h", "-V", "-d", "--help-hh", "-hh"))
_SCANS: Final = re.compile(
    r"(?:^|\s)(?:-s[STUAFXNMWOIYZnPLVC]+|-Pn|-p-|--top-ports|-top-ports|--open|-iL|--localnet|--script[= "
    r"]\S*vuln\S*)(?:\s|$)"
)
_PORTS: Final = re.compile(r"(?:^|\s)(?:-p|--ports?|-ports|-top-ports|--rate|-t|--threads)[= ]?[\d,-]+(?:\s|$)")
_TARGETED: Final = re.compile(r"(?:^|\s)(?:--?(?:hosts?|targets?|range|cidr|net)[= ]|--?\w{0,20}(?:sweep|scan)\b)\s*")
#: programs that are told of networks and do not look at them
_NETWORKERS: Final = READERS | frozenset(
    "ip iptables ip6tables nft ufw firewall-cmd docker kubectl helm aws gcloud az terraform tcpdump tshark "
    "route ipcalc sipcalc "
    "ipset kubeadm k3s wg conntrack curl psql mysql git ping tc brctl nmcli netplan podman sshuttle openvpn "
    "minikube kind".split()
)
_RANGED: Final = re.compile(r"\{\d+\.\.\d+\}|\[\d+-\d+\]")
_PLACES: Final = re.compile(
    r"(?:\d{1,3}\.){3}(?:\{\d+\.\.\d+\}|\[\d+-\d+\])|(?:\d{1,3}\.){1,3}(?:\{\d+\.\.\d+\}\.?)+|://[^\s/]*:(?:\{\d+\.\.\d+\}|\[\d+-\d+\])"
)


def by_program(command: Command, _line: Line) -> Finding | None:
    """Scanners by name and by what they are told."""
    text = " ".join(command.arguments)
    if command.name in READERS or _TELLS_OF_ITSELF.issuperset(command.arguments or ["-h"]):
        return None
    if command.program in _SCANNERS or _SCANS_BY_NAME.match(command.program):
        targets = [word for word in command.arguments if not word.startswith("-")]
        if not targets or not all(
            is_loopback(word) or word.isdigit() for word in targets if not _is_option_value(word)
        ):
            return Finding(Kind.PROBING, f"probing.{command.program}")
    if command.name in _WAYS and re.search(_WAYS[command.name], text) and not is_loopback(text):
        return Finding(Kind.PROBING, f"probing.{command.name}")
    tries = command.name in NETCATS and re.search(r"(?:^|\s)-\w*z", text) and not is_loopback(text)
    if tries and (re.search(r"\s\d+-\d+\b", f" {text}") or _ADDRESS.search(text) or _RANGED.search(text)):
        return Finding(Kind.PROBING, "probing.nc")
    if (
        command.name in ("curl", "wget", "ping", "nc", "http", *NETCATS)
        and _PLACES.search(text)
        and not is_loopback(text)
    ):
        return Finding(Kind.PROBING, "probing.range")
    networked = command.name not in _NETWORKERS and (_NETWORK.search(text) or "--localnet" in text)
    if networked and (_SCANS.search(text) or _PORTS.search(text) or _TARGETED.search(text)):
        return Finding(Kind.PROBING, "probing.network_shape")
    scans = command.name not in _NETWORKERS and _SCANS.search(text) and _ADDRESS.search(text) and not is_loopback(text)
    if scans and re.search(r"(?:^|\s)(?:-T[0-5]|-Pn|-p[\d-]|-n|-oA|-oN|--open|-v)", text):
        return Finding(Kind.PROBING, "probing.scan_shape")
    return _piped(command)


def _is_option_value(word: str) -> bool:
    return word.replace(",", "").replace("-", "").isdigit()


def _piped(command: Command) -> Finding | None:
    """A range of hosts that is handed to who tries them."""
    if command.name not in NETCATS and command.name not in ("ping", "fping", "curl", "wget", "telnet"):
        return None
    ranged = any(_PLACES.search(source.text) for source in command.sources())
    return Finding(Kind.PROBING, "probing.range") if ranged else None


_LOOPS: Final = (
    (re.compile(r"\b(?:for|while|until)\b"), re.compile(r"\bdo\b"), re.compile(r"\bdone\b")),
    (re.compile(r"\bseq\b"), re.compile(r"\|\s*(?:xargs|parallel)\b"), None),
    (re.compile(r"\bxargs\s+(?:-\S+\s+)*(?:-a|--arg-file)"), re.compile(r"\s"), None),
    (re.compile(r"\bparallel\b"), re.compile(r""), re.compile(r":::")),
    (re.compile(r"\bfor\b"), re.compile(r"\bin\s+range\("), None),
)
"""How a loop begins, where its body begins, and what must stand behind it (the body is what follows to the end)."""
_COUNTED: Final = re.compile(r"\bfor\s+(\w+)\s+in\s+([^;\n]{1,2000})[;\n]\s*do\b")
_SHORT: Final = 400
_MOST_LOOPS: Final = 16
_TRIES: Final = re.compile(
    r"\b(?:ping|fping|nc|ncat|netcat|telnet|curl|wget|timeout\s+\S+\s+bash)\b|/dev/tcp/|connect_ex|socket\.connect|create_connection|\.connect\(\("
    r"|\bsocat\b[^|;&\n]{0,200}\bTCP4?:|\bdig\b[^|;&\n]{0,200}-x\b|\bhost\s+\S*\d\.\$"
)
_VARIED: Final = re.compile(
    r"(?:\d{1,3}\.){1,3}(?:\$\{?\w+\}?|\{\w*\}|%[sd]|['\"]?\s*[+%]\s*(?:str\()?\w+|\{\}|\{\d+\.\.\d+\})|/dev/tcp/[^/\s]{1,253}/\$\{?\w+|"
    r"-z\S{0,64}\s+\S{1,253}\s+\$\{?\w+|connect_ex\(\(\s*\S{1,253},\s*\w+\s*\)\)|\$\{?(?:ip|host|addr|target|subnet|net)\w*\}?|(?i:TCP4?:)\S+:\$\w+"
)
_CODE_TRIES: Final = re.compile(
    r"connect_ex|create_connection|open_connection|socket\.connect|\.connect\(\(|\.connect\(\w|IO::Socket::INET|TCPSocket\.(?:new|open)|fsockopen\(|"
    r"net[\"']?\)?\.connect\(|net\.Dial(?:Timeout)?\(|/inet/tcp/"
)
_CODE_RANGES: Final = re.compile(
    r"\bfor\b[^\n]{0,120}\bin\s+(?:range\(|[^\n]{0,80}(?:ip_network\(|\.hosts\(\)))|ip_network\(|\(?\d{1,6}\.\.\d{1,6}\)?[.){]|<=?\s*\d{2,5}\s*;\s*\$?\w+\+\+|"
    r"\bin range\("
)
_CODE_VARIED: Final = re.compile(
    r"(?:\d{1,3}\.){1,3}(?:\{\w+\}|%[sd]|['\"]\s*[+%.]\s*(?:str\()?\w+|\$\w+|#\{\w+\}|['\"]\s*\w+\s*['\"]?)|:\$_|ip_network\(|"
    r"(?:connect_ex|create_connection|connect|open_connection)\(\(?\s*(?:['\"][^'\"]*['\"]|\w+)\s*,\s*(?:p|port|prt|i)\w*\s*[,)]|"
    r"(?:TCPSocket\.(?:new|open)|fsockopen|connect)\(\s*(?:['\"]\d[^'\"]*['\"]\s*,\s*\$?[a-z]\w*|\$?[a-z]\w*\s*,\s*['\"]\d)"
)


def in_loop(line: Line) -> Finding | None:
    """Many hosts or ports, one after the other."""
    text = line.text
    for loop in itertools.islice(_COUNTED.finditer(text), _MOST_LOOPS):
        variable, listed, body = loop[1], loop[2], text[loop.end() :]
        many = re.search(r"\$\(|`|\{\w+\.\.\w+\}", listed) or len(listed.split()) > 3
        tried = (
            rf"(?:curl|wget)[^;|&\n]{{0,200}}:\$\{{?{variable}\b|"
            rf"(?:nc|ncat|netcat)\s[^;|&\n]{{0,200}}-\w*z[^;|&\n]{{0,200}}\$\{{?{variable}\b|"
            rf"/dev/tcp/\$\{{?{variable}\b"
        )
        if many and re.search(tried, body) and not is_loopback(body):
            return Finding(Kind.PROBING, "probing.loop")
        if _PLACES.search(listed) and _TRIES.search(body) and re.search(rf"\$\{{?{variable}\b", body):
            return Finding(Kind.PROBING, "probing.loop")
    for body in _bodies(text):
        if _TRIES.search(body) and _VARIED.search(body) and not _only_loopback(text):
            return Finding(Kind.PROBING, "probing.loop")
    listed = re.search(r"\bwhile\s+(?:IFS=\S*\s+)?read\s+(?:-\w+\s+)*(\w+)", text)
    if listed and re.search(
        rf"\b(?:nc|ncat|netcat)\s[^;|&\n]{{0,200}}-\w*z[^;|&\n]{{0,200}}\$\{{?{listed[1]}\b|/dev/tcp/\$\{{?{listed[1]}\b",
        text,
    ):
        return Finding(Kind.PROBING, "probing.loop")
    if re.search(r"\bxargs\b[^|;&\n]{0,200}\b(?:nc|ncat|netcat)\b[^|;&\n]{0,200}\s-\w*z", text) and not _only_loopback(
        text
    ):
        return Finding(Kind.PROBING, "probing.loop")
    if (
        _CODE_RANGES.search(text)
        and _CODE_TRIES.search(text)
        and _CODE_VARIED.search(text)
        and not _only_loopback(text)
    ):
        return None if line.only_read else Finding(Kind.PROBING, "probing.code")
    return None


def _bodies(text: str) -> Iterator[str]:
    """The bodies of short loops, and the lines of long ones: what is tried and what varies stand together."""
    joined = text.replace("\\\n", " ")
    for part in re.split(r"\bdone\b", joined, maxsplit=_MOST_LOOPS)[:-1]:
        loop = re.split(r"\bdo\b", part, maxsplit=1)
        if len(loop) == 2 and len(loop[1]) <= _SHORT:
            yield loop[1]
    for begins, body, ends in _LOOPS:
        first = begins.search(joined)
        found = first and body.search(joined, first.end())
        if found and (ends is None or ends.search(joined, found.end())):
            yield from joined[found.end() :].split("\n")


def _only_loopback(text: str) -> bool:
    varied = re.search(r"(?:\d{1,3}\.){1,3}(?:\$|\{|%|['\"])", text)
    return (
        varied is None and is_loopback(text) and all(each.startswith(("127.", "0.")) for each in _ADDRESS.findall(text))
    )
