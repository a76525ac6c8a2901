"""Commands that speak by the names they ask for. Runs later, and live. Pure."""

from __future__ import annotations

import re
from typing import Final

from ray_guard.detect import Finding, Kind
from ray_guard.detect.commands.line import Line
from ray_guard.detect.shell import Command
from ray_guard.detect.wrappers import SHELLS

_PROGRAMS: Final = frozenset(
    "iodine iodined dnscat dnscat2 dns2tcpc dns2tcpd dns2tcp dnscapy dnspot ozymandns dnstt-client dnstt-server dnstt "
    "slipstream-client slipstream-server godns heyoka dnsexfiltrator dnsteal dnsteal.py tuns dnscrypt-tunnel".split()
)
_CLIENTS: Final = frozenset(
    "dig nslookup host drill kdig delv dog doggo q resolvectl getent systemd-resolve ping ping6".split()
)
_SHAPES: Final = re.compile(
    r"(?:^|\s)--dns[= ](?:server|domain|port|type)=|(?:^|\s)-(?:udp|doh|dot)\s+\S+\s.*-pubkey(?:-file)?\s|"
    r"(?:^|\s)-z\s+(?:[\w-]+\.)+[a-z]+\s+\d+\.\d+\.\d+\.\d+$"
)
_RENAMED_IODINE: Final = re.compile(r"^(?:-[fru]+\s+)+(?:-[PIMO]\s?\S+\s+)+(?:\S+\s+)?(?:[\w-]+\.){2,}[a-z]{2,}$")
_ENCODERS: Final = frozenset("xxd base64 base32 hexdump od basenc openssl uuencode gzip sed".split())
_TELLS: Final = re.compile(
    r"\b(?:whoami|id|cat|base64|base32|xxd|uname|env|printenv|hostname|head|od|hexdump|md5sum|echo)\b"
)


def by_program(command: Command, _line: Line) -> Finding | None:
    """Tunnels by name and shape; resolvers that are asked for what was computed, or obeyed."""
    name = command.program
    text = " ".join(command.arguments)
    if command.name in _PROGRAMS or (name in _PROGRAMS and command.arguments):
        return Finding(Kind.DNS_TUNNEL, f"dns.{command.name}") if command.arguments else None
    if _SHAPES.search(text) or _RENAMED_IODINE.search(text):
        return Finding(Kind.DNS_TUNNEL, "dns.tunnel_shape")
    if command.name in SHELLS and "-c" not in command.arguments and _is_told_by_dns(command):
        return Finding(Kind.DNS_TUNNEL, "dns.commands")
    if command.name in ("curl", "wget"):
        return _in_host(text)
    if command.name in _CLIENTS:
        return _asked(command)
    return None


def _is_told_by_dns(command: Command) -> bool:
    return any(source.name in ("dig", "nslookup", "host", "drill", "kdig") for source in command.sources())


def _in_host(text: str) -> Finding | None:
    """Of a URL: a label that a command has said."""
    if re.search(r"(?:^|\s|://)[\w+/-]{8,63}={1,2}\.(?:[\w-]{1,63}\.){1,8}[a-z]{2,}(?:[/:\s]|$)", text):
        return Finding(Kind.DNS_TUNNEL, "dns.encoded_label")
    for computed in re.findall(r"https?://[^\s/$`]{0,80}(?:\$\(([^)]{1,200})\)|`([^`]{1,200})`)\.[\w-]+\.[a-z]", text):
        if _TELLS.search("".join(computed)):
            return Finding(Kind.DNS_TUNNEL, "dns.substituted_label")
    return None


def _asked(command: Command) -> Finding | None:
    encoded = any(source.name in _ENCODERS for source in command.sources())
    for word in command.arguments:
        computed = r"\$\(|`" if command.name.startswith("ping") else r"\$\(|`|\$\{?\w+(?::[^}]*)?\}?\."
        if re.search(computed, word) and re.search(r"\.\w", word):
            return Finding(Kind.DNS_TUNNEL, "dns.substituted_label")
        if any(len(label) >= 40 for label in word.split(".")) and "." in word and "/" not in word:
            return Finding(Kind.DNS_TUNNEL, "dns.long_label")
        if encoded and re.match(r"(?:\{\}|@|%)\.[\w-]+\.", word):
            return Finding(Kind.DNS_TUNNEL, "dns.piped_label")
        if word.startswith("<(") and _TELLS.search(word):
            return Finding(Kind.DNS_TUNNEL, "dns.file_of_names")
    return None


def in_loop(line: Line) -> Finding | None:
    """Names that are put together, one after the other."""
    for loop in re.finditer(r"\b(?:for|while|until)\b", line.text[:4096]):
        if re.search(r"\b(?:dig|nslookup|host)\b[^|;&\n]{0,200}\$\{?\w+\}?\.[\w.-]+", line.text[loop.end() :]):
            return Finding(Kind.DNS_TUNNEL, "dns.loop")
        break
    return None
