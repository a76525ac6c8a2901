from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_guard.egress.relay.speech import Refused, Verifier
from ray_guard.egress.relay.speech.choice import Choice, Speech
from ray_guard.egress.relay.speech.ssh import ClientBanner, ServerBanner
from ray_guard.egress.relay.speech.tags import WINDOW, Sniffer, Watch, foreign
from ray_guard.policy.destination import Protocol


def feed(verifier: Verifier, data: bytes, size: int) -> tuple[bytes, str | None]:
    passed = b""
    try:
        for at in range(0, len(data), size):
            passed += verifier.feed(data[at : at + size])
    except Refused as refused:
        return passed, refused.reason
    return passed, None


@pytest.mark.parametrize("data", [b"SSH-2.0-OpenSSH_9.6\r\nrest", b"SSH-2.0-x"])
def test_a_client_banner_passes(data: bytes) -> None:
    for size in range(1, len(data) + 1):
        assert feed(ClientBanner(), data, size) == (data, None)


@pytest.mark.parametrize(
    "data", [b"SSH-1.5-x\r\n", b"hello\r\nSSH-2.0-x\r\n", b"\x16\x03\x01", b"GET / HTTP/1.1\r\n", b"ssh-2.0-"]
)
def test_another_clients_banner_is_refused(data: bytes) -> None:
    for size in range(1, len(data) + 1):
        assert feed(ClientBanner(), data, size) == (b"", "not_ssh")


@pytest.mark.parametrize(
    "data", [b"SSH-2.0-x\r\nrest", b"SSH-1.99-x\n", b"welcome\r\nto this\nSSH-2.0-x\r\n", b"\nSSH-2.0-x"]
)
def test_a_server_banner_passes_with_the_lines_before_it(data: bytes) -> None:
    for size in range(1, len(data) + 1):
        assert feed(ServerBanner(), data, size) == (data, None)


@pytest.mark.parametrize("data", [b"SSH-1.5-x\r\n", b"x\nSSH-3.0-x\r\n", b"x" * 9000, b"\n" * 9000])
def test_another_servers_banner_is_refused(data: bytes) -> None:
    assert feed(ServerBanner(), data, 10) == (b"", "not_ssh")


def stratum(method: str, params: object = ()) -> bytes:
    return json.dumps({"id": 1, "method": method, "params": params}).encode() + b"\n"


