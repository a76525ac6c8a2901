"""Purses: who reserves again and again does not wait each time, and no limit is less exact for it."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
from reserving import Job

from ray_guard.evidence.reader import Quarantine, merge, read

pytestmark = pytest.mark.kernel

_ASKS = """
from ray_guard.client.channel import Channel
from ray_guard.client.purses import purses
asked = []
exchange = Channel.exchange
Channel.exchange = lambda line, message, *more: (asked.append(message["op"]), exchange(line, message, *more))[1]

def draw(tokens=10, flops=None, **more):
    return reserve(tokens=tokens, flops=flops, often=True, **more)

def until_refused(*args, **kwargs):
    "As many as are granted, and what the next is refused with."
    held = []
    while (refusal := refused(lambda: held.append(draw(*args, **kwargs)))) is None:
        pass
    return held, refusal
"""


@pytest.mark.parametrize("scope", ["call", "episode", "actor", "job"])
def test_a_limit_is_exact_and_most_requests_ask_nobody(job: Job, scope: str) -> None:
    program = f"""{_ASKS}
with episode(id="r"), tool_call("ask"):
    held, refusal = until_refused()
    found = [len(held), refusal, len(asked) < 100]
    for each in held:
        each.settle(tokens=1)
    found += [held[0].scope, held[-1].scope, refused(reserve, tokens=9001), refused(reserve, tokens=9000)]
say(found)
"""
    granted, refusal, few, first, last, over, fits = job.says(program, {"budgets": {scope: {"tokens": 10_000}}})
    assert granted == 1000
    assert refusal == ["tokens", 10_010, 10_000, scope]
    assert few
    assert first == last == "call"
    assert over == ["tokens", 10_001, 10_000, scope]
    assert fits is None


def test_flops_are_as_exact_as_tokens(job: Job) -> None:
    program = f"""{_ASKS}
held, refusal = until_refused(tokens=1, flops=3 * 10**9)
for each in held:
    each.settle(tokens=1, flops=10**9)
say([len(held), refusal, refused(reserve, tokens=1, flops=2 * 10**12 + 1), refused(draw), len(asked) < 100,
     refused(reserve, tokens=1, flops=2 * 10**12)])
"""
    granted, refusal, over, unknown, few, fits = job.says(program, {"budgets": {"actor": {"flops": 3e12}}})
    assert granted == 1000
    assert refusal == ["flops", 3.003e12, 3e12, "actor"]
    assert over == ["flops", 3_000_000_000_001, 3e12, "actor"]
    assert unknown.startswith("NotEnforced: not enforced: budgets.actor.flops")
    assert few
    assert fits is None


_HOLDER = f"""{_ASKS}
held = [draw() for _ in range(11)]
purse = purses.find(("",))[0]
say([len(asked), purse is not None])
"""


def test_what_lies_in_a_purse_is_lost_for_nobody(job: Job) -> None:
    """Ten of a thousand were drawn ten at a time; another actor of the job may have all the rest, and not one more."""
    policy = {"budgets": {"job": {"tokens": 10_000}}}
    holder = job.start(f"{_HOLDER}\nhear()\nsay([refused(draw, 10), refused(draw, 1)])", policy)
    assert holder.hears() == [1, True]
    other = job.start("say([refused(reserve, tokens=9891), refused(reserve, tokens=9890)])\nhear()", policy)
    over, fits = other.hears()
    assert over == ["tokens", 10_001, 10_000, "job"]
    assert fits is None  # refused() gives it up at once: as reserved it is charged
    holder.says(None)
    assert holder.hears() == [["tokens", 10_010, 10_000, "job"], ["tokens", 10_001, 10_000, "job"]]
    other.says(None)
    assert holder.ends() == other.ends() == 0


@pytest.mark.parametrize("how", ["os._exit(0)", "os.kill(os.getpid(), 9)"])
def test_of_who_dies_only_what_was_drawn_is_charged(job: Job, how: str) -> None:
    policy = {"budgets": {"job": {"tokens": 10_000}}}
    holder = job.start(f"{_HOLDER}\nhear()\n{how}", policy)
    assert holder.hears() == [1, True]
    other = job.start("hear()\nsay([refused(reserve, tokens=9891), refused(reserve, tokens=9890)])", policy)
    holder.says(None)
    holder.ends()
    other.says(None)
    assert other.hears() == [["tokens", 10_001, 10_000, "job"], None]
    assert other.ends() == 0
    spans = [entry.span for entry in merge(read([job.folder], Quarantine())).values()]
    (unsettled,) = [dict(span.attributes) for span in spans if span.name == "ray_guard.unsettled"]
    assert unsettled["ray_guard.tokens"] == 110


def test_a_purse_that_is_being_drawn_from_is_waited_for_and_not_for_ever(job: Job) -> None:
    """As if the process were stopped in the middle of it: what nobody can tell is not granted."""
    policy = {"budgets": {"job": {"tokens": 10_000}}}
    stopped = "os.eventfd_read(purse._lock)\nsay(0)\nhear()\nos.eventfd_write(purse._lock, 1)\nsay(0)\nhear()"
    holder = job.start(f"{_HOLDER}\n{stopped}", policy)
    holder.hears()
    holder.hears()
    other = job.start("say(refused(reserve, tokens=9890))\nhear()\nsay(refused(reserve, tokens=9890))", policy)
    refusal = other.hears()
    assert refusal[0] == "tokens"
    assert refusal[1] > 10_000
    holder.says(None)
    holder.hears()
    other.says(None)
    assert other.hears() is None
    holder.says(None)
    assert holder.ends() == other.ends() == 0


def test_what_is_given_back_by_mistake_enlarges_no_limit(job: Job) -> None:
    """A process that writes into its own purse: the supervisor takes back no more than it gave."""
    program = f"""{_HOLDER}
