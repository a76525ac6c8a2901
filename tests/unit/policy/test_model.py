"""The policy as the user writes it: what is read, and what is said when it cannot be meant."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_guard.errors import PolicyError
from ray_guard.policy.budgets import KINDS, Scope
from ray_guard.policy.decide import CompiledPolicy
from ray_guard.policy.model import Budget, Budgets, Egress, Files, Policy
from ray_guard.policy.values import parse_size
from ray_guard.records import Mode, Role

GIB = 1 << 30

# Every key of the format, as in the contract.
CONTRACT = """
version: 1
mode: enforce
role: env
egress:
  allow:
    - "index.example.org:443"
    - "*.files.example.org:443"
    - "10.20.0.0/16:6379"
    - "[2001:db8::/32]:443"
    - "udp://192.0.2.7:123"
    - "unix:///run/some.sock"
    - "cluster"
    - "collectives"
  proxy: null
  listen: []
  verify_names: true
model_endpoint: null
gpu: none
files:
  read: [system, env, cwd]
  write: [cwd, scratch]
  hide: []
  protect: []
budgets:
  call:    {egress_bytes: 5MiB, connections: 50, wall_seconds: 120, cpu_seconds: 60, processes: 64, memory: 2GiB}
  episode: {egress_bytes: 20MiB, cpu_seconds: 600, tokens: 200000}
  actor:   {egress_bytes: 1GiB, gpu_seconds: 3600, gpu_memory: 40GiB, tokens: 50000000, flops: 1e18}
  job:     {egress_bytes: 10GiB, gpu_seconds: 360000}
