"""What must be spoken at a named destination, as the decision says it to the relay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from ray_guard.policy.budgets import Account, Scope
from ray_guard.policy.decide import CompiledPolicy, Decision, Operation, Reason, Request, Route, Surroundings, decide
from ray_guard.policy.destination import Protocol, Transport
from ray_guard.policy.model import Policy

FREE = Account(Scope.CALL, "no limits")
TLS, HTTP, SSH, ANY = Protocol.TLS, Protocol.HTTP, Protocol.SSH, Protocol.TCP


def policy(allow: Sequence[str], **settings: Any) -> CompiledPolicy:
    return CompiledPolicy.from_wire(Policy.from_shorthand(allow=list(allow), **settings).to_wire())


def asked(compiled: CompiledPolicy, told: Sequence[str], port: int) -> Decision:
    surroundings = Surroundings(names={"192.0.2.1": frozenset(told)})
    return decide(compiled, surroundings, FREE, Request(Operation.CONNECT, Transport.TCP, "192.0.2.1", port))


@pytest.mark.parametrize(
    ("allow", "told", "port", "expected"),
    [
        (["a.example.org:443"], ["a.example.org"], 443, {TLS: {"a.example.org"}}),
        (["a.example.org:80"], ["a.example.org"], 80, {HTTP: {"a.example.org"}}),
        (["a.example.org:22"], ["a.example.org"], 22, {SSH: {"a.example.org"}}),
        (["tcp://a.example.org:443"], ["a.example.org"], 443, {ANY: {"a.example.org"}}),
        # one address, several names: only those that are listed count, and each in its own protocol
        (["a.example.org:443"], ["a.example.org", "evil.test"], 443, {TLS: {"a.example.org"}}),
        (
            ["a.example.org:443", "*.b.test:443"],
            ["x.b.test", "a.example.org"],
            443,
            {TLS: {"a.example.org", "x.b.test"}},
        ),
        (
            ["tls://a.example.org:8000", "http://b.example.org:8000"],
            ["a.example.org", "b.example.org"],
            8000,
            {TLS: {"a.example.org"}, HTTP: {"b.example.org"}},
        ),
        (["a.example.org:443", "a.example.org:80"], ["a.example.org"], 80, {HTTP: {"a.example.org"}}),
    ],
)
def test_expected(allow: list[str], told: list[str], port: int, expected: dict[Protocol, set[str]]) -> None:
    decision = asked(policy(allow), told, port)
    assert (decision.reason, decision.route) == (Reason.NAME, Route.RELAY)
    assert dict(decision.expected) == expected
    assert decision.name in set().union(*expected.values())


def test_without_verify_names_nothing_is_expected_of_what_is_spoken() -> None:
    decision = asked(policy(["a.example.org:443"], verify_names=False), ["a.example.org"], 443)
    assert dict(decision.expected) == {ANY: {"a.example.org"}}


def test_a_policy_that_reports_does_not_verify() -> None:
    decision = asked(policy(["a.example.org:443"], mode="report"), ["a.example.org"], 443)
    assert dict(decision.expected) == {ANY: {"a.example.org"}}


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        (policy(["a.example.org:443", "c.example.org:443"]), {TLS: {"a.example.org"}}),
        (policy(["tcp://*.example.org:443"]), {TLS: {"a.example.org", "b.example.org"}}),
        (policy(["192.0.2.0/24:443"]), {TLS: {"a.example.org", "b.example.org"}}),
        (policy(["a.example.org:443"], mode="report"), {TLS: {"a.example.org"}}),
    ],
)
def test_two_policies_must_both_agree(second: CompiledPolicy, expected: dict[Protocol, set[str]]) -> None:
    first = policy(["a.example.org:443", "b.example.org:443"])
    told = ["a.example.org", "b.example.org", "c.example.org"]
    for both in (first.intersect(second), second.intersect(first)):
        decision = asked(both, told, 443)
        assert (decision.allowed, decision.route) == (True, Route.RELAY)
        assert dict(decision.expected) == expected


def test_two_policies_that_cannot_agree_deny() -> None:
    first, second = policy(["a.example.org:443"]), policy(["http://a.example.org:443"])
    assert asked(first.intersect(second), ["a.example.org"], 443).reason is Reason.NOT_LISTED
    other = policy(["b.example.org:443"])
    assert asked(first.intersect(other), ["a.example.org", "b.example.org"], 443).reason is Reason.NOT_LISTED


def test_addresses_expect_nothing() -> None:
    assert asked(policy(["192.0.2.1:443"]), ["a.example.org"], 443).expected == ()
