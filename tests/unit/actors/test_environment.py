from __future__ import annotations

from typing import Any

import pytest

from ray_guard.actors import environment
from ray_guard.actors.environment import HOOK, NEXT_HOOK, POLICY_ID, SETUP, SUBMITTER, restrain, variables
from ray_guard.errors import NotEnforced


def test_ids_are_listed_once_in_order() -> None:
    assert environment.split(" a,b,,a ,c") == ("a", "b", "c")
    assert environment.split("") == environment.split(None) == ()


@pytest.mark.parametrize(
    ("own", "inherited", "ids", "expected"),
    [
        ({}, {}, ["a"], "a"),
        ({}, {POLICY_ID: "job"}, ["a"], "job,a"),
        ({POLICY_ID: ""}, {POLICY_ID: "job"}, ["a"], "job,a"),
        ({POLICY_ID: "x"}, {POLICY_ID: "job,a"}, ["a"], "job,a,x"),
        ({POLICY_ID: "job,a"}, {POLICY_ID: "job"}, ["a"], "job,a"),
    ],
)
def test_policies_only_add_up(own: dict[str, str], inherited: dict[str, str], ids: list[str], expected: str) -> None:
    assert variables(own, inherited, ids=ids)[POLICY_ID] == expected


@pytest.mark.parametrize(
    ("own", "inherited", "follows"),
    [
        ({}, {}, None),
        ({}, {HOOK: "jobs.hook"}, "jobs.hook"),
        ({HOOK: "actors.hook"}, {HOOK: "jobs.hook"}, "actors.hook"),
        ({}, {HOOK: SETUP, NEXT_HOOK: "jobs.hook"}, "jobs.hook"),
        ({HOOK: "actors.hook"}, {HOOK: SETUP, NEXT_HOOK: "jobs.hook"}, "actors.hook"),
        ({HOOK: ""}, {HOOK: SETUP, NEXT_HOOK: "jobs.hook"}, "jobs.hook"),
        ({HOOK: SETUP, NEXT_HOOK: "actors.hook"}, {HOOK: "jobs.hook"}, "actors.hook"),
        ({HOOK: SETUP}, {HOOK: SETUP}, None),
    ],
)
def test_our_hook_comes_first_and_the_one_it_displaced_follows(
    own: dict[str, str], inherited: dict[str, str], follows: str | None
) -> None:
    result = variables(own, inherited, ids=["a"])
    assert result[HOOK] == SETUP
    # Ray lays `inherited` underneath.
    assert {**inherited, **result}.get(NEXT_HOOK) == follows


def test_a_second_pass_changes_nothing() -> None:
    once = variables({HOOK: "actors.hook", "A": "1"}, {HOOK: "jobs.hook"}, ids=["a"], submitter="s")
    assert variables(once, {HOOK: "jobs.hook"}, ids=["a"], submitter="s") == once


def test_the_users_variables_are_kept_and_settings_are_weakest() -> None:
    settings = {"RAY_GUARD_RUN_ID": "drivers", "RAY_GUARD_EVIDENCE": "drivers"}
    result = variables(
        {"A": "1", "RAY_GUARD_RUN_ID": "own"}, {"RAY_GUARD_EVIDENCE": "jobs"}, ids=["a"], settings=settings
    )
    assert result["A"] == "1"
    assert result["RAY_GUARD_RUN_ID"] == "own"
    assert "RAY_GUARD_EVIDENCE" not in result
    assert SUBMITTER not in result
    assert variables({}, {}, ids=["a"], submitter="actor")[SUBMITTER] == "actor"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pip", ["x"]),
        ("uv", ["x"]),
        ("conda", "base"),
        ("container", {"image": "x"}),
        ("image_uri", "x"),
        ("py_executable", "sh"),
        ("working_dir", "https://example.org/x.zip"),
        ("py_modules", ["https://example.org/x.zip"]),
        ("_nsight", "default"),
        ("java_jars", ["x"]),
        ("something_new", True),
    ],
)
def test_a_guarded_process_chooses_no_field_that_ray_acts_on(field: str, value: Any) -> None:
    with pytest.raises(NotEnforced, match=rf"runtime_env\.{field}"):
        restrain({field: value}, {})
    assert restrain({field: value}, {field: value})[field] == value, "what is inherited may be repeated"
    assert field in restrain({field: None}, {})


@pytest.mark.parametrize(
    "name", ["LD_PRELOAD", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "PATH", "BASH_ENV", "ENV"]
)
def test_a_guarded_process_sets_nothing_that_acts_before_the_hook(name: str) -> None:
    with pytest.raises(NotEnforced, match=rf"env_vars\.{name}"):
        restrain({"env_vars": {name: "x"}}, {"env_vars": {name: "y"}})
    assert restrain({"env_vars": {name: "y"}}, {"env_vars": {name: "y"}})["env_vars"] == {name: "y"}


def test_our_own_variables_are_not_a_guarded_processs_to_set() -> None:
    asked = {"env_vars": {POLICY_ID: "lax", SUBMITTER: "other", "RAY_GUARD_EVIDENCE": "/tmp", "A": "1"}}
    assert restrain(asked, {})["env_vars"] == {"A": "1"}
    inherited = {POLICY_ID: "strict", HOOK: SETUP}
    assert variables(restrain(asked, {})["env_vars"], inherited, ids=["strict"])[POLICY_ID] == "strict"


def test_the_environment_that_was_given_is_left_alone() -> None:
    asked = {"env_vars": {"A": "1", POLICY_ID: "x"}, "config": {"setup_timeout_seconds": 5}}
    result = restrain(asked, {})
    assert asked["env_vars"] == {"A": "1", POLICY_ID: "x"}
    assert result["config"] == {"setup_timeout_seconds": 5}
