"""Nothing that is parsed is silently ignored: what is set and not enforced is named."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_guard.errors import PolicyError
from ray_guard.policy.budgets import KINDS
from ray_guard.policy.decide import intersect
from ray_guard.policy.detection import ACTIONS
from ray_guard.policy.enforcement import SUPPORTED, unenforced
from ray_guard.policy.model import Policy


def named(data: dict[str, Any], supported: frozenset[str] = SUPPORTED) -> tuple[str, ...]:
    return unenforced(Policy.model_validate(data).to_wire(), supported)


@pytest.mark.parametrize(
    ("data", "names"),
    [
        ({}, ()),
        ({"version": 1, "mode": "report", "role": "policy"}, ()),
        ({"egress": {"allow": ["10.0.0.1:80", "cluster", "collectives", "unix:///a", "udp://10.0.0.1:5"]}}, ()),
        ({"egress": {"allow": ["cluster", "a.example.org:443", "*.b.example.org:443", "tcp://a.b:5"]}}, ()),
        ({"egress": {"allow": [], "listen": [8080]}}, ()),
        ({"egress": {"proxy": "http://p:3128"}}, ()),
        ({"egress": {"proxy": None}}, ()),
        ({"egress": {"verify_names": True}}, ()),
        ({"egress": {"verify_names": True, "allow": ["a.b:443"]}}, ()),
        ({"egress": {"verify_names": False, "allow": ["a.b:443"]}}, ()),
        ({"model_endpoint": "engine:8000"}, ()),
        ({"model_endpoint": None}, ()),
        ({"gpu": "none"}, ()),
        ({"gpu": "engine"}, ()),
        ({"budgets": {"call": {"gpu_seconds": 1, "gpu_memory": 1}, "actor": {"gpu_memory": 1}}}, ()),
        ({"gpu": "any"}, ()),
        ({"files": {"read": ["cwd"], "hide": [], "protect": ["/srv"]}}, ()),
        ({"budgets": {s: {"tokens": 1, "flops": 1.0} for s in ("call", "episode", "actor", "job")}}, ()),
        ({"budgets": {"episode": {"gpu_seconds": 1, "connections": 0}, "job": {"gpu_seconds": 1}}}, ()),
        ({"budgets": {s: {"processes": 1, "memory": 1, "cpu_seconds": 1} for s in ("call", "episode", "actor")}}, ()),
        ({"budgets": {"job": {"cpu_seconds": 1}, "episode": {"wall_seconds": 1}}}, ()),
        ({"budgets": {"call": {"memory": None}}}, ()),
        ({"subprocess": "plain", "survivors": "kill", "on_violation": "deny"}, ()),
        ({"survivors": "keep", "on_violation": "kill_call"}, ()),
        ({"require": ["egress", "files", "gpu"]}, ()),
        ({"require": []}, ()),
    ],
)
def test_what_this_version_does_not_enforce(data: dict[str, Any], names: tuple[str, ...]) -> None:
    assert named(data) == names


def test_every_key_that_asks_for_something_is_named_when_nothing_is_supported() -> None:
    everything: dict[str, Any] = {
        "mode": "enforce",
        "role": "env",
        "egress": {"allow": ["10.0.0.1:80"], "proxy": "http://p:3128", "listen": [1], "verify_names": True},
        "model_endpoint": "engine:8000",
        "gpu": "engine",
        "files": {"read": ["cwd"], "write": ["cwd"], "hide": ["/a"], "protect": ["/a"]},
        "budgets": {"call": dict.fromkeys(KINDS, 1)},
        "subprocess": "confine",
        "survivors": "kill",
        "on_violation": "deny",
        "require": ["egress"],
    }
    policy = Policy.model_validate(everything)
    names = named(everything, frozenset())
    keys = [key for key in policy.to_wire()["set"] if key != "egress.verify_names"]  # no name is listed
    assert sorted(names) == sorted(
        {"egress.allow": "egress.allow[0]", "require": "require.egress"}.get(k, k) for k in keys
    )


def test_a_host_that_offers_less_takes_away() -> None:
    named_ones = {"egress": {"verify_names": True, "allow": ["a.b:443"]}}
    without_names = SUPPORTED - {"egress.allow.name", "egress.verify_names"}
    assert named(named_ones, without_names) == ("egress.allow[0]", "egress.verify_names")
    less = SUPPORTED - {"egress.allow.unix", "egress.listen", "subprocess.confine", "gpu.none", "files.read"}
    data = {
        "egress": {"allow": ["unix:///a"], "listen": [80]},
        "subprocess": "confine",
        "gpu": "none",
        "files": {"read": ["cwd"], "write": ["cwd"]},
    }
    assert named(data) == ()
    assert set(named(data, less)) == {"egress.allow[0]", "egress.listen", "subprocess", "gpu", "files.read"}


def test_every_supported_name_can_come_up() -> None:
    """A misspelt name in the constant would support nothing, silently."""
    data: dict[str, Any] = {
        "mode": "enforce",
        "role": "env",
        "model_endpoint": "engine:8000",
        "egress": {"listen": [1], "proxy": "http://p:3128", "verify_names": True},
        "files": {"read": ["cwd"], "write": ["cwd"], "hide": ["/a"], "protect": ["/a"]},
        "detect": {**{action: ["all"] for action in ACTIONS}, "rules": ["/rules"]},
        "budgets": {
            scope: {kind: 1 for kind in KINDS if f"budgets.{scope}.{kind}" in SUPPORTED}
            for scope in ("call", "episode", "actor", "job")
        },
    }
    keys = set(Policy.model_validate(data).to_wire()["set"])
    keys |= {f"egress.allow.{kind}" for kind in ("address", "name", "unix", "cluster", "collectives")}
    keys |= {"subprocess.confine", "subprocess.plain", "survivors.kill", "survivors.keep"}
    keys |= {f"on_violation.{action}" for action in ("deny", "kill_call", "end_episode", "kill_actor")}
    keys |= {"require.egress", "require.processes", "require.files", "require.gpu", "gpu.none", "gpu.engine"}
    assert keys == SUPPORTED


def test_an_intersection_names_each_once() -> None:
    one = Policy.model_validate({"model_endpoint": "engine:8000", "budgets": {"call": {"tokens": 1}}}).to_wire()
    two = Policy.model_validate({"model_endpoint": "engine:8000"}).to_wire()
    none = SUPPORTED - {"budgets.call.tokens", "model_endpoint"}
    assert unenforced(intersect(one, two), none) == ("model_endpoint", "budgets.call.tokens")


def test_a_message_that_does_not_say_what_was_set_is_refused() -> None:
    wire = Policy().to_wire()
    del wire["set"]
    with pytest.raises(PolicyError):
        unenforced(wire)


_json = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)


@given(_json, st.sampled_from(["", "all", "set", "egress", "require", "budgets", "gpu"]))
def test_garbage_raises_nothing_but_a_policy_error(garbage: Any, key: str) -> None:
    data = {"gpu": "none", "egress": {"allow": ["cluster"], "verify_names": True}, "require": ["egress"]}
    wire = Policy.model_validate(data).to_wire()
    try:
        unenforced({"all": garbage} if key == "all" else {**wire, key: garbage} if key else garbage)
    except PolicyError:
        return
    assert key not in ("", "set") or isinstance(garbage, dict | list)
