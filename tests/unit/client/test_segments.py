"""A rollout of many spans is spread over traces that each have one root, and lead to one another."""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from ray_guard.client import carry, channel, scope, segments
from ray_guard.client.decorator import tool
from ray_guard.records import LINK, PARENT, ROOT_TRACE
from ray_guard.supervisor import fields
from ray_guard.testing import RecordingChannel

OUTSIDE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> int:
    for module in (segments, scope):
        monkeypatch.setattr(module, "SPANS_LIMIT", 20)
    return 20


def check(opened: list[dict[str, Any]], *, outside: str | None = None) -> dict[str, list[dict[str, Any]]]:
    """What holds for any rollouts, however many spans they have; returns the spans of each trace.

    Args:
        outside: a trace that others began, so that its root is not among `opened`.
    """
    spans = {(each["trace"], each["span"]): each for each in opened}
    assert len(spans) == len(opened)
    traces: dict[str, list[dict[str, Any]]] = {}
    for each in opened:
        traces.setdefault(each["trace"], []).append(each)
        if each["trace"] != outside:
            assert each["parent"] is None or (each["trace"], each["parent"]) in spans, "an orphan"
        # Its true parents lead to the rollout, and name the trace that every span of a segment says it belongs to.
        above, steps = each, 0
        while True:
            links = [link for link in above["links"] if link[2:] == [PARENT]]
            assert len(links) <= 1
            if links:
                key = (links[0][0], links[0][1])
            elif above["parent"] is None:
                break
            else:
                key = (above["trace"], above["parent"])
            if key[0] == outside and key not in spans:
                break
            above, steps = spans[key], steps + 1
            assert steps < 50
        root = outside if outside is not None and above["name"] != "ray_guard.segment" else above["trace"]
        if each["name"] != "ray_guard.segment":
            assert each["identity"].get(ROOT_TRACE, each["trace"]) == root
        assert (ROOT_TRACE in each["identity"]) == (each["trace"] != each["identity"].get(ROOT_TRACE, each["trace"]))
    for trace, inside in traces.items():
        roots = [each for each in inside if each["parent"] is None]
        assert len(roots) == (0 if trace == outside else 1)
    # From each segment links lead to the one before, and so to the first.
    for each in opened:
        if each["name"] == "ray_guard.segment":
            steps, at = 0, each
            while at["name"] == "ray_guard.segment":
                ((trace, span, _),) = [link for link in at["links"] if link[2] == "previous_segment"]
                if trace == outside:
                    break
                at, steps = spans[trace, span], steps + 1
            assert steps <= each["attributes"]["ray_guard.segment.number"] - 1
            if each["attributes"]["ray_guard.segment.number"] > 2:
                assert "rollout" in {link[2] for link in each["links"]}
    return traces


def test_a_rollout_goes_on_in_other_traces(wire: RecordingChannel, few: int) -> None:
    with scope.episode(id="r1", group="g", iteration=3) as episode:
        for n in range(40):
            with scope.turn(n), scope.chat("m"):
                pass
            with scope.tool_call("x"):
                pass
    traces = check(wire.sent("open"))
    assert len(wire.sent("open")) == 121 + len(traces) - 1
    assert len(traces) == 7
    assert max(map(len, traces.values())) == few
    assert wire.sent("open")[0]["trace"] == episode.trace, "the first is the rollout's own"
    ends = {each["span"] for each in wire.sent("close")}
    assert ends == {each["span"] for each in wire.sent("open")}
    for each in wire.sent("open")[1:]:
        assert each["identity"]["rl.rollout.id"] == "r1"
        if each["name"] != "ray_guard.segment":
            assert each["episode"] == episode.span, "budgets and violations are the rollout's as ever"


def test_within_one_turn_and_one_call_too(wire: RecordingChannel, few: int) -> None:
    with scope.episode(), scope.turn(7) as turn, scope.tool_call("outer") as outer:
        for _ in range(50):
            with scope.tool_call("inner") as inner:
                assert scope.context()["identity"]["rl.turn"] == 7
                with scope.tool_call("innermost") as innermost:
                    assert innermost.trace == inner.trace or innermost.links == [(inner.trace, inner.span, PARENT)]
    traces = check(wire.sent("open"))
    assert len(traces) > 4
    inners = wire.sent("open", name="execute_tool inner")
    moved = [each for each in inners if each["trace"] != turn.trace]
    assert moved
    assert all(each["links"] == [[outer.trace, outer.span, PARENT]] for each in moved)


