"""What one entry of ``egress.allow`` means, and what an address really is.

Runs in the supervisor, and wherever a policy is read. Standard library only; no I/O, no DNS.

An entry is one of

    index.example.org:443         a name; the port says what is spoken: 443 tls, 80 http, 22 ssh
    tls://index.example.org:8443  any other port says it itself: tls:// http:// ssh:// tcp://
    *.files.example.org:443       one or more labels before files.example.org, never files.example.org itself
    10.20.0.0/16:6379             an address or network, TCP unless udp:// stands before it
    [2001:db8::/32]:443           IPv6 in brackets; [2001:db8::]/32:443 is the same
    10.0.0.0/8:6000-6010          a port range; ``*`` is every port (addresses only)
    unix:///run/some.sock         a unix socket by its path
    cluster, collectives          see DESIGN.md, Roles

Addresses are compared in canonical form (:func:`canonical_address`), because one destination has many spellings. Some
ranges are never reached through a wider rule (:data:`SPECIAL_RANGES`): ``0.0.0.0/0:80`` does not grant the metadata
service; only a rule whose own network lies within that range does.
"""

from __future__ import annotations

import re
import socket
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from ray_guard.errors import PolicyError
from ray_guard.named import NamedTuple

if TYPE_CHECKING:
    import ipaddress


class Transport(StrEnum):
    TCP = "tcp"
    UDP = "udp"
    UNIX = "unix"


class Protocol(StrEnum):
    """What is spoken at a named destination, and so how the name is verified; TCP is not verified."""

    TLS = "tls"
    HTTP = "http"
    SSH = "ssh"
    TCP = "tcp"


class Group(StrEnum):
    """Destinations that are known only at run time."""

    CLUSTER = "cluster"
    COLLECTIVES = "collectives"


class SpecialKind(StrEnum):
    """Why an address is not reached by a wide rule. The values are decision reasons (``ray_guard.egress.reason``)."""

    METADATA = "metadata_address"
    LINK_LOCAL = "link_local_address"
    MULTICAST = "multicast_address"
    BROADCAST = "broadcast_address"
    RESERVED = "reserved_address"
    TRANSITION = "transition_address"


class Address(NamedTuple):
    """A canonical address: ``version`` 4 or 6, ``value`` as an integer."""

    version: int
    value: int


