"""Tokens and FLOPs: every scope that pays must have room, whoever asked pays too, and a crash is no way out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from reserving import Job

from ray_guard.evidence.reader import Quarantine, merge, read

OLMOE = {
    "model_type": "olmoe", "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16,
    "num_key_value_heads": 16, "intermediate_size": 1024, "num_experts": 64, "num_experts_per_tok": 8,
    "vocab_size": 50304,
}  # fmt: skip

pytestmark = pytest.mark.kernel


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
asked = hear()
def pays():
    held = reserve(tokens=50, context=asked)
    say([held.scope, held.unknown, refused(reserve, tokens=1000)])
said = refused(pays)
if said:
    say(said)
"""


_IDS = ("episode", "call", "span")


@pytest.mark.parametrize("forged", [{}, {"trace": "ab" * 16}, dict.fromkeys(_IDS, "ab" * 8)])
def test_no_strange_episode_is_charged(job: Job, forged: dict[str, str]) -> None:
    """One of another job, or one whose ids are guessed."""
    env = job.start(_ENV, _tokens("episode", 10))
    asked = {**env.hears(), **forged}
    engine = job.start(_ENGINE, _tokens("actor", 1000), run="" if forged else "another-job")
    engine.says({name: value for name, value in asked.items() if forged or name != "quotas"})
    assert engine.hears() == ["actor", True, ["tokens", 1050, 1000, "actor"]]
    env.says(None)
    assert env.hears() == []


def test_who_is_limited_by_a_supervisor_that_cannot_be_asked_is_refused(job: Job) -> None:
    env = job.start(_ENV, _tokens("episode", 10))
    engine = job.start(_ENGINE, _tokens("actor", 1000), run="another-job")
    engine.says(env.hears())
    assert "not enforced: budgets.episode.tokens" in engine.hears()
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


def test_a_chat_is_charged_and_begins_only_where_there_is_room(job: Job) -> None:
    program = """
found = []
with episode(id="r"):
    with ray_guard.chat("m") as chat:
        chat.usage(70, 20)
        chat.usage(5, 5)
    def again():
        with ray_guard.chat("m"):
            pass
    found.append(refused(again))
with episode(id="s") as scope:
    with ray_guard.chat("m"):
        pass
    try:
        with ray_guard.chat("m"):
            raise ValueError("the model's server is gone")
    except ValueError:
        pass
    found.append([v["reason"] for v in scope.violations()])
    found.append(refused(reserve, tokens=99))
say(found)
"""
    refusal, unmeasured, left = job.says(program, _tokens("episode", 100))
    assert refusal == ["tokens", 101, 100, "episode"]
    assert unmeasured == ["unmeasured"]  # an error says for itself that nobody knows
    assert left == ["tokens", 101, 100, "episode"]  # each chat has cost one token at least


def _chats(folder: Path) -> list[Any]:
    spans = [entry.span for entry in merge(read([folder], Quarantine())).values()]
    chats = sorted((span for span in spans if span.name.startswith("chat ")), key=lambda span: span.start_ns)
    return [dict(span.attributes).get("ray_guard.charged_by") for span in chats]


def test_a_chat_around_an_engines_request_is_charged_once(job: Job) -> None:
    program = """
found = []
with episode(id="r"):
    with ray_guard.chat("m") as chat:  # the engine may have all there is, though a chat needs room for one
        reserve(tokens=100).settle(tokens=60)
        chat.usage(40, 20)
    found += [refused(reserve, tokens=41), refused(reserve, tokens=40)]
with episode(id="refused"):
    with ray_guard.chat("m") as chat:
        found += [refused(reserve, tokens=101)]
        chat.usage(60, 0)
    found += [refused(reserve, tokens=41)]
with episode(id="within"):
    with ray_guard.chat("m") as outer:
        with ray_guard.chat("n") as inner:
            inner.usage(20, 10)
        with tool_call("ask"):
            reserve(tokens=30).settle(tokens=30)
        outer.usage(1, 0)
    found += [refused(reserve, tokens=40)]
say(found)
"""
    over, fits, beyond, charged, both = job.says(program, _tokens("episode", 100))
    assert over == beyond == charged == ["tokens", 101, 100, "episode"]
    assert fits is None
    assert both == ["tokens", 101, 100, "episode"]  # 30 of one chat, 30 of a tool's request, 1 of the other chat
    assert _chats(job.folder) == ["engine", None, None, None]


