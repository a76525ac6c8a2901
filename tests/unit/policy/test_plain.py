"""A policy read without the models is what the models read; what they refuse, or may mean otherwise, goes to them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_guard.errors import PolicyError
from ray_guard.policy import plain
from ray_guard.policy.model import Budget, Budgets, Egress, Files, Policy
from ray_guard.records import Mode


def through_models(data: Any) -> dict[str, Any] | None:
    try:
        return Policy.model_validate(data).to_wire()
    except PolicyError:
        return None


#: for every key what is right, what is nearly right, and what other keys take
_VALUES: list[Any] = [
    *(None, True, False, 0, 1, 1.0, 1.5, -1, 60, 10**19, float("nan"), float("inf"), "1", "5MiB", "0.5 GiB", "5MB"),
    *("1e18", "enforce", "report", "tool", "env", "policy", "none", "engine", "any", "plain", "confine", "kill"),
    *("keep", "kill_call", "http://proxy:3128", "proxy:3128", "engine:8000", "10.0.0.1:80", "", "x", "\udc80", b"x"),
    *([], ["cluster"], ("10.0.0.1:80",), ["a.example.org:443", "unix:///run/x"], ["x"], [80, "6000-6010"], ["80-70"]),
    *(["system", "/opt"], ["~/x"], ["/\udc80"], ["cwd"], ["egress", "gpu"], [None], [True], {}, {"x": 1}, set()),
    Mode.REPORT,
]
_SIMPLE = [each for each in _VALUES if not isinstance(each, set | Mode)]
_values = st.sampled_from(_VALUES)
_sections = {"egress": Egress, "files": Files}


def _section(model: Any) -> st.SearchStrategy[Any]:
    return st.one_of(st.dictionaries(st.sampled_from([*model.model_fields, "odd"]), _values, max_size=3), _values)


_policies = st.fixed_dictionaries(
    {},
    optional={
        **{key: _values for key in Policy.model_fields if key not in ("egress", "files", "budgets")},
        **{key: _section(model) for key, model in _sections.items()},
        "budgets": st.one_of(
            st.dictionaries(st.sampled_from(list(Budgets.model_fields)), _section(Budget), max_size=2), _values
        ),
    },
)


@given(st.one_of(_policies, st.dictionaries(st.sampled_from(list(Policy.model_fields)), _values, max_size=2)))
def test_what_is_read_is_what_the_models_read(data: dict[str, Any]) -> None:
    wire = plain.read(data)
    if wire is not None:
        assert wire == through_models(data)


@pytest.mark.parametrize("key", list(Policy.model_fields))
def test_every_value_of_every_key(key: str) -> None:
    """One key at a time: what the models take is read at first sight, but for values of other types."""
    for value in _SIMPLE:
        wire = plain.read({key: value})
        expected = through_models({key: value})
        assert wire == expected or (key, value) == ("version", 1.0), (key, value)


@pytest.mark.parametrize("section", [*_sections, *Budgets.model_fields])
def test_every_value_of_every_key_of_a_section(section: str) -> None:
    for key in _sections.get(section, Budget).model_fields:
        for value in _SIMPLE:
            part = {section: {key: value}}
            data = part if section in _sections else {"budgets": part}
            if value != ["/\udc80"]:  # a path in no encoding: for the models
                assert plain.read(data) == through_models(data), data


def test_the_smallest_policy_and_an_empty_one() -> None:
    assert plain.read({}) == Policy().to_wire()
    assert plain.read({"version": 1, "budgets": {"job": {}}}) == Policy.model_validate({"version": 1}).to_wire()


def test_models_within_a_mapping_are_the_models_business() -> None:
    data = {"egress": Egress(allow=("10.0.0.1:80",))}
    assert plain.read(data) is None
    assert plain.wire_of(data) == Policy.model_validate(data).to_wire()
    assert plain.wire_of(Policy.model_validate(data)) == Policy.model_validate(data).to_wire()


def test_a_default_is_nobodys_to_change() -> None:
    first = plain.read({})
    assert first is not None
    first["egress"]["allow"].append("0.0.0.0/0:*")
    assert plain.read({}) == Policy().to_wire()


def test_faults_are_told_by_the_models(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("egress: {allow: [x]}\nsurvivors: kil\n")
    with pytest.raises(PolicyError) as caught:
        plain.wire_of(path)
    with pytest.raises(PolicyError) as expected:
        Policy.load(path)
    assert str(caught.value) == str(expected.value)
    with pytest.raises(PolicyError, match="a Policy, a mapping, or the path"):
        plain.wire_of(5)


def test_no_models_are_loaded_for_what_is_right() -> None:
    code = (
        "import sys; from ray_guard.policy import plain; plain.wire_of({'egress': {'allow': ['10.0.0.1:80']}});"
        "print([m for m in ('pydantic', 'yaml', 'dataclasses') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