class AddressRange(NamedTuple):
    """An address range, both ends included."""

    version: int
    low: int
    high: int

    @classmethod
    def of(cls, network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> AddressRange:
        return cls(network.version, int(network.network_address), int(network.broadcast_address))

    def contains(self, address: Address) -> bool:
        return self.version == address.version and self.low <= address.value <= self.high

    def within(self, other: AddressRange) -> bool:
        return self.version == other.version and other.low <= self.low and self.high <= other.high


class SpecialRange(NamedTuple):
    """A range that only a rule lying within it can grant."""

    kind: SpecialKind
    range: AddressRange


def _range(network: str) -> AddressRange:
    """What a network of this module's own spans. What others write is read by ipaddress, which takes long to load."""
    address, _, length = network.partition("/")
    packed = socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
    low = int.from_bytes(packed, "big")
    return AddressRange(4 if len(packed) == 4 else 6, low, low | ((1 << 8 * len(packed) - int(length)) - 1))


def _special(kind: SpecialKind, *networks: str) -> tuple[SpecialRange, ...]:
    return tuple(SpecialRange(kind, _range(network)) for network in networks)


SPECIAL_RANGES: Final[tuple[SpecialRange, ...]] = (
    *_special(SpecialKind.LINK_LOCAL, "169.254.0.0/16", "fe80::/10"),
    *_special(
        SpecialKind.METADATA,
        "169.254.169.254/32",  # AWS, GCP, Azure, OpenStack and most others
        "169.254.170.2/32",  # AWS ECS task credentials
        "169.254.170.23/32",  # AWS EKS pod identity
        "169.254.0.23/32",  # Tencent Cloud
        "100.100.100.200/32",  # Alibaba Cloud
        "168.63.129.16/32",  # Azure wire server
        "192.0.0.192/32",  # Oracle Cloud Classic
        "fd00:ec2::254/128",  # AWS
        "fd00:ec2::23/128",  # AWS EKS pod identity
        "fd20:ce::254/128",  # GCP
        "fd00:c1::a9fe:a9fe/128",  # Oracle Cloud
        "fd00:100::100:200/128",  # Alibaba Cloud
        "fd00:42::42/128",  # Scaleway
        "fe80::a9fe:a9fe/128",  # OpenStack
    ),
    *_special(SpecialKind.MULTICAST, "224.0.0.0/4", "ff00::/8"),
    *_special(SpecialKind.RESERVED, "0.0.0.0/8", "240.0.0.0/4"),
    *_special(SpecialKind.BROADCAST, "255.255.255.255/32"),
)

_LOOPBACK_4: Final = _range("127.0.0.0/8")
_LOOPBACK_6: Final = Address(6, 1)
_MAPPED_PREFIX: Final = bytes(10) + b"\xff\xff"
_MAPPED: Final = _range("::ffff:0:0/96")

_COMPATIBLE: Final = _range("::/96")  # ::a.b.c.d
_TRANSLATED: Final = _range("::ffff:0:0:0/96")  # SIIT, RFC 2765
_NAT64: Final = _range("64:ff9b::/96")
_NAT64_LOCAL: Final = _range("64:ff9b:1::/48")
_SIX_TO_FOUR: Final = _range("2002::/16")
_TEREDO: Final = _range("2001::/32")
_ISATAP_MARK: Final = frozenset({0x00005EFE, 0x02005EFE})  # bits 32-63 of the interface identifier


def _embedded(address: Address) -> tuple[AddressRange, tuple[int, ...]] | None:
    """The transition range that ``address`` lies in and the IPv4 addresses it may lead to; None: it is none."""
    value = address.value
    if address.version != 6 or address == _LOOPBACK_6:
        return None
    low = value & 0xFFFFFFFF
    for prefix in (_COMPATIBLE, _TRANSLATED, _NAT64):
        if prefix.contains(address):
            return prefix, (low,)
    if _NAT64_LOCAL.contains(address):
        # RFC 6052 lets an operator put the IPv4 address at any of these places below the /48; all are candidates.
        after_48 = (value >> 64 & 0xFFFF) << 16 | (value >> 40 & 0xFFFF)
        after_56 = (value >> 64 & 0xFF) << 24 | (value >> 32 & 0xFFFFFF)
        after_64 = value >> 24 & 0xFFFFFFFF
        return _NAT64_LOCAL, (low, after_48, after_56, after_64)
    if _SIX_TO_FOUR.contains(address):
        return _SIX_TO_FOUR, (value >> 80 & 0xFFFFFFFF,)
    if _TEREDO.contains(address):
        return _TEREDO, (low ^ 0xFFFFFFFF, value >> 64 & 0xFFFFFFFF)
    if value >> 32 & 0xFFFFFFFF in _ISATAP_MARK:
        # ISATAP has no prefix of its own: its mark stands in the interface identifier, below any /64.
        base = value >> 32 << 32
        return AddressRange(6, base, base | 0xFFFFFFFF), (low,)
    return None


def special_ranges(address: Address) -> tuple[SpecialRange, ...]:
    """Every range that a rule must lie within to grant ``address``, the narrowest last; empty for ordinary ones."""
    found = [special for special in SPECIAL_RANGES if special.range.contains(address)]
    embedded = _embedded(address)
    if embedded is not None:
        prefix, inner = embedded
        found.append(SpecialRange(SpecialKind.TRANSITION, prefix))
        itself = AddressRange(6, address.value, address.value)
        for value in inner:
            kinds = [special.kind for special in SPECIAL_RANGES if special.range.contains(Address(4, value))]
            if kinds and (kinds[-1] is not SpecialKind.RESERVED or len(inner) == 1):  # zeros are no address but padding
                found.append(SpecialRange(kinds[-1], itself))
            elif _LOOPBACK_4.contains(Address(4, value)):
                found.append(SpecialRange(SpecialKind.TRANSITION, itself))
    return tuple(sorted(found, key=lambda special: special.range.low - special.range.high))


def canonical_packed(packed: bytes) -> str:
    """The canonical text of an address as it stands in a sockaddr (4 or 16 bytes, network order).

    IPv4-mapped IPv6 is IPv4, and 0.0.0.0 and ``::`` are loopback, because that is where the kernel connects them to.
    Raises ValueError for any other length.
    """
    if len(packed) == 16 and packed.startswith(_MAPPED_PREFIX):
        packed = packed[12:]
    if len(packed) == 4:
        return socket.inet_ntop(socket.AF_INET, packed) if packed != b"\0\0\0\0" else "127.0.0.1"
    if len(packed) == 16:
        return socket.inet_ntop(socket.AF_INET6, packed) if any(packed) else "::1"
    raise ValueError(f"an address has 4 or 16 bytes, not {len(packed)}")


def _packed(text: str) -> bytes:
    import ipaddress  # with the first address that is written out: most tools are granted none

    return ipaddress.ip_address(text).packed


def canonical_address(text: str) -> str:
    """The canonical text of an address; an IPv6 zone (``%eth0``) is dropped: rules do not speak of interfaces.

    Idempotent. Raises ValueError for anything that is not an address in ordinary notation (``127.1`` is not).
    """
    return canonical_packed(_packed(text))


def parse_address(text: str) -> Address:
    """The canonical address as an integer. Raises ValueError as :func:`canonical_address` does."""
    packed = _packed(canonical_address(text))
    return Address(4 if len(packed) == 4 else 6, int.from_bytes(packed, "big"))


def is_address(text: str) -> bool:
    """Whether a host is an address, and no name."""
    try:
        canonical_address(text)
    except ValueError:
        return False
    return True


def is_loopback(address: Address) -> bool:
    return address == _LOOPBACK_6 or _LOOPBACK_4.contains(address)


# Rules ---------------------------------------------------------------------------------------------------------------


class PortRange(NamedTuple):
    """Ports ``first`` to ``last``, both included."""

    first: int
    last: int

    def __contains__(self, port: object) -> bool:
        return isinstance(port, int) and self.first <= port <= self.last

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


ANY_PORT: Final = PortRange(1, 65535)


class AddressRule(NamedTuple):
    text: str
    transport: Transport
    range: AddressRange
    ports: PortRange

    @property
    def literal(self) -> bool:
        """Whether the rule names one single address."""
        return self.range.low == self.range.high

    def grants(self, address: Address, specials: tuple[SpecialRange, ...]) -> bool:
        """Whether the rule reaches ``address``, whose :func:`special_ranges` are ``specials``, at one of its ports."""
        return self.range.contains(address) and all(self.range.within(special.range) for special in specials)


class NameRule(NamedTuple):
    text: str
    name: str
    """Lower case, without the ``*.`` of a wildcard."""
    wildcard: bool
    ports: PortRange
    protocol: Protocol

    @property
    def transport(self) -> Transport:
        return Transport.TCP

    def matches(self, name: str) -> bool:
        """Whether the rule grants ``name``, given in canonical form (:func:`canonical_name`)."""
        return name.endswith("." + self.name) if self.wildcard else name == self.name


class UnixRule(NamedTuple):
    text: str
    path: str

    @property
    def transport(self) -> Transport:
        return Transport.UNIX


class GroupRule(NamedTuple):
    text: str
    group: Group


Rule = AddressRule | NameRule | UnixRule | GroupRule


class _RefusedError(Exception):
    """Carries the remedy out of the parser; never leaves this module."""


_GROUPS: Final = {group.value: group for group in Group}
_SCHEMES: Final = ("tls", "http", "ssh", "tcp", "udp", "unix")
_PROTOCOL_OF_PORT: Final = {443: Protocol.TLS, 80: Protocol.HTTP, 22: Protocol.SSH}
_PORT: Final = r"[1-9][0-9]{0,4}\Z"
_LABEL: Final = r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?\Z"
_NUMBER_LABEL: Final = r"(?:[0-9]+|0[xX][0-9a-fA-F]*)\Z"
_PREFIX_LENGTH: Final = r"(?:0|[1-9][0-9]{0,2})\Z"
_UNIX_PATH_BYTES: Final = 107  # sun_path less its NUL
# Second-level labels below which country registries sell names: *.co.uk is as wide as *.com.
_REGISTRY_LABELS: Final = frozenset(
    {"ac", "co", "com", "edu", "go", "gob", "gov", "ltd", "mil", "ne", "net", "or", "org"}
)


def canonical_name(text: str) -> str:
    """The lower-case form of a host name of letters, digits and hyphens.

    Raises ValueError for anything else: other characters (NUL included), an empty or over-long label, more than 253
    characters, a trailing dot, and what a resolver would read as an address (``0x7f.1``).
    """
    try:
        return _name(text)
    except _RefusedError as refused:
        raise ValueError(str(refused)) from None


def parse_rule(entry: object, *, key: str = "egress.allow") -> Rule:
    """The rule that ``entry`` states. Raises :class:`PolicyError` naming ``key``, the entry and what would be right."""
    if not isinstance(entry, str):
        raise PolicyError(key, entry, 'a destination is text, such as "index.example.org:443"; put it in quotes')
    try:
        return _rule(entry)
    except _RefusedError as refused:
        raise PolicyError(key, entry, str(refused)) from None


def parse_ports(text: str) -> PortRange:
    """``443`` or ``6000-6010``. Raises ValueError saying what would be right."""
    try:
        return _ports(text)
    except _RefusedError as refused:
        raise ValueError(str(refused)) from None


def parse_endpoint(text: str) -> tuple[str, int]:
    """``host:port`` with one port: the host as a canonical name or address, and the port. Raises ValueError."""
    if not text.isprintable():
        raise ValueError("it has no control characters")
    try:
        host, ports = _split(text)
        if ports.first != ports.last:
            raise _RefusedError("one port, not a range")
        if host.startswith("["):
            return canonical_address(host[1:-1]), ports.first
        try:
            return canonical_address(host), ports.first
        except ValueError:
            return _name(host), ports.first
    except _RefusedError as refused:
        raise ValueError(str(refused)) from None


def _rule(entry: str) -> Rule:
    if entry in _GROUPS:
        return GroupRule(entry, _GROUPS[entry])
    if entry.lower().startswith("unix:"):
        return _unix_rule(entry)
    if any(character.isspace() or not character.isprintable() for character in entry):
        raise _RefusedError("a destination has no spaces or control characters")
    scheme, separator, rest = entry.partition("://")
    scheme = scheme.lower()
    if not separator:
        scheme, rest = "", entry
    elif scheme not in _SCHEMES:
        hint = {"https": "tls", "wss": "tls", "ws": "http", "sftp": "ssh", "git+ssh": "ssh"}.get(scheme)
        raise _RefusedError(
            f"write {hint}:// for it: a rule says what is spoken, then host:port"
            if hint
            else "the prefixes are tls:// http:// ssh:// tcp:// udp:// and unix:///path"
        )
    host, ports = _split(rest)
    network = _network(host, ports)
    if network is not None:
        return _address_rule(entry, scheme, network, ports)
    return _name_rule(entry, scheme, host, ports)


def _split(rest: str) -> tuple[str, PortRange]:
    """Host (brackets kept, a prefix length moved into them) and ports of ``host:ports``."""
    if rest.startswith("["):
        inside, closing, after = rest[1:].partition("]")
        if not closing:
            raise _RefusedError("the bracket is not closed: write [2001:db8::1]:443")
        if after.startswith("/"):
            length, _, port = after[1:].partition(":")
            if "/" in inside:
                raise _RefusedError("one prefix length is enough: write [2001:db8::/32]:443")
            inside = f"{inside}/{length}"
            after = f":{port}" if _ else ""
        if not after.startswith(":"):
            raise _RefusedError("the port is missing: write [2001:db8::1]:443")
        return f"[{inside}]", _ports(after[1:], any_port=True)
    host, colon, port = rest.rpartition(":")
    if not colon:
        raise _RefusedError(f"the port is missing: write {rest}:443" if rest else "write host:port")
    if ":" in host:
        raise _RefusedError("an IPv6 address stands in brackets: write [2001:db8::1]:443")
    if not host:
        raise _RefusedError("the host is missing: write host:port; every address is 0.0.0.0/0:PORT and [::/0]:PORT")
    return host, _ports(port, any_port=True)


def _ports(text: str, *, any_port: bool = False) -> PortRange:
    if text == "*" and any_port:
        return ANY_PORT
    first, dash, last = text.partition("-")
    bounds = (first, last) if dash else (first, first)
    if "/" in text:
        raise _RefusedError("a rule ends with the port: it speaks of hosts, not paths; a prefix length comes before it")
    if not all(re.match(_PORT, bound) and int(bound) <= 65535 for bound in bounds):
        raise _RefusedError("a port is a number from 1 to 65535, a range is 6000-6010")
    ports = PortRange(int(bounds[0]), int(bounds[1]))
    if ports.first > ports.last:
        raise _RefusedError(f"the range is backwards: write {ports.last}-{ports.first}")
    return ports


def _network(host: str, ports: PortRange) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    """The network that ``host`` states; None when it is a name."""
    import ipaddress

    bracketed = host.startswith("[")
    text = host[1:-1] if bracketed else host
    address, slash, length = text.partition("/")
    if "%" in address:
        raise _RefusedError("leave out the zone (%…): it is an interface of one host; rules hold on every one")
    try:
        network = ipaddress.ip_network(address)
    except ValueError:
        if bracketed:
            raise _RefusedError("brackets hold an IPv6 address: write [2001:db8::1]:443") from None
        if slash:
            raise _RefusedError("a network is written 10.20.0.0/16:443, or [2001:db8::/32]:443") from None
        return None
    if bracketed and network.version == 4:
        raise _RefusedError(f"an IPv4 address has no brackets: write {text}:{ports}")
    if slash:
        if not re.match(_PREFIX_LENGTH, length) or int(length) > network.max_prefixlen:
            raise _RefusedError(f"the prefix length is a number from 0 to {network.max_prefixlen}")
        try:
            network = ipaddress.ip_network(text)
        except ValueError:
            wide = ipaddress.ip_network(text, strict=False)
            raise _RefusedError(f"the address has bits beyond its prefix: write {wide} or {address} alone") from None
    if network.version == 6 and AddressRange.of(network).within(_MAPPED):
        inner = int(network.network_address) & 0xFFFFFFFF
        network = ipaddress.IPv4Network((inner, network.prefixlen - 96))
    if network.num_addresses == 1 and int(network.network_address) == 0:
        loopback, every = ("127.0.0.1", "0.0.0.0/0") if network.version == 4 else ("[::1]", "[::/0]")
        raise _RefusedError(f"it means loopback: write {loopback}:{ports}, or {every}:{ports} for every address")
    return network


def _address_rule(
    entry: str, scheme: str, network: ipaddress.IPv4Network | ipaddress.IPv6Network, ports: PortRange
) -> AddressRule:
    if scheme not in ("", "tcp", "udp"):
        raise _RefusedError(f"{scheme}:// verifies a name; an address has none: leave the prefix out, or write tcp://")
    transport = Transport.UDP if scheme == "udp" else Transport.TCP
    return AddressRule(entry, transport, AddressRange.of(network), ports)


def _name_rule(entry: str, scheme: str, host: str, ports: PortRange) -> NameRule:
    wildcard = host.startswith("*.")
    if host == "*":
        raise _RefusedError("every name would be allowed: list names, or *.example.org, or 0.0.0.0/0 for every address")
    if "*" in (host[2:] if wildcard else host):
        raise _RefusedError("a wildcard stands for whole labels at the front: write *.example.org")
    name = _name(host[2:] if wildcard else host)
    if wildcard:
        labels = name.split(".")
        if len(labels) < 2 or (len(labels) == 2 and labels[0] in _REGISTRY_LABELS and len(labels[1]) == 2):
            raise _RefusedError(f"everybody can have a name below {name}: write *.example.{name}, or list the names")
    if ports == ANY_PORT:
        raise _RefusedError("a name needs its port: what is spoken there is verified; only addresses take *")
    if scheme == "udp":
        raise _RefusedError("names are verified over TCP alone: for UDP list the address, udp://192.0.2.7:123")
    if scheme:
        return NameRule(entry, name, wildcard, ports, Protocol(scheme))
    protocol = _PROTOCOL_OF_PORT.get(ports.first) if ports.first == ports.last else None
    if protocol is None:
        raise _RefusedError(f"say what is spoken at port {ports}: tls://{host}:{ports}, http://…, ssh://… or tcp://…")
    return NameRule(entry, name, wildcard, ports, protocol)


def _name(text: str) -> str:
    if not text.isascii():
        raise _RefusedError("a name is letters, digits and hyphens: write an international name in punycode (xn--…)")
    name = text.lower()
    if name.endswith("."):
        raise _RefusedError("leave out the trailing dot")
    labels = name.split(".")
    if len(name) > 253 or any(len(label) > 63 for label in labels):
        raise _RefusedError("a name has at most 253 characters, and 63 between two dots")
    # What every resolver reads as an address must not pass as a name: inet_aton knows 127.1, 0x7f.1 and 2130706433.
    if re.match(_NUMBER_LABEL, labels[-1]):
        raise _RefusedError(_plain_spelling(name))
    if not all(re.match(_LABEL, label) for label in labels):
        raise _RefusedError("a name is letters, digits and hyphens between dots, such as index.example.org")
    return name


def _plain_spelling(name: str) -> str:
    try:
        plain = socket.inet_ntoa(socket.inet_aton(name))
    except (OSError, ValueError):
        return "a name does not end in a number; an IPv4 address is four numbers from 0 to 255, such as 192.0.2.7"
    return f"write the address in full: {plain}"


def _unix_rule(entry: str) -> UnixRule:
    if not entry.startswith("unix:///"):
        raise _RefusedError("a unix socket is given by its absolute path: unix:///run/some.sock; not an abstract one")
    path = entry[len("unix://") :]
    if not path.isprintable():
        raise _RefusedError("the path holds a control character")
    parts = path[1:].split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise _RefusedError("write the path of the socket itself, without //, . or .. and no slash at its end")
    try:
        size = len(path.encode())
    except UnicodeEncodeError:
        raise _RefusedError("the path is not valid text") from None
    if size > _UNIX_PATH_BYTES:
        raise _RefusedError(f"a socket's path has at most {_UNIX_PATH_BYTES} bytes")
    return UnixRule(entry, path)