def test_a_chat_around_a_request_to_another_actor_is_charged_once(job: Job) -> None:
    env = job.start(
        """
with episode(id="r"):
    with ray_guard.chat("m") as chat:
        say(ray_guard.context())
        hear()
        chat.usage(40, 20)
    say([refused(reserve, tokens=41), refused(reserve, tokens=40)])
    hear()
""",
        _tokens("episode", 100),
    )
    engine = job.start(
        "held = reserve(tokens=100, context=hear())\nheld.settle(tokens=60)\nray_guard.violations()\nsay(0)"
    )
    engine.says(env.hears())
    assert engine.hears() == 0
    env.says(None)
    assert env.hears() == [["tokens", 101, 100, "episode"], None]
    env.says(None)
    assert env.ends() == engine.ends() == 0
    assert _chats(job.folder) == ["engine"]


def test_a_chat_is_charged_the_flops_of_its_model(job: Job, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(OLMOE))
    program = f"""
def chat(**more):
    with ray_guard.chat("m", **more) as chat:
        chat.usage(8, 2)
found = [refused(chat), refused(chat, config={str(config)!r}), refused(chat, config={{}})]
with ray_guard.chat("m", config={str(config)!r}) as last:
    pass
chat(config={str(config)!r})
say([*found, refused(chat, config={str(config)!r})])
"""
    unknown, known, malformed, exhausted = job.says(
        program, {"budgets": {"actor": {"flops": 3e10}}, "files": {"read": ["system", "env", "cwd", str(tmp_path)]}}
    )
    assert unknown.startswith("NotEnforced: not enforced: budgets.actor.flops")
    assert known is None
    assert malformed.startswith("UnknownArchitecture: model_type: None")
    assert exhausted[:1] + exhausted[2:] == ["flops", 3e10, "actor"]


def _warnings(folder: Path) -> list[dict[str, Any]]:
    spans = [entry.span for entry in merge(read([folder], Quarantine())).values()]
    return [dict(span.attributes) for span in spans if span.name == "ray_guard.budget_warning"]


