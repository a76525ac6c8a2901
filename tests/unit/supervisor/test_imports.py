"""What every tool's first process is a copy of, and what a start waits for: each module loaded costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ray_guard.supervisor.__main__ import SHARED


def loaded_by(module: str) -> set[str]:
    code = f"import sys; sys.path[:0] = {sys.path!r}; import {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert module in loaded
    return loaded


def test_the_zygote_is_small() -> None:
    loaded = loaded_by("ray_guard.supervisor.zygote")
    heavy = {"dataclasses", "inspect", "logging", "pathlib", "subprocess", "ipaddress", "hashlib", "ray_guard.records"}
    assert not loaded & heavy


def test_what_zygote_and_service_both_load_is_loaded_before_there_are_two() -> None:
    zygote, service = loaded_by("ray_guard.supervisor.zygote"), loaded_by("ray_guard.supervisor.service")
    main = loaded_by("ray_guard.supervisor.__main__")
    before = main.union(*map(loaded_by, SHARED))
    assert not {name for name in zygote & service - before if name.startswith("ray_guard.")}
    assert before <= zygote | main


def test_a_supervisor_does_not_wait_for_what_its_first_call_does_not_need() -> None:
    loaded = loaded_by("ray_guard.supervisor.service")
    rare = {
        "ray_guard.supervisor.gpu",
        "ray_guard.supervisor.cluster",
        "ray_guard.supervisor.model_calls",
        "ray_guard.egress.resolver.door",
        "ray_guard.evidence.note",
    }
    slow = {
        "dataclasses",
        "inspect",
        "logging",
        "traceback",
        "pathlib",
        "subprocess",
        "hashlib",
        "urllib.parse",
        "argparse",
        # the zygote's, which loads it at the same time
        "ray_guard.supervisor.zygote",
        "ray_guard.supervisor.embryo",
    }
    assert not loaded & (rare | slow)


def test_a_command_that_runs_one_tool_loads_no_parser_and_no_model() -> None:
    loaded = loaded_by("ray_guard.cli.run")
    assert not loaded & {"argparse", "pydantic", "dataclasses", "pathlib", "tempfile", "subprocess", "yaml"}


def test_a_policy_in_json_is_read_without_loading_yaml(tmp_path: Path) -> None:
    policy = tmp_path / "policy.json"
    policy.write_text('{"version": 1, "egress": {"allow": []}}\n')
    code = (
        f"import sys; from ray_guard.policy.load import read_policy; print(read_policy({str(policy)!r}), *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("{'version': 1, 'egress': {'allow': []}}")
    assert "yaml" not in done.stdout.split()
