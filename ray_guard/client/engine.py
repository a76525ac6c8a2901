"""target: names the processes that may use the actor's GPUs, and tells what they are doing there.

For integrations (vLLM's hook, trainers); no public name until these have settled what they need of it. What an engine
says of itself is taken as said: it is what tells computing that was asked for from computing that was not.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray_guard.client import channel
from ray_guard.compute.engines import Phase

__all__ = ["EngineProcess", "Phase", "register"]


class EngineProcess:
    """One registered process. In a process that is not guarded it does nothing."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._lock = threading.Lock()
        self._in_flight = 0

    def enter(self, phase: Phase) -> None:
        """From here on it is in ``phase``. Raises SupervisorLost."""
        self._tell(phase=phase.value)

    def answers_requests(self) -> None:
        """Says that its requests will be told, by :meth:`request`: from here on idle use can be found."""
        with self._lock:
            self._tell(in_flight=self._in_flight)

    @contextmanager
    def request(self) -> Iterator[None]:
        """One request, while it is in flight. The supervisor hears of the first and of the end of the last."""
        with self._lock:
            self._in_flight += 1
            if self._in_flight == 1:
                self._tell(in_flight=1)
        try:
            yield
        finally:
            with self._lock:
                self._in_flight -= 1
                if self._in_flight == 0:
                    self._tell(in_flight=0)

    def _tell(self, **state: Any) -> None:
        line = channel.current()
        if line is not None:
            line.send({"op": "engine_state", "pid": self.pid, **state})


def register(pid: int | None = None, phase: Phase = Phase.LOAD) -> EngineProcess:
    """Registers a process of this actor as one that may use its GPUs.

    Args:
        pid: of this process or one below it; None: this one.
        phase: what it does now.

    Raises:
        NotEnforced: the policy says ``gpu: none``.
        PolicyError: no such process of this actor.
    """
    engine = EngineProcess(os.getpid() if pid is None else pid)
    line = channel.current()
    if line is not None:
        line.request({"op": "engine", "pid": engine.pid, "phase": phase.value})
    return engine
