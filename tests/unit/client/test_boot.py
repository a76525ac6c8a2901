"""What a supervisor is started with, and which process may go on as one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import ray_guard
from ray_guard.client import boot

PACKAGE = str(Path(ray_guard.__file__).parents[1])
STANDARD = os.path.dirname(os.__file__)


def test_it_imports_from_where_no_tool_may_write_and_from_the_standard_library_first() -> None:
    given = [
        "",
        "scripts",
        "/srv/job",
        "/venv/lib/python3.11/site-packages",
        STANDARD,
        "/usr/lib/python3/dist-packages",
    ]
    assert boot.import_path(given) == [
        STANDARD,
        f"{STANDARD}/lib-dynload",
        "/venv/lib/python3.11/site-packages",
        "/usr/lib/python3/dist-packages",
        PACKAGE,
    ]


def test_a_package_beside_others_is_found_once() -> None:
    found = boot.import_path([PACKAGE, f"{PACKAGE}/site-packages"])
    assert found.count(PACKAGE) == 1


FRESH = f"import sys; sys.path.append({PACKAGE!r}); import ray_guard.cli.run; from ray_guard.client import boot; "


def may_fork(prelude: str, *options: str, variables: dict[str, str] | None = None) -> bool:
    environment = {"PATH": os.environ["PATH"], **(variables or {})}
    argv = [sys.executable, *options, "-c", f"{prelude}\n{FRESH} print(boot.may_fork())"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, env=environment)
    return done.stdout == "True\n"


def test_a_process_that_has_only_just_begun_may_go_on_as_a_supervisor() -> None:
    assert may_fork("pass", variables={"PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"})


@pytest.mark.parametrize(
    "prelude",
    [
        "import threading; threading.Thread(target=lambda: threading.Event().wait(), daemon=True).start()",
        "import sys; sys.settrace(lambda *_: None)",
        "import types, sys; sys.modules['uuid'] = m = types.ModuleType('uuid'); m.__file__ = '/srv/uuid.py'",
        "import types, sys; sys.modules['patches'] = types.ModuleType('patches')",
        "import sys; sys.path.insert(0, FOLDER); import sched",
    ],
)
def test_what_has_begun_anything_else_may_not(prelude: str, tmp_path: Path) -> None:
    (tmp_path / "sched.py").touch()
    assert not may_fork(prelude.replace("FOLDER", repr(str(tmp_path))))


@pytest.mark.parametrize("variable", ["PYTHONHASHSEED", "LD_LIBRARY_PATH", "MALLOC_ARENA_MAX"])
def test_nor_where_variables_change_how_it_runs(variable: str) -> None:
    assert not may_fork("pass", variables={variable: "1"})


def test_nor_where_options_do() -> None:
    assert not may_fork("pass", "-W", "error")
