"""What it costs to know who holds a GPU: a census of 300 processes, and NVML asked twice a second.

    python benchmarks/census.py [--processes 300] [--descriptors 8] [--rounds 20] [--seconds 10] [--json OUT]

CPU milliseconds of one census, as the helper makes them: of processes that have not run since the last one (whoever
does not run opens nothing), of processes that all have (a part has its turn each time), and the very first. The NVML
poller is measured over ``--seconds`` with nvidia-ml-py itself, on the library that tests script; on a host with a GPU,
on its own library.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import harness

from ray_guard.kernel.gpu_devices import Descriptors, Kind
from ray_guard.kernel.nvml import NotLoaded, find_library
from ray_guard.supervisor.gpu_helper import CENSUS_S, TURNS

sys.path.insert(0, str(harness.HERE.parent / "tests" / "gpu_standin"))

from standin import Standin

LIMIT_MS = 5.0
LIMIT_PERCENT = 0.5
_MAJORS = {195: Kind.NVIDIA}

_CHILD = """
import os, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: None)
for _ in range(int(sys.argv[1])):
    if os.fork() == 0:
        kept = [os.pipe() for _ in range(int(sys.argv[2]) // 2)]
        while True: signal.pause()
print(flush=True)
sys.stdin.read()
os.killpg(0, signal.SIGKILL)
"""

_POLLER = """
import json, sys, time
from ray_guard.kernel import nvml
library = nvml.Nvml(sys.argv[1])
library.read()
began, until = time.thread_time(), time.monotonic() + float(sys.argv[2])
count, slowest = 0, 0.0
while time.monotonic() < until:
    at = time.monotonic()
    json.dumps([nvml.to_wire(reading) for reading in library.read()])
    slowest = max(slowest, time.monotonic() - at)
    count += 1
    time.sleep(0.5)
print(json.dumps([time.thread_time() - began, count, slowest]))
"""


@contextmanager
def processes(count: int, descriptors: int) -> Iterator[int]:
    """``count`` processes that sleep until they are signalled; the process group they are."""
    command = [sys.executable, "-I", "-S", "-c", _CHILD, str(count), str(descriptors)]
    started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert started.stdout is not None
    started.stdout.readline()
    time.sleep(0.5)
    try:
        yield started.pid
    finally:
        os.killpg(started.pid, signal.SIGKILL)
        started.communicate()


def cost_ms(descriptors: Descriptors) -> float:
    began = time.process_time()
    descriptors.scan()
    return 1000 * (time.process_time() - began)


def main() -> None:
    parser = harness.arguments(__doc__ or "", processes=300, descriptors=8, rounds=20, seconds=10)
    options = parser.parse_args()
    report = harness.Report(options)
    with processes(options.processes, options.descriptors) as group:
        known = Descriptors(_MAJORS, turns=TURNS)
        known.scan()

        def idle() -> list[float]:
            for _ in range(TURNS):
                known.scan()
            return [cost_ms(known)]

        def busy() -> list[float]:
            os.killpg(group, signal.SIGUSR1)
            time.sleep(0.1)
            return [cost_ms(known)]

        contestants = [
            harness.Contestant("none has run since the last", idle),
            harness.Contestant("all have run since the last", busy),
            harness.Contestant("the first census", lambda: [cost_ms(Descriptors(_MAJORS))]),
        ]
        outcomes = harness.compare(contestants, options.rounds)
    report.add(f"one census of {options.processes} processes", "ms of CPU", outcomes, [], 2)
    share = 100 * outcomes[1].p50 / 1000 / CENSUS_S
    report.add_facts("census by the helper", {"every s": CENSUS_S, "% of a core, if all run always": share})
    report.goal(f"ms of CPU for {options.processes} processes that have not run", outcomes[0].p50, LIMIT_MS)
    report.goal(f"ms of CPU for {options.processes} processes that all have", outcomes[1].p50, LIMIT_MS)
    with harness.scratch() as folder:
        try:
            library = find_library()
        except NotLoaded:
            made = Standin(folder)
            made.gpus[0].runs(os.getpid())
            made.write()
            library = str(made.library)
        command = [sys.executable, "-c", _POLLER, library, str(options.seconds)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        cpu, count, slowest = json.loads(done.stdout)
    percent = 100 * cpu / options.seconds
    report.add_facts(
        f"NVML, asked {count} times in {options.seconds} s ({Path(library).parent})",
        {"% of a core": f"{percent:.3f}", "slowest answer in ms": 1000 * slowest},
    )
    report.goal("% of a core for NVML twice a second", percent, LIMIT_PERCENT)
    report.close()


if __name__ == "__main__":
    main()