def test_in_threads_and_tasks_nothing_is_lost(wire: RecordingChannel, few: int) -> None:
    carry.install_carriers()
    try:

        @tool
        def plain() -> None: ...

        @tool
        async def later() -> None:
            await asyncio.sleep(0)

        async def many() -> None:
            await asyncio.gather(*(later() for _ in range(100)))

        with scope.episode(), ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(plain) for _ in range(400)]:
                done.result()
            asyncio.run(many())
    finally:
        carry.remove_carriers()
    traces = check(wire.sent("open"))
    assert sum(each["name"] != "ray_guard.segment" for each in wire.sent("open")) == 501
    assert len(traces) > 3, "who is under way while one thread begins the next goes on in the old one"


def test_rollouts_side_by_side_have_segments_of_their_own(wire: RecordingChannel, few: int) -> None:
    def rollout(n: int) -> None:
        with scope.episode(id=str(n)):
            for _ in range(50):
                with scope.tool_call("x"):
                    pass

    threads = [threading.Thread(target=rollout, args=(n,)) for n in range(6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    for inside in check(wire.sent("open")).values():
        assert len({each["identity"]["rl.rollout.id"] for each in inside}) == 1


def test_below_a_span_of_others(wire: RecordingChannel, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No rollout at all: every call is a child of what started the job, and there are more than a trace may hold."""
    monkeypatch.setenv("TRACEPARENT", OUTSIDE)
    monkeypatch.setattr(segments, "known", segments._Known().of)
    monkeypatch.setattr(scope, "known", segments.known)
    for _ in range(90):
        with scope.tool_call("x"), scope.tool_call("y"):
            pass
    traces = check(wire.sent("open"), outside=OUTSIDE[3:35])
    assert len(traces) >= 9
    last = wire.sent("open", name="execute_tool x")[-1]
    assert last["links"] == [[OUTSIDE[3:35], OUTSIDE[36:52], PARENT]]
    assert last["identity"][ROOT_TRACE] == OUTSIDE[3:35]


def test_another_actor_joins_the_segment_it_is_called_from(wire: RecordingChannel, few: int) -> None:
    with scope.episode() as episode:
        for _ in range(30):
            with scope.tool_call("x"):
                pass
        with scope.tool_call("asks"):
            given = json.loads(json.dumps(scope.context()))
    carry.move_to(None)
    with scope.attach(given):
        for _ in range(30):
            with scope.chat("m"):
                pass
    assert given["identity"][ROOT_TRACE] == episode.trace
    check(wire.sent("open"))


def test_an_episode_that_follows_starts_anew(wire: RecordingChannel, few: int) -> None:
    with scope.iteration(1) as iteration:
        for _ in range(30):
            with scope.episode() as episode, scope.tool_call("x"):
                pass
    assert (iteration.trace, iteration.span) in episode.links
    assert len(check(wire.sent("open"))) == 31


def test_links_say_what_they_lead_to_on_the_other_side_of_the_line(wire: RecordingChannel, few: int) -> None:
    with scope.episode():
        for _ in range(60):
            with scope.tool_call("x"):
                pass
    records = [fields.begun(each) for each in wire.sent("open")]
    above = {(each.trace_id, each.span_id): each for each in records}
    for each in records:
        if each.name == "execute_tool x":
            assert each.above is not None
            assert above[each.above].name == "invoke_agent agent"
    segment = [each for each in records if each.name == "ray_guard.segment"][-1]
    assert {link.attributes[LINK] for link in segment.links} == {"previous_segment", "rollout"}


class Counting:
    """A channel that keeps of each span what :func:`check` asks for, for there are many."""

    identity = {"rl.run.id": "run-1"}  # noqa: RUF012 - as the channel has it

    def __init__(self) -> None:
        self.opened: list[dict[str, Any]] = []

    def send_packet(self, packet: bytes) -> None:
        if packet.startswith(b'{"op":"open"'):
            self.opened.append(json.loads(packet))

    def warnings(self) -> list[str]:
        return []


@pytest.mark.parametrize("calls", [11_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_run_of_many_calls_is_followed_from_its_first_to_its_last(
    monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    wire = Counting()
    monkeypatch.setattr(channel, "current", lambda: wire)

    @tool
    def step() -> None: ...

    with scope.episode(id="long"):
        for _ in range(calls):
            step()
    traces = check(wire.opened)
    assert len(traces) == 1 + -(-(calls + 1 - segments.SPANS_LIMIT) // (segments.SPANS_LIMIT - 1))
    assert max(map(len, traces.values())) == segments.SPANS_LIMIT
    assert sum(each["name"] == "execute_tool step" for each in wire.opened) == calls
