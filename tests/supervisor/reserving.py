"""Confined programs of one job that reserve tokens, say what came of it and hear what to do next."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_PRELUDE = """
import gc, json, os, sys
import ray_guard
from ray_guard.client import confine as confining
from ray_guard.client.quota import reserve

supervisors = []
_let_judge = confining._let_judge
confining._let_judge = lambda pid: (supervisors.append(pid), _let_judge(pid))
ray_guard.confine(json.loads(sys.argv[1]))
episode, tool_call = ray_guard.episode, ray_guard.tool_call

def say(value):
    print(json.dumps(value), flush=True)

def hear():
    return json.loads(sys.stdin.readline())

def refused(action, *args, **kwargs):
    try:
        action(*args, **kwargs)
    except ray_guard.BudgetExceeded as error:
        if not error.source:
            return "nobody's"
        return [error.kind, error.value, error.limit, error.scope]
    except ray_guard.RayGuardError as error:
        return f"{type(error).__name__}: {error}"
    return None
"""


class Program:
    """A confined program that says lines of JSON and hears some."""

    def __init__(self, program: str, policy: dict[str, Any], folder: Path, run: str) -> None:
        environment = {**os.environ, "RAY_GUARD_EVIDENCE": str(folder), "RAY_GUARD_RUN_ID": run}
        argv = [sys.executable, "-c", _PRELUDE + program, json.dumps({"egress": {"allow": []}, **policy})]
        self.process = subprocess.Popen(
            argv, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def hears(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            pytest.fail(f"it said no more: {self.process.communicate(timeout=20)[1]}")
        return json.loads(line)

    def says(self, value: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(value) + "\n")
        self.process.stdin.flush()

    def ends(self) -> int:
        _, said = self.process.communicate(timeout=30)
        sys.stderr.write(said)
        return self.process.returncode


class Job:
    """Programs of one job, and what they left as evidence."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.programs: list[Program] = []

    def start(self, program: str, policy: dict[str, Any] | None = None, run: str = "") -> Program:
        started = Program(program, policy or {}, self.folder, run or f"run-{self.folder.parent.name}")
        self.programs.append(started)
        return started

    def says(self, program: str, policy: dict[str, Any]) -> Any:
        """What a program alone says in its one line."""
        started = self.start(program, policy)
        said = started.hears()
        assert started.ends() == 0
        return said