subprocess: confine
survivors: kill
on_violation: deny
require: [egress, processes, files]
"""


@pytest.fixture
def contract(tmp_path: Path) -> Policy:
    path = tmp_path / "policy.yaml"
    path.write_text(CONTRACT)
    return Policy.load(path)


def test_the_file_of_the_contract(contract: Policy) -> None:
    assert (contract.mode, contract.role, contract.gpu) == (Mode.ENFORCE, Role.ENV, "none")
    assert len(contract.egress.rules) == 8
    assert contract.budgets.call.limits() == {
        "egress_bytes": 5 << 20,
        "connections": 50,
        "wall_seconds": 120,
        "cpu_seconds": 60,
        "processes": 64,
        "memory": 2 * GIB,
    }
    assert contract.budgets.actor.flops == 1e18
    assert contract.budgets.job.egress_bytes == 10 * GIB
    assert contract.require == ("egress", "processes", "files")


def test_the_contracts_values_are_the_defaults(contract: Policy) -> None:
    said = {"egress": Egress(allow=contract.egress.allow), "budgets": contract.budgets, "role": Role.ENV}
    assert Policy.model_validate(said) == contract


def test_the_default_lets_nothing_out_and_leaves_the_role_unsaid() -> None:
    policy = Policy()
    assert policy.egress.allow == ()
    assert policy.role is None
    assert all(getattr(policy.budgets, scope.value).limits() == {} for scope in Scope)


# Values -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, 0),
        (1048576, 1 << 20),
        ("1048576", 1 << 20),
        ("5MiB", 5 << 20),
        ("0.5 GiB", GIB // 2),
        ("1KiB", 1024),
        (1e6, 10**6),
    ],
)
def test_sizes(size: object, expected: int) -> None:
    assert parse_size(size) == expected


@pytest.mark.parametrize(
    ("limits", "remedy"),
    [
        ({"egress_bytes": "5MB"}, "write 5MiB"),
        ({"egress_bytes": "5mib"}, "write 5MiB"),
        ({"egress_bytes": "1TiB"}, "KiB, MiB and GiB"),
        ({"egress_bytes": "5 apples"}, "KiB, MiB and GiB"),
        ({"egress_bytes": "much"}, "5MiB"),
        ({"egress_bytes": ""}, "5MiB"),
        ({"egress_bytes": "-5MiB"}, "5MiB"),
        ({"egress_bytes": -5}, "not negative"),
        ({"egress_bytes": True}, "whole number"),
        ({"egress_bytes": 1.5}, "whole number"),
        ({"egress_bytes": "0.3KiB"}, "whole number"),
        ({"egress_bytes": [1]}, "whole number"),
        ({"egress_bytes": float("inf")}, "leave the key out"),
        ({"egress_bytes": float("nan")}, "leave the key out"),
        ({"egress_bytes": 1 << 61}, "leave the key out"),
        ({"egress_bytes": "9" * 5000}, "5MiB"),
        ({"egress_bytes": "99999999999GiB"}, "leave the key out"),
        ({"connections": 1.5}, "whole number"),
        ({"connections": "many"}, "whole number"),
        ({"connections": 10**400}, "leave the key out"),
        ({"wall_seconds": "10m"}, "write 600"),
        ({"wall_seconds": float("nan")}, "leave the key out"),
        ({"wall_seconds": False}, "number of seconds"),
        ({"wall_seconds": {}}, "number of seconds"),
        ({"flops": -1.0}, "not negative"),
        ({"flops": "1e999"}, "leave the key out"),
        ({"flops": "plenty"}, "1e18"),
        ({"egres_bytes": 5}, "did you mean egress_bytes"),
    ],
)
def test_impossible_limits(limits: dict[str, Any], remedy: str) -> None:
    ((kind, value),) = limits.items()
    with pytest.raises(PolicyError, match=remedy) as caught:
        Policy.model_validate({"budgets": {"call": limits}})
    assert caught.value.key == f"budgets.call.{kind}"
    assert caught.value.value is value


@pytest.mark.parametrize("flops", [1e18, "1e18", "1E+18", 10**18])
def test_numbers_may_be_text_because_yaml_reads_1e18_as_text(flops: object) -> None:
    assert Budget.model_validate({"flops": flops}).flops == 1e18


def test_null_is_no_limit_and_zero_is_one() -> None:
    budget = Budget.model_validate({"connections": 0, "egress_bytes": None})
    assert budget.limits() == {"connections": 0}


@pytest.mark.parametrize("scope", list(Scope))
@pytest.mark.parametrize("kind", list(KINDS))
def test_every_limit_is_taken_in_every_scope(scope: Scope, kind: str) -> None:
    budgets = Policy.model_validate({"budgets": {scope.value: {kind: 1}}}).budgets
    assert getattr(budgets, scope.value).limits() == {kind: 1}


def test_the_model_and_the_budget_tree_know_the_same_limits() -> None:
    assert set(Budget.model_fields) == set(KINDS)
    assert set(Budgets.model_fields) == {scope.value for scope in Scope}


# Complaints ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "key", "remedy"),
    [
        ({"egres": {}}, "egres", "did you mean egress"),
        ({"egress": {"alow": []}}, "egress.alow", "did you mean allow"),
        ({"egress": {"allow": "cluster"}}, "egress.allow", "a list"),
        ({"egress": {"allow": None}}, "egress.allow", "a list"),
        ({"egress": {"allow": ["cluster", "x"]}}, "egress.allow[1]", "write x:443"),
        ({"egress": {"allow": [["2001:db8::/32"]]}}, "egress.allow[0]", "put it in quotes"),
        ({"egress": []}, "egress", "a mapping with keys among allow"),
        ({"egress": None}, "egress", "a mapping with keys among allow"),
        ({"egress": {"listen": [0]}}, "egress.listen[0]", "port 0 is free"),
        ({"egress": {"listen": [True]}}, "egress.listen[0]", "from 1 to 65535"),
        ({"egress": {"listen": ["80-70"]}}, "egress.listen[0]", "from 1 to 65535"),
        ({"egress": {"listen": 8080}}, "egress.listen", "a list"),
        ({"egress": {"proxy": "proxy:3128"}}, "egress.proxy", "http://host:port"),
        ({"egress": {"proxy": "https://proxy:3128"}}, "egress.proxy", "http://host:port"),
        ({"egress": {"proxy": "http://proxy"}}, "egress.proxy", "port is missing"),
        ({"egress": {"verify_names": "no"}}, "egress.verify_names", "true or false"),
        ({"egress": {"verify_names": 1}}, "egress.verify_names", "true or false"),
        ({"model_endpoint": "http://engine:8000"}, "model_endpoint", "host:port"),
        ({"model_endpoint": 8000}, "model_endpoint", "host:port"),
        ({"mode": "enforced"}, "mode", "did you mean enforce"),
        ({"mode": False}, "mode", "enforce or report"),
        ({"role": "actor"}, "role", "tool, env or policy"),
        ({"version": 2}, "version", "version 1"),
        ({"version": True}, "version", "version 1"),
        ({"version": "1"}, "version", "version 1"),
        ({"gpu": "all"}, "gpu", "none, engine or any"),
        ({"files": {"read": ["sytem"]}}, "files.read[0]", "did you mean system"),
        ({"files": {"write": ["system"]}}, "files.write[0]", "one of cwd, scratch"),
        ({"files": {"hide": ["secrets"]}}, "files.hide[0]", "absolute path"),
        ({"files": {"hide": ["/a\0b"]}}, "files.hide[0]", "a path is text"),
        ({"budgets": {"call": None}}, "budgets.call", "a mapping with keys among egress_bytes"),
        ({"budgets": {"rollout": {}}}, "budgets.rollout", "call, episode, actor, job"),
        ({"survivors": "kil"}, "survivors", "did you mean kill"),
        ({"on_violation": "kill"}, "on_violation", "kill_call"),
        ({"require": ["network"]}, "require[0]", "egress, processes, files or gpu"),
        ({1: 2}, "policy", "a key is text"),
        ({"egress": {None: 2}}, "egress", "a key is text"),
    ],
)
def test_every_complaint_names_key_value_and_remedy(data: dict[Any, Any], key: str, remedy: str) -> None:
    with pytest.raises(PolicyError, match=remedy) as caught:
        Policy.model_validate(data)
    assert caught.value.key == key


def test_all_faults_are_told_at_once_the_first_one_as_the_error() -> None:
    with pytest.raises(PolicyError) as caught:
        Policy.model_validate(
            {"egress": {"allow": ["127.1:80"]}, "budgets": {"call": {"memory": "5MB"}}, "survivors": "all", "foo": 1}
        )
    assert (caught.value.key, caught.value.value) == ("egress.allow[0]", "127.1:80")
    lines = str(caught.value).splitlines()
    assert [line.strip().split(":")[0] for line in lines] == [
        "egress.allow[0]",
        "budgets.call.memory",
        "survivors",
        "foo",
    ]


def test_a_flood_of_faults_is_cut() -> None:
    with pytest.raises(PolicyError, match="and 979 more") as caught:
        Policy.model_validate({"egress": {"allow": ["x"] * 1000}})
    assert len(str(caught.value).splitlines()) == 22


@pytest.mark.parametrize(
    "build",
    [
        lambda: Policy(mode="x"),  # type: ignore[arg-type]
        lambda: Policy(foo=1),  # type: ignore[call-arg]
        lambda: Egress(allow=("x",)),
        lambda: Budget(connections=-1),
        lambda: Files(hide=("x",)),
        lambda: Policy.model_validate([]),
        lambda: Policy.model_validate(None),
        lambda: Policy.model_validate_json('{"mode": "x"}'),
        lambda: Policy.model_validate_json("{"),
    ],
)
def test_however_it_is_built_a_fault_is_a_policy_error(build: Any) -> None:
    with pytest.raises(PolicyError) as caught:
        build()
    assert type(caught.value) is PolicyError
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


_json = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)
_keys = st.sampled_from([*Policy.model_fields, *Egress.model_fields, *Budgets.model_fields, *Budget.model_fields])


@given(
    st.one_of(_json, st.dictionaries(_keys, st.one_of(_json, st.dictionaries(_keys, _json, max_size=3)), max_size=3))
)
def test_no_data_raises_anything_but_a_policy_error(data: Any) -> None:
    try:
        policy = Policy.model_validate(data)
    except PolicyError:
        return
    CompiledPolicy.from_wire(policy.to_wire())


def test_policies_are_values() -> None:
    policy = Policy(egress=Egress(allow=("10.0.0.1:80",)), budgets=Budgets(call=Budget(connections=5)))
    assert policy == copy.deepcopy(policy)
    assert hash(policy) == hash(pickle.loads(pickle.dumps(policy)))
    with pytest.raises(ValueError, match="frozen"):
        policy.mode = Mode.REPORT  # type: ignore[misc]


# Shorthand ----------------------------------------------------------------------------------------------------------


def test_shorthand_is_the_policys_own_names() -> None:
    policy = Policy.from_shorthand(
        allow=["10.0.0.1:80"],
        listen=[8080],
        egress_bytes="1GiB",
        gpu_seconds=3600,
        call={"wall_seconds": 120},
        role="env",
        hide=["~/.ssh"],
        on_violation="kill_call",
    )
    assert policy == Policy.model_validate(
        {
            "role": "env",
            "egress": {"allow": ["10.0.0.1:80"], "listen": ["8080"]},
            "files": {"hide": ["~/.ssh"]},
            "budgets": {"actor": {"egress_bytes": GIB, "gpu_seconds": 3600}, "call": {"wall_seconds": 120}},
            "on_violation": "kill_call",
        }
    )


def test_shorthand_goes_together_with_whole_parts() -> None:
    policy = Policy.from_shorthand(
        egress=Egress(allow=("10.0.0.1:80",)),
        listen=[8080],
        budgets={"call": Budget(connections=5)},
        call={"tokens": 7},
    )
    assert policy.egress == Egress(allow=("10.0.0.1:80",), listen=("8080",))
    assert policy.budgets.call.limits() == {"connections": 5, "tokens": 7}
    assert policy.to_wire()["set"] == [
        "egress.allow",
        "egress.listen",
        "budgets.call.connections",
        "budgets.call.tokens",
    ]


@pytest.mark.parametrize(
    ("shorthand", "key", "remedy"),
    [
        ({"alow": []}, "alow", "did you mean allow"),
        ({"egress_byte": 1}, "egress_byte", "did you mean egress_bytes"),
        ({"xyzzy": 1}, "xyzzy", "no key of a policy$"),
        ({"allow": "cluster"}, "egress.allow", "a list"),
        ({"egress_bytes": "5MB"}, "budgets.actor.egress_bytes", "write 5MiB"),
        ({"allow": [], "egress": {"allow": ["cluster"]}}, "egress.allow", "given twice"),
        ({"tokens": 1, "actor": {"tokens": 2}}, "budgets.actor.tokens", "given twice"),
        ({"allow": [], "egress": "cluster"}, "egress", "a mapping"),
        ({"egress_bytes": 1, "budgets": {"actor": 5}}, "budgets.actor", "a mapping"),
    ],
)
def test_shorthand_that_cannot_be_meant(shorthand: dict[str, Any], key: str, remedy: str) -> None:
    with pytest.raises(PolicyError, match=remedy) as caught:
        Policy.from_shorthand(**shorthand)
    assert caught.value.key == key


def test_of_takes_what_guard_takes(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text('{"egress": {"allow": ["10.0.0.1:80"]}}')
    policy = Policy(egress=Egress(allow=("10.0.0.1:80",)))
    assert Policy.of(policy) is policy
    assert Policy.of(path) == Policy.of(str(path)) == Policy.of({"egress": {"allow": ["10.0.0.1:80"]}}) == policy
    assert Policy.of(allow=["10.0.0.1:80"]) == policy
    assert Policy.of() == Policy()
    with pytest.raises(PolicyError, match="not both"):
        Policy.of(policy, egress_bytes=5)
    with pytest.raises(PolicyError, match="a Policy, a mapping, or the path"):
        Policy.of(5)


# The message --------------------------------------------------------------------------------------------------------


def test_the_message_is_json_and_states_everything(contract: Policy) -> None:
    wire = contract.to_wire()
    assert json.loads(json.dumps(wire, allow_nan=False)) == wire
    assert set(wire) == {*Policy.model_fields, "set"}
    assert wire["budgets"]["call"]["egress_bytes"] == 5 << 20
    compiled = CompiledPolicy.from_wire(wire)
    for scope in Scope:
        assert compiled.limits(scope) == getattr(contract.budgets, scope.value).limits()


def test_the_message_says_what_was_set() -> None:
    assert Policy().to_wire()["set"] == []
    policy = Policy.model_validate(
        {"gpu": "none", "files": {"hide": []}, "budgets": {"call": {"tokens": 1}, "job": {}}}
    )
    assert policy.to_wire()["set"] == ["gpu", "files.hide", "budgets.call.tokens"]


def test_what_the_supervisor_imports_is_the_standard_library() -> None:
    """50 actors share one supervisor of at most 60 MiB: no pydantic and no yaml in it."""
    modules = "destination, decide, budgets, enforcement"
    code = f"import sys; from ray_guard.policy import {modules}; print(*sorted(m.split('.')[0] for m in sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = set(out.split())
    assert "ray_guard" in loaded
    assert loaded.isdisjoint({"pydantic", "pydantic_core", "yaml", "asyncio", "ray", "opentelemetry"})
