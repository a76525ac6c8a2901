"""Nothing that is parsed is silently ignored: what is set and not enforced is named."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_guard.errors import PolicyError
from ray_guard.policy.budgets import KINDS
from ray_guard.policy.decide import intersect
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
        (
            {"egress": {"allow": ["cluster", "a.example.org:443", "*.b.example.org:443"]}},
            ("egress.allow[1]", "egress.allow[2]"),
        ),
        ({"egress": {"allow": [], "listen": [8080]}}, ()),
        ({"egress": {"proxy": "http://p:3128"}}, ("egress.proxy",)),
        ({"egress": {"proxy": None}}, ()),
        ({"egress": {"verify_names": True}}, ()),
        ({"egress": {"verify_names": True, "allow": ["a.b:443"]}}, ("egress.allow[0]", "egress.verify_names")),
        ({"egress": {"verify_names": False, "allow": ["a.b:443"]}}, ("egress.allow[0]",)),
        ({"model_endpoint": "engine:8000"}, ("model_endpoint",)),
        ({"model_endpoint": None}, ()),
        ({"gpu": "none"}, ()),
        ({"gpu": "any"}, ()),
        ({"gpu": "engine"}, ("gpu",)),
        ({"files": {"read": ["cwd"], "hide": [], "protect": ["/srv"]}}, ()),
        ({"budgets": {"call": {"memory": 1, "egress_bytes": 1, "wall_seconds": 1}}}, ("budgets.call.memory",)),
        ({"budgets": {"episode": {"wall_seconds": 1, "connections": 0}}}, ("budgets.episode.wall_seconds",)),
        ({"budgets": {"call": {"memory": None}}}, ()),
        ({"subprocess": "plain", "survivors": "kill", "on_violation": "deny"}, ()),
        ({"survivors": "keep", "on_violation": "kill_call"}, ("survivors", "on_violation")),
        ({"require": ["egress", "files", "gpu"]}, ("require.gpu",)),
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
        "egress": {"listen": [1]},
        "files": {"read": ["cwd"], "write": ["cwd"], "hide": ["/a"], "protect": ["/a"]},
        "budgets": {
            scope: {kind: 1 for kind in KINDS if f"budgets.{scope}.{kind}" in SUPPORTED}
            for scope in ("call", "episode", "actor", "job")
        },
    }
    keys = set(Policy.model_validate(data).to_wire()["set"])
    keys |= {f"egress.allow.{kind}" for kind in ("address", "unix", "cluster", "collectives")}
    keys |= {"subprocess.confine", "subprocess.plain", "survivors.kill", "on_violation.deny"}
    keys |= {"require.egress", "require.processes", "require.files", "gpu.none"}
    assert keys == SUPPORTED


def test_an_intersection_names_each_once() -> None:
    one = Policy.model_validate({"gpu": "none", "survivors": "keep"}).to_wire()
    two = Policy.model_validate({"gpu": "engine"}).to_wire()
    assert unenforced(intersect(one, two)) == ("survivors", "gpu")


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
