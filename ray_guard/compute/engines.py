"""Which processes may use a target's GPUs, and what they are doing there. Pure. Runs in supervisor; words in target.

An engine is a process (pid and start time) that its target has named: vLLM's EngineCore and workers, a trainer. Its
phases are declared by the same target, so they tell an honest program's state and prove nothing: an engine that lies
about its phases is found by identity and by its budget, not here.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

IDLE_SHARE: Final = 0.1
"""Utilization below that is housekeeping."""
IDLE_S: Final = 3.0
"""GPU-seconds that nobody asked for and that are reported."""
IDLE_LEAK: Final = 0.05
"""Of all time, the part that an engine may compute for itself: so much is forgotten of what it has gathered."""
SETTLE_S: Final = 2.0
"""After a request or a phase has ended NVML still shows what it was doing."""
ENGINES_LIMIT: Final = 1024


class Phase(StrEnum):
    """What an engine does. Only in ROLLOUT and SLEEP does somebody have to ask for what it computes."""

    LOAD = "load"
    WARM_UP = "warm_up"
    ROLLOUT = "rollout"
    WEIGHT_SYNC = "weight_sync"
    SLEEP = "sleep"
    TRAIN = "train"


_ANSWERS_REQUESTS: Final = (Phase.ROLLOUT, Phase.SLEEP)


class Engine:
    """One engine process. ``in_flight`` None: it does not tell, so idle use cannot be judged."""

    __slots__ = ("idle_s", "in_flight", "phase", "pid", "settled", "start_time")

    def __init__(self, pid: int, start_time: int, phase: Phase = Phase.LOAD, *, in_flight: int | None = None) -> None:
        self.pid = pid
        self.start_time = start_time
        self.phase = phase
        self.in_flight = in_flight
        self.settled = 0.0
        """When (monotonic seconds) NVML shows nothing any more of what it was asked before."""
        self.idle_s = 0.0
        """GPU-seconds that nobody asked for, as far as they are not forgotten."""


class Engines:
    """The engines of one target."""

    def __init__(self) -> None:
        self._by_pid: dict[int, Engine] = {}

    def register(self, pid: int, start_time: int, phase: Phase) -> Engine:
        """Names a process as an engine; once more replaces what was known of that pid.

        Raises:
            ValueError: there are too many.
        """
        if len(self._by_pid) >= ENGINES_LIMIT and pid not in self._by_pid:
            raise ValueError(f"more than {ENGINES_LIMIT} engine processes")
        engine = Engine(pid, start_time, phase)
        self._by_pid[pid] = engine
        return engine

    def find(self, pid: int, start_time: int) -> Engine | None:
        """The engine with that pid, if it is still the same process."""
        engine = self._by_pid.get(pid)
        return engine if engine is not None and engine.start_time == start_time else None

    def declare(self, pid: int, start_time: int, now: float, phase: Phase | None, in_flight: int | None) -> None:
        """An engine has entered a phase, or has that many requests in flight; None: as before.

        Raises:
            ValueError: there is no such engine.
        """
        engine = self.find(pid, start_time)
        if engine is None:
            raise ValueError(f"process {pid} is not registered as an engine")
        if phase is not None:
            engine.phase = phase
        if in_flight is not None:
            engine.in_flight = in_flight
        engine.settled = now + SETTLE_S

    def forget(self, pid: int) -> None:
        self._by_pid.pop(pid, None)

    def pids(self) -> tuple[int, ...]:
        return tuple(self._by_pid)


def idle_use(engine: Engine, computed_s: float, passed_s: float, now: float) -> bool:
    """Whether an engine has computed what nobody asked for, by now for :data:`IDLE_S`.

    What it computes between requests is gathered over requests, so that short bursts are found as well as one long.

    Args:
        engine: what is known of it; keeps count.
        computed_s: GPU-seconds that it has used in the last ``passed_s`` seconds.
        now: monotonic seconds.
    """
    engine.idle_s = max(0.0, engine.idle_s - IDLE_LEAK * passed_s)
    asked = engine.phase not in _ANSWERS_REQUESTS or engine.in_flight != 0  # None: it does not tell
    if not asked and now - passed_s >= engine.settled and computed_s >= IDLE_SHARE * passed_s:
        engine.idle_s += computed_s
    if engine.idle_s < IDLE_S:
        return False
    engine.idle_s = 0.0
    return True
