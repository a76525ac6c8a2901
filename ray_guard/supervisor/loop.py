"""The supervisor's event loop: epoll and timers, in one thread. Runs in the supervisor.

Not asyncio: a notified connect should cost microseconds, and one callback per event is all there is.
"""

from __future__ import annotations

import heapq
import itertools
import select
import time
from collections.abc import Callable
from typing import Final

from ray_guard.log import logger

log = logger("ray_guard.loop")

_EVENTS: Final = 64
"""Taken from the kernel at one go."""


class Loop:
    """Calls back when a descriptor is ready or a time has come. A failing callback is logged; the loop goes on."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._running = False
        self._new: set[int] = set()
        """Watched since this round began: what it has to tell of such a number is of a descriptor closed since."""
        self.each_round: list[Callable[[], None]] = []
        """Called when all that was ready has been seen to. None may raise."""

    def watch(self, descriptor: int, events: int, callback: Callable[[int], None]) -> None:
        """Calls ``callback(events)`` whenever ``descriptor`` is ready (level-triggered), until :meth:`forget`."""
        self._epoll.register(descriptor, events)
        self._callbacks[descriptor] = callback
        self._new.add(descriptor)

    def forget(self, descriptor: int) -> None:
        """To be called before the descriptor is closed: a duplicate elsewhere would keep it in the set."""
        if self._callbacks.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def later(self, seconds: float, callback: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._order), callback))

    def run(self) -> None:
        """Until :meth:`stop`."""
        self._running = True
        poll, callbacks, timers, clock = self._epoll.poll, self._callbacks, self._timers, time.monotonic
        new = self._new
        while self._running:
            timeout: float | None = None
            if timers:
                timeout = timers[0][0] - clock()
                if timeout <= 0:
                    self._fire()
                    timeout = 0  # and not on: timers that are late must not keep descriptors waiting
            ready = poll(timeout, _EVENTS)
            if new:
                new.clear()
            for descriptor, events in ready:
                callback = callbacks.get(descriptor)
                # An earlier callback of this round may have forgotten it, and another one got the number.
                if callback is not None and descriptor not in new:
                    try:
                        callback(events)
                    except Exception:
                        log.exception("descriptor %d", descriptor)
            for each in self.each_round:
                each()

    def _fire(self) -> None:
        """Calls what is due."""
        timers = self._timers
        while timers and timers[0][0] <= time.monotonic():
            due = heapq.heappop(timers)[2]
            try:
                due()
            except Exception:
                log.exception("timer")

    def stop(self) -> None:
        self._running = False
