"""The supervisor's side of the judge: what it does where that is lost."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ray_guard.evidence.journal import Journal
from ray_guard.kernel import seqpacket
from ray_guard.supervisor import judging
from ray_guard.supervisor.judging import Judging
from ray_guard.supervisor.loop import Loop


class _Target:
    """What is asked of a target here."""

    def __init__(self, folder: Path, **detect: str) -> None:
        self.journal = Journal(folder)
        self.policy = SimpleNamespace(detect=detect, rules=())
        self.open: dict[str, Any] = {}
        self.violations: list[tuple[str, str]] = []
        self.unseen: Any = None

    def violation(self, _origin: Any, _span: Any, kind: str, *, reason: str, action: str, **_more: Any) -> None:
        self.violations.append((f"{kind} {reason}", action))


@pytest.fixture
def lines() -> Iterator[list[socket.socket]]:
    """The judges' ends of their lines."""
    found: list[socket.socket] = []
    yield found
    for line in found:
        line.close()


def _tool(call: str) -> Any:
    return SimpleNamespace(running=True, call=call, origin=SimpleNamespace(trace_id="t", call=call))


def test_a_judge_that_cannot_be_had_ends_the_calls_that_it_would_have_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "_AGAIN_S", (0.0, 60.0))
    loop = Loop()
    starts = []
    watch = Judging(loop, starts.append)  # whoever starts it lets its line go
    acting = _Target(tmp_path / "acting", mining="kill_call", probing="tag")
    tagging = _Target(tmp_path / "tagging", mining="tag")
    watch.join(cast("Any", acting), lambda: [_tool("one"), _tool("two")])
    watch.join(cast("Any", tagging), lambda: [_tool("three")])
    loop.later(60, loop.stop)
    give_up = watch._give_up

    def given_up(why: str) -> None:
        give_up(why)
        loop.stop()

    monkeypatch.setattr(watch, "_give_up", given_up)
    loop.run()
    assert len(starts) == 3
    assert acting.violations == [("detection unjudged: the judge was lost 3 times", "kill_call")] * 2
    assert tagging.violations == []
    acting.journal.close()
    tagging.journal.close()
    watch.close()


def test_a_judge_goes_on_where_the_one_before_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[socket.socket]
) -> None:
    monkeypatch.setattr(judging, "_AGAIN_S", (0.0, 0.0))
    loop = Loop()

    def start(line: socket.socket) -> None:
        lines.append(line.dup())
        if len(lines) > 1:
            loop.stop()

    watch = Judging(loop, start)
    target = _Target(tmp_path / "evidence", mining="kill_call")
    target.journal.append(b"{}\n")
    watch.join(cast("Any", target), list)
    received = seqpacket.receive(lines[0])
    assert received is not None
    read = received[0]
    assert read["offset"] == target.journal.size  # what was there before is nobody's that asked for it
    seqpacket.send(lines[0], {"op": "at", "folder": read["folder"], "log": read["log"], "number": 1, "offset": 77})
    lines[0].close()
    loop.later(60, loop.stop)
    loop.run()
    again = seqpacket.receive(lines[1])
    assert again is not None
    assert again[0] == {**read, "offset": 77}
    lines.pop().close()
    watch.close()
    target.journal.close()


def test_one_that_makes_no_headway_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[socket.socket]
) -> None:
    loop = Loop()
    watch = Judging(loop, lambda line: lines.append(line.dup()))
    target = _Target(tmp_path / "evidence", mining="violation")
    watch.join(cast("Any", target), lambda: [_tool("one")])
    watch._tick()
    assert target.violations == []  # there is nothing to judge
    target.journal.append(b"{}\n")
    watch._tick()
    now = time.monotonic()
    monkeypatch.setattr(judging.time, "monotonic", lambda: now + judging._PATIENCE_S + 1)
    watch._tick()
    assert target.violations == [("detection unjudged: the judge makes no headway", "")]
    lines.pop().close()
    watch.close()
    target.journal.close()


def test_a_judge_that_nobody_asks_for_any_more_is_dismissed(tmp_path: Path, lines: list[socket.socket]) -> None:
    loop = Loop()
    watch = Judging(loop, lambda line: lines.append(line.dup()))
    target = _Target(tmp_path / "evidence", mining="tag")
    watch.join(cast("Any", target), list)
    watch.leave(cast("Any", target))
    watch._tick()
    told = [seqpacket.receive(lines[0]), seqpacket.receive(lines[0])]
    assert [each[0]["op"] for each in told if each is not None] == ["read", "drain"]  # what it has done is still judged
    seqpacket.send(lines[0], {"op": "drained"})
    watch._ready()
    assert seqpacket.receive(lines[0]) is None
    watch.join(cast("Any", target), list)
    assert len(lines) == 2
    lines.pop().close()
    watch.close()
    target.journal.close()
