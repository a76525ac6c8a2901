"""What a ring grants again without asking the whole policy: never more than the policy would say."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ray_guard.evidence.journal import Journal
from ray_guard.policy.budgets import Account, Scope
from ray_guard.policy.decide import CompiledPolicy, Operation, Surroundings
from ray_guard.policy.destination import Transport
from ray_guard.policy.model import Policy
from ray_guard.records import Resource, Role
from ray_guard.supervisor.node import Node
from ray_guard.supervisor.proxies import Proxies, Standing
from ray_guard.supervisor.ring import Ring
from ray_guard.supervisor.scratch import Scratches
from ray_guard.supervisor.target import Target
from ray_guard.supervisor.view import Views

THERE = ("10.0.0.9", 6379)
STRANGER = 1 << 30
"""No thread of this process."""


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal(tmp_path / "e") as made:
        yield made


def compiled(*allow: str, **more: Any) -> CompiledPolicy:
    return CompiledPolicy.from_wire(
        Policy.model_validate({"egress": {"allow": allow}, **more}).to_wire(), role=Role.ENV
    )


def ring_of(journal: Journal, policy: CompiledPolicy) -> Ring:
    """The ring of this very process, an actor in a cluster that :data:`THERE` belongs to."""
    surroundings = Surroundings(cluster=frozenset({THERE}), control=frozenset({THERE}))
    node = SimpleNamespace(
        meter=SimpleNamespace(flows={}),
        surroundings_changed=[],
        directory=lambda _target: SimpleNamespace(fresh=lambda _since: True),
        surroundings=lambda _target: surroundings,
        loop=None,
        proxies=SimpleNamespace(named=False),
    )
    target = Target(
        pid=os.getpid(),
        kind="actor",
        policy=policy,
        resource=Resource({}),
        journal=journal,
        around=Account(Scope.JOB, "run", {}),
        run_id="run",
        actor_id="actor",
        views=Views(None),
        scratches=Scratches("/tmp", "0", lambda _path: None, lambda _path: None),
    )
    return Ring(cast("Node", node), target, policy, os.getpid())


def connect(ring: Ring, transport: Transport = Transport.TCP, tid: int | None = None) -> int:
    return ring.rule(
        Operation.CONNECT, transport, tid or threading.get_native_id(), address=THERE[0], port=THERE[1]
    ).error


def is_granted_again(ring: Ring, tid: int = STRANGER) -> bool:
    return ring.again(THERE, 1234, tid) is not None


def test_what_a_rule_grants_is_granted_again_and_recorded(journal: Journal) -> None:
    ring = ring_of(journal, compiled(f"{THERE[0]}:{THERE[1]}"))
    assert not is_granted_again(ring)
    assert connect(ring) == 0
    before = journal.size
    assert is_granted_again(ring)
    (line,) = Path(journal.path).read_bytes()[before:].splitlines()
    assert b'"ray_guard.egress.decision","value":{"stringValue":"allow"}' in line
    assert ring.target.account.used("connections") == 2


def test_what_may_only_be_the_actors_own_is_not_granted_again_to_others(journal: Journal) -> None:
    rule, cluster = compiled(f"{THERE[0]}:{THERE[1]}"), compiled("cluster")
    for policy in (cluster, rule.intersect(cluster), cluster.intersect(rule)):
        ring = ring_of(journal, policy)
        assert connect(ring) == 0  # our own process
        assert connect(ring, tid=STRANGER) != 0  # another
        assert not is_granted_again(ring)


@pytest.mark.parametrize("policy", [compiled(f"udp://{THERE[0]}:{THERE[1]}"), compiled(mode="report")])
def test_what_is_granted_otherwise_is_not_granted_again(journal: Journal, policy: CompiledPolicy) -> None:
    ring = ring_of(journal, policy)
    connect(ring, Transport.UDP)
    connect(ring)
    assert not is_granted_again(ring)


def test_a_proxy_named_since_then_is_looked_for_first(journal: Journal) -> None:
    ring = ring_of(journal, compiled(f"{THERE[0]}:{THERE[1]}"))
    assert connect(ring) == 0
    assert is_granted_again(ring)
    standing = Standing.ASKED
    ring._node.proxies = cast("Proxies", SimpleNamespace(named=True, at_port=lambda _port: standing))
    assert not is_granted_again(ring)
    standing = Standing.KNOWN
    assert is_granted_again(ring)


def test_a_limit_ends_it(journal: Journal) -> None:
    ring = ring_of(journal, compiled(f"{THERE[0]}:{THERE[1]}", budgets={"actor": {"connections": 9}}))
    assert connect(ring) == 0
    assert not is_granted_again(ring)


def test_a_stricter_policy_ends_it(journal: Journal) -> None:
    policy = compiled(f"{THERE[0]}:{THERE[1]}")
    ring = ring_of(journal, policy)
    assert connect(ring) == 0
    assert is_granted_again(ring)
    ring.tighten(policy.intersect(compiled()))
    assert not is_granted_again(ring)


def test_what_leaves_no_record_is_not_granted(journal: Journal) -> None:
    ring = ring_of(journal, compiled(f"{THERE[0]}:{THERE[1]}"))
    assert connect(ring) == 0
    journal.close()
    assert not is_granted_again(ring)
    assert connect(ring) != 0
