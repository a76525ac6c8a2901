"""Engines by pid and start time, and computing that nobody asked for."""

from __future__ import annotations

import pytest

from ray_guard.compute.engines import ENGINES_LIMIT, IDLE_S, SETTLE_S, Engine, Engines, Phase, idle_use

TICK = 0.5


def test_an_engine_is_a_pid_and_a_start_time() -> None:
    engines = Engines()
    engines.register(7, 100, Phase.LOAD)
    assert engines.find(7, 100) is not None
    assert engines.find(7, 101) is None, "another process was given the number"
    assert engines.find(8, 100) is None
    engines.register(7, 101, Phase.ROLLOUT)
    assert engines.find(7, 100) is None
    engines.forget(7)
    assert engines.pids() == ()


def test_only_an_engine_declares() -> None:
    engines = Engines()
    with pytest.raises(ValueError, match="not registered"):
        engines.declare(7, 100, 0.0, Phase.ROLLOUT, 1)


def test_there_is_an_end_to_them() -> None:
    engines = Engines()
    for pid in range(ENGINES_LIMIT):
        engines.register(pid, 1, Phase.LOAD)
    engines.register(0, 2, Phase.LOAD)
    with pytest.raises(ValueError, match="more than"):
        engines.register(ENGINES_LIMIT, 1, Phase.LOAD)


def ticks(engine: Engine, share: float, seconds: float, start: float = 100.0) -> float | None:
    """After how many seconds ``share`` of a GPU is reported; None: not within ``seconds``."""
    for at in range(1, int(seconds / TICK) + 1):
        if idle_use(engine, share * TICK, TICK, start + at * TICK):
            return at * TICK
    return None


@pytest.mark.parametrize("phase", [Phase.ROLLOUT, Phase.SLEEP])
def test_computing_without_a_request_is_found(phase: Phase) -> None:
    found = ticks(Engine(1, 1, phase, in_flight=0), 1.0, 10)
    assert found is not None
    assert IDLE_S <= found <= IDLE_S + 2 * TICK


@pytest.mark.parametrize("phase", [Phase.LOAD, Phase.WARM_UP, Phase.WEIGHT_SYNC, Phase.TRAIN])
def test_declared_phases_may_compute(phase: Phase) -> None:
    assert ticks(Engine(1, 1, phase, in_flight=0), 1.0, 60) is None


def test_requests_may_be_answered_and_housekeeping_done() -> None:
    assert ticks(Engine(1, 1, Phase.ROLLOUT, in_flight=3), 1.0, 60) is None
    assert ticks(Engine(1, 1, Phase.ROLLOUT, in_flight=0), 0.05, 600) is None
    assert ticks(Engine(1, 1, Phase.ROLLOUT, in_flight=None), 1.0, 60) is None, "it does not tell, so nobody knows"


def test_bursts_between_requests_add_up() -> None:
    """Two seconds of mining after each request would never be three in a row."""
    engine = Engine(1, 1, Phase.ROLLOUT, in_flight=0)
    at, found = 100.0, 0
    for _ in range(4):
        found += ticks(engine, 1.0, 2.0, at) is not None
        engine.in_flight = 1
        assert ticks(engine, 1.0, 2.0, at + 2) is None
        engine.in_flight = 0
        at += 4.0
    assert found >= 1


def test_what_is_still_seen_of_a_request_is_not_idle_use() -> None:
    engines = Engines()
    engine = engines.register(1, 1, Phase.ROLLOUT)
    engines.declare(1, 1, 100.0, None, 0)
    assert ticks(engine, 1.0, SETTLE_S, 100.0) is None
    assert engine.idle_s == 0.0
