"""A command line as its rules see it, and what they ask of hosts. Runs later, and live. Pure."""

from __future__ import annotations

import ipaddress
import re
import socket
from functools import cached_property
from typing import Final

from ray_guard.detect.shell import READERS, Command, commands

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

HOSTS: Final = re.compile(
    r"(?<![a-z0-9+.-])(?:[a-z][a-z0-9+.-]{0,30}://)(?:[^/@\s'\"]{0,200}@)?(\[[^\]\s]{1,60}\]|[^/:\s'\"?#]{1,253})",
    re.IGNORECASE,
)
"""The hosts of the URLs in a text."""
_PRIVATE: Final = tuple(
    map(
        ipaddress.ip_network,
        (
            "10.0.0.0/8",
            "172.16.0.0/12",
            "192.168.0.0/16",
            "127.0.0.0/8",
            "100.64.0.0/10",
            "169.254.0.0/16",
            "0.0.0.0/8",
        ),
    )
)
_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")
_LOOPBACK: Final = re.compile(r"(?i)(?<![\w.-])(?:localhost|127(?:\.\d+){1,3}|0\.0\.0\.0|\[?::1\]?)(?![\w.-])")


class Line:
    """A text and the programs that it starts."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def commands(self) -> tuple[Command, ...]:
        return tuple(commands(self.text))

    @cached_property
    def only_read(self) -> bool:
        """Its words stand in what is searched for, shown or written down, not in what is run."""
        return bool(self.commands) and all(command.name in READERS for command in self.commands)

    @cached_property
    def named_pipes(self) -> frozenset[str]:
        """Files that lead back: made to be pipes, or read in front of a pipeline and written at its end."""
        pipes = {word for each in self.commands if each.name in ("mkfifo", "mknod") for word in each.arguments}
        for each in self.commands:
            written = {redirect.partition(">")[2] for redirect in each.redirects if ">" in redirect}
            for source in each.sources() if written else ():
                pipes |= written.intersection(source.arguments)
                pipes |= written.intersection(
                    redirect.partition("<")[2] for redirect in source.redirects if "<" in redirect
                )
        return frozenset(pipes)

    @cached_property
    def writes(self) -> bool:
        """It writes to a file."""
        return any(">" in each for command in self.commands for each in command.redirects) or any(
            command.name == "tee" for command in self.commands
        )


def is_loopback(text: str) -> bool:
    """Whether a text names this host."""
    return _LOOPBACK.search(text) is not None


def canonical(host: str) -> Address | None:
    """An address in any of the forms that inet_aton takes (decimal, octal, hex, short), IPv6, mapped or translated."""
    text = host.strip("[]").partition("%")[0].removesuffix(".")
    try:
        parsed = ipaddress.ip_address(text)
    except ValueError:
        if not re.fullmatch(r"(?:0[xX][0-9a-fA-F]+|\d+)(?:\.(?:0[xX][0-9a-fA-F]+|\d+)){0,3}", text) or len(text) < 8:
            return None
        try:
            return ipaddress.ip_address(socket.inet_aton(_short(text)))
        except (OSError, ValueError):
            return None
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed in _NAT64 or (int(parsed) >> 32 == 0 and int(parsed) > 0xFFFF):
            return ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
        return parsed.ipv4_mapped or parsed
    return parsed


def _short(text: str) -> str:
    """Without the zeros that inet_aton would count."""
    return ".".join(re.sub(r"^0+(?=0[xX]|0[0-7])", "", part) for part in text.split("."))


def is_outside(host: str) -> bool:
    """Whether a host is an address, and none of a private network."""
    found = canonical(host)
    return isinstance(found, ipaddress.IPv4Address) and not any(found in network for network in _PRIVATE)


def host_of(word: str) -> str:
    """The host in ``[scheme://][user@]host[:port][/…]``."""
    found = HOSTS.search(word)
    if found:
        return found[1]
    return word.rpartition("@")[2].partition("/")[0].partition(":")[0]
