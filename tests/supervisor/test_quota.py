"""Tokens and FLOPs: every scope that pays must have room, whoever asked pays too, and a crash is no way out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.kernel

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


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    found = Job(tmp_path / "evidence")
    yield found
    for each in found.programs:
        each.process.kill()
        each.process.communicate()


def _tokens(scope: str, limit: int, **more: Any) -> dict[str, Any]:
    return {"budgets": {scope: {"tokens": limit}}, **more}


@pytest.mark.parametrize("scope", ["call", "episode", "actor", "job"])
def test_what_has_no_room_is_refused_before_it_runs(job: Job, scope: str) -> None:
    program = """
with episode(id="r"), tool_call("ask"):
    reserve(tokens=60).settle(tokens=40)
    found = [refused(reserve, tokens=61)]
    reserve(tokens=60).release()
    held = reserve(tokens=60)
    found += [held.scope, refused(reserve, tokens=1)]
    held.settle(tokens=60)
say([*found, refused(reserve, tokens=1), [v["kind"] for v in ray_guard.violations()]])
"""
    refusal, paid, full, outside, violations = job.says(program, _tokens(scope, 100))
    assert refusal == ["tokens", 101, 100, scope]
    assert paid == "call"
    assert full == ["tokens", 101, 100, scope]
    assert outside == (["tokens", 101, 100, scope] if scope in ("actor", "job") else None)
    assert violations == ["tokens"] * (3 if outside else 2)


def test_flops_that_nobody_knows_are_refused_and_not_guessed(job: Job) -> None:
    program = """
unknown = refused(reserve, tokens=10)
nothing = refused(reserve, tokens=10, flops=0.0)
held = reserve(tokens=10, flops=6e9)
held.settle(tokens=5, flops=3e9)
say([unknown, nothing, refused(reserve, tokens=1, flops=8e9), ray_guard.violations()[0]["reason"]])
"""
    unknown, nothing, over, reason = job.says(program, {"budgets": {"actor": {"flops": 1e10}}})
    assert unknown.startswith("NotEnforced: not enforced: budgets.actor.flops")
    assert nothing == unknown
    assert over == ["flops", 1.1e10, 1e10, "actor"]
    assert reason == "unmeasured"


_ENV = """
with episode(id="r") as scope, tool_call("ask"):
    say(ray_guard.context())
    hear()
say([v["kind"] for v in scope.violations()])
hear()
"""


def test_the_episode_that_asked_pays_and_the_job_once(job: Job) -> None:
    env = job.start(_ENV, {"budgets": {"episode": {"tokens": 100}, "job": {"tokens": 200}}})
    asked = env.hears()
    engine = job.start(
        """
asked = hear()
held = reserve(tokens=80, context=asked)
found = [held.scope, held.unknown, refused(reserve, tokens=21, context=asked)]
held.settle(tokens=80)
found.append(refused(reserve, tokens=21, context=asked))
with ray_guard.attach(asked):
    found.append(refused(reserve, tokens=21))
found.append(refused(reserve, tokens=121))
reserve(tokens=120).settle(tokens=120)
say([*found, refused(reserve, tokens=1), ray_guard.violations()])
""",
        {"budgets": {"actor": {"tokens": 1000}}},
    )
    engine.says(asked)
    scope, unknown, held, settled, attached, beyond, exhausted, violations = engine.hears()
    assert (scope, unknown) == ("call", False)
    assert held == settled == attached == ["tokens", 101, 100, "episode"]
    assert beyond == exhausted == ["tokens", 201, 200, "job"]
    assert len(violations) == 2  # the job's: what an episode lacks is the episode's
    env.says(None)
    assert env.hears() == ["tokens"] * 3
    env.says(None)
    assert env.ends() == engine.ends() == 0


_ENGINE = """
held = reserve(tokens=50, context=hear())
say([held.scope, held.unknown, refused(reserve, tokens=1000)])
"""


def test_what_is_not_of_this_job_is_charged_to_the_actor_alone_and_said_so(job: Job) -> None:
    env = job.start(_ENV, _tokens("episode", 10))
    asked = env.hears()
    stranger = job.start(_ENGINE, _tokens("actor", 1000), run="another-job")
    stranger.says(asked)
    assert stranger.hears() == ["actor", True, ["tokens", 1050, 1000, "actor"]]
    guesser = job.start(_ENGINE, _tokens("actor", 1000))
    guesser.says({**asked, "trace": "ab" * 16})
    assert guesser.hears() == ["actor", True, ["tokens", 1050, 1000, "actor"]]
    env.says(None)
    assert env.hears() == []


@pytest.mark.parametrize("how", ["os._exit(0)", "os.kill(os.getpid(), 9)", "del held; gc.collect(); say(0); hear()"])
def test_what_was_reserved_and_never_settled_is_charged_as_reserved(job: Job, how: str) -> None:
    env = job.start(
        """
with episode(id="r"):
    say(ray_guard.context())
    hear()
    for _ in range(100):  # its death is noticed by its pidfd
        found = refused(reserve, tokens=41)
        if found is None or found[1] != 141:
            break
    say([found, refused(reserve, tokens=40)])
""",
        _tokens("episode", 100),
    )
    asked = env.hears()
    engine = job.start(f"held = reserve(tokens=60, context=hear())\nsay(0)\nhear()\n{how}")
    engine.says(asked)
    engine.hears()
    engine.says(None)
    if "say" in how:
        engine.hears()
    else:
        engine.ends()
    env.says(None)
    assert env.hears() == [["tokens", 101, 100, "episode"], None]


def test_an_episode_that_ends_first_leaves_the_rest_to_the_actors(job: Job) -> None:
    env = job.start(
        """
with episode(id="r"):
    say(ray_guard.context())
    hear()
say(refused(reserve, tokens=51))
hear()
say([refused(reserve, tokens=71), refused(reserve, tokens=70)])
""",
        _tokens("actor", 100),
    )
    asked = env.hears()
    engine = job.start("held = reserve(tokens=50, context=hear())\nsay(0)\nhear()\nheld.settle(tokens=30)\nsay(0)")
    engine.says(asked)
    engine.hears()
    env.says(None)
    assert env.hears() == ["tokens", 101, 100, "actor"]
    engine.says(None)
    engine.hears()
    assert engine.ends() == 0
    env.says(None)
    assert env.hears() == [["tokens", 101, 100, "actor"], None]