def test_eighty_percent_are_warned_of_once_in_the_evidence_and_in_the_log(job: Job) -> None:
    program = """
import logging
class Kept(logging.Handler):
    texts = []
    def emit(self, record):
        self.texts.append(record.getMessage())
logging.getLogger("ray_guard").addHandler(Kept())
with episode(id="r"), tool_call("ask"):
    reserve(tokens=100).settle(tokens=79)
    before = list(Kept.texts)
    for _ in range(3):
        reserve(tokens=3).settle(tokens=3)
say([before, Kept.texts, ray_guard.violations()])
"""
    before, texts, violations = job.says(program, _tokens("episode", 100))
    assert before == violations == []
    assert len(texts) == 1
    assert texts[0].startswith("ray_guard: episode ")
    assert texts[0].endswith(": tokens is at 82 of 100")
    (warning,) = _warnings(job.folder)
    assert warning["ray_guard.budget.kind"] == "tokens"
    assert warning["ray_guard.budget.scope"] == "episode"
    assert (warning["ray_guard.budget.value"], warning["ray_guard.budget.limit"]) == (82, 100)
    assert (warning["rl.rollout.id"], warning["ray_guard.source"]) == ("r", "supervisor")
    told = subprocess.run(
        [sys.executable, "-m", "ray_guard.cli", "report", str(job.folder)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "Limits nearly reached" in told.stdout


@pytest.mark.parametrize(
    ("kind", "limit", "deed"),
    [
        ("connections", 5, "[__import__('socket').socket().connect_ex(('127.0.0.1', 9)) for _ in range(4)]"),
        ("cpu_seconds", 0.5, "tool('while True: pass')"),
        ("processes", 2, "tool('import os, time; os.fork(); time.sleep(.2)')"),
        ("memory", 60 << 20, "tool('import time; held = b\"1\" * (49 << 20); time.sleep(.6)')"),
        ("wall_seconds", 1.0, "tool('import time; time.sleep(.95)')"),
    ],
)
def test_every_kind_of_limit_is_warned_of(job: Job, kind: str, limit: float, deed: str) -> None:
    program = f"""
def tool(code):
    ray_guard.run([sys.executable, "-I", "-S", "-c", code])
with episode(id="r"), tool_call("work"):
    {deed}
say(0)
"""
    job.says(program, {"egress": {"allow": ["127.0.0.1:9"]}, "budgets": {"call": {kind: limit}}})
    assert [warning["ray_guard.budget.kind"] for warning in _warnings(job.folder)] == [kind]


_SWALLOWS = """
@ray_guard.tool
def ask(tokens):
    try:
        reserve(tokens=tokens).settle(tokens=tokens)
        return "answered"
    except Exception as error:
        return str(error)
"""


def test_deny_may_become_text_for_the_model(job: Job) -> None:
    program = f"""{_SWALLOWS}
with episode(id="r"):
    say([ask(60), ask(60)])
"""
    first, second = job.says(program, _tokens("episode", 100))
    assert first == "answered"
    assert "tokens 120 exceeds the limit of 100" in second


@pytest.mark.parametrize("action", ["kill_call", "end_episode"])
def test_what_ends_a_call_or_episode_gets_past_a_handler_that_makes_text_of_errors(job: Job, action: str) -> None:
    program = f"""{_SWALLOWS}
def roll_out():
    with episode(id="r"):
        found.extend([refused(ask, 60), refused(ask, 60), refused(ask, 1)])
found = []
found.append(refused(roll_out))
with episode(id="s"):
    found.append(ask(60))
say(found)
"""
    first, offending, later, whole, other = job.says(program, _tokens("episode", 100, on_violation=action))
    passed = ["tokens", 120, 100, "episode"]
    assert (first, offending, other) == (None, passed, "answered")
    assert (later, whole) == ((None, None) if action == "kill_call" else (passed, passed))


def test_an_asking_episode_is_ended_by_its_own_policy(job: Job) -> None:
    env = job.start(
        """
@ray_guard.tool
def ask():
    try:
        say(ray_guard.context())
        raise ray_guard.RayGuardError(hear())
    except Exception as error:
        return str(error)
def roll_out():
    with episode(id="r"):
        ask()
say(refused(roll_out))
""",
        _tokens("episode", 100, on_violation="end_episode"),
    )
    asked = env.hears()
    engine = job.start(
        """
asked = hear()
found = [refused(reserve, tokens=tokens, context=asked) for tokens in (101, 1)]
say([*found, refused(reserve, tokens=1)])
"""
    )
    engine.says(asked)
    over, ended, own = engine.hears()
    assert over == ended == ["tokens", 101, 100, "episode"]
    assert own is None
    env.says("BudgetExceeded, said the engine")
    assert env.hears() == ["tokens", 101, 100, "episode"]


def test_a_job_is_under_the_least_of_what_its_programs_policies_say(job: Job) -> None:
    first = job.start("say(0)\nhear()\nsay(refused(reserve, tokens=101))")
    first.hears()
    second = job.start("say(refused(reserve, tokens=101))\nhear()", _tokens("job", 100))
    assert second.hears() == ["tokens", 101, 100, "job"]
    first.says(None)
    assert first.hears() == ["tokens", 101, 100, "job"]
    second.says(None)


def test_a_second_policy_in_a_process_tightens_its_budgets(job: Job) -> None:
    program = """
reserve(tokens=60).settle(tokens=60)
ray_guard.confine({"egress": {"allow": []}, "budgets": {"actor": {"tokens": 100}, "episode": {"tokens": 10}}})
found = [refused(reserve, tokens=41)]
with episode(id="r"):
    found.append(refused(reserve, tokens=11))
say(found)
"""
    assert job.says(program, _tokens("actor", 1000)) == [["tokens", 101, 100, "actor"], ["tokens", 11, 10, "episode"]]


def test_a_lone_command_cannot_have_a_limit_of_tokens(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text("budgets: {call: {tokens: 100}}\n")
    argv = [sys.executable, "-m", "ray_guard.cli", "run", "--policy", "policy.yaml", "--", "true"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 125
    assert "not enforced: budgets.call.tokens" in done.stderr
