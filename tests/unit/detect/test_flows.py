"""What calls do over time: found from the first records that are enough, and not from what ordinary ones do."""

from __future__ import annotations

import secrets

import pytest

from ray_guard.detect import Kind
from ray_guard.detect.flows import HOSTS, LABELS, PORTS, SENT_BYTES, WINDOW_NS, Flow, Flows

_SECOND = 10**9


def _judged(flows: list[Flow]) -> list[tuple[int, Kind, str]]:
    """Which of one call's flows are flagged, as what."""
    judge = Flows()
    found = [(at, judge.judge("call", flow)) for at, flow in enumerate(flows)]
    return [(at, each.kind, each.rule) for at, each in found if each is not None]


def _tried(count: int, *, spread: int = 0, in_vain: bool = True) -> list[Flow]:
    return [Flow(at * spread, "192.0.2.1", 9000 + at, in_vain=in_vain) for at in range(count)]


def test_ports_of_one_host_and_hosts_at_one_port() -> None:
    assert _judged(_tried(PORTS)) == [(PORTS - 1, Kind.PROBING, "flow.ports")]
    hosts = [Flow(0, f"192.0.2.{at}", 22, in_vain=True) for at in range(HOSTS)]
    assert _judged(hosts) == [(HOSTS - 1, Kind.PROBING, "flow.hosts")]


def test_no_scan() -> None:
    assert _judged(_tried(PORTS - 1)) == []
    assert _judged(_tried(100, in_vain=False)) == []  # they were there
    assert _judged(_tried(100, spread=WINDOW_NS // (PORTS - 2))) == []  # slowly
    assert _judged([Flow(at, "192.0.2.1", 9000, in_vain=True) for at in range(100)]) == []  # one that is not up yet
    judge = Flows()
    assert all(judge.judge(f"call {at}", flow) is None for at, flow in enumerate(_tried(100)))  # each once


@pytest.mark.parametrize(
    ("flow", "kind", "rule"),
    [
        (Flow(0, "169.254.169.254", 80), Kind.METADATA, "flow.metadata"),
        (Flow(0, "192.0.2.1", 443, protocol="stratum"), Kind.MINING, "flow.stratum"),
        (Flow(0, "192.0.2.1", 443, protocol="ssh"), Kind.REVERSE_TUNNEL, "flow.ssh"),
        (Flow(0, "10.0.0.53", 53, secrets.token_hex(24) + ".t.example.net"), Kind.DNS_TUNNEL, "flow.dns_label"),
        (Flow(0, "192.0.2.1", 443, sent=SENT_BYTES, received=1000), Kind.EXFILTRATION, "flow.bytes_sent"),
    ],
)
def test_one_flow_is_enough(flow: Flow, kind: Kind, rule: str) -> None:
    assert _judged([flow]) == [(0, kind, rule)]


@pytest.mark.parametrize(
    "flow",
    [
        Flow(0, "192.0.2.1", 22, protocol="ssh"),
        Flow(0, "192.0.2.1", 443, "files.example.org", protocol="tls", sent=10_000, received=SENT_BYTES),
        Flow(0, "192.0.2.1", 443, sent=SENT_BYTES, received=SENT_BYTES // 5),
        Flow(0, "10.0.0.53", 53, "r3---sn-5hne6nzs.files.example.com"),
        Flow(0, "10.0.0.53", 53, "example.org"),
    ],
)
def test_one_flow_is_not(flow: Flow) -> None:
    assert _judged([flow]) == []


def test_many_names_below_one_domain() -> None:
    names = [Flow(at * _SECOND, "10.0.0.53", 53, f"chunk-{at:04d}-of-the-file.t.example.net") for at in range(LABELS)]
    assert _judged(names) == [(LABELS - 1, Kind.DNS_TUNNEL, "flow.dns_names")]
    mirrors = [Flow(at * _SECOND, "10.0.0.53", 53, f"mirror{at}.example.net") for at in range(100)]
    assert _judged(mirrors) == []


def test_a_sweep_does_not_grow_it() -> None:
    judge = Flows()
    for at in range(20_000):
        judge.judge("call", Flow(at, f"10.{at >> 8 & 255}.{at & 255}.1", at & 0xFFFF, f"n{at}.example{at}.net"))
        judge.judge(f"call {at}", Flow(at, "192.0.2.1", 80))
    import pickle

    assert len(pickle.dumps(judge)) < 4 << 20
