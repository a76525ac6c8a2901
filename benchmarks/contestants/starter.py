"""What a contestant of start.py runs: starts /usr/bin/true again and again. Standard library only (also for the peers).

    python starter.py plain|guard|sandlock PORT

Reads lines: ``try PORT`` (status of bash connecting there, 0: made), ``start COUNT THREADS`` (nanoseconds each).
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

TRUE = ["/usr/bin/true"]


def plain(_port: str) -> Callable[[list[str]], int]:
    return lambda command: subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode


def guard(port: str) -> Callable[[list[str]], int]:
    import ray_guard

    ray_guard.confine({"egress": {"allow": [f"127.0.0.1:{port}"]}})
    ray_guard.episode(id="bench", group="g", iteration=1).__enter__()
    ray_guard.tool_call("bash", {"n": 1}).__enter__()
    return lambda command: ray_guard.run(command, stderr=subprocess.DEVNULL).returncode


def sandlock(port: str) -> Callable[[list[str]], int]:
    from sandlock import Sandbox

    def run(command: list[str]) -> int:
        result: Any = Sandbox(fs_readable=["/"], net_allow=[f"127.0.0.1:{port}"]).run(command)
        return int(result.exit_code)

    return run


def main() -> None:
    kind, port = sys.argv[1:]
    run = {"plain": plain, "guard": guard, "sandlock": sandlock}[kind](port)
    for line in sys.stdin:
        how, *numbers = line.split()
        if how == "try":
            print(run(["/bin/bash", "-c", f"exec 3<>/dev/tcp/127.0.0.1/{numbers[0]}"]))
        else:
            print(*start(run, int(numbers[0]), int(numbers[1])))
        sys.stdout.flush()


def start(run: Callable[[list[str]], int], count: int, threads: int) -> list[int]:
    taken: list[int] = []

    def work() -> None:
        for _ in range(count):
            began = time.perf_counter_ns()
            if run(TRUE) != 0:
                raise SystemExit("true is not true")
            taken.append(time.perf_counter_ns() - began)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return taken


if __name__ == "__main__":
    main()
