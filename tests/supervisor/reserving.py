"""Confined programs of one job that reserve tokens, say what came of it and hear what to do next."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

_PRELUDE = """
import gc, json, os, sys
import ray_guard
from ray_guard.client.quota import reserve
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


def supervisor() -> int:
    """The one of this namespace and user. Its zygote and leaders have its command line too."""
    here = os.stat("/proc/self/ns/mnt").st_ino
    below: dict[int, list[int]] = {}
    for process in psutil.process_iter(["cmdline", "uids"]):
        with contextlib.suppress(psutil.Error, FileNotFoundError):
            ours = "ray_guard.supervisor.__main__" in " ".join(process.info["cmdline"] or ())
            if not ours or process.info["uids"].real != os.getuid():
                continue
            with contextlib.suppress(PermissionError):  # it is not dumpable: root alone may ask, and has it in many
                if os.stat(f"/proc/{process.pid}/ns/mnt").st_ino != here:
                    continue
            below[process.pid] = [child.pid for child in process.children()]
    (found,) = below.keys() - {child for children in below.values() for child in children}
    return found


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
