"""Entries of ``egress.allow``: what is understood, what is refused and with which remedy, and what a rule reaches."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_guard.errors import PolicyError
from ray_guard.policy.destination import (
    ANY_PORT,
    SPECIAL_RANGES,
    AddressRule,
    Group,
    GroupRule,
    NameRule,
    PortRange,
    Protocol,
    SpecialKind,
    Transport,
    UnixRule,
    canonical_name,
    parse_address,
    parse_endpoint,
    parse_ports,
    parse_rule,
    special_ranges,
)


def reaches(entry: str, address: str) -> bool:
    rule = parse_rule(entry)
    assert isinstance(rule, AddressRule)
    parsed = parse_address(address)
    return rule.grants(parsed, special_ranges(parsed))


# Understood ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "name", "wildcard", "ports", "protocol"),
    [
        ("index.example.org:443", "index.example.org", False, PortRange(443, 443), Protocol.TLS),
        ("index.example.org:80", "index.example.org", False, PortRange(80, 80), Protocol.HTTP),
        ("index.example.org:22", "index.example.org", False, PortRange(22, 22), Protocol.SSH),
        ("tls://index.example.org:8443", "index.example.org", False, PortRange(8443, 8443), Protocol.TLS),
        ("tcp://db.example.org:5432", "db.example.org", False, PortRange(5432, 5432), Protocol.TCP),
        ("http://mirror.example.org:8000-8010", "mirror.example.org", False, PortRange(8000, 8010), Protocol.HTTP),
        ("http://odd.example.org:443", "odd.example.org", False, PortRange(443, 443), Protocol.HTTP),
        ("SSH://Git.Example.ORG:2222", "git.example.org", False, PortRange(2222, 2222), Protocol.SSH),
        ("*.files.example.org:443", "files.example.org", True, PortRange(443, 443), Protocol.TLS),
        ("redis:443", "redis", False, PortRange(443, 443), Protocol.TLS),
        ("xn--bcher-kva.example:443", "xn--bcher-kva.example", False, PortRange(443, 443), Protocol.TLS),
        ("1.example:443", "1.example", False, PortRange(443, 443), Protocol.TLS),
    ],
)
def test_names(entry: str, name: str, wildcard: bool, ports: PortRange, protocol: Protocol) -> None:
    assert parse_rule(entry) == NameRule(entry, name, wildcard, ports, protocol)


@pytest.mark.parametrize(
    ("entry", "transport", "network", "ports"),
    [
        ("10.0.0.1:8000", Transport.TCP, "10.0.0.1/32", PortRange(8000, 8000)),
        ("10.20.0.0/16:6379", Transport.TCP, "10.20.0.0/16", PortRange(6379, 6379)),
        ("10.0.0.0/8:6000-6010", Transport.TCP, "10.0.0.0/8", PortRange(6000, 6010)),
        ("10.0.0.0/8:*", Transport.TCP, "10.0.0.0/8", ANY_PORT),
        ("tcp://10.0.0.1:8000", Transport.TCP, "10.0.0.1/32", PortRange(8000, 8000)),
        ("udp://192.0.2.7:123", Transport.UDP, "192.0.2.7/32", PortRange(123, 123)),
        ("[2001:db8::/32]:443", Transport.TCP, "2001:db8::/32", PortRange(443, 443)),
        ("[2001:db8::]/32:443", Transport.TCP, "2001:db8::/32", PortRange(443, 443)),
        ("udp://[2001:DB8::1]:53", Transport.UDP, "2001:db8::1/128", PortRange(53, 53)),
        ("[::1]:1-65535", Transport.TCP, "::1/128", ANY_PORT),
        ("0.0.0.0/0:443", Transport.TCP, "0.0.0.0/0", PortRange(443, 443)),
        ("[::/0]:443", Transport.TCP, "::/0", PortRange(443, 443)),
        # IPv4-mapped IPv6 is IPv4
        ("[::ffff:10.0.0.0/104]:443", Transport.TCP, "10.0.0.0/8", PortRange(443, 443)),
        ("[::ffff:a00:1]:443", Transport.TCP, "10.0.0.1/32", PortRange(443, 443)),
    ],
)
def test_addresses(entry: str, transport: Transport, network: str, ports: PortRange) -> None:
    rule = parse_rule(entry)
    expected = ipaddress.ip_network(network)
    assert isinstance(rule, AddressRule)
    assert (rule.text, rule.transport, rule.ports) == (entry, transport, ports)
    assert rule.range == (expected.version, int(expected.network_address), int(expected.broadcast_address))
    assert rule.literal == (expected.num_addresses == 1)


def test_unix_sockets_and_groups() -> None:
    assert parse_rule("unix:///run/some.sock") == UnixRule("unix:///run/some.sock", "/run/some.sock")
    assert parse_rule("unix:///run/mit Leerzeichen/ü.sock") == UnixRule(
        "unix:///run/mit Leerzeichen/ü.sock", "/run/mit Leerzeichen/ü.sock"
    )
    assert parse_rule("cluster") == GroupRule("cluster", Group.CLUSTER)
    assert parse_rule("collectives") == GroupRule("collectives", Group.COLLECTIVES)


# Refused, with the remedy -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "remedy"),
    [
        # not a destination at all
        (5, "put it in quotes"),
        (None, "put it in quotes"),
        (["10.0.0.1:80"], "put it in quotes"),
        ("", "write host:port"),
        ("*", "port is missing"),
        ("Cluster", "port is missing"),
        # port missing or impossible
        ("index.example.org", "write index.example.org:443"),
        ("tls://index.example.org", "port is missing"),
        ("index.example.org:", "a port is a number"),
        ("index.example.org:0", "a port is a number"),
        ("index.example.org:65536", "a port is a number"),
        ("index.example.org:0443", "a port is a number"),
        ("index.example.org:+443", "a port is a number"),
        ("index.example.org:https", "a port is a number"),
        ("index.example.org:٤٤٣", "a port is a number"),
        ("10.0.0.1:6010-6000", "write 6000-6010"),
        ("10.0.0.1:-5", "a port is a number"),
        (":443", "host is missing"),
        ("index.example.org:443/simple", "hosts, not paths"),
        ("http://index.example.org:80/", "hosts, not paths"),
        ("10.0.0.1:443/8", "prefix length comes before"),
        # what is spoken
        ("index.example.org:8443", "tls://index.example.org:8443"),
        ("index.example.org:443-444", "say what is spoken"),
        ("index.example.org:*", "a name needs its port"),
        ("https://index.example.org:443", "write tls://"),
        ("ftp://index.example.org:21", "the prefixes are"),
        ("udp://index.example.org:123", "list the address"),
        ("tls://10.0.0.1:443", "verifies a name"),
        # names that are none
        ("index.example.org.:443", "trailing dot"),
        ("index..example.org:443", "letters, digits and hyphens"),
        (".example.org:443", "letters, digits and hyphens"),
        ("-a.example.org:443", "letters, digits and hyphens"),
        ("a-.example.org:443", "letters, digits and hyphens"),
        ("under_score.example.org:443", "letters, digits and hyphens"),
        ("user@example.org:443", "letters, digits and hyphens"),
        ("%69ndex.example.org:443", "leave out the zone"),
        ("index.example.org\0.evil.test:443", "control characters"),
        ("index example.org:443", "no spaces"),
        (" index.example.org:443", "no spaces"),
        ("index.example.org:443\n", "no spaces"),
        ("bücher.example:443", "punycode"),
        ("\uff45xample.org:443", "punycode"),  # full-width letters that some resolvers fold
        ("example\u3002org:443", "punycode"),  # an ideographic full stop
        ("a" * 64 + ".org:443", "63 between two dots"),
        (".".join(["a" * 63] * 4) + ":443", "at most 253"),
        # legacy spellings of addresses
        ("127.1:80", "in full: 127.0.0.1"),
        ("0x7f.1:80", "in full: 127.0.0.1"),
        ("2130706433:80", "in full: 127.0.0.1"),
        ("0177.0.0.1:80", "in full: 127.0.0.1"),
        ("0xA9FEA9FE:80", "in full: 169.254.169.254"),
        ("1.2.3.4.5:80", "four numbers"),
        ("999.0.0.1:80", "four numbers"),
        ("example.0x:443", "four numbers"),
        ("*.0x7f.1:443", "in full: 127.0.0.1"),
        # wildcards
        ("*:443", "every name"),
        ("*.com:443", "everybody can have a name below com"),
        ("*.co.uk:443", "everybody can have a name below co.uk"),
        ("*.:443", "trailing dot|letters"),
        ("*.*.example.org:443", "whole labels at the front"),
        ("files.*.example.org:443", "whole labels at the front"),
        ("f*.example.org:443", "whole labels at the front"),
        ("*example.org:443", "whole labels at the front"),
        # addresses and networks
        ("10.20.3.4/16:6379", "10.20.0.0/16 or 10.20.3.4 alone"),
        ("10.0.0.0/33:80", "0 to 32"),
        ("10.0.0.0/255.0.0.0:80", "0 to 32"),
        ("10.0.0.0/08:80", "0 to 32"),
        ("10.0.0.0/:80", "0 to 32"),
        ("10.0.0.0/8", "port is missing"),
        ("example.org/24:443", "a network is written"),
        ("[2001:db8::/129]:443", "0 to 128"),
        ("[2001:db8::/32]/32:443", "one prefix length"),
        ("2001:db8::1:443", "in brackets"),
        ("[2001:db8::1:443", "not closed"),
        ("[2001:db8::1]", "port is missing"),
        ("[2001:db8::1]443", "port is missing"),
        ("[10.0.0.1]:443", "no brackets"),
        ("[example.org]:443", "brackets hold an IPv6 address"),
        ("[fe80::1%eth0]:443", "zone"),
        ("0.0.0.0:80", "write 127.0.0.1:80"),
        ("[::]:80", r"write \[::1\]:80"),
        ("[::ffff:0.0.0.0]:80", "write 127.0.0.1:80"),
        # unix sockets
        ("unix://run/some.sock", "absolute path"),
        ("unix:/run/some.sock", "absolute path"),
        ("unix://@abstract", "absolute path"),
        ("unix:///", "socket itself"),
        ("unix:///run/../etc/x.sock", "socket itself"),
        ("unix:///run//x.sock", "socket itself"),
        ("unix:///run/x.sock/", "socket itself"),
        ("unix:///run/x\0.sock", "control character"),
        ("unix:///" + "a" * 107, "at most 107"),
    ],
)
def test_refused_entries_name_themselves_and_the_remedy(entry: object, remedy: str) -> None:
    with pytest.raises(PolicyError, match=remedy) as caught:
        parse_rule(entry, key="egress.allow[2]")
    assert caught.value.key == "egress.allow[2]"
    assert caught.value.value == entry


@given(st.one_of(st.text(), st.from_regex(r"(tls://|udp://|unix://)?[\[\]*a-z0-9.:/%x-]{0,30}(:[0-9*-]{1,8})?")))
def test_no_text_raises_anything_but_a_policy_error(text: str) -> None:
    try:
        rule = parse_rule(text)
    except PolicyError:
        return
    assert rule.text == text


@given(st.from_regex(r"[a-z0-9-]{1,12}(\.[a-z0-9-]{1,12}){0,3}:443", fullmatch=True))
def test_what_a_resolver_reads_as_an_address_is_never_a_name(text: str) -> None:
    """Whatever inet_aton understands must not become a name rule: the name would be looked up nowhere."""
    import socket

    host = text.rpartition(":")[0]
    try:
        socket.inet_aton(host)
    except OSError:
        return
    try:
        rule = parse_rule(text)
    except PolicyError:
        return
    assert isinstance(rule, AddressRule)


def test_canonical_names() -> None:
    assert canonical_name("Index.Example.ORG") == "index.example.org"
    for bad in ("", "a.", "a..b", "a_b", "a\0b", "127.1", "0x7f000001", "ä.example"):
        with pytest.raises(ValueError, match=r"."):
            canonical_name(bad)


def test_ports_and_endpoints() -> None:
    assert parse_ports("443") == PortRange(443, 443)
    assert str(parse_ports("6000-6010")) == "6000-6010"
    assert parse_endpoint("engine.example.org:8000") == ("engine.example.org", 8000)
    assert parse_endpoint("[2001:DB8::1]:8000") == ("2001:db8::1", 8000)
    assert parse_endpoint("[::ffff:10.0.0.1]:8000") == ("10.0.0.1", 8000)
    for bad in ("*", "0", "5-", "x"):
        with pytest.raises(ValueError, match=r"."):
            parse_ports(bad)
    for bad in ("host", "host:*", "host:1-2", "127.1:80", "[x]:80", "a/b:80", "2001:db8::1:80", ""):
        with pytest.raises(ValueError, match=r"."):
            parse_endpoint(bad)


# What a rule reaches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "matched"),
    [
        ("a.files.example.org", True),
        ("a.b.files.example.org", True),
        ("files.example.org", False),  # the apex is another host
        ("evilfiles.example.org", False),  # a lookalike
        ("a.files.example.org.evil.test", False),
        ("a.files.example.com", False),
        ("example.org", False),
    ],
)
def test_wildcards(name: str, matched: bool) -> None:
    rule = parse_rule("*.files.example.org:443")
    assert isinstance(rule, NameRule)
    assert rule.matches(name) is matched


_label = st.from_regex(r"[a-z]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True)


@given(_label, st.lists(_label, min_size=1, max_size=3))
def test_a_wildcard_matches_labels_before_it_and_nothing_else(front: str, labels: list[str]) -> None:
    rule = parse_rule("*.files.example.org:443")
    assert isinstance(rule, NameRule)
    assert rule.matches(".".join([*labels, "files.example.org"]))
    assert not rule.matches("files.example.org")
    assert not rule.matches(front + "files.example.org")
    assert not rule.matches("files.example.org." + ".".join(labels))


def test_a_plain_name_matches_itself_alone() -> None:
    rule = parse_rule("index.example.org:443")
    assert isinstance(rule, NameRule)
    assert rule.matches("index.example.org")
    assert not rule.matches("a.index.example.org")


@pytest.mark.parametrize(
    ("entry", "address", "reached"),
    [
        ("10.0.0.0/8:80", "10.255.255.255", True),
        ("10.0.0.0/8:80", "11.0.0.0", False),
        ("10.0.0.0/8:80", "9.255.255.255", False),
        ("10.0.0.0/8:80", "::ffff:10.1.2.3", True),
        ("0.0.0.0/0:80", "8.8.8.8", True),
        ("0.0.0.0/0:80", "2001:db8::1", False),
        ("[::/0]:80", "2001:db8::1", True),
        ("[::/0]:80", "::ffff:8.8.8.8", False),  # that is IPv4, and [::/0] is every IPv6 address
        ("127.0.0.1:80", "0.0.0.0", True),  # where the kernel connects it to
        ("[::1]:80", "::", True),
        # metadata and link-local: only what lies within them
        ("0.0.0.0/0:80", "169.254.169.254", False),
        ("169.254.0.0/16:80", "169.254.1.1", True),
        ("169.254.0.0/16:80", "169.254.169.254", False),
        ("169.254.169.254:80", "169.254.169.254", True),
        ("100.64.0.0/10:80", "100.100.100.200", False),
        ("100.100.100.200:80", "100.100.100.200", True),
        ("168.0.0.0/8:80", "168.63.129.16", False),
        ("[fd00::/8]:80", "fd00:ec2::254", False),
        ("[fd00:ec2::254]:80", "fd00:ec2::254", True),
        ("[fe80::/10]:80", "fe80::1", True),
        ("[::/0]:80", "fe80::1%eth0", False),
        # multicast and broadcast
        ("0.0.0.0/0:80", "224.0.0.1", False),
        ("224.0.0.0/4:80", "239.1.2.3", True),
        ("0.0.0.0/0:80", "255.255.255.255", False),
        ("240.0.0.0/4:80", "255.255.255.255", False),
        ("255.255.255.255:80", "255.255.255.255", True),
        ("[::/0]:80", "ff02::1", False),
        # IPv6 that carries an IPv4 address: the wider rule must not smuggle it out
        ("[::/0]:80", "::10.0.0.1", False),
        ("[::/96]:80", "::10.0.0.1", True),
        ("[::/0]:80", "64:ff9b::10.0.0.1", False),
        ("[64:ff9b::/96]:80", "64:ff9b::10.0.0.1", True),
        ("[64:ff9b::/32]:80", "64:ff9b::10.0.0.1", False),
        ("[64:ff9b:1::/48]:80", "64:ff9b:1::10.0.0.1", True),
        ("[::/0]:80", "64:ff9b:1::10.0.0.1", False),
        ("[2000::/3]:80", "2002:a00:1::1", False),
        ("[2002::/16]:80", "2002:a00:1::1", True),
        ("[2000::/3]:80", "2001:0:4136:e378:8000:63bf:3fff:fdd2", False),
        ("[2001::/32]:80", "2001:0:4136:e378:8000:63bf:3fff:fdd2", True),
        ("[2001:db8::/32]:80", "2001:db8::5efe:10.0.0.1", False),  # ISATAP
        ("[2001:db8::5efe:10.0.0.1]:80", "2001:db8::5efe:10.0.0.1", True),
        # … and what they carry is special itself: only the very address
        ("[64:ff9b::/96]:80", "64:ff9b::169.254.169.254", False),
        ("[64:ff9b::169.254.169.254]:80", "64:ff9b::169.254.169.254", True),
        ("[64:ff9b:1::/48]:80", "64:ff9b:1:a9fe:a9:fe00::", False),
        ("[64:ff9b:1::/48]:80", "64:ff9b:1:a9:fe:a9fe::", False),
        ("[2002::/16]:80", "2002:a9fe:a9fe::1", False),
        ("[::/96]:80", "::127.0.0.1", False),
        ("[2001::/32]:80", "2001:0:4136:e378:8000:63bf:5601:5601", False),  # the client's address is inverted
    ],
)
def test_reach(entry: str, address: str, reached: bool) -> None:
    assert reaches(entry, address) is reached


def test_a_special_address_is_named_by_its_narrowest_range() -> None:
    def kind(address: str) -> SpecialKind | None:
        specials = special_ranges(parse_address(address))
        return specials[-1].kind if specials else None

    assert kind("169.254.169.254") is SpecialKind.METADATA
    assert kind("169.254.1.1") is SpecialKind.LINK_LOCAL
    assert kind("255.255.255.255") is SpecialKind.BROADCAST
    assert kind("250.0.0.1") is SpecialKind.RESERVED
    assert kind("64:ff9b::169.254.169.254") is SpecialKind.METADATA
    assert kind("64:ff9b::8.8.8.8") is SpecialKind.TRANSITION
    assert kind("8.8.8.8") is None
    assert kind("127.0.0.1") is None
    assert kind("::1") is None


_SPECIAL_ADDRESSES = st.sampled_from(SPECIAL_RANGES).flatmap(
    lambda special: st.integers(special.range.low, special.range.high).map(
        lambda value: str((ipaddress.IPv4Address if special.range.version == 4 else ipaddress.IPv6Address)(value))
    )
)
_CARRIED = st.builds(
    lambda prefix, inner: str(ipaddress.IPv6Address(int(ipaddress.IPv6Address(prefix)) | inner)),
    st.sampled_from(["64:ff9b::", "::ffff:0:0:0", "64:ff9b:1::"]),
    st.integers(1, 2**32 - 1),
)


@given(st.one_of(_SPECIAL_ADDRESSES, _CARRIED), st.integers(0, 7))
def test_a_wide_rule_never_reaches_a_special_address(address: str, prefix: int) -> None:
    """0.0.0.0/0 and ::/0 to /7: wider than every special range but IPv4's 224/4 and 240/4, which are /4."""
    parsed = parse_address(address)
    if parsed in (parse_address("127.0.0.1"), parse_address("::1")):
        return  # 0.0.0.0 lies in 0.0.0.0/8, and is loopback
    length = min(prefix, 3) if parsed.version == 4 else prefix
    network = ipaddress.ip_network((address.partition("%")[0], length), strict=False)
    entry = f"{network}:80" if network.version == 4 else f"[{network}]:80"
    assert parsed.version == network.version
    try:
        reached = reaches(entry, address)
    except PolicyError:
        pytest.fail(f"{entry} should be a rule")
    assert not reached