os.eventfd_write(purse._tokens, 10**9)
over = refused(reserve, tokens=10_001)
held[0].settle(tokens=5000)
say([over, refused(reserve, tokens=5001), refused(reserve, tokens=5000)])
"""
    started = job.start(program, {"budgets": {"actor": {"tokens": 10_000}}})
    started.hears()
    assert started.hears() == [["tokens", 10_011, 10_000, "actor"], ["tokens", 10_001, 10_000, "actor"], None]


def test_a_purse_that_its_process_has_filled_to_the_brim_costs_nobody_anything(job: Job) -> None:
    program = f"""{_HOLDER}
os.eventfd_write(purse._tokens, (1 << 64) - 2 - os.eventfd_read(purse._tokens))
for each in held:
    each.settle(tokens=10)
over = refused(reserve, tokens=9891)
say([over, refused(reserve, tokens=9890)])
"""
    started = job.start(program, {"budgets": {"actor": {"tokens": 10_000}}})
    started.hears()
    assert started.hears() == [["tokens", 10_001, 10_000, "actor"], None]


def test_an_episodes_purse_ends_with_it(job: Job) -> None:
    env = job.start(
        """
with episode(id="r") as scope:
    say(ray_guard.context())
    hear()
say(len(ray_guard.violations()))  # whose answer comes after the episode's end
hear()
""",
        {"budgets": {"episode": {"tokens": 10_000}}},
    )
    asked = env.hears()
    engine = job.start(f"""{_ASKS}
where = hear()
for _ in range(5):
    draw(context=where).settle(tokens=10)
inside = draw(context=where)
say([inside.scope, inside.unknown, len(asked)])
hear()
outside = draw(context=where)
inside.settle(tokens=10)
say([outside.scope, outside.unknown, len(asked)])
""")
    engine.says({**asked, "quotas": []})
    assert engine.hears() == ["episode", False, 1]
    env.says(None)
    assert env.hears() == 0
    engine.says(None)
    assert engine.hears() == ["actor", True, 2]
    env.says(None)
    assert env.ends() == engine.ends() == 0


def test_a_second_policy_holds_for_what_was_in_a_purse(job: Job) -> None:
    program = f"""{_HOLDER}
ray_guard.confine({{"egress": {{"allow": []}}, "budgets": {{"actor": {{"tokens": 150}}}}}})
held, refusal = until_refused()
say([len(held), refusal])
"""
    started = job.start(program, {"budgets": {"actor": {"tokens": 10_000}}})
    assert started.hears() == [1, True]
    assert started.hears() == [4, ["tokens", 160, 150, "actor"]]
    assert started.ends() == 0


def test_no_purse_where_a_violation_ends_what_would_draw_from_it(job: Job) -> None:
    program = f"{_ASKS}\nwith episode(id='r'):\n    held = [draw() for _ in range(5)]\nsay(asked.count('reserve'))"
    policy: dict[str, Any] = {"budgets": {"episode": {"tokens": 10_000}}, "on_violation": "end_episode"}
    assert job.says(program, policy) == 5


def test_purses_are_few_and_a_forked_child_has_none(job: Job) -> None:
    program = f"""{_ASKS}
def descriptors():
    return len(os.listdir("/proc/self/fd"))
before = descriptors()
for number in range(60):
    with episode(id=str(number)):
        for _ in range(3):
            draw().settle(tokens=1)
few = descriptors() - before
here = next(reversed(purses._known.values())) is not None
child = os.fork()
if child == 0:
    os._exit(10 + bool(purses._known) + 2 * (descriptors() > before))
gc.collect()
say([few, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), here, asked.count("reserve")])
"""
    few, child, here, reserved = job.says(program, {"budgets": {"actor": {"tokens": 10**9}}})
    assert 0 < few <= 48
    assert child == 10
    assert here
    assert reserved <= 70


def test_a_limit_holds_beyond_the_supervisor_that_filled_the_purse(job: Job) -> None:
    """What was in it counts as used under the next one, and may be drawn: altogether not one token too many."""
    program = f"""{_HOLDER}
ray_guard.violations()  # by its next round the supervisor has written down what it had granted before
say(supervisors[-1])
hear()
more, refusal = until_refused()
for each in held + more:
    each.settle(tokens=10)
say([len(held) + len(more), refusal, refused(draw)])
"""
    started = job.start(program, {"role": "policy", "budgets": {"actor": {"tokens": 10_000}}})
    started.hears()
    os.kill(started.hears(), signal.SIGKILL)
    started.says(None)
    granted, refusal, later = started.hears()
    assert granted == 1000
    assert refusal == later == ["tokens", 10_010, 10_000, "actor"]
    assert started.ends() == 0


def test_what_is_no_draw_is_no_settlement(job: Job) -> None:
    program = f"""{_HOLDER}
line = held[0]._line
for more in ({{"purse": 99, "drawn": [1, 0]}}, {{"purse": purse.number, "drawn": [-1, 0]}},
             {{"purse": purse.number, "drawn": "10"}}, {{"purse": True, "drawn": [1, 0]}}):
    line.send({{"op": "settle", "tokens": 1, "flops": None, **more}})
say([refused(reserve, tokens=9891), refused(reserve, tokens=9890)])
"""
    started = job.start(program, {"budgets": {"actor": {"tokens": 10_000}}})
    started.hears()
    assert started.hears() == [["tokens", 10_001, 10_000, "actor"], None]
    assert started.ends() == 0
