"""What a contestant of calls.py runs: many tools at once, each of which sleeps. Standard library only.

    python holder.py guard|sandlock

Reads lines: ``weigh`` (its own PSS in KiB), ``hold COUNT`` (starts that many and answers how many run).
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

SLEEP = ["sleep", "1000"]


def guard() -> Callable[[], Any]:
    import ray_guard

    ray_guard.confine({"egress": {"allow": []}})
    return lambda: ray_guard.Popen(SLEEP)


def sandlock() -> Callable[[], Any]:
    from sandlock import Sandbox

    def start() -> threading.Thread:
        box = Sandbox(fs_readable=["/"], net_allow=["127.0.0.1:9"])
        thread = threading.Thread(target=box.run, args=(SLEEP,), daemon=True)
        thread.start()
        return thread

    return start


def weight() -> int:
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pss:"))


def main() -> None:
    start = {"guard": guard, "sandlock": sandlock}[sys.argv[1]]()
    held: list[Any] = []
    for line in sys.stdin:
        how, *numbers = line.split()
        if how == "weigh":
            print(weight())
        else:
            held += [start() for _ in range(int(numbers[0]))]
            time.sleep(0.5)
            print(sum(each.is_alive() if isinstance(each, threading.Thread) else each.poll() is None for each in held))
        sys.stdout.flush()
    for each in held:
        if not isinstance(each, threading.Thread):
            each.kill()


if __name__ == "__main__":
    main()
