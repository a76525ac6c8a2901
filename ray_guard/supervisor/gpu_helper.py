"""Reads the node's GPUs: who holds a descriptor, and what NVML tells. Runs as a helper process of the supervisor.

``python -I -m ray_guard.supervisor.gpu_helper`` writes one line of JSON at a time until its stdin closes::

    {"nvml": {"library": "/usr/lib64/libnvidia-ml.so.1", "driver": "575.57", "devices": 8}} or {"nvml": {"error": …}}
    {"census": {"monotonic": 81.2, "holders": [[4711, 99201, [49920]]], "unreadable": [[4712, 99300]]}}
    {"readings": [ … as ray_guard.kernel.nvml.to_wire gives them … ]}

A process of its own, because NVML takes the driver's locks and a descriptor's file may lie on a file system that does
not answer: neither may hold up a decision. NVML has a thread to itself, so that it does not hold up the census; it is
asked at most twice a second, and never while it is still answering. Pids are followed by start times.
"""

from __future__ import annotations

import json
import os
import select
import threading
import time
from itertools import count
from typing import Any, Final

from ray_guard.kernel import gpu_devices, gpu_majors, nvml, procfs

CENSUS_S: Final = 0.13
TURNS: Final = 6
"""Every process that runs is looked at each 0.8 s, whatever it does; a violation is to be told within a second."""
READING_S: Final = 0.5
"""Twice a second at most: asking NVML stalls whoever allocates on the GPU meanwhile."""
SAMPLES_EVERY: Final = 2
ENERGY_EVERY: Final = 8
"""How many readings go by for one with the dear parts: half a percent of a core for a GPU that way."""


class _Line:
    """Where both threads write."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def tell(self, message: dict[str, Any]) -> None:
        line = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            try:
                while line:
                    line = line[os.write(1, line) :]
            except OSError:
                os._exit(0)  # nobody listens any more


def _poll_nvml(line: _Line) -> None:
    try:
        path = nvml.find_library()
        library = nvml.Nvml(path)
        readings = library.read()
    except nvml.NotLoaded as error:
        line.tell({"nvml": {"error": str(error)}})
        return
    line.tell({"nvml": {"library": path, "driver": library.driver, "devices": len(readings)}})
    for turn in count(1):
        began = time.monotonic()
        line.tell({"readings": [nvml.to_wire(reading) for reading in read(library, turn)]})
        time.sleep(max(0.0, began + READING_S - time.monotonic()))


def read(library: nvml.Nvml, turn: int) -> list[nvml.Reading]:
    """The reading of that turn, with or without the dear parts."""
    return library.read(samples=turn % SAMPLES_EVERY == 0, energy=turn % ENERGY_EVERY == 0)


def _identified(pids: list[int]) -> list[tuple[int, int]]:
    found = ((pid, procfs.start_time(pid)) for pid in pids)
    return [(pid, start) for pid, start in found if start is not None]


def census(descriptors: gpu_devices.Descriptors) -> dict[str, Any]:
    """One census, as a message."""
    holders, unreadable = descriptors.scan()
    return {
        "monotonic": time.monotonic(),
        "holders": [[pid, start, sorted(holders[pid])] for pid, start in _identified(list(holders))],
        "unreadable": [list(each) for each in _identified(unreadable)],
    }


def main() -> None:
    """Until stdin closes."""
    line = _Line()
    threading.Thread(target=_poll_nvml, args=(line,), name="nvml", daemon=True).start()
    descriptors = gpu_devices.Descriptors(gpu_majors.known_majors(), turns=TURNS)
    waiting = select.poll()
    waiting.register(0, select.POLLIN)
    while True:
        began = time.monotonic()
        known = gpu_majors.known_majors()
        if known != descriptors.majors:  # a driver was loaded, or unloaded: what was looked at before counts no more
            descriptors = gpu_devices.Descriptors(known, turns=TURNS)
        line.tell({"census": census(descriptors)})
        left = max(0.0, began + CENSUS_S - time.monotonic())
        if waiting.poll(1000 * left) and not os.read(0, 4096):
            os._exit(0)  # NVML may be in the middle of something: it is not waited for


if __name__ == "__main__":
    main()