@pytest.mark.parametrize(
    ("data", "tag"),
    [
        (b"SSH-2.0-OpenSSH_9.6\r\n", "ssh"),
        (b"welcome\r\nSSH-2.0-x\r\n", "ssh"),
        (b"\x16\x03\x01\x02\x00", "tls"),
        (b"GET / HTTP/1.1\r\n", "http"),
        (b"PROPFIND /x HTTP/1.0\n", "http"),
        (b"HTTP/1.1 200 OK\r\n", "http"),
        (stratum("mining.subscribe", ["cpuminer/2.5", None]), "stratum"),
        (stratum("mining.authorize"), "stratum"),
        (stratum("mining.submit"), "stratum"),
        (stratum("mining.notify"), "stratum"),
        (stratum("eth_submitLogin", ["0x00"]), "stratum"),
        (stratum("login", {"login": "4A…", "pass": "x", "agent": "XMRig/6"}), "stratum"),
        (stratum("job", {"blob": "07", "job_id": "1", "target": "b88d0600"}), "stratum"),
        (b'  {"id": 1, "method" : "mining.subscribe"', "stratum"),
        (b'{"id":1,"method":"mi\\u006eing.subscribe","params":[]}', "stratum"),
        (b'{"id":0}\n' + stratum("mining.subscribe"), "stratum"),
        (b'[{"method": "mining.configure"}]', "stratum"),
        (stratum("login", {"user": "x"}), None),
        (stratum("eth_blockNumber"), None),
        (b'{"query": "what is mining.subscribe?"}', None),
        (b"*1\r\n$4\r\nPING\r\n", None),
        (b"\0\0\0\x08\x04\xd2\x16\x2f", None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_tags(data: bytes, tag: str | None, size: int) -> None:
    sniffer = Sniffer(frozenset())
    assert feed(Watch(sniffer, sent=True), data, size) == (data, None)
    assert sniffer.tag == tag


def test_a_denied_tag_is_refused_before_its_last_bytes_pass() -> None:
    line = stratum("mining.subscribe")
    for size in range(1, len(line) + 1):
        passed, reason = feed(Watch(Sniffer(frozenset({"stratum"})), sent=True), line, size)
        assert reason == "stratum_not_allowed"
        assert b"\n" not in passed
        assert b'mining.subscribe"' not in passed
    assert feed(Watch(Sniffer(frozenset({"ssh"})), sent=False), b"SSH-2.0-x", 1) == (b"SSH", "ssh_not_allowed")


def test_what_comes_after_the_window_is_not_looked_at() -> None:
    sniffer = Sniffer(frozenset({"ssh"}))
    sent, received = Watch(sniffer, sent=True), Watch(sniffer, sent=False)
    assert feed(sent, bytes(WINDOW), 1000)[1] is None
    assert sent.done
    assert not received.done
    assert feed(received, bytes(WINDOW) + b"SSH-2.0-", 1000)[1] is None


_PIECES = st.sampled_from([b"{", b"[" * 50, b'"method":', b"SSH", b"\n", b"\\u"])


@given(st.lists(st.one_of(st.binary(max_size=60), _PIECES), max_size=12))
def test_watching_changes_nothing_and_never_fails(portions: list[bytes]) -> None:
    watch = Watch(Sniffer(frozenset()), sent=True)
    assert b"".join(watch.feed(portion) for portion in portions) == b"".join(portions)


def test_deeply_nested_json_is_no_tag() -> None:
    assert feed(Watch(Sniffer(frozenset({"stratum"})), sent=True), b"[" * 4000, 4000) == (b"[" * 4000, None)


@pytest.mark.parametrize(
    ("rule", "port", "tags"),
    [
        ("10.0.0.0/8:443", 443, {"ssh", "stratum"}),
        ("10.0.0.0/8:*", 22, {"stratum"}),
        ("tcp://10.0.0.1:3333", 3333, set()),
        ("TCP://10.0.0.1:3333", 3333, set()),
        (None, 80, {"ssh", "stratum"}),
    ],
)
def test_what_an_address_rule_does_not_mean(rule: str | None, port: int, tags: set[str]) -> None:
    assert foreign(rule, port) == tags


def test_where_names_share_a_port_the_first_byte_says_which_verifier() -> None:
    expected = {Protocol.TLS: frozenset({"a.example.org"}), Protocol.HTTP: frozenset({"b.example.org"})}
    assert feed(Choice(expected, 8443), b"GET / HTTP/1.1\r\nHost: b.example.org\r\n\r\n", 1)[1] is None
    assert feed(Choice(expected, 8443), b"GET / HTTP/1.1\r\nHost: a.example.org\r\n\r\n", 1)[1] == "host_mismatch"
    assert feed(Choice(expected, 8443), b"\x16\x03\x01\0\0", 1)[1] == "malformed_tls"
    assert feed(Choice(expected, 8443), b"SSH-2.0-x\r\n\r\n", 1)[1] in ("not_http", "malformed_http")
    no_http = {Protocol.TLS: frozenset({"a.example.org"}), Protocol.SSH: frozenset({"b.example.org"})}
    assert feed(Choice(no_http, 22), b"GET / HTTP/1.1\r\n", 1)[1] == "unexpected_protocol"
    assert feed(Choice(no_http, 22), b"SSH-2.0-x\r\n", 1)[1] is None


def test_what_was_found() -> None:
    told = {"expected": {"ssh": ["a.example.org"]}, "denied": [], "port": 22}
    speech = Speech(told)
    assert speech.found() == {"protocol": None, "verified": False, "name": None}
    speech.sent.feed(b"SSH-2.0-x\r\n")
    assert speech.found() == {"protocol": "ssh", "verified": True, "name": None}
    unverified = Speech({"expected": {"tcp": ["a.example.org"]}, "denied": [], "port": 3333})
    unverified.sent.feed(stratum("mining.subscribe"))
    assert unverified.found() == {"protocol": "stratum", "verified": False, "name": None}
    plain = Speech({"expected": {}, "denied": [], "port": 3333})
    plain.sent.feed(b"\x16\x03\x01")
    assert plain.found() == {"protocol": "tls"}
